"""`smartreg_tf.report`: its numbers by hand and by Keras' own losses, and that it changes nothing."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from smartreg import SMARTConfig, divergences
from smartreg_tf import SMARTCallback, SMARTModel, attach, report

BALL = SMARTConfig(scale="absolute", epsilon=0.1)
RADII = (1, 4)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(11, 4)).astype(np.float32), RNG.integers(2, size=11)
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def linear(outputs, loss, **compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([4]), layers.Dropout(0.5), layers.Dense(outputs)])
    model.compile("sgd", loss, **compiled)
    return model


@pytest.mark.parametrize("eager", [True, False])
def test_classes_by_hand(eager):
    """A linear model without its dropout: delta = radius sign(w_runner-up - w_top)."""
    model = linear(2, CE, run_eagerly=eager, jit_compile=False)
    found = report(model, X, BALL, Y, batch_size=6, radii=RADII)
    W, b = (w.astype(np.float64) for w in model.get_weights())
    z = X @ W + b
    top = z.argmax(-1)
    away = np.sign(W.T[1 - top] - W.T[top])
    for radius, R_s, flips in zip(RADII, found.R_s, found.scores["the model's output"].changes, strict=True):
        moved = (X + 0.1 * radius * away) @ W + b
        assert R_s == pytest.approx(divergences.symmetric_kl(moved, z).mean(), rel=1e-4)
        assert flips == (moved.argmax(-1) != top).mean()
    assert flips > 0
    assert found.numbers["accuracy"] == (top == Y).mean()
    assert found.numbers["NLL"] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)
    assert found.examples == 11
    if eager:
        batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(6)
        assert report(model, batches, BALL, radii=RADII) == found


def test_regression_by_hand():
    model = linear(1, "mse", run_eagerly=True)
    targets = RNG.normal(size=(11, 1))
    found = report(model, X, BALL, targets, radii=RADII)
    length = np.abs(model.get_weights()[0]).sum()
    for radius, R_s, change in zip(RADII, found.R_s, found.scores["the model's output"].changes, strict=True):
        assert change == pytest.approx(0.1 * radius * length, rel=1e-4)
        assert R_s == pytest.approx((0.1 * radius * length) ** 2, rel=1e-4)
    assert found.numbers["MSE"] == pytest.approx(model.evaluate(X, targets, verbose=0), rel=1e-5)


LOSSES = {
    "logits": (CE, None, Y),
    "probabilities": ("sparse_categorical_crossentropy", "softmax", Y),
    "one hot": ("categorical_crossentropy", "softmax", np.eye(3)[Y]),
    "labels": ("binary_crossentropy", "sigmoid", RNG.integers(2, size=(11, 3))),
    "label logits": (keras.losses.BinaryCrossentropy(from_logits=True), None, RNG.integers(2, size=(11, 3))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_likelihood_of_the_labels_is_the_compiled_loss(name):
    loss, activation, y = LOSSES[name]
    model = keras.Sequential([keras.Input([4]), layers.Dense(3, activation=activation)])
    model.compile("sgd", loss, run_eagerly=True)
    found = report(model, X, BALL, y, radii=[1])
    assert found.numbers["NLL"] == pytest.approx(model.evaluate(X, y, verbose=0), rel=1e-5)
    assert found.R_s[0] > 0


def test_one_label_an_example():
    for y in (Y, Y[:, None]):
        model = keras.Sequential([keras.Input([4]), layers.Dense(1, activation="sigmoid")])
        model.compile("sgd", "binary_crossentropy", metrics=["accuracy"], run_eagerly=True)
        found = report(model, X, BALL, y, radii=[1])
        loss, accuracy = model.evaluate(X, y, verbose=0)
        assert found.numbers["NLL"] == pytest.approx(loss, rel=1e-5)
        assert found.numbers["accuracy"] == pytest.approx(accuracy)


def tagger(loss, **embedding):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([5]), layers.Embedding(9, 4, **embedding), layers.Dense(3)])
    model.compile("sgd", loss, run_eagerly=True)
    return model


IDS, TAGS = RNG.integers(1, 9, size=(6, 5)), RNG.integers(3, size=(6, 5))


def test_positions_that_the_loss_leaves_out_do_not_count():
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    tags = np.where(np.arange(5) < 3, TAGS, -1)
    by_class = report(tagger(ignoring), IDS, BALL, tags, radii=[1])
    weight = (np.arange(5) < 3) * np.ones((6, 1)) * 2.0
    by_weight = report(tagger(CE), IDS, BALL, TAGS, weight, radii=[1])
    ids = np.where(np.arange(5) < 3, IDS, 0)
    by_mask = report(tagger(CE, mask_zero=True), ids, BALL, TAGS, radii=[1])
    for found in (by_class, by_weight, by_mask):
        assert found.scores["the model's output"].predictions == 18
    assert by_class.scores == by_weight.scores == by_mask.scores
    assert by_class.R_s == pytest.approx(by_mask.R_s, rel=1e-5)
    rows = report(tagger(CE), IDS, BALL, TAGS, np.arange(6) % 2, radii=[1])  # a weight of each example
    assert rows.scores["the model's output"].predictions == 15
    every = report(tagger(CE), IDS[1::2], BALL, TAGS[1::2], radii=[1])
    assert rows.numbers["NLL"] == pytest.approx(every.numbers["NLL"], rel=1e-6)


def test_classes_on_another_axis():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, axis=1)
    model = keras.Sequential([keras.Input([5, 4]), layers.Dense(3), layers.Permute([2, 1])])
    model.compile("sgd", loss, run_eagerly=True)
    x, y = RNG.normal(size=(6, 5, 4)), np.moveaxis(np.eye(3)[TAGS], -1, 1)
    found = report(model, x, BALL, y, radii=[1])
    assert found.numbers["NLL"] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    assert found.scores["the model's output"].predictions == 30


def test_several_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4])
    outputs = {"kind": layers.Dense(3, name="kind")(inputs), "size": layers.Dense(1, name="size")(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"kind": CE, "size": "mse"}, run_eagerly=True)
    labels = {"kind": Y, "size": X[:, :1]}
    found = report(model, X, BALL, labels, radii=[1])
    kind, size = (np.asarray(model(X)[name]) for name in ("kind", "size"))
    assert found.numbers["kind: accuracy"] == (kind.argmax(-1) == Y).mean()
    assert found.numbers["size: MSE"] == pytest.approx(np.square(size - X[:, :1]).mean(), rel=1e-5)
    alone = report(model, X, BALL, labels, radii=[1], outputs={"kind": "logits"})
    assert alone.scores["the model's output"].accuracy == found.scores["kind"].accuracy


class Everything(keras.Model):
    """Dropout, BatchNorm, a counter and random numbers; raises at a value of x."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.head = layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(2)
        self.calls, self.raises_at = 0, None

    def call(self, x, training=None):
        self.calls += 1
        if self.raises_at is not None and bool(tf.reduce_any(x == self.raises_at)):
            raise ArithmeticError
        random.random()
        return self.head(self.dropout(self.norm(x), training=training))


