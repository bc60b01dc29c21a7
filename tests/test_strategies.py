"""Strategies: each against its theory, on plain numbers where that is enough, and on the deployed nodes
over the in-memory network, in virtual time.
"""

import contextlib
from dataclasses import replace
from math import log2, sqrt
from random import Random

import numpy as np
import pytest
import trio

from mesh import replica as replicas
from mesh.codec import Float32
from mesh.core.exchange import share
from mesh.core.guard import ENOUGH, MULTIPLE, Guard, room, too_long
from mesh.core.matchings import matchings
from mesh.core.messages import Turn
from mesh.core.strategies import (
    CYCLIC_PARTS,
    JUMP_LIMIT,
    STRATEGIES,
    ExactRounds,
    RandomPairs,
    check_strategy,
    part_of,
    usual_every,
)
from mesh.errors import UsageError
from mesh.outer import OuterMomentum
from mesh.player import Player
from mesh.replica import Replica
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until

# ------------------------------------------------------------------------------ the Base-2 graph


def rounds_in_theory(n):
    """Takezawa et al. 2023: log2 p + 2 floor(log2 q) + 1 for n = p q with q odd and above 1."""
    p = n & -n
    q = n // p
    return int(log2(p)) + (2 * int(log2(q)) + 1 if q > 1 else 0)


@pytest.mark.parametrize("n", [*range(1, 34), 48, 100, 129, 200])
def test_the_base_2_graph_brings_any_number_of_nodes_to_their_exact_mean(n):
    x = np.random.default_rng(n).standard_normal(n)
    mean = x.mean()
    for pairs in matchings(n):
        places = [place for pair in pairs for place in (pair.a, pair.b)]
        assert len(set(places)) == len(places), "one partner a round"
        for a, b, step in pairs:
            x[a], x[b] = x[a] + step * (x[b] - x[a]), x[b] + step * (x[a] - x[b])
    assert np.abs(x - mean).max() < 1e-12
    assert len(matchings(n)) == rounds_in_theory(n)


def test_its_rounds_are_as_many_as_the_paper_says():
    known = {3: 3, 5: 5, 6: 4, 7: 5, 12: 5, 16: 4, 25: 9, 100: 11, 200: 12}
    assert {n: len(matchings(n)) for n in known} == known


# --------------------------------------------------------------------------------- random pairs


def pair_up(x, plans, rng):
    """One exchange that a random node begins with whom its plan chooses."""
    i = rng.randrange(len(x))
    start = plans[i].choose([j for j in range(len(x)) if j != i], rest=False, now=0.0)
    j, entries = start.peer, x.shape[1]
    first, end = (0, 1) if start.part is None else part_of(CYCLIC_PARTS, start.part)
    unit = entries if start.part is None else entries // CYCLIC_PARTS
    part = slice(first * unit, end * unit)
    x[i, part] = x[j, part] = (x[i, part] + x[j, part]) / 2
    plans[i].ended(completed=True, ahead=None)


