"""An in-memory network under the Transport contract: who is where, and what befalls the nodes.

One seed decides everything; under trio's autojump clock 200 nodes live a minute in seconds. Rules:
1. A fault acts on the process that runs now: a node that comes back with a new SimulatedTransport has
new streams, its old ones stay dead. 2. Nothing is walked through in an order that depends on hashes.
3. It knows no protocol. A connection's trip: connect -> its SYN, tried again on a bad line -> two
SimulatedStreams (simulated_link.py) -> the listener's handler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

import trio

from mesh.alarm import sleep
from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.errors import ConnectionRefused, StreamLost
from mesh.net.simulated_link import SimulatedStream
from mesh.net.simulated_medium import Medium, Process, Weather
from mesh.net.transport import Candidate, Handler

__all__ = ["SimulatedDiscovery", "SimulatedNetwork", "SimulatedTransport", "Weather"]

CONNECT_S: Final = 5.0
"""How long a dial that nobody answers takes to fail."""

SYN_PAUSES_S: Final = (1.0, 2.0, CONNECT_S - 3.0)
"""Linux sends a SYN again after 1 s, then 2 s; the third pause is what is left of CONNECT_S."""

ANNOUNCE_S: Final = 10.0
"""When a node asks first who else is there, then after twice as long each time; zeroconf's browser asks
after 1, 2, 4, 8.. seconds, up to an hour."""

HEARD: Final = 40
HEARD_AGAIN: Final = 4
"""Where there are more: how many candidates a newcomer hears of (enough to know that the mesh is large), and
how many whoever asks again; as many hear of who asks. At 1000 nodes multicast queries and answers crowd each
other out, and a browser hears a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listener:
    process: Process
    handler: Handler
    nursery: trio.Nursery


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seeker:
    process: Process
    found: Callable[[Candidate], None]
    own: Candidate


class SimulatedNetwork(Medium):
    """All nodes and connections of one simulation, and every fault that can befall them."""

    def __init__(self, rng: Random, weather: Weather | None = None) -> None:
        super().__init__(rng, weather or Weather())
        self.processes: dict[NodeId, Process] = {}
        """the last start of each node"""
        self.listeners: dict[Address, _Listener] = {}
        self.owners: dict[Address, NodeId] = {}
        """who listened where last: a refusal travels as far as its connections would"""
        self.seekers: dict[NodeId, _Seeker] = {}

    # ------------------------------------------------------------------------------------ the ways

    def partition(self, *groups: frozenset[NodeId]) -> None:
        """Cuts everything between groups, silently; no group at all: this partition heals."""
        self._sides = {}
        for number, group in enumerate(groups):
            for node in group:
                self._sides[node] = self._sides.get(node, 0) | 1 << number
        self._ways_changed()

    def cut(self, sender: NodeId, receiver: NodeId) -> None:
        """Nothing that one sends arrives at the other any more; the way back stays as it is."""
        self._cuts.add((sender, receiver))
        self._ways_changed()

    def heal(self) -> None:
        """Ends every cut and partition."""
        self._sides, self._cuts = {}, set()
        self._ways_changed()

    def reachable(self, a: NodeId, b: NodeId) -> bool:
        """Whether both ways between them are open."""
        return self.open(a, b) and self.open(b, a)

    def _ways_changed(self) -> None:
        for near in list(self.links.values()):
            for end in near.ends:
                end.way_changed()

    # --------------------------------------------------------------------------------- connections

    def lose_all(self) -> None:
        """Every connection is lost now, and both its ends know."""
        now = trio.current_time()
        for near in list(self.links.values()):
            for end in near.ends:
                end.lose_at(now)

    def lose(self, node: NodeId) -> None:
        """Every connection of one node is lost now."""
        now = trio.current_time()
        if node in self.processes:
            for stream in list(self.processes[node].streams.values()):
                for end in stream.ends:
                    end.lose_at(now)

    # ----------------------------------------------------------------------------------- processes

    def stall(self, node: NodeId) -> None:
        """SIGSTOP: its stream calls do not return; its kernel goes on for it."""
        if node in self.processes:
            self.processes[node].stall()

    def resume(self, node: NodeId) -> None:
        """SIGCONT."""
        if node in self.processes:
            self.processes[node].resume()

    async def awake(self, node: NodeId) -> None:
        """Returns when this node is not stalled."""
        if node in self.processes:
            await self.processes[node].awake()

    def crash(self, node: NodeId) -> None:
        """kill -9: its address refuses, the other ends are reset, its dying tasks reach nobody."""
        if node in self.processes:
            self.end(self.processes[node], silent=False)

    def vanish(self, node: NodeId) -> None:
        """A power cut: gone like a crashed one, and nobody is told anything, ever."""
        process = self.processes.get(node)
        if process is not None and not process.gone:
            self.dark[process.address] = process
            self.end(process, silent=True)

    def end(self, process: Process, *, silent: bool) -> None:
        """Nothing of this process is left; of a later start of the same node, everything."""
        if process.gone:
            return
        self.silence(process)
        self.forget_seeker(process)
        process.end(silent=silent)

    def silence(self, process: Process) -> None:
        """Nobody listens where this process did."""
        listener = self.listeners.get(process.address)
        if listener is not None and listener.process is process:
            del self.listeners[process.address]

    def forget_seeker(self, process: Process) -> None:
        """Nobody finds this process any more."""
        seeker = self.seekers.get(process.node)
        if seeker is not None and seeker.process is process:
            del self.seekers[process.node]

    def listen(self, listener: _Listener) -> None:
        """The machine at this process's address answers, from now on."""
        address = listener.process.address
        self.listeners[address] = listener
        self.owners[address] = listener.process.node
        if self.dark.pop(address, None) is not None:
            self._ways_changed()


