"""Decide which outputs of a model are compared, by which l_s, where their classes are, which positions count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smartreg.config import one_each
from smartreg.divergences import check_divergence, takes_logits
from smartreg.report import LATER, Choice
from smartreg_torch.divergences import ROWS
from smartreg_torch.inputs import Inputs, Masks, read_inputs, virtual_tokens
from smartreg_torch.passes import Passes
from smartreg_torch.perturbation import output_mask
from smartreg_torch.projection import Output, Projection
from smartreg_torch.site import Call, argument_names

Outputs = str | int | Sequence[str | int] | Callable[[Any], Output | Sequence[Output]]

# What Hugging Face calls the loss that goes with the outputs, and the l_s that goes with that.
_PROBLEM_TYPES = {
    "single_label_classification": "symmetric_kl",
    "multi_label_classification": "bernoulli_symmetric_kl",
    "regression": "squared_error",
}
SPANS = ("start_logits", "end_logits")  # a softmax over the positions


class Head(NamedTuple):
    """Say how one output is compared.

    Attributes:
        name: what the model calls it.
        divergence: the name of l_s.
        axis: where its classes, labels or values are; None if each entry is one output of its own.
        why_divergence, why_axis: what said so.
    """

    name: str
    divergence: str
    axis: int | None
    why_divergence: str
    why_axis: str

    @property
    def is_guess(self) -> bool:
        """Tell whether nothing said what l_s is."""
        return self.why_divergence == DEFAULT

    def arranged(self, z: Any) -> Any:
        """Arrange the output as (n, ..., C)."""
        if isinstance(z, Projection):
            return z
        if self.axis is None:
            return z.unsqueeze(-1)
        return z if self.axis in (-1, z.ndim - 1) else z.movedim(self.axis, -1)


DEFAULT = "the default"


class Evidence(NamedTuple):
    """Hold the facts that say how outputs are read.

    Attributes:
        config: the model's own, or None.
        labels: the argument of that name, if the model was given one.
        masks: of the positions of x, (n, tokens).
        xs: shapes of x, (n, ..., d); if there is no site, of what the model was given.
        at_input: whether x is the model's own argument. An image or a signal may have its channels on any axis.
    """

    config: Any
    labels: Any
    masks: Sequence[Tensor | None]
    xs: Sequence[torch.Size]
    at_input: bool

    def positions(self) -> list[tuple[str, set[tuple[int, ...]]]]:
        """List the shapes that an output's positions may have, and what says so."""
        found: list[tuple[str, set[tuple[int, ...]]]] = []
        if isinstance(self.labels, Tensor) and not self.labels.is_floating_point() and self.labels.ndim > 1:
            found.append(("the labels' shape", {tuple(self.labels.shape[1:])}))
        found += [("the mask's shape", {tuple(mask.shape[1:])}) for mask in self.masks if mask is not None]
        for x in self.xs:
            either = {tuple(x[1:-1])} if len(x) > 2 else set()
            if len(x) > 3 or (len(x) == 3 and self.at_input):  # the channels may be on axis 1
                either.add(tuple(x[2:]))
            found += [("the shape of x", either)] if either else []
        return found

    def counts(self) -> list[tuple[str, int]]:
        """List the numbers of classes that the model's config has."""
        names = ("num_labels", "vocab_size")
        text = getattr(self.config, "text_config", None)  # of a vision-language model
        found = [(f"config.{name}", getattr(self.config, name, None)) for name in names]
        found.append(("config.text_config.vocab_size", getattr(text, "vocab_size", None)))
        return [(name, count) for name, count in found if isinstance(count, int) and count > 1]


