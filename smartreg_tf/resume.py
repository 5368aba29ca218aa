"""Write and read the file beside a checkpoint from which a run goes on: theta~, the step, the states of all seeds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smartreg_tf.replay import seed_states

SUFFIX = ".smart.npz"


def state_of(model: Any, step: Any, draws: Any, averages: list[Any]) -> dict[str, Any]:
    """Name the variables of a run, as its file does.

    theta~ and the seeds are numbered: Keras counts layers of one kind, so that a model which is made a second time in
    one process has other paths.
    """
    return {"step": step, "draws": draws, **numbered("average", averages), **numbered("seed", seed_states(model))}


def numbered(kind: str, values: Iterable[Any]) -> dict[str, Any]:
    """Name values by their kind and number.

    Example:
        >>> numbered("seed", [4, 5])
        {'seed/0': 4, 'seed/1': 5}
    """
    return {f"{kind}/{i}": value for i, value in enumerate(values)}


def write(filepath: Any, state: Mapping[str, Any], iterations: int, theta: Sequence[Any] | None = None) -> None:
    """Write the state to `filepath` + '.smart.npz', complete or not at all.

    Args:
        iterations: the steps that the model's own optimiser has taken.
        theta: the trainable weights, if those in the model, which its own file has, are theta~.
    """
    values = {} if theta is None else numbered("theta", theta)
    values |= {name: tf.convert_to_tensor(variable.value).numpy() for name, variable in state.items()}
    partial_file = f"{filepath}{SUFFIX}.part"
    with open(partial_file, "wb") as file:
        np.savez(file, iterations=iterations, **values)
    os.replace(partial_file, f"{filepath}{SUFFIX}")


def read(filepath: Any, state: Mapping[str, Any], iterations: int, weights: Sequence[Any] = ()) -> None:
    """Assign what `write` wrote; theta, if it is there, to the trainable weights.

    Raises:
        ValueError: there is no such file, or it is not of this model, configuration or checkpoint.
    """
    if not os.path.exists(f"{filepath}{SUFFIX}"):
        raise ValueError(
            f"SMART: there is no {filepath}{SUFFIX}. Save the model while SMART trains it, or call save_state(path) "
            "of what attach() gives."
        )
    with np.load(f"{filepath}{SUFFIX}") as saved:
        then = int(saved["iterations"])
        if iterations > 0 and then > 0 and iterations != then:
            raise ValueError(
                f"SMART: {filepath}{SUFFIX} was written after {then} optimiser steps, and the model was loaded from "
                f"after {iterations}: the two are not of one checkpoint. Load both from one checkpoint"
            )
        if "theta/0" in saved.files:
            state = {**state, **numbered("theta", weights)}
        differing = sorted(
            name
            for name in {*saved.files, *state} - {"iterations"}
            if name not in saved.files or name not in state or saved[name].shape != tuple(state[name].shape)
        )
        if differing:
            raise ValueError(
                f"SMART: {filepath}{SUFFIX} is not of this model and configuration: {', '.join(differing[:5])} "
                "differ. Freeze layers and enable LoRA before fit, as in the run that wrote it."
            )
        for name, variable in state.items():
            variable.assign(saved[name])
