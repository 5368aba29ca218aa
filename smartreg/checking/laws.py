"""The laws that every backend obeys, and the inputs on which they are checked.

A law takes the backend's `Face` and a case, and yields (what, error, bound) for each thing that it checks. The cases
are drawn by `check_backend` or by hypothesis. No backend has a tolerance of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smartreg import perturbation
from smartreg.checking.bounds import HALF, bound, by_row, eps, floor_of, norms, relative, round_to, worst
from smartreg.checking.face import BALLS, Face
from smartreg.config import SMARTConfig
from smartreg.divergences import DIVERGENCES
from smartreg.reference import Parameters, forward, init_parameters

Array = NDArray[Any]
Law = tuple[str, float, float]


class Pair(NamedTuple):
    """Two outputs (n, ..., C), a mask of their positions or None, and a shift of all logits of a row."""

    a: Array
    b: Array
    mask: Array | None
    shift: float


def random_pair(rng: np.random.Generator, name: str, dtype: str) -> Pair:
    """Draw outputs from a scalar head to (n, tokens, C), any distance apart, with ties and -inf classes.

    The shapes are few, because some frameworks compile each anew.
    """
    classes = int(rng.choice([2, 3, 40])) if name == "symmetric_kl" else int(rng.choice([1, 3]))
    return make_pair(
        name,
        dtype,
        seed=int(rng.integers(2**32)),
        shape=(3, *([], [4])[rng.integers(2)], classes),
        size=float(10 ** rng.uniform(-3, 4)),
        distance=float(10 ** rng.uniform(-7, 4)),
        shift=float(rng.choice([0.0, 1.0, 4096.0])),
        ties=bool(rng.random() < 0.2),
        excluded=int(rng.integers(2)) if classes > 2 else 0,
    )


def make_pair(
    name: str,
    dtype: str,
    *,
    seed: int,
    shape: tuple[int, ...],
    size: float,
    distance: float,
    shift: float = 0.0,
    ties: bool = False,
    excluded: int = 0,
) -> Pair:
    """Make a pair: the outputs' size and distance, whether they are whole numbers, how many classes are -inf."""
    rng = np.random.default_rng(seed)
    b = size * rng.normal(size=shape)
    a = b + distance * rng.normal(size=shape)
    if ties:
        a, b = np.round(a), np.round(b)
    a, b = (round_to(np.clip(z, -1e4, 1e4), dtype) for z in (a, b))
    if name == "symmetric_kl" and excluded:
        a[..., :excluded] = b[..., :excluded] = -np.inf
    mask = rng.random(shape[:-1]) < 0.7 if len(shape) > 2 else None
    return Pair(a, b, mask, shift)


def divergence_laws(face: Face, name: str, pair: Pair) -> Iterator[Law]:
    """Check J >= 0, symmetry, 0 only at equal distributions, gradients, positions, masks, and the reference."""
    a, b, mask, shift = pair
    required = bound("divergence", face.dtype)
    reference = DIVERGENCES[name]
    wide_a, wide_b = np.float64(a), np.float64(b)
    exact = reference.value(wide_a, wide_b)
    j = face.value(name, a, b)
    floor = floor_of(face.dtype)
    yield "J >= 0", worst(np.minimum(j, 0)), 0.0
    yield "as the reference", relative(j, exact, floor), 2 * required
    yield "symmetric", relative(face.value(name, b, a), j, floor), 2 * required
    yield "0 at equal outputs", worst(face.value(name, a, a)), 0.0
    yield "0 only at equal distributions", float(np.any((j <= 0) & (exact > floor))), 0.0
    if face.dtype in HALF:
        narrow = type(face)(face.backend, "float32").value(name, a, b)
        yield "computed in float32", worst(j - narrow), 0.0
        return
    yield from _gradient_laws(face, name, pair)
    if name == "symmetric_kl":
        # a + c is exact where c lies on the grid of a
        grid_a, grid_b = (z + np.float32(shift) - np.float32(shift) for z in (a, b))
        moved_a, moved_b = (z + np.float32(shift) for z in (grid_a, grid_b))
        if _equal(moved_a - np.float64(shift), grid_a) and _equal(moved_b - np.float64(shift), grid_b):
            want = face.value(name, grid_a, grid_b)
            yield "no shift matters", relative(face.value(name, moved_a, moved_b), want, floor), 2 * required
    if a.ndim > 2:
        positions = int(np.prod(a.shape[1:-1]))
        each = face.value(name, a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1])).reshape(a.shape[:-1])
        limit = bound("mean", face.dtype, positions)
        yield (
            "the mean over positions",
            relative(j, np.float64(each).mean(axis=tuple(range(1, each.ndim))), floor),
            limit,
        )
        assert mask is not None
        kept = np.where(mask, np.float64(each), 0).reshape(len(a), -1).sum(1)
        mean = kept / np.maximum(mask.reshape(len(a), -1).sum(1), 1)
        spoilt = np.where(mask[..., None], a, np.asarray(np.nan, a.dtype))
        masked = face.value(name, spoilt, b, mask)
        yield "masked positions do not matter", relative(masked, mean, floor), limit
        if face.differentiates(name):
            gradient = face.grad(name, spoilt, b, mask)[0]
            yield "masked positions have no gradient", worst(gradient[~mask]), 0.0


