"""Recording a Keras run: it changes nothing, the file passes compare_run, and what is wrong in a run shows."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers
from test_tf_fit import (
    CE,
    IDS,
    IMAGES,
    MATRIX,
    SETTINGS,
    Y,
    changed,
    compiled,
    convolutional,
    functional,
    sequential,
    state,
)

import smartreg_tf.observe
import smartreg_tf.perturbation
from smartreg.checking import compare_run
from smartreg_tf import SMARTCallback, SMARTConfig, SMARTWarning, attach
from smartreg_tf.outputs import Head

ROOT = Path(__file__).parent.parent
CONFIG = papers(**SETTINGS, eta=0.3)


def fitted(record, build=sequential, loss=CE, data=(IDS, Y), config=CONFIG, fit=None, steps=3, smart=None, **options):
    model = compiled(build, loss, 0.1, **options)
    callback = SMARTCallback(config, record=record, record_steps=steps, **(smart or {}))
    data = data if isinstance(data, tuple) else (data,)
    batch = {} if len(data) == 1 else {"batch_size": 4}
    history = model.fit(*data, **batch, epochs=2, shuffle=False, verbose=0, callbacks=[callback], **(fit or {}))
    return model, history.history


def failed(path):
    return {row.what for row in compare_run(path).rows if not row.ok}


@pytest.mark.parametrize(
    ("build", "start", "options"),
    [
        (sequential, "gaussian", {}),
        (sequential, "margin", {"steps_per_execution": 2}),
        (functional, "margin", {}),
        (convolutional, "gaussian", {"run_eagerly": True}),
    ],
    ids=["graph", "steps_per_execution", "attention", "eager"],
)
def test_recording_changes_nothing(tmp_path, build, start, options):
    """Dropout and BatchNorm included, the weights and the seeds are the same bit for bit."""
    config, data = CONFIG.replace(start=start), (IMAGES if build is convolutional else IDS, Y)
    plain, history = fitted(None, build, data=data, config=config, **options)
    model, recorded = fitted(tmp_path / "run.npz", build, data=data, config=config, **options)
    assert recorded == history
    for got, want in zip(model.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 3
    left, without = ([(name.split()[0], name.split(".")[-1]) for name in state(one)] for one in (model, plain))
    assert left == without


KINDS = ["subclassed, unbuilt", "list outputs", "siamese", "keras_hub BERT, strings"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_passes(tmp_path, name):
    build, batches, loss = MATRIX[name]
    fitted(tmp_path / "run.npz", build, loss, batches, run_eagerly="unbuilt" not in name)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert len({row.what for row in report.rows}) == 13
    with np.load(tmp_path / "run.npz") as file:
        assert ("0/x/1" in file.files) == (name == "siamese")
        assert ("0/outputs/1" in file.files) == (name == "list outputs")
        assert ("0/mask/0" in file.files) == ("BERT" in name)


def tagger(**options):
    """A label and two values a position."""
    keras.utils.set_random_seed(1)
    ids = keras.Input([5], dtype="int32")
    x = layers.Embedding(20, 4, mask_zero=True)(ids)
    heads = [layers.Dense(3, name="label")(x), layers.Dense(2, activation="sigmoid", name="size")(x)]
    model = keras.Model(ids, heads)
    model.compile(
        keras.optimizers.SGD(0.1),
        [
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
            "binary_crossentropy",
        ],
        loss_weights=[0.5, 2.0],
        **options,
    )
    return model


LABELS = [IDS % 3, np.stack([IDS % 2, IDS % 2], -1).astype(np.float32)]
SITUATIONS = {
    "lambda_s = 0": CONFIG.replace(lambda_s=0),
    "mu = 0": CONFIG.replace(mu=0),
    "l_2, a ball a token": CONFIG.replace(norm="2", granularity="token"),
    "l_1, absolute, S = 2": CONFIG.replace(norm="1", scale="absolute", proximal_steps=2),
    "rescaled": SMARTConfig.mtdnn(),
    "R_s every 2nd step": CONFIG.replace(smoothness_steps=2),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_several_outputs_with_positions_and_weights(tmp_path, name):
    weighted = name != "mu = 0"
    weight = [np.random.default_rng(seed).random(IDS.shape) for seed in (0, 1)] if weighted else None
    model = tagger(run_eagerly=name != "l_2, a ball a token")
    callback = SMARTCallback(SITUATIONS[name], record=tmp_path / "run.npz", record_steps=3)
    model.fit(IDS, LABELS, sample_weight=weight, batch_size=4, verbose=0, callbacks=[callback])
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    with np.load(tmp_path / "run.npz") as file:
        assert ("0/sample_weight/1" in file.files) == weighted
        assert "0/positions/0" in file.files


def test_weights_of_examples_and_classes(tmp_path):
    weight = np.random.default_rng(0).random(len(IDS))
    by_weights = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    for i, fit in enumerate(({"sample_weight": weight}, {"class_weight": {0: 0.5, 1: 2.0, 2: 0.0}})):
        fitted(tmp_path / f"{i}.npz", loss=by_weights, fit=fit, run_eagerly=True)
        report = compare_run(tmp_path / f"{i}.npz")
        assert report.ok, str(report)
        with np.load(tmp_path / f"{i}.npz") as file:
            assert file["0/sample_weight/0"].shape == (4,)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float64"])
def test_precisions(tmp_path, policy):
    def build():
        made = [layers.Embedding(20, 4, dtype=policy), layers.Flatten(dtype=policy), layers.Dense(3, dtype=policy)]
        return keras.Sequential([keras.Input([5], dtype="int32"), *made])

    fitted(tmp_path / "run.npz", build, run_eagerly=True)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    bounds = {row.bound / row.recomputed for row in report.rows if row.what == "R_s"}
    assert all((bound < 1e-11) == (policy == "float64") for bound in bounds)


# when it is written, and what is refused


def test_fewer_steps_than_asked_for_and_a_second_fit(tmp_path):
    path = tmp_path / "run.npz"
    model = compiled(sequential, CE, 0.1, run_eagerly=True)
    callback = SMARTCallback(CONFIG, record=path)
    model.fit(IDS, Y, batch_size=4, verbose=0, callbacks=[callback])
    report = compare_run(path)
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 3
    written = path.read_bytes()
    model.fit(IDS, Y, batch_size=4, verbose=0, callbacks=[callback])  # the recording is done
    assert path.read_bytes() == written
    with pytest.raises(FileExistsError, match=r"^SMARTCallback: record=.* is there already"):
        SMARTCallback(CONFIG, record=path)


def test_it_is_written_after_the_last_step(tmp_path):
    path = tmp_path / "run.npz"
    model = compiled(sequential, CE, 0.1)
    with attach(model, CONFIG.replace(total_steps=9), record=path, record_steps=2):
        model.train_on_batch(IDS, Y)
        assert not path.exists()
        model.train_on_batch(IDS, Y)
        written = path.read_bytes()
        model.train_on_batch(IDS, Y)
    assert path.read_bytes() == written
    assert failed(path) == set()
    with (
        pytest.warns(SMARTWarning, match="attach: record=: .*none.npz' is not written: no training step"),
        attach(model, CONFIG.replace(total_steps=9), record=tmp_path / "none.npz"),
    ):
        model.predict(IDS, verbose=0)


def test_a_loop_of_ones_own_in_a_graph(tmp_path):
    model = compiled(sequential, CE, 0.1)
    with attach(model, CONFIG.replace(total_steps=9), record=tmp_path / "run.npz", record_steps=3) as smart:

        @tf.function(autograph=False)  # with it: test_tf_edges.py
        def step(x, y):
            with smart.training_step():
                with tf.GradientTape() as tape:
                    loss = model.compute_loss(x, y, model(x, training=True))
                gradients = tape.gradient(loss, model.trainable_variables)
                model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

        for _ in range(4):
            step(IDS, Y)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 3


def test_an_optimiser_of_ones_own_moves_no_theta_tilde(tmp_path):
    model = compiled(sequential, CE, 0.0)
    other = keras.optimizers.SGD(0.1)
    with attach(model, CONFIG.replace(total_steps=9), record=tmp_path / "run.npz", record_steps=3) as smart:
        for _ in range(3):
            with smart.training_step(), tf.GradientTape() as tape:
                loss = model.compute_loss(IDS, Y, model(IDS, training=True))
            other.apply_gradients(
                zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
            )
    assert failed(tmp_path / "run.npz") == {"theta~ is counted"}


class Fails(layers.Layer):
    """Raises in a graph, where an id is 19."""

    def call(self, ids):
        with tf.control_dependencies([tf.debugging.assert_less(ids, 19, message="the model's own error")]):
            return tf.identity(ids)


@pytest.mark.parametrize("eager", [False, True])
def test_a_model_that_raises_leaves_the_complete_steps(tmp_path, eager):
    ids = IDS % 19
    ids[-1, 0] = 19
    build = lambda: keras.Sequential([keras.Input([5], dtype="int32"), Fails(), *sequential().layers])  # noqa: E731
    with pytest.raises(tf.errors.InvalidArgumentError, match="own error"):
        fitted(tmp_path / "run.npz", build, data=(ids, Y), steps=9, run_eagerly=eager)
    report = compare_run(tmp_path / "run.npz")
    assert report.ok, str(report)
    assert max(row.step for row in report.rows) == 2


def test_a_step_that_is_not_finite_is_recorded(tmp_path):
    def build():
        model = sequential()
        model.layers[0].set_weights([np.full((20, 4), np.inf)])
        return model

    with pytest.raises(FloatingPointError, match="not finite"):
        fitted(tmp_path / "run.npz", build)
    assert "all finite" in failed(tmp_path / "run.npz")


def test_xla_is_refused_before_training(tmp_path, monkeypatch):
    message = r"record= cannot take tensors out of a step that XLA compiles.*jit_compile=False.*'auto'"
    model = compiled(sequential, CE, 0.1, jit_compile=True)
    weights, before = model.get_weights(), state(model)
    with pytest.raises(ValueError, match=message):
        model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG, record=tmp_path / "run.npz")])
    # what Keras itself has made before any callback is asked
    assert not changed(before, model, but=("history", "_eval_epoch_iterator", "train_function"))
    assert list(tmp_path.iterdir()) == []
    for got, want in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(got, want)
    # what "auto" becomes where there is a GPU
    devices = [*tf.config.list_physical_devices(), tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: devices)
    model = compiled(sequential, CE, 0.1)
    assert model.jit_compile
    with pytest.raises(ValueError, match=message):
        model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(CONFIG, record=tmp_path / "run.npz")])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    # compiled anew inside
    model = compiled(sequential, CE, 0.1)
    record = {"record": tmp_path / "run.npz", "record_steps": 2}
    with attach(model, CONFIG.replace(total_steps=9), **record):
        model.train_on_batch(IDS, Y)
        model.compile("sgd", CE, jit_compile=True)
        with pytest.raises(ValueError, match=message):
            model.train_on_batch(IDS, Y)


def test_a_broken_formula_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(smartreg_tf.perturbation, "climb", lambda balls, starts, _: [1.001 * delta for delta in starts])
    monkeypatch.setattr(smartreg_tf.observe, "momentum", lambda step, config: tf.constant(0.8, tf.float64))
    mean = Head.mean
    monkeypatch.setattr(Head, "mean", lambda *given: 1.001 * mean(*given))
    fitted(tmp_path / "run.npz", config=CONFIG.replace(start="margin"), run_eagerly=True)
    assert failed(tmp_path / "run.npz") == {"delta in the ball", "beta", "R_s", "D_Breg", "penalty"}


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "debugging.md"
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in found if "smartreg_tf" in block)
    names = {"model": compiled(sequential, CE, 0.1), "x": IDS, "y": Y}
    exec(compile(block, str(page), "exec"), names)
    assert names["report"].ok
