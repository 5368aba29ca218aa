"""Show what SMART does, in a minute and without a download: handwritten digits, few labels, worst-case perturbations.

    python examples/demo.py

A small network is pre-trained on seven of the ten digits. It is fine-tuned on all ten from a few labels, plain and with
SMART. Then every test image is attacked inside an l_inf ball. At the end NumPy, PyTorch and Keras train side by side,
from the same weights, with the same batches and noise. `same_task` returns these as NumPy arrays.
"""

from __future__ import annotations

import argparse
import json
import os
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

import smartreg.divergences as reference
from smartreg.perturbation import ascend as ascend_numpy
from smartreg.proximal import ema_update, mean_examples, momentum
from smartreg.reference import task_loss
from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.perturbation import ascend

Array = NDArray[Any]
Weights = dict[str, Array]

NEW_CLASSES = (7, 8, 9)  # not in the pre-training
HIDDEN, DROPOUT = 128, 0.2
PRETRAINING_STEPS, STEPS, BATCH = 300, 300, 20
# Pixels are in [0, 1], and scale="absolute" gives the radius in their units. With beta = 0.9 theta~ remembers about ten
# steps. With the published 0.999 it would stay at the random new head in a run of 300 steps, and keep the model there.
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
COMPARED_STEPS, RATE = 20, 0.125  # of the three backends; a power of 2, because Keras rounds the rate to float32
PARAMETERS = ("W1", "b1", "W2", "b2", "W3", "b3")
RADII = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)


class Digits(NamedTuple):
    """Images of 8 x 8 as rows of 64 pixels in [0, 1], and their labels."""

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
    """Draw `a_class` training images of each digit, by seed."""
    rng = np.random.default_rng(seed)
    at = np.concatenate([rng.permutation(np.flatnonzero(data.y == k))[:a_class] for k in range(10)])
    return data.x[at], data.y[at]


def initial_weights(pretrained: Weights, seed: int) -> Weights:
    """Put a new head for ten classes on the pre-trained layers. Every fine-tuning of that seed begins there."""
    rng = np.random.default_rng(seed)
    head = rng.normal(scale=HIDDEN**-0.5, size=(HIDDEN, 10)).astype(np.float32)
    return {**pretrained, "W3": head, "b3": np.zeros(10, np.float32)}


def batches(n: int, size: int, steps: int, seed: int) -> Iterator[Array]:
    """Yield the row numbers of each step's batch, in epochs of random order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(n) for _ in range(-(-steps * size // n))])
    yield from (order[k * size : (k + 1) * size] for k in range(steps))


def standard_normal(seed: int) -> Callable[[tuple[int, ...]], Array]:
    """Return a function that draws the noise of the Gaussian start."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape, dtype=np.float32)


def network(weights: Weights, dropout: float = DROPOUT) -> nn.Sequential:
    """Build two ReLU layers with dropout, and a head."""
    linear = []
    for k in (1, 2, 3):
        W, b = weights[f"W{k}"], weights[f"b{k}"]
        layer = nn.Linear(*W.shape)
        layer.load_state_dict({"weight": torch.from_numpy(W.T.copy()), "bias": torch.from_numpy(b)})
        linear.append(layer)
    return nn.Sequential(
        linear[0], nn.ReLU(), nn.Dropout(dropout), linear[1], nn.ReLU(), nn.Dropout(dropout), linear[2]
    )


def train(model: nn.Module, x: Array, y: Array, config: SMARTConfig, seed: int) -> None:
    """Run Algorithm 1 in a plain loop. With lambda_s = mu = 0 it is plain training, bit for bit."""
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
    """Train on the digits that are not new. Return the two hidden layers as NumPy arrays (in, out)."""
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
    """Return x + delta, ||delta||_inf <= radius, that is misread, or else has the largest cross-entropy found.

    This is sign ascent. It uses the labels and nothing of SMART. The first start is x, the others are uniform in the
    ball, and attack the images that are still read correctly.
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
    """Compute R_s on x in the ball of CONFIG, with ten ascent steps from the margin start."""
    hard = CONFIG.replace(start="margin", ascent_steps=10)
    with torch.no_grad():
        clean = model(x)
    delta = ascend(model, x, clean, hard, None)
    with torch.no_grad():
        return float(symmetric_kl(model(x + delta), clean).mean())


def half_width(values: Any) -> Any:
    """Return half the width of the 95% t-interval of the mean over the seeds (the first axis)."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values, axis=0)


