"""The code in the README and the docs runs, in order, on a tiny model."""

import re
from contextlib import nullcontext
from pathlib import Path

import notebooks
import pytest
import torch
import transformers
from architectures import N, classifier, text
from transformers import TrainingArguments

from smartreg_torch import SMARTWarning

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
    forgets = page.name == "debugging.md"  # smart.update(), to show what finds it
    with pytest.warns(SMARTWarning, match="5 batches without") if forgets else nullcontext():
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)
    if page.name == "index.md":
        assert capsys.readouterr().out in page.read_text()
    if page.name == "README.md":
        assert names["smart"].step >= 2
        assert names["smart"].metrics["R_s"] > 0


@pytest.fixture
def verbosity():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.mark.usefixtures("verbosity")
def test_the_notebook_runs(monkeypatch, capsys):
    names, figures = notebooks.run("pytorch.ipynb", monkeypatch, TRAIN=48, TEST=8, EPOCHS=1)
    assert figures == 2
    plain, smart = (names[name].state.log_history for name in ("plain", "smart"))
    assert names["before"].numbers["NLL"] != names["after"].numbers["NLL"]
    assert "R_s" not in plain[0]
    assert smart[-2]["R_s"] > 0 < smart[-2]["D_Breg"]
    assert "bert.embeddings.word_embeddings" in (printed := capsys.readouterr().out)
    assert names["typos"][0] in printed
    assert sorted(names["typos"][0]) == sorted(names["clean"][0])
    assert names["typos"] != names["clean"]
