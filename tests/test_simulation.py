"""The simulator itself: it replays, it passes on the deployed code, and each of its checks can fail."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import trio

from mesh.codec import Float32
from mesh.core.exchange import Initiation
from mesh.ledger import FRAGMENT_ENTRIES, Ledger, WatchedReplica
from mesh.simulation import simulate_faults
from tests.mesh_in_memory import run_seeded
from tests.schemas import fits

SEEDS = 200


def mesh_sim(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nodes.cli", "sim", *map(str, flags)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_seed_is_one_life_in_every_process_whatever_the_order_of_hashes():
    lives = [
        json.loads(mesh_sim("--seed", 11, "--seconds", 8, "--json", PYTHONHASHSEED=str(k)).stdout)
        for k in (1, 2)
    ]
    [first], [second] = (fits(life, "mesh.sim/1")["seeds"] for life in lives)
    assert first["digest"] == second["digest"]
    assert lives[0]["happened"] == lives[1]["happened"]
    assert first["digest"] != simulate_faults(12, seconds=8.0).digest


@pytest.mark.all_cores
@pytest.mark.timeout(400)
def test_many_lives_of_a_mesh_pass_under_every_fault_on_all_cores():
    completed = mesh_sim("--seed", 1000, "--seeds", SEEDS, "--json")
    report = json.loads(completed.stdout)
    assert completed.returncode == 0, (report["replay"], report["seeds"][-1]["failure"])
    assert report["passed"] == SEEDS
    happened = report["happened"]
    for fault in (
        "crash",
        "vanish",
        "leave",
        "partition",
        "cut",
        "stall",
        "detach",
        "pause",
        "move",
        "disk",
    ):
        assert happened[fault] > SEEDS / 10, f"{fault} hardly ever happens: {happened}"
    assert happened["fragments"] > 100 * SEEDS
    assert happened["lost in doubt"] > 0


def test_without_faults_nobody_is_called_dead():
    report = simulate_faults(3, seconds=30.0, faults=False)
    assert report.failure is None
    assert report.happened.get("death called", 0) == 0


def test_a_failing_seed_is_told_with_its_last_lines_and_the_command_that_replays_it(monkeypatch):
    monkeypatch.setattr(Initiation, "next_to_send", lambda self: min(self.sent, self.end - 1))
    report = simulate_faults(6, nodes=4, seconds=5.0)
    assert report.failure is not None
    assert 0 < len(report.trace) <= 50
    again = simulate_faults(6, nodes=4, seconds=5.0)
    assert (again.failure, again.trace, again.digest) == (
        report.failure,
        report.trace,
        report.digest,
    )


def test_a_mesh_of_one_node_lives():
    assert simulate_faults(5, nodes=1, seconds=5.0).failure is None


# ---------------------------------------------------------------------- each check of the ledger


class Exchange:
    """Two replicas of one fragment, and what an exchange says to the ledger about them."""

    def __init__(self):
        self.said = []
        self.ledger = Ledger(FRAGMENT_ENTRIES, self.said.append)
        self.a, self.b = (self.replica(name, value) for name, value in (("a", 0), ("b", 4)))

    def replica(self, name, value):
        replica = WatchedReplica(FRAGMENT_ENTRIES, name * 8, 1.0, self.ledger)
        self.ledger.born(replica)
        replica.fill(0, np.full(FRAGMENT_ENTRIES, value, dtype=np.float32))
        replica.run = SimpleNamespace(current=None, initiated=[])
        return replica

    def answer(self, share=0.5, *, exchange=1, part=1.0, crosses=False):
        """`b` answers fragment 0 of `a`; returns the delta."""
        self.a.exchanges.add(exchange)
        self.a.run.current = Initiation(
            exchange=exchange, peer=self.b.node, end=1, pull=False, codec="f32"
        )
        own = Initiation(exchange=9, peer=self.a.node, end=1, pull=False, codec="f32")
        own.fragment_sent()
        self.b.run.initiated = [own] if crosses else []
        body, reply = (memoryview(bytearray(4 * FRAGMENT_ENTRIES)) for _ in range(2))
        self.a.write(0, body, Float32())
        self.b.answer(0, body, share, reply, Float32())
        self.ledger.answered(self.b, (self.a.node, exchange, 0), part)
        return reply

    def violations(self):
        self.ledger.check_mass()
        return " ".join(self.said)


def test_an_exchange_that_is_right_is_let_pass():
    exchange = Exchange()
    delta = exchange.answer()
    assert exchange.ledger.in_flight() == 1
    assert exchange.violations() == ""
    exchange.a.apply(0, delta, 0.5, Float32())
    assert exchange.violations() == ""
    assert exchange.a.weights.tolist() == exchange.b.weights.tolist() == [2.0] * FRAGMENT_ENTRIES


def answered_twice(exchange):
    exchange.answer()
    exchange.answer()


def applied_twice(exchange):
    delta = exchange.answer()
    exchange.a.apply(0, delta, 0.5, Float32())
    exchange.a.apply(0, delta, 0.5, Float32())


def unequal_shares(exchange):
    exchange.a.apply(0, exchange.answer(), 0.25, Float32())


def other_bits(exchange):
    delta = exchange.answer()
    delta[0] ^= 1
    exchange.a.apply(0, delta, 0.5, Float32())


def crossed_with_full_steps(exchange):
    exchange.answer(crosses=True)


def an_exchange_left_in_doubt(exchange):
    exchange.answer()
    exchange.ledger.opened(exchange.b, exchange.a.node, 2)


def weights_moved_by_nobody(exchange):
    exchange.a.weights[0] += 0.5


def a_weight_beyond_the_hull(exchange):
    exchange.answer(share=1.5)


def a_weight_that_is_not_finite(exchange):
    exchange.a.weights[0] = np.nan
    exchange.ledger.moved(exchange.a, exchange.a.slice_of(0))


def an_answer_without_a_kept_reply(exchange):
    exchange.answer()
    exchange.b.answered = 0, 0.5, b""
    exchange.answer(exchange=2)


@pytest.mark.parametrize(
    ("violate", "said"),
    [
        (answered_twice, "applied fragment 0 of exchange 1 from aaaaaaaa twice"),
        (applied_twice, "outside any exchange|before an earlier|that nobody answered|twice"),
        (unequal_shares, "do not balance"),
        (other_bits, "another delta"),
        (crossed_with_full_steps, "swap"),
        (an_exchange_left_in_doubt, "in doubt and began another"),
        (weights_moved_by_nobody, "mass moved by 0.5"),
        (a_weight_beyond_the_hull, "left the hull"),
        (a_weight_that_is_not_finite, "not finite"),
        (an_answer_without_a_kept_reply, "kept no reply"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_ledger_sees(violate, said):
    exchange = Exchange()
    violate(exchange)
    assert any(words in exchange.violations() for words in said.split("|")), exchange.said


def test_what_a_training_posts_while_a_delta_is_on_its_way_went_in_as_well():
    exchange = Exchange()
    delta = exchange.answer()
    four, nothing = (np.full(FRAGMENT_ENTRIES, value, dtype=np.float32) for value in (4, 0))
    exchange.a.progress(0, four, nothing)
    exchange.a.apply(0, delta, 0.5, Float32())
    assert exchange.a.weights.tolist() == [6.0] * FRAGMENT_ENTRIES
    assert exchange.said == []
    exchange.b.answer(0, memoryview(exchange.a.weights.tobytes()), 1.2, delta, Float32())
    assert "left the hull" in " ".join(exchange.said), "and no further"


def test_what_a_crash_takes_with_it_is_what_was_in_doubt():
    exchange = Exchange()
    exchange.answer()
    exchange.ledger.gone(exchange.a)
    assert exchange.violations() == ""
    assert exchange.ledger.lost_in_doubt == 1


def test_virtual_time_jumps_to_the_next_deadline_and_no_further():
    async def main(rng):
        began = trio.current_time()
        with trio.move_on_after(3600):
            await trio.sleep_forever()
        return trio.current_time() - began

    assert run_seeded(main, 1) == 3600
