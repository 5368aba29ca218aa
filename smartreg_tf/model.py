"""Wrap a Keras model: SMART is in its training step, its settings and theta~ are saved (paper: Algorithm 1)."""

from __future__ import annotations

import inspect
import os
from typing import Any

import keras

from smartreg.config import Precision, SMARTConfig, check_names
from smartreg.report import Description, Observer
from smartreg_tf import compat, resume
from smartreg_tf.build import is_built
from smartreg_tf.engine import ENGINE, Engine
from smartreg_tf.inputs import called
from smartreg_tf.options import ELSEWHERE, Options
from smartreg_tf.outputs import Outputs


@keras.saving.register_keras_serializable("smartreg")
class SMARTModel(keras.Model):  # type: ignore[misc]
    """Train a model with SMART in its training step; save and load it with its settings and theta~.

    Args:
        model: the model to train, a functional or Sequential one, or one that is built.
        config, site, outputs, seed, precision, on_step: as `SMARTCallback`; `total_steps` is needed if beta is
            scheduled, and `site` is saved as names. `on_step` is not saved.
        layers, float32: older names, as in `SMARTCallback`.

    Source: Jiang et al. 2020 (arXiv 1911.03437), section 3 and Algorithm 1.

    Example:
        >>> import numpy as np
        >>> inner = keras.Sequential([keras.Input([3]), keras.layers.Dense(2)])
        >>> model = SMARTModel(inner, SMARTConfig(total_steps=10))
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
        >>> sorted(model.fit(x, y, verbose=0).history)
        ['loss', 'proximal', 'smoothness']
    """

    def __init__(
        self,
        model: Any,
        config: SMARTConfig | None = None,
        site: Any = None,
        outputs: Outputs | None = None,
        *,
        seed: int = 0,
        precision: Precision | None = None,
        on_step: Observer | None = None,
        layers: Any = None,
        float32: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if hasattr(model, ENGINE):
            raise ValueError(
                "SMARTModel: this model already has a SMARTCallback, attach() or SMARTModel. Give it one of them"
            )
        parameters = [inspect.signature(kind.__init__).parameters for kind in (SMARTModel, keras.layers.Layer)]
        known = [name for names in parameters for name in names if name not in ("self", "kwargs")]
        check_names("SMARTModel", kwargs, known, elsewhere=ELSEWHERE)
        super().__init__(**kwargs)
        self.model = model
        given = {"site": site, "outputs": outputs, "seed": seed, "precision": precision, "on_step": on_step}
        options = Options.of("SMARTModel", **given, layers=layers, float32=float32)
        if options.site is not None:  # by name, which can be saved
            asked = options.site if isinstance(options.site, (list, tuple)) else [options.site]
            options = options._replace(site=[layer if isinstance(layer, str) else layer.name for layer in asked])
        engine = Engine(self, config, options, call="SMARTModel")
        self.__dict__[ENGINE] = engine  # past Keras' tracking
        engine.passes.install()
        engine.put_epoch_logs()
        if is_built(model):
            self._track()
            self.built = True

    def build(self, input_shape: Any) -> None:
        """Build the inner model, and theta~ with it."""
        if not self.model.built:
            self.model.build(input_shape)
        unbuilt = [layer.name for layer in compat.every_layer(self.model) if not layer.built]
        if unbuilt:
            raise ValueError(
                f"SMARTModel: the layers {', '.join(unbuilt[:5])} are not built by the model's build(input_shape). "
                "Call the model on a batch before you wrap it"
            )
        self._track()
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Call the inner model."""
        return called(self.model, inputs, training)

    def train_step(self, data: Any) -> Any:
        """Take Keras' training step, with the penalty in its loss."""
        return self._engine.train_step(super().train_step, data)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Compute the compiled loss, plus the penalty inside a training step."""
        return self._engine.compute_loss(super().compute_loss, x, y, y_pred, sample_weight, training=training)

    def make_train_function(self, force: bool = False) -> Any:
        """Make Keras' training step, followed by a look at what went wrong in it."""
        return self._engine.make_train_function(super().make_train_function, force)

    def reset_metrics(self) -> None:
        """Reset Keras' metrics, and `smoothness` and `proximal`."""
        self._engine.reset_metrics(super().reset_metrics)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: Any = None,
        epochs: int = 1,
        verbose: Any = "auto",
        callbacks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Fit as Keras does; with `evaluate="teacher"` theta~ is validated, and is in the model at the end."""
        validation = self._engine.validation
        if validation.wanted:  # first, so that an EarlyStopping restores its weights after it
            if isinstance(callbacks, keras.callbacks.CallbackList):
                callbacks.callbacks.insert(0, validation)
            else:
                callbacks = [validation, *keras.tree.flatten([] if callbacks is None else callbacks)]
        validation.begin()
        try:
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, *args, **kwargs)
        finally:
            validation.break_off()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Keras does, during `fit` the weights that the settings say."""
        return self._engine.validation.evaluate(super().evaluate, *args, **kwargs)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the weights; if they are theta~ for a validation, theta beside them, from which `fit` goes on."""
        super().save_weights(filepath, *args, **kwargs)
        validation, beside = self._engine.validation, f"{filepath}{resume.SUFFIX}"
        if validation.theta is not None:
            resume.write(filepath, self, {}, int(self.optimizer.iterations), validation.theta)
        elif validation.wanted and os.path.exists(beside):
            os.remove(beside)  # it is of the weights that were saved there before

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the weights; during `fit`, which goes on from them, theta if it lies beside them."""
        super().load_weights(filepath, *args, **kwargs)
        validation = self._engine.validation
        if validation.fitting and os.path.exists(f"{filepath}{resume.SUFFIX}"):
            resume.read(filepath, self, {}, int(self.optimizer.iterations), self._engine.teacher.weights)
            validation.theta = None

    def swap_teacher(self) -> Any:
        """Let the model have the averaged weights theta~ in the block, to evaluate or save them."""
        return self._engine.swap_teacher()

    def describe(self) -> Description:
        """Say what is perturbed and compared, and why it was chosen: `print()` shows a table."""
        return self._engine.describe()

    def __repr__(self) -> str:
        return self.describe().line("SMARTModel")

    def measure(self, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32) -> dict[str, float]:
        """Average R_s and D_Breg over x in eval mode, as `smartreg_tf.engine.Engine.measure`."""
        return self._engine.measure(x, y, sample_weight, batch_size)

    def get_config(self) -> dict[str, Any]:
        """Return the settings and the inner model."""
        inner = keras.saving.serialize_keras_object(self.model)
        inner.pop("compile_config", None)  # it is this model that is trained
        return {
            **super().get_config(),
            "model": inner,
            "config": self._engine.config.to_dict(),
            **{name: getattr(self._engine.options, name) for name in ("site", "outputs", "seed", "precision")},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SMARTModel:
        """Make the model of `get_config`."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects)
        return cls(inner, SMARTConfig.from_dict(config.pop("config")), **config)

    @property
    def _engine(self) -> Engine:
        engine: Engine = getattr(self, ENGINE)
        return engine

    def _track(self) -> None:
        engine = self._engine
        engine.teacher.follow()
        self._smart_variables = [engine.step, engine.penalty.draws, *engine.averages]  # Keras saves what it finds here
