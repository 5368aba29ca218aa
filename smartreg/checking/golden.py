"""Golden vectors: inputs of every function, hard ones among them, and the answers to 50 digits.

`tools/make_golden.py` writes golden.json with mpmath. Any implementation can be compared with it.
"""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartreg.config import SMARTConfig

Array = NDArray[np.float64]

LARGEST = {"float64": np.finfo(np.float64).max, "float32": np.finfo(np.float32).max, "float16": 65504.0}
LARGEST["bfloat16"] = LARGEST["float32"]


class Exact(NamedTuple):
    """An answer to about 32 digits: high + low, and what its errors are relative to.

    `scale` is the largest entry of each row (of what one softmax or one norm runs over). If there are too many classes
    to store, high and low are those at the indices `at` of the last axis, the largest entry among them.
    """

    shape: tuple[int, ...]
    high: Array
    low: Array
    scale: Array
    at: list[int] | None


class Case(NamedTuple):
    """One call and its answers.

    `function` is a public name of `smartreg.divergences`, `smartreg.perturbation` or `smartreg.proximal`. `arguments`
    are its keyword arguments: floating-point arrays in float64, to be cast, boolean masks, plain values.
    `expected` has "value". For a divergence it also has "grad_a" and "grad_b", the gradients of the sum of the values.
    `ema_update` has one weight, "w", and "value" is the new one.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    expected: dict[str, Exact]


def cases(dtype: str) -> list[Case]:
    """Return the cases whose inputs are all normal numbers of a dtype, and whose answers do not overflow it.

    No input is rounded, so an error is the function's own.

    Args:
        dtype: "float64", "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another dtype.

    Example:
        >>> from smartreg.divergences import symmetric_kl
        >>> case = next(case for case in cases("float64") if case.function == "symmetric_kl")
        >>> relative_error(symmetric_kl(**case.arguments), case.expected["value"]) <= 1e-12
        True
    """
    if dtype not in LARGEST:
        raise ValueError(f"cases: expected a dtype of {', '.join(LARGEST)}, got {dtype!r}")
    return [case for case in _all_cases() if _fits(case, dtype)]


def relative_error(got: ArrayLike, expected: Exact) -> float:
    """Return the largest error of an array, relative to the largest exact entry of its row.

    It is NaN if the array has a NaN, and inf if it has an infinite entry.

    No row is compared with less than tiny / eps, below which a dtype has lost full precision.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> exact = Exact((1, 2), np.array([[0.5, 1.0]]), np.zeros((1, 2)), np.ones((1, 1)), None)
        >>> relative_error([[0.5, 1.25]], exact)
        0.25
    """
    got = np.asarray(got)
    if got.shape != expected.shape:
        raise ValueError(f"relative_error: expected an array of shape {expected.shape}, got {got.shape}")
    dtype = np.finfo(got.dtype)
    wide = got.astype(np.float64)
    wide = wide if expected.at is None else wide[..., expected.at]
    if not np.isfinite(wide).all():
        return float("nan" if np.isnan(wide).any() else "inf")
    error = np.abs((wide - expected.high) - expected.low)
    return float(np.max(error / np.maximum(expected.scale, float(dtype.tiny) / float(dtype.eps)), initial=0))


def by_seed(seed: int, classes: int, spread: int, exponent: int) -> Array:
    """Return (1, classes) whole numbers of [-spread, spread) times 2^exponent, by a linear congruential generator.

    Every number is exact, with any version of any library.

    Example:
        >>> by_seed(1, 4, 8, -2)
        array([[ 0.25, -0.75, -1.75,  0.5 ]])
    """
    numbers = []
    for _ in range(classes):
        seed = (1664525 * seed + 1013904223) % 2**32  # Numerical Recipes, section 7.1
        numbers.append((seed >> 8) % (2 * spread) - spread)  # the low bits have short periods
    return np.ldexp(np.array([numbers], np.float64), exponent)


def decode(argument: Any) -> Any:
    """Decode an argument of golden.json: a list is an array, a dict with "by_seed" is a sum of `by_seed` rows."""
    if isinstance(argument, list):
        array = np.array(argument)
        return array if array.dtype == bool else array.astype(np.float64)  # "-inf" is a string
    if isinstance(argument, dict):
        if "by_seed" in argument:
            return np.sum([by_seed(*terms) for terms in argument["by_seed"]], axis=0)
        return {name: decode(value) for name, value in argument.items()}
    return argument


@cache
def _all_cases() -> list[Case]:
    return [_case(**case) for case in json.loads(files("smartreg").joinpath("golden.json").read_text("utf-8"))]


def _case(name: str, function: str, arguments: dict[str, Any], expected: dict[str, Any]) -> Case:
    decoded = {key: decode(value) for key, value in arguments.items()}
    if "config" in arguments:
        decoded["config"] = SMARTConfig(**arguments["config"])
    rows: tuple[int, ...] | None = ()  # errors are relative to each entry, or to the largest of some axes
    if "granularity" in arguments:
        rows = (-1,) if arguments["granularity"] == "token" else None
    answers = {}
    for key, answer in expected.items():
        at = answer["at"] if isinstance(answer, dict) else None
        text = np.array(answer["entries"] if isinstance(answer, dict) else answer)
        high = text.astype(np.float64)
        low = np.vectorize(lambda s, h: float(Decimal(str(s)) - Decimal(float(h))), otypes=[np.float64])(text, high)
        axes = (-1,) if key != "value" or function == "ema_update" else rows
        axes = tuple(range(1, high.ndim)) if axes is None else axes
        scale = np.max(np.abs(high), axis=axes, keepdims=True)
        answers[key] = Exact(high.shape if at is None else decoded["a"].shape, high, low, scale, at)
    return Case(name, function, decoded, answers)


def _fits(case: Case, dtype: str) -> bool:
    inputs = [case.arguments.get(name) for name in ("a", "b", "g", "delta", "epsilon", "x")]
    inputs += [case.arguments.get(name, {}).get("w") for name in ("teacher", "theta")]
    return all(_exact_in(np.asarray(value), dtype) for value in inputs if value is not None) and all(
        np.all(np.abs(answer.high) <= LARGEST[dtype]) for answer in case.expected.values()
    )


def _exact_in(values: Array, dtype: str) -> bool:
    narrow = np.dtype(np.float32 if dtype == "bfloat16" else dtype)
    with np.errstate(over="ignore"):
        cast = values.astype(narrow)
    normal = (values == 0) | (np.abs(values) >= np.finfo(narrow).tiny)
    exact = (cast == values) & normal
    if dtype == "bfloat16":  # the upper half of a float32
        exact &= np.atleast_1d(cast).view(np.uint32).reshape(cast.shape) % 2**16 == 0
    return bool(exact.all())
