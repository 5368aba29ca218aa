"""Measure how much of the inner maximum of R_s each ascent reaches, and for how many passes.

python benchmarks/ascent.py
python benchmarks/ascent.py --train ../shared/data/sst2/train.tsv --dev ../shared/data/sst2/dev.tsv

The figure is the divergence at delta, mean over the examples, as a fraction of the largest that is known. The largest
is that of 64 restarts of 60 steps from random vertices, whose step lengths fall, and of all methods. On the small
models this is the maximum or very near to it. Dropout is off.

A pass is a forward, or a backward to the embeddings. The clean and the perturbed pass, which all methods have, are not
counted. "Steepest" steps are those that suit the norm: sign(g) for l_inf, g/||g||_2 for l_2. Their length is the best
of epsilon/4, epsilon/2 and epsilon on these very examples. Random methods are medians over the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from smartreg_torch import SMARTConfig
from smartreg_torch.divergences import DIVERGENCES
from smartreg_torch.perturbation import ascend, expand_mask, normalize, project_l2_ball, project_linf_ball, rms

TUNED = (0.25, 0.5, 1.0)  # step lengths in radii


@dataclass
class Problem:
    """A model behind its embeddings, and the examples to perturb."""

    name: str
    forward: Callable[[Tensor, Tensor | None], Tensor]
    x: Tensor
    mask: Tensor | None
    divergence: str
    seeds: int = 5
    restarts: int = 64  # for the largest divergence

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.clean = self.forward(self.x, self.mask)

    def of(self, x: Tensor, mask: Tensor | None) -> Problem:
        """Return the same model with other examples."""
        return dataclasses.replace(self, x=x, mask=mask)

    def values(self, delta: Tensor) -> Tensor:
        """Compute l_s of each example, (n,)."""
        with torch.no_grad():
            return DIVERGENCES[self.divergence](self.forward(self.x + delta, self.mask), self.clean)

    def gradient(self, delta: Tensor) -> Tensor:
        """Compute the gradient of l_s with respect to delta."""
        delta = delta.detach().requires_grad_()
        value = DIVERGENCES[self.divergence](self.forward(self.x + delta, self.mask), self.clean).sum()
        return self.kept(torch.autograd.grad(value, delta)[0])

    def kept(self, delta: Tensor) -> Tensor:
        """Set delta to 0 at padding."""
        return delta if self.mask is None else delta.where(expand_mask(self.mask, delta), 0)


class Ball:
    """A ball: its radius in units of each example's rms, and its norm."""

    def __init__(self, problem: Problem, radius: float, norm: str) -> None:
        self.problem, self.radius, self.norm = problem, radius, norm
        self.epsilon = radius * rms(problem.x, problem.mask)

    def project(self, delta: Tensor) -> Tensor:
        """Project into the ball, padding left out."""
        project = project_linf_ball if self.norm == "inf" else project_l2_ball
        return project(self.problem.kept(delta), self.epsilon)

    def steepest(self, g: Tensor) -> Tensor:
        """Return the argmax of <g, delta> in the ball."""
        unit = g.sign() if self.norm == "inf" else normalize(g, "2")
        return unit * self.epsilon.reshape(-1, *[1] * (g.ndim - 1))

    def library(self, seed: int, **settings: Any) -> Tensor:
        """Return the delta of `smartreg_torch.perturbation.ascend`."""
        problem, generator = self.problem, torch.Generator().manual_seed(seed)
        margin = settings["start"] == "margin"
        noise = torch.randn((problem.clean if margin else problem.x).shape, generator=generator)
        config = SMARTConfig(epsilon=self.radius, sigma=self.radius, norm=self.norm, **settings)  # type: ignore[arg-type]
        forward = partial(problem.forward, mask=problem.mask)
        return ascend(forward, problem.x, problem.clean, config, noise, problem.mask, problem.divergence)

    def steps(self, delta: Tensor, count: int, lengths: tuple[float, ...]) -> Tensor:
        """Take steepest steps of each length. Return the result that is best on these examples."""
        found = []
        for length in lengths:
            at = delta
            for _ in range(count):
                at = self.project(at + length * self.steepest(self.problem.gradient(at)))
            found.append(at)
        return max(found, key=lambda at: float(self.problem.values(at).mean()))

    def vertex(self, seed: int) -> Tensor:
        """Draw a random point of the ball's boundary."""
        noise = torch.randn(self.problem.x.shape, generator=torch.Generator().manual_seed(1000 + seed))
        return self.project(self.steepest(self.problem.kept(noise)))


