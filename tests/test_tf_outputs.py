"""What the outputs are, by the compiled loss; bad input and bad numbers, each with its message."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import divergences as reference
from smartreg_tf import SMARTCallback, SMARTModel, attach
from smartreg_tf.outputs import Head, find_heads

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
CONFIG = papers(epsilon=0.3, sigma=0.3, beta_early=0.9, total_steps=9)


def model_with(*heads, loss, **options):
    inputs = keras.Input([3])
    outputs = [head(inputs) for head in heads]
    model = keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    return model


def heads_of(model, y, outputs=None):
    passed = model(X)
    if outputs is None:
        model.compute_loss(X, y, passed)
    return find_heads(model, passed, outputs)


@pytest.mark.parametrize(
    ("loss", "activation", "units", "kind"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), None, 3, "logits"),
        ("sparse_categorical_crossentropy", "softmax", 3, "probabilities"),
        ("categorical_crossentropy", "softmax", 3, "probabilities"),
        (keras.losses.CategoricalFocalCrossentropy(from_logits=True), None, 3, "logits"),
        ("kl_divergence", "softmax", 3, "probabilities"),
        (keras.losses.BinaryCrossentropy(from_logits=True), None, 3, "label_logits"),
        ("binary_crossentropy", "sigmoid", 1, "label_probabilities"),
        ("mse", None, 2, "regression"),
        ("mae", None, 1, "regression"),
        (keras.losses.Huber(), None, 1, "regression"),
    ],
)
def test_the_loss_says_what_the_outputs_are(loss, activation, units, kind):
    model = model_with(layers.Dense(units, activation=activation), loss=loss)
    y = np.zeros((8,) if "parse" in str(loss) else (8, units), np.float32)
    assert heads_of(model, y) == [Head(0, kind)]


def test_several_outputs_loss_weights_and_one_without_a_loss():
    dense = [layers.Dense(3, name="a", activation="softmax"), layers.Dense(1, name="b"), layers.Dense(2, name="c")]
    losses = {"a": "sparse_categorical_crossentropy", "c": "mse"}
    model = model_with(*dense, loss=[losses["a"], None, losses["c"]], loss_weights=[0.5, 1.0, 2.0])
    heads = heads_of(model, [np.zeros(8), np.zeros((8, 1)), np.zeros((8, 2))])
    weighed = [Head(0, "probabilities", 0.5, path=(0,)), Head(2, "regression", 2.0, path=(2,))]
    assert heads == weighed
    assert heads_of(model, None, {"b": "regression"}) == [Head(1, "regression")]
    assert heads_of(model, None, ["probabilities", None, "regression"]) == weighed


def test_probabilities_keep_the_digits_of_their_logits():
    inputs = keras.Input([3])
    model = keras.Model(inputs, layers.Softmax()(layers.Dense(3)(inputs)))
    outputs, near = model(tf.constant(X)), model(tf.constant(X * (1 + 1e-4)))
    head = Head(0, "probabilities")
    dense = model.layers[1]
    kernel = dense.kernel.numpy().astype(np.float64)
    a, b = (np.float32(x).astype(np.float64) @ kernel for x in (X, X * (1 + 1e-4)))
    want = reference.symmetric_kl(a, b)
    got = head.mean(head.logits(outputs), head.logits(near), None, None)
    np.testing.assert_allclose(got, want.mean(), rtol=2e-2)  # what is left is the rounding of the layer itself
    # without them it still is the same divergence, coarser
    far = head.logits(model(tf.constant(2 * X)))
    plain = [tf.math.log(tf.identity(p)) for p in (model(tf.constant(X)), model(tf.constant(2 * X)))]
    np.testing.assert_allclose(
        head.mean(*plain, None, None), head.mean(head.logits(outputs), far, None, None), rtol=1e-4
    )
    p = tf.constant([[0.9, 0.2]])
    np.testing.assert_allclose(Head(0, "probabilities").logits(p), np.log([[0.9, 0.2]]), rtol=1e-6)
    np.testing.assert_allclose(Head(0, "label_probabilities").logits(p), np.log([[9, 0.25]]), rtol=1e-5)
    assert np.isfinite(Head(0, "label_probabilities").logits(tf.constant([[0.0, 1.0]]))).all()
    certain = keras.activations.sigmoid(tf.constant([[20.0]]))  # 1 in float32
    assert Head(0, "label_probabilities").logits(certain).numpy() == 20


def test_weights_of_positions_and_the_mean_by_weights():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 5, 3))
    mask, weight = rng.random((4, 5)) < 0.7, rng.random((4, 5))
    each = np.array([reference.symmetric_kl(a[:, t], b[:, t]) for t in range(5)]).T
    want = ((each * mask * weight).sum(1) / mask.sum(1)).mean()
    head = Head(0, "logits")
    tensors = tf.constant(a), tf.constant(b), tf.constant(mask)
    np.testing.assert_allclose(head.mean(*tensors, weight), want, rtol=1e-12)
    ones = np.ones((4, 5))
    np.testing.assert_allclose(head.mean(*tensors, ones), head.mean(*tensors, None), rtol=1e-12)
    w = np.array([[1.0], [2.0], [0.0], [0.5]])
    want = (reference.symmetric_kl(a, b, mask) * w[:, 0]).sum() / w.sum()
    np.testing.assert_allclose(
        Head(0, "logits", reduction="mean_with_sample_weight").mean(*tensors, w), want, rtol=1e-12
    )


def test_keras_mask_on_the_output_goes_before_the_sites():
    z, own, other = tf.zeros([2, 3, 4]), tf.ones([2, 3], tf.bool), tf.zeros([2, 3], tf.bool)
    assert Head(0, "logits").positions(z, [None, other]) is other
    z._keras_mask = own
    assert Head(0, "logits").positions(z, [None, other]) is own


def test_outputs_that_cannot_be_told():
    custom = model_with(layers.Dense(2), loss=lambda y, p: keras.ops.mean(p))
    with pytest.raises(
        ValueError, match=r"the loss '<lambda>' does not say what the outputs are. Say outputs=, one of"
    ):
        custom.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback()])
    custom.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback(outputs="regression")])
    model = model_with(layers.Dense(1), loss="mse")
    for outputs, message in (
        ("logitz", r"outputs= must be of logits, .*, got 'logitz'"),
        (["regression", None], "outputs= has 2 entries, but the model has 1 outputs"),
        ({"nose": "logits"}, "outputs= names 'nose'; the model's outputs are"),
        ("logits", "one value an example, of which symmetric_kl is always 0"),
        ([None], "no output has a loss to compare it by"),
    ):
        with pytest.raises(ValueError, match=message):
            find_heads(model, model(X), outputs)
    model.compile("sgd")
    with pytest.raises(ValueError, match="compiled without a loss"):
        find_heads(model, model(X), None)


def test_probabilities_that_are_not_normalised():
    """from_logits forgotten: Keras clips and goes on; SMART says so."""
    model = model_with(layers.Dense(3), loss="sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"should be probabilities.*Give the loss from_logits=True"):
        model.fit(X, np.zeros(8), verbose=0, callbacks=[SMARTCallback()])
    assert set(model.fit(X, np.zeros(8), verbose=0).history) == {"loss"}


class NoEmbedding(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, ids):
        return self.dense(keras.ops.one_hot(ids, 5))


def test_nothing_to_perturb():
    model = NoEmbedding()
    model.compile("sgd", "mse")
    with pytest.raises(
        RuntimeError, match=r"the model's float inputs did not run .* has no Embedding layer and no float"
    ):
        model.fit(np.ones((4,), int), np.ones((4, 2)), verbose=0, callbacks=[SMARTCallback()])
    model.fit(
        np.ones((4,), int),
        np.ones((4, 2)),
        verbose=0,
        callbacks=[SMARTCallback(site=model.dense, outputs="regression")],
    )


def test_an_embedding_that_does_not_reach_the_output():
    ids = keras.Input([3], dtype="int32")
    dead = layers.Embedding(5, 2, name="dead")(ids)
    alive = layers.Dense(2)(layers.Flatten()(layers.Embedding(5, 2)(ids)))
    model = keras.Model(ids, alive + keras.ops.stop_gradient(keras.ops.sum(dead) * 0))
    model.compile("sgd", "mse")
    for start in ("gaussian", "margin"):
        with pytest.raises(RuntimeError, match=r"no gradient leads from the outputs to the layer .*'dead'"):
            model.fit(np.ones((4, 3), int), np.ones((4, 2)), verbose=0, callbacks=[SMARTCallback(papers(start=start))])


def test_layers_that_are_none_or_return_no_floats():
    model = model_with(layers.Dense(2, name="only"), loss="mse")
    with pytest.raises(ValueError, match=r"site= names 'other', which the model does not have; it has .*only"):
        model.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback(site="other")])
    inputs = keras.Input([3])
    cast = layers.Lambda(lambda x: keras.ops.cast(x, "int32"), name="whole", output_shape=(3,))(inputs)
    model = keras.Model(inputs, layers.Dense(2)(keras.ops.cast(cast, "float32")))
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match=r"the layer 'whole' must return a float tensor .* got int32"):
        model.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback(site="whole")])


class Draws(layers.Layer):
    """Runs its embedding once in the first pass and twice in the others; its count is no attribute of its own."""

    count = 0

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(5, 2)

    def call(self, ids):
        Draws.count += 1
        x = self.embedding(ids)
        return x if Draws.count == 1 else x + self.embedding(ids)


def test_a_site_that_runs_another_number_of_times():
    model = keras.Sequential([Draws(), layers.Flatten(), layers.Dense(2)])
    model.build((None, 3))
    Draws.count = 0
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(RuntimeError, match="ran 1 times in the clean pass and 2 times in a later one"):
        model.fit(np.ones((4, 3), int), np.ones((4, 2)), verbose=0, callbacks=[SMARTCallback()])


def test_two_callbacks_on_one_model():
    model = model_with(layers.Dense(2), loss="mse")
    with pytest.raises(ValueError, match="already has a SMARTCallback or attach"):
        model.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback(), SMARTCallback()])
    assert set(model.fit(X, X[:, :2], verbose=0).history) == {"loss"}
    with attach(model, CONFIG), pytest.raises(ValueError, match="already has a SMARTCallback or attach"):
        model.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback()])
    wrapped = SMARTModel(model, CONFIG)
    wrapped.compile("sgd", "mse")
    with pytest.raises(ValueError, match="already has a SMARTCallback or attach"):
        wrapped.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback()])


class NeverAsks(keras.Model):
    def __init__(self, calls=True):
        super().__init__()
        self.dense, self.calls = layers.Dense(2), calls

    def call(self, x):
        return self.dense(x)

    def train_step(self, batch):
        x, y = batch
        if self.calls:
            return {"own": keras.ops.mean(self(x))}
        return {"own": self.compute_loss(x, y, self.dense(x))}


def test_a_train_step_that_never_asks_for_the_loss_or_never_calls_the_model():
    for calls, message in (
        (True, "never called model.compute_loss"),
        (False, "compute_loss without calling the model"),
    ):
        model = NeverAsks(calls)
        model.compile("sgd", "mse")
        model(X)
        with pytest.raises(RuntimeError, match=message):
            model.fit(X, X[:, :2], verbose=0, callbacks=[SMARTCallback()])


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")  # Keras', of any dataset without a length
def test_total_steps_of_an_unknown_length():
    model = model_with(layers.Dense(2), loss="mse")

    def endless():
        while True:
            yield X, X[:, :2]

    batches = tf.data.Dataset.from_generator(
        endless, output_signature=(tf.TensorSpec([8, 3]), tf.TensorSpec([8, 2]))
    ).take(8)
    quiet = {"verbose": 0, "shuffle": False}
    with pytest.raises(ValueError, match=r"SMARTCallback: fit does not know how many batches .*total_steps="):
        model.fit(batches, **quiet, callbacks=[SMARTCallback()])
    callback = SMARTCallback()
    model.fit(batches, epochs=2, steps_per_epoch=2, **quiet, callbacks=[callback])
    assert callback.engine.config.total_steps == 4
    model.fit(batches, **quiet, callbacks=[SMARTCallback(papers(total_steps=8))])
    with (
        pytest.raises(ValueError, match=r"attach: mu > 0 and theta~ remembers .* total_steps is needed"),
        attach(model),
    ):
        pass
    with pytest.raises(TypeError, match="SMARTCallback: config must be a SMARTConfig, got dict"):
        model.fit(batches, **quiet, callbacks=[SMARTCallback({"mu": 1})])


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=["graph", "eager", "xla"])
def test_a_penalty_that_is_not_finite(options):
    """The noise is NaN once: "raise" names the step and the pass, "skip" trains on without a penalty."""

    def noise(step, like):
        return tf.where(step == 1, np.float32(np.nan), tf.ones_like(like))

    def run(**changes):
        keras.utils.set_random_seed(0)
        model = model_with(layers.Dense(2), loss="mse", **options)
        callback = SMARTCallback(CONFIG.replace(mu=0, **changes), noise=noise)
        run.callback = callback
        return model, lambda: model.fit(X, X[:, :2], batch_size=4, shuffle=False, verbose=0, callbacks=[callback])

    model, fit = run()
    start = model.get_weights()
    with pytest.raises(FloatingPointError, match=r"penalty of step 2 is not finite; .* in the perturbed pass.*'skip'"):
        fit()
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    model, fit = run(non_finite="skip")
    assert np.isfinite(fit().history["loss"]).all()
    assert run.callback.metrics["skipped"] == 1
    skipped = model.get_weights()
    assert all(np.isfinite(weight).all() for weight in skipped)
    # the second batch was trained on, as without SMART
    model.set_weights(start)
    plain, _ = run()
    keras.utils.set_random_seed(0)
    callback = SMARTCallback(CONFIG.replace(mu=0), noise=lambda step, like: tf.ones_like(like))
    plain.fit(X[:4], X[:4, :2], batch_size=4, shuffle=False, verbose=0, callbacks=[callback])
    plain.fit(X[4:], X[4:, :2], batch_size=4, shuffle=False, verbose=0)
    for got, want in zip(skipped, plain.get_weights(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
