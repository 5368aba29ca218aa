"""SMARTConfig(dropout=) in Keras: which masks each pass has, and what becomes of the seed generators."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from notes import Notes
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg_tf import SMARTCallback, attach
from smartreg_tf.step import own_key

RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(16, 5)), RNG.integers(3, size=16)
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
START = {
    "gaussian": papers(ascent_steps=1, dropout="independent", epsilon=0.1, sigma=0.1, total_steps=9),
    "margin": papers(start="margin", ascent_steps=1, dropout="independent", epsilon=0.1, total_steps=9),
}
R_DROP = SMARTConfig(start="gaussian", sigma=0, ascent_steps=0, dropout="independent", mu=0)
MODES = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}, "xla": {"jit_compile": True}}


class Masked(layers.Layer):
    """Dropout that writes its multipliers down."""

    def __init__(self, notes, how="generator"):
        super().__init__()
        self.notes, self.how = notes, how
        if how == "generator":
            self.seeds = keras.random.SeedGenerator(3)
        elif how == "in a list":
            self.held = [keras.random.SeedGenerator(3)]

    def call(self, x, training=False):
        if not training:
            return x
        seed = {"generator": lambda: self.seeds, "in a list": lambda: self.held[0], "default": lambda: None}[self.how]()
        mask = tf.cast(keras.random.uniform(tf.shape(x), seed=seed) < 0.75, x.dtype) / 0.75
        self.notes.add(mask)
        return x * mask


def network(dropout=None, mode="graph"):
    keras.utils.set_random_seed(1)
    upper = [dropout or layers.Dropout(0.25, seed=5), layers.Dense(6), layers.BatchNormalization(), layers.Dense(3)]
    model = keras.Sequential([keras.Input([5], dtype="int32"), layers.Embedding(20, 4), layers.Flatten(), *upper])
    model.compile(keras.optimizers.SGD(0.1), CE, **MODES[mode])
    return model


def one_fit(config, mode="graph", model=None, epochs=1, **options):
    model = model or network(mode=mode)
    callback = SMARTCallback(config, **options)
    history = model.fit(IDS, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback]).history
    return history, [np.array(variable) for variable in model.variables], callback


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("how", ["generator", "in a list", "default"])
def test_passes_at_delta_draw_masks_of_their_own(how, start):
    notes = Notes()
    model = network(Masked(notes, how), "eager")
    keras.random.uniform([1])  # Keras makes its default seed, before a pass does
    with attach(model, START[start]):
        for step in range(3):
            model.train_on_batch(IDS[:8], Y[:8])
            clean, ascent, last, taught = map(np.array, notes.taken())
            np.testing.assert_array_equal(taught, clean)
            for one, other in ((ascent, clean), (last, clean), (last, ascent)):
                assert (one != other).mean() > 0.2, step


def test_all_passes_share_their_masks_by_default():
    notes = Notes()
    model = network(Masked(notes), "eager")
    with attach(model, START["gaussian"].replace(dropout="shared")):
        model.train_on_batch(IDS[:8], Y[:8])
    clean, *others = map(np.array, notes.taken())
    assert len(others) == 3
    for mask in others:
        np.testing.assert_array_equal(mask, clean)


@pytest.mark.parametrize("mode", MODES)
def test_each_step_has_other_masks_in_every_mode(mode, expected):
    """With sigma = 0 and one batch, R_s moves with nothing else while the weights rest."""
    model = network(mode=mode)
    model.optimizer.learning_rate = 0.0
    found = []
    with attach(model, R_DROP) as smart:
        for _ in range(3):
            model.reset_metrics()
            model.train_on_batch(IDS[:8], Y[:8])
            found.append(smart.metrics["R_s"])
    assert len(set(found)) == 3
    assert min(found) > 1e-3
    if mode != "xla":  # there Keras' dropout draws by another algorithm
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def expected():
    """R_s of the three steps by hand: the clean masks by the layer's own seeds, the others by the key of the pass."""
    model = network()
    embedding, _, dropout, dense, norm, head = model.layers
    state = np.array(dropout.seed_generator.state)
    x = tf.reshape(embedding(IDS[:8]), [8, -1])

    def logits(seed):
        dropout.seed_generator.state.assign(seed)
        h = dense(dropout(x, training=True))
        mean, variance = tf.nn.moments(h, 0)
        return head(norm.gamma * (h - mean) / tf.sqrt(variance + norm.epsilon) + norm.beta)

    found = []
    for step in range(3):
        key = own_key(-1, tf.constant(step, tf.int64), 0)
        for word in state[0], state[1] + step:
            key = tf.random.experimental.stateless_fold_in(key, tf.constant(int(word), tf.int64), alg="philox")
        own = tf.random.stateless_uniform([2], key, None, None, state.dtype, alg="philox")
        p, q = (tf.nn.log_softmax(logits(seed)) for seed in ([state[0], state[1] + step], own))
        found.append(float(tf.reduce_mean(tf.reduce_sum((tf.exp(p) - tf.exp(q)) * (p - q), -1))))
    return found


