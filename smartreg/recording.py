"""`smartreg.checking.recording` and `smartreg.checking.compare` by their former name."""

from smartreg.checking.compare import *  # noqa: F403
from smartreg.checking.recording import *  # noqa: F403
