"""What a fault showed: each promise beside what was measured, so that tests and tables read alike.

A finding's trip: within() or check() in a fault -> Findings -> a test asserts `failed == []`, or
`make faults` prints the lines. A promise that is kept late, or never, is a finding that is not ok,
and the fault goes on; where nothing after it would mean anything, come() raises Never.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import permutations
from typing import Final

from tests.lan.lab import GRACE_S, POLL_S, Machine

BUSY_S: Final = 20.0
"""For what nobody promised a time: this machine may be busy with other tests."""


class Size(Enum):
    """How long a fault lasts: short enough for `make test`, or as the table says."""

    SHORT = "short"
    FULL = "full"


class Never(Exception):
    """Something that has to come did not, long after its time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One promise and what was seen of it, both with their units."""

    what: str
    promised: str
    measured: str
    ok: bool
    size: float = 0.0
    """what `measured` says as a number, where findings of one name can be compared"""

    def __str__(self) -> str:
        return f"{self.what}: {self.measured}, promised {self.promised}"


@dataclass(slots=True)
class Findings:
    """All findings of one fault, in order."""

    all: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [str(finding) for finding in self.all if not finding.ok]

    def check(
        self, what: str, ok: bool, measured: str, promised: str, *, size: float = 0.0
    ) -> None:
        self.all.append(Finding(what=what, promised=promised, measured=measured, ok=ok, size=size))

    def worst(self) -> list[Finding]:
        """One finding for each name, in order: of several the one furthest from its promise."""
        names: dict[str, list[Finding]] = {}
        for finding in self.all:
            names.setdefault(finding.what, []).append(finding)
        worst = []
        for found in names.values():
            chosen = max(found, key=lambda finding: (not finding.ok, finding.size))
            if len(found) > 1:
                bad = sum(not finding.ok for finding in found)
                note = f" (worst of {len(found)}, {bad} not kept)"
                chosen = replace(chosen, measured=chosen.measured + note)
            worst.append(chosen)
        return worst

    def within(
        self,
        what: str,
        condition: Callable[[], object],
        within_s: float,
        *,
        since: float | None = None,
    ) -> bool:
        """A promise: condition() comes `within_s` after `since` (default: now). False: never."""
        start = time.monotonic() if since is None else since
        came = _wait(condition, start, within_s)
        took_s = time.monotonic() - start
        measured = f"{took_s:.2f} s" if came else f"never in {took_s:.1f} s"
        ok = came and took_s <= within_s
        self.check(what, ok, measured, f"{within_s:g} s", size=took_s)
        return came

    def come(self, what: str, condition: Callable[[], object], within_s: float = BUSY_S) -> None:
        """For what has to come, though nobody promised when. Raises Never."""
        start = time.monotonic()
        if not _wait(condition, start, within_s):
            took_s = time.monotonic() - start
            self.check(what, False, f"never in {took_s:.1f} s", "to come")
            raise Never(what)


def _wait(condition: Callable[[], object], start: float, within_s: float) -> bool:
    """Looks for GRACE_S longer than allowed, so that a failure tells slow from never."""
    while not condition():
        if time.monotonic() - start > within_s + GRACE_S:
            return False
        time.sleep(POLL_S)
    return True


def during(
    seconds: float,
    look: Callable[[], object],
    *,
    pause_s: float = POLL_S,
    enough: Callable[[], bool] = lambda: True,
    at_most_s: float = 0.0,
) -> None:
    """Looks again and again while a fault lasts: so long, then until it is `enough`, at most
    `at_most_s` in all."""
    start = time.monotonic()
    while (lasted := time.monotonic() - start) < seconds or (lasted < at_most_s and not enough()):
        look()
        time.sleep(pause_s)


# ------------------------------------------------------------------------ what tables say of others


def states(asked: Machine) -> dict[str, str]:
    """Node id -> state, of all others that this machine lists."""
    return {node: str(peer["state"]) for node, peer in asked.peers().items()}


def all_alive(machines: Sequence[Machine]) -> bool:
    """Whether every one of them lists every other as alive."""
    return all(one.lists(other, "alive") for one, other in permutations(machines, 2))


def all_list(askers: Sequence[Machine], about: Machine, state: str | None) -> bool:
    return all(asked.lists(about, state) for asked in askers)


@dataclass(slots=True)
class DeathWatch:
    """Remembers who called whom dead, in tables as often as look() is called, and in logs always."""

    machines: Sequence[Machine]
    """those that are asked; one that is stopped cannot answer"""
    about: Sequence[Machine]
    seen: set[str] = field(default_factory=set)

    def look(self) -> None:
        names = {other.node: other.name for other in self.about}
        for machine in self.machines:
            dead = [node for node, state in states(machine).items() if state == "dead"]
            self.seen |= {f"{names[node]} at {machine.name}" for node in dead}

    def verdicts(self) -> list[str]:
        """`X at Y`: the node of Y said that X is dead."""
        for machine in self.machines:
            said = "".join(program.log.read_text() for program in machine.programs)
            for other in self.about:
                if f"{other.name} ({other.node[:8]}) is dead" in said:
                    self.seen.add(f"{other.name} at {machine.name}")
        return sorted(self.seen)
