"""SMART for any PyTorch module in any training loop (paper: equation 1 and Algorithm 1)."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from smartreg.checking.recording import Recorder
from smartreg.config import Precision, SMARTConfig, check_options, suggesting
from smartreg.report import Choice, Description, Observer
from smartreg_torch import compat
from smartreg_torch.inputs import Masks
from smartreg_torch.loop import Loop
from smartreg_torch.outputs import Outputs, Reader, chosen
from smartreg_torch.passes import Passes, Runner, is_compiled, untouched_gradients
from smartreg_torch.replay import Given, State, device_of
from smartreg_torch.report import Report, Reports, observed, record, see
from smartreg_torch.sharding import check_sharding, fully_sharded
from smartreg_torch.site import Site
from smartreg_torch.step import Noise, Step, take_step
from smartreg_torch.teacher import Teacher, in_model


class SMART:
    """Compute the penalty lambda_s R_s(theta) + mu D_Breg(theta, theta~) of a model, beside its own output.

    F(theta) = L(theta) + lambda_s R_s(theta) + mu D_Breg(theta, theta~)

    The model stays as it is, but for one idle hook. All passes over a batch use the same dropout masks, unless
    `config.dropout` is "independent". BatchNorm statistics, other buffers and the global random streams are after a
    step as plain training leaves them. Make it after the model is on its device and before the first optimiser step:
    theta~ starts as the weights are then.

    Args:
        model: any module. In DistributedDataParallel only the clean pass runs through the wrapper. After `fully_shard`
            theta~ is sharded as the weights are (docs/distributed.md).
        config: the settings. `total_steps` is needed if beta is scheduled, as it is by default.
        site: where x is, see `smartreg_torch.site.Site`; a list of names perturbs several at once.
        outputs: which of the model's outputs f(x) are: a name or index, several (they add up), or a function from
            the model's output to a tensor, a `Projection` or several. By default a plain tensor, "logits",
            "start_logits" with "end_logits", or the only floating-point tensor there is.
        divergence: l_s, "symmetric_kl", "bernoulli_symmetric_kl" or "squared_error", one for all outputs or one for
            each. By default what the model's `config.problem_type` says, else "symmetric_kl". That guess is checked
            against the loss's own gradient in the first backward.
        class_axis: the axis of the outputs that has the classes, labels or values. By default what the model's
            config, the labels, the mask and the shape of x say; else a ValueError says what to give.
        mask: which positions are real: the name of an argument, or a function of the model's arguments. By default
            `attention_mask` if there is one (true at real tokens, or 0 there if it is to be added to scores), or
            PyTorch's `key_padding_mask`; else the tokens that are not the embedding's `padding_idx` (which lambda_s = 0
            does not read). For a decoder: the positions that `decoder_attention_mask` leaves, or whose label is not
            -100.
        noise: like -> standard normal tensor of that shape; by default drawn from a generator of its own, seeded with
            `torch.initial_seed()` plus the rank of the process.
        precision: of all passes that the penalty compares: "float32", or the "model"'s, which loses small radii. The
            model's own pass and the task loss stay as they are. If autocast is on or weights are half, "float32" costs
            one more clean pass, and these passes have float32 copies of such weights (docs/precision.md).
        lean: whether to compute R_s with at most one graph in memory, at the cost of one more forward pass. The
            perturbed pass builds no graph until `loss.backward()` has freed the clean one. Value and gradient are the
            same. It is for the margin start without ascent steps, if activations are what fills the memory
            (docs/performance.md).
        record: a file to be written with what SMART saw in the first `record_steps` training steps, for
            `smartreg.checking.compare_run`; it must not exist yet, so that no old run is taken for this one. It is
            written after the last of them, or with fewer at `remove()` or when the run ends. Training stays the same,
            bit for bit; the tensors of those steps are kept in main memory.
        on_step: is called with a `smartreg.report.StepSeen` after each training step that had a penalty: delta, the
            outputs of all passes and what was found, off the graph and on the device. An exception in it propagates.

    Attributes:
        step: optimiser steps taken, counted by `update`.

    The first training step also makes sure that a pass can be repeated: at delta = 0 it must give what the clean pass
    gave. `describe()` says what was chosen, and why.

    Raises:
        TypeError, ValueError: bad arguments; the message says which and what to do.
        FileExistsError, FileNotFoundError: `record` is there already, or its folder is not.

    Source: paper, section 3 and Algorithm 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ids, y = torch.randint(9, (16, 2)), torch.randint(2, (16,))
        >>> with SMART(model, SMARTConfig(total_steps=3)) as smart:
        ...     for _ in range(3):
        ...         logits, penalty = smart(ids)
        ...         loss = nn.functional.cross_entropy(logits, y) + penalty
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         smart.update()
        >>> sorted(smart.metrics)
        ['D_Breg', 'R_s', 'beta', 'max_delta', 'skipped', 'step', 'vanished']
    """

    @suggesting("SMART")
    def __init__(
        self,
        model: nn.Module,
        config: SMARTConfig | None = None,
        *,
        site: str | Sequence[str] | None = None,
        outputs: Outputs | None = None,
        divergence: str | Sequence[str] | None = None,
        class_axis: int | None = None,
        mask: Masks | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        precision: Precision = "float32",
        lean: bool = False,
        record: str | os.PathLike[str] | None = None,
        record_steps: int = 10,
        on_step: Observer | None = None,
    ) -> None:
        config = SMARTConfig() if config is None else config
        check_options("SMART", config, precision, on_step)
        if not isinstance(lean, bool):
            raise TypeError(f"SMART: lean must be True or False, got {lean!r}")
        _check_model(model)
        self._runner = Runner(model, partial(chosen, outputs=outputs), precision)
        self.model = self._runner.model
        self._reader = Reader(self.model, outputs, divergence, class_axis, mask)
        if lean and (self._runner.called is not model or fully_sharded(self.model)):
            raise ValueError(
                "SMART: lean=True with DistributedDataParallel or fully_shard would add the gradient of the perturbed "
                "pass after the processes have averaged theirs. Use lean=False, or checkpoint the model's layers"
            )
        self.precision = precision
        self.step = 0
        self._lean = lean
        self._teacher = Teacher()
        self._site_asked = site
        self._site: Site | None = None
        dist = torch.distributed
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._noise = Noise((torch.initial_seed() + rank) % 2**64, noise)  # each process has other examples in row k
        self._reports = Reports()
        self._loop = Loop(self._reports.warn)
        self._optimizer_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._removed = False
        self._recorder: Recorder | None = None
        self._on_step = on_step
        try:
            self.config = config
            if record is not None:
                self._recorder = Recorder(record, record_steps, "SMART")
                site_name = "none" if self._site is None else self._site.name
                self._recorder.begin("torch", {"torch": torch.__version__}, self.config, site_name)
                weakref.finalize(self, self._recorder.write)  # if nobody calls remove(), at the latest at exit
        except BaseException:
            self.remove()
            raise

    @property
    def teacher(self) -> dict[str, Tensor]:
        """Return theta~ by parameter name, in float32 or wider; DTensors if the weights are."""
        return self._teacher.averages

    @property
    def config(self) -> SMARTConfig:
        """Return the settings. Others may be set between two steps, to warm lambda_s up, say, and are checked then."""
        return self._config

    @config.setter
    def config(self, config: SMARTConfig) -> None:
        check_options("SMART", config)
        config.check_total_steps("SMART")
        check_sharding(self._runner.wrapped, self.model, config, self.precision)
        if config.lambda_s > 0 and self._site is None:
            self._site = Site(self.model, self._site_asked)
            if is_compiled(self._runner.wrapped):
                torch.compiler.reset()  # code that was compiled before there was the site's hook would go on without it
        self._config = config
        if config.has_teacher:
            self._teacher.follow(self._look())

    def __call__(
        self, *args: Any, sample_weight: Tensor | None = None, label_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Return the model's own output, and the penalty to add to the loss.

        In eval mode and under `torch.no_grad()` this is the model's own call, and the penalty is 0.

        Args:
            sample_weight: w_i, (n,): weighs R_s and D_Breg, 1/n sum_i w_i l_s. Everything else goes to the model, and
                this too if its forward takes it.
            label_mask: true at the positions that have a label, (n, tokens). If the outputs have that axis, the other
                positions take no part in the mean.

        Raises:
            FloatingPointError: the penalty is NaN or infinite and `config.non_finite` is "raise". On a GPU it
                is raised by the attached optimiser's step or by `update`, so that the call does not wait.
            RuntimeError, TypeError, ValueError: the site, the outputs or the mask are not what they should be.
        """
        kwargs = self._arguments("called", kwargs, sample_weight)
        config, runner, compiled = self.config, self._runner, compat.frames_compiled()
        if not (self.model.training and torch.is_grad_enabled()) or not config.active:
            self._loop.idle = torch.is_grad_enabled() and config.has_penalty
            return runner.wrapped(*args, **kwargs), _zero(self.model)

        self._loop.idle = False
        self._reports.judge(config)
        theta = self._look()
        self._loop.called(theta, config)
        lambda_s = config.smoothness_weight(self.step)
        if config.has_teacher:
            self._teacher.follow(theta)
        self._teacher.begin(theta)
        if lambda_s == config.mu == 0:
            self._reports.add(None)
            output = runner.wrapped(*args, **kwargs)
            self._teacher.settle(theta)
            return output, _zero(self.model)
        passes = self._passes(runner.wrapped, (args, kwargs), lambda_s)
        asked = sample_weight, label_mask, self._reports.warn
        step = take_step(passes, self._reader, self._teacher, config, lambda_s, self._noise, *asked, self._lean)
        found, dtype = observed(passes.clean.calls, step.stages.get("ascent", []))
        report = Report(self.step + 1, step.terms | found | {"penalty": step.penalty}, step.stages, dtype)
        self._reports.add(report)
        self._observe(step, report)
        penalty = step.penalty
        if config.non_finite == "skip" and not report.is_finite:
            self._reports.skipped += 1
            penalty = _zero(self.model)
        if report.is_here:
            self._reports.judge(config)
        self._loop.ran(compiled=compat.frames_compiled() > compiled)
        return passes.output, penalty

    def measure(
        self, *args: Any, sample_weight: Tensor | None = None, label_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """Measure R_s and D_Breg of a batch in eval mode, on dev data, say.

        The weights, the mode of each module, random streams, buffers and every `.grad` stay as they are. So does the
        noise of training: a fresh stream with the same seed is drawn from, so that two measurements can be compared.

        Args, Raises: as `__call__`.

        Returns:
            "R_s" if lambda_s > 0, "D_Breg" if mu > 0.

        Example:
            >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
            >>> smart = SMART(model, SMARTConfig(total_steps=10))
            >>> sorted(smart.measure(torch.tensor([[1, 2], [3, 4]])))
            ['D_Breg', 'R_s']
        """
        if not self.config.has_penalty:
            self._refuse_removed("measure()")
            return {}
        asked = sample_weight, label_mask, "measure()"
        step = self.evaluated(copy.copy(self._reader), (args, kwargs), *asked)
        return {name: float(term.detach()) for name, term in step.terms.items()}

    def evaluated(
        self, reader: Reader, given: Given, sample_weight: Tensor | None, label_mask: Tensor | None, call: str
    ) -> Step:
        """Do what `measure` does for `call`, and return the whole step; `reader` says how the outputs are compared."""
        given = given[0], self._arguments(call, given[1], sample_weight)
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"SMART: {call} takes gradients. Call it outside of torch.inference_mode()")
        config, runner, theta = self.config, self._runner, self._look()
        if config.has_teacher:
            self._teacher.follow(theta)
        outside = State(self.model, theta, given, modules=runner.modules)
        outside.kept.settle(everything=True)
        weights = [] if runner.sharded else theta.values()
        noise = Noise(self._noise.seed, self._noise.function)
        with torch.enable_grad(), outside.replayed() as given, untouched_gradients(weights):
            self.model.eval()
            passes = self._passes(runner.called, given, config.lambda_s)
            asked = sample_weight, label_mask, self._reports.warn
            return take_step(passes, reader, self._teacher, config, config.lambda_s, noise, *asked)

    def describe(self) -> Description:
        """Say what SMART perturbs and compares, and why; the shapes are those of the last training step.

        Example:
            >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
            >>> SMART(model, SMARTConfig(mu=0)).describe()["site"]
            Choice(value='0', why='the only nn.Embedding')
        """
        site = Choice("none", "lambda_s is 0") if self._site is None else Choice(self._site.name, self._site.why)
        precision = "precision=" if self.precision == "model" else "half precision would lose a small radius"
        known = {"site": site} | self._reader.describe() | {"precision": Choice(self.precision, precision)}
        return Description(known)

    def __repr__(self) -> str:
        return self.describe().line("SMART")

    def update(self) -> None:
        """Count an optimiser step, and every `proximal_steps` of them move theta~: call it after `optimizer.step()`.

        theta~ <- (1 - beta) theta + beta theta~   (paper, Algorithm 1, line 14)
        """
        self._refuse_removed("update()")
        if self._optimizer_hooks:
            raise RuntimeError("SMART: update() after attach(optimizer), which calls it. Leave one of the two out")
        self._update()

    def _update(self) -> None:
        self._reports.judge(self.config)
        theta = self._runner.theta if self._loop.calls else self._look()  # as the last call found it
        self.step += 1
        self._loop.updated(self.step, self.config)
        if self.config.has_teacher:
            self._teacher.move(theta, self.step, self.config)

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Call `update` after every step of this optimiser, so that the loop need not.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> smart = SMART(model, SMARTConfig(total_steps=10)).attach(optimizer)
            >>> optimizer.step()
            >>> smart.step
            1
        """
        if self._optimizer_hooks:
            raise RuntimeError("SMART: attach() was called before. Call it once, with the optimiser of the model")

        own = weakref.ref(self)  # the optimiser does not keep an unused SMART alive

        def judge(*_: Any) -> None:
            smart = own()
            if smart is not None:
                smart._reports.judge(smart.config)

        def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # GradScaler skips an optimiser whose gradients overflow, except a fused one: that changes nothing then
            overflow, smart = getattr(optimizer, "found_inf", None), own()
            if smart is not None and (overflow is None or not bool(overflow)):
                smart._update()

        try:
            self._optimizer_hooks = [optimizer.register_step_pre_hook(judge), optimizer.register_step_post_hook(update)]
        except AttributeError as error:  # accelerate's is an Optimizer in name only
            raise TypeError(
                f"SMART: attach() needs an optimiser of PyTorch's, got {type(optimizer).__name__}. Give the one inside "
                "it, smart.attach(prepared.optimizer), or call smart.update() after its step"
            ) from error
        for hook in self._optimizer_hooks:
            weakref.finalize(self, hook.remove)
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """Return what the last step found: R_s, D_Breg, beta, max_delta, vanished, step and skipped; wait for a GPU.

        max_delta is max|delta|, and vanished the fraction of the entries with delta != 0 in which x + delta == x. With
        `smoothness_steps` > 1 these two and R_s are of the last step that had them. step counts the optimiser steps,
        and skipped the steps without a finite penalty.
        """
        self._reports.judge(self.config)
        beta = {} if self._teacher.beta is None else {"beta": self._teacher.beta}
        return self._reports.found | beta | {"step": float(self.step), "skipped": float(self._reports.skipped)}

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """Let the model have the averaged weights theta~ inside the block, to evaluate or save them.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> smart = SMART(model, SMARTConfig(total_steps=10))
            >>> with smart.swap_teacher():
            ...     averaged = {name: value.clone() for name, value in model.state_dict().items()}
        """
        with in_model(self._look(), self._teacher.copied(), self._runner.sharded), self._loop.swapped():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit: step, theta~ and the noise. It loads with `weights_only`."""
        return {
            "step": self.step,
            "skipped": self._reports.skipped,
            "teacher": self._teacher.copied(),
            "seed": self._noise.seed,
            "generator": None if self._noise.generator is None else self._noise.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave; nothing is changed if the state is not of this model.

        A state's theta~ is left out if there is none here (mu = 0, and evaluate="theta").

        Raises:
            ValueError: the state is not of this model, or damaged.
        """
        expected = {"step", "skipped", "teacher", "seed", "generator"}
        if set(state) != expected:
            raise ValueError(f"SMART.load_state_dict: expected the keys {sorted(expected)}, got {sorted(state)}")
        for name in ("step", "skipped", "seed"):
            if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"SMART.load_state_dict: {name} must be a whole number, got {state[name]!r}")
        saved = state["teacher"] if self.config.has_teacher else None
        if saved is not None:
            self._teacher.check_saved(saved)
        self._noise = self._noise.restored(state["seed"], state["generator"], device_of(self.model))
        self._teacher.load(saved or {})
        self.step, self._reports.skipped = state["step"], state["skipped"]

    def remove(self) -> None:
        """Take every hook off the model and the optimiser. `swap_teacher` still works."""
        if self._loop.calls > 1 and self.step == 0 and not self._removed:  # no call yet: __init__ may have raised
            self._loop.ended(self._runner.theta, self.config)
        if self._site is not None:
            self._site.remove()
        for hook in self._optimizer_hooks:
            hook.remove()
        if self._recorder is not None:
            self._recorder.close()
        self._runner.forget()
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._loop.calls = 0  # what the loop left out is not to be said beside an exception
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything but hooks on an optimiser, the recording and observer, and what is left of the last step."""
        dropped: dict[str, Any] = {"_optimizer_hooks": [], "_recorder": None, "_on_step": None}
        return vars(self) | dropped

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state if "_runner" in state else _from_before(state))
        if self._removed and self._site is not None:
            self._site.remove()

    def _refuse_removed(self, call: str) -> None:
        if self._removed:
            raise RuntimeError(f"SMART: {call} after remove(). Make a new SMART(model, config)")

    def _arguments(self, call: str, kwargs: dict[str, Any], sample_weight: Tensor | None) -> dict[str, Any]:
        """Return the model's keyword arguments, with `sample_weight` if it takes that; RuntimeError after `remove`."""
        self._refuse_removed(call)
        taken = sample_weight is not None and "sample_weight" in self._reader.names
        return kwargs | ({"sample_weight": sample_weight} if taken else {})

    def _look(self) -> dict[str, nn.Parameter]:
        before, theta = self._runner.theta, self._runner.look()
        if theta is not before:
            try:
                self._teacher.check(theta)
            except RuntimeError:
                self._runner.forget()  # to check again in the next call
                raise
        return theta

    def _passes(self, call: nn.Module, given: Given, lambda_s: float) -> Passes:
        if self._site is not None:
            self._site.follow()
        return Passes(self._runner, call, given, self._site if lambda_s > 0 else None)

    def _observe(self, step: Step, report: Report) -> None:
        recorder = None if self._recorder is None or self._recorder.done else self._recorder
        if recorder is None and self._on_step is None:
            return
        seen = see(step, report, self._teacher.beta)
        if recorder is not None:
            record(recorder, self._teacher.distance(self._runner.theta) if self.config.mu > 0 else None, seen)
        if self._on_step is not None:
            self._on_step(seen)


