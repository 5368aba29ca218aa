"""theta~: a model with the averaged weights, which follows, moves and takes no gradient."""

import copy

import pytest
import torch
from architectures import LSTM
from paper_settings import papers
from small_torch import BOTH, Model
from torch import nn

from smartreg_torch import SMART
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.proximal import bregman_divergence


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


@pytest.mark.parametrize("make", [Model, LSTM])
def test_the_teacher_is_a_model_with_the_averaged_weights(make, ids):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.LSTM):
            module.dropout = 0.0
    smart = SMART(model, papers(lambda_s=0, total_steps=10))
    for average in smart.teacher.values():
        average.add_(0.1 * torch.randn_like(average))
    twin = copy.deepcopy(model)
    twin.load_state_dict(smart.teacher, strict=False)
    _, penalty = smart(ids)
    expected = symmetric_kl(model(ids), twin(ids)).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    assert penalty.item() > 1e-4
    with smart.swap_teacher():
        assert torch.allclose(model(ids), twin(ids))
    assert not torch.allclose(model(ids), twin(ids))


def test_no_gradient_reaches_the_teachers_outputs():
    outputs, taught = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    bregman_divergence(outputs, taught).backward()
    assert outputs.grad.abs().max() > 0
    assert taught.grad is None


def test_theta_tilde_moves_every_S_steps():
    model = Model()
    smart = SMART(model, papers(lambda_s=0, proximal_steps=3, beta_early=0.5, beta_late=0.5))
    kept = {name: average.clone() for name, average in smart.teacher.items()}
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        smart.update()
        if step % 3 == 0:
            kept = {name: 0.5 * kept[name] + 0.5 * parameter.detach() for name, parameter in model.named_parameters()}
            assert smart.metrics["beta"] == 0.5
        for name, average in smart.teacher.items():
            assert torch.allclose(average, kept[name]), (step, name)


def test_bf16_weights_have_a_float32_teacher_that_moves():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    smart = SMART(model, papers(lambda_s=0, beta_early=0.999, beta_late=0.999))
    before = smart.teacher["weight"].clone()
    with torch.no_grad():
        model.weight.add_(0.125)
    smart.update()
    assert before.dtype == torch.float32
    assert smart.teacher["weight"] - before == pytest.approx(0.001 * (model.weight.float() - before).detach(), rel=1e-2)


def test_parameters_that_become_trainable_later_join_the_teacher(ids):
    model = Model()
    model.embedding.requires_grad_(False)
    smart = SMART(model, BOTH)
    assert "embedding.weight" not in smart.teacher
    smart(ids)
    model.embedding.requires_grad_(True)
    smart(ids)
    assert torch.equal(smart.teacher["embedding.weight"], model.embedding.weight)


def test_the_teacher_follows_a_change_of_dtype_or_shape_between_two_steps(ids):
    model = Model()
    smart = SMART(model, BOTH)
    for _ in range(2):
        smart(ids)
        smart.update()
    model.double()
    smart(ids)
    assert {average.dtype for average in smart.teacher.values()} == {torch.float64}
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-13)
    model.embedding.weight.data = torch.cat([model.embedding.weight.data] * 2)
    with pytest.raises(RuntimeError, match=r"embedding.weight has the shape .* resized during training"):
        smart(ids)


def test_autocast_does_not_give_the_teacher_the_students_weights(ids):
    model = Model()
    model.dropout.p = 0.0
    smart = SMART(model, papers(lambda_s=0, total_steps=9))
    for average in smart.teacher.values():
        average.mul_(1.5)
    plain = smart(ids)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert smart(ids)[1].item() == pytest.approx(plain, rel=0.1)
        assert torch.is_autocast_cache_enabled()
