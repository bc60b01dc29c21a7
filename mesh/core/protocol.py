"""MeshProtocol: the whole node as pure state. Routes each event to its room, collects the effects.

Interface (as in aioquic): handle(event, now) -> effects; next_deadline(); on_deadline(now) ->
effects; statistics(now). `now` is monotonic seconds of any origin; chance comes in as `rng`.

Two rooms: peers.py (who is there) and averaging.py (what is averaged with whom). A peer's trip:
CandidateFound -> Dial -> PeerConnected -> its row -> news for the runs. A step's trip: Posted ->
averaging -> StartExchange -> ExchangeEnded -> Offer.
"""

from itertools import islice
from random import Random
from typing import assert_never

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.averaging import Averaging
from mesh.core.for_people import Answer, Question, Reports
from mesh.core.messages import (
    Ack,
    IdentityTaken,
    Member,
    Members,
    NodeId,
    Ping,
    PingReport,
    PingRequest,
    Refusal,
    RunInfo,
    SchemaPage,
    SchemaRequest,
    State,
    Turn,
    Verdict,
    Versions,
    Wanted,
    short,
)
from mesh.core.peers import Peers
from mesh.core.questions import Questions
from mesh.core.reports import ReportTable
from mesh.core.statistics import PeerStatistics, ProtocolStatistics
from mesh.core.twins import taken


