"""`mesh doctor`: finds what keeps this machine's node from working, and names what mends it.

An examination's trip: the node is asked -> torch starts in a child -> files, clock, limits -> the
network is looked at for some seconds -> findings -> lines, or `mesh.doctor/1`. Rules: 1. It works
with no node running, changes nothing and takes less than LIMIT_S. 2. Data goes to standard output,
progress to standard error. 3. The exit code is 4 where something fails, whatever only warns.
"""

import json
import sys
import time
from typing import Any, Final

import mesh
from nodes import machine_checks, network_checks
from nodes.findings import FAIL, OK, WARN, Finding
from nodes.machine_checks import PORT, TORCH_S, Case
from nodes.peer_clocks import PeerClocks

LIMIT_S: Final = 10.0
UNHEALTHY: Final = 4

SHOWN: Final = {OK: "ok", WARN: "warn", FAIL: "FAIL"}


def run(state: str | None, name: str | None, interfaces: tuple[str, ...], *, as_json: bool) -> int:
    """Examines this machine's node; returns the exit code. Raises MeshError."""
    case = machine_checks.open_case(state, name)
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"mesh: looking around, at most {LIMIT_S:.0f} s ...", file=sys.stderr)
    findings = examine(case, interfaces)
    print(json.dumps(as_object(case, findings)) if as_json else draw(findings))
    return UNHEALTHY if any(finding.level == FAIL for finding in findings) else 0


def examine(case: Case, interfaces: tuple[str, ...]) -> list[Finding]:
    """Every check, in the order in which a person would ask."""
    child, began = machine_checks.start_torch(), time.monotonic()
    try:
        identity, findings = machine_checks.identity(case.state)
        findings += machine_checks.process(case)
        findings += machine_checks.disk(case.state)
        findings += machine_checks.clock(case.state, time.time())
        findings += machine_checks.descriptors(case.node.pid if case.node else None)
        if case.status is None and not case.stuck:
            findings += machine_checks.port_is_free()
        ports = [mesh.parse_address(address).port for address in case.listens]
        findings += network_checks.local_firewall(ports[0] if ports else PORT)
        clocks = PeerClocks(case)
        seen = mesh.look_around(
            identity,
            interfaces=interfaces,
            listens=case.listens,
            addresses=network_checks.addresses_to_try(case),
        )
        findings += clocks.findings()
        findings += network_checks.Reading(case, identity, seen).findings()
        findings += machine_checks.torch(child, TORCH_S - (time.monotonic() - began))
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    return findings


def draw(findings: list[Finding]) -> str:
    """One line each, its cure below it."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{SHOWN[finding.level]:<4}  {finding.check:<{width}}  {finding.text}")
        if finding.cure:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.cure}")
    counts = {level: sum(f.level == level for f in findings) for level in SHOWN}
    lines.append("")
    lines.append(", ".join(f"{counts[level]} {SHOWN[level]}" for level in (FAIL, WARN, OK)))
    return "\n".join(lines)


def as_object(case: Case, findings: list[Finding]) -> dict[str, Any]:
    """`mesh.doctor/1`."""
    node = case.node
    return {
        "schema": "mesh.doctor/1",
        "state": str(case.state),
        "node": {"id": node.node, "name": node.name, "pid": node.pid} if node else None,
        "healthy": all(finding.level != FAIL for finding in findings),
        "findings": [finding.as_json() for finding in findings],
    }
