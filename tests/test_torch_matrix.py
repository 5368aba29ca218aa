"""Every architecture x {train step, accumulation, checkpointing, autocast}, and what does not work, with its message.

`docs/architectures.md` is written from these runs: `python tools/make_architectures.py`.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import (
    ARCHITECTURES,
    VOCABULARY,
    N,
    classes,
    classifier,
    labels,
    language,
    loss_of,
    text,
    without_onednn,
)
from paper_settings import papers
from torch import nn
from torch.utils.checkpoint import checkpoint

from smartreg_torch import SMART

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
CONFIG = papers(total_steps=10)
# R_s and D_Breg apart, since one may be 1000 times the other; a radius whose effect is far above the outputs' rounding
FAR = CONFIG.replace(epsilon=0.1, sigma=0.1, eta=0.1)
TERMS = [FAR.replace(mu=0), FAR.replace(lambda_s=0)]
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
TOLERANCE = 100 * torch.finfo(torch.float32).eps


def seed(value):
    torch.manual_seed(value)
    np.random.seed(value)  # SpecAugment's


def started(name):
    seed(0)
    architecture = ARCHITECTURES[name]
    return architecture.make().train(), architecture.inputs()


def penalised(model, inputs, config, dtype=None, **settings):
    """The penalty and its gradient, with a theta~ that is not theta, and the same dropout and noise every time."""
    seed(1)
    with SMART(model, config, **settings) as smart, torch.autocast("cpu", dtype, enabled=dtype is not None):
        for average in smart.teacher.values():
            average.mul_(0.9)
        penalty = smart(**inputs)[1]
    penalty.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return penalty.detach(), gradient


def distance(a, b):
    return float((a - b).norm() / b.norm())


# what a cell says


def site(name):
    model, _ = started(name)
    with SMART(model, CONFIG, **ARCHITECTURES[name].settings) as smart:
        return f"`{smart.describe()['site'].value}`"


def outputs(name):
    model, inputs = started(name)
    seen = []
    with SMART(model, CONFIG, on_step=seen.append, **ARCHITECTURES[name].settings) as smart:
        output, _ = smart(**inputs)
        names = smart.describe()["outputs"].value.split(", ")
    shapes = [f"({', '.join(['n', *map(str, z.shape[1:])])})" for z in seen[0].outputs]
    if isinstance(output, torch.Tensor):
        return f"the tensor {shapes[0]}"
    return ", ".join(f"`{name}` {shape}" for name, shape in zip(names, shapes, strict=True))


def train_step(name):
    """Two AdamW steps on loss + penalty: all of it finite, R_s and D_Breg positive, and the weights move."""
    model, inputs = started(name)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with SMART(model, CONFIG, **ARCHITECTURES[name].settings) as smart:
        for _ in range(2):
            output, penalty = smart(**inputs)
            (loss_of(output) + penalty).backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
    assert smart.metrics["R_s"] > 0
    assert smart.metrics["D_Breg"] > 0
    assert 0 < smart.metrics["max_delta"] < float("inf")
    assert smart.metrics["skipped"] == 0
    assert smart.metrics["vanished"] < 0.5
    moved = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return "yes"


class Noise:
    """Rows of one standard normal draw for each call of the site, so that an example has its own in any batch."""

    def __init__(self):
        self.rows, self.call = slice(N), 0

    def __call__(self, like):
        drawn = torch.randn(N, *like.shape[1:], generator=torch.Generator().manual_seed(self.call)).to(like.dtype)
        self.call += 1
        return drawn[self.rows]


def accumulated(model, inputs, parts, config, settings):
    """The gradient of the penalty over the batch, in equal parts."""
    noise, total = Noise(), 0
    for part in range(parts):
        noise.rows, noise.call = slice(part * N // parts, (part + 1) * N // parts), 0
        given = {key: value[noise.rows] for key, value in inputs.items()}
        total = total + penalised(model, given, config, noise=noise, **settings)[1] / parts
    return total


def apart_in_parts(model, inputs, settings):
    """How far two micro-batches are from the whole batch: the larger of R_s's and D_Breg's."""
    return max(distance(*(accumulated(model, inputs, parts, config, settings) for parts in (2, 1))) for config in TERMS)


def accumulation(name):
    """Two micro-batches give the gradient of the whole batch. Dropout is off: its masks are drawn by batch."""
    model, inputs = started(name)
    settings = ARCHITECTURES[name].settings
    for module in model.modules():
        module.training = module is model
    apart = apart_in_parts(model, inputs, settings)
    if name == "CLIP":
        assert apart > 0.1
        return "no: an example's logits are over its batch, in the task loss too"
    assert apart <= torch.finfo(torch.float32).eps ** 0.5  # R_s is of squares of small differences
    normalised = [module for module in model.modules() if isinstance(module, BATCH_NORM)]
    if not normalised:
        return "yes"
    for module in normalised:
        module.train()
    assert apart_in_parts(model, inputs, settings) > 0.1
    return "yes with BatchNorm in eval mode; else its statistics are the micro-batch's, in the task loss too"


def checkpointing(name):
    """The same penalty and gradient with layers that run again in the backward pass."""
    return "yes" if all(same_as_plain(name, change=checkpointed)) else "the model has none"


def same_as_plain(name, dtype=None, change=lambda model: model):
    """Each term's penalty and gradient, with the change or under autocast to the dtype; what the changes give."""
    settings, found = ARCHITECTURES[name].settings, []
    for config in TERMS:
        model, inputs = started(name)
        expected, expected_gradient = penalised(model, inputs, config, **settings)
        model, inputs = started(name)
        found.append(change(model))
        got, gradient = penalised(model, inputs, config, dtype, **settings)
        assert distance(got, expected) <= TOLERANCE
        assert distance(gradient, expected_gradient) <= TOLERANCE
    return found


