"""SMART fine-tuning (Jiang et al. 2020, arXiv 1911.03437): configuration, equations and the NumPy reference.

`smartreg_torch` and `smartreg_tf` compute the same, natively; this package imports neither framework.
"""

from smartreg.config import SMARTConfig, SMARTWarning

__all__ = ["SMARTConfig", "SMARTWarning"]
__version__ = "0.1.0"