def _gradient_laws(face: Face, name: str, pair: Pair) -> Iterator[Law]:
    """Compare the gradients with the reference's, if the backend gives any."""
    if not face.differentiates(name):
        return
    floor, required = floor_of(face.dtype), bound("divergence", face.dtype)
    grad_a, grad_b = face.grad(name, pair.a, pair.b)
    exact = DIVERGENCES[name].grad(pair.a.astype(np.float64), pair.b.astype(np.float64))
    for got, want in zip((grad_a, grad_b), exact, strict=True):
        yield "gradient as the reference", by_row(got, want, floor), 2 * required
    if name == "symmetric_kl":
        largest = np.maximum(np.abs(grad_a).max(-1), floor)
        yield "gradient sums to 0", worst(grad_a.sum(-1, dtype=np.float64) / largest), required * pair.a.shape[-1]


class BallCase(NamedTuple):
    """Two points (n, tokens, d), the radius (a number, or one an example), the granularity and the norm."""

    u: Array
    v: Array
    radius: Any
    granularity: str
    norm: str


def random_ball(rng: np.random.Generator, dtype: str) -> BallCase:
    """Draw points inside, outside and at 0, some with ties, and gradients as small as 1e-30."""
    return make_ball(
        dtype,
        seed=int(rng.integers(2**32)),
        shape=(3, *([], [4])[rng.integers(2)], int(rng.choice([1, 6]))),
        size=float(10 ** rng.uniform(-30, 20)),
        radius=float(10 ** rng.uniform(-2, 2)),
        each=bool(rng.random() < 0.5),
        ties=bool(rng.random() < 0.2),
        granularity=str(rng.choice(["example", "token"])),
        norm=str(rng.choice(list(BALLS))),
    )


def make_ball(
    dtype: str,
    *,
    seed: int,
    shape: tuple[int, ...],
    size: float,
    radius: float,
    each: bool,
    ties: bool,
    granularity: str,
    norm: str,
) -> BallCase:
    """Make a case: the points' size, the radius in units of that size, and whether each example has its own."""
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(2, *shape)) * 10 ** rng.uniform(-1, 1, size=(2, shape[0], *[1] * (len(shape) - 1)))
    if ties:
        u = np.round(u)
    radii = size * radius * (rng.uniform(0.5, 2, size=shape[0]) if each else np.ones(()))
    u, v, radii = (round_to(value, dtype) for value in (size * u, size * v, radii))
    return BallCase(u, v, radii if each else float(radii), granularity, norm)


def normalize_laws(face: Face, case: BallCase) -> Iterator[Law]:
    """Check that the length is 1 at any size of g, 0 at 0, and that signs stay."""
    g, norm, granularity = case.u, case.norm, case.granularity
    unit = face.call("normalize", g, norm=norm, granularity=granularity)
    length, before = (norms(z, norm, granularity) for z in (unit, g))
    limit = bound("norm", face.dtype)
    yield "length 1", worst(length - (before > 0)), limit
    yield (
        "signs stay",
        float(np.any((np.sign(unit) != np.sign(g)) & (np.abs(g) > eps(face.dtype) * np.abs(g).max()))),
        0.0,
    )
    want = perturbation.normalize(np.float64(g), norm, granularity)  # type: ignore[arg-type]
    yield "as the reference", worst(unit - want), limit


def projection_laws(face: Face, ball: str, case: BallCase) -> Iterator[Law]:
    """Check that it is inside the ball, idempotent, the identity inside, non-expansive, and as the reference."""
    u, v, radius, granularity, _ = case
    norm = next(norm for norm, name in BALLS.items() if name == ball)
    ulp = eps(face.dtype)
    once, other = (face.call(ball, z, epsilon=radius, granularity=granularity) for z in (u, v))
    before = norms(u, norm, granularity)
    limit = np.broadcast_to(np.reshape(radius, (-1,) + (1,) * (before.ndim - 1)), before.shape).astype(float)
    unit = max(float(np.max(limit)), floor_of(face.dtype))
    yield "inside the ball", worst(np.maximum(norms(once, norm, granularity) - limit * (1 + ulp), 0) / unit), 0.0
    again = face.call(ball, once, epsilon=radius, granularity=granularity)
    yield "idempotent", worst(again - once), 0.0
    trailing = (1,) * (u.ndim - before.ndim)
    inside = np.broadcast_to((before <= limit * (1 - 20 * ulp)).reshape(before.shape + trailing), u.shape)
    yield "the identity inside", worst((once - u)[inside]), 0.0
    apart, closer = (norms(np.float64(p) - q, "2", granularity) for p, q in ((u, v), (once, other)))
    excess = np.maximum(closer - apart, 0) / np.maximum(np.maximum(apart, before), floor_of(face.dtype))
    yield "non-expansive", worst(excess), bound("expansion", face.dtype)
    want = getattr(perturbation, ball)(np.float64(u), np.float64(radius), granularity)
    scale = max(float(np.abs(u).max()), floor_of(face.dtype))
    yield "as the reference", worst(once - want) / scale, bound("projection", face.dtype)


