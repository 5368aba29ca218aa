"""Every kind of Keras model and of `fit`: same dropout masks, nothing else changed, nothing left behind."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg_tf import SMARTCallback, attach

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
N, TOKENS, CLASSES = 12, 5, 3
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 20, size=(N, TOKENS))
IDS[::3, 3:] = 0
Y = RNG.integers(CLASSES, size=N)
IMAGES = RNG.normal(size=(N, 6, 6, 2)).astype(np.float32)
SETTINGS = {"epsilon": 0.3, "sigma": 0.3, "beta_early": 0.9}


def data(*arrays, batch=4):
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch, drop_remainder=True)


def sequential(built=True, dropout=0.4):
    inner = [layers.Embedding(20, 4), layers.Dropout(dropout), layers.GlobalAveragePooling1D(), layers.Dense(CLASSES)]
    return keras.Sequential(([keras.Input([TOKENS], dtype="int32")] if built else []) + inner)


def functional():
    ids = keras.Input([TOKENS], dtype="int32")
    x = layers.Embedding(20, 4)(ids) + layers.Embedding(TOKENS, 4, name="position_embedding")(keras.ops.arange(TOKENS))
    x = layers.MultiHeadAttention(2, 2, dropout=0.3)(x, x)
    return keras.Model(ids, layers.Dense(CLASSES)(layers.Flatten()(x)))


def nested():
    ids = keras.Input([TOKENS], dtype="int32")
    body = keras.Model(ids, layers.Dropout(0.4)(layers.Embedding(20, 4)(ids)))
    return keras.Sequential([body, layers.Flatten(), layers.Dense(CLASSES)])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.head = layers.Embedding(20, 4), layers.Dropout(0.4), layers.Dense(CLASSES)

    def call(self, inputs, training=False):
        ids = inputs["ids"] if isinstance(inputs, dict) else inputs
        x = self.drop(self.embedding(ids), training=training)
        return self.head(keras.ops.mean(x, 1))


def dict_inputs():
    ids, mask = keras.Input([TOKENS], dtype="int32", name="ids"), keras.Input([TOKENS], name="padding_mask")
    x = layers.Dropout(0.4)(layers.Embedding(20, 4)(ids)) * mask[..., None]
    return keras.Model({"ids": ids, "padding_mask": mask}, layers.Dense(CLASSES)(keras.ops.sum(x, 1)))


def two_outputs(kind):
    ids = keras.Input([TOKENS], dtype="int32")
    x = layers.Dropout(0.4)(layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(ids)))
    heads = {
        "label": layers.Dense(CLASSES, name="label", activation="softmax")(x),
        "size": layers.Dense(1, name="size")(x),
    }
    return keras.Model(ids, heads if kind is dict else list(heads.values()))


class Tied(keras.Model):
    """A language model whose head is its embedding, read in reverse (keras_hub's ReversibleEmbedding)."""

    def __init__(self):
        super().__init__()
        self.token_embedding = layers.ReversibleEmbedding(20, 4)
        self.drop = layers.Dropout(0.4)

    def call(self, ids, training=False):
        return self.token_embedding(self.drop(self.token_embedding(ids), training=training), reverse=True)


def siamese():
    first, second = keras.Input([TOKENS], dtype="int32"), keras.Input([TOKENS], dtype="int32")
    embedding, drop = layers.Embedding(20, 4), layers.Dropout(0.4)
    x = [keras.ops.mean(drop(embedding(ids)), 1) for ids in (first, second)]
    return keras.Model([first, second], layers.Dense(CLASSES)(keras.ops.abs(x[0] - x[1])))


def convolutional():
    return keras.Sequential(
        [
            keras.Input([6, 6, 2]),
            layers.Conv2D(3, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.4),
            layers.Flatten(),
            layers.Dense(CLASSES, activity_regularizer=keras.regularizers.L2(0.1)),
        ]
    )


def recurrent():
    return keras.Sequential(
        [
            keras.Input([TOKENS], dtype="int32"),
            layers.Embedding(20, 4, mask_zero=True),
            layers.LSTM(4, dropout=0.3, recurrent_dropout=0.2),
            layers.Dense(CLASSES),
        ]
    )


def lora():
    model = functional()
    for layer in model.layers:
        if isinstance(layer, (layers.Embedding, layers.Dense)):
            layer.enable_lora(2)
    return model


def hub(preprocessed):
    import keras_hub as hub

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "good", "bad"]
    backbone = hub.models.BertBackbone(
        vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=8, max_sequence_length=TOKENS
    )
    preprocessor = None
    if preprocessed:
        tokenizer = hub.tokenizers.BertTokenizer(vocabulary=words)
        preprocessor = hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=TOKENS)
    return hub.models.BertTextClassifier(backbone, num_classes=CLASSES, preprocessor=preprocessor, dropout=0.3)


