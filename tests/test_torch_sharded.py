"""Two processes (gloo, on a CPU) are one with the whole batch: fully_shard through the Trainer, Accelerate's loop."""

import re
from pathlib import Path

import distributed_torch as loops
import pytest
import sharded_torch as tests
import torch

ROOT = Path(__file__).parent.parent
REFUSED = {
    "bf16": r"mixed precision policy has torch\.bfloat16.*use torch\.autocast",
    "skip": r"non_finite='skip' cannot work with fully_shard",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What each of two processes found, by job."""
    folder = tmp_path_factory.mktemp("processes")
    codes = loops.in_processes(tests.__file__, folder, timeout=600)
    for name, code in codes.items():
        assert code == [0, 0], "".join((folder / f"{name}_{rank}.log").read_text() for rank in range(2))
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in range(2)] for name in tests.JOBS
    }


def differ(one, other):
    """The largest difference, relative to the largest entry of each tensor."""
    assert one.keys() == other.keys()
    # of a key bias, whose gradient is 0, Adam makes rounding noise
    scales = {name: max(float(value.abs().max()), 1e-3) for name, value in other.items()}
    return max(float((one[name] - value).abs().max()) / scales[name] for name, value in other.items())


@pytest.mark.parametrize("name", tests.FSDP)
def test_fully_shard_in_the_trainer(name, left, tmp_path):
    first, second = (found[name] for found in left["trainer"])
    settings = {key: value for key, value in tests.FSDP[name][1].items() if key != "gradient_accumulation_steps"}
    trainer = tests.make(tmp_path, batch=8, **settings)
    trainer.train()
    alone = tests.results(trainer)
    for part in ("weights", "teacher"):
        assert differ(first[part], second[part]) == 0
        assert differ(first[part], alone[part]) < 1e-6
        assert differ(first["resumed"][part], first[part]) == 0
        assert differ(second["resumed"][part], second[part]) == 0
    assert first["logs"] == second["logs"] == first["resumed"]["logs"]
    assert len(first["logs"]) == len(alone["logs"]) >= tests.STEPS
    for row, expected in zip(first["logs"], alone["logs"], strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-12)
    if "smart" not in settings:
        assert all(row["R_s"] > 0 for row in alone["logs"])
        assert all(row["D_Breg"] > 0 for row in alone["logs"][1:])
    if first["evaluated"] is not None:
        with trainer.swap_teacher():
            loss = trainer.evaluate(tests.trainers.make_rows(8))["eval_loss"]
        assert first["evaluated"] == second["evaluated"] == pytest.approx(loss, rel=1e-6)
    for (here, size), (there, _) in zip(first["sizes"], second["sizes"], strict=True):  # once over all processes
        assert here + there == size
        assert here < size or size == 1


def test_theta_of_the_best_checkpoint_is_loaded(left):
    for found in left["trainer"]:
        best = found["theta~ is evaluated"]
        losses = [row["eval_loss"] for row in best["logs"] if "eval_loss" in row]
        assert len(losses) == 2
        assert best["evaluated"] == pytest.approx(min(losses), rel=1e-9)
        assert all(torch.equal(best["weights"][name], average) for name, average in best["teacher"].items())


def test_what_the_trainer_refuses(left):
    for found in left["trainer"]:
        assert found["refused"].keys() == REFUSED.keys()
        for name, message in REFUSED.items():
            assert re.search(message, found["refused"][name]), name


@pytest.mark.parametrize("name", tests.ACCELERATE)
def test_a_loop_with_accelerate(name, left):
    first, second = (found[name] for found in left["accelerate"])
    smart, _, history = loops.train(loops.make(), loops.CONFIG)
    alone = loops.results(smart, history)
    for part in ("weights", "teacher"):
        assert differ(first[part], second[part]) == 0
        assert differ(first[part], alone[part]) < 1e-9
        assert differ(first["resumed"][part], first[part]) == 0
        assert differ(second["resumed"][part], second[part]) == 0
    for own, other, expected in zip(first["history"], second["history"], alone["history"], strict=True):
        mean = {key: (own[key] + other[key]) / 2 for key in expected}
        assert mean == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert first["resumed"]["history"] == first["history"][2:]


@pytest.mark.parametrize("name", tests.ZERO)
def test_deepspeed(name, left):
    pytest.importorskip("deepspeed")
    first, second = (found[name] for found in left["zero"])
    smart, _, history = loops.train(loops.make(torch.float32), tests.ZERO[name][1])
    alone = loops.results(smart, history)
    for part in ("weights", "teacher"):
        assert differ(first[part], second[part]) == 0
        assert differ(first[part], alone[part]) < 1e-5
    for own, other, expected in zip(first["history"], second["history"], alone["history"], strict=True):
        mean = {key: (own[key] + other[key]) / 2 for key in expected}
        assert mean == pytest.approx(expected, rel=1e-4, abs=1e-9)
    if "ZeRO 3" in name:  # theta~ once over all processes
        for key, average in alone["teacher"].items():
            assert first["sizes"][key] + second["sizes"][key] == average.numel()
            assert first["sizes"][key] < average.numel() or average.numel() == 1
        assert re.search("ZeRO 3 has partitioned.*Give SMART the engine", first["refused"])
