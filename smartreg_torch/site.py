"""Where the perturbation enters a model: a hook on its embedding (or on its input), idle unless a pass arms it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_POSITIONAL = ("position", "segment", "token_type")


class Call:
    """One call of the site in the clean pass.

    Attributes:
        own: what the site gave, the x of the paper, on the clean pass's graph.
        x: the same, and where the ascent starts from that graph, it reaches x in any case.
        padding: true at tokens that are not the embedding's `padding_idx`, or None where the site does not know.
        dtype: in which the model goes on with x: autocast's where that is on.
    """

    def __init__(self, own: Tensor, x: Tensor, padding: Tensor | None) -> None:
        self.own = own
        self.x = x
        self.padding = padding
        kind = x.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Site:
    """The place in a module where x is read and x + delta is put in.

    Args:
        model: any module. The hook is installed here and stays until `remove`.
        site: the dotted name of a submodule that returns one floating-point tensor (it may be the first of a tuple
            that has no other tensor), or "input" or "input.NAME" for the model's own (first, or so named) argument.
            By default what a Hugging Face model (here or inside) calls its input embeddings, else the only
            `nn.Embedding` that is not for positions or segments, else "input".

    Raises:
        ValueError: there is no such submodule, or the default is not clear.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
        >>> Site(model).name
        '0'
    """

    def __init__(self, model: nn.Module, site: str | None = None) -> None:
        self.name, module = _find(model, site)
        self._pass: Callable[[Tensor, Tensor | None], Tensor] | None = None
        # All that torch.compile sees is this flag. Where it is up the compiled graph ends at the site: x is then on
        # autograd's own graph, and all passes run the same code behind the site, with the same rounding.
        self._is_armed = False
        self._put_output = torch.compiler.disable(self._changed_output)  # type: ignore[no-untyped-call]
        self._put_input = torch.compiler.disable(self._changed_input)  # type: ignore[no-untyped-call]
        if module is None:
            self._positions = {name: at for at, name in enumerate(argument_names(model))}
            self._handle = model.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(self._on_output)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    @contextmanager
    def recording(self, differentiable: bool) -> Iterator[list[Call]]:
        """The clean pass: every call is noted; with `differentiable`, so that its graph reaches x in any case."""
        calls: list[Call] = []

        def record(output: Tensor, padding: Tensor | None) -> Tensor:
            self._check(output)
            x = output
            if differentiable and not x.requires_grad:
                x = x.detach().requires_grad_()
            calls.append(Call(output, x, padding))
            return x.clone()  # a model may add to its embeddings in place

        with self._armed(record):
            yield calls
        if not calls:
            raise ValueError(
                f"SMART: the site {self.name!r} was not run by the model's forward. Name the module that gives the "
                "embeddings: SMART(model, config, site='...'). For T5 and BART that is the encoder's embedding. Make "
                "SMART after adapters are added; if the model was compiled and run before, call torch.compiler.reset()."
            )

    @contextmanager
    def replaced(self, points: list[Tensor]) -> Iterator[None]:
        """A pass at x~: the k-th call gives points[k]."""
        with self._counted(points, lambda output, point: point.clone()):
            yield

    @contextmanager
    def shifted(self, deltas: list[Tensor]) -> Iterator[None]:
        """A pass at x~ with a graph of its own below the site: the k-th call gives its own output plus deltas[k]."""
        with self._counted(deltas, shift):
            yield

    @contextmanager
    def _counted(self, values: list[Tensor], put: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        run = 0

        def substitute(output: Tensor, padding: Tensor | None) -> Tensor:
            nonlocal run
            self._check(output)
            run += 1
            if run > len(values):
                self._miscounted(len(values), f"{run} times or more")
            if output.shape != values[run - 1].shape:
                raise ValueError(
                    f"SMART: the site {self.name!r} gave a tensor of shape {tuple(output.shape)} where the clean pass "
                    f"gave {tuple(values[run - 1].shape)}: the model must do the same in every pass over one batch"
                )
            return put(output, values[run - 1])

        with self._armed(substitute):
            yield
        if run != len(values):
            self._miscounted(len(values), f"{run} times")

    def _miscounted(self, expected: int, got: str) -> None:
        raise ValueError(
            f"SMART: the site {self.name!r} ran {expected} times in the clean pass and {got} in a later pass over the "
            "same batch. Is it inside a checkpointed region, or called at random (layer drop)? Name another with site=."
        )

    @contextmanager
    def _armed(self, on_call: Callable[[Tensor, Tensor | None], Tensor]) -> Iterator[None]:
        self._pass, self._is_armed = on_call, True
        try:
            yield
        except RuntimeError as error:
            if "torch.compiler.disable" in str(error) and "Site._changed" in str(error):
                raise RuntimeError(
                    f"SMART: torch.compile with fullgraph=True cannot work: the graph ends at the site {self.name!r}, "
                    "where the perturbation enters. Compile without fullgraph=True"
                ) from error
            if "change requires_grad flags of leaf variables" in str(error):
                raise RuntimeError(
                    f"SMART: the model sets requires_grad on what it makes of the site {self.name!r}, which cannot be "
                    "done to a perturbed tensor. In wav2vec 2.0 and its kin name a module behind the feature encoder, "
                    "site='wav2vec2.feature_projection.projection', or freeze that: model.freeze_feature_encoder()"
                ) from error
            raise
        finally:
            self._pass, self._is_armed = None, False

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._put_output(module, args, output) if self._is_armed else output

    def _on_input(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._put_input(args, kwargs) if self._is_armed else None

    def _changed_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self._pass is not None
        padding = None
        module = getattr(module, "base_layer", getattr(module, "original_module", module))  # inside PEFT's
        index = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and index is not None and args and isinstance(args[0], Tensor):
            padding = args[0] != index
        if type(output) is tuple and output and not any(isinstance(item, Tensor) for item in tree_leaves(output[1:])):
            return self._pass(output[0], padding), *output[1:]  # such as Swin's patches, with their height and width
        return self._pass(output, padding)

    def _changed_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._pass is not None
        name = self.name.removeprefix("input").removeprefix(".") or (None if args else next(iter(kwargs), None))
        at = 0 if name is None else self._positions.get(name, len(args))
        if name in kwargs:
            return args, {**kwargs, name: self._pass(kwargs[name], None)}
        if at >= len(args):
            raise ValueError(f"SMART: the model was called without the argument {name!r}, which the site names")
        return (*args[:at], self._pass(args[at], None), *args[at + 1 :]), kwargs

    def _check(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"SMART: the site {self.name!r} must give one tensor, got {type(output).__name__}. Name a module that "
                "does with site=, such as the embedding itself."
            )
        if not output.is_floating_point():
            raise TypeError(
                f"SMART: the site {self.name!r} gave {output.dtype}, which cannot be perturbed: it must be floating "
                "point. Name the module that turns token ids into embeddings with site=."
            )
        if output.ndim < 2 or output.numel() == 0:
            raise ValueError(
                f"SMART: the site {self.name!r} must give (n, ..., d) with n > 0, got {tuple(output.shape)}"
            )
        if output.is_inference():
            raise RuntimeError(
                f"SMART: the site {self.name!r} gave an inference tensor, which no gradient can pass. Make the model's "
                "weights and inputs outside torch.inference_mode(), or .clone() them."
            )
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if not torch.is_grad_enabled() or "_checkpoint_hook" in getattr(hooks and hooks[0], "__qualname__", ""):
            raise RuntimeError(
                f"SMART: the site {self.name!r} runs inside a checkpointed or no_grad region. Checkpointing runs it "
                "again in the backward pass, without its perturbation, which would be silently wrong. Checkpoint the "
                "layers above the embedding only, or name a module outside the region with site=."
            )


def shift(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, rounded once to x's dtype.

    Example:
        >>> shift(torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 0.5))
        tensor([1.5000], dtype=torch.bfloat16)
    """
    return (x.to(delta.dtype) + delta).to(x.dtype)


