"""SMART for any PyTorch module in any training loop (paper: equation 1 and Algorithm 1)."""

from __future__ import annotations

import copy
import math
import os
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.recording import Recorder, flat
from smartreg_torch.divergences import DIVERGENCES
from smartreg_torch.perturbation import ascend, output_mask
from smartreg_torch.proximal import bregman_divergence, ema_update, local, mean_examples, momentum, swapped
from smartreg_torch.site import Call, Site, argument_names, shift

Outputs = str | int | Sequence[str | int] | Callable[[Any], Tensor | Sequence[Tensor]]
Precision = Literal["float32", "model"]
Masks = str | Callable[..., Tensor | Sequence[Tensor | None]]

_HALF = (torch.bfloat16, torch.float16)
# What Hugging Face calls the loss that goes with the outputs, and the l_s that goes with that.
_PROBLEM_TYPES = {
    "single_label_classification": "symmetric_kl",
    "multi_label_classification": "bernoulli_symmetric_kl",
    "regression": "squared_error",
}


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
        site: where x is, see `smartreg_torch.site.Site`.
        outputs: which of the model's outputs f(x) are: a name or index, several (they add up), or a function from
            the model's output to a tensor or several. By default a plain tensor, "logits", "start_logits" with
            "end_logits", or the only floating-point tensor there is.
        divergence: l_s, "symmetric_kl", "bernoulli_symmetric_kl" or "squared_error", one for all outputs or one for
            each. By default what the model's `config.problem_type` says, else "symmetric_kl".
        mask: which positions are real: the name of an argument, or a function of the model's arguments. By default
            `attention_mask` where there is one, else the tokens that are not the embedding's `padding_idx` (which
            lambda_s = 0 does not read). The outputs' positions are the same, but for a decoder's: those that
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

    Attributes:
        step: optimiser steps taken, counted by `update`.
        teacher: theta~ by parameter name, in float32 or wider; DTensors where the weights are.

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
        site: str | None = None,
        outputs: Outputs | None = None,
        divergence: str | Sequence[str] | None = None,
        mask: Masks | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
        precision: Precision = "float32",
        lean: bool = False,
        record: str | os.PathLike[str] | None = None,
        record_steps: int = 10,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"SMART: model must be a torch.nn.Module, got {type(model).__name__}")
        config = SMARTConfig() if config is None else config
        if not isinstance(config, SMARTConfig):
            raise TypeError(f"SMART: config must be a SMARTConfig, got {type(config).__name__}")
        config.check_total_steps("SMART")
        for name in [divergence] if isinstance(divergence, str) else divergence or []:
            if name not in DIVERGENCES:
                raise ValueError(f"SMART: divergence must be one of {', '.join(DIVERGENCES)}, got {name!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"SMART: precision must be 'float32' or 'model', got {precision!r}")
        if not isinstance(lean, bool):
            raise TypeError(f"SMART: lean must be True or False, got {lean!r}")
        self._recorder = None if record is None else Recorder(record, record_steps, "SMART")
        self._wrapped = model
        self._call: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.model: nn.Module = getattr(self._call, "_orig_mod", self._call)  # torch.compile's; all passes run its code
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "SMART: torch.compile(DistributedDataParallel(model)) would run one pass compiled and the others not. "
                "Compile inside: DistributedDataParallel(torch.compile(model))"
            )
        _check_sharding(self.model, config, precision)
        if lean and (self._call is not model or _fully_sharded(self.model)):
            raise ValueError(
                "SMART: lean=True with DistributedDataParallel or fully_shard would add the gradient of the perturbed "
                "pass after the processes have averaged theirs. Use lean=False, or checkpoint the model's layers"
            )
        self.config = config
        self.precision = precision
        self._lean = lean and config.lambda_s > 0
        self.step = 0
        self.teacher: dict[str, Tensor] = {}
        self._outputs, self._divergence, self._mask, self._noise = outputs, divergence, mask, noise
        rank = torch.distributed.get_rank() if _is_distributed() else 0
        self._seed = (torch.initial_seed() + rank) % 2**64  # row k is another in each process
        self._generator: torch.Generator | None = None
        self._report: _Report | None = None  # of the last step, None where it had no penalty
        self._smooth_report: _Report | None = None  # of the last step that had R_s
        self._beta: float | None = None
        self._skipped = 0
        self._calls_since_update = 0
        self._idle = False  # whether the last call was with gradients, but in eval mode
        self._calls_compiled = 0
        self._warned: set[str] = set()
        self._parameter_names = argument_names(self.model)
        self._optimizer_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._site = Site(self.model, site) if config.lambda_s > 0 else None
        if self._site is not None and _is_compiled(model):
            torch.compiler.reset()  # code that was compiled before there was the site's hook would go on without it
        self._removed = False
        self._theta: dict[str, nn.Parameter] | None = None  # since the last call, until update()
        if config.mu > 0:
            self._follow_new_parameters(self._parameters())
        if self._recorder is not None:
            site_name = "none" if self._site is None else self._site.name
            self._recorder.begin("torch", {"torch": torch.__version__}, config, site_name)
            weakref.finalize(self, self._recorder.write)  # where nobody calls remove(), at the latest when Python ends

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
        config, compiled = self.config, _frames_compiled()
        if not (self.model.training and torch.is_grad_enabled()) or config.lambda_s == config.mu == 0:
            self._idle = torch.is_grad_enabled() and (config.lambda_s > 0 or config.mu > 0)
            output = self._wrapped(*args, **kwargs)
            return output, _zero(self.model)

        self._idle = False
        self._judge()
        self._check_updates()
        lambda_s = config.smoothness_weight(self.step)
        if lambda_s == config.mu == 0:
            self._report = None
            return self._wrapped(*args, **kwargs), _zero(self.model)
        theta = self._theta = self._parameters()  # a walk over the modules is dear: one a step
        if config.mu > 0:
            self._follow_new_parameters(theta)
        state = _State(self.model, theta)
        # a model may change the containers that it is given
        given = _copied((args, kwargs), _of_no_graph if self._lean else None)
        lean = self._lean and lambda_s > 0
        trained = [weight for weight in theta.values() if weight.requires_grad] if lean else []
        afterwards = _Afterwards(trained) if trained else None  # before the clean pass, see there
        site, calls = self._site, list[Call]()
        differentiable = lambda_s > 0 and config.start == "margin"
        in_half = self.precision == "float32" and _in_half(self.model, theta)
        in_float32 = _Float32(self.model, self._call) if in_half else None

        def passes(theta: Mapping[str, Tensor] | None = None) -> list[Tensor]:
            with state.replayed(), in_float32(theta or {}) if in_float32 else nullcontext():
                args, kwargs = _copied(given, _widened if in_float32 else None)
                return self._select(self._call(*args, **kwargs), None)

        with ExitStack() as clean:
            if site is not None and in_float32 is None:
                calls = clean.enter_context(site.recording(differentiable))
            output = self._wrapped(*args, **kwargs)
        if in_float32 is None:
            targets = self._select(output, len(calls[0].x) if calls else None)
        else:  # the clean pass once more: the rounding of the model's own is far above R_s
            with ExitStack() as clean:
                if site is not None:
                    calls = clean.enter_context(site.recording(differentiable))
                targets = passes()
        divergences = self._divergences(targets)
        masks = self._masks(calls, *given)
        positions = [self._positions(z, masks, label_mask, *given) for z in targets]

        terms: dict[str, Tensor] = {}
        stages = {"clean": targets}
        if lambda_s > 0:
            assert site is not None
            stages["ascent"] = self._ascend(passes, site, theta, calls, targets, masks, divergences, positions)
        if config.mu > 0:  # here, while there is one graph: what this pass frees the next can have
            copied = {name for name in self.teacher if in_float32 and _is_half(theta[name])}  # theta~ too, in passes
            with torch.no_grad(), self._averaged(theta, copied):
                taught = passes(self.teacher)
            stages["teacher"] = taught
            terms["D_Breg"] = _total(
                bregman_divergence(z, z_taught, name, m, sample_weight)
                for name, z, z_taught, m in zip(divergences, targets, taught, positions, strict=True)
            )
        if lambda_s > 0:
            assert site is not None
            delta = stages["ascent"]

            def r_s(perturbed: list[Tensor], targets: list[Tensor]) -> Tensor:
                return _total(
                    mean_examples(DIVERGENCES[name](z_perturbed, z, m), sample_weight)
                    for name, z_perturbed, z, m in zip(divergences, perturbed, targets, positions, strict=True)
                )

            # x itself, not what a second pass of the layers below gives: the gradients meet there and go down once
            points = [shift(call.own, d) for call, d in zip(calls, delta, strict=True)]
            if afterwards is None:
                with site.replaced(points):
                    perturbed = passes()
            else:
                with _frozen_weights(theta.values(), self._sharded), site.replaced([x.detach() for x in points]):
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
            penalty.register_hook(_check_backward)  # type: ignore[no-untyped-call]
        observed, dtype = _observed(calls, stages.get("ascent", []))
        self._report = _Report(self.step + 1, terms | observed | {"penalty": penalty}, stages, dtype)
        if lambda_s > 0:
            self._smooth_report = self._report
        if self._recorder is not None and not self._recorder.done:
            self._record(calls, masks, stages, divergences, positions, sample_weight, penalty)
        if config.non_finite == "skip" and not math.isfinite(self._report.values["penalty"]):
            self._skipped += 1
            penalty = _zero(self.model)
        if self._report.is_here:
            self._judge()
        self._check_recompiling(compiled)
        return output, penalty

    def update(self) -> None:
        """Count an optimiser step, and every `proximal_steps` of them move theta~: call it after `optimizer.step()`.

        theta~ <- (1 - beta) theta + beta theta~   (paper, Algorithm 1, line 14)
        """
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
        self._calls_since_update = 0
        if self.config.mu > 0 and self.step % self.config.proximal_steps == 0:
            self._beta = momentum(self.step, self.config)
            ema_update(self.teacher, self._parameters() if self._theta is None else self._theta, self._beta)
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
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):  # accelerate's is an Optimizer in name only
            raise TypeError(
                f"SMART: attach() needs an optimiser of PyTorch's, got {type(optimizer).__name__}. Give the one inside "
                "it, smart.attach(prepared.optimizer), or call smart.update() after its step"
            )
        if self._optimizer_hooks:
            raise RuntimeError("SMART: attach() was called before; one optimiser moves theta~")

        def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            # GradScaler does not call an optimiser whose gradients overflow, but a fused one, which then does nothing
            overflow = getattr(optimizer, "found_inf", None)
            if overflow is None or not bool(overflow):
                self._update()

        self._optimizer_hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._judge()),
            optimizer.register_step_post_hook(update),
        ]
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
        names = ("R_s", "D_Breg", "vanished", "max_delta")
        values: dict[str, float] = {}
        for report in (self._smooth_report, self._report):
            values |= {} if report is None else report.values
        beta = {} if self._beta is None else {"beta": self._beta}
        return {name: values[name] for name in names if name in values} | beta

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """The model has the averaged weights theta~ inside the block, to evaluate or save them.

        Example:
            >>> model = nn.Linear(2, 2)
            >>> smart = SMART(model, SMARTConfig(total_steps=10))
            >>> with smart.swap_teacher():
            ...     averaged = {name: value.clone() for name, value in model.state_dict().items()}
        """
        with self._averaged(self._parameters()):
            yield

    @contextmanager
    def _averaged(self, theta: Mapping[str, nn.Parameter], without: Iterable[str] = ()) -> Iterator[None]:
        _reshard(self._sharded)
        try:
            with swapped(theta, {name: self.teacher[name] for name in self.teacher.keys() - without}):
                yield
        finally:
            _reshard(self._sharded)  # what was gathered inside was of theta~

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit: step, theta~ and the noise generator. Loads with `weights_only`."""
        return {
            "step": self.step,
            "skipped": self._skipped,
            "teacher": {name: average.clone() for name, average in self.teacher.items()},
            "seed": self._seed,
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` left off; ValueError where the state is not of this model."""
        expected = {"step", "skipped", "teacher", "seed", "generator"}
        if set(state) != expected:
            raise ValueError(f"SMART.load_state_dict: expected the keys {sorted(expected)}, got {sorted(state)}")
        shapes = {name: tuple(local(average).shape) for name, average in state["teacher"].items()}
        own = {name: tuple(local(average).shape) for name, average in self.teacher.items()}
        if shapes != own:
            differing = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise ValueError(
                "SMART.load_state_dict: theta~ in the state is not of this model's trainable parameters: "
                f"{differing[:5]} differ. Make SMART after freezing layers, adding adapters or fully_shard, as it was "
                "made then; with sharded weights each process loads what it saved."
            )
        self.step, self._skipped, self._seed = state["step"], state["skipped"], state["seed"]
        for name, average in self.teacher.items():
            local(average).copy_(local(state["teacher"][name]))
        self._generator = None
        if state["generator"] is not None:
            self._generator = torch.Generator(_device(self.model))
            self._generator.set_state(state["generator"].cpu())

    def remove(self) -> None:
        """Undo everything: the model and the optimiser are as they were without SMART."""
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
            frozen.enter_context(_frozen_weights(theta.values(), self._sharded))
            with site.replaced(points):
                return passes()

        xs = [call.x for call in calls]
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and self._wrapped.static_graph:
            # the first backward through it averages gradients over the processes; a margin start's would be that one
            xs = [x.detach() for x in xs]
        noise: list[Tensor | None] = [None] * len(targets)
        if self.config.start == "gaussian":
            noise = [self._draw(x) for x in xs]
        elif "squared_error" in divergences:
            noise = [self._draw(z) for z in targets]
        try:
            # a backward under autocast would round its products: the passes have the caller's, the gradients none
            with frozen, torch.autocast(_device(self.model).type, enabled=False):
                return ascend(outputs_at, xs, targets, self.config, noise, masks, divergences, positions)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
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
        found = _chosen(output, self._outputs)
        for z in found:
            if not (isinstance(z, Tensor) and z.is_floating_point() and z.ndim > 0):
                got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise TypeError(f"SMART: outputs must be floating-point tensors (n, ..., C), got {got}; see outputs=")
            if n is not None and len(z) != n:
                raise ValueError(
                    f"SMART: the first axis must be the batch: the site gave {n} rows and the outputs have {len(z)}. "
                    "Models that work time-major, or fold several choices into the batch, are not supported"
                )
            if len(z) == 0:
                raise ValueError(f"SMART: the batch is empty: the outputs have the shape {tuple(z.shape)}")
        return [z.unsqueeze(-1) if z.ndim == 1 else z for z in found]

    def _divergences(self, targets: list[Tensor]) -> list[str]:
        given = self._divergence
        if given is not None:
            names = [given] * len(targets) if isinstance(given, str) else list(given)
            if len(names) != len(targets):
                raise ValueError(f"SMART: divergence= names {len(names)}, but there are {len(targets)} outputs")
            return names
        settings = getattr(self.model, "config", None)
        problem = getattr(settings, "problem_type", None)
        if problem is None and getattr(settings, "num_labels", None) == 1:
            problem = "regression"  # as Hugging Face decides
        names = [_PROBLEM_TYPES.get(problem or "", "symmetric_kl")] * len(targets)
        for name, z in zip(names, targets, strict=True):
            if name == "symmetric_kl" and z.shape[-1] == 1:
                raise ValueError(
                    f"SMART: an output of shape {tuple(z.shape)} has one value an example, of which symmetric_kl is "
                    "always 0. Say divergence='squared_error' (regression) or 'bernoulli_symmetric_kl' (one logit)."
                )
            classes = getattr(settings, "num_labels", None)
            if name == "symmetric_kl" and z.ndim > 3 and z.shape[1] == classes != z.shape[-1]:
                raise ValueError(
                    f"SMART: an output of shape {tuple(z.shape)} seems to have its {z.shape[1]} classes on axis 1, and "
                    "they must be on the last. Say outputs=lambda output: output.logits.movedim(1, -1)"
                )
        return names

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's arguments by name, however they were given."""
        return dict(zip(self._parameter_names, args, strict=False)) | kwargs

    def _masks(self, calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
        """One mask for each call of the site; where there is no site, those that there are."""
        count = max(len(calls), 1)
        given: Any
        if callable(self._mask):
            given = self._mask(*args, **kwargs)
            masks: list[Tensor | None] = [given] * count if given is None or isinstance(given, Tensor) else list(given)
            if calls and len(masks) != count:
                raise ValueError(f"SMART: mask= gave {len(masks)} masks, but the site ran {count} times")
            return masks
        name = self._mask or "attention_mask"
        given = self._arguments(args, kwargs).get(name)
        if given is None and self._mask is not None:
            raise ValueError(f"SMART: mask={name!r}, but the model was called without that argument")
        if given is None:
            return [call.padding for call in calls]
        for call in calls:
            if call.x.ndim < 3 or given.shape != call.x.shape[:-1]:
                raise ValueError(
                    f"SMART: {name} has the shape {tuple(given.shape)}, but the site gives {tuple(call.x.shape)}. "
                    "Give mask=, a function of the model's arguments: (n, tokens), one for each call of the site."
                )
        return [given] * count

    def _positions(
        self,
        z: Tensor,
        masks: list[Tensor | None],
        label_mask: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Which positions of an output count: those of the site, or of a decoder where there is one, with a label."""
        if "decoder_input_ids" in self._parameter_names:
            given = self._arguments(args, kwargs)
            mask, labels = given.get("decoder_attention_mask"), given.get("labels")
            masks = [labels != -100 if mask is None and labels is not None else mask]
        real, labelled = output_mask(z, masks), output_mask(z, label_mask)
        if real is None or labelled is None:
            return labelled if real is None else real
        return (real > 0) & labelled

    def _record(
        self,
        calls: list[Call],
        masks: list[Tensor | None],
        stages: dict[str, list[Tensor]],
        divergences: list[str],
        positions: list[Tensor | None],
        sample_weight: Tensor | None,
        penalty: Tensor,
    ) -> None:
        assert self._recorder is not None
        tensors = flat(
            {
                "x": [call.x for call in calls],
                "delta": stages.get("ascent", []),
                "mask": masks if calls else [],
                "outputs": stages["clean"],
                "perturbed": stages.get("perturbed", []),
                "teacher": stages.get("teacher", []),
                "positions": positions,
                "sample_weight": [sample_weight] * len(positions),
            }
        )
        reported = self._found() | {"penalty": float(penalty.detach()), "step": self.step}
        if self.config.mu > 0:
            reported["distance"] = _distance(self._parameters(), self.teacher)
        self._recorder.add(
            {name: _array(tensor) for name, tensor in tensors.items()},
            reported,
            {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
            [{"divergence": name, "weight": 1.0, "by_weights": False} for name in divergences],
        )
        if self._recorder.full:
            self._recorder.write()

    def _judge(self) -> None:
        """Warn of the last step, or raise, if that was not done."""
        report = self._report
        if report is None or report.judged:
            return
        report.judged = True
        stages, report.stages = report.stages, {}
        vanished = report.values.get("vanished in the next layer", report.values.get("vanished", 0.0))
        if vanished > 0.5:
            self._warn(
                "vanished",
                f"SMART: adding the perturbation leaves {vanished:.0%} of the entries as they were: it is below "
                f"the precision of {report.dtype}, and R_s measures nothing there. Use a larger epsilon, or where that "
                "is half precision, precision='float32'.",
            )
        if self.config.non_finite == "skip" or math.isfinite(report.values["penalty"]):
            return
        first = next(
            (name for name, tensors in stages.items() if not all(bool(z.isfinite().all()) for z in tensors)),
            "divergence",
        )
        values = ", ".join(f"{name} = {report.values[name]:g}" for name in ("R_s", "D_Breg") if name in report.values)
        raise FloatingPointError(
            f"SMART: the penalty of step {report.step} is not finite ({values}); the first values that are not "
            f"finite are in the {first} pass. Look at the learning rate and the loss before it, or let such steps go "
            "without a penalty: SMARTConfig(non_finite='skip')."
        )

    def _check_updates(self) -> None:
        self._calls_since_update += 1
        if self._calls_since_update == 200 and (self.config.mu > 0 or self.config.smoothness_steps > 1):
            self._warn(
                "updates",
                "SMART: 200 batches without smart.update(), so no step was counted, and theta~ has not moved. Call it "
                "after optimizer.step(), or smart.attach(optimizer) once.",
            )

    def _check_recompiling(self, before: int) -> None:
        # once, and once more for each axis that turns out to have several lengths, is as it should be
        self._calls_compiled += _frames_compiled() > before
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
        self._sharded = _fully_sharded(self.model)
        _reshard(self._sharded)
        found = dict(self.model.named_parameters())
        gone = sorted(self.teacher.keys() - found.keys())
        if gone:
            raise RuntimeError(
                f"SMART: the model no longer has {gone[:3]}, of which theta~ was made ({len(gone)} parameters in all). "
                "Make SMART after adapters are added, merged or deleted: SMART(get_peft_model(model, ...), config)"
            )
        whole = [name for name, average in self.teacher.items() if _is_sharded(found[name]) != _is_sharded(average)]
        if whole:
            raise RuntimeError(
                f"SMART: {whole[:3]} were sharded after theta~ was made of them. Make SMART after fully_shard(model)"
            )
        return found

    def _follow_new_parameters(self, theta: Mapping[str, nn.Parameter]) -> None:
        """theta~ of a parameter starts when it is first trainable, at its value then, and stays on its device."""
        for name, parameter in theta.items():
            if parameter.requires_grad and name not in self.teacher:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.teacher[name] = parameter.detach().to(wide, copy=True)
            elif name in self.teacher:  # where the model has moved since
                self.teacher[name] = self.teacher[name].to(parameter.device)


class _Afterwards:
    """A zero to be added to the loss, whose backward is that of a term which is not computed before then.

    Of the nodes that are ready autograd takes the one made last. Made before the clean pass, this one waits until the
    clean pass's graph is spent, so that there is never more than one. It has an edge to the smallest weight alone,
    whose clean gradient waits for it; those of the others go to their .grad, and there is one set of gradients.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        if any(weight._backward_hooks or weight._post_accumulate_grad_hooks for weight in weights):
            raise RuntimeError(
                "SMART: with lean=True the gradient of a weight comes in two parts, one after the other, and its hooks "
                "would see each of them alone. Take the hooks off, or say lean=False"
            )
        self._terms: list[Callable[[], Tensor]] = []
        smallest = min(weights, key=torch.Tensor.numel)
        self.zero: Tensor = _PutOff.apply(self._terms, smallest)  # type: ignore[no-untyped-call]

    def backward_of(self, term: Callable[[], Tensor]) -> None:
        self._terms.append(term)


class _PutOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: list[Callable[[], Tensor]], weight: Tensor) -> Tensor:
        ctx.terms = terms
        return weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        if not ctx.terms:
            raise RuntimeError("SMART: backward() a second time over one step with lean=True, whose graph is spent")
        with torch.enable_grad():
            while ctx.terms:  # and nothing of the step is kept any longer
                term = ctx.terms.pop()()
                term.backward(gradient.to(term))
        return None, None


def _check_backward(gradient: Tensor) -> None:
    if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "SMART: lean=True adds to the .grad of the weights, so it needs loss.backward(). With torch.autograd.grad "
            "or backward(inputs=...) use lean=False"
        )


