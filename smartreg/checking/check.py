"""Check a backend against golden vectors, the laws and Algorithm 1."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smartreg.checking import golden, laws
from smartreg.checking.bounds import DTYPES, HALF, Row, bound
from smartreg.checking.face import BALLS, FUNCTIONS, Face, Problem, load_backend
from smartreg.checking.laws import Law, Pair
from smartreg.checking.trajectories import TRAJECTORIES, compare_steps, run_trajectory
from smartreg.divergences import DIVERGENCES

UNITS = (
    "An error is relative to the expected value, or to the largest entry of its row or array. If a bound is 0, nothing "
    "may differ."
)
EXCLUDED = "classes of -inf in both"  # a row of their own: there a formula may give NaN, which is larger than any error


@dataclass
class Report:
    """What `check_backend` found; `print` shows it as a table.

    Attributes:
        rows: one for each function and law, golden vectors or setting of Algorithm 1.
        not_checked: what could not be checked, why, and what to write. It is no failure.

    Example:
        >>> report = check_backend("numpy", functions=["momentum"])
        >>> report.ok
        True
    """

    backend: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    not_checked: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Tell whether every row is within its bound, and there is one."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        found = "passed" if self.ok else "NOT CHECKED" if self.not_checked and not self.rows else "FAILED"
        lines = [f"{self.backend}, {self.dtype}: {found} ({self.seconds:.1f} s)"]
        if self.rows:
            lines += [self.table(self.rows), UNITS]
        return "\n".join([*lines, *(f"not checked: {what}" for what in self.not_checked)])

    def table(self, rows: Sequence[Row]) -> str:
        """Return some rows as a table, with a mark at each that failed."""
        width = max((len(row.what) for row in rows), default=0)
        lines = [f"  {'what':<{width}}  worst error    bound  at"]
        for row in rows:
            mark = " " if row.ok else "!"
            at = f" ({row.at})" if row.at else ""
            found = f"{row.problem}{at}" if row.problem else f"{row.error:11.1e}  {row.bound:7.1e}  {row.at}"
            lines.append(f"{mark} {row.what:<{width}}  {found}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        rows = [row._asdict() | {"ok": row.ok} for row in self.rows]
        for row in rows:
            row["error"] = row["error"] if math.isfinite(row["error"]) else None
        about = {"backend": self.backend, "dtype": self.dtype, "ok": self.ok, "seconds": self.seconds}
        return {**about, "rows": rows, "not_checked": self.not_checked}


def check_backend(
    backend: Any, dtype: str = "float32", functions: Sequence[str] = FUNCTIONS, name: str | None = None
) -> Report:
    """Check a backend: golden vectors, laws on random inputs, and 50 steps of Algorithm 1.

    Args:
        backend: a module or object as `smartreg.checking` describes it, or a name: "numpy", "torch", "tf", or that
            of a module to import.
        dtype: "float32", "float64", or "bfloat16" or "float16" (only the divergences, which are computed in float32).
        functions: which of `FUNCTIONS` to check; one that the backend lacks is a failure. Algorithm 1 runs if all of
            them are given.

    Returns:
        a report, also of a backend that raises or returns wrong shapes: `print(report)`, `report.ok`. Without
        gradients the values are checked alone, and `report.not_checked` says so.

    Raises:
        ValueError: an unknown dtype or function name. ImportError: no backend of that name can be loaded.

    Example:
        >>> check_backend("numpy", functions=["project_l2_ball"]).ok
        True
    """
    if dtype not in DTYPES:
        raise ValueError(f"check_backend: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for function in functions:
        if function not in FUNCTIONS:
            raise ValueError(f"check_backend: functions must be of {', '.join(FUNCTIONS)}, got {function!r}")
    if isinstance(backend, str):
        name, backend = name or backend, load_backend(backend)
    started = time.perf_counter()
    name = name or str(getattr(backend, "__name__", type(backend).__name__))
    report = Report(name, dtype)
    face = Face(backend, dtype)
    asked = [function for function in functions if dtype not in HALF or function in DIVERGENCES]
    unchecked = "" if asked or not functions else f"{dtype} is for the divergences alone: {', '.join(DIVERGENCES)}"
    if why := unchecked or face.lacks_type():
        report.not_checked.append(why)
        return report
    present = [function for function in asked if hasattr(backend, function)]
    found: dict[str, Row] = {}
    for check in (golden_checks, law_checks, trajectory_checks):
        for row in check(face, present):
            worst = found.get(row.what)
            if worst is None or row.badness > worst.badness:
                found[row.what] = row
    order = {function: place for place, function in enumerate(FUNCTIONS)}
    report.rows = sorted(found.values(), key=lambda row: order.get(row.what.split(":")[0], len(order)))
    if missing := [function for function in asked if function not in present]:
        report.rows.insert(0, _missing(missing, present))
    report.not_checked += _gradients_left_out(face, present)
    report.seconds = time.perf_counter() - started
    return report


def _missing(missing: Sequence[str], present: Sequence[str]) -> Row:
    """Return one row for all functions that are missing."""
    others = f". Or check those that are there: --functions {' '.join(present)} (functions= in Python)"
    it = "it" if len(missing) == 1 else "them"
    text = f"{', '.join(missing)}. Write {it} as docs/backends.md lists {it}"
    return Row("missing functions", math.inf, 0, "", text + (others if present else ""))


def _gradients_left_out(face: Face, functions: Sequence[str]) -> Iterator[str]:
    """Yield which gradients the backend does not give, and how to give them."""
    lacking = [name for name in functions if name in DIVERGENCES and not face.differentiates(name)]
    if lacking and face.dtype not in HALF:
        algorithm = ", and Algorithm 1, which needs them" if set(functions) == set(FUNCTIONS) else ""
        analytic = ", ".join(f"{name}_grad(a, b, mask)" for name in lacking)
        yield (
            f"the gradients of {', '.join(lacking)}{algorithm}. Write gradients(function, *arrays), which "
            f"differentiates by your framework, or {analytic}"
        )


# What is checked: each yields a row for each law and input


def golden_checks(face: Face, functions: Sequence[str]) -> Iterator[Row]:
    """Compare the backend with the 50-digit answers of golden.json.

    Example:
        >>> from smartreg.checking import NUMPY
        >>> all(row.ok for row in golden_checks(Face(NUMPY), ["squared_error"]))
        True
    """
    for case in golden.cases(face.dtype):
        if case.function not in functions:
            continue
        masked = any(np.isneginf(value).any() for value in case.arguments.values() if isinstance(value, np.ndarray))
        what, at = f"{case.function}: {EXCLUDED if masked else 'golden vectors'}", f"golden vector: {case.name}"
        try:
            yield from (Row(what, error, limit, at) for error, limit in _golden(face, case))
        except Problem as problem:
            yield Row(what, math.inf, 0, at, str(problem))


def law_checks(face: Face, functions: Sequence[str], rounds: int = 20) -> Iterator[Row]:
    """Check the laws on random inputs.

    Example:
        >>> from smartreg.checking import NUMPY
        >>> all(row.ok for row in law_checks(Face(NUMPY), ["ema_update"], rounds=2))
        True
    """
    for seed in range(rounds):
        for function in functions:
            if face.dtype in HALF and function not in DIVERGENCES:  # everything else is float32 or wider
                continue
            inputs = law_inputs(function, face.dtype, seed)
            masked = isinstance(inputs, Pair) and bool(np.isneginf(inputs.a).any())
            at = f"random inputs, seed {seed}"
            try:
                for what, error, limit in _quietly(_laws(face, function, inputs)):
                    if masked:
                        yield Row(f"{function}: {EXCLUDED}", error, limit, f"{what}: {at}")
                    else:
                        yield Row(f"{function}: {what}", error, limit, at)
            except Problem as problem:
                yield Row(f"{function}: {EXCLUDED if masked else 'laws'}", math.inf, 0, at, str(problem))


def law_inputs(function: str, dtype: str = "float32", seed: int = 0) -> Any:
    """Return the random inputs on which `check_backend` checks the laws of a function, by the seed that a row names.

    Args:
        function: one of `FUNCTIONS`. dtype: as `check_backend` takes it.

    Returns:
        a named tuple of `smartreg.checking.laws`, or for `momentum` a `SMARTConfig`.

    Raises:
        ValueError: no function of that name.

    Example:
        >>> pair = law_inputs("symmetric_kl", "float32", seed=1)
        >>> pair.a.shape == pair.b.shape, pair.a.dtype.name
        (True, 'float32')
    """
    if function not in FUNCTIONS:
        raise ValueError(f"law_inputs: function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
    rng = np.random.default_rng(seed)
    if function in DIVERGENCES:
        return laws.random_pair(rng, function, dtype)
    if function == "normalize" or function in BALLS.values():
        return laws.random_ball(rng, dtype)
    if function == "ascend":
        return laws.random_ascent(rng, dtype)
    if function == "momentum":
        return laws.random_schedule(rng)
    return laws.random_pair(rng, "squared_error" if function == "ema_update" else "symmetric_kl", dtype)


def _laws(face: Face, function: str, inputs: Any) -> Iterator[Law]:
    if function in DIVERGENCES:
        return laws.divergence_laws(face, function, inputs)
    if function == "normalize":
        return laws.normalize_laws(face, inputs)
    if function in BALLS.values():
        return laws.projection_laws(face, function, inputs)
    if function == "ascend":
        return laws.ascent_laws(face, inputs)
    if function == "momentum":
        return laws.momentum_laws(face, inputs)
    return (laws.ema_laws if function == "ema_update" else laws.bregman_laws)(face, inputs)


def _quietly(found: Iterator[Law]) -> Iterator[Law]:
    """Yield laws without NumPy's warnings of a result that is not finite: the row says it."""
    while True:
        with np.errstate(invalid="ignore", over="ignore"):
            law = next(found, None)
        if law is None:
            return
        yield law


