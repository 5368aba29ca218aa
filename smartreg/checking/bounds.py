"""How large an error may be: the one table of bounds, the arithmetic of errors, and a row of a report."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

HALF = ("bfloat16", "float16")  # computed in float32
DTYPES = ("float32", "float64", *HALF)

# The largest error of each kind, in units in the last place of the type that is computed in.
# docs/math.md requires 1e-5 and 1e-12 of a divergence.
_ULPS = {"norm": 20.0, "projection": 30.0, "expansion": 100.0, "mean": 8.0, "average": 4.0, "schedule": 1.0}


def bound(kind: str, dtype: str, condition: float = 1.0) -> float:
    """Return the largest relative error that any backend may make in a problem of that condition.

    Example:
        >>> bound("divergence", "float64")
        1e-12
    """
    if kind == "divergence":
        return (1e-12 if dtype == "float64" else 1e-5) * condition
    return _ULPS[kind] * eps(dtype) * condition


class Row(NamedTuple):
    """One line of a report.

    Attributes:
        what: the function and the law, golden vector or intermediate.
        error, bound: of all inputs, the error that is the largest share of its bound, and that bound.
        at: the input of that error, in words.
        problem: why there is no error to show: the function is missing, raised, or returned something else.
    """

    what: str
    error: float
    bound: float
    at: str
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Tell whether the error is within the bound."""
        return not self.problem and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Return the error as a share of its bound; inf if the error is NaN."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.bound if self.bound > 0 else (math.inf if self.error > 0 else 0.0)

    @property
    def badness(self) -> tuple[bool, float, float]:
        """Return what orders rows, the worst last: a problem, the ratio, and the error if the bound is 0."""
        return bool(self.problem), self.ratio, math.inf if math.isnan(self.error) else self.error


def round_to(values: Any, dtype: str) -> Array:
    """Round values to a type; those of bfloat16, which NumPy lacks, are returned in float32."""
    array = np.asarray(values, np.float64)
    if dtype != "bfloat16":
        return array.astype(dtype)
    mantissa, exponent = np.frexp(array)
    narrow: Array = np.ldexp(np.round(mantissa * 2**8), exponent - 8).astype(np.float32)
    return narrow


def eps(dtype: str) -> float:
    """Return the unit in the last place, at 1, of the type that is computed in: float32 for narrower ones."""
    return 2.0**-52 if dtype == "float64" else 2.0**-23


def floor_of(dtype: str) -> float:
    """Return tiny / eps, below which a type has lost full precision."""
    info = np.finfo(np.float64 if dtype == "float64" else np.float32)
    return float(info.tiny / info.eps)


def worst(errors: Any) -> float:
    """Return the largest absolute value, and NaN if there is one: it is within no bound.

    Example:
        >>> worst([1.0, -3.0]), worst([1.0, float("nan")])
        (3.0, nan)
    """
    return float(np.max(np.abs(errors), initial=0.0))


def relative(got: Any, want: Any, floor: float) -> float:
    """Return the largest error, each relative to its own entry, or to `floor` if that is larger."""
    want = np.asarray(want, np.float64)
    return worst((np.asarray(got, np.float64) - want) / np.maximum(np.abs(want), floor))


def ulps_apart(a: Array, b: Array, dtype: str) -> float:
    """Return how far two results are apart, in units in the last place of the largest entry of their row.

    Example:
        >>> ulps_apart(np.array([[1.0, 0.0]]), np.array([[1.0, 2.0**-52]]), "float64")
        1.0
    """
    return by_row(a.astype(np.float64), b.astype(np.float64), floor_of(dtype)) / eps(dtype)


def by_row(got: Array, want: Array, floor: float) -> float:
    """Return the largest error, each relative to the largest entry of its row."""
    return worst((got - want) / np.maximum(np.abs(want).max(-1, keepdims=True), floor))


def norms(values: Array, norm: str, granularity: str) -> Array:
    """Return the norm of everything that one norm runs over, in float64, without overflow."""
    rows = np.asarray(values, np.float64)
    rows = rows.reshape(len(rows), -1) if granularity == "example" else rows
    scale = np.abs(rows).max(-1, keepdims=True)
    scaled = rows / np.where(scale > 0, scale, 1)
    return np.asarray(scale[..., 0] * np.linalg.norm(scaled, float(norm), axis=-1))
