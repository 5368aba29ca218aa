"""Algorithm 1 for one mini-batch, lines 6 to 11: delta, R_s, D_Breg and the penalty (paper, section 3)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartreg.config import SMARTConfig
from smartreg.divergences import takes_logits, term_weights
from smartreg_torch.checks import check_values, watch_loss
from smartreg_torch.lean import Afterwards, check_backward, check_no_graph
from smartreg_torch.outputs import Compared, Reader
from smartreg_torch.passes import Passes
from smartreg_torch.perturbation import ascend
from smartreg_torch.projection import Output, sum_divergence, total, values_of
from smartreg_torch.proximal import bregman_divergence
from smartreg_torch.site import shift
from smartreg_torch.teacher import Teacher


class Step(NamedTuple):
    """Hold what one mini-batch gives.

    Attributes:
        penalty: lambda_s R_s + mu D_Breg for the loss.
        terms: R_s and D_Breg, those that the step has.
        stages: the outputs of each pass by its name, one a head: clean, teacher and perturbed; and ascent, the delta of
            each run of the site.
        passes, compared: what was run, and how its outputs were compared.
        sample_weight: w_i.
    """

    penalty: Tensor
    terms: dict[str, Tensor]
    stages: dict[str, list[Any]]
    passes: Passes
    compared: Compared
    sample_weight: Tensor | None


def smart_step(
    passes: Passes,
    compared: Compared,
    sample_weight: Tensor | None,
    teacher: Teacher,
    config: SMARTConfig,
    lambda_s: float,
    draw: Noise,
    first: bool = False,
    later: Afterwards | None = None,
) -> Step:
    """Compute lambda_s R_s + mu D_Breg of one mini-batch, after its clean pass.

    Args:
        compared: how the outputs of the clean pass are compared.
        lambda_s: of this step: `config.smoothness_weight`.
        first: whether this is the first step, in which writes into theta~ and a second backward are checked.
        later: defers R_s until the clean graph is freed.

    Source: paper, equations 1 to 3 and Algorithm 1.
    """
    targets, masks = compared.targets, compared.inputs.masks  # f(x; theta), and which positions of x are real
    stages: dict[str, list[Any]] = {"clean": targets}
    terms = dict[str, Tensor]()
    lambda_s, mu = term_weights(config, lambda_s, compared.divergences)

    def masks_of_its_own() -> int | None:
        return draw.seed_of_masks(targets[0].device) if config.dropout == "independent" else None

    if lambda_s > 0:
        with passes.ascending() as at:
            nu = _draw(draw, passes.starts, compared, config)
            delta = stages["ascent"] = ascend(  # lines 6 to 10
                lambda points: compared.arranged(at(points, masks_of_its_own())),
                *(passes.starts, targets, config, nu, masks, compared.divergences, compared.positions),
            )
        if first and config.needs_clean_graph:
            passes.check_backward(targets)
    if mu > 0:  # before R_s: the memory that this pass frees is used by the next
        taught = stages["teacher"] = compared.arranged(passes.again(teacher, watched=first))  # f(x; theta~)
        terms["D_Breg"] = proximity(targets, taught, compared, sample_weight)
    if lambda_s > 0:
        # the clean pass's x, so that the layers below are back-propagated through once
        points = [shift(call.own, moved) for call, moved in zip(passes.clean.calls, delta, strict=True)]
        seed = masks_of_its_own()
        perturbed = compared.arranged(passes.at(points, seed, graph=later is None))  # f(x + delta; theta)
        stages["perturbed"] = perturbed
        terms["R_s"] = smoothness(perturbed, targets, compared, sample_weight)
    weights = {"R_s": lambda_s, "D_Breg": mu}
    penalty = total(weight * terms[name] for name, weight in weights.items() if name in terms)
    step = Step(penalty, terms, stages, passes, compared, sample_weight)  # line 11 is the optimiser's, on L + penalty
    return step if later is None else _deferred(step, lambda_s, seed, later)


def smoothness(
    perturbed: list[Output], targets: list[Output], compared: Compared, sample_weight: Tensor | None
) -> Tensor:
    """Return R_s = 1/n sum_i w_i l_s( f(x_i + delta_i; theta), f(x_i; theta) ), added up over the heads.

    Source: paper, equation 2.
    """
    return total(
        sum_divergence(name, z_perturbed, z, mask, sample_weight) / len(z)
        for name, z_perturbed, z, mask in zip(compared.divergences, perturbed, targets, compared.positions, strict=True)
    )


def proximity(targets: list[Output], taught: list[Output], compared: Compared, sample_weight: Tensor | None) -> Tensor:
    """Return D_Breg = 1/n sum_i w_i l_s( f(x_i; theta), f(x_i; theta~) ), added up over the heads.

    Source: paper, equation 3.
    """
    return total(
        bregman_divergence(z, z_taught, name, mask, sample_weight)
        for name, z, z_taught, mask in zip(compared.divergences, targets, taught, compared.positions, strict=True)
    )


def _draw(draw: Noise, xs: list[Tensor], compared: Compared, config: SMARTConfig) -> list[Tensor | None]:
    """Draw what the start needs: nu of the shape of x, or a sign for each output in regression."""
    if not config.needs_clean_graph:
        return [draw(x) for x in xs]
    if not all(takes_logits(name) for name in compared.divergences):
        return [draw(z) for z in values_of(compared.targets)]
    return [None] * len(compared.targets)


def _deferred(step: Step, lambda_s: float, seed: int | None, later: Afterwards) -> Step:
    """Let the penalty's backward run the perturbed pass again, with its graph, after the clean graph is freed."""
    delta, sample_weight, passes = step.stages["ascent"], step.sample_weight, step.passes.without_clean()
    fixed = [z.detach() for z in step.compared.targets]
    compared = step.compared._replace(targets=fixed)  # nothing holds the clean graph

    def other_side() -> Tensor:
        return lambda_s * smoothness(compared.arranged(passes.shifted(delta, seed)), fixed, compared, sample_weight)

    later.backward_of(other_side)
    penalty = step.penalty + later.zero.to(step.penalty.device)
    penalty.register_hook(check_backward)  # type: ignore[no-untyped-call]
    return step._replace(penalty=penalty)


