"""Write docs/architectures.md from a run of the tests' own functions, which check what they write: about a minute.

python tools/make_architectures.py
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the tests
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_torch_matrix as matrix  # noqa: E402

if __name__ == "__main__":
    matrix.PAGE.write_text(matrix.made(), "utf-8")
