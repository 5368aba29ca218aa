"""Find the inner maximum of R_s in TensorFlow: norms, projections and Algorithm 1's projected ascent.

A perturbation delta has the shape of the embeddings x, (n, ..., d). `granularity` says what one norm runs over: all
axes but the batch ("example"), or the last one ("token"). `smartreg.perturbation` line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from smartreg.config import Granularity, Norm, SMARTConfig
from smartreg.divergences import check_divergence
from smartreg.perturbation import NormOfRows, climb, start_noise
from smartreg_tf.divergences import DIVERGENCES, as_mask

Tensor = Any


def normalize(g: Tensor, norm: Norm = "inf", granularity: Granularity = "example") -> Tensor:
    """Return g / ||g||_p, and 0 if g = 0.

    Divided by max|g| first, so that no square underflows: finite for gradients of 1e-30 in float32.

    Args:
        g: (n, ..., d).

    Source: paper, Algorithm 1.

    Example:
        >>> normalize([[3e-30, 4e-30]], "2").numpy()
        array([[0.6, 0.8]], dtype=float32)
    """
    g = floating(g)
    rows = _rows(g, granularity)
    largest = _largest(rows)
    unit = rows / tf.where(largest > 0, largest, 1)
    if norm != "inf":  # max|unit| is 1 by now
        length = NORMS[norm].length(unit)
        unit = unit / tf.where(length > 0, length, 1)
    return tf.reshape(unit, tf.shape(g))


def project_linf_ball(delta: Tensor, epsilon: Tensor, granularity: Granularity = "example") -> Tensor:
    """Return the nearest point of {delta: ||delta||_inf <= epsilon}: every entry clipped.

    Args:
        delta: (n, ..., d).
        epsilon: the radius, one number or one an example, (n,).
        granularity: makes no difference here; it is there because the three projections are called alike.

    Source: paper, Algorithm 1 (p = inf).

    Example:
        >>> project_linf_ball([[3.0, -0.5]], 1.0).numpy()
        array([[ 1. , -0.5]], dtype=float32)
    """
    delta = floating(delta)
    radius = _radius(epsilon, delta)
    return tf.minimum(tf.maximum(delta, -radius), radius)


def project_l2_ball(delta: Tensor, epsilon: Tensor, granularity: Granularity = "example") -> Tensor:
    """Return the nearest point of {delta: ||delta||_2 <= epsilon}: delta min(1, epsilon / ||delta||_2).

    Args: as `project_linf_ball`.

    Example:
        >>> project_l2_ball([[3.0, 4.0]], 1.0).numpy().round(5)
        array([[0.6, 0.8]], dtype=float32)
    """
    delta = floating(delta)
    rows = _rows(delta, granularity)
    radius, length = _radius(epsilon, rows), _scaled_length(rows, "2")
    return tf.reshape(_shrink(rows, length, radius, length <= radius), tf.shape(delta))


def project_l1_ball(delta: Tensor, epsilon: Tensor, granularity: Granularity = "example") -> Tensor:
    """Return the Euclidean projection onto {delta: ||delta||_1 <= epsilon}: sign(delta) max(|delta| - tau, 0).

    tau is found by dropping the entries that it makes 0, until there is none more (Michelot 1986), of |delta| less its
    largest entry, which loses no digits far outside the ball. Not a rescaling: small entries become 0.

    Args: as `project_linf_ball`.

    Example:
        >>> project_l1_ball([[3.0, 2.5, 0.1]], 1.0).numpy().round(5)
        array([[0.75, 0.25, 0.  ]], dtype=float32)
    """
    delta = floating(delta)
    rows = _rows(delta, granularity)
    radius = _radius(epsilon, rows)
    size = tf.abs(rows)
    size -= tf.reduce_max(size, -1, keepdims=True)

    def threshold(kept: Tensor) -> Tensor:  # the kept entries of size - tau add up to the radius
        total = tf.reduce_sum(tf.where(kept, size, 0), -1, keepdims=True)
        count = tf.reduce_sum(tf.cast(kept, size.dtype), -1, keepdims=True)
        return (total - radius) / tf.maximum(count, 1)

    def drop(kept: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        fewer = kept & (size > threshold(kept))
        fewer.set_shape(kept.shape)
        return fewer, tf.reduce_any(fewer != kept)

    # not tf.sort: XLA takes its top_k for a tensor of unknown size, and then copies the step's functions
    everything = tf.ones_like(size, tf.bool), tf.constant(True)
    tau = threshold(tf.while_loop(lambda kept, dropped: dropped, drop, everything)[0])
    inside = _scaled_length(rows, "1") <= radius
    shrunk = tf.where(inside, rows, tf.sign(rows) * tf.maximum(size - tau, 0))
    return tf.reshape(_shrink(shrunk, _scaled_length(shrunk, "1"), radius, inside), tf.shape(delta))


def ascend(
    forward: Callable[[Any], Any],
    x: Any,
    target: Any,
    config: SMARTConfig,
    noise: Any,
    mask: Any = None,
    divergence: Any = "symmetric_kl",
    positions: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor] | None = None,
    tape: tf.GradientTape | None = None,
    unconnected: Callable[[list[Tensor | None]], None] | None = None,
) -> Any:
    """Return the perturbation delta of R_s, after T_x steps of projected ascent from the configured start.

    delta <- Proj_{||delta||_p <= epsilon}( delta + eta g / ||g||_p ),   g = grad_delta l_s(f(x), f(x + delta))

    If the model embeds several inputs or has several outputs, x, noise and mask are lists of one length, target and
    divergence of another. `forward` then takes and gives lists, and the divergences add up.

    Args:
        forward: x~ -> outputs, differentiable by TensorFlow.
        x: embeddings, (n, ..., d).
        target: the clean outputs f(x).
        config: epsilon, sigma, eta, ascent_steps, norm, granularity, start, scale, projection.
        noise: standard normal, of the shape of x for the Gaussian start; of the outputs for the margin start, of
            which only the sign is used, and only in regression (None does elsewhere).
        mask: true where a position may be perturbed, of x's leading axes. Outputs with that position axis are
            averaged over its true positions.
        divergence: the name of l_s in `smartreg_tf.divergences`.
        positions: for each output, which of its positions count, if that is not as `mask` says.
        scales: for each output, what l_s weighs in the sum, (n,) or one number; 1 by default.
        tape: has recorded the way from x to `target`, which saves the margin start a forward of its own.
        unconnected: is called with the gradients if some are None, and may raise; such a gradient is 0.

    Returns:
        delta, of the shape of x, ||delta||_p <= epsilon unless `config.projection` is "rescale"; 0 where x is masked,
        NaN or infinite.

    Source: paper, Algorithm 1, lines 6 to 10. The margin start: docs/math.md.

    Example:
        >>> w = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> config = SMARTConfig(scale="absolute", epsilon=0.1, start="margin", ascent_steps=0)
        >>> ascend(lambda x: x @ w, [[1.0, 1.0]], tf.constant([[1.0, 1.0]]), config, None).numpy().round(3)
        array([[-0.1,  0.1]], dtype=float32)
    """
    single = isinstance(divergence, str)
    names = [divergence] if single else list(divergence)
    for name in names:
        check_divergence("ascend", name)
    own = [floating(x)] if single else list(x)
    clean = [tf.convert_to_tensor(target)] if single else list(target)
    masks, noises = ([mask], [noise]) if single else (mask or [None] * len(own), noise)
    fixed = [tf.stop_gradient(z) for z in clean]
    xs = [tf.stop_gradient(floating(value)) for value in own]
    balls = [Ball(value, config, m) for value, m in zip(xs, masks, strict=True)]
    positions = [output_mask(z, masks[0]) for z in fixed] if positions is None else positions
    compared = list(zip(names, fixed, positions, scales or [None] * len(fixed), strict=True))

    def outputs_at(points: list[Tensor]) -> list[Tensor]:
        return [forward(points[0])] if single else forward(points)

    def reached(gradients: list[Tensor | None]) -> list[Tensor]:
        if unconnected is not None and any(g is None for g in gradients):
            unconnected(gradients)
        found = [tf.zeros_like(value) if g is None else g for g, value in zip(gradients, xs, strict=True)]
        return [tf.stop_gradient(floating(tf.convert_to_tensor(g))) for g in found]

    def gradient(deltas: list[Tensor]) -> list[Tensor]:
        points = [tf.cast(v + delta, o.dtype) for v, delta, o in zip(xs, deltas, own, strict=True)]
        with tf.GradientTape(watch_accessed_variables=False) as ascent:
            ascent.watch(points)
            values = [
                (1 if scale is None else scale) * DIVERGENCES[name](z, at, m)
                for (name, z, m, scale), at in zip(compared, outputs_at(points), strict=True)
            ]
        return reached(ascent.gradient(values, points))

    if config.needs_clean_graph:
        if tape is None:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(own)
                clean = [floating(z) for z in outputs_at(own)]
        upwards = []
        for (name, z, m, scale), nu in zip(compared, noises, strict=True):
            upward = margin_gradient(z, nu, m, name)
            upwards.append(upward if scale is None else each(scale, z) * upward)
        given = reached(tape.gradient(clean, own, output_gradients=upwards))
    else:
        given = [start_noise(nu, config) for nu in noises or [None]]
    starts = [ball.start(value) for ball, value in zip(balls, given, strict=True)]
    deltas = [tf.stop_gradient(delta) for delta in climb(balls, starts, gradient)]
    return deltas[0] if single else deltas


class Ball:
    """Move delta in the set {delta: ||delta||_p <= epsilon}: one start, then `step` for each gradient.

    Args:
        x: embeddings, (n, ..., d), float32 or float64.
        config, mask: as `ascend` takes them.

    Example:
        >>> ball = Ball(tf.ones([1, 1, 2]), SMARTConfig(epsilon=0.5, scale="absolute", start="gaussian"))
        >>> ball.step(tf.zeros([1, 1, 2]), tf.constant([[[4.0, -2.0]]])).numpy().tolist()
        [[[0.5, -0.5]]]
    """

    def __init__(self, x: Tensor, config: SMARTConfig, mask: Tensor | None = None) -> None:
        self.config = config
        self.keep = _counted(x, mask)
        scale = _rms(x, self.keep) if config.scale == "rms" else tf.ones(tf.shape(x)[:1], x.dtype)
        self.epsilon, self.sigma, self.eta = (value * scale for value in (config.epsilon, config.sigma, config.eta))

    def start(self, given: Tensor) -> Tensor:
        """Return the delta that the ascent begins at.

        Gaussian: nu ~ N(0, sigma^2 I), projected; `given` is standard normal noise. Margin: `given` is a direction g,
        and delta is argmax_{||delta||_p <= epsilon} <g, delta>; 0 if g is 0.
        """
        given = self._kept(tf.cast(given, self.epsilon.dtype))
        if self.config.start == "gaussian":
            delta = each(self.sigma, given) * given
        else:
            rows = _rows(given, self.config.granularity)
            delta = each(self.epsilon, given) * tf.reshape(NORMS[self.config.norm].steepest(rows), tf.shape(given))
        return self.project(delta) if self.config.projection == "ball" else delta

    def step(self, delta: Tensor, g: Tensor) -> Tensor:
        """Return Proj( delta + eta g / ||g|| ), or the released code's rescaling of delta + eta g."""
        g = self._kept(g)
        if self.config.projection == "ball":
            g = normalize(g, self.config.norm, self.config.granularity)
        return self.project(delta + each(self.eta, g) * g)

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the ball, or the released code's delta / (||delta||_inf + epsilon)."""
        if self.config.projection == "ball":
            return NORMS[self.config.norm].project(delta, self.epsilon, self.config.granularity)
        rows = _rows(delta, self.config.granularity)
        divisor = _largest(rows) + each(self.epsilon, rows)
        return tf.reshape(rows / tf.where(divisor > 0, divisor, 1), tf.shape(delta))

    def _kept(self, values: Tensor) -> Tensor:
        return tf.where(self.keep, values, tf.zeros_like(values))  # a product would keep a NaN


