"""`check_backend`, `python -m smartreg check` and the trajectories: that they pass, and that they can fail."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from smartreg import checking, divergences, perturbation, proximal
from smartreg.checking import FUNCTIONS, NUMPY, TRAJECTORIES, Face, Row, check_backend, compare_steps, run_trajectory
from smartreg.divergences import squared_error
from smartreg.reference import Functions

ROOT = Path(__file__).parents[1]


def altered(**changes):
    """NumPy's backend with some functions in place of its own; None takes one away."""
    functions = {**vars(NUMPY), **changes}
    return SimpleNamespace(**{name: function for name, function in functions.items() if function is not None})


def failing(report):
    return {row.what: row for row in report.rows if not row.ok}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_reference_passes(dtype):
    report = check_backend("numpy", dtype)
    assert report.ok, report
    assert {row.what.split(":")[0] for row in report.rows} == {*FUNCTIONS, "Algorithm 1"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in TRAJECTORIES),
        *((name, "float32") for name in ("paper", "l1", "margin", "positions")),
    ],
)
def test_algorithm_1(backend, dtype, name):
    """Weights and noise from one file; every intermediate of 50 steps, or of 18: beta changes after 15, S is 3.

    In float32 some of them, and of all but one the 10 steps that the check has, and its reference.
    """
    count = 50 if name == "paper" else 18 if dtype == "float64" else 10
    steps = run_trajectory(name, Face(backend, dtype), dtype, count)
    rows = compare_steps(steps, name, dtype)
    assert len(rows) >= count * 15
    assert not [row for row in rows if not row.ok][:3]


def test_every_trajectory_uses_what_it_is_for():
    for name, (changes, _) in TRAJECTORIES.items():
        steps = run_trajectory(name, Functions())
        assert min(step.R_s for step in steps) > 0
        assert max(step.D_Breg for step in steps) > 0
        betas = {step.beta for step in steps} - {None}
        if "memory" in changes:  # the mean of the first 20 steps, of 2 each, then so many of the last
            assert betas == {(min(step, 18)) / min(step + 2, 20) for step in range(2, len(steps) + 1, 2)}
        else:
            assert betas == ({0} if "beta_late" in changes else {0.5, 0.9})
        limit = changes.get("epsilon", 0.2)
        if changes.get("scale") == "absolute" and "projection" not in changes:
            assert np.isclose([np.abs(step.delta).max() for step in steps], limit).all()  # the radius binds


class SwappedBeta(Functions):
    def ema_update(self, teacher, theta, beta):
        return Functions.ema_update(teacher, theta, 1 - beta)


class HalfGradient(Functions):
    def grad(self, divergence, a, b, mask=None):
        grad_a, grad_b = super().grad(divergence, a, b, mask)
        return grad_a, 0 * grad_b


class LateSwitch(Functions):
    def momentum(self, step, config):
        return Functions.momentum(step - 1, config)


@pytest.mark.parametrize(
    ("functions", "first"),
    [
        (SwappedBeta(), "step 16: teacher[E]"),
        (HalfGradient(), "step 1: gradients[W1]"),
        (LateSwitch(), "step 16: beta"),
    ],
)
def test_the_first_intermediate_that_differs_is_named(functions, first):
    rows = compare_steps(run_trajectory("paper", functions), "paper")
    assert next(row for row in rows if not row.ok).at == first


def test_a_run_that_lacks_intermediates_is_compared_by_what_it_has():
    steps = [SimpleNamespace(R_s=step.R_s, delta=None) for step in run_trajectory("paper", Functions())]
    assert len(compare_steps(steps, "paper")) == 50
    steps[30].R_s *= 1 + 1e-6
    assert [row.at for row in compare_steps(steps, "paper") if not row.ok] == ["step 31: R_s"]


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="step 1 has nothing to compare; expected some of outputs, loss"):
        compare_steps([{}], "paper")
    with pytest.raises(ValueError, match=r"step 1 has \['gradients\[wrong\]'\]"):
        compare_steps([{"gradients": {"wrong": 1.0}}], "paper")
    with pytest.raises(ValueError, match="'paper' has 50 steps, got 51"):
        compare_steps([{"loss": 1.0}] * 51, "paper")
    with pytest.raises(ValueError, match="load_trajectory: name must be one of paper, .*, got 'papper'"):
        compare_steps([], "papper")
    assert not compare_steps([{"loss": 9e9}], "paper")[0].ok


