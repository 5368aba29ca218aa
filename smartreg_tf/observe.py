"""Show each training step to its observers: the tensors out of the graph, as NumPy arrays."""

from __future__ import annotations

import weakref
from collections import deque
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from smartreg.checking.recording import Recorder
from smartreg.config import SMARTConfig
from smartreg.proximal import last_move
from smartreg.report import Observer, StepSeen
from smartreg_tf.divergences import as_mask
from smartreg_tf.perturbation import floating
from smartreg_tf.proximal import momentum
from smartreg_tf.step import Step
from smartreg_tf.teacher import Teacher

Tensor = Any


class _Layout(NamedTuple):
    """Hold what a traced step gives besides its values: names of scalars, lists of tensors, and their dtypes."""

    scalars: list[str]
    lists: dict[str, list[bool]]
    dtypes: dict[str, str]
    outputs: list[dict[str, Any]]

    def seen(self, values: list[Any]) -> tuple[StepSeen, dict[str, float]]:
        """Put the values of a step into their places."""
        found = dict(zip(self.scalars, map(float, values), strict=False))
        arrays = iter(values[len(self.scalars) :])
        lists = {name: [next(arrays) if there else None for there in places] for name, places in self.lists.items()}
        step, own = int(found.pop("step")), {"distance": found.pop("distance")} if "distance" in found else {}
        metrics = {name: value for name, value in found.items() if name != "beta" or not np.isnan(value)}
        divergences = [output["divergence"] for output in self.outputs]
        return StepSeen(step=step + 1, **lists, divergences=divergences, metrics=metrics), own


class Observers:
    """Show each step, after it was taken, to the recorder and the user's own function.

    Args:
        on_step: is called with a `smartreg.report.StepSeen`.
        recorder: takes the first steps.
    """

    def __init__(self, model: Any, config: SMARTConfig, on_step: Observer | None, recorder: Recorder | None) -> None:
        self._model, self._config, self._on_step = model, config, on_step
        self._recorder = None if recorder is None or recorder.done else recorder
        self._waiting: deque[tuple[int, _Layout, list[Any]]] = deque()
        self._count: Any = None
        if self._recorder is not None:
            weakref.finalize(self, self._recorder.write)  # if a fit broke off and no other one follows
        if self.active:
            self._count = counter("smart_seen")

    @property
    def active(self) -> bool:
        """Tell whether anyone wants to see a step."""
        return self._on_step is not None or (self._recorder is not None and not self._recorder.done)

    def begin(self, site: str) -> None:
        """Tell the recorder what runs."""
        if self._recorder is not None:
            packages = {"tensorflow": tf.__version__, "keras": keras.__version__}
            self._recorder.begin("tensorflow", packages, self._config, site)

    def check(self) -> None:
        """Raise ValueError if the step cannot give its tensors away."""
        if not self.active:
            return
        argument = "on_step" if self._on_step is not None else "record"
        strategy = self._model.distribute_strategy
        if strategy.num_replicas_in_sync > 1:
            raise ValueError(
                f"SMART: {argument}= needs one device, and this {type(strategy).__name__} has "
                f"{strategy.num_replicas_in_sync}. Give it in a short run without the strategy: it trains alike."
            )
        if getattr(self._model, "compiled", False) and self._model.jit_compile:
            raise ValueError(
                f"SMART: {argument}= cannot take tensors out of a step that XLA compiles. Say compile(..., "
                "jit_compile=False) for such a run; Keras' default, 'auto', turns XLA on where there is a GPU."
            )

    def see(self, step: Step, weights: list[Any], observed: dict[str, Tensor], count: Any, teacher: Teacher) -> None:
        """Keep a step's tensors for `tell`; in a graph, each time it runs.

        Args:
            weights: w_i of each head.
            observed: max_delta and vanished.
            count: the variable that counts the optimiser steps.
        """
        of_runs = ("x", "delta", "mask") if step.delta else ()
        lists = {name: getattr(step, name) if name in of_runs else [] for name in ("x", "delta", "mask")}
        lists |= {name: getattr(step, name) for name in ("outputs", "perturbed", "teacher", "positions")}
        lists["sample_weight"] = weights
        number = tf.convert_to_tensor(count.value)
        index = tf.convert_to_tensor(self._count.value)
        there = {name: [tensor is not None for tensor in tensors] for name, tensors in lists.items()}
        named = [(f"{name}/{k}", z) for name, zs in lists.items() for k, z in enumerate(zs) if z is not None]
        # the weights have the loss's reduction in them already
        outputs = [{"divergence": head.divergence, "weight": head.weight, "by_weights": False} for head in step.heads]
        scalars = {**step.terms, **observed, "penalty": step.raw, "step": number}

        def out() -> Tensor:
            values = scalars | self._of_teacher(number, teacher)
            layout = _Layout(list(values), there, {name: tensor.dtype.name for name, tensor in named}, outputs)
            arrays = [floating(z) if z.dtype.is_floating else as_mask(z) for _, z in named]
            flat = [*(tf.cast(value, tf.float64) for value in values.values()), *arrays]
            return tf.numpy_function(partial(self._keep, layout), [index, *map(tf.stop_gradient, flat)], tf.int64)

        if self._on_step is not None:
            out()
        else:
            assert self._recorder is not None
            tf.cond(index < self._recorder.steps, out, lambda: index)
        self._count.assign_add(1)

    def tell(self) -> None:
        """Show the steps that were kept."""
        while self._waiting:
            index, layout, values = self._waiting.popleft()
            seen, own = layout.seen(values)
            if self._recorder is not None:
                scalars = seen.metrics | own | {"step": seen.step - 1}
                self._recorder.add(seen.tensors(), scalars, layout.dtypes, layout.outputs, index)
            if self._on_step is not None:
                self._on_step(seen)

    def close(self) -> None:
        """End the observation: let the recorder write the steps that it has."""
        if self._recorder is not None:
            self._on_step = None
            self.tell()
            self._recorder.close()

    def _of_teacher(self, step: Tensor, teacher: Teacher) -> dict[str, Tensor]:
        """Return beta of theta~'s last move, NaN before the first, and max|theta - theta~|."""
        if not self._config.has_teacher:
            return {}
        moved = last_move(step, self._config)
        return {"beta": tf.where(moved > 0, momentum(moved, self._config), np.nan), "distance": teacher.distance()}

    def _keep(self, layout: _Layout, index: Any, *values: Any) -> Any:
        self._waiting.append((int(index), layout, [np.array(value) for value in values]))  # the memory is used again
        return index


def counter(name: str) -> Any:
    """Make a variable that counts steps."""
    return keras.Variable(np.int64(0), dtype="int64", trainable=False, name=name, aggregation="only_first_replica")
