"""The pure core: laws of the member table, of first weights, of one exchange's counting."""

import math
from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.contacts import (
    CROSSING_S,
    DIAL_BELOW,
    FIRST_RETRY_S,
    GIVEN_UP_LIMIT,
    GIVEN_UP_S,
    LAST_RETRY_S,
    RUMOUR_ATTEMPTS,
    Contacts,
)
from mesh.core.exchange import (
    AHEAD,
    LEAST_PART,
    OVER_LIMIT,
    RECORDS_LIMIT,
    Initiation,
    Responses,
    part_beside,
    share,
)
from mesh.core.membership import (
    INCARNATION_LIMIT,
    KEEP_ENDED_S,
    MEMBERS_LIMIT,
    Membership,
    first_row,
)
from mesh.core.messages import (
    PROTOCOL,
    WINDOW,
    Hello,
    Member,
    Members,
    NodeId,
    Purpose,
    RunInfo,
    State,
    Turn,
)
from mesh.core.protocol import MeshProtocol
from mesh.core.schedule import Relation, relation
from mesh.errors import LocalProtocolError, RemoteProtocolError

ME, A, B = NodeId("m" * 16), NodeId("a" * 16), NodeId("z" * 16)
AT = (Address("10.0.0.9", 7710),)


def row(node, incarnation=1, state=State.ALIVE):
    """At one incarnation and state a row's content is one: its owner raised it to change it."""
    return Member(
        node=node,
        name=node[:4],
        incarnation=incarnation,
        state=state,
        addresses=(Address("10.0.0.1", 1 + incarnation),),
        runs=(),
    )


ROWS = st.builds(
    row,
    st.sampled_from([A, B, ME]),
    st.integers(1, 4),
    st.sampled_from(list(State)),
)


def table(*batches):
    membership = Membership(row(ME, incarnation=100))
    for batch in batches:
        membership.merge(batch)
    return membership.others


# ------------------------------------------------------------------------------------- membership


@given(st.lists(ROWS, max_size=6))
@settings(deadline=None, derandomize=True)
def test_merging_is_commutative(rows):
    assert len({str(sorted(table(order).items())) for order in permutations(rows[:4])}) == 1


@given(st.lists(ROWS, max_size=6), st.lists(ROWS, max_size=6), st.lists(ROWS, max_size=6))
@settings(deadline=None, derandomize=True)
def test_merging_is_associative_and_idempotent(a, b, c):
    joined = list(table(b, c).values())
    assert table(a, joined) == table(a, b, c) == table(a, b, c, a, b, c)


def test_at_equal_incarnation_the_later_state_wins_and_a_higher_incarnation_beats_both():
    for worse in (State.SUSPECT, State.DEAD, State.LEFT):
        assert table([row(A, 1, worse)], [row(A, 1)])[A].state is worse
        assert table([row(A, 1, worse)], [row(A, 2)])[A].state is State.ALIVE


@pytest.mark.parametrize("rumour", [State.SUSPECT, State.DEAD, State.LEFT])
def test_a_node_refutes_a_rumour_of_its_end_above_the_incarnation_of_the_rumour(rumour):
    membership = Membership(row(ME, 5))
    assert membership.merge([row(ME, 7, rumour)]) == [membership.own]
    assert (membership.own.incarnation, membership.own.state) == (8, State.ALIVE)
    assert membership.merge([row(ME, 7, rumour)]) == []


def test_nobody_is_pushed_to_an_incarnation_that_cannot_be_raised():
    membership = Membership(row(ME, 5))
    membership.merge([row(ME, INCARNATION_LIMIT, State.DEAD), row(A, INCARNATION_LIMIT)])
    membership.merge([row(ME, INCARNATION_LIMIT - 1, State.DEAD)])
    membership.merge([row(A, INCARNATION_LIMIT - 1, State.LEFT)])
    assert membership.own.incarnation == 5
    assert membership.others == {}
    rumours = [row(ME, INCARNATION_LIMIT - 2, State.DEAD), row(ME, INCARNATION_LIMIT - 1)]
    assert membership.merge(rumours) == [membership.own]
    assert membership.merge(rumours) == [], "what changes nothing is no news"


