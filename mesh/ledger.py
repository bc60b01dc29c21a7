"""The ledger of a simulated mesh: every delta that any replica answers or applies is entered here.

A fragment's trip: the responder's WatchedReplica.answer() -> WatchedResponses.applied() ->
Ledger.answered() -> the reply travels -> the initiator's WatchedReplica.apply() -> Ledger.applied().
Rules: 1. What a node says of itself is never asked: the ledger counts by itself and compares. 2. Mass,
the sum of p * w, changes only by what trainings post, and by what dies. 3. It knows no network.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mesh.arrays import Floats
from mesh.codec import EXACT, Codec
from mesh.core.exchange import Responses
from mesh.core.messages import WINDOW, NodeId
from mesh.replica import Replica
from mesh.runs import KeptReply, Run

FRAGMENT_ENTRIES: Final = 4
"""Numbers in a fragment of a watched replica: all the counting of 1 MiB, none of its arithmetic."""

HULL_SLACK: Final = 0.1
"""How far a coordinate may leave what went in, as a part of the spread. Answers that overlap with requests
in flight keep a replica inside (exchange.answer_beside); beside a request whose connection broke, and that is
resumed later, they may leave: by 6.3 % in the worst of 3000 lives, by less than 0.1 % in most."""

NOT_A_NUMBER: Final = np.float32(np.nan).tobytes()
BALANCE: Final = 1e-9
ROUNDING: Final = 1e-7
"""Of float32: half a unit in the last place, as a part of the number."""


class WatchedReplica(Replica):
    """A replica that enters what happens to it into the ledger, and has small fragments."""

    def __init__(self, entries: int, node: NodeId, weight: float, ledger: "Ledger") -> None:
        super().__init__(entries, FRAGMENT_ENTRIES)
        self.node = node
        self.weight = weight
        self.run: Run | None = None
        self.number = 0
        """each attachment has its own"""
        self.alive = True
        self.spoiled = False
        """the next fragment that it sends holds a NaN: bad memory, or ill will"""
        self.exchanges: set[int] = set()
        """those that it initiated and has not finished"""
        self.since_asked: dict[tuple[int, int], Floats] = {}
        """(exchange, fragment) that it asked for -> what its training posted since"""
        self.answered: tuple[int, float, bytes] | None = None
        """a fragment that was answered, the step, the delta: its reply has to be kept before the next"""
        self.posting: NDArray[np.float64] = np.zeros(entries, dtype=np.float64)
        """progress that its training hands over and that is not merged yet"""
        self._ledger = ledger

    def as_it_lies(self, index: int, codec: Codec) -> None:
        """All that goes out passes write()."""

    def write(self, index: int, out: memoryview, codec: Codec) -> None:
        if self.run is not None and self.run.current is not None:
            exchange = self.run.current.exchange
            self.exchanges.add(exchange)
            none = np.zeros_like(self.weights[self.slice_of(index)])
            self.since_asked.setdefault((exchange, index), none)
        super().write(index, out, codec)
        if self.spoiled and codec.name == EXACT:
            self.spoiled = False
            out[:4] = NOT_A_NUMBER

    def answer(
        self,
        index: int,
        body: memoryview,
        share: float,
        reply: memoryview,
        codec: Codec,
        room: float = math.inf,
    ) -> float:
        distance = super().answer(index, body, share, reply, codec, room)
        if self.answered is not None:
            self._ledger.fail(f"{self.node[:8]} answered a fragment and kept no reply")
        self.answered = index, share, self._decode(index, reply, codec)
        self._ledger.moved(self, self.slice_of(index))
        return distance

    def apply(self, index: int, body: memoryview, share: float, *rest: Any) -> float:
        codec: Codec = rest[0]
        delta = self._decode(index, body, codec)
        distance = super().apply(index, body, share, *rest)
        if self.run is not None and self.run.current is not None:
            posted = self.since_asked.pop((self.run.current.exchange, index), 0.0)
            self._ledger.posted_meanwhile(self, self.slice_of(index), posted)
        self._ledger.applied(self, index, delta, share)
        self._ledger.moved(self, self.slice_of(index))
        return distance

    def progress(self, index: int, posted: Floats, offered: Floats) -> int | None:
        where = self.slice_of(index)
        before = self.weights[where].copy()
        lost = super().progress(index, posted, offered)
        for (_, asked), since in self.since_asked.items():
            if asked == index:
                since += self.weights[where] - before
        self._ledger.merged(self, where)
        return lost

    def fill(self, index: int, values: Floats) -> None:
        where = self.slice_of(index)
        before = self.weights[where].astype(np.float64)
        super().fill(index, values)
        self._ledger.filled(self, where, before)

    def _decode(self, index: int, body: memoryview, codec: Codec) -> bytes:
        """The numbers in `body`, for the ledger to compare."""
        where = self.slice_of(index)
        out: Floats = np.empty(where.stop - where.start, dtype=np.float32)
        return codec.decode(body, out, self._cut(index)).tobytes()


class WatchedResponses(Responses[KeptReply]):
    """What a watched replica answers, entered into the ledger."""

    @classmethod
    def instead_of(cls, run: Run, replica: WatchedReplica, ledger: "Ledger") -> None:
        """Takes the place of the responses of a run that nobody was answered by yet."""
        responses = cls(replica.fragments, run.responses._release)
        responses._replica, responses._ledger = replica, ledger
        replica.run, run.responses = run, responses

    _replica: WatchedReplica
    _ledger: "Ledger"

    def open(self, initiator: NodeId, exchange: int, *rest: Any, **named: Any) -> str | None:
        reason = super().open(initiator, exchange, *rest, **named)
        if reason is None:
            self._ledger.opened(self._replica, initiator, exchange, rest[2])
        return reason

    def applied(
        self, initiator: NodeId, exchange: int, index: int, reply: KeptReply, *square: float
    ) -> None:
        super().applied(initiator, exchange, index, reply, *square)
        if self.kept_replies > WINDOW * len(self._records):
            self._ledger.fail(f"{self._replica.node[:8]} keeps more replies than a window each")
        *_, turn = self._records[initiator].terms
        self._ledger.answered(self._replica, (initiator, exchange, index), reply.part, turn)


Key = tuple[NodeId, int, int]
"""initiator, exchange, fragment"""


@dataclass(slots=True)
class _Answer:
    """A fragment that was answered and whose delta the initiator has not applied yet."""

    responder: WatchedReplica
    delta: bytes
    step: float
    crossed: bool
    open: bool = True
    """both replicas live: the delta is on its way, and counted as in flight"""


class Ledger:
    """See the module's docstring. `fail` hears the first violation, in one sentence."""

    def __init__(self, entries: int, fail: Callable[[str], None]) -> None:
        self.fail = fail
        self.replicas: dict[NodeId, WatchedReplica] = {}
        """the living, by their nodes"""
        self.fragments_applied = 0
        self.lost_in_doubt = 0
        self.highest_overshoot = 0.0
        self._expected: NDArray[np.float64] = np.zeros(entries, dtype=np.float64)
        self._scale, self._operations, self._born = 1.0, 0, 0
        self._low: Floats = np.full(entries, np.inf, dtype=np.float32)
        self._high: Floats = np.full(entries, -np.inf, dtype=np.float32)
        self._answers: dict[NodeId, dict[tuple[int, int], _Answer]] = defaultdict(dict)
        """initiator -> (exchange, fragment) -> what is in doubt"""
        self._next_answer: dict[tuple[int, NodeId], tuple[int, int]] = {}
        """(responder's number, initiator) -> (exchange, fragment that is due)"""
        self._next_apply: dict[tuple[NodeId, int], int] = {}

    # --------------------------------------------------------------------------------- replicas

    def born(self, replica: WatchedReplica) -> None:
        """A run attached: from now on its replica's mass counts, beginning with fill()."""
        self.replicas[replica.node] = replica
        self._born += 1
        replica.number = self._born

    def gone(self, replica: WatchedReplica) -> None:
        """Its process died, or its run was detached: its weights and what it has in doubt are lost."""
        if not replica.alive:
            return
        replica.alive = False
        del self.replicas[replica.node]
        self._expected -= replica.weight * replica.weights.astype(np.float64)
        for initiator, answers in self._answers.items():
            for (_, index), answer in answers.items():
                if answer.open and (answer.responder is replica or initiator == replica.node):
                    answer.open = False
                    self.lost_in_doubt += 1
                    self._expected[replica.slice_of(index)] += self._moved_by(answer)
        self._answers.pop(replica.node, None)
        dead = replica.number
        self._next_answer = {k: due for k, due in self._next_answer.items() if k[0] != dead}

    def filled(self, replica: WatchedReplica, where: slice, before: NDArray[np.float64]) -> None:
        """First weights: the training's own, or a donor's."""
        if replica.alive:
            now = replica.weights[where].astype(np.float64)
            self._expected[where] += replica.weight * (now - before)
            self.widen(replica, where)

    def posted(self, replica: WatchedReplica, progress: NDArray[np.float64]) -> None:
        """A training is about to hand over so much progress."""
        if replica.posting.any():
            self.fail(f"{replica.node[:8]} has not merged all of the last post")
        replica.posting[:] = progress
        self._operations += 1

    def merged(self, replica: WatchedReplica, where: slice) -> None:
        """A fragment of what was posted is in the replica: once, so a second time adds nothing."""
        if replica.alive:
            self._expected[where] += replica.weight * replica.posting[where]
            replica.posting[where] = 0
            self.widen(replica, where)

    def widen(self, replica: WatchedReplica, where: slice) -> None:
        """A training moved this replica: from there on the hull reaches to where it is."""
        weights = replica.weights[where]
        self._check_finite(replica, where)
        if replica.alive:
            np.minimum(self._low[where], weights, out=self._low[where])
            np.maximum(self._high[where], weights, out=self._high[where])
            self._scale = max(self._scale, float(np.abs(weights).max()))

    def posted_meanwhile(
        self, replica: WatchedReplica, where: slice, posted: Floats | float
    ) -> None:
        """A delta arrived after its initiator's training had posted: both went in, as if the training
        had posted to what the exchange made. So the hull reaches as far from there."""
        if replica.alive:
            low, high = self._low[where], self._high[where]
            reached = np.clip(replica.weights[where] - posted, low, high) + posted
            np.minimum(low, reached, out=low)
            np.maximum(high, reached, out=high)

    def moved(self, replica: WatchedReplica, where: slice) -> None:
        """An exchange moved this replica."""
        self._operations += 1
        self._check_finite(replica, where)
        if replica.alive:
            self._check_hull(replica, where)

    # -------------------------------------------------------------------------------- exchanges

    def opened(self, responder: WatchedReplica, initiator: NodeId, exchange: int, first: int = 0) -> None:  # fmt: skip
        """An initiator that opens another exchange has no fragment of the last one in doubt."""
        row = responder.number, initiator
        if self._next_answer.get(row, (0, 0))[0] != exchange:
            self._next_answer[row] = exchange, first
        for (older, index), answer in self._answers[initiator].items():
            if answer.open and older != exchange and answer.responder is responder:
                self.fail(f"{initiator[:8]} left fragment {index} of exchange {older} with "
                          f"{responder.node[:8]} in doubt and began another")  # fmt: skip

    def answered(self, responder: WatchedReplica, key: Key, part: float, turn: Any = None) -> None:
        """The responder applied its step of a fragment."""
        initiator, exchange, index = key
        done, responder.answered = responder.answered, None
        if not responder.alive:
            return
        where = f"fragment {index} of exchange {exchange} from {initiator[:8]}"
        row = responder.number, initiator
        _, due = self._next_answer.get(row, (exchange, 0))
        if index != due:
            what = "twice" if index < due else "before an earlier one"
            self.fail(f"{responder.node[:8]} applied {where} {what}")
        self._next_answer[row] = exchange, index + 1
        if done is None or done[0] != index:
            self.fail(f"{responder.node[:8]} keeps a reply to {where} that it did not compute")
            return
        answers = self._answers[initiator]
        before = answers.get((exchange, index))
        if before is not None and before.open:
            self.fail(f"{where} was answered by two replicas at once")
        own = responder.run.initiated if responder.run else []
        # In an exact round everybody takes the whole step, whatever else is under way.
        crossed = not turn and any(not r.pull and r.applied <= index < r.sent_once for r in own)
        if crossed and part > 0.5:
            self.fail(f"{responder.node[:8]} took the full step in {where} while its own request "
                      "for it was under way: the two swap")  # fmt: skip
        answer = _Answer(responder, done[2], done[1], crossed)
        asker = self.replicas.get(initiator)
        if asker is None or exchange not in asker.exchanges:
            # Who asked is dead: what it sent before has arrived.
            self._expected[responder.slice_of(index)] += self._moved_by(answer)
            self.lost_in_doubt += 1
            return
        answers[exchange, index] = answer
        in_doubt = sum(number == exchange for number, _ in answers)
        if in_doubt > WINDOW:
            self.fail(f"{in_doubt} fragments of exchange {exchange} in doubt at {initiator[:8]}")

    def applied(self, initiator: WatchedReplica, index: int, delta: bytes, step: float) -> None:
        """The initiator applied its step of a fragment."""
        record = initiator.run.current if initiator.run else None
        if not initiator.alive:
            return
        if record is None:
            self.fail(f"{initiator.node[:8]} applied a delta outside any exchange")
            return
        who, exchange = initiator.node[:8], record.exchange
        where = f"fragment {index} of exchange {exchange} with {record.peer[:8]}"
        due = self._next_apply.get((initiator.node, exchange), record.first)
        if index != due:
            what = "twice" if index < due else "before an earlier one"
            self.fail(f"{who} applied the delta of {where} {what}")
        self._next_apply[initiator.node, exchange] = index + 1
        if index + 1 == record.end:
            del self._next_apply[initiator.node, exchange]
            initiator.exchanges.discard(exchange)
        answer = self._answers[initiator.node].pop((exchange, index), None)
        if answer is None:
            self.fail(f"{who} applied a delta of {where} that nobody answered")
            return
        if answer.delta != delta:
            self.fail(f"{who} applied another delta of {where} than its responder")
        theirs, mine = answer.responder.weight * answer.step, initiator.weight * step
        if abs(theirs - mine) > BALANCE * abs(theirs):
            self.fail(f"the shares of {where} do not balance: p * step is {mine} and {theirs}")
        together, limit = step + answer.step, 2 * record.turn.step if record.turn else 1.0
        limit /= 1 + answer.crossed
        # Beside requests of its own a responder may have no room to move at all.
        if together > limit + BALANCE or together < 0 or not (together or answer.crossed):
            self.fail(f"both together step {together:g} of the way in {where}, "
                      f"at most {limit:g} is right: they swap")  # fmt: skip
        self.fragments_applied += 1
        if not answer.open:
            slot = initiator.slice_of(index)
            self._expected[slot] -= mine * np.frombuffer(delta, np.float32).astype(np.float64)

    def in_flight(self) -> int:
        """Fragments that were answered and wait for their initiator, both alive."""
        return sum(a.open for answers in self._answers.values() for a in answers.values())

    # ----------------------------------------------------------------------------------- checks

    def check_mass(self) -> None:
        """The sum of p * w, less what is in flight, is what went in."""
        total = -self._expected
        for replica in self.replicas.values():
            total += replica.weight * replica.weights
        for answers in self._answers.values():
            for (_, index), answer in answers.items():
                if answer.open:
                    total[answer.responder.slice_of(index)] -= self._moved_by(answer)
        error = float(np.abs(total).max())
        tolerance = ROUNDING * self._scale * (20 + 4 * self._operations**0.5)
        if not error <= tolerance:
            self.fail(f"mass moved by {error:g}, rounding explains {tolerance:g}")

    def spread(self) -> float:
        """How far apart the inputs lie, at the coordinate where that is largest."""
        return float((self._high - self._low).max()) if self.replicas else 0.0

    def disagreement(self) -> float:
        """How far apart the replicas lie now, as a part of the spread."""
        if len(self.replicas) < 2:
            return 0.0
        stacked = np.stack([replica.weights for replica in self.replicas.values()])
        return float(np.ptp(stacked, axis=0).max()) / max(self.spread(), 1e-6)

    def _moved_by(self, answer: _Answer) -> NDArray[np.float64]:
        delta = np.frombuffer(answer.delta, np.float32).astype(np.float64)
        return answer.responder.weight * answer.step * delta

    def _check_finite(self, replica: WatchedReplica, where: slice) -> None:
        if not np.isfinite(replica.weights[where]).all():
            self.fail(f"{replica.node[:8]} holds weights that are not finite")

    def _check_hull(self, replica: WatchedReplica, where: slice) -> None:
        weights, low, high = replica.weights[where], self._low[where], self._high[where]
        beyond = float(np.maximum(low - weights, weights - high).max())
        if beyond <= 0:
            return
        overshoot = beyond / max(float((high - low).max()), 1e-3)
        self.highest_overshoot = max(self.highest_overshoot, overshoot)
        if overshoot > HULL_SLACK:
            self.fail(f"{replica.node[:8]} left the hull of all inputs by {overshoot:.1%}")
