"""A broken run that goes on equals the unbroken one; what is saved loads, with this package and without."""

import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from paper_settings import papers

from smartreg_tf import SMARTCallback, SMARTModel, SMARTWarning, attach

RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(12, 5)), RNG.integers(3, size=12)
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CONFIG = papers(epsilon=0.3, sigma=0.3, beta_early=0.5, beta_late=0.9, early_fraction=0.4)


def classifier():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input([5], dtype="int32"),
            layers.Embedding(20, 4),
            layers.Dropout(0.4),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), CE)
    model.optimizer.build(model.trainable_variables)  # or load_weights would leave Adam's state out
    return model


def fit(model, callbacks, epochs=4, **options):
    return model.fit(
        IDS, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **options
    ).history


class Interrupts(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def assert_equal_runs(model, callback, whole, whole_callback):
    for got, want in zip(model.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())
    for got, want in zip(callback.engine.averages, whole_callback.engine.averages, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())
    assert callback.metrics == whole_callback.metrics


@pytest.fixture(scope="module")
def whole():
    model, callback = classifier(), SMARTCallback(CONFIG)
    return model, callback, fit(model, [callback])


@pytest.mark.parametrize("ours_first", [True, False], ids=["callback first", "backup first"])
def test_backup_and_restore(tmp_path, ours_first, whole):
    def callbacks():
        both = [SMARTCallback(CONFIG), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
        return both if ours_first else both[::-1]

    with pytest.raises(KeyboardInterrupt):
        fit(classifier(), [*callbacks(), Interrupts()])
    model, resumed = classifier(), callbacks()
    history = fit(model, resumed)
    callback = next(one for one in resumed if isinstance(one, SMARTCallback))
    assert_equal_runs(model, callback, *whole[:2])
    assert history["loss"] == whole[2]["loss"][2:]
    assert callback.metrics["step"] == 12
    assert not (tmp_path / "backup").exists()


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Two runs of 4 epochs that stop after 2 of them: 1.keras, 2.keras and the same as .weights.h5."""
    folder = tmp_path_factory.mktemp("broken")
    for weights_only, name in ((False, "{epoch}.keras"), (True, "{epoch}.weights.h5")):
        saves = keras.callbacks.ModelCheckpoint(folder / name, save_weights_only=weights_only)
        with pytest.raises(KeyboardInterrupt):
            fit(classifier(), [SMARTCallback(CONFIG), saves, Interrupts()])
    return folder


@pytest.fixture
def checkpoint(broken, tmp_path):
    """A copy of them: the path of 2.keras, beside 2.weights.h5."""
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "2.keras")


@pytest.mark.parametrize("name", ["2.weights.h5", "2.keras"])
def test_model_checkpoint_and_resume(checkpoint, name, whole):
    file = checkpoint.replace("2.keras", name)
    if name.endswith("h5"):
        model = classifier()
        model.load_weights(file)
    else:
        model = keras.models.load_model(file)
    callback = SMARTCallback(CONFIG, resume=file)
    fit(model, [callback], initial_epoch=2)
    assert_equal_runs(model, callback, *whole[:2])


def test_without_the_state_beside_the_weights_the_run_is_another(checkpoint, whole):
    file = checkpoint.replace("keras", "weights.h5")
    os.remove(f"{file}.smart.npz")
    callback = SMARTCallback(CONFIG)
    model = classifier()
    model.load_weights(file)
    fit(model, [callback], initial_epoch=2)
    assert np.abs(callback.engine.averages[0] - whole[1].engine.averages[0]).max() > 0


def test_a_resumed_model_that_was_not_loaded_warns(checkpoint):
    callback = SMARTCallback(CONFIG, resume=checkpoint)
    message = r"2.keras.smart.npz was written after 6 .* optimiser has made none, .* first: keras.models.load_model\("
    with pytest.warns(SMARTWarning, match=message):
        fit(classifier(), [callback], initial_epoch=2)
    assert callback.metrics["step"] == 12


def test_weights_without_the_optimisers_state_are_resumed_in_silence(checkpoint):
    file = checkpoint.replace("keras", "weights.h5")
    model = classifier()
    model.compile(keras.optimizers.Adam(0.05), CE)  # not built
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        model.load_weights(file)
    assert model.optimizer.iterations == 0
    callback = SMARTCallback(CONFIG, resume=file)
    fit(model, [callback], initial_epoch=2)  # a warning would be an error
    assert callback.metrics["step"] == 12


def test_a_forgotten_initial_epoch_warns(checkpoint):
    message = r"has 6 optimiser steps behind it, and fit would take 12 more, but total_steps is 12. .*initial_epoch=2\)"
    with pytest.warns(SMARTWarning, match=message) as said:
        fit(keras.models.load_model(checkpoint), [SMARTCallback(CONFIG, resume=checkpoint)])
    assert len(said) == 1  # and not once more beyond total_steps
    whole_run = CONFIG.replace(total_steps=12)
    with pytest.warns(SMARTWarning, match=message):
        fit(keras.models.load_model(checkpoint), [SMARTCallback(whole_run, resume=checkpoint)])
    # epochs= may be those that are left, if total_steps is that of the whole run; and a run may be made longer
    callback = SMARTCallback(whole_run, resume=checkpoint)
    fit(keras.models.load_model(checkpoint), [callback], epochs=2)
    assert callback.metrics["step"] == 12
    callback = SMARTCallback(CONFIG, resume=checkpoint)
    fit(keras.models.load_model(checkpoint), [callback], epochs=5, initial_epoch=2)
    assert (callback.metrics["step"], callback.engine.config.total_steps) == (15, 15)


def test_evaluate_and_predict_leave_nothing():
    model = classifier()
    model.evaluate(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG)])
    model.predict(IDS, verbose=0, callbacks=[SMARTCallback(CONFIG)])
    assert "load_weights" not in vars(model)


def test_a_state_of_another_model(tmp_path):
    with attach(classifier(), CONFIG.replace(total_steps=9)) as smart:
        smart.save_state(tmp_path / "a")
    other = keras.Sequential([keras.Input([3]), layers.Dense(2)])
    other.compile("sgd", "mse")
    with (
        attach(other, CONFIG.replace(total_steps=9)) as smart,
        pytest.raises(ValueError, match=r"a.smart.npz is not of this model and configuration: average/0"),
    ):
        smart.load_state(tmp_path / "a")


def test_the_saved_model_loads_without_this_package(tmp_path):
    model = classifier()
    fit(model, [SMARTCallback(CONFIG), keras.callbacks.ModelCheckpoint(tmp_path / "during.keras")], epochs=1)
    model.save(tmp_path / "after.keras")
    np.save(tmp_path / "want.npy", model.predict(IDS, verbose=0))
    code = """
import sys, numpy as np, keras
sys.modules["smartreg"] = sys.modules["smartreg_tf"] = None
for name in ("during", "after"):
    got = keras.models.load_model(f"{name}.keras").predict(np.load("ids.npy"), verbose=0)
    np.testing.assert_array_equal(got, np.load("want.npy"))
"""
    np.save(tmp_path / "ids.npy", IDS)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def wrapped(seed=0):
    model = classifier()
    smart = SMARTModel(model, CONFIG.replace(total_steps=12), seed=seed)
    smart.compile(keras.optimizers.Adam(0.05), CE)
    smart.optimizer.build(smart.trainable_variables)  # else each step is traced twice
    return smart


def test_smart_model_equals_the_callback_and_loads_with_its_teacher(tmp_path, whole):
    smart = wrapped()
    history = fit(smart, [])
    assert history["smoothness"] == whole[2]["smoothness"]
    for got, want in zip(smart.model.get_weights(), whole[0].get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)
    smart.save(tmp_path / "smart.keras")
    loaded = keras.models.load_model(tmp_path / "smart.keras")
    assert loaded.get_config()["config"] == smart.get_config()["config"]
    np.testing.assert_array_equal(loaded.predict(IDS, verbose=0), smart.predict(IDS, verbose=0))
    with smart.swap_teacher(), loaded.swap_teacher():
        np.testing.assert_array_equal(loaded.predict(IDS, verbose=0), smart.predict(IDS, verbose=0))
    with pytest.warns(SMARTWarning, match="step 13 of a run of total_steps=12"):
        again = fit(loaded, [], epochs=1)
    assert set(again) == {"loss", "smoothness", "proximal"}
    assert again["proximal"][0] > 1e-6  # theta~ is not theta


def test_smart_model_of_an_unbuilt_one():
    inner = keras.Sequential([layers.Embedding(20, 4), layers.Flatten(), layers.Dense(3)])
    smart = SMARTModel(inner, CONFIG.replace(total_steps=12))
    smart.compile("adam", CE)
    assert set(fit(smart, [], epochs=1)) == {"loss", "smoothness", "proximal"}
    with pytest.raises(ValueError, match="SMARTModel: mu > 0 and beta changes"):
        SMARTModel(inner, CONFIG)


class LoadsLate(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        for weight in self.model.trainable_variables:
            weight.assign(weight + 1)


def test_theta_0_is_what_the_first_step_begins_with():
    model = classifier()
    model.optimizer.learning_rate = 0.0
    callback = SMARTCallback(CONFIG)
    fit(model, [callback, LoadsLate()], epochs=1)
    for average, weight in zip(callback.engine.averages, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(average, weight)


def test_theta_0_of_an_unbuilt_model_is_what_it_is_built_with():
    """In a graph, variables made while it is traced have no value yet."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([layers.Embedding(20, 4), layers.Flatten(), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.0), CE)
    callback = SMARTCallback(CONFIG)
    fit(model, [callback], epochs=1)
    assert len(callback.engine.averages) == 3
    for average, weight in zip(callback.engine.averages, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(average, weight)
        assert weight.path.endswith("bias") or np.abs(average).max() > 0
