"""Keep every private name of a framework that this package uses; say what happens without it.

The docstring of each function says which names are `Private`, in which releases they were `Seen` (if that is not
`SEEN`), what they are `For`, and what happens `Without` them. tests/test_upstream.py tries each of them. This module
imports nothing of smartreg.
"""

from __future__ import annotations

import ctypes
import inspect
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SEEN = "torch 2.6 to 2.13"
_INSTALL = "pip install 'torch>=2.6,<=2.13'"
_REQUIRED = {
    "torch.Tensor": (Tensor, ("_version", "_backward_hooks", "_post_accumulate_grad_hooks")),
    "torch.nn.Module": (nn.Module(), ("_parameters", "_buffers", "_modules")),
}
_missing = [f"{of}.{name}" for of, (owner, names) in _REQUIRED.items() for name in names if not hasattr(owner, name)]
if _missing:
    raise ImportError(
        f"smartreg_torch needs {', '.join(_missing)}, which torch {torch.__version__} does not have. Install a release "
        f"in which it was seen: {_INSTALL}"
    )


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary in which a module keeps its own parameters; others can be put into it for one pass.

    Private: torch.nn.Module._parameters
    Seen: torch 2.6 to 2.13; other libraries rely on it as well
    For: passes with float32 copies or with the frozen weights of before; one walk over the model a step
    Without: ImportError when this module is imported
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary in which a module keeps its own buffers; others can be put into it for one pass.

    Private: torch.nn.Module._buffers
    Seen: torch 2.6 to 2.13; other libraries rely on it as well
    For: passes with the buffers of before, of which BatchNorm's statistics are some
    Without: ImportError when this module is imported
    """
    return module._buffers


def held(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """Return the dictionaries in which modules keep the modules inside them, and those of their parameters.

    Private: torch.nn.Module._modules, torch.nn.Module._parameters
    Seen: torch 2.6 to 2.13; other libraries rely on it as well
    For: seeing, in less time than a walk takes, that a model is made of the same modules as in the step before
    Without: ImportError when this module is imported
    """
    return [*map(operator.attrgetter("_modules"), modules), *map(operator.attrgetter("_parameters"), modules)]


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return the hooks of a module's forward.

    Private: torch.nn.Module._forward_pre_hooks, torch.nn.Module._forward_hooks
    For: finding what a hook keeps outside of its module, to be the same in every pass
    Without: hooks are not looked into; the check of the first step raises if a pass then does not repeat
    """
    own = vars(module)
    before, after = own.get("_forward_pre_hooks"), own.get("_forward_hooks")
    return (*(before or {}).values(), *(after or {}).values()) if before or after else ()


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written into.

    Private: torch.Tensor._version
    Seen: torch 2.6 to 2.13; inference tensors raise RuntimeError
    For: finding the arguments, buffers and frozen weights that a forward wrote into, without comparing their values
    Without: ImportError when this module is imported
    """
    return tensor._version


def numpy_words() -> bytes | None:
    """Return the memory of NumPy's global generator, in 1 microsecond; its `state` takes 50.

    Private: numpy.random.MT19937.ctypes.state_address, the size of what is there: 624 words and a position
    Seen: numpy 1.26 to 2.4
    For: seeing whether a forward has drawn from NumPy's global stream
    Without: None if the generator is of another class; its state is read instead
    """
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)


def has_gradient_hooks(weight: Tensor) -> bool:
    """Tell whether a weight has hooks that see its gradient before it is added to `.grad`.

    Private: torch.Tensor._backward_hooks
    For: refusing lean=True, under which a hook would see each of two parts of a gradient alone
    Without: ImportError when this module is imported
    """
    return bool(weight._backward_hooks)


def has_accumulation_hooks(weight: Tensor) -> bool:
    """Tell whether a weight has hooks that are called after its `.grad` has changed.

    Private: torch.Tensor._post_accumulate_grad_hooks
    For: refusing lean=True with such hooks, and layers that fill `.grad` in a backward of their own
    Without: ImportError when this module is imported
    """
    return bool(weight._post_accumulate_grad_hooks)


def fills_every_grad() -> bool:
    """Tell, inside a backward, whether it is loss.backward(): it adds to the `.grad` of every weight.

    Private: torch.autograd._is_checkpoint_valid
    For: refusing torch.autograd.grad and backward(inputs=...) with lean=True, which would lose gradients
    Without: RuntimeError in the first backward with lean=True
    """
    if not hasattr(torch.autograd, "_is_checkpoint_valid"):
        raise RuntimeError(
            f"SMART: lean=True needs torch.autograd._is_checkpoint_valid, which torch {torch.__version__} does not "
            f"have. Say lean=False, or {_INSTALL}"
        )
    return bool(torch.autograd._is_checkpoint_valid())  # type: ignore[no-untyped-call]


def frees_the_graph() -> bool:
    """Tell, inside a backward, whether the graph is freed by it: no other backward will ask for what it saved.

    Private: torch._C._autograd._get_current_graph_task_keep_graph
    For: scaling the saved gradients of a divergence in place, two tensors of the logits' size less
    Without: they are scaled out of place
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def is_checkpointed() -> bool:
    """Tell whether this code runs inside a region that torch.utils.checkpoint runs again, without reentrance.

    Private: torch._C._autograd._top_saved_tensors_default_hooks, torch.utils.checkpoint._checkpoint_hook
    Seen: torch 2.7 to 2.13
    For: refusing a site in such a region, which would run again without its perturbation
    Without: the same answer from the files of the calling functions, in 7 instead of 0.1 microseconds
    """
    try:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return torch.utils.checkpoint._checkpoint_hook.__qualname__ in getattr(hooks and hooks[0], "__qualname__", "")
    except AttributeError:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
            frame = frame.f_back
        return frame is not None


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's wrapper, or the model itself.

    Private: torch._dynamo.OptimizedModule._orig_mod
    Seen: torch 2.6 to 2.13; it is in the names of a compiled model's state dict
    For: names of parameters and sites that are those of the model
    Without: names begin as those of the wrapper, and a compiled model is not known as one, see `is_compiled`
    """
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile(module) made this module, or module.compile() was called on it.

    Private: torch._dynamo.OptimizedModule._orig_mod, torch.nn.Module._compiled_call_impl
    For: compiling anew after the site's hook was put on, and refusing float32 copies of half-precision weights
    Without: False; a model that was compiled and run before SMART is made then needs torch.compiler.reset()
    """
    return hasattr(module, "_orig_mod") or compiled_call(module) is not None


