"""Where the perturbation enters a Keras model, and how a call of the model is repeated with it.

A site is the output of one or more layers (the token embeddings), or the model's floating-point inputs. The layers' and
the model's `call` are wrapped on the instances, once, and do nothing outside a training step. What a training step
needs to remember is kept by thread: the replicas of a MirroredStrategy are threads.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg_tf import inputs as given
from smartreg_tf.candidates import Batch, Candidate, candidates, is_embeddings, named, traced_graph
from smartreg_tf.passes import State, arguments_of, copied, kept_variables

Tensor = Any
Put = Callable[[int, Tensor], Tensor]


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
        layers: names or objects of the layers whose output is perturbed, or of float `keras.Input`s. By default the
            first of `smartreg_tf.candidates.candidates` that has a run with one x an example, known after the first
            clean pass: `token_embedding` where some layer has one (keras_hub's convention), else every Embedding that
            is not named position, segment or token_type, else the floating-point inputs.

    Attributes:
        layers: those whose outputs are perturbed; none where it is the inputs.
        why: what they were chosen for.

    Raises:
        ValueError: `layers` names one that the model does not have, or has several of.

    Example:
        >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(2)])
        >>> Site(model).layers[0] is model.layers[0]
        True
    """

    def __init__(self, model: Any, layers: str | Any | Sequence[Any] | None = None) -> None:
        self.model = model
        self._named = layers is not None
        self._candidates = [named(model, layers)] if layers is not None else candidates(model)
        self._unfit: dict[int | None, Exception] = {}  # why a layer (by its id), or the inputs, is no site
        self._patches = Patches()
        self._local = threading.local()

    @property
    def layers(self) -> list[Any]:
        """The layers whose outputs are perturbed; none where it is the model's inputs."""
        return [layer for layer in self._candidates[0].layers if id(layer) not in self._unfit or self._named]

    @property
    def why(self) -> str:
        """What the site was chosen for."""
        return self._candidates[0].why

    def install(self) -> None:
        """Wrap the `call` of the model and of the layers."""
        wrapped = functools.partial(self._on_root, self.model.call)
        self._patches.put(self.model, "call", functools.update_wrapper(wrapped, self.model.call))
        for layer in {id(layer): layer for candidate in self._candidates for layer in candidate.layers}.values():
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

    def require(self, clean: Pass) -> None:
        """Raise where there is nothing in a clean pass to perturb, or nothing right."""
        unfit = [self._unfit[key] for key in self._sources() if key in self._unfit]
        if unfit and (self._named or not clean.calls):
            raise unfit[0]
        if not clean.calls and self.layers:
            raise RuntimeError(
                f"SMART: {self} did not run in the model's training pass, so there is nothing to perturb. Name a layer "
                "that runs with layers=. Inside a tf.function of the model's own none does: take the decorator away."
            )
        if not clean.calls:
            raise RuntimeError(
                f"SMART: {self} did not run in the model's training pass, so there is nothing to perturb. The model "
                "has no Embedding layer and no float input of shape (n, ..., d). Name the layer to perturb with "
                "layers=, or cast images and features to float before the model."
            )

    def fits(self, clean: Pass) -> Tensor:
        """Whether every run of the site has a row, or as many, for each example, of which a shape may not tell."""
        known, n = given.batch_size(clean.args, clean.kwargs)
        unsure = [call.x for call in clean.calls if known is None or call.x.shape[0] != known]
        whole = [tf.shape(x)[0] % tf.maximum(n, 1) == 0 for x in unsure]
        return tf.reduce_all(whole) if whole else tf.constant(True)

    def padding_mask(self, clean: Pass, call: Call) -> Tensor | None:
        """Which positions of a run of the site are real: Keras' own mask, else the model's padding mask input."""
        if call.mask is not None:
            return call.mask
        return given.padding_mask(given.by_name(self.model, clean.args, clean.kwargs), call.x)

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

        def on_call(x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
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
        layers, inputs = [repr(layer.name) for layer in self.layers], sorted(self._candidates[0].inputs or ())
        found = ["the layer " + ", ".join(layers)] if layers else []
        found += ["the input " + ", ".join(map(repr, inputs))] if inputs else []
        return " and ".join(found) or "the model's float inputs"

    @contextmanager
    def _handling(
        self, on_call: Callable[[Tensor, Tensor | None, int | None], Tensor], batch: Batch | None = None
    ) -> Iterator[None]:
        """`on_call` takes each run of the site: x, its mask, and the layer's id; with `batch`, if it is fit."""
        outer = getattr(self._local, "on_call", None), getattr(self._local, "batch", None)
        self._local.on_call, self._local.batch = on_call, batch
        try:
            yield
        finally:
            self._local.on_call, self._local.batch = outer

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
        repeated = arguments_of(args, kwargs)
        state = State(self.model)
        clean = Pass(*repeated, _values(kept_variables(self.model, state)), state, [], None, tape)
        batch = Batch(given.batch_size(args, kwargs)[0], traced_graph(), keras.tree.flatten((args, kwargs)))
        sources: list[int | None] = []

        def on_call(x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
            sources.append(source)
            return self._seen(clean.calls, x, mask, tape)

        with self._handling(on_call, batch), tape or nullcontext():
            clean.outputs = original(*self._on_inputs(args), **kwargs)
        clean.state.keep_moved()
        clean.calls = self._chosen(sources, clean.calls)
        known = {id(variable) for variable in (*self.model.weights, *(variable for variable, _ in clean.draws))}
        for variable, seed in _values(kept_variables(self.model, state)):
            if id(variable) not in known:  # a seed that was made by this very call: its state was [seed, 0]
                clean.draws.append((variable, tf.stack([seed[0], tf.zeros_like(seed[0])])))
        passes.append(clean)
        return clean.outputs

    def _sources(self) -> list[int | None]:
        return [source for candidate in self._candidates for source in self._own(candidate)]

    def _chosen(self, sources: list[int | None], calls: list[Call]) -> list[Call]:
        """The runs of the first candidate that has any; it is the site from now on."""
        for candidate in self._candidates:
            own = [source for source in self._own(candidate) if source not in self._unfit]
            runs = [call for source, call in zip(sources, calls, strict=True) if source in own]
            if runs:
                self._candidates = [candidate]
                return runs
        return []

    def _own(self, candidate: Candidate) -> list[int | None]:
        """The ids of its layers, and None for the inputs."""
        layers: list[int | None] = [id(layer) for layer in candidate.layers]
        return layers + [None] * (candidate.inputs is not None)

    def _on_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        asked = [candidate.inputs for candidate in self._candidates if candidate.inputs is not None]
        if not asked or not args:
            return args
        flat = given.flat_inputs(self.model, args[0])
        names = [
            name for name, x in flat if is_embeddings(x) and name not in given.PADDING_MASKS and _asked(name, asked[0])
        ]
        unlabelled = [name for name in names if asked[0] or not given.is_label(name)]
        if names and not unlabelled:
            self._unfit[None] = ValueError(
                f"SMART: the only float input that may be perturbed, {names[0]!r}, is a label by its name. Name the "
                f"layer or the input to perturb with layers=: layers={names[0]!r} if it is this one."
            )
        moved = [
            self._moved(x, getattr(x, "_keras_mask", None), None) if is_embeddings(x) and name in unlabelled else old
            for (name, x), old in zip(flat, keras.tree.flatten(args[0]), strict=True)
        ]
        return (keras.tree.pack_sequence_as(args[0], moved), *args[1:])

    def _on_layer(self, layer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if getattr(self._local, "on_call", None) is None or _is_symbolic(output) or id(layer) not in self._sources():
            return output
        if _argument(original, args, kwargs, "reverse"):  # a tied head: hidden states to logits
            return output
        batch = self._local.batch
        x = _argument(original, args, kwargs, next(iter(inspect.signature(original).parameters)))
        unfit = None if batch is None else batch.unfit(layer, x, output)
        if unfit is not None:
            self._unfit[id(layer)] = unfit
        if id(layer) in self._unfit:
            return output
        mask = getattr(output, "_keras_mask", None)
        if mask is None and layer.supports_masking:
            mask = layer.compute_mask(x, getattr(x, "_keras_mask", None))
        return self._moved(output, mask, id(layer))

    def _moved(self, x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
        values, there, back = given.dense(x)
        mask = given.dense(mask)[0] if there is None and mask is not None else there
        moved = self._local.on_call(values, mask, source)
        if moved is values:
            return x
        moved = back(moved)
        if getattr(x, "_keras_mask", None) is not None:
            moved._keras_mask = x._keras_mask
        return moved


def _asked(name: str, names: frozenset[str]) -> bool:
    return not names or name in names


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
