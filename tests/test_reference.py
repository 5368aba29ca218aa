"""The NumPy reference of Algorithm 1 against finite differences and against its own definition."""

import numpy as np
import pytest
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg.divergences import DIVERGENCES
from smartreg.perturbation import ascend, output_mask
from smartreg.proximal import bregman_divergence, mean_examples, momentum
from smartreg.reference import Batch, fit_reference, forward, in_turn, init_parameters, task_loss

NAMES = list(DIVERGENCES)


def make_batch(rng, divergence="symmetric_kl", pooled=True, outputs=3, n=4, tokens=5):
    shape = (n,) if pooled else (n, tokens)
    labels = {
        "symmetric_kl": rng.integers(outputs, size=shape),
        "bernoulli_symmetric_kl": rng.integers(2, size=(*shape, outputs)).astype(float),
        "squared_error": rng.normal(size=(*shape, outputs)),
    }
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, size=(n, 1))
    return Batch(rng.integers(11, size=(n, tokens)), labels[divergence], mask, rng.uniform(0.5, 2, size=n))


def make_theta(rng, outputs=3):
    return init_parameters(rng, vocabulary=11, d=4, hidden=6, outputs=outputs)


def terms(theta, teacher, delta, batch, divergence, pooled, masks=(None, None)):
    """L, R_s and D_Breg at a fixed perturbation and theta~, from the definitions alone."""
    ids, y, mask, weight = batch
    x = theta["E"][ids]
    clean = forward(theta, x, mask, pooled, masks[0])[0]
    perturbed = forward(theta, x + delta, mask, pooled, masks[-1])[0]
    taught = forward(teacher, teacher["E"][ids], mask, pooled, masks[0])[0]
    loss, _ = task_loss(clean, y, divergence, mask, weight)
    values = DIVERGENCES[divergence].value(perturbed, clean, output_mask(clean, mask))
    r_s = mean_examples(values, weight)
    return loss, r_s, bregman_divergence(clean, taught, divergence, mask, weight)


def objective(*point, config):
    loss, r_s, d_breg = terms(*point)
    return loss + config.lambda_s * r_s + config.mu * d_breg


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("pooled", [True, False])
def test_gradients_against_finite_differences(divergence, pooled):
    check_gradients(divergence, pooled)


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("pooled", [True, False])
def test_gradients_with_dropout(pooled, dropout):
    """theta~'s pass has the clean pass's mask, and the last pass, if they are independent, one of its own."""
    check_gradients("symmetric_kl", pooled, dropout)


def make_masks(rng, steps, passes=3):
    return (rng.random((steps, passes, 4, 5, 6)) < 0.8) / 0.8


def check_gradients(divergence, pooled, dropout=None):
    rng = np.random.default_rng(0)
    theta = make_theta(rng)
    batches = [make_batch(rng, divergence, pooled) for _ in range(2)]
    config = papers(lambda_s=2, mu=3, epsilon=0.3, sigma=0.2, eta=0.1, total_steps=2, early_fraction=0)
    noise = rng.normal(size=(2, 4, 5, 4))
    options = {"divergence": divergence, "optimizer": "sgd", "learning_rate": 0.5, "pooled": pooled}
    masks = (None, None)
    if dropout is not None:
        config, options["dropout"] = config.replace(dropout=dropout), make_masks(rng, 2)
        masks = options["dropout"][1][[0, 0 if dropout == "shared" else 2]]
    first, second = fit_reference(theta, batches, config, noise, **options)
    at, rest = first.theta, (first.teacher, second.delta, batches[1], divergence, pooled, masks)
    for name in theta:
        for k in rng.choice(theta[name].size, size=min(6, theta[name].size), replace=False):
            slopes = []
            for h in (1e-6, -1e-6):
                moved = {key: value.copy() for key, value in at.items()}
                moved[name].flat[k] += h
                slopes.append(objective(moved, *rest, config=config) / (2e-6) * np.sign(h))
            assert second.gradients[name].flat[k] == pytest.approx(sum(slopes), rel=2e-6, abs=1e-8), name
    assert second.objective == pytest.approx(objective(at, *rest, config=config), rel=1e-14)
    assert (second.loss, second.R_s, second.D_Breg) == pytest.approx(terms(at, *rest), rel=1e-14)
    assert min(second.R_s, second.D_Breg) > 1e-3


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_each_pass_of_the_ascent_has_its_mask(start):
    rng = np.random.default_rng(3)
    theta, batch, masks = make_theta(rng), make_batch(rng), make_masks(rng, 1, passes=4)
    config = papers(start=start, ascent_steps=2, epsilon=0.3, sigma=0.2, eta=0.2, mu=0, dropout="independent")
    noise = rng.normal(size=(1, 4, 5, 4)) if start == "gaussian" else [None]
    (step,) = fit_reference(theta, [batch], config, noise, dropout=masks)
    calls = iter(masks[0, 1:3] if start == "gaussian" else masks[0, :3])  # the margin start has the clean pass's

    def network(x):
        outputs, vjp = forward(theta, x, batch.mask, dropout=next(calls))
        return outputs, lambda grad: vjp(grad)[1]

    x = theta["E"][batch.ids]
    target = forward(theta, x, batch.mask, dropout=masks[0, 0])[0]
    np.testing.assert_array_equal(step.outputs, target)
    np.testing.assert_array_equal(step.delta, ascend(network, x, target, config, noise[0], batch.mask))
    assert next(calls, None) is None
    (shared,) = fit_reference(theta, [batch], config.replace(dropout="shared"), noise, dropout=masks)
    assert np.abs(shared.delta - step.delta).max() > 0.01


