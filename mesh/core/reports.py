"""How the runs do on other nodes: figures for people, handed on beside the probes.

Rules: 1. They decide nothing; a wrong one misleads nobody but a reader. 2. A probe and its answer
carry REPORTS_LIMIT of them at most, in turn; among more than CROWD members fewer, and the answer only:
what it costs does not grow with the number of nodes, and in a mesh of sixty they are about ten seconds old. (To tell what was told least often, as SWIM picks
its news, starves some where each second brings more news than fits.) 3. Only what the table knows is kept: a living member, and a run that its row names.
A report's trip: Posted -> publish() -> a Ping or an Ack comes -> news() -> Reports -> the peer's heard() -> of().
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mesh.core.for_people import REPORTS_LIMIT, Figures, Report, Reports
from mesh.core.membership import Membership
from mesh.core.messages import Member, NodeId, State

TELLINGS = 8
"""How often one report is told: more than log2 of the nodes of a large mesh."""

RENEW_S = 1.0

CROWD = 64
FEWEST = 4
"""Members with whom REPORTS_LIMIT at a time is still what each may cost; and how few go at least. At a thousand
nodes 32 beside each probe and each answer were a third of all that a node did, for figures that nobody
reads one by one."""

AGE_LIMIT_MS = 86_400_000
"""A day: older is old. Whoever hands a report on adds the time that it was kept here, and an age beyond
what the wire carries would make the next node hang up on an honest one."""

REPORTS_KEPT = 8192
"""Two runs on each of 4096 members."""


@dataclass(slots=True)
class _Kept:
    report: Report
    since: float
    """when its owner said it, by this node's clock"""
    told: int = 0


class ReportTable:
    """What one node knows of all runs. `membership` belongs to the protocol; read only."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._kept: dict[NodeId, dict[str, _Kept]] = {}
        self._count = 0
        self._own: dict[str, tuple[Figures, float]] = {}
        """of this node's runs, not told yet"""
        self._serial = 0

    def publish(self, run: str, figures: Figures, now: float) -> None:
        """How a run of this node does now; it is told at the next probe."""
        self._own[run] = figures, now

    def heard(self, reports: Iterable[Report], now: float) -> None:
        """What another node knows."""
        own = self._membership.own.node
        for report in reports:
            held = self._kept.get(report.node, {}).get(report.run)
            if report.node == own or (held is not None and held.report.serial >= report.serial):
                continue
            if not self._trains(report.node, report.run) or self._invented(report):
                continue
            if held is not None or self._count < REPORTS_KEPT:
                self._keep(report, now - min(report.age_ms, AGE_LIMIT_MS) / 1000)

    def _invented(self, report: Report) -> bool:
        """Whether its serial is beyond what its owner can have come to: it would never be replaced."""
        row = self._membership.others[report.node]
        return report.serial >> 32 > row.incarnation

    @property
    def crowded(self) -> bool:
        """Whether an answer alone carries reports."""
        return len(self._membership.others) >= CROWD

    def news(self, now: float) -> Reports | None:
        """What to tell next; None if everything was told often enough."""
        self._renew(now)
        told: list[_Kept] = []
        share = REPORTS_LIMIT * CROWD // (1 + len(self._membership.others))
        limit = max(FEWEST, min(REPORTS_LIMIT, share))
        for node in list(self._kept):
            news = [kept for kept in self._kept[node].values() if kept.told < TELLINGS]
            if told and len(told) + len(news) > limit:
                break
            if news:
                told += news
                self._kept[node] = self._kept.pop(node)  # behind all others
        for kept in told:
            kept.told += 1
        reports = tuple(
            Report(
                node=one.report.node,
                run=one.report.run,
                serial=one.report.serial,
                age_ms=max(0, round(1000 * (now - one.since))),
                figures=one.report.figures,
            )
            for one in told
        )
        return Reports(reports=reports) if reports else None

    def of(self, node: NodeId, run: str, now: float) -> tuple[Figures, float] | None:
        """The last figures of a run on a member, and how many seconds old they are."""
        kept = self._kept.get(node, {}).get(run)
        return (kept.report.figures, now - kept.since) if kept else None

    def row_changed(self, row: Member) -> None:
        """Drops what the member trains no more."""
        runs = self._kept.get(row.node, {})
        for run in [run for run in runs if not self._trains(row.node, run)]:
            del runs[run]
            self._count -= 1
        if not runs:
            self._kept.pop(row.node, None)

    def _renew(self, now: float) -> None:
        """Each run of this node is news once a second at most."""
        node = self._membership.own.node
        for run in list(self._own):
            held = self._kept.get(node, {}).get(run)
            if held is not None and now - held.since < RENEW_S:
                continue
            figures, said_at = self._own.pop(run)
            if self._trains(node, run):
                self._serial = serial = self._membership.number_after(self._serial)
                report = Report(node=node, run=run, serial=serial, age_ms=0, figures=figures)
                self._keep(report, said_at)

    def _keep(self, report: Report, since: float) -> None:
        runs = self._kept.setdefault(report.node, {})
        self._count += report.run not in runs
        runs[report.run] = _Kept(report, since)

    def _trains(self, node: NodeId, run: str) -> bool:
        own = self._membership.own
        row = own if node == own.node else self._membership.others.get(node)
        if row is None or row.state > State.SUSPECT:
            return False
        return any(info.run == run for info in row.runs)
