"""Joining late: the mesh clock, first weights from donors that die, and a mesh that is not dragged.

Virtual time and real numbers: the nodes are the deployed ones, over the simulated network.
"""

from random import Random

import numpy as np
import pytest
import trio

from mesh import replica
from mesh.core.clock import CLOCK_LIMIT, MeshClock
from mesh.core.events import Beginning
from mesh.core.exchange import Initiation
from mesh.core.messages import RunInfo
from mesh.core.schedule import DONORS_LIMIT, Schedule, Start
from mesh.net.simulated import Weather
from mesh.player import Player
from mesh.responder import Responder
from mesh.session import StepClock
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
        assert sum(p * c.steps for p, c in zip(weights, clocks, strict=True)) == pytest.approx(
            total
        )
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


def test_the_training_reads_the_clock_with_its_own_steps_since_each_counted_once():
    clock = StepClock()
    assert clock.at(3) == 3
    clock.steps = 5000.5  # begun with a donor's
    assert clock.at(3) == 5003.5
    clock.posted(8)
    assert clock.at(8) == 5008.5, "a post changes nothing of what is read"
    clock.steps = 5004.0  # the next offer holds the post's steps
    assert clock.at(10) == 5006.0


@pytest.mark.parametrize("seed", range(2))
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


# ---------------------------------------------------------------------------------- first weights


def counting_pulls(monkeypatch):
    """(donor, start) of every pull of the newcomer that was answered with yes, in order."""
    pulls, opened = [], Responder._open

    def count(self, peer, message):
        run, reply = opened(self, peer, message)
        if run is not None and message.pull and peer == node_id(9):
            pulls.append((self._me, message.start))
        return run, reply

    monkeypatch.setattr(Responder, "_open", count)
    return pulls


async def donors_and_a_newcomer(mesh, count, steps=5000):
    """Donors 1..count that train together, and the newcomer 9 whose pull is about to begin."""
    donors = {i: await mesh.attach(i, LARGE + 1) for i in range(1, count + 1)}
    await met(*donors.values()) if count > 1 else await until(lambda: donors[1].begun)
    for player in donors.values():
        await hand_over(player, steps=steps)
    await trio.sleep(5)
    mesh.network.weather = SLOW
    mesh.network.lose_all()
    mesh.start(9)
    await until(lambda: all(state == "alive" for state in mesh.states(9).values()), 30)
    await until(lambda: len(mesh.states(9)) >= count, 30)
    return donors, await mesh.attach(9, LARGE - 1e6)


async def applied(player, fragments):
    """The newcomer has so many fragments of a pull that is under way."""
    await until(lambda: player.run.current and player.run.current.applied >= fragments, 60)
    return int(str(player.run.current.peer)[4:6])


def giver(player):
    """Whom it pulls from now."""
    return player.run.current and player.run.current.peer


@pytest.mark.parametrize("at", [1, 7, 13, FRAGMENTS - 1])
def test_a_pull_goes_on_with_another_donor_at_the_fragment_where_the_first_one_died(
    at, small_fragments, monkeypatch
):
    async def main(rng):
        pulls = counting_pulls(monkeypatch)
        async with memory_mesh(rng, 3) as mesh:
            _, late = await donors_and_a_newcomer(mesh, 3)
            first = await applied(late, at)
            assert late.run.taken is late.offered, "no third copy of the model while it waits"
            mesh.network.crash(node_id(first))
            mesh.crash(first)
            await until(lambda: late.begun, 60)
            assert late.begun == "donor"
            assert np.array_equal(late.x, LARGE + 1), "whole, and nothing of its own first draw"
            assert late.clock == pytest.approx(5000, abs=1)
            (donor, start), (other, went_on) = pulls
            assert (donor, start) == (node_id(first), 0)
            assert other != donor
            assert at <= went_on < FRAGMENTS

    run_seeded(main, at)


@pytest.mark.parametrize("spoilt", [0, 12, FRAGMENTS - 1])
def test_a_fragment_that_was_turned_away_is_asked_for_again_at_the_next_donor(
    spoilt, small_fragments, monkeypatch
):
    async def main(rng):
        pulls = counting_pulls(monkeypatch)
        async with memory_mesh(rng, 3) as mesh:
            donors, late = await donors_and_a_newcomer(mesh, 3)
            await until(lambda: giver(late), 60)
            first = int(str(giver(late))[4:6])
            bad = donors[first].run.replica
            bad.weights[bad.slice_of(spoilt)] = np.nan
            await until(lambda: len(pulls) == 2, 60)
            assert pulls[1][1] == spoilt
            bad.weights[:] = LARGE + 1
            await until(lambda: late.begun, 60)
            assert late.begun == "donor"
            assert np.array_equal(late.x, LARGE + 1), "nothing that nobody sent"

    run_seeded(main, spoilt)


