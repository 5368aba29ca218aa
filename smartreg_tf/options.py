"""Check what `SMARTCallback`, `attach` and `SMARTModel` are told besides the configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

from smartreg.config import Precision, SMARTConfig, check_options
from smartreg.report import Observer
from smartreg_tf.outputs import Outputs, check_kinds
from smartreg_tf.step import Noise

# What the arguments of SMART in PyTorch are in Keras.
ELSEWHERE = {
    "divergence": (
        "Say outputs=, from which the divergence follows: outputs='regression' is the squared error, 'logits' and "
        "'label_logits' are the KL of classes and of labels"
    ),
    "class_axis": "Give the loss its axis, as SparseCategoricalCrossentropy(axis=...) has it; SMART follows the loss",
    "mask": "Let the model have Keras' mask (mask_zero=True or a Masking layer), or an input named attention_mask",
}


class Options(NamedTuple):
    """Hold the arguments of `SMARTCallback`, `attach` and `SMARTModel` besides the configuration, as the first says."""

    site: Any = None
    outputs: Outputs | None = None
    noise: Noise | None = None
    seed: int = 0
    precision: Precision = "float32"
    on_step: Observer | None = None

    @classmethod
    def of(cls, call: str, *, layers: Any = None, float32: bool | None = None, **given: Any) -> Options:
        """Check the options, `layers` and `float32` being older names of `site` and `precision`.

        Example:
            >>> Options.of("attach", layers="embed", float32=False, precision=None).precision
            'model'
            >>> Options.of("attach", site="embed", layers="embed")
            Traceback (most recent call last):
            ...
            TypeError: attach: site= and its older name layers= are both given. Give site= alone
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name, older, value in (("site", "layers", layers), ("precision", "float32", float32)):
            if value is not None and name in given:
                raise TypeError(f"{call}: {name}= and its older name {older}= are both given. Give {name}= alone")
        if layers is not None:
            given["site"] = layers
        if float32 is not None:
            given["precision"] = "float32" if float32 else "model"
        options = cls(**given)
        check_options(call, SMARTConfig(), options.precision, options.on_step)
        check_kinds(call, options.outputs)
        return options
