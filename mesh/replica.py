"""The numbers: a node's copy of the weights, the mixing arithmetic, the hand-over to the training.

Rules: 1. `w` belongs to the node process; nothing here waits, so each call is one indivisible step
of it. 2. Nothing that is not finite gets into `w`. 3. Every pass works fragment by fragment, so that
it runs in cache and allocates nothing.

A step's trip: training writes `posted` -> HandOver.merge(): w += posted - offered -> exchanges move w
-> HandOver.offer(): offered = w -> training: x += offered - posted.
"""

import math

import numpy as np

from mesh.codec import Codec, Floats
from mesh.core.messages import FRAGMENT_ENTRIES
from mesh.errors import NotFinite


def square_norm(values: Floats) -> float:
    """Sum of squares of `values` (n,), in one pass.

    It is finite only if every entry is: squares never cancel. It also overflows where an entry is
    beyond 1.8e19, which no weight is, so callers refuse both with one test.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(values, values))


class Replica:
    """The flat gossip buffer `w`: float32 (entries,), and what an exchange does to its fragments."""

    def __init__(self, entries: int, codec: Codec, fragment_entries: int | None = None) -> None:
        """`fragment_entries`: another length of fragments than the wire's; the simulator's are short."""
        self.codec = codec
        self._fragment_entries = fragment_entries or FRAGMENT_ENTRIES
        self.weights: Floats = np.zeros(entries, dtype=np.float32)
        self.fragments = -(-entries // self._fragment_entries)
        self._norms = np.zeros(self.fragments, dtype=np.float64)
        largest = min(entries, self._fragment_entries)
        self._difference: Floats = np.empty(largest, dtype=np.float32)
        self._decoded: Floats = np.empty(largest, dtype=np.float32)

    def slice_of(self, index: int) -> slice:
        """Where fragment `index` lies in the buffer."""
        start = index * self._fragment_entries
        return slice(start, min(start + self._fragment_entries, len(self.weights)))

    def body_bytes(self, index: int) -> int:
        """Length of fragment `index` on the wire."""
        where = self.slice_of(index)
        return self.codec.encoded_bytes(where.stop - where.start)

    def write(self, index: int, out: memoryview) -> None:
        """Encodes fragment `index` into `out`, body_bytes(index) long: a copy, because `w` may move
        while it is being sent."""
        self.codec.encode(self.weights[self.slice_of(index)], out)

    def answer(self, index: int, body: memoryview, share: float, reply: memoryview) -> float:
        """The responder's step: encodes delta = x - w into `reply`, then w += share * delta.

        Returns the square distance. Raises NotFinite, with nothing changed.
        """
        w = self.weights[self.slice_of(index)]
        difference = self._difference[: len(w)]
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(self.codec.decode(body, self._decoded[: len(w)]), w, out=difference)
        distance = square_norm(difference)
        if not math.isfinite(distance):
            raise NotFinite(f"fragment {index} is not finite, or further than 1e19 away")
        self.codec.encode(difference, reply)
        self._add(index, self.codec.decode(reply, self._decoded[: len(w)]), share)
        return distance

    def apply(self, index: int, body: memoryview, share: float) -> float:
        """The initiator's step: w -= share * delta. Returns the square distance, or NotFinite."""
        w = self.weights[self.slice_of(index)]
        delta = self.codec.decode(body, self._decoded[: len(w)])
        distance = square_norm(delta)
        if not math.isfinite(distance):
            raise NotFinite(f"delta {index} is not finite, or longer than 1e19")
        self._add(index, delta, -share)
        return distance

    def take(self, index: int, body: memoryview, into: Floats) -> float:
        """A newcomer's step: `into` = the donor's weights, exactly. Returns the square distance to `w`.

        `into` is a buffer like `weights`, whatever it holds; fill() uses it once it is whole.
        """
        w = self.weights[self.slice_of(index)]
        given = self.codec.decode(body, self._decoded[: len(w)])
        if not math.isfinite(square_norm(given)):
            raise NotFinite(f"the donor's fragment {index} is not finite")
        difference = np.subtract(given, w, out=self._difference[: len(w)])
        np.copyto(into[self.slice_of(index)], given)
        return square_norm(difference)

    def progress(self, index: int, posted: Floats, offered: Floats) -> bool:
        """w += posted - offered for one fragment; False, with nothing changed, if not finite."""
        where = self.slice_of(index)
        step = self._difference[: where.stop - where.start]
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(posted[where], offered[where], out=step)
        if not math.isfinite(square_norm(step)):
            return False
        self._add(index, step, 1.0)
        return True

    def fill(self, values: Floats) -> None:
        """w = values (entries,). Raises NotFinite, with nothing changed."""
        norms = [square_norm(values[self.slice_of(k)]) for k in range(self.fragments)]
        if not math.isfinite(sum(norms)):
            raise NotFinite("the model's weights are not finite: NaN, infinite, or beyond 1e19")
        self._norms[:] = norms
        np.copyto(self.weights, values)

    def square_norm(self) -> float:
        """Sum of squares of all weights: what distances are compared with. Kept, not computed: a
        question about a large model must not stall the loop."""
        return float(self._norms.sum())

    def _add(self, index: int, delta: Floats, factor: float) -> None:
        w = self.weights[self.slice_of(index)]
        step = np.multiply(delta, np.float32(factor), out=self._difference[: len(w)])
        np.add(w, step, out=w)
        self._norms[index] = square_norm(w)


class HandOver:
    """The node's side of the two shared buffers, float32 (entries,) each.

    `posted` is written by the training, `offered` by the node; exactly one side holds both at a time:
    the training from an offer to its next post, the node from a post to its next offer. So nothing is
    locked, and a process that dies between two words leaves the other side's numbers whole.
    """

    def __init__(self, replica: Replica, posted: Floats, offered: Floats) -> None:
        self._replica = replica
        self._posted = posted
        self.offered = offered

    def begin(self) -> None:
        """w = the training's first weights. Raises NotFinite."""
        self._replica.fill(self._posted)
        np.copyto(self.offered, self._posted)

    def merge(self) -> bool:
        """w += posted - offered: the training's progress since its last offer.

        Fragments whose progress is not finite are left out; False if there were any.
        """
        whole = True
        for index in range(self._replica.fragments):
            whole &= self._replica.progress(index, self._posted, self.offered)
        return whole

    def offer(self) -> None:
        """offered = w. Say so to the training right after."""
        np.copyto(self.offered, self._replica.weights)
