"""The Base-2 graph: rounds of pairs after which any number of nodes holds the exact mean.

Source: Takezawa, Sato, Bao, Niwa, Yamada, "Beyond Exponential Graph: Communication-Efficient Topologies
for Decentralized Learning via Finite-time Convergence" (NeurIPS 2023), with one peer a round. For
n = p q, p a power of 2 and q odd, the nodes are a grid of q rows and p columns: first each column takes
its mean, then each row, which then has p of the same weight.

A column of q = s1 + s2 + ... (powers of 2, falling): each part takes its own mean (a hypercube, log2 s
rounds); then every node outside the first part meets one of it with step s1 / (s1 + rest), which brings
both sides' *sums* to the mean of all; each side goes on by itself, the rest in the same way. So the
smaller parts are done before the first has its hypercube behind it: 2 log2 s1 + 1 rounds in all.
"""

from functools import lru_cache
from typing import NamedTuple


class Pair(NamedTuple):
    """Two places that meet: x_a += step (x_b - x_a), x_b += step (x_a - x_b), at once."""

    a: int
    b: int
    step: float


Rounds = tuple[tuple[Pair, ...], ...]


@lru_cache(maxsize=64)
def matchings(n: int) -> Rounds:
    """The rounds for places 0..n-1; each place is in at most one pair of a round.

    log2 p + 2 floor(log2 q) + 1 rounds for n = p q with q odd and above 1; log2 n for powers of 2.
    """
    columns = n & -n
    rows = n // columns
    rounds: list[list[Pair]] = []
    for column in range(columns):
        places = [row * columns + column for row in range(rows)]
        _merge(rounds, 0, _column(places))
    after = len(rounds)
    for row in range(rows):
        _merge(rounds, after, _hypercube([row * columns + k for k in range(columns)]))
    return tuple(tuple(pairs) for pairs in rounds)


def _column(places: list[int]) -> list[list[Pair]]:
    """Rounds that give an odd number of places their mean."""
    if len(places) == 1:
        return []
    parts: list[list[int]] = []
    rest = places
    while rest:
        size = 1 << (len(rest).bit_length() - 1)
        parts.append(rest[:size])
        rest = rest[size:]
    rounds: list[list[Pair]] = []
    for part in parts:
        _merge(rounds, 0, _hypercube(part))
    at = len(rounds)
    for index, part in enumerate(parts):
        others = [place for later in parts[index + 1 :] for place in later]
        if others:
            step = len(part) / (len(part) + len(others))
            _merge(rounds, at, [[Pair(a, b, step) for a, b in zip(part, others, strict=False)]])
            at += 1
        _merge(rounds, at, _hypercube(part))
    return rounds


def _hypercube(places: list[int]) -> list[list[Pair]]:
    """log2 rounds for a power of 2 of places: in round k those meet whose numbers differ in bit k."""
    bits = len(places).bit_length() - 1
    return [
        [Pair(places[i], places[i | 1 << k], 0.5) for i in range(len(places)) if not i >> k & 1]
        for k in range(bits)
    ]


def _merge(rounds: list[list[Pair]], at: int, more: list[list[Pair]]) -> None:
    """Adds rounds of other places, beginning with round `at`."""
    for offset, pairs in enumerate(more):
        while len(rounds) <= at + offset:
            rounds.append([])
        rounds[at + offset] += pairs
