"""The failure detector: suspicion and local health alone, then several cores joined back to back."""

import heapq
from dataclasses import replace
from itertools import count, pairwise
from random import Random

import pytest

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.detector import (
    ERRANDS_LIMIT,
    GREETED_S,
    HELPER_TIMEOUT_S,
    HELPERS,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    Detector,
)
from mesh.core.findings import Gone, Silent, Tell
from mesh.core.health import LAG_S, WORST, Health
from mesh.core.membership import (
    INCARNATION_BLOCK,
    INCARNATION_LIMIT,
    KEEP_ENDED_S,
    TELL_ENDED_S,
    Membership,
    first_row,
)
from mesh.core.messages import (
    PROTOCOL,
    Ack,
    Hello,
    IdentityTaken,
    Member,
    Members,
    NodeId,
    Ping,
    PingReport,
    PingRequest,
    Purpose,
    State,
    Verdict,
    Versions,
    Wanted,
)
from mesh.core.protocol import MeshProtocol
from mesh.core.suspicion import ALONE_S, CONFIRMATIONS, CONFIRMED_S, FEW_S, suspicion_of
from mesh.core.twins import CHECK_S, LOOK_S

ME, A, B, C = (NodeId(letter * 16) for letter in "mabc")


def row(node, incarnation=1, state=State.ALIVE, accusers=()):
    return Member(
        node=node,
        name=node[:4],
        incarnation=incarnation,
        state=state,
        addresses=(Address("10.0.0.1", 1000 + ord(node[0])),),
        runs=(),
        accusers=accusers,
    )


def hello(node, instance=1, age_ms=0, incarnation=1):
    return Hello(
        protocol=PROTOCOL,
        name=node[:4],
        purpose=Purpose.CONTROL,
        member=row(node, incarnation),
        instance=instance,
        age_ms=age_ms,
    )


# ------------------------------------------------------------------------------------- suspicion


@pytest.mark.parametrize(
    ("living", "alone_s", "confirmed_s"),
    [(5, 6.0, 2.8), (32, 9.03, 2.8), (100, 12.0, 3.721), (1000, 18.0, 5.581)],
)
def test_a_suspicion_is_longer_in_a_large_mesh_where_a_refutation_has_hops_to_travel(
    living, alone_s, confirmed_s
):
    accusers = tuple(NodeId(f"accuser{k}") for k in range(CONFIRMATIONS + 1))
    alone = row(A, state=State.SUSPECT, accusers=accusers[:1])
    assert suspicion_of(alone, living, 7.0).deadline == pytest.approx(7.0 + alone_s, abs=1e-3)
    suspect = row(A, state=State.SUSPECT, accusers=accusers)
    assert suspicion_of(suspect, living, 7.0).deadline == pytest.approx(7 + confirmed_s, abs=1e-3)


def test_a_suspicion_shrinks_with_every_confirmation():
    suspicion = suspicion_of(row(A, state=State.SUSPECT, accusers=(B,)), 8, 0.0)
    lengths = []
    for accusers in range(1, 7):
        suspicion.confirmed(accusers, now=0.0)
        lengths.append(suspicion.deadline)
    halfway = (ALONE_S + CONFIRMED_S) / 2  # log 2 of log 4
    assert lengths[0] == ALONE_S
    assert lengths[1] == pytest.approx(halfway)
    assert halfway > lengths[2] > CONFIRMED_S
    assert lengths[3:] == pytest.approx([CONFIRMED_S] * 3)


def test_who_refuted_a_suspicion_within_the_last_minute_is_waited_for_twice_as_long():
    detector = Detector(Random(1))

    def lasts_s(incarnation, at):
        detector.suspected(row(A, incarnation, State.SUSPECT, (B,)), 5, at, 0, since=at)
        return detector.next_deadline() - at

    lengths = []
    for incarnation, at in ((1, 0.0), (2, 59.0), (3, 120.0)):
        lengths.append(lasts_s(incarnation, at))
        detector.cleared(A, incarnation + 1)
    assert lengths == pytest.approx([ALONE_S, 2 * ALONE_S, ALONE_S])
    assert lasts_s(4, 121.0) == pytest.approx(2 * ALONE_S)
    detector.forget(A)
    assert lasts_s(5, 122.0) == pytest.approx(ALONE_S), "of the dead nothing is kept"
    detector.cleared(A, 5 + INCARNATION_BLOCK)
    assert lasts_s(6 + INCARNATION_BLOCK, 123.0) == pytest.approx(ALONE_S), "it began again"


