"""Whole nodes over the simulated network: finding, losing, first weights, reasons. Virtual time."""

import contextlib
from random import Random

import numpy as np
import pytest
import trio

from mesh import replica
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.messages import (
    SchemaEntry,
)
from mesh.errors import UsageError
from mesh.net.simulated import SimulatedTransport, Weather
from mesh.node import Node
from mesh.responder import Responder
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until

X = np.arange(6, dtype=np.float32)


def alive_everywhere(mesh):
    names = {f"n{index}" for index in mesh.nodes}
    return all(
        {n for n, state in mesh.states(i).items() if state == "alive"} == names - {f"n{i}"}
        for i in mesh.nodes
    )


@pytest.mark.parametrize("count", [2, 5, 16])
def test_nodes_started_together_all_know_each_other_within_a_second(count):
    async def main(rng):
        async with memory_mesh(rng, count) as mesh:
            await until(lambda: alive_everywhere(mesh), 1.0)

    run_seeded(main, count)


def test_without_discovery_one_given_address_is_enough_for_all_through_peer_exchange():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            mesh.start(1, discovery=False)
            first = [("peer", Address("10.0.0.1", 7710))]
            for index in range(2, 7):
                mesh.start(index, discovery=False, candidates=first)
            await until(lambda: alive_everywhere(mesh), 3.0)

    run_seeded(main, 1)


def test_a_peer_given_by_hand_is_dialled_until_it_is_there_and_the_reason_is_told():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            node = mesh.start(1, discovery=False, candidates=[("peer", Address("10.0.0.2", 7710))])
            await until(lambda: node.statistics().protocol.unreached != ())
            await trio.sleep(300)
            [(address, reason)] = node.statistics().protocol.unreached
            assert (str(address), "refused" in reason) == ("10.0.0.2:7710", True)
            mesh.start(2, discovery=False)
            await until(lambda: alive_everywhere(mesh), 31.0)
            assert node.statistics().protocol.unreached == ()

    run_seeded(main, 2)


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_process_is_dead_everywhere_within_a_second_and_alive_again_after_a_restart(seed):
    async def main(rng):
        async with memory_mesh(rng, 5) as mesh:
            await until(lambda: alive_everywhere(mesh), 2.0)
            before = mesh.nodes[1].statistics().protocol.peers[1].incarnation
            mesh.crash(3)
            await until(lambda: all(mesh.states(i)["n3"] == "dead" for i in mesh.nodes), 1.0)
            mesh.start(3)
            await until(lambda: alive_everywhere(mesh), 3.0)
            [row] = [p for p in mesh.nodes[1].statistics().protocol.peers if p.name == "n3"]
            assert row.incarnation > before

    run_seeded(main, seed)


def test_a_cut_cable_is_a_suspicion_then_a_death_and_heals_by_itself():
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            await until(lambda: alive_everywhere(mesh), 2.0)
            mesh.network.partition(frozenset({node_id(4)}))
            await until(lambda: all(mesh.states(i)["n4"] == "suspect" for i in (1, 2, 3)), 4.0)
            assert all(state == "alive" for name, state in mesh.states(1).items() if name != "n4")
            await until(lambda: all(mesh.states(i)["n4"] == "dead" for i in (1, 2, 3)), 4.0)
            mesh.network.partition()
            await until(lambda: alive_everywhere(mesh), 25.0)

    run_seeded(main, 3)


def test_a_partition_heals_after_hours_where_nobody_knows_any_more_who_was_there():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            mesh.start(1, discovery=False)
            for index in (2, 3):
                hand = [("peer", Address("10.0.0.1", 7710))]
                mesh.start(index, discovery=False, candidates=hand)
            await until(lambda: alive_everywhere(mesh), 3.0)
            await mesh.nodes[1].leave()
            mesh.crash(1)
            mesh.network.partition(frozenset({node_id(2)}), frozenset({node_id(3)}))
            await trio.sleep(4000)
            assert mesh.states(2) == {}
            mesh.network.partition()
            await until(lambda: mesh.states(2) == {"n3": "alive"}, 60.0)

    run_seeded(main, 20)


