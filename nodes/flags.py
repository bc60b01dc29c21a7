"""The flags of every command, and the settings of a node that they amount to.

Rules: 1. A flag means the same wherever it is. 2. What a person may leave out has the default that the
help names.
"""

import argparse

import mesh


def state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="this node's state directory (default: $MESH_STATE, or yours)",
    )


def identity(parser: argparse.ArgumentParser) -> None:
    state(parser)
    parser.add_argument("--name", help="what this node is called (default: the host name)")


def join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("token", metavar="TOKEN", help="the line that `mesh token` prints")
    identity(parser)


def up(parser: argparse.ArgumentParser) -> None:
    identity(parser)
    parser.add_argument("--port", type=int, help="listen on this port (default: 7710, or any)")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="also dial this peer, for ever (repeatable)",
    )
    parser.add_argument(
        "--interface",
        action="append",
        default=[],
        metavar="NAME",
        help="announce and listen on this network interface only (repeatable; "
        "default: all but loopback, bridges to containers and VPNs)",
    )
    parser.add_argument(
        "--no-mdns", action="store_true", help="neither announce this node nor look for others"
    )
    parser.add_argument(
        "--allow-control",
        action="store_true",
        help="other members may pause, resume, set and stop what runs here",
    )
    parser.add_argument(
        "--metrics",
        type=int,
        metavar="PORT",
        help="serve Prometheus text on this port of 127.0.0.1",
    )


def run(parser: argparse.ArgumentParser) -> None:
    up(parser)
    parser.add_argument("script", metavar="SCRIPT", help="a Python script that calls mesh.join()")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="for the script")


def as_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def node(
    parser: argparse.ArgumentParser,
    told: str = "which node: one of this machine, or any of the mesh, asked through it",
) -> None:
    state(parser)
    parser.add_argument("-N", "--node", metavar="NAME", help=told)


def node_here(parser: argparse.ArgumentParser) -> None:
    node(parser, "which node of this machine; no other can be asked for this")
    as_json(parser)


def question(parser: argparse.ArgumentParser) -> None:
    node(parser)
    as_json(parser)


def repeated(parser: argparse.ArgumentParser) -> None:
    question(parser)
    watch(parser, "watch", "ask again and again (default: every 2)")


def peers(parser: argparse.ArgumentParser) -> None:
    repeated(parser)
    parser.add_argument(
        "-o", dest="wide", choices=("wide",), help="wide: also ids, samples/s and runs"
    )


def ring(parser: argparse.ArgumentParser) -> None:
    question(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more happens")
    parser.add_argument("--limit", type=int, metavar="COUNT", help="the last so many only")


def ping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NODE", help="a name, or the beginning of an id")
    repeated(parser)
    parser.add_argument("-c", "--count", type=int, default=5, help="how many (default 5)")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NODE", help="a name, or the beginning of an id")
    question(parser)
    parser.add_argument("--mb", type=float, default=64.0, help="to send each way (default 64)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="after which it ends anyhow (default 10)"
    )


def change(parser: argparse.ArgumentParser) -> None:
    question(parser)
    parser.add_argument("--run", metavar="NAME", help="which run (default: all of that node)")


def setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("setting", metavar="every=STEPS", help="steps between two hand-overs")
    change(parser)


def watch(parser: argparse.ArgumentParser, into: str, told: str) -> None:
    parser.add_argument(
        "-w", "--watch", metavar="SECONDS", dest=into, nargs="?", type=float, const=2.0, help=told
    )


def top(parser: argparse.ArgumentParser) -> None:
    node(parser)
    as_json(parser)
    watch(parser, "every", "look so often (default: every 1; without a terminal once)")
    sorts = ("name", "state", "step", "loss", "drift", "rate", "in", "out", "cpu")
    parser.add_argument("--sort", choices=sorts, default="name", help="by which column at first")
    parser.add_argument("--svg", metavar="FILE", help="draw one look into this picture instead")


def plot(parser: argparse.ArgumentParser) -> None:
    question(parser)
    parser.add_argument("--run", metavar="NAME", help="of this run only")
    parser.add_argument("-o", "--output", metavar="FILE", help="into a picture: .png, .svg, .pdf")


def ls(parser: argparse.ArgumentParser) -> None:
    as_json(parser)
    watch(parser, "watch", "look again and again (default: every 2)")


def shell(parser: argparse.ArgumentParser) -> None:
    node(parser)
    parser.add_argument(
        "--python",
        action="store_true",
        help="Python with `mesh` and status(), peers(), ... at hand",
    )


def completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "fish", "names"),
        help="whose script to print; names: of the nodes that -N may name, one a line",
    )


def pull(parser: argparse.ArgumentParser) -> None:
    node_here(parser)
    parser.add_argument("--run", required=True, metavar="NAME", help="the training's name")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the safetensors file to write"
    )
    parser.add_argument(
        "--peers",
        type=int,
        default=3,
        metavar="COUNT",
        help="the mean of so many nodes' models; this one's own counts (default 3)",
    )


def doctor(parser: argparse.ArgumentParser) -> None:
    node_here(parser)
    parser.add_argument(
        "--interface",
        action="append",
        default=[],
        metavar="NAME",
        help="look at this network interface only (repeatable; default: those that a node uses)",
    )


def service(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    add = actions.add_parser("install", help="write it; it will run `mesh up` with these flags")
    up(add)
    add.add_argument("--print", action="store_true", help="show it, write nothing")
    actions.add_parser("uninstall", help="stop and remove it")
    look = actions.add_parser("status", help="whether it is there and runs (exit code 4: not)")
    look.add_argument("--json", action="store_true", help="print one JSON object")


def demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def sim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="COUNT", help="how many (default 1)"
    )
    parser.add_argument("-n", "--nodes", type=int, default=8, help="how many (default 8)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of virtual time under faults (default 4)"
    )
    parser.add_argument("--no-faults", action="store_true", help="nothing goes wrong")
    parser.add_argument("--trace", action="store_true", help="print every event and effect")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument(
        "--strategies", default="", metavar="A,B", help="run SCRIPT by each of them, side by side"
    )
    parser.add_argument(
        "--evaluate", metavar="NAME", help="a function of SCRIPT: evaluate(model) -> accuracy"
    )
    # --out, as it was called first, is understood as the beginning of --output.
    parser.add_argument("-o", "--output", metavar="FILE", help="draw SCRIPT's curves (matplotlib)")
    parser.add_argument(
        "script",
        metavar="SCRIPT",
        nargs="?",
        help="train this script on the virtual nodes, without faults, instead",
    )
    parser.add_argument(
        "args",
        metavar="ARGS",
        nargs=argparse.REMAINDER,
        help="for SCRIPT; {rank} and {nodes} become each node's own",
    )


def settings(arguments: argparse.Namespace) -> "mesh.NodeSettings":
    return mesh.NodeSettings(
        state=mesh.state_directory(arguments.state),
        name=arguments.name,
        port=arguments.port,
        interfaces=tuple(arguments.interface),
        mdns=not arguments.no_mdns,
        peers=tuple(mesh.parse_address(peer) for peer in arguments.peer),
        allow_control=arguments.allow_control,
        metrics=arguments.metrics,
    )
