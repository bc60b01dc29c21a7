"""What a node remembers of its life: events, the lines that it printed, the curves of its runs.

Rules: 1. Everything is bounded, whatever the uptime: rings of a fixed length, one curve a run. 2.
Exchanges, several a second, have a ring of their own and push nothing else out. 3. Times are the
node's uptime; whoever shows them to people adds the wall clock (report.py), so that a clock which
was wrong at the time does no harm. 4. Nobody who follows is waited for.
An event's trip: the core's Note, or something that the loop handled -> record() -> a ring -> whoever
follows wakes -> `mesh events`.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final

import trio

from mesh.core import events as ev
from mesh.core.for_people import Figures
from mesh.core.messages import NodeId
from mesh.history import Curve, Mark, Meter, Point, Rates
from mesh.runs import Run

EVENTS_KEPT: Final = 512
EXCHANGES_KEPT: Final = 256
LINES_KEPT: Final = 512
"""About a hundred bytes each."""

CURVES_KEPT: Final = 16
"""Runs whose curves are kept, those that ended included; a node trains at most 16 at a time."""

REFUSALS_S: Final = 10.0
"""Refusals of one kind are one event in this time: a stranger must not fill the ring."""


NOTES_LIMIT: Final = 40
NOTES_S: Final = 10.0
"""Notes of one kind that are told in this time, more than a mesh has in which each is news (LARGE): a member
that makes others up must not fill a disk with their deaths. The rest is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One event, or one line of the log (kind `log`)."""

    sequence: int
    """rises by one; a gap means that older ones fell out of the ring"""
    at_s: float
    """uptime of the node"""
    kind: str
    text: str
    node: NodeId | None = None
    run: str | None = None


class Journal:
    """One node's. `name_of` tells what a member calls itself."""

    def __init__(self, name_of: Callable[[NodeId], str]) -> None:
        self._name_of = name_of
        self.began_at = 0.0
        """on trio's clock; set when the node runs"""
        self.load: Callable[[], float | None] = lambda: None
        """of this machine's processors; the process knows it"""
        self.cpu: Callable[[], float | None] = lambda: None
        """what this node and its trainings take of them, in cores; the process knows it"""
        self._events: deque[Happening] = deque(maxlen=EVENTS_KEPT)
        self._exchanges: deque[Happening] = deque(maxlen=EXCHANGES_KEPT)
        self._lines: deque[Happening] = deque(maxlen=LINES_KEPT)
        self._event_count = 0
        self._line_count = 0
        self._changed = trio.Event()
        self._refused_at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()
        self._noted: dict[str, tuple[float, int]] = {}
        """kind -> since when, and how often, in the last NOTES_S"""
        self.curves: dict[str, Curve] = {}
        self._meters: dict[str, Meter] = {}
        self._resumed: dict[str, int] = {}
        self._drifts: dict[str, float | None] = {}

    # ------------------------------------------------------------------------------------- rings

    def record(
        self, kind: str, text: str, *, node: NodeId | None = None, run: str | None = None
    ) -> None:
        """One thing happened."""
        self._event_count += 1
        happening = Happening(
            sequence=self._event_count,
            at_s=trio.current_time() - self.began_at,
            kind=kind,
            text=text,
            node=node,
            run=run,
        )
        (self._exchanges if kind == "exchange" else self._events).append(happening)
        self._wake()

    def line(self, text: str) -> None:
        """The node printed a line."""
        self._line_count += 1
        at_s = trio.current_time() - self.began_at
        line = Happening(sequence=self._line_count, at_s=at_s, kind="log", text=text)
        self._lines.append(line)
        self._wake()

    @property
    def notes(self) -> tuple[str, ...]:
        """The last lines."""
        return tuple(line.text for line in self._lines)

    def events(self, since: int, limit: int) -> list[Happening]:
        """Events after number `since`, in order; of more than `limit` the last where `since` is 0,
        else the first."""
        kept = sorted(chain(self._events, self._exchanges), key=lambda event: event.sequence)
        return _page(kept, since, limit)

    def lines(self, since: int, limit: int) -> list[Happening]:
        """As events()."""
        return _page([*self._lines], since, limit)

    async def wait(self, ready: Callable[[], object], timeout_s: float) -> None:
        """Until `ready()` is true after something was recorded, at most so long."""
        with trio.move_on_after(timeout_s):
            while not ready():
                await self._changed.wait()

    def _wake(self) -> None:
        if self._changed.statistics().tasks_waiting:
            self._changed.set()
            self._changed = trio.Event()

    # ------------------------------------------------------------------------- what the loop sees

    def note(self, note: ev.Note) -> list[str]:
        """The core says something; returns the lines to print."""
        now = trio.current_time()
        lines = []
        for kind, (since, count) in list(self._noted.items()):
            if now - since >= NOTES_S:
                del self._noted[kind]
                if count > NOTES_LIMIT:
                    text = f"and {count - NOTES_LIMIT} more such lines ({kind})"
                    self.record(kind, text)
                    lines.append(text)
        since, count = self._noted.get(note.kind, (now, 0))
        self._noted[note.kind] = since, count + 1
        if count < NOTES_LIMIT:
            self.record(note.kind, note.text, node=note.node, run=note.run)
            lines.append(note.text)
        for text in lines:
            self.line(text)
        return lines

    def saw(self, event: ev.Event | None, runs: Mapping[str, Run]) -> None:
        """The loop handled this."""
        match event:
            case ev.ExchangeEnded():
                self._exchange(event, runs.get(event.run))
            case ev.RunAttached():
                self._meters[event.run] = Meter()
                self._resumed[event.run] = 0
                again = " again" if event.started else ""
                self.record("attached", f"a training of {event.run} attached{again}", run=event.run)
            case ev.RunDetached():
                self.record("detached", f"the training of {event.run} detached", run=event.run)
                self._meters.pop(event.run, None)
                self._resumed.pop(event.run, None)
                self._drifts.pop(event.run, None)
            case ev.AddressesChanged():
                listed = ", ".join(map(str, event.addresses)) or "no address: no network"
                self.record("address", f"listens at {listed}")
            case _:
                pass

    def begun(self, begin: ev.Begin) -> None:
        """A run has its first weights."""
        how = (
            f"with the weights of {self._name_of(begin.donor)}" if begin.donor else begin.how.value
        )
        self.record("begun", f"{begin.run} begins ({how})", node=begin.donor, run=begin.run)

    def refused(self, kind: str) -> None:
        """Something was turned away: a certificate, a frame, numbers."""
        self._unsaid[kind] += 1
        now = trio.current_time()
        if now - self._refused_at.get(kind, -REFUSALS_S) < REFUSALS_S:
            return
        self._refused_at[kind] = now
        count, what = self._unsaid.pop(kind), REFUSALS.get(kind, kind)
        times = f" ({count} times)" if count > 1 else ""
        self.record("refused", f"refused {what}{times}")

    def _exchange(self, event: ev.ExchangeEnded, run: Run | None) -> None:
        name, took = self._name_of(event.peer), f"{1000 * event.duration_s:.0f} ms"
        count = run.counters.resumed if run else 0
        if count > self._resumed.get(event.run, count):
            took += ", resumed"
        self._resumed[event.run] = count
        match event.outcome:
            case ev.Outcome.COMPLETED if event.pull:
                text = f"{event.run}: took the weights of {name} in {took}"
            case ev.Outcome.COMPLETED:
                text = f"{event.run}: averaged with {name} in {took}"
            case ev.Outcome.REFUSED:
                text = f"{event.run}: {name} refused: {event.reason}"
            case ev.Outcome.INTERRUPTED:
                text = f"{event.run}: broken off with {name}, to be resumed: {event.reason}"
            case ev.Outcome.ABANDONED:
                text = f"{event.run}: failed with {name}: {event.reason}"
        if run is not None and event.outcome is ev.Outcome.COMPLETED:
            run.last_duration_s = event.duration_s
        self.record("exchange", text, node=event.peer, run=event.run)

    # -------------------------------------------------------------------------------------- runs

    def posted(self, run: Run) -> Figures:
        """A training handed over; returns what to tell the others of it."""
        now = trio.current_time() - self.began_at
        if self._meters.setdefault(run.name, Meter()).mark(_mark(run, now)):
            self._remember(run, now)
        rates, drift = self.rates(run), self._drifts.get(run.name)
        return Figures(
            step=run.step,
            loss=run.loss,
            drift=drift if drift is not None and math.isfinite(drift) else None,
            samples_s=max(0.0, rates.samples_s),
            out_bytes_s=rates.out_bytes_s,
            in_bytes_s=rates.in_bytes_s,
            load=self.load(),
            cpu=self.cpu(),
        )

    def _remember(self, run: Run, now: float) -> None:
        """Once a second: to know with how many others it is averaged means to look at all members."""
        drift = self._drifts[run.name] = run.drift(run.partners() + 1)
        if run.name not in self.curves:
            if len(self.curves) >= CURVES_KEPT:
                del self.curves[next(iter(self.curves))]
            self.curves[run.name] = Curve()
        self.curves[run.name].add(
            Point(
                uptime_s=now,
                step=run.step,
                loss=run.loss,
                drift=drift,
                samples=run.samples,
                bytes_sent=run.counters.bytes_sent,
                bytes_received=run.counters.bytes_received,
            )
        )

    def rates(self, run: Run) -> Rates:
        """How fast a run goes now."""
        meter = self._meters.get(run.name, Meter())
        return meter.rates(_mark(run, trio.current_time() - self.began_at))


REFUSALS: Final = {
    "certificate": "a connection without a certificate of this mesh",
    "tls": "a connection that does not speak TLS as we do",
    "timeout": "a connection that did not say who it is in time",
    "crowded": "a connection: too many are opening from there",
    "record": "a bulk record that is not genuine",
    "protocol": "a peer that broke a rule of the protocol",
    "schema": "an exchange: the schema differs",
    "non_finite": "numbers that are not finite",
}


def _mark(run: Run, now: float) -> Mark:
    return Mark(now, run.samples, run.counters.bytes_sent, run.counters.bytes_received)


def _page(kept: list[Happening], since: int, limit: int) -> list[Happening]:
    news = [happening for happening in kept if happening.sequence > since]
    return news[:limit] if since else news[-limit:]
