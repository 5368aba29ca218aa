"""Measure what SMART costs at a vocabulary's size: l_s beside a cross entropy, and a step of a causal language model.

python benchmarks/vocabulary.py

All rows of a panel take turns in each round: the ratio to the first row of the same round, its median and quartiles.
Each peak is of a process of its own, over what was there before: in tensors of the logits' size for l_s, the logits and
their gradients included, and in MB over the model for a step. A step is the forward and the backward pass, without the
optimiser.

The model is a GPT-2 of DistilGPT2's size with random weights. "No logits": its loss is computed chunk by chunk and the
model gives hidden states, as with a fused loss; SMART then compares a `Projection`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import alone, now, peak
from ratios import in_turn, spread
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from smart_pytorch import SMARTLoss, kl_loss, sym_kl_loss
from step_cost import add_options_of_a_model, prepared
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from smartreg_torch import SMART, Projection, SMARTConfig
from smartreg_torch.divergences import symmetric_kl

Step = Callable[[], Any]
DIVERGENCES = (
    "cross entropy",
    "textbook symmetric KL",
    "smart-pytorch's symmetric KL",
    "symmetric_kl",
    "symmetric_kl, 15% of the positions",
)
STEPS = {
    "plain": "",
    "SMART: R_s": "R_s",
    "SMART: R_s + MBPP": "both",
    "smart-pytorch 0.0.4": "peer",
    "no logits: plain": "",
    "no logits: SMART, R_s": "R_s",
    "no logits: SMART, R_s + MBPP": "both",
}
CONFIGS = {"R_s": SMARTConfig(mu=0), "both": SMARTConfig(total_steps=10**6)}


def textbook(a: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def divergence(
    name: str, batch: int, length: int, vocabulary: int, precision: str, compiled: bool, device: str
) -> Step:
    """Return the forward and backward pass of l_s, or of a cross entropy, in logits; `compiled` is of no use here."""
    torch.manual_seed(0)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a = torch.randn(batch, length, vocabulary, device=device, dtype=dtype, requires_grad=True)
    b = (a.detach() + 0.01 * torch.randn_like(a)).requires_grad_()
    labels = torch.randint(vocabulary, (batch * length,), device=device)
    keep = torch.rand(batch, length, device=device) < 0.15
    value: Callable[[], Tensor] = {
        "cross entropy": lambda: functional.cross_entropy(a.flatten(0, 1), labels),
        "textbook symmetric KL": lambda: textbook(a, b),
        "smart-pytorch's symmetric KL": lambda: sym_kl_loss(a.flatten(0, 1), b.flatten(0, 1)),
        "symmetric_kl": lambda: symmetric_kl(a, b).mean(),
        "symmetric_kl, 15% of the positions": lambda: symmetric_kl(a, b, keep).mean(),
    }[name]

    def step() -> None:
        value().backward()  # type: ignore[no-untyped-call]
        a.grad = b.grad = None

    return step


class NoLogits(nn.Module):
    """A language model that gives its loss, computed chunk by chunk, and its hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the loss and what the head is given."""
        hidden = self.model.transformer(input_ids).last_hidden_state
        rows, labels = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()

        def loss(rows: Tensor, labels: Tensor) -> Tensor:
            return functional.cross_entropy(self.model.lm_head(rows), labels, reduction="sum")

        chunks = zip(rows.split(64), labels.split(64), strict=True)
        total = torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
        return {"loss": total / len(labels), "hidden": hidden}


def training_step(
    name: str, batch: int, length: int, vocabulary: int, precision: str, compiled: bool, device: str
) -> Step:
    """Return the forward and backward pass of a method on a language model."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_layer=6, n_positions=max(length, 256))
    language: Any = prepared(GPT2LMHeadModel(config), device, precision, compiled).train()
    ids = torch.randint(vocabulary, (batch, length), device=device)
    model: Any = NoLogits(language) if name.startswith("no logits") else language
    given = {"input_ids": ids} if name.startswith("no logits") else {"input_ids": ids, "labels": ids}
    outputs = (
        (lambda found: Projection(found["hidden"], language.lm_head.weight)) if model is not language else "logits"
    )
    terms = STEPS[name]
    passes = "float32" if precision == "float32" else "model"
    smart = SMART(model, CONFIGS[terms], outputs=outputs, precision=passes) if terms in CONFIGS else None
    peer = SMARTLoss(lambda x: language(inputs_embeds=x).logits.flatten(0, 1), kl_loss, sym_kl_loss)

    def loss_of_a_batch() -> Tensor:
        output, penalty = smart(**given) if smart is not None else (model(**given), None)
        if terms == "peer":
            penalty = peer(language.transformer.wte(ids), output.logits.flatten(0, 1))
        loss: Tensor = output["loss"]
        return loss if penalty is None else loss + penalty

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "autocast"):
            loss = loss_of_a_batch()
        loss.backward()
        model.zero_grad()
        if smart is not None:
            smart.update()

    return step


