"""The processes that benchmarks/exchange.py lets run against each other; one process, one part.

A part's trip: start -> {"ready": ...} with where it listens -> {"go to": ...} from the parent -> one
line of JSON for each "go". Rules: 1. Every part moves the same bytes: one model there, one back.
2. A part only reports how long it took; ratios are the parent's. 3. Nothing leaves the loopback.
"""

import contextlib
import json
import math
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import numpy as np
import trio

from mesh.arrays import Floats
from mesh.core import events as ev
from mesh.core.address import Address
from mesh.core.messages import Member, SchemaEntry, State
from mesh.identity import load, node_of
from mesh.net import tcp
from mesh.net.sockets import SocketStream
from mesh.node import Node
from mesh.runs import RunSpec

HOST = "127.0.0.1"
RUN = "bench"
BEGUN_S = 60.0


def say(**what: Any) -> None:
    """One answer to the parent."""
    print(json.dumps(what), flush=True)


def hear() -> dict[str, Any]:
    """The parent's next word; ends this process where the parent is gone."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    heard: dict[str, Any] = json.loads(line)
    return heard


def raw(entries: int) -> None:
    """The wire itself: for each connection one thread that sends and one that receives."""
    length = 4 * entries
    listener = socket.create_server((HOST, 0))
    say(ready=listener.getsockname()[1])
    todo = hear()
    connections = []
    if todo["next"] is not None:
        connections.append(socket.create_connection((HOST, todo["next"])))
    connections += [listener.accept()[0] for _ in range(todo["accept"])]
    outgoing = memoryview(np.ones(entries, dtype=np.float32)).cast("B")
    incoming = [memoryview(bytearray(length)) for _ in connections]

    def receive(connection: socket.socket, into: memoryview) -> None:
        while len(into):
            into = into[connection.recv_into(into) :]

    say(ready=True)
    while hear():
        began = time.perf_counter()
        threads = [threading.Thread(target=c.sendall, args=(outgoing,)) for c in connections]
        threads += [
            threading.Thread(target=receive, args=(c, into))
            for c, into in zip(connections, incoming, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(seconds=time.perf_counter() - began)


def gloo(entries: int, rank: int, world: int, file: str) -> None:
    """torch.distributed's all_reduce of the same tensor, unencrypted, without averaging."""
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    say(ready=0)
    hear()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    tensor = torch.ones(entries)
    say(ready=True)
    while hear():
        began = time.perf_counter()
        dist.all_reduce(tensor)
        say(seconds=time.perf_counter() - began)
        tensor.fill_(1.0)


class Bare(SocketStream):
    """Bytes as they are, a head and its data by one call as in a sealed stream."""

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = math.inf, *, head: bytes = b""
    ) -> None:
        with contextlib.suppress(BlockingIOError):
            sent = self._socket.sendmsg([head, data])
            head, data = head[sent:], memoryview(data)[max(0, sent - len(head)) :]
        await super().send_all(data, timeout_s, head=head)


def leave_bare(stream: tcp.TlsStream, offer: str) -> tcp.Stream:
    """In place of TlsStream.seal(), only here: after the greeting, bare bytes."""
    below = stream.bare()
    return Bare(below._socket, below.peer, below.host)


def node(entries: int, state: str, kind: str, codec: str) -> None:
    """A deployed node with one run of `entries` and no training: exchanges on demand."""
    if kind == "plain":
        tcp.TlsStream.seal = leave_bare  # type: ignore[method-assign]
    trio.run(_node, entries, Path(state), codec)


async def _node(entries: int, state: Path, codec: str) -> None:
    identity = load(state)
    transport = tcp.TcpTransport(
        server=identity.context(server=True),
        client=identity.context(server=False),
        node_of=node_of,
        refused=lambda kind: None,
        port=None,
        interfaces=("lo",),
    )
    me = Node(
        node=identity.node,
        name=identity.name,
        incarnation=1,
        transport=transport,
        discovery=None,
        candidates=(),
        rng=SystemRandom(),
        store_incarnation=lambda unused: None,
        note=lambda line: None,
    )
    model: Floats = np.zeros(entries, dtype=np.float32)
    rng = np.random.default_rng(int(identity.node[:4], 36))
    for part in np.array_split(model, 64):
        part[:] = rng.standard_normal(len(part), dtype=np.float32)
    begun = trio.Event()

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            begun.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(me.run)
        await me.listening.wait()
        say(ready=me.addresses[0].port)
        todo = await trio.to_thread.run_sync(hear)
        for port in todo["peers"]:
            me._offer_event(ev.CandidateFound(addresses=(Address(HOST, port),), source="peer"))
        spec = RunSpec(
            run=RUN,
            entries=(SchemaEntry(name="w", shape=(entries,), dtype="float32"),),
            weight=1.0,
            every=8,
            sync_timeout_s=2.0,
            pid=os.getpid(),
            script="",
            codec=codec,
        )
        run = await me.attach(spec, model, np.empty_like(model), tell)
        with trio.fail_after(BEGUN_S):
            await begun.wait()
            while len(_living(me)) < todo["others"]:  # noqa: ASYNC110 (nothing says it)
                await trio.sleep(0.05)
        say(ready=str(identity.node))
        partner = (await trio.to_thread.run_sync(hear))["partner"]
        say(ready=True)
        while True:
            # A blocking read of a pipe in a thread: the node's loop goes on meanwhile.
            await trio.to_thread.run_sync(hear)
            me._protocol._averaging._exchange += 1  # numbers of a node only rise, whoever begins
            number = me._protocol._averaging._exchange
            before = run.counters.bytes_sent, run.counters.completed
            began = time.perf_counter()
            await me._initiator.initiate(
                ev.StartExchange(
                    run=RUN,
                    peer=partner,
                    exchange=number,
                    pull=False,
                    addresses=_living(me)[partner].addresses,
                )
            )
            took = time.perf_counter() - began
            if run.counters.completed <= before[1]:
                raise SystemExit("an exchange did not complete")
            say(seconds=took, bytes=run.counters.bytes_sent - before[0])


def _living(me: Node) -> dict[str, Member]:
    others = me._protocol.peers.membership.others
    return {node: row for node, row in others.items() if row.state is State.ALIVE}


def busy() -> None:
    """A training that holds the GIL: a core's worth of Python."""
    say(ready=True)
    rng = Random(1)
    while not select.select([sys.stdin], [], [], 0)[0]:  # until its input ends
        for _ in range(100_000):
            rng.random()


if __name__ == "__main__":
    part, *arguments = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        if part == "raw":
            raw(int(arguments[0]))
        elif part == "gloo":
            gloo(int(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3])
        elif part == "node":
            node(int(arguments[0]), *arguments[1:4])
        else:
            busy()
