"""Settings of a node, checked where they enter. Frozen; nothing else reads flags or variables."""

import json
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mesh.core.address import Address
from mesh.errors import UsageError
from mesh.places import state_directory

DEFAULT_PORT = 7710
"""Tried first, so that a firewall rule can name it; a second node on a machine takes any free port."""

NAME_LIMIT = 32
INTERFACES_LIMIT = 8
PEERS_LIMIT = 64


def parse_address(text: str) -> Address:
    """`HOST:PORT` or `[IPV6]:PORT`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise UsageError(f"{text!r} is no address: write HOST:PORT, for example 192.168.1.20:7710")
    if not 0 < int(port) < 65536 or len(host) > 64:
        raise UsageError(
            f"{text!r} is no address: a port is 1..65535, a host at most 64 characters"
        )
    return Address(host, int(port))


def check_name(name: str) -> str:
    """A node's name as people read it in tables. Raises UsageError."""
    if not name or len(name) > NAME_LIMIT or not name.isprintable() or name != name.strip():
        raise UsageError(f"{name!r} is no node name: 1..{NAME_LIMIT} printable characters")
    return name


def default_name() -> str:
    """This machine's host name, cut to what a node may be called."""
    name = "".join(c for c in socket.gethostname().split(".")[0] if c.isprintable()).strip()
    return name[:NAME_LIMIT].strip() or "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """How one node runs.

    state: directory of its identity; default $MESH_STATE, else the user's.
    name: what people call it; kept in the state directory; default the host name.
    port: where it listens; default 7710, or any free port where that is taken.
    interfaces: network interfaces to announce and listen on, by name; default all.
    mdns: announce this node and look for others.
    peers: addresses to dial for ever, beside what mDNS finds.
    allow_control: other members may pause, resume, set and stop what runs here, through the mesh.
    metrics: port of 127.0.0.1 that serves figures to Prometheus; default none.
    """

    state: Path = field(default_factory=state_directory)
    name: str | None = None
    port: int | None = None
    interfaces: tuple[str, ...] = ()
    mdns: bool = True
    peers: tuple[Address, ...] = ()
    allow_control: bool = False
    metrics: int | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        for port in (self.port, self.metrics):
            if port is not None and not 0 < port < 65536:
                raise UsageError(f"port {port}: a port is 1..65535")
        if len(self.interfaces) > INTERFACES_LIMIT or len(self.peers) > PEERS_LIMIT:
            raise UsageError(f"at most {INTERFACES_LIMIT} interfaces and {PEERS_LIMIT} peers")

    def to_json(self) -> str:
        """For the bare node process, `python -m mesh JSON`."""
        about = {**asdict(self), "state": str(self.state), "peers": [str(p) for p in self.peers]}
        return json.dumps(about)

    @classmethod
    def from_json(cls, text: str) -> "NodeSettings":
        """The inverse of to_json(). Raises UsageError."""
        try:
            about = json.loads(text)
            return cls(
                state=Path(about["state"]),
                name=about["name"],
                port=about["port"],
                interfaces=tuple(about["interfaces"]),
                mdns=bool(about["mdns"]),
                peers=tuple(parse_address(peer) for peer in about["peers"]),
                allow_control=bool(about.get("allow_control", False)),
                metrics=about["metrics"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"not the settings of a node: {error}") from None
