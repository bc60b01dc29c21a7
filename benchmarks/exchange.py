"""How fast two nodes average a model, as a multiple of what the wire itself takes.

    python -m benchmarks.exchange [--nodes N] [--load N] [--only raw,f32] [--quick] [--json]

Contenders, each a set of processes on this machine's loopback: raw (two blocking threads for each
connection: the wire), gloo (torch.distributed's all_reduce, neither encrypted nor authenticated),
plain (this project without encryption; no user can choose it), f32, bf16, int8 (as deployed: TLS
greeting, sealed records). A round runs each once, one after the other; a ratio is the median over the
rounds of (contender / raw of the same round), because the machine's speed changes while one waits.
`--load N`: N busy Python processes beside them, and raw under the same load.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator

from benchmarks.figures import Figure, median, parser, present, run
from benchmarks.machine import Machine, Process, cpu_s, machine

ENTRIES = 25_000_000
ENTRIES_QUICK = 300_000
WARM_UP = 2
ROUNDS = 11
ROUNDS_QUICK = 3

CONTENDERS = ("raw", "gloo", "plain", "f32", "bf16", "int8")
OVER_RAW = {"plain": 1.6, "f32": 2.5}
OVER_GLOO = {"plain": 1.0, "f32": 1.4}
WIRE = {"f32": 1.001, "bf16": 0.501, "int8": 0.26}


def part(own: Machine, *arguments: object) -> Process:
    """One process of a contender."""
    return own.spawn("-m", "benchmarks.contenders", *map(str, arguments))


class Contender:
    """Parts that do one thing together when told to go."""

    def __init__(self, parts: list[Process], starters: list[Process]) -> None:
        self._parts = parts
        self._starters = starters
        self.seconds: list[float] = []
        self.cpu_s: list[float] = []
        self.bytes_sent: list[int] = []

    def go(self) -> None:
        before = sum(cpu_s(part.pid) for part in self._parts)
        for part in self._starters:
            part.tell(go=True)
        heard = [part.hear() for part in self._starters]
        self.seconds.append(max(each["seconds"] for each in heard))
        self.cpu_s.append(sum(cpu_s(part.pid) for part in self._parts) - before)
        self.bytes_sent.append(heard[0].get("bytes", 0))


def raw(own: Machine, entries: int, nodes: int) -> Contender:
    parts = [part(own, "raw", entries) for _ in range(nodes)]
    ports = [each.hear()["ready"] for each in parts]
    pairs = 1 if nodes == 2 else nodes  # two nodes are one connection, more are a ring
    for rank, each in enumerate(parts):
        following = ports[(rank + 1) % nodes] if rank < pairs else None
        each.tell(next=following, accept=int(rank > 0 or pairs > 1))
    for each in parts:
        each.hear()
    return Contender(parts, parts)


def gloo(own: Machine, entries: int, nodes: int) -> Contender:
    file = own.root / "gloo"
    parts = [part(own, "gloo", entries, rank, nodes, file) for rank in range(nodes)]
    for each in parts:
        each.hear()
        each.tell(go=True)
    for each in parts:
        each.hear()
    return Contender(parts, parts)


def gossip(own: Machine, entries: int, nodes: int, kind: str, codec: str) -> Contender:
    """A mesh of its own. Two nodes: the first begins. More: each begins with the next, at once."""
    states = [own.member(f"{kind}{rank}") for rank in range(nodes)]
    parts = [part(own, "node", entries, state, kind, codec) for state in states]
    ports = [each.hear()["ready"] for each in parts]
    for each in parts:
        each.tell(peers=ports, others=nodes - 1)
    ids = [each.hear()["ready"] for each in parts]
    for rank, each in enumerate(parts):
        each.tell(partner=ids[(rank + 1) % nodes])
    for each in parts:
        each.hear()
    return Contender(parts, parts[:1] if nodes == 2 else parts)


@contextlib.contextmanager
def contenders(
    names: list[str], entries: int, nodes: int, load: int
) -> Iterator[dict[str, Contender]]:
    made: dict[str, Contender] = {}
    with contextlib.ExitStack() as machines:
        for each in names:
            own = machines.enter_context(machine())
            if each == "raw":
                made[each] = raw(own, entries, nodes)
            elif each == "gloo":
                made[each] = gloo(own, entries, nodes)
            elif each == "plain":
                made[each] = gossip(own, entries, nodes, "plain", "f32")
            else:
                made[each] = gossip(own, entries, nodes, "sealed", each)
        own = machines.enter_context(machine())
        for _ in range(load):
            part(own, "busy").hear()
        yield made


def measure(names: list[str], *, entries: int, rounds: int, nodes: int, load: int) -> list[Figure]:
    """Of each contender: seconds, CPU seconds, ratios, bytes on the wire over the model's."""
    with contenders(names, entries, nodes, load) as made:
        for turn in range(WARM_UP + rounds):
            for name in made:
                print(
                    f"\rround {turn + 1} of {WARM_UP + rounds}: {name:6}", end="", file=sys.stderr
                )
                made[name].go()
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    figures = []
    for name, contender in made.items():
        seconds = contender.seconds[WARM_UP:]
        cpu = statistics.mean(contender.cpu_s[WARM_UP:])
        figures.append(
            Figure(
                name=name,
                value=1000 * median(seconds),
                worst=1000 * max(seconds),
                unit="ms",
                rounds=rounds,
                note=f"{1000 * cpu:.0f} ms of CPU, both ends",
            )
        )
        for other, goals in (("raw", OVER_RAW), ("gloo", OVER_GLOO)):
            if other not in made or name in ("raw", "gloo"):
                continue
            theirs = made[other].seconds[WARM_UP:]
            ratios = [mine / its for mine, its in zip(seconds, theirs, strict=True)]
            figures.append(
                Figure(
                    name=f"{name} / {other}",
                    value=median(ratios),
                    worst=max(ratios),
                    unit="",
                    goal=goals.get(name) if nodes == 2 else None,
                    rounds=rounds,
                )
            )
        if nodes == 2 and any(contender.bytes_sent):  # in a ring each answers as well
            figures.append(
                Figure(
                    name=f"{name}: wire / model",
                    value=statistics.median(contender.bytes_sent) / (4 * entries),
                    unit="",
                    goal=WIRE.get(name),
                    rounds=rounds,
                )
            )
    return figures


def main() -> int:
    flags = parser("exchange", "how fast two nodes average 100 MB, beside the wire itself")
    flags.add_argument("--nodes", type=int, default=2, help="more than two make a ring")
    flags.add_argument("--load", type=int, default=0, help="busy Python processes beside them")
    flags.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by comma")
    chosen = flags.parse_args()
    names = chosen.only.split(",")
    if unknown := set(names) - set(CONTENDERS):
        flags.error(f"no contender {min(unknown)!r}; there are: {', '.join(CONTENDERS)}")
    figures = measure(
        names,
        entries=ENTRIES_QUICK if chosen.quick else ENTRIES,
        rounds=ROUNDS_QUICK if chosen.quick else ROUNDS,
        nodes=chosen.nodes,
        load=chosen.load,
    )
    return present("exchange", figures, chosen, nodes=chosen.nodes, busy=chosen.load)


if __name__ == "__main__":
    run(main)
