"""The contracts between a node and whatever carries its bytes. Two transports keep them: tcp.py and
simulated.py; one test suite runs on both.
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from mesh.core.address import Address
from mesh.core.messages import (
    NodeId,
)


class Stream(Protocol):
    """An authenticated connection: bytes in order, or StreamLost (PeerTimeout is one).

    One task may send while another receives. A call that is cancelled half-way leaves the stream
    unusable: close it. After aclose() everything raises StreamLost.
    """

    peer: NodeId
    """who is on the other end, proved by its key"""

    host: str
    """where that is: an address without its port"""

    offer: str
    """what the other end has to know for seal(), to be told over this stream; secret to the two"""

    at_once_bytes: int
    """of the data of a send_all(), which are read before it waits: up to as many may change meanwhile"""

    def seal(self, offer: str) -> "Stream":
        """The same connection as a stream for much: fast, and just as private and authentic.

        `offer` is the other end's. Both ends call it behind the same byte of what each has sent, when
        nothing is under way in this object, and use only the new one (closing either closes both).
        Raises RemoteProtocolError for an offer that is none.
        """

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = math.inf, *, head: bytes = b""
    ) -> None:
        """Sends `head`, then `data`, as cheaply as one call can; returns when they are on their way:
        `data` may be reused then. Raises PeerTimeout if the other end takes nothing for timeout_s.
        Lets other tasks run only where it has to wait, or has been at it for long."""

    async def receive_into(
        self, view: memoryview, timeout_s: float = math.inf, *, worth: int = 1
    ) -> int:
        """Waits for bytes, writes at most len(view) of them; 0 at the end of the stream. Raises
        PeerTimeout if nothing comes for timeout_s; what came is never lost to it. `worth`: as many are
        on their way for certain, so it may wait for some of them together."""

    async def aclose(self) -> None:
        """Ends the connection at once; never raises."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Listens and connects."""

    async def serve(
        self, handler: Handler, listening: Callable[[tuple[Address, ...]], None]
    ) -> None:
        """Runs `handler` in a task of its own for each stream that arrives, until cancelled.

        Calls `listening` with this node's addresses, first as soon as it listens and again whenever
        they change. Raises UsageError if it can never listen.
        """

    async def connect(self, address: Address) -> Stream:
        """Raises StreamLost; ConnectionRefused where nobody listens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Somebody who may be a peer."""

    addresses: tuple[Address, ...]
    hint: str
    """the first characters of the node id that it claims"""


class Discovery(Protocol):
    """Finds candidates on the local network."""

    async def run(
        self,
        listening: Callable[[], tuple[Address, ...]],
        found: Callable[[Candidate], None],
    ) -> None:
        """Announces this node where it is `listening` and reports others, until cancelled."""
