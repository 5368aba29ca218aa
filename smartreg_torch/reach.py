"""Find what a forward can reach and change: its arguments, attributes of modules, what hooks keep."""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import operator
import random
import sys
import types
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smartreg_torch.compat import forward_hooks, own_buffers, own_parameters, partition
from smartreg_torch.values import CELL, ENTRIES, ZERO_ENTRIES, Generator, Get, Put, Slot, Value, attributes, items

Given = tuple[tuple[Any, ...], dict[str, Any]]

# What no forward can change in place, and code.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, slice, range, torch.dtype, torch.device, *_FUNCTIONS}
)
_BUILT_IN = frozenset({tuple, dict, list, set})  # their own classes, which have no attributes
# What a function or a class may keep by a name of its own: not its helpers, types and modules.
_COUNTED = (int, float, list, dict, set, collections.deque, Tensor, np.ndarray, np.random.Generator, torch.Generator)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CODE = (*_FUNCTIONS, types.ModuleType, enum.Enum)
# Packages whose objects are no data of a forward.
_FOREIGN = frozenset(
    {"torch", "smartreg", "smartreg_torch", "bitsandbytes", "deepspeed", "logging", "threading", "weakref", "_thread"}
)
_LARGE = 2**20  # bytes: after the first step, what a module keeps beyond this is copied only if it was seen to change
_MANY = 2000  # values: an attribute that leads to more of them is left alone
_SET_ON_FUNCTIONS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
_OWN = frozenset(vars(nn.Module()))  # what nn.Module keeps for itself


class Known:
    """Remember what the passes of a model have shown; there is one for all its steps."""

    def __init__(self) -> None:
        self.changing: set[Any] = set()  # large values that were written into
        self.left_alone: set[Any] = set()  # attributes that lead to too much
        # by the id of a code object or class: this, and which of its names may change
        self.names: dict[int, tuple[Any, tuple[str, ...]]] = {}
        self.moving: set[int] = set()  # ids of containers that a pass was seen to change
        self.written: set[int] = set()  # ids of frozen weights that a forward was seen to write into
        self.by_value: set[str] = set()  # arguments that were written into past their version, through .data, say
        self.dropped: list[str] = []  # attributes that came to lead to too much
        # what the last step found in the modules, if its clean pass changed nothing in them
        self.inside: InModules | None = None
        self.first = True
        # steps in which frozen weights are compared by value: a momentum encoder starts as what it follows
        self.looks = 3


class Attributes:
    """Hold the attributes of all modules as they were before the clean pass, in a row.

    A sweep over the row is far cheaper than one over each module. A module has a `Slot` only if that is asked for.
    """

    def __init__(self, owners: list[nn.Module], entries: tuple[Get, Put]) -> None:
        self._owners, self._entries = owners, entries
        self._dicts = list(map(vars, owners))
        self._starts = list(itertools.accumulate(map(len, self._dicts), initial=0))
        self._names, self._values = self._now()
        self._slots: dict[int, Slot] = {}

    def _now(self) -> tuple[list[str], list[Any]]:
        chained = itertools.chain.from_iterable
        return list(chained(self._dicts)), list(chained(map(dict.values, self._dicts)))

    def changed(self, moving: Set[int] = frozenset()) -> list[Slot]:
        """Return the slots of the modules whose attributes are not as before, and of those that are `moving`."""
        names, values = self._now()
        same = names == self._names and all(map(operator.is_, values, self._values))
        if same and (not moving or moving.isdisjoint(map(id, self._dicts))):
            return []
        return [slot for slot in map(self.slot, range(len(self._dicts))) if id(slot.owner) in moving or slot.changed()]

    def belong(self) -> bool:
        """Tell whether these are still the dictionaries of the modules."""
        return all(map(operator.is_, map(vars, self._owners), self._dicts))

    def slot(self, i: int) -> Slot:
        """Return the slot of the i-th module."""
        if i not in self._slots:
            module, place = self._owners[i], slice(*self._starts[i : i + 2])
            before = self._entries[0](dict(zip(self._names[place], self._values[place], strict=True)))
            self._slots[i] = Slot(type(module).__name__, id(module), self._dicts[i], *self._entries, True, before)
        return self._slots[i]


