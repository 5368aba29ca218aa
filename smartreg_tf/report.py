"""Report what training steps found: averages for the logs, faults that a compiled step counts, `describe()`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.report import LATER, STILL, Choice, Description, not_finite, past_the_end, suspicions, too_small
from smartreg_tf.candidates import not_the_batch
from smartreg_tf.outputs import Head
from smartreg_tf.passes import half_precision_layers
from smartreg_tf.replay import refusal
from smartreg_tf.site import Site
from smartreg_tf.step import Step, shifted

Tensor = Any

# What may go wrong in a compiled step: passes in which something is not finite, what is warned of, what raises.
_NOT_FINITE = ("clean", "perturbed", "teacher")
_WARNINGS = {"vanished": too_small("over half"), "still": STILL}
_FAULTS = (*_NOT_FINITE, *_WARNINGS, "unnormalised", "normalised", "shared", "repeat")
_LOGS = {"R_s": "smoothness", "D_Breg": "proximal"}


class Reports:
    """Keep what the training steps of a model found.

    Attributes:
        faults: how often each of them was counted since the last `judge`.
        found: what the last traced step chose; None before the first.
        drawn: the operations of the step that draw anew in every pass.
        skipped: the steps without a finite penalty.
        warned: what was warned of, which is said once.
    """

    def __init__(self, config: SMARTConfig) -> None:
        self._config = config
        self.found: Found | None = None
        self.drawn: list[str] = []
        self.skipped = 0
        self.warned: set[str] = set()
        self._last: dict[str, float] = {}
        # the sum over the replicas
        self.faults = keras.Variable(
            np.zeros(len(_FAULTS), np.int64),
            dtype="int64",
            trainable=False,
            name="smart_faults",
            aggregation="sum",
            synchronization="on_read",
        )
        weights = {"R_s": config.lambda_s, "D_Breg": config.mu}
        self._terms = {name: keras.metrics.Mean(name=_LOGS[name]) for name, weight in weights.items() if weight > 0}
        self._observed = {name: keras.metrics.Mean(name=name) for name in ("max_delta", "vanished")}

    def add(self, step: Step, faults: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add a training step to the averages; return its max_delta and vanished, if it has a perturbation."""
        examples = tf.shape(step.outputs[0])[0]
        for name, term in step.terms.items():
            self._terms[name].update_state(tf.stop_gradient(term), sample_weight=examples)
        observed = observe(step) if step.delta else {}
        for name, value in observed.items():
            self._observed[name].update_state(value)
        self.count(faults | suspicions(observed, self._config.start) if observed else faults)
        return observed

    def count(self, faults: Mapping[str, Tensor]) -> None:
        """Count faults for `judge`."""
        self.faults.assign_add(tf.stack([tf.cast(faults.get(name, False), tf.int64) for name in _FAULTS]))

    @property
    def logs(self) -> dict[str, Tensor]:
        """Return R_s as `smoothness` and D_Breg as `proximal`, as Keras' logs have them."""
        return {metric.name: metric.result() for metric in self._terms.values()}

    @property
    def means(self) -> dict[str, float]:
        """Return R_s, D_Breg, max_delta and vanished, averaged since `reset`; before a new step, as they were then."""
        metrics = self._terms | self._observed
        means = {name: float(metric.result()) for name, metric in metrics.items()}
        begun = any(float(tf.convert_to_tensor(metric.count.value).numpy()) for metric in metrics.values())
        return means if begun else means | self._last

    def reset(self) -> None:
        """Begin new averages, as Keras does with each epoch and each evaluation."""
        self._last = self.means
        for metric in (*self._terms.values(), *self._observed.values()):
            metric.reset_state()

    def judge(self, step: Callable[[], int], site: Any) -> None:
        """Raise or warn about what compiled steps could only count, and warn beyond `total_steps`.

        Args:
            step: counts the optimiser steps taken.

        Raises:
            FloatingPointError: a penalty was not finite, and `non_finite` is "raise".
            RuntimeError, ValueError: as `refuse`.
        """
        total = self._config.total_steps
        if total is not None and self._config.needs_total_steps and "total_steps" not in self.warned:
            taken = step()
            if taken > total:
                self.warned.add("total_steps")
                warnings.warn(past_the_end(taken, total), SMARTWarning, stacklevel=2)
        # Reading waits for the device, every step: a fault has to be raised before on_train_batch_end, where a
        # checkpoint may be written, and a step that XLA compiles cannot raise by itself.
        counts = dict(zip(_FAULTS, tf.convert_to_tensor(self.faults.value).numpy().tolist(), strict=True))
        if not any(counts.values()):
            return
        self.faults.assign(np.zeros(len(_FAULTS), np.int64))
        self.refuse(counts, site)
        for name, message in _WARNINGS.items():
            if counts[name] and name not in self.warned:
                self.warned.add(name)
                warnings.warn(message, SMARTWarning, stacklevel=2)
        broken = [name for name in _NOT_FINITE if counts[name]]
        if broken:
            self.skipped += max(counts[name] for name in broken)
            if self._config.non_finite == "raise":
                raise FloatingPointError(not_finite(step(), broken[0], {}))

    def refuse(self, counts: Mapping[str, Any], site: Any) -> None:
        """Raise if a pass did not repeat, the outputs are of another kind, or the site has not one x an example."""
        if counts.get("repeat"):
            raise RuntimeError(refusal(self.drawn))
        if counts["unnormalised"]:
            raise ValueError(
                "SMART: the outputs should be probabilities, by the compiled loss or outputs=, but they are negative, "
                "above 1 or do not sum to 1. Give the loss from_logits=True (and outputs='logits' or 'label_logits'), "
                "or a softmax or sigmoid layer."
            )
        if counts["shared"]:
            raise ValueError(not_the_batch(site, "another number of them than the batch has examples"))
        if counts["normalised"]:
            raise ValueError(
                "SMART: the outputs should be logits, by the compiled loss or outputs=, but every row of them is "
                "positive and sums to 1. Give the loss from_logits=False (and outputs='probabilities'), or no softmax."
            )


