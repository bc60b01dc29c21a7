"""The two buffers between node and training: nothing is lost or counted twice, whoever dies when."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh import runs
from mesh.codec import Float32
from mesh.core.events import Beginning
from mesh.core.messages import SchemaEntry
from mesh.errors import LocalProtocolError, NotFinite
from mesh.replica import Replica
from mesh.runs import RunSpec, make_run
from mesh.tensors import Tensors

ENTRIES = 6
FRAGMENT_ENTRIES = 2
FRAGMENTS = 3


class Killed(Exception):
    """The training process ends here."""


class Pair:
    """The deployed code of both sides, and the words that travel between them, one at a time.

    While `slow` the node stands still between two fragments until fragment() lets it go on.
    """

    def __init__(self, nursery, dtype=torch.float32, *, differences=False):
        self.model = torch.nn.Linear(2, 2, dtype=dtype)
        with torch.no_grad():
            for rank, parameter in enumerate(self.model.parameters()):
                parameter.fill_(rank + 1)
        self.tensors = Tensors(self.model)
        self.posted = np.empty(ENTRIES, dtype=np.float32)
        self.offered = np.empty(ENTRIES, dtype=np.float32)
        self.tensors.fill(self.posted)
        spec = RunSpec(
            run="r",
            entries=(
                SchemaEntry(name="weight", shape=(2, 2), dtype="float32"),
                SchemaEntry(name="bias", shape=(2,), dtype="float32"),
            ),
            weight=1.0,
            every=1,
            sync_timeout_s=0.0,
            pid=1,
            script="s",
            differences=differences,
        )
        self.differences = differences
        self.replica = Replica(ENTRIES, FRAGMENT_ENTRIES)
        codecs = {"f32": Float32()}
        self.run = make_run(
            spec, self.replica, codecs, self.posted, self.offered, self.heard, lambda: 0, 0.0
        )
        self.nursery = nursery
        self.slow = False
        self.waiting: list[trio.Event] = []
        self.to_node: list[str] = []
        self.to_training: list[str] = []
        self.serving = False
        self.holding, self.fresh, self.wanted = True, False, False
        self.meets = 0

    async def begin(self):
        await self.run.load()
        self.run.how = Beginning.ALONE
        await self.run.begin(None)
        assert self.to_training.pop()["event"] == "begun"

    async def checkpoint(self):
        """In the place of trio's own, between two fragments."""
        if self.slow:
            self.waiting.append(trio.Event())
            await self.waiting[-1].wait()

    def heard(self, event):
        self.to_training.append(event)

    # the training's actions, as mesh/boundary.py and mesh/session.py do them

    def step(self, amount):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(amount)

    def listen(self):
        if self.to_training:
            event = self.to_training.pop(0)
            if event["event"] == "offered" and event["meets"] == self.meets:
                self.holding, self.fresh, self.wanted = True, True, False

    def boundary(self):
        if not self.holding:
            if not self.wanted:
                self.to_node.append("want")
                self.wanted = True
            return
        self.take_in()
        self.tensors.collect(self.posted)
        self.holding = False
        self.to_node.append("post")

    def take_in(self):
        """What the exchange brought is in the model before the next boundary."""
        if self.fresh and self.differences:
            self.tensors.add(self.posted)
        elif self.fresh:
            self.tensors.merge(self.posted, self.offered)
        self.fresh = False

    def meet(self):
        """averaged(): an offer that is not in the model goes back unused for a newer one."""
        if self.holding and not self.fresh:
            self.boundary()
            return
        self.holding = self.fresh = False
        self.meets += 1
        self.to_node.append("meet")

    # the node's actions, as mesh/control.py and mesh/node.py start them

    async def serve(self):
        """The node reads the training's next word, unless it is at work on the last."""
        if self.to_node and not self.serving:
            self.serving = True
            self.nursery.start_soon(self.answer, self.to_node.pop(0))
            await trio.testing.wait_all_tasks_blocked()

    async def answer(self, word):
        match word:
            case "post":
                await self.run.post(step=0, loss=None, samples=0)
            case "want":
                await self.run.offer()
            case "meet":
                self.run.take_back()
                self.nursery.start_soon(self.run.offer)
        self.serving = False

    async def effect(self):
        """The schedule wants an offer, whatever else is under way."""
        self.nursery.start_soon(self.run.offer)
        await trio.testing.wait_all_tasks_blocked()

    async def fragment(self, rank=0):
        """The node does one more fragment of what it is at; `rank`: of which, where that is more."""
        if self.waiting:
            self.waiting.pop(rank % len(self.waiting)).set()
            await trio.testing.wait_all_tasks_blocked()

    async def hurry(self):
        """The node ends what it is at."""
        self.slow = False
        while self.waiting:
            await self.fragment()

    def exchange(self, amount, index=None):
        """An exchange moved the replica, or one fragment, by a delta that another node has taken."""
        where = slice(None) if index is None else self.replica.slice_of(index)
        self.replica.weights[where] += np.float32(amount)

    def x(self):
        flat = np.empty(ENTRIES, dtype=np.float32)
        self.tensors.fill(flat)
        return flat