def chosen(output: Any, outputs: Outputs | None) -> dict[str, Any]:
    """Choose the outputs that are compared, by name, as the model gives them.

    Raises:
        ValueError: `outputs` names none of them, or it is not clear which is meant.

    Example:
        >>> list(chosen({"logits": torch.zeros(1, 2), "hidden": torch.zeros(1, 9)}, None))
        ['logits']
    """
    if callable(outputs):
        found = outputs(output)
        named: dict[str, Any] = (
            {"outputs=": found}
            if isinstance(found, (Tensor, Projection))
            else {f"outputs=[{i}]": z for i, z in enumerate(found)}
        )
        if not torch.is_grad_enabled():  # so that a projection keeps theta~, which stands in for the weights now
            named = {name: z.detach() if isinstance(z, Projection) else z for name, z in named.items()}
        return named
    if isinstance(output, Tensor):
        if outputs is not None:
            raise ValueError(
                f"SMART: the model returns one tensor; outputs={outputs!r} chooses nothing in it. Leave outputs= out"
            )
        return {"the model's output": output}
    fields: dict[Any, Any] = vars(output) if hasattr(output, "__dict__") else {}
    if isinstance(output, Mapping):
        fields = dict(output)
    elif isinstance(output, Sequence):
        names = getattr(output, "_fields", ())  # of a named tuple, whose places count too
        fields = dict(enumerate(output)) if isinstance(outputs, int) or not names else output._asdict()  # type: ignore[attr-defined]
    if outputs is not None:
        keys = [outputs] if isinstance(outputs, (str, int)) else list(outputs)
        missing = [key for key in keys if key not in fields]
        if missing:
            raise ValueError(
                f"SMART: the model's output has no {missing[0]!r}; it has {list(fields)}. Name one with outputs="
            )
        return {str(key): fields[key] for key in keys}
    for wanted in (("logits",), SPANS):
        if all(isinstance(fields.get(name), Tensor) for name in wanted):
            return {name: fields[name] for name in wanted}
    if "logits" in fields and fields["logits"] is None:
        raise ValueError(
            "SMART: the model's output has logits=None: a fused loss computes none while training. Switch it off "
            "(use_liger_kernel=False in Hugging Face), or compare the hidden states times the head's weight: "
            "outputs=without_logits(model) (docs/recipes.md)"
        )
    several = {key: z for key, z in fields.items() if isinstance(z, Tensor) and z.is_floating_point() and z.ndim > 0}
    if len(several) == 1:
        return {str(key): z for key, z in several.items()}
    if not several:
        only = f"there is no floating-point output besides the loss, only {list(fields)}"
        raise ValueError(f"SMART: {only}. Let forward return the logits, or give a function outputs= that finds them")
    raise ValueError(
        f"SMART: cannot tell which of the model's outputs {list(fields)} ({type(output).__name__}) to compare. Say "
        "outputs='logits', outputs=1, a list of them, or a function from the model's output to the tensor"
    )


def check_output(z: Any, n: int | None) -> None:
    """Raise TypeError or ValueError if an output is no float tensor (n, ..., C), nor a projection."""
    if isinstance(z, Tensor) and z.is_floating_point() and z.ndim == 0:
        raise TypeError(
            "SMART: the model's output is one number, most likely its loss. SMART compares what the loss compares. "
            "Let forward return the logits too, (loss, logits), and say outputs=1; or make SMART of the model inside"
        )
    if not (isinstance(z, Projection) or (isinstance(z, Tensor) and z.is_floating_point())):
        got = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise TypeError(
            f"SMART: outputs must be floating-point tensors (n, ..., C), got {got}. Name the logits with outputs="
        )
    if n is not None and len(z) != n:
        raise ValueError(
            f"SMART: the first axis must be the batch: the site gave {n} rows and the outputs have {len(z)}. Models "
            "that work time-major, or fold several choices into the batch, are not supported. Use a model that "
            "returns one row of outputs for each row of its input"
        )
    if len(z) == 0:
        raise ValueError(f"SMART: the batch is empty: the outputs have shape {tuple(z.shape)}. Leave empty batches out")


