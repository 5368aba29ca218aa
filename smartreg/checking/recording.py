"""Write what SMART saw in the first steps of a run to one file (docs/debugging.md).

The file is an `.npz` without pickles. Its entry `recording` is JSON: the format's number, the backend, the versions,
the configuration and the site. For each step it has the tensors' dtypes and the divergence of each output. The arrays
of step i (0, 1, ...) are `i/NAME`; half precision becomes float32, which is exact:

    x/k, delta/k, mask/k           of the k-th run of the site: (n, ..., d) twice, and true at real positions
    outputs/k, perturbed/k, teacher/k    of the k-th output: f(x; theta), f(x + delta; theta), f(x; theta~)
    positions/k, sample_weight/k   which of its positions count; w, one an example or one a position
    R_s, D_Breg, penalty, max_delta, vanished, step, beta, distance    what SMART itself reported

`step` is the number of optimiser steps before this one, and `distance` is max|theta - theta~| at that time.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import smartreg
from smartreg.config import SMARTConfig, SMARTWarning

Array = NDArray[Any]

FORMAT = 1


class Recorder:
    """Collects the first steps of a run for a backend, and writes all of them or none.

    Args:
        path: the file. It must not exist: if a run breaks before its first step, an old file would be taken for
            that run's.
        steps: how many steps to record.
        call: the call that got `record=`, for the messages.

    Attributes:
        done: whether recording has ended: the file is written, or will not be.

    Raises:
        FileExistsError, FileNotFoundError: there is such a file, or no such folder.
        TypeError, ValueError: `steps` is no whole number above 0.
    """

    def __init__(self, path: str | os.PathLike[str], steps: Any, call: str) -> None:
        if isinstance(steps, bool) or not isinstance(steps, Integral):
            raise TypeError(f"{call}: record_steps must be a whole number, got {steps!r}")
        if steps < 1:
            raise ValueError(f"{call}: record_steps must be at least 1, got {steps!r}")
        self.path = Path(path).absolute()  # the run may change its folder
        if self.path.exists():
            raise FileExistsError(f"{call}: record={str(path)!r} is there already. Give another path, or delete it.")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"{call}: record={str(path)!r}: there is no folder {str(self.path.parent)!r}. Make the folder, or "
                "give another path"
            )
        self.steps = int(steps)
        self.done = False
        self._call = call
        self._about: dict[str, Any] = {}
        self._recorded: dict[int, tuple[dict[str, Array], dict[str, Any]]] = {}

    def begin(self, backend: str, packages: Mapping[str, str], config: SMARTConfig, site: str) -> None:
        """Say what runs; ValueError if it computes nothing that could be recorded."""
        if not config.has_penalty:
            raise ValueError(
                f"{self._call}: record= has nothing to record: lambda_s and mu are 0. Give one of them a value > 0, "
                "or leave record= out"
            )
        versions = {"smartreg": smartreg.__version__, "python": platform.python_version(), "numpy": np.__version__}
        self._about = {"backend": backend, "versions": {**packages, **versions}, "site": site}
        self._about["config"] = config.to_dict()

    def add(
        self,
        arrays: Mapping[str, Array],
        reported: Mapping[str, Any],
        dtypes: Mapping[str, str],
        outputs: Sequence[Mapping[str, Any]],
        index: int | None = None,
    ) -> None:
        """Add one complete step; write the file when all are there.

        Args:
            arrays: as `StepSeen.tensors` names them.
            reported: the scalars.
            dtypes: the types of the tensors before they became arrays.
            outputs: of each output its `divergence`, `weight` (Keras' loss_weights) and `by_weights` (whether the mean
                divides by the sum of the sample weights).
            index: the place of the step, if steps may come in another order.
        """
        index = len(self._recorded) if index is None else index
        if self.done or index >= self.steps:
            return
        kept = {
            name: value != 0 if name.startswith(("mask/", "positions/")) else value for name, value in arrays.items()
        }
        kept |= {name: np.asarray(value, np.float64) for name, value in reported.items()}
        heads = [dict(output) for output in outputs]
        self._recorded[index] = (kept, {"names": sorted(kept), "dtypes": dict(dtypes), "outputs": heads})
        if len(self._recorded) >= self.steps:
            self.write()

    def write(self) -> None:
        """Write what there is, once. A failure gives a warning and no exception, because training matters more."""
        if self.done or not self._recorded:
            return
        self.done = True
        steps = [self._recorded[index] for index in sorted(self._recorded)]
        self._recorded = {}
        about = {"format": FORMAT, **self._about, "steps": [facts for _, facts in steps]}
        arrays: dict[str, Any] = {
            f"{i}/{name}": value for i, (kept, _) in enumerate(steps) for name, value in kept.items()
        }
        part = self.path.with_name(self.path.name + ".part")
        try:
            if self.path.exists():
                raise FileExistsError("a file has appeared there since")
            with open(part, "wb") as file:
                np.savez_compressed(file, recording=np.array(json.dumps(about)), **arrays)
            os.replace(part, self.path)
        except OSError as error:
            self._warn(
                f"the recording could not be written to {str(self.path)!r}: {error}. Training goes on. Give another "
                "path next time."
            )
        finally:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """End the recording: write what there is, and warn if there is nothing."""
        if not self.done and not self._recorded and sys.exc_info()[0] is None:
            self._warn(
                f"{str(self.path)!r} is not written: no training step was taken (in eval mode there is none). Put the "
                "model into train mode."
            )
        self.write()
        self.done = True

    def _warn(self, message: str) -> None:
        warnings.warn(f"{self._call}: record=: {message}", SMARTWarning, stacklevel=4)
