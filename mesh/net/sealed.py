"""Bulk connections: bytes in AEAD records over a bare socket, under keys that came through TLS.

TLS through Python's ssl moves 100 MB at a quarter of the speed of the socket; whole records of 1 MiB
through `cryptography`, into buffers made once, at more than half. So a bulk connection greets under
TLS and then leaves it: the pattern of DTLS-SRTP (RFC 5764). docs/security.md has the argument.

A record: 4 bytes with the length of what follows, then ciphertext and tag (16 bytes). Rules: 1. Each
end draws a fresh random key for what it sends and tells it inside TLS, so a key belongs to one
direction of one connection, and with it every record. 2. The nonce counts records: one that is
changed, repeated, left out, or moved does not open, and the connection ends before anything of it is
used (a view that was to be filled may hold garbage then). 3. The key is replaced far before any limit of the cipher. 4. Nothing is allocated for a length
that the peer made up.
"""

import functools
import math
import os
import struct
import time
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from mesh.buffers import BufferPool
from mesh.errors import RemoteProtocolError, StreamLost
from mesh.net.sockets import SocketStream

RECORD_BYTES: Final = 1 << 20
"""Plaintext of one record, at most: one fragment."""

KEY_BYTES: Final = 32
TAG_BYTES: Final = 16
LENGTH: Final = struct.Struct(">I")

REKEY_RECORDS: Final = 1 << 16
"""Records under one key: 64 GiB at most, 2^32 blocks of AES, where an attacker's advantage against GCM
is below 2^-60 (McGrew and Viega 2004); TLS 1.3 allows six times as much (RFC 8446, section 5.5)."""

HEAD_BYTES: Final = 4096
"""A head of up to this length goes out in one call with what follows it."""

AHEAD_BYTES: Final = 256
"""Read beyond a large record: the header of the next frame comes with the same call."""

FIRST_BYTES: Final = 4096
"""Read before the length of a record is known: small frames come whole."""

BUFFER_BYTES: Final = RECORD_BYTES + HEAD_BYTES + 2 * (LENGTH.size + TAG_BYTES)
BUFFERS_KEPT: Final = 16
"""Large buffers that wait for use: a fresh one costs 256 page faults, 30 us of the 500 of a record."""

TRIED_BYTES: Final = 1 << 14
TRIES: Final = 5
MUCH: Final = 2.5
"""Enough to see which cipher is faster here, by how much: 5 to 100 us a try."""

Aead = AESGCM | ChaCha20Poly1305
CIPHERS: Final[dict[str, type[AESGCM] | type[ChaCha20Poly1305]]] = {
    "aes": AESGCM,
    "chacha": ChaCha20Poly1305,
}


@functools.cache
def faster_cipher() -> str:
    """aes where the CPU has instructions for it; chacha elsewhere (a Raspberry Pi 4).

    Measured, as no one interface tells it on every system. With the instructions AES is up to twice
    as fast, without them ten times slower: so a hiccup of this machine cannot turn the answer.
    """
    seconds = {}
    out, zeros = bytearray(TRIED_BYTES + TAG_BYTES), bytes(TRIED_BYTES)
    for name, cipher in CIPHERS.items():
        aead, took = cipher(bytes(KEY_BYTES)), []
        for _ in range(TRIES):
            began = time.perf_counter()
            aead.encrypt_into(bytes(12), zeros, None, out)
            took.append(time.perf_counter() - began)
        seconds[name] = min(took)
    return "chacha" if seconds["chacha"] * MUCH < seconds["aes"] else "aes"


