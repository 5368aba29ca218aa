"""Whether the private names of the frameworks still are what they were. All of them are in the compat.py of a backend.

A failure says which name broke, in which releases it was seen, what it is for, and what happens without it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import socket
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow"}
ROOT = Path(__file__).parent.parent
BACKENDS = [
    name
    for name in os.environ.get("SMARTREG_BACKENDS", "torch tf").split()
    if importlib.util.find_spec(FRAMEWORKS[name]) and (ROOT / f"smartreg_{name}/compat.py").exists()
]
TRIALS = {}  # by backend and the name of a function in compat.py


def trial(backend, *functions):
    """Register what tries these functions of a backend's compat.py, and so the names behind them."""

    def register(tries):
        TRIALS.update({(backend, function): tries for function in functions})
        return tries

    return register


def said(function):
    """What the docstring of a function says: its private names, where they were seen, what for, and what without."""
    lines = inspect.getdoc(function) or ""
    parts = {part: re.search(rf"^{part}: (.+(?:\n    .+)*)", lines, re.MULTILINE) for part in PARTS}
    found = {part: found and " ".join(found[1].split()) for part, found in parts.items()}
    return found | {"Seen": found["Seen"] or inspect.unwrap(function).__globals__["SEEN"]}


PARTS = ("Private", "Seen", "For", "Without")


def functions(backend):
    module = importlib.import_module(f"smartreg_{backend}.compat")
    return [
        function
        for name, function in inspect.getmembers(module, lambda value: inspect.isfunction(inspect.unwrap(value)))
        if not name.startswith("_") and function.__module__ == module.__name__
    ]


@pytest.mark.parametrize(
    ("backend_name", "function"),
    [
        pytest.param(backend, function, id=f"{backend}-{function.__name__}")
        for backend in BACKENDS
        for function in functions(backend)
    ],
)
def test_a_private_name(backend_name, function):
    about = said(function)
    assert None not in about.values(), f"the docstring of compat.{function.__name__} does not say {about}"
    try:
        TRIALS[backend_name, function.__name__]()
    except Exception as error:
        pytest.fail(
            f"{about['Private']} is not what it was ({type(error).__name__}: {error}). Seen: {about['Seen']}. "
            f"For: {about['For']}. Without: {about['Without']}",
            pytrace=False,
        )


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_private_names_are_used_in_compat_alone(backend_name):
    files = (ROOT / f"smartreg_{backend_name}").glob("*.py")
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    behind_compat = private_names(trees.pop("compat.py"))
    ours = {name for tree in trees.values() for name in defined(tree)} - NAMES_OF_BOTH
    overridden = set(getattr(importlib.import_module(f"smartreg_{backend_name}.compat"), "TRAINER", ()))
    used = {(file, name) for file, tree in trees.items() for name in private_names(tree) if name not in ours}
    used = {(file, name) for file, name in used if not (file == "transformers.py" and name in overridden)}
    assert not used, "private names of a framework outside of compat.py"
    assert behind_compat


# what a class of ours and a framework both have; of ours only self has one
NAMES_OF_BOTH = {"_modules", "_parameters", "_buffers"}


def private_names(tree):
    """Names of attributes, imports and strings that begin with one underscore, but for those of self and cls."""
    old = {
        id(node) for part in ast.walk(tree) if getattr(part, "name", "") == "__setstate__" for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in old:  # what a state of before has for names
            continue
        if isinstance(node, ast.Attribute):
            if not of_self(node):
                yield from filter(private, [node.attr])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"[a-z_][\w.]+[a-z]", node.value) and node.value not in sys.stdlib_module_names:
                yield from filter(private, node.value.split("."))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from filter(private, ".".join(names).split("."))


