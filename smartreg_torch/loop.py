"""Watch the user's training loop for steps that are not counted, eval mode, a model that is compiled anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from smartreg.config import SMARTConfig
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

    def __init__(self, say: Say) -> None:
        self.calls = self.compiled = 0
        self.idle = False
        self._say = say
        self._weight: Stamp | None = None  # of a weight at the first call since the last update

    def called(self, theta: dict[str, nn.Parameter], config: SMARTConfig) -> None:
        """Warn if the weights move and no step is counted. Batches that are accumulated do not move them."""
        self.calls += 1
        weight = next((parameter for parameter in reversed(theta.values()) if parameter.requires_grad), None)
        if weight is None:
            return
        counted = config.has_teacher or config.smoothness_steps > 1
        if self.calls >= 200 and counted and not (self._weight and self._weight.holds(weight)):
            self._say(
                "updates",
                "SMART: 200 batches without smart.update(), so no step was counted, and theta~ has not moved. Call it "
                "after optimizer.step(), or smart.attach(optimizer) once.",
            )
        self._weight = self._weight or Stamp(weight)

    def updated(self) -> None:
        """Warn if the model was trained in eval mode."""
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
        return vars(self) | {"_weight": None}
