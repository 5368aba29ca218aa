"""Write smartreg/golden.json: the inputs are listed here, the answers are mpmath's. Takes minutes.

    python tools/make_golden.py

The file is the same every time, because no random number, logarithm or power depends on the platform.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpmath
import numpy as np

from smartreg.checking.golden import by_seed, decode

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import exact  # noqa: E402

BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
WIDTHS = {"float64": 53, "float32": 24, "half": 8}  # 8 bits fit float16 too
BALLS = {"project_linf_ball": "inf", "project_l2_ball": "2", "project_l1_ball": "1"}
INF = math.inf
TINY = 84 * 2.0**-23  # 1.0014e-5, in 5 bits

Case = tuple[str, str, dict[str, Any]]


def rounded(values: Any, bits: int) -> np.ndarray:
    """Round to the nearest numbers of so many bits."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def draw(seed: int, *shape: int) -> np.ndarray:
    """Draw numbers in [-1, 1) of 47 bits."""
    high, low = 2654435761 * seed % 2**32, 2246822519 * seed % 2**32  # far apart, also for neighbouring seeds
    count = math.prod(shape)
    return (by_seed(high, count, 2**23, -23) + by_seed(low, count, 2**23, -46)).reshape(shape)


def cases() -> Iterator[Case]:
    """Yield every case: its name, its function, its arguments."""
    yield from symmetric_kl_cases()
    yield from bernoulli_cases()
    yield from squared_error_cases()
    yield from normalize_cases()
    yield from projection_cases()
    yield from rms_cases()
    yield from ema_cases()
    yield from momentum_cases()


def pairs(function: str, sizes: tuple[tuple[int, float, float], ...]) -> Iterator[Case]:
    """Yield ordinary rows of outputs of some size, some distance apart, in the precision of every dtype."""
    for dtype, bits in BITS.items():
        for seed, (classes, size, distance) in enumerate(sizes, 1):
            b = rounded(size * draw(seed, 1, classes), bits)
            a = rounded(b + distance * draw(seed + 100, 1, classes), bits)
            if not np.array_equal(a, b):
                yield f"{dtype}, {classes} outputs of {size:g}, {distance:g} apart", function, {"a": a, "b": b}


def positions(function: str) -> Iterator[Case]:
    """Yield masks: some positions, one, none; two position axes; no mask."""
    for dtype, bits in WIDTHS.items():
        b = rounded(3 * draw(7, 3, 3, 2), bits)
        a = rounded(b + 0.25 * draw(8, 3, 3, 2), bits)
        mask = [[True, False, True], [True, False, False], [False] * 3]
        yield f"{dtype}, positions", function, {"a": a, "b": b}
        yield f"{dtype}, masked positions", function, {"a": a, "b": b, "mask": mask}
    b, a = rounded(2 * draw(9, 2, 2, 3, 2), 8), rounded(2 * draw(10, 2, 2, 3, 2), 8)
    mask = [[[True, True, False], [False, False, True]], [[False, True, True], [True, True, True]]]
    yield "two masked axes of positions", function, {"a": a, "b": b, "mask": mask}


