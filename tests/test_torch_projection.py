"""Projection: outputs that are hidden states times a head's weight, of which no logits are ever all in memory."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.autograd import grad

from smartreg_torch import SMART, Projection, SMARTConfig, projection, without_logits
from smartreg_torch.perturbation import margin_gradient
from smartreg_torch.projection import sum_divergence

KLS = ["symmetric_kl", "bernoulli_symmetric_kl"]
MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
WEIGHT = torch.tensor([2.0, 0.5, 1.0])


@pytest.fixture(params=[1 << 22, 7], ids=["one chunk", "several chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", request.param)


def two(shared, bias=True, dtype=torch.float64):
    """Two projections of leaves: (3, 4, 5) hidden states, 6 classes."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    one = Projection(leaf(3, 4, 5), leaf(6, 5), leaf(6) if bias else None)
    hidden = (one.hidden.detach() + 0.1 * leaf(3, 4, 5).detach()).requires_grad_()
    return one, Projection(hidden, one.weight, one.bias) if shared else Projection(hidden, leaf(6, 5), leaf(6))


def leaves(*pair):
    found = [tensor for z in pair for tensor in vars(z).values() if tensor is not None]
    return list({id(tensor): tensor for tensor in found}.values())


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "two heads"])
@pytest.mark.parametrize("name", KLS)
def test_it_is_the_sum_of_the_logits_it_stands_for(chunks, name, shared, weight, mask):
    a, b = two(shared)
    value = 3 * sum_divergence(name, a, b, mask, weight)
    logits = 3 * sum_divergence(name, a.logits(), b.logits(), mask, weight)
    torch.testing.assert_close(value, logits, rtol=1e-12, atol=0)
    tensors = leaves(a, b)
    first = grad(value, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    for got, before, again, want in zip(first, kept, grad(value, tensors), grad(logits, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        assert torch.equal(got, before)
        assert torch.equal(got, again)


def test_masked_positions_may_be_nan(chunks):
    a, b = two(shared=True)
    spoilt = Projection(a.hidden.masked_fill((MASK == 0).unsqueeze(-1), torch.nan), a.weight, a.bias)
    for got, want in zip(
        grad(sum_divergence("symmetric_kl", spoilt, b, MASK), leaves(a, b)),
        grad(sum_divergence("symmetric_kl", a, b, MASK), leaves(a, b)),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_margin_gradient(chunks, name, mask):
    z, _ = two(shared=True)
    logits = z.logits()
    want = grad(logits, z.hidden, margin_gradient(logits, None, mask, name))[0]
    torch.testing.assert_close(margin_gradient(z, None, mask, name), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_states(dtype):
    """The logits are rounded as the model's own; sums are kept in float32."""
    a, b = (Projection(z.hidden.to(dtype), z.weight.float()) for z in two(shared=True, bias=False))
    tensors = leaves(a, b)
    value = sum_divergence("symmetric_kl", a, b)
    wide = torch.float32 if dtype == torch.float16 else dtype  # whose range is too small for gradients before scaling
    logits = [nn.functional.linear(z.hidden.to(wide), z.weight.to(wide)) for z in (a, b)]
    want = sum_divergence("symmetric_kl", *logits)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0)
    for got, exact in zip(grad(value, tensors), grad(want, tensors), strict=True):
        assert got.dtype == exact.dtype
        scale = float(exact.abs().max())
        torch.testing.assert_close(got.float(), exact.float(), rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


def test_small_gradients_survive_float16():
    """They are scaled up only afterwards, by the loss scaler."""
    hidden = torch.ones(64, 64, 4, dtype=torch.float16, requires_grad=True)
    one = Projection(hidden, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    other = Projection((hidden * 1.001).detach(), one.weight)
    found = grad(2.0**16 / 4096 * sum_divergence("symmetric_kl", one, other), hidden)[0]
    assert torch.all((found != 0).any(-1))


def test_there_are_no_second_derivatives():
    a, b = two(shared=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad(sum_divergence("symmetric_kl", a, b), a.hidden, create_graph=True)


class Model(nn.Module):
    """A causal language model with dropout that gives its hidden states instead of logits, and a loss by chunks."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.embedding = nn.Embedding(30, 8)
        self.body = nn.GRU(8, 8, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 30)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.dropout(self.body(self.embedding(input_ids))[0])
        return {"hidden": hidden} if self.fused else {"logits": self.head(hidden)}


def train(fused, config, half=False, **settings):
    torch.manual_seed(0)
    model = Model(fused).double()
    if half:
        model = model.float()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    generator = torch.Generator().manual_seed(1)
    weight, seen = torch.tensor([1.0, 2, 0.5, 1]), []
    outputs = lambda output: Projection(output["hidden"], model.head.weight, model.head.bias)  # noqa: E731
    settings |= {"outputs": outputs} if fused else {"class_axis": -1}
    noise = lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    with SMART(model, config, noise=noise, **settings) as smart:
        for _ in range(3):
            ids = torch.randint(30, (4, 6), generator=generator)
            mask = torch.arange(6) < torch.tensor([6, 4, 3, 1]).unsqueeze(-1)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output, penalty = smart(input_ids=ids, attention_mask=mask, sample_weight=weight)
                logits = output["logits"] if "logits" in output else model.head(output["hidden"])
                loss = nn.functional.cross_entropy(logits[mask], ids[mask]) + penalty
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
            seen.append([float(penalty.detach()), *smart.metrics.values()])
        described = smart.describe()
    return seen, [p.detach() for p in model.parameters()], described


@pytest.mark.parametrize("dropout", ["shared", "independent"])
@pytest.mark.parametrize("start", [{"start": "margin"}, {"start": "gaussian", "sigma": 0.03, "ascent_steps": 2}])
def test_training_is_as_with_the_logits(chunks, start, dropout):
    """Both terms, theta~ moving, padding, sample weights, dropout: the same numbers and weights after three steps."""
    config = SMARTConfig(total_steps=6, lambda_s=2, mu=2, dropout=dropout, **start)
    found, weights, described = train(True, config)
    wanted, exact, _ = train(False, config)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-9, atol=1e-12)
    for got, want in zip(weights, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert "a projection's last axis" in str(described)


def test_under_autocast_the_passes_are_in_float32(chunks):
    config = SMARTConfig(total_steps=6)
    found, wanted = (train(fused, config, half=True)[0] for fused in (True, False))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-2, atol=1e-6)


def test_lean(chunks):
    config = SMARTConfig(total_steps=6)
    for got, want in zip(train(True, config, lean=True)[1], train(True, config)[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_an_observer_gets_logits():
    seen = []
    train(True, SMARTConfig(total_steps=6), on_step=seen.append)
    for stage in ("outputs", "perturbed", "teacher"):
        assert [z.shape for z in getattr(seen[-1], stage)] == [(4, 6, 30)]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Note the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [z for z in torch.utils._pytree.tree_leaves(result) if isinstance(z, torch.Tensor)]
        self.size = max([self.size, *(z.untyped_storage().nbytes() // z.itemsize for z in made)])
        return result


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    monkeypatch.setattr(projection, "CHUNK", 4 * 1000)
    torch.manual_seed(0)
    embedding, head = nn.Embedding(1000, 8), nn.Linear(8, 1000, bias=False)
    body = nn.Sequential(embedding, nn.Tanh())
    ids = torch.randint(1000, (8, 16))
    smart = SMART(body, SMARTConfig(total_steps=5), outputs=lambda h: Projection(h, head.weight))
    with Largest() as seen:
        smart(ids)[1].backward()
    smart.remove()
    assert seen.size < ids.numel() * 1000
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Projection([1.0], torch.ones(2, 1)), TypeError, "hidden must be a floating-point tensor, got list"),
        (lambda: Projection(torch.ones(3, 4), torch.ones(2, 5)), ValueError, r"got \(3, 4\) and \(2, 5\)"),
        (lambda: Projection(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4)), ValueError, r"expected a bias \(2,\)"),
        (lambda: sum_divergence("squared_error", *two(True)), ValueError, "expected a divergence of logits"),
        (lambda: sum_divergence("symmetric_kl", two(True)[0], torch.ones(3, 4, 6)), TypeError, "two projections"),
        (lambda: sum_divergence("symmetric_kl", *two(True), None, torch.ones(2)), ValueError, "one weight an example"),
        (lambda: sum_divergence("symmetric_kl", *two(True), torch.ones(3)), ValueError, "the mask must have"),
    ],
)
def test_what_cannot_be_compared(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_divergence_or_axis_that_a_projection_has_not():
    body, head = nn.Embedding(9, 4), nn.Linear(4, 9)
    outputs = lambda h: Projection(h, head.weight)  # noqa: E731
    for settings, message in (
        ({"divergence": "squared_error"}, "a projection's l_s must be one of"),
        ({"class_axis": 1}, "a projection has its classes on the last axis"),
    ):
        smart = SMART(body, SMARTConfig(total_steps=5), outputs=outputs, **settings)
        with smart, pytest.raises(ValueError, match=message):
            smart(torch.ones(2, 3, dtype=torch.long))


def language(**settings):
    config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, **settings)
    return transformers.GPT2LMHeadModel(config)


def test_without_logits_gives_the_models_own():
    """Those of its last forward, by the weight that the head has then."""
    model = language().eval()
    outputs = without_logits(model)
    for _ in range(2):
        ids = torch.randint(30, (2, 5))
        output = model(ids)
        torch.testing.assert_close(outputs(output).logits(), output.logits)
        model.set_output_embeddings(nn.Linear(8, 30))


def test_a_model_with_it_can_be_copied_and_pickled():
    model = language()
    outputs = without_logits(model)
    output = model(torch.ones(2, 3, dtype=torch.long))
    assert outputs(output).hidden.requires_grad
    copied, _ = pickle.loads(pickle.dumps((model, outputs)))
    copy.deepcopy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: without_logits(nn.Linear(2, 2)), ValueError, "Linear has no backbone"),
        (lambda: without_logits(language().transformer), ValueError, "GPT2Model has no backbone"),
        (lambda: without_logits(language(final_logit_softcapping=30.0)), ValueError, "final_logit_softcapping is 30.0"),
        (lambda: without_logits(language(logit_scale=0.5)), ValueError, "logit_scale is 0.5"),
        (lambda: without_logits(language())(None), RuntimeError, "did not call its backbone, GPT2Model"),
    ],
)
def test_a_model_of_which_the_hidden_states_do_not_do(make, error, message):
    with pytest.raises(error, match=message):
        make()
