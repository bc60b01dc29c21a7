"""The shell asks real nodes: JSON by its schema, text, through the mesh, codes of what goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mesh
from nodes import questions
from nodes.cli import main
from tests.helpers import DEADLINE_S, Host, NumpyTraining, free_port, until
from tests.schemas import fits
from tests.terminal import Terminal

ASKED = [
    ("status",),
    ("peers",),
    ("peers", "-o", "wide"),
    ("runs",),
    ("events",),
    ("logs",),
    ("ping", "OTHER", "-c", "2"),
    ("bench", "OTHER", "--mb", "2", "--seconds", "1"),
    ("pause",),
    ("resume", "--run", "digits"),
    ("set", "every=5"),
]
"""Every question command; OTHER is the other node's name."""


class Lan:
    """Two machines, as far as gossipmesh can tell; `b` lets others control it. Both train."""

    def __init__(self):
        self.hosts = first, second = Host(), Host()
        second.member("b", first.member("a"))
        port = free_port()
        self.a = first.up("a", "--port", port)
        self.b = second.up("b", "--peer", f"127.0.0.1:{port}", "--allow-control")
        until(lambda: self.a.status()["peers"]["alive"] == 1, "they know each other")
        self.trainings = [NumpyTraining(node, [1.0] * 64) for node in (self.a, self.b)]

    def post(self, training, **figures):
        """One hand-over, by a training that holds an offer; returns the event of the next."""
        training.memory.posted[:] = training.memory.offered
        training.link.send(op="post", want=True, **figures)
        while (event := training.link.receive())["event"] != "offered":
            pass
        return event

    def close(self):
        for training in self.trainings:
            training.close()
        for host in self.hosts:
            host.close()


@pytest.fixture(scope="module")
def lan():
    lan = Lan()
    yield lan
    lan.close()


class Shell:
    """Runs `mesh` in this process, as on one of the two machines."""

    def __init__(self, lan, monkeypatch, capsys):
        self.lan, self._monkeypatch, self._capsys = lan, monkeypatch, capsys
        monkeypatch.delenv("MESH_STATE", raising=False)

    def run(self, machine, *arguments):
        """(exit code, standard output, standard error)"""
        for key in ("HOME", "XDG_RUNTIME_DIR"):
            self._monkeypatch.setenv(key, self.lan.hosts[machine].environment[key])
        code = main([str(a) for a in arguments])
        return (code, *self._capsys.readouterr())

    def json(self, machine, *arguments):
        """The object that a command prints, which is what its schema file says."""
        code, out, err = self.run(machine, *arguments, "--json")
        assert (code, err) == (0, "")
        return fits(json.loads(out))


@pytest.fixture
def shell(lan, monkeypatch, capsys):
    return Shell(lan, monkeypatch, capsys)


# ------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("machine", [0, 1], ids=["its own node", "through the mesh"])
@pytest.mark.parametrize("command", ASKED, ids=" ".join)
def test_a_question_is_answered_as_json_by_its_schema_and_as_text(shell, command, machine):
    """`b` is asked on its own machine, or from the other one."""
    through = ("-N", "b") if machine == 0 else ()
    command = [word.replace("OTHER", "a") for word in command]
    answer = shell.json(machine, *command, *through)
    assert answer.get("node", {"name": "b"})["name"] == "b"
    code, out, err = shell.run(machine, *command, *through)
    assert (code, err) == (0, "")
    assert out.strip()


def test_the_figures_of_the_other_node_come_with_the_probes(lan, shell):
    for step in range(3):
        lan.post(lan.trainings[1], step=700 + step, loss=0.125, samples=64 * step)

    def told():
        [peer] = shell.json(0, "peers")["peers"]
        return [(run["step"], run["loss"]) for run in peer["runs"]] == [(702, 0.125)]

    until(told, "a knows how far b is")
    # Of a core: this process is the training of both.
    until(lambda: shell.json(1, "status")["node"]["cpu"], "b has looked at its processes twice")
    lan.post(lan.trainings[1], step=702, loss=0.125, samples=200)
    until(lambda: shell.json(0, "peers")["peers"][0]["cpu"], "and told a")
    _, out, _ = shell.run(0, "peers")
    assert out.splitlines()[2].split()[:2] == ["b", "alive"]
    assert out.splitlines()[2].split()[6:8] == ["702", "0.125"]
    _, out, _ = shell.run(0, "runs")
    assert [line.split()[-7] for line in out.splitlines()[1:]] == ["a", "b"]


