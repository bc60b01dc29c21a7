"""simulate_script(): a training script, as it is, on many virtual machines in one process.

A machine's trip: its arguments, {rank} and {nodes} filled in -> the script runs as __main__ in a thread
-> its mesh.join() finds the laboratory -> each node.step() lets the others have their turn. Rules: 1. Of
the script nothing is replaced: what it reads from the real clock is real. 2. Modules that it imports
are there once for all machines.
"""

import contextlib
import importlib.util
import io
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from mesh.conditions import Conditions
from mesh.errors import ScriptFailed, UsageError
from mesh.laboratory import Laboratory
from mesh.learning import look_at, report_on
from mesh.learning_report import LearningReport
from mesh.virtual_attachment import inside
from mesh.virtual_machine import Machine

LINE_LIMIT: Final = 4096
"""Characters of a line that a script prints without ever ending it."""

LOOK_STEPS: Final = 10


def simulate_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    nodes: int = 8,
    seed: int = 1,
    strategy: str | None = None,
    evaluate: str | None = None,
    said: Callable[[int, str], None] = lambda rank, line: None,
) -> LearningReport:
    """Runs `script` on `nodes` virtual machines; `{rank}` (from 1) and `{nodes}` in its arguments are
    each machine's own.

    Deterministic as far as the script is: let it end after a number of steps, not of seconds. torch's
    and random's chance is each machine's own.

    strategy: instead of what the script says; see simulate().
    evaluate: name of a function of the script, model -> accuracy.
    said: hears each line that a machine prints, with its rank.

    Raises ScriptFailed with the script's traceback, UsageError, MeshError if it never joins.
    """
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {path}")
    conditions = Conditions(nodes=nodes, seed=seed, strategy=strategy, look_every=LOOK_STEPS)
    functions: list[Callable[[Any], float]] = []

    def work(laboratory: Laboratory, machine: Machine) -> None:
        module = _module(path)
        names = {"{rank}": str(machine.rank), "{nodes}": str(nodes)}
        _set_up(machine, module, [str(path), *(_filled(text, names) for text in arguments)], said)
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        if evaluate is not None and not functions:
            functions.append(lambda model: float(_function(module, evaluate)(model)))
        module.__spec__.loader.exec_module(module)

    laboratory = Laboratory(conditions, inside(work))
    function = None if evaluate is None else lambda model: functions[0](model)
    laboratory.look = lambda laboratory: look_at(laboratory, function)
    began = time.perf_counter()
    paths = list(sys.path)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        laboratory.run()
    finally:
        sys.path[:] = paths
    if laboratory.error is not None:
        raise _failed(laboratory.error, path)
    return report_on(laboratory, function, time.perf_counter() - began)


class _Source(SourceFileLoader):
    """Leaves no bytecode behind, as Python leaves none of a script."""

    def set_data(self, path: Any, data: Any, *, _mode: int = 0o666) -> None:
        pass


def _module(path: Path) -> ModuleType:
    loader = _Source("__main__", str(path))
    spec = importlib.util.spec_from_file_location("__main__", path, loader=loader)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


def _filled(text: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        text = text.replace(name, value)
    return text


def _function(module: ModuleType, name: str) -> Callable[[Any], float]:
    found = vars(module).get(name)
    if not callable(found):
        raise UsageError(f"the script has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _set_up(
    machine: Machine, module: ModuleType, argv: list[str], said: Callable[[int, str], None]
) -> None:
    """What is the script's own, from its first turn on, which is now."""
    outside, errors = sys.stdout, sys.stderr

    def hear(line: str) -> None:
        with contextlib.redirect_stdout(outside), contextlib.redirect_stderr(errors):
            said(machine.rank, line)  # which may print, and means the screen

    out = _Said(hear)
    state = machine.state
    state.main, state.argv = module, argv
    state.out = state.err = out
    state.enter()


class _Said(io.TextIOWrapper):
    """Hands what a script prints on, line by line."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self._hear = hear
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        if len(self._line) > LINE_LIMIT:
            lines, self._line = [*lines, self._line], ""
        for line in lines:
            self._hear(line)
        return len(text)


def _failed(error: BaseException, path: Path) -> ScriptFailed:
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            return ScriptFailed(f"{path} ended with {error.code}", error.code)
        return ScriptFailed(str(error.code), 1)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(path):
        trace = trace.tb_next  # of the laboratory: nothing that its author wants to read
    shown = trace if trace is not None else error.__traceback__
    lines = traceback.format_exception(type(error), error, shown)
    return ScriptFailed("".join(lines).rstrip(), 1)
