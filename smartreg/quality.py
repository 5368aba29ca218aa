"""Say how smooth and how well calibrated a model is: what `report` of each backend gives, before and after."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from smartreg.config import SMARTConfig, check_options

BINS = 15  # of Guo et al. 2017
# In radii of the training, evenly spaced by their logarithms: inside its ball, at it, and where it did not look.
RADII = (1 / 3, 1.0, 3.0, 10.0)


def measuring(config: SMARTConfig | None, radii: Sequence[float], batches: int | None) -> list[SMARTConfig]:
    """Return the settings that measure R_s at each radius: the ball of the training, but one ascent for all.

    The ascent is the margin start and three steps, each long enough to reach the boundary from anywhere.

    Args:
        config: of the training; None is `SMARTConfig()`.
        radii: in multiples of `config.epsilon`.
        batches: how many batches are read at most.

    Raises:
        TypeError, ValueError: one of them is not what it should be; the message says what to give.

    Example:
        >>> [ball.epsilon for ball in measuring(SMARTConfig(epsilon=0.5), (1, 3), None)]
        [0.5, 1.5]
    """
    config = SMARTConfig() if config is None else config
    check_options("report()", config)
    if config.projection == "rescale":
        raise ValueError(
            "report(): with projection='rescale' epsilon is no radius, and radii= are multiples of it. Give the ball "
            "to measure in, SMARTConfig(epsilon=0.01), say: the same before and after"
        )
    if isinstance(radii, (str, Real)) or not len(radii):
        raise ValueError(f"report(): radii must be a list of multiples of config.epsilon, got {radii!r}")
    for radius in radii:
        if isinstance(radius, bool) or not isinstance(radius, Real) or not 0 < float(radius) < math.inf:
            raise ValueError(f"report(): radii must be finite numbers > 0, multiples of config.epsilon, got {radius!r}")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, Integral) or batches < 1):
        raise ValueError(f"report(): batches must be None, for all, or a whole number >= 1, got {batches!r}")
    plain: dict[str, Any] = {"lambda_s": 1.0, "mu": 0.0, "smoothness_steps": 1, "start": "margin", "ascent_steps": 3}
    plain["dropout"] = "shared"  # a pass repeats, whatever the model draws in eval mode
    lengths = [float(radius) * config.epsilon for radius in radii]
    return [config.replace(**plain, epsilon=length, eta=100 * length) for length in lengths]


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram.

    Attributes:
        share: of the predictions that are in it.
        confidence, accuracy: their means; 0 if there are none.
    """

    share: float
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Scores:
    """What is measured of one output.

    A prediction is one class an example or a position, one label's sign, or one value. Each counts the same.

    Attributes:
        divergence: the name of l_s.
        predictions: how many there are.
        accuracy: the share that is right; None in regression.
        nll: the mean negative log-likelihood of the labels, in nats; None in regression.
        mse: the mean squared error; None but in regression.
        changes: at each radius the share that differs between f(x) and f(x + delta); in regression the mean of
            |f(x + delta) - f(x)|.
        bins: the reliability diagram: of the predicted class's probability, `BINS` of equal width; () in regression.
    """

    divergence: str
    predictions: int
    accuracy: float | None
    nll: float | None
    mse: float | None
    changes: tuple[float, ...]
    bins: tuple[Bin, ...]

    @property
    def ece(self) -> float | None:
        """Return the expected calibration error, sum_b share_b |accuracy_b - confidence_b|; None in regression.

        Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.
        """
        return sum(b.share * abs(b.accuracy - b.confidence) for b in self.bins) if self.bins else None