def in_pair(scenario, dtype=torch.float32, *, differences=False):
    """Runs `await scenario(pair)` for a training that has begun."""

    async def main():
        async with trio.open_nursery() as nursery:
            pair = Pair(nursery, dtype, differences=differences)
            with pytest.MonkeyPatch.context() as patch:
                lowlevel = SimpleNamespace(checkpoint=pair.checkpoint)
                patch.setattr(runs, "trio", SimpleNamespace(lowlevel=lowlevel))
                await pair.begin()
                await scenario(pair)
            nursery.cancel_scope.cancel()

    trio.run(main)


AMOUNTS = st.integers(-8, 8).map(lambda n: n / 8)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), AMOUNTS),
    st.tuples(st.just("exchange"), AMOUNTS, st.integers(0, FRAGMENTS - 1)),
    st.tuples(st.just("fragment"), st.integers(0, 1)),
    st.tuples(
        st.sampled_from(["listen", "take_in", "boundary", "meet", "serve", "serve", "effect"])
    ),
)


async def play(pair, actions):
    """Runs an interleaving; returns (progress of the training, what exchanges moved, by entry)."""
    pair.slow = True
    steps, moved = 0.0, np.zeros(ENTRIES, dtype=np.float32)
    for name, *arguments in actions:
        done = getattr(pair, name)(*arguments)
        if done is not None:
            await done
        if name == "step":
            steps += arguments[0]
        if name == "exchange":
            moved[pair.replica.slice_of(arguments[1])] += np.float32(arguments[0])
    return steps, moved


async def drain(pair):
    await pair.hurry()
    for _ in range(4):
        while pair.to_node:
            await pair.serve()
        while pair.to_training:
            pair.listen()
        pair.boundary()


# An offer that crosses the training's request for a newer one is void.
CROSSING = [(name,) for name in ("boundary", "boundary", "serve", "serve", "meet")]
CROSSING += [
    *[("exchange", 1.0, index) for index in range(FRAGMENTS)],
    *[(name,) for name in ("listen", "boundary", "serve", "serve")],
]

# So is one that is being written when the request comes.
CROSSING_HALF_WAY = [
    *[(name,) for name in ("boundary", "serve", "fragment", "fragment", "effect", "meet", "serve")],
    *[(name,) for name in ("fragment", "fragment", "listen", "boundary", "serve", "fragment")],
]

# An offer that is asked for while a post is merged waits for the end of it.
OFFER_IN_A_MERGE = [
    ("step", 1.0),
    ("exchange", 0.5, FRAGMENTS - 1),
    *[(name,) for name in ("boundary", "serve", "effect")],
    *[("fragment", 1), ("fragment", 1), ("fragment", 0)],
]


@given(st.lists(ACTIONS, max_size=60))
@example(CROSSING)
@example(CROSSING_HALF_WAY)
@example(OFFER_IN_A_MERGE)
@settings(max_examples=200, deadline=None, derandomize=True)
@pytest.mark.parametrize("differences", [False, True])
def test_nothing_is_lost_or_counted_twice_in_any_interleaving(differences, actions):
    async def scenario(pair):
        start = pair.x()
        steps, moved = await play(pair, actions)
        await drain(pair)
        assert np.array_equal(pair.replica.weights, start + np.float32(steps) + moved)
        assert np.array_equal(pair.x(), start + np.float32(steps) + moved)

    in_pair(scenario, differences=differences)


