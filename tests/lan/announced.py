"""Asks a LAN what `_gossipmesh._tcp` services there are; knows DNS only, nothing of this project.

Usage: announced.py COUNT SECONDS. Sends a hand-built PTR question to 224.0.0.251:5353 from a port
of its own (RFC 6762, 6.7: each responder answers it directly) until COUNT instances answered, and
prints one JSON object: instance -> {"host", "port", "addresses", "txt", "packet" (hex, all of it)}.
"""

import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

SERVICE = "_gossipmesh._tcp.local"
GROUP = ("224.0.0.251", 5353)
A, PTR, TXT, SRV = 1, 12, 16, 33
IN = 1
ASK_AGAIN_S = 0.5


def question() -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in SERVICE.split("."))
    return struct.pack("!6H", 0x6D65, 0, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", PTR, IN)


def name_at(packet: bytes, at: int) -> tuple[str, int]:
    """A name, and where what follows it begins (RFC 1035, 4.1.4: two set bits are a pointer)."""
    labels: list[str] = []
    end = None
    while length := packet[at]:
        if length >= 0xC0:
            end = end or at + 2
            at = struct.unpack_from("!H", packet, at)[0] & 0x3FFF
        else:
            labels.append(packet[at + 1 : at + 1 + length].decode())
            at += 1 + length
    return ".".join(labels), end or at + 1


def records(packet: bytes) -> Iterator[tuple[str, int, int, int]]:
    """Each record's name, type, and where its data begins and ends."""
    _, _, questions, *counts = struct.unpack_from("!6H", packet)
    at = 12
    for _ in range(questions):
        at = name_at(packet, at)[1] + 4
    for _ in range(sum(counts)):
        name, at = name_at(packet, at)
        kind, _, _, length = struct.unpack_from("!HHIH", packet, at)
        yield name, kind, at + 10, at + 10 + length
        at += 10 + length


def text(packet: bytes, at: int, end: int) -> dict[str, str]:
    """A TXT record's key=value strings."""
    found = {}
    while at < end:
        key, _, value = packet[at + 1 : at + 1 + packet[at]].decode().partition("=")
        found[key] = value
        at += 1 + packet[at]
    return found


def instances(packet: bytes) -> dict[str, dict[str, Any]]:
    """What one answer says, by instance name."""
    found: dict[str, dict[str, Any]] = {}
    addresses: dict[str, list[str]] = {}
    parts = list(records(packet))
    for name, kind, at, end in parts:
        if kind == PTR and name == SERVICE:
            found[name_at(packet, at)[0]] = {"packet": packet.hex()}
        elif kind == A:
            addresses.setdefault(name, []).append(socket.inet_ntoa(packet[at:end]))
    for name, kind, at, end in parts:
        if name in found and kind == SRV:
            host = name_at(packet, at + 6)[0]
            port = struct.unpack_from("!H", packet, at + 4)[0]
            found[name] |= {"host": host, "port": port, "addresses": addresses.get(host, [])}
        elif name in found and kind == TXT:
            found[name]["txt"] = text(packet, at, end)
    return found


def main(count: int, seconds: float) -> None:
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(ASK_AGAIN_S)
        while len(found) < count and time.monotonic() < deadline:
            asker.sendto(question(), GROUP)
            try:
                while len(found) < count:
                    found |= instances(asker.recv(9000))
            except TimeoutError:
                continue
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
