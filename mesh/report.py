"""What a node says of itself to the shell: versioned JSON, `mesh.status/1` and `mesh.peers/1`.

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
from mesh.core.messages import PROTOCOL
from mesh.core.statistics import PeerStatistics
from mesh.node import NodeStatistics
from mesh.runs import RunStatistics

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


def status(
    statistics: NodeStatistics, *, mesh: str, state: str, exits: Sequence[Exit]
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
        },
        "mesh": {"id": mesh},
        "health": health(statistics),
        "peers": {
            kind: states.count(kind) for kind in ("alive", "suspect", "dead", "incompatible")
        },
        "runs": [_run(run) for run in statistics.runs],
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


def peers(statistics: NodeStatistics) -> dict[str, Any]:
    """`mesh.peers/1`: every other member, and whoever cannot be talked to, with the reason."""
    return {
        "schema": "mesh.peers/1",
        "node": {"id": statistics.protocol.own.node, "name": statistics.protocol.own.name},
        "peers": [_peer(peer) for peer in statistics.protocol.peers if peer.state != "left"],
        "unreached": [
            {"address": str(address), "reason": reason}
            for address, reason in statistics.protocol.unreached
        ],
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


def _run(run: RunStatistics) -> dict[str, Any]:
    counters = asdict(run.counters)
    return {
        "run": run.spec.run,
        "schema": run.spec.schema,
        "script": run.spec.script,
        "pid": run.spec.pid,
        "entries": sum(math.prod(entry.shape) for entry in run.spec.entries),
        "every": run.spec.every,
        "weight": run.spec.weight,
        "codec": run.spec.codec,
        "began": run.how,
        "step": run.step,
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
        "runs": [asdict(info) for info in peer.runs],
    }
