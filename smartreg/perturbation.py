"""The inner maximum of R_s: norms, projections and Algorithm 1's projected ascent (docs/math.md).

A perturbation delta has the shape of the embeddings x, (n, ..., d). `granularity` says what one norm runs over: all
axes but the batch ("example"), or the last one ("token"). An entry of x that is NaN or infinite, because the model
imputes it, is treated like a masked one: delta is 0 there, and no norm or root mean square counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smartreg.config import Granularity, Norm, SMARTConfig
from smartreg.divergences import DIVERGENCES, check_divergence

Array = NDArray[Any]
T = TypeVar("T")
Forward = Callable[[Array], tuple[Array, Callable[[Array], Array]]]


def normalize(g: ArrayLike, norm: Norm = "inf", granularity: Granularity = "example") -> Array:
    """Return g / ||g||_p, and 0 if g = 0.

    Divided by max|g| first, so that no square underflows: finite for gradients of 1e-30 in float32.

    Args:
        g: (n, ..., d).

    Source: paper, Algorithm 1.

    Example:
        >>> normalize([[3e-30, 4e-30]], "2")
        array([[0.6, 0.8]])
    """
    g = _floating(g)
    rows = _rows(g, granularity)
    largest = _largest(rows)
    unit = rows / np.where(largest > 0, largest, 1)
    if norm != "inf":  # max|unit| is 1 by now
        length = NORMS[norm].length(unit)
        unit = unit / np.where(length > 0, length, 1)
    return unit.reshape(g.shape)


def project_linf_ball(delta: ArrayLike, epsilon: ArrayLike, granularity: Granularity = "example") -> Array:
    """Return the nearest point of {delta: ||delta||_inf <= epsilon}: every entry clipped.

    Args:
        delta: (n, ..., d).
        epsilon: the radius, one number or one an example, (n,).
        granularity: makes no difference here; it is there because the three projections are called alike.

    Source: paper, Algorithm 1 (p = inf).

    Example:
        >>> project_linf_ball([[3.0, -0.5]], 1.0)
        array([[ 1. , -0.5]])
    """
    delta = _floating(delta)
    radius = _radius(epsilon, delta)
    return np.clip(delta, -radius, radius)


def project_l2_ball(delta: ArrayLike, epsilon: ArrayLike, granularity: Granularity = "example") -> Array:
    """Return the nearest point of {delta: ||delta||_2 <= epsilon}: delta min(1, epsilon / ||delta||_2).

    Args: as `project_linf_ball`.

    Example:
        >>> project_l2_ball([[3.0, 4.0]], 1.0).round(12)
        array([[0.6, 0.8]])
    """
    delta = _floating(delta)
    rows = _rows(delta, granularity)
    radius, length = _radius(epsilon, rows), _scaled_length(rows, "2")
    return _shrink(rows, length, radius, length <= radius).reshape(delta.shape)


def project_l1_ball(delta: ArrayLike, epsilon: ArrayLike, granularity: Granularity = "example") -> Array:
    """Return the Euclidean projection onto {delta: ||delta||_1 <= epsilon}: sign(delta) max(|delta| - tau, 0).

    tau is found by sorting (Duchi et al. 2008, figure 1), of |delta| less its largest entry, which loses no digits far
    outside the ball. Not a rescaling: small entries become 0.

    Args: as `project_linf_ball`.

    Example:
        >>> project_l1_ball([[3.0, 2.5, 0.1]], 1.0).round(12)
        array([[0.75, 0.25, 0.  ]])
    """
    delta = _floating(delta)
    rows = _rows(delta, granularity)
    radius = _radius(epsilon, rows)
    size = np.abs(rows)
    size = size - np.max(size, axis=-1, keepdims=True)
    descending = -np.sort(-size, axis=-1)
    over = np.cumsum(descending, axis=-1) - radius
    count = np.arange(1, rows.shape[-1] + 1)
    kept = np.maximum(np.sum(descending * count > over, axis=-1, keepdims=True), 1)
    tau = np.take_along_axis(over, kept - 1, -1) / kept
    inside = _scaled_length(rows, "1") <= radius
    shrunk = np.where(inside, rows, np.sign(rows) * np.maximum(size - tau, 0).astype(rows.dtype))
    return _shrink(shrunk, _scaled_length(shrunk, "1"), radius, inside).reshape(delta.shape)


def ascend(
    forward: Forward,
    x: ArrayLike,
    target: ArrayLike,
    config: SMARTConfig,
    noise: ArrayLike | None,
    mask: ArrayLike | None = None,
    divergence: str = "symmetric_kl",
) -> Array:
    """Return the perturbation delta of R_s, after T_x steps of projected ascent from the configured start.

    delta <- Proj_{||delta||_p <= epsilon}( delta + eta g / ||g||_p ),   g = grad_delta l_s(f(x), f(x + delta))

    Args:
        forward: x~ -> (outputs, vjp), vjp taking the gradient at the outputs to the one at x~.
        x: embeddings, (n, ..., d).
        target: the clean outputs f(x).
        config: epsilon, sigma, eta, ascent_steps, norm, granularity, start, scale, projection.
        noise: standard normal, of the shape of x for the Gaussian start; of the outputs for the margin start, of which
            only the sign is used, and only in regression (None does elsewhere).
        mask: true where a position may be perturbed, of x's leading axes. Outputs with that position axis are
            averaged over its true positions.
        divergence: the name of l_s in `smartreg.divergences`.

    Returns:
        delta, of the shape of x, ||delta||_p <= epsilon unless `config.projection` is "rescale"; 0 where x is masked,
        NaN or infinite.

    Source: paper, Algorithm 1, lines 6 to 10. The margin start: docs/math.md.

    Example:
        >>> w = np.array([[1.0, -1.0], [0.0, 2.0]])
        >>> linear = lambda x: (x @ w, lambda g: g @ w.T)
        >>> config = SMARTConfig(scale="absolute", epsilon=0.1, start="margin", ascent_steps=0)
        >>> ascend(linear, [[1.0, 1.0]], [[1.0, 1.0]], config, None).round(3)
        array([[-0.1,  0.1]])
    """
    check_divergence("ascend", divergence)
    x, target = _floating(x), np.asarray(target)
    ball = Ball(x, config, mask)
    positions = output_mask(target, mask)

    def gradient(deltas: list[Array]) -> list[Array]:
        outputs, vjp = forward(x + deltas[0])
        return [vjp(DIVERGENCES[divergence].grad(target, outputs, positions)[1])]

    if config.needs_clean_graph:
        _, vjp = forward(x)
        given = vjp(margin_gradient(target, noise, positions, divergence))
    else:
        given = start_noise(noise, config)
    return climb([ball], [ball.start(given)], gradient)[0]


def start_noise(noise: Any, config: SMARTConfig) -> Any:
    """Return the noise that the start of the ascent needs; ValueError if there is none.

    Example:
        >>> start_noise(None, SMARTConfig(start="gaussian"))
        Traceback (most recent call last):
        ...
        ValueError: ascend: start='gaussian' needs noise of the shape of x, got None
    """
    if noise is None:
        raise ValueError(f"ascend: start={config.start!r} needs noise of the shape of x, got None")
    return noise


def climb(balls: Sequence[Any], starts: list[T], gradient: Callable[[list[T]], list[T]]) -> list[T]:
    """Take T_x steps of projected ascent, each delta in its own ball; the arrays may be of any framework.

    Args:
        balls, starts: one of each for every delta.
        gradient: deltas -> the gradient of l_s at each of them.

    Source: paper, Algorithm 1, lines 7 to 10.

    Example:
        >>> config = SMARTConfig(epsilon=0.5, scale="absolute", start="gaussian", ascent_steps=2)
        >>> ball = Ball(np.ones((1, 1, 2)), config)
        >>> climb([ball], [np.zeros((1, 1, 2))], lambda deltas: [np.array([[[1.0, 0.0]]])])
        [array([[[0.5, 0. ]]])]
    """
    deltas = starts
    for _ in range(balls[0].config.ascent_steps):
        deltas = [ball.step(delta, g) for ball, delta, g in zip(balls, deltas, gradient(deltas), strict=True)]
    return deltas


class Ball:
    """Move delta in the set {delta: ||delta||_p <= epsilon}: one start, then `step` for each gradient.

    Args:
        x: embeddings, (n, ..., d), float32 or wider.
        config, mask: as `ascend` takes them.

    Example:
        >>> ball = Ball(np.ones((1, 1, 2)), SMARTConfig(epsilon=0.5, scale="absolute", start="gaussian"))
        >>> ball.step(np.zeros((1, 1, 2)), np.array([[[4.0, -2.0]]]))
        array([[[ 0.5, -0.5]]])
    """

    def __init__(self, x: Array, config: SMARTConfig, mask: ArrayLike | None = None) -> None:
        self.config = config
        self.keep = _counted(x, mask)
        scale = _rms(x, self.keep) if config.scale == "rms" else np.ones(len(x), x.dtype)
        self.epsilon, self.sigma, self.eta = (value * scale for value in (config.epsilon, config.sigma, config.eta))

    def start(self, given: ArrayLike) -> Array:
        """Return the delta that the ascent begins at.

        Gaussian: nu ~ N(0, sigma^2 I), projected; `given` is standard normal noise. Margin: `given` is a direction g,
        and delta is argmax_{||delta||_p <= epsilon} <g, delta>; 0 if g is 0.
        """
        given = self._kept(np.asarray(given, self.epsilon.dtype))
        if self.config.start == "gaussian":
            delta = _each(self.sigma, given) * given
        else:
            rows = _rows(given, self.config.granularity)
            delta = _each(self.epsilon, given) * NORMS[self.config.norm].steepest(rows).reshape(given.shape)
        return self.project(delta) if self.config.projection == "ball" else delta

    def step(self, delta: Array, g: Array) -> Array:
        """Return Proj( delta + eta g / ||g|| ), or the released code's rescaling of delta + eta g."""
        g = self._kept(g)
        if self.config.projection == "ball":
            g = normalize(g, self.config.norm, self.config.granularity)
        return self.project(delta + _each(self.eta, g) * g)

    def project(self, delta: Array) -> Array:
        """Return the nearest point of the ball, or the released code's delta / (||delta||_inf + epsilon)."""
        if self.config.projection == "ball":
            return NORMS[self.config.norm].project(delta, self.epsilon, self.config.granularity)
        rows = _rows(delta, self.config.granularity)
        divisor = _largest(rows) + _each(self.epsilon, rows)
        rescaled: Array = rows / np.where(divisor > 0, divisor, 1)
        return rescaled.reshape(delta.shape)

    def _kept(self, values: Array) -> Array:
        return np.where(self.keep, values, 0)  # a product would keep a NaN