def compiled_call(module: nn.Module) -> Any:
    """Return what module.compile() has put in place of the module's call, or None.

    Private: torch.nn.Module._compiled_call_impl
    For: the Trainer's call of the model, which SMART takes the place of once a step
    Without: None
    """
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Put this in place of the module's call, as module.compile() does; None takes it away.

    Private: torch.nn.Module._compiled_call_impl
    For: the Trainer's call of the model, which SMART takes the place of once a step
    Without: torch.compile goes through SMART's code as well, which is slow; and a model of fully_shard is refused in
        the Trainer's first step, since its hooks have run before SMART does
    """
    if compiled_call(module) is not call:
        module._compiled_call_impl = call


def frames_compiled() -> int:
    """Return how often torch.compile has compiled something in this process.

    Private: torch._dynamo.utils.counters
    For: the warning that a model is compiled anew in batch after batch
    Without: 0, and no warning
    """
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)  # not to be imported for this alone
    return 0 if counters is None else int(counters["frames"]["total"])


def may_compile() -> bool:
    """Tell whether anything can have been compiled in this process.

    Private: torch._dynamo
    For: not importing torch._dynamo, which takes seconds, to switch off what nobody uses
    Without: False; what asks the task loss then runs compiled, and compiles once more
    """
    return "torch._dynamo" in sys.modules


def mixed_precision_policy(sharded: Any) -> Any:
    """Return the MixedPrecisionPolicy that fully_shard was given.

    Private: torch.distributed.fsdp.FSDPModule._get_fsdp_state, FSDPState._mp_policy
    For: refusing a policy in half precision, in which R_s at a small radius is lost
    Without: RuntimeError when SMART is made with precision="float32"
    """
    try:
        return sharded._get_fsdp_state()._mp_policy
    except AttributeError as error:
        raise RuntimeError(
            f"SMART: fully_shard's mixed precision policy cannot be read with torch {torch.__version__}: {error}. "
            f"Say SMART(..., precision='model') if it is float32, or {_INSTALL}"
        ) from error


def partition(weight: Tensor) -> Tensor | None:
    """Return this process's part of a weight that ZeRO 3 has partitioned, without its padding, or None.

    Private: ds_tensor, ds_numel and ds_process_group, attributes of the parameters of a model of ZeRO 3
    Seen: deepspeed 0.19
    For: theta~ of ZeRO 3, which is made of the parts, and is put into the model in their place
    Without: None, and SMART refuses ZeRO 3
    """
    part: Tensor | None = getattr(weight, "ds_tensor", None) if "deepspeed" in sys.modules else None
    if part is None:
        return None
    zero: Any = weight
    begin = torch.distributed.get_rank(zero.ds_process_group) * part.numel()
    return part.narrow(0, 0, min(max(zero.ds_numel - begin, 0), part.numel()))


def release_partitions(engine: Any) -> None:
    """Give up the whole weights that ZeRO 3 has gathered; the next pass gathers them anew.

    Private: DeepSpeedZeroOptimizer_Stage3.empty_partition_cache (the engine's own collects garbage, too, which is slow)
    Seen: deepspeed 0.19
    For: passes with theta~, or with x + delta after it, that are not of stale weights
    Without: AttributeError in the first step
    """
    engine.optimizer.empty_partition_cache()


def is_of_zero(name: str) -> bool:
    """Tell whether ZeRO 3 keeps its own under this name in a module: how often a weight is still needed.

    Private: the names of attributes that DeepSpeed gives to modules
    Seen: deepspeed 0.19
    For: leaving them as the last pass left them, while all else is put back
    Without: False; the backward then finds weights that are not gathered, and fails
    """
    own = ("applied_pre_backward_ref_cnt", "_external_params", "_original_parameters", "_parameters")
    return name.startswith("ds_") or name in own


def says(error: BaseException, what: str) -> bool:
    """Tell whether an error of torch's says this: "compiler disabled", "no leaf" or "reentrant".

    Private: the words of three messages
    For: saying what to do with fullgraph=True, requires_grad at the site, and reentrant checkpointing
    Without: torch's own message
    """
    words = {
        "compiler disabled": ("torch.compiler.disable", "torch._dynamo.disable"),  # that of torch 2.6
        "no leaf": ("change requires_grad flags of leaf variables",),
        "reentrant": ("use_reentrant",),
    }
    return any(said in str(error) for said in words[what])


def original_forward(model: nn.Module) -> Callable[..., Any] | None:
    """Return the forward around which accelerate has put autocast, or None.

    Private: _original_forward, an attribute of a model that accelerate.Accelerator.prepare_model was given
    Seen: accelerate 1.1 to 1.15
    For: passes in float32, and the gradient of a loss that the model computes inside
    Without: None; precision="float32" then computes under accelerate's autocast
    """
    found: Callable[..., Any] | None = vars(model).get("_original_forward")
    return found


TRAINER = (
    "_determine_best_metric",
    "_get_output_dir",
    "_load_best_model",
    "_load_rng_state",
    "_save",
    "_save_checkpoint",
    "_save_rng_state",
)


def check_trainer(trainer: type) -> None:
    """Raise ImportError if Trainer lacks a method that SMARTMixin overrides or calls.

    Private: the methods of transformers.Trainer that are named in TRAINER
    Seen: transformers 5.18 to 5.24
    For: theta~ in a checkpoint, resumed and at the end; no callback can add to a checkpoint before it is pushed
    Without: ImportError when smartreg_torch.transformers is imported; an override that nobody calls would lose theta~
    """
    missing = [name for name in TRAINER if not hasattr(trainer, name)]
    if missing:
        raise ImportError(f"its Trainer has no {', '.join(missing)}")
