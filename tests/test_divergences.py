"""Values and gradients of l_s on every backend, against mpmath and against each other."""

import exact
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import smartreg.divergences as reference
from smartreg.checking import Face, Problem

BOUND = {np.float32: 1e-5, np.float64: 1e-12}  # SPEC section 2
DTYPES = [np.float32, np.float64]
NAMES = list(reference.DIVERGENCES)

pairs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "classes": st.sampled_from([2, 2, 3, 5, 20, 100]),
        "logits": st.floats(-1, 4),  # powers of ten
        "distance": st.floats(-7, 4),
        "shift": st.sampled_from([0, 0, 1e-7, 1.0, 1e2, 1e4]),
        "spread": st.sampled_from(["even", "few", "mixed"]),
        "masked": st.integers(0, 2),
    }
)


def draw(pair, dtype):
    """Two rows of logits: of any size, any distance apart, equal in some classes or shifted in all."""
    rng = np.random.default_rng(pair["seed"])
    classes = pair["classes"]
    b = (rng.normal(size=classes) * 10 ** pair["logits"]).astype(dtype)
    d = rng.normal(size=classes) * 10 ** pair["distance"]
    if pair["spread"] == "few":
        d *= rng.random(classes) < 0.3
    elif pair["spread"] == "mixed":
        d *= 10 ** rng.uniform(-6, 0, size=classes)
    a = (b + d + pair["shift"] * rng.normal()).astype(dtype)
    for at in rng.permutation(classes)[: min(pair["masked"], classes - 2)]:
        a[at] = b[at] = -np.inf
    return a, b


@pytest.mark.parametrize("dtype", DTYPES)
@given(pair=pairs)
@example(pair={"seed": 1, "classes": 1000, "logits": 0, "distance": -7, "shift": 0, "spread": "even", "masked": 0})
@example(pair={"seed": 2, "classes": 2, "logits": 0, "distance": -7, "shift": 1e4, "spread": "even", "masked": 0})
@example(pair={"seed": 3, "classes": 3, "logits": 4, "distance": 4, "shift": 0, "spread": "even", "masked": 0})
@example(pair={"seed": 4, "classes": 5, "logits": 0.5, "distance": 3.3, "shift": 1e4, "spread": "mixed", "masked": 1})
# their largest classes differ: d centred at one of them, or between, misses the bound in the other's gradient
@example(pair={"seed": 1527, "classes": 20, "logits": 1, "distance": 2.5, "shift": 0, "spread": "even", "masked": 0})
@example(pair={"seed": 989, "classes": 20, "logits": 2, "distance": 2.5, "shift": 0, "spread": "even", "masked": 0})
def test_symmetric_kl_meets_its_bounds(backend, dtype, pair):
    face = Face(backend, dtype.__name__)
    a, b = draw(pair, dtype)
    j, grad_a, grad_b = exact.symmetric_kl(a, b)
    value = face.value("symmetric_kl", a[None], b[None])
    got_a, got_b = face.grad("symmetric_kl", a[None], b[None])
    assert value.dtype == got_a.dtype == dtype
    assert value[0] >= 0
    assert exact.relative_error(value, [j], dtype) <= BOUND[dtype]
    assert exact.relative_error(got_a[0], grad_a, dtype) <= BOUND[dtype]
    assert exact.relative_error(got_b[0], grad_b, dtype) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@given(pair=pairs)
def test_bernoulli_symmetric_kl_meets_its_bounds(backend, dtype, pair):
    face = Face(backend, dtype.__name__)
    a, b = draw({**pair, "masked": 0}, dtype)
    j, grad_a, grad_b = exact.bernoulli_symmetric_kl(a, b)
    value = face.value("bernoulli_symmetric_kl", a[None], b[None])
    got_a, got_b = face.grad("bernoulli_symmetric_kl", a[None], b[None])
    assert exact.relative_error(value, [j], dtype) <= BOUND[dtype]
    assert exact.relative_error(got_a[0], grad_a, dtype) <= BOUND[dtype]
    assert exact.relative_error(got_b[0], grad_b, dtype) <= BOUND[dtype]


def test_one_far_class_does_not_spoil_the_near_ones(backend):
    """|d| = 20 in a class of no weight: a difference of two log_softmax for the whole row (SPEC section 2) would give
    the two classes that matter, 1e-5 apart, an error of 1e-2.
    """
    face = Face(backend, "float32")
    a, b = np.array([[0.0, 1e-5, -60.0]], np.float32), np.array([[0.0, 0.0, -80.0]], np.float32)
    j, grad_a, _ = exact.symmetric_kl(a[0], b[0])
    assert exact.relative_error(face.value("symmetric_kl", a, b), [j], np.float32) <= 1e-6
    assert exact.relative_error(face.grad("symmetric_kl", a, b)[0][0], grad_a, np.float32) <= 1e-6
    log_p, log_q = (z - np.log(np.sum(np.exp(z), dtype=np.float32)) for z in (a, b))
    rowwise = np.sum((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q))
    assert exact.relative_error([rowwise], [j], np.float32) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_give_exactly_zero(backend, name, dtype):
    face = Face(backend, dtype.__name__)
    a = np.array([[1.5, -3.0, 1e4], [-np.inf, 0.0, 2.0]] if name != "squared_error" else [[1.0, 2.0]], dtype)
    assert np.array_equal(face.value(name, a, a), np.zeros(len(a)))
    for gradient in face.grad(name, a, a):
        assert np.array_equal(gradient, np.zeros_like(a))


