"""Numerical reference checking of any backend: golden vectors, laws and Algorithm 1 (docs/backends.md).

A backend is a module or an object with functions named and called as this package's (`FUNCTIONS`), on arrays of its
own. Two more functions say how to reach them; NumPy's conventions hold for a backend without them:

    asarray(array, dtype)           a NumPy array as one of its own, dtype being "float32", "int64", "bool", ...
    gradients(function, *arrays)    the gradients of sum(function(*arrays)) with respect to each array

Without `gradients` the backend has `symmetric_kl_grad` and so on beside the divergences, and `ascend` gets a forward
that gives (outputs, vjp).
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import smartreg
from smartreg import divergences, golden, laws, perturbation, proximal
from smartreg.config import SMARTConfig
from smartreg.divergences import DIVERGENCES
from smartreg.laws import BALLS, HALF, Law, bound, eps, worst
from smartreg.recording import compare_run
from smartreg.reference import Batch, Functions, Parameters, Step, fit_reference, forward

__all__ = [
    "FUNCTIONS",
    "TRAJECTORIES",
    "Report",
    "Row",
    "check_backend",
    "compare_run",
    "compare_steps",
    "load_backend",
    "load_trajectory",
]

Array = NDArray[Any]

FUNCTIONS = (
    *DIVERGENCES,
    "normalize",
    *BALLS.values(),
    "ascend",
    "momentum",
    "ema_update",
    "bregman_divergence",
)
DTYPES = ("float32", "float64", *HALF)
BACKENDS = ("numpy", "torch", "tf")


class Row(NamedTuple):
    """One line of a report.

    Attributes:
        what: the function and the law, golden vector or intermediate.
        error, bound: the worst error over all inputs, as a share of its own bound, and that bound.
        at: the input of the worst error.
        problem: why there is no error to show: the function is missing, raised, or gave something else.
    """

    what: str
    error: float
    bound: float
    at: str
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return not self.problem and self.error <= self.bound


@dataclass
class Report:
    """What `check_backend` found; printing it gives a table."""

    backend: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every row is within its bound, and there is one."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.what) for row in self.rows), default=0)
        lines = [f"{self.backend}, {self.dtype}: {'passed' if self.ok else 'FAILED'} ({self.seconds:.1f} s)"]
        lines.append(f"  {'what':<{width}}  worst error    bound  at")
        for row in self.rows:
            mark = " " if row.ok else "!"
            found = f"{row.problem} ({row.at})" if row.problem else f"{row.error:11.1e}  {row.bound:7.1e}  {row.at}"
            lines.append(f"{mark} {row.what:<{width}}  {found}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        rows = [row._asdict() | {"ok": row.ok} for row in self.rows]
        for row in rows:
            row["error"] = row["error"] if math.isfinite(row["error"]) else None
        return {"backend": self.backend, "dtype": self.dtype, "ok": self.ok, "seconds": self.seconds, "rows": rows}


def check_backend(
    backend: Any, dtype: str = "float32", functions: Sequence[str] = FUNCTIONS, name: str | None = None
) -> Report:
    """Check a backend: golden vectors, laws on random inputs, and 50 steps of Algorithm 1.

    Args:
        backend: a module or object as this module's head describes, or the name of one: "numpy", "torch", "tf", or
            that of a module to import.
        dtype: "float32", "float64", or "bfloat16" or "float16" (only the divergences, which are computed in float32).
        functions: which of `FUNCTIONS` the backend has; one that is asked for and missing is a failure. Algorithm 1
            runs where all are asked for.

    Returns:
        a report, also of a backend that raises or gives wrong shapes: `print(report)`, `report.ok`.

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
            if worst is None or (not worst.problem and (bool(row.problem) or _share(row) > _share(worst))):
                found[row.what] = row
    order = {function: place for place, function in enumerate(FUNCTIONS)}
    report.rows = sorted(found.values(), key=lambda row: order.get(row.what.split(":")[0], len(order)))
    report.seconds = time.perf_counter() - started
    return report


def load_backend(name: str) -> Any:
    """The backend of that name: "numpy", "torch", "tf", or a module to import.

    Raises:
        ImportError: its framework is not installed; the message says which extra to install.

    Example:
        >>> load_backend("numpy").symmetric_kl is divergences.symmetric_kl
        True
    """
    if name == "numpy":
        return NUMPY
    return importlib.import_module(f"smartreg_{name}.checking" if name in BACKENDS else name)


