"""Three machines on one LAN: what their users see when nodes start, fail, leave and come back.

The deadlines are the product's promises; until() prints what it measured (`pytest -rP` shows it).
"""

import json
import shutil
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.core.messages import PROTOCOL
from tests.lan.lab import PORT, Lab, Machine, until

HERE = Path(__file__).parent

FOUND_S = 3.0
"""From the start of a node, or from its first address, until all list each other."""

DEAD_S = 1.0
LEFT_S = 1.0

BUSY_S = 15.0
"""For what nobody promised a time: this machine may be busy with other tests."""

LEARNED_S = 60.0

SOLUTION = np.append(np.linspace(-1.0, 1.0, 12), 0.0)
"""The weights and the bias that the data of train.py were made with."""


def everybody_lists_everybody(*machines: Machine) -> bool:
    return all(one.lists(other, "alive") for one, other in permutations(machines, 2))


def announcements(machine: Machine, count: int, within_s: float) -> dict[str, dict[str, Any]]:
    """What an mDNS client of another make sees from there: see announced.py."""
    command = [sys.executable, "-I", str(HERE / "announced.py"), str(count), str(within_s)]
    found: dict[str, dict[str, Any]] = json.loads(machine.call(*command))
    return found


def test_three_machines_find_each_other_and_see_one_die_and_return(lab: Lab) -> None:
    one, two, three = lab.machines
    lab.make_mesh(one, two, three)
    one.up()
    two.up()
    until("two nodes are up", lambda: one.running and two.running, within_s=BUSY_S)
    last = three.up()
    until(
        "three machines find each other without an address",
        lambda: everybody_lists_everybody(one, two, three),
        within_s=FOUND_S,
        since=last.started_at,
    )
    for machine in lab.machines:
        others = {other.node for other in lab.machines if other is not machine}
        listed = machine.peers_by_command()
        assert {peer["id"] for peer in listed.values() if peer["state"] == "alive"} == others
    before = one.peers()[three.node]["incarnation"]

    until(
        "a killed node is dead to the others",
        lambda: one.lists(three, "dead") and two.lists(three, "dead"),
        within_s=DEAD_S,
        since=last.kill(),
    )
    until(
        "a node that starts again after a kill is back",
        lambda: everybody_lists_everybody(one, two, three),
        within_s=FOUND_S,
        since=three.up().started_at,
    )
    for machine in (one, two):
        assert int(machine.peers()[three.node]["incarnation"]) > int(before)


def test_three_machines_train_one_model_of_what_none_of_them_knows_alone(lab: Lab) -> None:
    lab.make_mesh(*lab.machines)
    script = str(HERE / "train.py")
    started = [
        machine.start("run", script, str(block), str(machine.directory))
        for block, machine in enumerate(lab.machines)
    ]
    until(
        "three machines that start a training find each other",
        lambda: everybody_lists_everybody(*lab.machines),
        within_s=BUSY_S,  # three that import torch at once on one machine's cores
        since=started[-1].started_at,
    )

    def learned() -> bool:
        assert all(program.running for program in started), "a training ended"
        return all((machine.directory / "learned").exists() for machine in lab.machines)

    until("three machines learn one model", learned, within_s=LEARNED_S)
    for machine in lab.machines:
        (machine.directory / "rest").touch()

    def averages() -> list[np.ndarray]:
        files = [machine.directory / "weights.npy" for machine in lab.machines]
        return [np.load(file) for file in files if file.exists()]

    def agreed() -> bool:
        found = averages()
        return len(found) == len(lab.machines) and np.ptp(found, axis=0).max() < 1e-5

    until("three machines at rest agree", agreed, within_s=BUSY_S)
    for weights in averages():
        np.testing.assert_allclose(weights, SOLUTION, atol=0.05)

    for machine in lab.machines:
        (machine.directory / "enough").touch()
    until(
        "the trainings and their nodes end",
        lambda: not any(program.running for program in started),
        within_s=BUSY_S,
    )
    assert [program.process.returncode for program in started] == [0, 0, 0]


