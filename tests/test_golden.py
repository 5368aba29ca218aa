"""Every backend against smartreg/golden.json, and golden.json against the script that makes it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from test_perturbation import call

from smartreg.checking import DTYPES, FUNCTIONS, NUMPY, Face, bound, golden, golden_checks
from smartreg.checking.bounds import HALF, round_to
from smartreg.divergences import DIVERGENCES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_gives_these_answers(backend, dtype):
    if backend is NUMPY and dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    rows = list(golden_checks(Face(backend, dtype), FUNCTIONS))
    assert not [row for row in rows if not row.ok]
    checked = {row.what.split(":")[0] for row in rows}
    assert checked == (set(DIVERGENCES) if dtype in HALF else set(FUNCTIONS) - {"ascend", "bregman_divergence"})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rms(backend, dtype):
    for case in golden.cases(dtype):
        if case.function == "rms":
            arguments = {
                name: round_to(value, dtype) if name == "x" else value for name, value in case.arguments.items()
            }
            error = golden.relative_error(call(backend, "rms", **arguments), case.expected["value"])
            assert error <= bound("average", dtype), case.name


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "tools" / "make_golden.py"))


@pytest.fixture(scope="module")
def stored():
    return json.loads((ROOT / "smartreg" / "golden.json").read_text())


def test_the_file_has_the_inputs_that_the_script_has(script, stored):
    inputs = [script["written"](case) for case in script["cases"]()]
    assert inputs == [{key: case[key] for key in ("name", "function", "arguments")} for case in stored]
    assert len({(case["function"], case["name"]) for case in stored}) == len(stored)


def is_quick(case):
    """Logits of 1e4 need thousands of digits, and 50,000 classes a minute."""
    logits = [case["arguments"][side] for side in "ab" if side in case["arguments"]]
    return not any(
        isinstance(row, dict) or np.abs(np.ma.masked_invalid(golden.decode(row))).max() > 500 for row in logits
    )


@pytest.mark.parametrize("function", sorted({case.function for case in golden.cases("float64")}))
def test_the_file_has_the_answers_that_mpmath_gives(script, stored, function):
    quick = [case for case in stored if case["function"] == function and is_quick(case)]
    for case in quick[::5]:
        assert script["fifty_digits"](function, case["arguments"]) == case["expected"], case["name"]


def test_a_wrong_digit_is_seen():
    case = next(case for case in golden.cases("float64") if case.name == "labels 1e-7 apart")
    exact = case.expected["value"]
    assert golden.relative_error(exact.high, exact) < 2.0**-53
    assert golden.relative_error(exact.high * (1 + 1e-12), exact) == pytest.approx(1e-12, rel=1e-3)
    assert exact.low != 0
    assert golden.relative_error(exact.high, exact) == pytest.approx(abs(exact.low / exact.high)[0], rel=1e-12)
    assert golden.relative_error([np.inf], exact) == np.inf
    assert np.isnan(golden.relative_error([np.nan], exact))
    with pytest.raises(ValueError, match=r"relative_error: expected an array of shape \(1,\), got \(1, 1\)"):
        golden.relative_error([[1.0]], exact)


def test_a_wrong_class_of_50_000_is_seen():
    case = next(case for case in golden.cases("float32") if case.name == "50,000 classes, 1e-4 apart")
    exact = case.expected["grad_a"]
    gradient = np.zeros(exact.shape)
    gradient[..., exact.at] = exact.high
    assert golden.relative_error(gradient, exact) < 1e-15
    gradient[..., exact.at[3]] += exact.scale[0, 0]
    assert golden.relative_error(gradient, exact) == pytest.approx(1)


def test_every_input_is_exact_in_the_dtype():
    by_dtype = {dtype: {(case.function, case.name) for case in golden.cases(dtype)} for dtype in golden.LARGEST}
    assert by_dtype["bfloat16"] < by_dtype["float32"] < by_dtype["float64"]
    assert by_dtype["float16"] < by_dtype["float32"]
    for name in ("float64, ordinary, norm 2, token", "gradients of 1e300, norm 2, token"):
        assert ("normalize", name) in by_dtype["float64"] - by_dtype["float32"]
    assert ("symmetric_kl", "two classes, 2^-23 apart") in by_dtype["bfloat16"] - by_dtype[
        "float16"
    ]  # a subnormal there
    assert ("squared_error", "float16, 5 outputs of 10000, 10000 apart") not in by_dtype["float16"]  # overflows
    with pytest.raises(ValueError, match="cases: expected a dtype of float64, .*, got 'int8'"):
        golden.cases("int8")
