"""The TensorFlow ascent, projections, schedule and averages against NumPy, draw for draw."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from pairwise import pairwise
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg import perturbation as reference
from smartreg import proximal as reference_proximal
from smartreg.divergences import DIVERGENCES
from smartreg_tf import perturbation, proximal

MODES = ["eager", "graph", "xla"]
NORMS, GRANULARITIES = ["inf", "2", "1"], ["example", "token"]


def in_mode(mode, function):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla", autograph=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("norm", NORMS)
def test_normalize_and_project_equal_numpy(norm, granularity, mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 3)) * 10.0 ** rng.integers(-3, 2, size=(4, 1, 1))
    x[1, 2] = 0
    radius = np.array([0.3, 2.0, 1e-3, 1e3])  # binding in some rows only
    name = {"inf": "project_linf_ball", "2": "project_l2_ball", "1": "project_l1_ball"}[norm]

    def run(x, radius):
        return perturbation.normalize(x, norm, granularity), getattr(perturbation, name)(x, radius, granularity)

    unit, projected = in_mode(mode, run)(tf.constant(x), tf.constant(radius))
    np.testing.assert_allclose(unit, reference.normalize(x, norm, granularity), rtol=1e-12)
    want = getattr(reference, name)(x, radius, granularity)
    np.testing.assert_allclose(projected, want, rtol=1e-12, atol=1e-14)
    changed = np.any(want != x, axis=(1, 2))
    assert changed.any()
    assert not changed.all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_normalize_small_and_zero_gradients(norm, mode):
    g = tf.constant([[3e-30, -4e-30], [0.0, 0.0]])
    unit = in_mode(mode, lambda g: perturbation.normalize(g, norm))(g).numpy()
    np.testing.assert_allclose(unit[0], reference.normalize(np.array([[3.0, -4.0]]), norm)[0], rtol=1e-6)
    assert (unit[1] == 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_float32_projection_stays_inside_and_is_idempotent(norm):
    name = {"inf": "project_linf_ball", "2": "project_l2_ball", "1": "project_l1_ball"}[norm]
    project = getattr(perturbation, name)
    x = np.random.default_rng(0).normal(size=(50, 7, 9)).astype(np.float32)
    once = project(x, 0.37).numpy()
    rows = once.astype(np.float64).reshape(50, -1)
    length = {"inf": np.abs(rows).max(1), "2": np.sqrt((rows**2).sum(1)), "1": np.abs(rows).sum(1)}[norm]
    assert (length <= 0.37 * (1 + 2**-23)).all()
    assert (length > 0.36).all()
    np.testing.assert_array_equal(project(once, 0.37), once)


def network(rng, divergence, pooled):
    """A small smooth network in NumPy, with its vector-Jacobian product, and the same in TensorFlow."""
    w1, w2 = rng.normal(size=(4, 6)), rng.normal(size=(6, 3))

    def in_numpy(x):
        h = np.tanh(x @ w1)
        outputs = h.mean(1) @ w2 if pooled else h @ w2

        def vjp(grad):
            grad_h = (grad @ w2.T)[:, None] / x.shape[1] if pooled else grad @ w2.T
            return (grad_h * (1 - h * h)) @ w1.T

        return outputs, vjp

    def in_tensorflow(x):
        h = tf.tanh(x @ w1)
        return tf.reduce_mean(h, 1) @ w2 if pooled else h @ w2

    return in_numpy, in_tensorflow


CASES = list(
    itertools.product(
        NORMS, GRANULARITIES, ["gaussian", "margin"], ["absolute", "rms"], [0, 1, 3], list(DIVERGENCES), [True, False]
    )
)


# every fifth of the 432: with 7 settings of 2 or 3 values, all of them and most pairs
@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: "-".join(map(str, case)))
def test_ascend_equals_numpy(case):
    norm, granularity, start, scale, steps, divergence, pooled = case
    rng = np.random.default_rng(CASES.index(case))
    in_numpy, in_tensorflow = network(rng, divergence, pooled)
    x = rng.normal(size=(3, 5, 4))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    config = papers(
        norm=norm,
        granularity=granularity,
        start=start,
        scale=scale,
        ascent_steps=steps,
        epsilon=0.3,
        sigma=0.2,
        eta=0.2,
    )
    target = in_numpy(x)[0]
    noise = rng.normal(size=x.shape if start == "gaussian" else target.shape)
    want = reference.ascend(in_numpy, x, target, config, noise, mask, divergence)
    got = perturbation.ascend(in_tensorflow, x, target, config, noise, mask, divergence)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    assert (got.numpy()[mask == 0] == 0).all()
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_ascend_in_a_graph_and_under_xla(start, mode):
    rng = np.random.default_rng(1)
    in_numpy, in_tensorflow = network(rng, "symmetric_kl", True)
    x, noise, mask = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4)), np.ones((3, 5), bool)
    mask[0, 3:] = False
    config = papers(norm="2", start=start, epsilon=0.3, sigma=0.2, eta=0.2, ascent_steps=2)
    target = in_numpy(x)[0]
    run = in_mode(mode, lambda *inputs: perturbation.ascend(in_tensorflow, *inputs[:2], config, *inputs[2:]))
    got = run(*map(tf.constant, (x, target, noise, mask)))
    want = reference.ascend(in_numpy, x, target, config, noise, mask)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    shorter = run(*map(tf.constant, (x, target, noise, np.ones((3, 5), bool))))
    assert np.abs(shorter.numpy()[0, 3:]).max() > 0  # the mask is what keeps them 0


@pytest.mark.parametrize("mode", MODES)
def test_the_margin_between_equal_and_masked_classes_is_numpys(mode):
    inf = np.inf
    z = [
        [2, 2, 2, 2],
        [1, 3, 3, 0],
        [3, 1, 3, 3],
        [0, 1, 2, 3],
        [1, -inf, -inf, -inf],
        [-inf, -inf, 1, -inf],
        [-inf] * 4,
    ]
    got = in_mode(mode, perturbation.margin_gradient)(tf.constant(z, tf.float64))
    np.testing.assert_array_equal(got, reference.margin_gradient(z))


def test_the_released_codes_update():
    rng = np.random.default_rng(2)
    in_numpy, in_tensorflow = network(rng, "symmetric_kl", True)
    x, noise = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    config = SMARTConfig.mtdnn(ascent_steps=2)
    target = in_numpy(x)[0]
    want = reference.ascend(in_numpy, x, target, config, noise)
    np.testing.assert_allclose(
        perturbation.ascend(in_tensorflow, x, target, config, noise), want, rtol=1e-9, atol=1e-12
    )
    assert np.abs(want).max() > 0.9


def test_what_ascend_needs_is_said():
    x = tf.zeros([2, 3])
    with pytest.raises(ValueError, match="start='gaussian' needs noise of the shape of x, got None"):
        perturbation.ascend(lambda x: x, x, x, papers(), None)
    with pytest.raises(ValueError, match="squared_error needs noise"):
        perturbation.ascend(lambda x: x, x, x, papers(start="margin"), None, None, "squared_error")
    with pytest.raises(ValueError, match="at least 2 classes"):
        perturbation.margin_gradient(tf.zeros([2, 1]))
    with pytest.raises(ValueError, match="leading axes of x"):
        perturbation.rms(tf.zeros([2, 3, 4]), tf.ones([2, 2]))
    with pytest.raises(ValueError, match=r"expected embeddings of shape \(n, ..., d\)"):
        perturbation.normalize(tf.zeros([3]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"early_fraction": 0},
        {"early_fraction": 1},
        {"beta_early": 0.999},
        {"memory": 0.3},
        {"memory": 0.3, "proximal_steps": 3},
    ],
)
def test_momentum_equals_numpy_at_every_step(changes):
    config = papers(total_steps=100, **{"early_fraction": 0.29, **changes})
    if "memory" in changes:
        config = config.replace(beta_early=None, beta_late=None)
    run = tf.function(lambda step: proximal.momentum(step, config))
    got = [float(run(tf.constant(t))) for t in range(1, 101)]
    assert got == [reference_proximal.momentum(t, config) for t in range(1, 101)]


def test_momentum_without_total_steps():
    with pytest.raises(ValueError, match=r"momentum: mu > 0 and beta changes .* total_steps is needed"):
        proximal.momentum(1, papers())


def test_ema_and_bregman_equal_numpy():
    rng = np.random.default_rng(0)
    teacher, theta = {"w": rng.normal(size=(3, 4))}, {"w": rng.normal(size=(3, 4))}
    got = proximal.ema_update({"w": tf.constant(teacher["w"])}, theta, 0.999)["w"]
    np.testing.assert_allclose(got, reference_proximal.ema_update(teacher, theta, 0.999)["w"], rtol=1e-15)
    a, b, weight = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4)), np.array([0.0, 1.0, 2.5])
    mask = rng.random((3, 5)) < 0.5
    for name in DIVERGENCES:
        want = reference_proximal.bregman_divergence(a, b, name, mask, weight)
        np.testing.assert_allclose(proximal.bregman_divergence(a, b, name, mask, weight), want, rtol=1e-12)


def test_ema_of_narrow_weights_moves_in_float32():
    average = proximal.ema_update({"w": tf.ones([])}, {"w": tf.constant(2.0, tf.bfloat16)}, 0.999)["w"]
    assert average.dtype == tf.float32
    np.testing.assert_allclose(average, 1.001, rtol=1e-7)


def test_ema_leaves_equal_weights_equal_and_beta_0_copies():
    theta = {"w": tf.random.stateless_normal([1000], [1, 2])}
    np.testing.assert_array_equal(proximal.ema_update(theta, theta, 0.9)["w"], theta["w"])
    np.testing.assert_array_equal(proximal.ema_update({"w": 3 * theta["w"]}, theta, 0.0)["w"], theta["w"])


def test_no_gradient_reaches_the_teacher_and_weights_are_checked():
    a, b = tf.constant([[1.0, 2.0]]), tf.constant([[1.0, 3.0]])
    with tf.GradientTape() as tape:
        tape.watch((a, b))
        value = proximal.bregman_divergence(a, b)
    grad_a, grad_b = tape.gradient(value, (a, b))
    assert np.abs(grad_a).max() > 0
    assert grad_b is None
    with pytest.raises(ValueError, match=r"one weight an example, \(1,\), got \(2,\)"):
        proximal.bregman_divergence(a, b, sample_weight=[1.0, 2.0])


@pytest.mark.parametrize(("norm", "start", "mode"), pairwise(NORMS, ["gaussian", "margin"], MODES))
def test_entries_that_are_not_finite_keep_the_rest_of_their_row(norm, start, mode):
    """An imputing model's delta is what it is for the finite entries alone, and 0 elsewhere."""
    rng = np.random.default_rng(0)
    whole, w = rng.normal(size=(3, 4)), rng.normal(size=(6, 3))
    x = np.concatenate([whole, np.full((3, 2), np.nan)], 1)
    x[1, 5] = np.inf
    config = papers(norm=norm, start=start, epsilon=0.3, sigma=0.2, eta=0.2, ascent_steps=2)
    noise = rng.normal(size=x.shape)

    def imputed(x):
        return tf.where(tf.math.is_finite(x), x, tf.zeros_like(x)) @ w

    target = imputed(tf.constant(x))
    run = in_mode(mode, lambda x: perturbation.ascend(imputed, x, target, config, noise))
    got = run(tf.constant(x)).numpy()
    want = perturbation.ascend(lambda x: x @ w[:4], whole, target, config, noise[:, :4])
    np.testing.assert_allclose(got[:, :4], want, rtol=1e-12)
    assert (got[:, 4:] == 0).all()
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(perturbation.rms(x), np.sqrt((whole**2).mean(1)), rtol=1e-12)