def test_the_table_is_bounded_and_forgets_the_gone_before_the_living():
    membership = Membership(row(ME))
    membership.merge([row(NodeId(f"node{k:08}"), state=State.DEAD) for k in range(10)])
    membership.merge([row(NodeId(f"live{k:08}")) for k in range(MEMBERS_LIMIT)])
    assert len(membership.others) == MEMBERS_LIMIT
    assert sum(m.state is State.ALIVE for m in membership.others.values()) == MEMBERS_LIMIT


# --------------------------------------------------------------------------------------- contacts


def connect(contacts, node, number, *, contact=None, instance=1, now=0.0):
    return contacts.connected(
        node, number, contact=contact, instance=instance, age_s=0.0, host="", now=now
    )


def test_of_two_crossed_connections_both_ends_keep_the_one_of_the_lower_id():
    for first in (ME, A):
        at_me, at_a = Contacts(ME, Random(1)), Contacts(A, Random(1))
        order = [first, A if first is ME else ME]
        kept_me = kept_a = None
        for number, dialler in enumerate(order):
            for contacts, own, other in ((at_me, ME, A), (at_a, A, ME)):
                contacts.suggest(AT, 0.0, source="mdns", node=other)
                contact = other[:16] if dialler == own else None
                connect(contacts, other, number, contact=contact)
        kept_me, kept_a = at_me.connections[A], at_a.connections[ME]
        assert kept_me.number == kept_a.number
        assert kept_me.dialled_by == min(ME, A)


def test_a_newer_process_or_a_second_dial_replaces_a_connection():
    contacts = Contacts(ME, Random(1))
    assert connect(contacts, A, 1) == (True, None)
    kept, old = connect(contacts, A, 2, instance=2)
    assert (kept, old.number) == (True, 1)
    kept, old = connect(contacts, A, 3, instance=2)
    assert (kept, old.number) == (True, 2)
    assert not contacts.lost(A, 1, 0.0)
    assert contacts.lost(A, 3, 0.0)


def test_of_two_that_hear_of_each_other_at_once_the_lower_id_dials_first():
    lower, higher = Contacts(A, Random(1)), Contacts(ME, Random(1))
    lower.suggest(AT, 0.0, source="mdns", hint=ME[:16])
    higher.suggest(AT, 0.0, source="mdns", hint=A[:16])
    assert len(lower.due(0.0)) == 1
    assert higher.due(0.0) == []
    assert len(higher.due(CROSSING_S)) == 1


def test_whoever_dialled_first_is_not_dialled_as_well():
    contacts = Contacts(ME, Random(1))
    contacts.suggest(AT, 0.0, source="mdns", hint=A[:16])
    connect(contacts, A, 1)
    assert contacts.next_deadline() == math.inf
    assert contacts.due(CROSSING_S) == []
    contacts.lost(A, 1, 2.0)
    assert [contact.node for contact in contacts.due(2.0)] == [A], "from then on it is"


def test_a_connection_that_ends_young_is_dialled_after_the_first_wait_and_one_that_ends_so_again_later():
    contacts, now, waits = Contacts(ME, Random(1)), 0.0, []
    contacts.suggest(AT, now, source="mdns", hint=A[:16])
    for number in range(1, 4):
        connect(contacts, A, number)
        contacts.lost(A, number, now)
        waits.append(contacts.next_deadline() - now)
    assert waits[0] <= FIRST_RETRY_S < waits[1] <= 2 * FIRST_RETRY_S < waits[2]


def test_however_often_a_process_is_killed_young_its_node_is_known_dead_after_the_first_wait():
    contacts = Contacts(ME, Random(1))
    contacts.suggest(AT, 0.0, source="mdns", hint=A[:16])
    for number in range(1, 20):
        now = 1.0 * number
        connect(contacts, A, number, instance=number, now=now)  # started again each time
        contacts.lost(A, number, now)
        assert 0 < contacts.next_deadline() - now <= FIRST_RETRY_S, "no storm, no long wait"


def test_who_shows_another_process_at_each_dial_is_dialled_no_more_than_twice_a_second():
    contacts, now, dials = Contacts(ME, Random(1)), 0.0, 0
    contacts.suggest(AT, now, source="peer", node=A)
    while now < 60.0:
        [due] = contacts.due(now)
        dials += 1
        connect(contacts, A, dials, contact=due.key, instance=dials, now=now)
        contacts.lost(A, dials, now)
        now = contacts.next_deadline()
    assert 20 < dials <= 120


