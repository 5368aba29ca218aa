"""Print what float32 leaves of R_s at the published epsilon: the usual formula and ours, against float64.

python benchmarks/numerics.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import BertConfig, BertForSequenceClassification

from smartreg_torch.divergences import symmetric_kl

EPSILON, ROWS = 1e-5, 16
Divergence = Callable[[Tensor, Tensor], Tensor]


def two_kl_terms(a: Tensor, b: Tensor) -> Tensor:
    """Compute KL(P||Q) + KL(Q||P) as one writes it down, and as the public packages do."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    terms = kl_div(log_q, log_p, log_target=True, reduction="none")
    return (terms + kl_div(log_p, log_q, log_target=True, reduction="none")).sum(-1)


def logits(model: BertForSequenceClassification, embeddings: Tensor) -> Tensor:
    return model(inputs_embeds=embeddings.to(model.dtype)).logits


def gradient(model: BertForSequenceClassification, x: Tensor, delta: Tensor, divergence: Divergence) -> Tensor:
    """Compute the gradient of R_s with respect to all the weights."""
    r_s = divergence(logits(model, x + delta), logits(model, x)).mean()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    found = torch.autograd.grad(r_s, weights, allow_unused=True)
    return torch.cat([g.flatten().double() for g in found if g is not None])


def main() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    single = BertForSequenceClassification(BertConfig(vocab_size=100, initializer_range=0.1, **size)).eval()
    double = copy.deepcopy(single).double()
    x = single.get_input_embeddings()(torch.randint(1, 100, (ROWS, 24))).detach()
    delta = (EPSILON * torch.randn_like(x)).clamp(-EPSILON, EPSILON)

    a, b = logits(single, x + delta).detach(), logits(single, x).detach()
    exact = symmetric_kl(a.double(), b.double())
    exact_gradient = gradient(double, x, delta, symmetric_kl)
    table = Table(
        title=f"a small BERT, {ROWS} rows, the paper's start at epsilon = {EPSILON:g}, float32 against float64"
    )
    for column in ("formula", "rows below 0", "value given the logits: worst error", "weights' gradient: error"):
        table.add_column(column, justify="left" if column == "formula" else "right")
    for name, divergence in (("sum of two KL terms", two_kl_terms), ("smartreg", symmetric_kl)):
        rows = divergence(a, b)
        error = (gradient(single, x, delta, divergence) - exact_gradient).norm() / exact_gradient.norm()
        table.add_row(
            name,
            f"{int((rows < 0).sum())} of {ROWS}",
            f"{float(((rows - exact) / exact).abs().max()):.1e}",
            f"{float(error):.1e}",
        )
    console = Console(width=120)
    console.print(table)


if __name__ == "__main__":
    main()
