"""A small model, its data and its loop, for the tests of PyTorch."""

import torch
from notes import Notes
from paper_settings import papers
from torch import nn


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


def assert_untouched(model):
    """No armed hook, no changed flag, no gradient, and a plain call works."""
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))


class Dropout(nn.Module):
    """Dropout that writes down the multipliers of each pass."""

    def __init__(self):
        super().__init__()
        self.notes = Notes()

    def forward(self, h):
        mask = (torch.rand_like(h) < 0.75).to(h) / 0.75
        self.notes.add(mask)
        return mask * h
