"""Schemas: what two replicas must agree on, and the sentence that says where they do not.

A schema's trip: the training's tensors -> digest() -> RunInfo.schema in every row; where a peer's
differs, SchemaRequest -> SchemaPage, page after page -> `schema differs: layer fc2.weight 10x64
here, 12x64 there`. A node that only averages never sends more than the 16 characters of the digest.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from mesh.core.messages import NodeId, SchemaEntry, SchemaPage, SchemaRequest

PAGE_ENTRIES = 100
"""Entries of at most about 400 bytes each: a page stays under the 64 KiB of a control frame."""

ENTRIES_LIMIT = 65_536
NAME_LIMIT = 256
"""Characters of a tensor's name."""

REASONS_LIMIT = 256
UNKNOWN = "schema differs"
""""where" is not known yet"""


def digest(entries: tuple[SchemaEntry, ...]) -> str:
    """16 hexadecimal characters that are equal exactly where names, shapes and dtypes are."""
    text = "\n".join(f"{e.name}\t{'x'.join(map(str, e.shape))}\t{e.dtype}" for e in entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sizes(entries: tuple[SchemaEntry, ...]) -> list[int]:
    """Numbers of each tensor, as they follow each other in a flat buffer."""
    return [math.prod(entry.shape) for entry in entries]


def name_at(entries: tuple[SchemaEntry, ...], position: int) -> str:
    """Of the tensor that holds this entry of the flat buffer."""
    ends = itertools.accumulate(sizes(entries))
    return next(entry.name for entry, end in zip(entries, ends, strict=True) if position < end)


def page_of(entries: tuple[SchemaEntry, ...], request: SchemaRequest) -> SchemaPage:
    """What answers a request, of a run with these entries."""
    page = entries[request.start : request.start + PAGE_ENTRIES]
    return SchemaPage(run=request.run, start=request.start, total=len(entries), entries=page)


def _shape(entry: SchemaEntry) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"


def _difference(here: SchemaEntry, there: SchemaEntry) -> str | None:
    if here.name != there.name:
        return f"layer {here.name} here, {there.name} there"
    if here.shape != there.shape:
        return f"layer {here.name} {_shape(here)} here, {_shape(there)} there"
    if here.dtype != there.dtype:
        return f"layer {here.name} {here.dtype} here, {there.dtype} there"
    return None


@dataclass(frozen=True, slots=True)
class _Question:
    node: NodeId
    run: str
    schema: str


class Schemas:
    """The schemas of this node's runs, and how those of its peers differ."""

    def __init__(self) -> None:
        self._own: dict[str, tuple[SchemaEntry, ...]] = {}
        self._reasons: dict[_Question, str] = {}
        self._expected: dict[_Question, int] = {}
        """first entry of the page that was asked for: any other page is ignored"""

    def attach(self, run: str, entries: tuple[SchemaEntry, ...]) -> None:
        self._own[run] = entries
        self._forget_if(lambda question: question.run == run)

    def detach(self, run: str) -> None:
        del self._own[run]

    def forget(self, node: NodeId) -> None:
        self._forget_if(lambda question: question.node == node)

    def _forget_if(self, outdated: Callable[[_Question], bool]) -> None:
        for question in [q for q in self._reasons if outdated(q)]:
            del self._reasons[question]
            self._expected.pop(question, None)

    def reason(self, node: NodeId, run: str, schema: str) -> str:
        return self._reasons.get(_Question(node, run, schema), UNKNOWN)

    def ask(self, node: NodeId, run: str, schema: str) -> SchemaRequest | None:
        """The first question about a peer's schema that is not ours; None if it was answered."""
        question = _Question(node, run, schema)
        if question not in self._reasons and len(self._reasons) >= REASONS_LIMIT:
            return None
        if self._reasons.setdefault(question, UNKNOWN) != UNKNOWN:
            return None
        self._expected[question] = 0
        return SchemaRequest(run=run, start=0)

    def answer(self, request: SchemaRequest) -> SchemaPage | None:
        entries = self._own.get(request.run)
        return None if entries is None else page_of(entries, request)

    def compare(self, node: NodeId, schema: str, page: SchemaPage) -> SchemaRequest | None:
        """Looks for the first difference in a page; asks for the next page while there is none."""
        question = _Question(node, page.run, schema)
        entries = self._own.get(page.run)
        if entries is None or self._expected.pop(question, None) != page.start:
            return None
        here = entries[page.start : page.start + len(page.entries)]
        found = next(
            (d for a, b in zip(here, page.entries, strict=False) if (d := _difference(a, b))), None
        )
        end = page.start + len(page.entries)
        if found is None and page.entries and end < min(page.total, len(entries)):
            self._expected[question] = end
            return SchemaRequest(run=page.run, start=end)
        if found is None and len(here) < len(page.entries):
            found = f"layer {page.entries[len(here)].name} only there"
        elif found is None and end < len(entries):
            found = f"layer {entries[end].name} only here"
        self._reasons[question] = f"{UNKNOWN}: {found}" if found else UNKNOWN
        return None