class _Report:
    """What a step found, on its way to main memory: the host does not wait for a GPU before somebody asks."""

    def __init__(
        self, step: int, values: Mapping[str, Tensor], stages: Mapping[str, list[Tensor]], dtype: torch.dtype | None
    ) -> None:
        self.step, self.dtype, self.judged = step, dtype, False
        self.stages = {name: [z.detach() for z in tensors] for name, tensors in stages.items()}
        self._names = list(values)
        penalty = values["penalty"].detach()
        found = torch.stack([value.detach().to(penalty) for value in values.values()])
        self._found = found.to("cpu", non_blocking=found.is_cuda)
        self._sent = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None

    @property
    def is_here(self) -> bool:
        return self._sent is None

    @property
    def values(self) -> dict[str, float]:
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
        return dict(zip(self._names, self._found.tolist(), strict=True))


class _Float32:
    """The passes of a model in float32, whatever it computes in itself, while the block lasts.

    Autocast is off, and half-precision weights and buffers have float32 copies: of the weights, on the graph of theta.
    """

    def __init__(self, model: nn.Module, called: nn.Module) -> None:
        self._model = model
        self._copies = {weight: weight.to(torch.float32) for weight in model.parameters() if weight.dtype in _HALF}
        if not self._copies:
            return
        unsupported = {
            "torch.compile": _is_compiled(called),
            "checkpointed layers, which run again with the weights as they are": any(
                getattr(module, "gradient_checkpointing", False) for module in model.modules()
            ),
            "fully_shard, which puts its own in their place": bool(_fully_sharded(model)),
            "nn.LSTM, nn.GRU and nn.RNN": any(isinstance(module, nn.RNNBase) for module in model.modules()),
        }
        for what, found in unsupported.items():
            if found:
                raise ValueError(
                    f"SMART: the model has {next(iter(self._copies)).dtype} weights, and with {what}, the float32 "
                    "copies of them that the passes of SMART need are not possible. Train float32 weights under "
                    "torch.autocast, or say SMART(..., precision='model') with a radius that this precision can hold."
                )

    @contextmanager
    def __call__(self, theta: Mapping[str, Tensor]) -> Iterator[None]:
        """One pass, with the values of theta where it has them."""
        given = {weight: theta[name] for name, weight in self._model.named_parameters() if name in theta}
        own: list[tuple[dict[str, Any], str, Any]] = []
        forward = vars(self._model).get("forward")
        with torch.autocast(_device(self._model).type, enabled=False):
            try:
                if "_original_forward" in vars(self._model):  # accelerate has put autocast around the other
                    vars(self._model)["forward"] = self._model._original_forward
                for module in self._model.modules():
                    groups: list[dict[str, Any]] = [module._parameters, module._buffers]
                    for tensors in groups:
                        own += [(tensors, name, tensor) for name, tensor in tensors.items() if _is_half(tensor)]
                for tensors, name, tensor in own:
                    copied = given.get(tensor, self._copies.get(tensor))
                    copied = tensor.to(torch.float32) if copied is None else copied
                    tensors[name] = copied if tensor.requires_grad else copied.detach()
                yield
            finally:
                for tensors, name, tensor in own:
                    tensors[name] = tensor
                if forward is not None:
                    vars(self._model)["forward"] = forward


