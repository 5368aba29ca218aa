"""Break each formula of each backend in turn, and see that the check or a test fails: python tools/mutate.py

mutmut and cosmic-ray mutate every operator, and universalmutator every line that fits a pattern. None takes one edit
with the tests that are to kill it, nor fails when an edit no longer applies. Hence the list in tools/mutations/.

Each entry there is one edit of a package: the code `old`, an expression or some statements, becomes `new`. It is found
by its syntax tree, wherever in the package it stands, so code may move. A body `...` in `old` matches any body, which
`new` keeps. Where the same code occurs more than once, `within` names the function or class that is meant.

Each mutation is made in a copy of the tree. If the file is one that `python -m smartreg check` runs, its rows in
float64 are computed up to the first that fails. If none does, and for the other files, the tests of the entry run.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"numpy": "smartreg", "torch": "smartreg_torch", "tf": "smartreg_tf"}
CHECKED = (
    "divergences.py",
    "perturbation.py",
    "projection.py",
    "proximal.py",
)  # what `python -m smartreg check` runs of a backend
# A crash that has nothing to do with the formula: the mutation is badly written.
CRASH = re.compile(
    r"(?:^E\s+|raised )((?:Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Attribute)Error)", re.M
)
CHECK = """
import sys
from smartreg.checking import FUNCTIONS, Face, golden_checks, law_checks, load_backend, trajectory_checks
face = Face(load_backend(sys.argv[1]), "float64")
for check in (golden_checks, law_checks, trajectory_checks):
    for row in check(face, FUNCTIONS):
        if not row.ok:
            print(row.what, row.problem, sep="; ")
            sys.exit(1)
