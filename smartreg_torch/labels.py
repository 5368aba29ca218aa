"""Read off the gradient of a task loss which outputs it counts, and which l_s goes with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

IGNORED = -100  # PyTorch's and Hugging Face's
_FITS = 0.02  # what bfloat16 leaves of an exact multiple
SAYS = {  # of the gradient of a task loss, if it has that l_s
    "symmetric_kl": "d loss / d outputs sums to 0 over the classes, as of any softmax loss",
    "bernoulli_symmetric_kl": "d loss / d outputs goes with sigma(outputs) - labels, as of binary cross-entropy",
    "squared_error": "d loss / d outputs goes with outputs - labels, as of a squared error",
}


class Positions(NamedTuple):
    """Say where labels lie beside outputs: label i belongs to the output at position i + offset.

    Attributes:
        offset: 0, or -1 if an output predicts the next token; plus the virtual or image tokens in front.
        more: how many more positions the outputs have than the labels.
        ignored: values of labels that the loss leaves out, beside -100.
    """

    offset: int = 0
    more: int = 0
    ignored: tuple[int, ...] = ()

    def align(self, labels: Tensor) -> Tensor:
        """Return the label of each output, (n, tokens + more); -100 if it has none."""
        labels = labels.masked_fill(labels.isnan(), IGNORED) if labels.is_floating_point() else labels
        placed: Tensor = nn.functional.pad(labels, (self.offset, self.more - self.offset), value=IGNORED)
        return placed

    def mask(self, labels: Tensor) -> Tensor:
        """Return a mask, true at the outputs that have a label.

        Example:
            >>> import torch
            >>> Positions(offset=-1).mask(torch.tensor([[-100, 7, 8]])).tolist()
            [[True, True, False]]
        """
        aligned = self.align(labels)
        mask = aligned != IGNORED
        for value in self.ignored:
            mask &= aligned != value
        return mask


def find_positions(
    z: Tensor, gradient: Tensor, labels: Tensor, first: int = 0, real: Tensor | None = None
) -> tuple[Positions, int] | None:
    """Find where the labels lie beside the outputs whose gradient is not 0.

    If several offsets explain which outputs have one, `first` is taken. If none does, the loss may have a mask of its
    own. Then it is the offset at which most labels are the class whose logit the gradient raises most.

    Args:
        z, gradient: outputs and dL/dz, (n, positions, C).
        labels: (n, tokens).
        first: the offset that is most likely.
        real: true at the outputs that are no padding; the loss may leave out others, whatever their labels.

    Returns:
        the positions, and how many labelled outputs lack a gradient for no reason. None if a gradient reaches outputs
        without a label, whatever the offset is.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([[[0.1], [0.1], [0.0]]])
        >>> find_positions(gradient, gradient, torch.tensor([[-100, 7, 8]]))
        (Positions(offset=-1, more=0, ignored=()), 0)
    """
    counted = (gradient != 0).any(-1)
    if counted.shape[:-1] != labels.shape[:-1]:
        return None
    classes = z.shape[-1] > 1 and not labels.is_floating_point()
    # a certain prediction has the gradient 0, too
    sure = z.float().softmax(-1).amax(-1) < 0.999 if classes else torch.ones_like(counted)
    more = counted.shape[-1] - labels.shape[-1]
    found = []
    for offset in dict.fromkeys((first, 0, -1, more, more - 1)):
        aligned = Positions(offset, more).align(labels)
        labelled = aligned != IGNORED
        if bool((counted & ~labelled).any()):
            continue
        missed = labelled & ~counted
        left = missed if real is None else missed & (real > 0)
        unexplained = bool(left.any())
        ignored = None if labels.is_floating_point() else _ignored(aligned, counted, sure, missed, left)
        raised = int((gradient.argmin(-1) == aligned)[counted].sum()) if classes else 0
        left_out = int(left.sum()) if ignored is None else 0
        order = (1, -raised, left_out) if left_out else (0, int(unexplained), 0)
        found.append((order, left_out, Positions(offset, more, () if ignored is None else (ignored,))))
    if not found:
        return None
    _, left_out, positions = min(found, key=lambda one: one[0])
    return positions, left_out


def _ignored(aligned: Tensor, counted: Tensor, sure: Tensor, missed: Tensor, left: Tensor) -> int | None:
    """Find the label that explains what the loss leaves out: an ignore_index of its own, or a class of weight 0."""
    for gaps in (missed, left):
        values = set(aligned[gaps & sure].tolist()) - set(aligned[counted].tolist())
        value = values.pop() if len(values) == 1 else IGNORED
        if value != IGNORED and not bool((left & (aligned != value)).any()):
            return int(value)
    return None


def find_divergence(z: Tensor, gradient: Tensor, labels: Tensor | None) -> str | None:
    """Find the l_s of the loss that has this gradient; None if it cannot be told.

        sum_c dL/dz_c = 0           any loss of softmax(z)       symmetric_kl
        dL/dz ~ sigma(z) - y        binary cross-entropy         bernoulli_symmetric_kl
        dL/dz ~ z - y               mean squared error           squared_error

    If the gradient is no exact multiple, as with weights or Huber's loss, its sign decides between the last two.

    Args:
        z, gradient: outputs and dL/dz, (n, ..., C).
        labels: y in the shape of z; None if there is no such label.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.5, -1.0, 2.0]])
        >>> find_divergence(z, z.sigmoid() - 1, torch.ones(1, 3))
        'bernoulli_symmetric_kl'
    """
    z, g = (tensor.detach().double() for tensor in (z, gradient))
    norm = g.norm()
    if not (bool(norm > 0) and bool(norm.isfinite())):
        return None
    misfits = {"symmetric_kl": float(g.sum(-1).norm() / norm)} if z.shape[-1] > 1 else {}
    signs = {}
    if labels is not None:
        y, z, g = (tensor[g != 0] for tensor in (labels.double(), z, g))
        between = bool(((y >= 0) & (y <= 1)).all())
        slopes = {"squared_error": z - y} | ({"bernoulli_symmetric_kl": z.sigmoid() - y} if between else {})
        for name, slope in slopes.items():
            scale = (g * slope).sum() / slope.square().sum()
            misfits[name] = float((g - scale * slope).norm() / norm)
            signs[name] = bool((g * slope >= 0).all())
    best = min(misfits, key=lambda name: misfits[name], default=None)
    if best is not None and misfits[best] < _FITS:
        return best
    if labels is None:
        return None
    if not between:
        return "squared_error"
    fitting = [name for name, fits in signs.items() if fits]
    if len(fitting) == 1:
        return fitting[0]
    return "bernoulli_symmetric_kl" if fitting and bool(((y == 0) | (y == 1)).all()) else None
