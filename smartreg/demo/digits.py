"""The demo's task: digits, a network in NumPy, and how the networks are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartreg.config import SMARTConfig
from smartreg.divergences import symmetric_kl
from smartreg.perturbation import ascend
from smartreg.proximal import mean_examples

Array = NDArray[Any]
Weights = dict[str, Array]
Train = Callable[[Weights, Array, Array, SMARTConfig, int], Weights]

NEW_CLASSES = (7, 8, 9)  # not in the pre-training
HIDDEN, DROPOUT = 128, 0.2
PARAMETERS = ("W1", "b1", "W2", "b2", "W3", "b3")
PRETRAINING_STEPS, STEPS, BATCH = 300, 300, 20
LEARNING_RATE = 1e-3
# Pixels are in [0, 1], and scale="absolute" gives the radius in their units. With beta = 0.9 theta~ remembers about ten
# steps. With the published 0.999 it would stay at the random new head in a run of 300 steps, and keep the model there.
CONFIG = SMARTConfig(
    scale="absolute",
    epsilon=0.1,
    sigma=0.1,
    eta=10.0,
    start="gaussian",
    ascent_steps=1,
    lambda_s=1.0,
    mu=1.0,
    beta_early=0.9,
    beta_late=0.9,
    total_steps=STEPS,
)
METHODS = {"plain": CONFIG.replace(lambda_s=0, mu=0), "SMART": CONFIG}
RADII = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
ATTACK_STEPS, ATTACK_STARTS = 20, 4


class Digits(NamedTuple):
    """Images of 8 x 8 as rows of 64 pixels in [0, 1], and their labels."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array


def digits() -> Digits:
    """Load scikit-learn's digits, 40% of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.data / 16).astype(np.float32), data.target, test_size=0.4, stratify=data.target, random_state=0
    )
    return Digits(x, y, x_test, y_test)


def few_labels(data: Digits, a_class: int, seed: int) -> tuple[Array, Array]:
    """Draw `a_class` training images of each digit, by seed."""
    rng = np.random.default_rng(seed)
    at = np.concatenate([rng.permutation(np.flatnonzero(data.y == k))[:a_class] for k in range(10)])
    return data.x[at], data.y[at]


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[Array]:
    """Yield the row numbers of each step's batch, in epochs of random order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(n) for _ in range(-(-steps * size // n))])
    yield from (order[k * size : (k + 1) * size] for k in range(steps))


def standard_normal(seed: int) -> Callable[[tuple[int, ...]], Array]:
    """Return a function that draws the noise of the Gaussian start."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def pretrain(data: Digits, train: Train) -> Weights:
    """Train on the digits that are not new. Return the two hidden layers."""
    rng = np.random.default_rng(0)
    shapes = {"1": (64, HIDDEN), "2": (HIDDEN, HIDDEN), "3": (HIDDEN, 10)}
    weights: Weights = {}
    for k, (n_in, n_out) in shapes.items():
        weights[f"W{k}"] = rng.normal(scale=(2 / n_in) ** 0.5, size=(n_in, n_out)).astype(np.float32)
        weights[f"b{k}"] = np.zeros(n_out, np.float32)
    known = ~np.isin(data.y, NEW_CLASSES)
    trained = train(weights, data.x[known], data.y[known], METHODS["plain"].replace(total_steps=PRETRAINING_STEPS), 0)
    return {name: trained[name] for name in PARAMETERS[:4]}


def initial_weights(pretrained: Weights, seed: int) -> Weights:
    """Put a new head for ten classes on the pre-trained layers. Every fine-tuning of that seed begins there."""
    rng = np.random.default_rng(seed)
    head = rng.normal(scale=HIDDEN**-0.5, size=(HIDDEN, 10)).astype(np.float32)
    return {**pretrained, "W3": head, "b3": np.zeros(10, np.float32)}


def forward(theta: Weights, x: Array) -> tuple[Array, Callable[[Array], Weights], Callable[[Array], Array]]:
    """Return the logits, and functions from the gradient there to those of the weights and to that of the pixels."""
    h1 = np.maximum(x @ theta["W1"] + theta["b1"], 0)
    h2 = np.maximum(h1 @ theta["W2"] + theta["b2"], 0)

    def to_hidden(g: Array) -> tuple[Array, Array]:
        g2 = g @ theta["W3"].T * (h2 > 0)
        return g2 @ theta["W2"].T * (h1 > 0), g2

    def to_weights(g: Array) -> Weights:
        g1, g2 = to_hidden(g)
        gradients = {"W1": x.T @ g1, "W2": h1.T @ g2, "W3": h2.T @ g}
        return gradients | {"b1": g1.sum(0), "b2": g2.sum(0), "b3": g.sum(0)}

    def to_pixels(g: Array) -> Array:
        return to_hidden(g)[0] @ theta["W1"].T

    return h2 @ theta["W3"] + theta["b3"], to_weights, to_pixels


def worst(theta: Weights, x: Array, y: Array, radius: float) -> Array:
    """Return x + delta, ||delta||_inf <= radius, that is misread, or else has the largest cross-entropy found.

    This is sign ascent. It uses the labels and nothing of SMART. The first start is x, the others are uniform in the
    ball, and attack the images that are still read correctly.
    """
    rng = np.random.default_rng(0)
    found, largest, misread = x.copy(), np.full(len(y), -np.inf), np.zeros(len(y), bool)
    for restart in range(ATTACK_STARTS):
        rows = np.flatnonzero(~misread)
        delta = np.float32(radius * (restart > 0)) * (2 * rng.random(x.shape, np.float32) - 1)[rows]
        for step in range(ATTACK_STEPS + 1):
            point = x[rows] + delta
            z, _, to_pixels = forward(theta, point)
            shifted = z - z.max(-1, keepdims=True)
            exponential = np.exp(shifted)
            total = exponential.sum(-1, keepdims=True)
            at = np.arange(len(rows)), y[rows]
            losses = np.log(total[:, 0]) - shifted[at]
            p = exponential / total
            p[at] -= 1  # the gradient of the cross-entropy
            wrong = z.argmax(-1) != y[rows]
            better = (wrong & ~misread[rows]) | ((wrong == misread[rows]) & (losses > largest[rows]))
            found[rows[better]], largest[rows[better]] = point[better], losses[better]
            misread[rows] |= wrong
            # long steps first, to search, and short ones last, to settle
            length = radius * (0.5 - 0.45 * step / ATTACK_STEPS)
            delta = np.clip(delta + np.float32(length) * np.sign(to_pixels(p)), -radius, radius).astype(np.float32)
    return found


def read(theta: Weights, x: Array) -> Array:
    """Return the digit that the network reads in each image."""
    labels: Array = forward(theta, x)[0].argmax(-1)
    return labels


def roughness(theta: Weights, x: Array) -> float:
    """Compute R_s on x in the ball of CONFIG, with ten ascent steps from the margin start."""
    hard = CONFIG.replace(start="margin", ascent_steps=10)

    def to_pixels(point: Array) -> tuple[Array, Callable[[Array], Array]]:
        z, _, vjp = forward(theta, point)
        return z, vjp

    z = forward(theta, x)[0]
    delta = ascend(to_pixels, x, z, hard, None)
    return mean_examples(symmetric_kl(forward(theta, x + delta)[0], z))
