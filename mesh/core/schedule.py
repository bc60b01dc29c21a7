"""With whom a run averages, and when; and how it gets its first weights.

Rules: 1. One exchange at a time is initiated; any number is answered. 2. Every hand-over from the
training makes one due; a run at rest goes on while replicas still differ, at a tenth of its time.
3. Peers are random (each exchange contracts the variance by 1 - 1/(n-1); Boyd et al. 2006).
4. First weights: a replica that never exchanged takes those of one that has; of two that never did,
the one whose training has not begun, or came less far, takes those of the other, else the lowest node
id gives. Two that both exchanged (groups that trained apart) simply average.
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from random import Random

from mesh.core.events import Beginning, ExchangeEnded, Outcome
from mesh.core.messages import NodeId, RunInfo, Turn
from mesh.core.strategies import PATIENCE_S, ExactRounds, Start, plan_of

SETTLE_S = 0.3
"""How long the lowest node id looks for others before it gives its initial weights to all: mDNS
shows a running node in 0.1 s, and rows pass in milliseconds."""

FIRST_GRACE_S = 5.0
"""How much longer than sync_timeout a newcomer waits for the one that should give first weights."""

REST_S = 1.0
REST_DUTY = 10.0
"""A run that is not posting exchanges once a second, or less: at most a tenth of the time."""

AGREED = 1e-10
"""Square distance over square norm under which replicas agree as far as float32 can tell."""

COOL_OFF_S = 0.5
SETBACKS_LIMIT = 6
"""A peer that refused or broke off is left alone this long, twice as long each time in a row, up to
32 s, and at least as long as it held the run for nothing; others are asked meanwhile."""

STRANGERS_DUTY = 10.0
"""In a large mesh a run averages with members that this node is not connected to, and a row that was made
up costs many seconds of dialling: where one failed, those that are known have ten times as long to
themselves."""

NOT_YET_S = 0.02
NOT_YET_LIMIT = 5
"""A peer that is at another place in its rounds is asked again so soon, then twice as late each time,
up to 0.6 s: a slow training must not be asked fifty times a second."""
DONORS_LIMIT = 3
"""Donors that may bring a newcomer nothing of its first weights before it asks no others."""

PULL_ATTEMPTS = 5
"""Pulls that may bring a newcomer nothing before it starts with its own weights after all; it takes the
mesh's as soon as it can then. More than donors: a single one on a bad line is asked again."""


class Relation(Enum):
    """What an exchange between two replicas of one run and schema has to be, seen from one."""

    AVERAGE = 1
    TAKE = 2
    GIVE = 3


def relation(mine: RunInfo, me: NodeId, theirs: RunInfo, they: NodeId) -> Relation:
    """Rule 4 above; relation(a, b) is TAKE exactly where relation(b, a) is GIVE."""
    if mine.exchanged and theirs.exchanged:
        return Relation.AVERAGE
    my_rank, their_rank = (_rank(info) for info in (mine, theirs))
    if my_rank == their_rank:
        return Relation.GIVE if me < they else Relation.TAKE
    return Relation.GIVE if my_rank > their_rank else Relation.TAKE


def _rank(info: RunInfo) -> tuple[bool, bool, int]:
    return info.exchanged, info.started, info.progress


@dataclass(frozen=True, slots=True, kw_only=True)
class GoAhead:
    """The training may start with the weights that the replica holds."""

    how: Beginning


Partner = tuple[NodeId, RunInfo]


