"""Whom to dial, and which connection to keep where two nodes dialled each other.

Rules: 1. A contact is a set of addresses behind which a node may be; its node id, once TLS told it,
names it. 2. Nobody is dialled while connected. 3. Contacts given by hand are retried for ever with a
jittered back-off to 30 s, members while the table says alive, rumours a few times. 4. Of two
connections between the same two nodes the one dialled by the lower node id stays, on both ends; a
newer incarnation or a second dial by the same node replaces what it must have lost.
"""

import math
from dataclasses import dataclass
from random import Random

from mesh.core.address import Address
from mesh.core.messages import (
    NodeId,
)

FIRST_RETRY_S = 0.25
LAST_RETRY_S = 30.0
"""Back-off doubles from one to the other: a node that starts is found at once, a machine that is off
costs two packets a minute."""

RUMOUR_ATTEMPTS = 6
"""About 15 s of retries for an address that only mDNS or the cache gave; mDNS will say it again."""

HINT_LENGTH = 16
"""Characters of a node id that mDNS announces: 80 bits, unique in any mesh."""

STEADY_S = 5.0
"""A connection that lived this long was a good one: if it ends, its node is dialled at once."""

CONTACTS_LIMIT = 1024
ADDRESSES_LIMIT = 16


@dataclass(slots=True)
class Contact:
    """Addresses to dial together."""

    key: str
    addresses: tuple[Address, ...]
    by_hand: bool
    node: NodeId | None = None
    attempts: int = 0
    dial_at: float = math.inf
    dialling: bool = False
    source: str = ""
    reason: str = ""
    """why it cannot be reached, as last said"""
    host: str = ""
    """where its node was found last"""


@dataclass(slots=True)
class Connection:
    """The control connection to a peer that is in use."""

    number: int
    dialled_by: NodeId
    incarnation: int
    via: str
    host: str
    since: float


class Contacts:
    """All contacts and all connected peers of one node."""

    def __init__(self, own: NodeId, rng: Random) -> None:
        self._own = own
        self._rng = rng
        self._contacts: dict[str, Contact] = {}
        self.connections: dict[NodeId, Connection] = {}

    def suggest(
        self,
        addresses: tuple[Address, ...],
        now: float,
        *,
        source: str,
        node: NodeId | None = None,
        hint: str = "",
    ) -> None:
        """Somebody may listen there: dial at once unless connected or being dialled."""
        if not addresses or node == self._own or (hint and self._own.startswith(hint)):
            return
        key = (node or hint)[:HINT_LENGTH] or str(addresses[0])
        contact = self._contacts.get(key)
        if contact is None:
            if len(self._contacts) >= CONTACTS_LIMIT:
                return
            contact = Contact(key=key, addresses=(), by_hand=source == "peer", source=source)
            self._contacts[key] = contact
        contact.node = node or contact.node
        if contact.node is None and hint:
            contact.node = next((n for n in self.connections if n.startswith(hint)), None)
        # The newest addresses lead: after a restart on another port the old ones are dead.
        merged = dict.fromkeys(addresses + contact.addresses)
        news = contact.addresses[: len(addresses)] != addresses
        contact.addresses = tuple(merged)[:ADDRESSES_LIMIT]
        if contact.dial_at == math.inf or news:
            contact.attempts = 0
            contact.dial_at = now

    def due(self, now: float) -> list[Contact]:
        """Contacts to dial now; each stays `dialling` until connected() or failed()."""
        due = [c for c in self._contacts.values() if self._wants_dial(c) and c.dial_at <= now]
        for contact in due:
            contact.dialling = True
        return due

    def failed(self, key: str, now: float, *, itself: bool) -> Contact | None:
        """No address of the contact led to a peer; returns the contact where it is still known."""
        contact = self._contacts.get(key)
        if contact is None:
            return None
        contact.dialling = False
        contact.attempts += 1
        if itself and contact.node is None:
            contact.attempts = RUMOUR_ATTEMPTS
        if contact.attempts >= RUMOUR_ATTEMPTS and not contact.by_hand:
            del self._contacts[key]
            return contact
        contact.dial_at = now + self._back_off(contact)
        return contact

    def connected(
        self,
        node: NodeId,
        number: int,
        *,
        contact: str | None,
        incarnation: int,
        host: str,
        now: float,
    ) -> tuple[bool, int | None]:
        """A new connection passed both hellos.

        Returns whether it is kept, and the number of the one it replaces, if any.
        """
        via = "incoming"
        if contact is not None and contact in self._contacts:
            found = self._contacts[contact]
            found.dialling, found.node = False, node
            found.dial_at, found.reason = math.inf, ""
            via = found.source
        dialler = node if contact is None else self._own
        new = Connection(
            number=number,
            dialled_by=dialler,
            incarnation=incarnation,
            via=via,
            host=host,
            since=now,
        )
        old = self.connections.get(node)
        if old is not None and not self._replaces(new, old):
            return False, None
        self.connections[node] = new
        return True, old.number if old else None

    def lost(self, node: NodeId, number: int, now: float) -> bool:
        """A connection ended; True if it was the one in use. The node is due to be dialled."""
        current = self.connections.get(node)
        if current is None or current.number != number:
            return False
        del self.connections[node]
        lived = now - current.since >= STEADY_S
        for contact in self._contacts.values():
            if contact.node == node:
                contact.host = current.host
                # One that ends as soon as it is made, again and again, backs off like a failure.
                contact.attempts = 0 if lived else contact.attempts + 1
                contact.dial_at = now if lived else now + self._back_off(contact)
        return True

    def unreached(self) -> tuple[tuple[Address, str], ...]:
        """Contacts given by hand that are not connected, and why not."""
        return tuple(
            (contact.addresses[0], contact.reason or "not reached yet")
            for contact in self._contacts.values()
            if contact.by_hand and contact.node not in self.connections
        )

    def rests(self, key: str, now: float, reason: str) -> None:
        """A contact that answered but cannot be talked to: ask again much later."""
        if key in self._contacts:
            contact = self._contacts[key]
            contact.dialling, contact.reason = False, reason
            contact.dial_at = now + LAST_RETRY_S

    def drop(self, node: NodeId) -> None:
        """The node left: nobody looks for it. What was given by hand stays."""
        gone = [c.key for c in self._contacts.values() if c.node == node and not c.by_hand]
        for key in gone:
            del self._contacts[key]

    def next_deadline(self) -> float:
        return min(
            (c.dial_at for c in self._contacts.values() if self._wants_dial(c)), default=math.inf
        )

    def _back_off(self, contact: Contact) -> float:
        delay: float = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(contact.attempts, 16))
        return delay * self._rng.uniform(0.75, 1.0)

    def _wants_dial(self, contact: Contact) -> bool:
        return not contact.dialling and (
            contact.node is None or contact.node not in self.connections
        )

    def _replaces(self, new: Connection, old: Connection) -> bool:
        if new.incarnation != old.incarnation:
            return new.incarnation > old.incarnation
        return new.dialled_by == old.dialled_by or new.dialled_by < old.dialled_by