def margin_gradient(
    outputs: ArrayLike, noise: ArrayLike | None = None, mask: ArrayLike | None = None, divergence: str = "symmetric_kl"
) -> Array:
    """Return the gradient at the outputs that leads to the model's nearest decision boundary.

    -(e_top1 - e_top2) for classes; -sign(z_k) e_k of the least certain label k; the sign of the noise in regression.

    Args:
        outputs: (n, ..., C). noise: of that shape, in regression. mask: of that shape less the last axis.

    Example:
        >>> margin_gradient([[3.0, 1.0, 2.0]])
        array([[-1.,  0.,  1.]])
    """
    check_divergence("margin_gradient", divergence)
    z = _floating(outputs)
    gradient = np.zeros_like(z)
    if divergence == "symmetric_kl":
        if z.shape[-1] < 2:
            raise ValueError(
                f"margin start: symmetric_kl needs at least 2 classes, got outputs of shape {z.shape}. Compare one "
                "output by 'squared_error' or 'bernoulli_symmetric_kl'"
            )
        order = np.argsort(-z, axis=-1, kind="stable")
        np.put_along_axis(gradient, order[..., :1], -1, -1)
        np.put_along_axis(gradient, order[..., 1:2], 1, -1)
    elif divergence == "bernoulli_symmetric_kl":
        least = np.argmin(np.abs(z), axis=-1, keepdims=True)
        np.put_along_axis(gradient, least, np.where(np.take_along_axis(z, least, -1) < 0, 1, -1), -1)
    else:
        if noise is None:
            raise ValueError(f"margin start: {divergence} needs noise of the outputs' shape for its sign, got None")
        gradient = np.where(np.asarray(noise) < 0, -1, 1).astype(z.dtype)
    return gradient if mask is None else gradient * (np.asarray(mask) != 0)[..., None]


