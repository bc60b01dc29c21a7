"""The blocking other end of a node's local socket: for the shell, and for trainings.

Imports the standard library and a few small files only, so that `mesh status` answers at once.
One JSON object a line, both ways: {"op": ..., ...} -> {"ok": true, ...} or {"ok": false, "error"}.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from mesh.errors import MeshError, NodeNotRunning, UsageError
from mesh.places import host_directory, state_directory

ANSWER_S = 5.0
"""A node answers in a millisecond; one that does not in 5 s is stopped or stuck."""

LINE_LIMIT_BYTES = 16 * 1024 * 1024
"""An answer about 4096 members is about 4 MB."""


class RunningNode(NamedTuple):
    """A node process on this machine. Not a dataclass: importing those takes a tenth of `mesh status`."""

    node: str
    name: str
    pid: int
    control: str
    state: Path


class LocalSocket:
    """One connection to a node's local socket."""

    def __init__(self, control: str, timeout_s: float = ANSWER_S) -> None:
        """Raises NodeNotRunning if nobody listens at the path `control`."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        self.descriptors: list[int] = []
        """descriptors that came with the lines read so far"""
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(control)
        except (TimeoutError, BlockingIOError):
            self._socket.close()
            raise MeshError("the node does not answer: is it stopped?") from None
        except OSError as error:
            self._socket.close()
            raise NodeNotRunning(f"no node answers at {control}: {error.strerror}") from None

    def now(self) -> float:
        """Seconds on the clock that timeouts are measured by; in a laboratory it is a virtual one."""
        return time.monotonic()

    def send(self, **fields: Any) -> None:
        """Raises NodeNotRunning if the node is gone."""
        try:
            self._socket.sendall(json.dumps(fields).encode() + b"\n")
        except OSError:
            raise NodeNotRunning("the node ended") from None

    def receive(self, timeout_s: float | None = ANSWER_S) -> dict[str, Any] | None:
        """The next object; None if none came in time (0: only what is there already).

        Raises NodeNotRunning if the node is gone.
        """
        while b"\n" not in self._buffer:
            self._socket.settimeout(timeout_s)
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 1)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError:
                raise NodeNotRunning("the node ended") from None
            self.descriptors += descriptors
            if not data or len(self._buffer) > LINE_LIMIT_BYTES:
                raise NodeNotRunning("the node ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise MeshError("the node's answer is no object")
        return answer

    def request(self, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer. Raises MeshError, as the node says it."""
        self.send(**fields)
        answer = self.receive(timeout_s)
        if answer is None:
            raise MeshError(f"the node did not answer within {timeout_s:g} s: is it stopped?")
        if answer.get("ok") is not True:
            error = answer.get("error") or {}
            kind = UsageError if error.get("code") == "usage" else MeshError
            raise kind(error.get("message", "the node refused"))
        return answer

    def close(self) -> None:
        self._socket.close()


def ask(node: RunningNode, op: str, timeout_s: float = ANSWER_S, **fields: Any) -> dict[str, Any]:
    """One question on a connection of its own; see LocalSocket.request()."""
    connection = LocalSocket(node.control, timeout_s)
    try:
        return connection.request(timeout_s, op=op, **fields)
    finally:
        connection.close()


def node_of_state(state: Path) -> RunningNode:
    """The node that runs with this state directory. Raises NodeNotRunning."""
    try:
        about = json.loads((state / "node.json").read_bytes())
        found = RunningNode(
            node=str(about["node"]),
            name=str(about["name"]),
            pid=int(about["pid"]),
            control=str(about["control"]),
            state=state,
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise NodeNotRunning(
            f"no node runs with {state}: start one with `mesh up` or `mesh run SCRIPT`"
        ) from None
    LocalSocket(found.control).close()
    return found


def running_nodes() -> list[RunningNode]:
    """All nodes of this user on this machine, by name. Entries of dead processes are left out."""
    found = []
    try:
        entries = sorted(host_directory().glob("*.json"))
    except OSError:
        entries = []
    for entry in entries:
        try:
            state = Path(json.loads(entry.read_bytes())["state"])
            found.append(node_of_state(state))
        except (OSError, ValueError, KeyError, TypeError, MeshError):
            continue
    return sorted(found, key=lambda node: (node.name, node.node))


def find_node(state: str | None = None, name: str | None = None) -> RunningNode:
    """The node that a command means: by `--state` or $MESH_STATE, by name, or the only one.

    Raises NodeNotRunning if there is none, UsageError with the list if there are several.
    """
    if (state or os.environ.get("MESH_STATE")) and name is None:
        return node_of_state(state_directory(state))
    nodes = running_nodes()
    if name is not None:
        nodes = [n for n in nodes if n.name == name or n.node.startswith(name)]
        if not nodes:
            known = ", ".join(n.name for n in running_nodes()) or "none"
            raise NodeNotRunning(f"no node named {name!r} runs here; running: {known}")
    if not nodes:
        return node_of_state(state_directory())
    if len(nodes) > 1:
        listed = "".join(f"\n  -N {n.name:<12} or -N {n.node[:8]}   {n.state}" for n in nodes)
        raise UsageError(f"several nodes run here, choose one:{listed}")
    return nodes[0]
