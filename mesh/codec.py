"""How numbers travel. A codec turns float32 into bytes and back; both ends of an exchange apply what
they decode from the very bytes that travelled, so rounding never changes the sum of all replicas.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Codec(Protocol):
    """One way of writing float32 entries. All buffers belong to the caller."""

    name: str

    def encoded_bytes(self, entries: int) -> int:
        """Bytes that `entries` numbers take."""

    def encode(self, values: Floats, out: memoryview) -> None:
        """Writes `values` (n,) into `out`, exactly encoded_bytes(n) long."""

    def decode(self, body: memoryview, out: Floats) -> Floats:
        """The numbers in `body`: a view of it where that costs nothing, else `out` (n,), filled."""


class Float32:
    """The numbers as they are, little-endian."""

    name = "f32"

    def encoded_bytes(self, entries: int) -> int:
        return 4 * entries

    def encode(self, values: Floats, out: memoryview) -> None:
        np.copyto(np.frombuffer(out, dtype="<f4"), values)

    def decode(self, body: memoryview, out: Floats) -> Floats:
        return np.frombuffer(body, dtype="<f4")
