"""What the demo prints and draws: two tables, a verdict and a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from smartreg.demo import compare
from smartreg.demo.digits import CONFIG, METHODS, RADII, Array

SHOWN = 6  # test images in the picture, the first ones


class Measured(NamedTuple):
    """What was measured, by method: accuracy in percent (seeds, radii), R_s (seeds,), and how some images are read."""

    accuracy: dict[str, Array]
    R_s: dict[str, Array]
    images: dict[str, Any]


def half_width(values: Any) -> Any:
    """Return half the width of the 95% t-interval of the mean over the seeds (the first axis)."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)


def shown(values: Any, digits: int = 1, sign: str = "") -> str:
    """Write a mean with its interval."""
    return f"{np.mean(values):{sign}.{digits}f} ± {half_width(values):.{digits}f}"


def table_of(title: str, columns: Iterable[str]) -> Table:
    """Start a table, whose first column is on the left."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for k, name in enumerate(columns):
        table.add_column(name, justify="right" if k else "left")
    return table


def results(found: Measured) -> Table:
    """Make the table of both methods, and of their difference."""
    at = RADII.index(CONFIG.epsilon)
    seeds = len(found.R_s["plain"])
    columns = "", "clean accuracy %", "under attack %", "R_s"
    table = table_of(f"plain against SMART, mean ± 95% interval over {seeds} seeds", columns)
    for name in METHODS:
        accuracy = found.accuracy[name]
        table.add_row(name, shown(accuracy[:, 0]), shown(accuracy[:, at]), shown(found.R_s[name], 2))
    change = found.accuracy["SMART"] - found.accuracy["plain"]
    table.add_section()
    R_s = shown(found.R_s["SMART"] - found.R_s["plain"], 2, "+")
    table.add_row("SMART - plain", shown(change[:, 0], 1, "+"), shown(change[:, at], 1, "+"), R_s)
    return table


def verdict(found: Measured) -> str:
    """Say in words what the table shows."""
    at = RADII.index(CONFIG.epsilon)
    plain, smart = found.accuracy["plain"], found.accuracy["SMART"]
    gain, half = (smart - plain)[:, at].mean(), half_width((smart - plain)[:, at])
    reads = "more" if gain > half else "fewer" if gain < -half else "not reliably more or fewer"
    cost, cost_half = (smart - plain)[:, 0].mean(), half_width((smart - plain)[:, 0])
    clean = "does not measurably change" if abs(cost) <= cost_half else "raises" if cost > 0 else "lowers"
    return (
        f"Under attack SMART reads {reads} images correctly ({smart[:, at].mean():.0f}% against "
        f"{plain[:, at].mean():.0f}%). It {clean} the clean accuracy ({cost:+.1f} ± {cost_half:.1f} points). R_s, the "
        f"largest divergence found in the ball, is {found.R_s['SMART'].mean():.2f} instead of "
        f"{found.R_s['plain'].mean():.2f}."
    )


def side_by_side(runs: dict[str, compare.Outcome]) -> tuple[Table, dict[str, dict[str, float]]]:
    """Make the table of the backends, and return its figures too."""
    title = f"{compare.STEPS} steps of SMART in float64, from the same start"
    table, figures = table_of(title, ("", *runs, "difference")), {}
    for name in next(iter(runs.values())):
        values = {backend: compare.summary(name, run[name]) for backend, run in runs.items()}
        difference = compare.difference([run[name] for run in runs.values()])
        table.add_row(name, *(f"{value:#.11g}" for value in values.values()), f"{difference:.1e}")
        figures[name] = values | {"difference": difference}
    return table, figures


LEGEND = (
    "Weights, batches and noise are the same. loss (with its penalties), R_s and D_Breg: at the last step. |theta| and "
    "|theta~|: the lengths of the weights and of their average after it. difference: the largest between any two, in "
    "any step or weight, as a fraction of the largest value."
)


def draw_picture(path: Path, accuracy: dict[str, Array], images: dict[str, Any], a_class: int) -> None:
    """Draw accuracy against the radius, and some test images at their worst for each network."""

    colours = {"plain": "#c2571a", "SMART": "#1f5fa8"}
    seeds = len(accuracy["plain"])
    figure = Figure(figsize=(11.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    for name, values in accuracy.items():
        mean, half = values.mean(0), half_width(values)
        left.plot(RADII, mean, marker="o", markersize=4, color=colours[name], label=name)
        left.fill_between(RADII, mean - half, mean + half, color=colours[name], alpha=0.2, linewidth=0)
    left.axvline(CONFIG.epsilon, color="0.5", linewidth=1, linestyle=":")
    left.annotate(r"$\epsilon$ of SMART", (CONFIG.epsilon, 96), (5, 0), textcoords="offset points", color="0.35")
    left.set(xlabel=r"radius of the $\ell_\infty$ ball (pixels are in [0, 1])", ylabel="test accuracy under attack, %")
    left.set(ylim=(0, 100), xlim=(0, RADII[-1]))
    left.set_title(f"{a_class} labels a digit, {seeds} seeds: mean and 95% interval", fontsize=11)
    left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    for side in ("top", "right"):
        left.spines[side].set_visible(False)
    right.axis("off")
    right.set_title(f"The first {SHOWN} test images, seed 0, and how they are read", fontsize=11)
    titles = {"clean": "the image", "plain": "attacked,\nplain", "SMART": "attacked,\nSMART"}
    for row, (name, (pictures, reads, truth)) in enumerate(images.items()):
        right.text(0.02, 0.8 - 0.335 * row, titles[name], va="center", color=colours.get(name, "black"), fontsize=10.5)
        for column, (picture, label) in enumerate(zip(pictures[:SHOWN], truth[:SHOWN], strict=True)):
            box = right.inset_axes((0.19 + 0.81 / SHOWN * column, 0.67 - 0.335 * row, 0.75 / SHOWN, 0.26))
            box.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=-CONFIG.epsilon, vmax=1 + CONFIG.epsilon)
            box.set(xticks=[], yticks=[])
            correct = reads is None or reads[column] == label
            colour = "black" if reads is None else "#1a7a3c" if correct else "#b3131b"
            text = f"{label}" if reads is None else f"{reads[column]} {'✓' if correct else '✗'}"
            box.set_title(text, color=colour, fontsize=10, pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
