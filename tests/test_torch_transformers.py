"""SMART in the Hugging Face Trainer: equal to the plain loop, to the large batch, and to itself after a resume."""

import copy
import importlib.util
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
import transformers
from distributed_torch import in_a_session
from paper_settings import papers
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from smartreg.report import Choice, Description
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
CONFIG = papers(epsilon=0.1, sigma=0.1, eta=10, beta_early=0.5, beta_late=0.9, early_fraction=0.5)
OFF = papers(lambda_s=0, mu=0)
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


def make_rows(n=16, labels=lambda ids, real: ids.sum() % 2, more=0):
    """Examples of 3 to 6 tokens; `more` positions of padding on top change nothing that is real."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(n):
        real = int(torch.randint(3, TOKENS + 1, (), generator=generator))
        mask = (torch.arange(TOKENS + more) < real).long()
        ids = torch.zeros_like(mask)
        ids[:TOKENS] = torch.randint(2, VOCABULARY, (TOKENS,), generator=generator)
        found = labels(ids * mask, mask)
        found = found if isinstance(found, dict) else {"labels": found}
        rows.append({"input_ids": ids * mask, "attention_mask": mask, **found})
    return rows


def every_token(ids, mask):
    """A label for each real token but the second."""
    return (ids % 3).where((mask == 1) & (torch.arange(len(ids)) != 1), -100)


def waves(like):
    """Noise that is the same for every example, whatever the batch. (LayerNorm would undo one constant.)"""
    one = like[0]
    return torch.arange(one.numel(), dtype=like.dtype).mul(1.7).sin().view_as(one).expand_as(like)


def arguments(folder, kind=TrainingArguments, **settings):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
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
    trainer = make(
        tmp_path, model, rows, noise=waves, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=3
    )
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
    assert logged(trainer)[-1]["D_Breg"] > 0
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


@pytest.mark.parametrize("mu", [0, 1])
def test_R_s_is_a_mean_over_the_steps_that_have_it(tmp_path, mu):
    smart = CONFIG.replace(smoothness_steps=2, mu=mu)
    each = make(tmp_path, max_steps=5, smart=smart)
    each.train()
    window = make(tmp_path, max_steps=5, logging_steps=3, smart=smart)
    window.train()
    rows = logged(each)
    assert [("R_s" in row, "max_delta" in row) for row in rows] == [(True, True), (False, False)] * 2 + [(True, True)]
    row = logged(window)[0]
    assert row["R_s"] == pytest.approx((rows[0]["R_s"] + rows[2]["R_s"]) / 2, rel=1e-6)
    assert row["max_delta"] == max(rows[0]["max_delta"], rows[2]["max_delta"])
    assert ("D_Breg" in row) == (mu > 0)
    if mu:
        assert row["D_Breg"] == pytest.approx(sum(r["D_Breg"] for r in rows[:3]) / 3, rel=1e-6)


def test_steps_without_a_finite_penalty_are_left_out_of_the_means(tmp_path):
    calls = []

    def noise(like):
        calls.append(1)
        return torch.full_like(like, float("nan") if len(calls) < 4 else 1.0)

    skipping = CONFIG.replace(non_finite="skip")
    runs = {}
    for steps in (1, 2):
        calls.clear()
        runs[steps] = make(tmp_path, max_steps=4, logging_steps=steps, smart=skipping, noise=noise)
        runs[steps].train()
    (first, second), each = logged(runs[2]), logged(runs[1])
    assert first["skipped"] == 2
    assert "R_s" not in first
    assert second["skipped"] == 3
    assert [name in row for row in each for name in ("R_s", "D_Breg")] == [False] * 6 + [True] * 2
    assert (second["R_s"], second["D_Breg"]) == (each[3]["R_s"], each[3]["D_Breg"])


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


class Scores(nn.Module):
    """A classifier whose outputs have names of its own."""

    def __init__(self, names):
        super().__init__()
        self.bert, self.names = bert(), names

    def forward(self, input_ids, attention_mask, labels):
        output = self.bert(input_ids, attention_mask, labels=labels)
        return {"loss": output.loss} | dict.fromkeys(self.names, output.logits)


@pytest.mark.parametrize(
    ("names", "message", "note"),
    [
        (["scores", "others"], "cannot tell which", "override create_smart: return SMART(model, config, outputs=...)"),
        ([], "no floating-point output besides the loss", "override create_smart"),
    ],
)
def test_what_smart_asks_for_goes_into_create_smart(tmp_path, names, message, note):
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path, Scores(names)).train()
    (said,) = caught.value.__notes__
    assert note in said


def test_an_error_that_names_no_argument_of_smart_gets_no_note(tmp_path):
    class Broken(Scores):
        def forward(self, input_ids, attention_mask, labels):
            raise ValueError("outputs= of the model's own")

    with pytest.raises(ValueError, match="of the model's own") as caught:
        make(tmp_path, Broken([])).train()
    assert not getattr(caught.value, "__notes__", [])


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
        loss = None if labels is None else summed(output, labels, num_items_in_batch)
        return transformers.modeling_outputs.TokenClassifierOutput(loss=loss, logits=output.logits)


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


def test_many_batches_in_a_step_are_no_forgotten_update(tmp_path):
    model = bert(num_hidden_layers=1)
    model.accepts_loss_kwargs = False
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 256}
    trainer = make(tmp_path, model, make_rows(256), smart=CONFIG.replace(lambda_s=0), max_steps=1, **settings)
    trainer.train()  # where a warning is an error
    assert trainer.smart.step == 1


# checkpoints


def assert_same_run(one, other):
    assert_same(weights(one), weights(other))
    assert_same(one.smart.teacher, other.smart.teacher)
    assert one.smart.step == other.smart.step
    assert logged(one) == logged(other)


SAVING = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    model = bert()
    model.accepts_loss_kwargs = False
    settings = {**SAVING, "gradient_accumulation_steps": 2}
    unbroken = make(tmp_path, copy.deepcopy(model), **settings)
    unbroken.train()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):  # the middle and the end of an epoch of 2 steps
        other = bert(seed=5)  # whose own weights, noise and dropout must not matter
        other.accepts_loss_kwargs = False
        torch.manual_seed(99)
        resumed = make(tmp_path / "again", other, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        assert_same_run(unbroken, resumed)


def test_metrics_of_a_window_that_a_checkpoint_cuts(tmp_path):
    """Trainer forgets the losses before the checkpoint in such a window; the metrics are whole."""
    settings = {**SAVING, "max_steps": 6, "logging_steps": 3}
    unbroken = make(tmp_path, **settings)
    unbroken.train()
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = ["R_s", "D_Breg", "max_delta", "vanished", "beta", "skipped"]
    assert logged(unbroken, *names) == logged(resumed, *names)
    assert_same(weights(unbroken), weights(resumed))


KILLED = """
import os, signal, sys
import test_torch_transformers as tests

