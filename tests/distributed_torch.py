"""What test_torch_distributed.py trains in one process, and in two: `python distributed_torch.py FOLDER SCRIPT ...`."""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # once for all forks
import torch.distributed.nn  # before there is a group, see docs/distributed.md
from notes import Notes
from paper_settings import papers
from small_torch import Dropout
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART

ROOT = Path(__file__).parent.parent
ROWS, STEPS = 8, 4
CONFIG = papers(total_steps=STEPS, epsilon=0.1, sigma=0.05, eta=0.1, ascent_steps=2, beta_early=0.5, beta_late=0.7)
MARGIN = CONFIG.replace(start="margin", ascent_steps=1)

# name -> how the model is wrapped, the settings, micro-batches a step
DDP = {
    "default": ({}, CONFIG, 1),
    "static_graph": ({"static_graph": True}, CONFIG, 1),
    "find_unused_parameters": ({"find_unused_parameters": True}, CONFIG, 1),
    "no_sync": ({}, CONFIG, 2),
    "no_sync, find_unused_parameters": ({"find_unused_parameters": True}, MARGIN, 2),
    "static_graph, margin": ({"static_graph": True}, MARGIN, 1),
}
FSDP = {
    "whole": ({"layers": False}, CONFIG, 1),
    "whole, margin, accumulated": ({"layers": False}, MARGIN, 2),
    "by layer": ({}, CONFIG, 1),
    "by layer, margin": ({}, MARGIN, 1),
    "by layer, accumulated": ({}, CONFIG, 2),
    "by layer, kept whole": ({"reshard_after_forward": False}, MARGIN, 1),
    "by layer, root resharded": ({"reshard_after_forward": True}, CONFIG, 1),
    "by layer, checkpointed": ({"checkpointed": True}, MARGIN, 1),
    "D_Breg alone": ({}, CONFIG.replace(lambda_s=0), 1),
    "R_s alone": ({}, CONFIG.replace(mu=0), 1),
}


