"""Norms, projections and the ascent on every backend: their laws, and each against the NumPy reference."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_settings import papers

import smartreg.perturbation as reference
from smartreg import SMARTConfig
from smartreg.checking import NUMPY, Face
from smartreg.checking.face import BALLS

DTYPES = [np.float32, np.float64]
NORMS = list(BALLS)
GRANULARITIES = ["example", "token"]
ORDER = {"inf": np.inf, "2": 2, "1": 1}

settings = {"norm": st.sampled_from(NORMS), "granularity": st.sampled_from(GRANULARITIES)}
seeds = st.integers(0, 2**32 - 1)


def norms(delta, norm, granularity):
    """The norm of everything that one norm runs over, in float64."""
    rows = np.asarray(delta, np.float64)
    rows = rows.reshape(len(rows), -1) if granularity == "example" else rows
    return np.linalg.norm(rows, ORDER[norm], axis=-1)


def call(backend, function, *arrays, **settings):
    """A function of perturbation.py that is not one of the check's, on NumPy arrays."""

    def put(value):
        return backend.asarray(value, value.dtype.name) if isinstance(value, np.ndarray) else value

    settings = {name: put(value) for name, value in settings.items()}
    return np.asarray(getattr(sys.modules[backend.ascend.__module__], function)(*map(put, arrays), **settings))


def per_example(values, like):
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_normalize_at_zero_is_a_zero_step(backend, norm, granularity):
    g = np.zeros((2, 3, 4), np.float32)
    g[1, 0] = [1e-30, -1e-30, 0, 0]
    unit = Face(backend, "float32").call("normalize", g, norm=norm, granularity=granularity)
    assert np.all(unit[0] == 0)
    assert np.all(unit[1, 1:] == 0)
    assert norms(unit, norm, granularity).max() == pytest.approx(1, abs=1e-6)


@given(seed=seeds, epsilon=st.floats(0.05, 5))
def test_l1_projection_is_the_nearest_point(backend, seed, epsilon):
    """The optimality condition of the projection P(v): <v - P(v), z - P(v)> <= 0 for every corner z of the ball."""
    v = np.random.default_rng(seed).normal(size=(1, 6))
    nearest = Face(backend).call("project_l1_ball", v, epsilon=epsilon)
    for corner in epsilon * np.vstack([np.eye(6), -np.eye(6)]):
        assert (v - nearest)[0] @ (corner - nearest[0]) <= 1e-12


def test_projections_by_hand(backend):
    face = Face(backend)
    delta = np.array([[3.0, -4.0], [0.3, 0.4]])
    assert face.call("project_linf_ball", delta, epsilon=1.0) == pytest.approx(np.array([[1, -1], [0.3, 0.4]]))
    assert face.call("project_l2_ball", delta, epsilon=1.0) == pytest.approx(np.array([[0.6, -0.8], [0.3, 0.4]]))
    assert face.call("project_l1_ball", delta, epsilon=1.0) == pytest.approx(np.array([[0, -1], [0.3, 0.4]]))
    assert face.call("project_l1_ball", delta, epsilon=3.0) == pytest.approx(np.array([[1, -2], [0.3, 0.4]]))
    for ball in BALLS.values():
        assert np.all(face.call(ball, delta, epsilon=0.0) == 0)
        assert np.isnan(face.call(ball, np.array([[np.nan, 1.0]]), epsilon=1.0)).any()


def test_rms_is_of_the_unmasked_entries_of_each_example(backend):
    x = np.array([[[3.0, 4.0], [100.0, 100.0]], [[1.0, 1.0], [7.0, 7.0]], [[5.0, 5.0], [5.0, 5.0]]])
    mask = np.array([[1, 0], [1, 1], [0, 0]])
    assert call(backend, "rms", x, mask=mask) == pytest.approx([np.sqrt(12.5), 5.0, 0.0])
    assert call(backend, "rms", x) == pytest.approx([np.sqrt(20025 / 4), 5.0, 5.0])


def test_margin_gradient(backend):
    z = np.array([[3.0, 1.0, 2.0], [0.1, -4.0, 0.2]])
    margin = call(backend, "margin_gradient", z)
    assert np.array_equal(margin, [[-1, 0, 1], [1, 0, -1]])
    least = call(backend, "margin_gradient", np.array([[3.0, -1.0], [0.5, 2.0]]), divergence="bernoulli_symmetric_kl")
    assert np.array_equal(least, [[0, 1], [-1, 0]])
    signs = call(backend, "margin_gradient", z, noise=np.array([[1.0, -2.0, 0.0]] * 2), divergence="squared_error")
    assert np.array_equal(signs, [[1, -1, 1]] * 2)
    masked = call(backend, "margin_gradient", np.stack([z, z]), mask=np.array([[1, 0], [0, 1]]))
    assert np.array_equal(masked, [[[-1, 0, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, -1]]])
    with pytest.raises(ValueError, match=r"at least 2 classes, got outputs of shape \(2, 1\)"):
        call(backend, "margin_gradient", z[:, :1])
    with pytest.raises(ValueError, match="squared_error needs noise of the outputs' shape"):
        call(backend, "margin_gradient", z, divergence="squared_error")


