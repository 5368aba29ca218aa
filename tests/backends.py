"""One face for every backend: its pure functions, called with and giving NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from smartreg import SMARTConfig


class NumPy:
    name = "numpy"

    def __init__(self) -> None:
        from smartreg import divergences, perturbation, proximal

        self.divergences, self.perturbation, self.proximal = divergences, perturbation, proximal

    def value(self, divergence: str, a: Any, b: Any, mask: Any = None) -> np.ndarray:
        return self.divergences.DIVERGENCES[divergence].value(a, b, mask)

    def grad(self, divergence: str, a: Any, b: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        return self.divergences.DIVERGENCES[divergence].grad(a, b, mask)

    def call(self, function: str, *arrays: Any, **settings: Any) -> np.ndarray:
        return getattr(self.perturbation, function)(*arrays, **settings)

    def ascend_tanh(
        self, x: Any, w1: Any, w2: Any, config: SMARTConfig, noise: Any, mask: Any, divergence: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """delta and f(x + delta), for f(x) = sum_t tanh(x W1) W2; 0 for an x that is not finite, its gradient NaN."""

        def forward(x: Any) -> Any:
            finite = np.isfinite(x)
            h = np.tanh(np.where(finite, x, 0) @ w1)
            return h.sum(1) @ w2, lambda g: np.where(finite, ((g @ w2.T)[:, None, :] * (1 - h * h)) @ w1.T, np.nan)

        delta = self.perturbation.ascend(forward, x, forward(x)[0], config, noise, mask, divergence)
        return delta, forward(x + delta)[0]


class Torch:
    name = "torch"

    def __init__(self) -> None:
        import torch

        from smartreg_torch import divergences, perturbation, proximal

        self.torch = torch
        self.divergences, self.perturbation, self.proximal = divergences, perturbation, proximal

    def tensor(self, value: Any) -> Any:
        return self.torch.from_numpy(np.array(value)) if isinstance(value, (np.ndarray, np.generic, list)) else value

    def value(self, divergence: str, a: Any, b: Any, mask: Any = None) -> np.ndarray:
        return self.divergences.DIVERGENCES[divergence](self.tensor(a), self.tensor(b), self.tensor(mask)).numpy()

    def grad(self, divergence: str, a: Any, b: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.tensor(a).requires_grad_(), self.tensor(b).requires_grad_()
        value = self.divergences.DIVERGENCES[divergence](a, b, self.tensor(mask))
        return tuple(g.numpy() for g in self.torch.autograd.grad(value.sum(), (a, b)))

    def call(self, function: str, *arrays: Any, **settings: Any) -> np.ndarray:
        settings = {name: self.tensor(value) for name, value in settings.items()}
        return getattr(self.perturbation, function)(*map(self.tensor, arrays), **settings).numpy()

    def ascend_tanh(
        self, x: Any, w1: Any, w2: Any, config: SMARTConfig, noise: Any, mask: Any, divergence: str
    ) -> tuple[np.ndarray, np.ndarray]:
        x, w1, w2, noise, mask = map(self.tensor, (x, w1, w2, noise, mask))

        def forward(x: Any) -> Any:
            x = (x * (0 * x).exp()).where(x.isfinite(), 0)  # the factor is 1, and spoils the gradient of a NaN
            return (x @ w1).tanh().sum(1) @ w2

        delta = self.perturbation.ascend(forward, x, forward(x), config, noise, mask, divergence)
        return delta.numpy(), forward(x + delta).numpy()


class TensorFlow:
    name = "tf"

    def __init__(self) -> None:
        import tensorflow

        from smartreg_tf import divergences, perturbation, proximal

        self.tf = tensorflow
        self.divergences, self.perturbation, self.proximal = divergences, perturbation, proximal

    def tensor(self, value: Any) -> Any:
        return self.tf.constant(value) if isinstance(value, (np.ndarray, np.generic, list)) else value

    def value(self, divergence: str, a: Any, b: Any, mask: Any = None) -> np.ndarray:
        return self.divergences.DIVERGENCES[divergence].value(*map(self.tensor, (a, b, mask))).numpy()

    def grad(self, divergence: str, a: Any, b: Any, mask: Any = None) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.tensor(a), self.tensor(b)
        with self.tf.GradientTape() as tape:
            tape.watch((a, b))
            value = self.divergences.DIVERGENCES[divergence].value(a, b, self.tensor(mask))
        return tuple(g.numpy() for g in tape.gradient(value, (a, b)))

    def call(self, function: str, *arrays: Any, **settings: Any) -> np.ndarray:
        settings = {name: self.tensor(value) for name, value in settings.items()}
        return getattr(self.perturbation, function)(*map(self.tensor, arrays), **settings).numpy()

    def ascend_tanh(
        self, x: Any, w1: Any, w2: Any, config: SMARTConfig, noise: Any, mask: Any, divergence: str
    ) -> tuple[np.ndarray, np.ndarray]:
        x, w1, w2, noise, mask = map(self.tensor, (x, w1, w2, noise, mask))

        def forward(x: Any) -> Any:
            x = self.tf.where(self.tf.math.is_finite(x), x * self.tf.exp(0 * x), 0)  # as in PyTorch
            return self.tf.reduce_sum(self.tf.tanh(x @ w1), 1) @ w2

        delta = self.perturbation.ascend(forward, x, forward(x), config, noise, mask, divergence)
        return delta.numpy(), forward(x + delta).numpy()


def load(name: str) -> Any:
    return {"numpy": NumPy, "torch": Torch, "tf": TensorFlow}[name]()
