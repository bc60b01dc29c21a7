"""Faults of nodes: killed in the middle of an exchange, stopped, gone without a word, copied.

Each function breaks one lab and notes what it found. Randomness is seeded; what the kernel and the
scheduler do is not, which is why the full forms repeat.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Final

import numpy as np

from mesh.core.messages import FRAGMENT_ENTRIES
from tests.lan.faulty_lan import FaultyLab, connections, descriptors, hosts
from tests.lan.findings import (
    BUSY_S,
    DeathWatch,
    Findings,
    Never,
    Size,
    all_alive,
    all_list,
    during,
)
from tests.lan.still import StillTraining, agree, compare, exchanges, turn

DEAD_S: Final = 1.0
BACK_S: Final = 3.0
CLOSED_S: Final = 6.0
ENDED_S: Final = 10.0

FRAGMENTS: Final = 16
"""16 MiB: an exchange lasts long enough to kill somebody in the middle of it."""

MIDDLE: Final = (0.2, 0.7)
"""A kill falls after this part of the bytes; the rest is for the time that the kill takes."""

QUIET_S: Final = 0.3
"""A survivor that did not move for this long has used up what the dead had sent."""


def killed(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """kill -9 in the middle of an exchange, of its initiator and of its responder in turn."""
    lab.found_mesh(*lab.machines)
    for machine in lab.machines:
        machine.up()
    findings.come("three nodes up", partial(all_alive, lab.machines))
    rounds = 20 if size is Size.FULL else 2
    halves = sum(_killed_once(lab, number, findings) for number in range(rounds))
    findings.check(
        "kills that fell into the middle of an exchange",
        halves > 0,
        f"{halves} of {rounds}",
        "at least 1",
    )


def _killed_once(lab: FaultyLab, number: int, findings: Findings) -> bool:
    """One round: survivor, victim and bystander hold 0, 1 and 5 everywhere. Returns whether the
    kill fell into the middle.

    What is promised of a fragment at the survivor: it took its half of the difference, or nothing;
    and from then on the dead node's share is out of the game, so the survivors' sum stays.
    """
    survivor, victim, bystander = lab.machines
    run, entries = f"round-{number}", FRAGMENTS * FRAGMENT_ENTRIES
    asks = "victim" if number % 2 else "survivor"
    label = f"{'initiator' if number % 2 else 'responder'} killed"
    ours = StillTraining(survivor, 0.0, run=run, entries=entries)
    lost = StillTraining(victim, 1.0, run=run, entries=entries)
    pair = [ours, lost]
    findings.come(
        "the two know each other's run", lambda: all(t.figures()["partners"] for t in pair)
    )
    (lost if asks == "victim" else ours).post()
    threshold = Random(number).uniform(*MIDDLE) * entries * 4
    moved = "bytes_sent" if asks == "survivor" else "bytes_received"
    deadline = time.monotonic() + BUSY_S
    while ours.figures()[moved] < threshold and time.monotonic() < deadline:
        time.sleep(0.001)  # a kill that comes much later finds the exchange over
    at = victim.programs[-1].kill()
    lost.close()
    findings.within(
        f"{label}: dead at all others",
        lambda: all_list([survivor, bystander], victim, "dead"),
        DEAD_S,
        since=at,
    )
    left = _settled(ours)
    applied = int(np.count_nonzero(left))
    findings.check(
        f"{label}: each fragment of the survivor moved once or not at all",
        ours.even and set(left) <= {0.0, 0.5},
        f"{applied} of {FRAGMENTS} moved, values {sorted(set(left.round(4).tolist()))}",
        "values 0.0 and 0.5 only",
    )
    other = StillTraining(bystander, 5.0, run=run, entries=entries)
    _expect(findings, f"{label}: the survivors' mean", [ours, other], (left + 5.0) / 2)
    program = victim.up()
    findings.within(
        f"{label}: alive again at all",
        partial(all_alive, lab.machines),
        BACK_S,
        since=program.started_at,
    )
    back = StillTraining(victim, 1.0, run=run, entries=entries)
    everybody = [ours, other, back]
    _expect(findings, f"{label}: the mean with the one that is back", everybody, (left + 6.0) / 3)
    for training in everybody:
        training.close()
    return 0 < applied < FRAGMENTS


def _settled(training: StillTraining) -> np.ndarray:
    """The replica once nothing of a broken exchange is on its way to it any more."""
    before, since = training.fresh().copy(), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        time.sleep(QUIET_S / 3)
        if not np.array_equal(training.fresh(), before):
            before, since = training.means.copy(), time.monotonic()
    return before


def _expect(
    findings: Findings, what: str, trainings: Sequence[StillTraining], mean: np.ndarray
) -> None:
    """Lets replicas meet until they agree, then compares them with the mean that must hold."""
    findings.come(f"{what}: replicas agree", partial(agree, trainings))
    compare(findings, what, trainings, mean)


def stopped(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """SIGSTOP for less than a death takes, then for longer."""
    one, two, three = lab.machines
    lab.found_mesh(*lab.machines)
    for machine in lab.machines:
        machine.up()
    findings.come("three nodes up", partial(all_alive, lab.machines))
    watch = DeathWatch([one, two], lab.machines)
    program = three.programs[0]

    program.send(signal.SIGSTOP)
    during(3.0, watch.look)
    woke = program.send(signal.SIGCONT)
    during(1.0, watch.look)  # a verdict may come late, from what was unanswered meanwhile
    everybody = DeathWatch(lab.machines, lab.machines, watch.seen)
    verdicts = everybody.verdicts()
    findings.check(
        "stopped for 3 s: called dead", not verdicts, ", ".join(verdicts) or "nobody", "nobody"
    )
    findings.within("stopped for 3 s: alive at all", partial(all_alive, lab.machines), BACK_S)

    long_s = 30.0 if size is Size.FULL else 12.0  # it has a second chance: 9 s at most
    at = program.send(signal.SIGSTOP)
    findings.within(
        f"stopped for {long_s:g} s: dead at all others",
        lambda: all_list([one, two], three, "dead"),
        long_s,
        since=at,
    )
    during(long_s - (time.monotonic() - at), lambda: None)
    woke = program.send(signal.SIGCONT)
    findings.within(
        f"stopped for {long_s:g} s: alive at all after SIGCONT",
        partial(all_alive, lab.machines),
        BACK_S,
        since=woke,
    )
    wrong = [verdict for verdict in everybody.verdicts() if not verdict.startswith(three.name)]
    findings.check(
        "others called dead, by it or by each other", not wrong, ", ".join(wrong) or "0", "0"
    )


def half_open(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """A machine with connections of both kinds dies, and nothing says so to the others."""
    one, two, dead = lab.machines
    survivors = [one, two]
    lab.found_mesh(*lab.machines)
    for machine in survivors:
        machine.up()
    findings.come("two nodes up", partial(all_alive, survivors))
    trainings = [StillTraining(machine, 0.0, run="still") for machine in survivors]

    def exchanged(*those: StillTraining) -> bool:
        turn(trainings)
        return all(exchanges([t], "completed") and exchanges([t], "answered") for t in those)

    findings.come("two nodes exchange", lambda: exchanged(*trainings))
    before = {machine.name: descriptors(machine.programs[0]) for machine in survivors}
    dead.up()
    findings.come("three nodes up", partial(all_alive, lab.machines))
    trainings.append(StillTraining(dead, 1.0, run="still"))
    findings.come("the third exchanges", lambda: exchanged(trainings[-1]))
    where = hosts(dead)
    findings.check(
        "connections to it at each of the others before",
        all(connections(machine, where) for machine in survivors),
        ", ".join(str(connections(machine, where)) for machine in survivors),
        "at least 1",
    )
    lab.silence(dead)
    at = dead.programs[0].kill()
    trainings.pop().close()

    def closed() -> bool:
        turn(trainings)
        return not any(connections(machine, where) for machine in survivors)

    findings.within("connections to it closed at all others", closed, CLOSED_S, since=at)
    findings.check(
        "connections to it at each of the others after",
        not any(left := [connections(machine, where) for machine in survivors]),
        ", ".join(map(str, left)),
        "0",
    )

    fewest = dict.fromkeys(before, 1 << 20)

    def as_before() -> bool:
        """A dial of the dead holds one more for a moment, so the fewest of several looks counts."""
        turn(trainings)
        for machine in survivors:
            found = descriptors(machine.programs[0])
            fewest[machine.name] = min(fewest[machine.name], found)
        return all(fewest[name] <= before[name] for name in before)

    with contextlib.suppress(Never):
        findings.come("as few descriptors as before", as_before)
    findings.check(
        "descriptors at each of the others, as before it came",
        as_before(),
        ", ".join(map(str, fewest.values())),
        "at most " + ", ".join(map(str, before.values())),
    )
    for training in trainings:
        training.close()


def copied(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """A second machine starts from a copy of the first one's state directory."""
    one, copy, onlooker = lab.machines
    lab.found_mesh(one, onlooker)
    one.up()
    onlooker.up()
    findings.come("two nodes up", lambda: all_alive([one, onlooker]))
    alive = shutil.ignore_patterns("*.sock", "lock", "node.json")
    shutil.copytree(one.state, copy.state, ignore=alive)
    os.chmod(copy.state, 0o700)
    late = copy.up()
    first = one.programs[0]
    findings.within(
        "the later one of two nodes with one identity ends",
        lambda: not late.running or not first.running,
        ENDED_S,
        since=late.started_at,
    )
    code, said = late.process.poll(), late.said()
    findings.check("its exit code", code not in (None, 0), f"{code}", "not 0")
    clear = "identity" in said and re.search(r"mesh (join|leave|init)|--state", said)
    last = said.strip().splitlines()[-1:] or ["nothing"]
    findings.check(
        "its log says that another node has this identity, and what to do",
        bool(clear),
        repr(last[0]),
        "'identity' and a command",
    )
    seen_at = onlooker.peers()[one.node]["addresses"]
    findings.check(
        "the first goes on, alive at the onlooker at its own address",
        first.running and all_alive([one, onlooker]) and one.address in seen_at,
        f"{onlooker.peers()[one.node]['state']} at {', '.join(seen_at)}",
        f"alive at {one.address}",
    )
    itself = one.node in one.peers()
    findings.check("the first lists itself as a peer", not itself, f"{itself}", "False")
