"""Commands that ask a running node: what is asked, how its answer is drawn.

Rules: 1. Nothing heavy is imported: cold commands answer in a tenth of a second. 2. One answer is one
JSON object, as the node gave it; a followed list is one object a line. 3. Whatever a node does, a
command ends in the time it gave.
A question's trip: cli.py -> act() -> Question.ask -> mesh.question() -> Question.draw, or JSON.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mesh
from nodes import listing, text

ANSWER_S = 5.0
FOLLOW_S = 10.0
"""A follower's question waits so long for news, then asks again."""

BENCH_SLACK_S = 6.0
"""Beyond a bench's own seconds, in which the node gives up by itself."""

PING_S = 2.2
"""For one round trip that does not come back, and the pause before the next."""

PING_COUNT, BENCH_MB, BENCH_S, PULL_PEERS = (1, 100), (1e-6, 1073), (0.1, 60), (1, 64)
"""What a node does: known here too, so that no figure is computed with that is none, or endless."""

BAR_COLUMNS = 30

Arguments = Any
"""What cli.py parsed; its home is there."""


class Question(NamedTuple):
    """One command."""

    ask: Callable[[Arguments], dict[str, Any]]
    draw: Callable[[dict[str, Any], Arguments], str]


def act(question: Question, arguments: Arguments) -> int:
    """Asks once and prints."""
    answer = question.ask(arguments)
    print(json.dumps(answer) if arguments.json else drawn(question, answer, arguments))
    return 0


def drawn(question: Question, answer: dict[str, Any], arguments: Arguments) -> str:
    """The answer as text. Raises MeshError where it makes no sense: another node's may not."""
    try:
        return question.draw(answer, arguments)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise mesh.MeshError(
            "the answer makes no sense here: is that node of this version?"
        ) from None


def asked(op: str, arguments: Arguments, more_s: float = 0.0, **fields: Any) -> dict[str, Any]:
    """One question to the node that the command means; `more_s`: what it takes beyond a moment."""
    given = {name: value for name, value in fields.items() if value is not None}
    answer = mesh.question(
        op, state=arguments.state, name=arguments.node, timeout_s=ANSWER_S + more_s, **given
    )
    answer.pop("ok", None)
    return answer


def _plain(op: str, draw: Callable[[dict[str, Any]], str]) -> Question:
    return Question(lambda arguments: asked(op, arguments), lambda answer, arguments: draw(answer))


def _followed(op: str, draw: Callable[[dict[str, Any]], str]) -> Question:
    def ask(arguments: Arguments) -> dict[str, Any]:
        return asked(op, arguments, limit=arguments.limit)

    return Question(ask, lambda answer, arguments: draw(answer))


def follow(op: str, arguments: Arguments) -> int:
    """`-f`: what there is, then each as it comes, until Ctrl-C; with --json one object a line."""
    key, schema, draw = FOLLOWED[op]
    since, wait_s = 0, 0.0
    while True:
        answer = asked(
            op,
            arguments,
            more_s=wait_s,
            since=since,
            wait_s=wait_s,
            limit=arguments.limit if not since else None,
        )
        for entry in answer[key]:
            print(json.dumps({"schema": schema, **entry}) if arguments.json else draw(entry))
        sys.stdout.flush()
        since, wait_s = max(since, answer["next"]), FOLLOW_S


def check(flag: str, value: float, limits: tuple[float, float]) -> None:
    """Raises UsageError for a number that is too small, too large, or none."""
    low, high = limits
    if not low <= value <= high:
        raise mesh.UsageError(f"{flag} {value:g}: {low:g}..{high:g}")


def _ping(arguments: Arguments) -> dict[str, Any]:
    check("--count", arguments.count, PING_COUNT)
    more_s = PING_S * arguments.count
    return asked("ping", arguments, more_s, target=arguments.target, count=arguments.count)


def _bench(arguments: Arguments) -> dict[str, Any]:
    check("--mb", arguments.mb, BENCH_MB)
    check("--seconds", arguments.seconds, BENCH_S)
    bar = _bar if sys.stderr.isatty() else None
    try:
        return asked(
            "bench",
            arguments,
            arguments.seconds + BENCH_SLACK_S,
            target=arguments.target,
            bytes=round(1e6 * arguments.mb),
            seconds=arguments.seconds,
            on_progress=bar,
        )
    finally:
        if bar is not None:
            print("\r\x1b[K", end="", file=sys.stderr)


def _bar(progress: dict[str, Any]) -> None:
    share = min(1.0, max(0.0, float(progress.get("share", 0.0))))
    full = round(share * BAR_COLUMNS)
    bar = "#" * full + "-" * (BAR_COLUMNS - full)
    print(
        f"\r\x1b[K{progress.get('part', '')!s:<12} {bar} {100 * share:3.0f} %",
        end="",
        file=sys.stderr,
    )
    sys.stderr.flush()


def _change(op: str) -> Question:
    def ask(arguments: Arguments) -> dict[str, Any]:
        return asked(op, arguments, run=arguments.run)

    return Question(ask, lambda answer, arguments: listing.done(answer))


def _set(arguments: Arguments) -> dict[str, Any]:
    name, equals, value = arguments.setting.partition("=")
    if name != "every" or not equals or not value.isdecimal() or len(value) > 9:
        raise mesh.UsageError(f"cannot set {arguments.setting!r}: there is every=STEPS")
    return asked("set", arguments, run=arguments.run, every=int(value))


def _ls(arguments: Arguments) -> dict[str, Any]:
    found = [
        {"id": n.node, "name": n.name, "pid": n.pid, "state": str(n.state)}
        for n in mesh.running_nodes()
    ]
    return {"schema": "mesh.ls/1", "nodes": found}


def leave(arguments: Arguments) -> dict[str, Any]:
    """`mesh leave -N`: another node stops; it stays a member."""
    return asked("leave", arguments)


FOLLOWED = {
    "events": ("events", "mesh.event/1", listing.event),
    "logs": ("lines", "mesh.log/1", listing.line),
}
"""Where the list is in the answer, the schema of one line, and how that is drawn."""

QUESTIONS = {
    "status": _plain("status", text.status),
    "peers": Question(
        partial(asked, "peers"), lambda answer, arguments: text.peers(answer, wide=arguments.wide)
    ),
    "runs": _plain("runs", listing.runs),
    "events": _followed("events", listing.events),
    "logs": _followed("logs", listing.logs),
    "ping": Question(_ping, lambda answer, arguments: listing.ping(answer)),
    "bench": Question(_bench, lambda answer, arguments: listing.bench(answer)),
    "pause": _change("pause"),
    "resume": _change("resume"),
    "set": Question(_set, lambda answer, arguments: listing.done(answer)),
    "ls": Question(_ls, lambda answer, arguments: listing.nodes(answer)),
}
