"""The scripts in tools/."""

import ast
import runpy
from collections import Counter
from pathlib import Path

import pytest

import smartreg

ROOT = Path(__file__).parents[1]
FORMULAS = "def step(x, eta):\n    if x > 0:\n        x = x + eta\n    return [x, x - eta]\n"


@pytest.fixture(scope="module")
def mutate():
    return runpy.run_path(str(ROOT / "tools" / "mutate.py"))


def test_every_mutation_still_applies(mutate):
    """Each piece of code occurs once in its package, and its mutation changes it: the list cannot rot."""
    stale = []
    for mutation in mutate["MUTATIONS"]:
        try:
            mutate["place"](mutation)
        except LookupError as error:
            stale.append(str(error))
        assert ast.dump(ast.parse(mutation.old)) != ast.dump(ast.parse(mutation.new)), mutation
        for test in mutation.tests:
            file, _, name = test.partition("::")
            assert f"def {name.split('[')[0]}(" in (ROOT / "tests" / file).read_text(), test
    assert not stale, "\n".join(stale)
    assert (
        max(Counter((mutation.backend, mutation.name, mutation.old) for mutation in mutate["MUTATIONS"]).values()) == 1
    )
    counts = Counter(mutation.backend for mutation in mutate["MUTATIONS"])
    assert all(counts[backend] >= 75 for backend in ("numpy", "torch", "tf"))


def test_the_version_is_in_one_place_and_dated_in_the_changelog(monkeypatch, tmp_path):
    release = runpy.run_path(str(ROOT / "tools" / "release.py"))
    number = release["version"]()
    assert number == smartreg.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    (tmp_path / "smartreg").mkdir()
    (tmp_path / "smartreg" / "__init__.py").write_text(f'__version__ = "{number}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"## [{number}] - unreleased\n")
    monkeypatch.setitem(release["version"].__globals__, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"CHANGELOG.md: expected the heading '## \[.*\] - YYYY-MM-DD'"):
        release["version"]()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("x + eta", "x", FORMULAS.replace("x + eta", "x")),
        ("x=x+eta", "x = eta", FORMULAS.replace("x + eta", "eta")),
        ("if x > 0: ...", "if x < 0: ...", FORMULAS.replace(">", "<")),
        ("if x > 0: ...", "...", FORMULAS.replace("    if x > 0:\n    ", "")),
        ("return [x, x - eta]", "", FORMULAS.replace("    return [x, x - eta]\n", "")),
        ("if x > 0:\n    ...\nreturn [x, x - eta]", "return [x, x - eta]\nif x > 0:\n    ...", None),
    ],
)
@pytest.mark.parametrize("file", ["perturbation.py", "rooms/moved.py"])
def test_an_edit_is_found_by_its_syntax_tree(mutate, tmp_path, file, old, new, expected):
    package = tmp_path / "smartreg"
    (package / "rooms").mkdir(parents=True)
    (package / file).write_text(FORMULAS)
    where, code = mutate["edited"](mutate["Mutation"]("numpy", "", old, new, ()), tmp_path)
    assert where == package / file
    if expected is None:
        first, second, *_ = FORMULAS.partition("    return [x, x - eta]\n")
        expected = first.replace("    if", second + "    if")
    assert code == ast.unparse(ast.parse(expected))


def test_an_edit_that_fits_twice_needs_to_say_within_what(mutate, tmp_path):
    (tmp_path / "smartreg").mkdir()
    (tmp_path / "smartreg" / "a.py").write_text(FORMULAS + FORMULAS.replace("step", "other"))
    edit = mutate["Mutation"]("numpy", "twice", "x - eta", "eta", ())
    with pytest.raises(LookupError, match=r"numpy, twice: this code occurs 2 times in smartreg, expected once"):
        mutate["edited"](edit, tmp_path)
    _, code = mutate["edited"](edit._replace(within="other"), tmp_path)
    assert code == ast.unparse(ast.parse(FORMULAS + FORMULAS.replace("step", "other").replace("x - eta", "eta")))
    with pytest.raises(LookupError, match="within nobody, expected once"):
        mutate["edited"](edit._replace(within="nobody"), tmp_path)
