"""A machine of a benchmark's own: nodes and trainings as real processes on loopback, then nothing of it.

Rules: 1. Home, runtime directory and state are a temporary directory, which goes with the machine.
2. A node listens on `lo` and asks nobody else. 3. However a benchmark ends, Ctrl-C included, each
process is ended by its own pid and waited for. A process's trip: spawn() -> told lines on its standard
input, answers JSON lines -> close() closes that input, which every one of them takes for its end.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mesh.client import RunningNode, ask, node_of_state
from mesh.errors import MeshError
from mesh.identity import create_mesh, join_mesh
from mesh.settings import NodeSettings, parse_address

REPOSITORY = Path(__file__).parent.parent
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
START_S = 60.0
"""Importing torch takes 2 s, on a busy machine several times that."""

STOP_S = 5.0
LOOK_S = 0.005


class Process:
    """One process, started here and ended by its pid."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        with open(log, "ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,  # Ctrl-C reaches the benchmark, which ends them in order
            )
        self._log = log
        self.pid = self._process.pid

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next thing it says. Raises RuntimeError with its last words if it ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"a process of the benchmark ended; its last words:\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.hear()

    def each_line(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hands everything that it says from now on to `take`, in a thread."""

        def listen() -> None:
            with contextlib.suppress(RuntimeError):
                while True:
                    take(self.hear())

        threading.Thread(target=listen, daemon=True).start()

    def ask_to_end(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def end(self, by: float) -> None:
        """Waits until `by`, on the monotonic clock; then ends it."""
        try:
            self._process.wait(max(0.0, by - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Machine:
    """Use machine(), which takes it away again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        runtime = root / "run"
        runtime.mkdir(mode=0o700)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MESH_", "XDG_"))},
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(root),
            "XDG_RUNTIME_DIR": str(runtime),
            # As mesh/__main__.py does, for nodes that are started in another way.
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._token = ""
        self._processes: list[Process] = []

    def member(self, name: str) -> Path:
        """A state directory of this machine's one mesh."""
        state = self.root / name
        if self._token:
            join_mesh(state, self._token, name)
        else:
            self._token = create_mesh(state, name)
        return state

    def spawn(self, *arguments: str) -> Process:
        process = Process(list(arguments), self.environment, self.root / "log")
        self._processes.append(process)
        return process

    def node(
        self,
        name: str,
        *,
        peer: RunningNode | None = None,
        mdns: bool = False,
        module: str = "mesh",
    ) -> tuple[RunningNode, Process]:
        """A node that is up and knows `peer`; `module` runs it in place of `python -m mesh`."""
        state = self.member(name)
        peers = () if peer is None else (parse_address(addresses_of(peer)[0]),)
        settings = NodeSettings(state=state, interfaces=(LOOPBACK,), mdns=mdns, peers=peers)
        process = self.spawn("-m", module, settings.to_json())
        until(lambda: _is_up(state, process.pid), f"{name} is up")
        running = node_of_state(state)
        if peer is not None:
            until(lambda: alive(running) > 0, "they know each other")
        return running, process

    def starting_trainee(self, state: Path | None, **about: Any) -> Process:
        """A training (trainee.py) that speaks once it has its first weights, from the node of
        `state`; None: it trains alone."""
        where = None if state is None else str(state)
        return self.spawn("-m", "benchmarks.trainee", json.dumps({"state": where, **about}))

    def trainee(self, state: Path | None, **about: Any) -> Process:
        """One that has begun."""
        process = self.starting_trainee(state, **about)
        process.hear()
        return process

    def close(self) -> None:
        # Trainings first: they were started after their nodes.
        for process in reversed(self._processes):
            process.ask_to_end()
        by = time.monotonic() + STOP_S
        for process in reversed(self._processes):
            process.end(by)
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """Whatever happens, no process and no file of it stays."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    own = Machine(Path(tempfile.mkdtemp(prefix="mesh-")))  # short: a local socket's path is
    try:
        yield own
    finally:
        impatient = signal.signal(signal.SIGINT, signal.SIG_IGN)
        own.close()
        signal.signal(signal.SIGINT, impatient)
        signal.signal(signal.SIGTERM, before)


def _is_up(state: Path, pid: int) -> bool:
    with contextlib.suppress(MeshError):
        return node_of_state(state).pid == pid
    return False


def status(node: RunningNode) -> dict[str, Any]:
    return ask(node, "status", timeout_s=START_S)


def alive(node: RunningNode) -> int:
    """How many others this node lists as alive."""
    return int(status(node)["peers"]["alive"])


def run_of(node: RunningNode) -> dict[str, Any]:
    """The one run of a node, as `mesh status` shows it."""
    run: dict[str, Any] = status(node)["runs"][0]
    return run


def addresses_of(node: RunningNode) -> list[str]:
    addresses: list[str] = status(node)["node"]["addresses"]
    return addresses


def until(condition: Callable[[], object], what: str, timeout_s: float = START_S) -> float:
    """Waits until it is true; returns how long that took, in seconds."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise RuntimeError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(LOOK_S)
    return time.monotonic() - began


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, of user and kernel; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def stopped(*processes: Process) -> Iterator[None]:
    """They take no time meanwhile (SIGSTOP)."""
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
