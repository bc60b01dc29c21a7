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

from mesh.client import RunningNode, ask, node_of_state
from mesh.errors import IdentityError, MeshError, NodeNotRunning, UsageError
from mesh.settings import NodeSettings

START_S: Final = 20.0
"""A node is up in 0.4 s; a Raspberry Pi with a cold disk takes some seconds."""

STOP_S: Final = 8.0
LOG_TAIL: Final = 500
LOG_LIMIT_BYTES: Final = 1_000_000


class NodeProcess:
    """A node that lives as long as this object is not stopped, at most as long as this process."""

    def __init__(self, process: "subprocess.Popen[bytes]", running: RunningNode) -> None:
        self._process = process
        self.running = running

    @property
    def is_own(self) -> bool:
        """Whether `running` is the process that was started, and not another program's."""
        return self._process.pid == self.running.pid

    def release(self) -> None:
        """Lets the node go: it ends by itself, after whatever it was told to linger."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.stdin = None

    def stop(self) -> None:
        """Ends the node politely and waits until it is gone, unless others train on it: then it
        goes on, and ends with the last of them."""
        busy = False
        with contextlib.suppress(MeshError):
            busy = bool(ask(self.running, "status")["runs"])
        if busy:
            self.release()
            return
        # Its lifeline may be held open by a forked worker of a data loader. The signal comes first: a
        # node that ends by itself obeys none any more, and would leave its files behind.
        self._process.terminate()
        self.release()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def make_mesh_if_none(settings: NodeSettings) -> None:
    """Makes a new closed mesh where this machine is in none, and prints how others join it."""
    # cryptography costs 60 ms: only when needed
    from mesh.identity import create_mesh, is_member, read_token

    if is_member(settings.state):
        return
    try:
        token = create_mesh(settings.state, settings.name)
    except UsageError:
        if not is_member(settings.state):
            raise
        try:  # another program was first: both are in its mesh
            token = read_token(settings.state)
        except IdentityError:  # which it joined
            return
    print(f"mesh: new mesh; on the other machines run:\n  mesh join {token}", file=sys.stderr)


def start_node(settings: NodeSettings, leaving: int | None = None) -> NodeProcess:
    """Starts a node and waits until it answers. Raises MeshError with what it said if it cannot.

    Another program may start one in the same moment: theirs serves as well, but not the process
    `leaving`, for whose end the new one waits.
    """
    log = settings.state / "node.log"
    try:
        keep = os.O_APPEND if log.exists() and log.stat().st_size < LOG_LIMIT_BYTES else os.O_TRUNC
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | keep, 0o600)
    except OSError as error:
        raise MeshError(f"cannot write {log}: {error.strerror}") from None
    with open(descriptor, "ab") as output:
        began = output.tell()
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
                started = NodeProcess(process, node_of_state(settings.state, leaving))
                if not started.is_own:
                    process.kill()  # it waits for the end of theirs
                    process.wait()
                    started.release()
                return started
            if process.poll() is not None:
                said = log.read_bytes()[began:].decode(errors="replace").strip()[-LOG_TAIL:]
                raise MeshError(f"the node did not start: {said.removeprefix('error: ')}")
            time.sleep(0.01)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.kill()
    process.wait()
    raise MeshError(f"the node did not answer within {START_S:g} s; see {log}")