def shown(values: Any, digits: int = 1, sign: str = "") -> str:
    return f"{np.mean(values):{sign}.{digits}f} ± {half_width(values):.{digits}f}"


def measure(
    data: Digits, pretrained: Weights, seeds: int, a_class: int
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Any]]:
    """Measure accuracy in percent (seeds, radii), R_s (seeds,) and the labels read in some images, by method."""
    x, y = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
    accuracy: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    R_s: dict[str, list[float]] = {name: [] for name in METHODS}
    images: dict[str, Any] = {"clean": (data.x_test[:SHOWN], None, data.y_test[:SHOWN])}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("fine-tuning", total=seeds * len(METHODS) * len(RADII))
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
    """Draw accuracy against the radius, and some test images at their worst for each network."""
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


class Task(NamedTuple):
    """The start of all three backends in float64: weights, and for each step an array of images, labels and noise."""

    weights: Weights
    x: Array
    y: Array
    noise: Array


def same_task(data: Digits, pretrained: Weights, a_class: int) -> Task:
    x, y = few_labels(data, a_class, seed=0)
    at = np.stack(list(batches(len(x), BATCH, COMPARED_STEPS, seed=0)))
    weights = {name: array.astype(np.float64) for name, array in initial_weights(pretrained, seed=0).items()}
    noise = standard_normal(0)((*at.shape, x.shape[1])).astype(np.float64)
    return Task(weights, x[at].astype(np.float64), y[at], noise)


def outcome(terms: list[tuple[float, float, float]], weights: list[Array], teacher: list[Array]) -> dict[str, Array]:
    """Arrange F, R_s and D_Breg by step, and the final weights and theta~ in one row each, ordered as PARAMETERS."""
    theta = {"|theta|": weights, "|theta~|": teacher}
    rows = {name: np.concatenate([value.ravel() for value in values]) for name, values in theta.items()}
    return dict(zip(("loss", "R_s", "D_Breg"), np.array(terms).T, strict=True)) | rows


def forward(theta: Weights, x: Array) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
    """Return the logits, and a function from the gradient there to those of the weights and of the pixels."""
    h1 = np.maximum(x @ theta["W1"] + theta["b1"], 0)
    h2 = np.maximum(h1 @ theta["W2"] + theta["b2"], 0)

    def vjp(g: Array) -> tuple[Weights, Array]:
        g2 = g @ theta["W3"].T * (h2 > 0)
        g1 = g2 @ theta["W2"].T * (h1 > 0)
        gradients = {"W1": x.T @ g1, "W2": h1.T @ g2, "W3": h2.T @ g}
        return gradients | {"b1": g1.sum(0), "b2": g2.sum(0), "b3": g.sum(0)}, g1 @ theta["W1"].T

    return h2 @ theta["W3"] + theta["b3"], vjp


def gradients_numpy(
    theta: Weights, teacher: Weights, x: Array, y: Array, noise: Array
) -> tuple[tuple[float, float, float], Weights]:
    """Return F = L + lambda_s R_s + mu D_Breg, R_s and D_Breg, and the gradients of F."""

    def to_pixels(point: Array) -> tuple[Array, Callable[[Array], Array]]:
        outputs, vjp = forward(theta, point)
        return outputs, lambda g: vjp(g)[1]

    z, vjp = forward(theta, x)
    z_delta, vjp_delta = forward(theta, x + ascend_numpy(to_pixels, x, z, CONFIG, noise))
    z_teacher, _ = forward(teacher, x)
    loss, g = task_loss(z, y, "symmetric_kl")
    R_s, D_Breg = (mean_examples(reference.symmetric_kl(a, z)) for a in (z_delta, z_teacher))
    g_delta, g_clean = reference.symmetric_kl_grad(z_delta, z)
    _, g_teacher = reference.symmetric_kl_grad(z_teacher, z)
    clean, _ = vjp(g + (CONFIG.lambda_s * g_clean + CONFIG.mu * g_teacher) / len(x))
    perturbed, _ = vjp_delta(CONFIG.lambda_s * g_delta / len(x))
    terms = loss + CONFIG.lambda_s * R_s + CONFIG.mu * D_Breg, R_s, D_Breg
    return terms, {name: clean[name] + perturbed[name] for name in theta}