def symmetric_kl_cases() -> Iterator[Case]:
    """Yield cases in which digits cancel, classes vanish, and shifts are far larger than what they hide."""

    def case(name: str, a: Any, b: Any) -> Case:
        return name, "symmetric_kl", {"a": [a], "b": [b]}

    yield from pairs(
        "symmetric_kl",
        (
            *((2, 1, 1e-7), (2, 1, 1e-3), (2, 3, 1), (2, 1e4, 1e4), (3, 1, 1e-7), (3, 4, 1e-5), (3, 1e4, 1)),
            *((7, 1e-6, 1e-7), (7, 2, 1e-2), (7, 10, 100), (7, 1e4, 1e-2), (7, 1e4, 1e4), (20, 3, 1e-4), (20, 30, 3)),
        ),
    )
    yield from positions("symmetric_kl")
    yield case("one class", [3.5], [-2.0])
    yield case("two equal rows", [1.5, -3.0, 96.0], [1.5, -3.0, 96.0])
    yield case("rows that differ by a shift", [1.5, -3.0, 96.0], [2.5, -2.0, 97.0])
    yield case("two classes, 2^-23 apart", [2.0**-23, 0.0], [0.0, 0.0])
    yield case("two classes, 1e-7 apart", [1e-7, 0.0], [0.0, 0.0])
    yield case("two classes, 1e-7 apart, float32", [rounded(1e-7, 24), 0.0], [0.0, 0.0])
    yield case("two classes, 1e-300 apart", [1e-140, 0.0], [0.0, 0.0])
    yield case("one far class of no weight, the others 1e-5 apart", [0.0, TINY, -60.0], [0.0, 0.0, -80.0])
    yield case("the same, the far class 1e4 below", [0.0, TINY, -9984.0], [0.0, 0.0, -8960.0])
    yield case("the same in float16", [0.0, 2.0**-14, -60.0], [0.0, 0.0, -80.0])
    yield case("several far classes", [0.0, TINY, -30.0, -31.0, -90.0], [0.0, 0.0, -33.0, -34.0, -20.0])
    yield case("half of the mass is far", [0.0, 0.0, 4.0, 1.0], [0.0, 2.0**-10, 1.0, 4.0])
    yield case("differences around 1", [0.0, 1.0, 1.0 + 2.0**-7, 1.0 - 2.0**-7], [0.0, 0.0, 0.0, 0.0])
    yield case("classes that underflow", [5.0, -100.0, -1000.0, 4.5], [4.0, -120.0, -800.0, 5.0])
    yield case("classes that underflow in one row", [0.0, -1000.0, 1.0], [0.0, 1.0, -1000.0])
    yield case("logits of 1e4, opposite", [9984.0, -9984.0, 0.0], [-9984.0, 9984.0, 0.0])
    yield case("logits of 1e4, a step apart", [9984.0, 9920.0, 0.0], [9920.0, 9984.0, 64.0])
    yield case("logits of 1e4, 2^-9 apart", [10000.0, 10000.0 + 2.0**-9, 9999.0], [10000.0, 10000.0, 9999.0])
    yield case("a certain and an even row", [80.0, -80.0], [0.0, 0.0])
    yield case("two certain rows", [80.0, -80.0], [88.0, -80.0])
    yield case("-inf in both", [0.5, -INF, 2.0, -INF], [1.0, -INF, 1.75, -INF])
    yield case("-inf in both, 1e-5 apart", [-INF, TINY, 0.0, -1.0], [-INF, 0.0, 0.0, -1.0])
    yield case("-inf in both but one class", [-INF, 3.0, -INF], [-INF, -2.0, -INF])
    yield case("-inf in both, far logits", [-INF, 9984.0, -9984.0], [-INF, 9920.0, -9984.0])
    for dtype, shift, step in (
        ("float64", 2.0**30, 2.0**-22),
        ("float32", 2.0**17, 2.0**-6),
        ("float16", 1024.0, 1.0),
        ("bfloat16", 128.0, 1.0),
    ):
        b = shift + step * np.array([0.0, 1.0, 2.0, 40.0, 41.0])
        a = b + step * np.array([1.0, 0.0, 2.0, 0.0, 1.0])
        yield case(f"{dtype}, a huge common shift", a, b)
        yield case(f"{dtype}, huge shifts of opposite signs", a, b - 2 * shift)
        yield case(f"{dtype}, a huge shift in one row", a, b - shift)
    a = [[0.0, TINY, 0.0], [9984.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    b = [[0.0, 0.0, 0.0], [0.0, 9984.0, 0.0], [3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]
    yield "a batch of very different rows", "symmetric_kl", {"a": a, "b": b}
    for name, classes, base, distance in (
        ("50,000 classes, 1e-4 apart", 50_000, (1, 2**22, -20), (2, 100, -20)),
        ("50,000 classes, 1e-7 apart", 50_000, (3, 2**23, -23), (4, 2, -23)),
        ("50,000 classes, 10 apart", 50_000, (5, 2**23, -20), (6, 2**23, -20)),
        ("50,000 classes, in 7 bits", 50_000, (7, 60, -4), (8, 3, -4)),
        ("1,000 classes of 1e3", 1000, (9, 1000, 0), (10, 500, 0)),
    ):
        a, b = ([list(terms) for terms in rows] for rows in ((base, distance), (base,)))
        arguments = {
            side: {"by_seed": [[t[0], classes, *t[1:]] for t in terms]} for side, terms in (("a", a), ("b", b))
        }
        yield name, "symmetric_kl", arguments


def bernoulli_cases() -> Iterator[Case]:
    """Yield labels that are near, and saturated ones on one side or on both."""

    def case(name: str, a: Any, b: Any) -> Case:
        return name, "bernoulli_symmetric_kl", {"a": [a], "b": [b]}

    yield from pairs(
        "bernoulli_symmetric_kl",
        ((1, 1, 1e-7), (1, 3, 1), (4, 1, 1e-7), (4, 4, 1e-4), (4, 20, 1), (4, 1e4, 1e4), (12, 3, 0.1), (12, 100, 10)),
    )
    yield from positions("bernoulli_symmetric_kl")
    yield case("equal rows", [1.5, -3.0, 9984.0], [1.5, -3.0, 9984.0])
    yield case("one label, 2^-23 apart", [2.0**-23], [0.0])
    yield case("labels 1e-7 apart", [1e-7, 0.0], [0.0, 1e-7])
    yield case("saturated, the same side", [20.0, -20.0, 60.0, -80.0], [21.0, -22.0, 64.0, -81.0])
    yield case("saturated labels alone", [80.0, -80.0], [81.0, -82.0])
    yield case("saturated, opposite sides", [80.0, -9984.0], [-80.0, 9984.0])
    yield case("logits of 1e4, the same side", [9984.0, -9984.0], [9920.0, -9920.0])
    yield case("logits of 1e4 beside small ones", [9984.0, TINY], [9984.0, 0.0])
    yield case("-inf in both", [-INF, 1.0, 0.5], [-INF, 0.5, 1.0])


def squared_error_cases() -> Iterator[Case]:
    """Yield near and far values."""

    def case(name: str, a: Any, b: Any) -> Case:
        return name, "squared_error", {"a": [a], "b": [b]}

    yield from pairs("squared_error", ((1, 1, 1e-7), (1, 3, 1), (5, 1, 1e-3), (5, 1e4, 1e4), (12, 3, 0.1)))
    yield from positions("squared_error")
    yield case("equal values", [1.5, -3.0], [1.5, -3.0])
    yield case("2^-23 apart", [1.0 + 2.0**-23], [1.0])
    yield case("1e-7 apart", [1e-7, 2.0], [0.0, 2.0])
    yield case("values of 2^50", [2.0**50, -(2.0**49)], [-(2.0**50), 2.0**48])
    yield case("values of 1e150", [1e150, 1.0], [-1e150, 1.0])


def normalize_cases() -> Iterator[Case]:
    """Yield gradients whose squares underflow or overflow, zero rows, ties."""

    def each(name: str, g: Any) -> Iterator[Case]:
        for norm in ("inf", "2", "1"):
            for granularity in ("example", "token"):
                arguments = {"g": g, "norm": norm, "granularity": granularity}
                yield f"{name}, norm {norm}, {granularity}", "normalize", arguments

    for dtype, bits in WIDTHS.items():
        yield from each(f"{dtype}, ordinary", rounded(draw(1, 2, 3, 4), bits))
    for dtype in ("float64", "float32", "bfloat16"):
        tiny = rounded(1e-30 * draw(2, 2, 2, 3), BITS[dtype])
        yield from each(f"{dtype}, gradients of 1e-30", tiny)
    yield from each("gradients of 1e30", rounded(1e30 * draw(3, 1, 2, 3), 8))
    yield from each("gradients of 1e-290", 1e-290 * draw(4, 1, 2, 3))
    yield from each("gradients of 1e300", 1e300 * draw(4, 1, 2, 3))
    yield from each("1e-30 beside 1", [[[2.0**-100, 2.0**-99], [1.0, -0.5]]])
    yield from each("zero rows", [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, -4.0]]])
    yield from each("ties", [[[0.5, -0.5, 0.5], [-0.5, 0.5, 0.25]]])
    yield from each("one entry", [[[-0.375]]])


def projection_cases() -> Iterator[Case]:
    """Yield binding and slack radii, one for each example, 0; ties, and rows far outside."""

    def each(name: str, delta: Any, epsilon: Any, functions: Any = BALLS) -> Iterator[Case]:
        for function in functions:
            for granularity in ("example", "token"):
                arguments = {"delta": delta, "epsilon": epsilon, "granularity": granularity}
                yield f"{name}, {granularity}", function, arguments

    for dtype, bits in WIDTHS.items():
        delta = rounded(draw(1, 3, 2, 3), bits)
        yield from each(f"{dtype}, some rows bind", delta, 0.75)
        yield from each(f"{dtype}, all bind", delta, 2.0**-4)
        yield from each(f"{dtype}, none binds", delta, 8.0)
        yield from each(f"{dtype}, a radius an example", delta, rounded([0.1, 1.0, 0.0], bits))
        yield from each(f"{dtype}, at the published size", rounded(1e-3 * draw(2, 2, 2, 4), bits), rounded(1e-5, bits))
    yield from each("radius 0", rounded(draw(3, 2, 2, 3), 8), 0.0)
    yield from each("zero rows", [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, -4.0]]], 1.0)
    yield from each("zero rows, a radius of 0", [[[0.0, 0.0], [0.0, 0.0]]], 0.0)
    yield from each("on the boundary", [[[3.0, -4.0]], [[-7.0, 0.0]], [[5.0, 0.0]]], [5.0, 7.0, 5.0])
    yield from each("tiny", rounded(1e-30 * draw(4, 1, 2, 3), 8), 2.0**-101)
    yield from each("huge", rounded(1e30 * draw(5, 1, 2, 3), 8), 2.0**98)
    yield from each("one entry", [[[-0.375]]], 0.25)
    yield from each("ties in |delta|", [[[2.0, -2.0, 2.0], [-2.0, 1.0, 1.0]]], 1.5)
    yield from each("all ties, more than the radius holds", [[[0.5] * 8, [-0.5] * 8]], 1.0)
    yield from each("an entry exactly at tau", [[[3.0, 2.0, 1.0], [-3.0, -1.0, 0.5]]], 3.0)
    ties = [[[1000.5, -1000.25, 1000.125, 3.0], [-1000.375, 999.75, 1000.0, 1000.3125]]]
    yield from each("near ties, 1,000 radii outside", ties, 1.0)
    close = 100 + draw(7, 2, 2, 4)
    for dtype in ("float64", "float32"):
        yield from each(f"{dtype}, near ties, 100 radii outside", rounded(close, BITS[dtype]), 1.0)
    yield from each("64 entries", rounded(draw(6, 1, 4, 16), 24), 1.5)


