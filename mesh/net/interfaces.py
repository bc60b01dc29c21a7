"""This machine's network interfaces: what each is, and by which of them others can reach it.

Rules: 1. A node uses the interfaces that it was told to. Else it uses real networks; bridges to containers
and virtual machines, and tunnels (VPNs), only where nothing else has an address, or where a given peer
is behind one. 2. What the kernel says counts more than a name: br0 over a network card is a LAN. 3. A name
decides only where the kernel does not say.
An interface's trip: ifaddr -> Kernel tells its kind -> all_interfaces() -> in_use() -> local_addresses().
"""

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ifaddr

from mesh.surroundings import Interface

CONTAINERS: Final = (
    *("docker", "br-", "veth", "virbr", "podman", "cni", "lxc", "lxdbr", "cali", "flannel", "ve-"),
    *("vmnet", "vboxnet", "bridge10"),
)
"""What container engines and virtual machines call theirs; bridge100 and so on are macOS's."""

VPNS: Final = ("tun", "tap", "wg", "tailscale", "utun", "zt", "ppp", "ipsec")
TUNNEL_TYPES: Final = (512, 768, 769, 776, 778, 823, 65534)
"""Linux's numbers (if_arp.h) of ppp, ipip, ip6tnl, sit, gre, ip6gre, and of what has no link layer: tun and
WireGuard."""

POINT_TO_POINT: Final = 0x10
"""IFF_POINTOPOINT"""

DISCARD: Final = 9
"""Of an address that is only looked up in the routing table any port does."""

PREFERRED: Final = ("lan", "vpn", "containers")
"""The first kind of which one has an address is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What Linux tells of interfaces; elsewhere these files are missing, and names decide."""

    interfaces: Path = Path("/sys/class/net")
    routes: Path = Path("/proc/net/route")

    def kind(self, name: str) -> tuple[str, str]:
        """(containers, vpn or lan; why it is that)."""
        here = self.interfaces / name
        if (here / "device").exists():
            return "lan", ""  # a network card, or what stands for one in a virtual machine
        if self._number(here / "type") in TUNNEL_TYPES or (here / "tun_flags").exists():
            return "vpn", "a tunnel, as VPNs make"
        if self._number(here / "flags") & POINT_TO_POINT:
            return "vpn", "a line to one other machine, as VPNs make"
        if name in self._default_ways():
            return "lan", ""
        if (here / "bridge").exists():
            if self._leads_out(here):
                return "lan", ""
            return "containers", "a bridge to no network card: behind it are containers or VMs"
        if name.startswith(CONTAINERS):
            return "containers", "by its name it leads to containers or VMs"
        return ("vpn", "by its name a VPN") if name.startswith(VPNS) else ("lan", "")

    def _leads_out(self, here: Path) -> bool:
        """Whether a network card is below: of a bridge one of its ports, of a VLAN or a bond its own."""
        return (here / "device").exists() or any(map(self._leads_out, here.glob("lower_*")))

    def _default_ways(self) -> set[str]:
        """The interfaces to everywhere else."""
        lines: list[list[str]] = []
        with contextlib.suppress(OSError):
            lines = [line.split() for line in self.routes.read_text().splitlines()[1:]]
        return {line[0] for line in lines if len(line) > 7 and line[1] == line[7] == "00000000"}

    @staticmethod
    def _number(path: Path) -> int:
        try:
            return int(path.read_text(), 0)
        except (OSError, ValueError):
            return 0


def local_addresses(
    interfaces: tuple[str, ...] = (), towards: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Addresses of the named interfaces; of none: of those in use, and of those that lead `towards`
    a given peer. IPv4 first, sorted.

    Link-local IPv6 is left out: it means nothing in another machine's table.
    """
    found: set[str] = set()
    if interfaces:
        for adapter in ifaddr.get_adapters():
            if {adapter.name, adapter.nice_name} & set(interfaces):
                found |= {str(network.ip) for network in _networks(adapter)}
    else:
        here = all_interfaces()
        ways = {way for host in towards if (way := _way(host)) is not None}
        chosen = [one for one in here if one.kind != "loopback" and ways & {*one.addresses}]
        found = {address for one in (*in_use(here), *chosen) for address in one.addresses}
    return tuple(sorted(found, key=lambda text: (":" in text, text)))


def interface_names() -> list[str]:
    """Every interface of this machine, for an error that lists them."""
    return sorted({adapter.nice_name for adapter in ifaddr.get_adapters(include_unconfigured=True)})


def in_use(here: Iterable[Interface]) -> list[Interface]:
    """Those that a node uses if it is told none: of the best kind that has an
    address, and of the next where all of those are link-local."""
    chosen: list[Interface] = []
    for kind in PREFERRED:
        chosen += [one for one in here if one.addresses and one.kind == kind]
        # A card that gave itself an address (169.254) may be a cable to another, or lead nowhere.
        if not all(ipaddress.ip_address(a).is_link_local for one in chosen for a in one.addresses):
            break
    return chosen


def all_interfaces(kernel: Kernel | None = None) -> tuple[Interface, ...]:
    """Every interface of this machine, with the addresses that local_addresses() would take."""
    kernel = kernel or Kernel()
    found = []
    for adapter in ifaddr.get_adapters(include_unconfigured=True):
        name, networks = adapter.nice_name, _networks(adapter)
        kind, why = "lan", ""
        if name == "lo" or any(network.is_loopback for network in networks):
            kind = "loopback"
        elif networks:  # this is asked each second, and a host of containers has hundreds without
            kind, why = kernel.kind(name)
        found.append(
            Interface(
                name=name,
                networks=tuple(sorted(map(str, networks), key=lambda text: (":" in text, text))),
                kind=kind,
                why=why,
            )
        )
    return tuple(sorted(found, key=lambda one: one.name))


def _networks(
    adapter: ifaddr.Adapter,
) -> Sequence[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    """The adapter's addresses with their networks, without link-local IPv6."""
    networks = [
        ipaddress.ip_interface(
            f"{entry.ip if isinstance(entry.ip, str) else entry.ip[0]}/{entry.network_prefix}"
        )
        for entry in adapter.ips
    ]
    return [n for n in networks if n.version == 4 or not n.is_link_local]


def _way(host: str) -> str | None:
    """This machine's own address on the way to another; nothing is sent. None: no way, or a name."""
    with contextlib.suppress(OSError, ValueError):
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((host, DISCARD))
            return str(asking.getsockname()[0])
    return None
