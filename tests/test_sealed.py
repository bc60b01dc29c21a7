"""Bulk records against what an attacker on the wire can do to them, and against an independent end.

tests/helpers.py has the same records written once more, over blocking sockets (Records).
"""

import contextlib
import itertools
import socket
import sys
import threading
from functools import partial
from random import Random

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from mesh.core.messages import NodeId
from mesh.errors import PeerTimeout, RemoteProtocolError, StreamLost
from mesh.identity import create_mesh, join_mesh, load, node_of
from mesh.net import sealed, sockets
from mesh.net.sealed import RECORD_BYTES, Offer, SealedStream
from mesh.net.sockets import WAKE_BYTES, SocketStream
from mesh.net.tcp import (
    RTO_MAX,
    RTO_MAX_MS,
    THIN_LINEAR_TIMEOUTS,
    USER_TIMEOUT_MS,
    TcpTransport,
)
from tests.helpers import Records

OURS, THEIRS, OTHERS = (Offer("aes", bytes([n]) * 32) for n in (1, 2, 3))


def trio_run(function, *arguments):
    """Runs it; a deadline in place of a hung test."""

    async def bounded():
        with trio.fail_after(20):
            return await function(*arguments)

    return trio.run(bounded)


def ends(refused=None, *, ours=OURS, theirs=THEIRS):
    """A sealed stream and the bare socket on its other end."""
    mine, other = socket.socketpair()
    mine.setblocking(False)
    other.settimeout(10)
    below = SocketStream(mine, NodeId("peer"), "127.0.0.1")
    note = refused.append if refused is not None else lambda kind: None
    return SealedStream(below, ours, theirs, note), other


async def received(stream, length):
    data = memoryview(bytearray(length))
    got = 0
    while got < length:
        count = await stream.receive_into(data[got:])
        assert count, "the stream ended"
        got += count
    return bytes(data)


def records(own=THEIRS, *, peers=OURS, over=None):
    """What the other end sends, by the independent writing of it."""
    if over is None:
        over, there = socket.socketpair()
        there.close()
    return Records(over, str(own), str(peers))


@pytest.mark.parametrize("mine", ["aes", "chacha"])
@pytest.mark.parametrize("theirs", ["aes", "chacha"])
def test_an_independent_end_reads_and_writes_the_same_records(mine, theirs):
    ours, others = Offer(mine, OURS.key), Offer(theirs, THEIRS.key)
    stream, bare = ends(ours=ours, theirs=others)
    other = records(others, peers=ours, over=bare)
    rng = Random(4)
    sizes = [
        1,
        2,
        15,
        16,
        17,
        4000,
        4096,
        4097,
        65536,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 1,
        3 << 20,
    ]
    texts = [rng.randbytes(size) for size in sizes]

    def echo():
        for text in texts:
            data = b""
            while len(data) < len(text) + 5:
                data += other.recv(len(text) + 5 - len(data))
            assert data == b"head:" + text
            other.sendall(text)

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, echo)
            for text in texts:
                await stream.send_all(text, head=b"head:")
                assert await received(stream, len(text)) == text

    trio_run(main)


def test_views_of_any_length_get_every_byte_in_order():
    stream, other = ends()
    writer = records()
    rng = Random(5)
    text = rng.randbytes(300_000)
    cuts = sorted(rng.sample(range(len(text)), 200))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    sent = b"".join(writer.record(piece) for piece in pieces)

    async def main():
        data = bytearray()
        while len(data) < len(text):
            view = memoryview(bytearray(rng.choice((1, 7, 100, 5000, 1 << 20))))
            count = await stream.receive_into(view)
            assert count
            data += view[:count]
        assert data == text
        assert await stream.receive_into(memoryview(bytearray(1))) == 0

    def send():
        for start in range(0, len(sent), 777):
            other.sendall(sent[start : start + 777])
        other.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    trio_run(main)
    thread.join()


def flipped(record, at):
    changed = bytearray(record)
    changed[at] ^= 1
    return bytes(changed)


