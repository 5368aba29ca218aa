"""Find the inner maximum of R_s in PyTorch: `smartreg.perturbation`, native (docs/math.md).

A perturbation delta has the shape of the embeddings x, (n, ..., d). `granularity` says what one norm runs over: all
axes but the batch ("example"), or the last one ("token"). An entry of x that is NaN or infinite, because the model
imputes it, is treated like a masked one: delta is 0 there, and no norm or root mean square counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from smartreg.config import Granularity, Norm, SMARTConfig
from smartreg.divergences import check_divergence
from smartreg.perturbation import NormOfRows, climb, start_noise
from smartreg_torch.projection import Output, Projection, at_hidden, sum_divergence, total, values_of

T = TypeVar("T", Tensor, list[Tensor])


def normalize(g: Tensor, norm: Norm = "inf", granularity: Granularity = "example") -> Tensor:
    """Return g / ||g||_p, and 0 if g = 0.

    Divided by max|g| first, so that no square underflows: finite for gradients of 1e-30 in float32.

    Args:
        g: (n, ..., d).

    Source: paper, Algorithm 1.

    Example:
        >>> normalize(torch.tensor([[3e-30, 4e-30]]), "2")
        tensor([[0.6000, 0.8000]])
    """
    rows = _rows(g, granularity)  # by hand: torch.nn.functional.normalize squares the entries as they are
    largest = _largest(rows)
    unit = rows / largest.where(largest > 0, 1)
    if norm != "inf":  # max|unit| is 1 by now
        length = NORMS[norm].length(unit)
        unit = unit / length.where(length > 0, 1)
    return unit.view_as(g)


def project_linf_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """Return the nearest point of {delta: ||delta||_inf <= epsilon}: every entry clipped.

    Args:
        delta: (n, ..., d).
        epsilon: the radius, one number or one an example, (n,).
        granularity: makes no difference here; it is there because the three projections are called alike.

    Source: paper, Algorithm 1 (p = inf).

    Example:
        >>> project_linf_ball(torch.tensor([[3.0, -0.5]]), 1.0)
        tensor([[ 1.0000, -0.5000]])
    """
    radius = _radius(epsilon, delta)
    return delta.clamp(-radius, radius)


def project_l2_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """Return the nearest point of {delta: ||delta||_2 <= epsilon}: delta min(1, epsilon / ||delta||_2).

    Args: as `project_linf_ball`.

    Example:
        >>> project_l2_ball(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])
    """
    rows = _rows(delta, granularity)  # by hand: torch.renorm has one radius for all rows
    radius, length = _radius(epsilon, rows), _scaled_length(rows, "2")
    return _shrink(rows, length, radius, length <= radius).view_as(delta)


def project_l1_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """Return the Euclidean projection onto {delta: ||delta||_1 <= epsilon}: sign(delta) max(|delta| - tau, 0).

    tau is found by sorting (Duchi et al. 2008, figure 1), of |delta| less its largest entry, which loses no digits far
    outside the ball. Not a rescaling: small entries become 0.

    Args: as `project_linf_ball`.

    Example:
        >>> project_l1_ball(torch.tensor([[3.0, 2.5, 0.1]]), 1.0)
        tensor([[0.7500, 0.2500, 0.0000]])
    """
    rows = _rows(delta, granularity)
    radius = _radius(epsilon, rows)
    size = rows.abs()
    size = size - size.amax(-1, keepdim=True)
    descending = size.sort(-1, descending=True).values
    over = descending.cumsum(-1) - radius
    count = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    kept = (descending * count > over).sum(-1, keepdim=True).clamp(min=1)
    tau = over.gather(-1, kept - 1) / kept
    inside = _scaled_length(rows, "1") <= radius
    shrunk = torch.where(inside, rows, rows.sign() * (size - tau).clamp(min=0))
    return _shrink(shrunk, _scaled_length(shrunk, "1"), radius, inside).view_as(delta)


def ascend(
    forward: Callable[[Any], Any],
    x: T,
    target: Output | Sequence[Output],
    config: SMARTConfig,
    noise: Tensor | Sequence[Tensor | None] | None,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    divergence: str | Sequence[str] = "symmetric_kl",
    positions: Sequence[Tensor | None] | None = None,
) -> T:
    """Return the perturbation delta of R_s, after T_x steps of projected ascent from the configured start.

    delta <- Proj_{||delta||_p <= epsilon}( delta + eta g / ||g||_p ),   g = grad_delta l_s(f(x), f(x + delta))

    If the model embeds several inputs or has several outputs, x, noise and mask are lists of one length, target and
    divergence of another. `forward` then takes and gives lists, and the divergences add up.

    Args:
        forward: x~ -> outputs.
        x: embeddings, (n, ..., d). If they and `target` are part of one graph, the margin start takes its gradient
            from that graph (which it keeps) instead of from a forward of its own.
        target: the clean outputs f(x).
        config: epsilon, sigma, eta, ascent_steps, norm, granularity, start, scale, projection.
        noise: standard normal, of the shape of x for the Gaussian start; of the outputs for the margin start, of
            which only the sign is used, and only in regression (None does elsewhere).
        mask: true where a position may be perturbed, of x's leading axes. Outputs with that position axis are
            averaged over its true positions.
        divergence: the name of l_s in `smartreg_torch.divergences`.
        positions: for each output, which of its positions count, if that is not as `mask` says.

    Returns:
        delta, of the shape of x, ||delta||_p <= epsilon unless `config.projection` is "rescale"; 0 where x is masked,
        NaN or infinite. It is float32 or wider. No graph is left on it, and no parameter's `.grad` is touched.

    Source: paper, Algorithm 1, lines 6 to 10. The margin start: docs/math.md.

    Example:
        >>> w = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
        >>> config = SMARTConfig(scale="absolute", epsilon=0.1, start="margin", ascent_steps=0)
        >>> x = torch.tensor([[1.0, 1.0]])
        >>> ascend(lambda x: x @ w, x, x @ w, config, None)
        tensor([[-0.1000,  0.1000]])
    """
    single = isinstance(x, Tensor)
    xs, targets, noises, masks = (_listed(value) for value in (x, target, noise, mask))
    names = [divergence] if isinstance(divergence, str) else list(divergence)
    for name in names:
        check_divergence("ascend", name)
    balls = [Ball(point, config, m) for point, m in zip(xs, masks or [None] * len(xs), strict=True)]
    positions = [output_mask(z, masks) for z in targets] if positions is None else positions

    def outputs_at(points: list[Tensor]) -> list[Tensor]:
        return _listed(forward(points[0] if single else points))

    def gradient(deltas: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            points = [(b.x + d).to(x.dtype).requires_grad_() for b, d, x in zip(balls, deltas, xs, strict=True)]
            outputs = outputs_at(points)
            each = zip(names, targets, outputs, positions, strict=True)
            l_s = total(sum_divergence(name, z.detach(), z_at, m) for name, z, z_at, m in each)
        return _gradients([l_s], points)

    if config.needs_clean_graph:
        with torch.enable_grad():
            in_graph = all(point.requires_grad for point in xs) and all(z.requires_grad for z in values_of(targets))
            points = xs if in_graph else [point.detach().requires_grad_() for point in xs]
            outputs = targets if in_graph else outputs_at(points)
            upwards = [
                margin_gradient(z, nu, m, name)
                for z, nu, m, name in zip(outputs, noises or [None] * len(outputs), positions, names, strict=True)
            ]
        given = _gradients(values_of(outputs), points, upwards, retain_graph=in_graph)
    else:
        given = start_noise(noises or None, config)
    starts = [ball.start(value) for ball, value in zip(balls, given, strict=True)]
    deltas = climb(balls, starts, gradient)
    return cast(T, deltas[0] if single else deltas)


class Ball:
    """Move delta in the set {delta: ||delta||_p <= epsilon}: one start, then `step` for each gradient.

    Args:
        x: embeddings, (n, ..., d).
        config, mask: as `ascend` takes them.

    Example:
        >>> ball = Ball(torch.ones(1, 1, 2), SMARTConfig(epsilon=0.5, scale="absolute", start="gaussian"))
        >>> ball.step(torch.zeros(1, 1, 2), torch.tensor([[[4.0, -2.0]]]))
        tensor([[[ 0.5000, -0.5000]]])
    """

    def __init__(self, x: Tensor, config: SMARTConfig, mask: Tensor | None = None) -> None:
        self.config = config
        self.x = x = x.detach().to(_wide(x))
        self.keep = _counted(x, mask)
        self._scale = _rms(x, self.keep) if config.scale == "rms" else x.new_ones(len(x))
        self.epsilon = config.epsilon * self._scale

    @property
    def sigma(self) -> Tensor:
        """Return the standard deviation of the Gaussian start, (n,)."""
        return self.config.sigma * self._scale

    @property
    def eta(self) -> Tensor:
        """Return the length of an ascent step, (n,)."""
        return self.config.eta * self._scale

    def start(self, given: Tensor) -> Tensor:
        """Return the delta that the ascent begins at.

        Gaussian: nu ~ N(0, sigma^2 I), projected; `given` is standard normal noise. Margin: `given` is a direction g,
        and delta is argmax_{||delta||_p <= epsilon} <g, delta>; 0 if g is 0.
        """
        given = self._kept(given.to(self.x))
        if self.config.start == "gaussian":
            delta = _each(self.sigma, given) * given
        else:
            rows = _rows(given, self.config.granularity)
            delta = _each(self.epsilon, given) * NORMS[self.config.norm].steepest(rows).view_as(given)
        return self.project(delta) if self.config.projection == "ball" else delta

    def step(self, delta: Tensor, g: Tensor) -> Tensor:
        """Return Proj( delta + eta g / ||g|| ), or the released code's rescaling of delta + eta g."""
        g = self._kept(g)
        if self.config.projection == "ball":
            g = normalize(g, self.config.norm, self.config.granularity)
        return self.project(delta + _each(self.eta, g) * g)

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the ball, or the released code's delta / (||delta||_inf + epsilon)."""
        if self.config.projection == "ball":
            return NORMS[self.config.norm].project(delta, self.epsilon, self.config.granularity)
        rows = _rows(delta, self.config.granularity)
        divisor = _largest(rows) + _each(self.epsilon, rows)
        return (rows / divisor.where(divisor > 0, 1)).view_as(delta)

    def _kept(self, values: Tensor) -> Tensor:
        return values.to(self.x.dtype).where(self.keep, 0)  # a product would keep a NaN


