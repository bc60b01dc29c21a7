"""`mesh top` in a pseudo-terminal: the screen is read, and what is left behind of it."""

import json
import re
import signal
from collections import Counter
from xml.etree import ElementTree

import pytest

from nodes import overview, text, top
from nodes.cli import main
from nodes.overview import SORTS, Look, Row, Trails
from tests.helpers import until
from tests.terminal import StandIn, Terminal, large_mesh

rich_console = pytest.importorskip("rich.console")


def row(name, **figures):
    fields = {"id": f"id-{name}", "own": False, "state": "alive", "reason": None, "run": "digits"}
    return Row(**{"name": name, **fields, **figures})


def looked(rows, health=()):
    return Look("a", "lab42xyz", 9.0, list(health), rows)


def drawn(seen, columns, lines, sort="name", trails=None, silence=""):
    """A frame as the text of its lines."""
    view = top.View(sort=sort)
    frame = top.frame(seen, trails or Trails(), view, columns, lines, silence)
    return ["".join(piece for piece, _ in line).rstrip() for line in frame]


@pytest.fixture
def hundred(tmp_path):
    """A node that knows a hundred, of which one is dead and one trains nothing."""
    node = StandIn(tmp_path / "s", large_mesh(100, dead={7}, idle={9}))
    yield node
    node.close()


# ---------------------------------------------------------------------------------- the screen


def test_a_hundred_nodes_are_sorted_scrolled_resized_and_left_behind_as_if_nothing_was(hundred):
    exported = {"COLUMNS": "80", "LINES": "24"}  # as some shells do; the terminal knows better
    with Terminal("top", "--state", hundred.state, "-w", "0.1", **exported) as terminal:
        lines = terminal.shows("1-20 of 100")
        assert lines[0].startswith("mesh lab42xyz  100 nodes: 99 alive, 1 dead")
        assert lines[1] == "health ok"
        assert lines[2].split() == ["NAME", "STATE", "STEP", "LOSS", "DRIFT", "SMP/S", "IN/S", "OUT/S", "CPU"]  # fmt: skip
        assert len(lines) == 24
        assert "connection refused" in "\n".join(lines), "of a dead one the reason"
        assert lines[-1].startswith("q quit  sort name state")
        terminal.until(lambda lines: any(bar in lines[4] for bar in "▅▆▇█"), "its trail moves")

        terminal.press("s")  # the greatest step first
        lines = terminal.until(lambda lines: lines[3].startswith("  node-099"), "sorted by step")
        assert "99,0" in lines[3]
        terminal.press("s")  # and the other way round
        lines = terminal.until(lambda lines: lines[3].startswith("* studio"), "turned round")
        terminal.press("\x1b[F")  # End
        lines = terminal.until(lambda lines: "81-100 of 100" in lines[-1], "scrolled")
        assert [line.split()[0] for line in lines[-3:-1]] == ["node-007", "node-009"], (
            "who knows no step comes last, either way"
        )

        terminal.resize(120, 40)
        lines = terminal.until(lambda lines: "of 100" in lines[39], "the new size is filled")
        assert lines[2].split()[-1] == "CPU"
        terminal.resize(80, 24)
        terminal.until(lambda lines: "of 100" in lines[23], "and the old one")

        hundred.hung = True
        hundred.close()
        terminal.shows("figures are")
        terminal.press("n")  # keys work although the node does not
        terminal.press("\x1b[H")
        terminal.until(lambda lines: lines[3].startswith("  node-001"), "sorted by name")
        terminal.press("q")
        assert terminal.exit_code() == 0
        terminal.is_as_before()


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on_and_ctrl_c_ends_it(hundred):
    with Terminal("top", "--state", hundred.state) as terminal:
        terminal.shows("node-001")
        terminal.press("\x1a")
        until(terminal.stopped, "it is stopped")
        terminal.is_as_before()
        terminal.process.send_signal(signal.SIGCONT)
        terminal.press("l")
        terminal.until(lambda lines: lines[3].startswith("* studio"), "it goes on, by loss")
        terminal.press("\x03")
        assert terminal.exit_code() == 130
        terminal.is_as_before()


def test_a_signal_that_ends_it_gives_the_terminal_back_too(hundred):
    with Terminal("top", "--state", hundred.state) as terminal:
        terminal.shows("node-001")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 128 + signal.SIGTERM
        terminal.is_as_before()


def test_without_a_node_it_says_so_and_touches_no_terminal(tmp_path):
    with Terminal("top", "--state", tmp_path) as terminal:
        assert terminal.exit_code() == 3
        assert "\x1b" not in terminal.said.decode()
        assert "mesh up" in "".join(terminal.lines)


# ------------------------------------------------------------------------- without a terminal