class _State:
    """What a forward in training mode changes, as it was before the clean pass, to be replayed in the others.

    The global random streams (torch's, NumPy's and Python's): the same dropout masks in all passes. The buffers:
    BatchNorm's statistics move once a step. The other passes get copies of them, which their graphs may keep. Autocast:
    theirs is the clean pass's, wherever they run.
    """

    def __init__(self, model: nn.Module, theta: Mapping[str, Tensor]) -> None:
        kind = _device(model).type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        devices = {parameter.device for parameter in theta.values()} - {torch.device("cpu")}
        self._devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
        self._streams = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
        self._buffers = [
            (module._buffers, {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None})
            for module in model.modules()
            if module._buffers
        ]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        kind = next((device.type for device in self._devices), "cuda")
        streams = (np.random.get_state(), random.getstate())  # noqa: NPY002
        own = [(buffers, dict(buffers)) for buffers, _ in self._buffers]  # the clean pass may have put others in
        with torch.random.fork_rng(list(self._devices), device_type=kind), torch.autocast(*self._autocast):
            try:
                torch.set_rng_state(self._streams[0])
                np.random.set_state(self._streams[1])  # noqa: NPY002
                random.setstate(self._streams[2])
                for device, state in self._devices.items():
                    torch.get_device_module(device).set_rng_state(state, device)
                for buffers, before in self._buffers:
                    buffers.update({name: buffer.clone() for name, buffer in before.items()})
                yield
            finally:
                for buffers, values in own:
                    buffers.clear()
                    buffers.update(values)
                np.random.set_state(streams[0])  # noqa: NPY002
                random.setstate(streams[1])


