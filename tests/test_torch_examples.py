"""The examples, as a user runs them, at a small size."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("SMARTREG_DATA", ROOT.parent / "shared" / "data"))


def run(script, monkeypatch, capsys, *arguments):
    """As a user runs it, but in this process, which has imported torch and TensorFlow already: what it prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def as_talkative_as_before():
    """finetune_text.py silences transformers."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    yield
    transformers.logging.set_verbosity(verbosity)
    if bars:
        transformers.logging.enable_progress_bar()


def refusal(monkeypatch, capsys, *arguments):
    """What the command line answers to arguments that it cannot use."""
    with pytest.raises(SystemExit, match="2"):
        run("finetune_text.py", monkeypatch, capsys, *arguments)
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


def test_finetune_text_compares_the_methods_and_keeps_the_model(monkeypatch, capsys, tmp_path, tsv):
    arguments = small(tmp_path, tsv, tsv, "--out", tmp_path / "model")
    printed = run("finetune_text.py", monkeypatch, capsys, *arguments)
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found["summary"]) == ["plain", "smart", "r_s", "proximal"]
    for method in found["summary"]:
        assert method in printed
        assert 0 <= found["summary"][method]["accuracy"]["mean"] <= 100
        assert found["summary"][method]["R_s"]["mean"] > 0
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "model" / "smart_config.json").read_text())["total_steps"] == 2


def test_finetune_text_on_real_data(monkeypatch, capsys, tmp_path):
    if not DATA.exists():
        pytest.skip(f"no data in {DATA}: set SMARTREG_DATA to a folder with stsb/train.tsv")
    train, dev = DATA / "stsb" / "train.tsv", tmp_path / "dev.tsv"
    dev.write_text("".join((DATA / "stsb" / "dev.tsv").read_text().splitlines(keepends=True)[:40]))
    run("finetune_text.py", monkeypatch, capsys, *small(tmp_path, train, dev, "--method", "plain", "smart"))
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
def test_finetune_text_names_what_is_wrong_with_a_file(monkeypatch, capsys, tmp_path, tsv, change, message):
    dev = tmp_path / "dev.tsv"
    dev.write_text(tsv.read_text())
    change(dev)
    assert message in refusal(monkeypatch, capsys, *small(tmp_path, tsv, dev))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", 99], "has 16 rows, fewer than --examples 99"),
        (["--model", "no/such/folder"], "--model no/such/folder"),
        (["--epsilon", "-1"], "epsilon must be a finite number > 0, got -1.0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_finetune_text_names_bad_options(monkeypatch, capsys, tmp_path, tsv, options, message):
    assert message in refusal(monkeypatch, capsys, *small(tmp_path, tsv, tsv, *options))
