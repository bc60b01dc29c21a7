"""The `mesh` command. The only home of argparse.

Rules: 1. Asking a running node imports neither torch, trio, numpy nor rich. 2. Data goes to standard
output, everything else to standard error. 3. A user's mistake is one line that says what to do.
Exit codes: 0 ok, 1 error, 2 usage, 3 no node running, 130 Ctrl-C; `mesh run` exits with its script's.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mesh
from nodes import text

EXIT_ERROR, EXIT_USAGE, EXIT_NO_NODE, EXIT_INTERRUPTED = 1, 2, 3, 130


class Command(NamedTuple):
    """One subcommand: its flags and what it does."""

    help: str
    flags: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    act: Callable[[argparse.Namespace], int] = arguments.act
    try:
        code = act(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe shows itself here, not while Python ends
        return code
    except mesh.NodeNotRunning as error:
        return _fail(error, EXIT_NO_NODE)
    except mesh.UsageError as error:
        return _fail(error, EXIT_USAGE)
    except mesh.MeshError as error:
        return _fail(error, EXIT_ERROR)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Somebody closed the pipe we print into (`mesh peers | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(error, EXIT_ERROR)


def _fail(error: Exception, code: int) -> int:
    print(f"mesh: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mesh",
        description="Train one PyTorch model on several machines of a network, with no server.",
        epilog="Start: `mesh run train.py` on one machine, `mesh join TOKEN` and "
        "`mesh run train.py` on the others. `mesh demo` shows it on this machine alone.",
    )
    parser.add_argument("--version", action="version", version=f"gossipmesh {mesh.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        command.flags(sub)
        sub.set_defaults(act=command.act)
    return parser


# ---------------------------------------------------------------------------------------- flags


def _state_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="this node's state directory (default: $MESH_STATE, or yours)",
    )


def _identity_flags(parser: argparse.ArgumentParser) -> None:
    _state_flag(parser)
    parser.add_argument("--name", help="what this node is called (default: the host name)")


def _join_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("token", metavar="TOKEN", help="the line that `mesh token` prints")
    _identity_flags(parser)


def _node_flags(parser: argparse.ArgumentParser) -> None:
    _identity_flags(parser)
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
        help="announce and listen on this network interface only (repeatable)",
    )
    parser.add_argument(
        "--no-mdns", action="store_true", help="neither announce this node nor look for others"
    )


def _run_flags(parser: argparse.ArgumentParser) -> None:
    _node_flags(parser)
    parser.add_argument("script", metavar="SCRIPT", help="a Python script that calls mesh.join()")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="for the script")


def _question_flags(parser: argparse.ArgumentParser) -> None:
    _state_flag(parser)
    parser.add_argument("-N", "--node", metavar="NAME", help="which node, where several run here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _sim_flags(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("-o", "--out", metavar="FILE", help="draw SCRIPT's curves (matplotlib)")
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


def _settings(arguments: argparse.Namespace) -> "mesh.NodeSettings":
    return mesh.NodeSettings(
        state=mesh.state_directory(arguments.state),
        name=arguments.name,
        port=arguments.port,
        interfaces=tuple(arguments.interface),
        mdns=not arguments.no_mdns,
        peers=tuple(mesh.parse_address(peer) for peer in arguments.peer),
    )


# ------------------------------------------------------------------------------------- commands


def _init(arguments: argparse.Namespace) -> int:
    token = mesh.create_mesh(mesh.state_directory(arguments.state), arguments.name)
    print("a new mesh, with this machine in it; on the other machines run:", file=sys.stderr)
    print(f"mesh join {token}")
    return 0


def _token(arguments: argparse.Namespace) -> int:
    print(mesh.read_token(mesh.state_directory(arguments.state)))
    return 0


def _join(arguments: argparse.Namespace) -> int:
    state = mesh.state_directory(arguments.state)
    identity = mesh.join_mesh(state, arguments.token, arguments.name)
    print(f"{identity.name} ({identity.node[:8]}) is a member of mesh {identity.mesh}")
    return 0


def _leave(arguments: argparse.Namespace) -> int:
    from nodes import runner

    token = runner.leave(mesh.state_directory(arguments.state))
    print("this machine is in no mesh any more")
    if token is not None:
        print(f"it made that mesh; others can still be added with:\n  mesh join {token}")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # as in mesh/__main__.py, before numpy is imported
    return mesh.run_node(_settings(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from nodes import runner

    return runner.run(_settings(arguments), arguments.script, arguments.args)


def _demo(arguments: argparse.Namespace) -> int:
    from nodes import demo

    return demo.run(arguments.nodes, arguments.seconds, as_json=arguments.json)


def _sim(arguments: argparse.Namespace) -> int:
    if arguments.script is not None:
        from nodes import learn

        return learn.run(
            learn.Lesson(
                script=arguments.script,
                arguments=tuple(arguments.args),
                nodes=arguments.nodes,
                seed=arguments.seed,
                strategies=tuple(filter(None, arguments.strategies.split(","))),
                evaluate=arguments.evaluate,
                out=arguments.out,
                as_json=arguments.json,
            )
        )
    from nodes import sim

    return sim.run(
        sim.Order(
            seed=arguments.seed,
            seeds=arguments.seeds,
            nodes=arguments.nodes,
            seconds=arguments.seconds,
            faults=not arguments.no_faults,
            trace=arguments.trace,
            as_json=arguments.json,
        )
    )


def _question(
    op: str, draw: Callable[[dict[str, Any]], str]
) -> Callable[[argparse.Namespace], int]:
    def act(arguments: argparse.Namespace) -> int:
        node = mesh.find_node(arguments.state, arguments.node)
        answer = mesh.ask(node, op)
        del answer["ok"]
        print(json.dumps(answer) if arguments.json else draw(answer))
        return 0

    return act


COMMANDS = {
    "init": Command("make a new mesh with this machine in it", _identity_flags, _init),
    "token": Command("print the token that lets a machine join", _state_flag, _token),
    "join": Command("make this machine a member of a mesh", _join_flags, _join),
    "up": Command("run this machine's node in the foreground", _node_flags, _up),
    "run": Command("run a training script in the mesh", _run_flags, _run),
    "leave": Command("stop this machine's node and forget its mesh", _state_flag, _leave),
    "status": Command(
        "how this machine's node is", _question_flags, _question("status", text.status)
    ),
    "peers": Command(
        "the other nodes, and why some cannot be used",
        _question_flags,
        _question("peers", text.peers),
    ),
    "demo": Command("three nodes on this machine learn one model", _demo_flags, _demo),
    "sim": Command(
        "simulated meshes: under faults, each from one seed; or training a script", _sim_flags, _sim
    ),
}


if __name__ == "__main__":
    sys.exit(main())
