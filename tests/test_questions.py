"""Questions between nodes: through others, in pages, in time, and bounded; what a node remembers."""

import gc
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import jsonschema
import numpy as np
import pytest
import trio

from mesh import history, journal, wire
from mesh.alarm import JumpClock
from mesh.answers import Answers
from mesh.bench import BLOCK_BYTES, measure
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.contacts import Connection, Contacts
from mesh.core.for_people import REPORTS_LIMIT, Answer, Figures, Question, Report
from mesh.core.membership import Membership, first_row
from mesh.core.messages import RunInfo, State
from mesh.core.questions import (
    ANSWERING_EACH,
    ANSWERING_LIMIT,
    KEPT_S,
    PASSED_EACH,
    PASSED_S,
    Questions,
)
from mesh.core.reports import AGE_LIMIT_MS, TELLINGS, ReportTable
from mesh.desk import TEXT_LIMIT
from mesh.errors import MeshError, NodeRefused, NodeTimeout, UsageError
from mesh.history import POINTS_LIMIT, Curve, Mark, Meter, Point
from mesh.journal import EVENTS_KEPT, EXCHANGES_KEPT, LINES_KEPT, Journal
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until

X = np.arange(6, dtype=np.float32)
SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


def fits(answer):
    """The answer is what its schema file says."""
    name = answer["schema"].replace("/", ".")
    jsonschema.validate(answer, json.loads((SCHEMAS / f"{name}.json").read_text()))
    return answer


class Shell:
    """Programs of one simulated machine ask their node."""

    def __init__(self, node, **settings):
        self.left = []
        self.answers = Answers(
            node, mesh="toy", state=Path("state"), stop=lambda: self.left.append(1), **settings
        )

    async def ask(self, op, **fields):
        async def tell(progress):
            pass

        answer = await self.answers.answer({"op": op, **fields}, tell)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if answer["ok"] is not True:
            error = answer["error"]
            kinds = {kind.code: kind for kind in (UsageError, NodeTimeout, NodeRefused)}
            raise kinds.get(error["code"], MeshError)(error["message"])
        return fits(answer)


def cut(mesh, *pairs):
    """Neither of two reaches the other."""
    for a, b in pairs:
        mesh.network.cut(node_id(a), node_id(b))
        mesh.network.cut(node_id(b), node_id(a))


def chain(mesh, count):
    """Node 1 reaches 2 only, 2 reaches 1 and 3, and so on."""
    cut(mesh, *((i, j) for i in range(1, count + 1) for j in range(1, i - 1)))
    for index in range(1, count + 1):
        beside = [("peer", Address(f"10.0.0.{index - 1}", 7710))] if index > 1 else []
        mesh.start(index, discovery=False, candidates=beside)


def knows_all(mesh, index, count):
    return len(mesh.nodes[index].members()) == count


# ---------------------------------------------------------------------------- through the mesh


def test_a_node_answers_another_whose_only_way_leads_through_a_third():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            chain(mesh, 3)
            await until(lambda: knows_all(mesh, 1, 3) and knows_all(mesh, 3, 3), 5.0)
            shells = [Shell(mesh.nodes[i]) for i in (1, 2, 3)]
            assert node_id(3) not in mesh.nodes[1]._protocol.peers.contacts.connections

            status = await shells[0].ask("status", of="n3")
            assert status["node"]["name"] == "n3"
            assert status["node"]["addresses"] == ["10.0.0.3:7710"]
            assert (await shells[0].ask("peers", of="n3"))["node"]["id"] == node_id(3)
            ping = await shells[0].ask("ping", target="n3", count=3)
            assert (ping["received"], ping["hops"]) == (3, 1)
            direct = await shells[0].ask("ping", target="n2", count=1)
            assert direct["hops"] == 0
            relayed = await shells[0].ask("ping", of="n3", target="n2", count=1)
            assert relayed["node"]["name"] == "n3"

    run_seeded(main, 1)


