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
    try:
        return execute(argv)
    except BrokenPipeError:
        # Somebody closed the pipe we print into (`mesh peers | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(error, EXIT_ERROR)


def execute(argv: Sequence[str] | None) -> int:
    """The same for `mesh shell`, which goes on: OSError is left to the caller."""
    arguments = _parser().parse_args(argv)
    try:
        code = _act(arguments)
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


def _act(arguments: argparse.Namespace) -> int:
    act: Callable[[argparse.Namespace], int] = arguments.act
    every_s = getattr(arguments, "watch", None)
    if every_s is None:
        return act(arguments)
    from nodes import watch

    return watch.repeat(lambda: act(arguments), every_s, as_json=arguments.json)


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


def _node_flag(parser: argparse.ArgumentParser) -> None:
    _state_flag(parser)
    parser.add_argument("-N", "--node", metavar="NAME", help="which node, where several run here")


def _question_flags(parser: argparse.ArgumentParser) -> None:
    _node_flag(parser)
    _json_flag(parser)
    _watch_flag(
        parser,
        "watch",
        "ask again and again (default: every 2); with --json one object a line",
    )


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _watch_flag(parser: argparse.ArgumentParser, into: str, told: str) -> None:
    parser.add_argument(
        "-w", "--watch", metavar="SECONDS", dest=into, nargs="?", type=float, const=2.0, help=told
    )


def _top_flags(parser: argparse.ArgumentParser) -> None:
    _node_flag(parser)
    _json_flag(parser)
    _watch_flag(parser, "every", "look so often (default: every 1; without a terminal once)")
    sorts = ("name", "state", "step", "loss", "drift", "rate", "in", "out", "cpu")
    parser.add_argument("--sort", choices=sorts, default="name", help="by which column at first")
    parser.add_argument("--svg", metavar="FILE", help="draw one look into this picture instead")


def _shell_flags(parser: argparse.ArgumentParser) -> None:
    _node_flag(parser)
    parser.add_argument(
        "--python",
        action="store_true",
        help="Python with `mesh` and status(), peers(), ... at hand",
    )


def _completion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        choices=("bash", "zsh", "fish", "names"),
        help="whose script to print; names: of the nodes that -N may name, one a line",
    )


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _sim_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="COUNT", help="how many (default 1)"
    )
    parser.add_argument("--nodes", type=int, default=8, help="how many (default 8)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="of virtual time under faults (default 4)"
    )
    parser.add_argument("--no-faults", action="store_true", help="nothing goes wrong")
    parser.add_argument("--trace", action="store_true", help="print every event and effect")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


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


def _version(arguments: argparse.Namespace) -> int:
    from nodes import version

    told = version.answer()
    print(json.dumps(told) if arguments.json else version.draw(told))
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from nodes import completion, grammar

    if arguments.shell == "names":
        print("".join(f"{name}\n" for name in grammar.names()), end="")
    else:
        print(completion.script(arguments.shell, grammar.read(_parser())), end="")
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from nodes import top

    return top.run(
        top.Order(
            state=arguments.state,
            node=arguments.node,
            sort=arguments.sort,
            every_s=arguments.every,
            as_json=arguments.json,
            svg=arguments.svg,
        )
    )


def _shell(arguments: argparse.Namespace) -> int:
    from nodes import grammar, repl

    if arguments.node is not None:
        arguments.state = str(mesh.find_node(arguments.state, arguments.node).state)
    if arguments.python:
        return repl.python(arguments.state)
    if arguments.state is not None:
        os.environ["MESH_STATE"] = arguments.state  # what each line means unless it says otherwise
    return repl.run(execute, grammar.read(_parser()), mesh.state_directory(arguments.state))


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
    "top": Command("the whole mesh on one screen, as it changes", _top_flags, _top),
    "shell": Command("type commands without `mesh`, or Python", _shell_flags, _shell),
    "completion": Command(
        "print a script that completes commands for your shell", _completion_flags, _completion
    ),
    "version": Command("which version this is, and which one the node runs", _json_flag, _version),
    "sim": Command("simulated meshes live under faults, each from one seed", _sim_flags, _sim),
}


if __name__ == "__main__":
    sys.exit(main())
