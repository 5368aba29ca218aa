"""The clean pass, the pass again, and the pass at other points."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from smartreg_tf.passes import CleanPasses, passes_of
from smartreg_tf.site import Site

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def recorded(model, calls, differentiable=False):
    """The passes of several calls of a model, and what they returned."""
    watch = CleanPasses(Site(model))
    with watch.installed(), watch.recording(differentiable) as passes:
        outputs = [model(x, training=True) for x in calls]
    assert "call" not in vars(model)
    return passes, outputs


def network(*more):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input([3]), *more, layers.Dense(2)])


def test_again_and_at_have_the_masks_of_the_clean_pass():
    model = network(layers.Dropout(0.5))
    (passes,), (outputs,) = recorded(model, [X])
    watch = CleanPasses(passes.site)
    kernel, bias = model.get_weights()
    with watch.installed():
        np.testing.assert_array_equal(passes.again(), outputs)
        np.testing.assert_allclose(passes.at([2 * X]), 2 * (outputs - bias) + bias, rtol=1e-5, atol=1e-6)
        zero = [(weight, tf.zeros_like(weight.value)) for weight in model.trainable_variables]
        assert np.abs(passes.again(zero)).max() == 0
    np.testing.assert_array_equal(model.get_weights()[0], kernel)
    assert np.abs(model(X, training=True) - outputs).max() > 0.1  # the stream has moved on by one pass


def test_the_tape_leads_from_the_outputs_to_the_site():
    model = network()
    (passes,), _ = recorded(model, [X], differentiable=True)
    clean = passes.clean
    with clean.tape:
        total = tf.reduce_sum(clean.outputs)
    (gradient,) = clean.tape.gradient(total, [call.x for call in clean.calls])
    np.testing.assert_allclose(gradient, np.tile(model.get_weights()[0].sum(1), (4, 1)), rtol=1e-6)


def test_the_penalty_is_of_the_call_that_gave_y_pred():
    passes, y_pred = recorded(network(), [X[:1], X[:2], X[:3]])
    assert passes_of(passes, {"z": y_pred[1]}) is passes[1]
    assert passes_of(passes, {"z": y_pred[1] + 0}) is passes[2]  # another tensor made of it: the last
    with pytest.raises(RuntimeError, match="without calling the model"):
        passes_of([], y_pred[0])


def test_float32_passes_of_a_model_in_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = network()
    finally:
        keras.config.set_dtype_policy("float32")
    (passes,), (outputs,) = recorded(model, [X])
    assert outputs.dtype == tf.bfloat16
    kernel, bias = model.get_weights()
    with CleanPasses(passes.site).installed(), passes.in_float32() as wide:
        np.testing.assert_allclose(wide.clean.outputs, X @ kernel + bias, rtol=1e-6, atol=1e-6)
        assert wide.again().dtype == tf.float32
    assert passes.clean.outputs is outputs
    assert model(X).dtype == tf.bfloat16
