"""The functions of the package in exact-enough arithmetic: mpmath, with 50 digits left after every cancellation.

Rows are what one softmax or one norm runs over, in float32 or float64, and are taken as they are.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import numpy as np


def symmetric_kl(a: np.ndarray, b: np.ndarray, digits: int | None = None) -> tuple[Any, list[Any], list[Any]]:
    """J, dJ/da and dJ/db of two rows of logits; classes that are -inf in both are left out (their gradient is 0)."""
    kept = ~(np.isneginf(a) & np.isneginf(b))
    with mpmath.workdps(digits or _digits(a)):
        log_p, log_q = (_log_softmax(row[kept]) for row in (a, b))
        p, q = [mpmath.exp(v) for v in log_p], [mpmath.exp(v) for v in log_q]
        r = [u - v for u, v in zip(log_p, log_q, strict=True)]
        j = mpmath.fsum((u - v) * w for u, v, w in zip(p, q, r, strict=True))
        mean_p, mean_q = (mpmath.fsum(u * w for u, w in zip(weights, r, strict=True)) for weights in (p, q))
        grad_a = [u * (w - mean_p) + (u - v) for u, v, w in zip(p, q, r, strict=True)]
        grad_b = [v * (mean_q - w) + (v - u) for u, v, w in zip(p, q, r, strict=True)]
        return j, _filled(grad_a, kept), _filled(grad_b, kept)


def bernoulli_symmetric_kl(a: np.ndarray, b: np.ndarray, digits: int | None = None) -> tuple[Any, list[Any], list[Any]]:
    """J, dJ/da and dJ/db of two rows of logits; labels that are -inf in both are left out (their gradient is 0)."""
    kept = ~(np.isneginf(a) & np.isneginf(b))
    with mpmath.workdps(digits or _digits(a)):
        a, b = _exact(a[kept]), _exact(b[kept])
        p, q = ([1 / (1 + mpmath.exp(-v)) for v in row] for row in (a, b))
        j = mpmath.fsum((u - v) * (s - t) for u, v, s, t in zip(p, q, a, b, strict=True))
        grad_a = [u * (1 - u) * (s - t) + u - v for u, v, s, t in zip(p, q, a, b, strict=True)]
        grad_b = [-v * (1 - v) * (s - t) + v - u for u, v, s, t in zip(p, q, a, b, strict=True)]
        return j, _filled(grad_a, kept), _filled(grad_b, kept)


def squared_error(a: np.ndarray, b: np.ndarray, digits: int | None = None) -> tuple[Any, list[Any], list[Any]]:
    with mpmath.workdps(digits or _digits(a)):
        d = [u - v for u, v in zip(_exact(a), _exact(b), strict=True)]
        return mpmath.fsum(v * v for v in d), [2 * v for v in d], [-2 * v for v in d]


def normalize(g: np.ndarray, norm: str, digits: int) -> list[Any]:
    """g / ||g||_p of one row, and 0 where g = 0."""
    with mpmath.workdps(digits):
        g = _exact(g)
        length = _length(g, norm)
        return [v / length if length else v for v in g]


def project(delta: np.ndarray, epsilon: float, norm: str, digits: int) -> list[Any]:
    """The nearest point of the ball ||delta||_p <= epsilon to one row."""
    with mpmath.workdps(digits):
        delta, epsilon = _exact(delta), mpmath.mpf(epsilon)
        length = _length(delta, norm)
        if length <= epsilon:
            return delta
        if norm == "inf":
            return [min(max(v, -epsilon), epsilon) for v in delta]
        if norm == "2":
            return [v * epsilon / length for v in delta]
        # sum max(|v| - tau, 0) = epsilon: tau is the largest of what the k largest entries ask for
        sizes = sorted((abs(v) for v in delta), reverse=True)
        tau = max((mpmath.fsum(sizes[:k]) - epsilon) / k for k in range(1, len(sizes) + 1))
        return [mpmath.sign(v) * max(abs(v) - tau, 0) for v in delta]


def rms(x: np.ndarray, digits: int) -> Any:
    """The root mean square of one row, 0 where it is empty."""
    with mpmath.workdps(digits):
        return mpmath.sqrt(mpmath.fsum(v * v for v in _exact(x)) / max(len(x), 1))


def ema_update(teacher: np.ndarray, theta: np.ndarray, beta: float, digits: int) -> list[Any]:
    with mpmath.workdps(digits):
        beta = mpmath.mpf(beta)
        return [(1 - beta) * new + beta * old for old, new in zip(_exact(teacher), _exact(theta), strict=True)]


def momentum(
    step: int,
    total_steps: int,
    beta_early: float = 0.99,
    beta_late: float = 0.999,
    early_fraction: float = 0.1,
    memory: float | None = None,
    proximal_steps: int = 1,
) -> Any:
    """`early_fraction` is the decimal number that was written: the float 0.29 is a little less than 29/100."""
    if memory is not None:
        seen = min(Fraction(step + proximal_steps), Fraction(memory) * total_steps)
        beta = 1 - proximal_steps / max(seen, Fraction(2 * proximal_steps))
        return mpmath.mpf(beta.numerator) / beta.denominator
    return beta_early if step <= Fraction(str(early_fraction)) * total_steps else beta_late


def relative_error(got: Any, exact: list[Any], dtype: Any) -> float:
    """The largest error against the largest exact entry. Below tiny / eps a dtype has no full precision left."""
    floor = float(np.finfo(dtype).tiny / np.finfo(dtype).eps)
    worst = max(abs(mpmath.mpf(float(g)) - e) for g, e in zip(got, exact, strict=True))
    return float(worst / max(max(map(abs, exact)), floor))


def _digits(a: np.ndarray) -> int:
    return 50 + (350 if a.dtype == np.float64 else 60)


def _exact(row: np.ndarray) -> list[Any]:
    return [mpmath.mpf(float(v)) for v in row]


def _length(row: list[Any], norm: str) -> Any:
    sizes = [abs(v) for v in row]
    if norm == "inf":
        return max(sizes)
    return mpmath.fsum(sizes) if norm == "1" else mpmath.sqrt(mpmath.fsum(v * v for v in sizes))


def _log_softmax(row: np.ndarray) -> list[Any]:
    values = _exact(row)
    top = max(values)
    log_sum = top + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in values))
    return [v - log_sum for v in values]


def _filled(values: list[Any], kept: np.ndarray) -> list[Any]:
    rest = iter(values)
    return [next(rest) if k else mpmath.mpf(0) for k in kept]
