"""An in-memory network under the Stream contract: delay, bandwidth, lost connections, partitions.

One seed decides everything; under trio's autojump clock 200 nodes live a minute in seconds. Rules:
1. Bytes of one direction arrive in order or not at all. 2. A lost connection ends between any two
bytes: what had arrived may be read, the rest is gone, both ends learn of it. 3. It knows no protocol.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import trio

from mesh.core.address import Address
from mesh.core.messages import (
    NodeId,
)
from mesh.errors import ConnectionRefused, StreamLost
from mesh.net.transport import Candidate, Handler

BUFFER_BYTES = 256 * 1024
"""What one direction holds before its sender waits, like a socket's buffers."""

PIECE_BYTES = 64 * 1024
CONNECT_S = 5.0
"""How long a dial into a partition takes to fail."""

ANNOUNCE_S = 10.0
"""How often a node asks again who is there; zeroconf's browser asks after 1, 2, 4, 8.. seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What the network does to connections made from now on."""

    delay_s: tuple[float, float] = (0.0002, 0.002)
    """one-way, drawn anew for each piece"""
    bytes_per_s: float = 125e6
    bytes_until_lost: float | None = None
    """mean of the bytes that a connection carries before it is lost; None: it never is"""


class SimulatedNetwork:
    """All nodes and links of one simulation."""

    def __init__(self, rng: Random, weather: Weather | None = None) -> None:
        self.rng = rng
        self.weather = weather or Weather()
        self._handlers: dict[Address, tuple[NodeId, Handler, trio.Nursery]] = {}
        self._seekers: dict[NodeId, tuple[Callable[[Candidate], None], Candidate]] = {}
        self._links: set[_Link] = set()
        self._groups: tuple[frozenset[NodeId], ...] = ()

    def partition(self, *groups: frozenset[NodeId]) -> None:
        """Cuts all connections between groups, silently; no group at all: heals."""
        self._groups = groups
        for link in list(self._links):
            if not self.reachable(*link.ends):
                link.freeze()

    def reachable(self, a: NodeId, b: NodeId) -> bool:
        sides = [{a, b} & group for group in self._groups]
        return all(len(side) != 1 for side in sides)

    def lose_all(self) -> None:
        """Every connection is lost now."""
        for link in list(self._links):
            link.lose()


class SimulatedTransport:
    """One node's way into the network. See mesh.net.transport.Transport."""

    def __init__(self, network: SimulatedNetwork, node: NodeId, address: Address) -> None:
        self._network = network
        self._node = node
        self._address = address
        self._mine: set[_Link] = set()

    async def serve(
        self, handler: Handler, listening: Callable[[tuple[Address, ...]], None]
    ) -> None:
        handlers = self._network._handlers
        try:
            async with trio.open_nursery() as nursery:
                handlers[self._address] = (self._node, handler, nursery)
                listening((self._address,))
                await trio.sleep_forever()
        finally:
            handlers.pop(self._address, None)
            for link in list(self._mine):
                link.lose()

    async def connect(self, address: Address) -> "SimulatedStream":
        network = self._network
        await trio.sleep(network.rng.uniform(*network.weather.delay_s))
        if address not in network._handlers:
            raise ConnectionRefused(f"{address}: connection refused")
        peer, handler, nursery = network._handlers[address]
        if not network.reachable(self._node, peer):
            await trio.sleep(CONNECT_S)
            raise StreamLost(f"{address} does not answer")
        link = _Link(network, self._node, peer)
        link.hosts = (self._address.host, address.host)
        self._mine.add(link)
        near, far = link.streams()
        nursery.start_soon(_handle, handler, far)
        return near


async def _handle(handler: Handler, stream: "SimulatedStream") -> None:
    try:
        await handler(stream)
    finally:
        await stream.aclose()


class SimulatedDiscovery:
    """mDNS of the simulation: everybody running hears of everybody running."""

    def __init__(self, network: SimulatedNetwork, node: NodeId) -> None:
        self._network = network
        self._node = node

    async def run(
        self,
        listening: Callable[[], tuple[Address, ...]],
        found: Callable[[Candidate], None],
    ) -> None:
        seekers = self._network._seekers
        own = Candidate(addresses=listening(), hint=self._node[:16])
        try:
            while True:
                seekers.pop(self._node, None)
                for other, (tell, candidate) in seekers.items():
                    if self._network.reachable(self._node, other):
                        tell(own)
                        found(candidate)
                seekers[self._node] = (found, own)
                await trio.sleep(ANNOUNCE_S)
        finally:
            seekers.pop(self._node, None)


