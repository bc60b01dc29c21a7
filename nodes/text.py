"""Answers of a node as plain text for a terminal or a pipe; nothing is imported for it."""

from typing import Any


def table(rows: list[list[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float | None) -> str:
    """3.2 s, 4m10s, 2h14m, 3d2h; - where unknown."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)}m{int(seconds % 60):02}s"
    if hours < 24:
        return f"{int(hours)}h{int(minutes % 60):02}m"
    return f"{int(days)}d{int(hours % 24)}h"


def size(count: float) -> str:
    """1.2 MB and so on, in steps of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
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
    lines = [
        f"{who}  up {duration(node['uptime_s'])}  v{node['version']}",
        f"listens  {', '.join(node['addresses']) or 'nowhere: no network address yet'}",
        f"health   {'ok' if not answer['health'] else answer['health'][0]}",
        *(f"         {warning}" for warning in answer["health"][1:]),
        f"peers    {', '.join(counts)}",
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
    steps = f"step {run['step']:,} (mesh {run['mesh_step']:,})  loss {figure(run['loss'])}  {run['samples']:,} samples"
    return [
        f"run      {run['run']}  {steps}  training pid {run['pid']}",
        f"average  {done}; {run['partners']} partners; last {duration(run['last_exchange_s'])} ago",
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


def peers(answer: dict[str, Any]) -> str:
    """`mesh peers`."""
    rows = [["NAME", "ID", "STATE", "ADDRESS", "VIA", "RTT", "SEEN", "RUNS"]]
    for peer in answer["peers"]:
        rtt = "-" if peer["rtt_s"] is None else f"{1000 * peer['rtt_s']:.1f} ms"
        rows.append(
            [
                peer["name"],
                peer["id"][:8],
                peer["state"],
                peer["addresses"][0] if peer["addresses"] else "-",
                peer["via"] or "-",
                rtt,
                duration(peer["seen_s"]),
                peer["reason"] or ", ".join(run["run"] for run in peer["runs"]) or "-",
            ]
        )
    for missing in answer["unreached"]:
        rows.append(
            ["-", "-", "unreached", missing["address"], "peer", "-", "-", missing["reason"]]
        )
    if len(rows) == 1:
        return "no other node yet: `mesh token` on the machine that made the mesh lets others join"
    return table(rows)
