"""Compute the divergences l_s of the paper in PyTorch: `smartreg.divergences`, differentiable (docs/math.md).

Every function takes outputs of shape (n, ..., C), the last axis being the classes, labels or values, and gives one
number an example, (n,): the sum over the last axis, averaged over the positions between (those the mask leaves).
Float32 and float64 are computed as they come; bf16 and fp16 in float32, which is also what they give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def symmetric_kl(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the symmetrised KL divergence of the distributions softmax(a) and softmax(b).

    J(a, b) = KL(P||Q) + KL(Q||P) = sum_c (p_c - q_c) (log p_c - log q_c)

    with the analytic gradients dJ/da = p (r - E_p r) + (p - q) and dJ/db = q (E_q r - r) + (q - p), r = log p - log q.

    Args:
        a, b: logits, (n, ..., C). A class that is -inf in both takes no part; in one of them, J is inf.
        mask: which positions count, (n, ...) without the class axis.

    Returns:
        (n,), at least 0; relative error <= 1e-5 in float32 and 1e-12 in float64. Differentiable any number of times.

    Raises:
        ValueError: the shapes differ, or there is no class axis.

    Source: paper, section 3.1.

    Example:
        >>> symmetric_kl(torch.tensor([[0.0, 1e-5]]), torch.zeros(1, 2))
        tensor([2.5000e-11])
    """
    per_position: Tensor = _SymmetricKL.apply(*_pair("symmetric_kl", a, b, mask))  # type: ignore[no-untyped-call]
    return mean_positions(_HigherDerivatives.of(_symmetric_kl_gradients, per_position, a, b, mask), mask)


def bernoulli_symmetric_kl(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the symmetrised KL divergence of independent Bernoullis with logits a and b, summed over the labels.

    J(a, b) = sum_k (sigma(a_k) - sigma(b_k)) (a_k - b_k)

    with the analytic gradients dJ/da = sigma'(a) d + sigma(a) - sigma(b), dJ/db = -(sigma'(b) d + sigma(a) - sigma(b)).

    Args, Returns, Raises: as `symmetric_kl`, with labels for classes.

    Source: paper, section 3.1, for each label.

    Example:
        >>> bernoulli_symmetric_kl(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([0.])
    """
    pair = _pair("bernoulli_symmetric_kl", a, b, mask)
    per_position: Tensor = _BernoulliSymmetricKL.apply(*pair)  # type: ignore[no-untyped-call]
    return mean_positions(_HigherDerivatives.of(_bernoulli_symmetric_kl_gradients, per_position, a, b, mask), mask)


def squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error, for regression: sum_k (a_k - b_k)^2.

    Args, Returns, Raises: as `symmetric_kl`, with values for classes.

    Source: paper, section 3.1.

    Example:
        >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([0., 4.])
    """
    a, b = _pair("squared_error", a, b, mask)
    return mean_positions((a - b).square().sum(-1), mask)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "symmetric_kl": symmetric_kl,
    "bernoulli_symmetric_kl": bernoulli_symmetric_kl,
    "squared_error": squared_error,
}


