"""Failure detector: SWIM's probes, suspicion with Lifeguard's confirmations and local health.

A failure's trip: on_deadline() picks whom to probe -> Ping; no Ack in 0.5 s -> three helpers are asked
(PingRequest); nothing by the end of the second -> Silent: this node accuses it. Every row that says
suspect comes back as suspected(), which starts the timer; others that find the same shorten it; unless
the suspect refutes, Gone.

Rules: 1. Time is this node's own monotonic clock, and if its loop runs late everybody else's deadlines
move as much (health.py). 2. Any word from a node is life, not only an Ack. 3. One probe per interval,
to the next member of a random permutation (SWIM) that was not heard for half a round: among five nodes
the slowest percent of silent deaths is seen a quarter sooner (docs/reliability.md). 4. A refused
connection is a death only if another member is refused as well, or there is no other.
"""

import math
from dataclasses import dataclass, field
from random import Random

from mesh.core.findings import Finding, Gone, Reach, Silent, Tell
from mesh.core.health import Health
from mesh.core.messages import (
    Member,
    NodeId,
    Ping,
    PingReport,
    PingRequest,
    Verdict,
)
from mesh.core.suspicion import Suspicion, suspicion_of

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 0.5
"""SWIM's period, and when helpers are asked; memberlist's LAN defaults."""

GREETED_S = 2.0
"""So much longer an answer may take that is owed for a greeting: who was greeted lives, and may have many
to greet. Thirty nodes that began on one machine had suspected each other eighty times."""

HELPERS = 3
"""Of three random helpers one has a good path, even where a third of all packets is lost."""

HELPER_TIMEOUT_S = 0.4
"""A helper gives up a little before its asker does, so that its "silent" still counts."""

REFUSED_S = 5.0
"""How long a refused connection is known without dialling again."""

ERRANDS_LIMIT = 256
"""Probes in others' places at once."""


@dataclass(slots=True)
class _Watch:
    heard_at: float
    since: float
    connected: bool = False
    refused_at: float = -math.inf
    rtt_s: float | None = None

    @property
    def waits_since(self) -> float:
        """Its last word; but one that was never measured waits for its first probe."""
        return self.since if self.rtt_s is None else self.heard_at


@dataclass(slots=True)
class _Probe:
    node: NodeId
    sent_at: float
    due_at: float
    """when its answer is"""
    ask_at: float
    fail_at: float
    asker: tuple[NodeId, int] | None = None
    """in whose place, and its number for it"""
    refused: bool = False
    """it began with a refused connection: one more and the member is gone"""
    asked: list[NodeId] = field(default_factory=list)
    """helpers that have not said a word about it yet"""

    @property
    def silent_since(self) -> float:
        """A suspicion counts from here. Who had to be reached by others was given no less time."""
        return max(self.due_at, self.sent_at + PROBE_TIMEOUT_S)