def methods(ball: Ball) -> dict[str, tuple[int, Callable[[int], Tensor]]]:
    """Return for each method its passes, and a function from a seed to the divergence of each example."""
    problem = ball.problem
    eta = 100 * ball.radius  # the published eta / epsilon
    found: dict[str, tuple[int, Callable[[int], Tensor]]] = {}

    def add(name: str, passes: int, delta: Callable[[int], Tensor]) -> None:
        found[name] = passes, lambda seed: problem.values(delta(seed))

    add("random noise (R3F)", 0, lambda seed: ball.library(seed, start="gaussian", ascent_steps=0))
    for count in (1, 2, 3, 5, 20):
        add(
            f"paper's, T_x = {count}",
            2 * count,
            lambda seed, count=count: ball.library(seed, start="gaussian", eta=eta, ascent_steps=count),
        )
    for count in (1, 5, 10):
        add(
            f"Gaussian, {count} steepest, tuned",
            2 * count,
            lambda seed, count=count: ball.steps(ball.library(seed, start="gaussian", ascent_steps=0), count, TUNED),
        )
    found["20 random vertices, the best"] = (
        20,
        lambda seed: torch.stack([problem.values(ball.vertex(20 * seed + k)) for k in range(20)]).amax(0),
    )
    for count in (0, 1, 2):
        add(
            f"margin, T_x = {count}",
            1 + 2 * count,
            lambda seed, count=count: ball.library(seed, start="margin", eta=eta, ascent_steps=count),
        )
    if problem.divergence == "squared_error":

        def better_side(seed: int) -> Tensor:
            delta = ball.library(seed, start="margin", ascent_steps=0)
            return torch.maximum(problem.values(delta), problem.values(-delta))

        found["margin, T_x = 0, the better of both signs"] = 3, better_side
    add(
        "margin, 2 steepest, epsilon/2",
        5,
        lambda seed: ball.steps(ball.library(seed, start="margin", ascent_steps=0), 2, (0.5,)),
    )
    return found


def best_known(problem: Problem, radius: float, norm: str) -> Tensor:
    """Find the largest value of each example over the restarts, which run as one batch."""
    restarts = problem.restarts
    mask = None if problem.mask is None else torch.cat([problem.mask] * restarts)
    ball = Ball(problem.of(torch.cat([problem.x] * restarts), mask), radius, norm)
    at = ball.vertex(0)
    for step in range(60):
        at = ball.project(at + 2 * 0.93**step * ball.steepest(ball.problem.gradient(at)))
    return ball.problem.values(at).reshape(restarts, -1).amax(0)


def measure(problem: Problem, radius: float, norm: str) -> dict[str, dict[str, float]]:
    """Measure the passes and the divergence of each method: mean over the examples, median over the seeds."""
    ball = Ball(problem, radius, norm)
    best = best_known(problem, radius, norm)
    runs: dict[str, tuple[int, list[Tensor]]] = {}
    for name, (passes, reached) in methods(ball).items():
        drawn = not name.startswith("margin") or problem.divergence == "squared_error"
        runs[name] = passes, [reached(seed) for seed in range(problem.seeds if drawn else 1)]
        best = torch.stack([best, *runs[name][1]]).amax(0)
    largest = float(best.mean())
    rows = {}
    for name, (passes, values) in runs.items():
        mean = statistics.median(float(value.mean()) for value in values)
        rows[name] = {"passes": passes, "divergence": mean, "fraction": mean / largest}
    rows["largest known"] = {"passes": 120 * problem.restarts, "divergence": largest, "fraction": 1.0}
    return rows


def network(x: np.ndarray, y: np.ndarray, outputs: int) -> nn.Module:
    """Train two hidden layers until they fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, outputs))
    inputs = torch.tensor(x, dtype=torch.float32)
    targets = torch.tensor(y, dtype=torch.float32 if outputs == 1 else torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        z = model(inputs)
        loss = nn.functional.mse_loss(z[:, 0], targets) if outputs == 1 else nn.functional.cross_entropy(z, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def small_problems() -> list[Problem]:
    """Make the small problems: 3 and 10 digits, pairs of digits (50 classes), progress of diabetes (regression)."""
    digits = load_digits()
    x, y = (digits.data - 8) / 8, digits.target
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    three = y < 3
    first, second = np.flatnonzero(y < 5), np.arange(len(y))[: (y < 5).sum()]
    pairs = np.concatenate([x[first], x[second]], 1), 10 * y[first] + y[second]
    diabetes = load_diabetes()
    features, progress = diabetes.data / diabetes.data.std(0), diabetes.target
    data = {
        "digits, 3 classes": (x[three], y[three], 3),
        "digits, 10 classes": (x, y, 10),
        "pairs of digits, 50 classes": (*pairs, 50),
        "diabetes, regression": (features, (progress - progress.mean()) / progress.std(), 1),
    }
    problems = []
    for name, (inputs, targets, outputs) in data.items():
        model = network(inputs[64:], targets[64:], outputs)
        held_out = torch.tensor(inputs[:64], dtype=torch.float32)
        problems.append(
            Problem(
                name,
                lambda x, mask, model=model: model(x),
                held_out,
                None,
                "squared_error" if outputs == 1 else "symmetric_kl",
                seeds=100 if outputs == 1 else 5,  # an ascent draws its side of x, and few examples decide
            )
        )
    return problems


def minilm(train: Path, dev: Path) -> Problem:
    """Fine-tune MiniLM as examples/finetune_text.py does. The examples are the word embeddings of 32 rows of dev."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import finetune_text as example

    task = example.load(train, dev, None)
    args = argparse.Namespace(
        model=example.default_model(),
        examples=200,
        epochs=5,
        batch_size=16,
        learning_rate=2e-4,
        max_length=64,
        smoothness_examples=16,
    )
    small = (task[0], task[1][:32], task[2])
    _, model, tokenizer = example.run_once(args, small, SMARTConfig(lambda_s=0, mu=0), 0, lambda: None)
    batch = example.collator(tokenizer, args.max_length, task[2] is None)(small[1])
    mask = batch["attention_mask"]
    x = model.get_input_embeddings()(batch["input_ids"]).detach()
    for weight in model.parameters():
        weight.requires_grad_(False)
    divergence = "squared_error" if task[2] is None else "symmetric_kl"
    name = f"MiniLM on {train.parent.name}"
    forward = lambda x, mask: model(inputs_embeds=x, attention_mask=mask).logits  # noqa: E731
    return Problem(name, forward, x, mask, divergence, seeds=3, restarts=2)


