"""A lab that can be broken and mended: loss, partitions, silence, links, addresses, clocks.

Rules: 1. Every drop happens in the bridge's forward hook, inside the lab's own namespace, so both
ends keep their sockets and hear nothing: what a pulled cable looks like. 2. heal() takes all of
them back at once. 3. What is read of a process (descriptors, connections) is read from outside it.
"""

import ipaddress
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import mesh
from tests.lan.lab import Lab, Machine, Program

DOCKER_ADDRESS: Final = "172.17.0.1/16"
"""What docker gives its bridge on every machine that it is installed on."""

FAKETIME: Final = ("lib*/*/faketime/libfaketime.so.1", "lib*/faketime/libfaketime.so.1")
DAY_S: Final = 86_400


class FaultyLab(Lab):
    """`with FaultyLab(directory, 3) as lab:` a Lab, and everything that can go wrong in it."""

    def found_mesh(self, *machines: Machine) -> None:
        """Like make_mesh(), without a Python that starts for each command."""
        first, *others = machines
        token = mesh.create_mesh(first.state, first.name)
        for machine in others:
            mesh.join_mesh(machine.state, token, machine.name)

    # ------------------------------------------------------------------------------- packets

    def lose(self, percent: int) -> None:
        """From now on the switch drops this part of all packets, chosen by chance."""
        self._break(f"numgen random mod 100 < {percent}")

    def cut(self, one_side: Sequence[Machine], other_side: Sequence[Machine]) -> None:
        """From now on no packet passes between the two groups."""
        ours, theirs = self._ports(one_side), self._ports(other_side)
        self._break(f"iifname {ours} oifname {theirs}")
        self._break(f"iifname {theirs} oifname {ours}")

    def silence(self, machine: Machine) -> None:
        """From now on nothing that this machine sends arrives, nor anything sent to it."""
        self.cut([machine], [other for other in self.machines if other is not machine])

    def heal(self) -> None:
        """Takes back everything that was lost, cut or silenced."""
        self.nft("delete table bridge faults")

    def _break(self, which: str) -> None:
        self.nft("add table bridge faults")
        self.nft("add chain bridge faults forward { type filter hook forward priority 0; }")
        self.nft(f"add rule bridge faults forward {which} drop")

    def _ports(self, machines: Sequence[Machine]) -> str:
        names = [f"port{self.machines.index(machine)}" for machine in machines]
        return "{ " + ", ".join(names) + " }"


# ------------------------------------------------------------------------- one machine's network


def set_link(machine: Machine, state: str) -> None:
    """`up` or `down`, as if somebody pulled the cable and a driver noticed."""
    machine.call("ip", "link", "set", "eth0", state)
    if state == "up":  # the kernel forgets routes of a link that goes down
        machine.call("ip", "route", "replace", "default", "dev", "eth0")


def move(machine: Machine, host: str) -> float:
    """Another address, the old one gone; returns when."""
    machine.take_address_away()
    machine.host = host
    return machine.give_address()


def install_docker(machine: Machine) -> None:
    """A bridge that leads nowhere, with the address that it has on every other machine as well."""
    machine.call("ip", "link", "add", "docker0", "type", "bridge")
    machine.call("ip", "address", "add", DOCKER_ADDRESS, "dev", "docker0")
    machine.call("ip", "link", "set", "docker0", "up")


def hosts(machine: Machine) -> set[str]:
    """All addresses of eth0, IPv6 included."""
    listed: list[dict[str, Any]] = json.loads(
        machine.call("ip", "-json", "address", "show", "dev", "eth0")
    )
    return {entry["local"] for entry in listed[0]["addr_info"]}


def connections(machine: Machine, others: set[str]) -> int:
    """Established TCP connections of this machine to one of the addresses `others`."""
    rows = machine.call("ss", "-Htn", "state", "established").splitlines()
    remotes = [row.split()[3].rpartition(":")[0] for row in rows if row.strip()]
    return sum(_plain(remote) in others for remote in remotes)


def _plain(text: str) -> str:
    """An address as `ip` writes it: no brackets, no interface, IPv4 as IPv4."""
    address = ipaddress.ip_address(text.strip("[]").split("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def descriptors(program: Program) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{program.process.pid}/fd"))


# --------------------------------------------------------------------------------------- clocks


def faketime_library() -> Path | None:
    """The library that fakes the wall clock of one process; None where it is not installed."""
    found = [path for pattern in FAKETIME for path in Path("/usr").glob(pattern)]
    return found[0] if found and sys.platform == "linux" else None


def set_wall_clock(machine: Machine, days: int) -> None:
    """Every program that starts here from now on lives `days` later (or earlier) by its wall clock.

    The monotonic clock stays true, as it does where an administrator sets the date.
    """
    library = faketime_library()
    assert library is not None, "no faketime here"
    machine.environment |= {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{days * DAY_S:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
