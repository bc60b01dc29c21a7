"""The current model of a run, for a machine that need not train it: what `mesh pull` asks of its node.

A trip: the members' rows name the run -> the schema that most of them hold -> its tensors, page by
page, from one of them -> memory for one model, shared with whoever asked -> pulls (exchanges of
weight 0) from one node after the other, each fragment folded into the mean of those before.
Rules: 1. Nothing here moves a replica, and whoever gives does not count an observer among those it
met. 2. One model's memory: where a donor is lost in the middle the next goes on at that fragment, and
the model is whole when each fragment came from one at least. 3. Bounded: so many donors, each of
which may be silent for so long (frames.STALL_S, initiator.ATTEMPTS).
"""

import math
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

import trio

from mesh.arrays import Floats, np
from mesh.codec import EXACT, Codec
from mesh.core.events import Outcome
from mesh.core.exchange import Initiation
from mesh.core.messages import Member, RunInfo, SchemaEntry, SchemaPage, SchemaRequest
from mesh.core.protocol import MeshProtocol
from mesh.core.schema import ENTRIES_LIMIT, digest, sizes
from mesh.core.strategies import fragment_entries
from mesh.dtypes import DTYPES
from mesh.errors import MeshError, NotFinite, RemoteProtocolError, UsageError
from mesh.frames import STALL_S, send_frame
from mesh.initiator import Initiator
from mesh.replica import Replica, square_norm
from mesh.runs import Run, RunSpec, make_run
from mesh.shared import HandOverMemory

PEERS_LIMIT: Final = 64
"""Nodes that one model is the mean of. The error of the mean is small long before."""

SPARE_DONORS: Final = 3
"""Further nodes that are asked in the place of those that refuse or are lost."""

PULLS_LIMIT: Final = 2
"""Models that are pulled at once: each takes the memory of one."""

FIND_POLLS: Final = 20
POLL_S: Final = 0.1
"""A run that no row names, or none that has begun, is looked for during 2 s: a node that was just
started knows nobody yet, and news take a moment."""

REPORT_S: Final = 0.2
MODEL_LIMIT_ENTRIES: Final = 2**33

Hear = Callable[[dict[str, Any], int | None], Awaitable[None]]
"""Tells whoever asked; with a descriptor of shared memory, once."""


@dataclass(frozen=True, slots=True)
class Donor:
    """A living member that holds the run, and what it says of it."""

    member: Member
    info: RunInfo

    @property
    def kind(self) -> tuple[str, str]:
        """Only replicas of one kind are averaged with each other."""
        return self.info.schema, self.info.strategy


class Mean(Replica):
    """Of as many replicas as came so far, fragment by fragment. `weights` is the shared memory."""

    def __init__(self, entries: int, values: Floats, strategy: str) -> None:
        super().__init__(entries, fragment_entries(strategy, entries))
        self.weights = values
        self.whole = 0
        """replicas that came in full"""
        self.next = 0
        """fragment that is due; those below came once more than those from here on"""

    @property
    def entries_taken(self) -> int:
        return self.whole * len(self.weights) + int(self.slice_of(self.next).start)

    def take(self, index: int, body: memoryview, into: Floats, codec: Codec) -> None:
        """The next fragment of the replica that is being pulled. Raises NotFinite."""
        self.fold(
            index,
            codec.decode(body, self._decoded[: len(into[self.slice_of(index)])], self._cut(index)),
        )

    def fold(self, index: int, given: Floats) -> None:
        """mean += (given - mean) / (how many came with it), for one fragment. Raises NotFinite."""
        if not math.isfinite(square_norm(given)):
            raise NotFinite(f"fragment {index} is not finite")
        mean = self.weights[self.slice_of(index)]
        if self.whole:
            step = np.subtract(given, mean, out=self._difference[: len(mean)])
            np.add(mean, np.divide(step, np.float32(self.whole + 1), out=step), out=mean)
        else:
            np.copyto(mean, given)
        self.next = index + 1
        if self.next == self.fragments:
            self.whole, self.next = self.whole + 1, 0


