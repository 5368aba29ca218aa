"""Which of a Keras model's outputs are compared, by which divergence l_s, and as what logits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg.config import SMARTWarning
from smartreg_tf.divergences import DIVERGENCES, as_mask, position_weights
from smartreg_tf.perturbation import floating, output_mask
from smartreg_tf.proximal import mean_examples

Tensor = Any
Outputs = str | Sequence[str | None] | Mapping[str, str | None]

KINDS = {
    "logits": "symmetric_kl",
    "probabilities": "symmetric_kl",
    "label_logits": "bernoulli_symmetric_kl",
    "label_probabilities": "bernoulli_symmetric_kl",
    "regression": "squared_error",
}
_CLASSES = {
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "categorical_focal_crossentropy",
    "categorical_generalized_cross_entropy",
}
_LABELS = {"binary_crossentropy", "binary_focal_crossentropy"}
_VALUES = {
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
}
_SUMS = ("sum", "none", None)  # the gradient of a loss that is not reduced is that of its sum


class Head(NamedTuple):
    """One output that is compared.

    Attributes:
        place: which it is among the flattened outputs.
        kind: one of `KINDS`.
        weight: its `loss_weights`.
        path: where it is in the structure of the losses, and so of the labels and the sample weights.
        axis: the output's axis of classes, labels or values; None where every entry is a position with one value.
        reduction: the loss's.
        ignore_class: the label of what the loss leaves out, or None.
    """

    place: int
    kind: str
    weight: float = 1.0
    path: tuple[Any, ...] = ()
    axis: int | None = -1
    reduction: str | None = "sum_over_batch_size"
    ignore_class: int | None = None

    @property
    def divergence(self) -> str:
        """The name of l_s."""
        return KINDS[self.kind]

    def logits(self, outputs: Any) -> Tensor:
        """This head's logits (or values), (n, ..., C), in float32 or wider.

        Where a softmax or sigmoid layer left its logits, they are taken, as Keras' losses do: probabilities have lost
        digits, and `from_logits=True` may be wrong.
        """
        z = keras.tree.flatten(outputs)[self.place]
        kept = self._kept_logits(z)
        if kept is not None:
            z = kept
        elif self.kind.endswith("probabilities"):
            return _log_probabilities(self._classes_last(z), self.kind)
        return floating(self._classes_last(z))

    def has_logits(self, outputs: Any) -> bool:
        """Whether a softmax or sigmoid layer left its logits."""
        return self._kept_logits(keras.tree.flatten(outputs)[self.place]) is not None

    def unnormalised(self, outputs: Any) -> Tensor:
        """Whether what should be probabilities are none."""
        z = keras.tree.flatten(outputs)[self.place]
        if not self.kind.endswith("probabilities") or self._kept_logits(z) is not None:
            return tf.constant(False)
        p = floating(self._classes_last(z))
        outside = tf.reduce_any((p < -1e-3) | (p > 1 + 1e-3))
        if self.kind == "label_probabilities":
            return outside
        # 2% is more than the rounding of bfloat16; a NaN is another fault
        return outside | tf.reduce_any(tf.abs(tf.reduce_sum(p, -1) - 1) > 0.02)

    def normalised(self, outputs: Any) -> Tensor:
        """Whether what should be logits are probabilities."""
        z = keras.tree.flatten(outputs)[self.place]
        if self.kind != "logits" or self._kept_logits(z) is not None:
            return tf.constant(False)
        p = floating(self._classes_last(z))
        total = tf.reduce_sum(p, -1)
        # four rows of logits are not like this by chance
        return tf.reduce_all(p >= 0) & tf.reduce_all(tf.abs(total - 1) < 1e-4) & (tf.size(total) >= 4)

    def labelled(self, y: Any) -> Tensor | None:
        """Which examples or positions the loss counts, by its `ignore_class`; None where it counts all."""
        if self.ignore_class is None or y is None:
            return None
        labels = keras.tree.flatten(self._own(y))
        label = tf.convert_to_tensor(labels[self.place if len(labels) > 1 else 0])
        return _without_last_1(label) != tf.cast(self.ignore_class, label.dtype)

    def examples(self, a: Tensor, y: Any) -> Tensor:
        """The n of `mean`: how many examples the loss counts."""
        labelled = self.labelled(y)
        if labelled is None:
            return tf.cast(tf.shape(a)[0], a.dtype)
        return tf.reduce_sum(tf.cast(tf.reduce_any(labelled, list(range(1, labelled.shape.rank))), a.dtype))

    def mask(
        self, outputs: Any, masks: Sequence[Tensor | None], y: Any = None, sample_weight: Any = None
    ) -> Tensor | None:
        """Which positions of this head count: Keras' mask on the output, else the first of the site's that fits; less
        what the loss leaves out.

        A `SMARTWarning` says so where the site has a mask that fits no position of the outputs.
        """
        z = keras.tree.flatten(outputs)[self.place]
        moved = self._classes_last(z)
        given = [mask for mask in (getattr(z, "_keras_mask", None), *masks) if mask is not None]
        found = [output_mask(moved, mask) for mask in given]
        mask = next((mask for mask in found if mask is not None), None)
        labelled = output_mask(moved, self.labelled(y))
        if labelled is not None:
            return labelled if mask is None else labelled & as_mask(mask)
        if given and mask is None and moved.shape.rank > 2:
            weight = self._sample_weight(sample_weight, moved.dtype)
            if weight is None or weight.shape.rank == 1:
                warnings.warn(
                    f"SMART: the mask of shape {given[0].shape} does not fit the positions {moved.shape[:-1]} of the "
                    "outputs, so all of these count in R_s and D_Breg. If some are padding, say which: by a loss with "
                    "ignore_class, by a sample_weight for each position, or by a layer that keeps Keras' mask.",
                    SMARTWarning,
                    stacklevel=2,
                )
        return mask

    def mean(self, a: Tensor, b: Tensor, mask: Tensor | None, sample_weight: Any, y: Any = None) -> Tensor:
        """1/n sum_i w_i l_s(a_i, b_i), w as the loss takes it: `weights`."""
        value = DIVERGENCES[self.divergence].value
        weight = self.weights(a, mask, sample_weight, y)
        if weight is None or weight.shape.rank == 1:
            return mean_examples(value(a, b, mask), weight)
        # every position as an example of its own, weighed by its share in the mean and by its own weight
        share = position_weights(a, mask)[..., 0] * weight
        rows = [tf.reshape(z, [-1, tf.shape(z)[-1]]) for z in (a, b)]
        each = value(*rows, None if mask is None else tf.reshape(as_mask(mask), [-1]))
        positions = tf.reshape(each, tf.shape(share))
        return mean_examples(tf.reduce_sum(positions * share, axis=list(range(1, share.shape.rank))))

    def weights(self, a: Tensor, mask: Tensor | None, sample_weight: Any, y: Any = None) -> Tensor | None:
        """The w_i of 1/n sum_i w_i l_s, one an example or one a position, by which it is reduced as the loss is.

        Sample weights weigh; examples that `ignore_class` leaves out are not among the n; a loss that is a sum gives
        every position the weight n times the number of its example's positions, and times the replicas, by which Keras
        divides means alone; one that divides by the sample weights has their mean divided out.
        """
        weight = self._sample_weight(sample_weight, a.dtype)
        labelled = self.labelled(y)
        by_weights = self.reduction == "mean_with_sample_weight" and weight is not None
        if labelled is None and self.reduction not in _SUMS and not by_weights:
            return weight
        n = tf.cast(tf.shape(a)[0], a.dtype)
        counted = tf.ones(tf.shape(a)[:-1], a.dtype) if mask is None else tf.cast(as_mask(mask), a.dtype)
        factor = tf.ones(tf.shape(a)[:1], a.dtype)
        if labelled is not None:
            factor = tf.cast(tf.reduce_any(labelled, list(range(1, labelled.shape.rank))), a.dtype)
        if self.reduction in _SUMS:
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            factor *= n * replicas * tf.reduce_sum(counted, list(range(1, counted.shape.rank)))
        elif labelled is not None:
            factor *= tf.math.divide_no_nan(n, self.examples(a, y))
        if weight is None:
            return factor
        by_position = weight.shape.rank > 1
        if by_weights:
            share = counted / tf.reduce_sum(counted) if by_position else factor / n
            factor = tf.math.divide_no_nan(factor, tf.reduce_sum(weight * share))
        return weight * (tf.reshape(factor, [-1] + [1] * (weight.shape.rank - 1)) if by_position else factor)

    def scale(self, a: Tensor, mask: Tensor | None, y: Any = None) -> Tensor:
        """What l_s of each example, (n,) or one number, weighs in the sum over the heads that the ascent climbs."""
        weight = self.weights(a, mask, None, y)
        return tf.constant(self.weight, a.dtype) if weight is None else self.weight * weight

    def _kept_logits(self, z: Tensor) -> Tensor | None:
        kept = getattr(z, "_keras_logits", None)
        return kept if self.kind != "regression" and kept is not None and kept.shape.rank == z.shape.rank else None

    def _classes_last(self, z: Tensor) -> Tensor:
        if z.shape.rank == 1:
            return z[:, None]
        if self.axis is None:
            return z[..., None]
        axis = self.axis % z.shape.rank
        order = [d for d in range(z.shape.rank) if d != axis]
        return z if axis == z.shape.rank - 1 else tf.transpose(z, [*order, axis])

    def _own(self, structure: Any) -> Any:
        """This head's part of the labels or the sample weights, as far as they have the losses' structure."""
        for step in self.path if keras.tree.is_nested(structure) else ():
            try:
                structure = structure[step]
            except (KeyError, IndexError, TypeError):
                break
        return structure

    def _sample_weight(self, sample_weight: Any, dtype: Any) -> Tensor | None:
        flat = [weight for weight in keras.tree.flatten(self._own(sample_weight)) if weight is not None]
        if not flat:
            return None
        if len(flat) > 1 and self.place >= len(flat):
            raise ValueError(f"SMART: {len(flat)} sample weights, but none for output {self.place}")
        return _without_last_1(tf.cast(flat[self.place if len(flat) > 1 else 0], dtype))


def find_heads(
    model: Any, passed: Any, outputs: Outputs | None, masks: Sequence[Tensor | None] = (), y: Any = None
) -> list[Head]:
    """The heads of a model's outputs, as `outputs` says, else as the compiled losses do.

    Args:
        passed: what the model returned.
        outputs: one of `KINDS` for all outputs, or a list or a dict of them (None, and a name that the dict lacks,
            leaves an output out).
        masks: of the site's positions, as far as there are any.
        y: the labels: where the loss does not say which axis has the classes, their shape does.

    Raises:
        ValueError: a loss from which no kind follows, or `outputs` that does not fit the model.

    Source: paper, section 3.1 (l_s for classification and for regression).

    Example:
        >>> find_heads(None, tf.zeros([2, 3]), "logits")
        [Head(place=0, kind='logits', weight=1.0, path=(), axis=-1, reduction='sum_over_batch_size', ignore_class=None)]
    """
    heads = _compiled_heads(model, passed) if outputs is None else _given_heads(model, passed, outputs)
    if not heads:
        raise ValueError("SMART: no output has a loss to compare it by; say outputs=, one of " + ", ".join(KINDS))
    flat = keras.tree.flatten(passed)
    heads = [head._replace(axis=_axis(model, head, flat[head.place], outputs is None, masks, y)) for head in heads]
    for head in heads:
        z = flat[head.place]
        if head.divergence == "symmetric_kl" and (z.shape.rank < 2 or z.shape[head.axis or -1] == 1):
            raise ValueError(
                f"SMART: an output of shape {z.shape} has one value an example, of which symmetric_kl is always 0. Say "
                "outputs='label_logits' or 'label_probabilities' (one class against the rest), or 'regression'."
            )
    return heads


def _axis(model: Any, head: Head, z: Tensor, compiled: bool, masks: Sequence[Tensor | None], y: Any) -> int | None:
    """The axis of classes: the loss's own, else the one that sparse labels lack; None for one value a position."""
    shape = z.shape
    if head.divergence == "symmetric_kl":
        return _axis_of_labels(head, shape, y) if head.axis is None else head.axis
    axis = -1 if head.axis is None else head.axis
    if shape.rank != 2 or axis not in (-1, 1):
        return axis
    mask = getattr(z, "_keras_mask", None)
    declared = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if mask is not None and mask.shape.rank == 2 and mask.shape.is_compatible_with(shape):
        return None
    if len(declared) > head.place and len(declared[head.place].shape) == 2 and declared[head.place].shape[1] is None:
        return None  # a number of labels does not vary
    fits = [m for m in masks if m is not None and m.shape.rank == 2 and m.shape.is_compatible_with(shape)]
    if fits and compiled and shape[1] != 1:
        raise ValueError(
            f"SMART: an output of shape {shape} may be {shape[1]} labels (or values) of an example, or one of each of "
            f"its {shape[1]} tokens, of which some are masked. If of tokens, let the model return shape "
            f"{(*shape, 1)}; if of examples, say outputs={head.kind!r}."
        )
    return axis


