"""Faults of the network: partitions, loss, addresses that come and go, docker's bridge.

Each function breaks one lab and notes what it found. What a partition must not lose is measured
with trainings that stand still: the mean of their replicas is a constant, fragment by fragment.
"""

import time
from functools import partial
from typing import Final

from mesh.core.messages import FRAGMENT_ENTRIES
from tests.lan.faulty_lan import FaultyLab, connections, hosts, install_docker, move, set_link
from tests.lan.findings import BUSY_S, DeathWatch, Findings, Size, all_alive, during
from tests.lan.still import StillTraining, agree, compare, exchanges, turn

VISIBLE_S: Final = 3.0
DEAD_S: Final = 1.0
RECONNECTED_S: Final = 10.0
HEALED_S: Final = 12.0

FRAGMENTS: Final = 12
IN_FLIGHT_BYTES: Final = 2 * FRAGMENT_ENTRIES * 4
"""After this much, exchanges have begun and are far from their end."""

TURN_S: Final = 0.5
"""Between two exchanges of a node: five of them on two cores leave room for the test."""

CUT_S: Final = 20.0
LOSSY_S: Final = 60.0
"""The short forms last this long at most: chance decides when the first exchange comes through."""

SMALL: Final = 4096
"""Entries of a model for lossy lines: 16 kB are a dozen packets, and any may need repeating."""


