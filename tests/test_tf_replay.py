"""Every pass of a batch repeats the clean one, whatever the model keeps; where it cannot, that is said."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg_tf import SMARTCallback, attach
from smartreg_tf.replay import differing

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
N, TOKENS = 8, 5
RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(N, TOKENS)), RNG.integers(3, size=N)
MODES = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}


class Counts:
    calls = 0.0


class Keeps(keras.Model):
    """Multiplies its logits by something that moves with every call."""

    def __init__(self, kind):
        super().__init__()
        self.kinds = kind.split(" and ")
        self.embedding, self.head = layers.Embedding(20, 4), layers.Dense(3)
        self.recurrent = layers.LSTM(4, stateful=True) if "recurrent" in self.kinds else None
        self.weight = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")
        self.variable = tf.Variable(0.0, trainable=False)
        self.generator = tf.random.Generator.from_seed(1)
        self.numpy_generator, self.python_generator = np.random.default_rng(1), random.Random(1)
        self.calls, self.listed, self.mapped, self.array = 0.0, [], {"calls": 0.0}, np.zeros(1, np.float32)
        self.own = Counts()

    def factor(self, kind):
        if kind == "attribute":
            self.calls += 1
            return self.calls
        if kind == "object":
            self.own.calls += 1
            return self.own.calls
        if kind == "list":
            self.listed.append(1)
            return float(len(self.listed))
        if kind == "dict":
            self.mapped["calls"] += 1
            return self.mapped["calls"]
        if kind == "array":
            self.array += 1
            return self.array.copy()
        if kind == "weight":
            self.weight.assign(self.weight + 1)
            return self.weight.value
        if kind == "tf.Variable":
            self.variable.assign_add(1.0)
            return self.variable.value()
        if kind == "tf.random.Generator":
            return self.generator.uniform([3])
        if kind == "numpy":
            return np.float32(self.numpy_generator.uniform() + np.random.uniform())
        if kind == "random":
            return self.python_generator.random() + random.random()
        if kind == "keras.random":
            return keras.random.uniform([3])
        if kind == "tf.random":
            return tf.random.uniform([3])
        return 1.0

    def call(self, inputs):
        ids = inputs.pop("ids") if "input" in self.kinds else inputs
        x = self.embedding(ids)
        logits = self.head(self.recurrent(x) if self.recurrent else keras.ops.mean(x, 1))
        for kind in self.kinds:
            logits *= self.factor(kind)
        return logits


IN_PYTHON = ["attribute", "object", "list", "dict", "array", "numpy", "random", "input"]
IN_TENSORFLOW = ["weight", "tf.Variable", "tf.random.Generator", "keras.random", "recurrent"]


def model_that(kind, **compiled):
    keras.utils.set_random_seed(1)
    model = Keeps(kind)
    model({"ids": IDS} if "input" in model.kinds else IDS)  # the second call is the clean pass
    model.compile(keras.optimizers.SGD(0.0), CE, **compiled)
    return model


def kept(model):
    states = [state.numpy() for state in model.recurrent.states] if model.recurrent else []
    numbers = [model.calls, model.own.calls, float(len(model.listed)), model.mapped["calls"], model.weight.numpy()]
    return [*numbers, *model.array, model.variable.numpy(), *model.generator.state.numpy(), *np.ravel(states)]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "eager") for kind in IN_PYTHON + IN_TENSORFLOW]
    # one trace for many: the logits are the product, so one that moves shows
    + [(" and ".join(kinds), "graph") for kinds in (IN_PYTHON, IN_TENSORFLOW)]
    # XLA compiles the same graph: only what stays in it counts
    + [("weight and tf.Variable", "xla")],
)
def test_what_the_model_keeps_is_put_back(kind, mode):
    """D_Breg at theta~ = theta is exactly 0, R_s is 0 at delta = 0, and what is kept moves as in a plain step."""
    plain, model = model_that(kind, **MODES[mode]), model_that(kind, **MODES[mode])
    given = {"ids": IDS} if "input" in model.kinds else IDS
    plain.fit(given, Y, batch_size=N, epochs=2, verbose=0)
    silent = SMARTCallback(papers(start="gaussian", ascent_steps=0), noise=lambda step, like: tf.zeros_like(like))
    streams = (random.getstate(), np.random.get_state()[1].tolist())
    history = model.fit(given, Y, batch_size=N, epochs=2, verbose=0, callbacks=[silent]).history
    if not {"numpy", "random"} & {*model.kinds}:
        assert streams == (random.getstate(), np.random.get_state()[1].tolist())
    assert max(np.abs(history["proximal"]).max(), np.abs(history["smoothness"]).max()) <= 1e-14
    np.testing.assert_allclose(kept(model), kept(plain), rtol=1e-6)


@pytest.mark.parametrize(("mode", "mu"), [("eager", 1.0), ("graph", 0.0), ("graph", 1.0), ("xla", 0.0)])
def test_a_pass_that_cannot_be_repeated_is_named(mode, mu):
    model = model_that("tf.random", **MODES[mode])
    with pytest.raises(RuntimeError, match=r"does not repeat its own pass.*RandomUniform.*keras.random.SeedGenerator"):
        model.fit(IDS, Y, batch_size=N, verbose=0, callbacks=[SMARTCallback(papers(mu=mu))])
    assert "train_step" not in vars(model)


def test_what_cannot_be_named_is_still_found():
    class Global(layers.Layer):
        calls = 0

        def call(self, x):
            Global.calls += 1
            return x * Global.calls

    model = keras.Sequential([keras.Input([3]), Global(), layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(RuntimeError, match=r"Most likely a layer draws from tf.random, or keeps something outside of"):
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[SMARTCallback(papers())])


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_the_check_is_paid_once(mode, mu):
    """A layer that goes wrong from the second step on is not asked again."""
    model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
    model.compile("sgd", "mse", **MODES[mode])
    runs = []
    with attach(model, papers(mu=mu, total_steps=9)) as smart:
        counted = tf.Variable(0)
        call = model.layers[0].call

        def seen(*args, **kwargs):
            counted.assign_add(1)
            return call(*args, **kwargs)

        model.layers[0].call = seen
        for _ in range(3):
            before = int(counted)
            model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
            runs.append(int(counted) - before)
        assert smart.penalty.seen.numpy() == 3
    passes = 3 + int(mu > 0)
    assert runs == [4, passes, passes]


def test_theta_tilde_that_is_not_theta_is_no_fault():
    """Weights that were loaded after SMART was made: theta~ is then another, and so are its outputs."""
    model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    with attach(model, papers(total_steps=9)) as smart:
        model.set_weights([np.ones((3, 2)), np.ones(2)])
        with smart.training_step():
            model.compute_loss(np.ones((4, 3)), np.ones((4, 2)), model(np.ones((4, 3)), training=True))
        kernel, bias = (average.numpy() for average in smart.averages)
        assert smart.metrics["D_Breg"] == pytest.approx(np.sum((4 - kernel.sum(0) - bias) ** 2), rel=1e-6)


class Mixture(keras.Model):
    """Leaves its balance in an attribute and among its losses, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.gate, self.head = layers.Embedding(20, 4), layers.Dense(4), layers.Dense(3)
        self.balance = None

    def call(self, ids):
        x = keras.ops.mean(self.embedding(ids), 1)
        self.balance = keras.ops.sum(keras.ops.mean(keras.ops.softmax(self.gate(x)), 0) ** 2)
        self.add_loss(0.1 * self.balance)
        return self.head(x)