class Reach:
    """Find what values lead to.

    Attributes:
        slots, generators: the containers and objects, and the random generators.
        tensors: the tensors and arrays, by id.
    """

    def __init__(self, modules: list[nn.Module], known: Known) -> None:
        self.slots: list[Slot] = []
        self.generators: list[Generator] = []
        self.tensors: dict[int, Value] = {}
        self._known, self._room = known, _MANY
        self._seen = dict.fromkeys(map(id, modules))
        self._functions: list[tuple[Any, ...]] = []  # those that were looked into, and their code and defaults
        self._objects: list[tuple[Any, Any]] = []  # and objects, with their dictionaries
        self._hidden = False  # whether there are modules that model.modules() does not have

    @classmethod
    def of(cls, given: Given, modules: list[nn.Module], known: Known) -> Reach:
        """Find what the arguments of the model lead to."""
        found = cls(modules, known)
        args, kwargs = given
        for name, value in (*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()):
            found._root(value, name, None)
        return found

    def _keep_function(self, function: Any, where: str) -> None:
        """Keep what a hook or a forward has outside of its module: a closure, global names, an object of its own."""
        if type(function) is not types.FunctionType:
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
        self._functions.append((function, *_SET_ON_FUNCTIONS(function)))
        for defaults in (function.__defaults__, function.__kwdefaults__):
            if defaults:
                self._root(defaults, where, None)
        for variable in function.__closure__ or ():
            self.slots.append(Slot(where, None, variable, *CELL))
            for value in self.slots[-1].before:
                if type(value) not in _PLAIN:
                    self._root(value, where, None)
        self._keep_names(function.__code__, function.__globals__, function.__globals__, function.__code__.co_names)

    def _keep_names(
        self, key: Any, owner: Any, namespace: Mapping[str, Any], among: Iterable[str] | None = None
    ) -> None:
        known = self._known.names.get(id(key))  # the hash of a code object is that of all that is in it
        if known is None:
            found = namespace if among is None else {name: namespace[name] for name in among if name in namespace}
            ours = not (isinstance(owner, type) and _is_torchs(owner))
            changing = [n for n, value in found.items() if isinstance(value, _COUNTED) and not n.startswith("__")]
            known = self._known.names[id(key)] = key, tuple(changing) if ours else ()
        _, counted = known
        if not counted:
            return
        where = owner.__name__ if isinstance(owner, type) else "a global name"
        self.slots.append(Slot(where, key, owner, *attributes(owner, counted), named=True))
        for name in counted:
            if name in namespace:
                self._root(namespace[name], f"{where} {name}", (key, name))

    def _root(self, value: Any, where: str, key: Any) -> None:
        """Walk over all that a value leads to, unless that is too much."""
        kind = type(value)
        if kind in _PLAIN or id(value) in self._seen or key in self._known.left_alone:
            return
        if kind in _BUILT_IN and _PLAIN.issuperset(map(type, value.values() if kind is dict else value)):
            self._seen[id(value)] = None  # most values are so
            if kind is not tuple:
                self.slots.append(Slot(where, key, value, *items(value)))
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
                if type(item) not in _PLAIN:
                    self._walk(item, where, key)
        elif isinstance(value, (list, collections.deque, set, dict)):
            self.slots.append(Slot(where, key, value, *items(value)))
            for item in list(dict.values(value) if isinstance(value, dict) else value):
                if type(item) not in _PLAIN:
                    self._walk(item, where, key)
            if hasattr(value, "__dict__"):
                self._walk_attributes(value, where, key)
        elif isinstance(value, nn.Module):
            self._walk_module(value, where, key)
        elif type(value).__module__.partition(".")[0] not in _FOREIGN and not isinstance(value, _CODE):
            self._walk_attributes(value, where, key)

    def _walk_module(self, hidden: nn.Module, where: str, key: Any) -> None:
        """Walk over a module that model.modules() does not have, of a list, say."""
        self._hidden = True
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
            self._objects.append((value, entries))
            module = isinstance(value, nn.Module)
            for name, item in list(entries.items()):
                if type(item) not in _PLAIN and not (module and name in _OWN):
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


