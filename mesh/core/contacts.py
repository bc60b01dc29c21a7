"""Whom to dial, and which connection to keep where two nodes dialled each other.

Rules: 1. A contact is a set of addresses behind which a node may be; its node id, once TLS told it,
names it. 2. Nobody is dialled while connected. 3. Contacts given by hand, and those of the last start,
are retried for ever with a jittered back-off to 30 s (where mDNS is silent nothing else leads back to
the others after a start in a partition), members while the table says alive, rumours a few times.
4. Of two connections between the same two processes the one dialled by the lower node id stays, on both
ends; a newer process or a second dial by the same one replaces what it must have lost. 5. In a large mesh
(`limited`) a node dials only until it has DIAL_BELOW connections, or where it must (`wanted`), and gives
up the one that was used longest ago above CONNECTIONS_LIMIT: what a node spends stays flat.
"""

import math
from dataclasses import dataclass
from random import Random

from mesh.core.address import Address
from mesh.core.membership import LARGE
from mesh.core.messages import NodeId

FIRST_RETRY_S = 0.25
LAST_RETRY_S = 30.0
"""Back-off doubles from one to the other: a node that starts is found at once, a machine that is off
costs two packets a minute."""

RUMOUR_ATTEMPTS = 6
"""About 15 s of retries for an address that only mDNS gave; mDNS will say it again."""

TELLING_ATTEMPTS = 2
"""Dials after which a node that mDNS shows counts as out of reach: a start takes no longer."""

GIVEN_UP_S = 600.0
GIVEN_UP_LIMIT = 64
"""How long, and how many, rumours that led nowhere are remembered for whoever asks why: mDNS says of a
node that it is there once, so this is all that will ever be heard of it."""

HINT_LENGTH = 16
"""Characters of a node id that mDNS announces: 80 bits, unique in any mesh."""

STEADY_S = 1.0
"""A connection that lived this long was a good one: if it ends, its node is dialled at once, and a
process that was killed is known to be dead in milliseconds. One a second is what that costs at most, two where
a node shows another process each time."""

TWIN = "twin:"
"""Key of the one contact that may be this node itself; no node id begins so."""

CONTACTS_LIMIT = 1024
ADDRESSES_LIMIT = 16

DIAL_BELOW = 8
CONNECTIONS_LIMIT = 32
"""Control connections in a large mesh. Each node dials 8, so has 16 on average: log n and a few keep
a random graph of a thousand in one piece. The gap to 32 is what keeps one node's giving up from
becoming another's dialling: at 16 every second dial of 100 nodes ended in one."""

CROSSING_S = 0.1
"""Two nodes that hear of each other at the same moment need one connection, not two: the one with
the higher id lets the other dial first. A handshake takes 10-25 ms of CPU on a Raspberry Pi. Whom mDNS
shows while DIAL_BELOW are being dialled waits as long: then it is known whether the mesh is large."""


@dataclass(slots=True)
class Contact:
    """Addresses to dial together."""

    key: str
    addresses: tuple[Address, ...]
    by_hand: bool
    node: NodeId | None = None
    attempts: int = 0
    flaps: int = 0
    """connections in a row, to one process, that ended as soon as they were made: each after the first
    counts as a failed attempt"""
    instance: int = 0
    """that process"""
    counts_from: float = -math.inf
    """when another process was last given a new count"""
    dial_at: float = math.inf
    dialling: bool = False
    source: str = ""
    reason: str = ""
    """why it cannot be reached, as last said"""
    host: str = ""
    """where its node was found last"""
    wanted: bool = False
    """to be dialled even where there are connections enough"""


@dataclass(slots=True)
class Connection:
    """The control connection to a peer that is in use."""

    number: int
    dialled_by: NodeId
    instance: int
    began_at: float
    """when the process on the other end began, by this node's clock"""
    addresses: tuple[Address, ...]
    """where the other end says that it listens"""
    via: str
    host: str
    since: float
    used_at: float


