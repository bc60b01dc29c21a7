"""The `mesh` command as a person meets it: real processes, exit codes, what is printed where."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mesh
from mesh import arguments, client, launch, observer, process, storage
from mesh.client import RunningNode, node_of_state
from mesh.core.messages import PROTOCOL
from mesh.errors import NodeNotRunning, NodeTimeout, UsageError
from mesh.identity import create_mesh, is_member, join_mesh, load, read_token
from mesh.settings import NodeSettings
from nodes import grammar, questions
from nodes.cli import _parser, main
from tests import schemas
from tests.helpers import DEADLINE_S, QUIET, Host, free_port, parsed, until

NONE = type(None)
NUMBER = (int, float)
MAYBE_NUMBER = (int, float, NONE)

STATUS = {
    "schema": "mesh.status/1",
    "node": {
        "id": str,
        "name": str,
        "pid": int,
        "version": mesh.__version__,
        "protocol": PROTOCOL,
        "state": str,
        "addresses": [str],
        "incarnation": str,
        "uptime_s": NUMBER,
    },
    "mesh": {"id": str},
    "health": [str],
    "peers": {"alive": int, "dead": int, "incompatible": int},
    "runs": [dict],
    "exits": [
        {
            "run": (str, NONE),
            "script": str,
            "pid": int,
            "code": (int, NONE),
            "ago_s": NUMBER,
        }
    ],
    "refused": dict,
    "dropped_messages": int,
    "notes": [str],
}
PEERS = {
    "schema": "mesh.peers/1",
    "node": {"id": str, "name": str},
    "peers": [
        {
            "id": str,
            "name": str,
            "state": str,
            "reason": (str, NONE),
            "addresses": [str],
            "via": (str, NONE),
            "rtt_s": MAYBE_NUMBER,
            "seen_s": MAYBE_NUMBER,
            "incarnation": str,
            "runs": [{"run": str, "schema": str, "started": bool, "exchanged": bool}],
        }
    ],
    "unreached": [{"address": str, "reason": str}],
}
"""Version 1 of what is printed with --json. Fields may be added; none may go or change its type."""


def fits(value, shape, where="answer"):
    """Checks a JSON value against one of the shapes above."""
    match shape:
        case dict():
            for key, inner in shape.items():
                assert key in value, f"{where} has no {key}"
                fits(value[key], inner, f"{where}.{key}")
        case [inner]:
            for item in value:
                fits(item, inner, f"{where}[]")
        case type() | tuple():
            assert isinstance(value, shape), f"{where} is {value!r}"
        case _:
            assert value == shape, where


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


def is_one_line_for_a_person(completed, code):
    """A user's mistake: one line on standard error, nothing on standard output, no traceback."""
    assert completed.returncode == code, completed.stderr
    assert completed.stdout == ""
    says_one_thing(completed.stderr)


def says_one_thing(stderr):
    first, *listed = stderr.rstrip("\n").split("\n")
    assert first.startswith("mesh: ")
    assert all(line.startswith("  ") for line in listed), stderr
    assert "Traceback" not in stderr
    assert "Error" not in stderr


def script(host, text, name="train.py"):
    path = host.root / name
    path.write_text(text)
    return path


# ----------------------------------------------------------------------- init, token, join, leave


def test_a_mesh_is_made_joined_and_left(host):
    made = host.mesh("init", "--state", "a", "--name", "first")
    assert made.returncode == 0
    assert made.stdout.startswith("mesh join mesh1-"), "standard output is the line to copy"
    assert made.stdout.count("\n") == 1
    command, verb, token = made.stdout.split()
    assert (command, verb) == ("mesh", "join")

    printed = host.mesh("token", "--state", "a")
    assert (printed.returncode, printed.stdout) == (0, token + "\n")

    joined = host.mesh("join", token, "--state", "b", "--name", "second")
    assert joined.returncode == 0
    assert "second" in joined.stdout

    left = host.mesh("leave", "--state", "b")
    assert left.returncode == 0
    assert token not in left.stdout, "who joined does not have it"
    made_and_left = host.mesh("leave", "--state", "a")
    assert made_and_left.returncode == 0
    assert f"mesh join {token}" in made_and_left.stdout
    is_one_line_for_a_person(host.mesh("token", "--state", "a"), 1)