def test_a_backend_that_writes_into_its_arguments_spoils_nothing():
    def in_place(delta, epsilon, granularity="example"):
        delta *= 0.5
        return delta

    report = check_backend(altered(project_l2_ball=in_place), "float64", functions=["project_l2_ball"])
    assert set(failing(report)) >= {"project_l2_ball: the identity inside", "project_l2_ball: idempotent"}
    assert check_backend("numpy", "float64", functions=["project_l2_ball"]).ok


def test_no_rows_are_no_success():
    assert not check_backend(NUMPY, functions=[]).ok


def naive_kl(a, b, mask=None):
    """The sum of two KL terms, as the public packages have it."""
    shifted = [z - z.max(-1, keepdims=True) for z in (a, b)]
    log_p, log_q = (z - np.log(np.sum(np.exp(z), -1, keepdims=True)) for z in shifted)
    return divergences.mean_positions(np.sum((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q), -1), mask)


def half_gradient(a, b, mask=None):
    grad_a, grad_b = divergences.squared_error_grad(a, b, mask)
    return grad_a, 0 * grad_b


def descend(forward, *rest):
    def reversed_forward(x):
        outputs, vjp = forward(x)
        return outputs, lambda grad: -vjp(grad)

    return perturbation.ascend(reversed_forward, *rest)


def ascend_padding(forward, x, target, config, noise, mask, divergence):
    return perturbation.ascend(forward, x, target, config, noise, None, divergence)


def unweighted(a, b, divergence, mask, weight):
    return proximal.bregman_divergence(a, b, divergence, mask)


def raising(*_, **__):
    raise RuntimeError("no such\nkernel")


