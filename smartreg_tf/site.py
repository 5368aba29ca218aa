"""Where the perturbation enters a Keras model, and how a call of the model is repeated with it.

A site is the output of one or more layers (the token embeddings), or the model's floating-point inputs. The layers' and
the model's `call` are wrapped on the instances, once, and do nothing outside a training step. What a training step
needs to remember is kept by thread: the replicas of a MirroredStrategy are threads.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from smartreg_tf.passes import State, arguments_of, copied, kept_variables

Tensor = Any
Put = Callable[[int, Tensor], Tensor]

_NOT_TOKENS = re.compile(r"position|segment|token_type", re.IGNORECASE)
_PADDING_MASKS = ("padding_mask", "attention_mask")


class Call(NamedTuple):
    """One run of the site: its output x, (n, ..., d), and which positions are real, or None."""

    x: Tensor
    mask: Tensor | None


@dataclass
class Pass:
    """One call of the model, and what repeating it takes.

    Attributes:
        args, kwargs: what the model's `call` was given.
        draws: the variables that it may move, as `keras.StatelessScope` takes them, and their values before it: the
            seeds of the dropout masks, counters, a recurrent layer's states.
        state: what else the model held before it, of what it moved.
        calls: the runs of the site.
        outputs: what the model returned.
        tape: has recorded the way from the site to the outputs, where that was asked for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: list[tuple[Any, Tensor]]
    state: State
    calls: list[Call]
    outputs: Any
    tape: tf.GradientTape | None