@pytest.mark.parametrize("count", [2, 3])
def test_a_partition_of_any_length_heals_without_anybody_announcing_itself_again(count):
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            mesh.start(1, discovery=False)
            for index in range(2, count + 1):
                mesh.start(
                    index, discovery=False, candidates=[("cache", Address("10.0.0.1", 7710))]
                )
            await until(lambda: alive_everywhere(mesh), 3.0)
            mesh.network.partition(*[frozenset({node_id(i)}) for i in mesh.nodes])
            await trio.sleep(600)
            assert not alive_everywhere(mesh)
            mesh.network.partition()
            await until(lambda: alive_everywhere(mesh), 60.0)

    run_seeded(main, 20)


def test_a_peer_that_hangs_up_at_once_again_and_again_is_dialled_ever_more_slowly():
    """Two machines with one identity (a copied state directory) replace each other's connection."""

    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await until(lambda: alive_everywhere(mesh), 2.0)
            losses = 0
            for _ in range(600):
                await trio.sleep(0.1)
                if mesh.network.links:
                    losses += 1
                    mesh.network.lose_all()
            assert losses < 60

    run_seeded(main, 21)


def test_an_end_is_told_however_long_the_inbox_was_full():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await until(lambda: alive_everywhere(mesh), 2.0)
            node, gate = mesh.nodes[1], trio.Event()
            next_event = node._next_event

            async def held():
                await gate.wait()
                return await next_event()

            node._next_event = held
            await trio.sleep(2.0)  # the loop is held by now
            with contextlib.suppress(trio.WouldBlock):
                while True:
                    node._inbox.send_nowait(ev.WeightsServed(run="another"))
            mesh.crash(2)
            await trio.sleep(10.0)
            assert node._protocol.peers.contacts.connections
            gate.set()
            await until(lambda: not node._protocol.peers.contacts.connections, 1.0)

    run_seeded(main, 22)


def test_an_address_that_leads_back_here_is_dropped_and_no_twin():
    """docker0's 172.17.0.1, on every machine: by the time it is answered this process is older."""

    async def main(rng):
        async with memory_mesh(rng) as mesh:
            node = mesh.start(1, discovery=False, candidates=[("cache", Address("10.0.0.1", 7710))])
            await trio.sleep(30)
            assert not node._ended
            assert node.statistics().protocol.peers == ()

    run_seeded(main, 22)


def test_a_process_with_a_copied_identity_is_refused_wherever_it_shows_itself():
    async def main(rng):
        for shows_to in ("a third", "the first"):
            async with memory_mesh(rng) as mesh:
                first, onlooker = mesh.start(1), mesh.start(2)
                await until(lambda: alive_everywhere(mesh), 5.0)
                at = Address("10.0.0.2" if shows_to == "a third" else "10.0.0.1", 7710)
                copy = Node(
                    node=first.id,
                    name="copy",
                    incarnation=first._protocol.own.incarnation + 1024,
                    transport=SimulatedTransport(
                        mesh.network, first.id, Address("10.0.0.77", 7710)
                    ),
                    discovery=None,
                    candidates=(("peer", at),),
                    rng=Random(9),
                    store_incarnation=lambda _: None,
                    note=lambda _: None,
                )
                with pytest.RaisesGroup(
                    pytest.RaisesExc(UsageError, match="state directory was copied")
                ):
                    await copy.run()
                await trio.sleep(2)
                assert not first._ended
                assert mesh.states(2) == {"n1": "alive"}
                [row] = onlooker.statistics().protocol.peers
                assert [str(a) for a in row.addresses] == ["10.0.0.1:7710"]

    run_seeded(main, 23)


