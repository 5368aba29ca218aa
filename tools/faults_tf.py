"""The rows of `tools/faults.py` for Keras: exceptions at every place of a fit with SMART.

Each place in which the user's code runs is broken in turn: a layer in every pass, the loss, the metric, the noise, the
optimiser, the callbacks before and after SMART's. So are SMART's own methods. Afterwards the attributes of the model,
its layers and its optimiser must be as before, and so must its number of variables. The weights, the statistics, the
optimiser's state and theta~ must be those that the same fit had after as many steps. The random streams and what a
layer keeps must be as plain training leaves them. The next plain step and save must be plain.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from smartreg_tf import SMARTCallback, SMARTConfig, attach
from smartreg_tf.engine import Engine
from smartreg_tf.passes import CleanPasses, Passes
from smartreg_tf.penalty import Penalty
from smartreg_tf.report import Reports
from smartreg_tf.site import Site
from smartreg_tf.teacher import Teacher

IDS, Y = np.random.default_rng(0).integers(1, 20, size=(8, 5)), np.arange(8) % 2
OPTIONS: dict[str, Any] = {"batch_size": 4, "validation_data": (IDS, Y), "validation_batch_size": 8}
OPTIONS |= {"verbose": 0, "shuffle": False}
HOOKS = [f"on_{what}_{when}" for what in ("train", "epoch", "train_batch", "test") for when in ("begin", "end")]
OWN: dict[type, list[str]] = {
    SMARTCallback: ["set_model", "on_train_begin", "on_train_end"],
    Engine: ["__init__", "install", "make_train_function", "train_step", "compute_loss", "reset_metrics", "judge"],
    Penalty: ["added_to", "_of_training", "take_step", "_heads", "_draw"],
    Reports: ["add", "count", "judge"],
    Teacher: ["follow", "begin", "move", "pairs"],
    CleanPasses: ["install", "_on_call"],
    Passes: ["run_clean", "at", "again", "differ", "_run"],
    Site: ["install", "require", "fits", "padding_mask", "on_inputs", "_on_layer", "_seen", "_chosen"],
}  # fmt: skip


class InjectedError(Exception):
    """The error that every fault here raises."""


class Trigger:
    """Raises at its `at`-th call."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0

    def arm(self, at: int) -> None:
        """Count from 0 again, and raise at call `at`; 0 means never."""
        self.calls, self.at = 0, at

    def __call__(self) -> None:
        """Count, or raise."""
        self.calls += 1
        if self.calls == self.at:
            raise InjectedError

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with a count before and after it."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            result = function(*args, **kwargs)
            self()
            return result

        return counted


TRIGGER = Trigger()


def counted(kind: type) -> type:
    """Make a class of layers whose `call` may raise."""

    def call(self: Any, inputs: Any) -> Any:
        return TRIGGER.around(super(made, self).call)(inputs)

    made = type(kind.__name__, (kind,), {"call": call})
    return made


class Keeps(keras.layers.Dropout):  # type: ignore[misc]
    """Dropout that counts its calls and draws from NumPy's stream."""

    count = 0
    highest = 0  # of a class: SMART does not put it back

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Change a count and draw a number, then perhaps raise."""
        self.count += 1
        Keeps.highest = max(Keeps.highest, self.count)
        np.random.rand()  # noqa: NPY002
        TRIGGER()
        return super().call(inputs, training=training)


class Optimizer(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD that may raise before and after its update."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Update as Keras does, with a count before and after."""
        return TRIGGER.around(super().apply)(*args, **kwargs)


def loss(y: Any, z: Any) -> Any:
    """Compute a loss of one's own, or raise."""
    TRIGGER()
    return keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)


def metric(y: Any, z: Any) -> Any:
    """Compute a metric of one's own, or raise."""
    TRIGGER()
    return keras.metrics.sparse_categorical_accuracy(y, z)


def noise(step: Any, like: Any) -> Any:
    """Return the noise of the start, or raise."""
    TRIGGER()
    return keras.ops.ones_like(like)


