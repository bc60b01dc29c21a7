"""What a node says of itself to the shell, as versioned JSON: `mesh.status/1`, `mesh.peers/1`,
`mesh.runs/1`.

What it remembers is in records.py; the schemas of all answers lie in docs/schemas/.

Rules: 1. Fields are only ever added to a version. 2. Ids are strings, times are seconds, sizes are
bytes, what is unknown is null. 3. Numbers that JSON cannot write (NaN) are null.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from mesh import __version__
from mesh.core.address import Address
from mesh.core.messages import PROTOCOL, RunInfo
from mesh.core.statistics import PeerStatistics
from mesh.history import Rates
from mesh.node import NodeStatistics
from mesh.run_statistics import RunStatistics

POOR_HEALTH: Final = 3
"""Local health from which a person should know: probes take four times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a training ended that was attached, or that `mesh run` started."""

    run: str | None
    script: str
    pid: int
    code: int | None
    """exit code; negative: killed by that signal; None: not known"""
    at_s: float
    """on the node's clock"""


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    """Cores: a thousandth is more than anybody reads."""
    return None if value is None or not math.isfinite(value) else round(value, 3)


def status(
    statistics: NodeStatistics,
    *,
    mesh: str,
    state: str,
    exits: Sequence[Exit],
    allow_control: bool,
    load: float | None,
    cpu: float | None,
) -> dict[str, Any]:
    """`mesh.status/1`."""
    own = statistics.protocol.own
    states = [peer.state for peer in statistics.protocol.peers]
    return {
        "schema": "mesh.status/1",
        "node": {
            "id": own.node,
            "name": own.name,
            "pid": os.getpid(),
            "version": __version__,
            "protocol": PROTOCOL,
            "state": state,
            "addresses": [str(address) for address in own.addresses],
            "incarnation": str(own.incarnation),
            "uptime_s": round(statistics.uptime_s, 3),
            "local_health": statistics.protocol.local_health,
            "allow_control": allow_control,
            "load": _number(load),
            "cpu": _rounded(cpu),
        },
        "mesh": {"id": mesh},
        "health": health(statistics),
        "peers": {
            kind: states.count(kind) for kind in ("alive", "suspect", "dead", "incompatible")
        },
        "in_bytes_s": round(sum(run.rates.in_bytes_s for run in statistics.runs), 1),
        "out_bytes_s": round(sum(run.rates.out_bytes_s for run in statistics.runs), 1),
        "runs": [_run(run, statistics) for run in statistics.runs],
        "exits": [
            {
                "run": e.run,
                "script": e.script,
                "pid": e.pid,
                "code": e.code,
                "ago_s": round(statistics.uptime_s - e.at_s, 1),
            }
            for e in exits
        ],
        "refused": statistics.refused,
        "dropped_messages": statistics.dropped,
        "notes": list(statistics.notes[-10:]),
    }


def peers(statistics: NodeStatistics, *, load: float | None, cpu: float | None) -> dict[str, Any]:
    """`mesh.peers/1`: every other member, and whoever cannot be talked to, with the reason."""
    return {
        "schema": "mesh.peers/1",
        "node": {
            "id": statistics.protocol.own.node,
            "name": statistics.protocol.own.name,
            "addresses": [str(address) for address in statistics.protocol.own.addresses],
            "load": _number(load),
            "cpu": _rounded(cpu),
            "runs": [_own_run(run, statistics) for run in statistics.runs],
        },
        "peers": [_peer(peer) for peer in statistics.protocol.peers if peer.state != "left"],
        "unreached": [
            {"address": str(address), "reason": reason}
            for address, reason in statistics.protocol.unreached
        ],
    }


def runs(statistics: NodeStatistics) -> dict[str, Any]:
    """`mesh.runs/1`: every run of the mesh, and the nodes that train it."""
    own = statistics.protocol.own
    found: dict[str, list[dict[str, Any]]] = {}
    for run in statistics.runs:
        about = {"id": own.node, "name": own.name, "state": "alive", "own": True}
        row = {key: value for key, value in _own_run(run, statistics).items() if key != "run"}
        found.setdefault(run.spec.run, []).append({**about, **row})
    for peer in statistics.protocol.peers:
        if peer.state == "left":
            continue
        about = {"id": peer.node, "name": peer.name, "state": peer.state, "own": False}
        for info in peer.runs:
            row = {key: value for key, value in _run_info(peer, info).items() if key != "run"}
            found.setdefault(info.run, []).append({**about, **row})
    return {
        "schema": "mesh.runs/1",
        "node": {"id": own.node, "name": own.name},
        "runs": [{"run": name, "nodes": nodes} for name, nodes in sorted(found.items())],
    }


