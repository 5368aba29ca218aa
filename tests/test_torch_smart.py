"""SMART's own behaviour: what it accepts, what it refuses, and what it leaves behind."""

import copy
import io
import itertools
import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from architectures import LSTM, N, Siamese, classifier, text, two_texts
from paper_settings import papers
from torch import nn
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART, SMARTConfig, SMARTWarning
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.proximal import bregman_divergence
from smartreg_torch.step import Noise


class Named(NamedTuple):
    hidden: torch.Tensor
    logits: torch.Tensor


class Model(nn.Module):
    """Embedding, dropout, BatchNorm and a head; `convert` turns the logits into what the forward returns."""

    def __init__(self, convert=lambda z: z, outputs=3):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, outputs)
        self.convert = convert

    def forward(self, ids):
        return self.convert(self.head(self.norm(self.dropout(self.embedding(ids)).tanh().mean(1))))


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


R_S = papers(mu=0)
BOTH = papers(total_steps=20)


def train(model, smart, batches, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    penalties = []
    for ids, y in batches:
        output, penalty = smart(ids)
        (nn.functional.cross_entropy(output, y) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
        penalties.append(penalty.item())
    return penalties


def make_batches(count):
    return [(torch.randint(11, (6, 5)), torch.randint(3, (6,))) for _ in range(count)]


# what it computes


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


def test_all_random_streams_are_replayed(ids):
    class Random(Model):
        def forward(self, ids):
            return super().forward(ids) * (1 + random.random()) * (1 + np.random.rand())

    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    model = Random()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model(ids)
    after = random.getstate(), np.random.get_state()[2]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    _, penalty = SMART(model, config, noise=torch.zeros_like)(ids)
    assert penalty.item() == 0
    assert (random.getstate(), np.random.get_state()[2]) == after


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


def test_the_ascent_builds_no_graph_for_the_weights(ids):
    model = Model()
    seen, smart = io.StringIO(), SMART(model, R_S.replace(ascent_steps=2))
    smart(ids)
    model.register_forward_hook(
        lambda *_: seen.write("weights " if model.head.weight.requires_grad else "frozen ") and None
    )
    smart(ids)
    assert seen.getvalue() == "weights frozen frozen weights "


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


def test_the_noise_is_standard_normal():
    drawn = Noise(0)(torch.zeros(10_000))
    assert (drawn.mean().item(), drawn.std().item()) == pytest.approx((0, 1), abs=0.05)
    assert drawn.abs().max() > 3


# what the model may return, and what SMART makes of it


@pytest.mark.parametrize(
    ("convert", "outputs"),
    [
        (lambda z: z, None),
        (lambda z: {"logits": z, "hidden": z[:, :1]}, None),
        (lambda z: {"score": z}, None),
        (lambda z: {"score": z, "hidden": z[:, :2]}, "score"),
        (lambda z: (z.mean(), z), None),
        (lambda z: Named(z[:, :1], z), "logits"),
        (lambda z: Named(z[:, :1], z), None),
        (lambda z: Named(z[:, :1], z), 1),
        (lambda z: (z[:, :2], z), 1),
        (lambda z: [z[:, :2], z], [1]),
        (lambda z: {"deep": [z, 1]}, lambda output: output["deep"][0]),
        (lambda z: transformers.modeling_outputs.SequenceClassifierOutput(logits=z, hidden_states=(z,)), None),
    ],
)
def test_every_kind_of_output_gives_the_same_penalty(ids, convert, outputs):
    torch.manual_seed(1)
    plain = SMART(Model(), R_S)(ids)[1].item()
    torch.manual_seed(1)
    assert SMART(Model(convert), R_S, outputs=outputs)(ids)[1].item() == plain > 0


def test_several_heads_add_up(ids):
    torch.manual_seed(1)
    heads = SMART(Model(lambda z: {"start_logits": z, "end_logits": z}), R_S)(ids)[1].item()
    torch.manual_seed(1)
    assert heads == pytest.approx(2 * SMART(Model(), R_S)(ids)[1].item(), rel=1e-5)
    model = Model(lambda z: (z, z[:, :1]))
    smart = SMART(model, BOTH, outputs=[0, 1], divergence=["symmetric_kl", "squared_error"])
    smart(ids)
    assert smart.metrics["R_s"] > 0


@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", 1), ("regression", 3), ("multi_label_classification", 3), (None, 1)]
)
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_hugging_faces_problem_type_chooses_the_divergence(problem, labels, start):
    model = classifier("Bert")()
    settings = model.config.to_dict() | {"num_labels": labels, "problem_type": problem}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings)).train()
    smart = SMART(model, papers(total_steps=9, start=start))
    smart(**text(), labels=torch.rand(N, labels) if labels > 1 else torch.rand(N))
    assert smart.metrics["R_s"] > 0
    expected = "bernoulli_symmetric_kl" if problem == "multi_label_classification" else "squared_error"
    assert smart.describe()["l_s"].value == expected


