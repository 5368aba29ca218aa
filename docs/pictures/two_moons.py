"""Draw what R_s does to a decision boundary: two moons, few and noisy, trained plain and with SMART.

Each panel has the training points and the probability that the network gives to one class. Both networks have the same
initial weights and see the same batches in the same order. They differ in the penalty alone. The test scores are means
over seeds, each with points and initial weights of its own.

    python docs/pictures/two_moons.py  # writes docs/_generated/two_moons.png, and prints the scores; half a minute
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.style import context
from scipy import stats
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smartreg_torch import SMART, SMARTConfig

HERE = Path(__file__).parent
POINTS, NOISE, BATCH, STEPS, SEEDS = 40, 0.3, 10, 300, 10
# The coordinates of a point have a meaning, so the radius is in their own units: two thirds of the noise.
SETTINGS = SMARTConfig(scale="absolute", epsilon=0.2, norm="2", total_steps=STEPS)
METHODS = {"plain": SETTINGS.replace(lambda_s=0, mu=0), "SMART": SETTINGS}


def moons(points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noisy points of two half circles, and which of the two they are of."""
    x, y = make_moons(points, noise=NOISE, random_state=seed)
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def network(seed: int) -> nn.Module:
    """Make a network of two hidden layers of 64, from two coordinates to two logits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def train(x: Tensor, y: Tensor, config: SMARTConfig, seed: int) -> nn.Module:
    """Train a network on all points, in batches whose order the seed decides."""
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    order = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(len(x), generator=order) for _ in range(STEPS * BATCH // len(x))]
    with SMART(model, config, site="input") as smart:
        for rows in torch.cat(epochs).split(BATCH):
            output, penalty = smart(x[rows])
            (cross_entropy(output, y[rows]) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
    return model.eval()


def main(folder: Path) -> None:
    """Write two_moons.png into the folder, and print the test scores of each method."""
    torch.set_num_threads(1)
    x_test, y_test = moons(5000, 1000)
    shown, scores = {}, {}
    for name, config in METHODS.items():
        found = []
        for seed in range(SEEDS):
            model = train(*moons(POINTS, seed), config, seed)
            shown.setdefault(name, model)
            with torch.no_grad():
                z = model(x_test)
            found.append((100 * float((z.argmax(-1) == y_test).float().mean()), float(cross_entropy(z, y_test))))
        scores[name] = np.array(found)
        mean, deviation = scores[name].mean(0), scores[name].std(0, ddof=1)
        print(f"{name}: accuracy {mean[0]:.1f} % (sd {deviation[0]:.1f}), NLL {mean[1]:.2f} (sd {deviation[1]:.2f})")
    apart = scores["SMART"] - scores["plain"]
    (points, nll), half = apart.mean(0), stats.t.ppf(0.975, SEEDS - 1) * stats.sem(apart)
    print(f"SMART minus plain: {points:+.1f} ± {half[0]:.1f} points, NLL {nll:+.2f} ± {half[1]:.2f}")
    with context(HERE / "smartreg.mplstyle"):
        draw(shown, scores).savefig(folder / "two_moons.png")


def draw(models: dict[str, nn.Module], scores: dict[str, np.ndarray]) -> Figure:
    """Draw a panel for each network, trained on the points of seed 0."""
    x, y = moons(POINTS, 0)
    across, up = np.linspace(-1.9, 2.9, 240), np.linspace(-1.5, 2, 200)
    grid = torch.from_numpy(np.stack(np.meshgrid(across, up), -1)).float()
    figure = Figure(figsize=(7.2, 4.1))
    for axes, (name, model) in zip(figure.subplots(1, 2, sharey=True), models.items(), strict=True):
        with torch.no_grad():
            p = model(grid).softmax(-1)[..., 1]
        # the two ends of PRGn can be told apart without colour vision
        filled = axes.contourf(across, up, p, np.linspace(0, 1, 11), cmap="PRGn", alpha=0.75)
        axes.contour(across, up, p, [0.5], colors="#222222", linewidths=2)
        for label, colour, marker in ((0, "#5b2a73", "o"), (1, "#0d6b35", "^")):
            axes.scatter(*x[y == label].T, s=42, c=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=3)
        accuracy, nll = scores[name].mean(0)
        axes.set_title(name, weight="bold")
        axes.set_xlabel(f"test accuracy {accuracy:.1f} %\nNLL {nll:.2f}")
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(filled, ax=figure.axes, orientation="horizontal", shrink=0.7, aspect=35, ticks=[0, 0.5, 1])
    bar.set_label(f"probability of ▲; {POINTS} noisy points; scores: means over {SEEDS} seeds")
    bar.outline.set_visible(False)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
