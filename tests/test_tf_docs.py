"""The code in docs/keras.md runs, in order."""

import re
from pathlib import Path

import pytest

pytest.importorskip("tensorflow", reason="the TensorFlow half needs the extra smartreg[tf]")

PAGE = Path(__file__).parent.parent / "docs" / "keras.md"


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 4
    assert set(names["history"].history) == {
        "accuracy", "loss", "proximal", "smoothness", "val_accuracy", "val_loss"
    }  # fmt: skip
    assert names["smart"].metrics["step"] == 20
    assert (tmp_path / "smart.keras").exists()
