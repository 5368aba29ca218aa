"""Exceptions at every place where the user's code runs inside SMART: the rows of docs/faults.md that take seconds."""

import runpy
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "tools" / "faults.py"


@pytest.mark.parametrize("way", ["margin", "lean", "autocast"])
def test_nothing_is_left_wherever_the_model_raises(way):
    rows = list(runpy.run_path(str(FAULTS))["torch_rows"](way))
    assert len(rows) == 2  # the first step and a later one
    for row in rows:
        assert row.injections > 40
        assert not row.left, row
