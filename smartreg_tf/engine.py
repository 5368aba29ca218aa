"""Put SMART on a Keras model: its training step becomes Algorithm 1's (paper: equation 1 and Algorithm 1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import tensorflow as tf

from smartreg.checking.recording import Recorder
from smartreg.config import SMARTConfig, check_options
from smartreg.proximal import last_move, momentum
from smartreg.report import Description
from smartreg_tf import compat, resume
from smartreg_tf.build import Builder, is_built
from smartreg_tf.measure import measure
from smartreg_tf.options import Options
from smartreg_tf.penalty import Penalty
from smartreg_tf.report import describe
from smartreg_tf.site import Patches
from smartreg_tf.validation import Validation

Tensor = Any
ENGINE = "_smartreg_engine"


class Engine:
    """Add SMART to one model's training step.

    `install` puts methods on the model's instance. Those that have a name of Keras' take Keras' own method first.

    Args:
        model, config: as `attach`.
        options: its other arguments.
        recorder: what `record` and `record_steps` make.
        call: the name of what the user called, for messages.

    Attributes:
        step: the variable that counts the optimiser steps.
    """

    METHODS = ("train_step", "compute_loss", "make_train_function", "reset_metrics")
    FILES = ("save", "save_weights", "load_weights")
    OTHERS = ("make_test_function", "make_predict_function")  # which remove SMART if an exception ended the fit

    def __init__(
        self,
        model: Any,
        config: SMARTConfig | None = None,
        options: Options = Options(),  # noqa: B008
        recorder: Recorder | None = None,
        call: str = "SMART",
    ) -> None:
        config = SMARTConfig() if config is None else config
        check_options(call, config)
        config.check_total_steps(call)
        self.model, self.config, self.options = model, config, options
        self.penalty = Penalty(model, config, options, recorder)
        self.site, self.passes, self.teacher = self.penalty.site, self.penalty.passes, self.penalty.teacher
        self.reports, self.observers, self.step = self.penalty.reports, self.penalty.observers, self.penalty.step
        self.validation = Validation(self.teacher, config.evaluate == "teacher")
        self.fit: Any = None  # the fit that a `SMARTCallback` is part of
        self.verbose = False  # whether to print `describe()` after the first step
        self._call = call
        self._patches = Patches()
        self._builder = Builder(model)
        self._begun = False
        self._compiled = compat.compilation(model)
        self._lambda_s: float | None = None  # of this step
        if is_built(model):
            self.teacher.follow()

    @property
    def active(self) -> bool:
        """Tell whether there is anything to add to plain training."""
        return self.config.active

    @property
    def averages(self) -> list[Any]:
        """Return theta~ in the order of `model.trainable_variables`, float32 or wider; empty while there is none."""
        return list(self.teacher.averages.values())

    @property
    def metrics(self) -> dict[str, float]:
        """Return R_s, D_Breg, max_delta and vanished, averaged since the metrics were reset.

        Also beta of theta~'s last move, once there was one, the optimiser step, and how many penalties were not finite.
        """
        step = self._steps
        moved = last_move(step, self.config)
        beta = {"beta": float(momentum(moved, self.config))} if self.config.has_teacher and moved > 0 else {}
        return self.reports.means | beta | {"step": float(step), "skipped": float(self.reports.skipped)}

    # Putting it on the model

    @property
    def installed(self) -> bool:
        """Tell whether this is on the model."""
        return getattr(self.model, ENGINE, None) is self

    def install(self) -> None:
        """Put SMART on the model's instance."""
        if hasattr(self.model, ENGINE):
            raise ValueError(
                "SMART: this model already has a SMARTCallback or attach(). Use one of the two: together they would "
                "train two penalties."
            )
        self._patches.put(self.model, ENGINE, self)
        self._compiled = compat.compilation(self.model)
        try:
            self.passes.install()
            for name in (*self.METHODS, *self.FILES, *self.OTHERS):
                self._put(name, getattr(self, name, None))
            self.put_epoch_logs()
            if self.validation.wanted:
                self._put("evaluate", self.validation.evaluate)
            # the compiled step is plain training's; `remove` puts it back
            self._patches.put(self.model, "train_function", None)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the model as it was before `install`."""
        if not self.installed:
            return
        self.passes.remove()
        self._patches.remove()
        self.validation.break_off()
        # compile() came in between: that step is not to come back
        if compat.compilation(self.model) is not self._compiled:
            vars(self.model)["train_function"] = None
        self.observers.close()

    def put_epoch_logs(self) -> None:
        """Put `_epoch_logs` on the model if this release of Keras has such a method."""
        if compat.epoch_logs(self.model) is not None:
            self._put(compat.EPOCH_LOGS, self._epoch_logs)

    def _put(self, name: str, ours: Callable[..., Any] | None) -> None:
        self._patches.put(self.model, name, partial(self._run, name, getattr(self.model, name), ours))

    def _run(self, name: str, original: Callable[..., Any], ours: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one of the model's methods while SMART is on it."""
        if self.fit is not None and self.fit.ended():  # another callback or the data ended the fit early
            self.remove()
            return getattr(self.model, name)(*args, **kwargs)
        return original(*args, **kwargs) if ours is None else ours(original, *args, **kwargs)

    # What Keras calls

    def make_train_function(self, original: Callable[..., Any], force: bool = False) -> Any:
        """Make Keras' compiled training step, followed by a look at what went wrong in it."""
        if self.model.train_function is not None and not force:
            return self.model.train_function
        self._check()
        weights = {self.config.smoothness_weight(steps) for steps in range(self.config.smoothness_steps)}
        compiled = {}
        for weight in weights:
            original(force=True)
            compiled[weight] = self.model.train_function

        def train_function(iterator: Any) -> Any:
            try:
                self.validation.put_back()
                iterator = self._begin(iterator)
                self._lambda_s = self.config.smoothness_weight(self._steps if len(weights) > 1 else 0)
                logs = compiled[self._lambda_s](iterator)
                self.judge()
                if self.verbose:
                    self.verbose = False
                    print(f"\n{self.describe()}")
            except (StopIteration, tf.errors.OutOfRangeError):  # the end of an epoch
                raise
            except BaseException:
                if self.fit is not None:  # Keras calls no on_train_end now
                    self.remove()
                raise
            finally:
                self._lambda_s = None
            return logs

        vars(self.model)["train_function"] = train_function  # past Keras' tracking
        return train_function

    def train_step(self, original: Callable[..., Any], *data: Any) -> Any:
        """Take the model's own step, with the penalty in its loss; then move theta~."""
        with self.training_step():
            logs = original(*data)
        return {**logs, **self.reports.logs}

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """Do what `train_step` does in a loop of your own: the forward, `compute_loss` and the update go inside."""
        if not self.active:
            yield
            return
        if not self.installed:
            raise RuntimeError(
                "SMART: training_step() came after the attach() block had ended. Put the loop inside the block, or "
                "begin a new attach()"
            )
        with self.penalty.training_step(self._weight()):
            yield
        if tf.executing_eagerly():
            self.judge()

    def compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the model's own loss, plus lambda_s R_s + mu D_Breg inside a training step."""
        self._builder.stop()
        # first, since every other pass clears model.losses
        loss = original(*args, **kwargs)
        names = ("x", "y", "y_pred", "sample_weight", "training")
        return self.penalty.added_to(loss, **{**dict(zip(names, args, strict=False)), **kwargs})

    def reset_metrics(self, original: Callable[..., Any]) -> None:
        """Reset Keras' metrics and SMART's."""
        original()
        self.reports.reset()

    def _epoch_logs(self, original: Callable[..., Any], logs: Any) -> Any:
        """Make Keras' epoch logs without ours, which are not among the model's metrics; then add ours."""
        ours = {name: value for name, value in self.reports.logs.items() if name in logs}
        return {**original({name: value for name, value in logs.items() if name not in ours}), **ours}

    def save_weights(self, original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the weights, and theta~, the step and the seeds beside them."""
        saved = original(filepath, *args, **kwargs)
        self.save_state(filepath)
        return saved

    save = save_weights  # of the whole model

    def load_weights(self, original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the weights, and theta~, the step and the seeds if they lie beside them."""
        loaded = original(filepath, *args, **kwargs)
        if os.path.exists(f"{filepath}{resume.SUFFIX}"):
            self.load_state(filepath)
        return loaded

    # What can be asked

    def describe(self) -> Description:
        """Say what is perturbed and compared, and why it was chosen: `print()` shows a table.

        x, the outputs and what follows from them are known after the first training step.
        """
        return describe(self.model, self.site, self.options.precision, self.reports.found)

    def __repr__(self) -> str:
        return self.describe().line(self._call)

    def __reduce__(self) -> Any:
        raise TypeError(
            "SMART: what attach() gives cannot be copied or pickled, since it belongs to one model. Call "
            "save_state(path), which writes theta~ and the step, and load_state(path) of another attach()."
        )

    def measure(self, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32) -> dict[str, float]:
        """Average R_s and D_Breg over the examples of x, in eval mode; nothing of the model or of SMART changes.

        Args:
            x: arrays as `evaluate` takes them, or a `tf.data.Dataset` or `PyDataset` of batches, which has y and the
                sample weights in it.
            y: is needed for what the loss leaves out by `ignore_class`, and for the kind of the outputs and their axis
                of classes if nothing was trained yet.
            sample_weight: w_i, as in the loss.

        Raises:
            ValueError: the model has no weights yet, y is needed, or the outputs are not what the loss says.

        Example:
            >>> import keras, numpy as np
            >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, use_bias=False)])
            >>> model.compile("sgd", "mse")
            >>> engine = Engine(model, SMARTConfig(mu=0, scale="absolute", epsilon=0.5))
            >>> model.set_weights([np.array([[1.0], [2.0], [-3.0]])])
            >>> engine.measure(np.ones((4, 3)), np.ones((4, 1)))  # (0.5 (1 + 2 + 3))**2
            {'R_s': 9.0}
        """
        # after a fit, nothing is on the model
        watch = nullcontext() if self.installed else self.passes.installed()
        refuse = partial(self.reports.refuse, site=self.site)
        with watch:
            known = self.options.outputs is not None
            return measure(self.model, self.penalty.of_evaluation, refuse, known, (x, y, sample_weight), batch_size)

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """Let the model have the averaged weights theta~ inside the block, to evaluate or save them."""
        with self.teacher.swapped():
            yield

    def save_state(self, filepath: Any) -> None:
        """Write theta~, the step and the states of all seeds to `filepath` + '.smart.npz'."""
        resume.write(filepath, self.model, self._state(), self._taken(), self.validation.theta)

    def load_state(self, filepath: Any) -> None:
        """Go on from what `save_state` wrote; ValueError if it is not of this model."""
        if not is_built(self.model):
            raise ValueError("SMART: the model must be built before its training state is loaded. Call it on a batch")
        self.teacher.follow()
        resume.read(filepath, self.model, self._state(), self._taken(), self.teacher.weights)
        self.validation.theta = None  # the model has it now

    def judge(self) -> None:
        """Show the steps to the observers; raise or warn about what a compiled step could only count, once."""
        self.observers.tell()
        self.reports.judge(lambda: self._steps, self.site)

    # The step

    def _begin(self, iterator: Any) -> Any:
        """Give the batches as they come; build an unbuilt model on their shapes.

        theta~ must copy theta_0 before the step is traced: variables that are made in a trace have no value there.
        """
        unbuilt = not is_built(self.model)
        if (unbuilt or (not self.averages and self.config.has_teacher)) and not self.model.run_eagerly:
            iterator = self._builder.build(iterator)
            self.teacher.follow()
        if not self._begun and self._steps == 0:
            self.teacher.begin()
        self._begun = True
        return iterator

    def _weight(self) -> float:
        """Give lambda_s of this step, a constant of the trace: a step with R_s and one without are compiled apart."""
        if self._lambda_s is not None:
            return self._lambda_s
        if self.config.smoothness_steps == 1:
            return self.config.lambda_s
        if not tf.executing_eagerly():
            raise ValueError(
                f"SMART: smoothness_steps={self.config.smoothness_steps} cannot work in a tf.function of your own, "
                "which has R_s in every step, or in none. Use fit, train_on_batch, an eager loop, or smoothness_steps=1"
            )
        return self.config.smoothness_weight(self._steps)

    def _check(self) -> None:
        """Raise ValueError if this training step cannot be compiled as it should be."""
        self.observers.check()
        new = self.teacher.missing()
        if new:
            raise ValueError(
                f"SMART: {', '.join(new[:3])} became trainable after SMART began, and theta~ does not hold it. "
                "Unfreeze and enable LoRA first, then fit with a SMARTCallback, or begin a new attach() or SMARTModel."
            )
        steps = self.config.smoothness_steps
        if self.config.lambda_s > 0 and steps > 1 and self.model.steps_per_execution > 1:
            raise ValueError(
                f"SMART: smoothness_steps={steps} chooses between two compiled steps, so it "
                f"needs compile(..., steps_per_execution=1), got {self.model.steps_per_execution}"
            )

    @property
    def _steps(self) -> int:
        return int(tf.convert_to_tensor(self.step.value).numpy())

    def _state(self) -> dict[str, Any]:
        return resume.state_of(self.model, self.step, self.penalty.draws, self.averages)

    def _taken(self) -> int:
        """Count the steps that the model's own optimiser has taken."""
        iterations = self.penalty.iterations()
        return 0 if iterations is None else int(iterations)