def report(console: Console, problem: str, norm: str, radii: dict[float, dict[str, dict[str, float]]]) -> None:
    table = Table(title=f"{problem}, l_{norm}", title_justify="left", box=SIMPLE_HEAD)
    for name in ("ascent", "passes", *[f"{radius:g} rms" for radius in radii]):
        table.add_column(name, justify="left" if name == "ascent" else "right", no_wrap=True)
    first = next(iter(radii.values()))
    for name, row in first.items():
        if name == "largest known":
            cells = [f"{rows[name]['divergence']:.3g}" for rows in radii.values()]
        else:
            cells = [f"{rows[name]['fraction']:.1%}" for rows in radii.values()]
        table.add_row(name, f"{row['passes']}", *cells)
    console.print(table)
    for radius, rows in radii.items():
        comparisons = [
            ("margin, T_x = 0", "paper's, T_x = 1", 1.0),
            ("margin, T_x = 0", "Gaussian, 5 steepest, tuned", 0.9),
            ("margin, T_x = 2", "Gaussian, 10 steepest, tuned", 1.0),
        ]
        if (better := "margin, T_x = 0, the better of both signs") in rows:
            comparisons += [(better, theirs, least) for _, theirs, least in comparisons[:2]]
        for ours, theirs, least in comparisons:
            ratio = rows[ours]["divergence"] / rows[theirs]["divergence"]
            verdict = "" if ratio >= least else f"   LESS THAN {least:g}"
            console.print(f"  {radius:g} rms: {ours} reaches {ratio:.2f} of {theirs}{verdict}")
    console.print()


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draw the fraction of the largest known divergence against passes at the middle radius, one panel a problem."""
    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3.4), sharey=True, squeeze=False)
    families = {"paper's": "C1", "Gaussian": "C2", "margin": "C0", "random": "0.5", "20": "0.5"}
    for axis, result in zip(axes[0], results, strict=True):
        radius, rows = list(result["radii"].items())[len(result["radii"]) // 2]
        for family, color in families.items():
            at = [(row["passes"], row["fraction"]) for name, row in rows.items() if name.startswith(family)]
            style = "o" if family in ("random", "20") else "o-"
            axis.plot(*zip(*sorted(at), strict=True), style, color=color, ms=4, label=family)
        axis.set_title(f"{result['problem']}\nl_{result['norm']}, {radius:g} rms", fontsize=8)
        axis.set_xscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("of the largest divergence")
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("passes", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of the inner maximum of R_s each ascent reaches.")
    add = parser.add_argument
    add("--train", type=Path, help="a TSV as for examples/finetune_text.py: MiniLM is fine-tuned on it")
    add("--dev", type=Path, help="its dev file")
    add("--radius", nargs="+", type=float, default=[0.01, 0.1, 0.3])
    add("--norm", nargs="+", choices=("inf", "2"), default=["inf", "2"])
    add("--threads", type=int, default=2)
    add("--json", type=Path, default=Path("out/ascent.json"))
    add("--figure", type=Path, default=Path("out/ascent.png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for file in (args.json, args.figure):
        file.parent.mkdir(parents=True, exist_ok=True)
    console, results = Console(highlight=False, width=110), []
    problems = small_problems()
    if args.train:
        problems.append(minilm(args.train, args.dev))
    for norm in args.norm:
        for problem in problems:
            scale = 1.0 if norm == "inf" else problem.x[0].numel() ** 0.5  # of one size with the l_inf balls
            radii = {radius: measure(problem, radius * scale, norm) for radius in args.radius}
            report(console, problem.name, norm, radii)
            results.append({"problem": problem.name, "norm": norm, "radii": radii})
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    draw([result for result in results if result["norm"] == args.norm[0]], args.figure)
    console.print(f"{args.json}, {args.figure}")


if __name__ == "__main__":
    main()