class SimulatedTransport:
    """One node's way into the network. See mesh.net.transport.Transport."""

    def __init__(self, network: SimulatedNetwork, node: NodeId, address: Address) -> None:
        self._network = network
        self._process = Process(node, address)
        self._listener: _Listener | None = None
        self._listening: Callable[[tuple[Address, ...]], None] | None = None
        network.processes[node] = self._process

    async def serve(
        self, handler: Handler, listening: Callable[[tuple[Address, ...]], None]
    ) -> None:
        process = self._process
        try:
            async with trio.open_nursery() as nursery:
                if not process.gone:
                    self._listener = _Listener(process=process, handler=handler, nursery=nursery)
                    self._listening = listening
                    self._network.listen(self._listener)
                    listening((process.address,))
                await trio.sleep_forever()
        finally:
            self._network.end(process, silent=False)

    async def connect(self, address: Address) -> SimulatedStream:
        network, process = self._network, self._process
        network.enter(process)
        await trio.lowlevel.checkpoint()
        for pause_s in SYN_PAUSES_S:
            if self._arrives(address):
                await sleep(network.delay() + network.delay())
                await process.awake()
                return self._connected(address)
            await trio.sleep(pause_s)
            await process.awake()
        raise StreamLost(f"{address} does not answer")

    def _arrives(self, address: Address) -> bool:
        """Whether a SYN sent now comes there and its answer comes back."""
        network = self._network
        loss = network.weather.loss
        if address in network.dark or (loss and network.rng.random() < loss):
            return False
        peer = network.owners.get(address)
        return peer is None or network.reachable(self._process.node, peer)

    def _connected(self, address: Address) -> SimulatedStream:
        network, process = self._network, self._process
        listener = network.listeners.get(address)
        if process.gone or address in network.dark:
            raise StreamLost(f"{address} does not answer")
        if listener is None:
            raise ConnectionRefused(f"{address}: connection refused")
        near = SimulatedStream(network, process, network.number())
        far = SimulatedStream(network, listener.process, network.number())
        near.join(far)
        listener.nursery.start_soon(_handle, listener, far)
        return near

    def move(self, address: Address) -> None:
        """The machine is elsewhere now; its connections bring nothing any more, to both sides."""
        network, process = self._network, self._process
        network.silence(process)
        network.dark[process.address] = process
        process.address = address
        for stream in list(process.streams.values()):
            stream.sever()
        if self._listener is not None and not process.gone:
            network.listen(self._listener)
            assert self._listening is not None
            self._listening((address,))
            process.move()


async def _handle(listener: _Listener, stream: SimulatedStream) -> None:
    try:
        await listener.process.awake()
        await listener.handler(stream)
    finally:
        await stream.aclose()


class SimulatedDiscovery:
    """mDNS of the simulation: everybody running hears of everybody running, up to HEARD."""

    def __init__(self, network: SimulatedNetwork, node: NodeId) -> None:
        self._network = network
        self._node = node

    async def run(
        self,
        listening: Callable[[], tuple[Address, ...]],
        found: Callable[[Candidate], None],
    ) -> None:
        network = self._network
        process = network.processes[self._node]
        heard, pause_s = HEARD, ANNOUNCE_S
        try:
            while not process.gone:
                own = Candidate(addresses=listening(), hint=self._node[:16])
                network.seekers.pop(self._node, None)
                self._swap(own, found, heard)
                network.seekers[self._node] = _Seeker(process=process, found=found, own=own)
                heard = HEARD_AGAIN
                with trio.move_on_after(pause_s):
                    await process.moved.wait()
                pause_s *= 2
                await process.awake()
        finally:
            network.forget_seeker(process)

    def _swap(self, own: Candidate, found: Callable[[Candidate], None], heard: int) -> None:
        network = self._network
        others = list(network.seekers.values())
        listeners = len(others)
        if listeners > HEARD:
            others = network.rng.sample(others, heard)
            listeners = HEARD_AGAIN
        for rank, other in enumerate(others):
            if other.process.stalled or not network.reachable(self._node, other.process.node):
                continue
            if rank < listeners:
                other.found(own)
            found(other.own)