PANELS = {"divergence": (DIVERGENCES, divergence), "step": (tuple(STEPS), training_step)}


def measure(panel: str, name: str, *sizes: Any) -> dict[str, float]:
    """Measure the peak of a row in this process, over what was there before its first step."""
    device = sizes[-1]
    step = PANELS[panel][1](name, *sizes)
    if device != "cpu":
        step()  # to compile a kernel takes memory, too
    before = now(device)
    for _ in range(2):
        step()
    return {"MB": peak(device) - before}


def seconds(step: Step, device: str) -> float:
    """Time a step: the processor's time on a CPU, on which other load counts less; on a GPU until it is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--one", nargs=8, help=argparse.SUPPRESS)
    add("--panel", nargs="+", choices=PANELS, default=list(PANELS))
    add("--batch", type=int, default=4)
    add("--length", type=int, default=64)
    add("--vocabulary", type=int, default=50257)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1)
    add_options_of_a_model(add)
    add("--json", type=Path, default=Path("out/vocabulary.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        panel, name, *sizes, precision, compiled, device = args.one
        print(json.dumps(measure(panel, name, *map(int, sizes), precision, compiled == "True", device)))
        return
    sizes = (args.batch, args.length, args.vocabulary, args.precision, args.compile, args.device)
    console, rng, found = Console(highlight=False, width=110), random.Random(0), {}
    for panel in args.panel:
        names, make = PANELS[panel]
        steps = {name: make(name, *sizes) for name in names}
        for step in steps.values():
            step()
        timed = {name: partial(seconds, step, args.device) for name, step in steps.items()}
        rounds = [in_turn(timed, dict, rng) for _ in range(args.rounds)]
        del steps, step, timed
        entry = 4 if args.precision == "float32" else 2  # bytes
        tensor = entry * math.prod(sizes[:3]) / 2**20 if panel == "divergence" else 1.0
        inputs = 2 if panel == "divergence" else 0
        title = f"{panel}, {args.batch} x {args.length} x {args.vocabulary}, {args.device}, {args.precision}"
        table = Table(title=title + ", compiled" * args.compile, box=SIMPLE_HEAD)
        heads = ("", f"x {names[0]} (quartiles)", "peak, tensors" if panel == "divergence" else "peak, MB", "x plain")
        for head in heads if panel == "step" else heads[:3]:
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        peaks = {name: alone(__file__, measure, panel, name, *sizes)["MB"] / tensor + inputs for name in names}
        for name in names:
            ratio = spread([taken[name] / taken[names[0]] for taken in rounds])
            cells = [name, ratio, f"{peaks[name]:.{int(panel == 'divergence')}f}"]
            table.add_row(*cells, *([f"{peaks[name] / peaks[names[0]]:.2f}"] if panel == "step" else []))
        console.print(table)
        found[panel] = {"rounds": rounds, "peaks": peaks}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"torch": torch.__version__, "sizes": sizes, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