class Killed(tests.TrainerCallback):
    def on_substep_end(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

model = tests.bert()
model.accepts_loss_kwargs = False
trainer = tests.make(sys.argv[1], model, callbacks=[Killed()], gradient_accumulation_steps=2, **tests.SAVING)
trainer.train()
"""


def test_a_killed_run_goes_on_as_the_unbroken_one(tmp_path):
    status, _, errors = in_a_session("-c", KILLED, tmp_path / "killed", timeout=300)
    assert status == -signal.SIGKILL, errors
    runs = []
    for folder, resume in (("unbroken", None), ("killed", True)):
        model = bert()
        model.accepts_loss_kwargs = False
        trainer = make(tmp_path / folder, model, gradient_accumulation_steps=2, **SAVING)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert_same_run(*runs)


def test_a_checkpoint_without_a_teacher_is_refused(tmp_path):
    make(tmp_path, base=Trainer, **SAVING).train()
    with pytest.raises(ValueError, match=r"checkpoint-7 has no smart_state.pt, so theta~ is lost"):
        make(tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_resuming_with_mu_0(tmp_path):
    smart = CONFIG.replace(mu=0)
    unbroken = make(tmp_path / "run", smart=smart, **SAVING)
    unbroken.train()
    resumed = make(tmp_path / "again", bert(seed=5), smart=smart, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same_run(unbroken, resumed)
    with pytest.raises(ValueError, match=r"checkpoint-4 was made with mu = 0, so it has no theta~, and mu = 1 now"):
        make(tmp_path / "again", **SAVING).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_a_checkpoint_with_a_teacher_resumed_with_mu_0(tmp_path):
    make(tmp_path, **SAVING).train()
    resumed = make(tmp_path, bert(seed=5), smart=CONFIG.replace(mu=0), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.smart.teacher == {}
    assert resumed.smart.step == 7


def test_the_settings_are_saved_with_the_model(tmp_path):
    trainer = make(tmp_path / "run", **SAVING)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-6"):
        config = SMARTConfig.from_json((folder / "smart_config.json").read_text())
        assert config == CONFIG.replace(total_steps=7)
    assert not (tmp_path / "run" / "smart_config.json").exists()
    trainer.args.push_to_hub = True
    trainer.save_model(tmp_path / "run" / "checkpoint-7", _internal_call=True)  # as before a push
    assert (tmp_path / "run" / "smart_config.json").exists()


# what the outputs are


def penalised(tmp_path, model, rows, base=SMARTTrainer, **settings):
    """The metrics of the second step (in the first D_Breg is 0), with all rows in one batch."""
    trainer = make(
        tmp_path,
        model.double(),
        rows,
        base=base,
        noise=waves,
        per_device_train_batch_size=len(rows),
        max_steps=2,
        **settings,
    )
    trainer.train()
    return {name: logged(trainer)[1][name] for name in ("R_s", "D_Breg")}, trainer


@pytest.mark.parametrize(
    ("label", "divergence", "num_labels"),
    [
        (lambda ids, mask: ids.sum() % 3, "symmetric_kl", 3),
        (lambda ids, mask: (ids[:3] % 2).double(), "bernoulli_symmetric_kl", 3),
        (lambda ids, mask: ids.sum() / 50.0, "squared_error", 1),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"compute_loss_func": True}], ids=["own loss", "compute_loss_func"])
def test_the_divergence_goes_with_the_labels(tmp_path, label, divergence, num_labels, settings):
    rows = [
        {**row, "labels": row["labels"].double() if num_labels == 1 else row["labels"]} for row in make_rows(8, label)
    ]
    model = bert(num_labels=num_labels, dropout=0.0)
    twin = copy.deepcopy(model).double().train()
    if settings:
        settings = {"compute_loss_func": lambda output, labels, num_items_in_batch=None: output.logits.square().mean()}
        if divergence == "bernoulli_symmetric_kl":
            with pytest.raises(ValueError, match="Set model.config.problem_type"):
                penalised(tmp_path, copy.deepcopy(model), rows, **settings)
            model.config.problem_type = "multi_label_classification"
    trainer = penalised(tmp_path, model, rows, **settings)[1]
    batch = transformers.default_data_collator(rows)
    with SMART(twin, CONFIG.replace(total_steps=2), noise=waves, divergence=divergence) as smart:
        smart(**batch)
    assert logged(trainer)[0]["R_s"] == pytest.approx(smart.metrics["R_s"], rel=1e-9)


def extractive(ids, mask):
    return {"start_positions": ids[0] % 3, "end_positions": ids[1] % 3}


def seq2seq_labels(ids, mask):
    return ids.where(mask == 1, -100)


def causal_labels(ids, mask):
    """A prompt of two tokens has no labels."""
    return ids.where((mask == 1) & (torch.arange(len(ids)) > 1), -100)


def gpt2():
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **dropouts, initializer_range=0.2))


TASKS = {
    "one label": (lambda: bert(dropout=0.0), lambda ids, mask: ids.sum() % 2, SMARTTrainer, {}),
    "tokens": (lambda: bert("TokenClassification", dropout=0.0, num_labels=3), every_token, SMARTTrainer, {}),
    "tokens, label smoothing": (
        lambda: bert("TokenClassification", dropout=0.0, num_labels=3),
        every_token,
        SMARTTrainer,
        {"label_smoothing_factor": 0.1},
    ),
    "causal language model": (gpt2, causal_labels, SMARTTrainer, {}),
    "sequence to sequence": (t5, seq2seq_labels, type("Mine", (SMARTMixin, Seq2SeqTrainer), {}), {}),
    "sequence to sequence, label smoothing": (
        t5,
        lambda ids, mask: {"labels": seq2seq_labels(ids, mask), "decoder_input_ids": nn.functional.pad(ids, (1, -1))},
        type("Mine", (SMARTMixin, Seq2SeqTrainer), {}),
        {"label_smoothing_factor": 0.1},
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_padded_positions_are_left_out(tmp_path, task):
    maker, labels, base, settings = TASKS[task]
    found = [penalised(tmp_path, maker(), make_rows(6, labels, more=more), base, **settings)[0] for more in (0, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert min(found[0].values()) > 1e-9


def test_positions_without_a_label_are_left_out(tmp_path):
    """The mean over the labelled positions, by hand."""
    rows = make_rows(6, every_token)
    model = bert("TokenClassification", dropout=0.0, num_labels=3).double()
    batch = transformers.default_data_collator(rows)
    labelled = batch["labels"] != -100
    assert 0 < labelled.sum() < batch["attention_mask"].sum()
    with SMART(copy.deepcopy(model).train(), CONFIG.replace(total_steps=2), noise=waves) as smart:
        smart(**batch, label_mask=labelled)
        by_label = smart.metrics["R_s"]
        smart(**batch)
        by_token = smart.metrics["R_s"]
    trainer = penalised(tmp_path, model, rows)[1]
    assert logged(trainer)[0]["R_s"] == pytest.approx(by_label, rel=1e-9)
    assert abs(by_token - by_label) > 0.01 * by_label
    one_left_out = labelled & (torch.arange(TOKENS) != 2)
    with SMART(copy.deepcopy(model).train(), CONFIG.replace(total_steps=2), noise=waves) as smart:
        smart(**batch, label_mask=one_left_out)
        assert abs(smart.metrics["R_s"] - by_label) > 1e-3 * by_label


def test_a_causal_output_has_the_label_of_the_next_token(tmp_path):
    rows, model = make_rows(6, causal_labels), gpt2().double()
    batch = transformers.default_data_collator(rows)
    labelled = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for i, row in enumerate(batch["labels"]):
        for k in range(TOKENS - 1):
            labelled[i, k] = row[k + 1] != -100
    with SMART(copy.deepcopy(model).train(), CONFIG.replace(total_steps=2), noise=waves) as smart:
        smart(**batch, label_mask=labelled)
        expected = smart.metrics["R_s"]
    trainer = penalised(tmp_path, model, rows)[1]
    assert logged(trainer)[0]["R_s"] == pytest.approx(expected, rel=1e-9)


def test_question_answering_adds_start_and_end(tmp_path):
    rows, R_s = make_rows(6, extractive), {}
    batch = transformers.default_data_collator(rows)
    for outputs in ("start_logits", "end_logits"):
        model = bert("QuestionAnswering", dropout=0.0).double().train()
        with SMART(model, CONFIG.replace(total_steps=2, ascent_steps=0), noise=waves, outputs=outputs) as smart:
            smart(**batch)
            R_s[outputs] = smart.metrics["R_s"]
    smart = CONFIG.replace(ascent_steps=0)
    trainer = penalised(tmp_path, bert("QuestionAnswering", dropout=0.0), rows, smart=smart)[1]
    assert logged(trainer)[0]["R_s"] == pytest.approx(sum(R_s.values()), rel=1e-9)


# evaluation


def test_evaluation_and_prediction_are_trainers(tmp_path):
    rows, seen = make_rows(10), []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **_):
            seen.append(({k: v for k, v in metrics.items() if not k.endswith(TIMES)}, copy.deepcopy(trainer.model)))

    trainer = make(
        tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=2, max_steps=4, callbacks=[Evaluated()]
    )
    trainer.train()
    assert len(seen) == 2
    for metrics, model in seen:
        plain = make(tmp_path, model, base=Trainer, eval_dataset=rows)
        found = plain.evaluate()
        assert metrics["eval_loss"] == found["eval_loss"]
        assert set(metrics) == {"eval_loss", "epoch"}
    for mine, theirs in zip(trainer.predict(rows)[:2], plain.predict(rows)[:2], strict=True):
        assert (mine == theirs).all()
    assert plain.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_averaged_weights_can_be_evaluated(tmp_path):
    trainer = make(tmp_path, eval_dataset=make_rows(8), max_steps=4)
    trainer.train()
    before = weights(trainer)
    with trainer.swap_teacher():
        averaged = trainer.evaluate()["eval_loss"]
        expected = {name: value.clone() for name, value in trainer.smart.teacher.items()}
        assert_same({name: p.detach() for name, p in trainer.model.named_parameters()}, expected)
    assert_same(before, weights(trainer))
    assert averaged != trainer.evaluate()["eval_loss"]


# the best model

BEST = {
    "max_steps": 6,
    "eval_dataset": make_rows(8),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "learning_rate": 0.05,
}


class Averaged(SMARTTrainer):
    def evaluate(self, *args, **kwargs):
        with self.swap_teacher():
            return super().evaluate(*args, **kwargs)


class Both(SMARTTrainer):
    """theta~'s under another name, beside theta's."""

    def evaluate(self, *args, **kwargs):
        found = super().evaluate(*args, **kwargs)
        with self.smart.swap_teacher():
            return found | super().evaluate(*args, metric_key_prefix="eval_averaged")


class Renamed(SMARTTrainer):
    def evaluate(self, *args, **kwargs):
        with self.swap_teacher():
            averaged = super().evaluate(*args, metric_key_prefix="averaged")
        return super().evaluate(*args, metric_key_prefix="theta") | {"eval_loss": averaged["averaged_loss"]}


def loss_of(trainer):
    """Of the weights that are in the model."""
    return Trainer.evaluate(trainer)["eval_loss"]


@pytest.mark.parametrize(
    ("base", "metric", "averaged"),
    [
        (SMARTTrainer, "loss", False),
        (Averaged, "loss", True),
        (Both, "loss", False),
        (Both, "averaged_loss", True),
        (Both, "eval_averaged_loss", True),
        (Renamed, "loss", True),
    ],
)
def test_the_best_model_is_the_one_that_was_measured(tmp_path, base, metric, averaged):
    trainer = make(tmp_path, base=base, metric_for_best_model=metric, greater_is_better=True, **BEST)
    trainer.train()
    assert trainer.state.best_metric is not None
    assert loss_of(trainer) == pytest.approx(trainer.state.best_metric, rel=1e-6)
    state = torch.load(Path(trainer.state.best_model_checkpoint, "smart_state.pt"), weights_only=True)
    assert state["averaged"] is averaged
    theta = bert()
    theta.load_state_dict(type(theta).from_pretrained(trainer.state.best_model_checkpoint).state_dict())
    is_theta = all(torch.equal(p, theta.get_parameter(name)) for name, p in trainer.model.named_parameters())
    assert is_theta is not averaged
    trainer.save_model(tmp_path / "final")
    saved = type(theta).from_pretrained(tmp_path / "final").state_dict()
    assert_same(saved, weights(trainer))
    if base is Averaged:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_the_best_model_after_a_resume(tmp_path):
    first = make(tmp_path, base=Averaged, greater_is_better=True, **BEST)
    first.train()
    best = int(first.state.best_model_checkpoint.rsplit("-", 1)[1])
    resumed = make(tmp_path, bert(seed=5), base=Averaged, greater_is_better=True, **BEST)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{best}"))
    assert resumed.state.best_metric == first.state.best_metric
    assert_same(weights(first), weights(resumed))


def test_the_best_model_with_save_only_model(tmp_path):
    trainer = make(tmp_path, base=Averaged, save_only_model=True, **BEST)
    trainer.train()
    assert loss_of(trainer) == pytest.approx(trainer.state.best_metric, rel=1e-6)
    plain = make(tmp_path / "plain", save_only_model=True, **BEST)
    plain.train()
    assert not list(tmp_path.glob("plain/*/smart_state.pt"))


def test_a_best_model_without_its_teacher_is_named(tmp_path):
    class Deleting(TrainerCallback):
        def on_save(self, args, state, control, **_):
            for file in tmp_path.glob("*/smart_state.pt"):
                file.unlink()

    trainer = make(tmp_path, base=Averaged, callbacks=[Deleting()], **BEST)
    with pytest.warns(SMARTWarning, match=r"was measured with theta~, but .*smart_state.pt does not exist"):
        trainer.train()


# what was chosen


DESCRIPTION = {"site": ("bert", "found"), "l_s": ("symmetric_kl", "the default"), "positions": ("all", "the default")}


def described(monkeypatch):
    description = Description({name: Choice(*choice) for name, choice in DESCRIPTION.items()})
    monkeypatch.setattr(SMART, "describe", lambda self: Description(description), raising=False)


class Writer(TrainerCallback):
    """As TensorBoard's callback."""

    def __init__(self):
        self.tb_writer, self.texts = self, []

    def add_text(self, *text):
        self.texts.append(text)


def test_what_was_chosen_is_shown_once(tmp_path, monkeypatch, capsys):
    described(monkeypatch)
    writer = Writer()
    model = bert("TokenClassification", num_labels=3)
    trainer = make(tmp_path, model, make_rows(8, every_token), max_steps=3, callbacks=[writer])
    trainer.train()
    shown = capsys.readouterr().out
    assert shown.count("site       bert          found") == 1
    assert shown.index("site ") < shown.index("'loss'")
    own_place = "d loss / d outputs: a label has its output at its own place"
    assert f"positions  all           {own_place}" in shown
    sums = "d loss / d outputs sums to 0 over the classes, as of any softmax loss"
    assert writer.texts == [("SMART", writer.texts[0][1], 1)]
    assert f"| l_s | `symmetric_kl` | {sums} |" in writer.texts[0][1]
    for _ in range(2):
        trainer.create_model_card(model_name="mine")
        card = (tmp_path / "README.md").read_text()
        assert card.count("## SMART") == 1
        assert writer.texts[0][1] in card


def test_what_was_chosen_is_not_shown_to_those_who_want_silence(tmp_path, monkeypatch, capsys):
    described(monkeypatch)
    trainer = make(tmp_path)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        trainer.train()
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert "site" not in capsys.readouterr().out
    off = make(tmp_path, smart=OFF)
    off.train()
    off.create_model_card()
    assert "## SMART" not in (tmp_path / "README.md").read_text()


def test_the_model_is_left_as_it_was(tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise OSError("disk full")

    def hooks():
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return [len(vars(module)[name]) for module in model.modules() for name in names]

    model = bert()
    before = hooks()
    make(tmp_path, model).train()
    assert hooks() == before
    assert "forward" not in vars(model)
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path, model, callbacks=[Broken()]).train()
    assert hooks() == before
    model.bert.forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, model).train()
    assert hooks() == before
    assert "forward" not in vars(model)


