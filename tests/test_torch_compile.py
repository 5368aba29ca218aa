"""SMART on compiled models: the same numbers as without, and nothing compiled twice."""

import copy

import pytest
import torch
import torch._dynamo
from architectures import ARCHITECTURES
from paper_settings import papers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART, SMARTWarning

pytestmark = [
    # torch's own, at every graph break behind which a tensor has a gradient; shown to nobody but -W error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inductor's
]

CONFIG = papers(total_steps=60)
MARGIN = papers(total_steps=60, start="margin")
# "eager" traces and guards as all backends do, and compiles nothing; "aot_eager" has AOTAutograd besides
BACKEND = "eager"


class Model(nn.Module):
    """Something of everything that a step changes and puts back: weights, BatchNorm's buffers, dropout."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.dropout(self.norm(self.embedding(ids).tanh().mean(1))))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch.compiler.reset()


def wrapped(model, inputs, config, backend, **settings):
    return SMART(torch.compile(model, backend=backend), config, **settings)


def in_place(model, inputs, config, backend, **settings):
    model.compile(backend=backend)
    return SMART(model, config, **settings)


def in_place_afterwards(model, inputs, config, backend, **settings):
    smart = SMART(model, config, **settings)
    model.compile(backend=backend)
    return smart


def after_a_first_call(model, inputs, config, backend, **settings):
    compiled = torch.compile(model, backend=backend)
    state = copy.deepcopy(model.state_dict())
    compiled(**inputs)
    model.load_state_dict(state)
    return SMART(compiled, config, **settings)


def train(smart, inputs, steps, warm_up=3):
    """The metrics of each step; after the warm-up a recompilation is an error."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(smart.model.parameters(), lr=1e-2)
    metrics = []
    for step in range(steps):
        torch._dynamo.config.error_on_recompile = step >= warm_up
        output, penalty = smart(**inputs)
        logits = getattr(output, "logits", output)
        (cross_entropy(logits, torch.arange(len(logits)) % 3) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
        metrics.append(smart.metrics)
    return metrics


def assert_as_eager(make, inputs, how, config, backend, steps, **settings):
    eager, compiled = make(), make()
    compiled.load_state_dict(eager.state_dict())
    expected = train(SMART(eager, config, **settings), inputs, steps)
    torch._dynamo.utils.counters.clear()
    smart = how(compiled, inputs, config, backend, **settings)
    got = train(smart, inputs, steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12)
    assert expected[-1]["R_s"] > 0
    assert expected[-1]["D_Breg"] > 0
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    return smart


def test_steps_with_and_without_R_s_are_compiled_once():
    config = CONFIG.replace(smoothness_steps=2)
    assert_as_eager(Model, {"ids": torch.randint(11, (6, 5))}, wrapped, config, BACKEND, 8)


@pytest.mark.parametrize(
    ("how", "start"),
    [
        (wrapped, "gaussian"),
        (wrapped, "margin"),
        (in_place, "gaussian"),
        (in_place_afterwards, "margin"),
        (after_a_first_call, "gaussian"),
    ],
)
def test_fifty_compiled_steps_are_the_eager_ones_without_a_recompilation(how, start):
    inputs, config = {"ids": torch.randint(11, (6, 5))}, CONFIG.replace(start=start)
    smart = assert_as_eager(Model, inputs, how, config, "aot_eager" if how is wrapped else BACKEND, 50)
    SMART(Model(), config).load_state_dict(smart.state_dict())  # theta~ has the model's own names


@pytest.mark.parametrize("name", ["siamese", "CNN"])  # BERT is compiled in test_torch_transformers.py
def test_compiled_architectures_are_the_eager_ones(name):
    architecture = ARCHITECTURES[name]
    assert_as_eager(architecture.make, architecture.inputs(), wrapped, MARGIN, BACKEND, 4, **architecture.settings)


def test_a_compiled_model_with_checkpointed_layers_is_the_eager_one():
    class Checkpointed(Model):
        def forward(self, ids):
            x = checkpoint(lambda x: self.dropout(x.tanh()), self.embedding(ids), use_reentrant=False)
            return self.head(self.norm(x.mean(1)))

    assert_as_eager(Checkpointed, {"ids": torch.randint(11, (6, 5))}, wrapped, CONFIG, "aot_eager", 4)


def test_compiled_under_autocast_is_the_eager_step():
    inputs = {"ids": torch.randint(11, (6, 5))}
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_eager(Model, inputs, wrapped, CONFIG, BACKEND, 6)


def test_inductor_compares_like_with_like():
    """Its dropout is not eager's, but the same in all passes: theta = theta~ gives D_Breg = 0, and R_s is as small."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    smart = SMART(torch.compile(model), CONFIG.replace(ascent_steps=0))  # each kind of pass is another compilation
    _, penalty = smart(torch.randn(6, 4))
    assert smart.metrics["D_Breg"] < 1e-12
    assert 0 < smart.metrics["R_s"] < 1e-2
    penalty.backward()
    assert model[0].weight.grad.norm() > 0


def test_a_second_smart_on_a_compiled_model_is_seen():
    model = Model()
    model.compile(backend=BACKEND)
    ids = torch.randint(11, (6, 5))
    found = []
    for each in (copy.deepcopy(model), model, model):  # a copy is not compiled
        torch.manual_seed(1)
        with SMART(each, CONFIG) as smart:
            smart(ids)
            found.append(smart.metrics["R_s"])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-4)
    model.eval()
    expected = model._call_impl(ids)
    assert torch.equal(model(ids), expected)


def test_evaluation_in_between_is_one_whole_graph():
    model = Model()
    smart = SMART(torch.compile(model, backend=BACKEND), CONFIG)
    smart(torch.randint(11, (6, 5)))
    model.eval()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        smart(torch.randint(11, (6, 5)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_new_shapes_in_each_batch_are_warned_of_once():
    smart = SMART(torch.compile(Model(), backend=BACKEND, dynamic=False), CONFIG)
    for tokens in (4, 5, 6):
        smart(torch.randint(11, (6, tokens)))
    with pytest.warns(SMARTWarning, match=r"compiled the model anew in 4 batches.*Pad.*dynamic=True"):
        smart(torch.randint(11, (6, 7)))
    smart(torch.randint(11, (6, 8)))


def test_shapes_that_torch_compile_generalises_are_not_warned_of():
    smart = SMART(torch.compile(Model(), backend=BACKEND), CONFIG)
    for tokens in range(4, 10):
        smart(torch.randint(11, (6, tokens)))
    smart(torch.randint(11, (4, 9)))  # the last batch of an epoch
    smart(torch.randint(11, (5, 9)))


def test_a_whole_graph_is_refused():
    smart = SMART(torch.compile(Model(), backend=BACKEND, fullgraph=True), CONFIG)
    with pytest.raises(RuntimeError, match=r"fullgraph=True cannot work: .* enters at the site 'embedding'"):
        smart(torch.randint(11, (6, 5)))


def test_a_model_that_was_compiled_unseen_is_refused():
    model = Model()
    ids = torch.randint(11, (6, 5))
    torch.compile(model, backend=BACKEND)(ids)
    smart = SMART(model, CONFIG)
    model.compile(backend=BACKEND)
    with pytest.raises(ValueError, match=r"was not run.*torch\.compiler\.reset\(\)"):
        smart(ids)


def test_a_compiled_wrapper_of_several_processes_is_refused():
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # as far as it goes without processes
    with pytest.raises(ValueError, match=r"Compile inside: DistributedDataParallel\(torch\.compile\(model\)\)"):
        SMART(torch.compile(distributed), CONFIG)
