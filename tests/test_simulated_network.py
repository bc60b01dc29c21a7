"""The simulated network by itself: two or three bare transports, virtual time, exact times."""

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import trio

from mesh.core.address import Address
from mesh.errors import ConnectionRefused, StreamLost
from mesh.net.simulated import (
    HEARD,
    SimulatedDiscovery,
    SimulatedNetwork,
    SimulatedTransport,
    Weather,
)
from tests.mesh_in_memory import node_id, run_seeded

DELAY_S = 0.001
EXACT = Weather(delay_s=(DELAY_S, DELAY_S), bytes_per_s=1e12)
"""Every piece takes 1 ms, whatever its length."""

A, B, C = node_id(1), node_id(2), node_id(3)


def address(node, port=7710):
    return Address(f"10.0.0.{int(node[4:6])}", port)


class Lan:
    """Nodes that listen, and keep the streams that come in for the test to use."""

    def __init__(self, rng, nursery, weather=EXACT):
        self.network = SimulatedNetwork(rng, weather)
        self.transports = {}
        self.arrived = {}
        self.listens = {}
        self._nursery = nursery

    def start(self, *nodes):
        for node in nodes:
            put, self.arrived[node] = trio.open_memory_channel(100)
            transport = SimulatedTransport(self.network, node, address(node))
            self.transports[node] = transport
            heard = self.listens[node] = []

            async def keep(stream, put=put):
                put.send_nowait(stream)
                await trio.sleep_forever()

            self._nursery.start_soon(transport.serve, keep, heard.append)

    async def connect(self, a, b):
        near = await self.transports[a].connect(address(b))
        return near, await self.arrived[b].receive()


@contextlib.asynccontextmanager
async def lan(rng, *nodes, weather=EXACT):
    async with trio.open_nursery() as nursery:
        result = Lan(rng, nursery, weather)
        result.start(*nodes)
        await trio.sleep(1)
        yield result
        nursery.cancel_scope.cancel()


async def read(stream, count):
    """Exactly `count` bytes, or what came before the end of the stream."""
    data = bytearray()
    buffer = memoryview(bytearray(count))
    while len(data) < count and (got := await stream.receive_into(buffer[: count - len(data)])):
        data += buffer[:got]
    return bytes(data)


async def silent_for(stream, seconds):
    with trio.move_on_after(seconds) as scope:
        await stream.receive_into(memoryview(bytearray(1)))
    return scope.cancelled_caught


async def lost_after(call):
    """Seconds until this stream call raises StreamLost."""
    before = trio.current_time()
    with pytest.raises(StreamLost), trio.fail_after(3600):
        await call
    return trio.current_time() - before


def one():
    return memoryview(bytearray(1))


def virtual(main):
    """Makes a test of an async function of (lan, rng), for nodes A and B."""

    def test():
        async def run(rng):
            async with lan(rng, A, B) as both:
                await main(both, rng)

        run_seeded(run, 7)

    test.__name__ = main.__name__
    return test


# ------------------------------------------------------------------------------------- good weather


@virtual
async def test_bytes_arrive_in_order_after_the_delay_and_the_end_of_the_stream_after_them(lan, rng):
    near, far = await lan.connect(A, B)
    assert (near.peer, far.peer, near.host, far.host) == (B, A, "10.0.0.2", "10.0.0.1")
    before = trio.current_time()
    for piece in (b"one ", b"two ", b"three"):
        await near.send_all(piece)
    await near.aclose()
    assert await read(far, 100) == b"one two three"
    assert trio.current_time() - before == pytest.approx(DELAY_S)
    with pytest.raises(StreamLost):
        await near.send_all(b"x")


@virtual
async def test_a_sender_waits_while_the_buffer_of_its_reader_is_full(lan, rng):
    near, far = await lan.connect(A, B)
    with trio.move_on_after(60) as scope:
        await near.send_all(bytes(1_000_000))
    assert scope.cancelled_caught
    assert 200_000 < len(await read(far, 262_144)) < 1_000_000


