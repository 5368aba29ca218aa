"""SMART for any PyTorch module in any training loop (paper: equation 1 and Algorithm 1)."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.recording import Recorder
from smartreg.report import Choice, Description, Observer, StepSeen, not_finite, warn_of
from smartreg_torch import compat
from smartreg_torch.divergences import DIVERGENCES
from smartreg_torch.lean import Afterwards, check_backward, check_no_graph
from smartreg_torch.outputs import (
    Evidence,
    Head,
    Outputs,
    check_output,
    check_probabilities,
    check_real,
    chosen,
    find_heads,
    find_mask,
    positions,
    zero_sum_error,
)
from smartreg_torch.passes import (
    Float32,
    differing,
    first_differing_module,
    frozen_weights,
    in_half,
    is_compiled,
    is_half,
    untouched_gradients,
    widened,
)
from smartreg_torch.perturbation import ascend
from smartreg_torch.proximal import bregman_divergence, mean_examples
from smartreg_torch.replay import Given, Known, State, device_of
from smartreg_torch.report import Report, observed, record
from smartreg_torch.sharding import check_sharding, fully_sharded, reshard
from smartreg_torch.site import Call, Site, argument_names, shift
from smartreg_torch.teacher import Stamp, Teacher, in_model

Precision = Literal["float32", "model"]
Masks = str | Callable[..., Tensor | Sequence[Tensor | None]]


_FOUND = ("R_s", "D_Breg", "vanished", "max_delta")
_ONE_BACKWARD = (
    "SMART: the model's backward frees or overwrites what it needs, as some fused kernels do, and the margin start "
    "runs it once before yours: your gradients would be wrong. Say SMARTConfig(start='gaussian')"
)


class _Step(NamedTuple):
    """What one mini-batch gave: the model's output, R_s and D_Breg, and what they were computed from."""

    output: Any
    terms: dict[str, Tensor]
    penalty: Tensor
    calls: list[Call]
    masks: list[Tensor | None]
    stages: dict[str, list[Tensor]]
    positions: list[Tensor | None]


