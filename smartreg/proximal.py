"""The Bregman proximal point term and its momentum (paper: section 3.2, equations 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartreg.config import SMARTConfig
from smartreg.divergences import DIVERGENCES, check_divergence
from smartreg.perturbation import output_mask

Array = NDArray[Any]


def momentum(step: int, config: SMARTConfig) -> float:
    """Return beta at an optimiser step: by `memory`, or the paper's two values.

    By `memory`: beta = 1 - S / min(t + S, memory T) at step t of T, and at least 1/2, S = `proximal_steps`: theta~ is
    the mean of what it saw until it has seen memory T steps, then a moving average over so many (ours). Else beta is
    `beta_early` for the first `early_fraction` of T, then `beta_late` (the paper's).

    Args:
        step: optimiser steps taken so far, this one included: 1, 2, ...

    Raises:
        ValueError: there is a theta~, beta changes and `config.total_steps` is None.

    Source: paper, section 4.1.

    Example:
        >>> config = SMARTConfig(beta_early=0.99, beta_late=0.999, total_steps=100)
        >>> momentum(10, config), momentum(11, config)
        (0.99, 0.999)
        >>> config = SMARTConfig(memory=0.1, total_steps=100)
        >>> momentum(1, config), momentum(4, config), momentum(50, config)
        (0.5, 0.8, 0.9)
    """
    if config.beta_early is None or config.beta_late is None:
        # at least 2 moves: if theta~ were theta itself, D_Breg would be 0
        seen = max(2 * config.proximal_steps, min(step + config.proximal_steps, memory_steps(config)))
        return (seen - config.proximal_steps) / seen
    return config.beta_early if step <= last_early_step(config) else config.beta_late


def memory_steps(config: SMARTConfig) -> float:
    """Return the number of optimiser steps that theta~ remembers: `memory` times `total_steps`.

    Raises:
        ValueError: as `momentum`.

    Example:
        >>> memory_steps(SMARTConfig(memory=0.25, total_steps=100))
        25.0
    """
    config.check_total_steps("momentum")
    return config.memory * (config.total_steps or 0)


def last_early_step(config: SMARTConfig) -> float:
    """Return the last optimiser step at which beta is `beta_early`: `early_fraction` of `total_steps`.

    Raises:
        ValueError: as `momentum`.

    Example:
        >>> last_early_step(SMARTConfig.paper(early_fraction=0.29, total_steps=100))
        29.0
    """
    if config.early_fraction in (0, 1):  # of any number of steps
        return math.inf if config.early_fraction == 1 else 0.0
    config.check_total_steps("momentum")
    # round: 0.29 * 100 is 28.999999999999996, and step 29 is still early
    return round(config.early_fraction * (config.total_steps or 0), 9)


def moves(step: Any, config: SMARTConfig) -> Any:
    """Tell whether theta~ moves after this optimiser step: after every S of them, S = `proximal_steps`.

    Args:
        step: optimiser steps taken so far, this one included; a number or a tensor of any backend.

    Source: paper, Algorithm 1, line 12: the end of the loop over s.

    Example:
        >>> [moves(step, SMARTConfig(proximal_steps=2, mu=0)) for step in (1, 2, 3, 4)]
        [False, True, False, True]
    """
    return step % config.proximal_steps == 0


def last_move(step: Any, config: SMARTConfig) -> Any:
    """Return the last optimiser step, up to this one, after which theta~ moved; 0 before the first.

    Args:
        step: as `moves`.

    Example:
        >>> [last_move(step, SMARTConfig(proximal_steps=2, mu=0)) for step in (1, 2, 3, 4)]
        [0, 2, 2, 4]
    """
    return step - step % config.proximal_steps


def ema_update(teacher: Mapping[str, Array], theta: Mapping[str, Array], beta: float) -> dict[str, Array]:
    """Return the new theta~ <- (1 - beta) theta + beta theta~, in float32 or wider.

    Source: paper, Algorithm 1, line 14.

    Example:
        >>> ema_update({"w": np.zeros(1)}, {"w": np.ones(1)}, 0.75)
        {'w': array([0.25])}
    """
    moved = {}
    for name, average in teacher.items():
        wide = np.result_type(average, np.float32)
        old, new = average.astype(wide), theta[name].astype(wide)
        # each form is exact at its end of [0, 1], and if theta = theta~, for which D_Breg must be exactly 0
        moved[name] = old + (1 - beta) * (new - old) if beta > 0.5 else new - beta * (new - old)
    return moved


def bregman_divergence(
    outputs: ArrayLike,
    teacher_outputs: ArrayLike,
    divergence: str = "symmetric_kl",
    mask: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
) -> float:
    """Return D_Breg(theta, theta~) = 1/n sum_i w_i l_s( f(x_i; theta), f(x_i; theta~) ).

    Args:
        outputs, teacher_outputs: (n, ..., C). mask: of the position axis. sample_weight: w_i, (n,), 1 by default.

    Raises:
        ValueError: no divergence of that name, weights or a mask of another shape.

    Source: paper, equation 3.

    Example:
        >>> bregman_divergence([[1.0], [2.0]], [[1.0], [0.0]], "squared_error")
        2.0
    """
    check_divergence("bregman_divergence", divergence)
    positions = output_mask(np.asarray(outputs), mask)
    return mean_examples(DIVERGENCES[divergence].value(outputs, teacher_outputs, positions), sample_weight)


def mean_examples(values: Array, sample_weight: ArrayLike | None = None) -> float:
    """Return 1/n sum_i w_i v_i, the mean over the batch that R_s and D_Breg take.

    Example:
        >>> mean_examples(np.array([1.0, 3.0]), [1.0, 0.0])
        0.5
    """
    if sample_weight is not None:
        weight = np.asarray(sample_weight)
        if weight.shape != values.shape:
            raise ValueError(f"sample_weight must have one weight an example, {values.shape}, got {weight.shape}")
        values = values * weight
    return float(np.mean(values))
