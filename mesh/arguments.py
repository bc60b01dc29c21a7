"""The arguments of questions: all there are, with their limits. A request, of this machine's user or of
another node, is read through here and nothing else of it is used.
"""

from typing import Any, Final

from mesh import bench
from mesh.errors import UsageError
from mesh.history import POINTS_LIMIT
from mesh.journal import EVENTS_KEPT, EXCHANGES_KEPT

Request = dict[str, Any]

PAGE_LIMIT: Final = EVENTS_KEPT + EXCHANGES_KEPT
WAIT_LIMIT_S: Final = 20.0
"""How long a follower's question may wait for news."""

WITHIN_LIMIT_S: Final = 120.0
PING_LIMIT: Final = 100
EVERY_LIMIT: Final = 1_000_000

NUMBERS: Final[dict[str, tuple[float, float]]] = {
    "since": (0, 2**63),
    "limit": (1, PAGE_LIMIT),
    "points": (2, POINTS_LIMIT),
    "count": (1, PING_LIMIT),
    "bytes": (1, bench.BYTES_LIMIT),
    "every": (1, EVERY_LIMIT),
}
SECONDS: Final[dict[str, tuple[float, float]]] = {
    "wait_s": (0.0, WAIT_LIMIT_S),
    "seconds": (0.1, bench.SECONDS_LIMIT),
}
TEXTS: Final = ("run", "target")
"""All arguments there are: whole numbers, seconds, names."""


def plain(name: str, value: str) -> object:
    """An argument that came as text; what is none stays text, and is refused as such."""
    try:
        return int(value) if name in NUMBERS else float(value) if name in SECONDS else value
    except ValueError:
        return value


def arguments(request: Request) -> Request:
    """Those of a request that are known, checked. Raises UsageError."""
    found: Request = {}
    for name, (low, high) in NUMBERS.items():
        if name in request:
            value = request[name]
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"{name} is a whole number of {low:g}..{high:g}")
            found[name] = value
    for name, (low, high) in SECONDS.items():
        if name in request:
            found[name] = between(request, name, low, low, high)
    for name in TEXTS:
        if name in request:
            value = request[name]
            if not isinstance(value, str) or len(value) > 64 or not value.isprintable():
                raise UsageError(f"{name} is a name of at most 64 characters")
            found[name] = value
    return found


def between(request: Request, name: str, default: float, low: float, high: float) -> float:
    value = request.get(name, default)
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{name} is a number of {low:g}..{high:g}")
    return float(value)