def test_an_unknown_divergence_is_named(backend):
    z, choices = np.zeros((1, 2)), "'symmetric_kl', 'bernoulli_symmetric_kl', 'squared_error'"
    with pytest.raises(ValueError, match=f"margin_gradient: divergence must be one of {choices}, got 'kl'"):
        call(backend, "margin_gradient", z, noise=z, divergence="kl")
    with pytest.raises(ValueError, match=f"ascend: divergence must be one of {choices}, got 'kl'"):
        call(backend, "ascend", lambda x: x, z, z, SMARTConfig(), None, divergence="kl")


def tanh_network(backend, w1, w2):
    """f(x) = sum_t tanh(x W1) W2, which imputes 0 for an x that is not finite; the gradient there is NaN.

    As the backend's `ascend` takes it, and the outputs alone.
    """
    if backend is NUMPY:

        def forward(x):
            finite = np.isfinite(x)
            h = np.tanh(np.where(finite, x, 0) @ w1)
            return h.sum(1) @ w2, lambda g: np.where(finite, ((g @ w2.T)[:, None, :] * (1 - h * h)) @ w1.T, np.nan)

        return forward, lambda x: forward(x)[0]
    if backend.__name__.startswith("smartreg_torch"):

        def outputs(x):
            x = (x * (0 * x).exp()).where(x.isfinite(), 0)  # the factor is 1, and its gradient at a NaN is NaN
            return (x @ w1).tanh().sum(1) @ w2
    else:
        import tensorflow as tf

        def outputs(x):
            x = tf.where(tf.math.is_finite(x), x * tf.exp(0 * x), 0)  # as in PyTorch
            return tf.reduce_sum(tf.tanh(x @ w1), 1) @ w2

    return outputs, outputs