@pytest.mark.skipif(shutil.which("nft") is None, reason="no `nft` here: install nftables")
def test_where_multicast_is_dropped_one_given_address_is_enough(lab: Lab) -> None:
    one, two, three = lab.machines
    lab.make_mesh(one, two, three)
    lab.drop_multicast()
    one.up()
    two.up("--peer", one.address)
    until("two nodes are up", lambda: one.running and two.running, within_s=BUSY_S)
    last = three.up("--peer", one.address)
    until(
        "three machines find each other through one that is given",
        lambda: everybody_lists_everybody(one, two, three),
        within_s=FOUND_S,
        since=last.started_at,
    )
    until(
        "two machines that one introduced talk to each other",
        lambda: all(
            machine.peers()[other.node]["rtt_s"] is not None
            for machine, other in permutations(lab.machines, 2)
        ),
        within_s=BUSY_S,
    )
    ways = {peer["via"] for machine in lab.machines for peer in machine.peers().values()}
    assert "mdns" not in ways
    assert lab.dropped_packets() > 0
    answered = announcements(one, count=2, within_s=1.0)
    assert len(answered) == 1, "one hears its own announcement, and no other"


def test_a_node_of_another_mesh_is_never_listed(lab: Lab) -> None:
    one, two, stranger = lab.machines
    lab.make_mesh(one, two)
    lab.make_mesh(stranger)
    started = [stranger.up("--peer", one.address), one.up()]
    until("two nodes are up", lambda: one.running and stranger.running, within_s=BUSY_S)
    started.append(two.up("--peer", stranger.address))
    until(
        "two machines find each other beside a stranger",
        lambda: everybody_lists_everybody(one, two),
        within_s=FOUND_S,
        since=started[-1].started_at,
    )
    assert len(announcements(two, count=3, within_s=BUSY_S)) == 3
    until(
        "both sides turn the other away",
        lambda: all(
            asked.status()["refused"] and "another mesh" in asking.status()["health"][0]
            for asked, asking in ((one, stranger), (stranger, two))
        ),
        within_s=BUSY_S,
    )
    assert one.peers().keys() == {two.node}
    assert two.peers().keys() == {one.node}
    assert stranger.peers() == {}
    assert all(program.running for program in started)
    assert "Traceback" not in lab.logs()


@pytest.mark.parametrize("flags", [(), ("--interface", "eth0")], ids=["any", "named"])
def test_a_node_that_starts_before_its_interface_has_an_address(
    lab: Lab, flags: tuple[str, ...]
) -> None:
    one, late, _ = lab.machines
    lab.make_mesh(one, late)
    late.take_address_away()
    one.up()
    late.up(*flags)
    until(
        "a node runs for 2 s without an address",
        lambda: late.status().get("node", {}).get("uptime_s", 0.0) >= 2.0 and one.running,
        within_s=BUSY_S,
    )
    assert "no network address" in late.status()["health"][0]
    assert one.peers() == late.peers() == {}
    until(
        "a node that gets an address is found",
        lambda: everybody_lists_everybody(one, late),
        within_s=FOUND_S,
        since=late.give_address(),
    )


def test_a_node_that_is_stopped_politely_vanishes(lab: Lab) -> None:
    one, two, three = lab.machines
    lab.make_mesh(one, two, three)
    leaving = [machine.up() for machine in lab.machines][-1]
    until(
        "three machines find each other",
        lambda: everybody_lists_everybody(one, two, three),
        within_s=BUSY_S,
    )
    until(
        "a node that leaves is listed no more",
        lambda: one.lists(three, None) and two.lists(three, None),
        within_s=LEFT_S,
        since=leaving.terminate(),
    )
    assert one.lists(two, "alive")
    assert leaving.process.wait(BUSY_S) == 0
    assert "left" in one.programs[0].said()


def test_the_announcement_tells_strangers_nothing_but_where_to_knock(lab: Lab) -> None:
    one, two, stranger = lab.machines
    token = lab.make_mesh(one, two)
    one.up()
    two.up()
    until("two nodes are up", lambda: one.running and two.running, within_s=BUSY_S)
    found = announcements(stranger, count=2, within_s=BUSY_S)
    tags = set()
    for machine in (one, two):
        short = machine.node[:16]
        entry = found.pop(f"{short}._gossipmesh._tcp.local")
        assert entry["host"] == f"{short}.local"
        assert entry["port"] == PORT
        assert entry["addresses"] == [machine.host]
        tag = entry["txt"].pop("m")
        assert len(bytes.fromhex(tag)) == 8
        tags.add(tag)
        assert entry["txt"] == {"txtvers": "1", "id": short, "v": str(PROTOCOL)}
        packet = bytes.fromhex(entry["packet"]).lower()
        for secret in (machine.name, machine.status()["mesh"]["id"], token.removeprefix("mesh1-")):
            assert secret.encode().lower() not in packet
    assert found == {}
    assert len(tags) == 2, "equal tags would tell that these nodes belong together"
