"""Write tests/before: what earlier runs of a user left, and the values that they lead to.

    git worktree add ../earlier COMMIT
    PYTHONPATH=../earlier python tools/make_before.py

The folder must not be there yet. `tests/test_torch_before.py` and `tests/test_tf_before.py` have the runs.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.append(str(TESTS))

import test_tf_before  # noqa: E402
import test_torch_before  # noqa: E402

if __name__ == "__main__":
    folder = TESTS / "before"
    folder.mkdir()
    test_torch_before.write(folder)
    test_tf_before.write(folder)
