"""l_s in PyTorch: computed in blocks, and its higher derivatives (gradient penalties, meta-learning)."""

import sys

import numpy as np
import pytest
import torch
from paper_settings import papers
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from smartreg import divergences as reference
from smartreg_torch import SMART, divergences
from smartreg_torch.divergences import DIVERGENCES

KLS = ["symmetric_kl", "bernoulli_symmetric_kl"]
MASK = torch.tensor([[1, 1, 0], [1, 0, 1]])


def outputs(distance, shape=(2, 3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(shape, generator=generator, dtype=dtype)
    a = b + distance * torch.randn(shape, generator=generator, dtype=dtype)
    return a.requires_grad_(), b.requires_grad_()


def test_logits_that_are_infinite_in_both_are_an_overflow_and_no_agreement():
    a = torch.tensor([[torch.inf, 0.0], [1.0, 0.0]])
    assert divergences.symmetric_kl(a, a.clone()).isnan().tolist() == [True, False]


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("distance", [1e-3, 1.0, 8.0])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_first_and_second_derivatives_against_finite_differences(name, distance, mask):
    pair = outputs(distance)
    function = lambda a, b: DIVERGENCES[name](a, b, mask)  # noqa: E731
    assert gradcheck(function, pair)
    assert gradgradcheck(function, pair)
    one, other = pair
    assert gradgradcheck(lambda a: function(a, other.detach()), one)  # theta~ is held
    assert gradgradcheck(lambda b: function(one.detach(), b), other)


def values_and_gradients(name, a, b, mask):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = DIVERGENCES[name](a, b, mask)
    return [value, *grad((value * torch.arange(1, 1 + len(value))).sum(), (a, b), retain_graph=True)]


@pytest.mark.parametrize("block", [1, 9])
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("masked", [False, True], ids=["all positions", "some left out"])
@pytest.mark.parametrize("name", KLS)
def test_blocks_change_nothing(name, masked, shape, block, monkeypatch):
    """Cut into blocks at every axis, with masked positions of NaN, classes of -inf and other strides than usual."""
    pair = [z.detach()[..., :-1, :] for z in outputs(1.0, (*shape[:-2], shape[-2] + 1, shape[-1]))]
    pair = [z.masked_fill(torch.arange(shape[-1]) == 1, -torch.inf) for z in pair]
    mask = torch.arange(int(np.prod(shape[:-1]))).reshape(shape[:-1]) % 3 if masked else None
    if mask is not None:
        pair[0] = pair[0].masked_fill((mask == 0).unsqueeze(-1), torch.nan)
    whole = values_and_gradients(name, *pair, mask)
    monkeypatch.setattr(divergences, "BLOCK", block)
    assert len(list(divergences._blocks(torch.Size(shape), block))) > 1
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda z, *args, **kwargs: z.new_full(*args, torch.nan, **kwargs))
    for got, want in zip(values_and_gradients(name, *pair, mask), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)  # vector instructions round otherwise at an end
        assert torch.equal(got == 0, want == 0)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("size", [1, 5, 20, 41, 1000])
def test_the_blocks_cover_each_position_once(shape, size):
    counts = torch.zeros(shape)
    for at in divergences._blocks(torch.Size(shape), size):
        assert counts[at].numel() <= max(size, shape[-1])
        counts[at] += 1
    assert torch.all(counts == 1)


@pytest.mark.parametrize("distance", [1e-4, 1.0])
def test_a_vocabulary_of_fifty_thousand(distance):
    """Values and gradients of logits in float32, in blocks, against NumPy's in float64."""
    a, b = outputs(distance, (2, 3, 50257), torch.float32)
    assert a.numel() > divergences.BLOCK
    value, *gradients = values_and_gradients("symmetric_kl", a, b, MASK)
    exact = [z.detach().double().numpy() for z in (a, b)]
    torch.testing.assert_close(
        value.double(), torch.from_numpy(reference.symmetric_kl(*exact, MASK.numpy())), rtol=1e-5, atol=0
    )
    for got, want in zip(gradients, reference.symmetric_kl_grad(*exact, MASK.numpy()), strict=True):
        want = torch.from_numpy(want) * torch.arange(1, 3)[:, None, None]
        assert torch.all((got - want).abs().amax(-1) <= 1e-5 * want.abs().amax(-1))


@pytest.mark.parametrize("name", KLS)
def test_saved_gradients_are_scaled_in_place_only_by_the_last_backward(name):
    a, b = outputs(1.0)
    value = DIVERGENCES[name](a, b).sum()
    first = grad(value, (a, b), retain_graph=True)
    kept = [g.clone() for g in first]
    again = grad(3 * value, (a, b))
    for g, copy, other in zip(first, kept, again, strict=True):
        assert torch.equal(g, copy)
        torch.testing.assert_close(other, 3 * copy, rtol=1e-15, atol=0)


def plain(name, a, b):
    """l_s as the textbook has it, for autograd alone to differentiate."""
    if name == "bernoulli_symmetric_kl":
        return ((a.sigmoid() - b.sigmoid()) * (a - b)).sum(-1)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-3, 0.9, 1.1, 30.0, 300.0])
