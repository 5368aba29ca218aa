"""What can be asked of SMART: what it chose and why, and R_s and D_Breg of data that is not trained on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg import divergences as reference
from smartreg_tf import SMARTCallback, SMARTModel, attach

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3)).astype(np.float32)
TARGETS = RNG.normal(size=(10, 1)).astype(np.float32)
IDS, Y = RNG.integers(1, 9, size=(10, 4)), RNG.integers(2, size=10)
LINEAR = papers(
    scale="absolute", epsilon=0.5, start="margin", ascent_steps=0, beta_early=0.5, beta_late=0.5, total_steps=9
)


def linear(**compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([3]), layers.Dense(1), layers.Dropout(0.5)])
    model.compile(keras.optimizers.SGD(0.1), "mse", **compiled)
    return model


def by_hand(model, averages, x):
    """max (w delta)^2 in an l_inf ball of radius e is (e ||w||_1)^2; D_Breg is the mean of (x (w - w~) + b - b~)^2."""
    weights, averages = ([np.asarray(w, np.float64) for w in list_] for list_ in (model.get_weights(), averages))
    R_s = (0.5 * np.abs(weights[0]).sum()) ** 2
    D_Breg = ((x @ (weights[0] - averages[0]) + weights[1] - averages[1]) ** 2).mean()
    return {"R_s": pytest.approx(R_s, rel=1e-5), "D_Breg": pytest.approx(D_Breg, rel=1e-4)}


def everything(model, smart):
    values = [*model.variables, *model.optimizer.variables, *model.non_trainable_variables, *smart.averages, smart.step]
    values += [smart.penalty.draws, smart.penalty.seen, smart.reports.faults]
    metrics = [*(variable for metric in model.metrics for variable in metric.variables)]
    return [np.array(value) for value in [*values, *metrics]] + [str(smart.metrics)]


@pytest.mark.parametrize("eager", [True, False])
def test_measure_by_hand(eager):
    """In eval mode (no dropout), over batches of unequal size, and everything stays as it was."""
    model = linear(run_eagerly=eager, jit_compile=False)
    with attach(model, LINEAR) as smart:
        for _ in range(2):
            model.train_on_batch(X, TARGETS)
        before = everything(model, smart)
        averages = [average.numpy() for average in smart.averages]
        want = by_hand(model, averages, X)
        assert smart.measure(X, TARGETS, batch_size=4) == want
        assert smart.measure(tf.data.Dataset.from_tensor_slices((X, TARGETS)).batch(4)) == want
        for got, old in zip(everything(model, smart), before, strict=True):
            np.testing.assert_array_equal(got, old)
        weight = np.arange(10, dtype=np.float32)
        assert smart.measure(X, sample_weight=weight, batch_size=4)["R_s"] == pytest.approx(4.5 * want["R_s"].expected)
    assert smart.measure(X, batch_size=4) == want  # after the block: the model is plain again, and stays so
    assert "call" not in vars(model)


def test_measure_of_a_callback_and_of_a_model(tmp_path):
    model, callback, during = linear(), SMARTCallback(LINEAR), []
    with pytest.raises(ValueError, match=r"SMARTCallback.measure: there is no model and no theta~ before fit"):
        callback.measure(X)
    asks = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: during.append(callback.measure(X)))
    model.fit(X, TARGETS, verbose=0, callbacks=[callback, asks])
    averages = [average.numpy() for average in callback.engine.averages]
    assert during == [by_hand(model, averages, X)]
    assert callback.measure(X) == during[0]
    wrapped = SMARTModel(linear(), LINEAR)
    wrapped.compile("sgd", "mse")
    assert wrapped.measure(X, TARGETS) == by_hand(wrapped.model, wrapped.model.get_weights(), X)
    unbuilt = keras.Sequential([layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    with (
        attach(unbuilt, LINEAR) as smart,
        pytest.raises(ValueError, match=r"measure\(\) needs a model that has weights"),
    ):
        smart.measure(X, TARGETS)
    with (
        attach(linear(), LINEAR) as smart,
        pytest.raises(ValueError, match=r"measure\(\) needs y before the first step"),
    ):
        smart.measure(X)


def tagger():
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4], dtype="int32")
    outputs = layers.Dense(2)(layers.Embedding(9, 5, mask_zero=True, name="words")(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", CE, run_eagerly=True)
    return model


def test_describe(capsys):
    model, callback = tagger(), SMARTCallback(papers(), verbose=1)
    assert repr(callback).startswith("SMARTCallback(SMARTConfig(")
    with pytest.raises(ValueError, match="SMARTCallback.describe: there is no model"):
        callback.describe()
    model.fit(IDS, np.zeros((10, 4)), batch_size=5, epochs=2, verbose=0, callbacks=[callback])
    description = callback.describe()
    names = ["site", "x", "outputs", "l_s", "class axis", "mask", "positions", "precision"]
    assert list(description) == names
    values = {name: description[name].value for name in names}
    assert "words" in values["site"]
    assert values["x"] == "(5, 4, 5)"
    assert values["outputs"] == "logits"
    assert values["l_s"] == "symmetric_kl"
    assert values["class axis"] == "-1"
    assert (values["mask"], values["positions"]) == ("(5, 4)", "(5, 4)")
    assert description["x"].why == "1 run(s) of the site in a step"
    assert description["positions"].why == "the outputs are compared as (5, 4, 2), by their mask or that of x"
    assert values["precision"] == "float32"
    assert all(choice.why for choice in description.values())
    printed = capsys.readouterr().out
    assert printed.count("symmetric_kl") == 1
    assert str(description) in printed
    assert repr(callback) == description.line("SMARTCallback")


def test_describe_outputs_without_positions_or_mask():
    with attach(linear(run_eagerly=True), LINEAR) as smart:
        smart.model.train_on_batch(X, TARGETS)
        assert smart.describe()["positions"] == ("one an example", "the outputs are compared as (10, 1)")
    with attach(of_every_token(CE), LINEAR) as smart:
        smart.model.train_on_batch(IDS, np.zeros((10, 4)))
        assert smart.describe()["positions"] == ("all", "the outputs are compared as (10, 4, 3)")


def test_describe_before_and_without_a_step():
    with attach(tagger(), papers(total_steps=9), site="words", outputs="logits") as smart:
        assert smart.describe()["site"].why == "named by site="
        assert smart.describe()["x"] == ("not known yet", "the first training step shows it")
        smart.measure(IDS)
        assert smart.describe()["outputs"] == ("logits", "outputs=")
        assert repr(smart).startswith("attach(site=")
    wrapped = SMARTModel(linear(), LINEAR)
    assert repr(wrapped).startswith("SMARTModel(site=")
    assert wrapped.describe()["positions"].value == "not known yet"


def test_precision_says_why():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = linear(run_eagerly=True)
    finally:
        keras.config.set_dtype_policy("float32")
    with attach(model, LINEAR) as smart:
        assert smart.describe()["precision"] == ("float32", "the model computes in bfloat16, which would lose R_s")
    with attach(model, LINEAR, precision="model") as smart:
        assert smart.describe()["precision"] == ("bfloat16", "precision='model'")


def of_every_token(loss, eager=True):
    keras.utils.set_random_seed(0)
    inputs = keras.Input([4], dtype="int32")
    outputs = layers.Dense(3, name="head")(layers.Embedding(9, 5, name="words")(inputs))
    model = keras.Model(inputs, layers.Permute((2, 1))(outputs) if getattr(loss, "axis", -1) == 1 else outputs)
    model.compile(keras.optimizers.SGD(0.5), loss, run_eagerly=eager, jit_compile=False)
    return model


def divergences_of_every_token(model, averages):
    """symmetric_kl(theta, theta~) of every token of IDS, (10, 4), in float64."""
    logits = []
    for weights in (model.trainable_variables, averages):
        table, kernel, bias = (tf.convert_to_tensor(weight).numpy().astype(np.float64) for weight in weights)
        logits.append((table[IDS] @ kernel + bias).reshape(40, 3))
    return reference.DIVERGENCES["symmetric_kl"].value(*logits).reshape(10, 4)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_measure_is_a_mean_of_what_the_loss_counts(reduction, eager):
    """Whatever the loss's reduction, over batches that count unequal numbers of examples."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction=reduction)
    model = of_every_token(loss, eager)
    labels = RNG.integers(3, size=(10, 4))
    with attach(model, papers(lambda_s=0, beta_early=0.5, beta_late=0.5, total_steps=9)) as smart:
        model.train_on_batch(IDS, labels)
        labels[[0, 1, 2, 5]] = -1
        labels[3, 1:] = labels[7, :2] = -1
        counted = labels != -1
        each = divergences_of_every_token(model, smart.averages)
        of_an_example = (each * counted).sum(1)[counted.any(1)] / counted.sum(1)[counted.any(1)]
        assert of_an_example.mean() > 1e-4
        got = smart.measure(IDS, labels, batch_size=4)
        assert got["D_Breg"] == pytest.approx(of_an_example.mean(), rel=1e-3)
        with pytest.raises(ValueError, match=r"measure\(\) needs y: the loss leaves out the label -1"):
            smart.measure(IDS)
        why = smart.describe()["outputs"].why
        assert "ignore_class=-1" in why
        assert ("reduction='sum'" in why) == (reduction == "sum")


