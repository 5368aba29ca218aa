"""R-Drop, R3F, SiFT, VAT and ALUM as settings of SMART, each against its own formula by hand (docs/family.md).

The formulas use torch's own softmax and KL, in float64, on a tiny network, with the noise that SMART drew.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from notes import Notes
from torch import nn

from smartreg import SMARTConfig
from smartreg_torch import SMART

PAGE = (Path(__file__).parent.parent / "docs" / "family.md").read_text()
N, TOKENS, WIDTH = 5, 3, 4


@pytest.fixture
def network():
    """x -> logits, with x the embeddings themselves, and a batch of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(TOKENS * WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(N, TOKENS, WIDTH, dtype=torch.double)


class Dropout(nn.Module):
    """Dropout that writes down its multipliers, or has given ones."""

    def __init__(self):
        super().__init__()
        self.notes, self.given = Notes(), None

    def forward(self, h):
        if self.given is not None:
            return self.given * h
        mask = (torch.rand_like(h) < 0.75).to(h) / 0.75
        self.notes.add(mask)
        return mask * h


@pytest.fixture
def dropped(network):
    """The network with dropout, its batch, and what it gives with a given mask."""
    model, x = network
    layer = Dropout()
    model.insert(3, layer)

    def with_mask(x, mask):
        layer.given = mask
        try:
            return model(x)
        finally:
            layer.given = None

    return model, x, layer, with_mask


def run_dropped(dropped, config, nu, **settings):
    """The penalty, its gradient, delta, and the masks of the clean pass, of the ascent and of the last pass."""
    model, x, layer, _ = dropped
    found = run((model, x), config, nu, **settings)
    clean, _, *others = layer.notes.taken()  # the first step has one pass more, which checks that the model repeats
    assert len(others) == config.ascent_steps + 1
    assert all((mask != clean).any() for mask in others)
    return *found, [clean, *others]


def kl(p_logits, q_logits):
    """KL(P || Q) of each example."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def length(x):
    """||x_i||_2 of each example, to divide by."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1)


def gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def run(network, config, nu, **settings):
    """The penalty, its gradient, and delta, where the noise is nu."""
    model, x = network
    seen = []
    smart = SMART(model, config, noise=lambda like: nu, on_step=seen.append, **settings)
    _, penalty = smart(x)
    smart.remove()
    return penalty, gradient(penalty, model), seen[0].delta[0]


def presets():
    """What docs/family.md says, run as it is there."""
    names = {"model": nn.Sequential(nn.Embedding(9, WIDTH), nn.Flatten(), nn.Linear(TOKENS * WIDTH, 3))}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/family.md", "exec"), names)
    return names


def test_r_drop(dropped):
    """alpha/2 [ KL( f(x; m) || f(x; m') ) + KL( f(x; m') || f(x; m) ) ] of two dropout masks (Liang et al. 2021)."""
    model, x, _, with_mask = dropped
    alpha = 0.7
    penalty, grad, delta, (m, other) = run_dropped(dropped, presets()["r_drop"](alpha), torch.randn_like(x))
    assert not delta.any()
    p, q = with_mask(x, m), with_mask(x, other)
    expected = alpha / 2 * (kl(p, q) + kl(q, p)).mean()
    assert expected > 1e-3
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-8, atol=1e-12)


def test_r3f_with_dropout(dropped):
    """As below, each side with a mask of its own, as in the public code."""
    model, x, _, with_mask = dropped
    sigma, strength = 0.1, 0.7
    nu = torch.randn_like(x)
    penalty, grad, delta, (m, other) = run_dropped(dropped, presets()["r3f"](sigma, strength), nu)
    torch.testing.assert_close(delta, sigma * nu, rtol=0, atol=0)
    clean, noised = with_mask(x, m), with_mask(x + sigma * nu, other)
    expected = strength * (kl(clean, noised) + kl(noised, clean)).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-8, atol=1e-12)


def both(p, q):
    return kl(p, q) + kl(q, p)