def checkpointed(model):
    """Switch it on where the model has it; a list that grows with every checkpointed layer that runs."""
    ran = []

    def counted(function):
        return lambda *args, **kwargs: ran.append(function) or function(*args, **kwargs)

    outermost = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    if outermost is not None and outermost.supports_gradient_checkpointing:
        outermost.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = counted(module._gradient_checkpointing_func)
    return ran


@without_onednn()
def autocast(name):
    """Under bfloat16 autocast the penalty and its gradient are those of float32, and the step is finite."""
    same_as_plain(name, torch.bfloat16)
    settings, (model, inputs) = ARCHITECTURES[name].settings, started(name)
    with SMART(model, CONFIG, **settings) as smart, torch.autocast("cpu", torch.bfloat16):
        output, penalty = smart(**inputs)
        loss = loss_of(output) + penalty
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return "yes"


COLUMNS = {
    "site": site,
    "outputs": outputs,
    "train step": train_step,
    "accumulation": accumulation,
    "checkpointing": checkpointing,
    "autocast": autocast,
}


# what does not work


def run(model, inputs, **settings):
    with SMART(model.train(), CONFIG, **settings) as smart:
        output, penalty = smart(**inputs)
        (loss_of(output) + penalty).backward()


def without_what_is_said(name):
    model, inputs = started(name)
    run(model, inputs)


