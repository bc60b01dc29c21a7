"""Three ways of averaging one model over n simulated machines: gossip, a ring, a parameter server.

All three run over the same simulated connections (mesh/net/simulated.py). Those have a bandwidth each;
a machine has one network card for all of them, so a Card is put before them: it carries BYTES_PER_S each
way, and whoever sends waits for a moment in which both cards are free. A trip: send_all -> 64 KiB of it ->
the sender's card and the receiver's are taken for as long as it lasts -> the connection, with its delay.
Rules: 1. Gossip is the deployed node with a played training; ring and server are as short as they can
be, know all machines beforehand and are connected before the first byte. 2. None of them meets a fault.
3. All is decided by one seed.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from random import Random
from statistics import median

import numpy as np
import trio
import trio.testing

from mesh.arrays import Floats
from mesh.core.address import Address
from mesh.core.messages import NodeId
from mesh.net.simulated import SimulatedDiscovery, SimulatedNetwork, SimulatedTransport, Weather
from mesh.net.transport import Handler, Stream
from mesh.node import Node
from mesh.player import RUN, Player
from mesh.replica import Replica
from mesh.runs import RunSpec
from mesh.simulated_mesh import address_of, node_id

ENTRIES = 2**16
FRAGMENT_ENTRIES = 2**14
MODEL_BYTES = 4 * ENTRIES
"""Four fragments of 64 KiB, so that an exchange is a stream and a thousand models fit."""

BYTES_PER_S = 3.125e6
"""25 Mbit/s, a poor Wi-Fi: the model takes 84 ms, as 10 MB take over 1 Gbit/s."""

PIECE_BYTES = 64 * 1024
LINKS = Weather(bytes_per_s=1e12)
"""Delays of 0.2 to 2 ms one way, no loss; the bandwidth is the card's."""

CLOSE = 0.01
"""Of the spread at the start: where replicas count as one."""

STAGES = ("round", "noise", "news")
"""One round; until the noise is down to CLOSE; until everybody is as near to the mean of the news."""

ROUNDS_LIMIT = 40
TOGETHER_S = 300.0
LOOK_S = 0.05


class Card:
    """One machine's network card, as far as it is taken, and what went through it."""

    def __init__(self) -> None:
        self.out_free_at = self.in_free_at = 0.0
        self.sent = self.received = 0


Cards = dict[NodeId, Card]


class CardStream:
    """A connection behind two cards. See mesh.net.transport.Stream."""

    offer = ""
    at_once_bytes = 1 << 62  # of any length

    def __init__(self, inner: Stream, own: Card, other: Card) -> None:
        self._inner = inner
        self._own, self._other = own, other
        self.peer, self.host = inner.peer, inner.host

    def seal(self, offer: str) -> "CardStream":
        return self

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = inf, *, head: bytes = b""
    ) -> None:
        view = memoryview(head + bytes(data))
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            begin = max(trio.current_time(), self._own.out_free_at, self._other.in_free_at)
            end = begin + len(piece) / BYTES_PER_S
            self._own.out_free_at = self._other.in_free_at = end
            self._own.sent += len(piece)
            self._other.received += len(piece)
            await trio.sleep_until(end)
            await self._inner.send_all(piece, timeout_s)

    async def receive_into(
        self, view: memoryview, timeout_s: float = inf, *, worth: int = 1
    ) -> int:
        return await self._inner.receive_into(view, timeout_s, worth=worth)

    async def aclose(self) -> None:
        await self._inner.aclose()


class CardTransport:
    """A machine's way into the network, through its card. See mesh.net.transport.Transport."""

    def __init__(self, network: SimulatedNetwork, index: int, cards: Cards) -> None:
        self.node = node_id(index)
        self._inner = SimulatedTransport(network, self.node, address_of(index))
        self._cards = cards
        cards[self.node] = Card()

    def _through(self, stream: Stream) -> CardStream:
        return CardStream(stream, self._cards[self.node], self._cards[stream.peer])

    async def serve(
        self, handler: Handler, listening: Callable[[tuple[Address, ...]], None]
    ) -> None:
        await self._inner.serve(lambda stream: handler(self._through(stream)), listening)

    async def connect(self, address: Address) -> CardStream:
        return self._through(await self._inner.connect(address))


