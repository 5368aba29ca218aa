"""Two processes (gloo, on a CPU) are one process with the whole batch: DistributedDataParallel and fully_shard."""

import re
from pathlib import Path

import distributed_torch as tests
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ("ddp.py", "fsdp.py")
REFUSED = {
    "policy": r"mixed precision policy has torch\.bfloat16.*use torch\.autocast.*precision='model'",
    "output": r"mixed precision policy has torch\.bfloat16",
    "weights": r"torch\.bfloat16 weights, and with fully_shard.*Train float32 weights",
    "skip": r"non_finite='skip' cannot work with fully_shard.*Use non_finite='raise'",
    "FSDP1": r"FullyShardedDataParallel \(FSDP1\).*Shard with torch\.distributed\.fsdp\.fully_shard",
    "DTensor": r"DTensor weights only those of fully_shard",
    "afterwards": r"were sharded after theta~ was made.*Make SMART after fully_shard",
    "state": r"not of this model's.*each process loads what it saved",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder of everything that ran in two processes, the docs' scripts too, and the exit codes."""
    folder = tmp_path_factory.mktemp("processes")
    text = (ROOT / "docs" / "distributed.md").read_text()
    for script in SCRIPTS:
        (code,) = re.findall(rf"^```python {re.escape(script)}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        (folder / script).write_text(code)
    return folder, tests.in_processes(tests.__file__, folder, *SCRIPTS, timeout=300)


def logs(left, name):
    """What each process printed, if both ended without an error."""
    folder, codes = left
    printed = [(folder / f"{name}_{rank}.log").read_text() for rank in range(2)]
    assert codes[name] == [0, 0], "".join(printed)
    return printed


@pytest.fixture(scope="module")
def processes(left):
    """What each of two processes found."""
    logs(left, "train_all")
    return [torch.load(left[0] / f"found_{rank}.pt", weights_only=True) for rank in range(2)]


def assert_are_one(first, second, modes):
    """The processes have the same weights and theta~, those of one process; its metrics are the mean of theirs."""
    expected = {}
    for name, (_, config, _) in modes.items():
        if config not in expected:
            smart, _, history = tests.train(tests.make(), config)
            expected[config] = tests.results(smart, history)
        alone = expected[config]
        for part in ("weights", "teacher"):
            assert first[name][part].keys() == alone[part].keys(), name
            for key, value in alone[part].items():
                assert torch.equal(first[name][part][key], second[name][part][key]), (name, key)
                torch.testing.assert_close(first[name][part][key], value, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")
        for step, metrics in enumerate(alone["history"]):
            pair = [process[name]["history"][step] for process in (first, second)]
            found = {key: (pair[0][key] + pair[1][key]) / 2 for key in metrics}
            assert found == pytest.approx(metrics, rel=1e-9, abs=1e-12), (name, step)
        assert all(value > 0 for value in alone["history"][-1].values())
    assert first["seed"] + 1 == second["seed"]


def test_distributed_data_parallel(processes):
    assert_are_one(*(found["ddp"] for found in processes), tests.DDP)


def test_fully_shard(processes):
    first, second = found = [each["fsdp"] for each in processes]
    assert_are_one(first, second, tests.FSDP)

    for name, parameter in tests.make().named_parameters():  # 1x the weights over all processes
        sizes = [shards["shards"][name] for shards in found]
        assert sum(own for own, _ in sizes) == parameter.numel()
        assert max(own for own, _ in sizes) < parameter.numel() or parameter.numel() == 1

    for process in found:
        # two modules each in the clean pass, two passes of the ascent, the teacher's and the perturbed one
        assert process["frozen"] == dict.fromkeys([False, True], [True] * 2 + [False] * 4 + [True] * 4)
        assert process["resumed"] == 0
        evaluated = process["evaluated"]
        assert torch.equal(evaluated["before"], evaluated["after"])
        assert not torch.allclose(evaluated["before"], evaluated["inside"])
        torch.testing.assert_close(evaluated["inside"], evaluated["expected"], rtol=1e-12, atol=1e-12)

    with torch.autocast("cpu", torch.bfloat16):
        autocast = tests.train(tests.make(torch.float32), tests.CONFIG, steps=range(1))[2]
    rounded = tests.train(tests.make(torch.bfloat16), tests.CONFIG, steps=range(1), precision="model")[2]
    for name, alone in (("autocast", autocast), ("policy", rounded)):
        mean = sum(process["half"][name][0]["R_s"] for process in found) / 2
        assert mean == pytest.approx(alone[0]["R_s"], rel=1e-4)
        assert all(0 < step["R_s"] < 1 for step in first["half"][name])

    assert first["refused"].keys() == REFUSED.keys()
    for name, message in REFUSED.items():
        assert re.search(message, first["refused"][name]), name


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_each_process_draws_dropout_masks_of_its_own(name, processes):
    """The clean masks are alike because both processes have the same global seed."""
    first, second = (process["dropout"][name] for process in processes)
    for own in (first, second):
        clean, *ascent, taught, last = own["masks"]
        assert len(ascent) == 2
        assert torch.equal(taught, clean)
        assert torch.equal(clean, first["masks"][0])
        assert not any(torch.equal(mask, clean) for mask in (*ascent, last))
        assert all(torch.equal(weight, first["weights"][key]) for key, weight in own["weights"].items())
    assert not any(torch.equal(first["masks"][at], second["masks"][at]) for at in (1, 2, 4))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_the_docs_run(script, left):
    printed = logs(left, script)
    found = [re.search(rf"rank {rank}: R_s ([\d.e-]+),", log) for rank, log in enumerate(printed)]
    assert all(row is not None and float(row[1]) > 0 for row in found), printed
    assert found[0][1] != found[1][1]  # rows and noise of its own in each process
    if script == "fsdp.py":
        states = [torch.load(left[0] / f"state_{rank}.pt", weights_only=False)["smart"] for rank in range(2)]
        assert [state["step"] for state in states] == [16, 16]
