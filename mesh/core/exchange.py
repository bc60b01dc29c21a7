"""One exchange, both ends: what was sent, what was applied, what is in doubt. No numbers in here.

Initiator i streams fragments k = 0, 1, ...; responder j answers each, in order, with one delta:

    delta_k = decode(encode(x_i[k] - w_j[k]))
    w_j[k] += share(p_i, p_j) * delta_k        and j keeps the reply until i has acknowledged it
    w_i[k] -= share(p_j, p_i) * delta_k        when the reply arrives

Rules: 1. Both sides apply the same delta, additively, so sum(p * w) stays whatever else moved
meanwhile. 2. Each side applies each (exchange, k) once: i takes deltas strictly in order, j answers
a fragment that it has applied from the kept reply. 3. At most WINDOW fragments are in doubt: j
refuses more; i sends k only while k < received + AHEAD. 4. Where requests cross (j's own request for k is
in doubt) both take less, or two nodes would swap their values instead of meeting.

After a lost connection i opens the same exchange again with `start` = the deltas it has applied.
Sources: exactly-once pairwise averaging after Jesus, Baquero, Almeida (Flow Updating, 2015) in the
additive form; measured against naive push-pull, which loses 6 % of a spread at 10 % loss for ever.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import frexp
from typing import Generic, TypeVar

from mesh.core.messages import WINDOW, NodeId, Turn
from mesh.errors import LocalProtocolError, RemoteProtocolError

Reply = TypeVar("Reply")

AHEAD = 4
"""Of the WINDOW, as many as an initiator uses: 4 MiB keep a 1 Gbit/s link of 30 ms full. What the buffers of the
two sockets do not hold goes out as the responder acknowledges, in its own time: with 8 an exchange on one
machine took up to a third longer, and one in two did."""

RECORDS_LIMIT = 32
"""Exchanges that a responder keeps replies for: at most 32 windows of 8 MiB. Of nodes that went away in the
middle the one that began first is forgotten; if it comes back after all it is told so and begins anew."""

OVER_LIMIT = 1024
"""Nodes whose last exchange is known to be over; a number each."""


def share(theirs: float, mine: float, *, part: float = 1.0, turn: Turn | None = None) -> float:
    """The part of a delta that a side takes: FedAvg's weights, p_other / (p_self + p_other).

    `theirs` and `mine` are the weights p of the two replicas; they sum to more than 0. In an exact
    round the step is that of its `turn`.
    """
    step = part * (theirs / (mine + theirs)) if turn is None else turn.step
    return min(step, 1.0)  # whatever a peer said: nobody moves beyond the other


LEAST_PART = 1 / 64
"""Of a step; where less may be taken, nothing is."""


def part_beside(late: float, kept: float, step: float) -> float:
    """How much of its `step` a responder takes whose own requests for the fragment are in flight: as
    much as keeps it inside the hull of what went in, however many such answers overlap.

    Requests asked with x, and go `late` of the way from x when their answers come. So that much of x has
    to be left then; `kept` is left now, and an answer takes half of what may go. With equal weights the
    first takes half its step: two nodes that ask each other meet, and do not swap.
    """
    spare = (kept - late) / 2
    if spare >= step / 2:
        return 0.5
    if spare <= step * LEAST_PART:
        return 0.0
    _, exponent = frexp(spare / step)
    return 2.0 ** (exponent - 1)  # rounded down: what is halved in float32 stays exact


@dataclass(slots=True)
class Initiation:
    """An exchange as its initiator sees it: of the fragments [first, end). Those of
    [applied, sent_once) are in doubt."""

    exchange: int
    peer: NodeId
    end: int
    pull: bool
    codec: str
    """stays, however often the exchange is resumed: replies that are kept were written with it"""
    first: int = 0
    clip: bool = False
    turn: Turn | None = None
    reach: float | None = None
    """the longest delta that it may bring (guard.py); stays through resumes"""
    applied: int = field(init=False)
    sent: int = field(init=False)
    sent_once: int = field(init=False)
    square_distance: float = 0.0
    weight: float = 1.0
    """the responder's, as its row says: what step its answers will be"""
    kept: dict[int, float] = field(default_factory=dict)
    """of fragments in doubt, how much of what was asked with is in the replica still; of others, all"""
    ahead: int | None = None
    """refused out of turn: the peer's place in the rounds"""

    def __post_init__(self) -> None:
        self.applied = self.sent = self.sent_once = self.first

    clock: float = 0.0
    """what the responder is told of the mesh clock, at every opening of this exchange"""
    clock_answer: float | None = None
    """what it said, once it did"""

    @property
    def done(self) -> bool:
        return self.applied == self.end

    @property
    def in_doubt(self) -> range:
        """Fragments that the responder may have applied while we have not. Pulls leave none."""
        return range(self.applied, self.applied if self.pull else self.sent_once)

    def goes_on_at(self, index: int) -> None:
        """Of a pull: the fragments below came from another donor."""
        self.applied = self.sent = self.sent_once = index

    def next_to_send(self) -> int | None:
        """The fragment that may go out now; None while the window is full or all are out."""
        if self.sent == self.end or self.sent >= self.applied + AHEAD:
            return None
        return self.sent

    def fragment_sent(self) -> None:
        """Call *before* the first byte leaves: from then on it may arrive."""
        if self.next_to_send() is None:
            raise LocalProtocolError("sent beyond the window")
        self.sent += 1
        self.sent_once = max(self.sent_once, self.sent)

    def delta_arrived(self, index: int) -> None:
        """Checks that this delta is the next one; apply it right after, without waiting, and say
        delta_applied(): one that cannot be applied stays undone."""
        if index != self.applied or index >= self.sent:
            raise RemoteProtocolError(f"delta {index} came where {self.applied} was due")

    def delta_applied(self) -> None:
        self.kept.pop(self.applied, None)
        self.applied += 1

    def kept_of(self, index: int) -> float:
        """How much of what this fragment was asked with is in the replica still."""
        return self.kept.get(index, 1.0)

    def connection_lost(self) -> None:
        """Everything that was not answered goes out again on the next connection."""
        self.sent = self.applied


