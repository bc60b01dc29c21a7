"""What `mesh doctor` looks at on this machine: identity, disk, clock, limits, the node, torch.

Rule: nothing is changed. The one file that is written, to see whether that works, is removed at once.
"""

import contextlib
import json
import os
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import mesh
from nodes import text as words
from nodes.findings import Finding, fail, ok, warn

ASK_S: Final = 2.0
SECRETS: Final = ("node.pem", "token", "mesh.json")
"""The node's key, what lets others join, and the key of what mDNS carries."""

FREE_LEAST_BYTES: Final = 1 << 20
FREE_ENOUGH_BYTES: Final = 100 << 20
"""A node keeps a few kB and a log of at most 1 MB; checkpoints and others want more."""

DESCRIPTORS_LEAST: Final = 128
DESCRIPTORS_ENOUGH: Final = 512
"""32 control and 256 bulk connections, 64 that ask, and some for itself; macOS gives 256."""

CLOCK_S: Final = 60.0
"""Less than this is of no interest to anybody who reads a log."""

TORCH_S: Final = 7.0
"""Importing torch takes 2.3 s on a laptop, and 6 s on a Raspberry Pi."""

MULTIPLY: Final = (
    "import torch; a = torch.ones(64, 64); print(torch.__version__, float((a @ a).sum()))"
)
PRODUCT: Final = 64.0**3

PORT: Final = 7710


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The node that is looked at, as far as it could be asked."""

    state: Path
    node: "mesh.RunningNode | None"
    status: dict[str, Any] | None
    """None where no node answers"""
    peers: dict[str, Any] | None
    stuck: bool
    """a node runs and does not answer"""
    killed: int | None = None
    """the pid of a node that ended without removing its files"""

    @property
    def listens(self) -> list[str]:
        """Where the node says that it does; empty where none answers."""
        return list(self.status["node"]["addresses"]) if self.status else []

    @property
    def others(self) -> list[dict[str, Any]]:
        """The peers of the node, as `mesh peers` lists them."""
        return list(self.peers["peers"]) if self.peers else []

    @property
    def unreached(self) -> dict[str, str]:
        """Addresses given by hand that lead to no peer, and why."""
        told = self.peers["unreached"] if self.peers else []
        return {missing["address"]: missing["reason"] for missing in told}


def open_case(state: str | None, name: str | None) -> Case:
    """Finds the node that is meant. Raises NodeNotRunning where `name` is nobody's, UsageError."""
    killed = _left_behind(mesh.state_directory(state))  # asking takes away what a dead one left
    try:
        node = mesh.find_node(state, name)
    except mesh.NodeNotRunning:
        if name is not None:
            raise
        return _case(mesh.state_directory(state), None, killed=killed)
    except mesh.UsageError:
        raise
    except mesh.MeshError:  # its socket is full: nobody takes anything off it
        return _case(mesh.state_directory(state), None, stuck=True)
    try:
        status = mesh.ask(node, "status", timeout_s=ASK_S)
        peers = mesh.ask(node, "peers", timeout_s=ASK_S)
    except mesh.MeshError:
        return _case(node.state, node, stuck=True)
    return _case(node.state, node, status=status, peers=peers)


def _case(
    state: Path,
    node: "mesh.RunningNode | None",
    *,
    status: dict[str, Any] | None = None,
    peers: dict[str, Any] | None = None,
    stuck: bool = False,
    killed: int | None = None,
) -> Case:
    return Case(state=state, node=node, status=status, peers=peers, stuck=stuck, killed=killed)


# ------------------------------------------------------------------------------------- identity


def identity(state: Path) -> tuple["mesh.Identity | None", list[Finding]]:
    """This machine's papers, and what is wrong with them."""
    where = shlex.quote(str(state))
    try:
        member = mesh.is_member(state) and any(state.iterdir())
    except PermissionError:
        text = f"{state} is not to be read by this user"
        return None, [fail("identity", text, f"sudo chown -R $(id -u) {where}")]
    if not member:
        text = f"{state} is in no mesh"
        return None, [fail("identity", text, "mesh init, or mesh join TOKEN of another machine")]
    try:
        found = mesh.check_identity(state)
    except mesh.MeshError as error:
        text = str(error).partition(": `")[0]
        return None, [fail("identity", text, "mesh leave; mesh join TOKEN")]
    open_files = list(_open_to_others(state))
    others = [path for path in [state, *state.iterdir()] if path.stat().st_uid != os.getuid()]
    if others:
        text = f"{others[0]} belongs to another user: the node cannot rely on it"
        return found, [fail("identity", text, f"sudo chown -R $(id -u) {where}")]
    if open_files:
        text = f"other users can read {open_files[0]}, which holds a key of this mesh"
        return found, [fail("identity", text, f"chmod -R go= {where}")]
    if state.stat().st_mode & 0o077:
        text = f"other users can list {state}; the next start of the node mends it"
        return found, [warn("identity", text, f"chmod go= {where}")]
    who = f"{found.name} ({found.node[:8]}) of mesh {found.mesh}; its files are private"
    return found, [ok("identity", who)]


def _open_to_others(state: Path) -> Iterator[Path]:
    """Secrets that somebody else can read: a closed directory closes everything in it."""
    if not state.stat().st_mode & 0o077:
        return
    for name in SECRETS:
        path = state / name
        if path.exists() and path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            yield path


# ---------------------------------------------------------------------------------------- files


def _is_there(state: Path) -> bool:
    """False also where this user may not know; identity() says so then."""
    with contextlib.suppress(OSError):
        os.listdir(state)
        return True
    return False


