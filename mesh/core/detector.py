"""Failure detector, first version: a connected peer that stays silent too long is dead.

Rules: 1. Silence is measured on this node's own monotonic clock. 2. Only peers that this node was
connected to are watched: of the others it knows by hearsay and lets those speak who were. Processes
that die are seen sooner, by end of file and a refused redial (protocol.py).
"""

import math
from dataclasses import dataclass

from mesh.core.messages import NodeId, Ping

PING_INTERVAL_S = 1.0
"""One ping a second and peer, as SWIM probes: 60 bytes each."""

SILENCE_S = 5.0
"""Five pings unanswered. A laptop's Wi-Fi roams in 1-3 s; a process stopped for 3 s must not die."""


@dataclass(slots=True)
class _Watch:
    heard_at: float
    ping_at: float
    connected: bool
    sequence: int = 0
    sent_at: float = 0.0
    rtt_s: float | None = None


class Detector:
    """Whom this node listens for, and when it last heard of each."""

    def __init__(self) -> None:
        self._watches: dict[NodeId, _Watch] = {}
        self._looked_at = -math.inf

    def connected(self, node: NodeId, now: float) -> None:
        watch = self._watches.get(node)
        if watch is None:
            self._watches[node] = _Watch(heard_at=now, ping_at=now, connected=True)
        else:
            watch.heard_at = watch.ping_at = now
            watch.connected = True

    def disconnected(self, node: NodeId) -> None:
        """No pings without a connection; the silence goes on counting."""
        if node in self._watches:
            self._watches[node].connected = False

    def forget(self, node: NodeId) -> None:
        self._watches.pop(node, None)

    def heard(self, node: NodeId, now: float) -> None:
        if node in self._watches:
            self._watches[node].heard_at = now

    def acknowledged(self, node: NodeId, sequence: int, now: float) -> None:
        watch = self._watches.get(node)
        if watch is not None and watch.sequence == sequence:
            watch.rtt_s = now - watch.sent_at

    def rtt_s(self, node: NodeId) -> float | None:
        watch = self._watches.get(node)
        return watch.rtt_s if watch else None

    def is_watched(self, node: NodeId) -> bool:
        """Whether this node was connected to it, and has not called it dead since."""
        return node in self._watches

    def silent_for_s(self, node: NodeId, now: float) -> float | None:
        watch = self._watches.get(node)
        return now - watch.heard_at if watch else None

    def due_pings(self, now: float) -> list[tuple[NodeId, Ping]]:
        """Pings to send now."""
        pings = []
        for node, watch in self._watches.items():
            if watch.connected and watch.ping_at <= now:
                watch.sequence += 1
                watch.sent_at = now
                watch.ping_at = now + PING_INTERVAL_S
                pings.append((node, Ping(sequence=watch.sequence)))
        return pings

    def due_deaths(self, now: float) -> list[NodeId]:
        """Peers that were silent for too long; they are watched no more."""
        if now - self._looked_at > 2 * PING_INTERVAL_S:
            # This process was stopped or starved, not the others: what they said meanwhile waits.
            for watch in self._watches.values():
                watch.heard_at = now
        self._looked_at = now
        silent = [n for n, w in self._watches.items() if now >= w.heard_at + SILENCE_S]
        for node in silent:
            del self._watches[node]
        return silent

    def next_deadline(self) -> float:
        # Looks every second, so that a longer gap between two looks is a stall of its own.
        deadline = self._looked_at + PING_INTERVAL_S if self._watches else math.inf
        for watch in self._watches.values():
            deadline = min(deadline, watch.heard_at + SILENCE_S)
            if watch.connected:
                deadline = min(deadline, watch.ping_at)
        return deadline