class Problem(Exception):  # noqa: N818 - the backend's, not ours
    """A function of a backend is missing, raised, or gave what cannot be compared."""

    def __init__(self, function: str, what: str) -> None:
        super().__init__(f"{function} {what}")
        self.function, self.what = function, what


class Face(Functions):
    """A backend's functions, called with NumPy arrays and giving NumPy arrays.

    Args:
        backend: as `check_backend`.
        dtype: of the floating-point arrays that it is given.

    Raises:
        Problem: in place of whatever goes wrong in the backend.

    Example:
        >>> Face(NUMPY).value("squared_error", np.ones((1, 2)), np.zeros((1, 2)))
        array([2.])
    """

    def __init__(self, backend: Any, dtype: str = "float64") -> None:
        self.backend, self.dtype = backend, dtype
        self._asarray = getattr(backend, "asarray", np.asarray)
        self._gradients = getattr(backend, "gradients", None)

    def value(self, divergence: str, a: Any, b: Any, mask: Any = None) -> Array:
        """l_s(a, b), (n,)."""
        given = self._put(a), self._put(b)
        return self._array(divergence, self._call(divergence, *given, mask=self._put(mask)), np.shape(a)[:1])

    def grad(self, divergence: str, a: Any, b: Any, mask: Any = None) -> tuple[Array, Array]:
        """The gradients of the sum over the examples of l_s(a, b), with respect to both."""
        given, mask = (self._put(a), self._put(b)), self._put(mask)
        what = f"{divergence}: gradient"
        with _as_problem(what):
            if self._gradients is None:
                grad_a, grad_b = self._call(f"{divergence}_grad", *given, mask=mask)
            else:
                grad_a, grad_b = self._gradients(lambda a, b: self._call(divergence, a, b, mask=mask), *given)
        return self._array(what, grad_a, np.shape(a)), self._array(what, grad_b, np.shape(b))

    def call(self, function: str, *arrays: Any, **settings: Any) -> Array:
        """A function that gives an array of the shape of its first one."""
        settings = {name: self._put(value) for name, value in settings.items()}
        return self._array(function, self._call(function, *map(self._put, arrays), **settings), np.shape(arrays[0]))

    def ascend(
        self,
        theta: Mapping[str, Any],
        x: Any,
        outputs: Any,
        config: SMARTConfig,
        noise: Any,
        mask: Any,
        divergence: str,
        pooled: bool = True,
    ) -> Array:
        """delta for the reference network, written with operators alone so that any framework can run it."""
        w = {name: self._put(value) for name, value in theta.items()}
        d = len(theta["W1"])  # it reads that many features: of those that are not finite, none
        share = divergences.position_weights(np.asarray(x), mask)  # (n, tokens, 1)
        row = self._put(np.swapaxes(share, 1, 2))

        def network(x: Any) -> Any:
            z = x[..., :d] @ w["W1"] + w["b1"]
            h = 1 - 2 / (1 + math.e ** (2 * z))  # tanh
            return ((row @ h)[:, 0] if pooled else h) @ w["W2"] + w["b2"]

        def network_and_vjp(x: Any) -> Any:
            outputs, vjp = forward(theta, x[..., :d], mask, pooled)
            beside = np.full((*x.shape[:-1], x.shape[-1] - d), np.nan, x.dtype)
            return outputs, lambda grad: np.concatenate([vjp(grad)[1], beside], axis=-1)

        delta = self._call(
            "ascend",
            network_and_vjp if self._gradients is None else network,
            *map(self._put, (x, outputs)),
            config,
            self._put(noise),
            self._put(mask),
            divergence,
        )
        return self._array("ascend", delta, np.shape(x))

    def momentum(self, step: int, config: SMARTConfig) -> float:
        """beta at that step."""
        beta = self._call("momentum", step, config)
        with _as_problem("momentum"):
            return float(beta)

    def ema_update(self, teacher: Mapping[str, Any], theta: Mapping[str, Any], beta: float) -> Parameters:
        """theta~ after the update, of a function that gives a new dict or changes the one it is given."""
        own = {name: self._put(value) for name, value in teacher.items()}
        moved = self._call("ema_update", own, {name: self._put(value) for name, value in theta.items()}, beta)
        with _as_problem("ema_update"):
            moved = dict((own if moved is None else moved).items())
        if moved.keys() != teacher.keys():
            raise Problem("ema_update", f"gave the names {sorted(map(str, moved))}, expected {sorted(teacher)}")
        return {name: self._array("ema_update", moved[name], np.shape(value)) for name, value in teacher.items()}

    def bregman_divergence(  # type: ignore[override]
        self, outputs: Any, teacher_outputs: Any, divergence: str, mask: Any = None, sample_weight: Any = None
    ) -> float:
        """D_Breg."""
        given = self._put(outputs), self._put(teacher_outputs)
        result = self._call("bregman_divergence", *given, divergence, self._put(mask), self._put(sample_weight))
        with _as_problem("bregman_divergence"):
            return float(self._array("bregman_divergence", result, (), dtyped=False))

    def bregman_grad(self, outputs: Any, teacher_outputs: Any, divergence: str) -> Array | None:
        """The gradient of D_Breg at the outputs; None of a backend that does not differentiate."""
        if self._gradients is None:
            return None
        teacher, what = self._put(teacher_outputs), "bregman_divergence: gradient"
        with _as_problem(what):
            (gradient,) = self._gradients(
                lambda z: self._call("bregman_divergence", z, teacher, divergence), self._put(outputs)
            )
        return self._array(what, gradient, np.shape(outputs))

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.backend, function):
            raise Problem(function, "is missing")
        with _as_problem(function):
            return getattr(self.backend, function)(*args, **kwargs)

    def _put(self, value: Any) -> Any:
        """Arrays as the backend's own; everything else as it is."""
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        array = np.array(value)  # a copy: a backend may write into what it is given
        with _as_problem("asarray"):
            return self._asarray(array, self.dtype if array.dtype.kind == "f" else array.dtype.name)

    def _array(self, function: str, result: Any, shape: tuple[int, ...], dtyped: bool = True) -> Array:
        with _as_problem(function):
            array = np.asarray(result)
        if array.shape != tuple(shape):
            raise Problem(function, f"gave the shape {array.shape}, expected {tuple(shape)}")
        wide = "float64" if self.dtype == "float64" else "float32"
        if dtyped and array.dtype.name != wide:
            raise Problem(function, f"gave {array.dtype.name}, expected {wide} for {self.dtype} inputs")
        return array