PADDED = {"token_ids": IDS, "segment_ids": np.zeros_like(IDS), "padding_mask": (IDS != 0).astype(np.int32)}
SENTENCES = np.array(["the film is good", "bad film", "good", "the film is bad"] * 3)
TWO = {"label": "sparse_categorical_crossentropy", "size": "mse"}
MATRIX = {
    "Sequential": (sequential, data(IDS, Y), CE),
    "Sequential, unbuilt": (lambda: sequential(built=False), data(IDS, Y), CE),
    "functional": (functional, data(IDS, Y), CE),
    "nested": (nested, data(IDS, Y), CE),
    "subclassed, unbuilt": (Subclassed, data(IDS, Y), CE),
    "dict inputs": (dict_inputs, data({"ids": IDS, "padding_mask": (IDS != 0).astype(np.float32)}, Y), CE),
    "dict outputs": (lambda: two_outputs(dict), data(IDS, {"label": Y, "size": Y.astype(np.float32)}), TWO),
    "list outputs": (lambda: two_outputs(list), data(IDS, (Y, Y.astype(np.float32))), list(TWO.values())),
    "tied embeddings": (Tied, data(IDS, IDS), CE),
    "siamese": (siamese, data((IDS, IDS[::-1]), Y), CE),
    "convolutional, BatchNorm": (convolutional, data(IMAGES, Y), CE),
    "LSTM, mask_zero": (recurrent, data(IDS, Y), CE),
    "LoRA": (lora, data(IDS, Y), CE),
    "keras_hub BERT": (lambda: hub(False), data(PADDED, Y), CE),
    "keras_hub BERT, strings": (lambda: hub(True), data(SENTENCES, Y), CE),
}


IN_A_GRAPH = {"functional", "convolutional, BatchNorm", "LSTM, mask_zero", "keras_hub BERT, strings"}  # for the time


def compiled(build, loss, rate=0.0, **options):
    keras.utils.set_random_seed(1)
    model = build()
    if model.built and any(isinstance(layer, layers.LSTM) for layer in model.layers):
        model.layers[0].set_weights([np.random.default_rng(0).normal(size=(20, 4))])
    weights = {"loss_weights": [0.5, 2.0]} if isinstance(loss, list) else {}
    model.compile(keras.optimizers.SGD(rate), loss, **weights, **options)
    return model


def state(model):
    """Everything that may be left behind: every attribute of the model and its layers, hooks among them, and of the
    optimiser; variables, seeds and metrics.
    """
    found = {"losses": len(model.losses)}  # another trace's are other tensors
    for place, owner in enumerate([*model._flatten_layers(), model.optimizer]):
        found |= {f"{place} {owner.name}.{name}": value for name, value in vars(owner).items()}
    for kind in ("variables", "metrics"):
        found |= {f"{kind} {place}": value for place, value in enumerate(getattr(model, kind))}
    return found


def changed(before, model, but=("history",)):
    """What is not the same object as before; every fit leaves another history."""
    after = state(model)
    none = object()
    return sorted(
        name
        for name in {*before, *after}
        if before.get(name, none) is not after.get(name, none) and name.split(".")[-1] not in but
    )


