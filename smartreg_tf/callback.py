"""Add SMART to `fit` or other loops, by a callback or a context manager (paper: equation 1, Algorithm 1)."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from smartreg.checking.recording import Recorder
from smartreg.config import Precision, SMARTConfig, SMARTWarning, check_options, suggesting
from smartreg.report import Description, Observer
from smartreg_tf import compat
from smartreg_tf.engine import ENGINE, Engine
from smartreg_tf.options import ELSEWHERE, Options
from smartreg_tf.outputs import Outputs
from smartreg_tf.resume import SUFFIX
from smartreg_tf.site import Patches
from smartreg_tf.step import Noise

_LOADS = "_smartreg_loads"


class SMARTCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Add SMART to plain `compile` and `fit`; everything else stays as it is.

    F(theta) = L(theta) + lambda_s R_s(theta) + mu D_Breg(theta, theta~)

    `loss` in the progress bar includes the penalties; `smoothness` (R_s) and `proximal` (D_Breg) stand beside it;
    `val_loss` is the plain one, of theta~ with `evaluate="teacher"`. After `fit` the model is as it was, except for its
    weights. If an exception ended the fit, SMART is removed at the next `fit` or `attach`.

    Args:
        config: the settings; `total_steps` comes from fit's own epochs and steps if it is None.
        site: names or objects of the layers whose outputs are perturbed; by default see `smartreg_tf.site.Site`.
        outputs: what the outputs are: "logits", "probabilities", "label_logits", "label_probabilities" or
            "regression", one for all, a list with one each, or a dict by name. None, and a name that the dict lacks,
            leaves an output out of R_s and D_Breg. By default what the compiled losses say.
        noise: (step, like) -> standard normal tensor of the shape of `like`, `step` the number of training steps before
            this one that had an R_s; by default drawn from a stream of its own, which `seed` starts.
        precision: "float32" (the default) computes the passes of SMART in float32 under mixed precision, which would
            lose R_s; "model" as the model computes.
        on_step: is called with a `smartreg.report.StepSeen` of NumPy arrays after each training step that had a
            penalty. It copies the step's tensors into main memory. Not with `jit_compile=True`, nor on several
            replicas. In a loop inside a `tf.function` of your own, it is called when `attach` ends.
        resume: the checkpoint of a broken run, with what this callback left beside it; BackupAndRestore needs none.
        record: a file to be written with what SMART saw in the first `record_steps` training steps, for
            `smartreg.checking.compare_run`; it must not exist yet, so that no old run is taken for this one. It is
            written after the last of them, or with fewer when `fit` ends. Training stays the same, bit for bit; the
            tensors of those steps are kept in main memory. Not with `jit_compile=True`, nor on several replicas.
        verbose: 1 prints once, after the first step, what `describe()` says; 0 is silent.
        layers, float32: older names: `layers` of `site`; `float32=True` is precision="float32", False is "model".

    Raises:
        ValueError, RuntimeError, TypeError: at once, when `fit` begins or the first step is traced; the message says
            what to do.
        FileExistsError, FileNotFoundError: `record` is there already, or its folder is not.
        FloatingPointError: a penalty was NaN or infinite, and `config.non_finite` is "raise".

    Source: Jiang et al. 2020 (arXiv 1911.03437), section 3 and Algorithm 1.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential(
        ...     [keras.layers.Embedding(9, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
        ... )
        >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.arange(16).reshape(8, 2) % 9, np.arange(8) % 2
        >>> history = model.fit(x, y, verbose=0, callbacks=[SMARTCallback(SMARTConfig())])
        >>> sorted(history.history)
        ['loss', 'proximal', 'smoothness']
    """

    @suggesting("SMARTCallback", elsewhere=ELSEWHERE)
    def __init__(
        self,
        config: SMARTConfig | None = None,
        site: Any = None,
        outputs: Outputs | None = None,
        *,
        noise: Noise | None = None,
        seed: int = 0,
        precision: Precision | None = None,
        on_step: Observer | None = None,
        resume: Any = None,
        record: str | os.PathLike[str] | None = None,
        record_steps: int = 10,
        verbose: int = 0,
        layers: Any = None,
        float32: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = SMARTConfig() if config is None else config
        check_options("SMARTCallback", self.config)
        self.engine: Engine | None = None
        given = {"site": site, "outputs": outputs, "noise": noise, "seed": seed, "precision": precision}
        self._options = Options.of("SMARTCallback", **given, on_step=on_step, layers=layers, float32=float32)
        self._resume, self._verbose = resume, verbose
        self._recorder = None if record is None else Recorder(record, record_steps, "SMARTCallback")

    @property
    def metrics(self) -> dict[str, float]:
        """Return R_s, D_Breg, max_delta and vanished, averaged over the epoch so far; beta, step and skipped."""
        return {} if self.engine is None else self.engine.metrics

    def swap_teacher(self) -> Any:
        """Let the model have the averaged weights theta~ in the block, to evaluate or save them.

        Example:
            >>> SMARTCallback().swap_teacher()
            Traceback (most recent call last):
            ...
            ValueError: SMARTCallback.swap_teacher: there is no model and no theta~ before fit. Call it in or after fit
        """
        return self._begun("swap_teacher").swap_teacher()

    def describe(self) -> Description:
        """Say what is perturbed and compared, and why it was chosen: `print()` shows a table.

        Raises:
            ValueError: before `fit`, which knows the model.
        """
        return self._begun("describe").describe()

    def __repr__(self) -> str:
        return f"SMARTCallback({self.config})" if self.engine is None else repr(self.engine)

    def measure(self, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32) -> dict[str, float]:
        """Average R_s and D_Breg over x in eval mode, during `fit` or after it, as `smartreg_tf.engine.Engine.measure`.

        Raises:
            ValueError: before `fit`, which knows the model.
        """
        return self._begun("measure").measure(x, y, sample_weight, batch_size)

    def __getstate__(self) -> dict[str, Any]:
        """Copy the settings alone: a copy begins anew."""
        return {**self.__dict__, "engine": None, "_model": None}

    def _begun(self, method: str) -> Engine:
        if self.engine is None:
            raise ValueError(
                f"SMARTCallback.{method}: there is no model and no theta~ before fit. Call it in or after fit"
            )
        return self.engine

    def set_model(self, model: Any) -> None:
        """Watch load_weights from the start: a BackupAndRestore that comes first loads before our `on_train_begin`."""
        super().set_model(model)
        _remove_stale(model)
        loads = Patches()
        fit = _Fit(loads.remove)
        original = model.load_weights

        def load_weights(filepath: Any, *args: Any, **kwargs: Any) -> Any:
            if fit.ended():
                loads.remove()
                return model.load_weights(filepath, *args, **kwargs)
            if os.path.exists(f"{filepath}{SUFFIX}"):
                self._resume = filepath
            elif self.config.has_teacher:
                warnings.warn(
                    f"SMARTCallback: {filepath} has no {SUFFIX} beside it: theta~ starts anew from these weights. "
                    "Load weights that fit saved with SMART, if the run should go on",
                    SMARTWarning,
                    stacklevel=2,
                )
            return original(filepath, *args, **kwargs)

        loads.put(model, _LOADS, loads)
        loads.put(model, "load_weights", load_weights)

    def on_train_begin(self, logs: Any = None) -> None:
        """Put SMART on the model, and load what a broken run left."""
        _stop_listening(self.model)
        engine = Engine(self.model, self._complete(), self._options, self._recorder, "SMARTCallback")
        engine.fit, engine.verbose = _Fit(engine.remove), bool(self._verbose)
        try:
            if engine.active:
                engine.install()
                self.model.make_train_function(force=True)
                engine.validation.begin()
            if self._resume is not None:
                engine.load_state(self._resume)
        except BaseException:
            engine.remove()
            raise
        self.engine, self._resume, self._first = engine, None, True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Let the model have theta again after a validation of theta~; in the first epoch, look at a resumed run."""
        if self.engine is not None:
            self.engine.validation.put_back()
            if self._first:
                self._first = False
                self._check_epoch(epoch)

    def on_train_end(self, logs: Any = None) -> None:
        """Take SMART off the model; if theta~ was validated, the model has it now."""
        if self.engine is not None and self.engine.installed:
            self.engine.validation.end(restored=self.engine.fit.restored())
            self.engine.remove()

    def on_test_begin(self, logs: Any = None) -> None:
        """Stop watching load_weights: fit, or evaluate or predict alone, has begun."""
        _stop_listening(self.model)

    on_predict_begin = on_test_begin

    def _check_epoch(self, epoch: int) -> None:
        """Warn if a run goes on in an epoch that it has behind it, and so beyond `total_steps`."""
        assert self.engine is not None
        total, done = self.engine.config.total_steps, int(self.engine.metrics["step"])
        if not (done and total and (self.params or {}).get("steps") and self.engine.config.needs_total_steps):
            return
        left, each = self._updates(self.params["epochs"] - epoch), max(1, self._updates(1))
        # less than an epoch too many is the one that was broken off, which begins again
        if done >= (epoch + 1) * each and done + left >= total + each:
            behind = done // each
            self.engine.reports.warned.add("total_steps")
            warnings.warn(
                f"SMARTCallback: the run that goes on has {done} optimiser steps behind it, and fit would take {left} "
                f"more, but total_steps is {total}. Give fit(..., initial_epoch={behind}), and as epochs= those "
                "of the whole run",
                SMARTWarning,
                stacklevel=2,
            )

    def _updates(self, epochs: int) -> int:
        """Count the optimiser steps of so many epochs."""
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)  # of a LossScaleOptimizer
        accumulated = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        return int(epochs * self.params["steps"] // accumulated)

    def _complete(self) -> SMARTConfig:
        """Return the configuration with `total_steps`, the optimiser steps of the whole fit."""
        config = self.config
        steps = (self.params or {}).get("steps")
        if config.total_steps is not None or not config.needs_total_steps:
            return config
        if steps is None:
            raise ValueError(
                "SMARTCallback: fit does not know how many batches an epoch has, and beta changes during training. "
                "Give SMARTConfig(total_steps=<optimiser steps of the whole run>) or fit(steps_per_epoch=...)."
            )
        return config.replace(total_steps=max(1, self._updates(self.params["epochs"])))


@suggesting("attach", elsewhere=ELSEWHERE)
@contextmanager
def attach(
    model: Any,
    config: SMARTConfig | None = None,
    site: Any = None,
    outputs: Outputs | None = None,
    *,
    noise: Noise | None = None,
    seed: int = 0,
    precision: Precision | None = None,
    on_step: Observer | None = None,
    record: str | os.PathLike[str] | None = None,
    record_steps: int = 10,
    layers: Any = None,
    float32: bool | None = None,
) -> Iterator[Engine]:
    """Add SMART to `train_on_batch`, to several `fit`s or to a loop of your own, inside the block.

    Args, Raises: as `SMARTCallback`; `total_steps` is needed if beta is scheduled.

    Returns:
        the context's value has `metrics`, `swap_teacher()`, `save_state(path)`, `load_state(path)`,
        `training_step()`, a context for one step of a loop that calls no `train_step`, and `averages`, theta~ in the
        order of `model.trainable_variables`.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.layers.Dense(2)])
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
        >>> with attach(model, SMARTConfig(total_steps=10)) as smart:
        ...     for _ in range(3):
        ...         _ = model.train_on_batch(x, y)
        >>> smart.metrics["step"]
        3.0
    """
    recorder = None if record is None else Recorder(record, record_steps, "attach")
    given = {"site": site, "outputs": outputs, "noise": noise, "seed": seed, "precision": precision}
    options = Options.of("attach", **given, on_step=on_step, layers=layers, float32=float32)
    engine = Engine(model, config, options, recorder, "attach")
    if not engine.active:
        yield engine
        return
    _remove_stale(model)
    engine.install()
    try:
        yield engine
        engine.judge()  # of a loop inside a tf.function, which cannot raise by itself
    finally:
        engine.remove()


def _stop_listening(model: Any) -> None:
    """Take away what a callback's `set_model` put on the model, whichever callback it was."""
    loads = getattr(model, _LOADS, None)
    if loads is not None:
        loads.remove()