"""


class Mutation(NamedTuple):
    """One edit of a package: the code `old`, which occurs once (`within`), becomes `new`; `tests` may kill it.

    `needs` names a module without which these tests skip: then the edit is not made.
    """

    backend: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    within: str = ""
    needs: str = ""


class Node(NamedTuple):
    """Where a node stands: its file and that file's tree, and what holds it, in which field and at which index.

    `scopes` are the names of the functions and classes around it.
    """

    file: Path
    tree: ast.Module
    scopes: tuple[str, ...]
    owner: Any
    field: str
    index: int | None


MUTATIONS = [
    Mutation(backend, **entry | {"tests": tuple(entry["tests"])})
    for backend in PACKAGES
    for entry in tomllib.loads((ROOT / f"tools/mutations/{backend}.toml").read_text())["mutation"]
]


@cache
def nodes(folder: Path) -> dict[tuple[type, Any], list[Node]]:
    """Every node of a package by its type and first leaf, and by its type and None."""
    found: dict[tuple[type, Any], list[Node]] = defaultdict(list)

    def walk(file: Path, tree: ast.Module, scopes: tuple[str, ...], owner: ast.AST) -> None:
        for field, value in ast.iter_fields(owner):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    node = Node(file, tree, scopes, owner, field, index)
                    for leaf in {first_leaf(child), None}:
                        found[type(child), leaf].append(node)
                    walk(
                        file,
                        tree,
                        (*scopes, child.name) if hasattr(child, "body") and hasattr(child, "name") else scopes,
                        child,
                    )

    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text())
        walk(file, tree, (), tree)
    return found


def first_leaf(node: ast.AST) -> str | None:
    """The first name or constant in a tree, where a node that fits has the same; None if that is a body `...`."""
    for name in node._fields:
        value = getattr(node, name, None)
        if is_open(value):
            return None
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr_context):
                    continue
                return first_leaf(child)
            if child is not None:
                return repr(child)
    return type(node).__name__


def parsed(code: str) -> list[Any]:
    """The one expression that some code is, else its statements."""
    body = ast.parse(code).body
    return [body[0].value] if len(body) == 1 and isinstance(body[0], ast.Expr) else body


def pattern_of(mutation: Mutation) -> list[Any]:
    """What to look for: one expression if an expression takes its place, else statements."""
    both = parsed(mutation.old), parsed(mutation.new)
    as_expression = all(len(code) == 1 and isinstance(code[0], ast.expr) for code in both)
    return both[0] if as_expression else ast.parse(mutation.old).body


def is_open(body: Any) -> bool:
    """Whether this is the body `...`."""
    if not isinstance(body, list) or len(body) != 1 or not isinstance(body[0], ast.Expr):
        return False
    return isinstance(body[0].value, ast.Constant) and body[0].value.value is ...


def same(pattern: Any, found: Any, bodies: list[list[ast.stmt]]) -> bool:
    """Whether code fits a pattern; the bodies that `...` stands for are added to `bodies`."""
    if is_open(pattern):
        bodies.append(found)
        return bool(found)
    if type(pattern) is not type(found):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(found) and all(same(a, b, bodies) for a, b in zip(pattern, found, strict=True))
    if isinstance(pattern, ast.AST):
        names = [name for name in pattern._fields if name != "ctx"]
        return all(same(getattr(pattern, name, None), getattr(found, name, None), bodies) for name in names)
    return bool(pattern == found)


def place(mutation: Mutation, root: Path = ROOT) -> tuple[Node, list[list[ast.stmt]]]:
    """The one place of a mutation, and its bodies `...`; LookupError if there is none, or more than one."""
    pattern, fitting = pattern_of(mutation), []
    for node in nodes(root / PACKAGES[mutation.backend])[type(pattern[0]), first_leaf(pattern[0])]:
        held, bodies = getattr(node.owner, node.field), list[list[ast.stmt]]()
        code = [held] if node.index is None else held[node.index : node.index + len(pattern)]
        if (not mutation.within or mutation.within in node.scopes) and same(pattern, code, bodies):
            fitting.append((node, bodies))
    if len(fitting) != 1:
        raise LookupError(
            f"{mutation.backend}, {mutation.name}: this code occurs {len(fitting)} times in "
            f"{PACKAGES[mutation.backend]}{', within ' * bool(mutation.within)}{mutation.within}, expected once: "
            f"{mutation.old!r}. Change tools/mutations/{mutation.backend}.toml"
        )
    return fitting[0]


def edited(mutation: Mutation, root: Path = ROOT) -> tuple[Path, str]:
    """The file of a mutation, and its code with the edit made; LookupError if it does not apply."""
    found = place(mutation, root)
    (file, _, _, _, field, index), _ = found
    (_, tree, _, owner, _, _), bodies = deepcopy(found)
    pattern = pattern_of(mutation)
    if isinstance(pattern[0], ast.expr):
        new = parsed(mutation.new)
    else:
        new = [kept for statement in ast.parse(mutation.new).body for kept in filled(statement, bodies)]
    if index is None:
        setattr(owner, field, new[0])
    else:
        held = getattr(owner, field)
        held[index : index + len(pattern)] = new
        if not held:
            held.append(ast.Pass())
    return file, ast.unparse(ast.fix_missing_locations(tree))


def filled(statement: ast.stmt, bodies: list[list[ast.stmt]]) -> list[ast.stmt]:
    """A new statement, with the next of the bodies that were found in place of each `...`."""
    if is_open([statement]):
        return bodies.pop(0)
    for field, value in ast.iter_fields(statement):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            setattr(statement, field, [kept for inner in value for kept in filled(inner, bodies)])
    return [statement]


def copied(to: Path) -> None:
    """The working tree's files, those that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run(backend: str, tree: Path, *command: str) -> tuple[int, str]:
    """The exit status and the output of a Python command that imports the packages of that tree."""
    set_env = {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_BACKEND": "tensorflow",
        "HYPOTHESIS_PROFILE": "default",
        "SMARTREG_BACKENDS": "" if backend == "numpy" else backend,
        "TRITON_INTERPRET": "1",  # for the kernels, if Triton is there
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, **set_env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    return done.returncode, done.stdout


def pytest(tests: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs these tests up to the first that fails."""
    return "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)


def kill(mutation: Mutation) -> str:
    """What noticed the mutation; "" where nothing did. RuntimeError where it is no fair mutation."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder)
        copied(tree)
        file, code = edited(mutation)
        (tree / file.relative_to(ROOT)).write_text(code)
        if file.name in CHECKED:
            status, output = run(mutation.backend, tree, "-c", CHECK, mutation.backend)
            said = output.strip().splitlines()[-1:] or [""]
            if status:
                if "Traceback" in output or CRASH.search(output):
                    raise RuntimeError(said[0])
                return "check: " + said[0].split(";")[0]
        if mutation.tests:
            status, output = run(mutation.backend, tree, *pytest(mutation.tests))
            failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::[^\s\[]+(?:\[.*?\](?= - |$))?)", output, re.M)
            if status:
                if status != 1 or failed is None or CRASH.search(output):
                    raise RuntimeError(output.strip()[-300:])
                return failed[1]
    return ""


def missing(mutation: Mutation) -> bool:
    """Whether the module that it needs is not installed."""
    return bool(mutation.needs) and importlib.util.find_spec(mutation.needs) is None


def baseline(backend: str, mutations: list[Mutation]) -> None:
    """SystemExit where the tree as it is does not pass the check and the tests named."""
    tests = sorted({test for mutation in mutations if not missing(mutation) for test in mutation.tests})
    for command in (
        ("-m", "smartreg", "check", "--backend", backend, "--dtype", "float64"),
        *([pytest(tuple(tests))] if tests else []),
    ):
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            copied(Path(folder))
            status, output = run(backend, Path(folder), *command)
        if status:
            sys.exit(f"{output}\n{backend}: fails before any mutation: {' '.join(command)}")


def main() -> int:
    """Print the table; 1 where a mutation survived or is invalid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    backends = sorted({mutation.backend for mutation in MUTATIONS})
    parser.add_argument("--backend", nargs="+", choices=backends, default=["numpy", "torch", "tf"])
    parser.add_argument("--only", default="", help="mutations whose name, code or file has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    given = parser.parse_args()
    files = {mutation: place(mutation)[0].file.relative_to(ROOT) for mutation in MUTATIONS}
    chosen = [m for m in MUTATIONS if m.backend in given.backend and given.only in f"{files[m]} {m.name} {m.old}"]

    def attempt(mutation: Mutation) -> tuple[str, float]:
        started = time.perf_counter()
        if missing(mutation):
            return f"not made: needs {mutation.needs}", 0.0
        try:
            found = kill(mutation) or "SURVIVED"
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = f"INVALID: {error}"
        return found, time.perf_counter() - started

    started, faults, left_out = time.perf_counter(), [], 0
    for backend in given.backend:
        mutations = [mutation for mutation in chosen if mutation.backend == backend]
        if not mutations:
            continue
        baseline(backend, mutations)
        width = max(len(mutation.name) for mutation in mutations)
        print(f"\n{backend}: {len(mutations)} mutations\n  {'mutation':<{width}}  seconds  killed by", flush=True)
        with ThreadPoolExecutor(given.jobs) as pool:
            for mutation, (found, seconds) in zip(mutations, pool.map(attempt, mutations), strict=True):
                fault = found.startswith(("SURVIVED", "INVALID"))
                left_out += found.startswith("not made")
                print(f"{'!' if fault else ' '} {mutation.name:<{width}}  {seconds:7.1f}  {found}", flush=True)
                faults += [f"  {backend}, {files[mutation]}: {mutation.name}: {found.split(':')[0]}"] if fault else []
    killed, seconds = len(chosen) - len(faults) - left_out, time.perf_counter() - started
    print(f"\n{len(chosen)} mutations, {killed} killed, {left_out} not made, in {seconds:.0f} s")
    print("\n".join(faults) if faults else "none survived")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
