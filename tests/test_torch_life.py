"""SMART's life beside a model: made, called, saved, loaded, copied, removed, made again, in any order."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.optim.swa_utils import AveragedModel

from smartreg_torch import SMART, SMARTConfig, SMARTWarning

CONFIG = SMARTConfig(beta_early=0.9, beta_late=0.5, total_steps=20, proximal_steps=2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.dropout = nn.Embedding(20, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.head, self.calls, self.kept = nn.Linear(6, 3), 0, []

    def forward(self, ids):
        self.calls += 1
        self.kept.append(self.calls)
        return self.head(self.norm(self.dropout(self.embedding(ids)).tanh().mean(1)))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ids_of(seed):
    return torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(seed))


# copies


def test_a_model_is_saved_and_loaded_while_smart_is_on_it():
    model = Model()
    smart = SMART(model, CONFIG)
    smart(ids_of(0))[1].backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model.eval()(ids_of(0))
    model.train()
    found = []
    for twin in [torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]:
        assert torch.equal(twin.eval()(ids_of(0)), expected)
        smart(ids_of(0))  # whose hook is not in the copy
        with SMART(twin.train(), CONFIG) as own:
            torch.manual_seed(1)
            own(ids_of(0))
            found.append(own.metrics["R_s"])
    assert found[0] == found[1] == found[2] > 1e-8
    average = AveragedModel(model)
    assert average(ids_of(0)).shape == (6, 3)


def test_a_pickled_model_loads_without_this_package():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
    smart = SMART(model, CONFIG)
    code = (
        "import pickle, sys; model = pickle.load(sys.stdin.buffer); import torch; "
        "assert model(torch.ones(3, 2, dtype=torch.long)).shape == (3, 2); "
        "assert not [name for name in sys.modules if name.startswith('smartreg')]"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(model), check=True)
    smart.remove()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda smart: pickle.loads(pickle.dumps(smart))])
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_copy_of_smart_goes_on_with_a_copy_of_the_model(how, start):
    smart = SMART(Model(), CONFIG.replace(start=start))
    for step in range(3):
        smart(ids_of(step))[1].backward()
        smart.update()
    twin = how(smart)
    assert twin.model is not smart.model
    assert twin.metrics == smart.metrics
    penalties = []
    for one in (smart, twin):
        torch.manual_seed(7)
        penalties.append([one(ids_of(step))[1].item() for step in range(2)])
        one.update()
    assert penalties[0] == penalties[1]
    assert all(torch.equal(a, twin.teacher[name]) for name, a in smart.teacher.items())
    twin.remove()
    assert smart(ids_of(0))[1].item() > 0


def test_a_holder_of_model_and_smart_is_copied_whole():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()
            self.smart = SMART(self.model, CONFIG)

    holder = Holder()
    twin = copy.deepcopy(holder)
    assert twin.smart.model is twin.model
    with torch.no_grad():
        twin.model.embedding.weight.mul_(2)
    twin.smart(ids_of(0))
    assert twin.smart.metrics["R_s"] > 0
    holder.smart(ids_of(0))
    assert holder.smart.metrics["D_Breg"] < 1e-12


# hooks


def test_a_cell_that_is_run_twice_leaves_one_hook():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        smart = SMART(model, CONFIG).attach(optimizer)
        smart(ids_of(0))[1].backward()
    gc.collect()
    assert hooks(model) == 1
    optimizer.step()
    assert smart.step == 1
    del smart
    gc.collect()
    assert hooks(model) == 0
    optimizer.step()


@pytest.mark.parametrize("bad", ["record", "memory"])
def test_a_constructor_that_raises_leaves_no_hook(bad, tmp_path, monkeypatch):
    model = Model()
    if bad == "record":
        with pytest.raises(FileNotFoundError):
            SMART(model, CONFIG, record=tmp_path / "no folder" / "run.npz")
    else:
        own = torch.Tensor.to

        def to(self, *args, **settings):
            if settings.get("copy"):
                raise torch.OutOfMemoryError("no memory for theta~")
            return own(self, *args, **settings)

        monkeypatch.setattr(torch.Tensor, "to", to)
        with pytest.raises(torch.OutOfMemoryError, match="theta~"):
            SMART(model, CONFIG)
    assert hooks(model) == 0


def test_nothing_goes_on_after_remove():
    model = Model()
    smart = SMART(model, CONFIG)
    smart(ids_of(0))
    smart.remove()
    for call in (lambda: smart(ids_of(0)), smart.update, lambda: smart.measure(ids_of(0))):
        with pytest.raises(RuntimeError, match="after remove"):
            call()
    assert smart.step == 0
    with smart.swap_teacher():
        pass


# weights and settings that change


def fresh(seed):
    torch.manual_seed(seed)
    return Model()


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "data", "replaced"])
def test_theta_tilde_starts_at_the_weights_of_the_first_step(how):
    model, other = fresh(0), fresh(1)
    smart = SMART(model, CONFIG)
    with torch.no_grad():
        if how == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif how == "in place":
            model.head.weight.copy_(other.head.weight)
        elif how == "data":
            model.head.weight.data = other.head.weight.data
        else:
            model.head.weight = nn.Parameter(other.head.weight.clone())
    smart(ids_of(0))
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-12)
    assert torch.equal(smart.teacher["head.weight"], other.head.weight)
    with torch.no_grad():
        model.head.weight.mul_(2)  # training has begun
    smart(ids_of(0))
    assert smart.metrics["D_Breg"] > 1e-6


@pytest.mark.parametrize("flag", ["attribute", "buffer"])
def test_a_layer_that_initialises_itself_by_its_first_batch(flag):
    """ActNorm: once, by the clean pass, and theta~ starts from there."""

    class ActNorm(Model):
        def __init__(self):
            super().__init__()
            self.shift, self.done = nn.Parameter(torch.zeros(6)), False
            self.register_buffer("filled", torch.tensor(False))

        def forward(self, ids):
            x = self.embedding(ids).mean(1)
            if not (self.done if flag == "attribute" else self.filled):
                self.shift.data.copy_(-x.detach().mean(0))
                self.done = True
                self.filled.fill_(True)
            return self.head((x + self.shift).tanh())

    model = ActNorm()
    smart = SMART(model, CONFIG)
    smart(ids_of(0))
    shift = -model.embedding(ids_of(0)).mean(1).mean(0)
    assert torch.equal(model.shift, shift)
    assert torch.equal(smart.teacher["shift"], shift)
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-12)
    smart(ids_of(1))
    assert torch.equal(model.shift, shift)


def test_lazy_parameters_are_named():
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"nn.LazyLinear and the like.*Call the model on a batch"):
        SMART(model, CONFIG)
    model(ids_of(0))
    SMART(model, CONFIG)(ids_of(0))


def test_a_state_that_is_loaded_is_not_overwritten_by_loaded_weights():
    model = fresh(0)
    smart = SMART(model, CONFIG)
    smart(ids_of(0))
    smart.update()
    state = copy.deepcopy(smart.state_dict())
    for average in state["teacher"].values():
        average.mul_(0.5)
    resumed = SMART(fresh(2), CONFIG)
    resumed.load_state_dict(state)
    resumed.model.load_state_dict(model.state_dict())
    resumed(ids_of(0))
    assert torch.equal(resumed.teacher["head.weight"], state["teacher"]["head.weight"])
    assert resumed.metrics["D_Breg"] > 1e-6


@pytest.mark.parametrize("lambda_s", [0.0, 1.0])
def test_a_vocabulary_that_is_resized(lambda_s):
    def resized(model):
        old = model.embedding
        model.embedding = nn.Embedding(30, 6)
        with torch.no_grad():
            model.embedding.weight[:20].copy_(old.weight)

    model = Model()
    smart = SMART(model, CONFIG.replace(lambda_s=lambda_s))
    resized(model)
    smart(ids_of(0) + 10)
    assert smart.teacher["embedding.weight"].shape == (30, 6)
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-12)
    assert lambda_s == 0 or smart.metrics["R_s"] > 0
    smart.update()
    model.embedding = nn.Embedding(40, 6)
    with pytest.raises(RuntimeError, match=r"embedding.weight has the shape \(40, 6\).*Make a new SMART"):
        smart(ids_of(0))


def test_a_model_that_becomes_wider_has_a_wider_theta_tilde():
    model = Model()
    smart = SMART(model, CONFIG)
    smart(ids_of(0))
    smart.update()
    model.double()
    smart(ids_of(0))
    assert all(average.dtype == torch.float64 for average in smart.teacher.values())


def test_settings_may_change_between_steps():
    """lambda_s is warmed up from 0, where there is no site yet."""
    model = Model()
    smart = SMART(model, SMARTConfig(lambda_s=0, mu=0))
    smart(ids_of(0))
    assert hooks(model) == 0
    values = []
    for lambda_s in (0.25, 0.5):
        smart.config = smart.config.replace(lambda_s=lambda_s)
        torch.manual_seed(3)
        values.append(smart(ids_of(0))[1].item())
    assert values[1] == pytest.approx(2 * values[0], rel=1e-3)
    smart.config = CONFIG
    smart(ids_of(0))
    smart.update()
    assert smart.metrics["D_Breg"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(TypeError, match="config must be a SMARTConfig"):
        smart.config = {"lambda_s": 1}
    with pytest.raises(ValueError, match="total_steps is needed"):
        smart.config = SMARTConfig()
    assert smart.config == CONFIG


BAD = {
    "step": -1,
    "seed": "0",
    "generator": torch.zeros(3, dtype=torch.uint8),
    "teacher": {"head.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_state_changes_nothing(what):
    smart = SMART(Model(), CONFIG.replace(start="gaussian"))
    smart(ids_of(0))
    smart.update()
    before = copy.deepcopy(smart.state_dict())
    bad = copy.deepcopy(before) | {"step": 9, "skipped": 3}
    for average in bad["teacher"].values():
        average.zero_()
    with pytest.raises(ValueError, match=r"SMART.load_state_dict: "):
        smart.load_state_dict(bad | {what: BAD[what]})
    after = smart.state_dict()
    assert after["step"] == before["step"]
    assert torch.equal(after["generator"], before["generator"])
    assert all(torch.equal(a, before["teacher"][name]) for name, a in after["teacher"].items())


def test_a_state_without_or_with_a_theta_tilde_too_many():
    both, alone = SMART(Model(), CONFIG), SMART(Model(), CONFIG.replace(mu=0))
    both(ids_of(0))
    both.update()
    alone.load_state_dict(both.state_dict())
    assert alone.step == 1
    assert not alone.teacher
    with pytest.raises(ValueError, match="has no theta~, since it was saved with mu=0"):
        both.load_state_dict(alone.state_dict())


# any order


class Life(RuleBasedStateMachine):
    """A model with SMART beside its twin without: weights, buffers, random stream, mode and hooks stay the twin's."""

    @initialize(start=st.sampled_from(["gaussian", "margin"]), lean=st.booleans(), mu=st.sampled_from([0.0, 1.0]))
    def begin(self, start, lean, mu):
        torch.manual_seed(0)
        self.model = Model()
        self.twin = copy.deepcopy(self.model)
        self.config, self.lean = CONFIG.replace(start=start, mu=mu, lambda_s=1.0), lean
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.smart, self.saved, self.steps, self.penalty = None, None, 0, None
        self.make()

    def alive(self):
        return self.smart is not None

    @precondition(lambda self: not self.alive())
    @rule()
    def make(self):
        self.smart = SMART(self.model, self.config, lean=self.lean)
        self.steps = 0

    @precondition(lambda self: self.alive())
    @rule(seed=st.integers(0, 9))
    def call(self, seed):
        stream = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error", SMARTWarning)
            output, penalty = self.smart(ids_of(seed))
        after = torch.get_rng_state()
        torch.set_rng_state(stream)
        assert torch.equal(self.twin(ids_of(seed)), output)
        assert torch.equal(after, torch.get_rng_state())
        assert penalty.item() >= 0
        assert penalty.requires_grad is (self.model.training and penalty.item() != 0) or penalty.item() == 0
        self.penalty = penalty if self.model.training else None

    @precondition(lambda self: self.alive() and self.penalty is not None)
    @rule()
    def backward(self):
        stream = torch.get_rng_state()
        self.penalty.backward()
        self.penalty = None
        assert torch.equal(stream, torch.get_rng_state())
        assert any(parameter.grad is not None for parameter in self.model.parameters())

    @precondition(lambda self: self.alive())
    @rule()
    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.penalty = None
        self.twin.load_state_dict(self.model.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SMARTWarning)  # trained in eval mode
            self.smart.update()
        self.steps += 1

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training), self.twin.train(training)

    @precondition(lambda self: self.alive())
    @rule(seed=st.integers(0, 9))
    def measure(self, seed):
        assert self.smart.measure(ids_of(seed))["R_s"] >= 0

    @precondition(lambda self: self.alive())
    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "smart": self.smart.state_dict()}, file)
        self.saved = file.getvalue()

    @precondition(lambda self: self.alive() and self.saved is not None)
    @rule()
    def load(self):
        state = torch.load(io.BytesIO(self.saved), weights_only=True)
        for model in (self.model, self.twin):
            model.load_state_dict(state["model"])
        self.smart.load_state_dict(state["smart"])
        self.steps, self.penalty = state["smart"]["step"], None

    @precondition(lambda self: self.alive())
    @rule()
    def copy(self):
        self.smart = copy.deepcopy(self.smart)
        self.model, self.penalty = self.smart.model, None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    @rule()
    def pickle_the_model(self):
        twin = pickle.loads(pickle.dumps(self.model))
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), self.model.parameters(), strict=True))

    @precondition(lambda self: self.alive() and self.smart.teacher)
    @rule()
    def swap(self):
        with self.smart.swap_teacher():
            assert torch.equal(self.model.head.weight, self.smart.teacher["head.weight"])

    @precondition(lambda self: self.alive())
    @rule()
    def remove(self):
        self.smart.remove()
        self.smart = self.penalty = None

    @precondition(lambda self: self.alive())
    @rule()
    def forget(self):
        self.smart = self.penalty = None

    @invariant()
    def the_model_is_as_without_smart(self):
        if not hasattr(self, "model"):
            return
        mine, plain = self.model.state_dict(), self.twin.state_dict()
        assert all(torch.equal(mine[name], value) for name, value in plain.items())
        assert (self.model.calls, self.model.kept) == (self.twin.calls, self.twin.kept)
        assert all(parameter.requires_grad for parameter in self.model.parameters())
        assert [m.training for m in self.model.modules()] == [m.training for m in self.twin.modules()]
        live = [h for h in self.model.embedding._forward_hooks.values() if type(h).__module__.startswith("smartreg")]
        assert len(live) == self.alive()
        if self.alive():
            assert self.smart.step == self.steps
            assert bool(self.smart.teacher) is (self.config.mu > 0)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
