"""What befalls a simulated mesh in its first phase, drawn from the seed; and how it heals.

A fault's trip: run() draws one and its length -> the network, a machine or a training is struck -> a
task of its own ends it later, or heal() does. Rule: heal() undoes everything but the deaths of machines
that are gone for good.
"""

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Final

import trio

from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.net.simulated import Weather
from mesh.simulated_disk import fails_often
from mesh.simulated_mesh import PORT, Machine, SimulatedMesh

GOOD: Final = Weather()
FOR_GOOD: Final = 0.25
"""Deaths after which the machine stays away, as a part of all."""

MDNS_ENDS: Final = 0.4
LONG_NIGHTS: Final = 0.02
LONG_NIGHT_S: Final = 60.0
"""A partition in which every rumour is given up: only who looks for the dead finds them again. Lives that
end in one have no process that began twice: one that did has the addresses of its last start."""

LIVING: Final = 0.5
"""At least this part of the machines lives in the end."""


class Faults:
    """Strikes one mesh."""

    def __init__(self, mesh: SimulatedMesh, nursery: trio.Nursery) -> None:
        self._mesh = mesh
        self._rng = Random(mesh.rng.random())
        self._nursery = nursery
        self._healed = False
        self._moves = 0
        self._stalled: list[NodeId] = []
        self._countdowns: dict[NodeId, int] = {}
        self._every_s = self._rng.choice((0.2, 0.5, 1.0, 2.0))
        """mean time between two faults"""
        luck = self._rng.random()
        self._ends_mdns = luck < MDNS_ENDS
        self._night_comes = luck < LONG_NIGHTS
        self._night = False
        kinds: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self._weather, 3),
            (self._partition, 2),
            (self._cut, 2),
            (self._lose, 2),
            (self._crash, 3),
            (self._crash_at_an_await, 3),
            (self._vanish, 1),
            (self._stall, 2),
            (self._detach, 2),
            (self._leave, 1),
            (self._move, 1),
            (self._break_disk, 1),
            (self._set_clock, 1),
            (self._spoil, 1),
            (self._pause, 2),
        ]
        # Swarm testing (Groce et al. 2012): each seed has its own mix, some kinds not at all.
        self._kinds = [kind for kind, _ in kinds]
        self._odds = [odds * self._rng.choice((0, 0, 1, 1, 3)) for _, odds in kinds]
        if self._night_comes:
            self._never(self._crash, self._crash_at_an_await, self._vanish, self._leave)
        if not any(self._odds):
            self._odds[0] = 1

    async def run(self, seconds: float) -> None:
        """Phase 1."""
        self._mesh.network.touched = self._touched
        with trio.move_on_after(seconds):
            while True:
                await trio.sleep(self._rng.expovariate(1 / self._every_s))
                if self._ends_mdns and self._mesh.end_mdns():
                    self._ends_mdns = False
                    # Who leaves or moves where nobody announces himself has to be told of peers.
                    self._never(self._leave, self._move)
                    self._odds[0] += 1
                [strike] = self._rng.choices(self._kinds, self._odds)
                await strike()
        if self._night_comes and self._mesh.mdns_over.is_set():
            await self._partition()
            self._night = True
            await trio.sleep(LONG_NIGHT_S)
        self.heal()

    def _never(self, *kinds: Callable[[], Awaitable[None]]) -> None:
        for kind in kinds:
            self._odds[self._kinds.index(kind)] = 0

    def heal(self) -> None:
        """Phase 2: the network is good, and every machine that should live does."""
        mesh = self._mesh
        self._healed = True
        mesh.network.touched = None
        self._countdowns.clear()
        mesh.network.heal()
        mesh.network.weather = GOOD
        for node in self._stalled:
            mesh.network.resume(node)
        self._stalled.clear()
        mesh.happen(None, "heal")
        for machine in mesh.machines:
            self._mend_disk(machine)
            if machine.should_live:
                mesh.start(machine)
            if machine.training is not None:
                machine.training.wanted, machine.training.paused = True, False
                machine.training.learns = False

    # ------------------------------------------------------------------------------ the network

    async def _weather(self) -> None:
        rng = self._rng
        slow = 10 ** rng.uniform(-3, -0.7)
        weather = Weather(
            delay_s=(slow / 10, slow),
            bytes_per_s=10 ** rng.uniform(4, 8),
            bytes_until_lost=10 ** rng.uniform(3.3, 5) if rng.random() < 0.6 else None,
            loss=rng.choice((0.0, 0.0, 0.02, 0.1)),
        )
        self._mesh.network.weather = weather
        self._mesh.happen(None, f"weather {weather}")

    async def _partition(self) -> None:
        machines = list(self._mesh.machines)
        if len(machines) < 2:
            return
        self._rng.shuffle(machines)
        groups = self._rng.choice((2, 2, 3))
        cuts = sorted(self._rng.sample(range(1, len(machines)), min(groups, len(machines)) - 1))
        ends = [0, *cuts, len(machines)]
        parts = [machines[a:b] for a, b in itertools.pairwise(ends)]
        self._mesh.network.partition(*(frozenset(m.id for m in part) for part in parts))
        text = " | ".join(" ".join(m.name for m in part) for part in parts)
        self._mesh.happen(None, f"partition {text}")
        self._later(self._rng.uniform(0.5, 12), self._open_ways)

    def _open_ways(self) -> None:
        if not self._night:
            self._mesh.network.heal()

    async def _cut(self) -> None:
        if len(self._mesh.machines) < 2:
            return
        a, b = self._rng.sample(self._mesh.machines, 2)
        self._mesh.network.cut(a.id, b.id)
        self._mesh.happen(None, f"cut {a.name} -> {b.name}")
        self._later(self._rng.uniform(0.5, 12), self._open_ways)

    async def _lose(self) -> None:
        if self._rng.random() < 0.3:
            self._mesh.network.lose_all()
            self._mesh.happen(None, "lose all connections")
        elif (machine := self._victim()) is not None:
            self._mesh.network.lose(machine.id)
            self._mesh.happen(machine, "lose its connections")

    # -------------------------------------------------------------------------------- processes

    def _victim(self) -> Machine | None:
        return self._rng.choice(self._mesh.up) if self._mesh.up else None

    async def _crash(self) -> None:
        if (machine := self._victim()) is not None:
            self._kill(machine)

    async def _crash_at_an_await(self) -> None:
        """Between any two words of a conversation."""
        if (machine := self._victim()) is not None:
            self._countdowns[machine.id] = self._rng.randint(1, 300)

    def _touched(self, node: NodeId) -> None:
        left = self._countdowns.get(node)
        if left is None:
            return
        if left > 1:
            self._countdowns[node] = left - 1
            return
        del self._countdowns[node]
        self._kill(next(m for m in self._mesh.machines if m.id == node))

    async def _vanish(self) -> None:
        if (machine := self._victim()) is not None:
            self._kill(machine, silent=True)

    def _kill(self, machine: Machine, *, silent: bool = False) -> None:
        mesh, rng = self._mesh, self._rng
        if machine.node is None:
            return
        mesh.crash(machine, silent=silent)
        if machine.training is not None and (silent or rng.random() < 0.5):
            mesh.add_training(machine, learns=machine.training.learns)
        self._comes_back(machine)

    def _comes_back(self, machine: Machine) -> None:
        if machine.node is not None:
            return
        living = sum(m.should_live for m in self._mesh.machines)
        if (
            not self._healed
            and self._rng.random() < FOR_GOOD
            and living > 1 + LIVING * len(self._mesh.machines)
        ):
            machine.should_live = False
            return
        if self._healed:
            self._mesh.start(machine)
        else:
            self._later(self._rng.uniform(0.1, 8), lambda: self._return(machine))

    def _return(self, machine: Machine) -> None:
        if machine.should_live:
            self._mesh.start(machine)

    async def _stall(self) -> None:
        if (machine := self._victim()) is not None and machine.id not in self._stalled:
            self._stalled.append(machine.id)
            self._mesh.network.stall(machine.id)
            self._mesh.happen(machine, "stall")
            self._later(self._rng.uniform(0.5, 8), lambda: self._resume(machine.id))

    def _resume(self, node: NodeId) -> None:
        if node in self._stalled:
            self._stalled.remove(node)
            self._mesh.network.resume(node)

    async def _leave(self) -> None:
        if (machine := self._victim()) is not None:
            self._nursery.start_soon(self._leave_and_return, machine)

    async def _leave_and_return(self, machine: Machine) -> None:
        if await self._mesh.leave(machine):
            self._comes_back(machine)

    async def _detach(self) -> None:
        if (machine := self._victim()) is not None and machine.training is not None:
            machine.training.wanted = False
            again = partial(setattr, machine.training, "wanted", True)
            self._later(self._rng.uniform(0.5, 5), again)

    async def _pause(self) -> None:
        """`mesh pause`, and `mesh resume` some time later."""
        if (machine := self._victim()) is not None and machine.training is not None:
            machine.training.paused = True
            again = partial(setattr, machine.training, "paused", False)
            self._later(self._rng.uniform(0.1, 5), again)

    async def _move(self) -> None:
        """A laptop in another Wi-Fi."""
        machine = self._victim()
        if machine is None or machine.transport is None:
            return
        self._moves += 1
        machine.address = Address(f"10.{1 + self._moves}.0.{machine.index & 255}", PORT)
        self._mesh.happen(machine, f"move to {machine.address}")
        machine.transport.move(machine.address)

    async def _break_disk(self) -> None:
        machine = self._rng.choice(self._mesh.machines)
        machine.disk.faults = fails_often(Random(self._rng.random()), self._rng.choice((0.1, 0.5)))
        self._mesh.happen(machine, "disk fails")
        self._later(self._rng.uniform(0.5, 6), lambda: self._mend_disk(machine))

    def _mend_disk(self, machine: Machine) -> None:
        machine.disk.faults = None

    async def _set_clock(self) -> None:
        """A Raspberry Pi boots in 1970; NTP corrects it; a battery is empty."""
        machine = self._rng.choice(self._mesh.machines)
        machine.clock_s = self._rng.uniform(0, 4e9)
        self._mesh.happen(machine, "clock jumps")

    async def _spoil(self) -> None:
        replicas = list(self._mesh.ledger.replicas.values())
        if replicas:
            self._rng.choice(replicas).spoiled = True
            self._mesh.happen(None, "spoil a fragment")

    def _later(self, seconds: float, undo: Callable[[], None]) -> None:
        self._nursery.start_soon(self._after, seconds, undo)

    async def _after(self, seconds: float, undo: Callable[[], None]) -> None:
        await trio.sleep(seconds)
        if not self._healed:
            undo()
