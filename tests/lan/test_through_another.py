"""A question to a node that this machine cannot reach: a switch that keeps two of three apart."""

import json

from tests.lan.lab import until


def test_a_machine_asks_another_through_a_third(lab):
    """`mesh status -N machine3` on machine1, whose only way there is machine2."""
    one, two, three = lab.machines
    lab.nft("add table bridge apart")
    lab.nft("add chain bridge apart forward { type filter hook forward priority 0; }")
    for near, far in (("port0", "port2"), ("port2", "port0")):
        lab.nft(f"add rule bridge apart forward iifname {near} oifname {far} drop")
    lab.make_mesh(one, two, three)
    for machine in lab.machines:
        machine.up("--no-mdns", *(() if machine is two else ("--peer", two.address)))
    until("one knows three", lambda: one.lists(three, "alive"), within_s=10)
    assert one.peers()[three.node]["via"] is None, "there is no connection between the two"

    status = json.loads(one.mesh("status", "-N", "machine3", "--json"))
    assert (status["node"]["id"], status["node"]["name"]) == (three.node, "machine3")
    assert status["node"]["addresses"][0] == three.address
    assert ", through 1 other " in one.mesh("ping", "machine3", "-c", "1")
