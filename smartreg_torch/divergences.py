"""Compute the divergences l_s of the paper in PyTorch: `smartreg.divergences`, differentiable (docs/math.md).

Every function takes outputs of shape (n, ..., C), the last axis being the classes, labels or values, and gives one
number an example, (n,): the sum over the last axis, averaged over the positions between (those the mask leaves).
Float32 and float64 are computed as they come; bf16 and fp16 in float32, which is also what they give.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smartreg.config import SMARTWarning
from smartreg_torch.compat import frees_the_graph

# Entries of the logits that are worked on at once: on a CPU what its caches hold, on other devices enough to fill one.
BLOCK, DEVICE_BLOCK = 1 << 16, 1 << 24


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
    return _mean_of("symmetric_kl", _symmetric_kl_rows, _symmetric_kl_gradients, a, b, mask)


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
    rows, gradients = _bernoulli_symmetric_kl_rows, _bernoulli_symmetric_kl_gradients
    return _mean_of("bernoulli_symmetric_kl", rows, gradients, a, b, mask)


def squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error, for regression: sum_k (a_k - b_k)^2.

    Args, Returns, Raises: as `symmetric_kl`, with values for classes.

    Source: paper, section 3.1.

    Example:
        >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([0., 4.])
    """
    _check_pair("squared_error", a, b, mask)
    a, b = _widened(a, b, mask)
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
    check_mask(mask, values.shape)
    keep = (mask != 0).unsqueeze(-1).flatten(1)  # (n, 1) if an example is one position
    return values.unsqueeze(-1).flatten(1).where(keep, 0).sum(1) / keep.sum(1).clamp(min=1)


Formula = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor | None, Tensor | None]]


def _mean_of(
    call: str, rows: Formula, gradients: Callable[..., Any], a: Tensor, b: Tensor, mask: Tensor | None
) -> Tensor:
    """Average over the positions what `rows` gives for each, differentiated by the gradients that it gives."""
    _check_pair(call, a, b, mask)
    per_position: Tensor = _ByBlocks.apply(rows, a, b, mask)  # type: ignore[no-untyped-call]
    return mean_positions(_HigherDerivatives.of(gradients, per_position, a, b, mask), mask)


