"""Mixed precision: the SMART passes are in float32, and where that is turned off, it is said what is lost."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import SMARTConfig, SMARTWarning
from smartreg_tf import SMARTCallback, attach

RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(8, 5)), RNG.integers(3, size=8)
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
PAPER = SMARTConfig.paper(total_steps=8, sigma=1e-5, beta_early=0.5, beta_late=0.5)


def classifier(policy, rate=0.0, **options):
    keras.utils.set_random_seed(1)
    normal = keras.initializers.RandomNormal(stddev=1.0, seed=1)
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            layers.Embedding(20, 8, embeddings_initializer=normal, dtype=policy),
            layers.LayerNormalization(dtype=policy),
            layers.Dropout(0.2, seed=3, dtype=policy),
            layers.LSTM(6, dtype=policy),
            layers.Dense(3, dtype=policy),
        ]
    )
    model.compile(keras.optimizers.SGD(rate), CE, **options)
    return model


def penalty_gradient(policy, config, **options):
    """lambda_s R_s's gradient: the training step's, less the plain one's."""
    seen = {}

    class Sees(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen["gradient"] = np.concatenate([np.ravel(tf.convert_to_tensor(g).numpy()) for g in grads])
            return super().apply(grads, trainable_variables)

    def run(weight):
        model = classifier(policy, run_eagerly=True)
        optimizer = Sees(0.0)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        model.compile(optimizer, CE, run_eagerly=True)
        noise = tf.constant(np.random.default_rng(7).normal(size=(8, 5, 8)).astype(np.float32))
        # scaled, so that a penalty of 1e-10 is not lost beside a loss of 1 when the gradients are added
        scaled = config.replace(lambda_s=weight)
        with attach(model, scaled, noise=lambda step, like: noise, **options) as smart:
            model.train_on_batch(IDS, Y)
        return seen["gradient"].astype(np.float64), smart.metrics

    (high, metrics), (low, _) = run(1e9), run(1e-30)
    return high - low, metrics


@pytest.fixture(scope="module")
def exact():
    return penalty_gradient("float32", PAPER.replace(mu=0))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_the_published_epsilon_survives(policy, exact):
    """The gradient of R_s at epsilon = 1e-5 points where float32's does, and is as long."""
    gradient, metrics = penalty_gradient(policy, PAPER.replace(mu=0))
    want, wanted = exact
    cosine = gradient @ want / np.linalg.norm(gradient) / np.linalg.norm(want)
    assert cosine > 0.999
    assert np.linalg.norm(gradient) == pytest.approx(np.linalg.norm(want), rel=1e-2)
    assert metrics["R_s"] == pytest.approx(wanted["R_s"], rel=1e-2)
    assert metrics["vanished"] < 0.5


def test_turned_off_it_is_lost_and_said(exact):
    with pytest.warns(SMARTWarning, match=r"over half of the entries as they were.*precision='float32'"):
        gradient, metrics = penalty_gradient("mixed_bfloat16", PAPER.replace(mu=0), precision="model")
    want, _ = exact
    cosine = gradient @ want / max(np.linalg.norm(gradient), 1e-300) / np.linalg.norm(want)
    assert cosine < 0.9
    assert metrics["vanished"] > 0.8


def test_turned_off_a_large_margin_start_still_works():
    model = classifier("mixed_bfloat16", 0.1)
    callback = SMARTCallback(papers(epsilon=0.3, start="margin"), precision="model")
    assert model.fit(IDS, Y, verbose=0, callbacks=[callback]).history["smoothness"][0] > 1e-6


@pytest.mark.parametrize(("policy", "start"), [("mixed_bfloat16", "gaussian"), ("mixed_float16", "margin")])
def test_fit_in_mixed_precision_leaves_the_policies(policy, start):
    model = classifier(policy, 0.1)
    policies = [layer.dtype_policy.name for layer in model.layers]
    callback = SMARTCallback(papers(epsilon=0.3, sigma=0.3, start=start, beta_early=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SMARTWarning)
        history = model.fit(IDS, Y, batch_size=4, epochs=2, verbose=0, callbacks=[callback]).history
    assert policies == [layer.dtype_policy.name for layer in model.layers]
    assert policy in policies
    assert history["smoothness"][0] > 1e-6
    assert all(np.isfinite(history["loss"]))
    assert all(average.dtype == "float32" for average in callback.engine.averages)
    assert callback.metrics["step"] == 4


def test_a_step_that_the_loss_scale_skips_does_not_move_theta():
    """A step taken, one whose scaled gradients overflow, one taken: theta~ and the step stand still in the second."""
    model = classifier("mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5))
    model.compile(optimizer, CE)
    optimizer.build(model.trainable_variables)  # its scale, for Scales
    callback = SMARTCallback(papers(epsilon=0.3, sigma=0.3, beta_early=0.5, beta_late=0.5))
    start = [weight.numpy() for weight in model.trainable_variables]
    seen = []

    class Scales(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            optimizer.dynamic_scale.assign(1e38 if batch == 1 else 1024.0)

        def on_train_batch_end(self, batch, logs=None):
            averages = [average.numpy() for average in callback.engine.averages]
            seen.append((callback.metrics["step"], [weight.numpy() for weight in model.trainable_variables], averages))

    model.fit(IDS[:6], Y[:6], batch_size=2, verbose=0, shuffle=False, callbacks=[callback, Scales()])
    assert [step for step, _, _ in seen] == [1, 1, 2]
    expected = before = start
    for batch, (_, weights, averages) in enumerate(seen):
        moved = max(np.abs(new - old).max() for new, old in zip(weights, before, strict=True))
        assert (moved > 1e-3) == (batch != 1)
        if batch != 1:
            expected = [0.5 * new + 0.5 * old for new, old in zip(weights, expected, strict=True)]
        for average, value in zip(averages, expected, strict=True):
            assert average == pytest.approx(value, rel=1e-6, abs=1e-7)
        before = weights