def partition(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """Five machines fall into three and two, with exchanges in flight between them, and heal."""
    seconds = 20.0 if size is Size.FULL else 7.0
    lab.found_mesh(*lab.machines)
    for machine in lab.machines:
        machine.up()
    findings.come("five nodes up", partial(all_alive, lab.machines))
    entries = FRAGMENTS * FRAGMENT_ENTRIES
    trainings = [
        StillTraining(machine, float(value), run="still", entries=entries)
        for value, machine in enumerate(lab.machines)
    ]
    mean = sum(range(len(trainings))) / len(trainings)
    sides = {"three": trainings[:3], "two": trainings[3:]}
    findings.come("all can exchange", lambda: all(t.figures()["partners"] == 4 for t in trainings))

    def sent() -> int:
        return sum(int(training.figures()["bytes_sent"]) for training in trainings)

    before = sent()
    for training in trainings:
        training.post()
    findings.come("exchanges are in flight", lambda: sent() > before + IN_FLIGHT_BYTES)
    lab.cut(lab.machines[:3], lab.machines[3:])
    at = time.monotonic()
    done = {name: exchanges(side, "completed") for name, side in sides.items()}

    def went_on(name: str) -> int:
        return exchanges(sides[name], "completed") - done[name]

    # Whoever is caught in an exchange with the other side has to find it silent first.
    during(
        seconds - (time.monotonic() - at),
        partial(turn, trainings),
        pause_s=TURN_S,
        enough=lambda: all(went_on(name) > 0 for name in sides),
        at_most_s=CUT_S,
    )
    seconds = time.monotonic() - at
    for name in sides:
        findings.check(
            f"exchanges completed on the side of {name} while cut for {seconds:.0f} s",
            went_on(name) > 0,
            f"{went_on(name)}",
            "at least 1",
        )
    lab.heal()
    findings.within("one table again", partial(all_alive, lab.machines), HEALED_S)

    findings.come("replicas agree", partial(agree, trainings), within_s=60.0)
    resumed = exchanges(trainings, "resumed")
    findings.check("exchanges resumed", resumed > 0, f"{resumed}", "at least 1")
    compare(findings, "the mean of each fragment, after all", trainings, mean)
    for training in trainings:
        training.close()


def loss(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """The switch drops packets by chance."""
    lab.found_mesh(*lab.machines)
    for machine in lab.machines:
        machine.up()
    findings.come("three nodes up", partial(all_alive, lab.machines))
    trainings = [
        StillTraining(machine, float(value), run="still", entries=SMALL)
        for value, machine in enumerate(lab.machines)
    ]
    watch = DeathWatch(lab.machines, lab.machines)

    def look() -> None:
        turn(trainings)
        watch.look()

    for percent, seconds in ((10, 300.0), (30, 300.0)) if size is Size.FULL else ((30, 12.0),):
        watch.seen.clear()
        earlier = set(watch.verdicts())
        done = exchanges(trainings, "completed")
        lab.lose(percent)
        wanted = 3 if size is Size.SHORT else seconds / 4
        during(
            seconds,
            look,
            pause_s=TURN_S,
            enough=lambda: exchanges(trainings, "completed") - done >= wanted,  # noqa: B023
            at_most_s=LOSSY_S if size is Size.SHORT else seconds,
        )
        lab.heal()
        verdicts = [verdict for verdict in watch.verdicts() if verdict not in earlier]
        findings.check(
            f"{percent} % loss for {seconds:g} s: called dead",
            not verdicts,
            ", ".join(verdicts) or "nobody",
            "nobody",
        )
        completed = exchanges(trainings, "completed") - done
        findings.check(
            f"{percent} % loss for {seconds:g} s: exchanges completed",
            completed >= wanted,
            f"{completed}",
            f"at least {wanted:.0f}",
        )
        findings.come("all alive again", partial(all_alive, lab.machines), within_s=BUSY_S)
    for training in trainings:
        training.close()


def addresses(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """A machine has no address, then one, then another, then no link for a while."""
    *others, late = lab.machines
    lab.found_mesh(*lab.machines)
    late.take_address_away()
    for machine in lab.machines:
        machine.up()
    findings.come("the others up", partial(all_alive, others))
    findings.come("a node runs without an address", lambda: late.running)
    listed = len(late.peers())
    findings.check("peers that it lists then", listed == 0, f"{listed}", "0")
    everybody_alive = partial(all_alive, lab.machines)
    at = late.give_address()
    findings.within("visible, from its first address on", everybody_alive, VISIBLE_S, since=at)

    def in_touch() -> bool:
        """Alive at all, over connections to where it is now, and heard on them."""
        where = hosts(late)
        heard = [other.peers().get(late.node, {}).get("seen_s") for other in others]
        return (
            all_alive(lab.machines)
            and all(connections(other, where) for other in others)
            and all(seen_s is not None and seen_s < time.monotonic() - at for seen_s in heard)
        )

    findings.come("in touch", in_touch)
    at = move(late, "10.77.0.77")
    late_v4 = {late.host}
    findings.within(
        "in touch again after another address",
        lambda: in_touch() and all(connections(other, late_v4) for other in others),
        RECONNECTED_S,
        since=at,
    )
    set_link(late, "down")
    down_at = time.monotonic()
    during(5.0 - (time.monotonic() - down_at), lambda: None)
    set_link(late, "up")
    at = time.monotonic()
    findings.within("in touch again after 5 s without a link", in_touch, RECONNECTED_S, since=at)


def docker(lab: FaultyLab, size: Size, findings: Findings) -> None:
    """Every machine has the same second address, behind which each finds only itself."""
    for machine in lab.machines:
        install_docker(machine)
    lab.found_mesh(*lab.machines)
    # By itself a node ignores docker's bridge (tests/lan/test_doctor.py).
    both = ("--interface", "eth0", "--interface", "docker0")
    for machine in lab.machines:
        machine.up(*both)
    findings.come("their nodes answer", lambda: all(machine.running for machine in lab.machines))
    findings.within("one mesh", partial(all_alive, lab.machines), VISIBLE_S)
    announced = [machine.status()["node"]["addresses"] for machine in lab.machines]
    shared = sum(any(address.startswith("172.17.0.1:") for address in own) for own in announced)
    findings.check(
        "nodes that announce docker's address too",
        shared == len(lab.machines),
        f"{shared}",
        f"{len(lab.machines)}",
    )
    during(30.0 if size is Size.FULL else 0.0, lambda: None)
    first, second = lab.machines
    at = second.programs[0].kill()
    # Now the one address of the other that still answers is the first one's own.
    findings.within("killed: dead", lambda: first.lists(second, "dead"), DEAD_S, since=at)
    during(1.0, lambda: None)
    findings.check(
        "peers that the first lists while it looks for the dead",
        list(first.peers()) == [second.node],
        f"{len(first.peers())}, itself {'too' if first.node in first.peers() else 'not'}",
        "1, itself not",
    )
    program = second.up(*both)
    findings.within(
        "alive again", partial(all_alive, lab.machines), VISIBLE_S, since=program.started_at
    )
    tables = [(machine, machine.peers()) for machine in lab.machines]
    selves = [machine.name for machine, listed in tables if machine.node in listed]
    findings.check("nodes that list themselves", not selves, ", ".join(selves) or "0", "0")
    rows = [len(listed) for _, listed in tables]
    findings.check("peers in each table", rows == [1, 1], f"{rows}", "[1, 1]")
