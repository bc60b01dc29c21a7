"""What the failure detector found (detector.py), for peers.py to act on."""

from dataclasses import dataclass

from mesh.core.messages import NodeId, Ping, PingReport, PingRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send this."""

    node: NodeId
    message: Ping | PingRequest | PingReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Dial this member: somebody asks whether it is there."""

    node: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """This node finds the member silent: accuse it. `since`: when its answer was due."""

    node: NodeId
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """The member is dead."""

    node: NodeId
    reason: str


Finding = Tell | Reach | Silent | Gone
