"""One run as its node holds it: the replica, the hand-over, the exchanges in progress, the figures.

A Run is made when a training attaches and dropped when it ends. Only tasks of the node touch it. What
they do to one fragment is one step, in which nothing waits; what they do to the whole model gives the
loop its turn between two fragments, and of these only one is under way at a time (`turn`), or the
training would be handed half of one model and half of another. Exchanges go on meanwhile.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio

from mesh.arrays import Floats, np
from mesh.buffers import BufferPool
from mesh.codec import EXACT, Codec
from mesh.core.clock import MeshClock
from mesh.core.events import Beginning
from mesh.core.exchange import Initiation, Responses
from mesh.core.guard import Guard
from mesh.core.messages import NodeId, SchemaEntry
from mesh.core.schema import digest, name_at, sizes
from mesh.core.strategies import CLIP_PEERS, OUTER, PAIR
from mesh.counters import Counters
from mesh.errors import LocalProtocolError
from mesh.outer import OuterMomentum
from mesh.replica import HandOver, Replica
from mesh.turn import Turn

CLIP_RECENT: Final = 2 * CLIP_PEERS
"""Distances whose smallest is the radius of `clip`: those of two rounds."""

CLIP_FAR: Final = 4.0
"""Radii within which honest replicas lie on uneven data; those that flip their signs lie at fifty."""

DISTANCES_KEPT: Final = 8
"""Pair distances that the drift is read from: the last few, or it would lag behind the training."""

PARTIAL_KEPT_S: Final = 60.0
"""For the next donor to be asked; after that the mesh has gone on too far for half a model of then
and half of now."""

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
    strategy: str = PAIR
    keeps: bool = False
    """it writes checkpoints: what the strategy keeps beside the replica goes to it with each offer"""
    resumes: bool = False
    """it brings that back from its checkpoint"""
    differences: bool = False
    """of each offer it wants what it has to add (replica.HandOver)"""
    step: int = 0
    """steps that the training made before it attached: they are in `clock` already"""
    clock: float = 0.0
    """its part of the mesh clock, of a training that attaches again or was resumed"""

    @property
    def schema(self) -> str:
        return digest(self.entries)

    @property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return sizes(self.entries)


@dataclass(frozen=True, slots=True)
class KeptReply:
    """What answered a fragment, until its initiator has acknowledged it."""

    buffer: memoryview
    part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """What a pull brought before its donor was lost: the fragments below `fragments` of `values`."""

    values: Floats
    fragments: int
    donor: NodeId
    resumes: bool
    """another donor may bring the rest (events.StartExchange)"""
    until: float


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
    partial: Partial | None = None
    """between two pulls: what the first one brought, for the next donor to complete"""
    ended: bool = False
    """the training is gone: nobody waits for what a pull would bring"""
    unfinished: dict[NodeId, Initiation] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    clock: MeshClock = field(default_factory=MeshClock)
    distances: deque[float] = field(default_factory=lambda: deque(maxlen=DISTANCES_KEPT))
    step: int = 0
    loss: float | None = None
    samples: int = 0
    how: Beginning | None = None
    ours: bool = True
    """whose turn the hand-over buffers are: the node's, or the training's"""
    guard: Guard = field(default_factory=Guard)
    outer: OuterMomentum | None = None
    kept: Floats | None = None
    """shared with the training as the hand-over's buffers are: what `outer` keeps, (2, entries)"""
    pulled: deque[float] = field(default_factory=lambda: deque(maxlen=CLIP_RECENT))
    """`clip`: how far the last replicas were that this one saw"""
    turn: Turn = field(default_factory=Turn)
    """held by whoever goes through all fragments"""
    meets: int = 0
    every: int | None = None
    """steps between hand-overs, where `mesh set every=` changed it"""
    paused: bool = False
    """`mesh pause`: nothing is begun and nothing answered"""
    exchanged_at: float | None = None
    last_duration_s: float | None = None
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
        if self.outer is not None:
            await self._each_fragment(self.outer.begin)
            if self.kept is not None and self.spec.resumes:
                await self._each_fragment(partial(self.outer.resume, kept=self.kept))

    def take_up(self, donor: NodeId, *, resumes: bool, now: float) -> int:
        """Makes room for a pull; returns the fragment at which it begins: above 0 where it goes on
        with what another brought a moment ago. Call broke_off() if it fails."""
        partial, self.partial = self.partial, None
        # Before a training begins its offer buffer is idle; one that trains is reading it.
        idle = self.hand_over.offered if self.how is None else None
        if (
            partial is not None
            and now < partial.until
            and (partial.donor == donor or (partial.resumes and resumes))
            and (partial.values is not self.hand_over.offered or idle is not None)
        ):
            self.taken = partial.values
            return partial.fragments
        self.taken = np.empty_like(self.replica.weights) if idle is None else idle
        return 0

    def broke_off(self, record: Initiation, *, resumes: bool, now: float) -> None:
        """A pull came to nothing: what it brought is kept for the next donor."""
        if record.applied:
            self.partial = Partial(
                values=self.taken,
                fragments=record.applied,
                donor=record.peer,
                resumes=resumes,
                until=now + PARTIAL_KEPT_S,
            )

    async def fill(self) -> None:
        """w = what a pull has brought, now that it is whole."""
        async with self.turn:
            await self._each_fragment(lambda index: self.replica.fill(index, self.taken))
            await self._begin_outer()
            if self.current is not None and self.current.clock_answer is not None:
                self.clock.take(self.current.clock_answer)

    async def mix_clipped(self) -> float:
        """w goes a quarter of the way to what a pull has brought, or less: as far as if it were no
        further away than the nearest of those seen lately, and beyond four times that distance less
        again, the further the less. Returns its square distance.

        Source: self-centred clipping, He, Karimireddy, Jaggi, "Byzantine-Robust Decentralized Learning
        via ClippedGossip" (2022), the radius being the smallest recent distance; beyond CLIP_FAR of it an
        influence that descends (Hampel's estimators), or liars far away would pull for ever.
        """
        square = 0.0

        def measure(index: int) -> None:
            nonlocal square
            square += self.replica.square_distance(index, self.taken)

        async with self.turn:
            await self._each_fragment(measure)
            self.pulled.append(square)
            if square and len(self.pulled) >= CLIP_PEERS:
                near = (min(self.pulled) / square) ** 0.5
                part = near * min(1.0, CLIP_FAR * near) / (CLIP_PEERS + 1)
                await self._each_fragment(
                    lambda index: self.replica.approach(index, self.taken, part)
                )
                if self.current is not None and self.current.clock_answer is not None:
                    self.clock.add(part * (self.current.clock_answer - self.clock.steps))
        return square

    async def step_outer(self) -> None:
        """An exchange has brought w to the mean of a pair: one outer step, where there are such."""
        if self.outer is not None:
            async with self.turn:
                await self._each_fragment(self.outer.step)

    async def _begin_outer(self) -> None:
        if self.outer is not None:
            await self._each_fragment(self.outer.begin)

    async def begin(self, donor: str | None) -> None:
        """The replica holds its first weights: hand them to the training. Set `how` before."""
        assert self.how is not None
        await self._offer({"event": "begun", "how": self.how.value, "from": donor})

    async def post(self, *, step: int, loss: float | None, samples: int) -> None:
        """The training's progress is in `posted`: merge it. Raises LocalProtocolError out of turn."""
        async with self.turn:
            if self.ours:
                raise LocalProtocolError("posted without an offer in hand")
            self.clock.add(max(0, step - self.step))
            self.step, self.loss, self.samples = step, loss, samples
            self.hand_over.lost = None
            await self._each_fragment(self.hand_over.merge)
            lost = self.hand_over.lost
            if not self.partners():
                await self._begin_outer()
            self.ours = True  # only now: an offer overwrites what is being merged
        if lost is not None:
            self.counters.non_finite += 1
            tensor = name_at(self.spec.entries, lost)
            self.tell({"event": "diverged", "step": step, "tensor": tensor})

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
            if self.outer is not None and self.kept is not None:
                await self._each_fragment(partial(self.outer.keep, kept=self.kept))
            if meets == self.meets:
                self.ours = False
                news = {"meets": meets, "peers": self.partners(), "clock": self.clock.steps}
                if self.every is not None:
                    news["every"] = self.every
                self.tell({**event, **news})

    async def _each_fragment(self, step: Callable[[int], object]) -> None:
        """Does `step` to one fragment after the other.

        Between two the loop gets its turn: 400 MB at once would be a stall of 0.2 s.
        """
        for index in range(self.replica.fragments):
            if index:
                await trio.lowlevel.checkpoint()
            step(index)

    def reach(self) -> float | None:
        """The longest delta that an exchange may bring now; see core/guard.py."""
        progress, norm = self.replica.square_progress(), self.replica.square_norm()
        return self.guard.reach(progress**0.5, norm**0.5)

    def clock_crosses(self) -> bool:
        """Whether our own part of the mesh clock is on its way to somebody: as with fragments
        (exchange.answer_beside), less is taken then."""
        return any(not record.pull and record.clock_answer is None for record in self.initiated)

    def clock_answered(self, record: Initiation, said: float, weight: float) -> None:
        """A responder of weight p = `weight` opened our exchange, for the first time or again.

        What it says again is what it said before. If not, it died and has moved its part once more.
        """
        if said == record.clock_answer:
            return
        record.clock_answer = said
        if not record.pull:
            self.clock.answered(record.clock, said, weight, self.spec.weight)

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
    kept: Floats | None = None,
) -> Run:
    """A run whose training has filled `posted` with its first weights: load() them next."""
    buffers = BufferPool(max(replica.body_bytes(0, codec) for codec in codecs.values()))
    return Run(
        spec=spec,
        replica=replica,
        codecs=codecs,
        hand_over=HandOver(replica, posted, offered, differences=spec.differences),
        tell=tell,
        responses=Responses(replica.fragments, lambda kept: buffers.give(kept.buffer)),
        attached_at=now,
        buffers=buffers,
        partners=partners,
        outer=OuterMomentum(replica) if spec.strategy == OUTER else None,
        kept=kept,
        step=spec.step,
        clock=MeshClock(spec.clock),
    )
