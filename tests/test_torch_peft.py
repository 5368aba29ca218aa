"""SMART on models of which only a part is trained: PEFT's adapters, frozen layers, tied weights."""

import copy

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, SIZE, VOCABULARY, text
from paper_settings import papers
from torch import nn
from torch.nn.functional import cross_entropy

from smartreg_torch import SMART
from smartreg_torch.divergences import symmetric_kl

peft = pytest.importorskip("peft")

# PEFT 0.21 beside transformers 5.23, whose names are new
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = papers(total_steps=20)
MARGIN = papers(total_steps=20, start="margin")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
ADAPTERS = {
    "LoRA": LORA,
    "LoRA, dropout": LORA | {"lora_dropout": 0.3, "task_type": "SEQ_CLS"},
    "DoRA": LORA | {"use_dora": True, "modules_to_save": ["classifier"]},
    "LoRA of the embedding": LORA | {"target_modules": ["word_embeddings", "query"]},
    "the embedding in modules_to_save": LORA | {"modules_to_save": ["word_embeddings", "classifier"]},
}


def bert(dropout=True):
    model = ARCHITECTURES["BERT"].make()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def adapted(model, settings):
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))  # the adapters start at 0
    return model.train()


def train(model, smart, inputs, steps=3, lr=0.5):
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    for _ in range(steps):
        output, penalty = smart(**inputs)
        (cross_entropy(output.logits, torch.arange(6) % 3) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        smart.update()


@pytest.mark.parametrize("config", [CONFIG, MARGIN], ids=["gaussian", "margin"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_only_the_trainable_weights_are_averaged_and_move(name, config):
    model, inputs = adapted(bert(), ADAPTERS[name]), text()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    smart = SMART(model, config)
    train(model, smart, inputs)
    trainable = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert smart.teacher.keys() == trainable
    assert len(trainable) < len(before) / 2
    for key, weight in model.named_parameters():
        assert weight.requires_grad == (key in trainable)
        if key not in trainable:
            assert torch.equal(weight, before[key])
            assert weight.grad is None
    assert smart.metrics["R_s"] > 0
    assert smart.metrics["D_Breg"] > 0


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "the embedding in modules_to_save"])
def test_both_terms_are_what_plain_passes_give(name):
    inputs = text()
    model = bert(dropout=False)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    model = adapted(model, ADAPTERS[name])
    embeddings = model.get_base_model().get_input_embeddings()
    real = inputs["attention_mask"].unsqueeze(-1)
    nu = torch.randn(*inputs["input_ids"].shape, SIZE["hidden_size"])
    config = CONFIG.replace(scale="absolute", ascent_steps=0, epsilon=0.01, sigma=0.02)
    smart = SMART(model, config, noise=lambda like: nu)
    for average in smart.teacher.values():
        average.mul_(0.8)
    _, penalty = smart(**inputs)
    penalty.backward()
    got = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()

    def logits(delta=0.0):
        x = embeddings(inputs["input_ids"]) + delta
        return model(inputs_embeds=x, attention_mask=inputs["attention_mask"]).logits

    student = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.load_state_dict(student | smart.teacher)
        taught = logits()
        model.load_state_dict(student)
    delta = (0.02 * nu * real).clamp(-0.01, 0.01)
    r_s = symmetric_kl(logits(delta), logits()).mean()
    d_breg = symmetric_kl(logits(), taught).mean()
    assert min(r_s, d_breg) > 1e-6
    assert smart.metrics["R_s"] == pytest.approx(r_s.item(), rel=1e-3)
    assert smart.metrics["D_Breg"] == pytest.approx(d_breg.item(), rel=1e-3)
    (r_s + d_breg).backward()
    expected = [weight.grad for weight in model.parameters() if weight.requires_grad]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-6)


