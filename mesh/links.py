"""Connections between nodes: who is on the other end, and one outbox for each control connection.

A connection's trip: Transport -> greet(): both Hellos -> Links.run(): PeerConnected, then Received
for each message, then PeerLost, all into the node's inbox. Rules: 1. Nobody waits for a slow peer: a
full outbox drops and counts, push/pull repairs it later. 2. One task writes a stream, one reads it.
3. Whatever goes wrong on a connection ends that connection, with a reason, and nothing else.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, get_args

import trio

from mesh import wire
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.messages import (
    ControlMessage,
    Hello,
    Message,
    NodeId,
    OtherVersion,
    Purpose,
    Refusal,
)
from mesh.core.strangers import version_refusal
from mesh.errors import (
    ConnectionRefused,
    IdentityError,
    LocalProtocolError,
    MeshError,
    PeerTimeout,
    RemoteProtocolError,
    StreamLost,
)
from mesh.frames import SEND_S, FrameReader, send_frame
from mesh.net.transport import Stream, Transport

logger = logging.getLogger("mesh")

GREETING_S: Final = 5.0
"""From an open stream to the other side's Hello."""

OUTBOX_LIMIT: Final = 256
"""Messages that wait for a slow peer; a push/pull of 4096 rows is 128 of them."""

SILENT_S: Final = 300.0
"""A control connection that brings nothing, not even a ping, is closed by whoever listens. Each of 32
neighbours is probed twice a minute, eight times less often by a node that runs late (health.py)."""

FLUSH_S: Final = 1.0
"""How long a connection may take to say its last words."""

TOGETHER_BYTES: Final = 16 * 1024
"""What waits for a peer goes out together up to one TLS record: an answer and the reports beside it
are one packet, one system call, one waking of the other side."""

AT_ONCE: Final = 8
"""Messages that came together and are handed on before others have their turn."""

CONTROL_MESSAGES: Final = frozenset(get_args(ControlMessage))

STAGGER_S: Final = 0.1
"""Between dials of one contact's addresses: the first that leads to a peer wins."""