# ways to make and to run a Trainer


def test_model_init_gives_every_run_its_own_smart(tmp_path):
    trainer = make(tmp_path, model_init=lambda: bert(seed=0))
    runs = []
    for _ in range(2):
        trainer.train()
        assert trainer.smart.model is trainer.model
        runs.append((trainer.smart, weights(trainer), logged(trainer)))
    assert runs[0][0] is not runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_a_trainer_of_ones_own(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            output = model(**inputs)
            loss = nn.functional.cross_entropy(output.logits, labels, weight=torch.tensor([1.0, 2.0]))
            return (loss, output) if return_outputs else loss

    plain = make(tmp_path, base=Weighted)
    plain.train()
    off = make(tmp_path, base=type("Mine", (SMARTMixin, Weighted), {}), smart=OFF)
    off.train()
    assert_same(weights(plain), weights(off))
    trainer = make(tmp_path, base=type("Mine", (SMARTMixin, Weighted), {}))
    trainer.train()
    assert logged(trainer)[0]["loss"] == pytest.approx(logged(plain)[0]["loss"] + logged(trainer)[0]["R_s"], rel=1e-5)
    assert logged(trainer)[0]["R_s"] > 1e-3


def test_checkpointed_layers(tmp_path):
    name = "activation" if "activation_checkpointing" in vars(arguments(tmp_path)) else "gradient"
    runs = []
    for settings in ({}, {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}):
        trainer = make(tmp_path, **settings)
        trainer.train()
        runs.append(trainer)
    assert_same(*map(weights, runs), 1e-6)
    reentrant = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="reentrant checkpointing cannot work"):
        make(tmp_path, **reentrant).train()


