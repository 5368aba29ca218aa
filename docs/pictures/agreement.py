"""Draw how far the three backends are apart: each function, and 50 steps of Algorithm 1.

The first panel has, for each function, the largest disagreement of two backends over random cases that hypothesis
searches for the worst, in units in the last place. `tools/disagreement.py` makes the table of docs/backends.md with
more of them. The second panel trains the reference network with each backend's functions, from one file of weights,
batches and noise. It has the largest difference of a weight to NumPy's, relative to the largest entry.

    python docs/pictures/agreement.py  # writes docs/_generated/agreement.png, and prints both; half a minute
"""

from __future__ import annotations

import itertools
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.style import context

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEARCH = runpy.run_path(str(ROOT / "tools" / "disagreement.py"))  # first: it sets what TensorFlow reads at its import

from smartreg.checking import BACKENDS, Face, load_backend, run_trajectory  # noqa: E402
from smartreg.checking.bounds import eps  # noqa: E402

EXAMPLES = 100
FUNCTIONS = ("symmetric_kl", "bernoulli_symmetric_kl", "squared_error", "normalize")
FUNCTIONS += ("project_linf_ball", "project_l2_ball", "project_l1_ball", "ema_update", "bregman_divergence")
NAMES = {"numpy": "NumPy", "torch": "PyTorch", "tf": "Keras"}


def apart(dtype: str, backends: dict[str, Any]) -> dict[str, dict[tuple[str, str], float]]:
    """Return the largest disagreement of each pair of backends, by function, in units in the last place."""
    worst: dict[Any, float] = {}
    for function in FUNCTIONS:
        SEARCH["search"](function, dtype, EXAMPLES, backends, worst)
    names = dict.fromkeys(name for name, _, _ in worst)
    pairs = list(itertools.combinations(backends, 2))
    return {name: {pair: worst[name, dtype, pair] for pair in pairs} for name in names}


def drift(dtype: str, backends: dict[str, Any]) -> dict[str, list[float]]:
    """Return how far the weights of each backend are from NumPy's after each of 50 steps of Algorithm 1."""
    runs = {name: run_trajectory("paper", Face(backend, dtype), dtype) for name, backend in backends.items()}
    found: dict[str, list[float]] = {name: [] for name in backends if name != "numpy"}
    for steps in zip(*runs.values(), strict=True):
        by_name = dict(zip(runs, steps, strict=True))
        reference = by_name["numpy"].theta
        for name, distances in found.items():
            theta = by_name[name].theta
            distances.append(max(float(np.abs(theta[k] - w).max() / np.abs(w).max()) for k, w in reference.items()))
    return found


def main(folder: Path) -> None:
    """Write agreement.png into the folder, and print the worst disagreement and the differences after 50 steps."""
    backends = {name: load_backend(name) for name in BACKENDS}
    found = apart("float32", backends)
    drifts = {dtype: drift(dtype, backends) for dtype in ("float32", "float64")}
    with context(HERE / "smartreg.mplstyle"):
        draw(found, drifts).savefig(folder / "agreement.png")
    for name, pairs in found.items():
        print(f"{name}: {max(pairs.values()):.2g} units in the last place")
    for dtype, runs in drifts.items():
        for name, distances in runs.items():
            print(f"Algorithm 1, {dtype}, {NAMES[name]}: {max(distances):.1e} of the largest weight")


def draw(found: dict[str, dict[tuple[str, str], float]], drifts: dict[str, dict[str, list[float]]]) -> Figure:
    """Draw the disagreement of each function, and below it the differences over the run."""
    figure = Figure(figsize=(6.4, 7.8))
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    draw_functions(above, found)
    draw_run(below, drifts)
    return figure


def draw_functions(figure: Any, found: dict[str, dict[tuple[str, str], float]]) -> None:
    """Draw a row for each function, and a dot for each pair of backends."""
    axes, rows = figure.subplots(), np.arange(len(found))[::-1]
    for k, pair in enumerate(next(iter(found.values()))):
        label = " and ".join(NAMES[name] for name in pair)
        values, shift = [pairs[pair] for pairs in found.values()], 0.24 * (1 - k)
        axes.plot(values, rows + shift, "os^"[k], color=f"C{(1, 0, 2)[k]}", ms=6, label=label, clip_on=False, zorder=3)
    axes.set_yticks(rows, [shown(name) for name in found])
    most = max(max(pairs.values()) for pairs in found.values())
    axes.set(xlim=(0, 1.1 * most), ylim=(-0.5, len(found) - 0.5), xlabel="units in the last place")
    axes.grid(color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    figure.suptitle(f"Largest disagreement in {EXAMPLES} searched cases, float32", fontsize=13)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.1, columnspacing=1)


def shown(name: str) -> str:
    """Write a function's name in words."""
    words = name.replace("_", " ").replace(": gradient", ", gradient").replace(" kl", " KL").replace("linf", "l∞")
    return (
        words.replace("bernoulli symmetric", "Bernoulli")
        .replace("ema update", "update of theta~")
        .replace("bregman", "Bregman")
    )


def draw_run(figure: Any, drifts: dict[str, dict[str, list[float]]]) -> None:
    """Draw the difference of the weights over the run, in both types."""
    axes = figure.subplots()
    for dtype, runs in drifts.items():
        axes.axhline(eps(dtype), color="#777777", lw=1.2, ls=":")
        axes.annotate(f"{dtype}: last place", (50, eps(dtype)), (0, 5), textcoords="offset points", ha="right")
        for (name, distances), line, colour in zip(runs.items(), ("-", "--"), ("C1", "C2"), strict=True):
            label = NAMES[name] if dtype == "float32" else None
            above_0 = [distance or np.nan for distance in distances]  # the axis is logarithmic
            axes.plot(range(1, len(above_0) + 1), above_0, line, color=colour, label=label)
    axes.set(yscale="log", xlim=(1, 50), ylim=(1e-18, 1e-4), xlabel="step of Algorithm 1")
    axes.legend(loc="center right", title="minus NumPy", alignment="left")
    figure.suptitle("Largest difference of a weight, relative to the largest", fontsize=13)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
