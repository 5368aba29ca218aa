"""Compare the peak memory of a training step with SMART with a plain step's.

python benchmarks/memory.py

On a CPU each method has a process of its own, so that no other's memory is in its peak, which is that of the resident
set, as Linux reports it; on a GPU it is the allocator's. The memory after the model has run on one row of one token
without a graph is subtracted. What is left is gradients, activations, theta~ and whatever else the method keeps.

Beside the methods of step_cost.py there are those that save less for the backward:

- "checkpointed": each layer runs again in the backward, in every pass, as Hugging Face's models offer.
- "perturbed pass checkpointed": in the perturbed pass alone.
- "perturbed pass in bfloat16": what the perturbed pass saves is kept in bfloat16. `--error` prints what that does to
  the gradient of R_s, ||g - g64|| / ||g64||, g64 in float64 and without dropout, at 4 x 16 tokens.

The last two are not in smartreg_torch; they are tried here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from step_cost import FLOORS, OURS, SIZES, Bench, add_options_of_a_model, make_model, prepared
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART, SMARTConfig
from smartreg_torch.passes import Passes

WAYS = ("checkpointed", "perturbed pass checkpointed", "perturbed pass in bfloat16")
OTHERS = [f"SMART, margin start, {way}: {terms}" for way in WAYS for terms in ("R_s", "R_s + MBPP")]
METHODS = [*FLOORS, "plain, checkpointed", *OTHERS]


def now(device: str) -> float:
    """Return the memory now in MB, and reset the peak."""
    if device != "cpu":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> float:
    """Return the peak in MB, since `now`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**10


def in_perturbed_pass(context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Let every perturbed pass of this process run in a context."""
    own = Passes.at

    def at(self: Passes, *args: Any, **kwargs: Any) -> Any:
        with context():
            return own(self, *args, **kwargs)

    Passes.at = at  # type: ignore[method-assign]


def in_bfloat16(network: nn.Module) -> saved_tensors_hooks:
    """Keep what a pass saves in bfloat16, but for the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}

    def pack(z: Tensor) -> tuple[torch.dtype, Tensor]:
        narrow = z.is_floating_point() and z.untyped_storage().data_ptr() not in weights
        return z.dtype, z.to(torch.bfloat16) if narrow else z

    return saved_tensors_hooks(pack, lambda saved: saved[1].to(saved[0]))


def prepare(network: Any, way: str) -> None:
    """Let a network save less for the backward, in one of the WAYS."""
    if way == "perturbed pass in bfloat16":
        in_perturbed_pass(lambda: in_bfloat16(network))
        return
    network.activation_checkpointing_enable({"use_reentrant": False})
    if way == "checkpointed":
        return
    on = False

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False) if on else function(*args)

    @contextmanager
    def checkpointed() -> Iterator[None]:
        nonlocal on
        on = True
        yield
        on = False

    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = run
    in_perturbed_pass(checkpointed)


def gradient(dtype: torch.dtype, config: SMARTConfig, narrow: bool = False) -> Tensor:
    """Return the gradient of R_s, in float64."""
    network = make_model("minilm").to(dtype).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    own = Passes.at
    if narrow:
        in_perturbed_pass(lambda: in_bfloat16(network))
    _, penalty = SMART(network, config)(**Bench(network, 4, 16).inputs)
    Passes.at = own  # type: ignore[method-assign]
    found = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
    return torch.cat([g.double().flatten() for g in found if g is not None])


def print_errors() -> None:
    """Print the error of R_s's gradient in float32, and with bfloat16 saved in the perturbed pass."""
    settings, _ = OURS["margin start"]
    for radius in ({}, {"epsilon": 0.1}, {"epsilon": 1e-5, "scale": "absolute"}):
        config = SMARTConfig(**settings, mu=0).replace(**radius)
        exact = gradient(torch.float64, config)
        errors = [float((gradient(torch.float32, config, way) - exact).norm() / exact.norm()) for way in (False, True)]
        print(f"epsilon {config.epsilon:g} {config.scale}: float32 {errors[0]:.1e}, bfloat16 {errors[1]:.1e}")