def rms_cases() -> Iterator[Case]:
    """Yield rows with and without padding, and an example that is all padding."""
    mask = [[True, False, True], [True, True, True], [False, False, False]]
    for dtype, bits in WIDTHS.items():
        x = rounded(3 * draw(1, 3, 3, 4), bits)
        yield f"{dtype}, ordinary", "rms", {"x": x}
        yield f"{dtype}, masked", "rms", {"x": x, "mask": mask}
    yield "padding that is large", "rms", {"x": [[[0.5, 1.5], [2.0**15, 2.0**15]]], "mask": [[True, False]]}
    yield "embeddings of 1e-10", "rms", {"x": rounded(1e-10 * draw(2, 2, 2, 3), 8)}
    yield "embeddings of 1e10", "rms", {"x": rounded(1e10 * draw(3, 2, 2, 3), 8)}
    yield "zeros", "rms", {"x": [[[0.0, 0.0]], [[0.0, 1.0]]]}
    yield "one entry", "rms", {"x": [[-0.375]]}


def ema_cases() -> Iterator[Case]:
    """Yield every beta, with weights near and far, and at rest."""
    for dtype, bits in WIDTHS.items():
        teacher = rounded(draw(1, 2, 4), bits)
        theta = rounded(teacher + 0.01 * draw(2, 2, 4), bits)
        for beta in (0.0, 0.25, 0.5, 0.99, 0.999, 1.0):
            yield (
                f"{dtype}, beta {beta:g}",
                "ema_update",
                {"teacher": {"w": teacher}, "theta": {"w": theta}, "beta": beta},
            )
    far, near, rest = [[1.0, -(2.0**-10)]], [[2.0**10, 3.0]], [[0.1, 1e-30]]
    yield "far apart", "ema_update", {"teacher": {"w": far}, "theta": {"w": near}, "beta": 0.999}
    yield "at rest", "ema_update", {"teacher": {"w": rest}, "theta": {"w": rest}, "beta": 0.999}
    yield "from zero", "ema_update", {"teacher": {"w": [[0.0, 0.0]]}, "theta": {"w": far}, "beta": 0.99}


