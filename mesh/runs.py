"""One run as its node holds it: the replica, the hand-over, the exchanges in progress, the figures.

A Run is made when a training attaches and dropped when it ends. Only tasks of the node touch it. What
they do to one fragment is one step, in which nothing waits; what they do to the whole model gives the
loop its turn between two fragments, and of these only one is under way at a time (`turn`), or the
training would be handed half of one model and half of another. Exchanges go on meanwhile.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from operator import add
from typing import Any, Final

import numpy as np
import trio

from mesh.buffers import BufferPool
from mesh.codec import EXACT, Codec, Floats
from mesh.core.events import Beginning, Outcome
from mesh.core.exchange import Initiation, Responses
from mesh.core.messages import NodeId, SchemaEntry
from mesh.core.schema import digest
from mesh.errors import LocalProtocolError
from mesh.replica import HandOver, Replica

DISTANCES_KEPT: Final = 8
"""Pair distances that the drift is read from: the last few, or it would lag behind the training."""

BOUNDS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds by which durations are counted: a small model on a cable takes 2 ms, 400 MB over Wi-Fi
half a minute."""

Tell = Callable[[dict[str, Any]], None]
"""Puts one event into the training's queue; never waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What a training says of itself when it attaches."""

    run: str
    entries: tuple[SchemaEntry, ...]
    weight: float
    every: int
    sync_timeout_s: float
    pid: int
    script: str
    started: bool = False
    exchanged: bool = False
    codec: str = EXACT
    """of the exchanges that this node begins"""

    @property
    def schema(self) -> str:
        return digest(self.entries)


@dataclass(slots=True)
class Counters:
    """What a run did since it attached. Lengths are in bytes, with headers, without TLS."""

    completed: int = 0
    answered: int = 0
    resumed: int = 0
    refused: int = 0
    failed: int = 0
    pulled: int = 0
    non_finite: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(slots=True)
