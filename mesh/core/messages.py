"""What nodes say to each other. Frozen values; mesh/wire.py turns them into bytes and back. What they
say only because a person may ask is in for_people.py, under the same rules.

Rules: 1. numbers on the wire are positions in wire.MESSAGES: append, never reorder. 2. Fields are
only ever appended to a message. 3. `protocol` and `name` stay the first fields of message 0 and
`Refusal` stays message 1 for ever, so that nodes of any two versions can say why they cannot talk.
"""

from dataclasses import dataclass, field
from enum import IntEnum

from mesh.core import address
from mesh.core.address import Address
from mesh.core.for_people import Answer, BenchBlock, BenchEcho, Question, Reports

NodeId = address.NodeId

PROTOCOL = 6
"""Version of everything in this file. Nodes of different versions list each other as incompatible."""

FRAGMENT_ENTRIES = 262_144
"""Entries of one fragment: 1 MiB of float32. Large enough that a header and a wake-up of the loop
cost nothing beside it, small enough that the loop never stalls for more than about 3 ms."""

WINDOW = 8
"""Fragments of one exchange that may be in doubt at once: 8 MiB bound what a crash can take with it and what
a responder keeps for a lost connection. An initiator of this version uses half (exchange.AHEAD)."""


def short(node: NodeId) -> str:
    """The part of a node id that people read and type."""
    return node[:8]


class State(IntEnum):
    """What the mesh believes of a member. At equal incarnation the larger wins (SWIM)."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One training of a member, as it tells the others."""

    run: str
    schema: str
    """hash of the names, shapes and dtypes that are averaged; equal or no exchange"""
    started: bool
    """its training has begun: its weights are its own, not a first draw"""
    exchanged: bool
    """its weights have met another's: they are the mesh's, to be taken by those that never met one"""
    progress: int = 0
    """how far it came before it met anybody: bits of its count of hand-overs, so that it changes
    seldom; of two that trained alone the one that came further gives"""
    strategy: str = "pair"
    """how it averages (core/strategies.py); equal or no exchange"""
    weight: float = 1.0
    """p: its replica's part in the average"""


ACCUSERS_LIMIT = 4
"""Members that a suspicion names: the first accuser and the three that confirm it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One row of the member table. Only the member itself changes anything but state and accusers."""

    node: NodeId
    name: str
    incarnation: int
    state: State
    addresses: tuple[Address, ...]
    runs: tuple[RunInfo, ...]
    accusers: tuple[NodeId, ...] = ()
    """of a suspect: who found it silent, each by itself; the ACCUSERS_LIMIT lowest ids, in order"""

    def __hash__(self) -> int:
        """Rows are kept in caches, and hardly two differ in anything else alone."""
        return hash((self.node, self.incarnation))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaEntry:
    """One tensor of a schema: what both sides must agree on before numbers travel."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """one of mesh/dtypes.py"""


class Purpose(IntEnum):
    """What a connection is for. A ping behind 100 MB of weights would look like a death."""

    CONTROL = 0
    BULK = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of each side of every connection."""

    protocol: int
    name: str
    purpose: Purpose
    member: Member
    instance: int
    """drawn at random when the process started: two at once with one node id are a copied identity"""
    age_ms: int
    """how long the process runs, by its own monotonic clock: of two the younger has to go"""
    offer: str = field(default="", repr=False)
    """keys for what the sender sends on this connection if it is for bulk (Stream.seal); secret"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherVersion:
    """What a Hello of another protocol version is read as: nothing behind these two is understood."""

    protocol: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why the sender closes this connection; the last frame on it."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Rows of the sender's table: news, or what the receiver's table lacked."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """A probe. `table` is the sender's fingerprint of the living rows: where the two differ, tables
    are compared (Versions)."""

    sequence: int
    table: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    sequence: int
    table: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaRequest:
    """Asks for entries of a run's schema from `start` on, to say which layer differs."""

    run: str
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaPage:
    run: str
    start: int
    total: int
    entries: tuple[SchemaEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A place in the rounds of an exact average (core/strategies.py)."""

    view: str
    """hash of the nodes that take part: another set, other rounds"""
    position: int
    """rounds since the first of this view"""
    step: float
    """the part of the difference that both sides take in this round"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenExchange:
    """The initiator asks for an exchange, or takes one up again from fragment `start`.

    `pull` is an exchange of weight 0: the initiator brings nothing and takes the responder's weights.
    """

    exchange: int
    run: str
    schema: str
    weight: float
    start: int
    pull: bool
    started: bool
    exchanged: bool
    progress: int
    codec: str
    """how fragments and deltas are written, both ways (mesh/codec.py)"""
    strategy: str = "pair"
    first: int = 0
    """the exchange is about the fragments [first, end)"""
    end: int | None = None
    """None: to the last"""
    reach: float | None = None
    """the longest delta, as a norm, that the initiator lets this exchange apply; None: any"""
    turn: Turn | None = None
    clock: float = 0.0
    """the initiator's part of the mesh clock when it began this exchange; the same at every resume"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeOpened:
    """The responder's yes, with its own weight p."""

    exchange: int
    weight: float
    clock: float = 0.0
    """the responder's part of the mesh clock (core/clock.py); the same at every resume"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRefused:
    """The responder's no. `unknown`: it has answered nothing of this exchange and never will; one that it
    has begun to answer is to be resumed later."""

    exchange: int
    reason: str
    unknown: bool
    position: int | None = None
    """the responder's place in the rounds, where the request came for another: ask again soon"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Fragment `index` of the initiator follows as the frame's body (none in a pull).

    `received` acknowledges: the initiator has applied the deltas of all fragments below it.
    """

    exchange: int
    index: int
    received: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The responder's answer to a fragment; the encoded difference follows as the frame's body.

    `part`: of their steps that both sides take; less than 1 where the responder's own request for this
    fragment was in flight.
    """

    exchange: int
    index: int
    part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishExchange:
    """The initiator has every delta: the responder keeps nothing of this exchange any more."""

    exchange: int


class Verdict(IntEnum):
    """What a helper found when it was asked to probe somebody."""

    REACHED = 0
    SILENT = 1
    REFUSED = 2
    """the machine answers, and nobody listens there"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PingRequest:
    """Asks the receiver to probe `node` in the sender's place (SWIM's ping-req)."""

    sequence: int
    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class PingReport:
    """The helper's answer. Silence is answered too (Lifeguard's nack): it tells the asker that at
    least its own ears work."""

    sequence: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Push/pull, first half: a 64-bit version of each row of the sender's table. The receiver answers
    with the rows that the sender lacks (Members) and asks for those that it lacks itself (Wanted)."""

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Push/pull, second half: asks for the rows of these versions."""

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityTaken:
    """Another process with the receiver's node id runs, for longer, and says that it listens there.
    The receiver believes only what it sees: it dials, and stops where an older self answers."""

    addresses: tuple[Address, ...]


ControlMessage = (
    Refusal
    | Members
    | Ping
    | Ack
    | SchemaRequest
    | SchemaPage
    | PingRequest
    | PingReport
    | Versions
    | Wanted
    | IdentityTaken
    | Reports
    | Question
    | Answer
)
BulkMessage = (
    OpenExchange
    | ExchangeOpened
    | ExchangeRefused
    | Fragment
    | Delta
    | FinishExchange
    | SchemaRequest
    | SchemaPage
    | Refusal
    | BenchBlock
    | BenchEcho
)
Message = Hello | OtherVersion | ControlMessage | BulkMessage
