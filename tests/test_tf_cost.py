"""What a compiled step in Keras must not do: run a pass too many, go below the site twice, choose weight by weight."""

from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from paper_settings import papers

from smartreg_tf import attach

N, TOKENS, WORDS, WIDTH = 4, 5, 30, 8
IDS = tf.constant(np.random.default_rng(0).integers(WORDS, size=(N, TOKENS)), tf.int32)
LABELS = tf.constant(np.arange(N) % 2)
STARTS = {"gaussian": {"start": "gaussian", "ascent_steps": 1}, "margin": {"start": "margin", "ascent_steps": 0}}
PRODUCTS = {"MatMul", "BatchMatMulV2", "Einsum"}


def transformer(jit_compile=False):
    keras.utils.set_random_seed(0)
    ids = keras.Input([TOKENS], dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(ids)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x))
    x = layers.GlobalAveragePooling1D()(layers.Dropout(0.1)(layers.Dense(WIDTH, "gelu")(x)))
    model = keras.Model(ids, layers.Dense(2)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
    return model


def operations(function):
    """All operations, functions inside included, that what `function` returns or assigns depends on."""
    graph = tf.function(function, autograph=False).get_concrete_function().graph
    assigns = ("Assign", "ResourceScatter")
    found, waiting = set(), [tensor.op for tensor in graph.outputs]
    waiting += [op for op in graph.get_operations() if op.type.startswith(assigns)]
    while waiting:
        op = waiting.pop()
        if op not in found:
            found.add(op)
            waiting += [tensor.op for tensor in op.inputs]
    inside = [node.op for body in graph.as_graph_def().library.function for node in body.node_def]
    return found, Counter([op.type for op in found] + inside)


def products(function):
    return sum(count for name, count in operations(function)[1].items() if name in PRODUCTS)


def step(model, config=None):
    if config is None:
        return operations(lambda: model.train_step((IDS, LABELS)))
    with attach(model, config):
        return operations(lambda: model.train_step((IDS, LABELS)))


@pytest.fixture(scope="module")
def plain():
    return step(transformer())[1]


@pytest.fixture(scope="module", params=[("gaussian", 1), ("margin", 0)], ids=str)
def ours(request):
    start, mu = request.param
    return start, mu, *step(transformer(), papers(**STARTS[start], mu=mu, total_steps=10))


def test_a_step_has_the_passes_of_its_floor(plain, ours):
    """2 P + X of the margin start, F more of the paper's, F more of the teacher, or of the check; in products."""
    start, mu, _, counts = ours
    model = transformer()

    def down_to_x():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            x = tf.random.stateless_normal([N, TOKENS, WIDTH], [0, 0])
            tape.watch(x)
            z = above(x, training=True)
        return z, tape.gradient(z, x)

    above = keras.Model(model.layers[1].output, model.output)
    forward = products(lambda: model(IDS, training=True))
    back = products(down_to_x) - forward
    full = sum(plain[name] for name in PRODUCTS)
    assert 0 < back < full - forward
    check = forward * (mu == 0)  # in a branch that the first step alone takes
    expected = 2 * full + back + forward * ((start == "gaussian") + (mu > 0)) + check
    assert sum(counts[name] for name in PRODUCTS) == expected


def test_gradients_go_below_the_site_once(plain, ours):
    """The embedding is looked up once for the weights and, where there is a teacher, once for theta~."""
    _, mu, found, counts = ours
    assert counts["ResourceScatterSub"] == plain["ResourceScatterSub"] == 1
    (scatter,) = [op for op in found if op.type == "ResourceScatterSub"]
    assert scatter.inputs[1].shape.num_elements() in (None, N * TOKENS)
    table = [WORDS, WIDTH]
    lookups = [op for op in found if op.type in ("GatherV2", "ResourceGather") and op.inputs[0].shape == table]
    assert len(lookups) == 1 + (mu > 0)


def test_conditions_do_not_go_over_all_weights(ours):
    """One tf.where a gradient, which keeps a penalty that is not finite out, and none for theta~'s update."""
    found = ours[2]
    shapes = [tuple(weight.shape) for weight in transformer().trainable_variables if len(weight.shape) > 1]
    chosen = Counter(tuple(op.outputs[0].shape) for op in found if op.type == "SelectV2")
    for shape in set(shapes) - {(WORDS, WIDTH)}:
        assert chosen[shape] == shapes.count(shape)
    assert chosen[WORDS, WIDTH] == 0


@pytest.mark.parametrize(("start", "norm"), [("gaussian", "1"), ("gaussian", "2"), ("margin", "inf"), ("margin", "1")])
def test_xla_knows_every_size(start, norm):
    """With one that it does not know it copies the step's functions, random bits included: three times the work."""
    model = transformer(jit_compile=True)
    with attach(model, papers(**STARTS[start], norm=norm, mu=1.0, total_steps=10)):
        function = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
        program = function.experimental_get_compiler_ir(IDS, LABELS)(stage="hlo")
    assert "rng-bit-generator(" in program  # dropout's
    assert "set-dimension-size(" not in program