@torch.no_grad()
def _observed(calls: list[Call], deltas: list[Tensor]) -> tuple[dict[str, Tensor], torch.dtype | None]:
    """max|delta|, and the fraction of the entries with delta != 0 in which x + delta == x, also in the dtype in which
    the next layer has x, where that is another; and the dtype."""
    if not deltas:
        return {}, None
    moved = torch.stack([(delta != 0).sum() for delta in deltas]).sum().clamp(min=1)

    def lost(dtypes: list[torch.dtype]) -> Tensor:
        same = []
        for call, delta, dtype in zip(calls, deltas, dtypes, strict=True):
            x = call.x.to(dtype)
            same.append(((delta != 0) & (shift(x, delta) == x)).sum())
        return torch.stack(same).sum() / moved

    own, next_layer = [call.x.dtype for call in calls], [call.dtype for call in calls]
    observed = {"vanished": lost(own), "max_delta": torch.stack([delta.abs().max() for delta in deltas]).max()}
    if own != next_layer:
        observed["vanished in the next layer"] = lost(next_layer)
    return observed, next_layer[0]


@contextmanager
def _frozen_weights(parameters: Iterable[nn.Parameter], sharded: list[Any]) -> Iterator[None]:
    """No graph is built for the weights, nor are the activations kept that it would need."""
    weights = [parameter for parameter in parameters if parameter.requires_grad]
    _reshard(sharded)  # whole weights that are kept have the flag that their shards had when they were gathered
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        _reshard(sharded)
        for weight in weights:
            weight.requires_grad_(True)


