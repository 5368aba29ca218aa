"""Raise an exception at every place in which the user's own code runs inside SMART, and check what is left changed.

python tools/faults.py [--backend torch tf]

Each call of a submodule in each pass, of a hook or of a function that SMART was given gets one injection.
`faults_tf.py` lists the places of Keras' fits. Afterwards weights, theta~, gradients, buffers, what modules keep, the
random stream, the mode, hooks and files must be what plain training leaves when its own forward breaks off there, or
has ended. The next step must work. Prints the table of docs/faults.md. The exit status is 1 if something was left
changed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class Injected(Exception):  # noqa: N818
    """The user's own error."""


class Trigger:
    """Raises at its `at`-th call. SMART cannot put its count back after a pass, because it is thread-local."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._own.calls, self._own.at = 0, None

    @property
    def calls(self) -> int:
        """Return how often it was called."""
        return int(self._own.calls)

    def arm(self, after: int | None) -> None:
        """Set the call to raise at, counted from now; None means never."""
        self._own.at = None if after is None else self.calls + after

    def __call__(self, *_: Any) -> None:
        """Count a call as a forward hook, or raise."""
        self._own.calls += 1
        if self._own.calls == self._own.at:
            raise Injected

    def __reduce__(self) -> Any:
        return Trigger, ()


class Row(NamedTuple):
    """One kind of place: the exceptions raised there, and what was left changed."""

    place: str
    injections: int
    left: list[str]


def torch_rows(only: str = "") -> Iterator[Row]:
    """Break off a step of a PyTorch loop in each call of each pass, for the rows whose names contain `only`."""
    import numpy as np
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from smartreg_torch import SMART, SMARTConfig

    class Model(nn.Module):
        """A model with dropout, BatchNorm, attributes that a forward changes, and a layer that is checkpointed."""

        def __init__(self, trigger: Trigger) -> None:
            super().__init__()
            self.embedding, self.norm, self.dropout = nn.Embedding(20, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
            self.layer, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
            self.count, self.kept, self.checkpoints = 0, [], False
            self.generator = torch.Generator().manual_seed(0)
            for module in (self, self.embedding, self.norm, self.dropout, self.layer[0], self.layer[1], self.head):
                module.register_forward_pre_hook(trigger)
                module.register_forward_hook(trigger)

        def forward(self, ids: Any, attention_mask: Any) -> Any:
            self.count += 1
            self.kept.append(self.count)
            x = self.dropout(self.embedding(ids))
            x = checkpoint(self.layer, x, use_reentrant=False) if self.checkpoints else self.layer(x)
            x = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
            noise = np.random.rand() + torch.rand((), generator=self.generator)  # noqa: NPY002
            return {"logits": self.head(self.norm(x)), "noise": noise}

    def watched(model: Any) -> dict[str, Any]:
        """Collect all that must be as plain training leaves it."""
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        return {
            "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
            "buffers": {name: b.clone() for name, b in model.named_buffers()},
            "gradients": grads,
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "mode": [module.training for module in model.modules()],
            "kept values": (model.count, list(model.kept)),
            "random streams": (torch.get_rng_state(), np.random.get_state()[2]),  # noqa: NPY002
            "a generator": model.generator.get_state(),
            "autocast": torch.is_autocast_enabled("cpu"),
        }

    def different(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return not torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() != b.keys() or any(different(a[name], b[name]) for name in a)
        if isinstance(a, (list, tuple)):
            return len(a) != len(b) or any(different(x, y) for x, y in zip(a, b, strict=True))
        return type(a) is not type(b) or a != b

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, 20, (6, 5), generator=generator) for _ in range(3)]
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[1:, 3:] = 0
    both = SMARTConfig(beta_early=0.9, beta_late=0.9, ascent_steps=1)

    def seeded(trigger: Trigger, half: bool, checkpoints: bool) -> Any:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = Model(trigger)
        model.checkpoints = checkpoints
        return model.bfloat16() if half else model

    def attempt(at: int | None, config: Any, how: dict[str, bool], first: int) -> tuple[int, str]:
        """Break off at the at-th call of step `first` or its backward. Return what was left, or ""."""
        trigger, plain_trigger = Trigger(), Trigger()
        model = seeded(trigger, how["half"], how["checkpoints"])
        twin = copy.deepcopy(model)
        for module in twin.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in hooks.items():
                    if isinstance(hook, Trigger):
                        hooks[key] = plain_trigger
        given = [
            lambda output: (trigger(), output["logits"])[1],
            lambda ids, attention_mask: (trigger(), attention_mask)[1],
        ]
        autocast = torch.autocast("cpu", torch.bfloat16) if how["autocast"] else nullcontext()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = Path(folder, "run.npz") if how["record"] else None
            precision = "model" if how["half"] else "float32"
            smart = SMART(
                model, config, outputs=given[0], mask=given[1], lean=how["lean"], record=record, precision=precision,
                noise=lambda like: (trigger(), torch.randn(like.shape, generator=torch.Generator().manual_seed(1)))[1],
            )  # fmt: skip
            for batch in batches[:first]:
                with autocast:
                    smart(batch, mask)[1].backward()
                model.zero_grad()
                smart.update()
            twin.load_state_dict(model.state_dict())
            twin.count, twin.kept = model.count, list(model.kept)
            twin.generator.set_state(model.generator.get_state())
            teacher = {name: average.clone() for name, average in smart.teacher.items()}
            stream = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
            trigger.arm(at)
            start, broken = trigger.calls, "forward"
            try:
                with autocast:
                    _, penalty = smart(batches[first], mask)
                broken = "backward"
                penalty.backward()
                broken = ""
            except Injected:
                pass
            total = trigger.calls - start
            trigger.arm(None)
            mine = watched(model)
            torch.set_rng_state(stream[0])
            np.random.set_state(stream[1])  # noqa: NPY002
            plain_trigger.arm(at)
            try:
                with autocast:
                    twin(batches[first], mask)
            except Injected:
                pass
            plain_trigger.arm(None)
            plain = watched(twin)
            if broken != "forward":
                mine.pop("gradients"), plain.pop("gradients")  # a broken backward leaves those that it reached
            left = [name for name in plain if different(mine[name], plain[name])]
            left += ["theta~"] if different(teacher, smart.teacher) else []
            left += (
                ["an armed hook"]
                if any(
                    getattr(hook, "is_armed", False)
                    for module in smart.model.modules()
                    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
                )
                else []
            )
            left += ["a file"] if broken and list(Path(folder).iterdir()) else []
            model.zero_grad()
            with autocast:
                smart(batches[first], mask)[1].backward()
            if not max(smart.metrics.get("R_s", 0), smart.metrics.get("D_Breg", 0)) >= 0:
                left.append("the next step")
            smart.remove()
            left += ["a hook"] if any(
                type(hook).__module__.startswith("smartreg")
                for module in model.modules()
                for hook in module._forward_hooks.values()
            ) else []  # fmt: skip
        return total, ", ".join(left)

    ways = {
        "margin start": {},
        "Gaussian start": {"start": "gaussian"},
        "mu = 0": {"mu": 0.0},
        "lambda_s = 0": {"lambda_s": 0.0},
        "lean": {"ascent_steps": 0},
        "checkpointed layers": {},
        "under autocast": {},
        "bfloat16 weights, precision='model'": {"epsilon": 0.5, "sigma": 0.5},
        "recording": {},
    }
    flags = {
        "lean": ("lean",),
        "checkpointed layers": ("checkpoints",),
        "under autocast": ("autocast",),
        "bfloat16 weights, precision='model'": ("half",),
        "recording": ("record",),
    }
    for name, changes in ((name, changes) for name, changes in ways.items() if only in name):
        how = dict.fromkeys(("lean", "checkpoints", "autocast", "half", "record"), False)
        how |= dict.fromkeys(flags.get(name, ()), True)
        config = both.replace(**changes)
        for first in (0, 1):
            total, left = attempt(None, config, how, first)
            found = [left] if left else []
            for at in range(1, total + 1):
                _, left = attempt(at, config, how, first)
                if left:
                    found.append(f"call {at}: {left}")
            yield Row(f"PyTorch loop, {name}, {'first' if first == 0 else 'second'} step", total, found)


def trainer_rows() -> Iterator[Row]:
    """Raise in each method of a user's callback, and in each override of a Trainer's method."""
    import torch
    import transformers
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from smartreg_torch import SMARTConfig
    from smartreg_torch.transformers import SMARTMixin

    transformers.logging.set_verbosity_error()
    rows = [{"ids": torch.tensor([i % 9, 1 + i % 7]), "labels": torch.tensor(i % 2)} for i in range(8)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.dropout, self.head = nn.Embedding(10, 4), nn.Dropout(0.1), nn.Linear(8, 2)
            self.count = 0

        def forward(self, ids: Any, labels: Any = None) -> Any:
            self.count += 1
            logits = self.head(self.dropout(self.embedding(ids)).flatten(1))
            return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}

    events = [name for name in vars(TrainerCallback) if name.startswith("on_")]
    methods = ["training_step", "compute_loss", "evaluate", "prediction_step", "log", "_save", "get_train_dataloader"]
    methods += ["create_optimizer", "create_scheduler", "_save_checkpoint", "_load_best_model", "get_batch_samples"]

    def attempt(kind: str, name: str, at: int) -> tuple[bool, str]:
        """Return whether the place was reached, and what was left."""
        trigger = Trigger()
        raising = {name: lambda self, *a, **k: trigger()} if kind != "override" else {}
        callback = type("Raises", (TrainerCallback,), raising)()

        def override(self: Any, *args: Any, **kwargs: Any) -> Any:
            trigger()
            return getattr(Trainer, name)(self, *args, **kwargs)

        theirs = type("Theirs", (Trainer,), {name: override} if kind == "override" else {})
        mine = type("Mine", (SMARTMixin, theirs), {})
        model = Model()
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, max_steps=3, per_device_train_batch_size=4, logging_steps=1, eval_strategy="steps",
                eval_steps=1, save_steps=1, load_best_model_at_end=True, use_cpu=True, report_to=[], disable_tqdm=True,
            )  # fmt: skip
            trainer = mine(
                model, args, train_dataset=rows, eval_dataset=rows, smart=SMARTConfig(),
                callbacks=[callback] if kind == "callback" else None,
            )  # fmt: skip
            if kind == "first callback":
                trainer.callback_handler.callbacks.insert(0, callback)
            trigger.arm(at)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    trainer.train()
            except Injected:
                pass
            else:
                return False, ""
            trigger.arm(None)
            left = []
            hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
            left += ["a hook"] if hooks else []
            left += ["forward"] if "forward" in vars(model) else []
            left += ["requires_grad"] if not all(p.requires_grad for p in model.parameters()) else []
            left += ["a penalty outside of train()"] if trainer._smart_window is not None else []
            left += ["a file that is not complete"] if list(Path(folder).rglob("*.part")) else []
            steps = trainer.state.global_step
            calls = model.count
            model.train()
            model(torch.ones(2, 2, dtype=torch.long))
            left += ["more than one pass"] if model.count != calls + 1 else []
            trainer.args.max_steps = steps + 2
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
            if not trainer.smart or not trainer.smart.metrics.get("R_s", 0) > 0:
                left.append("the next train()")
        return True, ", ".join(left)

    for kind, names in (("callback", events), ("first callback", events), ("override", methods)):
        injections, found = 0, []
        for name in names:
            for at in (1, 2, 3):
                reached, left = attempt(kind, name, at)
                injections += reached
                if left:
                    found.append(f"{name}, call {at}: {left}")
        yield Row(f"Trainer, {kind}", injections, found)


def tf_rows() -> Iterator[Row]:
    """Break off Keras' fit, eager and as a graph."""
    import faults_tf

    return itertools.starmap(Row, faults_tf.rows())


def main() -> int:
    """Print the table. Return 1 if something was left changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=["torch", "tf"], default=["torch", "tf"])
    given = parser.parse_args()
    rows: list[Row] = []
    sources: dict[str, list[Callable[[], Iterator[Row]]]] = {"torch": [torch_rows, trainer_rows], "tf": [tf_rows]}
    print("| where the exception is raised | injections | left as before |\n|---|---|---|")
    for backend in given.backend:
        for row in (row for source in sources[backend] for row in source()):
            rows.append(row)
            verdict = "all" if not row.left else f"{row.injections - len(row.left)}; {row.left[0]}"
            print(f"| {row.place} | {row.injections} | {verdict} |", flush=True)
    verdict = "not all" if any(row.left for row in rows) else "all"
    print(f"| together | {sum(row.injections for row in rows)} | {verdict} |")
    return int(any(row.left for row in rows))


if __name__ == "__main__":
    sys.exit(main())