@pytest.mark.parametrize("living", [2, 3, 4])
def test_where_few_can_confirm_all_of_them_are_enough_but_are_waited_for_longer(living):
    accusers = tuple(NodeId(f"accuser{k}") for k in range(living - 1))
    suspect = row(A, state=State.SUSPECT, accusers=accusers)
    assert suspicion_of(suspect, living, 0.0).deadline == pytest.approx(FEW_S)
    assert CONFIRMED_S < FEW_S < ALONE_S


def test_an_answer_owed_for_a_greeting_may_take_longer_as_its_giver_may_greet_many():
    detector = watching(B, C)
    detector.connected(A, 0.0, 0, dialled=True)
    found = run_until(detector, 10.0, answering=(B, C))
    accused_at = next(
        at for at, finding in found if isinstance(finding, Silent) and finding.node == A
    )
    assert accused_at == pytest.approx(GREETED_S + PROBE_INTERVAL_S)


def test_who_was_greeted_is_waited_for_no_longer_once_somebody_accuses_it():
    detector = watching(B, C)
    detector.connected(A, 0.0, 0, dialled=True)
    run_until(detector, 0.8, answering=(B, C))
    accused = row(A, state=State.SUSPECT, accusers=(B,))
    detector.suspected(accused, 4, 0.8, 0, since=0.5)
    found = run_until(detector, 3.0, now=0.8, answering=(B, C))
    confirmed_at = next(at for at, f in found if isinstance(f, Silent) and f.node == A)
    assert confirmed_at == pytest.approx(0.8 + PROBE_INTERVAL_S)


# ---------------------------------------------------------------------------------------- health


def test_the_score_stays_within_its_bounds():
    health = Health()
    health.change(-5)
    assert (health.score, health.multiplier) == (0, 1)
    health.change(+50)
    assert health.multiplier == WORST


def watching(*nodes):
    detector = Detector(Random(1))
    for node in nodes:
        detector.connected(node, 0.0, 0, dialled=False)
    return detector


def run_until(detector, until_s, now=0.0, answering=()):
    """(time, finding) of everything found; nodes in `answering` acknowledge at once."""
    found = []
    while detector.next_deadline() <= until_s:
        now = max(now, detector.next_deadline())
        for finding in detector.on_deadline(now, 0):
            found.append((now, finding))
            if isinstance(finding, Tell) and finding.node in answering:
                detector.heard(finding.node, now)
                if isinstance(finding.message, Ping):
                    detector.acknowledged(finding.node, finding.message.sequence, now)
                elif isinstance(finding.message, PingRequest):
                    detector.reported(finding.node, finding.message.sequence, Verdict.SILENT, now)
    return found


def test_a_process_that_was_stopped_itself_accuses_nobody_before_it_has_listened():
    detector = watching(A, B)
    [(asked_at, _)] = run_until(detector, 1.0, answering=(A, B))[-1:]
    stopped_until = asked_at + 60.0
    detector.on_deadline(stopped_until, 0)
    assert detector.health.score == 1
    found = run_until(detector, stopped_until + 0.4, stopped_until)
    assert not any(isinstance(finding, Silent | Gone) for _, finding in found)


def test_a_loop_that_is_a_little_late_forgives_nothing():
    health = Health()
    assert health.forgiven_s(LAG_S) == 0.0
    assert health.forgiven_s(LAG_S + 0.01) == LAG_S + 0.01
    assert health.score == 1


def test_a_node_that_living_helpers_do_not_answer_trusts_its_own_ears_less_and_waits_longer():
    detector = watching(A, B, C)
    probes, now = [], 0.0
    while now < 120.0:
        for node in (B, C):
            detector.heard(node, now)
        now = min(now + 0.1, detector.next_deadline())
        probes += [now for f in detector.on_deadline(now, 0) if type(f) is Tell and f.node == A]
    assert detector.health.score == WORST - 1
    assert max(b - a for a, b in pairwise(probes)) >= WORST * PROBE_INTERVAL_S / 2


def test_a_node_that_hears_nobody_at_all_accuses_each_of_them_as_fast_as_ever():
    nodes = [NodeId(f"{k:02}" * 8) for k in range(20)]
    detector = watching(*nodes)
    accused = {f.node for _, f in run_until(detector, 7.0) if isinstance(f, Silent)}
    assert accused == set(nodes), "helpers that are silent are probed at once"
    assert detector.health.score == 0


