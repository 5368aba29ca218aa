"""Give `smartreg.checking` what it calls of this backend: its functions, a conversion and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ruff: noqa: F401
from smartreg_torch.divergences import bernoulli_symmetric_kl, squared_error, symmetric_kl
from smartreg_torch.perturbation import ascend, normalize, project_l1_ball, project_l2_ball, project_linf_ball
from smartreg_torch.proximal import bregman_divergence, ema_update, momentum


def asarray(array: Any, dtype: str) -> Tensor:
    """Return a NumPy array as a tensor with its own memory.

    Example:
        >>> import numpy as np
        >>> asarray(np.ones(1), "bfloat16")
        tensor([1.], dtype=torch.bfloat16)
    """
    return torch.tensor(array, dtype=getattr(torch, dtype))


def gradients(function: Callable[..., Tensor], *arrays: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of sum(function(*arrays)) with respect to each array.

    Example:
        >>> gradients(torch.square, torch.tensor([3.0]))
        (tensor([6.]),)
    """
    points = [array.detach().requires_grad_() for array in arrays]
    return torch.autograd.grad(function(*points).sum(), points)