def find_heads(
    outputs: Mapping[str, Output],
    evidence: Evidence,
    divergence: str | Sequence[str] | None = None,
    class_axis: int | None = None,
    before: Sequence[Head] = (),
) -> list[Head]:
    """Find out how each output is compared: what the user said, else the model's config, labels and shapes.

    Args:
        outputs: by name, as the model gives them.
        divergence, class_axis: what the user said, if anything.
        before: the heads of the step before. They are used if the shapes of this batch can be read in several ways.

    Raises:
        ValueError: nothing says where the classes are or what l_s is; the message says what to give.

    Example:
        >>> nothing = Evidence(None, None, [], [torch.Size([2, 7, 4])], False)
        >>> find_heads({"logits": torch.zeros(2, 3, 7)}, nothing)[0].axis
        1
    """
    said = one_each("divergence", divergence, len(outputs))
    heads = []
    for i, ((name, z), asked) in enumerate(zip(outputs.items(), said, strict=True)):
        l_s, why = (asked, "divergence=") if asked is not None else _divergence(name, z, evidence)
        axis, why_axis = (class_axis, "class_axis=") if class_axis is not None else (None, "")
        if class_axis is not None and not -z.ndim <= class_axis < z.ndim:
            raise ValueError(
                f"SMART: class_axis={class_axis}, but an output has the shape {tuple(z.shape)}. Give the axis of the "
                "classes in that shape, -1 if it is the last"
            )
        if isinstance(z, Projection):
            if l_s not in ROWS:
                raise ValueError(f"SMART: a projection's l_s must be one of {sorted(ROWS)}, got {l_s!r} ({why})")
            if class_axis not in (None, -1, z.ndim - 1):
                raise ValueError(
                    f"SMART: class_axis={class_axis}, but a projection has its classes on the last axis. Leave "
                    "class_axis= out"
                )
            axis, why_axis = -1, "a projection's last axis"
        elif class_axis is None:
            axis, why_axis = _axis(name, z, l_s, why, evidence, before[i] if len(before) == len(outputs) else None)
        head = Head(name, l_s, axis, why, why_axis)
        if l_s == "symmetric_kl" and head.arranged(z).shape[-1] == 1:
            raise ValueError(
                f"SMART: an output of shape {tuple(z.shape)} has one value an example, of which symmetric_kl is "
                "always 0. Say divergence='squared_error' (regression) or 'bernoulli_symmetric_kl' (one logit)."
            )
        heads.append(head)
    return heads


def _divergence(name: str, z: Output, evidence: Evidence) -> tuple[str, str]:
    """Decide l_s of an output that the user said nothing of, and say why."""
    config, labels = evidence.config, evidence.labels
    problem = getattr(config, "problem_type", None)
    if problem in _PROBLEM_TYPES:
        return _PROBLEM_TYPES[problem], f"config.problem_type is {problem!r}"
    if getattr(config, "num_labels", None) == 1:
        return "squared_error", "config.num_labels is 1"
    if name == "predicted_depth":
        return "squared_error", "its name"
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    if whole and name not in SPANS and z.ndim == 2 and labels.shape == z.shape:
        return "bernoulli_symmetric_kl", "the labels, one for each output"
    return "symmetric_kl", DEFAULT


