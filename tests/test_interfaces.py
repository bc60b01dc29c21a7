"""Which of a machine's interfaces a node uses, and what shows what an interface is."""

import ifaddr
import pytest

from mesh.net import interfaces
from mesh.net.interfaces import Kernel, all_interfaces, in_use, local_addresses
from mesh.surroundings import Interface

ETHERNET, TUNNEL = 1, 65534
ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"


class Machine:
    """What Linux says of a machine's interfaces, as files."""

    def __init__(self, folder):
        self._folder = folder / "net"
        self.kernel = Kernel(interfaces=self._folder, routes=folder / "route")

    def add(self, name, *, type=ETHERNET, card=False, bridge=False, tun=False, flags=0x1003, over=()):  # fmt: skip
        here = self._folder / name
        here.mkdir(parents=True)
        (here / "type").write_text(f"{type}\n")
        (here / "flags").write_text(f"{flags:#x}\n")
        for there, entry in ((card, "device"), (bridge, "bridge")):
            if there:
                (here / entry).mkdir()
        if tun:
            (here / "tun_flags").write_text("0x1801\n")
        for below in over:
            (here / f"lower_{below}").symlink_to(self._folder / below)

    def default_way(self, name):
        near = f"{name}\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
        self.kernel.routes.write_text(f"{ROUTES}{name}\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n{near}")  # fmt: skip

    def kind(self, name):
        return self.kernel.kind(name)[0]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_bridge_is_the_lan_where_a_network_card_or_the_way_out_is_behind_it(machine):
    machine.add("enp3s0", card=True)
    machine.add("enp3s0.7", over=["enp3s0"])
    machine.add("veth1")
    machine.add("br0", bridge=True, over=["enp3s0", "veth1"])
    machine.add("br-lan", bridge=True, over=["enp3s0.7"])
    machine.add("docker0", bridge=True, over=["veth1"])
    machine.add("mine", bridge=True)
    machine.add("br9", bridge=True, over=["veth1"])
    machine.default_way("br9")
    kinds = {name: machine.kind(name) for name in ("br0", "br-lan", "docker0", "mine", "br9")}
    assert kinds == {"br0": "lan", "br-lan": "lan", "docker0": "containers", "mine": "containers", "br9": "lan"}  # fmt: skip
    assert "a bridge to no network card" in machine.kernel.kind("mine")[1]


def test_tunnels_are_known_by_the_kernel_whatever_they_are_called(machine):
    machine.add("home", type=TUNNEL, flags=0x10D1)
    machine.add("office", tun=True)
    machine.add("line", flags=0x1011)
    machine.add("wwan0", type=TUNNEL, card=True)
    assert [machine.kind(name) for name in ("home", "office", "line")] == ["vpn"] * 3
    assert machine.kind("wwan0") == "lan", "a modem is a card"
    machine.default_way("home")
    assert machine.kind("home") == "vpn", "even where all else goes through it"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eth0", "lan"),
        ("en0", "lan"),
        ("wlp2s0", "lan"),
        ("docker0", "containers"),
        ("bridge100", "containers"),
        ("bridge0", "lan"),
        ("utun3", "vpn"),
        ("wg0", "vpn"),
    ],
)
def test_where_the_kernel_does_not_say_names_decide(machine, name, kind):
    assert machine.kind(name) == kind
    machine.add(name, card=True)
    assert machine.kind(name) == "lan", "a card is a card"


def of(name, kind, *networks):
    return Interface(name=name, kind=kind, networks=networks)


def test_what_is_no_lan_is_used_only_where_nothing_else_has_an_address():
    lan, vpn = of("eth0", "lan", "192.168.1.20/24"), of("wg0", "vpn", "10.1.0.2/32")
    docker, lo = of("docker0", "containers", "172.17.0.1/16"), of("lo", "loopback", "127.0.0.1/8")
    unplugged = of("eth0", "lan")
    assert in_use([docker, lan, lo, vpn]) == [lan]
    assert in_use([docker, unplugged, lo, vpn]) == [vpn]
    assert in_use([docker, unplugged, lo]) == [docker]
    assert in_use([unplugged, lo]) == []
    alone = of("eth0", "lan", "169.254.7.1/16")  # no DHCP: a cable to another, or nothing behind it
    assert in_use([docker, alone, lo, vpn]) == [alone, vpn]
    assert in_use([alone, lo]) == [alone]


def adapter(name, *addresses):
    return ifaddr.Adapter(name, name, [ifaddr.IP(text, length, name) for text, length in addresses])


def test_addresses_are_those_in_use_those_towards_a_given_peer_or_those_that_are_named(monkeypatch):
    adapters = [
        adapter("eth0", ("192.168.1.20", 24), (("fe80::1", 0, 2), 64)),
        adapter("tailscale0", ("100.64.0.7", 32)),
        adapter("docker0", ("172.17.0.1", 16)),
        adapter("lo", ("127.0.0.1", 8)),
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda include_unconfigured=False: adapters)
    ways = {"100.64.0.9": "100.64.0.7", "192.168.1.9": "192.168.1.20", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(interfaces, "_way", ways.get)
    assert [one.kind for one in all_interfaces()] == ["containers", "lan", "loopback", "vpn"]
    assert local_addresses() == ("192.168.1.20",)
    for near in ("192.168.1.9", "127.0.0.1", "pi4.local"):
        assert local_addresses((), (near,)) == ("192.168.1.20",)
    both = local_addresses((), ("100.64.0.9", "192.168.1.9"))
    assert both == ("100.64.0.7", "192.168.1.20"), "a peer behind a VPN has to find the way back"
    assert local_addresses(("docker0",)) == ("172.17.0.1",)
    assert local_addresses(("lo",)) == ("127.0.0.1",)


def test_the_way_to_a_host_is_one_of_our_addresses():
    assert interfaces._way("127.0.0.1") == "127.0.0.1"
    assert interfaces._way("pi4.local") is None
