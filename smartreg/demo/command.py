"""Run the demo: `python -m smartreg demo`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smartreg.demo import compare, digits
from smartreg.demo.digits import CONFIG, METHODS, RADII
from smartreg.quiet import quiet

BACKENDS = {"torch": "PyTorch", "tf": "Keras"}
NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy", "matplotlib": "matplotlib", "rich": "rich"}
NEXT = {
    "torch": ("python -m pydoc smartreg_torch.SMART", "SMART in your own training loop"),
    "tf": ("python -m pydoc smartreg_tf.SMARTCallback", "SMART in your own fit"),
}
Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    add = parser.add_argument
    add("--backend", choices=BACKENDS, help="which one trains (default: torch, or tf if there is no PyTorch)")
    add("--seeds", type=int, default=5, help="fine-tuning runs of each method (default: %(default)s)")
    add("--labels", type=int, default=5, help="labelled images of each digit (default: %(default)s)")
    add("--out", type=Path, default=Path("out/demo.png"), help="picture (default: %(default)s)")
    add("--json", type=Path, help="file to write the measurements to")


def main(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the demo and print; return the exit status, 1 if a package is missing."""
    if args.seeds < 2 or not 1 <= args.labels <= 100:
        parser.error(
            "--seeds must be at least 2 (an interval needs two) and --labels between 1 and 100, got "
            f"--seeds {args.seeds} --labels {args.labels}"
        )
    missing = [package for module, package in NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'smartreg[digits]'", file=sys.stderr)
        return 1
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn

    console = Console(highlight=False)
    columns = SpinnerColumn(), *Progress.get_default_columns()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("loading the frameworks", total=4 + args.seeds * len(METHODS) * len(RADII))

        def say(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        backends, absent = load()
        chosen = args.backend or next(iter(backends), None)
        if chosen not in backends:
            reasons = [reason for name, reason in absent.items() if args.backend in (None, name)]
            progress.stop()
            print(f"the demo has no backend to train with: {'; or '.join(reasons)}", file=sys.stderr)
            return 1
        show_all(args, chosen, backends, absent, console, say)
    return 0


def load() -> tuple[dict[str, Any], dict[str, str]]:
    """Import the demo's part of each backend. Return those, and why another cannot be imported."""
    found, absent = {}, {}
    for name in BACKENDS:
        try:
            with quiet():
                found[name] = importlib.import_module(f"smartreg_{name}.demo")
        except ImportError as error:  # it says what to install
            absent[name] = str(error)
    return found, absent


def show_all(
    args: argparse.Namespace, chosen: str, backends: dict[str, Any], absent: dict[str, str], console: Any, say: Say
) -> None:
    """Train, measure and compare; print the tables, and write the files."""
    from smartreg.demo import show  # which needs packages of the extra

    began = time.perf_counter()
    console.print(
        f"A network pre-trained on the digits 0 to 6 is fine-tuned in {BACKENDS[chosen]} on all ten from {args.labels} "
        f"labelled images of each, plain and with SMART ({args.seeds} seeds). Then each test image is attacked: every "
        f"pixel may move by {CONFIG.epsilon:g} of its range, in the worst direction that {digits.ATTACK_STEPS} "
        f"gradient steps from {digits.ATTACK_STARTS} starts find.\n"
    )
    say("pre-training")
    train = backends[chosen].train
    data = digits.digits()
    pretrained = digits.pretrain(data, train)
    found = show.Measured(*measure(data, pretrained, train, args.seeds, args.labels, say))
    console.print(show.results(found))
    console.print(show.verdict(found), end="\n\n")
    say("drawing the picture")
    show.draw_picture(args.out, found.accuracy, found.images, args.labels)
    say("the backends side by side")
    task = compare.same_task(data, pretrained, args.labels)
    runs = {"NumPy": compare.run(task)}
    runs |= {BACKENDS[name]: backend.run(task) for name, backend in backends.items()}
    table, figures = show.side_by_side(runs)
    console.print(table)
    console.print(show.LEGEND)
    for name, reason in absent.items():
        console.print(f"Without {BACKENDS[name]}: {reason}", markup=False, soft_wrap=True)
    if args.json:
        methods = {
            name: {
                "accuracy": found.accuracy[name].tolist(),
                "R_s": found.R_s[name].tolist(),
                "config": config.to_dict(),
            }
            for name, config in METHODS.items()
        }
        result = {"backend": chosen, "labels": args.labels, "radii": RADII, "methods": methods, "backends": figures}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"\nThe picture: {args.out} (after {time.perf_counter() - began:.0f} seconds)", "Next:"]
    lines += [f"  {command:<45}  {what}" for command, what in next_commands(chosen, args.seeds)]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def next_commands(chosen: str, seeds: int) -> list[tuple[str, str]]:
    """Return three commands to go on with, and what each shows."""
    return [
        ("python -m smartreg check", "is every number of the installed backends right?"),
        (f"python -m smartreg demo --labels 2 --seeds {2 * seeds}", "the same with fewer labels"),
        NEXT[chosen],
    ]


def measure(
    data: digits.Digits, pretrained: digits.Weights, train: digits.Train, seeds: int, a_class: int, say: Say
) -> tuple[dict[str, digits.Array], dict[str, digits.Array], dict[str, Any]]:
    """Measure accuracy in percent (seeds, radii), R_s (seeds,) and the labels read in some images, by method."""
    accuracy: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    R_s: dict[str, list[float]] = {name: [] for name in METHODS}
    images: dict[str, Any] = {"clean": (data.x_test, None, data.y_test)}
    for seed in range(seeds):
        x, y = digits.few_labels(data, a_class, seed)
        for name, config in METHODS.items():
            say(f"seed {seed}, {name}")
            theta = train(digits.initial_weights(pretrained, seed), x, y, config, seed)
            accuracy[name].append([])
            for radius in RADII:
                attacked = digits.worst(theta, data.x_test, data.y_test, radius) if radius else data.x_test
                labels = digits.read(theta, attacked)
                accuracy[name][-1].append(100 * float((labels == data.y_test).mean()))
                if seed == 0 and radius == CONFIG.epsilon:
                    images[name] = (attacked, labels, data.y_test)
                if radius:
                    say(f"seed {seed}, {name}: under attack")
            R_s[name].append(digits.roughness(theta, data.x_test))
    return {name: np.array(v) for name, v in accuracy.items()}, {name: np.array(v) for name, v in R_s.items()}, images