def take_step(
    passes: Passes,
    reader: Reader,
    teacher: Teacher,
    config: SMARTConfig,
    lambda_s: float,
    draw: Noise,
    sample_weight: Tensor | None,
    label_mask: Tensor | None,
    say: Callable[[str, str], Any],
    lean: bool = False,
) -> Step:
    """Run the clean pass, find out how its outputs are compared, check that in the first step, and do `smart_step`.

    Args:
        sample_weight, label_mask: as `SMART.__call__` takes them.
        say: warns, once of each kind.
        lean: whether R_s is deferred until the clean graph is freed.
    """
    later = _later(passes) if lean and lambda_s > 0 else None  # made before the clean graph: autograd runs it last
    passes.run_clean(differentiable=lambda_s > 0 and config.needs_clean_graph)
    if passes.lost:
        say(
            "written",
            f"SMART: the model wrote into {passes.lost[0]} for the first time. The other passes of this step see "
            "the new value, so R_s and D_Breg of this step may be off. Look at the next steps, which are right.",
        )
    teacher.settle(passes.theta)
    compared = reader.read(passes, label_mask)
    first = passes.is_first(compared.inputs.names)
    if first:
        reader.note(compared, passes.clean.calls)
        check_values(compared, masks_were_found=reader.mask is None)
        passes.check_repeated(compared.arranged, compared.targets, compared.positions, own_x=config.mu > 0)
    step = smart_step(passes, compared, sample_weight, teacher, config, lambda_s, draw, first, later)
    if first:
        # after the ascent, whose backward would call the hook
        watch_loss(passes.own_outputs, compared.heads, partial(say, "loss"))
        passes.checked(compared.inputs.names)
    return step


def _later(passes: Passes) -> Afterwards | None:
    """Prepare to defer R_s; None if no weight is trained."""
    for tensor in passes.given_tensors:
        check_no_graph(tensor)
    trained = [weight for weight in passes.theta.values() if weight.requires_grad]
    return Afterwards(trained) if trained else None


class Noise:
    """Draw standard normal noise from a stream of our own: the global one stays as plain training leaves it.

    Attributes:
        seed: of the generator, which is made on the device of the first x.
        function: like -> a tensor of that shape, drawn by the user instead.
    """

    def __init__(self, seed: int, function: Callable[[Tensor], Tensor] | None = None) -> None:
        self.seed, self.function = seed, function
        self.generator: torch.Generator | None = None

    def __call__(self, like: Tensor) -> Tensor:
        """Draw noise of the shape and on the device of `like`, in float32 or wider."""
        like = like.detach().to(torch.promote_types(like.dtype, torch.float32))
        if self.function is not None:
            drawn = self.function(like)
            if drawn.shape != like.shape:
                raise ValueError(
                    f"SMART: noise must give a tensor of shape {tuple(like.shape)}, got {tuple(drawn.shape)}"
                )
            return drawn
        generator = self._stream(like.device)
        drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
        return drawn.to(like.device)

    def seed_of_masks(self, device: torch.device) -> int:
        """Draw the seed of a pass that has dropout masks of its own.

        It is a hash of the generator's state, which the host has: a number that a GPU draws would be waited for.
        """
        generator = self._stream(device)
        state = generator.get_state().numpy().tobytes()
        torch.rand(1, generator=generator, device=generator.device)  # the next seed is another one
        return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little") >> 1

    def _stream(self, device: torch.device) -> torch.Generator:
        """Return the generator; make it on this device if there is none."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(self.seed)
        return self.generator

    def restored(self, seed: int, stream: Any, device: torch.device) -> Noise:
        """Return this noise with another seed and generator state, or None; ValueError if it cannot be loaded."""
        noise = Noise(seed, self.function)
        if stream is not None:
            noise.generator = torch.Generator(device)
            try:
                noise.generator.set_state(stream.cpu())
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"SMART.load_state_dict: the state's noise generator cannot be loaded on {device}: {error}. "
                    "Resume on the kind of device on which the state was saved"
                ) from error
        return noise

    def __getstate__(self) -> dict[str, Any]:
        generator = None if self.generator is None else (self.generator.device, self.generator.get_state())
        return vars(self) | {"generator": generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["generator"] is not None:
            device, stream = state["generator"]
            self.generator = torch.Generator(device)
            self.generator.set_state(stream)
