"""The divergences l_s of the paper, their gradients, and how both are averaged over positions (docs/math.md).

Every function takes outputs of shape (n, ..., C), the last axis being the classes, labels or values, and gives one
number an example, (n,): the sum over the last axis, averaged over the positions between (those the mask leaves).
Float32 and float64 are computed as they come, narrower types in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from smartreg.config import SMARTConfig

Array = NDArray[Any]


class Divergence(NamedTuple):
    """A divergence l_s and its gradient, as the rest of the package calls them.

    Attributes:
        of_logits: whether its outputs are logits. Values have no decision boundary: the margin start moves them by a
            random sign.
    """

    value: Callable[..., Array]
    grad: Callable[..., tuple[Array, Array]]
    of_logits: bool = False


def symmetric_kl(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Return the symmetrised KL divergence of the distributions softmax(a) and softmax(b).

    J(a, b) = KL(P||Q) + KL(Q||P) = sum_c (p_c - q_c) (log p_c - log q_c)

    Args:
        a, b: logits, (n, ..., C). A class that is -inf in both takes no part; in one of them, J is inf.
        mask: which positions count, (n, ...) without the class axis.

    Returns:
        (n,), at least 0; relative error <= 1e-5 in float32 and 1e-12 in float64.

    Raises:
        ValueError: the shapes differ, or there is no class axis.

    Source: paper, section 3.1.

    Example:
        >>> symmetric_kl([[0.0, 1e-5]], [[0.0, 0.0]]).round(16)
        array([2.5e-11])
    """
    a, b = _pair("symmetric_kl", a, b)
    return mean_positions(_symmetric_kl_terms(a, b)[0], mask)


