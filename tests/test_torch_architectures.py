"""What must hold for every architecture, in train mode with dropout."""

import inspect

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, loss_of
from paper_settings import papers
from torch import nn, randn_like

from smartreg_torch import SMART
from smartreg_torch.divergences import symmetric_kl
from smartreg_torch.outputs import chosen

WITHOUT_DROPOUT = ["ResNet"]
# One of each kind: it is the dearest of the properties. T5's norms round to float32, Mixtral's experts take no float64.
DIFFERENTIATED = ["BERT", "RoBERTa", "DistilBERT", "ALBERT", "GPT-2", "Llama", "T5 encoder", "ViT", "siamese", "LSTM"]
DIFFERENTIATED += ["CNN", "DeBERTa-v3, tokens", "RoBERTa, spans", "Qwen2, causal LM", "BART, generation", "Swin"]
DIFFERENTIATED += ["ResNet", "SegFormer, segmentation", "CLIP", "Whisper", "Wav2Vec2"]


def seed(value):
    torch.manual_seed(value)
    np.random.seed(value)  # SpecAugment's


def started(name, config, dtype=torch.float32, **changes):
    seed(0)
    architecture = ARCHITECTURES[name]
    model = architecture.make().train().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in architecture.inputs().items()}
    return model, inputs, SMART(model, config, **{**architecture.settings, **changes})


def compared(name, smart, output):
    """The outputs that are compared, (n, ..., C)."""
    axis = smart.describe()["class axis"].value
    found = chosen(output, ARCHITECTURES[name].settings.get("outputs"))
    return [z.unsqueeze(-1) if axis == "none" else z.movedim(int(axis), -1) for z in found.values()]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def test_the_perturbed_pass_at_zero_is_the_clean_pass_bit_for_bit(name):
    """The smallest sigma there is: with delta = 0, only different dropout masks could make R_s differ from 0."""
    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    zeros = {"noise": torch.zeros_like}
    model, inputs, smart = started(name, config, **zeros)
    plain, _, _ = started(name, config, **zeros)

    def logits_of(output):
        return torch.cat([z.flatten() for z in compared(name, smart, output)])

    seed(1)
    output, penalty = smart(**inputs)
    seed(1)
    expected = logits_of(plain(**inputs))
    assert torch.equal(logits_of(output), expected)
    assert penalty.item() == smart.metrics["R_s"] == smart.metrics["max_delta"] == 0
    # and there is dropout: another draw gives other logits
    assert torch.equal(logits_of(model(**inputs)), expected) == (name in WITHOUT_DROPOUT)


def test_the_teacher_at_theta_0_gives_rounding_at_most(name):
    """The same masks and weights; without a graph, a kernel may round otherwise (`nn.LSTM` does)."""
    config = papers(lambda_s=0, total_steps=10)
    _, inputs, smart = started(name, config)
    _, penalty = smart(**inputs)
    assert 0 <= penalty.item() <= 1e-13


