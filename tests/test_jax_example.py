"""The JAX backend of docs/backends.md passes the check: where JAX is installed, and in `tox run -e jax-example`."""

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from smartreg.checking import check_backend

REQUESTED = "jax" in os.environ.get("SMARTREG_BACKENDS", "").split()
PAGE = Path(__file__).parents[1] / "docs" / "backends.md"


@pytest.fixture(scope="module")
def jax_backend():
    if importlib.util.find_spec("jax") is None and not REQUESTED:
        pytest.skip("JAX is not installed; tox run -e jax-example installs it")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (source,) = (block for block in blocks if "import jax\n" in block)
    module = ModuleType("jax_backend")
    exec(compile(source, str(PAGE), "exec"), vars(module))
    return module


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_example_passes_the_check(jax_backend, dtype):
    report = check_backend(jax_backend, dtype)
    assert report.ok, report


def test_the_example_can_fail(jax_backend, monkeypatch):
    monkeypatch.setattr(jax_backend, "project_l1_ball", jax_backend.project_l2_ball)
    assert not check_backend(jax_backend, functions=["project_l1_ball"]).ok
