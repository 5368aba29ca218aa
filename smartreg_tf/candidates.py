"""List the layers and inputs of a Keras model that may be its site, the likeliest first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg_tf import compat

# a table of positions, by the layer's own name or that of the attribute that holds it
_POSITION = re.compile(r"position|(^|_)w?pos(_|\d|emb|$)|(^|_)wpe(_|$)", re.IGNORECASE)
_SEGMENT = re.compile(r"segment|token_type", re.IGNORECASE)


class Candidate(NamedTuple):
    """Describe a possible site.

    Attributes:
        layers: their outputs are perturbed.
        inputs: the names of the float inputs that are perturbed; if empty, all that are no labels; if None, none.
        why: the reason to choose it.
    """

    layers: list[Any]
    inputs: frozenset[str] | None
    why: str


def candidates(model: Any) -> list[Candidate]:
    """List the default sites, the likeliest first. The first that has a run with one x an example becomes the site.

    Example:
        >>> model = keras.Sequential([keras.layers.Embedding(9, 4), keras.layers.Dense(2)])
        >>> [candidate.layers == [model.layers[0]] for candidate in candidates(model)]  # the second: the float inputs
        [True, False]
    """
    inside = compat.every_layer(model)
    tokens = [found for layer in inside if (found := compat.token_embedding(layer)) is not None]
    embeddings = [layer for layer in inside if isinstance(layer, keras.layers.Embedding)]
    names = _names(inside)
    positions = [layer for layer in embeddings if any(map(_POSITION.search, names[id(layer)]))]
    rest = [layer for layer in embeddings if not any(layer is position for position in positions)]
    segments = [layer for layer in rest if any(map(_SEGMENT.search, names[id(layer)]))]
    words = [layer for layer in rest if not any(layer is segment for segment in segments)]
    masking = [layer for layer in inside if isinstance(layer, keras.layers.Masking)]
    found = [
        Candidate(_once(tokens), None, "the layers called token_embedding"),
        Candidate(_once(words), None, "every Embedding that is not named position, segment or token_type"),
        Candidate(_once(segments), None, "the only Embedding that is not named position"),
        # it reads its mask off its input, and padding that is perturbed would no longer be masked
        Candidate(_once(masking), None, "every Masking layer"),
        Candidate([], frozenset(), "no token Embedding or Masking layer makes one x an example"),
        Candidate(_once(positions), None, "the only Embedding"),
    ]
    return [candidate for candidate in found if candidate.layers or candidate.inputs is not None]


def named(model: Any, layers: str | Any | Sequence[Any]) -> Candidate:
    """Return the site that `site=` names: layers, or `keras.Input`s.

    Raises:
        ValueError: the model has no layer of that name, or several.
    """
    inside = compat.every_layer(model)
    asked = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if not asked:
        raise ValueError("SMART: site=[] names no layer. Leave it out for the default, or name one")
    found = [_named(inside, layer) for layer in asked]
    inputs = [layer for layer in found if isinstance(layer, keras.layers.InputLayer)]
    others = [layer for layer in found if not isinstance(layer, keras.layers.InputLayer)]
    return Candidate(others, frozenset(layer.name for layer in inputs) or None, "named by site=")


class Batch(NamedTuple):
    """Hold what a clean pass knows of its mini-batch.

    Attributes:
        n: the number of examples, or None.
        graph: the graph in which the pass is traced, or None.
        given: the tensors that the model was given.
    """

    n: int | None
    graph: Any
    given: list[Any]

    def unfit(self, layer: Any, x: Any, output: Any) -> Exception | None:
        """Return why a layer's output from x is no site, as the error to raise if there is no other; None if it is."""
        if not is_embeddings(output):
            got = f"{output.dtype.name} of shape {output.shape}" if tf.is_tensor(output) else type(output).__name__
            return TypeError(
                f"SMART: the layer {layer.name!r} must return a float tensor (n, ..., d) to be perturbed, got {got}. "
                "Name another with site=."
            )
        if traced_graph(output) is not self.graph:
            return ValueError(
                f"SMART: the layer {layer.name!r} runs inside a loop, a branch or a function of its own (an RNN cell, "
                "tf.map_fn, tf.cond, tf.function), and the rest of the graph cannot read its tensors. Name a layer "
                "outside of it with site=, say unroll=True to the RNN, or leave R_s out: SMARTConfig(lambda_s=0)."
            )
        first, n = output.shape[0], self.n
        # several rows an example, as (n, choices, T) flattened to (n choices, T); a table has no axis before its own
        several = n is not None and first is not None and n > 0 and first % n == 0 and output.shape.rank > 2
        if (first is None or n is None or first == n or several) and self._depends(x):
            return None
        batch = "any size" if n is None else f"{n} examples"
        return ValueError(not_the_batch(f"the layer {layer.name!r}", f"{output.shape} in a batch of {batch}"))

    def _depends(self, x: Any) -> bool:
        """Tell whether x is computed from the values that the model was given, and not from their shapes alone.

        Only a graph tells; in eager mode it is True.
        """
        given, ends = (
            [t for t in tf.nest.flatten(v, expand_composites=True) if tf.is_tensor(t)] for v in (self.given, x)
        )
        if self.graph is None or any(getattr(t, "graph", None) is not self.graph for t in given):
            return True
        sources, seen = {t.op.name for t in given}, set()
        waiting = [t.op for t in ends if getattr(t, "graph", None) is self.graph]
        while waiting:
            op = waiting.pop()
            if op.name in sources:
                return True
            if op.name not in seen and op.type not in ("Shape", "ShapeN", "Size", "Rank"):
                waiting.extend(t.op for t in op.inputs)
            seen.add(op.name)
        return not ends


