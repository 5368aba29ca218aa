"""Find what a forward can reach and change: its arguments, attributes of modules, what hooks keep."""

from __future__ import annotations

import collections
import enum
import functools
import random
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smartreg_torch.compat import forward_hooks, own_buffers, own_parameters, partition
from smartreg_torch.values import CELL, ENTRIES, ZERO_ENTRIES, Generator, Slot, Value, attributes, items

Given = tuple[tuple[Any, ...], dict[str, Any]]

# What no forward can change in place.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type, slice, range, torch.dtype, torch.device})
# What a function or a class may keep by a name of its own: not its helpers, types and modules.
_COUNTED = (int, float, list, dict, set, collections.deque, Tensor, np.ndarray, np.random.Generator, torch.Generator)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, enum.Enum)
# Packages whose objects are no data of a forward.
_FOREIGN = frozenset(
    {"torch", "smartreg", "smartreg_torch", "bitsandbytes", "deepspeed", "logging", "threading", "weakref", "_thread"}
)
_LARGE = 2**20  # bytes: after the first step, what a module keeps beyond this is copied only if it was seen to change
_MANY = 2000  # values: an attribute that leads to more of them is left alone
_OWN = frozenset(vars(nn.Module()))  # what nn.Module keeps for itself


class Known:
    """Remember what the passes of a model have shown; there is one for all its steps."""

    def __init__(self) -> None:
        self.changing: set[Any] = set()  # large values that were written into
        self.left_alone: set[Any] = set()  # attributes that lead to too much
        self.names: dict[Any, tuple[str, ...]] = {}  # by code object and class, which names may change
        self.moving: set[int] = set()  # ids of containers that a pass was seen to change
        self.written: set[int] = set()  # ids of frozen weights that a forward was seen to write into
        self.by_value: set[str] = set()  # arguments that were written into past their version, through .data, say
        self.dropped: list[str] = []  # attributes that came to lead to too much
        self.first = True
        # steps in which frozen weights are compared by value: a momentum encoder starts as what it follows
        self.looks = 3


