"""The numbers: a node's copy of the weights, the mixing arithmetic, the hand-over to the training.

Rules: 1. `w` belongs to the node process; nothing here waits, so each call is one indivisible step
of it. 2. Nothing that is not finite gets into `w`. 3. Every call is about one fragment, allocates
nothing, and passes over the numbers as seldom as it can: numpy streams 1 MiB in 0.05 ms a pass, and
cutting a fragment into pieces for the inner caches gained nothing where it was measured.

A step's trip: training writes `posted` -> HandOver.merge(): w += posted - offered -> exchanges move w
-> HandOver.offer(): offered = w -> training: x += offered - posted, which the node has computed already
for most models.
"""

import math
from collections.abc import Callable, Sequence

from mesh.arrays import Floats, np
from mesh.codec import Codec, Cut, cut_at
from mesh.core.messages import FRAGMENT_ENTRIES
from mesh.errors import NotFinite

FAR = 1e16
"""No weight is that far from 0, and the squares of a whole fragment of such steps add up in float32."""


def square_norm(values: Floats) -> float:
    """Sum of squares of `values` (n,), in one pass.

    It is finite only if every entry is: squares never cancel. It also overflows where an entry is
    beyond 1.8e19, which no weight is, so callers refuse both with one test.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(values, values))


class Replica:
    """The flat gossip buffer `w`: float32 (entries,), and what an exchange does to its fragments."""

    def __init__(
        self,
        entries: int,
        fragment_entries: int | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """`fragment_entries`: another length of fragments than the wire's; the simulator's are short.
        `sizes`: entries of each tensor, in order, where there is more than one."""
        self._fragment_entries = fragment_entries or FRAGMENT_ENTRIES
        self.weights: Floats = np.zeros(entries, dtype=np.float32)
        self.fragments = -(-entries // self._fragment_entries)
        self._norms = np.zeros(self.fragments, dtype=np.float64)
        self._steps = np.zeros(self.fragments, dtype=np.float64)
        largest = min(entries, self._fragment_entries)
        self._difference: Floats = np.empty(largest, dtype=np.float32)
        self._decoded: Floats = np.empty(largest, dtype=np.float32)
        self._ends = np.cumsum([entries] if sizes is None else sizes)
        self._cuts: dict[int, Cut] = {}
        """by fragment"""

    def slice_of(self, index: int) -> slice:
        """Where fragment `index` lies in the buffer."""
        start = index * self._fragment_entries
        return slice(start, min(start + self._fragment_entries, len(self.weights)))

    def _cut(self, index: int) -> Cut:
        """Of the tensors whose numbers fragment `index` holds."""
        found = self._cuts.get(index)
        if found is None:
            where = self.slice_of(index)
            first, last = np.searchsorted(self._ends, (where.start, where.stop - 1), side="right")
            ends = np.minimum(self._ends[first : last + 1], where.stop)
            found = cut_at(np.diff(ends, prepend=where.start).tolist())
            self._cuts[index] = found
        return found

    def body_bytes(self, index: int, codec: Codec) -> int:
        """Length of fragment `index` on the wire."""
        where = self.slice_of(index)
        return codec.encoded_bytes(where.stop - where.start, self._cut(index))

    def as_it_lies(self, index: int, codec: Codec) -> memoryview | None:
        """Fragment `index` as `codec` would write it, where that is what lies in `w`: a view, so for who
        has read it before `w` may move."""
        return codec.as_it_lies(self.weights[self.slice_of(index)])

    def write(self, index: int, out: memoryview, codec: Codec) -> None:
        """Encodes fragment `index` into `out`, body_bytes(index, codec) long: a copy, because `w` may
        move while it is being sent."""
        codec.encode(self.weights[self.slice_of(index)], out, self._cut(index))

    def answer(
        self,
        index: int,
        body: memoryview,
        share: float,
        reply: memoryview,
        codec: Codec,
        room: float = math.inf,
    ) -> float:
        """The responder's step: encodes delta = x - w into `reply`, then w += share * delta.

        A delta whose square length is beyond `room` is shortened to it first. `body`, which holds x, is
        used up. Returns the square length that was applied. Raises NotFinite, with nothing changed.
        """
        w = self.weights[self.slice_of(index)]
        decoded = self._decoded[: len(w)]
        difference = codec.room(reply, self._difference[: len(w)])
        cut = self._cut(index)
        x = codec.decode(body, decoded, cut)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(x, w, out=difference)
        distance = square_norm(difference)
        if not math.isfinite(distance):
            raise NotFinite(f"fragment {index} is not finite, or further than 1e19 away")
        if distance > room:
            difference *= np.float32(math.sqrt(room / distance))
            distance = room
        codec.encode(difference, reply, cut)
        self._move(w, codec.decode(reply, decoded, cut), share, spare=x)
        return distance

    def apply(
        self,
        index: int,
        body: memoryview,
        share: float,
        codec: Codec,
        check: Callable[[float], None] | None = None,
    ) -> float:
        """The initiator's step: w -= share * delta. Returns the square distance, or NotFinite.

        `check` hears the square distance first and may raise, with nothing changed. `body`, which holds
        delta, is used up.
        """
        w = self.weights[self.slice_of(index)]
        delta = codec.decode(body, self._decoded[: len(w)], self._cut(index))
        distance = square_norm(delta)
        if not math.isfinite(distance):
            raise NotFinite(f"delta {index} is not finite, or longer than 1e19")
        if check is not None:
            check(distance)
        self._move(w, delta, -share, spare=delta)
        return distance

    def take(self, index: int, body: memoryview, into: Floats, codec: Codec) -> None:
        """A newcomer's step: `into` = the donor's weights. Raises NotFinite, with nothing changed.

        `into` is a buffer like `weights`, whatever it holds; fill() uses it once it is whole.
        """
        where = self.slice_of(index)
        given = codec.decode(body, self._decoded[: where.stop - where.start], self._cut(index))
        if not math.isfinite(square_norm(given)):
            raise NotFinite(f"the donor's fragment {index} is not finite")
        np.copyto(into[where], given)

    def fill(self, index: int, values: Floats) -> None:
        """w = values (entries,) for one fragment. Raises NotFinite, with nothing changed."""
        where = self.slice_of(index)
        if not math.isfinite(square_norm(values[where])):
            raise NotFinite("the model's weights are not finite: NaN, infinite, or beyond 1e19")
        np.copyto(self.weights[where], values[where])

    def progress(self, index: int, posted: Floats, offered: Floats) -> int | None:
        """w += posted - offered for one fragment.

        Entries where that is not finite made no progress: posted = offered there, so that what they
        are never comes back to the training either. Returns the first of them, or None.
        """
        where = self.slice_of(index)
        w, step = self.weights[where], self._difference[: where.stop - where.start]
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(posted[where], offered[where], out=step)
        length, first = square_norm(step), None
        if not length < FAR * FAR:
            lost = ~(np.abs(step) < FAR)  # NaN is not below
            if lost.any():
                step[lost] = 0
                posted[where][lost] = offered[where][lost]
                length, first = square_norm(step), where.start + int(lost.argmax())
        self._steps[index] = length
        if _same(w, offered[where]):
            # Nobody has moved it since: a training alone is what it would be without a mesh, to the bit.
            np.copyto(w, posted[where])
        else:
            np.add(w, step, out=w)
        return first

    def square_progress(self) -> float:
        """Sum of squares of what the training's last hand-over added."""
        return float(self._steps.sum())

    def square_distance(self, index: int, values: Floats) -> float:
        """Of `values` (entries,) from w, for one fragment."""
        where = self.slice_of(index)
        difference = self._difference[: where.stop - where.start]
        return square_norm(np.subtract(values[where], self.weights[where], out=difference))

    def approach(self, index: int, values: Floats, part: float) -> None:
        """w += part * (values - w) for one fragment."""
        where = self.slice_of(index)
        w, difference = self.weights[where], self._difference[: where.stop - where.start]
        np.subtract(values[where], w, out=difference)
        self._move(w, difference, part, spare=difference)

    def subtract(self, index: int, x: Floats) -> None:
        """x = w - x (entries,) for one fragment."""
        where = self.slice_of(index)
        np.subtract(self.weights[where], x[where], out=x[where])

    def advance(self, index: int, x: Floats, since: Floats) -> None:
        """x += w - since, both (entries,), for one fragment."""
        where = self.slice_of(index)
        step = self._difference[: where.stop - where.start]
        np.add(x[where], np.subtract(self.weights[where], since[where], out=step), out=x[where])

    def copy(self, index: int, into: Floats) -> None:
        """`into` (entries,) = w for one fragment, whose norm is taken on the way."""
        where = self.slice_of(index)
        np.copyto(into[where], self.weights[where])
        self._norms[index] = square_norm(into[where])

    def square_norm(self) -> float:
        """Sum of squares of all weights as they were last offered to the training: what distances are
        compared with, where only the order of magnitude counts. Kept, not computed: a question about
        a large model must not stall the loop."""
        return float(self._norms.sum())

    @staticmethod
    def _move(w: Floats, delta: Floats, factor: float, *, spare: Floats) -> None:
        """w += factor * delta. `spare` is in the caches already: a third vector would push others out."""
        out = spare if spare.flags.writeable else None
        np.add(w, np.multiply(delta, np.float32(factor), out=out), out=w)