def state_of(model, smart):
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    values = [*model.variables, *model.non_trainable_variables, *model.optimizer.variables, *metrics]
    values += [] if smart is None else [smart.step, smart.penalty.draws, *smart.averages]
    plain = [random.getstate(), str(np.random.get_state()), model.calls, sorted(vars(model)), vars(model).get("call")]
    return [np.array(value) for value in values], plain


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_nothing_changes(raises, attached):
    model = Everything()
    model.compile("sgd", CE, run_eagerly=True)
    model.fit(X, Y, verbose=0)

    def check(smart):
        values, plain = state_of(model, smart)
        if raises:
            model.raises_at = X[10, 2]
            with pytest.raises(ArithmeticError):
                report(model, X, BALL, Y, batch_size=6, radii=[1])
            model.raises_at = None
        else:
            first, second = (report(model, X, BALL, Y, batch_size=6, radii=[1]) for _ in range(2))
            assert first == second
        after, plain_after = state_of(model, smart)
        assert plain_after == plain
        for a, b in zip(values, after, strict=True):
            np.testing.assert_array_equal(a, b)

    if not attached:
        check(None)
        return
    with attach(model, SMARTConfig(total_steps=9)) as smart:
        model.train_on_batch(X, Y)
        check(smart)
        model.train_on_batch(X, Y)
        assert smart.metrics["step"] == 2


def test_a_model_that_is_trained_or_wrapped_gives_what_it_gives_alone():
    model, during = linear(2, CE), []

    def ask(epoch, logs):
        during.append(report(model, X, BALL, Y, radii=[1]))

    asks = keras.callbacks.LambdaCallback(on_epoch_end=ask)
    model.fit(X, Y, verbose=0, callbacks=[SMARTCallback(), asks])
    alone = report(model, X, BALL, Y, radii=[1])
    assert during == [alone]
    wrapped = SMARTModel(model, SMARTConfig(total_steps=3))
    wrapped.compile("sgd", CE)
    assert report(wrapped, X, BALL, Y, radii=[1]) == alone


def test_no_more_batches_are_read_than_asked():
    def endless():
        while True:
            yield X[:2], Y[:2]

    signature = tf.TensorSpec([2, 4]), tf.TensorSpec([2], tf.int64)
    batches = tf.data.Dataset.from_generator(endless, output_signature=signature)
    assert report(linear(2, CE, run_eagerly=True), batches, BALL, radii=[1], batches=3).examples == 6


def test_what_is_refused():
    model = linear(2, CE, run_eagerly=True)
    for given, message in (
        ((X, BALL), r"there are no labels. Give y=, or a dataset of \(x, y\)|needs y before the first step"),
        ((X, BALL, Y + 1), "must be classes from 0 to 1"),
        ((X[:0], BALL, Y[:0]), "there is no batch"),
        ((X, SMARTConfig.mtdnn(), Y), "with projection='rescale' epsilon is no radius"),
    ):
        with pytest.raises(ValueError, match=message):
            report(model, *given)
    with pytest.raises(ValueError, match=r"report\(\) needs y before the first step"):
        report(linear(2, CE), X, BALL)
    with pytest.raises(ValueError, match=r"report\(\): there are no labels. Give y="):
        report(model, X, BALL, outputs="logits")
    with pytest.raises(TypeError, match=r"report\(\): config must be a SMARTConfig, got ndarray"):
        report(model, X, Y)
    unbuilt = keras.Sequential([layers.Dense(2)])
    unbuilt.compile("sgd", CE)
    with pytest.raises(ValueError, match=r"report\(\) needs a model that has weights"):
        report(unbuilt, X, BALL, Y)
    with pytest.raises(ValueError, match="layers|site"):
        report(model, X, BALL, Y, site="nothing")
    assert "call" not in vars(model)
