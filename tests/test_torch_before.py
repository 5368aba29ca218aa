"""What an earlier smartreg wrote still loads: a loop's state, a pickled loop, a Trainer's checkpoint, a recording.

`tools/make_before.py` runs `write` with the earlier package; the tests go on from its files to its values.
"""

import json
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from paper_settings import papers
from torch import nn

from smartreg.checking import compare_run
from smartreg_torch import SMART
from smartreg_torch.transformers import SMARTTrainer

BEFORE = Path(__file__).parent / "before"
CONFIG = papers(epsilon=0.1, sigma=0.1, eta=0.15, proximal_steps=2, beta_early=0.5, beta_late=0.9, total_steps=6)
IDS, Y = torch.arange(30).view(6, 5) ** 2 % 11, torch.arange(6) % 3
METRICS = ("R_s", "D_Breg", "beta", "max_delta")


def waves(model):
    """The model in float64, with weights that no random stream decides."""
    with torch.no_grad():
        for k, parameter in enumerate(model.double().parameters()):
            parameter.copy_((torch.arange(parameter.numel()) * (k + 1.7)).sin().view_as(parameter) / 2)
    return model


def loop():
    model = waves(nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def steps(model, optimizer, smart, count):
    """Train; what each step found, and theta~ after it."""
    rows = []
    for _ in range(count):
        output, penalty = smart(IDS)
        (nn.functional.cross_entropy(output, Y) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        smart.update()
        rows.append({name: smart.metrics[name] for name in METRICS if name in smart.metrics} | squares(smart))
    return rows


def squares(smart):
    return {f"{name}~": float(average.square().sum()) for name, average in smart.teacher.items()}


def trainer(folder):
    settings = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **settings, **off)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": y} for ids, y in zip(IDS, Y, strict=True)]
    return SMARTTrainer(
        waves(transformers.BertForSequenceClassification(config)), arguments, train_dataset=rows, smart=CONFIG
    )


def loop_goes_on(folder):
    model, optimizer = loop()
    state = torch.load(folder / "torch_state.pt", weights_only=True)
    with SMART(model, CONFIG) as smart:
        for name, part in (("model", model), ("optimizer", optimizer), ("smart", smart)):
            part.load_state_dict(state[name])
        return steps(model, optimizer, smart, 2)


def trainer_goes_on(folder, new):
    run = trainer(new)
    run.train(resume_from_checkpoint=str(folder / "trainer"))
    rows = [row for row in run.state.log_history if "loss" in row and row["step"] > 3]
    return [{name: row[name] for name in ("loss", *METRICS)} for row in rows] + [squares(run.smart)]


def recording(folder):
    report = compare_run(folder / "torch_recording.npz")
    return report, {f"{row.what}, step {row.step}": row.recomputed for row in report.rows}


def write(folder):
    """Called with an earlier package: its files, and how it goes on from them."""
    torch.manual_seed(0)
    model, optimizer = loop()
    with SMART(model, CONFIG, record=folder / "torch_recording.npz", record_steps=3) as smart:
        steps(model, optimizer, smart, 3)
        parts = {"model": model, "optimizer": optimizer, "smart": smart}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "torch_state.pt")
        (folder / "torch_loop.pkl").write_bytes(pickle.dumps((model, optimizer, smart)))
    with tempfile.TemporaryDirectory() as new:
        trainer(new).train()
        shutil.move(Path(new, "checkpoint-3"), folder / "trainer")
        (folder / "trainer" / "training_args.bin").unlink()  # no resume reads it
        values = {"loop": loop_goes_on(folder), "trainer": trainer_goes_on(folder, new), "run": recording(folder)[1]}
    (folder / "torch.json").write_text(json.dumps(values, indent=1) + "\n", "utf-8")


@pytest.fixture(scope="module")
def values():
    return json.loads((BEFORE / "torch.json").read_text("utf-8"))


def assert_close(rows, expected):
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert row == pytest.approx(want, rel=1e-9)


def test_a_state_dict_goes_on(values):
    assert_close(loop_goes_on(BEFORE), values["loop"])


def test_a_pickled_loop_goes_on(values):
    model, optimizer, smart = pickle.loads((BEFORE / "torch_loop.pkl").read_bytes())
    with smart:
        assert_close(steps(model, optimizer, smart, 2), values["loop"])


def test_a_trainers_checkpoint_goes_on(values, tmp_path):
    assert_close(trainer_goes_on(BEFORE, tmp_path), values["trainer"])


def test_a_recording_is_read(values):
    report, rows = recording(BEFORE)
    assert report.ok
    assert report.about.startswith("3 steps on torch, site: 0; torch ")
    assert rows == pytest.approx(values["run"], rel=1e-9, abs=1e-15)