def momentum_cases() -> Iterator[Case]:
    """Yield both sides of the switch."""
    for total, fraction, steps in (
        (100, 0.1, (1, 10, 11, 100)),
        (100, 0.29, (28, 29, 30)),  # the float 0.29 * 100 is 28.999999999999996
        (1000, 0.1, (99, 100, 101)),
        (7, 0.1, (1, 7)),
        (15, 0.1, (1, 2)),
        (1, 0.5, (1,)),
        (1_000_000, 0.123456, (123_456, 123_457)),
        (100, 0.0, (1, 100)),
        (100, 1.0, (1, 100)),
    ):
        for step in steps:
            config = {"total_steps": total, "early_fraction": fraction, "beta_early": 0.99, "beta_late": 0.999}
            yield f"step {step} of {total}, early {fraction:g}", "momentum", {"step": step, "config": config}
    config = {"total_steps": 10, "early_fraction": 0.5, "beta_early": 0.0, "beta_late": 1.0}
    for step in (5, 6):
        yield f"step {step} of 10, beta 0 and 1", "momentum", {"step": step, "config": config}
    for memory, steps in ((0.25, 1), (0.3, 4), (0.001, 1), (1.0, 1)):
        for step in (1, 2, 24, 25, 26, 100):
            config = {"total_steps": 100, "memory": memory, "proximal_steps": steps}
            yield f"step {step} of 100, memory {memory:g}, S = {steps}", "momentum", {"step": step, "config": config}


