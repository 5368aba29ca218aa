"""The inner maximum of R_s for PyTorch: `smartreg.perturbation`, native (docs/math.md).

A perturbation delta has the shape of the embeddings x, (n, ..., d). `granularity` says what one norm runs over: all
axes but the batch ("example"), or the last one ("token"). An entry of x that is NaN or infinite, which the model
imputes, is as one that is masked: delta is 0 there, and no norm and no root mean square counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from smartreg.config import Granularity, Norm, SMARTConfig
from smartreg.divergences import check_divergence
from smartreg_torch.divergences import DIVERGENCES

T = TypeVar("T", Tensor, list[Tensor])


def normalize(g: Tensor, norm: Norm = "inf", granularity: Granularity = "example") -> Tensor:
    """g / ||g||_p, and 0 where g = 0.

    Divided by max|g| first, so that no square underflows: finite for gradients of 1e-30 in float32.

    Args:
        g: (n, ..., d).

    Source: paper, Algorithm 1.

    Example:
        >>> normalize(torch.tensor([[3e-30, 4e-30]]), "2")
        tensor([[0.6000, 0.8000]])
    """
    rows = _rows(g, granularity)
    largest = rows.abs().amax(-1, keepdim=True)
    unit = rows / largest.where(largest > 0, 1)
    if norm != "inf":
        length = _length(unit, norm)
        unit = unit / length.where(length > 0, 1)
    return unit.view_as(g)


def project_linf_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """The nearest point of {delta: ||delta||_inf <= epsilon}: every entry clipped.

    Args:
        delta: (n, ..., d).
        epsilon: the radius, one number or one an example, (n,).
        granularity: makes no difference here; kept so that the three balls are called alike.

    Source: paper, Algorithm 1 (p = inf).

    Example:
        >>> project_linf_ball(torch.tensor([[3.0, -0.5]]), 1.0)
        tensor([[ 1.0000, -0.5000]])
    """
    radius = _radius(epsilon, delta)
    return delta.clamp(-radius, radius)


def project_l2_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """The nearest point of {delta: ||delta||_2 <= epsilon}: delta min(1, epsilon / ||delta||_2).

    Args: as `project_linf_ball`.

    Example:
        >>> project_l2_ball(torch.tensor([[3.0, 4.0]]), 1.0)
        tensor([[0.6000, 0.8000]])
    """
    rows = _rows(delta, granularity)
    radius, length = _radius(epsilon, rows), _scaled_length(rows, "2")
    return _shrink(rows, length, radius, length <= radius).view_as(delta)


def project_l1_ball(delta: Tensor, epsilon: Tensor | float, granularity: Granularity = "example") -> Tensor:
    """The Euclidean projection onto {delta: ||delta||_1 <= epsilon}: sign(delta) max(|delta| - tau, 0).

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


_PROJECTIONS = {"inf": project_linf_ball, "2": project_l2_ball, "1": project_l1_ball}


