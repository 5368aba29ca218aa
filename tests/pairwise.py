"""Settings that together have every pair of values, instead of every combination."""

from collections.abc import Hashable, Sequence
from itertools import combinations, product


def pairwise(*factors: Sequence[Hashable]) -> list[tuple[Hashable, ...]]:
    """Choose rows, one value a factor, until each two values of any two factors are in one row.

    Every row is the first of all combinations that adds the most pairs.

    Example:
        >>> pairwise([0, 1], [0, 1], "ab")
        [(0, 0, 'a'), (0, 1, 'b'), (1, 0, 'b'), (1, 1, 'a')]
    """
    pairs = {row: set(combinations(enumerate(row), 2)) for row in product(*factors)}
    missing = set().union(*pairs.values())
    rows = []
    while missing:
        rows.append(max(pairs, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[rows[-1]]
    return rows


def named(row: tuple[Hashable, ...]) -> str:
    """Name a row for pytest."""
    return "-".join(map(str, row))


# what decides the path of a step
FACTORS = {
    "proximal_steps": [1, 3],
    "ascent_steps": [0, 1, 3],
    "norm": ["inf", "2", "1"],
    "granularity": ["example", "token"],
    "start": ["gaussian", "margin"],
    "optimizer": ["sgd", "adam"],
    "beta_late": [0.99, 0.5],
    "divergence": ["symmetric_kl", "bernoulli_symmetric_kl", "squared_error"],
    "pooled": [True, False],
    "weighted": [True, False],
}
