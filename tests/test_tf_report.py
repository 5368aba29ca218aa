"""What a training step of Keras reports: warnings that a compiled step can only count."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from smartreg import SMARTConfig, SMARTWarning
from smartreg.report import STILL, warn_of

keras = pytest.importorskip("keras")
smartreg_tf = pytest.importorskip("smartreg_tf")

IDS, Y = np.array([[1, 2, 0], [3, 4, 0]]), np.array([0, 1])


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("start", ["margin", "gaussian"])
def test_a_step_that_perturbs_nothing_warns_once(start, eager):
    inputs = keras.Input([3], dtype="int64")
    x = keras.layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x[:, -1]))  # reads nothing but padding
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=eager)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with smartreg_tf.attach(model, SMARTConfig(mu=0, start=start)) as smart:
            for _ in range(3):
                model.train_on_batch(IDS, Y)
    said = [str(warning.message) for warning in caught if warning.category is SMARTWarning]
    assert said == ([STILL] if start == "margin" else [])
    assert warn_of(smart.metrics, start) == ({"still": STILL} if start == "margin" else {})
    assert (smart.metrics["max_delta"] == 0) == (start == "margin")


def test_more_steps_than_total_steps_warn_once():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.eye(3)[:2]

    def fit(epochs, **settings):
        with smartreg_tf.attach(model, SMARTConfig(lambda_s=0, **settings)):
            model.fit(x, Y, batch_size=1, epochs=epochs, verbose=0)  # two steps an epoch

    fit(1, total_steps=2)  # a warning would be an error
    with pytest.warns(SMARTWarning, match="step 3 of a run of total_steps=2: beta was scheduled for a shorter") as said:
        fit(3, total_steps=2)
    assert len(said) == 1
    fit(2, total_steps=2, beta_early=0.9, beta_late=0.9)  # nothing is scheduled