def _axis(
    name: str, z: Tensor, l_s: str, why_l_s: str, evidence: Evidence, before: Head | None
) -> tuple[int | None, str]:
    """Decide which axis has the classes, None if each entry is an output of its own, and say why."""
    if z.ndim == 1:
        return None, "one value an example"
    if name in SPANS:
        return -1, "its name: a softmax over the positions"
    shape = tuple(z.shape)
    each = [why for why, positions in evidence.positions() if shape[1:] in positions]
    counted = [why for why, count in evidence.counts() if shape[-1] == count]
    if name == "predicted_depth":
        return None, "its name"
    if z.ndim == 2:
        masked = "the mask's shape" in each
        # and the config counts other classes than there are outputs
        if l_s == "symmetric_kl" and why_l_s == DEFAULT and masked and evidence.counts() and not counted:
            raise ValueError(
                f"SMART: an output of shape {shape} has one value a position, by the mask. Say what it is, a logit, a "
                "value, or a softmax over positions: divergence='bernoulli_symmetric_kl', 'squared_error' or "
                "'symmetric_kl'"
            )
        if l_s == "symmetric_kl" or counted or not each or (evidence.at_input and not masked):
            return -1, counted[0] if counted else "the only axis"
        return None, f"one value a position, by {each[0]}"

    readings: dict[int | None, tuple[int, ...]] = {-1: shape[1:-1], 1: shape[2:]}
    if l_s != "symmetric_kl":
        readings[None] = shape[1:]
    firsts = [why for why, count in evidence.counts() if shape[1] == count]
    if bool(counted) != bool(firsts):
        return (-1, counted[0]) if counted else (1, firsts[0])
    for why, positions in evidence.positions():
        fitting = [axis for axis, found in readings.items() if found in positions]
        if len(fitting) == 1:
            return fitting[0], why
    if before is not None:
        return before.axis, before.why_axis
    if not takes_logits(l_s):
        return -1, "the last axis: nothing says otherwise"
    if hasattr(evidence.config, "model_type") and z.ndim == 3:
        return -1, "Hugging Face's convention"
    raise ValueError(
        f"SMART: an output has the shape {shape}. Are its classes on the last axis, or on axis 1, as "
        "nn.CrossEntropyLoss has them? Say class_axis=-1 or class_axis=1"
    )


def _positions(z: Output, masks: Sequence[Tensor | None], virtual: int = 0) -> Tensor | None:
    """Find the mask that has the positions of an output (n, ..., C). `virtual` more of them may be in front."""
    found = output_mask(z, masks)
    if found is None and virtual and z.ndim == 3:
        for mask in masks:
            if mask is not None and mask.ndim == 2 and mask.shape[1] + virtual == z.shape[1]:
                return torch.nn.functional.pad(mask != 0, (virtual, 0), value=False)
    return found


class Compared(NamedTuple):
    """Say how the outputs of one batch are compared.

    Attributes:
        heads: one for each output.
        targets: the clean outputs f(x; theta), (n, ..., C).
        positions: the mask of each output's positions, true at those that count, or None.
        inputs: what the model was given.
    """

    heads: list[Head]
    targets: list[Output]
    positions: list[Tensor | None]
    inputs: Inputs

    @property
    def divergences(self) -> list[str]:
        """Name l_s of each output."""
        return [head.divergence for head in self.heads]

    def arranged(self, outputs: Mapping[str, Output]) -> list[Output]:
        """Arrange the outputs of a pass as (n, ..., C)."""
        return [head.arranged(z) for head, z in zip(self.heads, outputs.values(), strict=True)]


