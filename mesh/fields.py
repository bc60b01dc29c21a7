"""Checks of single fields of a message: type, range and length, each in one place.

A check takes what msgpack read and returns the value, or raises Invalid with what belongs there.
Rules: 1. Nothing is converted silently. 2. No check looks a name up, in a table of ours or anywhere.
3. record() reads the fields that it knows, in order: a newer version may have appended more.
"""

import math
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from mesh.core.clock import CLOCK_LIMIT
from mesh.core.for_people import PIECE_CHARACTERS
from mesh.core.messages import NodeId

Check = Callable[[Any], Any]
T = TypeVar("T")

REPEATED = 1024
"""Records that are known again: figures of about as many nodes, 300 bytes each."""


class Invalid(Exception):
    """A field that breaks its rule; becomes a RemoteProtocolError in wire.py."""


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise Invalid(f"a whole number of {low}..{high}")
        return value

    return check


def text(limit: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit or not value.isprintable():
            raise Invalid(f"printable text of at most {limit} characters")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise Invalid("true or false")
    return value


def weight(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value) or not 0 <= value <= 1e12:
        raise Invalid("a weight of 0..1e12")
    return value


def length(value: Any) -> float:
    if type(value) is not float or not 0 <= value < math.inf:
        raise Invalid("a length from 0")
    return value


def part(value: Any) -> float:
    if type(value) is not float or not 0 <= value <= 1:
        raise Invalid("a part of the whole")
    return value


def clock(value: Any) -> float:
    if type(value) is not float or not abs(value) <= CLOCK_LIMIT:  # NaN is not
        raise Invalid(f"a mesh clock of at most {CLOCK_LIMIT:g} steps")
    return value


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def figure(value: Any) -> float | None:
    if value is not None and (type(value) is not float or not math.isfinite(value)):
        raise Invalid("a finite number or nothing")
    return value


def rate(value: Any) -> float:
    if type(value) is not float or not 0 <= value <= 1e15:
        raise Invalid("a rate of 0..1e15")
    return value


def piece(value: Any) -> str:
    if type(value) is not str or len(value) > PIECE_CHARACTERS or not value.isascii():
        raise Invalid(f"at most {PIECE_CHARACTERS} characters of ASCII")
    if not value.isprintable():
        raise Invalid("printable text")
    return value


def node_id(value: Any) -> NodeId:
    if type(value) is not str or not 8 <= len(value) <= 64 or not value.isalnum():
        raise Invalid("a node id")
    return NodeId(value)


def host(value: Any) -> str:
    """A literal address: a peer's row must never make this node look up a name."""
    if type(value) is not str or len(value) > 64 or not value.isprintable():
        raise Invalid("an address")
    literal = value.partition("%")[0]
    try:  # twenty times as fast as ipaddress, and as strict
        socket.inet_pton(socket.AF_INET6 if ":" in literal else socket.AF_INET, literal)
    except (OSError, ValueError):
        raise Invalid("a literal IP address") from None
    return value


def many(check: Check, limit: int) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > limit:
            raise Invalid(f"a list of at most {limit}")
        return tuple(check(item) for item in value)

    return check_all


def record(kind: type[T], **checks: Check) -> Callable[[Any], T]:
    """A list of fields, in this order; a newer version may have appended more."""

    count, names, rules = len(checks), tuple(checks), tuple(checks.values())

    def check(value: Any) -> T:
        if type(value) is not list or len(value) < count:
            raise Invalid(f"{kind.__name__}: {count} fields")
        fields = zip(names, rules, value, strict=False)
        return kind(**{name: rule(item) for name, rule, item in fields})

    return check


def repeated(check: Check) -> Check:
    """Of a list of plain values that several peers hand on: what was checked is known again. Values
    that are equal are one (1 and 1.0): the first that passed the check stands for them."""
    known = lru_cache(maxsize=REPEATED)(lambda values: check(list(values)))

    def check_once(value: Any) -> Any:
        if type(value) is not list or any(type(item) is list for item in value):
            return check(value)
        return known(tuple(value))

    return check_once
