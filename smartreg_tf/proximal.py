"""Compute the Bregman proximal point term and its momentum in TensorFlow (paper: section 3.2, equations 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from smartreg.config import SMARTConfig
from smartreg.divergences import check_divergence
from smartreg.proximal import last_early_step, memory_steps
from smartreg_tf.divergences import DIVERGENCES
from smartreg_tf.perturbation import output_mask

Tensor = Any


def momentum(step: Tensor, config: SMARTConfig) -> Tensor:
    """Return beta at an optimiser step: by `memory`, 1 - S / min(t + S, memory T), or the paper's two values.

    Args:
        step: optimiser steps taken so far, this one included: 1, 2, ...; a tensor, or a number.

    Raises:
        ValueError: there is a theta~, beta changes and `config.total_steps` is None.

    Source: paper, section 4.1.

    Example:
        >>> config = SMARTConfig(memory=0.1, total_steps=100)
        >>> [round(float(momentum(step, config)), 3) for step in (1, 4, 50)]
        [0.5, 0.8, 0.9]
    """
    if config.beta_early is None or config.beta_late is None:
        steps = tf.constant(config.proximal_steps, tf.float64)
        seen = tf.maximum(2 * steps, tf.minimum(tf.cast(step, tf.float64) + steps, memory_steps(config)))
        return (seen - steps) / seen
    early = tf.cast(step, tf.float64) <= last_early_step(config)
    return tf.where(early, tf.constant(config.beta_early, tf.float64), config.beta_late)


def ema_update(teacher: Mapping[str, Tensor], theta: Mapping[str, Tensor], beta: Tensor) -> dict[str, Tensor]:
    """Return the new theta~ <- (1 - beta) theta + beta theta~, kept in float32 or wider.

    Args:
        beta: a number, or a float64 tensor as `momentum` gives it.

    Source: paper, Algorithm 1, line 14.

    Example:
        >>> ema_update({"w": tf.constant(0.0)}, {"w": tf.constant(1.0)}, 0.75)["w"].numpy()
        np.float32(0.25)
    """
    # 1 - beta in float64: in float32, 1 - 0.999 is off by 1e-5. A step from theta~ leaves equal weights equal.
    beta = tf.convert_to_tensor(beta, tf.float64)

    averages = dict(teacher)
    weights = {name: tf.cast(theta[name], average.dtype) for name, average in averages.items()}

    def moved() -> dict[str, Tensor]:
        return {
            name: average + tf.cast(1 - beta, average.dtype) * (weights[name] - average)
            for name, average in averages.items()
        }

    # a tf.where of each would read and write all weights once more
    return dict(tf.cond(beta == 0, lambda: weights, moved))


def bregman_divergence(
    outputs: Tensor,
    teacher_outputs: Tensor,
    divergence: str = "symmetric_kl",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return D_Breg(theta, theta~) = 1/n sum_i w_i l_s( f(x_i; theta), f(x_i; theta~) ).

    No gradient flows through theta~.

    Args:
        outputs, teacher_outputs: (n, ..., C). mask: of the position axis. sample_weight: w_i, (n,), 1 by default.

    Raises:
        ValueError: no divergence of that name, weights or a mask of another shape.

    Source: paper, equation 3.

    Example:
        >>> float(bregman_divergence([[1.0], [2.0]], [[1.0], [0.0]], "squared_error"))
        2.0
    """
    check_divergence("bregman_divergence", divergence)
    outputs = tf.convert_to_tensor(outputs)
    positions = output_mask(outputs, mask)
    return mean_examples(DIVERGENCES[divergence](outputs, tf.stop_gradient(teacher_outputs), positions), sample_weight)


def mean_examples(values: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Return 1/n sum_i w_i v_i: the mean over the batch in R_s and D_Breg; 0 of an empty one (a replica may get none).

    Example:
        >>> float(mean_examples(tf.constant([1.0, 3.0]), [1.0, 0.0]))
        0.5
    """
    if sample_weight is not None:
        weight = tf.convert_to_tensor(sample_weight)
        if not weight.shape.is_compatible_with(values.shape):
            raise ValueError(
                f"sample_weight must have one weight an example, {tuple(values.shape)}, got {tuple(weight.shape)}"
            )
        values = values * tf.cast(weight, values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values), tf.cast(tf.size(values), values.dtype))
