"""Dissemination: how a changed row reaches everybody, and how two tables become one (push/pull).

Rules: 1. What this node found itself goes to every connected peer; what it heard goes on to a few, at
random; but in a mesh where everybody is connected to everybody, what a node says of itself it has said
to all. 2. Each probe carries a fingerprint of the sender's table: where the two differ, versions are
swapped and then the rows that either side lacks, on every connect and at every later probe. So whatever
news missed arrives with the next probe, and two large tables that agree cost eight bytes to compare.
3. In a large mesh newcomers' rows travel by rule 2 only: a thousand nodes that start together would
send each other three million rumours.

A row's trip: found -> news(), or heard -> pass_on() -> Members -> the peer's merge(); or Ping -> Ack
with another fingerprint -> compare() -> Versions -> answer() -> Members and Wanted -> Members.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from random import Random

from mesh.core import events as ev
from mesh.core.contacts import Connection, Contacts
from mesh.core.membership import MEMBERS_LIMIT, Membership
from mesh.core.messages import (
    ControlMessage,
    Member,
    Members,
    NodeId,
    Versions,
    Wanted,
)

FANOUT = 3
"""Peers that hear a passed-on row, as memberlist's GossipNodes."""

GOSSIP_S = 0.2
"""In a large mesh what was heard is passed on together, this often (memberlist's GossipInterval): a
node's messages do not grow with the number of those that publish."""

ASK_S = 0.5
"""In a large mesh, between two times that a node asks for rows, by a push/pull that it begins or by
Wanted: a newcomer that 25 others compare tables with would ask each for the same thousand rows."""

ANSWER_S = 0.1
"""Between two answers of one kind to one peer: a table of 4096 rows takes 0.1 s of the loop, and a
member that asked for it again and again would stop it. Who asks in earnest asks with each probe."""

ROWS_PER_MESSAGE = 32
PAGE_BYTES = 48 * 1024
"""What one message may carry of a table, under the 64 KiB of a frame's header. A usual row is 300
bytes; one of 16 addresses and 16 runs with names of four-byte characters is 10 kB."""


@lru_cache(maxsize=MEMBERS_LIMIT)
def row_bytes(row: Member) -> int:
    """At least what a row takes on the wire: its text, and 12 bytes beside each piece of it, of which a
    run's numbers take a half. Kept: each newcomer to a large mesh is told all rows."""
    texts = [row.node, row.name, *(address.host for address in row.addresses), *row.accusers]
    for info in row.runs:
        texts += [info.run, info.schema, info.strategy]
    return 32 + sum(12 + len(text.encode()) for text in texts)


def pages(rows: Sequence[Member]) -> list[Members]:
    """A table as messages that fit into frames."""
    found: list[list[Member]] = [[]]
    room = PAGE_BYTES
    for row in rows:
        size = row_bytes(row)
        if size > room or len(found[-1]) == ROWS_PER_MESSAGE:
            found.append([])
            room = PAGE_BYTES
        found[-1].append(row)
        room -= size
    return [Members(members=tuple(page)) for page in found if page]


class Gossip:
    """Chooses who hears what. `contacts` and `membership` belong to the protocol; read only."""

    def __init__(self, membership: Membership, contacts: Contacts, rng: Random) -> None:
        self._membership = membership
        self._contacts = contacts
        self._connections: Mapping[NodeId, Connection] = contacts.connections
        self._rng = rng
        self._heard: dict[NodeId, None] = {}
        """whose rows are to be passed on, in a large mesh"""
        self._pass_on_at = math.inf
        self._ask_at = -math.inf
        self._asked: dict[tuple[NodeId, type], float] = {}
        """when each peer asked last, in each of the two ways"""

    def send(self, node: NodeId, *messages: ControlMessage) -> list[ev.Effect]:
        """To a peer, if it is connected."""
        connection = self._connections.get(node)
        if connection is None:
            return []
        return [ev.Send(connection=connection.number, message=message) for message in messages]

    def news(self, rows: Sequence[Member]) -> list[ev.Effect]:
        """Tells every connected peer what this node found itself."""
        return self._tell(rows, sorted(self._connections))

    def pass_on(
        self, rows: Sequence[Member], source: NodeId, newcomers: set[NodeId], now: float
    ) -> list[ev.Effect]:
        """Tells a few of what was heard from `source`; in a large mesh a little later."""
        if not self._membership.large:
            rows = [row for row in rows if row.node != source]
            return self._tell(rows, self._few(source))
        self._heard.update((row.node, None) for row in rows if row.node not in newcomers)
        if self._heard and self._pass_on_at == math.inf:
            self._pass_on_at = now + GOSSIP_S
        return []

    def next_deadline(self) -> float:
        return self._pass_on_at

    def on_deadline(self, now: float) -> list[ev.Effect]:
        """Passes on what was heard since the last time."""
        if now < self._pass_on_at:
            return []
        others = self._membership.others
        rows = [others[node] for node in self._heard if node in others]
        self._heard, self._pass_on_at = {}, math.inf
        return self._tell(rows, self._few(None))

    def compare(self, node: NodeId, table: int, now: float) -> list[ev.Effect]:
        """A peer's fingerprint arrived: where it is not ours, begins a push/pull."""
        if table == self._membership.fingerprint or not self._may_ask(now):
            return []
        return self.send(node, Versions(versions=self._membership.versions(now)))

    def answer(self, node: NodeId, message: Versions | Wanted, now: float) -> list[ev.Effect]:
        """The rows that the peer lacks; asks for those that this table lacks."""
        asked = node, type(message)
        if now - self._asked.get(asked, -math.inf) < ANSWER_S:
            return []
        self._asked = {a: at for a, at in self._asked.items() if a[0] in self._connections}
        self._asked[asked] = now
        if isinstance(message, Wanted):
            return self.send(node, *pages(self._membership.rows_of(message.versions, now)))
        lacked, wanted = self._membership.compare(message.versions, now)
        effects = self.send(node, *pages(lacked))
        if wanted and self._may_ask(now):
            effects += self.send(node, Wanted(versions=wanted))
        return effects

    def _may_ask(self, now: float) -> bool:
        if now < self._ask_at:
            return False
        if self._contacts.limited:  # before the table knows how large the mesh is, mDNS does
            self._ask_at = now + ASK_S
        return True

    def _few(self, source: NodeId | None) -> list[NodeId]:
        others = sorted(node for node in self._connections if node != source)
        return self._rng.sample(others, min(FANOUT, len(others)))

    def _tell(self, rows: Sequence[Member], listeners: Iterable[NodeId]) -> list[ev.Effect]:
        messages = pages(rows)
        return [effect for node in listeners for effect in self.send(node, *messages)]