class _as_problem:  # noqa: N801 - a context manager
    """Whatever is raised inside is a Problem of that function."""

    def __init__(self, function: str) -> None:
        self.function = function

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, Problem):
            text = " ".join(str(error).split())
            raise Problem(
                self.function, f"raised {type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
            ) from error


def _numpy_asarray(array: Any, dtype: str) -> Array:
    if dtype == "bfloat16":
        importlib.import_module("ml_dtypes")  # which gives NumPy that type
    return np.asarray(array, dtype)


NUMPY = SimpleNamespace(
    __name__="numpy",
    asarray=_numpy_asarray,
    **{
        name: getattr(module, name)
        for module in (divergences, perturbation, proximal)
        for name in (*FUNCTIONS, *(f"{divergence}_grad" for divergence in DIVERGENCES))
        if hasattr(module, name)
    },
)


# What is checked: each gives rows, one for each law and input


def golden_checks(face: Face, functions: Sequence[str]) -> Iterator[Row]:
    """The backend against the 50-digit answers of `smartreg.golden`."""
    for case in golden.cases(face.dtype):
        if case.function not in functions:
            continue
        what, at = f"{case.function}: golden vectors", f"'{case.name}'"
        try:
            yield from (Row(what, error, limit, at) for error, limit in _golden(face, case))
        except Problem as problem:
            yield Row(what, math.inf, 0, at, str(problem))