class Observer:
    """Pulls models for those who ask this node. pull() is all there is to it."""

    def __init__(
        self,
        protocol: MeshProtocol,
        initiator: Initiator,
        runs: Mapping[str, Run],
        codecs: Mapping[str, Codec],
        rng: Random,
    ) -> None:
        """The protocol is only read here; `rng` chooses the nodes that are asked."""
        self._protocol = protocol
        self._initiator = initiator
        self._runs = runs
        self._codecs = codecs
        self._rng = rng
        self._pulls = 0

    async def pull(self, name: str, nodes: int, hear: Hear) -> None:
        """The mean of up to `nodes` replicas of a run; this node's own is the first where it has one.

        `hear` is told the schema, with the memory that will hold the model, then how it goes on, and
        "pulled" when it is whole. Raises UsageError, MeshError.
        """
        if not 1 <= nodes <= PEERS_LIMIT:
            raise UsageError(f"--peers {nodes}: 1..{PEERS_LIMIT}")
        if self._pulls >= PULLS_LIMIT:
            raise UsageError(f"{PULLS_LIMIT} models are being pulled through this node already")
        self._pulls += 1
        try:
            donors, left_out = self._choose(await self._find(name), name)
            strategy = donors[0].info.strategy
            own = self._own(name, donors)
            entries = own.spec.entries if own is not None else await self._entries(donors)
            size = sum(sizes(entries))
            try:
                memory = HandOverMemory.create(size)  # of which the second half is never touched
            except OSError as error:
                raise MeshError(f"no memory for the model: {error.strerror}") from None
            try:
                await hear(
                    {
                        "ok": True,
                        "schema": [[e.name, list(e.shape), e.dtype] for e in entries],
                        "entries": size,
                        "left_out": [_why_left_out(donor) for donor in left_out],
                    },
                    memory.descriptor,
                )
                mean = Mean(size, memory.posted, strategy)
                pull = _Pull(self._initiator, mean, nodes, donors, hear)
                await pull.run(self._observing(name, entries, memory, mean), own)
            finally:
                memory.close()
        finally:
            self._pulls -= 1

    async def _find(self, name: str) -> list[Donor]:
        """All that hold the run and have weights."""
        for _ in range(FIND_POLLS):
            holders = self._holders(name)
            if begun := [donor for donor in holders if donor.info.started]:
                return begun
            await trio.sleep(POLL_S)
        if not holders:
            known = ", ".join(sorted(self._protocol.runs_known())) or "none"
            raise UsageError(f"nobody in this mesh trains run {name!r}; there are: {known}")
        raise MeshError(f"run {name!r} has no weights yet: its training is about to begin")

    def _holders(self, name: str) -> list[Donor]:
        rows = [*self._protocol.living(), self._protocol.own]
        return [Donor(row, info) for row in rows for info in row.runs if info.run == name]

    def _choose(self, holders: list[Donor], name: str) -> tuple[list[Donor], list[Donor]]:
        """(those to pull from, in random order; those whose schema, or strategy, fewer hold).

        Only replicas that met others are averaged: of those that trained alone the mean would be no
        model, so the one that came furthest gives.
        """
        votes = Counter(donor.kind for donor in holders)
        mine = self._protocol.run_info(name)
        own = mine and (mine.schema, mine.strategy)
        most = max(votes, key=lambda kind: (votes[kind], kind == own, kind))
        left_out = [donor for donor in holders if donor.kind != most]
        donors = [donor for donor in holders if donor.kind == most]
        met = [donor for donor in donors if donor.info.exchanged]
        if not met:
            met = [max(donors, key=lambda donor: (donor.info.progress, donor.member.node))]
        self._rng.shuffle(met)
        return met, left_out

    def _own(self, name: str, donors: list[Donor]) -> Run | None:
        """This node's own run, if it is one of those to pull from; it is no donor any more then."""
        for donor in donors:
            if donor.member.node == self._protocol.own.node:
                donors.remove(donor)
                run = self._runs.get(name)
                return run if run is not None and run.how is not None else None
        return None

    async def _entries(self, donors: list[Donor]) -> tuple[SchemaEntry, ...]:
        """Names, shapes and dtypes, from the first of a few that tells them. Raises MeshError."""
        reason = "nobody else holds it"
        for donor in donors[: 1 + SPARE_DONORS]:
            for _ in range(2):  # a connection that idled may be gone; the second one is new
                try:
                    return await self._ask_schema(donor)
                except MeshError as error:
                    reason = f"{donor.member.name}: {error}"
        raise MeshError(f"nobody tells the layers of this run: {reason}")

    async def _ask_schema(self, donor: Donor) -> tuple[SchemaEntry, ...]:
        entries: list[SchemaEntry] = []
        total = 1
        stream_to = self._initiator.stream_to(donor.member.node, donor.member.addresses)
        async with stream_to as (stream, reader):
            while len(entries) < total:
                ask = SchemaRequest(run=donor.info.run, start=len(entries))
                await send_frame(stream, ask)
                page, _ = await reader.message(timeout_s=STALL_S)
                if not isinstance(page, SchemaPage) or page.start != ask.start or not page.entries:
                    raise RemoteProtocolError("no page of its schema")
                total = min(page.total, ENTRIES_LIMIT)
                entries += page.entries
        if digest(tuple(entries)) != donor.info.schema:
            raise RemoteProtocolError("its layers are not those of its schema")
        if any(entry.dtype not in DTYPES for entry in entries):
            raise RemoteProtocolError("a type that cannot be averaged")
        if not 0 < sum(sizes(tuple(entries))) <= MODEL_LIMIT_ENTRIES:
            raise RemoteProtocolError("a model that is too large, or empty")
        return tuple(entries)

    def _observing(
        self, name: str, entries: tuple[SchemaEntry, ...], memory: HandOverMemory, mean: Mean
    ) -> Run:
        """A run that nobody trains: what an exchange needs of one."""
        spec = RunSpec(
            run=name,
            entries=entries,
            weight=0.0,
            every=1,
            sync_timeout_s=0.0,
            pid=os.getpid(),
            script="mesh pull",
        )
        run = make_run(
            spec, mean, self._codecs, memory.posted, memory.offered, _tell_nobody, _no_partners, 0.0
        )
        run.taken = mean.weights
        return run


