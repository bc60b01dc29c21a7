"""What `mesh doctor` reads off the network: from facts (mesh.Surroundings) to findings.

Rule: pure, but for local_firewall(), which asks the system's own tools. A fact is told once, by the
check that knows its cure: a peer that is announced by `peers`, one that is not by `isolation`.
"""

import ipaddress
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Final

import mesh
from nodes.findings import Finding, fail, ok, warn
from nodes.machine_checks import Case

TOOL_S: Final = 1.0
CHAIN: Final = re.compile(r"chain [^{}]*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
"""A chain of `nft list ruleset` with what is in it; sets stand in braces of their own."""

SUBNETS_SHOWN: Final = 3


class Reading:
    """One look at the network, read."""

    def __init__(
        self, case: Case, identity: "mesh.Identity | None", seen: "mesh.Surroundings"
    ) -> None:
        self._case = case
        self._seen = seen
        self._own = identity.node if identity else ""
        self._listens = [mesh.parse_address(address) for address in case.listens]
        self._here = {address for one in seen.interfaces for address in one.addresses}
        self._names = {peer["id"]: peer["name"] for peer in case.others}

    def findings(self) -> Iterator[Finding]:
        yield from self.interfaces()
        yield from self.multicast()
        yield from self.port()
        yield from self.peers()
        yield from self.isolation()
        yield from self.given()
        yield from self.twins()
        yield from self.other_meshes()

    # --------------------------------------------------------------------------- this machine

    def interfaces(self) -> Iterator[Finding]:
        """Which are used, and why the others are not."""
        used = False
        for one in self._seen.interfaces:
            label = " ".join([one.name, *one.addresses[:2]])
            if one.looked_at and one.addresses:
                used = True
                yield ok("interface", f"{label}: used{self._aside(one.kind)}")
            elif one.kind == "loopback":
                yield ok("interface", f"{label}: left out, it reaches no other machine")
            elif one.addresses and one.kind == "lan":
                yield ok("interface", f"{label}: left out, as --interface says")
            elif one.addresses:
                yield ok("interface", f"{label}: ignored, {one.why}; {self._anyway(one)} uses it")
        if not used:
            text = "no interface has an address: this machine is on no network"
            yield fail("interface", text, "ip address; connect the cable, or join the Wi-Fi")

    def _aside(self, kind: str) -> str:
        """What is special about such an interface."""
        named = [one for one in self._seen.interfaces if one.looked_at and one.addresses]
        alone = ", as no LAN has an address" if all(one.kind == kind for one in named) else ""
        return {
            "containers": f"{alone}; only containers are behind it: other machines skip its address",
            "vpn": f"{alone}; a VPN: it seldom carries multicast, give an address with --peer",
            "loopback": "; it reaches no other machine",
        }.get(kind, "")

    def _anyway(self, ignored: "mesh.Interface") -> str:
        """The command that uses an interface beside those that are used."""
        used = [one.name for one in self._seen.interfaces if one.looked_at and one.addresses]
        return " ".join(["mesh up", *(f"--interface {name}" for name in [*used, ignored.name])])

    def multicast(self) -> Iterator[Finding]:
        """Whether a question goes out, comes back, and is answered."""
        kinds = {one.name: one.kind for one in self._seen.interfaces}
        for echo in self._seen.echoes:
            name, lan = echo.interface, kinds[echo.interface] == "lan"
            problem = fail if lan else warn
            if "in use" in echo.error:
                text = f"{name}: UDP 5353 is held by a program that shares it with nobody"
                yield problem("multicast", text, "ss -ulpn 'sport = 5353' shows which")
            elif echo.error:
                text = f"{name}: nothing can be sent by multicast: {echo.error}"
                cure = f"sudo ufw allow out 5353/udp; ip link show {name}"
                yield problem("multicast", text, cure)
            elif not echo.looped:
                text = f"{name}: sent, but not even this machine heard it: a firewall here drops it"
                yield problem("multicast", text, "sudo ufw allow 5353/udp")
            elif echo.others:
                count = counted(len(echo.others), "other machine")
                yield ok("multicast", f"{name}: sent, and {count} heard")
            elif not lan:
                yield ok("multicast", f"{name}: sent and heard by this machine")
            else:
                text = f"{name}: sent, but no other machine answered: none is up, or it is dropped"
                yield warn("multicast", text, "start the others; else mesh up --peer HOST:7710")

    def port(self) -> Iterator[Finding]:
        """Whether the node that runs here can be reached where it says."""
        for address in self._listens:
            knock = self._seen.knock(address)
            if knock is None:
                continue  # without papers nobody can knock: identity says so
            if knock.node == self._own:
                yield ok("port", f"{address} answers")
            elif knock.outcome is mesh.Outcome.NODE:
                text = f"{address} is answered by another node, {knock.node[:8]}"
                yield fail("port", text, "ip address: does another machine use this address?")
            else:
                text = f"the node does not answer at {address}: {knock.outcome.value}"
                yield fail("port", text, f"sudo ufw allow {address.port}/tcp")

    # --------------------------------------------------------------------------------- others

    def peers(self) -> Iterator[Finding]:
        """Every node of our mesh that announces itself: can it be reached, and understood?"""
        found: dict[str, list[mesh.Announcement]] = {}
        for echo in self._seen.echoes:
            for one in echo.announcements:
                if one.member and not self._own.startswith(one.instance):
                    found.setdefault(one.instance, []).append(one)
        well = []
        for instance, announcements in found.items():
            name = self._name(instance)
            problem = self._problem(name, instance, announcements)
            if problem is None:
                well.append(name)
            else:
                yield problem
            spoken = announcements[0].protocol
            if spoken != self._seen.protocol:
                text = f"{name} speaks protocol {spoken or '?'}, this node {self._seen.protocol}"
                yield fail("peers", text, "pip install -U gossipmesh on the older, and restart it")
        if well:
            yield ok("peers", f"heard by mDNS, and they answer: {', '.join(sorted(well))}")
        for peer in self._case.others:
            if peer["state"] == "incompatible":
                text = f"{peer['name']} is incompatible: {peer['reason']}"
                yield fail("peers", text, "the same gossipmesh and the same model on both")

    def _problem(
        self, name: str, instance: str, announcements: "list[mesh.Announcement]"
    ) -> Finding | None:
        """Why this peer cannot be reached; None: it can, or nobody tried (in a large mesh)."""
        addresses = dict.fromkeys(a for one in announcements for a in one.addresses)
        tried = [knock for a in addresses if (knock := self._seen.knock(a)) is not None]
        untried = bool(addresses) and not tried
        if untried or any(knock.node.startswith(instance) for knock in tried):
            return None
        # Docker's address of another machine is our own as well: what answers there says nothing.
        foreign = [k for k in tried if k.address.host not in self._here] or tried
        ranks = list(WHY)
        foreign.sort(key=lambda k: ranks.index(k.outcome) if k.outcome in WHY else len(ranks))
        if not foreign or foreign[0].outcome not in WHY:
            text = f"{name} is heard by mDNS, but none of its addresses leads to it"
            return fail("peers", text, f"mesh status on {name}")
        knock = foreign[0]
        told, cure = WHY[knock.outcome]
        port = knock.address.port
        text = f"{name} is heard by mDNS, but TCP {knock.address} {told}"
        return fail("peers", text, cure.format(name=name, port=port, host=knock.address.host))

    def _name(self, instance: str) -> str:
        """What people call a node, where the node here knows it."""
        known = (name for node, name in self._names.items() if node.startswith(instance))
        return next(known, instance[:8])

    def isolation(self) -> Iterator[Finding]:
        """Machines that were here before and are not heard: kept apart, or only not heard?"""
        kinds = {one.name: one for one in self._seen.interfaces}
        for echo in self._seen.echoes:
            here = kinds[echo.interface]
            if here.kind != "lan" or echo.others or not echo.looped:
                continue
            near = [
                knock
                for knock in self._seen.knocks
                if knock.address.host not in self._here and _is_near(knock.address.host, here)
            ]
            hosts = ", ".join(sorted({knock.address.host for knock in near})[:SUBNETS_SHOWN])
            if any(knock.outcome is mesh.Outcome.NODE for knock in near):
                text = f"{here.name}: peers ({hosts}) answer, but no multicast comes through"
                cure = "multicast (IGMP snooping) in the switch or access point; else --peer"
                yield warn("isolation", text, f"allow {cure} HOST:7710")
            elif near and all(k.outcome in UNHEARD for k in near):
                text = f"{here.name}: peers of before ({hosts}) neither answer nor are heard"
                cure = "switch client (AP) isolation or the guest network off, or use a cable"
                yield fail("isolation", text, f"if they are on: {cure}")

    def given(self) -> Iterator[Finding]:
        """Addresses that --peer gave and that lead to no peer, and whoever is of another mesh."""
        for address, reason in self._case.unreached.items():
            if "another mesh" not in reason:
                cure = "is `mesh up` running there? mesh doctor there"
                yield fail("given", f"--peer {address}: {reason}", cure)
        for knock in self._seen.knocks:
            if knock.outcome is mesh.Outcome.OTHER_MESH:
                text = f"{knock.address} has a certificate of another mesh"
                yield fail("given", text, JOIN)
        refused = (self._case.status or {}).get("refused", {}).get("certificate", 0)
        if refused:
            text = f"{counted(refused, 'connection')} of another mesh turned away"
            yield warn("given", text, JOIN)

    def twins(self) -> Iterator[Finding]:
        """Whether this node's identity is announced from elsewhere: a copied state directory."""
        if not self._own:
            return
        elsewhere = {
            address.host
            for echo in self._seen.echoes
            for one in echo.announcements
            if one.member and self._own.startswith(one.instance)
            for address in one.addresses
            if address.host not in self._here
        }
        if elsewhere:
            text = f"{', '.join(sorted(elsewhere))} runs with this node's identity: a copy of its state"
            cure = f"on the copy: mv {self._case.state} {self._case.state}.old; mesh join TOKEN"
            yield fail("identity", text, cure)

    def other_meshes(self) -> Iterator[Finding]:
        """Nodes that announce themselves and are not of ours."""
        strangers = {
            one.instance: one.source
            for echo in self._seen.echoes
            for one in echo.announcements
            if not one.member
        }
        if not strangers:
            return
        hosts = ", ".join(sorted(set(strangers.values()))[:SUBNETS_SHOWN])
        if not self._own:
            text = f"{counted(len(strangers), 'node')} here that can be joined ({hosts})"
            yield warn("meshes", text, "mesh join TOKEN, with what `mesh token` prints there")
        else:
            text = f"{counted(len(strangers), 'node')} of another mesh here ({hosts})"
            yield warn("meshes", text, JOIN)


JOIN: Final = "to be one mesh: mesh token there; mesh leave and mesh join TOKEN here"

WHY: Final = {
    mesh.Outcome.SILENT: (
        "does not answer: a firewall there drops it",
        "on {name}: sudo ufw allow {port}/tcp",
    ),
    mesh.Outcome.REFUSED: (
        "is refused: a firewall there rejects it, or the node has just ended",
        "on {name}: sudo ufw allow {port}/tcp; mesh status",
    ),
    mesh.Outcome.STUCK: (
        "opens and stays silent: that node is stopped, or overloaded",
        "on {name}: mesh doctor",
    ),
    mesh.Outcome.NO_ROUTE: ("has no route from here", "ip route get {host}"),
    mesh.Outcome.OTHER_MESH: ("shows a certificate of another mesh", "on {name}: mesh doctor"),
    mesh.Outcome.STRANGER: (
        "is something else than a node",
        "on {name}: ss -ltnp 'sport = {port}'",
    ),
}
"""What an address that is announced and leads nowhere means, and what mends it; the surest first."""


def counted(count: int, thing: str) -> str:
    """1 node, 2 nodes."""
    return f"{count} {thing}{'s' * (count != 1)}"


UNHEARD: Final = (mesh.Outcome.SILENT, mesh.Outcome.NO_ROUTE)


def _is_near(host: str, interface: "mesh.Interface") -> bool:
    """Whether an address is on the very network of an interface."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name: who knows
    networks = (ipaddress.ip_interface(text).network for text in interface.networks)
    return any(address.version == n.version and address in n for n in networks)


# ------------------------------------------------------------------------------- rules on this host


def local_firewall(port: int) -> list[Finding]:
    """A hint only: whether rules on this machine might keep others from the node's port."""
    rules = _rules()
    if rules is None:
        return [ok("firewall", "this user cannot read this machine's rules")]
    return read_rules(rules, port)


def read_rules(rules: str, port: int) -> list[Finding]:
    """What `nft list ruleset` says of packets that come in."""
    incoming = [body for body in CHAIN.findall(rules) if "hook input" in body]
    lines = [line.strip() for body in incoming for line in body.splitlines()]
    cure = f"sudo ufw allow {port}/tcp; sudo ufw allow 5353/udp; sudo nft list ruleset"
    bars = [line for line in lines if re.search(r"\b(drop|reject)\b", line)]
    named = [line for line in bars if re.search(rf"\b({port}|5353)\b", line)]
    if named:
        return [warn("firewall", f"a rule here may keep others out: {named[0]}", cure)]
    # Wherever that is: ufw keeps what is allowed in chains that its own lead to.
    opened = re.search(rf"\b{port}\b.*\baccept\b", rules)
    if bars and not opened:
        text = f"rules here drop what comes in, and none lets TCP {port} pass by name"
        return [warn("firewall", text, cure)]
    return [ok("firewall", "no rule on this machine keeps others out")]


def _rules() -> str | None:
    """None where there is no tool for it, or it is not for this user."""
    if shutil.which("nft") is None:
        return None
    try:
        done = subprocess.run(
            ["nft", "list", "ruleset"], capture_output=True, text=True, timeout=TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def addresses_to_try(case: Case) -> list[str]:
    """Where this node listens, what was given by hand, and where peers are or were."""
    alive = [peer["addresses"] for peer in case.others if peer["state"] == "alive"]
    told = [*case.listens, *case.unreached, *(a for addresses in alive for a in addresses)]
    return list(dict.fromkeys([*told, *mesh.earlier_peers(case.state)]))
