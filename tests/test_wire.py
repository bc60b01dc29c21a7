"""Frames: every message there and back, and whatever else may come instead of one."""

import pickle
import struct
import tracemalloc
from dataclasses import replace
from random import Random

import msgpack
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh import wire
from mesh.core.address import Address
from mesh.core.clock import CLOCK_LIMIT
from mesh.core.for_people import (
    ARGUMENTS_LIMIT,
    HOPS_LIMIT,
    PAGES_LIMIT,
    REPORTS_LIMIT,
    Answer,
    Argument,
    BenchBlock,
    BenchEcho,
    Figures,
    Question,
    Report,
    Reports,
)
from mesh.core.gossip import row_bytes
from mesh.core.membership import INCARNATION_LIMIT
from mesh.core.messages import (
    ACCUSERS_LIMIT,
    PROTOCOL,
    Ack,
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    FinishExchange,
    Fragment,
    Hello,
    IdentityTaken,
    Member,
    Members,
    NodeId,
    OpenExchange,
    OtherVersion,
    Ping,
    PingReport,
    PingRequest,
    Purpose,
    Refusal,
    RunInfo,
    SchemaEntry,
    SchemaPage,
    SchemaRequest,
    State,
    Turn,
    Verdict,
    Versions,
    Wanted,
)
from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.frames import FrameReader

NUMBERS = {
    0: Hello,
    1: Refusal,
    2: Members,
    3: Ping,
    4: Ack,
    5: SchemaRequest,
    6: SchemaPage,
    7: OpenExchange,
    8: ExchangeOpened,
    9: ExchangeRefused,
    10: Fragment,
    11: Delta,
    12: FinishExchange,
    13: PingRequest,
    14: PingReport,
    15: Versions,
    16: Wanted,
    17: IdentityTaken,
    18: Reports,
    19: Question,
    20: Answer,
    21: BenchBlock,
    22: BenchEcho,
}
"""What each number on the wire has meant since protocol 1 (13 and above: 2; 18 and above: 4). Append only, here as there."""

KNOWN_FRAMES = [
    (Ping(sequence=7, table=8), "00000004 00000000 93 03 07 08"),
    (Fragment(exchange=1, index=2, received=3), "00000005 00000000 94 0a 01 02 03"),
    (Refusal(reason="why"), "00000006 00000000 92 01 a3 77 68 79"),
]
"""Bytes that a node of this protocol has always sent for these."""

SMALL_BYTES = 4 * 1024
"""What a claim in a short header may cost: the unpacker's own state, and nothing in proportion."""

WORST_BYTES = 4 * 1024 * 1024
"""What 64 KiB of lists of 256 may cost, nested as deep as the unpacker goes (1024)."""

SEEDED = settings(derandomize=True, deadline=None, max_examples=70)
THOROUGH = settings(SEEDED, max_examples=120)

# --------------------------------------------------------------------------------------- messages


def text(limit, *, at_least=0):
    """Printable text; categories C and Z are what Python calls unprintable, but for the space."""
    characters = st.characters(exclude_categories=["C", "Z"]) | st.just(" ")
    return st.text(characters, min_size=at_least, max_size=limit)


