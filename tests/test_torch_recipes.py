"""The recipes of docs/recipes.md and the examples that go with them: resumed, accumulated, killed."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from architectures import VOCABULARY, classifier
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")
pytest.importorskip("datasets")  # for sentence-transformers' Trainer
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from paper_settings import papers  # noqa: E402

import smartreg_torch  # noqa: E402
from smartreg_torch import SMART, SMARTConfig  # noqa: E402
from smartreg_torch.divergences import symmetric_kl  # noqa: E402

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# ```py, not ```python: test_torch_docs.py runs those, with one model for a whole page
BLOCKS = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)

# the frameworks' own
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def recipe(having, **names):
    """Run the block of docs/recipes.md that has this text."""
    (block,) = [block for block in BLOCKS if having in block]
    exec(compile(block, "docs/recipes.md", "exec"), names)
    del names["__builtins__"]
    return names


def rows(n=32):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (n, 7), generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    mask = torch.ones(7, dtype=torch.long)
    return [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]


def bert(dropout=0.1):
    torch.manual_seed(0)
    return classifier("Bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)()


def weights(smart):
    found = {name: value.detach().clone() for name, value in smart.model.named_parameters()}
    return found | {f"teacher {name}": value.clone() for name, value in smart.teacher.items()}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 0
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def relative_difference(a, b):
    """Of theta and theta~, to how far theta moved."""
    a, b = weights(a), weights(b)
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-3)) for name in a)


@pytest.fixture
def seen(monkeypatch):
    """R_s and D_Breg of every batch."""
    metrics, call = [], SMART.__call__

    def noted(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        metrics.append((self.metrics["R_s"], self.metrics["D_Breg"]))
        return result

    monkeypatch.setattr(SMART, "__call__", noted)
    return metrics


def taken(seen):
    """What was seen since the last call."""
    found = [*seen]
    seen.clear()
    assert all(R_s > 0 for R_s, _ in found)
    return found


def test_every_recipe_is_under_20_lines():
    accelerate, lightning, *sentences, score, save, language, trl, projection, loop, trainer = BLOCKS
    for block in (accelerate, lightning, "".join(sentences), score, save, language, trl, projection, loop, trainer):
        lines = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(lines) < 20, block


@pytest.fixture
def strong(monkeypatch):
    """The recipes' SMARTConfig with a penalty of the size of the loss."""
    config = partial(SMARTConfig, lambda_s=1e3, mu=1e3, epsilon=1.0, sigma=1.0, beta_early=0.5, beta_late=0.5)
    monkeypatch.setattr(smartreg_torch, "SMARTConfig", config)


def fit_accelerate(folder, *, done=0, model=None, optimizer=torch.optim.AdamW, loader=None, accumulate=4, epochs=3):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(1)
    model = bert() if model is None else model
    names = {
        "model": model,
        "optimizer": optimizer(model.parameters(), lr=1e-2),
        "loader": DataLoader(rows(), 4, shuffle=True) if loader is None else loader,
        "accumulate": accumulate,
        "epochs": epochs,
        "done": done,
        "folder": folder,
    }
    return recipe("Accelerator", **names)["smart"]