def symmetric_kl_grad(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> tuple[Array, Array]:
    """Return the gradients of `symmetric_kl` with respect to both arguments.

    dJ/da = p (r - E_p r) + (p - q),   dJ/db = q (E_q r - r) + (q - p),   r = log p - log q

    The row sums to 0; relative error, to the row's largest entry, as `symmetric_kl`'s.

    Example:
        >>> symmetric_kl_grad([[0.0, 0.0]], [[0.0, 0.0]])[0]
        array([[0., 0.]])
    """
    a, b = _pair("symmetric_kl_grad", a, b)
    _, p, q, p_minus_q, d_from = _symmetric_kl_terms(a, b)
    # r - E_p r = d - E_p d; d is centred anew, exact near the largest p as it was near the largest q
    d_p = d_from(np.argmax(a, axis=-1, keepdims=True))
    d_q = d_from(np.argmax(b, axis=-1, keepdims=True))
    grad_a = p * (d_p - _sum(p * d_p)) + p_minus_q
    grad_b = q * (_sum(q * d_q) - d_q) - p_minus_q
    return _mean_grad(grad_a, mask), _mean_grad(grad_b, mask)


def bernoulli_symmetric_kl(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Return the symmetrised KL divergence of independent Bernoullis with logits a and b, summed over the labels.

    J(a, b) = sum_k (sigma(a_k) - sigma(b_k)) (a_k - b_k)

    Args, Returns, Raises: as `symmetric_kl`, with labels for classes.

    Source: paper, section 3.1, for each label.

    Example:
        >>> bernoulli_symmetric_kl([[0.0, 2.0]], [[0.0, 2.0]])
        array([0.])
    """
    a, b = _pair("bernoulli_symmetric_kl", a, b)
    d, difference = _bernoulli_terms(a, b)
    with np.errstate(over="ignore"):  # logits of 1e38 are infinitely far apart
        return mean_positions(_sum(difference * d)[..., 0], mask)


def bernoulli_symmetric_kl_grad(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> tuple[Array, Array]:
    """Return the gradients of `bernoulli_symmetric_kl`: dJ/da = sigma'(a) d + sigma(a) - sigma(b), d = a - b.

    Example:
        >>> bernoulli_symmetric_kl_grad([[1.0]], [[1.0]])[1]
        array([[-0.]])
    """
    a, b = _pair("bernoulli_symmetric_kl_grad", a, b)
    d, difference = _bernoulli_terms(a, b)
    return (
        _mean_grad(_sigmoid(a) * _sigmoid(-a) * d + difference, mask),
        -_mean_grad(_sigmoid(b) * _sigmoid(-b) * d + difference, mask),
    )


def squared_error(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Return the squared error, for regression: sum_k (a_k - b_k)^2.

    Args, Returns, Raises: as `symmetric_kl`, with values for classes.

    Source: paper, section 3.1.

    Example:
        >>> squared_error([[1.0], [3.0]], [[1.0], [1.0]])
        array([0., 4.])
    """
    a, b = _pair("squared_error", a, b)
    return mean_positions(_sum((a - b) ** 2)[..., 0], mask)


def squared_error_grad(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> tuple[Array, Array]:
    """Return the gradients of `squared_error`: 2 (a - b) and 2 (b - a).

    Example:
        >>> squared_error_grad([[3.0]], [[1.0]])[0]
        array([[4.]])
    """
    a, b = _pair("squared_error_grad", a, b)
    grad = _mean_grad(2 * (a - b), mask)
    return grad, -grad


DIVERGENCES: dict[str, Divergence] = {
    "symmetric_kl": Divergence(symmetric_kl, symmetric_kl_grad, of_logits=True),
    "bernoulli_symmetric_kl": Divergence(bernoulli_symmetric_kl, bernoulli_symmetric_kl_grad, of_logits=True),
    "squared_error": Divergence(squared_error, squared_error_grad),
}


def takes_logits(name: str) -> bool:
    """Tell whether the divergence of that name compares logits, not values.

    Example:
        >>> takes_logits("squared_error")
        False
    """
    return DIVERGENCES[name].of_logits


def term_weights(config: SMARTConfig, lambda_s: float, names: Iterable[str]) -> tuple[float, float]:
    """Return the weights of R_s and D_Breg in a step whose outputs are compared by these l_s.

    Args:
        lambda_s: of this step: `config.smoothness_weight`.

    Example:
        >>> from smartreg.config import SMARTConfig
        >>> term_weights(SMARTConfig(mu=2), 1.0, ["squared_error"])
        (0.1, 2.0)
    """
    logits = [takes_logits(name) for name in names]
    shares = config.regression_share("lambda_s", logits), config.regression_share("mu", logits)
    return lambda_s * shares[0], config.mu * shares[1]


def check_divergence(call: str, name: str) -> None:
    """Raise ValueError, naming `call`, if no divergence has that name.

    Example:
        >>> check_divergence("ascend", "squared_error")
    """
    if name not in list(DIVERGENCES):
        raise ValueError(f"{call}: divergence must be one of {', '.join(map(repr, DIVERGENCES))}, got {name!r}")


def mean_positions(values: Array, mask: ArrayLike | None = None) -> Array:
    """Return the mean of (n, ...) over all axes but the first, where the mask is true; 0 if it is true nowhere.

    Example:
        >>> mean_positions(np.array([[1.0, 2.0, 9.0]]), [[1, 1, 0]])
        array([1.5])
    """
    weights = position_weights(values[..., None], mask)[..., 0]
    return np.sum(np.where(weights > 0, values, 0) * weights, axis=tuple(range(1, values.ndim)), dtype=values.dtype)


def _mean_grad(grad: Array, mask: ArrayLike | None) -> Array:
    """Return the gradient of `mean_positions` from each position's: exactly 0 where the mask is false, NaN or not."""
    weights = position_weights(grad, mask)
    result: Array = np.where(weights > 0, grad, 0) * weights
    return result


def position_weights(outputs: Array, mask: ArrayLike | None) -> Array:
    """Return the weight of each position of (n, ..., C) in its example's mean, (n, ..., 1); they add up to 1.

    Example:
        >>> position_weights(np.zeros((1, 3, 2)), [[1, 1, 0]])[0, :, 0]
        array([0.5, 0.5, 0. ])
    """
    shape = outputs.shape[:-1]
    keep = np.ones(shape, bool) if mask is None else np.asarray(mask) != 0
    if keep.shape != shape:
        raise ValueError(f"the mask must have the outputs' shape without the last axis, {shape}, got {keep.shape}")
    axes = tuple(range(1, len(shape)))
    count = np.maximum(keep.sum(axis=axes, keepdims=True), 1)
    weights: Array = (keep / count)[..., None].astype(outputs.dtype)
    return weights


def _pair(call: str, a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"{call}: expected two arrays of one shape (n, ..., C), got {a.shape} and {b.shape}")
    dtype = np.result_type(a, b, np.float32)
    return a.astype(dtype, copy=False), b.astype(dtype, copy=False)


def _sum(values: Array) -> Array:
    result: Array = np.sum(values, axis=-1, keepdims=True)
    return result


def _symmetric_kl_terms(a: Array, b: Array) -> tuple[Array, Array, Array, Array, Callable[[Array], Array]]:
    """J (n, ...), p, q, p - q, and a - b less its value at a class, each to nearly full relative precision."""
    # Logits beyond 1e37 are moved to where no difference of two overflows, which changes no probability. A class that
    # is -inf in both then has d = 0 and p = q = 0; any other infinity or NaN makes `distance`, and with it J, so.
    huge = np.finfo(a.dtype).max / 16
    masked = np.isneginf(a) & np.isneginf(b)
    with np.errstate(invalid="ignore"):
        distance = np.max(np.where(masked, 0, np.abs(a / 4 - b / 4)), axis=-1)
    a, b = np.clip(a, -huge, huge), np.clip(b, -huge, huge)
    p, _ = _softmax(a)
    q, log_q = _softmax(b)

    # d = a - b up to a shift, which J does not see. A common shift may be far larger than what is left without it, so
    # the rounding of a - b is kept (Knuth's two-sum).
    high = a - b
    low = (a - (high - (high - a))) - (b + (high - a))

    def d_from(at: Array) -> Array:
        result: Array = (high - np.take_along_axis(high, at, -1)) + (low - np.take_along_axis(low, at, -1))
        return result

    # r = d - log Z, Z = sum q exp(d). Over the classes N where |d| < 1 that sum is 1 - q_F + sum_N q expm1(d); the far
    # ones, F, have Z p_F of it. So log Z = log1p(sum_N q expm1(d) - q_F) - log1p(-p_F): nothing cancels, and no large
    # d is exponentiated. If F has most of the mass, J is not small, and the plain forms of Z and p - q will do.
    d = d_from(np.argmax(a + b, axis=-1, keepdims=True))
    near = np.abs(d) < 1
    p_far, q_far = _sum(np.where(near, 0, p)), _sum(np.where(near, 0, q))
    alike = p_far + q_far < 0.5
    excess = _sum(np.where(near, q * np.expm1(np.clip(d, -1, 1)), 0))
    exponent = log_q + d
    largest = np.max(exponent, axis=-1, keepdims=True)
    log_z = np.where(
        alike,
        np.log1p(np.where(alike, excess - q_far, 0)) - np.log1p(np.where(alike, -p_far, 0)),
        largest + np.log(_sum(np.exp(exponent - largest))),
    )
    r = d - log_z
    p_minus_q = np.where(near & alike, q * np.expm1(np.where(near & alike, r, 0)), p - q)
    j = np.where(np.isfinite(distance), np.sum(np.maximum(p_minus_q * r, 0), axis=-1), distance)
    return j, p, q, p_minus_q, d_from


def _softmax(a: Array) -> tuple[Array, Array]:
    shifted = a - np.max(a, axis=-1, keepdims=True)
    exp = np.exp(shifted)
    total = _sum(exp)
    return exp / total, shifted - np.log(total)


def _bernoulli_terms(a: Array, b: Array) -> tuple[Array, Array]:
    """d = a - b and sigma(a) - sigma(b) = sigma(max) sigma(-min) (1 - exp(-|d|)) sign(d), which cancels nothing."""
    huge = np.finfo(a.dtype).max
    masked = np.isneginf(a) & np.isneginf(b)
    a, b = np.where(masked, 0, a), np.where(masked, 0, b)
    with np.errstate(over="ignore"):
        d = np.clip(a - b, -huge, huge)
    difference = _sigmoid(np.maximum(a, b)) * _sigmoid(-np.minimum(a, b)) * -np.expm1(-np.abs(d))
    return d, np.sign(d) * difference


def _sigmoid(a: Array) -> Array:
    exp = np.exp(-np.abs(a))
    result: Array = np.where(a >= 0, 1, exp) / (1 + exp)
    return result