counters = st.integers(0, 2**63)
versions = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**53)
indexes = st.integers(0, 2**32)
weights = st.floats(0, 1e12)
clocks = st.floats(-CLOCK_LIMIT, CLOCK_LIMIT)
node_ids = st.text("abcdefghijklmnopqrstuvwxyz234567", min_size=8, max_size=64).map(NodeId)
runs = st.builds(
    RunInfo,
    run=text(64),
    schema=text(16),
    started=st.booleans(),
    exchanged=st.booleans(),
    progress=st.integers(0, 64),
    strategy=text(16),
    weight=weights,
)
addresses = (
    st.ip_addresses()
    .map(str)
    .flatmap(lambda host: st.integers(1, 65535).map(lambda port: Address(host, port)))
)
plain_members = st.builds(
    Member,
    node=node_ids,
    name=text(64),
    incarnation=st.integers(0, INCARNATION_LIMIT - 1),
    state=st.sampled_from(State),
    addresses=st.lists(addresses, max_size=3).map(tuple),
    runs=st.lists(runs, max_size=3).map(tuple),
)
members = st.one_of(
    plain_members,
    st.builds(
        lambda row, accusers: replace(row, state=State.SUSPECT, accusers=tuple(sorted(accusers))),
        plain_members,
        st.sets(node_ids, max_size=ACCUSERS_LIMIT),
    ),
)
entries = st.builds(
    SchemaEntry,
    name=text(256),
    shape=st.lists(st.integers(0, 2**40), max_size=16).map(tuple),
    dtype=text(16),
)
turns = st.builds(Turn, view=text(16), position=positions, step=st.floats(0, 1))
rates = st.floats(0, 1e15)
maybe_figures = st.none() | st.floats(allow_nan=False, allow_infinity=False)
reports = st.builds(
    Report,
    node=node_ids,
    run=text(64),
    serial=counters,
    age_ms=counters,
    figures=st.builds(
        Figures,
        step=counters,
        loss=maybe_figures,
        drift=maybe_figures,
        samples_s=rates,
        out_bytes_s=rates,
        in_bytes_s=rates,
        load=maybe_figures,
    ),
)
ascii_pieces = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)
messages = st.one_of(
    st.builds(
        Hello,
        protocol=st.just(PROTOCOL),
        name=text(64),
        purpose=st.sampled_from(Purpose),
        member=members,
        instance=counters,
        age_ms=counters,
        offer=text(80),
    ),
    st.builds(Refusal, reason=text(500)),
    st.builds(Members, members=st.lists(members, max_size=4).map(tuple)),
    st.builds(Ping, sequence=counters, table=versions),
    st.builds(Ack, sequence=counters, table=versions),
    st.builds(SchemaRequest, run=text(64), start=indexes),
    st.builds(
        SchemaPage,
        run=text(64),
        start=indexes,
        total=indexes,
        entries=st.lists(entries, max_size=4).map(tuple),
    ),
    st.builds(
        OpenExchange,
        exchange=counters,
        run=text(64),
        schema=text(16),
        weight=weights,
        start=indexes,
        pull=st.booleans(),
        started=st.booleans(),
        exchanged=st.booleans(),
        progress=st.integers(0, 64),
        codec=text(16),
        strategy=text(16),
        first=indexes,
        end=st.none() | indexes,
        reach=st.none() | weights,
        turn=st.none() | turns,
        clock=clocks,
    ),
    st.builds(ExchangeOpened, exchange=counters, weight=weights, clock=clocks),
    st.builds(
        ExchangeRefused,
        exchange=counters,
        reason=text(500),
        unknown=st.booleans(),
        position=st.none() | positions,
    ),
    st.builds(Fragment, exchange=counters, index=indexes, received=indexes),
    st.builds(Delta, exchange=counters, index=indexes, part=st.floats(0, 1, exclude_min=True)),
    st.builds(FinishExchange, exchange=counters),
    st.builds(PingRequest, sequence=counters, node=node_ids),
    st.builds(PingReport, sequence=counters, verdict=st.sampled_from(Verdict)),
    st.builds(Versions, versions=st.lists(versions, max_size=50).map(tuple)),
    st.builds(Wanted, versions=st.lists(versions, max_size=50).map(tuple)),
    st.builds(IdentityTaken, addresses=st.lists(addresses, max_size=3).map(tuple)),
    st.builds(Reports, reports=st.lists(reports, max_size=REPORTS_LIMIT).map(tuple)),
    st.builds(
        Question,
        asker=node_ids,
        number=counters,
        page=st.integers(0, PAGES_LIMIT),
        attempt=indexes,
        hops=st.integers(0, HOPS_LIMIT),
        target=node_ids,
        op=text(16),
        arguments=st.lists(
            st.builds(Argument, name=text(16), value=text(64)), max_size=ARGUMENTS_LIMIT
        ).map(tuple),
    ),
    st.builds(
        Answer,
        asker=node_ids,
        number=counters,
        page=st.integers(0, PAGES_LIMIT),
        attempt=indexes,
        pages=st.integers(1, PAGES_LIMIT),
        hops=st.integers(0, HOPS_LIMIT),
        pieces=st.lists(ascii_pieces, max_size=4).map(tuple),
    ),
    st.builds(BenchBlock, sequence=counters, want=st.integers(0, wire.BODY_LIMIT_BYTES)),
    st.builds(BenchEcho, sequence=counters),
)


