"""Check the built documentation site: every public name is in it, it fetches nothing, its search finds what it should.

python tools/check_docs.py out/docs    # or tox run -e docs, which builds it first
"""

from __future__ import annotations

import html.parser
import importlib
import inspect
import json
import re
import sys
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import snowballstemmer
from sphinx.util.inventory import InventoryFile

# What users import. Other modules are internals, which docs/internals.md lists.
MODULES = (
    "smartreg",
    "smartreg.checking",
    "smartreg.divergences",
    "smartreg.perturbation",
    "smartreg.proximal",
    "smartreg.quality",
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


def public(modules: Iterable[str] = MODULES) -> dict[str, Any]:
    """Return the public names and their objects: `__all__`, or the functions and classes that a module defines."""
    found = {}
    for name in modules:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [
            name_
            for name_, value in vars(module).items()
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == name and name_[0] != "_"
        ]
        found |= {f"{name}.{name_}": getattr(module, name_) for name_ in names}
    return found


def undocumented(names: dict[str, Any], documented: Iterable[str]) -> list[str]:
    """Return the public names that are not documented, nor the same object by another name."""
    objects = []
    for name in documented:
        module, _, attribute = name.rpartition(".")
        if module in sys.modules:
            objects.append(getattr(sys.modules[module], attribute, None))
    return [name for name, value in names.items() if not any(value is other for other in objects)]


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


def not_found(site: Path, queries: Iterable[str]) -> list[str]:
    """Return the queries of which the search index has no page with all words."""
    index = json.loads((site / "searchindex.js").read_text("utf-8").removeprefix("Search.setIndex(").removesuffix(")"))
    stem = snowballstemmer.stemmer("english").stemWord
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
    site = Path(sys.argv[1])
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = [name for kind, names in inventory.items() if kind.startswith("py:") for name in names]
    names, pages = public(), read(site)
    wrong = [f"public, and in no API page: {name}" for name in undocumented(names, documented)]
    wrong += [f"leads nowhere: {link}" for link in broken(pages)]
    wrong += [f"fetched from elsewhere: {address}" for address in fetched(site, pages)]
    wrong += [f"not found by the search: {query}" for query in not_found(site, SEARCHED)]
    print(
        "\n".join(wrong)
        or f"{len(names)} public names, {len(pages)} pages: all documented, no broken link, nothing fetched"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
