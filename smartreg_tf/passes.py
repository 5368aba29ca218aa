"""Run a Keras model on one mini-batch: the clean pass, the pass again, and the pass at other points.

The model's `call` is wrapped on the instance, once, and does nothing outside a training step. What a training step
needs to remember is kept by thread: the replicas of a MirroredStrategy are threads.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from smartreg_tf import compat
from smartreg_tf.replay import (
    State,
    arguments_of,
    copied,
    differing,
    kept_variables,
    random_operations,
    traced_random_operations,
    values_of,
    with_own_seeds,
)
from smartreg_tf.site import Call, Patches, Site, is_symbolic

Tensor = Any
_HALF = ("float16", "bfloat16")


class Pass(NamedTuple):
    """Hold one run of the model.

    Attributes:
        outputs: what it returned.
        calls: the runs of the site.
        tape: has recorded the way from the site to the outputs, if that was asked for.
    """

    outputs: Any
    calls: list[Call]
    tape: tf.GradientTape | None = None


class Passes:
    """Run a model on one mini-batch, as often as it is needed.

    `again` and `at` have the counters and the states of the clean pass, and change no state. They have its dropout
    masks, too, if they are not given a key.

    Attributes:
        clean: f(x; theta), the pass that the training step itself makes.
        drawn: the operations of the last run that draw anew in every run of the graph.

    Example:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dropout(0.5)])
        >>> watch = CleanPasses(Site(model))
        >>> watch.install()
        >>> with watch.recording(differentiable=False) as recorded:
        ...     outputs = model(tf.ones([1, 2]), training=True)
        >>> passes = recorded[0]
        >>> bool(tf.reduce_all(passes.again() == outputs))
        True
        >>> bool(tf.reduce_all(passes.at([2 * passes.clean.calls[0].x]) == 2 * outputs))
        True
        >>> watch.remove()
    """

    clean: Pass

    def __init__(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.site, self.drawn = site, list[str]()
        self._again: Any = None  # the outputs of `again`
        self._given = arguments_of(args, kwargs)
        self._state = State(site.model)
        # the seeds of the dropout masks, counters, a recurrent layer's states, as they are before the clean pass
        self._variables = values_of(kept_variables(site.model, self._state))

    def run_clean(self, call: Callable[..., Any], given: Any, differentiable: bool) -> None:
        """Make the clean pass, by the model's own `call`, and keep what is needed to repeat it."""
        tape = tf.GradientTape(watch_accessed_variables=False) if differentiable else None
        args, kwargs = given
        with self.site.recording(given, tape) as calls, tape or nullcontext():
            outputs = call(*self.site.on_inputs(args), **kwargs)
        self.clean = Pass(outputs, calls, tape)
        model = self.site.model
        self._state.keep_moved()
        known = {id(variable) for variable in (*model.weights, *(variable for variable, _ in self._variables))}
        for variable, seed in values_of(kept_variables(model, self._state)):
            if id(variable) not in known:  # a seed that this call has made: its state was [seed, 0]
                self._variables.append((variable, tf.stack([seed[0], tf.zeros_like(seed[0])])))

    @contextmanager
    def in_float32(self) -> Iterator[Passes]:
        """Yield passes in float32 if the model computes in half precision (its weights are float32), the clean one too.

        The published epsilon is lost in half precision, and the clean outputs' rounding is far above R_s.
        """
        layers = half_precision_layers(self.site.model)
        if not layers:
            yield self
            return
        with _in_float32(layers):
            passes = copy.copy(self)
            passes.clean = passes._run(differentiable=self.clean.tape is not None)
            yield passes

    @property
    def masks(self) -> list[Tensor | None]:
        """Tell which positions of each run of the site are real."""
        return [self.site.padding_mask(self._given, call) for call in self.clean.calls]

    @property
    def fit(self) -> Tensor:
        """Tell whether every run of the site has one x an example."""
        return self.site.fits(self._given, self.clean.calls)

    def again(self, weights: Iterable[Any] = ()) -> Any:
        """Return f(x; theta), or with other weights: (variable, value) pairs."""
        again, self.drawn = random_operations(lambda: self._run(weights))
        self._again = again.outputs
        return again.outputs

    def at(self, points: list[Tensor], weights: Iterable[Any] = (), key: Tensor | None = None) -> Any:
        """Return the outputs if the i-th run of the site returns points[i].

        Args:
            weights: as `again` takes them.
            key: of the pass's own dropout masks; None: the clean pass's masks.
        """
        at, self.drawn = random_operations(lambda: self._run(weights, points, key=key))
        return at.outputs

    def differ(
        self,
        read: Callable[[Any], list[Tensor]],
        positions: list[Tensor | None],
        is_theta: Callable[[], Tensor],
        first: Tensor,
    ) -> Tensor:
        """Tell whether a repeated pass differs from the clean pass, in the first step.

        The repeated pass is at delta = 0 and theta~ = theta. It is the pass with theta~, or if there is none, one more.

        Args:
            read: gives the tensors of a pass's outputs that are compared.
            positions: which ones of each tensor count.
            is_theta: tells whether theta~ is theta.
            first: whether this is the first step.
        """
        again = self._again
        if again is None and self.drawn:
            # a branch of the graph numbers its random operations anew: the first would draw what the clean pass drew
            again = self._run().outputs
        if again is None and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return tf.constant(False)  # replicas would wait for each other in a pass that is not always run
        # read before tf.cond: a tensor of a tape that is made in it cannot leave it
        clean = read(self.clean.outputs)
        other = None if again is None else read(again)

        def compare() -> Tensor:
            same = is_theta()
            second = read(self._run().outputs) if other is None else other
            half = any(layer.compute_dtype in _HALF for layer in compat.every_layer(self.site.model))
            return same & differing(clean, second, positions, half)

        # no variable is assigned in a branch: StatelessScope keeps Keras' own
        differs = tf.cond(first, compare, lambda: tf.constant(False))
        if tf.executing_eagerly() and bool(differs):
            self.drawn = traced_random_operations(self._run)
        return differs

    def _run(
        self,
        weights: Iterable[Any] = (),
        points: list[Tensor] | None = None,
        differentiable: bool = False,
        key: Tensor | None = None,
    ) -> Pass:
        tape = tf.GradientTape(watch_accessed_variables=False) if differentiable else None
        kept = self._variables if key is None else with_own_seeds(self._variables, key)
        scope = keras.StatelessScope([*kept, *weights])  # the dropout masks, and theta~
        args, kwargs = copied(self._given)
        site = self.site
        with self._state.replayed(site.model), scope, site.replaced(points, tape) as calls, tape or nullcontext():
            outputs = site.model(*args, **kwargs)
        expected = len(self.clean.calls)
        if len(calls) != expected:
            raise RuntimeError(
                f"SMART: {site} ran {expected} times in the clean pass and {len(calls)} times in a later one of the "
                "same batch. A model whose control flow is random cannot be compared with itself. Give site= a "
                "layer that always runs equally often."
            )
        return Pass(outputs, calls, tape)


