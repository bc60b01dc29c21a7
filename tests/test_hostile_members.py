"""Members with a valid certificate that say what no honest one would, to whole nodes in virtual time.

What a real process does with bad bytes is in test_bad_input.py; here every frame is well formed.
"""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import trio

from mesh import wire
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.messages import (
    PROTOCOL,
    Ack,
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    Fragment,
    Hello,
    Member,
    OpenExchange,
    Ping,
    Purpose,
    Refusal,
    RunInfo,
    SchemaEntry,
    State,
    Turn,
)
from mesh.core.schedule import Schedule
from mesh.core.schema import digest
from mesh.errors import MeshError
from mesh.frames import send_frame
from mesh.journal import NOTES_LIMIT, NOTES_S
from mesh.links import dial, greet
from mesh.net.simulated import SimulatedTransport
from mesh.player import Player
from tests.helpers import opening
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until


class Hostile:
    """A member that is played by a test. It answers pings, and exchanges as `bulk` says."""

    def __init__(self, mesh, index=99, runs=(), bulk=None):
        self.me, self.at = node_id(index), Address(f"10.0.0.{index}", 7710)
        self.row = Member(
            node=self.me,
            name="hostile",
            incarnation=1,
            state=State.ALIVE,
            addresses=(self.at,),
            runs=runs,
        )
        self.heard = []
        self._transport = SimulatedTransport(mesh.network, self.me, self.at)
        self._bulk = bulk

    def hello(self, purpose=Purpose.CONTROL):
        return Hello(
            protocol=PROTOCOL,
            name="hostile",
            purpose=purpose,
            member=self.row,
            instance=5,
            age_ms=1,
        )

    async def dial(self, index, purpose=Purpose.CONTROL):
        """A greeted connection to a node."""
        return await dial(
            self._transport, [Address(f"10.0.0.{index}", 7710)], lambda: self.hello(purpose)
        )

    async def join(self, nursery, *indexes):
        """Is connected to these nodes from now on; returns the connections."""
        peers = [await self.dial(index) for index in indexes]
        for peer in peers:
            nursery.start_soon(self._live, peer)
        return peers

    async def serve(self):
        await self._transport.serve(self._welcome, lambda addresses: None)

    async def _welcome(self, stream):
        try:
            peer = await greet(stream, self.hello())
            if peer.hello.purpose is Purpose.CONTROL:
                await self._live(peer)
            elif self._bulk is not None:
                await self._bulk(peer)
        except MeshError:
            pass

    async def _live(self, peer):
        try:
            while True:
                message, _ = await peer.reader.message(timeout_s=600)
                self.heard.append(message)
                if isinstance(message, Ping):
                    await send_frame(
                        peer.stream, Ack(sequence=message.sequence, table=message.table)
                    )
        except MeshError:
            pass


async def training_mesh(mesh, indexes, *, strategy="pair", posts=0):
    """Runs that met, on these nodes."""
    players = []
    for index in indexes:
        player = Player(np.full(6, index, dtype=np.float32), strategy=strategy)
        await player.attach(mesh.nodes[index])
        players.append(player)
    await until(lambda: all(p.begun and p.node.exchanged(p.run) for p in players))
    for _ in range(posts):
        for player in players:
            await player.post(waits=True)
        await trio.sleep(0.1)
    return players


def run_of(player, **changes):
    """How a hostile row names the run."""
    return replace(player.node._protocol.run_info("toy"), **changes)


@pytest.mark.parametrize(
    ("strategy", "turn"),
    [("pair", Turn(view="", position=0, step=1.0)), ("exact", None)],
)
def test_a_turn_is_believed_in_exact_rounds_only_and_is_there_in_each(strategy, turn):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            players = await training_mesh(mesh, (1, 2), strategy=strategy)
            before = players[0].weights.copy()
            peer = await Hostile(mesh).dial(1, Purpose.BULK)
            schema = players[0].run.spec.schema
            asked = opening("toy", schema, strategy=strategy, turn=turn)
            await send_frame(peer.stream, asked)
            answer, _ = await peer.reader.message(timeout_s=5)
            if isinstance(answer, ExchangeOpened):
                body = np.full(6, 1e6, np.float32).tobytes()
                await send_frame(peer.stream, Fragment(exchange=1, index=0, received=0), body)
                await peer.reader.message(timeout_s=5, bodies=True)
            return answer, before.tolist(), players[0].weights.tolist()

    answer, before, after = run_seeded(main, 1)
    assert isinstance(answer, ExchangeRefused)
    assert "a turn belongs to exact rounds" in answer.reason
    assert after == before


def test_a_message_that_does_not_fit_is_dropped_and_the_connection_goes_on(caplog):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await until(lambda: mesh.states(1) == {"n2": "alive"})
            node = mesh.nodes[1]
            (number,) = node._links._links
            long = Refusal(reason="x" * wire.HEADER_LIMIT_BYTES)
            for message in (long, Ping(sequence=7, table=0), long):
                node._links.send(number, message)
            await trio.sleep(5)
            return number in node._links._links, node.statistics().dropped, mesh.states(1)

    assert run_seeded(main, 1) == (True, 2, {"n2": "alive"})
    assert len(caplog.messages) == 1, "said once"


