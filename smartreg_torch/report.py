"""What a step found, on its way to main memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smartreg.recording import Recorder
from smartreg.report import StepSeen
from smartreg_torch.site import Call, shift


class Report:
    """What a step found, on its way to main memory: the host does not wait for a GPU before somebody asks."""

    def __init__(
        self, step: int, values: Mapping[str, Tensor], stages: Mapping[str, list[Tensor]], dtype: torch.dtype | None
    ) -> None:
        self.step, self.dtype, self.judged = step, dtype, False
        self.stages = {name: [z.detach() for z in tensors] for name, tensors in stages.items()}
        self._names = list(values)
        penalty = values["penalty"].detach()
        found = torch.stack([value.detach().to(penalty) for value in values.values()])
        self._found = found.to("cpu", non_blocking=found.is_cuda)
        self._sent = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None

    @property
    def is_here(self) -> bool:
        """Whether reading the values waits for nothing."""
        return self._sent is None

    @property
    def values(self) -> dict[str, float]:
        """What was found, by name; waits for the device."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
        return dict(zip(self._names, self._found.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self)) | {"stages": {}, "_found": torch.tensor(list(self.values.values())), "_sent": None}

    @property
    def is_finite(self) -> bool:
        """Whether the penalty is, and the perturbation: a model that imputes NaN would hide one."""
        values = self.values
        return math.isfinite(values["penalty"]) and math.isfinite(values.get("max_delta", 0.0))


@torch.no_grad()
def observed(calls: list[Call], deltas: list[Tensor]) -> tuple[dict[str, Tensor], torch.dtype | None]:
    """max|delta|, and the fraction of the entries with delta != 0 in which x + delta == x, also in the dtype in which
    the next layer has x, where that is another; and the dtype."""
    if not deltas:
        return {}, None
    moved = torch.stack([(delta != 0).sum() for delta in deltas]).sum().clamp(min=1)

    def lost(dtypes: list[torch.dtype]) -> Tensor:
        same = []
        for call, delta, dtype in zip(calls, deltas, dtypes, strict=True):
            x = call.x.to(dtype)
            same.append(((delta != 0) & (shift(x, delta) == x)).sum())
        return torch.stack(same).sum() / moved

    own, next_layer = [call.x.dtype for call in calls], [call.dtype for call in calls]
    found = {"vanished": lost(own), "max_delta": torch.stack([delta.abs().max() for delta in deltas]).max()}
    if own != next_layer:
        found["vanished in the next layer"] = lost(next_layer)
    return found, next_layer[0]


def record(recorder: Recorder, seen: StepSeen, distance: float | None) -> None:
    """Copy a step into main memory for the recorder, half precision as float32, and write when all steps are there.

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
    if recorder.full:
        recorder.write()
