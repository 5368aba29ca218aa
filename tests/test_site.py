"""The documentation site, without building it: its check sees what is wrong, and every public name has a page."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def check():
    return runpy.run_path(str(ROOT / "tools" / "check_docs.py"))


def named_in_the_api_pages(check):
    """The names whose docstrings the pages of docs/api take."""
    found = []
    for page in (DOCS / "api").glob("*.md"):
        module = ""
        for directive, name, options in re.findall(
            r"^\.\. ([\w:]+):: ([\w.]+)[^\n]*\n((?:   :.*\n)*)", page.read_text("utf-8"), re.MULTILINE
        ):
            if directive == "currentmodule":
                module = name
            elif directive == "automodule":
                listed = re.search(r":members:(.*)", options)[1].replace(",", " ").split()
                found += [f"{name}.{member}" for member in listed] or check["public"](name)
            else:
                found.append(name if name.startswith("smartreg") else f"{module}.{name}")
    return found


def test_every_public_name_is_on_an_api_page(check):
    """tox run -e docs asks the same of the pages as they were built."""
    named = named_in_the_api_pages(check)
    assert check["undocumented"](named) == []
    named.remove("smartreg_torch.SMART")
    assert check["undocumented"](named) == ["smartreg_torch.SMART"]


def test_every_public_function_and_class_has_an_example(check):
    assert check["without_example"](name for module in check["MODULES"] for name in check["public"](module)) == []
    assert check["without_example"](["smartreg_torch.smart.SMART", "smartreg_torch.smart._check_model"]) == [
        "smartreg_torch.smart._check_model"
    ]


def test_the_settings_page_is_the_docstring():
    """If not: python tools/make_settings.py."""
    assert (DOCS / "settings.md").read_text("utf-8") == runpy.run_path(str(ROOT / "tools" / "make_settings.py"))[
        "page"
    ]()


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(?:.*<)?([\w/]+)>?$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    assert pages - set(listed) == {"index"}


def test_the_check_sees_what_is_wrong_with_a_site(check, tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="b.html"></a><a href="https://x.org/y.html"></a>'
        '<script src="_static/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#top">x</a>')
    assert check["broken"](check["read"](tmp_path)) == []
    assert check["fetched"](tmp_path, check["read"](tmp_path)) == []
    (tmp_path / "b.html").write_text(
        '<a href="a.html#nowhere"></a><a href="c.html"></a><img src="//x.org/y.png">'
        '<link rel="stylesheet" href="https://x.org/y.css">'
    )
    (tmp_path / "c.css").write_text(
        '@import "https://x.org/z.css"; a {background: url(https://x.org/a.png)} b {src: url(a)}'
    )
    pages = check["read"](tmp_path)
    assert check["broken"](pages) == ["b.html: a.html#nowhere", "b.html: c.html"]
    assert check["fetched"](tmp_path, pages) == [
        "b.html: //x.org/y.png",
        "b.html: https://x.org/y.css",
        "c.css: https://x.org/z.css",
        "c.css: https://x.org/a.png",
    ]


def test_the_check_sees_what_the_search_does_not_find(check, tmp_path):
    stem = {"smoothing": "smooth", "resume": "resum"}
    index = {"terms": {"label": [0, 1], "smooth": 1, "dropout": 0}, "titleterms": {"resum": [2]}}
    (tmp_path / "searchindex.js").write_text(f"Search.setIndex({json.dumps(index)})")
    queries = ["dropout", "label smoothing", "resume", "dropout smoothing", "mask"]
    missing = check["not_found"](tmp_path, queries, lambda word: stem.get(word, word))
    assert missing == ["dropout smoothing", "mask"]
