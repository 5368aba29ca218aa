"""What a step found: what an observer sees, and what is said of it."""

import warnings

import pytest
import torch
from paper_settings import papers
from small_torch import BOTH, R_S, Model, assert_untouched
from torch import nn

from smartreg.report import StepSeen, not_finite, warn_of
from smartreg_torch import SMART, SMARTConfig, SMARTWarning
from smartreg_torch.divergences import symmetric_kl

FAR = papers(total_steps=20, epsilon=0.1)


def model():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 2))


def test_an_observer_sees_what_the_penalty_was_made_of():
    seen, ids = [], torch.randint(9, (6, 3))
    smart = SMART(model(), FAR, on_step=seen.append)
    for average in smart.teacher.values():
        average.mul_(0.9)
    smart.step = 4
    weight = torch.rand(6)
    logits, penalty = smart(ids, sample_weight=weight)
    (step,) = seen
    assert isinstance(step, StepSeen)
    assert step.step == 5
    assert torch.equal(step.x[0], smart.model[0](ids).detach())
    assert torch.equal(step.outputs[0], logits)
    assert step.delta[0].abs().max() == step.metrics["max_delta"]
    for name, other in (("R_s", step.perturbed), ("D_Breg", step.teacher)):
        expected = (weight * symmetric_kl(other[0], logits.detach())).mean()
        assert step.metrics[name] == pytest.approx(float(expected), rel=1e-5)
    assert step.metrics["penalty"] == penalty.item()
    assert step.mask == step.positions == [None]
    assert torch.equal(step.sample_weight[0], weight)
    assert step.divergences == ["symmetric_kl"]
    assert not any(z.requires_grad for z in step.tensors().values())


def test_an_observer_sees_only_steps_that_have_a_penalty():
    seen, ids = [], torch.randint(9, (6, 3))
    smart = SMART(model(), FAR.replace(smoothness_steps=2), on_step=seen.append)
    smart(ids)
    smart.update()
    smart(ids)
    assert [len(step.delta) for step in seen] == [1, 0]
    assert [sorted(step.metrics) for step in seen] == [
        ["D_Breg", "R_s", "max_delta", "penalty", "vanished"],
        ["D_Breg", "beta", "penalty"],
    ]
    smart.config = FAR.replace(smoothness_steps=2, mu=0)
    smart(ids)
    smart.model.eval()
    smart(ids)
    assert len(seen) == 2


def test_an_observers_exception_propagates_and_training_goes_on():
    def breaks(step):
        raise KeyError(step.step)

    with pytest.raises(TypeError, match="SMART: on_step must be a function"):
        SMART(model(), FAR, on_step=3)
    smart = SMART(model(), FAR, on_step=breaks)
    ids = torch.randint(9, (6, 3))
    with pytest.raises(KeyError, match="1"):
        smart(ids)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in smart.model.parameters())
    assert not any(hook.is_armed for module in smart.model.modules() for hook in module._forward_hooks.values())


def test_observing_changes_nothing():
    ends = []
    for on_step in (None, lambda seen: None):
        torch.manual_seed(0)
        smart = SMART(model(), FAR, on_step=on_step)
        optimizer = torch.optim.SGD(smart.model.parameters(), lr=0.1)
        for _ in range(3):
            logits, penalty = smart(torch.randint(9, (6, 3)))
            (logits.square().mean() + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
        ends.append([*smart.model.parameters(), *smart.teacher.values(), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


def test_what_is_said_of_a_step():
    assert warn_of({"vanished": 0.5, "max_delta": 0.1}, "margin") == {}
    assert list(warn_of({"vanished": 0.51, "max_delta": 0.0}, "margin")) == ["vanished", "still"]
    assert warn_of({"max_delta": 0.0}, "gaussian") == {}
    assert "51% of the entries" in warn_of({"vanished": 0.51}, "gaussian", "torch.bfloat16")["vanished"]
    assert "(R_s = nan, max_delta = 1)" in not_finite(
        7, "clean", {"max_delta": 1.0, "R_s": float("nan"), "vanished": 0}
    )
    assert "step 7 is not finite; the first values" in not_finite(7, "clean", {})


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


class Imputes(nn.Module):
    """Its gradient at x is NaN, and what it makes of a NaN in x is finite."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.nan_to_num(0.0)) + 0 * (x - x.detach()).square().sum(-1, keepdim=True).sqrt().nan_to_num(0.0)


def test_nan_raises_and_names_the_step(ids):
    model = Model(lambda z: z * float("nan"))
    smart = SMART(model, BOTH)
    smart.step = 6
    with pytest.raises(FloatingPointError, match=r"penalty of step 7 is not finite \(R_s = nan.*in the clean pass"):
        smart(ids)
    assert_untouched(model)


def test_a_perturbation_that_is_not_finite_is_noticed():
    """0 sqrt'(0) is NaN: the model hides it, and R_s would be that of a row of nothing."""
    x = torch.randn(5, 4)
    with pytest.raises(FloatingPointError, match="max_delta = nan.*in the ascent pass"):
        SMART(Imputes(), R_S.replace(start="margin", ascent_steps=0))(x)
    smart = SMART(Imputes(), R_S.replace(start="margin", ascent_steps=0, non_finite="skip"))
    assert smart(x)[1].item() == 0
    assert smart.metrics["skipped"] == 1


def test_nan_can_be_skipped_and_is_counted(ids):
    model = Model()
    smart = SMART(model, BOTH.replace(non_finite="skip"))
    model.convert = lambda z: z * float("inf")
    _, penalty = smart(ids)
    assert penalty == 0
    model.convert = lambda z: z
    _, penalty = smart(ids)
    assert penalty > 0
    assert smart.metrics["skipped"] == 1


def test_vanishing_perturbations_warn_once(ids):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 3)).to(torch.bfloat16)
    some = SMART(model, SMARTConfig.paper(mu=0, epsilon=8e-3, sigma=8e-3, ascent_steps=0), precision="model")
    some(ids)  # a part of the entries: no warning
    assert 0.1 < some.metrics["vanished"] < 0.5
    smart = SMART(model, SMARTConfig.paper(mu=0), precision="model")
    with pytest.warns(SMARTWarning, match="leaves 9[0-9]% of the entries as they were.*torch.bfloat16"):
        smart(ids)
    assert smart.metrics["vanished"] > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smart(ids)
        SMART(model, R_S, precision="model")(ids)  # a radius that bf16 resolves
