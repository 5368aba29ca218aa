"""Give `smartreg.checking` what it calls of this backend: its functions, a conversion and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

# ruff: noqa: F401
from smartreg_tf.divergences import bernoulli_symmetric_kl, squared_error, symmetric_kl
from smartreg_tf.perturbation import ascend, normalize, project_l1_ball, project_l2_ball, project_linf_ball
from smartreg_tf.proximal import bregman_divergence, ema_update, momentum


def asarray(array: Any, dtype: str) -> Any:
    """Return a NumPy array as a tensor.

    Example:
        >>> asarray([1.0], "bfloat16").dtype
        tf.bfloat16
    """
    return tf.cast(tf.convert_to_tensor(array), dtype)


def gradients(function: Callable[..., Any], *arrays: Any) -> Any:
    """Return the gradients of sum(function(*arrays)) with respect to each array.

    Example:
        >>> float(gradients(tf.square, tf.constant(3.0))[0])
        6.0
    """
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        value = function(*arrays)
    return tape.gradient(value, arrays)
