"""The life of SMART on a Keras model: begun twice, broken off anywhere, copied: the model is as it was after it."""

import copy
import pickle
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg.divergences import squared_error
from smartreg_tf import SMARTCallback, SMARTModel, attach

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X, Y = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 2
CONFIG = papers(total_steps=20)


def small(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([4]), layers.Dense(3, activation="tanh"), layers.Dropout(0.2), layers.Dense(2)]
    )
    model.compile(**{"optimizer": keras.optimizers.SGD(0.1), "loss": CE, "run_eagerly": True, **compiled})
    return model


def used(folder, **compiled):
    """A model that has done everything once that adds attributes to it."""
    model = small(**compiled)
    model.fit(X, Y, validation_data=(X, Y), verbose=0)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.save_weights(folder / "before.weights.h5")
    model.load_weights(folder / "before.weights.h5")
    (folder / "before.weights.h5").unlink()
    return model


def attributes(model):
    return {
        (place, name): value
        for place, owner in enumerate(model._flatten_layers())
        for name, value in vars(owner).items()
        if name not in ("history", "_eval_epoch_iterator")
    }


def changed(before, model):
    after = attributes(model)
    return sorted(key[1] for key in {*before, *after} if before.get(key, before) is not after.get(key, after))


class Breaks(keras.callbacks.Callback):
    """Raises in the method that is named."""

    def __init__(self, method):
        super().__init__()

        def breaks(*args, **kwargs):
            raise KeyError("the user's own error")

        setattr(self, method, breaks)


HOOKS = ["set_model", "on_train_begin", "on_train_end"]
HOOKS += [f"on_{what}_{when}" for what in ("epoch", "train_batch", "test", "test_batch") for when in ("begin", "end")]


@pytest.mark.parametrize(
    ("hook", "first"),
    [(hook, False) for hook in HOOKS] + [(hook, True) for hook in (*HOOKS[:3], "on_test_begin")],  # which SMART has too
)
def test_a_fit_that_another_callback_breaks_off(hook, first, tmp_path):
    """While the traceback is held, as a notebook holds it, all is plain at once; without it nothing is left."""
    model = used(tmp_path)
    before = attributes(model)
    callbacks = [SMARTCallback(papers()), Breaks(hook)]
    with pytest.raises(KeyError, match="own error") as held:
        model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=callbacks[:: -1 if first else 1])
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "model.weights.h5"]
    assert set(model.train_on_batch(X, Y, return_dict=True)) == {"loss"}
    model.load_weights(tmp_path / "model.weights.h5")  # warns of nothing
    assert changed(before, model) == []
    del held
    with pytest.raises(KeyError, match="own error"):
        model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=callbacks[:: -1 if first else 1])
    sys.last_value = None
    assert changed(before, model) == []


@pytest.mark.parametrize(
    "then", ["evaluate", "predict", "fit", "train_on_batch", "test_on_batch", "attach", "callback"]
)
def test_what_comes_after_a_broken_fit_is_plain(then, tmp_path):
    model = used(tmp_path)
    before = attributes(model)
    with pytest.raises(KeyError, match="own error") as held:
        model.fit(X, Y, verbose=0, callbacks=[SMARTCallback(papers()), Breaks("on_epoch_end")])
    if then == "attach":
        with attach(model, CONFIG) as smart:
            model.train_on_batch(X, Y)
            assert smart.metrics["step"] == 1
    elif then == "callback":
        assert "smoothness" in model.fit(X, Y, verbose=0, callbacks=[SMARTCallback(papers())]).history
    else:
        getattr(model, then)(X, *([Y] if then != "predict" else []), **({"verbose": 0} if "batch" not in then else {}))
    assert changed(before, model) == []
    del held


def test_data_that_break_a_fit_off(tmp_path):
    def batches():
        yield X, Y
        raise KeyError("the user's own error")

    model = used(tmp_path)
    before = attributes(model)
    with pytest.raises(Exception, match="own error"):
        model.fit(
            batches(), steps_per_epoch=2, shuffle=False, verbose=0, callbacks=[SMARTCallback(papers(total_steps=2))]
        )
    assert changed(before, model) == []


REFUSED = {
    "steps_per_execution": ({"smoothness_steps": 2}, {}),
    "layers": ({}, {"layers": "none"}),
    "resume": ({}, {"resume": "/nowhere"}),
    "outputs": ({}, {"outputs": ["logits"] * 2}),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_a_fit_that_is_refused_leaves_nothing(wrong, tmp_path):
    steps = 2 if wrong == "steps_per_execution" else 1
    model = used(tmp_path, run_eagerly=False, jit_compile=False, steps_per_execution=steps)
    before = attributes(model)
    settings, options = REFUSED[wrong]
    with pytest.raises(ValueError, match="SMART"):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[SMARTCallback(papers(**settings), **options)])
    assert changed(before, model) == []
    model.save(tmp_path / "model.keras")
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    assert set(model.train_on_batch(X, Y, return_dict=True)) == {"loss"}