def answer(function: str, arguments: dict[str, Any], digits: int) -> dict[str, Any]:
    """Compute the answers to one call, in arrays of mpf."""
    values = {name: decode(encode(value)) for name, value in arguments.items()}
    if function == "momentum":
        return {"value": np.array(mpmath.mpf(exact.momentum(values["step"], **values["config"])), object)}
    if function == "ema_update":
        old, new = values["teacher"]["w"], values["theta"]["w"]
        moved = [exact.ema_update(*rows, values["beta"], digits) for rows in zip(old, new, strict=True)]
        return {"value": np.array(moved, object)}
    if function == "rms":
        x = values["x"]
        mask = values.get("mask", np.ones(x.shape[:-1], bool))
        rows = [row[keep].ravel() for row, keep in zip(x, mask, strict=True)]
        return {"value": np.array([exact.rms(row, digits) for row in rows], object)}
    if function == "normalize":
        return {"value": by_row(values["g"], values, lambda i, row: exact.normalize(row, values["norm"], digits))}
    if function in BALLS:
        radius = np.broadcast_to(values["epsilon"], len(values["delta"]))
        norm = BALLS[function]
        return {
            "value": by_row(values["delta"], values, lambda i, row: exact.project(row, float(radius[i]), norm, digits))
        }
    return divergence(getattr(exact, function), values["a"], values["b"], values.get("mask"), digits)


