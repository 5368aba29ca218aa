"""Every backend against smartreg/golden.json, and golden.json against the script that makes it."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from smartreg import golden

ROOT = Path(__file__).parents[1]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10}
BOUND = {"float32": 1e-5, "float64": 1e-12}  # divergences and gradients: SPEC section 2
EXACT = 0.25  # less than half an ulp; the answers have no more than 50 digits
ULPS = {  # of the largest entry; the l2 and l1 balls leave 4 on purpose, to stay inside
    "normalize": 4,
    "project_linf_ball": EXACT,
    "project_l2_ball": 8,
    "project_l1_ball": 12,
    "rms": 4,
    "ema_update": 4,
    "momentum": EXACT,
}
DIVERGENCES = ["symmetric_kl", "bernoulli_symmetric_kl", "squared_error"]


def missed(case, key, got, bound):
    """The case with its error, where that passes the bound."""
    error = golden.relative_error(got, case.expected[key])
    return [] if error <= bound else [(case.name, key, error)]


def of(function, dtype):
    found = [case for case in golden.cases(dtype) if case.function == function]
    assert found
    return found


def cast(value, dtype):
    if isinstance(value, dict):
        return {name: cast(entry, dtype) for name, entry in value.items()}
    return value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype != bool else value


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("dtype", BOUND)
def test_divergences(backend, function, dtype):
    misses = []
    for case in of(function, dtype):
        arguments = cast(case.arguments, dtype)
        value = backend.value(function, **arguments)
        grad_a, grad_b = backend.grad(function, **arguments)
        assert value.dtype == grad_a.dtype == grad_b.dtype == dtype
        assert np.all(value >= 0)
        for key, got in (("value", value), ("grad_a", grad_a), ("grad_b", grad_b)):
            misses += missed(case, key, got, BOUND[dtype])
    assert not misses


def narrow(backend, values, dtype):
    """A backend's own half-precision array. NumPy has no bfloat16."""
    if backend.name == "torch":
        return backend.tensor(values).to(getattr(backend.torch, dtype))
    if backend.name == "tf":
        return backend.tf.cast(backend.tensor(values), dtype)
    return values.astype(dtype)


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_divergences_of_half_precision_are_computed_in_float32(backend, function, dtype):
    if backend.name == "numpy" and dtype == "bfloat16":
        pytest.skip("NumPy has no bfloat16")
    misses = []
    for case in of(function, dtype):
        a, b = (narrow(backend, case.arguments[side], dtype) for side in "ab")
        value = backend.value(function, a, b, case.arguments.get("mask"))
        assert value.dtype == np.float32
        misses += missed(case, "value", value, BOUND["float32"])
        if dtype == "float16":  # gradients come in the inputs' type
            grad_a, grad_b = backend.grad(function, a, b, case.arguments.get("mask"))
            misses += missed(case, "grad_a", grad_a, EPS["float16"]) + missed(case, "grad_b", grad_b, EPS["float16"])
    assert not misses


def perturbation_misses(backend, function, dtype, found):
    misses = []
    for case in found:
        # NumPy's `_shrink` multiplies slack rows too, by the radius, before it leaves them as they are
        with np.errstate(over="ignore"):
            got = backend.call(function, **cast(case.arguments, dtype))
        assert got.dtype == dtype
        misses += missed(case, "value", got, ULPS[function] * EPS[dtype])
    return misses


@pytest.mark.parametrize("function", ["normalize", "project_linf_ball", "project_l2_ball", "project_l1_ball", "rms"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_perturbations(backend, function, dtype):
    found = [case for case in of(function, dtype) if function != "project_l1_ball" or "near ties" not in case.name]
    assert not perturbation_misses(backend, function, dtype, found)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="|delta| - tau cancels where several entries are kept")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_l1_projection_of_near_ties_far_outside(backend, dtype):
    """Every digit that |delta| - tau loses, to the radius: an error of eps |delta| / epsilon."""
    found = [case for case in of("project_l1_ball", dtype) if "near ties" in case.name]
    assert not perturbation_misses(backend, "project_l1_ball", dtype, found)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_ema_update(backend, dtype):
    """A float16 model's average is in float32."""
    misses = []
    wide = "float64" if dtype == "float64" else "float32"
    as_tensor = getattr(backend, "tensor", lambda value: value)
    for case in of("ema_update", dtype):
        teacher = {"w": as_tensor(case.arguments["teacher"]["w"].astype(wide))}
        theta = {"w": as_tensor(case.arguments["theta"]["w"].astype(dtype))}
        moved = backend.proximal.ema_update(teacher, theta, case.arguments["beta"]) or teacher  # PyTorch: in place
        misses += missed(case, "value", np.asarray(moved["w"]), ULPS["ema_update"] * EPS[wide])
    assert not misses


def test_momentum(backend):
    misses = []
    for case in of("momentum", "float64"):
        beta = np.float64(backend.proximal.momentum(**case.arguments))
        misses += missed(case, "value", beta, ULPS["momentum"] * EPS["float64"])
    assert not misses


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


@pytest.mark.parametrize("function", [*DIVERGENCES, *ULPS])
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
    for broken in (np.nan, np.inf):
        assert golden.relative_error([broken], exact) == np.inf
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
