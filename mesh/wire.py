"""Frames: bytes <-> messages, with every limit. The only file that knows msgpack.

A frame is a prefix of 8 bytes (header length, body length; big-endian), a msgpack header
[number, field, field, ...] and raw body bytes (numbers of a fragment). Rules: 1. Lengths are checked
before anything is read or allocated for them; a body is read only into a buffer that the receiver
sized from its own model. 2. Every field is checked by type, range and length. 3. Whatever bytes come,
decode() returns a message or raises RemoteProtocolError, nothing else. 4. MESSAGES is append-only.
"""

import math
import socket
import struct
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeVar

import msgpack

from mesh.core.address import Address
from mesh.core.clock import CLOCK_LIMIT
from mesh.core.membership import INCARNATION_LIMIT, MEMBERS_LIMIT
from mesh.core.messages import (
    ACCUSERS_LIMIT,
    FRAGMENT_ENTRIES,
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
    Message,
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

PREFIX: Final = struct.Struct(">II")
PREFIX_BYTES: Final = PREFIX.size

HEADER_LIMIT_BYTES: Final = 64 * 1024
"""Header of any frame. A full page of member rows is about 50 kB."""

BODY_LIMIT_BYTES: Final = 4 * FRAGMENT_ENTRIES
"""Body of any frame: one fragment of float32, the widest codec."""

ROWS_LIMIT: Final = 64
"""Rows of one frame."""

USUAL_ROW_BYTES: Final = 1024
"""Longer rows are not kept: a member that invents them must not fill 40 MB here."""

Check = Callable[[Any], Any]
T = TypeVar("T")


class _Invalid(Exception):
    """A field that breaks its rule; never leaves this file."""


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _Invalid(f"a whole number of {low}..{high}")
        return value

    return check


def _text(limit: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit or not value.isprintable():
            raise _Invalid(f"printable text of at most {limit} characters")
        return value

    return check


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _Invalid("true or false")
    return value


def _weight(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value) or not 0 <= value <= 1e12:
        raise _Invalid("a weight of 0..1e12")
    return value


def _length(value: Any) -> float:
    if type(value) is not float or not 0 <= value < math.inf:
        raise _Invalid("a length from 0")
    return value


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _clock(value: Any) -> float:
    if type(value) is not float or not abs(value) <= CLOCK_LIMIT:  # NaN is not
        raise _Invalid(f"a mesh clock of at most {CLOCK_LIMIT:g} steps")
    return value


def _node(value: Any) -> NodeId:
    if type(value) is not str or not 8 <= len(value) <= 64 or not value.isalnum():
        raise _Invalid("a node id")
    return NodeId(value)


def _host(value: Any) -> str:
    """A literal address: a peer's row must never make this node look up a name."""
    if type(value) is not str or len(value) > 64 or not value.isprintable():
        raise _Invalid("an address")
    literal = value.partition("%")[0]
    try:  # twenty times as fast as ipaddress, and as strict
        socket.inet_pton(socket.AF_INET6 if ":" in literal else socket.AF_INET, literal)
    except (OSError, ValueError):
        raise _Invalid("a literal IP address") from None
    return value


def _many(check: Check, limit: int) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > limit:
            raise _Invalid(f"a list of at most {limit}")
        return tuple(check(item) for item in value)

    return check_all


def _record(kind: type[T], **checks: Check) -> Callable[[Any], T]:
    """A list of fields, in this order; a newer version may have appended more."""

    count, names, rules = len(checks), tuple(checks), tuple(checks.values())

    def check(value: Any) -> T:
        if type(value) is not list or len(value) < count:
            raise _Invalid(f"{kind.__name__}: {count} fields")
        fields = zip(names, rules, value, strict=False)
        return kind(**{name: rule(item) for name, rule, item in fields})

    return check


_counter = _whole(0, 2**63)
_index = _whole(0, 2**32)
_version = _whole(0, 2**64 - 1)
_run_name = _text(64)
_reason = _text(500)
_name = _text(64)


def _versions(value: Any) -> tuple[int, ...]:
    """A table's worth of _version, at the speed of C: a large mesh swaps them all day long."""
    if type(value) is not list or len(value) > MEMBERS_LIMIT + 1:
        raise _Invalid(f"a list of at most {MEMBERS_LIMIT + 1}")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**64):
        raise _Invalid("whole numbers of 64 bits")
    return tuple(value)


def _accusers(value: Any) -> tuple[NodeId, ...]:
    """In their one order, so that equal rows are equal."""
    return tuple(sorted(set(_many(_node, ACCUSERS_LIMIT)(value))))


_address = _record(Address, host=_host, port=_whole(1, 65535))
_run_info = _record(
    RunInfo,
    run=_run_name,
    schema=_text(16),
    started=_flag,
    exchanged=_flag,
    progress=_whole(0, 64),
    strategy=_text(16),
)
_row = _record(
    Member,
    node=_node,
    name=_name,
    incarnation=_whole(0, INCARNATION_LIMIT - 1),
    state=lambda value: State(_whole(0, 3)(value)),
    addresses=_many(_address, 16),
    runs=_many(_run_info, 16),
    accusers=_accusers,
)


def _member(value: Any) -> Member:
    row = _row(value)
    if row.accusers and row.state is not State.SUSPECT:
        raise _Invalid("accusers of a suspect only")
    return row


_turn = _record(Turn, view=_text(16), position=_counter, step=_length)
_entry = _record(SchemaEntry, name=_text(256), shape=_many(_whole(0, 2**40), 16), dtype=_text(16))
_hello = _record(
    Hello,
    protocol=_whole(0, 2**31),
    name=_name,
    purpose=lambda value: Purpose(_whole(0, 1)(value)),
    member=_member,
    instance=_counter,
    age_ms=_counter,
    offer=_text(80),
)
_other_version = _record(OtherVersion, protocol=_whole(0, 2**31), name=_name)


def _hello_of_any_version(value: Any) -> Hello | OtherVersion:
    other = _other_version(value)
    return _hello(value) if other.protocol == PROTOCOL else other


MESSAGES: Final[tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = (
    # The position is the number on the wire. ONLY APPEND TO THIS LIST.
    (Hello, _hello_of_any_version),
    (Refusal, _record(Refusal, reason=_reason)),
    (Members, _record(Members, members=_many(_member, ROWS_LIMIT))),
    (Ping, _record(Ping, sequence=_counter, table=_version)),
    (Ack, _record(Ack, sequence=_counter, table=_version)),
    (SchemaRequest, _record(SchemaRequest, run=_run_name, start=_index)),
    (
        SchemaPage,
        _record(SchemaPage, run=_run_name, start=_index, total=_index, entries=_many(_entry, 128)),
    ),
    (
        OpenExchange,
        _record(
            OpenExchange,
            exchange=_counter,
            run=_run_name,
            schema=_text(16),
            weight=_weight,
            start=_index,
            pull=_flag,
            started=_flag,
            exchanged=_flag,
            progress=_whole(0, 64),
            codec=_text(16),
            strategy=_text(16),
            first=_index,
            end=_optional(_index),
            reach=_optional(_length),
            turn=_optional(_turn),
            clock=_clock,
        ),
    ),
    (
        ExchangeOpened,
        _record(ExchangeOpened, exchange=_counter, weight=_weight, clock=_clock),
    ),
    (
        ExchangeRefused,
        _record(
            ExchangeRefused,
            exchange=_counter,
            reason=_reason,
            unknown=_flag,
            position=_optional(_counter),
        ),
    ),
    (Fragment, _record(Fragment, exchange=_counter, index=_index, received=_index)),
    (Delta, _record(Delta, exchange=_counter, index=_index, halved=_flag)),
    (FinishExchange, _record(FinishExchange, exchange=_counter)),
    (PingRequest, _record(PingRequest, sequence=_counter, node=_node)),
    (
        PingReport,
        _record(PingReport, sequence=_counter, verdict=lambda value: Verdict(_whole(0, 2)(value))),
    ),
    (Versions, _record(Versions, versions=_versions)),
    (Wanted, _record(Wanted, versions=_versions)),
    (IdentityTaken, _record(IdentityTaken, addresses=_many(_address, 16))),
)
_NOT_MSGPACK: Final = (ValueError, TypeError, msgpack.UnpackException)
_NUMBERS: Final = {kind: number for number, (kind, _) in enumerate(MESSAGES)}


def _fields(value: Any) -> list[Any]:
    """A dataclass as the list of its fields, in order of declaration; msgpack asks for each."""
    return [getattr(value, name) for name in value.__dataclass_fields__]


_MEMBERS: Final = bytes((0x92, _NUMBERS[Members]))
"""How a frame of rows begins: a list of two, and the message's number."""


@lru_cache(maxsize=MEMBERS_LIMIT)
def _packed(row: Member) -> bytes:
    """A row on the wire. Kept: each newcomer to a mesh of a thousand is told all of them."""
    packed: bytes = msgpack.packb(_fields(row), default=_fields)
    return packed


@lru_cache(maxsize=MEMBERS_LIMIT)
def _unpacked(packed: bytes) -> Member:
    """A row off the wire. Kept: neighbours repeat it, and a simulation hears it a thousand times."""
    return _member(_plain(packed))


def encode(message: Message, body_bytes: int = 0) -> bytes:
    """The frame of a message, up to where its body of `body_bytes` follows."""
    if type(message) is Members:
        count: bytes = msgpack.Packer(buf_size=64).pack_array_header(len(message.members))
        header = _MEMBERS + count + b"".join(map(_packed, message.members))
    else:
        header = msgpack.packb([_NUMBERS[type(message)], *_fields(message)], default=_fields)
    if len(header) > HEADER_LIMIT_BYTES or body_bytes > BODY_LIMIT_BYTES:
        raise LocalProtocolError(f"{type(message).__name__} does not fit into a frame")
    return PREFIX.pack(len(header), body_bytes) + header


def parse_prefix(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(header length, body length) in bytes, both within their limits."""
    header_bytes, body_bytes = PREFIX.unpack(prefix)
    if header_bytes > HEADER_LIMIT_BYTES or body_bytes > BODY_LIMIT_BYTES:
        raise RemoteProtocolError(f"a frame of {header_bytes} + {body_bytes} bytes is too large")
    return header_bytes, body_bytes


def decode(header: bytes | bytearray | memoryview) -> Message:
    """The message of a header. Raises RemoteProtocolError for anything that is not one."""
    kind: type[Any] = Members
    try:
        if header[:2] == _MEMBERS:
            return Members(members=tuple(map(_row_of, _cut(header))))
        raw = _plain(header)
        if type(raw) is not list or not raw or type(raw[0]) is not int:
            raise RemoteProtocolError("a header is a list that begins with a message number")
        if not 0 <= raw[0] < len(MESSAGES):
            raise RemoteProtocolError(f"message number {raw[0]} is not known here")
        kind, check = MESSAGES[raw[0]]
        message: Message = check(raw[1:])
    except _Invalid as error:
        raise RemoteProtocolError(f"{kind.__name__} wants {error}") from None
    except _NOT_MSGPACK as error:
        raise RemoteProtocolError(f"not a msgpack header: {type(error).__name__}") from None
    return message


def _plain(packed: bytes | bytearray | memoryview) -> Any:
    # msgpack's own defaults would let 1 MiB of nested lists become a million objects (64x).
    return msgpack.unpackb(
        packed,
        raw=False,
        strict_map_key=True,
        max_str_len=1024,
        max_bin_len=0,
        max_array_len=MEMBERS_LIMIT + 1,
        max_map_len=0,
        max_ext_len=0,
    )


def _cut(header: bytes | bytearray | memoryview) -> list[bytes]:
    """The rows of a Members message, each as its bytes."""
    unpacker = msgpack.Unpacker(max_buffer_size=HEADER_LIMIT_BYTES)
    unpacker.feed(header[len(_MEMBERS) :])
    count = unpacker.read_array_header()
    if count > ROWS_LIMIT:
        raise _Invalid(f"at most {ROWS_LIMIT} rows")
    ends = [len(_MEMBERS) + unpacker.tell()]
    for _ in range(count):
        unpacker.skip()
        ends.append(len(_MEMBERS) + unpacker.tell())
    if ends[-1] != len(header):
        raise _Invalid("nothing behind its rows")
    return [bytes(header[start:end]) for start, end in pairwise(ends)]


def _row_of(packed: bytes) -> Member:
    usual = len(packed) <= USUAL_ROW_BYTES
    return _unpacked(packed) if usual else _unpacked.__wrapped__(packed)