def test_a_node_that_lost_its_incarnation_exchanges_again_once_it_heard_of_the_old_one():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            mesh._incarnation = 200_000_000
            players = []
            for index in (1, 2):
                mesh.start(index)
                players.append(await mesh.attach(index, np.full(6, index)))
            first, second = players

            async def exchange(seconds):
                for _ in range(seconds):
                    for player in players:
                        await player.post(0.1, waits=True)
                    await trio.sleep(1)

            await until(lambda: first.begun and second.begun)
            await exchange(10)
            mesh.crash(2)
            await trio.sleep(5)
            mesh._incarnation = -9999
            mesh.start(2)
            second.lost()
            await second.attach(mesh.nodes[2])
            await exchange(20)
            return second.run.counters

    counters = run_seeded(main, 3)
    assert counters.completed > 5
    assert counters.failed == 0


def test_a_node_that_leaves_is_looked_for_by_nobody():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await until(lambda: alive_everywhere(mesh), 2.0)
            await mesh.nodes[2].leave()
            mesh.crash(2)
            await until(lambda: all(mesh.states(i)["n2"] == "left" for i in (1, 3)), 1.0)
            await trio.sleep(60)
            assert all(mesh.states(i)["n2"] == "left" for i in (1, 3))
            [row] = [p for p in mesh.nodes[1].statistics().protocol.peers if p.name == "n2"]
            assert row.reason == ""
            mesh.start(2)
            await until(lambda: alive_everywhere(mesh), 2.0)
            for index in (1, 3):
                told = [
                    e.text.split(") ")[1]
                    for e in mesh.nodes[index].journal.events(0, 100)
                    if e.node == node_id(2)
                ]
                assert told == ["is alive", "left", "is alive again"]

    run_seeded(main, 4)


def test_a_member_that_died_with_all_who_were_connected_to_it_is_called_dead_by_the_others():
    """Found by `mesh sim --seed 2016 --nodes 8 --seconds 20`."""

    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            mesh.network.cut(node_id(2), node_id(3))
            mesh.network.cut(node_id(3), node_id(2))
            await until(lambda: "n3" in mesh.states(1) and "n3" in mesh.states(2), 5.0)
            mesh.network.heal()
            mesh.crash(3)
            mesh.crash(1)
            mesh.start(1)
            await until(lambda: mesh.states(1).get("n2") == "alive", 30.0)
            await until(lambda: all(mesh.states(i).get("n3") == "dead" for i in (1, 2)), 120.0)

    run_seeded(main, 5)


# ---------------------------------------------------------------------------------- first weights


@pytest.mark.parametrize("seed", range(10))
def test_nodes_that_start_together_begin_with_the_weights_of_the_lowest_node_id(seed):
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            players = {}
            for index in rng.sample(range(1, 5), 4):
                await trio.sleep(rng.uniform(0, 0.2))
                players[index] = await mesh.attach(index, X + 100 * index)
            await until(lambda: all(p.begun for p in players.values()), 5.0)
            assert players[1].begun == "first"
            for player in players.values():
                assert np.array_equal(player.x, X + 100)

    run_seeded(main, seed)


def test_a_node_that_finds_nobody_begins_alone_after_sync_timeout():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            began = trio.current_time()
            player = await mesh.attach(1, X, sync_timeout_s=2.0)
            await until(lambda: player.begun)
            assert player.begun == "alone"
            assert 2.0 <= trio.current_time() - began < 2.2

    run_seeded(main, 5)


@pytest.mark.parametrize(("late", "early"), [(1, 2), (2, 1)])
def test_a_newcomer_takes_the_weights_of_whoever_trains_already_whatever_its_id(late, early):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            first = await mesh.attach(early, X)
            await until(lambda: first.begun)
            await first.post(5.0)
            second = await mesh.attach(late, X * 0 - 1e8)
            await until(lambda: second.begun, 1.0)
            assert second.begun == "donor"
            assert np.array_equal(second.x, X + 5), "exactly, though its own were 1e8 away"
            assert np.array_equal(first.weights, X + 5), "the donor is untouched"

    run_seeded(main, 6)