def test_padding_is_known_inside_peft_too():
    """Without an attention mask the embedding's padding_idx says which positions are real."""
    for settings in (ADAPTERS["LoRA of the embedding"], ADAPTERS["the embedding in modules_to_save"]):
        seen, ids = [], text()["input_ids"]
        SMART(adapted(bert(), settings), CONFIG, on_step=seen.append)(ids)
        assert torch.equal(seen[0].mask[0], ids != 0)


def test_the_arguments_names_are_those_of_the_model_inside():
    """A plain PeftModel's forward takes (*args, **kwargs): the mask is found where it is given by position."""
    inputs = text()
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, 5)  # no padding_idx to go by
    model = adapted(bert(dropout=False), LORA)
    found = []
    for args, kwargs in (((), inputs), (tuple(inputs.values()), {})):
        torch.manual_seed(1)
        with SMART(model, CONFIG) as smart:
            smart(*args, **kwargs)
            found.append(smart.metrics)
    assert found[0] == found[1]


@pytest.mark.parametrize("before", [True, False])
def test_checkpointed_lora_is_lora(before):
    inputs = text()
    plain = adapted(bert(), LORA)
    checkpointed = copy.deepcopy(plain)
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        smart = SMART(model, CONFIG) if before else None
        if model is checkpointed:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        smart = smart or SMART(model, CONFIG)
        smart(**inputs)[1].backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    torch.testing.assert_close(*gradients)


def test_adapters_after_smart_are_refused():
    model = bert()
    smart = SMART(model, CONFIG)
    state = copy.deepcopy(smart.state_dict())
    adapted(model, LORA)
    for call in (lambda: smart(**text()), smart.update):
        with pytest.raises(RuntimeError, match=r"no longer has \['bert.*query.*Make SMART after adapters are added"):
            call()
    with pytest.raises(ValueError, match=r"not of this model's trainable parameters.*adding adapters"):
        SMART(adapted(bert(), LORA), CONFIG).load_state_dict(state)
    moved, inputs = bert(), text()
    first = SMART(moved, CONFIG.replace(mu=0))
    adapted(moved, ADAPTERS["the embedding in modules_to_save"])
    found = []
    for smart in (first, SMART(moved, CONFIG.replace(mu=0))):  # the hook follows the embedding into PEFT's wrapper
        torch.manual_seed(1)
        with smart:
            smart(**inputs)
        found.append(smart.metrics["R_s"])
    assert found[0] == found[1]


def test_merging_after_smart_is_refused():
    model = adapted(bert(), LORA)
    smart = SMART(model, CONFIG)
    smart(**text())
    model.merge_and_unload()
    with pytest.raises(RuntimeError, match=r"no longer has .*lora_A.*merged"):
        smart(**text())


def test_another_adapter_is_followed():
    model = adapted(bert(), LORA)
    smart = SMART(model, CONFIG)
    own = set(smart.teacher)
    model.add_adapter("other", peft.LoraConfig(**LORA))
    model.set_adapter("other")
    train(model, smart, text())
    assert {key.replace(".other.", ".default.") for key in set(smart.teacher) - own} == own
    assert smart.metrics["D_Breg"] > 0


def test_theta_of_the_adapters_is_saved_by_peft(tmp_path):
    model = adapted(bert(), LORA)
    smart = SMART(model, CONFIG)
    train(model, smart, text())
    with smart.swap_teacher():
        model.save_pretrained(tmp_path)
        averaged = copy.deepcopy(model.state_dict())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    torch.testing.assert_close(loaded.state_dict(), averaged, rtol=0, atol=0)
    assert any(not torch.equal(averaged[key], value) for key, value in model.state_dict().items())


