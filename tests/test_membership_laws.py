"""What holds of the member table and the detector whatever comes, in whatever order."""

import math
from dataclasses import replace
from functools import reduce
from operator import xor
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core import events as ev
from mesh.core import membership
from mesh.core.address import Address
from mesh.core.contacts import CONNECTIONS_LIMIT
from mesh.core.detector import Detector
from mesh.core.findings import Gone
from mesh.core.membership import (
    INCARNATION_LIMIT,
    KEEP_ENDED_S,
    MEMBERS_LIMIT,
    TELL_ENDED_S,
    Membership,
    known,
)
from mesh.core.messages import (
    ACCUSERS_LIMIT,
    Ack,
    Member,
    Members,
    NodeId,
    RunInfo,
    State,
    Verdict,
)
from mesh.core.protocol import MeshProtocol
from tests.test_detector import Wires, hello, joined

ME = NodeId("m" * 16)
NODES = [NodeId(letter * 16) for letter in "abcd"]
SEEDED = settings(derandomize=True, deadline=None, max_examples=150)
TRAINING = RunInfo(run="toy", schema="s", started=True, exchanged=True)
ACCUSERS = [NodeId(f"accuser{k}") for k in range(7)]


@st.composite
def rows(draw, nodes=tuple(NODES)):
    """Rows as the wire lets them pass."""
    state = draw(st.sampled_from(State))
    accusers = draw(st.sets(st.sampled_from(ACCUSERS), max_size=ACCUSERS_LIMIT))
    return Member(
        node=draw(st.sampled_from(nodes)),
        name=draw(st.sampled_from(("one", "two"))),
        incarnation=draw(st.sampled_from((0, 1, 2, INCARNATION_LIMIT - 2, INCARNATION_LIMIT - 1))),
        state=state,
        addresses=(Address("10.0.0.1", draw(st.sampled_from((1000, 1001)))),),
        runs=draw(st.sampled_from(((), (TRAINING,)))),
        accusers=tuple(sorted(accusers)) if state is State.SUSPECT else (),
    )


def own():
    return Member(
        node=ME, name="me", incarnation=0, state=State.ALIVE, addresses=(), runs=(), accusers=()
    )


def table(*pages):
    made = Membership(own())
    for page in pages:
        made.merge(page)
    return made


def check_books(made):
    """What a table counts is what its rows say."""
    all_rows = [made.own, *made.others.values()]
    living = [row for row in all_rows if row.state <= State.SUSPECT or row.node == ME]
    assert made.living == len(living)
    assert made.fingerprint == reduce(xor, (known(row)[1] for row in living))
    assert made._versions == {row.node: known(row)[1] for row in all_rows}
    ended = [row for row in made.others.values() if row.state > State.SUSPECT]
    lost = {row.node: row for row in made.lost_others()}
    assert set(made._lost) == lost.keys() - made.others.keys()
    assert {n: row for n, row in lost.items() if n in made.others} == {
        row.node: row for row in ended if row.state is State.DEAD
    }
    assert set(made.living_others()) == set(made.others) - {row.node for row in ended}
    assert made.trains == {row.node: row for row in made.others.values() if row.runs}


# ------------------------------------------------------------------------------------------ laws

pages = st.lists(rows(), max_size=12)


@SEEDED
@given(st.permutations(range(3)), st.lists(pages, min_size=3, max_size=3))
def test_tables_do_not_depend_on_the_order_in_which_rows_came(order, given_pages):
    """Commutative and associative: pages in any order, and other tables' sums of them."""
    straight = table(*given_pages)
    assert table(*(given_pages[k] for k in order)).others == straight.others
    first, second, third = given_pages
    sums = table(second, third).others.values()
    assert table(first, sums).others == straight.others
    check_books(straight)


@SEEDED
@given(pages)
def test_what_was_merged_once_is_no_news_again(given_rows):
    made = table(given_rows)
    before = dict(made.others), made.fingerprint
    assert made.merge(given_rows) == []
    assert made.merge(list(made.others.values())) == []
    assert (dict(made.others), made.fingerprint) == before


@SEEDED
@given(pages, pages)
def test_after_two_comparisons_of_versions_two_tables_are_one(mine, theirs):
    """One is enough but for a suspect with other accusers here and there: its row is a third one
    when the second half asks for the first."""
    one, other = table(mine), table(theirs)
    for _ in range(2):
        lacked, wanted = other.compare(one.versions(0.0), 0.0)
        one.merge(lacked)
        other.merge(one.rows_of(wanted, 0.0))
    assert one.others == other.others
    assert one.fingerprint == other.fingerprint


