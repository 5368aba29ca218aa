"""What a Keras user does around a fit: recompiles, unfreezes, validates, masks, weighs outputs, loses a checkpoint."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import SMARTWarning
from smartreg_tf import SMARTCallback, SMARTModel, attach
from smartreg_tf.outputs import find_heads

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CONFIG = papers(total_steps=20)
X, Y = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 2


def small(inputs=(4,), **compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(inputs), layers.Dense(3, activation="tanh"), layers.Dense(2)])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1), "loss": CE, "run_eagerly": True, **compiled})
    return model


def two_headed(**compiled):
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4])
    heads = {name: layers.Dense(2, name=name)(inputs) for name in ("a", "b", "c")}
    model = keras.Model(inputs, heads)
    model.compile("sgd", run_eagerly=True, **compiled)
    return model


def test_compile_inside_attach_is_not_undone():
    model = small(run_eagerly=False)
    model.fit(X, Y, verbose=0)
    with attach(model, CONFIG):
        model.compile(keras.optimizers.SGD(0.0), CE)
    before = [weight.numpy() for weight in model.weights]
    model.fit(X, Y, verbose=0)
    assert all(np.array_equal(weight.numpy(), kept) for weight, kept in zip(model.weights, before, strict=True))
    assert model.optimizer.iterations == 1


def test_masking_on_float_inputs_keeps_its_padding():
    model = keras.Sequential([keras.Input([5, 3]), layers.Masking(name="mask"), layers.LSTM(4), layers.Dense(2)])
    model.compile("sgd", CE, run_eagerly=True)
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
    x[:, 3:] = 0
    with attach(model, papers(mu=0, scale="absolute", epsilon=1e-6, sigma=1e-6)) as smart:
        assert [layer.name for layer in smart.site.layers] == ["mask"]
        model.train_on_batch(x, Y)
        assert 0 < smart.metrics["R_s"] < 1e-9  # unmasked padding would give 1e-3


def test_a_padding_mask_among_the_inputs_is_no_site():
    given = {"x": keras.Input([4, 3], name="x"), "padding_mask": keras.Input([4], name="padding_mask")}
    pooled = layers.Lambda(lambda z: tf.einsum("btd,bt->bd", z["x"], z["padding_mask"]))(given)
    model = keras.Model(given, layers.Dense(2)(pooled))
    model.compile("sgd", CE, run_eagerly=True)
    x = {"x": np.ones((8, 4, 3), np.float32), "padding_mask": np.ones((8, 4), np.float32)}
    seen = []
    with attach(model, papers(mu=0), noise=lambda step, like: seen.append(like.shape) or tf.ones_like(like)):
        model.train_on_batch(x, Y)
    assert seen == [(8, 4, 3)]


def test_a_loop_of_ones_own_may_give_numpy():
    model, twin = small(), small()
    with attach(model, CONFIG) as smart, attach(twin, CONFIG) as of_keras:
        with smart.training_step(), tf.GradientTape() as tape:
            loss = model.compute_loss(X, Y, model(X, training=True))
            model.optimizer.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
            )
        twin.train_on_batch(X, Y)
        assert smart.metrics == of_keras.metrics
        assert smart.metrics["R_s"] > 0


@pytest.mark.parametrize("mu", [0, 1])
def test_R_s_in_every_second_step_alone(mu):
    """Its passes are run, its noise drawn, and its mean taken over the steps that have it."""
    model, drawn, seen = small(), [], []
    first = model.layers[0]
    call = first.call
    first.call = lambda *args, **kwargs: seen.append(1) or call(*args, **kwargs)
    config = CONFIG.replace(smoothness_steps=2, mu=mu, epsilon=0.1)
    with attach(model, config, noise=lambda step, like: drawn.append(int(step)) or tf.ones_like(like)) as smart:
        passes, R_s = [], []
        for _ in range(3):
            seen.clear()
            R_s.append(model.train_on_batch(X, Y, return_dict=True)["smoothness"])
            passes.append(len(seen))
        seen.clear()
        with smart.training_step():  # the fourth, in a loop of one's own
            model.compute_loss(X, Y, model(X, training=True))
        assert len(seen) == passes[1]
    assert passes == [4, 1 + mu, 3 + mu]  # the teacher's pass is the check of the first step, or one more is
    assert drawn == [0, 1]
    assert R_s[0] > 0 == R_s[1]
    callback = SMARTCallback(config, noise=lambda step, like: tf.ones_like(like))
    history = small().fit(X, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[callback]).history
    one = small().fit(X[:4], Y[:4], verbose=0, callbacks=[SMARTCallback(config, noise=lambda step, like: like * 0 + 1)])
    assert history["smoothness"] == pytest.approx(one.history["smoothness"], rel=1e-6)


def test_where_it_cannot_choose_the_steps_with_R_s():
    config = CONFIG.replace(smoothness_steps=3)
    model = small(run_eagerly=False, steps_per_execution=2)
    with pytest.raises(ValueError, match="smoothness_steps=3 .* needs compile.*steps_per_execution=1., got 2"):
        model.fit(X, Y, batch_size=2, verbose=0, callbacks=[SMARTCallback(config)])
    model = small()

    @tf.function
    def step(smart):
        with smart.training_step():
            model.compute_loss(X, Y, model(X, training=True))

    with (
        attach(model, config) as smart,
        pytest.raises(ValueError, match="smoothness_steps=3 cannot work in a tf.function of your own"),
    ):
        step(smart)


def test_compute_loss_of_ones_own_keeps_its_signature():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(2)

        def call(self, x):
            return self.head(x)

        def compute_loss(self, *, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight, training)

        def train_step(self, data):
            x, y = data[:2]
            with tf.GradientTape() as tape:
                y_pred = self(x)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
                self.compute_loss(x=x, y=y, y_pred=y_pred, training=False)  # for a log: no second penalty
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

    model = Own()
    model.compile("sgd", CE, run_eagerly=True)
    model(X)
    draws = []
    with attach(model, CONFIG, noise=lambda step, like: draws.append(1) or tf.ones_like(like)):
        model.train_on_batch(X, Y)
    assert draws == [1]


def test_metrics_outlive_a_validation():
    callback, without = SMARTCallback(papers()), SMARTCallback(papers())
    small().fit(X, Y, validation_data=(X, Y), verbose=0, shuffle=False, callbacks=[callback])
    small().fit(X, Y, verbose=0, shuffle=False, callbacks=[without])
    assert callback.metrics == without.metrics
    assert callback.metrics["R_s"] > 0


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")  # of a, which has no loss
@pytest.mark.parametrize("outputs", [None, {"b": "logits", "c": "logits"}])
def test_loss_weights_and_sample_weights_are_found_by_output(outputs):
    model = two_headed(loss={"b": CE, "c": CE}, loss_weights={"b": 0.0, "c": 3.0})
    y, w = {"b": Y, "c": Y}, {"b": np.ones(8, np.float32), "c": np.zeros(8, np.float32)}
    with attach(model, CONFIG, outputs=outputs) as smart:
        model.train_on_batch(X, y, sample_weight=w)
        heads = {head.place: head.weight for head in find_heads(model, model(X), outputs)}
        assert heads == {1: 0.0, 2: 3.0}
        assert smart.metrics["R_s"] == 0  # b weighs 0 by its loss, c by its samples
        model.train_on_batch(X, y, sample_weight={"b": w["c"], "c": w["b"]})
        assert smart.metrics["R_s"] > 0


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_head_that_weighs_nothing_does_not_turn_the_ascent(start):
    config = papers(mu=0, start=start, norm="2", ascent_steps=int(start == "gaussian"))
    seen = []
    for outputs in (None, {"c": "logits"}):
        model = two_headed(loss={"b": CE, "c": CE}, loss_weights={"b": 0.0, "c": 3.0})
        with attach(model, config, outputs=outputs, noise=lambda step, like: tf.ones_like(like), on_step=seen.append):
            model.train_on_batch(X, {"b": Y, "c": Y})
    np.testing.assert_allclose(seen[0].delta[0], seen[1].delta[0], rtol=1e-4, atol=1e-8)


def test_unfreezing_after_the_start_is_refused():
    inner = small()
    inner.layers[0].trainable = False
    model = SMARTModel(inner, CONFIG)
    model.compile("sgd", CE)
    inner.layers[0].trainable = True
    model.compile("sgd", CE, run_eagerly=True)
    with pytest.raises(ValueError, match="became trainable after SMART began"):
        model.fit(X, Y, verbose=0)


def test_accumulation_moves_theta_tilde_by_hand():
    """Three batches a step: theta~ moves twice in six batches, each time from where it was."""
    model = small(optimizer=keras.optimizers.SGD(0.5, gradient_accumulation_steps=3))
    with attach(model, papers(beta_early=0.5, beta_late=0.5)) as smart:
        expected = [weight.numpy() for weight in model.trainable_variables]
        for batch in range(1, 7):
            model.train_on_batch(X, Y)
            if batch % 3 == 0:
                now = [weight.numpy() for weight in model.trainable_variables]
                assert any(np.abs(new - old).max() > 1e-3 for new, old in zip(now, expected, strict=True))
                expected = [0.5 * new + 0.5 * old for new, old in zip(now, expected, strict=True)]
            for average, value in zip(smart.averages, expected, strict=True):
                assert average.numpy() == pytest.approx(value, rel=1e-6, abs=1e-7)


def test_total_steps_counts_accumulated_steps_under_loss_scaling():
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model = small(optimizer=keras.optimizers.LossScaleOptimizer(inner))
    callback = SMARTCallback(papers())
    model.fit(X, Y, batch_size=1, epochs=2, verbose=0, callbacks=[callback])
    assert callback.engine.config.total_steps == 4


def test_a_state_of_another_step_and_a_missing_one_are_named(tmp_path):
    model = small()
    path = str(tmp_path / "state")
    with attach(model, CONFIG) as smart:
        model.train_on_batch(X, Y)
        smart.save_state(path)
        model.train_on_batch(X, Y)
        with pytest.raises(ValueError, match="written after 1 optimiser steps, and the model was loaded from after 2"):
            smart.load_state(path)
        with pytest.raises(ValueError, match=r"there is no .*nowhere.smart.npz. Save the model while SMART trains it"):
            smart.load_state(str(tmp_path / "nowhere"))


def test_a_checkpoint_without_its_state_warns(tmp_path):
    model = small()
    path = str(tmp_path / "plain.weights.h5")
    model.save_weights(path)

    class Loads(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.load_weights(path)

    with pytest.warns(SMARTWarning, match="theta~ starts anew from these weights"):
        model.fit(X, Y, verbose=0, callbacks=[Loads(), SMARTCallback(papers())])


def test_no_layers_are_named():
    with pytest.raises(ValueError, match=r"site=\[\] names no layer"), attach(small(), CONFIG, site=[]):
        pass


def test_a_name_that_two_layers_share_is_refused():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(3, name="twin"), layers.Dense(2, name="twin")

        def call(self, x):
            return self.second(self.first(x))

    model = Twins()
    with (
        pytest.raises(ValueError, match=r"site= names 'twin', which 2 of the layers are called. Give the"),
        attach(model, CONFIG, site="twin"),
    ):
        pass
    with attach(model, CONFIG, site=model.second) as smart:
        assert smart.site.layers == [model.second]


@pytest.mark.parametrize("weights", [None, np.full((8, 3), 2.0, np.float32)], ids=["", "by position"])
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_outputs_that_are_nan_where_masked_are_left_out(weights, start):
    """Of no account to the penalty, to its gradient, nor to what is reported as not finite."""

    class Tagger(keras.Model):
        def __init__(self, padding):
            super().__init__()
            self.embedding, self.head, self.padding = layers.Embedding(9, 4), layers.Dense(2), padding

        def call(self, inputs):
            z = self.head(self.embedding(inputs["ids"]))
            return keras.ops.where(inputs["padding_mask"][..., None], z, self.padding)

    def loss(y, z):
        z = tf.where(tf.math.is_nan(z), tf.zeros_like(z), z)
        return keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)

    def trained(padding):
        keras.utils.set_random_seed(0)
        model = Tagger(padding)
        model.compile("sgd", loss, run_eagerly=True)
        with attach(model, CONFIG.replace(start=start), outputs="logits") as smart:
            for _ in range(2):
                model.train_on_batch(inputs, ids % 2, sample_weight=weights)
            return [weight.numpy() for weight in model.weights], smart.metrics

    ids = np.random.default_rng(0).integers(1, 9, size=(8, 3))
    ids[::2, 2] = 0
    inputs = {"ids": ids, "padding_mask": ids != 0}
    (got, metrics), (want, expected) = trained(np.nan), trained(0.0)
    assert metrics == expected
    assert metrics["R_s"] > 0
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("broken", ["clean", "teacher"])
@pytest.mark.parametrize("eager", [True, False])
def test_the_first_pass_that_is_not_finite_is_named(broken, eager):
    model = small(run_eagerly=eager)
    callback = SMARTCallback(CONFIG)

    class Spoils(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            weights = model.trainable_variables if broken == "clean" else callback.engine.averages
            if batch == 1:
                weights[0].assign(np.full(weights[0].shape, np.nan))

    with pytest.raises(
        FloatingPointError, match=f"penalty of step 2 is not finite; .* not finite are in the {broken} pass"
    ):
        model.fit(X, Y, batch_size=2, verbose=0, callbacks=[callback, Spoils()])
    if broken == "teacher":  # the step was taken, without its penalty
        assert model.optimizer.iterations == 2
        assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_layers_by_object_are_saved_by_name(tmp_path):
    inner = small()
    model = SMARTModel(inner, CONFIG, site=inner.layers[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config()["site"] == [inner.layers[0].name]


def test_a_compiled_loop_reports_when_attach_ends():
    model = small()

    @tf.function
    def step(smart, x, y):
        with smart.training_step(), tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
            model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    def run():
        with attach(model, CONFIG, noise=lambda step, like: like * np.nan) as smart:
            model.optimizer.build(model.trainable_variables)
            step(smart, tf.constant(X), tf.constant(Y))

    with pytest.raises(FloatingPointError, match="penalty of step 1 is not finite"):
        run()


class Imputes(layers.Layer):
    """0 for what is missing, and whether it was."""

    def call(self, x):
        missing = tf.math.is_nan(x)
        return tf.concat([tf.where(missing, 0.0, x), tf.cast(missing, tf.float32)], -1)


@pytest.mark.parametrize("scale", ["rms", "absolute"])
def test_features_that_the_model_imputes(scale):
    """Missing entries have no delta, the others that of their own rms: R_s by hand."""
    model = keras.Sequential([keras.Input([4]), Imputes(), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
    missing = np.random.default_rng(0).random((8, 4)) < 0.3
    with attach(model, papers(mu=0, start="margin", ascent_steps=0, scale=scale, epsilon=0.1)) as smart:
        model.train_on_batch(np.where(missing, np.nan, X), Y.astype(np.float32))
        metrics = smart.metrics
    known = np.ma.array(X.astype(np.float64), mask=missing)
    radius = 0.1 * (np.sqrt((known**2).mean(1)).filled(0) if scale == "rms" else np.ones(8))
    slopes = np.abs(model.layers[1].kernel.numpy()[:4, 0].astype(np.float64))
    change = radius * (~missing @ slopes)
    assert metrics["R_s"] == pytest.approx((change**2).mean(), rel=1e-4)
    assert metrics["max_delta"] == pytest.approx(radius.max(), rel=1e-5)


@pytest.mark.parametrize("eager", [True, False])
def test_a_delta_that_is_not_finite_is_a_fault_though_the_penalty_is_finite(eager):
    model = keras.Sequential([keras.Input([4]), Imputes(), layers.Dense(2)])
    model.compile("sgd", CE, run_eagerly=eager)
    noise = {"noise": lambda step, like: like * np.nan}
    with pytest.raises(FloatingPointError, match="penalty of step 1 is not finite; .* in the perturbed pass"):
        model.fit(X, Y, verbose=0, callbacks=[SMARTCallback(CONFIG, **noise)])