def header_of(message):
    frame = wire.encode(message)
    header_bytes, body_bytes = wire.parse_prefix(frame[: wire.PREFIX_BYTES])
    assert (header_bytes, body_bytes) == (len(frame) - wire.PREFIX_BYTES, 0)
    return frame[wire.PREFIX_BYTES :]


def decoded_or_refused(header):
    """The one promise about any bytes; any other exception fails the test."""
    try:
        message = wire.decode(header)
    except RemoteProtocolError:
        return None
    assert type(message) in {*NUMBERS.values(), OtherVersion}
    return message


# ------------------------------------------------------------------------------------- round trip


@THOROUGH
@given(messages)
def test_every_message_arrives_as_it_was_sent(message):
    assert wire.decode(header_of(message)) == message


@SEEDED
@given(messages, st.integers(0, wire.BODY_LIMIT_BYTES))
def test_a_frame_says_how_long_the_body_behind_it_is(message, body_bytes):
    frame = wire.encode(message, body_bytes)
    assert wire.parse_prefix(frame[: wire.PREFIX_BYTES])[1] == body_bytes


@SEEDED
@given(members, st.sampled_from(("run", "schema", "strategy")))
def test_a_row_takes_no_more_than_pages_of_rows_count_for_it(member, piece):
    long = RunInfo(run="r", schema="s", started=True, exchanged=True, progress=64, weight=1e12)
    runs = (replace(long, **{piece: "\U00020000" * 16}),) * 16
    for row in (member, replace(member, runs=runs)):
        assert len(header_of(Members(members=(row,)))) <= 3 + row_bytes(row)


def test_the_numbers_on_the_wire_never_change():
    assert dict(enumerate(kind for kind, _ in wire.MESSAGES)) == NUMBERS


@pytest.mark.parametrize(("message", "frame"), KNOWN_FRAMES, ids=lambda v: type(v).__name__)
def test_known_messages_have_known_bytes(message, frame):
    assert wire.encode(message) == bytes.fromhex(frame)


def test_a_message_that_does_not_fit_is_our_own_mistake():
    with pytest.raises(LocalProtocolError):
        wire.encode(Ping(sequence=1, table=0), wire.BODY_LIMIT_BYTES + 1)
    with pytest.raises(LocalProtocolError):
        wire.encode(Refusal(reason="x" * wire.HEADER_LIMIT_BYTES))


# --------------------------------------------------------------------------------- other versions

plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text(20),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=5,
)


@SEEDED
@given(st.integers(0, 2**31).filter(lambda n: n != PROTOCOL), text(64), st.lists(plain_values))
@example(protocol=PROTOCOL + 1, name="newer", further=[["a", 1], None, 2.5])
def test_a_hello_of_another_version_is_understood_as_far_as_its_name(protocol, name, further):
    header = msgpack.packb([0, protocol, name, *further])
    assert wire.decode(header) == OtherVersion(protocol=protocol, name=name)


@SEEDED
@given(messages, st.lists(plain_values, min_size=1, max_size=3))
def test_fields_that_a_newer_version_appended_are_ignored(message, further):
    fields = msgpack.unpackb(header_of(message))
    assert wire.decode(msgpack.packb([*fields, *further])) == message


