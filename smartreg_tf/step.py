"""Algorithm 1 for one mini-batch, lines 6 to 11: delta, R_s, D_Breg and the penalty (paper, section 3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from smartreg.config import SMARTConfig
from smartreg.divergences import takes_logits, term_weights
from smartreg_tf.outputs import Head
from smartreg_tf.passes import Passes
from smartreg_tf.perturbation import ascend, floating
from smartreg_tf.teacher import Teacher

Tensor = Any
Noise = Callable[[Tensor, Tensor], Tensor]  # (step, like) -> standard normal of the shape of `like`
Draw = Callable[[Tensor, int], Tensor]  # (like, run of the site or head) -> standard normal of the shape of `like`
Key = Callable[[int], Tensor]  # the number of a pass at x + delta in its step -> the key of its own dropout masks


class Step(NamedTuple):
    """Hold what one mini-batch gives.

    Attributes:
        penalty: lambda_s R_s + mu D_Breg for the loss: 0 with gradient 0 if it is not finite.
        raw: the penalty, finite or not.
        terms: R_s and D_Breg, those that the configuration has.
        faults: whether a pass ("clean", "perturbed", "teacher"), and the penalty too, is not finite; whether the site
            is "shared" by the examples.
        passes, heads: what was run, and which outputs were compared.
        x, delta, mask: of each run of the site; x and delta are empty without R_s.
        outputs, perturbed, teacher, positions: of each head; perturbed and teacher are empty without their term.
    """

    penalty: Tensor
    raw: Tensor
    terms: dict[str, Tensor]
    faults: dict[str, Tensor]
    passes: Passes
    heads: list[Head]
    x: list[Tensor]
    delta: list[Tensor]
    mask: list[Tensor | None]
    outputs: list[Tensor]
    perturbed: list[Tensor]
    teacher: list[Tensor]
    positions: list[Tensor | None]


def smart_step(
    passes: Passes,
    heads: list[Head],
    y: Any,
    sample_weight: Any,
    teacher: Teacher,
    config: SMARTConfig,
    lambda_s: float,
    draw: Draw,
    key_of_masks: Key,
) -> Step:
    """Compute lambda_s R_s + mu D_Breg of one mini-batch.

    Args:
        y, sample_weight: what the loss gets.
        lambda_s: of this step: `config.smoothness_weight`.

    Raises:
        RuntimeError: the outputs do not depend on the site.

    Source: paper, equations 1 to 3 and Algorithm 1.
    """
    clean, masks = passes.clean, passes.masks
    lambda_s, mu = term_weights(config, lambda_s, [head.divergence for head in heads])
    gate = Gate()

    def read(outputs: Any) -> list[Tensor]:
        return [head.logits(outputs) for head in heads]

    with clean.tape or nullcontext():
        targets = read(clean.outputs)  # f(x; theta)
    positions = [head.positions(clean.outputs, masks, y, sample_weight) for head in heads]

    def mean(outputs: list[Tensor]) -> Tensor:  # 1/n sum_i w_i l_s(outputs_i, f(x_i; theta)), of all heads
        compared = zip(heads, outputs, targets, positions, strict=True)
        means = [head.weight * head.mean(a, gate(b), mask, sample_weight, y) for head, a, b, mask in compared]
        return tf.add_n([tf.cast(value, means[0].dtype) for value in means])

    x, delta, perturbed, taught = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    terms, finite, shared = dict[str, Tensor](), {"clean": all_finite(targets)}, tf.constant(False)
    penalty = tf.zeros([], targets[0].dtype)
    if lambda_s > 0:
        x = [call.x for call in clean.calls]
        scales = [head.scale(z, mask, y) for head, z, mask in zip(heads, targets, positions, strict=True)]
        keys = map(key_of_masks if config.dropout == "independent" else lambda number: None, itertools.count())
        delta = ascend(  # lines 6 to 10
            lambda points: read(passes.at(points, key=next(keys))),
            *(x, targets, config, _noise(draw, heads, x, targets, config), masks),
            *([head.divergence for head in heads], positions, scales, clean.tape, partial(_unreached, passes.site)),
        )
        # the clean pass's x, so that the layers below are back-propagated through once
        points = [shifted(gate(own), by) for own, by in zip(x, delta, strict=True)]
        gated = [(weight, gate(weight.value)) for weight in passes.site.model.trainable_variables]
        perturbed = read(passes.at(points, gated, next(keys)))  # f(x + delta; theta)
        terms["R_s"] = mean(perturbed)
        penalty += lambda_s * terms["R_s"]
        # if the model imputes NaN, its outputs are finite although delta is not
        moved = tf.reduce_all([tf.reduce_all(tf.math.is_finite(by)) for by in delta])
        shared = ~passes.fit
        gate.open = moved & ~shared
        finite["perturbed"] = all_finite(perturbed) & tf.math.is_finite(terms["R_s"]) & moved
    if mu > 0:  # after R_s: TensorFlow numbers random operations in this order
        taught = [tf.stop_gradient(z) for z in read(passes.again(teacher.pairs()))]  # f(x; theta~), theta~ of line 14
        terms["D_Breg"] = mean(taught)
        penalty += mu * terms["D_Breg"]
        finite["teacher"] = all_finite(taught) & tf.math.is_finite(terms["D_Breg"])
    gate.open &= tf.math.is_finite(penalty)
    faults = {name: ~good & ~gate.open for name, good in finite.items()}  # a masked position may be NaN
    masked = tf.where(gate.open, penalty, tf.zeros_like(penalty))  # line 11 is the optimiser's, on L + the penalty
    seen = (x, delta, masks, targets, perturbed, taught, positions)
    return Step(masked, penalty, terms, faults | {"shared": shared}, passes, heads, *seen)


def _noise(draw: Draw, heads: list[Head], xs: list[Tensor], targets: list[Tensor], config: SMARTConfig) -> list[Any]:
    """Draw what the start needs: nu of the shape of x, or a sign for each output in regression."""
    if not config.needs_clean_graph:
        return [draw(floating(x), run) for run, x in enumerate(xs)]
    return [
        None if takes_logits(head.divergence) else draw(z, i)
        for i, (head, z) in enumerate(zip(heads, targets, strict=True))
    ]


def _unreached(site: Any, gradients: list[Tensor | None]) -> None:
    """Raise, except for inputs that no output depends on, such as a label for add_loss."""
    if site.layers or all(g is None for g in gradients):
        raise RuntimeError(
            f"SMART: no gradient leads from the outputs to {site} (run {gradients.index(None) + 1} of "
            f"{len(gradients)}): perturbing it changes nothing. Name a layer that the outputs depend on with site=."
        )


class Gate:
    """Pass a tensor on; its gradient is 0 unless `open`, even if what comes back is NaN.

    A penalty that is not finite must not reach the weights. `open` is set after the forward and read by the backward.

    Example:
        >>> gate, x = Gate(), tf.constant(1.0)
        >>> with tf.GradientTape() as tape:
        ...     tape.watch(x)
        ...     y = gate(x) * np.nan
        >>> gate.open = tf.math.is_finite(y)
        >>> float(tape.gradient(y, x))
        0.0
    """

    def __init__(self) -> None:
        self.open: Tensor = tf.constant(True)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the same tensor."""

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def identity(tensor: Tensor) -> Any:
            def vjp(upstream: Tensor) -> Tensor:
                if isinstance(upstream, tf.IndexedSlices):
                    return tf.IndexedSlices(self._masked(upstream.values), upstream.indices, upstream.dense_shape)
                return self._masked(upstream)

            return tf.identity(tensor), vjp

        return identity(tensor)

    def _masked(self, gradient: Tensor) -> Tensor:
        return tf.where(self.open, gradient, tf.zeros_like(gradient))