def test_helpers_that_report_silence_vouch_for_the_ears_of_who_asked():
    detector = watching(A, B, C)
    found = run_until(detector, 10.0, answering=(B, C))
    assert any(isinstance(finding, Silent) and finding.node == A for _, finding in found)
    assert detector.health.score == 0


# ---------------------------------------------------------------------------------------- probes


def test_one_probe_a_second_and_everybody_is_probed_in_every_round():
    detector = watching(A, B, C)
    pinged = [
        (now, finding.node)
        for now, finding in run_until(detector, 30.0, answering=(A, B, C))
        if isinstance(finding.message, Ping)
    ]
    assert 29 <= len(pinged) <= 31
    gaps = [b - a for (a, _), (b, _) in pairwise(pinged)]
    assert gaps == pytest.approx([PROBE_INTERVAL_S] * len(gaps))
    for first in range(len(pinged) - 4):
        assert {node for _, node in pinged[first : first + 5]} == {A, B, C}


def test_who_was_heard_lately_is_passed_over_for_one_that_is_silent():
    others = [NodeId(f"{k:02}" * 8) for k in range(16)]
    detector = watching(*others)
    run_until(detector, 20.0, answering=others)  # everybody is measured
    now, pinged = 20.0, []
    while now < 26.0:
        for node in others[1:]:
            detector.heard(node, now)
        now = detector.next_deadline()
        for finding in detector.on_deadline(now, 0):
            pinged.append(finding.node)
            detector.acknowledged(finding.node, finding.message.sequence, now)
            if finding.node != others[0]:
                detector.heard(finding.node, now)
    assert others[0] in pinged[:3]


def test_helpers_are_asked_after_half_a_second_and_silence_is_an_accusation_after_one():
    nodes = [NodeId(f"{k}" * 16) for k in range(6)]
    detector = watching(*nodes)
    found = run_until(detector, 1.9)
    [(sent, ping)] = [(t, f) for t, f in found if isinstance(f, Tell) and type(f.message) is Ping][
        :1
    ]
    requests = [
        (t, f)
        for t, f in found
        if isinstance(f, Tell)
        and isinstance(f.message, PingRequest)
        and f.message.sequence == ping.message.sequence
    ]
    assert [t - sent for t, _ in requests] == pytest.approx([PROBE_TIMEOUT_S] * HELPERS)
    assert len({f.node for _, f in requests}) == HELPERS
    assert all(f.node != ping.node and f.message.node == ping.node for _, f in requests)
    silent = [(t, f) for t, f in found if isinstance(f, Silent)]
    at, finding = silent[0]
    assert (at, finding.node) == (pytest.approx(sent + PROBE_INTERVAL_S), ping.node)
    assert finding.since == pytest.approx(sent + PROBE_TIMEOUT_S), "suspect since it owed an answer"


def test_who_can_be_asked_by_others_only_is_given_no_less_time():
    detector = watching(A, B)
    detector.disconnected(B)
    found = run_until(detector, 4.0, answering=(A,))
    asked = next(t for t, f in found if isinstance(f, Tell) and type(f.message) is PingRequest)
    silent = next(f for _, f in found if isinstance(f, Silent))
    assert silent.node == B
    assert silent.since == pytest.approx(asked + PROBE_TIMEOUT_S)


def test_a_helper_that_reached_it_clears_it():
    detector = watching(A, B)
    found = []
    now = 0.0
    while not any(isinstance(f.message, PingRequest) for f in found):
        now = detector.next_deadline()
        found = detector.on_deadline(now, 0)
    [request] = [f.message for f in found if isinstance(f.message, PingRequest)]
    helper = next(n for n in (A, B) if n != request.node)
    stranger = detector.reported(C, request.sequence, Verdict.REFUSED, now)
    assert stranger == [], "nobody asked it"
    assert detector.reported(helper, request.sequence, Verdict.REACHED, now) == []
    found = run_until(detector, now + 0.6, now)
    assert not any(isinstance(f, Silent) and f.node == request.node for _, f in found)


