"""What SMART chose and found, as a person or an observer reads it: the same in every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """One thing that SMART was told or found out.

    Attributes:
        value: what it is.
        why: who said so, or what it was read off.
    """

    value: str
    why: str


class Description(dict[str, Choice]):
    """What is perturbed and compared, by name: `str()` is an aligned table, `markdown()` one for a model card.

    The names are site, x, outputs, l_s, class axis, mask, positions and precision, the same in every backend.

    Example:
        >>> description = Description(site=Choice("embed", "the only nn.Embedding"), x=Choice("(8, 16, 32)", "step 1"))
        >>> print(description)
        site  embed        the only nn.Embedding
        x     (8, 16, 32)  step 1
        >>> description.line("SMART")
        "SMART(site='embed', x='(8, 16, 32)')"
    """

    def __str__(self) -> str:
        names = max(map(len, self), default=0)
        values = max((len(choice.value) for choice in self.values()), default=0)
        return "\n".join(f"{name:<{names}}  {value:<{values}}  {why}" for name, (value, why) in self.items())

    def line(self, call: str) -> str:
        """Write the values alone, as a `repr`."""
        settings = [f"{name.replace(' ', '_')}={choice.value!r}" for name, choice in self.items()]
        return f"{call}({', '.join(settings)})"

    def markdown(self) -> str:
        """Write a Markdown table.

        Example:
            >>> print(Description(site=Choice("embed", "said")).markdown())
            | | | chosen because |
            |---|---|---|
            | site | `embed` | said |
        """
        rows = (f"| {name} | `{value}` | {why} |" for name, (value, why) in self.items())
        return "\n".join(["| | | chosen because |", "|---|---|---|", *rows])


# what a training step shows, before the first
LATER = dict.fromkeys(
    ("x", "outputs", "l_s", "class axis", "mask", "positions"),
    Choice("not known yet", "the first training step shows it"),
)


class StepSeen(NamedTuple):
    """One training step as an observer, `on_step=`, sees it.

    The tensors are detached ones on the device in PyTorch, and NumPy arrays in Keras. A list of a term that the step
    does not have (lambda_s or mu is 0 in it) is empty.

    Attributes:
        step: the number of the optimiser step that follows, from 1.
        x: the embeddings, (n, ..., d), one entry for each run of the site.
        delta: the perturbation of each run.
        mask: the mask of each run, true at positions that may be perturbed, or None.
        outputs: f(x; theta), (n, ..., C), one entry for each head.
        perturbed: f(x + delta; theta) of each head.
        teacher: f(x; theta~) of each head.
        positions: the mask of each head's positions, true at those that count, or None.
        sample_weight: w_i of each head, or None.
        divergences: the name of l_s of each head.
        metrics: R_s, D_Breg, max_delta and vanished, as far as the step has them, and the penalty; beta if theta~ has
            moved.
    """

    step: int
    x: list[Any]
    delta: list[Any]
    mask: list[Any]
    outputs: list[Any]
    perturbed: list[Any]
    teacher: list[Any]
    positions: list[Any]
    sample_weight: list[Any]
    divergences: list[str]
    metrics: dict[str, float]

    def tensors(self) -> dict[str, Any]:
        """Name every tensor by its list and place; what is None is left out.

        Example:
            >>> seen = StepSeen(1, ["x"], ["d"], [None], ["z"], ["z~"], [], [None], [None], ["symmetric_kl"], {})
            >>> seen.tensors()
            {'x/0': 'x', 'delta/0': 'd', 'outputs/0': 'z', 'perturbed/0': 'z~'}
        """
        named = self._asdict()
        return {
            f"{name}/{k}": tensor
            for name in StepSeen._fields[1:-2]
            for k, tensor in enumerate(named[name])
            if tensor is not None
        }


Observer = Callable[[StepSeen], Any]


def warn_of(found: Mapping[str, float], start: str, precision: str = "the embeddings' dtype") -> dict[str, str]:
    """Word what is wrong with a step that is finite, by "vanished" and "still"; empty if nothing is.

    Args:
        found: max_delta, and vanished: the fraction of the entries with delta != 0 in which x + delta == x.
        start: of the configuration.
        precision: that of x.

    Example:
        >>> list(warn_of({"max_delta": 0.0, "vanished": 0.0}, "margin"))
        ['still']
    """
    judged = suspicions({"vanished": 0.0, "max_delta": 1.0} | dict(found), start)
    texts = {"vanished": too_small(f"{found.get('vanished', 0.0):.0%}", precision), "still": STILL}
    return {name: texts[name] for name, is_so in judged.items() if is_so}


def suspicions(found: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Tell whether most of the perturbation is lost in x ("vanished"), and whether there is none ("still").

    Args:
        found: max_delta and vanished, as `warn_of` has them; numbers, or tensors of a step that is compiled.
        start: of the configuration. Noise moves every x but those that are masked.

    Example:
        >>> suspicions({"max_delta": 0.0, "vanished": 0.6}, "margin")
        {'vanished': True, 'still': True}
    """
    vanished, still = found["vanished"] > 0.5, found["max_delta"] == 0
    return {"vanished": vanished, "still": still} if start == "margin" else {"vanished": vanished}


STILL = (
    "SMART: nothing is perturbed, max|delta| is 0: no gradient reaches a position that the mask leaves. That is right "
    "in the first step of a head that starts at 0. Else, is the mask true at padding? Look at "
    "print(smart.describe()), which says which one it is."
)


def too_small(how_many: str, precision: str = "the embeddings' dtype") -> str:
    """Word the warning about a perturbation that is lost in x.

    Example:
        >>> too_small("60%")[:80]
        'SMART: adding the perturbation leaves 60% of the entries as they were: it is bel'
    """
    return (
        f"SMART: adding the perturbation leaves {how_many} of the entries as they were: it is below the precision of "
        f"{precision}, and R_s measures nothing there. Use a larger epsilon, or, if that is half precision, "
        "precision='float32'."
    )


def past_the_end(step: int, total_steps: int) -> str:
    """Word the warning about a run that is longer than `total_steps`, which beta is scheduled by.

    Example:
        >>> past_the_end(101, 100)[:45]
        'SMART: step 101 of a run of total_steps=100: '
    """
    return (
        f"SMART: step {step} of a run of total_steps={total_steps}: beta was scheduled for a shorter run, so theta~ "
        "remembers fewer steps than it should. Give SMARTConfig(total_steps=len(loader) * epochs), the optimiser steps "
        "of the whole run."
    )


def not_finite(step: int, first: str, found: Mapping[str, float]) -> str:
    """Word the error of a step whose penalty is NaN or infinite.

    Args:
        step: the number of the optimiser step that follows, from 1.
        first: the pass in which the first such values are: clean, ascent, teacher, perturbed or divergence.
        found: R_s, D_Breg and max_delta, those that are known.

    Example:
        >>> not_finite(3, "clean", {"R_s": float("nan")})[:68]
        'SMART: the penalty of step 3 is not finite (R_s = nan); the first va'
    """
    values = ", ".join(f"{name} = {found[name]:g}" for name in ("R_s", "D_Breg", "max_delta") if name in found)
    return (
        f"SMART: the penalty of step {step} is not finite{f' ({values})' if values else ''}; the first values that are "
        f"not finite are in the {first} pass. Look at the learning rate and the loss before it, or let such steps go "
        "without a penalty: SMARTConfig(non_finite='skip')."
    )
