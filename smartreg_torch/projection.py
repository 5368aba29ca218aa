"""Compare outputs that are hidden states times a head's weight, block by block: no (tokens x vocabulary) tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from smartreg_torch.compat import frees_the_graph
from smartreg_torch.divergences import DIVERGENCES, ROWS, Formula, check_mask, values_and_gradients

# Logits that are computed at once: a matrix product is slow with fewer, and more fill the memory.
CHUNK, DEVICE_CHUNK = 1 << 22, 1 << 26


@dataclass(frozen=True)
class Projection:
    """Stand for the logits h W^T + b, which are computed in blocks of positions, and never all at once.

    For the function `outputs=` of a model with a large vocabulary, or whose loss is fused with its last layer, so that
    it gives no logits while it trains.

    Args:
        hidden: h, what the head is given, (n, ..., d).
        weight: W, (C, d). It must be looked up anew at each call of the function: theta~ has another one.
        bias: b, (C,).

    Raises:
        TypeError, ValueError: these are not such tensors, or the weight is sharded.

    Example:
        >>> z = Projection(torch.ones(2, 7, 4), torch.ones(50, 4))
        >>> z.shape
        torch.Size([2, 7, 50])
        >>> z.logits()[0, 0, 0]
        tensor(4.)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            if name == "bias" and tensor is None:
                continue
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                raise TypeError(f"Projection: {name} must be a floating-point tensor, got {type(tensor).__name__}")
            if hasattr(tensor, "to_local"):
                raise ValueError(
                    f"Projection: {name} is sharded (a DTensor), so its rows are not all here. Keep the head whole, "
                    "outside of fully_shard, or compare the model's logits"
                )
        if self.hidden.ndim < 2 or self.weight.ndim != 2 or self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                "Projection: expected hidden (n, ..., d) and weight (C, d), got "
                f"{tuple(self.hidden.shape)} and {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"Projection: expected a bias ({len(self.weight)},), got {tuple(self.bias.shape)}")

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the logits, (n, ..., C)."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    @property
    def ndim(self) -> int:
        """Return the number of the logits' axes."""
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        """Return where the logits would be."""
        return self.hidden.device

    def __len__(self) -> int:
        return len(self.hidden)

    def detach(self) -> Projection:
        """Return the same off the graph; theta~, if it stands in for the weights, stays in it."""
        return Projection(self.hidden.detach(), self.weight.detach(), None if self.bias is None else self.bias.detach())

    def logits(self) -> Tensor:
        """Return all logits, (n, ..., C)."""
        same = self.in_one_dtype()
        return same.logits_of(same.hidden)

    def in_one_dtype(self) -> Projection:
        """Return the same in the dtype of the hidden states; in float32 if theirs is float16, which is too narrow."""
        dtype = torch.float32 if self.hidden.dtype == torch.float16 else self.hidden.dtype
        return Projection(
            self.hidden.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        )

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits of other hidden states of this dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden, self.weight, self.bias)

    def chunks(self, keep: Tensor | None) -> list[Tensor | slice]:
        """Return indices of the positions, (n ...) flattened, chunk by chunk; on a CPU of those alone that are kept."""
        size = max(1, (CHUNK if self.hidden.is_cpu else DEVICE_CHUNK) // len(self.weight))
        if keep is not None and keep.is_cpu:
            return list(torch.split(keep.flatten().nonzero().squeeze(-1), size))
        count = self.hidden.shape[:-1].numel()
        return [slice(start, start + size) for start in range(0, count, size)]


Output = Tensor | Projection
# what Hugging Face's configs call a factor, or a squashing, between the head and the logits
_RESHAPED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def without_adapters(model: Any) -> Any:
    """Return the model inside a PEFT model, or the model itself."""
    base = getattr(model, "get_base_model", None)  # PEFT's
    return base() if callable(base) else model


def has_head(model: Any) -> bool:
    """Tell whether this is a Hugging Face language model: its outputs are hidden states times a head's weight."""
    find = getattr(without_adapters(model), "get_output_embeddings", None)
    return callable(find) and isinstance(getattr(find(), "weight", None), Tensor)


def without_logits(model: Any) -> Callable[[Any], Projection]:
    """Return the function for `outputs=` of a Hugging Face language model whose loss is fused with its head.

    Such a model gives no logits while it trains (TRL's SFTTrainer, Liger). A hook keeps what its backbone returned, and
    the outputs are those hidden states times the head's weight.

    Args:
        model: a model with `base_model` and `get_output_embeddings`, or a PEFT model of one.

    Raises:
        ValueError: it has no such head, or its logits are not h W^T + b, because they are scaled or capped.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
        >>> outputs = without_logits(model)
        >>> outputs(model(torch.ones(2, 7, dtype=torch.long))).shape
        torch.Size([2, 7, 50])
    """
    language = without_adapters(model)
    backbone = getattr(language, "base_model", language)
    if backbone is language or not has_head(model):
        raise ValueError(
            f"without_logits: {type(model).__name__} has no backbone (base_model) with a head (get_output_embeddings). "
            "Give outputs= a function that returns Projection(hidden states, weight of the head)"
        )
    config: Any = getattr(language, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _RESHAPED:
        value = getattr(text, name, None)
        if value not in (None, 1):
            raise ValueError(
                f"without_logits: config.{name} is {value}, so the logits are not the hidden states times the head's "
                "weight. Compare the model's logits instead"
            )
    return _LastHidden(language, backbone)


class _LastHidden:
    """Keep what the backbone of a language model returned last, and give it with the head's weight."""

    def __init__(self, language: Any, backbone: Any) -> None:
        self._language, self._backbone, self._hidden = language, type(backbone).__name__, None
        backbone.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state

    def __call__(self, output: Any) -> Projection:
        if self._hidden is None:
            raise RuntimeError(
                f"without_logits: the model did not call its backbone, {self._backbone}. Give outputs= a function "
                "that returns Projection(hidden states, weight of the head)"
            )
        head = self._language.get_output_embeddings()
        return Projection(self._hidden, head.weight, head.bias)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_hidden": None}  # it is of a graph


def values_of(outputs: Sequence[Output]) -> list[Tensor]:
    """Return the tensors on the model's graph: the hidden states of a projection.

    Example:
        >>> values_of([torch.zeros(1), Projection(torch.ones(1, 2), torch.ones(3, 2))])
        [tensor([0.]), tensor([[1., 1.]])]
    """
    return [z.hidden if isinstance(z, Projection) else z for z in outputs]


def whole(z: Output) -> Tensor:
    """Return an output as a tensor off the graph: all logits of a projection."""
    return z.detach().logits() if isinstance(z, Projection) else z.detach()


def total(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of scalars; the only one as it is."""
    found = list(terms)
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def sum_divergence(
    name: str,
    a: Output,
    b: Output,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return sum_i w_i l_s(a_i, b_i) of two tensors, or of the logits that two projections stand for.

    Of projections, dJ/dh = g W and dJ/dW = sum g h^T, g = dJ/d(logits) of a position: values and gradients are found in
    one walk over the positions. They have no higher derivatives.

    Args:
        name: of l_s; of projections, one of two distributions.
        a, b: (n, ..., C). mask: which positions count, (n, ...). sample_weight: w_i, (n,), 1 by default.

    Raises:
        ValueError: there is no such divergence of logits, or the shapes differ.

    Example:
        >>> a, b = (Projection(torch.tensor([[1.0, z]]), torch.eye(2)) for z in (1.0, 1.1))
        >>> sum_divergence("symmetric_kl", a, b)
        tensor(0.0025)
    """
    if sample_weight is not None and sample_weight.shape != a.shape[:1]:
        raise ValueError(
            f"sample_weight must have one weight an example, {tuple(a.shape[:1])}, got {tuple(sample_weight.shape)}"
        )
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        values = DIVERGENCES[name](a, b, mask)
        return (values if sample_weight is None else values * sample_weight.to(values)).sum()
    if not (isinstance(a, Projection) and isinstance(b, Projection)):
        raise TypeError(f"{name}: expected two tensors or two projections, got {type(a).__name__}, {type(b).__name__}")
    if name not in ROWS:
        raise ValueError(f"Projection: expected a divergence of logits, one of {sorted(ROWS)}, got {name!r}")
    if a.shape != b.shape:
        raise ValueError(
            f"{name}: expected two outputs of one shape (n, ..., C), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    weights = _position_weights(a, mask, sample_weight)
    tensors = (a.hidden, b.hidden, a.weight, b.weight, a.bias, b.bias)
    total: Tensor = _SumDivergence.apply(ROWS[name], weights, *tensors)  # type: ignore[no-untyped-call]
    return total


def _position_weights(z: Projection, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """Return the weight of each position in the sum, (positions,): w_i over the number of i's positions that count."""
    keep = z.hidden.new_ones(z.shape[:-1], dtype=torch.promote_types(z.hidden.dtype, torch.float32))
    if mask is not None:
        check_mask(mask, z.shape[:-1])
        keep = (mask != 0).to(keep)
    keep = keep.unsqueeze(-1).flatten(1)
    weights = keep / keep.sum(1, keepdim=True).clamp(min=1)
    if sample_weight is not None:
        weights = weights * sample_weight.to(weights).unsqueeze(-1)
    return weights.flatten()


class _SumDivergence(torch.autograd.Function):
    """(n, ..., d) twice, (C, d) twice, (C,) twice -> ()."""

    @staticmethod
    def forward(ctx: Any, rows: Formula, weights: Tensor, *tensors: Any) -> Tensor:
        sides = [Projection(*tensors[side::2]).in_one_dtype() for side in (0, 1)]
        dtype = torch.promote_types(torch.promote_types(tensors[0].dtype, tensors[1].dtype), torch.float32)
        wanted = ctx.needs_input_grad[2:]
        sums = [z.new_zeros(z.shape, dtype=dtype) if want else None for z, want in zip(tensors, wanted, strict=True)]
        for i in (2, 4):  # one head on both sides has one gradient
            if tensors[i] is tensors[i + 1]:
                sums[i + 1] = sums[i]
        weights, total = weights.to(dtype), weights.new_zeros((), dtype=dtype)
        for at in sides[0].chunks(weights != 0):
            keep = (weights[at] != 0).unsqueeze(-1)
            hidden = [side.hidden.flatten(0, -2)[at].where(keep, 0) for side in sides]
            logits = [side.logits_of(h) for side, h in zip(sides, hidden, strict=True)]
            need = [any(wanted[i::2]) for i in (0, 1)]
            values, *gradients = values_and_gradients(rows, logits[0], logits[1], None, need)
            total += values @ weights[at]
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    gradient.mul_(weights[at].unsqueeze(-1))
                    _add_up(sums[i::2], at, gradient, sides[i].weight, hidden[i])
        ctx.save_for_backward(*(None if i % 2 and z is sums[i - 1] else z for i, z in enumerate(sums)))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Projection: there are no second derivatives (create_graph=True). Compare the model's logits instead"
            )
        product = Tensor.mul_ if frees_the_graph() else Tensor.mul
        return None, None, *(None if g is None else product(g, grad) for g in ctx.saved_tensors)


def _add_up(sums: list[Tensor | None], at: Any, gradient: Tensor, weight: Tensor, hidden: Tensor) -> None:
    """Add to the gradients of h, W and b what the one at some positions' logits gives."""
    of_hidden, of_weight, of_bias = sums
    narrow = gradient.to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if of_hidden is not None:
            of_hidden.flatten(0, -2)[at] = (narrow @ weight).to(of_hidden.dtype)
        if of_weight is not None and of_weight.dtype == hidden.dtype:
            of_weight.addmm_(narrow.T, hidden)  # without a second matrix of its size
        elif of_weight is not None:
            of_weight += narrow.T @ hidden
        if of_bias is not None:
            of_bias += gradient.sum(0)


def at_hidden(z: Projection, mask: Tensor | None, entries: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Return g W, (n, ..., d), of a sparse gradient g at the logits.

    Args:
        mask: which positions count, (n, ...). entries: logits -> the classes and the values of g there, (..., k).
    """
    same = z.detach().in_one_dtype()
    hidden = same.hidden.flatten(0, -2)
    found, keep = torch.zeros_like(hidden), None if mask is None else mask.flatten() != 0
    for at in z.chunks(keep):
        classes, values = entries(same.logits_of(hidden[at]))
        found[at] = (same.weight[classes] * values.unsqueeze(-1)).sum(-2)
    return (found if keep is None else found.where(keep.unsqueeze(-1), 0)).to(z.hidden.dtype).view_as(z.hidden)