@given(st.lists(ACTIONS, max_size=40))
@settings(max_examples=50, deadline=None, derandomize=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_lose_nothing_of_what_the_mesh_sends(dtype, actions):
    """Steps are whole multiples of what the type can hold; exchanges go below it."""
    actions = [(n, a[0] / 4096, *a[1:]) if n == "exchange" else (n, *a) for n, *a in actions]

    async def scenario(pair):
        start = pair.x()
        steps, moved = await play(pair, actions)
        await drain(pair)
        expected = start + np.float32(steps) + moved
        assert np.allclose(
            pair.replica.weights, expected, atol=1e-2 if dtype != torch.float64 else 1e-5
        )

    in_pair(scenario, dtype)


def test_averaging_by_less_than_one_step_of_bfloat16_is_not_undone_by_its_rounding():
    async def scenario(pair):
        for _ in range(64):
            pair.exchange(1 / 4096)  # at 1.0 a step of bfloat16 is 1/128
            await drain(pair)
        start = np.repeat(np.float32([1, 2]), [4, 2])
        assert np.array_equal(pair.replica.weights, start + np.float32(64 / 4096))
        assert np.array_equal(pair.x()[:4], np.full(4, 1 + 64 / 4096, dtype=np.float32))

    in_pair(scenario, torch.bfloat16)


def test_an_exchange_between_two_fragments_of_a_hand_over_counts_once():
    """It moves one fragment that is merged, or offered, already and one that is not yet."""

    async def scenario(pair):
        start = pair.x()
        pair.step(1.0)
        await play(pair, [("boundary",), ("serve",)])
        assert list(pair.replica.weights - start) == [1, 1, 0, 0, 0, 0], "one fragment is merged"
        pair.exchange(0.5)
        await play(pair, 2 * [("fragment",)])
        assert np.array_equal(pair.replica.weights, start + np.float32(1.5))
        await pair.effect()
        pair.exchange(0.25)
        await play(pair, 2 * [("fragment",)])
        assert list(pair.offered - start) == [1.5, 1.5, 1.75, 1.75, 1.75, 1.75]
        await drain(pair)
        assert np.array_equal(pair.replica.weights, start + np.float32(1.75))

    in_pair(scenario)


def test_a_training_that_dies_while_its_post_is_merged_has_posted_all_of_it():
    async def scenario(pair):
        start = pair.x()
        pair.step(1.0)
        await play(pair, [("boundary",), ("serve",), ("fragment",)])
        assert not np.array_equal(pair.replica.weights, start + np.float32(1.0))
        await pair.hurry()  # nobody listens any more; the node ends what it began
        assert np.array_equal(pair.replica.weights, start + np.float32(1.0))

    in_pair(scenario)


def test_an_offer_given_back_while_it_is_written_is_never_told():
    async def scenario(pair):
        await play(pair, [("boundary",), ("serve",), ("fragment",), ("fragment",), ("effect",)])
        assert pair.run.turn.locked(), "it is being written"
        pair.run.take_back()
        await play(pair, 3 * [("fragment",)])
        assert pair.to_training == []
        await pair.effect()
        await play(pair, 3 * [("fragment",)])
        assert [(word["event"], word["meets"]) for word in pair.to_training] == [("offered", 1)]

    in_pair(scenario)


def test_what_a_pull_brought_is_never_handed_over_in_part():
    """An offer waits until the donor's model is whole in the replica."""

    async def scenario(pair):
        await play(pair, [("boundary",), ("serve",), ("fragment",), ("fragment",)])
        pair.run.taken = np.full(ENTRIES, 7, dtype=np.float32)
        pair.nursery.start_soon(pair.run.fill)
        await trio.testing.wait_all_tasks_blocked()
        await pair.effect()
        assert list(pair.replica.weights[:3]) == [7, 7, 1]
        await play(pair, 6 * [("fragment", 1)])
        assert set(pair.offered) == {7}

    in_pair(scenario)


@pytest.mark.parametrize("deaths", range(9))
def test_a_training_killed_at_any_point_leaves_the_replica_whole(deaths, monkeypatch):
    """Killed while it reads, while it writes, before and after its word: what was said counts once,
    what was not said not at all."""
    in_pair(lambda pair: die_in_a_boundary(pair, deaths, monkeypatch))


async def die_in_a_boundary(pair, deaths, monkeypatch):
    start = pair.x()
    pair.step(1.0)
    await drain(pair)
    pair.exchange(0.5)
    while not pair.holding:
        pair.boundary()
        await pair.serve()
        pair.listen()
    said = start + np.float32(1.5)
    pair.step(2.0)
    calls = 0
    copy_, sub, add_ = torch.Tensor.copy_, torch.sub, torch.Tensor.add_

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > deaths:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "copy_", dying(copy_))
    monkeypatch.setattr(torch.Tensor, "add_", dying(add_))
    monkeypatch.setattr(torch, "sub", dying(sub))
    try:
        pair.boundary()
        died = False
    except Killed:
        died = True
    monkeypatch.undo()
    while pair.to_node:
        await pair.serve()
    expected = said if died else said + np.float32(2.0)
    assert np.array_equal(pair.replica.weights, expected)
    assert died == (deaths < 6), "the boundary has six passes: two tensors, three each"