class Patches:
    """Attributes put on instances past Keras' tracking, and taken away again."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value, until `remove`."""
        self._undo.append((owner, name, vars(owner).get(name, self)))
        object.__setattr__(owner, name, value)

    def remove(self) -> None:
        """Undo every `put`, the last first."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is self:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)


class Site:
    """The site of one model.

    Args:
        model: a Keras model, built or not.
        layers: names or objects of the layers whose output is perturbed. By default `token_embedding` where some layer
            has one (keras_hub's convention), else every Embedding that is not named position, segment or token_type,
            else the floating-point inputs.

    Raises:
        ValueError: `layers` names one that the model does not have, or has several of.

    Example:
        >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(2)])
        >>> Site(model).layers[0] is model.layers[0]
        True
    """

    def __init__(self, model: Any, layers: str | Any | Sequence[Any] | None = None) -> None:
        self.model = model
        self.layers = _find(model, layers)
        self._patches = Patches()
        self._local = threading.local()

    def install(self) -> None:
        """Wrap the `call` of the model and of the layers."""
        wrapped = functools.partial(self._on_root, self.model.call)
        self._patches.put(self.model, "call", functools.update_wrapper(wrapped, self.model.call))
        for layer in self.layers:
            for name in ("call", "quantized_call"):
                original = getattr(layer, name, None)
                if original is not None:
                    wrapped = functools.partial(self._on_layer, layer, original)
                    self._patches.put(layer, name, functools.update_wrapper(wrapped, original))

    def remove(self) -> None:
        """Leave the model and the layers as they were before `install`."""
        self._patches.remove()

    @contextmanager
    def recording(self, differentiable: bool) -> Iterator[list[Pass]]:
        """Collect every call of the model made inside the block, with a tape where `differentiable`."""
        passes: list[Pass] = []
        self._local.passes, self._local.differentiable = passes, differentiable
        try:
            yield passes
        finally:
            self._local.passes = None

    def repeat(
        self, clean: Pass, put: Put | None = None, weights: Iterable[Any] = (), differentiable: bool = False
    ) -> Pass:
        """Call the model again as in `clean`, with the same dropout masks and no state changed.

        Args:
            put: gives what the i-th run of the site returns, from i and what it would return.
            weights: (variable, value) pairs: values to use in place of the variables' own.
            differentiable: record a tape from the site to the outputs.

        Raises:
            RuntimeError: the site ran another number of times than in `clean`.
        """
        calls: list[Call] = []

        def on_call(x: Tensor, mask: Tensor | None) -> Tensor:
            if put is not None and len(calls) < len(clean.calls):
                x = put(len(calls), x)
            return self._seen(calls, x, mask, tape)

        tape = tf.GradientTape(watch_accessed_variables=False) if differentiable else None
        scope = keras.StatelessScope([*clean.draws, *weights])
        args, kwargs = copied((clean.args, clean.kwargs))
        with clean.state.replayed(self.model), scope, self._handling(on_call), tape or nullcontext():
            outputs = self.model(*args, **kwargs)
        if len(calls) != len(clean.calls):
            raise RuntimeError(
                f"SMART: {self} ran {len(clean.calls)} times in the clean pass and {len(calls)} times in a later one "
                "of the same batch. A model whose control flow is random cannot be compared with itself; give layers= "
                "a layer that always runs equally often."
            )
        return Pass(clean.args, clean.kwargs, clean.draws, clean.state, calls, outputs, tape)

    def __str__(self) -> str:
        if not self.layers:
            return "the model's float inputs"
        return "the layer " + ", ".join(repr(layer.name) for layer in self.layers)

    @contextmanager
    def _handling(self, on_call: Callable[[Tensor, Tensor | None], Tensor]) -> Iterator[None]:
        outer = getattr(self._local, "on_call", None)
        self._local.on_call = on_call
        try:
            yield
        finally:
            self._local.on_call = outer

    def _seen(self, calls: list[Call], x: Tensor, mask: Tensor | None, tape: tf.GradientTape | None) -> Tensor:
        if tape is not None:
            x = tf.identity(x)  # watched, and nothing else that the model may do with the same tensor
            tape.watch(x)
        calls.append(Call(x, mask))
        return x

    def _on_root(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own `call`: a repeated pass, one to remember, or none of our business."""
        passes = getattr(self._local, "passes", None)
        if getattr(self._local, "on_call", None) is not None:
            return original(*self._on_inputs(args), **kwargs)
        if passes is None or _is_symbolic(args):
            return original(*args, **kwargs)
        tape = tf.GradientTape(watch_accessed_variables=False) if self._local.differentiable else None
        given, named = arguments_of(args, kwargs)
        state = State(self.model)
        clean = Pass(given, named, _values(kept_variables(self.model, state)), state, [], None, tape)
        with self._handling(lambda x, mask: self._seen(clean.calls, x, mask, tape)), tape or nullcontext():
            clean.outputs = original(*self._on_inputs(args), **kwargs)
        clean.state.keep_moved()
        known = {id(variable) for variable in (*self.model.weights, *(variable for variable, _ in clean.draws))}
        for variable, seed in _values(kept_variables(self.model, state)):
            if id(variable) not in known:  # a seed that was made by this very call: its state was [seed, 0]
                clean.draws.append((variable, tf.stack([seed[0], tf.zeros_like(seed[0])])))
        passes.append(clean)
        return clean.outputs

    def _on_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.layers or not args:
            return args

        def perturb(path: tuple[Any, ...], x: Any) -> Any:
            if path and path[-1] in _PADDING_MASKS:
                return x
            if isinstance(x, np.ndarray):
                x = tf.convert_to_tensor(x)
            if not (tf.is_tensor(x) and x.dtype.is_floating and x.shape.rank is not None and x.shape.rank >= 2):
                return x
            return self._moved(x, getattr(x, "_keras_mask", None))

        moved = [perturb(path, x) for path, x in keras.tree.flatten_with_path(args[0])]
        return (keras.tree.pack_sequence_as(args[0], moved), *args[1:])

    def _on_layer(self, layer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if getattr(self._local, "on_call", None) is None or _is_symbolic(output):
            return output
        if _argument(original, args, kwargs, "reverse"):  # a tied head: hidden states to logits
            return output
        if not (tf.is_tensor(output) and output.dtype.is_floating and (output.shape.rank or 0) >= 2):
            got = f"{output.dtype.name} of shape {output.shape}" if tf.is_tensor(output) else type(output).__name__
            raise TypeError(
                f"SMART: the layer {layer.name!r} must return a float tensor (n, ..., d) to be perturbed, got {got}; "
                "name another with layers="
            )
        mask = getattr(output, "_keras_mask", None)
        if mask is None and layer.supports_masking and args:
            mask = layer.compute_mask(args[0], getattr(args[0], "_keras_mask", None))
        return self._moved(output, mask)

    def _moved(self, x: Tensor, mask: Tensor | None) -> Tensor:
        moved = self._local.on_call(x, mask)
        if moved is not x and getattr(x, "_keras_mask", None) is not None:
            moved._keras_mask = x._keras_mask
        return moved


def padding_mask(clean: Pass, call: Call) -> Tensor | None:
    """Which positions of a run of the site are real: Keras' own mask, else the model's padding mask input."""
    if call.mask is not None or not clean.args or not isinstance(clean.args[0], dict) or call.x.shape.rank < 3:
        return call.mask
    for name in _PADDING_MASKS:
        mask = clean.args[0].get(name)
        if mask is not None:
            mask = tf.convert_to_tensor(mask)
            if mask.shape.is_compatible_with(call.x.shape[:-1]):
                return mask
    return None


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The layers that compute in half precision do so in float32 inside the block (their weights are float32), in this
    thread: replicas share the layers, and meet in the middle where BatchNormalization is synchronised.
    """
    layers = half_precision_layers(model)
    with _ThreadPolicy.lock:
        for layer in layers:
            if not isinstance(layer._dtype_policy, _ThreadPolicy):
                object.__setattr__(layer, "_dtype_policy", _ThreadPolicy(layer._dtype_policy))
            layer._dtype_policy.threads.add(threading.get_ident())
    try:
        yield
    finally:
        with _ThreadPolicy.lock:
            for layer in layers:
                policy = layer._dtype_policy
                policy.threads.remove(threading.get_ident())
                if not policy.threads:
                    object.__setattr__(layer, "_dtype_policy", policy.own)


class _ThreadPolicy:
    """float32 in some threads, a layer's own policy in all others."""

    lock = threading.Lock()
    float32 = keras.dtype_policies.DTypePolicy("float32")

    def __init__(self, own: Any) -> None:
        self.own = own
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.float32 if threading.get_ident() in self.threads else self.own, name)