@pytest.mark.parametrize(("shown", "in_the_end"), [(20, 20), (200, DIAL_BELOW)])
def test_of_many_that_mdns_shows_at_once_the_first_are_dialled_and_others_once_it_is_known_how_many(
    shown, in_the_end
):
    contacts = Contacts(NodeId("a" * 16), Random(1))
    dialled = 0
    for k in range(shown):
        contacts.suggest(AT, 0.0, source="mdns", hint=f"node{k:04}" + "a" * 8)
        dialled += len(contacts.due(0.0))
    assert dialled == DIAL_BELOW
    assert dialled + len(contacts.due(CROSSING_S)) == in_the_end


def test_what_was_given_by_hand_is_retried_for_ever_and_a_rumour_is_not():
    for source, remains in (("peer", True), ("mdns", False)):
        contacts, now, waits = Contacts(ME, Random(1)), 0.0, []
        contacts.suggest(AT, now, source=source)
        for _ in range(3 * RUMOUR_ATTEMPTS):
            now = contacts.next_deadline()
            if now == float("inf"):
                break
            [due] = contacts.due(now)
            assert contacts.due(now) == [], "one dial at a time"
            contacts.failed(due.key, now, itself=False)
            waits.append(contacts.next_deadline() - now)
        assert (len(waits) == 3 * RUMOUR_ATTEMPTS) is remains
        assert waits[0] <= 2 * FIRST_RETRY_S
        assert max(w for w in waits if w != float("inf")) <= LAST_RETRY_S


def test_a_node_does_not_dial_itself_or_whoever_is_connected():
    contacts = Contacts(ME, Random(1))
    contacts.suggest(AT, 0.0, source="member", node=ME)
    assert contacts.due(0.0) == []
    contacts.suggest(AT, 0.0, source="cache", hint=A[:16])
    [due] = contacts.due(0.0)
    connect(contacts, A, 1, contact=due.key)
    contacts.suggest(AT, 1.0, source="member", node=A)
    assert contacts.due(1.0) == []


# --------------------------------------------------------------------------------------- protocol


def hello(node, incarnation=1):
    member = row(node, incarnation)
    return Hello(
        protocol=PROTOCOL,
        name=member.name,
        purpose=Purpose.CONTROL,
        member=member,
        instance=1,
        age_ms=0,
    )


def test_the_protocol_is_at_rest_after_everything_due_was_done():
    """next_deadline() always lies ahead after on_deadline(): the loop cannot spin."""
    protocol = MeshProtocol(first_row(ME, "me", 1, AT), Random(1))
    protocol.handle(ev.CandidateFound(addresses=AT, source="peer"), 0.0)
    protocol.handle(ev.PeerConnected(node=A, connection=1, hello=hello(A), contact=None), 0.0)
    attached = ev.RunAttached(
        run="r", schema="s", entries=(), sync_timeout_s=2.0, started=False, exchanged=False
    )
    protocol.handle(attached, 0.0)
    now = 0.0
    for _ in range(200):
        assert protocol.next_deadline() > now
        now = min(protocol.next_deadline(), now + 10)
        protocol.on_deadline(now)


TOY = RunInfo(run="toy", schema="s", started=True, exchanged=True)


def broken_off():
    """A node whose exchange with A was broken off, at 2 s; it can only be resumed with A."""
    protocol = MeshProtocol(first_row(ME, "me", 1, AT), Random(1))
    protocol.handle(
        ev.RunAttached(
            run="toy", schema="s", entries=(), sync_timeout_s=1.0, started=True, exchanged=True
        ),
        0.0,
    )
    greeting = replace(hello(A), member=replace(row(A), runs=(TOY,)))
    protocol.handle(ev.PeerConnected(node=A, connection=1, hello=greeting, contact=None), 0.0)
    effects = protocol.handle(ev.Posted(run="toy", waits=False, figures=None), 1.0)
    assert [effect.peer for effect in effects if isinstance(effect, ev.StartExchange)] == [A]
    protocol.handle(
        ev.ExchangeEnded(
            run="toy",
            peer=A,
            pull=False,
            outcome=ev.Outcome.INTERRUPTED,
            reason="broken",
            duration_s=0.1,
            square_distance=0.0,
            square_norm=0.0,
        ),
        2.0,
    )
    return protocol