def test_what_is_set_reaches_the_training_with_its_next_offer(lan, shell):
    code, out, _ = shell.run(0, "set", "every=7", "-N", "b")
    assert (code, out) == (0, "b: digits every=7 from its next hand-over on\n")
    assert lan.post(lan.trainings[1], step=1, loss=None, samples=0)["every"] == 7
    assert shell.json(1, "status")["runs"][0]["every"] == 7
    assert shell.run(0, "set", "every=0", "-N", "b")[0] == 2
    assert shell.run(0, "set", "speed=9")[0] == 2


def test_history_is_kept_and_asked_for(lan, monkeypatch):
    monkeypatch.setenv("MESH_STATE", str(lan.a.state))
    lan.post(lan.trainings[0], step=9, loss=0.5, samples=10)
    answer = mesh.question("history", points=100)
    del answer["ok"]
    fits(answer)
    assert answer["runs"][0]["points"][-1][1] in (0, 9)


def test_top_and_plot_of_another_node_are_drawn_as_it_sees_the_mesh(lan, shell):
    for rank, training in enumerate(lan.trainings):
        lan.post(training, step=800 + rank, loss=0.5, samples=900)

    def steps():
        return {row["name"]: row["step"] for row in shell.json(0, "top", "-N", "b")["rows"]}

    until(lambda: steps() == {"a": 800, "b": 801}, "b knows how far a is")
    top = shell.json(0, "top", "-N", "b")
    assert top["node"] == "b"
    assert {row["name"]: row["own"] for row in top["rows"]} == {"a": False, "b": True}
    lines = shell.run(0, "top", "-N", "b")[1].splitlines()
    assert [line.split()[:3] for line in lines[3:]] == [["a", "alive", "800"], ["*", "b", "alive"]]

    plot = shell.json(0, "plot", "-N", "b")
    assert [node["node"]["name"] for node in plot["nodes"]] == ["b", "a"], (
        "the one that is meant first"
    )
    assert all(node["runs"][0]["points"] for node in plot["nodes"])
    code, out, err = shell.run(0, "plot", "-N", "b")
    assert (code, err) == (0, "")
    assert "* b  o a" in out.splitlines()
    code, _, err = shell.run(0, "plot", "-N", "nobody")
    assert (code, "there are: a, b" in err) == (2, True)


def test_a_bench_that_another_node_makes_shows_on_a_terminal_how_far_it_came(lan):
    order = ("bench", "a", "-N", "b", "--mb", "1024", "--seconds", "1")
    with Terminal(*order, **lan.hosts[0].environment) as terminal:
        terminal.until(lambda lines: re.match(r"sending +#+-", lines[0]), "a bar")
        assert terminal.exit_code() == 0
        assert "#" not in "".join(terminal.lines), "it goes when the answer is there"
        assert terminal.lines[0].startswith("b - a  connected in")


