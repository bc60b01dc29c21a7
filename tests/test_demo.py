"""`mesh demo` as a person runs it: real processes, real mDNS on the loopback interface."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.schemas import fits

DEMO = [sys.executable, "-m", "nodes.cli", "demo"]
pytest.importorskip("sklearn", reason="the demo's digits need scikit-learn")


def environment(tmp_path):
    """A temporary directory of its own, so that what the demo leaves behind can be seen."""
    (tmp_path / "run").mkdir(mode=0o700)
    places = {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    return {**os.environ, **places, "HOME": str(tmp_path)}


def left_over(tmp_path):
    """Processes and files that mention the demo's own temporary directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(tmp_path).encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    files = [str(path) for path in tmp_path.rglob("*") if path.is_file() or path.is_socket()]
    return found, files


def test_three_nodes_that_each_know_some_digits_learn_all_ten(tmp_path):
    demo = subprocess.run(
        [*DEMO, "--seconds", "10", "--json"],
        check=False,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert demo.returncode == 0, demo.stderr
    report = fits(json.loads(demo.stdout), "mesh.demo/1")
    assert sorted(label for node in report["nodes"] for label in node["classes"]) == list(range(10))
    for node in report["nodes"]:
        assert node["accuracy"] > 92, report
        assert node["alone"] < 45, report
        assert node["peers"] == 2, report
        assert node["bytes_sent"] > 0, report
    assert left_over(tmp_path) == ([], [])


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("after_s", [0.05, 0.6, 2.0, 5.0, 9.0])
def test_ctrl_c_at_any_time_leaves_no_process_and_no_file_behind(tmp_path, after_s):
    demo = subprocess.Popen(
        [*DEMO, "--seconds", "30"],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            demo.wait(after_s)
        demo.send_signal(signal.SIGINT)
        errors = demo.communicate(timeout=20)[1]
    finally:
        demo.kill()
    if after_s > 0.3:  # before that it is Python itself that is interrupted, while it imports
        assert "Traceback" not in errors
        assert demo.returncode == 130
    deadline = time.monotonic() + 2
    while left_over(tmp_path) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_over(tmp_path) == ([], [])


@pytest.mark.parametrize("flags", [["--nodes", "1"], ["--nodes", "11"], ["--seconds", "0"]])
def test_impossible_demos_are_refused_with_what_is_possible(flags):
    demo = subprocess.run([*DEMO, *flags], check=False, capture_output=True, text=True, timeout=20)
    assert demo.returncode == 2
    assert flags[0] in demo.stderr
    assert "Traceback" not in demo.stderr