def test_a_refused_connection_is_a_death_only_if_another_member_is_refused_as_well():
    for verdict in (Verdict.REFUSED, Verdict.REACHED, Verdict.SILENT):
        detector = watching(A, B)
        detector.disconnected(A)
        [request] = detector.refused(A, 0.0, "connection refused")
        assert request.node == B
        assert request.message.node == A
        found = detector.reported(B, request.message.sequence, verdict, 0.1)
        later = [f for _, f in run_until(detector, 1.05, 0.1, answering=(B,))]
        if verdict is Verdict.REFUSED:
            assert isinstance(found[0], Gone)
        else:
            assert found == []
            assert (any(isinstance(f, Silent) and f.node == A for f in later)) is (
                verdict is Verdict.SILENT
            )


def test_where_there_is_no_other_member_a_refused_connection_is_a_death_at_once():
    detector = watching(A)
    detector.disconnected(A)
    assert detector.refused(A, 1.0, "refused") == [Gone(node=A, reason="refused")]


def test_a_helper_probes_in_anothers_place_and_answers_silence_too():
    detector = watching(A, B)
    [ping] = detector.requested(B, 77, A, 0.0, 5)
    assert ping.node == A
    assert detector.acknowledged(A, ping.message.sequence, 0.1) == [
        Tell(node=B, message=PingReport(sequence=77, verdict=Verdict.REACHED))
    ]
    detector.requested(B, 78, A, 0.2, 5)
    found = [f for _, f in run_until(detector, 0.2 + HELPER_TIMEOUT_S + 0.01, 0.2)]
    assert Tell(node=B, message=PingReport(sequence=78, verdict=Verdict.SILENT)) in found
    detector.disconnected(A)
    detector.refused(A, 1.0, "refused")
    assert detector.requested(B, 79, A, 1.1, 5) == [
        Tell(node=B, message=PingReport(sequence=79, verdict=Verdict.REFUSED))
    ]


def test_a_member_cannot_make_another_run_errands_without_end():
    detector = watching(A, B)
    for sequence in range(3 * ERRANDS_LIMIT):
        detector.requested(B, sequence, A, 0.0, 0)
    assert len(detector._probes) <= ERRANDS_LIMIT


# --------------------------------------------------------------------------------------- the table


def test_accusers_are_gathered_in_any_order_and_bounded():
    accusers = [NodeId(f"accuser{k}") for k in range(6)]
    forwards, backwards = Membership(row(ME)), Membership(row(ME))
    for order, table in ((accusers, forwards), (accusers[::-1], backwards)):
        for accuser in order:
            table.merge([row(A, state=State.SUSPECT, accusers=(accuser,))])
    assert forwards.others == backwards.others
    assert forwards.others[A].accusers == tuple(accusers[:4])
    assert forwards.fingerprint ^ forwards.versions(0)[0] == (
        backwards.fingerprint ^ backwards.versions(0)[0]
    )


def test_two_owners_rows_of_one_incarnation_become_one_row_everywhere_until_the_owner_hears():
    """A disk that lost its last write: the node began again at a number it had used."""
    before, after = row(A, 5), first_row(A, "renamed", 5, ())
    one, other = Membership(row(ME)), Membership(row(ME))
    one.merge([before, after])
    other.merge([after, before])
    assert one.others == other.others
    owner = Membership(after)
    assert owner.merge([before]) == [owner.own]
    assert owner.own.incarnation == 6


def test_the_dead_are_told_for_ten_minutes_and_kept_for_an_hour():
    table = Membership(row(ME))
    table.merge([row(A), row(B)], 0.0)
    alive = table.fingerprint
    table.declare(A, State.DEAD, 10.0)
    assert table.living == 2
    assert table.fingerprint != alive
    assert len(table.versions(10.0 + TELL_ENDED_S)) == 3
    assert len(table.versions(10.1 + TELL_ENDED_S)) == 2
    assert table.expire(10.0 + KEEP_ENDED_S) == []
    assert table.expire(10.1 + KEEP_ENDED_S) == [A]
    assert set(table.others) == {B}


def test_two_tables_agree_after_versions_were_compared_once():
    one, other = Membership(row(ME)), Membership(row(A))
    one.merge([row(B, 7), row(C, 2), row(A)])
    other.merge([row(B, 3), row(NodeId("d" * 16), 1, State.DEAD), row(ME)])
    assert one.fingerprint != other.fingerprint
    lacked, wanted = other.compare(one.versions(0.0), 0.0)
    one.merge(lacked)
    other.merge(one.rows_of(wanted, 0.0))
    assert one.fingerprint == other.fingerprint
    assert {m.node for m in one.others.values()} | {ME} == {
        m.node for m in other.others.values()
    } | {A}


