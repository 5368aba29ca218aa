"""Keep theta~, the averaged weights of a Keras model, by name: make it, move it, put it into the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from smartreg.config import SMARTConfig
from smartreg.proximal import moves
from smartreg_tf import compat
from smartreg_tf.proximal import ema_update, momentum

Tensor = Any


class Teacher:
    """Keep theta~ of a model: an average of each trainable variable, in float32 or wider.

    Attributes:
        averages: by the variables' paths, in the order of `model.trainable_variables`; of variables with one path (a
            subclassed model may name layers alike) the second is called path#2. Empty before `follow`, and if the
            settings have no theta~.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")], name="model")
        >>> teacher = Teacher(model, SMARTConfig(total_steps=9))
        >>> teacher.follow()
        >>> list(teacher.averages)
        ['model/head/kernel', 'model/head/bias']
    """

    def __init__(self, model: Any, config: SMARTConfig) -> None:
        self.averages: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        self._model, self._config = model, config

    def follow(self) -> None:
        """Make theta~ once the model has its weights, equal to them (paper, Algorithm 1, line 1)."""
        if self._weights or not self._config.has_teacher:
            return
        weights = list(self._model.trainable_variables)
        if not tf.executing_eagerly() and all(compat.has_value(weight) for weight in weights):
            raise RuntimeError("SMART: the model has no weights yet. Call it on a batch before its training begins")
        for weight in weights:
            name, count = weight.path, 2
            while name in self._weights:
                name, count = f"{weight.path}#{count}", count + 1
            self._weights[name] = weight
        with self._model.distribute_strategy.scope():
            self.averages = {name: _average(weight) for name, weight in self._weights.items()}

    def begin(self) -> None:
        """Set theta~ to the weights: they may have been loaded since it was made."""
        for weight, average in self.pairs():
            average.assign(weight.value)

    def missing(self) -> list[str]:
        """Name the variables that became trainable after theta~ was made."""
        followed = {id(weight) for weight in self._weights.values()}
        new = [weight.path for weight in self._model.trainable_variables if id(weight) not in followed]
        return new if followed else []

    @property
    def weights(self) -> list[Any]:
        """Return the trainable variables that theta~ is an average of."""
        return list(self._weights.values())

    def pairs(self) -> list[tuple[Any, Any]]:
        """Pair each trainable variable with its average, as `Passes.again` takes them."""
        return list(zip(self._weights.values(), self.averages.values(), strict=True))

    def move(self, step: Any, new: Any) -> None:
        """Move theta~ in every S-th optimiser step (paper, Algorithm 1, line 14).

        Args:
            step: the variable that counts them.
            new: how many of them this training step has added: 0 while gradients accumulate.
        """
        if not self._weights:
            return
        step = tf.convert_to_tensor(step.value)
        theta = {name: weight.value for name, weight in self._weights.items()}
        averages = {name: tf.convert_to_tensor(average.value) for name, average in self.averages.items()}
        now = (tf.cast(new, tf.int64) > 0) & moves(step, self._config)
        # all weights in one branch: a tf.where of each would read and write them once more
        moved = tf.cond(now, lambda: ema_update(averages, theta, momentum(step, self._config)), lambda: averages)
        for name, average in self.averages.items():
            average.assign(moved[name])  # not inside tf.cond: a MirroredStrategy cannot assign there

    def is_theta(self) -> Tensor:
        """Tell whether theta~ is theta, in the weights' own dtype."""
        return tf.reduce_all(
            [tf.reduce_all(tf.cast(average.value, weight.dtype) == weight.value) for weight, average in self.pairs()]
        )

    def distance(self) -> Tensor:
        """Return max|theta - theta~|, theta~ in the dtype in which its pass has it."""
        pairs = [(tf.convert_to_tensor(weight.value), average.value) for weight, average in self.pairs()]
        each = [tf.reduce_max(tf.abs(weight - tf.cast(average, weight.dtype))) for weight, average in pairs]
        return tf.reduce_max([tf.cast(largest, tf.float64) for largest in each])

    def values(self) -> list[Any]:
        """Return the values of theta, which the model has now."""
        return [tf.convert_to_tensor(weight.value).numpy() for weight in self.weights]

    def assign(self, values: Iterable[Any]) -> None:
        """Let the model have these values as its trainable weights."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.assign(value)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have theta~ inside the block."""
        if not self.averages:
            raise ValueError(
                "SMART: there is no theta~ to swap in: mu is 0 and evaluate is 'theta', or the model was never "
                "trained. Give SMARTConfig(mu=...) above 0 or evaluate='teacher', and train"
            )
        kept = self.values()
        try:
            self.assign(average.value for average in self.averages.values())
            yield
        finally:
            self.assign(kept)


def _average(weight: Any) -> Any:
    """Make theta~ of one weight, equal to it; if Keras builds a model without values, as soon as it has one."""
    return keras.Variable(
        lambda shape, dtype: tf.cast(tf.convert_to_tensor(weight.value), dtype),
        shape=weight.shape,
        dtype="float64" if weight.dtype == "float64" else "float32",
        trainable=False,
        name="smart_average",
        aggregation="only_first_replica",
    )
