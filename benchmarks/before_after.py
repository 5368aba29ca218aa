"""Run a benchmark on two trees in turn, and say by how much each ratio to the plain step or cross entropy changed.

git worktree add ../before COMMIT
python benchmarks/before_after.py --before ../before -- benchmarks/step_cost.py --model minilm --batch 8 --rounds 4

Each turn runs the command once in each tree, in an order that alternates. So other load on the machine slows both. The
command writes the seconds of its rounds with --json. A change is the ratio after over the ratio before, minus 1. The
table has the median over the turns, with the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

BASES = ("plain", "cross entropy")
AFTER = Path(__file__).resolve().parents[1]


def rounds_in(found: Any, at: str = "") -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Yield every list of rounds in a benchmark's JSON, each with its settings."""
    if isinstance(found, dict):
        said = " ".join(str(found[name]) for name in ("model", "mode", "batch", "length") if name in found)
        for name, value in found.items():
            yield from rounds_in(value, " ".join(filter(None, (at, said if name == "seconds" else name))))
    elif isinstance(found, list) and found and isinstance(found[0], dict) and any(base in found[0] for base in BASES):
        yield at, found
    elif isinstance(found, list):
        for item in found:
            yield from rounds_in(item, at)


def run(tree: Path, command: list[str]) -> dict[tuple[str, str], float]:
    """Compute the median ratio of each method to the base, by setting."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        given = ["--json", str(file)]
        if "--figure" in (tree / command[0]).read_text():
            given += ["--figure", str(Path(folder) / "figure.png")]
        path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, *command, *given], cwd=tree, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{tree}: {' '.join(command)}\n{done.stderr[-2000:]}")
        settings = dict(rounds_in(json.loads(file.read_text())))
    return {
        (setting, method): statistics.median(r[method] / r[base] for r in rounds)
        for setting, rounds in settings.items()
        for base in [next(base for base in BASES if base in rounds[0])]
        for method in rounds[0]
        if len(method) > 1 and method != base
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A benchmark before and after a change, in turn.")
    parser.add_argument("--before", type=Path, required=True, help="the tree before: a git worktree of its commit")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- benchmarks/NAME.py and its options")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    trees = {"before": args.before.resolve(), "after": AFTER}
    found: dict[str, list[dict[tuple[str, str], float]]] = {"before": [], "after": []}
    for turn in range(args.turns):
        for name in sorted(trees, reverse=turn % 2 == 0):
            found[name].append(run(trees[name], command))
    table = Table(title=f"{' '.join(command)}, {args.turns} turns", title_justify="left", box=SIMPLE_HEAD)
    for name in ("setting", "method", "before", "after", "change", "least", "largest"):
        table.add_column(name, justify="left" if name in ("setting", "method") else "right")
    for key in found["before"][0]:
        before, after = ([run[key] for run in found[name]] for name in ("before", "after"))
        changes = [b / a - 1 for a, b in zip(before, after, strict=True)]
        ratios = [f"{statistics.median(values):.3f}" for values in (before, after)]
        shown = [f"{value:+.1%}" for value in (statistics.median(changes), min(changes), max(changes))]
        table.add_row(*key, *ratios, *shown)
    Console(highlight=False, width=130).print(table)


if __name__ == "__main__":
    main()
