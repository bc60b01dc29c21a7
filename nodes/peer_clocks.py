"""Whether this machine's wall clock and those of its peers agree, for `mesh doctor`.

Rules: 1. It is asked while the network is looked at, and adds no time to that. 2. A clock that is wrong keeps
nobody from training: only ever a warning. 3. Who does not answer in time is left out.
An answer's trip: `mesh.history/1`, of no run -> its `time`, beside ours before and after -> Finding.
"""

import math
import threading
import time
from typing import Any, Final

import mesh
from nodes import text as words
from nodes.findings import Finding, ok, warn
from nodes.machine_checks import CLOCK_S, Case

ASKED_LIMIT: Final = 8
"""Peers, all at once: in a large mesh a few show as well as all whose clock it is."""

WITHIN_S: Final = 2.0
NO_RUN: Final = "-"
"""Of no run the history is short."""

CURE: Final = "sudo timedatectl set-ntp true"


class PeerClocks:
    """Asks from the moment that it is made."""

    def __init__(self, case: Case) -> None:
        self._node = case.node
        self.offsets: dict[str, float] = {}
        """seconds by which a peer's clock is ahead of ours, as far as that can be told; by name"""
        alive = [peer for peer in case.others if peer["state"] == "alive"]
        self._threads = [
            threading.Thread(target=self._ask, args=(peer,), daemon=True)
            for peer in alive[:ASKED_LIMIT]
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, peer: dict[str, Any]) -> None:
        assert self._node is not None
        before = time.time()
        try:
            answer = mesh.ask(
                self._node,
                "history",
                timeout_s=WITHIN_S,
                of=peer["id"],
                within_s=WITHIN_S / 2,
                run=NO_RUN,
                points=2,
            )
        except mesh.MeshError:
            return
        after, told = time.time(), answer.get("time")
        if isinstance(told, (int, float)) and math.isfinite(told):
            # It was read between our two moments: what lies within them is no difference.
            self.offsets[peer["name"]] = max(0.0, told - after) + min(0.0, told - before)

    def findings(self) -> list[Finding]:
        """Waits for those that are asked, at most WITHIN_S from when they were."""
        for thread in self._threads:
            thread.join(WITHIN_S)
        return compared(dict(self.offsets))


def compared(offsets: dict[str, float]) -> list[Finding]:
    """What the differences mean: where all others agree, it is this machine's clock that is wrong."""
    if not offsets:
        return []
    off = {name: by for name, by in offsets.items() if abs(by) > CLOCK_S}
    if not off:
        return [ok("clock", f"within a minute of those of {', '.join(sorted(offsets))}")]
    spread = max(off.values()) - min(off.values())
    if len(off) == len(offsets) > 1 and spread <= CLOCK_S:
        text = f"this machine's clock is {_told(-min(off.values(), key=abs))} those of its peers"
        return [warn("clock", text, CURE)]
    return [
        warn("clock", f"{name}'s clock is {_told(by)} this one", f"on {name}, or here: {CURE}")
        for name, by in sorted(off.items())
    ]


def _told(by: float) -> str:
    return f"{words.duration(abs(by))} {'ahead of' if by > 0 else 'behind'}"
