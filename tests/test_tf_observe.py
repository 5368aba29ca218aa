"""on_step= shows every training step that had a penalty, as NumPy arrays."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg.divergences import symmetric_kl
from smartreg_tf import SMARTCallback, SMARTModel, attach

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
N, T = 6, 4
RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(1, 20, size=(N, T)), RNG.integers(3, size=N)
CONFIG = papers(epsilon=0.3, scale="absolute", total_steps=9, beta_early=0.5, beta_late=0.5)
MODES = {"eager": {"run_eagerly": True}, "graph": {"jit_compile": False}}


def network(mode="graph", **compiled):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input([T]), layers.Embedding(20, 4), layers.Flatten()])
    model.add(layers.Dense(3))
    model.compile(keras.optimizers.SGD(0.1), CE, **(MODES[mode] | compiled))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_what_is_seen_is_what_the_step_had(mode):
    """The outputs are the model's own at x and x + delta, and the metrics are those of the outputs."""
    model, seen = network(mode), []
    with attach(model, CONFIG, on_step=seen.append) as smart:
        for _ in range(3):
            table, kernel, bias = model.get_weights()
            averages = [average.numpy() for average in smart.averages]
            logs = model.train_on_batch(IDS, Y, return_dict=True)
            step = seen[-1]
            (x,), (delta,) = step.x, step.delta
            np.testing.assert_array_equal(x, table[IDS])
            clean, moved = ((z.reshape(N, -1) @ kernel + bias) for z in (x, x + delta))
            taught = averages[0][IDS].reshape(N, -1) @ averages[1] + averages[2]
            for got, want in ((step.outputs, clean), (step.perturbed, moved), (step.teacher, taught)):
                np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)
            assert step.metrics["R_s"] == pytest.approx(symmetric_kl(step.perturbed[0], step.outputs[0]).mean(), 1e-5)
            assert step.metrics["max_delta"] == np.abs(delta).max() == np.float32(0.3)
            penalty = CONFIG.lambda_s * step.metrics["R_s"] + CONFIG.mu * step.metrics["D_Breg"]
            assert step.metrics["penalty"] == pytest.approx(penalty, rel=1e-6)
            assert step.mask == [None]
            assert logs["smoothness"] == pytest.approx(smart.metrics["R_s"])
        assert smart.metrics["beta"] == 0.5
    assert [step.step for step in seen] == [1, 2, 3]
    assert [step.metrics.get("beta") for step in seen] == [None, 0.5, 0.5]
    assert (step.divergences, step.positions, step.sample_weight) == (["symmetric_kl"], [None], [None])
    assert all(isinstance(z, np.ndarray) for z in (x, delta, *step.outputs, *step.teacher))


def test_a_term_that_is_off_has_no_tensors():
    model, seen = network(), []
    callback = SMARTCallback(CONFIG.replace(smoothness_steps=2), on_step=seen.append)
    model.fit(IDS, Y, batch_size=3, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
    assert [bool(step.delta) for step in seen] == [True, False, True, False]
    assert (seen[1].x, seen[1].mask, seen[1].perturbed, "R_s" in seen[1].metrics) == ([], [], [], False)
    model, seen = network(), []
    with attach(model, CONFIG.replace(mu=0), on_step=seen.append):
        model.train_on_batch(IDS, Y)
    assert (seen[0].teacher, "D_Breg" in seen[0].metrics, "beta" in seen[0].metrics) == ([], False, False)


@pytest.mark.parametrize("mode", MODES)
def test_it_changes_nothing_and_its_own_error_comes_through(mode):
    def trained(**given):
        model = network(mode)
        model.fit(IDS, Y, batch_size=3, verbose=0, shuffle=False, callbacks=[SMARTCallback(CONFIG, **given)])
        return model.get_weights()

    for got, want in zip(trained(on_step=lambda step: None), trained(), strict=True):
        np.testing.assert_array_equal(got, want)

    def broken(step):
        raise KeyError("mine")

    model = network(mode)
    with pytest.raises(KeyError, match="mine"):
        model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG, on_step=broken)])
    assert not any("smart" in name or name in ("train_step", "compute_loss", "call") for name in vars(model))


def test_several_steps_in_one_execution_and_a_wrapper_model():
    seen = []
    model = SMARTModel(network(), CONFIG, on_step=seen.append)
    model.compile(keras.optimizers.SGD(0.1), CE, jit_compile=False, steps_per_execution=2)
    model.fit(IDS, Y, batch_size=3, epochs=2, verbose=0, shuffle=False)
    assert [step.step for step in seen] == [1, 2, 3, 4]


def test_a_loop_in_a_function_of_ones_own_shows_its_steps_at_the_end():
    model, seen = network(), []

    @tf.function(autograph=False)
    def loop(x, y):
        with smart.training_step(), tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)
        return loss

    with attach(model, CONFIG, on_step=seen.append) as smart:
        model.optimizer.build(model.trainable_variables)
        for _ in range(2):
            loop(tf.constant(IDS), tf.constant(Y))
    assert [step.step for step in seen] == [1, 2]
    assert seen[1].metrics["D_Breg"] > seen[0].metrics["D_Breg"] == 0


def test_xla_is_refused():
    message = r"on_step= cannot take tensors out of a step that XLA compiles"
    with pytest.raises(ValueError, match=message), attach(network(jit_compile=True), CONFIG, on_step=print):
        pass
    with attach(network(), CONFIG, on_step=print) as smart:
        smart.model.compile("sgd", CE, jit_compile=True)
        with pytest.raises(ValueError, match=message):
            smart.model.train_on_batch(IDS, Y)