def _check_model(model: Any) -> None:
    """Raise TypeError or ValueError if this is no module whose passes can be run again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"SMART: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise ValueError(
            "SMART: the model has parameters that are made by its first forward (nn.LazyLinear and the like), and "
            "theta~ starts from their values. Call the model on a batch before SMART and the optimiser are made"
        )
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            "SMART: nn.DataParallel runs replicas in threads, whose calls of the site cannot be told apart. Use "
            "DistributedDataParallel, started with torchrun (docs/distributed.md), or the module inside"
        )


def _from_before(state: dict[str, Any]) -> dict[str, Any]:
    """Read the pickle of a version that kept all of this in `SMART` itself."""
    old = {name.removeprefix("_"): value for name, value in state.items()}
    reader = Reader(old["model"], old["outputs"], old["divergence"], old["class_axis"], old["mask"])
    reader.heads, reader.choices = old["heads"], old["choices"]
    runner = Runner(old["wrapped"], partial(chosen, outputs=reader.outputs), old["precision"])
    runner.checked, runner.needs_graph = old["checked"], old["needs_graph"]
    reports = Reports()
    reports.last, reports.smooth, reports.skipped = old["report"], old["smooth_report"], old["skipped"]
    noise = Noise(old["seed"], old["noise"])
    noise.__setstate__(vars(noise) | {"generator": old["generator"]})
    loop = Loop(reports.warn)
    loop.calls, loop.idle, loop.compiled = old["calls_since_update"], old["idle"], old["calls_compiled"]
    same = "model precision step _lean _site_asked _site _config _removed _optimizer_hooks"
    made: dict[str, Any] = {"_reader": reader, "_runner": runner, "_reports": reports, "_noise": noise, "_loop": loop}
    made |= {"_teacher": Teacher(old["teacher"], old["beta"]), "_on_step": None, "_recorder": None}
    return made | {name: state[name] for name in same.split()}


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros((), device=device_of(model))
