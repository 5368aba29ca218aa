"""SMART in the Hugging Face Trainer: equal to the plain loop, to the large batch, and to itself after a resume."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from smartreg_torch import SMART, SMARTConfig, SMARTWarning
from smartreg_torch.transformers import SMARTMixin, SMARTTrainer

ROOT = Path(__file__).parent.parent
TOKENS, VOCABULARY = 6, 31
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
# at these radii R_s and D_Breg are not lost beside the task loss
CONFIG = SMARTConfig(epsilon=0.1, sigma=0.1, eta=10, beta_early=0.5, beta_late=0.9, early_fraction=0.5)
OFF = SMARTConfig(lambda_s=0, mu=0)
TIMES = ("runtime", "per_second")


def bert(head="SequenceClassification", dropout=0.1, seed=0, **settings):
    torch.manual_seed(seed)
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(vocab_size=VOCABULARY, pad_token_id=0, **{**SIZE, **dropouts, **settings})
    return getattr(transformers, "BertFor" + head)(config)


def t5(dropout=0.0):
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, pad_token_id=0, dropout_rate=dropout, **T5)
    )


def make_rows(n=16, labels=lambda ids, real: torch.tensor(int(ids.sum() % 2)), name="labels", more=0):
    """Examples of 3 to 6 tokens; `more` positions of padding on top change nothing that is real."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(n):
        real = int(torch.randint(3, TOKENS + 1, (), generator=generator))
        ids = torch.randint(2, VOCABULARY, (TOKENS + more,), generator=generator.manual_seed(len(rows)))
        mask = (torch.arange(TOKENS + more) < real).long()
        ids = ids.where(mask == 1, 0)
        found = labels(ids, mask)
        rows.append({"input_ids": ids, "attention_mask": mask, **(found if isinstance(found, dict) else {name: found})})
    return rows


def every_token(ids, mask):
    """A label for each real token but the second."""
    return (ids % 3).where((mask == 1) & (torch.arange(len(ids)) != 1), -100)


def waves(like):
    """Noise that is the same for every example, whatever the batch. (LayerNorm would undo one constant.)"""
    one = like[0]
    return torch.arange(one.numel(), dtype=like.dtype).mul(1.7).sin().view_as(one).expand_as(like)


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return kind(str(folder), **{**defaults, **quiet, **settings})