@pytest.mark.parametrize("changes", [{}, {"lambda_s": 0.0}, {"mu": 0.0}, {"smoothness_steps": 2}], ids=str)
def test_side_results_are_those_of_the_clean_pass(changes):
    keras.utils.set_random_seed(1)
    model = Mixture()
    model.compile("sgd", CE, run_eagerly=True)
    model(IDS)
    with attach(model, papers(**{"epsilon": 0.3, "total_steps": 9, **changes})) as smart:
        for _ in range(3):
            model(IDS)
            wanted = float(model.balance)
            with smart.training_step(), tf.GradientTape() as tape:
                loss = model.compute_loss(IDS, Y, model(IDS, training=True))
                balance, added = model.balance, list(model.losses)
                gradients = tape.gradient(balance, model.gate.trainable_variables)
                model.optimizer.apply(gradients, model.gate.trainable_variables)
            assert float(loss) > float(balance)
            assert float(balance) == wanted
            assert float(added[0]) == np.float32(0.1) * np.float32(wanted)
            assert all(np.abs(gradient).max() > 0 for gradient in gradients)


def test_the_rounding_that_is_allowed():
    clean = tf.constant([[1.0, -4.0], [np.nan, np.inf]])
    for changed, half, found in ((1e-6, False, False), (1e-3, False, True), (1e-3, True, False), (0.5, True, True)):
        again = clean + tf.constant([[changed, 0.0], [0.0, 0.0]])
        assert bool(differing([clean], [again], [None], half)) == found
    assert bool(differing([clean], [tf.where(tf.math.is_nan(clean), 0.0, clean)], [None], False))
    clean = tf.constant([[1.0, -4.0], [2.0, 3.0]])
    assert not bool(differing([clean], [clean + tf.constant([[0.0], [1.0]])], [tf.constant([1, 0])], False))
    assert bool(differing([clean], [clean + tf.constant([[1.0], [0.0]])], [tf.constant([1, 0])], False))