BROKEN = {
    "missing": ({"normalize": None}, "missing functions", "normalize. Write it as docs/backends.md lists it"),
    "raises": (
        {"project_l1_ball": raising},
        "project_l1_ball: laws",
        "project_l1_ball raised RuntimeError: no such kernel",
    ),
    "shape": (
        {"squared_error": lambda a, b, mask=None: np.sum((a - b) ** 2)},
        "squared_error: laws",
        "squared_error gave the shape (), expected (",
    ),
    "dtype": (
        {"squared_error": lambda a, b, mask=None: squared_error(a, b, mask).astype(np.float64)},
        "squared_error: laws",
        "squared_error gave float64, expected float32 for float32 inputs",
    ),
    "nothing": ({"project_l2_ball": lambda *_, **__: None}, "project_l2_ball: laws", "gave the shape (), expected ("),
    "names": ({"ema_update": lambda teacher, theta, beta: {}}, "ema_update: laws", "gave the names [], expected ['w']"),
    "no dict": ({"ema_update": lambda teacher, theta, beta: 7}, "ema_update: laws", "ema_update raised AttributeError"),
    "momentum": ({"momentum": lambda step, config: "late"}, "momentum: laws", "momentum raised ValueError"),
    "no gradients": (
        {"squared_error_grad": lambda a, b, mask=None: None},
        "squared_error: laws",
        "squared_error: gradient raised TypeError",
    ),
    "asarray": ({"asarray": raising}, "ascend: laws", "asarray raised RuntimeError"),
    "gradients": ({"gradients": raising}, "squared_error: laws", "squared_error: gradient raised RuntimeError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_compared_is_named_in_the_table(name):
    changes, what, problem = BROKEN[name]
    functions = [what.split(":")[0]] if ":" in what else [*changes]
    report = check_backend(altered(**changes), functions=functions)
    assert not report.ok
    assert problem in failing(report)[what].problem
    assert problem in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False


WRONG = {
    "rounding noise": ({"symmetric_kl": naive_kl}, "symmetric_kl: golden vectors"),
    "half the gradient": ({"squared_error_grad": half_gradient}, "squared_error: gradient as the reference"),
    "the mask": (
        {"squared_error": lambda a, b, mask=None: squared_error(a, b)},
        "squared_error: masked positions do not matter",
    ),
    "no projection": (
        {"project_l2_ball": lambda delta, epsilon, granularity="example": delta},
        "project_l2_ball: inside the ball",
    ),
    "a rescaling": ({"project_l1_ball": perturbation.project_l2_ball}, "project_l1_ball: as the reference"),
    "the axis": (
        {"normalize": lambda g, norm="inf", granularity="example": perturbation.normalize(g, norm)},
        "normalize: as the reference",
    ),
    "descent": ({"ascend": descend}, "ascend: a small step ascends"),
    "padding": ({"ascend": ascend_padding}, "ascend: masked positions stay"),
    "beta": (
        {"ema_update": lambda teacher, theta, beta: proximal.ema_update(teacher, theta, 1 - beta)},
        "ema_update: beta = 0",
    ),
    "the schedule": (
        {"momentum": lambda step, config: proximal.momentum(step + 1, config)},
        "momentum: the step of the switch",
    ),
    "the weights": ({"bregman_divergence": unweighted}, "bregman_divergence: the weighted mean"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_formula_fails_its_own_law(name):
    changes, what = WRONG[name]
    found = failing(check_backend(altered(**changes), "float32", functions=[what.split(":")[0]]))
    assert what in found
    assert not found[what].problem


def test_a_part_of_a_backend_can_be_checked():
    report = check_backend(SimpleNamespace(project_l2_ball=NUMPY.project_l2_ball), functions=["project_l2_ball"])
    assert report.ok
    assert report.backend == "SimpleNamespace"
    with pytest.raises(ValueError, match=r"functions must be of symmetric_kl, .*, got 'projekt'"):
        check_backend(NUMPY, functions=["projekt"])
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, bfloat16, float16, got 'int8'"):
        check_backend(NUMPY, "int8")


def test_a_row_without_error_is_ok_and_one_with_a_nan_is_not():
    assert Row("", 0.0, 0.0, "").ok
    broken = Row("", checking.worst([0.0, np.nan]), 1.0, "")
    assert not broken.ok
    assert broken.ratio == np.inf
    rows = [Row("", 1e-9, 0.0, ""), Row("", 5.0, 0.0, ""), broken._replace(bound=0.0), Row("", 0.0, 0.0, "", "raised")]
    assert sorted((rows[i] for i in (2, 3, 1, 0)), key=lambda row: row.badness) == rows


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), -1, keepdims=True))


@np.errstate(invalid="ignore")
def textbook_kl(a, b, mask=None):
    """Return two KL terms; a class of -inf in both makes them NaN."""
    log_p, log_q = log_softmax(a), log_softmax(b)
    return divergences.mean_positions(np.sum((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q), -1), mask)


@np.errstate(invalid="ignore")
def one_sided_kl(a, b, mask=None):
    log_p, log_q = log_softmax(a), log_softmax(b)
    return divergences.mean_positions(np.sum(np.exp(log_p) * (log_p - log_q), -1), mask)


def test_classes_of_minus_inf_have_a_row_of_their_own():
    """If a formula gives NaN there, the other rows still show its other errors."""
    report = check_backend(SimpleNamespace(symmetric_kl=textbook_kl), functions=["symmetric_kl"])
    one_sided = failing(check_backend(SimpleNamespace(symmetric_kl=one_sided_kl), functions=["symmetric_kl"]))
    rows = {row.what.removeprefix("symmetric_kl: "): row for row in report.rows}
    assert np.isnan(rows.pop("classes of -inf in both").error)
    assert {what for what, row in rows.items() if not row.ok} == {"golden vectors", "as the reference"}
    assert all(np.isfinite(row.error) for row in rows.values())
    assert " nan  1.0e-05  golden vector: -inf in both" in str(report)
    assert np.isfinite(one_sided["symmetric_kl: symmetric"].error)
    reference = check_backend("numpy", functions=["symmetric_kl", "bernoulli_symmetric_kl", "bregman_divergence"])
    assert sum(row.what.endswith(": classes of -inf in both") and row.ok for row in reference.rows) == 3


def test_what_is_not_finite_is_a_row_and_no_warning():
    """Warnings are errors here: NumPy warns of inf - inf in the check's own arithmetic."""
    report = check_backend(altered(squared_error=lambda a, b, mask=None: np.full(len(a), np.inf, a.dtype)))
    assert np.isnan(failing(report)["squared_error: symmetric"].error)
    assert failing(report)["squared_error: golden vectors"].error == np.inf
    assert not [row for row in report.rows if row.problem]


def test_without_gradients_the_values_are_checked():
    report = check_backend(altered(symmetric_kl_grad=None), "float64")
    assert report.ok
    assert {row.what.split(":")[0] for row in report.rows} == {*FUNCTIONS}
    (left_out,) = report.not_checked
    assert left_out.startswith("the gradients of symmetric_kl, and Algorithm 1, which needs them. Write gradients(")
    assert f"not checked: {left_out}" in str(report)
    assert report.to_dict()["not_checked"] == [left_out]
    assert not check_backend(altered(symmetric_kl_grad=None, symmetric_kl=one_sided_kl), functions=["symmetric_kl"]).ok
    assert check_backend("numpy", functions=["symmetric_kl"]).not_checked == []


def test_what_is_missing_is_on_one_line():
    report = check_backend(SimpleNamespace(normalize=NUMPY.normalize, momentum=NUMPY.momentum))
    (row,) = failing(report).values()
    assert row.problem.startswith("symmetric_kl, bernoulli_symmetric_kl, squared_error, project_linf_ball, ")
    assert row.problem.endswith("--functions normalize momentum (functions= in Python)")
    (row,) = check_backend(SimpleNamespace()).rows
    assert "--functions" not in row.problem


def test_a_type_that_numpy_lacks_is_not_checked():
    plain = SimpleNamespace(squared_error=squared_error, asarray=lambda array, dtype: np.asarray(array, f"no_{dtype}"))
    for backend in (plain, SimpleNamespace(squared_error=squared_error, asarray=raising)):
        report = check_backend(backend, "bfloat16", functions=["squared_error"])
        assert not report.ok
        assert bool(report.rows) == (backend is not plain)  # what raises anything else is at fault
    report = check_backend(plain, "bfloat16", functions=["squared_error"])
    assert (
        str(report).split("\n")[1].startswith("not checked: NumPy has no bfloat16. To have it checked, write asarray(")
    )
    report = check_backend("numpy", "float16", functions=["momentum"])
    assert report.not_checked == ["float16 is for the divergences alone: " + ", ".join(divergences.DIVERGENCES)]


def test_the_inputs_of_a_seed_are_those_of_the_row():
    seen = []

    def watched(a, b, mask=None):
        seen.append(a)
        return squared_error(a, b, mask)

    found = check_backend(SimpleNamespace(squared_error=watched), functions=["squared_error"])
    at = next(row.at for row in found.rows if row.what == "squared_error: as the reference")
    pair = checking.law_inputs("squared_error", "float32", int(at.removeprefix("random inputs, seed ")))
    assert any(np.array_equal(pair.a, a) for a in seen)
    with pytest.raises(ValueError, match="law_inputs: function must be one of symmetric_kl, .*, got 'projekt'"):
        checking.law_inputs("projekt")


def run(*arguments, cwd=ROOT, path=str(ROOT)):
    return subprocess.run(
        [sys.executable, "-m", "smartreg", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_ends_with_a_summary(tmp_path):
    done = run("check", "--backend", "numpy", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"^backend +dtype +passed +worst ratio  in which check$", done.stdout, re.MULTILINE)
    assert re.search(r"^numpy +float32 +(\d+) of \1 +0\.\d+  project_\w+: ", done.stdout, re.MULTILINE)
    assert "symmetric_kl: symmetric" not in done.stdout
    assert done.stdout.endswith("All passed: NumPy.\n")
    done = run("check", "-v", "--backend", "numpy", "--dtype", "float16")
    assert "numpy, float16: passed (" in done.stdout
    assert "symmetric_kl: symmetric" in done.stdout
    done = run("check", "--backend", "no_such_backend.py")
    assert done.returncode == 1
    assert done.stdout == (
        "not checked: no_such_backend.py: check_backend: there is no module called 'no_such_backend.py' in this folder "
        "or on sys.path. Give one of numpy, torch, tf, or the name of a module, without .py\n"
        "FAILED: no_such_backend.py (not checked).\n"
    )
    assert done.stderr == ""


def test_the_command_shows_failures_in_full(tmp_path):
    (tmp_path / "my_backend.py").write_text(
        "from smartreg.checking import NUMPY\n"
        "globals().update(vars(NUMPY))\n"
        "def project_linf_ball(delta, epsilon, granularity='example'):\n    return delta\n"
    )
    given = ["check", "--backend", "my_backend", "--dtype", "float64"]
    done = run(*given, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("FAILED: my_backend in float64.\n")
    table = done.stdout.partition("my_backend, float64: FAILED")[2]
    assert "! project_linf_ball: inside the ball" in table
    assert "symmetric_kl: symmetric" not in table
    done = run(*given, "--json", cwd=tmp_path)
    assert done.returncode == 1
    (report,) = json.loads(done.stdout)
    assert report["backend"] == "my_backend"
    assert {row["what"] for row in report["rows"] if not row["ok"]} >= {"project_linf_ball: inside the ball"}


def test_the_command_checks_some_functions(tmp_path):
    """Bfloat16, which nobody asked for and NumPy lacks, is no failure; what was asked for by name is."""
    (tmp_path / "plain.py").write_text("from smartreg.divergences import squared_error\n")
    given = ["check", "--backend", "plain", "--functions", "squared_error"]
    done = run(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "not checked: plain, float32; plain, float64: the gradients of squared_error. Write" in done.stdout
    assert "not checked: plain, bfloat16: NumPy has no bfloat16." in done.stdout
    assert done.stdout.endswith("All passed: plain.\n")
    done = run(*given, "--dtype", "bfloat16", "--dtype", "float64", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("FAILED: plain in bfloat16 (not checked).\n")


def test_the_command_without_a_framework_checks_numpy_and_says_what_to_install(tmp_path):
    for name in ("torch", "tensorflow", "keras"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name={name!r})\n")
    done = run("check", "--dtype", "float32", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stdout
    assert "not checked: torch: smartreg_torch needs PyTorch: pip install 'smartreg[torch]'" in done.stdout
    assert "not checked: tf: smartreg_tf needs TensorFlow and Keras 3: pip install 'smartreg[tf]'" in done.stdout
    assert done.stdout.endswith("All passed: NumPy.\n")


def test_a_name_that_is_no_backend():
    with pytest.raises(ImportError, match=r"^check_backend: there is no module called 'nope' in this folder"):
        check_backend("nope")


def test_a_backend_whose_own_import_is_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_backend.py").write_text("import no_such_framework\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="No module named 'no_such_framework'"):
        check_backend("half_a_backend")


def test_the_page_says_what_is_printed(capsys):
    page = (ROOT / "docs" / "backends.md").read_text("utf-8")
    block = re.search(r"```python\n(import numpy.*?)```", page, re.DOTALL)[1]
    exec(compile(block, "docs/backends.md", "exec"), {})
    block = re.search(r"```python\n(from smartreg.checking import golden.*?)```", page, re.DOTALL)[1]
    exec(compile(block, "docs/backends.md", "exec"), found := {})
    assert np.isneginf(found["case"].arguments["a"]).any()
    promised = re.search(r"among other rows, `! (.*?)  (.*?)`", page)
    assert any(
        line.startswith("!") and promised[1] in line and promised[2] in line
        for line in capsys.readouterr().out.split("\n")
    )


def test_the_page_lists_the_functions_as_they_are():
    """Their names, their arguments with defaults, and the shapes that the reference returns."""
    page = (ROOT / "docs" / "backends.md").read_text("utf-8")
    table = page.partition("### The functions")[2].partition("\n\nArguments")[0]
    starts = r"`\(n,\)`|the shape of `\w+`|a number|a dict"
    rows = re.findall(rf"^\| `(\w+)` \| `(.*?)`: .* \| ({starts})[^|]* \|$", table, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(FUNCTIONS)
    z, config = np.ones((2, 3, 4)), checking.load_trajectory("paper").config
    given = dict.fromkeys(("a", "b", "g", "delta", "x", "target", "outputs", "teacher_outputs", "noise"), z)
    given |= {"epsilon": 0.5, "config": config, "step": 1, "beta": 0.5, "teacher": {"w": z}, "theta": {"w": z}}
    given["forward"] = lambda x: (x, lambda grad: grad)
    for name, arguments, returns in rows:
        parameters = inspect.signature(getattr(NUMPY, name)).parameters.values()
        written = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
        assert arguments == ", ".join(written), name
        result = getattr(NUMPY, name)(*(given[p.name] for p in parameters if p.default is p.empty))
        shapes = {"a number": (), "`(n,)`": (2,), "a dict": {"w"}}
        found = result.keys() if isinstance(result, dict) else np.shape(result)
        assert found == shapes.get(returns, z.shape), name
