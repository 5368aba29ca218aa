"""Add lambda_s R_s + mu D_Breg to a Keras model's loss; its passes, theta~ and reports are kept here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from smartreg.checking.recording import Recorder
from smartreg.config import SMARTConfig
from smartreg_tf.inputs import called
from smartreg_tf.observe import Observers, counter
from smartreg_tf.options import Options
from smartreg_tf.outputs import Head, find_heads
from smartreg_tf.passes import CleanPasses, Passes, passes_of
from smartreg_tf.report import Reports, found_in
from smartreg_tf.site import Site
from smartreg_tf.step import Step, drawn, own_key, smart_step
from smartreg_tf.teacher import Teacher

Tensor = Any


class Penalty:
    """Add lambda_s R_s + mu D_Breg to the loss of one model.

    Args: as `Engine`.

    Attributes:
        step, draws, seen: variables that count the optimiser steps, those with noise, and those with a penalty.
    """

    def __init__(self, model: Any, config: SMARTConfig, options: Options, recorder: Recorder | None) -> None:
        self.model, self.config, self.options = model, config, options
        self.site = Site(model, options.site)
        self.passes = CleanPasses(self.site)
        self.teacher = Teacher(model, config)
        self._local = threading.local()
        with model.distribute_strategy.scope():
            self.step, self.draws, self.seen = map(counter, ("smart_step", "smart_draws", "smart_repeats"))
            self.reports = Reports(config)
            self.observers = Observers(model, config, options.on_step, recorder)
        self.observers.check()
        self.observers.begin(str(self.site))

    @contextmanager
    def training_step(self, lambda_s: float) -> Iterator[None]:
        """Let `added_to` add the penalty to a step's loss inside the block; then count the step and move theta~."""
        local = self._local
        local.lambda_s, local.penalised = lambda_s, False
        before = self.iterations()
        recording: Any = nullcontext([])  # theta~ alone needs no passes
        if self.config.has_penalty:
            recording = self.passes.recording(differentiable=lambda_s > 0 and self.config.needs_clean_graph)
        with recording as recorded:
            local.recorded = recorded
            try:
                yield
            finally:
                local.recorded = None
        if not local.penalised:
            raise RuntimeError(
                "SMART: the training step never called model.compute_loss, which is where the penalty is added. Take "
                "the loss from compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)."
            )
        new = 1 if before is None else self.iterations() - before
        self.step.assign_add(new)
        self.teacher.move(self.step, new)

    def added_to(
        self, loss: Tensor, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **given: Any
    ) -> Tensor:
        """Return the loss plus lambda_s R_s + mu D_Breg; outside a training step the loss alone."""
        recorded = getattr(self._local, "recorded", None)
        if recorded is None or given.get("training") is False:
            return loss
        self._local.penalised = True
        if self._local.lambda_s == self.config.mu == 0:
            self.teacher.follow()
            return loss
        penalty = self._of_training(passes_of(recorded, y_pred), y, sample_weight)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync  # Keras sums their losses
        entries = tf.size(loss)  # the gradient of a loss that is not reduced is that of their sum
        return loss + tf.cast(penalty / tf.cast(replicas * entries, penalty.dtype), loss.dtype)

    def iterations(self) -> Tensor | None:
        """Return how many steps the model's own optimiser has taken; None without one."""
        optimizer = getattr(self.model, "optimizer", None)
        return None if optimizer is None else tf.cast(keras.ops.convert_to_tensor(optimizer.iterations), tf.int64) + 0

    def _of_training(self, passes: Passes, y: Any, sample_weight: Any) -> Tensor:
        """Return the penalty of a training step, and report it."""
        step, faults = self.take_step(passes, y, sample_weight, self._local.lambda_s)
        observed = self.reports.add(step, faults)
        if step.delta:
            self.draws.assign_add(1)
        self.seen.assign_add(1)
        self.reports.drawn = step.passes.drawn
        if self.observers.active:
            self.observers.begin(str(self.site))  # the default site may have been another before the first pass
            # after everything else, since TensorFlow numbers its own random operations as they come
            of_heads = zip(step.heads, step.outputs, step.positions, strict=True)
            weights = [head.weights(target, mask, sample_weight, y) for head, target, mask in of_heads]
            self.observers.see(step, weights, observed, self.step, self.teacher)
        return step.penalty

    def take_step(
        self, passes: Passes, y: Any, sample_weight: Any, lambda_s: float, trained: bool = True
    ) -> tuple[Step, dict[str, Tensor]]:
        """Return the step of one mini-batch and its faults; the first step must repeat if `trained`."""
        if lambda_s > 0:
            self.site.require(passes.clean.calls)
        self.teacher.follow()
        with passes.in_float32() if self.options.precision == "float32" else nullcontext(passes) as passes:
            heads = self._heads(passes, y)
            own = self._draw, self._key_of_masks
            step = smart_step(passes, heads, y, sample_weight, self.teacher, self.config, lambda_s, *own)
            wrong = [head.wrong_kind(passes.clean.outputs) for head in heads]
            faults = step.faults | {name: tf.reduce_any([each[name] for each in wrong]) for name in wrong[0]}
            if trained:
                first = tf.convert_to_tensor(self.seen.value) == 0

                def read(outputs: Any) -> list[Tensor]:
                    return [head.repeated(outputs) for head in heads]

                faults["repeat"] = passes.differ(read, step.positions, self.teacher.is_theta, first)
        self.reports.found = found_in(step, self.options.outputs)
        return step, faults

    def of_evaluation(self, x: Any, y: Any, sample_weight: Any, number: Tensor) -> tuple[Step, dict[str, Tensor]]:
        """Return the step of one batch in eval mode and its faults, with the noise of its number."""
        found, self._local.measured = self.reports.found, number
        try:
            with self.passes.recording(self.config.needs_clean_graph) as recorded, keras.StatelessScope():
                called(self.model, x, training=False)
            return self.take_step(recorded[-1], y, sample_weight, 1.0, trained=False)
        finally:
            self.reports.found, self._local.measured = found or self.reports.found, None

    def _heads(self, passes: Passes, y: Any) -> list[Head]:
        heads = find_heads(self.model, passes.clean.outputs, self.options.outputs, passes.masks, y)
        if y is None and self.reports.found is not None:  # the labels of before have shown the axes
            axes = {head.place: head.axis for head in self.reports.found.heads}
            heads = [head._replace(axis=axes.get(head.place, head.axis)) for head in heads]
        return heads

    def _draw(self, like: Tensor, run: int) -> Tensor:
        return drawn(like, run, self._number(), self.options.seed, self.options.noise)

    def _key_of_masks(self, number: int) -> Tensor:
        return own_key(-1 - number, self._number(), self.options.seed)

    def _number(self) -> Tensor:
        """Return how many steps have drawn before this one; in `measure`, the number of the batch."""
        measured = getattr(self._local, "measured", None)
        return tf.convert_to_tensor(self.draws.value) if measured is None else measured
