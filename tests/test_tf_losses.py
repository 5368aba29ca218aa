"""R_s and D_Breg are reduced as the compiled loss is: its axis of classes, its reduction, what it leaves out."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import SMARTWarning
from smartreg import divergences as reference
from smartreg_tf import SMARTCallback, attach
from smartreg_tf.outputs import Head, find_heads

N, T, C = 6, 5, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, T, 4)).astype(np.float32)
LABELS = RNG.integers(C, size=(N, T))
ONE_HOT = np.eye(C, dtype=np.float32)[LABELS]
Sparse, Categorical = keras.losses.SparseCategoricalCrossentropy, keras.losses.CategoricalCrossentropy
# theta~ moves by hand: D_Breg is that of two known sets of weights
CONFIG = papers(lambda_s=0, beta_early=0.5, beta_late=0.5)


def tagger(*end, loss, units=C, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([T, 4]), layers.Dense(units, name="head"), *end])
    model.compile(keras.optimizers.SGD(0.5), loss, run_eagerly=True, **options)
    return model


def D_Breg(model, y, outputs=None, **fit):
    """Of the second step, and the logits (n, T, units) of theta and of theta~ that it compares, in float64."""
    with attach(model, CONFIG, outputs=outputs) as smart:
        model.train_on_batch(X, y, **fit)
        logits = []
        for weights in (model.weights, smart.averages):
            kernel, bias = (tf.convert_to_tensor(weight).numpy().astype(np.float64) for weight in weights[:2])
            logits.append(X.astype(np.float64) @ kernel + bias)
        model.reset_metrics()
        plain = model.evaluate(X, y, verbose=0, batch_size=N, **fit)
        model.reset_metrics()
        added = float(model.train_on_batch(X, y, return_dict=True, **fit)["loss"]) - plain
        assert added == pytest.approx(smart.metrics["D_Breg"], rel=2e-3, abs=2e-6)  # it is what the loss got
        return smart.metrics["D_Breg"], *logits


def each(a, b, name="symmetric_kl"):
    """l_s of every position, (n, T)."""
    flat = [z.reshape(N * T, -1) for z in (a, b)]
    return reference.DIVERGENCES[name].value(*flat).reshape(N, T)


CLASSES_FIRST = {
    "logits": ([], {"from_logits": True}),
    "softmax and then turned": ([layers.Softmax()], {}),
    "softmax along the axis": (None, {}),
}


@pytest.mark.parametrize("case", CLASSES_FIRST)
def test_classes_on_the_axis_of_the_loss(case):
    end, options = CLASSES_FIRST[case]
    turn = layers.Permute((2, 1))
    end = [turn, layers.Softmax(axis=1)] if end is None else [*end, turn]
    model = tagger(*end, loss=Categorical(axis=1, **options))
    got, a, b = D_Breg(model, np.swapaxes(ONE_HOT, 1, 2))
    assert got == pytest.approx(each(a, b).mean(), rel=1e-4)


def test_labels_on_the_axis_of_the_loss():
    model = tagger(layers.Permute((2, 1)), loss=keras.losses.BinaryCrossentropy(from_logits=True, axis=1))
    got, a, b = D_Breg(model, np.swapaxes(ONE_HOT, 1, 2))
    assert got == pytest.approx(each(a, b, "bernoulli_symmetric_kl").mean(), rel=1e-4)


def test_a_loss_of_ones_own_with_classes_first_by_the_shape_of_its_labels():
    def loss(y, z):
        return keras.losses.sparse_categorical_crossentropy(y, keras.ops.swapaxes(z, 1, 2), from_logits=True)

    model = tagger(layers.Permute((2, 1)), loss=loss)
    got, a, b = D_Breg(model, LABELS, "logits")
    assert got == pytest.approx(each(a, b).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "label", "axis"),
    [
        ((8, 3, 5), (8, 5), 1),
        ((8, 5, 3), (8, 5), -1 % 3),
        ((8, 5, 3), (8, 5, 1), 2),
        ((8, 3, 4, 6), (8, 4, 6), 1),
        ((8, 5, 5), (8, 5), -1),  # either: the last, as everywhere
        ((8, 3, 5), (8, 3, 5), -1),  # one-hot labels say nothing
    ],
)
def test_the_axis_that_sparse_labels_lack(shape, label, axis):
    assert find_heads(None, tf.zeros(shape), "logits", y=tf.zeros(label))[0].axis == axis


def test_mask_and_weights_of_classes_first():
    z = tf.random.stateless_normal([N, C, T], [0, 1])
    mask = RNG.random((N, T)) < 0.6
    head = Head(0, "logits", axis=1)
    assert head.positions(z, [tf.constant(mask)]) is not None
    a, b = (head.logits(v).numpy().astype(np.float64) for v in (z, 2 * z))
    weight = RNG.random((N, T))
    want = (each(a, b) * mask * weight).sum(1) / np.maximum(mask.sum(1), 1)
    got = head.mean(tf.constant(a), tf.constant(b), tf.constant(mask), weight)
    assert float(got) == pytest.approx(want.mean(), rel=1e-12)


@pytest.mark.parametrize("weighted", ["", "by example", "by position"])
@pytest.mark.parametrize("reduction", [None, "none"])
def test_a_loss_that_is_a_sum_has_a_penalty_that_is_a_sum(reduction, weighted):
    weight = {"": None, "by example": RNG.random((N, 1)), "by position": RNG.random((N, T))}[weighted]
    model = tagger(loss=Sparse(from_logits=True, reduction="sum"))
    got, a, b = D_Breg(model, LABELS, sample_weight=weight)
    factor = 1 if weight is None else weight.reshape(N, -1)
    assert got == pytest.approx((each(a, b) * factor).sum(), rel=1e-4)
    # a loss that is not reduced trains alike: TensorFlow's gradient of it is that of its sum
    vector = tagger(loss=Sparse(from_logits=True, reduction=reduction))
    with attach(vector, CONFIG):
        for _ in range(2):
            vector.train_on_batch(X, LABELS, sample_weight=weight)
    for one, other in zip(model.get_weights(), vector.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_sum_counts_the_positions_that_are_not_masked():
    mask = RNG.random((N, T)) < 0.6
    a, b = RNG.normal(size=(2, N, T, C))
    head = Head(0, "logits", reduction="sum")
    got = head.mean(tf.constant(a), tf.constant(b), tf.constant(mask), None)
    assert float(got) == pytest.approx((each(a, b) * mask).sum(), rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_the_loss_ignores_is_left_out(reduction, weighted):
    y = np.where(np.arange(T) < 3, LABELS, -1)
    y[0] = -1  # a whole example
    weight = RNG.random((N, T)) + 0.5 if weighted else None
    model = tagger(loss=Sparse(from_logits=True, ignore_class=-1, reduction=reduction))
    got, a, b = D_Breg(model, y, sample_weight=weight)
    kept = (each(a, b) * (1 if weight is None else weight))[1:, :3]
    want = {"sum": kept.sum(), "sum_over_batch_size": kept.mean()}
    by_weights = kept.sum() / weight[1:, :3].sum() if weighted else kept.mean()
    assert got == pytest.approx(want.get(reduction, by_weights), rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_examples_that_the_loss_ignores_are_not_of_the_n(weighted):
    y, weight = np.array([0, 1, -1, 2, -1, 0]), RNG.random(N) if weighted else None
    a, b = RNG.normal(size=(2, N, C))
    kept, w = y >= 0, np.ones(N) if weight is None else weight
    J = reference.symmetric_kl(a, b) * kept
    for reduction, want in (
        ("sum_over_batch_size", (J * w).sum() / kept.sum()),
        ("sum", (J * w).sum()),
        ("mean_with_sample_weight", (J * w).sum() / (w * kept).sum()),
    ):
        head = Head(0, "logits", reduction=reduction, ignore_class=-1)
        assert float(head.mean(tf.constant(a), tf.constant(b), None, weight, y)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_what_the_loss_ignores_does_not_turn_the_ascent(start):
    """With R_s too: NaN at a position that does not count is of no account."""

    class Spoilt(layers.Layer):
        def call(self, z):
            return tf.where(tf.range(T)[:, None] < 3, z, np.float32(np.nan))

    y = np.where(np.arange(T) < 3, LABELS, -1)
    model = tagger(Spoilt(), loss=Sparse(from_logits=True, ignore_class=-1))
    with attach(model, papers(total_steps=9, start=start, epsilon=0.1, ascent_steps=1, scale="absolute")) as smart:
        model.train_on_batch(X, y)
        assert 0 < smart.metrics["R_s"] < 1
        assert 0 < smart.metrics["max_delta"] <= 0.1 + 1e-6


def test_outputs_of_several_reductions():
    """R_s is the sum of what each loss would make of its own l_s."""
    inputs = keras.Input([4])
    model = keras.Model(inputs, [layers.Dense(C, name="a")(inputs), layers.Dense(2, name="b")(inputs)])
    losses = [Sparse(from_logits=True, reduction="sum"), "mse"]
    model.compile(keras.optimizers.SGD(0.1), losses, loss_weights=[0.5, 2.0], run_eagerly=True)
    with attach(model, CONFIG) as smart:
        y = [LABELS[:, 0], ONE_HOT[:, 0, :2]]
        model.train_on_batch(X[:, 0], y)
        w = [weight.numpy().astype(np.float64) for weight in model.weights]
        v = [average.numpy().astype(np.float64) for average in smart.averages]
        model.train_on_batch(X[:, 0], y)
        a, b = ([X[:, 0] @ k[i] + k[i + 1] for i in (0, 2)] for k in (w, v))
        first, second = reference.symmetric_kl(a[0], b[0]).sum(), reference.squared_error(a[1], b[1]).mean()
        model.reset_metrics()
    head, other = find_heads(model, model(X[:, 0]), None)
    assert (head.reduction, other.reduction) == ("sum", "sum_over_batch_size")
    got = [
        h.weight * float(h.mean(tf.constant(p), tf.constant(q), None, None))
        for h, p, q in zip((head, other), a, b, strict=True)
    ]
    assert got == pytest.approx([0.5 * first, 2 * second], rel=1e-10)
    scales = [h.scale(tf.constant(p), None) for h, p in zip((head, other), a, strict=True)]
    np.testing.assert_allclose(scales[0], np.full(N, 0.5 * N))
    assert float(scales[1]) == 2


def test_a_softmax_compiled_as_logits():
    """Keras' losses take the layer's logits where it left them, and so do we; where it did not, nobody knows."""
    model = tagger(layers.Softmax(), loss=Sparse(from_logits=True))
    with pytest.warns(UserWarning, match="does not represent logits"):
        got, a, b = D_Breg(model, LABELS)
    assert got == pytest.approx(each(a, b).mean(), rel=1e-4)
    lost = tagger(layers.Softmax(), layers.Permute((2, 1)), layers.Permute((2, 1)), loss=Sparse(from_logits=True))
    with pytest.raises(ValueError, match=r"should be logits.*sums to 1\. Give the loss from_logits=False"):
        lost.fit(X, LABELS, verbose=0, callbacks=[SMARTCallback()])


def test_a_partial_of_keras_own_loss_says_what_it_says():
    from functools import partial

    loss = partial(keras.losses.sparse_categorical_crossentropy, from_logits=True)
    model = tagger(loss=loss)
    z = model(X)
    model.compute_loss(X, LABELS, z)
    assert find_heads(model, z, None)[0].kind == "logits"


def test_one_output_a_token_or_labels_of_an_example():
    """(n, T) with masked tokens is asked about; a varying T, or Keras' mask, says that these are tokens."""
    mask = tf.constant(RNG.random((N, T)) < 0.6)
    binary = keras.losses.BinaryCrossentropy(from_logits=True)
    model = tagger(layers.Flatten(), loss=binary, units=1)
    z = model(X)
    model.compute_loss(X, np.zeros((N, T)), z)
    with pytest.raises(
        ValueError, match=r"of shape \(6, 5\) may be 5 labels .*return shape \(6, 5, 1\);.*'label_logits'"
    ):
        find_heads(model, z, None, [mask])
    assert find_heads(model, z, "label_logits", [mask])[0].axis == -1
    assert find_heads(model, z, None)[0].axis == -1
    z._keras_mask = mask
    (head,) = find_heads(model, z, None)
    assert head.axis is None
    assert head.logits(z).shape == (N, T, 1)
    assert head.positions(z, []) is mask
    inputs = keras.Input([None, 4])
    squeezed = keras.Model(inputs, keras.ops.squeeze(layers.Dense(1)(inputs), -1))
    squeezed.compile("sgd", binary)
    z = squeezed(X)
    squeezed.compute_loss(X, np.zeros((N, T)), z)
    assert find_heads(squeezed, z, None, [mask])[0].axis is None


def test_a_mask_that_fits_no_position_of_the_outputs_is_told():
    z, mask = tf.zeros([2, 6, 3]), tf.ones([2, 4], tf.bool)
    head = Head(0, "logits")
    with pytest.warns(
        SMARTWarning, match=r"mask of shape \(2, 4\) does not fit the positions \(2, 6\) .* all of these"
    ):
        assert head.positions(z, [None, mask]) is None
    assert head.positions(z, [mask], sample_weight=np.ones((2, 6))) is None  # the user has weighed every position
    labelled = head._replace(ignore_class=-1).positions(z, [mask], y=np.zeros((2, 6)))
    assert labelled.shape == (2, 6)
    assert head.positions(tf.zeros([2, 3]), [mask]) is None  # one output an example