def not_the_batch(what: Any, got: str) -> str:
    """Return the message about a site that does not have one x an example."""
    return (
        f"SMART: {what} must have one x an example, shape (n, ..., d), to be perturbed, got {got}. It is shared by the "
        "batch, as a table of positions is, or has lost its axis. Name another layer, or an Input, with site=."
    )


def traced_graph(output: Any = None) -> Any:
    """Return the graph of a tensor, else the one that is being traced; None in eager mode."""
    if tf.executing_eagerly():
        return None
    flat = output.flat_values if isinstance(output, tf.RaggedTensor) else output
    return flat.graph if hasattr(flat, "graph") else compat.default_graph()


def is_embeddings(x: Any) -> bool:
    """Tell whether x is a float tensor of shape (n, ..., d)."""
    return bool(tf.is_tensor(x) and x.dtype.is_floating and x.shape.rank is not None and x.shape.rank >= 2)


def _named(inside: list[Any], asked: Any) -> Any:
    found = [layer for layer in inside if layer is asked or layer.name == asked]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"SMART: site= names {asked!r}, which {len(found)} of the layers are called. Give the layer itself. "
            "SMARTModel saves names, so give the layer a name of its own."
        )
    names = ", ".join(layer.name for layer in inside[1:])
    raise ValueError(
        f"SMART: site= names {getattr(asked, 'name', asked)!r}, which the model does not have; it has {names}. Name "
        "one of these, or give the layer itself"
    )


def _names(inside: list[Any]) -> dict[int, list[str]]:
    """Name each layer, by its id: its own name, and those of the attributes and the keys that hold it."""
    names = {id(layer): [layer.name] for layer in inside}
    for owner in inside:
        for attribute, value in vars(owner).items():
            held = [(attribute, value)] if isinstance(value, keras.Layer) else []
            if isinstance(value, dict):
                held = [(str(key), layer) for key, layer in value.items()]
            elif isinstance(value, (list, tuple)):
                held = [(attribute, layer) for layer in value]
            for name, layer in held:
                if id(layer) in names:
                    names[id(layer)].append(name)
    return names


def _once(layers: list[Any]) -> list[Any]:
    return list({id(layer): layer for layer in layers}.values())
