"""Measure how the cost of a step with SMART grows with the batch, the length, T_x and the size of the model.

python benchmarks/scale.py

The model is MiniLM at 4 x 32 tokens, and one thing is changed at a time. The sizes are BERTs of random weights, 2 to
12 layers of width 32 to 768. In each panel all points and methods take turns, round by round. Each point has a plain
step and passes F and X of its own. Plain steps are the median over the rounds of the ratio to the plain step of the
same point and round. The words below a panel are the median over the rounds of each figure, with its quartiles:

- "as batch^k": k is the slope of the least-squares line through log seconds against log batch.
- The trend is the plain steps at the last point over those at the first. If 1 is between the quartiles, it says "no
  trend beyond the noise".
- "an ascent step" is the slope of the least-squares line through plain steps against T_x. Its floor is F + X, the mean
  over the points.
- "straight within" is the largest distance of a median from the line through the medians.

python benchmarks/scale.py --over --rounds 200

prints what the smallest of these models costs above the floor, in milliseconds of CPU time on one thread: the median
over the rounds, with its quartiles. Other load on the machine changes CPU time less than seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
from ratios import in_turn, quartiles, spread, summarise
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from step_cost import FLOORS, OURS, Bench, Step, make_model
from transformers import BertConfig, BertForSequenceClassification

from smartreg_torch import SMARTConfig

BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (16, 32, 64, 128)
BATCH, LENGTH = 4, 32  # while another thing is changed
ASCENT_STEPS = range(6)
PANELS = ("batch", "length", "T_x", "parameters, M")
SIZES = ((2, 32), (2, 128), (4, 256), (4, 512), (8, 512), (12, 768))  # layers, width; the last is BERT-base
STARTS = ("paper's start", "margin start")
METHODS = [f"SMART, {start}: {terms}" for start in STARTS for terms in ("R_s", "R_s + MBPP")]


@dataclass
class Point:
    """One point on the axis of a panel: what is timed there, and the seconds, round by round."""

    at: float
    bench: Bench
    steps: dict[str, Step]
    floors: dict[str, dict[str, float]] = field(default_factory=lambda: FLOORS)
    rounds: list[dict[str, float]] = field(default_factory=list)

    def ratios(self, method: str) -> list[float]:
        """Return the plain steps, round by round."""
        return [r[method] / r["plain"] for r in self.rounds]


def point(at: float, model: Any, batch: int, length: int) -> Point:
    bench = Bench(model, batch, length)
    return Point(at, bench, {method: bench.step(method) for method in ["plain", *METHODS]})


def point_of_ascent(T_x: int, model: Any) -> Point:
    bench = Bench(model, BATCH, LENGTH)
    made = Point(T_x, bench, {"plain": bench.plain}, {"plain": FLOORS["plain"]})
    for start in STARTS:
        method, (settings, lean) = f"SMART, {start}: R_s", OURS[start]
        made.steps[method] = bench.smart(SMARTConfig(**settings | {"ascent_steps": T_x}, mu=0), lean)
        more, floor = T_x - settings["ascent_steps"], FLOORS[method]
        made.floors[method] = floor | {part: floor.get(part, 0) + more for part in ("F", "X")}
    return made


def bert(layers: int, width: int) -> Any:
    torch.manual_seed(0)
    heads, inner = max(1, width // 64), 4 * width
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return BertForSequenceClassification(BertConfig(**shape, intermediate_size=inner))


def point_of_size(layers: int, width: int, device: str) -> Point:
    model = bert(layers, width).to(device)
    return point(sum(weight.numel() for weight in model.parameters()) / 1e6, model, BATCH, LENGTH)


def points_of(panel: str, device: str) -> list[Point]:
    if panel == "parameters, M":
        return [point_of_size(*size, device) for size in SIZES]
    minilm = make_model("minilm").to(device)
    if panel == "batch":
        return [point(batch, minilm, batch, LENGTH) for batch in BATCHES]
    if panel == "length":
        return [point(length, minilm, BATCH, length) for length in LENGTHS]
    return [point_of_ascent(T_x, minilm) for T_x in ASCENT_STEPS]


def measure(points: list[Point], rounds: int) -> None:
    """Measure as step_cost.measure does, all points in each round."""
    rng = random.Random(0)
    for _ in range(rounds + 1):
        for p in points:
            steps = {name: partial(p.bench.seconds, step) for name, step in p.steps.items()}
            p.rounds.append(in_turn(steps, p.bench.passes, rng))
    for p in points:
        p.rounds.pop(0)
        p.bench.close()


def by_round(points: list[Point]) -> list[tuple[dict[str, float], ...]]:
    return list(zip(*(p.rounds for p in points), strict=True))


def slopes(points: list[Point], y: Callable[[dict[str, float]], float], log: bool) -> list[float]:
    """Fit the least-squares line through the points. Return its slopes, round by round."""
    x = [math.log(p.at) if log else p.at for p in points]
    return [statistics.linear_regression(x, [y(r) for r in records]).slope for records in by_round(points)]


def growth(name: str, points: list[Point], method: str) -> str:
    """Describe the exponent of the seconds and the trend in plain steps."""
    said = f"as {name.split(',')[0]}^{spread(slopes(points, lambda r: math.log(r[method]), log=True))}"
    if method == "plain":
        return said
    first, last = points[0], points[-1]
    trend = [b / a for a, b in zip(first.ratios(method), last.ratios(method), strict=True)]
    low, median, high = quartiles(trend)
    verdict = "no trend beyond the noise" if low <= 1 <= high else "falls" if median < 1 else "rises"
    rows = [summarise(p.rounds, p.floors)[method] for p in (first, last)]
    ends = " to ".join(f"{row['median']:.2f}" for row in rows)
    floors = " to ".join(f"{row['floor']:.2f}" for row in rows)
    return f"{said}; in plain steps {verdict}: {ends}, x {spread(trend)}; floor {floors}"


def ascent(points: list[Point], method: str) -> str:
    """Describe what one more ascent step costs."""
    a_step = slopes(points, lambda r: r[method] / r["plain"], log=False)
    floors = [statistics.mean((r["F"] + r["X"]) / r["plain"] for r in records) for records in by_round(points)]
    over = statistics.median(a / floor for a, floor in zip(a_step, floors, strict=True)) - 1
    x, medians = [p.at for p in points], [statistics.median(p.ratios(method)) for p in points]
    line = statistics.linear_regression(x, medians)
    bend = max(abs(y / (line.intercept + line.slope * at) - 1) for at, y in zip(x, medians, strict=True))
    return (
        f"an ascent step costs {spread(a_step)} plain steps; floor F + X = {spread(floors)}, {over:+.1%} over it; "
        f"straight within {bend:.1%}"
    )


def words(name: str, points: list[Point]) -> list[str]:
    said = []
    for method in points[0].steps:
        if name != "T_x":
            said.append(f"{method}: {growth(name, points, method)}")
        elif method != "plain":
            said.append(f"{method}: {ascent(points, method)}")
    over = [(row["over_floor"], p, m) for p in points for m, row in summarise(p.rounds, p.floors).items()]
    most, p, method = max(over, key=lambda found: found[0])
    ms = 1e3 * most / (1 + most) * statistics.median(r[method] for r in p.rounds)
    return [*said, f"furthest over its floor: {method}, at {p.at:.3g}: {most:+.1%}, {ms:.1f} ms"]


def report(console: Console, name: str, points: list[Point]) -> None:
    """Print plain steps and how far they are over the floor, one column for each point."""
    title = f"{name}: x plain (over the floor), {len(points[0].rounds)} rounds"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for p in points:
        table.add_column(f"{p.at:.3g}", justify="right", no_wrap=True)
    table.add_row("plain, ms", *(f"{1e3 * statistics.median(r['plain'] for r in p.rounds):.1f}" for p in points))
    found = [summarise(p.rounds, p.floors) for p in points]
    for method in list(points[0].steps)[1:]:
        table.add_row(method, *(f"{rows[method]['median']:.2f} ({rows[method]['over_floor']:+.0%})" for rows in found))
    console.print(table)
    for line in words(name, points):
        console.print(f"- {line}", soft_wrap=True)
    console.print()


def report_over(console: Console, rounds: int, device: str) -> list[dict[str, float]]:
    """Print the milliseconds above the floor at 1M parameters, of CPU time on a CPU, and those of the parts.

    Return the seconds, round by round.
    """
    p = point_of_size(*SIZES[0], device)
    if device == "cpu":
        p.bench.clock = time.process_time
    measure([p], rounds)
    console.print(f"{p.at:.2g}M parameters, {BATCH} x {LENGTH} tokens, {rounds} rounds: {device} ms above the floor")
    for method in METHODS:
        needs = {("plain" if part == "P" else part): times for part, times in p.floors[method].items()}
        over = [1e3 * (r[method] - sum(times * r[part] for part, times in needs.items())) for r in p.rounds]
        less = [ms - 1e3 * r["U"] for ms, r in zip(over, p.rounds, strict=True)]
        update = f", {spread(less)} of it not theta~'s update" if "MBPP" in method else ""
        console.print(f"- {method}: {spread(over)}{update}", soft_wrap=True)
    parts = [f"{part} = {statistics.median(1e3 * r[part] for r in p.rounds):.2f}" for part in ("plain", *"FXSU")]
    console.print(f"{', '.join(parts)} ms; theta~'s update U is in no floor")
    return p.rounds


def draw(found: dict[str, list[Point]], file: Path) -> None:
    """Draw one panel for each thing that is changed: medians and quartiles, and the floors dotted."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7))
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        x = [p.at for p in points]
        rows = [summarise(p.rounds, p.floors) for p in points]
        for method in list(points[0].steps)[1:]:
            color = f"C{METHODS.index(method)}"
            axis.plot(x, [r[method]["median"] for r in rows], "o-", ms=4, color=color, label=method)
            low, high = ([r[method][side] for r in rows] for side in ("low", "high"))
            axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
            axis.plot(x, [r[method]["floor"] for r in rows], ":", color=color)
        if name != "T_x":
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{at:.3g}" for at in x])
            axis.minorticks_off()
        axis.set_ylim(0, None)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7, loc="lower left")
    figure.supylabel("plain steps (band: quartiles; dotted: floor)", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="How the cost of SMART grows: batch, length, T_x, size of the model.")
    add = parser.add_argument
    add("--panel", nargs="+", choices=PANELS, default=list(PANELS))
    add("--rounds", type=int, default=9)
    add("--over", action="store_true", help="print the ms above the floor at 1M parameters, and nothing else")
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--json", type=Path, default=Path("out/scale.json"))
    add("--figure", type=Path, default=Path("out/scale.png"))
    args = parser.parse_args()
    torch.set_num_threads(1 if args.over else args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for file in (args.json, args.figure):
        file.parent.mkdir(parents=True, exist_ok=True)
    console, found = Console(highlight=False, width=130), {}
    if args.over:
        over = report_over(console, args.rounds, args.device)
        args.json.write_text(json.dumps({"torch": torch.__version__, "seconds": over}, indent=1) + "\n")
        return
    for name in args.panel:
        points = points_of(name, args.device)
        measure(points, args.rounds)
        report(console, name, points)
        found[name] = points
        seconds = {name: {f"{p.at:.3g}": p.rounds for p in points} for name, points in found.items()}
        said = {name: words(name, points) for name, points in found.items()}
        written = {"torch": torch.__version__, "threads": args.threads, "words": said, "seconds": seconds}
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    draw(found, args.figure)
    console.print(f"{args.json}, {args.figure}")


if __name__ == "__main__":
    main()