def defined(tree):
    """The private names that a module gives to functions, classes, variables and attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            yield node.attr


def of_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private(name):
    named_tuple, ours = ("_fields", "_replace", "_asdict", "_make"), "_smartreg"
    return name == "src" or (re.fullmatch(r"_[a-z]\w*", name) and name not in named_tuple and not name.startswith(ours))


# PyTorch


@trial("torch", "own_parameters", "own_buffers")
def other_tensors_can_be_put_in():
    import torch

    from smartreg_torch import compat

    norm = torch.nn.BatchNorm1d(2).eval()
    compat.own_parameters(norm)["weight"] = torch.full((2,), 3.0)  # no Parameter
    compat.own_buffers(norm)["running_mean"] = torch.full((2,), 1.0)
    norm.eps = 0.0
    assert norm(torch.full((1, 2), 2.0)).tolist() == [[3.0, 3.0]]
    assert set(compat.own_parameters(norm)) == {"weight", "bias"}
    assert set(compat.own_buffers(norm)) == {"running_mean", "running_var", "num_batches_tracked"}


@trial("torch", "held")
def modules_and_parameters_inside_are_listed():
    import torch

    from smartreg_torch import compat

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0] = new = torch.nn.Linear(2, 3)
    assert compat.held([model, new]) == [{"0": new}, {}, {}, {"weight": new.weight, "bias": new.bias}]


@trial("torch", "forward_hooks")
def hooks_are_listed():
    import torch

    from smartreg_torch import compat

    module, hooks = torch.nn.Linear(1, 1), (lambda *_: None, lambda *_: None)
    module.register_forward_hook(hooks[1])
    module.register_forward_pre_hook(hooks[0])
    assert compat.forward_hooks(module) == hooks


@trial("torch", "version")
def writing_counts():
    import torch

    from smartreg_torch import compat

    tensor = torch.zeros(2)
    before = compat.version(tensor)
    tensor[0] = 1
    assert compat.version(tensor) == before + 1


@trial("torch", "numpy_words")
def drawing_from_numpys_global_stream_moves_its_words():
    from smartreg_torch import compat

    own = np.random.get_state(legacy=False)
    try:
        np.random.seed(0)
        np.random.rand()  # makes new words
        state, words = np.random.get_state(legacy=False)["state"], compat.numpy_words()
        assert words == state["key"].tobytes() + np.int32(state["pos"]).tobytes()
        np.random.rand()  # moves the position alone
        assert compat.numpy_words()[:-4] == words[:-4]
        assert compat.numpy_words() != words
    finally:
        np.random.set_state(own)


@trial("torch", "has_gradient_hooks", "has_accumulation_hooks")
def hooks_of_a_weight_are_seen():
    import torch

    from smartreg_torch import compat

    plain, seen, followed = (torch.zeros(1, requires_grad=True) for _ in range(3))
    seen.register_hook(lambda gradient: None)
    followed.register_post_accumulate_grad_hook(lambda weight: None)
    weights = (plain, seen, followed)
    assert [compat.has_gradient_hooks(weight) for weight in weights] == [False, True, False]
    assert [compat.has_accumulation_hooks(weight) for weight in weights] == [False, False, True]


@trial("torch", "fills_every_grad")
def another_backward_is_told_apart():
    import torch

    from smartreg_torch import compat

    found = []
    weight = torch.ones(1, requires_grad=True)
    for backward in (
        lambda loss: loss.backward(),
        lambda loss: torch.autograd.grad(loss, weight),
        lambda loss: loss.backward(inputs=[weight]),
    ):
        loss = weight.square().sum()
        loss.register_hook(lambda gradient: found.append(compat.fills_every_grad()))
        backward(loss)
    assert found == [True, False, False]


@trial("torch", "frees_the_graph")
def a_backward_that_keeps_the_graph_is_told_apart():
    import torch

    from smartreg_torch import compat

    assert torch._C._autograd._get_current_graph_task_keep_graph
    found = []
    loss = torch.ones(1, requires_grad=True).square().sum()
    loss.register_hook(lambda gradient: found.append(compat.frees_the_graph()))
    loss.backward(retain_graph=True)
    loss.backward()
    assert found == [False, True]


@trial("torch", "is_checkpointed")
def a_checkpointed_region_is_seen():
    import torch
    from torch.utils.checkpoint import checkpoint

    from smartreg_torch import compat

    assert torch.utils.checkpoint._checkpoint_hook
    found = []

    def forward(x):
        found.append(compat.is_checkpointed())
        return x * 2

    x = torch.ones(1, requires_grad=True)
    forward(x)
    checkpoint(forward, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        forward(x)
    assert found == [False, True, False]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
        forward(x)
        checkpoint(forward, x, use_reentrant=False)
    assert found[3:] == [False, True], "without the name, by the calling functions"


@trial("torch", "uncompiled", "is_compiled", "compiled_call", "set_compiled_call")
def a_compiled_model_is_known():
    import torch

    from smartreg_torch import compat

    plain, called = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    wrapper = torch.compile(plain)
    called.compile()
    assert compat.uncompiled(wrapper) is plain is compat.uncompiled(plain)
    assert [compat.is_compiled(module) for module in (plain, wrapper, called)] == [False, True, True]
    run = []
    compat.set_compiled_call(called, lambda x: run.append(x))
    called("x")
    compat.set_compiled_call(called, None)
    assert run == ["x"]
    assert not compat.is_compiled(called)


@trial("torch", "frames_compiled", "may_compile")
def compilations_are_counted():
    import torch

    from smartreg_torch import compat

    torch.compiler.reset()
    before = compat.frames_compiled()
    torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    assert compat.frames_compiled() > before
    assert compat.may_compile()


@trial("torch", "mixed_precision_policy")
def the_policy_is_read():
    import torch
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    from smartreg_torch import compat

    assert isinstance(fsdp.FSDPModule, type)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = torch.nn.Linear(2, 2)
        fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        assert compat.mixed_precision_policy(model) == policy
    finally:
        torch.distributed.destroy_process_group()


@trial("torch", "partition", "release_partitions", "is_of_zero")
@functools.cache  # DeepSpeed is set up once a process
def zero_has_its_parts():
    import torch

    from smartreg_torch import compat

    deepspeed = pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(place)
    warnings.simplefilter("ignore")  # of functions of torch's that it uses; pytest restores the filters
    deepspeed.init_distributed("gloo", verbose=False)
    try:
        model = torch.nn.Linear(2, 2)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        engine(torch.ones(1, 2))
        compat.release_partitions(engine)
        assert model.weight.numel() == 0
        assert compat.partition(model.weight).numel() == 4
        assert "ds_id" in vars(model)
        assert compat.is_of_zero("ds_id")
    finally:
        torch.distributed.destroy_process_group()
        for name in place:
            os.environ.pop(name)


@trial("torch", "says")
def errors_say_what_they_said():
    import torch
    from torch.utils.checkpoint import checkpoint

    from smartreg_torch import compat

    x = torch.ones(1, requires_grad=True)
    disabled = torch.compiler.disable(torch.sin)

    def no_leaf():
        (x * 2).requires_grad_(False)

    def reentrant():
        torch.autograd.grad(checkpoint(torch.sin, x, use_reentrant=True), x)

    def compiled():
        torch.compile(lambda x: disabled(x) + 1, backend="eager", fullgraph=True)(x)

    for what, call in {"no leaf": no_leaf, "reentrant": reentrant, "compiler disabled": compiled}.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        assert compat.says(caught.value, what), f"{what}: {caught.value}"


@trial("torch", "original_forward")
def accelerate_keeps_the_forward():
    accelerate = pytest.importorskip("accelerate")
    import torch

    from smartreg_torch import compat

    model = torch.nn.Linear(1, 1)
    forward = model.forward
    assert compat.original_forward(model) is None
    reset = accelerate.state.AcceleratorState._reset_state  # one for the process: the Trainer's tests have another
    reset(reset_partial_state=True)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    reset(reset_partial_state=True)
    assert compat.original_forward(prepared) == forward


@trial("torch", "check_trainer")
def the_trainer_has_the_methods():
    transformers = pytest.importorskip("transformers")

    from smartreg_torch import compat
    from smartreg_torch.transformers import SMARTMixin

    compat.check_trainer(transformers.Trainer)
    for name in compat.TRAINER:
        if name in vars(SMARTMixin):
            theirs, ours = (inspect.signature(getattr(kind, name)) for kind in (transformers.Trainer, SMARTMixin))
            assert list(theirs.parameters) == list(ours.parameters), name
    with pytest.raises(ImportError, match="has no _determine_best_metric"):
        compat.check_trainer(object)


# Keras


def compiled_model(**options):
    import keras

    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(**options), metrics=["accuracy"])
    model.train_on_batch(np.ones((4, 3)), np.zeros(4))
    return model


@trial("tf", "every_layer")
def layers_are_listed_at_every_depth():
    import keras

    from smartreg_tf import compat

    inner = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
    outer = keras.Sequential([keras.Input([3]), inner])
    found = compat.every_layer(outer)
    assert found[0] is outer
    assert inner.layers[0] in found
    assert inner.layers[0] not in outer.layers


@trial("tf", "names_of_keras")
def losses_are_not_of_keras_alone():
    import keras

    from smartreg_tf import compat

    layer = keras.layers.ActivityRegularization(l2=1.0)
    layer(np.ones((1, 2)))
    assert len(vars(layer)["_losses"]) == 1
    assert {"_losses", "_loss_ids", "l2"} <= set(vars(layer)) - compat.names_of_keras()
    assert {"_path", "built"} <= compat.names_of_keras()


@trial("tf", "is_of_keras")
def modules_begin_with_keras():
    import keras

    from smartreg_tf import compat

    assert all(map(compat.is_of_keras, [keras.losses.mean_squared_error, keras.Sequential(), keras.Variable(0.0)]))
    assert not compat.is_of_keras(modules_begin_with_keras)


@trial("tf", "set_dtype_policy")
def the_policy_of_a_layer_is_replaced():
    import keras

    from smartreg_tf import compat

    layer = keras.layers.Dense(2, dtype="mixed_bfloat16")
    other = type("Policy", (), {"compute_dtype": "float32"})()
    compat.set_dtype_policy(layer, other)
    assert layer.dtype_policy is other
    assert layer.compute_dtype == "float32"


@trial("tf", "mask_of", "set_mask")
def masks_go_with_a_tensor():
    import keras

    from smartreg_tf import compat

    x = keras.layers.Embedding(9, 4, mask_zero=True)(np.array([[1, 0]]))
    assert np.array(compat.mask_of(x)).tolist() == [[True, False]]
    compat.set_mask(x, np.array([[False, True]]))
    np.testing.assert_array_equal(keras.layers.GlobalAveragePooling1D()(x), x[:, 1])


@trial("tf", "logits_of")
def logits_are_kept():
    import keras

    from smartreg_tf import compat

    z = keras.ops.convert_to_tensor([[1.0, 3.0]])
    for p in (keras.layers.Softmax()(z), keras.layers.Activation("sigmoid")(z), keras.ops.softmax(z)):
        np.testing.assert_array_equal(compat.logits_of(p), z)


@trial("tf", "has_value")
def a_variable_gets_its_value_later():
    import keras

    from smartreg_tf import compat

    with keras.StatelessScope():
        late = keras.Variable(lambda shape, dtype: keras.ops.zeros(shape, dtype), shape=(2,))
        assert not compat.has_value(late)
    assert compat.has_value(late)


@trial("tf", "default_seed")
def the_seed_of_keras_random_moves():
    import keras

    from smartreg_tf import compat

    keras.random.normal([2])
    before = np.array(compat.default_seed())
    keras.random.normal([2])
    assert (np.array(compat.default_seed()) != before).any()


@trial("tf", "is_seed")
def the_states_of_seed_generators_have_one_name():
    import keras

    from smartreg_tf import compat

    keras.random.normal([2])
    assert compat.is_seed(compat.default_seed())
    model = keras.Sequential([keras.Input([2]), keras.layers.Dropout(0.5), keras.layers.BatchNormalization()])
    assert sum(map(compat.is_seed, model.non_trainable_variables)) == 1
    assert not any(map(compat.is_seed, model.weights))
    assert compat.is_seed(keras.random.SeedGenerator(1, name="mine").state)


@trial("tf", "default_graph")
def the_graph_is_that_of_its_tensors():
    import tensorflow as tf

    from smartreg_tf import compat

    seen = []
    tf.function(lambda x: seen.append(compat.default_graph() is x.graph))(tf.constant(1.0))
    assert seen == [True]


@trial("tf", "training_now")
def training_is_known_inside_a_call():
    import keras

    from smartreg_tf import compat

    seen = []

    class Layer(keras.layers.Layer):
        def call(self, x):
            seen.append(compat.training_now())
            return x

    keras.Sequential([Layer()])(np.ones((1, 2)), training=True)
    assert seen[-1] is True
    assert compat.training_now() is None


@trial("tf", "build_on", "loss_container")
def a_model_is_built_on_a_batch():
    import keras

    from smartreg_tf import compat

    model = keras.Sequential([keras.layers.Dense(2)])
    assert not model.layers[0].built
    assert compat.loss_container(model) is None
    model.compile("sgd", "mse", metrics=["mae"])
    assert not compat.loss_container(model).built
    compat.build_on(model, (np.ones((4, 3)), np.ones((4, 2))))
    assert model.layers[0].built
    assert compat.loss_container(model).built


@trial("tf", "compilation")
def each_compile_is_another():
    from smartreg_tf import compat

    model = compiled_model()
    before = compat.compilation(model)
    assert before is not None
    assert compat.compilation(model) is before
    model.compile(model.optimizer, model.loss)
    assert compat.compilation(model) is not before


@trial("tf", "compiled_losses")
def losses_know_their_output():
    import keras

    from smartreg_tf import compat

    x, ones = keras.Input([3]), np.ones((4, 2))
    model = keras.Model(x, {name: keras.layers.Dense(2, name=name)(x) for name in ("b", "a")})
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 2.0, "b": 3.0})
    assert compat.compiled_losses(model, {"a": ones, "b": ones}) == []
    model.train_on_batch(np.ones((4, 3)), {"a": ones, "b": ones})
    found = compat.compiled_losses(model, {"a": ones, "b": ones})
    assert sorted((path, place, weight) for place, path, _, weight in found) == [(("a",), 0, 2.0), (("b",), 1, 3.0)]


@trial("tf", "loss_options")
def a_loss_has_its_options():
    from smartreg_tf import compat

    loss = compat.compiled_losses(compiled_model(ignore_class=7, axis=1), np.ones((4, 2)))[0][2]
    assert compat.loss_options(loss) == {"from_logits": False, "ignore_class": 7, "axis": 1}


@trial("tf", "epoch_logs")
def logs_of_an_epoch_are_those_of_the_metrics():
    from smartreg_tf import compat

    model = compiled_model()
    logs = compat.epoch_logs(model)({"loss": 99.0, "accuracy": 99.0})
    assert set(logs) == {"loss", "accuracy"}
    assert float(logs["loss"]) < 99
    assert f"self.{compat.EPOCH_LOGS}(" in inspect.getsource(inspect.unwrap(type(model).fit))


@pytest.mark.skipif("tf" not in BACKENDS, reason="needs Keras")
def test_smart_trains_without_the_logs_of_an_epoch(monkeypatch):
    import keras

    from smartreg_tf import SMARTConfig, SMARTModel, attach, compat

    owner = next(kind for kind in keras.Model.__mro__ if compat.EPOCH_LOGS in vars(kind))
    monkeypatch.delattr(owner, compat.EPOCH_LOGS)
    model, config = compiled_model(), SMARTConfig(total_steps=9)
    wrapped = SMARTModel(compiled_model(), config)
    wrapped.compile("sgd", model.loss)
    x, y = np.ones((4, 3), np.float32), np.zeros(4)
    with attach(model, config):
        logs = model.train_on_batch(x, y, return_dict=True)
    assert {"smoothness", "proximal"} <= set(logs) & set(wrapped.train_on_batch(x, y, return_dict=True))
    assert compat.EPOCH_LOGS not in {*vars(model), *vars(wrapped)}


@trial("tf", "frames_of_keras")
def a_fit_is_on_the_stack():
    import keras

    from smartreg_tf import compat

    seen = []

    class Look(keras.callbacks.Callback):
        def set_model(self, model):
            seen.extend(compat.frames_of_keras(threading.get_ident()))

    compiled_model().fit(np.ones((4, 3)), np.zeros(4), verbose=0, callbacks=[Look()])
    assert isinstance(seen[0].f_locals["self"], keras.callbacks.CallbackList)
    assert "fit" in [frame.f_code.co_name for frame in seen]


@trial("tf", "token_embedding")
def a_backbone_names_its_token_embedding():
    keras_hub = pytest.importorskip("keras_hub")

    from smartreg_tf import compat

    sizes = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    backbone = keras_hub.models.BertBackbone(**sizes)
    assert compat.token_embedding(backbone) is backbone.get_layer("token_embedding")


@trial("tf", "preprocessed")
def a_task_preprocesses():
    keras_hub = pytest.importorskip("keras_hub")

    from smartreg_tf import compat

    batch = (np.ones((2, 3)), np.zeros(2))
    assert compat.preprocessed(compiled_model(), batch) is batch
    arguments = list(inspect.signature(keras_hub.models.Task.preprocess_samples).parameters)
    assert arguments == ["self", "x", "y", "sample_weight"]


@pytest.mark.skipif("tf" not in BACKENDS, reason="needs TensorFlow")
def test_without_a_private_name_of_keras(monkeypatch):
    import keras

    from smartreg_tf import compat

    model = compiled_model()
    for name in ("_flatten_layers", "_symbolic_build"):
        monkeypatch.delattr(next(owner for owner in keras.Model.__mro__ if name in vars(owner)), name)
    with pytest.raises(RuntimeError, match=r"needs _flatten_layers of Sequential to find .* pip install 'keras>=3.12"):
        compat.every_layer(model)
    with pytest.raises(RuntimeError, match=r"needs _symbolic_build .* unless you call it on a batch before fit"):
        compat.build_on(model, (np.ones((4, 3)), np.zeros(4)))
    monkeypatch.setattr(compat, "_global", lambda name: None)
    assert compat.default_seed() is compat.training_now() is None
    model._compile_loss = None
    assert compat.compiled_losses(model, np.ones((4, 2))) == []
