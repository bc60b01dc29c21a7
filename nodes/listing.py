"""Answers as plain text, beside those of text.py: runs, events, logs, ping, bench, what was done."""

import time
from typing import Any

from nodes.text import duration, figure, size, table


def runs(answer: dict[str, Any]) -> str:
    """`mesh runs`."""
    rows = [["RUN", "NODE", "STATE", "SCHEMA", "STEP", "LOSS", "DRIFT", "SAMPLES/S"]]
    for run in answer["runs"]:
        for rank, node in enumerate(run["nodes"]):
            rows.append(
                [
                    "" if rank else run["run"],
                    ("* " if node["own"] else "  ") + node["name"],
                    node["state"],
                    node["schema"][:8],
                    figure(node["step"], ","),
                    figure(node["loss"]),
                    figure(node["drift"]),
                    figure(node["samples_s"], ",.0f"),
                ]
            )
    if len(rows) == 1:
        return "no run in this mesh: `mesh run SCRIPT` trains"
    return table(rows)


def event(entry: dict[str, Any]) -> str:
    """One line of `mesh events`."""
    return f"{clock(entry['time'])}  {entry['kind']:<12} {entry['text']}"


def events(answer: dict[str, Any]) -> str:
    """`mesh events`."""
    return "\n".join(map(event, answer["events"]))


def line(entry: dict[str, Any]) -> str:
    """One line of `mesh logs`."""
    return f"{clock(entry['time'])}  {entry['text']}"


def logs(answer: dict[str, Any]) -> str:
    """`mesh logs`."""
    return "\n".join(map(line, answer["lines"]))


def clock(unix_s: float) -> str:
    """Of this machine: 14:03:07, and the day before it where that was not today."""
    then, now = time.localtime(unix_s), time.localtime()
    form = "%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M:%S"
    return time.strftime(form, then)


def ping(answer: dict[str, Any]) -> str:
    """`mesh ping`."""
    through = f", through {answer['hops']} other" if answer["hops"] else ""
    return (
        f"{answer['target']['name']}: {answer['received']} of {answer['sent']} answered{through}  "
        f"min {millis(answer['min_s'])}  avg {millis(answer['avg_s'])}  "
        f"max {millis(answer['max_s'])}"
    )


def bench(answer: dict[str, Any]) -> str:
    """`mesh bench`."""
    sent, received = answer["sent_bytes"], answer["received_bytes"]
    return "\n".join(
        [
            (
                f"{answer['node']['name']} - {answer['target']['name']}  "
                f"connected in {millis(answer['connect_s'])}"
            ),
            (
                f"round trip  min {millis(answer['min_s'])}  avg {millis(answer['avg_s'])}  "
                f"max {millis(answer['max_s'])}  ({answer['round_trips']} of them)"
            ),
            f"there       {size(answer['sent_bytes_s'])}/s  ({size(sent)})",
            f"back        {size(answer['received_bytes_s'])}/s  ({size(received)})",
        ]
    )


def millis(seconds: float | None) -> str:
    """0.812 ms; 1.5 s."""
    if seconds is None or seconds >= 0.9995:
        return duration(seconds)
    return f"{1000 * seconds:.3g} ms"


def done(answer: dict[str, Any]) -> str:
    """`mesh pause`, `resume`, `set`, `leave -N`."""
    what = {
        "pause": "paused: it trains on, and averages with nobody until `mesh resume`",
        "resume": "resumed",
        "set": f"every={answer.get('every')} from its next hand-over on",
    }
    name = answer["node"]["name"]
    if answer["did"] == "leave":
        return f"{name} stops"
    return "\n".join(f"{name}: {run} {what.get(answer['did'], '')}" for run in answer["runs"])


def nodes(answer: dict[str, Any]) -> str:
    """`mesh ls`."""
    rows = [["NAME", "ID", "PID", "STATE DIRECTORY"]]
    rows += [[n["name"], n["id"][:8], str(n["pid"]), n["state"]] for n in answer["nodes"]]
    return table(rows) if len(rows) > 1 else "no node runs here: `mesh up` starts one"


def seen(seconds: float | None) -> str:
    """How long ago; `now` under a tenth of a second."""
    return "now" if seconds is not None and seconds < 0.1 else duration(seconds)
