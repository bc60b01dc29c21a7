"""The checks of `mesh doctor`, each with its cause: files and limits made so, networks as facts.

What real networks do is in tests/lan/test_doctor.py.
"""

import contextlib
import json
import os
import resource
import shutil
import socket
import threading
import time
from dataclasses import replace
from random import Random

import jsonschema
import pytest

import mesh
from mesh import diagnosis, identity
from mesh.core.address import Address
from mesh.net import survey
from mesh.surroundings import Announcement, Echo, Interface, Knock, Outcome, Surroundings
from nodes import doctor, machine_checks, peer_clocks
from nodes.cli import main
from nodes.findings import Finding, fail, ok, warn
from nodes.machine_checks import Case
from nodes.network_checks import Reading, read_rules
from tests.helpers import DEADLINE_S, REPOSITORY, free_port

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "mesh.doctor.1.json").read_text())


def only(findings):
    """(level, text, cure) of the one finding there is."""
    [finding] = findings
    return finding.level, finding.text, finding.cure


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(state of a member, state of a member of another mesh); copied by who changes them."""
    root = tmp_path_factory.mktemp("states")
    for name in ("a", "b"):
        mesh.create_mesh(root / name, name)
    return root / "a", root / "b"


@pytest.fixture
def state(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "state")
    return tmp_path / "state"


# ------------------------------------------------------------------------------- this machine


def test_papers_in_order_are_ok_and_a_machine_in_no_mesh_is_told_how_to_join(state, tmp_path):
    identity, findings = machine_checks.identity(state)
    assert identity.name == "a"
    assert only(findings)[0] == "ok"
    identity, findings = machine_checks.identity(tmp_path / "nothing")
    assert identity is None
    level, text, cure = only(findings)
    assert (level, "in no mesh" in text, "mesh join TOKEN" in cure) == ("fail", True, True)


def test_files_that_others_can_read_or_own_are_named_with_the_command_that_closes_them(state):
    state.chmod(0o755)
    level, text, cure = only(machine_checks.identity(state)[1])
    assert (level, cure) == ("warn", f"chmod go= {state}")
    (state / "node.pem").chmod(0o640)
    level, text, cure = only(machine_checks.identity(state)[1])
    assert (level, cure) == ("fail", f"chmod -R go= {state}")
    assert "node.pem" in text
    state.chmod(0o700)
    assert only(machine_checks.identity(state)[1])[0] == "ok", "a closed directory closes its files"


@pytest.mark.skipif(os.getuid() != 0, reason="giving files away needs root")
def test_files_of_another_user_are_named(state):
    os.chown(state / "mesh.json", 12345, -1)
    level, text, cure = only(machine_checks.identity(state)[1])
    assert (level, "mesh.json" in text, cure.startswith("sudo chown")) == ("fail", True, True)


@pytest.mark.skipif(os.getuid() != 0, reason="being somebody else needs root")
def test_a_state_that_this_user_may_not_read_is_named(state):
    state.chmod(0o700)
    os.seteuid(65534)
    try:
        level, text, cure = only(machine_checks.identity(state)[1])
        assert (level, "not to be read" in text, "chown" in cure) == ("fail", True, True)
        assert machine_checks.disk(state) == []
        assert only(machine_checks.clock(state, time.time()))[0] == "ok"
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "words"),
    [("ca.pem", "the authority in"), ("node.pem", "certificate is one of another mesh")],
)
def test_papers_of_two_meshes_do_not_belong_together(made, state, name, words):
    shutil.copy(made[1] / name, state / name)
    identity, findings = machine_checks.identity(state)
    level, text, cure = only(findings)
    assert (identity, level, cure) == (None, "fail", "mesh leave; mesh join TOKEN")
    assert words in text
    (state / name).write_bytes(b"damaged")
    assert "damaged" in only(machine_checks.identity(state)[1])[1]


def test_a_disk_with_little_room_warns_and_one_with_none_fails(state, tmp_path, monkeypatch):
    assert only(machine_checks.disk(state))[0] == "ok"
    assert machine_checks.disk(tmp_path / "nothing") == []
    monkeypatch.setattr(machine_checks, "FREE_ENOUGH_BYTES", 1 << 62)
    assert only(machine_checks.disk(state))[0] == "warn"
    monkeypatch.setattr(machine_checks, "FREE_LEAST_BYTES", 1 << 62)
    assert only(machine_checks.disk(state))[0] == "fail"
    assert not list(state.glob(".doctor*")), "what it tried is gone"


def test_a_clock_that_is_off_is_told_from_the_disk_s_clock_and_from_files_of_its_future(state):
    now = time.time()
    assert only(machine_checks.clock(state, now))[0] == "ok"
    for off_s in (-86400.0, 86400.0):
        level, text, _ = only(machine_checks.clock(state, now + off_s))
        assert (level, text.endswith("apart")) == ("warn", True)
    os.utime(state / "node.pem", (now + 86400, now + 86400))
    level, text, cure = only(machine_checks.clock(state, now))
    assert (level, "set-ntp" in cure) == ("warn", True)
    assert "behind" in text


def test_clocks_of_peers_are_compared_and_the_one_that_stands_alone_is_named():
    assert peer_clocks.compared({}) == []
    assert only(peer_clocks.compared({"pi4": 0.2, "pi5": -1.0})) == (
        "ok",
        "within a minute of those of pi4, pi5",
        "",
    )
    level, text, cure = only(peer_clocks.compared({"pi4": 0.2, "pi5": -3600.0}))
    assert (level, text) == ("warn", "pi5's clock is 1h00m behind this one")
    assert cure.startswith("on pi5, or here: ")
    level, text, cure = only(peer_clocks.compared({"pi4": 90.0, "pi5": 91.0}))
    assert (level, text) == ("warn", "this machine's clock is 1m30s behind those of its peers")
    assert len(peer_clocks.compared({"pi4": 90.0, "pi5": -90.0})) == 2


def test_a_peer_s_clock_is_read_off_its_answer_and_who_says_nothing_is_left_out(monkeypatch):
    answers = {"a": {"time": time.time() + 600}, "b": {"time": "late"}, "c": {}, "d": None}

    def ask(node, op, *, of, **fields):
        if answers[of] is None:
            raise mesh.NodeTimeout("no answer")
        return answers[of]

    monkeypatch.setattr(mesh, "ask", ask, raising=False)
    peers = [{"id": k, "name": f"pi-{k}", "state": "alive"} for k in answers]
    peers.append({"id": "e", "name": "gone", "state": "dead"})
    clocks = peer_clocks.PeerClocks(case("/state", node=object(), peers={"peers": peers}))
    [finding] = clocks.findings()
    assert finding.level == "warn"
    assert list(clocks.offsets) == ["pi-a"]
    assert 590 < clocks.offsets["pi-a"] < 610
    assert peer_clocks.PeerClocks(case("/state")).findings() == [], "where no node runs"


def test_too_few_descriptors_are_told_before_they_are_missing():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, level in ((1024, "ok"), (300, "warn"), (100, "fail")):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            for pid in (None, os.getpid()):
                found, text, _ = only(machine_checks.descriptors(pid))
                assert (found, str(limit) in text) == (level, True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def case(state=None, **more):
    fields = {"node": None, "status": None, "peers": None, "stuck": False}
    return Case(state=state, **{**fields, **more})


def test_a_node_that_does_not_answer_is_told_from_one_that_left_its_files(state, monkeypatch):
    monkeypatch.setattr(machine_checks, "ASK_S", 0.05)
    assert only(machine_checks.process(case(state)))[2] == "mesh up"
    about = {"node": "x" * 52, "name": "a", "pid": 4121, "control": str(state / "control.sock")}
    (state / "node.json").write_text(json.dumps(about))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(about["control"])
        silent.listen(8)
        found = machine_checks.open_case(str(state), None)
        assert found.stuck
        level, text, cure = only(machine_checks.process(found))
        assert (level, cure) == ("fail", "kill -CONT 4121; or kill -9 4121, then mesh up")
    found = machine_checks.open_case(str(state), None)
    assert (found.stuck, found.node) == (False, None)
    level, text, cure = only(machine_checks.process(found))
    assert (level, "4121" in text, cure.startswith("mesh up")) == ("warn", True, True)


def test_a_node_of_another_version_than_the_command_is_to_be_started_again(state):
    node = mesh.RunningNode(node="x", name="a", pid=1, control="", state=state)
    status = {"node": {"version": "0.0.1", "uptime_s": 1.0, "addresses": []}}
    level, text, _ = only(machine_checks.process(case(state, node=node, status=status)))
    assert (level, "0.0.1" in text, mesh.__version__ in text) == ("warn", True, True)


def test_a_port_that_somebody_else_has_is_told(monkeypatch):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        monkeypatch.setattr(machine_checks, "PORT", taken.getsockname()[1])
        assert only(machine_checks.port_is_free())[0] == "warn"
    assert only(machine_checks.port_is_free())[0] == "ok"


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("print('9.9.9 262144.0')\nraise SystemExit\n", "ok", "torch 9.9.9 imports and multiplies"),
        ("print('9.9.9 1.0')\nraise SystemExit\n", "fail", "multiplies wrongly"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n", "fail", "dies of SIGILL"),
        ("raise ImportError('libgomp.so.1 is gone')\n", "fail", "libgomp.so.1 is gone"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")\n", "warn", "not installed"),
        ("import signal\nsignal.pause()\n", "warn", "longer than"),
    ],
    ids=["good", "wrong", "dies", "broken", "missing", "slow"],
)
def test_torch_is_tried_where_it_can_do_no_harm(tmp_path, monkeypatch, text, level, words):
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    within_s = 0.2 if "pause" in text else 20.0
    found = only(machine_checks.torch(machine_checks.start_torch(), within_s))
    assert (found[0], words in found[1]) == (level, True), found


def test_the_real_torch_gives_the_product_that_is_asked_for(capsys):
    """In this process, where others have loaded it."""
    exec(compile(machine_checks.MULTIPLY, "multiply", "exec"), {})  # noqa: S102 (our own text)
    assert capsys.readouterr().out.split()[1] == str(machine_checks.PRODUCT)


# -------------------------------------------------------------------------------- the network

LAN = Interface(name="eth0", networks=("192.168.1.20/24",), kind="lan", looked_at=True)
DOCKER = Interface(name="docker0", networks=("172.17.0.1/16",), kind="containers", why="a bridge")
VPN = Interface(name="wg0", networks=("10.1.0.2/24",), kind="vpn", why="a tunnel")
OWN, PEER = "o" * 52, "p" * 52
AT = Address("192.168.1.44", 7710)


def announced(node=PEER, *addresses, member=True, protocol="4"):
    addresses = addresses or (AT,)
    return Announcement(
        instance=node[:16],
        member=member,
        protocol=protocol,
        addresses=addresses,
        source=addresses[0].host,
    )


def echo(*announcements, **more):
    fields = {"error": "", "looped": True, "others": tuple(a.source for a in announcements)}
    about = {"interface": "eth0", "address": "192.168.1.20", **fields, **more}
    return Echo(announcements=announcements, **about)


def knock(outcome, address=AT, node=""):
    return Knock(address=address, outcome=outcome, node=node, reason=outcome.value)


def read(*echoes, knocks=(), interfaces=(LAN, DOCKER), own=OWN, **about):
    """(check, level, text) of all that is not ok."""
    seen = Surroundings(protocol="4", interfaces=interfaces, echoes=echoes, knocks=tuple(knocks))
    identity = own and mesh.Identity(node=own, name="a", mesh="m", beacon_key=b"", state=None)
    found = Reading(case("/state", **about), identity or None, seen).findings()
    return [(f.check, f.level, f.text) for f in found if f.level != "ok"]


def test_where_all_is_well_nothing_is_said():
    own = announced(OWN, Address("192.168.1.20", 7710))
    assert read(echo(announced(), own), knocks=[knock(Outcome.NODE, node=PEER)]) == []


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome.SILENT, "does not answer: a firewall there drops it"),
        (Outcome.REFUSED, "is refused: a firewall there rejects it"),
        (Outcome.STUCK, "is stopped, or overloaded"),
        (Outcome.NO_ROUTE, "has no route from here"),
        (Outcome.STRANGER, "is something else than a node"),
        (Outcome.OTHER_MESH, "certificate of another mesh"),
    ],
)
def test_an_announced_peer_that_cannot_be_reached_is_told_by_how_it_fails(outcome, words):
    peers = {"peers": [{"id": PEER, "name": "pi4", "state": "alive", "addresses": []}]}
    found = read(echo(announced()), knocks=[knock(outcome)], peers={**peers, "unreached": []})
    check, level, text = found[0]
    assert (check, level) == ("peers", "fail")
    assert text.startswith("pi4 is heard by mDNS, but TCP 192.168.1.44:7710 ")
    assert words in text


def test_of_a_mesh_too_large_to_knock_everywhere_nobody_is_called_unreachable():
    many = [announced(f"{k:052}") for k in range(100)]
    assert read(echo(*many)) == []
    nowhere = Announcement(instance="n" * 16, member=True, protocol="4", addresses=(), source="x")
    [(check, level, text)] = read(echo(nowhere))
    assert (check, level, "none of its addresses" in text) == ("peers", "fail", True)


def test_docker_s_address_of_a_peer_is_our_own_and_proves_nothing():
    docker = Address("172.17.0.1", 7710)
    both = echo(announced(PEER, docker, AT))
    answers = knock(Outcome.NODE, docker, OWN)
    [(_, _, text)] = read(both, knocks=[answers, knock(Outcome.SILENT)])
    assert "TCP 192.168.1.44:7710 does not answer" in text
    assert read(both, knocks=[answers, knock(Outcome.NODE, node=PEER)]) == []
    refused = knock(Outcome.REFUSED, docker)
    [(_, _, text)] = read(both, knocks=[refused, knock(Outcome.NO_ROUTE)])
    assert "192.168.1.44" in text
    [(_, _, text)] = read(echo(announced(PEER, docker)), knocks=[answers])
    assert "none of its addresses leads to it" in text


def test_peers_of_before_tell_a_network_that_isolates_from_one_that_drops_multicast():
    alone = echo()
    assert [found[:2] for found in read(alone)] == [("multicast", "warn")]
    for outcome in (Outcome.SILENT, Outcome.NO_ROUTE):
        _, (check, level, text) = read(alone, knocks=[knock(outcome)])
        assert (check, level) == ("isolation", "fail")
        assert "peers of before (192.168.1.44)" in text
    _, (check, level, text) = read(alone, knocks=[knock(Outcome.NODE, node=PEER)])
    assert (check, level) == ("isolation", "warn")
    assert "no multicast comes through" in text
    far = knock(Outcome.SILENT, Address("10.9.9.9", 7710))
    assert [found[0] for found in read(alone, knocks=[far])] == ["multicast"]
    refused = knock(Outcome.REFUSED)
    assert [found[0] for found in read(alone, knocks=[refused])] == ["multicast"], "it is there"


def test_multicast_that_cannot_be_sent_or_heard_fails_on_a_lan_only():
    held = read(echo(error="address already in use", looped=False))
    assert held[0][:2] == ("multicast", "fail")
    assert "held by a program" in held[0][2]
    found = read(echo(interface="wg0", looped=False), interfaces=(LAN, VPN))
    assert found[0][:2] == ("multicast", "warn")
    assert read(echo(interface="docker0")) == []
    nowhere = Interface(name="eth0", networks=(), kind="lan", looked_at=True)
    assert [found[:2] for found in read(interfaces=(nowhere,))] == [("interface", "fail")]


def test_an_interface_that_is_ignored_says_why_and_how_to_use_it_and_one_that_is_alone_is_used():
    def told(*interfaces):
        seen = Surroundings(protocol="4", interfaces=interfaces, echoes=(), knocks=())
        return [f.text for f in Reading(case("/state"), None, seen).interfaces() if f.level == "ok"]

    lan, docker, vpn = told(LAN, DOCKER, VPN)
    assert lan == "eth0 192.168.1.20: used"
    use = "mesh up --interface eth0 --interface"
    assert docker == f"docker0 172.17.0.1: ignored, a bridge; {use} docker0 uses it"
    assert vpn == f"wg0 10.1.0.2: ignored, a tunnel; {use} wg0 uses it"
    named = told(LAN, replace(DOCKER, looked_at=True))
    assert named[1].startswith("docker0 172.17.0.1: used; only containers")
    cable_out = replace(LAN, networks=(), looked_at=False)
    [alone] = told(cable_out, replace(VPN, looked_at=True))
    assert alone.startswith(
        "wg0 10.1.0.2: used, as no LAN has an address; a VPN: it seldom carries"
    )
    assert "give an address with --peer" in alone
    assert told(replace(LAN, looked_at=False)) == [
        "eth0 192.168.1.20: left out, as --interface says"
    ]


def test_a_node_that_its_own_machine_cannot_reach_is_told():
    here = Address("192.168.1.20", 7710)
    status = {"node": {"addresses": [str(here)]}}
    heard = echo(others=("192.168.1.9",))
    assert read(heard, knocks=[knock(Outcome.NODE, here, OWN)], status=status) == []
    seen = Surroundings(protocol="4", interfaces=(LAN,), echoes=(heard,), knocks=())
    told = Reading(case("/state", status=status), None, seen).findings()
    assert not [one for one in told if one.check == "port"], "what nobody tried is not told"
    [(check, level, text)] = read(heard, knocks=[knock(Outcome.SILENT, here)], status=status)
    assert (check, level, "silent" in text) == ("port", "fail", True)
    [(check, _, text)] = read(heard, knocks=[knock(Outcome.NODE, here, PEER)], status=status)
    assert (check, "another node" in text) == ("port", True)


def test_what_is_of_another_mesh_is_told_by_whether_this_machine_is_in_one():
    stranger = announced(PEER, member=False)
    assert [found[:2] for found in read(echo(stranger))] == [("meshes", "warn")]
    [(_, _, text)] = read(echo(stranger), own="")
    assert "1 node here that can be joined (192.168.1.44)" in text
    refused = {"node": {"addresses": []}, "refused": {"certificate": 2}}
    [(check, level, text)] = read(echo(others=("x",)), status=refused)
    assert (check, level, "2 connections" in text) == ("given", "warn", True)


def test_a_peer_given_by_hand_that_leads_nowhere_and_an_incompatible_one_fail():
    peers = {
        "peers": [
            {"id": PEER, "name": "lab-old", "state": "incompatible", "reason": "fc2 differs"}
        ],
        "unreached": [{"address": "10.0.0.1:7710", "reason": "connection refused"}],
    }
    found = read(echo(others=("x",)), peers=peers)
    assert [one[:2] for one in found] == [("peers", "fail"), ("given", "fail")]
    assert "lab-old is incompatible: fc2 differs" in found[0][2]
    assert "10.0.0.1:7710: connection refused" in found[1][2]


def test_rules_of_this_machine_are_a_hint_only():
    chain = "table inet f {{\n set s {{\n type ipv4_addr\n }}\n chain in {{\n {} \n }}\n}}"
    hook = "type filter hook input priority filter; policy {};\n"
    for body, level in (
        ("type filter hook forward priority filter; policy drop;", "ok"),
        (hook.format("accept"), "ok"),
        (hook.format("drop"), "warn"),
        (hook.format("drop") + "tcp dport 7710 accept", "ok"),
        (hook.format("drop") + "tcp dport { 22, 7710 } accept", "ok"),
        (hook.format("accept") + "tcp dport 7710 reject", "warn"),
        (hook.format("accept") + "ip saddr @s drop", "warn"),
    ):
        assert only(read_rules(chain.format(body), 7710))[0] == level, body
    assert only(read_rules("", 7710))[0] == "ok"
    allowed = chain.format(hook.format("drop")) + "chain user {\n tcp dport 7710 accept\n}"
    assert only(read_rules(allowed, 7710))[0] == "ok", "as ufw writes it"


def test_no_packet_that_anybody_may_send_ends_a_survey():
    chance = Random(6)
    whole = survey._question()
    packets = [chance.randbytes(chance.randrange(200)) for _ in range(500)]
    for _ in range(500):
        packet = bytearray(whole)
        packet[2] |= 0x80  # an answer
        for _ in range(chance.randrange(6)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        packets.append(bytes(packet[: chance.randrange(len(packet))]))
    for packet in packets:
        assert isinstance(survey._records(packet), list)


@contextlib.contextmanager
def listener(answer):
    """A port of loopback where each connection gets `answer(connection)`; yields its address."""

    def serve():
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(DEADLINE_S)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("127.0.0.1", listening.getsockname()[1])
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


def test_a_knock_tells_who_is_behind_an_address_as_a_node_would(made, monkeypatch):
    monkeypatch.setattr(survey, "LISTEN_S", 0.1)
    monkeypatch.setattr(diagnosis, "KNOCK_S", 0.8)
    monkeypatch.setattr(diagnosis, "PLAIN_S", 0.4)
    ours, other = map(identity.load, made)
    contexts = [one.context(server=True) for one in (ours, other)]

    def tls(context):
        return lambda connection: context.wrap_socket(connection, server_side=True).recv(1)

    with contextlib.ExitStack() as stack:
        node, stranger, web = (
            stack.enter_context(listener(answer))
            for answer in (tls(contexts[0]), tls(contexts[1]), lambda c: c.sendall(b"HTTP/1.1 400"))
        )
        stopped = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stuck = Address("127.0.0.1", stopped.getsockname()[1])
        wanted = {
            node: (Outcome.NODE, ours.node),
            stranger: (Outcome.OTHER_MESH, ""),
            web: (Outcome.STRANGER, ""),
            stuck: (Outcome.STUCK, ""),
            Address("127.0.0.1", free_port()): (Outcome.REFUSED, ""),
            Address("no..name", 1): (Outcome.SILENT, ""),
        }
        addresses = [str(address) for address in wanted] * 2
        seen = mesh.look_around(ours, interfaces=("lo",), listens=(), addresses=addresses)
    assert {one.address: (one.outcome, one.node) for one in seen.knocks} == wanted
    assert len(seen.knocks) == len(wanted), "each once"
    assert [one.name for one in seen.interfaces if one.looked_at] == ["lo"]
    [heard] = seen.echoes
    assert (heard.interface, heard.looped, heard.error) == ("lo", True, "")


# ------------------------------------------------------------------------------------ the command


def test_findings_are_drawn_one_a_line_each_cure_below_it():
    findings = [
        ok("disk", "there is room"),
        warn("node", "no node runs", "mesh up"),
        fail("identity", "in no mesh", "mesh init"),
    ]
    assert doctor.draw(findings) == (
        "ok    disk      there is room\n"
        "warn  node      no node runs\n"
        "                -> mesh up\n"
        "FAIL  identity  in no mesh\n"
        "                -> mesh init\n"
        "\n"
        "1 FAIL, 1 warn, 1 ok"
    )
    with pytest.raises(AssertionError):
        Finding(check="disk", level="fail", text="no cure")


def test_without_a_node_it_looks_all_the_same_and_only_warns(state, tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text("print('9.9.9 262144.0')\nraise SystemExit\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MESH_STATE", raising=False)
    monkeypatch.setattr(survey, "LISTEN_S", 0.2)
    arguments = ["doctor", "--interface", "lo", "--state", str(state)]
    assert main([*arguments, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    jsonschema.validate(about, SCHEMA)
    assert (about["healthy"], about["node"], about["state"]) == (True, None, str(state))
    levels = {finding["check"]: finding["level"] for finding in about["findings"]}
    assert levels["node"] == "warn"
    assert levels["multicast"] == levels["torch"] == "ok", about

    (state / "mesh.json").unlink()
    assert main(arguments) == 4
    assert "mesh init" in capsys.readouterr().out
    assert main(["doctor", "-N", "nobody"]) == 3
    assert capsys.readouterr().out == ""