def margin_gradient(
    outputs: Output,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    divergence: str = "symmetric_kl",
) -> Tensor:
    """Return the gradient at the outputs that leads to the model's nearest decision boundary.

    -(e_top1 - e_top2) for classes; -sign(z_k) e_k of the least certain label k; the sign of the noise in regression.

    Args:
        outputs: (n, ..., C); of a projection it is the gradient at its hidden states. noise: of that shape, in
            regression. mask: of that shape less the last axis.

    Example:
        >>> margin_gradient(torch.tensor([[3.0, 1.0, 2.0]]))
        tensor([[-1.,  0.,  1.]])
    """
    check_divergence("margin_gradient", divergence)
    if divergence == "symmetric_kl" and outputs.shape[-1] < 2:
        raise ValueError(
            f"margin start: symmetric_kl needs at least 2 classes, got outputs of shape {tuple(outputs.shape)}. "
            "Compare one output by 'squared_error' or 'bernoulli_symmetric_kl'"
        )
    if isinstance(outputs, Projection):
        return at_hidden(outputs, mask, _NEAREST[divergence])
    z = outputs.detach()
    if divergence in _NEAREST:
        gradient = torch.zeros_like(z).scatter(-1, *_NEAREST[divergence](z))
    else:
        if noise is None:
            raise ValueError(f"margin start: {divergence} needs noise of the outputs' shape for its sign, got None")
        gradient = torch.where(noise < 0, -1, 1).to(z)
    return gradient if mask is None else gradient * (mask != 0).unsqueeze(-1)


