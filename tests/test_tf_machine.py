"""SMART's life on one Keras model in any order, and what docs/keras.md promises after every step of it."""

import copy
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from keras import layers
from paper_settings import papers
from test_tf_life import attributes

from smartreg_tf import SMARTCallback, attach

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X, Y = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), np.arange(8) % 2
CONFIG = papers(total_steps=50, start="margin", ascent_steps=0, beta_early=0.5, beta_late=0.5)
PLACES = ["on_train_begin", "on_epoch_begin", "on_train_batch_end", "on_epoch_end", "on_train_end"]


def small():
    model = keras.Sequential([keras.Input([3]), layers.Dropout(0.3), layers.Dense(2)])
    # what SMART adds to the loss must not move the dropout's seeds, so that at a learning rate of 0 two models agree
    model.compile(keras.optimizers.SGD(0.1), CE, run_eagerly=True)
    return model


def numbers(variables):
    return [np.array(variable) for variable in variables]


class Life(RuleBasedStateMachine):
    """One model, at most one attach() at a time, and callbacks in between."""

    @initialize()
    def begin(self):
        keras.utils.set_random_seed(0)
        self.folder = Path(tempfile.mkdtemp())
        self.model, self.plain = small(), small()
        for model in (self.model, self.plain):
            model.fit(X, Y, validation_data=(X, Y), verbose=0)
            model.save_weights(self.folder / "begin.weights.h5")
            model.load_weights(self.folder / "begin.weights.h5")
        self.before = attributes(self.model)
        self.smart, self.block, self.saved = None, ExitStack(), 0
        self.follow()

    def follow(self):
        """The other model takes the weights and seeds of this one, so that one plain step of both must agree."""
        for mine, its in zip(self.model.variables, self.plain.variables, strict=True):
            its.assign(mine)
        for mine, its in zip(self.seeds(self.model), self.seeds(self.plain), strict=True):
            its.assign(mine)

    @staticmethod
    def seeds(model):
        return [layer.seed_generator.state for layer in model.layers if hasattr(layer, "seed_generator")]

    def trained(self, train):
        """One step at work: the seeds move as in a plain one, and theta~ by its momentum alone."""
        self.follow()
        self.plain.train_on_batch(X, Y)
        theta_tilde = [] if self.smart is None else numbers(self.smart.averages)
        train()
        for mine, its in zip(self.seeds(self.model), self.seeds(self.plain), strict=True):
            np.testing.assert_array_equal(mine, its)
        if self.smart is None:
            for mine, its in zip(self.model.get_weights(), self.plain.get_weights(), strict=True):
                np.testing.assert_array_equal(mine, its)
        else:
            self.steps += 1
            for old, now, weight in zip(theta_tilde, self.smart.averages, self.model.trainable_variables, strict=True):
                np.testing.assert_allclose(now, 0.5 * old + 0.5 * np.array(weight), rtol=1e-5, atol=1e-7)

    @rule()
    def train_on_batch(self):
        self.trained(lambda: self.model.train_on_batch(X, Y))

    @rule()
    def fit(self):
        self.trained(lambda: self.model.fit(X, Y, shuffle=False, verbose=0))

    @precondition(lambda self: self.smart is None)
    @rule()
    def attach(self):
        self.smart = self.block.enter_context(attach(self.model, CONFIG))
        self.steps = 0

    @precondition(lambda self: self.smart is not None)
    @rule(error=st.booleans())
    def leave(self, error):
        with suppress(KeyError), self.block:
            if error:
                raise KeyError
        self.smart, self.block = None, ExitStack()

    @rule()
    def a_second_one_is_refused(self):
        if self.smart is not None:
            with suppress(ValueError), attach(self.model, CONFIG):
                raise AssertionError

    @precondition(lambda self: self.smart is None)
    @rule()
    def fit_with_a_callback(self):
        callback = SMARTCallback(CONFIG)
        history = self.model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callback]).history
        assert set(history) == {"loss", "smoothness", "proximal"}
        assert callback.metrics["step"] == 2

    @precondition(lambda self: self.smart is None)
    @rule(place=st.sampled_from(PLACES), first=st.booleans())
    def fit_that_is_broken_off(self, place, first):
        other = keras.callbacks.Callback()

        def breaks(*args, **kwargs):
            raise KeyError

        setattr(other, place, breaks)
        with suppress(KeyError):
            self.model.fit(X, Y, verbose=0, callbacks=[SMARTCallback(CONFIG), other][:: -1 if first else 1])

    @rule()
    def look(self):
        """Nothing that looks moves anything."""
        before = numbers([*self.model.variables, *self.seeds(self.model)])
        self.model.evaluate(X, Y, verbose=0)
        if self.smart is not None:
            before_theta = numbers(self.smart.averages)
            self.smart.measure(X, Y)
            str(self.smart.describe())
            with self.smart.swap_teacher():
                for average, weight in zip(self.smart.averages, self.model.trainable_variables, strict=True):
                    np.testing.assert_array_equal(average, weight)
            for old, average in zip(before_theta, self.smart.averages, strict=True):
                np.testing.assert_array_equal(old, average)
        for old, now in zip(before, [*self.model.variables, *self.seeds(self.model)], strict=True):
            np.testing.assert_array_equal(old, now)

    @rule()
    def copied(self):
        other = copy.deepcopy(self.model)
        assert not any("smart" in name or name == "call" for _, name in attributes(other))
        for mine, its in zip(self.model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, its)

    @rule()
    def save_and_load(self):
        """theta~ and the step lie beside the weights exactly while SMART is at work."""
        self.saved += 1
        path = self.folder / f"{self.saved}.weights.h5"
        self.model.save_weights(path)
        assert Path(f"{path}.smart.npz").exists() == (self.smart is not None)
        self.model.load_weights(path)

    @invariant()
    def the_model_is_as_it_was(self):
        if getattr(self, "smart", None) is not None:
            assert self.smart.metrics["step"] == self.steps
        elif hasattr(self, "before"):
            after = attributes(self.model)
            none = object()
            assert [
                key for key in {*self.before, *after} if self.before.get(key, none) is not after.get(key, none)
            ] == []

    def teardown(self):
        with suppress(KeyError):
            self.block.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TestLife = Life.TestCase
# a tenth of the other tests' examples, since each has as many steps
TestLife.settings = hypothesis.settings(
    max_examples=max(6, hypothesis.settings().max_examples // 10), stateful_step_count=12, deadline=None
)
