"""Joining late: the mesh clock, first weights from donors that die, and a mesh that is not dragged.

Virtual time and real numbers: the nodes are the deployed ones, over the simulated network.
"""

from random import Random

import numpy as np
import pytest
import trio

from mesh import replica
from mesh.core.clock import CLOCK_LIMIT, MeshClock
from mesh.core.messages import RunInfo
from mesh.core.schedule import DONORS_LIMIT, Schedule, Start
from mesh.net.simulated import Weather
from mesh.responder import Responder
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until

SMALL_FRAGMENT = 64
FRAGMENTS = 20
LARGE = np.zeros(FRAGMENTS * SMALL_FRAGMENT, dtype=np.float32)
SLOW = Weather(bytes_per_s=4e3)
"""At which a fragment takes 0.07 s and the model 1.3 s."""


@pytest.fixture
def small_fragments(monkeypatch):
    monkeypatch.setattr(replica, "FRAGMENT_ENTRIES", SMALL_FRAGMENT)


async def hand_over(player, progress=0.0, *, steps=0):
    """One boundary: the training made `steps` steps since the last."""
    player.steps += steps
    await player.run.offer()
    await player.post(progress)


async def met(*players):
    await until(lambda: all(p.begun for p in players), 300)
    await until(lambda: all(p.node.exchanged(p.run) for p in players), 300)


# ---------------------------------------------------------------------------------- the mesh clock


def test_random_exchanges_keep_the_weighted_sum_of_the_clock_and_take_all_parts_to_its_mean():
    rng = Random(1)
    clocks = [MeshClock(rng.uniform(0, 10_000)) for _ in range(8)]
    weights = [rng.choice((0.5, 1.0, 3.0)) for _ in clocks]
    total = sum(p * c.steps for p, c in zip(weights, clocks, strict=True))
    for _ in range(400):
        i, j = rng.sample(range(8), 2)
        told = clocks[i].steps
        clocks[j].add(3)
        clocks[i].add(5)
        total += 3 * weights[j] + 5 * weights[i]
        said = clocks[j].answer(told, weights[i], weights[j], halved=rng.random() < 0.2)
        clocks[i].answered(told, said, weights[j], weights[i])
        assert sum(p * c.steps for p, c in zip(weights, clocks, strict=True)) == pytest.approx(total)
    mean = total / sum(weights)
    assert max(abs(c.steps - mean) for c in clocks) < 0.01 * mean


def test_two_parts_that_ask_each_other_at_once_meet_instead_of_swapping():
    a, b = MeshClock(0.0), MeshClock(100.0)
    from_a, from_b = a.steps, b.steps
    to_b = a.answer(from_b, 1.0, 1.0, halved=True)
    to_a = b.answer(from_a, 1.0, 1.0, halved=True)
    a.answered(from_a, to_a, 1.0, 1.0)
    b.answered(from_b, to_b, 1.0, 1.0)
    assert (a.steps, b.steps) == (50.0, 50.0)


def test_a_clock_never_leaves_what_a_frame_can_carry_and_is_never_shown_below_zero():
    clock = MeshClock(CLOCK_LIMIT)
    clock.add(CLOCK_LIMIT)
    assert clock.steps == CLOCK_LIMIT
    clock.answered(-CLOCK_LIMIT, CLOCK_LIMIT, 1.0, 0.0)
    clock.take(-5.0)
    assert (clock.steps, clock.shown) == (-5.0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_the_clock_counts_every_step_once_whatever_connections_are_lost(seed, small_fragments):
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            players = [await mesh.attach(i, LARGE, weight=float(i)) for i in (1, 2, 3)]
            await met(*players)
            before = sum(p.weight * p.run.clock.steps for p in players)
            mesh.network.weather = Weather(bytes_until_lost=6000)
            mesh.network.lose_all()
            made = 0.0
            for _ in range(30):
                player = rng.choice(players)
                steps = rng.randrange(1, 200)
                made += player.weight * steps
                await hand_over(player, steps=steps)
                await trio.sleep(rng.uniform(0.05, 1.0))
            mesh.network.weather = Weather()
            for player in players:
                await hand_over(player)
            await until(lambda: not any(p.run.initiated for p in players), 300)
            assert sum(p.run.counters.resumed for p in players), "nothing was lost: no test"
            parts = [p.run.clock.steps for p in players]
            total = sum(p.weight * part for p, part in zip(players, parts, strict=True))
            assert total == pytest.approx(before + made, abs=1e-6)
            assert min(parts) > 0

    run_seeded(main, seed)
