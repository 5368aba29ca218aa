"""What SMART does, in a minute and with nothing to download: handwritten digits, few labels, worst-case perturbations.

    python examples/demo.py

A small network is pre-trained on seven of the ten digits and fine-tuned on all ten from a few labels, plain and with
SMART. Then every test image is attacked inside an l_inf ball. Everything that another backend needs for the same
experiment is in functions of NumPy arrays: `digits`, `initial_weights`, `few_labels`, `batches` and `standard_normal`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.perturbation import ascend

Array = NDArray[Any]
Weights = dict[str, Array]

NEW_CLASSES = (7, 8, 9)  # these the pre-training has not seen
HIDDEN, DROPOUT = 128, 0.2
PRETRAINING_STEPS, STEPS, BATCH = 300, 300, 20
# Pixels are in [0, 1], and the radius is in their units: scale="absolute". beta: theta~ remembers about ten steps. With
# the published 0.999 it would stay at the random new head, and hold the model there, in a run of 300 steps.
CONFIG = SMARTConfig(
    scale="absolute",
    epsilon=0.1,
    sigma=0.1,
    eta=10.0,
    start="gaussian",
    ascent_steps=1,
    lambda_s=1.0,
    mu=1.0,
    beta_early=0.9,
    beta_late=0.9,
    total_steps=STEPS,
)
METHODS = {"plain": CONFIG.replace(lambda_s=0, mu=0), "SMART": CONFIG}
ATTACK_STEPS, ATTACK_STARTS = 20, 4
SHOWN = 6  # test images in the picture, the first ones
RADII = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)


class Digits(NamedTuple):
    """8 x 8 images as rows of 64 pixels in [0, 1], and their labels."""

    x: Array
    y: Array
    x_test: Array
    y_test: Array


def digits() -> Digits:
    data = load_digits()
    x, x_test, y, y_test = train_test_split(
        (data.data / 16).astype(np.float32), data.target, test_size=0.4, stratify=data.target, random_state=0
    )
    return Digits(x, y, x_test, y_test)


def few_labels(data: Digits, a_class: int, seed: int) -> tuple[Array, Array]:
    """`a_class` training images of each digit, others for each seed."""
    rng = np.random.default_rng(seed)
    at = np.concatenate([rng.permutation(np.flatnonzero(data.y == k))[:a_class] for k in range(10)])
    return data.x[at], data.y[at]


def initial_weights(pretrained: Weights, seed: int) -> Weights:
    """The pre-trained layers under a new head for ten classes: where every fine-tuning of that seed begins."""
    rng = np.random.default_rng(seed)
    head = rng.normal(scale=HIDDEN**-0.5, size=(HIDDEN, 10)).astype(np.float32)
    return {**pretrained, "W3": head, "b3": np.zeros(10, np.float32)}


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[Array]:
    """The row numbers of each step's batch: epochs of random order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(n) for _ in range(-(-steps * size // n))])
    yield from (order[k * size : (k + 1) * size] for k in range(steps))


