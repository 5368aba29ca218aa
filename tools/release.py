"""Build wheel and sdist, and try them as a user would, in fresh environments with one framework each.

python tools/release.py              # or tox run -e release: builds dist/, and tries it
python tools/release.py --only numpy # without the two frameworks, in a minute

The version is read from smartreg/__init__.py; CHANGELOG.md must have it, with a date.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# what is installed; and whether the demo runs there, too
TRIALS = {"numpy": ("", False), "torch": ("[torch,digits]", True), "tf": ("[tf,digits]", True)}
FOREIGN = {"numpy": ("torch", "tensorflow"), "torch": ("tensorflow",), "tf": ("torch",)}
IMPORT = """
import importlib.util, sys, smartreg
assert smartreg.__version__ == sys.argv[1], smartreg.__version__
assert sys.prefix in smartreg.__file__, smartreg.__file__
for name in sys.argv[2:]:
    assert not importlib.util.find_spec(name), name
"""


def run(*command: str | Path, **options: object) -> None:
    print("$", *(str(word).strip().splitlines()[0] for word in command), flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)


def version() -> str:
    """Read the version, and find its dated heading in the changelog."""
    (found,) = re.findall(
        r'^__version__ = "(.*)"$', (ROOT / "smartreg" / "__init__.py").read_text("utf-8"), re.MULTILINE
    )
    heading = rf"^## \[{re.escape(found)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE):
        raise SystemExit(f"CHANGELOG.md: expected the heading '## [{found}] - YYYY-MM-DD' for smartreg.__version__")
    return found


def build(number: str) -> tuple[Path, Path]:
    """Build both files into an empty dist/, and check what a package index would show of them."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    wheel, sdist = DIST / f"smartreg-{number}-py3-none-any.whl", DIST / f"smartreg-{number}.tar.gz"
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel, sdist


def attempt(file: Path, backend: str, number: str, folder: Path) -> None:
    """Install a file into an environment of its own, and run the check, and the demo, far from this clone."""
    extra, has_demo = TRIALS[backend]
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SMARTREG_BACKENDS")}
    options = {"cwd": folder, "env": kept | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}}
    run(python, "-m", "pip", "install", "-q", f"smartreg{extra} @ {file.as_uri()}", **options)
    run(python, "-c", IMPORT, number, *FOREIGN[backend], **options)
    run(python, "-m", "smartreg", "check", **options)
    if has_demo:
        run(python, "-m", "smartreg", "demo", "--seeds", "2", **options)
        if not (folder / "out" / "demo.png").exists():
            raise SystemExit("the demo left no out/demo.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build wheel and sdist, and try them in fresh environments.")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="environments to try")
    given = parser.parse_args()
    number = version()
    wheel, sdist = build(number)
    trials = [(wheel, backend) for backend in given.only] + [(sdist, "numpy")] * ("numpy" in given.only)
    for file, backend in trials:
        with tempfile.TemporaryDirectory(prefix="smartreg-release-") as folder:
            attempt(file, backend, number, Path(folder))
        print(f"{file.name} with only {backend}: installed and checked\n", flush=True)
    print(f"dist/ has smartreg {number}: {wheel.name}, {sdist.name}")


if __name__ == "__main__":
    main()