def _reshard(sharded: list[Any]) -> None:
    """The parameters of the sharded modules are the shards, and the next pass gathers them anew.

    fully_shard's root (others too, with reshard_after_forward=False) keeps whole weights from a forward to its
    backward, which would see nothing of a change in the shards.
    """
    for module in sharded:
        module.reshard()


def _fully_sharded(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not to be imported for this alone
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _check_sharding(model: nn.Module, config: SMARTConfig, precision: Precision) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "SMART: FullyShardedDataParallel (FSDP1) is not supported: its flat weights have neither names nor values "
            "between two passes. Shard with torch.distributed.fsdp.fully_shard(model), FSDP2"
        )
    sharded = _fully_sharded(model)
    if not sharded and any(map(_is_sharded, model.parameters())):
        raise ValueError("SMART: of models with DTensor weights only those of fully_shard(model) are supported")
    for module in sharded:
        policy = module._get_fsdp_state()._mp_policy
        half = next((dtype for dtype in (policy.param_dtype, policy.output_dtype) if dtype in _HALF), None)
        if half is not None and precision == "float32":
            raise ValueError(
                f"SMART: fully_shard's mixed precision policy has {half}, in which all passes run, and R_s at a small "
                "radius is far below its rounding. Leave param_dtype and output_dtype out of it and use "
                "torch.autocast, beside which the passes of SMART run in float32; or say SMART(..., "
                "precision='model') with a radius that this precision can hold"
            )
    if sharded and config.non_finite != "raise":
        raise ValueError(
            "SMART: non_finite='skip' cannot work with fully_shard: a process that skips its penalty gathers less in "
            "the backward pass than the others, which then wait for ever. Use non_finite='raise'"
        )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _in_half(model: nn.Module, theta: Mapping[str, Tensor]) -> bool:
    """Whether anything in the model computes in half precision, as far as can be seen from outside."""
    autocast = torch.is_autocast_enabled(_device(model).type) or "_original_forward" in vars(model)
    return autocast or any(map(_is_half, theta.values()))