@pytest.mark.parametrize("name", [name for name in MATRIX if name != "keras_hub BERT"])  # with strings it is that
def test_same_masks_in_every_pass_and_nothing_left(name):
    """At lr = 0 and delta = 0 the perturbed and the teacher's pass are the clean one, dropout and all, bit for bit."""
    build, batches, loss = MATRIX[name]
    plain = compiled(build, loss, run_eagerly=True)
    plain_loss = plain.fit(batches, verbose=0, shuffle=False).history["loss"]
    model = compiled(build, loss, run_eagerly=True)  # in a graph, TensorFlow fuses the passes differently: an ulp
    silent = SMARTCallback(papers(**SETTINGS, ascent_steps=0), noise=lambda step, like: tf.zeros_like(like))
    history = model.fit(batches, verbose=0, shuffle=False, callbacks=[silent]).history
    # exactly, but where TensorFlow splits a transformer's sums over its threads now one way, now another: an ulp
    ulps = 1e-16 if "BERT" in name else 0
    assert 0 <= history["proximal"][0] <= ulps
    assert 0 <= history["smoothness"][0] <= ulps
    np.testing.assert_allclose(history["loss"], plain_loss, rtol=1e10 * ulps)  # the dropout masks, model.losses and all
    for got, want in zip(model.variables, plain.variables, strict=True):
        assert got.path.split("/")[-1] == want.path.split("/")[-1]
        np.testing.assert_array_equal(got.numpy(), want.numpy())  # BatchNorm's statistics and the seeds among them

    plain.run_eagerly = name not in IN_A_GRAPH
    before = state(plain)
    callback = SMARTCallback(papers(**SETTINGS, eta=0.3))
    history = plain.fit(batches, verbose=0, shuffle=False, callbacks=[callback]).history
    assert changed(before, plain) == []
    assert set(history) >= {"loss", "smoothness", "proximal"}
    assert history["proximal"][0] < 1e-13 < 1e-9 < history["smoothness"][0]
    assert callback.metrics["max_delta"] > 0
    assert callback.metrics["step"] == len(batches)
    assert len(callback.engine.averages) == len(model.trainable_variables)


def test_each_run_of_the_site_has_its_own_delta():
    keras.utils.set_random_seed(1)
    pair = [keras.Input([TOKENS], dtype="int32") for _ in range(2)]
    embedding, head = layers.Embedding(20, 4), layers.Dense(CLASSES)
    first, second = (embedding(ids) for ids in pair)
    model = keras.Model(pair, head(keras.ops.mean(first - 2 * second, 1)))
    model.compile("sgd", CE, run_eagerly=True)
    weights, bias = (weight.numpy() for weight in head.weights)
    seen = []
    config = papers(mu=0, ascent_steps=0, scale="absolute", sigma=1.0, epsilon=9.0)
    with attach(model, config, on_step=seen.append):
        model.train_on_batch([IDS, IDS[::-1]], Y)
    moved = [x + delta for x, delta in zip(seen[0].x, seen[0].delta, strict=True)]
    assert np.abs(seen[0].delta[0] - seen[0].delta[1]).max() > 1
    assert seen[0].metrics["max_delta"] == max(np.abs(delta).max() for delta in seen[0].delta)
    want = (moved[0] - 2 * moved[1]).mean(1) @ weights + bias
    np.testing.assert_allclose(seen[0].perturbed[0], want, rtol=1e-4, atol=1e-5)


def test_padding_is_not_perturbed():
    seen = []
    for name in ("LSTM, mask_zero", "dict inputs", "keras_hub BERT"):
        build, batches, loss = MATRIX[name]
        model = compiled(build, loss, run_eagerly=True)
        inputs, y = next(iter(batches))
        ids = inputs if not isinstance(inputs, dict) else inputs.get("ids", inputs.get("token_ids"))
        with attach(model, papers(**SETTINGS, total_steps=9), on_step=seen.append):
            model.train_on_batch(inputs, y)
        delta = seen[-1].delta[0]
        assert (delta[ids.numpy() == 0] == 0).all(), name
        assert (np.abs(delta[ids.numpy() != 0]).max(-1) > 0).all(), name


