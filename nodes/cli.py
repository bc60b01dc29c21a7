"""The `mesh` command. The only home of argparse.

Rules: 1. Asking a running node imports neither torch, trio, numpy nor rich. 2. Data goes to standard
output, everything else to standard error. 3. A user's mistake is one line that says what to do.
Exit codes: 0 ok, 1 error, 2 usage, 3 no node running, 4 unhealthy, 5 timeout, 6 refused, 130 Ctrl-C;
`mesh run` exits with its script's.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mesh
from nodes import listing, questions

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
EXITS = {"usage": 2, "no_node": 3, "unhealthy": 4, "timeout": 5, "refused": 6}
"""by the code of a MeshError"""


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
    except mesh.MeshError as error:
        return _fail(error, error.code, error.hint, as_json=getattr(arguments, "json", False))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Somebody closed the pipe we print into (`mesh peers | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(error)


def _fail(
    error: Exception, code: str = "error", hint: str | None = None, *, as_json: bool = False
) -> int:
    """One line for a person, and with --json an object for a program."""
    if as_json:
        about = {"schema": "mesh.error/1", "code": code, "message": str(error), "hint": hint}
        print(json.dumps(about), flush=True)
    print(f"mesh: {error}", file=sys.stderr)
    return EXITS.get(code, EXIT_ERROR)


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
    parser.add_argument(
        "--allow-control",
        action="store_true",
        help="other members may pause, resume, set and stop what runs here",
    )


def _run_flags(parser: argparse.ArgumentParser) -> None:
    _node_flags(parser)
    parser.add_argument("script", metavar="SCRIPT", help="a Python script that calls mesh.join()")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="for the script")


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")


def _question_flags(parser: argparse.ArgumentParser) -> None:
    _state_flag(parser)
    parser.add_argument(
        "-N",
        "--node",
        metavar="NAME",
        help="which node: one of this machine, or any of the mesh, asked through it",
    )
    _json_flag(parser)


def _peers_flags(parser: argparse.ArgumentParser) -> None:
    _question_flags(parser)
    parser.add_argument(
        "-o", dest="wide", choices=("wide",), help="wide: also ids, samples/s and runs"
    )


def _list_flags(parser: argparse.ArgumentParser) -> None:
    _question_flags(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more happens")
    parser.add_argument("--limit", type=int, metavar="COUNT", help="the last so many only")


def _ping_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NODE", help="a name, or the beginning of an id")
    _question_flags(parser)
    parser.add_argument("-c", "--count", type=int, default=5, help="how many (default 5)")


def _bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NODE", help="a name, or the beginning of an id")
    _question_flags(parser)
    parser.add_argument("--mb", type=float, default=64.0, help="to send each way (default 64)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="after which it ends anyhow (default 10)"
    )


def _change_flags(parser: argparse.ArgumentParser) -> None:
    _question_flags(parser)
    parser.add_argument("--run", metavar="NAME", help="which run (default: all of that node)")


def _set_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("setting", metavar="every=STEPS", help="steps between two hand-overs")
    _change_flags(parser)


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _pull_flags(parser: argparse.ArgumentParser) -> None:
    _question_flags(parser)
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
        allow_control=arguments.allow_control,
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

    if arguments.node is not None:
        answer = questions.leave(arguments)
        print(json.dumps(answer) if arguments.json else listing.done(answer))
        return 0
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


def _pull(arguments: argparse.Namespace) -> int:
    node = mesh.find_node(arguments.state, arguments.node)
    from nodes import pull

    return pull.run(node, arguments.run, arguments.output, arguments.peers, as_json=arguments.json)


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


def _question(name: str) -> Callable[[argparse.Namespace], int]:
    def act(arguments: argparse.Namespace) -> int:
        if getattr(arguments, "follow", False):
            return questions.follow(name, arguments)
        return questions.act(questions.QUESTIONS[name], arguments)

    return act


COMMANDS = {
    "init": Command("make a new mesh with this machine in it", _identity_flags, _init),
    "token": Command("print the token that lets a machine join", _state_flag, _token),
    "join": Command("make this machine a member of a mesh", _join_flags, _join),
    "up": Command("run this machine's node in the foreground", _node_flags, _up),
    "run": Command("run a training script in the mesh", _run_flags, _run),
    "leave": Command(
        "stop this machine's node and forget its mesh; with -N only stop that node",
        _question_flags,
        _leave,
    ),
    "pull": Command("write the current model of a run to a file", _pull_flags, _pull),
    "status": Command("how a node is", _question_flags, _question("status")),
    "peers": Command(
        "the other nodes, and why some cannot be used", _peers_flags, _question("peers")
    ),
    "runs": Command("what is trained in the mesh, and where", _question_flags, _question("runs")),
    "events": Command("what happened to a node", _list_flags, _question("events")),
    "logs": Command("what a node printed", _list_flags, _question("logs")),
    "ping": Command("round trips to another node", _ping_flags, _question("ping")),
    "bench": Command(
        "how fast weights can travel to another node", _bench_flags, _question("bench")
    ),
    "pause": Command("train on without averaging", _change_flags, _question("pause")),
    "resume": Command("average again", _change_flags, _question("resume")),
    "set": Command("change a run: every=STEPS between hand-overs", _set_flags, _question("set")),
    "ls": Command("the nodes that run on this machine", _json_flag, _question("ls")),
    "demo": Command("three nodes on this machine learn one model", _demo_flags, _demo),
    "sim": Command(
        "simulated meshes: under faults, each from one seed; or training a script", _sim_flags, _sim
    ),
}


if __name__ == "__main__":
    sys.exit(main())
