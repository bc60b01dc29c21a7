"""Where this user's files lie on this machine, on Linux and on macOS.

Rules: 1. What an environment variable names is taken only where it is an absolute path. 2. A directory
that others can write to is never believed. Imports next to nothing: the `mesh` command asks here first.
"""

import os
import stat
import sys
from pathlib import Path

NAME = "gossipmesh"


def state_directory(given: str | os.PathLike[str] | None = None) -> Path:
    """Where a node's identity and state live: `given`, else $MESH_STATE, else this user's default."""
    chosen = given or os.environ.get("MESH_STATE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path("~/Library/Application Support").expanduser() / NAME / "node"
    base = _named("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return base / NAME / "node"


def host_directory() -> Path:
    """Where the nodes that run on this machine under this user are listed, one file each.

    It need not exist yet; is_ours() says whether to believe what is there.
    """
    if sys.platform == "darwin":
        return Path("~/Library/Caches/TemporaryItems").expanduser() / NAME
    named = _named("XDG_RUNTIME_DIR")
    if named is not None and (is_ours(named) or not os.path.lexists(named)):
        return named / NAME
    usual = Path(f"/run/user/{os.getuid()}")
    if is_ours(usual):
        return usual / NAME
    import tempfile  # 5 ms, for a login without systemd only

    return Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}"


def is_ours(path: Path) -> bool:
    """A directory of this user's that nobody else can write to; no link to one."""
    try:
        status = path.lstat()
    except OSError:
        return False
    directory = stat.S_ISDIR(status.st_mode)
    return directory and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _named(variable: str) -> Path | None:
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else None