def test_a_donor_that_refuses_costs_nothing_of_what_came(small_fragments, monkeypatch):
    pulls, objection, refused = counting_pulls(monkeypatch), Responder._objection, []

    def refuse(self, peer, message):
        if message.start and not refused:
            refused.append(self._me)
            return "not now"
        return objection(self, peer, message)

    async def main(rng):
        monkeypatch.setattr(Responder, "_objection", refuse)
        async with memory_mesh(rng, 3) as mesh:
            _, late = await donors_and_a_newcomer(mesh, 3)
            first = await applied(late, 9)
            mesh.network.crash(node_id(first))
            mesh.crash(first)
            await until(lambda: late.begun, 60)
            assert late.begun == "donor"
            assert refused
            assert [start for _, start in pulls] == [0, pulls[1][1]]
            assert pulls[1][1] >= 9

    run_seeded(main, 3)


def test_a_newcomer_whose_donors_all_fail_begins_alone_and_takes_the_mesh_as_soon_as_it_can(
    small_fragments, monkeypatch
):
    asked, objection = [], Responder._objection

    def refuse(self, peer, message):
        asked.append(self._me)
        return "not now"

    async def main(rng):
        async with memory_mesh(rng, 5) as mesh:
            donors = [await mesh.attach(i, LARGE + 1) for i in range(1, 6)]
            await met(*donors)
            for player in donors:
                await hand_over(player, steps=5000)
            mesh.start(9)
            await until(lambda: len(mesh.states(9)) == 5, 30)
            monkeypatch.setattr(Responder, "_objection", refuse)
            late = await mesh.attach(9, LARGE - 1e6)
            await until(lambda: late.begun, 60)
            assert late.begun == "alone"
            assert len(set(asked)) == DONORS_LIMIT
            assert len(asked) == 5
            monkeypatch.setattr(Responder, "_objection", objection)
            await hand_over(late, 1.0, steps=10)
            await until(lambda: late.node.exchanged(late.run), 60)
            await hand_over(late)
            assert np.abs(late.x - 1).max() < 1e-3
            assert all(np.array_equal(p.weights, LARGE + 1) for p in donors)

    run_seeded(main, 4)


def test_of_more_than_three_donors_the_newcomer_asks_three_and_does_not_wait_for_ever():
    donors = [
        (node_id(k), RunInfo(run="r", schema="s", started=True, exchanged=True)) for k in range(9)
    ]
    schedule = Schedule(
        info=RunInfo(run="r", schema="s", started=False, exchanged=False),
        me=node_id(20),
        now=0.0,
        sync_timeout_s=1.0,
        rng=Random(5),
    )
    for _ in range(DONORS_LIMIT):
        start = schedule.decide(0.0, donors)
        assert isinstance(start, Start)
        assert start.pull
        assert start.resumes
        donors = [p for p in donors if p[0] != start.peer]  # it died
        schedule._busy = False
    assert schedule.decide(0.0, donors) is None
    assert 0.0 < schedule.next_deadline() < 10.0
    assert schedule.decide(schedule.next_deadline(), donors) is not None


def test_donors_that_die_one_after_the_other_are_followed_by_more_as_long_as_something_comes(
    small_fragments, monkeypatch
):
    async def main(rng):
        pulls = counting_pulls(monkeypatch)
        async with memory_mesh(rng, 5) as mesh:
            _, late = await donors_and_a_newcomer(mesh, 5)
            for at in (2, 6, 10, 14):
                lost = await applied(late, at)
                mesh.network.crash(node_id(lost))
                mesh.crash(lost)
                await until(lambda: giver(late) != node_id(lost), 60)  # noqa: B023
            await until(lambda: late.begun, 60)
            assert late.begun == "donor"
            assert np.array_equal(late.x, LARGE + 1)
            starts = [start for _, start in pulls]
            assert starts == sorted(starts)
            assert starts[0] == 0
            assert min(starts[1:]) >= 2
            assert len({donor for donor, _ in pulls}) == 5 > DONORS_LIMIT

    run_seeded(main, 7)