@dataclass(slots=True, kw_only=True)
class Cost:
    """Of one round, or of all rounds until the replicas are one. Bytes are those that a machine sends
    and receives: of the one in the middle, and of the busiest."""

    rounds: int = 0
    seconds: float = 0.0
    bytes_each: float = 0.0
    bytes_busiest: float = 0.0
    cpu_s_each: float = 0.0


@contextmanager
def counted(cards: Cards, cost: Cost, machines: int) -> Iterator[None]:
    """Adds what happens meanwhile to the cost."""
    before = {node: card.sent + card.received for node, card in cards.items()}
    began, cpu = trio.current_time(), time.process_time()
    yield
    each = [card.sent + card.received - before[node] for node, card in cards.items()]
    cost.seconds += trio.current_time() - began
    cost.cpu_s_each += (time.process_time() - cpu) / machines
    cost.bytes_each += median(each)
    cost.bytes_busiest += max(each)
    cost.rounds += 1


def first_models(count: int, rng: Random) -> list[Floats]:
    """Even entries: noise, another on each machine. Odd ones: news, which machine 1 alone has."""
    chance = np.random.default_rng(rng.getrandbits(32))
    models = [chance.standard_normal(ENTRIES, dtype=np.float32) for _ in range(count)]
    for index, model in enumerate(models):
        model[1::2] = 0.0 if index else count
    return models


def spreads(models: list[Floats]) -> tuple[float, float]:
    """(how far the noise is from its mean, RMS; how far any machine is from the mean of the news,
    which is 1)."""
    noise = np.stack([model[0:2048:2] for model in models])
    news = np.array([model[1] for model in models])
    return float(noise.std(axis=0).mean()), float(np.abs(news - 1.0).max())


# ---------------------------------------------------------------------------------------- gossip


class GrowingNode(Node):
    """The deployed node, with shorter fragments."""

    def _make_replica(self, spec: RunSpec, entries: int) -> Replica:
        return Replica(entries, FRAGMENT_ENTRIES)


async def gossip(rng: Random, count: int) -> dict[str, Cost]:
    """Rounds of one hand-over, and so one exchange begun, on each machine."""
    network, cards = SimulatedNetwork(Random(rng.random()), LINKS), Cards()
    players = [Player(model) for model in first_models(count, rng)]
    async with trio.open_nursery() as nursery:
        nodes = []
        for index, player in enumerate(players, 1):
            transport = CardTransport(network, index, cards)
            node = GrowingNode(
                node=transport.node,
                name=f"n{index}",
                incarnation=1,
                transport=transport,
                discovery=SimulatedDiscovery(network, transport.node),
                candidates=(),
                rng=Random(rng.random()),
                store_incarnation=lambda _: None,
                note=lambda _: None,
            )
            nodes.append(node)
            nursery.start_soon(node.run)
            player.began, player._met = "again", True  # what they hold is averaged, not given
            await player.attach(node)
        with trio.fail_after(TOGETHER_S):
            while not all(n._protocol.partner_count(RUN) == count - 1 for n in nodes):  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
            while any(player.run.ours for player in players):  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
        costs = await _rounds(players, cards)
        nursery.cancel_scope.cancel()
    return costs


async def _rounds(players: list[Player], cards: Cards) -> dict[str, Cost]:
    count = len(players)
    total = Cost()
    costs: dict[str, Cost] = {}
    first_noise, _ = spreads([player.weights for player in players])
    for _ in range(ROUNDS_LIMIT):
        with counted(cards, total, count):
            for player in players:
                await player.post(waits=True)
            while any(player.run.ours for player in players):  # noqa: ASYNC110
                await trio.sleep(0.001)
        noise, news = spreads([player.weights for player in players])
        for stage, over in zip(
            STAGES, (True, noise <= CLOSE * first_noise, news <= CLOSE), strict=True
        ):
            if over and stage not in costs:
                costs[stage] = replace(total)
        if len(costs) == len(STAGES):
            break
    return costs


