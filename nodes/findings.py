"""One line of `mesh doctor`: what was looked at, how it is, what mends it."""

from dataclasses import asdict, dataclass
from typing import Any, Final

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Rule: whatever is not ok names its cure, as a command wherever there is one."""

    check: str
    level: str
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        assert self.level in (OK, WARN, FAIL)
        assert self.cure or self.level == OK, self.text

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "cure": self.cure or None}


def ok(check: str, text: str) -> Finding:
    return Finding(check=check, level=OK, text=text)


def warn(check: str, text: str, cure: str) -> Finding:
    return Finding(check=check, level=WARN, text=text, cure=cure)


def fail(check: str, text: str, cure: str) -> Finding:
    return Finding(check=check, level=FAIL, text=text, cure=cure)
