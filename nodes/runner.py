"""`mesh run` and `mesh leave`: programs around a node process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import mesh

LINGER_S: Final = 30.0
"""How long a node that `mesh run` started stays to report a script's crash."""

LEAVE_S: Final = 8.0


def run(settings: mesh.NodeSettings, script: str, args: list[str]) -> int:
    """Runs a script beside a node, the one that is up or one of its own; returns its exit code."""
    if not Path(script).is_file():
        raise mesh.UsageError(f"no script {script!r} here")
    mesh.make_mesh_if_none(settings)
    own: mesh.NodeProcess | None = None
    leaving: int | None = None
    try:
        running = mesh.find_node(str(settings.state))
        leaving = running.pid
        mesh.ask(running, "linger", linger_s=LINGER_S)  # it may be about to end with its starter
        if settings != mesh.NodeSettings(state=settings.state):
            print("mesh: a node is up already and keeps its own settings", file=sys.stderr)
    except mesh.NodeNotRunning:
        own = mesh.start_node(settings, leaving)
        running = own.running
    crashed = True
    try:
        pid, code = _run_script(script, args, settings.state)
        crashed = code != 0
        with contextlib.suppress(mesh.MeshError):
            linger_s = LINGER_S if crashed and own else 0.0
            mesh.ask(running, "exited", script=script, pid=pid, code=code, linger_s=linger_s)
        if crashed and own:
            print(
                f"mesh: {script} ended with {code}; the node stays {LINGER_S:.0f} s: `mesh status`",
                file=sys.stderr,
            )
        return 128 - code if code < 0 else code
    finally:
        if own is not None:
            own.release() if crashed else own.stop()


def _run_script(script: str, args: list[str], state: Path) -> tuple[int, int]:
    """(pid, exit code) of the script; negative: killed by that signal."""
    environment = {**os.environ, "MESH_STATE": str(state)}
    process = subprocess.Popen([sys.executable, script, *args], env=environment)
    with _signals_go_to(process):
        code = process.wait()
    return process.pid, code


@contextlib.contextmanager
def _signals_go_to(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """SIGTERM is passed on; Ctrl-C reaches the script by itself, and we wait for its end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(state: Path) -> dict[str, Any]:
    """Stops the node that runs with this state, then forgets the mesh. `mesh.done/1`, with a token to
    keep if this machine made the mesh."""
    node = {"id": "", "name": ""}  # nobody knows better where the identity is damaged
    with contextlib.suppress(mesh.IdentityError):
        own = mesh.check_identity(state)
        node = {"id": own.node, "name": own.name}
    with contextlib.suppress(mesh.NodeNotRunning):
        mesh.ask(mesh.find_node(str(state)), "leave")
        deadline = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline:
            mesh.find_node(str(state))  # raises NodeNotRunning once it is gone
            time.sleep(0.02)
        raise mesh.MeshError("the node did not stop; end it, then run `mesh leave` again")
    token = mesh.leave_mesh(state)
    return {"schema": "mesh.done/1", "node": node, "did": "leave", "runs": [], "token": token}