def test_a_question_is_passed_on_three_times_and_no_further():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            chain(mesh, 6)
            await until(lambda: knows_all(mesh, 1, 6), 30.0)
            shell = Shell(mesh.nodes[1])
            for index in range(2, 7):
                Shell(mesh.nodes[index])
            ping = await shell.ask("ping", target="n5", count=1)
            assert ping["hops"] == 3
            began = trio.current_time()
            with pytest.raises(NodeTimeout, match="n6"):
                await shell.ask("status", of="n6", within_s=3.0)
            assert trio.current_time() - began < 3.1

    run_seeded(main, 2)


def test_a_long_answer_comes_in_pages_and_one_that_is_too_long_is_an_error():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            chain(mesh, 3)
            await until(lambda: knows_all(mesh, 1, 3), 5.0)
            length = 150_000

            async def answer(question):
                return json.dumps({"ok": True, "long": "x" * length})

            mesh.nodes[3].desk.answerer = answer
            ask = mesh.nodes[1].desk.ask
            told = await ask(node_id(3), "anything", {}, 5.0)
            assert json.loads(told.text)["long"] == "x" * length
            assert told.hops == 1
            length = TEXT_LIMIT
            told = await ask(node_id(3), "anything", {}, 5.0)
            assert "too long" in json.loads(told.text)["error"]["message"]

    run_seeded(main, 3)


def test_a_question_that_a_relay_took_with_it_finds_another_way():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            cut(mesh, (1, 4))
            for index in range(1, 5):
                mesh.start(index)
            await until(lambda: all(knows_all(mesh, i, 4) for i in (1, 4)), 5.0)
            shell = Shell(mesh.nodes[1])
            Shell(mesh.nodes[4])
            mesh.network.stall(node_id(2))  # it takes what it is sent, and passes nothing on
            for _ in range(5):
                assert (await shell.ask("status", of="n4"))["node"]["name"] == "n4"

    run_seeded(main, 4)


def test_who_is_unknown_dead_or_silent_is_named_in_time():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await until(lambda: knows_all(mesh, 1, 3), 5.0)
            shell = Shell(mesh.nodes[1])
            with pytest.raises(UsageError, match="n1, n2, n3"):
                await shell.ask("status", of="nobody")
            with pytest.raises(UsageError, match="this node itself"):
                await shell.ask("ping", target="n1")
            mesh.network.stall(node_id(3))
            with pytest.raises(NodeTimeout, match="n3"):
                await shell.ask("status", of="n3", within_s=0.5)
            mesh.network.vanish(node_id(3))
            mesh.crash(3)
            await until(lambda: mesh.states(1)["n3"] == "dead")
            with pytest.raises(MeshError, match="dead"):
                await shell.ask("status", of="n3")
            with pytest.raises(MeshError, match="nobody answers there"):
                await shell.ask("status", of="n2")  # a node without a shell

    run_seeded(main, 5)


def test_others_may_read_and_change_nothing_where_they_are_not_allowed_to():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await until(lambda: knows_all(mesh, 1, 3), 5.0)
            shell, closed = Shell(mesh.nodes[1]), Shell(mesh.nodes[2])
            opened = Shell(mesh.nodes[3], allow_control=True)
            players = [await mesh.attach(index, X) for index in (1, 2, 3)]
            await until(lambda: all(p.begun for p in players), 10.0)
            for op in ("pause", "resume", "leave", "set"):
                with pytest.raises(NodeRefused, match="--allow-control"):
                    await shell.ask(op, of="n2", every=4)
            assert not closed.left
            assert not players[1].run.paused
            assert (await shell.ask("pause", of="n3"))["runs"] == ["toy"]
            assert players[2].run.paused
            assert (await shell.ask("set", of="n3", every=4))["every"] == 4
            await shell.ask("leave", of="n3")
            assert opened.left == [1]
            with pytest.raises(UsageError, match="toy"):
                await shell.ask("pause", run="other")
            with pytest.raises(UsageError, match="knows no"):
                await shell.ask("eval")
            kinds = [e["text"] for e in (await shell.ask("events", of="n3"))["events"]]
            assert "n1 asks: pause" in kinds

    run_seeded(main, 6)


# ------------------------------------------------------------------------------------ its limits