def standard_normal(seed: int) -> Callable[[tuple[int, ...]], Array]:
    """The noise of the Gaussian start, draw by draw."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def network(weights: Weights) -> nn.Sequential:
    """Two ReLU layers with dropout, and a head."""
    linear = []
    for k in (1, 2, 3):
        W, b = weights[f"W{k}"], weights[f"b{k}"]
        layer = nn.Linear(*W.shape)
        layer.load_state_dict({"weight": torch.from_numpy(W.T.copy()), "bias": torch.from_numpy(b)})
        linear.append(layer)
    return nn.Sequential(
        linear[0], nn.ReLU(), nn.Dropout(DROPOUT), linear[1], nn.ReLU(), nn.Dropout(DROPOUT), linear[2]
    )


def train(model: nn.Module, x: Array, y: Array, config: SMARTConfig, seed: int) -> None:
    """Algorithm 1 in a plain loop. With lambda_s = mu = 0 it is plain training, bit for bit."""
    draw = standard_normal(seed)
    torch.manual_seed(seed)  # dropout: the same masks for every method
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    with SMART(model, config, site="input", noise=lambda like: torch.from_numpy(draw(tuple(like.shape)))) as smart:
        for at in batches(len(x), BATCH, config.total_steps or 0, seed):
            output, penalty = smart(torch.from_numpy(x[at]))
            loss = cross_entropy(output, torch.from_numpy(y[at])) + penalty
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
    model.eval()


def pretrain(data: Digits) -> Weights:
    """The two hidden layers after training on the digits that are not new, as NumPy arrays (in, out)."""
    rng = np.random.default_rng(0)
    shapes = {"1": (64, HIDDEN), "2": (HIDDEN, HIDDEN), "3": (HIDDEN, 10)}
    weights: Weights = {}
    for k, (n_in, n_out) in shapes.items():
        weights[f"W{k}"] = rng.normal(scale=(2 / n_in) ** 0.5, size=(n_in, n_out)).astype(np.float32)
        weights[f"b{k}"] = np.zeros(n_out, np.float32)
    model = network(weights)
    known = ~np.isin(data.y, NEW_CLASSES)
    train(model, data.x[known], data.y[known], METHODS["plain"].replace(total_steps=PRETRAINING_STEPS), seed=0)
    trained = {"1": model[0], "2": model[3]}
    return {
        name: array
        for k, layer in trained.items()
        for name, array in ((f"W{k}", layer.weight.detach().numpy().T), (f"b{k}", layer.bias.detach().numpy()))
    }


def worst(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """x + delta, ||delta||_inf <= radius, that is misread, else of the largest cross-entropy found: sign ascent.

    It knows the labels and nothing of SMART. The first start is x, the others are uniform in the ball; they attack the
    images that are still read correctly.
    """
    generator = torch.Generator().manual_seed(0)
    found, largest, misread = x.clone(), torch.full(y.shape, -torch.inf), torch.zeros(y.shape, dtype=torch.bool)
    for restart in range(ATTACK_STARTS):
        rows = torch.nonzero(~misread).squeeze(-1)
        delta = radius * (2 * torch.rand(x.shape, generator=generator) - 1)[rows] * (restart > 0)
        for step in range(ATTACK_STEPS + 1):
            point = (x[rows] + delta).requires_grad_()
            z = model(point)
            losses = cross_entropy(z, y[rows], reduction="none")
            (g,) = torch.autograd.grad(losses.sum(), point)
            wrong, losses = z.argmax(-1) != y[rows], losses.detach()
            better = (wrong & ~misread[rows]) | ((wrong == misread[rows]) & (losses > largest[rows]))
            found[rows[better]], largest[rows[better]] = point.detach()[better], losses[better]
            misread[rows] |= wrong
            # long steps first, to search, and short ones last, to settle
            length = radius * (0.5 - 0.45 * step / ATTACK_STEPS)
            delta = (delta + length * g.sign()).clamp(-radius, radius)
    return found


def roughness(model: nn.Module, x: Tensor) -> float:
    """R_s on x in the ball of CONFIG, the maximum looked for with ten steps from the margin start."""
    hard = CONFIG.replace(start="margin", ascent_steps=10)
    with torch.no_grad():
        clean = model(x)
    delta = ascend(model, x, clean, hard, None)
    with torch.no_grad():
        return float(symmetric_kl(model(x + delta), clean).mean())


def half_width(values: Any) -> Any:
    """Of the 95% t-interval of the mean over the seeds (the first axis)."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)


def shown(values: Any, digits: int = 1, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.{digits}f} ± {half_width(values):.{digits}f}"


