"""A mesh in one process whose trainings are real: each virtual machine runs a program of the user's.

A step's trip: the program trains -> JoinedNode.step() -> stepped(): the baton goes back, and virtual
time passes -> the program has it again -> the hand-over of mesh/training.py, over a VirtualLink ->
Control, Run, Node, exchanges: the deployed code over a simulated network. Rules: 1. One seed decides
everything. 2. Each program has chance, arguments and output of its own, exchanged with the baton.
3. The two references need no network: `alone` averages nothing; `one-place` averages all replicas after
each step, which for SGD is one machine that makes that step with all their samples.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
import trio

from mesh.answers import Answers
from mesh.baton import Program
from mesh.client import LocalSocket
from mesh.conditions import ONE_PLACE, STEP_S, Conditions
from mesh.control import Control
from mesh.errors import first_of
from mesh.learning_report import Curve, Look
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.program_state import ProgramState
from mesh.simulated_mesh import address_of, node_id
from mesh.tensors import Tensors
from mesh.virtual_link import VirtualLines, VirtualLink
from mesh.virtual_machine import Machine, flat_of, mean_of
from mesh.virtual_node import LaboratoryNode
from mesh.virtual_time import run_seeded

UNEVEN: Final = 0.1
"""Steps last up to this much more or less, or all machines would hand over in one breath."""

NEWCOMER_S: Final = 0.3
"""Virtual seconds from a machine's death to its successor's start."""

LOOKS: Final = 256
BYTES_BESIDE: Final = 300
"""Of an exchange: its messages, without the numbers."""


class Laboratory:
    """All machines of one mesh, from its start to the end of the last program."""

    def __init__(
        self, conditions: Conditions, work: Callable[["Laboratory", Machine], None]
    ) -> None:
        """`work` is a machine's program: it calls mesh.join()."""
        self.conditions = conditions
        self.machines: list[Machine] = []
        self.looks: Curve[Look] = Curve(LOOKS)
        self.look: Callable[[Laboratory], Look | None] = lambda _: None
        """what looks at all replicas, each `look_every` steps of the mean machine"""
        self.entries = 0
        self.virtual_s = 0.0
        self.began_at = 0.0
        """when the first step was made, in virtual seconds"""
        self._work = work
        self._main = ProgramState.of_this_moment()
        self._now_in: ProgramState = self._main
        self.error: BaseException | None = None
        self._living = 0
        self._over = trio.Event()
        self._began = trio.Event()
        self._gathered: list[Machine] = []
        self._released = trio.Event()

    # ------------------------------------------------------------------------------------- life

    def run(self) -> None:
        """Lives it. What ended a program, and so everything, is in `error` then."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second one costs small models more than it brings
        interrupted = False
        try:
            try:
                run_seeded(self._live, self.conditions.seed)
            except* KeyboardInterrupt:
                interrupted = True
        except ExceptionGroup as group:
            raise first_of(group) from None
        finally:
            self._surround(self._main)
            torch.set_num_threads(threads)
        if interrupted:
            raise KeyboardInterrupt

    async def _live(self, rng: Random) -> None:
        self._clock = trio.lowlevel.current_clock()
        self._network = SimulatedNetwork(Random(rng.random()), Weather())
        self._chance = Random(rng.random())
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for rank in range(1, self.conditions.nodes + 1):
                self._start(rank, self._steps_of(rank))
            nursery.start_soon(self._look_on)
            if self.conditions.replaced:
                nursery.start_soon(self._replace_some)
            await self._over.wait()
            nursery.cancel_scope.cancel()
        self.virtual_s = trio.current_time() - began

    def _steps_of(self, rank: int) -> int | None:
        """Faster machines make more; in all they are as many as at equal speeds, but for rounding."""
        steps, speeds = self.conditions.steps, self.conditions.speeds
        if steps is None or not speeds:
            return steps
        return max(1, round(steps * speeds[rank - 1] * len(speeds) / sum(speeds)))

    def _start(self, rank: int, steps_left: int | None, *, newcomer: bool = False) -> None:
        index = len(self.machines) + 1
        speeds = self.conditions.speeds
        seed = f"{self.conditions.seed}/{index}"
        machine = Machine(
            rank=rank,
            index=index,
            newcomer=newcomer,
            speed=speeds[rank - 1] * len(speeds) / sum(speeds) if speeds else 1.0,
            rng=Random(seed),
            program=Program(lambda: self._work(self, machine), f"rank {rank}"),
            state=self._main.seeded(seed),
            steps_left=steps_left,
        )
        self.machines.append(machine)
        self._living += 1
        if self.conditions.meets:
            self._give_node(machine)
        self._nursery.start_soon(self._live_one, machine)

    def _give_node(self, machine: Machine) -> None:
        node = node_id(machine.index)
        machine.node = LaboratoryNode(
            lies=machine.rank in self.conditions.attackers,
            node=node,
            name=f"n{machine.index}",
            incarnation=1,
            transport=SimulatedTransport(self._network, node, address_of(machine.index)),
            discovery=SimulatedDiscovery(self._network, node),
            candidates=(),
            rng=Random(machine.rng.random()),
            store_incarnation=lambda _: None,
            note=lambda _: None,
        )
        machine.answers = Answers(machine.node, mesh="", state=Path(), stop=lambda: None)
        machine.control = Control(machine.node, machine.answers)

    async def _live_one(self, machine: Machine) -> None:
        try:
            with machine.scope:
                async with trio.open_nursery() as nursery:
                    machine.nursery = nursery
                    if machine.node is not None:
                        nursery.start_soon(machine.node.run)
                    await self._drive(machine)
                    if machine.node is not None:
                        await machine.node.leave()
                    nursery.cancel_scope.cancel()
        finally:
            self._stop(machine)
        self._network.crash(node_id(machine.index))
        self._living -= 1
        self._meet_if_all_are_here()
        if not self._living:
            self._over.set()

    async def _drive(self, machine: Machine) -> None:
        """Passes the baton to and fro until the program ends."""
        answer = None
        while True:
            self._surround(machine.state)
            question = machine.program.resume(answer)
            for lines in machine.lines:
                lines.delivered()
            if question is None:
                break
            answer = await question()
        error = machine.program.error
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self.error = self.error or error
            self._over.set()

    def _stop(self, machine: Machine) -> None:
        self._surround(machine.state)
        machine.program.stop()
        machine.tensors = None
        for lines in machine.lines:
            for descriptor in lines.descriptors:
                os.close(descriptor)
            lines.descriptors.clear()

    def _surround(self, by: ProgramState) -> None:
        if by is not self._now_in:
            self._now_in.leave()
            by.enter()
            self._now_in = by

    # ----------------------------------------------------------------- what befalls the machines

    async def _replace_some(self) -> None:
        """Some machines are killed, each at a moment of its own, and newcomers take their places."""
        conditions, rng = self.conditions, self._chance
        assert conditions.steps is not None
        ranks = rng.sample(
            range(1, conditions.nodes + 1), round(conditions.replaced * conditions.nodes)
        )
        length_s = STEP_S * conditions.steps
        moments = sorted((rng.uniform(0.1, 0.9) * length_s, rank) for rank in ranks)
        await self._began.wait()
        began = trio.current_time()
        for after_s, rank in moments:
            await trio.sleep_until(began + after_s)
            machine = next(m for m in self.machines if m.rank == rank)
            if machine.steps_left:
                self._nursery.start_soon(self._replace, machine)

    async def _replace(self, machine: Machine) -> None:
        self._living += 1  # its successor counts from now on, or all could be over before it starts
        machine.killed = True
        self._network.crash(node_id(machine.index))
        machine.scope.cancel()
        await trio.sleep(NEWCOMER_S)
        self._living -= 1
        self._start(machine.rank, machine.steps_left, newcomer=True)

    def _break_connections(self) -> None:
        """So often that the wanted share of exchanges loses its connection."""
        share = self.conditions.loss_of_connections
        if share:
            width = {"bf16": 2, "int8": 1}.get(self.conditions.codec or "", 4)
            carried = 2 * width * self.entries + BYTES_BESIDE
            self._network.weather = Weather(bytes_until_lost=carried / -log(1 - share))

    async def _look_on(self) -> None:
        await self._began.wait()
        while self.conditions.strategy != ONE_PLACE:  # that is looked at while it is one
            self._look_now()
            await trio.sleep(STEP_S * self.conditions.look_every)

    def _look_now(self) -> None:
        if all(machine.final is None or machine.killed for machine in self.machines):
            self._surround(self._main)
            look = self.look(self)
            if look is not None:
                self.looks.add(look)

    # ------------------------------------------------------------------- for a program's thread

    def goes_on(self, machine: Machine) -> bool:
        """Whether the machine has steps to make: a newcomer's end with those of the others."""
        steps = self.conditions.steps or 0
        late = machine.newcomer and self.now() >= self.began_at + STEP_S * steps
        return bool(machine.steps_left) and not late

    def now(self) -> float:
        """Virtual seconds."""
        return self._clock.current_time()

    def link(self, machine: Machine) -> LocalSocket:
        """A new connection to the machine's node."""
        lines = VirtualLines()
        machine.lines.append(lines)

        async def connect() -> None:
            assert machine.node is not None
            assert machine.nursery is not None
            await machine.node.listening.wait()
            machine.nursery.start_soon(self._serve, machine, lines)

        machine.program.ask(connect)
        return VirtualLink(lines, machine.program.ask, self.now)

    async def _serve(self, machine: Machine, lines: VirtualLines) -> None:
        assert machine.control is not None
        try:
            request = await lines.receive()
            if request is not None:
                with contextlib.suppress(OSError):  # the training is gone
                    await machine.control.attach(lines, request)
        finally:
            lines.end()

    def joined(self, machine: Machine, tensors: Tensors, weight: float) -> None:
        """A training holds its first weights."""
        machine.tensors, machine.weight, machine.final = tensors, weight, None
        machine.model = tensors.model
        machine.schema = tensors.schema()
        if not self.entries:
            self.entries = tensors.entries
            self._break_connections()

    def gather(self, machine: Machine) -> None:
        """Returns when all machines are here: for trainings that begin together."""
        machine.program.ask(lambda: self._gather(machine))

    async def _gather(self, machine: Machine) -> None:
        self._gathered.append(machine)
        self._meet_if_all_are_here()
        released = self._released
        if machine in self._gathered:
            await released.wait()

    def _meet_if_all_are_here(self) -> None:
        if self._gathered and len(self._gathered) >= self._living:
            here = sorted(self._gathered, key=lambda machine: machine.index)
            self._gathered = []
            if not self.conditions.meets:
                self._become_one(here)
            released, self._released = self._released, trio.Event()
            released.set()

    def _become_one(self, machines: list[Machine]) -> None:
        """The references' only meeting: first weights are the first one's, then those of all."""
        tensors = [machine.tensors for machine in machines if machine.tensors is not None]
        if any(machine.steps for machine in machines):
            mean, _ = mean_of([(m, flat_of(m)) for m in machines if m.tensors is not None])
        else:
            mean = flat_of(machines[0])
        for each in tensors:
            each.load(mean)
        if machines[0].steps % self.conditions.look_every == 0:
            self._look_now()

    def stepped(self, machine: Machine, loss: float | None) -> None:
        """A step takes virtual time."""
        machine.steps += 1
        if machine.steps_left is not None:
            machine.steps_left -= 1
        if loss is not None:
            machine.losses.add((machine.steps, float(loss)))
        machine.program.ask(partial(self._let_pass, machine))

    async def _let_pass(self, machine: Machine) -> None:
        if not self._began.is_set():
            self._began.set()
            self.began_at = trio.current_time()
        uneven = machine.rng.uniform(1 - UNEVEN, 1 + UNEVEN)
        await trio.sleep(STEP_S / machine.speed * uneven)

    def left(self, machine: Machine) -> None:
        """A training ends: what its model holds is its last word."""
        if machine.tensors is not None and machine.final is None:
            machine.final = flat_of(machine)

    def figures(self, machine: Machine, run: str) -> dict[str, Any]:
        """This run's part of `mesh status`."""
        if machine.node is None:
            return {"partners": self.conditions.nodes - 1}
        found: list[dict[str, Any]] = []

        async def ask() -> None:
            assert machine.answers is not None
            answer = await machine.answers.answer({"op": "status"}, _nobody)
            assert isinstance(answer, dict)
            found.extend(answer["runs"])

        machine.program.ask(ask)
        return next((about for about in found if about["run"] == run), {})


async def _nobody(progress: dict[str, Any]) -> None:
    """Hears how far a question is that takes no time."""