@virtual
async def test_whoever_sends_to_an_end_that_was_closed_is_reset(lan, rng):
    near, far = await lan.connect(A, B)
    await far.aclose()
    await near.send_all(b"x")
    await trio.sleep(2 * DELAY_S)
    with pytest.raises(StreamLost):
        await near.send_all(b"x")


@virtual
async def test_a_connection_carries_what_the_weather_of_the_moment_lets_it_carry(lan, rng):
    near, far = await lan.connect(A, B)
    await near.send_all(bytes(100_000))
    lan.network.weather = Weather(bytes_until_lost=10_000)
    with pytest.raises(StreamLost):
        await near.send_all(bytes(260_000))
    await trio.sleep(1)
    received = 0
    with contextlib.suppress(StreamLost):
        while True:
            received += await far.receive_into(memoryview(bytearray(1000)))
    assert received > 100_000
    assert received % 1000, "a lost connection ends between any two bytes"


@virtual
async def test_one_node_loses_all_its_connections_and_no_other(lan, rng):
    lan.start(C)
    await trio.sleep(1)
    hit, hit_far = await lan.connect(A, B)
    spared, spared_far = await lan.connect(B, C)
    lan.network.lose(A)
    assert await lost_after(hit.send_all(b"x")) == 0
    assert await lost_after(hit_far.receive_into(one())) == 0
    await spared.send_all(b"x")
    assert await read(spared_far, 1) == b"x"


# --------------------------------------------------------------------------------------------- cuts


@virtual
async def test_a_sender_into_a_cut_is_lost_after_five_seconds_and_its_peer_notices_nothing(
    lan, rng
):
    near, far = await lan.connect(A, B)
    lan.network.partition(frozenset({A}), frozenset({B}))
    await trio.sleep(100)
    before = trio.current_time()
    await near.send_all(b"x")
    await trio.sleep(3)
    await near.send_all(b"y")
    await lost_after(near.receive_into(one()))
    assert trio.current_time() - before == pytest.approx(5.0)
    assert await silent_for(far, 1000)


@virtual
async def test_a_reader_that_waited_before_the_cut_learns_of_it_when_its_writer_gives_up(lan, rng):
    near, _ = await lan.connect(A, B)
    async with trio.open_nursery() as nursery:
        ended = []

        async def reads():
            await lost_after(near.receive_into(one()))
            ended.append(trio.current_time())

        nursery.start_soon(reads)
        await trio.sleep(1)
        lan.network.cut(A, B)
        before = trio.current_time()
        await near.send_all(b"x")
    assert ended == [pytest.approx(before + 5.0)]