@pytest.mark.parametrize(
    "options",
    [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}],
    ids=["graph", "eager", "xla", "steps_per_execution"],
)
def test_switched_off_it_is_plain_fit_bit_for_bit(options):
    def run(callbacks):
        model = compiled(sequential, CE, 0.1, **options)
        history = model.fit(IDS, Y, batch_size=4, epochs=2, verbose=0, callbacks=callbacks).history
        return history, model.get_weights()

    history, weights = run([])
    off, off_weights = run([SMARTCallback(papers(lambda_s=0, mu=0))])
    assert off == history
    for got, want in zip(off_weights, weights, strict=True):
        np.testing.assert_array_equal(got, want)
    if "run_eagerly" in options:
        on, on_weights = run([SMARTCallback(papers(**SETTINGS))])
        assert set(on) == {"loss", "smoothness", "proximal"}
        assert all(np.abs(other - want).max() > 0 for other, want in zip(on_weights, weights, strict=True))


def fitted(callback_config=None, *, fit=None, optimizer=None, **options):
    keras.utils.set_random_seed(1)
    model = sequential(dropout=0.0)  # XLA draws other dropout masks
    model.compile(optimizer or keras.optimizers.SGD(0.1), CE, **options)
    draws = np.random.default_rng(5).normal(size=(4, TOKENS, 4)).astype(np.float32)
    callback = SMARTCallback(
        papers(**SETTINGS, **(callback_config or {})),
        noise=lambda step, like: draws * (1 + tf.cast(step, tf.float32)),
    )
    history = model.fit(
        IDS, Y, **{"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0, "callbacks": [callback], **(fit or {})}
    )
    return model, callback, history.history


def test_eager_graph_xla_and_steps_per_execution_agree():
    model, callback, history = fitted()
    for options in ({"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2}):
        other, other_callback, other_history = fitted(**options)
        for got, want in zip(other.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(got, want, atol=20 * 2**-23 * np.abs(want).max())
        for got, want in zip(other_callback.engine.averages, callback.engine.averages, strict=True):
            np.testing.assert_allclose(got, want, atol=20 * 2**-23 * np.abs(want).max())
        assert other_history.keys() == history.keys()
        # R_s is about 1e-2 and its rounding that of the logits' differences
        np.testing.assert_allclose(other_history["smoothness"], history["smoothness"], rtol=1e-4)


def test_val_loss_is_plain_and_loss_has_the_penalty():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input([TOKENS], dtype="int32"), layers.Embedding(20, 4), layers.Flatten(), layers.Dense(3)]
    )
    model.compile(keras.optimizers.SGD(0.0), CE)
    callback = SMARTCallback(papers(**SETTINGS, lambda_s=3.0))
    history = model.fit(IDS, Y, validation_data=(IDS, Y), verbose=0, batch_size=4, callbacks=[callback]).history
    assert set(history) == {"loss", "smoothness", "proximal", "val_loss"}
    plain = model.evaluate(IDS, Y, verbose=0)
    assert history["val_loss"][0] == pytest.approx(plain, rel=1e-6)
    assert history["loss"][0] == pytest.approx(plain + 3 * history["smoothness"][0], rel=1e-6)
    assert history["smoothness"][0] > 1e-4


def test_sample_and_class_weights_weigh_the_penalty():
    weights = np.where(Y == 0, 0.0, 2.0).astype(np.float32)
    by_sample, _, history = fitted(fit={"sample_weight": weights}, run_eagerly=True)
    by_class, _, class_history = fitted(fit={"class_weight": {0: 0.0, 1: 2.0, 2: 2.0}}, run_eagerly=True)
    _, _, plain_history = fitted(run_eagerly=True)
    assert class_history == history
    assert history["smoothness"] != plain_history["smoothness"]
    _, _, none = fitted(fit={"sample_weight": np.zeros(N, np.float32)}, run_eagerly=True)
    assert none["smoothness"] == [0.0, 0.0]
    for got, want in zip(by_class.get_weights(), by_sample.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_gradient_accumulation_moves_theta_once_a_step():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    _, callback, _ = fitted({"beta_late": 0.5}, optimizer=optimizer)
    assert callback.metrics["step"] == 2  # 6 batches
    assert callback.engine.config.total_steps == 2


class OwnStep(keras.Model):
    """A training step and a loss of the user's own."""

    def __init__(self, asks=True):
        super().__init__()
        self.asks = asks
        self.embedding, self.head = layers.Embedding(20, 4), layers.Dense(CLASSES)

    def call(self, ids):
        return self.head(keras.ops.mean(self.embedding(ids), 1))

    def compute_loss(self, x, y, y_pred, sample_weight=None):
        return 2 * keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True))

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            other = self(x[:, ::-1])  # a second call, whose penalty nobody asked for
            y_pred = self(x)
            loss = self.compute_loss(x, y, y_pred) if self.asks else keras.ops.mean(y_pred)
            loss = loss + 0.0 * keras.ops.sum(other)
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        )
        return {"own": loss}


