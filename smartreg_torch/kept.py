"""Keep what a forward has changed, and let every other pass find it as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smartreg_torch.reach import Given, InModules, Known, Reach
from smartreg_torch.values import Slot, Value


class Kept:
    """Keep the values that a forward can reach, and put them back for each pass.

    Containers and objects are restored in place, so that whoever holds one sees no difference. A tensor that was
    written into is not written again, since the clean graph may need it. The other passes find a copy in its place.

    Args:
        modules: those of the model.
        given: the arguments, (args, kwargs).
        known: what earlier steps have shown.
    """

    def __init__(self, modules: list[nn.Module], given: Given, known: Known) -> None:
        self.given, self._known = given, known
        self._arguments, self._inside = Reach.of(given, modules, known), InModules.kept_or_new(modules, known)
        self._tensors = self._inside.tensors | self._arguments.tensors
        for both in self._inside.tensors.keys() & self._arguments.tensors.keys():
            self._inside.tensors[both].copy = None  # one copy is enough
        self._generators = self._arguments.generators + self._inside.generators
        self._every: list[Slot] | None = None  # all slots, once they are needed
        self._active: list[Slot] | None = None  # None before the clean pass: all of them
        self._accepted: list[tuple[Slot, Any]] = []
        self._spared: list[tuple[Value, Any]] = []

    @property
    def _slots(self) -> list[Slot]:
        if self._every is None:
            self._every = self._arguments.slots + self._inside.every_slot()
        return self._every

    @property
    def given_tensors(self) -> list[Tensor]:
        """List the tensors among the arguments."""
        return [found.value for found in self._arguments.tensors.values() if isinstance(found.value, Tensor)]

    def settle(self, everything: bool = False) -> list[str]:
        """Note what the clean pass wrote into, and free the copies of the rest.

        Args:
            everything: take it that all was written into, if no clean pass has run.

        Returns:
            the names of those of which there is no copy, so that the other passes cannot have the old value.
        """
        known, first = self._known, self._known.first
        if not (everything or first):
            # a sweep over all containers once a step; the passes that follow touch those that this one has changed
            moving = known.moving
            given, inside = (
                [slot for slot in found.slots if id(slot.owner) in moving or slot.is_changed()]
                for found in (self._arguments, self._inside)
            )
            inside += self._inside.attributes.changed(moving)
            self._active = given + inside
            known.inside = self._inside if self._inside.is_worth_keeping and not inside else None
        known.first = False
        lost, known.dropped = known.dropped, []
        unseen = []
        for value in self._tensors.values():
            value.written = everything or value.where in known.by_value or value.is_written()
            if not value.written and first and value.key is None and value.differs():
                known.by_value.add(value.where)
                value.written = True
            if not value.written:
                value.copy = None
                continue
            known.changing.add(value.key)
            unseen += [value.where] if value.copy is None else []
        return unseen + lost

    @property
    def changed(self) -> list[str]:
        """Name what is not as it was before the clean pass."""
        names = [value.where for value in self._tensors.values() if value.written]
        for slot in self._slots:
            names += [f"{slot.where}.{name}" if isinstance(name, str) else slot.where for name in slot.changed()]
        return list(dict.fromkeys(names))

    def moved(self) -> set[Any]:
        """Find the attributes that are not as before, or lead to what is not, by (module, name).

        Inside `as_before`, find those that are not as they were put back.
        """
        found = {value.key for value in self._tensors.values() if value.is_written()}
        for slot in self._slots:
            names = slot.changed()
            found |= {(slot.key, name) for name in names} if slot.named else {slot.key} if names else set()
        return found - {None}

    def accept(self, moved: set[Any]) -> None:
        """Take what the clean pass made as what was there before, but for these attributes."""
        for slot in self._slots:
            names = slot.changed()
            if names:
                self._accepted.append((slot, slot.before.copy() if slot.named else slot.before))
            if slot.named:
                now = slot.get()
                for name in names:
                    if (slot.key, name) not in moved:
                        slot.before.pop(name, None)
                        slot.before |= {name: now[name]} if name in now else {}
            elif slot.key is not None and slot.key not in moved:
                slot.before = slot.get()
        for value in self._tensors.values():
            if value.key is not None and value.key not in moved and value.written:
                self._spared.append((value, value.copy))
                value.written, value.copy = False, None

    def reject(self) -> None:
        """Take back what was accepted."""
        for slot, before in self._accepted:
            slot.before = before
        for value, copy in self._spared:
            value.written, value.copy = True, copy
        self._accepted, self._spared = [], []

    def put_back(self) -> None:
        """Make everything as before, for good; no graph may need what was written into."""
        for slot in self._slots:
            slot.fill(slot.get(), slot.before)
        for value in self._tensors.values():
            if value.written and value.copy is not None:
                with torch.no_grad():
                    value.value[...] = value.copy
        for generator in self._generators:
            generator.put(generator.before)

    @contextmanager
    def as_before(self, convert: Callable[[Any], Any] | None = None, given_only: bool = False) -> Iterator[Given]:
        """Yield the arguments; they and what modules keep are as before the clean pass while the block lasts.

        Args:
            convert: is applied to the arguments' tensors.
            given_only: what modules keep stays as it is.
        """
        swapped = convert is not None or any(value.written for value in self._tensors.values())
        generators = self._generators
        if given_only:
            slots, generators = self._arguments.slots, self._arguments.generators
        else:
            slots = self._slots if self._active is None or swapped else self._active
        now = [slot.get() for slot in slots]
        states = [generator.get() for generator in generators]
        memo: dict[int, Any] = {}

        def old(value: Any) -> Any:
            return self._stand_in(value, memo, convert) if swapped else value

        try:
            for slot, own in zip(slots, now, strict=True):
                slot.stands = _mapped(old, slot.before) if swapped else slot.before
                slot.fill(own, slot.stands)
            for generator in generators:
                generator.put(generator.before)
            args, kwargs = self.given
            yield tuple(map(old, args)), _mapped(old, kwargs)
        finally:
            for slot, own in zip(slots, now, strict=True):
                slot.stands = None
                if slot.fill(slot.get(), own):
                    self._known.moving.add(id(slot.owner))
            for generator, state in zip(generators, states, strict=True):
                generator.put(state)
            for key in memo:
                self._tensors[key].stands = None

    def _stand_in(self, value: Any, memo: dict[int, Any], convert: Callable[[Any], Any] | None) -> Any:
        """Return what a pass finds in place of a tensor, or of the tensors in a tuple: one each, by `memo`."""
        if isinstance(value, tuple):
            items = [self._stand_in(item, memo, convert) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        found = self._tensors.get(id(value))
        if found is None:
            return value
        if id(value) not in memo:
            memo[id(value)] = found.stand_in() if found.written else value
            if convert is not None and id(value) in self._arguments.tensors:
                memo[id(value)] = convert(memo[id(value)])
        return memo[id(value)]


def _mapped(convert: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, dict):
        return {name: convert(value) for name, value in values.items()}
    return [convert(value) for value in values]