def rms(x: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Return the root mean square of each x_i over its own finite and unmasked entries, (n,); 0 if it has none.

    Example:
        >>> rms([[[3.0, 3.0], [9.0, 9.0]]], [[1, 0]])
        array([3.])
    """
    x = _floating(x)
    return _rms(x, _counted(x, mask))


def _rms(x: Array, keep: NDArray[np.bool_]) -> Array:
    axes = tuple(range(1, x.ndim))
    count = np.maximum(keep.sum(axis=axes), 1).astype(x.dtype)
    result: Array = np.sqrt(np.sum(np.where(keep, x * x, 0), axis=axes) / count)
    return result


def expand_mask(mask: ArrayLike, x: Array) -> NDArray[np.bool_]:
    """Return the mask of x's leading axes as booleans with trailing axes of length 1; ValueError if it does not fit.

    If x is a signal, (n, d), it may be the mask of the entries.

    Example:
        >>> expand_mask([[1, 0]], np.zeros((1, 2, 3))).shape
        (1, 2, 1)
    """
    keep: NDArray[np.bool_] = np.asarray(mask) != 0
    if keep.ndim >= max(x.ndim, 3) or keep.shape != x.shape[: keep.ndim]:
        raise ValueError(f"the mask must have the leading axes of x, {x.shape[:-1]}, got {keep.shape}")
    return keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim))


def _counted(x: Array, mask: ArrayLike | None) -> NDArray[np.bool_]:
    """Say which entries of x are perturbed, as booleans of its shape: those that are finite and not masked."""
    finite: NDArray[np.bool_] = np.isfinite(x)
    return finite if mask is None else finite & expand_mask(mask, x)


def output_mask(outputs: Array, mask: ArrayLike | None) -> ArrayLike | None:
    """Return the mask if the outputs have its axes (one output a position), else None (one output an example).

    Example:
        >>> output_mask(np.zeros((1, 2, 3)), [[1, 0]]), output_mask(np.zeros((1, 3)), [[1, 0]])
        ([[1, 0]], None)
    """
    if mask is None or outputs.ndim < 3 or np.shape(mask) != outputs.shape[:-1]:
        return None
    return mask


def _shrink(rows: Array, length: Array, radius: Array, inside: Array) -> Array:
    """Scale the rows that are not inside to the radius."""
    # a few ulps less: rounding the product cannot leave the ball, and a second projection changes nothing
    factor = radius * (1 - 4 * np.finfo(rows.dtype).eps) / np.where(inside | (length == 0), 1, length)
    shrunk: Array = rows * np.where(inside, 1, factor).astype(rows.dtype)
    return shrunk


def _scaled_length(rows: Array, norm: Norm) -> Array:
    largest = _largest(rows)
    length: Array = largest * NORMS[norm].length(rows / np.where(largest > 0, largest, 1))
    return length


def _largest(rows: Array) -> Array:
    largest: Array = np.max(np.abs(rows), axis=-1, keepdims=True)
    return largest


def _l1_corner(rows: Array) -> Array:
    at = np.argmax(np.abs(rows), axis=-1, keepdims=True)
    corner = np.zeros_like(rows)
    np.put_along_axis(corner, at, np.sign(np.take_along_axis(rows, at, -1)), -1)
    return corner


class NormOfRows(NamedTuple, Generic[T]):
    """Hold a norm of rows, (..., k), of any framework.

    To add one: its name in `smartreg.config.Norm`, and in each package these functions and a line of `NORMS`.

    Attributes:
        length: ||row||_p, (..., 1), of rows whose largest entry is 1.
        project: the projection onto the ball, called as `project_linf_ball`.
        steepest: argmax_{||u||_p <= 1} <row, u>, 0 if the row is 0.
    """

    length: Callable[[T], T]
    project: Callable[[Any, Any, Granularity], T]
    steepest: Callable[[T], T]


NORMS: dict[Norm, NormOfRows[Array]] = {
    "inf": NormOfRows(_largest, project_linf_ball, np.sign),
    "2": NormOfRows(
        lambda rows: np.sqrt(np.sum(rows * rows, axis=-1, keepdims=True)),
        project_l2_ball,
        lambda rows: normalize(rows, "2", "token"),
    ),
    "1": NormOfRows(lambda rows: np.sum(np.abs(rows), axis=-1, keepdims=True), project_l1_ball, _l1_corner),
}


def _rows(x: Array, granularity: Granularity) -> Array:
    """Put everything that one norm runs over into the last axis."""
    if x.ndim < 2:
        raise ValueError(f"expected embeddings of shape (n, ..., d), got {x.shape}")
    return x.reshape(len(x), -1) if granularity == "example" else x


def _radius(epsilon: ArrayLike, rows: Array) -> Array:
    radius = np.asarray(epsilon, rows.dtype)
    return _each(radius, rows) if radius.ndim else radius


def _each(values: Array, x: Array) -> Array:
    """Shape one value an example, (n,), to be multiplied with (n, ..., d)."""
    return values.reshape((-1,) + (1,) * (x.ndim - 1))


def _floating(x: ArrayLike) -> Array:
    x = np.asarray(x)
    return x.astype(np.result_type(x, np.float32), copy=False)
