"""Add up, batch by batch, what `report` measures: of arrays, the same in every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartreg.config import SMARTConfig
from smartreg.quality import BINS, Bin, Quality, Scores

Array = NDArray[Any]

IGNORED = -100  # the label of a position that has none, in PyTorch and Hugging Face


class Tally:
    """Add up what is measured of one output.

    Args:
        name: what messages call the output.
        divergence: its l_s, which says what a prediction is.
        radii: how many there are.
    """

    def __init__(self, name: str, divergence: str, radii: int) -> None:
        self._name, self._divergence = name, divergence
        self._predictions = 0
        self._sums = dict.fromkeys(("right", "nll", "mse"), 0.0)
        self._changes = np.zeros(radii)
        self._bins = np.zeros((3, BINS))  # predictions, their confidence, those that are right
        self._clean: tuple[Array, Array] = np.zeros(0), np.zeros(0, bool)

    def add(self, z: Array, y: Array, counted: Array | None = None) -> None:
        """Add a batch.

        Args:
            z: f(x), (n, ..., C): logits, or values in regression.
            y: labels: classes (n, ...), or the probabilities of each, (n, ..., C); else a label or value for each z.
                Classes and labels that are -100, and values that are NaN, do not count.
            counted: true at the positions that count, (n, ...); None if all do.

        Raises:
            ValueError: the labels are not those of such outputs. FloatingPointError: an output is NaN.
        """
        z, y = _finite(self._name, np.asarray(z)), np.asarray(y)
        if self._divergence == "symmetric_kl":
            y, kept = self._classes(z, y)
        else:
            y, kept = self._values(z, y)
        if counted is not None:
            counted = np.asarray(counted) != 0
            kept = kept & (counted if kept.ndim == counted.ndim else counted[..., None])
        self._clean = z, kept
        self._predictions += int(kept.sum())
        z, y = z[kept].astype(np.float64), y[kept]
        if self._divergence == "squared_error":
            self._sums["mse"] += float(np.square(z - y).sum())
            return
        if self._divergence == "symmetric_kl":
            log_p = z - np.logaddexp.reduce(z, -1, keepdims=True)
            predicted, confidence = log_p.argmax(-1), np.exp(log_p.max(-1))
            if y.ndim == 1:
                nll, right = -np.take_along_axis(log_p, y[:, None], -1), predicted == y
            else:
                nll, right = -np.where(y > 0, y * np.where(y > 0, log_p, 0), 0), predicted == y.argmax(-1)
        else:
            nll, right = np.logaddexp(0, z) - y * z, (z > 0) == (y > 0.5)
            confidence = 1 / (1 + np.exp(-np.abs(z)))
        self._sums["right"] += float(right.sum())
        self._sums["nll"] += float(nll.sum())
        at = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        for row, weights in zip(self._bins, (None, confidence, right), strict=True):
            row += np.bincount(at, weights, BINS)

    def change(self, radius: int, z: Array) -> None:
        """Add f(x + delta) of the batch that was added last, at the radius of this place."""
        clean, kept = self._clean
        a, b = clean[kept], _finite(self._name, np.asarray(z))[kept]
        if self._divergence == "squared_error":
            changed = np.abs(a.astype(np.float64) - b)
        else:
            changed = a.argmax(-1) != b.argmax(-1) if self._divergence == "symmetric_kl" else (a > 0) != (b > 0)
        self._changes[radius] += float(changed.sum())

    def scores(self) -> Scores:
        """Return the means; ValueError if nothing has a label."""
        n = self._predictions
        if n == 0:
            raise ValueError(
                f"report(): no label of the output {self._name!r} counts: all are {IGNORED}, or masked. Give data "
                "with labels, or another mask"
            )
        right, nll, mse = (self._sums[name] / n for name in ("right", "nll", "mse"))
        counts, confidence, hits = self._bins
        filled = np.maximum(counts, 1)
        bins = zip(counts / n, confidence / filled, hits / filled, strict=True)
        changes = tuple(float(total / n) for total in self._changes)
        if self._divergence == "squared_error":
            return Scores(self._divergence, n, None, None, mse, changes, ())
        return Scores(self._divergence, n, right, nll, None, changes, tuple(Bin(*map(float, bar)) for bar in bins))

    def _classes(self, z: Array, y: Array) -> tuple[Array, Array]:
        """Return the classes, or the probabilities, and which positions have a label."""
        if y.shape == z.shape:
            if not ((y >= 0).all() and np.allclose(y.sum(-1), 1, atol=1e-3)):
                raise ValueError(
                    f"report(): the labels have the shape of the outputs ({self._name}), {y.shape}, and are no "
                    "probabilities of classes. Say what the outputs are: several labels, or values of a regression "
                    "(divergence= in PyTorch, outputs= in Keras)"
                )
            return y, np.ones(y.shape[:-1], bool)
        if y.shape == (*z.shape[:-1], 1):
            y = y[..., 0]
        if y.shape != z.shape[:-1]:
            raise self._misshapen(z, y, "(n, ...) or (n, ..., C)")
        kept = y != IGNORED
        classes = np.where(kept, y, 0)
        whole = classes.astype(np.int64)
        if (whole != classes).any() or (whole < 0).any() or (whole >= z.shape[-1]).any():
            raise ValueError(
                f"report(): the labels of the output {self._name!r} must be classes from 0 to {z.shape[-1] - 1}, or "
                f"{IGNORED} for none, got {classes.min():g} to {classes.max():g}"
            )
        return whole, kept

    def _values(self, z: Array, y: Array) -> tuple[Array, Array]:
        """Return the labels or values in the shape of z, and which there are."""
        if y.shape == z.shape[:-1] and z.shape[-1] == 1:
            y = y[..., None]
        if y.shape != z.shape:
            raise self._misshapen(z, y, "that of the outputs")
        if self._divergence == "squared_error":
            return y, ~np.isnan(y.astype(np.float64))
        kept = y != IGNORED
        if not ((y >= 0) & (y <= 1))[kept].all():
            raise ValueError(
                f"report(): the labels of the output {self._name!r} must be between 0 and 1, got {y[kept].min():g} "
                f"to {y[kept].max():g}"
            )
        return y, kept

    def _misshapen(self, z: Array, y: Array, expected: str) -> ValueError:
        return ValueError(
            f"report(): the labels have the shape {y.shape}, and the output {self._name!r} is compared as {z.shape} by "
            f"{self._divergence}. Expected are labels of the shape {expected}"
        )


class Tallies:
    """Add up the batches of one report.

    Args:
        balls: what `measuring` gave.
    """

    def __init__(self, balls: Sequence[SMARTConfig]) -> None:
        self._balls = balls
        self._heads: dict[str, Tally] = {}
        self._R_s: Any = 0.0
        self._n: Any = 0.0
        self.examples = 0

    def of(self, name: str, divergence: str) -> Tally:
        """Return the tally of an output."""
        if name not in self._heads:
            self._heads[name] = Tally(name, divergence, len(self._balls))
        return self._heads[name]

    def add(self, R_s: Sequence[Any], n: Any, examples: int) -> None:
        """Add R_s of a batch.

        Args:
            R_s: at each radius the sum over its examples; of all outputs, or of each.
            n: how many examples count, for all outputs, or for each.
            examples: how many there are.
        """
        self._R_s = self._R_s + np.array(R_s, np.float64).reshape(len(self._balls), -1)
        self._n = self._n + np.array(n, np.float64).reshape(-1)
        self.examples += examples

    def quality(self, config: SMARTConfig | None) -> Quality:
        """Return what was measured; ValueError if that is nothing."""
        if not self.examples:
            raise ValueError(
                "report(): there is no batch: the loader is empty, or an iterator that was used up. Give a "
                "DataLoader or a list, which can be read twice"
            )
        R_s = (self._R_s / np.maximum(self._n, 1)).sum(-1)
        scores = {name: tally.scores() for name, tally in self._heads.items()}
        radii = tuple(ball.epsilon for ball in self._balls)
        config = SMARTConfig() if config is None else config
        return Quality(config, radii, tuple(map(float, R_s)), scores, self.examples)


def _finite(name: str, z: Array) -> Array:
    if np.isnan(z).any():
        raise FloatingPointError(
            f"report(): the output {name!r} is NaN at x or at x + delta. Look at the weights of the model, and at "
            "the loss of its training"
        )
    return z