steps = st.one_of(
    st.tuples(st.just("merge"), st.lists(rows((*NODES, ME)), max_size=4)),
    st.tuples(st.just("declare"), st.sampled_from(NODES), st.sampled_from(State)),
    st.tuples(st.just("expire")),
    st.tuples(st.just("publish")),
    st.tuples(st.just("wait"), st.sampled_from((1.0, TELL_ENDED_S, KEEP_ENDED_S))),
)


@SEEDED
@given(st.lists(steps, max_size=40), st.sampled_from((2, 3, 100)))
def test_the_books_of_a_table_are_right_after_anything(given_steps, limit):
    made, now = Membership(own()), 0.0
    whole, membership.MEMBERS_LIMIT = membership.MEMBERS_LIMIT, limit
    try:
        for step in given_steps:
            match step:
                case ("merge", given_rows):
                    made.merge(given_rows, now)
                case ("declare", node, state):
                    made.declare(node, state, now)
                case ("expire",):
                    made.expire(now)
                case ("publish",):
                    made.publish()
                case ("wait", seconds):
                    now += seconds
            check_books(made)
            assert len(made.others) <= limit
    finally:
        membership.MEMBERS_LIMIT = whole


# -------------------------------------------------------------------------------------- detector


def suspect(*accusers):
    return Member(
        node=NODES[3],
        name="dddd",
        incarnation=1,
        state=State.SUSPECT,
        addresses=(Address("10.0.0.1", 1000),),
        runs=(),
        accusers=accusers,
    )


def quiet_detector():
    """One that watches four and whose own probes are far away."""
    detector = Detector(Random(1))
    for node in NODES:
        detector.connected(node, 0.0, 0, dialled=False)
    detector._probe_at = 1e6
    return detector


def test_a_confirmation_that_comes_late_is_no_sign_that_this_nodes_loop_was_late():
    detector = quiet_detector()
    detector.suspected(suspect(ACCUSERS[0]), 5, 0.0, 0, since=0.0)
    detector._probes.clear()
    late = suspect(*ACCUSERS[:3])
    detector.suspected(late, 5, 5.9, 0, since=5.9)
    detector._probes.clear()
    assert detector.next_deadline() == 5.9
    assert detector.on_deadline(5.9, 0) == [Gone(node=late.node, reason="silent: 3 members say so")]
    assert detector.health.score == 0


def test_who_was_heard_since_it_was_accused_lives_however_late_it_is_confirmed():
    detector = quiet_detector()
    detector.suspected(suspect(ACCUSERS[0]), 5, 0.0, 0, since=0.0)
    detector.heard(NODES[3], 2.5)
    detector.suspected(suspect(*ACCUSERS[:4]), 5, 5.9, 0, since=5.9)
    detector._probes.clear()
    assert detector.on_deadline(5.9, 0) == []


# ----------------------------------------------------------------------------------- whole cores


def alive(node, incarnation=1):
    return replace(suspect(), node=node, incarnation=incarnation, state=State.ALIVE)


def received(core, node, message, now):
    """What `core` does with a message over the connection that it has to `node`."""
    number = core.peers.contacts.connections[node].number
    return core.handle(ev.Received(node=node, connection=number, message=message), now)


def test_after_a_long_partition_a_death_that_is_told_no_more_reaches_who_takes_it_for_life():
    """And so the member itself, which refutes: its own connection to who calls it dead may never be."""
    here, there, lives = NODES[:3]
    wires = Wires(here, there, lives)
    wires.connect(here, there)
    wires.connect(there, lives)
    wires.run(3.0)
    mine = wires.cores[here].peers
    mine.membership.declare(lives, State.DEAD, wires.now)
    mine.detector.forget(lives)
    mine.membership._ended_at[lives] = wires.now - TELL_ENDED_S - 1
    wires.run(wires.now + 10.0)
    assert wires.states(here)[lives] == wires.states(there)[lives] == "alive"
    assert wires.cores[lives].own.incarnation > 1
    assert len({core.peers.membership.fingerprint for core in wires.cores.values()}) == 1


def test_invented_deaths_take_no_more_room_than_the_table_has():
    wires = joined(*NODES[:2])
    core = wires.cores[NODES[0]]
    for page in range(140):
        invented = tuple(
            replace(alive(NodeId(f"fake{page:04}{k:04}")), state=State.DEAD) for k in range(32)
        )
        received(core, NODES[1], Members(members=invented), wires.now)
    assert len(core.peers.membership.others) == MEMBERS_LIMIT
    assert len(core.peers.reasons) <= MEMBERS_LIMIT