def law_checks(face: Face, functions: Sequence[str], rounds: int = 20) -> Iterator[Row]:
    """The laws, on random inputs."""
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
    """Algorithm 1 with the backend's functions, every intermediate against the NumPy reference.

    An intermediate may differ by what the reference itself moves by where its outputs, gradients and steps are rounded
    32 units in the last place off: so the bound knows the condition of each.
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
        yield max(compare_steps(steps, name, face.dtype), key=lambda row: (not row.ok, _share(row) if row.ok else 0))


# Algorithm 1

# settings of SMARTConfig, and arguments of fit_reference
TRAJECTORIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),  # Gaussian start, T_x = 1, as the others where they do not say otherwise
    "l2, token": (
        {"norm": "2", "granularity": "token", "ascent_steps": 3, "proximal_steps": 3, "beta_early": 0, "beta_late": 0},
        {"optimizer": "sgd"},
    ),
    "l1": ({"norm": "1", "ascent_steps": 2}, {"optimizer": "adam_keras"}),
    "start alone": ({"ascent_steps": 0, "scale": "absolute"}, {}),
    "margin": ({"start": "margin", "ascent_steps": 0}, {}),
    "margin, multi-label": ({"start": "margin", "norm": "2"}, {"divergence": "bernoulli_symmetric_kl"}),
    "margin, regression": ({"start": "margin", "norm": "2"}, {"divergence": "squared_error", "optimizer": "sgd"}),
    "multi-label": ({"norm": "2"}, {"divergence": "bernoulli_symmetric_kl"}),
    "regression": ({"ascent_steps": 2}, {"divergence": "squared_error", "optimizer": "sgd"}),
    "positions": ({"granularity": "token", "norm": "2"}, {"pooled": False}),
    "released code": (
        {"projection": "rescale", "scale": "absolute", "epsilon": 1e-3, "granularity": "token"},
        {},
    ),
}


class Trajectory(NamedTuple):
    """What `smartreg/trajectory.npz` holds for a run: the weights, 50 batches and the noise."""

    theta: Parameters
    batches: list[Batch]
    config: SMARTConfig
    noise: list[Array]
    options: dict[str, Any]


def load_trajectory(name: str, dtype: str = "float64") -> Trajectory:
    """One of `TRAJECTORIES` with its inputs, for an implementation of your own to be run on.

    The network is that of `smartreg.reference`, and the learning rate `fit_reference`'s own, 0.01.

    Raises:
        ValueError: there is no trajectory of that name.

    Example:
        >>> theta, batches, config, noise, options = load_trajectory("margin")
        >>> steps = fit_reference(theta, batches, config, noise, **options)
        >>> len(steps), config.start
        (50, 'margin')
    """
    if name not in TRAJECTORIES:
        raise ValueError(f"load_trajectory: name must be one of {', '.join(TRAJECTORIES)}, got {name!r}")
    changes, options = TRAJECTORIES[name]
    with resources.files(smartreg).joinpath("trajectory.npz").open("rb") as file:
        stored = dict(np.load(file))
    arrays = {key: value.astype(dtype) if value.dtype.kind == "f" else value for key, value in stored.items()}
    settings: dict[str, Any] = {"epsilon": 0.2, "sigma": 0.2, "eta": 0.2, "total_steps": len(arrays["ids"])}
    settings |= {"start": "gaussian", "ascent_steps": 1, "lambda_s": 1.0}
    settings |= {"beta_early": 0.5, "beta_late": 0.9, "early_fraction": 0.3}
    config = SMARTConfig(**settings | changes)
    pooled = options.get("pooled", True)
    y = arrays[f"y/{options.get('divergence', 'symmetric_kl')}" + ("" if pooled else "/positions")]
    noise = arrays["noise" if config.start == "gaussian" else "signs"]
    return Trajectory(
        {key.removeprefix("theta/"): value for key, value in arrays.items() if key.startswith("theta/")},
        [Batch(*fields) for fields in zip(arrays["ids"], y, arrays["mask"], arrays["sample_weight"], strict=True)],
        config,
        list(noise),
        options,
    )


def run_trajectory(name: str, functions: Functions, dtype: str = "float64", count: int = 50) -> list[Step]:
    """The first steps of Algorithm 1 with these functions."""
    theta, batches, config, noise, options = load_trajectory(name, dtype)
    return fit_reference(theta, batches[:count], config, noise, functions=functions, **options)


class _Rounded(Functions):
    """The reference's functions where every output, gradient and step is off by some units in the last place."""

    def __init__(self, seed: int, dtype: str, ulps: float = 32) -> None:
        self.rng, self.size = np.random.default_rng(seed), ulps * eps(dtype)

    def _off(self, array: Any) -> Array:
        moved: Array = array + self.size * np.abs(array).max() * self.rng.uniform(-1, 1, np.shape(array))
        return moved

    def value(self, divergence: str, a: Array, b: Array, mask: Array | None = None) -> Array:
        return super().value(divergence, self._off(a), self._off(b), mask)

    def grad(self, divergence: str, a: Array, b: Array, mask: Array | None = None) -> tuple[Array, Array]:
        grad_a, grad_b = super().grad(divergence, self._off(a), self._off(b), mask)
        return self._off(grad_a), self._off(grad_b)

    def ascend(self, theta: Parameters, x: Array, outputs: Array, *args: Any) -> Array:
        moved = {name: self._off(value) for name, value in theta.items()}
        return super().ascend(moved, x, self._off(outputs), *args)

    def bregman_divergence(self, outputs: Any, teacher_outputs: Any, *args: Any) -> float:
        return Functions.bregman_divergence(self._off(outputs), self._off(teacher_outputs), *args)


