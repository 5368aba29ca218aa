"""`smartreg.checking.bounds` and `smartreg.checking.laws` by their former name."""

from smartreg.checking.bounds import *  # noqa: F403
from smartreg.checking.laws import *  # noqa: F403
