"""What a node does with bad input: a real process, attacked from the network and from its own host.

A hostile member has a valid certificate and says what it likes. After each attack the node has to
answer `mesh status`, hold the weights that it held before, and have counted what it turned away.
"""

import contextlib
import itertools
import json
import os
import pickle
import socket
import ssl
import struct
import time
from random import Random

import msgpack
import numpy as np
import pytest

from mesh import wire
from mesh.client import LocalSocket
from mesh.core.address import Address
from mesh.core.for_people import Answer, Figures, Question, Report, Reports
from mesh.core.membership import INCARNATION_LIMIT, MEMBERS_LIMIT
from mesh.core.messages import (
    FRAGMENT_ENTRIES,
    PROTOCOL,
    WINDOW,
    Ack,
    Delta,
    ExchangeOpened,
    ExchangeRefused,
    FinishExchange,
    Fragment,
    Member,
    Members,
    NodeId,
    OpenExchange,
    Ping,
    Purpose,
    Refusal,
    RunInfo,
    SchemaPage,
    SchemaRequest,
    State,
    Versions,
)
from mesh.errors import MeshError
from tests.helpers import BadMember, Host, NumpyTraining, parsed, until

ENTRIES = 9 * FRAGMENT_ENTRIES + 1000
"""Ten fragments, the last one short: more than the window."""

FRAGMENTS = 10
GROWTH_BYTES = 8 * 1024 * 1024
"""What a node may grow by over hundreds of attacks: allocator noise, nothing in proportion."""


@pytest.fixture(scope="module")
def host():
    host = Host()
    token = host.member("target")
    for name in ("bad", "worse", "worst", "docker", "victim", "good"):
        host.member(name, token)
    host.member("stranger")
    yield host
    host.close()


@pytest.fixture(scope="module")
def target(host):
    return host.up("target")


@pytest.fixture(scope="module")
def training(target):
    values = np.random.default_rng(7).normal(size=ENTRIES).astype(np.float32)
    training = NumpyTraining(target, values)
    training.values = values
    yield training
    training.close()


@pytest.fixture(scope="module")
def bad(host):
    return BadMember(host.state("bad"))


@pytest.fixture(scope="module")
def worse(host):
    return BadMember(host.state("worse"))


@pytest.fixture(scope="module")
def worst(host):
    return BadMember(host.state("worst"))


@pytest.fixture
def port(target):
    yield target.port
    assert target.answers(), target.said


# ---------------------------------------------------------------------------------- before Hello


