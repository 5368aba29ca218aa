"""Read x in a model and put x + delta in: a hook on its embedding (or on its input), idle unless a pass arms it."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smartreg_torch.compat import is_checkpointed, says
from smartreg_torch.values import tensors_in

# what an embedding that is not of tokens is called
_POSITIONAL = re.compile(r"position|segment|token_type|(^|_)(pos|wpe)(_|emb|$)", re.IGNORECASE)


class Call:
    """Hold one call of the site in the clean pass.

    Attributes:
        own: what the site gave, the x of the paper, on the clean pass's graph.
        x: the same; the clean graph reaches it in any case if the ascent starts from that graph.
        padding: true at tokens that are not the embedding's `padding_idx`; None if the site does not know.
        dtype: in which the model goes on with x: autocast's if that is on.
    """

    def __init__(self, own: Tensor, x: Tensor, padding: Tensor | None) -> None:
        self.own = own
        self.x = x
        self.padding = padding
        kind = x.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Site:
    """Read x in a module, and put x + delta in.

    Args:
        model: any module. The hooks are installed here and stay until `remove`, or until nothing holds this Site.
        site: the dotted name of a submodule that returns one floating-point tensor (it may be the first of a tuple
            that has no other tensor), or "input" or "input.NAME" for the model's own (first, or so named) argument; or
            a list of such names. By default what a Hugging Face model (here or inside) calls its input embeddings, else
            the only `nn.Embedding` that is not for positions or segments, else "input".

    Raises:
        ValueError: there is no such submodule, or the default is not clear.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
        >>> Site(model).name
        '0'
    """

    def __init__(self, model: nn.Module, site: str | Sequence[str] | None = None) -> None:
        self._model = model
        found, self.why = _find(model, site)
        self._hooks = [_Hook(name, argument_names(model)) for name in found]
        self.name = ", ".join(found)
        try:
            for hook in self._hooks:
                hook.put_on(model)
        except BaseException:
            self.remove()
            raise
        # a SMART that is made anew, in a notebook's cell, say, leaves no hook of the old one
        self._on_end = weakref.finalize(self, _take_off, self._hooks)

    @property
    def at_input(self) -> bool:
        """Tell whether x is an argument of the model itself."""
        return any(hook.at_input for hook in self._hooks)

    def remove(self) -> None:
        """Take the hooks off."""
        _take_off(self._hooks)

    def follow(self) -> None:
        """Move the hooks to the modules that have the sites' names now: a resized vocabulary is another module."""
        for hook in self._hooks:
            hook.follow(self._model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "names": [hook.name for hook in self._hooks], "why": self.why}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"], state["names"])  # type: ignore[misc]
        self.why = state["why"]

    @contextmanager
    def recording(self, differentiable: bool) -> Iterator[list[Call]]:
        """Note every call in the clean pass; if `differentiable`, its graph reaches x in any case."""
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

    def replaced(self, points: list[Tensor], graph: bool = True) -> AbstractContextManager[None]:
        """Run a pass at x~: the k-th call gives points[k]. Without a graph, no gradient has to pass the site."""
        return self._counted(points, lambda output, point: point.clone(), graph)

    def shifted(self, deltas: list[Tensor], graph: bool = True) -> AbstractContextManager[None]:
        """Run a pass at x~ with a graph of its own below the site: the k-th call gives its output plus deltas[k]."""
        return self._counted(deltas, shift, graph)

    @contextmanager
    def _counted(
        self, values: list[Tensor], put: Callable[[Tensor, Tensor], Tensor], graph: bool = True
    ) -> Iterator[None]:
        run = 0

        def substitute(output: Tensor, padding: Tensor | None) -> Tensor:
            nonlocal run
            self._check(output, graph)
            run += 1
            if run > len(values):
                self._miscounted(len(values), f"{run} times or more")
            if output.shape != values[run - 1].shape:
                raise ValueError(
                    f"SMART: the site {self.name!r} gave a tensor of shape {tuple(output.shape)}, but the clean pass "
                    f"gave {tuple(values[run - 1].shape)}: the model must do the same in every pass over one batch. "
                    "Name a module with site= that gives the same shape each time"
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
        for hook in self._hooks:
            hook.on_call, hook.is_armed = on_call, True
        try:
            yield
        except RuntimeError as error:
            if says(error, "compiler disabled") and "_changed_" in str(error):
                raise RuntimeError(
                    f"SMART: torch.compile with fullgraph=True cannot work: the perturbation enters at the site "
                    f"{self.name!r}, and the graph ends there. Compile without fullgraph=True"
                ) from error
            if says(error, "no leaf"):
                raise RuntimeError(
                    f"SMART: the model sets requires_grad on what it makes of the site {self.name!r}. That cannot be "
                    f"done to a perturbed tensor. {self._behind_the_encoder()}"
                ) from error
            raise
        finally:
            for hook in self._hooks:
                hook.on_call, hook.is_armed = None, False

    def _behind_the_encoder(self) -> str:
        """Say what to name as the site in wav2vec 2.0 and its kin, by the names that this model has."""
        names = [name for name, _ in self._model.named_modules() if name.endswith("feature_projection.projection")]
        if not names:
            return "Name a module behind the one that does so with site="
        return (
            f"Name a module behind the feature encoder, in wav2vec 2.0 and its kin site={names[0]!r}, or freeze it: "
            "model.freeze_feature_encoder()"
        )

    def _check(self, output: Any, graph: bool = True) -> None:
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
        if output.is_nested:
            raise TypeError(
                f"SMART: the site {self.name!r} gave a nested (jagged) tensor, of whose rows PyTorch computes no norm. "
                "Pad the batch, torch.nested.to_padded_tensor(x, 0.0), and give an attention mask"
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
        if not graph:
            return
        if not torch.is_grad_enabled() or is_checkpointed():
            raise RuntimeError(
                f"SMART: the site {self.name!r} runs inside a checkpointed or no_grad region. Checkpointing would run "
                "it again in the backward pass without its perturbation, and gradients would be wrong. Checkpoint "
                "only the layers above the embedding, or name a module outside the region with site=."
            )


class _Hook:
    """Hook into a forward (at the model's own arguments, before it); do nothing until a pass arms it.

    All that torch.compile sees is the flag. If it is set, the compiled graph ends at the site. So x is on autograd's
    own graph, and all passes run the same code behind the site, with the same rounding.
    """

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.on_call: Callable[[Tensor, Tensor | None], Tensor] | None = None
        self.is_armed = False
        self.at_input = name == "input" or name.startswith("input.")
        self._positions = {argument: at for at, argument in enumerate(arguments)}
        self._module: weakref.ref[nn.Module] | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        changed = _changed_input if self.at_input else _changed_output
        self._changed = torch.compiler.disable(changed)  # type: ignore[no-untyped-call]

    def put_on(self, model: nn.Module) -> None:
        module = model if self.at_input else model.get_submodule(self.name)
        register = module.register_forward_pre_hook if self.at_input else module.register_forward_hook
        self._handle, self._module = register(self, with_kwargs=True), weakref.ref(module)

    def follow(self, model: nn.Module) -> None:
        """Move to the module that has the site's name now."""
        if not (self.at_input or self._module is None or self._module() is model.get_submodule(self.name)):
            self.take_off()
            self.put_on(model)

    def take_off(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        return self._changed(self, module, args, kwargs, output) if self.is_armed else None

    def __reduce__(self) -> Any:
        """Put in a copy or a pickle of the model a hook that does nothing, and that loads without this package."""
        return getattr, (nullcontext(), "__exit__")


def _take_off(hooks: list[_Hook]) -> None:
    for hook in hooks:
        hook.take_off()


def _changed_output(hook: _Hook, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    assert hook.on_call is not None
    padding = None
    module = getattr(module, "base_layer", getattr(module, "original_module", module))  # inside PEFT's
    index = getattr(module, "padding_idx", None)
    ids = args[0] if args else kwargs.get("input")
    if isinstance(module, nn.Embedding) and index is not None and isinstance(ids, Tensor):
        padding = ids != index
    if type(output) is tuple and output and next(tensors_in(output[1:]), None) is None:
        return hook.on_call(output[0], padding), *output[1:]  # such as Swin's patches, with their height and width
    return hook.on_call(output, padding)


def _changed_input(hook: _Hook, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    assert hook.on_call is not None
    name = hook.name.removeprefix("input").removeprefix(".") or (None if args else next(iter(kwargs), None))
    at = 0 if name is None else hook._positions.get(name, len(args))
    if name in kwargs:
        return args, {**kwargs, name: hook.on_call(kwargs[name], None)}
    if at >= len(args):
        raise ValueError(
            f"SMART: the model was called without the argument {name!r}, which the site names. Give that argument, "
            "or name another site with site="
        )
    return (*args[:at], hook.on_call(args[at], None), *args[at + 1 :]), kwargs


def shift(x: Tensor, delta: Tensor) -> Tensor:
    """Return x + delta, rounded once to x's dtype.

    Example:
        >>> shift(torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 0.5))
        tensor([1.5000], dtype=torch.bfloat16)
    """
    return (x.to(delta.dtype) + delta).to(x.dtype)


def argument_names(model: Any) -> list[str]:
    """Return the names of the arguments of the model's forward, in their order.

    Of a wrapper, whose forward takes `*args`, return those of the model inside.

    Example:
        >>> argument_names(nn.Bilinear(2, 2, 2))
        ['input1', 'input2']
    """
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not any(p.kind == p.VAR_POSITIONAL for p in parameters) and (names or not hasattr(model, "get_base_model")):
        return names
    if hasattr(model, "get_base_model"):
        inside = model.get_base_model()
    else:
        inside = next((child for child in model.children() if any(True for _ in child.parameters())), None)
    return names if inside is None else names + [name for name in argument_names(inside) if name not in names]


def _find(model: nn.Module, site: str | Sequence[str] | None) -> tuple[list[str], str]:
    """Return the names of the sites, and why these."""
    names = dict(model.named_modules())
    asked = [site] if isinstance(site, str) else list(site or [])
    for name in asked:
        if not isinstance(name, str):
            raise TypeError(f"SMART: site must be a dotted name, or a list of them, got {name!r}")
        if (name and name in names) or name == "input" or name.startswith("input."):
            continue
        embeddings = [name for name, module in names.items() if isinstance(module, nn.Embedding)]
        raise ValueError(
            f"SMART: the model has no submodule {name!r}. Name one of model.named_modules(), or 'input'; the "
            f"embeddings among them are {embeddings}"
        )
    if asked:
        return asked, "site="
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise ValueError(
            "SMART: XLNet's embeddings are (tokens, n, d), and the first axis must be the batch: it is not "
            "supported. Use a model whose embeddings are (n, tokens, d)"
        )
    named, why = _hugging_face_embeddings(names), "get_input_embeddings()"
    if not named:
        every = [name for name, module in names.items() if isinstance(module, nn.Embedding)]
        # by the module's own name first: "segmenter.tokens" is no segment embedding
        tokens = [name for name in every if not _POSITIONAL.search(name.rpartition(".")[2])]
        if len(tokens) > 1:
            tokens = [name for name in tokens if not _POSITIONAL.search(name)] or tokens
        named, why = tokens, "the only nn.Embedding" if len(every) == 1 else "the only nn.Embedding for tokens"
    if len(named) > 1:
        raise ValueError(
            f"SMART: the model has several embeddings, {named}. Say which one to perturb with site=, or several with "
            f"site={named[:2]}, or name the module in which they are added up"
        )
    return (named, why) if named else (["input"], "there is no nn.Embedding for tokens")


def _hugging_face_embeddings(names: dict[str, nn.Module]) -> list[str]:
    """Return the names of what each outermost Hugging Face model in here, or its encoder, calls its embeddings."""
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