def attacks():
    """What arrives in place of two records, 100 and 60 bytes long."""

    honest = records()
    first, second = honest.record(b"a" * 100), honest.record(b"b" * 60)
    elsewhere = records(OTHERS).record(b"a" * 100)
    ours = records(OURS).record(b"a" * 100)
    yield "a bit of the text", flipped(first, 30) + second, 0
    yield "a bit of the tag", flipped(first, len(first) - 1) + second, 0
    yield "a bit of the length", flipped(first, 3) + second, 0
    yield "a bit of the second", first + flipped(second, 9), 1
    yield "replayed", first + first, 1
    yield "swapped", second + first, 0
    yield "left out", second, 0
    yield "cut short and joined", first[:-20] + second, 0
    yield "of another connection", elsewhere + second, 0
    yield "our own, sent back", ours + second, 0
    yield "a length of 0", b"\0\0\0\0" + second, 0
    yield "a tag alone", (16).to_bytes(4, "big") + bytes(16), 0
    yield "a length of 4 GiB", b"\xff\xff\xff\xff" + second, 0
    yield "one byte too long", ((1 << 20) + 17).to_bytes(4, "big") + bytes(64), 0
    yield "garbage", Random(1).randbytes(500), 0


@pytest.mark.parametrize(
    ("arrives", "good"), [pytest.param(arrives, good, id=name) for name, arrives, good in attacks()]
)
def test_a_record_that_is_not_the_next_one_ends_the_connection(arrives, good):
    refused = []
    stream, other = ends(refused)
    other.sendall(arrives)
    other.shutdown(socket.SHUT_WR)
    view = memoryview(bytearray(200))

    async def main():
        for _ in range(good):
            assert await stream.receive_into(view) == 100
        with pytest.raises(StreamLost):
            await stream.receive_into(view)

    trio_run(main)
    assert refused == ["record"]


@pytest.mark.parametrize("cut", [1, 3, 4, 50, 119])
def test_a_connection_that_ends_within_a_record_is_lost(cut):
    stream, other = ends()
    record = records().record(b"a" * 100)
    other.sendall(record[:cut])
    other.close()
    view = memoryview(bytearray(200))
    with pytest.raises(StreamLost, match="in the middle of a record"):
        trio_run(stream.receive_into, view)
    assert not any(view)


def test_a_large_buffer_is_held_only_while_a_large_record_comes():
    """Fifty connections that bring large records one after the other need one between them."""
    connections = [ends() for _ in range(50)]
    text = Random(6).randbytes(100_000)
    view = memoryview(bytearray(len(text)))

    async def main():
        taken = set()
        for stream, other in connections:
            record = records().record(text)
            other.sendall(record[:50_000])
            with pytest.raises(PeerTimeout):
                await stream.receive_into(view, 0.001)
            assert stream._in is not stream._first
            taken.add(id(stream._in))
            other.sendall(record[50_000:])
            assert await stream.receive_into(view) == len(text)
            assert stream._in is stream._first
        assert len(taken) == 1

    trio_run(main)


def test_a_stream_that_is_closed_while_another_task_reads_is_lost_to_it(monkeypatch):
    """The reader is between two turns, with the whole record in hand, when the sender closes."""
    monkeypatch.setattr(sockets, "YIELD_S", -1.0)
    heard = []

    async def read(stream):
        with contextlib.suppress(StreamLost):
            heard.append(await stream.receive_into(memoryview(bytearray(100_000))))

    async def main(turns):
        stream, other = ends()
        other.sendall(records().record(bytes(100_000)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, stream)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            await stream.aclose()

    for number in range(40):  # trio runs tasks of one turn in any order
        trio_run(main, number % 4)
    assert set(heard) == {100_000}


@pytest.mark.parametrize("head", [b"", b"short", bytes(RECORD_BYTES)])
def test_what_is_being_sent_may_change_while_it_waits(head):
    """An exchange sends weights that the next delta moves: what was sealed at first counts."""
    stream, other = ends()
    data = bytearray(Random(7).randbytes(RECORD_BYTES))
    expected = head + bytes(data)
    assert len(data) <= stream.at_once_bytes
    got = bytearray()

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(stream.send_all, data, head=head))
            await trio.testing.wait_all_tasks_blocked()  # the socket is full
            data[:] = bytes(len(data))
            with trio.fail_after(10):
                opened = records(THEIRS, peers=OURS, over=other)
                while len(got) < len(expected):
                    got.extend(await trio.to_thread.run_sync(opened.recv, 1 << 20))

    trio_run(main)
    assert bytes(got) == expected


