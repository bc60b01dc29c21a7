"""The blocking other end of a node's local socket: for the shell, and for trainings.

Imports the standard library and a few small files only, so that `mesh status` answers at once.
One JSON object a line, both ways: {"op": ..., ...} -> {"ok": true, ...} or {"ok": false, "error"};
before a long operation's answer come lines {"progress": ...} where the request asked for them.
A question's trip: question() -> a node of this host, by name; else one that passes it on through the
mesh (`of`) -> request() -> the answer as the asked node gave it.
"""

import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mesh.errors import MeshError, NodeNotRunning, NodeRefused, NodeTimeout, UsageError
from mesh.places import host_directory, state_directory

ANSWER_S = 5.0
"""A node answers in a millisecond; one that does not in 5 s is stopped or stuck."""

ID_PREFIX = 4
"""Characters of a node id from which they name a node; fewer may be anybody's name."""

LINE_LIMIT_BYTES = 16 * 1024 * 1024
"""An answer about 4096 members is about 4 MB."""


class RunningNode(NamedTuple):
    """A node process on this machine. Not a dataclass: importing those takes a tenth of `mesh status`."""

    node: str
    name: str
    pid: int
    control: str
    state: Path


class _Node(Protocol):
    """A node as a name means it: a process of this machine, or a member of the mesh."""

    @property
    def node(self) -> str: ...

    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_Node)


class LocalSocket:
    """One connection to a node's local socket."""

    def __init__(self, control: str, timeout_s: float = ANSWER_S) -> None:
        """Raises NodeNotRunning if nobody listens at the path `control`."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self.descriptors: list[int] = []
        """descriptors that came with the lines read so far"""
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(control)
        except (TimeoutError, BlockingIOError):
            self._socket.close()
            raise NodeTimeout("the node does not answer: is it stopped?") from None
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

    def waits(self) -> bool:
        """Whether receive(0) has something to say: an object, or that the node is gone."""
        return bool(self._buffer) or bool(self._readable.poll(0))

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
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise MeshError("the answer is no JSON object: is the other node of this version?")
        return answer

    def request(
        self,
        timeout_s: float = ANSWER_S,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Sends one request and waits for its answer, at most timeout_s in all.

        Raises NodeTimeout; UsageError, NodeRefused or another MeshError as the node says it.
        """
        deadline = self.now() + timeout_s
        self.send(**fields, **({"progress": True} if on_progress else {}))
        while True:
            answer = self.receive(max(0.0, deadline - self.now()))
            if answer is None:
                raise NodeTimeout(f"the node did not answer within {timeout_s:g} s: is it stopped?")
            progress = answer.get("progress")
            if not isinstance(progress, dict):
                break
            if on_progress is not None:
                on_progress(progress)
        if answer.get("ok") is not True:
            error = answer.get("error")
            error = error if isinstance(error, dict) else {}
            raise _kind(error.get("code"))(_printable(error.get("message", "the node refused")))
        return answer

    def close(self) -> None:
        self._socket.close()