def test_sift(dropped):
    """delta = sigma nu + eta g / max|g| of each token, at embeddings that are normalised (He et al. 2021, DeBERTa)."""
    model, x, layer, with_mask = dropped
    normalised = nn.LayerNorm(WIDTH, elementwise_affine=False).double()
    model.insert(0, normalised)
    sigma, eta, strength = 0.01, 0.3, 0.7
    nu = torch.randn_like(x).clamp(-2, 2)
    config = presets()["sift"](sigma, eta, strength)
    penalty, grad, delta, (m, ascent, other) = run_dropped((model, x, layer, None), config, nu, site="0")

    normal, rest = normalised(x), model[1:]

    def at(point, mask):
        layer.given = mask
        return rest(point)

    moved = (normal + sigma * nu).requires_grad_()
    (g,) = torch.autograd.grad(both(at(normal, m).detach(), at(moved, ascent)).sum(), moved)
    by_hand = sigma * nu + eta * g / g.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(delta, by_hand, rtol=1e-9, atol=1e-12)
    clean, perturbed = at(normal, m), at(normal + by_hand, other)
    expected = strength * both(perturbed, clean).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-7, atol=1e-12)
    # the public code's gradient: the sum of two cross-entropies whose first sides are held
    p, q = at(normal, m).log_softmax(-1), at(normal + by_hand, other).log_softmax(-1)
    released = -strength * ((q.exp().detach() * p) + (p.exp().detach() * q)).sum(-1).mean()
    assert (grad - gradient(released, model)).norm() > 0.05 * grad.norm()


