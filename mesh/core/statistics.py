"""What a protocol knows, frozen: the answer to every question about a node's mesh."""

from dataclasses import dataclass, field

from mesh.core.address import Address
from mesh.core.for_people import Figures
from mesh.core.messages import Member, NodeId, RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatistics:
    """One peer as this node sees it now."""

    node: NodeId
    name: str
    state: str
    """alive, suspect, dead, left, or incompatible"""
    reason: str
    addresses: tuple[Address, ...]
    via: str | None
    rtt_s: float | None
    silent_for_s: float | None
    incarnation: int
    runs: tuple[RunInfo, ...]
    figures: dict[str, tuple[Figures, float]] = field(default_factory=dict)
    """of its runs, as it said last, and how many seconds ago; empty for what it has not said"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolStatistics:
    """A consistent view of everything the protocol knows."""

    own: Member
    peers: tuple[PeerStatistics, ...]
    partners: dict[str, int]
    """peers that each run can average with now"""
    unreached: tuple[tuple[Address, str], ...]
    """peers given by hand that are not connected, and why"""
    local_health: int
    """0: well; up to 7: this node runs late or hears badly, and waits longer before it accuses"""
    fingerprint: int
    """of the living rows: equal on two nodes whose tables agree"""
    undialled: tuple[tuple[str, Address, str], ...]
    """who mDNS shows and this node cannot reach: name, or id where that is all that is known; why"""
