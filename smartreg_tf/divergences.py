"""Compute the divergences l_s in TensorFlow, with analytic gradients; `smartreg.divergences` line by line.

Every function takes outputs of shape (n, ..., C), the last axis being the classes, labels or values, and gives one
number an example, (n,): the sum over the last axis, averaged over the positions between (those the mask leaves).
Float32 and float64 are computed as they come, narrower types in float32. Eager, `tf.function` and XLA alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Tensor = Any

# With as many classes and as many logits, a CPU works on blocks of positions with about BLOCK logits, which its caches
# hold. A GPU would wait for each block.
CLASSES, LOGITS, BLOCK = 1 << 12, 1 << 22, 1 << 16


def symmetric_kl(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the symmetrised KL divergence of the distributions softmax(a) and softmax(b), differentiable in both.

    J(a, b) = KL(P||Q) + KL(Q||P) = sum_c (p_c - q_c) (log p_c - log q_c)

    Args:
        a, b: logits, (n, ..., C). A class that is -inf in both takes no part; in one of them, J is inf.
        mask: which positions count, (n, ...) without the class axis.

    Returns:
        (n,), at least 0; relative error <= 1e-5 in float32 and 1e-12 in float64.

    Raises:
        ValueError: the shapes differ, or there is no class axis.

    Source: paper, section 3.1.

    Example:
        >>> print(f"{symmetric_kl([[0.0, 1e-5]], [[0.0, 0.0]])[0]:.5g}")
        2.5e-11
    """
    a, b = _pair("symmetric_kl", a, b)
    if _in_blocks(a):
        return _symmetric_kl_in_blocks(a, b, mask)

    def value(a: Tensor, b: Tensor) -> Any:
        j, gradients = _symmetric_kl_terms(a, b)
        return j, lambda: [_mean_grad(grad, mask) for grad in gradients()]

    return _with_gradient("symmetric_kl", value, a, b, mask)


