"""The `mesh` command. Its flags are in flags.py; argparse is at home in these two.

Rules: 1. Asking a running node imports neither torch, trio, numpy nor rich. 2. Data goes to standard
output, everything else to standard error. 3. A user's mistake is one line that says what to do.
Exit codes: 0 ok, 1 error, 2 usage, 3 no node running, 4 unhealthy, 5 timeout, 6 refused, 130 Ctrl-C;
`mesh run` exits with its script's.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mesh
from nodes import flags, listing, questions

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
    _open_streams()
    try:
        try:
            return execute(argv)
        finally:
            sys.stdout.flush()  # a closed pipe shows itself here, not while Python ends
    except BrokenPipeError:
        # Somebody closed the pipe we print into (`mesh peers | head`): nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(error)


def _open_streams() -> None:
    """Whatever a caller closed (`mesh status >&-`) is there, and takes every character."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (till the end)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def execute(argv: Sequence[str] | None) -> int:
    """The same for `mesh shell`, which goes on: a standard output that fails is left to the caller."""
    arguments = _parser().parse_args(argv)
    as_json = getattr(arguments, "json", False)
    try:
        code = _act(arguments)
        sys.stdout.flush()  # an output that is full shows itself here
        return code
    except mesh.MeshError as error:
        return _fail(error, error.code, error.hint, as_json=as_json)
    except OSError as error:
        if not as_json or isinstance(error, BrokenPipeError):
            raise
        return _fail(error, as_json=True)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _act(arguments: argparse.Namespace) -> int:
    act: Callable[[argparse.Namespace], int] = arguments.act
    every_s = getattr(arguments, "watch", None)
    if every_s is None:
        return act(arguments)
    from nodes import watch

    return watch.repeat(lambda: act(arguments), every_s, as_json=arguments.json)


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
    answer = runner.leave(mesh.state_directory(arguments.state))
    if arguments.json:
        print(json.dumps(answer))
        return 0
    print("this machine is in no mesh any more")
    if answer["token"] is not None:
        print(f"it made that mesh; others can still be added with:\n  mesh join {answer['token']}")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # as in mesh/__main__.py, before numpy is imported
    return mesh.run_node(flags.settings(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from nodes import runner

    return runner.run(flags.settings(arguments), arguments.script, arguments.args)


def _doctor(arguments: argparse.Namespace) -> int:
    from nodes import doctor

    interfaces = tuple(arguments.interface)
    return doctor.run(arguments.state, arguments.node, interfaces, as_json=arguments.json)


def _service(arguments: argparse.Namespace) -> int:
    from nodes import service

    match arguments.action:
        case "install":
            settings = flags.settings(arguments)
            return service.install(settings, service.manager(), only_print=arguments.print)
        case "uninstall":
            return service.uninstall(service.manager())
        case _:
            return service.show(service.manager(), as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from nodes import demo

    return demo.run(arguments.nodes, arguments.seconds, as_json=arguments.json)


def _pull(arguments: argparse.Namespace) -> int:
    from nodes import output

    questions.check("--peers", arguments.peers, questions.PULL_PEERS)
    path = output.file("-o", arguments.output)
    node = mesh.find_node(arguments.state, arguments.node)
    from nodes import pull

    return pull.run(node, arguments.run, path, arguments.peers, as_json=arguments.json)


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
                out=arguments.output,
                as_json=arguments.json,
            )
        )
    for flag, given in (
        ("-o", arguments.output),
        ("--strategies", arguments.strategies),
        ("--evaluate", arguments.evaluate),
    ):
        if given:
            raise mesh.UsageError(
                f"{flag} {given}: of which SCRIPT? `mesh sim {flag} ... train.py`"
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


def _plot(arguments: argparse.Namespace) -> int:
    from nodes import plot

    return plot.run(
        plot.Order(
            state=arguments.state,
            node=arguments.node,
            run=arguments.run,
            output=arguments.output,
            as_json=arguments.json,
        )
    )


def _shell(arguments: argparse.Namespace) -> int:
    from nodes import grammar, repl

    if arguments.python:
        return repl.python(arguments.state, arguments.node)
    given = {"--state": arguments.state, "--node": arguments.node}
    given = {flag: value for flag, value in given.items() if value is not None}
    state = mesh.state_directory(arguments.state)
    return repl.run(execute, grammar.read(_parser()), state, given)


COMMANDS = {
    "init": Command("make a new mesh with this machine in it", flags.identity, _init),
    "token": Command("print the token that lets a machine join", flags.state, _token),
    "join": Command("make this machine a member of a mesh", flags.join, _join),
    "up": Command("run this machine's node in the foreground", flags.up, _up),
    "run": Command("run a training script in the mesh", flags.run, _run),
    "leave": Command(
        "stop this machine's node and forget its mesh; with -N only stop that node",
        flags.question,
        _leave,
    ),
    "pull": Command("write the current model of a run to a file", flags.pull, _pull),
    "status": Command("how a node is", flags.repeated, _question("status")),
    "peers": Command(
        "the other nodes, and why some cannot be used", flags.peers, _question("peers")
    ),
    "runs": Command("what is trained in the mesh, and where", flags.repeated, _question("runs")),
    "events": Command("what happened to a node", flags.ring, _question("events")),
    "logs": Command("what a node printed", flags.ring, _question("logs")),
    "ping": Command("round trips to another node", flags.ping, _question("ping")),
    "bench": Command(
        "how fast weights can travel to another node", flags.bench, _question("bench")
    ),
    "doctor": Command(
        "what keeps this node from working, and what mends it", flags.doctor, _doctor
    ),
    "service": Command("a node that starts with this machine", flags.service, _service),
    "pause": Command("train on without averaging", flags.change, _question("pause")),
    "resume": Command("average again", flags.change, _question("resume")),
    "set": Command("change a run: every=STEPS between hand-overs", flags.setting, _question("set")),
    "ls": Command("the nodes that run on this machine", flags.ls, _question("ls")),
    "demo": Command("three nodes on this machine learn one model", flags.demo, _demo),
    "top": Command("the whole mesh on one screen, as it changes", flags.top, _top),
    "plot": Command("loss and drift of every node over time", flags.plot, _plot),
    "shell": Command("type commands without `mesh`, or Python", flags.shell, _shell),
    "completion": Command(
        "print a script that completes commands for your shell", flags.completion, _completion
    ),
    "version": Command(
        "which version this is, and which one the node runs", flags.as_json, _version
    ),
    "sim": Command(
        "simulated meshes: under faults, each from one seed; or training a script", flags.sim, _sim
    ),
}


if __name__ == "__main__":
    sys.exit(main())
