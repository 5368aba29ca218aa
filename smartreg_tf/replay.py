"""Put back what a model keeps from one pass to the next, for a pass of the same batch; tell whether that was all.

A repeated pass gets Keras' variables by a `keras.StatelessScope`. This file is about everything else: attributes of
layers, lists and arrays in them, raw TensorFlow variables and generators, Python's and NumPy's streams.
"""

from __future__ import annotations

import random
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from smartreg_tf import compat

Tensor = Any

# Packages whose objects a model may hold, but whose attributes are no state of the model.
_FOREIGN = {*sys.stdlib_module_names, "keras", "keras_hub", "tensorflow", "numpy", "smartreg", "smartreg_tf"}
_LONG = 1000  # a container of more items is data, which no pass moves
_ABSENT = object()
_DRAWS = re.compile(r"(Random|Truncated|Parameterized|Multinomial|EagerPyFunc|PyFunc)")


def kept_variables(model: Any, state: State) -> list[Any]:
    """List the Keras variables that a pass may change: counters, statistics, states, and the seeds of random layers.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.BatchNormalization()])
        >>> [variable.name for variable in kept_variables(model, State(model))][:2]
        ['moving_mean', 'moving_variance']
    """
    seed = compat.default_seed()
    others = [*state.untracked, *([] if seed is None else [seed])]
    known = {id(variable) for variable in model.variables}
    known |= {id(variable) for variable in model.non_trainable_variables}
    return [*model.non_trainable_variables, *(variable for variable in others if id(variable) not in known)]


def values_of(variables: list[Any]) -> list[tuple[Any, Tensor]]:
    """Return the variables with what they are now, as `keras.StatelessScope` takes them."""
    return [(variable, tf.identity(variable.value)) for variable in variables]


def with_own_seeds(values: list[tuple[Any, Tensor]], key: Tensor) -> list[tuple[Any, Tensor]]:
    """Return the variables with their values, but the states of seed generators as a key makes them of those.

    Args:
        key: int64, (2,), of the pass whose dropout masks are drawn.
    """
    return [(variable, _own_seed(value, key) if compat.is_seed(variable) else value) for variable, value in values]


def _own_seed(state: Tensor, key: Tensor) -> Tensor:
    for word in tf.unstack(tf.cast(state, tf.int64)):  # so that two generators stay apart
        key = tf.random.experimental.stateless_fold_in(key, word, alg="philox")
    return tf.random.stateless_uniform([2], key, None, None, state.dtype, alg="philox")


def seed_states(model: Any) -> list[Any]:
    """Return the variables that hold the states of the model's seed generators: Keras counts them among no weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.non_trainable_variables if id(variable) not in weights]


def copied(arguments: Any) -> Any:
    """Copy containers and arrays, and keep the tensors: a `call` may pop from a dict or write into an array.

    Example:
        >>> given = {"x": np.zeros(2)}
        >>> kept = copied(given)
        >>> given.pop("x")[:] = 1
        >>> kept
        {'x': array([0., 0.])}
    """
    return keras.tree.map_structure(lambda x: x.copy() if isinstance(x, np.ndarray) else x, arguments)


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what to give a model so that its `call` gets `args` and `kwargs` again.

    A model whose `call` has no `training` still passes to its layers the one that it was called with.
    """
    training = compat.training_now()
    args, kwargs = copied((args, kwargs))
    return args, kwargs if training is None else {"training": training, **kwargs}