def health(statistics: NodeStatistics) -> list[str]:
    """Warnings, each with its cure; empty when all is well."""
    warnings = [
        f"peer {address}: {reason} (is `mesh up` running there, and its port open?)"
        for address, reason in statistics.protocol.unreached
    ]
    warnings += [
        f"{name} seen by mDNS but TCP {_why(address, reason)} (firewall? run `mesh doctor`)"
        for name, address, reason in statistics.protocol.undialled
    ]
    warnings += [
        f"{peer.name} is incompatible: {peer.reason}"
        for peer in statistics.protocol.peers
        if peer.state == "incompatible"
    ]
    warnings += [
        f"run {run.spec.run} diverged: {run.counters.non_finite} hand-overs or fragments were not "
        "finite and were left out; lower the learning rate"
        for run in statistics.runs
        if run.counters.non_finite
    ]
    if statistics.protocol.local_health >= POOR_HEALTH:
        warnings.append(
            "this node runs late or hears badly: is the machine overloaded, or its network down? "
            "It waits longer before it calls others dead"
        )
    if not statistics.protocol.own.addresses:
        warnings.append("no network address: waiting for an interface to come up")
    return warnings


def _why(address: Address, reason: str) -> str:
    """Why a dial failed, in a few words."""
    for words in ("refused", "does not answer"):
        if words in reason:
            return f"{address} {words}"
    return f"{address} fails: {reason.removeprefix(f'{address}: ')}"


def _run(run: RunStatistics, statistics: NodeStatistics) -> dict[str, Any]:
    counters = asdict(run.counters)
    names = {peer.node: peer.name for peer in statistics.protocol.peers}
    return {
        "run": run.spec.run,
        "schema": run.spec.schema,
        "script": run.spec.script,
        "pid": run.spec.pid,
        "entries": sum(math.prod(entry.shape) for entry in run.spec.entries),
        "every": run.every,
        "paused": run.paused,
        "weight": run.spec.weight,
        "codec": run.spec.codec,
        "strategy": run.spec.strategy,
        "began": run.how,
        "step": run.step,
        "mesh_step": run.mesh_step,
        "loss": _number(run.loss),
        "samples": run.samples,
        "partners": run.partners,
        "exchanges": counters,
        "bytes_sent": counters.pop("bytes_sent"),
        "bytes_received": counters.pop("bytes_received"),
        "drift": _number(run.drift),
        "norm": _number(run.norm),
        "last_exchange_s": _number(run.last_exchange_s),
        "last_peer": run.last_peer,
        "last_peer_name": names.get(run.last_peer) if run.last_peer else None,
        "last_duration_s": _number(run.last_duration_s),
        **_rates(run.rates),
    }


def _rates(rates: Rates) -> dict[str, float]:
    return {
        "samples_s": round(rates.samples_s, 2),
        "out_bytes_s": round(rates.out_bytes_s, 1),
        "in_bytes_s": round(rates.in_bytes_s, 1),
    }


def _own_run(run: RunStatistics, statistics: NodeStatistics) -> dict[str, Any]:
    """A run of this node, in the words that it uses for its peers'."""
    info = next((i for i in statistics.protocol.own.runs if i.run == run.spec.run), None)
    return {
        "run": run.spec.run,
        "schema": run.spec.schema,
        "started": info is not None and info.started,
        "exchanged": info is not None and info.exchanged,
        "progress": info.progress if info else 0,
        "step": run.step,
        "loss": _number(run.loss),
        "drift": _number(run.drift),
        **_rates(run.rates),
        "age_s": 0.0,
    }


def _run_info(peer: PeerStatistics, info: RunInfo) -> dict[str, Any]:
    """A peer's run, with the figures that it told last; null where it has not."""
    figures, age_s = peer.figures.get(info.run, (None, None))
    return {
        **asdict(info),
        "step": figures.step if figures else None,
        "loss": figures.loss if figures else None,
        "drift": figures.drift if figures else None,
        "samples_s": round(figures.samples_s, 2) if figures else None,
        "out_bytes_s": round(figures.out_bytes_s, 1) if figures else None,
        "in_bytes_s": round(figures.in_bytes_s, 1) if figures else None,
        "age_s": None if age_s is None else round(age_s, 1),
    }


def _peer(peer: PeerStatistics) -> dict[str, Any]:
    return {
        "id": peer.node,
        "name": peer.name,
        "state": peer.state,
        "reason": peer.reason or None,
        "addresses": [str(address) for address in peer.addresses],
        "via": peer.via,
        "rtt_s": peer.rtt_s,
        "seen_s": peer.silent_for_s,
        "incarnation": str(peer.incarnation),
        "load": next((said.load for said, _ in peer.figures.values()), None),
        "cpu": next((_rounded(said.cpu) for said, _ in peer.figures.values()), None),
        "runs": [_run_info(peer, info) for info in peer.runs],
    }
