"""What averaging costs beside copying: the passes of an exchange and of a hand-over, and the codecs.

    python -m benchmarks.arithmetic                # milliseconds for 100 MB, and as copies of 100 MB
    python -m benchmarks.arithmetic --stall        # the loop's longest turn: a hand-over of 400 MB

Each figure is a low percentile of many calls, fragment by fragment in turn as the node makes them: what
else the machine does then counts little. `in 0.1.0` is the same work as release 0.1.0 did it.
"""

import argparse
import time
from collections.abc import Callable
from random import Random

import numpy as np
import trio

from mesh.arrays import Floats
from mesh.codec import EXACT, NAMES, make_codecs
from mesh.core.events import Beginning
from mesh.core.messages import FRAGMENT_ENTRIES, SchemaEntry
from mesh.replica import HandOver, Replica, square_norm
from mesh.runs import RunSpec, make_run

FRAGMENTS = 100
"""100 MiB in each vector: far more than caches hold."""

ROUNDS = 8
PERCENTILE = 5
STALL_ENTRIES = 100_000_000


def per_100_mb(step: Callable[[int], object]) -> float:
    """Milliseconds for 100 MB of `step`, called for each fragment."""
    taken = []
    for _ in range(ROUNDS):
        for index in range(FRAGMENTS):
            began = time.perf_counter()
            step(index)
            taken.append(time.perf_counter() - began)
    fragments = 100e6 / (4 * FRAGMENT_ENTRIES)
    return float(np.percentile(taken, PERCENTILE)) * fragments * 1e3


class AsBefore:
    """The steps of release 0.1.0 on the same replica, with a norm of the weights after each."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._difference: Floats = np.empty(FRAGMENT_ENTRIES, dtype=np.float32)

    def answer(self, index: int, body: memoryview, reply: memoryview) -> None:
        w = self._replica.weights[self._replica.slice_of(index)]
        np.subtract(np.frombuffer(body, np.float32), w, out=self._difference)
        square_norm(self._difference)
        delta: Floats = np.frombuffer(reply, dtype=np.float32)
        np.copyto(delta, self._difference)
        self._add(w, delta, 0.5)

    def apply(self, index: int, body: memoryview) -> None:
        delta: Floats = np.frombuffer(body, dtype=np.float32)
        square_norm(delta)
        self._add(self._replica.weights[self._replica.slice_of(index)], delta, -0.5)

    def merge(self, index: int, posted: Floats, offered: Floats) -> None:
        where = self._replica.slice_of(index)
        step = np.subtract(posted[where], offered[where], out=self._difference)
        square_norm(step)
        self._add(self._replica.weights[where], step, 1.0)

    def _add(self, w: Floats, delta: Floats, factor: float) -> None:
        np.add(w, np.multiply(delta, np.float32(factor), out=self._difference), out=w)
        square_norm(w)


def costs() -> None:
    """Prints the table."""
    entries = FRAGMENTS * FRAGMENT_ENTRIES
    rng = np.random.default_rng(1)
    replica = Replica(entries)
    posted, offered, into = (rng.standard_normal(entries, dtype=np.float32) for _ in range(3))
    codecs = make_codecs(Random(1))
    before, hand_over = AsBefore(replica), HandOver(replica, posted, offered)
    room, reply = (memoryview(bytearray(4 * FRAGMENT_ENTRIES)) for _ in range(2))
    numbers: Floats = np.empty(FRAGMENT_ENTRIES, dtype=np.float32)

    def copy(index: int) -> None:
        where = replica.slice_of(index)
        np.copyto(into[where], posted[where])

    copied = per_100_mb(copy)

    def report(name: str, now: float, then: float | None = None) -> None:
        was = "" if then is None else f"   in 0.1.0 {then:6.1f} ms"
        rate = 100 / now
        print(f"{name:14} {now:6.1f} ms  {now / copied:5.2f} copies  {rate:5.1f} GB/s{was}")

    report("np.copyto", copied)
    body = room[: replica.body_bytes(0, codecs[EXACT])]
    np.copyto(np.frombuffer(body, dtype=np.float32), posted[:FRAGMENT_ENTRIES])
    for name in NAMES:
        codec = codecs[name]
        size = replica.body_bytes(0, codec)
        body, answer = room[:size], reply[:size]
        codec.encode(posted[:FRAGMENT_ENTRIES], body)
        then = None
        if name == EXACT:
            then = per_100_mb(lambda index: before.answer(index, room, reply))
        step = per_100_mb(lambda k: replica.answer(k, body, 0.5, answer, codec))  # noqa: B023
        report(f"answer {name}", step, then)
        if name == EXACT:
            then = per_100_mb(lambda index: before.apply(index, reply))
        step = per_100_mb(lambda k: replica.apply(k, answer, 1e-3, codec))  # noqa: B023
        report(f"apply {name}", step, then)
        wide = per_100_mb(lambda k: codec.encode(posted[replica.slice_of(k)], body))  # noqa: B023
        report(f"encode {name}", wide)
        if name != EXACT:
            report(f"decode {name}", per_100_mb(lambda _: codec.decode(body, numbers)))  # noqa: B023
    then = per_100_mb(lambda index: before.merge(index, posted, offered))
    report("merge a post", per_100_mb(hand_over.merge), then)
    report("offer", per_100_mb(hand_over.offer), per_100_mb(copy))


async def stall() -> None:
    """Prints the longest time that the loop was kept from its other tasks by a whole hand-over: the
    thread's CPU time, so that what else the machine does counts little."""
    spec = RunSpec(
        run="stall",
        entries=(SchemaEntry(name="w", shape=(STALL_ENTRIES,), dtype="float32"),),
        weight=1.0,
        every=1,
        sync_timeout_s=0.0,
        pid=1,
        script="arithmetic.py",
    )
    posted, offered = (np.ones(STALL_ENTRIES, dtype=np.float32) for _ in range(2))
    replica = Replica(STALL_ENTRIES)
    run = make_run(
        spec, replica, make_codecs(Random(1)), posted, offered, lambda _: None, lambda: 0, 0.0
    )
    turns: list[float] = []

    async def watch() -> None:
        before = time.thread_time()
        while True:
            await trio.lowlevel.checkpoint()
            before, last = time.thread_time(), before
            turns.append(before - last)

    async def measure(name: str, work: Callable[[], object]) -> None:
        turns.clear()
        began = time.perf_counter()
        await work()  # type: ignore[misc]
        whole = time.perf_counter() - began
        late = np.percentile(turns, 99)
        print(f"{name:14} {1e3 * whole:6.1f} ms, turns of {1e3 * late:.1f} ms at p99, "
              f"{1e3 * max(turns):.1f} ms at most")  # fmt: skip

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await measure("first weights", run.load)
        run.how = Beginning.ALONE
        await measure("first offer", lambda: run.begin(None))
        for _ in range(3):
            await measure("merge a post", lambda: run.post(step=1, loss=None, samples=1))
            await measure("offer", run.offer)
        nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="What averaging costs beside copying.")
    parser.add_argument("--stall", action="store_true", help="the loop's longest turn, at 400 MB")
    if parser.parse_args().stall:
        trio.run(stall)
    else:
        costs()


if __name__ == "__main__":
    main()