def make(folder, model=None, rows=None, smart=CONFIG, base=SMARTTrainer, noise=None, **settings):
    """A trainer, its settings divided among Trainer and TrainingArguments."""
    own = ("compute_loss_func", "callbacks", "eval_dataset", "optimizers", "model_init", "compute_metrics")
    given = {name: settings.pop(name) for name in own if name in settings}

    class Made(base):
        def create_smart(self, model, config):
            return SMART(model, config, noise=noise)

    kind = Seq2SeqTrainingArguments if issubclass(base, Seq2SeqTrainer) else TrainingArguments
    if model is None and "model_init" not in given:
        model = bert()
    if issubclass(base, SMARTMixin):
        given["smart"] = smart
    return Made(
        model, arguments(folder, kind, **settings), train_dataset=make_rows() if rows is None else rows, **given
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer, *names):
    """The training logs, without what a clock said."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: value for name, value in row.items() if not names or name in names} for row in rows]


def assert_same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = max(float(value.abs().max()), 1e-3)  # of a key bias, whose gradient is 0, Adam makes rounding noise
        assert float((value - other[name]).abs().max()) <= tolerance * scale, name


def assert_logs_close(one, other, tolerance):
    assert len(one) == len(other)
    for row, expected in zip(one, other, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=1e-12)


# what it computes


def test_training_is_the_plain_loop(tmp_path):
    rows, config = make_rows(12), CONFIG.replace(total_steps=3)
    model = bert(dropout=0.0)
    twin = copy.deepcopy(model)
    trainer = make(tmp_path, model, rows, noise=waves, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
    order = []
    trainer.data_collator = lambda batch: (order.append(batch), transformers.default_data_collator(batch))[1]
    trainer.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    losses, metrics = [], []
    with SMART(twin.train(), config, noise=waves) as smart:
        for batch in order[:3]:
            output, penalty = smart(**transformers.default_data_collator(batch))
            loss = output.loss + penalty
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(smart.metrics)
            smart.update()
            losses.append(loss.item())
    assert_same(weights(trainer), twin.state_dict(), 1e-6)
    assert_same(trainer.smart.teacher, smart.teacher, 1e-6)
    assert [row["loss"] for row in logged(trainer)] == pytest.approx(losses, rel=1e-6)
    for row, found in zip(logged(trainer), metrics, strict=True):
        assert row["R_s"] == pytest.approx(found["R_s"], rel=1e-4)
        assert row["D_Breg"] == pytest.approx(found["D_Breg"], rel=1e-4, abs=1e-12)
    assert logged(trainer)[2]["D_Breg"] > 0
    assert trainer.smart.step == 3


def test_switched_off_it_is_trainer(tmp_path):
    runs = []
    for base in (Trainer, SMARTTrainer):
        trainer = make(
            tmp_path, base=base, smart=OFF, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2
        )
        calls = []
        trainer.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        runs.append((weights(trainer), logged(trainer), len(calls), torch.get_rng_state()))
    (plain, plain_logs, plain_calls, plain_rng), (off, off_logs, off_calls, off_rng) = runs
    assert_same(plain, off)
    assert plain_logs == off_logs
    assert plain_calls == off_calls
    assert torch.equal(plain_rng, off_rng)
    assert not list(tmp_path.glob("*/smart_state.pt"))
    with pytest.raises(RuntimeError, match="there is no theta~"), trainer.swap_teacher():
        pass


def test_logs_are_means_over_the_window(tmp_path):
    class Reporter(TrainerCallback):
        """What TensorBoard's callback is given."""

        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **_):
            self.seen.append(dict(logs))

    each = make(tmp_path, max_steps=6)
    each.train()
    reporter = Reporter()
    window = make(tmp_path, max_steps=6, logging_steps=3, callbacks=[reporter])
    window.train()
    rows = logged(each)
    for k, row in enumerate(logged(window)):
        some = rows[3 * k : 3 * k + 3]
        for name in ("loss", "R_s", "D_Breg"):
            assert row[name] == pytest.approx(sum(r[name] for r in some) / 3, rel=1e-6)
        assert row["max_delta"] == max(r["max_delta"] for r in some)
        assert row["beta"] == some[-1]["beta"]
        assert row["vanished"] == row["skipped"] == 0
        assert reporter.seen[k]["R_s"] == row["R_s"]
    assert rows[0]["beta"] == 0.5
    assert rows[5]["beta"] == 0.9


def test_steps_without_a_finite_penalty_are_left_out_of_the_means(tmp_path):
    calls = []

    def noise(like):
        calls.append(1)
        return torch.full_like(like, float("nan") if len(calls) < 4 else 1.0)

    trainer = make(tmp_path, max_steps=4, logging_steps=2, smart=CONFIG.replace(non_finite="skip"), noise=noise)
    trainer.train()
    first, second = logged(trainer)
    assert first["skipped"] == 2
    assert "R_s" not in first
    assert second["skipped"] == 3
    assert second["R_s"] > 0
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({"max_steps": 5}, None, 5),
        ({"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 3}, None, 6),
        ({"max_steps": 2}, 100, 100),
    ],
)
def test_total_steps_are_the_trainers(tmp_path, settings, given, expected):
    model = bert()
    model.accepts_loss_kwargs = False
    trainer = make(tmp_path, model, smart=CONFIG.replace(total_steps=given), save_strategy="epoch", **settings)
    trainer.train()
    assert trainer.smart.config.total_steps == expected
    assert trainer.smart_config.total_steps == given


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])  # accelerate does not see that the second skips
def test_a_skipped_step_does_not_move_the_teacher(tmp_path, optim):
    class Watch(TrainerCallback):
        moved, before = 0, None

        def on_pre_optimizer_step(self, *_, **__):
            self.before = weights(trainer)

        def on_optimizer_step(self, *_, **__):
            after = weights(trainer)
            self.moved += any(not torch.equal(after[name], value) for name, value in self.before.items())

    watch = Watch()
    trainer = make(tmp_path, max_steps=8, optim=optim, max_grad_norm=0.0, callbacks=[watch])
    # 2^127 times the loss overflows in the gradients: steps are skipped until the scale has come down
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=1e-6)
    trainer.train()
    assert 0 < watch.moved < 8
    assert trainer.smart.step == watch.moved


# gradient accumulation


def summed(output, labels, num_items_in_batch=None):
    loss = nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return loss / num_items_in_batch if num_items_in_batch is not None else loss / (labels != -100).sum()


