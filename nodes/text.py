"""Answers of a node as plain text for a terminal or a pipe; nothing is imported for it."""

import unicodedata
from typing import Any


def table(rows: list[list[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(fitted(cell, columns) for cell, columns in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def width(text: str) -> int:
    """Columns of a terminal that a text takes; some characters take two, some none."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def fitted(text: str, columns: int) -> str:
    """Cut or filled up with spaces to so many columns."""
    while width(text) > columns:
        text = text[:-1]
    return text + " " * (columns - width(text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def duration(seconds: float | None) -> str:
    """3.2 s, 4m10s, 2h14m, 3d2h; - where unknown."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)}m{int(seconds % 60):02}s"
    if hours < 24:
        return f"{int(hours)}h{int(minutes % 60):02}m"
    return f"{int(days)}d{int(hours % 24)}h"


def size(count: float) -> str:
    """1.2 MB and so on, in steps of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < (999.5 if unit == "B" else 999.95):  # what is rounded to 1000 is 1.0 of the next
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def figure(value: float | None, form: str = ".4g") -> str:
    """A number, or - where it is not known."""
    return "-" if value is None else format(value, form)


def status(answer: dict[str, Any]) -> str:
    """`mesh status`."""
    node, peers = answer["node"], answer["peers"]
    who = f"{node['name']} ({node['id'][:8]})  mesh {answer['mesh']['id']}"
    counts = [f"{count} {state}" for state, count in peers.items() if count or state == "alive"]
    flow = f"in {size(answer['in_bytes_s'])}/s  out {size(answer['out_bytes_s'])}/s"
    warnings = answer["health"]
    many = f"{len(warnings)} warning{'s' if len(warnings) > 1 else ''}: "
    lines = [
        f"{who}  up {duration(node['uptime_s'])}  v{node['version']}",
        f"health   {'ok' if not warnings else many + warnings[0]}",
        *(f"         {warning}" for warning in warnings[1:]),
        f"listens  {', '.join(node['addresses']) or 'nowhere: no network address yet'}",
        f"peers    {', '.join(counts)}     {flow}",
    ]
    for run in answer["runs"]:
        lines += _run(run)
    if not answer["runs"]:
        lines.append("run      none: `mesh run SCRIPT` trains")
    lines += [_exit(entry) for entry in answer["exits"][-3:]]
    refused = ", ".join(f"{count} {kind}" for kind, count in sorted(answer["refused"].items()))
    return "\n".join(lines + ([f"refused  {refused}"] if refused else []))


def _run(run: dict[str, Any]) -> list[str]:
    exchanges = run["exchanges"]
    drift = figure(run["drift"])
    if run["drift"] is not None and run["norm"]:
        drift += f" ({100 * run['drift'] / run['norm']:.2g} % of the weights' norm)"
    done = ", ".join(
        f"{exchanges[key]} {word}"
        for key, word in (
            ("completed", "begun"),
            ("answered", "answered"),
            ("resumed", "resumed"),
            ("failed", "failed"),
        )
    )
    moved = f"sent {size(run['bytes_sent'])}  received {size(run['bytes_received'])}"
    speed = f"{run['samples_s']:,.0f} samples/s"
    steps = f"step {run['step']:,} (mesh {run['mesh_step']:,})  loss {figure(run['loss'])}  {speed}"
    paused = "  paused: `mesh resume` goes on" if run["paused"] else ""
    last = "never"
    if run["last_exchange_s"] is not None:
        last = f"{duration(run['last_exchange_s'])} ago with {run['last_peer_name'] or '?'}"
    if run["last_duration_s"] is not None:
        last += f", {1000 * run['last_duration_s']:.0f} ms"
    return [
        f"run      {run['run']}  {steps}  training pid {run['pid']}{paused}",
        f"average  {last}; {done}; {run['partners']} partners",
        f"         drift {drift}  {moved}",
    ]


def _exit(entry: dict[str, Any]) -> str:
    code = entry["code"]
    how = f"exit {code}"
    if code is None:
        how = "ended without a word"
    elif code < 0:
        how = f"killed by signal {-code}"
    return f"exit     {entry['script']} (pid {entry['pid']}): {how}, {duration(entry['ago_s'])} ago"


def peers(answer: dict[str, Any], *, wide: bool = False) -> str:
    """`mesh peers`: this node first, with a star; wide shows ids and what the others train."""
    own = answer["node"]
    heads = ["", "NAME", "STATE", "ADDRESS", "VIA", "RTT", "STEP", "LOSS", "DRIFT", "SEEN"]
    rows = [heads + (["ID", "SAMPLES/S", "RUNS"] if wide else [])]
    address = own["addresses"][0] if own["addresses"] else "-"
    first = ["*", own["name"], "alive", address, "-", "-", *_figures(own["runs"]), "now"]
    rows.append(first + (_wide(own) if wide else []))
    for peer in answer["peers"]:
        rtt = "-" if peer["rtt_s"] is None else f"{1000 * peer['rtt_s']:.1f} ms"
        gone = peer["state"] not in ("alive", "suspect")
        seen = "-" if peer["seen_s"] is None else duration(peer["seen_s"])
        cells = [
            "",
            peer["name"],
            peer["state"],
            peer["addresses"][0] if peer["addresses"] else "-",
            peer["via"] or "-",
            rtt,
            *(["-", "-", "-"] if gone else _figures(peer["runs"])),
            _why(seen, peer["reason"]),
        ]
        rows.append(cells + (_wide(peer) if wide else []))
    for missing in answer["unreached"]:
        where = missing["address"]
        cells = [
            "",
            "-",
            "unreached",
            where,
            "peer",
            "-",
            "-",
            "-",
            "-",
            _why("-", missing["reason"]),
        ]
        rows.append(cells + (["-", "-", "-"] if wide else []))
    if len(rows) == 2:
        alone = "no other node yet: `mesh token` on the machine that made the mesh lets others join"
        return f"{table(rows)}\n{alone}"
    return table(rows)


def _why(seen: str, reason: str | None) -> str:
    if not reason:
        return seen
    return f"{seen} ({reason})" if seen != "-" else reason


def _figures(runs: list[dict[str, Any]]) -> list[str]:
    """STEP, LOSS, DRIFT of the first run that said anything."""
    run = next((run for run in runs if run["step"] is not None), None)
    if run is None:
        return ["-", "-", "-"]
    return [f"{run['step']:,}", figure(run["loss"], ".3g"), figure(run["drift"], ".3g")]


def _wide(node: dict[str, Any]) -> list[str]:
    speeds = [run["samples_s"] for run in node["runs"] if run["samples_s"] is not None]
    speed = f"{sum(speeds):,.0f}" if speeds else "-"
    return [node["id"][:8], speed, ", ".join(run["run"] for run in node["runs"]) or "-"]
