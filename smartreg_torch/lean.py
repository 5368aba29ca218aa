"""Compute R_s with one graph at a time: the perturbed pass gets its graph after the clean one is freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smartreg_torch.compat import fills_every_grad, has_accumulation_hooks, has_gradient_hooks


class Afterwards:
    """A scalar 0 for the loss. Its backward computes the deferred term and back-propagates it.

    Of the nodes that are ready autograd takes the one made last. This one is made before the clean pass, so it waits
    until the clean graph is freed: there is never more than one graph. It has an edge to the smallest weight alone,
    whose clean gradient waits for it. Those of the others go to their .grad, so there is one set of gradients.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        if any(has_gradient_hooks(weight) or has_accumulation_hooks(weight) for weight in weights):
            raise RuntimeError(
                "SMART: with lean=True the gradient of a weight comes in two parts, and its hooks would see each of "
                "them alone. Take the hooks off, or say lean=False"
            )
        self._terms: list[Callable[[], Tensor]] = []
        smallest = min(weights, key=torch.Tensor.numel)
        self.zero: Tensor = _PutOff.apply(self._terms, smallest)  # type: ignore[no-untyped-call]

    def backward_of(self, term: Callable[[], Tensor]) -> None:
        """Defer this term."""
        self._terms.append(term)


class _PutOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: list[Callable[[], Tensor]], weight: Tensor) -> Tensor:
        ctx.terms = terms
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        if not ctx.terms:
            raise RuntimeError(
                "SMART: backward() a second time over one step with lean=True, whose graph is freed. Call "
                "backward() once, or say lean=False"
            )
        with torch.enable_grad():
            while ctx.terms:  # popped, so that nothing of the step is kept any longer
                term = ctx.terms.pop()()
                term.backward(gradient.to(term))
        return None, None


def check_backward(gradient: Tensor) -> None:
    """Raise RuntimeError if this is another backward than loss.backward()."""
    if not fills_every_grad():
        raise RuntimeError(
            "SMART: lean=True adds to the .grad of the weights, so it needs loss.backward(). Use lean=False with "
            "torch.autograd.grad and backward(inputs=...)"
        )


def check_no_graph(value: Tensor) -> None:
    """Raise ValueError if the tensor comes from a graph."""
    if value.grad_fn is not None:
        raise ValueError(
            f"SMART: with lean=True the model's arguments must not come from a graph: one of shape "
            f"{tuple(value.shape)} does, and its graph is freed before the perturbed pass needs it. Make SMART of the "
            "whole model, or say lean=False"
        )
