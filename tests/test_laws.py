"""The laws of `smartreg.checking.laws` on every backend, on the cases that hypothesis finds."""

import itertools

import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from smartreg.checking import NUMPY, Face, laws, load_backend
from smartreg.checking.bounds import bound, eps, ulps_apart
from smartreg.checking.face import BALLS
from smartreg.divergences import DIVERGENCES

DTYPES = ["float32", "float64"]


def by_day(examples):
    """In place of 30 where TensorFlow, called op by op, takes long; at night as many as anywhere."""
    return settings(max_examples=examples if settings.default.max_examples <= 40 else settings.default.max_examples)


def face(backend, dtype):
    if backend is NUMPY and dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 without ml_dtypes")
    return Face(backend, dtype)


def hold(found):
    for what, error, limit in found:
        assert error <= limit, f"{what}: {error:.2e} is over {limit:.1e}"


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16", "float16"])
@pytest.mark.parametrize("name", list(DIVERGENCES))
@by_day(20)
@given(data=st.data())
def test_divergences(backend, name, dtype, data):
    hold(laws.divergence_laws(face(backend, dtype), name, data.draw(strategies.pairs(name, dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_normalize(backend, dtype, data):
    hold(laws.normalize_laws(face(backend, dtype), data.draw(strategies.balls(dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", list(BALLS.values()))
@given(data=st.data())
def test_projections(backend, ball, dtype, data):
    hold(laws.projection_laws(face(backend, dtype), ball, data.draw(strategies.balls(dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@by_day(20)
@given(data=st.data())
def test_ascend(backend, dtype, data):
    hold(laws.ascent_laws(face(backend, dtype), data.draw(strategies.ascents(dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@given(config=strategies.schedules)
def test_momentum(backend, dtype, config):
    hold(laws.momentum_laws(face(backend, dtype), config))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_averages(backend, dtype, data):
    hold(laws.ema_laws(face(backend, dtype), data.draw(strategies.pairs("squared_error", dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@by_day(20)  # each of all three divergences
@given(data=st.data())
def test_bregman_divergence(backend, dtype, data):
    hold(laws.bregman_laws(face(backend, dtype), data.draw(strategies.pairs("symmetric_kl", dtype))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(DIVERGENCES))
@by_day(20)
@given(data=st.data())
def test_every_pair_of_backends(every_backend, name, dtype, data):
    """Values and gradients of any two backends against each other."""
    case = data.draw(strategies.pairs(name, dtype))
    faces = [Face(load_backend(backend), dtype) for backend in every_backend]
    limit = 2 * bound("divergence", dtype) / eps(dtype)
    results = [(face.value(name, *case[:3])[:, None], *face.grad(name, *case[:3])) for face in faces]
    for one, other in itertools.combinations(results, 2):
        for a, b in zip(one, other, strict=True):
            assert ulps_apart(a, b, dtype) <= limit
