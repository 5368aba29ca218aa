"""Keras and PyTorch train the same small network from the same weights, with the same noise, alike."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from paper_settings import papers
from test_tf_reference import STEPS, Network, float64, make_batches

from smartreg.reference import init_parameters
from smartreg_tf import attach
from smartreg_tf import report as report_tf
from smartreg_torch import SMART
from smartreg_torch import report as report_torch


class TorchNetwork(torch.nn.Module):
    def __init__(self, theta):
        super().__init__()
        theta = {name: torch.from_numpy(value.copy()) for name, value in theta.items()}
        self.embedding = torch.nn.Embedding.from_pretrained(theta["E"], freeze=False)
        self.W1, self.b1, self.W2, self.b2 = (torch.nn.Parameter(theta[name]) for name in ("W1", "b1", "W2", "b2"))

    def forward(self, ids, attention_mask):
        h = torch.tanh(self.embedding(ids) @ self.W1 + self.b1)
        keep = attention_mask[..., None].to(h)
        return (h * keep).sum(1) / keep.sum(1) @ self.W2 + self.b2


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_fifty_steps(start):
    with float64():
        rng = np.random.default_rng(3)
        theta = init_parameters(rng, vocabulary=20, d=4, hidden=7, outputs=3)
        batches = make_batches(rng, "symmetric_kl", True, False)
        noise = rng.normal(size=(STEPS, *batches[0].ids.shape, 4))
        config = papers(
            epsilon=0.2, sigma=0.2, eta=0.2, norm="2", start=start, proximal_steps=3, total_steps=STEPS, beta_early=0.5
        )
        ours = Network(theta, "symmetric_kl", True)
        ours.compile(keras.optimizers.SGD(0.0625))
        theirs = TorchNetwork(theta)
        optimizer = torch.optim.SGD(
            theirs.parameters(), lr=0.0625
        )  # a power of 2: Keras takes the rate through float32
        draws, drawn = tf.constant(noise), iter(noise)
        with (
            attach(ours, config, outputs="logits", noise=lambda step, like: tf.gather(draws, step)) as smart,
            SMART(theirs, config, noise=lambda like: torch.from_numpy(next(drawn))) as torch_smart,
        ):
            for batch in batches:
                inputs = {"ids": batch.ids, "padding_mask": batch.mask}
                logs = ours.train_on_batch(inputs, batch.y, return_dict=True)
                logits, penalty = torch_smart(torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask))
                loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.y)) + penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                torch_smart.update()
                pairs = {
                    "loss": (logs["loss"], float(loss.detach())),
                    "R_s": (logs["smoothness"], torch_smart.metrics["R_s"]),
                    "D_Breg": (logs["proximal"], torch_smart.metrics["D_Breg"]),
                }
                parameters = dict(theirs.named_parameters())
                names = ("embedding.weight", "W1", "b1", "W2", "b2")
                for weight, average, name in zip(ours.weights, smart.averages, names, strict=True):
                    pairs[name] = weight.numpy(), parameters[name].detach().numpy()
                    pairs[f"{name}~"] = average.numpy(), torch_smart.teacher[name].numpy()
                for name, (got, want) in pairs.items():
                    atol = 1e-9 * np.abs(want).max() + 1e-15
                    np.testing.assert_allclose(got, want, rtol=1e-9, atol=atol, err_msg=name)
            assert logs["smoothness"] > 1e-4
            assert logs["proximal"] > 1e-6


@pytest.mark.parametrize(("kind", "norm"), [("symmetric_kl", "2"), ("bernoulli_symmetric_kl", "inf")])
def test_a_report_has_the_same_numbers(kind, norm):
    with float64():
        rng = np.random.default_rng(3)
        theta = init_parameters(rng, vocabulary=20, d=4, hidden=7, outputs=3)
        theirs, ours = TorchNetwork(theta), Network(theta, kind, True)
        ours.compile("sgd", run_eagerly=norm == "inf")
        batches = make_batches(rng, kind, True, False)[:2]
        inputs = [{"ids": batch.ids, "attention_mask": batch.mask} for batch in batches]
        loader = [
            ({name: torch.from_numpy(value) for name, value in given.items()}, torch.from_numpy(batch.y))
            for given, batch in zip(inputs, batches, strict=True)
        ]
        config = papers(epsilon=0.3, norm=norm)
        torch_found = report_torch(theirs, loader, config, divergence=kind)
        x = {"ids": np.concatenate([b.ids for b in batches]), "padding_mask": np.concatenate([b.mask for b in batches])}
        outputs = "logits" if kind == "symmetric_kl" else "label_logits"
        y = np.concatenate([batch.y for batch in batches])
        found = report_tf(ours, x, config, y, batch_size=len(batches[0].y), outputs=outputs)
    assert found.numbers.keys() == torch_found.numbers.keys()
    for name, value in torch_found.numbers.items():
        assert found.numbers[name] == pytest.approx(value, rel=1e-9), name
    assert 0 < found.numbers["flips at 3"] < 1
