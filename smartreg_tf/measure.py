"""Measure R_s and D_Breg of data that is not trained on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from smartreg_tf import compat
from smartreg_tf.build import is_built
from smartreg_tf.inputs import called
from smartreg_tf.replay import State
from smartreg_tf.step import Step

Tensor = Any


class Measured(NamedTuple):
    """Hold what one batch adds.

    Attributes:
        sums: by R_s and D_Breg, of each output the sum over its examples.
        examples: how many each output has.
        faults: what may make them wrong.
    """

    sums: dict[str, list[Tensor]]
    examples: list[Tensor]
    faults: dict[str, Tensor]


def measure(
    model: Any,
    run: Callable[..., tuple[Step, dict[str, Tensor]]],
    refuse: Callable[[dict[str, bool]], None],
    kinds_known: bool,
    data: tuple[Any, Any, Any],
    batch_size: int,
) -> dict[str, float]:
    """Average R_s and D_Breg over data that is not trained on, in eval mode.

    Args:
        run: gives what one batch gives, from x, y, the sample weights and the batch's number.
        refuse: raises an error because of faults.
        kinds_known: whether the kinds of the outputs are known without the compiled loss.
        data: x, y and the sample weights.
    """
    sums: dict[str, Any] = {}
    examples: Any = 0.0
    for found in over_batches("measure()", model, partial(_measured, run), refuse, kinds_known, data, batch_size):
        examples = examples + np.array(found.examples, np.float64)
        for name, terms in found.sums.items():
            sums[name] = sums.get(name, 0.0) + np.array(terms, np.float64)
    return {name: float((total / np.maximum(examples, 1)).sum()) for name, total in sums.items()}


def over_batches(
    call: str,
    model: Any,
    one: Callable[..., Any],
    refuse: Callable[[dict[str, bool]], None],
    kinds_known: bool,
    data: tuple[Any, Any, Any],
    batch_size: int,
    batches: int | None = None,
) -> Generator[Any, None, None]:
    """Yield what `one` finds in each batch, which has faults; at the end the model's layers are as they were.

    Args:
        call: what the user called, for messages.
        one: gives what one batch gives, from x, y, the sample weights and the batch's number.
        batches: how many are read at most.
        refuse, kinds_known, data: as `measure`.
    """
    if not is_built(model):
        raise ValueError(f"SMART: {call} needs a model that has weights. Call it on a batch, or fit it, before")
    before = State(model)
    one = one if model.run_eagerly else tf.function(one, reduce_retracing=True, autograph=False)
    try:
        for number, batch in enumerate(itertools.islice(_batches(model, *data, batch_size), batches)):
            inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(batch)
            if not kinds_known:
                _know_the_loss(call, model, inputs, labels)
            found = one(inputs, labels, weights, tf.constant(number, tf.int64))
            refuse({name: bool(fault) for name, fault in found.faults.items()})
            yield found
    finally:
        before.restore()


def _measured(run: Callable[..., Any], x: Any, y: Any, sample_weight: Any, number: Tensor) -> Measured:
    step, faults = run(x, y, sample_weight, number)
    return summed("measure()", step, faults, y, sample_weight)


def summed(call: str, step: Step, faults: dict[str, Tensor], y: Any, sample_weight: Any) -> Measured:
    """Sum R_s and D_Breg of a batch over its examples."""
    heads = [head._replace(reduction="sum_over_batch_size") for head in step.heads]
    left_out = next((head.ignore_class for head in heads if head.ignore_class is not None), None)
    if y is None and left_out is not None:
        raise ValueError(
            f"SMART: {call} needs y: the loss leaves out the label {left_out} by its ignore_class, and so do R_s and "
            "D_Breg. Give y"
        )
    examples = [head.examples(target, y) for head, target in zip(heads, step.outputs, strict=True)]
    sums = {
        name: [
            head.weight * n * head.mean(a, b, mask, sample_weight, y)
            for head, n, a, b, mask in zip(heads, examples, other, step.outputs, step.positions, strict=True)
        ]
        for name, other in {"R_s": step.perturbed, "D_Breg": step.teacher}.items()
        if other
    }
    return Measured(sums, examples, faults)


def _know_the_loss(call: str, model: Any, x: Any, y: Any) -> None:
    """Let Keras see which output each compiled loss is of, as its first step would."""
    losses = compat.loss_container(model)
    if losses is None or losses.built:
        return
    if y is None:
        raise ValueError(
            f"SMART: {call} needs y before the first step, or outputs=, to know what the outputs are. Give one of "
            "the two"
        )
    with keras.StatelessScope():
        y_pred = called(model, x, training=False)
    losses.build(y, y_pred)


def _batches(model: Any, x: Any, y: Any, sample_weight: Any, batch_size: int) -> Iterator[Any]:
    """Yield batches of (x, y, sample_weight) as tensors; raw ones go through a keras_hub task's preprocessor."""
    if isinstance(x, tf.data.Dataset):
        batches: Any = x
    elif isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(len(x)))
    else:
        batches = _sliced((x, y, sample_weight), batch_size)
    for batch in batches:
        batch = compat.preprocessed(model, batch)
        yield keras.tree.map_structure(
            lambda part: part if part is None or tf.is_tensor(part) else tf.convert_to_tensor(part), batch
        )


def _sliced(arrays: Any, batch_size: int) -> Iterator[Any]:
    arrays = keras.tree.map_structure(
        lambda part: part if part is None or tf.is_tensor(part) else np.asarray(part), arrays
    )
    n = min(len(part) for part in keras.tree.flatten(arrays) if part is not None)
    for rows in (slice(start, start + batch_size) for start in range(0, n, batch_size)):
        yield keras.tree.map_structure(lambda part, rows=rows: None if part is None else part[rows], arrays)
