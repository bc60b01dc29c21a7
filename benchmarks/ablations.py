"""Parts of the failure detector that can be taken out, to measure what each is worth.

Rules: 1. Each replaces one function of the deployed code while its context lasts, and nothing else.
2. ABLATIONS names them; "" takes out nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

from mesh.core.detector import Detector
from mesh.core.health import LAG_S, Health
from mesh.core.messages import NodeId


def _permutation(detector: Detector, now: float) -> NodeId | None:
    probed = {probe.node for probe in detector._probes.values() if probe.asker is None}
    for _ in range(2):
        while detector._round:
            node = detector._round.pop()
            if node in detector._watches and node not in probed:
                return node
        detector._round = list(detector._watches)
        detector._rng.shuffle(detector._round)
    return None


@contextlib.contextmanager
def plain_swim() -> Iterator[None]:
    """Probes go round in a random permutation; who was just heard is not passed over."""
    with patch.object(Detector, "_choose", _permutation):
        yield


def _counts_only(health: Health, lag_s: float) -> float:
    if lag_s > LAG_S:
        health.change(+1)
    return 0.0


@contextlib.contextmanager
def without_patience() -> Iterator[None]:
    """Probes stay as fast and as strict as those of a node that is well."""
    with patch.object(Health, "multiplier", property(lambda health: 1)):
        yield


@contextlib.contextmanager
def without_forgiveness() -> Iterator[None]:
    """A node that was stopped itself goes by deadlines that passed meanwhile."""
    with patch.object(Health, "forgiven_s", _counts_only):
        yield


@contextlib.contextmanager
def without_second_chance() -> Iterator[None]:
    """A member that refuted a suspicion a moment ago is waited for no longer than any other."""
    with patch.object(Health, "chances", lambda health, node, now: 1):
        yield


@contextlib.contextmanager
def without_local_health() -> Iterator[None]:
    """None of these."""
    with without_patience(), without_forgiveness(), without_second_chance():
        yield


ABLATIONS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "plain SWIM order": plain_swim,
    "no patience": without_patience,
    "no forgiveness": without_forgiveness,
    "no second chance": without_second_chance,
    "no local health": without_local_health,
}
PARTS = ("", "no patience", "no forgiveness", "no second chance", "no local health")
WHOLE = ("", "no local health")
