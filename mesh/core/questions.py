"""Questions that one node asks another through the mesh, over the control connections there are.

A question's trip: Ask -> Question to the target where it is connected, else the target is dialled and
a few others are asked to pass it on -> the target performs it once (Perform, Performed) -> pages of
its Answer go back the way the Question came -> the next page is asked for -> Told.
Rules: 1. Every page is asked for: one page at most is on its way, so no ping waits behind an answer.
2. Who relays passes a question on at most HOPS_LIMIT times and never twice, and forgets it when the
answer came back, or after a while. 3. Everything that is held has a limit, in all and for each
neighbour; what is too much is dropped, and the asker tries another way, then gives up in time.
4. A relay could answer in another's place: an answer through others is as true as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from mesh.core import events as ev
from mesh.core.contacts import Contacts
from mesh.core.for_people import (
    HOPS_LIMIT,
    PAGES_LIMIT,
    PIECE_CHARACTERS,
    PIECES_LIMIT,
    Answer,
    Question,
)
from mesh.core.membership import Membership
from mesh.core.messages import NodeId, State

RELAYS = 3
"""Neighbours that are asked to pass a question on, at each step: as many as gossip tells."""

RETRY_S = 0.5
LAST_RETRY_S = 4.0
"""Before another way is tried, twice as long each time: a relay may be gone, a page dropped."""

DIAL_S = 0.3
"""In a large mesh the target can be dialled, so relays are asked only if that takes longer."""

PASSED_LIMIT = 256
PASSED_EACH = 64
PASSED_S = 30.0
"""Questions that this node has passed on and awaits the answers of; no answer takes longer."""

ASKED_LIMIT = 64
ANSWERING_LIMIT = 32
ANSWERING_EACH = 8
KEPT_S = 5.0
"""Answers that are worked on, or kept for the asker to fetch their pages; 40 MB at the very most."""

RATE_S = 64.0
BURST = 128.0
"""Questions of one neighbour that are looked at, those that it relays included: a page each."""


@dataclass(slots=True)
class _Asked:
    """A question of this node's own."""

    ask: ev.Ask
    deadline: float
    relay_at: float
    retry_at: float
    wait_s: float = RETRY_S
    page: int = 0
    attempt: int = 0
    pages: int = 1
    hops: int = 0
    pieces: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Answering:
    """A question that this node answers."""

    neighbour: NodeId
    until: float
    latest: Question
    pages: list[tuple[str, ...]] | None = None

    @property
    def whole(self) -> bool:
        """Its last page went out; it is kept only in case that was lost on its way."""
        return self.pages is not None and self.latest.page == len(self.pages) - 1


@dataclass(frozen=True, slots=True)
class _Passed:
    neighbour: NodeId
    until: float


_Key = tuple[NodeId, int, int, int]


