"""evaluate="teacher": theta~ beside plain training, validated by fit, and in the model at its end."""

import keras
import numpy as np
import pytest
from keras import layers
from paper_settings import papers

from smartreg import SMARTConfig
from smartreg.proximal import momentum
from smartreg_tf import SMARTCallback, SMARTModel, attach

RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(12, 5)), RNG.integers(3, size=12)
DEV = RNG.integers(20, size=(9, 5)), RNG.integers(3, size=9)
CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ALONE = SMARTConfig(lambda_s=0, mu=0, memory=0.5, evaluate="teacher")
ALL = papers(epsilon=0.3, sigma=0.3, beta_early=0.8, beta_late=0.8, evaluate="teacher")


def network():
    keras.utils.set_random_seed(1)
    parts = [layers.Embedding(20, 4), layers.Dropout(0.4), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    return keras.Sequential([keras.Input([5], dtype="int32"), *parts])


def compiled(model, **options):
    model.compile(keras.optimizers.Adam(0.05), CE, **options)
    model.optimizer.build(model.trainable_variables)
    return model


def classifier(**options):
    return compiled(network(), **options)


def wrapped(config):
    return compiled(SMARTModel(network(), config.replace(total_steps=12)))


def fit(model, callbacks=(), epochs=4, dev=DEV, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(IDS, Y, epochs=epochs, validation_data=dev, callbacks=[*callbacks], **options).history


def weights(model):
    return [weight.numpy().copy() for weight in model.trainable_variables]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def averages(engine):
    return [average.numpy().copy() for average in engine.averages]


def engine_of(model):
    return model._smartreg_engine


@pytest.fixture(scope="module")
def loss_of():
    """The loss on DEV of weights in a model of their own, that SMART has never seen."""
    model = classifier()

    def loss(values):
        for weight, value in zip(model.trainable_variables, values, strict=True):
            weight.assign(value)
        return model.evaluate(*DEV, verbose=0, batch_size=4)

    return loss


class Seen(keras.callbacks.Callback):
    """Keep the weights and theta~ after each batch, and the weights in on_epoch_end."""

    def __init__(self):
        super().__init__()
        self.theta, self.averages, self.at_epoch_end, self.at_begin = [], [], [], None

    def on_train_begin(self, logs=None):
        self.at_begin = weights(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.theta.append(weights(self.model))
        engine = getattr(self.model, "_smartreg_engine", None)
        self.averages.append([] if engine is None else averages(engine))

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch_end.append(weights(self.model))


@pytest.fixture(scope="module")
def plain():
    model, seen = classifier(), Seen()
    history = fit(model, [seen], dev=None)
    return model, seen, history


@pytest.mark.parametrize("eager", [False, True], ids=["graph", "eager"])
def test_theta_tilde_alone_is_beside_plain_training_bit_for_bit(eager, plain):
    model, seen = classifier(run_eagerly=eager), Seen()
    callback = SMARTCallback(ALONE)
    history = fit(model, [callback, seen])
    if eager:
        expected = Seen()
        fit(classifier(run_eagerly=True), [expected], dev=None)
    else:
        expected = plain[1]
        assert history["loss"] == plain[2]["loss"]
    for step, theta in enumerate(expected.theta):
        assert_same(seen.theta[step], theta)
    config = ALONE.replace(total_steps=12)
    found = expected.at_begin
    for step, theta in enumerate(expected.theta, start=1):
        beta = momentum(step, config)
        found = [(1 - beta) * new + beta * old for new, old in zip(theta, found, strict=True)]
        for a, b in zip(seen.averages[step - 1], found, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    assert callback.metrics == {"beta": pytest.approx(momentum(12, config)), "step": 12, "skipped": 0} | {
        name: 0.0 for name in ("max_delta", "vanished") if name in callback.metrics
    }
    assert set(history) == {"loss", "val_loss"}


@pytest.mark.parametrize("wrap", [False, True], ids=["callback", "SMARTModel"])
@pytest.mark.parametrize("config", [ALONE, ALL.replace(mu=0), ALL], ids=["alone", "R_s", "R_s and D_Breg"])
def test_each_validation_is_of_theta_tilde_and_the_model_has_it_at_the_end(config, wrap, loss_of):
    seen = Seen()
    model = wrapped(config) if wrap else classifier()
    callback = None if wrap else SMARTCallback(config)
    history = fit(model, [seen] if wrap else [seen, callback])
    engine = engine_of(model) if wrap else callback.engine
    for epoch, loss in enumerate(history["val_loss"]):
        assert loss == pytest.approx(loss_of(seen.averages[3 * epoch + 2]), rel=1e-6)
        assert abs(loss - loss_of(seen.theta[3 * epoch + 2])) > 1e-5
        assert_same(seen.at_epoch_end[epoch], seen.averages[3 * epoch + 2])
    assert_same(weights(model), averages(engine))
    assert_same(weights(model), seen.averages[-1])
    assert model.evaluate(*DEV, verbose=0, batch_size=4) == pytest.approx(history["val_loss"][-1], rel=1e-6)
    assert "evaluate" not in vars(model)


def test_without_validation_data_the_epochs_end_with_theta_and_fit_with_theta_tilde():
    model, seen, callback = classifier(), Seen(), SMARTCallback(ALONE)
    fit(model, [callback, seen], dev=None)
    assert_same(seen.at_epoch_end[1], seen.theta[5])
    assert_same(weights(model), averages(callback.engine))


@pytest.mark.parametrize("place", [0, 3], ids=["first", "last"])
@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
def test_the_best_weights_are_those_that_were_monitored(tmp_path, place, monitor):
    mode = "min" if monitor == "val_loss" else "max"  # the best is not the last
    seen, stop = Seen(), keras.callbacks.EarlyStopping(monitor, patience=9, restore_best_weights=True, mode=mode)
    file = str(tmp_path / "best.weights.h5")
    save = keras.callbacks.ModelCheckpoint(file, monitor, save_best_only=True, save_weights_only=True, mode=mode)
    callbacks = [stop, save, seen]
    callbacks.insert(place, SMARTCallback(ALL))
    model = classifier()
    history = fit(model, callbacks, dev=DEV if monitor == "val_loss" else None)
    best = history[monitor].index((min if mode == "min" else max)(history[monitor]))
    assert best < 3
    kept = (seen.averages if monitor == "val_loss" else seen.theta)[3 * best + 2]
    assert_same(weights(model), kept)
    other = classifier()
    other.load_weights(file)
    assert_same(weights(other), kept)
    if monitor == "val_loss":
        assert other.evaluate(*DEV, verbose=0, batch_size=4) == pytest.approx(history["val_loss"][best], rel=1e-6)


class Interrupts(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=[ALONE, ALL], ids=["alone", "R_s and D_Breg"])
def unbroken(request, tmp_path_factory):
    """A configuration, and what a run with it has seen and reports."""
    seen, backup = Seen(), keras.callbacks.BackupAndRestore(tmp_path_factory.mktemp("unbroken") / "backup")
    return request.param, seen, fit(classifier(), [SMARTCallback(request.param), backup, seen])


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
def test_backup_and_restore(tmp_path, unbroken, ours_first):
    config, seen, whole = unbroken

    def callbacks():
        both = [SMARTCallback(config), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
        return both if ours_first else both[::-1]

    with pytest.raises(KeyboardInterrupt):
        fit(classifier(), [*callbacks(), Interrupts()])
    again = Seen()
    history = fit(classifier(), [*callbacks(), again])
    assert len(again.theta) == 6
    for step in range(6):
        assert_same(again.theta[step], seen.theta[6 + step])
        assert_same(again.averages[step], seen.averages[6 + step])
    assert history["val_loss"] == whole["val_loss"][2:]


def test_smart_model_goes_on_from_theta(tmp_path):
    def run(*more):
        model = wrapped(ALONE)
        seen = Seen()
        fit(model, [keras.callbacks.BackupAndRestore(tmp_path / "backup"), seen, *more])
        return seen

    class Stops(Interrupts):
        def on_train_begin(self, logs=None):
            stopped.append(self)

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.theta = weights(self.model)
            super().on_epoch_begin(epoch)

    stopped = []
    with pytest.raises(KeyboardInterrupt):
        run(Stops())
    again = run()
    assert_same(again.at_begin, stopped[0].theta)
    assert len(again.theta) == 6


def test_a_checkpoint_of_validated_weights_has_theta_beside_it(tmp_path):
    path, seen = str(tmp_path / "{epoch}.weights.h5"), Seen()
    fit(classifier(), [SMARTCallback(ALL), seen, keras.callbacks.ModelCheckpoint(path, save_weights_only=True)])
    model, again = classifier(), Seen()
    model.load_weights(tmp_path / "2.weights.h5")
    assert_same(weights(model), seen.averages[5])
    fit(model, [SMARTCallback(ALL, resume=tmp_path / "2.weights.h5"), again], initial_epoch=2)
    for step in range(6):
        assert_same(again.theta[step], seen.theta[6 + step])


class Breaks(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("wrap", [False, True], ids=["callback", "SMARTModel"])
def test_an_exception_in_a_validation_leaves_theta(wrap):
    seen = Seen()
    model = wrapped(ALL) if wrap else classifier()
    with pytest.raises(KeyboardInterrupt) as error:
        fit(model, [*([] if wrap else [SMARTCallback(ALL)]), seen, Breaks()])
    assert_same(weights(model), seen.theta[2])
    assert any(np.any(a != b) for a, b in zip(weights(model), seen.averages[2], strict=True))
    del error


def test_weights_that_a_callback_sets_after_a_validation_stay():
    class Resets(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.set_weights([np.zeros_like(value) for value in self.model.get_weights()])

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                assert all(not np.any(value) for value in weights(self.model))

    fit(classifier(), [SMARTCallback(ALONE), Resets()], epochs=2)


def test_a_callback_that_evaluates_gets_theta_tilde(loss_of):
    found = []

    class Asks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            found.append(self.model.evaluate(*DEV, verbose=0, batch_size=4))

    model, seen = classifier(), Seen()
    fit(model, [SMARTCallback(ALONE), seen, Asks()], epochs=1, dev=None)
    assert found == pytest.approx([loss_of(values) for values in seen.averages], rel=1e-6)
    assert abs(found[-1] - loss_of(seen.theta[-1])) > 1e-5


def test_attach_evaluates_by_hand(loss_of):
    model = classifier()
    with attach(model, ALONE.replace(total_steps=6)) as smart:
        for _ in range(6):
            model.train_on_batch(IDS, Y)
        theta = weights(model)
        assert model.evaluate(*DEV, verbose=0, batch_size=4) == pytest.approx(loss_of(theta), rel=1e-6)
        with smart.swap_teacher():
            averaged = model.evaluate(*DEV, verbose=0, batch_size=4)
    assert averaged == pytest.approx(loss_of(averages(smart)), rel=1e-6)
    assert_same(weights(model), theta)
    assert smart.metrics["beta"] == pytest.approx(2 / 3)
