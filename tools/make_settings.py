"""Write docs/settings.md, the table of the settings, from the fields and the docstring of SMARTConfig.

python tools/make_settings.py
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import textwrap
from pathlib import Path

from smartreg import SMARTConfig
from smartreg.config import _CHOICES, _INTEGERS, _REALS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = r"""# Settings of SMARTConfig

<!-- python tools/make_settings.py writes this page from the docstring of SMARTConfig -->

Look up what a setting means, its default, and its value in the presets. All backends have the same settings. A weight
"by task" is 1, and 0.1 in regression. Names such as $\varepsilon$ in the paper are in
[the table of symbols](math.md#the-objective).

```python
from smartreg import SMARTConfig

config = SMARTConfig(epsilon=0.05, total_steps=1000)  # the defaults, but for the radius
config = SMARTConfig.paper(total_steps=1000)  # the published values
config = SMARTConfig.mtdnn()  # the update of the released code
config = config.replace(lambda_s=3)  # a copy, checked again
```
"""


def meanings() -> dict[str, str]:
    """Return what the docstring says of each field; fields that share a text are under the name of the first."""
    text = re.search(r"Attributes:\n(.*?)\n\n", inspect.getdoc(SMARTConfig) or "", re.DOTALL)
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", text[1] + "\n", re.DOTALL | re.MULTILINE)
    return {names: " ".join(meaning.split()) for names, meaning in entries}


def shown(config: SMARTConfig, name: str) -> str:
    """Return a value as the table shows it."""
    value = config.to_dict()[name]
    if value is None:
        return {"lambda_s": "by task", "mu": "by task", "ascent_steps": f"`{config.ascent_steps}`"}.get(name, "`None`")
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`"


def takes(name: str) -> str:
    """Return the values that a setting may have."""
    if name in _CHOICES:
        return ", ".join(f'`"{choice}"`' for choice in _CHOICES[name])
    if name in _INTEGERS:
        return f"whole number ≥ {_INTEGERS[name]}"
    low, high, closed = _REALS[name]
    return f"{low:g} to {high:g}" if math.isfinite(high) else f"number {'≥' if closed else '>'} {low:g}"


def page() -> str:
    """Return the page."""
    texts = meanings()
    names = [field.name for field in dataclasses.fields(SMARTConfig)]
    assert ", ".join(texts) == ", ".join(names), "the docstring has the fields in another order"
    place = {name: "-".join(re.findall(r"\w+", together)) for together in texts for name in together.split(", ")}
    presets = [SMARTConfig(), SMARTConfig.paper(), SMARTConfig.mtdnn()]
    lines = [HEAD, "| setting | takes | `SMARTConfig()` | `.paper()` | `.mtdnn()` |", "|---|---|---|---|---|"]
    for name in names:
        values = [shown(config, name) for config in presets]
        lines.append(" | ".join([f"| [`{name}`](#{place[name]})", takes(name), *values]) + " |")
    lines += ["", "## What each setting means"]
    for together, meaning in texts.items():
        linked = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", meaning)
        lines += [
            "",
            f"### {together}",
            "",
            textwrap.fill(
                re.sub(r"^[a-z](?=[a-z])", lambda first: first[0].upper(), linked), 120, break_long_words=False
            ),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
