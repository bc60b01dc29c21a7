"""Exchanges that other nodes begin with this one: the other half of the hot path.

A fragment's trip: _answer_fragment: read into a buffer -> _apply: delta = x - w, w moves, the reply
is kept until it is acknowledged -> the reply is sent. Rules: 1. Each (exchange, fragment) is applied
once; asked again, the kept reply goes out again. 2. Nothing waits between looking up a fragment and
applying it. 3. What is not finite is refused before it touches anything. 4. Nobody asks a run over a
connection that is older.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

import trio

from mesh import wire
from mesh.bench import BenchAnswerer
from mesh.core import events as ev
from mesh.core.exchange import answer_beside, moved, share
from mesh.core.for_people import BenchBlock
from mesh.core.guard import room
from mesh.core.messages import (
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    FinishExchange,
    Fragment,
    NodeId,
    OpenExchange,
    Refusal,
    RunInfo,
    SchemaRequest,
    Turn,
)
from mesh.core.schedule import Relation, relation
from mesh.core.schema import page_of
from mesh.core.strategies import EXACT
from mesh.errors import NotFinite, RemoteProtocolError, StreamLost
from mesh.frames import SEND_S, STALL_S, FrameReader, send_frame
from mesh.net.transport import Stream
from mesh.runs import KeptReply, Run

IDLE_S: Final = 120.0
"""A bulk connection that carries nothing is closed after this; the initiator dials anew."""

CONNECTIONS_LIMIT: Final = 256
PEER_LIMIT: Final = 8
"""Bulk connections answered at once, in all and of one peer (one for each run that it exchanges at the
same moment); an idle one holds a descriptor and a header buffer of 64 kB."""


BACK_S: Final = 60.0
"""A peer whose connection broke resumes within this, or is most likely gone."""


class Opened(NamedTuple):
    """An exchange that is being answered."""

    run: Run
    terms: OpenExchange
    reach: float | None
    """of the run here, as it was opened"""


class Responder:
    """Answers the exchanges of one node."""

    def __init__(
        self,
        me: NodeId,
        runs: Mapping[str, Run],
        *,
        emit: Callable[[ev.Event], Awaitable[None]],
        info_of: Callable[[str], RunInfo | None],
        out_of_turn: Callable[[str, NodeId, Turn | None], tuple[str, int] | None],
        refused: Callable[[str], None],
    ) -> None:
        """`info_of` is what this node says of its runs, `out_of_turn` why a request comes at the
        wrong place of its rounds; `refused` counts what peers did wrong."""
        self._me = me
        self._runs = runs
        self._emit = emit
        self._info_of = info_of
        self._out_of_turn = out_of_turn
        self._refused = refused
        self._bench = BenchAnswerer()
        self._answering: dict[NodeId, list[trio.CancelScope]] = {}
        self._left: dict[NodeId, float] = {}
        """when the last connection of a peer ended"""

    async def answer(self, stream: Stream, reader: FrameReader) -> None:
        """Answers one peer's exchanges until its connection ends."""
        peer = stream.peer
        mine = self._answering.get(peer, [])
        total = sum(len(scopes) for scopes in self._answering.values())
        if total >= CONNECTIONS_LIMIT or len(mine) >= PEER_LIMIT:
            await send_frame(stream, Refusal(reason="too many bulk connections"))
            return
        with trio.CancelScope() as scope:
            self._answering.setdefault(peer, mine).append(scope)
            try:
                await self._answer(stream, reader)
            finally:
                mine.remove(scope)
                if not mine:
                    del self._answering[peer]
                    self._left = {
                        node: at for node, at in self._left.items() if self._waits_for(node)
                    }
                    self._left[peer] = trio.current_time()

    def _waits_for(self, peer: NodeId) -> bool:
        """Whether it is connected, or was until a moment ago: what it began here is not forgotten."""
        left = self._left.get(peer, -math.inf)
        return peer in self._answering or trio.current_time() < left + BACK_S

    def drop(self, peer: NodeId) -> None:
        """The peer is dead: nothing more comes over its connections."""
        for scope in self._answering.get(peer, []):
            scope.cancel()

    async def _answer(self, stream: Stream, reader: FrameReader) -> None:
        opened: Opened | None = None
        refused: int | None = None
        welcome = b""
        since = trio.current_time()
        while True:
            message, length = await reader.message(timeout_s=IDLE_S, bodies=True)
            if welcome and not isinstance(message, Fragment):
                await stream.send_all(welcome, SEND_S)
                welcome = b""
            match message:
                case OpenExchange() if not length:
                    if self._is_younger(message.run, since):
                        await send_frame(stream, Refusal(reason="older than the run: dial again"))
                        return
                    run, reply = self._open(stream.peer, message)
                    opened = Opened(run, message, run.reach()) if run else None
                    refused = None if run else message.exchange
                    if run and message.pull and message.weight > 0:  # an observer's is 0
                        await self._emit(ev.WeightsServed(run=run.name))
                    # Where the first fragment is here already, one packet goes back for both.
                    welcome = wire.encode(reply) if run and reader.unread else b""
                    if not welcome:
                        await send_frame(stream, reply)
                case Fragment() if message.exchange == refused:
                    # Sent before our refusal arrived.
                    await reader.drop_body(length, timeout_s=STALL_S)
                case Fragment() if opened and message.exchange == opened.terms.exchange:
                    if self._runs.get(opened.run.name) is not opened.run:
                        raise StreamLost("the run ended here")
                    await self._answer_fragment(stream, reader, opened, message, length, welcome)
                    welcome = b""
                case BenchBlock() if opened is None:
                    await self._bench.answer(stream, reader, message, length)
                    return
                case FinishExchange() if opened and message.exchange == opened.terms.exchange:
                    if not opened.terms.pull:
                        opened.run.responses.finish(stream.peer, message.exchange)
                        opened.run.counters.answered += 1
                    opened = None
                case FinishExchange() if not length:
                    pass
                case SchemaRequest() if not length:
                    asked = self._runs.get(message.run)
                    entries = asked.spec.entries if asked else ()
                    await send_frame(stream, page_of(entries, message))
                case Refusal():
                    return
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} out of turn")

    def _is_younger(self, name: str, since: float) -> bool:
        """Whether this run began after its asker connected. What a partition held back may arrive
        when the asker has forgotten it, as the run that it asked was gone."""
        run = self._runs.get(name)
        return run is not None and run.attached_at > since

    def _open(
        self, peer: NodeId, message: OpenExchange
    ) -> tuple[Run | None, ExchangeOpened | ExchangeRefused]:
        reason, position = self._objection(peer, message), None
        resumed = reason is None and self._runs[message.run].responses.knows(peer, message.exchange)
        if reason is None and not message.pull and not resumed:
            reason, position = self._out_of_turn(message.run, peer, message.turn) or (None, None)
        if reason is None and not message.pull:
            reason = self._runs[message.run].responses.open(
                peer,
                message.exchange,
                message.start,
                message.codec,
                message.first,
                message.end,
                weight=message.weight,
                turn=message.turn,
                waits_for=self._waits_for,
            )
        if reason is None:
            run = self._runs[message.run]
            return run, ExchangeOpened(
                exchange=message.exchange,
                weight=run.spec.weight,
                clock=self._clock(peer, run, message),
            )
        return None, ExchangeRefused(
            exchange=message.exchange,
            reason=reason,
            unknown=self._refuse_for_ever(peer, message),
            position=position,
        )

    def _refuse_for_ever(self, peer: NodeId, message: OpenExchange) -> bool:
        """Enters the refusal; False where the exchange was begun and may be resumed another time."""
        run = self._runs.get(message.run)
        return message.pull or run is None or run.responses.refuse(peer, message.exchange)

    @staticmethod
    def _clock(peer: NodeId, run: Run, opening: OpenExchange) -> float:
        """What to say of the mesh clock; it moves when an exchange is opened first."""
        if opening.pull:
            return run.clock.steps
        return run.responses.clock(
            peer,
            opening.exchange,
            lambda: run.clock.answer(
                opening.clock, opening.weight, run.spec.weight, halved=run.clock_crosses()
            ),
        )

    def _objection(self, peer: NodeId, message: OpenExchange) -> str | None:
        run, info = self._runs.get(message.run), self._info_of(message.run)
        if run is None or info is None:
            return "this run is not trained here"
        if message.schema != info.schema:
            self._refused("schema")
            return "schema differs"
        if not info.started or run.how is None:
            return "no weights here yet"
        if run.paused:
            return "paused"
        if message.codec not in run.codecs:
            return f"no codec {message.codec} here"
        if message.strategy != info.strategy:
            return f"strategy differs: {info.strategy} here, {message.strategy} there"
        if message.pull:
            taking = run.current is not None and run.current.pull and not run.current.clip
            return "taking weights itself" if taking else None
        if (message.turn is not None) != (message.strategy == EXACT):
            return "a turn belongs to exact rounds, and to each of them"
        if message.weight + run.spec.weight <= 0:
            return "two replicas of weight 0"
        theirs = RunInfo(
            run=message.run,
            schema=message.schema,
            started=message.started,
            exchanged=message.exchanged,
            progress=message.progress,
        )
        if relation(info, self._me, theirs, peer) is not Relation.AVERAGE:
            return "one of the two takes the other's weights first"
        return None

    async def _answer_fragment(
        self,
        stream: Stream,
        reader: FrameReader,
        opened: Opened,
        message: Fragment,
        length: int,
        welcome: bytes,
    ) -> None:
        run, opening, _ = opened
        index = message.index
        if index >= run.replica.fragments:
            raise RemoteProtocolError(f"fragment {index} of {run.replica.fragments}")
        codec = run.codecs[opening.codec]
        body_bytes = run.replica.body_bytes(index, codec)
        expected = 0 if opening.pull else body_bytes
        if length != expected:
            raise RemoteProtocolError(f"fragment of {length} bytes where {expected} belong")
        before = reader.received_bytes
        part = 1.0
        scratch = run.buffers.take()
        try:
            if opening.pull:
                reply = scratch[:body_bytes]
                run.replica.write(index, reply, codec)
            else:
                await reader.body(scratch[:length], timeout_s=STALL_S)
                kept, part = self._apply(stream.peer, opened, message, scratch[:length])
                reply = kept[:length]
                if opening.turn and run.responses.whole(stream.peer, opening.exchange):
                    await self._emit(ev.ExchangeAnswered(run=run.name, turn=opening.turn))
            delta = Delta(exchange=opening.exchange, index=index, part=part)
            sent = await send_frame(stream, delta, reply, before=welcome)
        finally:
            run.buffers.give(scratch)
        run.counters.bytes_sent += sent
        run.counters.bytes_received += reader.received_bytes - before + length

    def _apply(
        self, peer: NodeId, opened: Opened, message: Fragment, body: memoryview
    ) -> tuple[memoryview, float]:
        """Applies a fragment once, or finds what was answered before. Nothing waits in here."""
        run, opening, reach = opened
        if self._runs.get(run.name) is not run:
            raise StreamLost("the run ended here")
        kept = run.responses.kept(peer, opening.exchange, message.index, message.received)
        if kept is not None:
            return kept.buffer, kept.part
        own, part = run.spec.weight, 1.0
        step = share(opening.weight, own, turn=opening.turn)
        if not opening.turn:
            part = answer_beside(run.initiated, message.index, step, own)
        left = room(opening.reach, reach, run.responses.used(peer, opening.exchange))
        reply = run.buffers.take()
        try:
            codec = run.codecs[opening.codec]
            square = run.replica.answer(
                message.index, body, part * step, reply[: len(body)], codec, left
            )
        except NotFinite:
            run.buffers.give(reply)
            run.counters.non_finite += 1
            raise
        moved(run.initiated, message.index, part * step)
        run.responses.applied(peer, opening.exchange, message.index, KeptReply(reply, part), square)
        return reply, part
