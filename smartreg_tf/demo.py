"""Train the network of `python -m smartreg demo` in Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from smartreg.config import SMARTConfig
from smartreg.demo.compare import RATE, Outcome, Task, outcome
from smartreg.demo.digits import (
    BATCH,
    CONFIG,
    DROPOUT,
    HIDDEN,
    LEARNING_RATE,
    PARAMETERS,
    Array,
    Weights,
    batches,
    standard_normal,
)
from smartreg_tf.callback import attach


def network(weights: Weights, optimizer: Any, seed: int, dropout: float = DROPOUT) -> Any:
    """Build and compile two ReLU layers with dropout, and a head, in the precision of the weights."""
    dtype = weights["W1"].dtype.name
    layers: list[Any] = [keras.Input([len(weights["W1"])], dtype=dtype)]
    for k in range(2):
        layers.append(keras.layers.Dense(HIDDEN, activation="relu", dtype=dtype))
        layers.append(keras.layers.Dropout(dropout, seed=2 * seed + k, dtype=dtype))  # the same for every method
    model = keras.Sequential([*layers, keras.layers.Dense(10, dtype=dtype)])
    model.set_weights([weights[name] for name in PARAMETERS])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype))
    return model


def train(weights: Weights, x: Array, y: Array, config: SMARTConfig, seed: int) -> Weights:
    """Run Algorithm 1. With lambda_s = mu = 0 it is plain training."""
    model = network(weights, keras.optimizers.Adam(LEARNING_RATE), seed)
    steps = config.total_steps or 0
    noise = tf.constant(standard_normal(seed)((steps, BATCH, x.shape[1])))
    with attach(model, config, noise=lambda step, like: tf.gather(noise, step)):
        for at in batches(len(x), BATCH, steps, seed):
            model.train_on_batch(x[at], y[at])
    return dict(zip(PARAMETERS, model.get_weights(), strict=True))


def run(task: Task) -> Outcome:
    """Train in float64 on what every backend gets."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")  # of the logs
    try:
        model = network(task.weights, keras.optimizers.SGD(RATE), seed=0, dropout=0)
        noise, terms = tf.constant(task.noise), []
        with attach(model, CONFIG, noise=lambda step, like: tf.gather(noise, step)) as smart:
            for x, y in zip(task.x, task.y, strict=True):
                logs = model.train_on_batch(x, y, return_dict=True)
                terms.append((float(logs["loss"]), float(logs["smoothness"]), float(logs["proximal"])))
            teacher = [np.asarray(keras.ops.convert_to_numpy(value)) for value in smart.averages]
            return outcome(terms, model.get_weights(), teacher)
    finally:
        keras.config.set_floatx(floatx)
