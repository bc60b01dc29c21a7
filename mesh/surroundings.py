"""What a machine's network looks like from here: plain values, found by diagnosis.py.

Rule: facts only. What they mean, and what mends it, is for whoever shows them (nodes/doctor.py).
"""

from dataclasses import dataclass
from enum import Enum

from mesh.core.address import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One network interface of this machine."""

    name: str
    networks: tuple[str, ...]
    """its addresses with the length of their network, as in 192.168.1.20/24; IPv4 first"""
    kind: str
    """loopback, containers (docker's and their like), vpn, or lan"""
    why: str = ""
    """what shows that it is no lan, in words"""
    looked_at: bool = False
    """whether it is one that the node uses, or that was asked for"""

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(network.partition("/")[0] for network in self.networks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A node that answered by mDNS."""

    instance: str
    """the first characters of its node id"""
    member: bool
    """whether it carries our mesh's tag"""
    protocol: str
    addresses: tuple[Address, ...]
    source: str
    """the address that the answer came from"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """What came of asking by multicast on one interface."""

    interface: str
    address: str
    error: str
    """why nothing could be sent; empty where it could"""
    looped: bool
    """the question came back to this machine, as multicast does"""
    others: tuple[str, ...]
    """addresses of other machines that were heard there, whatever they said"""
    announcements: tuple[Announcement, ...]
    """of nodes, this machine's own ones included"""


class Outcome(Enum):
    """What came of knocking at an address."""

    NODE = "node"
    """a node of our mesh"""
    OTHER_MESH = "other mesh"
    STRANGER = "stranger"
    """something listens there that is no node"""
    REFUSED = "refused"
    SILENT = "silent"
    """no answer of any kind: a packet filter, or nobody has this address"""
    STUCK = "stuck"
    """a connection opens, and nobody says anything on it: a process that is stopped, or overloaded"""
    NO_ROUTE = "no route"
    """the network says that it cannot be reached"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knock:
    """One address, tried as a node would dial it."""

    address: Address
    outcome: Outcome
    node: str
    """who answered; empty where nobody did"""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Everything that was found."""

    protocol: str
    """that we speak"""
    interfaces: tuple[Interface, ...]
    echoes: tuple[Echo, ...]
    knocks: tuple[Knock, ...]
    """in no order; each address once"""

    def knock(self, address: Address) -> Knock | None:
        return next((knock for knock in self.knocks if knock.address == address), None)