def symmetric_kl_grad(a: Tensor, b: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradients of `symmetric_kl` with respect to both arguments.

    dJ/da = p (r - E_p r) + (p - q),   dJ/db = q (E_q r - r) + (q - p),   r = log p - log q

    The row sums to 0; relative error, to the row's largest entry, as `symmetric_kl`'s.

    Example:
        >>> symmetric_kl_grad([[0.0, 0.0]], [[0.0, 0.0]])[0].numpy()
        array([[0., 0.]], dtype=float32)
    """
    a, b = _pair("symmetric_kl_grad", a, b)
    if _in_blocks(a):
        weights = position_weights(a, mask)
        return tuple(grad * weights for grad in _blocks(a, b, mask)[1:])
    return tuple(_mean_grad(grad, mask) for grad in _symmetric_kl_rows(a, b)[1:])


def bernoulli_symmetric_kl(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the symmetrised KL divergence of independent Bernoullis with logits a and b, summed over the labels.

    J(a, b) = sum_k (sigma(a_k) - sigma(b_k)) (a_k - b_k)

    Args, Returns, Raises: as `symmetric_kl`, with labels for classes.

    Source: paper, section 3.1, for each label.

    Example:
        >>> bernoulli_symmetric_kl([[0.0, 2.0]], [[0.0, 2.0]]).numpy()
        array([0.], dtype=float32)
    """

    def value(a: Tensor, b: Tensor) -> Any:
        d, difference = _bernoulli_terms(a, b)
        return tf.reduce_sum(difference * d, -1), lambda: bernoulli_symmetric_kl_grad(a, b, mask)

    return _with_gradient("bernoulli_symmetric_kl", value, a, b, mask)


def bernoulli_symmetric_kl_grad(a: Tensor, b: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradients of `bernoulli_symmetric_kl`: dJ/da = sigma'(a) d + sigma(a) - sigma(b), d = a - b.

    Example:
        >>> bernoulli_symmetric_kl_grad([[1.0]], [[1.0]])[0].numpy()
        array([[0.]], dtype=float32)
    """
    a, b = _pair("bernoulli_symmetric_kl_grad", a, b)
    d, difference = _bernoulli_terms(a, b)
    return (
        _mean_grad(_sigmoid(a) * _sigmoid(-a) * d + difference, mask),
        -_mean_grad(_sigmoid(b) * _sigmoid(-b) * d + difference, mask),
    )


def squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error, for regression: sum_k (a_k - b_k)^2.

    Args, Returns, Raises: as `symmetric_kl`, with values for classes.

    Source: paper, section 3.1.

    Example:
        >>> squared_error([[1.0], [3.0]], [[1.0], [1.0]]).numpy()
        array([0., 4.], dtype=float32)
    """

    def value(a: Tensor, b: Tensor) -> Any:
        return tf.reduce_sum((a - b) ** 2, -1), lambda: squared_error_grad(a, b, mask)

    return _with_gradient("squared_error", value, a, b, mask)


def squared_error_grad(a: Tensor, b: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradients of `squared_error`: 2 (a - b) and 2 (b - a).

    Example:
        >>> squared_error_grad([[3.0]], [[1.0]])[0].numpy()
        array([[4.]], dtype=float32)
    """
    a, b = _pair("squared_error_grad", a, b)
    grad = _mean_grad(2 * (a - b), mask)
    return grad, -grad


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "symmetric_kl": symmetric_kl,
    "bernoulli_symmetric_kl": bernoulli_symmetric_kl,
    "squared_error": squared_error,
}


def mean_positions(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean of (n, ...) over all axes but the first, where the mask is true; 0 if it is true nowhere.

    Example:
        >>> mean_positions(tf.constant([[1.0, 2.0, 9.0]]), [[1, 1, 0]]).numpy()
        array([1.5], dtype=float32)
    """
    if mask is None and values.shape.rank == 1:  # one position an example
        return tf.identity(values)
    weights = position_weights(values[..., None], mask)[..., 0]
    kept = tf.where(weights > 0, values, tf.zeros_like(values)) * weights
    return tf.reduce_sum(kept, axis=list(range(1, values.shape.rank)))


def _mean_grad(grad: Tensor, mask: Tensor | None) -> Tensor:
    """Give the gradient of `mean_positions` from that of each position: 0 where the mask is false, NaN or not."""
    if mask is None and grad.shape.rank == 2:  # one position an example
        return grad
    weights = position_weights(grad, mask)
    return tf.where(weights > 0, grad, tf.zeros_like(grad)) * weights


def position_weights(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the weight of each position of (n, ..., C) in its example's mean, (n, ..., 1); they add up to 1.

    Example:
        >>> position_weights(tf.zeros([1, 3, 2]), [[1, 1, 0]])[0, :, 0].numpy().tolist()
        [0.5, 0.5, 0.0]
    """
    keep = tf.ones(tf.shape(outputs)[:-1], outputs.dtype)
    if mask is not None:
        mask = as_mask(mask)
        if not outputs.shape[:-1].is_compatible_with(mask.shape):
            raise ValueError(
                "the mask must have the outputs' shape without the last axis, "
                f"{tuple(outputs.shape[:-1])}, got {tuple(mask.shape)}"
            )
        keep = tf.cast(mask, outputs.dtype)
    count = tf.maximum(tf.reduce_sum(keep, axis=list(range(1, keep.shape.rank)), keepdims=True), 1)
    return (keep / count)[..., None]


def as_mask(mask: Tensor) -> Tensor:
    """Return a mask of any type as booleans, true where it is not 0."""
    mask = tf.convert_to_tensor(mask)
    return mask if mask.dtype == tf.bool else mask != 0


def _with_gradient(call: str, value: Callable[..., Any], a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Average a value over positions; autodiff of it would cancel digits away.

    Args:
        value: (a, b) -> its value at each position, and a function that gives the two gradients of the average.
    """
    a, b = _pair(call, a, b)

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def divergence(a: Tensor, b: Tensor) -> Any:
        values, gradients = value(a, b)

        def vjp(upstream: Tensor) -> list[Tensor]:
            each = tf.reshape(upstream, [-1] + [1] * (a.shape.rank - 1))
            return [each * grad for grad in gradients()]

        return mean_positions(values, mask), vjp

    return divergence(a, b)


def _in_blocks(a: Tensor) -> bool:
    """Tell whether logits are so many that all temporaries at once cost more than blocks of positions one by one."""
    classes, logits = a.shape[-1], a.shape.num_elements()
    large = classes is not None and classes >= CLASSES and (logits is None or logits >= LOGITS)
    return large and all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def _symmetric_kl_in_blocks(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Compute `symmetric_kl` and its gradients at once: the logits, the gradients and a block are in memory."""

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def divergence(a: Tensor, b: Tensor) -> Any:
        weights = position_weights(a, mask)
        j, *grads = _blocks(tf.stop_gradient(a), tf.stop_gradient(b), mask)

        def vjp(upstream: Tensor) -> list[Tensor]:
            each = tf.reshape(upstream, [-1] + [1] * (a.shape.rank - 1)) * weights
            return [each * first(grad, i)(a, b) for i, grad in enumerate(grads)]

        return mean_positions(j, mask), vjp

    def first(grad: Tensor, argument: int) -> Callable[..., Tensor]:
        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def known(a: Tensor, b: Tensor) -> Any:
            def vjp(upstream: Tensor) -> Any:  # of the second derivative, all positions at once
                with tf.GradientTape() as tape:
                    tape.watch((a, b))
                    found = _unmasked(_symmetric_kl_rows(a, b)[1 + argument], mask)
                return tape.gradient(found, (a, b), output_gradients=upstream)

            return tf.identity(grad), vjp

        found: Callable[..., Tensor] = known
        return found

    return divergence(a, b)


def _blocks(a: Tensor, b: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return what `_symmetric_kl_rows` does, block by block; 0 where the mask is false."""
    classes, shape = a.shape[-1], tf.shape(a)
    size = max(1, BLOCK // classes)
    keep = tf.reshape(tf.ones(shape[:-1], tf.bool) if mask is None else as_mask(mask), [-1])
    a, b = tf.reshape(a, [-1, classes]), tf.reshape(b, [-1, classes])
    signature = [tf.TensorSpec([size, *rest], a.dtype) for rest in ([], [classes], [classes])]

    def block(start: Tensor) -> list[Tensor]:
        at = tf.minimum(start + tf.range(size), tf.shape(a)[0] - 1)  # all blocks have one size, as XLA needs it
        kept = tf.gather(keep, at)

        def rows() -> list[Tensor]:
            return _rows_of_a_block(*(_unmasked(tf.gather(z, at), kept) for z in (a, b)))

        found: list[Tensor] = tf.cond(
            tf.reduce_any(kept), rows, lambda: [tf.zeros(z.shape, z.dtype) for z in signature]
        )
        return found

    found = tf.map_fn(block, tf.range(0, tf.shape(a)[0], size), fn_output_signature=signature)
    whole = [tf.reshape(z, [-1, *rest.shape[1:]])[: tf.shape(a)[0]] for z, rest in zip(found, signature, strict=True)]
    return [tf.reshape(whole[0], shape[:-1]), *(tf.reshape(z, shape) for z in whole[1:])]


def _rows_of_a_block(a: Tensor, b: Tensor) -> list[Tensor]:
    """Return what `_symmetric_kl_rows` does; in half the time if no class is far, as in R_s."""
    huge = a.dtype.max / 16
    x, y = tf.clip_by_value(a, -huge, huge), tf.clip_by_value(b, -huge, huge)
    d = _difference(x, y)(_argmax(x))

    def close() -> list[Tensor]:
        q, _ = _softmax(y)
        r = d - tf.math.log1p(_sum(q * tf.math.expm1(d)))
        p_minus_q = q * tf.math.expm1(r)
        j = tf.reduce_sum(tf.maximum(p_minus_q * r, 0), -1)
        return [j, *_gradients(q + p_minus_q, q, p_minus_q, d, d)]

    # a row of infinities is not close to another: clipped, its classes would all be alike
    finite = tf.maximum(tf.abs(tf.reduce_max(x, -1)), tf.abs(tf.reduce_max(y, -1))) < huge
    is_close = tf.reduce_all(tf.abs(d) < 1) & tf.reduce_all(finite)
    found: list[Tensor] = tf.cond(is_close, close, lambda: list(_symmetric_kl_rows(a, b)))
    return found


def _unmasked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Put 0 where the mask, of the leading axes, is false."""
    if mask is None:
        return values
    keep = as_mask(mask)
    return tf.where(keep if values.shape.rank == keep.shape.rank else keep[..., None], values, 0)


def _pair(call: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = tf.convert_to_tensor(a), tf.convert_to_tensor(b)
    if a.shape.rank is None or a.shape.rank < 2 or not a.shape.is_compatible_with(b.shape):
        raise ValueError(f"{call}: expected two tensors of one shape (n, ..., C), got {a.shape} and {b.shape}")
    dtype = tf.float64 if tf.float64 in (a.dtype, b.dtype) else tf.float32
    return tf.cast(a, dtype), tf.cast(b, dtype)


def _sum(values: Tensor) -> Tensor:
    return tf.reduce_sum(values, -1, keepdims=True)


def _argmax(values: Tensor) -> Tensor:
    return tf.expand_dims(tf.argmax(values, -1), -1)


def _take(values: Tensor, at: Tensor) -> Tensor:
    return tf.gather(values, at, axis=-1, batch_dims=values.shape.rank - 1)


def _symmetric_kl_terms(a: Tensor, b: Tensor) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Return J (n, ...) to nearly full relative precision, and a function that gives dJ/da and dJ/db there."""
    # Logits beyond 1e37 are moved to where no difference of two overflows, which changes no probability. A class that
    # is -inf in both then has d = 0 and p = q = 0; any other infinity or NaN makes `distance`, and with it J, so.
    huge, zero = a.dtype.max / 16, tf.zeros_like(a)
    masked = tf.math.is_inf(a) & (a < 0) & tf.math.is_inf(b) & (b < 0)
    eighth = 8 * tf.cast(tf.shape(a)[-1], a.dtype)
    # a sum, since TensorFlow's maximum may pass a NaN over
    distance = tf.reduce_sum(tf.where(masked, zero, tf.abs(a / eighth - b / eighth)), -1)
    a, b = tf.clip_by_value(a, -huge, huge), tf.clip_by_value(b, -huge, huge)
    p, _ = _softmax(a)
    q, log_q = _softmax(b)

    d_from = _difference(a, b)

    # r = d - log Z, Z = sum q exp(d). Over the classes N where |d| < 1 that sum is 1 - q_F + sum_N q expm1(d); the far
    # ones, F, have Z p_F of it. So log Z = log1p(sum_N q expm1(d) - q_F) - log1p(-p_F): nothing cancels, and no large
    # d is exponentiated. If F has most of the mass, J is not small, and the plain forms of Z and p - q will do.
    d = d_from(_argmax(a + b))
    near = tf.abs(d) < 1
    p_far, q_far = _sum(tf.where(near, zero, p)), _sum(tf.where(near, zero, q))
    alike = p_far + q_far < 0.5
    excess = _sum(tf.where(near, q * tf.math.expm1(tf.clip_by_value(d, -1, 1)), zero))
    exponent = log_q + d
    largest = tf.reduce_max(exponent, -1, keepdims=True)
    log_z = tf.where(
        alike,
        tf.math.log1p(tf.where(alike, excess - q_far, 0)) - tf.math.log1p(tf.where(alike, -p_far, 0)),
        largest + tf.math.log(_sum(tf.exp(exponent - largest))),
    )
    r = d - log_z
    p_minus_q = tf.where(near & alike, q * tf.math.expm1(tf.where(near & alike, r, zero)), p - q)
    j = tf.reduce_sum(tf.maximum(p_minus_q * r, 0), -1)

    def gradients() -> tuple[Tensor, Tensor]:
        # d is centred anew, exact near the largest p as it was near the largest q
        return _gradients(p, q, p_minus_q, d_from(_argmax(a)), d_from(_argmax(b)))

    return tf.where(tf.math.is_finite(distance), j, distance), gradients


def _symmetric_kl_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return J, dJ/da and dJ/db of each position."""
    j, gradients = _symmetric_kl_terms(a, b)
    return j, *gradients()


def _gradients(p: Tensor, q: Tensor, p_minus_q: Tensor, d_p: Tensor, d_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return dJ/da and dJ/db of each position; d_p is exact near the largest p, d_q near the largest q."""
    # r - E_p r = d - E_p d
    grad_a = p * (d_p - _sum(p * d_p)) + p_minus_q
    grad_b = q * (_sum(q * d_q) - d_q) - p_minus_q
    return grad_a, grad_b


def _difference(a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """Return d = a - b less its value at a class: J does not see a shift.

    A common shift may be far larger than what is left without it, so the rounding of a - b is kept (Knuth's two-sum).
    """
    high = a - b
    low = (a - (high - (high - a))) - (b + (high - a))

    def d_from(at: Tensor) -> Tensor:
        return (high - _take(high, at)) + (low - _take(low, at))

    return d_from


def _softmax(a: Tensor) -> tuple[Tensor, Tensor]:
    shifted = a - tf.reduce_max(a, -1, keepdims=True)
    exp = tf.exp(shifted)
    total = _sum(exp)
    return exp / total, shifted - tf.math.log(total)


def _bernoulli_terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return d = a - b, and sigma(a) - sigma(b) = sigma(max) sigma(-min) (1 - exp(-|d|)) sign(d): nothing cancels."""
    huge, zero = a.dtype.max, tf.zeros_like(a)
    masked = tf.math.is_inf(a) & (a < 0) & tf.math.is_inf(b) & (b < 0)
    a, b = tf.where(masked, zero, a), tf.where(masked, zero, b)
    return tf.clip_by_value(a - b, -huge, huge), _sigmoid_difference(a, b)


# both have derivatives of their own, since |.| and the sign have the wrong one at 0


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _sigmoid_difference(a: Tensor, b: Tensor) -> Any:
    difference = _sigmoid(tf.maximum(a, b)) * _sigmoid(-tf.minimum(a, b)) * -tf.math.expm1(-tf.abs(a - b))

    def vjp(upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream * _sigmoid(a) * _sigmoid(-a), -upstream * _sigmoid(b) * _sigmoid(-b)

    return tf.sign(a - b) * difference, vjp


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _sigmoid(a: Tensor) -> Any:
    exp = tf.exp(-tf.abs(a))

    def vjp(upstream: Tensor) -> Tensor:
        return upstream * _sigmoid(a) * _sigmoid(-a)

    return tf.where(a >= 0, tf.ones_like(a), exp) / (1 + exp), vjp
