"""Asks by multicast who is there, on one interface after the other, beside whatever runs here.

A question's trip: one mDNS packet out of each interface -> its own copy comes back (multicast loops) ->
answers of nodes, and of any other mDNS responder -> Echo. Rules: 1. Each interface has a socket of its
own that hears that interface only. 2. Sockets are bound to the group's address: what is sent to this
machine alone is not taken from a node that runs here. 3. Anybody may say anything: what is kept is
bounded, what cannot be read is left out.
"""

import contextlib
import secrets
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio
from zeroconf import (  # type: ignore[attr-defined]
    DNSAddress,
    DNSIncoming,
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    DNSRecord,
    DNSService,
    DNSText,
    ServiceInfo,
)

from mesh.core.address import Address
from mesh.net.mdns import INSTANCE_LENGTH, SERVICE
from mesh.net.sockets import text_of
from mesh.surroundings import Announcement, Echo, Interface

PORT: Final = 5353
GROUP_V4: Final = "224.0.0.251"
GROUP_V6: Final = "ff02::fb"
SERVICES: Final = "_services._dns-sd._udp.local."
"""What every responder answers: printers and phones show that multicast arrives here at all."""

LISTEN_S: Final = 1.7
"""Responders wait up to 0.12 s, and up to 1 s more for what they said a moment ago."""

ASK_AT_S: Final = (0.0, 0.5)
"""Twice: one packet is easily lost on Wi-Fi."""

PACKET_BYTES: Final = 9000
RECORDS_LIMIT: Final = 256
OTHERS_LIMIT: Final = 256

PTR: Final = 12
CLASS_IN: Final = 1
QUERY_FLAGS: Final = 0
IP_MULTICAST_ALL: Final = 49
"""Linux; off: a socket hears the groups that it joined itself, where it joined them."""


@dataclass(slots=True)
class _Ear:
    """One interface, and what was heard on it."""

    interface: Interface
    address: str
    socket: trio.socket.SocketType | None = None
    error: str = ""
    looped: bool = False
    others: dict[str, None] = field(default_factory=dict)
    records: dict[str, dict[DNSRecord, None]] = field(default_factory=dict)
    """by the address that they came from: two machines may say the same of themselves"""

    @property
    def group(self) -> tuple[str, int]:
        return (GROUP_V6 if ":" in self.address else GROUP_V4), PORT


async def survey(
    interfaces: Sequence[Interface], own: frozenset[str], is_member: Callable[[str, str], bool]
) -> list[Echo]:
    """Asks on each interface that has an address, at the same time. Takes LISTEN_S.

    `own`: every address of this machine. `is_member` says whether a tag is that of our mesh for an
    instance.
    """
    ears = [_Ear(one, one.addresses[0]) for one in interfaces if one.addresses]
    question = _question()
    with contextlib.ExitStack() as stack:
        for ear in ears:
            with _said_to(ear):
                ear.socket = stack.enter_context(_open(ear))
        with trio.move_on_after(LISTEN_S):
            async with trio.open_nursery() as nursery:
                for ear in ears:
                    if ear.socket is not None:
                        nursery.start_soon(_ask, ear, question)
                        nursery.start_soon(_listen, ear, question, own)
                await trio.sleep_forever()
    return [_echo(ear, is_member) for ear in ears]


@contextlib.contextmanager
def _said_to(ear: _Ear) -> Iterator[None]:
    """What the operating system refuses is what there is to tell."""
    try:
        yield
    except OSError as error:
        ear.error = text_of(error).lower()


def _question() -> bytes:
    """Who is a node, and who is there at all. Its number is a random one, by which we know our own."""
    out = DNSOutgoing(QUERY_FLAGS, multicast=True)
    for name in (SERVICE, SERVICES):
        out.add_question(DNSQuestion(name, PTR, CLASS_IN))
    return secrets.token_bytes(2) + out.packets()[0][2:]


