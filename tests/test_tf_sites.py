"""Which layer or input of a Keras model is perturbed by default, and what else may be: ragged, sparse, integer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from paper_settings import papers

from smartreg import SMARTWarning
from smartreg.divergences import DIVERGENCES
from smartreg_tf import SMARTCallback, attach
from smartreg_tf.candidates import candidates
from smartreg_tf.inputs import padding_mask
from smartreg_tf.site import Call, Site

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
N, T, V = 8, 6, 20
RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(1, V, size=(N, T)), RNG.integers(2, size=N)
IMAGES = RNG.random((N, 8, 8, 3)).astype(np.float32)
CONFIG = papers(mu=0, epsilon=0.1, sigma=0.1, scale="absolute", start="margin", ascent_steps=0)


class TokenAndPosition(layers.Layer):
    """As in keras.io's text classification with a transformer."""

    def __init__(self):
        super().__init__()
        self.token_emb, self.pos_emb = layers.Embedding(V, 4), layers.Embedding(T, 4)

    def call(self, ids):
        return self.token_emb(ids) + self.pos_emb(ops.arange(0, ops.shape(ids)[-1]))


class ByKey(layers.Layer):
    def __init__(self):
        super().__init__()
        self.tables = {"words": layers.Embedding(V, 4), "position": layers.Embedding(T, 4)}

    def call(self, ids):
        positions = ops.broadcast_to(ops.arange(0, T), ops.shape(ids))  # one row an example
        return self.tables["words"](ids) + self.tables["position"](positions)


class Unnamed(layers.Layer):
    def __init__(self, expand=False):
        super().__init__()
        self.first, self.second, self.expand = layers.Embedding(V, 4), layers.Embedding(T, 4), expand

    def call(self, ids):
        at = ops.arange(0, T)
        return self.first(ids) + self.second(ops.expand_dims(at, 0) if self.expand else at)


class PatchEncoder(layers.Layer):
    """As in keras.io's image classification with a vision transformer."""

    def __init__(self, name_of_table):
        super().__init__()
        self.projection = layers.Dense(4)
        setattr(self, name_of_table, layers.Embedding(16, 4))
        self.table = getattr(self, name_of_table)

    def call(self, patches):
        return self.projection(patches) + self.table(ops.expand_dims(ops.arange(0, 16), 0))


def classifier(embedded, ids, **compiled):
    model = keras.Model(ids, layers.Dense(2)(layers.Flatten()(embedded)))
    model.compile("sgd", CE, **compiled)
    return model


def text(layer, **compiled):
    keras.utils.set_random_seed(0)
    ids = keras.Input([T], dtype="int32")
    return classifier(layer(ids), ids, **compiled)


def deltas(model, x, layers=None, config=CONFIG, y=Y, **options):
    """The shapes that noise is drawn for; R_s of one step, which is that of its outputs; and the site."""
    seen, steps = [], []

    def noise(step, like):
        seen.append(tuple(like.shape[1:]))
        return tf.ones_like(like)

    options |= {"noise": noise, "on_step": steps.append}
    with attach(model, config.replace(start="gaussian"), site=layers, **options) as smart:
        model.train_on_batch(x, y)
        (step,), R_s = steps, smart.metrics["R_s"]
        (name,), (perturbed,), (outputs,), (mask,) = step.divergences, step.perturbed, step.outputs, step.positions
        np.testing.assert_allclose(R_s, DIVERGENCES[name].value(perturbed, outputs, mask).mean(), rtol=1e-5)
        assert all(np.max(delta) == np.float32(0.1) for delta in step.delta)
        return seen, R_s, smart.site


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("layer", [TokenAndPosition, ByKey, Unnamed], ids=["text", "by key", "unnamed"])
def test_position_tables_are_known_by_the_attribute_that_holds_them(layer, eager):
    """One that is not named is known by its first axis."""
    shapes, _, site = deltas(text(layer(), run_eagerly=eager), IDS)
    assert shapes == [(T, 4)]
    assert len(site.layers) == 1


def test_a_position_table_of_shape_1_is_no_site():
    assert deltas(text(Unnamed(expand=True)), IDS)[0] == [(T, 4)]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", ["position_embedding", "anything"])
