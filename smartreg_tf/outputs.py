"""Decide l_s, by the outputs of a Keras model that are compared, and which of their positions count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg.config import SMARTWarning, one_each
from smartreg_tf import compat
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
_SAY = f"Say outputs=, one of {', '.join(KINDS)}"


class Head(NamedTuple):
    """Say how one output is compared.

    Attributes:
        place: its index among the flattened outputs.
        kind: one of `KINDS`.
        weight: its `loss_weights`.
        path: where its labels and sample weights are in their structures.
        axis: the axis of its classes, labels or values; None if each entry is an output of its own.
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
        """Name l_s."""
        return KINDS[self.kind]

    def arranged(self, z: Tensor) -> Tensor:
        """Return the output as (n, ..., C)."""
        if self.axis is None or z.shape.rank == 1:
            return z[..., None]
        last = z.shape.rank - 1
        axis = self.axis % z.shape.rank
        return z if axis == last else tf.transpose(z, [*(d for d in range(last + 1) if d != axis), axis])

    def logits(self, outputs: Any) -> Tensor:
        """Return this head's logits or values, (n, ..., C), in float32 or wider.

        A softmax or sigmoid layer keeps its logits, and they are taken. Keras' losses take them too: probabilities
        have lost digits, and `from_logits=True` may be wrong.
        """
        z, kept = self._kept(outputs)
        if kept is not None:
            return floating(self.arranged(kept))
        z = floating(self.arranged(z))
        low, ulp = (1e-37, 2.0**-24) if z.dtype == tf.float32 else (1e-300, 2.0**-53)
        if self.kind == "probabilities":
            return tf.math.log(tf.maximum(z, low))
        if self.kind == "label_probabilities":
            z = tf.clip_by_value(z, low, 1 - ulp)
            return tf.math.log(z) - tf.math.log1p(-z)
        return z

    def repeated(self, outputs: Any) -> Tensor:
        """Return what must be equal in a repeated pass; near 1, logits of probabilities are mostly rounding."""
        z, kept = self.logits(outputs), self._kept(outputs)[1]
        if kept is not None or not self.kind.endswith("probabilities"):
            return tf.stop_gradient(z)
        return tf.stop_gradient(tf.sigmoid(z) if self.kind.startswith("label") else tf.exp(z))

    def wrong_kind(self, outputs: Any) -> dict[str, Tensor]:
        """Tell whether probabilities are not ("unnormalised"), or logits are probabilities ("normalised")."""
        z, kept = self._kept(outputs)
        found = dict.fromkeys(("unnormalised", "normalised"), tf.constant(False))
        if kept is not None or self.kind in ("label_logits", "regression"):
            return found
        p = floating(self.arranged(z))
        total = tf.reduce_sum(p, -1)
        if self.kind == "logits":  # four rows of logits are not like this by chance
            one = tf.reduce_all(p >= 0) & tf.reduce_all(tf.abs(total - 1) < 1e-4) & (tf.size(total) >= 4)
            return found | {"normalised": one}
        outside = tf.reduce_any((p < -1e-3) | (p > 1 + 1e-3))
        if self.kind == "probabilities":  # 2% is more than the rounding of bfloat16; a NaN is another fault
            outside |= tf.reduce_any(tf.abs(total - 1) > 0.02)
        return found | {"unnormalised": outside}

    def labelled(self, y: Any) -> Tensor | None:
        """Tell which examples or positions the loss counts, by its `ignore_class`; None if it counts all."""
        label = None if self.ignore_class is None else self._own(y, "labels")
        return None if label is None else label != tf.cast(self.ignore_class, label.dtype)

    def examples(self, a: Tensor, y: Any) -> Tensor:
        """Return the n of `mean`, the number of examples that the loss counts."""
        labelled = self.labelled(y)
        if labelled is None:
            return tf.cast(tf.shape(a)[0], a.dtype)
        return tf.reduce_sum(_any_position(labelled, a.dtype))

    def positions(
        self, outputs: Any, masks: Sequence[Tensor | None], y: Any = None, sample_weight: Any = None
    ) -> Tensor | None:
        """Return which positions of this head count, or None for all.

        It is Keras' mask on the output, else the first of the site's masks that fits, less what the loss leaves out. A
        `SMARTWarning` says if the site has a mask, and it fits no position of the outputs.
        """
        z = keras.tree.flatten(outputs)[self.place]
        arranged = self.arranged(z)
        given = [mask for mask in (compat.mask_of(z), *masks) if mask is not None]
        found = [output_mask(arranged, mask) for mask in given]
        mask = next((mask for mask in found if mask is not None), None)
        labelled = output_mask(arranged, self.labelled(y))
        if labelled is not None:
            return labelled if mask is None else labelled & as_mask(mask)
        if given and mask is None and arranged.shape.rank > 2:
            weight = self._own(sample_weight, "sample weights")
            if weight is None or weight.shape.rank == 1:
                warnings.warn(
                    f"SMART: the mask of shape {given[0].shape} does not fit the positions {arranged.shape[:-1]} of "
                    "the outputs, so all of these count in R_s and D_Breg. If some are padding, say which: by a loss "
                    "with ignore_class, by a sample_weight for each position, or by a layer that keeps Keras' mask.",
                    SMARTWarning,
                    stacklevel=2,
                )
        return mask

    def mean(self, a: Tensor, b: Tensor, mask: Tensor | None, sample_weight: Any, y: Any = None) -> Tensor:
        """Return 1/n sum_i w_i l_s(a_i, b_i), with the w of `weights`."""
        value = DIVERGENCES[self.divergence]
        weight = self.weights(a, mask, sample_weight, y)
        if weight is None or weight.shape.rank == 1:
            return mean_examples(value(a, b, mask), weight)
        # every position as an example of its own, weighed by its share in the mean and by its own weight
        share = position_weights(a, mask)[..., 0] * weight
        rows = [tf.reshape(z, [-1, tf.shape(z)[-1]]) for z in (a, b)]
        each = value(*rows, None if mask is None else tf.reshape(as_mask(mask), [-1]))
        positions = tf.reshape(each, tf.shape(share))
        return mean_examples(tf.reduce_sum(positions * share, axis=_positions(share)))

    def weights(self, a: Tensor, mask: Tensor | None, sample_weight: Any, y: Any = None) -> Tensor | None:
        """Return the w_i of 1/n sum_i w_i l_s that reduce it as the loss is reduced; None if all are 1.

        There is one an example, or one a position if the sample weights are. They are the sample weights times:

        - n over the number of examples that the loss counts, and 0 for the others, if it has an `ignore_class`;
        - for a sum, n times the number of the example's positions, times the replicas: Keras divides only means by
          them;
        - one over the mean of the sample weights, if the loss divides by it.
        """
        weight = self._own(sample_weight, "sample weights")
        weight = None if weight is None else tf.cast(weight, a.dtype)
        labelled = self.labelled(y)
        by_weights = self.reduction == "mean_with_sample_weight" and weight is not None
        if labelled is None and self.reduction not in _SUMS and not by_weights:
            return weight
        n = tf.cast(tf.shape(a)[0], a.dtype)
        counted = tf.ones(tf.shape(a)[:-1], a.dtype) if mask is None else tf.cast(as_mask(mask), a.dtype)
        factor = tf.ones(tf.shape(a)[:1], a.dtype) if labelled is None else _any_position(labelled, a.dtype)
        if self.reduction in _SUMS:
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            factor *= n * replicas * tf.reduce_sum(counted, _positions(counted))
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
        """Return the weight of each example's l_s, (n,) or one number, in the sum that the ascent maximises."""
        weight = self.weights(a, mask, None, y)
        return tf.constant(self.weight, a.dtype) if weight is None else self.weight * weight

    def _kept(self, outputs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output itself, and the logits that a layer has kept of it."""
        z = keras.tree.flatten(outputs)[self.place]
        kept = None if self.kind == "regression" else compat.logits_of(z)
        return z, kept if kept is not None and kept.shape.rank == z.shape.rank else None

    def _own(self, given: Any, what: str) -> Tensor | None:
        """Return this head's labels or sample weights, without trailing axes of length 1; None if it has none."""
        for step in self.path if keras.tree.is_nested(given) else ():
            try:
                given = given[step]
            except (KeyError, IndexError, TypeError):
                break
        parts = [part for part in keras.tree.flatten(given) if part is not None]
        if not parts:
            return None
        if len(parts) > 1 and self.place >= len(parts):
            raise ValueError(f"SMART: expected {what} for output {self.place}, got {len(parts)} arrays of them")
        own = tf.convert_to_tensor(parts[self.place if len(parts) > 1 else 0])
        while own.shape.rank > 1 and own.shape[-1] == 1:
            own = own[..., 0]
        return own


def find_heads(
    model: Any, passed: Any, outputs: Outputs | None, masks: Sequence[Tensor | None] = (), y: Any = None
) -> list[Head]:
    """Decide l_s and how each output is compared, as `outputs` says, else as the compiled losses do.

    Args:
        passed: what the model returned.
        outputs: one of `KINDS` for all outputs, or a list or a dict of them. None, and a name that the dict lacks,
            leaves an output out.
        masks: of the site's positions, as far as there are any.
        y: the labels. If the loss does not say which axis has the classes, their shape does.

    Raises:
        ValueError: a loss from which no kind follows, or `outputs` that does not fit the model.

    Source: paper, section 3.1 (l_s for classification and for regression).

    Example:
        >>> find_heads(None, tf.zeros([2, 3]), "logits")
        [Head(place=0, kind='logits', weight=1.0, path=(), axis=-1, reduction='sum_over_batch_size', ignore_class=None)]
    """
    flat = keras.tree.flatten(passed)
    losses = compat.compiled_losses(model, passed)
    if outputs is not None:
        facts = {place: _facts(path, loss, weight) for place, path, loss, weight in losses}
        kinds = enumerate(_given_kinds(model, passed, outputs))
        heads = [Head(place, kind, **facts.get(place, {"axis": None})) for place, kind in kinds if kind is not None]
    elif losses:
        heads = [Head(place, _kind(loss), **_facts(path, loss, weight)) for place, path, loss, weight in losses]
    else:
        raise ValueError(f"SMART: the model was compiled without a loss, so nothing says what its outputs are. {_SAY}")
    if not heads:
        raise ValueError(f"SMART: no output has a loss to compare it by. {_SAY}")
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
    """Find the axis of classes: the loss's, else the one that sparse labels lack; None for one value a position."""
    shape = z.shape
    if head.divergence == "symmetric_kl":
        return _axis_of_labels(head, shape, y) if head.axis is None else head.axis
    axis = -1 if head.axis is None else head.axis
    if shape.rank != 2 or axis not in (-1, 1):
        return axis
    mask = compat.mask_of(z)
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
    label = head._own(y, "labels") if shape.rank > 2 else None
    if label is None:
        return -1
    sizes = list(shape)
    lacking = [axis for axis in range(1, len(sizes)) if sizes[1:axis] + sizes[axis + 1 :] == list(label.shape)[1:]]
    return lacking[0] if len(lacking) == 1 else -1


def _given_kinds(model: Any, passed: Any, outputs: Outputs) -> list[str | None]:
    """List the kind of each output that `outputs` says, None for those that it leaves out."""
    n = len(keras.tree.flatten(passed))
    if isinstance(outputs, Mapping):
        names = list(getattr(model, "output_names", None) or range(n))
        if isinstance(passed, Mapping):  # in the order in which they are flattened
            names = list(keras.tree.flatten({name: name for name in passed}))
        unknown = [name for name in outputs if name not in names]
        if unknown:
            raise ValueError(f"SMART: outputs= names {unknown[0]!r}; the model's outputs are {names}. Use these names")
        outputs = [outputs.get(name) for name in names]
    check_kinds("SMART", outputs)
    return one_each("outputs", outputs, n)


def check_kinds(call: str, outputs: Any) -> None:
    """Raise ValueError, naming `call`, if `outputs` says a kind that there is not.

    Example:
        >>> check_kinds("attach", ["logits", "logit"])
        Traceback (most recent call last):
        ...
        ValueError: attach: outputs= must be of logits, probabilities, label_logits, label_probabilities, regression, \
got 'logit'
    """
    several = outputs.values() if isinstance(outputs, Mapping) else outputs
    for kind in several if isinstance(outputs, (Mapping, list, tuple)) else [outputs]:
        if kind is not None and kind not in KINDS:
            raise ValueError(f"{call}: outputs= must be of {', '.join(KINDS)}, got {kind!r}")


def _facts(path: tuple[Any, ...], loss: Any, weight: float) -> dict[str, Any]:
    """Read the fields of a `Head`, but for the kind, off a compiled loss."""
    name, options = _function(loss)
    axis = options.get("axis", -1 if name else getattr(loss, "axis", None))
    return {
        "weight": weight,
        "path": path,
        "axis": axis if isinstance(axis, int) else None,  # a function of the user's own says none
        "reduction": loss.reduction,
        "ignore_class": options.get("ignore_class", getattr(loss, "ignore_class", None)),
    }


def _function(loss: Any) -> tuple[str | None, dict[str, Any]]:
    """Name Keras' own function that a loss calls, or None, and the options that it gives."""
    function: Any = getattr(loss, "fn", None)
    options = compat.loss_options(loss)
    while isinstance(function, partial):
        function, options = function.func, {**function.keywords, **options}
    return (getattr(function, "__name__", None) if compat.is_of_keras(function) else None), options


def _kind(loss: Any) -> str:
    """Decide the kind of an output, and so l_s, by its compiled loss."""
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
        f"SMART: the loss {called!r} does not say what the outputs are. {_SAY} (or a list or dict of them, one for "
        "each output)"
    )


def _positions(values: Tensor) -> list[int]:
    """List the axes of (n, ...) but the first."""
    return list(range(1, values.shape.rank))


def _any_position(labelled: Tensor, dtype: Any) -> Tensor:
    """Give 1 for each example of which the loss counts a position, else 0."""
    return tf.cast(tf.reduce_any(labelled, _positions(labelled)), dtype)
