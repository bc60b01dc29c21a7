"""Frames: bytes <-> messages, with every limit. The only file that knows msgpack.

A frame is a prefix of 8 bytes (header length, body length; big-endian), a msgpack header
[number, field, field, ...] and raw body bytes (numbers of a fragment). Rules: 1. Lengths are checked
before anything is read or allocated for them; a body is read only into a buffer that the receiver
sized from its own model. 2. Every field is checked by type, range and length. 3. Whatever bytes come,
decode() returns a message or raises RemoteProtocolError, nothing else. 4. MESSAGES is append-only.
"""

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final

import msgpack

from mesh.core.address import Address
from mesh.core.for_people import (
    ARGUMENTS_LIMIT,
    HOPS_LIMIT,
    PAGES_LIMIT,
    PIECES_LIMIT,
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
from mesh.core.membership import INCARNATION_LIMIT, MEMBERS_LIMIT, known
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
from mesh.core.schema import NAME_LIMIT
from mesh.errors import LocalProtocolError, RemoteProtocolError
from mesh.fields import (
    Invalid,
    clock,
    figure,
    flag,
    host,
    length,
    many,
    node_id,
    optional,
    part,
    piece,
    rate,
    record,
    repeated,
    text,
    weight,
    whole,
)

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

_counter = whole(0, 2**63)
_index = whole(0, 2**32)
_position = whole(0, 2**53)
_version = whole(0, 2**64 - 1)
_run_name = text(64)
_reason = text(500)
_name = text(64)


def _versions(value: Any) -> tuple[int, ...]:
    """A table's worth of _version, at the speed of C: a large mesh swaps them all day long."""
    if type(value) is not list or len(value) > MEMBERS_LIMIT + 1:
        raise Invalid(f"a list of at most {MEMBERS_LIMIT + 1}")
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**64):
        raise Invalid("whole numbers of 64 bits")
    return tuple(value)


def _accusers(value: Any) -> tuple[NodeId, ...]:
    """In their one order, so that equal rows are equal."""
    return tuple(sorted(set(many(node_id, ACCUSERS_LIMIT)(value))))


_address = record(Address, host=host, port=whole(1, 65535))
_run_info = record(
    RunInfo,
    run=_run_name,
    schema=text(16),
    started=flag,
    exchanged=flag,
    progress=whole(0, 64),
    strategy=text(16),
    weight=weight,
)
_row = record(
    Member,
    node=node_id,
    name=_name,
    incarnation=whole(0, INCARNATION_LIMIT - 1),
    state=lambda value: State(whole(0, 3)(value)),
    addresses=many(_address, 16),
    runs=many(_run_info, 16),
    accusers=_accusers,
)


def _member(value: Any) -> Member:
    row = _row(value)
    if row.accusers and row.state is not State.SUSPECT:
        raise Invalid("accusers of a suspect only")
    return row


_turn = record(Turn, view=text(16), position=_position, step=part)
_entry = record(SchemaEntry, name=text(NAME_LIMIT), shape=many(whole(0, 2**40), 16), dtype=text(16))
_hello = record(
    Hello,
    protocol=whole(0, 2**31),
    name=_name,
    purpose=lambda value: Purpose(whole(0, 1)(value)),
    member=_member,
    instance=_counter,
    age_ms=_counter,
    offer=text(80),
)
_other_version = record(OtherVersion, protocol=whole(0, 2**31), name=_name)


_figures = record(
    Figures,
    step=_counter,
    loss=figure,
    drift=figure,
    samples_s=rate,
    out_bytes_s=rate,
    in_bytes_s=rate,
    load=figure,
    cpu=figure,
)
_report = record(
    Report,
    node=node_id,
    run=_run_name,
    serial=_counter,
    age_ms=_counter,
    figures=repeated(_figures),
)
_argument = record(Argument, name=text(16), value=text(64))
_page = whole(0, PAGES_LIMIT)
_hops = whole(0, HOPS_LIMIT)


def _hello_of_any_version(value: Any) -> Hello | OtherVersion:
    other = _other_version(value)
    return _hello(value) if other.protocol == PROTOCOL else other


