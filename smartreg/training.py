"""`smartreg.reference` by its former name."""

from smartreg.reference import *  # noqa: F403
