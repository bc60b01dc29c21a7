"""`mesh shell`: lines typed into a pseudo-terminal, or piped in."""

import shlex
import signal
import stat
import subprocess
import sys

import pytest

import mesh
from nodes import grammar, repl
from nodes.cli import _parser, execute
from tests.helpers import Host
from tests.terminal import StandIn, Terminal, large_mesh


@pytest.fixture
def studio(tmp_path):
    node = StandIn(tmp_path / "s", large_mesh(3))
    node.runtime = tmp_path / "run"
    node.runtime.mkdir(mode=0o700)
    node.list_among_nodes(node.runtime)
    yield node
    node.close()


def test_lines_are_commands_and_no_mistake_ends_it(studio):
    at = {"columns": 100, "lines": 40, "XDG_RUNTIME_DIR": str(studio.runtime)}
    with Terminal("shell", "--state", studio.state, **at) as terminal:
        terminal.shows("mesh>")
        terminal.press("nonsense\r")
        terminal.shows("invalid choice: 'nonsense'")
        terminal.press("half a line")
        terminal.shows("mesh> half a line")
        terminal.process.send_signal(signal.SIGINT)  # as Ctrl-C does: the line is given up
        terminal.until(lambda lines: [x for x in lines if x][-1] == "mesh>", "a new prompt")
        terminal.press('join "mesh1-aaaa\r')
        terminal.shows("No closing quotation")
        terminal.press("version\r")
        terminal.shows(f"node studio runs {mesh.__version__}")
        terminal.press("comp\tba\t\r")  # completes both words
        terminal.shows("complete -o default -F _mesh mesh")
        terminal.press("\x04")  # Ctrl-D leaves
        assert terminal.exit_code() == 0

    history = studio.state / repl.HISTORY_FILE
    assert history.read_text().splitlines()[-2:] == ["version", "completion bash "]
    assert "mesh1-" not in history.read_text(), "a token is not kept"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    with Terminal("shell", "--state", studio.state, **at) as terminal:
        terminal.shows("mesh>")
        terminal.press("\x1b[A\x1b[A\r")  # the last but one of the time before
        terminal.shows("node studio runs")
        terminal.press("status --loud\r")
        terminal.shows("--loud")
        terminal.press("quit\r")
        assert terminal.exit_code() == 2, "as the last command"


def test_python_has_the_questions_at_hand(studio):
    with Terminal("shell", "--python", "--state", studio.state, columns=100) as terminal:
        terminal.shows(">>>")
        terminal.press("[peer['name'] for peer in peers()['peers']]\r")
        terminal.shows("['node-001', 'node-002']")
        terminal.press("status()['mesh'], mesh.__version__\r")
        terminal.shows(f"({{'id': 'lab42xyz'}}, '{mesh.__version__}')")
        terminal.press("1/0\r")
        terminal.shows("ZeroDivisionError")
        terminal.press("\x04")
        assert terminal.exit_code() == 0


def test_piped_lines_are_run_without_a_prompt_and_leave_no_history(tmp_path, capsys, monkeypatch):
    said = _piped(
        ["version", "mesh version --json  # a comment", "", "help version", "dance"], tmp_path
    )
    assert said.returncode == 2, "the last line's"
    assert said.stdout.startswith(f"gossipmesh {mesh.__version__}")
    assert "mesh.version/1" in said.stdout
    assert "usage: mesh version" in said.stdout
    assert "mesh> " not in said.stdout
    assert not list(tmp_path.rglob(repl.HISTORY_FILE))


def _piped(lines, folder):
    host = Host()
    try:
        return subprocess.run(
            [sys.executable, "-m", "nodes.cli", "shell", "--state", str(folder)],
            input="\n".join(lines),
            env=host.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        host.close()


def test_a_command_that_fails_is_said_and_the_shell_stays(capsys):
    def main(words):
        raise OSError("disk full") if words == ["version"] else KeyError(words)

    lines = repl.Lines(main, grammar.read(_parser()), {})
    assert lines.onecmd("version") is False
    assert capsys.readouterr().err == "mesh: disk full\n"
    with pytest.raises(KeyError):
        lines.onecmd("token")  # a bug of ours is not swallowed
    assert lines.onecmd("shell") is False, "no shell within a shell"
    assert lines.code == 2
    assert lines.onecmd("exit") is True


def test_words_are_completed_from_the_same_grammar(monkeypatch):
    lines = repl.Lines(execute, grammar.read(_parser()), {})
    assert lines.completenames("vers") == ["version "]
    assert lines.completedefault("--j", "status --j", 7, 10) == ["--json "]
    assert lines.completedefault("z", "completion z", 11, 12) == ["zsh "]
    monkeypatch.setattr(grammar, "names", lambda: ["pi4", "pi of ada; x"])
    offered = lines.completedefault("pi", "status -N pi", 10, 12)
    assert [shlex.split(word) for word in offered] == [["pi4"], ["pi of ada; x"]]


def test_the_node_that_the_shell_was_started_for_is_meant_by_every_line():
    heard = []
    given = {"--state": "/s", "--node": "pi4"}
    lines = repl.Lines(lambda words: heard.append(words) or 0, grammar.read(_parser()), given)
    for line in ("peers -w", "status -N pi5", "run --state=/t x.py -N y", "version", "token"):
        lines.onecmd(line)
    assert heard == [
        ["peers", "--state", "/s", "-N", "pi4", "-w"],
        ["status", "--state", "/s", "-N", "pi5"],
        ["run", "--state=/t", "x.py", "-N", "y"],
        ["version"],
        ["token", "--state", "/s"],
    ]
