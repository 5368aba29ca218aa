"""SMART fine-tuning for PyTorch (Jiang et al. 2020, arXiv 1911.03437)."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("smartreg_torch needs PyTorch: pip install 'smartreg[torch]'") from error

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg_torch.projection import Projection, without_logits
from smartreg_torch.quality import report  # the function; the module of that name is imported by `from`
from smartreg_torch.smart import SMART

__all__ = ["SMART", "Projection", "SMARTConfig", "SMARTWarning", "report", "without_logits"]
