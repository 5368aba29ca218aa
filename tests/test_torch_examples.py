"""The examples, as a user runs them, at a small size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SMARTREG_DATA", ROOT.parent / "shared" / "data"))


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def test_the_demo_shows_what_smart_changes(tmp_path):
    picture, result = tmp_path / "new" / "demo.png", tmp_path / "result.json"
    done = run("demo.py", "--seeds", 2, "--out", picture, "--json", result)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stdout.replace("\n", "")
    found = json.loads(result.read_text())["backends"]
    backends = ["NumPy", "PyTorch", "Keras"] if importlib.util.find_spec("tensorflow") else ["NumPy", "PyTorch"]
    assert list(found) == ["loss", "R_s", "D_Breg", "|theta|", "|theta~|"]
    for name, values in found.items():
        assert name in done.stdout
        assert list(values) == [*backends, "difference"]
        assert min(values[backend] for backend in backends) > 0.01  # something was trained, and perturbed
        assert values["difference"] < 1e-9
    header = next(line for line in done.stdout.splitlines() if "NumPy" in line)
    assert [name for name in ("NumPy", "PyTorch", "Keras") if name in header] == backends


def test_the_demo_without_tensorflow_says_what_to_install():
    code = """
import sys
sys.modules["tensorflow"] = None
import demo
data = demo.digits()
demo.compare(demo.same_task(data, demo.pretrain(data), 2), demo.Console(width=200))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples")))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Without Keras: smartreg_tf needs TensorFlow and Keras 3: pip install 'smartreg[tf]'" in done.stdout
    header = next(line for line in done.stdout.splitlines() if "NumPy" in line)
    assert "PyTorch" in header
    assert "Keras" not in header


@pytest.fixture(scope="module")
def finetune_text():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("finetune_text", ROOT / "examples" / "finetune_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(finetune_text, monkeypatch, capsys, *arguments):
    """What the command line answers to arguments that it cannot use."""
    monkeypatch.setattr(sys, "argv", ["finetune_text.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        finetune_text.main()
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def tsv(tmp_path):
    """A classification task that fits on one screen."""
    rows = [f"this is {'good' if i % 2 else 'bad'} number {i}\t{i % 2}" for i in range(16)]
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return path


def small(tmp_path, train, dev, *more):
    options = ["--examples", 8, "--epochs", 1, "--batch-size", 4, "--seeds", 1, "--smoothness-examples", 4]
    return ["--train", train, "--dev", dev, *options, "--max-length", 16, "--json", tmp_path / "result.json", *more]


def test_finetune_text_compares_the_methods_and_keeps_the_model(tmp_path, tsv):
    result = run("finetune_text.py", *small(tmp_path, tsv, tsv, "--out", tmp_path / "model"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["summary"]) == ["plain", "smart", "r_s", "proximal"]
    for method in found["summary"]:
        assert method in result.stdout
        assert 0 <= found["summary"][method]["accuracy"]["mean"] <= 100
        assert found["summary"][method]["R_s"]["mean"] > 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "model" / "smart_config.json").read_text())["total_steps"] == 2


def test_finetune_text_on_real_data(tmp_path):
    if not DATA.exists():
        pytest.skip(f"no data in {DATA}: set SMARTREG_DATA to a folder with stsb/train.tsv")
    train, dev = DATA / "stsb" / "train.tsv", tmp_path / "dev.tsv"
    dev.write_text("".join((DATA / "stsb" / "dev.tsv").read_text().splitlines(keepends=True)[:40]))
    result = run("finetune_text.py", *small(tmp_path, train, dev, "--method", "plain", "smart"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "result.json").read_text())["summary"]["smart"]
    assert -100 <= found["spearman"]["mean"] <= 100
    assert found["R_s"]["mean"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(""), "no rows"),
        (lambda path: path.write_text("sentence\tclass\na\t1\n"), "no column label or score among"),
        (lambda path: path.write_text("sentence\tlabel\na\n"), "line 2: expected 2 columns, got 1"),
        (lambda path: path.write_text("sentence\tlabel\na\t7\n"), "the label '7' does not occur in"),
    ],
)
def test_finetune_text_names_what_is_wrong_with_a_file(
    finetune_text, monkeypatch, capsys, tmp_path, tsv, change, message
):
    dev = tmp_path / "dev.tsv"
    dev.write_text(tsv.read_text())
    change(dev)
    assert message in refusal(finetune_text, monkeypatch, capsys, *small(tmp_path, tsv, dev))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", 99], "has 16 rows, fewer than --examples 99"),
        (["--model", "no/such/folder"], "--model no/such/folder"),
        (["--epsilon", "-1"], "epsilon must be a finite number > 0, got -1.0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_finetune_text_names_bad_options(finetune_text, monkeypatch, capsys, tmp_path, tsv, options, message):
    assert message in refusal(finetune_text, monkeypatch, capsys, *small(tmp_path, tsv, tsv, *options))