def argument_names(model: Any) -> list[str]:
    """What the model's forward calls its arguments; in a plain `PeftModel`, what the model inside calls them.

    Example:
        >>> argument_names(nn.Bilinear(2, 2, 2))
        ['input1', 'input2']
    """
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "get_base_model") and all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()
    ):
        parameters = inspect.signature(model.get_base_model().forward).parameters
    return list(parameters)


def _find(model: nn.Module, site: str | None) -> tuple[str, nn.Module | None]:
    names = dict(model.named_modules())
    if site is not None:
        if site and site in names:
            return site, names[site]
        if site == "input" or site.startswith("input."):
            return site, None
        embeddings = [name for name, module in names.items() if isinstance(module, nn.Embedding)]
        raise ValueError(
            f"SMART: the model has no submodule {site!r}. It is a dotted name of model.named_modules(), or 'input'; "
            f"the embeddings among them are {embeddings}"
        )
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise ValueError(
            "SMART: XLNet's embeddings are (tokens, n, d), and the first axis must be the batch: it is not supported"
        )
    named = _hugging_face_embeddings(names)
    if not named:
        named = [
            name
            for name, module in names.items()
            if isinstance(module, nn.Embedding) and not any(word in name.lower() for word in _POSITIONAL)
        ]
    if len(named) > 1:
        raise ValueError(
            f"SMART: the model has several embeddings, {named}: say which one to perturb with site=, or the module in "
            "which they are added up"
        )
    return (named[0], names[named[0]]) if named else ("input", None)


def _hugging_face_embeddings(names: dict[str, nn.Module]) -> list[str]:
    """What each outermost Hugging Face model in here that has some calls its input embeddings, or its encoder does."""
    found: list[str] = []
    outermost: list[str] = []
    for name, module in names.items():
        if not hasattr(module, "get_input_embeddings") or any(name.startswith(f"{above}.") for above in outermost):
            continue
        if outermost == [""]:
            break
        for model in (_called(module, "get_encoder"), module):
            embeddings = _called(model, "get_input_embeddings")
            at = next((key for key, value in names.items() if value is embeddings), None)
            if at is not None:
                found.append(at)
                outermost.append(name)
                break
    return found


def _called(model: Any, method: str) -> Any:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