def measure(seeds: int, a_class: int) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Accuracy in percent (seeds, radii) and R_s (seeds,) of each method, and what they read of some test images."""
    data = digits()
    x, y = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
    accuracy: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    R_s: dict[str, list[float]] = {name: [] for name in METHODS}
    images: dict[str, Any] = {"clean": (data.x_test[:SHOWN], None, data.y_test[:SHOWN])}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("pre-training", total=seeds * len(METHODS) * len(RADII))
        pretrained = pretrain(data)
        for seed in range(seeds):
            x_few, y_few = few_labels(data, a_class, seed)
            for name, config in METHODS.items():
                progress.update(bar, description=f"seed {seed}, {name}")
                model = network(initial_weights(pretrained, seed))
                train(model, x_few, y_few, config, seed)
                accuracy[name].append([])
                for radius in RADII:
                    attacked = worst(model, x, y, radius) if radius else x
                    with torch.no_grad():
                        read = model(attacked).argmax(-1)
                    accuracy[name][-1].append(100 * float((read == y).float().mean()))
                    if seed == 0 and radius == CONFIG.epsilon:
                        images[name] = (attacked[:SHOWN].numpy(), read[:SHOWN].numpy(), data.y_test[:SHOWN])
                    progress.advance(bar)
                R_s[name].append(roughness(model, x))
    return ({name: np.array(v) for name, v in accuracy.items()}, {name: np.array(v) for name, v in R_s.items()}, images)


def draw_picture(path: Path, accuracy: dict[str, Array], images: dict[str, Any], a_class: int) -> None:
    """Accuracy against the radius, and some test images at their worst for each network."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"plain": "#c2571a", "SMART": "#1f5fa8"}
    seeds = len(accuracy["plain"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(1, 1.05), layout="constrained")
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
        for column, (picture, label) in enumerate(zip(pictures, truth, strict=True)):
            box = right.inset_axes((0.19 + 0.81 / SHOWN * column, 0.67 - 0.335 * row, 0.75 / SHOWN, 0.26))
            box.imshow(picture.reshape(8, 8), cmap="gray_r", vmin=-CONFIG.epsilon, vmax=1 + CONFIG.epsilon)
            box.set(xticks=[], yticks=[])
            correct = reads is None or reads[column] == label
            colour = "black" if reads is None else "#1a7a3c" if correct else "#b3131b"
            text = f"{label}" if reads is None else f"{reads[column]} {'✓' if correct else '✗'}"
            box.set_title(text, color=colour, fontsize=10, pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="SMART on handwritten digits, against plain fine-tuning.")
    parser.add_argument("--seeds", type=int, default=5, help="fine-tuning runs of each method (default: %(default)s)")
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each digit (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    args = parser.parse_args()
    if args.seeds < 2 or not 1 <= args.labels <= 100:
        parser.error("--seeds must be at least 2 (an interval needs two) and --labels between 1 and 100")
    began = time.perf_counter()
    torch.set_num_threads(1)  # the network is too small for more
    console = Console(highlight=False)
    console.print(
        f"A network pre-trained on the digits 0 to 6 is fine-tuned on all ten from {args.labels} labelled images of "
        f"each, plain and with SMART ({args.seeds} seeds). Then each of the test images is attacked: every pixel may "
        f"move by {CONFIG.epsilon:g} of its range, in the worst direction that {ATTACK_STEPS} gradient steps "
        f"from {ATTACK_STARTS} starts find.\n"
    )
    accuracy, R_s, images = measure(args.seeds, args.labels)
    at = RADII.index(CONFIG.epsilon)
    columns = ("", "clean accuracy %", "accuracy % under attack", "R_s")
    table = Table(title=f"mean ± 95% interval over {args.seeds} seeds", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for name, values in accuracy.items():
        table.add_row(name, shown(values[:, 0]), shown(values[:, at]), shown(R_s[name], 2))
    difference = accuracy["SMART"] - accuracy["plain"]
    table.add_section()
    table.add_row(
        "SMART - plain",
        shown(difference[:, 0], 1, "+"),
        shown(difference[:, at], 1, "+"),
        shown(R_s["SMART"] - R_s["plain"], 2, "+"),
    )
    console.print(table)
    gain, half = difference[:, at].mean(), half_width(difference[:, at])
    verdict = "more" if gain > half else "fewer" if gain < -half else "not reliably more or fewer"
    cost, cost_half = difference[:, 0].mean(), half_width(difference[:, 0])
    clean = "does not measurably change" if abs(cost) <= cost_half else "raises" if cost > 0 else "lowers"
    console.print(
        f"\nUnder attack SMART reads {verdict} images correctly ({accuracy['SMART'][:, at].mean():.0f}% against "
        f"{accuracy['plain'][:, at].mean():.0f}%), and it {clean} the clean accuracy ({cost:+.1f} ± {cost_half:.1f} "
        f"points). R_s, the largest divergence found in the ball, is {R_s['SMART'].mean():.2f} instead of "
        f"{R_s['plain'].mean():.2f}."
    )
    draw_picture(args.out, accuracy, images, args.labels)
    console.print(f"The picture is in {args.out} ({time.perf_counter() - began:.0f} seconds).")
    if args.json:
        methods = {
            name: {"accuracy": accuracy[name].tolist(), "R_s": R_s[name].tolist(), "config": METHODS[name].to_dict()}
            for name in METHODS
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"labels": args.labels, "radii": RADII, "methods": methods}, indent=1) + "\n")


if __name__ == "__main__":
    main()
