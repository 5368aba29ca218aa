"""Keep containers, tensors, arrays and random generators beside what they were before the pass, and put that back."""

from __future__ import annotations

import collections
import functools
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smartreg_torch.compat import is_of_zero, version

Get = Callable[[Any], Any]
Put = Callable[[Any, Any], None]


class Slot:
    """Keep what was in a container or an object before the clean pass.

    Attributes:
        key: the attribute that leads to it, (module, name); if it is `named`, the module, whose names lead on.
        stands: what was put in for the pass that is running.
    """

    __slots__ = ("before", "get_from", "key", "named", "owner", "put", "stands", "where")

    def __init__(
        self, where: str, key: Any, owner: Any, get: Get, put: Put, named: bool = False, before: Any = None
    ) -> None:
        self.where, self.key, self.owner, self.get_from, self.put, self.named = where, key, owner, get, put, named
        self.before = get(owner) if before is None else before
        self.stands: Any = None

    def get(self) -> Any:
        """Return a copy of what is in it now."""
        return self.get_from(self.owner)

    def fill(self, now: Any, values: Any) -> bool:
        """Put these values in; return False if they are what is in it now."""
        if same(now, values):
            return False
        self.put(self.owner, values)
        return True

    def is_changed(self) -> bool:
        """Tell whether anything is not as before; nothing is put in."""
        return not same(self.get_from(self.owner), self.before)

    def changed(self) -> list[Any]:
        """Name what is not as before or as put in; [None] for a container without names."""
        then, now = self.before if self.stands is None else self.stands, self.get()
        if same(now, then):
            return []
        if not isinstance(now, dict):
            return [None]
        return [name for name in {**then, **now} if now.get(name, self) is not then.get(name, self)] or [None]


class Value:
    """Keep a copy of a tensor or an array from before the clean pass.

    Attributes:
        written: whether the clean pass wrote into it.
        stands: the copy that stands in for it in the pass that is running.
    """

    __slots__ = ("copy", "key", "stands", "value", "version", "where", "written")

    def __init__(self, where: str, key: Any, value: Any, copied: bool) -> None:
        self.where, self.key, self.value, self.written = where, key, value, False
        self.version = version(value) if isinstance(value, Tensor) and not value.is_inference() else None
        self.copy = clone(value) if copied else None
        self.stands: Any = None

    def is_written(self) -> bool:
        """Tell whether it is not as before; while a copy stands in for it, whether that is not as it was made."""
        if self.stands is not None:
            return not alike(self.stands, self.copy)
        return self.differs() if self.version is None else version(self.value) != self.version

    def differs(self) -> bool:
        """Tell whether its values are not those of the copy."""
        return self.copy is not None and not alike(self.copy, self.value)

    def stand_in(self) -> Any:
        """Return what the next pass finds in its place."""
        self.stands = self.value if self.copy is None else clone(self.copy)
        return self.stands


class Generator:
    """Keep the state of a random generator before the clean pass."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.before = self.get()

    def get(self) -> Any:
        """Return its state."""
        if isinstance(self.generator, np.random.Generator):
            return self.generator.bit_generator.state
        return self.generator.getstate() if isinstance(self.generator, random.Random) else self.generator.get_state()

    def put(self, state: Any) -> None:
        """Set its state."""
        if isinstance(self.generator, np.random.Generator):
            self.generator.bit_generator.state = state
        elif isinstance(self.generator, random.Random):
            self.generator.setstate(state)
        else:
            self.generator.set_state(state)


def clone(value: Any) -> Any:
    """Copy a tensor or an array; a parameter's copy is off the graph."""
    if isinstance(value, nn.Parameter):
        return value.detach().clone()
    return value.clone() if isinstance(value, Tensor) else value.copy()


def alike(a: Any, b: Any) -> bool:
    """Tell whether two tensors or arrays hold the same values; a NaN equals a NaN in tensors."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and np.array_equal(a, b)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def same(now: Any, then: Any) -> bool:
    """Tell whether two copies of a container hold the same objects."""
    if len(now) != len(then):
        return False
    if isinstance(now, dict):
        return all(map(operator.is_, now.values(), then.values())) and list(now) == list(then)
    return all(map(operator.is_, now, then))


# How what is in each kind of owner is read, and put back


def _set_entries(owner: dict[str, Any], values: dict[str, Any]) -> None:
    """Make a `__dict__` hold these values, touching only those that differ."""
    for name in [name for name in owner if name not in values]:
        del owner[name]
    for name, value in values.items():
        if name not in owner or owner[name] is not value:
            owner[name] = value


def attributes(owner: Any, among: tuple[str, ...]) -> tuple[Get, Put]:
    """Return how these attributes of a class or an object, or names in a module's globals, are read and put back."""
    return functools.partial(_named, among), dict.update if isinstance(owner, dict) else _set_attributes


def _set_attributes(owner: Any, values: dict[str, Any]) -> None:
    put = setattr if isinstance(owner, type) else object.__setattr__
    for name, value in values.items():
        put(owner, name, value)


def _named(among: tuple[str, ...], owner: Any) -> dict[str, Any]:
    if isinstance(owner, dict):
        return {name: owner[name] for name in among if name in owner}
    return {name: getattr(owner, name) for name in among if hasattr(owner, name)}


def _cell(owner: Any) -> list[Any]:
    try:
        return [owner.cell_contents]
    except ValueError:  # it is empty
        return []


def _set_cell(owner: Any, values: list[Any]) -> None:
    for value in values:
        owner.cell_contents = value


def items(owner: Any) -> tuple[Get, Put]:
    """Return how the items of a list, deque, set or dictionary are read and put back."""
    return (_entries, _set_dict) if isinstance(owner, dict) else (list, _set_items)


def _set_items(owner: Any, values: Any) -> None:
    owner.clear()
    (owner.update if isinstance(owner, set) else owner.extend)(values)


def _entries(owner: dict[Any, Any]) -> dict[Any, Any]:
    return dict(dict.items(owner))


def _set_dict(owner: dict[Any, Any], values: dict[Any, Any]) -> None:
    base = collections.OrderedDict if isinstance(owner, collections.OrderedDict) else dict
    base.clear(owner)
    for name, value in values.items():
        base.__setitem__(owner, name, value)


def _without_zero(owner: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in owner.items() if not is_of_zero(name)}


def _set_without_zero(owner: dict[str, Any], values: dict[str, Any]) -> None:
    for name in _without_zero(owner).keys() - values.keys():
        del owner[name]
    owner.update(values)


ZERO_ENTRIES: tuple[Get, Put] = (_without_zero, _set_without_zero)  # of a module's `__dict__` under ZeRO 3
ENTRIES: tuple[Get, Put] = (dict.copy, _set_entries)  # of a `__dict__`
CELL: tuple[Get, Put] = (_cell, _set_cell)  # a variable of a closure