def test_measure_without_labels_has_the_axis_that_they_showed():
    def loss(y, z):
        return keras.losses.sparse_categorical_crossentropy(y, keras.ops.swapaxes(z, 1, 2), from_logits=True)

    loss.axis = 1  # of the outputs: the loss itself does not say it
    model = of_every_token(loss)
    with attach(model, papers(lambda_s=0, beta_early=0.5, beta_late=0.5, total_steps=9), outputs="logits") as smart:
        model.train_on_batch(IDS, RNG.integers(3, size=(10, 4)))
        assert smart.describe()["class axis"].value == "1"
        want = divergences_of_every_token(model, smart.averages).mean()
        assert smart.measure(IDS)["D_Breg"] == pytest.approx(want, rel=1e-3)


def test_measure_refuses_what_training_refuses():
    model = linear(run_eagerly=True)
    model.compile("sgd", keras.losses.BinaryCrossentropy(), run_eagerly=True)
    with attach(model, LINEAR) as smart, pytest.raises(ValueError, match="the outputs should be probabilities"):
        smart.measure(X, Y[:, None])


def test_describe_one_value_a_token():
    inputs = keras.Input([None], dtype="int32")
    outputs = layers.Reshape([-1])(layers.Dense(1)(layers.Embedding(9, 5)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True), run_eagerly=True)
    with attach(model, papers(total_steps=9)) as smart:
        model.train_on_batch(IDS, np.ones((10, 4)))
        assert smart.describe()["class axis"].value == "none: one value a token"
