"""The member table (SWIM, Das et al. 2002; words as in memberlist).

Rules: 1. A row is replaced only by a row that says more: higher incarnation, then later state (alive <
suspect < dead < left), then, of a suspect, more accusers. So merging is commutative, associative and
idempotent. 2. Only the owner raises its incarnation: to publish a change of its row, or to refute what
others say of it. 3. Incarnations are counters kept on disk in blocks, never a clock. 4. The dead and
the left are kept for an hour, so that nobody brings them back, and told to others for ten minutes; the dead
are looked for after that as well.

A row's trip: a peer's Members message -> merge() -> the rows that changed -> passed on by gossip.py.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b

from mesh.core.address import Address
from mesh.core.messages import (
    ACCUSERS_LIMIT,
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

LARGE = 32
"""Members up to which everybody is connected to everybody and hears of everything at once."""

KEEP_ENDED_S = 3600.0
"""A partition may last: its members are listed this long."""

LOST_LIMIT = 256
"""Dead members that are looked for when they are listed no more; one is every 10 s, so each within the hour."""

TELL_ENDED_S = 600.0
"""A death is told this long; were it told as long as it is kept, tables would hand it to each other
for ever."""


def supersedes(new: Member, old: Member) -> bool:
    """Whether `new` says more than `old` of the same node, accusers aside.

    Rows of equal incarnation and state are one row, unless an owner lost its disk and began again
    at the same number: then the content decides, the same way everywhere, until the owner hears of it.
    """
    if (new.incarnation, new.state) != (old.incarnation, old.state):
        return (new.incarnation, new.state) > (old.incarnation, old.state)
    return _content(new) > _content(old)


def _content(row: Member) -> str:
    return str((row.name, row.addresses, row.runs))


@lru_cache(maxsize=MEMBERS_LIMIT)
def known(row: Member) -> tuple[Member, int]:
    """(the one object for equal rows, its version). So what is kept for a row is found without comparing
    fields. A version is 64 bits of everything in a row: equal in two tables where the rows are.
    Kept, because in a simulation a thousand tables take in the same row."""
    text = f"{row.node} {row.incarnation} {int(row.state)} {row.accusers} {_content(row)}"
    return row, int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Membership:
    """All members that this node has heard of, itself included. Times are monotonic seconds."""

    def __init__(self, own: Member) -> None:
        self._own, own_version = known(own)
        self._others: dict[NodeId, Member] = {}
        self._ended_at: dict[NodeId, float] = {}
        self._lost: dict[NodeId, Member] = {}
        """last rows of the dead that are forgotten; those of long ago come first"""
        self._versions: dict[NodeId, int] = {own.node: own_version}
        self._by_version: dict[int, NodeId] = {own_version: own.node}
        self._trains: dict[NodeId, Member] = {}
        self.living = 1
        """members that are alive or suspect, this node included"""
        self.fingerprint = own_version
        """of all living rows: equal in two tables where those are"""

    @property
    def own(self) -> Member:
        return self._own

    @property
    def others(self) -> dict[NodeId, Member]:
        return self._others

    @property
    def trains(self) -> dict[NodeId, Member]:
        """The rows of others that name a run, so that those that name none need not be looked at."""
        return self._trains

    def living_others(self) -> list[NodeId]:
        """All that are alive or suspect here, this node aside."""
        if not self._ended_at:
            return list(self._others)
        return [node for node in self._others if node not in self._ended_at]

    def number_after(self, last: int) -> int:
        """For what rises for ever (exchanges, reports): above `last`, and above all that the process before
        used. Where the disk lost the incarnation, others tell of the old one, and it is raised above that."""
        return max(last, self._own.incarnation << 32) + 1

    def lost_others(self) -> list[Member]:
        """All that are dead here, or were when they were forgotten: they may be beyond a partition."""
        ended = (self._others[node] for node in self._ended_at)
        return [row for row in ended if row.state is State.DEAD] + [*self._lost.values()]

    @property
    def large(self) -> bool:
        """Whether there are too many members for everybody to be connected to everybody."""
        return self.living > LARGE

    def publish(
        self,
        *,
        addresses: tuple[Address, ...] | None = None,
        runs: tuple[RunInfo, ...] | None = None,
        state: State | None = None,
    ) -> Member:
        """Changes this node's own row and raises its incarnation; the caller passes the row on."""
        return self._own_row(
            replace(
                self._own,
                incarnation=min(self._own.incarnation + 1, INCARNATION_LIMIT - 1),
                addresses=self._own.addresses if addresses is None else addresses,
                runs=self._own.runs if runs is None else runs,
                state=self._own.state if state is None else state,
            )
        )

    def merge(self, rows: Iterable[Member], now: float = 0.0) -> list[Member]:
        """Takes in rows of another table; returns those that this table did not know yet.

        A rumour about this node itself is refuted: the row returned for it is its own, raised above.
        """
        news: list[Member] = []
        refuted = False
        for row in rows:
            # The last incarnation is for the living: an end at it could not be refuted.
            if row.incarnation >= INCARNATION_LIMIT - (row.state is not State.ALIVE):
                continue
            if row.node == self._own.node:
                refuted |= self._refute(row)
            elif (accepted := self._accept(row, now)) is not None:
                news.append(accepted)
        return [self._own, *news] if refuted else news

    def ended(self, row: Member) -> Member | None:
        """This table's row of a member that lives by `row` and is dead here, or left."""
        old = self._others.get(row.node)
        if old is None or row.state > State.SUSPECT or old.state <= State.SUSPECT:
            return None
        return old

    def declare(self, node: NodeId, state: State, now: float = 0.0) -> Member | None:
        """This node's own finding about another; None where it was known already. Of a suspicion
        this node becomes an accuser."""
        old = self._others.get(node)
        if old is None:
            return None
        accusers = (self._own.node,) if state is State.SUSPECT else ()
        return self._accept(replace(old, state=max(state, old.state), accusers=accusers), now)

    def expire(self, now: float) -> list[NodeId]:
        """Forgets those that ended an hour ago; returns them."""
        gone = [node for node, at in self._ended_at.items() if now - at > KEEP_ENDED_S]
        for node in gone:
            if self._others[node].state is State.DEAD:
                self._lost[node] = self._others[node]
            self._forget(node)
        for node in list(self._lost)[:-LOST_LIMIT]:
            del self._lost[node]
        return gone

    # ------------------------------------------------------------------------------ push/pull

    def versions(self, now: float) -> tuple[int, ...]:
        """Of every row that others are told."""
        if not self._ended_at:
            return tuple(self._versions.values())
        return tuple(v for node, v in self._versions.items() if self._is_told(node, now))

    def compare(self, theirs: Iterable[int], now: float) -> tuple[list[Member], tuple[int, ...]]:
        """(rows that a table of these versions lacks, versions that this one lacks)."""
        theirs, mine = set(theirs), self._by_version.keys()
        return self.rows_of(mine - theirs, now), tuple(sorted(theirs - mine))

    def rows_of(self, versions: Iterable[int], now: float) -> list[Member]:
        """The rows of these versions, as far as they are still what this table says."""
        found = (self._by_version.get(version) for version in sorted(versions))
        return [self._row(node) for node in found if node is not None and self._is_told(node, now)]

    def _row(self, node: NodeId) -> Member:
        return self._own if node == self._own.node else self._others[node]

    def _is_told(self, node: NodeId, now: float) -> bool:
        return now - self._ended_at.get(node, now) <= TELL_ENDED_S

    # ----------------------------------------------------------------------------------- rows

    def _accept(self, row: Member, now: float) -> Member | None:
        """The row as it stands now, if it changed."""
        old = self._others.get(row.node)
        if old is None:
            if len(self._others) >= MEMBERS_LIMIT and not self._forget_one():
                return None
        elif row is old or row == old:
            return None
        elif not supersedes(row, old):
            if row.state is not State.SUSPECT or supersedes(old, row):
                return None
            accusers = tuple(sorted({*old.accusers, *row.accusers})[:ACCUSERS_LIMIT])
            if accusers == old.accusers:
                return None
            row = replace(row, accusers=accusers)
        row, version = known(row)
        self._count_out(row.node)
        self._lost.pop(row.node, None)
        self._others[row.node] = row
        self._keep_version(row.node, version)
        if row.runs:
            self._trains[row.node] = row
        else:
            self._trains.pop(row.node, None)
        if row.state <= State.SUSPECT:
            self._ended_at.pop(row.node, None)
            self.living += 1
            self.fingerprint ^= version
        else:
            self._ended_at.setdefault(row.node, now)
        return row

    def _refute(self, rumour: Member) -> bool:
        own = self._own
        same = rumour.incarnation == own.incarnation and _content(rumour) != _content(own)
        if not same and not supersedes(rumour, own):
            return False
        raised = min(rumour.incarnation + 1, INCARNATION_LIMIT - 1)
        return self._own_row(replace(own, incarnation=raised)) != own

    def _own_row(self, row: Member) -> Member:
        self._own, version = known(row)
        self.fingerprint ^= self._versions[row.node] ^ version
        self._keep_version(row.node, version)
        return self._own

    def _keep_version(self, node: NodeId, version: int) -> None:
        self._by_version.pop(self._versions.get(node, -1), None)
        self._versions[node] = version
        self._by_version[version] = node

    def _count_out(self, node: NodeId) -> None:
        old = self._others.get(node)
        if old is not None and old.state <= State.SUSPECT:
            self.living -= 1
            self.fingerprint ^= self._versions[node]

    def _forget(self, node: NodeId) -> None:
        self._count_out(node)
        del self._others[node], self._by_version[self._versions.pop(node)]
        self._ended_at.pop(node, None)
        self._trains.pop(node, None)

    def _forget_one(self) -> bool:
        """Makes room by the member that ended first; the living are never forgotten."""
        if not self._ended_at:
            return False
        self._forget(next(iter(self._ended_at)))
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