def trajectory_checks(face: Face, functions: Sequence[str]) -> Iterator[Row]:
    """Run Algorithm 1 with the backend's functions, and compare every intermediate with the NumPy reference's.

    An intermediate may be as far off as those of the reference are if its outputs, gradients and steps are rounded 32
    units in the last place off. So the bound follows the condition of each.

    Example:
        >>> from smartreg.checking import NUMPY
        >>> next(trajectory_checks(Face(NUMPY), FUNCTIONS)).ok
        True
    """
    whole = set(functions) == set(FUNCTIONS) and all(map(face.differentiates, DIVERGENCES))
    if face.dtype in HALF or not whole:
        return
    for name in TRAJECTORIES:
        what = f"Algorithm 1: {name}"
        count = 50 if name == "paper" else 10  # the schedule of beta needs all of them
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # the row says what is not finite
                steps = run_trajectory(name, face, face.dtype, count)
                rows = compare_steps(steps, name, face.dtype)
        except Problem as problem:
            yield Row(what, math.inf, 0, f"{count} steps", str(problem))
            continue
        yield max(rows, key=lambda row: (not row.ok, row.ratio if row.ok else 0))


def _golden(face: Face, case: golden.Case) -> Iterator[tuple[float, float]]:
    """Yield the errors and bounds of one call."""
    name, given, expected = case.function, dict(case.arguments), case.expected
    if name in DIVERGENCES:
        limit = bound("divergence", face.dtype)
        yield golden.relative_error(face.value(name, **given), expected["value"]), limit
        if face.dtype not in HALF and face.differentiates(name):  # half precision has gradients as narrow
            for key, got in zip(("grad_a", "grad_b"), face.grad(name, **given), strict=True):
                yield golden.relative_error(got, expected[key]), limit
    elif face.dtype in HALF:
        return
    elif name == "ema_update":
        moved = face.ema_update(**given)["w"]
        yield golden.relative_error(moved, expected["value"]), bound("average", face.dtype)
    elif name == "momentum":
        beta = np.asarray(face.momentum(**given))
        yield golden.relative_error(beta, expected["value"]), bound("schedule", face.dtype)
    else:
        kind = "norm" if name == "normalize" else "projection"
        first = given.pop("g" if name == "normalize" else "delta")
        yield golden.relative_error(face.call(name, first, **given), expected["value"]), bound(kind, face.dtype)