@SEEDED
@given(members, st.lists(plain_values, min_size=1, max_size=3))
def test_fields_that_a_newer_version_appended_to_a_row_are_ignored(member, further):
    number, (row,) = msgpack.unpackb(header_of(Members(members=(member,))))
    header = msgpack.packb([number, [[*row, *further]]])
    assert wire.decode(header) == Members(members=(member,))


# ---------------------------------------------------------------------------------------- garbage


@SEEDED
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(header):
    decoded_or_refused(header)


@SEEDED
@given(messages, st.data())
def test_a_truncated_message_is_refused(message, data):
    header = header_of(message)
    cut = header[: data.draw(st.integers(0, len(header) - 1))]
    assert decoded_or_refused(cut) is None


@THOROUGH
@given(messages, st.data())
def test_a_damaged_message_is_another_message_or_refused(message, data):
    header = bytearray(header_of(message))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_refused(bytes(header))


@THOROUGH
@given(st.integers(-1, len(NUMBERS) + 1), st.lists(plain_values, max_size=10))
def test_fields_of_any_other_type_are_refused(number, fields):
    decoded_or_refused(msgpack.packb([number, *fields]))


@THOROUGH
@given(messages, plain_values | st.binary(max_size=9) | st.just({}), st.data())
def test_a_field_of_another_type_is_refused_or_checked(message, value, data):
    fields = msgpack.unpackb(header_of(message))
    fields[data.draw(st.integers(0, len(fields) - 1))] = value
    decoded_or_refused(msgpack.packb(fields))


class Bomb:
    """What a pickle would run, if anybody unpickled it."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was unpacked",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_never_unpacked(protocol):
    assert decoded_or_refused(pickle.dumps(Bomb(), protocol)) is None
    assert decoded_or_refused(pickle.dumps([3, 7], protocol)) is None


def opened_with(weight, clock):
    """An ExchangeOpened with these two numbers, whatever they are."""
    return b"\x94\x08\x01\xcb" + struct.pack(">d", weight) + b"\xcb" + struct.pack(">d", clock)


def asked_with(step):
    """An OpenExchange of an exact round with this step."""
    opening = OpenExchange(
        exchange=1,
        run="r",
        schema="s",
        weight=1.0,
        start=0,
        pull=False,
        started=True,
        exchanged=True,
        progress=0,
        codec="f32",
        turn=Turn(view="v", position=0, step=step),
    )
    return header_of(opening)


HOSTILE_HEADERS = {
    "a step beyond the other replica": asked_with(1.5),
    "an empty header": b"",
    "no list": b"\xc0",
    "an empty list": b"\x90",
    "an unknown message": b"\x91\xcc\xff",
    "a negative message": b"\x92\xff\x07",
    "true as a message number": b"\x92\xc3\x07",
    "two messages in one": b"\x92\x03\x07\x92\x03\x07",
    "a list of 4 billion": b"\xdd\xff\xff\xff\xff\x03",
    "a list of 65535": b"\xdc\xff\xff\x03",
    "text of 4 GiB": b"\x92\x01\xdb\xff\xff\xff\xffx",
    "text of 64 KiB": b"\x92\x01\xda\xff\xffx",
    "bytes of 4 GiB": b"\x92\x01\xc6\xff\xff\xff\xffx",
    "bytes where text belongs": b"\x92\x01\xc4\x01x",
    "a map of 4 billion": b"\x92\x03\xdf\xff\xff\xff\xff",
    "a map of one": b"\x92\x03\x81\xa1a\x01",
    "an extension of 4 GiB": b"\x92\x03\xc9\xff\xff\xff\xff\x01",
    "a time stamp": b"\x92\x03\xd6\xff\x00\x00\x00\x00",
    "text that is not UTF-8": b"\x92\x01\xa2\xff\xfe",
    "text with a line break": b"\x92\x01\xa1\n",
    "text with a surrogate": b"\x92\x01\xa3\xed\xa0\x80",
    "a sequence of 2^64 - 1": b"\x92\x03\xcf" + b"\xff" * 8,
    "a sequence that is no whole number": b"\x92\x03\xcb" + struct.pack(">d", 7.0),
    "a weight that is not a number": opened_with(float("nan"), 0.0),
    "an infinite weight": opened_with(float("inf"), 0.0),
    "a negative weight": opened_with(-1.0, 0.0),
    "a mesh clock that is not a number": opened_with(1.0, float("nan")),
    "an infinite mesh clock": opened_with(1.0, float("-inf")),
    "a mesh clock of 1e16 steps": opened_with(1.0, 1e16),
    "a mesh clock that is a whole number": b"\x94\x08\x01\xcb" + struct.pack(">d", 1.0) + b"\x05",
    "lists in lists, 64 KiB deep": b"\x91" * wire.HEADER_LIMIT_BYTES,
    "lists of 256 in lists, 64 KiB deep": b"\xdc\x01\x00" * (wire.HEADER_LIMIT_BYTES // 3),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused(name):
    assert decoded_or_refused(HOSTILE_HEADERS[name]) is None


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_no_claimed_length_makes_memory_be_taken(name):
    header = HOSTILE_HEADERS[name]
    decoded_or_refused(header)  # what is made once and kept is no answer to a claim
    limit = SMALL_BYTES if len(header) < 100 else WORST_BYTES
    before, peak = taken_by(lambda: decoded_or_refused(header))
    assert peak < limit
    assert before < 1024, "something was kept"


def test_the_most_expensive_header_takes_no_more_than_its_bound():
    """One byte makes an empty list, which takes 56 and 8 for the pointer to it."""
    header = msgpack.packb([2, [[[]] * 255] * 253, True])
    assert 0.99 * wire.HEADER_LIMIT_BYTES < len(header) < wire.HEADER_LIMIT_BYTES
    _, peak = taken_by(lambda: decoded_or_refused(header))
    assert peak < 65 * wire.HEADER_LIMIT_BYTES


def taken_by(act):
    """(bytes that `act` left behind, the most that it held)."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        act()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before, peak - before