class Schedule:
    """One run's plan. decide() says what to do now, next_deadline() when to ask again."""

    def __init__(
        self,
        *,
        info: RunInfo,
        me: NodeId,
        now: float,
        sync_timeout_s: float,
        rng: Random,
        posts: int = 0,
        connected: Container[NodeId] = (),
    ) -> None:
        """`connected`: peers whose control connection shows that they are there; read only."""
        self._me = me
        self._rng = rng
        self._alone_at = now + sync_timeout_s
        self._settled_at = now + min(SETTLE_S, sync_timeout_s)
        self._seen: frozenset[NodeId] = frozenset()
        self._busy = False
        self._due = False
        self._rest_at = math.inf
        self._waiting = False
        self._cool: dict[NodeId, float] = {}
        self._setbacks: dict[NodeId, int] = {}
        self._connected = connected
        self._met: set[NodeId] = set()
        """with whom an exchange went through"""
        self._strangers_at = -math.inf
        """when others are asked again; see STRANGERS_DUTY"""
        self._failed_pulls = 0
        self._asked: set[NodeId] = set()
        """for first weights; whoever brought something, and was lost, is taken off again"""
        self._posts = posts
        self._not_yet = 0
        self._plan = plan_of(info.strategy, me, rng)
        self._deadline = now
        self.info = self._with_progress(info)
        self.unfinished: set[NodeId] = set()

    @property
    def busy(self) -> bool:
        return self._busy

    def posted(self, now: float, *, waits: bool) -> None:
        """The training handed over progress; `waits`: it wants the result of an exchange."""
        self._due = True
        self._waiting = waits
        self._deadline = now
        self._posts += 1
        self.info = self._with_progress(self.info)

    def _with_progress(self, info: RunInfo) -> RunInfo:
        """Only a replica that met nobody says how far it came: rule 4."""
        return info if info.exchanged else replace(info, progress=self._posts.bit_length())

    def poke(self, now: float) -> None:
        """Something about the peers changed: decide again."""
        self._deadline = now

    def take_offer(self) -> bool:
        """Whether the training's wait is over: its exchange ended, or there is nobody to ask."""
        if not self._waiting or self._busy or self._due or self._plan.midway:
            return False
        self._waiting = False
        return True

    def ended(self, event: ExchangeEnded, now: float) -> None:
        """The exchange that decide() started is over."""
        self._busy = False
        self.unfinished.discard(event.peer)
        self._deadline = now
        if event.clip or not event.pull:
            completed = event.outcome is Outcome.COMPLETED
            self._plan.ended(completed=completed, ahead=event.ahead, turn=event.turn)
        if event.ahead is not None:
            self._deadline = now + NOT_YET_S * 2**self._not_yet
            self._not_yet = min(self._not_yet + 1, NOT_YET_LIMIT)
            return
        self._not_yet = 0
        rest_s = max(REST_S, REST_DUTY * event.duration_s)
        self._rest_at = now + rest_s
        if event.outcome is Outcome.COMPLETED:
            self._setbacks.pop(event.peer, None)
            self._met.add(event.peer)
            agreed = event.square_distance <= AGREED * event.square_norm
            if agreed and self._plan.whole and (event.clip or not event.pull):
                self._rest_at = now + REST_DUTY * rest_s
        else:
            setbacks = self._setbacks.get(event.peer, 0)
            self._setbacks[event.peer] = min(setbacks + 1, SETBACKS_LIMIT)
            held_s = 0.0 if event.pull and event.brought else event.duration_s
            self._cool[event.peer] = now + max(COOL_OFF_S * 2**setbacks, held_s)
            if not self._knows(event.peer):
                self._strangers_at = now + STRANGERS_DUTY * event.duration_s
            if event.pull and event.brought:
                self._asked.discard(event.peer)  # the next goes on from there: it was no failure
            else:
                self._failed_pulls += event.pull
            if event.outcome is Outcome.INTERRUPTED:
                self.unfinished.add(event.peer)

    def answered(self, turn: Turn, now: float) -> None:
        """A partner's request at this place in the rounds was answered in full."""
        if isinstance(self._plan, ExactRounds):
            self._plan.answered(turn)
            self._deadline = now
            if not self._plan.midway:
                self._rest_at = now + REST_S

    def out_of_turn(self, peer: NodeId, turn: Turn | None) -> tuple[str, int] | None:
        """Why this request cannot be answered now, and this node's place in the rounds."""
        if not isinstance(self._plan, ExactRounds):
            return None
        reason = self._plan.objection(peer, turn)
        return None if reason is None else (reason, self._plan.position)

    def next_deadline(self) -> float:
        return self._deadline

    def decide(self, now: float, partners: Sequence[Partner]) -> Start | GoAhead | None:
        """What to do now. `partners`: connected, living peers of this run with this schema."""
        self._deadline = math.inf
        self._cool = {node: until for node, until in self._cool.items() if until > now}
        seen = frozenset(node for node, _ in partners)
        if not seen <= self._seen:
            self._settled_at = max(self._settled_at, now + min(SETTLE_S, self._alone_at - now))
        self._seen = seen
        self._met &= seen
        if self._busy:
            return None
        if self._cool:
            self._deadline = min(self._cool.values())
        if self.info.started:
            decision: Start | GoAhead | None = self._exchange(now, partners)
        else:
            decision = self._first(now, partners)
        if isinstance(decision, Start):
            self._busy = True
            self._due = False
        return decision

    def _first(self, now: float, partners: Sequence[Partner]) -> Start | GoAhead | None:
        """A run that has not begun looks for weights: rule 4."""
        donors = [p for p in partners if p[1].started]
        able = [p for p in donors if len(self._asked) < DONORS_LIMIT or p[0] in self._asked]
        if able and self._failed_pulls < PULL_ATTEMPTS:
            asked = [p for p in able if p[0] not in self._cool]
            best = max((_rank(info) for _, info in asked), default=None)
            best_donors = [p for p in asked if _rank(p[1]) == best]
            fresh = [p for p in best_donors if p[0] not in self._asked]
            return self._pull(fresh or best_donors) if asked else None
        if not partners:
            return self._go_at(self._alone_at, now, Beginning.ALONE)
        if not donors and self._me < min(node for node, _ in partners):
            return self._go_at(self._settled_at, now, Beginning.FIRST)
        return self._go_at(self._alone_at + FIRST_GRACE_S, now, Beginning.ALONE)

    def _pull(self, donors: Sequence[Partner]) -> Start:
        node, info = self._rng.choice([d for d in donors if self._knows(d[0])] or donors)
        if not self.info.started:
            self._asked.add(node)
        return Start(peer=node, pull=True, resumes=info.exchanged)

    def _knows(self, node: NodeId) -> bool:
        """Whether this node is there for certain, and not just a row that somebody made up."""
        return node in self._connected or node in self._met

    def _go_at(self, at: float, now: float, how: Beginning) -> GoAhead | None:
        if now >= at:
            return GoAhead(how=how)
        self._deadline = min(self._deadline, at)
        return None

    def _exchange(self, now: float, partners: Sequence[Partner]) -> Start | None:
        relations = [
            (partner, relation(self.info, self._me, partner[1], partner[0]))
            for partner in partners
            if partner[1].started
        ]
        takes = [
            partner
            for partner, what in relations
            if what is Relation.TAKE and partner[0] not in self._cool
        ]
        if takes:
            return self._pull(takes)
        peers = [node for (node, _), what in relations if what is Relation.AVERAGE]
        self._plan.see(peers)
        peers = [node for node in peers if node not in self._cool]
        if now < self._strangers_at and not isinstance(self._plan, ExactRounds):
            peers = [node for node in peers if self._knows(node)] or peers
        halves = [node for node in peers if node in self.unfinished]
        if halves:
            return Start(peer=halves[0], pull=False)
        if not peers:
            self._due = False
            return None
        if self._due or self._plan.midway or now >= self._rest_at:
            start = self._plan.choose(peers, rest=not self._due, now=now)
            self._due = False
            if start is None and not self._plan.midway:
                self._rest_at = now + REST_S
            if start is None and self._plan.midway:
                self._deadline = min(self._deadline, now + PATIENCE_S)
            if start is not None or self._plan.midway:
                return start
        if self._rest_at == math.inf:
            self._rest_at = now + REST_S
        self._deadline = min(self._deadline, self._rest_at)
        return None
