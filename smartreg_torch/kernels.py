"""Compute `symmetric_kl` on a GPU by one kernel, in Triton: import this module only if there is Triton.

What it computes is `divergences._symmetric_kl_rows`, row by row, in three walks along a row: the largest entries; the
sums that depend on them; the gradients. So nothing but the logits, the values and the gradients is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

HUGE = torch.finfo(torch.float32).max / 16  # as in `divergences`: no difference of two overflows


def symmetric_kl(
    a: Tensor, b: Tensor, mask: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return J of each position and the gradients that are wanted, in float32.

    Args:
        a, b: logits, (n, ..., C), in float32 or less.
        mask: which positions count, (n, ...). Of the others no logit is read; their value and gradients are 0.
        wanted: whether dJ/da and dJ/db are.
    """
    classes = a.shape[-1]
    values = a.new_empty(a.shape[:-1], dtype=torch.float32)
    gradients = [a.new_empty(a.shape, dtype=torch.float32) if want else None for want in wanted]
    # positions as rows of rows, so that logits[:, :-1] need not be copied
    a, b = (z.unsqueeze(1) if z.ndim == 2 else z.flatten(0, -3) if z.ndim > 3 else z for z in (a, b))
    a, b = (z if z.stride(-1) == 1 else z.contiguous() for z in (a, b))
    keep = None if mask is None else (mask != 0).flatten().view(torch.uint8)
    block = min(triton.next_power_of_2(classes), 2048)
    if values.numel() and classes:
        with torch.cuda.device_of(a):  # Triton launches on the current device
            _symmetric_kl[(values.numel(),)](
                *(a, b, keep, values, *gradients, a.shape[1], classes, *a.stride()[:2], *b.stride()[:2]),
                *(HUGE, block),
                num_warps=max(1, min(8, block // 128)),
            )
    return values, *gradients  # type: ignore[return-value]


@triton.jit
def _symmetric_kl(
    a_ptr,
    b_ptr,
    keep_ptr,
    value_ptr,
    grad_a_ptr,
    grad_b_ptr,
    length,
    classes,
    a_0,
    a_1,
    b_0,
    b_1,
    HUGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row // length * a_0 + row % length * a_1
    b_ptr += row // length * b_0 + row % length * b_1
    count = classes
    if keep_ptr is not None:
        count = tl.where(tl.load(keep_ptr + row) != 0, classes, 0)
    lanes = tl.arange(0, BLOCK)

    # where a, b and a + b are largest, and a distance that is not finite
    none = tl.full((BLOCK,), -float("inf"), tl.float32)
    best_a, best_b, best_sum = none, none, none
    at_a, at_b, at_sum = lanes, lanes, lanes
    odd = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + lanes
        a, b = _logits(a_ptr, at, count), _logits(b_ptr, at, count)
        distance = tl.where((a == -float("inf")) & (b == -float("inf")), 0.0, tl.abs(a / 4 - b / 4))
        odd += tl.where(distance < float("inf"), 0.0, distance)
        a, b = _finite(a, HUGE), _finite(b, HUGE)
        at_a, best_a = tl.where(a > best_a, at, at_a), tl.where(a > best_a, a, best_a)
        at_b, best_b = tl.where(b > best_b, at, at_b), tl.where(b > best_b, b, best_b)
        at_sum, best_sum = tl.where(a + b > best_sum, at, at_sum), tl.where(a + b > best_sum, a + b, best_sum)
    largest_a, largest_b = tl.max(best_a, 0), tl.max(best_b, 0)
    high_a, low_a = _difference_at(a_ptr, b_ptr, best_a, at_a, largest_a, count, HUGE)
    high_b, low_b = _difference_at(a_ptr, b_ptr, best_b, at_b, largest_b, count, HUGE)
    high_sum, low_sum = _difference_at(a_ptr, b_ptr, best_sum, at_sum, tl.max(best_sum, 0), count, HUGE)

    # the sums of softmax, of the far classes, of q expm1(d) and of the means of d
    zero = tl.zeros((BLOCK,), tl.float32)
    sum_p, sum_q, far_p, far_q, excess, mean_p, mean_q = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, count, BLOCK):
        at = start + lanes
        a, b = _finite(_logits(a_ptr, at, count), HUGE), _finite(_logits(b_ptr, at, count), HUGE)
        p, q = tl.exp(a - largest_a), tl.exp(b - largest_b)
        p, q = tl.where(at < count, p, 0.0), tl.where(at < count, q, 0.0)
        high, low = _difference(a, b)
        d = (high - high_sum) + (low - low_sum)
        near = tl.abs(d) < 1
        sum_p += p
        sum_q += q
        far_p += tl.where(near, 0.0, p)
        far_q += tl.where(near, 0.0, q)
        excess += tl.where(near, q * _expm1(tl.where(near, d, 0.0)), 0.0)
        mean_p += p * ((high - high_a) + (low - low_a))
        mean_q += q * ((high - high_b) + (low - low_b))
    total_p, total_q = tl.sum(sum_p, 0), tl.sum(sum_q, 0)
    p_far, q_far = tl.sum(far_p, 0) / total_p, tl.sum(far_q, 0) / total_q
    mean_a, mean_b = tl.sum(mean_p, 0) / total_p, tl.sum(mean_q, 0) / total_q
    high_z, low_z = _difference(largest_a, largest_b)
    alike = p_far + q_far < 0.5
    excess_of_near = tl.where(alike, tl.sum(excess, 0) / total_q - q_far, 0.0)
    log_z = tl.where(
        alike,
        _log1p(excess_of_near) - _log1p(tl.where(alike, -p_far, 0.0)),
        (high_z - high_sum) + (low_z - low_sum) + (tl.log(total_p) - tl.log(total_q)),
    )

    value = zero
    for start in range(0, count, BLOCK):
        at = start + lanes
        a, b = _finite(_logits(a_ptr, at, count), HUGE), _finite(_logits(b_ptr, at, count), HUGE)
        p, q = tl.exp(a - largest_a) / total_p, tl.exp(b - largest_b) / total_q
        high, low = _difference(a, b)
        d = (high - high_sum) + (low - low_sum)
        r = d - log_z
        close = tl.where(alike, tl.abs(d), 1.0) < 1
        p_minus_q = tl.where(close, q * _expm1(tl.where(close, r, 0.0)), p - q)
        value += tl.where(at < count, tl.maximum(p_minus_q * r, 0.0), 0.0)
        if grad_a_ptr is not None:
            of_a = p * ((high - high_a) + (low - low_a) - mean_a) + p_minus_q
            tl.store(grad_a_ptr + row * classes + at, of_a, at < count)
        if grad_b_ptr is not None:
            of_b = q * (mean_b - ((high - high_b) + (low - low_b))) - p_minus_q
            tl.store(grad_b_ptr + row * classes + at, of_b, at < count)
    J, not_finite = tl.sum(value, 0), tl.sum(odd, 0)
    J = tl.where(not_finite == 0, J, not_finite)
    tl.store(value_ptr + row, tl.where(count > 0, J, 0.0))

    for start in range(count, classes, BLOCK):  # a position that does not count
        at = start + lanes
        if grad_a_ptr is not None:
            tl.store(grad_a_ptr + row * classes + at, zero, at < classes)
        if grad_b_ptr is not None:
            tl.store(grad_b_ptr + row * classes + at, zero, at < classes)


@triton.jit
def _logits(ptr, at, count):
    return tl.load(ptr + at, at < count, -float("inf")).to(tl.float32)


@triton.jit
def _finite(z, HUGE: tl.constexpr):
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(z, -HUGE, propagate_nan=nan), HUGE, propagate_nan=nan)


@triton.jit
def _difference(a, b):
    high = a - b
    minus_b = high - a
    return high, (a - (high - minus_b)) - (b + minus_b)


@triton.jit
def _difference_at(a_ptr, b_ptr, best, at, largest, count, HUGE: tl.constexpr):
    index = tl.max(tl.where((best == largest) & (at < count), at, 0), 0)
    return _difference(_finite(_logits(a_ptr, index, count), HUGE), _finite(_logits(b_ptr, index, count), HUGE))


@triton.jit
def _expm1(x):
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    near = 1 + x  # Kahan: what 1 + x has lost is lost in both
    return tl.where(near == 1, x, tl.log(near) * (x / tl.where(near == 1, 1.0, near - 1)))
