"""A plain loop that is killed and goes on ends where the unbroken one does."""

import signal
import subprocess
import sys

import pytest
import resuming_torch
import torch
from torch.utils._pytree import tree_flatten


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The loops of both starts, killed in the middle of the eighth step."""
    folder = tmp_path_factory.mktemp("broken")
    for start in resuming_torch.STARTS:
        (folder / start).mkdir()
    command = [sys.executable, resuming_torch.__file__, str(folder), "7"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    return folder


@pytest.mark.parametrize("start", resuming_torch.STARTS)
def test_a_loop_killed_in_the_middle_of_a_step(start, broken, tmp_path):
    """Weights, optimiser, theta~, noise, random stream and logged metrics: difference 0."""
    whole, broken = tmp_path, broken / start
    resuming_torch.train(whole, start)
    assert len((broken / "log.jsonl").read_text().splitlines()) == 7
    resuming_torch.train(broken, start)
    assert (broken / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    states = [tree_flatten(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in (whole, broken)]
    assert states[0][1] == states[1][1]
    assert len(states[0][0]) > 40
    for one, other in zip(states[0][0], states[1][0], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