class MeshProtocol:
    """One node's protocol; see the module's docstring."""

    def __init__(self, own: Member, rng: Random) -> None:
        """`own.incarnation` is the first of a block that is reserved on disk already."""
        self._me = own.node
        self.peers = Peers(own, rng)
        self._reports = ReportTable(self.peers.membership)
        self._questions = Questions(self.peers.membership, self.peers.contacts, rng)
        self._averaging = Averaging(
            membership=self.peers.membership,
            connections=self.peers.contacts.connections,
            rng=rng,
            publish=lambda runs: self.peers.publish(runs=runs),
        )

    # ------------------------------------------------------------------------------ interface

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Takes in one event; returns what is to be done, in order."""
        match event:
            case ev.CandidateFound():
                self.peers.candidate_found(event, now)
                effects: list[ev.Effect] = []
            case ev.PeerConnected():
                effects = self.peers.connected(event, now)
                effects += self._questions.connected(event.node, now)
            case ev.DialFailed():
                effects = self.peers.dial_failed(event, now)
            case ev.PeerIncompatible():
                effects = self.peers.incompatible(event, now)
            case ev.PeerLost():
                effects = self.peers.lost(event, now)
                self._averaging.peers_changed(now)
                self._questions.lost(event.node)
            case ev.TwinMet():
                effects = [ev.Stop(reason=taken(event.host))]
            case ev.Received():
                effects = self._received(event, now)
            case ev.AddressesChanged():
                effects = self.peers.publish(addresses=event.addresses)
            case ev.RunAttached():
                effects = self._averaging.attach(event, now)
            case ev.RunDetached():
                effects = self._averaging.detach(event.run)
            case ev.Posted():
                effects = self._averaging.posted(event, now)
                if event.figures is not None:
                    self._reports.publish(event.run, event.figures, now)
            case ev.WeightsServed():
                effects = self._averaging.mark(event.run, exchanged=True)
            case ev.ExchangeAnswered():
                effects = self._averaging.exchange_answered(event, now)
            case ev.ExchangeEnded():
                effects = self._averaging.exchange_ended(event, now)
            case ev.Ask():
                effects = self._questions.ask(event, now)
            case ev.Performed():
                effects = self._questions.performed(event, now)
            case ev.PauseChanged():
                self._averaging.pause(event, now)
                effects = []
            case ev.Leaving():
                effects = self.peers.publish(state=State.LEFT)
            case _:
                assert_never(event)
        return effects + self.on_deadline(now)

    def next_deadline(self) -> float:
        return min(
            self.peers.next_deadline(),
            self._averaging.next_deadline(),
            self._questions.next_deadline(),
        )

    def on_deadline(self, now: float) -> list[ev.Effect]:
        """Everything that is due; harmless when nothing is."""
        effects = self._questions.on_deadline(now) + self.peers.on_deadline(now)
        for row in self.peers.take_news():
            effects += self._averaging.row_changed(row, now)
            self._reports.row_changed(row)
        exchanges = self._averaging.on_deadline(now)
        for effect in exchanges:
            if isinstance(effect, ev.StartExchange):
                used = self.peers.contacts.connections.get(effect.peer)
                if used is not None:
                    used.used_at = now
        return effects + exchanges

    @property
    def own(self) -> Member:
        """This node's own row."""
        return self.peers.membership.own

    def run_info(self, run: str) -> RunInfo | None:
        """What this node says of a run of its own; None if nobody trains it here."""
        return self._averaging.info(run)

    def out_of_turn(self, run: str, peer: NodeId, turn: Turn | None) -> tuple[str, int] | None:
        """Why a request at this place in the rounds cannot be answered now, and our own place."""
        return self._averaging.out_of_turn(run, peer, turn)

    def paused(self, run: str) -> bool:
        """Whether a run of this node begins no exchanges for now."""
        return self._averaging.paused(run)

    def partner_count(self, run: str) -> int:
        """How many peers a run of this node can be averaged with now."""
        return self._averaging.partner_count(run)

    def name_of(self, node: NodeId) -> str:
        """What a member calls itself."""
        row = self.peers.membership.others.get(node)
        return row.name if row else short(node)

    def living(self) -> list[Member]:
        """Rows of the members that live and that nobody suspects."""
        return [m for m in self.peers.membership.others.values() if m.state is State.ALIVE]

    def runs_known(self) -> set[str]:
        """Names of the runs that somebody trains now, here or elsewhere."""
        return {info.run for row in (*self.living(), self.own) for info in row.runs}

    def members(self) -> tuple[Member, ...]:
        """All that are known and did not leave, this node first."""
        others = self.peers.membership.others.values()
        return (self.own, *(row for row in others if row.state is not State.LEFT))

    def living_addresses(self, limit: int) -> list[Address]:
        """Up to `limit` addresses of living members."""
        rows = self.peers.membership.others.values()
        found = (a for row in rows if row.state is State.ALIVE for a in row.addresses)
        return list(islice(found, limit))

    def statistics(self, now: float) -> ProtocolStatistics:
        # A member that came back with another version is listed as what it is now.
        strangers = self.peers.strangers.listed(now)
        members = [m for m in self.peers.membership.others.values() if m.node not in strangers]
        peers = [*strangers.values(), *(self._peer_statistics(m, now) for m in members)]
        return ProtocolStatistics(
            own=self.own,
            peers=tuple(sorted(peers, key=lambda p: (p.name, p.node))),
            partners=self._averaging.partner_counts(),
            unreached=self.peers.contacts.unreached(),
            local_health=self.peers.detector.health.score,
            fingerprint=self.peers.membership.fingerprint,
            undialled=self.peers.undialled(now),
        )

    # ------------------------------------------------------------------------------- messages

    def _received(self, event: ev.Received, now: float) -> list[ev.Effect]:
        node, message, peers = event.node, event.message, self.peers
        current = peers.contacts.connections.get(node)
        if current is None or current.number != event.connection:
            if isinstance(message, Ack):
                check = peers.twins.answered(event.connection, message.sequence)
                return peers.twin(check) if check else []
            return []
        detector, gossip, table = peers.detector, peers.gossip, peers.membership.fingerprint
        detector.heard(node, now)
        match message:
            case Ping():
                ack = gossip.send(node, Ack(sequence=message.sequence, table=table))
                return ack + self._report_to(node, now)
            case Ack():
                found = detector.acknowledged(node, message.sequence, now)
                effects = peers.found(found, now) + gossip.compare(node, message.table, now)
                return effects if self._reports.crowded else effects + self._report_to(node, now)
            case Question():
                return self._questions.question(node, message, now)
            case Answer():
                return self._questions.answer(message, now)
            case Reports():
                self._reports.heard(message.reports, now)
                return []
            case PingRequest() if message.node == self._me:
                verdict = Verdict.REACHED
                return gossip.send(node, PingReport(sequence=message.sequence, verdict=verdict))
            case PingRequest():
                found = detector.requested(node, message.sequence, message.node, now, table)
                return peers.found(found, now)
            case PingReport():
                found = detector.reported(node, message.sequence, message.verdict, now)
                return peers.found(found, now)
            case Members():
                return peers.merge(message.members, source=node, now=now)
            case Versions() | Wanted():
                return gossip.answer(node, message, now)
            case SchemaRequest():
                return self._averaging.answer_schema(node, message)
            case SchemaPage():
                return self._averaging.compare_schema(node, message)
            case IdentityTaken():
                return peers.identity_taken(message, now)
            case Refusal():
                return []  # the connection ends next; PeerLost carries the reason
            case _:
                assert_never(message)

    def _report_to(self, node: NodeId, now: float) -> list[ev.Effect]:
        news = self._reports.news(now)
        return self.peers.gossip.send(node, news) if news else []

    def _peer_statistics(self, member: Member, now: float) -> PeerStatistics:
        connection = self.peers.contacts.connections.get(member.node)
        state, reason = member.state.name.lower(), ""
        if member.state >= State.SUSPECT:
            reason = self.peers.reasons.get(member.node, "")
        elif why := self._averaging.incompatible(member):
            state, reason = "incompatible", why
        return PeerStatistics(
            node=member.node,
            name=member.name,
            state=state,
            reason=reason,
            addresses=member.addresses,
            via=connection.via if connection else None,
            rtt_s=self.peers.detector.rtt_s(member.node),
            silent_for_s=self.peers.detector.silent_for_s(member.node, now),
            incarnation=member.incarnation,
            runs=member.runs,
            figures={
                info.run: said
                for info in member.runs
                if (said := self._reports.of(member.node, info.run, now)) is not None
            },
        )
