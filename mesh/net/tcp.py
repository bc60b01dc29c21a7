"""TCP with mutual TLS 1.3 under the Stream contract.

Rules: 1. Nothing is read for the protocol before both certificates are checked. 2. The standard
library's SSLSocket, non-blocking, with trio's readiness waits: a third faster than trio.SSLStream.
Bulk connections leave TLS after their greeting (sealed.py). 3. Half-open handshakes are bounded in
number and time.
A stream's trip: accept or connect -> _handshake -> TlsStream with the peer's node id -> handler.
"""

import contextlib
import errno
import os
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from mesh.core.address import Address
from mesh.core.messages import (
    NodeId,
)
from mesh.errors import (
    ConnectionRefused,
    IdentityError,
    MeshError,
    RemoteProtocolError,
    StreamLost,
    UsageError,
)
from mesh.net.interfaces import interface_names, local_addresses
from mesh.net.sealed import Offer, SealedStream
from mesh.net.sockets import SocketStream, text_of
from mesh.net.transport import Handler, Stream
from mesh.settings import DEFAULT_PORT

HANDSHAKE_S: Final = 5.0
CONNECT_S: Final = 5.0
"""A handshake takes 10-25 ms on a busy Raspberry Pi; 5 s is a lost packet or two."""

NAME_ADDRESSES_LIMIT: Final = 4
"""Addresses of one name that are tried, one after the other, within CONNECT_S."""

NO_SUCH_NAME: Final = -1
"""StreamLost.errno where a name leads nowhere; the operating system's own are positive."""

USER_TIMEOUT_MS: Final = 5000
"""TCP_USER_TIMEOUT: a cut cable is an error after 6 s; Linux alone would wait 15 minutes."""

THIN_LINEAR_TIMEOUTS: Final = 16
"""linux/tcp.h: where few packets are on their way, the first six retransmissions come at even distances
and not at doubled ones."""

RTO_MAX: Final = 44
RTO_MAX_MS: Final = 1000
"""linux/tcp.h since 6.15, and the least it takes: the longest pause between two retransmissions, else two
minutes. A lost acknowledgement makes a round trip look as long as the retransmission took, so pauses grow.
Thirty connections with a message a second lost 30 % of all packets for 100 s: their ends heard nothing for
over 6 s thirty times with neither option, twenty times with the one above, once at most with this one."""

HANDSHAKES_LIMIT: Final = 64
HANDSHAKES_PER_HOST_LIMIT: Final = 16
"""Connections that have proved nothing yet, in all and from one address."""

BACKLOG: Final = 128
"""Connections that the kernel holds while the loop is busy: 30 nodes may start at once."""

POLL_S: Final = 1.0
"""How often addresses are looked at: DHCP comes late, Wi-Fi roams, cables are pulled."""


class TlsStream(SocketStream):
    """One connection after its handshake. See mesh.net.transport.Stream."""

    def __init__(
        self, connection: ssl.SSLSocket, peer: NodeId, host: str, refused: Callable[[str], None]
    ) -> None:
        super().__init__(connection, peer, host)
        self._tls = connection
        self._refused = refused
        self._own = Offer.fresh()
        self.offer = str(self._own)
        self._sealed: SealedStream | None = None

    def seal(self, offer: str) -> Stream:
        peers = Offer.parse(offer)
        self._sealed = SealedStream(self.bare(), self._own, peers, self._refused)
        return self._sealed

    def bare(self) -> SocketStream:
        """The socket below, from its next byte on.

        OpenSSL reads no byte beyond the TLS record that it was asked for (its read_ahead is off), so
        what the peer sent behind its last record is still in the socket.
        """
        if self._tls.pending():
            raise RemoteProtocolError("more than a Hello before the records")
        connection = socket.socket(fileno=self._tls.detach())
        connection.setblocking(False)
        return SocketStream(connection, self.peer, self.host)

    async def aclose(self) -> None:
        await super().aclose()
        if self._sealed is not None:
            await self._sealed.aclose()


