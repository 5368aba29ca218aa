"""The divergences in exact-enough arithmetic: mpmath with 50 digits left after every cancellation."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np


def symmetric_kl(a: np.ndarray, b: np.ndarray) -> tuple[Any, list[Any], list[Any]]:
    """J, dJ/da and dJ/db of two rows of logits; classes that are -inf in both are left out (their gradient is 0)."""
    kept = ~(np.isneginf(a) & np.isneginf(b))
    with mpmath.workdps(_digits(a)):
        log_p, log_q = (_log_softmax(row[kept]) for row in (a, b))
        p, q = [mpmath.exp(v) for v in log_p], [mpmath.exp(v) for v in log_q]
        r = [u - v for u, v in zip(log_p, log_q, strict=True)]
        j = mpmath.fsum((u - v) * w for u, v, w in zip(p, q, r, strict=True))
        mean_p, mean_q = (mpmath.fsum(u * w for u, w in zip(weights, r, strict=True)) for weights in (p, q))
        grad_a = [u * (w - mean_p) + (u - v) for u, v, w in zip(p, q, r, strict=True)]
        grad_b = [v * (mean_q - w) + (v - u) for u, v, w in zip(p, q, r, strict=True)]
        return j, _filled(grad_a, kept), _filled(grad_b, kept)


def bernoulli_symmetric_kl(a: np.ndarray, b: np.ndarray) -> tuple[Any, list[Any], list[Any]]:
    with mpmath.workdps(_digits(a)):
        a, b = ([mpmath.mpf(float(v)) for v in row] for row in (a, b))
        p, q = ([1 / (1 + mpmath.exp(-v)) for v in row] for row in (a, b))
        j = mpmath.fsum((u - v) * (s - t) for u, v, s, t in zip(p, q, a, b, strict=True))
        grad_a = [u * (1 - u) * (s - t) + u - v for u, v, s, t in zip(p, q, a, b, strict=True)]
        grad_b = [-v * (1 - v) * (s - t) + v - u for u, v, s, t in zip(p, q, a, b, strict=True)]
        return j, grad_a, grad_b


def relative_error(got: Any, exact: list[Any], dtype: Any) -> float:
    """The largest error against the largest exact entry. Below tiny / eps a dtype has no full precision left."""
    floor = float(np.finfo(dtype).tiny / np.finfo(dtype).eps)
    worst = max(abs(mpmath.mpf(float(g)) - e) for g, e in zip(got, exact, strict=True))
    return float(worst / max(max(map(abs, exact)), floor))


def _digits(a: np.ndarray) -> int:
    return 50 + (350 if a.dtype == np.float64 else 60)


def _log_softmax(row: np.ndarray) -> list[Any]:
    values = [mpmath.mpf(float(v)) for v in row]
    top = max(values)
    log_sum = top + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in values))
    return [v - log_sum for v in values]


def _filled(values: list[Any], kept: np.ndarray) -> list[Any]:
    rest = iter(values)
    return [next(rest) if k else mpmath.mpf(0) for k in kept]