# ----------------------------------------------------------------------- several cores, back to back


class Wires:
    """Cores joined back to back: messages take a millisecond, dials succeed unless told otherwise."""

    def __init__(self, *nodes):
        self.cores = {
            node: MeshProtocol(first_row(node, node[:4], 1, row(node).addresses), Random(k))
            for k, node in enumerate(nodes)
        }
        self.now = 0.0
        self.numbers = count(1)
        self.ends = {}
        self.silent = set()
        self.refusing = set()
        self.queue = []
        self.order = count()
        self.sent = []
        self.notes = []
        self.stopped = {}

    def connect(self, a, b, instance=None):
        here, there = next(self.numbers), next(self.numbers)
        self.ends[a, here], self.ends[b, there] = (b, there), (a, here)
        for node, other, number, contact in ((a, b, here, b[:16]), (b, a, there, None)):
            self.do(
                node,
                ev.PeerConnected(
                    node=other,
                    connection=number,
                    hello=hello(other, instance=instance or ord(other[0])),
                    contact=contact,
                ),
            )
        return here, there

    def cut(self, a, b):
        for (node, number), (other, far) in list(self.ends.items()):
            if (node, other) == (a, b):
                del self.ends[node, number], self.ends[other, far]
                for end, peer, which in ((node, other, number), (other, node, far)):
                    self.do(end, ev.PeerLost(node=peer, connection=which, reason="end of file"))

    def do(self, node, event):
        if node not in self.silent:
            self.perform(node, self.cores[node].handle(event, self.now))

    def perform(self, node, effects):
        for effect in effects:
            if isinstance(effect, ev.Send):
                self.sent.append((self.now, node, effect.message))
                if (node, effect.connection) in self.ends:
                    peer, number = self.ends[node, effect.connection]
                    event = ev.Received(node=node, connection=number, message=effect.message)
                    self.later(0.001, peer, event)
            elif isinstance(effect, ev.Dial):
                refused = effect.contact in {other[:16] for other in self.refusing}
                failed = ev.DialFailed(
                    contact=effect.contact, refused=refused, reason="refused" if refused else "lost"
                )
                self.later(0.001, node, failed)
            elif isinstance(effect, ev.Note):
                self.notes.append((self.now, node, effect.text))
            elif isinstance(effect, ev.Stop):
                self.stopped[node] = effect.reason

    def later(self, delay_s, node, event):
        heapq.heappush(self.queue, (self.now + delay_s, next(self.order), node, event))

    def run(self, until_s):
        while True:
            deadlines = [
                (c.next_deadline(), n) for n, c in self.cores.items() if n not in self.silent
            ]
            at, node = min(deadlines)
            if self.queue and self.queue[0][0] <= at:
                at = self.queue[0][0]
            if at > until_s:
                self.now = until_s
                return
            self.now = max(self.now, at)
            if self.queue and self.queue[0][0] <= self.now:
                _, _, node, event = heapq.heappop(self.queue)
                self.do(node, event)
            else:
                self.perform(node, self.cores[node].on_deadline(self.now))

    def states(self, node):
        return {p.node: p.state for p in self.cores[node].statistics(self.now).peers}

    def deaths(self, of):
        return [(at, node) for at, node, text in self.notes if of[:4] in text and "is dead" in text]


def joined(*nodes):
    wires = Wires(*nodes)
    for k, a in enumerate(nodes):
        for b in nodes[:k]:
            wires.connect(a, b)
    wires.run(3.0)
    return wires


@pytest.mark.parametrize("below", [1, 2])
def test_a_lie_at_the_last_incarnation_starts_no_storm_of_messages(below):
    wires = joined(ME, A, B, C, NodeId("d" * 16))
    number = next(n for (node, n), (peer, _) in wires.ends.items() if (node, peer) == (A, C))
    lie = replace(
        wires.cores[A].peers.membership.others[B],
        incarnation=INCARNATION_LIMIT - below,
        state=State.DEAD,
    )
    wires.sent.clear()
    wires.do(A, ev.Received(node=C, connection=number, message=Members(members=(lie,))))
    wires.run(wires.now + 0.015)
    assert len(wires.sent) < 100
    assert {wires.states(node)[B] for node in (ME, A, C)} == {"alive"}