class AscentCase(NamedTuple):
    """The reference network's parameters, its embeddings and their mask, the noise, l_s and the configuration."""

    theta: Parameters
    x: Array
    mask: Array
    noise: Array
    divergence: str
    config: SMARTConfig


def random_ascent(rng: np.random.Generator, dtype: str) -> AscentCase:
    """Draw any norm, granularity, start and divergence; radii that bind and radii that do not."""
    return make_ascent(
        dtype,
        seed=int(rng.integers(2**32)),
        norm=str(rng.choice(list(BALLS))),
        granularity=str(rng.choice(["example", "token"])),
        start=str(rng.choice(["gaussian", "margin"])),
        scale=str(rng.choice(["absolute", "rms"])),
        divergence=str(rng.choice(list(DIVERGENCES))),
        epsilon=float(10 ** rng.uniform(-2, 0.4)),
    )


def make_ascent(dtype: str, *, seed: int, divergence: str, **settings: Any) -> AscentCase:
    """Make a case from a seed and settings of SMARTConfig."""
    rng = np.random.default_rng(seed)
    theta = {
        name: round_to(value, dtype)
        for name, value in init_parameters(rng, vocabulary=9, d=4, hidden=5, outputs=3).items()
    }
    # no token twice: if coordinates tie, rounding decides which one the l1 margin start moves
    x = theta["E"][np.stack([rng.permutation(9)[:4] for _ in range(3)])]
    mask = np.arange(4) < rng.integers(1, 5, size=(3, 1))
    config = SMARTConfig(**{"sigma": 0.05, "eta": 0.05, **settings})
    noise = round_to(rng.normal(size=x.shape if config.start == "gaussian" else (3, 3)), dtype)
    return AscentCase(theta, x, mask, noise, divergence, config)


def ascent_laws(face: Face, case: AscentCase) -> Iterator[Law]:
    """Check that delta is in its ball, 0 at masked and non-finite entries, and that a small step ascends."""
    theta, x, mask, noise, divergence, config = case

    def network(delta: Any) -> Array:
        wide = {name: value.astype(np.float64) for name, value in theta.items()}
        outputs, _ = forward(wide, x.astype(np.float64) + delta, mask)
        return outputs

    clean = round_to(network(0.0), face.dtype)

    def ascend(**changes: Any) -> Array:
        return face.ascend(theta, x, clean, config.replace(**changes), noise, mask, divergence)

    delta = ascend(ascent_steps=2)
    limit = config.epsilon * (perturbation.rms(np.float64(x), mask) if config.scale == "rms" else np.ones(len(x)))
    length = norms(delta, config.norm, config.granularity)
    limit = np.broadcast_to(limit.reshape((-1,) + (1,) * (length.ndim - 1)), length.shape)
    yield "inside the ball", worst(np.maximum(length / limit - 1, 0)), bound("norm", face.dtype)
    yield "masked positions stay", worst(delta[~mask]), 0.0
    yield "delta moves", float(not np.any(delta)), 0.0
    # two features that the network does not read
    wide, nu = (np.concatenate([z, z[..., :2]], axis=-1) for z in (x, noise))
    wide[..., -2:] = np.nan, np.inf
    given = config.replace(ascent_steps=2), nu if config.start == "gaussian" else noise, mask, divergence
    found = face.ascend(theta, wide, clean, *given)
    yield "entries that are not finite stay", worst(found[..., -2:]), 0.0
    excess = np.maximum(norms(found, config.norm, config.granularity) / limit - 1, 0)
    yield "and the others are in their ball", worst(excess), bound("norm", face.dtype)
    if config.start == "gaussian":  # a start has no rounding of the network's
        alone = ascend(ascent_steps=0)
        beside = face.ascend(theta, wide, clean, config.replace(ascent_steps=0), *given[1:])[..., :-2]
        error = by_row(beside.reshape(len(x), -1), alone.reshape(len(x), -1), floor_of(face.dtype))
        yield "and change nothing for the others", error, bound("expansion", face.dtype)
    # a step short enough for the divergence to be nearly linear, in a ball that does not stop it
    free = {"epsilon": 2.5, "sigma": 0.02, "start": "gaussian"}
    if config.start == "gaussian":
        before, after = (
            DIVERGENCES[divergence].value(
                network(0.0), network(np.float64(ascend(ascent_steps=steps, eta=1e-4, **free)))
            )
            for steps in (0, 1)
        )
        yield "a small step ascends", worst(np.maximum(before - after, 0) / before), 0.0


