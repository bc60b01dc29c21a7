"""Who a node is and where it listens. A file of its own: the shell needs it, and nothing else of the
core.
"""

from dataclasses import dataclass
from typing import NewType


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a node listens. `host` is a literal address, IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


NodeId = NewType("NodeId", str)
"""base32 of SHA-256 of a node's public key: 52 characters. Its first 8 are what people see."""
