"""One mini-batch of Algorithm 1 by hand, its noise, and what reaches the weights if a value is not finite."""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg_tf import SMARTCallback
from smartreg_tf.outputs import Head
from smartreg_tf.passes import CleanPasses
from smartreg_tf.site import Site
from smartreg_tf.step import Gate, drawn, smart_step
from smartreg_tf.teacher import Teacher

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype(np.float32)
CONFIG = papers(scale="absolute", epsilon=0.5, sigma=0.1, eta=1.0, total_steps=9)


def linear(loss="mse"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input([3]), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_one_mini_batch_by_hand(start):
    """f(x) = x W + b gives R_s = mean ||delta W||^2 and D_Breg = mean ||x (W - W~)||^2, with delta on the ball."""
    config = CONFIG.replace(start=start, ascent_steps=2)
    model = linear()
    teacher = Teacher(model, config)
    teacher.follow()
    W, b = model.get_weights()
    model.set_weights([W + 1, b])
    watch = CleanPasses(Site(model))
    with watch.installed(), tf.GradientTape() as tape:
        with watch.recording(differentiable=start == "margin") as recorded:
            model(X, training=True)
        draw = partial(drawn, step=tf.constant(0, tf.int64), seed=0)
        step = smart_step(recorded[0], [Head(0, "regression")], None, None, teacher, config, 2.0, draw, None)
    (delta,) = step.delta
    np.testing.assert_allclose(np.abs(delta).max(1), 0.5, rtol=1e-6)
    np.testing.assert_allclose(step.perturbed[0], (X + delta) @ (W + 1) + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(step.terms["R_s"], ((delta.numpy() @ (W + 1)) ** 2).sum(1).mean(), rtol=1e-4)
    np.testing.assert_allclose(step.terms["D_Breg"], 2 * (X.sum(1) ** 2).mean(), rtol=1e-4)
    want = 2 * float(step.terms["R_s"]) + config.mu * float(step.terms["D_Breg"])
    assert float(step.penalty) == float(step.raw) == pytest.approx(want)
    gradient = tape.gradient(step.penalty, model.trainable_variables[0].value)
    by_hand = 2 * delta.numpy().T @ (delta.numpy() @ (W + 1)) * 2 / 4
    by_hand += config.mu * 2 * X.T @ (X @ np.ones((3, 2))) / 4
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-4)
    assert not any(bool(fault) for fault in step.faults.values())


@pytest.mark.parametrize(("output", "lambda_s", "mu"), [("regression", 0.1, 0.1), ("logits", 1.0, 0.5)])
def test_a_weight_that_is_not_given_follows_the_task(output, lambda_s, mu):
    model = linear()
    weights, bias = model.get_weights()
    for config, want in ((SMARTConfig(), (lambda_s, mu)), (SMARTConfig(lambda_s=1, mu=1), (1.0, 1.0))):
        model.set_weights([weights, bias])
        teacher = Teacher(model, config)
        teacher.follow()
        model.set_weights([3 * weights, bias])  # the outputs' differences move, too
        watch = CleanPasses(Site(model))
        with watch.installed(), tf.GradientTape():
            with watch.recording(differentiable=True) as recorded:
                model(X, training=True)
            draw = partial(drawn, step=tf.constant(0, tf.int64), seed=0)
            step = smart_step(recorded[0], [Head(0, output)], None, None, teacher, config, 1.0, draw, None)
        R_s, D_Breg = float(step.terms["R_s"]), float(step.terms["D_Breg"])
        assert min(R_s, D_Breg) > 1e-3
        assert float(step.penalty) == pytest.approx(want[0] * R_s + want[1] * D_Breg, rel=1e-6)


def test_a_closed_gate_lets_no_nan_through():
    gate, x = Gate(), tf.constant([1.0, 2.0])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = gate(x) * np.nan
        slices = tf.gather(gate(x), [1]) * np.nan
    gate.open = tf.constant(False)
    assert tape.gradient(y, x).numpy().tolist() == [0.0, 0.0]
    assert tf.convert_to_tensor(tape.gradient(slices, x)).numpy().tolist() == [0.0, 0.0]
    gate.open = tf.constant(True)
    assert np.isnan(tape.gradient(y, x)).all()


def test_noise_of_the_wrong_shape():
    callback = SMARTCallback(papers(), noise=lambda step, like: tf.zeros([2, 2]))
    with pytest.raises(ValueError, match="noise must give a tensor of shape"):
        linear().fit(X, X[:, :2], verbose=0, callbacks=[callback])


def test_the_noise_is_its_own_stream():
    """Fresh each step, the same for the same seed, and Keras' and TensorFlow's streams are where they were."""
    like, now = tf.zeros([1000]), tf.constant(0, tf.int64)
    first, again, run = drawn(like, 0, now, 3), drawn(like, 0, now, 3), drawn(like, 1, now, 3)
    seeded, second = drawn(like, 0, now, 4), drawn(like, 0, now + 1, 3)
    np.testing.assert_array_equal(first, again)
    for different in (run, seeded, second):
        assert abs(np.corrcoef(first, different)[0, 1]) < 0.15
    assert abs(np.std(first) - 1) < 0.1

    def after(callbacks):
        model = linear()
        tf.random.set_seed(1)
        model.fit(X, X[:, :2], verbose=0, callbacks=callbacks)
        return tf.random.normal([3]).numpy(), keras.random.normal([3]).numpy()

    for got, want in zip(after([SMARTCallback()]), after(None), strict=True):
        np.testing.assert_array_equal(got, want)