class Incompatible(MeshError):
    """The peer speaks another protocol version; it was told so."""

    def __init__(self, node: NodeId, name: str, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.name = name


class Itself(MeshError):
    """The connection leads back to this node."""


class Twin(MeshError):
    """An older process with this node's own identity is on the other end."""

    def __init__(self, host: str) -> None:
        super().__init__(f"another process with this identity is at {host}")
        self.host = host


@dataclass(frozen=True, slots=True)
class Peer:
    """A connection on which both sides said Hello."""

    stream: Stream
    reader: FrameReader
    hello: Hello


@dataclass(slots=True)
class _Link:
    stream: Stream
    put: trio.MemorySendChannel[ControlMessage]
    scope: trio.CancelScope
    reason: str = ""
    told: bool = False
    ending: bool = False


async def greet(stream: Stream, own: Hello) -> Peer:
    """Swaps Hellos; a connection for bulk is sealed then.

    Raises Incompatible, Itself, Twin, RemoteProtocolError or StreamLost.
    """
    message: Message | None = None
    reader = FrameReader(stream)
    with trio.move_on_after(GREETING_S):
        await send_frame(stream, replace(own, offer=stream.offer))
        message, _ = await reader.message(timeout_s=GREETING_S)
    match message:
        case Hello():
            if message.member.node != stream.peer:
                raise RemoteProtocolError("the node id is not that of its certificate")
            if stream.peer == own.member.node:
                older = (message.age_ms, message.instance) > (own.age_ms, own.instance)
                if message.instance != own.instance and older:
                    raise Twin(stream.host)
                raise Itself("this address leads back to this node")
            if Purpose.BULK in (own.purpose, message.purpose):
                if reader.unread:
                    raise RemoteProtocolError("more than a Hello before the records")
                stream = stream.seal(message.offer)
                reader = FrameReader(stream)
            return Peer(stream, reader, message)
        case OtherVersion():
            reason = version_refusal(message.protocol, own.protocol)
            told = version_refusal(own.protocol, message.protocol)
            await send_frame(stream, Refusal(reason=told))
            raise Incompatible(stream.peer, message.name, reason)
        case Refusal():
            raise StreamLost(f"refused: {message.reason}")
        case None:
            raise PeerTimeout(f"no Hello within {GREETING_S:g} s")
        case _:
            raise RemoteProtocolError(f"{type(message).__name__} before Hello")


async def dial(
    transport: Transport,
    addresses: Sequence[Address],
    own: Callable[[], Hello],
    *,
    wanted: NodeId | None = None,
    proved_host: str = "",
) -> Peer:
    """Tries all addresses, a little apart, `proved_host` first; the first that greets wins.

    If all of `proved_host` refuse, nothing else is waited for. `own` is asked when a stream is open:
    ages are compared, and an old Hello makes this process look younger than it is. Raises what the
    most telling failure was: Twin, Incompatible, then ConnectionRefused, others, Itself.
    """
    addresses = sorted(addresses, key=lambda address: address.host != proved_host)
    proofs = sum(address.host == proved_host for address in addresses)
    proved = proofs > 0
    winner: Peer | None = None
    failures: list[MeshError] = []

    async def attempt(address: Address, delay_s: float, scope: trio.CancelScope) -> None:
        nonlocal winner, proofs
        if delay_s:
            await trio.sleep(delay_s)
        try:
            stream = await transport.connect(address)
        except MeshError as error:
            failures.append(error)
            if isinstance(error, ConnectionRefused) and address.host == proved_host:
                proofs -= 1
                if not proofs:
                    scope.cancel()
            return
        try:
            peer = await greet(stream, own())
            if wanted is not None and stream.peer != wanted:
                raise StreamLost("another node listens there now")
        except MeshError as error:
            failures.append(error)
            await stream.aclose()
        except BaseException:
            await stream.aclose()
            raise
        else:
            if winner is not None:
                await stream.aclose()
                return
            winner = peer
            scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for rank, address in enumerate(addresses):
                nursery.start_soon(attempt, address, rank * STAGGER_S, nursery.cancel_scope)
    except BaseException:
        if winner is not None:  # cancelled (BreakOff) while the others were being ended
            await winner.stream.aclose()
        raise
    if winner is not None:
        return winner
    refusals = [f for f in failures if isinstance(f, ConnectionRefused | Itself)]
    if proofs if proved else len(refusals) < len(failures):
        # Somebody else refused (docker's address is this machine): that is no word of the peer's.
        failures = [f for f in failures if not isinstance(f, ConnectionRefused)]
    for kind in (Twin, Incompatible, ConnectionRefused, IdentityError, StreamLost, MeshError):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    raise StreamLost("no address")


class Links:
    """All control connections of one node, by number."""

    nursery: trio.Nursery
    """The node's. Who says that a connection ended waits in it for room in the inbox: an end that is
    never told would stay a connection in the core for ever, and the task of the connection itself may
    be cancelled, with the address that it was accepted at."""

    def __init__(self, emit: Callable[[ev.Event], Awaitable[None]]) -> None:
        self._emit = emit
        self._links: dict[int, _Link] = {}
        self._next = 0
        self._closed = trio.Event()
        self.refused: Counter[str] = Counter()
        """what was turned away, by kind: tls, protocol, schema, non_finite, ..."""
        self.dropped = 0
        """messages that did not fit into a slow peer's outbox, or not into a frame"""
        self._unfit: set[type] = set()

    async def run(self, peer: Peer, contact: str | None) -> None:
        """Lives as long as a control connection. Closes its stream."""
        stream = peer.stream
        self._next += 1
        number = self._next
        put, take = trio.open_memory_channel[ControlMessage](OUTBOX_LIMIT)
        link = _Link(stream=stream, put=put, scope=trio.CancelScope())
        self._links[number] = link
        try:
            await self._emit(
                ev.PeerConnected(
                    node=stream.peer,
                    connection=number,
                    hello=peer.hello,
                    contact=contact,
                    host=stream.host,
                )
            )
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link, take)
                    await self._read(number, link, peer.reader)
        finally:
            del self._links[number]
            self._closed.set()
            reason = link.reason or "connection closed"
            lost = ev.PeerLost(node=stream.peer, connection=number, reason=reason, told=link.told)
            self.nursery.start_soon(self._emit, lost)
            await stream.aclose()

    def send(self, number: int, message: ControlMessage) -> None:
        link = self._links.get(number)
        if link is None or link.ending:
            return
        try:
            link.put.send_nowait(message)
        except trio.WouldBlock:
            self.dropped += 1

    def hang_up(self, number: int, reason: str) -> None:
        """Sends what is queued, then the reason, then closes; at the latest after FLUSH_S."""
        link = self._links.get(number)
        if link is None or link.ending:
            return
        self.send(number, Refusal(reason=reason))
        link.ending = True
        link.reason = reason
        link.put.close()
        link.scope.deadline = trio.current_time() + FLUSH_S

    def abandon(self, node: NodeId) -> None:
        """Ends this peer's connections at once: nobody is there to be told why."""
        for link in self._links.values():
            if link.stream.peer == node:
                link.scope.cancel()

    async def flush(self) -> None:
        """Hangs up everywhere and waits until the last words are out, at most FLUSH_S."""
        for number in list(self._links):
            self.hang_up(number, "this node stops")
        with trio.move_on_after(FLUSH_S):
            while self._links:
                self._closed = trio.Event()
                await self._closed.wait()

    async def _write(self, link: _Link, take: trio.MemoryReceiveChannel[ControlMessage]) -> None:
        try:
            async for message in take:
                frames = self._frame(message)
                try:
                    while len(frames) < TOGETHER_BYTES:
                        frames += self._frame(take.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    pass
                if frames:
                    await link.stream.send_all(frames, SEND_S)
        except MeshError as error:
            link.reason = link.reason or str(error)
        link.scope.cancel()

    def _frame(self, message: ControlMessage) -> bytes:
        """Empty where it does not fit: that is our own mistake, which no peer has to answer for."""
        try:
            return wire.encode(message)
        except LocalProtocolError as error:
            self.dropped += 1
            if type(message) not in self._unfit:
                self._unfit.add(type(message))
                logger.error("%s: dropped", error)
            return b""

    async def _read(self, number: int, link: _Link, reader: FrameReader) -> None:
        at_once = 0
        try:
            while True:
                message, _ = await reader.message(timeout_s=SILENT_S)
                if type(message) not in CONTROL_MESSAGES:
                    raise RemoteProtocolError(f"{type(message).__name__} on a control connection")
                if isinstance(message, Refusal):
                    link.told = True
                    link.reason = link.reason or f"told: {message.reason}"
                received = ev.Received(
                    node=link.stream.peer,
                    connection=number,
                    message=message,  # type: ignore[arg-type]  # one of them
                )
                await self._emit(received)
                # Where nothing is left, reading on waits, and others have their turn.
                at_once = at_once + 1 if reader.unread else 0
                if at_once == AT_ONCE:
                    at_once = 0
                    await trio.lowlevel.checkpoint()
        except RemoteProtocolError as error:
            self.refused["protocol"] += 1
            self.hang_up(number, str(error))
            await trio.sleep_forever()  # until the reason is out
        except StreamLost as error:
            link.reason = link.reason or str(error)
        link.scope.cancel()
