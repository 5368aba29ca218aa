"""Algorithm 1 in Keras against the NumPy reference: 50 steps, every intermediate, the same noise."""

from contextlib import contextmanager

import keras
import numpy as np
import pytest
import tensorflow as tf
from notes import Notes
from pairwise import FACTORS, named, pairwise
from paper_settings import papers

from smartreg.checking import load_trajectory
from smartreg.reference import Batch, fit_reference, init_parameters
from smartreg_tf import attach
from smartreg_tf.divergences import position_weights

N, TOKENS, D, CLASSES, STEPS = 6, 5, 4, 3, 50
KINDS = {"symmetric_kl": "logits", "bernoulli_symmetric_kl": "label_logits", "squared_error": "regression"}


@contextmanager
def float64():
    """Keras in float64; its dtype policy is pinned by whoever asks for it first."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


@pytest.fixture(autouse=True)
def _float64():
    with float64():
        yield


class Network(keras.Model):
    """The reference network, with the reference's own task loss (a per-example mean over positions)."""

    def __init__(self, theta, divergence, pooled, dropout=None):
        super().__init__()
        self.divergence, self.pooled = divergence, pooled
        self.embedding = keras.layers.Embedding(*theta["E"].shape)
        self.hidden = keras.layers.Dense(theta["W1"].shape[1], activation="tanh")
        self.dropout = dropout or keras.layers.Identity()
        self.head = keras.layers.Dense(theta["W2"].shape[1])
        self({"ids": np.zeros((1, TOKENS), int), "padding_mask": np.ones((1, TOKENS), bool)})
        self.set_weights([theta[name] for name in ("E", "W1", "b1", "W2", "b2")])

    def call(self, inputs, training=False):
        h = self.dropout(self.hidden(self.embedding(inputs["ids"])), training=training)
        if self.pooled:
            h = tf.reduce_sum(position_weights(h, inputs["padding_mask"]) * h, 1)
        return self.head(h)

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        if self.divergence == "symmetric_kl":
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, y_pred)
        elif self.divergence == "bernoulli_symmetric_kl":
            losses = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(y, y_pred), -1)
        else:
            losses = tf.reduce_sum((y_pred - y) ** 2, -1)
        if not self.pooled:
            losses = tf.reduce_sum(position_weights(y_pred, x["padding_mask"])[..., 0] * losses, 1)
        weight = 1 if sample_weight is None else tf.cast(sample_weight, losses.dtype)
        return tf.reduce_mean(weight * losses)


class Adam(keras.optimizers.Adam):
    """Keras' Adam with its constants in float64: Keras 3.15 takes beta_1 and beta_2 through float32."""

    def update_step(self, gradient, variable, learning_rate):
        beta_1, beta_2 = tf.constant(0.9, tf.float64), tf.constant(0.999, tf.float64)
        t = tf.cast(self.iterations + 1, tf.float64)
        alpha = learning_rate * tf.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        m, v = (slots[self._get_variable_index(variable)] for slots in (self._momentums, self._velocities))
        m.assign(m + (gradient - m) * (1 - beta_1))
        v.assign(v + (gradient * gradient - v) * (1 - beta_2))
        variable.assign(variable - m * alpha / (tf.sqrt(v) + self.epsilon))


def make_batches(rng, divergence, pooled, weighted):
    batches = []
    for _ in range(STEPS):
        lengths = rng.integers(2, TOKENS + 1, N)
        y_shape = (N,) if pooled else (N, TOKENS)
        if divergence == "symmetric_kl":
            y = rng.integers(CLASSES, size=y_shape)
        elif divergence == "bernoulli_symmetric_kl":
            y = rng.integers(2, size=(*y_shape, CLASSES)).astype(float)
        else:
            y = rng.normal(size=(*y_shape, CLASSES))
        mask = np.arange(TOKENS) < lengths[:, None]
        batches.append(Batch(rng.integers(20, size=(N, TOKENS)), y, mask, rng.random(N) * 2 if weighted else None))
    return batches