def test_frozen_embeddings(tmp_path):
    model = bert(dropout=0.0)
    model.bert.embeddings.requires_grad_(False)
    before = model.bert.embeddings.word_embeddings.weight.clone()
    trainer, whole = make(tmp_path, model), make(tmp_path, bert(dropout=0.0))
    trainer.train()
    whole.train()
    assert logged(trainer)[0]["R_s"] == logged(whole)[0]["R_s"]  # of the first step, whose weights are the same
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)
    assert not any("word_embeddings" in name for name in trainer.smart.teacher)


def test_under_bfloat16_autocast_R_s_is_float32s(tmp_path):
    runs = [make(tmp_path, bert(dropout=0.0), bf16=half, max_steps=1) for half in (True, False)]
    for trainer in runs:
        trainer.train()
    (half,), (single,) = map(logged, runs)
    assert half["R_s"] == single["R_s"]
    assert half["loss"] != single["loss"]


def import_anew():
    spec = importlib.util.spec_from_file_location("anew", ROOT / "smartreg_torch" / "transformers.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'smartreg\[hf\]'"):
        import_anew()


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.17.9"])
def test_an_old_transformers_is_refused_at_import(monkeypatch, version):
    installed = sys.modules["transformers"]  # which lazy loading may have put in another's place
    monkeypatch.setattr(installed, "__version__", version)
    expected = rf"needs transformers 5\.18 or later \(transformers {version} is installed\): pip install 'smartreg"
    with pytest.raises(ImportError, match=expected):
        import_anew()
    for new in ("5.18.0", "5.18.0.dev0", "6.0.0"):
        monkeypatch.setattr(installed, "__version__", new)
        import_anew()


