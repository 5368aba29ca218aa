"""On a GPU: the values of the CPU, the same random streams, no wait, and the kernel that is made for vocabularies."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import N, classifier, text
from paper_settings import papers
from torch import nn
from torch.autograd import grad
from torch.utils._pytree import tree_leaves, tree_map_only

from smartreg import divergences as reference
from smartreg.checking import FUNCTIONS, Face, golden_checks, law_checks, load_backend, trajectory_checks
from smartreg_torch import SMART, SMARTConfig, divergences
from smartreg_torch.divergences import bernoulli_symmetric_kl, symmetric_kl

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(
        "tensorflow" in sys.modules, reason="with TensorFlow there is no kernel: SMARTREG_BACKENDS=torch"
    ),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # inductor's
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning"),
]
DEVICE = "cuda"
STARTS = {
    "paper": papers(total_steps=10),
    "paper, two steps": papers(total_steps=10, ascent_steps=2),
    "margin": SMARTConfig(total_steps=10),
    "margin, l_2": SMARTConfig(total_steps=10, norm="2"),
    "independent masks": SMARTConfig(total_steps=10, dropout="independent"),
}


def moved(tree, device):
    return tree_map_only(torch.Tensor, lambda z: z.to(device), tree)


def bert(device=DEVICE, dtype=torch.float32, dropout=True):
    torch.manual_seed(0)
    model = classifier("Bert")().train().to(device, dtype)
    if not dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    batch = text() | {"labels": torch.arange(N) % 3}
    return model, moved(batch, device)


def wave(like):
    """Noise that is the same on every device."""
    return (torch.arange(like.numel(), dtype=torch.float64) * 1.7).sin().view(like.shape).to(like)


def train(model, batch, config, steps=4, **settings):
    """Return R_s, D_Breg and the loss of each step, and the weights."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    with SMART(model, config, **settings) as smart:
        for _ in range(steps):
            output, penalty = smart(**batch)
            (output.loss + penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
            found.append([smart.metrics["R_s"], smart.metrics["D_Breg"], output.loss.item()])
    return np.array(found), moved(dict(model.named_parameters()), "cpu")


def on_the_device(function):
    """Return a function of the CPU's tensors that computes on the device."""

    def called(*own, **kwargs):
        args, kwargs = moved((own, kwargs), DEVICE)
        inside = [
            (lambda *points, f=arg: moved(f(*moved(points, "cpu")), DEVICE)) if callable(arg) else arg for arg in args
        ]
        found = moved(function(*inside, **kwargs), "cpu")
        for given, now in zip(tree_leaves(own), tree_leaves(args), strict=True):  # what ema_update changes in place
            if isinstance(given, torch.Tensor) and not given.requires_grad:
                given.copy_(now)
        return found

    return called


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_check(dtype):
    """Golden vectors, laws and 50 steps of Algorithm 1, computed on the device."""
    functions = vars(load_backend("torch"))
    backend = SimpleNamespace(**functions | {name: on_the_device(functions[name]) for name in FUNCTIONS})
    face = Face(backend, dtype)
    checks = golden_checks, law_checks, trajectory_checks
    rows = [row for check in checks[: 2 if dtype == "bfloat16" else 3] for row in check(face, FUNCTIONS)]
    assert len(rows) > 50
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize("config", STARTS.values(), ids=STARTS)
def test_training_is_as_on_a_cpu(config):
    runs = [train(*bert(device, torch.float64, dropout=False), config, noise=wave) for device in ("cpu", DEVICE)]
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=1e-6)
    assert runs[0][0][1:].min() > 0
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("config", STARTS.values(), ids=STARTS)
def test_dropout_is_that_of_plain_training_bit_for_bit(config):
    model, batch = bert()
    torch.manual_seed(7)
    plain = [model(**batch).logits for _ in range(3)]
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    torch.manual_seed(7)
    with SMART(model, config) as smart:
        for logits in plain:
            output, penalty = smart(**batch)
            (output.loss + penalty).backward()
            assert torch.equal(output.logits, logits)
    assert torch.equal(torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state(), state)
    assert not torch.equal(plain[0], plain[1])


@pytest.mark.parametrize("config", STARTS.values(), ids=STARTS)
def test_a_step_does_not_wait(config):
    """CUDA raises if anything between the batch and the optimiser's step waits for the device."""
    model, batch = bert()
    del batch["attention_mask"]  # Hugging Face itself looks into it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=DEVICE == "cuda")
    with SMART(model, config) as smart:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first looks if the passes are alike
            try:
                output, penalty = smart(**batch)
                (output.loss + penalty).backward()
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.zero_grad()
            smart.update()