def draw(config, divergence, pooled, weighted):
    rng = np.random.default_rng(0)
    theta = init_parameters(rng, vocabulary=20, d=D, hidden=7, outputs=CLASSES)
    batches = make_batches(rng, divergence, pooled, weighted)
    outputs_shape = (N, CLASSES) if pooled else (N, TOKENS, CLASSES)
    noise = rng.normal(size=(STEPS, *((N, TOKENS, D) if config.start == "gaussian" else outputs_shape)))
    return theta, batches, noise


def compare(
    config, divergence="symmetric_kl", pooled=True, optimizer="adam_keras", weighted=False, mode="graph", given=None
):
    theta, batches, noise = given or draw(config, divergence, pooled, weighted)
    want = fit_reference(
        theta, batches, config, noise, divergence=divergence, optimizer=optimizer, learning_rate=0.01, pooled=pooled
    )

    model = Network(theta, divergence, pooled)
    names = ("E", "W1", "b1", "W2", "b2")
    # what is created in the first step makes TensorFlow trace it twice
    gradients = [tf.Variable(tf.zeros_like(weight)) for weight in model.trainable_variables]
    base = keras.optimizers.SGD if optimizer == "sgd" else Adam

    class Optimizer(base):
        def apply(self, grads, trainable_variables=None):
            # dense: of a token that comes twice, Keras 3.15's Adam adds the squares of the two slices of the gradient
            grads = [tf.convert_to_tensor(g) for g in grads]
            for gradient, g in zip(gradients, grads, strict=True):
                gradient.assign(g)
            return super().apply(grads, trainable_variables)

    options = {"epsilon": 1e-8} if base is Adam else {}
    model.compile(Optimizer(0.01, **options), jit_compile=mode == "xla")
    model.optimizer.build(model.trainable_variables)
    draws = tf.constant(noise[:: config.smoothness_steps])
    seen = []
    given = {"outputs": KINDS[divergence], "noise": lambda step, like: tf.gather(draws, step)}
    given |= {} if mode == "xla" else {"on_step": seen.append}
    with attach(model, config, **given) as smart:
        for t, (batch, step) in enumerate(zip(batches, want, strict=True)):
            logs = model.train_on_batch(
                {"ids": batch.ids, "padding_mask": batch.mask},
                batch.y,
                sample_weight=batch.sample_weight,
                return_dict=True,
            )
            if t == 0 and mode == "graph" and config.lambda_s > 0:
                assert np.abs(step.delta).max() > 0
            got = {"objective": logs["loss"]}
            expected = {"objective": step.objective}
            if config.lambda_s > 0:
                got["R_s"], expected["R_s"] = logs["smoothness"], step.R_s
            if step.delta is not None and mode != "xla":
                got |= {"delta": seen[-1].delta[0], "outputs": seen[-1].outputs[0]}
                expected |= {"delta": step.delta, "outputs": step.outputs}
            if config.mu > 0:
                got["D_Breg"], expected["D_Breg"] = logs["proximal"], step.D_Breg
            for i, name in enumerate(names):
                got[name], expected[name] = model.weights[i].numpy(), step.theta[name]
                got[f"gradient {name}"], expected[f"gradient {name}"] = gradients[i].numpy(), step.gradients[name]
                if config.mu > 0:
                    got[f"{name}~"], expected[f"{name}~"] = smart.averages[i].numpy(), step.teacher[name]
            for name, value in expected.items():
                atol = 1e-9 * np.abs(value).max() + 1e-15
                np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=atol, err_msg=f"{name} at step {t + 1}")
        assert smart.metrics["step"] == STEPS
    return want


SCHEDULE = {"total_steps": STEPS, "beta_early": 0.5, "beta_late": 0.9, "early_fraction": 0.3}


@pytest.mark.parametrize("row", pairwise(*FACTORS.values()), ids=named)
def test_fifty_steps_equal_the_reference(row):
    changes = dict(zip(FACTORS, row, strict=True))
    options = {name: changes.pop(name) for name in ("divergence", "pooled", "weighted")}
    options["optimizer"] = {"sgd": "sgd", "adam": "adam_keras"}[changes.pop("optimizer")]
    changes |= {"beta_early": min(0.9, changes["beta_late"]), "epsilon": 0.2, "sigma": 0.2, "eta": 0.15}
    config = papers(**{**SCHEDULE, **changes, "lambda_s": 2, "mu": 3})
    want = compare(config, **options)
    assert want[-1].D_Breg > 0


