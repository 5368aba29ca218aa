"""Write docs/messages.md: every error and warning of the three packages, read from their code.

python tools/make_messages.py

What a message computes is shown in words, as ‹shape›. The first sentences of a message say what was expected and what
was got, those from the first verb on what to do.
"""
# ruff: noqa: RUF001 - the marks of what is computed

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "messages.md"
PACKAGES = {"smartreg": "", "smartreg_torch": "PyTorch", "smartreg_tf": "Keras"}

# What the user was doing, by the files whose messages this meets.
GROUPS = {
    "Installing and importing": "__init__ compat",
    "SMARTConfig: the settings": "config",
    "The model, and where it is perturbed": "smart site candidates",
    "The model's outputs, and what is compared": "outputs checks projection",
    "The batch, its masks and its weights": "inputs",
    "The passes of a step": "passes step penalty replay lean report perturbation",
    "The training loop: theta~, saving and resuming": "teacher resume loop",
    "Several processes": "sharding",
    "The Hugging Face Trainer": "transformers probe",
    "Keras: fit, attach() and SMARTModel": "callback options engine model build observe measure",
    "report(): how smooth a model is": "quality tally",
    "Recording a run, and computing it again": "checking/recording checking/compare",
    "python -m smartreg: the check and the demo": (
        "checking/check checking/face checking/golden checking/trajectories checking/command demo/command"
    ),
    "The equations, called from your own code": "divergences proximal reference",
}
# Texts that belong to another group than their file.
MOVED = {
    r"DataParallel": "Several processes",
    r"load_state_dict|update\(\) after|remove\(\)|attach\(\) (was|needs)": (
        "The training loop: theta~, saving and resuming"
    ),
}
# Texts that are no message of their own, and why.
SKIPPED = {
    "‹message›": "of report.py: TEXTS has them",
    "‹call›: record=: ‹message›": "its callers have them",
    "a file has appeared there since": "a part of the recorder's warning",
    "transformers ‹version› is installed": "a part of the ImportError that follows",
    "its Trainer has no ‹missing›": "a part of the ImportError that follows",
    "not checked: ‹listed›: ‹reason›": "the reason is a message of this page",
    "the demo has no backend to train with: ‹reasons›": "the reasons are messages of this page",
    "‹function› raised ‹type›: ‹text›": "the error of the backend that is checked, as it was",
}
# A sentence that begins with one of these says what to do.
VERBS = re.compile(
    r"\[?(Call|Cast|Checkpoint|Choose|Compare|Compile|Delete|Draw|Freeze|Give|If|Install|Keep|Leave|Let|Load|Look|Make|"
    r"Name|Override|Pad|Put|Record|Resume|Save|Say|Set|Shard|Start|Switch|Take|To|Train|Unfreeze|Use|Write)\b"
)
# Expressions in words, if their names do not say enough.
WORDS = {
    "got": "value",
    "n": "number",
    "t": "step",
    "i + 1": "step",
    "missing[0]": "name",
    "self.name": "name",
    "_other": " and another setting of KERAS_BACKEND",
    "getattr(owner, '__name__', type(owner).__name__)": "class",
    "head.name": "name",
    "about['versions']['smartreg']": "version",
    "sorted(state)": "keys",
    "gradients.index(None) + 1": "which",
    "strategy.num_replicas_in_sync": "number",
    "', '.join(new[:3])": "names",
    "', '.join(unbuilt[:5])": "names",
    "', '.join(differing[:5])": "names",
    "differing[:5]": "names",
    "text[:200]": "text",
    "'...' if len(text) > 200 else ''": "",
    "left_out": "number",
    "half": "a half-precision dtype",
    "named[:2]": "two of them",
    "FORMAT": "number",
    "about['format']": "number",
    "f' ({values})' if values else ''": "R_s, D_Breg and max|delta|",
    "text[:40]": "the text",
    "getattr(asked, 'name', asked)": "name",
    "lost[0]": "shape",
    "(*shape, 1)": "the same shape and (..., 1)",
    "shape[1]": "number",
    "z.shape[-1] - 1": "C - 1",
    "gone[:3]": "names",
    "whole[:3]": "names",
    "_missing": "private names",
    "tuple(self.bias.shape)": "shape",
    "type(self).__name__": "your Trainer",
    "type(trainer).__name__": "your Trainer",
    "next(iter(self._copies))": "dtype",
    "runner.theta[next(iter(self._copies))].dtype": "half-precision",
    "self": "the layer",
    "state[name]": "value",
    "asked": "name",
    "called": "name",
    "then": "number",
    "iterations": "number",
    "followed": "how",
    "elsewhere[name]": "what to do here",
    "behind": "number",
    "done": "number",
    "left": "number",
    "total": "number",
}


