"""Find where x is in a Keras model, and put another x there.

A site is the output of one or more layers (the token embeddings), or the model's floating-point inputs. The layers'
`call` is wrapped as the model's is, see `passes.py`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg_tf import compat, inputs
from smartreg_tf.candidates import Batch, Candidate, candidates, is_embeddings, named, traced_graph

Tensor = Any
Given = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of a call of the model


class Call(NamedTuple):
    """Hold one run of the site: its output x, (n, ..., d), and the mask of the real positions, or None."""

    x: Tensor
    mask: Tensor | None


class Patches:
    """Put attributes on instances without Keras' tracking, and take them away again."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set owner.name = value until `remove`."""
        self._undo.append((owner, name, vars(owner).get(name, self)))
        vars(owner)[name] = value

    def remove(self) -> None:
        """Undo every `put`, the last first."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is self:
                del vars(owner)[name]
            else:
                vars(owner)[name] = before


class Site:
    """Read x in one model, and put another x there.

    Args:
        model: a Keras model, built or not.
        site: names or objects of the layers whose output is perturbed, or of float `keras.Input`s. By default the
            first of `smartreg_tf.candidates.candidates` that has a run with one x an example, known after the first
            clean pass: `token_embedding` if some layer has one (keras_hub's convention), else every Embedding that
            is not named position, segment or token_type, else the floating-point inputs.

    Attributes:
        layers: those whose outputs are perturbed; none if it is the inputs.
        why: why this is the site.

    Raises:
        ValueError: `site` names one that the model does not have, or has several of.

    Example:
        >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(2)])
        >>> Site(model).layers[0] is model.layers[0]
        True
    """

    def __init__(self, model: Any, site: str | Any | Sequence[Any] | None = None) -> None:
        self.model = model
        self._named = site is not None
        self._candidates = [named(model, site)] if site is not None else candidates(model)
        self._unfit: dict[int | None, Exception] = {}  # why a layer (by its id), or the inputs, is no site
        self._patches = Patches()
        self._local = threading.local()

    @property
    def layers(self) -> list[Any]:
        """List the layers whose outputs are perturbed; none if it is the model's inputs."""
        return [layer for layer in self._candidates[0].layers if id(layer) not in self._unfit or self._named]

    @property
    def why(self) -> str:
        """Say why this is the site."""
        return self._candidates[0].why

    def install(self) -> None:
        """Wrap the `call` of the layers; the caller gives the model's own `call` its `on_inputs`."""
        for layer in {id(layer): layer for candidate in self._candidates for layer in candidate.layers}.values():
            for name in ("call", "quantized_call"):
                original = getattr(layer, name, None)
                if original is not None:
                    wrapped = functools.partial(self._on_layer, layer, original)
                    self._patches.put(layer, name, functools.update_wrapper(wrapped, original))

    def remove(self) -> None:
        """Leave the layers as they were before `install`."""
        self._patches.remove()

    @property
    def active(self) -> bool:
        """Tell whether the model runs inside `recording` or `replaced` in this thread."""
        return getattr(self._local, "on_call", None) is not None

    @contextmanager
    def recording(self, given: Given, tape: tf.GradientTape | None = None) -> Iterator[list[Call]]:
        """Record the runs of the site in the model's clean pass; after the block the list has them.

        Args:
            given: what the model's `call` gets.
            tape: watches x.
        """
        sources: list[int | None] = []
        calls: list[Call] = []
        chosen: list[Call] = []

        def note(x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
            sources.append(source)
            return self._seen(calls, x, mask, tape)

        batch = Batch(inputs.batch_size(*given)[0], traced_graph(), keras.tree.flatten(given))
        with self._handling(note, batch):
            yield chosen
        chosen += self._chosen(sources, calls)

    @contextmanager
    def replaced(self, points: list[Tensor] | None, tape: tf.GradientTape | None = None) -> Iterator[list[Call]]:
        """Let the i-th run of the site return points[i] inside the block, or x itself; the list has the runs."""
        calls: list[Call] = []

        def put(x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
            if points is not None and len(calls) < len(points):
                shape, x = x.shape, tf.identity(points[len(calls)])
                x.set_shape(shape)  # not ensure_shape: under XLA it makes the size unknown, see `project_l1_ball`
            return self._seen(calls, x, mask, tape)

        with self._handling(put):
            yield calls

    def require(self, calls: list[Call]) -> None:
        """Raise if the clean pass has nothing to perturb, or nothing right."""
        unfit = [self._unfit[key] for key in self._sources() if key in self._unfit]
        if unfit and (self._named or not calls):
            raise unfit[0]
        if not calls and self.layers:
            raise RuntimeError(
                f"SMART: {self} did not run in the model's training pass, so there is nothing to perturb. Name a layer "
                "that runs with site=. Inside a tf.function of the model's own none does: take the decorator away."
            )
        if not calls:
            raise RuntimeError(
                f"SMART: {self} did not run in the model's training pass, so there is nothing to perturb. The model "
                "has no Embedding layer and no float input of shape (n, ..., d). Name the layer to perturb with "
                "site=, or cast images and features to float before the model."
            )

    def fits(self, given: Given, calls: list[Call]) -> Tensor:
        """Tell whether each run of the site has as many rows for every example; a shape alone may not say so."""
        known, n = inputs.batch_size(*given)
        unsure = [call.x for call in calls if known is None or call.x.shape[0] != known]
        whole = [tf.shape(x)[0] % tf.maximum(n, 1) == 0 for x in unsure]
        return tf.reduce_all(whole) if whole else tf.constant(True)

    def padding_mask(self, given: Given, call: Call) -> Tensor | None:
        """Return which positions of a run of the site are real: Keras' own mask, else the padding mask input."""
        if call.mask is not None:
            return call.mask
        return inputs.padding_mask(inputs.by_name(self.model, *given), call.x)

    def on_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments for the model's own `call`, the float inputs taken by `recording` or `replaced`."""
        asked = [candidate.inputs for candidate in self._candidates if candidate.inputs is not None]
        if not asked or not args:
            return args
        flat = inputs.flat_inputs(self.model, args[0])
        names = [name for name, x in flat if is_embeddings(x) and name not in inputs.PADDING_MASKS]
        names = [name for name in names if name in asked[0]] if asked[0] else names
        unlabelled = [name for name in names if asked[0] or not inputs.is_label(name)]
        if names and not unlabelled:
            self._unfit[None] = ValueError(
                f"SMART: the only float input that may be perturbed, {names[0]!r}, is a label by its name. Name the "
                f"layer or the input to perturb with site=: site={names[0]!r} if it is this one."
            )
        moved = [
            self._moved(x, compat.mask_of(x), None) if is_embeddings(x) and name in unlabelled else old
            for (name, x), old in zip(flat, keras.tree.flatten(args[0]), strict=True)
        ]
        return (keras.tree.pack_sequence_as(args[0], moved), *args[1:])

    def __str__(self) -> str:
        layers, inputs = [repr(layer.name) for layer in self.layers], sorted(self._candidates[0].inputs or ())
        found = ["the layer " + ", ".join(layers)] if layers else []
        found += ["the input " + ", ".join(map(repr, inputs))] if inputs else []
        return " and ".join(found) or "the model's float inputs"

    @contextmanager
    def _handling(
        self, on_call: Callable[[Tensor, Tensor | None, int | None], Tensor], batch: Batch | None = None
    ) -> Iterator[None]:
        """Let `on_call` take each run of the site: x, its mask, the layer's id; with `batch`, those that are fit."""
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

    def _sources(self) -> list[int | None]:
        return [source for candidate in self._candidates for source in self._own(candidate)]

    def _chosen(self, sources: list[int | None], calls: list[Call]) -> list[Call]:
        """Return the runs of the first candidate that has any; it is the site from now on."""
        for candidate in self._candidates:
            own = [source for source in self._own(candidate) if source not in self._unfit]
            runs = [call for source, call in zip(sources, calls, strict=True) if source in own]
            if runs:
                self._candidates = [candidate]
                return runs
        return []

    def _own(self, candidate: Candidate) -> list[int | None]:
        """Return the ids of its layers, and None for the inputs."""
        layers: list[int | None] = [id(layer) for layer in candidate.layers]
        return layers + [None] * (candidate.inputs is not None)

    def _on_layer(self, layer: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if not self.active or is_symbolic(output) or id(layer) not in self._sources():
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
        mask = compat.mask_of(output)
        if mask is None and layer.supports_masking:
            mask = layer.compute_mask(x, compat.mask_of(x))
        return self._moved(output, mask, id(layer))

    def _moved(self, x: Tensor, mask: Tensor | None, source: int | None) -> Tensor:
        values, there, back = inputs.dense(x)
        mask = inputs.dense(mask)[0] if there is None and mask is not None else there
        moved = self._local.on_call(values, mask, source)
        if moved is values:
            return x
        moved = back(moved)
        kept = compat.mask_of(x)
        if kept is not None:
            compat.set_mask(moved, kept)
        return moved


def _argument(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(function).parameters)
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def is_symbolic(values: Any) -> bool:
    """Tell whether the model is being built: there is a `KerasTensor` among the values."""
    return any(isinstance(value, keras.KerasTensor) for value in keras.tree.flatten(values))