class InModules(Reach):
    """Find what a model's modules lead to: their attributes, hooks and classes.

    Args:
        modules: those of the model.
        known: what earlier steps have shown.

    Attributes:
        attributes: those of the modules. `slots` has all other containers and objects.
    """

    def __init__(self, modules: list[nn.Module], known: Known) -> None:
        super().__init__(modules, known)
        kinds: list[Any] = list(map(type, modules))
        self._modules, self._kinds = modules, kinds
        self._owners = [module for module, kind in zip(modules, kinds, strict=True) if not _is_foreign(kind)]
        self._hooks = list(map(forward_hooks, self._owners))
        self.attributes = Attributes(self._owners, ZERO_ENTRIES if _is_partitioned(modules) else ENTRIES)
        self._forwards: dict[Any, Any] = {}  # of each class
        self._starts: list[int] = []  # how many slots there are before a module's
        for module, hooks in zip(self._owners, self._hooks, strict=True):
            self._starts.append(len(self.slots))
            self._visit(module, hooks)

    def _visit(self, module: nn.Module, hooks: tuple[Any, ...]) -> None:
        kind: Any = type(module)
        for name, value in list(vars(module).items()):
            if type(value) not in _PLAIN and name not in _OWN and id(value) not in self._seen:
                self._root(value, f"{kind.__name__}.{name}", (id(module), name))
        for hook in hooks:
            self._keep_function(hook, "a hook")
        if kind not in self._forwards:
            self._forwards[kind] = kind.forward
            self._keep_function(kind.forward, kind.__name__)
            self._keep_names(kind, kind, vars(kind))

    @classmethod
    def kept_or_new(cls, modules: list[nn.Module], known: Known) -> InModules:
        """Return what the last step found, with the tensors and generators as they are now, if a walk would find it."""
        inside, known.inside = known.inside, None
        if inside is None or not inside._holds(modules):
            return cls(modules, known)
        for value in list(inside.tensors.values()):
            inside._keep_tensor(value.value, value.where, value.key)
        inside.generators = [Generator(each.generator) for each in inside.generators]
        return inside

    @property
    def is_worth_keeping(self) -> bool:
        """Tell whether the next step may use it: not what would keep large tensors after the user has dropped them."""
        return not self._hidden and all(value.value.nbytes <= _LARGE for value in self.tensors.values())

    def _holds(self, modules: list[nn.Module]) -> bool:
        """Tell whether every container, object, hook and class is as it was: then so is all that they lead to."""
        hooks, alike = list(map(forward_hooks, self._owners)), operator.is_
        flat = itertools.chain.from_iterable
        return (
            self._modules is modules
            and self._kinds == list(map(type, modules))
            and self.attributes.belong()
            and list(map(len, hooks)) == list(map(len, self._hooks))
            and all(map(alike, flat(hooks), flat(self._hooks)))
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and all(all(map(alike, _SET_ON_FUNCTIONS(each), then)) for each, *then in self._functions)
            and all(each.__dict__ is entries for each, entries in self._objects)
            and not self.attributes.changed()
            and not any(slot.is_changed() for slot in self.slots)
        )

    def every_slot(self) -> list[Slot]:
        """Return all slots: each module's own before those that it leads to."""
        found: list[Slot] = []
        for i, (start, end) in enumerate(itertools.pairwise([*self._starts, len(self.slots)])):
            found += [self.attributes.slot(i), *self.slots[start:end]]
        return found


class _TooManyError(Exception):
    pass


def _is_partitioned(modules: list[nn.Module]) -> bool:
    """Tell whether ZeRO 3 has partitioned the weights of these modules."""
    if "deepspeed" not in sys.modules:
        return False
    weights = (weight for module in modules for weight in own_parameters(module).values() if weight is not None)
    return any(partition(weight) is not None for weight in weights)


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