def drawn(like: Tensor, run: int, step: Tensor, seed: int, noise: Noise | None = None) -> Tensor:
    """Draw standard normal noise of the shape of `like`, by `noise` or else from a stream of our own.

    Keras' and TensorFlow's streams stay as plain training leaves them.

    Args:
        run: of the site, or which head.
        step: the number of the steps with noise before this one, int64.

    Raises:
        ValueError: `noise` gives another shape.

    Example:
        >>> first, again, later = (drawn(tf.zeros([2]), 0, tf.constant(t, tf.int64), 0) for t in (0, 0, 1))
        >>> bool(tf.reduce_all(first == again)), bool(tf.reduce_any(first == later))
        (True, False)
    """
    if noise is not None:
        given = tf.convert_to_tensor(noise(step, like))
        if not given.shape.is_compatible_with(like.shape):
            raise ValueError(f"SMART: noise must give a tensor of shape {like.shape}, got {given.shape}")
        return tf.cast(given, like.dtype)
    return tf.random.stateless_normal(tf.shape(like), own_key(run, step, seed), dtype=like.dtype, alg="philox")


def own_key(number: int, step: Tensor, seed: int) -> Tensor:
    """Return a key of our own stream: from 0 up for noise, and below 0 for the dropout masks of a pass.

    Args:
        step: as `drawn` takes it.

    Example:
        >>> own_key(-1, tf.constant(0, tf.int64), 0).shape
        TensorShape([2])
    """
    context = tf.distribute.get_replica_context()
    replica = 0 if context is None else context.replica_id_in_sync_group
    key = tf.stack([tf.constant(seed, tf.int64), step])
    for part in (number, replica):
        key = tf.random.experimental.stateless_fold_in(key, tf.cast(part, tf.int64), alg="philox")
    return key


def shifted(x: Tensor, delta: Tensor) -> Tensor:
    """Return x + delta, rounded once to x's dtype.

    Example:
        >>> float(shifted(tf.constant(1.0, tf.bfloat16), tf.constant(1e-4)))
        1.0
    """
    return tf.cast(tf.cast(x, delta.dtype) + delta, x.dtype)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Tell whether there is no NaN and no infinity; -inf is a masked class.

    Example:
        >>> [bool(all_finite([tf.constant([1.0, value])])) for value in (np.nan, np.inf, -np.inf)]
        [False, False, True]
    """
    return tf.reduce_all([tf.reduce_all((tensor < tensor.dtype.max) | (tensor == -np.inf)) for tensor in tensors])
