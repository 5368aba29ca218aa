"""Which positions the Trainer's penalty counts, and which l_s it uses: those of the task loss, whoever computes it."""

import copy
import warnings

import pytest
import torch
import transformers
from test_torch_transformers import (
    CONFIG,
    TOKENS,
    VOCABULARY,
    arguments,
    bert,
    causal_labels,
    every_token,
    gpt2,
    logged,
    make_rows,
    t5,
    waves,
)
from torch import nn
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput, TokenClassifierOutput

from smartreg.report import Choice, Description
from smartreg_torch import SMART, SMARTWarning, without_logits
from smartreg_torch.labels import Positions, find_divergence, find_positions
from smartreg_torch.probe import Probe, likely_offset
from smartreg_torch.transformers import SMARTMixin

cross_entropy = nn.functional.cross_entropy


class Watched(SMART):
    """Keeps what the Trainer says of the labels, and what l_s was used."""

    def __call__(self, *args, label_mask=None, **kwargs):
        found = super().__call__(*args, label_mask=label_mask, **kwargs)
        self.masks = [*getattr(self, "masks", []), label_mask]
        return found


def watched(folder, model, rows, base=Trainer, config=CONFIG, smart_settings=None, resume=None, **settings):
    """A trainer after its steps, with all rows in each batch."""
    own = ("compute_loss_func", "data_collator", "callbacks")
    given = {name: settings.pop(name) for name in own if name in settings}

    class Made(SMARTMixin, base):
        def create_smart(self, model, config):
            return Watched(model, config, noise=waves, **(smart_settings or {}))

    defaults = {"per_device_train_batch_size": len(rows), "max_steps": 2, "train_sampling_strategy": "sequential"}
    args = arguments(folder, **{**defaults, **settings})
    trainer = Made(model, args, train_dataset=rows, smart=config, **given)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def own_token(labels):
    return labels != -100


def next_token(labels):
    return nn.functional.pad(labels[:, 1:] != -100, (0, 1))


# whose labels are shifted


class Subclass(transformers.GPT2LMHeadModel):
    pass


class Shifted(Trainer):
    """Pops the labels and shifts them itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, output) if return_outputs else loss


class NotShifted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        labels[labels == labels.max()] = -100
        output = model(**inputs)
        loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return (loss, output) if return_outputs else loss


def subclass():
    model = gpt2()
    model.__class__ = Subclass
    return model


def lora(task="CAUSAL_LM"):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["c_attn"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that GPT-2's weights are stored the other way round
        return peft.get_peft_model(gpt2(), config)


def checkpointed():
    model = gpt2()
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    return model


def shifting(output, labels, num_items_in_batch=None):
    loss = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / (num_items_in_batch or (labels[:, 1:] != -100).sum())


LANGUAGE_MODELS = {
    "of the mapping": (gpt2, {}, next_token),
    "PEFT": (lora, {}, next_token),
    "a subclass": (subclass, {}, next_token),
    "a subclass, whose labels the smoother does not shift": (subclass, {"label_smoothing_factor": 0.1}, own_token),
    "label smoothing": (gpt2, {"label_smoothing_factor": 0.1}, next_token),
    "PEFT, label smoothing": (lora, {"label_smoothing_factor": 0.1}, next_token),
    "labels popped": (lora, {"base": Shifted}, next_token),
    "labels popped and written into": (gpt2, {"base": NotShifted}, lambda y: (y != -100) & (y != y.max())),
    "compute_loss_func": (lora, {"compute_loss_func": shifting}, next_token),
    "bfloat16": (subclass, {"bf16": True}, next_token),
    "checkpointed layers": (checkpointed, {}, next_token),
    "accumulated": (lora, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}, next_token),
    "sequence to sequence": (t5, {}, own_token),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_shift_is_the_losss(tmp_path, name):
    maker, settings, expected = LANGUAGE_MODELS[name]
    rows = make_rows(6, causal_labels)
    trainer = watched(tmp_path, maker(), rows, **settings)
    labels = transformers.default_data_collator(rows)["labels"]
    masks = torch.cat(trainer.smart.masks)
    assert torch.equal(masks, expected(labels).repeat(2, 1))
    assert logged(trainer)[0]["R_s"] > 0


class Small(nn.Module):
    """A language model that no mapping knows, and that is quickly compiled; test_torch_transformers.py has BERT."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embed(input_ids).cumsum(1).tanh())
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of a graph break
@pytest.mark.parametrize("settings", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}], ids=["own", "HF"])
def test_a_compiled_model(tmp_path, settings):
    rows, model = make_rows(4, causal_labels), Small()
    if not settings:
        model.compile(backend="eager")
    trainer = watched(tmp_path, model, rows, max_steps=1, **settings)
    plain = watched(tmp_path, Small(), rows, max_steps=1)
    torch.compiler.reset()
    assert torch.equal(trainer.smart.masks[0], next_token(torch.stack([row["labels"] for row in rows])))
    assert logged(trainer)[0]["R_s"] == pytest.approx(logged(plain)[0]["R_s"], rel=1e-4)
    assert (model._compiled_call_impl is None) == bool(settings)


