"""What this node averages: its runs, with whom each can be averaged, and why not with the others.

A run's trip: RunAttached -> a Schedule -> published in this node's row -> peers whose rows name the
same run and schema are its partners -> Schedule.decide() -> StartExchange -> ExchangeEnded -> Begin
or Offer. Where a schema differs, the first differing layer is looked up page by page (schema.py).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import assert_never

from mesh.core import events as ev
from mesh.core.contacts import Connection
from mesh.core.membership import Membership
from mesh.core.messages import (
    Member,
    NodeId,
    RunInfo,
    SchemaPage,
    SchemaRequest,
    State,
    Turn,
    short,
)
from mesh.core.schedule import GoAhead, Partner, Schedule
from mesh.core.schema import Schemas
from mesh.core.strategies import Start

RUNS_LIMIT = 16
"""Trainings on one node at a time, and runs in one row of the table."""

Publish = Callable[[tuple[RunInfo, ...]], list[ev.Effect]]


class Averaging:
    """The runs of one node. `connections` and `membership` belong to the protocol; read only."""

    def __init__(
        self,
        *,
        membership: Membership,
        connections: Mapping[NodeId, Connection],
        rng: Random,
        publish: Publish,
    ) -> None:
        """`publish` puts this node's runs into its row and tells the others."""
        self._membership = membership
        self._connections = connections
        self._rng = rng
        self._publish = publish
        self._schemas = Schemas()
        self._runs: dict[str, Schedule] = {}
        self._paused: set[str] = set()
        """runs that begin nothing for now, because a person said so; they stay so when they end"""
        self._exchange = 0
        """the last one's number"""

    def info(self, run: str) -> RunInfo | None:
        """What this node says of a run of its own; None if nobody trains it here."""
        schedule = self._runs.get(run)
        return schedule.info if schedule else None

    def partner_counts(self) -> dict[str, int]:
        """How many peers each run can be averaged with now."""
        return {name: self.partner_count(name) for name in self._runs}

    def partner_count(self, run: str) -> int:
        """How many peers this run can be averaged with now."""
        return len(self._partners(self._runs[run])) if run in self._runs else 0

    # ----------------------------------------------------------------------------------- runs

    def attach(self, event: ev.RunAttached, now: float) -> list[ev.Effect]:
        self._runs[event.run] = Schedule(
            info=RunInfo(
                run=event.run,
                schema=event.schema,
                started=event.started,
                exchanged=event.exchanged,
                strategy=event.strategy,
                weight=event.weight,
            ),
            me=self._membership.own.node,
            now=now,
            sync_timeout_s=event.sync_timeout_s,
            rng=self._rng,
            posts=event.posts,
            connected=self._connections,
        )
        self._schemas.attach(event.run, event.entries)
        effects = self._publish(self._infos())
        for member in self._membership.others.values():
            effects += self.ask_about_schemas(member)
        if event.started:
            effects.append(ev.Begin(run=event.run, how=ev.Beginning.AGAIN, donor=None))
        return effects

    def detach(self, run: str) -> list[ev.Effect]:
        del self._runs[run]
        self._schemas.detach(run)
        return self._publish(self._infos())

    def posted(self, event: ev.Posted, now: float) -> list[ev.Effect]:
        run = self._runs.get(event.run)
        if run is None:
            return []
        before = run.info
        run.posted(now, waits=event.waits)
        return [] if run.info == before else self._publish(self._infos())

    def exchange_ended(self, event: ev.ExchangeEnded, now: float) -> list[ev.Effect]:
        run = self._runs.get(event.run)
        if run is None:
            return []
        run.ended(event, now)
        if event.outcome is not ev.Outcome.COMPLETED:
            return []
        effects: list[ev.Effect] = []
        if not run.info.started:
            effects.append(ev.Begin(run=event.run, how=ev.Beginning.DONOR, donor=event.peer))
        return self.mark(event.run, exchanged=True) + effects

    def exchange_answered(self, event: ev.ExchangeAnswered, now: float) -> list[ev.Effect]:
        if event.run in self._runs:
            self._runs[event.run].answered(event.turn, now)
        return []

    def out_of_turn(self, run: str, peer: NodeId, turn: Turn | None) -> tuple[str, int] | None:
        """Why this request cannot be answered now, and this node's place in the rounds."""
        return self._runs[run].out_of_turn(peer, turn) if run in self._runs else None

    def mark(self, name: str, *, exchanged: bool = False) -> list[ev.Effect]:
        """The run has begun, or even exchanged: from now on this node says so."""
        run = self._runs.get(name)
        if run is None:
            return []
        marked = replace(run.info, started=True, exchanged=run.info.exchanged or exchanged)
        if marked == run.info:
            return []
        run.info = marked
        return self._publish(self._infos())

    def pause(self, event: ev.PauseChanged, now: float) -> None:
        """A paused run that has begun sees no partners, so its training waits for nobody."""
        if event.paused:
            if len(self._paused) >= RUNS_LIMIT:
                self._paused &= self._runs.keys()
            self._paused.add(event.run)
        else:
            self._paused.discard(event.run)
        if event.run in self._runs:
            self._runs[event.run].poke(now)

    def paused(self, run: str) -> bool:
        """Whether a person paused it."""
        return run in self._paused

    def peers_changed(self, now: float) -> None:
        """Somebody came, went, or changed a run: every run decides again."""
        for run in self._runs.values():
            run.poke(now)

    def row_changed(self, row: Member, now: float) -> list[ev.Effect]:
        """A member's row, or its connection, is another than before."""
        if not self._runs:  # and nothing is known of anybody's schemas
            return []
        self.peers_changed(now)
        if row.state is State.LEFT:
            self._schemas.forget(row.node)
        return self.ask_about_schemas(row) if row.state <= State.SUSPECT else []

    def next_deadline(self) -> float:
        if not self._runs:
            return math.inf
        return min(run.next_deadline() for run in self._runs.values())

    def on_deadline(self, now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for name, run in self._runs.items():
            if run.next_deadline() <= now:
                effects += self._decide(name, run, now)
        return effects

    def _decide(self, name: str, run: Schedule, now: float) -> list[ev.Effect]:
        effects = self._lost(name, run)
        paused = name in self._paused and run.info.started
        partners = [] if paused else self._partners(run)
        decision = run.decide(now, partners)
        match decision:
            case Start():
                self._exchange = self._membership.number_after(self._exchange)
                effects.append(
                    ev.StartExchange(
                        run=name,
                        peer=decision.peer,
                        addresses=self._membership.others[decision.peer].addresses,
                        exchange=self._exchange,
                        pull=decision.pull,
                        rest=decision.rest,
                        part=decision.part,
                        clip=decision.clip,
                        turn=decision.turn,
                        weight=next(i.weight for node, i in partners if node == decision.peer),
                        resumes=decision.resumes,
                    )
                )
            case GoAhead():
                effects += self.mark(name)
                effects.append(ev.Begin(run=name, how=decision.how, donor=None))
            case None:
                pass
            case _:
                assert_never(decision)
        if run.take_offer():
            effects.append(ev.Offer(run=name))
        return effects

    def _infos(self) -> tuple[RunInfo, ...]:
        return tuple(run.info for run in self._runs.values())

    def _partners(self, run: Schedule) -> list[Partner]:
        """Connected peers of the same run and schema that nobody suspects: an exchange with one that
        is gone would keep the others waiting. In a large mesh, where few are connected, all members."""
        partners: list[Partner] = []
        trains = self._membership.trains
        for node in trains if self._membership.large else self._connections:
            member = trains.get(node)
            if member is not None and member.state is State.ALIVE:
                partners += [(node, info) for info in member.runs if _fit(info, run.info)]
        return partners

    def _lost(self, name: str, run: Schedule) -> list[ev.Effect]:
        """Exchanges that cannot be resumed any more: their peer left, or its training ended, or nobody
        has heard of it for so long that it is forgotten. What it kept for them is gone."""
        lost: list[NodeId] = []
        for node in run.unfinished if not run.busy else ():
            row = self._membership.others.get(node)
            runs = () if row is None or row.state is State.LEFT else row.runs
            if not any(_fit(info, run.info) for info in runs):
                lost.append(node)
        run.unfinished.difference_update(lost)
        return [ev.DropExchange(run=name, peer=node) for node in sorted(lost)]

    # -------------------------------------------------------------------------------- schemas

    def ask_about_schemas(self, member: Member) -> list[ev.Effect]:
        """Where a connected peer has one of our runs with another schema, asks which layer it is."""
        effects: list[ev.Effect] = []
        for info in member.runs:
            mine = self.info(info.run)
            if mine is None or mine.schema == info.schema or member.node not in self._connections:
                continue
            request = self._schemas.ask(member.node, info.run, info.schema)
            effects += self._send(member.node, request)
        return effects

    def answer_schema(self, node: NodeId, request: SchemaRequest) -> list[ev.Effect]:
        return self._send(node, self._schemas.answer(request))

    def compare_schema(self, node: NodeId, page: SchemaPage) -> list[ev.Effect]:
        member = self._membership.others.get(node)
        theirs = next((i for i in member.runs if i.run == page.run), None) if member else None
        if member is None or theirs is None:
            return []
        more = self._schemas.compare(node, theirs.schema, page)
        if more is not None:
            return self._send(node, more)
        reason = self._schemas.reason(node, page.run, theirs.schema)
        text = f"{member.name} ({short(node)}) is incompatible: {reason}"
        return [ev.Note(text=text, kind="incompatible", node=node, run=page.run)]

    def incompatible(self, member: Member) -> str:
        """Why no run of this node can be averaged with this member; empty where one can, or where
        one of the two trains nothing."""
        if not member.runs or not self._runs:
            return ""
        reasons: list[str] = []
        for info in member.runs:
            mine = self.info(info.run)
            if mine is not None and mine.schema == info.schema:
                if mine.strategy == info.strategy:
                    return ""
                reasons.append(f"strategy differs: {mine.strategy} here, {info.strategy} there")
            elif mine is not None:
                reasons.append(self._schemas.reason(member.node, info.run, info.schema))
        if reasons:
            return reasons[0]
        theirs, ours = (", ".join(i.run for i in infos) for infos in (member.runs, self._infos()))
        return f"other run: {ours} here, {theirs} there"

    def _send(self, node: NodeId, message: SchemaRequest | SchemaPage | None) -> list[ev.Effect]:
        if message is None or node not in self._connections:
            return []
        return [ev.Send(connection=self._connections[node].number, message=message)]


def _fit(one: RunInfo, other: RunInfo) -> bool:
    """Whether two trainings can be averaged."""
    return (one.run, one.schema, one.strategy) == (other.run, other.schema, other.strategy)