class Detector:
    """Whom this node watches, what it waits for, and whom it suspects."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._watches: dict[NodeId, _Watch] = {}
        self._probes: dict[int, _Probe] = {}
        self._suspicions: dict[NodeId, Suspicion] = {}
        self._sequence = 0
        self._probe_at = math.inf
        self._round: list[NodeId] = []
        """of the permutation, those that are still to come"""
        self.health = Health()

    # -------------------------------------------------------------------------------- watching

    def watch(self, node: NodeId, now: float) -> None:
        """Somebody else knows this member: find out whether it lives even if it never connects."""
        if node not in self._watches:
            self._watches[node] = _Watch(heard_at=now, since=now)
            if self._probe_at == math.inf:
                self._probe_at = now + self._rng.uniform(0, PROBE_INTERVAL_S)

    def connected(self, node: NodeId, now: float, table: int, *, dialled: bool) -> list[Finding]:
        """A handshake proves life; whoever dialled probes at once, to compare tables."""
        self.watch(node, now)
        watch = self._watches[node]
        watch.heard_at, watch.connected, watch.refused_at = now, True, -math.inf
        watch.since, watch.rtt_s = now, None
        findings: list[Finding] = []
        for sequence, probe in self._probes_of(node):
            if probe.asker is not None:
                findings += self._report(sequence, Verdict.REACHED)
            else:
                del self._probes[sequence]
        return findings + (self._probe(node, now, table, GREETED_S) if dialled else [])

    def disconnected(self, node: NodeId) -> None:
        """The connection ended; whether the node did is still to be found out."""
        if node in self._watches:
            self._watches[node].connected = False

    def unwatch(self, node: NodeId) -> None:
        """Others watch it (a large mesh)."""
        self._watches.pop(node, None)
        self._probes = {s: p for s, p in self._probes.items() if p.node != node}

    def watch_only_connected(self) -> None:
        """In a large mesh those that are not connected here are watched where they are."""
        for node in [n for n, watch in self._watches.items() if not watch.connected]:
            self.unwatch(node)

    def forget(self, node: NodeId) -> None:
        """It is dead, or left."""
        self.unwatch(node)
        self._suspicions.pop(node, None)
        self.health.forget(node)

    def heard(self, node: NodeId, now: float) -> None:
        if node in self._watches:
            self._watches[node].heard_at = now

    def rtt_s(self, node: NodeId) -> float | None:
        watch = self._watches.get(node)
        return watch.rtt_s if watch else None

    def silent_for_s(self, node: NodeId, now: float) -> float | None:
        watch = self._watches.get(node)
        return now - watch.heard_at if watch else None

    # ---------------------------------------------------------------------------------- probes

    def acknowledged(self, node: NodeId, sequence: int, now: float) -> list[Finding]:
        probe = self._probes.get(sequence)
        if probe is None or probe.node != node:
            return []
        if node in self._watches:
            self._watches[node].rtt_s = now - probe.sent_at
        if probe.asker is not None:
            return self._report(sequence, Verdict.REACHED)
        del self._probes[sequence]
        self.health.change(-1)
        return []

    def refused(self, node: NodeId, now: float, reason: str) -> list[Finding]:
        """Its machine answered that nobody listens there."""
        watch = self._watches.get(node)
        if watch is None:
            return []
        watch.refused_at = now
        findings: list[Finding] = []
        for sequence, probe in self._probes_of(node):
            if probe.asker is not None:
                findings += self._report(sequence, Verdict.REFUSED)
        if any(probe.refused for _, probe in self._probes_of(node)):
            return findings
        helpers = self._helpers(node)
        if not helpers:
            return [*findings, Gone(node=node, reason=reason)]
        self._sequence += 1
        self._probes[self._sequence] = _Probe(
            node=node,
            sent_at=now,
            due_at=now,
            ask_at=math.inf,
            fail_at=now + PROBE_INTERVAL_S * self.health.multiplier,
            refused=True,
            asked=helpers,
        )
        return findings + self._ask(self._sequence, node, helpers)

    def requested(
        self, asker: NodeId, sequence: int, node: NodeId, now: float, table: int
    ) -> list[Finding]:
        """Another member asks this one to probe `node` in its place."""
        watch = self._watches.get(node)
        verdict: Verdict | None = None
        if watch is not None and now - watch.refused_at < REFUSED_S and not watch.connected:
            verdict = Verdict.REFUSED
        elif sum(p.asker is not None for p in self._probes.values()) >= ERRANDS_LIMIT:
            verdict = Verdict.SILENT
        if verdict is not None:
            return [Tell(node=asker, message=PingReport(sequence=sequence, verdict=verdict))]
        self._sequence += 1
        self._probes[self._sequence] = _Probe(
            node=node,
            sent_at=now,
            due_at=now,
            ask_at=math.inf,
            fail_at=now + HELPER_TIMEOUT_S,
            asker=(asker, sequence),
        )
        if watch is None or not watch.connected:
            return [Reach(node=node)]
        return [Tell(node=node, message=Ping(sequence=self._sequence, table=table))]

    def reported(
        self, helper: NodeId, sequence: int, verdict: Verdict, now: float
    ) -> list[Finding]:
        """What a helper found."""
        probe = self._probes.get(sequence)
        if probe is None or helper not in probe.asked:
            return []
        if verdict is Verdict.SILENT:
            probe.asked.remove(helper)
            return []
        del self._probes[sequence]
        if verdict is Verdict.REACHED:
            self.heard(probe.node, now)
            return []
        if probe.refused:
            return [Gone(node=probe.node, reason="connection refused, to others as well")]
        return [Silent(node=probe.node, since=probe.silent_since)]

    # ------------------------------------------------------------------------------- suspicion

    def suspected(
        self, row: Member, living: int, now: float, table: int, *, since: float
    ) -> list[Finding]:
        """The table says that this member is suspect, from `since` on; `living` are in it."""
        suspicion = self._suspicions.get(row.node)
        if suspicion is None or suspicion.incarnation != row.incarnation:
            times = self.health.chances(row.node, since)
            self._suspicions[row.node] = suspicion_of(row, living, since, times)
        elif suspicion.accusers != len(row.accusers):
            suspicion.confirmed(len(row.accusers), now)
        watch = self._watches.get(row.node)
        if watch is None or now - watch.heard_at < PROBE_TIMEOUT_S:
            return []
        return self._probe(row.node, now, table)  # to confirm it, or to know better

    def cleared(self, node: NodeId, incarnation: int) -> None:
        """It refuted, or began again: that its last process was refused says nothing of this one."""
        if suspicion := self._suspicions.pop(node, None):
            self.health.refuted(node, suspicion.since, incarnation - suspicion.incarnation)
        for sequence, probe in self._probes_of(node) if self._probes else ():
            if probe.refused:
                del self._probes[sequence]

    # ------------------------------------------------------------------------------- deadlines

    def next_deadline(self) -> float:
        times = [self._probe_at]
        times += [suspicion.deadline for suspicion in self._suspicions.values()]
        for probe in self._probes.values():
            times += (probe.ask_at, probe.fail_at)
        return min(times)

    def on_deadline(self, now: float, table: int) -> list[Finding]:
        """Everything that is due. `table`: fingerprint of this node's table, for the probes."""
        late_s = now - self.next_deadline()
        if late_s < 0:
            return []
        self._forgive(late_s)
        findings: list[Finding] = []
        for sequence, probe in list(self._probes.items()):
            if now >= probe.fail_at:
                findings += self._failed(sequence, probe, now, table)
            elif now >= probe.ask_at:
                probe.ask_at = math.inf
                if not self._heard_since(probe):
                    probe.asked = self._helpers(probe.node)
                    findings += self._ask(sequence, probe.node, probe.asked)
        for node, suspicion in list(self._suspicions.items()):
            if now >= suspicion.deadline:
                findings += self._judge(node, suspicion, now)
        if now >= self._probe_at:
            findings += self._next_probe(now, table)
        return findings

    def _forgive(self, late_s: float) -> None:
        """This process was stopped or starved, not the others: what they said meanwhile waits."""
        lag_s = self.health.forgiven_s(late_s)
        if not lag_s:
            return
        for probe in self._probes.values():
            probe.due_at += lag_s
            probe.ask_at += lag_s
            probe.fail_at += lag_s
        for suspicion in self._suspicions.values():
            suspicion.since += lag_s
        self._probe_at += lag_s

    def _next_probe(self, now: float, table: int) -> list[Finding]:
        if not self._watches:
            self._probe_at = math.inf
            return []
        self._probe_at = now + PROBE_INTERVAL_S * self.health.multiplier
        node = self._choose(now)
        return [] if node is None else self._probe(node, now, table)

    def _choose(self, now: float) -> NodeId | None:
        """The next of a random permutation that was silent for half a round; where nobody was, the
        one that was silent for longest."""
        probed = {p.node for p in self._probes.values() if p.asker is None}
        silent_since = now - PROBE_INTERVAL_S * len(self._watches) / 2
        for _ in range(2):
            while self._round:
                node = self._round.pop()
                watch = self._watches.get(node)
                if watch and node not in probed and watch.waits_since <= silent_since:
                    return node
            self._round = list(self._watches)
            self._rng.shuffle(self._round)
        waiting = [(w.waits_since, n) for n, w in self._watches.items() if n not in probed]
        return min(waiting)[1] if waiting else None

    def _probe(
        self, node: NodeId, now: float, table: int, patience_s: float = 0.0
    ) -> list[Finding]:
        connected = self._watches[node].connected
        timeout_s = PROBE_TIMEOUT_S * self.health.multiplier if connected else 0.0
        ask_at = now + patience_s + timeout_s
        fail_at = now + patience_s + PROBE_INTERVAL_S * self.health.multiplier
        own = next((probe for _, probe in self._probes_of(node) if probe.asker is None), None)
        if own is not None:  # it may have been more patient
            own.due_at, own.fail_at = min(own.due_at, ask_at), min(own.fail_at, fail_at)
            own.ask_at = min(own.ask_at, ask_at) if own.ask_at < math.inf else own.ask_at
            return []
        self._sequence += 1
        self._probes[self._sequence] = _Probe(
            node=node, sent_at=now, due_at=ask_at, ask_at=ask_at, fail_at=fail_at
        )
        if not connected:
            return []
        return [Tell(node=node, message=Ping(sequence=self._sequence, table=table))]

    def _failed(self, sequence: int, probe: _Probe, now: float, table: int) -> list[Finding]:
        if probe.asker is not None:
            return self._report(sequence, Verdict.SILENT)
        del self._probes[sequence]
        if self._heard_since(probe):
            return []
        findings: list[Finding] = [Silent(node=probe.node, since=probe.silent_since)]
        for helper in probe.asked:
            watch = self._watches.get(helper)
            if watch is not None and watch.heard_at > probe.due_at:
                # It lives and did not even say "silent": a sign that this node hears badly.
                self.health.change(+1)
            elif watch is not None:
                findings += self._probe(helper, now, table)  # it may have gone as well
        return findings

    def _judge(self, node: NodeId, suspicion: Suspicion, now: float) -> list[Finding]:
        watch = self._watches.get(node)
        if watch is not None and watch.heard_at > suspicion.since:
            suspicion.since = now  # it lives; whoever accuses it has yet to hear so
            return []
        others = suspicion.accusers
        said = "1 member says so" if others == 1 else f"{others} members say so"
        return [Gone(node=node, reason=f"silent: {said}")]

    def _heard_since(self, probe: _Probe) -> bool:
        watch = self._watches.get(probe.node)
        return watch is not None and watch.heard_at > probe.sent_at

    def _report(self, sequence: int, verdict: Verdict) -> list[Finding]:
        probe = self._probes.pop(sequence)
        assert probe.asker is not None
        asker, number = probe.asker
        return [Tell(node=asker, message=PingReport(sequence=number, verdict=verdict))]

    def _probes_of(self, node: NodeId) -> list[tuple[int, _Probe]]:
        return [(s, p) for s, p in self._probes.items() if p.node == node]

    def _helpers(self, node: NodeId) -> list[NodeId]:
        able = [n for n, w in self._watches.items() if w.connected and n != node]
        return self._rng.sample(able, min(HELPERS, len(able)))

    @staticmethod
    def _ask(sequence: int, node: NodeId, helpers: list[NodeId]) -> list[Finding]:
        request = PingRequest(sequence=sequence, node=node)
        return [Tell(node=helper, message=request) for helper in helpers]