def variance(x):
    return float(((x - x.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize("n", [4, 16, 64])
def test_an_exchange_of_a_random_pair_contracts_the_variance_as_in_theory(n):
    rng, factors = Random(n), []
    for trial in range(1500):
        x = np.random.default_rng(trial).standard_normal((n, 8))
        before = variance(x)
        pair_up(x, [RandomPairs(rng)] * n, rng)
        factors.append(variance(x) / before)
    assert np.mean(factors) == pytest.approx(1 - 1 / (n - 1), rel=0.02)


@pytest.mark.parametrize("n", [4, 8, 16, 32, 128])
def test_a_round_of_disjoint_random_pairs_contracts_the_variance_as_in_theory(n):
    """(n - 2) / (2 (n - 1)), by what a responder and an initiator do to their replicas in one exchange."""
    rng, factors = np.random.default_rng(n), []
    codec, reply, request = Float32(), *(memoryview(bytearray(4 * 64)) for _ in range(2))
    nodes = [Replica(64) for _ in range(n)]
    for _ in range(1000 // n + 20):
        x = rng.standard_normal((n, 64)).astype(np.float32)
        for node, values in zip(nodes, x, strict=True):
            node.weights[:] = values
        for i, j in rng.permutation(n).reshape(-1, 2):
            nodes[i].write(0, request, codec)
            nodes[j].answer(0, request, share(1.0, 1.0), reply, codec)
            nodes[i].apply(0, reply, share(1.0, 1.0), codec)
        after = np.stack([node.weights for node in nodes])
        np.testing.assert_allclose(after.mean(axis=0), x.mean(axis=0), atol=1e-5)
        factors.append(variance(after.astype(np.float64)) / variance(x.astype(np.float64)))
    assert np.mean(factors) == pytest.approx((n - 2) / (2 * (n - 1)), rel=0.02)


@pytest.mark.parametrize(
    ("n", "rounds"), [(4, 23), (8, 38), (16, 49), (32, 52), (64, 53), (128, 55)]
)
def test_consensus_takes_the_rounds_that_were_foretold(n, rounds):
    needed = []
    for trial in range(7):
        rng = Random(1000 * n + trial)
        x = np.random.default_rng(trial).standard_normal((n, 64))
        first, count = sqrt(variance(x)), 0
        while sqrt(variance(x)) > 1e-6 * first:
            for _ in range(n // 2):
                pair_up(x, [RandomPairs(rng)] * n, rng)
            count += 1
        needed.append(count)
    assert np.median(needed) == pytest.approx(rounds, rel=0.15)


def test_parts_in_turn_mix_as_well_per_byte_as_the_whole_at_once():
    n, entries, factors = 16, 8 * CYCLIC_PARTS, {}
    for name, cyclic in (("pair", False), ("cyclic", True)):
        rng, x = Random(3), np.random.default_rng(3).standard_normal((n, entries))
        plans = [RandomPairs(rng, cyclic=cyclic) for _ in range(n)]
        first = variance(x)
        for _ in range(10 * n * (CYCLIC_PARTS if cyclic else 1)):
            pair_up(x, plans, rng)
        factors[name] = np.log(variance(x) / first)
    assert factors["cyclic"] == pytest.approx(factors["pair"], rel=0.15)


def test_the_parts_of_a_cycle_are_the_whole_model_once():
    for fragments in (1, 3, 8, 20, 401):
        parts = min(CYCLIC_PARTS, fragments)
        covered = [k for part in range(parts) for k in range(*part_of(fragments, part))]
        assert covered == list(range(fragments))
        assert part_of(fragments, parts) == part_of(fragments, 0)


# ----------------------------------------------------------------------------- deployed nodes


@contextlib.asynccontextmanager
async def replicas_apart(rng, values, strategy, *, weather=None, posts=True):
    """Nodes 1, 2, ... that met before, and hold these values (arrays) now."""
    async with memory_mesh(rng, len(values), weather) as mesh:
        players = []
        for index, value in enumerate(values, 1):
            player = Player(np.array(value, dtype=np.float32), strategy=strategy)
            player.began, player._met = "again", True
            await player.attach(mesh.nodes[index])
            players.append(player)
        count = len(values) - 1
        await until(lambda: all(p.run.partners() == count for p in players))
        await until(lambda: not any(p.run.ours for p in players))
        if posts:
            for player in players:
                await player.post()
        yield mesh, players


async def hand_over(player, progress=0.0, *, waits=False):
    """One boundary of a training, whoever has the buffers."""
    await player.run.offer()
    await player.post(progress, waits=waits)


def apart(players):
    stacked = np.stack([p.weights for p in players]).astype(np.float64)
    return float(np.abs(stacked - stacked.mean(axis=0)).max())


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7])
def test_exact_rounds_of_real_nodes_end_at_the_mean(count):
    values = np.random.default_rng(count).standard_normal((count, 50))

    async def main(rng):
        async with replicas_apart(rng, values, "exact") as (_, players):
            rounds = len(matchings(count))

            def position(player):
                schedule = player.node._protocol._averaging._runs["toy"]
                return schedule._plan.position

            await until(lambda: all(position(p) >= rounds for p in players), 20)
            assert apart(players) < 2e-6
            mean = np.mean([p.weights for p in players], axis=0)
            assert np.abs(mean - values.mean(axis=0)).max() < 1e-6
            begun = sum(p.run.counters.completed for p in players)
            at_most = max(position(p) for p in players) // rounds + 1
            assert begun <= at_most * sum(map(len, matchings(count)))

    run_seeded(main, count)


def test_exact_rounds_begin_anew_when_somebody_leaves_or_comes():
    values = np.random.default_rng(1).standard_normal((5, 20))

    async def main(rng):
        async with replicas_apart(rng, values, "exact") as (mesh, players):
            mesh.crash(3)
            left = [p for k, p in enumerate(players) if k != 2]
            for player in left:
                await hand_over(player, float(player.node.name[-1]))
            await until(lambda: apart(left) < 2e-5, 60)
            node = mesh.start(6)
            newcomer = Player(np.zeros(20, dtype=np.float32), strategy="exact")
            await newcomer.attach(node)
            await until(lambda: newcomer.begun == "donor", 60)
            await hand_over(newcomer, 3.0)
            everybody = [*left, newcomer]
            await until(lambda: all(p.run.partners() == 4 for p in everybody))
            await until(lambda: np.ptp(newcomer.weights - left[0].weights) < 2e-5, 60)
            await until(lambda: apart(everybody) < 2e-5, 60)

    run_seeded(main, 5)


@pytest.mark.parametrize("seed", range(6, 10))
def test_exact_rounds_go_on_over_broken_connections(seed):
    values = np.random.default_rng(2).standard_normal((6, 20))

    async def main(rng):
        async with replicas_apart(rng, values, "exact") as (mesh, players):
            for _ in range(30):
                await trio.sleep(rng.uniform(0.001, 0.05))
                await hand_over(rng.choice(players))
                mesh.network.lose(node_id(rng.randrange(1, 7)))
            await until(lambda: apart(players) < 1e-5, 60)
            mean = np.mean([p.weights for p in players], axis=0)
            assert np.abs(mean - values.mean(axis=0)).max() < 1e-5

    run_seeded(main, seed)


def test_nodes_that_wait_for_each_other_in_a_ring_find_out_and_go_on():
    values = np.random.default_rng(2).standard_normal((8, 20))

    async def main(rng):
        async with replicas_apart(rng, values, "exact") as (_, players):
            plans = [p.node._protocol._averaging._runs["toy"]._plan for p in players]
            for player in players:
                await hand_over(player)
            # Some saw a node come and go between two rounds, and began anew: each waits to be asked
            # by one that is further, or asks one that has not come so far.
            for plan, position in zip(plans, (3, 2, 1, 2, 3, 1, 2, 0), strict=True):
                plan.position, plan._begun = position, True
            for player in players:
                await hand_over(player)
            await until(lambda: min(plan.position for plan in plans) >= 6, 20)
            await until(lambda: apart(players) < 1e-5, 20)

    run_seeded(main, 1)


def test_at_rest_nobody_sends_weights_to_be_told_that_it_is_not_time_yet():
    values = np.random.default_rng(2).standard_normal((2, 5000))

    async def main(rng):
        async with replicas_apart(rng, values, "exact") as (_, players):
            await trio.sleep(30)

            def figures():
                counts = [(c.completed, c.refused, c.bytes_sent) for c in counters]
                return np.sum(counts, axis=0)

            counters = [player.run.counters for player in players]
            before = figures()
            await trio.sleep(300)
            completed, refused, sent = figures() - before
            assert refused > completed > 0, "the one that waits looks where the other is"
            assert sent < 1.05 * 2 * completed * 4 * 5000

    run_seeded(main, 1)


def test_an_exchange_that_goes_on_later_counts_for_its_own_place_in_the_rounds():
    nodes = [node_id(k) for k in range(1, 4)]
    plan = ExactRounds(nodes[0])
    plan.see(nodes[1:])
    old = plan.choose(nodes[1:], rest=False, now=0.0).turn
    plan.ended(completed=False, ahead=None, turn=old)  # broke off
    plan.see(nodes[1:2])
    new = plan.choose(nodes[1:2], rest=False, now=0.0).turn
    plan.ended(completed=False, ahead=None, turn=new)
    plan.ended(completed=True, ahead=None, turn=old)  # resumed
    assert plan.position == 0, "a round that was not made"
    plan.ended(completed=True, ahead=None, turn=new)
    assert plan.position == 1


def test_a_place_in_the_rounds_is_agreed_on():
    nodes = [node_id(k) for k in range(1, 5)]
    plans = {me: ExactRounds(me) for me in nodes}
    for me, plan in plans.items():
        plan.see([n for n in nodes if n != me])
    a, b = nodes[0], nodes[1]
    start = plans[a].choose(nodes[1:], rest=False, now=0.0)
    assert start.peer == b
    assert plans[b].objection(a, start.turn) is None
    wrong = Turn(view=start.turn.view, position=1, step=0.5)
    assert "another place" in plans[b].objection(a, wrong)
    assert "another place" in plans[b].objection(nodes[2], start.turn)
    other = Turn(view="0" * 16, position=0, step=0.5)
    assert "another view" in plans[b].objection(a, other)
    assert "another view" in plans[b].objection(a, None)
    plans[a].ended(completed=True, ahead=None, turn=start.turn)
    plans[b].answered(start.turn)
    plans[b].answered(start.turn)  # a reply that went out twice counts once
    assert plans[a].position == plans[b].position == 1


def test_who_fell_behind_in_the_rounds_catches_up():
    nodes = [node_id(k) for k in range(1, 3)]
    plan = ExactRounds(nodes[0])
    plan.see(nodes[1:])
    plan.choose(nodes[1:], rest=False, now=0.0)
    plan.ended(completed=False, ahead=7)
    assert plan.position == 7
    other = ExactRounds(nodes[1])
    other.see(nodes[:1])
    assert other.objection(nodes[0], plan.choose(nodes[1:], rest=False, now=0.0).turn) is None
    assert other.position == 7


def test_nobody_is_pushed_beyond_all_places_in_the_rounds():
    nodes = [node_id(k) for k in range(1, 3)]
    plan = ExactRounds(nodes[1])
    plan.see(nodes[:1])
    turn = replace(plan_of_first(nodes).turn, position=JUMP_LIMIT + 1)
    assert plan.objection(nodes[0], turn) is not None
    plan.ended(completed=False, ahead=JUMP_LIMIT + 1)
    assert plan.position == 0
    plan.ended(completed=False, ahead=JUMP_LIMIT)
    assert plan.position == JUMP_LIMIT


def plan_of_first(nodes):
    """What the lowest id asks the others first."""
    plan = ExactRounds(nodes[0])
    plan.see(nodes[1:])
    return plan.choose(nodes[1:], rest=False, now=0.0)


def test_who_is_asked_by_one_that_passed_a_round_with_it_jumps_to_it():
    nodes = [node_id(k) for k in range(1, 7)]
    fresh, old = ExactRounds(nodes[3]), ExactRounds(nodes[1])
    for plan, me in ((fresh, nodes[3]), (old, nodes[1])):
        plan.see([n for n in nodes if n != me])
    old.position = 2
    turn = old.choose(nodes, rest=False, now=0.0).turn
    assert turn.position == 2
    assert fresh.objection(nodes[1], turn) is None, (
        "they met in round 0, which `fresh` knows not of"
    )
    assert fresh.position == 2


def test_cyclic_exchanges_bring_an_eighth_of_the_bytes_each():
    values = np.random.default_rng(4).standard_normal((2, 8000))

    async def main(rng):
        async with replicas_apart(rng, values, "cyclic", posts=False) as (_, players):
            a, b = (player.run.counters for player in players)
            for count in range(1, CYCLIC_PARTS + 1):
                await hand_over(players[0])
                await until(lambda k=count: a.completed == k, 1)
                assert a.bytes_sent < count * (4 * 8000 / CYCLIC_PARTS + 500)
            assert b.answered == CYCLIC_PARTS
            assert apart(players) < 1e-6
            await until(lambda: a.completed > 2 * CYCLIC_PARTS, 30)  # they settle at rest as well

    run_seeded(main, 4)


# ---------------------------------------------------------------------------------------- outer


def test_an_outer_step_is_the_equation_of_noloco():
    rng = np.random.default_rng(1)
    replica = Replica(10)
    replica.weights[:] = phi = rng.standard_normal(10).astype(np.float32)
    outer = OuterMomentum(replica)
    outer.begin(0)
    m = np.zeros(10)
    phi = phi.astype(np.float64)
    for _ in range(5):
        theta = phi + rng.standard_normal(10)
        other = phi + rng.standard_normal(10)
        replica.weights[:] = (theta + other) / 2
        outer.step(0)
        m = 0.5 * m + 0.7 * ((theta + other) / 2 - phi)
        phi = phi + m
        assert np.allclose(replica.weights, phi, atol=1e-5)
        assert np.allclose(outer.momentum, m, atol=1e-5)


def test_outer_steps_contract_no_faster_than_the_root_of_beta():
    n, rng = 32, Random(2)
    nodes = [Replica(200) for _ in range(n)]
    chance = np.random.default_rng(2)
    outers = []
    for node in nodes:
        node.weights[:] = chance.standard_normal(200)
        outers.append(OuterMomentum(node))
        outers[-1].begin(0)
    spreads = []
    for _ in range(40):
        order = rng.sample(range(n), n)
        for i, j in zip(order[::2], order[1::2], strict=True):
            mean = (nodes[i].weights + nodes[j].weights) / 2
            for k in (i, j):
                nodes[k].weights[:] = mean
                outers[k].step(0)
        spreads.append(sqrt(variance(np.stack([node.weights for node in nodes]))))
    rate = (spreads[-1] / spreads[4]) ** (1 / 35)
    assert 0.97 * sqrt(0.5) < rate < 1.0


def test_outer_nodes_learn_together_and_agree():
    target = np.random.default_rng(3).standard_normal(30).astype(np.float32)

    async def main(rng):
        async with replicas_apart(rng, np.zeros((4, 30)), "outer", posts=False) as (_, players):
            for _ in range(60):
                for player in players:
                    await hand_over(player, np.float32(0.3) * (target - player.x))
                await trio.sleep(0.05)
            assert all(np.any(p.run.outer.momentum) for p in players)
            far = max(np.abs(p.weights - target).max() for p in players)
            assert far < 0.05 * np.abs(target).max()

    run_seeded(main, 3)


# ------------------------------------------------------------------------------- guard and clip


def learned_together(*, restarts):
    """The weights of two nodes after six outer steps each; the first training may restart after three,
    with what its checkpoint would hold."""

    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            players = [
                Player(np.full(4, float(k), dtype=np.float32), strategy="outer", keeps=True)
                for k in range(2)
            ]
            for index, player in enumerate(players, 1):
                await player.attach(mesh.nodes[index])
            await until(lambda: all(p.begun and p.run.partners() for p in players))
            for turn in range(6):
                if restarts and turn == 3:
                    players[0] = await restarted(players[0])
                for player, toward in zip(players, (1.0, -2.0), strict=True):
                    await newer_offer(player)
                    await hand_over(player, 0.1 * (toward - player.offered), waits=True)
                    await until(lambda p=player: not p.run.ours and p.run.current is None)
            return np.stack([p.weights for p in players])

    async def newer_offer(player):
        """The other's exchange came after the offer in hand."""
        player.run.take_back()
        await player.run.offer()

    async def restarted(old):
        await newer_offer(old)
        new = Player(old.offered.copy(), strategy="outer", keeps=True)
        new.kept[:] = old.kept
        new.resumes, new.began, new._met = True, "first", True
        await old.node.detach(old.run)
        await new.attach(old.node)
        await until(lambda: new.begun and new.run.partners())
        return new

    return run_seeded(main, 3)


def test_an_outer_training_that_resumes_goes_on_as_if_it_had_not_stopped():
    whole = learned_together(restarts=False)
    np.testing.assert_allclose(learned_together(restarts=True), whole, atol=1e-6)


def test_the_guard_reaches_ten_times_the_usual_distance():
    guard = Guard()
    for _ in range(ENOUGH - 1):
        guard.heard(4.0)
    assert guard.reach(0.0, 0.0) is None
    guard.heard(4.0)
    assert guard.reach(0.0, 0.0) == MULTIPLE * 2
    assert guard.reach(5.0, 0.0) == MULTIPLE * 5, "one that moves faster by itself"
    assert guard.reach(0.0, 1e6) == 1e4, "some part of the norm is always allowed"
    for _ in range(2 * ENOUGH):
        guard.heard(0.0)
    assert guard.reach(0.0, 0.0) is None, "a reach of 0 would never end"


def test_a_clipped_exchange_stays_within_the_smaller_reach_and_keeps_the_mass():
    i, j = Replica(100, 10), Replica(100, 10)
    i.weights[:] = 1.0
    j.weights[:] = -1000.0
    before, used, codec = i.weights + j.weights, 0.0, Float32()
    first = [i.weights.copy(), j.weights.copy()]
    for index in range(10):
        body, reply = memoryview(bytearray(40)), memoryview(bytearray(40))
        i.write(index, body, codec)
        used += j.answer(index, body, 0.5, reply, codec, room(50.0, 20.0, used))
        i.apply(index, reply, 0.5, codec)
    assert np.allclose(i.weights + j.weights, before)
    for replica, was in zip((i, j), first, strict=True):
        assert np.linalg.norm(replica.weights - was) == pytest.approx(10.0, rel=1e-5)
    assert used == pytest.approx(400.0)


def test_a_delta_beyond_the_reach_that_was_asked_for_is_refused():
    assert not too_long(None, 1e30)
    assert not too_long(2.0, 4.0)
    assert too_long(2.0, 4.5)


def test_a_flipped_neighbour_moves_nobody_far_and_a_healthy_mesh_is_never_clipped(monkeypatch):
    clipped = []
    answer = Replica.answer

    def watched(self, index, body, share, reply, codec, room=np.inf):
        square = answer(self, index, body, share, reply, codec, room)
        clipped.append(square == room)
        return square

    monkeypatch.setattr(replicas.Replica, "answer", watched)
    chance = np.random.default_rng(5)

    async def main(rng):
        values = 10 + 0.1 * chance.standard_normal((4, 40))
        async with replicas_apart(rng, values, "pair") as (_, players):
            for _ in range(3 * ENOUGH):
                for player in players:
                    await hand_over(player, 0.1 * chance.standard_normal(40, dtype=np.float32))
                await trio.sleep(0.2)
            assert not any(clipped)
            assert all(p.run.reach() is not None for p in players)
            reach = players[1].run.reach()
            before = players[1].weights.copy()
            fast = players[0].run.replica
            fast.weights *= -1
            done = players[1].run.counters.answered
            await until(lambda: any(clipped), 30)
            await until(lambda: players[1].run.counters.answered > done, 30)
            assert np.linalg.norm(players[1].weights - before) < 2 * reach

    run_seeded(main, 6)


def test_clip_holds_where_two_of_sixteen_flip_their_signs():
    truth = 3 + np.random.default_rng(8).standard_normal(60)

    async def main(rng):
        noise = 0.1 * np.random.default_rng(9).standard_normal((16, 60))
        async with replicas_apart(rng, truth + noise, "clip", posts=False) as (_, players):
            honest, liars = players[2:], players[:2]
            spread = apart(honest)
            for _ in range(12):
                for liar in liars:
                    liar.weights[:] = -truth
                for player in honest:
                    await hand_over(player)
                await trio.sleep(0.3)
            assert max(p.run.counters.pulled for p in honest) > 20
            far = max(np.linalg.norm(p.weights - truth) for p in honest)
            assert far < 0.1 * np.linalg.norm(truth)
            assert apart(honest) < spread

    run_seeded(main, 8)


# ------------------------------------------------------------------------------------- the seam


def test_nodes_of_different_strategies_do_not_average_and_say_why():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            players = []
            for index, strategy in ((1, "pair"), (2, "outer")):
                player = Player(np.full(4, index, dtype=np.float32), strategy=strategy)
                await player.attach(mesh.nodes[index])
                players.append(player)
            await until(lambda: all(p.begun for p in players))
            await trio.sleep(3)
            assert [float(p.weights[0]) for p in players] == [1.0, 2.0]
            (peer,) = mesh.nodes[1].statistics().protocol.peers
            assert peer.state == "incompatible"
            assert peer.reason == "strategy differs: pair here, outer there"
            assert [p.run.counters.refused for p in players] == [0, 0], "nobody even asks"

    run_seeded(main, 1)


def test_a_strategy_that_there_is_not_is_named():
    with pytest.raises(UsageError, match="one of pair, exact, cyclic, outer, clip"):
        check_strategy("ring")
    with pytest.raises(UsageError, match="equal weight"):
        check_strategy("exact", 2.0)
    assert [usual_every(name) for name in STRATEGIES] == [8, 8, 8, 50, 8]


def test_the_step_of_an_exact_round_is_the_rounds():
    assert share(3.0, 1.0) == 0.75
    assert share(1.0, 1.0, turn=Turn(view="v", position=0, step=0.8)) == 0.8
    assert share(1.0, 1.0, turn=Turn(view="v", position=0, step=1e38)) == 1.0, "never beyond"