@virtual
async def test_whoever_sends_nothing_notices_no_cut_however_long(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.cut(A, B)
    assert await silent_for(near, 3600)
    lan.network.heal()
    await near.send_all(b"x")
    assert await read(far, 1) == b"x"


@virtual
async def test_what_was_sent_into_a_cut_that_heals_arrives_a_retransmission_later_and_in_order(
    lan, rng
):
    near, far = await lan.connect(A, B)
    lan.network.cut(A, B)
    await near.send_all(b"held ")
    await trio.sleep(4)
    await near.send_all(b"back ")
    assert await silent_for(far, 0.9)
    lan.network.heal()
    healed = trio.current_time()
    await near.send_all(b"and new")
    assert await read(far, 17) == b"held back and new"
    assert 0.2 <= trio.current_time() - healed <= 1.61
    assert await silent_for(near, 100)


@virtual
async def test_what_is_under_way_when_the_cut_comes_waits_for_its_end_too(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.weather = Weather(delay_s=(DELAY_S, DELAY_S), bytes_per_s=10_000)
    data = rng.randbytes(100_000)
    await near.send_all(data)
    lan.network.partition(frozenset({A}))
    cut = trio.current_time()
    assert await silent_for(far, 4)
    lan.network.partition()
    assert await read(far, len(data)) == data
    assert 10 + 4 < trio.current_time() - cut < 10 + 4 + 1.7


@virtual
async def test_where_only_acknowledgements_are_cut_the_bytes_arrive_and_their_sender_is_lost(
    lan, rng
):
    near, far = await lan.connect(A, B)
    lan.network.cut(B, A)
    assert not lan.network.reachable(A, B)
    before = trio.current_time()
    await near.send_all(b"x")
    assert await read(far, 1) == b"x"
    await lost_after(near.receive_into(one()))
    assert trio.current_time() - before == pytest.approx(5.0)
    assert await silent_for(far, 1000)


@virtual
async def test_the_other_end_of_a_lost_connection_gives_up_by_itself_or_is_reset(lan, rng):
    for healed in (True, False):
        near, far = await lan.connect(A, B)
        lan.network.cut(A, B)
        await near.send_all(b"x")
        await trio.sleep(10)
        if healed:
            lan.network.heal()
        assert await silent_for(far, 100)
        await far.send_all(b"y")
        expected = 2 * DELAY_S if healed else 5.0
        assert await lost_after(far.receive_into(one())) == pytest.approx(expected)


@virtual
async def test_a_dial_into_a_cut_of_either_way_fails_after_five_seconds(lan, rng):
    for way in ((A, B), (B, A)):
        lan.network.cut(*way)
        assert await lost_after(lan.transports[A].connect(address(B))) == pytest.approx(5.0)
        lan.network.heal()


@virtual
async def test_a_dial_into_a_cut_that_ends_gets_through_with_its_next_attempt(lan, rng):
    before = trio.current_time()
    lan.network.cut(A, B)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lan.transports[A].connect, address(B))
        await trio.sleep(1.5)
        lan.network.heal()
    assert trio.current_time() - before == pytest.approx(3.0 + 2 * DELAY_S)


@virtual
async def test_nobody_learns_through_a_cut_that_a_process_was_killed(lan, rng):
    _, far = await lan.connect(A, B)
    lan.network.partition(frozenset({A}))
    lan.network.crash(A)
    with pytest.raises(StreamLost, match="does not answer"):
        await lan.transports[B].connect(address(A))
    assert await silent_for(far, 100)
    lan.network.heal()
    assert await silent_for(far, 100)
    await far.send_all(b"x")
    assert await lost_after(far.receive_into(one())) == pytest.approx(2 * DELAY_S)


# --------------------------------------------------------------------------------------------- loss


@virtual
async def test_a_lost_piece_comes_after_its_retransmissions_and_everything_behind_it_too(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.weather = Weather(delay_s=(DELAY_S, DELAY_S), bytes_per_s=1e12, loss=0.2)
    late = []
    for _ in range(200):
        before = trio.current_time()
        await near.send_all(b"a")
        await near.send_all(b"b")
        assert await read(far, 2) == b"ab"
        late.append(round(trio.current_time() - before - DELAY_S, 6))
    assert {0, 0.2} < set(late) <= {0, 0.2, 0.6, 1.4, 3.0}
    assert 0.25 < sum(x > 0 for x in late) / len(late) < 0.47  # one of two lost: 1 - 0.8^2


@virtual
async def test_where_nothing_gets_through_the_sender_is_lost_after_five_seconds(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.weather = Weather(loss=1.0)
    await near.send_all(b"x")
    assert await lost_after(near.receive_into(one())) == pytest.approx(5.0)
    assert await lost_after(lan.transports[A].connect(address(B))) == pytest.approx(5.0)
    lan.network.weather = EXACT
    assert await silent_for(far, 100)
    await far.send_all(b"y")
    assert await lost_after(far.receive_into(one())) == pytest.approx(2 * DELAY_S)


# ------------------------------------------------------------------------------------------- stalls


@virtual
async def test_a_stalled_node_reads_nothing_and_loses_nothing(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.stall(B)
    await near.send_all(b"x")
    assert await silent_for(far, 3600)
    with trio.move_on_after(100) as sending:
        await far.send_all(b"y")
    with trio.move_on_after(100) as dialling:
        await lan.transports[B].connect(address(A))
    assert sending.cancelled_caught
    assert dialling.cancelled_caught
    lan.network.resume(B)
    assert await read(far, 1) == b"x"
    await far.send_all(b"y")
    assert await read(near, 1) == b"y"


@virtual
async def test_a_stalled_node_is_dialled_but_its_handler_begins_when_it_runs_again(lan, rng):
    lan.network.stall(B)
    near = await lan.transports[A].connect(address(B))
    await near.send_all(b"x")
    await trio.sleep(30)
    with pytest.raises(trio.WouldBlock):
        lan.arrived[B].receive_nowait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lan.network.awake, B)
        await trio.sleep(1)
        assert nursery.child_tasks
        lan.network.resume(B)
    far = await lan.arrived[B].receive()
    assert await read(far, 1) == b"x"


@virtual
async def test_what_a_stalled_node_closes_is_closed_when_it_runs_again(lan, rng):
    near, far = await lan.connect(A, B)
    lan.network.stall(B)
    await far.aclose()
    assert await silent_for(near, 100)
    lan.network.resume(B)
    assert await read(near, 1) == b""


# --------------------------------------------------------------------------------- crash and vanish


@virtual
async def test_a_crash_resets_the_other_ends_and_its_address_refuses(lan, rng):
    near, far = await lan.connect(A, B)
    await near.send_all(b"said before")
    await trio.sleep(1)
    lan.network.crash(A)
    assert await read(far, 11) == b"said before"
    assert await lost_after(far.receive_into(one())) == pytest.approx(DELAY_S)
    with pytest.raises(ConnectionRefused):
        await lan.transports[B].connect(address(A))


@virtual
async def test_the_dying_tasks_of_a_crashed_node_reach_nobody(lan, rng):
    near, far = await lan.connect(A, B)
    waiting, waiting_far = await lan.connect(A, B)
    await far.send_all(b"x")
    ended = []

    async def wait():
        with pytest.raises(StreamLost):
            await waiting.receive_into(one())
        with pytest.raises(StreamLost):
            await waiting.send_all(b"last words")
        await waiting.aclose()
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(1)
        lan.network.cut(A, B)  # so that the reset does not hide what else arrives
        crashed = trio.current_time()
        lan.network.crash(A)
    assert ended == [crashed]
    for call in (near.send_all(b"y"), near.receive_into(one())):
        with pytest.raises(StreamLost):
            await call
    assert await lost_after(lan.transports[A].connect(address(B))) == 0
    await near.aclose()
    lan.network.heal()
    assert await silent_for(far, 100)
    assert await silent_for(waiting_far, 100)


@pytest.mark.parametrize("how", ["crash", "vanish"])
def test_a_node_that_comes_back_has_new_streams_and_its_old_ones_stay_dead(how):
    async def run(rng):
        async with lan(rng, A, B) as both:
            old, old_far = await both.connect(A, B)
            getattr(both.network, how)(A)
            await trio.sleep(10)
            both.start(A)
            await trio.sleep(1)
            near, far = await both.connect(A, B)
            await near.send_all(b"new")
            assert await read(far, 3) == b"new"
            back, back_far = await both.connect(B, A)
            await back.send_all(b"too")
            assert await read(back_far, 3) == b"too"
            with pytest.raises(StreamLost):
                await old.send_all(b"old")
            if how == "vanish":
                assert await silent_for(old_far, 100)
                await old_far.send_all(b"anybody?")
            assert await lost_after(old_far.receive_into(one())) <= 2 * DELAY_S + 1e-9

    run_seeded(run, 8)


@virtual
async def test_a_power_cut_is_silence_for_readers_and_five_seconds_for_senders_and_dials(lan, rng):
    _, reader = await lan.connect(A, B)
    _, writer = await lan.connect(A, B)
    lan.network.vanish(A)
    assert await silent_for(reader, 3600)
    await writer.send_all(b"x")
    assert await lost_after(writer.receive_into(one())) == pytest.approx(5.0)
    assert await lost_after(lan.transports[B].connect(address(A))) == pytest.approx(5.0)


@virtual
async def test_what_waits_for_a_machine_without_power_is_reset_when_it_has_started_again(lan, rng):
    _, far = await lan.connect(A, B)
    lan.network.vanish(A)
    await far.send_all(b"x")
    await trio.sleep(3)
    lan.start(A)
    assert 0.2 < await lost_after(far.receive_into(one())) < 1.7


@virtual
async def test_a_node_that_moves_says_where_it_is_and_its_connections_bring_nothing(lan, rng):
    near, far = await lan.connect(A, B)
    elsewhere = Address("10.0.7.7", 7710)
    lan.transports[A].move(elsewhere)
    assert lan.listens[A] == [(address(A),), (elsewhere,)]
    for end in (near, far):
        await end.send_all(b"x")
    for end in (near, far):
        assert await silent_for(end, 2.4)
    for end in (near, far):
        assert await lost_after(end.receive_into(one())) == pytest.approx(0.2 if end is near else 0)
    assert await lost_after(lan.transports[B].connect(address(A))) == pytest.approx(5.0)
    back = await lan.transports[B].connect(elsewhere)
    await back.send_all(b"x")
    assert await read(await lan.arrived[A].receive(), 1) == b"x"


async def chat(lan, words):
    """A and B say so many words to each other; returns how many of B's arrived."""
    heard = 0
    with contextlib.suppress(StreamLost):
        near, far = await lan.connect(A, B)
        for _ in range(words):
            await near.send_all(b"ping")
            assert await read(far, 4) in (b"ping", b"")
            await far.send_all(b"pong")
            heard += len(await read(near, 4)) // 4
        await near.aclose()
        await far.aclose()
    return heard


@pytest.mark.parametrize("victim", [A, B])
def test_a_node_can_be_crashed_at_each_of_its_stream_calls(victim):
    async def run(rng, crash_at):
        calls = 0

        def touched(node):
            nonlocal calls
            if node == victim:
                calls += 1
                if calls == crash_at:
                    both.network.crash(victim)

        async with lan(rng, A, B) as both:
            both.network.touched = touched
            with trio.move_on_after(100):
                return await chat(both, 3), calls
            return None, calls

    whole, calls = run_seeded(run, 9, 10**9)
    assert whole == 3
    assert calls == {A: 1 + 3 + 3 + 1, B: 3 + 3 + 1}[victim]
    heard = [run_seeded(run, 9, n)[0] for n in range(1, calls + 1)]
    assert heard == sorted(heard)
    assert heard[0] == 0
    assert heard[-1] == 3


# ---------------------------------------------------------------------------------------- discovery


async def seek(network, nursery, indices, heard):
    transports = []
    for index in indices:
        me = node_id(index)
        transport = SimulatedTransport(network, me, address(me))
        transports.append(transport)
        found = heard.setdefault(me, [])
        where = []
        await nursery.start(listen, transport, where)
        nursery.start_soon(
            SimulatedDiscovery(network, me).run,
            lambda where=where: where[-1],
            lambda candidate, found=found: found.append(candidate.addresses[0]),
        )
    return transports


async def listen(transport, where, *, task_status):
    def listening(addresses):
        where.append(addresses)
        if len(where) == 1:
            task_status.started()

    async def hold(stream):
        await trio.sleep_forever()

    await transport.serve(hold, listening)


@pytest.mark.parametrize("fault", ["stall", "crash", "vanish", "cut"])
def test_discovery_brings_everybody_together_but_whom_a_fault_keeps_apart(fault):
    async def run(rng):
        network, heard = SimulatedNetwork(rng, EXACT), {}
        async with trio.open_nursery() as nursery:
            await seek(network, nursery, (1, 2, 3), heard)
            await trio.sleep(1)
            assert {len(set(found)) for found in heard.values()} == {2}
            if fault == "cut":
                network.cut(A, C)
                network.cut(B, C)
            else:
                getattr(network, fault)(C)
            for found in heard.values():
                found.clear()
            if fault != "cut":
                await seek(network, nursery, [4], heard)
                await trio.sleep(0.1)
                assert set(heard[node_id(4)]) == {address(A), address(B)}
            await trio.sleep(30)
            assert address(C) not in heard[A] + heard[B]
            assert heard[C] == []
            assert address(B) in heard[A]
            network.resume(C)
            network.heal()
            await trio.sleep(45)  # they ask after 10, 20 and 40 s
            assert (address(C) in heard[A]) == (fault in ("stall", "cut"))
            nursery.cancel_scope.cancel()

    run_seeded(run, 10)


def test_a_node_that_moved_is_heard_of_at_its_new_address_at_once():
    async def run(rng):
        network, heard = SimulatedNetwork(rng, EXACT), {}
        async with trio.open_nursery() as nursery:
            transport, _ = await seek(network, nursery, (1, 2), heard)
            await trio.sleep(1)
            transport.move(Address("10.0.7.7", 7710))
            await trio.sleep(0.1)
            assert heard[B][-1] == Address("10.0.7.7", 7710)
            nursery.cancel_scope.cancel()

    run_seeded(run, 14)


def test_in_a_large_mesh_discovery_is_bounded_and_still_joins_everybody():
    async def run(rng):
        network, heard = SimulatedNetwork(rng, EXACT), {}
        async with trio.open_nursery() as nursery:
            await seek(network, nursery, range(1, 100), heard)
            await trio.sleep(1)
            told = [len(found) for found in heard.values()]
            assert sum(told) < 99 * 2 * HEARD
            assert min(told) >= HEARD - 4
            before = sum(told)
            await trio.sleep(10)
            assert sum(len(found) for found in heard.values()) - before < 99 * 2 * 5
            nursery.cancel_scope.cancel()

    run_seeded(run, 11)


# -------------------------------------------------------------------------------------- determinism


def whole_life(seed):
    """A digest of everything that is read, and when, while all faults happen."""
    digest = hashlib.sha256()
    weather = Weather(bytes_until_lost=5000, loss=0.1)
    nodes = [node_id(i) for i in range(1, 9)]

    async def run(rng):
        async with lan(rng, *nodes, weather=weather) as all_of_them:
            network = all_of_them.network

            async def talk(me):
                while True:
                    peer = rng.choice(nodes)
                    try:
                        stream = await all_of_them.transports[me].connect(address(peer))
                        await stream.send_all(rng.randbytes(rng.randrange(1, 2000)))
                        await stream.aclose()
                    except StreamLost as error:
                        digest.update(f"{trio.current_time()} {me} {error}\n".encode())
                    await trio.sleep(rng.random() / 10)

            async def listen(me):
                while True:
                    stream = await all_of_them.arrived[me].receive()
                    with contextlib.suppress(StreamLost), trio.move_on_after(1):
                        data = await read(stream, 3000)
                        digest.update(f"{trio.current_time()} {me} ".encode() + data)
                    await stream.aclose()

            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(talk, node)
                    nursery.start_soon(listen, node)
                for _ in range(40):
                    await trio.sleep(rng.random())
                    node, other = rng.sample(nodes, 2)
                    fault = rng.randrange(8)
                    if fault < 4:
                        call = (network.stall, network.resume, network.lose, network.vanish)[fault]
                        call(node)
                    elif fault == 4:
                        network.partition(frozenset({node, other}))
                    elif fault == 5:
                        network.cut(node, other)
                    elif fault == 6:
                        network.heal()
                    elif network.processes[node].gone:
                        all_of_them.start(node)
                nursery.cancel_scope.cancel()

    run_seeded(run, seed)
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_life_in_another_process_with_other_hashes():
    code = "from tests.test_simulated_network import whole_life; print(whole_life(12))"
    lives = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert lives[0] == lives[1]
    assert whole_life(12) + "\n" == lives[0]
    assert whole_life(13) + "\n" != lives[0]


def test_two_nodes_are_apart_if_any_group_holds_only_one_of_them():
    rng = Random(1)
    for _ in range(200):
        network = SimulatedNetwork(rng)
        groups = [
            frozenset(rng.sample((A, B, C), rng.randrange(4))) for _ in range(rng.randrange(4))
        ]
        network.partition(*groups)
        for a in (A, B, C):
            for b in (A, B, C):
                together = all((a in group) == (b in group) for group in groups)
                assert network.reachable(a, b) == together
