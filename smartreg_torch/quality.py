"""Measure how smooth and how well calibrated a model is, over labelled batches: before and after fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smartreg.config import Precision, SMARTConfig
from smartreg.quality import RADII, Quality, measuring
from smartreg.tally import Tallies
from smartreg_torch.checks import check_values
from smartreg_torch.inputs import Masks, virtual_tokens
from smartreg_torch.labels import IGNORED, Positions
from smartreg_torch.outputs import SPANS, Outputs
from smartreg_torch.projection import whole
from smartreg_torch.replay import device_of
from smartreg_torch.smart import SMART
from smartreg_torch.step import Step

_SPAN_LABELS = ("start_positions", "end_positions")  # Hugging Face's, of question answering


def report(
    model: nn.Module,
    loader: Iterable[Any],
    config: SMARTConfig | None = None,
    *,
    radii: Sequence[float] = RADII,
    batches: int | None = None,
    labels: str | Sequence[str] | None = None,
    site: str | Sequence[str] | None = None,
    outputs: Outputs | None = None,
    divergence: str | Sequence[str] | None = None,
    class_axis: int | None = None,
    mask: Masks | None = None,
    precision: Precision = "float32",
) -> Quality:
    """Measure R_s, what flips inside the ball, accuracy and calibration of a model in eval mode.

    R_s(radius) = 1/n sum_i max_{||delta_i|| <= radius} l_s( f(x_i + delta_i), f(x_i) )

    The maximum is sought by the margin start and three ascent steps, whatever ascent the training has. So R_s and the
    flips are lower bounds, found by the same search before and after. A radius costs nine passes or so.

    The model, its mode, its gradients, the global random streams and a SMART that trains it stay as they are. A loader
    that shuffles by the global stream gives the same batches in every report. In several processes each measures the
    batches of its own loader.

    Args:
        model: as `SMART` takes it.
        loader: batches: dicts of the model's arguments and labels, as the Trainer's loaders give, or tuples
            (inputs, labels). They are moved to the model's device. Several outputs have a list of labels, or a dict.
        config: the settings of the training: norm, granularity, scale and epsilon say what the balls are.
        radii: in multiples of `config.epsilon`.
        batches: how many are read at most; None is all.
        labels: the name of the labels in a dict, or one for each output; by default "labels", "label", or
            "start_positions" and "end_positions". The model gets them, too, if its forward takes them.
        site, outputs, divergence, class_axis, mask, precision: as `SMART` takes them.

    Returns:
        the numbers: `print` shows a table, `before.compare(after)` one of both, `before.plot("file.png", after)` a
        picture.

    Raises:
        TypeError, ValueError: as `SMART`; a batch has no labels, there is no batch, or the labels do not fit.

    Source: paper, equation 2; Guo et al. 2017 (arXiv 1706.04599) for the calibration error.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 2))
        >>> ids, y = torch.randint(9, (16, 2)), torch.randint(2, (16,))
        >>> found = report(model, [(ids, y)], SMARTConfig(epsilon=0.1), radii=[1])
        >>> list(found.numbers)
        ['accuracy', 'ECE', 'NLL', 'R_s at 0.1', 'flips at 0.1']
    """
    balls = measuring(config, radii, batches)
    tallies, first = Tallies(balls), True
    asked: dict[str, Any] = {"site": site, "outputs": outputs, "divergence": divergence, "class_axis": class_axis}
    with SMART(model, balls[0], **asked, mask=mask, precision=precision, noise=_noise) as smart:
        offset, names, device = _offset(smart.model), smart._reader.names, device_of(smart.model)
        with _streams_kept(smart.model):
            for batch in islice(loader, batches):
                args, kwargs, given = _split(batch, labels, names, device)
                counted = _label_mask(given, offset)
                R_s = []
                for k, ball in enumerate(balls):
                    smart.config = ball
                    step = smart.evaluated(smart._reader, (args, kwargs), None, counted, "report()")
                    if first:
                        check_values(step.compared, masks_were_found=mask is None)
                        first = False
                    if k == 0:
                        _add(tallies, step, given, offset, virtual_tokens(smart.model))
                    for head, z in zip(step.compared.heads, step.stages["perturbed"], strict=True):
                        tallies.of(head.name, head.divergence).change(k, _array(whole(z)))
                    R_s.append(float(step.terms["R_s"].detach()))
                n = len(step.compared.targets[0])
                tallies.add([n * value for value in R_s], n, n)
    return tallies.quality(config)


def _add(tallies: Tallies, step: Step, given: Any, offset: int, virtual: int) -> None:
    """Add the clean outputs of a batch and their labels."""
    compared, own = step.compared, step.passes.clean.outputs
    labels = _of_heads(given, [head.name for head in compared.heads])
    for head, raw, z, y, mask in zip(
        compared.heads, own.values(), compared.targets, labels, compared.positions, strict=True
    ):
        if y.shape == raw.shape:
            y = head.arranged(y)
        elif z.ndim == 3 and y.ndim == 2 and not y.is_floating_point() and z.shape[1] - y.shape[1] == virtual:
            y = Positions(offset + virtual, virtual).align(y)
        if head.name in SPANS:
            y = y.where(y < z.shape[1], IGNORED)  # the answer is cut off
        tally = tallies.of(head.name, head.divergence)
        tally.add(_array(whole(z)), _array(y), None if mask is None else _array(mask))


def _split(
    batch: Any, asked: str | Sequence[str] | None, names: Sequence[str], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the model's arguments and the labels of a batch.

    Args:
        asked: as labels= says.
        names: of the arguments that the model's forward takes.
    """
    inputs: Any
    if isinstance(batch, Mapping):
        keys = [asked] if isinstance(asked, str) else list(asked) if asked is not None else _label_names(batch)
        missing = [key for key in keys if batch.get(key) is None]
        if missing or not keys:
            wanted = repr(missing[0]) if missing else "'labels'"
            raise ValueError(
                f"report(): a batch has no labels: expected {wanted} among its keys, got {sorted(map(str, batch))}. "
                "Say labels=, the name of the labels in the batch"
            )
        given = [_moved(batch[key], device) for key in keys]
        labels = given[0] if len(given) == 1 else given
        inputs = {name: value for name, value in batch.items() if name not in keys or name in names}
    elif isinstance(batch, (tuple, list)) and len(batch) == 2 and batch[1] is not None:
        inputs, labels = batch[0], _moved(batch[1], device)
    else:
        got = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"report(): a batch has no labels: expected a dict with them, or a tuple (inputs, labels), got a {got}. Of "
            "several inputs give ((a, b), labels)"
        )
    inputs = _moved(inputs, device)
    if isinstance(inputs, Mapping):
        return (), dict(inputs), labels
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, labels