def test_a_silent_member_is_suspect_then_dead_at_all_within_five_seconds():
    wires = joined(ME, A, B, C, NodeId("d" * 16))
    cut_at = wires.now
    wires.silent.add(C)
    wires.run(cut_at + 3.5)
    assert {wires.states(node)[C] for node in (ME, A, B)} == {"suspect"}
    wires.run(cut_at + 5.5)
    assert {wires.states(node)[C] for node in (ME, A, B)} == {"dead"}
    assert len(wires.deaths(C)) >= 1


@pytest.mark.parametrize(("count", "few", "within_s"), [(5, 2, 7.5), (5, 1, 9.0), (20, 1, 13.5)])
def test_a_minority_finds_all_the_others_dead_about_as_soon_as_one(count, few, within_s):
    nodes = [NodeId(f"{k:04}" * 4) for k in range(count)]
    wires = joined(*nodes)
    wires.silent.update(nodes[few:])
    wires.run(wires.now + within_s)
    for node in nodes[:few]:
        states = wires.states(node)
        assert {states[other] for other in nodes[:few] if other != node} <= {"alive"}
        assert {states[other] for other in nodes[few:]} == {"dead"}


def test_a_process_stopped_for_three_seconds_is_suspect_and_refutes_and_nobody_calls_it_dead():
    for seed_s in range(10):
        wires = joined(ME, A, B, C)
        wires.run(wires.now + seed_s / 10)
        wires.silent.add(C)
        held = wires.now
        wires.run(held + 3.0)
        wires.silent.discard(C)
        wires.run(held + 8.0)
        assert wires.deaths(C) == []
        assert {wires.states(node)[C] for node in (ME, A, B)} == {"alive"}
        assert wires.cores[C].own.incarnation > 1


def test_a_refused_redial_is_a_death_at_all_in_milliseconds():
    wires = joined(ME, A, B, C)
    killed = wires.now
    wires.silent.add(C)
    wires.refusing.add(C)
    for node in (ME, A, B):
        wires.cut(node, C)
    wires.run(killed + 0.1)
    assert {wires.states(node)[C] for node in (ME, A, B)} == {"dead"}


def test_a_member_that_refuses_one_other_only_is_alive():
    wires = joined(ME, A, B, C)
    wires.refusing.add(C)
    wires.cut(ME, C)
    wires.run(wires.now + 30.0)
    assert wires.states(ME)[C] == "alive"
    assert wires.deaths(C) == []


def test_hearsay_that_nobody_reaches_any_more_dies_as_well():
    """Its watchers went with it: a newcomer that has only heard of it finds out."""
    wires = joined(ME, A)
    wires.do(A, ev.Received(node=ME, connection=1, message=Members(members=(row(B),))))
    number = wires.cores[ME].peers.contacts.connections[A].number
    wires.do(ME, ev.Received(node=A, connection=number, message=Members(members=(row(B),))))
    assert wires.states(ME)[B] == "alive"
    wires.run(wires.now + 20.0)
    assert wires.states(ME)[B] == "dead"


def test_tables_that_differ_become_one_at_the_next_probe_without_any_news():
    wires = joined(ME, A, B)
    wires.cores[A].peers.membership.merge([row(C, 9, State.LEFT), row(NodeId("d" * 16), 4)])
    wires.cores[A].peers.membership.publish(addresses=())
    wires.run(wires.now + 8.0)
    fingerprints = {core.statistics(wires.now).fingerprint for core in wires.cores.values()}
    assert len(fingerprints) == 1
    compared = sum(isinstance(message, Versions) for at, _, message in wires.sent if at > 3.0)
    wires.run(wires.now + 30.0)
    later = sum(isinstance(message, Versions) for at, _, message in wires.sent if at > 3.0)
    assert later - compared <= 10, "only the death of who nobody reaches is news"


# ---------------------------------------------------------------------------------------- twins


def test_of_two_processes_with_one_identity_the_younger_is_refused():
    for first_is_older in (True, False):
        core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
        ages = (60_000, 1_000) if first_is_older else (1_000, 60_000)
        for number, age_ms in enumerate(ages, start=1):
            connected = ev.PeerConnected(
                node=A,
                connection=number,
                hello=hello(A, instance=number, age_ms=age_ms, incarnation=number),
                contact=None,
                host=f"10.0.0.{number}",
            )
            effects = core.handle(connected, 0.0)
        [ping] = [e for e in effects if isinstance(e, ev.Send) and e.connection == 1]
        answer = ev.Received(
            node=A, connection=1, message=Ack(sequence=ping.message.sequence, table=0)
        )
        effects = core.handle(answer, 0.1)
        refused = 2 if first_is_older else 1
        told = {
            e.connection: e.message.addresses
            for e in effects
            if isinstance(e, ev.Send) and isinstance(e.message, IdentityTaken)
        }
        assert told == {refused: hello(A, incarnation=3 - refused).member.addresses}
        assert refused in {e.connection for e in effects if isinstance(e, ev.Hangup)}
        pong = core.handle(
            ev.Received(node=A, connection=3 - refused, message=Ping(sequence=1, table=0)), 0.2
        )
        assert any(isinstance(e, ev.Send) and e.connection == 3 - refused for e in pong)


