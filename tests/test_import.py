"""`import smartreg` stays light, and a missing framework is named."""

import subprocess
import sys


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
