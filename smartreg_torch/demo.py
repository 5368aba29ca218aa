"""Train the network of `python -m smartreg demo` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smartreg.config import SMARTConfig
from smartreg.demo.compare import RATE, Outcome, Task, outcome
from smartreg.demo.digits import BATCH, CONFIG, DROPOUT, LEARNING_RATE, Array, Weights, batches, standard_normal
from smartreg_torch.smart import SMART


def network(weights: Weights, dropout: float = DROPOUT) -> nn.Sequential:
    """Build two ReLU layers with dropout, and a head."""
    linear = []
    for k in (1, 2, 3):
        W, b = weights[f"W{k}"], weights[f"b{k}"]
        layer = nn.Linear(*W.shape)
        layer.load_state_dict({"weight": torch.from_numpy(W.T.copy()), "bias": torch.from_numpy(b)})
        linear.append(layer)
    return nn.Sequential(
        linear[0], nn.ReLU(), nn.Dropout(dropout), linear[1], nn.ReLU(), nn.Dropout(dropout), linear[2]
    )


def weights_of(model: nn.Sequential) -> Weights:
    """Return the weights of a network as `network` takes them."""
    found: Weights = {}
    for k, layer in enumerate((part for part in model if isinstance(part, nn.Linear)), start=1):
        found[f"W{k}"] = layer.weight.detach().numpy().T.copy()  # torch keeps a matrix as (out, in)
        found[f"b{k}"] = layer.bias.detach().numpy().copy()
    return found


def train(weights: Weights, x: Array, y: Array, config: SMARTConfig, seed: int) -> Weights:
    """Run Algorithm 1 in a plain loop. With lambda_s = mu = 0 it is plain training, bit for bit."""
    model = network(weights)
    draw = standard_normal(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.from_numpy(draw(tuple(like.shape)))

    torch.manual_seed(seed)  # dropout: the same masks for every method
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    with SMART(model, config, site="input", noise=noise) as smart:
        for at in batches(len(x), BATCH, config.total_steps or 0, seed):
            output, penalty = smart(torch.from_numpy(x[at]))
            loss = cross_entropy(output, torch.from_numpy(y[at])) + penalty
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
    return weights_of(model)


def run(task: Task) -> Outcome:
    """Train in float64 on what every backend gets."""
    model = network(task.weights, dropout=0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    x, y, noise = (torch.from_numpy(array) for array in task[1:])
    draws, terms = iter(noise), []
    with SMART(model, CONFIG, site="input", noise=lambda like: next(draws)) as smart:
        for x_batch, y_batch in zip(x, y, strict=True):
            output, penalty = smart(x_batch)
            loss = cross_entropy(output, y_batch) + penalty
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            smart.update()
            terms.append((loss.item(), smart.metrics["R_s"], smart.metrics["D_Breg"]))
        weights = {name: value.detach().numpy().T for name, value in model.named_parameters()}
        return outcome(terms, list(weights.values()), [smart.teacher[name].numpy().T for name in weights])
