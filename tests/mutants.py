"""Bugs of one line, each planted by replacing one function: what the simulator has to catch."""

import contextlib
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

import mesh.core.membership
import mesh.responder
from mesh.core.detector import Detector
from mesh.core.exchange import Initiation, Responses
from mesh.core.membership import Membership
from mesh.core.peers import SEARCH_S, Peers
from mesh.memory import Memory
from mesh.replica import Replica, square_norm
from mesh.runs import Run


@dataclass(frozen=True, slots=True)
class Mutant:
    """`function` takes the place of `owner.name`; a violation that says one of `seen_as` caught it."""

    owner: Any
    name: str
    function: Any
    seen_as: tuple[str, ...]
    first_seed: int = 0
    """a seed that is known to catch it: the test begins there"""

    def planted(self) -> contextlib.AbstractContextManager:
        return patch.object(self.owner, self.name, self.function)


def forgets_what_it_answered(self, initiator, exchange, index, received):
    record = self._record(initiator, exchange)
    while record.kept and record.kept[0][0] < received:
        self._release(record.kept.popleft()[1])
    record.applied = index


def applies_one_again_after_resume(self):
    self.applied = max(0, self.applied - 1)
    self.sent = self.applied


def takes_the_wrong_sign(self, index, body, share, codec, check=None):
    w = self.weights[self.slice_of(index)]
    delta = codec.decode(body, self._decoded[: len(w)])
    distance = square_norm(delta)
    self._move(w, delta, share, spare=delta)
    return distance


def knows_no_window(self):
    return None if self.sent == self.end else self.sent


def takes_what_is_not_finite(self, index, body, share, reply, codec, room=None):
    w = self.weights[self.slice_of(index)]
    delta = codec.decode(body, self._decoded[: len(w)]) - w
    codec.encode(delta, reply)
    delta = codec.decode(reply, np.empty_like(w)).copy()
    self._move(w, delta, share, spare=delta)
    return float(delta @ delta)


async def merges_twice(self, *, step, loss, samples):
    self.ours = True
    for index in 2 * list(range(self.replica.fragments)):
        self.hand_over.merge(index)


def prefers_alive(new, old):
    return (new.incarnation, -new.state) > (old.incarnation, -old.state)


def starts_where_it_started_before(self):
    return 1


def looks_for_nobody(self, now):
    self._search_at = now + SEARCH_S


def waits_for_ever(self, node, suspicion, now):
    suspicion.since = now
    return []


def begins_anew(self, initiator, exchange, start, codec, first=0, end=None, **terms):
    """A resumed exchange is a new one to its responder."""
    self.forget(initiator)
    return self_open(self, initiator, exchange, first, codec, first, end, **terms)


self_open = Responses.open

MUTANTS = {
    "a reply is applied twice": Mutant(
        Responses, "kept", forgets_what_it_answered, ("applied fragment",), 2
    ),
    "a delta is applied twice after a resume": Mutant(
        Initiation, "connection_lost", applies_one_again_after_resume, ("twice", "in doubt"), 2
    ),
    "the initiator takes the wrong sign": Mutant(
        Replica, "apply", takes_the_wrong_sign, ("mass", "hull")
    ),
    "the window is not bounded": Mutant(
        Initiation, "next_to_send", knows_no_window, ("fragments in doubt",)
    ),
    "requests that cross take the full step": Mutant(
        mesh.responder, "answer_beside", lambda *_: 1.0, ("swap", "full step")
    ),
    "what is not finite is taken": Mutant(
        Replica, "answer", takes_what_is_not_finite, ("not finite",), 8
    ),
    "a post is merged twice": Mutant(Run, "post", merges_twice, ("mass",)),
    "a resumed exchange begins anew": Mutant(
        Responses, "open", begins_anew, ("applied fragment",), 7
    ),
    "nobody refutes": Mutant(Membership, "_refute", lambda self, rumour: False, ("let it stand",)),
    "alive wins at equal incarnation": Mutant(
        mesh.core.membership, "supersedes", prefers_alive, ("knew", "not healed"), 17
    ),
    "incarnations are not kept": Mutant(
        Memory, "reserve_incarnations", starts_where_it_started_before, ("starts at incarnation",)
    ),
    "the dead are never dialled again": Mutant(
        Peers, "_search", looks_for_nobody, ("not healed",), 25
    ),
    "silence is never a death": Mutant(Detector, "_judge", waits_for_ever, ("not healed",), 21),
}
