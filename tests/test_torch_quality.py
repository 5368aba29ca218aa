"""`smartreg_torch.report`: its numbers by hand and by the model's own loss, and that it changes nothing."""

import copy
import random

import numpy as np
import pytest
import torch
from architectures import T5, classes, classifier, labelled, language, tags, tokens, translated
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from smartreg.quality import Quality
from smartreg_torch import SMART, SMARTConfig, report

BALL = SMARTConfig(scale="absolute", epsilon=0.1)
RADII = (0.5, 1, 4)


def kl(a, b):
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1)


def test_classes_by_hand():
    """A linear model: delta = radius sign(w_runner-up - w_top), and batches of 4, 4 and 3 examples."""
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.randint(2, (11,))
    found = report(model, DataLoader(TensorDataset(x, y), 4), BALL, radii=RADII)
    z = model(x).detach()
    top = z.argmax(-1)
    away = (model.weight[1 - top] - model.weight[top]).detach().sign()
    for radius, R_s, flips in zip(RADII, found.R_s, found.scores["the model's output"].changes, strict=True):
        moved = model(x + 0.1 * radius * away).detach()
        assert R_s == pytest.approx(kl(moved, z).mean().item(), rel=1e-9)
        assert flips == (moved.argmax(-1) != top).double().mean()
    assert flips > 0
    assert found.numbers["accuracy"] == (top == y).double().mean()
    assert found.numbers["NLL"] == pytest.approx(nn.functional.cross_entropy(z, y).item(), rel=1e-12)
    assert found.examples == 11


def test_the_calibration_error_is_that_of_torchmetrics():
    calibration = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    model = nn.Linear(4, 5)
    x, y = 3 * torch.randn(300, 4), torch.randint(5, (300,))
    found = report(model, [(x, y)], BALL, radii=[1])
    with torch.no_grad():
        want = calibration(model(x).double().softmax(-1), y, num_classes=5, n_bins=15, norm="l1")
    assert found.numbers["ECE"] == pytest.approx(want.item(), rel=1e-5)


def test_regression_by_hand():
    """|f(x + delta) - f(x)| <= radius ||w||_1, whichever way the step goes."""
    model = nn.Linear(4, 1).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    found = report(model, [(x, y)], BALL, radii=RADII, divergence="squared_error")
    length = model.weight.detach().abs().sum().item()
    for radius, R_s, change in zip(RADII, found.R_s, found.scores["the model's output"].changes, strict=True):
        assert change == pytest.approx(0.1 * radius * length, rel=1e-9)
        assert R_s == pytest.approx((0.1 * radius * length) ** 2, rel=1e-9)
    assert found.numbers["MSE"] == pytest.approx((model(x) - y).square().mean().item(), rel=1e-12)
    assert [*found.numbers][::3] == ["MSE", "R_s at 0.4", "mean change at 0.4"]


def test_several_labels_by_hand():
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(2, (6, 3))
    found = report(model, [(x, y)], BALL, radii=[1], divergence="bernoulli_symmetric_kl")
    z = model(x).detach()
    assert found.numbers["accuracy"] == pytest.approx(((z > 0) == (y > 0)).double().mean().item())
    want = nn.functional.binary_cross_entropy_with_logits(z, y.double())
    assert found.numbers["NLL"] == pytest.approx(want.item(), rel=1e-12)
    assert found.scores["the model's output"].predictions == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_R_s_is_what_measure_gives_in_the_same_ball(dtype):
    model = classifier("Bert")().to(dtype)
    batches = [classes(), {name: value[:4] for name, value in classes().items()}]
    found = report(model, batches, SMARTConfig(norm="2", epsilon=0.1), radii=[1, 2])
    for epsilon, R_s in zip((0.1, 0.2), found.R_s, strict=True):
        ball = SMARTConfig(norm="2", epsilon=epsilon, eta=100 * epsilon, ascent_steps=3, mu=0)
        with SMART(model, ball) as smart:
            first, second = (smart.measure(**batch)["R_s"] for batch in batches)
        assert R_s == pytest.approx((6 * first + 4 * second) / 10, rel=1e-6)
    assert R_s > 0


