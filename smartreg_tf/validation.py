"""Let `fit` validate theta~ and leave it in the model, if the settings say evaluate="teacher"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from smartreg_tf.teacher import Teacher


class Validation(keras.callbacks.Callback):  # type: ignore[misc]
    """Put theta~ into the model for each validation of one `fit`, and for good at its end.

    After a validation theta~ stays until the next epoch begins. So callbacks that save or copy the weights in
    `on_epoch_end` (ModelCheckpoint, EarlyStopping) get those that were validated, whatever their order.

    Attributes:
        wanted: whether the settings say so.
        fitting: whether such a fit runs.
        theta: the values of theta while theta~ is in the model, in the order of `teacher.pairs()`; else None.
    """

    def __init__(self, teacher: Teacher, wanted: bool) -> None:
        super().__init__()
        self.wanted = wanted
        self.theta: list[Any] | None = None
        self._teacher = teacher
        self.fitting = False

    def begin(self) -> None:
        """Begin a fit."""
        self.fitting = self.wanted

    def evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate theta~ during a fit, also if a callback asks; outside of it, what is in the model."""
        if not self.fitting or self.theta is not None:
            return original(*args, **kwargs)
        self._put()
        stays = False
        try:
            found = original(*args, **kwargs)
            stays = isinstance(kwargs.get("callbacks"), keras.callbacks.CallbackList)  # it is fit's own
        finally:
            if not stays:
                self.put_back()
        return found

    def put_back(self) -> None:
        """Let the model have theta again, unless other weights than theta~ were put into it."""
        theta, self.theta = self.theta, None
        if theta is not None and bool(self._teacher.is_theta()):
            self._teacher.assign(theta)

    def end(self, restored: bool = False) -> None:
        """Leave theta~ in the model, unless an EarlyStopping has restored its own weights."""
        if self.fitting and self.theta is None and not restored:
            self._put()
        self.theta, self.fitting = None, False

    def break_off(self) -> None:
        """End a fit that an exception broke off: the model has theta."""
        self.put_back()
        self.fitting = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Put theta back."""
        self.put_back()

    def on_train_end(self, logs: Any = None) -> None:
        """Leave theta~ in the model; an EarlyStopping that comes later restores its own weights."""
        self.end()

    def _put(self) -> None:
        if self._teacher.averages:
            self.theta = self._teacher.values()
            self._teacher.assign(average.value for average in self._teacher.averages.values())
