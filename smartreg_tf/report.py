"""What a Keras model's SMART perturbs and compares, and why: what `describe()` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from smartreg.report import Choice, Description
from smartreg_tf.outputs import Head
from smartreg_tf.passes import half_precision_layers
from smartreg_tf.site import Site
from smartreg_tf.step import Step, shifted

Tensor = Any
_LATER = Choice("not known yet", "it is seen in the first training step")


class Found(NamedTuple):
    """What a training step found out.

    Attributes:
        xs: the shape of each run of the site.
        heads: the outputs that are compared.
        masks: the shape of the mask of each run of the site, or None. positions: of each head.
    """

    xs: Sequence[Any]
    heads: Sequence[Head]
    masks: Sequence[Any]
    positions: Sequence[Any]


def found_in(step: Step) -> Found:
    """Keep of a step what `describe` needs."""
    xs = [call.x.shape for call in step.passes.clean.calls]
    return Found(xs, step.heads, _shapes(step.mask), _shapes(step.positions))


def observe(step: Step) -> dict[str, Tensor]:
    """Give max|delta|, and the fraction of the entries with delta != 0 in which x + delta == x."""
    moved = lost = tf.zeros([], tf.float32)
    for x, delta in zip(step.x, step.delta, strict=True):
        changed = delta != 0
        moved += tf.reduce_sum(tf.cast(changed, tf.float32))
        lost += tf.reduce_sum(tf.cast(changed & (shifted(x, delta) == x), tf.float32))
    return {
        "vanished": tf.math.divide_no_nan(lost, moved),
        "max_delta": tf.reduce_max([tf.reduce_max(tf.abs(delta)) for delta in step.delta]),
    }


def wrong_kinds(heads: Sequence[Head], outputs: Any) -> dict[str, Tensor]:
    """Tell whether probabilities are none ("unnormalised"), or logits are probabilities ("normalised")."""
    return {
        "unnormalised": tf.reduce_any([head.unnormalised(outputs) for head in heads]),
        "normalised": tf.reduce_any([head.normalised(outputs) for head in heads]),
    }


def raw_outputs(heads: Sequence[Head], outputs: Any) -> list[Tensor]:
    """Give each head's outputs to be compared with themselves: of probabilities near 1 the logits are all rounding."""
    return [tf.stop_gradient(_raw(head, outputs)) for head in heads]


def _raw(head: Head, outputs: Any) -> Tensor:
    z = head.logits(outputs)
    if not head.kind.endswith("probabilities") or head.has_logits(outputs):
        return z
    return tf.sigmoid(z) if head.kind.startswith("label") else tf.exp(z)


def describe(model: Any, site: Site, options: Mapping[str, Any], found: Found | None) -> Description:
    """What was chosen and why, by the names that every backend has.

    Args:
        options: the arguments `outputs` and `float32`.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        >>> given = {"outputs": None, "float32": True}
        >>> describe(model, Site(model), given, None)["site"]
        Choice(value="the model's float inputs", why='no token Embedding or Masking layer makes one x an example')
    """
    description = Description(site=Choice(str(site), site.why))
    if found is None:
        description |= dict.fromkeys(("x", "outputs", "l_s", "class axis", "mask", "positions"), _LATER)
    else:
        description["x"] = Choice(_each(_shape(x) for x in found.xs), "the runs of the site in a training step")
        description["outputs"] = Choice(
            _each(_named(model, head) for head in found.heads), _why_outputs(options, found.heads)
        )
        description["l_s"] = Choice(
            _each(head.divergence for head in found.heads), "it follows from the kind of output"
        )
        description["class axis"] = Choice(
            _each(map(_axis, found.heads)), "the loss's axis, else the one that its labels lack, else the last"
        )
        description["mask"] = _masked(found.masks, "Keras' mask, or the padding mask among the inputs", "x has no mask")
        description["positions"] = _masked(
            found.positions, "the mask of the outputs, or that of x", "no mask fits the outputs"
        )
    description["precision"] = _precision(model, options["float32"])
    return Description(description)


def _why_outputs(options: Mapping[str, Any], heads: Sequence[Head]) -> str:
    """Who said it, and what R_s and D_Breg take over from the losses besides."""
    said = ["the compiled loss" if options["outputs"] is None else "outputs="]
    said += [f"reduction={head.reduction!r}" for head in heads if head.reduction != "sum_over_batch_size"]
    said += [f"ignore_class={head.ignore_class}" for head in heads if head.ignore_class is not None]
    return ", ".join(dict.fromkeys(said))


def _axis(head: Head) -> str:
    return "none: one value a token" if head.axis is None else str(head.axis)


def _named(model: Any, head: Head) -> str:
    names = getattr(model, "output_names", None) or []
    return f"{names[head.place]}: {head.kind}" if len(names) > 1 else head.kind


def _shapes(masks: Sequence[Tensor | None]) -> list[Any]:
    return [None if mask is None else tf.convert_to_tensor(mask).shape for mask in masks]


def _masked(masks: Sequence[Any], why: str, without: str) -> Choice:
    shapes = ["all" if mask is None else _shape(mask) for mask in masks]
    return Choice("all", without) if set(shapes) == {"all"} else Choice(_each(shapes), why)


def _precision(model: Any, float32: bool) -> Choice:
    half = half_precision_layers(model)
    if half and float32:
        return Choice("float32", f"the model computes in {half[0].compute_dtype}, which would lose R_s")
    return Choice(model.compute_dtype, "float32=False" if half else "the model's own")


def _shape(shape: Any) -> str:
    sizes = ["n" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def _each(values: Any) -> str:
    return ", ".join(values)