def test_events_are_followed_one_object_a_line_until_ctrl_c(lan, shell):
    host = lan.hosts[0]
    with subprocess.Popen(
        host.command("events", "-f", "--json"),
        env=host.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        first = json.loads(process.stdout.readline())
        assert fits(first)["kind"] == "address"
        assert shell.run(0, "resume")[0] == 0
        for line in process.stdout:
            entry = fits(json.loads(line))
            if entry["kind"] == "control" and "digits is resumed" in entry["text"]:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert process.stderr.read() == ""


# -------------------------------------------------------------------------------------- errors


def test_an_error_is_one_line_and_with_json_an_object_too(shell):
    wrong = [
        (("pause", "-N", "a"), 6, "refused", "--allow-control"),
        (("leave", "-N", "a"), 6, "refused", "--allow-control"),
        (("status", "-N", "nobody"), 2, "usage", "there are: a, b"),
        (("ping", "nobody"), 2, "usage", "there are: a, b"),
        (("bench", "b"), 2, "usage", "this node itself"),
        (("pause", "--run", "other"), 2, "usage", "digits"),
    ]
    for command, code, kind, words in wrong:
        returned, out, err = shell.run(1, *command, "--json")
        assert (returned, err.count("\n")) == (code, 1), command
        error = fits(json.loads(out))
        assert error["code"] == kind
        assert words in error["message"]
        assert err == f"mesh: {error['message']}\n"
        assert shell.run(1, *command)[1] == ""


@pytest.mark.parametrize("asked", ["a", "b"])
def test_a_node_is_named_by_the_beginning_of_its_id_but_never_by_so_few_characters(
    lan, shell, asked
):
    """Of its own machine and of the mesh alike: an id's first characters may be anybody's name."""
    node = getattr(lan, asked).status()["node"]["id"]
    for begins in (node[:4], node):
        assert shell.json(0, "status", "-N", begins)["node"]["id"] == node
    code, _, err = shell.run(0, "status", "-N", node[:3])
    assert (code, err) == (
        2,
        f"mesh: no node {node[:3]!r} in this mesh; there are: a, b\n",
    )


def test_a_hung_node_ends_every_command_in_its_time(lan, shell, monkeypatch):
    monkeypatch.setattr(questions, "ANSWER_S", 0.2)
    for name in ("PING_S", "BENCH_SLACK_S"):
        monkeypatch.setattr(questions, name, 0.05)
    os.kill(lan.b.pid, signal.SIGSTOP)
    try:
        code, _, err = shell.run(0, "status", "-N", "b")
        assert code == 5
        assert err.startswith("mesh: b: no answer through the mesh")
        for command in (*ASKED, ("events", "-f"), ("logs", "-f")):
            words = [word.replace("OTHER", "a") for word in command]
            began = time.monotonic()
            code, out, err = shell.run(1, *words)
            assert (code, out) == (5, ""), words
            assert err.startswith("mesh: the node did not answer within")
            assert time.monotonic() - began < 5
        assert shell.run(0, "ping", "b", "-c", "1")[0] in (5, 1), "by now it may be dead"
        code, out, _ = shell.run(1, "ls")
        assert (code, str(lan.b.pid) in out) == (0, True)
    finally:
        os.kill(lan.b.pid, signal.SIGCONT)
    until(lambda: lan.a.status()["peers"]["alive"] == 1, "it refutes")


def test_another_user_of_the_machine_cannot_open_the_socket(lan):
    """Neither where the directory keeps it out, nor where somebody opened that to all."""
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.getuid():
        pytest.skip("needs setpriv, and root to become another user")
    control = Path(lan.a.control)
    code = (
        "import socket\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(control)!r})\n"
        's.sendall(b\'{"op": "status"}\\n\')\n'
        "print(s.recv(100))\n"
    )

    def other_user():
        command = [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"]
        return subprocess.run(
            [*command, sys.executable, "-S", "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )

    modes = {path: path.stat().st_mode & 0o777 for path in (*control.parents[:2], control)}
    assert (modes[control], modes[control.parent]) == (0o600, 0o700)
    try:
        control.parents[1].chmod(0o755)
        shut = other_user()
        for path in modes:
            path.chmod(0o777)
        opened = other_user()
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert "PermissionError" in shut.stderr
    assert "PermissionError" not in opened.stderr, "it came as far as the node"
    assert opened.stdout in ("", "b''\n"), "which hangs up on it"
    assert lan.a.status()["ok"] is True


# ---------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("command", ["status", "peers", "ls"])
def test_a_cold_question_imports_nothing_heavy(lan, command):
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "nodes.cli", command],
        env=lan.hosts[0].environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in completed.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    heavy = {"torch", "trio", "numpy", "rich", "cryptography", "msgpack", "zeroconf"}
    slow = {"asyncio", "dataclasses", "inspect", "subprocess"}
    assert {"mesh", "argparse"} <= loaded
    assert not loaded & (heavy | slow)


# ------------------------------------------------------------------------------------ the end


def test_a_node_that_allows_it_is_stopped_from_elsewhere_and_what_a_kill_left_is_cleaned_up(
    lan, shell
):
    code, out, err = shell.run(0, "leave", "-N", "b")
    assert (code, out, err) == (0, "b stops\n", "")
    assert lan.b.exit_code() == 0
    until(lambda: lan.a.peers() == [], "b said that it left")
    assert shell.run(0, "status", "-N", "b")[0] == 2

    lan.a.kill()
    assert len(lan.hosts[0].leftovers()) == 3
    code, out, err = shell.run(0, "status")
    assert (code, out) == (3, "")
    assert "was killed" in err
    assert "cleaned up" in err
    assert lan.hosts[0].leftovers() == []
    code, out, err = shell.run(0, "status")
    assert code == 3
    assert "cleaned up" not in err