@dataclass(frozen=True)
class Quality:
    """How smooth and how well calibrated a model is, as `report` of a backend measured it.

    `str()` is a table, `compare` one of before against after, `plot` a picture of both.

    Attributes:
        config: the settings; norm, granularity and scale say what the radii mean.
        radii: the radii, in the unit of `config.epsilon`.
        R_s: at each radius, the outputs added up as in training: the largest divergence that the ascent found.
        scores: what is measured of each output, by its name.
        examples: how many were measured.

    Example:
        >>> scores = Scores("symmetric_kl", 8, 0.75, 0.5, None, (0.125,), (Bin(1.0, 0.5, 0.75),))
        >>> before = Quality(SMARTConfig(), (0.01,), (0.25,), {"logits": scores}, 8)
        >>> print(before)
        8 examples; radii: norm inf of each example, in rms of x
        accuracy        0.75
        ECE             0.25
        NLL              0.5
        R_s at 0.01     0.25
        flips at 0.01  0.125
        >>> before.numbers["ECE"]
        0.25
    """

    config: SMARTConfig
    radii: tuple[float, ...]
    R_s: tuple[float, ...]
    scores: dict[str, Scores]
    examples: int

    @property
    def numbers(self) -> dict[str, float]:
        """Return every number by the name that it has in the table, to be logged, say."""
        found: dict[str, float | None] = {}
        names = {name: f"{name}: " if len(self.scores) > 1 else "" for name in self.scores}
        for name, scores in self.scores.items():
            measured = {"accuracy": scores.accuracy, "ECE": scores.ece, "NLL": scores.nll, "MSE": scores.mse}
            found |= {names[name] + what: value for what, value in measured.items()}
        found |= {f"R_s at {radius:.3g}": value for radius, value in zip(self.radii, self.R_s, strict=True)}
        for name, scores in self.scores.items():
            what = names[name] + ("flips" if scores.bins else "mean change")
            found |= {f"{what} at {r:.3g}": value for r, value in zip(self.radii, scores.changes, strict=True)}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        return "\n".join([self._title(), *_aligned([[name, _shown(v)] for name, v in self.numbers.items()])])

    def compare(self, after: Quality, names: tuple[str, str] = ("before", "after")) -> str:
        """Write a table of this model, before fine-tuning, against another, after it; `names` head the columns.

        Raises:
            TypeError, ValueError: `after` was not measured in the same way; the message says what differs.

        Example:
            >>> scores = Scores("squared_error", 8, None, None, 2.0, (0.5,), ())
            >>> before = Quality(SMARTConfig(), (0.01,), (0.25,), {"values": scores}, 8)
            >>> print(before.compare(before))
            8 examples; radii: norm inf of each example, in rms of x
                                 before  after  change
            MSE                       2      2      +0
            R_s at 0.01            0.25   0.25      +0
            mean change at 0.01     0.5    0.5      +0
        """
        self._check_alike(after)
        rows = [["", *names, "change"]]
        for (name, value), other in zip(self.numbers.items(), after.numbers.values(), strict=True):
            rows.append([name, _shown(value), _shown(other), _shown(other - value, "+")])
        return "\n".join([self._title(), *_aligned(rows)])

    def plot(
        self, where: Any = None, after: Quality | None = None, names: tuple[str, str] = ("before", "after")
    ) -> Any:
        """Draw R_s and the flips against the radius, and how reliable the confidence is.

        Args:
            where: a file to be written, or a matplotlib figure or subfigure to draw into; None makes a figure.
            after: another model, to be drawn beside this one.
            names: what the two are called.

        Returns:
            the figure.

        Raises:
            ImportError: matplotlib is not installed. TypeError, ValueError: as `compare`.
        """
        if after is not None:
            self._check_alike(after)
        return draw(dict(zip(names, (self, after), strict=True)) if after is not None else {"": self}, where)

    def _title(self) -> str:
        unit = "in rms of x" if self.config.scale == "rms" else "in the units of x"
        return f"{self.examples} examples; radii: norm {self.config.norm} of each {self.config.granularity}, {unit}"

    def _check_alike(self, after: Any) -> None:
        if not isinstance(after, Quality):
            raise TypeError(f"Quality: before is compared with what report() gives, got {type(after).__name__}")
        for what, before, now in zip(_ALIKE, self._measured(), after._measured(), strict=True):
            if before != now:
                raise ValueError(
                    f"Quality: before and after must be measured alike, but {what} differ: {before} and {now}. Call "
                    "report() with the same data and settings"
                )

    def _measured(self) -> tuple[Any, ...]:
        ball = self.config.norm, self.config.granularity, self.config.scale
        return self.radii, ball, {k: (s.divergence, s.predictions) for k, s in self.scores.items()}, self.examples


_ALIKE = ("the radii", "norm, granularity and scale", "the outputs (l_s, predictions)", "the numbers of examples")


def _shown(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Align the first column to the left, and the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]


def draw(models: Mapping[str, Quality], where: Any) -> Any:
    """Draw the reports of some models into one figure."""
    try:
        from matplotlib.figure import Figure, FigureBase
    except ImportError as error:
        raise ImportError("Quality.plot needs matplotlib: pip install matplotlib") from error
    figure: Any = where if isinstance(where, FigureBase) else Figure(figsize=(11.5, 3.8), layout="constrained")
    some = next(iter(models.values()))
    classes = any(scores.bins for scores in some.scores.values())
    roughness, changes, *reliability = figure.subplots(1, 3 if classes else 2)
    for colour, (label, quality) in zip(("#c2571a", "#1f5fa8"), models.items(), strict=False):
        roughness.plot(quality.radii, quality.R_s, "o-", color=colour, label=label)
        for line, marker, (name, scores) in zip(_LINES, _MARKERS, quality.scores.items(), strict=False):
            named = f"{label} {name}".strip() if len(quality.scores) > 1 else label
            changes.plot(quality.radii, scores.changes, marker + line, color=colour, label=named)
            bars = [b for b in scores.bins if b.share > 0]
            for axes in reliability if bars else ():
                ece = f"{named}: ECE {scores.ece:.3f}" if named else f"ECE {scores.ece:.3f}"
                at, share = [b.confidence for b in bars], [150 * b.share for b in bars]
                axes.plot(at, [b.accuracy for b in bars], line, color=colour, label=ece)
                axes.scatter(at, [b.accuracy for b in bars], share, color=colour, alpha=0.6)
    ball = "radius, multiples of rms(x)" if some.config.scale == "rms" else "radius, in the units of x"
    roughness.set(xscale="log", yscale="log", xlabel=ball, ylabel="R_s", title="R_s: lower is smoother")
    flips = "predictions that flip" if classes else "mean |f(x + δ) - f(x)|"
    changes.set(xscale="log", xlabel=ball, ylabel=flips, ylim=(0, None), title="Change inside the ball")
    for axes in reliability:
        axes.plot([0, 1], [0, 1], ":", color="0.5")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title="Reliability")
    for axes in (roughness, changes, *reliability):
        axes.axvline(some.config.epsilon, color="0.7", lw=1, ls=":") if axes not in reliability else None
        axes.spines[["top", "right"]].set_visible(False)
        if any(axes.get_legend_handles_labels()[1]):
            axes.legend(frameon=False, fontsize=9)
    if isinstance(where, (str, os.PathLike)):
        figure.savefig(where, dpi=130)
    return figure


_LINES, _MARKERS = ("-", "--", "-.", ":") * 8, "os^Dv<>p" * 4
