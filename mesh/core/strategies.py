"""With whom a run averages next, and how: the seam where strategies differ.

schedule.py knows *when* an exchange is due; a Plan says which. A round's trip: choose() -> Start ->
the exchange -> ended() -> while `midway`, choose() again without waiting for the next hand-over.
What else a strategy is lies in runs.py (`outer`, `clip`: what a replica does with what came). The
equations, sources and costs are in docs/strategies.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from mesh.core.matchings import matchings
from mesh.core.messages import FRAGMENT_ENTRIES, NodeId, Turn
from mesh.errors import UsageError

PAIR, EXACT, CYCLIC, OUTER, CLIP = "pair", "exact", "cyclic", "outer", "clip"
STRATEGIES = (PAIR, EXACT, CYCLIC, OUTER, CLIP)
UNWEIGHTED = (EXACT, CLIP)
"""Strategies whose steps leave no room for weights of replicas."""

CYCLIC_PARTS = 8
"""Parts that `cyclic` cuts the model into: at every=1 it costs the bytes of `pair` at every=8."""

CLIP_PEERS = 3
"""Peers that `clip` pulls from in a row: with fewer, two attackers meet too often."""

JUMP_LIMIT = 2**32
"""Rounds that a peer may be ahead, a hundred a second for a year: one that lies must not push the others
to where the wire carries no place any more."""

PATIENCE_S = 2.0
"""How long an exact round waits to be asked: three times the longest pause between two requests of a
partner that is there (schedule.NOT_YET_S)."""

USUAL_EVERY = 8
OUTER_EVERY = 50
"""Steps between hand-overs where the training says nothing; NoLoCo's inner steps for `outer`."""


KEPT_VECTORS = {OUTER: ("anchor", "momentum")}
"""What a strategy keeps beside the replica and cannot find anew after a restart, by its names in a
checkpoint; each as long as the model."""


def check_strategy(name: str, weight: float = 1.0) -> str:
    """The name, if there is such a strategy and it takes this weight. Raises UsageError."""
    if name not in STRATEGIES:
        raise UsageError(f"strategy={name!r}: one of {', '.join(STRATEGIES)}")
    if name in UNWEIGHTED and weight != 1:
        raise UsageError(f"strategy={name!r} averages replicas of equal weight: leave out weight=")
    return name


def usual_every(strategy: str) -> int:
    """Steps between hand-overs where the training does not say."""
    return OUTER_EVERY if strategy == OUTER else USUAL_EVERY