class Other(keras.callbacks.Callback):  # type: ignore[misc]
    """Another callback, any method of which may raise."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOOKS:
            setattr(self, name, TRIGGER.around(getattr(self, name)))


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes down what training leaves after each step."""

    def __init__(self, values: Callable[[], Any]) -> None:
        super().__init__()
        self.values = values
        self.after: dict[int, Any] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keep the values after the step."""
        self.after[int(self.model.optimizer.iterations)] = self.values()


def small(eager: bool, policy: str) -> Any:
    """Make a model, and fit it once, so that all that plain Keras leaves on a model is there."""
    TRIGGER.arm(0)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input([5], dtype="int32")
        x = counted(keras.layers.Embedding)(20, 4, mask_zero=True)(inputs)
        x = counted(keras.layers.GlobalAveragePooling1D)()(x)
        x = keras.layers.BatchNormalization()(Keeps(0.2)(x))
        model = keras.Model(inputs, counted(keras.layers.Dense)(2, dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(Optimizer(0.1, momentum=0.9), loss, metrics=[metric], run_eagerly=eager, jit_compile=False)
    model.fit(IDS, Y, **OPTIONS)
    return model


def held(model: Any) -> dict[Any, Any]:
    """Collect the attributes of the model, its layers and its optimiser, except those of `Keeps`."""
    return {
        (place, name): value
        for place, owner in enumerate([*model._flatten_layers(), model.optimizer])
        for name, value in vars(owner).items()
        if name not in ("history", "_eval_epoch_iterator", "count", "stop_training")
    }


def numbers(variables: Any) -> list[Any]:
    """Return the values of variables."""
    return [np.array(variable) for variable in variables]


def same(a: list[Any], b: list[Any]) -> bool:
    """Return whether all are equal, bit for bit."""
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Case:
    """One way to fit one model with SMART, broken off again and again."""

    def __init__(self, eager: bool, policy: str, attached: bool, last: bool, own: bool, config: SMARTConfig) -> None:
        self.eager, self.attached, self.last, self.own, self.config = eager, attached, last, own, config
        self.model = small(eager, policy)
        self.keeps = next(layer for layer in self.model.layers if isinstance(layer, Keeps))
        self.variables = [*self.model.variables, *self.model.optimizer.variables]
        self.variables += [v for v in self.model.non_trainable_variables if not any(v is w for w in self.variables)]
        self.model.optimizer.iterations.assign(0)
        self.start = numbers(self.variables)
        self.before = held(self.model)
        self.engines: list[Engine] = []
        recorder = Recorder(lambda: (self.trained(), self.moved(), numbers(self.engines[-1].averages)))
        self.reset()
        self.after = {0: (self.trained(), self.moved(), numbers(self.model.trainable_variables))}
        self.fit(0, [recorder])
        self.after |= recorder.after
        self.total = TRIGGER.calls
        self.left = [problem for problem in [self.problem(0, "")] if problem]

    def trained(self) -> list[Any]:
        """Return what an optimiser step moves."""
        return numbers([*self.model.trainable_variables, *self.model.optimizer.variables])

    def moved(self) -> list[Any]:
        """Return what a forward pass moves: the statistics, and the seeds of the dropout masks."""
        metrics = {id(variable) for variable in self.model.metrics_variables}
        return numbers(v for v in self.model.non_trainable_variables if id(v) not in metrics)

    def reset(self) -> None:
        """Set everything to its start."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        self.keeps.count = Keeps.highest = 0
        np.random.seed(0)  # noqa: NPY002

    def fit(self, at: int, more: list[Any]) -> str:
        """Train for two steps and evaluate, with an exception at the `at`-th call."""
        made, originals = self.engines, []
        original = Engine.__init__

        def begins(engine: Engine, *args: Any, **kwargs: Any) -> None:
            made.append(engine)
            original(engine, *args, **kwargs)

        given = {"outputs": "logits", "noise": noise if self.config.start == "gaussian" else None}
        TRIGGER.arm(at)
        for owner, names in OWN.items() if self.own else ():
            for name in names:
                originals.append((owner, name, vars(owner)[name]))
                setattr(owner, name, TRIGGER.around(vars(owner)[name]))
        begun = vars(Engine)["__init__"]
        original = begun
        setattr(Engine, "__init__", begins)  # noqa: B010
        try:
            if self.attached:
                with attach(self.model, self.config, **given):
                    self.model.fit(IDS, Y, callbacks=[Other(), *more], **OPTIONS)
            else:
                callbacks = [SMARTCallback(self.config, **given), Other()]
                self.model.fit(IDS, Y, callbacks=[*callbacks[:: -1 if self.last else 1], *more], **OPTIONS)
        except Exception as error:  # TensorFlow raises another error; its traceback would keep the fit alive
            return f"{type(error).__name__} {error}"
        finally:
            setattr(Engine, "__init__", begun)  # noqa: B010
            for owner, name, method in reversed(originals):
                setattr(owner, name, method)
            TRIGGER.at = 0
        return ""

    def problem(self, at: int, error: str) -> str:
        """Return what is not as it should be, or ""."""
        if at and InjectedError.__name__ not in error:
            return f"another error: {error}"[:200]
        gc.collect()  # the frames of a broken evaluation are in a cycle, and hold the fit until it is collected
        model, steps, none = self.model, int(self.model.optimizer.iterations), object()
        after = held(model)
        keys = {*self.before, *after}
        left = sorted({key[1] for key in keys if self.before.get(key, none) is not after.get(key, none)})
        for engine in self.engines[-1:]:
            if hasattr(engine, "faults") and self.config.mu > 0:
                finished = int(np.array(engine.step))
                fits = finished in (steps, steps - 1) and same(numbers(engine.averages), self.after[finished][2])
                left += [] if fits else ["theta~"]
        left += [] if same(self.trained(), self.after[steps][0]) else ["weights"]
        allowed = [self.after[step][1] for step in (steps, steps + 1) if step in self.after]
        left += [] if any(same(self.moved(), values) for values in allowed) else ["statistics or seeds"]
        stream = np.random.get_state()[1:3]  # noqa: NPY002
        np.random.seed(0)  # noqa: NPY002
        np.random.rand(self.keeps.count)  # noqa: NPY002
        mine = np.random.get_state()[1:3]  # noqa: NPY002
        in_order = self.keeps.count == Keeps.highest <= (steps + 1 if self.eager else 1)  # as plain training does
        left += [] if same(list(stream), list(mine)) and in_order else ["NumPy's stream, a count"]
        with tempfile.TemporaryDirectory() as folder:
            model.save_weights(f"{folder}/plain.weights.h5")
            left += [] if os.listdir(folder) == ["plain.weights.h5"] else ["a save writes more"]
        logs = model.train_on_batch(IDS, Y, return_dict=True)
        left += [] if set(logs) == {"loss", "metric"} else ["a step that is not plain"]
        return ", ".join(left)

    def inject(self, at: int) -> str:
        """Raise one exception. Return what it left."""
        self.engines.clear()
        self.reset()
        return self.problem(at, self.fit(at, []))


