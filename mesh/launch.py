"""Starts a node process and holds it: for `mesh run` and for trainings that find none up.

The node ends when its holder does, however that ends: its standard input is a pipe that only the
holder keeps open.
"""

import contextlib
import os
import subprocess
import sys
import time
from typing import Final

from mesh.client import RunningNode, node_of_state
from mesh.errors import MeshError, NodeNotRunning
from mesh.settings import NodeSettings

START_S: Final = 20.0
"""A node is up in 0.4 s; a Raspberry Pi with a cold disk takes some seconds."""

STOP_S: Final = 8.0
LOG_TAIL: Final = 500


class NodeProcess:
    """A node that lives as long as this object is not stopped, at most as long as this process."""

    def __init__(self, process: "subprocess.Popen[bytes]", running: RunningNode) -> None:
        self._process = process
        self.running = running

    def release(self) -> None:
        """Lets the node go: it ends by itself, after whatever it was told to linger."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.stdin = None

    def stop(self) -> None:
        """Ends the node politely; waits until it is gone."""
        self.release()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def make_mesh_if_none(settings: NodeSettings) -> None:
    """Makes a new closed mesh where this machine is in none, and prints how others join it."""
    from mesh.identity import create_mesh, is_member  # cryptography costs 60 ms: only when needed

    if not is_member(settings.state):
        token = create_mesh(settings.state, settings.name)
        print(f"mesh: new mesh; on the other machines run:\n  mesh join {token}", file=sys.stderr)


def start_node(settings: NodeSettings) -> NodeProcess:
    """Starts a node and waits until it answers. Raises MeshError with what it said if it cannot."""
    log = settings.state / "node.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mesh", settings.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # a Ctrl-C is for the training; the node follows its lifeline
        )
    deadline = time.monotonic() + START_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(NodeNotRunning):
                running = node_of_state(settings.state)
                if running.pid == process.pid:
                    return NodeProcess(process, running)
            if process.poll() is not None:
                said = log.read_text(errors="replace").strip()[-LOG_TAIL:]
                raise MeshError(f"the node did not start: {said.removeprefix('error: ')}")
            time.sleep(0.01)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.kill()
    process.wait()
    raise MeshError(f"the node did not answer within {START_S:g} s; see {log}")
