"""Where this user's files lie on this machine. Imports little: the `mesh` command asks here first."""

import os
import warnings
from pathlib import Path

import platformdirs


def state_directory(given: str | os.PathLike[str] | None = None) -> Path:
    """Where a node's identity and state live: `given`, else $MESH_STATE, else this user's default."""
    chosen = given or os.environ.get("MESH_STATE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_state_path("gossipmesh") / "node"


def host_directory() -> Path:
    """Where the nodes that run on this machine under this user are listed, one file each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without XDG_RUNTIME_DIR it is below /tmp, checked as ours
        return platformdirs.user_runtime_path("gossipmesh")
