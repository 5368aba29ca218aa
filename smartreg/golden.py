"""`smartreg.checking.golden` by its former name."""

from smartreg.checking.golden import *  # noqa: F403
