"""Train in several processes in every way, compare with one process, and print pass or fail.

    torchrun --nproc_per_node 2 benchmarks/sharded.py

On GPUs it uses NCCL and one GPU a process, else gloo. DeepSpeed is tried if it is installed. Accelerate and the Trainer
shard on GPUs alone: accelerate shards on no CPU. Exit status 1 if a line says fail.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed.nn  # before there is a group, see docs/distributed.md
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from smartreg_torch import SMART, SMARTConfig

STEPS, ROWS = 4, 8  # ROWS are those of each process
CONFIG = SMARTConfig(total_steps=STEPS, lambda_s=1.0, mu=1.0, epsilon=0.1, sigma=0.05, eta=0.1, memory=0.5)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
ZERO = {  # DeepSpeed's settings, but for the stage
    "train_micro_batch_size_per_gpu": ROWS,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
BOUND = 1e-4  # of the largest entry of a tensor: float32, and AdamW divides by small gradients
Found = dict[str, Tensor]


def make() -> nn.Sequential:
    """Make the same model everywhere."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 2)]
    return nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), *layers).to(DEVICE)


def batch(step: int, processes: int) -> tuple[Tensor, Tensor]:
    """Draw the rows of all processes."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(50, (ROWS * processes, 4), generator=generator)
    return ids.to(DEVICE), (ids.sum(1) % 2).to(DEVICE)


def noise(like: Tensor) -> Tensor:
    """Return noise that is the same for every row, whatever the batch."""
    wave = torch.arange(like[0].numel(), device=like.device, dtype=like.dtype).mul(1.7).sin()
    return wave.view_as(like[0]).expand_as(like)


def train(
    model: Any, step: Callable[[Tensor], Any], smart: SMART, rank: int, world: int, processes: int
) -> tuple[float, float]:
    """Train on the rows of this process; return R_s and D_Breg of the last step."""
    for k in range(STEPS):
        ids, labels = (rows.chunk(world)[rank] for rows in batch(k, processes))
        logits, penalty = smart(ids)
        step(nn.functional.cross_entropy(logits, labels) + penalty)
        smart.update()
    return smart.metrics["R_s"], smart.metrics["D_Breg"]


def by_torch(
    optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], Any] | None = None
) -> Callable[[Tensor], None]:
    """Return an optimiser step, given the loss."""

    def step(loss: Tensor) -> None:
        (torch.Tensor.backward if backward is None else backward)(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def whole(model: nn.Module) -> Found:
    """Return the weights of a model, gathered."""
    deepspeed = sys.modules.get("deepspeed")
    parts = nullcontext() if deepspeed is None else deepspeed.zero.GatheredParameters(list(model.parameters()))
    with parts:
        weights: dict[str, Any] = dict(model.named_parameters())
        return {
            name: (w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone() for name, w in weights.items()
        }


def sharded(model: nn.Sequential) -> Any:
    """Shard a layer, then the rest."""
    fully_shard(model[2])
    return fully_shard(model)


def in_a_loop(wrap: Callable[[Any], Any], rank: int, world: int) -> tuple[Any, ...]:
    """Train in a loop of one's own."""
    model = wrap(make())
    smart = SMART(model, CONFIG, noise=noise)
    step = by_torch(torch.optim.AdamW(model.parameters(), lr=0.01))
    return results_after(train(model, step, smart, rank, world, world), smart)


def results_after(metrics: tuple[float, float], smart: SMART) -> tuple[Any, ...]:
    """Return the weights, theta~ and the metrics."""
    own = whole(smart.model)
    with smart.swap_teacher():
        return own, whole(smart.model), metrics