class Contacts:
    """All contacts and all connected peers of one node."""

    def __init__(self, own: NodeId, rng: Random) -> None:
        self._own = own
        self._rng = rng
        self._contacts: dict[str, Contact] = {}
        self.connections: dict[NodeId, Connection] = {}
        self._large = False
        self._announced = 0
        """contacts that mDNS showed"""
        self._given_up: dict[str, tuple[Contact, float]] = {}
        """those of them that are not dialled any more, and since when; the oldest comes first"""
        self._deadline: float | None = math.inf
        """when the next contact is due; None: something changed, look again"""

    @property
    def limited(self) -> bool:
        """Whether this is a large mesh: rule 5. The table may not know yet what mDNS shows: a
        thousand nodes that start together must not dial each other all at once."""
        return self._large or self._announced > LARGE

    def table_is_large(self, large: bool) -> None:
        """What the table knows of it."""
        if self._large is not large:
            self._large, self._deadline = large, None

    def suggest(
        self,
        addresses: tuple[Address, ...],
        now: float,
        *,
        source: str,
        node: NodeId | None = None,
        hint: str = "",
        host: str = "",
        wanted: bool = False,
    ) -> None:
        """Somebody may listen there: dial at once unless connected or being dialled."""
        if not addresses or node == self._own:
            return
        limited = self.limited
        key = (node or hint)[:HINT_LENGTH] or str(addresses[0])
        contact = self._contacts.get(key)
        if contact is None:
            if len(self._contacts) >= CONTACTS_LIMIT:
                return
            contact = Contact(key=key, addresses=(), by_hand=source == "peer", source=source)
            self._contacts[key] = contact
            self._announced += source == "mdns"
        contact.node = node or contact.node
        contact.wanted |= wanted
        contact.host = host or contact.host
        if contact.node is None and hint:
            contact.node = next((n for n in self.connections if n.startswith(hint)), None)
        # The newest addresses lead: after a restart on another port the old ones are dead.
        merged = dict.fromkeys(addresses + contact.addresses)
        news = contact.addresses[: len(addresses)] != addresses
        contact.addresses = tuple(merged)[:ADDRESSES_LIMIT]
        if contact.dial_at == math.inf or news:
            contact.attempts = 0
            crossing = source in ("mdns", "member") and not wanted and self._own > (node or hint)
            early = source == "mdns" and self._dials_many()
            contact.dial_at = now + CROSSING_S * (crossing + early)
        if limited is not self.limited:
            self._deadline = None
        elif self._deadline is not None and contact.dial_at < self._deadline and self._may(contact):
            self._deadline = contact.dial_at  # all others are due as before: mDNS says a lot

    def suggest_twin(self, addresses: tuple[Address, ...], now: float) -> None:
        """Another process with this node's id may listen there. One contact, whoever was found the
        last time: what a member made up must not take the room of others."""
        self._contacts.pop(TWIN, None)
        self.suggest(addresses, now, source="twin", hint=TWIN, wanted=True)

    def due(self, now: float) -> list[Contact]:
        """Contacts to dial now; each stays `dialling` until connected() or failed()."""
        if now < self.next_deadline():
            return []
        self._deadline = None
        room = self._room()
        due = []
        for contact in self._contacts.values():
            if contact.dial_at <= now and self._wants_dial(contact):
                if not self._must(contact):
                    if room <= 0:
                        continue
                    room -= 1
                contact.dialling = True
                due.append(contact)
        return due

    def failed(self, key: str, now: float, *, itself: bool) -> Contact | None:
        """No address of the contact led to a peer; returns the contact where it is still known."""
        contact = self._contacts.get(key)
        if contact is None:
            return None
        self._deadline = None
        contact.dialling = contact.wanted = False
        contact.attempts += 1
        if itself and contact.node is None:
            contact.attempts = RUMOUR_ATTEMPTS
        lasts = contact.by_hand or (contact.source == "cache" and not itself)
        if contact.attempts >= RUMOUR_ATTEMPTS and not lasts:
            self._remove(key)
            if contact.source == "mdns" and not itself:
                self._give_up(contact, now)
            return contact
        contact.dial_at = now + self._back_off(contact)
        return contact

    def connected(
        self,
        node: NodeId,
        number: int,
        *,
        contact: str | None,
        instance: int,
        age_s: float,
        addresses: tuple[Address, ...] = (),
        host: str,
        now: float,
    ) -> tuple[bool, Connection | None]:
        """A new connection passed both hellos; `instance` and `age_s` are of the other process.

        Returns whether it is kept, and the one that it replaces, if any.
        """
        self._deadline = None
        self._given_up.pop(node[:HINT_LENGTH], None)
        via = "incoming"
        if contact is not None and contact in self._contacts:
            found = self._contacts[contact]
            found.dialling, found.node, found.wanted = False, node, False
            found.dial_at, found.reason, found.attempts = math.inf, "", found.flaps
            via = found.source
        elif (heard := self._contacts.get(node[:HINT_LENGTH])) is not None:
            heard.node = node  # it dialled first: there is no need to dial it as well
        new = Connection(
            number=number,
            dialled_by=node if contact is None else self._own,
            instance=instance,
            began_at=now - age_s,
            addresses=addresses,
            via=via,
            host=host,
            since=now,
            used_at=now,
        )
        old = self.connections.get(node)
        if old is not None and not self._replaces(new, old):
            return False, None
        self.connections[node] = new
        return True, old

    def surplus(self) -> list[tuple[NodeId, Connection]]:
        """Connections above the limit, those used longest ago; they are this node's no more."""
        count = len(self.connections) - CONNECTIONS_LIMIT
        if not self.limited or count <= 0:
            return []
        self._deadline = None
        oldest = sorted(self.connections.items(), key=lambda item: item[1].used_at)[:count]
        for node, _ in oldest:
            del self.connections[node]
            self.drop(node)
        return oldest

    def lost(self, node: NodeId, number: int, now: float) -> Connection | None:
        """A connection ended: the one that was in use, or None. The node is due to be dialled."""
        current = self.connections.get(node)
        if current is None or current.number != number:
            return None
        del self.connections[node]
        self._deadline = None
        lived = now - current.since >= STEADY_S
        for contact in self._contacts.values():
            if contact.node == node:
                contact.host = current.host
                if contact.instance != current.instance and now >= contact.counts_from + STEADY_S:
                    # A process killed young is no link that flaps, however often its node starts again.
                    contact.flaps, contact.counts_from = 0, now
                contact.instance = current.instance
                contact.flaps = 0 if lived else contact.flaps + 1
                contact.attempts = max(0, contact.flaps - 1)  # the first waits FIRST_RETRY_S
                contact.dial_at = now if lived else now + self._back_off(contact)
        return current

    def unreached(self) -> tuple[tuple[Address, str], ...]:
        """Contacts given by hand that are not connected, and why not."""
        return tuple(
            (contact.addresses[0], contact.reason or "not reached yet")
            for contact in self._contacts.values()
            if contact.by_hand and contact.node not in self.connections
        )

    def undialled(self, now: float) -> list[Contact]:
        """Those that mDNS shows and that no dial reaches, with the reason: a firewall, mostly."""
        trying = [c for c in self._contacts.values() if c.attempts >= TELLING_ATTEMPTS]
        gone = [c for c, since in self._given_up.values() if now - since < GIVEN_UP_S]
        return [
            contact
            for contact in gone + [c for c in trying if c.key not in self._given_up]
            if contact.source == "mdns"
            and contact.reason
            and not any(node.startswith(contact.key) for node in self.connections)
        ]

    def rests(self, key: str, now: float, reason: str) -> None:
        """A contact that answered but cannot be talked to: ask again much later."""
        if key in self._contacts:
            self._deadline = None
            contact = self._contacts[key]
            contact.dialling, contact.reason = False, reason
            contact.dial_at = now + LAST_RETRY_S

    def drop(self, node: NodeId) -> None:
        """Nobody looks for this node any more. What was given by hand stays."""
        self._deadline = None
        gone = [c.key for c in self._contacts.values() if c.node == node and not c.by_hand]
        for key in gone:
            self._remove(key)

    def next_deadline(self) -> float:
        if self._deadline is None:
            room = self._room() > 0
            wanted = (c for c in self._contacts.values() if self._wants_dial(c))
            may = (c.dial_at for c in wanted if room or self._must(c))
            self._deadline = min(may, default=math.inf)
        return self._deadline

    def _may(self, contact: Contact) -> bool:
        """Whether its time is all that it waits for."""
        return self._wants_dial(contact) and (self._must(contact) or self._room() > 0)

    def _dials_many(self) -> bool:
        """Whether who is heard of now may wait until mDNS has shown how large the mesh is."""
        return not self.limited and sum(c.dialling for c in self._contacts.values()) >= DIAL_BELOW

    def _remove(self, key: str) -> None:
        self._announced -= self._contacts.pop(key).source == "mdns"

    def _give_up(self, contact: Contact, now: float) -> None:
        self._given_up.pop(contact.key, None)
        self._given_up[contact.key] = contact, now
        if len(self._given_up) > GIVEN_UP_LIMIT:
            del self._given_up[next(iter(self._given_up))]

    def _back_off(self, contact: Contact) -> float:
        delay: float = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(contact.attempts, 16))
        return delay * self._rng.uniform(0.75, 1.0)

    def _wants_dial(self, contact: Contact) -> bool:
        return not contact.dialling and (
            contact.node is None or contact.node not in self.connections
        )

    def _must(self, contact: Contact) -> bool:
        """Whether rule 5 makes an exception."""
        return contact.wanted or (contact.by_hand and contact.node is None)

    def _room(self) -> int:
        """How many more may be dialled now."""
        if not self.limited:
            return CONTACTS_LIMIT
        room = DIAL_BELOW - len(self.connections)
        if room <= 0:  # as nearly always
            return room
        return room - sum(contact.dialling for contact in self._contacts.values())

    def _replaces(self, new: Connection, old: Connection) -> bool:
        return (
            new.instance != old.instance
            or new.dialled_by == old.dialled_by
            or new.dialled_by < old.dialled_by
        )
