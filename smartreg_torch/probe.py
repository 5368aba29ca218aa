"""Ask the task loss of a Trainer once which outputs it counts, and which l_s goes with it.

transformers computes a loss in many places: in the model, in the label smoother, in `compute_loss_func`, in an
override. Whether labels are shifted, re-aligned or removed on the way shows in one place alone, the gradient.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_to_fp32, gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto import modeling_auto

from smartreg.config import SMARTWarning
from smartreg.report import Description
from smartreg_torch.compat import compiled_call, may_compile, original_forward, set_compiled_call
from smartreg_torch.labels import IGNORED, SAYS, Positions, find_divergence, find_positions
from smartreg_torch.outputs import chosen
from smartreg_torch.projection import Output, Projection, has_head, values_of, without_adapters
from smartreg_torch.replay import State
from smartreg_torch.sharding import is_root
from smartreg_torch.smart import SMART
from smartreg_torch.values import tensors_in

ComputeLoss = Callable[..., Any]
_SHIFTING = {  # classes of which most predict the next token
    name
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values()
}
_SCALE = 2.0**10  # else the gradient of a mean over many tokens is rounded to 0 in float16


class _Answer(NamedTuple):
    """Hold what the gradient of one batch says.

    `state` is "nothing" if there was no gradient; "all" if each output counts and has a label, so that the next batch
    may say more; "told"; or "each" if the labels do not lie beside the outputs, and only each batch's gradient can say.
    """

    state: str
    positions: Positions | None = None
    divergence: str | None = None
    left_out: int = 0
    unsaid: bool = False  # labels in the shape of the outputs, and no l_s fits the gradient
    axis: int | None = None  # the classes', over which the gradient of a softmax loss sums to 0


class Probe:
    """Find which positions the loss of one `train()` counts; the first batch with labels is run once more for it."""

    def __init__(self) -> None:
        self._state = "nothing"
        self._positions: Positions | None = None
        self._divergence: str | None = None
        self._axis: int | None = None
        self._blind = False

    def label_mask(
        self, trainer: Trainer, smart: SMART, compute_loss: ComputeLoss, inputs: Mapping[str, Any], num_items: Any
    ) -> Tensor | None:
        """Return a mask, true at the outputs that the task loss counts; None if it counts one an example, or all.

        Raises:
            ValueError: nothing says what l_s is.
        """
        labels = _labels(trainer, inputs)
        if labels is None or not (labels.ndim > 1 or labels.is_floating_point() or _classes(smart.model) == 1):
            return None
        counted = None
        if self._asks(trainer, labels):
            counted = self._ask(trainer, smart, compute_loss, inputs, num_items, labels)
        marks = _marks(labels)
        if self._state == "each" or marks.ndim < 2:
            return counted
        if self._positions is not None:
            return self._positions.mask(marks)
        return Positions(likely_offset(smart.model)).mask(marks) if self._state == "nothing" else None

    def state_dict(self) -> dict[str, Any]:
        """Return what the loss has said so far: a resumed run need not ask again, of another batch."""
        positions = None if self._positions is None else tuple(self._positions)
        return {"state": self._state, "positions": positions, "divergence": self._divergence, "axis": self._axis}

    def load_state_dict(self, state: Mapping[str, Any], smart: SMART) -> None:
        """Go on where `state_dict` left off."""
        self._state = state["state"]
        self._positions = None if state["positions"] is None else Positions(*state["positions"])
        self._tell(smart, state["divergence"], state["axis"])

    def explain(self, description: Description) -> Description:
        """Put what the gradient said into the description, as the reason."""
        why: dict[str, str] = {}
        if self._divergence is not None:
            why["l_s"] = SAYS.get(self._divergence, "d loss / d outputs is that of its loss")
        if self._axis is not None:
            why["class axis"] = "d loss / d outputs sums to 0 over it"
        if self._positions is not None and not self._blind:
            offset, _, ignored = self._positions
            place = f"at i has its output at i{offset:+d}" if offset else "has its output at its own place"
            why["positions"] = f"d loss / d outputs: a label {place}"
            why["positions"] += f", but for the label {ignored[0]}, which does not count" if ignored else ""
        if self._state == "each":
            why["positions"] = "d loss / d outputs, in one more forward pass a step: no shift explains the labels"
        for name in description.keys() & why.keys():
            description[name] = description[name]._replace(why=why[name])
        return description

    def _asks(self, trainer: Trainer, labels: Tensor) -> bool:
        if self._state == "told":
            return False
        if self._state == "each":
            return True
        asks = self._state == "nothing" or bool((_marks(labels) == IGNORED).any())
        # compute_loss may wait for the other processes, so all of them ask or none
        return any(gather_object([asks])) if trainer.args.world_size > 1 else asks

    def _ask(
        self,
        trainer: Trainer,
        smart: SMART,
        compute_loss: ComputeLoss,
        inputs: Mapping[str, Any],
        num_items: Any,
        labels: Tensor,
    ) -> Tensor | None:
        first = likely_offset(smart.model)
        answer, counted = _Answer("nothing"), None
        found = _outputs_and_gradients(trainer, smart, compute_loss, inputs, num_items)
        if found is None:
            return None
        outputs, gradients = found
        if all(gradient is None for gradient in gradients):
            self._blind, answer = True, _Answer("told")
            if any(z.ndim > 2 for z in outputs) and _marks(labels).ndim > 1:
                answer = _Answer("told", Positions(first))
                warnings.warn(
                    f"{type(trainer).__name__}: the task loss does not depend on the outputs that SMART compares, so "
                    "it does not show which positions it counts. Taken are those whose "
                    f"{'next' if first else 'own'} token has a label. If that is wrong, override create_smart and "
                    "give outputs=, the tensor that the loss is computed from, or mask=.",
                    SMARTWarning,
                    stacklevel=5,
                )
        else:
            several = len(outputs) > 1
            for z, gradient in zip(outputs, gradients, strict=True):
                if gradient is not None and (not several or z.ndim > 2):
                    if isinstance(z, Projection):
                        answer, counted = _judge_hidden(gradient, labels, inputs, first)
                    else:
                        answer, counted = _judge(z, gradient, labels, inputs, first, _classes(smart.model))
                    break
            if several:
                answer = answer._replace(divergence=None, unsaid=False)
        self._take(trainer, smart, answer)
        return counted if self._state == "each" else None

    def _take(self, trainer: Trainer, smart: SMART, answer: _Answer) -> None:
        answers = gather_object([answer]) if trainer.args.world_size > 1 else [answer]
        for state in ("each", "told", "all", "nothing"):  # the same in all processes
            of_state = [one for one in answers if one.state == state]
            if of_state:
                self._state, self._positions = state, of_state[0].positions
                break
        divergence = next((one.divergence for one in answers if one.divergence), None)
        self._tell(smart, divergence, next((one.axis for one in answers if one.axis is not None), None))
        problem = getattr(getattr(smart.model, "config", None), "problem_type", None)
        if smart._reader.divergence is None and problem is None and any(one.unsaid for one in answers):
            raise ValueError(
                f"{type(trainer).__name__}: the labels have the shape of the outputs, and neither they nor the "
                "gradient of the task loss tell SMART what the outputs are. Set model.config.problem_type to "
                "'multi_label_classification', 'regression', or 'single_label_classification' (labels that are "
                "probabilities of the classes), or override create_smart and give divergence=."
            )
        left_out = sum(one.left_out for one in answers if one.state == "told")
        if left_out:
            warnings.warn(
                f"{type(trainer).__name__}: the task loss leaves out {left_out} positions of the first batch that have "
                "a label and are no padding, and SMART counts them. Give them the label -100, or override "
                "create_smart and say which positions count, mask=.",
                SMARTWarning,
                stacklevel=6,
            )

    def _tell(self, smart: SMART, divergence: str | None, axis: int | None) -> None:
        """Decide l_s and the class axis by what the loss said, unless the user has named them."""
        if smart._reader.divergence is None:
            smart._reader.divergence = self._divergence = divergence
        if axis is not None and smart._reader.class_axis is None:
            smart._reader.class_axis = self._axis = axis


@contextmanager
def undone(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Take back what the block does to the model and the Trainer, since the step itself repeats it.

    Random streams, buffers, what modules keep, and lists and counters of the Trainer are as before afterwards. Nothing
    is logged.
    """
    state, before = State(model, dict(model.named_parameters())), dict(vars(trainer))
    kept = {name: _mapped(value) for name, value in before.items() if "dataset" not in name}
    calls: list[tuple[Any, Any]] = []

    def again() -> None:
        for args, kwargs in calls[:1]:
            model(*args, **kwargs)

    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    vars(trainer).update(kept, log=lambda *_, **__: None)
    try:
        with torch.compiler.set_stance("force_eager") if may_compile() else nullcontext(), state.undone(again):
            try:
                yield
            finally:
                hook.remove()
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)