MESSAGES: Final[tuple[tuple[type[Any], Callable[[Any], Any]], ...]] = (
    # The position is the number on the wire. ONLY APPEND TO THIS LIST.
    (Hello, _hello_of_any_version),
    (Refusal, record(Refusal, reason=_reason)),
    (Members, record(Members, members=many(_member, ROWS_LIMIT))),
    (Ping, record(Ping, sequence=_counter, table=_version)),
    (Ack, record(Ack, sequence=_counter, table=_version)),
    (SchemaRequest, record(SchemaRequest, run=_run_name, start=_index)),
    (
        SchemaPage,
        record(SchemaPage, run=_run_name, start=_index, total=_index, entries=many(_entry, 128)),
    ),
    (
        OpenExchange,
        record(
            OpenExchange,
            exchange=_counter,
            run=_run_name,
            schema=text(16),
            weight=weight,
            start=_index,
            pull=flag,
            started=flag,
            exchanged=flag,
            progress=whole(0, 64),
            codec=text(16),
            strategy=text(16),
            first=_index,
            end=optional(_index),
            reach=optional(length),
            turn=optional(_turn),
            clock=clock,
        ),
    ),
    (ExchangeOpened, record(ExchangeOpened, exchange=_counter, weight=weight, clock=clock)),
    (
        ExchangeRefused,
        record(
            ExchangeRefused,
            exchange=_counter,
            reason=_reason,
            unknown=flag,
            position=optional(_position),
        ),
    ),
    (Fragment, record(Fragment, exchange=_counter, index=_index, received=_index)),
    (Delta, record(Delta, exchange=_counter, index=_index, part=part)),
    (FinishExchange, record(FinishExchange, exchange=_counter)),
    (PingRequest, record(PingRequest, sequence=_counter, node=node_id)),
    (
        PingReport,
        record(PingReport, sequence=_counter, verdict=lambda value: Verdict(whole(0, 2)(value))),
    ),
    (Versions, record(Versions, versions=_versions)),
    (Wanted, record(Wanted, versions=_versions)),
    (IdentityTaken, record(IdentityTaken, addresses=many(_address, 16))),
    (Reports, record(Reports, reports=many(_report, REPORTS_LIMIT))),
    (
        Question,
        record(
            Question,
            asker=node_id,
            number=_counter,
            page=_page,
            attempt=_index,
            hops=_hops,
            target=node_id,
            op=text(16),
            arguments=many(_argument, ARGUMENTS_LIMIT),
        ),
    ),
    (
        Answer,
        record(
            Answer,
            asker=node_id,
            number=_counter,
            page=_page,
            attempt=_index,
            pages=whole(1, PAGES_LIMIT),
            hops=_hops,
            pieces=many(piece, PIECES_LIMIT),
        ),
    ),
    (BenchBlock, record(BenchBlock, sequence=_counter, want=whole(0, BODY_LIMIT_BYTES))),
    (BenchEcho, record(BenchEcho, sequence=_counter)),
)
_NOT_MSGPACK: Final = (ValueError, TypeError, msgpack.UnpackException)
_NUMBERS: Final = {kind: number for number, (kind, _) in enumerate(MESSAGES)}


@cache
def _getter(kind: Any) -> Callable[[Any], Any]:
    names = tuple(kind.__dataclass_fields__)
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda value: (get(value),)


def _fields(value: Any) -> Any:
    """A dataclass as the tuple of its fields, in order of declaration; msgpack asks for each."""
    return _getter(type(value))(value)  # type: ignore[arg-type]  # mypy: a type is no Hashable


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
    return known(_member(_plain(packed)))[0]


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
    except Invalid as error:
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
        raise Invalid(f"at most {ROWS_LIMIT} rows")
    ends = [len(_MEMBERS) + unpacker.tell()]
    for _ in range(count):
        unpacker.skip()
        ends.append(len(_MEMBERS) + unpacker.tell())
    if ends[-1] != len(header):
        raise Invalid("nothing behind its rows")
    return [bytes(header[start:end]) for start, end in pairwise(ends)]


def _row_of(packed: bytes) -> Member:
    usual = len(packed) <= USUAL_ROW_BYTES
    return _unpacked(packed) if usual else _unpacked.__wrapped__(packed)