def test_the_released_code(dropped):
    """delta <- (delta + eta g) / ( max|delta + eta g| + 1e-6 ) of each token, with a mask of its own in each pass."""
    model, x, _, with_mask = dropped
    nu = torch.randn_like(x)
    config = SMARTConfig.mtdnn(dropout="independent")
    penalty, grad, delta, (m, ascent, other) = run_dropped(dropped, config, nu)
    start = (config.sigma * nu).requires_grad_()
    (g,) = torch.autograd.grad(both(with_mask(x, m).detach(), with_mask(x + start, ascent)).sum(), start)
    step = start.detach() + config.eta * g
    by_hand = step / (step.abs().amax(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(delta, by_hand, rtol=1e-9, atol=1e-12)
    expected = both(with_mask(x + by_hand, other), with_mask(x, m)).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_r3f(network, noise):
    """KL_S( f(x) || f(x + z) ), z ~ N(0, sigma^2 I) or U(-sigma, sigma) (Aghajanyan et al. 2021)."""
    model, x = network
    sigma, strength = 0.1, 0.7
    nu = torch.randn_like(x) if noise == "normal" else 2 * torch.rand_like(x) - 1
    z = sigma * nu
    clean, noised = model(x), model(x + z)
    expected = strength * (kl(clean, noised) + kl(noised, clean)).mean()

    config = presets()["r3f"](sigma, strength)
    penalty, grad, delta = run(network, config, nu)
    torch.testing.assert_close(delta, z, rtol=0, atol=0)  # not projected
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-8, atol=1e-12)


def test_r3f_with_uniform_noise_as_in_the_docs():
    smart = presets()["smart"]
    _, penalty = smart(torch.randint(9, (64, TOKENS)))
    smart.remove()
    sigma = smart.config.sigma
    assert 0.98 * sigma < smart.metrics["max_delta"] <= sigma
    assert penalty > 0


def test_r3f_is_not_projected_whatever_is_drawn():
    """10 sigma: Box-Muller from 53 bits gives at most sqrt(-2 log 2^-53) = 8.57."""
    config = presets()["r3f"](1e-5, 1.0)
    assert config.epsilon / config.sigma >= 10 - 1e-9
    assert math.sqrt(2 * 53 * math.log(2)) < 10
    assert config.ascent_steps == config.mu == 0


def test_vat_perturbation(network):
    """r = epsilon g / ||g||_2, g = grad_r KL( p(x) || p(x + r) ) at r = xi d, ||d||_2 = 1 (Miyato et al. 2018)."""
    model, x = network
    epsilon, xi = 0.3, 1e-6
    nu = torch.randn_like(x)
    r = (xi * nu / length(nu)).requires_grad_()
    (g,) = torch.autograd.grad(kl(model(x).detach(), model(x + r)).sum(), r)
    r_vadv = epsilon * g / length(g)

    # sigma nu is not of length xi: both are a difference quotient's small step
    _, _, delta = run(network, presets()["vat"](epsilon, xi), nu)
    torch.testing.assert_close(length(delta), torch.full((N, 1, 1), epsilon, dtype=torch.double), rtol=1e-9, atol=0)
    torch.testing.assert_close(delta, r_vadv, rtol=0, atol=1e-4 * epsilon)


def test_vat_has_the_value_but_not_the_gradient(network):
    """LDS = KL( p(x; theta^) || p(x + r; theta) ), theta^ held: half of R_s for a small r, with another gradient."""
    model, x = network
    nu = torch.randn_like(x)
    ratios = []
    for epsilon in (1e-2, 1e-3):
        penalty, grad, delta = run(network, presets()["vat"](epsilon, 1e-7), nu)
        lds = kl(model(x).detach(), model(x + delta)).mean()
        torch.testing.assert_close(penalty, lds, rtol=10 * epsilon, atol=0)
        ratios.append(float(grad.norm() / gradient(lds, model).norm()))
    # theta^ held: of first order in r; where both sides move, of second
    assert ratios[0] == pytest.approx(10 * ratios[1], rel=0.1)
    assert ratios[0] < 0.1


def test_alum_regression(network):
    """delta <- Proj_inf( delta + eta g ), g = grad_delta l( f(x), f(x + delta) ); alpha l( f(x), f(x + delta) ).

    With l the squared error, which has two equal sides. eta g is eta ||g|| times SMART's step, for one example.
    """
    model, x = network
    x = x[:1]
    epsilon, sigma, alpha = 0.2, 0.01, 10.0
    nu = torch.randn_like(x)

    def l_s(delta):
        return (model(x) - model(x + delta)).square().sum(-1).mean()

    delta = (sigma * nu).requires_grad_()
    (g,) = torch.autograd.grad(l_s(delta), delta)
    eta = 0.25 / g.abs().max()
    expected_delta = (delta + eta * g).clamp(-epsilon, epsilon).detach()
    assert (expected_delta.abs() == epsilon).any()
    assert (expected_delta.abs() < epsilon).any()
    expected = alpha * l_s(expected_delta)

    config = presets()["alum"](epsilon, sigma, float(eta * g.abs().max()), alpha)
    penalty, grad, delta = run((model, x), config, nu, divergence="squared_error")
    torch.testing.assert_close(delta, expected_delta, rtol=1e-10, atol=0)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, gradient(expected, model), rtol=1e-8, atol=1e-12)


def test_alum_classification(network):
    """The same with classes: SMART's l_s has both sides, KL(f(x) || f(x~)) + KL(f(x~) || f(x)); the paper's one."""
    model, x = network
    nu = torch.randn_like(x)
    delta = (0.01 * nu).requires_grad_()
    clean = model(x)
    both = kl(clean.detach(), model(x + delta)) + kl(model(x + delta), clean.detach())
    (g,) = torch.autograd.grad(both.sum(), delta)
    step = 0.05 * g / g.abs().amax((1, 2), keepdim=True)
    expected_delta = (delta + step).clamp(-0.03, 0.03).detach()
    moved = model(x + expected_delta)
    one_side = kl(clean, moved).mean()
    penalty, _, delta = run(network, presets()["alum"](0.03, 0.01, 0.05, 1.0), nu)
    torch.testing.assert_close(delta, expected_delta, rtol=1e-7, atol=0)
    torch.testing.assert_close(penalty, one_side + kl(moved, clean).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(penalty, 2 * one_side, rtol=0.1, atol=0)