# -------------------------------------------------------------------------------- the other two


async def receive_exactly(stream: Stream, into: Floats) -> None:
    view = into.data.cast("B")
    while view:
        view = view[await stream.receive_into(view) :]


@asynccontextmanager
async def connected(
    transports: list[CardTransport], pairs: list[tuple[int, int]]
) -> AsyncIterator[dict[tuple[int, int], Stream]]:
    """A connection for each pair of machines; [a, b] is a's end, [b, a] is b's."""
    ends: dict[tuple[int, int], Stream] = {}
    numbers = {transport.node: index for index, transport in enumerate(transports)}

    async def keep(own: int, stream: Stream) -> None:
        ends[own, numbers[stream.peer]] = stream
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for index, transport in enumerate(transports):
            nursery.start_soon(transport.serve, partial(keep, index), lambda _: None)
        await trio.testing.wait_all_tasks_blocked()
        for dialler, listener in pairs:
            ends[dialler, listener] = await transports[dialler].connect(address_of(listener + 1))
        while len(ends) < 2 * len(pairs):  # noqa: ASYNC110 (two ends each)
            await trio.sleep(LOOK_S)
        yield ends
        nursery.cancel_scope.cancel()


async def ring(rng: Random, count: int) -> dict[str, Cost]:
    """All-reduce: n - 1 steps sum a part of the model each, n - 1 hand the sums round."""
    network, cards = SimulatedNetwork(Random(rng.random()), LINKS), Cards()
    models = first_models(count, rng)
    transports = [CardTransport(network, index + 1, cards) for index in range(count)]

    async def live(own: int, right: Stream, left: Stream) -> None:
        parts = np.array_split(models[own], count)
        for step in range(2 * (count - 1)):
            given, taken = parts[(own - step) % count], parts[(own - step - 1) % count]
            heard = np.empty_like(taken)
            async with trio.open_nursery() as both:
                both.start_soon(right.send_all, given.data)
                await receive_exactly(left, heard)
            taken[:] = heard + taken if step < count - 1 else heard
        models[own] /= count

    pairs = [(index, (index + 1) % count) for index in range(count)] if count > 2 else [(0, 1)]
    async with connected(transports, pairs) as ends:
        lives = [
            partial(live, own, ends[own, (own + 1) % count], ends[own, (own - 1) % count])
            for own in range(count)
        ]
        return await _once(lives, models, cards)


async def server(rng: Random, count: int) -> dict[str, Cost]:
    """One more machine, which trains nothing, takes every model and gives their mean back."""
    network, cards = SimulatedNetwork(Random(rng.random()), LINKS), Cards()
    models = first_models(count, rng)
    transports = [CardTransport(network, index + 1, cards) for index in range(count + 1)]
    total, waiting, whole = np.zeros(ENTRIES, dtype=np.float32), count, trio.Event()

    async def serve(stream: Stream) -> None:
        nonlocal waiting
        heard = np.empty_like(total)
        await receive_exactly(stream, heard)
        total[:] += heard
        waiting -= 1
        if not waiting:
            total[:] /= count
            whole.set()
        await whole.wait()
        await stream.send_all(total.data)

    async def work(own: int, stream: Stream) -> None:
        await stream.send_all(models[own].data)
        await receive_exactly(stream, models[own])

    pairs = [(index, count) for index in range(count)]
    async with connected(transports, pairs) as ends:
        lives = [partial(work, own, ends[own, count]) for own in range(count)]
        lives += [partial(serve, ends[count, own]) for own in range(count)]
        return await _once(lives, models, cards)


async def _once(
    lives: Sequence[Callable[[], Awaitable[None]]], models: list[Floats], cards: Cards
) -> dict[str, Cost]:
    """Both of them are exact: one round is all it takes."""
    cost = Cost()
    with counted(cards, cost, len(models)):
        async with trio.open_nursery() as nursery:
            for live in lives:
                nursery.start_soon(live)
    noise, news = spreads(models)
    assert max(noise, news) <= CLOSE, "it does not average"
    return dict.fromkeys(STAGES, cost)
