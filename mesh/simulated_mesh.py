"""A whole mesh in one process: machines, each with a node and a training, on one simulated network.

A machine's life: start() -> its training attaches -> crash(), vanish() or leave() -> start() again,
with what its disk kept. Rules: 1. Everything is drawn from one seed. 2. A process that died does
nothing more: its tasks are cancelled after the network and the ledger were told.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from mesh.alarm import sleep
from mesh.arrays import Floats
from mesh.codec import EXACT as F32
from mesh.codec import NAMES
from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.core.strategies import CYCLIC, EXACT, PAIR, UNWEIGHTED
from mesh.errors import MeshError
from mesh.ledger import FRAGMENT_ENTRIES, Ledger, WatchedReplica
from mesh.memory import PEERS_KEPT, Memory
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.net.transport import Candidate
from mesh.player import Player
from mesh.simulated_disk import SimulatedDisk
from mesh.simulated_node import SimulatedNode, Trace

ENTRIES: Final = 8 * FRAGMENT_ENTRIES + 3
"""Nine fragments, the last one short: more than a window, so that it has to move."""

PORT: Final = 7710
CLOCK_S: Final = 1.8e9
"""A day in 2027."""

STRATEGIES_LIVED: Final = (PAIR, PAIR, CYCLIC, EXACT)
"""Those that keep the mass, so that the ledger can count it."""

START_AGAIN_S: Final = 1.0
REMEMBER_S: Final = 5.0


def node_id(index: int) -> NodeId:
    """Ids whose order is that of their numbers."""
    return NodeId(f"node{index:04}" + "a" * 8)


def address_of(index: int) -> Address:
    """Where a machine is until it moves."""
    return Address(f"10.0.{index >> 8}.{index & 255}", PORT)


class FadingDiscovery:
    """mDNS until it is over: a switch that forwards no multicast, a browser that asks once an hour."""

    def __init__(self, network: SimulatedNetwork, node: NodeId, over: trio.Event) -> None:
        self._inner = SimulatedDiscovery(network, node)
        self._over = over

    async def run(
        self, listening: Callable[[], tuple[Address, ...]], found: Callable[[Candidate], None]
    ) -> None:
        if not self._over.is_set():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._inner.run, listening, found)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        await trio.sleep_forever()


def _store(memory: Memory, unused: int) -> None:
    with contextlib.suppress(MeshError):  # as mesh/process.py: said, and made up for later
        memory.store_incarnation(unused)


async def _remember(node: SimulatedNode, memory: Memory) -> None:
    """As mesh/process.py does: where peers are, for a start without mDNS."""
    written: list[Address] = []
    while True:
        await sleep(REMEMBER_S)
        found = node.living_addresses(PEERS_KEPT)
        with contextlib.suppress(MeshError):
            memory.catch_up()
            if found and found != written:
                memory.store_peers(found)
                written = found


@dataclass(slots=True)
class Training:
    """The training of one machine; it survives its node."""

    player: Player
    period_s: float
    learns: bool
    """it makes progress of its own, now and then"""
    pending: NDArray[np.float64] = field(default_factory=lambda: np.zeros(ENTRIES))
    """progress that was made and not handed over, in float64"""
    wanted: bool = True
    """false: detached, until it is wanted again"""
    paused: bool = False


@dataclass(slots=True)
class Machine:
    """One computer of the mesh."""

    index: int
    address: Address
    rng: Random
    disk: SimulatedDisk
    training: Training | None = None
    node: SimulatedNode | None = None
    transport: SimulatedTransport | None = None
    scope: trio.CancelScope | None = None
    should_live: bool = True
    """in the end, when everything has healed"""
    clock_s: float = CLOCK_S
    """what its wall clock said when the simulation began"""
    memory: Memory | None = None
    highest: int = 0
    """the highest incarnation that a process of this machine used and had kept on its disk"""

    @property
    def id(self) -> NodeId:
        return node_id(self.index)

    @property
    def name(self) -> str:
        return f"n{self.index}"


class SimulatedMesh:
    """All machines of one simulation, by index."""

    def __init__(
        self,
        rng: Random,
        nursery: trio.Nursery,
        *,
        count: int,
        trace: Trace,
        fail: Callable[[str], None],
    ) -> None:
        self.rng = rng
        self.network = SimulatedNetwork(Random(rng.random()), Weather())
        self.trace = trace
        self.fail = fail
        self.strategy, self.rounded = rng.choice(STRATEGIES_LIVED), rng.random() < 0.5
        """of every training: others would not be averaged with it; whether each has a codec of its own"""
        self.ledger = Ledger(ENTRIES, fail)
        self.mdns_over = trio.Event()
        self.happened: Counter[str] = Counter()
        self.machines = [
            Machine(
                index=index,
                address=address_of(index),
                rng=Random(rng.random()),
                disk=SimulatedDisk(Random(rng.random())),
            )
            for index in range(1, count + 1)
        ]
        self._nursery = nursery

    # ------------------------------------------------------------------------------------ nodes

    @property
    def up(self) -> list[Machine]:
        return [machine for machine in self.machines if machine.node is not None]

    def end_mdns(self) -> bool:
        """Ends mDNS if everybody has met everybody: from then on they have to keep together."""
        met = all(
            machine.node is not None
            and len(machine.node._protocol.peers.membership.others) == len(self.machines) - 1
            for machine in self.machines
        )
        if met and not self.mdns_over.is_set():
            self.mdns_over.set()
            self.happen(None, "mdns ends")
            addresses = [machine.address for machine in self.machines]
            for machine in self.machines:
                if machine.memory is not None:
                    machine.disk.faults = None
                    machine.memory.store_peers(addresses[:PEERS_KEPT])
        return met

    def start(self, machine: Machine) -> None:
        """Starts the machine's node process."""
        if machine.node is not None:
            return
        machine.memory = memory = Memory(
            Path("/mesh"), machine.disk, lambda: machine.clock_s + trio.current_time()
        )
        try:
            first = memory.reserve_incarnations()
        except MeshError:
            self.happen(machine, "broken start: its disk failed")
            self._nursery.start_soon(self._start_later, machine)
            return
        if first <= machine.highest:
            self.fail(
                f"{machine.name} starts at incarnation {first}, used {machine.highest} before"
            )
        machine.transport = SimulatedTransport(self.network, machine.id, machine.address)
        node = SimulatedNode(
            node=machine.id,
            name=machine.name,
            incarnation=first,
            transport=machine.transport,
            discovery=FadingDiscovery(self.network, machine.id, self.mdns_over),
            candidates=tuple(("cache", address) for address in memory.peers()),
            rng=Random(machine.rng.random()),
            store_incarnation=partial(_store, memory),
            note=lambda text: self._note(machine, node, text),
        )
        node.watched_by(self.ledger, self.trace, self.network, self.fail, len(self.machines))
        machine.node, machine.scope = node, trio.CancelScope()
        self.happen(machine, "start")
        self._nursery.start_soon(self._live, node, memory, machine.scope)

    async def _live(self, node: SimulatedNode, memory: Memory, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_remember, node, memory)
                await node.run()

    async def _start_later(self, machine: Machine) -> None:
        await trio.sleep(START_AGAIN_S)
        if machine.should_live:
            self.start(machine)

    def crash(self, machine: Machine, *, silent: bool = False) -> None:
        """kill -9; `silent`: a power cut, of which the others hear nothing."""
        if machine.node is None:
            return
        self.happen(machine, "vanish" if silent else "crash")
        (self.network.vanish if silent else self.network.crash)(machine.id)
        if silent:
            machine.disk.crash()
        self._end(machine)

    async def leave(self, machine: Machine) -> bool:
        """The node says farewell and ends. False: something else ended it first."""
        node = machine.node
        if node is None:
            return False
        self.happen(machine, "leave")
        await node.leave()
        if machine.node is not node:
            return False
        self.network.crash(machine.id)
        self._end(machine)
        return True

    def _end(self, machine: Machine) -> None:
        node, scope = machine.node, machine.scope
        assert node is not None
        assert scope is not None
        if machine.memory is not None and machine.memory._owed is None:
            machine.highest = node._protocol.own.incarnation
        for run in node._runs.values():
            assert isinstance(run.replica, WatchedReplica)
            self.ledger.gone(run.replica)
        machine.node = machine.scope = None
        if machine.training is not None:
            machine.training.player.lost()
        scope.cancel()

    def happen(self, machine: Machine | None, what: str) -> None:
        """Something from outside befell a machine, or all."""
        self.happened[what.partition(" ")[0]] += 1
        if self.trace.on:
            self.trace.add(machine.name if machine else "*", f"! {what}")

    def _note(self, machine: Machine, node: SimulatedNode, text: str) -> None:
        if machine.node is node and " is dead: " in text:
            self.happened["death called"] += 1

    # -------------------------------------------------------------------------------- trainings

    def add_training(self, machine: Machine, *, learns: bool) -> None:
        """A training that attaches to this machine's node, again and again, from now on."""
        rng = machine.rng
        x = np.random.default_rng(rng.getrandbits(32)).integers(-32, 33, ENTRIES) / 8
        weights = (1.0,) if self.strategy in UNWEIGHTED else (1.0, 1.0, 1.0, 0.5, 2.0, 3.0)
        player = Player(
            x.astype(np.float32),
            weight=rng.choice(weights),
            sync_timeout_s=rng.uniform(0.5, 3.0),
            strategy=self.strategy,
            codec=rng.choice(NAMES) if self.rounded else F32,
            differences=self.machines.index(machine) % 2 == 0,
        )
        machine.training = training = Training(
            player=player, period_s=rng.uniform(0.6, 3.0), learns=learns
        )
        self._nursery.start_soon(self._train, machine, training)

    async def _train(self, machine: Machine, training: Training) -> None:
        rng, player = machine.rng, training.player
        while machine.training is training:
            await self.network.awake(machine.id)
            node = machine.node
            if node is None or node.id != machine.id:
                await sleep(0.1)
            elif player.node is not node:
                if training.wanted and node.listening.is_set():
                    training.pending[:] = 0
                    await player.attach(node)
                await sleep(rng.uniform(0.01, 0.2))
            elif player.begun is None:
                await sleep(0.05)
            elif not training.wanted:
                await self._detach(machine, player)
            elif training.paused != player.run.paused:
                self.happen(machine, "pause" if training.paused else "resume")
                await node.pause(player.run, paused=training.paused)
            else:
                await self._boundary(machine, training)
                await sleep(training.period_s * rng.uniform(0.5, 1.5))

    async def _boundary(self, machine: Machine, training: Training) -> None:
        player, run, node = training.player, training.player.run, training.player.node
        await run.offer()
        if player.node is not node:
            return  # it died meanwhile
        progress: Floats = np.zeros(ENTRIES, dtype=np.float32)
        if training.learns and machine.rng.random() < 0.5:
            bits = np.random.default_rng(machine.rng.getrandbits(32))
            progress = (bits.integers(-8, 9, ENTRIES) / 16).astype(np.float32)
        training.pending += progress
        assert isinstance(run.replica, WatchedReplica)
        if not run.ours:
            self.ledger.posted(run.replica, training.pending.copy())
            training.pending[:] = 0
        await player.post(progress)

    async def _detach(self, machine: Machine, player: Player) -> None:
        run, node = player.run, player.node
        assert node is not None
        assert isinstance(run.replica, WatchedReplica)
        self.happen(machine, "detach")
        await node.detach(run)
        self.ledger.gone(run.replica)
        player.lost()
