"""The node's local socket: answers questions, attaches trainings. The other end is client.py.

Rules: 1. Only this user reaches it: 0600 in a 0700 directory, and the kernel says who calls. 2. One
JSON object a line; an operation is looked up in a table, never by name on an object. 3. A training's
session ends with its connection: its run is dropped, the node stays.
A post's trip: line -> _serve_training -> Run.post() merges -> Node.posted() -> the schedule.
"""

import contextlib
import gc
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from mesh import arrays, report
from mesh.answers import Answers, failure
from mesh.arguments import Request
from mesh.codec import EXACT, check_codec
from mesh.core.clock import CLOCK_LIMIT
from mesh.core.messages import SchemaEntry
from mesh.core.schema import ENTRIES_LIMIT, NAME_LIMIT, sizes
from mesh.core.strategies import KEPT_VECTORS, PAIR, check_strategy
from mesh.dtypes import DTYPES
from mesh.errors import MeshError, NodeNotRunning, UsageError
from mesh.lines import Lines, SocketLines, is_own_user
from mesh.node import Node
from mesh.runs import Run, RunSpec
from mesh.shared import HandOverMemory

EVENTS_LIMIT: Final = 1024
CONNECTIONS_LIMIT: Final = 64
MODEL_LIMIT_ENTRIES: Final = 2**33
"""32 GiB a replica: beyond what a machine that averages over its LAN holds four times."""

LOSS_LIMIT: Final = 1e300


@dataclass(slots=True)
class _Training:
    """One that is attached."""

    lines: Lines
    scope: trio.CancelScope
    ended: trio.Event = field(default_factory=trio.Event)


