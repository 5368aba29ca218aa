"""Recompute in NumPy float64 what SMART reported of a recorded run (docs/debugging.md)."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartreg.checking.bounds import bound, norms, round_to
from smartreg.checking.recording import FORMAT
from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.divergences import DIVERGENCES, position_weights, term_weights
from smartreg.perturbation import expand_mask, rms
from smartreg.proximal import last_move, momentum

Array = NDArray[Any]

_HINTS = {
    "all finite": "A NaN or an infinity in the outputs, in delta, or in an entry of x that was moved. Look at the "
    "learning rate and the loss before this step; an output may be -inf only as a masked class, in every pass.",
    "R_s": "The recorded outputs have another divergence. Possible causes: an outputs= function that does not always "
    "return the same, sample weights of another form, a changed kernel. Please report it, with the file.",
    "D_Breg": "The recorded outputs and the teacher's have another divergence. Please report it, with the file.",
    "penalty": "It is not lambda_s R_s + mu D_Breg of the recorded outputs. If R_s and D_Breg agree, lambda_s or mu "
    "was changed in the run; else see their hints.",
    "max_delta": "The recorded delta is not the one that SMART measured. Please report it, with the file.",
    "vanished": "The recorded x and delta are not those that SMART measured. Please report it, with the file.",
    "beta": "theta~ moved by another beta than the schedule has. total_steps must be the number of optimiser steps of "
    "the whole run.",
    "delta in the ball": "The perturbation is longer than epsilon allows (times the root mean square of x, with "
    "scale='rms'). Please report it, with the file.",
    "delta 0 at padding": "A masked position was moved. Is the mask that of the site, true (or 1) at real tokens, in "
    "the order of x's positions? See mask=.",
    "delta not all 0": "Nothing was perturbed, so R_s is 0. Is the mask true anywhere? Is sigma 0 with "
    "start='gaussian'? Do the outputs depend on the site?",
    "x + delta is not x": "Adding delta changes less than half of the entries: it is below the precision of x, and R_s "
    "measures little but rounding. Use a larger epsilon, or float32 embeddings.",
    "theta~ is counted": "The weights changed from one recorded step to the next, but SMART counted no optimiser step, "
    "so theta~ did not move. In PyTorch call smart.update() after optimizer.step(), or smart.attach(optimizer) once; "
    "in Keras update through model.optimizer.",
    "theta~ is not theta": "After optimiser steps the teacher's outputs are still the model's own, so D_Breg is 0. "
    "Does the optimiser hold this model's weights, and is its learning rate above 0? With beta = 0 and "
    "proximal_steps = 1 it is always so. A change below the outputs' precision looks the same.",
}


class Row(NamedTuple):
    """One comparison in one recorded step.

    Attributes:
        step: which of the recorded steps, from 1; the last one if the row is about all of them.
        what: the name of a metric, or of a check.
        reported: what SMART reported; None if a check has no such number.
        recomputed: the same from the recorded tensors, in float64.
        error, bound, ok: ok is error <= bound.
    """

    step: int
    what: str
    reported: float | None
    recomputed: float
    error: float
    bound: float
    ok: bool


@dataclass(frozen=True)
class RunReport:
    """What `compare_run` found; `print` shows one line for each kind of row, with its worst step.

    Attributes:
        about: backend, versions and site, in a line.
        rows: every comparison of every step.
    """

    about: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Tell whether every row is ok."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        kinds: dict[str, list[Row]] = {}
        for row in self.rows:
            kinds.setdefault(row.what, []).append(row)
        lines = [["what", "steps ok", "worst at", "reported", "recomputed", "error", "bound"]]
        for what, rows in kinds.items():
            worst = max(rows, key=_badness)
            numbers = [worst.reported, worst.recomputed, worst.error, worst.bound]
            count = f"{sum(row.ok for row in rows)} of {len(rows)}"
            lines.append([what, count, str(worst.step), *("" if x is None else f"{x:.4g}" for x in numbers)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        failed = [what for what, rows in kinds.items() if not all(row.ok for row in rows)]
        verdict = "What SMART reported is what the recorded tensors give." if self.ok else "Not as it should be:"
        hints = [f"- {what}: {_HINTS[what]}" for what in failed]
        return "\n".join(line.rstrip() for line in [self.about, "", *table, "", verdict, *hints])


def compare_run(path: str | os.PathLike[str]) -> RunReport:
    """Recompute in NumPy float64 what SMART reported about a recorded run, and check what must always hold.

    R_s = 1/n sum_i w_i l_s( f(x_i + delta_i), f(x_i) ),   D_Breg = 1/n sum_i w_i l_s( f(x_i; theta), f(x_i; theta~) ),
    ||delta_i||_p <= epsilon (times rms(x_i) with scale="rms"),   penalty = lambda_s R_s + mu D_Breg

    Args:
        path: what `SMART(..., record=path)`, `SMARTCallback(..., record=path)` or `attach(..., record=path)` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recording, is damaged, or has a newer format.

    Source: paper, equations 1 to 3.

    Example:
        >>> import tempfile
        >>> from smartreg.checking.recording import Recorder
        >>> outputs = {"outputs/0": np.array([[1.0, 2.0]]), "teacher/0": np.array([[1.0, 1.0]])}
        >>> dtypes = {"outputs/0": "float64", "teacher/0": "float64"}
        >>> head = {"divergence": "squared_error", "weight": 1.0, "by_weights": False}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recorder = Recorder(f"{folder}/run.npz", 1, "example")
        ...     recorder.begin("numpy", {}, SMARTConfig(lambda_s=0, mu=2, total_steps=9), "x")
        ...     recorder.add(outputs, {"D_Breg": 1.0, "penalty": 3.0, "step": 0, "distance": 1.0}, dtypes, [head])
        ...     recorder.close()
        ...     report = compare_run(f"{folder}/run.npz")
        >>> [(row.what, row.recomputed) for row in report.rows if not row.ok]
        [('penalty', 2.0)]
    """
    about, config, steps = _read(path)
    with np.errstate(all="ignore"):  # what is not finite has a row of its own
        rows = [row for i, step in enumerate(steps) for row in _step_rows(i + 1, step, config)]
        rows += _teacher_rows(steps, config)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    count = f"{len(steps)} step{'s' if len(steps) > 1 else ''}"
    return RunReport(f"{count} on {about['backend']}, site: {about['site']}; {versions}", rows)


class _Output(NamedTuple):
    """One recorded output; perturbed or teacher is None if R_s or D_Breg is switched off."""

    clean: Array
    perturbed: Any
    teacher: Any
    positions: Array | None
    sample_weight: Array | None
    divergence: str
    weight: float
    by_weights: bool

    def mean(self, other: Array) -> tuple[float, float]:
        """Return weight / n sum_i w_i l_s(other_i, clean_i), and the same with |w_i|, to which rounding is relative."""
        value, w = DIVERGENCES[self.divergence].value, self.sample_weight
        a, b = other.astype(np.float64), self.clean.astype(np.float64)
        if w is None:
            each = sizes = value(a, b, self.positions)
        elif w.ndim == 1:
            each, sizes = (value(a, b, self.positions) * v for v in (w, np.abs(w)))
        else:  # every position is weighed by its share in its example's mean and by its own weight
            rows = value(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])).reshape(a.shape[:-1])
            shares = rows * position_weights(a, self.positions)[..., 0]
            each, sizes = (np.sum(shares * v, axis=tuple(range(1, shares.ndim))) for v in (w, np.abs(w)))
        total = w.sum() if w is not None and self.by_weights else None
        scale = 1.0 if total is None or w is None else (w.size / total if total else 0.0)
        return self.weight * scale * float(np.mean(each)), abs(self.weight * scale) * float(np.mean(sizes))


class _Step(NamedTuple):
    """One recorded step, with `arrays` and `dtypes` by name."""

    arrays: dict[str, Any]
    dtypes: dict[str, str]
    heads: list[dict[str, Any]]

    def listed(self, name: str) -> list[Any]:
        """Return NAME/0, NAME/1, ..., one for each run of the site or each output; None for one that is missing."""
        per_output = name in ("outputs", "perturbed", "teacher", "positions", "sample_weight")
        count = len(self.heads) if per_output else sum(key.startswith("x/") for key in self.arrays)
        return [self.arrays.get(f"{name}/{k}") for k in range(count)]

    def outputs(self) -> list[_Output]:
        names = ("outputs", "perturbed", "teacher", "positions", "sample_weight")
        columns = zip(*(self.listed(name) for name in names), strict=True)
        return [_Output(*arrays, **head) for arrays, head in zip(columns, self.heads, strict=True)]

    def dtype(self, kinds: Sequence[str]) -> str:
        """Return the precision in which SMART computed with these tensors."""
        found = [dtype for name, dtype in self.dtypes.items() if name.split("/")[0] in kinds]
        return "float64" if all(dtype == "float64" for dtype in found) else "float32"

    def reported(self, name: str) -> float:
        return float(self.arrays[name])


def _step_rows(number: int, step: _Step, config: SMARTConfig) -> Iterator[Row]:
    outputs = step.outputs()
    dtype = step.dtype(("outputs", "perturbed", "teacher"))
    relative = bound("divergence", dtype)
    smallest = float(np.finfo(dtype).tiny / np.finfo(dtype).eps)  # below it there is no full precision

    def agrees(what: str, recomputed: float, bound: float) -> Row:
        reported = step.reported(what)
        same = reported == recomputed or (np.isnan(reported) and np.isnan(recomputed))
        bound = bound if np.isfinite(bound) else 0.0  # an infinite term agrees with itself only
        return _row(number, what, reported, recomputed, 0.0 if same else abs(reported - recomputed), bound)

    def holds(what: str, recomputed: float, error: float, bound: float = 0.0) -> Row:
        return _row(number, what, None, recomputed, error, bound)

    broken = 0
    for x, delta in zip(step.listed("x"), step.listed("delta"), strict=True):
        if delta is not None:  # of x only the moved entries: delta is 0 at a NaN that the model imputes
            broken += _not_finite(delta) + _not_finite(np.where(delta != 0, x, 0))
    penalty = penalty_size = 0.0
    terms = []
    lambda_s = config.smoothness_weight(int(step.reported("step")))
    lambda_s, mu = term_weights(config, lambda_s, [output.divergence for output in outputs])
    for what, weight in (("R_s", lambda_s), ("D_Breg", mu)):
        if weight == 0:
            continue
        term = size = 0.0
        for output in outputs:
            other = output.perturbed if what == "R_s" else output.teacher
            masked = np.isneginf(output.clean) & np.isneginf(other)
            broken += _not_finite(np.where(masked, 0, output.clean)) + _not_finite(np.where(masked, 0, other))
            mean, mean_size = output.mean(other)
            term, size = term + mean, size + mean_size
        penalty, penalty_size = penalty + weight * term, penalty_size + weight * size
        terms.append(agrees(what, term, max(relative * size, smallest)))
    yield holds("all finite", broken, broken)
    yield from terms
    yield agrees("penalty", penalty, max(relative * penalty_size, smallest))

    if lambda_s > 0:
        yield from _delta_rows(step, config, agrees, holds)
    moved = last_move(int(step.reported("step")), config) if "beta" in step.arrays else 0
    if moved > 0:
        yield agrees("beta", momentum(moved, config), 1e-12)


def _delta_rows(step: _Step, config: SMARTConfig, agrees: Any, holds: Any) -> Iterator[Row]:
    relative = bound("divergence", step.dtype(("delta",)))
    largest = longest = padding = 0.0
    moved = lost = 0
    for k, (x, delta, mask) in enumerate(zip(step.listed("x"), step.listed("delta"), step.listed("mask"), strict=True)):
        largest = np.maximum(largest, np.max(np.abs(delta)))
        longest = np.maximum(longest, _longest(x.astype(np.float64), delta.astype(np.float64), mask, config))
        if mask is not None:
            padding = np.maximum(padding, np.max(np.abs(np.where(expand_mask(mask, x), 0, delta))))
        changed = delta != 0
        moved += int(np.count_nonzero(changed))
        shifted = round_to(x.astype(delta.dtype) + delta, step.dtypes[f"x/{k}"])
        lost += int(np.count_nonzero(changed & (shifted == x)))
    vanished = lost / max(moved, 1)
    yield agrees("max_delta", float(largest), relative * float(largest))
    yield agrees("vanished", vanished, 1e-6)
    if config.projection == "ball" or config.ascent_steps > 0:
        yield holds("delta in the ball", float(longest), max(0.0, float(longest) - 1), relative)
    yield holds("delta 0 at padding", float(padding), float(padding))
    yield holds("delta not all 0", moved, float(moved == 0))
    yield holds("x + delta is not x", vanished, vanished, 0.5)


def _longest(x: Array, delta: Array, mask: Array | None, config: SMARTConfig) -> float:
    """Return max_i ||delta_i||_p / epsilon_i, at most 1 in the ball; of rescaled deltas max|delta|, at most 1."""
    ball = config.projection == "ball"
    radius = np.ones(len(x))
    if ball:
        radius = config.epsilon * (rms(x, mask) if config.scale == "rms" else radius)
    length = norms(delta, config.norm if ball else "inf", config.granularity)
    radius = radius.reshape((-1,) + (1,) * (length.ndim - 1))
    return float(np.max(np.where(length == 0, 0, length / radius)))


def _teacher_rows(steps: Sequence[_Step], config: SMARTConfig) -> Iterator[Row]:
    """Check what only several steps show: theta~ moves when theta does, and is not theta."""
    if config.mu == 0 or len(steps) < 2:
        return
    counts, distances = ([step.reported(name) for step in steps] for name in ("step", "distance"))
    stuck = len(set(counts)) == 1 and len(set(distances)) > 1
    yield _row(len(steps), "theta~ is counted", None, counts[-1] - counts[0], float(stuck), 0.0)
    later = [step for step, count in zip(steps, counts, strict=True) if count > 0]
    if len(later) > 1:  # a warm-up may begin with a learning rate of 0
        differing = sum(not np.array_equal(output.clean, output.teacher) for step in later for output in step.outputs())
        yield _row(len(steps), "theta~ is not theta", None, differing, float(differing == 0), 0.0)


def _row(step: int, what: str, reported: float | None, recomputed: float, error: float, bound: float) -> Row:
    error = float("inf") if np.isnan(error) else float(error)
    return Row(step, what, reported, float(recomputed), error, float(bound), bool(error <= bound))


def _badness(row: Row) -> tuple[bool, float]:
    return not row.ok, row.error / row.bound if row.bound > 0 else row.error


def _not_finite(values: Array) -> int:
    return int(np.count_nonzero(~np.isfinite(values)))


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], SMARTConfig, list[_Step]]:
    name = os.fspath(path)
    with open(path, "rb") as file:
        try:
            entries = np.load(file, allow_pickle=False)
            arrays = {key: entries[key] for key in entries.files}
            about = json.loads(str(arrays.pop("recording", "{}")))
        except (ValueError, EOFError, OSError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"compare_run: {name!r} is no recording, or it is damaged or cut short. Give a file that record= "
                "wrote, or record the run again"
            ) from error
    if not isinstance(about, dict) or "format" not in about:
        raise ValueError(
            f"compare_run: {name!r} is an .npz file, but not one that record= wrote. Give the file of SMART(..., "
            "record=...)"
        )
    writer = f"It was written by smartreg {about['versions']['smartreg']}. Install that one or a newer one"
    if about["format"] > FORMAT:
        raise ValueError(f"compare_run: {name!r} has format {about['format']}, this smartreg reads {FORMAT}. {writer}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SMARTWarning)  # the run had it
            config = SMARTConfig.from_dict(about["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"compare_run: {name!r} has another configuration ({error}). {writer}") from error
    steps = []
    for i, facts in enumerate(about["steps"]):
        own = {key: arrays.get(f"{i}/{key}") for key in facts["names"]}
        missing = [key for key, value in own.items() if value is None]
        if missing:
            raise ValueError(
                f"compare_run: {name!r} is damaged: step {i + 1} has no {missing[0]!r}. Record the run again"
            )
        steps.append(_Step(own, facts["dtypes"], facts["outputs"]))
    return about, config, steps
