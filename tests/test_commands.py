"""Every command against two real nodes that train: its text against a snapshot, how it repeats, and
the JSON of those that test_questions_real.py does not ask.

GOSSIPMESH_SNAPSHOTS=write writes tests/command_snapshots.txt anew.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyte
import pytest
from jsonschema import Draft202012Validator

import mesh
from nodes import watch
from nodes.cli import COMMANDS
from tests.helpers import DEADLINE_S, REPOSITORY, Host, NumpyTraining, until
from tests.schemas import SCHEMAS, fits
from tests.terminal import Terminal
from tests.test_tidy import HEAVY, SLOW_TO_ASK, loaded_by

SNAPSHOTS = Path(__file__).parent / "command_snapshots.txt"


class Trainings:
    """Two nodes that train one run, `studio` and `pi4`."""

    def __init__(self, host):
        self.host = host
        self.nodes = host.up_together("studio", "pi4")
        self.trainings = [NumpyTraining(node, np.full(64, rank)) for rank, node in enumerate(self.nodes)]  # fmt: skip
        for step in (8, 16):
            for training in self.trainings:
                training.link.send(op="post", step=step, samples=8 * step, loss=2 / step, waits=False, want=True)  # fmt: skip
                until(lambda: (training.link.receive() or {}).get("event") == "offered", "an offer")  # noqa: B023
        studio, pi4 = self.nodes
        until(lambda: self.known(studio) and self.known(pi4), "each knows how the other does")

    @staticmethod
    def known(node):
        return [run["step"] for peer in node.peers() for run in peer["runs"]] not in ([], [None])

    def close(self):
        for training in self.trainings:
            training.close()
        self.host.close()


@pytest.fixture(scope="module")
def trainings():
    with contextlib.closing(Trainings(Host())) as running:
        yield running


@pytest.fixture
def shell(trainings, monkeypatch, command):
    """Runs a command as a user of this node; see conftest's `command`."""
    for key in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(key, trainings.host.environment[key])
    monkeypatch.setenv("MESH_STATE", str(trainings.nodes[0].state))
    monkeypatch.chdir(trainings.host.root)
    return command


# -------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_one_and_says_whose_it_is(name):
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    assert f"{schema['title'].replace('/', '.')}.json" == name
    assert schema["properties"]["schema"] == {"const": schema["title"]}
    assert "schema" in schema["required"]


def test_every_schema_that_the_code_names_is_written_down():
    sources = [p for folder in ("mesh", "nodes") for p in (REPOSITORY / folder).rglob("*.py")]
    named = {n for path in sources for n in re.findall(r'"(mesh\.\w+/1)"', path.read_text())}
    files = {schema["title"] for schema in SCHEMAS.values()}
    assert named - files == {"mesh.checkpoint/1"}, "which is a file's, not an answer's"
    assert files <= named


ANSWERS = {
    "mesh.ls/1": ("ls",),
    "mesh.top/1": ("top",),
    "mesh.plot/1": ("plot",),
    "mesh.version/1": ("version",),
}


