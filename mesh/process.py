"""A node as an operating-system process: puts the parts together, obeys signals, cleans up.

A start's trip: settings -> state directory locked -> identity -> transport, discovery -> Node ->
local socket -> node.json. Rules: 1. SIGINT, SIGTERM, and the end of the program that started this
node (its standard input closes) all leave politely. 2. Whatever ends it, its files go.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import SystemRandom
from typing import Final

import trio

from mesh.answers import Answers
from mesh.control import Control, listen
from mesh.core.address import Address
from mesh.errors import MeshError, UsageError, first_of
from mesh.identity import Identity, load, node_of, rename
from mesh.memory import PEERS_KEPT, Memory
from mesh.net.mdns import MdnsDiscovery
from mesh.net.tcp import TcpTransport
from mesh.node import Node
from mesh.places import host_directory
from mesh.settings import NodeSettings
from mesh.storage import CLEANING_S, StateDirectory, private_directory
from mesh.usage import CpuMeter

SOCKET_PATH_LIMIT: Final = 100
"""A local socket's path has room for 104 bytes on macOS, 108 on Linux."""

REMEMBER_S: Final = 5.0
"""How often changed addresses of peers are written down for the next start."""

PROCESSORS: Final = os.cpu_count() or 1
"""Asked once: it reads a file, and each hand-over says how busy the machine is."""

LEAVE_S: Final = 3.0
LINGER_POLL_S: Final = 0.1


def run_node(
    settings: NodeSettings, *, lifeline: bool = False, say: Callable[[str], None] | None = None
) -> int:
    """Runs a node in this process until it is told to stop; returns an exit code.

    `lifeline`: also stop when standard input ends. `say` gets a line for each thing that happens.
    Raises MeshError: not a member, state directory in use, port taken, ...
    """
    storage = StateDirectory(settings.state)
    # A training that finds a node about to end starts the next one.
    storage.lock(2 * LEAVE_S if lifeline else CLEANING_S)
    try:
        identity = load(settings.state)
        if settings.name is not None and settings.name != identity.name:
            identity = rename(settings.state, settings.name)
        try:
            return trio.run(_main, settings, storage, identity, lifeline, say or _say)
        except* MeshError as group:
            raise first_of(group) from None
    finally:
        storage.unlock()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


async def _main(
    settings: NodeSettings,
    storage: StateDirectory,
    identity: Identity,
    lifeline: bool,
    say: Callable[[str], None],
) -> int:
    node = _make_node(settings, storage, identity, say)
    stop = trio.Event()
    code = 0
    answers = Answers(
        node,
        mesh=identity.mesh,
        state=settings.state,
        stop=stop.set,
        allow_control=settings.allow_control,
    )
    control = Control(node, answers)
    path = _socket_path(settings, identity)

    async def obey_signals() -> None:
        nonlocal code
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                code = 130 if number == signal.SIGINT else 0
                stop.set()

    async def hold_lifeline() -> None:
        while True:
            await trio.lowlevel.wait_readable(0)
            if not os.read(0, 4096):
                break
        # Whoever started this node is gone; who else uses it, or reads its last words, is not.
        while (  # noqa: ASYNC110 (no one event says both)
            trio.current_time() < control.linger_until or node.statistics().runs
        ):
            await trio.sleep(LINGER_POLL_S)
        stop.set()

    serve_metrics = await _open_metrics(settings.metrics, node, identity.mesh)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey_signals)
            if lifeline:
                nursery.start_soon(hold_lifeline)
            nursery.start_soon(node.run)
            await _first_of(node.listening, stop)
            if stop.is_set():
                nursery.cancel_scope.cancel()
                return code
            listener = listen(path)
            nursery.start_soon(control.serve, listener)
            storage.announce(identity.node, identity.name, str(path))
            nursery.start_soon(_keep_memory, node, storage.memory)
            nursery.start_soon(serve_metrics)
            say(_greeting(node, identity))
            gc.freeze()  # modules stay: looking through them for garbage is a stall of 10 ms, on a Pi of 100
            await stop.wait()
            control.leaving = True
            with trio.move_on_after(LEAVE_S):
                await node.leave()
            nursery.cancel_scope.cancel()
    finally:
        path.unlink(missing_ok=True)
    return code


