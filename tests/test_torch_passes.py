"""A model's passes: the same dropout, buffers and arguments in each, and nothing of them left behind."""

import copy
import io
import itertools
import random

import numpy as np
import pytest
import torch
from architectures import classifier, text
from paper_settings import papers
from small_torch import BOTH, R_S, Model, assert_untouched
from torch import nn
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


def test_a_model_that_changes_its_embeddings_in_place(ids):
    class InPlace(Model):
        def forward(self, ids):
            x = self.embedding(ids)
            x += 1.0
            x *= 2.0
            return self.head(x.mean(1))

    for start in ("gaussian", "margin"):
        model = InPlace()
        smart = SMART(model, papers(mu=0, start=start, ascent_steps=1))
        _, penalty = smart(ids)
        penalty.backward()
        assert smart.metrics["R_s"] > 0
        rms = model.embedding(ids).square().mean((1, 2)).sqrt().max()
        assert smart.metrics["max_delta"] <= R_S.epsilon * rms * (1 + 1e-6)  # of x as the embedding gave it


def test_a_model_that_changes_what_it_is_given(ids):
    """sentence-transformers writes into its features and returns them; others pop from their batch."""

    class Mutates(Model):
        def forward(self, features):
            features["logits"] = super().forward(features.pop("ids"))
            return features

    model = Mutates()
    smart = SMART(model, BOTH)
    for average in smart.teacher.values():
        average.mul_(2)
    torch.manual_seed(1)
    output, _ = smart({"ids": ids})
    torch.manual_seed(1)
    assert torch.equal(output["logits"], model({"ids": ids})["logits"])
    assert output["logits"].requires_grad