class Offer:
    """What one end of a connection tells the other inside TLS: its key, and the cipher that it likes.

    Both ends use AES-256-GCM where both like it, else ChaCha20-Poly1305.
    """

    def __init__(self, cipher: str, key: bytes) -> None:
        self.cipher = cipher
        self.key = key

    @classmethod
    def fresh(cls) -> "Offer":
        return cls(faster_cipher(), os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> "Offer":
        """Raises RemoteProtocolError."""
        cipher, _, key = text.partition(":")
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            raw = b""
        if cipher not in CIPHERS or len(raw) != KEY_BYTES:
            raise RemoteProtocolError("not a key for bulk records")
        return cls(cipher, raw)

    def __str__(self) -> str:
        return f"{self.cipher}:{self.key.hex()}"

    def cipher_with(self, other: "Offer") -> str:
        return "aes" if self.cipher == other.cipher == "aes" else "chacha"


class _Direction:
    """One direction's key and the number of its next record."""

    def __init__(self, cipher: str, key: bytes) -> None:
        self._cipher = CIPHERS[cipher]
        self._key = key
        self._aead: Aead = self._cipher(key)
        self._record = 0

    def next(self) -> tuple[Aead, bytes]:
        """Cipher and nonce of the next record; the caller uses them once."""
        if self._record == REKEY_RECORDS:
            # As TLS 1.3's key update (RFC 8446, section 7.2): both ends count, nothing is said.
            expand = HKDFExpand(hashes.SHA256(), KEY_BYTES, info=b"gossipmesh bulk: next key")
            self._key = expand.derive(self._key)
            self._aead = self._cipher(self._key)
            self._record = 0
        nonce = self._record.to_bytes(12, "big")
        self._record += 1
        return self._aead, nonce


_BUFFERS: Final = BufferPool(BUFFER_BYTES, BUFFERS_KEPT)
"""Of all connections of this process: an idle one holds none."""


class SealedStream:
    """One bulk connection after its greeting. See mesh.net.transport.Stream."""

    offer = ""
    at_once_bytes = RECORD_BYTES

    def __init__(
        self, below: SocketStream, own: Offer, peers: Offer, refused: Callable[[str], None]
    ) -> None:
        """Owns `below`. `refused` counts records that do not open."""
        cipher = own.cipher_with(peers)
        self._below = below
        self._refused = refused
        self._sending = _Direction(cipher, own.key)
        self._receiving = _Direction(cipher, peers.key)
        self._first = memoryview(bytearray(FIRST_BYTES))
        self._in = self._first
        """what came and is not opened: `_first`, or a large buffer while a large record comes"""
        self._have = 0
        self._opened = memoryview(b"")
        """of a record that was longer than the reader's view"""
        self.peer = below.peer
        self.host = below.host

    def seal(self, offer: str) -> "SealedStream":
        raise RemoteProtocolError("sealed already")

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = math.inf, *, head: bytes = b""
    ) -> None:
        view = memoryview(data).cast("B")
        out = _BUFFERS.take()
        try:
            end = 0
            # A head is a record of its own: `data` stays where readers want it.
            if 0 < len(head) <= HEAD_BYTES:
                end = self._seal(memoryview(head), out, 0)
            elif head:
                view = memoryview(bytes(view))
                await self.send_all(head, timeout_s)
            while True:
                piece, view = view[:RECORD_BYTES], view[RECORD_BYTES:]
                if len(piece):
                    end = self._seal(piece, out, end)
                await self._below.send_all(out[:end], timeout_s)
                if not len(view):
                    return
                end = 0
        finally:
            _BUFFERS.give(out)

    def _seal(self, piece: memoryview, out: memoryview, start: int) -> int:
        """Writes one record at `start`; returns where it ends."""
        body = start + LENGTH.size
        end = body + len(piece) + TAG_BYTES
        LENGTH.pack_into(out, start, end - body)
        aead, nonce = self._sending.next()
        aead.encrypt_into(nonce, piece, out[start:body], out[body:end])
        return end

    async def receive_into(
        self, view: memoryview, timeout_s: float = math.inf, *, worth: int = 1
    ) -> int:
        if not self._opened:
            length = await self._record(timeout_s, worth)
            if not length:
                return 0
            plain = length - TAG_BYTES
            if plain <= len(view):
                self._open(length, view[:plain])
                return plain
            opened = memoryview(bytearray(plain))
            self._open(length, opened)
            self._opened = opened
        count = min(len(view), len(self._opened))
        view[:count] = self._opened[:count]
        self._opened = self._opened[count:]
        return count

    async def aclose(self) -> None:
        await self._below.aclose()  # a large buffer goes with this object: a task may be filling it

    async def _record(self, timeout_s: float, worth: int) -> int:
        """Waits for the whole next record, returns its length; 0 at the end of the stream."""
        while self._have < LENGTH.size:
            received = await self._below.receive_into(
                self._in[self._have :], timeout_s, worth=worth
            )
            if not received:
                if self._have:
                    raise self._cut()
                return 0
            self._have += received
        length = int.from_bytes(self._in[: LENGTH.size], "big")
        if not TAG_BYTES < length <= RECORD_BYTES + TAG_BYTES:
            self._refused("record")
            raise StreamLost(f"a record of {length} bytes cannot be")
        end = LENGTH.size + length
        if end > len(self._in):
            self._in = _BUFFERS.take()
            self._in[: self._have] = self._first[: self._have]
        while self._have < end:
            # A little more than the record: what follows is often the short record of a header.
            room = self._in[self._have : end + AHEAD_BYTES]
            received = await self._below.receive_into(room, timeout_s, worth=end - self._have)
            if not received:
                raise self._cut()
            self._have += received
        return length

    def _open(self, length: int, into: memoryview) -> None:
        """Opens the record that lies in the buffer and makes room for the next."""
        end = LENGTH.size + length
        aead, nonce = self._receiving.next()
        try:
            aead.decrypt_into(nonce, self._in[LENGTH.size : end], self._in[: LENGTH.size], into)
        except InvalidTag:
            self._refused("record")
            raise StreamLost("a record was changed on its way") from None
        rest = self._have - end
        self._first[:rest] = self._in[end : self._have]
        self._have = rest
        if self._in is not self._first:
            _BUFFERS.give(self._in)
            self._in = self._first

    @staticmethod
    def _cut() -> StreamLost:
        return StreamLost("connection closed in the middle of a record")
