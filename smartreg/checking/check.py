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
from smartreg.checking.laws import Law
from smartreg.checking.trajectories import TRAJECTORIES, compare_steps, run_trajectory
from smartreg.divergences import DIVERGENCES


@dataclass
class Report:
    """What `check_backend` found; `print` shows it as a table.

    Example:
        >>> report = check_backend("numpy", functions=["momentum"])
        >>> report.ok
        True
    """

    backend: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Tell whether every row is within its bound, and there is one."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        title = f"{self.backend}, {self.dtype}: {'passed' if self.ok else 'FAILED'} ({self.seconds:.1f} s)"
        return f"{title}\n{self.table(self.rows)}"

    def table(self, rows: Sequence[Row]) -> str:
        """Return some rows as a table, with a mark at each that failed."""
        width = max((len(row.what) for row in rows), default=0)
        lines = [f"  {'what':<{width}}  worst error    bound  at"]
        for row in rows:
            mark = " " if row.ok else "!"
            found = f"{row.problem} ({row.at})" if row.problem else f"{row.error:11.1e}  {row.bound:7.1e}  {row.at}"
            lines.append(f"{mark} {row.what:<{width}}  {found}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON."""
        rows = [row._asdict() | {"ok": row.ok} for row in self.rows]
        for row in rows:
            row["error"] = row["error"] if math.isfinite(row["error"]) else None
        return {"backend": self.backend, "dtype": self.dtype, "ok": self.ok, "seconds": self.seconds, "rows": rows}


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
        a report, also of a backend that raises or returns wrong shapes: `print(report)`, `report.ok`.

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
    found: dict[str, Row] = {}
    for check in (golden_checks, law_checks, trajectory_checks):
        for row in check(Face(backend, dtype), functions):
            worst = found.get(row.what)
            if worst is None or (not worst.problem and (bool(row.problem) or row.ratio > worst.ratio)):
                found[row.what] = row
    order = {function: place for place, function in enumerate(FUNCTIONS)}
    report.rows = sorted(found.values(), key=lambda row: order.get(row.what.split(":")[0], len(order)))
    report.seconds = time.perf_counter() - started
    return report


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
        what, at = f"{case.function}: golden vectors", f"'{case.name}'"
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
        rng = np.random.default_rng(seed)
        for function in functions:
            try:
                for what, error, limit in _laws(face, function, rng):
                    yield Row(f"{function}: {what}", error, limit, f"seed {seed}")
            except Problem as problem:
                yield Row(f"{function}: laws", math.inf, 0, f"seed {seed}", str(problem))


def _laws(face: Face, function: str, rng: np.random.Generator) -> Iterator[Law]:
    if function in DIVERGENCES:
        return laws.divergence_laws(face, function, laws.random_pair(rng, function, face.dtype))
    if face.dtype in HALF:  # everything else is float32 or wider
        return iter(())
    if function == "normalize":
        return laws.normalize_laws(face, laws.random_ball(rng, face.dtype))
    if function in BALLS.values():
        return laws.projection_laws(face, function, laws.random_ball(rng, face.dtype))
    if function == "ascend":
        return laws.ascent_laws(face, laws.random_ascent(rng, face.dtype))
    if function == "momentum":
        return laws.momentum_laws(face, laws.random_schedule(rng))
    if function == "ema_update":
        return laws.ema_laws(face, laws.random_pair(rng, "squared_error", face.dtype))
    return laws.bregman_laws(face, laws.random_pair(rng, "symmetric_kl", face.dtype))


def trajectory_checks(face: Face, functions: Sequence[str]) -> Iterator[Row]:
    """Run Algorithm 1 with the backend's functions, and compare every intermediate with the NumPy reference's.

    An intermediate may be as far off as those of the reference are if its outputs, gradients and steps are rounded 32
    units in the last place off. So the bound follows the condition of each.

    Example:
        >>> from smartreg.checking import NUMPY
        >>> next(trajectory_checks(Face(NUMPY), FUNCTIONS)).ok
        True
    """
    if face.dtype in HALF or set(functions) != set(FUNCTIONS):
        return
    for name in TRAJECTORIES:
        what = f"Algorithm 1: {name}"
        count = 50 if name == "paper" else 10  # the schedule of beta needs all of them
        try:
            steps = run_trajectory(name, face, face.dtype, count)
        except Problem as problem:
            yield Row(what, math.inf, 0, f"{count} steps", str(problem))
            continue
        yield max(compare_steps(steps, name, face.dtype), key=lambda row: (not row.ok, row.ratio if row.ok else 0))


def _golden(face: Face, case: golden.Case) -> Iterator[tuple[float, float]]:
    """Yield the errors and bounds of one call."""
    name, given, expected = case.function, dict(case.arguments), case.expected
    if name in DIVERGENCES:
        limit = bound("divergence", face.dtype)
        yield golden.relative_error(face.value(name, **given), expected["value"]), limit
        if face.dtype not in HALF:  # whose gradients are as narrow
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
