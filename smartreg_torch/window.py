"""Keep what SMART found since the Trainer's last log, over accumulated batches and several processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from smartreg_torch.report import Report
from smartreg_torch.smart import SMART

if TYPE_CHECKING:
    from transformers import Trainer


class Window:
    """Sum up SMART's metrics since the last log: of each optimiser step the mean over its examples."""

    _NAMES = ("steps", "smooth steps", "R_s", "D_Breg", "vanished", "max_delta")

    def __init__(self, sums: dict[str, float] | None = None) -> None:
        self._sums = dict.fromkeys(self._NAMES, 0.0) if sums is None else sums
        self._reports: list[tuple[Report, float]] = []  # to be read together: nobody waits for a GPU in a step

    def add(self, smart: SMART, share: float) -> None:
        """Add what SMART found in a batch that is this share of its optimiser step."""
        if smart._reports.last is not None:
            self._reports.append((smart._reports.last, share))

    def sums(self) -> dict[str, float]:
        """Return the sums, of which `means` takes the means and which a checkpoint keeps."""
        for report, share in self._reports:
            found = {name: report.values[name] for name in ("R_s", "D_Breg", "vanished") if name in report.values}
            if not all(map(math.isfinite, found.values())):
                continue  # left out of the loss as well
            counted = {"steps": 1.0, "smooth steps": float("R_s" in found)}
            for name, value in (counted | found).items():
                self._sums[name] += share * value
            self._sums["max_delta"] = max(self._sums["max_delta"], report.values.get("max_delta", 0.0))
        self._reports = []
        return self._sums

    def means(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Take the means over steps and processes; of max_delta the largest; beta and skipped as they are now."""
        sums = self.sums()
        every = torch.tensor([[sums[name] for name in self._NAMES]], dtype=torch.float64)
        if trainer.args.world_size > 1:
            every = trainer.accelerator.gather(every.float().to(trainer.args.device)).double().cpu()
        totals = dict(zip(self._NAMES, every.sum(0).tolist(), strict=True))
        counts = {name: totals["steps" if name == "D_Breg" else "smooth steps"] for name in self._NAMES}
        means = {name: total / counts[name] for name, total in totals.items() if counts[name] > 0}
        if "max_delta" in means:
            means["max_delta"] = float(every[:, -1].max())
        left_out = {"step", *self._NAMES} - means.keys()  # Trainer logs its own step
        return {k: means.get(k, value) for k, value in metrics.items() if k not in left_out}