@pytest.mark.parametrize(("mode", "start"), [("eager", "gaussian"), ("graph", "margin")])
def test_seed_generators_are_as_plain_training_leaves_them(mode, start):
    plain = network(mode=mode)
    plain.fit(IDS, Y, batch_size=8, shuffle=False, verbose=0)
    want = np.array(plain.layers[2].seed_generator.state)
    for dropout in ("shared", "independent"):
        model = network(mode=mode)
        one_fit(START[start].replace(dropout=dropout), model=model)
        np.testing.assert_array_equal(model.layers[2].seed_generator.state, want)


def test_smarts_seed_makes_other_masks():
    found = [one_fit(R_DROP, seed=seed)[0]["smoothness"] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("start", START)
def test_a_run_goes_on_bit_for_bit(start, tmp_path):
    path = str(tmp_path / "model.weights.h5")

    def steps(model, numbers):
        for number in numbers:
            at = slice(8 * (number % 2), 8 * (number % 2) + 8)
            model.train_on_batch(IDS[at], Y[at])

    whole = network()
    with attach(whole, START[start]):
        steps(whole, range(3))
        whole.save_weights(path)
        steps(whole, range(3, 6))
    resumed = network()
    with attach(resumed, START[start]) as smart:
        resumed.load_weights(path)
        steps(resumed, range(3, 6))
        averages = [np.array(average) for average in smart.averages]
    assert len(averages) == len(whole.trainable_variables)
    for got, want in zip(resumed.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(got, want)


def test_passes_in_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        notes = Notes()
        model = network(Masked(notes), "eager")
    finally:
        keras.config.set_dtype_policy("float32")
    with attach(model, START["gaussian"]):
        model.train_on_batch(IDS[:8], Y[:8])
    own, clean, ascent, last, taught = (np.array(tf.cast(mask, tf.float64)) > 0 for mask in notes.taken())
    np.testing.assert_array_equal(own, clean)
    np.testing.assert_array_equal(taught, clean)
    for one, other in ((ascent, clean), (last, clean), (last, ascent)):
        assert (one != other).mean() > 0.2


def test_counters_and_statistics_are_replayed_all_the_same():
    plain, model = network(), network()
    plain.fit(IDS[:8], Y[:8], batch_size=8, verbose=0)
    model.fit(IDS[:8], Y[:8], batch_size=8, verbose=0, callbacks=[SMARTCallback(START["gaussian"])])
    for got, want in zip(model.layers[4].non_trainable_variables, plain.layers[4].non_trainable_variables, strict=True):
        np.testing.assert_array_equal(got, want)


def test_measure_has_no_dropout():
    found = []
    for dropout in ("shared", "independent"):
        model = network()
        with attach(model, START["gaussian"].replace(dropout=dropout)) as smart:
            found.append(smart.measure(IDS, Y))
    assert found[0] == found[1]
    assert found[0]["R_s"] > 0


@pytest.mark.parametrize("ascent_steps", [0, 1])
def test_no_noise_is_no_mistake_with_masks_of_their_own(ascent_steps):
    """Warnings are errors: neither sigma = 0 nor a delta of 0 is warned of."""
    history, _, callback = one_fit(R_DROP.replace(ascent_steps=ascent_steps))
    assert history["smoothness"][0] > 0
    assert (callback.metrics["max_delta"] > 0) == (ascent_steps > 0)
