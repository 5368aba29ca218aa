"""Do what fully_shard (FSDP2) needs, and refuse what cannot work with it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from smartreg.config import SMARTConfig
from smartreg_torch.compat import mixed_precision_policy

HALF = (torch.bfloat16, torch.float16)


def reshard(sharded: list[Any]) -> None:
    """Make the parameters of these modules shards again; the next pass gathers them anew.

    fully_shard's root keeps whole weights from a forward to its backward, and so do others with
    reshard_after_forward=False. A change in the shards would not reach them.
    """
    for module in sharded:
        module.reshard()


def fully_sharded(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not to be imported for this alone
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_root(model: nn.Module) -> bool:
    """Tell whether `fully_shard` was called on the model itself, so that its hooks run around the model's forward."""
    return any(module is model for module in fully_sharded(model))


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def check_sharding(model: nn.Module, config: SMARTConfig, precision: str) -> None:
    """Raise ValueError if the model is sharded in a way that cannot work with these settings."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "SMART: FullyShardedDataParallel (FSDP1) is not supported: its flat weights have neither names nor values "
            "between two passes. Shard with torch.distributed.fsdp.fully_shard(model), FSDP2"
        )
    sharded = fully_sharded(model)
    if not sharded and any(map(is_sharded, model.parameters())):
        raise ValueError("SMART: of models with DTensor weights only those of fully_shard(model) are supported")
    for module in sharded:
        policy = mixed_precision_policy(module)
        half = next((dtype for dtype in (policy.param_dtype, policy.output_dtype) if dtype in HALF), None)
        if half is not None and precision == "float32":
            raise ValueError(
                f"SMART: fully_shard's mixed precision policy has {half}. All passes run in it, and R_s at a small "
                "radius is far below its rounding. Leave param_dtype and output_dtype out of it and use "
                "torch.autocast, beside which the passes of SMART run in float32. Or say SMART(..., "
                "precision='model') with a radius that this precision can hold"
            )
    if sharded and config.non_finite != "raise":
        raise ValueError(
            "SMART: non_finite='skip' cannot work with fully_shard: a process that skips its penalty gathers less in "
            "the backward pass than the others, and they wait for ever. Use non_finite='raise'"
        )
