"""What a model may return, and which l_s compares it."""

from typing import NamedTuple

import pytest
import torch
import transformers
from architectures import N, classifier, text
from paper_settings import papers
from small_torch import BOTH, R_S, Model, assert_untouched

from smartreg_torch import SMART
from smartreg_torch.divergences import symmetric_kl


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


class Named(NamedTuple):
    hidden: torch.Tensor
    logits: torch.Tensor


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
        (lambda z: {"loss": z.mean()}, {}, ValueError, r"floating-point output besides the loss, only \['loss'\]"),
        (lambda z: {"a": z}, {"outputs": "logits"}, ValueError, r"output has no 'logits'; it has \['a'\]"),
        (lambda z: z, {"outputs": "logits"}, ValueError, r"returns one tensor; outputs='logits' chooses nothing"),
        (lambda z: z.argmax(-1), {}, TypeError, r"floating-point tensors \(n, ..., C\), got torch.int64"),
        (lambda z: {"loss": z.mean()}, {"outputs": "loss"}, TypeError, r"one number, most likely its loss.*outputs=1"),
        (
            lambda z: z[:4],
            {},
            ValueError,
            r"first axis must be the batch: the site gave 6 rows and the outputs have 4",
        ),
        (lambda z: z, {"divergence": "kl"}, ValueError, r"divergence must be one of 'symmetric_kl', .* got 'kl'"),
        (
            lambda z: z,
            {"divergence": ["squared_error"] * 2},
            ValueError,
            r"divergence= has 2 entries, but the model has 1 outputs",
        ),
        (lambda z: z.detach() + 0 * z.sum().detach(), {}, ValueError, r"outputs do not depend on x"),
        (lambda z: z, {"noise": lambda like: like[:1]}, ValueError, r"noise must give a tensor of shape \(6, 5, 8\)"),
        (lambda z: z, {"mask": "padding"}, ValueError, r"mask='padding', but the model was called without"),
        (lambda z: z, {"mask": lambda ids: ids[:, :2]}, ValueError, r"mask= gave the shape \(6, 2\), but the site"),
        (lambda z: z, {"mask": lambda ids: [ids, ids]}, ValueError, r"gave 2 masks, but the site ran 1 times"),
    ],
)
def test_bad_outputs_are_named(ids, convert, settings, error, message):
    model = Model(convert)
    with pytest.raises(error, match=message):
        SMART(model, R_S, **settings)(ids)
    assert_untouched(model)