class Counting(transformers.BertForTokenClassification):
    """A head that does what num_items_in_batch is for."""

    def forward(self, input_ids, attention_mask, labels=None, num_items_in_batch=None, **kwargs):
        output = super().forward(input_ids, attention_mask)
        if labels is not None:
            output.loss = summed(output, labels, num_items_in_batch)
        return output


PATHS = {
    "own loss": {"accepts": False},
    "own loss, regression": {"accepts": False, "labels": lambda ids, mask: ids.sum() / 30, "num_labels": 1},
    "own loss that counts items": {"accepts": True, "head": "Counting", "labels": every_token},
    "own loss, tokens": {"accepts": False, "head": "TokenClassification", "labels": lambda ids, mask: ids % 3},
    "label smoothing": {"accepts": False, "label_smoothing_factor": 0.1},
    "label smoothing, items counted": {"accepts": True, "label_smoothing_factor": 0.1},
    "compute_loss_func": {"accepts": False, "compute_loss_func": summed},
    "compute_loss_func, items counted": {"accepts": True, "compute_loss_func": summed, "labels": every_token},
}


def accumulated(folder, path, n, batch, steps, **settings):
    path = dict(PATHS[path])
    head, labels = path.pop("head", "SequenceClassification"), path.pop("labels", None)
    if labels is every_token and head == "SequenceClassification":
        head = "TokenClassification"
    made = {"num_labels": path.pop("num_labels", 3), "dropout": 0.0}
    if head == "Counting":
        model = bert("TokenClassification", **made)
        model.__class__ = Counting
    else:
        model = bert(head, **made)
    model.accepts_loss_kwargs = path.pop("accepts")
    rows = make_rows(n) if labels is None else make_rows(n, labels)
    if made["num_labels"] == 1:
        rows = [{**row, "labels": row["labels"].double()} for row in rows]
    trainer = make(
        folder,
        model.double(),
        rows,
        noise=waves,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        **path,
        **settings,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("path", PATHS)
def test_accumulation_is_the_large_batch(tmp_path, path):
    small, large = (accumulated(tmp_path, path, 32, *size) for size in ((4, 4), (16, 1)))
    assert_same(weights(small), weights(large), 1e-6)
    assert_same(small.smart.teacher, large.smart.teacher, 1e-6)
    names = ["R_s", "D_Breg", "max_delta", "vanished", "beta"]
    names += [] if "own loss, tokens" in path else ["loss", "grad_norm"]
    assert_logs_close(logged(small, *names), logged(large, *names), 1e-6)
    assert logged(small)[-1]["R_s"] > 1e-3
    assert logged(small)[-1]["D_Breg"] > 1e-6


@pytest.mark.parametrize("path", ["own loss that counts items", "label smoothing, items counted"])
def test_the_last_window_of_an_epoch_is_its_large_batch_too(tmp_path, path):
    # 22 = 4 + 4 + 4 + 4 | 4 + 2 against 16 | 6
    small, large = (accumulated(tmp_path, path, 22, *size, max_steps=4) for size in ((4, 4), (16, 1)))
    assert_same(weights(small), weights(large), 1e-6)
    assert_logs_close(logged(small, "R_s", "D_Breg", "loss"), logged(large, "R_s", "D_Breg", "loss"), 1e-6)


def test_the_penalty_of_a_ragged_window_is_a_mean_over_its_examples(tmp_path):
    """Where Trainer divides by the steps, the task loss of a 4 + 2 window is a mean of means; the penalty is not."""
    small, large = (
        accumulated(tmp_path, "own loss", 6, *size, max_steps=1, max_grad_norm=0.0) for size in ((4, 2), (6, 1))
    )
    assert_logs_close(logged(small, "R_s"), logged(large, "R_s"), 1e-6)


def test_a_loss_that_ignores_the_number_of_items_is_named(tmp_path):
    with pytest.warns(SMARTWarning, match=r"4 times what.*model.accepts_loss_kwargs = False before making the trainer"):
        make(tmp_path, gradient_accumulation_steps=4, max_steps=1).train()

    def ignoring(output, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(output.logits, labels)

    with pytest.warns(SMARTWarning, match="let compute_loss_func divide a sum by num_items_in_batch"):
        make(tmp_path, gradient_accumulation_steps=4, max_steps=1, compute_loss_func=ignoring).train()
