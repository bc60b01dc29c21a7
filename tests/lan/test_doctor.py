"""`mesh doctor` on a LAN where everything is wrong that can be: it names each cause, and its cure.

All machines start together and are examined together: a look takes seconds, of waiting mostly.
"""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import pytest

from mesh.core.address import Address
from mesh.memory import Memory
from tests.helpers import REPOSITORY
from tests.lan.faulty_lan import FaultyLab, faketime_library, install_docker, set_wall_clock
from tests.lan.lab import MESH, Machine, NoLab, until

SCHEMA: Final = json.loads((REPOSITORY / "docs" / "schemas" / "mesh.doctor.1.json").read_text())
BUSY_S: Final = 20.0
LIMIT_S: Final = 10.0
"""What a look may take, on a machine that is not busy; here three are under way at once."""

ILL: Final = "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n"
WELL: Final = "print('9.9.9 262144.0')\nraise SystemExit\n"
"""In place of the real torch, which takes seconds of both cores; tests/test_doctor.py tries that."""

OTHER_PROTOCOL: Final = "import mesh.core.messages as m\nm.PROTOCOL = 9\n"
"""As sitecustomize.py it is read before anything takes the number from there."""

FULL: Final = (
    "mount -t tmpfs -o size=64k none {full} && cp -r {state}/. {full} && chmod 700 {full} && "
    "head -c 100000 /dev/zero > {full}/fill; exec {mesh} doctor --json --state {full}"
)

pytestmark = pytest.mark.skipif(shutil.which("nft") is None, reason="no `nft`: install nftables")


class Ward:
    """The machines by name, and what the doctor said on those where it was called."""

    def __init__(self, lab: FaultyLab) -> None:
        names = ("studio", "pi4", "kitchen", "pantry", "stranger", "copied", "alone")
        for name, machine in zip(names, lab.machines, strict=True):
            machine.name = name
        self.studio, self.pi4, self.kitchen, self.pantry = lab.machines[:4]
        self.stranger, self.copied, self.alone = lab.machines[4:]
        self.said: dict[str, tuple[int, dict[str, Any]]] = {}
        self.text = ""

    def found(self, machine: Machine, check: str, level: str) -> str:
        """Everything that a check found there at this level, with the cures."""
        findings = self.said[machine.name][1]["findings"]
        return "\n".join(
            f"{finding['text']} -> {finding['cure']}"
            for finding in findings
            if (finding["check"], finding["level"]) == (check, level)
        )

    def listed(self, machine: Machine) -> str:
        return json.dumps(self.said[machine.name][1]["findings"], indent=1)


def rule(machine: Machine, hook: str, words: str) -> None:
    """A rule of this machine's own firewall."""
    machine.call("nft", "add", "table", "inet", "wall")
    chain = f"{{ type filter hook {hook} priority 0; }}"
    machine.call("nft", "add", "chain", "inet", "wall", hook, *chain.split())
    machine.call("nft", "add", "rule", "inet", "wall", hook, *words.split())


def add_interface(machine: Machine, name: str, address: str) -> None:
    """A second cable, to nobody."""
    machine.call("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-end")
    machine.call("ip", "address", "add", address, "dev", name)
    for end in (name, f"{name}-end"):
        machine.call("ip", "link", "set", end, "up")


def install_vpn(machine: Machine) -> None:
    """What tailscale makes: a tunnel with one address."""
    machine.call("ip", "tuntap", "add", "mode", "tun", "name", "mine0")
    machine.call("ip", "address", "add", "100.64.0.7/32", "dev", "mine0")
    machine.call("ip", "link", "set", "mine0", "up")


