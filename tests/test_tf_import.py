"""A missing framework, and Keras on another one, are named with what to do."""

import os
import subprocess
import sys


def errors(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return done.stderr


def test_a_missing_framework_names_the_extra():
    for missing in ("tensorflow", "keras"):
        code = f"import sys; sys.modules[{missing!r}] = None; import smartreg_tf"
        assert "ImportError: smartreg_tf needs TensorFlow and Keras 3: pip install 'smartreg[tf]'" in errors(code)


def test_a_missing_framework_names_the_backend_that_was_asked_for():
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
sys.modules["tensorflow"] = None
import smartreg_tf
"""
    assert "pip install 'smartreg[tf]', and KERAS_BACKEND=jax, which must be tensorflow before Keras" in errors(code)


def test_another_backend_of_keras_names_the_variable():
    code = """
import sys, types
keras = types.ModuleType("keras")
keras.config = types.SimpleNamespace(backend=lambda: "jax")
sys.modules["keras"] = keras
sys.modules["tensorflow"] = types.ModuleType("tensorflow")
import smartreg_tf
"""
    assert "Keras runs on 'jax'. Set the environment variable KERAS_BACKEND=tensorflow" in errors(code)
