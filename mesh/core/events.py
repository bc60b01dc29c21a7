"""What can happen to a node (events), and what its protocol asks for in return (effects).

Rules: 1. Both are frozen. 2. mesh/node.py is the only file that makes events out of the world and
performs effects on it. 3. A connection is known here by the number that the node gave it.
"""

from dataclasses import dataclass
from enum import Enum

from mesh.core.address import Address
from mesh.core.for_people import Argument, Figures
from mesh.core.messages import ControlMessage, Hello, NodeId, SchemaEntry, Turn

# ------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateFound:
    """Somebody may listen there. A candidate is a rumour: only TLS makes a peer of it."""

    addresses: tuple[Address, ...]
    source: str
    """mdns, peer (given by hand: retried for ever) or cache"""
    hint: str = ""
    """the prefix of the node id that mDNS announced; saves a dial where it is connected already"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConnected:
    """A control connection passed TLS and both hellos. `contact` is set where we dialled."""

    node: NodeId
    connection: int
    hello: Hello
    contact: str | None
    host: str = ""
    """where the other end is, without its port"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialFailed:
    """Every address of a contact was tried. `refused`: at least one answered that nobody listens."""

    contact: str
    refused: bool
    reason: str
    itself: bool = False
    """the node id on the other end was our own (docker0's 172.17.0.1 leads back here)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerIncompatible:
    """A node of this mesh that speaks another protocol version; it was told so."""

    node: NodeId
    name: str
    reason: str
    contact: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    node: NodeId
    connection: int
    reason: str
    told: bool = False
    """the peer said why it closes: no sign of its death"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinMet:
    """This node dialled, or was dialled by, an older process with its own node id."""

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    node: NodeId
    connection: int
    message: ControlMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressesChanged:
    """This node listens on these addresses now."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAttached:
    """A training process attached. `started`: it trained before (its node died under it)."""

    run: str
    schema: str
    entries: tuple[SchemaEntry, ...]
    sync_timeout_s: float
    started: bool
    exchanged: bool
    strategy: str = "pair"
    weight: float = 1.0
    posts: int = 0
    """hand-overs that it made before, as its steps tell: a checkpoint's count"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetached:
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """The training handed over its progress. `waits`: it wants the next exchange's result."""

    run: str
    waits: bool
    figures: Figures | None = None
    """how the run does, for the others"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeAnswered:
    """A partner's request at this place in the rounds was answered in full."""

    run: str
    turn: Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsServed:
    """Another node averaged with this run's replica, or took it: it is the mesh's from now on."""

    run: str


class Outcome(Enum):
    COMPLETED = "completed"
    REFUSED = "refused"
    INTERRUPTED = "interrupted"
    """connection lost with fragments in doubt: taken up again with the same peer"""
    ABANDONED = "abandoned"
    """nothing is in doubt, or the peer holds nothing of it any more"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeEnded:
    run: str
    peer: NodeId
    pull: bool
    outcome: Outcome
    reason: str
    duration_s: float
    square_distance: float
    square_norm: float
    clip: bool = False
    ahead: int | None = None
    """refused out of turn: the peer's place in the rounds"""
    turn: Turn | None = None
    """its own, of an exact round"""
    brought: int = 0
    """fragments that a pull brought, whatever its outcome"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A program of this machine asks another node; answer with Told, in time whatever happens."""

    number: int
    """drawn at random: who does not see the question cannot answer it"""
    target: NodeId
    op: str
    arguments: tuple[Argument, ...]
    within_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Performed:
    """What this node answers to a Perform: a JSON object as ASCII."""

    asker: NodeId
    number: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseChanged:
    """A run of this node begins no exchanges for now, or begins them again."""

    run: str
    paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """This node stops on purpose: tell the others, so that nobody looks for it."""


Event = (
    CandidateFound
    | PeerConnected
    | DialFailed
    | PeerIncompatible
    | PeerLost
    | TwinMet
    | Received
    | AddressesChanged
    | RunAttached
    | RunDetached
    | Posted
    | WeightsServed
    | ExchangeAnswered
    | ExchangeEnded
    | Ask
    | Performed
    | PauseChanged
    | Leaving
)

# ------------------------------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Dial:
    """Open a control connection; answer with PeerConnected, PeerIncompatible or DialFailed."""

    contact: str
    addresses: tuple[Address, ...]
    proved_host: str = ""
    """where this node was last time: if that refuses, its process is gone, whatever its other
    addresses (docker's, a VPN's) say or fail to say"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    connection: int
    message: ControlMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Hangup:
    """Close a connection, after telling the peer why."""

    connection: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakOff:
    """The peer may be gone: end the exchange that this node has begun with it, so that others get
    their turn; what is in doubt is resumed when it is back."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The peer is dead: BreakOff, and end its connections at once, without a word."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class DropExchange:
    """Keep nothing of the exchange with `peer` that was broken off: it cannot be resumed any more."""

    run: str
    peer: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartExchange:
    """Average with `peer` (or take its weights: `pull`); answer with ExchangeEnded.

    `rest`: nothing new was posted. Numbers travel exactly then, or replicas whose codec rounds would
    never agree.
    """

    run: str
    peer: NodeId
    addresses: tuple[Address, ...]
    exchange: int
    pull: bool
    rest: bool = False
    part: int | None = None
    """which part of the model in turn; None: all of it"""
    clip: bool = False
    """mix what was pulled, clipped, instead of taking it"""
    turn: Turn | None = None
    weight: float = 1.0
    """p of the peer's replica, as its row says"""
    resumes: bool = False
    """of a pull: it may go on where another donor's broke off. This donor has met the mesh; if the
    last one had as well, the two hold nearly the same weights, and one model may come from both"""


class Beginning(Enum):
    """How a run got its first weights."""

    ALONE = "alone"
    """nobody else was found within sync_timeout"""
    FIRST = "first"
    """lowest node id of nodes that started together: the others take its initial weights"""
    DONOR = "donor"
    """taken from a peer"""
    AGAIN = "again"
    """the training had begun before and lost its node"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """The run's replica holds its first weights: let the training have them and go."""

    run: str
    how: Beginning
    donor: NodeId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The exchange that the training waits for is over, or there is nobody to average with."""

    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIncarnation:
    """Keep this on disk: incarnations below it are spent."""

    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something that a person may want to know, in one line."""

    text: str
    kind: str = "note"
    """up, suspect, dead, left, incompatible, ...: for whoever filters events"""
    node: NodeId | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Perform:
    """Another node asks this one: answer with Performed."""

    asker: NodeId
    number: int
    op: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What came of an Ask: the text of the answer, or why there is none (`gone`, `timeout`)."""

    number: int
    text: str = ""
    failure: str = ""
    hops: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """This node must not go on: end the process, with this reason."""

    reason: str


Effect = (
    Dial
    | Send
    | Hangup
    | BreakOff
    | Abandon
    | DropExchange
    | StartExchange
    | Begin
    | Offer
    | StoreIncarnation
    | Note
    | Perform
    | Told
    | Stop
)