class Model(nn.Module):
    """Weights that two processes cannot halve, one of a single entry, tokens that are padding."""

    def __init__(self):
        super().__init__()
        self.checkpointed = False
        self.embedding = nn.Embedding(11, 5, padding_idx=0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return self.head(self.scale * x.mean(1))


def make(dtype=torch.float64):
    torch.manual_seed(0)
    return Model().to(dtype)


def shard(model, layers=True, checkpointed=False, **settings):
    from torch.distributed.fsdp import fully_shard

    model.checkpointed = checkpointed
    for layer in model.layers if layers else []:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    ids, labels = (torch.randint(n, shape, generator=generator) for n, shape in ((11, (ROWS, 4)), (3, (ROWS,))))
    return ids, labels


class Noise:
    """The rows that belong to a process and a micro-batch, of what one process draws for the whole batch."""

    def __init__(self, part, step, micro):
        self.part, self.calls, self.micro = part, step * micro, micro

    def __call__(self, like):
        step, k = divmod(self.calls, self.micro)
        self.calls += 1
        generator = torch.Generator().manual_seed(step)
        return self.part(torch.randn(ROWS, *like.shape[1:], generator=generator, dtype=torch.float64), k).to(like)


def train(model, config, micro=1, steps=range(STEPS), state=None, **settings):
    """A plain loop, on this process's share of the rows: the SMART, the optimiser, R_s and D_Breg of each step."""
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)

    def part(whole, k):
        return whole.chunk(processes)[rank].chunk(micro)[k]

    smart = SMART(model, config, noise=Noise(part, steps.start, micro), **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        smart.load_state_dict(state["smart"])
    history = []
    for step in steps:
        metrics = defaultdict(float)
        for k in range(micro):
            ids, labels = (part(whole, k) for whole in batch(step))
            with synchronised(model, k == micro - 1):
                logits, penalty = smart(ids)
                ((cross_entropy(logits, labels) + penalty) / micro).backward()
            for name in {"R_s", "D_Breg"} & smart.metrics.keys():
                metrics[name] += smart.metrics[name] / micro
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
        history.append(dict(metrics))
    return smart, optimizer, history


def synchronised(model, last):
    """The gradients of all processes are averaged, and sharded weights given up, in the last micro-batch only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    return model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext()


def whole(tensors):
    """Of sharded tensors, what all processes have together."""
    return {name: t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach() for name, t in tensors.items()}


def results(smart, history):
    return {"weights": whole(dict(smart.model.named_parameters())), "teacher": whole(smart.teacher), "history": history}


def ddp():
    return {
        name: results(*train(DistributedDataParallel(make(), **wrapping), config, micro)[::2])
        for name, (wrapping, config, micro) in DDP.items()
    }


def fsdp():
    found = {}
    for name, (wrapping, config, micro) in FSDP.items():
        smart, _, history = train(shard(make(), **wrapping), config, micro)
        found[name] = results(smart, history)
    teacher = SMART(shard(make()), CONFIG).teacher
    return found | {
        "shards": {name: (t.to_local().numel(), t.numel()) for name, t in teacher.items()},
        "frozen": passes_with_weights(),
        "resumed": resumed(),
        "evaluated": evaluated(),
        "half": half(),
        "refused": refused(),
    }


def passes_with_weights():
    """In which passes a graph is built for the weights: clean, two of the ascent, perturbed (and the teacher's)."""
    seen = {}
    for layers in (False, True):
        model = shard(make(), layers=layers, reshard_after_forward=False)
        smart, noted = SMART(model, CONFIG), Notes()
        for linear in (model.layers[1][0], model.head):
            linear.register_forward_hook(lambda linear, *_, noted=noted: noted.add(linear.weight.requires_grad))
        for _ in range(2):  # the first step has a pass more
            noted.taken()
            smart(batch(0)[0])
        seen[layers] = noted.taken()
    return seen


def resumed():
    """The largest difference between an unbroken run and one that was saved and loaded in between."""
    unbroken = train(shard(make()), CONFIG)[0]
    smart, optimizer, _ = train(shard(make()), CONFIG, steps=range(2))
    file = f"resumed_{distributed.get_rank()}.pt"
    parts = {"model": smart.model, "smart": smart, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    state = torch.load(file, weights_only=True)
    model = shard(make())
    model.load_state_dict(state["model"])
    again = train(model, CONFIG, steps=range(2, STEPS), state=state)[0]
    ends = [[*whole(s.teacher).values(), *whole(s.model.state_dict()).values()] for s in (unbroken, again)]
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def evaluated():
    """Logits in eval mode before, inside and after swap_teacher, and a training step behind it."""
    smart, _, _ = train(shard(make()), CONFIG)
    model, ids = smart.model.eval(), batch(0)[0]
    with torch.no_grad():
        before = model(ids)
        with smart.swap_teacher():
            inside = model(ids)
        after = model(ids)
    expected = make().eval()
    expected.load_state_dict(whole(smart.teacher))
    model.train()
    smart(ids[:4])[1].backward()
    return {"before": before, "inside": inside, "after": after, "expected": expected(ids).detach()}


def half():
    """R_s of the first step, on weights that fully_shard makes bfloat16, and under autocast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {"policy": train(shard(make(torch.float32), mp_policy=policy), CONFIG, precision="model")[2]}
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = train(shard(make(torch.float32)), CONFIG)[2]
    return found


def refused():
    """What SMART says where it cannot work."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
    from torch.distributed.tensor import distribute_module

    def sharded_afterwards():
        model = make()
        smart = SMART(model, CONFIG)
        shard(model)
        smart(batch(0)[0])

    def unsharded_state():
        SMART(shard(make()), CONFIG).load_state_dict(SMART(make(), CONFIG).state_dict())

    cases = {
        "policy": lambda: SMART(shard(make(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), CONFIG),
        "output": lambda: SMART(shard(make(), mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16)), CONFIG),
        "weights": lambda: train(shard(make(torch.bfloat16)), CONFIG),
        "skip": lambda: SMART(shard(make()), CONFIG.replace(non_finite="skip")),
        "FSDP1": lambda: SMART(FullyShardedDataParallel(make(), device_id=torch.device("cpu")), CONFIG),
        "DTensor": lambda: SMART(distribute_module(make(), init_device_mesh("cpu", (2,))), CONFIG),
        "afterwards": sharded_afterwards,
        "state": unsharded_state,
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said


def dropout():
    """The masks of each pass of a step, the clean pass's first and the last pass' last, and the weights after it."""
    found = {}
    for name, wrapped in (("ddp", DistributedDataParallel), ("fsdp", shard)):
        model, layer = make(), Dropout()
        model.layers[0].append(layer)
        smart = SMART(wrapped(model), CONFIG.replace(dropout="independent"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids, y = batch(0)
        for _ in range(2):
            layer.notes.taken()
            output, penalty = smart(ids)
            (cross_entropy(output, y) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
        found[name] = {"masks": layer.notes.taken(), "weights": whole(dict(model.named_parameters()))}
    return found


def train_all():
    """Train in every way, in one of two processes, and keep what was found."""
    distributed.init_process_group("gloo")
    seed = SMART(make(), CONFIG).state_dict()["seed"]
    found = {"ddp": ddp() | {"seed": seed}, "fsdp": fsdp() | {"seed": seed}, "dropout": dropout()}
    torch.save(found, f"found_{distributed.get_rank()}.pt")
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def fork_two(name, job):
    """Do a job in two forks of this process, started as torchrun starts processes. Return their exit codes.

    A fork has imported PyTorch already. What it prints goes to NAME_RANK.log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in map(str, range(2)):
        children.append(os.fork())
        if children[-1] == 0:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
            log = os.open(f"{name}_{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            job()
            sys.exit()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_a_session(*arguments, timeout, **environment):
    """Run Python in a session of its own, which ends with all its forks; return its exit status, output and errors."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    started = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = started.communicate(timeout=timeout)
    finally:
        if started.returncode is None:
            os.killpg(started.pid, signal.SIGKILL)  # its forks, too
    return started.returncode, output, errors


def in_processes(script, *arguments, timeout):
    """Run a script that forks its processes, warnings being errors; return the exit codes that it prints."""
    status, codes, errors = in_a_session("-W", "error", script, *arguments, timeout=timeout)
    assert status == 0, errors
    return json.loads(codes)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    jobs = {script: partial(runpy.run_path, script, run_name="__main__") for script in sys.argv[2:]}
    print(json.dumps({name: fork_two(name, job) for name, job in {"train_all": train_all, **jobs}.items()}))
