"""examples/finetune_keras.py, as a user runs it, on a classifier of a few hundred weights."""

import functools
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from rich.console import Console

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_keras.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "good", "bad"]


@pytest.fixture(scope="module")
def finetune_keras():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("finetune_keras", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A folder as keras_hub loads it."""
    folder = str(tmp_path_factory.mktemp("preset"))
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(WORDS), num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=8, max_sequence_length=8
    )
    tokenizer = keras_hub.tokenizers.BertTokenizer(vocabulary=WORDS)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor).save_to_preset(folder)
    return folder


@pytest.fixture
def tsv(tmp_path):
    path = tmp_path / "train.tsv"
    rows = [f"this is {'good' if i % 2 else 'bad'}\t{i % 2}" for i in range(12)]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return path


def command(monkeypatch, train, dev, *more):
    monkeypatch.setattr(sys, "argv", ["finetune_keras.py", "--train", str(train), "--dev", str(dev), *map(str, more)])


def test_it_compares_the_methods_and_keeps_the_model(finetune_keras, monkeypatch, capsys, tmp_path, tsv, preset):
    small = ["--model", preset, "--examples", 8, "--epochs", 1, "--seeds", 1, "--batch", 4, "--tokens", 8]
    more = ["--set", "lambda_s=2.0", "--json", tmp_path / "result.json", "--out", tmp_path / "model.keras"]
    command(monkeypatch, tsv, tsv, *small, *more)
    # test_tf_fit.py has the graph of such a model; to build four here would take most of the time
    monkeypatch.setattr(keras.Model, "compile", functools.partialmethod(keras.Model.compile, run_eagerly=True))
    finetune_keras.main()
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found) == ["plain", "smart"]
    shown = capsys.readouterr().out.split("x first")[1]
    for method, (result,) in found.items():
        assert method in shown
        assert 0 <= result["accuracy"] <= 1
        assert result["ms"] > 0
    assert found["smart"][0]["R_s"] > 0
    with zipfile.ZipFile(tmp_path / "model.keras") as saved:
        assert "BertTextClassifier" in saved.read("config.json").decode()


def test_what_is_measured_by_hand(finetune_keras):
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]])
    found = finetune_keras.measured(logits, np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["NLL"] == pytest.approx(-np.log([0.9, 0.1, 0.7]).mean())
    assert found["ECE"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.7)) / 3)
    assert finetune_keras.measured(np.array([[800.0, 0.0]]), np.array([0]))["ECE"] == 0


def test_the_table_has_the_paired_difference(finetune_keras):
    runs = [
        {"accuracy": 0.5, "NLL": 1.0, "ECE": 0.2, "ms": 10.0},
        {"accuracy": 0.75, "NLL": 0.5, "ECE": 0.1, "ms": 10.0},
    ]
    better = [{**one, "accuracy": one["accuracy"] + 0.125, "ms": 25.0} for one in runs]
    console = Console(width=120, record=True)
    console.print(finetune_keras.table({"plain": runs, "smart": better}))
    shown = console.export_text()
    assert "0.625 (0.18)" in shown
    assert "+0.125 ± 0.000" in shown
    assert "2.50" in shown


@pytest.mark.parametrize(
    ("text", "got"), [("sentence\tclass\na\t1\n", r"got \['sentence', 'class'\]"), ("sentence\tlabel\n", "no rows")]
)
def test_a_file_without_the_columns_is_named(finetune_keras, monkeypatch, tmp_path, tsv, text, got):
    broken = tmp_path / "broken.tsv"
    broken.write_text(text)
    command(monkeypatch, tsv, broken)
    with pytest.raises(SystemExit, match=f"broken.tsv: expected the columns sentence and label, .*{got}"):
        finetune_keras.main()
