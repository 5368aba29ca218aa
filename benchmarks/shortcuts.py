"""Measure what each way to save passes does to the trained model: its accuracy, and how smooth it has become.

python benchmarks/shortcuts.py
python benchmarks/shortcuts.py --train ../shared/data/sst2/train.tsv --dev ../shared/data/sst2/dev.tsv

R_s alone (mu = 0) is trained by the paper's start, by the margin start, and by shortcuts from the margin start:

- R_s in every k-th step, with k times the weight;
- R_s on a part of the batch;
- the direction of the task loss's own gradient, which is computed anyway. The clean side of R_s is then detached,
  because its graph is freed.

All start from the same weights and see the same batches. All have the same dropout masks, except for a part of the
batch, which is two calls of the model. "needs" is what a step costs, in plain steps P and passes F and X (see
step_cost.py). Its number takes F = 0.48 and X = 0.27 of a plain step, MiniLM's at 8 x 128 tokens. R_s is measured
afterwards, with a stronger ascent than any had in training. The intervals are 95% t-intervals over the seeds, of the
difference to plain training paired by seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from smartreg.demo import digits as demo
from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.demo import network, weights_of
from smartreg_torch.demo import train as train_digits
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.perturbation import rms

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_text

F, X = 0.48, 0.27
MARGIN = {"start": "margin", "ascent_steps": 0}


@dataclass
class Method:
    """One way to train, and what its step needs: `plain` plain steps, `forward` F and `backward` X."""

    start: dict[str, Any] | None = None
    every: int = 1
    part: float = 1.0
    detached: bool = False

    @property
    def needs(self) -> tuple[str, float]:
        """Return the needs in words, and in plain steps."""
        if self.detached:
            return "2P", 2.0
        if self.start is None:
            return "P", 1.0
        share = self.part / self.every
        more = "P + X" if self.start == MARGIN else "P + F + X"
        words = f"P + {more}" if share == 1 else f"P + ({more})/{1 / share:g}"
        return words, 1 + share * (1 + X + (0 if self.start == MARGIN else F))


METHODS = {
    "plain": Method(),
    "paper's start": Method({"start": "gaussian", "ascent_steps": 1}),
    "margin start": Method(MARGIN),
    "every 2nd step": Method(MARGIN, every=2),
    "every 4th step": Method(MARGIN, every=4),
    "half of the batch": Method(MARGIN, part=0.5),
    "a quarter of the batch": Method(MARGIN, part=0.25),
    "task's direction, detached": Method(MARGIN, detached=True),
}


class Digits:
    """The digits of the demo: ten classes from five labels each, also with the accuracy under attack."""

    name = "digits"
    site: str | None = "input"

    def __init__(self) -> None:
        self.config = demo.CONFIG.replace(mu=0)
        self.data = demo.digits()
        self.pretrained = demo.pretrain(self.data, train_digits)

    def start(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, list[dict[str, Tensor]]]:
        """Return the model that every method starts from, its optimiser and scheduler, and the batches of the run."""
        x, y = demo.few_labels(self.data, 5, seed)
        model = network(demo.initial_weights(self.pretrained, seed))
        rows = demo.batches(len(x), demo.BATCH, demo.STEPS, seed)
        batches = [{"input": torch.from_numpy(x[at]), "labels": torch.from_numpy(y[at])} for at in rows]
        return model, torch.optim.Adam(model.parameters(), lr=1e-3), None, batches

    def logits(self, output: Any) -> Tensor:
        """Return the logits of the model's output."""
        return output

    def embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the x that is perturbed."""
        return batch["input"]

    def at(self, model: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Compute the logits from x."""
        return model(x)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the scores of the trained model, R_s among them."""
        theta, x, y = weights_of(model), self.data.x_test, self.data.y_test
        points = {"accuracy": x, "attacked": demo.worst(theta, x, y, demo.CONFIG.epsilon)}
        found = {name: 100 * float((demo.read(theta, at) == y).mean()) for name, at in points.items()}
        return found | {"R_s": demo.roughness(theta, x)}


class Text:
    """MiniLM on a TSV, with the settings of examples/finetune_text.py."""

    site: str | None = None

    def __init__(self, train: Path, dev: Path, radius: float) -> None:
        self.config = SMARTConfig(epsilon=radius, sigma=radius, eta=100 * radius, mu=0)
        self.train, self.dev, classes = finetune_text.load(train, dev, None)
        if classes is None:
            raise SystemExit(f"shortcuts.py: {train} has scores; expected classes")
        self.classes, self.name = classes, f"MiniLM on {train.parent.name}, {radius:g} rms"
        self.folder = finetune_text.default_model()
        self.collate = finetune_text.collator(AutoTokenizer.from_pretrained(self.folder), 64, False)

    def start(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, list[dict[str, Tensor]]]:
        """Return the model that every method starts from, its optimiser and scheduler, and the batches of the run."""
        torch.manual_seed(seed)  # the new head
        labels = {"id2label": dict(enumerate(self.classes))}
        model = AutoModelForSequenceClassification.from_pretrained(self.folder, dtype=torch.float32, **labels)
        rng = random.Random(seed)
        rows, batches = rng.sample(self.train, 200), []
        for _ in range(5):
            order = rng.sample(rows, len(rows))
            batches += [self.collate(order[k : k + 16]) for k in range(0, len(rows), 16)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
        return model, optimizer, get_linear_schedule_with_warmup(optimizer, len(batches) // 10, len(batches)), batches

    def logits(self, output: Any) -> Tensor:
        """Return the logits of the model's output."""
        return output.logits

    def embed(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the x that is perturbed."""
        return model.get_input_embeddings()(batch["input_ids"])

    def at(self, model: nn.Module, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Compute the logits from x."""
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        return model(inputs_embeds=x, **rest).logits

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the scores of the trained model, R_s among them."""
        dev, some = (sorted(rows, key=finetune_text.length) for rows in (self.dev, self.dev[:64]))
        batches = [[self.collate(rows[k : k + 32]) for k in range(0, len(rows), 32)] for rows in (dev, some)]
        return finetune_text.evaluate(model, batches[0], batches[1], finetune_text.measuring(self.config))


def train(task: Digits | Text, method: Method, seed: int) -> nn.Module:
    """Train once. Return the model in evaluation mode."""
    model, optimizer, scheduler, batches = task.start(seed)
    torch.manual_seed(seed)  # dropout
    model.train()
    with ExitStack() as stack:
        smart = None
        if method.start is not None and not method.detached:
            config = task.config.replace(**method.start, smoothness_steps=method.every)
            smart = stack.enter_context(SMART(model, config, site=task.site))
        for batch in batches:
            labels = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            if method.detached:
                detached(task, model, inputs, labels)
            elif smart is None:
                cross_entropy(task.logits(model(**inputs)), labels).backward()
            else:
                n = max(1, round(method.part * len(labels)))
                output, penalty = smart(**{name: value[:n] for name, value in inputs.items()})
                z = task.logits(output)
                if n < len(labels):
                    z = torch.cat([z, task.logits(model(**{name: value[n:] for name, value in inputs.items()}))])
                (cross_entropy(z, labels) + penalty).backward()
            if scheduler is None:
                optimizer.step()
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
            optimizer.zero_grad()
            if smart is not None:
                smart.update()
    return model.eval()


def detached(task: Digits | Text, model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> None:
    """Back-propagate the task, take delta = epsilon sign(gradient at x), and back-propagate R_s at x + delta alone."""
    config, before = task.config, torch.get_rng_state()
    x = task.embed(model, inputs)
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    x.retain_grad()
    z = task.at(model, x, inputs)
    cross_entropy(z, labels).backward()
    after = torch.get_rng_state()
    assert x.grad is not None
    epsilon: Any = config.epsilon
    if config.scale == "rms":
        epsilon = config.epsilon * rms(x.detach(), inputs["attention_mask"])[:, None, None]
    torch.set_rng_state(before)  # the same dropout masks
    shifted = task.embed(model, inputs) + epsilon * x.grad.sign()  # padding has no gradient
    (config.lambda_s * symmetric_kl(task.at(model, shifted, inputs), z.detach()).mean()).backward()
    torch.set_rng_state(after)


def report(console: Console, task: Digits | Text, runs: dict[str, list[dict[str, float]]]) -> None:
    names = list(runs["plain"][0])
    seeds = len(runs["plain"])
    table = Table(title=f"{task.name}, {seeds} seeds", title_justify="left", box=SIMPLE_HEAD)
    columns = [column for name in names for column in (name, "minus plain") if (name, column) != ("R_s", "minus plain")]
    for name in ("method", "lambda_s", "needs", "=", *columns):
        table.add_column(name, justify="left" if name in ("method", "needs") else "right", no_wrap=True)
    for key, results in runs.items():
        method, _, weight = key.partition(" @ ")
        words, cost = METHODS[method].needs
        cells = []
        for name in names:
            values = [result[name] for result in results]
            if name == "R_s":
                cells.append(finetune_text.shown(finetune_text.interval(values), ".3g"))
                continue
            cells.append(f"{sum(values) / seeds:.1f}")
            pairs = [value - plain[name] for value, plain in zip(values, runs["plain"], strict=True)]
            cells.append("" if key == "plain" else finetune_text.shown(finetune_text.interval(pairs), ".1f", "+"))
        table.add_row(method, weight, words, f"{cost:.2f}", *cells)
    console.print(table)


def keys(weights: list[float], methods: list[str]) -> Iterator[tuple[str, str, float]]:
    """List the runs: name, method and lambda_s."""
    for method in methods:
        for weight in weights if method != "plain" else [0.0]:
            yield (method if method == "plain" else f"{method} @ {weight:g}"), method, weight


def main() -> None:
    parser = argparse.ArgumentParser(description="What each way to save passes does to the trained model.")
    add = parser.add_argument
    add("--train", type=Path, help="a TSV as for examples/finetune_text.py: MiniLM instead of the digits")
    add("--dev", type=Path, help="its dev file")
    add("--radius", type=float, default=0.1, help="of the text's ball, in rms")
    add("--weight", nargs="+", type=float, default=[1.0], help="lambda_s")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="plain is always among them")
    add("--seeds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--json", type=Path, default=Path("out/shortcuts.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    task: Digits | Text = Text(args.train, args.dev, args.radius) if args.train else Digits()
    base = task.config
    wanted = list(keys(args.weight, list(dict.fromkeys(["plain", *args.method]))))
    runs: dict[str, list[dict[str, float]]] = {key: [] for key, _, _ in wanted}
    console = Console(highlight=False, width=150)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(task.name, total=args.seeds * len(wanted))
        for seed in range(args.seeds):  # methods inside seeds
            for key, method, weight in wanted:
                task.config = base.replace(lambda_s=weight)
                runs[key].append(task.measure(train(task, METHODS[method], seed)))
                progress.advance(bar)
            args.json.write_text(json.dumps(runs, indent=1) + "\n")
    report(console, task, runs)


if __name__ == "__main__":
    main()