def half_precision_layers(model: Any) -> list[Any]:
    """The layers with float32 weights that compute in float16 or bfloat16, as under keras' mixed policies."""
    return [
        layer
        for layer in model._flatten_layers()
        if layer.compute_dtype in ("float16", "bfloat16") and layer.variable_dtype == "float32"
    ]


def _find(model: Any, layers: str | Any | Sequence[Any] | None) -> list[Any]:
    inside = list(model._flatten_layers())
    if layers is not None:
        asked = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        if not asked:
            raise ValueError("SMART: layers=[] names no layer; leave it out for the default, or name one")
        return [_named(inside, layer) for layer in asked]
    found = [
        layer.token_embedding for layer in inside if isinstance(getattr(layer, "token_embedding", None), keras.Layer)
    ]
    if not found:
        found = [
            layer
            for layer in inside
            if isinstance(layer, keras.layers.Embedding) and not _NOT_TOKENS.search(layer.name)
        ]
    if not found:  # its output carries the mask; noise on its input would unmask the padding
        found = [layer for layer in inside if isinstance(layer, keras.layers.Masking)]
    return list({id(layer): layer for layer in found}.values())


def _named(inside: list[Any], asked: Any) -> Any:
    found = [layer for layer in inside if layer is asked or layer.name == asked]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"SMART: layers= names {asked!r}, which {len(found)} layers of the model are called: give the layer itself "
            "(SMARTModel saves names: give its layer a name of its own)"
        )
    names = ", ".join(layer.name for layer in inside[1:])
    raise ValueError(
        f"SMART: layers= names {getattr(asked, 'name', asked)!r}, which the model does not have; it has {names}"
    )


def seed_states(model: Any) -> list[Any]:
    """The variables that hold the states of the model's seed generators: Keras counts them among no weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.non_trainable_variables if id(variable) not in weights]


def _values(variables: list[Any]) -> list[tuple[Any, Tensor]]:
    """The variables with what they are now."""
    return [(variable, tf.identity(variable.value)) for variable in variables]


def _argument(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(function).parameters)
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def _is_symbolic(values: Any) -> bool:
    return any(isinstance(value, keras.KerasTensor) for value in keras.tree.flatten(values))
