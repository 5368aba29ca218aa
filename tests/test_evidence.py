"""benchmarks/quality.py: what its lines say, how its table counts, and that docs/evidence.md is what it prints."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torchmetrics")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", ROOT / "benchmarks" / "quality.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(quality, arm="plain", task="a", seed=0, score=80.0, nll=0.5, select=False, epochs=6, rate=1e-4, **more):
    found = {"task": task, "size": 500, "arm": arm, "seed": seed, "epochs": epochs, "rate": rate, "select": select}
    found |= {"settings": quality.settings_of(arm, regression=False), "batch": 16, "model": "m", "averages": {}}
    return found | {"score": score, "nll": nll, "ece": 0.1, "train_loss": 0.1, "steps": 9, "seconds": 2.0} | more


def test_settings_leave_out_what_is_off_and_know_the_task(quality):
    assert quality.settings_of("plain", regression=False) == {"lambda_s": 0, "mu": 0, "non_finite": "raise"}
    default = quality.settings_of("SMARTConfig()", regression=False)
    assert (default["lambda_s"], default["mu"], default["epsilon"], default["memory"]) == (1, 0.5, 0.03, 0.3)
    assert quality.settings_of("SMARTConfig()", regression=True)["lambda_s"] == 0.1
    assert default == quality.settings_of("R_s + D_Breg, mu 0.5", regression=False)
    assert quality.settings_of("SMARTConfig()", True) == quality.settings_of(
        "R_s, lambda_s 0.1, + D_Breg, mu 0.1", True
    )
    assert "beta_late" not in default
    assert "memory" not in quality.settings_of("the paper's values", regression=False)


def test_epochs_and_rate_are_chosen_for_each_arm_and_kind_of_task(quality):
    lines = [
        line(quality, task=task, score=score, select=True, epochs=epochs)
        for epochs, scores in ((3, (80, 70)), (6, (79, 72)), (12, (99,)))  # 12 lacks a task
        for task, score in zip("ab", scores, strict=False)
    ]
    lines += [line(quality, score=99, epochs=3), line(quality, "R_s", score=99, select=True, epochs=3)]
    assert quality.chosen_by(lines, "plain", False, 500) == (6, 1e-4)
    assert quality.chosen_by(lines, "plain", False, 100) == (6, 1e-4)  # no run had as many rows
    assert quality.chosen_by(lines, "R_s", False, 500) == (3, 1e-4)
    assert quality.chosen_by(lines, "D_Breg", False, 500) is None
    assert quality.chosen_by(lines, "plain", True, 500) is None
    few = line(quality, score=1, select=True, epochs=20) | {"size": 100}
    values = {name: value for name, value in line(quality, score=1, select=True, epochs=9).items() if name != "ece"}
    assert quality.chosen_by([*lines, few], "plain", False, 100) == (20, 1e-4)
    assert quality.chosen_by([*lines, values], "plain", True, 500) == (9, 1e-4)


def test_holm(quality):
    assert quality.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_table_has_means_deviations_and_paired_differences(quality):
    lines = [line(quality, seed=seed, score=80 + seed, nll=0.5) for seed in range(4)]
    lines += [line(quality, "R_s", seed=seed, score=81 + seed + 0.1 * (seed % 2), nll=0.5) for seed in range(3)]
    lines += [line(quality, seed=9, select=True)]
    text = quality.tables(lines, select=False)["a, 500 rows"]
    plain, ours = text.splitlines()[2:]
    assert "| 81.5 (sd 1.3) |" in plain
    assert "| 82.0 (sd 1.0), **+1.0 ± 0.1** |" in ours  # 1.0, 1.1, 1.0: of three pairs
    assert "| 0.500 (sd 0.000), +0.000 ± 0.000 |" in ours
    assert list(quality.tables(lines, select=True)) == ["a, 500 rows, choice of settings"]


def test_theta_tilde_is_a_row_of_its_own(quality):
    lines = [line(quality, seed=seed, averages={"0.3": {"score": 90.0, "nll": 0.25, "ece": 0.05}}) for seed in (0, 1)]
    text = quality.tables(lines, select=False)["a, 500 rows"]
    assert "theta~ of memory 0.3" in text.splitlines()[3]
    assert "90.0" in text.splitlines()[3]


def test_a_run_with_a_line_is_not_run_again(quality, monkeypatch, tmp_path):
    rows = [(("good",), 1.0), (("bad",), 0.0)]
    monkeypatch.setattr(quality, "rows_of", lambda folder: (rows, rows, ["0", "1"], rows))
    ran = []

    def run_once(args, line):
        ran.append((line["arm"], line["seed"]))
        return {"score": 1.0, "nll": 1.0, "averages": {}, "train_loss": 0.0, "steps": 1, "seconds": 1.0}

    monkeypatch.setattr(quality, "run_once", run_once)
    args = argparse.Namespace(
        data=tmp_path,
        task=["a"],
        size=[2],
        arm=["plain", "R_s"],
        select=False,
        tuned=False,
        seeds=[0, 2],
        epochs=6.0,
        rate=1e-4,
        batch_size=16,
        model="m",
        jobs=1,
        threads=2,
        lines=tmp_path / "lines.jsonl",
        other=None,
    )
    quality.run(args)
    args.seeds = [0, 3]
    quality.run(args)
    assert ran == [("plain", 0), ("R_s", 0), ("plain", 1), ("R_s", 1), ("plain", 2), ("R_s", 2)]
    assert len(args.lines.read_text().splitlines()) == 6


def test_the_pages_have_what_the_lines_say(quality):
    lines = [json.loads(text) for text in quality.LINES.read_text().splitlines()]
    shown = quality.everything(lines)
    pages = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/evidence.md")]
    for page in pages:
        assert quality.filled(page, shown) == page
    for title in shown:  # no table is left out
        assert any(f"<!-- {title} -->" in page for page in pages), title