class Reader:
    """Find out, batch by batch, which outputs are compared, by which l_s, and at which positions.

    Args:
        model: the module that the passes run.
        outputs, divergence, class_axis, mask: as `SMART` takes them.

    Raises:
        TypeError, ValueError: there is no such divergence, or no such axis.

    Attributes:
        heads: those of the last batch.
        choices: what `describe` says of it.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Outputs | None,
        divergence: str | Sequence[str] | None,
        class_axis: int | None,
        mask: Masks | None,
    ) -> None:
        for name in [divergence] if isinstance(divergence, str) else divergence or []:
            check_divergence("SMART", name)
        if class_axis is not None and (isinstance(class_axis, bool) or not isinstance(class_axis, int)):
            raise TypeError(f"SMART: class_axis must be a whole number, got {class_axis!r}")
        self.outputs, self.divergence, self.class_axis, self.mask = outputs, divergence, class_axis, mask
        self.names = argument_names(model)
        self.heads: list[Head] = []
        self.choices: dict[str, Choice] = {}
        self._model = model

    def read(self, passes: Passes, label_mask: Tensor | None) -> Compared:
        """Read the clean pass of a batch.

        Raises:
            TypeError, ValueError: an output, a mask or the label_mask is not what it should be.
        """
        outputs, calls, site = passes.clean.outputs, passes.clean.calls, passes.site
        for z in outputs.values():
            check_output(z, len(calls[0].x) if calls else None)
        with passes.given() as (args, kwargs):  # a mask= reads what the model was given
            inputs = read_inputs(self.names, args, kwargs, calls, self.mask)
        xs = [call.x.shape for call in calls] if calls else inputs.shapes
        at_input = site is None or site.at_input
        labels = inputs.arguments.get("labels")
        evidence = Evidence(getattr(self._model, "config", None), labels, inputs.masks, xs, at_input)
        self.heads = find_heads(outputs, evidence, self.divergence, self.class_axis, self.heads)
        targets = [head.arranged(z) for head, z in zip(self.heads, outputs.values(), strict=True)]
        return Compared(self.heads, targets, [self._count(z, inputs, label_mask) for z in targets], inputs)

    def note(self, compared: Compared, calls: Sequence[Call]) -> None:
        """Note for `describe` what was chosen for this batch."""
        self.choices = _describe_batch(compared, calls)

    def _count(self, z: Output, inputs: Inputs, label_mask: Tensor | None) -> Tensor | None:
        """Find which positions of an output count: those of the site, or of a decoder if there is one, with a label."""
        masks = inputs.masks
        if "decoder_input_ids" in self.names:
            mask, labels = inputs.arguments.get("decoder_attention_mask"), inputs.arguments.get("labels")
            masks = [labels != -100 if mask is None and labels is not None else mask]
        virtual = virtual_tokens(self._model)
        real, labelled = _positions(z, masks, virtual), _positions(z, [label_mask], virtual)
        if label_mask is not None and labelled is None and z.ndim > 2:
            raise ValueError(
                f"SMART: label_mask has the shape {tuple(label_mask.shape)}, and the outputs' positions are "
                f"{tuple(z.shape[:-1])}. Give a label_mask of that shape"
            )
        fits = label_mask is None and real is None and z.ndim == 3
        lost = [tuple(mask.shape) for mask in masks if mask is not None and mask.ndim == 2] if fits else []
        if lost and inputs.mask_name == "attention_mask":
            raise ValueError(
                f"SMART: {inputs.mask_name} has the shape {lost[0]}, and the outputs' positions are "
                f"{tuple(z.shape[:-1])}. Say which of them count: smart(..., label_mask=<true at those, of that shape>)"
            )
        if real is None or labelled is None:
            return labelled if real is None else real
        return (real > 0) & labelled

    def describe(self) -> dict[str, Choice]:
        """Say what is compared, and why."""
        if not self.heads:
            return LATER | self.choices
        said = "outputs=" if self.outputs is not None else "what the model returns"
        l_s = [(head.divergence, head.why_divergence) for head in self.heads]
        axes = [("none" if head.axis is None else str(head.axis), head.why_axis) for head in self.heads]
        known = {"outputs": Choice(", ".join(head.name for head in self.heads), said)}
        for name, found in (("l_s", l_s), ("class axis", axes)):
            value, why = (", ".join(dict.fromkeys(texts)) for texts in zip(*found, strict=True))
            known[name] = Choice(value, why)
        return LATER | known | self.choices


def _describe_batch(compared: Compared, calls: Sequence[Call]) -> dict[str, Choice]:
    """Say what `describe` says of a batch: shapes, the mask and the positions."""
    inputs, targets = compared.inputs, compared.targets
    x = ", ".join(str(tuple(call.x.shape)) for call in calls)
    masked = [mask for mask in inputs.masks if mask is not None]
    shapes = ", ".join(str(tuple(z.shape)) for z in targets)
    several = any(z.ndim > 2 for z in targets)
    counted = any(m is not None for m in compared.positions)
    where = f"those of {inputs.mask_name}" if counted else "all" if several else "one an example"
    unmasked = Choice("none", "every position counts and is perturbed; give mask= if the batch is padded")
    return {
        "x": Choice(x or "none", f"{len(calls)} call(s) of the site" if calls else "lambda_s is 0"),
        "mask": Choice(inputs.mask_name, str(tuple(masked[0].shape))) if masked else unmasked,
        "positions": Choice(where, f"the outputs are compared as {shapes}"),
    }
