"""What SMART chose and why, as a text that a person reads: `describe()` of every backend."""

from __future__ import annotations

from typing import NamedTuple


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
        """The values alone, as a `repr`."""
        settings = [f"{name.replace(' ', '_')}={choice.value!r}" for name, choice in self.items()]
        return f"{call}({', '.join(settings)})"

    def markdown(self) -> str:
        """A Markdown table.

        Example:
            >>> print(Description(site=Choice("embed", "said")).markdown())
            | | | chosen because |
            |---|---|---|
            | site | `embed` | said |
        """
        rows = (f"| {name} | `{value}` | {why} |" for name, (value, why) in self.items())
        return "\n".join(["| | | chosen because |", "|---|---|---|", *rows])