class State:
    """Keep what the layers of a model hold at one moment besides Keras' variables; and Python's and NumPy's streams.

    Example:
        >>> layer = keras.layers.Identity()
        >>> model = keras.Sequential([keras.Input([2]), layer])
        >>> layer.calls = 1
        >>> state = State(model)
        >>> layer.calls = 2
        >>> state.restore()
        >>> layer.calls
        1
    """

    def __init__(self, model: Any) -> None:
        self.untracked: list[Any] = []  # Keras' variables that it may not know of: a recurrent layer's states
        self._streams = (random.getstate(), np.random.get_state())  # noqa: NPY002
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._contents: list[tuple[Any, Any]] = []  # of containers, arrays and generators
        self._variables: list[tuple[Any, Tensor]] = []  # of TensorFlow
        seen: set[int] = set()
        for layer in compat.every_layer(model):
            if layer.built:  # what a first call builds stays
                self._take_attributes(layer, seen)

    def restore(self) -> None:
        """Put everything back."""
        self.keep_moved()
        self.apply()

    def keep_moved(self) -> None:
        """Forget the attributes that have not changed since."""
        moved = []
        for owner, held in self._attributes:
            now = _own(owner)
            names = [
                name
                for name in {*held, *now}
                if held.get(name, _ABSENT) is not now.get(name, _ABSENT)
                and not _is_keras(held.get(name))
                and not _is_keras(now.get(name))
            ]
            moved.append((owner, {name: held.get(name, _ABSENT) for name in names}))
        self._attributes = moved

    def apply(self) -> None:
        """Put back what `keep_moved` has kept; this may be called again."""
        random.setstate(self._streams[0])
        np.random.set_state(self._streams[1])  # noqa: NPY002
        for owner, held in self._attributes:
            for name, value in held.items():
                if value is not _ABSENT:
                    vars(owner)[name] = value
                elif name in vars(owner):
                    del vars(owner)[name]
        for owner, content in self._contents:
            if not _holds(owner, content):
                _fill(owner, content)
        for variable, value in self._variables:
            variable.assign(value)

    @contextmanager
    def replayed(self, model: Any) -> Iterator[None]:
        """Put the model back to that moment inside the block, and to the present after it."""
        now = State(model)
        self.apply()
        try:
            yield
        finally:
            now.restore()

    def _take_attributes(self, owner: Any, seen: set[int]) -> None:
        held = _own(owner)
        self._attributes.append((owner, held))
        for value in held.values():
            self._take(value, seen)

    def _take(self, value: Any, seen: set[int]) -> None:
        if id(value) in seen or isinstance(value, (keras.layers.Layer, type)):
            return
        seen.add(id(value))
        if isinstance(value, (tf.random.Generator, keras.random.SeedGenerator)):
            value = value.state
        if isinstance(value, keras.Variable):
            self.untracked.append(value)
        if isinstance(value, tf.Variable):
            if tf.distribute.get_strategy().num_replicas_in_sync == 1:
                self._variables.append((value, tf.identity(value)))
        elif isinstance(value, (list, dict, set, deque)):
            if len(value) <= _LONG:
                self._contents.append((value, dict(value) if isinstance(value, dict) else list(value)))
                for item in value.values() if isinstance(value, dict) else value:
                    self._take(item, seen)
        elif isinstance(value, tuple):
            for item in value[:_LONG]:
                self._take(item, seen)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self._contents.append((value, value.copy()))
        elif isinstance(value, np.random.Generator):
            self._contents.append((value, value.bit_generator.state))
        elif isinstance(value, np.random.RandomState):
            self._contents.append((value, value.get_state()))
        elif isinstance(value, random.Random):
            self._contents.append((value, value.getstate()))
        elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _FOREIGN:
            self._take_attributes(value, seen)


def _own(owner: Any) -> dict[str, Any]:
    """Return an object's attributes without those that Keras itself keeps in every layer."""
    if not isinstance(owner, keras.layers.Layer):
        return dict(vars(owner))
    keras_own = compat.names_of_keras()
    return {name: value for name, value in vars(owner).items() if name not in keras_own}


def _is_keras(value: Any) -> bool:
    """Tell whether this is a layer, variable, policy or the like: a pass changes none, unless it builds the model."""
    containers = (list, dict, set)  # Keras' own kinds of them hold what a layer put there
    return type(value).__module__.startswith(("keras.", "smartreg_tf.")) and not isinstance(value, containers)


def _holds(owner: Any, content: Any) -> bool:
    """Tell whether a container has the same objects in it as then; False for what is no container."""
    if isinstance(owner, dict):
        return len(owner) == len(content) and all(
            a is b and owner[a] is content[b] for a, b in zip(owner, content, strict=True)
        )
    if isinstance(owner, (list, set, deque)):
        return len(owner) == len(content) and all(a is b for a, b in zip(owner, content, strict=True))
    return False