class Problem:
    """A small smooth model, embeddings of very different sizes, and a padded example."""

    def __init__(self, seed=0, dtype=np.float64, outputs=3):
        rng = np.random.default_rng(seed)
        self.x = (rng.normal(size=(4, 5, 6)) * np.array([1, 0.1, 3, 1])[:, None, None]).astype(dtype)
        self.w1 = (0.3 * rng.normal(size=(6, 7))).astype(dtype)
        self.w2 = rng.normal(size=(7, outputs)).astype(dtype)
        self.mask = np.array([[1] * 5, [1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])
        self.noise = rng.normal(size=self.x.shape).astype(dtype)
        self.signs = rng.normal(size=(4, outputs)).astype(dtype)

    def ascend(self, backend, config, divergence="symmetric_kl", **changes):
        """delta and f(x + delta)."""
        noise = self.noise if config.start == "gaussian" else self.signs
        given = {"x": self.x, "noise": noise, "mask": self.mask, **changes, "w1": self.w1, "w2": self.w2}
        own = {name: v if v is None else backend.asarray(v, v.dtype.name) for name, v in given.items()}
        forward, outputs = tanh_network(backend, own["w1"], own["w2"])
        x, noise, mask = own["x"], own["noise"], own["mask"]
        delta = backend.ascend(forward, x, outputs(x), config, noise, mask, divergence)
        return np.asarray(delta), np.asarray(outputs(x + delta))


ascents = {
    **settings,
    "start": st.sampled_from(["gaussian", "margin"]),
    "scale": st.sampled_from(["absolute", "rms"]),
    "ascent_steps": st.sampled_from([0, 1, 3]),
    "epsilon": st.sampled_from([1e-5, 0.01, 0.3]),
    "eta": st.sampled_from([1e-3, 0.05, 1.0]),
    "divergence": st.sampled_from(list(reference.DIVERGENCES)),
}


@given(seed=seeds, **ascents)
def test_ascent_agrees_with_numpy_and_stays_in_the_ball(backend, seed, divergence, **chosen):
    problem = Problem(seed)
    config = papers(sigma=chosen["epsilon"], **chosen)
    delta, _ = problem.ascend(backend, config, divergence)
    want, _ = problem.ascend(NUMPY, config, divergence)
    # the forward's own rounding, against the difference of two outputs epsilon apart, in a step of eta / epsilon balls
    rounding = 1e-14 / config.epsilon * (1 + config.eta / config.epsilon) if config.ascent_steps else 0
    assert delta == pytest.approx(want, rel=0, abs=(1e-12 + rounding) * float(np.abs(want).max()))
    radius = config.epsilon * (reference.rms(problem.x, problem.mask) if config.scale == "rms" else np.ones(4))
    reached = norms(delta, config.norm, config.granularity)
    limit = radius if config.granularity == "example" else radius[:, None]
    assert np.all(reached <= limit * (1 + 2 * np.finfo(float).eps))
    assert np.all(delta[problem.mask == 0] == 0)
    assert np.any(delta != 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_start_is_projected(backend, norm, granularity, dtype):
    problem = Problem(dtype=dtype)
    config = papers(scale="absolute", epsilon=0.01, sigma=1.0, ascent_steps=0, norm=norm, granularity=granularity)
    delta, _ = problem.ascend(backend, config)
    binding = norms(delta, norm, granularity)
    assert np.all(binding <= np.float64(dtype(0.01)) * (1 + np.finfo(dtype).eps))
    kept = binding if granularity == "example" else binding[problem.mask == 1]
    assert kept == pytest.approx(0.01, rel=1e-5)  # the radius binds


def test_gaussian_start_has_standard_deviation_sigma(backend):
    problem = Problem()
    config = papers(scale="absolute", epsilon=100, sigma=0.25, ascent_steps=0)
    delta, _ = problem.ascend(backend, config, mask=None)
    assert delta == pytest.approx(0.25 * problem.noise, rel=1e-14)
    config = papers(scale="rms", epsilon=100, sigma=0.25, ascent_steps=0)
    delta, _ = problem.ascend(backend, config, mask=None)
    scale = np.sqrt((problem.x**2).mean((1, 2)))
    assert delta == pytest.approx(0.25 * per_example(scale, delta) * problem.noise, rel=1e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_by_hand(backend, norm):
    """f(x) = tanh(x W1) W2 with squared error: delta_1 = Proj(sigma nu + eta g / ||g||), written out."""
    problem = Problem()
    config = papers(scale="absolute", epsilon=0.5, sigma=0.2, eta=0.3, norm=norm)
    start = BALLS[norm]
    delta = getattr(reference, start)(0.2 * problem.noise, 0.5)
    h = np.tanh((problem.x + delta) @ problem.w1)
    difference = h.sum(1) @ problem.w2 - np.tanh(problem.x @ problem.w1).sum(1) @ problem.w2
    g = (2 * (difference @ problem.w2.T)[:, None, :] * (1 - h * h)) @ problem.w1.T
    g = g / per_example(norms(g, norm, "example"), g)
    want = getattr(reference, start)(delta + 0.3 * g, 0.5)
    got, _ = problem.ascend(backend, config, "squared_error", mask=None)
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_margin_start_is_the_best_linear_move(backend, norm, granularity):
    """No point of the ball lowers the linearised margin further, and for a small ball the margin really falls."""
    problem = Problem()
    config = papers(scale="absolute", epsilon=1e-4, start="margin", ascent_steps=0, norm=norm, granularity=granularity)
    delta, after = problem.ascend(backend, config, mask=None)
    h = np.tanh(problem.x @ problem.w1)
    before = h.sum(1) @ problem.w2
    top = np.argsort(-before, axis=-1)[:, :2]
    rows = np.arange(4)
    towards = problem.w2.T[top[:, 1]] - problem.w2.T[top[:, 0]]
    g = (towards[:, None, :] * (1 - h * h)) @ problem.w1.T
    dual = {"inf": "1", "2": "2", "1": "inf"}[norm]  # max <g, delta> over the ball is epsilon ||g||_dual
    best = 1e-4 * norms(g, dual, granularity)
    gained = (g * delta).sum((1, 2)) if granularity == "example" else (g * delta).sum(2)
    assert gained == pytest.approx(best, rel=1e-9)
    margin = before[rows, top[:, 0]] - before[rows, top[:, 1]]
    assert np.all(after[rows, top[:, 0]] - after[rows, top[:, 1]] < margin)


def test_released_update(backend):
    """mt-dnn: delta <- (delta + eta g) / (||delta + eta g||_inf + 1e-6) a token, from noise that is not projected."""
    problem = Problem()
    config = SMARTConfig.mtdnn()
    start = 1e-5 * problem.noise
    h = np.tanh((problem.x + start) @ problem.w1)
    clean = np.tanh(problem.x @ problem.w1).sum(1) @ problem.w2
    g_outputs = reference.DIVERGENCES["symmetric_kl"].grad(clean, h.sum(1) @ problem.w2)[1]
    g = ((g_outputs @ problem.w2.T)[:, None, :] * (1 - h * h)) @ problem.w1.T
    moved = start + 1e-3 * g
    want = moved / (np.abs(moved).max(-1, keepdims=True) + 1e-6)
    delta, _ = problem.ascend(backend, config, mask=None)
    assert delta == pytest.approx(want, rel=1e-8)
    assert np.abs(delta).max() > 0.9  # what the released code calls epsilon is no radius


def test_released_update_of_a_row_that_is_all_padding(backend):
    delta, _ = Problem().ascend(backend, SMARTConfig.mtdnn(scale="rms"), mask=np.zeros((4, 5)))
    assert np.all(delta == 0)


def test_noise_has_to_be_there(backend):
    with pytest.raises(ValueError, match="start='gaussian' needs noise of the shape of x, got None"):
        Problem().ascend(backend, papers(), noise=None)


@pytest.mark.parametrize("shape", [(4, 4), (5,), (4, 5, 6)])
def test_masks_that_do_not_fit_are_named(backend, shape):
    with pytest.raises(ValueError, match=r"the mask must have the leading axes of x, \(4, 5\), got"):
        Problem().ascend(backend, papers(), mask=np.ones(shape))


def test_a_signal_may_have_a_mask_of_its_entries(backend):
    """As the attention mask of a waveform: (n, samples), like x."""
    x, mask = np.array([[3.0, 3.0, 9.0], [1.0, 7.0, 7.0]]), np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert call(backend, "rms", x, mask=mask) == pytest.approx([3.0, 1.0])


def test_examples_do_not_depend_on_each_other(backend):
    problem = Problem()
    config = papers(epsilon=0.1, sigma=0.1, eta=0.05, ascent_steps=2, norm="2")
    together, _ = problem.ascend(backend, config)
    alone, _ = problem.ascend(backend, config, x=problem.x[1:2], noise=problem.noise[1:2], mask=problem.mask[1:2])
    assert alone[0] == pytest.approx(together[1], rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("start", ["gaussian", "margin"])
@pytest.mark.parametrize("scale", ["absolute", "rms"])
def test_a_missing_feature_is_as_one_that_the_model_has_not(backend, norm, granularity, start, scale):
    """Imputed by 0, whose gradient there is NaN: rms, norms and every other entry are those of the other features."""
    problem, without = Problem(), Problem()
    missing = np.array([False, True, False, False, True, False])
    problem.x[..., missing] = np.nan, np.inf
    problem.x[2, ..., 4] = -np.inf
    for name in ("x", "noise"):
        setattr(without, name, getattr(without, name)[..., ~missing])
    without.w1 = without.w1[~missing]
    given = {"norm": norm, "granularity": granularity, "start": start, "scale": scale, "sigma": 0.05, "eta": 0.1}
    for steps in (0, 2):
        config = papers(epsilon=0.1, ascent_steps=steps, **given)
        delta, after = problem.ascend(backend, config)
        assert np.all(delta[..., missing] == 0)
        assert np.isfinite(after).all()
        want, _ = without.ascend(backend, config)
        assert np.any(want != 0)
        assert delta[..., ~missing] == pytest.approx(want, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
@pytest.mark.parametrize("settings", [{}, {"norm": "2"}, {"norm": "1"}, {"projection": "rescale"}])
def test_missing_entries_of_some_rows(backend, settings, start):
    """A missing token is a padded one, a row of nothing else stays, and the other rows are as before."""
    problem = Problem()
    config = papers(start=start, epsilon=0.1, sigma=0.05, eta=0.1, ascent_steps=2, **settings)
    problem.x[0, 3], problem.x[3] = 0, 0
    mask = np.ones((4, 5))
    mask[0, 3] = mask[3] = 0
    want, _ = problem.ascend(backend, config, mask=mask)
    problem.x[0, 3], problem.x[3] = np.nan, -np.inf
    delta, after = problem.ascend(backend, config, mask=None)
    assert np.array_equal(delta, want)
    assert np.all(delta[3] == 0)
    assert np.any(delta[0] != 0)
    assert np.isfinite(after).all()


def test_rms_is_of_the_finite_entries(backend):
    x = np.array([[[3.0, np.nan], [4.0, 9.0]], [[np.inf, 1.0], [7.0, -np.inf]], [[np.nan, np.nan], [np.nan, np.inf]]])
    assert call(backend, "rms", x, mask=np.array([[1, 1], [1, 1], [1, 1]])) == pytest.approx([np.sqrt(106 / 3), 5, 0])
    assert call(backend, "rms", x) == pytest.approx([np.sqrt(106 / 3), 5, 0])
    assert call(backend, "rms", x, mask=np.array([[1, 0], [0, 1], [1, 1]])) == pytest.approx([3, 7, 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_broken_gradient_at_a_finite_entry_is_not_hidden(backend, norm, granularity, start):
    problem = Problem()
    problem.w2[0, 1] = np.nan  # the row whose outputs have it, and so every gradient of class 1
    config = papers(start=start, norm=norm, granularity=granularity, ascent_steps=int(start == "gaussian"))
    delta, _ = problem.ascend(backend, config, mask=None)
    assert np.isnan(delta).any()