class Durations:
    """How long things took, in memory that does not grow: how many fell under each of BOUNDS_S."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    """the last: longer than all bounds"""
    total_s: float = 0.0

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.total_s += duration_s


@dataclass(slots=True)
class Totals:
    """What a node did since it started, whatever became of its runs."""

    ended: Counters = field(default_factory=Counters)
    """of all runs that ended"""
    exchanges: dict[Outcome, Durations] = field(
        default_factory=lambda: {outcome: Durations() for outcome in Outcome}
    )
    """those that this node began"""

    def run_ended(self, counters: Counters) -> None:
        self.ended = Counters(*map(add, astuple(self.ended), astuple(counters)))


@dataclass(frozen=True, slots=True)
class KeptReply:
    """What answered a fragment, until its initiator has acknowledged it."""

    buffer: memoryview
    halved: bool


@dataclass(slots=True)
class Run:
    """See the module's docstring."""

    spec: RunSpec
    replica: Replica
    codecs: Mapping[str, Codec]
    hand_over: HandOver
    tell: Tell
    responses: Responses[KeptReply]
    attached_at: float
    buffers: BufferPool
    partners: Callable[[], int]
    """how many peers this run can be averaged with now"""
    current: Initiation | None = None
    taken: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    """what a pull has brought so far: a donor that dies in the middle must not leave half a model"""
    unfinished: dict[NodeId, Initiation] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    distances: deque[float] = field(default_factory=lambda: deque(maxlen=DISTANCES_KEPT))
    step: int = 0
    loss: float | None = None
    samples: int = 0
    how: Beginning | None = None
    ours: bool = True
    """whose turn the hand-over buffers are: the node's, or the training's"""
    turn: trio.Lock = field(default_factory=trio.Lock)
    """held by whoever goes through all fragments"""
    meets: int = 0
    exchanged_at: float | None = None
    last_peer: NodeId | None = None

    @property
    def name(self) -> str:
        return self.spec.run

    @property
    def initiated(self) -> list[Initiation]:
        """Exchanges that this node began and has not finished."""
        return [*self.unfinished.values(), *([self.current] if self.current else [])]

    async def load(self) -> None:
        """w = the training's own first weights. Raises NotFinite."""
        await self._each_fragment(self.hand_over.begin)

    async def fill(self) -> None:
        """w = what a pull has brought, now that it is whole."""
        async with self.turn:
            await self._each_fragment(lambda index: self.replica.fill(index, self.taken))

    async def begin(self, donor: str | None) -> None:
        """The replica holds its first weights: hand them to the training. Set `how` before."""
        assert self.how is not None
        await self._offer({"event": "begun", "how": self.how.value, "from": donor})

    async def post(self, *, step: int, loss: float | None, samples: int) -> None:
        """The training's progress is in `posted`: merge it. Raises LocalProtocolError out of turn."""
        async with self.turn:
            if self.ours:
                raise LocalProtocolError("posted without an offer in hand")
            self.step, self.loss, self.samples = step, loss, samples
            whole = await self._each_fragment(self.hand_over.merge)
            self.ours = True  # only now: an offer overwrites what is being merged
        if not whole:
            self.counters.non_finite += 1
            self.tell({"event": "diverged", "step": step})

    def take_back(self) -> None:
        """The training gives an offer back unused, to get a newer one: nothing is merged.

        An offer that crosses this on its way is void: offers carry how often this was asked. So is one
        that is being written.
        """
        self.ours = True
        self.meets += 1

    async def offer(self) -> None:
        """The replica as it is now, for the training's next step; nothing if it has an offer."""
        await self._offer({"event": "offered"})

    async def _offer(self, event: dict[str, Any]) -> None:
        meets = self.meets
        async with self.turn:
            if not self.ours:
                return
            await self._each_fragment(self.hand_over.offer)
            if meets == self.meets:
                self.ours = False
                self.tell({**event, "meets": meets, "peers": self.partners()})

    async def _each_fragment(self, step: Callable[[int], bool | None]) -> bool:
        """Does `step` to one fragment after the other; False if any step said so.

        Between two the loop gets its turn: 400 MB at once would be a stall of 0.2 s.
        """
        whole = True
        for index in range(self.replica.fragments):
            if index:
                await trio.lowlevel.checkpoint()
            whole &= step(index) is not False
        return whole

    def crosses(self, index: int) -> bool:
        """Whether our own request for this fragment is in flight, or its answer may wait for us where
        a connection broke: then both sides take half."""
        return any(index in record.in_doubt for record in self.initiated)

    def drift(self, replicas: int) -> float | None:
        """Consensus distance: RMS over replicas of the distance to their mean.

        From pair distances d: E d^2 = 2 V / (n - 1) for random pairs, V = sum of squared distances
        to the mean. None before the first exchange.
        """
        if not self.distances or replicas < 2:
            return None
        mean = sum(self.distances) / len(self.distances)
        return float(((replicas - 1) / (2 * replicas) * mean) ** 0.5)


def make_run(
    spec: RunSpec,
    replica: Replica,
    codecs: Mapping[str, Codec],
    posted: Floats,
    offered: Floats,
    tell: Tell,
    partners: Callable[[], int],
    now: float,
) -> Run:
    """A run whose training has filled `posted` with its first weights: load() them next."""
    buffers = BufferPool(max(replica.body_bytes(0, codec) for codec in codecs.values()))
    return Run(
        spec=spec,
        replica=replica,
        codecs=codecs,
        hand_over=HandOver(replica, posted, offered),
        tell=tell,
        responses=Responses(replica.fragments, lambda kept: buffers.give(kept.buffer)),
        attached_at=now,
        buffers=buffers,
        partners=partners,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """One run on this node."""

    spec: RunSpec
    how: str | None
    step: int
    loss: float | None
    samples: int
    partners: int
    drift: float | None
    norm: float
    last_exchange_s: float | None
    last_peer: NodeId | None
    counters: Counters


def run_statistics(run: Run, partners: int, now: float) -> RunStatistics:
    """A frozen view of a run."""
    return RunStatistics(
        spec=run.spec,
        how=run.how.value if run.how else None,
        step=run.step,
        loss=run.loss,
        samples=run.samples,
        partners=partners,
        drift=run.drift(partners + 1),
        norm=run.replica.square_norm() ** 0.5,
        last_exchange_s=None if run.exchanged_at is None else now - run.exchanged_at,
        last_peer=run.last_peer,
        counters=run.counters,
    )