def _open(ear: _Ear) -> trio.socket.SocketType:
    """A socket that sends and hears multicast on one interface. Raises OSError."""
    v6 = ":" in ear.address
    opened = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if v6:
            index = socket.if_nametoindex(ear.interface.name)
            joined = socket.inet_pton(socket.AF_INET6, GROUP_V6) + struct.pack("@I", index)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, joined)
            where: tuple[object, ...] = (GROUP_V6, PORT, 0, index)
        else:
            here = socket.inet_aton(ear.address)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            joined = socket.inet_aton(GROUP_V4) + here
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
            if sys.platform == "linux":
                opened.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
            where = (GROUP_V4, PORT)
        opened.setblocking(False)
        opened.bind(where)
    except BaseException:
        opened.close()
        raise
    return trio.socket.from_stdlib_socket(opened)


async def _ask(ear: _Ear, question: bytes) -> None:
    assert ear.socket is not None
    began = trio.current_time()
    for at_s in ASK_AT_S:
        await trio.sleep_until(began + at_s)
        with _said_to(ear):
            await ear.socket.sendto(question, ear.group)


async def _listen(ear: _Ear, question: bytes, own: frozenset[str]) -> None:
    assert ear.socket is not None
    while True:
        try:
            packet, source = await ear.socket.recvfrom(PACKET_BYTES)
        except OSError:
            await trio.sleep(0.1)  # the interface went down, or comes back
            continue
        host = str(source[0]).partition("%")[0]
        if packet == question:
            ear.looped = True
        elif host not in own and len(ear.others) < OTHERS_LIMIT:
            ear.others[host] = None
        if host in ear.records or len(ear.records) < OTHERS_LIMIT:
            known = ear.records.setdefault(host, {})
            if len(known) < RECORDS_LIMIT:
                known.update(dict.fromkeys(_records(packet)))


def _records(packet: bytes) -> list[DNSRecord]:
    """What a packet says about nodes."""
    message = DNSIncoming(packet)
    if not message.valid or not message.is_response():
        return []
    kinds = (DNSPointer, DNSService, DNSText, DNSAddress)
    return [record for record in message.answers() if isinstance(record, kinds)]


def _echo(ear: _Ear, is_member: Callable[[str, str], bool]) -> Echo:
    found = [
        one
        for source, records in ear.records.items()
        for one in _announcements(records, source, is_member)
    ]
    return Echo(
        interface=ear.interface.name,
        address=ear.address,
        error=ear.error,
        looped=ear.looped,
        others=tuple(sorted(ear.others)),
        announcements=tuple(sorted(found, key=lambda one: (one.instance, one.source))),
    )


def _announcements(
    records: Iterable[DNSRecord], source: str, is_member: Callable[[str, str], bool]
) -> Iterator[Announcement]:
    """The nodes that one machine announces."""
    texts = {record.name: record.text for record in records if isinstance(record, DNSText)}
    hosts: dict[str, set[str]] = {}
    for record in records:
        if isinstance(record, DNSAddress) and len(record.address) in (4, 16):
            family = socket.AF_INET if len(record.address) == 4 else socket.AF_INET6
            hosts.setdefault(record.name, set()).add(socket.inet_ntop(family, record.address))
    suffix = "." + SERVICE
    for record in records:
        if isinstance(record, DNSService) and record.name.endswith(suffix):
            instance = record.name.removesuffix(suffix)
            told = _told(record.name, texts.get(record.name, b""))
            yield Announcement(
                instance=instance[:INSTANCE_LENGTH],
                member=is_member(instance, told.get("m", "")),
                protocol=told.get("v", "")[:16],
                addresses=tuple(
                    Address(host, record.port) for host in sorted(hosts.get(record.server, ()))
                ),
                source=source,
            )


def _told(name: str, text: bytes) -> dict[str, str]:
    """The pairs of a TXT record that are text."""
    info = ServiceInfo(SERVICE, name, properties=text)
    return {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in info.properties.items()
        if value is not None
    }
