"""The member table (SWIM, Das et al. 2002; words as in memberlist).

Rules: 1. A row is replaced only by a row of higher incarnation, or of equal incarnation and later
state (alive < suspect < dead < left), so merging is commutative, associative and idempotent. 2. Only
the owner raises its incarnation: to publish a change of its row, or to refute a rumour of its end.
3. Incarnations are counters kept on disk in blocks, never a clock.

A row's trip: a peer's Members message -> merge() -> the rows that changed -> passed on by gossip.py.
"""

from collections.abc import Iterable
from dataclasses import replace

from mesh.core.address import Address
from mesh.core.messages import (
    Member,
    NodeId,
    RunInfo,
    State,
)

INCARNATION_BLOCK = 1024
"""Incarnations reserved on disk at a time: publishing a change costs no write, and a restart skips
to the next block, above anything the last process can have said."""

MEMBERS_LIMIT = 4096
"""Rows in a table. A member of the mesh could invent nodes; it cannot make us hold more than this."""

INCARNATION_LIMIT = 2**31
"""No honest node gets here (a restart every minute for four years, or a change each second for 68);
rows beyond are refused. Exchange numbers begin at a node's incarnation times 2**32, so they fit into
63 bits."""


def supersedes(new: Member, old: Member) -> bool:
    """Whether `new` says more than `old` of the same node."""
    return (new.incarnation, new.state) > (old.incarnation, old.state)


class Membership:
    """All members that this node has heard of, itself included."""

    def __init__(self, own: Member) -> None:
        self._own = own
        self._others: dict[NodeId, Member] = {}

    @property
    def own(self) -> Member:
        return self._own

    @property
    def others(self) -> dict[NodeId, Member]:
        return self._others

    def rows(self) -> list[Member]:
        """The full table, for push/pull."""
        return [self._own, *self._others.values()]

    def publish(
        self,
        *,
        addresses: tuple[Address, ...] | None = None,
        runs: tuple[RunInfo, ...] | None = None,
        state: State | None = None,
    ) -> Member:
        """Changes this node's own row and raises its incarnation; the caller passes the row on."""
        self._own = replace(
            self._own,
            incarnation=min(self._own.incarnation + 1, INCARNATION_LIMIT - 1),
            addresses=self._own.addresses if addresses is None else addresses,
            runs=self._own.runs if runs is None else runs,
            state=self._own.state if state is None else state,
        )
        return self._own

    def merge(self, rows: Iterable[Member]) -> list[Member]:
        """Takes in rows of another table; returns those that this table did not know yet.

        A rumour about this node itself is refuted: the row returned for it is its own, raised above.
        """
        news: list[Member] = []
        refuted = False
        for row in rows:
            if row.incarnation >= INCARNATION_LIMIT:
                continue
            if row.node == self._own.node:
                refuted |= self._refute(row)
            elif self._accept(row):
                news.append(row)
        return [self._own, *news] if refuted else news

    def declare(self, node: NodeId, state: State) -> Member | None:
        """This node's own finding about another; None where it was known already."""
        old = self._others.get(node)
        if old is None or state <= old.state:
            return None
        self._others[node] = replace(old, state=state)
        return self._others[node]

    def _accept(self, row: Member) -> bool:
        old = self._others.get(row.node)
        if old is None:
            if len(self._others) >= MEMBERS_LIMIT and not self._forget_one():
                return False
        elif not supersedes(row, old):
            return False
        self._others[row.node] = row
        return True

    def _refute(self, rumour: Member) -> bool:
        if not supersedes(rumour, self._own):
            return False
        raised = min(rumour.incarnation + 1, INCARNATION_LIMIT - 1)
        self._own = replace(self._own, incarnation=raised)
        return True

    def _forget_one(self) -> bool:
        """Makes room by a member that left or died; the living are never forgotten."""
        gone = next((m.node for m in self._others.values() if m.state >= State.DEAD), None)
        if gone is None:
            return False
        del self._others[gone]
        return True


def first_row(node: NodeId, name: str, incarnation: int, addresses: tuple[Address, ...]) -> Member:
    """The row that a node starts with."""
    return Member(
        node=node,
        name=name,
        incarnation=incarnation,
        state=State.ALIVE,
        addresses=addresses,
        runs=(),
    )
