"""Run by test_tf_mirrored.py in a process of its own: one device, then a MirroredStrategy of two, the same batches."""

import os
import sys
import warnings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg_tf import SMARTCallback, SMARTWarning
from smartreg_tf.step import own_key

RNG = np.random.default_rng(0)
IDS, Y = RNG.integers(20, size=(16, 5)), RNG.integers(3, size=16)
NOISE, WEIGHTS = RNG.normal(size=(16, 5, 4)), RNG.uniform(0.5, 2.0, size=16)


def run(strategy, start, path, policy, reduction, **settings):
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input([5], dtype="int32"),
                layers.Embedding(20, 4),
                layers.Flatten(),
                layers.BatchNormalization(synchronized=True),
                layers.Dense(3),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        eager = strategy.num_replicas_in_sync == 1  # and no XLA: for the time they take
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False, run_eagerly=eager)

    def noise(step, like):
        """The example's own noise, whichever replica has it."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        n = 8 // strategy.num_replicas_in_sync
        first = 8 * (step % 2) + tf.cast(replica * n, tf.int64)
        return tf.gather(tf.constant(NOISE), first + tf.range(n, dtype=tf.int64))

    config = papers(epsilon=0.3, sigma=0.3, beta_early=0.5, proximal_steps=2, start=start)
    callback = SMARTCallback(config, noise=noise, **settings)
    saves = keras.callbacks.ModelCheckpoint(path + "{epoch}.weights.h5", save_weights_only=True)
    history = model.fit(
        IDS,
        Y,
        sample_weight=WEIGHTS,
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[callback, saves],
    ).history
    averages = [tf.convert_to_tensor(average.value).numpy() for average in callback.engine.averages]
    with np.load(path + "3.weights.h5.smart.npz") as saved:
        for i, average in enumerate(averages):
            np.testing.assert_array_equal(saved[f"average/{i}"], average)
    with callback.swap_teacher():
        np.testing.assert_array_equal(tf.convert_to_tensor(model.trainable_variables[0].value), averages[0])
    assert callback.metrics["step"] == 6
    return history, [tf.convert_to_tensor(v.value).numpy() for v in model.weights], averages


tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
# one for all: a second strategy would meet the first one's collectives
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
mean = "sum_over_batch_size"
for policy, start, reduction in (("float64", "margin", "sum"), ("mixed_bfloat16", "gaussian", mean)):
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    one = run(tf.distribute.get_strategy(), start, f"{sys.argv[1]}/one", policy, reduction)
    two = run(mirrored, start, f"{sys.argv[1]}/two", policy, reduction)
    # in bfloat16 the clean pass rounds to 8 bits, of each replica's examples apart
    ulp = 2.0**-8 if policy == "mixed_bfloat16" else 1e-13
    assert one[0].keys() == two[0].keys() == {"loss", "smoothness", "proximal"}
    for name in one[0]:
        # the metrics' sums are kept in float32 by Keras
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=max(ulp, 1e-5), err_msg=name)
        assert min(one[0][name][1:]) > 1e-6, name
    largest = max(np.abs(value).max() for value in one[1])
    for got, want in zip(two[1] + two[2], one[1] + one[2], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=ulp * largest)

# dropout masks of their own: each replica's, so that with sigma = 0 R_s is theirs alone
keys = mirrored.experimental_local_results(mirrored.run(own_key, (-1, tf.constant(0, tf.int64), 0)))
assert np.any(keys[0] != keys[1])
keras.config.set_dtype_policy("float32")
for dropout in ("independent", "shared"):
    with mirrored.scope():
        upper = [layers.Embedding(20, 4), layers.Flatten(), layers.Dropout(0.25), layers.Dense(3)]
        model = keras.Sequential([keras.Input([5], dtype="int32"), *upper])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if dropout == "shared" else "error", SMARTWarning)
        config = papers(sigma=0, ascent_steps=0, mu=0, dropout=dropout)
        found = model.fit(IDS, Y, batch_size=8, verbose=0, callbacks=[SMARTCallback(config)]).history["smoothness"][0]
    assert found > 1e-6 if dropout == "independent" else found < 1e-12, (dropout, found)
try:
    run(mirrored, "gaussian", f"{sys.argv[1]}/none", "float32", mean, record=f"{sys.argv[1]}/run.npz")
except ValueError as error:
    print("equal, and", error)
