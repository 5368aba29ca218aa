"""Write and read the file beside a checkpoint from which a run goes on: theta~, the step, the states of all seeds."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smartreg.config import SMARTWarning
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


def checksum(model: Any) -> int:
    """Tell the values of the trainable weights from others.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> before = checksum(model)
        >>> model.set_weights([weight + 1 for weight in model.get_weights()])
        >>> checksum(model) == before
        False
    """
    value = 0
    for weight in model.trainable_variables:
        value = zlib.crc32(tf.convert_to_tensor(weight.value).numpy().tobytes(), value)
    return value


def write(
    filepath: Any, model: Any, state: Mapping[str, Any], iterations: int, theta: Sequence[Any] | None = None
) -> None:
    """Write the state to `filepath` + '.smart.npz', complete or not at all.

    Args:
        model: has the weights beside which the state is written.
        iterations: the steps that the model's own optimiser has taken.
        theta: the trainable weights, if those in the model, which its own file has, are theta~.
    """
    values = {} if theta is None else numbered("theta", theta)
    values |= {name: tf.convert_to_tensor(variable.value).numpy() for name, variable in state.items()}
    partial_file = f"{filepath}{SUFFIX}.part"
    with open(partial_file, "wb") as file:
        np.savez(file, iterations=iterations, checksum=checksum(model), **values)
    os.replace(partial_file, f"{filepath}{SUFFIX}")


def read(filepath: Any, model: Any, state: Mapping[str, Any], iterations: int, weights: Sequence[Any] = ()) -> None:
    """Assign what `write` wrote; theta, if it is there, to the trainable weights.

    Warns if the model was not loaded: its optimiser has made no step, and its weights are not those beside which the
    file was written. The steps alone do not tell, because a `.weights.h5` file may lack the optimiser's state.

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
            for name in {*saved.files, *state} - {"iterations", "checksum"}
            if name not in saved.files or name not in state or saved[name].shape != tuple(state[name].shape)
        )
        if differing:
            raise ValueError(
                f"SMART: {filepath}{SUFFIX} is not of this model and configuration: {', '.join(differing[:5])} "
                "differ. Freeze layers and enable LoRA before fit, as in the run that wrote it."
            )
        others = "checksum" in saved.files and int(saved["checksum"]) != checksum(model)
        if iterations == 0 < then and others:
            warnings.warn(
                f"SMART: {filepath}{SUFFIX} was written after {then} optimiser steps, but this model's optimiser has "
                "made none, and its weights are not those of the checkpoint. Load the checkpoint first: "
                f"keras.models.load_model({str(filepath)!r}), or model.load_weights of a .weights.h5 file",
                SMARTWarning,
                stacklevel=2,
            )
        for name, variable in state.items():
            variable.assign(saved[name])