def _axis_of_labels(head: Head, shape: Any, y: Any) -> int:
    labels = [] if y is None else keras.tree.flatten(head._own(y))
    if not labels or shape.rank < 3:
        return -1
    label = _without_last_1(tf.convert_to_tensor(labels[head.place if len(labels) > 1 else 0])).shape
    sizes = list(shape)
    lacking = [axis for axis in range(1, len(sizes)) if sizes[1:axis] + sizes[axis + 1 :] == list(label)[1:]]
    return lacking[0] if len(lacking) == 1 else -1


def _given_heads(model: Any, passed: Any, outputs: Outputs) -> list[Head]:
    flat = keras.tree.flatten(passed)
    if isinstance(outputs, str):
        kinds: list[str | None] = [outputs] * len(flat)
    elif isinstance(outputs, Mapping):
        names = _names(model, passed)
        unknown = [name for name in outputs if name not in names]
        if unknown:
            raise ValueError(f"SMART: outputs= names {unknown[0]!r}; the model's outputs are {names}")
        kinds = [outputs.get(name) for name in names]
    else:
        kinds = list(outputs)
        if len(kinds) != len(flat):
            raise ValueError(f"SMART: outputs= has {len(kinds)} kinds, but the model has {len(flat)} outputs")
    for kind in kinds:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"SMART: outputs= must be of {', '.join(KINDS)}, got {kind!r}")
    found = {place: facts for place, _, facts in _losses(model, passed)}
    return [
        Head(place, kind, **found.get(place, {"axis": None})) for place, kind in enumerate(kinds) if kind is not None
    ]


