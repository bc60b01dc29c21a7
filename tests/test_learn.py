"""`mesh sim SCRIPT`: what is printed and drawn of reports, whatever becomes of the picture."""

import errno
import json
import math
import os

import pytest

import mesh
from mesh.learning_report import Accuracy, LearningReport, Look, NodeHistory
from nodes import drawing
from nodes.cli import main
from tests.schemas import fits


def report(drift=0.5, loss=0.25, averaged=0.9):
    history = NodeHistory(
        rank=1,
        newcomer=False,
        killed=False,
        attacker=False,
        steps=2,
        losses=((1, loss), (2, loss)),
        bytes_sent=400,
        bytes_received=400,
        exchanges=1,
        answered=0,
        broken=0,
    )
    looked = Accuracy(mean=0.8, worst=0.7, averaged=averaged)
    return LearningReport(
        seed=1,
        nodes=1,
        strategy="pair",
        entries=100,
        histories=(history,),
        looks=(Look(step=2.0, virtual_s=1.0, drift=drift, accuracy=looked),),
        weights={},
        digest="d",
        virtual_s=1.0,
        wall_s=1.0,
    )


class Simulated:
    """What a script is simulated to, and how often it was."""

    def __init__(self):
        self.times = 0
        self.report = report()

    def __call__(self, *arguments, **about):
        self.times += 1
        if isinstance(self.report, Exception):
            raise self.report
        return self.report


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mesh, "simulate_script", Simulated(), raising=False)
    return mesh.simulate_script


SIM = ("sim", "-n", "1")


def test_what_is_not_finite_is_null_in_json(simulated, command, monkeypatch):
    monkeypatch.setattr(drawing, "possible", lambda: False)
    simulated.report = report(drift=math.nan, loss=math.inf, averaged=math.nan)
    code, out, _ = command(*SIM, "--json", "train.py")
    [figures] = fits(json.loads(out, parse_constant=pytest.fail))["strategies"].values()
    assert (code, figures["drift"], figures["loss"], figures["averaged"]) == (0, None, None, None)
    assert command(*SIM, "train.py")[0] == 0


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["table", "json"])
def test_a_picture_that_cannot_be_written_costs_no_answer(simulated, command, monkeypatch, flags):
    def full(reports, out):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(drawing, "possible", lambda: True)
    monkeypatch.setattr(drawing, "picture", full)
    code, out, err = command(*SIM, *flags, "train.py")
    assert code == 0, "nobody asked for it"
    assert "mesh: cannot draw train-sim.png: Read-only file system" in err
    assert "0.9" in out
    pytest.importorskip("matplotlib")
    code, out, err = command(*SIM, *flags, "-o", "curves.png", "train.py")
    assert code == 1
    assert "0.9" in out
    assert "curves.png: Read-only file system" in err


def test_where_to_draw_is_checked_before_anything_runs(simulated, command):
    pytest.importorskip("matplotlib")
    for given in ("nowhere/a.png", "curves.docx", "/dev/null", "-"):
        code, out, err = command(*SIM, "-o", given, "train.py")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"mesh: -o {given}: ")
    assert simulated.times == 0
    assert command(*SIM, "-o", "curves.svg", "train.py")[0] == 0


def test_a_flag_of_scripts_without_one_is_a_mistake(command):
    for flag, value in (("-o", "x.png"), ("--strategies", "pair"), ("--evaluate", "score")):
        code, out, err = command("sim", flag, value)
        assert (code, out) == (2, "")
        assert err.startswith(f"mesh: {flag} {value}: ")


def test_an_error_of_the_system_is_an_object_too(simulated, command):
    simulated.report = OSError(errno.EMFILE, "Too many open files")
    code, out, err = command(*SIM, "--json", "train.py")
    assert (code, fits(json.loads(out))["code"]) == (1, "error")
    assert "Too many open files" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_is_said_once(simulated, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "possible", lambda: False)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main([*SIM, "--json", "train.py"]) == 1
    assert capsys.readouterr().err.count("No space left on device") == 1
