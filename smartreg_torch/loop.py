"""Watch the user's training loop: steps that are not counted or too many, eval mode, a model that is compiled anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from smartreg.config import SMARTConfig
from smartreg.report import past_the_end
from smartreg_torch.teacher import Stamp

Say = Callable[[str, str], Any]


class Loop:
    """Count what the user's loop does.

    Args:
        say: warns, once of each kind.

    Attributes:
        calls: training steps since the last update.
        idle: whether the last call was with gradients, but in eval mode.
        compiled: in how many calls torch.compile compiled something.
    """

    _swapped = False  # whether the model has theta~, for the user to evaluate it

    def __init__(self, say: Say) -> None:
        self.calls = self.compiled = 0
        self.idle = False
        self._say = say
        self._weight: Stamp | None = None  # of a weight at the first call since the last update

    def called(self, theta: dict[str, nn.Parameter], config: SMARTConfig) -> None:
        """Warn if the weights move and no step is counted; RuntimeError inside of `swapped`."""
        if self._swapped:
            raise RuntimeError(
                "SMART: a training step inside swap_teacher(), at whose end the weights are put back, so that the "
                "step would be lost. Leave the block before you train, or call model.eval() to evaluate"
            )
        self.calls += 1
        weight = _last(theta)
        if self.calls >= 200 and self._forgotten(weight, config):
            self._say("updates", _not_counted(self.calls))
        if weight is not None:
            self._weight = self._weight or Stamp(weight)

    def ended(self, theta: dict[str, nn.Parameter], config: SMARTConfig) -> None:
        """Warn as `called` does, at the end of a run in which no step was counted."""
        if self._forgotten(_last(theta), config):
            self._say("updates", _not_counted(self.calls))

    def _forgotten(self, weight: nn.Parameter | None, config: SMARTConfig) -> bool:
        """Tell whether the weights moved, steps matter and none was counted. Accumulated batches move no weight."""
        counted = config.has_teacher or config.smoothness_steps > 1
        return counted and weight is not None and not (self._weight and self._weight.holds(weight))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Note that the model has theta~ inside the block."""
        before, self._swapped = self._swapped, True
        try:
            yield
        finally:
            self._swapped = before

    def updated(self, step: int, config: SMARTConfig) -> None:
        """Warn if the model was trained in eval mode, or longer than `total_steps` says."""
        if config.needs_total_steps and config.total_steps is not None and step > config.total_steps:
            self._say("total_steps", past_the_end(step, config.total_steps))
        if self.idle and self.calls == 0:
            self._say(
                "idle",
                "SMART: the model was trained in eval mode, in which the penalty is 0. Call model.train() before the "
                "loop; to train without dropout, set its probabilities to 0.",
            )
        self.calls, self._weight = 0, None

    def ran(self, compiled: bool) -> None:
        """Warn if the model is compiled in one batch after the other."""
        # once, and once more for each axis that turns out to have several lengths, is as it should be
        self.compiled += compiled
        if self.compiled > 3:
            self._say(
                "compile",
                "SMART: torch.compile compiled the model anew in 4 batches, most likely for their shapes. It is slow, "
                "and stops at torch._dynamo.config.recompile_limit: the model then runs uncompiled. Pad the batches to "
                "one shape (padding='max_length' and drop_last=True), or say torch.compile(model, dynamic=True).",
            )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_weight": None, "_swapped": False}


def _not_counted(batches: int) -> str:
    return (
        f"SMART: {batches} batches without smart.update(), so no step was counted, and theta~ has not moved. Call it "
        "after optimizer.step(), or smart.attach(optimizer) once."
    )


def _last(theta: dict[str, nn.Parameter]) -> nn.Parameter | None:
    """Return the last trainable parameter."""
    return next((parameter for parameter in reversed(theta.values()) if parameter.requires_grad), None)