def test_bad_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="smart= must be a SMARTConfig, got dict"):
        make(tmp_path, smart={"lambda_s": 1})

    class Without(SMARTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    with pytest.raises(RuntimeError, match="compute_loss is overridden without super"):
        make(tmp_path, base=Without).train()

    class NoModel(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model.bert(inputs["input_ids"]).pooler_output.mean()

    with pytest.raises(RuntimeError, match="compute_loss did not call the model"):
        make(tmp_path, base=type("Mine", (SMARTMixin, NoModel), {})).train()
    trainer = make(tmp_path)
    with pytest.raises(RuntimeError, match="there is no theta~"), trainer.swap_teacher():
        pass
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="several GPUs in one process"):
        trainer._begin_smart()
    trainer.args._n_gpu, trainer.args.torch_compile = 1, True
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"torch_compile=True with several processes. .*model\.compile\(\)"):
        trainer._begin_smart()
    trainer.args.torch_compile, trainer.is_fsdp_enabled = False, True
    with pytest.raises(ValueError, match=r"FSDP1. Say fsdp_config=\{'version': 2\}"):
        trainer._begin_smart()
    trainer.is_fsdp_enabled, trainer.is_fsdp_xla_enabled = False, True
    with pytest.raises(ValueError, match=r"torch_xla's FSDP. Use that of PyTorch"):
        trainer._begin_smart()


