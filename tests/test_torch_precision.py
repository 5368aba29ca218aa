"""SMART beside autocast, GradScaler and half-precision weights.

`pytest tests/test_torch_precision.py -k measured -s` prints the table of docs/precision.md.
"""

import copy
import warnings

import pytest
import torch
from architectures import ARCHITECTURES, text
from notes import Notes
from paper_settings import papers
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from smartreg_torch import SMART, SMARTConfig, SMARTWarning

HALF = [torch.bfloat16, torch.float16]
PAPER = SMARTConfig.paper(mu=0)
BOTH = papers(total_steps=20)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(31, 16, padding_idx=0)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.dropout(self.norm(self.embedding(input_ids).mean(1)).tanh()))


def gradient(model):
    found = torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.grad is not None])
    model.zero_grad()
    return found


def penalised(model, inputs, config, dtype=None, **settings):
    """Output, metrics and the penalty's gradient; the same dropout and noise in every call."""
    torch.manual_seed(1)
    smart = SMART(model, config, **settings)
    for average in smart.teacher.values():
        average.mul_(0.9)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output, penalty = smart(**inputs)
    penalty.backward()
    smart.remove()
    return output, smart.metrics, gradient(model)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("config", [BOTH, BOTH.replace(start="margin"), BOTH.replace(lambda_s=0), PAPER])
def test_under_autocast_the_penalty_is_that_of_float32(config, dtype):
    model, inputs = Model(), text()
    _, expected, expected_gradient = penalised(copy.deepcopy(model), inputs, config)
    output, got, got_gradient = penalised(model, inputs, config, dtype)
    assert got == expected
    assert torch.equal(got_gradient, expected_gradient)
    assert output.dtype == dtype  # the model's own pass stays as it was


def test_the_models_own_pass_and_what_it_moves_stay_as_they_are():
    model, inputs = Model(), text()
    plain = copy.deepcopy(model)
    streams = []
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = plain(**inputs)
        streams.append(torch.get_rng_state())
        smart = SMART(model, BOTH)
        torch.manual_seed(1)
        output, penalty = smart(**inputs)
        streams.append(torch.get_rng_state())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(output, expected)
    assert torch.equal(*streams)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "precision", "passes"),
    [(None, "float32", 4), (torch.bfloat16, "float32", 5), (torch.bfloat16, "model", 4)],
)
def test_float32_costs_one_more_pass_and_only_under_autocast(dtype, precision, passes):
    model = Model()
    smart = SMART(model, BOTH, precision=precision)
    seen = Notes()
    model.head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for _ in range(2):  # the first step has a pass more
            seen.taken()
            smart(**text())
    dtypes = seen.taken()
    assert len(dtypes) == passes
    own = dtype or torch.float32
    assert dtypes == [own] + [own if precision == "model" else torch.float32] * (passes - 1)


def test_checkpointed_layers_under_autocast():
    plain, inputs = ARCHITECTURES["BERT"].make(), text()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    for precision in ("float32", "model"):
        _, expected, expected_gradient = penalised(plain, inputs, BOTH, torch.bfloat16, precision=precision)
        _, got, got_gradient = penalised(checkpointed, inputs, BOTH, torch.bfloat16, precision=precision)
        assert got == expected
        torch.testing.assert_close(got_gradient, expected_gradient)


def test_half_precision_inputs_under_autocast_are_widened():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(6, 4).bfloat16()
    _, expected, _ = penalised(copy.deepcopy(model), {"input": x.float()}, BOTH)
    _, got, _ = penalised(model, {"input": x}, BOTH, torch.bfloat16)
    assert got == expected


def test_accelerates_autocast_inside_the_models_forward_is_off_too():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = ARCHITECTURES["BERT"].make(), text()
    _, expected, expected_gradient = penalised(copy.deepcopy(model), inputs, BOTH)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        forward = vars(prepared)["forward"]
        _, got, got_gradient = penalised(prepared, inputs, BOTH)
        assert vars(prepared)["forward"] == forward
        _, half, _ = penalised(prepared, inputs, BOTH, precision="model")
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert got == expected
    assert torch.equal(got_gradient, expected_gradient)
    assert half != pytest.approx(expected, rel=1e-3)


# half-precision weights


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("config", [BOTH, BOTH.replace(start="margin"), BOTH.replace(lambda_s=0), PAPER])
def test_half_precision_weights_have_float32_copies(config, dtype):
    model, inputs = Model().to(dtype), text()
    same = copy.deepcopy(model).float()
    _, expected, expected_gradient = penalised(same, inputs, config)
    state = copy.deepcopy(model.state_dict())
    output, got, got_gradient = penalised(model, inputs, config)
    assert output.dtype == dtype
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, expected_gradient.to(dtype).double(), rtol=0.01, atol=1e-7)
    for name, weight in model.named_parameters():
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, state[name])