def test_two_groups_that_trained_apart_average_when_they_meet():
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            groups = frozenset({node_id(1), node_id(2)}), frozenset({node_id(3), node_id(4)})
            mesh.network.partition(*groups)
            await trio.sleep(20)
            players = [await mesh.attach(i, X + (100 if i > 2 else 0)) for i in range(1, 5)]
            await until(lambda: all(p.begun for p in players), 10.0)
            await until(lambda: all(p.node.exchanged(p.run) for p in players), 10.0)
            mesh.network.partition()
            await until(lambda: np.ptp([p.weights[0] for p in players]) < 1e-3, 120.0)
            assert np.allclose(players[0].weights, X + 50, atol=0.01)

    run_seeded(main, 7)


def test_a_restarted_training_takes_the_mesh_as_its_donor():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            players = [await mesh.attach(i, X) for i in (1, 2, 3)]
            await until(lambda: all(p.begun for p in players), 5.0)
            await mesh.nodes[1].detach(players[0].run)
            await players[1].post(3.0)
            await trio.sleep(5)
            again = await mesh.attach(1, X - 1000)
            await until(lambda: again.begun == "donor", 2.0)
            assert abs(again.x[0] - players[1].weights[0]) < 1e-3

    run_seeded(main, 8)


@pytest.mark.parametrize(("far", "near"), [(1, 2), (2, 1)])
def test_of_two_that_trained_alone_the_one_that_came_further_gives(far, near):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            mesh.network.partition(frozenset({node_id(1)}), frozenset({node_id(2)}))
            await trio.sleep(20)
            players = {i: await mesh.attach(i, X, sync_timeout_s=0.1) for i in (1, 2)}
            await until(lambda: all(p.begun == "alone" for p in players.values()))
            for index, posts in ((far, 100), (near, 3)):
                for _ in range(posts):
                    await players[index].run.offer()
                    await players[index].post(1.0)
                    await trio.sleep(0.01)
            mesh.network.partition()
            await until(lambda: all(p.node.exchanged(p.run) for p in players.values()), 60)
            assert np.array_equal(players[near].weights, X + 100)
            assert np.array_equal(players[far].weights, X + 100)

    run_seeded(main, 16)


@pytest.mark.parametrize("seed", range(6))
def test_a_donor_that_refuses_once_is_asked_again_and_no_newcomer_gives_its_first_draw(
    seed, monkeypatch
):
    refused = set()
    objection = Responder._objection

    def refuse_once(self, peer, message):
        first = peer not in refused
        refused.add(peer)
        return "not now" if first else objection(self, peer, message)

    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            donor = await mesh.attach(3, X)
            await until(lambda: donor.begun == "alone")
            await donor.post(1000.0)
            monkeypatch.setattr(Responder, "_objection", refuse_once)
            newcomers = [await mesh.attach(i, X * 0) for i in (1, 2)]
            await until(lambda: all(p.begun for p in newcomers), 10)
            assert [p.begun for p in newcomers] == ["donor", "donor"]
            assert np.array_equal(donor.weights, X + 1000)

    run_seeded(main, seed)


