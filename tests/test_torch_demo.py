"""`python -m smartreg demo` with PyTorch alone, as its user runs it."""

import json

import numpy as np
import pytest
from test_demo import random_network, run

from smartreg.demo import compare
from smartreg_torch import demo


def test_the_demo_with_pytorch_alone(tmp_path):
    done = run(tmp_path, "--seeds", 2, "--json", "result.json", without=("tensorflow", "keras"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no log of a framework
    assert done.stdout.startswith("A network pre-trained on the digits 0 to 6 is fine-tuned in PyTorch on all ten")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "The picture: out/demo.png (after" in done.stdout
    commands = [line.split("  ")[1] for line in done.stdout.partition("Next:\n")[2].splitlines()]
    assert len(commands) == 3
    assert all(command.startswith("python -m ") for command in commands)
    assert "Without Keras: smartreg_tf needs" in done.stdout
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["backends"]) == ["loss", "R_s", "D_Breg", "|theta|", "|theta~|"]
    for values in found["backends"].values():
        assert list(values) == ["NumPy", "PyTorch", "difference"]
        assert min(values["NumPy"], values["PyTorch"]) > 0.01  # something was trained, and perturbed
        assert values["difference"] < 1e-9
    for method, values in found["methods"].items():
        assert method in done.stdout
        assert np.mean(values["accuracy"], 0)[0] > 70
    plain, smart = (found["methods"][method]["R_s"] for method in ("plain", "SMART"))
    assert np.mean(smart) < np.mean(plain)


def test_the_steps_are_those_of_numpy():
    weights, x, y = random_network()
    rng = np.random.default_rng(0)
    task = compare.Task(
        {name: value.astype(np.float64) for name, value in weights.items()},
        x[:30].reshape(3, 10, 64).astype(np.float64),
        y[:30].reshape(3, 10),
        rng.standard_normal((3, 10, 64)),
    )
    expected = compare.run(task)
    for name, values in demo.run(task).items():
        assert values == pytest.approx(expected[name], rel=1e-9, abs=1e-12)
