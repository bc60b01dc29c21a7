"""MeshProtocol: the whole node as pure state. Routes each event to its room, collects the effects.

Interface (as in aioquic): handle(event, now) -> effects; next_deadline(); on_deadline(now) ->
effects; statistics(now). `now` is monotonic seconds of any origin; chance comes in as `rng`.

A peer's trip: CandidateFound -> contacts -> Dial -> PeerConnected -> membership -> Send(Members) ->
both tables agree. A step's trip: Posted -> schedule -> StartExchange -> ExchangeEnded -> Offer.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import assert_never

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.averaging import Averaging
from mesh.core.contacts import Contacts
from mesh.core.detector import Detector
from mesh.core.gossip import Gossip, pages
from mesh.core.membership import INCARNATION_BLOCK, Membership
from mesh.core.messages import (
    Ack,
    ControlMessage,
    Member,
    Members,
    NodeId,
    Ping,
    Refusal,
    RunInfo,
    SchemaPage,
    SchemaRequest,
    State,
    short,
)
from mesh.core.statistics import PeerStatistics, ProtocolStatistics

SEARCH_S = 10.0
"""How often members are looked for that nobody is connected to here: it may have been a partition."""

STRANGERS_LIMIT = 64
STRANGER_S = 90.0
"""Three missed dials after which a node of another version is not listed any more."""


class MeshProtocol:
    """One node's protocol; see the module's docstring."""

    def __init__(self, own: Member, rng: Random) -> None:
        """`own.incarnation` is the first of a block that is reserved on disk already."""
        self._me = own.node
        self._rng = rng
        self._membership = Membership(own)
        self._contacts = Contacts(own.node, rng)
        self._detector = Detector()
        self._gossip = Gossip(rng)
        self._averaging = Averaging(
            membership=self._membership,
            connections=self._contacts.connections,
            rng=rng,
            publish=lambda runs: self._publish(runs=runs),
        )
        self._strangers: dict[NodeId, tuple[PeerStatistics, float]] = {}
        self._ends: dict[NodeId, str] = {}
        self._search_at = math.inf
        self._stored = own.incarnation + INCARNATION_BLOCK

    # ------------------------------------------------------------------------------ interface

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Takes in one event; returns what is to be done, in order."""
        match event:
            case ev.CandidateFound():
                self._contacts.suggest(event.addresses, now, source=event.source, hint=event.hint)
                effects: list[ev.Effect] = []
            case ev.PeerConnected():
                effects = self._peer_connected(event, now)
            case ev.DialFailed():
                effects = self._dial_failed(event, now)
            case ev.PeerIncompatible():
                effects = self._peer_incompatible(event, now)
            case ev.PeerLost():
                effects = self._peer_lost(event, now)
            case ev.Received():
                effects = self._received(event, now)
            case ev.AddressesChanged():
                effects = self._publish(addresses=event.addresses)
            case ev.RunAttached():
                effects = self._averaging.attach(event, now)
            case ev.RunDetached():
                effects = self._averaging.detach(event.run)
            case ev.Posted():
                effects = self._averaging.posted(event, now)
            case ev.WeightsServed():
                effects = self._averaging.mark(event.run, exchanged=True)
            case ev.ExchangeEnded():
                effects = self._averaging.exchange_ended(event, now)
            case ev.Leaving():
                effects = self._publish(state=State.LEFT)
            case _:
                assert_never(event)
        return effects + self.on_deadline(now)

    def next_deadline(self) -> float:
        return min(
            self._contacts.next_deadline(),
            self._detector.next_deadline(),
            self._gossip.next_deadline(),
            self._search_at,
            self._averaging.next_deadline(),
        )

    def on_deadline(self, now: float) -> list[ev.Effect]:
        """Everything that is due; harmless when nothing is."""
        effects: list[ev.Effect] = []
        for node in self._detector.due_deaths(now):
            effects += self._died(node, "silent for 5 s")
        for node, ping in self._detector.due_pings(now):
            effects += self._send(node, ping)
        peer = self._gossip.due_push_pull(self._contacts.connections, now)
        if peer is not None:
            effects += self._send(peer, *pages(self._membership.rows(), reply=True))
        self._look_for_the_missing(now)
        for contact in self._contacts.due(now):
            effects.append(
                ev.Dial(contact=contact.key, addresses=contact.addresses, proved_host=contact.host)
            )
        return effects + self._averaging.on_deadline(now)

    @property
    def own(self) -> Member:
        """This node's own row."""
        return self._membership.own

    def run_info(self, run: str) -> RunInfo | None:
        """What this node says of a run of its own; None if nobody trains it here."""
        return self._averaging.info(run)

    def partner_count(self, run: str) -> int:
        """How many peers a run of this node can be averaged with now."""
        return self._averaging.partner_count(run)

    def statistics(self, now: float) -> ProtocolStatistics:
        # A member that came back with another version is listed as what it is now.
        strangers = {
            node: stranger
            for node, (stranger, seen_at) in self._strangers.items()
            if now - seen_at < STRANGER_S
        }
        members = [m for m in self._membership.others.values() if m.node not in strangers]
        peers = [*strangers.values(), *(self._peer_statistics(m, now) for m in members)]
        return ProtocolStatistics(
            own=self._membership.own,
            peers=tuple(sorted(peers, key=lambda p: (p.name, p.node))),
            partners=self._averaging.partner_counts(),
            unreached=self._contacts.unreached(),
        )

    # ---------------------------------------------------------------------------------- peers

    def _peer_connected(self, event: ev.PeerConnected, now: float) -> list[ev.Effect]:
        kept, replaced = self._contacts.connected(
            event.node,
            event.connection,
            contact=event.contact,
            incarnation=event.hello.member.incarnation,
            host=event.host,
            now=now,
        )
        if not kept:
            return [ev.Hangup(connection=event.connection, reason="already connected")]
        effects: list[ev.Effect] = []
        if replaced is not None:
            effects.append(ev.Hangup(connection=replaced, reason="a newer connection replaces it"))
        self._detector.connected(event.node, now)
        self._strangers.pop(event.node, None)
        news = self._membership.merge([event.hello.member])
        self._averaging.peers_changed(now)
        effects += self._send(event.node, *pages(self._membership.rows(), reply=False))
        if event.node in self._membership.others:  # not where the table is full
            effects += self._averaging.ask_about_schemas(self._membership.others[event.node])
        return effects + self._learned(news, source=event.node, now=now)

    def _dial_failed(self, event: ev.DialFailed, now: float) -> list[ev.Effect]:
        contact = self._contacts.failed(event.contact, now, itself=event.itself)
        if contact is None or contact.node in self._contacts.connections:
            return []
        effects: list[ev.Effect] = []
        if contact.by_hand and contact.reason != event.reason:
            contact.reason = event.reason
            effects.append(ev.Note(text=f"peer {contact.addresses[0]}: {event.reason}"))
        # Only who lost a connection may call a node dead: others may just not reach it.
        watched = contact.node is not None and self._detector.is_watched(contact.node)
        if contact.node is not None and event.refused and watched:
            effects += self._died(contact.node, event.reason)
        return effects

    def _peer_incompatible(self, event: ev.PeerIncompatible, now: float) -> list[ev.Effect]:
        if event.contact is not None:
            self._contacts.rests(event.contact, now, event.reason)
        if event.node not in self._strangers and len(self._strangers) >= STRANGERS_LIMIT:
            return []
        known = event.node in self._strangers
        stranger = PeerStatistics(
            node=event.node,
            name=event.name,
            state="incompatible",
            reason=event.reason,
            addresses=(),
            via=None,
            rtt_s=None,
            silent_for_s=None,
            incarnation=0,
            runs=(),
        )
        self._strangers[event.node] = stranger, now
        text = f"{event.name} ({short(event.node)}) is incompatible: {event.reason}"
        return [] if known else [ev.Note(text=text)]

    def _peer_lost(self, event: ev.PeerLost, now: float) -> list[ev.Effect]:
        if not self._contacts.lost(event.node, event.connection, now):
            return []
        self._detector.disconnected(event.node)
        self._ends[event.node] = event.reason
        member = self._membership.others.get(event.node)
        if member is None or member.state is State.LEFT:
            self._contacts.drop(event.node)
            return []
        self._contacts.suggest(member.addresses, now, source="member", node=event.node)
        return []

    def _died(self, node: NodeId, reason: str) -> list[ev.Effect]:
        row = self._membership.declare(node, State.DEAD)
        self._detector.forget(node)
        self._ends[node] = reason
        effects: list[ev.Effect] = []
        connection = self._contacts.connections.get(node)
        if connection is not None:
            effects.append(ev.Hangup(connection=connection.number, reason=reason))
        if row is not None:
            effects.append(ev.Note(text=f"{row.name} ({short(node)}) is dead: {reason}"))
            effects += self._tell([row], source=None)
        return effects

    def _look_for_the_missing(self, now: float) -> None:
        """Now and then: members that this node is not connected to, the living, and one of the
        dead. mDNS does not say again what it said an hour ago."""
        missing = [
            m
            for m in self._membership.others.values()
            if m.node not in self._contacts.connections and m.state is not State.LEFT
        ]
        if not missing:
            self._search_at = math.inf
            return
        if self._search_at == math.inf:
            self._search_at = now + SEARCH_S
        if now < self._search_at:
            return
        self._search_at = now + SEARCH_S
        dead = [m for m in missing if m.state is State.DEAD]
        wanted = [m for m in missing if m.state is not State.DEAD]
        if dead:
            wanted.append(self._rng.choice(dead))
        for member in wanted:
            self._contacts.suggest(member.addresses, now, source="member", node=member.node)

    # ------------------------------------------------------------------------------- messages

    def _received(self, event: ev.Received, now: float) -> list[ev.Effect]:
        current = self._contacts.connections.get(event.node)
        if current is None or current.number != event.connection:
            return []
        self._detector.heard(event.node, now)
        match event.message:
            case Ping():
                return self._send(event.node, Ack(sequence=event.message.sequence))
            case Ack():
                self._detector.acknowledged(event.node, event.message.sequence, now)
                return []
            case Members():
                news = self._membership.merge(event.message.members)
                effects = self._learned(news, source=event.node, now=now)
                if event.message.reply:
                    effects += self._send(event.node, *pages(self._membership.rows(), reply=False))
                return effects
            case SchemaRequest():
                return self._averaging.answer_schema(event.node, event.message)
            case SchemaPage():
                return self._averaging.compare_schema(event.node, event.message)
            case Refusal():
                return []  # the connection ends next; PeerLost carries the reason
            case _:
                assert_never(event.message)

    def _learned(self, news: Sequence[Member], *, source: NodeId, now: float) -> list[ev.Effect]:
        """Rows that this table did not know: act on each, pass them on, decide again."""
        if not news:
            return []
        effects: list[ev.Effect] = []
        for row in news:
            if row.node == self._me:
                effects += self._reserve_incarnations()
                effects += self._tell([row], source=None)
                continue
            effects += self._row_changed(row, now)
        effects += self._tell([row for row in news if row.node != self._me], source=source)
        self._averaging.peers_changed(now)
        return effects

    def _row_changed(self, row: Member, now: float) -> list[ev.Effect]:
        label = f"{row.name} ({short(row.node)})"
        connection = self._contacts.connections.get(row.node)
        match row.state:
            case State.ALIVE | State.SUSPECT:
                if connection is None:
                    self._contacts.suggest(row.addresses, now, source="member", node=row.node)
                self._ends.pop(row.node, None)
                return self._averaging.ask_about_schemas(row)
            case State.DEAD:
                self._ends[row.node] = "told so by another member"
                if connection is not None:
                    # A living connection is better evidence than hearsay: its owner refutes it.
                    return self._send(row.node, *pages([row], reply=False))
                self._detector.forget(row.node)
                return []
            case State.LEFT:
                self._detector.forget(row.node)
                self._averaging.forget(row.node)
                self._contacts.drop(row.node)
                effects: list[ev.Effect] = [ev.Note(text=f"{label} left")]
                if connection is not None:
                    effects.append(ev.Hangup(connection=connection.number, reason="you left"))
                return effects
            case _:
                assert_never(row.state)

    # -------------------------------------------------------------------------------- helpers

    def _publish(
        self,
        *,
        addresses: tuple[Address, ...] | None = None,
        runs: tuple[RunInfo, ...] | None = None,
        state: State | None = None,
    ) -> list[ev.Effect]:
        row = self._membership.publish(addresses=addresses, runs=runs, state=state)
        return self._reserve_incarnations() + self._tell([row], source=None)

    def _reserve_incarnations(self) -> list[ev.Effect]:
        spent = self._membership.own.incarnation
        if spent < self._stored:
            return []
        self._stored = spent + INCARNATION_BLOCK
        return [ev.StoreIncarnation(incarnation=self._stored)]

    def _tell(self, rows: Sequence[Member], *, source: NodeId | None) -> list[ev.Effect]:
        if not rows:
            return []
        effects: list[ev.Effect] = []
        for node in self._gossip.listeners(self._contacts.connections, source=source):
            effects += self._send(node, *pages(rows, reply=False))
        return effects

    def _send(self, node: NodeId, *messages: ControlMessage) -> list[ev.Effect]:
        connection = self._contacts.connections.get(node)
        if connection is None:
            return []
        return [ev.Send(connection=connection.number, message=message) for message in messages]

    def _peer_statistics(self, member: Member, now: float) -> PeerStatistics:
        connection = self._contacts.connections.get(member.node)
        state, reason = member.state.name.lower(), ""
        if member.state >= State.DEAD:
            reason = self._ends.get(member.node, "")
        elif why := self._averaging.incompatible(member):
            state, reason = "incompatible", why
        return PeerStatistics(
            node=member.node,
            name=member.name,
            state=state,
            reason=reason,
            addresses=member.addresses,
            via=connection.via if connection else None,
            rtt_s=self._detector.rtt_s(member.node),
            silent_for_s=self._detector.silent_for_s(member.node, now),
            incarnation=member.incarnation,
            runs=member.runs,
        )


def version_refusal(there: int, here: int) -> str:
    """What a peer of another protocol version is told, and listed with."""
    return f"protocol {there} there, {here} here: update the older of the two"