def run_numpy(task: Task) -> dict[str, Array]:
    theta = teacher = task.weights
    terms = []
    for step, batch in enumerate(zip(task.x, task.y, task.noise, strict=True), start=1):
        values, gradients = gradients_numpy(theta, teacher, *batch)
        theta = {name: value - RATE * gradients[name] for name, value in theta.items()}
        teacher = ema_update(teacher, theta, momentum(step, CONFIG))
        terms.append(values)
    return outcome(terms, [theta[name] for name in PARAMETERS], [teacher[name] for name in PARAMETERS])


def run_torch(task: Task) -> dict[str, Array]:
    model = network(task.weights, dropout=0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y, noise = (torch.from_numpy(array) for array in task[1:])
    draws, terms = iter(noise), []
    with SMART(model, CONFIG, site="input", noise=lambda like: next(draws)) as smart:
        for x_batch, y_batch in zip(x, y, strict=True):
            output, penalty = smart(x_batch)
            loss = cross_entropy(output, y_batch) + penalty
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
            terms.append((loss.item(), smart.metrics["R_s"], smart.metrics["D_Breg"]))
        # torch keeps a matrix as (out, in)
        weights = {name: value.detach().numpy().T for name, value in model.named_parameters()}
        return outcome(terms, list(weights.values()), [smart.teacher[name].numpy().T for name in weights])


def run_keras(task: Task) -> dict[str, Array]:
    """Train in Keras. Raise ImportError, which names the extra to install, if there is no TensorFlow."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from smartreg_tf import attach  # first: it names the extra

    # isort: split
    import keras
    import tensorflow as tf

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    hidden = [keras.layers.Dense(HIDDEN, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input([64]), *hidden, keras.layers.Dense(10)])
    model.set_weights([task.weights[name] for name in PARAMETERS])
    model.compile(keras.optimizers.SGD(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    draws, terms = tf.constant(task.noise), []
    with attach(model, CONFIG, noise=lambda step, like: tf.gather(draws, step)) as smart:
        for x, y in zip(task.x, task.y, strict=True):
            logs = model.train_on_batch(x, y, return_dict=True)
            terms.append((float(logs["loss"]), float(logs["smoothness"]), float(logs["proximal"])))
        return outcome(terms, model.get_weights(), [keras.ops.convert_to_numpy(value) for value in smart.averages])


def compare(task: Task, console: Console) -> dict[str, dict[str, float]]:
    """Run some steps of SMART in each backend. Print each quantity by backend, and the largest difference."""
    runs = {"NumPy": run_numpy(task), "PyTorch": run_torch(task)}
    try:
        runs["Keras"] = run_keras(task)
    except ImportError as error:
        console.print(f"Without Keras: {error}", markup=False)
    title = f"{COMPARED_STEPS} steps of SMART in float64, with the same weights, batches and noise"
    table = Table(title=title, title_justify="left")
    for name in ("", *runs, "difference"):
        table.add_column(name, justify="right" if name else "left")
    figures = {}
    for name in runs["NumPy"]:
        values = np.array([run[name] for run in runs.values()])
        summary = np.linalg.norm(values, axis=1) if name.startswith("|") else values[:, -1]
        difference = float(np.ptp(values, axis=0).max() / np.abs(values).max())
        table.add_row(name, *(f"{value:#.11g}" for value in summary), f"{difference:.1e}")
        figures[name] = {**dict(zip(runs, summary.tolist(), strict=True)), "difference": difference}
    console.print(table)
    console.print(
        "loss (with its penalties), R_s and D_Breg: at the last step. |theta| and |theta~|: the lengths of the weights "
        "and of their average after it. difference: the largest between any two, in any step or weight, as a fraction "
        "of the largest value."
    )
    return figures


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
    data = digits()
    pretrained = pretrain(data)
    accuracy, R_s, images = measure(data, pretrained, args.seeds, args.labels)
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
        f"{accuracy['plain'][:, at].mean():.0f}%). It {clean} the clean accuracy ({cost:+.1f} ± {cost_half:.1f} "
        f"points). R_s, the largest divergence found in the ball, is {R_s['SMART'].mean():.2f} instead of "
        f"{R_s['plain'].mean():.2f}."
    )
    draw_picture(args.out, accuracy, images, args.labels)
    console.print(f"The picture is in {args.out} ({time.perf_counter() - began:.0f} seconds).\n")
    backends = compare(same_task(data, pretrained, args.labels), console)
    if args.json:
        methods = {
            name: {"accuracy": accuracy[name].tolist(), "R_s": R_s[name].tolist(), "config": METHODS[name].to_dict()}
            for name in METHODS
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"labels": args.labels, "radii": RADII, "methods": methods, "backends": backends}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