def test_a_mask_for_each_pass_is_asked_for():
    rng = np.random.default_rng(0)
    theta, batch, config = make_theta(rng), make_batch(rng), papers(mu=0, dropout="independent")
    with pytest.raises(ValueError, match="expected 3 dropout masks, one for each pass of a step, got 2"):
        fit_reference(theta, [batch], config, rng.normal(size=(1, 4, 5, 4)), dropout=make_masks(rng, 1, passes=2))
    masks = in_turn([1.0])
    next(masks)
    with pytest.raises(ValueError, match="the network ran more than 1 times, and each pass has a mask of its own"):
        next(masks)


def test_theta_tilde_moves_every_S_steps_with_the_scheduled_beta():
    rng = np.random.default_rng(0)
    theta = make_theta(rng)
    config = papers(proximal_steps=3, total_steps=12, early_fraction=0.5, beta_early=0.2, beta_late=0.6)
    steps = fit_reference(theta, [make_batch(rng) for _ in range(12)], config, rng.normal(size=(12, 4, 5, 4)))
    teacher = theta
    for t, step in enumerate(steps, start=1):
        if t % 3:
            assert step.beta is None
            assert all(step.teacher[name] is value for name, value in teacher.items()) or t < 3
        else:
            assert step.beta == momentum(t, config) == (0.2 if t <= 6 else 0.6)
            for name, value in step.teacher.items():
                expected = (1 - step.beta) * step.theta[name] + step.beta * teacher[name]
                assert value == pytest.approx(expected, rel=1e-14)
        teacher = step.teacher


def test_R_s_in_the_first_of_every_K_steps_with_K_times_its_weight():
    rng = np.random.default_rng(0)
    theta, batches, noise = make_theta(rng), [make_batch(rng) for _ in range(7)], rng.normal(size=(7, 4, 5, 4))
    settings = {"epsilon": 0.1, "sigma": 0.1, "total_steps": 7}
    steps = fit_reference(theta, batches, papers(**settings, lambda_s=0.5, smoothness_steps=3), noise)
    for t, step in enumerate(steps):
        one = [noise[t]], papers(**settings, lambda_s=1.5 * (t % 3 == 0))
        at = steps[t - 1] if t else None
        alone = fit_reference(at.theta if at else theta, [batches[t]], one[1], one[0])[0]
        assert step.R_s == alone.R_s
        assert (step.delta is None) == (step.perturbed_outputs is None) == (step.R_s == 0) == (t % 3 > 0)
        assert step.objective == pytest.approx(step.loss + 1.5 * step.R_s + step.D_Breg, rel=1e-15)
        if t == 0:
            assert all(np.array_equal(step.gradients[name], alone.gradients[name]) for name in theta)
    assert [step.D_Breg > 0 for step in steps] == [False] + [True] * 6


