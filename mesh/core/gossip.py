"""Dissemination: how a changed row reaches everybody, and who gets the full table when.

Rules: 1. What this node found itself goes to every connected peer; what it heard goes on to a few,
at random. 2. The full table goes out on every connect and to one random peer every 10 s: push/pull
repairs whatever gossip missed (without it 200 nodes did not agree in 60 s).
"""

import math
from collections.abc import Iterable, Sequence
from random import Random

from mesh.core.messages import Member, Members, NodeId

FANOUT = 3
"""Peers that hear a passed-on row, as memberlist's GossipNodes."""

PUSH_PULL_S = 10.0
"""Full-table repair; memberlist has 30 s for WANs and large tables, a LAN's table is a few kB."""

ROWS_PER_MESSAGE = 32
PAGE_BYTES = 48 * 1024
"""What one message may carry of a table, under the 64 KiB of a frame's header. A usual row is 300
bytes; one of 16 addresses and 16 runs with names of four-byte characters is 10 kB."""


def row_bytes(row: Member) -> int:
    """At least what a row takes on the wire: its text, and 12 bytes beside each piece of it."""
    texts = [row.node, row.name, *(address.host for address in row.addresses)]
    for info in row.runs:
        texts += [info.run, info.schema]
    return 32 + sum(12 + len(text.encode()) for text in texts)


def pages(rows: Sequence[Member], *, reply: bool) -> list[Members]:
    """A table as messages that fit into frames; only the last asks for the table in return."""
    found: list[list[Member]] = [[]]
    room = PAGE_BYTES
    for row in rows:
        size = row_bytes(row)
        if size > room or len(found[-1]) == ROWS_PER_MESSAGE:
            found.append([])
            room = PAGE_BYTES
        found[-1].append(row)
        room -= size
    return [Members(members=tuple(page), reply=reply and page is found[-1]) for page in found]


class Gossip:
    """Chooses who hears what."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._push_pull_at = math.inf

    def listeners(self, connected: Iterable[NodeId], *, source: NodeId | None) -> list[NodeId]:
        """Who is told of changed rows: everybody if they are our own news, else a few others."""
        others = sorted(node for node in connected if node != source)
        if source is None or len(others) <= FANOUT:
            return others
        return self._rng.sample(others, FANOUT)

    def due_push_pull(self, connected: Iterable[NodeId], now: float) -> NodeId | None:
        """The peer to swap full tables with now, if it is time."""
        peers = sorted(connected)
        if not peers:
            self._push_pull_at = math.inf
            return None
        if self._push_pull_at == math.inf:
            self._push_pull_at = now + PUSH_PULL_S
        if now < self._push_pull_at:
            return None
        self._push_pull_at = now + PUSH_PULL_S
        return self._rng.choice(peers)

    def next_deadline(self) -> float:
        return self._push_pull_at