@pytest.mark.parametrize("case", ["autocast", "weights", "float16 with a scaler"])
def test_half_precision_has_the_penalty_of_float32(case):
    half = torch.float16 if "float16" in case else torch.bfloat16
    exact, _ = train(*bert(dropout=False), SMARTConfig(total_steps=10), noise=wave, steps=3)
    model, batch = bert(dropout=False)
    if case == "weights":
        model.to(half)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled="float16" in case)
    found = []
    with SMART(model, SMARTConfig(total_steps=10), noise=wave) as smart:
        for _ in range(3):
            with torch.autocast(DEVICE, half, enabled=case != "weights"):
                output, penalty = smart(**batch)
                loss = output.loss + penalty
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            smart.update()
            found.append(smart.metrics["R_s"])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], exact[0, 0], rtol=0.1)  # of the same weights, but for their rounding


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["lean", "checkpointed", "compiled"])
def test_the_ways_to_run_a_model_give_one_step(way):
    config = SMARTConfig(total_steps=10)
    exact = train(*bert(dropout=False), config, noise=wave, steps=2)
    model, batch = bert(dropout=False)
    if way == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if way == "compiled":
        model.compile()
    found = train(model, batch, config, noise=wave, steps=2, lean=way == "lean")
    # other kernels round otherwise, and R_s is 1e-9 here
    np.testing.assert_allclose(found[0], exact[0], rtol=0.05 if way == "compiled" else 1e-3)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bfloat16", "float16"])
def test_the_trainer(precision, tmp_path):
    """It trains as the loop does, and half precision moves R_s a little."""
    transformers = pytest.importorskip("smartreg_torch.transformers")
    from transformers import TrainingArguments

    model, batch = bert(dropout=False)
    examples = [{name: value[i].cpu() for name, value in batch.items()} for i in range(N)]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    given = {"max_steps": 4, "per_device_train_batch_size": N, "logging_steps": 1, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0, **quiet, **given, **precision
    )
    trainer = transformers.SMARTTrainer(model, arguments, train_dataset=examples, smart=SMARTConfig())
    assert trainer.args.device.type == DEVICE
    trainer.train()
    found = [log["R_s"] for log in trainer.state.log_history if "R_s" in log]
    exact, weights = train(*bert(dropout=False), SMARTConfig(total_steps=4))
    np.testing.assert_allclose(found, exact[:, 0], rtol=0.2 if precision else 1e-3)
    for name, weight in moved(dict(trainer.model.named_parameters()), "cpu").items():
        if precision:  # Adam makes a move of 1e-3 of any gradient, and there are four
            assert (weight - weights[name]).abs().mean() < 5e-4
        else:
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)


def rows(dtype, distance, shape=(2, 50, 50257)):
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(shape, generator=generator)
    a = b + distance * torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:-1], generator=generator) < 0.5
    return [z.to(DEVICE, dtype).requires_grad_() for z in (a, b)], mask.to(DEVICE)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [symmetric_kl, bernoulli_symmetric_kl])
def test_vocabularies(function, dtype, distance, masked):
    """Values and gradients, those of symmetric_kl by its kernel, against NumPy's in float64."""
    (a, b), mask = rows(dtype, distance)
    assert divergences._has_kernel(a, b, None)
    value = function(a, b, mask if masked else None)
    gradients = grad(value.sum(), (a, b))
    exact = [z.detach().double().cpu().numpy() for z in (a, b)]
    kept = mask.cpu().numpy() if masked else None
    name = function.__name__
    np.testing.assert_allclose(value.numpy(force=True), getattr(reference, name)(*exact, kept), rtol=1e-5)
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    for got, want in zip(gradients, getattr(reference, f"{name}_grad")(*exact, kept), strict=True):
        error = np.abs(got.double().cpu().numpy() - want).max(-1)
        assert np.all(error <= bound * np.abs(want).max(-1))


def test_the_memory_of_a_vocabulary():
    """The logits and their gradients, and nothing of their size."""
    (a, b), _ = rows(torch.float32, 1e-2, (4, 128, 50257))
    grad(symmetric_kl(a, b).sum(), (a, b))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grad(symmetric_kl(a, b).sum(), (a, b))
    assert (torch.cuda.max_memory_allocated() - before) / a.nbytes < 2.1


def test_the_state_of_a_run_is_restored_bit_for_bit():
    config = SMARTConfig(total_steps=10)
    model, batch = bert()
    torch.manual_seed(1)
    smart = SMART(model, config)
    smart(**batch)[1].backward()
    smart.update()
    state, weights, stream = smart.state_dict(), model.state_dict(), torch.cuda.get_rng_state()
    weights = {name: value.clone() for name, value in weights.items()}
    first = smart(**batch)[1]
    smart.remove()
    other, _ = bert()
    other.load_state_dict(weights)
    with SMART(other, config) as resumed:
        resumed.load_state_dict(moved(state, "cpu"))
        torch.cuda.set_rng_state(stream)
        assert torch.equal(resumed(**batch)[1], first)
