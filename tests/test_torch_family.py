"""R3F, VAT and ALUM as settings of SMART, each against its own paper's formula, written out by hand (docs/family.md).

The formulas use torch's own softmax and KL, in float64, on a tiny network, with the noise that SMART drew.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from smartreg_torch import SMART

PAGE = (Path(__file__).parent.parent / "docs" / "family.md").read_text()
N, TOKENS, WIDTH = 5, 3, 4


@pytest.fixture
def network():
    """x -> logits, with x the embeddings themselves, and a batch of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(TOKENS * WIDTH, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(N, TOKENS, WIDTH, dtype=torch.double)


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