def cloned(inputs: Mapping[str, Any]) -> Any:
    """Copy the inputs: a loss may pop from them or write into them."""
    return _mapped(inputs, lambda value: value.clone() if isinstance(value, Tensor) else value)


@contextmanager
def first_call(model: nn.Module, instead: Callable[..., tuple[Any, Any]]) -> Iterator[list[Any]]:
    """Let `instead` answer the first call of the model with gradients inside the block; the list gets what it adds.

    A call under no_grad before it is a reference's, as in preference optimisation.
    """
    kept: list[Any] = []
    own = vars(model).get("forward")  # accelerate's, for mixed precision
    plain, compiled = model.forward, compiled_call(model)

    def restore() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = own
        set_compiled_call(model, compiled)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        restore()
        output, beside = instead(*args, **kwargs)
        kept.append(beside)
        return output

    def call(*args: Any, **kwargs: Any) -> Any:
        restore()
        try:
            return forward(*args, **kwargs) if torch.is_grad_enabled() else model(*args, **kwargs)
        finally:
            if not kept:
                set_compiled_call(model, call)

    if is_root(model):  # what its hooks have gathered before a forward, no pass inside it could gather anew
        set_compiled_call(model, call)
    else:
        vars(model)["forward"] = forward
        set_compiled_call(model, None)  # model.compile()'s, which would compile `instead` too
    try:
        yield kept
    finally:
        restore()


