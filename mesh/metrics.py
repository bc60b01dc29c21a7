"""Figures of a node as Prometheus text, served on 127.0.0.1. The only home of prometheus_client.

Rules: 1. Loaded for `mesh up --metrics PORT` only: a node without it stays light. 2. A page is made of
one Node.statistics(), in the node's own loop, where nothing else runs meanwhile: no thread, no
figures that are kept twice. 3. Whoever asks gets one answer and is closed; a request's length and
time, and how many may ask at once, are bounded.
A scrape's trip: connection -> _head() -> the collector asks the node -> generate_latest() -> closed.
"""

import errno
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mesh import __version__
from mesh.core.messages import PROTOCOL
from mesh.counters import BOUNDS_S, Durations
from mesh.errors import UsageError
from mesh.node import Node, NodeStatistics
from mesh.report import health
from mesh.run_statistics import RunStatistics

HOST: Final = "127.0.0.1"
PATH: Final = "/metrics"
TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_S: Final = 5.0
"""From a connection to its end: a scrape of the largest mesh takes some milliseconds."""

HEAD_LIMIT_BYTES: Final = 8192
CONNECTIONS_LIMIT: Final = 8

STATES: Final = ("alive", "suspect", "dead", "left", "incompatible")
"""All are always there, or a graph would have holes where nobody is dead."""


class Metrics(Collector):
    """Serves one node's figures."""

    def __init__(self, node: Node, mesh: str) -> None:
        """`mesh`: the id of the mesh, for people."""
        self._node = node
        self._mesh = mesh
        self._open = 0
        self._listeners: list[trio.SocketListener] = []
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # memory, CPU, descriptors: names that all know

    async def listen(self, port: int) -> None:
        """Raises UsageError where the port cannot be had."""
        try:
            self._listeners = await trio.open_tcp_listeners(port, host=HOST)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken" if taken else f"may not be used ({error.strerror})"
            raise UsageError(
                f"port {port} of {HOST} {why}; choose another with --metrics"
            ) from None

    async def serve(self) -> None:
        """Answers until cancelled; listen() first."""
        await trio.serve_listeners(self._serve_one, self._listeners)

    def page(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every figure of this moment; called by the library."""
        statistics = self._node.statistics()
        yield self._about(statistics)
        yield from _of_the_node(statistics)
        yield from _of_the_exchanges(statistics)
        yield from _of_the_runs(statistics.runs)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known when they are asked for, and never clash in our own registry."""
        return []

    def _about(self, statistics: NodeStatistics) -> Metric:
        own = statistics.protocol.own
        about = {
            "node": own.node,
            "name": own.name,
            "mesh": self._mesh,
            "version": __version__,
            "protocol": str(PROTOCOL),
        }
        return InfoMetricFamily("mesh_node", "Who this node is.", value=about)

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        async with stream:
            if self._open >= CONNECTIONS_LIMIT:
                return
            self._open += 1
            try:
                with trio.move_on_after(REQUEST_S):
                    await stream.send_all(self._answer(await _head(stream)))
            except trio.BrokenResourceError:
                pass  # whoever asked went away
            finally:
                self._open -= 1

    def _answer(self, head: bytes | None) -> bytes:
        if head is None:
            return _response("431 Request Header Fields Too Large")
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request")
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", extra="Allow: GET, HEAD\r\n")
        if target.partition(b"?")[0].decode(errors="replace") != PATH:
            return _response("404 Not Found", f"the figures are at {PATH}\n".encode())
        return _response("200 OK", self.page(), kind=TEXT, only_head=method == b"HEAD")


async def _head(stream: trio.SocketStream) -> bytes | None:
    """A request's lines up to the empty one; None if they are too long. A request that breaks off is
    what came of it."""
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) > HEAD_LIMIT_BYTES:
            return None
        piece = await stream.receive_some(HEAD_LIMIT_BYTES)
        if not piece:
            break
        head += piece
    return head


