"""Do what fully_shard (FSDP2) and DeepSpeed's engine need, and refuse what cannot work with them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from smartreg.config import SMARTConfig
from smartreg_torch.compat import mixed_precision_policy, partition, release_partitions

HALF = (torch.bfloat16, torch.float16)


def is_engine(model: nn.Module) -> bool:
    """Tell whether this is what `deepspeed.initialize` made of a model."""
    deepspeed = sys.modules.get("deepspeed")  # not to be imported for this alone
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def is_wrapper(model: nn.Module) -> bool:
    """Tell whether this is DistributedDataParallel, or DeepSpeed's engine: its `module` is the model itself."""
    return isinstance(model, nn.parallel.DistributedDataParallel) or is_engine(model)


class Partitions:
    """Stand for a model whose weights ZeRO 3 has partitioned, as a module of fully_shard does for its weights.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def reshard(self) -> None:
        """Make the weights parts again."""
        release_partitions(self._engine)


def sharded_parts(wrapped: nn.Module, model: nn.Module) -> list[Any]:
    """Return what `reshard` takes: the modules of fully_shard, or that of ZeRO 3; none if the weights are whole."""
    zero: Any = wrapped
    return [Partitions(zero)] if is_engine(wrapped) and zero.zero_optimization_stage() == 3 else fully_sharded(model)


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


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor."""
    return type(tensor) is not nn.Parameter and hasattr(tensor, "to_local")


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this is a DTensor, or a weight of ZeRO 3: this process has a part of it."""
    return is_dtensor(tensor) or partition(tensor) is not None


def check_sharding(wrapped: nn.Module, model: nn.Module, config: SMARTConfig, precision: str) -> None:
    """Raise ValueError if the model is sharded in a way that cannot work with these settings."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "SMART: FullyShardedDataParallel (FSDP1) is not supported: its flat weights have neither names nor values "
            "between two passes. Shard with torch.distributed.fsdp.fully_shard(model), FSDP2"
        )
    _check_zero(wrapped, model)
    sharded = sharded_parts(wrapped, model)
    if not sharded and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "SMART: of models with DTensor weights only those of fully_shard(model) are supported. Shard the model "
            "with torch.distributed.fsdp.fully_shard"
        )
    for module in fully_sharded(model):
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
            "SMART: non_finite='skip' cannot work with fully_shard or ZeRO 3: a process that skips its penalty gathers "
            "less in the backward pass than the others, and they wait for ever. Use non_finite='raise'"
        )


def _check_zero(wrapped: nn.Module, model: nn.Module) -> None:
    parts = [partition(weight) for weight in model.parameters()]
    engine: Any = wrapped if is_engine(wrapped) else None
    if engine is None and any(part is not None for part in parts):
        raise ValueError(
            "SMART: ZeRO 3 has partitioned the model's weights. Give SMART the engine that "
            "deepspeed.initialize returned"
        )
    if engine is None or engine.zero_optimization_stage() != 3:
        return
    offload = engine.zero_offload_param()
    if any(part is None for part in parts) or getattr(offload, "device", None) == "nvme":
        raise ValueError(
            "SMART: under ZeRO 3 each process must have its part of every weight in memory. Leave offload_param to "
            "NVMe out of DeepSpeed's settings, and give deepspeed.initialize the whole model"
        )
