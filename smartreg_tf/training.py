"""What a Keras model's training step does more with SMART (paper: equation 1 and Algorithm 1)."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.recording import Recorder, flat
from smartreg.report import Description
from smartreg_tf.candidates import not_the_batch
from smartreg_tf.divergences import as_mask
from smartreg_tf.measure import Measured, measure
from smartreg_tf.outputs import Head, Outputs, find_heads
from smartreg_tf.passes import CleanPasses, Passes, passes_of
from smartreg_tf.perturbation import floating
from smartreg_tf.proximal import momentum
from smartreg_tf.replay import refusal, seed_states
from smartreg_tf.report import Found, describe, found_in, observe, raw_outputs, wrong_kinds
from smartreg_tf.site import Patches, Site
from smartreg_tf.step import Step, drawn, smart_step
from smartreg_tf.teacher import Teacher

Tensor = Any
Noise = Callable[[Tensor, Tensor], Tensor]

# What may go wrong in a compiled step, counted there and reported after it.
_FAULTS = ("clean", "perturbed", "teacher", "unnormalised", "normalised", "shared", "vanished", "repeat")
ENGINE = "_smartreg_engine"
SUFFIX = ".smart.npz"


class Engine:
    """One model's SMART state, and what its training step does more than Keras'.

    The methods named in `METHODS` take Keras' own method first; `install` puts them on the model's instance.

    Args: as `SMARTCallback`, but for the `recorder` that `record` and `record_steps` make.

    Attributes:
        teacher: theta~.
    """

    METHODS = (
        "train_step",
        "compute_loss",
        "make_train_function",
        "reset_metrics",
        "_get_metrics_result_or_logs",
        "save_weights",
        "load_weights",
        "save",
    )
    # Nothing is added to these: they end what a broken fit left.
    OTHERS = ("make_test_function", "make_predict_function")

    def __init__(
        self,
        model: Any,
        config: SMARTConfig | None = None,
        *,
        layers: Any = None,
        outputs: Outputs | None = None,
        noise: Noise | None = None,
        seed: int = 0,
        float32: bool = True,
        recorder: Recorder | None = None,
        call: str = "SMART",
    ) -> None:
        config = SMARTConfig() if config is None else config
        if not isinstance(config, SMARTConfig):
            raise TypeError(f"{call}: config must be a SMARTConfig, got {type(config).__name__}")
        config.check_total_steps(call)
        self.model, self.config = model, config
        self.site = Site(model, layers)
        self.passes = CleanPasses(self.site)
        self.teacher = Teacher(model, config)
        self._outputs, self._noise, self._seed, self._float32 = outputs, noise, seed, float32
        self._options = {"outputs": outputs, "float32": float32}
        self._patches = Patches()
        self._local = threading.local()
        self._warned = self._begun = False
        self.skipped = 0  # steps without a finite penalty
        self._compiled = getattr(model, "_compile_config", None)
        self._last: dict[str, float] = {}
        self.fit: Any = None  # the fit that a `SMARTCallback` is part of
        self.verbose = False  # whether to print `describe()` after the first step
        self._call = call
        self._found: Found | None = None
        self._drawn: list[str] = []
        self._lambda_s: float | None = None  # of this step
        self._recorder = None if recorder is None or recorder.done else recorder
        if self._recorder is not None:
            self._check_recordable()
            packages = {"tensorflow": tf.__version__, "keras": keras.__version__}
            self._begin_record = partial(self._recorder.begin, "tensorflow", packages, config)
            self._begin_record(str(self.site))
            weakref.finalize(self, self._recorder.write)  # where a fit broke off and no other one follows
        with model.distribute_strategy.scope():
            self.step = _variable(np.int64(0), "smart_step")
            self.draws = _variable(np.int64(0), "smart_draws")
            self.repeats = _variable(np.int64(0), "smart_repeats")
            self.recorded = _variable(np.int64(0), "smart_recorded") if self._recorder is not None else None
            # these are sums over the replicas
            self.faults = _variable(np.zeros(len(_FAULTS), np.int64), "smart_faults", "sum", "on_read")
            names = {"smoothness": config.lambda_s, "proximal": config.mu}
            self.shown = {name: keras.metrics.Mean(name=name) for name, weight in names.items() if weight > 0}
            self.hidden = {name: keras.metrics.Mean(name=name) for name in ("max_delta", "vanished")}
        if all(layer.built for layer in model._flatten_layers()):
            self.teacher.follow()

    @property
    def averages(self) -> list[Any]:
        """theta~ in the order of `model.trainable_variables`, float32 or wider; empty while there is none."""
        return list(self.teacher.averages.values())

    def _begin(self, iterator: Any) -> Any:
        """The batches as they come; an unbuilt model is built on their shapes: theta~ must copy theta_0 before the
        step is traced: variables that are made in a trace have no value there.
        """
        unbuilt = not all(layer.built for layer in self.model._flatten_layers())
        if (unbuilt or (not self.averages and self.config.mu > 0)) and not self.model.run_eagerly:
            if isinstance(iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)):
                shapes = iterator.element_spec
            else:
                shapes = next(iterator)
                iterator = itertools.chain([shapes], iterator)
                shapes = keras.tree.map_structure(lambda x: None if x is None else tf.convert_to_tensor(x), shapes)
            if type(self.model).train_step is keras.Model.train_step:
                self.model._symbolic_build(data_batch=shapes)
            else:
                self._build_by_step(shapes)
            self.teacher.follow()
        if not self._begun and int(_numpy(self.step)) == 0:
            self.teacher.begin()
        self._begun = True
        return iterator

    @property
    def active(self) -> bool:
        """Whether there is anything to add to plain training."""
        return self.config.lambda_s > 0 or self.config.mu > 0

    @property
    def metrics(self) -> dict[str, float]:
        """R_s, D_Breg, max|delta| and the vanished fraction, averaged since the metrics were reset; the optimiser step,
        and how many steps had no finite penalty.
        """
        return self._means() | {"step": float(_numpy(self.step)), "skipped": float(self.skipped)}

    def _means(self) -> dict[str, float]:
        """The means so far; the last ones where they were reset (an evaluation does) and nothing has come since."""
        metrics = self.shown | self.hidden
        means = {name: float(metric.result()) for name, metric in metrics.items()}
        return means if any(float(_numpy(metric.count)) for metric in metrics.values()) else means | self._last

    def _build_by_step(self, shapes: Any) -> None:
        """Make the weights as the model's own training step does, which may unpack the batch in a way of its own: trace
        it as far as its first `compute_loss`.
        """
        self._local.building = True
        try:
            with keras.StatelessScope():  # variables are made after it, with values
                tf.function(self.model.train_step, autograph=False).get_concrete_function(shapes)
        except _BuiltError:
            pass
        except Exception as error:
            raise ValueError(
                f"SMART: the model has no weights yet, and its train_step cannot make them before it runs ({error}). "
                "Call the model on a batch before fit, as its train_step does: model(x)."
            ) from error
        finally:
            self._local.building = False

    @property
    def installed(self) -> bool:
        """Whether it is this that trains the model."""
        return getattr(self.model, ENGINE, None) is self

    def install(self) -> None:
        """Put SMART on the model's instance."""
        if hasattr(self.model, ENGINE):
            raise ValueError(
                "SMART: this model already has a SMARTCallback or attach() at work; give it one, since two would train "
                "two penalties"
            )
        self._patches.put(self.model, ENGINE, self)
        self._compiled = getattr(self.model, "_compile_config", None)
        try:
            self.passes.install()
            for name in (*self.METHODS, *self.OTHERS):
                self._patches.put(self.model, name, partial(self._run, name, getattr(self.model, name)))
            # the step that is compiled already is the plain one; it is back after `remove`
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
        # compile() came in between: that step is not to come back
        if getattr(self.model, "_compile_config", None) is not self._compiled:
            object.__setattr__(self.model, "train_function", None)
        if self._recorder is not None:
            self._recorder.close()

    def _run(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One of the model's methods while SMART is on it."""
        if self.fit is not None and self.fit.ended():  # another callback or the data broke the fit off
            self.remove()
            return getattr(self.model, name)(*args, **kwargs)
        return original(*args, **kwargs) if name in self.OTHERS else getattr(self, name)(original, *args, **kwargs)

    # What Keras calls

    def make_train_function(self, original: Callable[..., Any], force: bool = False) -> Any:
        """Keras' compiled training step, followed by a look at what went wrong in it."""
        if self.model.train_function is not None and not force:
            return self.model.train_function
        self._check_recordable()
        new = self.teacher.missing()
        if new:
            raise ValueError(
                f"SMART: {', '.join(new[:3])} became trainable after SMART began, and theta~ does not hold it. "
                "Unfreeze and enable LoRA first, then fit with a SMARTCallback, or begin a new attach() or SMARTModel."
            )
        weights = {self.config.smoothness_weight(steps) for steps in range(self.config.smoothness_steps)}
        if len(weights) > 1 and self.model.steps_per_execution > 1:
            raise ValueError(
                f"SMART: smoothness_steps={self.config.smoothness_steps} chooses between two compiled steps, so it "
                f"needs compile(..., steps_per_execution=1), got {self.model.steps_per_execution}"
            )
        compiled = {}
        for weight in weights:
            original(force=True)
            compiled[weight] = self.model.train_function

        def train_function(iterator: Any) -> Any:
            try:
                iterator = self._begin(iterator)
                self._lambda_s = self.config.smoothness_weight(int(_numpy(self.step)) if len(weights) > 1 else 0)
                logs = compiled[self._lambda_s](iterator)
                self._report()
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

        object.__setattr__(self.model, "train_function", train_function)
        return train_function

    def train_step(self, original: Callable[..., Any], *data: Any) -> Any:
        """The model's own step, with the penalty in its loss; then theta~ moves."""
        with self.training_step():
            logs = original(*data)
        return {**logs, **{name: metric.result() for name, metric in self.shown.items()}}

    @contextmanager
    def training_step(self) -> Iterator[None]:
        """What `train_step` is, for a loop of your own: the forward, `model.compute_loss` and the update go inside."""
        if not self.active:
            yield
            return
        if not self.installed:
            raise RuntimeError(
                "SMART: training_step() came after the attach() block had ended; put the loop inside the block, or "
                "begin a new attach()"
            )
        lambda_s = self._local.lambda_s = self._weight()
        before = self._iterations()
        self._local.penalised = False
        differentiable = lambda_s > 0 and self.config.start == "margin"
        with self.passes.recording(differentiable) as passes:
            self._local.passes = passes
            try:
                yield
            finally:
                self._local.passes = None
        if not self._local.penalised:
            raise RuntimeError(
                "SMART: the training step never called model.compute_loss, which is where the penalty is added. Take "
                "the loss from compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)."
            )
        self._update(before)
        if tf.executing_eagerly():
            self._report()

    def compute_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, plus lambda_s R_s + mu D_Breg inside a training step."""
        if getattr(self._local, "building", False):
            raise _BuiltError
        # first, since every other pass clears model.losses
        loss = original(*args, **kwargs)
        names = ("x", "y", "y_pred", "sample_weight", "training")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        passes = getattr(self._local, "passes", None)
        if passes is None or given.get("training") is False:
            return loss
        self._local.penalised = True
        if self._local.lambda_s == self.config.mu == 0:
            return loss
        penalty = self._penalty(passes_of(passes, given.get("y_pred")), given.get("y"), given.get("sample_weight"))
        replicas = tf.distribute.get_strategy().num_replicas_in_sync  # Keras sums their losses
        entries = tf.size(loss)  # the gradient of a loss that is not reduced is that of their sum
        return loss + tf.cast(penalty / tf.cast(replicas * entries, penalty.dtype), loss.dtype)

    def _weight(self) -> float:
        """lambda_s of this step, a constant of the trace: a step with R_s and one without are compiled apart."""
        if self._lambda_s is not None:
            return self._lambda_s
        if self.config.smoothness_steps == 1:
            return self.config.lambda_s
        if not tf.executing_eagerly():
            raise ValueError(
                f"SMART: smoothness_steps={self.config.smoothness_steps} needs Keras' own fit or train_on_batch, or a "
                "loop that runs eagerly: a tf.function of your own would have R_s in every step, or in none"
            )
        return self.config.smoothness_weight(int(_numpy(self.step)))

    def reset_metrics(self, original: Callable[..., Any]) -> None:
        """Keras' own, and ours."""
        original()
        self._last = self._means()
        for metric in (*self.shown.values(), *self.hidden.values()):
            metric.reset_state()

    def _get_metrics_result_or_logs(self, original: Callable[..., Any], logs: Any) -> Any:
        """Keras' epoch logs: it compares names with the model's metrics, and ours are not among them."""
        ours = {name: metric.result() for name, metric in self.shown.items() if name in logs}
        return {**original({name: value for name, value in logs.items() if name not in ours}), **ours}

    def save_weights(self, original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras' own, and theta~, the step and the seeds beside it."""
        saved = original(filepath, *args, **kwargs)
        self.save_state(filepath)
        return saved

    def load_weights(self, original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Keras' own, and theta~, the step and the seeds where they lie beside it."""
        loaded = original(filepath, *args, **kwargs)
        if os.path.exists(f"{filepath}{SUFFIX}"):
            self.load_state(filepath)
        return loaded

    def save(self, original: Callable[..., Any], filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """As `save_weights`, for the whole model."""
        return self.save_weights(original, filepath, *args, **kwargs)

    # What can be asked

    def describe(self) -> Description:
        """What is perturbed and compared, and why it was chosen: `print()` shows a table.

        x, the outputs and what follows from them are known after the first training step.
        """
        return describe(self.model, self.site, self._options, self._found)

    def __repr__(self) -> str:
        return self.describe().line(self._call)

    def __reduce__(self) -> Any:
        raise TypeError(
            "SMART: what attach() gives cannot be copied or pickled, since it is of one model. save_state(path) writes "
            "theta~ and the step, and load_state(path) of another attach() reads them."
        )

    def measure(self, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32) -> dict[str, float]:
        """R_s and D_Breg as means over the examples of x, in eval mode; nothing of the model or of SMART changes.

        Args:
            x: arrays as `evaluate` takes them, or a `tf.data.Dataset` or `PyDataset` of batches, which has y and the
                sample weights in it.
            y: is asked for what the loss leaves out by `ignore_class`, and for the kind of the outputs and their axis
                of classes where nothing was trained yet.
            sample_weight: w_i, as in the loss.

        Raises:
            ValueError: the model has no weights yet, y is asked for, or the outputs are not what the loss says.

        Example:
            >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, use_bias=False)])
            >>> model.compile("sgd", "mse")
            >>> engine = Engine(model, SMARTConfig(mu=0, scale="absolute", epsilon=0.5))
            >>> model.set_weights([np.array([[1.0], [2.0], [-3.0]])])
            >>> engine.measure(np.ones((4, 3)), np.ones((4, 1)))  # (0.5 (1 + 2 + 3))**2
            {'R_s': 9.0}
        """
        return measure(self, x, y, sample_weight, batch_size)

    def measured(self, x: Any, y: Any, sample_weight: Any, number: Tensor) -> Measured:
        """R_s and D_Breg of one batch in eval mode, with the noise of its number."""
        local = self._local
        found, local.lambda_s, local.measured = self._found, 1.0, number
        try:
            with self.passes.recording(self.config.start == "margin") as passes, keras.StatelessScope():
                self._evaluated(x)
            step, faults = self._step(passes[-1], y, sample_weight, trained=False)
            heads = [head._replace(reduction="sum_over_batch_size") for head in step.heads]
            left_out = next((head.ignore_class for head in heads if head.ignore_class is not None), None)
            if y is None and left_out is not None:
                raise ValueError(
                    f"SMART: measure() needs y: the loss leaves out the label {left_out} by its ignore_class, and so "
                    "do R_s and D_Breg"
                )
            targets, positions = step.outputs, step.positions
            examples = [head.examples(target, y) for head, target in zip(heads, targets, strict=True)]
            sums = {
                name: [
                    head.weight * n * head.mean(a, b, mask, sample_weight, y)
                    for head, n, a, b, mask in zip(heads, examples, other, targets, positions, strict=True)
                ]
                for name, other in {"R_s": step.perturbed, "D_Breg": step.teacher}.items()
                if other
            }
            return Measured(sums, examples, faults)
        finally:
            self._found, local.measured = found or self._found, None

    def know_the_loss(self, x: Any, y: Any) -> None:
        """Let Keras see which output each compiled loss is of, as its first step would."""
        compiled = getattr(self.model, "_compile_loss", None)
        if compiled is None or compiled.built or self._outputs is not None:
            return
        if y is None:
            raise ValueError(
                "SMART: measure() needs y before the first step, or outputs=, to know what the outputs are"
            )
        with keras.StatelessScope():
            y_pred = self._evaluated(x)
        compiled.build(y, y_pred)

    def _evaluated(self, x: Any) -> Any:
        return self.model(x, training=False) if self.model._call_has_training_arg else self.model(x)

    # What resuming takes

    def save_state(self, filepath: Any) -> None:
        """Write theta~, the step and the states of all seeds to `filepath` + '.smart.npz'."""
        seeds = {f"seed/{i}": state for i, state in enumerate(seed_states(self.model))}
        averages = {f"average/{i}": average for i, average in enumerate(self.averages)}
        state = {"step": self.step, "draws": self.draws, **averages, **seeds}
        # complete or not at all
        partial_file = f"{filepath}{SUFFIX}.part"
        with open(partial_file, "wb") as file:
            np.savez(file, iterations=self._taken(), **{name: _numpy(value) for name, value in state.items()})
        os.replace(partial_file, f"{filepath}{SUFFIX}")

    def load_state(self, filepath: Any) -> None:
        """Go on where `save_state` left off; ValueError where the state is not of this model."""
        if not all(layer.built for layer in self.model._flatten_layers()):
            raise ValueError("SMART: the model must be built before its training state is loaded; call it on a batch")
        self.teacher.follow()
        own = {"step": self.step, "draws": self.draws}
        own |= {f"average/{i}": average for i, average in enumerate(self.averages)}
        own |= {f"seed/{i}": state for i, state in enumerate(seed_states(self.model))}
        if not os.path.exists(f"{filepath}{SUFFIX}"):
            raise ValueError(
                f"SMART: there is no {filepath}{SUFFIX}: whatever saves the model while SMART is at work writes it, "
                "and so does attach()'s save_state(path)"
            )
        with np.load(f"{filepath}{SUFFIX}") as saved:
            now, then = self._taken(), int(saved["iterations"])
            if now > 0 and then > 0 and now != then:
                raise ValueError(
                    f"SMART: {filepath}{SUFFIX} was written after {then} optimiser steps, and the model was loaded "
                    f"from after {now}: the two are not of one checkpoint"
                )
            differing = sorted(
                name
                for name in {*saved.files, *own} - {"iterations"}
                if name not in saved.files or name not in own or saved[name].shape != tuple(own[name].shape)
            )
            if differing:
                raise ValueError(
                    f"SMART: {filepath}{SUFFIX} is not of this model and configuration: {', '.join(differing[:5])} "
                    "differ. Freeze layers and enable LoRA before fit, as in the run that wrote it."
                )
            for name, variable in own.items():
                variable.assign(saved[name])

    def _taken(self) -> int:
        """The steps that the model's own optimiser has taken."""
        optimizer = getattr(self.model, "optimizer", None)
        return 0 if optimizer is None else int(_numpy(optimizer.iterations))

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """The model has the averaged weights theta~ inside the block, to evaluate or save them."""
        with self.teacher.swapped():
            yield

    # The step

    def _step(self, passes: Passes, y: Any, sample_weight: Any, trained: bool = True) -> tuple[Step, dict[str, Tensor]]:
        """What one pass gives, and what is wrong with it; of a training step also whether it can be repeated."""
        if self._local.lambda_s > 0:
            self.site.require(passes.clean.calls)
        self.teacher.follow()
        with passes.in_float32() if self._float32 else nullcontext(passes) as passes:
            heads = self._heads(passes, y)
            step = smart_step(
                passes, heads, y, sample_weight, self.teacher, self.config, self._local.lambda_s, self._draw
            )
            faults = step.faults | wrong_kinds(heads, passes.clean.outputs)
            if trained:
                first = tf.convert_to_tensor(self.repeats.value) == 0
                read = partial(raw_outputs, heads)
                faults["repeat"] = passes.differ(read, step.positions, self.teacher.is_theta, first)
        self._drawn = passes.drawn
        self._found = found_in(step)
        return step, faults

    def _heads(self, passes: Passes, y: Any) -> list[Head]:
        heads = find_heads(self.model, passes.clean.outputs, self._outputs, passes.masks, y)
        if y is None and self._found is not None:  # the labels of before have shown the axes
            axes = {head.place: head.axis for head in self._found.heads}
            heads = [head._replace(axis=axes.get(head.place, head.axis)) for head in heads]
        return heads

    def _penalty(self, passes: Passes, y: Any, sample_weight: Any) -> Tensor:
        """lambda_s R_s + mu D_Breg of a training step, 0 where it is not finite; and what is reported of it."""
        step, faults = self._step(passes, y, sample_weight)
        for name, term in step.terms.items():
            self._show({"R_s": "smoothness", "D_Breg": "proximal"}[name], term, step.outputs[0])
        observed: dict[str, Tensor] = {}
        if step.delta:
            observed = self._observe(step)
            self.draws.assign_add(1)
        self.repeats.assign_add(1)
        self._count(faults)
        if self._recorder is not None and not self._recorder.done:
            # after everything else, since TensorFlow numbers its own random operations as they come
            of_heads = zip(step.heads, step.outputs, step.positions, strict=True)
            weights = [head.weights(target, mask, sample_weight, y) for head, target, mask in of_heads]
            lists = (*(("x", "delta", "mask") if step.delta else ()), "outputs", "perturbed", "teacher", "positions")
            seen = {name: getattr(step, name) for name in lists} | {"sample_weight": weights}
            self._record(flat(seen), step.heads, {**step.terms, **observed, "penalty": step.raw})
        return step.penalty

    def _draw(self, like: Tensor, run: int) -> Tensor:
        measured = getattr(self._local, "measured", None)  # the number of the batch
        step = tf.convert_to_tensor(self.draws.value) if measured is None else measured
        if self._noise is None:
            return drawn(like, run, step, self._seed)
        noise = tf.convert_to_tensor(self._noise(step, like))
        if not noise.shape.is_compatible_with(like.shape):
            raise ValueError(f"SMART: noise must give a tensor of shape {like.shape}, got {noise.shape}")
        return tf.cast(noise, like.dtype)

    def _update(self, before: Tensor | None) -> None:
        """Count the optimiser step, if there was one, and every S of them move theta~."""
        steps = 1 if before is None else self._iterations() - before
        self.step.assign_add(steps)
        self.teacher.move(self.step, steps)

    def _iterations(self) -> Tensor | None:
        optimizer = getattr(self.model, "optimizer", None)
        return None if optimizer is None else tf.cast(keras.ops.convert_to_tensor(optimizer.iterations), tf.int64) + 0

    def _show(self, name: str, value: Tensor, like: Tensor) -> None:
        value = tf.stop_gradient(value)
        self.shown[name].update_state(value, sample_weight=tf.shape(like)[0])

    def _observe(self, step: Step) -> dict[str, Tensor]:
        observed = observe(step)
        for name, value in observed.items():
            self.hidden[name].update_state(value)
        self._count({"vanished": observed["vanished"] > 0.5})
        return observed

    def _check_recordable(self) -> None:
        if self._recorder is None or self._recorder.done:
            return
        replicas = self.model.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            raise ValueError(
                f"SMART: record= needs one device, and this {type(self.model.distribute_strategy).__name__} has "
                f"{replicas}. Record a short run without the strategy: it trains alike."
            )
        if getattr(self.model, "compiled", False) and self.model.jit_compile:
            raise ValueError(
                "SMART: record= cannot take tensors out of a step that XLA compiles. For the recording give "
                "compile(..., jit_compile=False); Keras' default, 'auto', turns XLA on where there is a GPU."
            )

    def _record(self, seen: dict[str, Tensor], heads: list[Head], reported: dict[str, Tensor]) -> None:
        """Hand a step to the recorder: out of the graph, where this is one, until all steps are there."""
        recorder, recorded, config = self._recorder, self.recorded, self.config
        assert recorder is not None
        assert recorded is not None
        self._begin_record(str(self.site))  # the default site may have been another before the first pass
        dtypes = {name: tensor.dtype.name for name, tensor in seen.items()}
        # the recorded weights have the loss's reduction in them already
        outputs = [{"divergence": head.divergence, "weight": head.weight, "by_weights": False} for head in heads]
        step = tf.convert_to_tensor(self.step.value)

        def out() -> Tensor:
            arrays = {
                name: floating(tensor) if tensor.dtype.is_floating else as_mask(tensor) for name, tensor in seen.items()
            }
            scalars = reported | {"step": step}
            if config.mu > 0:
                moved = step - step % config.proximal_steps
                scalars["beta"] = tf.where(moved > 0, momentum(moved, config), np.nan)
                scalars["distance"] = self.teacher.distance()

            names, numbers = list(arrays), list(scalars)

            def save(index: Any, *values: Any) -> Any:
                kept = [np.array(value) for value in values]  # TensorFlow's own memory is used again
                tensors, reported = kept[: len(names)], kept[len(names) :]
                recorder.add(
                    dict(zip(names, tensors, strict=True)),
                    dict(zip(numbers, reported, strict=True)),
                    dtypes,
                    outputs,
                    int(index),
                )
                return index

            values = [*arrays.values(), *(tf.cast(value, tf.float64) for value in scalars.values())]
            return tf.numpy_function(save, [index, *map(tf.stop_gradient, values)], tf.int64)

        index = tf.convert_to_tensor(recorded.value)
        tf.cond(index < recorder.steps, out, lambda: index)
        recorded.assign_add(1)

    def _count(self, faults: dict[str, Tensor]) -> None:
        self.faults.assign_add(tf.stack([tf.cast(faults.get(name, False), tf.int64) for name in _FAULTS]))

    def _report(self) -> None:
        """What the compiled step could only count: raise or warn about it, once; and write what it recorded."""
        if self._recorder is not None and self._recorder.full:
            self._recorder.write()
        # Reading waits for the device, every step: a fault has to be raised before on_train_batch_end, where a
        # checkpoint may be written, and a step that XLA compiles cannot raise by itself.
        counts = dict(zip(_FAULTS, _numpy(self.faults).tolist(), strict=True))
        if not any(counts.values()):
            return
        self.faults.assign(np.zeros(len(_FAULTS), np.int64))
        step = int(_numpy(self.step))
        self.refuse(counts)
        if counts["vanished"] and not self._warned:
            self._warned = True
            warnings.warn(
                "SMART: adding the perturbation leaves over half of the entries as they were: it is below the "
                "precision of the embeddings, and R_s measures nothing there. Use a larger epsilon, or float32 for "
                "these passes (float32=True).",
                SMARTWarning,
                stacklevel=2,
            )
        first = next((name for name in ("clean", "perturbed", "teacher") if counts[name]), None)
        if first is None:
            return
        self.skipped += max(counts[name] for name in ("clean", "perturbed", "teacher"))
        if self.config.non_finite == "raise":
            raise FloatingPointError(
                f"SMART: the penalty of step {step} is not finite; the first values that are not finite are in the "
                f"{first} pass. Look at the learning rate and the loss before it, or let such steps go without a "
                "penalty: SMARTConfig(non_finite='skip')."
            )

    def refuse(self, counts: Mapping[str, Any]) -> None:
        """Raise where R_s and D_Breg are not what they should be, by the faults that were counted."""
        if counts["repeat"]:
            raise RuntimeError(refusal(self._drawn))
        if counts["unnormalised"]:
            raise ValueError(
                "SMART: the outputs should be probabilities, by the compiled loss or outputs=, but they are negative, "
                "above 1 or do not sum to 1. Give the loss from_logits=True (and outputs='logits' or 'label_logits'), "
                "or a softmax or sigmoid layer."
            )
        if counts["shared"]:
            raise ValueError(not_the_batch(self.site, "another number of them than the batch has examples"))
        if counts["normalised"]:
            raise ValueError(
                "SMART: the outputs should be logits, by the compiled loss or outputs=, but every row of them is "
                "positive and sums to 1. Give the loss from_logits=False (and outputs='probabilities'), or no softmax."
            )


class _BuiltError(Exception):
    """The model's own training step has made the weights; the rest of it is not needed."""


def _numpy(variable: Any) -> Any:
    return tf.convert_to_tensor(variable.value).numpy()


def _variable(value: Any, name: str, aggregation: str = "only_first_replica", synchronization: str = "auto") -> Any:
    return keras.Variable(
        value,
        dtype=value.dtype.name,
        trainable=False,
        name=name,
        aggregation=aggregation,
        synchronization=synchronization,
    )