def dropped(effects):
    return [effect for effect in effects if isinstance(effect, ev.DropExchange)]


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"state": State.DEAD, "runs": (TOY,)}, False),
        ({"state": State.LEFT, "runs": (TOY,)}, True),
        ({"runs": ()}, True),
        ({"runs": (replace(TOY, schema="other"),)}, True),
        ({"runs": (replace(TOY, progress=3),)}, False),
    ],
)
def test_an_exchange_in_doubt_is_kept_while_its_peer_may_resume_it(changes, lost):
    protocol = broken_off()
    news = Members(members=(replace(row(A, 2), **changes),))
    effects = protocol.handle(ev.Received(node=A, connection=1, message=news), 2.1)
    assert dropped(effects) == [ev.DropExchange(run="toy", peer=A)] * lost


def test_an_exchange_in_doubt_with_a_member_that_is_forgotten_is_dropped():
    protocol = broken_off()
    protocol.handle(ev.PeerLost(node=A, connection=1, reason="gone"), 2.1)
    now, drops = 2.1, []
    while now < KEEP_ENDED_S + 100:
        assert not drops or now > KEEP_ENDED_S
        effects = protocol.on_deadline(now)
        drops += dropped(effects)
        for effect in effects:
            if isinstance(effect, ev.Dial):
                failed = ev.DialFailed(contact=effect.contact, refused=True, reason="refused")
                drops += dropped(protocol.handle(failed, now))
        now = max(now + 0.001, protocol.next_deadline())
    drops += dropped(protocol.handle(ev.Posted(run="toy", waits=False, figures=None), now))
    assert drops == [ev.DropExchange(run="toy", peer=A)]


def deaf(protocol, now, until_s, reason="10.0.0.9:7710: connection refused"):
    """Lives on where every dial fails; returns the time."""
    effects = protocol.on_deadline(now)
    while now < until_s:
        for effect in effects:
            if isinstance(effect, ev.Dial):
                failed = ev.DialFailed(contact=effect.contact, refused=True, reason=reason)
                protocol.handle(failed, now)
        now = min(max(now, protocol.next_deadline()), until_s)
        effects = protocol.on_deadline(now)
    return now


def seen_but_deaf(until_s=3.0):
    protocol = MeshProtocol(first_row(ME, "me", 1, AT), Random(1))
    seen = ev.CandidateFound(addresses=AT, source="mdns", hint=A[:16])
    protocol.handle(seen, 0.0)
    assert protocol.statistics(0.0).undialled == (), "it may be about to listen"
    return protocol, deaf(protocol, 0.0, until_s)


def test_whom_mdns_shows_and_no_dial_reaches_is_named_for_ten_minutes_after_the_last_try():
    reason = "10.0.0.9:7710: connection refused"
    protocol, now = seen_but_deaf(0.2)
    assert protocol.statistics(now).undialled == (), "one dial may have come too early"
    now = deaf(protocol, now, 3.0)
    assert protocol.statistics(now).undialled == ((A[:8], AT[0], reason),)
    now = deaf(protocol, now, 60.0)
    assert protocol.next_deadline() == float("inf"), "it is given up"
    assert protocol.statistics(now).undialled == ((A[:8], AT[0], reason),)
    assert protocol.statistics(now + GIVEN_UP_S).undialled == ()


def test_whom_somebody_reaches_after_all_is_named_no_more():
    for until_s in (3.0, 60.0):
        protocol, now = seen_but_deaf(until_s)
        connected = ev.PeerConnected(node=A, connection=1, hello=hello(A), contact=None)
        protocol.handle(connected, now)
        assert protocol.statistics(now).undialled == ()
        lost = ev.PeerLost(node=A, connection=1, reason="told: this node stops", told=True)
        protocol.handle(lost, now)
        assert protocol.statistics(now).undialled == (), "it could be reached"


def test_of_members_only_those_that_live_are_named_and_by_their_names():
    for state, named in ((State.ALIVE, 1), (State.SUSPECT, 0), (State.DEAD, 0), (State.LEFT, 0)):
        protocol, now = seen_but_deaf()
        protocol.peers.membership.merge([row(A, state=state)], now)
        found = protocol.statistics(now).undialled
        assert [who for who, _, _ in found] == [A[:4]] * named