class Own(nn.Module):
    """Tokens to classes, with one thing that SMART refuses."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.tokens = nn.Embedding(VOCABULARY, 8)
        if what == "time":
            self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 1 if what == "score" else 3)
        if what == "two":
            self.languages = nn.Embedding(2, 8)

    def forward(self, ids):
        if self.what == "time":
            return self.head(self.lstm(self.tokens(ids.T))[0].mean(0))
        if self.what == "checkpoint":
            return self.head(checkpoint(lambda ids: self.tokens(ids).mean(1), ids, use_reentrant=False))
        if self.what == "no_grad":
            with torch.no_grad():
                x = self.tokens(ids)
            return self.head(x.mean(1))
        return self.head(self.tokens(ids).mean(1))


def own(what, wrapped=lambda model: model):
    run(wrapped(Own(what)), {"ids": text()["input_ids"]})


def xlnet():
    run(language("XLNet", "ForSequenceClassification", d_model=16, n_layer=2, n_head=2, d_inner=24)(), classes())


def multiple_choice():
    model = language("Bert", "ForMultipleChoice")()
    run(model, {"input_ids": torch.randint(2, VOCABULARY, (N, 2, 5)), "labels": labels() % 2})


def given_embeddings():
    model = classifier("Bert")()
    given = text()
    run(model, {"inputs_embeds": model.get_input_embeddings()(given.pop("input_ids")), **given})


def reentrant_checkpointing():
    model = classifier("Bert")()
    model.activation_checkpointing_enable({"use_reentrant": True})
    run(model, classes())


def half_weights_and_checkpointing():
    model = classifier("Bert")()
    model.activation_checkpointing_enable({"use_reentrant": False})
    run(model.bfloat16(), classes())


def half_weights_and_lstm():
    model, inputs = started("LSTM")
    run(model.bfloat16(), inputs)


def compiled_around_ddp():
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)  # as far as it goes without processes
    run(torch.compile(distributed, backend="eager"), {})


def waveforms_with_a_mask():
    model, inputs = started("Wav2Vec2")
    mask = torch.ones_like(inputs["input_values"], dtype=torch.long)
    run(model, inputs | {"attention_mask": mask}, **ARCHITECTURES["Wav2Vec2"].settings)


def clips_images():
    model, inputs = started("CLIP")
    run(model, inputs, site="vision_model.embeddings.patch_embedding", outputs="logits_per_image")


def clips_outputs():
    model, inputs = started("CLIP")
    run(model, inputs, site="text_model.embeddings.token_embedding")


REFUSED = {
    "XLNet": xlnet,
    "multiple choice (such as `BertForMultipleChoice`)": multiple_choice,
    "time-major tokens, (tokens, n), with outputs (n, C)": lambda: own("time"),
    "`inputs_embeds=` in place of `input_ids`": given_embeddings,
    "the embedding under `no_grad`": lambda: own("no_grad"),
    "the embedding in a checkpointed region": lambda: own("checkpoint"),
    "reentrant checkpointing": reentrant_checkpointing,
    "half-precision weights and checkpointed layers": half_weights_and_checkpointing,
    "half-precision weights and `nn.LSTM`, `nn.GRU` or `nn.RNN`": half_weights_and_lstm,
    "half-precision weights and `torch.compile`": lambda: own(
        "", lambda model: torch.compile(model.bfloat16(), backend="eager")
    ),
    "`torch.compile(model, fullgraph=True)`": lambda: own(
        "", lambda model: torch.compile(model, backend="eager", fullgraph=True)
    ),
    "`torch.compile(DistributedDataParallel(model))`": compiled_around_ddp,
    "two `nn.Embedding` in a model of one's own": lambda: own("two"),
    "one logit in a model of one's own": lambda: own("score"),
    "CLIP with `site=` but no `outputs=`": clips_outputs,
    "CLIP's image tower, with the texts' `attention_mask`": clips_images,
    "Wav2Vec2 with `attention_mask`": waveforms_with_a_mask,
}
SAID = [name for name, architecture in ARCHITECTURES.items() if architecture.said]


def message(case):
    """What the user is told."""
    with pytest.raises((ValueError, TypeError, RuntimeError), match="^SMART: ") as caught:
        case()
    return f"{caught.type.__name__}: {caught.value}"


# the page


def page(cells, said, refused):
    """docs/architectures.md: cells[name][column], and the messages by architecture and by case."""
    heads = ["architecture", *COLUMNS]
    rows = [[f"{name}: `{class_of(name)}`", *(cells[name][column] for column in COLUMNS)] for name in ARCHITECTURES]
    lines = [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]]
    return TEXT.format(
        table="\n".join(lines),
        count=len(ARCHITECTURES),
        said="\n\n".join(
            f"{name}: `SMART(model, config, {ARCHITECTURES[name].said})`. Without it:\n\n```\n{said[name]}\n```"
            for name in SAID
        ),
        refused="\n\n".join(f"{case}:\n\n```\n{refused[case]}\n```" for case in REFUSED),
    )


def class_of(name):
    seed(0)
    return type(ARCHITECTURES[name].make()).__name__


def made():
    """The page from a run of everything."""
    return page(
        {name: {column: cell(name) for column, cell in COLUMNS.items()} for name in ARCHITECTURES},
        {name: message(lambda name=name: without_what_is_said(name)) for name in SAID},
        {name: message(case) for name, case in REFUSED.items()},
    )


TEXT = """# Which models work