class TcpTransport:
    """Listens on this machine's interfaces and dials others. See mesh.net.transport.Transport."""

    def __init__(
        self,
        *,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        node_of: Callable[[bytes], NodeId],
        refused: Callable[[str], None],
        port: int | None,
        interfaces: tuple[str, ...],
        towards: tuple[str, ...] = (),
    ) -> None:
        """`node_of` turns a DER certificate into a node id; `refused` counts who was turned away;
        `interfaces` and `towards` as local_addresses() has them."""
        self._server = server
        self._client = client
        self._node_of = node_of
        self._refused = refused
        self._wanted_port = port
        self._port = port or DEFAULT_PORT
        self._bound = False
        self._interfaces = interfaces
        self._towards = towards
        self._handshakes: Counter[str] = Counter()

    async def serve(
        self, handler: Handler, listening: Callable[[tuple[Address, ...]], None]
    ) -> None:
        known = set(interface_names())
        unknown = [name for name in self._interfaces if name not in known]
        if unknown:
            raise UsageError(
                f"no interface {unknown[0]!r} here; there are: {', '.join(sorted(known))}"
            )
        async with trio.open_nursery() as nursery:
            scopes: dict[str, trio.CancelScope] = {}
            before: tuple[Address, ...] | None = None
            reachable: tuple[str, ...] = ()
            while True:
                with contextlib.suppress(OSError):  # out of descriptors: as it was a second ago
                    reachable = await trio.to_thread.run_sync(
                        local_addresses, self._interfaces, self._towards
                    )
                hosts = reachable if self._interfaces else ("0.0.0.0", "::")
                for gone in set(scopes) - set(hosts):
                    scopes.pop(gone).cancel()
                for host in hosts:
                    if host not in scopes and (listener := self._listen(host)):
                        scopes[host] = trio.CancelScope()
                        nursery.start_soon(self._accept, listener, handler, scopes[host])
                addresses = tuple(Address(host, self._port) for host in reachable)
                if addresses != before and (scopes or self._interfaces):
                    listening(addresses)
                    before = addresses
                await trio.sleep(POLL_S)

    async def connect(self, address: Address) -> TlsStream:
        with trio.move_on_after(CONNECT_S):
            connection = await self._connect(address)
            return await self._handshake(connection, self._client, server_side=False)
        raise StreamLost(f"{address} does not answer")

    def _listen(self, host: str) -> socket.socket | None:
        """A listening socket; None if this host cannot be bound now. Raises UsageError."""
        movable = self._wanted_port is None and not self._bound
        try:
            listener = _listener(host, self._port)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise UsageError(
                    f"port {self._port} may not be used by this user; choose one above 1023"
                ) from None
            if error.errno != errno.EADDRINUSE or self._bound:
                return None  # not up, no IPv6, or another's: peers reach us elsewhere
            if not movable:
                raise UsageError(
                    f"port {self._port} is taken on {host}; choose another with --port"
                ) from None
            try:
                listener = _listener(host, 0)  # a second node on this machine
            except OSError:
                return None
        self._port, self._bound = listener.getsockname()[1], True
        return listener

    async def _accept(
        self, listener: socket.socket, handler: Handler, scope: trio.CancelScope
    ) -> None:
        with listener, scope:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    try:
                        connection, remote = listener.accept()
                    except BlockingIOError:
                        continue
                    except OSError:
                        await trio.sleep(0.1)  # out of descriptors: those in use will end
                        continue
                    if self._crowded(remote[0]):
                        self._refused("crowded")
                        connection.close()
                        continue
                    nursery.start_soon(self._welcome, connection, remote[0], handler)

    def _crowded(self, host: str) -> bool:
        return (
            self._handshakes.total() >= HANDSHAKES_LIMIT
            or self._handshakes[host] >= HANDSHAKES_PER_HOST_LIMIT
        )

    async def _welcome(self, connection: socket.socket, host: str, handler: Handler) -> None:
        self._handshakes[host] += 1
        stream: TlsStream | None = None
        try:
            with trio.move_on_after(HANDSHAKE_S):
                connection.setblocking(False)
                _set_options(connection)
                stream = await self._handshake(connection, self._server, server_side=True)
        except IdentityError:
            self._refused("certificate")
        except MeshError:
            self._refused("tls")
        else:
            if stream is None:
                self._refused("timeout")
        finally:
            self._handshakes[host] -= 1
            if not self._handshakes[host]:
                del self._handshakes[host]
        if stream is not None:
            try:
                await handler(stream)
            finally:
                await stream.aclose()

    async def _connect(self, address: Address) -> socket.socket:
        """A connected socket to the first of the name's addresses that answers."""
        try:
            found = await trio.socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            unknown = StreamLost(f"{address}: {text_of(error)}")
            unknown.errno = NO_SUCH_NAME
            raise unknown from None
        code = 0
        for family, kind, protocol, _, where in found[:NAME_ADDRESSES_LIMIT]:
            try:
                connection = socket.socket(family, kind, protocol)
            except OSError as error:  # no IPv6 in this kernel, or out of descriptors
                code = error.errno or errno.EIO
                continue
            try:
                _set_options(connection)
                code = await _connect_socket(connection, where)
            except BaseException:
                connection.close()
                raise
            if not code:
                return connection
            connection.close()
        kind_of = ConnectionRefused if code == errno.ECONNREFUSED else StreamLost
        lost = kind_of(f"{address}: {os.strerror(code).lower()}")
        lost.errno = code
        raise lost

    async def _handshake(
        self, connection: socket.socket, context: ssl.SSLContext, *, server_side: bool
    ) -> TlsStream:
        """TLS on a connected socket, which it owns from here on. Raises StreamLost, IdentityError."""
        secured: ssl.SSLSocket | None = None
        try:
            host: str = connection.getpeername()[0]
            secured = context.wrap_socket(
                connection, server_side=server_side, do_handshake_on_connect=False
            )
            while True:
                try:
                    secured.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await trio.lowlevel.wait_readable(secured)
                except ssl.SSLWantWriteError:
                    await trio.lowlevel.wait_writable(secured)
            certificate = secured.getpeercert(binary_form=True)
            if certificate is None:
                raise IdentityError("no certificate")
            return TlsStream(secured, self._node_of(certificate), host, self._refused)
        except ssl.SSLCertVerificationError as error:
            self._close(secured or connection)
            raise IdentityError(f"certificate of another mesh ({error.verify_message})") from None
        except (OSError, ValueError) as error:
            self._close(secured or connection)
            raise StreamLost(f"no TLS handshake: {text_of(error)}") from None
        except BaseException:
            self._close(secured or connection)
            raise

    @staticmethod
    def _close(connection: socket.socket) -> None:
        connection.close()


def _set_options(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it ended already, which whoever uses it will see
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform == "linux":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            connection.setsockopt(socket.IPPROTO_TCP, THIN_LINEAR_TIMEOUTS, 1)
            connection.setsockopt(socket.IPPROTO_TCP, RTO_MAX, RTO_MAX_MS)  # last: it is new


async def _connect_socket(connection: socket.socket, where: tuple[object, ...]) -> int:
    """0, or the error number of why not."""
    connection.setblocking(False)
    code = connection.connect_ex(where)
    if code == errno.EINPROGRESS:
        await trio.lowlevel.wait_writable(connection)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return code


def _listener(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setblocking(False)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