def margin_gradient(
    outputs: Tensor, noise: Tensor | None = None, mask: Tensor | None = None, divergence: str = "symmetric_kl"
) -> Tensor:
    """Return the gradient at the outputs that leads to the model's nearest decision boundary.

    -(e_top1 - e_top2) for classes; -sign(z_k) e_k of the least certain label k; the sign of the noise in regression.

    Args:
        outputs: (n, ..., C). noise: of that shape, in regression. mask: of that shape less the last axis.

    Example:
        >>> margin_gradient([[3.0, 1.0, 2.0]]).numpy()
        array([[-1.,  0.,  1.]], dtype=float32)
    """
    check_divergence("margin_gradient", divergence)
    z = floating(outputs)
    classes = tf.shape(z)[-1]
    if divergence == "symmetric_kl":
        if z.shape[-1] is not None and z.shape[-1] < 2:
            raise ValueError(
                f"margin start: symmetric_kl needs at least 2 classes, got outputs of shape {z.shape}. Compare one "
                "output by 'squared_error' or 'bernoulli_symmetric_kl'"
            )
        # of two equal classes the lower one, as a stable sort has them; not top_k, see `project_l1_ball`
        best = tf.argmax(z, -1)
        others = tf.where(tf.range(classes - 1, dtype=best.dtype) < best[..., None], z[..., :-1], z[..., 1:])
        second = tf.argmax(others, -1)
        second += tf.cast(second >= best, best.dtype)
        gradient = tf.one_hot(second, classes, dtype=z.dtype) - tf.one_hot(best, classes, dtype=z.dtype)
    elif divergence == "bernoulli_symmetric_kl":
        least = tf.one_hot(tf.argmin(tf.abs(z), -1), classes, dtype=z.dtype)
        gradient = least * tf.where(z < 0, tf.ones_like(z), -tf.ones_like(z))
    else:
        if noise is None:
            raise ValueError(f"margin start: {divergence} needs noise of the outputs' shape for its sign, got None")
        gradient = tf.where(tf.convert_to_tensor(noise) < 0, -tf.ones_like(z), tf.ones_like(z))
    return gradient if mask is None else gradient * tf.cast(as_mask(mask), z.dtype)[..., None]


