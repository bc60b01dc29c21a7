"""What `mesh up --metrics PORT` serves: figures that are true, on 127.0.0.1 only, within limits."""

import http.client
import socket
import sys
import time

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from mesh.core.events import Outcome
from mesh.counters import BOUNDS_S, Counters, Durations, Totals
from mesh.metrics import CONNECTIONS_LIMIT, HEAD_LIMIT_BYTES, Metrics
from nodes.cli import main
from tests.helpers import QUIET, Host, free_port, until
from tests.mesh_in_memory import memory_mesh, run_seeded
from tests.mesh_in_memory import until as until_virtually


def samples(page):
    """(name, sorted labels) -> value of every sample on a page."""
    families = list(text_string_to_metric_families(page.decode()))
    found = [sample for family in families for sample in family.samples]
    read = {(s.name, *sorted(s.labels.items())): s.value for s in found}
    assert len(read) == len(found), "a sample is there twice"
    return read


def test_a_page_says_what_the_node_did_and_goes_on_counting_when_a_training_ends():
    async def life(rng):
        async with memory_mesh(rng, 2) as mesh:
            players = [await mesh.attach(i, [i, 0.0, -i]) for i in (1, 2)]
            run = players[0].run
            await until_virtually(lambda: all(p.begun for p in players))

            async def trained():
                for player in players:
                    await player.post(1.0)
                return run.counters.completed >= 2 and run.counters.answered >= 2

            while not await trained():  # noqa: ASYNC110 (in virtual time)
                await trio.sleep(0.1)
            run.step, run.loss = 7, 0.25
            page = Metrics(mesh.nodes[1], "lab").page
            before, statistics = samples(page()), mesh.nodes[1].statistics()
            await mesh.nodes[1].detach(run)
            return before, statistics, samples(page())

    before, statistics, after = run_seeded(life, 3)
    run, counters = statistics.runs[0], statistics.runs[0].counters
    assert before["mesh_peers", ("state", "alive")] == 1
    assert before["mesh_peers", ("state", "dead")] == 0
    assert before["mesh_step", ("run", "toy")] == 7
    assert before["mesh_loss", ("run", "toy")] == 0.25
    assert before["mesh_drift", ("run", "toy")] == run.drift
    assert before["mesh_uptime_seconds",] == statistics.uptime_s
    assert before["mesh_bytes_total", ("direction", "sent")] == counters.bytes_sent > 0
    done = ("outcome", "completed")
    assert before["mesh_exchanges_total", done] == counters.completed
    assert before["mesh_exchanges_answered_total",] == counters.answered
    assert before["mesh_exchange_seconds_count", done] == counters.completed
    assert before["mesh_exchange_seconds_sum", done] > 0
    about = next(key for key in before if key[0] == "mesh_node_info")
    assert ("mesh", "lab") in about
    assert not any(("run", "toy") in key for key in after), "the run is gone"
    counted = [key for key in before if key[0].endswith("_total") and "process" not in key[0]]
    assert len(counted) > 8
    assert all(after[key] >= before[key] for key in counted), "a counter never goes back"


def test_durations_are_counted_under_the_first_bound_that_holds_them():
    durations = Durations()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[0] * 1.01, BOUNDS_S[-1], 1e9):
        durations.add(seconds)
    assert durations.counts[:2] == [2, 1]
    assert durations.counts[-2:] == [1, 1]
    assert sum(durations.counts) == 5


def test_what_ended_runs_counted_is_added_up():
    totals = Totals()
    totals.run_ended(Counters(completed=2, bytes_sent=10))
    totals.run_ended(Counters(completed=1, bytes_received=5))
    assert totals.ended == Counters(completed=3, bytes_sent=10, bytes_received=5)
    assert set(totals.exchanges) == set(Outcome)


# ------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def served():
    """(host, node, port): a node that serves its figures."""
    host, port = Host(), free_port()
    host.member("a")
    host.member("b")
    yield host, host.up("a", "--metrics", port), port
    host.close()


def ask(port, request):
    """The whole answer to raw bytes; empty where the node closed without a word."""
    with socket.create_connection(("127.0.0.1", port), 5.0) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


def test_a_scrape_gets_a_page_and_whatever_else_is_asked_gets_a_reason(served):
    _, node, port = served
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    client.request("GET", "/metrics")
    answer = client.getresponse()
    page = answer.read()
    assert (answer.status, answer.getheader("Content-Type")) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )
    read = samples(page)
    assert read["mesh_uptime_seconds",] > 0
    assert read["process_resident_memory_bytes",] > 1e6
    assert ("node", node.id) in next(key for key in read if key[0] == "mesh_node_info")

    head = ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head.endswith(b"\r\n\r\n")
    for request, status in (
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../secret HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01 hello\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 3 * HEAD_LIMIT_BYTES, 431),
    ):
        assert ask(port, request).startswith(f"HTTP/1.1 {status} ".encode()), request[:40]


def test_the_figures_are_for_this_machine_only_and_for_a_few_at_a_time(served):
    _, node, port = served
    listening = socket.socket()
    with listening:  # any other address of loopback: the port is free there
        listening.bind(("127.0.0.2", port))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS_LIMIT)]
    deadline = time.monotonic() + 5.0
    while ask(port, b"GET /metrics HTTP/1.1\r\n\r\n"):
        assert time.monotonic() < deadline, "more than the limit are answered at once"
    for connection in silent:
        connection.close()
    until(lambda: ask(port, b"GET /metrics HTTP/1.1\r\n\r\n"), "there is room again")
    assert node.answers()


def test_a_port_that_is_taken_or_a_library_that_is_missing_is_one_line(served, monkeypatch, capsys):
    """In this process, to be quick."""
    host, _, port = served

    def up(port):
        code = main(["up", "--state", str(host.state("b")), *QUIET, "--metrics", str(port)])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    taken = up(port)
    assert f"port {port} of 127.0.0.1 is taken" in taken
    assert "--metrics" in taken
    monkeypatch.delitem(sys.modules, "mesh.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert "gossipmesh[metrics]" in up(free_port())
    assert "1..65535" in up(0)