def test_without_a_terminal_the_table_is_plain_lines_or_json(hundred, capsys):
    assert main(["top", "--state", str(hundred.state), "--sort", "drift"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 103
    assert lines[3].split()[:2] == ["node-099", "alive"]
    assert "\x1b" not in "".join(lines)

    assert main(["top", "--state", str(hundred.state), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "mesh.top/1"
    assert Counter(row["state"] for row in answer["rows"]) == {"alive": 99, "dead": 1}
    assert [row["name"] for row in answer["rows"] if row["own"]] == ["studio"]


def test_a_picture_shows_what_the_screen_would(hundred, tmp_path, capsys):
    path = tmp_path / "top.svg"
    assert main(["top", "--state", str(hundred.state), "--svg", str(path)]) == 0
    words = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
    assert all(name in words for name in ("mesh top", "studio", "node-099", "connection refused"))
    links = set(re.findall(r"https?://[^\"' ]*", path.read_text()))
    assert links <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}, (
        "nothing is fetched"
    )
    assert main(["top", "--state", str(hundred.state), "--svg", str(tmp_path)]) == 2
    assert "--svg" in capsys.readouterr().err
    assert main(["top", "--state", str(hundred.state), "-w", "0"]) == 2


# -------------------------------------------------------------------------------------- a frame


@pytest.mark.parametrize("columns", [60, 80, 81, 100, 200])
def test_no_line_is_wider_than_the_terminal(columns):
    rows = [
        row("日本語-" * 8, run="a", step=123_456_789, loss=1234.5678, drift=1e-7, samples_s=1e6),
        row("long" * 8, run="b" * 64, in_bytes_s=123456789.0, out_bytes_s=999.6, cpu=15.99),
    ]
    trails = Trails()
    trails.follow(rows)
    lines = drawn(looked(rows), columns, 10, trails=trails)
    limit = max(columns, overview.FIXED_WIDTH + overview.NAME_LEAST)
    for line in lines[2:-1]:
        assert text.width(line) <= limit, line
    assert len(lines) == 10


def test_runs_are_named_where_there_are_several():
    one = looked([row("a"), row("b")])
    two = looked([row("a"), row("b", run="names")])
    assert "RUN" not in drawn(one, 100, 10)[2]
    lines = drawn(two, 100, 10)
    assert "RUN" in lines[2]
    assert lines[4].split()[:3] == ["b", "names", "alive"]


def test_every_column_sorts_and_who_knows_nothing_comes_last():
    low = row("low", step=1, loss=1.0, drift=1.0, samples_s=1.0, in_bytes_s=1.0, out_bytes_s=1.0, cpu=0.1)  # fmt: skip
    high = low._replace(name="high", id="id-high", step=2, loss=2.0, drift=2.0, samples_s=2.0, in_bytes_s=2.0, out_bytes_s=2.0, cpu=0.2, state="suspect")  # fmt: skip
    none = row("none", run=None, state="dead", reason="gone")
    for sort in SORTS:
        names = [one.name for one in overview.ordered([none, low, high], sort)]
        turned = [one.name for one in overview.ordered([none, low, high], sort, turned=True)]
        match sort:
            case "name":
                assert names == ["high", "low", "none"]
            case "state":
                assert names == ["low", "high", "none"]
            case _:
                assert names == ["high", "low", "none"]
                assert turned == ["low", "high", "none"]


def test_the_screen_says_what_is_wrong_and_when_its_figures_are_old():
    seen = looked([row("a")], health=["pi refused TCP: run `mesh doctor`", "more"])
    assert drawn(seen, 100, 10)[1] == (
        "health pi refused TCP: run `mesh doctor` (and 1 more: mesh status)"
    )
    assert drawn(seen, 100, 10, silence="figures are 5.0 s old")[1] == "figures are 5.0 s old"


def test_trails_hold_what_fits_a_screen_and_go_with_their_rows():
    trails = Trails()
    for step in range(1000):
        trails.follow([row("a", step=step, loss=float(step)), row("b", step=7, loss=1.0)])
    assert len(trails.losses(row("a"))) == overview.TRAIL_LIMIT
    assert trails.losses(row("a"))[-1] == 999.0
    assert trails.losses(row("b")) == [1.0], "a run that stands still draws nothing"
    trails.follow([row("a", step=1)])
    assert trails.losses(row("b")) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (18_400, "18.4k"),
        (123_456, "123k"),
        (1.2e6, "1.2M"),
        (3e15, "3000.0T"),
    ],
)
def test_a_number_is_short(value, shown):
    assert overview.short(value) == shown


def test_a_name_in_brackets_is_shown_as_it_is(tmp_path, capsys):
    answers = large_mesh(3, names={1: "[red]$(date)", 2: "[/]"})
    node = StandIn(tmp_path / "s", answers)
    with Terminal("top", "--state", node.state, NO_COLOR="1") as terminal:
        lines = terminal.shows("[/]")
        assert any(line.startswith("  [red]$(date) alive") for line in lines)
        assert "\x1b[31" not in terminal.said.decode()
        terminal.press("q")
        assert terminal.exit_code() == 0
    node.close()
