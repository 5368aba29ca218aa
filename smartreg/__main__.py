"""Check the backends that are installed, or one of your own: `python -m smartreg check`."""

import argparse
import os
import sys

# before the frameworks are loaded: the problems are tiny, so threads would only wait for each other
for name, value in {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}.items():
    os.environ.setdefault(name, value)

from smartreg.checking import BACKENDS, DTYPES  # noqa: E402
from smartreg.checking.command import main  # noqa: E402

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m smartreg", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="check")
    check = commands.add_parser("check", help="golden vectors, laws and 50 steps of Algorithm 1 on each backend")
    check.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}, or a module of your own (docs/backends.md); by default all that are installed",
    )
    check.add_argument("--dtype", action="append", choices=DTYPES, help="by default all but float16")
    check.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    sys.path.insert(0, "")  # the user's own module is in the current folder
    sys.exit(main(given.backend or [], given.dtype or [], given.json))