class Message(NamedTuple):
    """A message of the code: its text, its kind ("" if only its text was found), and the file that has it."""

    text: str
    kind: str
    file: str

    @property
    def parts(self) -> tuple[str, str]:
        """Return what is wrong, and what to do."""
        starts = [at for at in self._sentences() if VERBS.match(self.text, at) and self._outside(at)]
        first = min(starts, default=len(self.text))
        return self.text[:first].strip(), self.text[first:].strip()

    @property
    def helps(self) -> bool:
        """Tell whether it says what to do, or what was expected and what was got."""
        said = re.search(r"\b(must|[Ee]xpected|needs|compared with)\b", self.text)
        got = re.search(r"\b(got|gave|Expected|must be of|some of)\b", self.text)
        acts = any(VERBS.match(self.text, at) for at in self._sentences())
        return bool(acts or (said and got) or re.search("pip install|did you mean", self.text))

    def _sentences(self) -> list[int]:
        """Return at which characters a sentence begins, without the first."""
        return [match.end() for match in re.finditer(r"[.?!›\])] ", self.text)]

    def _outside(self, at: int) -> bool:
        """Tell whether a character is outside of a choice of texts."""
        return self.text[:at].count("[") == self.text[:at].count("]")


class Reader:
    """Read the messages of one file."""

    def __init__(self, file: Path) -> None:
        self.file = str(file.relative_to(ROOT))
        tree = ast.parse(file.read_text("utf-8"))
        self.calls: list[tuple[ast.Call, ast.FunctionDef | None]] = []
        self.functions: dict[str, ast.FunctionDef] = {}
        self.constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self.imports = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self.texts: list[tuple[ast.expr, ast.FunctionDef | None]] = []
        self._walk(tree, None)

    def _walk(self, node: ast.AST, function: ast.FunctionDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                self.functions[child.name] = child
            if isinstance(child, ast.Call) and child.args:
                self.calls.append((child, function))
            if is_text(child) or (isinstance(child, ast.BinOp) and isinstance(child.op, ast.Add)):
                self.texts.append((child, function))
            elif not (isinstance(child, ast.Expr) and is_text(child.value)):  # a docstring
                self._walk(child, child if isinstance(child, ast.FunctionDef) else function)

    def messages(self) -> Iterator[Message]:
        """Yield the message of each exception that is made, and of each warning."""
        for call, function in self.calls:
            name = ast.unparse(call.func)
            before = ""
            if name == "warnings.warn":
                kind = "SMARTWarning"
            elif name.endswith("self._warn"):
                kind, before = "SMARTWarning", "‹call›: record=: "
            elif name == "error":  # one that the caller chose
                kind = "TypeError or ValueError"
            elif name == "parser.error" or (name == "print" and "file=sys.stderr" in ast.unparse(call)):
                kind = "on standard error"
            elif name == "Problem":  # raised of (function, text)
                yield Message(
                    tidy("‹function› " + self.text(call.args[1], function)), "in the check's table", self.file
                )
                continue
            elif name == "self._say":  # warns once of each kind: (kind, text)
                yield Message(tidy(self.text(call.args[1], function)), "SMARTWarning", self.file)
                continue
            elif is_error(name):
                kind = name
            else:
                continue
            yield Message(tidy(before + self.text(call.args[0], function)), kind, self.file)
        for node, function in self.texts:  # also one that is raised or warned of elsewhere
            text = tidy(self.text(node, function))
            if text.startswith("SMART: "):
                yield Message(text, "", self.file)

    def text(self, node: ast.expr, function: ast.FunctionDef | None) -> str:
        """Return what an expression says, its parts that are computed in words."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(
                self.text(part, function) if isinstance(part, ast.Constant) else self.computed(part.value, function)
                for part in node.values
                if isinstance(part, (ast.Constant, ast.FormattedValue))
            )
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left, function) + self.text(node.right, function)
        return self.computed(node, function)

    def computed(self, node: ast.expr, function: ast.FunctionDef | None) -> str:
        """Return a text that is written elsewhere in the package, or a placeholder."""
        for texts in self.written(node, function):
            if len(texts) == 1:
                return texts[0]
            if len(texts) > 1 and all(" " in text for text in texts):
                return f"[{' | '.join(texts)}]"
        said = words(node)
        return f"‹{said}›" if said else ""

    def written(self, node: ast.expr, function: ast.FunctionDef | None) -> Iterator[list[str]]:
        """Yield the texts that an expression stands for: a constant, a variable, a function's or a choice of two."""
        if ast.unparse(node) in WORDS:
            return
        if isinstance(node, ast.IfExp) and all(is_text(part) for part in (node.body, node.orelse)):
            yield [self.text(part, function) for part in (node.body, node.orelse)]
        if isinstance(node, ast.Name) and function is not None:
            values = [
                one.value
                for one in ast.walk(function)
                if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == node.id
            ]
            if len(values) == 1 and isinstance(values[0], ast.IfExp):
                yield from self.written(values[0], function)
            yield [self.text(value, function) for value in values if is_text(value)]
            yield [self.text(key, function) for key in keys_in_turn(node.id, function) if is_text(key)]
        if isinstance(node, ast.Name):
            home, name = self.home(node.id)
            if home and is_text(home.constants.get(name)):
                yield [home.text(home.constants[name], None)]
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            home, name = self.home(node.func.id if isinstance(node.func, ast.Name) else node.func.attr)
            known = home.functions.get(name) if home else None
            if home and known:
                values = [one.value for one in ast.walk(known) if isinstance(one, ast.Return) and one.value]
                yield [home.text(value, known) for value in values if is_text(value)]

    def home(self, name: str) -> tuple[Reader | None, str]:
        """Return the file in which a name is made, and its name there."""
        if name not in self.imports:
            return self, name
        module, name = self.imports[name]
        return reader_of(module), name


def keys_in_turn(name: str, function: ast.FunctionDef) -> list[ast.expr | None]:
    """Return the keys of a dict that a loop goes through, `for name, value in that_dict.items()`."""
    nodes = list(ast.walk(function))
    dicts = {ast.unparse(one.targets[0]): one.value for one in nodes if isinstance(one, ast.Assign)}
    for loop in nodes:
        if (
            isinstance(loop, ast.For)
            and isinstance(loop.target, ast.Tuple)
            and ast.unparse(loop.target.elts[0]) == name
        ):
            known = dicts.get(ast.unparse(loop.iter).removesuffix(".items()"))
            return list(known.keys) if isinstance(known, ast.Dict) else []
    return []


def is_text(node: ast.AST | None) -> bool:
    if isinstance(node, ast.BinOp):
        return is_text(node.left) and is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_error(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, Exception)


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def words(node: ast.expr) -> str:
    """Name a computed part in words."""
    code = ast.unparse(node)
    if code in WORDS:
        return WORDS[code]
    if isinstance(node, ast.IfExp):
        both = [part.value if isinstance(part, ast.Constant) else words(part) for part in (node.body, node.orelse)]
        return " or ".join(str(part).strip() for part in both if part)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name.endswith(".join"):
            return words(node.args[0])
        if name == "len":
            return "number"
        if name in ("tuple", "sorted", "list", "str", "map", "next", "iter"):
            return words(node.args[-1])
        return words(node.func)
    if isinstance(node, ast.Attribute):
        if node.attr in ("__name__", "__version__"):
            return "type" if node.attr == "__name__" else "version"
        return words(node.value) if node.attr == "name" and isinstance(node.value, ast.Name) else spaced(node.attr)
    if isinstance(node, ast.Name):
        return spaced(node.id)
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return words(node.value)
    if isinstance(node, (ast.BinOp, ast.BoolOp)):
        return words(node.left if isinstance(node, ast.BinOp) else node.values[0])
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return words(node.generators[0].iter)
    return code


def spaced(name: str) -> str:
    return name.strip("_").replace("_", " ").lower()


@cache
def reader_of(module: str) -> Reader | None:
    base = ROOT / module.replace(".", "/")
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.exists():
            return Reader(file)
    return None


def read() -> list[Message]:
    """Return every message of the packages, in the order of the files."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [message for file in files for message in Reader(file).messages()]


def marked(text: str) -> str:
    """Keep Markdown from reading marks in a text."""
    return re.sub(r"([*`<~$|\[\]\\]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def group_of(message: Message) -> str:
    for pattern, group in MOVED.items():
        if re.search(pattern, message.text):
            return group
    file = message.file.partition("/")[2].removesuffix(".py")
    found = [group for group, files in GROUPS.items() if file in files.split()]
    if not found:
        raise LookupError(f"make_messages: {message.file} has a message and is in no group of GROUPS. Add it to one")
    return found[0]


def page(messages: list[Message]) -> str:
    """Write the page: a section for each group, a paragraph for each text."""
    texts: dict[str, list[Message]] = {}
    for message in messages:
        if message.text not in SKIPPED:
            texts.setdefault(message.text, []).append(message)
    sections: dict[str, list[list[Message]]] = {group: [] for group in GROUPS}
    for same in texts.values():
        sections[group_of(same[0])].append(same)
    lines = [HEAD, ASKED]
    for group, paragraphs in sections.items():
        lines.append(f"## {marked(group)}\n")
        for same in paragraphs:
            wrong, mend = (marked(part) for part in same[0].parts)
            known = [one for one in same if one.kind] or [same[0]._replace(kind="SMARTWarning")]
            packages = dict.fromkeys(PACKAGES[one.file.partition("/")[0]] for one in known)
            where = "" if "" in packages else f", {' and '.join(packages)}"
            mend = f" {mend.rstrip('.')}." if mend else ""
            lines.append(f"**{wrong}**{mend} *({known[0].kind}{where})*\n")
    return "\n".join(lines)


HEAD = r"""# Messages, and what to do

Every error and warning of smartreg is on this page, which `python tools/make_messages.py` reads from the code. Search
it for some words of your message. What a message computes is written as ‹shape›, and a choice of texts as
\[one \| the other\].

The bold part says what was expected, and what smartreg got. What follows it says what to do. If nothing follows, give
what the bold part says.

If a message does not help, `print(smart.describe())` shows what SMART chose and why, and [debugging.md](debugging.md)
how to look at the tensors of a step.
"""

ASKED = """## What SMART asks for most often

Each is an argument of `SMART`. In Keras `site=` and `outputs=` are arguments of `SMARTCallback` and `attach`:
[keras.md](keras.md).

```python
from smartreg_torch import SMART, SMARTConfig

config, batch = SMARTConfig(total_steps=len(loader) * epochs), next(iter(loader))
```

"cannot tell which of the model's outputs ... to compare". Name those that your loss reads, or give a function of the
output:

```python
smart = SMART(model, config, outputs="logits")
smart = SMART(model, config, outputs=lambda output: output.logits)
output, penalty = smart(**batch)
```

"Are its classes on the last axis, or on axis 1". `CrossEntropyLoss` has (n, classes, tokens), most models
(n, tokens, classes):

```python
smart = SMART(model, config, class_axis=-1)  # (n, ..., classes)
output, penalty = smart(**batch)
print(smart.describe()["class axis"])
```

"Is it true at padding, or at real tokens?". Name the argument, or give a function of your model's arguments:
(n, tokens), true at real tokens:

```python
smart = SMART(model, config, mask="attention_mask")
smart = SMART(model, config, mask=lambda input_ids, **others: input_ids != 0)
output, penalty = smart(**batch)
```

"the model has several embeddings", "the site ... was not run". Name a submodule that gives (n, ..., d), one of
`model.named_modules()`:

```python
smart = SMART(model, config, site="bert.embeddings.word_embeddings")
smart = SMART(model, config, site="bert.embeddings")  # with positions, after LayerNorm
output, penalty = smart(**batch)
```

"they are no logits of classes there", "one value an example". Say what the loss takes the outputs for:

```python
smart = SMART(model, config, divergence="squared_error")  # regression
smart = SMART(model, config, divergence="bernoulli_symmetric_kl")  # several labels, or one logit
output, penalty = smart(**batch)
```

The Hugging Face Trainer has none of these arguments. Override `create_smart`, and give them there
([trainer.md](trainer.md#say-which-outputs-site-or-mask)):

```python
from smartreg_torch.transformers import SMARTTrainer


class MyTrainer(SMARTTrainer):
    def create_smart(self, model, config):
        return SMART(model, config, outputs="logits", class_axis=-1)
```
"""


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8")
