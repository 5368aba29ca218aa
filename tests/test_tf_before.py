"""What an earlier smartreg wrote still loads: a callback's state, a SMARTModel, a recording.

`tools/make_before.py` runs `write` with the earlier package; the tests go on from its files to its values.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from paper_settings import papers

from smartreg.checking import compare_run
from smartreg_tf import SMARTCallback, SMARTModel

BEFORE = Path(__file__).parent / "before"
CONFIG = papers(epsilon=0.3, sigma=0.3, proximal_steps=2, beta_early=0.5, beta_late=0.9, total_steps=6)
IDS, Y = np.arange(30, dtype=np.int32).reshape(6, 5) ** 2 % 11, np.arange(6) % 3


def network():
    inputs = keras.Input([5], dtype="int32")
    h = layers.Dropout(0.2, seed=7)(layers.Embedding(11, 4)(inputs))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(6, "tanh")(layers.Flatten()(h))))
    shapes = enumerate(weight.shape for weight in model.weights)
    model.set_weights([np.sin(np.arange(np.prod(shape)) * (k + 1.7)).reshape(shape) / 2 for k, shape in shapes])
    return model


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss)
    model.optimizer.build(model.trainable_variables)  # load_weights reads Adam's state only into what is there
    return model


def fit(model, initial, epochs, callbacks=()):
    """Train on one batch an epoch; the logs of each."""
    options = {"batch_size": 6, "shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    history = model.fit(IDS, Y, initial_epoch=initial, epochs=epochs, **options).history
    return {name: history[name] for name in ("loss", "smoothness", "proximal")}


def squares(smart, model):
    with smart.swap_teacher():
        return [float(np.square(weight).sum()) for weight in model.get_weights()]


class Saves(keras.callbacks.Callback):
    """Saves the weights, and with them SMART's state."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        self.model.save_weights(self.path)


def callback_goes_on(folder):
    model, file = compiled(network()), str(folder / "keras.weights.h5")
    model.load_weights(file)
    smart = SMARTCallback(CONFIG, resume=file)
    return fit(model, 3, 5, [smart]) | {"theta~": squares(smart, model)}


def model_goes_on(folder):
    model = keras.models.load_model(folder / "smart_model.keras")
    assert model.get_config()["config"] == CONFIG.to_dict()
    return fit(model, 3, 5) | {"theta~": squares(model, model.model)}


def recording(folder):
    report = compare_run(folder / "keras_recording.npz")
    return report, {f"{row.what}, step {row.step}": row.recomputed for row in report.rows}


def write(folder):
    """Called with an earlier package: its files, and how it goes on from them."""
    model = compiled(network())
    smart = SMARTCallback(CONFIG, record=folder / "keras_recording.npz", record_steps=3)
    fit(model, 0, 3, [smart, Saves(folder / "keras.weights.h5")])
    model = compiled(SMARTModel(network(), CONFIG))
    fit(model, 0, 3)
    model.save(folder / "smart_model.keras")
    values = {"callback": callback_goes_on(folder), "model": model_goes_on(folder), "run": recording(folder)[1]}
    (folder / "keras.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")


@pytest.fixture(scope="module")
def values():
    return json.loads((BEFORE / "keras.json").read_text("utf-8"))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert rows == pytest.approx(expected[name], rel=1e-5), name


def test_a_callbacks_state_goes_on(values):
    assert_close(callback_goes_on(BEFORE), values["callback"])


def test_a_SMARTModel_goes_on(values):
    assert_close(model_goes_on(BEFORE), values["model"])


def test_a_recording_is_read(values):
    report, rows = recording(BEFORE)
    assert report.ok
    assert report.about.startswith("3 steps on tensorflow, site: the layer 'embedding'; tensorflow ")
    assert rows == pytest.approx(values["run"], rel=1e-9, abs=1e-15)
