"""What test_torch_sharded.py trains in two processes, in the Trainer and with Accelerate: `python ... FOLDER`."""

import gc
import importlib.util
import json
import os
import sys
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import distributed_torch as loops
import test_torch_transformers as trainers
import torch
import torch._dynamo  # once for all forks
import torch.distributed.nn  # before there is a group, see docs/distributed.md
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_torch import STEPS, whole
from torch import distributed
from torch.nn.functional import cross_entropy

from smartreg_torch import SMART, SMARTConfig

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
TAUGHT = trainers.CONFIG.replace(evaluate="teacher")
BY_LAYER = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
# name -> fsdp_config, the settings of the Trainer
FSDP = {
    "by layer": (BY_LAYER, {}),
    "sharded checkpoints, accumulated": (
        BY_LAYER | {"state_dict_type": "SHARDED_STATE_DICT"},
        {"gradient_accumulation_steps": 2},
    ),
    "kept whole, checkpointed layers": (
        BY_LAYER | {"reshard_after_forward": False, "activation_checkpointing": True},
        {},
    ),
    "tied weights, labels that the loss shifts": (
        {"transformer_layer_cls_to_wrap": ["GPT2Block"]},
        {"gradient_accumulation_steps": 2, "shifted_labels": True, "accepts": True},
    ),
    "theta~ is evaluated": (BY_LAYER, {"smart": TAUGHT, **BEST}),
    "theta~ alone": ({"auto_wrap_policy": "NO_WRAP"}, {"smart": SMARTConfig(lambda_s=0, mu=0, evaluate="teacher")}),
}
ACCELERATE = {"ddp": False, "fsdp": True}
ZERO = {
    f"ZeRO {stage}, {start}": (stage, config)
    for stage in (1, 2, 3)
    for start, config in (("gaussian", loops.CONFIG), ("margin", loops.MARGIN))
}


