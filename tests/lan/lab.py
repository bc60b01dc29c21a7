"""A LAN in one machine: network namespaces joined by a bridge, and the nodes that run in them.

Rules: 1. Nothing outside changes: the bridge lives in a namespace of its own, so that no packet of
a lab can reach a real network. 2. Every program is started inside a namespace; what still runs
there when the lab closes is killed by its pid. 3. Namespaces carry the pid of the test process,
which has one lab at a time; opening one first removes those of processes that died. 4. Nobody
sleeps for a while and hopes: until() polls a condition and measures.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import mesh
from mesh.identity import load

PORT: Final = 7710
PREFIX: Final = "gossiplan"
POLL_S: Final = 0.05
GRACE_S: Final = 10.0
"""How much longer than allowed until() looks, so that a failure tells slow from never."""

NOT_ALLOWED: Final = ("not permitted", "denied", "not supported", "Unknown device type")
"""What `ip` says where a container or a kernel has no namespaces, bridges or veth pairs for us."""

COMMAND_S: Final = 30.0
LOG_TAIL: Final = 4000
MESH: Final = str(Path(sys.executable).with_name("mesh"))


class NoLab(Exception):
    """This machine cannot have network namespaces; the text says why."""


def until(
    what: str, condition: Callable[[], object], *, within_s: float, since: float | None = None
) -> None:
    """Waits for condition(); asserts that it came at most `within_s` after `since` (default: now).

    What it measured is printed. The clock is time.monotonic().
    """
    start = time.monotonic() if since is None else since
    while not condition():
        waited_s = time.monotonic() - start
        assert waited_s < within_s + GRACE_S, f"{what}: not in {waited_s:.1f} s"
        time.sleep(POLL_S)
    took_s = time.monotonic() - start
    print(f"measured: {what}: {took_s:.2f} s of {within_s:g} s")
    assert took_s <= within_s, f"{what}: {took_s:.2f} s, promised are {within_s:g} s"


def _ip(*arguments: str) -> str:
    return _call("ip", *arguments)


def _call(*command: str, environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        env=environment,
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}"
    return done.stdout


@dataclass(slots=True)
class Program:
    """Something that runs inside a machine."""

    process: "subprocess.Popen[bytes]"
    log: Path
    started_at: float

    def kill(self) -> float:
        """kill -9; returns when, on time.monotonic()'s clock."""
        return self.send(signal.SIGKILL)

    def terminate(self) -> float:
        """SIGTERM; returns when."""
        return self.send(signal.SIGTERM)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """The end of its standard error."""
        return self.log.read_text(errors="replace")[-LOG_TAIL:]

    def send(self, number: signal.Signals) -> float:
        """Sends the signal; returns when."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at


@dataclass(slots=True)
class Machine:
    """One namespace with eth0 on the bridge, and the state directory of the node in it."""

    name: str
    namespace: str
    host: str
    directory: Path
    programs: list[Program] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """what every program here gets on top of the test process's own variables"""

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def address(self) -> str:
        return f"{self.host}:{PORT}"

    @property
    def node(self) -> str:
        """Id of this machine's node; it has one from `mesh init` or `mesh join` on."""
        return load(self.state).node

    # ------------------------------------------------------------------------------- programs

    def call(self, *command: str) -> str:
        """Runs a command inside to its end; returns its standard output."""
        return _call(*self._inside(command), environment=self._environment())

    def mesh(self, command: str, *arguments: str) -> str:
        """`mesh COMMAND ARGUMENTS` for this machine's node, to its end."""
        return self.call(MESH, command, *arguments, "--state", str(self.state))

    def start(self, command: str, *arguments: str) -> Program:
        """`mesh COMMAND ARGUMENTS` for this machine's node, left running."""
        log = self.directory / f"{len(self.programs)}-{command}.log"
        with open(log, "wb") as output:
            at = time.monotonic()
            process = subprocess.Popen(
                self._inside((MESH, command, "--state", str(self.state), *arguments)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment(),
                start_new_session=True,
            )
        program = Program(process, log, at)
        self.programs.append(program)
        return program

    def up(self, *arguments: str) -> Program:
        """`mesh up`, left running."""
        return self.start("up", *arguments)

    def logs(self) -> str:
        """What everything that was started here said."""
        kept = sorted([*self.directory.glob("*.log"), *self.state.glob("node.log")])
        texts = [(log.name, log.read_text(errors="replace")[-LOG_TAIL:]) for log in kept]
        return "\n".join(f"--- {self.name}: {name}\n{text}" for name, text in texts)

    def _inside(self, command: tuple[str, ...]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def _environment(self) -> dict[str, str]:
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith("MESH_")},
            # The list of nodes that run on "this machine" is this namespace's own.
            "XDG_RUNTIME_DIR": str(self.directory),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **self.environment,
        }

    # ------------------------------------------------------------------------------ questions

    def peers(self) -> dict[str, dict[str, Any]]:
        """`mesh peers` by peer id, asked from outside: a local socket's path leads to it from every
        namespace, and a Python that starts for each question would be most of what is measured."""
        answer = mesh.ask(mesh.find_node(str(self.state)), "peers")
        return {peer["id"]: peer for peer in answer["peers"]}

    def peers_by_command(self) -> dict[str, dict[str, Any]]:
        """`mesh peers --json` by peer id, asked inside as a user would."""
        return {peer["id"]: peer for peer in json.loads(self.mesh("peers", "--json"))["peers"]}

    def lists(self, other: "Machine", state: str | None) -> bool:
        """Whether the node here lists the other's in this state; None: not at all."""
        return self.running and self.peers().get(other.node, {}).get("state") == state

    @property
    def running(self) -> bool:
        """Whether a node answers here."""
        return bool(self.status())

    def status(self) -> dict[str, Any]:
        """`mesh status`; empty while no node answers."""
        with contextlib.suppress(mesh.MeshError):
            return mesh.ask(mesh.find_node(str(self.state)), "status")
        return {}

    # -------------------------------------------------------------------------------- network

    def take_address_away(self) -> None:
        _ip("-n", self.namespace, "address", "flush", "dev", "eth0")

    def give_address(self) -> float:
        """Returns when the interface had it."""
        _ip("-n", self.namespace, "address", "add", f"{self.host}/24", "dev", "eth0")
        at = time.monotonic()
        _ip("-n", self.namespace, "route", "add", "default", "dev", "eth0")
        return at