def test_a_loop_of_ones_own_with_callbacks_keeps_smart(tmp_path):
    """No fit of Keras' is on the stack, so nothing ends before on_train_end."""
    model = used(tmp_path)
    before = attributes(model)
    callback = SMARTCallback(CONFIG)
    refused = keras.callbacks.CallbackList([SMARTCallback(CONFIG, resume="/nowhere")], model=model)
    with pytest.raises(ValueError, match=r"there is no /nowhere.smart.npz"):
        refused.on_train_begin()
    assert changed(before, model) == []
    callbacks = keras.callbacks.CallbackList([callback], model=model)
    callbacks.on_train_begin()
    for _ in range(2):
        assert set(model.train_on_batch(X, Y, return_dict=True)) == {"loss", "smoothness", "proximal"}
    callbacks.on_train_end()
    assert callback.metrics["step"] == 2
    assert changed(before, model) == []


def test_copies_of_a_model_that_is_attached():
    model = small()
    with attach(model, CONFIG):
        model.train_on_batch(X, Y)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), keras.models.clone_model(model)]
        for other in copies[:2]:
            for got, want in zip(other.get_weights(), model.get_weights(), strict=True):
                np.testing.assert_array_equal(got, want)
        for other in copies:
            other.compile("sgd", CE, run_eagerly=True)
            assert set(other.train_on_batch(X, Y, return_dict=True)) == {"loss"}
            assert not any("smart" in name or name == "call" for _, name in attributes(other))


def test_copies_of_smart_itself():
    callback = SMARTCallback(papers(epsilon=0.3), seed=3)
    model = small()
    model.fit(X, Y, verbose=0, callbacks=[callback])
    for other in (copy.deepcopy(callback), copy.copy(callback)):
        assert other.engine is None
        assert other.config == callback.config
    with (
        attach(model, CONFIG) as smart,
        pytest.raises(TypeError, match=r"cannot be copied or pickled.*save_state\(path\)"),
    ):
        copy.deepcopy(smart)


def test_a_second_smart_is_refused_by_name():
    model = small()
    with attach(model, CONFIG) as smart:
        with pytest.raises(ValueError, match=r"already has a SMARTCallback or attach\(\)"), attach(model, CONFIG):
            pass
        with pytest.raises(ValueError, match=r"already has a SMARTCallback, attach\(\) or SMARTModel"):
            SMARTModel(model, CONFIG)
        model.train_on_batch(X, Y)
        assert smart.metrics["step"] == 1
    wrapped = SMARTModel(model, CONFIG)
    wrapped.compile("sgd", CE, run_eagerly=True)
    with pytest.raises(ValueError, match="already has"), attach(wrapped, CONFIG):
        pass
    with pytest.raises(ValueError, match="already has"):
        wrapped.fit(X, Y, verbose=0, callbacks=[SMARTCallback(CONFIG)])
    with pytest.raises(ValueError, match="already has"):
        SMARTModel(wrapped, CONFIG)
    assert set(wrapped.fit(X, Y, verbose=0).history) == {"loss", "smoothness", "proximal"}


def test_a_training_step_after_the_block():
    model = small()
    with attach(model, CONFIG) as smart:
        pass
    with (
        pytest.raises(RuntimeError, match=r"training_step\(\) came after the attach\(\) block had ended"),
        smart.training_step(),
    ):
        pass
    with attach(model, papers(lambda_s=0, mu=0)) as off, off.training_step():
        model.compute_loss(X, Y, model(X, training=True))


class Triplet(keras.Model):
    """Unpacks its batch itself: Keras' own automatic build would call it on a third of it."""

    def __init__(self, fails=False):
        super().__init__()
        self.encoder, self.fails = keras.Sequential([layers.Dense(3), layers.Dropout(0.1)]), fails

    def call(self, parts):
        return keras.ops.concatenate([self.encoder(part) for part in parts], -1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        a, b, c = keras.ops.split(y_pred, 3, -1)
        return keras.ops.mean(keras.ops.relu(keras.ops.sum((a - b) ** 2 - (a - c) ** 2, -1) + 0.5))

    def train_step(self, data):
        if self.fails:
            raise KeyError("not before it has weights")
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=data, y_pred=self(data, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"own": loss}


TRIPLETS = tf.data.Dataset.from_tensor_slices((X, X[::-1], X + 1)).batch(4)


@pytest.mark.parametrize("eager", [False, True])
def test_an_unbuilt_model_with_a_train_step_of_its_own(eager):
    model = Triplet()
    model.compile("sgd", run_eagerly=eager, jit_compile=False)
    seen = []
    callback = SMARTCallback(papers(beta_early=0.5), outputs="regression", on_step=seen.append)
    history = model.fit(TRIPLETS, verbose=0, shuffle=False, callbacks=[callback]).history
    assert set(history) == {"own", "smoothness", "proximal"}
    found = [squared_error(step.perturbed[0], step.outputs[0]).mean() for step in seen]
    assert len(found) == 2
    assert history["smoothness"][0] == pytest.approx(np.mean(found), rel=1e-4)
    assert min(found) > 0
    assert [average.shape for average in callback.engine.averages] == [(4, 3), (3,)]


def test_an_unbuilt_model_whose_train_step_cannot_build_it():
    model = Triplet(fails=True)
    model.compile("sgd")
    with pytest.raises(
        ValueError, match=r"no weights yet.*not before it has weights.*Call the model on a batch before"
    ):
        model.fit(TRIPLETS, verbose=0, shuffle=False, callbacks=[SMARTCallback(papers(), outputs="regression")])
