"""The Keras code in docs/keras.md and in the README runs."""

import re
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "keras.md"


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_runs():
    model = keras.Sequential(
        [keras.layers.Embedding(9, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(2)]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    names = {"model": model, "x": np.arange(32).reshape(8, 4) % 9, "y": np.arange(8) % 2}
    (block,) = (block for block in blocks_of(ROOT / "README.md") if "smartreg_tf" in block)
    exec(compile(block, "README.md", "exec"), names)
    assert model.optimizer.iterations == 3


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(PAGE)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        names["model"].run_eagerly = True  # after the first: a graph for each SMART would take most of the time
    assert len(blocks) == 7
    assert set(names["history"].history) == {
        "accuracy", "loss", "proximal", "smoothness", "val_accuracy", "val_loss"
    }  # fmt: skip
    assert names["smart"].metrics["step"] == 20
    assert (tmp_path / "smart.keras").exists()
