"""Measure how smooth and how well calibrated a model is, over labelled data: before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from smartreg.config import Precision, SMARTConfig
from smartreg.quality import RADII, Quality, measuring
from smartreg.tally import IGNORED, Tallies
from smartreg_tf.measure import over_batches, summed
from smartreg_tf.options import Options
from smartreg_tf.outputs import Head, Outputs
from smartreg_tf.penalty import Penalty
from smartreg_tf.step import Step

Tensor = Any


class Seen(NamedTuple):
    """Hold what one batch gives.

    Attributes:
        R_s: at each radius, of each output the sum over its examples. n: how many each has.
        examples: how many there are.
        outputs: of each head what `Tally.add` takes: z, y and which positions count.
        perturbed: at each radius, of each head f(x + delta).
        faults: what may make them wrong.
    """

    R_s: list[list[Tensor]]
    n: list[Tensor]
    examples: Tensor
    outputs: list[tuple[Tensor, Tensor, Tensor | None]]
    perturbed: list[list[Tensor]]
    faults: dict[str, Tensor]


def report(
    model: Any,
    x: Any,
    config: SMARTConfig | None = None,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 32,
    radii: Sequence[float] = RADII,
    batches: int | None = None,
    site: Any = None,
    outputs: Outputs | None = None,
    precision: Precision = "float32",
) -> Quality:
    """Measure R_s, what flips inside the ball, accuracy and calibration of a model in eval mode.

    R_s(radius) = 1/n sum_i max_{||delta_i|| <= radius} l_s( f(x_i + delta_i), f(x_i) )

    The maximum is sought by the margin start and three ascent steps, whatever ascent the training has. So R_s and the
    flips are lower bounds, found by the same search before and after. A radius costs nine passes or so.

    The weights, the random streams, the metrics and a SMART that trains the model stay as they are.

    Args:
        model: compiled and built, or with `outputs` said.
        x: arrays as `evaluate` takes them, or a `tf.data.Dataset` or `PyDataset` of batches, which has y in it.
        config: the settings of the training: norm, granularity, scale and epsilon say what the balls are.
        y: the labels.
        sample_weight: w_i, which weighs R_s. A weight of 0 leaves a prediction out of everything, other weights count
            in R_s alone.
        radii: in multiples of `config.epsilon`.
        batches: how many are read at most; None is all.
        site, outputs, precision: as `SMARTCallback`.

    Returns:
        the numbers: `print` shows a table, `before.compare(after)` one of both, `before.plot("file.png", after)` a
        picture.

    Raises:
        TypeError, ValueError: as `SMARTCallback`; there are no labels, no batch, or the labels do not fit.

    Source: paper, equation 2; Guo et al. 2017 (arXiv 1706.04599) for the calibration error.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1, use_bias=False)])
        >>> model.compile("sgd", "mse")
        >>> model.set_weights([np.array([[1.0], [2.0], [-3.0]])])
        >>> config = SMARTConfig(scale="absolute", epsilon=0.5)
        >>> found = report(model, np.ones((4, 3)), config, np.ones((4, 1)), radii=[1, 2])
        >>> found.R_s  # (0.5 (1 + 2 + 3))**2, (1 + 2 + 3)**2
        (9.0, 36.0)
        >>> found.numbers["MSE"]
        1.0
    """
    balls = measuring(config, radii, batches)
    given = {"site": site, "outputs": outputs, "precision": precision}
    penalty = Penalty(model, balls[0], Options.of("report()", **given), None)
    tallies, heads = Tallies(balls), list[Head]()
    one = partial(_seen, penalty, balls, heads)
    refuse = partial(penalty.reports.refuse, site=penalty.site)
    data = x, y, sample_weight
    with (
        penalty.passes.installed(),
        closing(over_batches("report()", model, one, refuse, outputs is not None, data, batch_size, batches)) as found,
    ):
        for batch in found:
            names = _names(model, heads)
            for i, (name, head, of_head) in enumerate(zip(names, heads, batch.outputs, strict=True)):
                tally = tallies.of(name, head.divergence)
                z, labels, counted = of_head
                tally.add(np.asarray(z), np.asarray(labels), None if counted is None else np.asarray(counted))
                for k, perturbed in enumerate(batch.perturbed):
                    tally.change(k, np.asarray(perturbed[i]))
            tallies.add(batch.R_s, batch.n, int(batch.examples))
    return tallies.quality(config)


def _seen(
    penalty: Penalty,
    balls: Sequence[SMARTConfig],
    heads: list[Head],
    x: Any,
    y: Any,
    sample_weight: Any,
    number: Tensor,
) -> Seen:
    """Measure one batch at each radius; `heads` gets how its outputs are compared."""
    if y is None:
        raise ValueError("report(): there are no labels. Give y=, or a dataset of (x, y)")
    R_s, perturbed, faults = [], [], list[dict[str, Tensor]]()
    for ball in balls:
        penalty.config = ball
        step, of_step = penalty.of_evaluation(x, y, sample_weight, number)
        measured = summed("report()", step, of_step, y, sample_weight)
        R_s.append(measured.sums["R_s"])
        perturbed.append(step.perturbed)
        faults.append(of_step)
    heads[:] = step.heads
    outputs = [_of_head(step, i, y, sample_weight) for i in range(len(heads))]
    any_fault = {name: tf.reduce_any([of_step[name] for of_step in faults]) for name in faults[0]}
    return Seen(R_s, measured.examples, tf.shape(step.outputs[0])[0], outputs, perturbed, any_fault)


def _of_head(step: Step, i: int, y: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the outputs, the labels and which positions count."""
    head, z, counted = step.heads[i], step.outputs[i], step.positions[i]
    labels, weight = head._own(y, "labels"), head._own(sample_weight, "sample weights")
    if labels is None:
        raise ValueError(f"report(): there are no labels for output {head.place}. Give labels of each output")
    labelled = head.labelled(y)
    if labelled is not None:
        labels = tf.where(labelled, labels, tf.cast(IGNORED, labels.dtype))
    elif labels.shape.rank == z.shape.rank and head.axis is not None:
        labels = head.arranged(labels)
    if weight is not None:
        kept = weight != 0
        kept = tf.reshape(kept, tf.concat([tf.shape(kept), [1] * (z.shape.rank - 1 - kept.shape.rank)], 0))
        counted = tf.broadcast_to(kept, tf.shape(z)[:-1]) if counted is None else kept & tf.cast(counted, tf.bool)
    return z, labels, counted


def _names(model: Any, heads: Sequence[Head]) -> list[str]:
    """Name the outputs: as the model does if there are several."""
    known = list(getattr(model, "output_names", None) or [])
    several = len(heads) > 1
    return [
        (known[head.place] if head.place < len(known) else f"output {head.place}") if several else "the model's output"
        for head in heads
    ]