class CleanPasses:
    """Note the clean passes of a model: every call of it inside a training step.

    Args:
        site: of the model.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._patches = Patches()
        self._local = threading.local()

    def install(self) -> None:
        """Wrap the `call` of the model and of the site's layers."""
        model = self.site.model
        wrapped = functools.partial(self._on_call, model.call)
        self._patches.put(model, "call", functools.update_wrapper(wrapped, model.call))
        self.site.install()

    def remove(self) -> None:
        """Leave the model and the layers as they were before `install`."""
        self.site.remove()
        self._patches.remove()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the model inside the block."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    @contextmanager
    def recording(self, differentiable: bool) -> Iterator[list[Passes]]:
        """Collect every call of the model made inside the block, with a tape if `differentiable`."""
        recorded: list[Passes] = []
        self._local.recorded, self._local.differentiable = recorded, differentiable
        try:
            yield recorded
        finally:
            self._local.recorded = None

    def _on_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's own `call`: as a later pass, as one to remember, or as if this were not there."""
        if self.site.active:
            return original(*self.site.on_inputs(args), **kwargs)
        recorded = getattr(self._local, "recorded", None)
        if recorded is None or is_symbolic(args):
            return original(*args, **kwargs)
        passes = Passes(self.site, args, kwargs)
        passes.run_clean(original, (args, kwargs), self._local.differentiable)
        recorded.append(passes)
        return passes.clean.outputs


def passes_of(recorded: list[Passes], y_pred: Any) -> Passes:
    """Return the passes whose clean outputs `y_pred` is from; the last ones if it is from none."""
    if not recorded:
        raise RuntimeError(
            "SMART: the train_step called compute_loss without calling the model, self(x, training=True), before "
            "it. Call the model first"
        )
    asked = {id(tensor) for tensor in keras.tree.flatten(y_pred)}
    for passes in reversed(recorded):
        if asked & {id(tensor) for tensor in keras.tree.flatten(passes.clean.outputs)}:
            return passes
    return recorded[-1]


def half_precision_layers(model: Any) -> list[Any]:
    """Return the layers with float32 weights that compute in float16 or bfloat16, as under Keras' mixed policies."""
    return [
        layer
        for layer in compat.every_layer(model)
        if layer.compute_dtype in _HALF and layer.variable_dtype == "float32"
    ]


@contextmanager
def _in_float32(layers: list[Any]) -> Iterator[None]:
    """Let layers compute in float32 inside the block, in this thread: replicas share the layers.

    The replicas wait for each other in BatchNormalization if it is synchronised.
    """
    with _ThreadPolicy.lock:
        for layer in layers:
            if not isinstance(layer.dtype_policy, _ThreadPolicy):
                compat.set_dtype_policy(layer, _ThreadPolicy(layer.dtype_policy))
            layer.dtype_policy.threads.add(threading.get_ident())
    try:
        yield
    finally:
        with _ThreadPolicy.lock:
            for layer in layers:
                policy = layer.dtype_policy
                policy.threads.remove(threading.get_ident())
                if not policy.threads:
                    compat.set_dtype_policy(layer, policy.own)


class _ThreadPolicy:
    """Be float32 in some threads, a layer's own policy in all others."""

    lock = threading.Lock()
    float32 = keras.dtype_policies.DTypePolicy("float32")

    def __init__(self, own: Any) -> None:
        self.own = own
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.float32 if threading.get_ident() in self.threads else self.own, name)
