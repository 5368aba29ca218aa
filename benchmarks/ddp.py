"""Compare the examples a second of two processes with those of one (DistributedDataParallel, gloo, one thread each).

python benchmarks/ddp.py

Each process has the same batch as the one alone, so 2 is ideal. Three ways take turns with every method, round by
round: one process while the other waits, two processes apart, and two with DDP. Two processes share the machine: its
memory bandwidth and its caches. The second way shows this alone; the third adds the averaging of the gradients.

Throughput over one is t_one sum_r 1/t_r. t_r is the seconds of a step in process r, of the same round. The table has
the medians over the rounds with their quartiles. "Beside plain's" is a method's with DDP over plain training's with
DDP.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from ratios import spread
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from step_cost import FLOORS, Bench, make_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

METHODS = ["plain", *(name for name in FLOORS if name.startswith("SMART,") and name.count(",") == 1)]
Round = dict[str, dict[str, list[float]]]  # method -> way -> seconds of each process


def measure(rank: int, meeting: str, batch: int, length: int, rounds: int, file: str) -> None:
    """Run one of the two processes. The first writes down what both have found."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    alone, together = (Bench(make_model("minilm"), batch, length) for _ in range(2))
    together.model = DistributedDataParallel(together.model)
    torch.manual_seed(1 + rank)
    steps = {method: (alone.step(method), together.step(method)) for method in METHODS}
    found: list[Round] = []
    for _ in range(rounds + 1):
        found.append({})
        for method, (own, averaged) in steps.items():
            distributed.barrier()
            one = alone.seconds(own) if rank == 0 else 0.0
            distributed.barrier()
            apart = alone.seconds(own)
            distributed.barrier()
            ddp = together.seconds(averaged)
            seconds: list[Any] = [None, None]
            distributed.all_gather_object(seconds, (one, apart, ddp))
            found[-1][method] = dict(zip(("one", "apart", "ddp"), map(list, zip(*seconds, strict=True)), strict=True))
    if rank == 0:
        Path(file).write_text(json.dumps(found[1:]))
    distributed.barrier()
    distributed.destroy_process_group()


def over_one(r: Round, method: str, way: str) -> float:
    return r[method]["one"][0] * sum(1 / t for t in r[method][way])


def report(console: Console, title: str, rounds: list[Round]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("method", "one, ms", "two apart, over one", "two with DDP, over one", "beside plain's"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method in METHODS:
        ms = 1e3 * statistics.median(r[method]["one"][0] for r in rounds)
        ways = (spread([over_one(r, method, way) for r in rounds]) for way in ("apart", "ddp"))
        beside = spread([over_one(r, method, "ddp") / over_one(r, "plain", "ddp") for r in rounds])
        table.add_row(method, f"{ms:.0f}", *ways, "" if method == "plain" else beside)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of two processes over one, plain and with SMART.")
    add = parser.add_argument
    add("--batch", type=int, default=8, help="of each process")
    add("--length", nargs="+", type=int, default=[32])
    add("--rounds", type=int, default=12)
    add("--json", type=Path, default=Path("out/ddp.json"))
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    console, settings = Console(highlight=False, width=120), []
    for length in args.length:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rounds.json")
            given = (str(Path(folder, "meeting")), args.batch, length, args.rounds, str(file))
            torch.multiprocessing.spawn(measure, given, nprocs=2)
            rounds = json.loads(file.read_text())
        report(console, f"MiniLM, {args.batch} x {length} tokens a process, {args.rounds} rounds", rounds)
        settings.append({"batch": args.batch, "length": length, "seconds": rounds})
        args.json.write_text(json.dumps({"torch": torch.__version__, "settings": settings}, indent=1) + "\n")
    console.print(str(args.json))


if __name__ == "__main__":
    main()
