"""SMART fine-tuning for Keras 3 on TensorFlow (Jiang et al. 2020, arXiv 1911.03437)."""

try:
    import keras as _keras
    import tensorflow as _tensorflow  # noqa: F401
except ImportError as error:
    raise ImportError("smartreg_tf needs TensorFlow and Keras 3: pip install 'smartreg[tf]'") from error

if _keras.config.backend() != "tensorflow":
    raise ImportError(
        f"smartreg_tf needs Keras on TensorFlow, but Keras runs on {_keras.config.backend()!r}: set the environment "
        "variable KERAS_BACKEND=tensorflow before Keras is imported"
    )

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg_tf.callback import SMARTCallback, attach
from smartreg_tf.model import SMARTModel

__all__ = ["SMARTCallback", "SMARTConfig", "SMARTModel", "SMARTWarning", "attach"]
