"""What a node answers: one table of operations, for its local socket and for other nodes.

Rules: 1. An operation is looked up in a table, its arguments in another; what is not there is refused.
2. Any member may read; what changes something here (`write`) is done for this user, and for other
members only where the node runs with allow_control. 3. Nothing here takes longer than it was given.
A question's trip: control.py or desk.py -> answer() -> for another node: Desk.ask() -> its own
answer(); else the operation -> a dict that JSON can write.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from mesh import bench, records, report
from mesh.arguments import PAGE_LIMIT, WITHIN_LIMIT_S, Request, arguments, between, plain
from mesh.client import called
from mesh.core import events as ev
from mesh.core.messages import Member, NodeId, State, short
from mesh.errors import MeshError, NodeRefused, UsageError
from mesh.history import POINTS_LIMIT
from mesh.journal import Happening
from mesh.node import Node
from mesh.runs import Run

Tell = Callable[[dict[str, Any]], Awaitable[None]]
"""Hears how far a long operation came; the local socket passes it on."""

EXITS_KEPT: Final = 16
WITHIN_S: Final = 4.0
"""For an answer through the mesh; under the 5 s in which `mesh` gives up on a node of this machine."""

PING_COUNT: Final = 5
PING_S: Final = 2.0
PING_PAUSE_S: Final = 0.1
BENCH_BYTES: Final = 64 * 1024 * 1024
BENCH_S: Final = 10.0
PROGRESS_S: Final = 0.25
"""Between two questions for how far a long operation of another node came."""

PART_CHARACTERS: Final = 12


class Operation(NamedTuple):
    act: Callable[[Request, Tell], Awaitable[dict[str, Any]]]
    write: bool = False
    ends: bool = False
    """the node stops, once its answer is out"""


class Answers:
    """One node's."""

    def __init__(
        self,
        node: Node,
        *,
        mesh: str,
        state: Path,
        stop: Callable[[], None],
        allow_control: bool = False,
    ) -> None:
        """`stop` ends the node process politely (`mesh leave`)."""
        self._node = node
        self._mesh = mesh
        self._state = state
        self._stop = stop
        self._allow_control = allow_control
        self._came: dict[NodeId, dict[str, Any]] = {}
        """how far the long operation came that another member asked for"""
        self.exits: deque[report.Exit] = deque(maxlen=EXITS_KEPT)
        self._table = {
            "status": Operation(self._status),
            "peers": Operation(self._peers),
            "runs": Operation(self._runs),
            "events": Operation(self._events),
            "logs": Operation(self._logs),
            "history": Operation(self._history),
            "ping": Operation(self._ping),
            "bench": Operation(self._bench),
            "pause": Operation(self._pause, write=True),
            "resume": Operation(self._resume, write=True),
            "set": Operation(self._set, write=True),
            "leave": Operation(self._leave, write=True, ends=True),
        }
        node.desk.answerer = self.answer_peer

    async def answer(self, request: Request, tell: Tell) -> dict[str, Any] | str:
        """This node's own user asks; text is what another node answered. Raises MeshError."""
        name = request.get("of")
        if isinstance(name, str):
            member = self.member(name)
            if member.node != self._node.id:
                return await self._forward(member, request, tell)
        operation = self._operation(request)
        answer = {"ok": True, **await operation.act(arguments(request), tell)}
        if operation.ends:
            self._stop()
        return answer

    async def answer_peer(self, question: ev.Perform) -> str:
        """Another member asks."""
        request: Request = {a.name: plain(a.name, a.value) for a in question.arguments}
        if question.op == "progress":
            return json.dumps({"ok": True, "progress": self._came.get(question.asker)})

        async def tell(progress: dict[str, Any]) -> None:
            self._came[question.asker] = progress

        try:
            operation = self._operation({"op": question.op})
            if operation.write and not self._allow_control:
                raise NodeRefused(
                    f"{self._node.name} does not let other nodes {question.op}: "
                    "start it with `mesh up --allow-control`"
                )
            if operation.write:
                asker = self._node.name_of(question.asker)
                self._node.journal.record("control", f"{asker} asks: {question.op}")
            answer = {"ok": True, **await operation.act(arguments(request), tell)}
            if operation.ends:
                self._node.desk.afterwards = self._stop
        except MeshError as error:
            answer = failure(error)
        finally:
            self._came.pop(question.asker, None)
        return json.dumps(answer, allow_nan=False)

    def member(self, name: str) -> Member:
        """The member that is called so, or whose id begins so. Raises UsageError with all names."""
        members = self._node.members()
        found = called(members, name)
        if not found:
            known = ", ".join(sorted({m.name for m in members}))
            raise UsageError(f"no node {name!r} in this mesh; there are: {known}")
        if len(found) > 1:
            found = [m for m in found if m.state <= State.SUSPECT] or found
        if len(found) > 1:
            ids = ", ".join(short(m.node) for m in found)
            raise UsageError(f"several nodes are called {name!r}, name one by its id: {ids}")
        return found[0]

    def _operation(self, request: Request) -> Operation:
        operation = self._table.get(str(request.get("op")))
        if operation is None:
            raise UsageError(f"this node knows no {str(request.get('op'))[:40]!r}")
        return operation

    async def _forward(self, member: Member, request: Request, tell: Tell) -> str:
        self._operation(request)
        given = arguments(request)
        within_s = between(request, "within_s", WITHIN_S, 0.1, WITHIN_LIMIT_S)
        op = str(request["op"])
        async with trio.open_nursery() as nursery:
            if request.get("progress") is True:
                nursery.start_soon(self._follow, member.node, tell)
            try:
                return (await self._node.desk.ask(member.node, op, given, within_s)).text
            except MeshError as error:
                failed = type(error)(f"{member.name}: {error}")
            finally:
                nursery.cancel_scope.cancel()
        raise failed

    async def _follow(self, node: NodeId, tell: Tell) -> None:
        """Passes on how far another node came, until cancelled or nobody listens."""
        with contextlib.suppress(OSError):  # whoever asked went away
            while True:
                await trio.sleep(PROGRESS_S)
                with contextlib.suppress(MeshError, ValueError, RecursionError):
                    told = await self._node.desk.ask(node, "progress", {}, PING_S)
                    match json.loads(told.text):
                        case {"progress": {"part": str(part), "share": int() | float() as share}}:
                            shown = part if part.isprintable() else ""
                            share = min(1.0, max(0.0, share))
                            await tell({"part": shown[:PART_CHARACTERS], "share": share})

    # ---------------------------------------------------------------------------------- reading

    async def _status(self, request: Request, tell: Tell) -> dict[str, Any]:
        return report.status(
            self._node.statistics(),
            mesh=self._mesh,
            state=str(self._state),
            exits=self.exits,
            allow_control=self._allow_control,
            load=self._node.journal.load(),
            cpu=self._node.journal.cpu(),
        )

    async def _peers(self, request: Request, tell: Tell) -> dict[str, Any]:
        journal = self._node.journal
        return report.peers(self._node.statistics(), load=journal.load(), cpu=journal.cpu())

    async def _runs(self, request: Request, tell: Tell) -> dict[str, Any]:
        return report.runs(self._node.statistics())

    async def _events(self, request: Request, tell: Tell) -> dict[str, Any]:
        return await self._page(request, self._node.journal.events, records.events)

    async def _logs(self, request: Request, tell: Tell) -> dict[str, Any]:
        return await self._page(request, self._node.journal.lines, records.logs)

    async def _page(
        self,
        request: Request,
        read: Callable[[int, int], list[Happening]],
        write: Callable[..., dict[str, Any]],
    ) -> dict[str, Any]:
        """What one of the rings has, once it has anything, or after `wait_s`."""
        since = request.get("since", 0)
        await self._node.journal.wait(lambda: read(since, 1), request.get("wait_s", 0.0))
        kept = read(since, request.get("limit", PAGE_LIMIT))
        return write(kept, self._node.own, since=since, **self._times())

    async def _history(self, request: Request, tell: Tell) -> dict[str, Any]:
        return records.history(
            self._node.journal.curves,
            self._node.own,
            run=request.get("run"),
            points=request.get("points", POINTS_LIMIT),
            **self._times(),
        )

    def _times(self) -> dict[str, float]:
        uptime_s = trio.current_time() - self._node.journal.began_at
        return {"uptime_s": uptime_s, "wall_s": time.time()}

    # -------------------------------------------------------------------------------- measuring

    async def _ping(self, request: Request, tell: Tell) -> dict[str, Any]:
        """Round trips of a question that the other end answers at once."""
        target = self._other(request)
        count = request.get("count", PING_COUNT)
        times: list[float] = []
        hops = 0
        error: MeshError | None = None
        for index in range(count):
            if index:
                await trio.sleep(PING_PAUSE_S)
            began = time.perf_counter()
            try:
                told = await self._node.desk.ask(target.node, "echo", {}, PING_S)
            except MeshError as missed:
                error = missed
                if not times:
                    break
                continue
            times.append(time.perf_counter() - began)
            hops = told.hops
            await tell({"part": "ping", "share": (index + 1) / count, "last_s": times[-1]})
        if error is not None and not times:
            raise type(error)(f"{target.name}: {error}")
        return {
            "schema": "mesh.ping/1",
            **self._between(target),
            "sent": count,
            "received": len(times),
            "hops": hops,
            **_spread(times),
            "times_s": [round(one, 6) for one in times],
        }

    async def _bench(self, request: Request, tell: Tell) -> dict[str, Any]:
        target = self._other(request)

        async def progress(part: str, share: float) -> None:
            await tell({"part": part, "share": round(share, 3)})

        seconds = request.get("seconds", BENCH_S)
        began = time.perf_counter()
        with trio.move_on_after(seconds + bench.SLACK_S):
            try:
                peer = await self._node.connect_bulk(target)
                connect_s = time.perf_counter() - began
                try:
                    found = await bench.measure(
                        peer.stream,
                        peer.reader,
                        total_bytes=request.get("bytes", BENCH_BYTES),
                        seconds=seconds,
                        progress=progress,
                    )
                finally:
                    await bench.finish(peer.stream)
            except MeshError as error:
                raise MeshError(f"{target.name}: {error}") from None
            return {
                "schema": "mesh.bench/1",
                **self._between(target),
                "connect_s": round(connect_s, 6),
                "round_trips": len(found.times_s),
                **_spread(found.times_s),
                "sent_bytes": found.sent_bytes,
                "sent_bytes_s": round(found.sent_bytes / found.sent_s, 1),
                "received_bytes": found.received_bytes,
                "received_bytes_s": round(found.received_bytes / found.received_s, 1),
            }
        raise MeshError(f"{target.name}: nothing moved for too long")

    def _other(self, request: Request) -> Member:
        member = self.member(request.get("target", ""))
        if member.node == self._node.id:
            raise UsageError(f"{member.name} is this node itself: name another")
        return member

    def _between(self, target: Member) -> dict[str, Any]:
        own = self._node.own
        return {
            "node": {"id": own.node, "name": own.name},
            "target": {"id": target.node, "name": target.name},
        }

    # --------------------------------------------------------------------------------- changing

    async def _pause(self, request: Request, tell: Tell) -> dict[str, Any]:
        return await self._set_paused(request, paused=True)

    async def _resume(self, request: Request, tell: Tell) -> dict[str, Any]:
        return await self._set_paused(request, paused=False)

    async def _set_paused(self, request: Request, *, paused: bool) -> dict[str, Any]:
        runs = self._meant(request)
        what = "paused" if paused else "resumed"
        for run in runs:
            await self._node.pause(run, paused=paused)
            self._node.journal.record("control", f"{run.name} is {what}", run=run.name)
        return self._done("pause" if paused else "resume", runs)

    async def _set(self, request: Request, tell: Tell) -> dict[str, Any]:
        every = request.get("every")
        if every is None:
            raise UsageError("what is to be set? `mesh set every=4`")
        runs = self._meant(request)
        for run in runs:
            run.every = every
            self._node.journal.record("control", f"{run.name}: every={every}", run=run.name)
        return {**self._done("set", runs), "every": every}

    async def _leave(self, request: Request, tell: Tell) -> dict[str, Any]:
        return self._done("leave", [])

    def _meant(self, request: Request) -> list[Run]:
        name = request.get("run")
        runs = [run for run in self._node.runs.values() if name in (None, run.name)]
        if not runs:
            known = ", ".join(self._node.runs) or "none"
            what = "no run" if name is None else f"no run {name!r}"
            raise UsageError(f"{what} is trained on {self._node.name}; there are: {known}")
        return runs

    def _done(self, what: str, runs: list[Run]) -> dict[str, Any]:
        own = self._node.own
        return {
            "schema": "mesh.done/1",
            "node": {"id": own.node, "name": own.name},
            "did": what,
            "runs": [run.name for run in runs],
        }


def failure(error: Exception) -> dict[str, Any]:
    """How an error travels."""
    code = error.code if isinstance(error, MeshError) else MeshError.code
    return {"ok": False, "error": {"code": code, "message": str(error)}}


def _spread(times: list[float] | tuple[float, ...]) -> dict[str, float | None]:
    if not times:
        return {"min_s": None, "avg_s": None, "max_s": None}
    figures = {"min_s": min(times), "avg_s": sum(times) / len(times), "max_s": max(times)}
    return {name: round(value, 6) for name, value in figures.items()}
