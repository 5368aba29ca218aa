"""R_s and D_Breg of data that is not trained on: `measure()` of everything that has SMART in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from smartreg_tf.replay import State

if TYPE_CHECKING:
    from smartreg_tf.training import Engine

Tensor = Any


class Measured(NamedTuple):
    """What one batch adds.

    Attributes:
        sums: by R_s and D_Breg, of each output the sum over its examples.
        examples: how many each output has. faults: what may make them wrong.
    """

    sums: dict[str, list[Tensor]]
    examples: list[Tensor]
    faults: dict[str, Tensor]


def measure(engine: Engine, x: Any, y: Any, sample_weight: Any, batch_size: int) -> dict[str, float]:
    """As `Engine.measure`."""
    model = engine.model
    if not all(layer.built for layer in model._flatten_layers()):
        raise ValueError("SMART: measure() needs a model that has weights; call it on a batch, or fit it, before")
    sums: dict[str, Any] = {}
    examples: Any = 0.0
    with ExitStack() as undone:
        undone.callback(State(model).restore)
        if not engine.installed:  # after a fit
            engine.passes.install()
            undone.callback(engine.passes.remove)
        run = engine.measured if model.run_eagerly else tf.function(engine.measured, reduce_retracing=True)
        for number, batch in enumerate(_batches(model, x, y, sample_weight, batch_size)):
            inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(batch)
            engine.know_the_loss(inputs, labels)
            found = run(inputs, labels, weights, tf.constant(number, tf.int64))
            engine.refuse({name: bool(fault) for name, fault in found.faults.items()})
            examples = examples + np.array(found.examples, np.float64)
            for name, terms in found.sums.items():
                sums[name] = sums.get(name, 0.0) + np.array(terms, np.float64)
    return {name: float((total / np.maximum(examples, 1)).sum()) for name, total in sums.items()}


def _batches(model: Any, x: Any, y: Any, sample_weight: Any, batch_size: int) -> Iterator[Any]:
    """Batches of (x, y, sample_weight) as tensors; raw ones through a keras_hub task's preprocessor."""
    if isinstance(x, tf.data.Dataset):
        batches: Any = x
    elif isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(len(x)))
    else:
        batches = _sliced((x, y, sample_weight), batch_size)
    preprocess = getattr(model, "preprocess_samples", None)
    for batch in batches:
        if preprocess is not None:
            batch = preprocess(*keras.utils.unpack_x_y_sample_weight(batch))
        yield keras.tree.map_structure(
            lambda part: part if part is None or tf.is_tensor(part) else tf.convert_to_tensor(part), batch
        )


def _sliced(arrays: Any, batch_size: int) -> Iterator[Any]:
    arrays = keras.tree.map_structure(
        lambda part: part if part is None or tf.is_tensor(part) else np.asarray(part), arrays
    )
    n = min(len(part) for part in keras.tree.flatten(arrays) if part is not None)
    for start in range(0, n, batch_size):
        yield keras.tree.map_structure(partial(_rows, start, batch_size), arrays)


def _rows(start: int, size: int, part: Any) -> Any:
    return None if part is None else part[start : start + size]