class Compiled(TrainerCallback):
    """After the second step a recompilation is an error."""

    def on_step_end(self, args, state, control, **_):
        torch._dynamo.config.error_on_recompile = state.global_step >= 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of a graph break
def test_torch_compile_is_the_same_training_and_compiles_nothing_twice(tmp_path):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "bf16": True, "noise": waves}
    trainers = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager", "callbacks": [Compiled()]}):
        model = bert(num_hidden_layers=1)
        model.accepts_loss_kwargs = False
        with torch._dynamo.config.patch(error_on_recompile=False):
            trainer = make(tmp_path, model, **settings, **compiled)
            trainer.train()
        with trainer.swap_teacher():
            trainers.append((trainer, trainer.evaluate(make_rows())["eval_loss"]))
    torch.compiler.reset()
    (plain, plain_loss), (trainer, loss) = trainers
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(weights(plain), weights(trainer), 1e-5)
    assert_same(plain.smart.teacher, trainer.smart.teacher, 1e-5)
    assert_logs_close(logged(plain), logged(trainer), 1e-5)
    assert loss == pytest.approx(plain_loss, rel=1e-5)


# two processes

WAYS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "find_unused_parameters": {"ddp_find_unused_parameters": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "labels that the loss shifts": {"shifted_labels": True, "accepts": True},
    "a loss that ignores num_items_in_batch": {"accepts": True},
}
PROCESS = """
import gc
import os
import sys
import warnings
import torch
import test_torch_transformers as tests

child = os.fork()  # the libraries are imported once
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
if child == 0:
    os.dup2(os.open(sys.argv[1] + "/1.log", os.O_WRONLY | os.O_CREAT), 2)
gc.freeze()  # as in conftest.py
for name, way in tests.WAYS.items():
    warnings.simplefilter("always" if "ignores" in name else "error", tests.SMARTWarning)
    trainer = tests.in_double(sys.argv[1] + "/run", **way, save_strategy="steps", save_steps=2)
    trainer.train()
    if name == "plain":
        tests.in_double(sys.argv[1] + "/run", max_steps=3).train(resume_from_checkpoint=True)
    found = {"weights": tests.weights(trainer), "teacher": trainer.smart.teacher, "logs": tests.logged(trainer)}
    found["seed"] = trainer.smart.state_dict()["seed"]
    torch.save(found, f"{sys.argv[1]}/{name}_{trainer.args.process_index}.pt")
torch.distributed.barrier()  # the threads of the last all-reduce are done: see docs/distributed.md
torch.distributed.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Shifting(transformers.GPT2LMHeadModel):
    pass


def in_double(folder, accepts=False, shifted_labels=False, **settings):
    model, rows = bert(dropout=0.0), None
    if shifted_labels:
        model, rows = gpt2(), make_rows(16, causal_labels)
        model.__class__ = Shifting
    model.accepts_loss_kwargs = accepts
    return make(folder, model.double(), rows, noise=waves, **settings)


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    status, _, own = in_a_session("-c", PROCESS, tmp_path, timeout=300, **address)
    errors = [own, (tmp_path / "1.log").read_text()]
    assert status == 0, errors
    assert all("and 2 process(es) it is 2 times what one large batch gives" in error for error in errors)
    for name, way in [*WAYS.items()][:-1]:
        settings = {key: value for key, value in way.items() if "label" in key or key == "accepts"}
        whole = in_double(tmp_path / "whole", per_device_train_batch_size=8, **settings)
        whole.train()
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for rank in range(2))
        for part, expected in (("weights", weights(whole)), ("teacher", whole.smart.teacher)):
            assert_same(first[part], second[part])
            assert_same(first[part], expected, 1e-6)
        assert first["logs"] == second["logs"]
        assert first["seed"] != second["seed"]
        names = ["R_s", "D_Breg", "max_delta", "vanished", "beta", "loss", "grad_norm"]
        found = [{key: row[key] for key in names} for row in first["logs"]]
        assert_logs_close(found, [{key: row[key] for key in names} for row in logged(whole)], 1e-6)


# the example


@pytest.fixture
def pretrained(tmp_path):
    """A tiny model and its tokenizer, as from_pretrained takes them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "good", "bad", "number"]
    folder = tmp_path / "tiny"
    bert().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def finetune(tmp_path, monkeypatch, capsys, pretrained):
    """The script, called with arguments: what it prints."""
    spec = importlib.util.spec_from_file_location("finetune_trainer", ROOT / "examples" / "finetune_trainer.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "finetune_trainer", module)
    spec.loader.exec_module(module)
    rows = [f"this is {'good' if i % 2 else 'bad'} number {i}\t{i % 2}" for i in range(16)]
    tsv = tmp_path / "rows.tsv"
    tsv.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")

    def call(*arguments):
        given = ["--train", tsv, "--dev", tsv, "--model", pretrained, "--output_dir", tmp_path / "out", "--use_cpu"]
        monkeypatch.setattr(sys, "argv", ["finetune_trainer.py", *map(str, [*given, "--save_steps", "2", *arguments])])
        module.main()
        return capsys.readouterr().out

    return call


def test_the_example_trains_and_resumes(finetune, tmp_path):
    out = tmp_path / "out"
    first = finetune("--max_steps", 4)
    assert "dev accuracy of the averaged weights: " in first
    assert f"last checkpoint: {out / 'checkpoint-4'}" in first
    before = torch.load(out / "checkpoint-4" / "smart_state.pt", weights_only=True)
    (out / "checkpoint-4" / "trainer_state.json").unlink()  # as if it had been killed while it saved
    again = finetune("--max_steps", 4, "--resume")
    assert first.splitlines()[-3:] == again.splitlines()[-3:]
    after = torch.load(out / "checkpoint-4" / "smart_state.pt", weights_only=True)
    assert_same(before["smart"]["teacher"], after["smart"]["teacher"])
    assert SMARTConfig.from_json((out / "smart_config.json").read_text()).total_steps == 4


def test_the_example_plain_and_with_bad_input(finetune, tmp_path):
    with pytest.raises(SystemExit, match="--resume: no checkpoint in"):
        finetune("--resume")
    with pytest.raises(SystemExit, match="no setting is called 'epsilom'; did you mean 'epsilon'"):
        finetune("--smart", '{"epsilom": 1}')
    printed = finetune("--max_steps", 2, "--plain")
    assert "dev accuracy: " in printed
    assert "averaged" not in printed
    assert not (tmp_path / "out" / "smart_config.json").exists()
