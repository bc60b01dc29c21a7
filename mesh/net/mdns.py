"""mDNS: announces this node as `_gossipmesh._tcp` and yields candidates. The only home of zeroconf.

Rules: 1. What mDNS says is a rumour: it yields addresses to dial, never members, and a record that
goes is no death (a dead node's record lives for 1125 s and more). 2. zeroconf runs in its own
threads; what they find crosses into the loop through one bounded channel, what blocks runs in a
worker thread. 3. Addresses are polled: a node that starts before it has one, or changes it, would
otherwise stay invisible for ever. A candidate's trip: browser thread -> _Listener -> channel -> found.
"""

import contextlib
import functools
import socket
from collections.abc import Callable

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from mesh.core.address import Address
from mesh.core.messages import (
    PROTOCOL,
)
from mesh.net.interfaces import local_addresses
from mesh.net.transport import Candidate

SERVICE = "_gossipmesh._tcp.local."
INSTANCE_LENGTH = 16
"""Characters of the node id in a name: unique by construction, so probing for conflicts can be
skipped, which shows a newcomer in 6 ms instead of 1.1 s."""

POLL_S = 1.0
RESOLVE_MS = 2000
CANDIDATES_LIMIT = 256
CLOSE_S = 1.0
"""Saying goodbye takes 0.25 s."""


class MdnsDiscovery:
    """See mesh.net.transport.Discovery."""

    def __init__(
        self, *, node: str, beacon: Callable[[str], str], interfaces: tuple[str, ...]
    ) -> None:
        """`beacon` gives the tag by which members of one mesh recognise a node's instance name."""
        self._instance = node[:INSTANCE_LENGTH]
        self._beacon = beacon
        self._interfaces = interfaces
        self._zeroconf: Zeroconf | None = None
        self._browser: ServiceBrowser | None = None
        self._announced: tuple[Address, ...] = ()
        self._on: tuple[str, ...] = ()

    async def run(
        self,
        listening: Callable[[], tuple[Address, ...]],
        found: Callable[[Candidate], None],
    ) -> None:
        put, take = trio.open_memory_channel[Candidate](CANDIDATES_LIMIT)
        listener = _Listener(self, trio.lowlevel.current_trio_token(), put)
        try:
            while True:
                refresh = functools.partial(self._refresh, listening(), listener)
                await trio.to_thread.run_sync(refresh)
                with trio.move_on_after(POLL_S):
                    async for candidate in take:
                        found(candidate)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S):
                await trio.to_thread.run_sync(self._close, abandon_on_cancel=True)

    def is_member(self, info: ServiceInfo) -> bool:
        """Whether an announcement carries our mesh's beacon and is not our own."""
        instance = info.name.removesuffix("." + SERVICE)
        tag = info.properties.get(b"m") or b""
        return instance != self._instance and tag == self._beacon(instance).encode()

    def _refresh(self, listening: tuple[Address, ...], listener: "_Listener") -> None:
        """Brings zeroconf in line with the interfaces and addresses of this moment. Blocks."""
        try:
            on = local_addresses(self._interfaces)
        except OSError:
            return  # out of descriptors
        on = tuple(a for a in on if ":" not in a) or on
        if not on or not listening:
            return  # no network yet: look again in a second
        with contextlib.suppress(OSError, RuntimeError, ZeroconfError, TimeoutError):
            if self._zeroconf is None:
                version = IPVersion.V6Only if ":" in on[0] else IPVersion.V4Only
                self._zeroconf = Zeroconf(interfaces=list(on), ip_version=version)
                self._on = on
            if on != self._on:
                self._zeroconf.update_interfaces(list(on))
                self._on = on
            if self._browser is None or not self._browser.is_alive():
                self._browser = ServiceBrowser(self._zeroconf, SERVICE, listener)
            if not self._announced:
                self._zeroconf.register_service(self._info(listening), cooperating_responders=True)
            elif self._announced != listening:
                self._zeroconf.update_service(self._info(listening))
            self._announced = listening

    def _info(self, listening: tuple[Address, ...]) -> ServiceInfo:
        packed = [
            socket.inet_pton(socket.AF_INET6 if ":" in a.host else socket.AF_INET, a.host)
            for a in listening
        ]
        return ServiceInfo(
            SERVICE,
            f"{self._instance}.{SERVICE}",
            port=listening[0].port,
            addresses=packed,
            properties={
                "txtvers": "1",
                "id": self._instance,
                "v": str(PROTOCOL),
                "m": self._beacon(self._instance),
            },
            server=f"{self._instance}.local.",
        )

    def _close(self) -> None:
        if self._zeroconf is not None:
            self._zeroconf.close()


class _Listener(ServiceListener):
    """Called in the browser's thread; may block there."""

    def __init__(
        self,
        discovery: MdnsDiscovery,
        token: trio.lowlevel.TrioToken,
        put: trio.MemorySendChannel[Candidate],
    ) -> None:
        self._discovery = discovery
        self._token = token
        self._put = put

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        if not name.endswith("." + SERVICE):
            return  # anybody on the network may say anything: it must not end this thread
        info = None
        with contextlib.suppress(ZeroconfError, OSError, RuntimeError, ValueError):
            info = zc.get_service_info(type_, name, timeout=RESOLVE_MS)
        if info is None or info.port is None or not self._discovery.is_member(info):
            return
        addresses = tuple(Address(host, info.port) for host in info.parsed_scoped_addresses()[:16])
        if not addresses or not info.port:
            return
        hint = name.removesuffix("." + SERVICE)
        candidate = Candidate(addresses=addresses, hint=hint)
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._hand_over, candidate)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """A goodbye or an expired record: no evidence of anything (rule 1)."""

    def _hand_over(self, candidate: Candidate) -> None:
        with contextlib.suppress(
            trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError
        ):
            self._put.send_nowait(candidate)
