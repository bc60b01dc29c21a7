"""Two processes with one node id: a copied state directory, told apart from a restart.

A check's trip: a peer connects with another instance than the one that is connected already. Usually
the old process is gone and only its connection lingers, so the new one is used from now on; meanwhile
the old connection is pinged. If it answers, both processes live, and the younger one has to go. If it
stays silent, or ends, it was a restart. The younger believes no peer's word: it dials the older and
stops when TLS and an older Hello prove that itself runs there.
"""

import math
from dataclasses import dataclass

from mesh.core.contacts import Connection
from mesh.core.messages import NodeId

CHECK_S = 2.0
"""For the old connection's answer: three lost packets."""

LOOK_S = 10.0
"""Between two looks at where this node is said to run as well: sixteen addresses are dialled for each, and
a member could say it for ever."""

CHECKS_LIMIT = 64
"""At once: a member that connects under ever new instances cannot make this node keep more."""

FIRST_SEQUENCE = 2**62
"""Above the probes of the detector: an answer to one of those that was under way proves nothing."""

TAKEN = (
    "another process with this node's identity runs {where}, and for longer: this state directory was "
    "copied. A machine needs its own: choose an empty directory with --state and `mesh join` there"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Whether the process behind `old` still lives."""

    node: NodeId
    old: Connection
    new: Connection
    sequence: int
    deadline: float

    @property
    def younger(self) -> Connection:
        return self.new if self.new.began_at >= self.old.began_at else self.old


class Twins:
    """The checks under way, by the number of the old connection."""

    def __init__(self) -> None:
        self._checks: dict[int, Check] = {}
        self._sequence = FIRST_SEQUENCE
        self._look_at = -math.inf

    def look(self, now: float) -> bool:
        """Whether what a peer says of a copy of this node is looked into."""
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_S
        return True

    def begin(self, node: NodeId, old: Connection, new: Connection, now: float) -> int | None:
        """The sequence number of the ping that the old connection has to answer; None if there are
        too many checks already."""
        if len(self._checks) >= CHECKS_LIMIT:
            return None
        self._sequence += 1
        self._checks[old.number] = Check(
            node=node, old=old, new=new, sequence=self._sequence, deadline=now + CHECK_S
        )
        return self._sequence

    def answered(self, connection: int, sequence: int) -> Check | None:
        """The check that this answer decides: both processes live."""
        check = self._checks.get(connection)
        if check is None or check.sequence != sequence:
            return None
        return self._checks.pop(connection)

    def ended(self, connection: int) -> None:
        self._checks.pop(connection, None)

    def due(self, now: float) -> list[Check]:
        """Checks whose old connection stayed silent."""
        if not self._checks:
            return []
        due = [check for check in self._checks.values() if check.deadline <= now]
        for check in due:
            del self._checks[check.old.number]
        return due

    def next_deadline(self) -> float:
        if not self._checks:  # as nearly always
            return math.inf
        return min(check.deadline for check in self._checks.values())


def taken(host: str) -> str:
    """What the younger of two processes with one identity says when it stops."""
    return TAKEN.format(where=f"at {host}" if host else "on this network")