def test_a_post_without_an_offer_in_hand_is_refused():
    async def scenario(pair):
        await pair.run.post(step=1, loss=None, samples=1)
        with pytest.raises(LocalProtocolError):
            await pair.run.post(step=2, loss=None, samples=1)

    in_pair(scenario)


def test_an_offer_is_never_written_while_the_training_reads_it():
    async def scenario(pair):
        before = pair.offered.copy()
        pair.exchange(1.0)
        await pair.run.offer()
        assert np.array_equal(pair.offered, before)
        assert pair.to_training == []

    in_pair(scenario)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 1e17, 1e30])
@pytest.mark.parametrize(
    ("dtype", "differences"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float64, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
)
def test_a_number_that_is_not_finite_costs_no_other_anything_and_may_be_put_right(
    dtype, differences, worst
):
    """As without a mesh: whoever keeps a good model goes on from it, and one bad statistic is only that."""

    async def scenario(pair):
        start = pair.x()
        pair.step(0.5)
        with torch.no_grad():
            pair.model.bias[0] = worst
        await play(pair, [("boundary",), ("serve",)])
        await pair.hurry()
        good = np.arange(ENTRIES) != 4
        assert np.array_equal(pair.replica.weights, start + np.float32(0.5) * good)
        assert [(event["event"], event["tensor"]) for event in pair.to_training] == [
            ("diverged", "bias")
        ]
        pair.to_training.clear()
        pair.exchange(0.25)
        await drain(pair)
        pair.to_training.clear()
        assert np.array_equal(pair.x()[good], (start + np.float32(0.75))[good])
        assert not np.abs(pair.x()[4]) < 1e16, "it is the training's own"
        with torch.no_grad():
            pair.model.weight.copy_(torch.ones(2, 2))
            pair.model.bias.fill_(2.0)
        for _ in range(3):
            await drain(pair)
        assert np.array_equal(pair.x(), start)
        assert np.array_equal(pair.replica.weights, start)

    in_pair(scenario, dtype, differences=differences)


def test_weights_that_are_not_finite_never_reach_the_replica():
    async def scenario(pair):
        before = pair.replica.weights.copy()
        pair.step(float("nan"))
        pair.boundary()
        await pair.serve()
        assert np.array_equal(pair.replica.weights, before)
        assert pair.run.counters.non_finite == 1
        assert [event["event"] for event in pair.to_training] == ["diverged"]
        pair.posted[0] = np.nan
        with pytest.raises(NotFinite):
            await pair.run.load()

    in_pair(scenario)


def test_what_a_newcomers_buffer_held_before_says_nothing():
    """Fresh memory may hold anything, NaN too: only the donor's numbers count."""
    taker, donor, exact = Replica(ENTRIES), Replica(ENTRIES), Float32()
    taker.fill(0, np.full(ENTRIES, 1.0, dtype=np.float32))
    donor.fill(0, np.full(ENTRIES, 4.0, dtype=np.float32))
    body = memoryview(bytearray(donor.body_bytes(0, exact)))
    donor.write(0, body, exact)
    into = np.full(ENTRIES, np.nan, dtype=np.float32)
    taker.take(0, body, into, exact)
    assert set(into) == {4.0}
    assert set(taker.weights) == {1.0}