def test_a_donor_that_dies_half_way_leaves_no_half_of_its_model(monkeypatch):
    monkeypatch.setattr(replica, "FRAGMENT_ENTRIES", 4096)
    large = np.ones(20 * 4096, dtype=np.float32)

    async def main(rng):
        weather = Weather(bytes_per_s=100e3)
        async with memory_mesh(rng, 2, weather) as mesh:
            mesh.network.partition(frozenset({node_id(1)}), frozenset({node_id(2)}))
            await trio.sleep(20)
            giver = await mesh.attach(1, large, sync_timeout_s=0.1)
            taker = await mesh.attach(2, -large, sync_timeout_s=0.1)
            await until(lambda: giver.begun and taker.begun)
            for _ in range(10):
                await giver.run.offer()
                await giver.post()
                await trio.sleep(0.01)
            mesh.network.partition()
            await until(lambda: taker.run.current is not None and taker.run.current.applied > 5, 60)
            mesh.crash(1)
            await until(lambda: taker.run.current is None, 60)
            await taker.run.offer()
            await taker.post()
            assert set(np.unique(taker.weights)) == {-1.0}

    run_seeded(main, 18)


@pytest.mark.parametrize("seed", range(8))
def test_a_training_that_attaches_again_at_once_never_mixes_its_first_draw_into_the_mesh(seed):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            a, b = await mesh.attach(1, X), await mesh.attach(2, X)
            await until(lambda: a.begun and b.begun)
            await until(lambda: a.node.exchanged(a.run) and b.node.exchanged(b.run))
            await trio.sleep(rng.random())
            await a.run.offer()
            await a.post(waits=True)
            await mesh.nodes[1].detach(a.run)
            again = await mesh.attach(1, X + 1e6)
            await until(lambda: again.begun)
            await trio.sleep(5)
            assert again.begun == "donor"
            assert abs(b.weights - X).max() < 1e-3

    run_seeded(main, seed)


def test_one_peer_on_a_bad_line_does_not_keep_the_others_waiting():
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            players = [await mesh.attach(i, X) for i in range(1, 5)]
            await until(lambda: all(p.begun for p in players), 5.0)
            await until(lambda: all(p.node.exchanged(p.run) for p in players), 5.0)
            mesh.network.partition(frozenset({node_id(4)}))  # cut, and not dead for 5 s yet
            before = [p.run.counters.completed for p in players]
            for _ in range(300):
                for player in players[:3]:
                    await player.run.offer()
                    await player.post()
                await trio.sleep(0.2)
            for player, done in zip(players[:3], before, strict=False):
                assert player.run.counters.completed - done > 100

    run_seeded(main, 19)


# ------------------------------------------------------------------------------------- averaging


@pytest.mark.parametrize(("count", "bound"), [(2, 6), (4, 60), (8, 100)])
def test_random_vectors_reach_consensus_at_the_speed_of_theory(count, bound):
    """Rounds of n/2 exchanges until the spread is 1e-6: Boyd et al.; crossed requests included."""

    async def main(rng):
        async with memory_mesh(rng, count) as mesh:
            players = [await mesh.attach(i, X) for i in range(1, count + 1)]
            await until(lambda: all(p.begun for p in players), 5.0)
            await until(lambda: all(p.node.exchanged(p.run) for p in players), 5.0)
            values = [rng.gauss(0, 1) for _ in players]
            for player, value in zip(players, values, strict=True):
                player.run.replica.weights += np.float32(value)
            mean = np.mean([p.weights.astype(np.float64) for p in players], axis=0)
            done = sum(p.run.counters.completed for p in players)
            while np.ptp([p.weights[0] for p in players]) > 2e-5:
                for player in players:
                    await player.run.offer()
                    await player.post(waits=True)
                await trio.sleep(0.05)
            rounds = (sum(p.run.counters.completed for p in players) - done) / (count / 2)
            assert np.allclose([p.weights for p in players], mean, atol=1e-4)
            return rounds

    assert np.median([run_seeded(main, seed) for seed in range(5)]) <= bound


def test_a_weighted_average_counts_each_node_by_its_samples():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            a = await mesh.attach(1, X, weight=3.0)
            b = await mesh.attach(2, X, weight=1.0)
            await until(lambda: a.begun and b.begun, 5.0)
            await until(lambda: a.node.exchanged(a.run) and b.node.exchanged(b.run))
            a.run.replica.weights += 8
            await a.post()
            await until(lambda: abs(a.weights[0] - b.weights[0]) < 1e-5)
            assert np.allclose(a.weights, X + 6)

    run_seeded(main, 9)