class Lab:
    """`with Lab(directory, 3) as lab:` three machines, lab.machines, that can reach each other."""

    def __init__(self, directory: Path, machines: int) -> None:
        """`directory`: for states and logs; keep its path short, local sockets live below it."""
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self.machines = [
            Machine(
                name=f"machine{i}",
                namespace=f"{PREFIX}-{os.getpid()}-{i}",
                host=f"10.77.0.{i}",
                directory=directory / str(i),
            )
            for i in range(1, machines + 1)
        ]

    def __enter__(self) -> Self:
        """Raises NoLab."""
        why = _missing()
        if why:
            raise NoLab(why)
        _remove_stale()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            try:
                self._build()
            except AssertionError as error:
                if any(words in str(error) for words in NOT_ALLOWED):
                    raise NoLab(f"no network namespaces here: {error}") from None
                raise
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills what runs inside and removes the namespaces; harmless twice."""
        for machine in self.machines:
            for program in machine.programs:
                program.process.kill()  # it may not be inside yet
                program.process.wait(COMMAND_S)
        for namespace in _namespaces():
            if _owner(namespace) == os.getpid():
                _remove(namespace)

    def logs(self) -> str:
        """What everything said until now, and how the nodes that still run say they are."""
        texts = [f"{m.logs()}\n--- {m.name}: status\n{m.status()}" for m in self.machines]
        return "\n".join(texts)

    # ------------------------------------------------------------------------------ the mesh

    def make_mesh(self, *machines: Machine) -> str:
        """`mesh init` on the first, `mesh join TOKEN` on the others; returns the token."""
        first, *others = machines
        token = first.mesh("init", "--name", first.name).split()[-1]
        for machine in others:
            machine.mesh("join", token, "--name", machine.name)
        return token

    # ------------------------------------------------------------------------------- network

    def drop_multicast(self) -> None:
        """From now on the switch forwards no multicast of IPv4."""
        self.nft("add table bridge lab")
        self.nft("add chain bridge lab forward { type filter hook forward priority 0; }")
        self.nft("add rule bridge lab forward ip daddr 224.0.0.0/4 counter drop")

    def dropped_packets(self) -> int:
        """How many packets drop_multicast() kept from arriving."""
        listed = json.loads(self.nft("--json list chain bridge lab forward"))["nftables"]
        parts = [part for entry in listed if "rule" in entry for part in entry["rule"]["expr"]]
        return sum(part["counter"]["packets"] for part in parts if "counter" in part)

    def nft(self, words: str) -> str:
        """A rule for what the switch forwards; machine i of `machines` hangs on port{i}."""
        return _ip("netns", "exec", self._switch, "nft", *words.split())

    def _build(self) -> None:
        switch = self._switch
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "set", "lo", "up")
        bridge = ("type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        _ip("-n", switch, "link", "add", "br0", *bridge)
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, machine in enumerate(self.machines):
            machine.directory.mkdir(mode=0o700)
            self._add_machine(machine, f"port{number}")

    def _add_machine(self, machine: Machine, port: str) -> None:
        inside, switch = machine.namespace, self._switch
        _ip("netns", "add", inside)
        _ip("-n", inside, "link", "set", "lo", "up")
        veth = ("type", "veth", "peer", "name", port, "netns", switch)
        _ip("-n", inside, "link", "add", "eth0", *veth)
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        _ip("netns", "exec", inside, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
        _ip("-n", inside, "link", "set", "eth0", "up")
        machine.give_address()


@functools.cache
def _missing() -> str | None:
    """What a lab needs and this machine does not have."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` here: install iproute2"
    return None


def _namespaces() -> list[str]:
    """All labs' namespaces on this machine."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]
    return [name for name in names if _owner(name) is not None]


def _owner(namespace: str) -> int | None:
    """The pid of the test process that made a namespace; None if it is no lab's."""
    found = re.fullmatch(rf"{PREFIX}-(\d+)-\w+", namespace)
    return int(found[1]) if found else None


def _remove_stale() -> None:
    for namespace in _namespaces():
        owner = _owner(namespace)
        if owner == os.getpid() or not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(AssertionError):  # another test process was faster
                _remove(namespace)


def _remove(namespace: str) -> None:
    """Only a lab starts anything in a lab's namespace, so what is found there is ours to kill."""
    deadline = time.monotonic() + COMMAND_S
    while (pids := _ip("netns", "pids", namespace).split()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(POLL_S)  # one that was just being forked shows up in the next round
    _ip("netns", "delete", namespace)
