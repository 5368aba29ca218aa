"""Draw the ball and the ascent in two dimensions: lines 6 to 10 of Algorithm 1, for each norm.

x has two coordinates, so that the ball can be seen. The shading is l_s, the divergence of f(x + delta) from f(x), of a
small network. The ascent and the margin start are computed by `smartreg.perturbation`. Each step has the unit length
that the norm gives it, and the projection brings back what leaves the ball. The ball is large beside the curves of the
network, so that the ascent bends. In a small one both starts lead to much the same place.

    python docs/pictures/ball.py  # writes docs/_generated/ball.png, and prints l_s at both ends; seconds
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.style import context
from numpy.typing import NDArray

from smartreg import SMARTConfig
from smartreg.divergences import symmetric_kl, symmetric_kl_grad
from smartreg.perturbation import NORMS, Ball, climb, margin_gradient, normalize

HERE = Path(__file__).parent
SEED, HIDDEN, CLASSES = 104, 10, 3  # a network with a boundary near x, and an ascent that bends
X = np.zeros((1, 2))
NOISE = np.array([[0.7, 0.45]])  # what a Gaussian might draw; the same in each panel
PAPER = SMARTConfig(scale="absolute", epsilon=1.0, sigma=0.45, eta=0.45, start="gaussian", ascent_steps=4)
MARGIN = PAPER.replace(start="margin", ascent_steps=0)
TITLES = {"inf": r"$\ell_\infty$: each entry clipped", "2": r"$\ell_2$: shortened", "1": r"$\ell_1$: entries cut off"}

Array = NDArray[Any]


def network(seed: int) -> tuple[Array, Array, Array]:
    """Draw the weights of a network from two coordinates to three logits."""
    rng = np.random.default_rng(seed)
    shapes = {(2, HIDDEN): 0.9, (HIDDEN,): 0.7, (HIDDEN, CLASSES): 0.8}
    inner, bias, outer = (scale * rng.normal(size=shape) for shape, scale in shapes.items())
    return inner, bias, outer


def forward(x: Array) -> tuple[Array, Any]:
    """Return the logits, and the function from a gradient at them to the one at x."""
    inner, bias, outer = network(SEED)
    hidden = np.tanh(x @ inner + bias)
    return hidden @ outer, lambda g: ((g @ outer.T) * (1 - hidden**2)) @ inner.T


def ascent(config: SMARTConfig) -> tuple[list[Array], list[Array]]:
    """Return delta at the start and after each step, and where each step leads before the projection."""
    ball = Ball(X, config)
    clean, _ = forward(X)
    deltas, before = [], []

    def gradient(at: list[Array]) -> list[Array]:
        outputs, vjp = forward(X + at[0])
        g = vjp(symmetric_kl_grad(clean, outputs)[1])
        deltas.append(at[0])
        before.append(at[0] + ball.eta * normalize(g, config.norm))
        return [g]

    last = climb([ball], [ball.start(NOISE)], gradient)
    return [*deltas, *last], before


def margin(config: SMARTConfig) -> Array:
    """Return the margin start: the point of the ball furthest towards the nearest decision boundary."""
    clean, vjp = forward(X)
    return Ball(X, config).start(vjp(margin_gradient(clean)))


def main(folder: Path) -> None:
    """Write ball.png into the folder, and print l_s at the end of the ascent and at the margin start."""
    clean, _ = forward(X)
    across = np.linspace(-1.5, 1.5, 401)
    grid = np.stack(np.meshgrid(across, across), -1).reshape(-1, 2)
    outputs, _ = forward(X + grid)
    l_s = symmetric_kl(np.broadcast_to(clean, outputs.shape), outputs).reshape(len(across), -1)
    top = np.argmax(outputs, -1)
    with context(HERE / "smartreg.mplstyle"):
        figure = Figure(figsize=(7.2, 4.1))
        for axes, norm in zip(figure.subplots(1, 3), NORMS, strict=True):
            axes.contourf(across, across, np.sqrt(l_s), 14, cmap="Greys", alpha=0.55)
            axes.contour(across, across, top.reshape(l_s.shape), [0.5, 1.5], colors="C0", linewidths=2)
            draw(axes, norm)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        title = "the darker, the further is f(x + δ) from f(x)"
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, handletextpad=0.5, columnspacing=1.2, title=title
        )
        figure.savefig(folder / "ball.png")
    for norm in NORMS:
        ends = ascent(PAPER.replace(norm=norm))[0][-1], margin(MARGIN.replace(norm=norm))
        found = [float(symmetric_kl(clean, forward(X + delta)[0])[0]) for delta in ends]
        print(f"norm {norm}: l_s {found[0]:.2f} after {PAPER.ascent_steps} steps, {found[1]:.2f} at the margin start")


def draw(axes: Any, norm: str) -> None:
    """Draw the ball of a norm, the path of the ascent, and the margin start."""
    corners = np.stack([np.cos(angles := np.linspace(0, 2 * np.pi, 721)), np.sin(angles)], -1)
    rim = corners / np.linalg.norm(corners, float(norm), -1, keepdims=True)
    deltas, before = ascent(PAPER.replace(norm=norm))
    path, outside = np.concatenate(deltas), np.concatenate(before)
    axes.plot(*rim.T, color="#222222", lw=1.6)
    axes.plot(0, 0, "+", color="#222222", ms=10, mew=2, label="x")
    axes.plot(*path[0], "o", color="C1", mfc="white", mew=2, ms=8, label="start (noise)", zorder=4)
    for begin, step, end in zip(path[:-1], outside, path[1:], strict=True):
        axes.annotate("", step, begin, arrowprops={"arrowstyle": "->", "color": "C1", "lw": 1.8, "shrinkB": 0})
        if np.abs(step - end).max() > 1e-3:
            axes.plot(*np.stack([step, end]).T, ":", color="C1", lw=1.8)
    axes.plot([], [], color="C1", label="step")
    axes.plot([], [], ":", color="C1", label="projection")
    axes.plot(*path[-1], "o", color="C1", ms=9, label="end of the ascent", zorder=4)
    axes.plot(*margin(MARGIN.replace(norm=norm))[0], "*", color="C2", ms=15, label="margin start", zorder=5)
    axes.plot([], [], color="C0", label="decision boundary")
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
    axes.set_title(TITLES[norm], fontsize=12)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