def mean_positions(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (n, ...) over all axes but the first, where the mask is true; 0 if it is true nowhere.

    Example:
        >>> mean_positions(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([1.5000])
    """
    if mask is None:
        return values.flatten(1).mean(1) if values.ndim > 1 else values
    _check_mask(mask, values.shape)
    keep = (mask != 0).flatten(1)
    return values.flatten(1).where(keep, 0).sum(1) / keep.sum(1).clamp(min=1)


def _pair(call: str, a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Widen to float32 or more; put 0 where the mask is false, so that no NaN there reaches a value or gradient."""
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"{call}: expected two tensors of one shape (n, ..., C), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if mask is None:
        return a, b
    _check_mask(mask, a.shape[:-1])
    keep = (mask != 0).unsqueeze(-1)
    return a.where(keep, 0), b.where(keep, 0)


def _check_mask(mask: Tensor, shape: torch.Size) -> None:
    if mask.shape != shape:
        raise ValueError(
            f"the mask must have the outputs' shape without the last axis, {tuple(shape)}, got {tuple(mask.shape)}"
        )


class _SymmetricKL(torch.autograd.Function):
    """(n, ..., C) -> (n, ...), each to nearly full relative precision; the reasons are in docs/math.md."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        # Logits beyond 1e37 are moved to where no difference of two overflows, which changes no probability. A class
        # that is -inf in both then has d = 0 and p = q = 0; any other infinity or NaN makes `distance`, and J, so.
        huge = torch.finfo(a.dtype).max / 16
        masked = a.isneginf() & b.isneginf()
        distance = (a / 4 - b / 4).abs().where(~masked, 0).amax(-1)
        a, b = a.clamp(-huge, huge), b.clamp(-huge, huge)
        (p, _), (q, log_q) = _softmax(a), _softmax(b)

        d_from = _difference(a, b)
        # log Z = log sum q exp(d) = log1p(sum_N q expm1(d) - q_F) - log1p(-p_F), N the classes where |d| < 1, F the
        # others. If F has most of the mass, J is not small, and the plain forms of Z and p - q will do.
        d = d_from((a + b).argmax(-1, keepdim=True))
        near = d.abs() < 1
        p_far, q_far = p.where(~near, 0).sum(-1, keepdim=True), q.where(~near, 0).sum(-1, keepdim=True)
        alike = p_far + q_far < 0.5
        excess = (q * d.clamp(-1, 1).expm1()).where(near, 0).sum(-1, keepdim=True)
        log_z = torch.where(
            alike,
            (excess - q_far).where(alike, 0).log1p() - (-p_far).where(alike, 0).log1p(),
            (log_q + d).logsumexp(-1, keepdim=True),
        )
        r = d - log_z
        exact = near & alike
        p_minus_q = torch.where(exact, q * r.where(exact, 0).expm1(), p - q)
        # r - E_p r = d - E_p d; d is centred anew, exact near the largest p for the one and the largest q for the other
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            d_p = d_from(a.argmax(-1, keepdim=True))
            grad_a = p * (d_p - (p * d_p).sum(-1, keepdim=True)) + p_minus_q
        if ctx.needs_input_grad[1]:
            d_q = d_from(b.argmax(-1, keepdim=True))
            grad_b = q * ((q * d_q).sum(-1, keepdim=True) - d_q) - p_minus_q
        ctx.save_for_backward(grad_a, grad_b)
        return (p_minus_q * r).clamp(min=0).sum(-1).where(distance.isfinite(), distance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return _times(grad, ctx.saved_tensors)


class _BernoulliSymmetricKL(torch.autograd.Function):
    """(n, ..., K) -> (n, ...)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        huge = torch.finfo(a.dtype).max
        masked = a.isneginf() & b.isneginf()
        a, b = a.where(~masked, 0), b.where(~masked, 0)
        d = (a - b).clamp(-huge, huge)
        # sigma(a) - sigma(b) = sigma(max) sigma(-min) (1 - exp(-|d|)) sign(d), which cancels nothing
        size = torch.maximum(a, b).sigmoid() * (-torch.minimum(a, b)).sigmoid() * -(-d.abs()).expm1()
        difference = d.sign() * size
        grad_a = a.sigmoid() * (-a).sigmoid() * d + difference if ctx.needs_input_grad[0] else None
        grad_b = -(b.sigmoid() * (-b).sigmoid() * d + difference) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(grad_a, grad_b)
        return (difference * d).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return _times(grad, ctx.saved_tensors)


class _HigherDerivatives(torch.autograd.Function):
    """Return the values as they are; a backward with create_graph=True adds 0 to the gradients, with their derivatives.

    The gradients themselves stay those that were saved. Nothing is computed and no input is read without create_graph,
    so that outputs may be changed in place after the call.
    """

    @staticmethod
    def of(gradients: Callable[..., tuple[Tensor, Tensor]], values: Tensor, *inputs: Tensor | None) -> Tensor:
        if not values.requires_grad:
            return values
        result: Tensor = _HigherDerivatives.apply(gradients, values, *inputs)  # type: ignore[no-untyped-call]
        return result

    @staticmethod
    def forward(ctx: Any, gradients: Any, values: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(a, b, mask)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return None, grad, None, None, None
        a, b, mask = ctx.saved_tensors
        gradients = ctx.gradients(*_pair("second derivative", a, b, mask))
        grad_a, grad_b = _times(grad, tuple(g - g.detach() for g in gradients))
        return None, grad, grad_a, grad_b, None


def _symmetric_kl_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return dJ/da and dJ/db by operations that can be differentiated again."""
    huge = torch.finfo(a.dtype).max / 16
    a, b = a.clamp(-huge, huge), b.clamp(-huge, huge)
    p, q, d_from = a.softmax(-1), b.softmax(-1), _difference(a, b)
    r_p, r_q = d_from(a.argmax(-1, keepdim=True)), d_from(b.argmax(-1, keepdim=True))  # up to a shift
    grad_a = p * (r_p - (p * r_p).sum(-1, keepdim=True)) + (p - q)
    grad_b = q * ((q * r_q).sum(-1, keepdim=True) - r_q) - (p - q)
    return grad_a, grad_b


def _bernoulli_symmetric_kl_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return dJ/da and dJ/db by operations that can be differentiated again."""
    huge = torch.finfo(a.dtype).max / 4
    a, b = a.clamp(-huge, huge), b.clamp(-huge, huge)
    p, q, d = a.sigmoid(), b.sigmoid(), a - b
    return p * (-a).sigmoid() * d + (p - q), -(q * (-b).sigmoid() * d + (p - q))


def _difference(a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """Return d = a - b less its value at a class: J does not see a shift.

    A common shift may be far larger than what is left without it, so the rounding of a - b is kept (Knuth's two-sum).
    """
    high = a - b
    low = (a - (high - (high - a))) - (b + (high - a))

    def d_from(at: Tensor) -> Tensor:
        return (high - high.gather(-1, at)) + (low - low.gather(-1, at))

    return d_from


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and log p. torch's own adds up 50,000 classes in a row on some CPUs, and loses a digit."""
    shifted = z - z.amax(-1, keepdim=True)
    exp = shifted.exp()
    total = exp.sum(-1, keepdim=True)
    return exp / total, shifted - total.log()


def _times(grad: Tensor, gradients: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    a, b = (None if g is None else grad.unsqueeze(-1) * g for g in gradients)
    return a, b