def ascend(
    forward: Callable[[Any], Any],
    x: T,
    target: Tensor | Sequence[Tensor],
    config: SMARTConfig,
    noise: Tensor | Sequence[Tensor | None] | None,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    divergence: str | Sequence[str] = "symmetric_kl",
    positions: Sequence[Tensor | None] | None = None,
) -> T:
    """The perturbation delta of R_s: T_x steps of projected ascent from the configured start.

    delta <- Proj_{||delta||_p <= epsilon}( delta + eta g / ||g||_p ),   g = grad_delta l_s(f(x), f(x + delta))

    Where the model embeds several inputs or has several outputs, x, noise and mask are lists of one length, target and
    divergence of another, `forward` takes and gives lists, and the divergences add up.

    Args:
        forward: x~ -> outputs.
        x: embeddings, (n, ..., d). Where they and `target` are part of one graph, the margin start takes its gradient
            from that graph (which it keeps) instead of from a forward of its own.
        target: the clean outputs f(x).
        config: epsilon, sigma, eta, ascent_steps, norm, granularity, start, scale, projection.
        noise: standard normal, of the shape of x for the Gaussian start; of the outputs for the margin start, where
            only its sign is used and only in regression (None does elsewhere).
        mask: true where a position may be perturbed, of x's leading axes. Outputs with that position axis are
            averaged over its true positions.
        divergence: the name of l_s in `smartreg_torch.divergences`.
        positions: for each output, which of its positions count, where that is not as `mask` says.

    Returns:
        delta, of the shape of x, ||delta||_p <= epsilon unless `config.projection` is "rescale"; 0 where x is masked,
        NaN or infinite. It is float32 or wider. No graph is left on it, and no parameter's `.grad` is touched.

    Source: paper, Algorithm 1, lines 5 to 10. The margin start: docs/math.md.

    Example:
        >>> w = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
        >>> config = SMARTConfig(scale="absolute", epsilon=0.1, start="margin", ascent_steps=0)
        >>> x = torch.tensor([[1.0, 1.0]])
        >>> ascend(lambda x: x @ w, x, x @ w, config, None)
        tensor([[-0.1000,  0.1000]])
    """
    single = isinstance(x, Tensor)
    xs, targets, masks = _listed(x), _listed(target), _listed(mask)
    names = [divergence] if isinstance(divergence, str) else list(divergence)
    for name in names:
        check_divergence("ascend", name)
    noises = _listed(noise)
    if mask is None:
        masks = [None] * len(xs)

    def outputs_at(points: list[Tensor]) -> list[Tensor]:
        return _listed(forward(points[0] if single else points))

    clean = [point.detach().to(_wide(point)) for point in xs]
    keep = [_movable(point, m) for m, point in zip(masks, clean, strict=True)]
    positions = [output_mask(z, masks) for z in targets] if positions is None else positions
    scale = [
        _rms(point, k) if config.scale == "rms" else point.new_ones(len(point))
        for point, k in zip(clean, keep, strict=True)
    ]
    epsilon, sigma, eta = ([value * s for s in scale] for value in (config.epsilon, config.sigma, config.eta))

    if config.start == "gaussian":
        if noise is None:
            raise ValueError("ascend: start='gaussian' needs noise of the shape of x, got None")
        delta = [
            (_radius(s, point) * nu.to(point)).where(k, 0)
            for s, point, nu, k in zip(sigma, clean, noises, keep, strict=True)
        ]
    else:
        with torch.enable_grad():
            in_graph = all(point.requires_grad for point in xs) and all(z.requires_grad for z in targets)
            points = xs if in_graph else [point.detach().requires_grad_() for point in xs]
            outputs = targets if in_graph else outputs_at(points)
            ascents = [
                margin_gradient(z, nu, m, name)
                for z, nu, m, name in zip(outputs, noises or [None] * len(outputs), positions, names, strict=True)
            ]
        g = _gradients(outputs, points, ascents, retain_graph=in_graph)
        delta = [
            _steepest(direction.to(_wide(direction)).where(k, 0), e, config)
            for direction, k, e in zip(g, keep, epsilon, strict=True)
        ]
    if config.projection == "ball":
        delta = [_project(d, e, config) for d, e in zip(delta, epsilon, strict=True)]

    for _ in range(config.ascent_steps):
        with torch.enable_grad():
            points = [(c + d).to(point.dtype).requires_grad_() for c, d, point in zip(clean, delta, xs, strict=True)]
            outputs = outputs_at(points)
            total = torch.stack(
                [
                    DIVERGENCES[name](z.detach(), z_at, m).sum()
                    for name, z, z_at, m in zip(names, targets, outputs, positions, strict=True)
                ]
            ).sum()
        g = _gradients([total], points)
        delta = [
            _project(d + _step(direction.to(d.dtype).where(k, 0), s, config), e, config)
            for d, direction, k, s, e in zip(delta, g, keep, eta, epsilon, strict=True)
        ]
    return cast(T, delta[0] if single else delta)


def margin_gradient(
    outputs: Tensor, noise: Tensor | None = None, mask: Tensor | None = None, divergence: str = "symmetric_kl"
) -> Tensor:
    """Which way the outputs should move to meet the model's nearest decision boundary: the gradient at the outputs.

    -(e_top1 - e_top2) for classes; -sign(z_k) e_k of the least certain label k; the sign of the noise in regression.

    Args:
        outputs: (n, ..., C). noise: of that shape, in regression. mask: of that shape less the last axis.

    Example:
        >>> margin_gradient(torch.tensor([[3.0, 1.0, 2.0]]))
        tensor([[-1.,  0.,  1.]])
    """
    check_divergence("margin_gradient", divergence)
    z = outputs.detach()
    if divergence == "symmetric_kl":
        if z.shape[-1] < 2:
            raise ValueError(
                f"margin start: symmetric_kl needs at least 2 classes, got outputs of shape {tuple(z.shape)}"
            )
        top = z.topk(2, dim=-1).indices
        gradient = torch.zeros_like(z).scatter(-1, top[..., :1], -1).scatter(-1, top[..., 1:], 1)
    elif divergence == "bernoulli_symmetric_kl":
        least = z.abs().argmin(-1, keepdim=True)
        towards_0 = torch.where(z.gather(-1, least) < 0, 1, -1).to(z.dtype)
        gradient = torch.zeros_like(z).scatter(-1, least, towards_0)
    else:
        if noise is None:
            raise ValueError("margin start: squared_error needs noise of the outputs' shape for its sign, got None")
        gradient = torch.where(noise < 0, -1, 1).to(z)
    return gradient if mask is None else gradient * (mask != 0).unsqueeze(-1)


def rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean square of each x_i over its own unmasked and finite entries, (n,); 0 where there are none.

    Example:
        >>> rms(torch.tensor([[[3.0, 3.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
        tensor([3.])
    """
    return _rms(x.to(_wide(x)), _movable(x, mask))


def _rms(x: Tensor, keep: Tensor) -> Tensor:
    return (x.where(keep, 0).square().flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1)).sqrt()


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask of x's leading axes as booleans with trailing axes of length 1; ValueError where it does not fit.

    Of a signal, x of shape (n, d), it may be the mask of the entries.
    """
    if mask.ndim >= max(x.ndim, 3) or mask.shape != x.shape[: mask.ndim]:
        raise ValueError(f"the mask must have the leading axes of x, {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    return (mask != 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _movable(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which entries may be perturbed: the finite ones where the mask is true."""
    return x.isfinite() if mask is None else x.isfinite() & expand_mask(mask, x)


def output_mask(outputs: Tensor, mask: Tensor | Sequence[Tensor | None] | None) -> Tensor | None:
    """The mask, where the outputs have its axes (one output a position); else None (one output an example).

    Of several masks, the first that fits.
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


def _steepest(g: Tensor, epsilon: Tensor | float, config: SMARTConfig) -> Tensor:
    """argmax_{||delta||_p <= epsilon} <g, delta>, 0 where g = 0."""
    radius = _radius(epsilon, g)
    if config.norm == "inf":
        return radius * _sign(g)
    if config.norm == "2":
        return radius * normalize(g, "2", config.granularity)
    rows = _rows(g, config.granularity)
    at = rows.abs().argmax(-1, keepdim=True)
    corner = torch.zeros_like(rows).scatter(-1, at, _sign(rows.gather(-1, at)))
    return radius * corner.view_as(g)


def _sign(g: Tensor) -> Tensor:
    """The sign, NaN where g is: torch's own is 0 there, which would hide a broken gradient."""
    return g.sign().where(~g.isnan(), g)


def _step(g: Tensor, eta: Tensor | float, config: SMARTConfig) -> Tensor:
    length = _radius(eta, g)
    return length * (normalize(g, config.norm, config.granularity) if config.projection == "ball" else g)


def _project(delta: Tensor, epsilon: Tensor | float, config: SMARTConfig) -> Tensor:
    if config.projection == "ball":
        return _PROJECTIONS[config.norm](delta, epsilon, config.granularity)
    rows = _rows(delta, config.granularity)
    divisor = rows.abs().amax(-1, keepdim=True) + _radius(epsilon, rows)
    return (rows / divisor.where(divisor > 0, 1)).view_as(delta)


def _shrink(rows: Tensor, length: Tensor, radius: Tensor, inside: Tensor) -> Tensor:
    """Rows that are not inside, to the radius."""
    # a few ulps less, so that the rounding of the product cannot leave the ball and a second projection does nothing
    factor = radius * (1 - 4 * torch.finfo(rows.dtype).eps) / length.where(length != 0, 1)
    return rows * factor.where(~inside, 1)


def _scaled_length(rows: Tensor, norm: Norm) -> Tensor:
    largest = rows.abs().amax(-1, keepdim=True)
    return largest * _length(rows / largest.where(largest > 0, 1), norm)


def _length(rows: Tensor, norm: Norm) -> Tensor:
    return rows.square().sum(-1, keepdim=True).sqrt() if norm == "2" else rows.abs().sum(-1, keepdim=True)


def _rows(x: Tensor, granularity: Granularity) -> Tensor:
    """x with everything that one norm runs over in the last axis."""
    if x.ndim < 2:
        raise ValueError(f"expected embeddings of shape (n, ..., d), got {tuple(x.shape)}")
    return x.reshape(len(x), -1) if granularity == "example" else x


def _radius(epsilon: Tensor | float, rows: Tensor) -> Tensor:
    """A number, or one an example, (n,), against (n, ..., d)."""
    if not isinstance(epsilon, Tensor):
        return rows.new_full((), epsilon)
    return epsilon.to(rows).reshape((-1,) + (1,) * (rows.ndim - 1)) if epsilon.ndim else epsilon.to(rows)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)
