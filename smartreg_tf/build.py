"""Give a model its weights before its first training step is traced."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import keras
import tensorflow as tf

from smartreg_tf import compat


def is_built(model: Any) -> bool:
    """Tell whether every layer of a model has its weights."""
    return all(layer.built for layer in compat.every_layer(model))


class Builder:
    """Build a model on the shapes of a batch."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._local = threading.local()

    def build(self, iterator: Any) -> Any:
        """Build the model on the first batch of what Keras' training step gets, and return all batches."""
        if isinstance(iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)):
            shapes = iterator.element_spec
        else:
            shapes = next(iterator)
            iterator = itertools.chain([shapes], iterator)
            shapes = keras.tree.map_structure(lambda x: None if x is None else tf.convert_to_tensor(x), shapes)
        if type(self._model).train_step is keras.Model.train_step:
            compat.build_on(self._model, shapes)
        else:
            self._build_by_step(shapes)
        return iterator

    def stop(self) -> None:
        """Stop here if the training step runs for its weights alone; `compute_loss` calls it."""
        if getattr(self._local, "building", False):
            raise _BuiltError

    def _build_by_step(self, shapes: Any) -> None:
        """Trace the model's own training step, which may unpack the batch in a way of its own, up to its loss."""
        self._local.building = True
        try:
            with keras.StatelessScope():  # variables are made after it, with values
                tf.function(self._model.train_step, autograph=False).get_concrete_function(shapes)
        except _BuiltError:
            pass
        except Exception as error:
            raise ValueError(
                f"SMART: the model has no weights yet, and its train_step cannot make them before it runs ({error}). "
                "Call the model on a batch before fit, as its train_step does: model(x)."
            ) from error
        finally:
            self._local.building = False


class _BuiltError(Exception):
    """End the model's own training step once it has made the weights."""