@pytest.mark.parametrize("name", ["symmetric_kl", "bernoulli_symmetric_kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), min_size=2, max_size=5)
)
@example(rows=[(3e38, -3e38), (-3e38, 3e38)])
@example(rows=[(1e-45, 0.0), (0.0, -1e-45)])
def test_finite_logits_never_give_nan_or_less_than_zero(backend, name, dtype, rows):
    face = Face(backend, dtype.__name__)
    a, b = np.array(rows, dtype).T[:, None, :]
    value = face.value(name, a, b)
    assert value[0] >= 0
    for gradient in face.grad(name, a, b):
        assert not np.isnan(gradient).any()


def test_infinite_and_nan_logits_are_not_hidden(backend):
    face = Face(backend)
    inf, nan = np.inf, np.nan
    a = np.array([[-inf, 0.0, 1.0], [nan, 0.0, 1.0], [inf, 0.0, 1.0], [inf, 0.0, 1.0]])
    b = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [inf, 0.0, 1.0]])
    value = face.value("symmetric_kl", a, b)
    assert value[0] == inf
    assert not np.isfinite(value).any()
    assert np.isnan(value[[1, 3]]).all()
    a = np.array([[-inf, -inf], [0.0, 0.0], [0.0, 0.0], [1.0, 1.5], [0.0, -inf]])
    b = np.array([[0.0, 0.0], [-inf, -inf], [inf, inf], [inf, inf], [inf, 0.0]])
    assert np.array_equal(face.value("symmetric_kl", a, b), [inf] * 5)


def test_known_values(backend):
    face = Face(backend)
    # p = (3/4, 1/4), q = (1/2, 1/2): (1/4) log 3 of each class together
    a, b = np.array([[np.log(3.0), 0.0]]), np.array([[0.0, 0.0]])
    assert face.value("symmetric_kl", a, b)[0] == pytest.approx(0.25 * np.log(3), rel=1e-14)
    # sigma(log 3) = 3/4, sigma(0) = 1/2, for each of two labels
    assert face.value("bernoulli_symmetric_kl", a, b)[0] == pytest.approx(0.25 * np.log(3), rel=1e-14)
    assert face.value("squared_error", np.array([[1.0, 4.0]]), np.array([[3.0, 1.0]]))[0] == 13
    # shifts of all the logits change nothing
    assert face.value("symmetric_kl", a + 100, b - 3)[0] == pytest.approx(0.25 * np.log(3), rel=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_positions_and_mask(backend, name):
    face = Face(backend)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    each = face.value(name, a.reshape(12, 5), b.reshape(12, 5)).reshape(3, 4)
    expected = [each[0, [0, 1, 3]].mean(), each[1, 0], 0.0]
    assert face.value(name, a, b, mask) == pytest.approx(expected, rel=1e-13)
    assert face.value(name, a, b) == pytest.approx(each.mean(1), rel=1e-13)
    each_grad = face.grad(name, a.reshape(12, 5), b.reshape(12, 5))[0].reshape(3, 4, 5)
    gradient = face.grad(name, a, b, mask)[0]
    assert np.all(gradient[mask == 0] == 0)
    assert gradient[0, 3] == pytest.approx(each_grad[0, 3] / 3, rel=1e-13)
    broken = a.copy()
    broken[mask == 0] = np.nan  # what is masked out cannot poison the mean
    assert face.value(name, broken, b, mask) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_whatever_is_masked_out_has_gradient_zero(backend, name, fill):
    face = Face(backend)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5))
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    broken_a, broken_b = a.copy(), b.copy()
    broken_a[mask == 0] = fill
    broken_b[mask == 0] = np.nan
    for pair in ((broken_a, b), (a, broken_b), (broken_a, broken_b)):
        assert np.array_equal(face.value(name, *pair, mask), face.value(name, a, b, mask))
        for got, want in zip(face.grad(name, *pair, mask), face.grad(name, a, b, mask), strict=True):
            assert np.all(got[mask == 0] == 0)
            assert np.array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_against_finite_differences(backend, name):
    face = Face(backend)
    rng = np.random.default_rng(1)
    a, b, h = *rng.normal(size=(2, 1, 4)), 1e-6
    for which, gradient in enumerate(face.grad(name, a, b)):
        for k in range(4):
            step = h * np.eye(4)[k]
            up, down = ((a + s * step, b) if which == 0 else (a, b + s * step) for s in (1, -1))
            slope = (face.value(name, *up) - face.value(name, *down))[0] / (2 * h)
            assert gradient[0, k] == pytest.approx(slope, rel=1e-7, abs=1e-8)


def test_bad_shapes_are_named(backend):
    face = Face(backend)
    a = np.zeros((2, 3))
    for name in NAMES:
        with pytest.raises(Problem, match=rf"{name}.*one shape \(n, ..., C\), got \(2, 3\) and \(3, 2\)"):
            face.value(name, a, np.zeros((3, 2)))
        with pytest.raises(Problem, match=r"one shape \(n, ..., C\), got \(2,\)"):
            face.value(name, a[:, 0], a[:, 0])
        with pytest.raises(Problem, match=r"without the last axis, \(2,\), got \(3,\)"):
            face.value(name, a, a, np.ones(3))