def test_of_those_that_were_given_up_a_bounded_number_is_remembered():
    contacts = Contacts(ME, Random(1))
    for k in range(GIVEN_UP_LIMIT + 5):
        contacts.suggest(AT, 0.0, source="mdns", hint=f"node{k:012}")
        for attempt in range(RUMOUR_ATTEMPTS):
            failed = contacts.failed(f"node{k:012}", float(attempt), itself=False)
            failed.reason = "no answer"
    kept = contacts.undialled(10.0)
    assert len(kept) == GIVEN_UP_LIMIT
    assert kept[-1].key == f"node{GIVEN_UP_LIMIT + 4:012}"
    contacts.suggest(AT, 0.0, source="mdns", hint="itself" + "x" * 10)
    contacts.failed("itself" + "x" * 10, 0.0, itself=True).reason = "itself"
    assert contacts.undialled(10.0) == kept


# ---------------------------------------------------------------------------------- first weights

INFOS = st.builds(
    lambda started, exchanged: RunInfo(
        run="r", schema="s", started=started or exchanged, exchanged=exchanged
    ),
    st.booleans(),
    st.booleans(),
)


@given(INFOS, INFOS)
def test_who_takes_from_whom_is_one_answer_from_both_sides(mine, theirs):
    here, there = relation(mine, A, theirs, B), relation(theirs, B, mine, A)
    assert {here, there} in ({Relation.AVERAGE}, {Relation.TAKE, Relation.GIVE})
    if here is Relation.TAKE:
        assert (theirs.exchanged, theirs.started) > (mine.exchanged, mine.started)


# --------------------------------------------------------------------------------------- exchange


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6), st.floats(0.01, 1))
def test_both_shares_move_the_weighted_sum_by_nothing(p, q, part):
    mine, theirs = share(q, p, part=part), share(p, q, part=part)
    assert p * mine == pytest.approx(q * theirs)
    assert mine + theirs == pytest.approx(part)


weights = st.floats(0.01, 1e3)


@given(weights, weights, st.lists(weights, min_size=1, max_size=12))
def test_however_many_answers_beside_a_request_of_ones_own_keep_a_replica_inside(
    own, asked, askers
):
    late, kept = share(asked, own), 1.0
    for asker in askers:
        step = share(asker, own)
        part = part_beside(late, kept, step)
        assert part == 0 or LEAST_PART <= part <= 0.5
        kept -= part * step
    assert kept - late > -1e-9, "what is left of x, once the late answer is applied"


def test_two_nodes_of_equal_weight_that_ask_each_other_meet():
    assert part_beside(0.5, 1.0, 0.5) == 0.5
    assert part_beside(0.5, 1.0, 0.0) == 0.5, "of an asker that weighs nothing"
    x, y = 3.0, 7.0
    assert x - 0.5 * 0.5 * (x - y) - 0.5 * 0.5 * (x - y) == 5.0


def initiation(fragments=20):
    return Initiation(exchange=7, peer=A, end=fragments, pull=False, codec="f32")


def test_the_initiator_sends_no_further_than_the_window_and_takes_deltas_in_order():
    record = initiation()
    while record.next_to_send() is not None:
        record.fragment_sent()
    assert record.in_doubt == range(AHEAD)
    with pytest.raises(LocalProtocolError):
        record.fragment_sent()
    with pytest.raises(RemoteProtocolError):
        record.delta_arrived(1)
    record.delta_arrived(0)
    assert record.next_to_send() is None, "arrived and not applied: nothing is done yet"
    record.delta_applied()
    assert record.next_to_send() == AHEAD
    with pytest.raises(RemoteProtocolError):
        record.delta_arrived(0)


def test_after_a_lost_connection_it_resumes_at_the_first_missing_delta():
    record = initiation()
    for _ in range(3):
        record.fragment_sent()
    record.delta_arrived(0)
    record.delta_applied()
    record.connection_lost()
    assert record.next_to_send() == 1
    assert record.in_doubt == range(1, 3), "in doubt until answered, though it goes out again"


def test_what_was_refused_is_never_answered_and_what_was_begun_only_not_yet():
    responses = Responses(20, lambda reply: None)
    assert responses.refuse(A, 7), "for ever"
    assert not responses.knows(A, 7)
    assert "not known" in responses.open(A, 7, 0, "f32")
    assert responses.open(A, 8, 0, "f32") is None
    responses.applied(A, 8, 0, "reply")
    assert not responses.refuse(A, 8)
    assert responses.refuse(A, 7), "one that is older does not touch it"
    assert responses.open(A, 8, 0, "f32") is None
    assert responses.kept(A, 8, 0, 0) == "reply"