class Questions:
    """Those of one node. `contacts` and `membership` belong to the protocol; it dials what is wanted."""

    def __init__(self, membership: Membership, contacts: Contacts, rng: Random) -> None:
        self._membership = membership
        self._contacts = contacts
        self._rng = rng
        self._me = membership.own.node
        self._asked: dict[int, _Asked] = {}
        self._passed: dict[_Key, _Passed] = {}
        self._answering: dict[tuple[NodeId, int], _Answering] = {}
        self._rates: dict[NodeId, tuple[float, float]] = {}
        """tokens left, and when that was"""

    # ------------------------------------------------------------------------------------ asking

    def ask(self, ask: ev.Ask, now: float) -> list[ev.Effect]:
        """The answer, or why there is none, is a Told."""
        if len(self._asked) >= ASKED_LIMIT:
            return [ev.Told(number=ask.number, failure="too many questions are open here")]
        delay_s = DIAL_S if self._membership.large else 0.0
        asked = _Asked(ask, now + ask.within_s, relay_at=now + delay_s, retry_at=now)
        self._asked[ask.number] = asked
        return self._try(asked, now)

    def connected(self, node: NodeId, now: float) -> list[ev.Effect]:
        """A connection was made: perhaps to a target."""
        effects: list[ev.Effect] = []
        for asked in list(self._asked.values()):
            if asked.ask.target == node:
                effects += self._try(asked, now)
        return effects

    def _try(self, asked: _Asked, now: float) -> list[ev.Effect]:
        target = asked.ask.target
        row = self._membership.others.get(target)
        if row is None or row.state >= State.DEAD:
            del self._asked[asked.ask.number]
            return [ev.Told(number=asked.ask.number, failure="gone")]
        asked.attempt += 1
        asked.retry_at = now + asked.wait_s
        asked.wait_s = min(LAST_RETRY_S, 2 * asked.wait_s)
        hops = 0
        ways = [target]
        if target not in self._contacts.connections:
            self._contacts.suggest(row.addresses, now, source="member", node=target, wanted=True)
            if now < asked.relay_at:
                asked.retry_at = asked.relay_at
                return []
            hops, ways = HOPS_LIMIT - 1, self._ways(None)
        question = Question(
            asker=self._me,
            number=asked.ask.number,
            page=asked.page,
            attempt=asked.attempt,
            hops=hops,
            target=target,
            op=asked.ask.op,
            arguments=asked.ask.arguments,
        )
        return self._send(ways, question)

    def _own_answer(self, answer: Answer, now: float) -> list[ev.Effect]:
        asked = self._asked.get(answer.number)
        if asked is None or answer.page != asked.page:
            return []
        asked.pieces += answer.pieces
        asked.page += 1
        asked.hops = answer.hops
        if asked.page < answer.pages:
            asked.wait_s = RETRY_S
            return self._try(asked, now)
        del self._asked[answer.number]
        text = "".join(asked.pieces)
        return [ev.Told(number=answer.number, text=text, hops=asked.hops)]

    # --------------------------------------------------------------------------------- answering

    def question(self, neighbour: NodeId, question: Question, now: float) -> list[ev.Effect]:
        """A neighbour asks, for itself or for another."""
        if question.asker == self._me or not self._may(neighbour, now):
            return []
        if question.target != self._me:
            return self._pass_on(neighbour, question, now)
        key = question.asker, question.number
        answering = self._answering.get(key)
        if answering is not None:
            known = answering.latest
            again = (question.page, question.attempt) == (known.page, known.attempt)
            if again:
                return []  # the same one, by another way
            answering.latest, answering.neighbour = question, neighbour
            return self._answer_page(answering, now)
        if question.page or not self._has_room(neighbour):
            return []
        self._answering[key] = _Answering(neighbour, now + PASSED_S, question)
        return [
            ev.Perform(
                asker=question.asker,
                number=question.number,
                op=question.op,
                arguments=question.arguments,
            )
        ]

    def _has_room(self, neighbour: NodeId) -> bool:
        """Whether one more may be answered for it; answers that went out whole make room."""
        mine = [key for key, one in self._answering.items() if one.neighbour == neighbour]
        if len(mine) >= ANSWERING_EACH:
            crowded = mine
        elif len(self._answering) >= ANSWERING_LIMIT:
            crowded = list(self._answering)
        else:
            return True
        whole = next((key for key in crowded if self._answering[key].whole), None)
        if whole is not None:
            del self._answering[whole]
        return whole is not None

    def performed(self, event: ev.Performed, now: float) -> list[ev.Effect]:
        """This node has its answer ready."""
        answering = self._answering.get((event.asker, event.number))
        if answering is None:
            return []
        size = PIECE_CHARACTERS
        pieces = [event.text[i : i + size] for i in range(0, len(event.text), size)] or [""]
        answering.pages = [
            tuple(pieces[i : i + PIECES_LIMIT]) for i in range(0, len(pieces), PIECES_LIMIT)
        ]
        assert len(answering.pages) <= PAGES_LIMIT
        return self._answer_page(answering, now)

    def _answer_page(self, answering: _Answering, now: float) -> list[ev.Effect]:
        question, pages = answering.latest, answering.pages
        if pages is None or question.page >= len(pages):
            return []
        answering.until = now + KEPT_S
        answer = Answer(
            asker=question.asker,
            number=question.number,
            page=question.page,
            attempt=question.attempt,
            pages=len(pages),
            hops=0,
            pieces=pages[question.page],
        )
        return self._send([answering.neighbour], answer)

    # ---------------------------------------------------------------------------------- relaying

    def _pass_on(self, neighbour: NodeId, question: Question, now: float) -> list[ev.Effect]:
        key = question.asker, question.number, question.page, question.attempt
        held = sum(passed.neighbour == neighbour for passed in self._passed.values())
        if key in self._passed or held >= PASSED_EACH or len(self._passed) >= PASSED_LIMIT:
            return []
        if question.target in self._contacts.connections:
            hops, ways = 0, [question.target]
        elif question.hops:
            hops, ways = min(question.hops, HOPS_LIMIT) - 1, self._ways(neighbour)
        else:
            return []
        self._passed[key] = _Passed(neighbour, now + PASSED_S)
        return self._send(ways, replace(question, hops=hops))

    def answer(self, answer: Answer, now: float) -> list[ev.Effect]:
        """A page came: ours, or to be handed back to whom the question came from."""
        if answer.asker == self._me:
            return self._own_answer(answer, now)
        key = answer.asker, answer.number, answer.page, answer.attempt
        passed = self._passed.pop(key, None)
        if passed is None:
            return []
        hops = min(HOPS_LIMIT, answer.hops + 1)
        return self._send([passed.neighbour], replace(answer, hops=hops))

    # -------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float:
        if not (self._asked or self._answering or self._passed):  # as nearly always
            return math.inf
        asked = (min(one.deadline, one.retry_at) for one in self._asked.values())
        answering = (one.until for one in self._answering.values())
        passed = (one.until for one in self._passed.values())
        return min(
            min(asked, default=math.inf),
            min(answering, default=math.inf),
            min(passed, default=math.inf),
        )

    def on_deadline(self, now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        if now < self.next_deadline():
            return effects
        for asked in list(self._asked.values()):
            if asked.deadline <= now:
                del self._asked[asked.ask.number]
                effects.append(ev.Told(number=asked.ask.number, failure="timeout"))
            elif asked.retry_at <= now:
                effects += self._try(asked, now)
        self._passed = {key: one for key, one in self._passed.items() if one.until > now}
        self._answering = {key: one for key, one in self._answering.items() if one.until > now}
        return effects

    def lost(self, node: NodeId) -> None:
        """A neighbour is gone: its answers have no way back, and its rate begins anew."""
        self._rates.pop(node, None)
        self._passed = {k: one for k, one in self._passed.items() if one.neighbour != node}

    # ----------------------------------------------------------------------------------- helpers

    def _ways(self, except_for: NodeId | None) -> list[NodeId]:
        able = [node for node in self._contacts.connections if node != except_for]
        return self._rng.sample(able, min(RELAYS, len(able)))

    def _may(self, neighbour: NodeId, now: float) -> bool:
        tokens, at = self._rates.get(neighbour, (BURST, now))
        tokens = min(BURST, tokens + RATE_S * (now - at))
        self._rates[neighbour] = max(0.0, tokens - 1), now
        return tokens >= 1

    def _send(self, nodes: Sequence[NodeId], message: Question | Answer) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for node in nodes:
            connection = self._contacts.connections.get(node)
            if connection is not None:
                effects.append(ev.Send(connection=connection.number, message=message))
        return effects
