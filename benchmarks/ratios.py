"""Compare the seconds of steps and passes, round by round, with the plain step: shared by the cost benchmarks."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def in_turn(
    steps: Mapping[str, Callable[[], float]], passes: Callable[[], dict[str, float]], rng: random.Random
) -> dict[str, float]:
    """Time the steps and passes of one round, in a random order, so that none always follows the same one."""
    seconds, found = dict.fromkeys(steps, 0.0), dict[str, float]()
    for name in rng.sample([*steps, None], len(steps) + 1):
        if name is None:
            found = passes()
        else:
            seconds[name] = steps[name]()
    return seconds | found


def summarise(rounds: list[dict[str, float]], needs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Summarise each method in `needs`: quartiles of its ratio to the plain step, its floor, how far it is over that.

    Args:
        rounds: seconds by method and pass, one dict a round.
        needs: for each method how many plain steps "P" and passes its mathematics needs.
    """
    rows = {}
    for name in [name for name in rounds[0] if name in needs]:
        floors = [
            sum(times * r["plain" if part == "P" else part] for part, times in needs[name].items()) for r in rounds
        ]
        low, median, high = quartiles([r[name] / r["plain"] for r in rounds])
        rows[name] = {
            "median": median,
            "low": low,
            "high": high,
            "floor": statistics.median(floor / r["plain"] for floor, r in zip(floors, rounds, strict=True)),
            "over_floor": statistics.median(r[name] / floor for floor, r in zip(floors, rounds, strict=True)) - 1,
        }
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def spread(values: list[float]) -> str:
    """Format the median and the quartiles."""
    low, median, high = quartiles(values)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def report(console: Console, title: str, rows: dict[str, dict[str, float]], passes: dict[str, float]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("method", "x plain", "quartiles", "floor", "over the floor"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name, row in rows.items():
        quartile = "" if name == "plain" else f"{row['low']:.2f} to {row['high']:.2f}"
        over = "" if name == "plain" else f"{row['over_floor']:+.1%}"
        table.add_row(name, f"{row['median']:.2f}", quartile, f"{row['floor']:.2f}", over)
    console.print(table)
    console.print(", ".join(f"{name} = {value:.3f}" for name, value in passes.items()) + " of a plain step\n")


def draw(settings: list[dict[str, Any]], name: str, file: Path) -> None:
    """Draw one panel for each setting: the medians with their quartiles, and the floors as ticks."""
    down, across = math.ceil(len(settings) / 4), min(len(settings), 4)
    size = (3 + 2.2 * across, 0.7 + 3.3 * down)
    figure, axes = plt.subplots(down, across, figsize=size, sharex=True, sharey="row", squeeze=False)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, setting in zip(axes.flat, settings, strict=False):
        for at, (method, row) in enumerate(reversed(setting["rows"].items())):
            color = "C0" if method.startswith("SMART,") else "0.45"
            axis.plot([row["low"], row["high"]], [at, at], color=color, lw=3, alpha=0.5)
            axis.plot(row["median"], at, "o", color=color)
            axis.plot(row["floor"], at, "|", color="k", ms=14)
        axis.set_yticks(range(len(setting["rows"])), list(reversed(setting["rows"])))
        axis.set_title(f"{setting[name]}\n{setting['batch']} x {setting['length']} tokens", fontsize=9)
        axis.set_xlim(0.9, None)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("plain steps (bar: quartiles; tick: floor)", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