def test_the_responder_answers_a_repeated_fragment_from_what_it_kept():
    freed = []
    responses = Responses(20, freed.append)
    assert responses.open(A, 7, 0, "f32") is None
    for index in range(3):
        assert responses.kept(A, 7, index, 0) is None
        responses.applied(A, 7, index, f"reply {index}")
    assert responses.open(A, 7, 1, "f32") is None
    assert responses.kept(A, 7, 1, 1) == "reply 1"
    assert freed == ["reply 0"]
    for index, received in ((4, 1), (0, 1), (3, 4), (2, -1)):
        with pytest.raises(RemoteProtocolError):
            responses.kept(A, 7, index, received)


def test_the_responder_keeps_no_more_than_the_window():
    responses = Responses(20, lambda _: None)
    responses.open(A, 7, 0, "f32")
    for index in range(WINDOW):
        responses.kept(A, 7, index, 0)
        responses.applied(A, 7, index, index)
    with pytest.raises(RemoteProtocolError):
        responses.kept(A, 7, WINDOW, 0)
    assert responses.kept_replies == WINDOW


def asked_by_many(freed):
    """(responses of a replica of one fragment, those who ask): all are answered and not finished."""
    responses = Responses(1, freed.append)
    nodes = [NodeId(f"node{k:08}") for k in range(RECORDS_LIMIT + 2)]
    for k, node in enumerate(nodes[:RECORDS_LIMIT]):
        responses.open(node, 1, 0, "f32")
        responses.kept(node, 1, 0, 0)
        responses.applied(node, 1, 0, k)
    return responses, nodes


def test_of_too_many_exchanges_the_oldest_is_forgotten_whose_node_went_away():
    freed = []
    responses, nodes = asked_by_many(freed)
    responses.finish(nodes[5], 1)
    gone = nodes[3]
    for node in nodes[RECORDS_LIMIT:]:
        assert responses.open(node, 1, 0, "f32", waits_for=lambda node: node != gone) is None
    assert freed == [5, 3]
    for start in (0, 1):
        assert "not known" in responses.open(gone, 1, start, "f32"), "it would be applied again"
    assert responses.open(nodes[1], 1, 1, "f32") is None


def test_while_all_that_it_has_room_for_are_at_it_others_are_refused_and_nobody_is_forgotten():
    freed = []
    responses, nodes = asked_by_many(freed)
    new = nodes[RECORDS_LIMIT]
    reason = responses.open(new, 1, 0, "f32", waits_for=lambda node: True)
    assert f"{RECORDS_LIMIT} others are at it" in reason
    assert responses.refuse(new, 1)
    assert all(responses.knows(node, 1) for node in nodes[:RECORDS_LIMIT])
    assert freed == []
    responses.finish(nodes[0], 1)
    assert responses.open(new, 2, 0, "f32", waits_for=lambda node: True) is None


def test_what_is_known_of_exchanges_that_are_over_is_bounded():
    responses = Responses(1, lambda reply: None)
    for k in range(OVER_LIMIT + 1):
        responses.refuse(NodeId(f"node{k:08}"), 5)
    assert len(responses._over) == OVER_LIMIT
    newest = NodeId(f"node{OVER_LIMIT:08}")
    responses.refuse(newest, 3)
    assert "not known" in responses.open(newest, 5, 0, "f32"), "numbers only rise"
    assert responses.open(newest, 6, 0, "f32") is None


def test_an_exchange_that_is_not_known_here_is_not_resumed():
    responses = Responses(20, lambda _: None)
    assert "not known" in responses.open(A, 7, 5, "f32")
    responses.open(A, 8, 0, "f32")
    with pytest.raises(RemoteProtocolError):
        responses.open(A, 7, 0, "f32")
    with pytest.raises(RemoteProtocolError):
        responses.open(A, 8, 3, "f32")


@pytest.mark.parametrize(
    "other",
    [
        {"codec": "int8"},
        {"weight": 1e12},
        {"turn": None},
        {"turn": Turn(view="v", position=3, step=1.0)},
    ],
)
def test_an_exchange_is_resumed_on_the_terms_that_it_began_with_or_not_at_all(other):
    responses = Responses(20, lambda _: None)
    terms = {"codec": "f32", "weight": 1.0, "turn": Turn(view="v", position=3, step=0.5)}
    assert responses.open(A, 8, 0, **terms) is None
    assert responses.open(A, 8, 0, **terms) is None
    with pytest.raises(RemoteProtocolError, match="resumes on"):
        responses.open(A, 8, 0, **{**terms, **other})