def raw(port, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", port), 10, source_address=(source, 0))


def ended(connection):
    """Reads up to the end of a connection, which has to come."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while connection.recv(65536):
            pass
    connection.close()


def garbage(port):
    connection = raw(port)
    connection.sendall(Random(1).randbytes(300))
    ended(connection)


def http(port):
    connection = raw(port)
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    ended(connection)


def nothing(port):
    raw(port).close()


def no_certificate(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        connection = context.wrap_socket(raw(port))
        assert connection.recv(1) == b"", "application data for nobody in particular"


@pytest.mark.parametrize("attack", [garbage, http, nothing, no_certificate])
def test_who_does_no_mutual_tls_is_turned_away_and_counted(port, target, attack):
    before = target.refused("tls")
    attack(port)
    until(lambda: target.refused("tls") > before, "it is counted")


def test_a_member_of_another_mesh_is_turned_away_and_counted(host, port, target):
    before = target.refused("certificate")
    stranger = BadMember(host.state("stranger"))
    with pytest.raises((ConnectionError, ssl.SSLError)):
        # Its own authority would not trust this node either: it checks nothing here.
        stranger.trusting_anybody().connect(port).hear()
    until(lambda: target.refused("certificate") > before, "it is counted")


def test_a_hundred_half_open_connections_do_not_keep_a_peer_out(bad, port, target):
    before = target.refused("crowded")
    half_open = [raw(port, "127.0.0.2") for _ in range(100)]
    until(lambda: target.refused("crowded") >= before + 80, "most of one address are refused")
    began = time.monotonic()
    bad.greeted(port).close()
    assert time.monotonic() - began < 2.0
    for connection in half_open:
        connection.close()


def test_whoever_dawdles_is_closed_after_five_seconds_and_others_get_in(bad, port, target):
    """Handshakes that stop, one that drips, and a member that says no Hello, all at once."""
    timeouts = target.refused("timeout")
    silent_member = bad.connect(port)
    places = [raw(port, f"127.0.0.{2 + n // 16}") for n in range(64)]
    drip = places[0]
    until(lambda: crowded(port), "all places are taken")
    began = time.monotonic()
    client_hello = iter(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
    drip.settimeout(0.2)
    while time.monotonic() < began + 10:
        with contextlib.suppress(TimeoutError):
            drip.sendall(bytes([next(client_hello)]))
            if drip.recv(1) == b"":
                break
    assert time.monotonic() - began < 8.0, "a drip a second would hold it for ever"
    until(lambda: target.refused("timeout") >= timeouts + 64, "all are closed")
    assert silent_member.hear_until_closed()[1:] == []
    bad.greeted(port).close()
    for connection in places:
        connection.close()


def crowded(port):
    """Whether a new connection is closed at once."""
    connection = raw(port)
    connection.settimeout(0.2)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    finally:
        connection.close()


# ---------------------------------------------------------------------------------- after TLS


def frame(header, body_bytes=0):
    return struct.pack(">II", len(header), body_bytes) + header


BAD_FIRST_BYTES = {
    "random bytes": Random(2).randbytes(200),
    "a random header": frame(Random(3).randbytes(64)),
    "an empty header": frame(b""),
    "a header of 4 GiB": struct.pack(">II", 2**32 - 1, 0),
    "a body of 4 GiB": struct.pack(">II", 3, 2**32 - 1) + b"\x92\x03\x01",
    "a pickle": frame(pickle.dumps(["what", {"a": 1}])),
    "nested lists": frame(b"\x91" * 60_000),
    "a map": frame(b"\x92\x00\x81\xa1a\x01"),
    "an unknown message": frame(msgpack.packb([99, 1])),
    "a Hello without a row": frame(msgpack.packb([0, PROTOCOL, "bad", 0])),
    "a Hello for a purpose that is none": frame(msgpack.packb([0, PROTOCOL, "bad", 7, []])),
    "a Ping before Hello": wire.encode(Ping(sequence=1, table=0)),
    "an exchange before Hello": wire.encode(FinishExchange(exchange=1)),
}


@pytest.mark.parametrize("name", BAD_FIRST_BYTES)
def test_bad_first_bytes_end_the_connection_with_a_reason(bad, port, target, name):
    before = target.refused("protocol")
    connection = bad.connect(port)
    connection.push(BAD_FIRST_BYTES[name])
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1


@pytest.mark.parametrize("length", [1, 7, 9, 60])
def test_a_frame_that_stops_half_way_is_a_lost_connection_and_no_more(bad, port, target, length):
    before = target.status()["refused"]
    connection = bad.connect(port)
    connection.push(wire.encode(bad.hello())[:length])
    connection.hear()
    connection.close()
    bad.greeted(port).close()
    assert target.status()["refused"] == before


def test_a_hello_with_the_id_of_another_node_is_refused(bad, worse, port, target):
    before = target.refused("protocol")
    connection = bad.connect(port)
    connection.say(bad.hello(node=worse.id))
    refusal = connection.hear_until_closed()[-1]
    assert "certificate" in refusal.reason
    assert target.refused("protocol") == before + 1
    assert worse.id not in [peer["id"] for peer in target.peers()]


def test_a_body_behind_a_hello_is_refused(bad, port, target):
    before = target.refused("protocol")
    connection = bad.connect(port)
    connection.say(bad.hello(), b"x" * 100)
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1


@pytest.mark.parametrize("further", [(), (1, 2.5, [["what", None]], "ever")])
def test_a_node_of_another_protocol_is_told_why_and_listed(bad, host, port, target, further):
    connection = bad.connect(port)
    if further:
        connection.push(frame(msgpack.packb([0, 99, "from the future", *further])))
    else:
        connection.say(bad.hello(protocol=99, name="from the future"))
    refusal = connection.hear_until_closed()[-1]
    reason = f"protocol {PROTOCOL} there, 99 here: update the older of the two"
    assert refusal == Refusal(reason=reason)

    def listed():
        answer = parsed(host.mesh("peers", "--json", "--state", "target"))
        return [p for p in answer["peers"] if p["state"] == "incompatible"]

    (peer,) = until(listed, "it is listed")
    assert (peer["id"], peer["name"]) == (bad.id, "from the future")
    assert peer["reason"] == f"protocol 99 there, {PROTOCOL} here: update the older of the two"
    assert "incompatible" in host.mesh("peers", "--state", "target").stdout
    bad.greeted(port).close()  # updated: it is a member like others now
    until(lambda: not listed(), "it is no stranger any more")


# ---------------------------------------------------------------------- on a control connection

BULK_MESSAGES = [
    ExchangeOpened(exchange=1, weight=1.0),
    ExchangeRefused(exchange=1, reason="", unknown=False),
    Fragment(exchange=1, index=0, received=0),
    Delta(exchange=1, index=0, part=1.0),
    FinishExchange(exchange=1),
]


@pytest.mark.parametrize("message", BULK_MESSAGES, ids=lambda m: type(m).__name__)
def test_an_exchange_on_a_control_connection_is_refused(bad, port, target, message):
    before = target.refused("protocol")
    connection = bad.greeted(port)
    connection.say(message)
    refusal = connection.hear_until_closed()[-1]
    assert type(message).__name__ in refusal.reason
    assert target.refused("protocol") == before + 1


def test_a_second_hello_is_refused(bad, port, target):
    before = target.refused("protocol")
    connection = bad.greeted(port)
    connection.say(bad.hello())
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1


BAD_ROWS = {
    "no id": ["", "x", 1, 0, [], []],
    "an id with a line break": ["aaaaaaaa\n", "x", 1, 0, [], []],
    "a name that moves the cursor": ["aaaaaaaa", "\x1b[2J", 1, 0, [], []],
    "a name of 1000 characters": ["aaaaaaaa", "x" * 1000, 1, 0, [], []],
    "a negative incarnation": ["aaaaaaaa", "x", -1, 0, [], []],
    "an incarnation beyond all": ["aaaaaaaa", "x", 2**63, 0, [], []],
    "a state that is none": ["aaaaaaaa", "x", 1, 4, [], []],
    "port 0": ["aaaaaaaa", "x", 1, 0, [["127.0.0.1", 0]], []],
    "port 65536": ["aaaaaaaa", "x", 1, 0, [["127.0.0.1", 65536]], []],
    "17 addresses": ["aaaaaaaa", "x", 1, 0, [["127.0.0.1", 1]] * 17, []],
    "17 runs": ["aaaaaaaa", "x", 1, 0, [], [["r", "s", True, True]] * 17],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_breaks_a_rule_is_refused(bad, port, target, name):
    before = target.refused("protocol")
    connection = bad.greeted(port)
    connection.push(frame(msgpack.packb([2, [BAD_ROWS[name]], True])))
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1
    assert "aaaaaaaa" not in [peer["id"] for peer in target.peers()]


def test_a_page_of_more_rows_than_fit_is_refused(bad, port, target):
    before = target.refused("protocol")
    connection = bad.greeted(port)
    connection.push(frame(msgpack.packb([2, [["aaaaaaaa", "x", 1, 0, [], [], []]] * 65])))
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1


def test_answers_that_nobody_asked_for_change_nothing(bad, port, target, training):
    before = target.status()["refused"]
    connection = bad.greeted(port)
    for sequence in range(1000, 1100):
        connection.say(Ack(sequence=sequence, table=0))
    connection.say(SchemaPage(run="never heard of", start=0, total=5, entries=()))
    page = SchemaPage(run=training.run, start=2**32, total=2**32, entries=training.entries)
    connection.say(page)
    connection.say(SchemaRequest(run="never heard of", start=0))
    connection.say(SchemaRequest(run=training.run, start=2**32))
    for number in range(100):
        page = {"page": 0, "attempt": 1, "pages": 32, "hops": 3, "pieces": ("x" * 1000,) * 40}
        connection.say(Answer(asker=target.id, number=number, **page))
        asked = {"page": number % 32, "attempt": 1, "hops": 3, "target": NodeId("nobody22")}
        asked |= {"op": "eval", "arguments": ()}
        connection.say(Question(asker=NodeId("somebody"), number=number, **asked))
        connection.say(Question(asker=target.id, number=number, **asked))
    nothing = {"loss": None, "drift": None, "samples_s": 0.0, "out_bytes_s": 0.0, "in_bytes_s": 0.0}
    said = {"serial": 2**63, "age_ms": 2**63, "figures": Figures(step=2**63, **nothing)}
    for node in (target.id, NodeId("nobody22"), bad.id):
        connection.say(Reports(reports=(Report(node=node, run=training.run, **said),) * 32))
    connection.say(Ping(sequence=77, table=0))
    until(lambda: acknowledged(connection, 77), "the connection still works")
    assert target.status()["refused"] == before
    assert target.peers() is not None
    connection.close()


def test_who_asks_and_never_listens_loses_messages_and_nothing_else(bad, port, target):
    connection = bad.greeted(port)
    connection.stall()
    for _ in range(3000):
        connection.say(Versions(versions=()))
    assert target.answers()
    connection.close()


# ------------------------------------------------------- a control connection that lies about others


@pytest.fixture(scope="module")
def victim(host):
    """A node of its own, because these lies stay in its table."""
    return host.up("victim")


def row(number=0, **changes):
    fields = {
        "node": NodeId(f"invented{number:08}"),
        "name": f"n{number}",
        "incarnation": 1,
        "state": State.ALIVE,
        "addresses": (),
        "runs": (),
    }
    return Member(**{**fields, **changes})


def acknowledged(connection, sequence):
    message = connection.hear()
    return isinstance(message, Ack) and message.sequence == sequence


def tell(connection, rows, at_once):
    """Sends rows, and waits until the node has read them."""
    for start in range(0, len(rows), at_once):
        connection.say(Members(members=tuple(rows[start : start + at_once])))
    connection.say(Ping(sequence=123, table=0))
    until(lambda: acknowledged(connection, 123), "they are read")


@pytest.mark.parametrize("beyond", [0, 1, -1])
def test_a_hello_with_the_last_incarnation_is_survived(worst, victim, beyond):
    connection = worst.connect(victim.port)
    connection.say(worst.hello(incarnation=INCARNATION_LIMIT + beyond))
    connection.say(Ping(sequence=1, table=0))
    connection.hear_until(lambda message: isinstance(message, Ack | Refusal))
    connection.close()
    until(victim.answers, "it lives")


NO_ADDRESSES = ["a..b", "x" * 64, "-", "[::1]", " ", "0x7f.1", "localhost", "::1%\x1b[2J", ""]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_a_row_with_an_address_that_is_none_is_refused_and_never_looked_up(bad, port, target, text):
    before = target.refused("protocol")
    connection = bad.greeted(port)
    addresses = [[text, 1]]
    connection.push(frame(msgpack.packb([2, [["invented9", "x", 1, 0, addresses, [], []]]])))
    assert isinstance(connection.hear_until_closed()[-1], Refusal)
    assert target.refused("protocol") == before + 1


def test_rows_as_long_as_they_may_be_are_passed_on_in_frames_that_fit(bad, worst, victim):
    wide = "\U00020000"  # one printable character, four bytes
    runs = tuple(
        RunInfo(
            run=wide * 62 + f"{n:02}",
            schema=wide * 16,
            started=True,
            exchanged=True,
            strategy=wide * 16,
            weight=1e12,
        )
        for n in range(16)
    )
    rows = [row(number, name=wide * 64, runs=runs) for number in range(5000, 5064)]
    connection = bad.greeted(victim.port)
    tell(connection, rows, at_once=8)
    other = worst.greeted(victim.port)
    other.say(Versions(versions=()))
    heard = set()

    def all_heard():
        message = other.hear()
        if isinstance(message, Members):
            heard.update(member.node for member in message.members)
        return heard >= {each.node for each in rows}

    until(all_heard, "every row arrives")
    other.close()
    connection.close()


def test_a_table_that_a_member_filled_with_inventions_is_bounded(bad, worse, victim):
    connection = bad.greeted(victim.port)
    tell(connection, [row(number) for number in range(MEMBERS_LIMIT + 500)], at_once=64)
    assert len(victim.peers()) <= MEMBERS_LIMIT
    other = worse.greeted(victim.port)
    other.say(Ping(sequence=5, table=0))
    until(lambda: acknowledged(other, 5), "a newcomer is talked to all the same")
    other.close()
    connection.close()


def test_lies_about_a_node_itself_are_refuted(bad, victim):
    """The last of all these tests of one node: it cannot rise any further."""
    own, now = victim.id, int(victim.status()["node"]["incarnation"])
    connection = bad.greeted(victim.port)
    for state, incarnation in [
        (State.DEAD, now + 100),
        (State.LEFT, now + 10_000),
        (State.LEFT, INCARNATION_LIMIT - 2),
    ]:
        connection.say(Members(members=(row(node=own, state=state, incarnation=incarnation),)))

        def refuted():
            message = connection.hear()
            rows = message.members if isinstance(message, Members) else ()
            return [r for r in rows if r.node == own and r.incarnation >= incarnation]  # noqa: B023

        assert until(refuted, "it says so")[0].state is State.ALIVE
    connection.close()
    training = NumpyTraining(victim, np.ones(4, np.float32))  # a change of its row to publish
    bad.greeted(victim.port).close()  # its Hello can still be read
    training.close()


# ------------------------------------------------------------------------- on a bulk connection


def whole(training, index=0, **places):
    """A fragment equal to the replica's own, so that averaging changes nothing; with `places`."""
    values = training.values[index * FRAGMENT_ENTRIES : (index + 1) * FRAGMENT_ENTRIES].copy()
    for place, value in places.items():
        values[int(place[1:])] = value
    return values.tobytes()


def send_fragments(connection, exchange, training, indexes):
    """Correct fragments, none acknowledged; reads the delta that answers each."""
    for index in indexes:
        message = Fragment(exchange=exchange, index=index, received=0)
        connection.say(message, whole(training, index))
        heard, body = connection.hear_with_body()
        assert heard == Delta(exchange=exchange, index=index, part=1.0)
        assert not np.frombuffer(body, np.float32).any(), "equal values differ by nothing"


def opened(connection, bad, training, **changes):
    """Opens an exchange on a greeted bulk connection; returns its number."""
    opening = bad.opening(training, **changes)
    connection.say(opening)
    assert isinstance(connection.hear(), ExchangeOpened)
    return opening.exchange


def says(index, body, received=0, before=()):
    """An attack that opens an exchange, sends good fragments, then a bad one."""

    def attack(connection, bad, training):
        exchange = opened(connection, bad, training)
        send_fragments(connection, exchange, training, before)
        message = Fragment(exchange=exchange, index=index, received=received)
        connection.say(message, body(training) if callable(body) else body)

    return attack


def never_opened(connection, bad, training):
    connection.say(Fragment(exchange=5, index=0, received=0), whole(training))


def other_exchange(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(Fragment(exchange=exchange + 1, index=0, received=0), whole(training))


def after_the_end(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(FinishExchange(exchange=exchange))
    connection.say(Fragment(exchange=exchange, index=0, received=0), whole(training))


def body_in_a_pull(connection, bad, training):
    exchange = opened(connection, bad, training, pull=True, weight=0.0)
    connection.say(Fragment(exchange=exchange, index=0, received=0), whole(training))


def pulls_what_is_not_there(connection, bad, training):
    exchange = opened(connection, bad, training, pull=True, weight=0.0)
    connection.say(Fragment(exchange=exchange, index=FRAGMENTS, received=0))


def an_answer(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(Delta(exchange=exchange, index=0, part=1.0), whole(training))


def control_message(connection, bad, training):
    connection.say(Ping(sequence=1, table=0))


def older_exchange(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(bad.opening(training, exchange=exchange - 1))


def resumes_further_than_it_came(connection, bad, training):
    exchange = opened(connection, bad, training)
    send_fragments(connection, exchange, training, [0])
    connection.say(bad.opening(training, exchange=exchange, start=2))


def resumes_in_another_codec(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(bad.opening(training, exchange=exchange, codec="int8"))


def float32_in_an_int8_exchange(connection, bad, training):
    exchange = opened(connection, bad, training, codec="int8")
    connection.say(Fragment(exchange=exchange, index=0, received=0), whole(training))


def resumes_beyond_the_end(connection, bad, training):
    exchange = opened(connection, bad, training)
    connection.say(bad.opening(training, exchange=exchange, start=FRAGMENTS + 1))


def body_behind_an_opening(connection, bad, training):
    connection.say(bad.opening(training), b"x" * 16)


def garbage_in_between(connection, bad, training):
    opened(connection, bad, training)
    connection.push(frame(Random(4).randbytes(64)))


BAD_FRAGMENTS = {
    "one entry short": says(0, lambda t: whole(t)[:-4]),
    "one byte short": says(0, lambda t: whole(t)[:-1]),
    "no body": says(0, b""),
    "the short last one, in full": says(9, whole, before=range(WINDOW)),
    "the second before the first": says(1, whole),
    "the last before the first": says(9, lambda t: whole(t, 9)),
    "beyond the last": says(FRAGMENTS, whole),
    "number 2^32": says(2**32, whole),
    "an acknowledgement of what never came": says(0, whole, received=1),
    "an acknowledgement of 2^32 deltas": says(0, whole, received=2**32),
    "again after its acknowledgement": says(0, whole, received=1, before=[0]),
    "beyond the window": says(WINDOW, lambda t: whole(t, WINDOW), before=range(WINDOW)),
    "of an exchange never opened": never_opened,
    "of another exchange": other_exchange,
    "after the end": after_the_end,
    "a body in a pull": body_in_a_pull,
    "a pull beyond the last": pulls_what_is_not_there,
    "an answer where a question belongs": an_answer,
    "a ping": control_message,
    "an older exchange": older_exchange,
    "resuming further than it came": resumes_further_than_it_came,
    "resuming beyond the end": resumes_beyond_the_end,
    "resuming in another codec": resumes_in_another_codec,
    "float32 where int8 was agreed": float32_in_an_int8_exchange,
    "a body behind an opening": body_behind_an_opening,
    "garbage in between": garbage_in_between,
}

NOT_FINITE = {
    "NaN": says(0, lambda t: whole(t, p5=np.nan)),
    "infinite": says(0, lambda t: whole(t, p0=np.inf)),
    "minus infinite": says(0, lambda t: whole(t, p262143=-np.inf)),
    "both infinities": says(0, lambda t: whole(t, p1=np.inf, p2=-np.inf)),
    "further than 1e19": says(0, lambda t: whole(t, p3=1e30)),
    "NaN in the second fragment": says(1, lambda t: whole(t, 1, p9=np.nan), before=[0]),
}


def attempt(attack, bad, port, training):
    """Performs an attack; returns what came back until the node closed the connection.

    Nothing may, where the node refuses a body without reading it: its kernel resets the connection.
    """
    with bad.greeted(port, Purpose.BULK) as connection:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            attack(connection, bad, training)
        return connection.hear_until_closed()


def unchanged(bad, port, training):
    """Every bit of the replica is what the training gave it."""
    return bad.pull(port, training).tobytes() == training.values.tobytes()


@pytest.mark.parametrize("name", BAD_FRAGMENTS)
def test_a_bad_fragment_ends_the_connection_and_changes_nothing(bad, port, target, training, name):
    before = target.refused("protocol")
    attempt(BAD_FRAGMENTS[name], bad, port, training)
    until(lambda: target.refused("protocol") == before + 1, "it is counted")
    assert unchanged(bad, port, training)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused_and_change_nothing(
    bad, port, target, training, name
):
    def counted():
        (run,) = target.status()["runs"]
        return run["exchanges"]["non_finite"], target.refused("non_finite")

    run, node = counted()
    heard = attempt(NOT_FINITE[name], bad, port, training)
    assert "finite" in heard[-1].reason
    assert counted() == (run + 1, node + 1)
    assert "diverged" in "".join(target.status()["health"])
    assert unchanged(bad, port, training)


REFUSED_OPENINGS = {
    "another schema": ({"schema": "0" * 16}, "schema differs"),
    "a run that is not here": ({"run": "other"}, "not trained here"),
    "a replica without weights": ({"started": False, "exchanged": False}, "takes the other's"),
    "an exchange nobody began": ({"start": 3}, "not known here"),
    "a codec that nobody has": ({"codec": "f33"}, "no codec f33 here"),
}


@pytest.mark.parametrize("name", REFUSED_OPENINGS)
def test_an_exchange_that_cannot_be_is_refused_with_the_reason(bad, port, target, training, name):
    changes, reason = REFUSED_OPENINGS[name]
    before = target.refused("schema")
    connection = bad.greeted(port, Purpose.BULK)
    opening = bad.opening(training, **changes)
    connection.say(opening)
    refusal = connection.hear()
    assert isinstance(refusal, ExchangeRefused)
    assert refusal.exchange == opening.exchange
    assert reason in refusal.reason
    assert target.refused("schema") == before + (name == "another schema")
    # Fragments that were under way are read and dropped; the connection is good for another one.
    message = Fragment(exchange=opening.exchange, index=0, received=0)
    connection.say(message, whole(training))
    again = bad.opening(training)
    connection.say(again)
    assert connection.hear() == ExchangeOpened(exchange=again.exchange, weight=1.0)
    connection.close()
    assert unchanged(bad, port, training)


def test_a_fragment_sent_twice_is_applied_once(bad, port, training):
    """On the same connection, and again on the next; the answer is the same bytes."""
    further = (training.values[:FRAGMENT_ENTRIES] + 1).tobytes()
    connection = bad.greeted(port, Purpose.BULK)
    exchange = opened(connection, bad, training, weight=1e-6)
    message = Fragment(exchange=exchange, index=0, received=0)
    answers = []
    for _ in range(2):
        connection.say(message, further)
        answers.append(connection.hear_with_body())
    moved = bad.pull(port, training)
    connection.close()
    connection = bad.greeted(port, Purpose.BULK)
    opened(connection, bad, training, exchange=exchange, weight=1e-6)
    connection.say(message, further)
    answers.append(connection.hear_with_body())
    assert answers[0] == answers[1] == answers[2]
    assert bad.pull(port, training).tobytes() == moved.tobytes()
    # Takes its step back: the other tests expect the values that the training gave.
    training.values[:] = moved
    connection.close()


def test_an_opening_that_came_with_its_fragment_is_answered_together_with_it(bad, port, training):
    """One record, so one packet: its other end wakes once. Where the fragment comes later the opening is
    answered at once, as whoever opens may wait for that."""
    together, apart = [], []
    for heard in (together, apart):
        with bad.greeted(port, Purpose.BULK) as connection:
            opening = bad.opening(training)
            fragment = Fragment(exchange=opening.exchange, index=0, received=0)
            body = whole(training)
            frames = wire.encode(opening), wire.encode(fragment, len(body))
            if heard is together:
                connection.push(b"".join(frames))
            else:
                connection.push(frames[0])
                heard.append(connection.hear_record())
                connection.push(frames[1])
            connection.push(body)
            heard.append(connection.hear_record())
    assert isinstance(wire.decode(apart[0][wire.PREFIX_BYTES :]), ExchangeOpened)
    assert isinstance(wire.decode(apart[1][wire.PREFIX_BYTES :]), Delta)
    assert isinstance(wire.decode(together[0][wire.PREFIX_BYTES : len(apart[0])]), ExchangeOpened)
    assert len(together[0]) == len(apart[0]) + len(apart[1])
    assert unchanged(bad, port, training)


def test_an_opening_with_something_else_behind_it_is_answered_first(bad, port, training):
    """Of a program that is not ours: nothing that was held back may be lost or overtaken."""
    with bad.greeted(port, Purpose.BULK) as connection:
        first, second = bad.opening(training), bad.opening(training)
        connection.push(wire.encode(first) + wire.encode(second))
        assert connection.hear() == ExchangeOpened(exchange=first.exchange, weight=1.0)
        connection.push(wire.encode(FinishExchange(exchange=second.exchange)))
        assert connection.hear() == ExchangeOpened(exchange=second.exchange, weight=1.0)
    assert unchanged(bad, port, training)


def test_a_member_that_stops_half_way_through_a_fragment_harms_nobody(bad, port, training):
    connection = bad.greeted(port, Purpose.BULK)
    exchange = opened(connection, bad, training)
    sent = wire.encode(Fragment(exchange=exchange, index=0, received=0), 4 * FRAGMENT_ENTRIES)
    connection.push(sent + whole(training)[:100_000])
    connection.close()
    assert unchanged(bad, port, training)


def test_hundreds_of_attacks_leave_no_memory_behind(bad, port, target, training):
    attacks = [*BAD_FRAGMENTS.values(), *NOT_FINITE.values()]
    attacks.remove(BAD_FRAGMENTS["beyond the window"])  # 8 MiB each: right, but slow
    attacks.remove(BAD_FRAGMENTS["the short last one, in full"])

    def rounds(count):
        for _ in range(count):
            for attack in attacks:
                attempt(attack, bad, port, training)
            for first_bytes in BAD_FIRST_BYTES.values():
                with bad.connect(port) as connection:
                    connection.push(first_bytes)
                    connection.hear_until_closed()

    rounds(1)
    before = target.resident_bytes()
    rounds(9)
    grown = target.resident_bytes() - before
    assert grown < GROWTH_BYTES, f"{grown / 1e6:.1f} MB more"
    assert unchanged(bad, port, training)


# --------------------------------------------------------------------- a node that asks a bad peer


class BadResponder:
    """Listens, and answers the node's own exchanges with what a test says."""

    def __init__(self, bad, training):
        self._bad = bad
        self._training = training
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(20)
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        info = RunInfo(run=training.run, schema=training.schema, started=True, exchanged=True)
        self.row = {"addresses": (self.address,), "runs": (info,)}

    def accept(self):
        """The node's bulk connection; its dials for control are turned away."""
        while True:
            connection = self._bad.accept(self._listener)
            hello = connection.hear()
            if hello.purpose is Purpose.BULK:
                connection.say(self._bad.hello(Purpose.BULK))
                connection.seal(self._bad.offer, hello.offer)
                return connection
            connection.close()

    def close(self):
        self._listener.close()


def exchange_now(node, training):
    """The training gives its offer back and wants an exchange, once there is a partner for it."""
    until(lambda: node.status()["runs"][0]["partners"] == 1, "there is a partner")
    training.link.send(op="meet")


def answer_with(make):
    def answer(connection, opening, training):
        connection.say(ExchangeOpened(exchange=opening.exchange, weight=1.0))
        message, body = make(opening.exchange, training)
        connection.say(message, body)

    return answer


BAD_ANSWERS = {
    "a delta of NaN": answer_with(
        lambda n, t: (
            Delta(exchange=n, index=0, part=1.0),
            np.full(FRAGMENT_ENTRIES, np.nan, np.float32).tobytes(),
        )
    ),
    "a delta that is too short": answer_with(
        lambda n, t: (Delta(exchange=n, index=0, part=1.0), bytes(400))
    ),
    "the second delta first": answer_with(
        lambda n, t: (Delta(exchange=n, index=1, part=1.0), bytes(4 * FRAGMENT_ENTRIES))
    ),
    "a delta beyond the end": answer_with(
        lambda n, t: (Delta(exchange=n, index=99, part=1.0), bytes(4 * FRAGMENT_ENTRIES))
    ),
    "a delta of another exchange": answer_with(
        lambda n, t: (Delta(exchange=n + 1, index=0, part=1.0), bytes(4 * FRAGMENT_ENTRIES))
    ),
    "a ping": answer_with(lambda n, t: (Ping(sequence=1, table=0), b"")),
    "a delta before the yes": lambda c, o, t: c.say(
        Delta(exchange=o.exchange, index=0, part=1.0), bytes(4 * FRAGMENT_ENTRIES)
    ),
    "garbage": lambda c, o, t: c.push(frame(Random(5).randbytes(64))),
    "a frame of 4 GiB": lambda c, o, t: c.push(b"\xff" * 8),
}


@pytest.fixture(scope="module")
def accomplices(bad, worse, worst):
    """In turn, because a node leaves a member whose exchange failed alone for half a second."""
    return itertools.cycle([bad, worse, worst])


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_ends_the_exchange_and_changes_nothing(
    bad, accomplices, port, target, training, name
):
    def counted():
        (run,) = target.status()["runs"]
        return run["exchanges"]["non_finite"] + target.refused("protocol")

    before, member = counted(), next(accomplices)
    responder = BadResponder(member, training)
    control = member.greeted(port, **responder.row)
    exchange_now(target, training)
    connection = responder.accept()
    opening = connection.hear()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        # It may be closed before the whole answer is out.
        BAD_ANSWERS[name](connection, opening, training)
    connection.drop_until_closed()
    until(lambda: counted() > before, "it is counted")
    control.say(member.farewell())
    control.close()
    responder.close()
    assert unchanged(bad, port, training)


def test_a_peer_whose_address_leads_back_to_the_node_is_survived(bad, host, port, target, training):
    """Two machines with docker have the same 172.17.0.1: it is tried, and found to be oneself."""
    member = BadMember(host.state("docker"))  # one that is not left alone for what it did before
    (run,) = target.status()["runs"]
    failed = run["exchanges"]["failed"]
    info = RunInfo(run=training.run, schema=training.schema, started=True, exchanged=True)
    control = member.greeted(port, addresses=(Address("127.0.0.1", port),), runs=(info,))
    exchange_now(target, training)
    until(
        lambda: target.status()["runs"][0]["exchanges"]["failed"] > failed, "it tried to exchange"
    )
    control.say(member.farewell())
    control.close()
    assert unchanged(bad, port, training)


def test_a_damaged_incarnation_does_not_reach_into_the_numbers_of_exchanges(bad, host):
    """Those begin at a multiple of the incarnation, and have to fit into 63 bits."""
    (host.state("good") / "incarnation").write_bytes(b"999999999999999")
    good = host.up("good")
    training = NumpyTraining(good, np.ones(4, np.float32))
    responder = BadResponder(bad, training)
    control = bad.greeted(good.port, **responder.row)
    exchange_now(good, training)
    connection = responder.accept()
    assert isinstance(connection.hear(), OpenExchange)
    for each in (connection, control, responder, training):
        each.close()
    assert good.stop() == 0


# ------------------------------------------------------------------------------- the local socket

ATTACH = {
    "op": "attach",
    "run": "local",
    "schema": [["w", [4], "float32"]],
    "weight": 1.0,
    "every": 8,
    "sync_timeout_s": 0.0,
    "pid": 1,
    "script": "x.py",
}

BAD_LINES = {
    "random bytes": Random(6).randbytes(500).replace(b"\n", b"") + b"\n",
    "no object": b"[1, 2]\n",
    "nothing": b"\n",
    "a pickle": pickle.dumps({"op": "status"}).replace(b"\n", b"") + b"\n",
    "deep lists": b"[" * 200_000 + b"\n",
    "deep lists in an object": b'{"op":' * 100_000 + b"\n",
    "a number of 5000 digits": b'{"op": ' + b"9" * 5000 + b"}\n",
    "not UTF-8": b'{"op": "\xff"}\n',
    "half a line": b'{"op": "sta',
}


def local(control):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(control)
    connection.settimeout(20)
    return connection


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_request_ends_its_connection_only(port, target, name):
    with local(target.control) as connection:
        connection.sendall(BAD_LINES[name])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_a_line_that_never_ends_is_cut_off(port, target):
    with local(target.control) as connection, contextlib.suppress(ConnectionError):
        for _ in range(32):
            connection.sendall(b"x" * (1 << 20))
        pytest.fail("32 MiB of one line were taken")


@pytest.mark.parametrize("op", ["dance", "", None, 7, [], {}, "__class__", "_status", "serve"])
def test_an_operation_that_does_not_exist_is_answered_with_an_error(port, target, op):
    link = LocalSocket(target.control)
    with pytest.raises(MeshError, match="knows no"):
        link.request(op=op)
    assert link.request(op="status")["schema"] == "mesh.status/1", "the connection still works"
    link.close()


BAD_ATTACHMENTS = {
    "no schema": {"schema": None},
    "an empty schema": {"schema": []},
    "a schema of text": {"schema": "w"},
    "an entry that is none": {"schema": [7]},
    "an entry without a type": {"schema": [["w", [4]]]},
    "a type that is none": {"schema": [["w", [4], "object"]]},
    "a negative size": {"schema": [["w", [-4], "float32"]]},
    "a size that is no whole number": {"schema": [["w", [0.5], "float32"]]},
    "no entries at all": {"schema": [["w", [0], "float32"]]},
    "more than any memory": {"schema": [["w", [2**39], "float32"]]},
    "more than any address space": {"schema": [["w", [2**40] * 16, "float32"]]},
    "a name with a line break": {"schema": [["a\nb", [4], "float32"]]},
    "a run without a name": {"run": ""},
    "a run that is no text": {"run": 7},
    "a run with a long name": {"run": "x" * 65},
    "a weight that is text": {"weight": "heavy"},
    "a weight that is not a number": {"weight": float("nan")},
    "an infinite weight": {"weight": float("inf")},
    "a weight of 10^300": {"weight": 10**300},
    "a negative weight": {"weight": -1},
    "every 0 steps": {"every": 0},
    "a process that is none": {"pid": "1"},
    "fewer steps than none": {"step": -1},
    "a mesh clock that is not a number": {"clock": float("nan")},
    "a mesh clock of 1e16 steps": {"clock": 1e16},
    "an endless wait": {"sync_timeout_s": float("inf")},
}


@pytest.mark.parametrize("name", BAD_ATTACHMENTS)
def test_an_attachment_that_makes_no_sense_is_refused_with_the_reason(port, target, name):
    link = LocalSocket(target.control)
    with pytest.raises(MeshError):
        link.request(**{**ATTACH, **BAD_ATTACHMENTS[name]})
    link.close()
    assert "local" not in [run["run"] for run in target.status()["runs"]]


def test_a_run_is_attached_once(port, target, training):
    with pytest.raises(MeshError, match="already"):
        NumpyTraining(target, training.values[:4], run=training.run)


def test_first_weights_that_are_not_finite_are_refused(port, target):
    link = LocalSocket(target.control)
    answer = link.request(**ATTACH)
    descriptor = link.descriptors.pop()
    os.pwrite(descriptor, np.array([1, np.nan, 3, 4], np.float32).tobytes(), 0)
    assert answer["entries"] == 4
    link.send(op="begin")
    assert "not finite" in link.receive()["reason"]
    link.close()
    os.close(descriptor)


def test_shared_memory_cannot_be_shrunk_under_the_node(port, target):
    link = LocalSocket(target.control)
    link.request(**ATTACH)
    descriptor = link.descriptors.pop()
    for size in (0, 4, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    link.close()
    os.close(descriptor)


POST = {"op": "post", "step": 8, "samples": 8, "loss": 0.5, "waits": False, "want": False}

BAD_SEQUENCES = {
    "posting twice": [POST, POST],
    "an unknown operation": [{"op": "dance"}],
    "a question in between": [{"op": "status"}],
    "attaching again": [ATTACH],
    "a step that is text": [{**POST, "step": "8"}],
    "a negative step": [{**POST, "step": -1}],
    "a step of 2^63": [{**POST, "step": 2**63}],
    "no step": [{"op": "post"}],
    "no object": [[1, 2]],
}


@pytest.mark.parametrize("name", BAD_SEQUENCES)
def test_a_training_that_breaks_the_rules_is_dropped_and_noted(port, target, name):
    exits = len(target.status()["exits"])
    training = NumpyTraining(target, np.ones(4, np.float32), run="local")
    for request in BAD_SEQUENCES[name]:
        training.link._socket.sendall(json.dumps(request).encode() + b"\n")
    until(lambda: "local" not in [r["run"] for r in target.status()["runs"]], "it is dropped")
    exits = target.status()["exits"][exits:] or target.status()["exits"][-1:]
    assert (exits[-1]["run"], exits[-1]["code"]) == ("local", None)
    training.close()


@pytest.mark.parametrize(
    "loss", [float("nan"), float("inf"), 10**400, -(10**400), "low", None, [1], True, {"a": 1}]
)
def test_a_loss_that_is_no_number_is_shown_as_unknown(port, target, loss):
    training = NumpyTraining(target, np.ones(4, np.float32), run="local")
    training.link.send(**{**POST, "loss": loss, "want": True})
    until(lambda: training.link.receive()["event"] == "offered", "the post was taken")
    (run,) = (r for r in target.status()["runs"] if r["run"] == "local")
    assert run["loss"] in (None, 1.0)
    assert run["step"] == 8
    training.link.send(op="detach")
    until(lambda: training.link.receive()["event"] == "detached", "it is detached")
    training.close()


def test_progress_that_is_not_finite_stays_out_of_the_replica(port, target, bad):
    training = NumpyTraining(target, np.ones(4, np.float32), run="local")
    training.memory.posted[:] = [2, np.nan, np.inf, 2]
    training.link.send(**{**POST, "want": True})
    events = [training.link.receive()["event"] for _ in range(2)]
    assert events == ["diverged", "offered"]
    assert training.memory.offered.tolist() == [2, 1, 1, 2], "the others are shared"
    assert bad.pull(port, training).tolist() == [2, 1, 1, 2]
    (run,) = (r for r in target.status()["runs"] if r["run"] == "local")
    assert run["exchanges"]["non_finite"] == 1
    training.close()
    until(lambda: len(target.status()["runs"]) == 1, "it is dropped")


def test_more_connections_than_the_socket_takes_are_closed_and_others_work_again(port, target):
    control = target.control
    links = [local(control) for _ in range(80)]
    for link in links:
        link.close()
    until(target.answers, "the places are free again")