class _Pull:
    """One model on its way."""

    def __init__(
        self, initiator: Initiator, mean: Mean, nodes: int, donors: list[Donor], hear: Hear
    ) -> None:
        self.mean = mean
        self._initiator = initiator
        self._nodes = nodes
        self._donors = donors
        self._hear = hear
        self._sources: list[str] = []
        """names of those that gave their whole replica, or its end"""
        self._clocks: list[float] = []
        """of all that gave something"""
        self._lost: list[str] = []
        self._now = ""
        self._wanted = 0

    async def run(self, run: Run, own: Run | None) -> None:
        """Until the model is there: told as "pulled". Raises MeshError."""
        self._wanted = min(self._nodes, len(self._donors) + (own is not None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            if own is not None:
                await self._take_own(own)
            for rank, donor in enumerate(self._donors):
                if len(self._sources) == self._nodes or rank == self._nodes + SPARE_DONORS:
                    break
                await self._take_from(donor, run, rank + 1)
            nursery.cancel_scope.cancel()
        if not self.mean.whole:
            raise MeshError(f"nobody gave the whole model: {'; '.join(self._lost)}")
        await self._hear(self._progress(), None)
        told = {
            "event": "pulled",
            "averaged": self.mean.whole,
            "sources": self._sources,
            "lost": self._lost,
            "mesh_step": max(0, int(sum(self._clocks) / len(self._clocks))),
        }
        await self._hear(told, None)

    async def _take_own(self, own: Run) -> None:
        self._now = "this node"
        try:
            for index in range(self.mean.fragments):
                self.mean.fold(index, own.replica.weights[own.replica.slice_of(index)])
                await trio.lowlevel.checkpoint()
        except NotFinite as error:
            self._lost.append(f"{self._now}: {error}")
            return
        self._sources.append(self._now)
        self._clocks.append(own.clock.steps)

    async def _take_from(self, donor: Donor, run: Run, number: int) -> None:
        self._now = donor.member.name
        record = Initiation(
            exchange=number,
            peer=donor.member.node,
            end=self.mean.fragments,
            pull=True,
            codec=EXACT,
        )
        record.goes_on_at(first := self.mean.next)
        info = replace(donor.info, started=False, exchanged=False, progress=0)
        outcome, reason = await self._initiator.observe(run, record, donor.member.addresses, info)
        if record.clock_answer is not None and record.applied > first:
            self._clocks.append(record.clock_answer)
        if outcome is Outcome.COMPLETED:
            self._sources.append(self._now)
        else:
            self._lost.append(f"{self._now}: {reason}")

    async def _report(self) -> None:
        while True:
            await self._hear(self._progress(), None)
            await trio.sleep(REPORT_S)

    def _progress(self) -> dict[str, Any]:
        return {
            "event": "progress",
            "source": self._now,
            "averaged": self.mean.whole,
            "wanted": self._wanted,
            "bytes": 4 * self.mean.entries_taken,
            "of": 4 * len(self.mean.weights) * self._wanted,
        }


def _why_left_out(donor: Donor) -> str:
    schema, strategy = donor.kind
    return f"{donor.member.name} (schema {schema}, strategy {strategy})"


def _tell_nobody(event: dict[str, Any]) -> None:
    """Of a run without a training."""


def _no_partners() -> int:
    return 0
