"""What a model is given: masks, and which positions count."""

import pytest
import torch
import transformers
from architectures import N, classifier, text
from paper_settings import papers
from small_torch import R_S, Model
from torch import nn

from smartreg_torch import SMART
from smartreg_torch.divergences import symmetric_kl


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids))


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
