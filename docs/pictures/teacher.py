"""Draw theta and theta~ over a run: the weights, and the average of them that D_Breg holds on to.

A network is trained with SMART on two moons. The first panel is the plane in which the weights move most, the first two
principal components of the run. The second is the distance of both to the weights that training began with. The
published beta, 0.99 and then 0.999, is for long runs: it is applied to the same weights, and theta~ hardly leaves.

    python docs/pictures/teacher.py  # writes docs/_generated/teacher.png, and prints the distances; seconds
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.style import context
from numpy.typing import NDArray
from sklearn.datasets import make_moons
from torch import nn
from torch.nn.functional import cross_entropy

from smartreg.proximal import ema_update, momentum
from smartreg_torch import SMART, SMARTConfig

HERE = Path(__file__).parent
POINTS, BATCH, STEPS, RATE = 200, 5, 200, 0.1
CONFIG = SMARTConfig(scale="absolute", epsilon=0.2, norm="2", total_steps=STEPS)  # memory=0.3 is the default
PUBLISHED = CONFIG.replace(beta_early=0.99, beta_late=0.999)

Array = NDArray[np.float64]


def flat(weights: dict[str, torch.Tensor]) -> Array:
    """Put all weights into one vector."""
    return torch.cat([value.detach().flatten() for value in weights.values()]).double().numpy()


def run() -> tuple[Array, Array, list[float]]:
    """Train once. Return theta and theta~ after each step, (steps + 1, weights), and D_Breg of each step."""
    x, y = make_moons(POINTS, noise=0.3, random_state=0)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    theta, teacher, proximity = [], [], []
    with SMART(model, CONFIG, site="input") as smart:
        theta.append(flat(dict(model.named_parameters())))
        teacher.append(flat(smart.teacher))
        for _ in range(STEPS):
            rows = torch.randint(POINTS, (BATCH,))
            output, penalty = smart(x[rows])
            (cross_entropy(output, y[rows]) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
            theta.append(flat(dict(model.named_parameters())))
            teacher.append(flat(smart.teacher))
            proximity.append(smart.metrics["D_Breg"])
    return np.array(theta), np.array(teacher), proximity


def follow(theta: Array, config: SMARTConfig) -> Array:
    """Return the theta~ that these settings would have made of the same weights."""
    teacher = [{"w": theta[0]}]
    for step, now in enumerate(theta[1:], start=1):
        teacher.append(ema_update(teacher[-1], {"w": now}, momentum(step, config)))
    return np.array([weights["w"] for weights in teacher])


def main(folder: Path) -> None:
    """Write teacher.png into the folder, and print how far theta and theta~ are from the start at the end."""
    torch.set_num_threads(1)
    theta, teacher, proximity = run()
    published = follow(theta, PUBLISHED)
    centre = theta.mean(0)
    _, _, axes = np.linalg.svd(theta - centre, full_matrices=False)
    plane = [(weights - centre) @ axes[:2].T for weights in (theta, teacher)]
    far = [np.linalg.norm(weights - theta[0], axis=1) for weights in (theta, teacher, published)]
    with context(HERE / "smartreg.mplstyle"):
        draw(plane, far).savefig(folder / "teacher.png")
    for name, distance in zip(("theta", "theta~", "theta~ with the published beta"), far, strict=True):
        print(f"{name}: {distance[-1]:.2f} from the start")
    print(f"D_Breg: {np.mean(proximity[:20]):.4f} in the first 20 steps, {np.mean(proximity[-20:]):.4f} in the last 20")


def draw(plane: list[Array], far: list[Array]) -> Figure:
    """Draw the paths in the plane, and the distances to the start."""
    figure = Figure(figsize=(7.2, 3.9))
    left, right = figure.subplots(1, 2)
    theta, teacher = plane
    left.plot(*theta.T, color="C1", lw=1, alpha=0.8, label=r"$\theta$, the weights")
    left.plot(*teacher.T, color="C0", lw=2.5, label=r"$\tilde\theta$, their average")
    left.plot(*theta[0], "o", color="#222222", ms=8, zorder=5)
    left.annotate("start", theta[0], (9, 3), textcoords="offset points")
    left.plot(*theta[-1], "s", color="C1", ms=8, zorder=5)
    left.plot(*teacher[-1], "s", color="C0", ms=8, zorder=5)
    left.set(xticks=[], yticks=[], title="The run, seen in a plane")
    left.set(xlabel="the direction that varies most", ylabel="the next one")
    right.plot(far[0], color="C1", lw=1.2, label=r"$\theta$, the weights")
    right.plot(far[1], color="C0", lw=2.5, label=r"$\tilde\theta$, memory = 0.3")
    right.plot(far[2], "--", color="C2", label=r"$\tilde\theta$, published $\beta$")
    right.set(xlabel="optimiser step", title="Distance to the start", xlim=(0, STEPS), ylim=(0, 1.35 * far[0].max()))
    right.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "_generated"
    folder.mkdir(parents=True, exist_ok=True)
    main(folder)
