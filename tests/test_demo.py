"""`python -m smartreg demo` without a backend, and what it computes in NumPy."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smartreg.demo import command, compare, digits

ROOT = Path(__file__).parents[1]
RUN = """
import sys
from smartreg import __main__
from smartreg.demo import digits
digits.ATTACK_STARTS, digits.ATTACK_STEPS, digits.PRETRAINING_STEPS = 1, 2, 90
sys.exit(__main__.main())
"""


def run(folder, *arguments, without=()):
    """The command, with fewer steps, as if some packages were not installed."""
    for name in without:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name={name!r})\n")
    return subprocess.run(
        [sys.executable, "-c", RUN, "demo", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def random_network(seed=0):
    rng = np.random.default_rng(seed)
    sizes = (64, digits.HIDDEN, digits.HIDDEN, 10)
    weights = {}
    for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes), start=1):
        weights[f"W{k}"] = rng.normal(scale=n_in**-0.5, size=(n_in, n_out)).astype(np.float32)
        weights[f"b{k}"] = np.zeros(n_out, np.float32)
    x = rng.random((40, 64), np.float32)
    return weights, x, digits.read(weights, x)


def shows_all(folder, backend, other, without):
    """Run the command as if the packages of the other backend were not installed, and look at what it shows."""
    done = run(folder, "--seeds", 2, "--json", "result.json", without=without)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no log of a framework
    assert done.stdout.startswith(f"A network pre-trained on the digits 0 to 6 is fine-tuned in {backend} on all ten")
    assert (folder / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "The picture: out/demo.png (after" in done.stdout
    commands = [line.split("  ")[1] for line in done.stdout.partition("Next:\n")[2].splitlines()]
    assert len(commands) == 3
    assert all(command.startswith("python -m ") for command in commands)
    assert f"Without {other}" in done.stdout
    found = json.loads((folder / "result.json").read_text())
    assert list(found["backends"]) == ["loss", "R_s", "D_Breg", "|theta|", "|theta~|"]
    for values in found["backends"].values():
        assert list(values) == ["NumPy", backend, "difference"]
        assert min(values["NumPy"], values[backend]) > 0.01  # something was trained, and perturbed
        assert values["difference"] < 1e-9
    for method, values in found["methods"].items():
        assert method in done.stdout
        assert np.mean(values["accuracy"], 0)[0] > 70
    plain, smart = (found["methods"][method]["R_s"] for method in ("plain", "SMART"))
    assert np.mean(smart) < np.mean(plain)


def has_numpys_steps(demo):
    """Compare the steps of a backend's part of the demo with those of NumPy."""
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


def test_the_attack_stays_in_its_ball_and_finds_more_in_a_larger_one():
    theta, x, y = random_network()
    found = [digits.worst(theta, x, y, radius) for radius in (0.01, 0.05, 0.2)]
    for radius, attacked in zip((0.01, 0.05, 0.2), found, strict=True):
        assert attacked.dtype == np.float32
        assert 0.9 * radius < np.abs(attacked - x).max() <= radius * (1 + 1e-5)
    misread = [int((digits.read(theta, attacked) != y).sum()) for attacked in found]
    assert misread[0] < misread[1] <= misread[2]
    assert misread[2] > 30
    assert digits.roughness(theta, x) > 0


def test_without_a_framework_it_says_what_to_install(tmp_path):
    pytest.importorskip("rich")
    done = run(tmp_path, without=("torch", "tensorflow", "keras"))
    assert done.returncode == 1
    assert done.stdout == ""
    for extra in ("torch", "tf"):
        assert f"pip install 'smartreg[{extra}]'" in done.stderr
    assert done.stderr.startswith("the demo has no backend to train with: smartreg_torch needs PyTorch")


def test_a_package_of_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "NEEDED", {"no_such_module": "some-package"})
    parser, given = arguments("--out", tmp_path / "demo.png")
    assert command.main(parser, given) == 1
    assert capsys.readouterr().err == "the demo needs some-package: pip install 'smartreg[digits]'\n"


@pytest.mark.parametrize("bad", [("--seeds", 1), ("--labels", 0)])
def test_a_number_that_cannot_be_used_is_refused(capsys, bad):
    parser, given = arguments(*bad)
    with pytest.raises(SystemExit, match="2"):
        command.main(parser, given)
    assert f"{bad[0]} {bad[1]}" in capsys.readouterr().err


def arguments(*given):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser, parser.parse_args([str(word) for word in given])