async def _open_metrics(port: int | None, node: Node, mesh: str) -> Callable[[], Awaitable[None]]:
    """Listens on `port`; returns what serves there. Raises UsageError. Loads nothing for None."""
    if port is None:
        return trio.lowlevel.checkpoint
    try:
        from mesh.metrics import Metrics
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise UsageError(
            "--metrics needs prometheus-client: pip install 'gossipmesh[metrics]'"
        ) from None
    metrics = Metrics(node, mesh)
    await metrics.listen(port)
    return metrics.serve


async def _first_of(*events: trio.Event) -> None:
    async def wait(event: trio.Event, scope: trio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(wait, event, nursery.cancel_scope)


def _socket_path(settings: NodeSettings, identity: Identity) -> Path:
    """In the state directory; where that lies too deep, among this user's nodes, or below /tmp.

    Raises UsageError where none of them will do.
    """
    path = settings.state / "control.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    directories = [Path(f"/tmp/gossipmesh-{os.getuid()}")]
    with contextlib.suppress(OSError):  # it may be another user's
        directories.insert(0, host_directory())
    for directory in directories:
        path = directory / f"{identity.node[:16]}.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
            with contextlib.suppress(MeshError):
                private_directory(directory)
                # A link below /tmp may be another user's, and lead elsewhere later.
                if not directory.is_symlink():
                    return path
    raise UsageError(
        f"{settings.state} lies too deep for the node's local socket; choose a shorter --state"
    )


def _make_node(
    settings: NodeSettings,
    storage: StateDirectory,
    identity: Identity,
    say: Callable[[str], None],
) -> Node:
    refused: list[Callable[[str], None]] = []
    transport = TcpTransport(
        server=identity.context(server=True),
        client=identity.context(server=False),
        node_of=node_of,
        refused=lambda kind: refused[0](kind),
        port=settings.port,
        interfaces=settings.interfaces,
        towards=tuple(peer.host for peer in settings.peers),
    )
    discovery = MdnsDiscovery(
        node=identity.node, beacon=identity.beacon, interfaces=settings.interfaces
    )

    def store_incarnation(unused: int) -> None:
        try:
            storage.memory.store_incarnation(unused)
        except MeshError as error:  # a full disk: tried again by _keep_memory()
            say(str(error))

    given = [("peer", address) for address in settings.peers]
    cached = [("cache", address) for address in storage.memory.peers()]
    node = Node(
        node=identity.node,
        name=identity.name,
        incarnation=storage.memory.reserve_incarnations(),
        transport=transport,
        discovery=discovery if settings.mdns else None,
        candidates=tuple(given + cached),
        rng=SystemRandom(),
        store_incarnation=store_incarnation,
        note=say,
    )
    refused.append(node.count_refused)
    node.journal.load = _load
    node.journal.cpu = CpuMeter(lambda: [run.spec.pid for run in node.runs.values()]).share
    return node


def _load() -> float | None:
    """Of this machine's processors, in the last minute."""
    try:
        return os.getloadavg()[0] / PROCESSORS
    except OSError:
        return None


def _greeting(node: Node, identity: Identity) -> str:
    where = ", ".join(str(address) for address in node.addresses) or "no address yet"
    return f"{identity.name} ({identity.node[:8]}) is up in mesh {identity.mesh} at {where}"


async def _keep_memory(node: Node, memory: Memory) -> None:
    """Writes down where peers are, so that the next start needs no mDNS, and what a full disk kept
    from being written."""
    written: list[Address] = []
    while True:
        await trio.sleep(REMEMBER_S)
        found = node.living_addresses(PEERS_KEPT)
        with contextlib.suppress(MeshError):  # still full: incarnations go first
            memory.catch_up()
            if found and found != written:
                await trio.to_thread.run_sync(memory.store_peers, found)
                written = found
