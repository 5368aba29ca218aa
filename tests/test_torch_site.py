"""Where x is: names, and what cannot be a site."""

import itertools

import pytest
import torch
from architectures import Siamese, two_texts
from paper_settings import papers
from small_torch import BOTH, R_S, Model, assert_untouched
from torch import nn

from smartreg_torch import SMART


@pytest.fixture
def ids():
    return torch.randint(11, (6, 5))


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
        ("", None, ValueError, r"several embeddings, \['embedding', 'unused'\]. Say which"),
        ("", "unused", ValueError, r"the site 'unused' was not run by the model's forward"),
        ("more", "embedding", ValueError, r"'embedding' ran 1 times in the clean pass and 2 times or more in a later"),
        ("fewer", "embedding", ValueError, r"'embedding' ran 2 times in the clean pass and 1 times in a later"),
        ("shape", "embedding", ValueError, r"shape \(6, 2, 4\), but the clean pass gave \(6, 5, 4\)"),
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
    with pytest.raises(ValueError, match=r"the batch is empty: the outputs have shape \(0, 3\)"):
        SMART(Model(), papers(lambda_s=0, total_steps=9))(torch.zeros(0, 5, dtype=torch.long))
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match=r"gave an inference tensor.*clone"):
        SMART(model, R_S)(images)
    assert_untouched(model)