def test_regression_on_plain_tensors(ids):
    model = Model(lambda z: z.squeeze(-1), outputs=1)
    with pytest.raises(ValueError, match=r"output of shape \(6,\) has one value an example.*squared_error"):
        SMART(model, R_S)(ids)
    smart = SMART(model, R_S, divergence="squared_error")
    _, penalty = smart(ids)
    assert penalty.item() > 0


def test_outputs_with_a_position_axis_leave_padding_out():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    model = transformers.BertForTokenClassification(config).train()
    smart = SMART(model, papers(lambda_s=0, total_steps=9))
    for average in smart.teacher.values():
        average.add_(0.1 * torch.randn_like(average))
    inputs = text()
    torch.manual_seed(1)
    output, penalty = smart(**inputs)
    torch.manual_seed(1)
    with torch.no_grad(), smart.swap_teacher():
        taught = model(**inputs).logits
    expected = symmetric_kl(output.logits, taught, inputs["attention_mask"]).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() != pytest.approx(symmetric_kl(output.logits, taught).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("convert", "settings", "error", "message"),
    [
        (lambda z: {"a": z, "b": z}, {}, ValueError, r"cannot tell which of the model's outputs \['a', 'b'\] \(dict\)"),
        (lambda z: {"a": z}, {"outputs": "logits"}, ValueError, r"output has no 'logits'; it has \['a'\]"),
        (lambda z: z, {"outputs": "logits"}, ValueError, r"returns one tensor; outputs='logits' chooses nothing"),
        (lambda z: z.argmax(-1), {}, TypeError, r"floating-point tensors \(n, ..., C\), got torch.int64"),
        (lambda z: {"loss": z.mean()}, {"outputs": "loss"}, TypeError, r"one number, most likely its loss.*outputs=1"),
        (lambda z: z[:4], {}, ValueError, r"first axis must be the batch: the site gave 6 rows and the outputs have 4"),
        (lambda z: z, {"divergence": "kl"}, ValueError, r"divergence must be one of symmetric_kl, .* got 'kl'"),
        (
            lambda z: z,
            {"divergence": ["squared_error"] * 2},
            ValueError,
            r"divergence= names 2, but there are 1 outputs",
        ),
        (lambda z: z.detach() + 0 * z.sum().detach(), {}, ValueError, r"outputs do not depend on x"),
        (lambda z: z, {"noise": lambda like: like[:1]}, ValueError, r"noise must give a tensor of shape \(6, 5, 8\)"),
        (lambda z: z, {"mask": "padding"}, ValueError, r"mask='padding', but the model was called without"),
        (lambda z: z, {"mask": lambda ids: ids[:, :2]}, ValueError, r"leading axes of x, \(6, 5\), got \(6, 2\)"),
        (lambda z: z, {"mask": lambda ids: [ids, ids]}, ValueError, r"gave 2 masks, but the site ran 1 times"),
    ],
)
def test_bad_outputs_are_named(ids, convert, settings, error, message):
    model = Model(convert)
    with pytest.raises(error, match=message):
        SMART(model, R_S, **settings)(ids)
    assert_untouched(model)


# masks


def test_mask_may_be_a_function_or_a_name_or_padding_idx(ids):
    model = Model()
    seen = []

    def delta_with(model, inputs, **settings):
        with SMART(model, R_S, on_step=seen.append, **settings) as smart:
            smart(**inputs)
        return seen[-1].delta[0]

    by_function = delta_with(model, {"ids": ids}, mask=lambda ids: ids != 3)
    assert torch.equal((by_function == 0).all(-1), ids == 3)
    model.embedding.padding_idx = 3
    assert torch.equal((delta_with(model, {"ids": ids}) == 0).all(-1), ids == 3)
    inputs = text()
    bert = classifier("Bert")().train()
    named = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    assert torch.any(delta_with(bert, named)[inputs["attention_mask"] == 0] != 0)  # attention_mask has the last word