@contextmanager
def as_an_accelerator():
    """Let accelerate take this CPU for an accelerator: it shards on no CPU. All that follows is its own code."""
    init = AcceleratorState.__init__

    def initialise(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            if not PartialState._shared_state:
                PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = initialise
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


def make(folder, batch=4, sharded=None, **settings):
    """A trainer in float64. Each optimiser step has `batch` rows of each process, in parts if they are accumulated."""
    batch //= settings.get("gradient_accumulation_steps", 1)
    if "eval_strategy" in settings:
        settings["eval_dataset"] = trainers.make_rows(8)
    settings |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": batch}
    if sharded is not None:
        settings |= {"fsdp": True, "fsdp_config": dict(sharded)}
    with nullcontext() if sharded is None else as_an_accelerator():
        return trainers.in_double(folder, **settings)


def results(trainer):
    """The weights, theta~ and the logs, without what a clock said."""
    logs = [
        {key: value for key, value in row.items() if not key.endswith(trainers.TIMES)}
        for row in trainer.state.log_history
    ]
    teacher = {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in whole(trainer.smart.teacher).items()}
    return {"weights": whole(trainer.model.state_dict()), "teacher": teacher, "logs": logs[:-1]}


def train_fsdp():
    """Train in each way, and again from the middle."""
    found = {}
    for name, (config, settings) in FSDP.items():
        trainer = make(name, sharded=config, **settings)
        trainer.train()
        found[name] = results(trainer)
        sizes = [(average.to_local().numel(), average.numel()) for average in trainer.smart.teacher.values()]
        with trainer.swap_teacher():
            loss = trainer.evaluate(trainers.make_rows(8))["eval_loss"] if "shifted_labels" not in settings else None
        again = make(f"{name}, again", sharded=config, **settings)
        again.train(resume_from_checkpoint=f"{name}/checkpoint-2")
        found[name] |= {"sizes": sizes, "evaluated": loss, "resumed": results(again)}
    found["refused"] = refused()
    torch.save(found, f"trainer_{trainer.args.process_index}.pt")


def refused():
    """What the Trainer says where it cannot work."""
    cases = {
        "bf16": {"sharded": BY_LAYER, "bf16": True},
        "skip": {"sharded": BY_LAYER, "smart": trainers.CONFIG.replace(non_finite="skip")},
    }
    said = {}
    for name, settings in cases.items():
        try:
            make("refused", **settings).train()
        except ValueError as error:
            said[name] = str(error)
    return said


def accelerated(sharded, folder, steps=range(STEPS)):
    """A loop with Accelerate, two micro-batches a step; from the middle if it does not begin with step 0."""
    AcceleratorState._reset_state(reset_partial_state=True)
    names = {"transformer_cls_names_to_wrap": ["Sequential"], "auto_wrap_policy": "transformer_based_wrap"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **names) if sharded else None
    with as_an_accelerator() if sharded else nullcontext():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    rank, processes = accelerator.process_index, accelerator.num_processes

    def part(whole, k):
        return whole.chunk(processes)[rank].chunk(2)[k]

    model = loops.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, prepared = accelerator.prepare(model, optimizer)
    noise = loops.Noise(part, steps.start, 2)
    smart = SMART(model, loops.CONFIG, noise=noise).attach(optimizer)
    if steps.start:
        accelerator.load_state(folder)
        smart.load_state_dict(torch.load(f"{folder}/smart_{rank}.pt", weights_only=True))
    history = []
    for step in steps:
        if step == STEPS // 2 and steps.start == 0:
            accelerator.save_state(folder)
            torch.save(smart.state_dict(), f"{folder}/smart_{rank}.pt")
        sums = {"R_s": 0.0, "D_Breg": 0.0}
        for k in range(2):
            ids, labels = (part(rows, k) for rows in loops.batch(step))
            with accelerator.accumulate(model):
                logits, penalty = smart(ids)
                accelerator.backward(cross_entropy(logits, labels) + penalty)
                prepared.step()
                prepared.zero_grad()
            sums = {name: sums[name] + smart.metrics[name] / 2 for name in sums}
        history.append(sums)
    return loops.results(smart, history)


def train_accelerate():
    """Train with DistributedDataParallel and fully_shard, and again from the middle."""
    found = {}
    for name, sharded in ACCELERATE.items():
        found[name] = accelerated(sharded, name)
        found[name]["resumed"] = accelerated(sharded, name, range(STEPS // 2, STEPS))
    torch.save(found, f"accelerate_{PartialState().process_index}.pt")


def ended(job):
    """Do a job, and leave the group as docs/distributed.md does."""
    job()
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def train_zero():
    """Train with DeepSpeed's engine, in float32."""
    import deepspeed

    warnings.simplefilter("ignore")  # of functions of torch's that it uses
    deepspeed.init_distributed("gloo", verbose=False)
    rank, found = distributed.get_rank(), {}
    for name, (stage, config) in ZERO.items():
        model = loops.make(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        settings = {
            "train_micro_batch_size_per_gpu": loops.ROWS // 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        smart = SMART(engine, config, noise=loops.Noise(lambda rows, _: rows.chunk(2)[rank], 0, 1))
        history = []
        for step in range(STEPS):
            ids, labels = (rows.chunk(2)[rank] for rows in loops.batch(step))
            logits, penalty = smart(ids)
            engine.backward(cross_entropy(logits, labels) + penalty)
            engine.step()
            smart.update()
            history.append({key: smart.metrics[key] for key in ("R_s", "D_Breg")})
        found[name] = {"weights": gathered(model), "history": history}
        found[name]["sizes"] = {key: average.numel() for key, average in smart.teacher.items()}
        with smart.swap_teacher():
            found[name]["teacher"] = gathered(model)
        assert all(map(torch.equal, gathered(model).values(), found[name]["weights"].values()))
        if stage == 3:
            try:
                SMART(engine.module, config)
            except ValueError as error:
                found[name]["refused"] = str(error)
    torch.save(found, f"zero_{rank}.pt")


def gathered(model):
    """The whole weights."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


JOBS = {"trainer": train_fsdp, "accelerate": train_accelerate}
if importlib.util.find_spec("deepspeed") is not None:
    JOBS["zero"] = train_zero

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    gc.freeze()  # as in conftest.py
    jobs = {name: partial(ended, job) for name, job in JOBS.items() if name in (sys.argv[2:] or JOBS)}
    print(json.dumps({name: loops.fork_two(name, job) for name, job in jobs.items()}))