def with_accelerate(rank: int, world: int, fsdp: bool = False, stage: int = 0) -> tuple[Any, ...]:
    """Train in a loop with Accelerate: FSDP2, a stage of ZeRO, or neither."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    plugins: dict[str, Any] = {}
    if fsdp:
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP")
    if stage:
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=ZERO | {"zero_optimization": {"stage": stage}})
    accelerator = Accelerator(cpu=not CUDA, **plugins)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    smart = SMART(model, CONFIG, noise=noise)
    return results_after(train(model, by_torch(optimizer, accelerator.backward), smart, rank, world, world), smart)


def with_deepspeed(stage: int, rank: int, world: int) -> tuple[Any, ...]:
    """Train with DeepSpeed's engine."""
    import deepspeed

    settings = ZERO | {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    deepspeed.init_distributed("nccl" if CUDA else "gloo", verbose=False)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    smart = SMART(engine, CONFIG, noise=noise)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return results_after(train(engine, step, smart, rank, world, world), smart)


def in_the_trainer(settings: dict[str, Any], rows: int = ROWS, alone: bool = False) -> tuple[Any, ...]:
    """Train in the Hugging Face Trainer, with so many rows a process; alone: in one process."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, TrainingArguments

    from smartreg_torch.transformers import SMARTTrainer

    class Made(SMARTTrainer):
        def create_smart(self, model: nn.Module, config: SMARTConfig) -> SMART:
            return SMART(model, config, noise=noise)

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
    dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    # not BERT: accelerate 1.15 shards its embeddings twice, and raises
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, **dropout))
    model.accepts_loss_kwargs = False
    total = STEPS * rows * (1 if alone else distributed.get_world_size())
    data = [{"input_ids": [2, 10 + i % 20, 20 + i % 7, 3], "labels": i % 2} for i in range(total)]
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
        args = {
            "max_steps": STEPS,
            "per_device_train_batch_size": rows,
            "logging_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.5,
        }
        arguments = TrainingArguments(folder, use_cpu=not CUDA, **(args | quiet | settings))
        if alone:
            arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Made(model, arguments, train_dataset=data, smart=CONFIG)
        trainer.train()
        last = next(row for row in reversed(trainer.state.log_history) if "R_s" in row)
        assert trainer.smart is not None
        return results_after((last["R_s"], last["D_Breg"]), trainer.smart)


def ways(rank: int, world: int) -> dict[str, Callable[[], tuple[Any, ...]] | str]:
    """List what is tried by its name; a text says why it is not."""
    ddp = nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {
        "DDP, a loop": lambda: in_a_loop(ddp, rank, world),
        "FSDP2, a loop": lambda: in_a_loop(sharded, rank, world),
        "DDP, Accelerate": lambda: with_accelerate(rank, world),
        "FSDP2, Accelerate": lambda: with_accelerate(rank, world, fsdp=True),
        "DDP, Trainer": lambda: in_the_trainer({}),
        "FSDP2, Trainer": lambda: in_the_trainer({"fsdp": True, "fsdp_config": {"version": 2}}),
    }
    if not CUDA:
        found |= dict.fromkeys(["FSDP2, Accelerate", "FSDP2, Trainer"], "accelerate shards on no CPU")
    installed = importlib.util.find_spec("deepspeed") is not None
    for stage in (1, 2, 3):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto"}
        tried = {
            f"ZeRO {stage}, a loop": partial(with_deepspeed, stage, rank, world),
            f"ZeRO {stage}, Accelerate": partial(with_accelerate, rank, world, stage=stage),
            f"ZeRO {stage}, Trainer": partial(in_the_trainer, {"deepspeed": settings}),
        }
        found |= tried if installed else dict.fromkeys(tried, "deepspeed is not installed")
    return found


def differ(one: Found, other: Found) -> float:
    """Return the largest difference, relative to the largest entry of each tensor."""
    pairs = [(one[name].cpu(), value.cpu()) for name, value in other.items()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def main() -> int:
    """Try each way; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, which says how many processes there are")
    warnings.simplefilter("ignore")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if CUDA:
        torch.cuda.set_device(DEVICE)
    model = make()
    smart = SMART(model, CONFIG, noise=noise)
    step = by_torch(torch.optim.AdamW(model.parameters(), lr=0.01))
    alone = results_after(train(model, step, smart, 0, 1, world), smart)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    place = {name: os.environ.pop(name) for name in names if name in os.environ}
    of_the_trainer = in_the_trainer({}, ROWS * world, alone=True)
    os.environ.update(place)
    if CUDA:
        torch.cuda.set_device(DEVICE)  # the Trainer took the first one
    distributed.init_process_group("nccl" if CUDA else "gloo")
    failed = False
    for name, way in ways(rank, world).items():
        if isinstance(way, str):
            line = f"not tried  {name}: {way}"
        else:
            environment = dict(os.environ)  # accelerate writes its settings there
            try:
                weights, teacher, (r_s, d_breg) = way()
                known = of_the_trainer if "Trainer" in name else alone
                apart = max(differ(weights, known[0]), differ(teacher, known[1]))
                mean = torch.tensor([r_s, d_breg], device=DEVICE) / world
                distributed.all_reduce(mean)
                expected = torch.tensor(known[2], device=DEVICE)
                off = float(((mean - expected) / expected).abs().max())
                passed = apart < BOUND and off < 1e-3
                line = f"{'pass' if passed else 'fail'}       {name}: weights and theta~ {apart:.1e}, terms {off:.1e}"
            except Exception:
                line = f"fail       {name}:\n{traceback.format_exc()}"
            os.environ.clear()
            os.environ.update(environment)
        failed = failed or line.startswith("fail")
        if rank == 0:
            print(line, flush=True)
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
