"""Find what a model was given: its arguments by name, and which positions of x they say are real."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smartreg_torch.perturbation import expand_mask
from smartreg_torch.site import Call

Masks = str | Callable[..., Tensor | Sequence[Tensor | None]]

# Masks by other names than attention_mask: what is true there is for the user to say.
_MASKS = re.compile(r"(^|_)(masks?|pad|padding|valid)(_|$)", re.IGNORECASE)
_OTHER_MASKS = re.compile(r"head|special|global|label|decoder|cross|span|masked|sample|class|type|indices", re.I)
_IN_FRONT = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")  # PEFT's, whose tokens come first


class Inputs(NamedTuple):
    """Collect what one batch says of its positions.

    Attributes:
        arguments: the model's arguments by name, however they were given.
        masks: one for each run of the site, true at real positions; without a site, those that there are.
        mask_name: what said so.
    """

    arguments: dict[str, Any]
    masks: list[Tensor | None]
    mask_name: str

    @property
    def names(self) -> frozenset[str]:
        """Name the arguments that are not None."""
        return frozenset(name for name, value in self.arguments.items() if value is not None)

    @property
    def shapes(self) -> list[torch.Size]:
        """List the shapes that x may have if there is no site: token ids count as embeddings of width 1."""
        tensors = [value for value in self.arguments.values() if isinstance(value, Tensor)]
        return [value.shape if value.is_floating_point() else torch.Size([*value.shape, 1]) for value in tensors]


def read_inputs(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], calls: Sequence[Call], asked: Masks | None
) -> Inputs:
    """Name the arguments of a call, and find the masks of x among them.

    Args:
        names: what the model's forward calls its positional arguments.
        calls: the runs of the site.
        asked: what the user gave as mask=.

    Raises:
        ValueError: a mask has another shape than the positions of x, or it is not clear which one is meant.
    """
    arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
    for value in list(arguments.values()):
        if isinstance(value, Mapping):  # a batch, as one argument
            arguments = {name: item for name, item in value.items() if isinstance(name, str)} | arguments
    count = max(len(calls), 1)
    given: Any
    if callable(asked):
        given = asked(*args, **kwargs)
        masks: list[Tensor | None] = [given] * count if given is None or isinstance(given, Tensor) else list(given)
        if calls and len(masks) != count:
            raise ValueError(
                f"SMART: mask= gave {len(masks)} masks, but the site ran {count} times. Let it return a list with "
                "one for each run of the site, or None"
            )
        _check_shapes(masks, calls)
        return Inputs(arguments, masks, "mask=")
    if asked is not None:
        name, given = asked, arguments.get(asked)
        if given is None:
            raise ValueError(
                f"SMART: mask={name!r}, but the model was called without that argument. Give the model that "
                "argument, or name another"
            )
    else:
        name, given = find_mask(arguments, [call.x.shape for call in calls])
    if given is None:
        return Inputs(arguments, [call.padding for call in calls], "the embedding's padding_idx")
    others = [
        other
        for other, value in arguments.items()
        if other != name and "mask" in other and isinstance(value, Tensor) and value.shape == given.shape
    ]
    if asked is None and count > 1 and others:
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
    return Inputs(arguments, [given] * count, name)


def _check_shapes(masks: Sequence[Tensor | None], calls: Sequence[Call]) -> None:
    """Raise ValueError if what the user's function gave has not the leading axes of x."""
    for call, mask in zip(calls, masks, strict=False):
        if mask is None:
            continue
        try:
            expand_mask(mask, call.x)
        except ValueError as error:
            raise ValueError(
                f"SMART: mask= gave the shape {tuple(mask.shape)}, but the site gives {tuple(call.x.shape)}. Let it "
                f"return {tuple(call.x.shape[:-1])}, true at real positions, as lambda ids, lengths: ids > 0 does"
            ) from error


def find_mask(arguments: Mapping[str, Any], xs: Sequence[torch.Size]) -> tuple[str, Tensor | None]:
    """Find which positions are real, and the argument that says so; "none" and None if no argument does.

    `attention_mask` is true at real positions, or, if it is to be added to scores, 0 there and negative elsewhere.
    PyTorch's `*key_padding_mask` is true at padding.

    Raises:
        ValueError: a mask of another name, of which nothing says what is true there.
    """
    given = arguments.get("attention_mask")
    if isinstance(given, Tensor):
        return "attention_mask", _real(given)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        if name.endswith("key_padding_mask"):
            return f"{name}, true at padding", value == 0
        is_mask = _MASKS.search(name) and not _OTHER_MASKS.search(name)
        if is_mask and any(len(x) > 2 and value.shape == x[:-1] for x in xs):
            raise ValueError(
                f"SMART: the model was given {name!r}, (n, tokens). Is it true at padding, or at real tokens? Say "
                f"mask={name!r} if it is true at real tokens, else mask=, a function of the model's arguments that "
                "gives the tensor which is"
            )
    return "none", None


def _real(mask: Tensor) -> Tensor:
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:  # for the scores, (n, heads, tokens, tokens)
        mask = mask[:, 0, 0]
    if not mask.is_floating_point():
        return mask
    additive = (mask <= 0).all()
    return torch.where(additive, mask == 0, mask != 0)


def virtual_tokens(model: Any) -> int:
    """Return how many tokens PEFT's prompt tuning puts in front of a batch."""
    settings = getattr(model, "peft_config", None)
    active = settings.get(getattr(model, "active_adapter", None)) if isinstance(settings, dict) else None
    kind = str(getattr(active, "peft_type", "")).rpartition(".")[2]
    return int(getattr(active, "num_virtual_tokens", 0) or 0) if kind in _IN_FRONT else 0