CASES = {
    "VBPP": ({"proximal_steps": 3, "beta_early": 0.0, "beta_late": 0.0}, {}),
    "released code": ({"projection": "rescale", "scale": "absolute", "epsilon": 1e-3, "sigma": 0.1}, {}),
    "R_s alone": ({"mu": 0.0}, {}),
    "R_s every 3rd step": ({"smoothness_steps": 3}, {}),
    "R_s alone, every 2nd step": ({"smoothness_steps": 2, "mu": 0.0, "start": "margin", "ascent_steps": 0}, {}),
    "D_Breg alone": ({"lambda_s": 0.0, "mu": 2.0, "proximal_steps": 3}, {"pooled": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_other_settings(name):
    changes, options = CASES[name]
    want = compare(papers(**{**SCHEDULE, "epsilon": 0.2, "sigma": 0.2, **changes}), **options)
    assert {step.beta for step in want if step.beta is not None} >= {changes.get("beta_late", 0.9)}


class Dropout(keras.layers.Layer):
    """Dropout that writes down the multipliers of each pass."""

    def __init__(self):
        super().__init__()
        self.seeds, self.notes = keras.random.SeedGenerator(2), Notes()

    def call(self, h, training=False):
        if not training:
            return h
        mask = tf.cast(keras.random.uniform(tf.shape(h), seed=self.seeds) < 0.75, h.dtype) / 0.75
        self.notes.add(mask)
        return mask * h


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_dropout_equals_the_reference_with_the_masks_that_were_drawn(start, dropout):
    steps, ascent_steps = 6, 2 if start == "margin" else 1
    config = papers(start=start, ascent_steps=ascent_steps, dropout=dropout, epsilon=0.2, sigma=0.2, eta=0.15)
    config = config.replace(lambda_s=2, mu=3, beta_early=0.5, beta_late=0.5)
    theta, batches, noise = draw(config, "symmetric_kl", pooled=True, weighted=True)
    layer, seen, weights, averages = Dropout(), [], [], []
    model = Network(theta, "symmetric_kl", pooled=True, dropout=layer)
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    given = {"outputs": "logits", "noise": lambda step, like: tf.gather(tf.constant(noise), step)}
    with attach(model, config, **given, on_step=seen.append) as smart:
        for ids, y, mask, weight in batches[:steps]:
            model.train_on_batch({"ids": ids, "padding_mask": mask}, y, weight)
            weights.append([weight.numpy() for weight in model.trainable_variables])
            averages.append([average.numpy() for average in smart.averages])
    masks = []
    for clean, *ascent, last, taught in np.array(layer.notes.taken()).reshape(steps, ascent_steps + 3, N, TOKENS, -1):
        np.testing.assert_array_equal(taught, clean)
        masks.append(np.array([clean, *ascent, last]))
    options = {"optimizer": "sgd", "learning_rate": 0.01, "dropout": masks}
    for t, want in enumerate(fit_reference(theta, batches[:steps], config, noise, **options)):
        got = seen[t].delta + seen[t].outputs + seen[t].perturbed + weights[t] + averages[t]
        got += [seen[t].metrics["R_s"], seen[t].metrics["D_Breg"]]
        named = [values[name] for values in (want.theta, want.teacher) for name in ("E", "W1", "b1", "W2", "b2")]
        expected = [want.delta, want.outputs, want.perturbed_outputs, *named, want.R_s, want.D_Breg]
        for value, right in zip(got, expected, strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-9, atol=1e-9 * np.abs(right).max() + 1e-15)


def test_xla_is_alike():
    compare(papers(**SCHEDULE, epsilon=0.2, norm="2", eta=0.1, ascent_steps=1), mode="xla", weighted=True)


@pytest.mark.parametrize("name", ["l1", "l2, token", "margin, regression"])  # the others have Adam as PyTorch has it
def test_the_trajectories_of_the_check(name):
    """The weights and the noise that the other backends get, from one file."""
    theta, batches, config, noise, options = load_trajectory(name)
    compare(config, **options, given=(theta, batches, np.array(noise)))
