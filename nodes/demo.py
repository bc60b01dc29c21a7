"""`mesh demo`: several nodes on this machine find each other and learn one model.

Each node is a process with an identity and a state directory of its own; each training another one
(demo_training.py). Everything stays on the loopback interface, in processes and files that end with
the demo, however it ends.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import mesh
from nodes import render, text

NODES_LIMIT: Final = 10
"""Ten classes of digits: an eleventh node would have none of its own."""

START_S: Final = 90.0
"""Importing torch takes 2.3 s on a laptop, several at once on a Raspberry Pi much longer."""

FINISH_S: Final = 30.0
STOP_S: Final = 6.0
REFRESH_S: Final = 0.25
SYNC_S: Final = 30.0
"""How long a node waits for the others before it begins alone: all are on their way here."""

HEADS: Final = [
    "node",
    "classes",
    "step",
    "loss",
    "peers",
    "exchanges",
    "drift",
    "all ten",
    "alone",
]


@dataclass(slots=True)
class Worker:
    """One training, and the node that it started."""

    name: str
    state: Path
    process: "subprocess.Popen[str]"
    classes: list[int] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    stages: set[str] = field(default_factory=set)

    def listen(self) -> None:
        """Takes in what the training prints; runs in a thread until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                self.classes = said.pop("classes", self.classes)
                self.stages.add(said["event"])
                self.latest.update(said)

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Asks its node for the figures of the run."""
        with contextlib.suppress(mesh.MeshError):
            runs = mesh.ask(mesh.find_node(str(self.state)), "status", timeout_s=1.0)["runs"]
            self.status = runs[0] if runs else self.status


def run(nodes: int, seconds: float, *, as_json: bool) -> int:
    """Runs the demo; returns the exit code. Raises MeshError."""
    if not 2 <= nodes <= NODES_LIMIT:
        raise mesh.UsageError(f"--nodes {nodes}: 2..{NODES_LIMIT}, each needs classes of its own")
    if not 0 < seconds <= 86400:
        raise mesh.UsageError(f"--seconds {seconds:g}: more than 0, at most a day")
    if importlib.util.find_spec("sklearn") is None:
        raise mesh.UsageError(
            "the demo's digits need scikit-learn: pip install 'gossipmesh[examples]'"
        )
    with _interruptible(), _workers(nodes) as workers:
        with render.live(HEADS) as draw:
            _until(
                workers, "ready", START_S, draw, f"{nodes} nodes start on the loopback interface"
            )
            for worker in workers:
                worker.tell("go")
            began = time.monotonic()
            while (left := seconds - (time.monotonic() - began)) > 0:
                _refresh(
                    workers,
                    draw,
                    f"{nodes} nodes learn digits, each its own classes; "
                    f"{5 * -int(-left // 5)} s left",
                )
                time.sleep(min(REFRESH_S, left))
            for worker in workers:
                worker.tell("finish")
            _until(workers, "final", FINISH_S, draw, "the last exchanges")
            _refresh(workers, draw, "done")
        report = _report(workers, seconds)
    print(json.dumps(report) if as_json else _summary(report))
    return 0


def _refresh(
    workers: list[Worker], draw: Callable[[str, list[list[str]]], None], title: str
) -> None:
    for worker in workers:
        if worker.process.poll() is not None:
            raise mesh.MeshError(f"{worker.name} ended with {worker.process.returncode}; see above")
        worker.look()
    draw(title, [_row(worker) for worker in workers])


def _until(
    workers: list[Worker],
    stage: str,
    timeout_s: float,
    draw: Callable[[str, list[list[str]]], None],
    title: str,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not all(stage in worker.stages for worker in workers):
        if time.monotonic() > deadline:
            late = ", ".join(w.name for w in workers if stage not in w.stages)
            raise mesh.MeshError(f"{late} did not get to {stage!r} within {timeout_s:.0f} s")
        _refresh(workers, draw, title)
        time.sleep(REFRESH_S)


def _row(worker: Worker) -> list[str]:
    status, exchanges = worker.status, worker.status.get("exchanges", {})
    percent = [worker.latest.get(key) for key in ("accuracy", "alone")]
    return [
        worker.name,
        " ".join(map(str, worker.classes)) or "-",
        f"{status.get('step', 0):,}",
        text.figure(status.get("loss"), ".3f"),
        str(status.get("partners", 0)),
        str(exchanges.get("completed", 0) + exchanges.get("answered", 0)),
        text.figure(status.get("drift"), ".3f"),
        *("-" if value is None else f"{value:.1f} %" for value in percent),
    ]


def _report(workers: list[Worker], seconds: float) -> dict[str, Any]:
    """`mesh.demo/1`. Accuracies are percent on a test set of all ten classes."""
    return {
        "schema": "mesh.demo/1",
        "seconds": seconds,
        "nodes": [
            {
                "name": worker.name,
                "classes": worker.classes,
                "accuracy": round(worker.latest["accuracy"], 2),
                "alone": round(worker.latest["alone"], 2),
                "step": worker.status.get("step"),
                "loss": worker.status.get("loss"),
                "peers": worker.status.get("partners"),
                "exchanges": worker.status.get("exchanges"),
                "drift": worker.status.get("drift"),
                "bytes_sent": worker.status.get("bytes_sent"),
                "bytes_received": worker.status.get("bytes_received"),
            }
            for worker in workers
        ],
    }


def _summary(report: dict[str, Any]) -> str:
    lines = ["accuracy on all ten classes:"]
    for node in report["nodes"]:
        classes = " ".join(map(str, node["classes"]))
        lines.append(
            f"  {node['name']}  {node['accuracy']:.1f} % averaged, {node['alone']:.1f} % alone "
            f"(it saw only {classes}); drift {text.figure(node['drift'], '.3f')}, "
            f"sent {text.size(node['bytes_sent'] or 0)}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end the demo as Ctrl-C does: by cleaning up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _workers(nodes: int) -> Iterator[list[Worker]]:
    """Members of a new mesh, each started; whatever happens, nothing of them stays."""
    workers: list[Worker] = []
    root = Path(tempfile.mkdtemp(prefix="mesh-demo-"))
    try:
        token = ""
        for index in range(nodes):
            name, state = f"demo-{index + 1}", root / f"demo-{index + 1}"
            if index:
                mesh.join_mesh(state, token, name)
            else:
                token = mesh.create_mesh(state, name)
            workers.append(Worker(name=name, state=state, process=_start(index, nodes, state)))
            threading.Thread(target=workers[-1].listen, daemon=True).start()
        yield workers
        for worker in workers:
            worker.tell("bye")
    finally:
        # A second Ctrl-C must not leave half of it behind.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        _stop(workers)
        shutil.rmtree(root, ignore_errors=True)
        signal.signal(signal.SIGINT, before)


def _start(index: int, nodes: int, state: Path) -> "subprocess.Popen[str]":
    settings = mesh.NodeSettings(state=state, interfaces=(_loopback(),))
    about = {
        "index": index,
        "nodes": nodes,
        "sync_timeout_s": SYNC_S,
        "settings": settings.to_json(),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "nodes.demo_training", json.dumps(about)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C reaches the demo alone, which then ends them in order
    )


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _stop(workers: list[Worker]) -> None:
    """Ends trainings, then waits for their nodes, which follow; kills what does not."""
    deadline = time.monotonic() + STOP_S
    for worker in workers:
        if "final" not in worker.stages:
            worker.process.terminate()
        if worker.process.stdin is not None:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
    for worker in workers:
        try:
            worker.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
    for worker in workers:
        _wait_for_node(worker.state, deadline)


def _wait_for_node(state: Path, deadline: float) -> None:
    """A node holds its directory's lock until its last file is gone."""
    with contextlib.suppress(OSError), open(state / "lock", "r+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        with contextlib.suppress(OSError, ValueError, KeyError):
            os.kill(int(json.loads((state / "node.json").read_text())["pid"]), signal.SIGKILL)