STREAMS = {
    "Python's": random.random,
    "NumPy's": np.random.rand,
    "both": lambda: random.random() * np.random.rand(),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_all_random_streams_are_replayed(ids, stream):
    class Random(Model):
        def forward(self, ids):
            return super().forward(ids) * (1 + STREAMS[stream]())

    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    model = Random()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model(ids)
    after = random.getstate(), np.random.get_state()[2]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    _, penalty = SMART(model, config, noise=torch.zeros_like)(ids)
    assert penalty.item() == 0
    assert (random.getstate(), np.random.get_state()[2]) == after


def test_numpys_stream_is_written_only_for_a_model_that_draws_from_it(ids, monkeypatch):
    """Reading and writing it takes longer than a small layer."""
    written, write = [], np.random.set_state
    monkeypatch.setattr(np.random, "set_state", lambda state: written.append(state) or write(state))
    SMART(Model(), BOTH)(ids)
    assert not written


def test_a_pass_that_breaks_off_leaves_the_random_streams_as_the_clean_pass_did(ids):
    calls = iter([False, False, True])

    class Fails(Model):
        def forward(self, ids):
            if next(calls):
                raise ZeroDivisionError
            return super().forward(ids) * (1 + random.random()) * (1 + np.random.rand())

    def after(call):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        call()
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[2]

    def broken():
        with pytest.raises(ZeroDivisionError):
            SMART(model, BOTH)(ids)

    model = Fails()
    expected = after(lambda: model(ids))
    assert after(broken) == expected


def test_buffers_that_move_in_a_forward_are_replayed_and_kept(ids):
    """Spectral normalisation takes a power iteration a forward."""
    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    model = Model()
    nn.utils.parametrizations.spectral_norm(model.head)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    _, penalty = SMART(model, config, noise=torch.zeros_like)(ids)
    torch.manual_seed(1)
    twin(ids)
    assert penalty.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_batchnorm_statistics_are_the_clean_passs(ids):
    model = Model()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    SMART(model, R_S.replace(epsilon=1, sigma=1))(ids)  # the last pass is the perturbed one
    torch.manual_seed(1)
    twin(ids)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_a_buffer_that_the_model_puts_anew_is_the_clean_passs():
    """Such as the frequencies of rotary embeddings that grow with the longest batch."""

    class Counting(nn.Sequential):
        def forward(self, x):
            self.register_buffer("seen", self.seen + 1)
            return super().forward(x)

    model = Counting(nn.Linear(4, 3))
    model.register_buffer("seen", torch.zeros(()))
    smart = SMART(model, papers(total_steps=9))
    for seen in (1, 2):
        smart(torch.randn(5, 4))
        assert model.seen == seen
        assert list(model.state_dict())[:1] == ["seen"]


def test_a_frozen_batchnorm_stays_frozen(ids):
    model = Model()
    model.norm.eval()
    model.dropout.p = 0.0
    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    _, penalty = SMART(model, config, noise=torch.zeros_like)(ids)
    assert penalty.item() == 0
    assert not model.norm.training


def test_the_ascent_builds_no_graph_for_the_weights(ids):
    model = Model()
    seen, smart = io.StringIO(), SMART(model, R_S.replace(ascent_steps=2))
    smart(ids)
    model.register_forward_hook(
        lambda *_: seen.write("weights " if model.head.weight.requires_grad else "frozen ") and None
    )
    smart(ids)
    assert seen.getvalue() == "weights frozen frozen weights "


class Checkpointed(nn.Module):
    def __init__(self, around, reentrant=False):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.around, self.reentrant = around, reentrant

    def upper(self, x):
        return self.layer(x).tanh()

    def forward(self, ids):
        if self.around == "all":
            h = checkpoint(
                lambda i, _: self.upper(self.embedding(i)),
                ids,
                torch.ones(1, requires_grad=True),
                use_reentrant=self.reentrant,
            )
        elif self.around == "layer":
            h = checkpoint(self.upper, self.embedding(ids), use_reentrant=self.reentrant)
        else:
            h = self.upper(self.embedding(ids))
        return self.head(h.mean(1))


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_checkpointing_above_the_site_changes_nothing(ids, start):
    results = []
    for around in ("none", "layer"):
        torch.manual_seed(1)
        model = Checkpointed(around)
        output, penalty = SMART(model, BOTH.replace(start=start))(ids)
        (output.sum() + penalty).backward()
        results.append([penalty.detach(), *[parameter.grad for parameter in model.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_site_inside_a_checkpointed_region_is_refused(ids, reentrant):
    model = Checkpointed("all", reentrant)
    with pytest.raises(RuntimeError, match="'embedding' runs inside a checkpointed or no_grad region"):
        SMART(model, R_S)(ids)
    assert_untouched(model)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_reentrant_checkpointing_is_refused(ids, start):
    model = Checkpointed("layer", reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant checkpointing cannot work.*use_reentrant=False"):
        SMART(model, R_S.replace(start=start))(ids)
    assert_untouched(model)


def test_hugging_face_gradient_checkpointing():
    model = classifier("Bert")().train()
    model.activation_checkpointing_enable()
    smart = SMART(model, BOTH)
    output, penalty = smart(**text())
    (output.logits.logsumexp(-1).sum() - output.logits[:, 0].sum() + penalty).backward()
    assert smart.metrics["R_s"] > 0


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_model_that_raises_in_any_pass_leaves_nothing_behind(ids, failing):
    passed = itertools.count(1)

    class Fails(Model):
        def forward(self, ids):
            z = super().forward(ids)
            if next(passed) == failing:
                raise ZeroDivisionError("the user's own error")
            return z

    model = Fails()
    smart = SMART(model, BOTH)
    twin = copy.deepcopy(model)
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError, match="the user's own error"):
        smart(ids)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    twin(ids)  # a later pass, which does not fail
    assert torch.equal(after, torch.get_rng_state())
    assert [parameter.data_ptr() for parameter in model.parameters()] == weights
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert_untouched(model)
    assert model.embedding(ids).shape == (6, 5, 8)  # the hook is idle
    smart(ids)  # and the next batch is an ordinary one
    assert smart.metrics["R_s"] > 0


def test_two_smarts_on_one_model_do_not_disturb_each_other(ids):
    model = Model()
    a, b = SMART(model, R_S), SMART(model, R_S)
    torch.manual_seed(1)
    first = a(ids)[1]
    torch.manual_seed(1)
    assert torch.equal(b(ids)[1], first)
