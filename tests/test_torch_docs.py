"""The code in the README and the docs runs, in order, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from architectures import N, classifier, text
from transformers import TrainingArguments

ROOT = Path(__file__).parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if "keras" not in page.name]


def blocks(page):
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if "smartreg_tf" not in block and "import jax" not in block]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = classifier("Bert")().train()
    names = {
        "model": model,
        "loader": [text() | {"labels": torch.randint(3, (N,))} for _ in range(2)],
        "epochs": 1,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "torch": torch,
    }
    if page.name == "index.md":
        names["batch"] = names["loader"][0]
    if page.name == "README.md":
        names["args"] = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none")
        names["rows"] = [{"input_ids": [2, 10 + i % 9, 3], "labels": i % 3} for i in range(8)]
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)
    if page.name == "index.md":
        assert capsys.readouterr().out in page.read_text()
    if page.name == "README.md":
        assert names["smart"].step >= 2
        assert names["smart"].metrics["R_s"] > 0