def fragment_entries(strategy: str, entries: int) -> int | None:
    """Longest fragment of a model of so many entries; None: the usual. Of `cyclic` even a small model
    has parts to send in turn."""
    if strategy == CYCLIC:
        return min(FRAGMENT_ENTRIES, max(1, -(-entries // CYCLIC_PARTS)))
    return None


def part_of(fragments: int, part: int) -> tuple[int, int]:
    """The fragments [first, end) of the `part`-th exchange in turn."""
    parts = min(CYCLIC_PARTS, fragments)
    place = part % parts
    return fragments * place // parts, fragments * (place + 1) // parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Begin an exchange with this peer. `rest`: nothing new was posted, replicas only settle."""

    peer: NodeId
    pull: bool
    rest: bool = False
    part: int | None = None
    """cyclic: which part in turn; None is the whole model"""
    clip: bool = False
    """mix what was pulled, clipped, instead of taking it for one's own"""
    turn: Turn | None = None
    """exact: the place in its rounds"""
    resumes: bool = False
    """a pull may go on where another donor's broke off (events.StartExchange)"""


class Plan(Protocol):
    """One strategy's choice of exchanges, for one run."""

    whole: bool
    """exchanges are about the whole model: replicas that one finds equal are equal"""

    @property
    def midway(self) -> bool:
        """A round was begun and is not over: choose() again at once."""

    def see(self, nodes: Sequence[NodeId]) -> None:
        """Those that this run is averaged with, this node not among them, have changed."""

    def choose(self, peers: Sequence[NodeId], *, rest: bool, now: float) -> Start | None:
        """The next exchange, with one of those seen (at least one is in `peers`; others had a
        setback); None where it is others' turn to ask."""

    def ended(self, *, completed: bool, ahead: int | None, turn: Turn | None = None) -> None:
        """An exchange that was chosen, now or before it broke off, is over. `ahead`: the peer's place in
        the rounds."""


class RandomPairs:
    """`pair`, `outer`, and `cyclic` with its part of the model: any peer, at random."""

    midway = False

    def __init__(self, rng: Random, *, cyclic: bool = False) -> None:
        self._rng = rng
        self._part: int | None = 0 if cyclic else None
        self.whole = not cyclic

    def see(self, nodes: Sequence[NodeId]) -> None:
        pass

    def choose(self, peers: Sequence[NodeId], *, rest: bool, now: float) -> Start | None:
        return Start(peer=self._rng.choice(peers), pull=False, rest=rest, part=self._part)

    def ended(self, *, completed: bool, ahead: int | None, turn: Turn | None = None) -> None:
        if completed and self._part is not None:
            self._part += 1


class ClippedPulls:
    """`clip`: the weights of three different peers, one after the other."""

    whole = True

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._left: list[NodeId] = []
        self._rest = False

    @property
    def midway(self) -> bool:
        return bool(self._left)

    def see(self, nodes: Sequence[NodeId]) -> None:
        self._left = [node for node in self._left if node in nodes]

    def choose(self, peers: Sequence[NodeId], *, rest: bool, now: float) -> Start | None:
        self._left = [node for node in self._left if node in peers]
        if not self._left:
            self._left = self._rng.sample(peers, min(CLIP_PEERS, len(peers)))
            self._rest = rest
        return Start(peer=self._left.pop(), pull=True, rest=self._rest, clip=True)

    def ended(self, *, completed: bool, ahead: int | None, turn: Turn | None = None) -> None:
        pass


class ExactRounds:
    """`exact`: the rounds of a Base-2 graph, over and over, while the same nodes are there.

    Every node counts its `position` in the rounds of all cycles; a pair meets when both are at the
    same one, the lower id asks. Rules: 1. Who is behind is waited for. 2. A partner that is ahead has
    passed a round with us that we did not: one of the two was new, and whoever is behind jumps there;
    that cycle is not exact, the next is. 3. Whoever waits to be asked, and is not, asks where its partner
    is: one that saw others come and go began anew, and all would wait in a ring. 4. Other nodes: from
    the beginning.
    """

    whole = True

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._view = ""
        self._nodes: tuple[NodeId, ...] = ()
        self._rounds: tuple[dict[int, tuple[int, float]], ...] = ()
        self._me_at = 0
        self._begun = False
        self._waits_at: Turn | None = None
        self._since = 0.0
        """when it began to wait there for its partner's request"""
        self.position = 0

    @property
    def midway(self) -> bool:
        return self._begun

    def see(self, nodes: Sequence[NodeId]) -> None:
        ordered = tuple(sorted((*nodes, self._me)))
        if ordered == self._nodes:
            return
        self._nodes = ordered
        self._view = hashlib.sha256(" ".join(ordered).encode()).hexdigest()[:16]
        self._me_at = ordered.index(self._me)
        self._rounds = tuple(
            {a: (b, step) for pair in pairs for a, b, step in (pair, (pair.b, pair.a, pair.step))}
            for pairs in matchings(len(ordered))
        )
        self.position = 0
        self._begun = False

    def choose(self, peers: Sequence[NodeId], *, rest: bool, now: float) -> Start | None:
        self._begun = True
        here = self._here()
        if here is None:
            return None  # the last rounds of the cycle were others'
        peer, turn = here
        if peer not in peers:
            return None
        if peer < self._me:
            return self._look_for(peer, turn, rest, now)
        return Start(peer=peer, pull=False, rest=rest, turn=turn)

    def _look_for(self, peer: NodeId, turn: Turn, rest: bool, now: float) -> Start | None:
        """A request that no place fits: its refusal says where the partner is."""
        if self._waits_at == turn and now >= self._since + PATIENCE_S:
            self._waits_at = None
            return Start(peer=peer, pull=False, rest=rest, turn=replace(turn, step=turn.step / 2))
        if self._waits_at != turn:
            self._waits_at, self._since = turn, now
        return None

    def ended(self, *, completed: bool, ahead: int | None, turn: Turn | None = None) -> None:
        if completed and turn is not None:
            self.answered(turn)
        elif ahead is not None and ahead > self.position:
            self._jump(ahead)

    def objection(self, peer: NodeId, turn: Turn | None) -> str | None:
        """Why a partner's request cannot be answered now; None if it can."""
        if turn is None or turn.view != self._view or not self._rounds:
            return "another view of who is there"
        if self._passed(peer, turn.position):
            self._jump(turn.position)
        begun, self._begun = self._begun, True  # whoever asks begins the cycle for both
        here = self._here()
        if here == (peer, turn):
            return None
        self._begun = begun
        return "at another place in the rounds"

    def answered(self, turn: Turn) -> None:
        """The round at `turn` is behind us: this node asked or was asked, and all went through."""
        if turn.view == self._view and turn.position == self.position:
            self._begun = True
            self._on()

    def _here(self) -> tuple[NodeId, Turn] | None:
        """Partner and place of the next round in which this node meets somebody; None where the
        cycle ends before."""
        while self._begun:
            met = self._rounds[self.position % len(self._rounds)].get(self._me_at)
            if met is not None:
                partner, step = met
                turn = Turn(view=self._view, position=self.position, step=step)
                return self._nodes[partner], turn
            self._on()
        return None

    def _passed(self, peer: NodeId, position: int) -> bool:
        """Whether a peer that is there has a round with us behind it that we have not."""
        for place in range(self.position, min(position, self.position + len(self._rounds))):
            met = self._rounds[place % len(self._rounds)].get(self._me_at)
            if met is not None and self._nodes[met[0]] == peer:
                return True
        return False

    def _on(self) -> None:
        self.position += 1
        if self.position % len(self._rounds) == 0:
            self._begun = False

    def _jump(self, position: int) -> None:
        if position > self.position + JUMP_LIMIT:
            return
        self.position = position
        self._begun = position % len(self._rounds) != 0


def plan_of(strategy: str, me: NodeId, rng: Random) -> Plan:
    """A new run's plan."""
    if strategy == EXACT:
        return ExactRounds(me)
    if strategy == CLIP:
        return ClippedPulls(rng)
    return RandomPairs(rng, cyclic=strategy == CYCLIC)
