"""Raise an exception at every place of a Keras fit with SMART, and see that the model is as before: a table.

    python tools/faults_tf.py [--rounds 1]

Each place is broken in turn, in eager mode and in a graph, at its first and a later run, with SMARTCallback first and
last in the list or with attach(), with and without the proximal term. Afterwards the attributes of the model, its
layers and its optimiser, the number of its variables, NumPy's stream, the files that a save writes and a plain step
must be those of a model that never had SMART, and its weights finite.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from smartreg_tf import SMARTCallback, SMARTConfig, attach
from smartreg_tf.site import Site
from smartreg_tf.training import Engine

X, Y = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 2

CALLBACK = [f"on_{what}_{when}" for what in ("train", "epoch", "train_batch") for when in ("begin", "end")]
CALLBACK += ["set_model", "on_test_begin", "on_test_end"]
OWN = ["set_model", "on_train_begin", "on_train_end"]
ENGINE = ["__init__", "install", "make_train_function", "train_step", "compute_loss", "_terms", "_ascend", "_differs"]
ENGINE += ["_penalty", "_update", "_report", "reset_metrics", "save_state", "_draw", "_observe", "_count"]
SITE = ["install", "repeat", "recording", "_on_root", "_seen"]


class InjectedError(Exception):
    """What every fault here raises."""


def small(eager: bool) -> Any:
    """A model that has done everything once that plain Keras leaves on it."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.Dense(3), keras.layers.Dropout(0.2), keras.layers.Dense(2)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, run_eagerly=eager, jit_compile=False)
    model.fit(X, Y, validation_data=(X, Y), verbose=0)
    return model


def held(model: Any) -> dict[Any, Any]:
    """What is on the model and its layers."""
    return {
        (place, name): value
        for place, owner in enumerate([*model._flatten_layers(), model.optimizer])
        for name, value in vars(owner).items()
        if name not in ("history", "_eval_epoch_iterator")
    }


def broken(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, raising in its `at`-th run."""
    runs = itertools.count(1)

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if next(runs) == at:
            raise InjectedError
        return function(*args, **kwargs)

    return breaks


class Other(keras.callbacks.Callback):  # type: ignore[misc]
    """Another callback, one of whose methods raises."""

    def __init__(self, method: str, at: int) -> None:
        super().__init__()
        setattr(self, method, broken(getattr(self, method), at))


def places() -> Iterator[tuple[str, Callable[[Any, int], Any]]]:
    """Each place by name, and what breaks it: it gives (undo, more callbacks)."""
    for method in CALLBACK:
        yield f"another callback's {method}", lambda model, at, method=method: (None, [Other(method, at)])
    for owner, methods in ((SMARTCallback, OWN), (Engine, ENGINE), (Site, SITE)):
        for method in methods:

            def put(model: Any, at: int, owner: Any = owner, method: str = method) -> Any:
                original = getattr(owner, method)
                setattr(owner, method, broken(original, at))
                return lambda: setattr(owner, method, original), []

            yield f"{owner.__name__}.{method}", put
    for number, name in enumerate(("the first layer's call", "the dropout's call", "the last layer's call")):

        def layer(model: Any, at: int, number: int = number) -> Any:
            chosen = model.layers[number]
            original = chosen.call
            chosen.call = broken(original, at)
            return lambda: delattr(chosen, "call"), []

        yield name, layer


def as_before(model: Any, before: dict[Any, Any], variables: int) -> str:
    """What is not as it was; empty where all is."""
    after, none = held(model), object()
    left = sorted(key[1] for key in {*before, *after} if before.get(key, none) is not after.get(key, none))
    if left:
        return f"left: {left[:4]}"
    if len(model.variables) != variables:
        return "left: variables"
    if any(not np.isfinite(weight).all() for weight in model.get_weights()):
        return "weights that are not finite"
    with tempfile.TemporaryDirectory() as folder:
        model.save_weights(f"{folder}/plain.weights.h5")
        if os.listdir(folder) != ["plain.weights.h5"]:
            return "a save writes more"
    logs = model.train_on_batch(X, Y, return_dict=True)
    return "" if set(logs) == {"loss"} else "a step that is not plain"


def inject(put: Callable[[Any, int], Any], eager: bool, at: int, first: bool, mu: float, attached: bool) -> str | None:
    """One fault; None where the place does not run that often."""
    model = small(eager)
    before, variables = held(model), len(model.variables)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    config = SMARTConfig(mu=mu, total_steps=20)
    undo: Any = None
    try:
        undo, more = put(model, at)
        if attached:
            with attach(model, config):
                model.fit(X, Y, batch_size=4, validation_data=(X, Y), verbose=0, callbacks=more)
        else:
            callbacks = [SMARTCallback(config), *more]
            model.fit(X, Y, batch_size=4, validation_data=(X, Y), verbose=0, callbacks=callbacks[:: 1 if first else -1])
        return None
    except Exception as error:
        if "InjectedError" not in repr(error) and "InjectedError" not in str(error):
            return f"another error: {type(error).__name__}: {error}"[:200]
    finally:
        if undo is not None:
            undo()
    if state != np.random.get_state()[1].tolist():  # noqa: NPY002
        return "NumPy's stream moved"
    return as_before(model, before, variables)


def table(rounds: int = 1, only: str = "") -> tuple[str, int]:
    """The table as Markdown, and how many faults left something."""
    done: Counter[str] = Counter()
    good: Counter[str] = Counter()
    problems: list[str] = []
    for name, put in places():
        if only not in name:
            continue
        group = name.split(".")[0].split("'s")[0]
        ways = itertools.product((True, False), range(1, rounds + 2), (True, False), (0.0, 1.0), (False, True))
        for eager, at, first, mu, attached in ways:
            if attached and (not first or name.startswith("SMARTCallback")):
                continue
            problem = inject(put, eager, at, first, mu, attached)
            if problem is None:
                continue
            done[group] += 1
            good[group] += not problem
            if problem:
                way = ("eager" if eager else "graph", f"run {at}", "attach" if attached else "callback", f"mu={mu:g}")
                problems.append(f"{name}, {', '.join(way)}: {problem}")
    rows = [f"| {group} | {done[group]} | {good[group]} |" for group in done]
    total = f"| all | {sum(done.values())} | {sum(good.values())} |"
    text = "\n".join(["| an exception in | injections | left as before |", "|---|---|---|", *rows, total, *problems])
    return text, len(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=1, help="break each place in its first runs up to this and one more"
    )
    parser.add_argument("--only", default="", help="places whose name has this in it")
    arguments = parser.parse_args()
    text, problems = table(arguments.rounds, arguments.only)
    print(text)
    sys.exit(problems > 0)