def test_a_run_at_rest_goes_on_until_its_replicas_agree_and_then_stays_quiet():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            players = [await mesh.attach(i, X) for i in (1, 2, 3)]
            await until(lambda: all(p.begun for p in players), 5.0)
            await until(lambda: all(p.node.exchanged(p.run) for p in players), 5.0)
            players[0].run.replica.weights += 9
            await until(lambda: np.ptp([p.weights[0] for p in players]) < 1e-4, 60.0)
            assert np.allclose(players[2].weights, X + 3, atol=1e-3)
            await trio.sleep(60)
            before = sum(p.run.counters.completed for p in players)
            await trio.sleep(60)
            assert sum(p.run.counters.completed for p in players) - before <= 3 * 7

    run_seeded(main, 10)


def test_the_drift_that_is_shown_is_the_rms_distance_of_the_replicas_to_their_mean():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            a, b = await mesh.attach(1, X), await mesh.attach(2, X)
            await until(lambda: a.begun and b.begun, 5.0)
            await until(lambda: a.node.exchanged(a.run) and b.node.exchanged(b.run))
            a.run.distances.clear()
            b.run.replica.weights += 2
            true = np.sqrt(2 * len(X) * 1.0**2 / 2)
            await a.post()
            await until(lambda: a.run.distances)
            [run] = a.node.statistics().runs
            assert run.drift == pytest.approx(true)

    run_seeded(main, 11)


# --------------------------------------------------------------------------------------- reasons


def test_another_schema_is_listed_with_the_layer_that_differs():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            a = await mesh.attach(1, X, shape=(2, 3))
            b = await mesh.attach(2, X, shape=(3, 2))
            await until(lambda: a.begun and b.begun, 10.0)
            [peer] = mesh.nodes[1].statistics().protocol.peers
            assert (peer.state, peer.reason) == (
                "incompatible",
                "schema differs: layer w 2x3 here, 3x2 there",
            )
            assert a.run.counters.completed == b.run.counters.completed == 0

    run_seeded(main, 12)


def test_another_run_is_listed_with_both_names():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            a = await mesh.attach(1, X, run="digits")
            b = await mesh.attach(2, X, run="names")
            await until(lambda: a.begun and b.begun, 10.0)
            [peer] = mesh.nodes[1].statistics().protocol.peers
            assert (peer.state, peer.reason) == (
                "incompatible",
                "other run: digits here, names there",
            )

    run_seeded(main, 13)


def test_a_node_that_trains_nothing_is_no_stranger():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            player = await mesh.attach(1, X)
            await until(lambda: player.begun, 10.0)
            assert mesh.states(1) == {"n2": "alive"}

    run_seeded(main, 14)


def test_two_trainings_of_one_run_on_one_node_are_refused():
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            await mesh.attach(1, X)
            with pytest.raises(UsageError, match="being trained on this node already"):
                await mesh.attach(1, X)

    run_seeded(main, 15)


def test_long_schemas_are_compared_page_by_page():
    from mesh.core.schema import Schemas, digest

    here = tuple(SchemaEntry(name=f"l{k}", shape=(k + 1,), dtype="float32") for k in range(950))
    there = (*here[:777], SchemaEntry(name="l777", shape=(9,), dtype="float32"), *here[778:])
    ours, theirs, pages = Schemas(), Schemas(), 0
    ours.attach("r", here)
    theirs.attach("r", there)
    request = ours.ask(node_id(2), "r", digest(there))
    while request is not None:
        pages += 1
        request = ours.compare(node_id(2), digest(there), theirs.answer(request))
    assert ours.reason(node_id(2), "r", digest(there)) == (
        "schema differs: layer l777 778 here, 9 there"
    )
    assert pages == 8
