"""The others, as this node sees them: connections, rows, accusations, deaths, copies of an identity.

A peer's trip: connected() -> its row is merged -> a first Ping -> both tables agree. A death's: lost()
or silence -> detector -> Silent -> an accusation in the table -> Gone -> gossip. Every row that changes
is also left in `news`, for who averages with it (protocol.py takes it from there).
"""

import math
from collections.abc import Iterable, Sequence
from random import Random
from typing import assert_never

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.contacts import DIAL_BELOW, Connection, Contacts
from mesh.core.detector import Detector
from mesh.core.findings import Finding, Gone, Reach, Silent, Tell
from mesh.core.gossip import Gossip, pages
from mesh.core.membership import INCARNATION_BLOCK, LARGE, Membership
from mesh.core.messages import IdentityTaken, Member, NodeId, Ping, RunInfo, State, short
from mesh.core.strangers import Strangers
from mesh.core.twins import Check, Twins, taken

SEARCH_S = 10.0
"""How often members are looked for that nobody is connected to here: it may have been a partition."""

ROOM = "room for others: this mesh is large"
REPLACED = "a newer connection replaces it"


class Peers:
    """Owns the table, the contacts and the detector of one node."""

    def __init__(self, own: Member, rng: Random) -> None:
        """`own.incarnation` is the first of a block that is reserved on disk already."""
        self._me = own.node
        self._rng = rng
        self.membership = Membership(own)
        self.contacts = Contacts(own.node, rng)
        self.detector = Detector(rng)
        self.gossip = Gossip(self.membership, self.contacts, rng)
        self.strangers = Strangers()
        self.twins = Twins()
        self.reasons: dict[NodeId, str] = {}
        """why a member is suspect or dead; empty where it left. None of who lives all the while"""
        self._news: list[Member] = []
        self._search_at = math.inf
        self._stored = own.incarnation + INCARNATION_BLOCK

    def next_deadline(self) -> float:
        return min(
            self.contacts.next_deadline(),
            self.detector.next_deadline(),
            self.gossip.next_deadline(),
            self.twins.next_deadline(),
            self._search_at,
        )

    def take_news(self) -> list[Member]:
        """Rows that changed, or whose connections came or went, since this was asked last."""
        news, self._news = self._news, []
        return news

    def on_deadline(self, now: float) -> list[ev.Effect]:
        findings = self.detector.on_deadline(now, self.membership.fingerprint)
        effects = self.found(findings, now) + self.gossip.on_deadline(now)
        for check in self.twins.due(now):
            effects.append(ev.Hangup(connection=check.old.number, reason=REPLACED))
        if now >= self._search_at:
            self._search(now)
        self.contacts.table_is_large(self.membership.large)
        for contact in self.contacts.due(now):
            effects.append(
                ev.Dial(contact=contact.key, addresses=contact.addresses, proved_host=contact.host)
            )
        return effects

    # ---------------------------------------------------------------------------- connections

    def candidate_found(self, event: ev.CandidateFound, now: float) -> None:
        addresses = event.addresses
        if event.hint and self._me.startswith(event.hint):
            # Our own announcement; or, from elsewhere, that of a copy of this node.
            addresses = tuple(a for a in addresses if a not in self.membership.own.addresses)
        enough = self.contacts.limited and len(self.contacts.connections) >= DIAL_BELOW
        if event.source == "peer" or not enough:
            self.contacts.suggest(addresses, now, source=event.source, hint=event.hint)

    def connected(self, event: ev.PeerConnected, now: float) -> list[ev.Effect]:
        node, hello = event.node, event.hello
        kept, old = self.contacts.connected(
            node,
            event.connection,
            contact=event.contact,
            instance=hello.instance,
            age_s=hello.age_ms / 1000,
            addresses=hello.member.addresses,
            host=event.host,
            now=now,
        )
        if not kept:
            return [ev.Hangup(connection=event.connection, reason="already connected")]
        effects = self._replaced(node, old, now) if old else []
        self.strangers.forget(node)
        effects += self.merge([hello.member], source=node, now=now)
        dialled = event.contact is not None
        found = self.detector.connected(node, now, self.membership.fingerprint, dialled=dialled)
        effects += self.found(found, now)
        if (row := self.membership.others.get(node)) is not None:  # None where the table is full
            self._news.append(row)
            if row.state is not State.ALIVE:
                effects += self.gossip.send(node, *pages([row]))  # so that it refutes
        if self._search_at == math.inf:
            self._search_at = now + SEARCH_S
        for surplus, connection in self.contacts.surplus():
            self.detector.unwatch(surplus)
            effects.append(ev.Hangup(connection=connection.number, reason=ROOM))
        return effects

    def _replaced(self, node: NodeId, old: Connection, now: float) -> list[ev.Effect]:
        """A newer connection is in use; where another process dialled it, is the old one alive?"""
        new = self.contacts.connections[node]
        if old.instance != new.instance:
            sequence = self.twins.begin(node, old, new, now)
            if sequence is not None:
                ping = Ping(sequence=sequence, table=self.membership.fingerprint)
                return [ev.Send(connection=old.number, message=ping)]
        return [ev.Hangup(connection=old.number, reason=REPLACED)]

    def dial_failed(self, event: ev.DialFailed, now: float) -> list[ev.Effect]:
        contact = self.contacts.failed(event.contact, now, itself=event.itself)
        if contact is None or contact.node in self.contacts.connections:
            return []
        before, contact.reason = contact.reason, event.reason
        effects: list[ev.Effect] = []
        if contact.by_hand and before != event.reason:
            said = f"peer {contact.addresses[0]}: {event.reason}"
            effects.append(ev.Note(text=said, kind="unreached"))
        member = self.membership.others.get(contact.node) if contact.node else None
        if member is not None and member.state <= State.SUSPECT:
            self.detector.watch(member.node, now)  # others are asked whether they reach it
            if event.refused:
                effects += self.found(self.detector.refused(member.node, now, event.reason), now)
        return effects

    def undialled(self, now: float) -> tuple[tuple[str, Address, str], ...]:
        """(name, address, why not) of those that mDNS shows and that cannot be reached from here.

        Not of those that the mesh says are gone: mDNS goes on showing them.
        """
        found = []
        for contact in self.contacts.undialled(now):
            rows = self.membership.others.values()
            row = next((row for row in rows if row.node.startswith(contact.key)), None)
            if row is None or row.state is State.ALIVE:
                name = row.name if row else contact.key[:8]
                found.append((name, contact.addresses[0], contact.reason))
        return tuple(found)

    def incompatible(self, event: ev.PeerIncompatible, now: float) -> list[ev.Effect]:
        if event.contact is not None:
            self.contacts.rests(event.contact, now, event.reason)
        if not self.strangers.meet(event.node, event.name, event.reason, now):
            return []
        text = f"{event.name} ({short(event.node)}) is incompatible: {event.reason}"
        return [ev.Note(text=text, kind="incompatible", node=event.node)]

    def lost(self, event: ev.PeerLost, now: float) -> list[ev.Effect]:
        self.twins.ended(event.connection)
        ended = self.contacts.lost(event.node, event.connection, now)
        if ended is None:
            return []
        self.detector.disconnected(event.node)
        member = self.membership.others.get(event.node)
        if member is None or member.state is State.LEFT:
            self.contacts.drop(event.node)
        elif event.told and self.membership.large:
            self.contacts.drop(event.node)
            self.detector.unwatch(event.node)
        else:
            # Not told to go: in a large mesh as well it is dialled at once, or a killed process would
            # take seconds to be dead and a living one would be probed through others for ever.
            self.contacts.suggest(
                member.addresses,
                now,
                source="member",
                node=event.node,
                host=ended.host,
                wanted=not event.told,
            )
        return []

    def _search(self, now: float) -> None:
        """Now and then: members that this node is not connected to, the living (in a large mesh now
        and then one of them), and one of the dead. mDNS does not say again what it said an hour ago."""
        self._search_at = now + SEARCH_S
        for node in self.membership.expire(now):
            self.reasons.pop(node, None)
        if self.membership.large:
            self.detector.watch_only_connected()
        others, connected = self.membership.others, self.contacts.connections
        living = self.membership.living_others()
        most = len(living)
        if self.membership.large:
            # All nodes together look for LARGE: that finds the other side of a partition in seconds.
            most = max(int(self._rng.random() * most < LARGE), DIAL_BELOW - len(connected))
            living = self._rng.sample(living, min(most + len(connected), len(living)))
        missing = [others[node] for node in living if node not in connected][:most]
        dead = [m for m in self.membership.lost_others() if m.node not in connected]
        for member in missing + ([self._rng.choice(dead)] if dead else []):
            self._look_for(member, now, wanted=True)

    def _look_for(self, member: Member, now: float, *, wanted: bool) -> None:
        """Dials a member, and finds out from others about it meanwhile if it should live."""
        if member.state <= State.SUSPECT and not self.membership.large:
            self.detector.watch(member.node, now)
        self.contacts.suggest(
            member.addresses, now, source="member", node=member.node, wanted=wanted
        )

    # --------------------------------------------------------------------------------- deaths

    def found(self, findings: Sequence[Finding], now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for finding in findings:
            match finding:
                case Tell():
                    effects += self.gossip.send(finding.node, finding.message)
                case Reach():
                    member = self.membership.others.get(finding.node)
                    if member is not None:
                        self._look_for(member, now, wanted=True)
                case Silent():
                    effects += self._silent(finding.node, finding.since, now)
                case Gone():
                    effects += self._gone(finding.node, finding.reason, now)
                case _:
                    assert_never(finding)
        return effects

    def _silent(self, node: NodeId, since: float, now: float) -> list[ev.Effect]:
        member = self.membership.others.get(node)
        if member is None or member.state >= State.DEAD:
            # Others knew before; a connection that is open here is only half of one. Or the table
            # is full of others.
            self.detector.forget(node)
            return [ev.Abandon(node=node)]
        row = self.membership.declare(node, State.SUSPECT, now)
        if row is None:
            return []
        effects: list[ev.Effect] = []
        if member is not None and member.state is State.ALIVE:
            silent_s = self.detector.silent_for_s(node, now) or 0.0
            self.reasons[node] = f"no answer for {silent_s:.1f} s"
            effects.append(_note(row, f"is suspect: {self.reasons[node]}", "suspect"))
        return effects + self.gossip.news([row]) + self._suspected(row, now, since)

    def _suspected(self, row: Member, now: float, since: float) -> list[ev.Effect]:
        self._news.append(row)
        table, living = self.membership.fingerprint, self.membership.living
        found = self.detector.suspected(row, living, now, table, since=since)
        return [ev.BreakOff(node=row.node), *self.found(found, now)]

    def _gone(self, node: NodeId, reason: str, now: float) -> list[ev.Effect]:
        row = self.membership.declare(node, State.DEAD, now)
        self.detector.forget(node)
        effects: list[ev.Effect] = [ev.Abandon(node=node)]
        if row is not None:
            self.reasons[node] = reason
            self._news.append(row)
            effects.append(_note(row, f"is dead: {reason}", "dead"))
            effects += self.gossip.news([row])
        return effects

    def twin(self, check: Check) -> list[ev.Effect]:
        """Two processes with one identity live; the younger is told to go."""
        younger = check.younger
        older = check.old if younger is check.new else check.new
        used = self.contacts.connections.get(check.node)
        if used is younger:
            self.contacts.connections[check.node] = used = older
        # If the younger has gone meanwhile nobody listens to the older here: it has to come again.
        orphans = [] if used is older else [ev.Hangup(connection=older.number, reason=REPLACED)]
        where = f"{check.old.host} and {check.new.host}"
        text = f"{short(check.node)} runs twice, at {where}: a copied state directory"
        row = self.membership.others.get(check.node)
        told = pages([row] if row else [])
        return [
            ev.Note(text=f"{text}; {younger.host} is refused", kind="twin", node=check.node),
            # The table may hold what the younger said of itself: the older refutes it.
            *(ev.Send(connection=older.number, message=page) for page in told),
            ev.Send(connection=younger.number, message=IdentityTaken(addresses=older.addresses)),
            ev.Hangup(connection=younger.number, reason=taken(older.host)),
            *orphans,
        ]

    def identity_taken(self, message: IdentityTaken, now: float) -> list[ev.Effect]:
        """A peer says that this node runs elsewhere as well: dial it, and see (links.greet)."""
        if not self.twins.look(now):
            return []
        addresses = tuple(a for a in message.addresses if a not in self.membership.own.addresses)
        self.contacts.suggest_twin(addresses, now)
        where = ", ".join(str(address) for address in addresses) or "this network"
        return [ev.Note(text=f"told that another process with this node's identity is at {where}")]

    # ----------------------------------------------------------------------------------- rows

    def merge(self, rows: Iterable[Member], *, source: NodeId, now: float) -> list[ev.Effect]:
        """Rows of another table: act on what is new, pass it on, decide again."""
        rows = tuple(rows)
        newcomers = {row.node for row in rows if row.node not in self.membership.others}
        news = self.membership.merge(rows, now)
        # Who is dead here and alive there: a death is told for a while only, so this is how two
        # tables agree later, and how the member itself comes to hear of it and refutes.
        zombies = [row for r in rows if (row := self.membership.ended(r)) is not None]
        effects = self.gossip.send(source, *pages(zombies)) if zombies else []
        if not news:
            return effects
        if news[0].node == self._me:
            # Refuted; to be suspected is a sign of being slow (Lifeguard).
            self.detector.health.change(+1)
            effects += self._reserve_incarnations() + self.gossip.news(news[:1])
            news = news[1:]
        for row in news:
            effects += self._row_changed(row, now, known=row.node not in newcomers)
        held = self.membership.others
        if len(self.reasons) > len(held):
            # A full table forgets who ended first: inventions must not outlive their rows here.
            self.reasons = {node: why for node, why in self.reasons.items() if node in held}
        return effects + self.gossip.pass_on(news, source, newcomers, now)

    def _row_changed(self, row: Member, now: float, *, known: bool) -> list[ev.Effect]:
        self._news.append(row)
        connection = self.contacts.connections.get(row.node)
        if connection is None and not self.membership.large and row.state <= State.SUSPECT:
            self._look_for(row, now, wanted=False)
        match row.state:
            case State.ALIVE:
                self.detector.cleared(row.node, row.incarnation)
                back = self.reasons.pop(row.node, None)
                return self._came(row, known=known, back=back is not None)
            case State.SUSPECT:
                self.reasons.setdefault(row.node, "no answer, says another member")
                # It refutes as soon as it hears of it.
                return self.gossip.send(row.node, *pages([row])) + self._suspected(row, now, now)
            case State.DEAD:
                self.reasons[row.node] = "told so by another member"
                if connection is not None:
                    # A living connection is better evidence than hearsay: its owner refutes it.
                    return self.gossip.send(row.node, *pages([row]))
                self.detector.forget(row.node)
                return [ev.Abandon(node=row.node), *self._hearsay(row, known=known)]
            case State.LEFT:
                self.reasons[row.node] = ""
                self.detector.forget(row.node)
                self.contacts.drop(row.node)
                effects: list[ev.Effect] = [_note(row, "left", "left")] if known else []
                if connection is not None:
                    effects.append(ev.Hangup(connection=connection.number, reason="you left"))
                return effects
            case _:
                assert_never(row.state)

    # -------------------------------------------------------------------------------- helpers

    def _came(self, row: Member, *, known: bool, back: bool) -> list[ev.Effect]:
        """In a large mesh nobody is told of each of a thousand newcomers."""
        if back:
            return [_note(row, "is alive again", "up")]
        return [] if known or self.membership.large else [_note(row, "is alive", "up")]

    def _hearsay(self, row: Member, *, known: bool) -> list[ev.Effect]:
        """What another member found; in a large mesh it has said so to whoever asks it."""
        if not known or self.membership.large:
            return []
        return [_note(row, f"is dead: {self.reasons[row.node]}", "dead")]

    def publish(
        self,
        *,
        addresses: tuple[Address, ...] | None = None,
        runs: tuple[RunInfo, ...] | None = None,
        state: State | None = None,
    ) -> list[ev.Effect]:
        row = self.membership.publish(addresses=addresses, runs=runs, state=state)
        return self._reserve_incarnations() + self.gossip.news([row])

    def _reserve_incarnations(self) -> list[ev.Effect]:
        spent = self.membership.own.incarnation
        if spent < self._stored:
            return []
        self._stored = spent + INCARNATION_BLOCK
        return [ev.StoreIncarnation(incarnation=self._stored)]


def _note(row: Member, what: str, kind: str) -> ev.Note:
    """Made only where somebody is told: in a large mesh rows change all day long."""
    return ev.Note(text=f"{row.name} ({short(row.node)}) {what}", kind=kind, node=row.node)
