"""What a forward can reach and change: its arguments, attributes of modules, what hooks keep; taken and put back."""

from __future__ import annotations

import collections
import enum
import functools
import operator
import random
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smartreg_torch.compat import forward_hooks, own_buffers, own_parameters, version

Given = tuple[tuple[Any, ...], dict[str, Any]]

# What no forward can change in place.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, type, slice, range, torch.dtype, torch.device})
# What a function or a class may keep by a name of its own: not its helpers, types and modules.
_COUNTED = (int, float, list, dict, set, collections.deque, Tensor, np.ndarray, np.random.Generator, torch.Generator)
# Packages whose objects are no data of a forward.
_FOREIGN = frozenset(
    {"torch", "smartreg", "smartreg_torch", "bitsandbytes", "logging", "threading", "weakref", "_thread"}
)
_LARGE = 2**20  # bytes: after the first step, what a module keeps beyond this is copied only if it was seen to change
_MANY = 2000  # values: an attribute that leads to more of them is left alone
_OWN = frozenset(vars(nn.Module()))  # what nn.Module keeps for itself


class Known:
    """What the passes of a model have shown so far; one for all its steps."""

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


class Kept:
    """The values that a forward can reach and change: its arguments, attributes of modules, what hooks keep.

    Containers and objects are restored in place, so that whoever holds one sees no difference. A tensor that was
    written into is not written again, since the clean graph may need it. The other passes find a copy in its place.

    Args:
        modules: those of the model.
        given: the arguments, (args, kwargs).
    """

    def __init__(self, modules: list[nn.Module], given: Given, known: Known) -> None:
        self.given, self._known = given, known
        self._slots: list[_Slot] = []
        self._tensors: dict[int, _Value] = {}
        self._generators: list[tuple[str, _Generator]] = []
        self._seen = {id(module) for module in modules}
        self._room = _MANY
        self._active: list[_Slot] | None = None  # None before the clean pass: all of them
        self._accepted: list[tuple[_Slot, Any]] = []
        self._spared: list[tuple[_Value, Any]] = []
        args, kwargs = given
        for name, value in (*((f"argument {i + 1}", value) for i, value in enumerate(args)), *kwargs.items()):
            self._root(value, name, None)
        self._arguments = set(self._tensors)
        self._given = len(self._slots), len(self._generators)
        for module in modules:
            hooks = forward_hooks(module)
            if _is_foreign(_kind(module)):
                continue
            self._keep_module(module)
            for hook in hooks:
                self._keep_function(hook, "a hook")
            kind = _kind(module)
            if id(kind) not in self._seen:
                self._seen.add(id(kind))
                self._keep_function(kind.forward, kind.__name__)
                self._keep_names(kind, kind, vars(kind))

    # Before the clean pass: what there is

    def _keep_module(self, module: nn.Module) -> None:
        attributes = vars(module)
        self._slots.append(_Slot(_label(module), id(module), attributes, dict.copy, _set_entries, named=True))
        for name, value in attributes.items():
            if type(value) not in _PLAIN and name not in _OWN:
                self._root(value, f"{_label(module)}.{name}", (id(module), name))

    def _keep_function(self, function: Any, where: str) -> None:
        """What a hook or a forward keeps outside of its module: by closure, by a global name, in its own object."""
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
        for cell in function.__closure__ or ():
            self._slots.append(_Slot(where, None, cell, _cell, _set_cell))
            for value in _cell(cell):
                self._root(value, where, None)
        self._keep_names(function.__code__, function.__globals__, function.__globals__, function.__code__.co_names)

    def _keep_names(
        self, key: Any, owner: Any, namespace: Mapping[str, Any], among: Iterable[str] | None = None
    ) -> None:
        if isinstance(owner, type) and _is_torchs(owner):
            return
        if key not in self._known.names:
            found = namespace if among is None else {name: namespace[name] for name in among if name in namespace}
            self._known.names[key] = tuple(
                name for name, value in found.items() if isinstance(value, _COUNTED) and not name.startswith("__")
            )
        names = self._known.names[key]
        if not names:
            return
        get = functools.partial(_named, names)
        where = owner.__name__ if isinstance(owner, type) else "a global name"
        put = _set_attributes if isinstance(owner, type) else dict.update
        self._slots.append(_Slot(where, key, owner, get, put, named=True))
        for name in names:
            if name in namespace:
                self._root(namespace[name], f"{where} {name}", (key, name))

    def _root(self, value: Any, where: str, key: Any) -> None:
        """Walk over all that a value leads to, unless that is too much."""
        if type(value) in _PLAIN or id(value) in self._seen or key in self._known.left_alone:
            return
        self._room = _MANY if key is not None else 100 * _MANY
        lengths, seen = (len(self._slots), len(self._generators)), set(self._seen) if key is not None else self._seen
        tensors = len(self._tensors)
        try:
            self._walk(value, where, key)
        except _TooManyError:
            self._known.left_alone.add(key)
            self._known.dropped += [] if self._known.first else [where]
            del self._slots[lengths[0] :], self._generators[lengths[1] :]
            self._tensors = dict(list(self._tensors.items())[:tensors])
            self._seen = seen

    def _walk(self, value: Any, where: str, key: Any) -> None:
        if type(value) in _PLAIN or id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._room -= 1
        if self._room < 0:
            raise _TooManyError
        if isinstance(value, (Tensor, np.ndarray)):
            if not isinstance(value, nn.Parameter):
                self._keep_tensor(value, where, key)
        elif isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            self._generators.append((where, _Generator(value)))
        elif isinstance(value, tuple):
            for item in value:
                self._walk(item, where, key)
        elif isinstance(value, (list, collections.deque, set, dict)):
            get, put = _CONTAINERS[next(kind for kind in _CONTAINERS if isinstance(value, kind))]
            self._slots.append(_Slot(where, key, value, get, put))
            for item in list(dict.values(value) if isinstance(value, dict) else value):
                self._walk(item, where, key)
            if hasattr(value, "__dict__"):
                self._walk_attributes(value, where, key)
        elif isinstance(value, nn.Module):  # one that is hidden from model.modules(), in a list, say
            for module in value.modules():
                if module is value or id(module) not in self._seen:
                    self._seen.add(id(module))
                    self._walk(own_buffers(module), f"{where} ({_label(module)})", key)
                    parameters = own_parameters(module)
                    self._slots.append(_Slot(where, key, parameters, _entries, _set_dict))
                    for weight in parameters.values():
                        if weight is not None and id(weight) not in self._tensors:
                            self._keep_tensor(weight, where, key)
                    if not _is_torchs(_kind(module)):
                        self._walk_attributes(module, f"{where} ({_label(module)})", key)
        elif type(value).__module__.partition(".")[0] not in _FOREIGN and not isinstance(
            value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, enum.Enum)
        ):
            self._walk_attributes(value, where, key)

    def _keep_tensor(self, value: Any, where: str, key: Any) -> None:
        copied = self._known.first or key is None or value.nbytes <= _LARGE or key in self._known.changing
        self._tensors[id(value)] = _Value(where, key, value, copied)

    def _walk_attributes(self, value: Any, where: str, key: Any) -> None:
        slots = _slot_names(_kind(value))
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._slots.append(_Slot(where, key, attributes, dict.copy, _set_entries))
            for name, item in list(attributes.items()):
                if name not in _OWN or not isinstance(value, nn.Module):
                    self._walk(item, f"{where}.{name}", key)
        if slots:
            self._slots.append(_Slot(where, key, value, functools.partial(_named, slots), _set_attributes))
            for name in slots:
                self._walk(getattr(value, name, None), f"{where}.{name}", key)

    # After the clean pass: what it changed

    @property
    def given_tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [self._tensors[key].value for key in self._arguments if isinstance(self._tensors[key].value, Tensor)]

    def settle(self, everything: bool = False) -> list[str]:
        """Note what the clean pass wrote into, and free the copies of the rest.

        Args:
            everything: take it that all was written into, if no clean pass has run.

        Returns:
            the names of those of which there is no copy, so that the other passes cannot have the old value.
        """
        lost: list[str] = []
        first = self._known.first
        if not (everything or self._known.first):
            # a sweep over all containers once a step; the passes that follow touch those that this one has changed
            moving = self._known.moving
            self._active = [slot for slot in self._slots if id(slot.owner) in moving or slot.changed()]
        self._known.first = False
        for value in self._tensors.values():
            past = value.key is None and not everything and value.is_written(first)
            if past and not value.is_written():
                self._known.by_value.add(value.where)
            if value.settle(everything or past or value.where in self._known.by_value):
                self._known.changing.add(value.key)
                lost += [value.where] if value.copy is None else []
        dropped, self._known.dropped = self._known.dropped, []
        return lost + dropped

    @property
    def changed(self) -> list[str]:
        """What is not as it was before the clean pass, by name."""
        names = [value.where for value in self._tensors.values() if value.written]
        for slot in self._slots:
            names += [f"{slot.where}.{name}" if isinstance(name, str) else slot.where for name in slot.changed()]
        return list(dict.fromkeys(names))

    def moved(self) -> set[Any]:
        """The attributes that are not as before, or lead to what is not, by (module, name).

        Inside `as_before`, those that are not as they were put back.
        """
        found = {value.key for value in self._tensors.values() if value.is_written()}
        for slot in self._slots:
            names = slot.changed()
            found |= {(slot.key, name) for name in names} if slot.named else {slot.key} if names else set()
        return found - {None}

    def reject(self) -> None:
        """Take back what was accepted."""
        for slot, before in self._accepted:
            slot.before = before
        for value, copy in self._spared:
            value.written, value.copy = True, copy
        self._accepted, self._spared = [], []

    def accept(self, moved: set[Any]) -> None:
        """Take what the clean pass made as what was there before, but for these attributes."""
        for slot in self._slots:
            if slot.changed():
                self._accepted.append((slot, slot.before.copy() if slot.named else slot.before))
            if slot.named:
                now = slot.get()
                for name in slot.changed():
                    if (slot.key, name) not in moved:
                        slot.before.pop(name, None)
                        slot.before |= {name: now[name]} if name in now else {}
            elif slot.key is not None and slot.key not in moved:
                slot.before = slot.get()
        for value in self._tensors.values():
            if value.key is not None and value.key not in moved and value.written:
                self._spared.append((value, value.copy))
                value.written, value.copy = False, None

    def put_back(self) -> None:
        """Make everything as before, for good; no graph may need what was written into."""
        for slot in self._slots:
            if not _same(slot.get(), slot.before):
                slot.put(slot.owner, slot.before)
        for value in self._tensors.values():
            if value.written and value.copy is not None:
                with torch.no_grad():
                    value.value[...] = value.copy
        for _, generator in self._generators:
            generator.put(generator.before)

    @contextmanager
    def as_before(self, convert: Callable[[Any], Any] | None = None, given_only: bool = False) -> Iterator[Given]:
        """Yield the arguments; they and what modules keep are as before the clean pass while the block lasts.

        Args:
            convert: is applied to the arguments' tensors.
            given_only: what modules keep stays as it is.
        """
        swapped = convert is not None or any(value.written for value in self._tensors.values())
        slots, generators = self._slots, self._generators
        if given_only:
            slots, generators = slots[: self._given[0]], generators[: self._given[1]]
        elif self._active is not None and not swapped:
            slots = self._active
        now = [slot.get() for slot in slots]
        states = [generator.get() for _, generator in generators]
        memo: dict[int, Any] = {}

        def old(value: Any) -> Any:
            if isinstance(value, tuple) and swapped:
                items = [old(item) for item in value]
                if all(a is b for a, b in zip(items, value, strict=True)):
                    return value
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            found = self._tensors.get(id(value)) if swapped else None
            if found is None:
                return value
            if id(value) not in memo:
                memo[id(value)] = found.stand_in() if found.written else value
                if convert is not None and id(value) in self._arguments:
                    memo[id(value)] = convert(memo[id(value)])
            return memo[id(value)]

        try:
            for slot, own in zip(slots, now, strict=True):
                before = slot.before
                if swapped:
                    before = (
                        {name: old(item) for name, item in before.items()}
                        if isinstance(before, dict)
                        else [old(item) for item in before]
                    )
                slot.stands = before
                if not _same(own, before):
                    slot.put(slot.owner, before)
            for _, generator in generators:
                generator.put(generator.before)
            args, kwargs = self.given
            yield tuple(map(old, args)), {name: old(value) for name, value in kwargs.items()}
        finally:
            for slot, own in zip(slots, now, strict=True):
                slot.stands = None
                if not _same(slot.get(), own):
                    slot.put(slot.owner, own)
                    self._known.moving.add(id(slot.owner))
            for (_, generator), state in zip(generators, states, strict=True):
                generator.put(state)
            for key in memo:
                self._tensors[key].stands = None


