"""The scripts in tools/."""

import runpy
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_mutation_still_applies():
    """Each text occurs once in the tree as it is, and the mutations change it: the list cannot rot."""
    script = runpy.run_path(str(ROOT / "tools" / "mutate.py"))
    for mutation in script["MUTATIONS"]:
        assert mutation.old != mutation.new
        script["edited"](mutation)  # raises where it does not apply
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text(), test
    names = Counter((mutation.backend, mutation.file, mutation.name) for mutation in script["MUTATIONS"])
    assert max(names.values()) == 1
    counts = Counter(mutation.backend for mutation in script["MUTATIONS"])
    assert all(counts[backend] >= 25 for backend in ("numpy", "torch", "tf"))