<!-- python tools/make_architectures.py writes this page from the runs of tests/test_torch_matrix.py -->

The table has {count} architectures in PyTorch, with tiny random weights. The tests run every cell, and write this page.
SMART finds the site and the outputs by itself, except for the architectures of the next section. Others should
work if they have one embedding or take floating-point input. The batch must be on the first axis of both it and the
logits, and the classes on the last axis of the logits. If SMART cannot tell, it asks.

- *site*: where the perturbation enters. `input` is what the model is given, such as pixels.
- *outputs*: what is compared. n is the batch; there are 7 tokens, 31 in the vocabulary, 3 classes.
- *train step*: two AdamW steps on loss + penalty. All is finite, R_s and D_Breg are positive, the weights move.
- *accumulation*: the gradient of two micro-batches is that of the whole batch. Dropout is off, because its masks are
  drawn by batch.
- *checkpointing*: with `gradient_checkpointing_enable(gradient_checkpointing_kwargs={{"use_reentrant": False}})` the
  penalty's gradient is the same. Transformers 5 also calls it `activation_checkpointing_enable`.
- *autocast*: in bfloat16 autocast the penalty and its gradient are those of float32.

{table}

`T5Classifier`, `SentenceBERT` (one BERT over two texts), `Siamese`, `LSTM` and the CNN (`Sequential`) are modules of
our own, in tests/architectures.py.

## Architectures that need an argument

{said}

Longformer needs no argument if the tokenizer pads with `pad_to_multiple_of=config.attention_window` (which is 4 here).
Nor does Wav2Vec2 if the feature encoder is frozen, as it usually is: then the waveform is perturbed.

## What does not work, and its message

{refused}

In a model of one's own SMART cannot see time on the first axis of the site and of the outputs. It finds classes on axis
1, (n, C, tokens), by the shape of x, the mask, the labels or the config. If these say nothing, SMART asks for
`class_axis=`. What the Trainer refuses is in [trainer.md](trainer.md).
"""


@pytest.fixture(scope="module")
def written():
    """The page, and its cells by architecture."""
    text = PAGE.read_text("utf-8")
    rows = dict(re.findall(r"^\| (.+?): `\w+` \| (.*) \|$", text, re.MULTILINE))
    return text, {name: dict(zip(COLUMNS, row.split(" | "), strict=True)) for name, row in rows.items()}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name, column, written):
    assert COLUMNS[column](name) == written[1][name][column]


@pytest.mark.parametrize("name", SAID)
def test_what_has_to_be_said_is_asked_for(name, written):
    told = message(lambda: without_what_is_said(name))
    assert f"{ARCHITECTURES[name].said})`. Without it:\n\n```\n{told}\n```" in written[0]


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused(case, written):
    assert f"{case}:\n\n```\n{message(REFUSED[case])}\n```" in written[0]


def test_the_rest_of_the_page_is_as_it_is_made(written):
    """If not: python tools/make_architectures.py."""
    text, cells = written
    messages = iter(re.findall(r"^```\n(.*?)\n```$", text, re.MULTILINE))
    said, refused = ({key: next(messages) for key in keys} for keys in (SAID, REFUSED))
    assert text == page(cells, said, refused)


def test_longformer_padded_by_the_tokenizer_needs_nothing_said():
    model = ARCHITECTURES["Longformer"].make()
    run(model, {key: value[:, :4] for key, value in text().items()})


def test_wav2vec2_with_a_frozen_feature_encoder_needs_nothing_said():
    model, inputs = started("Wav2Vec2")
    model.freeze_feature_encoder()
    run(model, inputs)


def test_a_site_that_gives_several_tensors_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(nn.Linear(4, 4), Pair())
    with pytest.raises(TypeError, match=r"the site '1' must give one tensor, got tuple"):
        SMART(model, CONFIG, site="1", outputs=0)(torch.randn(N, 4))