def put_lan_on_a_bridge(machine: Machine) -> None:
    """As on a machine whose virtual machines are on its LAN: br0 has eth0 as its port, and the way out."""
    machine.take_address_away()
    machine.call("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
    machine.call("ip", "link", "set", "eth0", "master", "br0")
    machine.call("ip", "address", "add", f"{machine.host}/24", "dev", "br0")
    machine.call("ip", "link", "set", "br0", "up")
    machine.call("ip", "route", "replace", "default", "dev", "br0")


def python_path(machine: Machine, name: str, text: str) -> None:
    """Puts a module before all others on the machine's path."""
    folder = machine.directory / "path"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    machine.environment["PYTHONPATH"] = f"{folder}:{REPOSITORY}"


def make_ill(lab: FaultyLab, ward: Ward) -> None:
    """Each machine's own illness, and the nodes that run."""
    lab.found_mesh(ward.studio, ward.pi4, ward.kitchen, ward.pantry, ward.alone)
    lab.found_mesh(ward.stranger)
    shutil.copytree(ward.pi4.state, ward.copied.state)
    install_docker(ward.studio)
    install_vpn(ward.studio)
    install_docker(ward.pi4)
    put_lan_on_a_bridge(ward.pi4)
    python_path(ward.studio, "torch.py", WELL)
    rule(ward.kitchen, "input", "iifname eth0 meta l4proto tcp drop")
    python_path(ward.kitchen, "sitecustomize.py", OTHER_PROTOCOL)
    rule(ward.pantry, "input", "iifname eth0 meta l4proto tcp reject with tcp reset")
    add_interface(ward.alone, "out0", "10.88.1.1/24")
    add_interface(ward.alone, "in0", "10.88.2.1/24")
    rule(ward.alone, "output", "oifname out0 udp dport 5353 drop")
    rule(ward.alone, "input", "iifname in0 udp dport 5353 drop")
    python_path(ward.alone, "torch.py", ILL)
    python_path(ward.copied, "torch.py", WELL)
    ward.alone.up()
    if faketime_library():
        set_wall_clock(ward.pi4, -2)
    for machine in (ward.pi4, ward.kitchen, ward.pantry, ward.stranger):
        machine.up()
    ward.studio.up("--peer", ward.stranger.address)
    until("alone is up", lambda: ward.alone.running, within_s=BUSY_S)
    ward.alone.programs[0].kill()
    lab.cut([ward.alone], [one for one in lab.machines if one is not ward.alone])
    earlier = [Address(one.host, 7710) for one in (ward.studio, ward.pi4)]
    Memory(ward.alone.state).store_peers(earlier)
    nodes = [ward.studio, ward.pi4, ward.kitchen, ward.pantry, ward.stranger]
    until("all are up", lambda: all(one.running for one in nodes), within_s=BUSY_S)
    until("two meet", lambda: ward.studio.lists(ward.pi4, "alive"), within_s=BUSY_S)


def call_doctors(ward: Ward) -> None:
    """On three machines at once."""
    if faketime_library():
        set_wall_clock(ward.copied, -4000)
        ward.copied.environment["NO_FAKE_STAT"] = "1"
    full = ward.copied.directory / "full"
    full.mkdir()
    filled = FULL.format(full=full, state=ward.copied.state, mesh=MESH)
    few = f"ulimit -n 100; exec {MESH} doctor --json --state {ward.alone.state}"
    look = (MESH, "doctor", "--json", "-N", "studio")
    commands = [
        (ward.studio, look),
        (ward.copied, ("sh", "-c", filled)),
        (ward.alone, ("sh", "-c", few)),
    ]
    running = [
        (
            machine,
            subprocess.Popen(
                machine._inside(command),
                env=machine._environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
        for machine, command in commands
    ]
    for machine, process in running:
        out, err = process.communicate(timeout=3 * BUSY_S)
        assert out, f"{machine.name}: {err}"
        ward.said[machine.name] = process.returncode, json.loads(out)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    lab = FaultyLab(tmp_path_factory.mktemp("lan"), 7)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lab)
        except NoLab as error:
            pytest.skip(str(error))
        ward = Ward(lab)
        try:
            make_ill(lab, ward)
            call_doctors(ward)
        except BaseException:
            print(lab.logs())
            raise
        yield ward


def test_what_it_says_fits_its_schema_and_its_exit_code(ward: Ward) -> None:
    for code, said in ward.said.values():
        jsonschema.validate(said, SCHEMA)
        assert code == 4
        assert not said["healthy"]
        for finding in said["findings"]:
            assert finding["cure"] or finding["level"] == "ok"


def test_a_peer_that_answers_and_every_other_thing_that_is_well_are_ok(ward: Ward) -> None:
    studio = ward.studio
    assert "heard by mDNS, and they answer: pi4 ->" in ward.found(studio, "peers", "ok")
    assert "peers alive: 1," in ward.found(studio, "node", "ok")
    assert f"{studio.address} answers" in ward.found(studio, "port", "ok")
    heard = re.search(
        r"eth0: sent, and (\d) other machines heard", ward.found(studio, "multicast", "ok")
    )
    assert heard is not None, ward.listed(studio)
    assert int(heard[1]) >= 4, "the doctors of others are heard as well"
    for check in ("identity", "disk", "clock", "descriptors", "firewall"):
        assert ward.found(studio, check, "ok"), ward.listed(studio)
    assert "torch 9.9.9 imports and multiplies" in ward.found(studio, "torch", "ok")


def test_a_look_leaves_no_mark_on_those_that_are_looked_at(ward: Ward) -> None:
    status = ward.pi4.status()
    assert status["refused"] == {}
    assert status["peers"]["alive"] == 1


def test_a_firewall_that_drops_or_rejects_tcp_is_told_from_mdns_that_passes(ward: Ward) -> None:
    dropped, rejected = (one.node[:8] for one in (ward.kitchen, ward.pantry))
    found = ward.found(ward.studio, "peers", "fail")
    assert f"{dropped} is heard by mDNS, but TCP {ward.kitchen.address} does not answer" in found
    assert f"{rejected} is heard by mDNS, but TCP {ward.pantry.address} is refused" in found
    assert f"on {dropped}: sudo ufw allow 7710/tcp" in found
    health = "\n".join(ward.studio.status()["health"])
    assert f"{rejected} seen by mDNS but TCP {ward.pantry.address} refused" in health
    assert "(firewall? run `mesh doctor`)" in health


def test_another_protocol_is_named_with_both_numbers(ward: Ward) -> None:
    found = ward.found(ward.studio, "peers", "fail")
    assert f"{ward.kitchen.node[:8]} speaks protocol 9, this node " in found
    assert "pip install -U gossipmesh" in found


def test_docker_and_a_vpn_are_ignored_and_it_says_why_and_how_to_use_them(ward: Ward) -> None:
    found = ward.found(ward.studio, "interface", "ok")
    assert "docker0 172.17.0.1: ignored, a bridge to no network card" in found
    assert "mesh up --interface eth0 --interface docker0 uses it" in found
    assert "mine0 100.64.0.7: ignored, a tunnel, as VPNs make; mesh up" in found
    assert "lo 127.0.0.1: left out" in found.replace(" ::1", "")
    for level in ("ok", "warn", "fail"):
        assert not {"docker0:", "mine0:"} & {*ward.found(ward.studio, "multicast", level).split()}
    hosts = {address.rpartition(":")[0] for address in ward.studio.status()["node"]["addresses"]}
    assert hosts & {"172.17.0.1", "100.64.0.7"} == set()
    assert ward.studio.host in hosts


def test_a_bridge_that_is_the_lan_is_used_beside_one_that_is_not(ward: Ward) -> None:
    hosts = {address.rpartition(":")[0] for address in ward.pi4.status()["node"]["addresses"]}
    assert ward.pi4.host in hosts
    assert "172.17.0.1" not in hosts


def test_another_mesh_is_seen_and_its_certificate_named(ward: Ward) -> None:
    found = ward.found(ward.studio, "meshes", "warn")
    assert f"1 node of another mesh here ({ward.stranger.host})" in found
    assert "mesh join TOKEN" in found
    given = ward.found(ward.studio, "given", "fail")
    assert f"{ward.stranger.address} has a certificate of another mesh" in given


def test_a_copied_state_directory_is_found_from_the_copy(ward: Ward) -> None:
    found = ward.found(ward.copied, "identity", "fail")
    assert f"{ward.pi4.host} runs with this node's identity" in found
    assert "mesh join TOKEN" in found
    assert ward.found(ward.studio, "identity", "fail") == ""


def test_a_full_disk_and_a_missing_node_are_told(ward: Ward) -> None:
    assert "no space left" in ward.found(ward.copied, "disk", "fail")
    assert "no node runs" in ward.found(ward.copied, "node", "warn")


@pytest.mark.skipif(faketime_library() is None, reason="no faketime here")
def test_a_clock_that_is_years_off_is_a_warning(ward: Ward) -> None:
    assert "apart" in ward.found(ward.copied, "clock", "warn") or "behind" in ward.found(
        ward.copied, "clock", "warn"
    )


@pytest.mark.skipif(faketime_library() is None, reason="no faketime here")
def test_a_peer_whose_clock_is_days_off_is_named_from_elsewhere(ward: Ward) -> None:
    found = ward.found(ward.studio, "clock", "warn")
    assert re.search(r"pi4's clock is (2d0h|1d23h) behind this one -> on pi4, or here", found)


def test_a_machine_that_is_kept_apart_is_told_so(ward: Ward) -> None:
    found = ward.found(ward.alone, "isolation", "fail")
    assert f"eth0: peers of before ({ward.studio.host}, {ward.pi4.host}) neither" in found
    assert "isolation" in found.partition("->")[2]
    assert "eth0: sent, but no other machine" in ward.found(ward.alone, "multicast", "warn")


def test_multicast_that_a_firewall_here_drops_is_told_by_its_direction(ward: Ward) -> None:
    found = ward.found(ward.alone, "multicast", "fail")
    assert "out0: nothing can be sent by multicast: operation not permitted" in found
    assert "in0: sent, but not even this machine heard it" in found
    assert "eth0" not in found
    assert "udp dport 5353 drop" in ward.found(ward.alone, "firewall", "warn")


def test_what_a_killed_node_left_few_descriptors_and_a_torch_that_dies_are_told(
    ward: Ward,
) -> None:
    pid = ward.alone.programs[0].process.pid
    assert f"(pid {pid}) left its files behind" in ward.found(ward.alone, "node", "warn")
    assert "100 files" in ward.found(ward.alone, "descriptors", "fail")
    assert "torch dies of SIGILL" in ward.found(ward.alone, "torch", "fail")