def test_when_the_last_donor_dies_in_the_middle_the_newcomer_begins_with_its_own_weights_whole(
    small_fragments,
):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            _, late = await donors_and_a_newcomer(mesh, 2)
            for at in (3, 9):
                lost = await applied(late, at)
                mesh.network.crash(node_id(lost))
                mesh.crash(lost)
            await until(lambda: late.begun, 60)
            assert late.begun == "alone"
            assert np.array_equal(late.x, LARGE - np.float32(1e6))
            assert np.array_equal(late.weights, late.x)
            assert late.clock == 0

    run_seeded(main, 8)


def test_a_newcomer_that_gives_up_in_the_middle_stops_its_donor_from_sending(
    small_fragments, monkeypatch
):
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            donors, late = await donors_and_a_newcomer(mesh, 1)
            await applied(late, 3)
            run, node = late.run, late.node
            await node.detach(run)
            late.lost()
            await until(lambda: run.current is None, 1.0)
            assert len(run.taken) == 0
            sent = donors[1].run.counters.bytes_sent
            await trio.sleep(10)
            assert donors[1].run.counters.bytes_sent == sent
            again = await mesh.attach(9, LARGE - 1e6)
            await until(lambda: again.begun, 60)
            assert np.array_equal(again.x, LARGE + 1)

    run_seeded(main, 5)


def test_half_a_model_of_one_mesh_is_never_completed_by_a_donor_that_trained_alone(
    small_fragments,
):
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            run = (await mesh.attach(1, LARGE)).run
            run.how = None
            assert run.take_up(node_id(2), resumes=True, now=0.0) == 0
            record = _pull_of(node_id(2), 5)
            run.broke_off(record, resumes=True, now=0.0)
            assert run.take_up(node_id(3), resumes=True, now=1.0) == 5
            run.broke_off(record, resumes=True, now=1.0)
            assert run.take_up(node_id(3), resumes=False, now=2.0) == 0
            run.broke_off(record, resumes=False, now=2.0)
            assert run.take_up(node_id(2), resumes=False, now=3.0) == 5, "the same donor may"
            run.broke_off(record, resumes=True, now=3.0)
            assert run.take_up(node_id(3), resumes=True, now=64.0) == 0, "too old"
            run.broke_off(record, resumes=True, now=64.0)
            run.how = Beginning.ALONE
            assert run.take_up(node_id(3), resumes=True, now=65.0) == 0, "offers overwrite it"
            assert run.taken is not run.hand_over.offered

    run_seeded(main, 6)


def _pull_of(donor, fragments):
    record = Initiation(exchange=1, peer=donor, end=FRAGMENTS, pull=True, codec="f32")
    record.goes_on_at(fragments)
    return record


# ------------------------------------------------------------------------- the mesh is not dragged

WIDE, HIDDEN, STEPS = 8, 16, 100


class Problem:
    """Two classes that a line cannot part, for a net of one hidden layer, learned by plain SGD."""

    def __init__(self, seed=1):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(2000, WIDE)).astype(np.float32)
        self.y = (self.x[:, 0] * self.x[:, 1] + self.x[:, 2] > 0).astype(np.float32)
        self.entries = WIDE * HIDDEN + 2 * HIDDEN + 1

    def first_draw(self, seed):
        return np.random.default_rng(seed).normal(0, 0.5, self.entries).astype(np.float32)

    @staticmethod
    def _parts(w):
        """Of nets (n, entries): views."""
        a, b = WIDE * HIDDEN, WIDE * HIDDEN + HIDDEN
        first = w[:, :a].reshape(-1, WIDE, HIDDEN)
        return first, w[:, None, a:b], w[:, b : b + HIDDEN, None], w[:, b + HIDDEN :]

    def _forward(self, w, x):
        first, bias, second, last = self._parts(w)
        hidden = np.tanh(x @ first + bias)
        return hidden, (hidden @ second)[..., 0] + last

    def loss(self, w):
        score = self._forward(w[None], self.x)[1]
        return float(np.mean(np.logaddexp(0, score) - self.y * score))

    def learn(self, w, rng, rate=0.1):
        """What STEPS steps of 16 samples each add to the nets `w` (n, entries), each by itself."""
        now = w.copy()
        for batch in rng.integers(0, len(self.x), (STEPS, len(w), 16)):
            x, grad = self.x[batch], np.empty_like(now)
            hidden, score = self._forward(now, x)
            error = ((1 / (1 + np.exp(-score)) - self.y[batch]) / 16)[..., None]
            back = error * self._parts(now)[2].swapaxes(1, 2) * (1 - hidden**2)
            parts = self._parts(grad)
            parts[0][:], parts[1][:] = x.swapaxes(1, 2) @ back, back.sum(1, keepdims=True)
            parts[2][:], parts[3][:] = hidden.swapaxes(1, 2) @ error, error.sum(1)
            now -= rate * grad
        return now - w