@pytest.mark.parametrize(("divergence", "lambda_s", "mu"), [("squared_error", 0.1, 0.1), ("symmetric_kl", 1.0, 0.5)])
def test_a_weight_that_is_not_given_follows_the_task(divergence, lambda_s, mu):
    rng = np.random.default_rng(0)
    theta, batches = make_theta(rng), [make_batch(rng, divergence)]
    noise = [np.sign(rng.normal(size=(4, 3)))]
    chosen, by_hand = SMARTConfig(total_steps=9), SMARTConfig(lambda_s=lambda_s, mu=mu, total_steps=9)
    _, default = fit_reference(theta, batches * 2, chosen, noise * 2, divergence=divergence)
    _, given = fit_reference(theta, batches * 2, by_hand, noise * 2, divergence=divergence)
    assert default.objective == default.loss + lambda_s * default.R_s + mu * default.D_Breg
    assert min(default.R_s, default.D_Breg) > 0
    assert all(np.array_equal(default.gradients[name], given.gradients[name]) for name in theta)


def test_vanilla_proximal_steps():
    """beta = 0: theta~ is theta; with S = 1 the gradient of D_Breg is exactly 0, with S > 1 it is not."""
    rng = np.random.default_rng(0)
    theta, batches = make_theta(rng), [make_batch(rng) for _ in range(4)]
    vanilla = {"lambda_s": 0, "beta_early": 0, "beta_late": 0}
    plain = fit_reference(theta, batches, papers(lambda_s=0, mu=0))
    with pytest.warns(UserWarning, match="exactly 0"):
        once = papers(**vanilla)
    for a, b in zip(fit_reference(theta, batches, once), plain, strict=True):
        assert b.D_Breg == a.D_Breg == 0
        assert all(np.array_equal(a.gradients[name], b.gradients[name]) for name in theta)
    twice = fit_reference(theta, batches, papers(**vanilla, proximal_steps=2))
    assert [step.D_Breg > 0 for step in twice] == [False, True, False, True]


def test_optimizers_by_hand():
    rng = np.random.default_rng(0)
    theta, batches = make_theta(rng), [make_batch(rng) for _ in range(3)]
    plain = papers(lambda_s=0, mu=0)
    sgd = fit_reference(theta, batches, plain, optimizer="sgd", learning_rate=0.1)
    assert sgd[0].theta["W1"] == pytest.approx(theta["W1"] - 0.1 * sgd[0].gradients["W1"], rel=1e-15)
    # one entry, three steps, as Kingma and Ba write it; Keras' epsilon is torch's over the square root of 1 - 0.999^t
    for optimizer in ("adam_torch", "adam_keras"):
        steps = fit_reference(theta, batches, plain, optimizer=optimizer, learning_rate=0.1)
        value, m, v = theta["b1"][0], 0.0, 0.0
        for t, step in enumerate(steps, start=1):
            g = step.gradients["b1"][0]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            epsilon = 1e-8 if optimizer == "adam_torch" else 1e-8 / np.sqrt(1 - 0.999**t)
            value -= 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + epsilon)
            assert step.theta["b1"][0] == pytest.approx(value, rel=1e-13)
    with pytest.raises(ValueError, match="optimizer must be 'sgd', 'adam_torch' or 'adam_keras', got 'adam'"):
        fit_reference(theta, batches, plain, optimizer="adam")


def test_padding_and_the_callers_arrays_are_left_alone():
    rng = np.random.default_rng(0)
    theta, batch = make_theta(rng), make_batch(rng)
    kept = {name: value.copy() for name, value in theta.items()}
    config = papers(total_steps=1)
    noise = rng.normal(size=(1, 4, 5, 4))
    (step,) = fit_reference(theta, [batch], config, noise)
    assert np.all(step.delta[~batch.mask] == 0)
    assert all(np.array_equal(theta[name], value) for name, value in kept.items())
    # what stands in the padding does not matter
    other = batch._replace(ids=np.where(batch.mask, batch.ids, 0))
    (same,) = fit_reference(theta, [other], config, noise)
    assert same.objective == step.objective


def test_total_steps_is_asked_for():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="fit_reference: .* total_steps is needed"):
        fit_reference(make_theta(rng), [make_batch(rng)], papers())
