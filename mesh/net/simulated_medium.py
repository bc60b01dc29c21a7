"""What the ends of simulated connections share: chance, the weather, open ways, and their processes."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import trio

from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.errors import StreamLost

if TYPE_CHECKING:
    from mesh.net.simulated_link import SimulatedStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What the network does to what is sent from now on."""

    delay_s: tuple[float, float] = (0.0002, 0.002)
    """one-way, drawn anew for each piece"""
    bytes_per_s: float = 125e6
    bytes_until_lost: float | None = None
    """mean of the bytes that a connection carries before it is lost; None: it never is"""
    loss: float = 0.0
    """probability that a packet is lost, each time that it is sent"""


class Process:
    """One start of one node: its open streams, and whether it runs."""

    def __init__(self, node: NodeId, address: Address) -> None:
        self.node = node
        self.address = address
        self.gone = False
        """crashed or without power: for good; a restart is another Process"""
        self.streams: dict[int, SimulatedStream] = {}
        self.moved = trio.Event()
        self._awake: trio.Event | None = None
        self.closing: list[SimulatedStream] = []
        """streams that it closed while it was stalled"""

    def move(self) -> None:
        """Wakes who has to say where it is now."""
        self.moved.set()
        self.moved = trio.Event()

    @property
    def stalled(self) -> bool:
        return self._awake is not None

    async def awake(self) -> None:
        while self._awake is not None:
            await self._awake.wait()

    def stall(self) -> None:
        if self._awake is None and not self.gone:
            self._awake = trio.Event()

    def resume(self) -> None:
        """Runs again; what it closed meanwhile is closed now."""
        if self._awake is not None:
            self._awake.set()
            self._awake = None
        closed, self.closing = self.closing, []
        for stream in closed:
            stream.hang_up()

    def end(self, *, silent: bool) -> None:
        """It is no more. Its kernel resets every connection, unless it has no power either."""
        self.gone = True
        self.closing.clear()
        self.resume()
        for stream in list(self.streams.values()):
            stream.abort(silent=silent)


class Medium:
    """What lies between all ends: chance, weather, and which ways are open."""

    def __init__(self, rng: Random, weather: Weather) -> None:
        self.rng = rng
        self.weather = weather
        self.touched: Callable[[NodeId], None] | None = None
        """called at each stream call of a running node, before it does anything"""
        self.links: dict[int, SimulatedStream] = {}
        """the dialler's end of each connection, in the order in which they were made"""
        self.dark: dict[Address, Process] = {}
        """where a machine was that has no power, or has moved on"""
        self._sides: dict[NodeId, int] = {}
        self._cuts: set[tuple[NodeId, NodeId]] = set()
        self._numbered = 0

    def number(self) -> int:
        self._numbered += 1
        return self._numbered

    def open(self, sender: NodeId, receiver: NodeId) -> bool:
        """Whether anything that one sends can reach the other."""
        sides = self._sides
        return not (
            (sides and sides.get(sender, 0) != sides.get(receiver, 0))
            or (self._cuts and (sender, receiver) in self._cuts)
        )

    def delay(self) -> float:
        return self.rng.uniform(*self.weather.delay_s)

    def enter(self, process: Process) -> None:
        """A stream call of this process begins. Raises StreamLost if it is no more."""
        if self.touched is not None and not process.gone:
            self.touched(process.node)
        if process.gone:
            raise StreamLost("this process is no more")
