"""How a model is run again: in float32, with frozen weights, without touching any `.grad`, and whether it repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smartreg_torch import compat
from smartreg_torch.replay import device_of
from smartreg_torch.sharding import fully_sharded, reshard
from smartreg_torch.values import alike, tensors_in

HALF = (torch.bfloat16, torch.float16)


class Float32:
    """The passes of a model in float32, whatever it computes in itself, while the block lasts.

    Autocast is off, and half-precision weights and buffers have float32 copies: of the weights, on the graph of theta.
    """

    def __init__(self, model: nn.Module, called: nn.Module) -> None:
        self._model = model
        self._copies = {weight: weight.to(torch.float32) for weight in model.parameters() if weight.dtype in HALF}
        if not self._copies:
            return
        unsupported = {
            "torch.compile": is_compiled(called),
            "checkpointed layers, which run again with the weights as they are": any(
                getattr(module, "gradient_checkpointing", False) for module in model.modules()
            ),
            "fully_shard, which puts its own in their place": bool(fully_sharded(model)),
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
        with torch.autocast(device_of(self._model).type, enabled=False):
            try:
                inside = compat.original_forward(self._model)
                if inside is not None:  # accelerate has put autocast around it
                    vars(self._model)["forward"] = inside
                for module in self._model.modules():
                    groups: list[dict[str, Any]] = [compat.own_parameters(module), compat.own_buffers(module)]
                    for tensors in groups:
                        own += [(tensors, name, tensor) for name, tensor in tensors.items() if is_half(tensor)]
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


@contextmanager
def frozen_weights(parameters: Iterable[nn.Parameter], sharded: list[Any]) -> Iterator[None]:
    """No graph is built for the weights, nor are the activations kept that it would need."""
    weights = [parameter for parameter in parameters if parameter.requires_grad]
    reshard(sharded)  # whole weights that are kept have the flag that their shards had when they were gathered
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        reshard(sharded)
        for weight in weights:
            weight.requires_grad_(True)


def in_half(model: nn.Module, theta: Mapping[str, Tensor]) -> bool:
    """Whether anything in the model computes in half precision, as far as can be seen from outside."""
    autocast = torch.is_autocast_enabled(device_of(model).type) or compat.original_forward(model) is not None
    return autocast or any(map(is_half, theta.values()))


def is_half(tensor: Any) -> bool:
    """Whether this is a bfloat16 or float16 tensor."""
    return isinstance(tensor, Tensor) and tensor.dtype in HALF


def widened(value: Any) -> Any:
    """A half-precision tensor as float32; anything else as it is."""
    return value.to(torch.float32) if is_half(value) else value


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile or .compile() was called on it or on a module inside."""
    return any(map(compat.is_compiled, model.modules()))


@contextmanager
def untouched_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    """Every `.grad` is after the block what it was before, whatever a layer's own backward does.

    Reversible layers run a backward of their own inside theirs, which adds to the `.grad` of their weights.
    """
    weights = [weight for weight in weights if weight.requires_grad]
    own = [weight.grad for weight in weights]
    try:
        for weight in weights:
            weight.grad = None
        yield
        filled = [weight for weight in weights if weight.grad is not None]
        if any(map(compat.has_accumulation_hooks, filled)):
            raise RuntimeError(
                "SMART: a layer of the model fills the .grad of its weights in its own backward, as reversible layers "
                "do, and these weights have hooks, which saw the gradient of the perturbation. Take the hooks off"
            )
    finally:
        for weight, grad in zip(weights, own, strict=True):
            weight.grad = grad


def differing(clean: Sequence[Tensor], again: Sequence[Tensor], masks: Sequence[Tensor | None]) -> str:
    """Say how the outputs of a repeated pass differ from the clean pass's; "" where they agree.

    Masked positions may differ, and so may the last digits: compiled code, or a GPU's atomic additions, may add up in
    another order.
    """
    for i, (z, z_again, mask) in enumerate(zip(clean, again, masks, strict=True)):
        if z.shape != z_again.shape:
            return f"output {i} has the shape {tuple(z_again.shape)} instead of {tuple(z.shape)}"
        z, z_again = z.detach(), z_again.detach()
        if mask is not None:
            keep = (mask != 0).unsqueeze(-1)
            z, z_again = z.where(keep, 0), z_again.where(keep, 0)
        if torch.equal(z, z_again):
            continue
        wide = torch.promote_types(z.dtype, torch.float32)
        finite = z.isfinite() & z_again.isfinite()
        same = finite | (z == z_again) | (z.isnan() & z_again.isnan())
        if not bool(same.all()):
            return f"output {i} is finite in one and not in the other"
        apart = float((z.to(wide) - z_again.to(wide)).where(finite, 0).abs().max())
        size = float(z.to(wide).where(finite, 0).abs().max())
        # seven tenths of the digits; half of them where additions may come in another order
        digits = 0.7 if z.device.type == "cpu" else 0.5
        if apart > torch.finfo(z.dtype).eps ** digits * size:
            return f"output {i} differs by up to {apart:.3g}, its largest entry being {size:.3g}"
    return ""


def first_differing_module(model: nn.Module, run: Callable[[], Any]) -> str:
    """The innermost module whose output differs between two repeated passes, or "" where none does.

    Args:
        run: one pass.
    """

    def traced() -> list[tuple[str, list[Tensor]]]:
        trace: list[tuple[str, list[Tensor]]] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensors = [tensor.detach().clone() for tensor in tensors_in(output)]
                trace.append((f"{name} ({type(module).__name__})", tensors))

            return hook

        hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return trace

    for (name, tensors), (other, others) in zip(traced(), traced(), strict=False):
        if name != other or len(tensors) != len(others) or not all(map(alike, tensors, others)):
            return name
    return ""
