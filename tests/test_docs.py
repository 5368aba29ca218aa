"""The links of the pages lead somewhere, and the files and tests that they name are there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")), *NOTEBOOKS]


def written(page):
    """The text of a page, or of the text cells of a notebook."""
    text = page.read_text("utf-8")
    if page.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def prose(page):
    return re.sub(r"^```.*?^```", "", written(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page):
    text = written(page).replace("NAME", "*")
    named = re.findall(
        r"`(?:python |pytest )?((?:smartreg\w*|tests|tools|benchmarks|examples|docs)/[\w/.*]+\.\w+)(?:::(\w+))?", text
    )
    for file, test in named:
        found = list(ROOT.glob(file))
        assert found, file
        assert not test or f"def {test}(" in found[0].read_text("utf-8"), test


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_stored_without_outputs(notebook):
    """The build of the documentation runs it."""
    code = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


def test_the_reviews_are_balanced_and_all_different():
    header, *rows = (ROOT / "docs" / "notebooks" / "reviews.tsv").read_text("utf-8").splitlines()
    sentences, labels = zip(*(row.split("\t") for row in rows), strict=True)
    assert header == "sentence\tlabel"
    assert len(set(sentences)) == len(sentences) == 240
    for half in (labels[:144], labels[144:]):  # trained on, and tested on
        assert half.count("0") == half.count("1") == len(half) / 2


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[one](page.md#a-heading)\n```\n[code](nowhere.md)\n```\n")
    test_every_relative_link_leads_somewhere(page)
    for broken in ("[two](other.md)", "[three](#another-heading)"):
        page.write_text(f"# A heading\n{broken}\n")
        with pytest.raises(AssertionError):
            test_every_relative_link_leads_somewhere(page)
