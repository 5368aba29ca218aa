"""The design of the settings in which the backends are held against the reference."""

from itertools import combinations, product

from pairwise import FACTORS, pairwise


def test_every_pair_of_values_is_in_a_row():
    rows = pairwise(*FACTORS.values())
    assert len(rows) == 12  # of 3,456 combinations; 9 is the least, of the two factors with three values
    for i, j in combinations(range(len(FACTORS)), 2):
        values = list(FACTORS.values())
        assert {(row[i], row[j]) for row in rows} == set(product(values[i], values[j]))
