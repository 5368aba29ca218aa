"""Run a model again over the same batch: with the same dropout, buffers, arguments and kept values in every pass."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from smartreg_torch.compat import numpy_words, own_buffers, own_parameters, version
from smartreg_torch.kept import Kept
from smartreg_torch.reach import Given, Known
from smartreg_torch.sharding import is_sharded
from smartreg_torch.values import alike, clone, tensors_in

__all__ = ["Given", "Known", "State", "device_of", "differing", "first_differing_module"]


class State:
    """Keep what a forward in training mode changes, as it was before the clean pass, and replay it in the others.

    - The global random streams (torch's, NumPy's and Python's): the dropout masks are the same in all passes, but for
      those that are given a seed of their own.
    - Buffers: BatchNorm's statistics move once a step. The other passes get copies, which their graphs may keep.
    - The arguments, and what modules and their hooks keep: counters, hidden states, caches, lists, generators.
    - Autocast, and whether each module is in training mode.

    After each pass everything is again as the clean pass left it: what the user reads is the clean pass's.

    Args:
        model: the module that the passes call.
        theta: its parameters. Their devices are those whose random streams are replayed.
        given: the model's arguments, (args, kwargs).
        known: what earlier steps have shown.
        modules: those of the model, if they are at hand.
    """

    def __init__(
        self,
        model: nn.Module,
        theta: Mapping[str, Tensor],
        given: Given = ((), {}),
        known: Known | None = None,
        modules: list[nn.Module] | None = None,
    ) -> None:
        kind = next((weight.device.type for weight in theta.values()), "cpu")
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        devices = {parameter.device for parameter in theta.values()} - {torch.device("cpu")}
        self._streams = _Streams.now(devices)
        self._words = numpy_words()
        self._drawn = True  # whether the clean pass has drawn from NumPy's or Python's stream
        self._modules = list(model.modules()) if modules is None else modules
        self._modes = self._modes_now()
        copies: dict[int, Tensor] = {}  # one of each, since two modules may share a buffer
        self._buffers: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
            (buffers, {name: _copy(buffer, copies) for name, buffer in buffers.items() if buffer is not None})
            for buffers in map(own_buffers, self._modules)
            if buffers
        ]
        self._before: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._known = Known() if known is None else known
        frozen = [weight for weight in theta.values() if not weight.requires_grad and _is_plain(weight)]
        self._frozen = self._frozen_weights(frozen, theta)
        self._versions = [(weight, version(weight), weight.data_ptr()) for weight in frozen]
        self.kept = Kept(self._modules, given, self._known)

    def settle(self, run: Callable[..., Any]) -> list[str]:
        """Note what the clean pass changed; in the first step, also what a forward sets up for good.

        A table that is made when it is first needed, a hook put on once, a layer that initialises itself by its first
        batch: whatever a second forward leaves alone stays as the first one made it, in all passes.

        Args:
            run: the model's forward.

        Returns:
            the names of the values whose state before the clean pass is lost, see `Kept.settle`.
        """
        self._drawn = self._has_drawn()
        first, lost = self._known.first, self.kept.settle()
        self._known.written |= {
            id(weight) for weight, then, at in self._versions if version(weight) != then or weight.data_ptr() != at
        }
        if self._known.looks:
            self._known.looks -= 1
            self._known.written |= {
                id(parameters[name])
                for parameters, before in self._frozen
                for name, value in before.items()
                if not alike(parameters.get(name), value)
            }
        moved = (not alike(now.get(name), z) for now, before in self._buffers for name, z in before.items())
        if first and (any(moved) or self.kept.moved()):
            self._keep_set_up(run)
        return lost

    def _keep_set_up(self, run: Callable[..., Any]) -> None:
        """Run the forward a second time: what it leaves alone, the first one has set up for good."""
        kept = Kept(self._modules, ((), {}), Known())
        kept.settle(everything=True)
        own = [(buffers, dict(buffers)) for buffers, _ in self._buffers]
        with self._streams_replayed(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                copies: dict[int, Tensor] = {}
                for buffers, now in own:
                    buffers.update({name: _copy(value, copies) for name, value in now.items() if value is not None})
                with kept.as_before(), self.kept.as_before(given_only=True) as (args, kwargs):
                    try:
                        run(*args, **kwargs)
                    except (RuntimeError, AssertionError):  # a forward that takes gradients
                        with torch.enable_grad():
                            run(*args, **kwargs)
                    moved = kept.moved()
                settled = [
                    {name: value for name, value in now.items() if value is not None and alike(value, left.get(name))}
                    for left, now in own
                ]
            finally:
                _refill(own)
        self.kept.accept(moved)
        for (_, before), values in zip(self._buffers, settled, strict=True):
            self._before.append((before, dict(before)))
            before |= {name: value.clone() for name, value in values.items() if name in before}

    @contextmanager
    def undone(self, run: Callable[[], Any]) -> Iterator[None]:
        """Take back, after the block, what forwards inside it changed, but for what one sets up for good.

        Args:
            run: one more forward, as in the block, which tells the two apart.
        """
        kept, self.kept = self.kept, Kept([], ((), {}), Known())
        try:
            with self.replayed():
                yield
        finally:
            self.kept = kept
        self.settle(run)
        self.kept.put_back()

    def reject(self) -> None:
        """Take nothing as set up for good: the clean pass's own state comes before every pass."""
        self.kept.reject()
        for before, values in self._before:
            before |= values
        self._before = []

    def _frozen_weights(
        self, frozen: list[Tensor], theta: Mapping[str, Tensor]
    ) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Copy the frozen weights that a forward writes into, as a momentum encoder's; in the first steps, all.

        If they are far more than the trained ones, as under adapters, copy those alone that were seen to change.
        """
        if not frozen:
            return []
        size = sum(weight.nbytes for weight in frozen)
        every = self._known.looks and size <= 2 * (sum(weight.nbytes for weight in theta.values()) - size)
        copied = {id(weight) for weight in frozen if every or id(weight) in self._known.written}
        if not copied:
            return []
        copies: dict[int, Tensor] = {}
        found = []
        for module in self._modules:
            own = own_parameters(module)
            before = {name: _copy(w, copies) for name, w in own.items() if w is not None and id(w) in copied}
            if before:
                found.append((own, before))
        return found

    @contextmanager
    def replayed(self, convert: Callable[[Any], Any] | None = None, seed: int | None = None) -> Iterator[Given]:
        """Yield the arguments as before the clean pass, for one pass.

        Args:
            convert: is applied to the arguments' tensors.
            seed: of the random streams in this pass; None replays the clean pass's.
        """
        own = [(buffers, dict(buffers)) for buffers, _ in self._buffers]  # the clean pass may have put others in
        frozen = [(parameters, dict(parameters)) for parameters, _ in self._frozen]
        with self._streams_replayed(seed):
            modes = self._set_modes(self._modes)
            try:
                copies: dict[int, Tensor] = {}
                for buffers, before in self._buffers:
                    buffers.update({name: _copy(buffer, copies) for name, buffer in before.items()})
                for parameters, before in self._frozen:
                    parameters.update({name: _copy(value, copies, frozen=True) for name, value in before.items()})
                with self.kept.as_before(convert) as given:
                    yield given
            finally:
                self._set_modes(modes)
                _refill(own)
                _refill(frozen)

    def kept_streams(self) -> AbstractContextManager[None]:
        """Put torch's random streams back after the block: a backward may draw, too."""
        devices = list(self._streams.devices)
        kind = next((device.type for device in devices), "cuda")
        return torch.random.fork_rng(devices, device_type=kind)

    def without_autocast(self) -> AbstractContextManager[Any]:
        """Switch autocast off in the block: a backward under it rounds its products; the passes have the caller's."""
        kind, dtype, _ = self._autocast
        return _autocast(kind, dtype, False)

    def _has_drawn(self) -> bool:
        """Tell whether NumPy's or Python's stream has moved. To read or write NumPy's takes 0.05 ms in every pass."""
        before = self._streams.numpy
        if self._words is None or before["has_gauss"]:  # a normal number that was drawn before, beside the words
            now = np.random.get_state(legacy=False)  # noqa: NPY002
            moved = not _alike_states(now, before)
        else:
            moved = numpy_words() != self._words
        return moved or random.getstate() != self._streams.python

    @contextmanager
    def _streams_replayed(self, seed: int | None = None) -> Iterator[None]:
        before = self._streams if seed is None else _Streams.seeded(seed, self._streams.devices)
        streams = (np.random.get_state(legacy=False), random.getstate()) if self._drawn else None  # noqa: NPY002
        with self.kept_streams(), _autocast(*self._autocast):
            try:
                torch.set_rng_state(before.cpu)
                for device, state in before.devices.items():
                    torch.get_device_module(device).set_rng_state(state, device)
                if streams is not None:
                    np.random.set_state(before.numpy)  # noqa: NPY002
                    random.setstate(before.python)
                yield
            finally:
                if streams is not None:
                    np.random.set_state(streams[0])  # noqa: NPY002
                    random.setstate(streams[1])

    def _modes_now(self) -> list[bool]:
        return list(map(attrgetter("training"), self._modules))

    def _set_modes(self, modes: list[bool]) -> list[bool]:
        """Put the modules into these modes; return those of before."""
        before = self._modes_now()
        if before != modes:  # model.eval() between a forward and its backward
            for module, then, mode in zip(self._modules, before, modes, strict=True):
                if then != mode:
                    module.training = mode
        return before


def _autocast(kind: str, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[Any]:
    """Return torch.autocast, or nothing if that is off and was to be switched off."""
    on = enabled or torch.is_autocast_enabled(kind)
    return torch.autocast(kind, dtype, enabled) if on else nullcontext()


class _Streams(NamedTuple):
    """Hold states of the global random streams: torch's on the CPU and on these devices, NumPy's and Python's."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> Self:
        """Read the states."""
        states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
        return cls(torch.get_rng_state(), states, np.random.get_state(legacy=False), random.getstate())  # noqa: NPY002

    @classmethod
    def seeded(cls, seed: int, devices: Iterable[torch.device]) -> Self:
        """Make states from a seed, and leave the streams alone: manual_seed() would reach all devices."""
        states = {device: torch.Generator(device).manual_seed(seed).get_state() for device in devices}
        numpy = type(np.random.get_bit_generator())(seed).state  # type: ignore[attr-defined]
        return cls(torch.Generator().manual_seed(seed).get_state(), states, numpy, random.Random(seed).getstate())


def _refill(own: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for buffers, values in own:
        buffers.clear()
        buffers.update(values)


def _is_plain(weight: Tensor) -> bool:
    """Tell whether this is a parameter that is neither sharded nor packed."""
    plain = type(weight) is nn.Parameter and not is_sharded(weight) and not weight.is_inference()
    return plain and not weight.is_meta


def _alike_states(a: Any, b: Any) -> bool:
    """Tell whether two states of NumPy's stream are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike_states(a[name], b[name]) for name in a)
    return np.array_equal(a, b)


def _copy(value: Tensor, copies: dict[int, Tensor], frozen: bool = False) -> Tensor:
    """Copy a tensor, as a frozen parameter if asked: once, if two modules share it."""
    if id(value) not in copies:
        copies[id(value)] = nn.Parameter(value.clone(), requires_grad=False) if frozen else clone(value)
    return copies[id(value)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, or the CPU if there is none."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def differing(clean: Sequence[Tensor], again: Sequence[Tensor], masks: Sequence[Tensor | None]) -> str:
    """Say how the outputs of a repeated pass differ from the clean pass's; "" if they agree.

    Masked positions may differ, and so may the last digits: compiled code, or a GPU's atomic additions, may add up in
    another order.
    """
    for i, (z, z_again, mask) in enumerate(zip(clean, again, masks, strict=True)):
        if z.shape != z_again.shape:
            return f"output {i} has the shape {tuple(z_again.shape)} instead of {tuple(z.shape)}"
        z, z_again = z.detach(), z_again.detach()
        if mask is not None:
            keep = (mask != 0).unsqueeze(-1)
            z, z_again = z.where(keep, 0), z_again.where(keep, 0)
        if torch.equal(z, z_again):
            continue
        wide = torch.promote_types(z.dtype, torch.float32)
        finite = z.isfinite() & z_again.isfinite()
        same = finite | (z == z_again) | (z.isnan() & z_again.isnan())
        if not bool(same.all()):
            return f"output {i} is finite in one and not in the other"
        apart = float((z.to(wide) - z_again.to(wide)).where(finite, 0).abs().max())
        size = float(z.to(wide).where(finite, 0).abs().max())
        # seven tenths of the digits; half of them if additions may come in another order
        digits = 0.7 if z.device.type == "cpu" else 0.5
        if apart > torch.finfo(z.dtype).eps ** digits * size:
            return f"output {i} differs by up to {apart:.3g}, its largest entry being {size:.3g}"
    return ""


def first_differing_module(model: nn.Module, run: Callable[[], Any]) -> str:
    """Find the innermost module whose output differs between two repeated passes; "" if none does.

    Args:
        run: one pass.
    """

    def traced() -> list[tuple[str, list[Tensor]]]:
        trace: list[tuple[str, list[Tensor]]] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensors = [tensor.detach().clone() for tensor in tensors_in(output)]
                trace.append((f"{name} ({type(module).__name__})", tensors))

            return hook

        hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return trace

    for (name, tensors), (other, others) in zip(traced(), traced(), strict=False):
        if name != other or len(tensors) != len(others) or not all(map(alike, tensors, others)):
            return name
    return ""
