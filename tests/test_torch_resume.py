"""A plain loop that is killed and goes on ends where the unbroken one does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

SCRIPT = Path(__file__).with_name("resuming_torch.py")


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_loop_killed_in_the_middle_of_a_step(start, tmp_path):
    """Weights, optimiser, theta~, noise, random stream and logged metrics: difference 0."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    done = run(whole, start)
    assert done.returncode == 0, done.stderr
    killed = run(broken, start, 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len((broken / "log.jsonl").read_text().splitlines()) == 7
    done = run(broken, start)
    assert done.returncode == 0, done.stderr
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    states = [tree_flatten(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in (whole, broken)]
    assert states[0][1] == states[1][1]
    assert len(states[0][0]) > 40
    for one, other in zip(states[0][0], states[1][0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
