"""Algorithm 1 in PyTorch, through SMART, against the NumPy reference: the same noise, every intermediate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pairwise import FACTORS, named, pairwise
from paper_settings import papers
from small_torch import Dropout
from test_reference import make_batch, make_theta
from torch import nn

from smartreg import SMARTConfig
from smartreg.checking import TRAJECTORIES, compare_steps, load_trajectory
from smartreg.reference import fit_reference
from smartreg_torch import SMART


class Network(nn.Module):
    """The reference network of `smartreg.reference`."""

    def __init__(self, theta, pooled=True, dropout=None):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(theta["E"].copy()), freeze=False)
        self.W1, self.b1, self.W2, self.b2 = (
            nn.Parameter(torch.from_numpy(theta[name].copy())) for name in ("W1", "b1", "W2", "b2")
        )
        self.pooled = pooled
        self.dropout = dropout or nn.Identity()

    def forward(self, ids, attention_mask):
        h = self.dropout((self.embedding(ids) @ self.W1 + self.b1).tanh())
        if self.pooled:
            weight = attention_mask.to(h.dtype) / attention_mask.sum(1, keepdim=True)
            h = (weight.unsqueeze(-1) * h).sum(1)
        return h @ self.W2 + self.b2

    def named(self):
        return {"E": "embedding.weight"} | {name: name for name in ("W1", "b1", "W2", "b2")}


LOSSES = {
    "symmetric_kl": lambda z, y: nn.functional.cross_entropy(z.movedim(-1, 1), y, reduction="none"),
    "bernoulli_symmetric_kl": lambda z, y: nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(
        -1
    ),
    "squared_error": lambda z, y: (z - y).square().sum(-1),
}


def fit_torch(
    theta, batches, config, noise, *, divergence="symmetric_kl", optimizer="adam_torch", pooled=True, dropout=None
):
    """The intermediates of a run of SMART in an ordinary loop, named as `smartreg.reference.Step` names them."""
    model = Network(theta, pooled, dropout)
    make = torch.optim.Adam if optimizer == "adam_torch" else torch.optim.SGD
    update = make(model.parameters(), lr=1e-2)
    steps = []
    recorded = {}
    smart = SMART(
        model,
        config,
        divergence=divergence,
        noise=lambda like: torch.from_numpy(noise[len(steps)]),
        on_step=lambda seen: recorded.update(
            dict.fromkeys([len(steps)][: len(seen.delta)], seen.delta and seen.delta[0])
        ),
    )
    for batch in batches:
        ids, y, mask, weight = (None if value is None else torch.from_numpy(value) for value in batch)
        outputs, penalty = smart(ids, attention_mask=mask, sample_weight=weight)
        losses = LOSSES[divergence](outputs, y)
        if not pooled:
            losses = (losses * mask).sum(1) / mask.sum(1)
        loss = (losses if weight is None else losses * weight).mean()
        update.zero_grad()
        (loss + penalty).backward()
        parameters = dict(model.named_parameters())
        gradients = {name: parameters[key].grad.clone() for name, key in model.named().items()}
        update.step()
        smart.update()
        steps.append(
            {
                "outputs": outputs.detach(),
                "loss": loss.detach(),
                "delta": recorded.get(len(steps)),
                "R_s": smart.metrics["R_s"] if len(steps) in recorded else 0.0,
                "D_Breg": smart.metrics.get("D_Breg", 0.0),
                "objective": (loss + penalty).detach(),
                "gradients": gradients,
                "theta": {name: parameters[key].detach().clone() for name, key in model.named().items()},
                "teacher": {name: smart.teacher[key].clone() for name, key in model.named().items()}
                if config.mu > 0
                else None,
            }
        )
    return steps


def compare(steps, reference, tolerance):
    """Every intermediate of every step, in order; the message names the first that differs."""
    for t, (got, want) in enumerate(zip(steps, reference, strict=True), start=1):
        for name, value in got.items():
            expected = getattr(want, name)
            if value is None:
                assert name == "teacher" or expected is None
                continue
            for key, v in value.items() if isinstance(value, dict) else [("", value)]:
                w = expected[key] if key else expected
                v, w = np.asarray(v), np.asarray(w)
                scale = max(np.abs(w).max(), 1e-6)
                worst = np.abs(v - w).max() / scale
                assert worst <= tolerance, f"step {t}: {name} {key} differs by {worst:.1e}"


def run_both(seed, config, steps=50, divergence="symmetric_kl", optimizer="adam_torch", pooled=True, weighted=True):
    rng = np.random.default_rng(seed)
    theta = make_theta(rng)
    batches = [make_batch(rng, divergence, pooled) for _ in range(steps)]
    batches = batches if weighted else [batch._replace(sample_weight=None) for batch in batches]
    shape = (4, 5, 4) if config.start == "gaussian" else (4, 3) if pooled else (4, 5, 3)
    noise = rng.normal(size=(steps, *shape))
    settings = {"divergence": divergence, "optimizer": optimizer, "pooled": pooled}
    reference = fit_reference(theta, batches, config, noise, learning_rate=1e-2, **settings)
    return fit_torch(theta, batches, config, noise, **settings), reference


@pytest.mark.parametrize("row", pairwise(*FACTORS.values()), ids=named)
def test_fifty_steps_equal_the_reference(row):
    settings = dict(zip(FACTORS, row, strict=True))
    options = {name: settings.pop(name) for name in ("divergence", "pooled", "weighted")}
    optimizer = {"sgd": "sgd", "adam": "adam_torch"}[settings.pop("optimizer")]
    early = min(0.9, settings["beta_late"])
    config = papers(**settings, epsilon=0.1, sigma=0.1, eta=0.15, lambda_s=2, mu=3, beta_early=early, total_steps=50)
    steps, reference = run_both(0, config, optimizer=optimizer, **options)
    compare(steps, reference, 1e-9)
    assert reference[-1].D_Breg > 0


@pytest.mark.parametrize(
    "config",
    [
        papers(beta_early=0, beta_late=0, proximal_steps=3, epsilon=0.1, sigma=0.1, eta=0.15),
        papers(scale="absolute", epsilon=0.05, sigma=0.05, eta=0.1, total_steps=50),
        papers(lambda_s=0, total_steps=50),
        papers(mu=0, epsilon=0.1, sigma=0.1, eta=0.15),
        papers(lambda_s=0, mu=0),
        SMARTConfig.mtdnn(),
        papers(smoothness_steps=3, lambda_s=2, epsilon=0.1, sigma=0.1, eta=0.15, total_steps=50),
        papers(smoothness_steps=4, mu=0, start="margin", epsilon=0.1, ascent_steps=0),
    ],
    ids=["VBPP", "absolute", "proximal", "R_s", "plain", "mtdnn", "R_s every 3rd step", "R_s alone, every 4th"],
)
def test_other_settings(config):
    compare(*run_both(2, config), 1e-9)


def test_the_published_values():
    """At epsilon = 1e-5 the direction g / ||g|| carries the forward's rounding over 1e-5: see docs/math.md."""
    steps, reference = run_both(3, SMARTConfig.paper(total_steps=50))
    compare(steps, reference, 1e-6)
    for got, want in zip(steps, reference, strict=True):
        assert float(got["R_s"]) == pytest.approx(want.R_s, rel=1e-6)


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_dropout_equals_the_reference_with_the_masks_that_were_drawn(start, dropout):
    torch.manual_seed(0)
    rng = np.random.default_rng(4)
    steps, ascent_steps = 12, 2 if start == "margin" else 1
    theta, batches = make_theta(rng), [make_batch(rng) for _ in range(steps)]
    config = papers(start=start, ascent_steps=ascent_steps, dropout=dropout, epsilon=0.2, sigma=0.2, eta=0.15)
    config = config.replace(lambda_s=2, mu=3, beta_early=0.5, beta_late=0.5)
    noise = rng.normal(size=(steps, 4, 5, 4) if start == "gaussian" else (steps, 4, 3))
    layer = Dropout()
    got = fit_torch(theta, batches, config, noise, dropout=layer)
    taken = [mask.numpy() for mask in layer.notes.taken()]
    del taken[1]  # the first step checks that a pass repeats itself
    masks = []
    for clean, *ascent, taught, last in batched(taken, ascent_steps + 3):
        np.testing.assert_array_equal(taught, clean)
        masks.append([clean, *ascent, last])
    reference = fit_reference(theta, batches, config, noise, learning_rate=1e-2, dropout=np.array(masks))
    compare(got, reference, 1e-9)


def batched(values, n):
    assert len(values) % n == 0
    return [values[i : i + n] for i in range(0, len(values), n)]


KERAS_ONLY = ["l1"]  # Adam as Keras has it
GIVEN_MASKS = ["dropout", "dropout, independent"]  # above, with masks that the model drew


@pytest.mark.parametrize("name", [name for name in TRAJECTORIES if name not in KERAS_ONLY + GIVEN_MASKS])
def test_the_trajectories_of_the_check(name):
    """The weights and the noise that the other backends get, from one file."""
    theta, batches, config, noise, options = load_trajectory(name)
    steps = [SimpleNamespace(**step) for step in fit_torch(theta, batches, config, noise, **options)]
    assert not [row for row in compare_steps(steps, name) if not row.ok][:1]