def disk(state: Path) -> list[Finding]:
    """Whether the node can write down what it must remember."""
    if not _is_there(state):
        return []
    where = shlex.quote(str(state))
    probe = state / f".doctor.{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        cure = f"df -h {where}, and make room; or another directory with --state"
        return [fail("disk", f"{state} cannot be written: {str(error.strerror).lower()}", cure)]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    about = os.statvfs(state)
    free = about.f_bavail * about.f_frsize
    if free < FREE_ENOUGH_BYTES:
        level = fail if free < FREE_LEAST_BYTES else warn
        return [level("disk", f"{words.size(free)} free at {state}", f"df -h {where}")]
    return [ok("disk", f"{state} can be written, {words.size(free)} free")]


def clock(state: Path, now: float) -> list[Finding]:
    """Whether the wall clock can be right. Nothing here depends on it: logs do, and people."""
    newest = Path(__file__).stat().st_mtime
    cure = "sudo timedatectl set-ntp true"
    if _is_there(state):
        newest = max([newest, *(path.stat().st_mtime for path in state.iterdir())])
        probe = state / f".clock.{os.getpid()}"
        with contextlib.suppress(OSError):  # disk() says why
            probe.touch()
            written = probe.stat().st_mtime
            probe.unlink()
            if abs(written - now) > CLOCK_S:
                off = words.duration(abs(written - now))
                return [warn("clock", f"the disk's clock and this program's are {off} apart", cure)]
    if newest - now > CLOCK_S:
        off = words.duration(newest - now)
        return [warn("clock", f"the clock is at least {off} behind: files are newer", cure)]
    return [ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)))]


def descriptors(pid: int | None) -> list[Finding]:
    """How many files and sockets the node may open: its own limit where it runs."""
    limit, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 0
    whose = "a node started here"
    if pid is not None and sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):
            lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
            line = next(one for one in lines if one.startswith("Max open files"))
            limit = int(line.split()[3])
            used = len(os.listdir(f"/proc/{pid}/fd"))
            whose = "the node"
    told = f"{whose} may open {limit} files" + f", has {used} open" * (used > 0)
    cure = "ulimit -n 4096 before `mesh up`, or LimitNOFILE=4096 in its service"
    if limit < DESCRIPTORS_LEAST or used > 0.9 * limit:
        return [fail("descriptors", told, cure)]
    if limit < DESCRIPTORS_ENOUGH:
        return [warn("descriptors", told, cure)]
    return [ok("descriptors", told)]


# ------------------------------------------------------------------------------------- the node


def process(case: Case) -> list[Finding]:
    """Whether a node runs, answers, and is of this version; what a dead one left."""
    if case.stuck:
        pid = case.node.pid if case.node else "PID"
        text = f"the node (pid {pid}) runs and does not answer: stopped, or stuck"
        return [fail("node", text, f"kill -CONT {pid}; or kill -9 {pid}, then mesh up")]
    if case.status is None or case.node is None:
        if case.killed is not None:
            text = f"no node runs; one that was killed (pid {case.killed}) left its files behind"
            return [warn("node", text, "mesh up")]
        return [warn("node", f"no node runs with {case.state}", "mesh up")]
    about = case.status["node"]
    if about["version"] != mesh.__version__:
        text = f"the node is still version {about['version']}; here is {mesh.__version__}"
        return [warn("node", text, "stop it and start it again")]
    alive = [peer for peer in case.others if peer["state"] == "alive"]
    heard = sum(peer["via"] == "mdns" for peer in alive)
    told = f"up {words.duration(about['uptime_s'])}, pid {case.node.pid}; peers alive: {len(alive)}, of these found by its mDNS: {heard}"
    return [ok("node", told)]


def _left_behind(state: Path) -> int | None:
    """The pid of a node that ended without removing its node.json."""
    try:
        return int(json.loads((state / "node.json").read_bytes())["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def port_is_free() -> list[Finding]:
    """Where no node runs: whether it will get the port that firewall rules name."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", PORT))
        except OSError as error:
            text = f"TCP {PORT} cannot be had ({str(error.strerror).lower()}): a node takes another"
            return [warn("port", text, f"ss -ltnp 'sport = {PORT}' shows who has it")]
    return [ok("port", f"TCP {PORT} is free for a node")]


# ----------------------------------------------------------------------------------------- torch


def start_torch() -> "subprocess.Popen[str]":
    """Multiplies two matrices in a process of its own: some builds of torch die of it."""
    return subprocess.Popen(
        [sys.executable, "-c", MULTIPLY],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torch(child: "subprocess.Popen[str]", within_s: float) -> list[Finding]:
    """How that went; ends the process if it takes longer."""
    try:
        out, err = child.communicate(timeout=max(0.1, within_s))
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        cure = f"{sys.executable} -c 'import torch', and see for how long"
        return [warn("torch", f"importing torch takes longer than {TORCH_S:g} s", cure)]
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        why = ": this build needs another processor" if name == "SIGILL" else ""
        return [fail("torch", f"torch dies of {name}{why}", _older_torch())]
    last = (err.strip().splitlines() or ["no word"])[-1]
    if child.returncode and "No module named 'torch'" in last:
        return [
            warn("torch", "torch is not installed: nothing can train here", "pip install torch")
        ]
    if child.returncode:
        return [fail("torch", f"torch cannot be imported: {last[:200]}", _older_torch())]
    version, product = [*out.split(), "", ""][:2]
    if product != str(PRODUCT):
        return [fail("torch", f"torch {version} multiplies wrongly", _older_torch())]
    return [ok("torch", f"torch {version} imports and multiplies")]


def _older_torch() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        major, minor = metadata.version("torch").split(".")[:2]
        return f"pip install 'torch<{major}.{minor}'"
    return "pip install --force-reinstall torch"
