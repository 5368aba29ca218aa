"""Copy what a step found to main memory, and warn of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smartreg.checking.recording import Recorder
from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.report import StepSeen, not_finite, warn_of
from smartreg_torch.projection import Output, total, values_of, whole
from smartreg_torch.site import Call, shift
from smartreg_torch.step import Step


class Report:
    """Send what a step found to main memory. The host waits for a GPU only when somebody asks."""

    def __init__(
        self, step: int, values: Mapping[str, Tensor], stages: Mapping[str, list[Output]], dtype: torch.dtype | None
    ) -> None:
        self.step, self.dtype, self.judged = step, dtype, False
        self.names = list(values)
        penalty = values["penalty"].detach()
        found = torch.stack([value.detach().to(penalty) for value in values.values()])
        self._found = found.to("cpu", non_blocking=found.is_cuda)
        self._sent = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None
        # to name the pass that is not finite: sums, since the outputs would stay in memory
        needed = not (self.is_here and self.is_finite)
        self.sums = {
            name: [z.detach().sum(dtype=torch.promote_types(z.dtype, torch.float32)) for z in values_of(outputs)]
            for name, outputs in (stages if needed else {}).items()
        }

    @property
    def is_here(self) -> bool:
        """Tell whether reading the values waits for nothing."""
        return self._sent is None

    @cached_property
    def values(self) -> dict[str, float]:
        """Return what was found, by name; wait for the device."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
        return dict(zip(self.names, self._found.tolist(), strict=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        older = {"names": state.pop("_names")} if "_names" in state else {}
        vars(self).update(older | {"sums": {}} | state)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self)) | {"sums": {}, "_found": torch.tensor(list(self.values.values())), "_sent": None}

    @property
    def is_finite(self) -> bool:
        """Tell whether penalty and perturbation are finite: a model that imputes NaN hides a delta that is not."""
        values = self.values
        return math.isfinite(values["penalty"]) and math.isfinite(values.get("max_delta", 0.0))


class Reports:
    """Keep what the steps found so far.

    Attributes:
        last: of the last step; None if it had no penalty.
        smooth: of the last step that had R_s.
        skipped: how many steps had no finite penalty.
    """

    def __init__(self) -> None:
        self.last: Report | None = None
        self.smooth: Report | None = None
        self.skipped = 0
        self._warned: set[str] = set()

    def add(self, report: Report | None) -> None:
        """Take the report of a step."""
        self.last = report
        if report is not None and "R_s" in report.names:
            self.smooth = report

    @property
    def found(self) -> dict[str, float]:
        """Return R_s, D_Breg, vanished and max_delta of the last step that had them; wait for the device."""
        values: dict[str, float] = {}
        for report in (self.smooth, self.last):
            values |= {} if report is None else report.values
        return {name: values[name] for name in ("R_s", "D_Breg", "vanished", "max_delta") if name in values}

    def judge(self, config: SMARTConfig) -> None:
        """Check the last step once: warn or raise FloatingPointError."""
        report = self.last
        if report is None or report.judged:
            return
        report.judged = True
        sums, report.sums = report.sums, {}
        found = dict(report.values)
        # under autocast the next layer has x in a narrower dtype
        found["vanished"] = found.get("vanished in the next layer", found.get("vanished", 0.0))
        for what, message in warn_of(found, config.start, str(report.dtype)).items():
            self.warn(what, message)
        if config.non_finite == "skip" or report.is_finite:
            return
        first = next(
            (name for name, found in sums.items() if not all(bool(value.isfinite()) for value in found)),
            "divergence",
        )
        raise FloatingPointError(not_finite(report.step, first, report.values))

    def warn(self, what: str, message: str) -> None:
        """Warn, once of each kind."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, SMARTWarning, stacklevel=4)


@torch.no_grad()
def observed(calls: list[Call], deltas: list[Tensor]) -> tuple[dict[str, Tensor], torch.dtype | None]:
    """Measure max|delta|, and the fraction of the entries with delta != 0 in which x + delta == x.

    Also in the dtype in which the next layer has x, if that is another one; that dtype is returned, too.
    """
    if not deltas:
        return {}, None
    moved = total(delta.count_nonzero() for delta in deltas).clamp(min=1)

    def lost(dtypes: list[torch.dtype]) -> Tensor:
        same = []
        for call, delta, dtype in zip(calls, deltas, dtypes, strict=True):
            x = call.x.to(dtype)
            same.append(delta.where(shift(x, delta) == x, 0).count_nonzero())
        return total(same) / moved

    own, next_layer = [call.x.dtype for call in calls], [call.dtype for call in calls]
    largest = [delta.abs().max() for delta in deltas]
    most = largest[0] if len(largest) == 1 else torch.stack(largest).max()
    found = {"vanished": lost(own), "max_delta": most}
    if own != next_layer:
        found["vanished in the next layer"] = lost(next_layer)
    return found, next_layer[0]


def see(step: Step, report: Report, beta: float | None) -> StepSeen:
    """Build the StepSeen of a step; wait for the device."""
    found = report.values
    metrics = {name: found[name] for name in ("R_s", "D_Breg", "vanished", "max_delta", "penalty") if name in found}
    stages = {name: list(map(whole, outputs)) for name, outputs in step.stages.items()}
    return StepSeen(
        step=report.step,
        x=[call.x.detach() for call in step.passes.clean.calls],
        delta=stages.get("ascent", []),
        mask=step.compared.inputs.masks if step.passes.clean.calls else [],
        outputs=stages["clean"],
        perturbed=stages.get("perturbed", []),
        teacher=stages.get("teacher", []),
        positions=step.compared.positions,
        sample_weight=[step.sample_weight] * len(step.compared.heads),
        divergences=step.compared.divergences,
        metrics=metrics | ({} if beta is None else {"beta": beta}),
    )


def record(recorder: Recorder, distance: float | None, seen: StepSeen) -> None:
    """Copy a step into main memory for the recorder, half precision as float32.

    Args:
        distance: max|theta - theta~|; None if mu = 0.
    """
    tensors = seen.tensors()
    wide = {
        name: torch.promote_types(z.dtype, torch.float32 if z.is_floating_point() else z.dtype)
        for name, z in tensors.items()
    }
    recorder.add(
        {name: z.detach().to("cpu", wide[name], copy=True).numpy() for name, z in tensors.items()},
        seen.metrics | {"step": seen.step - 1} | ({} if distance is None else {"distance": distance}),
        {name: str(z.dtype).removeprefix("torch.") for name, z in tensors.items()},
        [{"divergence": name, "weight": 1.0, "by_weights": False} for name in seen.divergences],
    )