def answer_beside(asked: Iterable[Initiation], index: int, step: float, own: float) -> float:
    """How much of `step` a responder of weight `own` takes in answering a fragment. `asked`: its own
    exchanges, broken ones as well, whose answers may wait for it.

    Those may wait for ever: of a broken one it only counts that it is there, as if the weights were equal,
    or a heavy peer that vanished would leave nothing to take, and nobody would move any more.
    """
    doubtful = [record for record in asked if index in record.in_doubt]
    flying = [record for record in doubtful if index < record.sent]
    parts = [0.5] * len(doubtful)
    if flying:
        late = sum(share(record.weight, own) for record in flying)
        parts.append(part_beside(late, min(record.kept_of(index) for record in flying), step))
    return min(parts, default=1.0)


def moved(asked: Iterable[Initiation], index: int, step: float) -> None:
    """The replica went `step` of the way from what it asked with: less is left for answers to come."""
    for record in asked:
        if index in record.in_doubt:
            record.kept[index] = record.kept_of(index) - step


@dataclass(slots=True)
class _Record(Generic[Reply]):
    exchange: int
    terms: tuple[str, float, Turn | None]
    """codec, weight and turn of the first opening: kept replies were written on them"""
    applied: int
    end: int
    used: float = 0.0
    """square length of what was applied so far"""
    kept: deque[tuple[int, Reply]] = field(default_factory=deque)
    clock: float | None = None
    """what the initiator was told of the mesh clock"""