def rows() -> Iterator[tuple[str, int, list[str]]]:
    """Yield the rows of the table: which fit, how many exceptions, what they left."""
    both = SMARTConfig(beta_early=0.9, beta_late=0.9, ascent_steps=1)
    plain: dict[str, Any] = {"policy": "float32", "attached": False, "last": False, "own": False, "config": both}
    ways: dict[str, dict[str, Any]] = {
        "margin start": {},
        "Gaussian start": {"config": both.replace(start="gaussian")},
        "mu = 0": {"config": both.replace(mu=0.0)},
        "lambda_s = 0": {"config": both.replace(lambda_s=0.0)},
        "the last callback": {"last": True},
        "mixed_bfloat16": {"policy": "mixed_bfloat16"},
        "attach()": {"attached": True},
        "SMART's own methods as well": {"own": True},
    }
    for mode in ("run_eagerly", "graph"):
        for name, changes in ways.items():
            case = Case(mode == "run_eagerly", **{**plain, **changes})
            # every place of the first way, and some places of the others, which saves ten minutes
            step = 1 if case.eager and not changes else 4 if case.eager else 7
            places = range(1 + len(name) % step, case.total + 1, step)
            found = list(case.left)
            for at in places:
                left = case.inject(at)
                if left:
                    found.append(f"call {at}: {left}")
                    case = Case(case.eager, **{**plain, **changes})
            yield f"Keras fit, {mode}, {name}", len(places), found