def test_a_train_step_and_a_loss_of_the_users_own():
    model = compiled(OwnStep, None, 0.0)
    callback = SMARTCallback(papers(**SETTINGS), outputs="logits")
    history = model.fit(IDS, Y, batch_size=N, verbose=0, callbacks=[callback]).history
    assert set(history) == {"own", "smoothness", "proximal"}
    plain = float(model.compute_loss(IDS, Y, model(IDS)))
    assert history["own"][0] == pytest.approx(plain + history["smoothness"][0], rel=1e-5)
    assert history["smoothness"][0] > 1e-5


class ReadsLosses(keras.Model):
    """Adds model.losses itself, after compute_loss."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(20, 4, activity_regularizer=keras.regularizers.L2(0.1))
        self.head = layers.Dense(CLASSES)

    def call(self, ids):
        return self.head(keras.ops.mean(self.embedding(ids), 1))

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"regularised": sum(self.losses)}


def test_model_losses_are_those_of_the_clean_pass():
    plain = compiled(ReadsLosses, CE).fit(IDS, Y, batch_size=N, verbose=0).history
    smart = compiled(ReadsLosses, CE).fit(
        IDS, Y, batch_size=N, verbose=0, callbacks=[SMARTCallback(papers(**SETTINGS))]
    )
    assert plain["regularised"][0] > 0
    assert smart.history["regularised"] == pytest.approx(plain["regularised"], rel=1e-6)


def test_early_stopping_and_a_second_fit():
    keras.utils.set_random_seed(1)
    model = compiled(sequential, CE, 0.1)
    callback = SMARTCallback(papers(**SETTINGS))
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=1e9, restore_best_weights=True)
    history = model.fit(IDS, Y, epochs=9, verbose=0, callbacks=[callback, stop]).history
    assert len(history["loss"]) == 2
    first = callback.engine
    model.fit(IDS, Y, epochs=2, verbose=0, callbacks=[callback])
    assert callback.engine is not first
    assert callback.metrics["step"] == 2
    plain = model.fit(IDS, Y, verbose=0).history
    assert set(plain) == {"loss"}


def test_early_stopping_restores_the_best_epochs_weights():
    """The third epoch climbs, and nothing that SMART undoes at the end of fit touches what was restored."""
    model = compiled(lambda: sequential(dropout=0.0), CE, 1.0)
    seen = []

    class Climbs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 1.0 if epoch < 3 else -3.0

        def on_epoch_end(self, epoch, logs=None):
            seen.append(self.model.get_weights())

    stop = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True)
    callbacks = [Climbs(), stop, SMARTCallback(papers(**SETTINGS))]
    losses = model.fit(IDS, Y, epochs=9, batch_size=4, verbose=0, callbacks=callbacks).history["loss"]
    best = int(np.argmin(losses))
    assert 0 < best == len(losses) - 3
    for got, want, last in zip(model.get_weights(), seen[best], seen[-1], strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.abs(last - want).max() > 1e-3


class Breaks(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyError("the user's own error")


class BreaksInside(keras.layers.Layer):
    broken = False

    def call(self, x):
        if self.broken:
            raise KeyError("the layer's own error")
        return x


def test_fit_after_an_exception_is_plain():
    model = compiled(sequential, CE)
    model.fit(IDS, Y, verbose=0)
    before = state(model)
    with pytest.raises(KeyError, match="own error"):
        model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(papers(**SETTINGS)), Breaks()])
    assert changed(before, model) == []
    history = model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(papers(**SETTINGS))]).history
    assert set(history) == {"loss", "smoothness", "proximal"}
    assert set(model.fit(IDS, Y, verbose=0).history) == {"loss"}
    assert changed(before, model) == []


def test_the_models_own_exception_leaves_it_as_it_was():
    fragile = BreaksInside()
    model = keras.Sequential([keras.Input([3]), fragile, layers.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    before = state(model)
    fragile.broken = True
    with pytest.raises(KeyError, match="own error"):
        model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[SMARTCallback(papers())])
    assert changed(before, model, but=("history", "broken")) == []
    fragile.broken = False
    assert set(model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0).history) == {"loss"}


@pytest.mark.parametrize("second", [{}, {"lambda_s": 0.0, "mu": 0.0}], ids=["both at work", "the second switched off"])
def test_two_callbacks_in_one_fit(second):
    model = compiled(sequential, CE, run_eagerly=True)  # in a graph: test_fit_after_an_exception_is_plain
    model.fit(IDS, Y, verbose=0)
    before = state(model)
    callbacks = [SMARTCallback(papers(**{**SETTINGS, **changes})) for changes in ({}, second)]
    if second:
        history = model.fit(IDS, Y, verbose=0, callbacks=callbacks).history
        assert set(history) == {"loss", "smoothness", "proximal"}
    else:
        with pytest.raises(ValueError, match="already has a SMARTCallback or attach"):
            model.fit(IDS, Y, verbose=0, callbacks=callbacks)
    assert changed(before, model) == []
    model.fit(IDS, Y, verbose=0, callbacks=callbacks[::-1][: 2 if second else 1])
    assert changed(before, model) == []


def test_a_second_callback_does_not_end_an_attach():
    model = compiled(sequential, CE, run_eagerly=True)
    model.fit(IDS, Y, verbose=0)
    before = state(model)
    with attach(model, papers(**SETTINGS, total_steps=9)) as smart:
        with pytest.raises(ValueError, match="already has a SMARTCallback or attach"):
            model.fit(IDS, Y, verbose=0, callbacks=[SMARTCallback(papers(**SETTINGS))])
        model.train_on_batch(IDS, Y)
        assert smart.metrics["step"] == 1
    assert changed(before, model) == []


def test_two_models_in_one_process_and_train_on_batch():
    first, second = compiled(sequential, CE, 0.1), compiled(convolutional, CE, 0.1)
    with (
        attach(first, papers(**SETTINGS, total_steps=9)) as one,
        attach(second, papers(**SETTINGS, total_steps=9)) as two,
    ):
        for _ in range(2):
            logs = first.train_on_batch(IDS, Y, return_dict=True)
            assert set(logs) == {"loss", "smoothness", "proximal"}
        second.train_on_batch(IMAGES, Y)
        assert set(first.test_on_batch(IDS, Y, return_dict=True)) == {"loss"}
    assert (one.metrics["step"], two.metrics["step"]) == (2, 1)
    assert set(first.train_on_batch(IDS, Y, return_dict=True)) == {"loss"}


def test_a_loop_of_ones_own():
    model, twin, config = (
        compiled(sequential, CE, 0.1),
        compiled(sequential, CE, 0.1),
        papers(**SETTINGS, total_steps=9),
    )
    twin.run_eagerly = True
    with attach(model, config) as smart, attach(twin, config) as of_keras:
        with smart.training_step():
            with tf.GradientTape() as tape:
                loss = model.compute_loss(IDS, Y, model(IDS, training=True))
            grads = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        twin.train_on_batch(IDS, Y)
        assert smart.metrics == of_keras.metrics
        assert smart.metrics["R_s"] > 0
        assert float(model.compute_loss(IDS, Y, model(IDS))) < float(loss)  # outside a step: plain


def test_the_averaged_weights_can_be_evaluated():
    model, callback, _ = fitted({"beta_late": 0.5})
    trained = model.get_weights()
    with callback.swap_teacher():
        for got, average in zip(model.get_weights(), callback.engine.averages, strict=True):
            np.testing.assert_array_equal(got, average.numpy())
        averaged = model.evaluate(IDS, Y, verbose=0)
    assert averaged != model.evaluate(IDS, Y, verbose=0)
    for got, want in zip(model.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(got, want)