def test_a_table_of_positions_alone_leaves_the_float_input(name, eager):
    images = keras.Input([8, 8, 3])
    model = classifier(PatchEncoder(name)(layers.Reshape([16, 12])(images)), images, run_eagerly=eager)
    shapes, R_s, site = deltas(model, IMAGES)
    assert shapes == [(8, 8, 3)]
    assert str(site) == "the model's float inputs"
    assert R_s > 0


def test_a_site_that_is_shared_by_the_batch_is_refused():
    class OneHot(layers.Layer):
        def __init__(self):
            super().__init__()
            self.at = layers.Embedding(T, V)

        def call(self, ids):
            return ops.one_hot(ids, V) + self.at(ops.arange(0, T))

    model = text(OneHot())
    with pytest.raises(
        ValueError, match=r"the layer 'embedding.*' must have one x an example.* got \(6, 20\) in a batch"
    ):
        model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG)])
    assert set(model.fit(IDS, Y, verbose=0).history) == {"loss"}
    model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(papers(lambda_s=0))])
    table = model.layers[1].at
    for eager in (True, False):
        model.compile("sgd", CE, run_eagerly=eager)
        with pytest.raises(ValueError, match="must have one x an example"):  # in a graph it is counted
            model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG, site=table)])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("size", [4, None])
def test_a_varying_number_of_positions(size, named):
    """Neither axis has a size when the step is traced: the graph tells what depends on the data."""

    class Varying(Unnamed):
        def call(self, ids):
            return self.first(ids) + self.second(ops.arange(0, ops.shape(ids)[1]))

    ids = keras.Input([None], dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.GlobalAveragePooling1D()(Varying()(ids))))
    model.compile("sgd", CE)
    data = tf.data.Dataset.from_tensor_slices((IDS[:, :4], Y)).batch(4, drop_remainder=size is not None)
    first, second = model.layers[1].first, model.layers[1].second
    callback = SMARTCallback(CONFIG, site=first if named else None)
    assert model.fit(data, shuffle=False, verbose=0, callbacks=[callback]).history["smoothness"][0] > 0
    assert callback.engine.site.layers == [first]
    with pytest.raises(ValueError, match="must have one x an example.*Name another layer"):
        model.fit(data, shuffle=False, verbose=0, callbacks=[SMARTCallback(CONFIG, site=second)])


