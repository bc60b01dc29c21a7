"""Connections as they begin, those that come in and those that this node dials: who is it, and what
for. What is said on them afterwards is links.py's (control) and responder.py's (bulk).

A connection's trip: welcome() or dial() -> greet(): both Hellos -> control: Links.run(); bulk:
`answer_bulk`. Rule: whatever is wrong with one ends that one, is told to the peer, and counted.
"""

import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.messages import PROTOCOL, Hello, Member, NodeId, Purpose, Refusal
from mesh.errors import (
    ConnectionRefused,
    IdentityError,
    MeshError,
    NotFinite,
    RemoteProtocolError,
    StreamLost,
)
from mesh.frames import FrameReader, send_frame
from mesh.links import Incompatible, Itself, Links, Peer, Twin, dial, greet
from mesh.net.transport import Stream, Transport

LAST_WORD_S: Final = 1.0
"""For telling a peer what it did wrong before its connection is closed."""


class Doors:
    """Those of one node."""

    answer_bulk: Callable[[Stream, FrameReader], Awaitable[None]]
    """set before anybody is welcomed"""

    def __init__(
        self,
        transport: Transport,
        links: Links,
        *,
        name: str,
        instance: int,
        own: Callable[[], Member],
        emit: Callable[[ev.Event], Awaitable[None]],
        refused: Callable[[str], None],
    ) -> None:
        """`own` is this node's row now; `refused` counts what peers did wrong."""
        self._transport = transport
        self._links = links
        self._name = name
        self._instance = instance
        self._own = own
        self._emit = emit
        self._refused = refused
        self.began_at = 0.0
        """on trio's clock; set when the node runs"""

    def _hello(self, purpose: Purpose) -> Hello:
        return Hello(
            protocol=PROTOCOL,
            name=self._name,
            purpose=purpose,
            member=self._own(),
            instance=self._instance,
            age_ms=round(1000 * (trio.current_time() - self.began_at)),
        )

    async def welcome(self, stream: Stream) -> None:
        """A stream that somebody opened to us: the one place where a connection's end is decided."""
        talking = stream
        try:
            peer = await greet(stream, self._hello(Purpose.CONTROL))
            talking = peer.stream
            if peer.hello.purpose is Purpose.BULK:
                await self.answer_bulk(peer.stream, peer.reader)
            else:
                await self._links.run(peer, None)
        except Incompatible as error:
            await self._report_incompatible(error, None)
        except Twin as error:
            await self._emit(ev.TwinMet(host=error.host))
        except RemoteProtocolError as error:
            self._refused("non_finite" if isinstance(error, NotFinite) else "protocol")
            with contextlib.suppress(MeshError), trio.move_on_after(LAST_WORD_S):
                await send_frame(talking, Refusal(reason=str(error)))
        except MeshError:
            pass  # lost, timed out or ourselves: nothing was promised yet, or PeerLost said it

    async def dial(self, effect: ev.Dial) -> None:
        refused, itself = False, False
        try:
            peer = await dial(
                self._transport,
                effect.addresses,
                partial(self._hello, Purpose.CONTROL),
                proved_host=effect.proved_host,
            )
        except Incompatible as error:
            await self._report_incompatible(error, effect.contact)
            return
        except Twin as error:
            await self._emit(ev.TwinMet(host=error.host))
            return
        except MeshError as error:
            refused, itself = isinstance(error, ConnectionRefused), isinstance(error, Itself)
            await self._emit(
                ev.DialFailed(
                    contact=effect.contact, refused=refused, reason=str(error), itself=itself
                )
            )
            return
        await self._links.run(peer, effect.contact)

    async def _report_incompatible(self, error: Incompatible, contact: str | None) -> None:
        await self._emit(
            ev.PeerIncompatible(
                node=error.node, name=error.name, reason=str(error), contact=contact
            )
        )

    async def connect_bulk(self, peer: NodeId, addresses: tuple[Address, ...]) -> Peer:
        """A connection for weights. Raises StreamLost also where only somebody else answers, or this
        node itself."""
        try:
            return await dial(
                self._transport, addresses, partial(self._hello, Purpose.BULK), wanted=peer
            )
        except (IdentityError, Incompatible, Itself, Twin) as error:
            raise StreamLost(str(error)) from None