@pytest.mark.parametrize("name", KLS)
def test_second_and_third_derivatives_at_every_distance(name, distance):
    v = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def derivatives(function):
        a, b = outputs(distance, (5, 7))
        first = grad(function(a, b).sum(), (a, b), create_graph=True)
        second = grad(sum((g * w).sum() for g, w in zip(first, v, strict=True)), (a, b), create_graph=True)
        return [*second, *grad(sum((g * w).sum() for g, w in zip(second, v, strict=True)), (a, b))]

    found = derivatives(DIVERGENCES[name])
    for got, want in zip(found, derivatives(lambda a, b: plain(name, a, b)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * (1 + distance))


@pytest.mark.parametrize("name", KLS)
def test_the_gradients_themselves_do_not_depend_on_create_graph(name):
    a, b = outputs(1e-6, (5, 7), torch.float32)
    value = DIVERGENCES[name](a, b).sum()
    for alone, followed in zip(
        grad(value, (a, b), retain_graph=True), grad(value, (a, b), create_graph=True), strict=True
    ):
        assert torch.equal(alone, followed)


@pytest.mark.parametrize("name", KLS)
def test_classes_and_positions_that_take_no_part(name):
    """A class of -inf in both and a masked position, NaN or not, have derivatives of 0 and change no other."""
    a, b = (z.detach() for z in outputs(1.0))
    v = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)

    def product(a, b, mask):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        first = grad(DIVERGENCES[name](a, b, mask).sum(), a, create_graph=True)[0]
        return grad((first * v[..., : a.shape[-1]]).sum(), (a, b))

    wide, others = (torch.cat([z, torch.full_like(z[..., :1], -torch.inf)], -1) for z in (a, b))
    v = torch.cat([v, v[..., :1]], -1)
    for got, want in zip(product(wide, others, None), product(a, b, None), strict=True):
        assert torch.all(got[..., -1] == 0)
        torch.testing.assert_close(got[..., :-1], want, rtol=1e-12, atol=1e-14)

    spoilt = a.masked_fill((MASK == 0)[..., None], torch.nan)
    for got, want in zip(product(spoilt, b, MASK), product(a, b, MASK), strict=True):
        assert torch.equal(got, want)
        assert torch.all(got[MASK == 0] == 0)
        assert torch.all(got[MASK == 1] != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KLS)
def test_half_precision(name, dtype):
    a, b = (z.detach().to(dtype).requires_grad_() for z in outputs(1.0))
    exact = [z.detach().double().requires_grad_() for z in (a, b)]
    products = []
    for pair in ((a, b), exact):
        first = grad(DIVERGENCES[name](*pair).sum(), pair, create_graph=True)
        products.append(grad(sum(g.double().square().sum() for g in first), pair))
    for got, want in zip(*products, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("name", KLS)
def test_outputs_may_be_changed_in_place_after_the_call(name):
    """As plain training may: only a second derivative needs them, and says so."""
    a, b = outputs(1.0)
    want = grad(DIVERGENCES[name](a, b).sum(), a)[0]
    changed = a * 1
    value = DIVERGENCES[name](changed, b).sum()
    changed.mul_(2)
    assert torch.equal(grad(value, a, retain_graph=True)[0], want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(value, a, create_graph=True)


@pytest.mark.parametrize("name", list(DIVERGENCES))
@pytest.mark.parametrize("weights", [{"lambda_s": 0}, {"mu": 0}, {}], ids=["D_Breg", "R_s", "both"])
def test_hessian_vector_product_of_a_step(name, weights):
    """Of the penalty in the model's weights, delta and theta~ held, against central differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    ids, parameters = torch.randint(20, (4, 5)), list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]
    # the start alone, of a fixed noise in absolute units: delta is no function of the weights
    config = papers(ascent_steps=0, scale="absolute", sigma=0.1, epsilon=0.3, beta_early=0.9, beta_late=0.9, **weights)
    generator = torch.Generator()
    noise = lambda like: torch.randn(like.shape, generator=generator.manual_seed(3), dtype=like.dtype)  # noqa: E731
    with SMART(model, config, divergence=name, noise=noise) as smart:
        for average in smart.teacher.values():
            average.mul_(0.5)

        def moved(step):
            with torch.no_grad():
                for p, d in zip(parameters, v, strict=True):
                    p.add_(step * d)

        def gradient(**settings):
            return grad(smart(ids)[1], parameters, **settings)

        products = grad(sum((g * d).sum() for g, d in zip(gradient(create_graph=True), v, strict=True)), parameters)
        moved(1e-5)
        up = gradient()
        moved(-2e-5)
        down = gradient()
        smart.update()  # the weights moved: without it the end of the block warns
    for got, plus, minus in zip(products, up, down, strict=True):
        torch.testing.assert_close(got, (plus - minus) / 2e-5, rtol=1e-5, atol=1e-8)


def test_a_kernel_is_for_plain_float32_logits_on_a_gpu(monkeypatch):
    """For others nothing asks whether there is Triton."""
    asked = []
    monkeypatch.setattr(divergences, "_kernels", lambda: asked.append(True) or True)
    a, mask = torch.zeros(2, 3), torch.ones(2)
    assert not divergences._has_kernel(a, a, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    class Other(torch.Tensor):
        pass

    others = [(a.as_subclass(Other), a), (a.double(), a), (a.long(), a), (a, a.to("meta"))]
    assert not any(divergences._has_kernel(*pair, None) for pair in others)
    assert not divergences._has_kernel(a, a, mask.to("meta"))
    assert asked == []
    assert divergences._has_kernel(a, a.bfloat16(), mask)


def test_where_triton_cannot_be_imported_there_is_no_kernel(monkeypatch):
    find = divergences._kernels.__wrapped__
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail("its import would abort the process"))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert find() is None