class Choices(keras.Model):
    """Several texts an example, flattened to one row each, as in multiple choice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = layers.Embedding(V, 4), layers.Dense(1)

    def call(self, ids):
        z = self.head(ops.mean(self.embedding(ops.reshape(ids, (-1, T))), 1))
        return ops.reshape(z, (-1, ids.shape[1]))


@pytest.mark.parametrize("eager", [False, True])
def test_several_rows_an_example_have_a_ball_each(eager):
    model = Choices()
    model.compile("sgd", CE, run_eagerly=eager)
    shapes, R_s, _ = deltas(model, np.stack([IDS, IDS[::-1]], 1))
    assert set(shapes) == {(T, 4)}  # the model is built by the trace, which is then another
    assert R_s > 0


def test_rows_that_mix_examples_are_told_after_the_step():
    """Only the step knows; nothing is trained on them."""

    class Mixed(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = layers.Embedding(V, 4), layers.Dense(2)

        def call(self, ids):
            known = tf.boolean_mask(ids, ids > 0)  # (tokens of all, ), of which there are not as many each
            return self.head(ops.mean(self.embedding(ids), 1) + ops.mean(self.embedding(known), 0))

    model = Mixed()
    model.compile("sgd", CE, jit_compile=False)
    ids = IDS.copy()
    ids[0, 0] = 0
    with pytest.raises(ValueError, match="must have one x an example.*got another number of them than the batch"):
        model.fit(ids, Y, verbose=0, callbacks=[SMARTCallback(CONFIG)])


def test_segment_in_the_name_of_the_only_embedding():
    ids = keras.Input([T], dtype="int32")
    model = classifier(layers.Embedding(V, 4, name="segmenter")(ids), ids)
    shapes, _, site = deltas(model, IDS)
    assert shapes == [(T, 4)]
    assert [layer.name for layer in site.layers] == ["segmenter"]
    ids = keras.Input([T], dtype="int32")
    model = classifier(layers.Embedding(V, 4, name="reposition")(ids), ids)
    assert deltas(model, IDS)[0] == [(T, 4)]
    why = [candidate.why for candidate in candidates(model)]
    assert why == ["no token Embedding or Masking layer makes one x an example", "the only Embedding"]


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_integer_images_are_cast_as_keras_casts_them(start):
    inputs = keras.Input([8, 8, 3])
    keras.utils.set_random_seed(0)
    model = classifier(layers.Rescaling(1 / 255)(inputs), inputs)
    whole = (255 * IMAGES).astype(np.uint8)
    found = []
    for x in (whole, whole.astype(np.float32)):
        model.compile(keras.optimizers.SGD(0.0), CE)
        with attach(model, CONFIG.replace(start=start, epsilon=9)) as smart:
            model.train_on_batch(x, Y)
            found.append(smart.metrics["R_s"])
    assert found[0] == found[1] > 0


def test_one_column_without_its_axis():
    inputs = keras.Input([1])
    model = classifier(inputs, inputs)
    assert deltas(model, np.ones(N, np.float32))[0] == [(1,)]


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_ragged_ids_have_the_R_s_of_the_padded_and_masked_ones(start):
    lengths = RNG.integers(1, T + 1, size=N)
    padded = np.where(np.arange(T) < lengths[:, None], IDS, 0)

    class Sum(layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            if mask is None:
                return tf.reduce_sum(x, 1)
            return tf.reduce_sum(tf.where(mask[..., None], x, 0.0), 1)

        def compute_mask(self, x, mask=None):
            return None

    found = []
    for ragged in (False, True):
        keras.utils.set_random_seed(0)
        embedding = layers.Embedding(V, 4, mask_zero=not ragged)
        model = keras.Sequential([embedding, Sum(), layers.Dense(2)])
        model.compile(keras.optimizers.SGD(0.1), CE, run_eagerly=True)
        x = tf.RaggedTensor.from_tensor(padded, lengths=lengths) if ragged else tf.constant(padded)
        model(x)
        embedding.embeddings.assign(np.random.default_rng(3).normal(size=(V, 4)))
        model.layers[2].kernel.assign(np.random.default_rng(4).normal(size=(4, 2)))
        noise = np.random.default_rng(5).normal(size=(N, T, 4))
        size = int(lengths.max())
        config = CONFIG.replace(start=start, scale="rms", norm="2", mu=1.0, beta_early=0.9, beta_late=0.9)
        with attach(model, config, noise=lambda step, like, noise=noise: noise[:, : like.shape[1]]) as smart:
            for _ in range(2):
                model.fit(tf.data.Dataset.from_tensors((x, Y)), shuffle=False, verbose=0)
            found.append([smart.metrics[name] for name in ("R_s", "D_Breg", "max_delta")])
            found[-1] += [weight.numpy().sum() for weight in model.weights]
        assert size <= T
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
    assert found[0][0] > 0


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_sparse_inputs_have_the_R_s_of_the_dense_ones(start):
    x = np.where(RNG.random((N, 10)) < 0.3, RNG.normal(size=(N, 10)), 0).astype(np.float32)
    noise = RNG.normal(size=(N, 10))
    found = []
    for sparse in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input([10], sparse=sparse)
        model = keras.Model(inputs, layers.Dense(2)(layers.Dense(5, activation="tanh", name="h")(inputs)))
        given = tf.sparse.from_dense(x) if sparse else tf.constant(x)
        data = tf.data.Dataset.from_tensors((given, Y))
        for named in (None, "h"):
            model.compile(keras.optimizers.SGD(0.1), CE)
            config = CONFIG.replace(start=start, scale="rms", norm="2")
            with attach(model, config, site=named, noise=lambda step, like: noise[:, : like.shape[1]]) as smart:
                model.fit(data, shuffle=False, verbose=0)
                found.append([smart.metrics["R_s"], smart.metrics["max_delta"]])
    np.testing.assert_allclose(found[:2], found[2:], rtol=1e-4)
    assert np.min(found) > 0


class Cell(layers.Layer):
    """A recurrent cell with an Embedding of its own."""

    def __init__(self):
        super().__init__()
        self.words, self.cell, self.state_size = layers.Embedding(V, 4, name="words"), layers.GRUCell(4), 4

    def build(self, shape):
        self.words.build(None)
        self.cell.build((None, 4))

    def call(self, ids, states, training=None):
        return self.cell(self.words(ops.cast(ids[:, 0], "int32")), states)


def recurrent(**options):
    ids = keras.Input([T, 1], dtype="int32")
    model = keras.Model(ids, layers.Dense(2)(layers.RNN(Cell(), **options)(ids)))
    model.compile("sgd", CE)
    return model


def test_an_embedding_inside_a_loop_is_refused_by_name():
    model = recurrent()
    with pytest.raises(ValueError, match=r"the layer 'words' runs inside a loop.*site=.*unroll=True.*lambda_s=0"):
        model.fit(IDS[..., None], Y, verbose=0, callbacks=[SMARTCallback(CONFIG)])
    assert set(model.fit(IDS[..., None], Y, verbose=0).history) == {"loss"}
    assert not [name for name in vars(model) if "smart" in name]
    assert not [name for name in ("call", "train_step", "compute_loss") if name in vars(model)]
    history = model.fit(IDS[..., None], Y, verbose=0, callbacks=[SMARTCallback(papers(lambda_s=0))]).history
    assert np.isfinite(history["proximal"]).all()
    (rnn,) = [layer for layer in model.layers if isinstance(layer, layers.RNN)]
    shapes, R_s, _ = deltas(model, IDS[..., None], rnn)
    assert shapes == [(4,)]
    assert R_s > 0


def test_an_embedding_inside_an_unrolled_loop_runs_once_a_step():
    shapes, R_s, _ = deltas(recurrent(unroll=True), IDS[..., None])
    assert shapes == [(4,)] * len(shapes)
    assert len(shapes) >= T
    assert R_s > 0


class AddsLoss(layers.Layer):
    """The label comes in as an input, for add_loss; and into the output, where it is reached."""

    def __init__(self, reached):
        super().__init__()
        self.reached = reached

    def call(self, given):
        label, z = given
        self.add_loss(ops.mean((z - label) ** 2))
        return z + 0 * ops.tanh(label) if self.reached else z


@pytest.mark.parametrize("start", ["gaussian", "margin"])
@pytest.mark.parametrize("reached", [False, True], ids=["", "reached"])
def test_a_label_among_the_float_inputs_is_not_perturbed(reached, start):
    x, label = keras.Input([3], name="x"), keras.Input([2], name="label")
    model = keras.Model([x, label], AddsLoss(reached)([label, layers.Dense(2)(x)]))
    model.compile("sgd")
    given = [IMAGES[:, 0, 0], IMAGES[:, 0, 1, :2]]
    assert deltas(model, given, y=None, outputs="regression")[0] == [(3,)]
    assert deltas(model, given, "label", y=None, outputs="regression")[0] == [(2,)] if reached else True
    callback = SMARTCallback(CONFIG.replace(start=start), outputs="regression")
    assert model.fit(given, verbose=0, callbacks=[callback]).history["smoothness"][0] > 0


def test_an_input_that_no_output_depends_on_stays_as_it_is():
    x, other = keras.Input([3], name="x"), keras.Input([2], name="what_is_it")
    model = keras.Model([x, other], AddsLoss(False)([other, layers.Dense(2)(x)]))
    model.compile("sgd", run_eagerly=True)
    config = CONFIG.replace(start="margin")
    with attach(model, config, outputs="regression", noise=lambda step, like: tf.ones_like(like)) as smart:
        model.train_on_batch([IMAGES[:, 0, 0], IMAGES[:, 0, 1, :2]])
        kernel = model.layers[1].kernel if hasattr(model.layers[1], "kernel") else model.layers[2].kernel
        assert smart.metrics["R_s"] > 0
        assert kernel.shape == (3, 2)


def test_a_label_that_is_the_only_float_input_is_asked_about():
    ids, label = keras.Input([T], dtype="int32", name="ids"), keras.Input([2], name="label")
    counted = layers.Lambda(lambda i: ops.sum(ops.one_hot(i, V), 1), output_shape=(V,))(ids)
    model = keras.Model([ids, label], AddsLoss(False)([label, layers.Dense(2, name="head")(counted)]))
    model.compile("sgd")
    with pytest.raises(ValueError, match="only float input .* 'label', is a label by its name.*site='label'"):
        model.fit([IDS, IMAGES[:, 0, 0, :2]], verbose=0, callbacks=[SMARTCallback(CONFIG, outputs="regression")])


def test_an_input_is_named():
    a, b = keras.Input([3], name="a"), keras.Input([2], name="b")
    model = keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])))
    model.compile("sgd", CE)
    shapes, _, site = deltas(model, [IMAGES[:, 0, 0], IMAGES[:, 0, 1, :2]], "b")
    assert shapes == [(2,)]
    assert str(site) == "the input 'b'"
    assert site.why == "named by site="
    assert deltas(model, [IMAGES[:, 0, 0], IMAGES[:, 0, 1, :2]])[0] == [(3,), (2,)]


def test_an_embedding_called_by_keyword_keeps_its_mask():
    class Keyword(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = layers.Embedding(V, 4, mask_zero=True), layers.Dense(2)

        def call(self, ids):
            return self.head(ops.sum(self.embedding(inputs=ids), 1))

    model = Keyword()
    model.compile("sgd", CE, run_eagerly=True)
    ids = np.where(np.arange(T) < 3, IDS, 0)
    seen = []
    with attach(model, CONFIG.replace(start="gaussian"), on_step=seen.append):
        model.train_on_batch(ids, Y)
    (delta,) = seen[0].delta
    assert (np.abs(delta[:, :3]).max(-1) > 0).all()
    assert np.abs(delta[:, 3:]).max() == 0


REAL = np.arange(T) < np.array([6, 2, 3, 4])[:, None]
CONVENTIONS = {
    "true is real": REAL,
    "1 is real": REAL.astype(np.int32),
    "true at padding": ~REAL,
    "true at padding, nothing padded": np.zeros((4, T), bool),
    "added": np.where(REAL, 0.0, -1e4).astype(np.float32),
    "added, nothing padded": np.zeros((4, T), np.float32),
    "of heads and queries": np.where(REAL, 0.0, -np.inf).astype(np.float32)[:, None, None],
    "of each query": np.tril(np.ones((T, T), bool)) & REAL[:, None],
}


@pytest.mark.parametrize("case", CONVENTIONS)
def test_a_padding_mask_input_in_any_convention(case):
    x = np.where(REAL[..., None] | ("nothing" in case), RNG.normal(size=(4, T, 3)), 0.5).astype(np.float32)
    got = padding_mask({"attention_mask": CONVENTIONS[case]}, tf.constant(x))
    np.testing.assert_array_equal(got, REAL | ("nothing" in case))


def test_a_padding_mask_that_does_not_fit_is_told():
    with pytest.warns(
        SMARTWarning, match=r"input 'padding_mask' of shape \(4, 9\) does not fit the positions \(4, 6\)"
    ):
        assert padding_mask({"padding_mask": np.ones((4, 9))}, tf.zeros([4, T, 3])) is None


def test_a_padding_mask_is_found_by_the_name_of_an_input_or_an_argument():
    ids, mask = keras.Input([T], dtype="int32"), keras.Input([T], name="attention_mask")
    x = layers.Embedding(V, 4)(ids) * mask[..., None]
    model = classifier(x, [ids, mask])
    real = np.arange(T) < 3
    seen = []
    with attach(model, CONFIG.replace(start="gaussian"), on_step=seen.append):
        model.train_on_batch([np.where(real, IDS, 0), np.tile(real, (N, 1)).astype(np.float32)], Y)
    np.testing.assert_array_equal(seen[0].mask[0], np.tile(real, (N, 1)))
    site = Site(model)
    given = {"padding_mask": np.tile(real, (N, 1))}
    call = Call(tf.random.stateless_normal([N, T, 4], [0, 1]), None)
    np.testing.assert_array_equal(site.padding_mask(((IDS,), given), call), given["padding_mask"])
