"""Measure what l_s costs in TensorFlow at a vocabulary's size, beside a cross entropy of the same logits.

python benchmarks/vocabulary_tf.py

A row is a forward and a backward pass. All rows take turns in each round: the ratio to the cross entropy of the same
round, its median and quartiles, in seconds of the processor. A peak is of a process of its own, in tensors of the
logits' size, the logits and their gradients included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from memory import in_a_process, now, peak
from ratios import in_turn, spread
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from smartreg_tf.divergences import symmetric_kl

ROWS = (
    "cross entropy",
    "textbook symmetric KL",
    "symmetric_kl",
    "symmetric_kl, one gradient",
    "symmetric_kl, 15% of the positions",
)


def textbook(a: Any, b: Any) -> Any:
    log_p, log_q = tf.nn.log_softmax(a), tf.nn.log_softmax(b)
    return tf.reduce_sum((tf.exp(log_p) - tf.exp(log_q)) * (log_p - log_q), -1)


def make(name: str, mode: str, batch: int, length: int, vocabulary: int) -> Callable[[], Any]:
    """Return the forward and backward pass of a row."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((batch, length, vocabulary), np.float32)
    second = first + np.float32(0.01) * rng.standard_normal(first.shape, np.float32)
    labels = tf.constant(rng.integers(vocabulary, size=(batch, length)))
    keep = tf.constant(rng.random((batch, length)) < 0.15)
    a, b = tf.constant(first), tf.constant(second)
    value: Callable[[Any, Any], Any] = {
        "cross entropy": lambda a, b: keras.losses.sparse_categorical_crossentropy(labels, a, from_logits=True),
        "textbook symmetric KL": textbook,
        "symmetric_kl, 15% of the positions": lambda a, b: symmetric_kl(a, b, keep),
    }.get(name, symmetric_kl)
    by = 1 if name in ("cross entropy", "symmetric_kl, one gradient") else 2

    def step(a: Any, b: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([a, b][:by])
            mean = tf.reduce_mean(value(a, b))
        return mean, tape.gradient(mean, [a, b][:by])

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla", autograph=False)
    return lambda: step(a, b)


def seconds(step: Callable[[], Any]) -> float:
    started = time.process_time()
    step()[0].numpy()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--one", nargs=5, help=argparse.SUPPRESS)
    add("--mode", nargs="+", choices=("eager", "graph", "xla"), default=["graph", "xla"])
    add("--batch", type=int, default=4)
    add("--length", type=int, default=64)
    add("--vocabulary", type=int, default=50257)
    add("--rounds", type=int, default=5)
    add("--row", nargs="+", choices=ROWS, default=list(ROWS), help="the cross entropy is always among them")
    add("--threads", type=int, default=1)
    add("--json", type=Path, default=Path("out/vocabulary_tf.json"))
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    if args.one:
        name, mode, *sizes = args.one
        step = make(name, mode, *map(int, sizes))
        before = now("cpu")
        for _ in range(2):
            step()[0].numpy()
        print(json.dumps({"MB": peak("cpu") - before}))
        return
    names, sizes = list(dict.fromkeys([ROWS[0], *args.row])), (args.batch, args.length, args.vocabulary)
    console, rng, found = Console(highlight=False, width=110), random.Random(0), {}
    for mode in args.mode:
        steps = {name: make(name, mode, *sizes) for name in names}
        for step in steps.values():
            step()
        timed = {name: partial(seconds, step) for name, step in steps.items()}
        rounds = [in_turn(timed, dict, rng) for _ in range(args.rounds)]
        del steps, step, timed
        tensor = 4 * math.prod(sizes) / 2**20
        peaks = {}
        table = Table(title=f"{mode}, {' x '.join(map(str, sizes))}, {args.threads} threads", box=SIMPLE_HEAD)
        for head in ("", "x cross entropy (quartiles)", "peak, tensors"):
            table.add_column(head, justify="right" if head else "left", no_wrap=True)
        for name in names:
            inputs = 1 if name == "cross entropy" else 2
            peaks[name] = in_a_process(__file__, name, mode, *sizes)["MB"] / tensor + inputs
            ratio = spread([taken[name] / taken[names[0]] for taken in rounds])
            table.add_row(name, ratio, f"{peaks[name]:.1f}")
        console.print(table)
        found[mode] = {"rounds": rounds, "peaks": peaks}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"tensorflow": tf.__version__, "sizes": sizes, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
