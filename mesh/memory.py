"""What a node must remember from one start to the next: incarnations spent, and where peers were.

Rules: 1. A block of incarnations is used only after the disk has it: no two starts share one. 2. A
file that cannot be read is not a file that is gone: guessing from the clock could repeat a block. 3.
The wall clock is asked once in a node's life, and may be wrong by years.

    incarnation                       first incarnation that was never used
    peers.json                        addresses of the last peers
"""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mesh.core.address import Address
from mesh.core.membership import INCARNATION_BLOCK, INCARNATION_LIMIT
from mesh.disk import REAL_DISK, Disk, write_whole
from mesh.errors import MeshError, UsageError
from mesh.settings import parse_address

PEERS_KEPT: Final = 64

CLOCK_ORIGIN_S: Final = 1_577_836_800
"""2020-01-01 in Unix seconds: incarnations that begin with the clock stay credible until 2049."""

INCARNATION_CREDIBLE: Final = INCARNATION_LIMIT // 2
"""A file that says more was damaged, or a member of ill will raised us: begin from the clock."""

CLOCK_LIMIT: Final = INCARNATION_CREDIBLE - 2**27
"""The most that a clock is believed (2049): what begins there must be credible when it is read again,
after 100 000 restarts, or a clock that was years ahead and is right again would repeat a block."""


class Memory:
    """The files `incarnation` and `peers.json` of one state directory. Only under its lock."""

    def __init__(
        self,
        directory: Path,
        disk: Disk = REAL_DISK,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._disk = disk
        self._wall_clock = wall_clock
        self._owed: int | None = None

    def reserve_incarnations(self) -> int:
        """The first incarnation of a block that no process used before. Raises MeshError."""
        path = self._directory / "incarnation"
        try:
            first = int(self._disk.read(path).decode())
        except (FileNotFoundError, ValueError):
            first = 0
        except OSError as error:
            raise MeshError(f"cannot read {path}: {error.strerror}") from None
        if not 0 < first < INCARNATION_CREDIBLE:
            # New, or the file is gone while the node's key is kept: the clock is above what this
            # node used before, unless it is wrong; then the mesh's rumours of it raise it.
            first = min(max(1, int(self._wall_clock()) - CLOCK_ORIGIN_S), CLOCK_LIMIT)
        self.store_incarnation(first + INCARNATION_BLOCK)
        return first

    def store_incarnation(self, unused: int) -> None:
        """Keeps that incarnations below `unused` are spent. Raises MeshError; then catch_up() later.

        Until that works a restart may repeat an incarnation; it refutes what the mesh says of it.
        """
        self._owed = unused
        write_whole(self._directory / "incarnation", str(unused).encode(), self._disk)
        self._owed = None

    def catch_up(self) -> None:
        """Writes what store_incarnation() could not. Raises MeshError."""
        if self._owed is not None:
            self.store_incarnation(self._owed)

    def peers(self) -> list[Address]:
        """Addresses where peers were last time; empty if there is nothing readable."""
        found = self._read_json(self._directory / "peers.json")
        addresses = []
        for text in found[:PEERS_KEPT] if isinstance(found, list) else []:
            with contextlib.suppress(UsageError):
                addresses.append(parse_address(str(text)))
        return addresses

    def store_peers(self, addresses: list[Address]) -> None:
        """Raises MeshError."""
        data = json.dumps([str(address) for address in addresses]).encode()
        write_whole(self._directory / "peers.json", data, self._disk)

    def _read_json(self, path: Path) -> Any:
        try:
            return json.loads(self._disk.read(path))
        except (OSError, ValueError, RecursionError):
            return None