def test_in_a_large_mesh_too_a_lost_connection_is_dialled_at_once_and_one_given_up_is_not():
    others = [NodeId(f"node{k:04}" + "a" * 8) for k in range(60)]
    for told in (False, True):
        core = MeshProtocol(alive(ME), Random(1))
        for number, other in enumerate(others[:12], start=1):
            core.handle(
                ev.PeerConnected(
                    node=other, connection=number, hello=hello(other), contact=None, host="10.0.0.9"
                ),
                0.0,
            )
        received(core, others[0], Members(members=tuple(map(alive, others[12:]))), 0.1)
        lost = ev.PeerLost(node=others[3], connection=4, reason="end of file", told=told)
        dials = [e.contact for e in core.handle(lost, 5.0) if isinstance(e, ev.Dial)]
        assert dials == ([] if told else [others[3]])


def test_in_a_large_mesh_a_search_finds_now_and_then_whoever_is_not_connected_and_one_of_the_dead():
    others = [NodeId(f"node{k:04}" + "a" * 8) for k in range(60)]
    core = MeshProtocol(alive(ME), Random(1))
    for number, other in enumerate(others[:40], start=1):
        core.handle(ev.PeerConnected(
            node=other, connection=number, hello=hello(other), contact=None, host="10.0.0.9"
        ), 0.0)  # fmt: skip
    rest = [alive(other) for other in others[40:]]
    rest[-2:] = [replace(row, state=State.DEAD) for row in rest[-2:]]
    received(core, others[39], Members(members=tuple(rest)), 0.1)
    contacts, dialled, living = core.peers.contacts, set(), 0
    missing = set(others) - set(contacts.connections)
    assert len(missing) == 60 - CONNECTIONS_LIMIT
    for k in range(1, 350):
        core.peers._search(10.0 * k)
        due = {contact.node for contact in contacts.due(10.0 * k)}
        assert due <= missing
        assert len(due & set(others[58:])) == 1
        assert len(due - set(others[58:])) <= 1
        living += len(due) - 1
        dialled |= due
        for node in due:
            contacts.drop(node)
    assert dialled == missing
    # Of 59 that live each looks for 32 / 59 each time, all together for as many as LARGE are.
    assert 150 < living < 230


def test_of_two_processes_with_one_identity_the_older_is_heard_again_when_the_younger_has_gone():
    core = MeshProtocol(alive(ME), Random(1))
    copy = NODES[0]
    effects = []
    for number, age_ms in ((1, 60_000), (2, 1_000)):
        connected = ev.PeerConnected(
            node=copy,
            connection=number,
            hello=hello(copy, instance=number, age_ms=age_ms),
            contact=None,
        )
        effects = core.handle(connected, 0.0)
    [ping] = [e.message for e in effects if isinstance(e, ev.Send) and e.connection == 1]
    core.handle(ev.PeerLost(node=copy, connection=2, reason="end of file"), 0.05)
    answer = ev.Received(node=copy, connection=1, message=Ack(sequence=ping.sequence, table=0))
    effects = core.handle(answer, 0.1)
    assert 1 in {e.connection for e in effects if isinstance(e, ev.Hangup)}


def test_a_process_that_began_again_is_not_called_dead_for_the_one_before():
    detector = quiet_detector()
    detector.disconnected(NODES[0])
    [request, *_] = detector.refused(NODES[0], 0.0, "refused")
    detector.cleared(NODES[0], 2)  # its new row came with the news, before its connection
    sequence = request.message.sequence
    assert detector.reported(request.node, sequence, Verdict.REFUSED, 0.1) == []


def test_who_has_no_row_is_not_watched_for_ever():
    core = MeshProtocol(alive(ME), Random(1))
    core.peers.detector.watch(NODES[0], 0.0)
    now = 0.0
    while core.next_deadline() < math.inf:
        now = max(now, core.next_deadline())
        assert now < 60.0
        core.on_deadline(now)
    assert core.peers.detector.silent_for_s(NODES[0], now) is None


def test_where_peers_were_at_the_last_start_is_tried_for_as_long_as_it_takes():
    """All nodes of both sides of a partition began again in it, and nobody announces himself."""
    for source, goes_on in (("cache", True), ("mdns", False)):
        core = MeshProtocol(alive(ME), Random(1))
        found = ev.CandidateFound(addresses=(Address("10.0.0.1", 1000),), source=source)
        effects, now, dialled_at = core.handle(found, 0.0), 0.0, -1.0
        while now < 600.0:
            for effect in effects:
                if isinstance(effect, ev.Dial):
                    dialled_at = now
                    lost = ev.DialFailed(contact=effect.contact, refused=False, reason="no answer")
                    core.handle(lost, now)
            now = max(now, core.next_deadline())
            effects = core.on_deadline(now)
        assert (dialled_at > 500.0) is goes_on