# ---------------------------------------------------------------------------------------- lengths


@SEEDED
@given(st.binary(min_size=wire.PREFIX_BYTES, max_size=wire.PREFIX_BYTES))
@example(b"\xff" * 8)
@example(b"\x00\x01\x00\x00\x00\x10\x00\x00")
@example(b"\x00\x01\x00\x01\x00\x00\x00\x00")
@example(b"\x00\x00\x00\x00\x00\x10\x00\x01")
def test_lengths_are_within_their_limits_or_refused(prefix):
    claimed = struct.unpack(">II", prefix)
    fits = claimed[0] <= wire.HEADER_LIMIT_BYTES and claimed[1] <= wire.BODY_LIMIT_BYTES
    if fits:
        assert wire.parse_prefix(prefix) == claimed
    else:
        with pytest.raises(RemoteProtocolError, match="too large"):
            wire.parse_prefix(prefix)


class Replay:
    """A stream that brings these bytes, then waits for ever."""

    peer, remote = NodeId("aaaaaaaa"), "replay"

    def __init__(self, data):
        self.left = memoryview(data)

    async def send_all(self, data, timeout_s=None):
        raise AssertionError

    async def receive_into(self, view, timeout_s=None, *, worth=1):
        if not self.left:
            await trio.sleep_forever()
        piece, self.left = self.left[: len(view)], self.left[len(view) :]
        view[: len(piece)] = piece
        return len(piece)

    async def aclose(self):
        pass


