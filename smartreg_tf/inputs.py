"""Find what a Keras model is given: its inputs by name and as it reads them, and the padding mask among them."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from smartreg.config import SMARTWarning
from smartreg_tf.divergences import as_mask

Tensor = Any

PADDING_MASKS = ("padding_mask", "attention_mask")
_LABEL = re.compile(r"(^|_)(y|y_true|labels?|targets?|sample_weights?)$", re.IGNORECASE)


def declared(model: Any) -> list[Any]:
    """List the flattened `keras.Input`s of a model, or of the one model that it wraps; none if it has none."""
    inputs = getattr(model, "inputs", None)
    if inputs is None and len(model.layers) == 1:
        inputs = getattr(model.layers[0], "inputs", None)
    return list(keras.tree.flatten(inputs or []))


def flat_inputs(model: Any, inputs: Any) -> list[tuple[str, Any]]:
    """List the flattened inputs by their keys in a dict, else by the names of their `keras.Input`s, else by "".

    They are as the model reads them: in the dtype of the `keras.Input`, and with one column if that has one.
    """
    given = keras.tree.flatten_with_path(inputs)
    known = declared(model)
    names = [path[-1] if path and isinstance(path[-1], str) else None for path, _ in given]
    if len(known) == len(given):
        names = [own.name if name is None else name for own, name in zip(known, names, strict=True)]
    by_name = {own.name: own for own in known}
    return [(name or "", _as_declared(x, by_name.get(name))) for name, (_, x) in zip(names, given, strict=True)]


def _as_declared(x: Any, own: Any) -> Any:
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        x = tf.convert_to_tensor(x)
    if own is None or not tf.is_tensor(x) or tf.string in (x.dtype, tf.as_dtype(own.dtype)):
        return x
    x = tf.cast(x, own.dtype)
    return x[:, None] if x.shape.rank == 1 and len(own.shape) == 2 and own.shape[1] == 1 else x


def is_label(name: str) -> bool:
    """Tell whether an input is a label or a sample weight by its name, as in models that take them for add_loss."""
    return _LABEL.search(name) is not None


def called(model: Any, x: Any, training: bool | None) -> Any:
    """Call a model, with `training` if its `call` takes it."""
    takes = "training" in inspect.signature(model.call).parameters
    return model(x, training=training) if takes else model(x)


def by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a call of the model was given, by the names of its inputs and of its arguments."""
    names = list(inspect.signature(model.call).parameters)
    inputs = {name: x for name, x in flat_inputs(model, args[0]) if name} if args else {}
    return {**inputs, **dict(zip(names, args, strict=False)), **kwargs}


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, Tensor]:
    """Return the number of examples by the first input: a number if the shape has it, else None; and a tensor."""
    for x in keras.tree.flatten((args, kwargs)):
        if isinstance(x, tf.RaggedTensor):
            return x.shape[0], x.nrows(tf.int32)
        if isinstance(x, tf.SparseTensor):
            return x.shape[0], tf.cast(x.dense_shape[0], tf.int32)
        if (isinstance(x, np.ndarray) or tf.is_tensor(x)) and len(x.shape) > 0:
            return x.shape[0], tf.shape(x)[0]
    return None, tf.constant(0)


def dense(x: Tensor) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Return x with all its entries, which of its positions it has (None: all), and the way back to x's own type.

    Example:
        >>> values, mask, back = dense(tf.ragged.constant([[[1.0], [2.0]], [[3.0]]], ragged_rank=1))
        >>> values.shape, mask.numpy().tolist(), back(values).row_lengths().numpy().tolist()
        (TensorShape([2, 2, 1]), [[True, True], [True, False]], [2, 1])
    """
    if isinstance(x, tf.RaggedTensor):
        there = x.with_flat_values(tf.ones(tf.shape(x.flat_values)[:1], tf.bool)).to_tensor(False)
        lengths = x.nested_row_lengths()
        return x.to_tensor(), there, lambda moved: tf.RaggedTensor.from_tensor(moved, lengths=lengths)
    if isinstance(x, tf.SparseTensor):
        values = tf.scatter_nd(x.indices, x.values, x.dense_shape)
        values.set_shape(x.shape)
        return values, None, _all_entries
    return x, None, lambda moved: moved


def _all_entries(x: Tensor) -> Tensor:
    """Make a SparseTensor of every entry. Zeros are perturbed too, and have a gradient."""
    sizes = [tf.shape(x)[i] if size is None else size for i, size in enumerate(x.shape)]
    indices = tf.where(tf.ones_like(x, tf.bool))
    return tf.SparseTensor(indices, tf.reshape(x, [-1]), tf.cast(tf.stack(sizes), tf.int64))


def padding_mask(given: dict[str, Any], x: Tensor) -> Tensor | None:
    """Return which positions of x, (n, ..., d), are real by the model's padding mask input; None if it has none.

    True or 1 is real, as in Keras. A float mask without a positive entry is one that is added to scores: 0 is real. A
    mask is true at the padding if the vectors there are all equal, and the others are not. Axes of queries are reduced.
    A `SMARTWarning` says if the mask does not fit the positions of x.
    """
    for name in PADDING_MASKS:
        mask = given.get(name)
        if mask is None or x.shape.rank < 3:
            continue
        mask = tf.convert_to_tensor(mask)
        real = as_mask(mask)
        if mask.dtype.is_floating:
            real = tf.where(tf.reduce_max(mask) > 0, real, ~real)
        if not real.shape.is_compatible_with(x.shape[:-1]) and x.shape.rank == 3 and real.shape.rank > 2:
            real = tf.reduce_any(real, list(range(1, real.shape.rank - 1)))
        if real.shape.is_compatible_with(x.shape[:-1]):
            return tf.where(_varies(x, ~real) & ~_varies(x, real), ~real, real)
        warnings.warn(
            f"SMART: the input {name!r} of shape {mask.shape} does not fit the positions {x.shape[:-1]} that are "
            "perturbed, so padding is perturbed too. Give a mask of that shape, or say Embedding(..., mask_zero=True).",
            SMARTWarning,
            stacklevel=2,
        )
    return None


def _varies(x: Tensor, positions: Tensor) -> Tensor:
    """Tell whether there are different vectors among those of x at the positions."""
    axes = list(range(x.shape.rank - 1))
    highest = tf.reduce_max(tf.where(positions[..., None], x, x.dtype.min), axes)
    lowest = tf.reduce_min(tf.where(positions[..., None], x, x.dtype.max), axes)
    return tf.reduce_any(highest > lowest)
