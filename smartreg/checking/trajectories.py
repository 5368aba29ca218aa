"""Algorithm 1 in 14 settings, from one file of weights, batches and noise: compare every intermediate of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartreg.checking.bounds import Row, eps, worst
from smartreg.config import SMARTConfig
from smartreg.reference import Batch, Functions, Parameters, Step, fit_reference

Array = NDArray[Any]

# settings of SMARTConfig, and arguments of fit_reference
TRAJECTORIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),  # Gaussian start, T_x = 1; the others have the same unless they say otherwise
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
    "memory": ({"beta_early": None, "beta_late": None, "memory": 0.4, "proximal_steps": 2}, {}),
    "released code": (
        {"projection": "rescale", "scale": "absolute", "epsilon": 1e-3, "granularity": "token"},
        {},
    ),
    # True: the masks of the file, one a pass
    "dropout": ({"start": "margin", "ascent_steps": 1}, {"dropout": True}),
    "dropout, independent": ({"dropout": "independent", "ascent_steps": 2}, {"dropout": True}),
}


class Trajectory(NamedTuple):
    """What `smartreg/trajectory.npz` holds for a run: the weights, 50 batches and the noise.

    The options, arguments of `fit_reference`, have the dropout masks, too, if the run has dropout.

    Example:
        >>> len(load_trajectory("paper").batches)
        50
    """

    theta: Parameters
    batches: list[Batch]
    config: SMARTConfig
    noise: list[Array]
    options: dict[str, Any]


def load_trajectory(name: str, dtype: str = "float64") -> Trajectory:
    """Load one of `TRAJECTORIES` with its inputs, to run an implementation of your own on it.

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
    with resources.files("smartreg").joinpath("trajectory.npz").open("rb") as file:
        stored = dict(np.load(file))
    arrays = {key: value.astype(dtype) if value.dtype.kind == "f" else value for key, value in stored.items()}
    settings: dict[str, Any] = {"epsilon": 0.2, "sigma": 0.2, "eta": 0.2, "total_steps": len(arrays["ids"])}
    settings |= {"start": "gaussian", "ascent_steps": 1, "lambda_s": 1.0, "mu": 1.0}
    settings |= {"beta_early": 0.5, "beta_late": 0.9, "early_fraction": 0.3}
    config = SMARTConfig(**settings | changes)
    pooled = options.get("pooled", True)
    y = arrays[f"y/{options.get('divergence', 'symmetric_kl')}" + ("" if pooled else "/positions")]
    noise = arrays["noise" if config.start == "gaussian" else "signs"]
    if "dropout" in options:
        options = options | {"dropout": list(arrays["dropout"])}
    return Trajectory(
        {key.removeprefix("theta/"): value for key, value in arrays.items() if key.startswith("theta/")},
        [Batch(*fields) for fields in zip(arrays["ids"], y, arrays["mask"], arrays["sample_weight"], strict=True)],
        config,
        list(noise),
        options,
    )


def run_trajectory(name: str, functions: Functions, dtype: str = "float64", count: int = 50) -> list[Step]:
    """Run the first steps of Algorithm 1 with these functions.

    Example:
        >>> len(run_trajectory("paper", Functions(), count=2))
        2
    """
    theta, batches, config, noise, options = load_trajectory(name, dtype)
    return fit_reference(theta, batches[:count], config, noise, functions=functions, **options)


class _Rounded(Functions):
    """The reference's functions with every output, gradient and step off by some units in the last place."""

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
    """Compare every intermediate of a run with the reference's, in the order in which they are computed.

    The first row that is not `ok` names the step and the intermediate at which the run first differs.

    Args:
        steps: the first steps of the run, up to 50: `Step`s, or dicts or objects with some of its fields. A field that
            is None is not compared.
        name, dtype: which of `TRAJECTORIES`, and the type that the run computed in.

    Raises:
        ValueError: no trajectory of that name, a step with nothing to compare, or more than 50 steps.

    Example:
        >>> all(row.ok for row in compare_steps(run_trajectory("margin", Functions()), "margin"))
        True
    """
    most = len(load_trajectory(name).batches)
    if len(steps) > most:
        raise ValueError(f"compare_steps: {name!r} has {most} steps, got {len(steps)}. Give no more than those")
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
    """Return every intermediate of the first steps, and how far off a run may be: as far as the rounded runs are."""
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