def test_lora_under_autocast_and_on_a_bfloat16_base():
    inputs = text()
    model = adapted(bert(dropout=False), LORA)
    half = copy.deepcopy(model)
    for weight in half.parameters():
        if not weight.requires_grad:  # PEFT keeps the adapters in float32
            weight.data = weight.data.bfloat16()
    wide = copy.deepcopy(half).float()
    found = {}
    for name, each, dtype in (
        ("plain", model, None),
        ("autocast", model, torch.bfloat16),
        ("wide", wide, None),
        ("half", half, None),
    ):
        torch.manual_seed(1)
        with SMART(each, CONFIG) as smart, torch.autocast("cpu", dtype, enabled=dtype is not None):
            for average in smart.teacher.values():
                average.mul_(0.9)
            smart(**inputs)[1].backward()
        found[name] = smart.metrics
        assert all(weight.grad is None for weight in each.parameters() if not weight.requires_grad)
    assert found["autocast"] == found["plain"]
    assert found["half"] == pytest.approx(found["wide"], rel=1e-4)


def test_frozen_layers_are_not_averaged_until_they_are_trained():
    model, inputs = bert(), text()
    model.bert.requires_grad_(False)
    smart = SMART(model, MARGIN)
    train(model, smart, inputs)
    assert set(smart.teacher) == {"classifier.weight", "classifier.bias"}
    model.bert.encoder.layer[1].requires_grad_(True)
    train(model, smart, inputs)
    assert {name.split(".")[0] for name in smart.teacher} == {"bert", "classifier"}
    assert all(".layer.0." not in name and "embeddings" not in name for name in smart.teacher)
    assert smart.metrics["D_Breg"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_stay_tied(dtype):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, n_positions=16
    )
    model, inputs = transformers.GPT2LMHeadModel(config).to(dtype), text()
    untied = copy.deepcopy(model).float()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    metrics, gradients = [], []
    for each in (model, untied):
        torch.manual_seed(1)
        with SMART(each, CONFIG) as smart:
            for average in smart.teacher.values():
                average.mul_(0.9)
            smart(**inputs)[1].backward()
        metrics.append(smart.metrics)
        weights = (each.transformer.wte.weight, each.lm_head.weight)
        gradients.append(sum(weight.grad.float() for weight in dict.fromkeys(weights)))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-6)


def quantised(model, bits):
    """A copy whose encoder has bitsandbytes' layers; of 4 bits also one with the same weights as plain floats."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, twin = copy.deepcopy(model), copy.deepcopy(model)
    for name, layer in list(model.bert.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
            new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        model.bert.set_submodule(name, new.to("cpu"))
        if bits == 4:
            weight = bitsandbytes.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
            twin.bert.get_submodule(name).weight.data = weight
    return model, twin


@pytest.mark.parametrize("config", [CONFIG, MARGIN], ids=["gaussian", "margin"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_frozen_base_trains_its_adapters(bits, config):
    inputs, settings = text(), LORA | {"modules_to_save": ["classifier"]}
    found = []
    for base in quantised(bert(), bits):
        torch.manual_seed(1)
        model = adapted(base, settings)
        query = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight
        before = query.detach().clone()
        torch.manual_seed(2)
        smart = SMART(model, config.replace(epsilon=0.1, sigma=0.1))
        assert set(smart.teacher) == {name for name, weight in model.named_parameters() if weight.requires_grad}
        train(model, smart, inputs)
        assert torch.equal(query, before)
        found.append((smart.metrics, torch.cat([w.detach().flatten() for w in model.parameters() if w.requires_grad])))
    (metrics, weights), (expected, twins) = found
    assert metrics["R_s"] > 0
    assert metrics["D_Breg"] > 0
    if bits == 4:  # 8 bits round the activations too, so that there is nothing to compare with
        assert metrics == pytest.approx(expected, rel=1e-3)
        torch.testing.assert_close(weights, twins, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_the_same_at_delta_0(bits):
    """Bit for bit, dropout and rounded activations included."""
    config = papers(scale="absolute", epsilon=1e-30, sigma=1e-30, ascent_steps=0, mu=0)
    smart = SMART(adapted(quantised(bert(), bits)[0], LORA), config, noise=torch.zeros_like)
    assert smart(**text())[1] == 0