def test_leaving_is_told_to_a_program_with_the_token_to_keep(tmp_path, command):
    create_mesh(tmp_path / "a", "first")
    join_mesh(tmp_path / "b", token := read_token(tmp_path / "a"))
    for name, kept in (("a", token), ("b", None)):
        own = load(tmp_path / name)
        code, out, err = command("leave", "--state", tmp_path / name, "--json")
        answer = schemas.fits(json.loads(out), "mesh.done/1")
        assert (code, err, answer["token"]) == (0, "", kept)
        assert answer["node"] == {"id": own.node, "name": own.name}
    join_mesh(tmp_path / "b", token)
    (tmp_path / "b" / "node.pem").write_text("damaged")
    answer = json.loads(command("leave", "--state", tmp_path / "b", "--json")[1])
    assert schemas.fits(answer)["node"]["id"] == ""
    assert not is_member(tmp_path / "b")


MISTAKES = [
    (("init", "--state", "member"), 2, "mesh leave"),
    (("init", "--state", "new", "--name", "x" * 33), 2, "32"),
    (("init", "--state", "/dev/null/state"), 1, "--state"),
    (("join", "nonsense", "--state", "new"), 2, "mesh token"),
    (("join", "mesh1-aaaa", "--state", "new"), 2, "mesh token"),
    (("join", "mesh1-é", "--state", "new"), 2, "mesh token"),
    (("join", "mesh1-" + "a" * 32, "--state", "member"), 2, "mistyped"),
    (("token", "--state", "new"), 1, "mesh init"),
    (("token", "--state", "joiner"), 1, "machine that made the mesh"),
    (("leave", "--state", "new"), 1, "no mesh"),
    (("up", "--state", "new", *QUIET), 1, "mesh join"),
    (("up", "--state", "member", *QUIET, "--port", "0"), 2, "1..65535"),
    (("up", "--state", "member", *QUIET, "--peer", "nowhere"), 2, "HOST:PORT"),
    (("up", "--state", "member", *QUIET, "--peer", "host:99999"), 2, "1..65535"),
    (("up", "--state", "member", "--no-mdns", "--interface", "nope0"), 2, "there are:"),
    (("run", "--state", "member", *QUIET, "no_such_script.py"), 2, "no_such_script.py"),
    (("status",), 3, "mesh up"),
    (("status", "--state", "member"), 3, "mesh up"),
    (("status", "--state", "new", "--json"), 3, "mesh up"),
    *(
        (("bench", "b", flag, number), 2, f"mesh: {flag} {number}: ")
        for flag in ("--mb", "--seconds")
        for number in ("nan", "inf", "-5", "1e+30")
    ),
    (("ping", "b", "-c", "99999999999999999999"), 2, "--count 1e+20: 1..100"),
    (("ping", "b", "-c", "0"), 2, "--count 0: 1..100"),
    (("pull", "--run", "r", "-o", "m", "--peers", "0"), 2, "--peers 0: 1..64"),
    (("peers", "-N", "nobody"), 3, "nobody"),
    (("status", "-N", "nobody"), 3, "none"),
]


@pytest.fixture(scope="module")
def still_host():
    """A host on which nothing runs: `member` made a mesh, `joiner` joined it, `new` is in none."""
    host = Host()
    host.member("joiner", host.member("member"))
    yield host
    host.close()


@pytest.mark.parametrize(
    ("arguments", "code", "hint"), MISTAKES, ids=lambda v: " ".join(v) if type(v) is tuple else ""
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    still_host, monkeypatch, capsys, arguments, code, hint
):
    """In this process, to be quick; real ones follow."""
    monkeypatch.chdir(still_host.root)
    for key in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(key, still_host.environment[key])
    monkeypatch.delenv("MESH_STATE", raising=False)
    assert main(arguments) == code
    out, err = capsys.readouterr()
    if "--json" in arguments:
        assert json.loads(out)["schema"] == "mesh.error/1"
    else:
        assert out == ""
    says_one_thing(err)
    assert hint in err
    assert not (still_host.state("new") / "mesh.json").exists()