@pytest.mark.parametrize(
    "lengths", [(2**32 - 1, 0), (0, 2**32 - 1), (2**16 + 1, 0), (5, 2**20 + 1)]
)
def test_a_frame_longer_than_the_limit_is_refused_before_anything_is_allocated(lengths):
    async def main():
        stream = Replay(struct.pack(">II", *lengths) + b"x" * 200_000)
        reader = FrameReader(stream)
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError, match="too large"):
                await reader.message(timeout_s=60, bodies=True)
            return len(stream.left), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    unread, peak = trio.run(main)
    assert unread >= 200_000 - wire.HEADER_LIMIT_BYTES, "more than its one buffer was read"
    assert peak < SMALL_BYTES


def test_a_body_where_none_belongs_is_refused_before_it_is_read():
    async def main():
        stream = Replay(wire.encode(Ping(sequence=1, table=0), body_bytes=100) + b"x" * 200_000)
        with pytest.raises(RemoteProtocolError, match="body"):
            await FrameReader(stream).message(timeout_s=60)
        return stream.left

    assert len(trio.run(main)) >= 200_000 - wire.HEADER_LIMIT_BYTES


def test_frames_and_bodies_are_whole_however_the_stream_cuts_them():
    """Three frames behind each other, brought in pieces of every length."""
    frames = [
        (Fragment(exchange=1, index=0, received=0), bytes(range(256)) * 40),
        (Ping(sequence=7, table=9), b""),
        (Delta(exchange=1, index=0, part=0.5), b"y" * 3),
    ]
    data = b"".join(wire.encode(message, len(body)) + body for message, body in frames)

    class Pieces(Replay):
        async def receive_into(self, view, timeout_s=None, *, worth=1):
            return await super().receive_into(view[: self.length])

    async def main(length, drop):
        stream = Pieces(data)
        stream.length = length
        reader, found = FrameReader(stream), []
        for _ in frames:
            message, count = await reader.message(timeout_s=60, bodies=True)
            body = bytearray(count)
            if drop:
                await reader.drop_body(count, timeout_s=60)
            else:
                await reader.body(memoryview(body), timeout_s=60)
            found.append((message, bytes(body)))
        assert reader.received_bytes == len(data)
        return found

    for length in (1, 2, 7, 8, 9, 100, 5000, 20_000):
        assert trio.run(main, length, False) == frames
        assert [m for m, _ in trio.run(main, length, True)] == [m for m, _ in frames]


def test_a_stream_of_random_bytes_ends_in_a_refusal():
    """Frames whose lengths are right and whose headers are not, as a fuzzer would send them."""

    async def main(data):
        with pytest.raises(RemoteProtocolError):
            await FrameReader(Replay(data)).message(timeout_s=60, bodies=True)

    rng = Random(7)
    for _ in range(200):
        header = rng.randbytes(rng.randint(1, 64))
        trio.run(main, struct.pack(">II", len(header), 0) + header + rng.randbytes(100))


MEMBER = Member(
    node=NodeId("abcdefgh"),
    name="one",
    incarnation=7,
    state=State.ALIVE,
    addresses=(Address("10.0.0.1", 7710),),
    runs=(),
)


def test_rows_beyond_the_limit_or_followed_by_anything_are_no_message():
    whole = wire.encode(Members(members=(MEMBER,) * 64))[wire.PREFIX_BYTES :]
    assert wire.decode(whole) == Members(members=(MEMBER,) * 64)
    for header in (
        wire.encode(Members(members=(MEMBER,) * 65))[wire.PREFIX_BYTES :],
        whole + b"\0",
    ):
        with pytest.raises(RemoteProtocolError):
            wire.decode(header)


def test_a_row_that_was_heard_before_is_the_same_object_and_no_row_is_taken_for_another():
    first, again = (
        wire.decode(wire.encode(Members(members=(MEMBER,)))[wire.PREFIX_BYTES :]) for _ in range(2)
    )
    assert first.members[0] is again.members[0]
    other = replace(MEMBER, incarnation=MEMBER.incarnation + 1)
    assert wire.decode(wire.encode(Members(members=(other,)))[wire.PREFIX_BYTES :]).members == (
        other,
    )
