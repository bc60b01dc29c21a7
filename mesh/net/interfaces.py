"""This machine's network interfaces and the addresses that others can reach it by."""

import ipaddress

import ifaddr


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