@pytest.mark.parametrize("command", [("status",), ("leave",), ("service", "status")], ids=" ".join)
def test_a_user_without_a_home_is_told_what_to_name(monkeypatch, capsys, command):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for key in ("HOME", "MESH_STATE", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(key, raising=False)
    assert main(command) == 2
    said = capsys.readouterr().err
    says_one_thing(said)
    assert "no home directory is known: " in said
    if command == ("status",):
        assert main([*command, "--state", "~nosuch/x"]) == 2
        assert "--state DIR or $MESH_STATE" in capsys.readouterr().err


def test_the_limits_that_the_command_line_knows_are_those_of_a_node():
    assert arguments.NUMBERS["count"] == questions.PING_COUNT
    assert arguments.SECONDS["seconds"] == questions.BENCH_S
    assert questions.PULL_PEERS == (1, observer.PEERS_LIMIT)
    low, high = (round(1e6 * mb) for mb in questions.BENCH_MB)
    assert arguments.NUMBERS["bytes"][0] == low
    assert high <= arguments.NUMBERS["bytes"][1] < high + 1e6


def test_a_version_names_the_node_that_does_not_answer(monkeypatch, command):
    here = [RunningNode(f"{name}-id", name, 1, "", Path(name)) for name in ("a", "b", "c")]

    def ask(node, op):
        match node.name:
            case "a":
                return {"node": {"id": "a-id", "name": "a", "version": "0", "protocol": 4}}
            case "b":
                raise NodeTimeout("is it stopped?")
        raise NodeNotRunning("it ended")

    monkeypatch.setattr(mesh, "running_nodes", lambda: here, raising=False)
    monkeypatch.setattr(mesh, "ask", ask, raising=False)
    answer = schemas.fits(json.loads(command("version", "--json")[1]))
    assert [node["name"] for node in answer["nodes"]] == ["a"]
    assert answer["silent"] == [{"id": "b-id", "name": "b"}]
    said = command("version")[1].splitlines()
    assert said[2:] == ["node b does not answer: is it stopped?"]


def test_what_is_asked_of_this_machine_only_promises_no_more():
    """`mesh pull -N` finds its node by find_node(), which knows no other machine's."""
    commands = grammar.read(_parser()).commands
    for name, command in commands.items():
        [told] = [f.help for f in command.flags if "-N" in f.spellings] or [None]
        if told is not None:
            here_only = told.startswith("which node of this machine")
            assert here_only == (name in ("pull", "doctor")), name


def test_the_bare_node_process_says_who_starts_it(still_host):
    for given in ((), ("--help",)):
        command = [sys.executable, "-m", "mesh", *given]
        at = {"env": still_host.environment, "cwd": still_host.root}
        said = subprocess.run(command, **at, capture_output=True, text=True, check=False)
        assert (said.returncode, said.stdout) == (2, "")
        assert said.stderr.count("\n") == 1
        assert "`mesh up`" in said.stderr


def test_an_unknown_interface_is_an_error_that_lists_those_there_are(still_host):
    completed = still_host.mesh("up", "--state", "member", "--no-mdns", "--interface", "nope0")
    is_one_line_for_a_person(completed, 2)
    listed = completed.stderr.partition("there are:")[2]
    assert "lo" in listed.replace(",", " ").split()


@pytest.mark.parametrize(
    "arguments", [(), ("dance",), ("status", "--loud"), ("run",), ("up", "--port", "many")]
)
def test_what_is_no_command_is_a_usage_error(still_host, arguments):
    completed = still_host.mesh(*arguments)
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("usage: mesh")
    assert "Traceback" not in completed.stderr


def test_help_and_version_are_answers(still_host):
    told = still_host.mesh("--help")
    assert told.returncode == 0
    for command in ("init", "token", "join", "up", "run", "leave", "status", "peers", "demo"):
        assert f"    {command} " in told.stdout
    assert still_host.mesh("--version").stdout == f"gossipmesh {mesh.__version__}\n"


# ----------------------------------------------------------------------------- up, status, peers


@pytest.fixture(scope="module")
def pair():
    """(host, a, b): two nodes that know each other, for tests that leave them as they are."""
    host = Host()
    yield host, *host.up_together("a", "b")
    host.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_node_without_a_run_has_no_numpy_in_its_memory_and_one_with_a_run_has():
    host = Host()
    try:
        host.member("a")
        node = host.up("a")
        maps = Path(f"/proc/{node.pid}/maps")
        assert "_rust" in maps.read_text(), "cryptography's; else this test sees nothing"
        assert "numpy" not in maps.read_text()
        with mesh.join(torch.nn.Linear(2, 2), settings=mesh.NodeSettings(state=node.state)):
            assert "numpy" in maps.read_text()
    finally:
        host.close()


def test_a_node_says_how_it_is_as_json_and_as_text(pair):
    host, a, b = pair
    status = parsed(host.mesh("status", "--state", "a", "--json"))
    fits(status, STATUS)
    assert (status["node"]["name"], status["node"]["pid"]) == ("a", a.pid)
    assert status["node"]["state"] == str(a.state)
    assert status["peers"] == {"alive": 1, "suspect": 0, "dead": 0, "incompatible": 0}
    assert status["health"] == []

    peers = parsed(host.mesh("peers", "--state", "a", "--json"))
    fits(peers, PEERS)
    assert [(peer["id"], peer["state"]) for peer in peers["peers"]] == [(b.id, "alive")]
    assert peers["peers"][0]["addresses"] == b.status()["node"]["addresses"]

    text = host.mesh("status", "--state", "a")
    assert text.returncode == 0
    assert text.stderr == ""
    assert f"a ({a.id[:8]})" in text.stdout
    assert "1 alive" in text.stdout
    table = host.mesh("peers", "--state", "a").stdout.splitlines()
    assert table[0].split()[:3] == ["NAME", "STATE", "ADDRESS"]
    assert table[1].split()[:3] == ["*", "a", "alive"]
    assert table[2].split()[:2] == ["b", "alive"]
    wide = host.mesh("peers", "--state", "a", "-o", "wide").stdout.splitlines()
    assert b.id[:8] in wide[2].split()


def test_of_several_nodes_on_a_host_one_has_to_be_chosen(pair):
    host, *nodes = pair
    which = host.mesh("status")
    is_one_line_for_a_person(which, 2)
    assert "choose one" in which.stderr
    for node in nodes:
        assert f"-N {node.name} " in which.stderr
        assert f"-N {node.id[:8]}" in which.stderr
        chosen = parsed(host.mesh("status", "--json", "-N", node.name))
        assert chosen["node"]["id"] == node.id
    by_id = parsed(host.mesh("peers", "--json", "-N", nodes[1].id[:8]))
    assert by_id["node"]["name"] == "b"


def test_a_name_means_the_node_that_has_it_and_not_one_whose_id_begins_so(monkeypatch):
    here = [
        RunningNode(node, name, 1, "", Path(name))
        for node, name in (("bbbbcccc", "a"), ("dddd4444", "b"), ("eeee5555", "bbbb"))
    ]
    monkeypatch.setattr(client, "_running_nodes", lambda: (here, []))
    assert client.find_node(None, "b") is here[1]
    assert client.find_node(None, "bbbb") is here[2]
    assert client.find_node(None, "bbbbc") is here[0]
    with pytest.raises(NodeNotRunning, match="no node named 'bb' runs here"):
        client.find_node(None, "bb")


class Meshes:
    """Nodes of this machine in two meshes, home (a, c) and away (b), and what each is asked. `far` is
    what a member elsewhere of home says, called b; None: there is none."""

    def __init__(self, folder, monkeypatch):
        self.far = {"ok": True, "who": "b of home"}
        self.hung, self.asked = set(), []
        self.nodes = []
        for name, mesh_id in (("a", "home"), ("b", "away"), ("c", "home")):
            (folder / name).mkdir()
            (folder / name / "mesh.json").write_text(json.dumps({"mesh": mesh_id}))
            self.nodes.append(RunningNode(f"{name}-id", name, 1, "", folder / name))
        monkeypatch.setattr(client, "_running_nodes", lambda: (self.nodes, []))
        monkeypatch.setattr(client, "node_of_state", self.node_of_state)
        monkeypatch.setattr(client, "ask", self.ask)

    def node_of_state(self, state):
        return next(node for node in self.nodes if node.state == state)

    def ask(self, node, op, timeout_s, on_progress, *, of=None, **fields):
        self.asked.append(node.name if of is None else f"{of} through {node.name}")
        if node.name in self.hung:
            raise NodeTimeout("the node did not answer within 5 s: is it stopped?")
        if of is None:
            return {"ok": True, "who": f"{node.name} here"}
        if isinstance(self.far, Exception):
            raise self.far
        if self.far is None or node.name == "b":
            raise UsageError(f"no node {of!r} in this mesh; there are: a, c")
        return self.far


@pytest.fixture
def meshes(tmp_path, monkeypatch):
    monkeypatch.delenv("MESH_STATE", raising=False)
    return Meshes(tmp_path, monkeypatch)


def test_a_name_is_one_of_the_chosen_state_and_never_that_of_another_mesh(
    meshes, monkeypatch, tmp_path
):
    """`mesh leave -N b` with the state of a: the b that runs here is another mesh's."""
    for chosen in ({"state": str(tmp_path / "a")}, {}):
        meshes.asked.clear()
        assert client.question("leave", name="b", **chosen)["who"] == "b of home"
        assert meshes.asked == ["b through a"]
        assert client.question("pause", name="c", **chosen)["who"] == "c here"
        assert meshes.asked[1:] == ["c"], "one of its own mesh lets this user do anything"
        monkeypatch.setenv("MESH_STATE", str(tmp_path / "a"))
    meshes.nodes.append(RunningNode("d-id", "c", 1, "", tmp_path / "b"))
    assert client.find_node(None, "c").node == "c-id"
    meshes.far = UsageError("no run 'digits' is trained on b; there are: none")
    with pytest.raises(UsageError, match="no run"):
        client.question("pause", name="b", run="digits")
    assert "b" not in meshes.asked
    meshes.far = None
    assert client.question("status", name="b")["who"] == "b here", "its mesh has none"
    assert client.find_node(None, "b").node == "b-id"
    with pytest.raises(UsageError, match="no node 'nobody' in this mesh"):
        client.question("status", name="nobody")


def test_a_node_that_hangs_keeps_no_other_from_passing_a_question_on(meshes):
    meshes.hung = {"a", "b"}
    meshes.far = {"ok": True, "who": "far"}
    assert client.question("status", name="far")["who"] == "far"
    assert meshes.asked == ["far through a", "far through b", "far through c"]
    meshes.hung = {"a", "c"}
    with pytest.raises(NodeTimeout):
        client.question("status", name="far")


def test_the_state_directory_may_come_from_the_environment(pair):
    host, a, b = pair
    chosen = parsed(host.mesh("status", "--json", MESH_STATE=str(b.state)))
    assert chosen["node"]["name"] == "b"
    flag = parsed(host.mesh("status", "--json", "--state", a.state, MESH_STATE=str(b.state)))
    assert flag["node"]["name"] == "a", "--state is stronger"
    named = parsed(host.mesh("status", "--json", "-N", "a", MESH_STATE=str(b.state)))
    assert named["node"]["name"] == "a", "and so is a name"
    elsewhere = str(host.state("elsewhere"))
    assert host.mesh("init", MESH_STATE=elsewhere).returncode == 0
    assert (host.state("elsewhere") / "node.pem").exists()
    is_one_line_for_a_person(host.mesh("status", MESH_STATE=elsewhere), 3)


def test_a_second_node_on_one_state_directory_is_refused(pair):
    host, a, _ = pair
    is_one_line_for_a_person(host.mesh("up", "--state", "a", *QUIET), 2)
    assert a.answers(), "the first one keeps its files"


def test_printing_into_a_closed_pipe_is_no_error(pair):
    host, _, _ = pair
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        completed = subprocess.run(
            host.command("status", "--state", "a"),
            env=host.environment,
            cwd=host.root,
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (completed.returncode, completed.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help | true; echo ${PIPESTATUS[0]} >&2", 0),
        ("status --state a >&-; echo $? >&2", 0),
        ("peers --state a 2>&-; echo $? >&2", 0),
        ("bench b --state a --mb 0.1 --seconds 1 2>&-; echo $? >&2", 0),
        ("shell <&-; echo $? >&2", 0),
        ("status --state new 2>&- >&-; echo $? >&2", 3),
    ],
)
def test_a_stream_that_is_closed_is_no_error(pair, line, code):
    host, _, _ = pair
    mesh = f"{sys.executable} -m nodes.cli"
    completed = subprocess.run(
        ["bash", "-c", f"exec 3>&2; {mesh} {line.replace('>&2', '>&3')}"],
        env=host.environment,
        cwd=host.root,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert completed.stderr == f"{code}\n"


def test_a_terminal_that_knows_few_characters_gets_others_in_their_place(host):
    host.member("ä→b")
    host.up("ä→b")
    for command in (("status", "--state", "ä→b"), ("ls",)):
        told = host.mesh(*command, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert (told.returncode, told.stderr) == (0, "")
        assert "??b" in told.stdout


def test_a_script_beside_a_running_node_leaves_it_running(pair):
    host, a, _ = pair
    completed = host.mesh("run", "--state", "a", script(host, "raise SystemExit(5)\n"))
    assert completed.returncode == 5
    assert a.answers()
    assert [entry["code"] for entry in a.status()["exits"]] == [5]


def test_a_peer_that_cannot_be_reached_is_named_with_the_reason(host):
    host.member("a")
    port = free_port()
    a = host.up("a", "--peer", f"127.0.0.1:{port}", "--peer", "no..name:1")
    until(lambda: "refused" in "".join(a.status()["health"]), "health names it")
    until(lambda: "label" in "".join(a.status()["health"]), "and what is no name at all")
    answer = parsed(host.mesh("peers", "--json", "--state", "a"))
    fits(answer, PEERS)
    addresses = [unreached["address"] for unreached in answer["unreached"]]
    assert addresses == [f"127.0.0.1:{port}", "no..name:1"]
    assert "unreached" in host.mesh("peers", "--state", "a").stdout


def test_nodes_that_are_told_to_stop_tell_their_peers_and_leave_nothing_behind(host):
    a, b = host.up_together("a", "b")
    left = host.leftovers()
    assert len(left) == 6, "node.json, control.sock, the entry among this host's nodes; twice"
    assert b.stop(signal.SIGTERM) == 0
    until(lambda: a.peers() == [], "b left, and nobody looks for it")
    assert a.status()["peers"]["dead"] == 0
    assert parsed(host.mesh("status", "--json"))["node"]["name"] == "a", "the only one is meant"
    assert a.stop(signal.SIGINT) == 130
    assert host.leftovers() == []
    assert "Traceback" not in a.said + b.said
    is_one_line_for_a_person(host.mesh("status", "--state", "a"), 3)


def test_what_a_killed_node_left_behind_disturbs_nobody(host):
    host.member("a")
    first = host.up("a")
    incarnation, node_id = int(first.status()["node"]["incarnation"]), first.id
    first.kill()
    assert len(host.leftovers()) == 3

    is_one_line_for_a_person(host.mesh("status", "--state", "a"), 3)
    is_one_line_for_a_person(host.mesh("status"), 3)
    second = host.up("a")
    assert second.id == node_id
    assert int(second.status()["node"]["incarnation"]) > incarnation
    assert parsed(host.mesh("status", "--json"))["node"]["pid"] == second.pid
    assert second.stop() == 0
    assert host.leftovers() == []


def test_a_port_that_is_taken_is_named(host):
    host.member("a")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        completed = host.mesh("up", "--state", "a", *QUIET, "--port", port)
    is_one_line_for_a_person(completed, 2)
    assert f"port {port}" in completed.stderr
    assert host.leftovers() == []


def test_leaving_stops_the_node_first(host):
    host.member("a")
    node = host.up("a")
    assert host.mesh("leave", "--state", "a").returncode == 0
    assert node.exit_code() == 0
    assert host.leftovers() == []
    is_one_line_for_a_person(host.mesh("up", "--state", "a", *QUIET), 1)


def test_a_damaged_identity_is_one_line_that_says_what_to_do(host):
    token = host.member("a")
    (host.state("a") / "ca.pem").write_bytes(b"damaged")
    completed = host.mesh("up", "--state", "a", *QUIET)
    is_one_line_for_a_person(completed, 1)
    assert "mesh leave" in completed.stderr
    assert host.mesh("leave", "--state", "a").returncode == 0
    assert host.mesh("join", token, "--state", "a").returncode == 0


# -------------------------------------------------------------------------------------------- run


def test_a_script_that_fails_is_shown_while_its_node_stays(host):
    path = script(host, "import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    completed = host.mesh("run", "--state", "a", *QUIET, path, "--epochs", "3", "-N", "x")
    assert completed.returncode == 7
    assert completed.stdout == "['--epochs', '3', '-N', 'x']\n"
    assert "mesh join mesh1-" in completed.stderr, "a new mesh says how others join it"
    assert "mesh status" in completed.stderr

    status = parsed(host.mesh("status", "--json", "--state", "a"))
    fits(status, STATUS)
    assert [(e["script"], e["code"]) for e in status["exits"]] == [(str(path), 7)]
    assert "exit 7" in host.mesh("status", "--state", "a").stdout
    assert host.mesh("leave", "--state", "a").returncode == 0
    assert host.leftovers() == []
    modes = {p.name: p.stat().st_mode & 0o777 for p in host.state("a").iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_a_script_that_ends_well_takes_its_node_along(host):
    path = script(host, "import os\nprint(os.environ['MESH_STATE'])\n")
    completed = host.mesh("run", "--state", "a", *QUIET, path)
    assert completed.returncode == 0
    assert completed.stdout == f"{host.state('a')}\n", "the script finds the same node"
    assert host.leftovers() == []
    again = host.mesh("run", "--state", "a", *QUIET, path)
    assert again.returncode == 0
    assert "mesh join" not in again.stderr, "it is a member already"


def test_a_script_that_was_killed_is_reported_as_such(host):
    path = script(host, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    host.member("a")
    completed = host.mesh("run", "--state", "a", *QUIET, path)
    assert completed.returncode == 128 + signal.SIGKILL
    assert "killed by signal 9" in host.mesh("status", "--state", "a").stdout


def test_where_all_directories_lie_too_deep_for_a_socket_a_node_answers_nevertheless(
    host, monkeypatch
):
    """A local socket's path has room for a hundred bytes; a cluster's scratch directories have not."""
    deep = host.root / ("a" * 60) / ("b" * 60)
    deep.mkdir(parents=True)
    deep.chmod(0o700)  # a runtime directory that others can read is none
    host.environment["XDG_RUNTIME_DIR"] = str(deep)
    monkeypatch.setattr(host, "root", deep)
    host.member("a")
    node = host.up("a")
    assert host.mesh("status", "--state", "a").returncode == 0
    control = Path(node_of_state(host.state("a")).control)
    assert control.parent.stat().st_mode & 0o777 == 0o700, "nobody else's"
    node.stop()
    assert not control.exists()


def test_a_node_runs_where_the_directory_of_all_nodes_is_another_users(tmp_path, monkeypatch):
    def refused():
        raise PermissionError("runtime directory is owned by uid 1; set XDG_RUNTIME_DIR instead")

    for module in (storage, process, client):
        monkeypatch.setattr(module, "host_directory", refused)
    state = storage.StateDirectory(tmp_path)
    state.lock()
    state.announce("id", "a", "control.sock")
    assert json.loads((tmp_path / "node.json").read_text())["name"] == "a", "--state finds it"
    state.unlock()
    assert client.running_nodes() == []
    deep = NodeSettings(state=tmp_path / ("a" * 60) / ("b" * 60))
    create_mesh(deep.state)
    path = process._socket_path(deep, load(deep.state))
    assert path.parent == Path(f"/tmp/gossipmesh-{os.getuid()}")
    with contextlib.suppress(OSError):  # another test's socket may be there
        path.parent.rmdir()


def test_a_script_that_does_not_exist_makes_nothing(host):
    is_one_line_for_a_person(host.mesh("run", "--state", "a", *QUIET, "train.py"), 2)
    is_one_line_for_a_person(host.mesh("run", "--state", "a", *QUIET, host.root), 2)
    assert not host.state("a").exists()


def test_a_node_is_told_to_end_before_it_ends_by_itself(monkeypatch, tmp_path):
    """The other way round the signal may find it tidying up, when it obeys none any more."""
    happened = []

    class Process:
        class stdin:
            close = staticmethod(lambda: happened.append("let go"))

        terminate = staticmethod(lambda: happened.append("signal"))
        wait = staticmethod(lambda timeout_s: happened.append("waited"))

    monkeypatch.setattr(launch, "ask", lambda *asked: {"runs": []})
    held = launch.NodeProcess(Process(), RunningNode("id", "a", 1, "", tmp_path))
    held.stop()
    assert happened == ["signal", "let go", "waited"]


def test_a_signal_to_mesh_run_reaches_the_script(host):
    text = (
        "import pathlib, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "pathlib.Path('ready').touch()\n"
        "signal.pause()\n"
    )
    host.member("a")
    with subprocess.Popen(
        host.command("run", "--state", "a", *QUIET, script(host, text)),
        env=host.environment,
        cwd=host.root,
        stderr=subprocess.DEVNULL,
    ) as process:
        until(Path(host.root / "ready").exists, "the script runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 9
