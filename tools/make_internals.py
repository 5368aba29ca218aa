"""Draw docs/internals.svg: one step of Algorithm 1 in time, each part in its ring, with its file and the paper's line.

python tools/make_internals.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "internals.svg"
INK, PALE = "#1d2733", "#5b6775"
HEIGHT = 1.5  # of a box; a ring is 2 high


class Ring(NamedTuple):
    """Describe a row of the picture. A file imports files of its own ring and of the rings below, never above."""

    name: str
    job: str
    colour: str


class Part(NamedTuple):
    """Describe a box: what happens, in which ring, from when to when, in which file, at which line of Algorithm 1."""

    title: str
    ring: int
    start: float
    end: float
    text: str
    files: str
    line: str = ""


RINGS = [  # the innermost first, which is the lowest
    Ring("equations", "arrays and settings,\nno model", "#dcebdc"),
    Ring("passes", "how a model\nis run again", "#dbe7f5"),
    Ring("step", "one mini-batch", "#fbe6cf"),
    Ring("drivers", "what people call", "#ece2f3"),
]
PARTS = [
    Part("call", 3, 0, 1.9, "smart(**batch)\nfit: train_step", "smart.py | engine.py"),
    Part("optimiser", 3, 10.1, 12.1, "backward of L + penalty;\ntheta moves", "your loop | fit", "line 11"),
    Part("update", 3, 12.4, 14.2, "count the step,\nlet theta~ move", "smart.py | penalty.py", "line 12"),
    Part("read", 2, 0, 1.9, "outputs to compare;\nchecks in the first step", "step.py | penalty.py"),
    Part("smart_step", 2, 2.2, 9.8, "", "step.py", "lines 6 to 10, and the penalty of line 11"),
    Part("clean pass", 1, 0, 1.9, "f(x; theta), and x\nat the site", "passes.py, site.py", "line 5"),
    Part(
        "pass at x + delta",
        1,
        2.2,
        4.6,
        "the same dropout and\nbuffers, T_x times",
        "passes.py, replay.py",
        "line 8",
    ),
    Part("teacher's pass", 1, 4.9, 7.2, "f(x; theta~),\nwithout a graph", "passes.py, teacher.py"),
    Part("perturbed pass", 1, 7.5, 9.8, "f(x + delta; theta),\nfrom the clean x", "passes.py"),
    Part("theta~", 1, 12.4, 14.2, "kept by name,\nin float32", "teacher.py", "line 14"),
    Part("delta", 0, 2.2, 4.6, "start, then g / ||g||,\nstep and project", "perturbation.py", "lines 6 to 10"),
    Part("D_Breg", 0, 4.9, 7.2, "mean of l_s(f(x; theta),\nf(x; theta~))", "divergences.py, proximal.py", "equation 3"),
    Part("R_s", 0, 7.5, 9.8, "mean of l_s(f(x + delta),\nf(x))", "divergences.py, proximal.py", "equation 2"),
    Part("theta~ <-", 0, 12.4, 14.2, "(1 - beta) theta\n+ beta theta~", "proximal.py", "line 14"),
]


# What smart_step computes, in PyTorch's order and in Keras'. The boxes below it are in PyTorch's.
ORDERS = [
    ("PyTorch:", 2.32, 5.2),
    ("delta", 3.7, 5.2),
    ("then D_Breg, while there is one graph", 6.05, 5.2),
    ("then R_s", 8.9, 5.2),
    ("Keras:", 2.32, 4.9),
    ("delta", 3.7, 4.9),
    ("then R_s", 6.05, 4.9),
    ("then D_Breg", 8.9, 4.9),
    ("penalty = lambda_s R_s + mu D_Breg", 6.05, 4.58),
]


def draw_part(axis: Axes, part: Part) -> None:
    low, width = 2 * part.ring + 0.25, part.end - part.start
    colour = RINGS[part.ring].colour
    shape = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((part.start, low), width, HEIGHT, shape, fc=colour, ec=INK, lw=1))
    left = part.start + 0.12
    axis.text(left, low + HEIGHT - 0.12, part.title, va="top", weight="bold", size=9.5, color=INK)
    axis.text(part.end - 0.1, low + HEIGHT - 0.13, part.line, va="top", ha="right", size=8, color="#a03a10")
    axis.text(left, low + 0.78, part.text, va="center", size=8.5, color=INK, linespacing=1.2)
    axis.text(left, low + 0.1, part.files, va="bottom", family="monospace", size=7.5, color=PALE)


def draw_arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    arrow = {"arrowstyle": "->", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=arrow)
    if text:
        at = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axis.text(at[0] + 0.08, at[1], text, va="center", size=8, color=INK)


def draw_arrows(axis: Axes) -> None:
    for middle in (0.95, 3.4, 6.05, 8.65):  # the step runs the model
        draw_arrow(axis, (middle - 0.2, 4.25), (middle - 0.2, 3.75))
        draw_arrow(axis, (middle + 0.2, 3.75), (middle + 0.2, 4.25))
    draw_arrow(axis, (0.95, 6.25), (0.95, 5.75))
    draw_arrow(axis, (1.9, 5.0), (2.2, 5.0))
    draw_arrow(axis, (3.2, 1.75), (3.2, 2.25), "x + delta")
    draw_arrow(axis, (4.3, 2.25), (4.3, 1.75), "g")
    for middle in (6.05, 8.65):  # outputs to the divergence
        draw_arrow(axis, (middle, 2.25), (middle, 1.75), "outputs")
    draw_arrow(axis, (9.8, 5.0), (11.1, 6.25))
    axis.text(10.6, 5.35, "penalty", size=8.5, color=INK, va="center")
    draw_arrow(axis, (12.1, 7.0), (12.4, 7.0))
    draw_arrow(axis, (13.3, 6.25), (13.3, 3.75), "moves now?")
    draw_arrow(axis, (13.3, 2.25), (13.3, 1.75), "theta, theta~")
    dashed = {"arrowstyle": "->", "color": PALE, "lw": 1, "ls": "--", "connectionstyle": "arc3,rad=0"}
    axis.annotate("", (7.2, 3.0), (12.4, 3.0), arrowprops=dashed, zorder=0)
    axis.text(11.1, 3.1, "theta~ of the next step", size=8, color=PALE, ha="center")


def draw() -> None:
    settings = {"svg.fonttype": "none", "svg.hashsalt": "smartreg", "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure = plt.figure(figsize=(13.4, 7.2), facecolor="white")
        axis = figure.add_axes((0.005, 0.005, 0.99, 0.99))
        axis.set(xlim=(-1.75, 14.4), ylim=(-0.45, 8.35))
        axis.axis("off")
        for k, ring in enumerate(RINGS):
            axis.axhspan(2 * k, 2 * k + 2, color=ring.colour, alpha=0.35, lw=0)
            axis.text(-1.65, 2 * k + 1.15, ring.name, weight="bold", size=11, color=INK)
            axis.text(-1.65, 2 * k + 0.8, ring.job, va="top", size=8, color=PALE)
        for part in PARTS:
            draw_part(axis, part)
        for text, x, y in ORDERS:
            axis.text(x, y, text, va="center", ha="center" if x > 2.5 else "left", size=8.5, color=INK)
        draw_arrows(axis)
        axis.text(-1.65, 8.12, "One optimiser step, from left to right", size=10.5, weight="bold", color=INK)
        note = "Imports go down, never up. PyTorch's file | Keras' file. Lines: the paper's Algorithm 1."
        axis.text(14.2, 8.12, note, size=8.5, color=PALE, ha="right")
        axis.text(
            -1.65,
            -0.25,
            "R_s alone: no teacher's pass. D_Breg alone: no ascent and no perturbed pass. "
            "In Keras train_step runs the clean pass, and penalty.py, a driver, reads its outputs.",
            size=8.5,
            color=PALE,
        )
        figure.savefig(PAGE, metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    draw()
