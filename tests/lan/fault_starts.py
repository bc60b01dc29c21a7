"""Faults of starting: many nodes at one moment, and machines whose clocks are years off.

Each function breaks one lab and notes what it found.
"""

import datetime
from functools import partial
from pathlib import Path
from typing import Final

from tests.lan.faulty_lan import FaultyLab, set_wall_clock
from tests.lan.findings import BUSY_S, Findings, Size, all_alive
from tests.lan.lab import Machine
from tests.lan.still import StillTraining, agree, compare

EQUAL_S: Final = 5.0
FOUND_S: Final = 3.0
EACH_S: Final = 1.5
"""A node's share of the time until all are up: 0.6 s of CPU, on cores that others use as well."""

YEARS: Final = (None, 2015, 2031)
"""By whose wall clock each of three machines lives; None: the true one."""

LEARNED_S: Final = 90.0


def together(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """All nodes start at once."""
    lab.found_mesh(*lab.machines)
    for machine in lab.machines:
        machine.up()
    count = len(lab.machines)
    waiting = list(lab.machines)

    def all_up() -> bool:
        waiting[:] = [machine for machine in waiting if not machine.running]
        return not waiting

    findings.come(f"{count} nodes up", all_up, within_s=BUSY_S + EACH_S * count)
    findings.within(
        f"the tables of {count} nodes are equal, from the last one's start on",
        lambda: _equal(lab.machines),
        EQUAL_S,
    )
    tables = [_table(machine) for machine in lab.machines]
    alive = [sum(state == "alive" for _, state in table.values()) for table in tables]
    findings.check(
        "rows that are alive in each table",
        set(alive) == {count},
        f"{min(alive)} to {max(alive)}",
        f"{count}",
    )


def _table(machine: Machine) -> dict[str, tuple[str, str]]:
    """Node id -> incarnation and state, this machine's own row included."""
    rows = {
        node: (str(peer["incarnation"]), str(peer["state"]))
        for node, peer in machine.peers().items()
    }
    own = machine.status()["node"]
    return {**rows, own["id"]: (own["incarnation"], "alive")}


def _equal(machines: list[Machine]) -> bool:
    first = _table(machines[0])
    if len(first) != len(machines):
        return False
    return all(_table(machine) == first for machine in machines[1:])


def clocks(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """One machine lives in 2015 and one in five years: a mesh is made, joined, and trains."""
    now = datetime.datetime.now(datetime.UTC)
    for machine, year in zip(lab.machines, YEARS, strict=True):
        if year is not None:
            years = f"{year}" if year < now.year else f"{now.year + 5}"
            wanted = now.replace(year=int(years), month=6, day=15)
            set_wall_clock(machine, (wanted - now).days)
            shown = machine.call("date", "+%Y").strip()
            findings.check(f"the year at {machine.name}", shown == years, shown, years)
    # The one in 2015 makes the mesh: its certificates begin before those of the others.
    past = lab.machines[1]
    lab.make_mesh(past, *(machine for machine in lab.machines if machine is not past))
    for machine in lab.machines:
        machine.up()
    findings.come("their nodes answer", lambda: all(machine.running for machine in lab.machines))
    findings.within("one mesh", partial(all_alive, lab.machines), FOUND_S)
    if size is Size.FULL:
        _train(lab, findings)
        return
    trainings = [
        StillTraining(machine, float(value), run="still")
        for value, machine in enumerate(lab.machines)
    ]

    findings.come("replicas agree", partial(agree, trainings))
    compare(findings, "their mean", trainings, sum(range(len(trainings))) / len(trainings))
    for training in trainings:
        training.close()


def _train(lab: FaultyLab, findings: Findings) -> None:
    """A real training on each node. They keep the true time: under libfaketime 0.9.10 CPython's
    time.sleep() fails (EINVAL from clock_nanosleep), while nodes wait in epoll."""
    script = str(Path(__file__).parent / "train.py")
    started = []
    for block, machine in enumerate(lab.machines):
        machine.environment.clear()
        started.append(machine.start("run", script, str(block), str(machine.directory)))

    def learned() -> bool:
        return all((machine.directory / "learned").exists() for machine in lab.machines)

    findings.within("three trainings learn what none knows alone", learned, LEARNED_S)
    for machine in lab.machines:
        (machine.directory / "rest").touch()
        (machine.directory / "enough").touch()
    findings.come("they end", lambda: not any(program.running for program in started), LEARNED_S)
    codes = [program.process.returncode for program in started]
    findings.check("their exit codes", codes == [0, 0, 0], f"{codes}", "[0, 0, 0]")
