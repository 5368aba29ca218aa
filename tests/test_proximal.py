import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg.checking import Face, Problem
from smartreg.proximal import bregman_divergence, ema_update, mean_examples, momentum


@given(total=st.integers(1, 10_000), percent=st.integers(1, 99))
def test_momentum_switches_after_the_early_fraction(total, percent):
    config = papers(total_steps=total, early_fraction=percent / 100, beta_early=0.25, beta_late=0.75)
    switch = total * percent // 100  # in whole numbers: t <= fraction * T
    for step in {1, switch, switch + 1, total}:
        assert momentum(step, config) == (0.25 if step <= switch else 0.75)


def test_momentum_edges():
    assert momentum(29, papers(total_steps=100, early_fraction=0.29)) == 0.99
    assert momentum(30, papers(total_steps=100, early_fraction=0.29)) == 0.999
    assert momentum(1, papers(early_fraction=0)) == 0.999
    assert momentum(10**6, papers(early_fraction=1)) == 0.99
    assert momentum(5, papers(beta_early=0.5, beta_late=0.5)) == 0.5
    with pytest.raises(ValueError, match="momentum: .* total_steps is needed, got None"):
        momentum(1, papers())


@given(total=st.integers(1, 10_000), memory=st.floats(1e-3, 1), steps=st.integers(1, 5))
def test_momentum_by_memory_is_a_mean_and_then_forgets(total, memory, steps):
    config = SMARTConfig(memory=memory, total_steps=total, proximal_steps=steps, mu=1)
    moments = range(steps, total + 1, steps)  # when theta~ moves
    betas = [momentum(step, config) for step in moments]
    assert betas == sorted(betas)
    assert all(0.5 <= beta < 1 for beta in betas)
    remembered = max(2.0, memory * total / steps)
    for moves, beta in enumerate(betas, start=1):  # the mean of theta_0 and of theta after each of the moves
        assert 1 / (1 - beta) == pytest.approx(min(moves + 1, remembered))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.999, 1.0])
def test_ema_update(beta):
    rng = np.random.default_rng(0)
    theta, teacher = {"w": rng.normal(size=3)}, {"w": rng.normal(size=3)}
    kept = teacher["w"].copy()
    moved = ema_update(teacher, theta, beta)["w"]
    assert moved == pytest.approx((1 - beta) * theta["w"] + beta * kept, rel=1e-15)
    assert np.array_equal(teacher["w"], kept)
    assert np.array_equal(ema_update(teacher, {"w": kept}, beta)["w"], kept)  # at rest: D_Breg stays exactly 0
    if beta in (0.0, 1.0):
        assert np.array_equal(moved, theta["w"] if beta == 0 else kept)


def test_ema_is_kept_in_float32_or_wider():
    """In float16, 0.001 of the way from 1 to 1.1 is no way at all."""
    moved = ema_update({"w": np.ones(1, np.float16)}, {"w": np.full(1, 1.1, np.float16)}, 0.999)["w"]
    assert moved.dtype == np.float32
    assert moved[0] == pytest.approx(1.0001, rel=1e-6)


def test_bregman_divergence_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 2))
    each = [(x - y) @ (x - y) for x, y in zip(a, b, strict=True)]
    assert bregman_divergence(a, b, "squared_error") == pytest.approx(np.mean(each))
    weights = np.array([1.0, 0.0, 2.0])
    assert bregman_divergence(a, b, "squared_error", sample_weight=weights) == pytest.approx(weights @ each / 3)
    with pytest.raises(ValueError, match=r"one weight an example, \(3,\), got \(2,\)"):
        mean_examples(np.ones(3), np.ones(2))


def test_bregman_divergence_leaves_masked_positions_out():
    a, b = np.zeros((2, 3, 1)), np.array([[[1.0], [2.0], [9.0]], [[3.0], [9.0], [9.0]]])
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    assert bregman_divergence(a, b, "squared_error", mask) == pytest.approx(((1 + 4) / 2 + 9) / 2)


def test_an_unknown_divergence_is_named(backend):
    outputs, choices = np.zeros((1, 2)), "'symmetric_kl', 'bernoulli_symmetric_kl', 'squared_error'"
    with pytest.raises(Problem, match=f"bregman_divergence: divergence must be one of {choices}, got 'kl'"):
        Face(backend).bregman_divergence(outputs, outputs, "kl")
    with pytest.raises(Problem, match="got None"):
        Face(backend).bregman_divergence(outputs, outputs, None)