def _names(model: Any, passed: Any) -> list[Any]:
    if isinstance(passed, Mapping):
        order = keras.tree.flatten({name: name for name in passed})
        return list(order)
    return list(getattr(model, "output_names", None) or range(len(keras.tree.flatten(passed))))


def _compiled_heads(model: Any, passed: Any) -> list[Head]:
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or not compiled._flat_losses:
        raise ValueError(
            "SMART: the model was compiled without a loss, so nothing says what its outputs are; say outputs=, one of "
            + ", ".join(KINDS)
        )
    return [Head(place, _kind(loss), **facts) for place, loss, facts in _losses(model, passed)]


def _losses(model: Any, passed: Any) -> list[tuple[int, Any, dict[str, Any]]]:
    """Of each compiled loss: the place of its output, itself, and what it says of the other fields of a `Head`."""
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or not compiled._flat_losses:
        return []
    places = keras.tree.pack_sequence_as(compiled._y_pred_build_structure, list(range(len(keras.tree.flatten(passed)))))
    found = []
    for path, loss, weight, _ in compiled._flat_losses:
        place = places
        for step in path:
            place = place[step]
        name, options = _function(loss)
        axis = options.get("axis", -1 if name else getattr(loss, "axis", None))
        facts = {
            "weight": 1.0 if weight is None else float(weight),
            "path": tuple(path),
            "axis": axis if isinstance(axis, int) else None,  # a function of the user's own says none
            "reduction": loss.reduction,
            "ignore_class": options.get("ignore_class", getattr(loss, "ignore_class", None)),
        }
        found.append((place, loss, facts))
    return found