def _response(
    status: str,
    body: bytes = b"",
    *,
    kind: str = "text/plain; charset=utf-8",
    extra: str = "",
    only_head: bool = False,
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if only_head else body)


# -------------------------------------------------------------------------------------- figures


def _of_the_node(statistics: NodeStatistics) -> Iterator[Metric]:
    uptime = "Seconds since this node started."
    yield GaugeMetricFamily("mesh_uptime_seconds", uptime, value=statistics.uptime_s)
    warnings = "Warnings of `mesh status`; 0 where all is well."
    yield GaugeMetricFamily("mesh_warnings", warnings, value=len(health(statistics)))
    score = "0: well; up to 7: this node runs late or hears badly."
    yield GaugeMetricFamily("mesh_local_health", score, value=statistics.protocol.local_health)
    states = [peer.state for peer in statistics.protocol.peers]
    peers = GaugeMetricFamily("mesh_peers", "Other nodes, by state.", labels=["state"])
    for state in STATES:
        peers.add_metric([state], states.count(state))
    yield peers
    refused = CounterMetricFamily("mesh_refused", "What was turned away.", labels=["kind"])
    for kind, count in sorted(statistics.refused.items()):
        refused.add_metric([kind], count)
    yield refused
    dropped = "Messages that did not fit into a slow peer's outbox."
    yield CounterMetricFamily("mesh_dropped_messages", dropped, value=statistics.dropped)


def _of_the_exchanges(statistics: NodeStatistics) -> Iterator[Metric]:
    totals = statistics.totals
    every = [totals.ended, *(run.counters for run in statistics.runs)]
    began = CounterMetricFamily(
        "mesh_exchanges", "Exchanges that this node began, by how they ended.", labels=["outcome"]
    )
    seconds = HistogramMetricFamily(
        "mesh_exchange_seconds", "How long those took.", labels=["outcome"]
    )
    for outcome, durations in totals.exchanges.items():
        began.add_metric([outcome.value], sum(durations.counts))
        seconds.add_metric([outcome.value], _buckets(durations), durations.total_s)
    yield began
    yield seconds
    answered = "Exchanges that other nodes began with this one."
    yield CounterMetricFamily(
        "mesh_exchanges_answered", answered, value=sum(counters.answered for counters in every)
    )
    resumed = "Exchanges that went on after a lost connection."
    yield CounterMetricFamily(
        "mesh_exchanges_resumed", resumed, value=sum(counters.resumed for counters in every)
    )
    left_out = "Hand-overs and fragments that were not finite and were left out."
    yield CounterMetricFamily(
        "mesh_non_finite", left_out, value=sum(counters.non_finite for counters in every)
    )
    moved = CounterMetricFamily(
        "mesh_bytes", "Bytes of exchanges, with headers, without TLS.", labels=["direction"]
    )
    moved.add_metric(["sent"], sum(counters.bytes_sent for counters in every))
    moved.add_metric(["received"], sum(counters.bytes_received for counters in every))
    yield moved


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    """Prometheus counts cumulatively: how many took at most so long."""
    bounds = [*map(str, BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(durations.counts), strict=True))


def _of_the_runs(runs: Iterable[RunStatistics]) -> Iterator[Metric]:
    families: dict[str, Metric] = {}

    def gauge(name: str, help: str, run: RunStatistics, value: float | None) -> None:
        family = families.setdefault(name, GaugeMetricFamily(name, help, labels=["run"]))
        if value is not None:  # not known yet: no sample, rather than a wrong one
            family.add_sample(name, {"run": run.spec.run}, value)

    for run in runs:
        gauge("mesh_step", "Steps that the training made.", run, run.step)
        gauge("mesh_samples", "Samples that it took in.", run, run.samples)
        gauge("mesh_loss", "Its last loss.", run, run.loss)
        gauge("mesh_partners", "Nodes that it averages with.", run, run.partners)
        gauge("mesh_drift", "RMS distance of the replicas to their mean.", run, run.drift)
        gauge("mesh_norm", "Norm of the weights, to compare the drift with.", run, run.norm)
    yield from families.values()
