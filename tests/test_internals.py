"""docs/internals.md names what is there, and the packages are cut as it says: imports in one direction, small parts."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("smartreg", "smartreg_torch", "smartreg_tf")
FILES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TREES = {str(file): ast.parse((ROOT / file).read_text("utf-8")) for file in FILES}
PAGE = (ROOT / "docs" / "internals.md").read_text("utf-8")
RINGS = ("frameworks", "equations", "passes", "step", "checks", "drivers")
CELLS = [re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)]
ROWS = [row for row in CELLS if row[0] in RINGS]  # the table of rooms

# No file over 450 lines, no class over 300, no function over 50 without its docstring, but for these and their reasons.
GUIDE = {"file": 450, "class": 300, "function": 50}
LONGER = {
    ("smartreg_torch/smart.py", ""): (530, "the class below"),
    ("smartreg_torch/smart.py", "SMART"): (445, "the whole public face in one place; a third of it is docstrings"),
    ("smartreg_torch/smart.py", "__init__"): (60, "a line for each argument, and their checks"),
    ("smartreg_torch/passes.py", ""): (475, "all ways to run a model again"),
    ("smartreg_torch/transformers.py", ""): (485, "one class that overrides the Trainer's methods"),
    ("smartreg_torch/kernels.py", "_symmetric_kl"): (105, "a kernel is one function"),
    ("smartreg_tf/step.py", "smart_step"): (62, "Algorithm 1 on one screen"),
    ("smartreg_tf/perturbation.py", "ascend"): (65, "called by the check with one array, in training with lists"),
    ("smartreg_tf/engine.py", "Engine"): (340, "a method for each of Keras' that it takes over, and the public face"),
}


def rooms() -> dict[str, str]:
    """The ring of each file, by the table of rooms."""
    found = {}
    for ring, names, _, tests, *marks in ROWS:
        for test in re.findall(r"`(\w+)`", tests):
            assert (ROOT / "tests" / f"{test}.py").exists(), test
        for package, mark in zip(PACKAGES, marks, strict=True):
            if mark:
                found |= {f"{package}/{name}": ring for name in re.findall(r"`([\w/]+\.py)`", names)}
    return found


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: str) -> set[str]:
    """The files of the packages that a file imports, anywhere in it: for type checkers alone, too."""
    files = {module(str(other)): str(other) for other in FILES}
    found = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files else str(node.module) for name in names]
        else:
            continue
        found |= {files[name] for name in names if name in files}
    return found - {file}


def defined(file: str) -> set[str]:
    """What a file defines: functions, classes, methods as Class.method, and names that it assigns."""
    found = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.update({node.name, prefix + node.name})
                walk(node.body, f"{node.name}." if isinstance(node, ast.ClassDef) else prefix)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(TREES[file].body, "")
    return found


def test_every_function_that_the_page_names_is_in_its_file():
    """Written as `file.py`: `name`, `other`."""
    places = re.findall(r"`(smartreg\w*/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGE)
    assert len(places) > 20
    for file, names in places:
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in defined(file), f"{file} has no {name}"


def test_every_file_has_its_line_in_the_table_of_rooms():
    files = {str(file) for file in FILES if file.name not in ("__init__.py", "__main__.py")}
    assert rooms().keys() == files


def test_no_import_cycle():
    try:
        TopologicalSorter({str(file): imports(str(file)) for file in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_go_in_one_direction():
    """Equations <- passes <- step <- drivers, and each backend <- smartreg."""
    ring = rooms()
    for file in ring:
        for other in imports(file):
            package = other.split("/")[0]
            assert package in ("smartreg", file.split("/")[0]), f"{file} imports {other}"
            if other in ring:
                assert RINGS.index(ring[other]) <= RINGS.index(ring[file]), f"{file} imports {other}"


def sizes() -> dict[tuple[str, str], tuple[str, int]]:
    """The kind and the lines of each file, class and function, those of functions without their docstring."""
    found = {}
    for file, tree in TREES.items():
        found[file, ""] = "file", len((ROOT / file).read_text("utf-8").splitlines())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[file, node.name] = "class", node.end_lineno - node.lineno + 1
            elif isinstance(node, ast.FunctionDef):
                first = node.body[0]
                doc = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) is not None else 0
                found[file, node.name] = "function", node.end_lineno - node.lineno + 1 - doc
    return found


def test_no_part_is_longer_than_the_guide():
    limits = {part: LONGER[part][0] if part in LONGER else GUIDE[kind] for part, (kind, _) in sizes().items()}
    assert not {part: lines for part, (_, lines) in sizes().items() if lines > limits[part]}
    assert LONGER.keys() <= limits.keys()


def test_the_picture_is_the_scripts_and_names_files_that_are_there():
    """If not: python tools/make_internals.py."""
    picture = (ROOT / "docs" / "internals.svg").read_text("utf-8")
    script = (ROOT / "tools" / "make_internals.py").read_text("utf-8")
    labels = re.findall(r'"([\w ,|.]+\.py)"', script)
    assert len(labels) > 9
    for label in labels:
        assert f">{label}<" in picture, label
        for name in re.findall(r"\w+\.py", label):
            assert any(file.name == name for file in FILES), name
