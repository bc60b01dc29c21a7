"""Where a node listens. A file of its own: the shell needs it, and nothing else of the core."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a node listens. `host` is a literal address, IPv6 without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