def _two_largest(z: Tensor) -> tuple[Tensor, Tensor]:
    # not a list as a tensor: to copy it to a GPU, the host would wait
    signs = torch.arange(-1, 2, 2, dtype=z.dtype, device=z.device)
    return z.topk(2, dim=-1).indices, signs.expand(*z.shape[:-1], 2)


def _least_certain(z: Tensor) -> tuple[Tensor, Tensor]:
    least = z.abs().argmin(-1, keepdim=True)
    return least, torch.where(z.gather(-1, least) < 0, 1, -1).to(z.dtype)


# where the margin gradient at the logits is not 0, and what it is there
_NEAREST: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "symmetric_kl": _two_largest,
    "bernoulli_symmetric_kl": _least_certain,
}


def rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the root mean square of each x_i over its own finite and unmasked entries, (n,); 0 if it has none.

    Example:
        >>> rms(torch.tensor([[[3.0, 3.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
        tensor([3.])
    """
    return _rms(x.to(_wide(x)), _counted(x, mask))


def _rms(x: Tensor, keep: Tensor) -> Tensor:
    return (x.where(keep, 0).square().flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1)).sqrt()


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask of x's leading axes as booleans with trailing axes of length 1; ValueError if it does not fit.

    If x is a signal, (n, d), it may be the mask of the entries.

    Example:
        >>> expand_mask(torch.tensor([[1, 0]]), torch.zeros(1, 2, 3)).shape
        torch.Size([1, 2, 1])
    """
    if mask.ndim >= max(x.ndim, 3) or mask.shape != x.shape[: mask.ndim]:
        raise ValueError(f"the mask must have the leading axes of x, {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    return (mask != 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Say which entries of x are perturbed, as booleans of its shape: those that are finite and not masked."""
    finite = x - x == 0  # as isfinite() says, in two operations instead of five
    return finite if mask is None else finite & expand_mask(mask, x)


def output_mask(outputs: Output, mask: Tensor | Sequence[Tensor | None] | None) -> Tensor | None:
    """Return the mask if the outputs have its axes (one output a position), else None (one output an example).

    Of several masks it is the first that fits.

    Example:
        >>> output_mask(torch.zeros(1, 3), torch.ones(1, 2)) is None
        True
    """
    fitting = [m for m in _listed(mask) if m is not None and m.shape == outputs.shape[:-1]]
    return fitting[0] if fitting and outputs.ndim >= 3 else None


def _gradients(
    outputs: list[Tensor], points: list[Tensor], at: list[Tensor] | None = None, retain_graph: bool = False
) -> list[Tensor]:
    g: Sequence[Tensor | None] = [None]
    if all(z.requires_grad for z in outputs):
        g = torch.autograd.grad(outputs, points, at, retain_graph=retain_graph, allow_unused=True)
    found = [direction for direction in g if direction is not None]
    if len(found) < len(points):
        raise ValueError(
            "ascend: the outputs do not depend on x: no gradient reaches it. Look for a detach() or no_grad() between "
            "the two, or perturb another module (site=...) or compare other outputs (outputs=...)"
        )
    return found


def _shrink(rows: Tensor, length: Tensor, radius: Tensor, inside: Tensor) -> Tensor:
    """Scale the rows that are not inside to the radius."""
    # a few ulps less: rounding the product cannot leave the ball, and a second projection changes nothing
    factor = radius * (1 - 4 * torch.finfo(rows.dtype).eps) / length.where(length != 0, 1)
    return rows * factor.where(~inside, 1)


def _scaled_length(rows: Tensor, norm: Norm) -> Tensor:
    largest = _largest(rows)
    return largest * NORMS[norm].length(rows / largest.where(largest > 0, 1))


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True)


def _sign(g: Tensor) -> Tensor:
    """Return the sign, and NaN for NaN: torch's own is 0, which would hide a broken gradient."""
    return torch.where(g.isnan(), g, g.sign())


def _l1_corner(rows: Tensor) -> Tensor:
    at = rows.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(rows).scatter(-1, at, _sign(rows.gather(-1, at)))


NORMS: dict[Norm, NormOfRows[Tensor]] = {
    "inf": NormOfRows(_largest, project_linf_ball, _sign),
    "2": NormOfRows(
        lambda rows: rows.square().sum(-1, keepdim=True).sqrt(),
        project_l2_ball,
        lambda rows: normalize(rows, "2", "token"),
    ),
    "1": NormOfRows(lambda rows: rows.abs().sum(-1, keepdim=True), project_l1_ball, _l1_corner),
}


def _rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Put everything that one norm runs over into the last axis."""
    if x.ndim < 2:
        raise ValueError(f"expected embeddings of shape (n, ..., d), got {tuple(x.shape)}")
    return x.reshape(len(x), -1) if granularity == "example" else x


def _radius(epsilon: Tensor | float, rows: Tensor) -> Tensor:
    radius = epsilon.to(rows) if isinstance(epsilon, Tensor) else rows.new_full((), epsilon)
    return _each(radius, rows) if radius.ndim else radius


def _each(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value an example, (n,), to be multiplied with (n, ..., d)."""
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, (Tensor, Projection)) else list(value)