class _Pipe:
    """One direction of a connection."""

    def __init__(self) -> None:
        self.pieces: deque[tuple[float, memoryview]] = deque()
        self.held = 0
        self.last_at = 0.0
        self.moved = trio.Event()

    def wake(self) -> None:
        self.moved.set()
        self.moved = trio.Event()


class _Link:
    """One connection: two pipes that live and die together."""

    def __init__(self, network: SimulatedNetwork, a: NodeId, b: NodeId) -> None:
        self.network = network
        self.ends = (a, b)
        self.pipes = (_Pipe(), _Pipe())
        self.hosts = ("", "")
        self.lost = self.frozen = False
        self.closed_by: set[int] = set()
        mean = network.weather.bytes_until_lost
        self._budget = None if mean is None else network.rng.expovariate(1 / mean)
        network._links.add(self)

    def streams(self) -> tuple["SimulatedStream", "SimulatedStream"]:
        return SimulatedStream(self, 0, self.ends[1]), SimulatedStream(self, 1, self.ends[0])

    def spend(self, count: int) -> int:
        """How many of `count` bytes still get through before the connection is lost."""
        if self._budget is None:
            return count
        through = min(count, int(self._budget))
        self._budget -= count
        return through

    def lose(self) -> None:
        """Both ends learn of it; what is still under way is gone."""
        self.lost = True
        now = trio.current_time()
        for pipe in self.pipes:
            while pipe.pieces and pipe.pieces[-1][0] > now:
                pipe.pieces.pop()
            pipe.wake()
        self.network._links.discard(self)

    def freeze(self) -> None:
        """Nothing arrives any more and nobody is told: a cut cable."""
        self.frozen = True


class SimulatedStream:
    """One end of a connection. See mesh.net.transport.Stream."""

    def __init__(self, link: _Link, side: int, peer: NodeId) -> None:
        self._link = link
        self._side = side
        self._out, self._in = link.pipes[side], link.pipes[1 - side]
        self.peer = peer
        self.host = link.hosts[1 - side]

    async def send_all(self, data: bytes | memoryview) -> None:
        view = memoryview(bytes(data))
        await trio.lowlevel.checkpoint()
        while len(view):
            self._check()
            if self._out.held >= BUFFER_BYTES:
                await self._out.moved.wait()
                continue
            piece, view = view[:PIECE_BYTES], view[PIECE_BYTES:]
            through = self._link.spend(len(piece))
            self._put(piece[:through])
            if through < len(piece):
                self._link.lose()
        self._check()

    def _put(self, piece: memoryview) -> None:
        network, pipe = self._link.network, self._out
        if not len(piece) or self._link.frozen:
            return
        delay_s = network.rng.uniform(*network.weather.delay_s)
        takes_s = len(piece) / network.weather.bytes_per_s
        at = max(trio.current_time() + delay_s, pipe.last_at) + takes_s
        pipe.pieces.append((at, piece))
        pipe.last_at = at
        pipe.held += len(piece)
        pipe.wake()

    async def receive_into(self, view: memoryview) -> int:
        pipe = self._in
        await trio.lowlevel.checkpoint()
        while True:
            if self._side in self._link.closed_by:
                raise StreamLost("connection closed")
            if pipe.pieces:
                at, piece = pipe.pieces[0]
                if trio.current_time() < at and not self._link.lost:
                    with trio.move_on_at(at):
                        await pipe.moved.wait()
                    continue
                return self._take(pipe, piece, view)
            if self._link.lost:
                raise StreamLost("connection lost")
            if self._link.closed_by:
                return 0
            await pipe.moved.wait()

    def _take(self, pipe: _Pipe, piece: memoryview, view: memoryview) -> int:
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        if count == len(piece):
            pipe.pieces.popleft()
        else:
            pipe.pieces[0] = (pipe.pieces[0][0], piece[count:])
        pipe.held -= count
        pipe.wake()
        return count

    async def aclose(self) -> None:
        self._link.closed_by.add(self._side)
        for pipe in self._link.pipes:
            pipe.wake()
        if len(self._link.closed_by) == 2:
            self._link.network._links.discard(self._link)

    def _check(self) -> None:
        if self._link.lost or self._link.closed_by:
            raise StreamLost("connection lost")
