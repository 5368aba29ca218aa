"""Keep theta~, the averaged weights, by name: it follows the model, moves, is put into the model, saved and loaded."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smartreg.config import SMARTConfig
from smartreg.proximal import momentum, moves
from smartreg_torch.compat import version
from smartreg_torch.proximal import ema_update, like, local, own
from smartreg_torch.sharding import is_dtensor, is_sharded, reshard

Theta = Mapping[str, nn.Parameter]


class Teacher:
    """Hold theta~ of a model: an average of each trainable parameter, in float32 or wider.

    Attributes:
        averages: by the parameters' names; DTensors if these are.
        beta: of the last move; None before the first.
    """

    def __init__(self, averages: dict[str, Tensor] | None = None, beta: float | None = None) -> None:
        self.averages: dict[str, Tensor] = averages or {}
        self.beta = beta
        # of the weights that theta~ was made of; None once training has begun
        self._stamps: dict[str, Stamp] | None = {} if averages is None else None
        self._initial: set[str] = set()  # in the first step: the weights of which theta~ is a copy
        self._followed: tuple[Theta, list[Any], list[Tensor]] | None = None  # what `follow` found in the last step
        self._written = True  # whether a pass may write into theta~, until one was seen not to

    def check(self, theta: Theta) -> None:
        """Raise RuntimeError if the parameters of theta~ are gone, or were sharded since."""
        gone = sorted(self.averages.keys() - theta.keys())
        if gone:
            raise RuntimeError(
                f"SMART: the model no longer has {gone[:3]}, of which theta~ was made ({len(gone)} parameters in all). "
                "Make SMART after adapters are added, merged or deleted: SMART(get_peft_model(model, ...), config)"
            )
        whole = [name for name, average in self.averages.items() if is_dtensor(theta[name]) != is_dtensor(average)]
        if whole:
            raise RuntimeError(
                f"SMART: {whole[:3]} were sharded after theta~ was made of them. Make SMART after fully_shard(model)"
            )

    def follow(self, theta: Theta) -> None:
        """Start theta~ of a parameter at its value when it is first trainable, and keep it on its device.

        Until the first training step theta~ follows weights that are loaded or replaced: it starts at theta_0.
        """
        if self._stamps is None and self._is_followed(theta):
            return
        for name, parameter in theta.items():
            average = self.averages.get(name)
            if average is None and not parameter.requires_grad:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            stamp = None if self._stamps is None else self._stamps.get(name)
            moved = stamp is not None and not stamp.holds(parameter)
            if average is None or moved:
                own = parameter.detach() if is_dtensor(parameter) else local(parameter)
                self.averages[name] = own.to(wide, copy=True)
                if self._stamps is not None:
                    self._stamps[name] = Stamp(parameter)
            elif local(average).shape != local(parameter).shape:
                raise RuntimeError(
                    f"SMART: {name} has the shape {tuple(parameter.shape)}, and theta~ was made of "
                    f"{tuple(average.shape)}: it was resized during training. Make a new SMART(model, config) after it"
                )
            else:  # moved to another device, or a wider dtype
                self.averages[name] = average.to(local(parameter).device, torch.promote_types(average.dtype, wide))
        whole = self._stamps is None and not any(map(is_sharded, theta.values()))
        self._followed = (theta, list(map(_looks, theta.values())), list(self.averages.values())) if whole else None

    def _is_followed(self, theta: Theta) -> bool:
        """Tell whether nothing that `follow` depends on has changed since it found what to do in training."""
        if self._followed is None or self._followed[0] is not theta:
            return False
        _, looks, averages = self._followed
        same = len(averages) == len(self.averages) and all(map(operator.is_, averages, self.averages.values()))
        return same and looks == list(map(_looks, theta.values()))

    def begin(self, theta: Theta) -> None:
        """Stop following loaded weights: the training steps begin."""
        if self._stamps is not None:
            self._initial = {name for name, average in self.averages.items() if _equal(average, theta[name])}
        self._stamps = None

    def settle(self, theta: Theta) -> None:
        """Copy the weights that the first clean pass initialised: they are theta_0."""
        for name in self._initial:
            if not _equal(self.averages[name], theta[name]):
                local(self.averages[name]).copy_(local(theta[name]))
        self._initial = set()

    def move(self, theta: Theta, step: int, config: SMARTConfig) -> None:
        """Move theta~ after this optimiser step, if it is one of every S (paper, Algorithm 1, line 14)."""
        self._stamps = None  # training has begun, also in a loop that calls the model itself
        if moves(step, config):
            self.beta = momentum(step, config)
            ema_update(self.averages, theta, self.beta)

    def copied(self) -> dict[str, Tensor]:
        """Copy theta~: a model may write into its weights, as an embedding with max_norm does."""
        return {name: average.clone() for name, average in self.averages.items()}

    def for_a_pass(self) -> dict[str, Tensor]:
        """Return theta~ itself if no pass writes into it, else a copy."""
        return self.copied() if self._written else self.averages

    def see(self, after: Mapping[str, Tensor]) -> None:
        """Note whether a pass wrote into what `for_a_pass` gave."""
        self._written = any(
            not torch.equal(local(average), local(self.averages[name])) for name, average in after.items()
        )

    def check_saved(self, saved: Mapping[str, Tensor]) -> None:
        """Raise ValueError if saved averages are not of this model, or if there are none."""
        if not saved:
            raise ValueError(
                "SMART.load_state_dict: the state has no theta~, since it was saved with mu=0. Resume it with mu=0 and "
                "evaluate='theta', or start a new run from its weights"
            )
        shapes = {name: tuple(local(average).shape) for name, average in saved.items()}
        own = {name: tuple(local(average).shape) for name, average in self.averages.items()}
        if shapes != own:
            differing = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise ValueError(
                "SMART.load_state_dict: theta~ in the state is not of this model's trainable parameters: "
                f"{differing[:5]} differ. Make SMART after freezing layers, adding adapters or fully_shard, as it was "
                "made then; with sharded weights each process loads what it saved."
            )

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Copy saved averages into theta~; from now on it does not follow loaded weights."""
        for name, average in saved.items():
            local(self.averages[name]).copy_(local(average))
        self._stamps = None

    @torch.no_grad()
    def distance(self, theta: Theta) -> float:
        """Return max|theta - theta~|, theta~ in the dtype in which its pass has it."""
        pairs = [(local(theta[name]), local(average)) for name, average in self.averages.items()]
        return max(
            (float((weight - average.to(weight)).abs().max()) for weight, average in pairs if average.numel()),
            default=0.0,
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_stamps": None, "_followed": None}


_looks = operator.attrgetter("requires_grad", "dtype", "device", "shape")  # of a parameter


class Stamp:
    """Tell whether a parameter was replaced or written into since this was made."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)
        self._mark = self._marked(parameter)

    @staticmethod
    def _marked(parameter: nn.Parameter) -> tuple[Any, ...]:
        here = own(parameter)
        return 0 if here.is_inference() else version(parameter), here.shape, here.device, here.data_ptr()

    def holds(self, parameter: nn.Parameter) -> bool:
        """Tell whether this is the same, unwritten parameter; its device may differ."""
        then, now = self._mark, self._marked(parameter)
        in_place = now[2] != then[2] or now[3] == then[3]  # a model that moves to another device keeps its values
        return self._parameter() is parameter and now[:2] == then[:2] and in_place


@contextmanager
def in_model(
    theta: Mapping[str, Tensor], averages: Mapping[str, Tensor], sharded: list[Any], without: Collection[str] = ()
) -> Iterator[None]:
    """Let the parameters theta hold the values of theta~ inside the block.

    The tensors themselves stay, only their storage changes: tied weights, references that modules keep of their own
    and a graph recorded outside the block are all as they should be. Sharded ones (DTensors) keep the storage too,
    which fully_shard gathers from, and change what is in it.

    Args:
        sharded: the modules that `fully_shard` was called on.
        without: names of parameters that stay as they are.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> with in_model({"w": w}, {"w": torch.tensor(2.0)}, []):
        ...     print(w.item())
        2.0
        >>> w.item()
        1.0
    """

    def put(values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name in sharded_names:
                local(theta[name]).copy_(local(value))
            else:
                theta[name].data = like(value, theta[name])

    reshard(sharded)
    averages = {name: average for name, average in averages.items() if name not in without} if without else averages
    sharded_names = {name for name in averages if is_sharded(theta[name])}
    own = {name: local(theta[name]).clone() if name in sharded_names else theta[name].data for name in averages}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # its half-precision copies are of theta
    try:
        put(averages)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        put(own)
        reshard(sharded)  # what was gathered inside was of theta~


def _equal(average: Tensor, parameter: Tensor) -> bool:
    return torch.equal(local(average), local(parameter).to(local(average)))