def _check_pair(call: str, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"{call}: expected two tensors of one shape (n, ..., C), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if mask is not None:
        check_mask(mask, a.shape[:-1])


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise ValueError if the mask has not the outputs' shape without the last axis."""
    if mask.shape != shape:
        raise ValueError(
            f"the mask must have the outputs' shape without the last axis, {tuple(shape)}, got {tuple(mask.shape)}"
        )


def _dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _widened(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Widen to float32 or more; put 0 where the mask is false, so that no NaN there reaches a value or gradient."""
    dtype = _dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    if mask is None:
        return a, b
    keep = (mask != 0).unsqueeze(-1)
    return a.where(keep, 0), b.where(keep, 0)


def values_and_gradients(
    rows: Formula, a: Tensor, b: Tensor, mask: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return l_s of each position, (n, ...), and the gradients that are wanted, block by block of the positions.

    Beside the inputs and the gradients only one block's temporaries are in memory. On a CPU, blocks leave out the
    positions where the mask is false; on a GPU the host would wait to learn their number. There symmetric_kl is one
    kernel, which leaves them out itself.
    """
    if rows is _symmetric_kl_rows and _has_kernel(a, b, mask):
        return _kernels().symmetric_kl(a, b, mask, wanted)  # type: ignore[no-any-return]
    size = BLOCK if a.is_cpu else DEVICE_BLOCK
    if a.numel() <= size or torch.compiler.is_compiling():
        return rows(*_widened(a, b, mask), wanted)
    dtype = _dtype(a, b)
    values = a.new_empty(a.shape[:-1], dtype=dtype)
    grad_a, grad_b = (a.new_empty(a.shape, dtype=dtype) if want else None for want in wanted)
    for at in _blocks(a.shape, size):
        keep = None if mask is None else mask[at] != 0
        leaving_out = keep is not None and a.is_cpu
        inside = (a[at][keep], b[at][keep], None) if leaving_out else (a[at], b[at], keep)
        for whole, part in zip((values, grad_a, grad_b), rows(*_widened(*inside), wanted), strict=True):
            if whole is None or part is None:
                continue
            if leaving_out:
                whole[at].zero_()[keep] = part
            else:
                whole[at] = part
    return values, grad_a, grad_b


def _has_kernel(a: Tensor, b: Tensor, mask: Tensor | None) -> bool:
    """Tell whether a kernel computes the divergence of these logits: plain ones on one GPU, in float32 or less."""
    if not a.is_cuda:
        return False
    on_one = {z.device for z in (a, b, mask) if z is not None} == {a.device}
    narrow = a.is_floating_point() and b.is_floating_point() and _dtype(a, b) == torch.float32
    plain = type(a) is type(b) is Tensor and not torch.compiler.is_compiling()
    return on_one and narrow and plain and _kernels() is not None


@functools.cache
def _kernels() -> Any:
    """Return the module of the kernels, or None if Triton is not there or cannot compile them."""
    # if TensorFlow is there first, Triton's import aborts the process: both bring LLVM
    too_late = "tensorflow" in sys.modules and "triton" not in sys.modules
    if too_late or importlib.util.find_spec("triton") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Triton's own, of its next versions
            from smartreg_torch import kernels

            logits = torch.zeros(1, 2, device="cuda")
            kernels.symmetric_kl(logits, logits, None, (True, True))
    except Exception as error:
        warnings.warn(
            f"SMART: the kernel of symmetric_kl cannot be compiled ({type(error).__name__}: {error!s:.200}), so many "
            "operations do its work, which takes longer, and more memory if the vocabulary is large. Use an "
            "environment in which Triton finds a C compiler, such as gcc",
            SMARTWarning,
            stacklevel=2,
        )
        return None
    return kernels


class _ByBlocks(torch.autograd.Function):
    """(n, ..., C) -> (n, ...); the gradients are computed with the values."""

    @staticmethod
    def forward(ctx: Any, rows: Formula, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        values, *gradients = values_and_gradients(rows, a, b, mask, ctx.needs_input_grad[1:3])
        ctx.save_for_backward(*gradients)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        in_place = not torch.is_grad_enabled() and frees_the_graph()  # nobody asks for them again
        product = Tensor.mul_ if in_place else Tensor.mul
        return None, *(None if g is None else product(g, grad.unsqueeze(-1)) for g in ctx.saved_tensors), None


def _blocks(shape: torch.Size, size: int) -> Iterator[tuple[int | slice, ...]]:
    """Yield indices of the leading axes that cut a tensor of this shape into blocks of at most `size` entries."""
    inner = math.prod(shape[1:])
    if inner <= size or len(shape) == 2:
        step = max(1, size // inner)
        yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
    else:
        yield from ((i, *rest) for i in range(shape[0]) for rest in _blocks(shape[1:], size))


def _symmetric_kl_rows(a: Tensor, b: Tensor, wanted: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return J, dJ/da and dJ/db, each to nearly full relative precision; the reasons are in docs/math.md."""
    # Logits beyond 1e37 are moved to where no difference of two overflows, which changes no probability. A class
    # that is -inf in both then has d = 0 and p = q = 0; any other infinity or NaN makes `_distance`, and J, so.
    huge, given = torch.finfo(a.dtype).max / 16, (a, b)
    a, b = a.clamp(-huge, huge), b.clamp(-huge, huge)
    (top_a, at_a), (top_b, at_b) = _largest(a), _largest(b)
    q, shifted, total = _softmax(b, top_b)
    d_from = _difference(a, b)
    d = d_p = d_q = d_from(at_a)
    close = _is_sure(d.abs() < 1) and _is_sure((top_a.abs() < huge) & (top_b.abs() < huge))
    if close:  # the same as below if no class is far, in less than half the time
        r = d - (q * d.expm1()).sum(-1, keepdim=True).log1p()
        p_minus_q = q * r.expm1()
        p = q + p_minus_q
    else:
        p, _, _ = _softmax(a, top_a)
        r, p_minus_q = _with_far_classes(p, q, shifted, total, d_from(_largest(a + b)[1]))
        # d is centred anew, exact near the largest p for the one gradient and the largest q for the other
        d_q = d_from(at_b) if wanted[1] else d
    # r - E_p r = d - E_p d
    grad_a = p * (d_p - (p * d_p).sum(-1, keepdim=True)) + p_minus_q if wanted[0] else None
    grad_b = q * ((q * d_q).sum(-1, keepdim=True) - d_q) - p_minus_q if wanted[1] else None
    values = (p_minus_q * r).clamp(min=0).sum(-1)
    if not close:
        distance = _distance(*given)
        values = values.where(distance.isfinite(), distance)
    return values, grad_a, grad_b


def _is_sure(condition: Tensor) -> bool:
    """Tell whether a condition is true everywhere, if it has values now: not on a device, in a trace or a subclass."""
    known = type(condition) is Tensor and condition.is_cpu and not torch.compiler.is_compiling()
    return known and bool(condition.all())


def _with_far_classes(p: Tensor, q: Tensor, shifted: Tensor, total: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p - log q and p - q; log q = shifted - log total.

    log Z = log sum q exp(d) = log1p(sum_N q expm1(d) - q_F) - log1p(-p_F), N the classes where |d| < 1, F the others.
    If F has most of the mass, J is not small, and the plain forms of Z and p - q will do.
    """
    near = d.abs() < 1
    far = (~near).to(d.dtype)
    p_far, q_far = (p * far).sum(-1, keepdim=True), (q * far).sum(-1, keepdim=True)
    alike = p_far + q_far < 0.5
    excess = (q * (1 - far) * d.clamp(-1, 1).expm1()).sum(-1, keepdim=True)
    log_q = shifted - total.log()
    log_z = torch.where(
        alike,
        (excess - q_far).where(alike, 0).log1p() - (-p_far).where(alike, 0).log1p(),
        (log_q + d).logsumexp(-1, keepdim=True),
    )
    r = d - log_z
    p_minus_q = torch.where(near & alike, q * r.clamp(-4, 4).expm1(), p - q)  # |r| < 2.7 there
    return r, p_minus_q


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest |a - b| / 4 of the classes that are not -inf in both."""
    masked = torch.maximum(a, b).isneginf()
    return torch.sub(a / 4, b, alpha=0.25).abs().where(~masked, 0).amax(-1)


def _bernoulli_symmetric_kl_rows(a: Tensor, b: Tensor, wanted: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return J, dJ/da and dJ/db."""
    huge = torch.finfo(a.dtype).max
    masked = a.isneginf() & b.isneginf()
    a, b = a.where(~masked, 0), b.where(~masked, 0)
    d = (a - b).clamp(-huge, huge)
    # sigma(a) - sigma(b) = sigma(max) sigma(-min) (1 - exp(-|d|)) sign(d), which cancels nothing
    size = torch.maximum(a, b).sigmoid() * (-torch.minimum(a, b)).sigmoid() * -(-d.abs()).expm1()
    difference = d.sign() * size
    grad_a = a.sigmoid() * (-a).sigmoid() * d + difference if wanted[0] else None
    grad_b = -(b.sigmoid() * (-b).sigmoid() * d + difference) if wanted[1] else None
    return (difference * d).sum(-1), grad_a, grad_b


# what l_s of two distributions is for each position, by name
ROWS: dict[str, Formula] = {
    "symmetric_kl": _symmetric_kl_rows,
    "bernoulli_symmetric_kl": _bernoulli_symmetric_kl_rows,
}


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
        grad_a, grad_b = (grad.unsqueeze(-1) * (g - g.detach()) for g in ctx.gradients(*_widened(a, b, mask)))
        return None, grad, grad_a, grad_b, None


def _symmetric_kl_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return dJ/da and dJ/db by operations that can be differentiated again."""
    huge = torch.finfo(a.dtype).max / 16
    a, b = a.clamp(-huge, huge), b.clamp(-huge, huge)
    p, q, d_from = a.softmax(-1), b.softmax(-1), _difference(a, b)
    r_p, r_q = d_from(_largest(a)[1]), d_from(_largest(b)[1])  # up to a shift
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
    minus_b = high - a
    low = (a - (high - minus_b)) - (b + minus_b)

    def d_from(at: Tensor) -> Tensor:
        return (high - high.gather(-1, at)) + (low - low.gather(-1, at))

    return d_from


def _softmax(z: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, and the two of which log p = shifted - log total.

    torch's own adds up 50,000 classes in a row on some CPUs, and loses a digit.
    """
    shifted = z - largest
    exp = shifted.exp()
    total = exp.sum(-1, keepdim=True)
    return exp / total, shifted, total


def _largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest entry and where it is; on a CPU, max is three times faster than argmax."""
    largest, at = z.max(-1, keepdim=True)
    return largest, at