class LearningMesh:
    """Nodes that learn a Problem together, boundary by boundary."""

    def __init__(self, mesh, seed):
        self.mesh, self.problem = mesh, Problem()
        self.rng = np.random.default_rng(seed)
        self.players = []
        self.losses = []
        """of the mean of all replicas, after each boundary"""

    async def boundaries(self, count):
        for _ in range(count):
            training = [player for player in self.players if player.begun]
            learned = self.problem.learn(np.stack([p.x for p in training]), self.rng)
            for player, progress in zip(training, learned, strict=True):
                await hand_over(player, progress, steps=STEPS)
            await trio.sleep(0.3)
            begun = [p.weights.astype(np.float64) for p in self.players if p.begun]
            self.losses.append(self.problem.loss(np.mean(begun, axis=0)))

    async def grow_up(self, count=4, boundaries=50):
        """Nodes 1..count, after 5000 steps each."""
        for index in range(1, count + 1):
            self.mesh.start(index)
        for index in range(1, count + 1):
            draw = self.problem.first_draw(7)
            self.players.append(await self.mesh.attach(index, draw))
        await met(*self.players)
        await self.boundaries(boundaries)

    def noise(self):
        """(what the loss is now, how far it goes up and down by itself)."""
        return np.mean(self.losses[-20:]), np.std(self.losses[-20:])

    def rise(self, since, calm, noise):
        """How many times its noise the loss went above what it was."""
        return (max(self.losses[since:]) - calm) / noise


def test_who_joins_at_step_5000_begins_where_the_mesh_is_and_its_loss_does_not_rise(monkeypatch):
    monkeypatch.setattr(replica, "FRAGMENT_ENTRIES", 32)

    async def joins(group, index, weather):
        """One that joins; returns how many boundaries the others made before it had weights."""
        calm, noise = group.noise()
        group.mesh.start(index)
        await until(lambda: len(group.mesh.states(index)) >= 4, 30)
        group.mesh.network.weather = weather
        group.mesh.network.lose_all()
        joined, since = (
            await group.mesh.attach(index, group.problem.first_draw(8)),
            len(group.losses),
        )
        group.players.append(joined)
        while not joined.begun:
            assert joined.run.counters.answered == 0, "nobody averages with it before"
            await group.boundaries(1)
        waited = len(group.losses) - since
        group.mesh.network.weather = Weather()
        assert (joined.begun, joined.run.counters.pulled) == ("donor", 1)
        assert joined.clock == pytest.approx(group.players[0].steps, abs=(waited + 8) * STEPS)
        assert group.problem.loss(joined.x) < calm + 8 * noise
        await group.boundaries(15)
        assert group.rise(since, calm, noise) < 1
        return waited

    async def main(rng):
        async with memory_mesh(rng) as mesh:
            group = LearningMesh(mesh, 11)
            await group.grow_up()
            assert group.noise()[0] < 0.5 * group.losses[0], "it has learned something"
            assert await joins(group, 8, Weather()) <= 3
            # On a slow link the pull lasts for several boundaries, and its donor trains on.
            assert await joins(group, 9, Weather(bytes_per_s=400)) >= 4
            # The same figure, of one that averages what it drew by chance.
            (calm, noise), since = group.noise(), len(group.losses)
            drag = Player(group.problem.first_draw(8))
            drag.began, drag._met = "alone", True
            mesh.start(7)
            await drag.attach(mesh.nodes[7])
            group.players.append(drag)
            await group.boundaries(5)
            assert group.rise(since, calm, noise) > 8

    run_seeded(main, 3)


def test_a_training_resumed_from_a_checkpoint_gives_its_weights_to_one_that_came_less_far():
    """Neither has met anybody, and the other's id is the lower one."""

    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            resumed = Player(np.full(4, 7.0, dtype=np.float32))
            resumed.steps, resumed.began = 500, "first"
            await resumed.attach(mesh.nodes[2])
            await until(lambda: mesh.nodes[2].own.runs)
            (info,) = mesh.nodes[2].own.runs
            assert info.progress == (500).bit_length(), "before it hands over for the first time"
            fresh = Player(np.ones(4, dtype=np.float32))
            fresh.steps, fresh.began = 3, "first"
            await fresh.attach(mesh.nodes[1])
            await met(fresh, resumed)
            assert (fresh.weights == 7).all()
            assert (resumed.weights == 7).all()

    run_seeded(main, 5)