def divergence(
    function: Callable[..., Any], a: np.ndarray, b: np.ndarray, mask: np.ndarray | None, digits: int
) -> dict[str, Any]:
    """Compute the mean over the positions that count, and its gradients."""
    keep = np.ones(a.shape[:-1], bool) if mask is None else mask
    value, grad_a, grad_b = (np.full(shape, mpmath.mpf(0), object) for shape in (len(a), a.shape, a.shape))
    with mpmath.workdps(digits):
        for at in zip(*np.nonzero(keep), strict=True):
            j, for_a, for_b = function(a[at], b[at], digits)
            count = int(keep[at[0]].sum())
            value[at[0]] += j / count
            grad_a[at], grad_b[at] = ([v / count for v in row] for row in (for_a, for_b))
    return {"value": value, "grad_a": grad_a, "grad_b": grad_b}


def by_row(x: np.ndarray, settings: dict[str, Any], function: Callable[[int, np.ndarray], list[Any]]) -> np.ndarray:
    """Apply a function to each part that one norm runs over. Return the results in the shape of x."""
    rows = x.reshape(len(x), 1, -1) if settings["granularity"] == "example" else x.reshape(len(x), -1, x.shape[-1])
    return np.array([[function(i, row) for row in example] for i, example in enumerate(rows)], object).reshape(x.shape)


def fifty_digits(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the answers as strings of 50 digits, which 50% more working digits do not change."""
    digits, found = 120, None
    if function.endswith("kl"):  # the smallest exponential must be seen beside 1, also in a difference of two
        rows = [decode(encode(arguments[side])) for side in ("a", "b")]
        finite = [row[np.isfinite(row)] for row in rows]
        reach = max(np.abs(v).max() if function.startswith("bernoulli") else np.ptp(v) for v in finite)
        digits += int(2 * reach / math.log(10))
    while True:
        answers = answer(function, arguments, digits)
        text = {key: np.vectorize(as_text, otypes=[object])(entries) for key, entries in answers.items()}
        if found is not None and all(np.array_equal(text[key], found[key]) for key in text):
            break
        digits, found = 3 * digits // 2, text
    if not any(isinstance(value, dict) and "by_seed" in value for value in arguments.values()):
        return {key: entries.tolist() for key, entries in text.items()}
    stored: dict[str, Any] = {"value": text.pop("value").tolist()}
    for key, entries in text.items():
        classes = entries.shape[-1]
        largest_at = max(range(classes), key=lambda c: abs(answers[key][0, c]))
        at = sorted({*range(0, classes, classes // 24), classes - 1, largest_at})
        stored[key] = {"at": at, "entries": entries[:, at].tolist()}
    return stored


def as_text(value: Any) -> str:
    """Write 50 digits. It rounds to 60 first, because mpmath would convert more digits than Python allows at once."""
    with mpmath.workdps(60):
        text: str = mpmath.nstr(+value, 50)
        return text


def encode(value: Any) -> Any:
    """Convert an argument to JSON. Floats are written so that they read back as they were."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    return "-inf" if value == -INF else value


def written(case: Case) -> dict[str, Any]:
    """Return a case as golden.json has it, without its answers."""
    name, function, arguments = case
    return {"name": name, "function": function, "arguments": encode(arguments)}


def main() -> None:
    """Write the file."""
    lines = [json.dumps({**written(case), "expected": fifty_digits(*case[1:])}) for case in cases()]
    (ROOT / "smartreg" / "golden.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(lines)} cases")


if __name__ == "__main__":
    main()
