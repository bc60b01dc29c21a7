"""What is wrong around this node: asks by multicast, knocks at addresses as a node would dial them.

A look's trip: interfaces -> survey() by multicast, while own, given and earlier addresses are knocked at ->
then those of our mesh that announced themselves -> Surroundings. Rules: 1. It works with no node
running, and disturbs none that does: a knock ends after TLS, before a word of the protocol. 2. It
takes SURVEY and KNOCK_S at most, whatever the network does.
"""

import contextlib
import errno
import functools
import hmac
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from mesh.core.address import Address
from mesh.core.messages import PROTOCOL
from mesh.errors import ConnectionRefused, IdentityError, MeshError, StreamLost
from mesh.identity import Identity, node_of
from mesh.memory import Memory
from mesh.net.interfaces import all_interfaces, in_use
from mesh.net.survey import survey
from mesh.net.tcp import TcpTransport
from mesh.settings import parse_address
from mesh.surroundings import Interface, Knock, Outcome, Surroundings

KNOCK_S: Final = 3.5
"""Linux gives up looking for a neighbour on the same network after 3.1 s, and says so."""

PLAIN_S: Final = 1.0
"""At the end of a silent knock, for a connection without TLS: is it the line, or the process?"""

KNOCKS_LIMIT: Final = 64
"""All at once, or a network that drops everything would take minutes."""


def earlier_peers(state: Path) -> list[str]:
    """Where peers were when this machine's node last ran."""
    return [str(address) for address in Memory(state).peers()]


def look_around(
    identity: Identity | None,
    *,
    interfaces: tuple[str, ...],
    listens: Iterable[str],
    addresses: Iterable[str],
) -> Surroundings:
    """Looks for a few seconds. `interfaces`: only these; empty: those where a node `listens`; where it
    does nowhere: those that one would use. `addresses` are knocked at, beside those that members announce;
    nothing is where this machine is in no mesh."""
    hosts = frozenset(parse_address(address).host for address in listens)
    knocks = tuple(parse_address(address) for address in addresses)
    return trio.run(functools.partial(_look, identity, interfaces, hosts, knocks))


async def _look(
    identity: Identity | None,
    wanted: tuple[str, ...],
    hosts: frozenset[str],
    addresses: tuple[Address, ...],
) -> Surroundings:
    found = all_interfaces()
    usual = in_use(found)
    here = tuple(
        replace(
            one,
            looked_at=one in usual if not wanted and not hosts else _is_wanted(one, wanted, hosts),
        )
        for one in found
    )
    own = frozenset(address for one in here for address in one.addresses)
    chosen = [one for one in here if one.looked_at]
    knocking = _Knocking(identity)
    echoes = []

    def is_member(instance: str, tag: str) -> bool:
        return identity is not None and hmac.compare_digest(
            tag.encode(), identity.beacon(instance).encode()
        )

    async with trio.open_nursery() as nursery:
        for address in addresses:
            knocking.start(nursery, address)
        echoes = await survey(chosen, own, is_member)
        for echo in echoes:
            for announcement in echo.announcements:
                if announcement.member:
                    for address in announcement.addresses:
                        knocking.start(nursery, address)
    return Surroundings(
        protocol=str(PROTOCOL),
        interfaces=here,
        echoes=tuple(echoes),
        knocks=tuple(knocking.done),
    )


def _is_wanted(one: Interface, wanted: tuple[str, ...], hosts: frozenset[str]) -> bool:
    return one.name in wanted if wanted else not hosts.isdisjoint(one.addresses)


class _Knocking:
    """The knocks of one look: each address once."""

    def __init__(self, identity: Identity | None) -> None:
        self.done: list[Knock] = []
        self._known: set[Address] = set()
        self._transport = None
        if identity is not None:
            self._transport = TcpTransport(
                server=identity.context(server=True),
                client=identity.context(server=False),
                node_of=node_of,
                refused=lambda kind: None,
                port=None,
                interfaces=(),
            )

    def start(self, nursery: trio.Nursery, address: Address) -> None:
        if address not in self._known and len(self._known) < KNOCKS_LIMIT:
            self._known.add(address)
            nursery.start_soon(self._knock, address)

    async def _knock(self, address: Address) -> None:
        if self._transport is None:
            return
        node, outcome, reason = "", Outcome.SILENT, f"{address} does not answer"
        with trio.move_on_after(KNOCK_S):
            async with trio.open_nursery() as nursery:
                opens = _Opens()
                nursery.start_soon(opens.find_out, address)
                try:
                    stream = await self._transport.connect(address)
                    node, outcome, reason = stream.peer, Outcome.NODE, ""
                    await stream.aclose()
                except MeshError as error:
                    outcome, reason = _outcome(error), str(error)
                nursery.cancel_scope.cancel()
        if outcome is Outcome.SILENT and opens.yes:
            outcome, reason = Outcome.STUCK, f"{address} takes connections and says nothing"
        self.done.append(Knock(address=address, outcome=outcome, node=node, reason=reason))


class _Opens:
    """Whether a connection opens at all where TLS gets no answer."""

    yes = False

    async def find_out(self, address: Address) -> None:
        """Waits first: a node that answers in time counts no strange connection."""
        await trio.sleep(KNOCK_S - PLAIN_S)
        with contextlib.suppress(OSError):
            async with await trio.open_tcp_stream(address.host, address.port):
                self.yes = True


def _outcome(error: MeshError) -> Outcome:
    match error:
        case IdentityError():
            return Outcome.OTHER_MESH
        case ConnectionRefused():
            return Outcome.REFUSED
        case StreamLost() if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
            return Outcome.NO_ROUTE
        case StreamLost() if error.errno:
            return Outcome.SILENT
        case _:
            return Outcome.STRANGER
