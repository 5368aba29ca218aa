"""SMART fine-tuning for Keras 3 on TensorFlow (Jiang et al. 2020, arXiv 1911.03437)."""

import os as _os

try:
    import keras as _keras
    import tensorflow as _tensorflow  # noqa: F401
except ImportError as error:
    _named = _os.environ.get("KERAS_BACKEND", "tensorflow")
    _other = f", and KERAS_BACKEND={_named}, which must be tensorflow before Keras is imported"
    _other = "" if _named == "tensorflow" else _other
    raise ImportError(f"smartreg_tf needs TensorFlow and Keras 3: pip install 'smartreg[tf]'{_other}") from error

if _keras.config.backend() != "tensorflow":
    raise ImportError(
        f"smartreg_tf needs Keras on TensorFlow, but Keras runs on {_keras.config.backend()!r}. Set the environment "
        "variable KERAS_BACKEND=tensorflow before Keras is imported"
    )

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg_tf.callback import SMARTCallback, attach
from smartreg_tf.model import SMARTModel
from smartreg_tf.quality import report  # the function; the module of that name is imported by `from`

__all__ = ["SMARTCallback", "SMARTConfig", "SMARTModel", "SMARTWarning", "attach", "report"]
