"""The step: what R_s and D_Breg are made of, how many passes they take, and the noise."""

import itertools

import pytest
import torch
from paper_settings import papers
from small_torch import BOTH, R_S, Model, make_batches, train
from torch import nn

from smartreg import SMARTConfig, divergences
from smartreg_torch import SMART
from smartreg_torch.divergences import DIVERGENCES, squared_error, symmetric_kl
from smartreg_torch.step import Noise


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (papers(lambda_s=0, mu=0), 1),
        (papers(mu=0, ascent_steps=0), 2),
        (papers(mu=0, ascent_steps=1), 3),
        (papers(mu=0, start="margin", ascent_steps=0), 2),
        (papers(mu=0, start="margin", ascent_steps=2), 4),
        (papers(lambda_s=0, total_steps=9), 2),
        (papers(start="margin", ascent_steps=0, total_steps=9), 3),
    ],
)
def test_a_step_takes_no_more_passes_than_the_table_says(ids, config, passes):
    model = Model()
    smart = SMART(model, config)
    passed = itertools.count()  # a list would be put back after each pass
    model.register_forward_hook(lambda *_: (next(passed), None)[1])
    smart(ids)  # the first step has one more, to see that the passes are alike
    before = next(passed)
    smart(ids)
    assert next(passed) - before - 1 == passes


def test_eval_mode_and_no_grad_are_the_models_own_call(ids):
    model = Model()
    smart = SMART(model, BOTH)
    with torch.no_grad():
        output, penalty = smart(ids)
        assert penalty == 0
    model.eval()
    output, penalty = smart(ids)
    assert penalty == 0
    assert torch.equal(output, model(ids))
    assert smart.metrics == {"step": 0, "skipped": 0}


def test_sample_weights_weigh_both_terms(ids):
    model = Model()
    model.dropout.p = 0.0
    smart = SMART(model, BOTH, noise=lambda like: torch.ones_like(like))
    for average in smart.teacher.values():
        average.mul_(0.9)
    weights = torch.tensor([1.0, 0, 2, 0.5, 0, 3])
    smart(ids)
    mean = dict(smart.metrics)
    each = {"R_s": [], "D_Breg": []}
    for i in range(6):
        smart(ids, sample_weight=nn.functional.one_hot(torch.tensor(i), 6).float())
        for name, values in each.items():
            values.append(smart.metrics[name])
    smart(ids, sample_weight=weights)
    for name, values in each.items():
        assert sum(values) == pytest.approx(mean[name], rel=1e-5)
        assert smart.metrics[name] == pytest.approx(float(weights @ torch.tensor(values)), rel=1e-5)
    with pytest.raises(ValueError, match=r"one weight an example, \(6,\), got \(5,\)"):
        smart(ids, sample_weight=torch.ones(5))


def test_sample_weight_reaches_a_forward_that_takes_it(ids):
    class Weighted(Model):
        def forward(self, ids, sample_weight=None):
            self.seen = sample_weight
            return super().forward(ids)

    model = Weighted()
    smart = SMART(model, R_S)
    smart(ids, sample_weight=torch.ones(6))
    assert model.seen is not None


def test_both_sides_of_r_s_carry_gradient(ids):
    """With the clean side detached, a part of the gradient is missing: the two must differ."""
    model = Model()
    seen = []
    smart = SMART(model, R_S, on_step=seen.append)
    torch.manual_seed(1)
    output, penalty = smart(ids)
    deltas = seen[0].delta
    gradient = torch.autograd.grad(penalty, model.head.weight)[0]
    assert smart.metrics["max_delta"] == deltas[0].abs().max()
    torch.manual_seed(1)
    clean = model(ids)
    handle = model.embedding.register_forward_hook(lambda _m, _i, given: given + deltas[0])
    torch.manual_seed(1)
    perturbed = model(ids)
    handle.remove()
    both = torch.autograd.grad(symmetric_kl(perturbed, clean).mean(), model.head.weight, retain_graph=True)[0]
    half = torch.autograd.grad(symmetric_kl(perturbed, clean.detach()).mean(), model.head.weight)[0]
    assert torch.allclose(gradient, both, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient, half, rtol=0.1)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_frozen_embeddings_are_perturbed_all_the_same(ids, start):
    model = Model()
    model.embedding.requires_grad_(False)
    smart = SMART(model, papers(mu=0, start=start))
    _, penalty = smart(ids)
    penalty.backward()
    assert smart.metrics["R_s"] > 0
    assert model.embedding.weight.grad is None
    assert not model.embedding.weight.requires_grad


def test_the_paper_start_and_the_seed_make_a_run_reproducible():
    batches = make_batches(3)
    weights = Model().state_dict()
    runs = []
    for seed in (1, 1, 2):
        model = Model()
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        runs.append(train(model, SMART(model, BOTH), batches))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("divergence", "lambda_s", "mu"), [("squared_error", 0.1, 0.1), ("symmetric_kl", 1.0, 0.5)])
def test_a_weight_that_is_not_given_follows_the_task(ids, divergence, lambda_s, mu, lean):
    model, found, gradients = Model(), [], []
    for config in (SMARTConfig(total_steps=9), SMARTConfig(lambda_s=lambda_s, mu=mu, total_steps=9)):
        torch.manual_seed(0)
        smart = SMART(model, config, divergence=divergence, on_step=found.append, lean=lean)
        for average in smart.teacher.values():
            average += 0.1
        _, penalty = smart(ids)
        model.zero_grad()
        penalty.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert found[0].metrics["R_s"] == found[1].metrics["R_s"] > 0
    assert found[0].metrics["D_Breg"] == found[1].metrics["D_Breg"] > 0
    assert found[0].metrics["penalty"] == pytest.approx(
        lambda_s * found[0].metrics["R_s"] + mu * found[0].metrics["D_Breg"], rel=1e-6
    )
    assert all(map(torch.equal, *gradients))


def test_a_new_divergence_of_values_gets_signs(ids, monkeypatch):
    """As squared_error does: nothing but the tables of divergences has its name."""
    new = divergences.DIVERGENCES["squared_error"]
    monkeypatch.setitem(divergences.DIVERGENCES, "new", divergences.Divergence(new.value, new.grad))
    monkeypatch.setitem(DIVERGENCES, "new", squared_error)
    model, found = Model(), []
    for name in ("squared_error", "new"):
        torch.manual_seed(0)
        SMART(model, papers(mu=0, start="margin"), divergence=name, on_step=found.append)(ids)
    assert torch.equal(found[0].delta[0], found[1].delta[0])
    assert found[1].metrics["R_s"] == found[0].metrics["R_s"] > 0


def test_the_noise_is_standard_normal():
    drawn = Noise(0)(torch.zeros(10_000))
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((0, 1), abs=0.05)
    assert drawn.abs().max() > 3


def test_terms_that_are_off_cost_nothing(ids):
    model = Model()
    off = SMART(model, papers(lambda_s=0, mu=0))
    assert not model.embedding._forward_hooks
    assert not off.teacher
    assert not SMART(model, R_S).teacher
