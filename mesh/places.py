"""Where this user's files lie on this machine. Imports little: the `mesh` command asks here first."""

import contextlib
import os
import warnings
from pathlib import Path

import platformdirs

from mesh.errors import UsageError


def state_directory(given: str | os.PathLike[str] | None = None) -> Path:
    """Where a node's identity and state live: `given`, else $MESH_STATE, else this user's default.

    Raises UsageError where that is below a home directory that nobody knows.
    """
    chosen = given or os.environ.get("MESH_STATE")
    with contextlib.suppress(RuntimeError):
        if chosen:
            return Path(chosen).expanduser().absolute()
        path = platformdirs.user_state_path("gossipmesh") / "node"
        if path.is_absolute():  # some versions say ~ where they know no home
            return path
    raise UsageError("no home directory is known: name one with --state DIR or $MESH_STATE")


def host_directory() -> Path:
    """Where the nodes that run on this machine under this user are listed, one file each.

    Raises OSError where the only directory for it is another user's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without XDG_RUNTIME_DIR it is below /tmp, checked as ours
        return platformdirs.user_runtime_path("gossipmesh")