def measure(
    model: str, batch: int, length: int, method: str, precision: str, compiled: bool, device: str
) -> dict[str, float]:
    """Measure the peak before and after two steps, in this process."""
    network, own = prepared(make_model(model), device, precision, compiled), Passes.at
    way = next((way for way in reversed(WAYS) if f", {way}" in method), None)
    try:
        if way is not None:
            prepare(network, way)
            method = method.replace(f", {way}", "")
        with torch.no_grad():
            network(torch.ones(1, 1, dtype=torch.long, device=device))
        before = now(device)
        bench = Bench(network, batch, length, precision)
        step = bench.step(method)
        for _ in range(2):
            bench.seconds(step)
        return {"before": before, "after": peak(device)}
    finally:
        Passes.at = own  # type: ignore[method-assign]


def in_a_process(file: str, *arguments: object) -> dict[str, float]:
    """Run `file --one arguments` in a process of its own, and return what it prints."""
    command = [sys.executable, file, "--one", *map(str, arguments)]
    # glibc keeps freed memory in pieces, unless each tensor is mapped on its own
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(file: str, measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Measure in a process of its own; on a GPU, the last argument, here: the allocator forgets what others took."""
    return in_a_process(file, *arguments) if arguments[-1] == "cpu" else measure(*arguments)


def draw(settings: list[dict[str, Any]], file: Path) -> None:
    """Draw the peaks over the plain step's, one group of bars for each setting."""
    figure, axis = plt.subplots(figsize=(9, 4.2))
    methods = [method for method in settings[0]["MB"] if method != "plain"]
    width = 0.85 / len(methods)
    for k, method in enumerate(methods):
        at = [group + (k - len(methods) / 2) * width for group in range(len(settings))]
        ratios = [setting["MB"][method] / setting["MB"]["plain"] for setting in settings]
        axis.bar(at, ratios, width, align="edge", color=plt.get_cmap("tab20")(k), label=method)
    axis.axhline(1, color="k", lw=1)
    axis.set_xticks(range(len(settings)), [f"{s['batch']} x {s['length']} tokens" for s in settings])
    axis.set_ylabel("peak over the model, x plain")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="The peak memory of a training step with SMART over a plain step's.")
    add = parser.add_argument
    add("--one", nargs=7, help=argparse.SUPPRESS)
    add("--model", choices=SIZES, default="minilm")
    add("--batch", nargs="+", type=int, default=[8, 32])
    add("--length", nargs="+", type=int, default=[32, 128])
    add("--method", nargs="+", choices=METHODS, default=list(FLOORS), help="plain is always among them")
    add("--error", action="store_true", help="print the error of R_s's gradient alone")
    add_options_of_a_model(add)
    add("--json", type=Path, default=Path("out/memory.json"))
    add("--figure", type=Path, default=Path("out/memory.png"))
    args = parser.parse_args()
    if args.error:
        print_errors()
        return
    if args.one:
        model, batch, length, method, precision, compiled, device = args.one
        print(json.dumps(measure(model, int(batch), int(length), method, precision, compiled == "True", device)))
        return
    for file in (args.json, args.figure):
        file.parent.mkdir(parents=True, exist_ok=True)
    console, settings = Console(highlight=False, width=110), []
    for length in args.length:
        for batch in args.batch:
            megabytes = {}
            for method in dict.fromkeys(["plain", *args.method]):
                how = args.precision, args.compile, args.device
                found = alone(__file__, measure, args.model, batch, length, method, *how)
                megabytes[method] = found["after"] - found["before"]
            title = f"{args.model}, {batch} x {length} tokens, {args.device}, {args.precision}"
            title += ", compiled" * args.compile
            table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
            for name in ("method", "MB over the model", "x plain"):
                table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
            for method, value in megabytes.items():
                table.add_row(method, f"{value:.0f}", f"{value / megabytes['plain']:.2f}")
            console.print(table)
            settings.append({"model": args.model, "batch": batch, "length": length, "MB": megabytes})
            args.json.write_text(json.dumps({"torch": torch.__version__, "settings": settings}, indent=1) + "\n")
    draw(settings, args.figure)
    console.print(f"{args.json}, {args.figure}")


if __name__ == "__main__":
    main()