def _is_half(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in _HALF


def _of_no_graph(value: Any) -> Any:
    if isinstance(value, Tensor) and value.grad_fn is not None:
        raise ValueError(
            "SMART: with lean=True the model's arguments must not come from a graph, which the perturbed pass would go "
            f"through once more when it is spent: one of shape {tuple(value.shape)} does. Make SMART of the whole "
            "model, or say lean=False"
        )
    return value


def _widened(value: Any) -> Any:
    return value.to(torch.float32) if _is_half(value) else value


def _chosen(output: Any, outputs: Outputs | None) -> list[Any]:
    if callable(outputs):
        found = outputs(output)
        return [found] if isinstance(found, Tensor) else list(found)
    if isinstance(output, Tensor):
        if outputs is not None:
            raise ValueError(f"SMART: the model returns one tensor; outputs={outputs!r} chooses nothing in it")
        return [output]
    if isinstance(output, Mapping):
        fields = dict(output)
    elif isinstance(output, Sequence):
        names = getattr(output, "_fields", ())  # of a named tuple, whose places count too
        fields = dict(enumerate(output)) if isinstance(outputs, int) or not names else output._asdict()  # type: ignore[attr-defined]
    else:
        fields = vars(output) if hasattr(output, "__dict__") else {}
    if outputs is not None:
        keys = [outputs] if isinstance(outputs, (str, int)) else list(outputs)
        missing = [key for key in keys if key not in fields]
        if missing:
            raise ValueError(f"SMART: the model's output has no {missing[0]!r}; it has {list(fields)}")
        return [fields[key] for key in keys]
    for names in (["logits"], ["start_logits", "end_logits"]):
        if all(isinstance(fields.get(name), Tensor) for name in names):
            return [fields[name] for name in names]
    found = [z for z in fields.values() if isinstance(z, Tensor) and z.is_floating_point() and z.ndim > 0]
    if len(found) == 1:
        return found
    raise ValueError(
        f"SMART: cannot tell which of the model's outputs {list(fields)} ({type(output).__name__}) to compare: say "
        "outputs='logits', outputs=1, a list of them, or a function from the model's output to the tensor"
    )


def _copied(value: Any, convert: Callable[[Any], Any] | None = None) -> Any:
    """New containers around the same tensors, or around what `convert` makes of them."""
    if type(value) in (list, tuple):
        return type(value)(_copied(item, convert) for item in value)
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key in list(new):
            new[key] = _copied(new[key], convert)
        return new
    return value if convert is None else convert(value)


def _array(tensor: Tensor) -> Any:
    """A copy in main memory, half precision as float32."""
    wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wide, copy=True).numpy()


@torch.no_grad()
def _distance(theta: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> float:
    """max|theta - theta~|, theta~ in the dtype in which its pass has it."""
    pairs = [(local(theta[name]), local(average)) for name, average in teacher.items() if local(average).numel()]
    return max((float((weight - average.to(weight)).abs().max()) for weight, average in pairs), default=0.0)


def _total(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum()


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile or .compile() was called on it or on a module inside."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def _frames_compiled() -> int:
    """How often torch.compile has compiled something in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not to be imported for this alone
    return 0 if dynamo is None else int(dynamo.counters["frames"]["total"])


def _zero(model: nn.Module) -> Tensor:
    return torch.zeros((), device=_device(model))
