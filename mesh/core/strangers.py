"""Nodes of this mesh that speak another protocol version: listed with the reason, never silent."""

from mesh.core.messages import NodeId
from mesh.core.statistics import PeerStatistics

STRANGERS_LIMIT = 64
STRANGER_S = 90.0
"""Three missed dials after which a node of another version is not listed any more."""


class Strangers:
    """Who was met and could not be talked to."""

    def __init__(self) -> None:
        self._met: dict[NodeId, tuple[PeerStatistics, float]] = {}

    def meet(self, node: NodeId, name: str, reason: str, now: float) -> bool:
        """True if this is news."""
        known = node in self._met
        if len(self._met) >= STRANGERS_LIMIT:
            self._met = {n: m for n, m in self._met.items() if now - m[1] < STRANGER_S}
        if not known and len(self._met) >= STRANGERS_LIMIT:
            return False
        peer = PeerStatistics(
            node=node,
            name=name,
            state="incompatible",
            reason=reason,
            addresses=(),
            via=None,
            rtt_s=None,
            silent_for_s=None,
            incarnation=0,
            runs=(),
        )
        self._met[node] = peer, now
        return not known

    def forget(self, node: NodeId) -> None:
        """It came back with our version."""
        self._met.pop(node, None)

    def listed(self, now: float) -> dict[NodeId, PeerStatistics]:
        """Those that were met lately."""
        return {n: peer for n, (peer, at) in self._met.items() if now - at < STRANGER_S}


def version_refusal(there: int, here: int) -> str:
    """What a peer of another protocol version is told, and listed with."""
    return f"protocol {there} there, {here} here: update the older of the two"