class Found(NamedTuple):
    """Keep of a training step which outputs were compared, and what `describe` says of it."""

    heads: Sequence[Head]
    choices: dict[str, Choice]


def found_in(step: Step, outputs: Any) -> Found:
    """Say what was perturbed and compared in a step; `outputs` is the argument of that name."""
    heads, passes = step.heads, step.passes
    axes = ["none: one value a token" if head.axis is None else str(head.axis) for head in heads]
    runs = len(passes.clean.calls)
    columns = {
        "x": ((_shape(call.x) for call in passes.clean.calls), f"{runs} run(s) of the site in a step"),
        "outputs": ((_named(passes.site.model, head) for head in heads), _why_outputs(outputs, heads)),
        "l_s": ((head.divergence for head in heads), "it follows from the kind of output"),
        "class axis": (axes, "the loss's axis, else the one that its labels lack, else the last"),
    }
    choices = {name: Choice(", ".join(values), why) for name, (values, why) in columns.items()}
    masked = _shapes(step.mask)
    why = "x has no mask" if masked == "all" else "Keras' mask, or the padding mask among the inputs"
    choices["mask"] = Choice(masked, why)
    counted = _shapes(step.positions)
    why = f"the outputs are compared as {', '.join(map(_shape, step.outputs))}"
    if counted != "all":
        why += ", by their mask or that of x"
    elif all(z.shape.rank == 2 for z in step.outputs):
        counted = "one an example"
    choices["positions"] = Choice(counted, why)
    return Found(heads, choices)


def observe(step: Step) -> dict[str, Tensor]:
    """Return max|delta|, and the fraction of the entries with delta != 0 in which x + delta == x."""
    moved = lost = tf.zeros([], tf.float32)
    for x, delta in zip(step.x, step.delta, strict=True):
        changed = delta != 0
        moved += tf.reduce_sum(tf.cast(changed, tf.float32))
        lost += tf.reduce_sum(tf.cast(changed & (shifted(x, delta) == x), tf.float32))
    return {
        "vanished": tf.math.divide_no_nan(lost, moved),
        "max_delta": tf.reduce_max([tf.reduce_max(tf.abs(delta)) for delta in step.delta]),
    }


def describe(model: Any, site: Site, precision: str, found: Found | None) -> Description:
    """Say what was chosen and why, by the names that every backend has.

    Example:
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        >>> describe(model, Site(model), "float32", None)["site"]
        Choice(value="the model's float inputs", why='no token Embedding or Masking layer makes one x an example')
    """
    known = {"site": Choice(str(site), site.why)} | LATER | ({} if found is None else found.choices)
    return Description(known | {"precision": _precision(model, precision)})


def _why_outputs(outputs: Any, heads: Sequence[Head]) -> str:
    """Say who named the kinds, and what else R_s and D_Breg take over from the losses."""
    said = ["the compiled loss" if outputs is None else "outputs="]
    said += [f"reduction={head.reduction!r}" for head in heads if head.reduction != "sum_over_batch_size"]
    said += [f"ignore_class={head.ignore_class}" for head in heads if head.ignore_class is not None]
    return ", ".join(dict.fromkeys(said))


def _named(model: Any, head: Head) -> str:
    names = getattr(model, "output_names", None) or []
    return f"{names[head.place]}: {head.kind}" if len(names) > 1 else head.kind


def _shapes(masks: Sequence[Tensor | None]) -> str:
    shapes = ["all" if mask is None else _shape(tf.convert_to_tensor(mask)) for mask in masks]
    return "all" if set(shapes) == {"all"} else ", ".join(shapes)


def _precision(model: Any, precision: str) -> Choice:
    half = half_precision_layers(model)
    if half and precision == "float32":
        return Choice("float32", f"the model computes in {half[0].compute_dtype}, which would lose R_s")
    return Choice(model.compute_dtype, "precision='model'" if half else "the model's own")


def _shape(x: Tensor) -> str:
    sizes = ["n" if size is None else str(size) for size in x.shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