def _function(loss: Any) -> tuple[str | None, dict[str, Any]]:
    """The name of Keras' own function that a loss calls, or None, and the options that it gives."""
    function: Any = getattr(loss, "fn", None)
    options = dict(getattr(loss, "_fn_kwargs", {}))
    while isinstance(function, partial):
        function, options = function.func, {**function.keywords, **options}
    own = str(getattr(function, "__module__", "")).startswith("keras.")
    return (getattr(function, "__name__", None) if own else None), options


def _kind(loss: Any) -> str:
    name, options = _function(loss)
    logits = "logits" if options.get("from_logits", False) else "probabilities"
    if name in _CLASSES:
        return logits
    if name in _LABELS:
        return "label_" + logits
    if name in _VALUES:
        return "regression"
    if name == "kl_divergence":
        return "probabilities"
    called = name or getattr(getattr(loss, "fn", None), "__name__", type(loss).__name__)
    raise ValueError(
        f"SMART: the loss {called!r} does not say what the outputs are; say outputs=, one of {', '.join(KINDS)} (or a "
        "list or dict of them, one for each output)"
    )


def _without_last_1(values: Tensor) -> Tensor:
    """Values an example or a position, without trailing axes of length 1."""
    while values.shape.rank > 1 and values.shape[-1] == 1:
        values = values[..., 0]
    return values


def _log_probabilities(p: Tensor, kind: str) -> Tensor:
    p = floating(p)
    low = 1e-37 if p.dtype == tf.float32 else 1e-300
    if kind == "probabilities":
        return tf.math.log(tf.maximum(p, low))
    ulp = 2.0**-24 if p.dtype == tf.float32 else 2.0**-53
    p = tf.clip_by_value(p, low, 1 - ulp)
    return tf.math.log(p) - tf.math.log1p(-p)