def test_by_hand_behind_PEFT(tmp_path):
    """One answer token: D_Breg is the divergence at the position before it."""
    only_last = lambda ids, mask: ids.where(torch.arange(len(ids)) == 2, -100)  # noqa: E731
    rows, model = make_rows(4, only_last), lora().double()
    trainer = watched(tmp_path, model, rows, config=CONFIG.replace(lambda_s=0), optim="sgd", learning_rate=0.5)
    # the second step compares theta after the first step with theta~ after the first step
    model = lora().double().train()
    batch = transformers.default_data_collator(rows)
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(weights, gradients, strict=True):
            p -= 0.5 * g * min(1.0, 1 / (norm + 1e-6))
        z = model(**batch).logits.log_softmax(-1)
        for p, old in zip(weights, before, strict=True):
            p.lerp_(old, 0.5)  # beta is 0.5
        taught = model(**batch).logits.log_softmax(-1)
    by_hand = ((z.exp() - taught.exp()) * (z - taught)).sum(-1)[:, 1].mean()
    assert logged(trainer)[1]["D_Breg"] == pytest.approx(by_hand.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "shifted"),
    [
        (transformers.Qwen2ForCausalLM, True),
        (type("Mine", (transformers.Qwen2ForCausalLM,), {}), True),
        (transformers.LlavaForConditionalGeneration, True),
        (transformers.Qwen2_5_VLForConditionalGeneration, True),
        (transformers.BertForTokenClassification, False),
        (transformers.T5ForConditionalGeneration, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_taken_before_the_loss_was_asked(kind, shifted):
    labels = torch.tensor([[-100, -100, 5, 6, -100]])
    mask = Positions(likely_offset(object.__new__(kind))).mask(labels)
    assert torch.equal(mask, (next_token if shifted else own_token)(labels))
    assert Positions(likely_offset(lora())).mask(labels).tolist() == next_token(labels).tolist()


# outputs at other places than the labels


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
def test_virtual_tokens_of_prompt_tuning(tmp_path):
    peft = pytest.importorskip("peft")
    rows = make_rows(6, causal_labels)
    model = peft.get_peft_model(gpt2(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer = watched(tmp_path, model, rows)
    labels = transformers.default_data_collator(rows)["labels"]
    for mask in trainer.smart.masks:
        assert torch.equal(mask, nn.functional.pad(labels, (2, 1), value=-100) != -100)


class Multimodal(nn.Module):
    """Two image tokens in front, or at a place that differs by row; a label counts at its own token."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.image = nn.Parameter(torch.randn(2, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        places = [0] * len(x) if self.where == "front" else [i % 3 for i in range(len(x))]
        parts = [torch.cat([row[:k], self.image, row[k:]]) for row, k in zip(x, places, strict=True)]
        logits = self.head(torch.stack(parts).cumsum(1).tanh())
        aligned = torch.stack(
            [torch.cat([row[:k], row.new_full((2,), -100), row[k:]]) for row, k in zip(labels, places, strict=True)]
        )
        self.aligned = aligned
        return {"loss": cross_entropy(logits.flatten(0, 1), aligned.flatten()), "logits": logits}


@pytest.mark.parametrize("where", ["front", "in between"])
def test_image_tokens(tmp_path, where):
    torch.manual_seed(0)
    model = Multimodal(where)
    trainer = watched(tmp_path, model, make_rows(6, every_token_of_5), remove_unused_columns=False)
    for mask in trainer.smart.masks:
        assert torch.equal(mask, model.aligned != -100)


def every_token_of_5(ids, mask):
    return (ids % 5).where((mask == 1) & (torch.arange(len(ids)) != 1), -100)


class Speech(nn.Module):
    """CTC: a label has no frame of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, input_values, lengths, labels=None):
        logits = self.head(self.layer(input_values).cumsum(1).tanh())
        sizes = (labels != -100).sum(1)
        log_p = logits.log_softmax(-1).transpose(0, 1)
        loss = nn.functional.ctc_loss(log_p, labels.clamp(min=0), lengths, sizes)
        return CausalLMOutput(loss=loss, logits=logits)


def test_labels_of_ctc_that_are_as_long_as_the_frames(tmp_path):
    torch.manual_seed(0)
    rows = []
    for i in range(4):
        labels = torch.full((8,), -100)
        labels[: 2 + i % 2] = torch.tensor([1, 2, 3])[: 2 + i % 2]
        rows.append({"input_values": torch.randn(8, 3), "lengths": 8 - i, "labels": labels})
    trainer = watched(tmp_path, Speech(), rows, smart_settings={"site": "layer"}, remove_unused_columns=False)
    frames = torch.arange(8) < torch.tensor([8, 7, 6, 5])[:, None]
    assert len(trainer.smart.masks) == 2
    for mask in trainer.smart.masks:
        assert torch.equal(mask, frames)


class OwnToken(Trainer):
    """A label belongs to its own token, whatever the class of the model says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return (loss, output) if return_outputs else loss


def test_a_batch_without_labels_says_nothing_and_the_next_is_asked(tmp_path):
    rows = make_rows(8, causal_labels)
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)

    trainer = watched(tmp_path, gpt2(), rows, OwnToken, per_device_train_batch_size=4)
    assert not trainer.smart.masks[0].any()
    assert torch.equal(trainer.smart.masks[1], torch.stack([row["labels"] for row in rows[4:]]) != -100)


def test_a_resumed_run_does_not_ask_another_batch(tmp_path):
    calls = []

    class Counted(OwnToken):
        def compute_loss(self, *args, **kwargs):
            calls.append(self.state.global_step)
            return super().compute_loss(*args, **kwargs)

    rows = make_rows(4, causal_labels)
    settings = {"save_strategy": "steps", "save_steps": 1}
    watched(tmp_path, gpt2(), rows, Counted, max_steps=1, **settings)
    assert calls == [0, 0]
    resumed = watched(tmp_path, gpt2(), rows, Counted, max_steps=3, resume=tmp_path / "checkpoint-1", **settings)
    assert calls == [0, 0, 1, 2]
    labels = torch.stack([row["labels"] for row in rows])
    for mask in resumed.smart.masks:
        assert torch.equal(mask, labels != -100)


def test_full_labels_say_nothing_of_those_with_gaps(tmp_path):
    """As of CTC, whose first labels may be as many as the frames; here they are found in the second batch."""
    rows = make_rows(8, lambda ids, mask: ids % 3)
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["attention_mask"])
    for row in rows[4:]:
        row["labels"][2:4] = -100
    model = bert("TokenClassification", dropout=0.0, num_labels=3)
    trainer = watched(tmp_path, model, rows, per_device_train_batch_size=4)
    first, second = trainer.smart.masks
    assert first is None
    assert torch.equal(second, torch.stack([row["labels"] for row in rows[4:]]) != -100)


def test_an_ignore_index_of_ones_own(tmp_path):
    rows = make_rows(6, lambda ids, mask: (ids % 3).where(mask == 1, 3))

    def without_3(output, labels, num_items_in_batch=None):
        return cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=3)

    model = bert("TokenClassification", dropout=0.0, num_labels=3)
    trainer = watched(tmp_path, model, rows, compute_loss_func=without_3, smart_settings={"mask": lambda **_: None})
    for mask in trainer.smart.masks:
        assert torch.equal(mask, torch.stack([row["labels"] for row in rows]) != 3)


def test_positions_that_the_loss_leaves_out_for_reasons_of_its_own(tmp_path):
    def every_second(output, labels, num_items_in_batch=None):
        return cross_entropy(output.logits[:, ::2].flatten(0, 1), labels[:, ::2].flatten())

    model = bert("TokenClassification", dropout=0.0, num_labels=3)
    with pytest.warns(SMARTWarning, match=r"leaves out \d+ positions of the first batch that have a label"):
        watched(tmp_path, model, make_rows(6, every_token), compute_loss_func=every_second)


def test_a_loss_that_is_not_of_the_outputs(tmp_path):
    class Detached(transformers.BertForTokenClassification):
        def forward(self, input_ids, attention_mask, labels=None):
            output = super().forward(input_ids, attention_mask, labels=labels)
            return TokenClassifierOutput(loss=output.loss, logits=output.logits * 1.0)

    model = bert("TokenClassification", dropout=0.0, num_labels=3)
    model.__class__ = Detached
    rows = make_rows(6, every_token)
    with pytest.warns(SMARTWarning, match="does not show which positions it counts.*whose own token has a label"):
        trainer = watched(tmp_path, model, rows)
    assert torch.equal(trainer.smart.masks[0], torch.stack([row["labels"] for row in rows]) != -100)


def test_outputs_that_are_parts_of_the_models(tmp_path):
    rows = make_rows(6, causal_labels)
    trainer = watched(tmp_path, lora(), rows, smart_settings={"outputs": lambda output: output.logits[..., :20]})
    labels = torch.stack([row["labels"] for row in rows])
    assert torch.equal(trainer.smart.masks[0], next_token(labels))


# what asking leaves behind


class Counting(Trainer):
    """Keeps metrics, logs, and reads a reference first, as TRL's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept, self.tokens, self.seen = {"train": []}, 0, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            reference = model(**inputs).logits
        output = model(**inputs)
        again = model(**inputs)
        self.kept["train"].append(output.loss.item())
        self.tokens += int(inputs["attention_mask"].sum())
        self.log({"reference": float(reference.mean())})
        inputs["labels"] = inputs.pop("attention_mask")
        loss = output.loss + 0 * again.loss
        return (loss, output) if return_outputs else loss


def test_asking_leaves_nothing_behind(tmp_path):
    class Normed(transformers.GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.norm, self.forwards = nn.BatchNorm1d(16), 0

        def forward(self, input_ids, attention_mask, labels=None, **_):
            self.forwards += 1
            x = self.transformer(input_ids, attention_mask=attention_mask)[0]
            logits = self.lm_head(self.norm(x.transpose(1, 2)).transpose(1, 2))
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return CausalLMOutput(loss=loss, logits=logits)

    rows = make_rows(6, causal_labels)
    runs = []
    for asked in (True, False):
        torch.manual_seed(0)
        model = Normed(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY))
        config = CONFIG.replace(lambda_s=0, mu=1e-12)
        if asked:
            trainer = watched(tmp_path, model, rows, Counting, config=config)
            assert trainer.smart.masks[0].any()
            assert logged(trainer)[1]["D_Breg"] > 0  # the reference's call is not SMART's
        else:
            trainer = Counting(
                model,
                arguments(tmp_path, per_device_train_batch_size=6, train_sampling_strategy="sequential"),
                train_dataset=rows,
            )
            trainer.train()
        found = {name: value.clone() for name, value in model.state_dict().items()}
        logs = sum("reference" in row for row in trainer.state.log_history)
        runs.append((found, trainer.kept, (trainer.tokens, model.forwards), torch.get_rng_state(), logs))
    (found, kept, tokens, rng, logs), (plain, plain_kept, plain_tokens, plain_rng, plain_logs) = runs
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in found.items())
    assert kept["train"] == pytest.approx(plain_kept["train"], rel=1e-5)
    assert (tokens, logs) == (plain_tokens, plain_logs)
    assert torch.equal(rng, plain_rng)


def test_an_error_while_asking_leaves_nothing_behind(tmp_path):
    class Broken(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.count = getattr(self, "count", 0) + 1
            model(**inputs)
            raise OSError("no disk")

    model = gpt2()
    with pytest.raises(OSError, match="no disk"):
        watched(tmp_path, model, make_rows(6, causal_labels), Broken)
    assert "forward" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_logits_in_training(tmp_path):
    class Fused(transformers.GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask, labels=None):
            output = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            return CausalLMOutput(loss=output.loss, hidden_states=(output.logits,))

    model = gpt2()
    model.__class__ = Fused
    with pytest.raises(ValueError, match=r"no logits while it trains.*without_logits\(model\).*use_liger_kernel=False"):
        watched(tmp_path, model, make_rows(6, causal_labels))


class LigersWay(transformers.GPT2LMHeadModel):
    """Gives a loss and its hidden states."""

    def forward(self, input_ids, attention_mask, labels=None, **others):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, hidden_states=(hidden,))


class TRLsWay(LigersWay):
    """Gives the labels' log-probabilities, at the positions that have a label."""

    def forward(self, input_ids, attention_mask, labels=None, **others):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        found = -cross_entropy(self.lm_head(hidden[mask]), labels[:, 1:][mask], reduction="none")
        return CausalLMOutput(loss=-found.mean(), hidden_states=(torch.zeros_like(mask, dtype=found.dtype),))


@pytest.mark.parametrize("kind", [LigersWay, TRLsWay])
@pytest.mark.parametrize("wrapped", [False, True], ids=["all weights", "LoRA"])
def test_hidden_states_instead_of_logits(tmp_path, kind, wrapped):
    """The same penalties and weights as of the model with logits: the loss's gradient at h says what counts."""
    found = []
    for fused in (False, True):
        model = lora() if wrapped else gpt2()
        inside = model.get_base_model() if wrapped else model
        if fused:
            inside.__class__ = kind
        settings = {"outputs": without_logits(model)} if fused else {}
        rows = make_rows(6, causal_labels)
        found.append(watched(tmp_path, model, rows, smart_settings=settings, optim="sgd", learning_rate=0.1))
    logits, hidden = found
    for name, weight in hidden.model.named_parameters():
        torch.testing.assert_close(weight, logits.model.get_parameter(name), rtol=1e-4, atol=1e-6)
    for got, want in zip(*(logged(trainer, "loss", "R_s", "D_Breg") for trainer in (hidden, logits)), strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-7)
    assert all(torch.equal(*masks) for masks in zip(hidden.smart.masks, logits.smart.masks, strict=True))


# l_s


def popping(criterion, kind=None):
    class Popping(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            output = model(**inputs)
            loss = criterion(output.logits.squeeze(-1), labels if kind is None else labels.to(kind))
            return (loss, output) if return_outputs else loss

    return Popping


def several(ids, mask):
    return (ids[:3] % 2).float()


def fractions(ids, mask):
    return ids[:3] / VOCABULARY


def probabilities(ids, mask):
    return ids[:3].float().add(1).log_softmax(-1).exp()


bce, mse, huber = nn.functional.binary_cross_entropy_with_logits, nn.functional.mse_loss, nn.functional.huber_loss
BERNOULLI, SQUARED, SOFTMAX = "bernoulli_symmetric_kl", "squared_error", "symmetric_kl"
LOSSES = {
    "several labels": (popping(bce), several, 3, BERNOULLI),
    "several labels, as integers": (popping(bce, torch.float), lambda i, m: several(i, m).long(), 3, BERNOULLI),
    "several labels, weighted": (
        popping(lambda z, y: bce(z, y, pos_weight=torch.tensor([1.0, 3.0, 9.0]))),
        several,
        3,
        BERNOULLI,
    ),
    "several fractions": (popping(bce), fractions, 3, BERNOULLI),
    "one label": (popping(bce), lambda ids, mask: (ids.sum() % 2).float(), 1, BERNOULLI),
    "one label, as an integer": (popping(bce, torch.float), lambda ids, mask: ids.sum() % 2, 1, BERNOULLI),
    "several values": (popping(mse), lambda ids, mask: ids[:3].float(), 3, SQUARED),
    "several values between 0 and 1": (popping(mse), fractions, 3, SQUARED),
    "several values, Huber": (popping(huber), lambda ids, mask: ids[:3] / 3.0 - 2, 3, SQUARED),
    "one value": (popping(mse), lambda ids, mask: ids.sum() / 50.0, 1, SQUARED),
    "probabilities of the classes": (popping(cross_entropy), probabilities, 3, SOFTMAX),
}


@pytest.mark.parametrize("name", LOSSES)
def test_l_s_is_the_losss(tmp_path, name):
    base, label, num_labels, expected = LOSSES[name]
    rows, model = make_rows(8, label), bert(dropout=0.0, num_labels=num_labels)
    batch, twin = transformers.default_data_collator(rows), copy.deepcopy(model).train()
    trainer = watched(tmp_path, model, rows, base)
    del batch["labels"]
    with SMART(twin, CONFIG.replace(total_steps=2), noise=waves, divergence=expected) as smart:
        smart(**batch)
    assert logged(trainer)[0]["R_s"] == pytest.approx(smart.metrics["R_s"], rel=1e-5)
    told = watched(tmp_path, bert(dropout=0.0, num_labels=3), make_rows(8, several), base, max_steps=1, **TOLD)
    assert told.smart.describe()["l_s"] == (SOFTMAX, "divergence=")  # whatever the loss is


TOLD = {"smart_settings": {"divergence": SOFTMAX}}


def test_one_logit_a_token(tmp_path):
    sizes = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = transformers.ElectraForPreTraining(
        transformers.ElectraConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    )
    trainer = watched(tmp_path, model, make_rows(6, lambda ids, mask: ids % 2), max_steps=1)
    assert trainer.smart.describe()["l_s"].value == BERNOULLI


def test_labels_by_another_name(tmp_path):
    class Tags(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            tags = inputs.pop("tags")
            output = model(**inputs)
            loss = cross_entropy(output.logits.flatten(0, 1), tags.flatten())
            return (loss, output) if return_outputs else loss

    rows = [{**row, "tags": row.pop("labels")} for row in make_rows(6, every_token)]
    model = bert("TokenClassification", dropout=0.0, num_labels=3)
    trainer = watched(tmp_path, model, rows, Tags, label_names=["tags"])
    assert torch.equal(trainer.smart.masks[0], torch.stack([row["tags"] for row in rows]) != -100)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (("told", (-1, 0, ()), SOFTMAX, -1), "d loss / d outputs: a label at i has its output at i-1"),
        (("told", (2, 3, (0,)), SOFTMAX, 1), "a label at i has its output at i+2, but for the label 0, which does not"),
        (("each", None, BERNOULLI, None), "in one more forward pass a step: no shift explains the labels"),
        (("all", None, None, None), "the default"),
        (("all", None, "log_cosh", None), "the default"),
    ],
)
def test_what_the_loss_said_is_the_reason(state, expected):
    probe = Probe()
    smart = SMART(nn.Sequential(nn.Embedding(9, 4)), CONFIG.replace(total_steps=1))
    with smart:
        probe.load_state_dict(dict(zip(("state", "positions", "divergence", "axis"), state, strict=True)), smart)
    description = probe.explain(
        Description({name: Choice("?", "the default") for name in ("site", "l_s", "class axis", "positions")})
    )
    assert expected in description["positions"].why
    assert description["site"].why == "the default"
    assert ("sums to 0" in description["class axis"].why) == (state[3] is not None)
    assert ("sigma" in description["l_s"].why) == (state[2] == BERNOULLI)
    assert ("that of its loss" in description["l_s"].why) == (state[2] == "log_cosh")
    if state[2] is not None:
        assert smart._reader.divergence == state[2]


class Tagger(nn.Module):
    """Classes on axis 1, as nn.CrossEntropyLoss takes them; as many tokens as classes."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, TOKENS)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.embed(input_ids).cumsum(1).tanh()).transpose(1, 2)}


class Tagging(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = cross_entropy(output["logits"], labels)
        return (loss, output) if return_outputs else loss


def test_the_axis_of_the_classes_is_the_losss(tmp_path):
    torch.manual_seed(0)
    model, rows = Tagger(), make_rows(6, every_token)
    twin = copy.deepcopy(model).train()
    trainer = watched(tmp_path, model, rows, Tagging, remove_unused_columns=False)
    batch = transformers.default_data_collator(rows)
    labels = batch.pop("labels")
    with SMART(twin, CONFIG.replace(total_steps=2), noise=waves, class_axis=1) as smart:
        smart(**batch, label_mask=labels != -100)
    assert logged(trainer)[0]["R_s"] == pytest.approx(smart.metrics["R_s"], rel=1e-5)


def test_labels_that_nothing_explains_are_asked_for(tmp_path):
    def neither(z, y):
        return (z - y).square().square().mean() - z.sigmoid().square().sum()

    with pytest.raises(ValueError, match="neither they nor the gradient of the task loss tell SMART"):
        watched(tmp_path, bert(num_labels=3), make_rows(8, fractions), popping(neither))


# the two questions, without a Trainer


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("loss", "y", "expected"),
    [
        (cross_entropy, "classes", SOFTMAX),
        (lambda z, y: cross_entropy(z, y, weight=torch.tensor([1.0, 2, 3, 4]).double()), "classes", SOFTMAX),
        (lambda z, y: cross_entropy(z, y, label_smoothing=0.2), "classes", SOFTMAX),
        (cross_entropy, "probabilities", SOFTMAX),
        (bce, "bits", BERNOULLI),
        (bce, "one-hot", BERNOULLI),
        (lambda z, y: bce(z, y, pos_weight=torch.tensor(7.0)), "bits", BERNOULLI),
        (mse, "bits", SQUARED),
        (mse, "normal", SQUARED),
        (nn.functional.l1_loss, "normal", SQUARED),
        (huber, "normal", SQUARED),
    ],
)
def test_find_divergence(seed, loss, y, expected):
    torch.manual_seed(seed)
    z = torch.randn(12, 4, dtype=torch.float64).mul(2).requires_grad_()
    labels = {
        "classes": torch.randint(4, (12,)),
        "probabilities": torch.randn(12, 4).double().softmax(-1),
        "bits": torch.randint(2, (12, 4)).double(),
        "one-hot": torch.eye(4).double()[torch.randint(4, (12,))],
        "normal": torch.randn(12, 4).double(),
    }[y]
    (gradient,) = torch.autograd.grad(loss(z, labels), z)
    assert find_divergence(z, gradient, None if y == "classes" else labels) == expected
    assert find_divergence(z, 0 * gradient, labels) is None


@pytest.mark.parametrize(
    ("counted", "labels", "expected"),
    [
        ([[1, 1, 0, 0]], [[1, 2, -100, -100]], ((0, 0, ()), 0)),
        ([[1, 1, 0, 0]], [[-100, 1, 2, -100]], ((-1, 0, ()), 0)),
        ([[1, 1, 1, 0]], [[1, 2, 3, 4]], ((-1, 0, ()), 0)),
        ([[0, 0, 1, 1, 0]], [[1, 2, -100]], ((2, 2, ()), 0)),
        ([[0, 0, 1, 1, 0]], [[-100, 1, 2]], ((1, 2, ()), 0)),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], [[5, 7, 0, 0], [7, 6, 5, 0]], ((0, 0, (0,)), 0)),
        ([[1, 1, 1, 1]], [[1, 2, -100, -100]], None),
    ],
)
def test_find_positions(counted, labels, expected):
    gradient = torch.tensor(counted).float().unsqueeze(-1)
    found = find_positions(gradient, gradient, torch.tensor(labels))
    assert found == (None if expected is None else (Positions(*expected[0]), expected[1]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("true", [0, -1])
@pytest.mark.parametrize("taken", [0, -1])
@pytest.mark.parametrize("certain", [False, True])
def test_find_positions_of_a_loss_with_a_mask_of_its_own(seed, true, taken, certain):
    torch.manual_seed(seed)
    labels, z = torch.randint(5, (4, 8)), torch.randn(4, 8, 5)
    aligned = Positions(true).align(labels)
    if certain:  # of which the loss is 0, and its gradient too
        z[:, 3] = nn.functional.one_hot(aligned[:, 3], 5) * 1000.0
    else:
        aligned[:, 1:4] = -100
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(z.flatten(0, 1), aligned.flatten()), z)
    positions, left_out = find_positions(z, gradient, labels, taken)
    assert positions == Positions(true)
    assert left_out == (4 if certain else 12)