def test_a_restart_whose_old_connection_stays_silent_is_no_twin():
    core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
    for number in (1, 2):
        connected = ev.PeerConnected(
            node=A, connection=number, hello=hello(A, instance=number), contact=None
        )
        core.handle(connected, 0.0)
    effects, now = [], 0.0
    while now < CHECK_S + 0.1:
        now = core.next_deadline()
        effects += core.on_deadline(now)
    hung_up = [e.connection for e in effects if isinstance(e, ev.Hangup)]
    assert hung_up[:1] == [1]


def test_a_node_that_is_told_that_its_identity_is_taken_believes_only_what_it_sees():
    core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
    core.handle(ev.PeerConnected(node=A, connection=1, hello=hello(A), contact=None), 0.0)
    elsewhere = (Address("10.0.0.7", 7710),)
    told = ev.Received(node=A, connection=1, message=IdentityTaken(addresses=elsewhere))
    effects = core.handle(told, 0.1)
    assert not any(isinstance(e, ev.Stop) for e in effects)
    assert [e.addresses for e in effects if isinstance(e, ev.Dial)] == [elsewhere]


def test_a_table_is_told_ten_times_a_second_at_most_however_it_is_asked_for():
    wires = joined(ME, A)
    (number,) = (n for (node, n), _ in wires.ends.items() if node == ME)
    rows = 0
    for _ in range(20):
        for message in (Versions(versions=()), Wanted(versions=(1,)), Wanted(versions=())):
            asked = ev.Received(node=A, connection=number, message=message)
            effects = wires.cores[ME].handle(asked, wires.now)
            sent = [e.message for e in effects if isinstance(e, ev.Send)]
            rows += sum(len(m.members) for m in sent if isinstance(m, Members))
    assert rows == 2


def test_made_up_twins_are_looked_for_one_at_a_time_and_seldom():
    core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
    core.handle(ev.PeerConnected(node=A, connection=1, hello=hello(A), contact=None), 0.0)
    dials, notes = [], 0
    for k in range(1000):
        now = k / 50
        made_up = IdentityTaken(addresses=(Address(f"10.0.{k // 250}.{k % 250 + 1}", 7710),))
        effects = core.handle(ev.Received(node=A, connection=1, message=made_up), now)
        notes += sum(isinstance(e, ev.Note) for e in effects)
        dials += [(now, e.addresses) for e in effects if isinstance(e, ev.Dial)]
    # It takes each dial for under way, as nothing here ends one.
    assert [(at, len(addresses)) for at, addresses in dials] == [(0.0, 1), (LOOK_S, 1)]
    assert notes == 2


def test_a_node_that_met_its_older_self_stops_and_says_what_to_do():
    core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
    [stop] = [e for e in core.handle(ev.TwinMet(host="10.0.0.7"), 0.0) if isinstance(e, ev.Stop)]
    assert "10.0.0.7" in stop.reason
    assert "--state" in stop.reason


# --------------------------------------------------------------------------------------- many nodes


def test_in_a_large_mesh_the_connections_of_a_node_stay_bounded_and_it_goes_on_dialling_few():
    core = MeshProtocol(first_row(ME, "me", 1, ()), Random(1))
    others = [NodeId(f"node{k:04}" + "a" * 8) for k in range(300)]
    connected, dials = set(), 0
    for number, other in enumerate(others, start=1):
        connected.add(number)
        effects = core.handle(
            ev.PeerConnected(
                node=other, connection=number, hello=hello(other), contact=None, host="10.0.0.9"
            ),
            number / 100,
        )
        for effect in effects:
            if isinstance(effect, ev.Hangup):
                connected.discard(effect.connection)
            dials += isinstance(effect, ev.Dial)
    assert len(connected) == 32
    assert dials <= 2