@contextmanager
def naming_create_smart() -> Iterator[None]:
    """Add to an error that names an argument of SMART in which method a Trainer's user gives it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        named = re.search(r"\b(site|outputs|divergence|class_axis|mask)=", str(error))
        if named and str(error).startswith("SMART: "):
            error.add_note(f"In the Trainer override create_smart: return SMART(model, config, {named[1]}=...)")
        raise


def _outputs_and_gradients(
    trainer: Trainer, smart: SMART, compute_loss: ComputeLoss, inputs: Mapping[str, Any], num_items: Any
) -> tuple[list[Output], list[Tensor | None]] | None:
    """Return the compared outputs and d loss / d outputs; None if compute_loss does not call the model.

    Of a projection it is the gradient at its hidden states.
    """
    model = smart.model
    # only the hooks of fully_shard's root gather its weights
    forward = model if is_root(model) else original_forward(model) or model.forward

    def call(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        with trainer.accelerator.autocast():
            output = forward(*args, **kwargs)
        # accelerate's own forward gives copies in float32, on which a loss inside the model does not depend
        return convert_to_fp32(output), output

    with undone(trainer, model), first_call(model, call) as seen:
        loss = compute_loss(model, cloned(inputs), num_items_in_batch=num_items)
    if not seen:
        return None
    output = seen[0]
    if smart._reader.outputs is None and getattr(output, "logits", None) is None and has_head(model):
        raise ValueError(
            f"{type(trainer).__name__}: the model gives no logits while it trains, so SMART has nothing to compare: "
            "its loss is fused with its head. Override create_smart and return SMART(model, config, "
            "outputs=without_logits(model)), which compares the hidden states (docs/recipes.md). Or switch that off: "
            "use_liger_kernel=False in TrainingArguments (or liger_kernel_config={'fused_linear_cross_entropy': "
            "False}), UNSLOTH_RETURN_LOGITS=1 in the environment with Unsloth."
        )
    compared = list(chosen(output, smart._reader.outputs).values())
    values = values_of(compared)
    tensors = {id(tensor): tensor for tensor in tensors_in(output) if tensor.requires_grad}
    if all(id(z) in tensors or isinstance(seen, Projection) for z, seen in zip(values, compared, strict=True)):
        tensors = {id(z): z for z in values if z.requires_grad}
    if not (isinstance(loss, Tensor) and loss.requires_grad and tensors):
        return compared, [None] * len(compared)
    scale = torch.full_like(loss, _SCALE)
    found = torch.autograd.grad(loss, list(tensors.values()), scale, allow_unused=True)
    by_id = dict(zip(tensors, found, strict=True))
    if all(id(z) in by_id for z in values):
        gradients: list[Tensor | None] = [by_id[id(z)] for z in values]
    elif any(gradient is not None for key, gradient in by_id.items() if tensors[key] is not loss):
        # outputs= takes parts or moves axes: the same of the gradient
        filled = {key: torch.zeros_like(tensors[key]) if grad is None else grad for key, grad in by_id.items()}
        given = _mapped(output, lambda value: filled.get(id(value), value))
        gradients = list(values_of(list(chosen(given, smart._reader.outputs).values())))
    else:
        gradients = list[Tensor | None]([None] * len(compared))
    return [z.detach() for z in compared], gradients


def _judge(
    z: Tensor, gradient: Tensor, labels: Tensor, inputs: Mapping[str, Any], first: int, classes: int | None
) -> tuple[_Answer, Tensor | None]:
    if not bool((gradient != 0).any()):
        return _Answer("nothing"), None
    tokens = inputs.get("attention_mask", inputs.get("input_ids"))
    real = _real(inputs)
    if z.ndim == 1 or (z.ndim == 2 and _a_token_each(z, gradient, labels, tokens, real, classes)):
        z, gradient = z.unsqueeze(-1), gradient.unsqueeze(-1)
    axes = (-1, 1) if z.ndim > 2 else ()
    axis = next((k for k in axes if find_divergence(z.movedim(k, -1), gradient.movedim(k, -1), None)), None)
    if axis == 1:
        z, gradient = z.movedim(1, -1), gradient.movedim(1, -1)
    counted = (gradient != 0).any(-1)
    values = labels.reshape(z.shape) if labels.numel() == z.numel() else None
    divergence = find_divergence(z, gradient, values)
    unsaid = divergence is None and values is not None and classes != 1
    answer = _Answer("told", None, divergence, unsaid=unsaid, axis=axis)
    return _judge_positions(answer, z, gradient, counted, labels, first, real)


def _judge_hidden(
    gradient: Tensor, labels: Tensor, inputs: Mapping[str, Any], first: int
) -> tuple[_Answer, Tensor | None]:
    """Judge by the gradient at the hidden states. It tells which positions count, and nothing of the classes."""
    counted = (gradient != 0).any(-1)
    if not bool(counted.any()):
        return _Answer("nothing"), None
    each = counted.unsqueeze(-1).to(gradient.dtype)
    return _judge_positions(_Answer("told"), each, each, counted, labels, first, _real(inputs))


def _real(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


def _judge_positions(
    answer: _Answer, z: Tensor, gradient: Tensor, counted: Tensor, labels: Tensor, first: int, real: Tensor | None
) -> tuple[_Answer, Tensor | None]:
    """Add to the answer which positions count, by those at which a gradient is."""
    marks = _marks(labels)
    if counted.ndim < 2 or marks.ndim != counted.ndim or (counted.ndim > 2 and marks.shape != counted.shape):
        return answer, None
    if marks.shape == counted.shape and bool((counted & (marks != IGNORED)).all()):
        return answer._replace(state="all"), counted
    fits = real is not None and real.shape == counted.shape
    found = find_positions(z, gradient, marks, first, real if fits else None)
    if found is None:
        return answer._replace(state="each"), counted
    return answer._replace(positions=found[0], left_out=found[1]), counted


def _a_token_each(
    z: Tensor, gradient: Tensor, labels: Tensor, tokens: Any, real: Tensor | None, classes: int | None
) -> bool:
    """Tell whether outputs (n, T) are one a token, not T labels of an example."""
    if not (isinstance(tokens, Tensor) and tokens.shape == z.shape == labels.shape):
        return False
    if real is not None and not bool(real.all()):
        return not bool(gradient[real == 0].any())
    return classes != z.shape[-1]


def _labels(trainer: Trainer, inputs: Mapping[str, Any]) -> Tensor | None:
    names = ("labels", *(trainer.label_names or ()))
    return next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor)), None)


def _marks(labels: Tensor) -> Tensor:
    """Return one label a position: of several values at each, -100 if all of them are."""
    if labels.is_floating_point() and labels.ndim > 2:
        return (labels == IGNORED).all(-1).long() * IGNORED
    return labels


def _classes(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)


def likely_offset(model: Any) -> int:
    """Return -1 if a model of this class most likely has the next token's label at each position, else 0."""
    model = without_adapters(model)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return -1 if not encodes and any(kind.__name__ in _SHIFTING for kind in type(model).__mro__) else 0


def _mapped(value: Any, convert: Callable[[Any], Any] = lambda value: value) -> Any:
    """Build new containers around what `convert` makes of the values."""
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, convert) for item in value)
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key in list(new):
            new[key] = _mapped(new[key], convert)
        return new
    return convert(value)
