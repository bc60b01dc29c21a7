"""The lab cleans up after itself, after a failure half-way and after test processes that died."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lan.lab import PREFIX, Lab, Machine, NoLab, until


def open_lab(lab: Lab) -> Lab:
    try:
        return lab.__enter__()
    except NoLab as error:
        pytest.skip(str(error))


def namespaces() -> str:
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return listed.stdout


def test_a_lab_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path, 2)
    first, second = lab.machines

    def fail(machine: Machine) -> float:
        if machine is second:
            raise RuntimeError("half-way")
        return 0.0

    monkeypatch.setattr(Machine, "give_address", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        open_lab(lab)
    assert first.namespace not in namespaces()
    assert second.namespace not in namespaces()


def test_a_lab_removes_what_a_dead_test_process_left(tmp_path: Path) -> None:
    open_lab(Lab(tmp_path, 0)).close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = f"{PREFIX}-{dead.pid}-1"
    subprocess.run(["ip", "netns", "add", stale], check=True)
    with subprocess.Popen(["ip", "netns", "exec", stale, "sleep", "60"]) as orphan:
        inside = ["ip", "netns", "pids", stale]
        until("it runs", lambda: subprocess.check_output(inside), within_s=5.0)
        open_lab(Lab(tmp_path, 0)).close()
        assert orphan.wait(5) == -signal.SIGKILL
    assert stale not in namespaces()