def compare_steps(steps: Sequence[Any], name: str, dtype: str = "float64") -> list[Row]:
    """Every intermediate of a run of a trajectory against the reference's, in the order in which they are computed.

    The first row that is not `ok` names the step and the intermediate at which the run first differs.

    Args:
        steps: the first steps of the run, up to 50: `Step`s, or dicts or objects with some of its fields; None where
            there is nothing to compare.
        name, dtype: which of `TRAJECTORIES`, and the type that the run computed in.

    Raises:
        ValueError: no trajectory of that name, a step with nothing to compare, or more than 50 steps.

    Example:
        >>> all(row.ok for row in compare_steps(run_trajectory("margin", Functions()), "margin"))
        True
    """
    most = len(load_trajectory(name).batches)
    if len(steps) > most:
        raise ValueError(f"compare_steps: {name!r} has {most} steps, got {len(steps)}")
    rows = []
    for t, (got, expected) in enumerate(zip(steps, _reference(name, dtype, len(steps)), strict=True), start=1):
        values = dict(_intermediates(got))
        if not values or values.keys() - expected.keys():
            raise ValueError(
                f"compare_steps: step {t} has {sorted(values) or 'nothing to compare'}; expected some of "
                f"{', '.join(expected)}"
            )
        for key, (exact, limit) in expected.items():
            if key in values:
                rows.append(Row(f"Algorithm 1: {name}", _difference(values[key], exact), limit, f"step {t}: {key}"))
    return rows


@cache
def _reference(name: str, dtype: str, count: int) -> list[dict[str, tuple[Any, float]]]:
    """Every intermediate of the first steps, and how far from it a run may be: as the rounded runs are so far."""
    rounded = [run_trajectory(name, _Rounded(seed, dtype), count=count) for seed in range(4)]
    so_far: dict[str, float] = {}
    steps = []
    for want, *moved in zip(run_trajectory(name, Functions(), count=count), *rounded, strict=True):
        expected = dict(_intermediates(want))
        for other in moved:
            for key, value in _intermediates(other):
                so_far[key] = max(so_far.get(key, 0.0), _difference(value, expected[key]))
        steps.append({key: (exact, so_far[key] + 32 * eps(dtype)) for key, exact in expected.items()})
    return steps


def _intermediates(step: Any) -> Iterator[tuple[str, Any]]:
    for name in Step.__dataclass_fields__:
        value = step.get(name) if isinstance(step, Mapping) else getattr(step, name, None)
        if isinstance(value, Mapping):
            yield from ((f"{name}[{key}]", one) for key, one in value.items())
        elif value is not None:
            yield name, value


def _difference(value: Any, expected: Any) -> float:
    value, expected = np.asarray(value), np.asarray(expected)
    if value.shape != expected.shape:
        return math.inf
    return worst(value - expected) / max(float(np.abs(expected).max()), 1e-300)


def _golden(face: Face, case: golden.Case) -> Iterator[tuple[float, float]]:
    """Errors and bounds of one call."""
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


def _share(row: Row) -> float:
    """The error as a share of its bound."""
    return row.error / row.bound if row.bound > 0 else (math.inf if row.error > 0 else 0.0)


def main(backends: Sequence[str], dtypes: Sequence[str], as_json: bool) -> int:
    """`python -m smartreg check`: the exit status, 1 on any failure."""
    status, reports = 0, []
    names, types = zip(*itertools.product(backends or BACKENDS, dtypes or DTYPES[:3]), strict=True)
    # a process for each: a framework may go on with more threads, and two of them share no state
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, dtype, report in zip(names, types, pool.map(_report, names, types), strict=True):
            if isinstance(report, str):
                status |= bool(backends)  # one that was asked for
                print(f"{name}, {dtype}: not checked: {report}", file=sys.stderr if as_json else sys.stdout)
                continue
            reports.append(report)
            status |= not report.ok
            if not as_json:
                print(report, end="\n\n", flush=True)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    return status


def _report(name: str, dtype: str) -> Report | str:
    """A report, or why there is none."""
    if name == "numpy" and dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
        return "NumPy has no such type without the package ml_dtypes"
    try:
        backend = load_backend(name)
    except Exception as error:  # a module of the user's own may raise anything
        return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    return check_backend(backend, dtype, name=name)