def _label_names(batch: Mapping[str, Any]) -> list[str]:
    found = next((name for name in ("labels", "label") if batch.get(name) is not None), None)
    if found is not None:
        return [found]
    return [*_SPAN_LABELS] if all(name in batch for name in _SPAN_LABELS) else []


def _of_heads(given: Any, names: Sequence[str]) -> list[Tensor]:
    """Return the labels of each output."""
    if isinstance(given, Mapping):
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(
                f"report(): the labels have no {missing[0]!r}, an output that is compared: {list(given)}. Give "
                "labels of each output by its name"
            )
        found = [given[name] for name in names]
    else:
        found = list(given) if isinstance(given, (tuple, list)) else [given]
    if len(found) != len(names):
        raise ValueError(f"report(): expected labels of each of the outputs {list(names)}, got {len(found)} of them")
    wrong = next((y for y in found if not isinstance(y, Tensor)), None)
    if wrong is not None:
        raise TypeError(f"report(): labels must be tensors, got {type(wrong).__name__}")
    return found


def _label_mask(labels: Any, offset: int) -> Tensor | None:
    """Return which positions have a label, or None if all do, or if nothing has positions."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2:
        return None
    found = Positions(offset).mask(labels)
    return None if bool(found.all()) else found


def _offset(model: Any) -> int:
    """Return -1 if an output predicts the next token: in Hugging Face's language models the loss shifts the labels."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return 0
    from smartreg_torch.probe import likely_offset  # needs transformers, which such a model comes from

    return likely_offset(model)


@contextmanager
def _streams_kept(model: nn.Module) -> Iterator[None]:
    """Put back the global random streams, which a loader may draw from; inside they begin alike in every report."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")
    kept = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(list(devices), device_type=kind):
        try:
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            yield
        finally:
            np.random.set_state(kept[0])  # noqa: NPY002
            random.setstate(kept[1])


def _noise(like: Tensor) -> Tensor:
    """Draw the signs of the margin start in regression, the same in every report and for every batch."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)


def _moved(value: Any, device: torch.device) -> Any:
    """Move the tensors in a batch to the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (list, tuple) else value


def _array(tensor: Tensor) -> Any:
    """Copy a tensor into main memory, half precision as float32."""
    tensor = tensor.detach()
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
    return wide.cpu().numpy()
