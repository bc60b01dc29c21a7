"""This machine's network interfaces and the addresses that others can reach it by."""

import ipaddress
from typing import Final

import ifaddr

from mesh.surroundings import Interface

CONTAINERS: Final = ("docker", "br-", "veth", "virbr", "podman", "cni", "lxc", "lxdbr", "vmnet")
VPNS: Final = ("tun", "tap", "wg", "tailscale", "utun", "zt", "ppp", "ipsec")
"""What the programs that make them call their interfaces; nothing else tells them apart everywhere."""


def local_addresses(interfaces: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Addresses of the named interfaces, or of all but loopback; IPv4 first, sorted.

    Link-local IPv6 is left out: it means nothing in another machine's table.
    """
    found: set[str] = set()
    for adapter in ifaddr.get_adapters():
        if interfaces and not {adapter.name, adapter.nice_name} & set(interfaces):
            continue
        for entry in adapter.ips:
            text = entry.ip if isinstance(entry.ip, str) else entry.ip[0]
            address = ipaddress.ip_address(text)
            if address.is_link_local and address.version == 6:
                continue
            if interfaces or not address.is_loopback:
                found.add(text)
    return tuple(sorted(found, key=lambda text: (":" in text, text)))


def interface_names() -> list[str]:
    """Every interface of this machine, for an error that lists them."""
    return sorted({adapter.nice_name for adapter in ifaddr.get_adapters(include_unconfigured=True)})


def all_interfaces() -> tuple[Interface, ...]:
    """Every interface of this machine, with the addresses that local_addresses() would take."""
    found = []
    for adapter in ifaddr.get_adapters(include_unconfigured=True):
        texts = [
            f"{entry.ip if isinstance(entry.ip, str) else entry.ip[0]}/{entry.network_prefix}"
            for entry in adapter.ips
        ]
        networks = [ipaddress.ip_interface(text) for text in texts]
        kept = [n for n in networks if n.version == 4 or not n.is_link_local]
        ordered = sorted(str(network) for network in kept)
        found.append(
            Interface(
                name=adapter.nice_name,
                networks=tuple(sorted(ordered, key=lambda text: ":" in text)),
                kind=_kind(adapter.nice_name, any(n.is_loopback for n in networks)),
            )
        )
    return tuple(sorted(found, key=lambda one: one.name))


def _kind(name: str, loopback: bool) -> str:
    if loopback or name == "lo":
        return "loopback"
    if name.startswith(CONTAINERS):
        return "containers"
    return "vpn" if name.startswith(VPNS) else "lan"
