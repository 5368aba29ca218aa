"""Show what SMART does, or check the backends: `python -m smartreg demo`, `python -m smartreg check`."""

import argparse
import os
import sys

# before the frameworks are loaded: the problems are tiny, so threads would only wait for each other
for name, value in {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}.items():
    os.environ.setdefault(name, value)

from smartreg.checking import BACKENDS, DTYPES, FUNCTIONS  # noqa: E402
from smartreg.checking import command as checking  # noqa: E402
from smartreg.demo import command as demo  # noqa: E402


def main() -> int:
    """Read the command line, and run what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m smartreg", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    shown = commands.add_parser("demo", help="digits, plain and with SMART; and the backends side by side")
    demo.add_arguments(shown)
    check = commands.add_parser("check", help="golden vectors, laws and 50 steps of Algorithm 1 on each backend")
    check.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}, or a module of your own (docs/backends.md); by default all that are installed",
    )
    check.add_argument("--dtype", action="append", choices=DTYPES, help="by default all but float16")
    check.add_argument(
        "--functions",
        nargs="+",
        choices=FUNCTIONS,
        metavar="NAME",
        help=f"check these alone, without Algorithm 1: {', '.join(FUNCTIONS)}",
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("-v", "--verbose", action="store_true", help="print every check, not only a summary")
    given = parser.parse_args()
    if given.command == "demo":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # the network is too small for a GPU
        return demo.main(shown, given)
    sys.path.insert(0, "")  # the user's own module is in the current folder
    return checking.main(given.backend or [], given.dtype or [], given.json, given.verbose, given.functions or [])


if __name__ == "__main__":
    sys.exit(main())