def over_tcp():
    """A stream over TCP, and the socket on its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        mine, _ = listener.accept()
    mine.setblocking(False)
    return SocketStream(mine, NodeId("peer"), "127.0.0.1"), other


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a reader wakes for every byte")
def test_a_reader_that_knows_of_more_is_woken_once():
    stream, other = over_tcp()
    view, counts = memoryview(bytearray(20_000)), []

    async def read(worth):
        counts.append(await stream.receive_into(view, worth=worth))

    async def main():
        for worth, pieces in ((10_240, 10), (1, 1), (WAKE_BYTES * 4, 8), (1024, 1)):
            length = min(worth, WAKE_BYTES)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, worth)
                for _ in range(pieces):
                    await trio.testing.wait_all_tasks_blocked(0.005)
                    assert not counts
                    other.sendall(bytes(length // pieces))
            assert counts.pop() == min(length, len(view))
            with contextlib.suppress(PeerTimeout):
                while await stream.receive_into(view, 0.0):
                    pass

    trio_run(main)


@pytest.mark.parametrize("seal", [False, True])
def test_a_reader_that_knows_of_more_hears_of_the_end_and_of_what_came_in_time(seal):
    """A slow peer is no dead one: what came is progress, however little of what was announced."""
    stream, other = over_tcp()
    view = memoryview(bytearray(200_000))
    sent = bytes(500)
    if seal:
        stream = SealedStream(stream, OURS, THEIRS, lambda kind: None)
        sent = records().record(bytes(100_000))[:500]

    async def main():
        other.sendall(sent)
        if not seal:
            assert await stream.receive_into(view, 0.05, worth=150_000) == 500
        with pytest.raises(PeerTimeout):
            await stream.receive_into(view, 0.05, worth=150_000)
        other.close()
        if seal:
            with pytest.raises(StreamLost, match="in the middle of a record"):
                await stream.receive_into(view, 10, worth=150_000)
        else:
            assert await stream.receive_into(view, 10, worth=150_000) == 0

    trio_run(main)


def test_what_came_before_a_timeout_is_not_lost():
    stream, other = ends()
    record = records().record(b"a" * 9000)
    view = memoryview(bytearray(9000))

    async def main():
        for start in range(0, len(record), 3000):
            with pytest.raises(PeerTimeout):
                await stream.receive_into(view, 0.005)
            other.sendall(record[start : start + 3000])
        assert await stream.receive_into(view, 1) == 9000

    trio_run(main)
    assert bytes(view) == b"a" * 9000


def test_the_key_changes_far_before_a_limit_and_both_ends_agree(monkeypatch):
    """Every third record here. The independent end derives the next key by itself."""
    monkeypatch.setattr(sealed, "REKEY_RECORDS", 3)
    stream, other = ends()

    async def main():
        for number in range(10):
            await stream.send_all(bytes([number]))

    trio_run(main)
    key, seen = OURS.key, []
    for number in range(10):
        if number and number % 3 == 0:
            key = HKDFExpand(hashes.SHA256(), 32, b"gossipmesh bulk: next key").derive(key)
        head, body = other.recv(4), other.recv(17)
        seen += AESGCM(key).decrypt((number % 3).to_bytes(12, "big"), body, head)
    assert seen == list(range(10))


def test_the_limits_that_the_documentation_argues_with():
    blocks = sealed.REKEY_RECORDS * (sealed.RECORD_BYTES // 16 + 1)
    assert blocks**2 / 2**128 < 2**-60
    assert sealed.REKEY_RECORDS < 2**32


@pytest.mark.parametrize(
    "text", ["", "aes", "aes:", "aes:00", "des:" + "00" * 32, "aes:" + "zz" * 32]
)
def test_an_offer_that_is_none_is_refused(text):
    with pytest.raises(RemoteProtocolError):
        Offer.parse(text)


def test_an_offer_is_not_in_what_is_printed_of_a_hello():
    offer = Offer.fresh()
    assert Offer.parse(str(offer)).key == offer.key
    assert Offer.fresh().key != offer.key


# ------------------------------------------------------------------------ the change out of TLS


@pytest.fixture(name="members")
def two_members(tmp_path):
    token = create_mesh(tmp_path / "a", "a")
    join_mesh(tmp_path / "b", token, "b")
    return load(tmp_path / "a"), load(tmp_path / "b")


def transport_of(identity):
    return TcpTransport(
        server=identity.context(server=True),
        client=identity.context(server=False),
        node_of=node_of,
        refused=lambda kind: None,
        port=None,
        interfaces=("lo",),
    )


@contextlib.asynccontextmanager
async def connected(members, answer):
    """A stream from the second member to the first, over loopback, which runs `answer` with its end."""
    listening, where = trio.Event(), []

    def listens(addresses):
        where[:] = addresses
        listening.set()

    server, client = map(transport_of, members)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, answer, listens)
        await listening.wait()
        yield await client.connect(where[0])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("first", ["both at once", "the listener", "the dialler"])
def test_no_byte_is_lost_when_a_connection_leaves_tls(members, first):
    """Whoever is done first sends records while the other still reads its last TLS record."""
    text = Random(7).randbytes(3 << 20)

    async def talk(stream, *, speaks_at_once, own):
        offer = stream.offer.encode()
        await stream.send_all(offer)
        there = (await received(stream, len(offer))).decode()
        if not speaks_at_once:
            await trio.sleep(0.05)
        sealed_stream = stream.seal(there)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sealed_stream.send_all, own + text)
            heard = await received(sealed_stream, len(text) + 1)
        return heard

    async def main():
        heard, done = {}, trio.Event()

        async def answer(stream):
            heard["dialler"] = await talk(stream, speaks_at_once=first != "the dialler", own=b"l")
            done.set()

        async with connected(members, answer) as stream:
            heard["listener"] = await talk(stream, speaks_at_once=first != "the listener", own=b"d")
            await done.wait()
            await stream.aclose()
        assert heard == {"dialler": b"d" + text, "listener": b"l" + text}

    trio_run(main)


def test_closing_either_closes_both(members):
    async def main():
        ended = trio.Event()

        async def answer(stream):
            other = stream.seal(str(Offer.fresh()))
            assert await other.receive_into(memoryview(bytearray(1))) == 0
            ended.set()

        async with connected(members, answer) as stream:
            inner = stream.seal(str(Offer.fresh()))
            await stream.aclose()
            with pytest.raises(StreamLost):
                await inner.send_all(b"x")
            await ended.wait()

    trio_run(main)


def test_both_ends_of_a_connection_send_again_within_a_second(members):
    """What TCP is asked for; that it helps is what tests/lan shows (`loss`)."""
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, RTO_MAX, RTO_MAX_MS)
        except OSError:
            pytest.skip("this kernel has no TCP_RTO_MAX_MS (Linux has from 6.15 on)")

    async def main():
        ends, met = [], trio.Event()

        async def answer(stream):
            ends.append(stream.bare())
            met.set()

        async with connected(members, answer) as stream:
            await met.wait()
            ends.append(stream.bare())
        for end in ends:
            option = partial(end._socket.getsockopt, socket.IPPROTO_TCP)
            assert option(RTO_MAX) == RTO_MAX_MS
            assert option(THIN_LINEAR_TIMEOUTS) == 1
            assert option(socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS
            assert option(socket.TCP_NODELAY) == 1
            await end.aclose()

    trio_run(main)