def random_schedule(rng: np.random.Generator) -> SMARTConfig:
    """Draw any schedule of beta, its ends among them."""
    early, late = (float(rng.choice([0.0, 0.5, 0.99, 0.999, 1.0])) for _ in range(2))
    return make_schedule(early, late, int(rng.integers(0, 101)), int(rng.integers(1, 1000)))


def make_schedule(early: float, late: float, percent: int, total: int) -> SMARTConfig:
    """Make a schedule: beta_early for `percent` of `total` steps, then beta_late."""
    return SMARTConfig(
        beta_early=early, beta_late=late, early_fraction=percent / 100, total_steps=total, proximal_steps=2
    )


def momentum_laws(face: Face, config: SMARTConfig) -> Iterator[Law]:
    """Check beta_early up to the step early_fraction T and beta_late after it, in whole numbers without rounding.

    And by `memory`: theta~ of a constant 1 after theta_0 = 0 is t / (t + 1) while it is the mean of all.
    """
    assert config.total_steps is not None
    assert config.beta_early is not None
    assert config.beta_late is not None
    last = round(100 * config.early_fraction) * config.total_steps // 100
    steps = {1, max(last, 1), last + 1, config.total_steps}
    wrong = [
        face.momentum(step, config) - (config.beta_early if step <= last else config.beta_late)
        for step in sorted(steps)
        if step <= config.total_steps
    ]
    yield "the step of the switch", worst(wrong), bound("schedule", face.dtype)
    mean = SMARTConfig(memory=1, total_steps=config.total_steps)
    average, wrong = 0.0, []
    for step in range(1, min(config.total_steps, 20)):
        average += (1 - face.momentum(step, mean)) * (1 - average)
        wrong.append(average - step / (step + 1))
    late = face.momentum(config.total_steps, SMARTConfig(memory=0.5, total_steps=config.total_steps))
    wrong.append(late - max(0.5, 1 - 2 / config.total_steps))
    yield "the mean, then the memory", worst(wrong), bound("schedule", face.dtype)


def ema_laws(face: Face, pair: Pair) -> Iterator[Law]:
    """Check that beta = 0 gives theta, beta = 1 theta~, that equal weights stay, and the average in between."""
    old, new = pair.a, pair.b
    for beta, want in ((0.0, new), (1.0, old)):
        yield f"beta = {beta:g}", worst(face.ema_update({"w": old}, {"w": new}, beta)["w"] - want), 0.0
    limit = bound("average", face.dtype)
    size = max(float(np.abs(old).max()), float(np.abs(new).max()), floor_of(face.dtype))
    for beta in (0.5, 0.99, 0.999):
        yield "equal weights stay", worst(face.ema_update({"w": old}, {"w": old}, beta)["w"] - old), 0.0
        moved = face.ema_update({"w": old}, {"w": new}, beta)["w"]
        average = (1 - beta) * new.astype(np.float64) + beta * old.astype(np.float64)
        yield "(1 - beta) theta + beta theta~", worst(moved - average) / size, limit


def bregman_laws(face: Face, pair: Pair) -> Iterator[Law]:
    """Check 0 at equal outputs, the weighted mean of each divergence over the positions that count, its gradient."""
    weight = round_to(np.linspace(0.5, 2, len(pair.a)), face.dtype)
    for name in DIVERGENCES:
        a, b, mask, _ = pair
        if name != "symmetric_kl":  # -inf is a class that takes no part
            a, b = (np.where(np.isneginf(z), np.zeros((), z.dtype), z) for z in (a, b))
        yield "0 at equal outputs", abs(face.bregman_divergence(a, a, name, mask, weight)), 0.0
        each = face.value(name, a, b, mask)
        for w in (None, weight):
            want = np.mean(np.float64(each) * (1 if w is None else w))
            got = face.bregman_divergence(a, b, name, mask, w)
            yield "the weighted mean", relative(got, want, floor_of(face.dtype)), bound("mean", face.dtype, len(a))
        gradient = face.bregman_grad(a, b, name)
        if gradient is not None:
            exact = DIVERGENCES[name].grad(a.astype(np.float64), b.astype(np.float64))[0] / len(a)
            limit = 2 * bound("divergence", face.dtype)
            yield "gradient", by_row(gradient, exact, floor_of(face.dtype)), limit


def _equal(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b))
