"""One seed decides a whole life of a mesh: the deployed nodes, under faults, then healed.

A run's trip: simulate_faults() -> run_seeded() -> phase 1: machines start, train and are struck by
faults while every turn of every node is checked -> phase 2: everything heals, and within HEAL_S all nodes
agree on who lives and on the weights -> SimulationReport. Two phases as in TigerBeetle's VOPR. Rules: 1. Time
is virtual and tasks run in an order drawn from the seed, so a seed replays exactly. 2. The first
violation ends the run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

import trio

from mesh.core.messages import State
from mesh.core.strategies import CYCLIC, EXACT, PAIR
from mesh.errors import first_of
from mesh.faults import Faults
from mesh.simulated_mesh import Machine, SimulatedMesh
from mesh.simulated_node import Trace
from mesh.virtual_time import run_seeded

HEAL_S: Final = {PAIR: 60.0, CYCLIC: 240.0, EXACT: 240.0}
"""A broken peer is left alone for up to 32 s, a contact is dialled again after up to 30 s. An exchange of
`cyclic` carries an eighth; groups that `exact` made equal to the bit trust another only slowly (core/guard.py)."""

TRAININGS: Final = 16
"""At most: a large mesh is lived for its members; an exchange is between two, however many there are."""

TOGETHER: Final = 64
GATHER_S: Final = 10.0
"""More machines than this are not started at one moment, but within so long."""

TICK_S: Final = 2**-10
"""Of a mesh of more: about the time that a message takes, and exact in floating point. A turn of trio's loop for each of a thousand
nodes' messages alone was an eighth of the time."""

