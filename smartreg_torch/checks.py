"""Check the values of outputs, masks and gradients against what was chosen. Reading them waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smartreg.config import SMARTWarning
from smartreg.divergences import takes_logits
from smartreg_torch.outputs import Compared, Head
from smartreg_torch.projection import Output

# What autograd calls the operations that make probabilities, layers that do not, and what only changes shape or type.
PROBABILITIES = {"SigmoidBackward", "SoftmaxBackward", "HardsigmoidBackward"}
LAYERS = {"AddmmBackward", "MmBackward", "BmmBackward", "ConvolutionBackward"}
RESHAPED = {
    f"{name}Backward"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Select", "Slice", "Split", "Transpose", "T"),
        *("Permute", "Expand", "Clone", "ToCopy", "Alias", "AsStrided", "Index", "Unbind"),
    )
}


def check_values(compared: Compared, masks_were_found: bool) -> None:
    """Raise ValueError if the outputs are no logits, or a mask that nobody named seems to be true at padding."""
    for z, head in zip(compared.targets, compared.heads, strict=True):
        if isinstance(z, Tensor):
            check_probabilities(z, head)
    for mask in compared.inputs.masks if masks_were_found else []:
        if mask is not None:
            check_real(mask, compared.inputs.mask_name)


def check_probabilities(z: Tensor, head: Head) -> None:
    """Raise ValueError if an output (n, ..., C) holds probabilities and l_s takes logits; warn if it may.

    The graph says it if a softmax or sigmoid made them. If it does not, rows that sum to 1 are probabilities.
    """
    maker, z = _maker(z), z.detach()
    if not takes_logits(head.divergence) or not bool(((z >= 0) & (z <= 1)).all()):
        return
    varied = bool((z != z[:1]).any())  # a head that starts at 0 gives its bias
    near = 1e-2 if z.dtype.itemsize == 2 else 1e-4
    sum_to_1 = head.divergence == "symmetric_kl" and bool(((z.sum(-1) - 1).abs() < near).all())
    if maker in PROBABILITIES or (sum_to_1 and varied and z[..., 0].numel() >= 4):  # four rows of logits never do
        what, mend = ("they sum to 1", "torch.log") if sum_to_1 else ("between 0 and 1", "torch.logit")
        raise ValueError(
            f"SMART: the outputs ({head.name}) are probabilities: {what}, and {head.divergence} takes logits. Let "
            f"forward return the logits instead, or say outputs={mend} (a function of the model's output)"
        )
    if varied and z.numel() >= 32 and maker not in LAYERS:
        warnings.warn(
            f"SMART: all {z.numel()} outputs ({head.name}) are between 0 and 1, and {head.divergence} takes logits. If "
            "they are probabilities, let forward return the logits, or say outputs=torch.logit. If they are logits, "
            "nothing is wrong.",
            SMARTWarning,
            stacklevel=2,
        )


def _maker(z: Tensor) -> str:
    """Return the name of the operation that computed these values, whatever shape or type they were given then."""
    node, name = z.grad_fn, ""
    while node is not None and (name := node.name().rstrip("0123456789")) in RESHAPED:
        node = node.next_functions[0][0]
    return name


def check_real(mask: Tensor, name: str) -> None:
    """Raise ValueError if a mask seems to be true at padding."""
    if mask.ndim != 2:
        return
    real = mask != 0
    if bool((~real.any(1)).any()) and not bool(real.all(1).any()):
        raise ValueError(
            f"SMART: {name} leaves a row without a real token, and none without padding: it seems to be true at "
            f"padding. Give it the other way round, or say mask=, a function of the model's arguments: {name} == 0"
        )


def zero_sum_error(gradient: Tensor, z: Tensor, head: Head) -> str:
    """Say why the loss's gradient at an output is not that of a softmax over its classes; "" if it may be.

    sum_c dL/dz_c = 0 for every loss of softmax(z), since it does not change when all z_c move alike.
    """
    gradient = head.arranged(gradient.detach())
    if not bool(gradient.isfinite().all()):
        return ""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    left = wide.sum(-1).flatten()  # of the task's loss alone: the penalty's gradient sums to 0
    total, apart = float(wide.abs().sum()), float(left.abs().sum())
    if wide.ndim == 2 and wide.shape[0] == wide.shape[1]:  # a contrastive loss of rows and columns
        apart = min(apart, float(left.sum().abs()))
    if len(left) < 3 or apart <= total * (0.01 if gradient.dtype.itemsize > 2 else 0.1):
        return ""
    # z.sum() and z.square().sum() stand for a loss in many a first try
    for alike in (torch.ones_like(left), head.arranged(z).to(wide).sum(-1).flatten()):
        if bool(torch.cosine_similarity(left, alike, 0).abs() > 0.99):
            return ""
    return (
        f"SMART: the loss's gradient at the outputs ({head.name}) does not sum to 0 over axis {head.axis}, so they are "
        "no logits of classes there, and symmetric_kl is not their divergence. Say divergence='bernoulli_symmetric_kl' "
        "(several labels, BCE) or 'squared_error' (values), or say where the classes are, class_axis=. If this is as "
        "you want it, say divergence='symmetric_kl'"
    )


def watch_loss(outputs: Mapping[str, Output], heads: Sequence[Head], say: Callable[[str], Any]) -> None:
    """Look, in the first backward, whether the loss is one of classes, if l_s = symmetric_kl was but a guess."""

    def watch(z: Tensor, head: Head) -> None:
        value = z.detach()

        def on_gradient(gradient: Tensor) -> None:
            message = zero_sum_error(gradient, value, head)
            if message:
                handle.remove()
                say(message)

        handle = z.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    for z, head in zip(outputs.values(), heads, strict=True):
        if head.is_guess and isinstance(z, Tensor) and z.requires_grad:
            watch(z, head)
