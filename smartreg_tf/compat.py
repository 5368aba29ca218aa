"""Keep every private name of Keras, TensorFlow and keras_hub that this package uses; say what happens without it.

The docstring of each function says which names are `Private`, in which releases they were `Seen` (if that is not
`SEEN`), what they are `For`, and what happens `Without` them. tests/test_upstream.py tries each of them. This module
imports nothing of smartreg.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

Tensor = Any
SEEN = "Keras 3.12 to 3.15.1"


# The layers of a model


def every_layer(model: Any) -> list[Any]:
    """List a model and the layers inside it at every depth.

    Private: keras.Layer._flatten_layers; the public Model.layers has the first level alone
    For: the site, precision, replay, and whether a model is built
    Without: RuntimeError
    """
    return list(_needed(model, "_flatten_layers", "find the layers inside a model")())


@functools.cache
def names_of_keras() -> frozenset[str]:
    """Return the names of the attributes that Keras itself keeps in a layer or a model, but for the losses of a pass.

    Private: keras.Layer._losses and keras.Layer._loss_ids, which add_loss fills
    For: putting back what a pass has changed in a layer, and no more
    Without: the losses of a repeated pass stay in model.losses
    """
    own = {*vars(keras.layers.Layer(name="layer")), *vars(keras.Model(name="model"))}  # a name uses no number up
    return frozenset(own - {"_losses", "_loss_ids"})


def is_of_keras(value: Any) -> bool:
    """Tell whether Keras defines this function, or the class of this object.

    Private: the module keras.src, by its first part alone
    For: telling Keras' own losses, containers and variables from the user's
    Without: no loss is recognised, and the error asks for outputs=
    """
    return str(getattr(value, "__module__", "")).startswith("keras.")


def set_dtype_policy(layer: Any, policy: Any) -> None:
    """Give a layer another dtype policy, of any class, and do nothing else.

    Private: keras.Layer._dtype_policy; the public setter would quantize the layer
    For: passes in float32 under mixed precision
    Without: RuntimeError
    """
    _needed(layer, "_dtype_policy", "compute a pass in float32, which precision='model' does not")
    vars(layer)["_dtype_policy"] = policy


# Tensors and variables


def mask_of(x: Any) -> Tensor | None:
    """Return the mask that Keras keeps on a tensor, or None.

    Private: keras.src.backend.get_keras_mask
    For: leaving padding out of the perturbation and of the means
    Without: RuntimeError
    """
    return _imported("keras.src.backend", "get_keras_mask", "leave padding out")(x)


def set_mask(x: Any, mask: Tensor) -> None:
    """Let Keras keep a mask on a tensor.

    Private: keras.src.backend.set_keras_mask
    For: the layers that come after a perturbed tensor
    Without: RuntimeError
    """
    _imported("keras.src.backend", "set_keras_mask", "leave padding out")(x, mask)


def logits_of(probabilities: Any) -> Tensor | None:
    """Return the logits that a softmax or sigmoid layer keeps on its output, or None.

    Private: tf.Tensor._keras_logits, which Keras' losses read too
    For: R_s and D_Breg of probabilities near 0 or 1, which have lost digits
    Without: None; the logarithm of the probabilities is taken
    """
    return getattr(probabilities, "_keras_logits", None)


def has_value(variable: Any) -> bool:
    """Tell whether a Keras variable has its first value; reading its `value` would make one.

    Private: keras.Variable._value
    For: theta~ of a model that is built in the trace of its first step
    Without: True; the error asks to call the model on a batch first
    """
    return getattr(variable, "_value", variable) is not None


def default_seed() -> Any:
    """Return the variable of the seeds that keras.random draws with if it is given none; None before its first use.

    Private: global_seed_generator, in the state that keras.src.backend.common.global_state keeps
    For: the same dropout masks in every pass if a layer draws without a seed
    Without: None; the check of the first step raises if a pass then does not repeat
    """
    seeds = _global("global_seed_generator")
    return None if seeds is None else seeds.state


def is_seed(variable: Any) -> bool:
    """Tell whether a Keras variable is the state of a SeedGenerator.

    Private: the name seed_generator_state, which keras.random.SeedGenerator gives it
    For: dropout masks that a pass draws itself, dropout="independent"
    Without: False; all passes have the clean pass's masks
    """
    return bool(variable.name == "seed_generator_state")


def default_graph() -> Any:
    """Return the graph that is being traced.

    Private: tf.compat.v1.get_default_graph; TensorFlow 2 has no other name for it
    Seen: TensorFlow 2.21
    For: refusing a site inside a loop or a branch, and naming the operations that draw anew
    Without: RuntimeError
    """
    return _needed(tf.compat.v1, "get_default_graph", "tell the step's own tensors from those of a loop inside it")()


# Training


def training_now() -> bool | None:
    """Return the `training` that the model was called with; None outside a call.

    Private: current_call_ctx, in the state that keras.src.backend.common.global_state keeps
    For: dropout in the repeated passes of a model whose `call` has no `training`
    Without: None; the check of the first step raises if a pass then does not repeat
    """
    context = _global("current_call_ctx")
    return None if context is None else context.get_value("training")


def build_on(model: Any, batch: Any) -> None:
    """Build a model, its compiled loss and its metrics on the shapes of a batch.

    Private: keras.Model._symbolic_build
    For: the fit of a model that is not built
    Without: RuntimeError, unless the model is built before
    """
    _needed(model, "_symbolic_build", "build a model, unless you call it on a batch before fit")(data_batch=batch)


def compilation(model: Any) -> Any:
    """Return an object that each `compile` makes anew, or None before the first.

    Private: keras.Model._compile_config
    For: a `compile` between SMART's beginning and its end, whose training step has to stay
    Without: None; such a `compile` needs another one after SMART's end
    """
    return getattr(model, "_compile_config", None)


def loss_container(model: Any) -> Any:
    """Return what holds the compiled losses, with `built` and `build(y, y_pred)`; None if there is no loss.

    Private: keras.Model._compile_loss
    For: the kind of the outputs before the first step
    Without: None; the error asks for outputs=
    """
    return getattr(model, "_compile_loss", None)


def compiled_losses(model: Any, outputs: Any) -> list[tuple[int, tuple[Any, ...], Any, float]]:
    """List the losses of a model; none if there is no loss, or it is not built.

    Each is the index of its output among the flattened outputs, the path of its labels and sample weights in their
    structures, the `keras.losses.Loss`, and its `loss_weights`.

    Private: _flat_losses and _y_pred_build_structure of keras.Model._compile_loss
    For: the kind, the weight, the reduction and the class axis of each output
    Without: RuntimeError
    """
    container = loss_container(model)
    if container is None or not container.built:
        return []
    structure = _needed(container, "_y_pred_build_structure", "know which output a loss is of")
    places = keras.tree.pack_sequence_as(structure, list(range(len(keras.tree.flatten(outputs)))))
    found = _needed(container, "_flat_losses", "know which output a loss is of")
    return [
        (functools.reduce(lambda inside, step: inside[step], path, places), path, loss, float(1 if w is None else w))
        for path, loss, w, _ in found
    ]


def loss_options(loss: Any) -> dict[str, Any]:
    """Return the options with which a loss calls its function, from_logits, axis and ignore_class among them.

    Private: _fn_kwargs of Keras' own losses; a sparse cross-entropy has no public axis
    For: the kind of an output, and its class axis
    Without: RuntimeError
    """
    if is_of_keras(loss):
        _needed(loss, "_fn_kwargs", "know whether a loss takes logits")
    return dict(getattr(loss, "_fn_kwargs", {}))


EPOCH_LOGS = "_get_metrics_result_or_logs"


def epoch_logs(model: Any) -> Any:
    """Return the method, of the name EPOCH_LOGS, that makes an epoch's logs from those of its last step; or None.

    Private: keras.Model._get_metrics_result_or_logs
    For: smoothness and proximal of all replicas in the logs of an epoch
    Without: the logs of the last step
    """
    return getattr(model, EPOCH_LOGS, None)


def frames_of_keras(thread: int) -> Iterator[Any]:
    """Yield Keras' own frames on the stack of a thread, the innermost first.

    Private: the module keras.src; sys._current_frames of CPython
    For: the end of a fit that an exception broke off, of which Keras tells no callback
    Without: none, as in a loop of the user's own; such a model needs another fit to be as before
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("keras.src."):
            yield frame
        frame = frame.f_back