def test_accelerate_resumes_bit_for_bit(tmp_path, seen):
    whole = fit_accelerate(tmp_path)
    metrics = taken(seen)
    assert len(metrics) == 24
    assert whole.step == 6  # attach: once a real step
    resumed = fit_accelerate(tmp_path, done=1)
    assert resumed.step == 6
    assert taken(seen) == metrics[8:]
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_accelerate_accumulates_as_the_large_batch(tmp_path, strong):
    small, large = (
        fit_accelerate(
            tmp_path,
            model=bert(dropout=0).double(),
            optimizer=torch.optim.SGD,
            loader=DataLoader(rows(), 16 // accumulate),
            accumulate=accumulate,
        )
        for accumulate in (4, 1)
    )
    assert small.step == large.step == 6
    assert 1e3 * large.metrics["R_s"] > 1e-3
    assert relative_difference(small, large) < 1e-6


class Noted(lightning.Callback):
    """What was logged after each batch."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(trainer.callback_metrics[name]) for name in ("R_s", "D_Breg")})


def fit_lightning(folder, *, resume=None, model=None, loader=None, accumulate=4, epochs=3):
    torch.manual_seed(1)
    noted = Noted()
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[keep, noted],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = recipe("LightningModule")["Classifier"](bert().eval() if model is None else model)
    loader = DataLoader(rows(), 4, shuffle=True) if loader is None else loader
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return module, noted.logged


def test_lightning_resumes_bit_for_bit(tmp_path):
    whole, logged = fit_lightning(tmp_path)
    assert len(logged) == 24
    assert whole.smart.step == 6
    assert all(metrics["R_s"] > 0 for metrics in logged)
    resumed, logged_after = fit_lightning(tmp_path / "resumed", resume=tmp_path / "epoch=0.ckpt")
    assert resumed.smart.step == 6
    assert logged_after == logged[8:]
    assert largest_difference(weights(whole.smart), weights(resumed.smart)) == 0


def test_lightning_keeps_smart_out_of_the_module(tmp_path):
    module, _ = fit_lightning(tmp_path, epochs=1)
    assert {name for name, _ in module.named_children()} == {"model"}
    assert module.state_dict().keys() == {f"model.{name}" for name in module.model.state_dict()}
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == module.state_dict().keys()
    assert checkpoint["smart"].keys() == module.smart.state_dict().keys()


def test_lightning_accumulates_as_the_large_batch(tmp_path, monkeypatch, strong):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    small, large = (
        fit_lightning(
            tmp_path / str(accumulate),
            model=bert(dropout=0).double(),
            loader=DataLoader(rows(), 16 // accumulate),
            accumulate=accumulate,
        )[0].smart
        for accumulate in (4, 1)
    )
    assert small.step == large.step == 6
    assert 1e3 * large.metrics["R_s"] > 1e-3
    assert relative_difference(small, large) < 1e-6


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "this",
    "is",
    "good",
    "bad",
    "number",
    *map(str, range(VOCABULARY - 10)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, as Hugging Face saves one."""
    path = str(tmp_path_factory.mktemp("model"))
    tokenizer = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {f"{word[1:-1].lower()}_token": word for word in WORDS[:5]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    classifier("Bert")().base_model.save_pretrained(path)
    return path


def sentence_transformer(folder, dropout):
    """Embeddings of length 1."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = SentenceTransformer(folder, device="cpu")
    model.append(Normalize())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def real(features):
    return features["attention_mask"]


def pairs(n=32):
    from datasets import Dataset

    columns = {"a": [f"this is good number {i}" for i in range(n)], "b": [f"this is bad {i}" for i in range(n)]}
    return Dataset.from_dict({**columns, "label": [i / n for i in range(n)]})


def fit_sentences(folder, out, *, resume=None, accumulate=1, dropout=0.1, double=False, on_score=False, epochs=3):
    from sentence_transformers import SentenceTransformerTrainingArguments

    model = sentence_transformer(folder, dropout)
    model = model.double() if double else model
    arguments = SentenceTransformerTrainingArguments(
        str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=16 // accumulate,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2) if double else torch.optim.AdamW(model.parameters())
    names = {"model": model, "args": arguments, "dataset": pairs(), "steps": 2 * epochs, "optimizer": optimizer}
    # the columns are drawn in turn, so that a batch and its quarters would draw in another order
    drawn = torch.randn(64, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    noise = (lambda like: drawn[: like.shape[1]].expand_as(like)) if double else None
    with mock.patch("smartreg_torch.SMART", partial(SMART, noise=noise)):
        names = recipe("SentenceTransformerTrainer(", **names, **recipe("class SMARTLoss"))
    smart, trainer = names["smart"], names["trainer"]
    if on_score:
        smart.remove()
        names = recipe("class Score(", model=model, steps=2 * epochs, optimizer=optimizer)
        smart, trainer.loss = names["smart"], names["loss"]
    trainer.add_callback(recipe("class SaveSMART")["SaveSMART"](smart))
    if resume is not None:
        smart.load_state_dict(torch.load(resume / "smart.pt"))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return smart, [entry for entry in trainer.state.log_history if "smart" in entry]


@pytest.mark.parametrize("on_score", [False, True], ids=["embeddings", "score"])
def test_sentence_transformers_resume_bit_for_bit(folder, tmp_path, seen, on_score):
    whole, logged = fit_sentences(folder, tmp_path, on_score=on_score)
    metrics = taken(seen)
    assert len(logged) == whole.step == 6
    assert len(metrics) == (6 if on_score else 12)
    assert max(entry["smart"] for entry in logged) > 0
    resumed, logged_after = fit_sentences(folder, tmp_path, resume=tmp_path / "checkpoint-2", on_score=on_score)
    assert resumed.step == 6
    assert taken(seen) == metrics[len(metrics) // 3 :]
    assert logged_after == logged
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_sentence_transformers_accumulate_as_the_large_batch(folder, tmp_path, strong):
    small, large = (
        fit_sentences(folder, tmp_path, accumulate=accumulate, dropout=0.0, double=True)[0] for accumulate in (4, 1)
    )
    assert small.step == large.step == 6
    assert 1e3 * large.metrics["R_s"] > 1e-3
    assert relative_difference(small, large) < 1e-6


@pytest.mark.parametrize("name", ["CosineSimilarityLoss", "MSELoss", "MultipleNegativesRankingLoss"])
def test_the_loss_itself_stays(folder, name):
    from sentence_transformers.sentence_transformer import losses

    model = sentence_transformer(folder, dropout=0.0).train()
    smart = SMART(model, papers(mu=0), outputs="sentence_embedding", divergence="squared_error", mask=real)
    columns = [model.preprocess([f"this is {word} {i}" for i in range(4)]) for word in ("good", "bad")]
    labels = {"CosineSimilarityLoss": torch.rand(4), "MSELoss": torch.rand(4, 16)}.get(name)
    loss = getattr(losses, name)(model)
    smart_loss = recipe("class SMARTLoss")["SMARTLoss"](loss, smart)
    if name == "MSELoss":
        of_columns, each = loss.compute_loss_from_embeddings, len(columns)
        loss.compute_loss_from_embeddings = lambda embeddings, labels: of_columns(embeddings, [labels] * each)
    found = smart_loss([dict(column) for column in columns], labels)
    loss.__dict__.pop("compute_loss_from_embeddings", None)
    torch.testing.assert_close(found["task"], loss([dict(column) for column in columns], labels))
    assert found["smart"] > 0


def test_the_penalty_of_embeddings_is_the_squared_distance(folder):
    """Written out by hand: R_s of one column at the perturbation that SMART found."""
    model = sentence_transformer(folder, dropout=0.0).train()
    config = papers(mu=0, lambda_s=1.0, epsilon=0.5, sigma=0.5)
    names = {"outputs": "sentence_embedding", "divergence": "squared_error"}
    seen = []
    smart = SMART(model, config, mask=real, on_step=seen.append, **names)
    features = model.preprocess(["this is good", "this is bad number 3"])
    _, penalty = smart(features)
    (delta,) = seen[0].delta
    assert (delta[0, features["attention_mask"][0] == 0] == 0).all()
    assert (features["attention_mask"][0] == 0).any()
    clean = model(dict(features))["sentence_embedding"]
    embedding = model[0].auto_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output + delta)
    moved = model(dict(features))["sentence_embedding"]
    handle.remove()
    assert penalty.item() == pytest.approx((moved - clean).square().sum(-1).mean().item(), rel=1e-5)


DIES = """
import json, os, runpy, signal, sys
import accelerate, lightning, sentence_transformers
from smartreg_torch import SMART

def dies(calls):
    call = SMART.__call__
    def counted(self, *args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *args, **kwargs)
    return counted

for script, calls, arguments in json.loads(sys.argv[1]):
    if os.fork() == 0:
        SMART.__call__ = dies(calls)
        sys.argv = [script, *arguments]
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
        os._exit(1)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, script
"""
# in which call of SMART it is killed, whether its rows have scores, and what it says at the end
KILLED = {  # 6 batches an epoch
    "finetune_accelerate.py": (11, False, r"accuracy [\d.]+% on 24 rows after 6 steps"),
    "finetune_lightning.py": (9, False, r"R_s .*, D_Breg .*, accuracy [\d.]+ after 6 steps, on 24 rows"),
    "finetune_sentence_transformers.py": (17, True, r"Spearman .*% before, .*% after 18 steps, on 24 rows"),
}


def arguments(script, folder, rows, out):
    """The command line of an example, without --resume."""
    data = ["--train", rows, "--dev", rows, "--batch-size", 4, "--examples", 24, "--epochs", 3]
    more = ["--save-every", 1] if "accelerate" in script else []
    return [*map(str, data), "--model", folder, "--learning-rate", "1e-3", *map(str, more), "--out", str(out / script)]


def table(scored, path):
    """Rows of one sentence and a class, or of two and a score, which each of the examples takes."""
    header, line = "a\tlabel", "this is number {0}\t{2}"
    if scored:
        header, line = "a\tb\tscore", "this is good {0}\tthis is bad number {0}\t{1:.2f}"
    path.write_text("\n".join([header, *(line.format(i, i / 7, i % 2) for i in range(24))]) + "\n")
    return path


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
    """What each example left, and its rows: one process imports their libraries, and each dies in a fork of it."""
    out = tmp_path_factory.mktemp("killed")
    tables = [table(scored, out / f"{'scores' if scored else 'classes'}.tsv") for scored in (False, True)]
    jobs = [
        (str(EXAMPLES / script), calls, arguments(script, folder, tables[scored], out))
        for script, (calls, scored, _) in KILLED.items()
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIES, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return out, tables


def run_example(script, monkeypatch, *arguments):
    """As a user runs it, but in this process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("script", KILLED)
def test_an_example_killed_on_the_way_ends_where_it_would_have(script, killed, folder, tmp_path, monkeypatch, capsys):
    out, tables = killed
    _, scored, reached = KILLED[script]
    assert (out / script).exists()
    assert not (out / script / "model").exists()
    models = []
    for place, resume in ((tmp_path, []), (out, ["--resume"])):
        run_example(script, monkeypatch, *arguments(script, folder, tables[scored], place), *resume)
        assert re.search(reached, capsys.readouterr().out)
        models.append(safetensors.torch.load_file(place / script / "model" / "model.safetensors"))
    assert largest_difference(*models) == 0


def unlabelled(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_text_without_labels_in_a_loop():
    """The gradient is that of L + R_s of both batches."""
    model = bert(dropout=0.0).double().train()
    loader = DataLoader(rows(16), 8)
    more = [unlabelled(batch) for batch in DataLoader(rows(32), 8)][2:]
    seen = []
    smart = SMART(model, SMARTConfig(lambda_s=2.0, total_steps=2), on_step=seen.append)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe("= cycle(unlabelled)  # batches", smart=smart, unlabelled=more, loader=loader, optimizer=optimizer)
    assert len(seen) == 4  # two steps of two batches
    assert smart.step == 2
    smart.remove()
    by_hand = bert(dropout=0.0).double().train()
    by_hand.load_state_dict(start, strict=False)
    other = SMART(by_hand, SMARTConfig(lambda_s=2.0, total_steps=2))
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for batch, extra in zip(loader, more, strict=True):
        (first, penalty), (_, second) = other(**batch), other(**extra)
        (first.loss + penalty + second).backward()
        optimizer.step()
        optimizer.zero_grad()
        other.update()
    assert all(map(torch.equal, model.parameters(), by_hand.parameters()))


def test_text_without_labels_in_the_trainer(tmp_path):
    model = bert(dropout=0.0)
    names = recipe("class WithUnlabelled")
    more = [unlabelled(batch) for batch in DataLoader(rows(32), 8)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = names["WithUnlabelled"](model, args, train_dataset=rows(16), smart=SMARTConfig(), unlabelled=more)
    batch = next(iter(DataLoader(rows(8), 8)))
    trainer.train()
    assert trainer.smart.step == 3
    assert trainer.smart.metrics["R_s"] > 0
    model.eval()
    assert torch.equal(trainer.compute_loss(model, batch), model(**batch).loss)


def a_language_model():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    own = tokenizers.Tokenizer(WordLevel(words, unk_token="<pad>"))
    own.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=2, pad_token_id=0)
    return transformers.GPT2LMHeadModel(config), tokenizer


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_language_model_with_lora_in_the_trainer(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = a_language_model()
    weight = model.lm_head.weight.detach().clone()
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True
    )
    rows = [tokenizer(" ".join("abcdefgh"[i % 4 :])) for i in range(8)]
    trainer = recipe("DataCollatorForLanguageModeling", model=model, args=args, rows=rows, tokenizer=tokenizer)[
        "trainer"
    ]
    assert trainer.smart.step == 2
    assert trainer.smart.metrics["R_s"] > 0
    assert trainer.smart.describe()["positions"].value == "those of attention_mask"
    assert torch.equal(trainer.model.get_output_embeddings().weight, weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["all weights", "LoRA"])
def test_trls_trainer(tmp_path, monkeypatch, wrapped):
    """The penalty is that of the logits, which TRL's own training never has."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = a_language_model()
    weight = model.lm_head.weight.detach().clone()
    seen = []

    class Watched(SMART):
        def __init__(self, model, config, **settings):
            super().__init__(model, config, on_step=seen.append, **settings)

    monkeypatch.setattr(smartreg_torch, "SMART", Watched)
    if wrapped:
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, lora)
    given = {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    args = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, **given)
    rows = datasets.Dataset.from_list([{"text": " ".join("abcdefgh"[i % 4 :])} for i in range(8)])
    trainer = recipe("SFTTrainer", model=model, args=args, rows=rows, tokenizer=tokenizer)["trainer"]
    first = seen[0]
    assert first.outputs[0].shape == (4, 9, len(tokenizer))
    labelled = first.positions[0]
    assert torch.equal(labelled[:, :-1].any(0), torch.ones(8, dtype=torch.bool))
    R_s = symmetric_kl(first.perturbed[0], first.outputs[0], labelled).mean()
    torch.testing.assert_close(torch.tensor(trainer.state.log_history[0]["R_s"]), R_s, rtol=1e-4, atol=0)
    assert float(R_s) > 0
    assert torch.equal(trainer.model.get_output_embeddings().weight, weight) == wrapped