def ask(
    node: RunningNode,
    op: str,
    timeout_s: float = ANSWER_S,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """One question on a connection of its own; see LocalSocket.request()."""
    connection = LocalSocket(node.control, timeout_s)
    try:
        return connection.request(timeout_s, on_progress, op=op, **fields)
    finally:
        connection.close()


def question(
    op: str,
    *,
    state: str | None = None,
    name: str | None = None,
    timeout_s: float = ANSWER_S,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Asks the node that a command means: one of this host (see find_node()), or else any node of the
    mesh that is called `name`, through a node of this host. Where a state directory was chosen that is
    a matter of its mesh; only a name that nobody has there may be that of another mesh's node here.

    Raises NodeNotRunning, UsageError with the names there are, NodeTimeout, NodeRefused, MeshError.
    """
    if name is None:
        return ask(find_node(state), op, timeout_s, on_progress, **fields)
    chosen = _chosen(state)
    nodes = running_nodes()
    here = called(_of_mesh(nodes, chosen), name)
    if here:
        return ask(_only(here), op, timeout_s, on_progress, **fields)
    if chosen is None and not nodes:
        find_node(state, name)  # says that there is none
    # Another node's process may wait for the network: leave it time to say that nothing came.
    within_s = max(timeout_s / 2, timeout_s - 1.0)
    nobody = f"no node {name!r}"
    unknown = UsageError(nobody)
    silent: NodeTimeout | None = None
    for node in nodes if chosen is None else [node_of_state(chosen)]:
        try:
            answer = ask(node, op, timeout_s, on_progress, of=name, within_s=within_s, **fields)
        except NodeTimeout as error:
            silent = error
        except UsageError as error:
            if not str(error).startswith(nobody):
                raise  # that node itself says what is wrong: nobody else is meant
            unknown = error
        else:
            return {key: _printable(value) for key, value in answer.items()}
    if silent is None and (beside := called(nodes, name)):
        return ask(_only(beside), op, timeout_s, on_progress, **fields)
    raise silent or unknown


def _printable(value: Any) -> Any:
    """What another machine said, as a terminal may show it."""
    match value:
        case str():
            return "".join(c if c.isprintable() else "?" for c in value)
        case list():
            return [_printable(item) for item in value]
        case dict():
            return {_printable(key): _printable(item) for key, item in value.items()}
    return value


def _kind(code: object) -> type[MeshError]:
    kinds: tuple[type[MeshError], ...] = (UsageError, NodeTimeout, NodeRefused)
    return next((kind for kind in kinds if kind.code == code), MeshError)


def node_of_state(state: Path, leaving: int | None = None) -> RunningNode:
    """The node that runs with this state directory, but for the process `leaving`, which is about to
    end. Raises NodeNotRunning."""
    found = _about(state)
    if found.pid == leaving:
        raise NodeNotRunning(f"the node that runs with {state} is about to end")
    try:
        LocalSocket(found.control).close()
    except NodeNotRunning:
        if not _clean_up(found):
            raise
        raise NodeKilled(
            f"the node that ran with {state} was killed; what it left behind is cleaned up: "
            "`mesh up` or `mesh run SCRIPT` starts it again"
        ) from None
    return found


def _about(state: Path) -> RunningNode:
    """What a node says of itself in its state directory. Raises NodeNotRunning."""
    try:
        about = json.loads((state / "node.json").read_bytes())
        return RunningNode(
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


class NodeKilled(NodeNotRunning):
    """A node's files were there and its process was not."""


def _clean_up(found: RunningNode) -> bool:
    """Takes away what a killed process left, if none runs there: its lock is free, and is held here
    meanwhile, so that none begins. Its identity stays."""
    import fcntl  # only here, where something is wrong

    try:
        lock = os.open(found.state / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        about = json.loads((found.state / "node.json").read_bytes())
        if about["pid"] != found.pid:
            return False
        entry = host_directory() / f"{found.node[:16]}.json"
        for path in (Path(found.control), found.state / "node.json", entry):
            path.unlink(missing_ok=True)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    finally:
        os.close(lock)
    return True


def running_nodes() -> list[RunningNode]:
    """All nodes of this user on this machine, by name. What dead ones left is cleaned up."""
    return _running_nodes()[0]


def _running_nodes() -> tuple[list[RunningNode], list[NodeKilled]]:
    found: list[RunningNode] = []
    killed: list[NodeKilled] = []
    try:
        entries = sorted(host_directory().glob("*.json"))
    except OSError:
        entries = []
    for entry in entries:
        try:
            state = Path(json.loads(entry.read_bytes())["state"])
            found.append(node_of_state(state))
        except NodeKilled as error:
            killed.append(error)
        except NodeTimeout:
            found.append(_about(state))  # it is there, and whoever asks it is told that it hangs
        except (OSError, ValueError, KeyError, TypeError, MeshError):
            continue
    return sorted(found, key=lambda node: (node.name, node.node)), killed


def called(nodes: Iterable[_Named], name: str) -> list[_Named]:
    """Those with this name, else those whose id begins so."""
    nodes = list(nodes)
    by_id = [n for n in nodes if len(name) >= ID_PREFIX and n.node.startswith(name)]
    return [n for n in nodes if n.name == name] or by_id


def find_node(state: str | None = None, name: str | None = None) -> RunningNode:
    """The node of this machine that a command means: by `--state` or $MESH_STATE, by name, or the only
    one. Of those with one name the ones in the chosen state's mesh are meant.

    Raises NodeNotRunning if there is none, UsageError with the list if there are several.
    """
    chosen = _chosen(state)
    if chosen is not None and name is None:
        return node_of_state(chosen)
    nodes, killed = _running_nodes()
    if name is not None:
        known = ", ".join(n.name for n in nodes) or "none"
        nodes = called(_of_mesh(nodes, chosen), name) or called(nodes, name)
        if not nodes:
            raise NodeNotRunning(f"no node named {name!r} runs here; running: {known}")
    if not nodes and killed:
        raise killed[0]
    return _only(nodes) if nodes else node_of_state(state_directory())


def _chosen(state: str | None) -> Path | None:
    """The state directory that the user named."""
    return state_directory(state) if state or os.environ.get("MESH_STATE") else None


def _of_mesh(nodes: list[RunningNode], chosen: Path | None) -> list[RunningNode]:
    """Those in the mesh of the chosen state: another mesh's may have the same names."""
    if chosen is None:
        return nodes
    own = _mesh(chosen)
    return [node for node in nodes if _mesh(node.state) == own]


def _mesh(state: Path) -> object:
    """Which mesh a state directory belongs to, without loading what reads its keys; None: in none."""
    try:
        return json.loads((state / "mesh.json").read_bytes())["mesh"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _only(nodes: list[RunningNode]) -> RunningNode:
    if len(nodes) > 1:
        listed = "".join(f"\n  -N {n.name:<12} or -N {n.node[:8]}   {n.state}" for n in nodes)
        raise UsageError(f"several nodes run here, choose one:{listed}")
    return nodes[0]