def test_a_donor_that_refuses_with_a_place_in_rounds_is_given_up_like_any_other():
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            asked = 0

            async def refuses(peer):
                nonlocal asked
                while True:
                    message, length = await peer.reader.message(timeout_s=600, bodies=True)
                    await peer.reader.drop_body(length, timeout_s=5)
                    if isinstance(message, OpenExchange):
                        asked += 1
                        refusal = ExchangeRefused(
                            exchange=message.exchange, reason="later", unknown=False, position=0
                        )
                        await send_frame(peer.stream, refusal)

            schema = digest((SchemaEntry(name="w", shape=(6,), dtype="float32"),))
            info = RunInfo(run="toy", schema=schema, started=True, exchanged=True)
            hostile = Hostile(mesh, runs=(info,), bulk=refuses)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hostile.serve)
                await hostile.join(nursery, 1)
                player = await mesh.attach(1, np.zeros(6))
                await until(lambda: player.begun, 120)
                nursery.cancel_scope.cancel()
            return player.begun, asked

    assert run_seeded(main, 1) == ("alone", 5)


def test_a_flood_of_notes_of_one_kind_is_counted_and_others_are_told():
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            node = mesh.nodes[1]
            await trio.sleep(1)
            for k in range(1000):
                node._perform(ev.Note(text=f"invented{k} is dead", kind="dead"))
            node._perform(ev.Note(text="n7 left", kind="left"))
            before = [text.split(": ")[1] for text in mesh.notes]
            await trio.sleep(NOTES_S)
            node._perform(ev.Note(text="n8 left", kind="left"))
            return before, [text.split(": ")[1] for text in mesh.notes[len(before) :]], node.journal

    before, after, journal = run_seeded(main, 1)
    assert before == [*(f"invented{k} is dead" for k in range(NOTES_LIMIT)), "n7 left"]
    assert after == [f"and {1000 - NOTES_LIMIT} more such lines (dead)", "n8 left"]
    assert list(journal.notes) == before + after
    assert [event.text for event in journal.events(0, 600)][-2:] == after


def test_a_responder_that_drips_a_byte_at_a_time_holds_a_run_half_of_the_time_at_most():
    async def drips(peer):
        message, _ = await peer.reader.message(timeout_s=600, bodies=True)
        opened = ExchangeOpened(exchange=message.exchange, weight=1.0)
        delta = Delta(exchange=message.exchange, index=0, part=1.0)
        for byte in wire.encode(opened) + wire.encode(delta, 24) + bytes(24):
            await peer.stream.send_all(bytes([byte]))
            await trio.sleep(9)

    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            players = await training_mesh(mesh, (1, 2, 3), posts=10)

            async def completed_in(seconds):
                before = [p.run.counters.completed for p in players]
                for _ in range(seconds // 2):
                    for player in players:
                        await player.post(0.001, waits=True)
                    await trio.sleep(2)
                return min(
                    p.run.counters.completed - b for p, b in zip(players, before, strict=True)
                )

            hostile = Hostile(mesh, runs=(run_of(players[0]),), bulk=drips)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hostile.serve)
                await hostile.join(nursery, 1, 2, 3)
                done = await completed_in(3000)
                nursery.cancel_scope.cancel()
            return done, min(p.run.counters.failed for p in players)

    done, failed = run_seeded(main, 1)
    assert failed > 2, "each asked it"
    assert done > 0.4 * 1500


def test_made_up_members_of_a_large_mesh_cost_a_run_a_tenth_of_its_time():
    known = [node_id(k) for k in range(3)]
    rows = [*known, *(node_id(k) for k in range(100, 300))]
    info = RunInfo(run="r", schema="s", started=True, exchanged=True)
    schedule = Schedule(
        info=info,
        me=node_id(9),
        now=0.0,
        sync_timeout_s=1.0,
        rng=Random(5),
        connected=known,
    )
    now, spent, done = 0.0, 0.0, 0
    while now < 800:
        schedule.posted(now, waits=True)
        start = schedule.decide(now, [(node, info) for node in rows])
        took = 0.01 if start.peer in known else 15.0
        now += took
        spent += took * (start.peer not in known)
        done += start.peer in known
        ended = ev.ExchangeEnded(
            run="r",
            peer=start.peer,
            pull=False,
            outcome=ev.Outcome.COMPLETED if start.peer in known else ev.Outcome.ABANDONED,
            reason="",
            duration_s=took,
            square_distance=1.0,
            square_norm=1.0,
        )
        schedule.ended(ended, now)
        now += 0.1
    assert 0 < spent < 0.12 * now
    assert done > 0.85 * now / 0.11
    # First weights as well come from those that are there, if there are any.
    schedule.info = replace(info, started=False, exchanged=False)
    assert schedule.decide(now + 100, [(node, info) for node in rows]).peer in known
