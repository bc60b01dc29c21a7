"""The two buffers between node and training: nothing is lost or counted twice, whoever dies when."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.codec import Float32
from mesh.core.messages import SchemaEntry
from mesh.errors import LocalProtocolError, NotFinite
from mesh.replica import HandOver, Replica
from mesh.runs import RunSpec, make_run
from mesh.tensors import Tensors

ENTRIES = 6


class Killed(Exception):
    """The training process ends here."""


class Pair:
    """The deployed code of both sides, and the words that travel between them, one at a time."""

    def __init__(self, dtype=torch.float32):
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
            entries=(SchemaEntry(name="w", shape=(ENTRIES,), dtype="float32"),),
            weight=1.0,
            every=1,
            sync_timeout_s=0.0,
            pid=1,
            script="s",
        )
        self.replica = Replica(ENTRIES, Float32())
        self.run = make_run(
            spec, self.replica, self.posted, self.offered, self.heard, lambda: 0, 0.0
        )
        self.run.hand_over.offer()
        self.run.ours = False
        self.to_node: list[str] = []
        self.to_training: list[str] = []
        self.holding, self.fresh, self.wanted = True, False, False
        self.meets = 0

    def heard(self, event):
        self.to_training.append(event)

    # the training's actions, as mesh/training.py and mesh/session.py do them

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
        if self.fresh:
            self.tensors.merge(self.posted, self.offered)
        else:
            self.tensors.collect(self.posted)
        self.holding = self.fresh = False
        self.to_node.append("post")

    def meet(self):
        """averaged(): the offer goes back unused for a newer one."""
        self.holding = self.fresh = False
        self.meets += 1
        self.to_node.append("meet")

    # the node's actions

    def serve(self):
        if not self.to_node:
            return
        match self.to_node.pop(0):
            case "post":
                self.run.post(step=0, loss=None, samples=0)
            case "want":
                self.run.offer()
            case "meet":
                self.run.take_back()
                self.run.offer()

    def exchange(self, amount):
        """An exchange moved the replica by a delta that another node has taken with it."""
        self.replica.weights += np.float32(amount)

    def x(self):
        flat = np.empty(ENTRIES, dtype=np.float32)
        self.tensors.fill(flat)
        return flat


ACTIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(-8, 8).map(lambda n: n / 8)),
    st.tuples(st.just("exchange"), st.integers(-8, 8).map(lambda n: n / 8)),
    st.tuples(st.sampled_from(["listen", "boundary", "meet", "serve", "serve"]), st.none()),
)


def play(pair, actions):
    """Runs an interleaving; returns (progress of the training, what exchanges moved)."""
    steps = moved = 0.0
    for name, amount in actions:
        if amount is None:
            getattr(pair, name)()
            continue
        getattr(pair, name)(amount)
        steps, moved = steps + amount * (name == "step"), moved + amount * (name == "exchange")
    return steps, moved


def drain(pair):
    for _ in range(4):
        while pair.to_node:
            pair.serve()
        while pair.to_training:
            pair.listen()
        pair.boundary()


# An offer that crosses the training's request for a newer one is void.
CROSSING = ["boundary", "boundary", "serve", "serve", "meet"]
CROSSING = [(name, None) for name in CROSSING]
CROSSING += [
    ("exchange", 1.0),
    *[(name, None) for name in ("listen", "boundary", "serve", "serve")],
]


@given(st.lists(ACTIONS, max_size=60))
@example(CROSSING)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_nothing_is_lost_or_counted_twice_in_any_interleaving(actions):
    pair = Pair()
    start = pair.x()
    steps, moved = play(pair, actions)
    drain(pair)
    assert np.array_equal(pair.replica.weights, start + np.float32(steps + moved))
    assert np.array_equal(pair.x(), start + np.float32(steps + moved))


@given(st.lists(ACTIONS, max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_lose_nothing_of_what_the_mesh_sends(dtype, actions):
    """Steps are whole multiples of what the type can hold; exchanges go below it."""
    pair = Pair(dtype)
    start = pair.x()
    actions = [(n, a / 4096 if n == "exchange" else a) for n, a in actions]
    steps, moved = play(pair, actions)
    drain(pair)
    expected = start + np.float32(steps) + np.float32(moved)
    assert np.allclose(
        pair.replica.weights, expected, atol=1e-2 if dtype != torch.float64 else 1e-5
    )


def test_averaging_by_less_than_one_step_of_bfloat16_is_not_undone_by_its_rounding():
    pair = Pair(torch.bfloat16)
    for _ in range(64):
        pair.exchange(1 / 4096)  # at 1.0 a step of bfloat16 is 1/128
        drain(pair)
    start = np.repeat(np.float32([1, 2]), [4, 2])
    assert np.array_equal(pair.replica.weights, start + np.float32(64 / 4096))
    assert np.array_equal(pair.x()[:4], np.full(4, 1 + 64 / 4096, dtype=np.float32))


@pytest.mark.parametrize("deaths", range(9))
def test_a_training_killed_at_any_point_leaves_the_replica_whole(deaths, monkeypatch):
    """Killed while it reads, while it writes, before and after its word: what was said counts once,
    what was not said not at all."""
    pair = Pair()
    start = pair.x()
    pair.step(1.0)
    drain(pair)
    pair.exchange(0.5)
    while not pair.holding:
        pair.boundary()
        pair.serve()
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
        pair.serve()
    expected = said if died else said + np.float32(2.0)
    assert np.array_equal(pair.replica.weights, expected)
    assert died == (deaths < 6), "the boundary has six passes: two tensors, three each"


def test_a_post_without_an_offer_in_hand_is_refused():
    pair = Pair()
    pair.run.post(step=1, loss=None, samples=1)
    with pytest.raises(LocalProtocolError):
        pair.run.post(step=2, loss=None, samples=1)


def test_an_offer_is_never_written_while_the_training_reads_it():
    pair = Pair()
    before = pair.offered.copy()
    pair.exchange(1.0)
    pair.run.offer()
    assert np.array_equal(pair.offered, before)
    assert pair.to_training == []


def test_weights_that_are_not_finite_never_reach_the_replica():
    pair = Pair()
    before = pair.replica.weights.copy()
    pair.step(float("nan"))
    pair.boundary()
    pair.serve()
    assert np.array_equal(pair.replica.weights, before)
    assert pair.run.counters.non_finite == 1
    assert [event["event"] for event in pair.to_training] == ["diverged"]
    with pytest.raises(NotFinite):
        HandOver(pair.replica, pair.posted, pair.offered).begin()


def test_what_a_newcomers_buffer_held_before_says_nothing():
    """Fresh memory may hold anything, NaN too: only the donor's numbers and our own count."""
    taker, donor = Replica(ENTRIES, Float32()), Replica(ENTRIES, Float32())
    taker.fill(np.full(ENTRIES, 1.0, dtype=np.float32))
    donor.fill(np.full(ENTRIES, 4.0, dtype=np.float32))
    body = memoryview(bytearray(donor.body_bytes(0)))
    donor.write(0, body)
    into = np.full(ENTRIES, np.nan, dtype=np.float32)
    assert taker.take(0, body, into) == ENTRIES * 9.0
    assert set(into) == {4.0}
    assert set(taker.weights) == {1.0}