def room():
    """(questions, neighbour): a node that is connected to ten others."""
    own = first_row(node_id(0), "n0", 1, ())
    membership, contacts = Membership(own), Contacts(own.node, Random(1))
    for index in range(1, 11):
        node = node_id(index)
        membership.merge([first_row(node, f"n{index}", 1, (Address("10.0.0.1", 1),))])
        contacts.connections[node] = Connection(
            number=index,
            dialled_by=own.node,
            instance=1,
            began_at=0,
            addresses=(),
            via="",
            host="",
            since=0,
            used_at=0,
        )
    return Questions(membership, contacts, Random(2)), node_id(1)


def question(number, target, **fields):
    values = {
        "asker": node_id(50),
        "number": number,
        "page": 0,
        "attempt": 1,
        "hops": 2,
        "target": target,
        "op": "status",
        "arguments": (),
    }
    return Question(**{**values, **fields})


def test_what_a_neighbour_can_make_a_node_hold_or_send_is_bounded():
    questions, neighbour = room()
    sent = [
        effect
        for number in range(5000)
        for effect in questions.question(neighbour, question(number, node_id(60)), number / 1000)
    ]
    assert len(questions._passed) == PASSED_EACH
    assert len(sent) <= 3 * PASSED_EACH
    mine = [questions.question(neighbour, question(n, node_id(0)), 10.0) for n in range(1000)]
    assert sum(map(len, mine)) == ANSWERING_EACH
    for index in range(2, 11):
        for number in range(1000):
            questions.question(node_id(index), question(9000 * index + number, node_id(0)), 20.0)
    assert len(questions._answering) == ANSWERING_LIMIT
    assert questions.next_deadline() < 20.0 + PASSED_S + 1
    questions.on_deadline(20.0 + PASSED_S)
    assert (questions._passed, questions._answering) == ({}, {})


def test_a_neighbour_that_asks_without_end_is_not_listened_to_for_a_while():
    questions, neighbour = room()
    passed = 0
    for number in range(2000):
        one = question(number, node_id(2))
        passed += len(questions.question(neighbour, one, 0.0))
        reply = Answer(
            asker=one.asker, number=number, page=0, attempt=1, pages=1, hops=0, pieces=()
        )
        questions.answer(reply, 0.0)
    assert passed == 128
    assert questions.question(neighbour, question(9999, node_id(2)), 1.0)


def test_a_question_goes_round_no_circle():
    questions, neighbour = room()
    one = question(1, node_id(60))
    assert len(questions.question(neighbour, one, 0.0)) == 3
    assert questions.question(node_id(2), one, 0.0) == [], "it came back by another way"
    own = question(2, node_id(60), asker=node_id(0))
    assert questions.question(neighbour, own, 0.0) == [], "it is our own"
    assert questions.question(neighbour, question(3, node_id(60), hops=0), 0.0) == []
    direct = questions.question(neighbour, question(4, node_id(2), hops=0), 0.0)
    assert [(e.connection, e.message.hops) for e in direct] == [(2, 0)]


def test_an_answer_is_performed_once_and_kept_for_its_pages():
    questions, neighbour = room()
    [perform] = questions.question(neighbour, question(1, node_id(0)), 0.0)
    assert isinstance(perform, ev.Perform)
    again = question(1, node_id(0), attempt=2)
    assert questions.question(node_id(2), again, 0.1) == [], "it is worked on"
    done = ev.Performed(asker=node_id(50), number=1, text="x" * 100_000)
    [first] = questions.performed(done, 0.2)
    assert (first.connection, first.message.pages, first.message.attempt) == (2, 3, 2)
    assert questions.question(node_id(3), again, 0.25) == [], "the same one, by another way"
    [third] = questions.question(neighbour, question(1, node_id(0), page=2, attempt=3), 0.3)
    assert (third.connection, third.message.page) == (1, 2)
    assert questions.question(neighbour, question(1, node_id(0), page=3, attempt=4), 0.3) == []
    for number in range(100, 100 + 3 * ANSWERING_EACH):
        [perform] = questions.question(neighbour, question(number, node_id(0)), 0.4)
        assert isinstance(perform, ev.Perform), "answers that went out whole make room"
        questions.performed(ev.Performed(asker=node_id(50), number=number, text="{}"), 0.4)
    questions.on_deadline(0.4 + KEPT_S)
    late = question(1, node_id(0), page=1, attempt=5)
    assert questions.question(neighbour, late, 9.0) == []


