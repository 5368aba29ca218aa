"""NumPy and the backends side by side: some steps of SMART in float64, from the same start."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smartreg.demo.digits import (
    BATCH,
    CONFIG,
    PARAMETERS,
    Array,
    Digits,
    Weights,
    batches,
    few_labels,
    forward,
    initial_weights,
    standard_normal,
)
from smartreg.divergences import symmetric_kl, symmetric_kl_grad
from smartreg.perturbation import ascend
from smartreg.proximal import ema_update, mean_examples, momentum
from smartreg.reference import task_loss

STEPS, RATE = 20, 0.125  # a power of 2, because Keras rounds the rate to float32
Outcome = dict[str, Array]


class Task(NamedTuple):
    """The start of every backend in float64: weights, and for each step an array of images, labels and noise."""

    weights: Weights
    x: Array
    y: Array
    noise: Array


def same_task(data: Digits, pretrained: Weights, a_class: int) -> Task:
    """Draw the start that all backends have."""
    x, y = few_labels(data, a_class, seed=0)
    at = np.stack(list(batches(len(x), BATCH, STEPS, seed=0)))
    weights = {name: array.astype(np.float64) for name, array in initial_weights(pretrained, seed=0).items()}
    noise = standard_normal(0)((*at.shape, x.shape[1])).astype(np.float64)
    return Task(weights, x[at].astype(np.float64), y[at], noise)


def outcome(terms: list[tuple[float, float, float]], weights: list[Array], teacher: list[Array]) -> Outcome:
    """Arrange F, R_s and D_Breg by step, and the final weights and theta~ in one row each, ordered as PARAMETERS."""
    theta = {"|theta|": weights, "|theta~|": teacher}
    rows = {name: np.concatenate([value.ravel() for value in values]) for name, values in theta.items()}
    return dict(zip(("loss", "R_s", "D_Breg"), np.array(terms).T, strict=True)) | rows


def gradients(
    theta: Weights, teacher: Weights, x: Array, y: Array, noise: Array
) -> tuple[tuple[float, float, float], Weights]:
    """Return F = L + lambda_s R_s + mu D_Breg, R_s and D_Breg, and the gradients of F."""

    def to_pixels(point: Array) -> tuple[Array, Callable[[Array], Array]]:
        outputs, _, vjp = forward(theta, point)
        return outputs, vjp

    z, vjp, _ = forward(theta, x)
    z_delta, vjp_delta, _ = forward(theta, x + ascend(to_pixels, x, z, CONFIG, noise))
    z_teacher = forward(teacher, x)[0]
    loss, g = task_loss(z, y, "symmetric_kl")
    R_s, D_Breg = (mean_examples(symmetric_kl(a, z)) for a in (z_delta, z_teacher))
    g_delta, g_clean = symmetric_kl_grad(z_delta, z)
    _, g_teacher = symmetric_kl_grad(z_teacher, z)
    clean = vjp(g + (CONFIG.lambda_s * g_clean + CONFIG.mu * g_teacher) / len(x))
    perturbed = vjp_delta(CONFIG.lambda_s * g_delta / len(x))
    terms = loss + CONFIG.lambda_s * R_s + CONFIG.mu * D_Breg, R_s, D_Breg
    return terms, {name: clean[name] + perturbed[name] for name in theta}


def run(task: Task) -> Outcome:
    """Train in NumPy, with gradient descent."""
    theta = teacher = task.weights
    terms = []
    for step, batch in enumerate(zip(task.x, task.y, task.noise, strict=True), start=1):
        values, g = gradients(theta, teacher, *batch)
        theta = {name: value - RATE * g[name] for name, value in theta.items()}
        teacher = ema_update(teacher, theta, momentum(step, CONFIG))
        terms.append(values)
    return outcome(terms, [theta[name] for name in PARAMETERS], [teacher[name] for name in PARAMETERS])


def difference(runs: list[Array]) -> float:
    """Return the largest difference between any two, in any step or weight, as a fraction of the largest value."""
    values = np.array(runs)
    return float(np.ptp(values, axis=0).max() / np.abs(values).max())


def summary(name: str, values: Array) -> float:
    """Return the length of a row of weights, or the value of the last step."""
    return float(np.linalg.norm(values) if name.startswith("|") else values[-1])
