"""`import smartreg` stays light, and a missing framework is named."""

import pickle
import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_smartreg_loads_no_framework():
    code = """
import sys, smartreg.reference  # which imports the equations
loaded = [name for name in ("torch", "tensorflow", "keras", "jax", "transformers", "scipy") if name in sys.modules]
assert not loaded, loaded
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_import_takes_little_beyond_numpy():
    code = """
import time, numpy
start = time.process_time()
import smartreg.reference
print(time.process_time() - start)
"""
    assert min(float(run(code).stdout) for _ in range(3)) < 0.2


def test_a_backend_without_its_framework_names_the_extra():
    result = run("import sys; sys.modules['torch'] = None; import smartreg_torch")
    assert "ImportError: smartreg_torch needs PyTorch: pip install 'smartreg[torch]'" in result.stderr


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("training.fit_reference", "reference.fit_reference"),
        ("training.Step", "reference.Step"),
        ("golden.cases", "checking.golden.cases"),
        ("laws.ascent_laws", "checking.laws.ascent_laws"),
        ("laws.bound", "checking.bounds.bound"),
        ("recording.Recorder", "checking.recording.Recorder"),
        ("recording.compare_run", "checking.compare.compare_run"),
        ("recording.Row", "checking.compare.Row"),
        ("checking.Row", "checking.bounds.Row"),
    ],
)
def test_a_former_name_still_gives_the_same_object(former, now):
    """A pickle, too, finds its class by its former name."""
    old, new = (pickle.loads("csmartreg.{}\n{}\n.".format(*name.rsplit(".", 1)).encode()) for name in (former, now))
    assert old is new