# ----------------------------------------------------------------------------------------- figures


def figures(step):
    return Figures(step=step, loss=0.5, drift=None, samples_s=1.0, out_bytes_s=0.0, in_bytes_s=0.0)


def test_figures_of_others_are_the_newest_and_only_of_what_the_table_knows():
    info = RunInfo(run="toy", schema="s", started=True, exchanged=True)
    membership = Membership(first_row(node_id(0), "n0", 1, ()))
    peer = replace(first_row(node_id(1), "n1", 1, ()), runs=(info,))
    membership.merge([peer])
    table = ReportTable(membership)

    def report(node, run, serial, step, age_ms=0):
        return Report(node=node, run=run, serial=serial, age_ms=age_ms, figures=figures(step))

    table.heard([report(node_id(1), "toy", 5, 50, age_ms=2000)], 10.0)
    table.heard([report(node_id(1), "toy", 4, 40)], 10.0)
    assert table.of(node_id(1), "toy", 11.0) == (figures(50), 3.0)
    table.heard([report(node_id(1), "other", 1, 1), report(node_id(9), "toy", 1, 1)], 10.0)
    table.heard([report(node_id(1), "toy", 2 << 32, 9), report(node_id(0), "toy", 9, 9)], 10.0)
    assert table._count == 1, "no such run there, no such member, and no such serial yet"
    assert table.of(node_id(1), "toy", 11.0) == (figures(50), 3.0)
    told = [table.news(10.0) for _ in range(TELLINGS + 1)]
    assert told[-1] is None, "everybody has heard it"
    assert told[0].reports[0].age_ms == 2000
    gone = replace(peer, state=State.DEAD)
    membership.merge([gone])
    table.row_changed(gone)
    assert table.of(node_id(1), "toy", 11.0) is None
    assert table._count == 0


def test_figures_that_are_as_old_as_the_wire_can_say_are_handed_on_in_frames_that_are_taken():
    membership = Membership(first_row(node_id(0), "n0", 1, ()))
    membership.merge(crowd(1))
    table = ReportTable(membership)
    old = Report(node=node_id(1), run="toy", serial=5, age_ms=2**63, figures=figures(50))
    table.heard([old], 10.0)
    news = table.news(12.0)
    assert wire.decode(wire.encode(news)[wire.PREFIX_BYTES :]) == news
    assert news.reports[0].age_ms == AGE_LIMIT_MS + 2000


def test_reports_are_numbered_above_what_others_remember_of_a_lost_incarnation():
    info = RunInfo(run="toy", schema="s", started=True, exchanged=True)
    membership = Membership(replace(first_row(node_id(0), "n0", 1, ()), runs=(info,)))
    table, serials = ReportTable(membership), []
    for now in (0.0, 10.0):
        table.publish("toy", figures(1), now)
        serials.append(table.news(now).reports[0].serial)
        membership.merge([replace(membership.own, incarnation=7, state=State.DEAD)])
    assert [serial >> 32 for serial in serials] == [1, 8]


def crowd(count):
    """The rows of so many members that train."""
    info = RunInfo(run="toy", schema="s", started=True, exchanged=True)
    rows = [
        first_row(node_id(index), f"node-{index}", 1, (Address("192.168.100.200", 7710),))
        for index in range(1, count + 1)
    ]
    return [replace(row, runs=(info,)) for row in rows]


