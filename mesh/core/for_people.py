"""What nodes say to each other because a person may ask: figures, questions, measurements.

The rules are those of messages.py. Nothing here decides anything about members or weights.
"""

from dataclasses import dataclass

from mesh.core.address import NodeId

REPORTS_LIMIT = 32
"""Reports of one message: at most 5 kB beside each probe, however large the mesh is."""

HOPS_LIMIT = 3
"""Relays of a question: where a node reaches another at all, one or two are enough."""

PIECE_CHARACTERS = 1000
PIECES_LIMIT = 40
"""Of one page: 40 kB, so that a ping behind it on a slow line is not late."""

PAGES_LIMIT = 32
"""Of one answer: 1.28 MB. `mesh peers` of 3000 members."""

ARGUMENTS_LIMIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How a run does on one node, as it tells the others."""

    step: int
    loss: float | None
    drift: float | None
    samples_s: float
    out_bytes_s: float
    in_bytes_s: float
    load: float | None = None
    """of its processors: 1 where as many tasks want to run as there are cores"""
    cpu: float | None = None
    """cores that the node and its trainings use"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run's figures on the node that said so first. Of two the higher `serial` is newer."""

    node: NodeId
    run: str
    serial: int
    age_ms: int
    """how long ago that was, when this message was sent"""
    figures: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Figures for people: what the sender knows and told least often. They decide nothing."""

    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One field of a question. Its value is read as what the operation's table says, as text."""

    name: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`asker` wants page `page` of what `target` answers to `op`. Relayed `hops` times more at most;
    who relays remembers where it came from, and the answer goes back that way."""

    asker: NodeId
    number: int
    """drawn by the asker"""
    page: int
    attempt: int
    """a new one takes another way; the target does what is asked once"""
    hops: int
    target: NodeId
    op: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One page of an answer: a JSON object that only the program that asked reads, as ASCII."""

    asker: NodeId
    number: int
    page: int
    attempt: int
    pages: int
    hops: int
    """relays that the question came through"""
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchBlock:
    """Bulk: so many bytes follow as a body and are thrown away; answer with a body of `want`."""

    sequence: int
    want: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchEcho:
    """The answer to a BenchBlock."""

    sequence: int