def test_arguments_may_be_positional():
    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(31, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embedding(input_ids).mean(1))

    seen = []
    smart = SMART(Positional(), R_S, on_step=seen.append)
    inputs = text()
    smart(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal((seen[0].delta[0] == 0).all(-1), inputs["attention_mask"] == 0)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("mask", [lambda ids: ids != 0, lambda ids: [ids != 0]])
def test_the_proximal_term_has_the_same_mask_with_and_without_r_s(mask):
    ids = text()["input_ids"]
    found = []
    for lambda_s in (0, 1):
        torch.manual_seed(1)
        smart = SMART(Tagger(), papers(lambda_s=lambda_s, total_steps=9), mask=mask)
        for average in smart.teacher.values():
            average.mul_(1.5)
        smart(ids)
        found.append(smart.metrics["D_Breg"])
    assert found[0] == found[1] > 0


def test_a_mask_function_may_give_none(ids):
    smart = SMART(Model(), R_S, mask=lambda ids: None)
    smart(ids)
    assert smart.metrics["R_s"] > 0


@pytest.mark.parametrize("length", [7, 5])
def test_a_decoder_has_positions_of_its_own(length):
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    labels = torch.randint(2, 31, (N, length))
    labels[:, 2:] = -100
    smart = SMART(model, papers(lambda_s=1, total_steps=9))
    for average in smart.teacher.values():
        average.mul_(1.1)
    inputs = text()
    torch.manual_seed(1)
    output, _ = smart(**inputs, labels=labels)
    torch.manual_seed(1)
    with torch.no_grad(), smart.swap_teacher():
        taught = model(**inputs, labels=labels).logits
    expected = symmetric_kl(output.logits, taught, labels != -100).mean().item()
    assert smart.metrics["D_Breg"] == pytest.approx(expected, rel=1e-3)


def test_an_attention_mask_of_another_shape_asks_for_a_mask():
    class Prefixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(31, 4), nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            return self.head(self.embedding(torch.cat([input_ids, input_ids], 1)).mean(1))

    with pytest.raises(ValueError, match=r"attention_mask has the shape \(6, 7\), but the site gives \(6, 14, 4\)"):
        SMART(Prefixed(), R_S)(**text())


# the site


def test_the_site_may_be_named(ids):
    for site in ("embedding", "dropout", "norm"):
        smart = SMART(Model(), R_S, site=site)
        smart(ids)
        assert smart.metrics["R_s"] > 0
    images = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for site in (None, "input", "input.input"):
        smart = SMART(images, R_S, site=site)
        smart(torch.randn(4, 3, 4))
        smart(input=torch.randn(4, 3, 4))
        assert smart.metrics["R_s"] > 0
        smart.remove()


class Odd(nn.Module):
    """A site that is not what it should be."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.passed = kind, itertools.count()
        self.embedding, self.unused, self.head = nn.Embedding(11, 4), nn.Embedding(11, 4), nn.Linear(4, 3)
        self.lookup = nn.Identity()

    def forward(self, ids):
        later = next(self.passed) > 0
        if self.kind == "shape" and later:
            ids = ids[:, :2]
        x = self.embedding(ids)
        if self.kind == "more" and later:
            x = x + self.embedding(ids)
        if self.kind == "fewer":
            x = x + x if later else self.embedding(ids)
        self.lookup((ids, x) if self.kind == "tuple" else ids)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    ("kind", "site", "error", "message"),
    [
        ("", "embeddings", ValueError, r"no submodule 'embeddings'.* are \['embedding', 'unused'\]"),
        ("", None, ValueError, r"several embeddings, \['embedding', 'unused'\]: say which"),
        ("", "unused", ValueError, r"the site 'unused' was not run by the model's forward"),
        ("more", "embedding", ValueError, r"'embedding' ran 1 times in the clean pass and 2 times or more in a later"),
        ("fewer", "embedding", ValueError, r"'embedding' ran 2 times in the clean pass and 1 times in a later"),
        ("shape", "embedding", ValueError, r"shape \(6, 2, 4\) where the clean pass gave \(6, 5, 4\)"),
        ("", "lookup", TypeError, r"'lookup' gave torch.int64, which cannot be perturbed"),
        ("tuple", "lookup", TypeError, r"'lookup' must give one tensor, got tuple"),
        ("", "input", TypeError, r"'input' gave torch.int64, which cannot be perturbed"),
        ("", "input.x", ValueError, r"called without the argument 'x'"),
    ],
)
def test_bad_sites_are_named(ids, kind, site, error, message):
    model = Odd(kind)
    with pytest.raises(error, match=message):
        SMART(model, R_S, site=site)(ids)
    assert_untouched(model)


def test_the_site_inside_a_siamese_model_is_run_twice():
    model = Siamese().train()
    smart = SMART(model, BOTH)
    smart(**two_texts())
    assert smart.metrics["R_s"] > 0


def test_empty_batches_and_inference_tensors_are_named(ids):
    with pytest.raises(ValueError, match=r"must give \(n, ..., d\) with n > 0, got \(0, 5, 8\)"):
        SMART(Model(), R_S)(ids[:0])
    with torch.inference_mode():
        images = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"the batch is empty: the outputs have the shape \(0, 3\)"):
        SMART(Model(), papers(lambda_s=0, total_steps=9))(torch.zeros(0, 5, dtype=torch.long))
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match=r"gave an inference tensor.*clone"):
        SMART(model, R_S)(images)
    assert_untouched(model)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        SMART(lambda x: x)
    with pytest.raises(TypeError, match="config must be a SMARTConfig, got dict"):
        SMART(Model(), {"mu": 1})
    with pytest.raises(ValueError, match="SMART: mu > 0 and beta changes .* total_steps is needed"):
        SMART(Model())


# checkpointing


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


# failures


def assert_untouched(model):
    """No armed hook, no changed flag, no gradient, and a plain call works."""
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


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


def test_nan_raises_and_names_the_step(ids):
    model = Model(lambda z: z * float("nan"))
    smart = SMART(model, BOTH)
    smart.step = 6
    with pytest.raises(FloatingPointError, match=r"penalty of step 7 is not finite \(R_s = nan.*in the clean pass"):
        smart(ids)
    assert_untouched(model)


class Imputes(nn.Module):
    """Its gradient at x is NaN, and what it makes of a NaN in x is finite."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.nan_to_num(0.0)) + 0 * (x - x.detach()).square().sum(-1, keepdim=True).sqrt().nan_to_num(0.0)


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


def test_forgetting_update_warns(ids):
    model = nn.Sequential(nn.Embedding(11, 2), nn.Flatten(), nn.Linear(10, 2))
    smart = SMART(model, papers(lambda_s=0, total_steps=9))
    for _ in range(256):  # batches that are accumulated: the weights stay
        smart(ids)
    smart.update()
    for _ in range(199):
        smart(ids)
        with torch.no_grad():
            model[2].bias.add_(0.1)
    with pytest.warns(SMARTWarning, match=r"200 batches without smart.update\(\)"):
        smart(ids)


# hooks and state


def test_training_in_eval_mode_warns_once(ids):
    model = Model().eval()
    smart = SMART(model, BOTH)
    smart.update()  # no call: nothing to say
    with torch.no_grad():
        smart(ids)
    smart.update()
    smart(ids)
    with pytest.warns(SMARTWarning, match="trained in eval mode"):
        smart.update()
    smart(ids)
    smart.update()
    model.train()
    fresh = SMART(model, BOTH)
    fresh(ids)
    model.eval()
    fresh(ids)  # a look on the way
    fresh.update()


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


def test_terms_that_are_off_cost_nothing(ids):
    model = Model()
    off = SMART(model, papers(lambda_s=0, mu=0))
    assert not model.embedding._forward_hooks
    assert not off.teacher
    assert not SMART(model, R_S).teacher


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


def test_two_smarts_on_one_model_do_not_disturb_each_other(ids):
    model = Model()
    a, b = SMART(model, R_S), SMART(model, R_S)
    torch.manual_seed(1)
    first = a(ids)[1]
    torch.manual_seed(1)
    assert torch.equal(b(ids)[1], first)