def test_figures_cross_a_large_mesh_in_seconds_at_a_flat_cost():
    rng, rows, seconds = Random(3), crowd(64), 15
    tables = []
    for row in rows:
        membership = Membership(row)
        membership.merge(rows)
        tables.append(ReportTable(membership))
    most = 0
    for second in range(seconds):
        now = float(second)
        for table in tables:
            table.publish("toy", figures(second), now)
        for index, table in enumerate(tables):
            # A probe of one of 16 neighbours, and its answer.
            near = tables[(index + 1 + 7 * rng.randrange(16)) % len(tables)]
            for here, there in ((near, table), (table, near)):
                news = here.news(now)
                if news is not None:
                    most = max(most, len(news.reports))
                    there.heard(news.reports, now)
    assert most == REPORTS_LIMIT
    ages = [t.of(r.node, "toy", float(seconds)) for t in tables for r in rows]
    assert None not in ages, "everybody knows of everybody"
    assert sorted(age for _, age in ages)[len(ages) // 2] < 10, "half are younger than that"


# ---------------------------------------------------------------------------------------- memory


def test_what_a_node_remembers_does_not_grow_with_its_uptime():
    curve = Curve()
    for second in range(100_000):
        curve.add(Point(float(second), second, 0.5, None, 0, 0, 0))
    points = curve.points()
    assert len(points) <= POINTS_LIMIT
    assert (points[0].uptime_s, points[-1].step) == (0.0, 99_999), "the whole life, to its end"
    gaps = [b.uptime_s - a.uptime_s for a, b in pairwise(points)]
    assert max(gaps[:-1]) == min(gaps[:-1]) == curve.interval_s
    few = curve.points(10)
    assert len(few) == 10
    assert (few[0], few[-1]) == (points[0], points[-1])

    async def main(rng):
        journal = Journal(str)
        for number in range(5000):
            journal.record("exchange" if number % 10 else "up", f"event {number}")
            journal.line(f"line {number}")
        kept = journal.events(0, 10_000)
        assert len(kept) == EXCHANGES_KEPT + EVENTS_KEPT - (EVENTS_KEPT - 500)
        assert [e.sequence for e in kept] == sorted(e.sequence for e in kept)
        assert sum(e.kind == "up" for e in kept) == 500, "exchanges pushed none of them out"
        assert len(journal.notes) == LINES_KEPT
        after = journal.events(kept[-3].sequence, 10)
        assert [e.text for e in after] == ["event 4998", "event 4999"]
        for _ in range(100):
            journal.refused("tls")
        assert sum(e.kind == "refused" for e in journal.events(0, 10_000)) == 1
        await trio.sleep(11)
        journal.refused("tls")
        assert "(100 times)" in journal.events(0, 10_000)[-1].text

    run_seeded(main, 1)


def test_a_speed_is_of_the_last_seconds_and_falls_when_nothing_comes():
    meter = Meter()
    for second in range(100):
        assert meter.mark(Mark(float(second), 50 * second, 1000 * second, 0))
        assert not meter.mark(Mark(second + 0.5, 50 * second, 0, 0))
    now = Mark(99.0, 99 * 50, 99_000, 0)
    assert meter.rates(now) == (50.0, 1000.0, 0.0)
    later = meter.rates(now._replace(at_s=990.0))
    assert 0 < later.samples_s < 1


def test_a_follower_wakes_when_something_happens_and_gives_up_when_nothing_does():
    async def main(rng):
        async with memory_mesh(rng, 1) as mesh:
            await trio.sleep(1)
            shell = Shell(mesh.nodes[1])
            seen = await shell.ask("events")
            began = trio.current_time()
            nothing = await shell.ask("events", since=seen["next"], wait_s=5.0)
            assert trio.current_time() - began == pytest.approx(5.0)
            assert (nothing["events"], nothing["next"]) == ([], seen["next"])
            async with trio.open_nursery() as nursery:

                async def later():
                    await trio.sleep(2)
                    mesh.start(2)

                nursery.start_soon(later)
                news = await shell.ask("events", since=seen["next"], wait_s=20.0)
            assert [(e["kind"], e["node"]) for e in news["events"]] == [("up", node_id(2))]
            assert trio.current_time() - began < 10
            mesh.crash(2)
            await until(lambda: mesh.states(1)["n2"] == "dead")
            kinds = [e["kind"] for e in (await shell.ask("events", since=seen["next"]))["events"]]
            assert kinds == ["up", "dead"]
            assert (await shell.ask("logs"))["lines"][-1]["text"].startswith(
                "n2 (node02aa) is dead"
            )

    run_seeded(main, 8)


# ------------------------------------------------------------------------------- pause, set, bench


def test_a_paused_run_averages_with_nobody_until_it_is_resumed():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            players = [await mesh.attach(i, X * i) for i in (1, 2)]
            await until(lambda: all(p.begun and p.node.exchanged(p.run) for p in players))
            shell = Shell(mesh.nodes[1])
            await trio.sleep(5)
            await shell.ask("pause")
            await trio.sleep(1)
            counters = [[p.run.counters.completed for p in players] for p in players]
            events = (await shell.ask("events"))["next"]
            for _ in range(10):
                await players[0].post(1.0, waits=True)
                await trio.sleep(0.5)
                assert not players[0].run.ours, "its training waits for nobody"
                await players[1].post(0.0)
            assert [[p.run.counters.completed for p in players] for p in players] == counters
            assert players[1].run.counters.refused > 0
            assert players[0].weights[0] > players[1].weights[0]
            told = (await shell.ask("events", since=events))["events"]
            assert not [e for e in told if e["kind"] == "exchange"], "it begins nothing"
            assert (await shell.ask("status"))["runs"][0]["paused"] is True
            await shell.ask("resume")
            await until(lambda: abs(players[0].weights - players[1].weights).max() < 1e-6)

            await shell.ask("set", every=3)
            await players[0].run.offer()
            players[0].run.take_back()
            await players[0].run.offer()
            assert players[0].events[-1]["every"] == 3
            assert (await shell.ask("status"))["runs"][0]["every"] == 3
            history = await shell.ask("history")
            assert history["runs"][0]["run"] == "toy"
            assert len(history["runs"][0]["points"]) >= 3

    run_seeded(main, 9)


def test_a_bench_is_bounded_in_bytes_on_both_ends_and_one_at_a_time():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await until(lambda: knows_all(mesh, 1, 2), 5.0)
            shell = Shell(mesh.nodes[1])
            found = await shell.ask("bench", target="n2", bytes=3 * BLOCK_BYTES - 1)
            assert found["sent_bytes"] == found["received_bytes"] == 3 * BLOCK_BYTES
            assert found["round_trips"] == 50
            began = trio.current_time()
            long = await shell.ask("bench", target="n2", bytes=2**30, seconds=0.2)
            assert trio.current_time() - began < 1.0
            assert 0 < long["sent_bytes"] < 2**30
            with pytest.raises(UsageError, match="bytes"):
                await shell.ask("bench", target="n2", bytes=2**31)

            other = mesh.nodes[1].members()[1]
            first = await mesh.nodes[1].connect_bulk(other)

            async def nothing(part, share):
                pass

            await measure(first.stream, first.reader, total_bytes=1, seconds=1.0, progress=nothing)
            with pytest.raises(MeshError, match="another bench"):
                await shell.ask("bench", target="n2", bytes=1)
            await first.stream.aclose()
            await trio.sleep(1)
            await shell.ask("bench", target="n2", bytes=1)

    run_seeded(main, 10)


def test_how_far_a_bench_between_two_others_came_is_told_to_whoever_asked_for_it():
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await until(lambda: knows_all(mesh, 1, 3), 5.0)
            shell, came = Shell(mesh.nodes[1]), []
            Shell(mesh.nodes[2])

            async def hear(progress):
                came.append(progress)

            order = {"op": "bench", "of": "n2", "target": "n3", "bytes": 2**30, "seconds": 2.0}
            written = await shell.answers.answer({**order, "progress": True}, hear)
            assert fits(json.loads(written))["node"]["name"] == "n2"
            assert {one["part"] for one in came} >= {"sending", "receiving"}
            sent = [one["share"] for one in came if one["part"] == "sending"]
            assert sent == sorted(sent)
            assert 0 < sent[0] < sent[-1] <= 1

            came.clear()
            quick = await shell.answers.answer(order, hear)
            assert (json.loads(quick)["ok"], came) == (True, []), (
                "who did not ask for it is not told"
            )
            for junk in ('{"progress": {"part": 7, "share": 1}}', "[" * 9999, '{"progress": null}'):
                told = partial(_told, junk)
                mesh.nodes[1].desk.ask = told
                with trio.move_on_after(1.0):
                    await shell.answers._follow(node_id(2), hear)
            assert came == []
            mesh.nodes[1].desk.ask = partial(
                _told, '{"progress": {"part": "\\u001b[2J", "share": 1e9}}'
            )
            with trio.move_on_after(0.3):
                await shell.answers._follow(node_id(2), hear)
            assert came == [{"part": "", "share": 1.0}], "nothing of it reaches the terminal"

    run_seeded(main, 12)


async def _told(text, *question):
    return ev.Told(number=1, text=text, hops=0, failure="")


def test_a_bench_without_end_is_ended_by_the_other_end(monkeypatch):
    monkeypatch.setattr("mesh.bench.ANSWER_LIMIT_BYTES", 2 * BLOCK_BYTES)

    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await until(lambda: knows_all(mesh, 1, 2), 5.0)
            with pytest.raises(MeshError, match="n2"):
                await Shell(mesh.nodes[1]).ask("bench", target="n2", bytes=4 * BLOCK_BYTES)
            assert mesh.nodes[2].statistics().refused == {"protocol": 1}

    run_seeded(main, 11)


SAME = 1.2
"""A tenth more or less is what a ring and a curve are full of at the moment; a leak of something in each second
would be three times as much."""

POINT_BYTES = 8 * 40
"""A curve is half full or full."""


def size_of(*roots):
    """(objects, bytes) that can be reached from there, less what all of Python and all of the simulation
    share, and trio's."""
    shared = (
        type,
        ModuleType,
        FunctionType,
        BuiltinFunctionType,
        MethodType,
        Random,
        Path,
        JumpClock,
    )
    seen, left, count = {}, [*roots], 0
    while left:
        one = left.pop()
        kind = type(one)
        foreign = kind.__module__.startswith(("trio", "mesh.net.simulated"))
        if id(one) in seen or foreign or isinstance(one, shared):
            continue
        seen[id(one)] = one  # held, so that no other gets its number
        count += sys.getsizeof(one)
        left += gc.get_referents(one)
    return len(seen), count


def test_a_node_that_lived_ten_times_longer_keeps_and_answers_no_more(monkeypatch):
    """The deployed limits, 64 times lower, so that a minute fills them."""
    limits = [(journal, ("EVENTS_KEPT", "EXCHANGES_KEPT", "LINES_KEPT")), (history, ("POINTS_LIMIT",))]  # fmt: skip
    for module, names in limits:
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) // 64)

    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            shell, others = Shell(mesh.nodes[1]), Shell(mesh.nodes[2])
            players = [await mesh.attach(index, X * index) for index in (1, 2)]

            async def live(seconds):
                for second in range(seconds):
                    for player in players if second % 2 else ():
                        if player.begun is not None:
                            await player.run.offer()
                            player.steps, player.loss = player.steps + 1, 1 / (1 + player.steps)
                            await player.post()
                    match second % 10:
                        case 3:  # a machine is switched off and on, again and again
                            mesh.network.crash(node_id(3))
                            mesh.crash(3)
                        case 6:
                            mesh.start(3)
                        case 9:  # and somebody asks
                            await shell.ask("history", of="n2")
                    mesh.notes.clear()
                    await trio.sleep(1)

            async def kept():
                node = mesh.nodes[1]
                answers = {op: await shell.ask(op) for op in ("status", "peers", "events", "logs", "history")}  # fmt: skip
                held = size_of(node.journal, node._protocol, node._links, node.desk, node._runs, shell.answers)  # fmt: skip
                lengths = {op: len(json.dumps(answer)) for op, answer in answers.items()}
                return held, lengths, answers

            await live(40)
            young, young_lengths, first = await kept()
            await live(360)
            old, old_lengths, last = await kept()
            assert others.left == []
            assert last["status"]["node"]["uptime_s"] > 9 * first["status"]["node"]["uptime_s"]
            for op, key in (("events", "events"), ("logs", "lines")):
                assert last[op][key][0]["seq"] > first[op][key][-1]["seq"], "all else is forgotten"
            assert (
                last["history"]["runs"][0]["points"][0] == first["history"]["runs"][0]["points"][0]
            )
            return young, old, young_lengths, old_lengths

    young, old, young_lengths, old_lengths = run_seeded(main, 11)
    for before, after in zip(young, old, strict=True):
        assert after <= SAME * before, (young, old)
    for op, length in old_lengths.items():
        assert length <= SAME * young_lengths[op] + POINT_BYTES, op