# keras_hub


def token_embedding(layer: Any) -> Any:
    """Return the token embedding of a keras_hub backbone, None of another layer.

    Private: the attribute token_embedding, keras_hub's convention
    Seen: keras_hub 0.32
    For: the site
    Without: None; the site is chosen as in other models
    """
    found = getattr(layer, "token_embedding", None)
    return found if isinstance(found, keras.Layer) else None


def preprocessed(model: Any, batch: Any) -> Any:
    """Return a batch of raw text as a keras_hub task makes arrays of it; of another model, the batch itself.

    Private: keras_hub.models.Task.preprocess_samples
    Seen: keras_hub 0.32
    For: measure() of what fit takes
    Without: the batch itself, which the model refuses
    """
    preprocess = getattr(model, "preprocess_samples", None)
    return batch if preprocess is None else preprocess(*keras.utils.unpack_x_y_sample_weight(batch))


def _needed(owner: Any, name: str, purpose: str) -> Any:
    """Return a private attribute, or raise RuntimeError if this release does not have it."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise RuntimeError(
            f"SMART: smartreg needs {name} of {getattr(owner, '__name__', type(owner).__name__)} to {purpose}. Keras "
            f"{keras.__version__} with TensorFlow {tf.__version__} does not have it. Install releases that were "
            "tested: pip install 'keras>=3.12,<=3.15.1' 'tensorflow<=2.21'"
        ) from error


@functools.cache
def _imported(module: str, name: str, purpose: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError:
        found = keras  # which has no such name either
    return _needed(found, name, purpose)


def _global(name: str) -> Any:
    """Return a value of the state that Keras keeps by thread, or None."""
    return _imported("keras.src.backend.common.global_state", "get_global_attribute", "repeat a pass")(name)
