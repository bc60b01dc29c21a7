"""What the command line understands, as data; and what may stand at one place of it.

Rules: 1. Nothing is listed twice: commands and flags are read off the parser. 2. Names of nodes are
asked for when they are needed, and nothing is said where nothing answers.
A word's trip: parser -> Grammar -> completion.py's scripts, or the candidates that `mesh shell` offers.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import mesh

ASK_S: Final = 0.5
"""Somebody has pressed Tab and waits."""

FILES: Final = ("FILE", "SCRIPT")
"""What stands for a file in the usage; DIR is a directory."""


class Value(NamedTuple):
    """What a flag or a place of a command takes."""

    kind: str
    """node, directory, file, words, or text: then nothing can be offered"""
    words: tuple[str, ...] = ()


class Flag(NamedTuple):
    """One flag of a command, with all its spellings."""

    spellings: tuple[str, ...]
    help: str
    value: Value | None
    optional: bool
    """whether the value may be left out"""


class Grammar(NamedTuple):
    """What may follow a command."""

    help: str
    flags: tuple[Flag, ...]
    places: tuple[Value, ...]
    commands: "dict[str, Grammar]"


# ------------------------------------------------------------------------------ from the parser


def read(parser: Any, help: str = "") -> Grammar:
    """The grammar of an argparse parser; of its objects only what they say of themselves is used."""
    flags: list[Flag] = []
    places: list[Value] = []
    commands: dict[str, Grammar] = {}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, inner in action.choices.items():
                commands[name] = read(inner, told.get(name, ""))
        elif action.option_strings:
            value = None if action.nargs == 0 else _value(action)
            spellings = tuple(action.option_strings)
            flags.append(Flag(spellings, action.help or "", value, action.nargs == "?"))
        else:
            places.append(_value(action))
    return Grammar(help, tuple(flags), tuple(places), commands)


def _value(action: Any) -> Value:
    metavar = action.metavar or action.dest
    if action.choices:
        return Value("words", tuple(map(str, action.choices)))
    if action.dest == "node" or metavar == "NODE":
        return Value("node")
    if metavar == "DIR":
        return Value("directory")
    return Value("file" if metavar in FILES else "text")


# ------------------------------------------------------------------------------------ candidates


def names() -> list[str]:
    """Names of the nodes that run here, and of their peers. Says nothing where nothing answers."""
    found: set[str] = set()
    for node in mesh.running_nodes():
        found.add(node.name)
        try:
            answer = mesh.ask(node, "peers", timeout_s=ASK_S)
        except mesh.MeshError:
            continue
        found |= {peer["name"] for peer in answer["peers"]}
    return sorted(found)


def candidates(grammar: Grammar, words: Sequence[str], begun: str) -> list[str]:
    """What may stand where `begun` was begun, behind `words`. Files are left to whoever asks."""
    place, before = 0, None
    for word in words:
        flag = _flag(grammar, word)
        if before is not None and before.value is not None and not before.optional:
            before = None
        elif flag is not None:
            before = flag
        elif word in grammar.commands:
            grammar, place, before = grammar.commands[word], 0, None
        else:
            place, before = place + 1, None
    if before is not None and before.value is not None:
        offered = _offered(before.value)
        if not before.optional:
            return [word for word in offered if word.startswith(begun)]
    else:
        offered = list(grammar.commands)
        if grammar.places:
            offered += _offered(grammar.places[min(place, len(grammar.places) - 1)])
    if begun.startswith("-") or not offered:
        offered += [spelling for flag in grammar.flags for spelling in flag.spellings]
    return [word for word in offered if word.startswith(begun)]


def _flag(grammar: Grammar, word: str) -> Flag | None:
    return next((flag for flag in grammar.flags if word in flag.spellings), None)


def _offered(value: Value) -> list[str]:
    return names() if value.kind == "node" else list(value.words)
