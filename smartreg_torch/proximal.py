"""Compute the Bregman proximal point term in PyTorch: `smartreg.proximal`, native (paper: section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from smartreg.divergences import check_divergence
from smartreg.proximal import momentum
from smartreg_torch.compat import partition
from smartreg_torch.perturbation import output_mask
from smartreg_torch.projection import Output, sum_divergence

__all__ = ["bregman_divergence", "ema_update", "local", "momentum"]


@torch.no_grad()
def ema_update(teacher: Mapping[str, Tensor], theta: Mapping[str, Tensor], beta: float) -> None:
    """Move theta~ <- (1 - beta) theta + beta theta~ in place, in theta~'s own dtype (float32 or wider).

    Source: paper, Algorithm 1, line 14.

    Example:
        >>> teacher = {"w": torch.tensor(0.0)}
        >>> ema_update(teacher, {"w": torch.tensor(1.0)}, 0.75)
        >>> teacher["w"]
        tensor(0.2500)
    """
    averages = [own(average) for average in teacher.values()]
    values = [like(own(theta[name]), average) for name, average in zip(teacher, averages, strict=True)]
    if averages:
        get_ema_multi_avg_fn(beta)(averages, values, 0)  # type: ignore[no-untyped-call]


def bregman_divergence(
    outputs: Output,
    teacher_outputs: Output,
    divergence: str = "symmetric_kl",
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return D_Breg(theta, theta~) = 1/n sum_i w_i l_s( f(x_i; theta), f(x_i; theta~) ).

    No gradient flows through theta~.

    Args:
        outputs, teacher_outputs: (n, ..., C). mask: of the position axis. sample_weight: w_i, (n,), 1 by default.

    Raises:
        ValueError: no divergence of that name, weights or a mask of another shape.

    Source: paper, equation 3.

    Example:
        >>> bregman_divergence(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]), "squared_error")
        tensor(2.)
    """
    check_divergence("bregman_divergence", divergence)
    positions = output_mask(outputs, mask)
    return sum_divergence(divergence, outputs, teacher_outputs.detach(), positions, sample_weight) / len(outputs)


def own(tensor: Tensor) -> Tensor:
    """Return what `local` does, but on the graph if it is a whole tensor: a fifth of the time."""
    whole = type(tensor) in (nn.Parameter, Tensor) and partition(tensor) is None
    return tensor if whole else local(tensor)


def like(value: Tensor, other: Tensor) -> Tensor:
    """Return the value in the dtype and on the device of the other; itself if it is so already."""
    return value if value.dtype == other.dtype and value.device == other.device else value.to(other)


def local(tensor: Tensor) -> Tensor:
    """Return what this process has of a sharded tensor (a DTensor, or of ZeRO 3), or the tensor itself; off the graph.

    Example:
        >>> local(torch.ones(1, requires_grad=True))
        tensor([1.])
    """
    part = partition(tensor)
    own: Any = (tensor if part is None else part).detach()
    return cast(Tensor, own.to_local()) if hasattr(own, "to_local") else own