class SMART:
    """The penalty lambda_s R_s(theta) + mu D_Breg(theta, theta~) of a model, beside its own output.

    F(theta) = L(theta) + lambda_s R_s(theta) + mu D_Breg(theta, theta~)

    The model stays as it is, but for one idle hook. All passes over a batch use the same dropout masks, leave BatchNorm
    statistics (and other buffers) to the model's own pass, and the global random streams where plain training would
    leave them. Make it after the model is on its device and before the first optimiser step: theta~ starts as the
    weights are then.

    Args:
        model: any module. In DistributedDataParallel only the clean pass runs through the wrapper. After `fully_shard`
            theta~ is sharded as the weights are (docs/distributed.md).
        config: the settings; `total_steps` is needed where beta is scheduled, which the default does.
        site: where x is, see `smartreg_torch.site.Site`; a list of names perturbs several at once.
        outputs: which of the model's outputs f(x) are: a name or index, several (they add up), or a function from
            the model's output to a tensor or several. By default a plain tensor, "logits", "start_logits" with
            "end_logits", or the only floating-point tensor there is.
        divergence: l_s, "symmetric_kl", "bernoulli_symmetric_kl" or "squared_error", one for all outputs or one for
            each. By default what the model's `config.problem_type` says, else "symmetric_kl". That guess is checked
            against the loss's own gradient in the first backward.
        class_axis: the axis of the outputs that has the classes, labels or values. By default what the model's
            config, the labels, the mask and the shape of x say; if they say nothing, SMART asks.
        mask: which positions are real: the name of an argument, or a function of the model's arguments. By default
            `attention_mask` where there is one (true at real tokens, or 0 there if it is to be added to scores), or
            PyTorch's `key_padding_mask`; else the tokens that are not the embedding's `padding_idx` (which lambda_s = 0
            does not read). The outputs' positions are the same, but for a decoder's: those that
            `decoder_attention_mask` leaves, or whose label is not -100.
        noise: like -> standard normal tensor of that shape; by default drawn from a generator of its own, seeded with
            `torch.initial_seed()` plus the rank of the process.
        precision: of all passes that the penalty compares: "float32", whatever autocast or half-precision weights say
            for the model's own pass and the task loss, which stay as they are; or the "model"'s, which loses small
            radii. "float32" costs one more clean pass where autocast is on or weights are half, and nothing elsewhere;
            for these passes half-precision weights have float32 copies (docs/precision.md).
        lean: R_s with one graph at a time, for one more forward pass: the perturbed pass builds no graph until
            `loss.backward()` has spent the clean one. Same value, same gradient; for the margin start without ascent
            steps, and where activations are what fills the memory (docs/performance.md).
        record: a file to be written with what SMART saw in the first `record_steps` training steps, for
            `smartreg.recording.compare_run`; it must not exist yet, so that no old run is taken for this one. It is
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
        ['D_Breg', 'R_s', 'beta', 'max_delta', 'skipped', 'vanished']
    """

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"SMART: model must be a torch.nn.Module, got {type(model).__name__}")
        config = SMARTConfig() if config is None else config
        for name in [divergence] if isinstance(divergence, str) else divergence or []:
            if name not in DIVERGENCES:
                raise ValueError(f"SMART: divergence must be one of {', '.join(DIVERGENCES)}, got {name!r}")
        if class_axis is not None and (isinstance(class_axis, bool) or not isinstance(class_axis, int)):
            raise TypeError(f"SMART: class_axis must be a whole number, got {class_axis!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"SMART: precision must be 'float32' or 'model', got {precision!r}")
        if on_step is not None and not callable(on_step):
            raise TypeError(f"SMART: on_step must be a function of one StepSeen, got {on_step!r}")
        if not isinstance(lean, bool):
            raise TypeError(f"SMART: lean must be True or False, got {lean!r}")
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
        self._wrapped = model
        self._call: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.model: nn.Module = compat.uncompiled(self._call)  # torch.compile's; all passes run its code
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "SMART: torch.compile(DistributedDataParallel(model)) would run one pass compiled and the others not. "
                "Compile inside: DistributedDataParallel(torch.compile(model))"
            )
        if lean and (self._call is not model or fully_sharded(self.model)):
            raise ValueError(
                "SMART: lean=True with DistributedDataParallel or fully_shard would add the gradient of the perturbed "
                "pass after the processes have averaged theirs. Use lean=False, or checkpoint the model's layers"
            )
        self.precision = precision
        self._lean = lean
        self.step = 0
        self._teacher = Teacher()
        self._site_asked = site
        self._site: Site | None = None
        self._outputs, self._divergence, self._mask, self._noise = outputs, divergence, mask, noise
        self._class_axis = class_axis
        rank = torch.distributed.get_rank() if _is_distributed() else 0
        self._seed = (torch.initial_seed() + rank) % 2**64  # row k is another in each process
        self._generator: torch.Generator | None = None
        self._report: Report | None = None  # of the last step, None where it had no penalty
        self._smooth_report: Report | None = None  # of the last step that had R_s
        self._skipped = 0
        self._calls_since_update = 0
        self._weight_then: Stamp | None = None  # of a weight at the first call since update()
        self._idle = False  # whether the last call was with gradients, but in eval mode
        self._calls_compiled = 0
        self._warned: set[str] = set()
        self._known = Known()
        self._needs_graph = self._is_checking = False  # whether passes without a graph fail in the model's forward
        self._checked: set[Any] = set()  # the arguments with which a pass was seen to repeat
        self._heads: list[Head] = []
        self._choices: dict[str, Choice] = {}
        self._parameter_names = argument_names(self.model)
        self._optimizer_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._removed = False
        self._theta: dict[str, nn.Parameter] | None = None  # since the last call, until update()
        self._recorder: Recorder | None = None
        self._on_step = on_step
        try:
            self.config = config
            if record is not None:
                self._recorder = Recorder(record, record_steps, "SMART")
                site_name = "none" if self._site is None else self._site.name
                self._recorder.begin("torch", {"torch": torch.__version__}, self.config, site_name)
                weakref.finalize(self, self._recorder.write)  # where nobody calls remove(), at the latest at exit
        except BaseException:
            self.remove()
            raise

    @property
    def teacher(self) -> dict[str, Tensor]:
        """theta~ by parameter name, in float32 or wider; DTensors if the weights are."""
        return self._teacher.averages

    @property
    def config(self) -> SMARTConfig:
        """The settings. Others may be set between two steps, to warm lambda_s up, say; they are checked then."""
        return self._config

    @config.setter
    def config(self, config: SMARTConfig) -> None:
        if not isinstance(config, SMARTConfig):
            raise TypeError(f"SMART: config must be a SMARTConfig, got {type(config).__name__}")
        config.check_total_steps("SMART")
        check_sharding(self.model, config, self.precision)
        if config.lambda_s > 0 and self._site is None:
            self._site = Site(self.model, self._site_asked)
            if is_compiled(self._wrapped):
                torch.compiler.reset()  # code that was compiled before there was the site's hook would go on without it
        self._config = config
        if config.mu > 0:
            self._teacher.follow(self._parameters())

    def __call__(
        self, *args: Any, sample_weight: Tensor | None = None, label_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """The model's own output, and the penalty to add to the loss.

        In eval mode and under `torch.no_grad()` this is the model's own call, and the penalty is 0.

        Args:
            sample_weight: w_i, (n,): weighs R_s and D_Breg, 1/n sum_i w_i l_s. Everything else goes to the model (and
                this too, where its forward takes it).
            label_mask: true at the positions that have a label, (n, tokens): where the outputs have that axis, the
                others take no part in the mean.

        Raises:
            FloatingPointError: the penalty is NaN or infinite and `config.non_finite` is "raise". On a GPU, so that
                nothing waits for the value, it comes from the attached optimiser's step, or from `update`.
            RuntimeError, TypeError, ValueError: the site, the outputs or the mask are not what they should be.
        """
        if self._removed:
            raise RuntimeError("SMART: called after remove(); make a new SMART(model, config)")
        if "sample_weight" in self._parameter_names and sample_weight is not None:
            kwargs["sample_weight"] = sample_weight
        config, compiled = self.config, compat.frames_compiled()
        if not (self.model.training and torch.is_grad_enabled()) or config.lambda_s == config.mu == 0:
            self._idle = torch.is_grad_enabled() and (config.lambda_s > 0 or config.mu > 0)
            output = self._wrapped(*args, **kwargs)
            return output, _zero(self.model)

        self._idle = False
        self._judge()
        theta = self._theta = self._parameters()  # walking over the modules takes time: once a step
        self._check_updates(theta)
        lambda_s = config.smoothness_weight(self.step)
        if config.mu > 0:
            self._teacher.follow(theta)
        self._teacher.begin(theta)
        step = self._step(self._wrapped, theta, (args, kwargs), lambda_s, sample_weight, label_mask)
        if not step.terms:
            self._report = None
            return step.output, _zero(self.model)
        penalty = step.penalty
        found, dtype = observed(step.calls, step.stages.get("ascent", []))
        self._report = Report(self.step + 1, step.terms | found | {"penalty": penalty}, step.stages, dtype)
        if lambda_s > 0:
            self._smooth_report = self._report
        recorder = None if self._recorder is None or self._recorder.done else self._recorder
        if recorder is not None or self._on_step is not None:
            seen = self._seen(step, sample_weight)
            if recorder is not None:
                record(recorder, seen, self._teacher.distance(theta) if config.mu > 0 else None)
            if self._on_step is not None:
                self._on_step(seen)
        if config.non_finite == "skip" and not self._report.is_finite:
            self._skipped += 1
            penalty = _zero(self.model)
        if self._report.is_here:
            self._judge()
        self._check_recompiling(compiled)
        return step.output, penalty

    def measure(
        self, *args: Any, sample_weight: Tensor | None = None, label_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """Measure R_s and D_Breg of a batch in eval mode, on dev data, say.

        The weights, the mode of each module, random streams, buffers and every `.grad` stay as they are. So does the
        noise of training: a fresh stream with the same seed is drawn from, so that two measurements can be compared.

        Args: as `__call__`.

        Returns:
            "R_s" if lambda_s > 0, "D_Breg" if mu > 0.

        Raises: as `__call__`.

        Example:
            >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
            >>> smart = SMART(model, SMARTConfig(total_steps=10))
            >>> sorted(smart.measure(torch.tensor([[1, 2], [3, 4]])))
            ['D_Breg', 'R_s']
        """
        if self._removed:
            raise RuntimeError("SMART: measure() after remove(); make a new SMART(model, config)")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("SMART: measure() takes gradients: call it outside of torch.inference_mode()")
        if "sample_weight" in self._parameter_names and sample_weight is not None:
            kwargs["sample_weight"] = sample_weight
        theta = self._parameters()
        if self.config.mu > 0:
            self._teacher.follow(theta)
        generator, lean, heads = self._generator, self._lean, self._heads
        whole = [] if self._sharded else theta.values()
        outside = State(self.model, theta, (args, kwargs))
        outside.kept.settle(everything=True)
        try:
            self._generator, self._lean = None, False
            with torch.enable_grad(), outside.replayed() as given, untouched_gradients(whole):
                self.model.eval()
                step = self._step(self._call, theta, given, self.config.lambda_s, sample_weight, label_mask)
            return {name: float(term.detach()) for name, term in step.terms.items()}
        finally:
            self._generator, self._lean, self._heads = generator, lean, heads

    def describe(self) -> Description:
        """What SMART perturbs and compares, and why; the shapes are those of the last training step.

        Example:
            >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
            >>> SMART(model, SMARTConfig(mu=0)).describe()["site"]
            Choice(value='0', why='the only nn.Embedding')
        """
        later = Choice("not known yet", "the first training step shows it")
        site = Choice("none", "lambda_s is 0") if self._site is None else Choice(self._site.name, self._site.why)
        known: dict[str, Choice] = {"site": site, "x": later}
        if self._heads:
            said = "outputs=" if self._outputs is not None else "what the model returns"
            known["outputs"] = Choice(", ".join(head.name for head in self._heads), said)
            for key, values, whys in (
                ("l_s", [head.divergence for head in self._heads], [head.why_divergence for head in self._heads]),
                (
                    "class axis",
                    ["none" if head.axis is None else str(head.axis) for head in self._heads],
                    [head.why_axis for head in self._heads],
                ),
            ):
                known[key] = Choice(", ".join(dict.fromkeys(values)), ", ".join(dict.fromkeys(whys)))
        else:
            known |= dict.fromkeys(("outputs", "l_s", "class axis"), later)
        known |= {"mask": later, "positions": later}
        precision = "precision=" if self.precision == "model" else "half precision would lose a small radius"
        return Description(known | self._choices | {"precision": Choice(self.precision, precision)})

    def __repr__(self) -> str:
        return self.describe().line("SMART")

    def _step(
        self,
        clean_call: nn.Module,
        theta: dict[str, nn.Parameter],
        given: Given,
        lambda_s: float,
        sample_weight: Tensor | None,
        label_mask: Tensor | None,
    ) -> _Step:
        """The clean pass, the ascent, theta~'s pass and the perturbed pass over one mini-batch."""
        config = self.config
        if self._site is not None:
            self._site.follow()
        state = State(self.model, theta, given, self._known, self._modules)
        lean = self._lean and lambda_s > 0
        if lean:
            for tensor in state.kept.given_tensors:
                check_no_graph(tensor)
        trained = [weight for weight in theta.values() if weight.requires_grad] if lean else []
        afterwards = Afterwards(trained) if trained else None  # before the clean pass, see there
        site, calls = self._site if lambda_s > 0 else None, list[Call]()
        differentiable = lambda_s > 0 and config.start == "margin"
        half = self.precision == "float32" and in_half(self.model, theta)
        in_float32 = Float32(self.model, self._call) if half else None

        def again(theta: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
            with (
                state.replayed(widened if in_float32 else None) as (args, kwargs),
                in_float32(theta or {}) if in_float32 else nullcontext(),
            ):
                return chosen(self._call(*args, **kwargs), self._outputs)

        def passes(theta: Mapping[str, Tensor] | None = None) -> list[Tensor]:
            return self._arranged(again(theta))

        args, kwargs = given
        if lambda_s == config.mu == 0:
            return _Step(clean_call(*args, **kwargs), {}, _zero(self.model), [], [], {}, [])
        with ExitStack() as clean:
            if site is not None and in_float32 is None:
                calls = clean.enter_context(site.recording(differentiable))
            output = clean_call(*args, **kwargs)
        self._check_written(state.settle(self._call))
        self._teacher.settle(theta)
        if in_float32 is None:
            raw = chosen(output, self._outputs)
        else:  # the clean pass once more: the rounding of the model's own is far above R_s
            with ExitStack() as clean:
                if site is not None:
                    calls = clean.enter_context(site.recording(differentiable))
                raw = again()
        for z in raw.values():
            check_output(z, len(calls[0].x) if calls else None)
        with state.kept.as_before() as (args, kwargs):  # a mask= reads what the model was given
            arguments = self._arguments(args, kwargs)
            masks, mask_name = self._masks(calls, args, kwargs)
        xs = [call.x.shape for call in calls] if calls else _shapes(arguments)
        at_input = site is None or site.at_input
        evidence = Evidence(getattr(self.model, "config", None), arguments.get("labels"), masks, xs, at_input)
        self._heads = find_heads(raw, evidence, self._divergence, self._class_axis, self._heads)
        targets = self._arranged(raw)
        divergences = self._divergences(targets)
        positions = [self._positions(z, masks, mask_name, label_mask, arguments) for z in targets]
        names = frozenset(name for name, value in arguments.items() if value is not None)
        first = lambda_s > 0, names
        is_first = self.model.training and not {first, (True, names)} & self._checked
        if is_first:
            self._choices = self._chosen_now(calls, masks, mask_name, targets, positions)
            for z, head in zip(targets, self._heads, strict=True):
                check_probabilities(z, head)
            for mask in masks if self._mask is None else []:
                if mask is not None:
                    check_real(mask, mask_name)

        terms: dict[str, Tensor] = {}
        stages = {"clean": targets}
        if is_first:
            self._check_repeated(calls, targets, positions, state, passes)
        if site is not None:
            # fully_shard reduces what it has accumulated in whichever backward comes next
            with state.kept_streams(), untouched_gradients([] if self._sharded else theta.values()):
                stages["ascent"] = self._ascend(passes, site, theta, calls, targets, masks, divergences, positions)
                if is_first and differentiable:
                    self._check_backward(calls, targets)
        if is_first:
            # not before the ascent, whose backward it would see
            self._check_loss(raw if in_float32 is None else chosen(output, self._outputs))
            self._checked.add(first)
        if config.mu > 0:  # here, while there is one graph: what this pass frees the next can have
            averages = self._teacher.for_a_pass()
            copied = {name for name in averages if in_float32 and is_half(theta[name])}  # theta~ too, in passes
            with in_model(theta, averages, self._sharded, copied):
                taught = self._without_graph(lambda: passes(averages))
            if is_first:
                self._teacher.see(averages)
            stages["teacher"] = taught
            terms["D_Breg"] = _total(
                bregman_divergence(z, z_taught, name, m, sample_weight)
                for name, z, z_taught, m in zip(divergences, targets, taught, positions, strict=True)
            )
        if site is not None:
            delta = stages["ascent"]

            def r_s(perturbed: list[Tensor], targets: list[Tensor]) -> Tensor:
                return _total(
                    mean_examples(DIVERGENCES[name](z_perturbed, z, m), sample_weight)
                    for name, z_perturbed, z, m in zip(divergences, perturbed, targets, positions, strict=True)
                )

            # x itself, not what a second pass of the layers below gives: its gradients are added up, and go on once
            points = [shift(call.own, d) for call, d in zip(calls, delta, strict=True)]
            if afterwards is None:
                with site.replaced(points):
                    perturbed = passes()
            else:
                with frozen_weights(theta.values(), self._sharded), site.replaced([x.detach() for x in points]):
                    perturbed = [z.detach() for z in passes()]  # a head in outputs= may have weights of its own
                fixed = [z.detach() for z in targets]

                def other_side() -> Tensor:
                    with site.shifted(delta):
                        return lambda_s * r_s(passes(), fixed)

                afterwards.backward_of(other_side)
            stages["perturbed"] = perturbed
            terms["R_s"] = r_s(perturbed, targets)
        penalty = _total(
            weight * terms[name] for name, weight in (("R_s", lambda_s), ("D_Breg", config.mu)) if name in terms
        )
        if afterwards is not None:
            penalty = penalty + afterwards.zero.to(penalty.device)
            penalty.register_hook(check_backward)  # type: ignore[no-untyped-call]
        return _Step(output, terms, penalty, calls, masks, stages, positions)

    def update(self) -> None:
        """Count an optimiser step, and every `proximal_steps` of them move theta~: call it after `optimizer.step()`.

        theta~ <- (1 - beta) theta + beta theta~   (paper, Algorithm 1, line 14)
        """
        if self._removed:
            raise RuntimeError("SMART: update() after remove(); make a new SMART(model, config)")
        if self._optimizer_hooks:
            raise RuntimeError("SMART: update() after attach(optimizer), which calls it: each step would count twice")
        self._update()

    def _update(self) -> None:
        self._judge()
        if self._idle and self._calls_since_update == 0:
            self._warn(
                "idle",
                "SMART: the model was trained in eval mode, in which the penalty is 0. Call model.train() before the "
                "loop; to train without dropout, set its probabilities to 0.",
            )
        self.step += 1
        self._calls_since_update, self._weight_then = 0, None
        if self.config.mu > 0:
            self._teacher.move(self._parameters() if self._theta is None else self._theta, self.step, self.config)
        self._theta = None

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
            raise RuntimeError("SMART: attach() was called before; one optimiser moves theta~")

        own = weakref.ref(self)  # an optimiser that goes on does not keep a SMART that nobody calls any more

        def judge(*_: Any) -> None:
            smart = own()
            if smart is not None:
                smart._judge()

        def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # GradScaler does not call an optimiser whose gradients overflow, but a fused one, which then does nothing
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
        """Of the last step: R_s, D_Breg, beta, max_delta = max|delta|, and vanished, the fraction of the entries with
        delta != 0 in which x + delta == x; and skipped, how many steps had no finite penalty. With
        `smoothness_steps` > 1 R_s, max_delta and vanished are of the last step that had them. Reading it synchronises.
        """
        self._judge()
        return self._found() | {"skipped": float(self._skipped)}

    def _found(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for report in (self._smooth_report, self._report):
            values |= {} if report is None else report.values
        beta = {} if self._teacher.beta is None else {"beta": self._teacher.beta}
        return {name: values[name] for name in _FOUND if name in values} | beta

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """The model has the averaged weights theta~ inside the block, to evaluate or save them.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> smart = SMART(model, SMARTConfig(total_steps=10))
            >>> with smart.swap_teacher():
            ...     averaged = {name: value.clone() for name, value in model.state_dict().items()}
        """
        with in_model(self._parameters(), self._teacher.copied(), self._sharded):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit: step, theta~ and the noise generator. Loads with `weights_only`."""
        return {
            "step": self.step,
            "skipped": self._skipped,
            "teacher": self._teacher.copied(),
            "seed": self._seed,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; nothing is changed if the state is not of this model.

        With mu = 0 a state's theta~ is not needed, and is left out.

        Raises:
            ValueError: the state is not of this model, or damaged.
        """
        expected = {"step", "skipped", "teacher", "seed", "generator"}
        if set(state) != expected:
            raise ValueError(f"SMART.load_state_dict: expected the keys {sorted(expected)}, got {sorted(state)}")
        for name in ("step", "skipped", "seed"):
            if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"SMART.load_state_dict: {name} must be a whole number, got {state[name]!r}")
        saved = state["teacher"] if self.config.mu > 0 else {}
        if self.config.mu > 0 and not saved:
            raise ValueError(
                "SMART.load_state_dict: the state has no theta~, since it was saved with mu=0. Resume it with mu=0, or "
                "start a new run from its weights"
            )
        self._teacher.check_saved(saved)
        generator = None
        if state["generator"] is not None:
            generator = torch.Generator(device_of(self.model))
            try:
                generator.set_state(state["generator"].cpu())
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"SMART.load_state_dict: the state's noise generator is none of {generator.device}: {error}"
                ) from error
        self._teacher.load(saved)
        self.step, self._skipped, self._seed = state["step"], state["skipped"], state["seed"]
        self._generator = generator

    def remove(self) -> None:
        """Undo everything: the model and the optimiser are as they were without SMART. `swap_teacher` still works."""
        if self._site is not None:
            self._site.remove()
        for hook in self._optimizer_hooks:
            hook.remove()
        if self._recorder is not None:
            self._recorder.close()
        self._removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the hooks on an optimiser, the recording and observer, and what is left of the last step."""
        state = dict(vars(self))
        state |= {"_optimizer_hooks": [], "_recorder": None, "_on_step": None, "_theta": None}
        state |= {
            "_generator": None if self._generator is None else (self._generator.device, self._generator.get_state())
        }
        return state | {"_weight_then": None, "_known": Known()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_teacher" not in state:  # of a version before there were these
            state |= {"_on_step": None, "_teacher": Teacher(state.pop("teacher"), state.pop("_beta"))}
        vars(self).update(state)
        if state["_generator"] is not None:
            device, stream = state["_generator"]
            self._generator = torch.Generator(device)
            self._generator.set_state(stream)
        if self._removed and self._site is not None:
            self._site.remove()

    def _ascend(
        self,
        passes: Callable[[], list[Tensor]],
        site: Site,
        theta: Mapping[str, nn.Parameter],
        calls: list[Call],
        targets: list[Tensor],
        masks: list[Tensor | None],
        divergences: list[str],
        positions: list[Tensor | None],
    ) -> list[Tensor]:
        frozen = ExitStack()

        def outputs_at(points: list[Tensor]) -> list[Tensor]:
            # not before the first pass of the ascent: the margin start still has a gradient to take of the clean graph,
            # which checkpointed layers rebuild as it was
            frozen.enter_context(frozen_weights(theta.values(), self._sharded))
            with site.replaced(points):
                return passes()

        xs = [call.x for call in calls]
        if self._is_static_graph:
            # the first backward through it averages gradients over the processes; a margin start's would be that one
            xs = [x.detach() for x in xs]
        noise: list[Tensor | None] = [None] * len(targets)
        if self.config.start == "gaussian":
            noise = [self._draw(x) for x in xs]
        elif "squared_error" in divergences:
            noise = [self._draw(z) for z in targets]
        try:
            # a backward under autocast would round its products: the passes have the caller's, the gradients none
            with frozen, torch.autocast(device_of(self.model).type, enabled=False):
                return ascend(outputs_at, xs, targets, self.config, noise, masks, divergences, positions)
        except RuntimeError as error:
            if compat.says(error, "reentrant"):
                raise RuntimeError(
                    "SMART: reentrant checkpointing cannot work: it allows no gradient with respect to embeddings. "
                    "Use use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False} in Hugging Face)."
                ) from error
            raise

    def _draw(self, like: Tensor) -> Tensor:
        """Standard normal, from a generator of our own: the global stream stays as plain training leaves it."""
        like = like.detach().to(torch.promote_types(like.dtype, torch.float32))
        if self._noise is not None:
            drawn = self._noise(like)
            if drawn.shape != like.shape:
                raise ValueError(
                    f"SMART: noise must give a tensor of shape {tuple(like.shape)}, got {tuple(drawn.shape)}"
                )
            return drawn
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        device = self._generator.device
        return torch.randn(like.shape, generator=self._generator, dtype=like.dtype, device=device).to(like.device)

    def _select(self, output: Any, n: int | None) -> list[Tensor]:
        """The outputs that are compared, as (n, ..., C)."""
        found = chosen(output, self._outputs)
        for z in found.values():
            check_output(z, n)
        return self._arranged(found)

    def _arranged(self, outputs: Mapping[str, Tensor]) -> list[Tensor]:
        if len(self._heads) != len(outputs):
            return [z.unsqueeze(-1) if z.ndim == 1 else z for z in outputs.values()]
        return [head.arranged(z) for head, z in zip(self._heads, outputs.values(), strict=True)]

    def _divergences(self, targets: list[Tensor]) -> list[str]:
        if len(self._heads) == len(targets):
            return [head.divergence for head in self._heads]
        evidence = Evidence(getattr(self.model, "config", None), None, [], [], False)
        outputs = {f"output {i}": z for i, z in enumerate(targets)}
        return [head.divergence for head in find_heads(outputs, evidence, self._divergence, self._class_axis)]

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments by name, however they were given."""
        named = dict(zip(self._parameter_names, args, strict=False)) | kwargs
        for value in list(named.values()):
            if isinstance(value, Mapping):  # a batch, as one argument
                named = {name: item for name, item in value.items() if isinstance(name, str)} | named
        return named

    def _masks(
        self, calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Tensor | None], str]:
        """One mask for each call of the site, or, if there is no site, those that there are; and what they are."""
        count = max(len(calls), 1)
        given: Any
        if callable(self._mask):
            given = self._mask(*args, **kwargs)
            masks: list[Tensor | None] = [given] * count if given is None or isinstance(given, Tensor) else list(given)
            if calls and len(masks) != count:
                raise ValueError(f"SMART: mask= gave {len(masks)} masks, but the site ran {count} times")
            return masks, "mask="
        if self._mask is not None:
            name, given = self._mask, self._arguments(args, kwargs).get(self._mask)
            if given is None:
                raise ValueError(f"SMART: mask={name!r}, but the model was called without that argument")
        else:
            name, given = find_mask(self._arguments(args, kwargs), [call.x.shape for call in calls])
        if given is None:
            return [call.padding for call in calls], "the embedding's padding_idx"
        others = [
            other
            for other, value in self._arguments(args, kwargs).items()
            if other != name and "mask" in other and isinstance(value, Tensor) and value.shape == given.shape
        ]
        if self._mask is None and count > 1 and others:
            raise ValueError(
                f"SMART: the site ran {count} times, and {name} and {others[0]} are both masks of its shape. Give "
                "mask=, a function of the model's arguments: a list with one mask for each call of the site"
            )
        for call in calls:
            if given.shape != (call.x.shape[:-1] if call.x.ndim > 2 else call.x.shape):
                raise ValueError(
                    f"SMART: {name} has the shape {tuple(given.shape)}, but the site gives {tuple(call.x.shape)}. "
                    "Give mask=, a function of the model's arguments: (n, tokens), one for each call of the site."
                )
        return [given] * count, name

    def _positions(
        self,
        z: Tensor,
        masks: list[Tensor | None],
        mask_name: str,
        label_mask: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor | None:
        """Which positions of an output count: those of the site, or of a decoder where there is one, with a label."""
        if "decoder_input_ids" in self._parameter_names:
            mask, labels = arguments.get("decoder_attention_mask"), arguments.get("labels")
            masks = [labels != -100 if mask is None and labels is not None else mask]
        virtual = _virtual_tokens(self.model)
        real, labelled = positions(z, masks, virtual), positions(z, [label_mask], virtual)
        if label_mask is not None and labelled is None and z.ndim > 2:
            raise ValueError(
                f"SMART: label_mask has the shape {tuple(label_mask.shape)}, and the outputs' positions are "
                f"{tuple(z.shape[:-1])}. Give a label_mask of that shape"
            )
        fits = label_mask is None and real is None and z.ndim == 3
        lost = [tuple(mask.shape) for mask in masks if mask is not None and mask.ndim == 2] if fits else []
        if lost and mask_name == "attention_mask":
            raise ValueError(
                f"SMART: {mask_name} has the shape {lost[0]}, and the outputs' positions are {tuple(z.shape[:-1])}. "
                "Say which of them count: smart(..., label_mask=<true at those, of that shape>)"
            )
        if real is None or labelled is None:
            return labelled if real is None else real
        return (real > 0) & labelled

    def _chosen_now(
        self,
        calls: list[Call],
        masks: list[Tensor | None],
        mask_name: str,
        targets: list[Tensor],
        found: list[Tensor | None],
    ) -> dict[str, Choice]:
        """What `describe` says of a step: shapes, the mask and the positions."""
        x = ", ".join(str(tuple(call.x.shape)) for call in calls)
        masked = [mask for mask in masks if mask is not None]
        shapes = ", ".join(str(tuple(z.shape)) for z in targets)
        counted = [m is not None for m in found]
        several = any(z.ndim > 2 for z in targets)
        where = f"those of {mask_name}" if any(counted) else "all" if several else "one an example"
        return {
            "x": Choice(x or "none", f"{len(calls)} call(s) of the site" if calls else "lambda_s is 0"),
            "mask": Choice(
                mask_name if masked else "none", str(tuple(masked[0].shape)) if masked else "no argument says"
            ),
            "positions": Choice(where, f"the outputs are compared as {shapes}"),
        }

    def _check_loss(self, outputs: Mapping[str, Tensor]) -> None:
        """Look, in the first backward, whether the loss is one of classes, if l_s = symmetric_kl was but a guess."""

        def check(z: Tensor, head: Head) -> None:
            value = z.detach()

            def on_gradient(gradient: Tensor) -> None:
                message = zero_sum_error(gradient, value, head)
                if message:
                    handle.remove()
                    self._warn("loss", message)

            handle = z.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        for z, head in zip(outputs.values(), self._heads, strict=True):
            if head.is_guess and z.requires_grad:
                check(z, head)

    def _check_written(self, lost: list[str]) -> None:
        if lost:
            self._warn(
                "written",
                f"SMART: the model wrote into {lost[0]} for the first time, and the other passes of this step cannot "
                "have what was there before. From the next step on they have.",
            )

    @property
    def _is_static_graph(self) -> bool:
        return isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and bool(self._wrapped.static_graph)

    def _without_graph(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run a pass of which no gradient is taken; with a graph if the model's forward needs one."""
        if not self._needs_graph:
            try:
                with torch.no_grad():
                    return run()
            except (RuntimeError, AssertionError):
                if not self._is_checking:
                    raise
        with torch.enable_grad():
            found = [z.detach() for z in run()]
        self._needs_graph = True
        return found

    def _check_backward(self, calls: list[Call], targets: list[Tensor]) -> None:
        """Raise RuntimeError if the model's backward changes what it needs: the margin start runs it once more."""
        xs = [call.x for call in calls]
        if self._is_static_graph or not all(x.requires_grad for x in xs):
            return
        ones = [torch.ones_like(z) for z in targets]
        try:
            first, second = (
                torch.autograd.grad(targets, xs, ones, retain_graph=True, allow_unused=True) for _ in range(2)
            )
        except (AttributeError, IndexError, KeyError, RuntimeError) as error:  # what it has saved is gone
            raise RuntimeError(_ONE_BACKWARD) from error
        both = zip(first, second, strict=True)
        if any(a is not None and b is not None and differing([a], [b], [None]) for a, b in both):
            raise RuntimeError(_ONE_BACKWARD)

    def _check_repeated(
        self,
        calls: list[Call],
        targets: list[Tensor],
        positions: list[Tensor | None],
        state: State,
        passes: Callable[[], list[Tensor]],
    ) -> None:
        """Raise if the pass repeated at delta = 0 is another one: R_s and D_Breg would compare two models.

        With mu > 0 the layers below the site run as well: theta~'s pass does not have the clean pass's x.
        """
        site = self._site if calls else None
        zeros = [torch.zeros_like(call.own) for call in calls]
        points = [call.own.detach() for call in calls]

        def repeated() -> list[Tensor]:
            if site is None:
                return passes()
            with site.shifted(zeros, graph=False) if self.config.mu > 0 else site.replaced(points, graph=False):
                return passes()

        self._is_checking = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reentrant checkpointing is refused by the ascent
                difference = differing(targets, self._without_graph(repeated), positions)
                if difference:  # what seemed to be set up for good was not
                    state.reject()
                    difference = differing(targets, self._without_graph(repeated), positions)
                where = first_differing_module(self.model, lambda: self._without_graph(passes)) if difference else ""
        finally:
            self._is_checking = False
        if not difference:
            return
        changed = [name for name in state.kept.changed if not name.endswith(".config.problem_type")]
        hints = [f"the first module whose output differs is {where}"] if where else []
        hints += [f"the forward changes {', '.join(changed[:5])}"] if changed else []
        raise RuntimeError(
            f"SMART: the model does not repeat itself: with the same batch, weights and dropout, {difference}; "
            + ("; ".join(hints) or "nothing that SMART sees was changed")
            + ". R_s and D_Breg would compare two models. Keep what changes in a buffer or a plain attribute, "
            "pass it as an argument, or draw random numbers from torch's, NumPy's or Python's global stream"
        )

    def _seen(self, step: _Step, sample_weight: Tensor | None) -> StepSeen:
        """What an observer sees of a step; reading what was found waits for the device."""
        assert self._report is not None
        metrics = {name: self._report.values[name] for name in _FOUND if name in self._report.values}
        metrics |= {} if self._teacher.beta is None else {"beta": self._teacher.beta}
        stages = {name: [z.detach() for z in tensors] for name, tensors in step.stages.items()}
        return StepSeen(
            step=self.step + 1,
            x=[call.x.detach() for call in step.calls],
            delta=stages.get("ascent", []),
            mask=step.masks if step.calls else [],
            outputs=stages["clean"],
            perturbed=stages.get("perturbed", []),
            teacher=stages.get("teacher", []),
            positions=step.positions,
            sample_weight=[sample_weight] * len(step.positions),
            divergences=self._divergences(stages["clean"]),
            metrics=metrics | {"penalty": self._report.values["penalty"]},
        )

    def _judge(self) -> None:
        """Warn of the last step, or raise, if that was not done."""
        report = self._report
        if report is None or report.judged:
            return
        report.judged = True
        stages, report.stages = report.stages, {}
        found = dict(report.values)
        found["vanished"] = found.get("vanished in the next layer", found.get("vanished", 0.0))
        for what, message in warn_of(found, self.config.start, str(report.dtype)).items():
            self._warn(what, message)
        if self.config.non_finite == "skip" or report.is_finite:
            return
        first = next(
            (name for name, tensors in stages.items() if not all(bool(z.isfinite().all()) for z in tensors)),
            "divergence",
        )
        raise FloatingPointError(not_finite(report.step, first, report.values))

    def _check_updates(self, theta: Mapping[str, nn.Parameter]) -> None:
        """Warn once if the weights move and no step is counted. Batches that are accumulated do not move them."""
        self._calls_since_update += 1
        weight = next((parameter for parameter in reversed(list(theta.values())) if parameter.requires_grad), None)
        counted = self.config.mu > 0 or self.config.smoothness_steps > 1
        then = self._weight_then
        if self._calls_since_update >= 200 and counted and weight is not None and not (then and then.holds(weight)):
            self._warn(
                "updates",
                "SMART: 200 batches without smart.update(), so no step was counted, and theta~ has not moved. Call it "
                "after optimizer.step(), or smart.attach(optimizer) once.",
            )
        if then is None and weight is not None:
            self._weight_then = Stamp(weight)

    def _check_recompiling(self, before: int) -> None:
        # once, and once more for each axis that turns out to have several lengths, is as it should be
        self._calls_compiled += compat.frames_compiled() > before
        if self._calls_compiled > 3:
            self._warn(
                "compile",
                "SMART: torch.compile compiled the model anew in 4 batches, most likely for their shapes. It is slow, "
                "and stops at torch._dynamo.config.recompile_limit: the model then runs uncompiled. Pad the batches to "
                "one shape (padding='max_length' and drop_last=True), or say torch.compile(model, dynamic=True).",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, SMARTWarning, stacklevel=4)

    def _parameters(self) -> dict[str, nn.Parameter]:
        self._sharded = fully_sharded(self.model)
        reshard(self._sharded)
        self._modules: list[nn.Module] = []  # of the same walk
        found: dict[str, nn.Parameter] = {}
        known: set[nn.Parameter] = set()
        for prefix, module in self.model.named_modules():
            self._modules.append(module)
            for name, parameter in compat.own_parameters(module).items():
                if parameter is not None and parameter not in known:
                    known.add(parameter)
                    found[f"{prefix}.{name}" if prefix else name] = parameter
        self._teacher.check(found)
        return found


def _virtual_tokens(model: Any) -> int:
    """How many tokens PEFT's prompt tuning puts in front of a batch."""
    settings = getattr(model, "peft_config", None)
    active = settings.get(getattr(model, "active_adapter", None)) if isinstance(settings, dict) else None
    in_front = str(getattr(active, "peft_type", "")).rpartition(".")[2] in (
        "PROMPT_TUNING",
        "P_TUNING",
        "MULTITASK_PROMPT_TUNING",
    )
    return int(getattr(active, "num_virtual_tokens", 0) or 0) if in_front else 0


def _shapes(arguments: Mapping[str, Any]) -> list[torch.Size]:
    """What x may look like, by what the model was given: ids as embeddings of width 1."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    return [value.shape if value.is_floating_point() else torch.Size([*value.shape, 1]) for value in tensors]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _total(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum()


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros((), device=device_of(model))
