"""Call any backend from NumPy: arrays in, arrays out, and one exception for whatever goes wrong in it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smartreg import divergences, perturbation, proximal
from smartreg.config import SMARTConfig
from smartreg.divergences import DIVERGENCES
from smartreg.reference import Functions, Parameters, forward, in_turn

Array = NDArray[Any]

BACKENDS = ("numpy", "torch", "tf")
BALLS = {name: norm.project.__name__ for name, norm in perturbation.NORMS.items()}
FUNCTIONS = (
    *DIVERGENCES,
    "normalize",
    *BALLS.values(),
    "ascend",
    "momentum",
    "ema_update",
    "bregman_divergence",
)


def load_backend(name: str) -> Any:
    """Return the backend of that name: "numpy", "torch", "tf", or a module to import.

    Raises:
        ImportError: there is no such module, or its framework is not installed; the message says what to give.

    Example:
        >>> load_backend("numpy").symmetric_kl is divergences.symmetric_kl
        True
    """
    if name == "numpy":
        return NUMPY
    try:
        return importlib.import_module(f"smartreg_{name}.checking" if name in BACKENDS else name)
    except ModuleNotFoundError as error:
        if name in BACKENDS or error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ImportError(
            f"check_backend: there is no module called {name!r} in this folder or on sys.path. Give one of "
            f"{', '.join(BACKENDS)}, or the name of a module, without .py"
        ) from error


class Problem(Exception):  # noqa: N818 - the backend's, not ours
    """A function of a backend is missing, raised, or returned what cannot be compared.

    Example:
        >>> Face(SimpleNamespace(__name__="mine")).momentum(1, SMARTConfig(total_steps=9))
        Traceback (most recent call last):
        ...
        smartreg.checking.face.Problem: momentum is missing. Write it with the arguments that docs/backends.md lists
    """

    def __init__(self, function: str, what: str) -> None:
        super().__init__(f"{function} {what}")
        self.function, self.what = function, what


class Face(Functions):
    """A backend's functions, which take and return NumPy arrays here.

    Args:
        backend: as `check_backend` takes it.
        dtype: the type to which floating-point arrays are converted.

    Raises:
        Problem: in place of any exception in the backend.

    Example:
        >>> Face(NUMPY).value("squared_error", np.ones((1, 2)), np.zeros((1, 2)))
        array([2.])
    """

    def __init__(self, backend: Any, dtype: str = "float64") -> None:
        self.backend, self.dtype = backend, dtype
        self._asarray = getattr(backend, "asarray", np.asarray)
        self._gradients = getattr(backend, "gradients", None)
        self._reported = np.geterr()  # what the caller wants to hear of; the laws themselves say nothing of a NaN

    def differentiates(self, divergence: str) -> bool:
        """Tell whether the backend gives the gradients of a divergence."""
        return self._gradients is not None or hasattr(self.backend, f"{divergence}_grad")

    def lacks_type(self) -> str:
        """Return why the backend has no arrays of this type, "" if it has.

        Only NumPy's own refusal counts. Any other exception is a fault of the backend, which its rows show.
        """
        try:
            self._put(np.ones(1, np.float32))
        except Problem as problem:
            if isinstance(problem.__cause__, TypeError) and "not understood" in str(problem):
                return (
                    f"NumPy has no {self.dtype}. To have it checked, write asarray(array, dtype), which returns an "
                    "array of your framework"
                )
            if isinstance(problem.__cause__, ModuleNotFoundError) and self.backend is NUMPY:
                return f"NumPy has no {self.dtype} without the package ml_dtypes: pip install ml_dtypes"
        return ""

    def value(self, divergence: str, a: Any, b: Any, mask: Any = None) -> Array:
        """Return l_s(a, b), (n,)."""
        given = self._put(a), self._put(b)
        return self._array(divergence, self._call(divergence, *given, mask=self._put(mask)), np.shape(a)[:1])

    def grad(self, divergence: str, a: Any, b: Any, mask: Any = None) -> tuple[Array, Array]:
        """Return the gradients of the sum over the examples of l_s(a, b), with respect to both."""
        given, mask = (self._put(a), self._put(b)), self._put(mask)
        what = f"{divergence}: gradient"
        with _as_problem(what):
            if self._gradients is None:
                grad_a, grad_b = self._call(f"{divergence}_grad", *given, mask=mask)
            else:
                grad_a, grad_b = self._gradients(lambda a, b: self._call(divergence, a, b, mask=mask), *given)
        return self._array(what, grad_a, np.shape(a)), self._array(what, grad_b, np.shape(b))

    def call(self, function: str, *arrays: Any, **settings: Any) -> Array:
        """Call a function that returns an array of the shape of its first argument."""
        settings = {name: self._put(value) for name, value in settings.items()}
        return self._array(function, self._call(function, *map(self._put, arrays), **settings), np.shape(arrays[0]))

    def ascend(
        self,
        theta: Mapping[str, Any],
        x: Any,
        outputs: Any,
        config: SMARTConfig,
        noise: Any,
        mask: Any,
        divergence: str,
        pooled: bool = True,
        dropout: Sequence[Any] | None = None,
    ) -> Array:
        """Return delta for the reference network, which is written with operators alone: any framework can run it.

        Args:
            dropout: as `Functions.ascend` takes it.
        """
        masks = in_turn(dropout)
        w = {name: self._put(value) for name, value in theta.items()}
        d = len(theta["W1"])  # the network reads that many features; the features beyond are not finite
        share = divergences.position_weights(np.asarray(x), mask)  # (n, tokens, 1)
        row = self._put(np.swapaxes(share, 1, 2))

        def network(x: Any) -> Any:
            z = x[..., :d] @ w["W1"] + w["b1"]
            h = 1 - 2 / (1 + math.e ** (2 * z))  # tanh
            kept = next(masks)
            h = h if kept is None else h * self._put(kept)
            return ((row @ h)[:, 0] if pooled else h) @ w["W2"] + w["b2"]

        def network_and_vjp(x: Any) -> Any:
            outputs, vjp = forward(theta, x[..., :d], mask, pooled, next(masks))
            beside = np.full((*x.shape[:-1], x.shape[-1] - d), np.nan, x.dtype)
            return outputs, lambda grad: np.concatenate([vjp(grad)[1], beside], axis=-1)

        delta = self._call(
            "ascend",
            network_and_vjp if self._gradients is None else network,
            *map(self._put, (x, outputs)),
            config,
            self._put(noise),
            self._put(mask),
            divergence,
        )
        return self._array("ascend", delta, np.shape(x))

    def momentum(self, step: int, config: SMARTConfig) -> float:
        """Return beta at that step."""
        beta = self._call("momentum", step, config)
        with _as_problem("momentum"):
            return float(beta)

    def ema_update(self, teacher: Mapping[str, Any], theta: Mapping[str, Any], beta: float) -> Parameters:
        """Return theta~ after the update, by a function that returns a new dict or changes the one it gets."""
        own = {name: self._put(value) for name, value in teacher.items()}
        moved = self._call("ema_update", own, {name: self._put(value) for name, value in theta.items()}, beta)
        with _as_problem("ema_update"):
            moved = dict((own if moved is None else moved).items())
        if moved.keys() != teacher.keys():
            raise Problem("ema_update", f"gave the names {sorted(map(str, moved))}, expected {sorted(teacher)}")
        return {name: self._array("ema_update", moved[name], np.shape(value)) for name, value in teacher.items()}

    def bregman_divergence(  # type: ignore[override]
        self, outputs: Any, teacher_outputs: Any, divergence: str, mask: Any = None, sample_weight: Any = None
    ) -> float:
        """Return D_Breg."""
        given = self._put(outputs), self._put(teacher_outputs)
        result = self._call("bregman_divergence", *given, divergence, self._put(mask), self._put(sample_weight))
        with _as_problem("bregman_divergence"):
            return float(self._array("bregman_divergence", result, (), dtyped=False))

    def bregman_grad(self, outputs: Any, teacher_outputs: Any, divergence: str) -> Array | None:
        """Return the gradient of D_Breg at the outputs; None if the backend does not differentiate."""
        if self._gradients is None:
            return None
        teacher, what = self._put(teacher_outputs), "bregman_divergence: gradient"
        with _as_problem(what):
            (gradient,) = self._gradients(
                lambda z: self._call("bregman_divergence", z, teacher, divergence), self._put(outputs)
            )
        return self._array(what, gradient, np.shape(outputs))

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.backend, function):
            raise Problem(function, "is missing. Write it with the arguments that docs/backends.md lists")
        with np.errstate(**self._reported), _as_problem(function):
            return getattr(self.backend, function)(*args, **kwargs)

    def _put(self, value: Any) -> Any:
        """Convert an array to the backend's own; leave everything else as it is."""
        if not isinstance(value, (np.ndarray, np.generic)):
            return value
        array = np.array(value)  # a copy: a backend may write into what it is given
        with _as_problem("asarray"):
            return self._asarray(array, self.dtype if array.dtype.kind == "f" else array.dtype.name)

    def _array(self, function: str, result: Any, shape: tuple[int, ...], dtyped: bool = True) -> Array:
        with _as_problem(function):
            array = np.asarray(result)
        if array.shape != tuple(shape):
            raise Problem(function, f"gave the shape {array.shape}, expected {tuple(shape)}")
        wide = "float64" if self.dtype == "float64" else "float32"
        if dtyped and array.dtype.name != wide:
            raise Problem(function, f"gave {array.dtype.name}, expected {wide} for {self.dtype} inputs")
        return array


class _as_problem:  # noqa: N801 - a context manager
    """Turn whatever is raised inside into a Problem of that function."""

    def __init__(self, function: str) -> None:
        self.function = function

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, Problem):
            text = " ".join(str(error).split())
            raise Problem(
                self.function, f"raised {type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
            ) from error


def _numpy_asarray(array: Any, dtype: str) -> Array:
    if dtype == "bfloat16":
        importlib.import_module("ml_dtypes")  # which gives NumPy that type
    return np.asarray(array, dtype)


NUMPY = SimpleNamespace(
    __name__="numpy",
    asarray=_numpy_asarray,
    **{
        name: getattr(module, name)
        for module in (divergences, perturbation, proximal)
        for name in (*FUNCTIONS, *(f"{divergence}_grad" for divergence in DIVERGENCES))
        if hasattr(module, name)
    },
)
