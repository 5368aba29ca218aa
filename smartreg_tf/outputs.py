"""Which of a Keras model's outputs are compared, by which divergence l_s, and as what logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

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
_CLASSES = {"categorical_crossentropy", "sparse_categorical_crossentropy", "categorical_focal_crossentropy"}
_LABELS = {"binary_crossentropy", "binary_focal_crossentropy"}
_VALUES = {
    "mean_squared_error",
    "mean_absolute_error",
    "mean_absolute_percentage_error",
    "mean_squared_logarithmic_error",
    "huber",
    "log_cosh",
}


class Head(NamedTuple):
    """One output that is compared.

    Attributes:
        place: which it is among the flattened outputs.
        kind: one of `KINDS`.
        weight: its `loss_weights`.
        by_weights: whether its loss divides by the sum of the sample weights, not by their number.
        path: where it is in the structure of the losses, and so of the sample weights.
    """

    place: int
    kind: str
    weight: float = 1.0
    by_weights: bool = False
    path: tuple[Any, ...] = ()

    @property
    def divergence(self) -> str:
        """The name of l_s."""
        return KINDS[self.kind]

    def logits(self, outputs: Any) -> Tensor:
        """This head's logits (or values), (n, ..., C), in float32 or wider.

        Probabilities have lost digits: where the softmax or sigmoid layer left its logits, they are taken.
        """
        z = keras.tree.flatten(outputs)[self.place]
        if self.kind.endswith("probabilities"):
            kept = getattr(z, "_keras_logits", None)
            z = _log_probabilities(z, self.kind) if kept is None or kept.shape.rank != z.shape.rank else kept
        z = floating(z)
        return z[:, None] if z.shape.rank == 1 else z

    def unnormalised(self, outputs: Any) -> Tensor:
        """Whether what should be probabilities are none."""
        z = keras.tree.flatten(outputs)[self.place]
        if not self.kind.endswith("probabilities") or getattr(z, "_keras_logits", None) is not None:
            return tf.constant(False)
        p = floating(z)
        outside = tf.reduce_any((p < -1e-3) | (p > 1 + 1e-3))
        if self.kind == "label_probabilities":
            return outside
        # 2% is more than the rounding of bfloat16; a NaN is another fault
        return outside | tf.reduce_any(tf.abs(tf.reduce_sum(p, -1) - 1) > 0.02)

    def mask(self, outputs: Any, masks: Sequence[Tensor | None]) -> Tensor | None:
        """Which positions of this head count: Keras' mask on the output, else the first of the site's that fits."""
        z = keras.tree.flatten(outputs)[self.place]
        found = [output_mask(z, mask) for mask in (getattr(z, "_keras_mask", None), *masks)]
        return next((mask for mask in found if mask is not None), None)

    def mean(self, a: Tensor, b: Tensor, mask: Tensor | None, sample_weight: Any) -> Tensor:
        """1/n sum_i w_i l_s(a_i, b_i), w as the loss takes it: one an example, or one a position."""
        value = DIVERGENCES[self.divergence].value
        weight = self._sample_weight(sample_weight, a.dtype)
        if weight is None:
            return mean_examples(value(a, b, mask))
        if weight.shape.rank == 1:
            mean = mean_examples(value(a, b, mask), weight)
        else:
            # every position as an example of its own, weighed by its share in the mean and by its own weight
            share = position_weights(a, mask)[..., 0] * weight
            rows = [tf.reshape(z, [-1, tf.shape(z)[-1]]) for z in (a, b)]
            each = value(*rows, None if mask is None else tf.reshape(as_mask(mask), [-1]))
            positions = tf.reshape(each, tf.shape(share))
            mean = mean_examples(tf.reduce_sum(positions * share, axis=list(range(1, share.shape.rank))))
        if self.by_weights:
            mean = tf.math.divide_no_nan(mean * tf.cast(tf.size(weight), mean.dtype), tf.reduce_sum(weight))
        return mean

    def _sample_weight(self, sample_weight: Any, dtype: Any) -> Tensor | None:
        for step in self.path if keras.tree.is_nested(sample_weight) else ():
            try:
                sample_weight = sample_weight[step]
            except (KeyError, IndexError, TypeError):
                break
        flat = [weight for weight in keras.tree.flatten(sample_weight) if weight is not None]
        if not flat:
            return None
        if len(flat) > 1 and self.place >= len(flat):
            raise ValueError(f"SMART: {len(flat)} sample weights, but none for output {self.place}")
        weight = tf.cast(flat[self.place if len(flat) > 1 else 0], dtype)
        while weight.shape.rank > 1 and weight.shape[-1] == 1:
            weight = weight[..., 0]
        return weight


def find_heads(model: Any, passed: Any, outputs: Outputs | None) -> list[Head]:
    """The heads of a model's outputs, as `outputs` says, else as the compiled losses do.

    Args:
        passed: what the model returned.
        outputs: one of `KINDS` for all outputs, or a list or a dict of them (None, and a name that the dict lacks,
            leaves an output out).

    Raises:
        ValueError: a loss from which no kind follows, or `outputs` that does not fit the model.

    Source: paper, section 3.1 (l_s for classification and for regression).

    Example:
        >>> find_heads(None, tf.zeros([2, 3]), "logits")
        [Head(place=0, kind='logits', weight=1.0, by_weights=False, path=())]
    """
    heads = _compiled_heads(model, passed) if outputs is None else _given_heads(model, passed, outputs)
    if not heads:
        raise ValueError("SMART: no output has a loss to compare it by; say outputs=, one of " + ", ".join(KINDS))
    for head in heads:
        z = keras.tree.flatten(passed)[head.place]
        if head.divergence == "symmetric_kl" and (z.shape.rank < 2 or z.shape[-1] == 1):
            raise ValueError(
                f"SMART: an output of shape {z.shape} has one value an example, of which symmetric_kl is always 0. Say "
                "outputs='label_logits' or 'label_probabilities' (one class against the rest), or 'regression'."
            )
    return heads


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
    weighed = {place: (weight, by_weights, path) for place, _, weight, by_weights, path in _losses(model, passed)}
    return [
        Head(place, kind, *weighed.get(place, (1.0, False, ()))) for place, kind in enumerate(kinds) if kind is not None
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
    return [
        Head(place, _kind(loss), weight, by_weights, path)
        for place, loss, weight, by_weights, path in _losses(model, passed)
    ]


def _losses(model: Any, passed: Any) -> list[tuple[int, Any, float, bool, tuple[Any, ...]]]:
    """Of each compiled loss: the place of its output, itself, its weight, whether it divides by weights, its path."""
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or not compiled._flat_losses:
        return []
    places = keras.tree.pack_sequence_as(compiled._y_pred_build_structure, list(range(len(keras.tree.flatten(passed)))))
    found = []
    for path, loss, weight, _ in compiled._flat_losses:
        place = places
        for step in path:
            place = place[step]
        by_weights = loss.reduction == "mean_with_sample_weight"
        found.append((place, loss, 1.0 if weight is None else float(weight), by_weights, tuple(path)))
    return found


def _kind(loss: Any) -> str:
    function = getattr(loss, "fn", None)
    name = getattr(function, "__name__", type(loss).__name__)
    if str(getattr(function, "__module__", "")).startswith("keras."):
        logits = "logits" if loss._fn_kwargs.get("from_logits", False) else "probabilities"
        if name in _CLASSES:
            return logits
        if name in _LABELS:
            return "label_" + logits
        if name in _VALUES:
            return "regression"
        if name == "kl_divergence":
            return "probabilities"
    raise ValueError(
        f"SMART: the loss {name!r} does not say what the outputs are; say outputs=, one of {', '.join(KINDS)} (or a "
        "list or dict of them, one for each output)"
    )


def _log_probabilities(p: Tensor, kind: str) -> Tensor:
    p = floating(p)
    low = 1e-37 if p.dtype == tf.float32 else 1e-300
    if kind == "probabilities":
        return tf.math.log(tf.maximum(p, low))
    ulp = 2.0**-24 if p.dtype == tf.float32 else 2.0**-53
    p = tf.clip_by_value(p, low, 1 - ulp)
    return tf.math.log(p) - tf.math.log1p(-p)