class _TooManyError(Exception):
    pass


class _Slot:
    """A container or an object, and what was in it before the clean pass.

    Attributes:
        key: the attribute that leads to it, (module, name); if it is `named`, the module, whose names lead on.
        stands: what was put in for a pass that is under way.
    """

    __slots__ = ("before", "get_from", "key", "named", "owner", "put", "stands", "where")

    def __init__(
        self,
        where: str,
        key: Any,
        owner: Any,
        get: Callable[[Any], Any],
        put: Callable[[Any, Any], None],
        named: bool = False,
    ) -> None:
        self.where, self.key, self.owner, self.get_from, self.put, self.named = where, key, owner, get, put, named
        self.before = get(owner)
        self.stands: Any = None

    def get(self) -> Any:
        return self.get_from(self.owner)

    def changed(self) -> list[Any]:
        """The names, or [None] of a container without names, that are not as before or as put in."""
        then, now = self.before if self.stands is None else self.stands, self.get()
        if _same(now, then):
            return []
        if not isinstance(now, dict):
            return [None]
        return [name for name in {**then, **now} if now.get(name, self) is not then.get(name, self)] or [None]


class _Value:
    """A tensor or array, and a copy of it from before the clean pass."""

    __slots__ = ("copy", "key", "stands", "value", "version", "where", "written")

    def __init__(self, where: str, key: Any, value: Any, copied: bool) -> None:
        self.where, self.key, self.value, self.written = where, key, value, False
        self.version = version(value) if isinstance(value, Tensor) and not value.is_inference() else None
        self.copy = clone(value) if copied else None
        self.stands: Any = None

    def settle(self, everything: bool) -> bool:
        self.written = everything or self.is_written()
        if not self.written:
            self.copy = None
        return self.written

    def is_written(self, by_value: bool = False) -> bool:
        """Whether it is not as before; while a copy stands in for it, whether that is not as it was made."""
        if by_value and self.copy is not None:
            return not alike(self.copy, self.value)
        if self.stands is not None:
            return not alike(self.stands, self.copy)
        if self.version is not None:
            return version(self.value) != self.version
        return self.copy is not None and not alike(self.copy, self.value)

    def stand_in(self) -> Any:
        self.stands = self.value if self.copy is None else clone(self.copy)
        return self.stands


