"""Check the built documentation site: every public name is in it, it fetches nothing, its search finds what it should.

python tools/check_docs.py out/docs    # or tox run -e docs, which builds it first
"""

from __future__ import annotations

import ast
import functools
import html.parser
import json
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What users import. Other modules are internals, which docs/internals.md lists.
MODULES = (
    "smartreg",
    "smartreg.checking",
    "smartreg.divergences",
    "smartreg.perturbation",
    "smartreg.proximal",
    "smartreg.reference",
    "smartreg_torch",
    "smartreg_torch.divergences",
    "smartreg_torch.perturbation",
    "smartreg_torch.proximal",
    "smartreg_torch.transformers",
    "smartreg_tf",
    "smartreg_tf.divergences",
    "smartreg_tf.perturbation",
    "smartreg_tf.proximal",
)
SEARCHED = (
    "dropout",
    "label smoothing",
    "resume",
    "mask",
    "gradient accumulation",
    "theta",
    "SMARTTrainer",
    "DeepSpeed",
)


@functools.cache
def tree(module: str) -> ast.Module:
    """Return the syntax tree of a module of the packages; nothing is imported."""
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))


def public(module: str) -> list[str]:
    """Return the public names of a module: `__all__`, or the functions and classes that it defines.

    Of the equations of a backend they are those that NumPy has, too.
    """
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    defined = [node.name for node in tree(module).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    package, _, room = module.partition(".")
    shared = None if package == "smartreg" else {name.rpartition(".")[2] for name in public(f"smartreg.{room}")}
    return [f"{module}.{name}" for name in defined if not name.startswith("_") and (not shared or name in shared)]


def origin(name: str) -> str:
    """Return the name of an object where it is defined."""
    module, _, attribute = name.rpartition(".")
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return origin(f"{node.module}.{alias.name}")
    return name


def undocumented(documented: Iterable[str]) -> list[str]:
    """Return the public names that are not documented, nor the same object by another name."""
    known = {origin(name) for name in documented if name.rpartition(".")[0] in MODULES}
    return [name for module in MODULES for name in public(module) if origin(name) not in known]


def without_example(names: Iterable[str]) -> list[str]:
    """Return the functions and classes whose docstring has no example, but for records of what was found.

    pytest runs the examples. A record is a class that says its fields under "Attributes:".
    """
    found = []
    for name in sorted(set(map(origin, names))):
        module, _, attribute = name.rpartition(".")
        for node in tree(module).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == attribute:
                docstring = ast.get_docstring(node) or ""
                record = isinstance(node, ast.ClassDef) and "Attributes:" in docstring
                found += [] if record or ">>> " in docstring else [name]
    return found


class Page(html.parser.HTMLParser):
    """Collect what a page of the site fetches when it is looked at, where its links lead, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("src", "href", "srcset", "data") and value:
                (self.links if tag == "a" else self.fetched).append(value)


def _elsewhere(address: str) -> bool:
    return bool(re.match(r"(?:https?:)?//", address))


def read(site: Path) -> dict[Path, Page]:
    """Return the pages of the site by their files."""
    return {file: Page(file.read_text("utf-8")) for file in site.resolve().rglob("*.html")}


def broken(pages: dict[Path, Page]) -> list[str]:
    """Return the links to a page or an anchor of the site that is not there."""
    found = []
    for file, page in pages.items():
        for link in page.links:
            target, _, anchor = urllib.parse.unquote(link).partition("#")
            other = (file.parent / target).resolve() if target else file
            if other.suffix == ".html" and not re.match(r"\w+:", link):
                there = other in pages and anchor in pages[other].anchors
                found += [] if there else [f"{file.name}: {link}"]
    return found


def fetched(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Return what the pages and the style sheets of the site fetch from elsewhere."""
    found = [
        f"{file.name}: {address}" for file, page in pages.items() for address in page.fetched if _elsewhere(address)
    ]
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"(?:@import|url\()\s*[\"']?([^\"')\s]+)", sheet.read_text("utf-8"))
        found += [f"{sheet.relative_to(site)}: {address}" for address in addresses if _elsewhere(address)]
    return found


def not_found(site: Path, queries: Iterable[str], stem: Callable[[str], str]) -> list[str]:
    """Return the queries of which the search index has no page with all words; `stem` cuts a word as the index did."""
    index = json.loads((site / "searchindex.js").read_text("utf-8").removeprefix("Search.setIndex(").removesuffix(")"))
    missing = []
    for query in queries:
        pages = []
        for word in query.lower().split():
            hits = [index[part].get(stem(word), []) for part in ("terms", "titleterms")]
            pages.append({page for hit in hits for page in (hit if isinstance(hit, list) else [hit])})
        if not set.intersection(*pages):
            missing.append(query)
    return missing


def main() -> int:
    """Print what is wrong; the exit status is 1 if something is."""
    import snowballstemmer
    from sphinx.util.inventory import InventoryFile

    site = Path(sys.argv[1])
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = [name for kind, names in inventory.items() if kind.startswith("py:") for name in names]
    pages, stem = read(site), snowballstemmer.stemmer("english").stemWord
    wrong = [f"public, and in no API page: {name}" for name in undocumented(documented)]
    wrong += [f"leads nowhere: {link}" for link in broken(pages)]
    wrong += [f"fetched from elsewhere: {address}" for address in fetched(site, pages)]
    wrong += [f"not found by the search: {query}" for query in not_found(site, SEARCHED, stem)]
    print("\n".join(wrong) or f"{len(pages)} pages: every public name is there, no broken link, nothing fetched")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