class Responses(Generic[Reply]):
    """All exchanges that one replica answers. `Reply` is whatever the caller keeps per fragment."""

    def __init__(self, fragments: int, release: Callable[[Reply], None]) -> None:
        """`release` gets every kept reply back once its initiator has acknowledged it."""
        self._fragments = fragments
        self._release = release
        self._records: dict[NodeId, _Record[Reply]] = {}
        """those that are under way"""
        self._over: dict[NodeId, int] = {}
        """the last exchange of a node that is over (all of it answered, refused, or forgotten to make room):
        what was sent of it may still arrive, and would be taken for new"""

    @property
    def kept_replies(self) -> int:
        return sum(len(record.kept) for record in self._records.values())

    def open(
        self,
        initiator: NodeId,
        exchange: int,
        start: int,
        codec: str,
        first: int = 0,
        end: int | None = None,
        *,
        weight: float = 1.0,
        turn: Turn | None = None,
        waits_for: Callable[[NodeId], bool] = lambda node: False,
    ) -> str | None:
        """Begins an exchange of the fragments [first, end), or resumes it at `start`, on the terms
        that it began with; returns why not, or None. Nobody whom the caller `waits_for` is forgotten
        for it."""
        terms = codec, weight, turn
        end = self._fragments if end is None else end
        if not first <= start <= end <= self._fragments:
            raise RemoteProtocolError(f"starts at {start} of {first}..{end}")
        record = self._records.get(initiator)
        if record is not None and record.exchange == exchange:
            if start > record.applied:
                raise RemoteProtocolError(f"resumes at {start}, applied {record.applied}")
            if record.terms != terms:
                raise RemoteProtocolError(f"resumes on {terms}, began on {record.terms}")
            return None
        if record is not None and exchange < record.exchange:
            raise RemoteProtocolError("exchange numbers of a node only rise")
        if start > first or exchange <= self._over.get(initiator, -1):
            return "this exchange is not known here"
        if record is None and len(self._records) >= RECORDS_LIMIT:
            left = next((node for node in self._records if not waits_for(node)), None)
            if left is None:
                return f"{RECORDS_LIMIT} others are at it: ask again, or somebody else"
            self._end(left, self._records[left].exchange)
        self.forget(initiator)
        self._records[initiator] = _Record(exchange=exchange, terms=terms, applied=first, end=end)
        return None

    def refuse(self, initiator: NodeId, exchange: int) -> bool:
        """The answer is no. Returns whether that is for ever: one that was opened before may be resumed
        another time, any other never is, though what was sent of it may still arrive."""
        record = self._records.get(initiator)
        if record is None or exchange > record.exchange:
            self._end(initiator, exchange)
        return not self.knows(initiator, exchange)

    def knows(self, initiator: NodeId, exchange: int) -> bool:
        """Whether this exchange was opened before: it is resumed, whatever has changed since."""
        record = self._records.get(initiator)
        return record is not None and record.exchange == exchange

    def used(self, initiator: NodeId, exchange: int) -> float:
        """Square length of the deltas that this exchange has brought so far."""
        return self._record(initiator, exchange).used

    def whole(self, initiator: NodeId, exchange: int) -> bool:
        """Whether every fragment of this exchange is applied here."""
        record = self._record(initiator, exchange)
        return record.applied == record.end

    def kept(self, initiator: NodeId, exchange: int, index: int, received: int) -> Reply | None:
        """Takes the acknowledgement, then finds the kept reply of a fragment applied before.

        None: the fragment is new, the caller applies it and calls applied(). Raises
        RemoteProtocolError for a fragment out of order, outside the window, or not asked for.
        """
        record = self._record(initiator, exchange)
        if not 0 <= received <= record.applied:
            raise RemoteProtocolError("acknowledges deltas that were never sent")
        while record.kept and record.kept[0][0] < received:
            self._release(record.kept.popleft()[1])
        if index == record.applied < record.end and len(record.kept) < WINDOW:
            return None
        for kept_index, reply in record.kept:
            if kept_index == index:
                return reply
        raise RemoteProtocolError(f"fragment {index} came where {record.applied} was due")

    def applied(
        self, initiator: NodeId, exchange: int, index: int, reply: Reply, square: float = 0.0
    ) -> None:
        """The fragment was applied and this is what answers it, now and after a lost connection.
        `square`: the delta's square length."""
        record = self._record(initiator, exchange)
        if index != record.applied:
            raise LocalProtocolError("applied out of order")
        record.applied += 1
        record.used += square
        record.kept.append((index, reply))

    def clock(self, initiator: NodeId, exchange: int, move: Callable[[], float]) -> float:
        """What `move` said of the mesh clock when this exchange was opened first; it is not asked
        again at a resume."""
        record = self._record(initiator, exchange)
        if record.clock is None:
            record.clock = move()
        return record.clock

    def finish(self, initiator: NodeId, exchange: int) -> None:
        """The initiator has every delta."""
        record = self._record(initiator, exchange)
        if record.applied == record.end:
            self._end(initiator, exchange)

    def forget(self, initiator: NodeId) -> None:
        """The initiator began another exchange: it will never ask for this one again."""
        record = self._records.pop(initiator, None)
        while record is not None and record.kept:
            self._release(record.kept.popleft()[1])

    def _end(self, initiator: NodeId, exchange: int) -> None:
        self.forget(initiator)
        last = max(exchange, self._over.pop(initiator, exchange))
        self._over[initiator] = last
        if len(self._over) > OVER_LIMIT:
            del self._over[next(iter(self._over))]

    def _record(self, initiator: NodeId, exchange: int) -> _Record[Reply]:
        record = self._records.get(initiator)
        if record is None or record.exchange != exchange:
            raise RemoteProtocolError("a fragment of an exchange that was not opened")
        return record