@pytest.mark.parametrize(("name", "arguments"), ANSWERS.items(), ids=lambda value: str(value[0]))
def test_an_answer_fits_its_schema(shell, name, arguments):
    code, out, err = shell(*arguments, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1, "one object a line"
    answer = fits(json.loads(out), name)
    match answer:
        case {"rows": rows}:
            assert [row["name"] for row in rows] == ["pi4", "studio"]
            assert all(row["step"] for row in rows)
        case {"schema": "mesh.plot/1", "nodes": nodes}:
            assert sorted(node["node"]["name"] for node in nodes) == ["pi4", "studio"]
            assert all(run["points"] for node in nodes for run in node["runs"])
        case {"schema": "mesh.version/1", "nodes": nodes}:
            assert {node["version"] for node in nodes} == {mesh.__version__}


# ------------------------------------------------------------------------------------------ text

TEXTS = [
    "status",
    "peers -o wide",
    "runs",
    "logs --limit 2",
    "ping pi4 -c 2",
    "bench pi4 --mb 0.1 --seconds 1",
    "pause",
    "resume",
    "set every=8",
    "ls",
    "top",
    "version",
    "status -N nobody",
]


def normalised(text, trainings):
    """Without what differs from run to run: numbers, sizes and times are N, and so is what is not
    known yet."""
    studio = trainings.nodes[0].status()
    for name in ("studio", "pi4"):
        text = text.replace(str(trainings.host.state(name)), f"/{name}")
    for node in trainings.nodes:
        text = text.replace(node.id[:8], "NODEID")
    text = text.replace(studio["mesh"]["id"], "MESHID").replace(mesh.__version__, "VERSION")
    text = text.replace(", ".join(studio["node"]["addresses"]), "ADDRESSES")
    for pattern, instead in (
        (r"\d\d:\d\d:\d\d", "TIME"),
        (r"127\.0\.0\.1:\d+", "HOST:PORT"),
        (r"Python .*", "SYSTEM"),
        (r"[▁▂▃▄▅▆▇█]", ""),
        (r"(?<=average) .*?;", " LAST;"),
        (r"\b\d[\d,.]*(e[-+]\d+)?", "N"),
        (r"N ?([kMG]?B|[kMG]|ms|s|%)(?![a-z])", "N"),
        (r"(?<= )-(?= |$)", "N"),
        (r"N \(N of the weights' norm\)", "N"),
        (r" +", " "),
        (r" +$", ""),
    ):
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text.rstrip("\n")


def test_what_commands_print_is_as_it_was(shell, trainings):
    said = ""
    for line in TEXTS:
        _, out, err = shell(*line.split())
        assert "\x1b" not in out
        said += f"$ mesh {line}\n{normalised(out + err, trainings)}\n\n"
    if os.environ.get("GOSSIPMESH_SNAPSHOTS") == "write":
        SNAPSHOTS.write_text(said)
    assert said == SNAPSHOTS.read_text()


def test_a_plot_is_a_chart_or_a_picture(shell, trainings, monkeypatch):
    code, out, err = shell("plot")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "loss"
    assert "drift" in lines
    assert "* studio  o pi4" in lines
    assert "\x1b" not in out

    picture = trainings.host.root / "curves.svg"
    pytest.importorskip("matplotlib")
    assert shell("plot", "--output", picture)[0] == 0
    assert b"<svg" in picture.read_bytes()
    code, _, err = shell("plot", "-o", trainings.host.root / "curves.docx")
    assert (code, err.count("\n")) == (2, 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = shell("plot", "-o", picture)
    assert code == 2
    assert "pip install 'gossipmesh[plots]'" in err
    assert shell("plot", "--run", "other")[0] == 1


PLAIN = ["status", "peers -o wide", "runs", "events", "logs", "ls", "ping pi4 -c 1", "bench pi4 --mb 0.1", "set every=8", "resume", "version", "completion names", "top", "top --json"]  # fmt: skip


def test_plain_commands_import_nothing_heavy(trainings):
    """All in one interpreter."""
    host = trainings.host
    loaded = loaded_by(
        f"from nodes.cli import main; assert not any(main(x.split()) for x in {PLAIN})",
        env={**host.environment, "MESH_STATE": str(trainings.nodes[0].state)},
    )
    assert {"mesh", "argparse", "nodes"} <= loaded
    assert not loaded & (HEAVY | SLOW_TO_ASK | {"matplotlib"})


# ------------------------------------------------------------------------------------- repeating


@contextlib.contextmanager
def started(trainings, *arguments):
    """A command whose output is a pipe."""
    host = trainings.host
    with subprocess.Popen(
        host.command(*arguments),
        cwd=host.root,
        env={**host.environment, "MESH_STATE": str(trainings.nodes[0].state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_watched_command_prints_one_object_a_line_until_ctrl_c(trainings):
    with started(trainings, "status", "--json", "-w", 0.1) as process:
        for _ in range(3):
            fits(json.loads(process.stdout.readline()), "mesh.status/1")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize("command", ["peers", "top"])
def test_a_watched_command_ends_with_its_reader_before_the_next_answer(trainings, command):
    with started(trainings, command, "-w", 3600) as process:
        assert process.stdout.readline() != ""
        began = time.monotonic()
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0
        assert time.monotonic() - began < DEADLINE_S
        assert process.stderr.read() == ""


def test_on_a_terminal_a_watched_command_draws_over_its_last_answer(trainings):
    at = {**trainings.host.environment, "MESH_STATE": str(trainings.nodes[0].state)}
    with Terminal("peers", "-w", "0.1", columns=60, lines=10, **at) as terminal:
        terminal.until(lambda lines: terminal.said.count(b"\x1b[H") >= 3, "three frames")
        assert sum("NAME" in line for line in terminal.lines) == 1
        assert "studio" in terminal.lines[1]
        assert terminal.lines[3] == "", "a line that is too long is cut"
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.exit_code() == 130
        assert b"Traceback" not in terminal.said


def test_an_answer_that_is_too_high_is_cut_and_says_so():
    size = os.terminal_size((40, 6))
    screen = pyte.Screen(*size)
    stream = pyte.Stream(screen)
    stream.feed("left over " * 24)
    for count in (3, 9, 2):
        text = watch.frame([f"line {k}" for k in range(count)], size, first=False)
        stream.feed(text.replace("\n", "\r\n"))
        shown = [line.rstrip() for line in screen.display]
        match count:
            case 9:
                assert shown[3:] == [
                    "line 3",
                    "... 5 more lines: make the terminal higher"[:40],
                    "",
                ]
            case _:
                assert shown == [f"line {k}" for k in range(count)] + [""] * (6 - count)


def test_a_watched_command_ends_when_its_question_fails(trainings, shell):
    assert shell("status", "-N", "nobody", "-w", 1)[0] == 2
    code, out, err = shell("status", "-w", 0.01)
    assert (code, out) == (2, "")
    assert "--watch 0.01" in err


def test_every_command_is_in_the_manual():
    manual = (REPOSITORY / "docs/shell.md").read_text()
    assert [name for name in COMMANDS if f"`mesh {name}" not in manual] == []