def _same(one: Floats, other: Floats) -> bool:
    """Bit by bit. What an exchange has moved is most often known by its first entries."""
    ours, theirs = one.view(np.uint32), other.view(np.uint32)
    return np.array_equal(ours[:64], theirs[:64]) and np.array_equal(ours, theirs)


class HandOver:
    """The node's side of the two shared buffers, float32 (entries,) each, fragment by fragment.

    `posted` is written by the training, `offered` by the node; exactly one side holds both at a time:
    the training from an offer to its next post, the node from a post to its next offer. So nothing is
    locked, and a process that dies between two words leaves the other side's numbers whole. An
    exchange may move w between two fragments: each holds its own `offered = w at that moment`, and
    gets its own `posted - offered` once.

    `differences`: an offer turns `posted` into offered - posted. The training has one pass to make then
    and not two, while its node has a core to itself on most machines.
    """

    def __init__(
        self, replica: Replica, posted: Floats, offered: Floats, *, differences: bool = False
    ) -> None:
        self._replica = replica
        self._posted = posted
        self.offered = offered
        self._differences = differences
        self._subtracted = [False] * replica.fragments
        """whether `posted` is the difference of an offer; of one that came back unused, the next goes on"""
        self.lost: int | None = None
        """the first entry of a post that was not finite"""

    def begin(self, index: int) -> None:
        """w = the training's first weights. Raises NotFinite."""
        self._replica.fill(index, self._posted)

    def merge(self, index: int) -> None:
        """w += posted - offered: the training's progress since its last offer, where that is finite."""
        self._subtracted[index] = False
        lost = self._replica.progress(index, self._posted, self.offered)
        if self.lost is None:
            self.lost = lost

    def offer(self, index: int) -> None:
        """offered = w. Say so to the training once all fragments are."""
        if self._differences and self._subtracted[index]:
            self._replica.advance(index, self._posted, self.offered)
        elif self._differences:
            self._replica.subtract(index, self._posted)
        self._subtracted[index] = True
        self._replica.copy(index, self.offered)