class Tied(Model):
    """Gives the hidden states; the logits are made outside, with the weights that two modules share."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask=None):
        return self.dropout(self.norm(self.embedding(input_ids).mean(1)).tanh())


def test_tied_weights_and_a_function_that_uses_them_have_float32_copies():
    model, inputs = Tied().bfloat16(), text()
    same = copy.deepcopy(model).float()
    _, expected, expected_gradient = penalised(same, inputs, BOTH, outputs=same.head)
    _, got, got_gradient = penalised(model, inputs, BOTH, outputs=model.head)
    assert got == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(got_gradient, expected_gradient.bfloat16().double(), rtol=0.01, atol=1e-7)
    assert model.head.weight is model.embedding.weight
    assert model.norm.running_mean.dtype == torch.bfloat16


def test_the_float32_copies_have_a_graph_only_where_a_gradient_is_wanted():
    model, seen = Model().bfloat16(), Notes()
    model.head.register_forward_hook(lambda head, args, output: seen.add((head.weight.dtype, output.requires_grad)))
    model.norm.register_forward_hook(lambda norm, args, output: seen.add(norm.weight.requires_grad))
    smart = SMART(model, BOTH)
    for _ in range(2):
        seen.taken()
        smart(**text())
    half, wide = (torch.bfloat16, True), (torch.float32, True)
    ascent, teacher = [False, wide], [False, (torch.float32, False)]
    assert seen.taken() == [True, half, True, wide, *ascent, *teacher, True, wide]


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_architectures_with_bfloat16_weights_have_the_terms_of_float32(name):
    """After three steps of training, of the same weights in float32."""
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.make().bfloat16(), architecture.inputs()
    smart = SMART(model, BOTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        output, penalty = smart(**inputs)
        (cross_entropy(output.logits, torch.arange(6) % 3) + penalty).backward()
        optimizer.step()
        smart.update()
    wide = SMART(copy.deepcopy(model).float(), BOTH)
    wide.load_state_dict(smart.state_dict())
    found = []
    for one in (smart, wide):
        torch.manual_seed(1)
        one(**inputs)
        found.append({name: one.metrics[name] for name in ("R_s", "D_Breg", "max_delta", "vanished")})
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0]["D_Breg"] > 1e-6
    assert found[0]["vanished"] == 0


def test_what_half_precision_weights_cannot_have_is_refused_by_name():
    lstm = ARCHITECTURES["LSTM"]
    with pytest.raises(ValueError, match=r"torch\.bfloat16 weights, and with nn\.LSTM.*precision='model'"):
        SMART(lstm.make().bfloat16(), BOTH)(**lstm.inputs())
    bert = ARCHITECTURES["BERT"].make().bfloat16()
    bert.activation_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"weights, and with checkpointed layers.*under torch\.autocast"):
        SMART(bert, BOTH)(**text())
    smart = SMART(bert, BOTH, precision="model")
    smart(**text())[1].backward()
    model = Model().bfloat16()
    wrapped = torch.compile(Model().bfloat16(), backend="eager")
    model.compile(backend="eager")
    for compiled in (model, wrapped):
        with pytest.raises(ValueError, match=r"weights, and with torch\.compile"):
            SMART(compiled, BOTH)(**text())
    with pytest.raises(ValueError, match="must be 'float32' or 'model', got 'half'"):
        SMART(model, BOTH, precision="half")


def test_an_error_in_a_float32_pass_leaves_the_weights_as_they_were():
    model = Model().bfloat16()
    smart = SMART(model, BOTH)
    weights = dict(model.named_parameters())

    def fail(module, args, output):
        if output.dtype == torch.float32:
            raise KeyError("mine")

    model.head.register_forward_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        smart(**text())
    assert all(weights[name] is weight for name, weight in model.named_parameters())
    assert all(buffer.dtype != torch.float32 for buffer in model.buffers())


# GradScaler


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_counted(fused):
    model, inputs = Model(), text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    smart = SMART(model, BOTH).attach(optimizer)
    steps = []
    for overflows in (False, True, False):
        with torch.autocast("cpu", torch.float16):
            output, penalty = smart(**inputs)
            loss = cross_entropy(output.float(), torch.arange(6) % 3) + penalty
        scaler.scale(loss).backward()
        if overflows:
            model.head.weight.grad[0, 0] = torch.inf
        theta = model.head.weight.detach().clone()
        teacher = smart.teacher["head.weight"].clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(theta, model.head.weight) == overflows
        assert torch.equal(teacher, smart.teacher["head.weight"]) == overflows
        steps.append(smart.step)
    assert steps == [1, 1, 2]


def test_the_scalers_gradient_is_that_of_float32():
    model, inputs = Model(), text()
    _, _, expected = penalised(copy.deepcopy(model), inputs, BOTH)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    smart = SMART(model, BOTH)
    for average in smart.teacher.values():
        average.mul_(0.9)
    with torch.autocast("cpu", torch.float16):
        _, penalty = smart(**inputs)
    scaler.scale(penalty).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradient(model), expected, rtol=1e-5, atol=1e-9)


# the model's precision, and what it loses


def test_under_autocast_vanishing_perturbations_warn():
    model = Model()
    smart = SMART(model, PAPER, precision="model")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(SMARTWarning, match=r"below the precision of torch.bfloat16.*precision='float32'"):
            smart(**text())
        smart(**text())  # once


def test_measured(capsys):
    """The penalty's gradient against that of float32, tiny BERT: cosine, and the length's ratio."""
    model, inputs = ARCHITECTURES["BERT"].make(), text()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    rows = [f"{'radius':<22}{'autocast':<10}{'precision':<10}{'cosine':>8}{'length':>9}{'R_s':>11}{'(float32)':>11}"]
    cosines = {}
    for radius, config in (("SMARTConfig()", SMARTConfig(mu=0)), ("SMARTConfig.paper()", PAPER)):
        _, exact, expected = penalised(model, inputs, config)
        for dtype in HALF:
            for precision in ("float32", "model"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SMARTWarning)
                    _, metrics, got = penalised(model, inputs, config, dtype, precision=precision)
                cosine = cosines[radius, dtype, precision] = float(cosine_similarity(got, expected, 0))
                length = float(got.norm() / expected.norm())
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    f"{radius:<22}{name:<10}{precision:<10}{cosine:8.3f}{length:9.3g}"
                    f"{metrics['R_s']:11.3g}{exact['R_s']:11.3g}"
                )
    with capsys.disabled():
        print("\n" + "\n".join(rows))
    for (radius, _, precision), cosine in cosines.items():
        assert cosine > 0.999999 if precision == "float32" else cosine < 0.998, (radius, precision)
