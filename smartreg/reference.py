"""Algorithm 1 end to end, in NumPy, on a small network with hand-written gradients.

The network looks embeddings up and applies one tanh layer at each position. It reads the outputs off the mean over the
unmasked positions, or at each position:

    x = E[ids],   h = tanh(x W1 + b1),   f(x) = mean_t(h_t) W2 + b2   (or h W2 + b2)

With dropout, h is multiplied by the mask of the pass, which the caller gives.
`fit_reference` trains it and returns every intermediate of every step, to compare another implementation with.

Algorithm 1, with the numbers by which the comments of all backends call its lines (S = `proximal_steps`):

     1  theta~_1 <- theta_0
     2  for t = 1, ..., T:
     3      theta_1 <- theta_{t-1}
     4      for s = 1, ..., S:
     5          sample a mini-batch B
     6          x~ <- x + nu,   nu ~ N(0, sigma^2 I)
     7          for m = 1, ..., T_x:
     8              g~ <- g / ||g||,   g = sum over B of grad_x~ l_s( f(x; theta_s), f(x~; theta_s) )
     9              x~ <- Proj( x~ + eta g~ )
    10          end for
    11          theta_{s+1} <- AdamUpdate_B( theta_s ), of F = L + lambda_s R_s + mu D_Breg
    12      end for
    13      theta_t <- theta_S
    14      theta~_{t+1} <- (1 - beta) theta_t + beta theta~_t
    15  end for
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartreg.config import SMARTConfig
from smartreg.divergences import DIVERGENCES, check_divergence, position_weights, term_weights
from smartreg.perturbation import ascend, output_mask
from smartreg.proximal import bregman_divergence, ema_update, mean_examples, momentum, moves

Array = NDArray[Any]
Parameters = dict[str, Array]
Optimizer = Literal["sgd", "adam_torch", "adam_keras"]


class Batch(NamedTuple):
    """One mini-batch.

    Attributes:
        ids: token ids, (n, tokens).
        y: labels, of the outputs' shape without the class axis (symmetric_kl), or of their shape.
        mask: true at real tokens, (n, tokens), or None.
        sample_weight: w_i, (n,), or None.
    """

    ids: Array
    y: Array
    mask: Array | None = None
    sample_weight: Array | None = None


@dataclass(frozen=True)
class Step:
    """Every intermediate of one optimiser step, in the order in which they are computed.

    Attributes:
        outputs: f(x; theta), before the step.
        loss: L.
        delta: the perturbation, or None if the step has no R_s.
        perturbed_outputs: f(x + delta; theta), or None if the step has no R_s.
        R_s, D_Breg, objective: the terms, 0 if the step has none, and F = L + lambda_s R_s + mu D_Breg. lambda_s is
            `SMARTConfig.smoothness_weight`.
        gradients: of F, by parameter.
        theta: the parameters after the step.
        beta: the beta with which theta~ moved after the step, or None if it did not move.
        teacher: theta~ after the step.
    """

    outputs: Array
    loss: float
    delta: Array | None
    perturbed_outputs: Array | None
    R_s: float
    D_Breg: float
    objective: float
    gradients: Parameters
    theta: Parameters
    beta: float | None
    teacher: Parameters


def init_parameters(
    rng: np.random.Generator, *, vocabulary: int, d: int, hidden: int, outputs: int, dtype: Any = np.float64
) -> Parameters:
    """Draw parameters of the reference network: E (vocabulary, d), W1 (d, hidden), b1, W2 (hidden, outputs), b2.

    Example:
        >>> init_parameters(np.random.default_rng(0), vocabulary=9, d=4, hidden=5, outputs=2)["W2"].shape
        (5, 2)
    """
    shapes = {"E": (vocabulary, d), "W1": (d, hidden), "b1": (hidden,), "W2": (hidden, outputs), "b2": (outputs,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def forward(
    theta: Mapping[str, Array],
    x: Array,
    mask: Array | None = None,
    pooled: bool = True,
    dropout: Array | None = None,
) -> tuple[Array, Callable[[Array], tuple[Parameters, Array]]]:
    """Compute the outputs of embeddings, and the vector-Jacobian product there.

    Args:
        dropout: the multipliers of h, (n, tokens, hidden); None if there is no dropout.

    Returns:
        f(x; theta), and a function from the gradient at the outputs to (the parameters' gradients but E's, x's).

    Example:
        >>> theta = init_parameters(np.random.default_rng(0), vocabulary=9, d=4, hidden=5, outputs=2)
        >>> forward(theta, theta["E"][[[1, 2, 3]]])[0].shape
        (1, 2)
    """
    weight = position_weights(x, mask)  # (n, tokens, 1): 1 / count at each position of the mean, 0 at padding
    h = np.tanh(x @ theta["W1"] + theta["b1"])
    dropped = h if dropout is None else dropout * h
    read = np.sum(weight * dropped, axis=1) if pooled else dropped
    outputs = read @ theta["W2"] + theta["b2"]

    def vjp(grad: Array) -> tuple[Parameters, Array]:
        grad_read = grad @ theta["W2"].T
        grad_h = weight * grad_read[:, None, :] if pooled else grad_read
        grad_z = (grad_h if dropout is None else dropout * grad_h) * (1 - h * h)
        gradients = {
            "W1": np.tensordot(x, grad_z, axes=((0, 1), (0, 1))),
            "b1": grad_z.sum(axis=(0, 1)),
            "W2": read.reshape(-1, read.shape[-1]).T @ grad.reshape(-1, grad.shape[-1]),
            "b2": grad.reshape(-1, grad.shape[-1]).sum(axis=0),
        }
        return gradients, grad_z @ theta["W1"].T

    return outputs, vjp


def task_loss(
    outputs: Array,
    y: Array,
    divergence: str,
    mask: Array | None = None,
    sample_weight: Array | None = None,
) -> tuple[float, Array]:
    """Compute L and its gradient at the outputs: cross-entropy, binary cross-entropy or squared error, as l_s is.

    It is averaged over positions and examples as R_s is: L = 1/n sum_i w_i loss_i.

    Example:
        >>> task_loss(np.array([[2.0]]), np.array([[1.0]]), "squared_error")
        (1.0, array([[2.]]))
    """
    if divergence == "symmetric_kl":
        shifted = outputs - outputs.max(axis=-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        onehot = np.eye(outputs.shape[-1], dtype=outputs.dtype)[y]
        losses, grad = -(onehot * log_p).sum(axis=-1), np.exp(log_p) - onehot
    elif divergence == "bernoulli_symmetric_kl":
        losses = (np.logaddexp(0, outputs) - y * outputs).sum(axis=-1)
        grad = np.exp(-np.logaddexp(0, -outputs)) - y
    else:
        losses, grad = ((outputs - y) ** 2).sum(axis=-1), 2 * (outputs - y)
    weight = position_weights(outputs, output_mask(outputs, mask))
    per_example = (losses * weight[..., 0]).reshape(len(losses), -1).sum(axis=1)
    return mean_examples(per_example, sample_weight), grad * weight * _example_weights(outputs, sample_weight)


class Functions:
    """What `fit_reference` computes with: here the reference's own functions.

    Example:
        >>> Functions().ema_update({"b": np.zeros(1)}, {"b": np.ones(1)}, 0.9)
        {'b': array([0.1])}
    """

    momentum = staticmethod(momentum)
    ema_update = staticmethod(ema_update)
    bregman_divergence = staticmethod(bregman_divergence)

    def value(self, divergence: str, a: Array, b: Array, mask: Any = None) -> Array:
        """Compute l_s(a, b), (n,)."""
        return DIVERGENCES[divergence].value(a, b, mask)

    def grad(self, divergence: str, a: Array, b: Array, mask: Any = None) -> tuple[Array, Array]:
        """Compute the gradients of l_s(a, b) with respect to both."""
        return DIVERGENCES[divergence].grad(a, b, mask)

    def ascend(
        self,
        theta: Parameters,
        x: Array,
        outputs: Array,
        config: SMARTConfig,
        noise: Array | None,
        mask: Array | None,
        divergence: str,
        pooled: bool,
        dropout: Sequence[Array | None] | None = None,
    ) -> Array:
        """Compute delta of the reference network.

        Args:
            dropout: the multipliers of h in each pass of the ascent, the margin start's first; None: no dropout.
        """
        masks = in_turn(dropout)

        def to_outputs(perturbed: Array) -> tuple[Array, Callable[[Array], Array]]:
            outputs, vjp = forward(theta, perturbed, mask, pooled, next(masks))
            return outputs, lambda grad: vjp(grad)[1]

        return ascend(to_outputs, x, outputs, config, noise, mask, divergence)


def in_turn(dropout: Sequence[Array | None] | None) -> Iterator[Array | None]:
    """Yield one mask for each pass; None for ever without dropout, ValueError after the last mask.

    Example:
        >>> masks = in_turn([np.ones(2)])
        >>> next(masks)
        array([1., 1.])
    """
    if dropout is None:
        yield from itertools.repeat(None)
    else:
        yield from dropout
        raise ValueError(
            f"ascend: the network ran more than {len(dropout)} times, and each pass has a mask of its own. Give a "
            "mask for each pass"
        )


def fit_reference(
    theta: Mapping[str, Array],
    batches: Sequence[Batch],
    config: SMARTConfig,
    noise: Sequence[Array | None] | None = None,
    *,
    divergence: str = "symmetric_kl",
    optimizer: Optimizer = "adam_torch",
    learning_rate: float = 1e-2,
    pooled: bool = True,
    dropout: Sequence[Array] | None = None,
    functions: Functions | None = None,
) -> list[Step]:
    """Train the reference network by Algorithm 1, one optimiser step a batch.

    Args:
        theta: parameters as `init_parameters` names them; they are not changed.
        batches: the mini-batches, in order.
        noise: one array a step, as `ascend` takes it; None if the ascent needs none.
        divergence: the name of l_s, which also chooses the task loss.
        optimizer: "sgd", or Adam (0.9, 0.999, 1e-8) with its epsilon added after ("adam_torch") or before
            ("adam_keras") the bias correction.
        pooled: one output an example; False gives one a position.
        dropout: one array a step, (passes, n, tokens, hidden): the multipliers of h in the clean pass, in those of the
            ascent, T_x, and in the last. With `config.dropout` "shared" all passes have the first. None: no dropout.
        functions: what it computes with; `smartreg.checking` gives another backend's.

    Returns:
        one `Step` a batch.

    Source: paper, Algorithm 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> theta = init_parameters(rng, vocabulary=9, d=4, hidden=5, outputs=2)
        >>> batch = Batch(ids=rng.integers(9, size=(3, 6)), y=np.array([0, 1, 1]))
        >>> steps = fit_reference(theta, [batch] * 2, SMARTConfig.paper(total_steps=2), rng.normal(size=(2, 3, 6, 4)))
        >>> [step.beta for step in steps]
        [0.999, 0.999]
    """
    check_divergence("fit_reference", divergence)
    config.check_total_steps("fit_reference")
    f = Functions() if functions is None else functions
    update = _Update(optimizer, learning_rate)
    theta = {name: np.array(value) for name, value in theta.items()}
    teacher = f.ema_update(theta, theta, 1.0)  # line 1, in float32 or wider
    steps = []
    for t, batch in enumerate(batches, start=1):  # lines 2 to 4: t counts the optimiser steps
        nu = None if noise is None else noise[t - 1]
        lambda_s = config.smoothness_weight(t - 1)
        masks = pass_masks(None if dropout is None else dropout[t - 1], config)
        done = smart_step(theta, teacher, batch, config, lambda_s, nu, update, f, divergence, pooled, masks)
        theta = done.theta
        if moves(t, config):  # lines 12 to 14
            beta = f.momentum(t, config)
            teacher = f.ema_update(teacher, theta, beta)
            done = replace(done, beta=beta, teacher=teacher)
        steps.append(done)
    return steps


def pass_masks(dropout: Array | None, config: SMARTConfig) -> list[Array] | None:
    """Return the dropout masks of the clean pass, of the T_x passes of the ascent and of the last; None without any.

    Raises:
        ValueError: too few are given.

    Example:
        >>> len(pass_masks(np.ones((1, 2, 3)), SMARTConfig(start="gaussian")))
        3
    """
    if dropout is None:
        return None
    passes = config.ascent_steps + 2
    if config.dropout == "shared":
        return [dropout[0]] * passes
    if len(dropout) < passes:
        raise ValueError(
            f"fit_reference: expected {passes} dropout masks, one for each pass of a step, got {len(dropout)}"
        )
    return list(dropout[:passes])


def smart_step(
    theta: Parameters,
    teacher: Parameters,
    batch: Batch,
    config: SMARTConfig,
    lambda_s: float,
    noise: Array | None,
    update: Callable[[Parameters, Parameters], Parameters],
    f: Functions,
    divergence: str,
    pooled: bool,
    masks: list[Array] | None = None,
) -> Step:
    """Take one optimiser step on a mini-batch: theta <- Update( grad_theta [ L + lambda_s R_s + mu D_Breg ] ).

    Source: paper, equations 1 to 3 and Algorithm 1, lines 5 to 11.

    Example:
        >>> theta = init_parameters(np.random.default_rng(0), vocabulary=9, d=4, hidden=3, outputs=2)
        >>> batch = Batch(np.array([[1, 2]]), np.array([0]))
        >>> config = SMARTConfig(start="gaussian", sigma=0.01, total_steps=1)
        >>> kept = lambda theta, gradients: theta
        >>> how = {"update": kept, "f": Functions(), "divergence": "symmetric_kl", "pooled": True}
        >>> step = smart_step(theta, theta, batch, config, lambda_s=1.0, noise=np.ones((1, 2, 4)), **how)
        >>> bool(step.R_s > 0), float(step.D_Breg)
        (True, 0.0)
    """
    ids, y, mask, sample_weight = batch  # line 5
    x = theta["E"][ids]
    clean, last = (None, None) if masks is None else (masks[0], masks[-1])
    targets, vjp = forward(theta, x, mask, pooled, clean)  # f(x; theta)
    positions, weight = output_mask(targets, mask), _example_weights(targets, sample_weight)
    loss, grad = task_loss(targets, y, divergence, mask, sample_weight)
    objective, r_s, d_breg = loss, 0.0, 0.0
    lambda_s, mu = term_weights(config, lambda_s, [divergence])
    delta = perturbed = perturbed_gradients = None
    if lambda_s > 0:
        ascent = None if masks is None else masks[not config.needs_clean_graph : -1]  # the margin start's is clean
        delta = f.ascend(theta, x, targets, config, noise, mask, divergence, pooled, ascent)  # lines 6 to 10
        perturbed, perturbed_vjp = forward(theta, x + delta, mask, pooled, last)  # f(x + delta; theta)
        r_s = mean_examples(f.value(divergence, perturbed, targets, positions), sample_weight)
        grad_perturbed, grad_target = f.grad(divergence, perturbed, targets, positions)
        perturbed_gradients = perturbed_vjp(lambda_s * weight * grad_perturbed)  # R_s has gradients through both
        grad = grad + lambda_s * weight * grad_target
        objective = objective + lambda_s * r_s
    if mu > 0:
        taught, _ = forward(teacher, teacher["E"][ids], mask, pooled, clean)  # f(x; theta~), theta~ of line 14
        d_breg = f.bregman_divergence(targets, taught, divergence, mask, sample_weight)
        grad = grad + mu * weight * f.grad(divergence, targets, taught, positions)[0]
        objective = objective + mu * d_breg
    gradients = _parameter_gradients(theta, ids, vjp(grad), perturbed_gradients)
    theta = update(theta, gradients)  # line 11
    return Step(targets, loss, delta, perturbed, r_s, d_breg, objective, gradients, theta, None, teacher)


def _parameter_gradients(
    theta: Parameters, ids: Array, clean: tuple[Parameters, Array], perturbed: tuple[Parameters, Array] | None
) -> Parameters:
    """Add the gradients of the two passes up; the one of x goes to the rows of E that were looked up."""
    gradients, grad_x = clean
    if perturbed is not None:
        gradients = {name: g + perturbed[0][name] for name, g in gradients.items()}
        grad_x = grad_x + perturbed[1]
    gradients["E"] = np.zeros_like(theta["E"])
    np.add.at(gradients["E"], ids, grad_x)
    return gradients


def _example_weights(outputs: Array, sample_weight: Array | None) -> Array:
    """Return w_i / n, to be multiplied with the outputs."""
    n = len(outputs)
    weight = np.ones(n) if sample_weight is None else np.asarray(sample_weight)
    return (weight / n).astype(outputs.dtype).reshape((n,) + (1,) * (outputs.ndim - 1))


class _Update:
    """SGD, or Adam (Kingma and Ba 2015, algorithm 1) with its epsilon as in PyTorch or as in Keras."""

    def __init__(self, optimizer: Optimizer, learning_rate: float) -> None:
        if optimizer not in ("sgd", "adam_torch", "adam_keras"):
            raise ValueError(f"optimizer must be 'sgd', 'adam_torch' or 'adam_keras', got {optimizer!r}")
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.m: Parameters = {}
        self.v: Parameters = {}
        self.t = 0

    def __call__(self, theta: Parameters, gradients: Parameters) -> Parameters:
        self.t += 1
        return {name: value - self._step(name, gradients[name]) for name, value in theta.items()}

    def _step(self, name: str, g: Array) -> Array:
        if self.optimizer == "sgd":
            return self.learning_rate * g
        beta_1, beta_2, epsilon = 0.9, 0.999, 1e-8
        m = self.m[name] = beta_1 * self.m.get(name, np.zeros_like(g)) + (1 - beta_1) * g
        v = self.v[name] = beta_2 * self.v.get(name, np.zeros_like(g)) + (1 - beta_2) * g * g
        rate = self.learning_rate / (1 - beta_1**self.t)
        correction = math.sqrt(1 - beta_2**self.t)  # a NumPy scalar would make float32 float64
        after = self.optimizer == "adam_torch"
        step: Array = rate * m / (np.sqrt(v) / correction + (epsilon if after else epsilon / correction))
        return step