ANSWERS = torch.tensor([[0, 1, 2, 0, 50, 1], [2, 1, 2, 1, 2, 50]])  # 50: where the text is cut off
question = labelled(lambda given: {"start_positions": ANSWERS[0], "end_positions": ANSWERS[1]})
MODELS = {
    "classes": (classifier("Bert"), classes, 1),
    "tags": (language("Bert", "ForTokenClassification"), tags, 1),
    "the next token": (language("GPT2", "LMHeadModel", n_embd=16, n_layer=1, n_head=2), tokens, 1),
    "masked tokens": (language("Bert", "ForMaskedLM"), tokens, 1),
    "a translation": (language("T5", "ForConditionalGeneration", **T5), labelled(translated), 1),
    "an answer": (language("Bert", "ForQuestionAnswering", num_labels=2), question, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_likelihood_of_the_labels_is_the_models_own_loss(name):
    """The model gets the labels, too; they are counted where its loss counts them."""
    make, inputs, heads = MODELS[name]
    model, batch = make().eval(), inputs()
    with torch.no_grad():
        want = model(**batch).loss.item()
    settings = dict(vars(model.config))
    found = report(model, [batch], SMARTConfig(epsilon=0.3), radii=[1])
    nll = [scores.nll for scores in found.scores.values()]
    assert len(nll) == heads
    assert np.mean(nll) == pytest.approx(want, rel=1e-5)
    assert found.R_s[0] > 0
    assert vars(model.config) == settings


class Everything(nn.Module):
    """Dropout, BatchNorm, a counter; random numbers of three streams; it may raise in a call."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(9, 4), nn.BatchNorm1d(5), nn.Linear(4, 2)
        self.dropout, self.calls, self.raises_at = nn.Dropout(0.5), 0, None

    def forward(self, ids):
        self.calls += 1
        x = self.dropout(self.norm(self.embedding(ids)))
        if ids[0, 0] == self.raises_at:
            raise ArithmeticError
        return self.head(x.mean(1)) * (1 + 1e-3 * random.random() + 1e-3 * np.random.random())


def state_of(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    values |= {f"grad {name}": weight.grad.clone() for name, weight in model.named_parameters()}
    values["stream"] = torch.get_rng_state()
    modules = [(m.training, m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    plain = [model.calls, modules, [weight.requires_grad for weight in model.parameters()]]
    plain += [random.getstate(), str(np.random.get_state())]
    return values, plain


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_changes(raises, training):
    model = Everything()
    model.dropout.eval()  # a mode of its own
    ids, y = torch.randint(8, (12, 5)), torch.randint(2, (12,))
    ids[11, 0] = 8
    loader = DataLoader(TensorDataset(ids, y), 4, shuffle=True)
    smart = SMART(model, SMARTConfig(mu=0)) if training else None
    output = model(ids) if smart is None else smart(ids)[0]
    output.square().sum().backward()
    before, plain = state_of(model)
    if raises:
        model.raises_at = 8
        loader = [(ids[:6], y[:6]), (ids[6:].flip(0), y[6:])]
        with pytest.raises(ArithmeticError):
            report(model, loader, SMARTConfig())
    else:
        first, second = report(model, loader, SMARTConfig()), report(model, loader, SMARTConfig())
        assert first == second
    after, plain_after = state_of(model)
    assert plain_after == plain
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    if smart is not None:
        model.raises_at = None
        smart(ids)[0].sum().backward()


def test_before_training_and_after_are_compared_on_the_same_batches_of_a_shuffling_loader():
    model = nn.Linear(4, 3)
    loader = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), 8, shuffle=True)
    before = report(model, loader, BALL, batches=2)
    torch.manual_seed(5)
    after = report(model, loader, BALL, batches=2)
    assert before == after
    assert before.examples == 16
    assert "+0" in before.compare(after)


def test_no_more_batches_are_read_than_asked():
    model, read = nn.Linear(4, 3), []

    def endless():
        while True:
            read.append(1)
            yield torch.randn(2, 4), torch.randint(3, (2,))

    assert report(model, endless(), BALL, batches=3).examples == 6
    assert len(read) == 3


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x, scale=1.0):
        h = torch.tanh(self.body(scale * x))
        return {"kind": self.kind(h), "size": self.size(h)}


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_outputs_have_labels_each(as_dict):
    model = TwoHeads()
    x, kind, size = torch.randn(6, 4), torch.randint(3, (6,)), torch.randn(6)
    labels = {"size": size, "kind": kind} if as_dict else [kind, size]
    said = {"outputs": ["kind", "size"], "divergence": ["symmetric_kl", "squared_error"], "radii": [1]}
    found = report(model, [((x, 2.0), labels)], BALL, **said)
    with torch.no_grad():
        z = model(x, 2.0)
    assert found.numbers["kind: accuracy"] == pytest.approx((z["kind"].argmax(-1) == kind).double().mean().item())
    assert found.numbers["size: MSE"] == pytest.approx((z["size"][:, 0] - size).square().mean().item(), rel=1e-5)
    assert found.numbers["size: mean change at 0.1"] > 0
    named = [{"x": x, "scale": 2.0, "a": kind, "b": size}]
    assert report(model, named, BALL, labels=["a", "b"], **said) == found
    with pytest.raises(ValueError, match=r"expected labels of each of the outputs \['kind', 'size'\], got 1"):
        report(model, [((x, 2.0), kind)], BALL, **said)
    with pytest.raises(ValueError, match="the labels have no 'size'"):
        report(model, [((x, 2.0), {"kind": kind})], BALL, **said)
    with pytest.raises(TypeError, match="labels must be tensors, got list"):
        report(model, [((x, 2.0), {"kind": kind, "size": [1, 2]})], BALL, **said)


def test_classes_on_axis_1_and_labels_of_the_same_shape():
    model = nn.Conv1d(2, 3, 1)
    x, y = torch.randn(4, 2, 5), torch.randint(3, (4, 5))
    y[0, 1:] = -100
    found = report(model, [(x, y)], BALL, radii=[1], class_axis=1)
    with torch.no_grad():
        z = model(x)
    assert found.numbers["NLL"] == pytest.approx(nn.functional.cross_entropy(z, y).item(), rel=1e-5)
    soft = torch.randn(4, 3, 5).softmax(1)
    found = report(model, [(x, soft)], BALL, radii=[1], class_axis=1)
    assert found.numbers["NLL"] == pytest.approx(nn.functional.cross_entropy(z, soft).item() / 1, rel=1e-5)


def test_what_is_refused():
    model, x, y = nn.Linear(4, 3), torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    hooks = len(model._forward_hooks)
    for loader, message in (
        ([x], r"a batch has no labels: expected a dict with them, or a tuple \(inputs, labels\), got a Tensor"),
        ([(x,)], r"got a tuple of 1"),
        ([(x, x, y)], r"Of several inputs give \(\(a, b\), labels\)"),
        ([{"input": x}], r"expected 'labels' among its keys, got \['input'\]. Say labels="),
        ([{"input": x, "labels": None}], r"expected 'labels' among its keys"),
        ([], r"there is no batch: the loader is empty"),
        ([(x, y + 1)], r"must be classes from 0 to 2"),
        ([(x[:0], y[:0])], r"with n > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            report(model, loader, BALL)
    with pytest.raises(ValueError, match="expected 'y' among its keys"):
        report(model, [{"input": x, "labels": y}], BALL, labels="y")
    with pytest.raises(TypeError, match=r"report\(\): config must be a SMARTConfig, got float"):
        report(model, [(x, y)], 0.1)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        report(len, [(x, y)], BALL)
    with pytest.raises(ValueError, match=r"are probabilities: they sum to 1"):
        report(nn.Sequential(model, nn.Softmax(-1)), [(x, y)], BALL)
    with pytest.raises(RuntimeError, match=r"report\(\) takes gradients"), torch.inference_mode():
        report(model, [(x, y)], BALL)
    assert len(model._forward_hooks) == hooks


class NoSite(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids):
        return (self.a(ids) + self.b(ids)).mean(1)


def test_a_model_without_a_site_is_asked_for_one():
    ids, y = torch.randint(9, (4, 5)), torch.randint(4, (4,))
    with pytest.raises(ValueError, match="site="):
        report(NoSite(), [(ids, y)])
    assert isinstance(report(NoSite(), [(ids, y)], site="a"), Quality)


def test_the_name_of_the_function_hides_no_module():
    from smartreg_torch.report import Report  # the module, which `smartreg_torch.report` does not name

    assert copy.copy(Report) is Report