LOOK_S: Final = 0.25
AGREED: Final = 1e-3
AGREED_ROUNDED: Final = 1e-2
"""How far replicas may lie apart in the end, as a part of the spread of all that went in. What a codec rounds
away is a part of the weights, not of their difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationReport:
    """What one seed did."""

    seed: int
    nodes: int
    digest: str
    """of every event and effect of every node: equal for equal seeds, on any machine"""
    failure: str | None
    """the first violation, in one sentence"""
    trace: tuple[str, ...]
    """the last lines before the end"""
    virtual_s: float
    healed_s: float
    """how long phase 2 took"""
    wall_s: float
    happened: dict[str, int] = field(default_factory=dict)
    """faults, exchanges, deaths, by name"""


def simulate_faults(
    seed: int,
    *,
    nodes: int = 8,
    seconds: float = 4.0,
    faults: bool = True,
    trace: bool = True,
    trace_to: Callable[[str], None] | None = None,
) -> SimulationReport:
    """Lives one mesh. Never raises for what the mesh does wrong: the report says it.

    seconds: virtual length of phase 1. faults: whether anything goes wrong in it. trace: whether
    every event is written down (large meshes go faster without). trace_to hears each line.
    """
    began = time.perf_counter()
    life = _Life(nodes=nodes, seconds=seconds, faults=faults, trace=Trace(on=trace, to=trace_to))
    try:
        run_seeded(life.live, seed, tick_s=TICK_S if nodes > TOGETHER else 0.0)
    except ExceptionGroup as group:
        error = first_of(group)
        life.fail(f"{type(error).__name__}: {error}")
    return life.report(seed, time.perf_counter() - began)


class _Life:
    """One simulation from start to end."""

    def __init__(self, *, nodes: int, seconds: float, faults: bool, trace: Trace) -> None:
        self._count = nodes
        self._seconds = seconds
        self._faulty = faults
        self._trace = trace
        self._failure: str | None = None
        self._scope = trio.CancelScope()
        self._virtual_s = self._healed_s = 0.0
        self._mesh: SimulatedMesh | None = None

    def fail(self, text: str) -> None:
        """Notes the first violation and ends the run."""
        if self._failure is None:
            self._failure = text
            self._scope.cancel()

    def report(self, seed: int, wall_s: float) -> SimulationReport:
        mesh = self._mesh
        assert mesh is not None
        happened = dict(sorted(mesh.happened.items()))
        happened["fragments"] = mesh.ledger.fragments_applied
        happened["lost in doubt"] = mesh.ledger.lost_in_doubt
        happened["overshoot"] = int(1000 * mesh.ledger.highest_overshoot)
        return SimulationReport(
            seed=seed,
            nodes=self._count,
            digest=self._trace.digest,
            failure=self._failure,
            trace=tuple(self._trace.lines),
            virtual_s=self._virtual_s,
            healed_s=self._healed_s,
            wall_s=wall_s,
            happened=happened,
        )

    async def live(self, rng: Random) -> None:
        began = trio.current_time()
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._mesh = mesh = SimulatedMesh(
                    rng,
                    nursery,
                    count=self._count,
                    trace=self._trace,
                    fail=self.fail,
                )
                nursery.start_soon(self._count_mass, mesh)
                self._start(mesh, rng, nursery)
                if self._faulty:
                    await Faults(mesh, nursery).run(self._seconds)
                else:
                    await trio.sleep(self._seconds)
                    for machine in mesh.machines:
                        if machine.training is not None:
                            machine.training.learns = False
                await self._heal(mesh)
                nursery.cancel_scope.cancel()
        self._virtual_s = trio.current_time() - began

    def _start(self, mesh: SimulatedMesh, rng: Random, nursery: trio.Nursery) -> None:
        late = rng.random() * 0.5
        training = rng.choice((0.3, 0.6, 1.0)) if self._faulty else 1.0
        for rank, machine in enumerate(mesh.machines):
            if rank < TRAININGS and rng.random() < training:
                mesh.add_training(machine, learns=rng.random() < 0.7)
            if self._faulty and rng.random() < late:
                nursery.start_soon(self._start_late, mesh, machine, rng.uniform(0, self._seconds))
            elif self._count > TOGETHER:
                nursery.start_soon(self._start_late, mesh, machine, rng.uniform(0, GATHER_S))
            else:
                mesh.start(machine)

    async def _start_late(self, mesh: SimulatedMesh, machine: Machine, after_s: float) -> None:
        await trio.sleep(after_s)
        mesh.start(machine)  # harmless if it runs already

    async def _count_mass(self, mesh: SimulatedMesh) -> None:
        while True:
            await trio.sleep(LOOK_S)
            mesh.ledger.check_mass()

    async def _heal(self, mesh: SimulatedMesh) -> None:
        """Phase 2: waits until nothing is left to do."""
        began = trio.current_time()
        missing = ""
        limit_s = HEAL_S[mesh.strategy]
        with trio.move_on_after(limit_s):
            while True:
                missing = unhealed(mesh)
                self._healed_s = trio.current_time() - began
                if not missing:
                    mesh.ledger.check_mass()
                    return
                await trio.sleep(LOOK_S)
        self.fail(f"not healed after {limit_s:g} s: {missing}")


def unhealed(mesh: SimulatedMesh) -> str:
    """What a healed mesh still lacks, in one sentence; empty where it lacks nothing."""
    living = [m for m in mesh.machines if m.should_live]
    for machine in living:
        if machine.node is None:
            return f"{machine.name} does not run"
    if len(living) > TOGETHER:
        return _different(living) or _unfinished(mesh, living)
    expected = {m.id: m for m in living}
    rows = {m.id: m.node._protocol.own for m in living if m.node is not None}
    for machine in living:
        assert machine.node is not None
        others = machine.node._protocol.peers.membership.others
        for node, other in expected.items():
            if node == machine.id:
                continue
            if node not in others or others[node].state is not State.ALIVE:
                state = others[node].state.name if node in others else "unknown"
                return f"{machine.name} holds {other.name} for {state}"
            if others[node] != rows[node]:
                return f"{machine.name} has an old row of {other.name}"
        for node, row in others.items():
            if node not in expected and row.state <= State.SUSPECT:
                return f"{machine.name} holds {row.name}, which is gone, for {row.state.name}"
    return _unfinished(mesh, living)


def _different(living: list[Machine]) -> str:
    """As unhealed() does row by row; of a large mesh by what tables count."""
    tables = [m.node._protocol.peers.membership for m in living if m.node is not None]
    if any(table.living != len(living) for table in tables):
        return "not everybody holds everybody for alive"
    prints = {table.fingerprint for table in tables}
    return f"there are {len(prints)} different tables" if len(prints) > 1 else ""


def _unfinished(mesh: SimulatedMesh, living: list[Machine]) -> str:
    alive = {m.id for m in living}
    for machine in living:
        training = machine.training
        if training is None:
            continue
        player = training.player
        if player.node is not machine.node or player.begun is None:
            return f"the training of {machine.name} has not begun"
        left = [node for node in player.run.unfinished if node in alive]
        if left:
            return f"{machine.name} has an unfinished exchange with {left[0][:8]}"
        if training.pending.any():
            return f"the training of {machine.name} has progress in hand"
    apart = mesh.ledger.disagreement()
    if apart > (AGREED_ROUNDED if mesh.rounded else AGREED):
        return f"replicas lie {apart:.2%} of the spread apart"
    return ""