class _Generator:
    """A random generator, and its state before the clean pass."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.before = self.get()

    def get(self) -> Any:
        if isinstance(self._generator, np.random.Generator):
            return self._generator.bit_generator.state
        return self._generator.getstate() if isinstance(self._generator, random.Random) else self._generator.get_state()

    def put(self, state: Any) -> None:
        if isinstance(self._generator, np.random.Generator):
            self._generator.bit_generator.state = state
        elif isinstance(self._generator, random.Random):
            self._generator.setstate(state)
        else:
            self._generator.set_state(state)


def clone(value: Any) -> Any:
    """A copy of a tensor or an array, of a parameter off the graph."""
    if isinstance(value, nn.Parameter):
        return value.detach().clone()
    return value.clone() if isinstance(value, Tensor) else value.copy()


def alike(a: Any, b: Any) -> bool:
    """Whether two tensors or arrays hold the same values; a NaN is like a NaN."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # a NaN is like a NaN
    return type(a) is type(b) and np.array_equal(a, b)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _same(now: Any, then: Any) -> bool:
    """Whether two copies of a container hold the same objects."""
    if len(now) != len(then):
        return False
    if isinstance(now, dict):
        return all(map(operator.is_, now.values(), then.values())) and list(now) == list(then)
    return all(map(operator.is_, now, then))


