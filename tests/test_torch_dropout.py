"""SMARTConfig(dropout=): which masks each pass has, and what becomes of the random streams."""

import copy
import random

import numpy as np
import pytest
import torch
from notes import Notes
from paper_settings import papers
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from smartreg import SMARTConfig
from smartreg_torch import SMART

STREAMS = ["torch", "NumPy", "Python"]
START = {
    "gaussian": papers(ascent_steps=1, total_steps=9, dropout="independent"),
    "margin": papers(start="margin", ascent_steps=1, total_steps=9, dropout="independent"),
}


class Masked(nn.Module):
    """Dropout that writes its multipliers down, drawn from one of the global streams."""

    def __init__(self, stream="torch", notes=None):
        super().__init__()
        self.stream, self.notes = stream, notes

    def forward(self, x):
        if self.stream == "torch":
            uniform = torch.rand_like(x)
        elif self.stream == "NumPy":
            uniform = torch.from_numpy(np.random.rand(*x.shape)).to(x)
        else:
            uniform = torch.tensor([random.random() for _ in range(x.numel())]).view(x.shape).to(x)
        mask = (uniform < 0.75).to(x) / 0.75
        if self.notes is not None:
            self.notes.add(mask)
        return x * mask


def network(dropout=None, below=None):
    """Embedding, site, dropout, a layer, BatchNorm and a head; dropout below the site, too, if that is given."""
    torch.manual_seed(3)
    embedding = nn.Sequential(nn.Embedding(11, 8), below or nn.Identity())
    upper = [nn.Flatten(), dropout or Masked(), nn.Linear(40, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(embedding, *upper).double()


def make_batch(seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(11, (6, 5), generator=drawn), torch.randint(3, (6,), generator=drawn)


def seed_all(seed):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


def one_step(model, config, seed=5, own_seed=7, **options):
    """The penalty and the gradients of a first step, with these seeds of the global streams and of SMART's own."""
    seed_all(own_seed)
    smart = SMART(model, config, site="0", **options)
    seed_all(seed)
    ids, y = make_batch()
    output, penalty = smart(ids)
    (cross_entropy(output, y) + penalty).backward()
    return penalty.detach(), [parameter.grad for parameter in model.parameters()], smart


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("stream", STREAMS)
def test_passes_at_delta_draw_masks_of_their_own(stream, start):
    notes = Notes()
    smart = SMART(network(Masked(stream, notes)), START[start], site="0")
    ids, _ = make_batch()
    smart(ids)  # the first step has more passes: it checks that the model repeats itself
    notes.taken()
    for _ in range(2):
        smart(ids)
        clean, ascent, taught, last = notes.taken()
        assert torch.equal(taught, clean)
        assert not torch.equal(ascent, clean)
        assert not torch.equal(last, clean)
        assert not torch.equal(last, ascent)


@pytest.mark.parametrize("stream", STREAMS)
def test_all_passes_share_their_masks_by_default(stream):
    assert SMARTConfig().dropout == "shared"
    notes = Notes()
    smart = SMART(network(Masked(stream, notes)), START["gaussian"].replace(dropout="shared"), site="0")
    ids, _ = make_batch()
    smart(ids)
    clean, *others = notes.taken()
    assert len(others) >= 3
    assert all(torch.equal(mask, clean) for mask in others)


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("stream", STREAMS)
def test_the_global_streams_are_as_plain_training_leaves_them(stream, start):
    ids, y = make_batch()

    def after(config):
        model = network(Masked(stream))
        seed_all(1)
        if config is None:
            cross_entropy(model(ids), y).backward()
        else:
            one_step(model, config, seed=1)
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2]

    plain = after(None)
    assert after(START[start]) == plain
    assert after(START[start].replace(dropout="shared")) == plain


def test_shared_masks_draw_nothing_from_smarts_stream():
    states = {}
    for dropout in ("shared", "independent"):
        config = papers(start="margin", ascent_steps=0, mu=0, dropout=dropout)
        _, _, smart = one_step(network(), config)
        states[dropout] = smart.state_dict()["generator"]
    assert states["shared"] is None
    assert states["independent"] is not None


def test_the_masks_follow_the_seed_of_smarts_stream():
    found = [one_step(network(), START["margin"], own_seed=own_seed)[0] for own_seed in (7, 7, 8)]
    assert found[0] == found[1] != found[2]


def test_a_noise_function_and_masks_of_their_own():
    """noise= gives nu alone: the masks still come from SMART's own stream."""
    draws = [one_step(network(), START["gaussian"], noise=torch.zeros_like)[0] for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0] > 0  # x~ begins at x itself


@pytest.mark.parametrize("start", START)
def test_a_run_goes_on_bit_for_bit(start):
    def steps(model, smart, optimizer, seeds):
        for seed in seeds:
            ids, y = make_batch(seed)
            output, penalty = smart(ids)
            (cross_entropy(output, y) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()

    def made():
        model = network(nn.Dropout(0.25))
        return model, SMART(model, START[start], site="0"), torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, parts = made(), made()
    seed_all(2)
    steps(*whole, range(6))
    seed_all(2)
    steps(*parts, range(3))
    saved, streams = [copy.deepcopy(part.state_dict()) for part in parts], torch.get_rng_state()
    resumed = made()
    torch.set_rng_state(streams)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    steps(*resumed, range(3, 6))
    assert all(map(torch.equal, whole[0].state_dict().values(), resumed[0].state_dict().values()))
    assert all(map(torch.equal, whole[1].teacher.values(), resumed[1].teacher.values()))


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("start", START)
def test_lean_has_the_masks_that_it_would_have_had(start, below):
    """The layers below x run again with the clean pass's masks, and those above it with the pass's own."""
    penalties, gradients = [], []
    for lean in (False, True):
        penalty, grads, _ = one_step(network(below=Masked() if below else None), START[start], lean=lean)
        penalties.append(penalty)
        gradients.append(grads)
    torch.testing.assert_close(*penalties, rtol=1e-13, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


class Checkpointed(nn.Module):
    """A layer with dropout that is run again in the backward pass."""

    def __init__(self, layer, use_it):
        super().__init__()
        self.layer, self.use_it = layer, use_it

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False) if self.use_it else self.layer(x)


@pytest.mark.parametrize("start", START)
def test_checkpointed_layers_run_again_with_the_same_masks(start):
    found = []
    for use_it in (False, True):
        model = network(Checkpointed(nn.Dropout(0.25), use_it))
        penalty, gradients, _ = one_step(model, START[start])
        found.append([penalty, *gradients])
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("start", START)
def test_compiled(start):
    torch.compiler.reset()
    plain, plain_gradients, _ = one_step(network(nn.Dropout(0.25)), START[start])
    model = network(nn.Dropout(0.25))
    model.compile(backend="eager")
    penalty, gradients, _ = one_step(model, START[start])
    torch.compiler.reset()
    torch.testing.assert_close(penalty, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-10, atol=1e-15)


def test_passes_in_float32_under_autocast():
    notes = Notes()
    model = network(Masked(notes=notes)).float()
    smart = SMART(model, START["gaussian"], site="0")
    ids, _ = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        smart(ids)
        notes.taken()
        smart(ids)
    own, clean, ascent, taught, last = notes.taken()
    assert torch.equal(own, clean)
    assert torch.equal(taught, clean)
    assert not torch.equal(ascent, clean)
    assert not torch.equal(last, clean)
    assert not torch.equal(last, ascent)


def test_buffers_and_counters_are_replayed_all_the_same():
    """BatchNorm's statistics move once a step, and every pass finds them as before it."""
    model, plain = network(), network()
    one_step(model, START["gaussian"])
    seed_all(5)
    plain(make_batch()[0])
    for name, value in plain.named_buffers():
        assert torch.equal(value, dict(model.named_buffers())[name]), name


def test_measure_has_no_dropout():
    measured = []
    for dropout in ("shared", "independent"):
        model = network(nn.Dropout(0.25))
        smart = SMART(model, START["gaussian"].replace(dropout=dropout), site="0")
        measured.append(smart.measure(make_batch()[0]))
    assert measured[0] == measured[1]
    assert measured[0]["R_s"] > 0


@pytest.mark.parametrize("ascent_steps", [0, 1])
def test_no_noise_is_no_mistake_with_masks_of_their_own(ascent_steps):
    """Warnings are errors: neither sigma = 0 nor a delta of 0 is warned of."""
    config = SMARTConfig(start="gaussian", sigma=0, ascent_steps=ascent_steps, dropout="independent", mu=0, epsilon=0.1)
    penalty, _, smart = one_step(network(), config)
    assert penalty > 0
    assert (smart.metrics["max_delta"] > 0) == (ascent_steps > 0)
    smart.update()