class Control:
    """Serves one node's local socket."""

    def __init__(self, node: Node, answers: Answers) -> None:
        self._node = node
        self._asked = answers
        self._exits = answers.exits
        self._connections = 0
        self._trainings: dict[str, _Training] = {}
        self.linger_until = 0.0
        """on trio's clock: till when the node outlives the program that started it"""
        self.leaving = False
        """this node is about to end: no training is attached from now on"""
        self._answers: dict[str, Callable[[Request], dict[str, Any]]] = {
            "exited": self._exited,
            "linger": self._linger,
        }
        """what only programs of this machine say; all else is answers.py's"""

    async def serve(self, listener: socket.socket) -> None:
        """Accepts connections until cancelled, and closes the listener."""
        with listener:
            await self._accept(listener)

    async def _accept(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    continue
                except OSError:
                    await trio.sleep(0.1)  # out of descriptors: those in use will end
                    continue
                if self._connections >= CONNECTIONS_LIMIT or not is_own_user(connection):
                    connection.close()
                    continue
                connection.setblocking(False)
                nursery.start_soon(self._serve_one, connection)

    async def _serve_one(self, connection: socket.socket) -> None:
        self._connections += 1
        lines = SocketLines(connection)
        try:
            while (request := await lines.receive()) is not None:
                if request.get("op") == "attach":
                    if not self.leaving:
                        await self.attach(lines, request)
                    return
                if request.get("op") == "pull":
                    await self._pull(lines, request)
                    return
                await lines.send(await self._answer(lines, request))
        except OSError:
            pass  # whoever asked went away
        finally:
            self._connections -= 1
            trio.lowlevel.notify_closing(connection)
            connection.close()

    async def _answer(self, lines: SocketLines, request: Request) -> dict[str, Any] | str:
        async def tell(progress: dict[str, Any]) -> None:
            if request.get("progress") is True:
                await lines.send({"progress": progress})

        answer = self._answers.get(str(request.get("op")))
        try:
            if answer is not None:
                return {"ok": True, **answer(request)}
            return await self._asked.answer(request, tell)
        except MeshError as error:
            return failure(error)

    def _exited(self, request: Request) -> dict[str, Any]:
        """`mesh run` reports how its script ended."""
        pid, code = _whole(request, "pid"), _whole(request, "code", low=-64)
        known = [e for e in self._exits if e.pid == pid]
        for entry in known:
            self._exits.remove(entry)
        run = known[0].run if known else None
        self._note_exit(run, str(request.get("script"))[:500], pid, code)
        return self._linger(request)

    def _linger(self, request: Request) -> dict[str, Any]:
        """Stay so long even if whoever started this node ends: its crash is to be read, or another
        training is on its way to attach."""
        if self.leaving:
            raise NodeNotRunning("this node is about to end")
        until = trio.current_time() + _real(request, "linger_s", 0.0, 3600.0)
        self.linger_until = max(self.linger_until, until)
        return {}

    def _note_exit(self, run: str | None, script: str, pid: int, code: int | None) -> None:
        at_s = self._node.statistics().uptime_s
        self._exits.append(report.Exit(run=run, script=script, pid=pid, code=code, at_s=at_s))

    async def _pull(self, lines: SocketLines, request: Request) -> None:
        """`mesh pull`: until the model is there, or whoever asked goes away."""
        async with trio.open_nursery() as nursery:

            async def hear(event: Request, descriptor: int | None = None) -> None:
                with contextlib.suppress(OSError):  # it went away: receive() below sees it too
                    await lines.send(event, descriptor)

            async def pull() -> None:
                try:
                    nodes = _whole(request, "peers", low=1)
                    await _arrays()
                    await self._node.observer.pull(str(request.get("run")), nodes, hear)
                except (MeshError, MemoryError) as error:
                    await hear(failure(error))
                nursery.cancel_scope.cancel()

            nursery.start_soon(pull)
            with contextlib.suppress(OSError):
                await lines.receive()
            nursery.cancel_scope.cancel()

    # -------------------------------------------------------------------------------- trainings

    async def attach(self, lines: Lines, request: Request) -> None:
        """Serves one training, which asked for it, until its connection ends."""
        try:
            spec = _spec(request)
            await self._make_way(spec.run)
            self._node.check_run(spec)
            entries = sum(spec.sizes)
            vectors = len(KEPT_VECTORS.get(spec.strategy, ())) if spec.keeps else 0
            await _arrays()
            memory = HandOverMemory.create(entries, vectors)
        except (MeshError, OSError) as error:
            await lines.send(failure(error))
            return
        put, take = trio.open_memory_channel[dict[str, Any]](EVENTS_LIMIT)
        run: Run | None = None
        training: _Training | None = None
        polite = False

        def tell(event: dict[str, Any]) -> None:
            # Offers alternate with posts, so this fits; if it does not, the training is gone.
            with contextlib.suppress(trio.WouldBlock):
                put.send_nowait(event)

        try:
            answer = {
                "ok": True,
                "entries": entries,
                "vectors": vectors,
                "differences": spec.differences,
            }
            await lines.send(answer, descriptor=memory.descriptor)
            if await lines.receive() is None:
                return
            try:
                kept = memory.kept if vectors else None
                run = await self._node.attach(spec, memory.posted, memory.offered, tell, kept)
            except (MeshError, MemoryError) as error:
                await lines.send({"event": "refused", "reason": str(error)})
                return
            async with trio.open_nursery() as nursery:
                self._trainings[spec.run] = training = _Training(lines, nursery.cancel_scope)
                nursery.start_soon(self._tell_training, lines, take)
                polite = await self._serve_training(lines, run)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if run is not None:
                    await self._node.detach(run)
                if training is not None:
                    del self._trainings[spec.run]
                    training.ended.set()
            memory.close()
            if run is not None and not polite:
                self._note_exit(spec.run, spec.script, spec.pid, None)
                text = f"the training of {spec.run} (pid {spec.pid}) ended without a word"
                self._node.journal.record("lost", text, run=spec.run)
        await lines.send({"event": "detached"})

    async def _make_way(self, run: str) -> None:
        """A training that was killed keeps its name no longer, whoever still holds its connection."""
        training = self._trainings.get(run)
        if training is not None and training.lines.gone():
            training.scope.cancel()
            await training.ended.wait()

    async def _tell_training(
        self, lines: Lines, take: trio.MemoryReceiveChannel[dict[str, Any]]
    ) -> None:
        try:
            async for event in take:
                await lines.send(event)
        except OSError:
            pass  # _serve_training sees the end of the same connection

    async def _serve_training(self, lines: Lines, run: Run) -> bool:
        """Until the training detaches (True) or its connection ends (False)."""
        try:
            while (request := await lines.receive()) is not None:
                match request.get("op"):
                    case "post":
                        await self._post(run, request)
                    case "want":
                        await run.offer()
                    case "meet":
                        run.take_back()
                        await self._node.posted(run, waits=True)
                    case "detach":
                        return True
                    case _:
                        return False
        except (OSError, MeshError):
            pass  # the training died, or says what makes no sense: either way it ends here
        return False

    async def _post(self, run: Run, request: Request) -> None:
        loss = request.get("loss")
        if not isinstance(loss, (int, float)) or not abs(loss) < LOSS_LIMIT:  # NaN is not below
            loss = None
        await run.post(
            step=_whole(request, "step"),
            loss=None if loss is None else float(loss),
            samples=_whole(request, "samples"),
        )
        if request.get("want") is True:
            await run.offer()
        await self._node.posted(run, waits=request.get("waits") is True)


def listen(path: Path) -> socket.socket:
    """A listening local socket that only this user can open; a dead process's is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(CONNECTIONS_LIMIT)
    listener.setblocking(False)
    return listener


def _whole(request: Request, key: str, low: int = 0) -> int:
    value = request.get(key)
    if type(value) is not int or not low <= value < 2**63:
        raise UsageError(f"{key} is a whole number from {low}")
    return value


def _real(request: Request, key: str, low: float, high: float) -> float:
    value = request.get(key, low)
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{key} is a number of {low:g}..{high:g}")
    return float(value)


async def _arrays() -> None:
    """Until this node can compute: its first run loads what for."""
    if not arrays.is_loaded():
        await trio.to_thread.run_sync(arrays.load)
        gc.freeze()  # see process.py


def _spec(request: Request) -> RunSpec:
    """What a training says of itself, checked. Raises UsageError."""
    name, schema = request.get("run"), request.get("schema")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise UsageError("run= is a name of 1..64 printable characters")
    if not isinstance(schema, list) or not 0 < len(schema) <= ENTRIES_LIMIT:
        raise UsageError(f"a model has 1..{ENTRIES_LIMIT} tensors")
    entries = tuple(_entry(item) for item in schema)
    codec = check_codec(request.get("codec", EXACT))
    weight = _real(request, "weight", 0.0, 1e12)
    if not 0 < sum(sizes(entries)) <= MODEL_LIMIT_ENTRIES:
        raise UsageError(f"a model has 1..{MODEL_LIMIT_ENTRIES:,} numbers")
    return RunSpec(
        run=name,
        entries=entries,
        weight=weight,
        every=_whole(request, "every", low=1),
        sync_timeout_s=_real(request, "sync_timeout_s", 0.0, 86400.0),
        pid=_whole(request, "pid"),
        script=str(request.get("script"))[:500],
        started=request.get("started") is True,
        exchanged=request.get("exchanged") is True,
        codec=codec,
        strategy=check_strategy(str(request.get("strategy", PAIR)), weight),
        keeps=request.get("keeps") is True,
        resumes=request.get("resumes") is True,
        differences=request.get("differences") is True,
        step=_whole({"step": 0, **request}, "step"),
        clock=_real({"clock": 0.0, **request}, "clock", -CLOCK_LIMIT, CLOCK_LIMIT),
    )


def _entry(item: object) -> SchemaEntry:
    match item:
        case [str(name), list(shape), str(dtype)] if (
            len(name) <= NAME_LIMIT
            and name.isprintable()
            and dtype in DTYPES
            and len(shape) <= 16
            and all(type(size) is int and 0 <= size < 2**40 for size in shape)
        ):
            return SchemaEntry(name=name, shape=tuple(shape), dtype=dtype)
    raise UsageError(f"{str(item)[:100]} is no tensor that can be averaged")
