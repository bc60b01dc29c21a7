"""What the Tab key offers, in each of the shells that are here."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from nodes import completion, grammar
from nodes.cli import COMMANDS, _parser, main
from tests.helpers import REPOSITORY
from tests.terminal import StandIn, Terminal, large_mesh

TRAP = "$(touch trapped)"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Environment and folder of a machine whose node knows a peer that means no good."""
    root = tmp_path_factory.mktemp("host")
    (root / "bin").mkdir()
    command = root / "bin" / "mesh"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nodes.cli "$@"\n')
    command.chmod(0o755)
    node = StandIn(root / "s", large_mesh(4, names={1: "pi kitchen", 2: TRAP, 3: "pi4"}))
    runtime = root / "run"
    runtime.mkdir(mode=0o700)
    node.list_among_nodes(runtime)
    (root / "data").mkdir()
    yield {
        "env": {
            **os.environ,
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "XDG_RUNTIME_DIR": str(runtime),
            "HOME": str(root),
        },
        "cwd": root,
    }
    node.close()


def in_shell(host, *command, given=None):
    completed = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=30, check=False, **host
    )
    assert completed.stderr == ""
    assert completed.returncode == 0
    return completed.stdout


def bash_offers(host, *lines):
    """What bash offers at the end of each line: a list of words for each."""
    script = completion.script("bash", grammar.read(_parser())) + "\n"
    for line in lines:
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        script += (
            f"COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}\n_mesh\n"
            """printf '%s\\n' "${COMPREPLY[@]}" . \n"""
        )
    said = in_shell(host, shutil.which("bash"), "--norc", given=script)
    offers = [[]]
    for word in said.splitlines():
        if word == ".":
            offers.append([])
        elif word:
            offers[-1].append(word)
    return offers[:-1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes_commands_flags_names_and_directories(host):
    commands, sta, flags, shells, names, unfinished, directories, watched, files = bash_offers(
        host,
        "mesh ",
        "mesh sta",
        "mesh status --",
        "mesh completion ",
        "mesh status -N ",
        "mesh peers --node pi",
        "mesh up --state da",
        "mesh status --watch --j",
        "mesh run ",
    )
    assert commands == list(COMMANDS)
    assert sta == ["status"]
    assert {"--json", "--watch", "--state", "--node"} <= set(flags)
    assert "-N" not in flags
    assert shells == ["bash", "zsh", "fish", "names"]
    assert names == ["\\$\\(touch\\ trapped\\)", "pi\\ kitchen", "pi4", "studio"]
    assert unfinished == ["pi\\ kitchen", "pi4"]
    assert directories == ["data/"]
    assert watched == ["--json"], "the value of --watch may be left out"
    assert files == [], "bash offers files of its own"
    assert not (host["cwd"] / "trapped").exists(), "a peer's name is never run"


def written(host, shell):
    """The path of a shell's script."""
    path = host["cwd"] / f"script.{shell}"
    path.write_text(completion.script(shell, grammar.read(_parser())))
    return path


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not here")
def test_fish_completes_commands_flags_names_and_directories(host):
    lines = ["mesh sta", "mesh status --js", "mesh completion ", "mesh service install --pr", "mesh status -N ", "mesh up --state da", "mesh peers -o "]  # fmt: skip
    asked = "".join(f"complete -C {shlex.quote(line)}; echo .;" for line in lines)
    said = in_shell(host, "fish", "--no-config", "-c", f"source {written(host, 'fish')}; {asked}")
    offers = [
        [line.partition("\t")[0] for line in offer.splitlines()] for offer in said.split(".\n")[:-1]
    ]
    assert offers == [
        ["status"],
        ["--json"],
        ["bash", "fish", "names", "zsh"],
        ["--print"],
        [TRAP, "pi kitchen", "pi4", "studio"],
        ["data/"],
        ["wide"],
    ]
    assert not (host["cwd"] / "trapped").exists(), "a peer's name is never run"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not here")
def test_zsh_completes_commands_flags_names_and_directories(host):
    rc = host["cwd"] / ".zshrc"
    rc.write_text(
        f"autoload -Uz compinit; compinit -u -D; source {written(host, 'zsh')}; cd {host['cwd']}\n"
        "PS1='ready> '; unsetopt beep\n"
    )
    typed = {
        "mesh status --js": "mesh status --json",
        "mesh service install --pr": "mesh service install --print",
        "mesh status -N pi\\ ": "mesh status -N pi\\ kitchen",
        "mesh status -N \\$": "mesh status -N \\$\\(touch\\ trapped\\)",
        "mesh up --state da": "mesh up --state data/",
        "mesh peers -o w": "mesh peers -o wide",
    }
    environment = {**host["env"], "ZDOTDIR": str(host["cwd"])}
    with Terminal("-i", program=("zsh",), **environment) as terminal:
        terminal.shows("ready>")
        for line, completed in typed.items():
            terminal.press(f"\x0c{line}\t")  # on a screen that is empty but for the prompt
            wanted = f"ready> {completed}"
            terminal.until(lambda lines: lines[0] == wanted, f"{line} is completed")  # noqa: B023
            terminal.press("\x15")
    assert not (host["cwd"] / "trapped").exists(), "a peer's name is never run"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_every_flag_is_in_the_script_of_every_shell(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    known = grammar.read(_parser())
    for name, inner in known.commands.items():
        assert name in script
        for flag in inner.flags:
            for spelling in flag.spellings:
                bare = spelling.lstrip("-")
                option = f"-{'l' if spelling.startswith('--') else 's'} {bare}"
                assert (option if shell == "fish" else spelling) in script


def test_a_quote_in_a_help_text_stays_in_its_quotes():
    flag = grammar.Flag(("--x",), "it's [so]: $(reboot) \\", None, False)
    known = grammar.Grammar("", (), (), {"do": grammar.Grammar("don't", (flag,), (), {})})
    assert "-d 'it\\'s [so]: $(reboot) \\\\'" in completion.script("fish", known)
    zsh = completion.script("zsh", known)
    assert """'(--x)--x[it'"'"'s \\[so\\]: $(reboot) \\\\]'""" in zsh


def test_the_grammar_knows_commands_within_commands():
    inner = grammar.Grammar("", (), (), {})
    service = grammar.Grammar("", (), (), {"install": inner, "status": inner})
    known = grammar.Grammar("", (), (), {"service": service, "status": inner})
    assert grammar.candidates(known, ["service"], "in") == ["install"]
    for shell in completion.SHELLS:
        assert "install" in completion.script(shell, known)


def test_names_are_asked_of_the_nodes_here(host, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", host["env"]["XDG_RUNTIME_DIR"])
    known = grammar.read(_parser())
    assert grammar.names() == [TRAP, "pi kitchen", "pi4", "studio"]
    assert grammar.candidates(known, ["status", "-N"], "pi") == ["pi kitchen", "pi4"]
    assert grammar.candidates(known, ["status", "--state", "x"], "--js") == ["--json"]
    assert grammar.candidates(known, ["run"], "") == [s for f in known.commands["run"].flags for s in f.spellings]  # fmt: skip
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert grammar.names() == []