def _remove_stale(model: Any) -> None:
    """Take away what a callback left of a fit that has ended, or of a loop that never called on_train_end."""
    engine = getattr(model, ENGINE, None)
    if engine is not None and engine.fit is not None and (engine.fit.ended() or not engine.fit.known):
        engine.remove()
    _stop_listening(model)


class _Fit:
    """Know the `fit` that a callback is part of. Keras does not say when an exception ends it.

    Args:
        on_end: is called when nothing refers to that fit any more, its traceback included.
    """

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._thread = threading.get_ident()
        self._callbacks: weakref.ref[Any] | None = None  # Keras' own list, which lives as long as the fit
        callbacks = None
        for frame in compat.frames_of_keras(self._thread):
            owner = frame.f_locals.get("self")
            if isinstance(owner, keras.callbacks.CallbackList):
                callbacks = owner
            elif callbacks is not None and frame.f_code.co_name in ("fit", "evaluate", "predict"):
                self._callbacks = weakref.ref(callbacks, lambda _: on_end())
                return

    def ended(self) -> bool:
        """Tell whether it has ended; False for a loop of the user's own, which calls on_train_end itself."""
        if self._callbacks is None:
            return False
        callbacks = self._callbacks()
        return callbacks is None or not any(
            frame.f_locals.get(name) is callbacks
            for frame in compat.frames_of_keras(self._thread)
            for name in ("callbacks", "self")
        )

    def restored(self) -> bool:
        """Tell whether an EarlyStopping restores its best weights at the end, before or after us."""
        callbacks = None if self._callbacks is None else self._callbacks()
        return any(
            isinstance(callback, keras.callbacks.EarlyStopping)
            and callback.restore_best_weights
            and callback.best_weights is not None
            for callback in getattr(callbacks, "callbacks", [])
        )

    @property
    def known(self) -> bool:
        """Tell whether it is Keras' own fit, not a loop of the user's own that has callbacks."""
        return self._callbacks is not None