def _fill(owner: Any, content: Any) -> None:
    if isinstance(owner, np.random.Generator):
        owner.bit_generator.state = content
    elif isinstance(owner, np.random.RandomState):
        owner.set_state(content)
    elif isinstance(owner, random.Random):
        owner.setstate(content)
    elif isinstance(owner, np.ndarray):
        owner[...] = content
    else:
        kind = next(kind for kind in (dict, set, list, deque) if isinstance(owner, kind))
        # not the methods of Keras' own containers, which would track the items anew; TensorFlow's have no others
        methods: Any = kind if type(owner).__module__.startswith("keras.") else type(owner)
        methods.clear(owner)
        (methods.update if kind in (dict, set) else methods.extend)(owner, content)


def differing(clean: list[Tensor], again: list[Tensor], masks: list[Tensor | None], half: bool) -> Tensor:
    """Tell whether a pass has other outputs than the clean one, by more than the rounding of its kernels.

    Args:
        clean, again: the outputs of both, (n, ..., C). masks: of their positions.
        half: whether the model computes in half precision.
    """
    found = []
    for a, b, mask in zip(clean, again, masks, strict=True):
        counted = tf.ones_like(a, tf.bool)
        if mask is not None:
            mask = tf.cast(mask, tf.bool)
            counted &= tf.reshape(mask, tf.concat([tf.shape(mask), [1] * (a.shape.rank - mask.shape.rank)], 0))
        same = (a == b) | (tf.math.is_nan(a) & tf.math.is_nan(b))
        largest = tf.reduce_max(tf.where(counted & tf.math.is_finite(a), tf.abs(a), tf.zeros_like(a)))
        close = tf.abs(a - b) <= tf.cast(_tolerance(a.dtype, half), a.dtype) * largest
        found.append(tf.reduce_any(counted & ~same & ~close))
    return tf.reduce_any(found)


def _tolerance(dtype: Any, half: bool) -> float:
    """Bound the rounding of one kernel against another, in units of the largest output."""
    on_a_gpu = bool(tf.config.list_physical_devices("GPU"))  # TensorFloat-32 there
    ulp = 2.0**-7 if half else 2.0**-10 if on_a_gpu and dtype != tf.float64 else float(np.finfo(dtype.name).eps)
    return float(ulp**0.7)


def random_operations(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Return what `run` does, and the operations that it adds to the graph and that draw anew whenever they run.

    In eager mode there are none.
    """
    if tf.executing_eagerly():
        return run(), []
    graph = compat.default_graph()
    before = len(graph.get_operations())
    value = run()
    return value, [op.name for op in graph.get_operations()[before:] if _DRAWS.match(op.type)]


def traced_random_operations(run: Callable[[], Any]) -> list[str]:
    """Return the operations that `random_operations` would find if `run` were compiled; none if it cannot be.

    Example:
        >>> traced_random_operations(lambda: tf.random.normal([2]))
        ['random_normal/RandomStandardNormal']
    """
    found: list[str] = []
    with suppress(Exception):  # an error is being explained: no second one may come in its place
        tf.function(lambda: found.extend(random_operations(run)[1]), autograph=False).get_concrete_function()
    return found


def refusal(drawn: list[str]) -> str:
    """Word the error about passes of one batch that differ."""
    most_likely = (
        f"Most likely because of {', '.join(drawn[:3])}, which draws or computes anew in each pass."
        if drawn
        else "Most likely a layer draws from tf.random, or keeps something outside of Keras' variables and its own "
        "attributes (a table, a global, a Python function in the graph)."
    )
    return (
        "SMART: the model does not repeat its own pass: with the same batch, weights and dropout masks, and no "
        f"perturbation, it gave other outputs than before, and R_s and D_Breg would measure that. {most_likely} Draw "
        "with keras.random and a keras.random.SeedGenerator that the layer keeps as an attribute, and keep what moves "
        "in self.add_weight(..., trainable=False)."
    )
