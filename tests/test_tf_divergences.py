"""The TensorFlow divergences against 50-digit arithmetic and against NumPy, eager, in a graph and under XLA."""

from itertools import product

import mpmath
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smartreg import divergences as reference
from smartreg_tf import divergences

NAMES = list(divergences.DIVERGENCES)
BOUND = {np.float32: 1e-5, np.float64: 1e-12}
MODES = ["eager", "graph", "xla"]


def in_mode(mode, function):
    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "xla", autograph=False)


def both(name):
    """Value, and the gradients by TensorFlow's own tape."""

    def run(a, b):
        with tf.GradientTape() as tape:
            tape.watch((a, b))
            value = divergences.DIVERGENCES[name](a, b)
        return value, *tape.gradient(value, (a, b))

    return run


GRAPH = {
    (name, dtype): tf.function(both(name), input_signature=[tf.TensorSpec([1, None], dtype)] * 2, autograph=False)
    for name in NAMES
    for dtype in (np.float32, np.float64)
}


def exact(name, a, b):
    """l_s and its gradients by a and b, with 50 digits of the smallest term: 1 - 1e-300 must not be 1."""
    with mpmath.workdps(350):
        a, b = [mpmath.mpf(float(v)) for v in a], [mpmath.mpf(float(v)) for v in b]
        if name == "symmetric_kl":

            def log_softmax(z):
                log_total = mpmath.log(mpmath.fsum(mpmath.exp(v) for v in z))
                return [v - log_total for v in z]

            log_p, log_q = log_softmax(a), log_softmax(b)
            p, q = [mpmath.exp(v) for v in log_p], [mpmath.exp(v) for v in log_q]
            r = [x - y for x, y in zip(log_p, log_q, strict=True)]
            by_p, by_q = (mpmath.fsum(x * z for x, z in zip(weights, r, strict=True)) for weights in (p, q))
            value = mpmath.fsum((x - y) * z for x, y, z in zip(p, q, r, strict=True))
            grad_a = [x * (z - by_p) + x - y for x, y, z in zip(p, q, r, strict=True)]
            grad_b = [y * (by_q - z) + y - x for x, y, z in zip(p, q, r, strict=True)]
        elif name == "bernoulli_symmetric_kl":

            def sigmoid(z):
                return 1 / (1 + mpmath.exp(-z))

            sides = [(x, y, sigmoid(x), sigmoid(y)) for x, y in zip(a, b, strict=True)]
            value = mpmath.fsum((p - q) * (x - y) for x, y, p, q in sides)
            grad_a = [p * (1 - p) * (x - y) + p - q for x, y, p, q in sides]
            grad_b = [q * (1 - q) * (y - x) + q - p for x, y, p, q in sides]
        else:
            value = mpmath.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))
            grad_a = [2 * (x - y) for x, y in zip(a, b, strict=True)]
            grad_b = [-g for g in grad_a]
        return value, grad_a, grad_b


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.sampled_from([2, 3, 7, 30]),
    size=st.floats(-2, 4),
    distance=st.floats(-7, 4),
    shift=st.sampled_from([0.0, 100.0]),
)
@example(seed=0, classes=1000, size=4.0, distance=-7.0, shift=0.0)
@example(seed=1, classes=1000, size=1.0, distance=4.0, shift=0.0)
@example(seed=2, classes=2, size=0.0, distance=-7.0, shift=100.0)
def test_value_and_gradient_in_a_graph_against_mpmath(name, dtype, seed, classes, size, distance, shift):
    rng = np.random.default_rng(seed)
    a = (10**size * rng.normal(size=(1, classes))).astype(dtype)
    b = (a + 10.0**distance * rng.normal(size=a.shape) + shift).astype(dtype)
    value, grad_a, grad_b = (tensor.numpy()[0] for tensor in GRAPH[name, dtype](a, b))
    want, want_a, want_b = exact(name, a[0], b[0])
    tiny = 1e-30 if dtype is np.float32 else 1e-290  # below it TensorFlow flushes to zero
    assert value.dtype == dtype
    assert value >= 0
    if want > tiny:
        assert abs(mpmath.mpf(float(value)) - want) <= BOUND[dtype] * want
    for got, expected in ((grad_a, want_a), (grad_b, want_b)):
        largest = max(abs(v) for v in expected)
        assert np.isfinite(got).all()
        if largest > tiny:
            error = max(abs(mpmath.mpf(float(g)) - w) for g, w in zip(got, expected, strict=True))
            assert error <= BOUND[dtype] * largest


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_numpy_with_masks_and_positions(name, mode):
    rng = np.random.default_rng(0)
    a = 3 * rng.normal(size=(4, 5, 6))
    b = a + 10.0 ** rng.uniform(-6, 1, size=(4, 5, 1)) * rng.normal(size=a.shape)
    mask = rng.random((4, 5)) < 0.6
    mask[0] = False  # an example with nothing left

    def run(a, b, mask):
        with tf.GradientTape() as tape:
            tape.watch((a, b))
            value = divergences.DIVERGENCES[name](a, b, mask)
            total = tf.reduce_sum(value * tf.constant([1.0, 2.0, 3.0, 4.0], tf.float64))
        return value, *tape.gradient(total, (a, b))

    value, grad_a, grad_b = in_mode(mode, run)(tf.constant(a), tf.constant(b), tf.constant(mask))
    want = reference.DIVERGENCES[name]
    each = np.array([1.0, 2, 3, 4])[:, None, None]
    np.testing.assert_allclose(value, want.value(a, b, mask), rtol=1e-12)
    assert value.numpy()[0] == 0
    for got, expected in zip((grad_a, grad_b), want.grad(a, b, mask), strict=True):
        np.testing.assert_allclose(got, each * expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("mode", MODES)
def test_masked_classes_infinities_and_nan(mode):
    inf = np.inf
    a = np.array([[1.0, -inf, 2.0], [1.0, -inf, 2.0], [np.nan, 0.0, 1.0], [3e38, -3e38, 0.0]], np.float32)
    b = np.array([[1.5, -inf, 2.0], [1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [-3e38, 3e38, 0.0]], np.float32)
    value, grad_a, grad_b = in_mode(mode, both("symmetric_kl"))(tf.constant(a), tf.constant(b))
    two = divergences.symmetric_kl([[1.0, 2.0]], [[1.5, 2.0]])
    np.testing.assert_allclose(value[0], two[0], rtol=1e-6)
    assert grad_a.numpy()[0, 1] == grad_b.numpy()[0, 1] == 0
    assert value.numpy()[1] == inf
    assert np.isnan(value.numpy()[2])
    assert np.isfinite(value.numpy()[3])


@pytest.mark.parametrize("mode", MODES)
def test_the_rounding_of_the_difference_is_kept(mode):
    """A common shift of 100 rounds a - b to float32; only the two-sum gives the digits back."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(8, 5)).astype(np.float32)
    b = (a + 1e-4 * rng.normal(size=a.shape) + 100).astype(np.float32)
    want = reference.symmetric_kl(a.astype(np.float64), b.astype(np.float64))
    value, grad_a, _ = in_mode(mode, both("symmetric_kl"))(tf.constant(a), tf.constant(b))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    want_a = reference.symmetric_kl_grad(a.astype(np.float64), b.astype(np.float64))[0]
    np.testing.assert_allclose(grad_a, want_a, atol=1e-5 * np.abs(want_a).max(-1).min())


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_narrow_logits_are_computed_and_returned_in_float32(dtype):
    a, b = tf.constant([[1.0, 2.0]], dtype), tf.constant([[1.25, 2.0]], dtype)
    value, grad_a, _ = both("symmetric_kl")(a, b)
    assert value.dtype == tf.float32
    assert grad_a.dtype == dtype
    np.testing.assert_allclose(value, reference.symmetric_kl([[1.0, 2.0]], [[1.25, 2.0]]), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_checked(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected two tensors of one shape .* \(2, 3\) and \(2, 4\)"):
        divergences.DIVERGENCES[name](tf.zeros([2, 3]), tf.zeros([2, 4]))
    with pytest.raises(ValueError, match="one shape"):
        divergences.DIVERGENCES[name](tf.zeros([2]), tf.zeros([2]))
    with pytest.raises(ValueError, match=r"the mask must have the outputs' shape .*\(2, 5\), got \(2, 4\)"):
        divergences.DIVERGENCES[name](tf.zeros([2, 5, 3]), tf.zeros([2, 5, 3]), tf.ones([2, 4]))


@pytest.mark.parametrize("case", ["far", "near", "equal", "one equal", "zero", "masked positions", "masked class"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_gradient(name, case):
    """A Hessian-vector product by nested tapes, against finite differences of the reference's gradient."""
    rng = np.random.default_rng(0)
    a, b, along_a, along_b = rng.normal(size=(4, 3, 2, 4))
    a = {"near": b + 1e-3 * a, "equal": b.copy(), "one equal": np.where(np.eye(2, 4) > 0, b, a)}.get(case, a)
    if case == "zero":
        a, b = np.zeros_like(a), np.zeros_like(b)
    mask = np.array([[1, 0], [1, 1], [0, 0]]) if case == "masked positions" else None
    if case == "masked class" and name != "squared_error":
        a[..., 1] = b[..., 1] = -np.inf
        along_a[..., 1] = along_b[..., 1] = 0
    upstream = rng.normal(size=3)

    def slope(a, b):
        grad_a, grad_b = reference.DIVERGENCES[name].grad(a, b, mask)
        return [upstream[:, None, None] * g for g in (grad_a, grad_b)]

    x, y = tf.constant(a), tf.constant(b)
    with tf.GradientTape() as outer:
        outer.watch((x, y))
        with tf.GradientTape() as inner:
            inner.watch((x, y))
            value = tf.reduce_sum(upstream * divergences.DIVERGENCES[name](x, y, mask))
        first = inner.gradient(value, (x, y))
        along = tf.reduce_sum(first[0] * along_a) + tf.reduce_sum(first[1] * along_b)
    got = outer.gradient(along, (x, y))
    step = 1e-6
    up, down = (slope(a + e * along_a, b + e * along_b) for e in (step, -step))
    for hessian, high, low in zip(got, up, down, strict=True):
        want = (high - low) / (2 * step)
        np.testing.assert_allclose(hessian, want, atol=1e-7 * max(1.0, np.abs(want).max()))


def test_the_third_derivative_where_a_logit_is_0():
    """Of (sigma(a) - sigma(b)) (a - b) by a: sigma'''(a) (a - b) + 3 sigma''(a), sigma'''(0) = -1/8, sigma''(0) = 0."""
    a, b = tf.constant([[0.0]], tf.float64), tf.constant([[0.7]], tf.float64)
    with tf.GradientTape() as third:
        third.watch(a)
        with tf.GradientTape() as second:
            second.watch(a)
            with tf.GradientTape() as first:
                first.watch(a)
                value = divergences.bernoulli_symmetric_kl(a, b)
            slope = first.gradient(value, a)
        curvature = second.gradient(slope, a)
    assert third.gradient(curvature, a).numpy() == pytest.approx(0.7 / 8, rel=1e-12)


@pytest.fixture
def in_blocks(monkeypatch):
    """Let small logits be computed in blocks of two positions, as those of a vocabulary's size are."""
    monkeypatch.setattr(divergences, "CLASSES", 1)
    monkeypatch.setattr(divergences, "LOGITS", 1)
    monkeypatch.setattr(divergences, "BLOCK", 12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "distances"), [((3, 5, 6), (-6, 3)), ((2, 4, 3, 6), (-6, -6)), ((5, 6), (-1, 1))])
@pytest.mark.usefixtures("in_blocks")
def test_blocks_equal_numpy_with_masked_positions(shape, distances, mode):
    """An odd number of positions, masked blocks, NaN where masked, and gradients by each argument alone."""
    rng = np.random.default_rng(0)
    a = 3 * rng.normal(size=shape)
    b = a + 10.0 ** rng.uniform(*distances, size=(*shape[:-1], 1)) * rng.normal(size=shape)
    a[..., 1] = b[..., 1] = -np.inf
    mask = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % 5 > 2
    want = reference.symmetric_kl(a, b, mask), *reference.symmetric_kl_grad(a, b, mask)
    a[~mask] = np.nan

    def run(a, b, mask):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch((a, b))
            value = divergences.symmetric_kl(a, b, mask)
            total = tf.reduce_sum(value * tf.range(1.0, 1.0 + shape[0], dtype=a.dtype))
        alone = tape.gradient(total, a), tape.gradient(total, b)
        return value, *tape.gradient(total, (a, b)), *alone, *divergences.symmetric_kl_grad(a, b, mask)

    value, *got = in_mode(mode, run)(tf.constant(a), tf.constant(b), tf.constant(mask))
    np.testing.assert_allclose(value, want[0], rtol=1e-12)
    each = np.arange(1.0, 1 + shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    for found, expected in zip(got, [each * g for g in want[1:]] * 2 + list(want[1:]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@pytest.mark.usefixtures("in_blocks")
def test_blocks_do_not_hide_infinite_logits():
    inf = np.inf
    a = tf.constant([[inf, 0.0], [1.0, 0.0], [-inf, -inf], [0.0, 0.0], [1.0, 1.5], [0.0, -inf]])
    b = tf.constant([[inf, 0.0], [1.0, 0.0], [0.0, 0.0], [-inf, -inf], [inf, inf], [inf, 0.0]])
    alone = [float(divergences.symmetric_kl(a[i : i + 1], b[i : i + 1])[0]) for i in range(6)]
    np.testing.assert_array_equal(alone, [np.nan, 0, inf, inf, inf, inf])


@pytest.mark.parametrize("case", ["far", "near", "masked positions", "masked class"])
@pytest.mark.usefixtures("in_blocks")
def test_second_derivatives_of_blocks(case):
    test_second_derivatives_are_those_of_the_gradient("symmetric_kl", case)


@pytest.mark.parametrize(
    ("dtype", "mode", "distance"),
    [
        (*one, distance)
        for one, distance in zip(product([np.float32, np.float64], MODES), (-6, -1, 1, 0, -3, 1), strict=True)
    ],
)
def test_a_vocabulary_of_fifty_thousand(dtype, mode, distance):
    """Values and gradients, in blocks, against NumPy's in float64."""
    rng = np.random.default_rng(0)
    a = (3 * rng.normal(size=(2, 42, 50257))).astype(dtype)
    b = (a + 10.0**distance * rng.normal(size=a.shape)).astype(dtype)
    mask = np.arange(84).reshape(2, 42) % 14 == 0
    assert divergences._in_blocks(tf.constant(a))
    a, b = (np.where(mask[..., None], z, 0) for z in (a, b))  # the reference is slow
    got = in_mode(mode, both_masked)(tf.constant(a), tf.constant(b), tf.constant(mask))
    rows = [z[mask].reshape(2, 3, -1).astype(np.float64) for z in (a, b)]
    np.testing.assert_allclose(got[0], reference.symmetric_kl(*rows), rtol=BOUND[dtype])
    for found, want in zip(got[1:], reference.symmetric_kl_grad(*rows), strict=True):
        assert (found.numpy()[~mask] == 0).all()
        error = np.abs(found.numpy()[mask].reshape(want.shape) - want).max(-1)
        assert (error <= BOUND[dtype] * np.abs(want).max(-1)).all()


def both_masked(a, b, mask):
    with tf.GradientTape() as tape:
        tape.watch((a, b))
        value = divergences.symmetric_kl(a, b, mask)
    return value, *tape.gradient(value, (a, b))


def test_small_logits_are_not_cut_into_blocks():
    assert not divergences._in_blocks(tf.zeros([1000, 4095]))
    assert not divergences._in_blocks(tf.zeros([2, 50257]))
    assert divergences._in_blocks(tf.zeros([1024, 4096]))
