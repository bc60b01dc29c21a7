"""The simulator is worth what it catches: each planted bug fails a seed, by the invariant it breaks."""

import pytest

from mesh.simulation import simulate_faults
from tests.mutants import MUTANTS

SEEDS = 200
"""A mutant that passes so many seeds is not caught."""


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulator_catches(name):
    mutant = MUTANTS[name]
    with mutant.planted():
        for seed in range(mutant.first_seed, SEEDS):
            report = simulate_faults(seed, nodes=6, seconds=12.0)
            if report.failure is not None:
                break
        else:
            pytest.fail(f"{SEEDS} seeds passed")
    assert any(words in report.failure for words in mutant.seen_as), (
        f"seed {seed}: {report.failure}"
    )