@pytest.mark.parametrize("start", ["gaussian", "margin"])
def test_a_step_leaves_everything_else_alone(name, start):
    """The global random stream, BatchNorm statistics, training flags and `.grad` are as after a plain forward."""
    config = papers(start=start, total_steps=10, ascent_steps=2)
    model, inputs, smart = started(name, config)
    plain, _, _ = started(name, config)
    seed(1)
    plain(**inputs)
    after_plain, state_plain = torch.get_rng_state(), state_of(plain)
    seed(1)
    smart(**inputs)
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert all(torch.equal(value, state_plain[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert all(module.training for module in model.modules())
    assert smart.metrics["max_delta"] > 0
    assert smart.metrics["R_s"] > 0


def test_padding_is_not_perturbed(name):
    seen = []
    model, inputs, smart = started(name, papers(mu=0, ascent_steps=1), on_step=seen.append)
    smart(**inputs)
    deltas = seen[0].delta
    texts = [value != 0 for key, value in inputs.items() if value.ndim == 2 and key in ("ids", "first", "second")]
    masks = [inputs["attention_mask"]] if "attention_mask" in inputs else texts
    if not masks:
        assert all((delta != 0).any() for delta in deltas)
        return
    if name == "Longformer":
        masks = [nn.functional.pad(masks[0], (0, 1))]
    assert len(deltas) == len(masks)
    for delta, mask in zip(deltas, masks, strict=True):
        assert (mask == 0).any()
        assert torch.all(delta[mask == 0] == 0)
        assert torch.any(delta[mask == 1] != 0)


@pytest.mark.parametrize("start", ["gaussian", "margin"])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradient_of_the_penalty_against_finite_differences(name, start):
    """d/dw of lambda_s R_s + mu D_Breg at a fixed delta, in float64, along a random direction of all the weights."""
    config = papers(start=start, ascent_steps=1, total_steps=10, epsilon=0.05, sigma=0.05, mu=2.0)
    seen, fixed = [], []
    model, inputs, smart = started(
        name, config, torch.float64, on_step=seen.append, noise=lambda like: fixed.pop(0) if fixed else randn_like(like)
    )
    with torch.no_grad():
        for average in smart.teacher.values():
            average.add_(0.05 * torch.randn_like(average))
    seed(1)
    smart(**inputs)
    deltas = seen[0].delta
    smart.config = config.replace(start="gaussian", ascent_steps=0, scale="absolute", sigma=1.0, epsilon=1e9)

    def penalty():
        seed(1)
        fixed.extend(deltas)
        return smart(**inputs)[1]

    penalty().backward()
    direction = [torch.randn_like(parameter) * parameter.requires_grad for parameter in model.parameters()]
    padding = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    for p, d in zip(model.parameters(), direction, strict=True):
        if padding.get(id(p)) is not None:
            d[padding[id(p)]] = 0  # torch gives the padding's row no gradient
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True) if p.grad is not None
    )

    def moved(h):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.add_(h * d)
        value = penalty().item()
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p.sub_(h * d)
        return value

    # Llama and T5 normalise in float32 whatever the dtype, and the CNN has kinks: no one step suits all
    slopes = [(moved(h) - moved(-h)) / (2 * h) for h in (1e-3, 1e-4, 1e-5, 1e-6)]
    assert min(abs(slope / value - 1) for value in slopes) <= 5e-4


def test_r_s_is_the_divergence_at_the_perturbed_embeddings(name):
    """R_s, recomputed from outside: a hook of our own adds the same delta, and the seed gives the same dropout."""
    seen = []
    model, inputs, smart = started(name, papers(mu=0, ascent_steps=1), on_step=seen.append)
    seed(1)
    output, penalty = smart(**inputs)
    smart.remove()
    rest, site = iter(seen[0].delta), smart.describe()["site"].value

    def shifted(given):
        return (given[0] + next(rest), *given[1:]) if isinstance(given, tuple) else given + next(rest)

    seed(1)
    if site == "input":
        first = next(iter(inputs))
        perturbed = model(**{**inputs, first: shifted(inputs[first])})
    else:
        handle = model.get_submodule(site).register_forward_hook(lambda _module, _inputs, given: shifted(given))
        perturbed = model(**inputs)
        handle.remove()
    value = 0
    for z, clean in zip(*(compared(name, smart, given) for given in (perturbed, output)), strict=True):
        positions = None
        if z.ndim == 3:
            decodes = "decoder_input_ids" in inspect.signature(model.forward).parameters
            positions = inputs["labels"] != -100 if decodes else inputs["attention_mask"] == 1
        value += symmetric_kl(z, clean, positions).mean()
    assert value.item() == pytest.approx(penalty.item(), rel=1e-5)


def test_without_penalties_training_is_bit_identical(name):
    config = papers(lambda_s=0, mu=0)
    weights = []
    for wrapped in (True, False):
        model, inputs, smart = started(name, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        seed(1)
        for _ in range(3):
            output, penalty = smart(**inputs) if wrapped else (model(**inputs), 0)
            (loss_of(output) + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
        weights.append(state_of(model))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
