"""SMART's own behaviour: what it accepts, what it refuses, and what it leaves behind."""

import copy
import io

import pytest
import torch
from paper_settings import papers
from small_torch import BOTH, Model, make_batches, train

from smartreg_torch import SMART


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        SMART(lambda x: x)
    with pytest.raises(TypeError, match="config must be a SMARTConfig, got dict"):
        SMART(Model(), {"mu": 1})
    with pytest.raises(ValueError, match="SMART: mu > 0 and theta~ remembers .* total_steps is needed"):
        SMART(Model())
    with pytest.raises(
        TypeError, match=r"SMART: no argument is called 'mu': it is a setting. Give .* SMARTConfig\(mu="
    ):
        SMART(Model(), mu=1)
    with pytest.raises(TypeError, match=r"SMART: no argument is called 'output'; did you mean 'outputs'\?"):
        SMART(Model(), BOTH, output="logits")


def test_an_optimiser_that_is_a_wrapper_is_refused():
    """As accelerate's: a subclass that is not initialised."""

    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = Model()
    smart = SMART(model, BOTH)
    prepared = Prepared(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"got Prepared.*smart.attach\(prepared.optimizer\)"):
        smart.attach(prepared)
    smart.attach(prepared.optimizer)
    prepared.optimizer.step()
    assert smart.step == 1


def test_remove_undoes_everything(ids):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy({name: dict(vars(m)["_forward_hooks"]) for name, m in model.named_modules()})
    with SMART(model, BOTH).attach(optimizer) as smart:
        smart(ids)[1].backward()
        optimizer.step()
        assert smart.step == 1
        with pytest.raises(RuntimeError, match=r"attach\(\) was called before"):
            smart.attach(optimizer)
        with pytest.raises(RuntimeError, match=r"update\(\) after attach"):
            smart.update()
    assert {name: dict(vars(m)["_forward_hooks"]) for name, m in model.named_modules()} == before
    assert not model._forward_pre_hooks
    optimizer.step()
    assert smart.step == 1
    with pytest.raises(RuntimeError, match=r"called after remove\(\)"):
        smart(ids)
    smart.remove()


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(start):
    config = papers(total_steps=20, start=start, proximal_steps=2)
    batches = make_batches(10)

    def begin():
        torch.manual_seed(3)
        model = Model()
        return model, SMART(model, config), torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, smart, optimizer = begin()
    unbroken = train(model, smart, batches, optimizer)
    weights = copy.deepcopy(model.state_dict())

    model, smart, optimizer = begin()
    first = train(model, smart, batches[:5], optimizer)
    file = io.BytesIO()
    state = {"model": model.state_dict(), "smart": smart.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "random": torch.get_rng_state()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    model, smart, optimizer = begin()
    torch.manual_seed(99)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    smart.load_state_dict(state["smart"])
    torch.set_rng_state(state["random"])
    assert first + train(model, smart, batches[5:], optimizer) == unbroken
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_state_is_a_copy_and_carries_the_seed(ids):
    model, seen = Model(), []
    smart = SMART(model, papers(total_steps=20, ascent_steps=0), on_step=seen.append)
    state = smart.state_dict()
    kept = copy.deepcopy(state["teacher"])
    smart(ids)
    with torch.no_grad():
        model.head.weight.add_(1)
    smart.update()
    assert all(torch.equal(state["teacher"][name], value) for name, value in kept.items())
    torch.manual_seed(99)
    for resumed in (smart, SMART(model, smart.config, on_step=seen.append)):
        resumed.load_state_dict(state)  # from before the first noise was drawn
        resumed(ids)
        assert torch.equal(seen[-1].delta[0], seen[0].delta[0])


def test_a_state_of_another_model_is_refused():
    smart = SMART(Model(), BOTH)
    with pytest.raises(ValueError, match=r"theta~ in the state is not of this model's.*\['head.bias', 'head.weight'\]"):
        smart.load_state_dict(SMART(Model(outputs=5), BOTH).state_dict())
    with pytest.raises(ValueError, match="expected the keys"):
        smart.load_state_dict({"step": 3})