def _set_entries(owner: dict[str, Any], values: dict[str, Any]) -> None:
    """Make a `__dict__` hold these values, touching only those that differ."""
    for name in [name for name in owner if name not in values]:
        del owner[name]
    for name, value in values.items():
        if name not in owner or owner[name] is not value:
            owner[name] = value


def _set_attributes(owner: Any, values: dict[str, Any]) -> None:
    put = setattr if isinstance(owner, type) else object.__setattr__
    for name, value in values.items():
        put(owner, name, value)


def _named(names: tuple[str, ...], owner: Any) -> dict[str, Any]:
    if isinstance(owner, dict):
        return {name: owner[name] for name in names if name in owner}
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _cell(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def _set_cell(cell: Any, values: list[Any]) -> None:
    for value in values:
        cell.cell_contents = value


def _set_list(owner: list[Any], values: list[Any]) -> None:
    owner[:] = values


def _set_all(owner: Any, values: Any) -> None:
    owner.clear()
    (owner.extend if isinstance(owner, collections.deque) else owner.update)(values)


def _entries(owner: dict[Any, Any]) -> dict[Any, Any]:
    return dict(dict.items(owner))


def _set_dict(owner: dict[Any, Any], values: dict[Any, Any]) -> None:
    base = collections.OrderedDict if isinstance(owner, collections.OrderedDict) else dict
    base.clear(owner)
    for name, value in values.items():
        base.__setitem__(owner, name, value)


_CONTAINERS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    list: (list, _set_list),
    dict: (_entries, _set_dict),
    collections.deque: (list, _set_all),
    set: (list, _set_all),
}


def _kind(value: Any) -> Any:
    return type(value)


@functools.cache
def _is_foreign(kind: Any) -> bool:
    """Whether a module is of a package that moves its weights about itself."""
    return any(base.__module__.partition(".")[0] == "bitsandbytes" for base in kind.__mro__)


@functools.cache
def _is_torchs(kind: Hashable) -> bool:
    """Whether a class and all that it is made of are torch's own, or bitsandbytes', which moves weights about."""
    packages = ("torch", "bitsandbytes", "builtins")
    return all(base.__module__.partition(".")[0] in packages for base in getattr(kind, "__mro__", ()))


@functools.cache
def _slot_names(kind: Any) -> tuple[str, ...]:
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _label(module: nn.Module) -> str:
    return type(module).__name__