class Reach:
    """Find what a forward can reach.

    Args:
        modules: those of the model.
        given: the arguments, (args, kwargs).
        known: what earlier steps have shown.

    Attributes:
        slots, generators: the containers and objects, and the random generators.
        tensors: the tensors and arrays, by id.
        arguments: the ids of the tensors among the arguments.
        given: how many of the slots and of the generators are the arguments'; they come first.
    """

    def __init__(self, modules: list[nn.Module], given: Given, known: Known) -> None:
        self.slots: list[Slot] = []
        self.generators: list[Generator] = []
        self.tensors: dict[int, Value] = {}
        self._known, self._room = known, _MANY
        weights = [weight for module in modules for weight in own_parameters(module).values() if weight is not None]
        self._entries = ZERO_ENTRIES if any(partition(weight) is not None for weight in weights) else ENTRIES
        self._seen = dict.fromkeys(map(id, modules))
        args, kwargs = given
        for name, value in (*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()):
            self._root(value, name, None)
        self.arguments = set(self.tensors)
        self.given = len(self.slots), len(self.generators)
        for module in modules:
            kind: Any = type(module)
            if _is_foreign(kind):
                continue
            self._keep_module(module)
            for hook in forward_hooks(module):
                self._keep_function(hook, "a hook")
            if id(kind) not in self._seen:
                self._seen[id(kind)] = None
                self._keep_function(kind.forward, kind.__name__)
                self._keep_names(kind, kind, vars(kind))

    def _keep_module(self, module: nn.Module) -> None:
        label = type(module).__name__
        self.slots.append(Slot(label, id(module), vars(module), *self._entries, named=True))
        for name, value in self.slots[-1].before.items():
            if type(value) not in _PLAIN and name not in _OWN:
                self._root(value, f"{label}.{name}", (id(module), name))

    def _keep_function(self, function: Any, where: str) -> None:
        """Keep what a hook or a forward has outside of its module: a closure, global names, an object of its own."""
        if isinstance(function, functools.partial):
            self._root((function.args, function.keywords), where, None)
            function = function.func
        if isinstance(function, types.MethodType):
            self._root(function.__self__, where, None)
            function = function.__func__
        if not isinstance(function, types.FunctionType):
            self._root(function, where, None)
            return
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return
        self._root(function.__defaults__, where, None)
        self._root(function.__kwdefaults__, where, None)
        for variable in function.__closure__ or ():
            self.slots.append(Slot(where, None, variable, *CELL))
            for value in self.slots[-1].before:
                self._root(value, where, None)
        self._keep_names(function.__code__, function.__globals__, function.__globals__, function.__code__.co_names)

    def _keep_names(
        self, key: Any, owner: Any, namespace: Mapping[str, Any], among: Iterable[str] | None = None
    ) -> None:
        where = owner.__name__ if isinstance(owner, type) else "a global name"
        if isinstance(owner, type) and _is_torchs(owner):
            return
        if key not in self._known.names:
            found = namespace if among is None else {name: namespace[name] for name in among if name in namespace}
            self._known.names[key] = tuple(
                name for name, value in found.items() if isinstance(value, _COUNTED) and not name.startswith("__")
            )
        counted = self._known.names[key]
        if not counted:
            return
        self.slots.append(Slot(where, key, owner, *attributes(owner, counted), named=True))
        for name in counted:
            if name in namespace:
                self._root(namespace[name], f"{where} {name}", (key, name))

    def _root(self, value: Any, where: str, key: Any) -> None:
        """Walk over all that a value leads to, unless that is too much."""
        if type(value) in _PLAIN or id(value) in self._seen or key in self._known.left_alone:
            return
        self._room = _MANY if key is not None else 100 * _MANY
        slots, generators, tensors, seen = len(self.slots), len(self.generators), len(self.tensors), len(self._seen)
        try:
            self._walk(value, where, key)
        except _TooManyError:
            self._known.left_alone.add(key)
            self._known.dropped += [] if self._known.first else [where]
            del self.slots[slots:], self.generators[generators:]
            self.tensors = dict(list(self.tensors.items())[:tensors])
            self._seen = dict.fromkeys(list(self._seen)[:seen])

    def _walk(self, value: Any, where: str, key: Any) -> None:
        if type(value) in _PLAIN or id(value) in self._seen:
            return
        self._seen[id(value)] = None
        self._room -= 1
        if self._room < 0:
            raise _TooManyError
        if isinstance(value, (Tensor, np.ndarray)):
            if not isinstance(value, nn.Parameter):
                self._keep_tensor(value, where, key)
        elif isinstance(value, _GENERATORS):
            self.generators.append(Generator(value))
        elif isinstance(value, tuple):
            for item in value:
                self._walk(item, where, key)
        elif isinstance(value, (list, collections.deque, set, dict)):
            self.slots.append(Slot(where, key, value, *items(value)))
            for item in list(dict.values(value) if isinstance(value, dict) else value):
                self._walk(item, where, key)
            if hasattr(value, "__dict__"):
                self._walk_attributes(value, where, key)
        elif isinstance(value, nn.Module):
            self._walk_module(value, where, key)
        elif type(value).__module__.partition(".")[0] not in _FOREIGN and not isinstance(value, _CODE):
            self._walk_attributes(value, where, key)

    def _walk_module(self, hidden: nn.Module, where: str, key: Any) -> None:
        """Walk over a module that model.modules() does not have, of a list, say."""
        for module in hidden.modules():
            if module is not hidden and id(module) in self._seen:
                continue
            self._seen[id(module)] = None
            kind: Any = type(module)
            here = f"{where} ({kind.__name__})"
            self._walk(own_buffers(module), here, key)
            parameters = own_parameters(module)
            self.slots.append(Slot(where, key, parameters, *items(parameters)))
            for weight in parameters.values():
                if weight is not None and id(weight) not in self.tensors:
                    self._keep_tensor(weight, where, key)
            if not _is_torchs(kind):
                self._walk_attributes(module, here, key)

    def _walk_attributes(self, value: Any, where: str, key: Any) -> None:
        entries = getattr(value, "__dict__", None)
        if isinstance(entries, dict):
            self.slots.append(Slot(where, key, entries, *ENTRIES))
            for name, item in list(entries.items()):
                if name not in _OWN or not isinstance(value, nn.Module):
                    self._walk(item, f"{where}.{name}", key)
        kind: Any = type(value)
        in_slots = _slot_names(kind)
        if in_slots:
            self.slots.append(Slot(where, key, value, *attributes(value, in_slots)))
            for name in in_slots:
                self._walk(getattr(value, name, None), f"{where}.{name}", key)

    def _keep_tensor(self, value: Any, where: str, key: Any) -> None:
        copied = self._known.first or key is None or value.nbytes <= _LARGE or key in self._known.changing
        self.tensors[id(value)] = Value(where, key, value, copied)


class _TooManyError(Exception):
    pass


@functools.cache
def _is_foreign(kind: Any) -> bool:
    """Tell whether a module is of a package that moves its weights about itself."""
    return any(base.__module__.partition(".")[0] == "bitsandbytes" for base in kind.__mro__)


@functools.cache
def _is_torchs(kind: Any) -> bool:
    """Tell whether a class and its bases are torch's own, or bitsandbytes', which moves weights about."""
    packages = ("torch", "bitsandbytes", "builtins")
    return all(base.__module__.partition(".")[0] in packages for base in kind.__mro__)


@functools.cache
def _slot_names(kind: Any) -> tuple[str, ...]:
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    every = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in every if name not in ("__dict__", "__weakref__"))
