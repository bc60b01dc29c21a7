"""The fault table: what real nodes are promised to survive, and a program that tries it.

    python -m tests.lan.faults [--only NAME] [--short]        (`make faults`)

Needs root, network namespaces, nft and faketime. Every packet stays inside namespaces that it makes
itself. Prints a line while each fault runs, then a table; exit code 1 if a promise was not kept.
The same functions, in their short form, are tests: test_faults.py.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.lan import fault_deaths, fault_networks, fault_starts
from tests.lan.faulty_lan import FaultyLab, faketime_library
from tests.lan.findings import Finding, Findings, Never, Size
from tests.lan.lab import NoLab


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table. `short`: machines of the short form, where it makes do with fewer."""

    name: str
    what: str
    breaks: Callable[[FaultyLab, Size, Findings], None]
    machines: int = 3
    short: int | None = None
    needs: str = "nft"

    def missing(self) -> str | None:
        """What it needs and this machine does not have."""
        installed = faketime_library() if self.needs == "faketime" else shutil.which(self.needs)
        packages = {"nft": "nftables", "ss": "iproute2"}
        package = packages.get(self.needs, self.needs)
        return None if installed else f"no `{self.needs}` here: apt-get install {package}"

    def run(self, directory: Path, size: Size) -> tuple[Findings, str]:
        """What it showed, and what everybody said meanwhile. Raises NoLab."""
        if why := self.missing():
            raise NoLab(why)
        count = self.short if self.short and size is Size.SHORT else self.machines
        findings = Findings()
        with FaultyLab(directory, count) as lab:
            try:
                self.breaks(lab, size, findings)
            except Never as never:
                if not findings.failed:
                    findings.check(self.what, False, str(never), "to come")
            except AssertionError as error:  # a command of the lab failed: the fault cannot go on
                findings.check(self.what, False, str(error), "to be tried")
            return findings, lab.logs()


FAULTS: Final = (
    Fault("kill", "kill -9 in the middle of an exchange", fault_deaths.killed),
    Fault("stop", "SIGSTOP of a node, and SIGCONT", fault_deaths.stopped),
    Fault("partition", "partition 3 + 2, then heal", fault_networks.partition, machines=5),
    Fault("loss", "packet loss", fault_networks.loss),
    Fault("half-open", "a machine dies, its FIN and RST are lost", fault_deaths.half_open),
    Fault("address", "no address; another; no link for 5 s", fault_networks.addresses, needs="ss"),
    Fault("together", "many nodes start at once", fault_starts.together, machines=30, short=8),
    Fault("clock", "wall clocks in 2015 and in 5 years", fault_starts.clocks, needs="faketime"),
    Fault("copy", "a copied state directory starts elsewhere", fault_deaths.copied),
    Fault("docker", "one address 172.17.0.1 on all", fault_networks.docker, machines=2),
)


def try_all(faults: Sequence[Fault], size: Size) -> list[tuple[Fault, Finding]]:
    """Runs them one after the other; says on standard error how it goes. Raises NoLab."""
    rows: list[tuple[Fault, Finding]] = []
    for number, fault in enumerate(faults, 1):
        print(f"[{number}/{len(faults)}] {fault.name}: {fault.what} ...", file=sys.stderr)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mesh-") as directory:
            findings, said = fault.run(Path(directory), size)
        took_s = time.monotonic() - began
        failed = findings.failed
        verdict = "ok" if not failed else f"{len(failed)} promises not kept"
        if failed:
            print(said, file=sys.stderr)
        print(f"    {len(findings.all)} findings in {took_s:.0f} s: {verdict}", file=sys.stderr)
        for failure in failed:
            print(f"    {failure}", file=sys.stderr)
        rows += [(fault, finding) for finding in findings.worst()]
    return rows


def table(rows: Sequence[tuple[Fault, Finding]]) -> str:
    """Markdown: fault | must show | promised | measured | ok."""
    lines = ["| fault | must show | promised | measured | ok |", "|---|---|---|---|---|"]
    lines += [
        f"| {fault.name} | {found.what} | {found.promised} | {found.measured} "
        f"| {'yes' if found.ok else 'NO'} |"
        for fault, found in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every promise was kept; 1: one was not; 2: this machine cannot try them."""
    parser = argparse.ArgumentParser(prog="tests.lan.faults", description="Real faults, real nodes")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", choices=names, action="append", help="this fault (repeatable)")
    parser.add_argument("--short", action="store_true", help="the short forms that the tests run")
    chosen = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not chosen.only or fault.name in chosen.only]
    try:
        rows = try_all(faults, Size.SHORT if chosen.short else Size.FULL)
    except NoLab as error:
        print(f"cannot try faults here: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the lab was taken down on the way here
        print("stopped", file=sys.stderr)
        return 130
    print(table(rows))
    return 0 if all(found.ok for _, found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
