"""The links of the pages lead somewhere, and the files and tests that they name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


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
    text = page.read_text("utf-8").replace("NAME", "*")
    named = re.findall(
        r"`(?:python |pytest )?((?:smartreg\w*|tests|tools|benchmarks|examples|docs)/[\w/.*]+\.\w+)(?:::(\w+))?", text
    )
    for file, test in named:
        found = list(ROOT.glob(file))
        assert found, file
        assert not test or f"def {test}(" in found[0].read_text("utf-8"), test


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[one](page.md#a-heading)\n```\n[code](nowhere.md)\n```\n")
    test_every_relative_link_leads_somewhere(page)
    for broken in ("[two](other.md)", "[three](#another-heading)"):
        page.write_text(f"# A heading\n{broken}\n")
        with pytest.raises(AssertionError):
            test_every_relative_link_leads_somewhere(page)