def rms(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the root mean square of each x_i over its own finite and unmasked entries, (n,); 0 if it has none.

    Example:
        >>> rms([[[3.0, 3.0], [9.0, 9.0]]], [[1, 0]]).numpy()
        array([3.], dtype=float32)
    """
    x = floating(x)
    return _rms(x, _counted(x, mask))


def _rms(x: Tensor, keep: Tensor) -> Tensor:
    axes = list(range(1, x.shape.rank))
    count = tf.maximum(tf.reduce_sum(tf.cast(keep, x.dtype), axes), 1)
    return tf.sqrt(tf.reduce_sum(tf.where(keep, x * x, tf.zeros_like(x)), axes) / count)


def expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask of x's leading axes as booleans with trailing axes of length 1; ValueError if it does not fit.

    If x is a signal, (n, d), it may be the mask of the entries.

    Example:
        >>> expand_mask([[1, 0]], tf.zeros([1, 2, 3])).shape.as_list()
        [1, 2, 1]
    """
    keep = as_mask(mask)
    rank = keep.shape.rank
    if rank is None or rank >= max(x.shape.rank, 3) or not keep.shape.is_compatible_with(x.shape[:rank]):
        raise ValueError(f"the mask must have the leading axes of x, {tuple(x.shape[:-1])}, got {tuple(keep.shape)}")
    return tf.reshape(keep, tf.concat([tf.shape(keep), tf.ones([x.shape.rank - rank], tf.int32)], 0))


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Say which entries of x are perturbed, as booleans of its shape: those that are finite and not masked."""
    finite = tf.math.is_finite(x)
    return finite if mask is None else finite & expand_mask(mask, x)


def output_mask(outputs: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask if the outputs have its axes (one output a position), else None (one output an example).

    Example:
        >>> output_mask(tf.zeros([1, 3]), [[1, 0]]) is None
        True
    """
    if mask is None or outputs.shape.rank < 3:
        return None
    mask = tf.convert_to_tensor(mask)
    return mask if mask.shape.is_compatible_with(outputs.shape[:-1]) else None


def floating(x: Tensor) -> Tensor:
    """Return x as a tensor of float32, or of float64 if it is one."""
    x = tf.convert_to_tensor(x)
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def _shrink(rows: Tensor, length: Tensor, radius: Tensor, inside: Tensor) -> Tensor:
    """Scale the rows that are not inside to the radius."""
    # a few ulps less: rounding the product cannot leave the ball, and a second projection changes nothing
    ulp = 2.0**-23 if rows.dtype == tf.float32 else 2.0**-52
    factor = radius * (1 - 4 * ulp) / tf.where(length != 0, length, 1)
    return rows * tf.where(inside, tf.ones_like(factor), factor)


def _scaled_length(rows: Tensor, norm: Norm) -> Tensor:
    largest = _largest(rows)
    return largest * NORMS[norm].length(rows / tf.where(largest > 0, largest, 1))


def _largest(rows: Tensor) -> Tensor:
    return tf.reduce_max(tf.abs(rows), -1, keepdims=True)


def _l1_corner(rows: Tensor) -> Tensor:
    return tf.one_hot(tf.argmax(tf.abs(rows), -1), tf.shape(rows)[-1], dtype=rows.dtype) * tf.sign(rows)


NORMS: dict[Norm, NormOfRows[Tensor]] = {
    "inf": NormOfRows(_largest, project_linf_ball, tf.sign),
    "2": NormOfRows(
        lambda rows: tf.sqrt(tf.reduce_sum(rows * rows, -1, keepdims=True)),
        project_l2_ball,
        lambda rows: normalize(rows, "2", "token"),
    ),
    "1": NormOfRows(lambda rows: tf.reduce_sum(tf.abs(rows), -1, keepdims=True), project_l1_ball, _l1_corner),
}


def _rows(x: Tensor, granularity: Granularity) -> Tensor:
    """Put everything that one norm runs over into the last axis."""
    if x.shape.rank is None or x.shape.rank < 2:
        raise ValueError(f"expected embeddings of shape (n, ..., d), got {x.shape}")
    return tf.reshape(x, [tf.shape(x)[0], -1]) if granularity == "example" else x


def _radius(epsilon: Tensor, rows: Tensor) -> Tensor:
    # a Python number straight to the dtype: tf.cast takes it through float32
    radius = tf.cast(epsilon, rows.dtype) if tf.is_tensor(epsilon) else tf.constant(epsilon, rows.dtype)
    return each(radius, rows) if radius.shape.rank else radius


def each(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value an example, (n,), to be multiplied with (n, ..., d)."""
    return tf.reshape(values, [-1] + [1] * (x.shape.rank - 1))
