"""The cases of `smartreg.checking.laws`, as hypothesis draws them: one set for every backend."""

from hypothesis import strategies as st

from smartreg.checking.face import BALLS
from smartreg.checking.laws import make_ascent, make_ball, make_pair, make_schedule
from smartreg.divergences import DIVERGENCES

SEEDS = st.integers(0, 2**32 - 1)
NORMS = {"norm": st.sampled_from(list(BALLS)), "granularity": st.sampled_from(["example", "token"])}


def powers(low, high):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def pairs(name, dtype):
    """Outputs from a scalar head to (n, tokens, C), 1e-7 to 1e4 apart, tied, shifted, some classes -inf."""
    classes = st.sampled_from([2, 3, 5, 40] if name == "symmetric_kl" else [1, 2, 5])
    shapes = st.tuples(st.integers(1, 3), st.sampled_from([(), (1,), (4,), (2, 3)]), classes)
    return st.builds(
        lambda shape, **properties: make_pair(name, dtype, shape=(shape[0], *shape[1], shape[2]), **properties),
        shapes,
        seed=SEEDS,
        size=powers(-4, 4),
        distance=powers(-7, 4),
        shift=st.sampled_from([0.0, 1.0, -64.0, 4096.0]),
        ties=st.booleans(),
        excluded=st.integers(0, 1),
    )


def balls(dtype):
    """Points at any distance from the ball, radii that bind and radii that do not, each example its own or one."""
    return st.builds(
        lambda **properties: make_ball(dtype, **properties),
        seed=SEEDS,
        shape=st.sampled_from([(1, 1), (3, 5), (2, 3, 4), (2, 2, 2, 3)]),
        size=powers(-30, 20),
        radius=powers(-3, 3),
        each=st.booleans(),
        ties=st.booleans(),
        **NORMS,
    )


def ascents(dtype):
    """The reference network, any divergence, start, scale, norm and granularity."""
    return st.builds(
        lambda **properties: make_ascent(dtype, **properties),
        seed=SEEDS,
        divergence=st.sampled_from(list(DIVERGENCES)),
        start=st.sampled_from(["gaussian", "margin"]),
        scale=st.sampled_from(["absolute", "rms"]),
        epsilon=powers(-2, 0.4),  # beyond, the network's own tanh overflows in float32
        **NORMS,
    )


BETAS = st.sampled_from([0.0, 0.5, 0.99, 0.999, 1.0])
schedules = st.builds(make_schedule, BETAS, BETAS, st.integers(0, 100), st.integers(1, 10_000))
