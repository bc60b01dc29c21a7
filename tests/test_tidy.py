"""The rules of the house, read off the source with `ast`. Each checker takes a file's name and its
tree and returns sentences, one per violation; at the end each is fed a bad file of its own.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mesh
from tests.helpers import Host

REPOSITORY = Path(__file__).parent.parent
SOURCES = sorted(
    path for package in ("mesh", "nodes") for path in (REPOSITORY / package).rglob("*.py")
)

FLOORS = {
    "mesh/errors.py": 0,
    "mesh/arrays.py": 1,
    "mesh/core": 0,
    "mesh/wire.py": 1,
    "mesh/fields.py": 1,
    "mesh/buffers.py": 1,
    "mesh/codec.py": 1,
    "mesh/replica.py": 1,
    "mesh/outer.py": 1,
    "mesh/shared.py": 1,
    "mesh/identity.py": 1,
    "mesh/places.py": 1,
    "mesh/settings.py": 1,
    "mesh/surroundings.py": 1,
    "mesh/alarm.py": 1,
    "mesh/inbox.py": 1,
    "mesh/turn.py": 1,
    "mesh/disk.py": 1,
    "mesh/simulated_disk.py": 1,
    "mesh/storage.py": 1,
    "mesh/memory.py": 1,
    "mesh/client.py": 1,
    "mesh/dtypes.py": 1,
    "mesh/session.py": 1,
    "mesh/uninterrupted.py": 1,
    "mesh/launch.py": 1,
    "mesh/tensors.py": 1,
    "mesh/named_tensors.py": 1,
    "mesh/spectral.py": 1,
    "mesh/staging.py": 1,
    "mesh/batchnorm.py": 1,
    "mesh/momentum.py": 1,
    "mesh/plain_values.py": 1,
    "mesh/rehearsal.py": 1,
    "mesh/counters.py": 3,
    "mesh/generations.py": 1,
    "mesh/checkpoint.py": 1,
    "mesh/net": 2,
    "mesh/frames.py": 3,
    "mesh/links.py": 3,
    "mesh/conversation.py": 3,
    "mesh/initiator.py": 3,
    "mesh/responder.py": 3,
    "mesh/runs.py": 3,
    "mesh/run_statistics.py": 3,
    "mesh/observer.py": 3,
    "mesh/pulled.py": 1,
    "mesh/doors.py": 3,
    "mesh/desk.py": 3,
    "mesh/bench.py": 3,
    "mesh/records.py": 3,
    "mesh/answers.py": 3,
    "mesh/arguments.py": 3,
    "mesh/history.py": 1,
    "mesh/usage.py": 1,
    "mesh/journal.py": 3,
    "mesh/node.py": 3,
    "mesh/report.py": 3,
    "mesh/control.py": 3,
    "mesh/lines.py": 3,
    "mesh/process.py": 3,
    "mesh/metrics.py": 3,
    "mesh/diagnosis.py": 3,
    "mesh/__main__.py": 3,
    "mesh/attachment.py": 4,
    "mesh/autosave.py": 4,
    "mesh/keeper.py": 4,
    "mesh/faults.py": 4,
    "mesh/ledger.py": 4,
    "mesh/player.py": 4,
    "mesh/simulated_mesh.py": 4,
    "mesh/simulated_node.py": 4,
    "mesh/simulated_script.py": 4,
    "mesh/simulation.py": 4,
    "mesh/virtual_time.py": 4,
    "mesh/boundary.py": 4,
    "mesh/training.py": 4,
    "mesh/baton.py": 4,
    "mesh/conditions.py": 4,
    "mesh/program_state.py": 4,
    "mesh/virtual_attachment.py": 4,
    "mesh/virtual_link.py": 4,
    "mesh/virtual_machine.py": 4,
    "mesh/virtual_node.py": 4,
    "mesh/laboratory.py": 4,
    "mesh/learning.py": 4,
    "mesh/learning_report.py": 4,
    "mesh/__init__.py": 4,
    "nodes": 5,
}
"""A file, or a whole folder, and its floor: it imports from there and from below only."""

HOMES = {
    "msgpack": ["mesh/wire.py"],
    "zeroconf": ["mesh/net/mdns.py", "mesh/net/survey.py"],
    "ifaddr": ["mesh/net/interfaces.py"],
    "ssl": ["mesh/identity.py", "mesh/net/tcp.py", "mesh/net/sockets.py"],
    "cryptography": ["mesh/identity.py", "mesh/net/sealed.py"],
    # The demo's training is a script such as users write; the programs around it load no torch.
    "torch": [
        *("mesh/program_state.py", "mesh/virtual_machine.py", "mesh/laboratory.py"),
        "mesh/learning.py",
        *("mesh/training.py", "mesh/tensors.py", "mesh/batchnorm.py", "mesh/momentum.py"),
        *("mesh/checkpoint.py", "mesh/plain_values.py", "mesh/autosave.py", "mesh/keeper.py"),
        *("mesh/rehearsal.py", "mesh/staging.py", "mesh/named_tensors.py", "mesh/spectral.py"),
        "nodes/demo_training.py",
    ],
    "safetensors": ["mesh/checkpoint.py"],
    "platformdirs": ["mesh/places.py"],
    "prometheus_client": ["mesh/metrics.py"],
    "argparse": ["nodes/cli.py", "nodes/flags.py"],
    "rich": ["nodes"],
}
"""One home each: nothing else imports it."""

STRANGERS = ("mesh/net/tcp", "mesh/net/mdns", "mesh/net/simulated")

PURE = {
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "itertools",
    "math",
    "random",
    "typing",
}
"""What mesh/core takes of the standard library: nothing that knows a clock, a file or a socket."""

UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
ONLY_STATEMENTS_AT_IMPORT = (
    ast.Import,
    ast.ImportFrom,
    ast.Assign,
    ast.AnnAssign,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.If,
    ast.Pass,
)

FILE_LINES = 400
FUNCTION_LINES = 70

DYNAMIC_GETATTR = {
    "mesh/__init__.py": "__getattr__",
    "mesh/arrays.py": "__getattr__",
    "mesh/wire.py": "_fields",
}
"""Where getattr() takes a name that is not written there: public names from a table, numpy's as our code
asks for them, and the fields of our own dataclasses on their way out."""

# ------------------------------------------------------------------------------- what is imported


def floor_of(name):
    """The floor of a file by its own entry or its folder's; None where it has none."""
    return FLOORS.get(name, next((FLOORS[f] for f in FLOORS if name.startswith(f + "/")), None))


def imports(tree):
    """(line, dotted name) of everything imported, the names of `from x import y` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def file_of(dotted):
    """The file of this repository that an imported name comes from; None for foreign ones."""
    parts = dotted.split(".")
    if parts[0] not in ("mesh", "nodes"):
        return None
    for length in range(len(parts), 0, -1):
        path = Path(*parts[:length])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if (REPOSITORY / candidate).exists():
                return candidate.as_posix()
    return None


def is_at(name, homes):
    return any(name == home or name.startswith(home + "/") for home in homes)


def climbs(name, tree):
    """Imports of a higher floor."""
    own = floor_of(name)
    if own is None:
        return [f"{name}: has no floor: add it to FLOORS"]
    if name == "mesh/__init__.py":
        return []  # the table of public names; each is loaded when it is first used
    return [
        f"{name}:{line}: floor {own} imports {imported}, floor {floor_of(target)}"
        for line, imported in imports(tree)
        if imported != "mesh.__version__"
        and (target := file_of(imported)) is not None
        and (floor_of(target) or 0) > own
    ]


def relative_imports(name, tree):
    return [
        f"{name}:{line}: {imported} is relative"
        for line, imported in imports(tree)
        if imported.startswith(".")
    ]


def away_from_home(name, tree):
    """Imports of a library outside its one home."""
    return [
        f"{name}:{line}: {top} is at home in {', '.join(HOMES[top])}"
        for line, imported in imports(tree)
        if (top := imported.partition(".")[0]) in HOMES and not is_at(name, HOMES[top])
    ]


def strangers_meet(name, tree):
    """tcp, mdns and simulated know nothing of each other."""
    own = stranger(name)
    return [
        f"{name}:{line}: imports {imported}"
        for line, imported in imports(tree)
        if own and (other := stranger(file_of(imported) or "")) and other != own
    ]


def stranger(name):
    """Which of the three a file belongs to."""
    return next((way for way in STRANGERS if name.startswith(way)), None)


def impure_core(name, tree):
    """The protocol imports itself, its errors, and arithmetic."""
    if not name.startswith("mesh/core/"):
        return []
    found = []
    for line, imported in imports(tree):
        top = imported.partition(".")[0]
        own = imported.startswith(("mesh.core", "mesh.errors"))
        chance = top == "random" and imported != "random.Random"
        if not own and (top not in PURE or chance):
            found.append(f"{name}:{line}: the core imports {imported}")
    return found


def programs_in_the_library(name, tree):
    """mesh never imports nodes."""
    return [
        f"{name}:{line}: the library imports {imported}"
        for line, imported in imports(tree)
        if name.startswith("mesh/") and imported.partition(".")[0] == "nodes"
    ]


def private_names_in_programs(name, tree):
    """nodes uses `import mesh`, and of it the public names only."""
    if not name.startswith("nodes/"):
        return []
    public = {*mesh.__all__, "__version__"}
    found = [
        f"{name}:{line}: write `import mesh`, not {imported}"
        for line, imported in imports(tree)
        if imported.startswith("mesh.")
    ]
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mesh"
            and node.attr not in public
        ):
            found.append(f"{name}:{node.lineno}: mesh.{node.attr} is no public name")
    return found


# -------------------------------------------------------------------------------- what is written


def unsafe_calls(name, tree):
    """Nothing that turns bytes or received names into behaviour."""
    found = [
        f"{name}:{line}: imports {imported}"
        for line, imported in imports(tree)
        if imported.partition(".")[0] in UNSAFE
    ]
    for function, call in calls(tree):
        text = ast.unparse(call.func)
        if text in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"):
            found.append(f"{name}:{call.lineno}: calls {text}")
        by_name = text in ("getattr", "setattr", "delattr")
        written = by_name and isinstance(call.args[1], ast.Constant)
        if by_name and not written and DYNAMIC_GETATTR.get(name) != function:
            found.append(f"{name}:{call.lineno}: {text} by a name that is not written here")
        if any(k.arg == "shell" and not is_false(k.value) for k in call.keywords):
            found.append(f"{name}:{call.lineno}: shell=True")
    return found


def calls(tree, function=""):
    """(name of the function around it, call) of every call."""
    for node in ast.iter_child_nodes(tree):
        inner = function
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = node.name
        elif isinstance(node, ast.Call):
            yield function, node
        yield from calls(node, inner)


def is_false(value):
    return isinstance(value, ast.Constant) and not value.value


def swallowed_exceptions(name, tree):
    """No bare except, no `except Exception`; BaseException only to clean up and raise again."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "" if node.type is None else ast.unparse(node.type)
        if not caught or re.search(r"\bException\b", caught):
            found.append(f"{name}:{node.lineno}: `except {caught}` catches our own mistakes too")
        last = node.body[-1]
        raises = isinstance(last, ast.Raise) and last.exc is None
        if "BaseException" in caught and not raises:
            found.append(f"{name}:{node.lineno}: `except {caught}` does not raise again")
    return found


def mutable_module_state(name, tree):
    """A module holds constants only: UPPER_CASE, or marked Final."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, final = node.targets, False
        elif isinstance(node, ast.AnnAssign):
            targets, final = [node.target], "Final" in ast.unparse(node.annotation)
        else:
            continue
        for target in targets:
            text = ast.unparse(target)
            constant = text.isupper() or (text.startswith("__") and text.endswith("__"))
            if is_mutable(node.value) and not final and not constant:
                found.append(f"{name}:{node.lineno}: {text} is state of the module")
    return found


def is_mutable(value):
    if isinstance(value, ast.Call):
        makes = ast.unparse(value.func).rpartition(".")[2]
        return makes in ("list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter")
    literals = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    return isinstance(value, literals)


def work_at_import(name, tree):
    """Importing a module makes names; it does nothing. (The bare node process is a program.)"""
    if name == "mesh/__main__.py":
        return []
    found = []
    for node in tree.body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, ONLY_STATEMENTS_AT_IMPORT) and not text:
            found.append(f"{name}:{node.lineno}: {ast.unparse(node)[:40]} works at import")
    return found


def undocumented(name, tree):
    return [] if ast.get_docstring(tree) else [f"{name}: does not open with what it owns"]


def long_functions(name, tree):
    return [
        f"{name}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 >= FUNCTION_LINES
    ]


def long_file(name, text):
    lines = text.count("\n")
    return [f"{name}: {lines} lines"] if lines >= FILE_LINES else []


def leftovers(name, text):
    return [
        f"{name}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line)
    ]


TREE_RULES = {
    climbs: ("mesh/codec.py", "from mesh.node import Node"),
    relative_imports: ("mesh/codec.py", "from .errors import MeshError"),
    away_from_home: ("mesh/node.py", "import msgpack"),
    strangers_meet: ("mesh/net/tcp.py", "from mesh.net.mdns import MdnsDiscovery"),
    impure_core: ("mesh/core/gossip.py", "import time"),
    programs_in_the_library: ("mesh/launch.py", "def start():\n    from nodes import cli"),
    private_names_in_programs: ("nodes/cli.py", "import mesh\nmesh.node_of_state(1)"),
    unsafe_calls: ("mesh/wire.py", "def decode(message):\n    return getattr(handlers, message)()"),
    swallowed_exceptions: ("mesh/links.py", "try:\n    pass\nexcept Exception:\n    pass"),
    mutable_module_state: ("mesh/links.py", "links = {}"),
    work_at_import: ("mesh/links.py", "open('links')"),
    undocumented: ("mesh/links.py", "import trio"),
    long_functions: ("mesh/links.py", "def f():\n" + "    pass\n" * FUNCTION_LINES),
}
TEXT_RULES = {
    long_file: ("mesh/links.py", "\n" * FILE_LINES),
    leftovers: ("mesh/links.py", "# " + "TO" + "DO: later"),
}
"""Each rule, and a file that breaks it."""

MORE_BAD_FILES = [
    (climbs, "mesh/net/tcp.py", "from mesh import node"),
    (climbs, "mesh/training.py", "import nodes.cli"),
    (climbs, "mesh/brand_new.py", ""),
    (away_from_home, "mesh/node.py", "def f():\n    from cryptography import x509"),
    (away_from_home, "mesh/frames.py", "import ssl"),
    (away_from_home, "mesh/report.py", "from rich.table import Table"),
    (strangers_meet, "mesh/net/tcp.py", "from mesh.net.simulated_link import SimulatedStream"),
    (impure_core, "mesh/core/schedule.py", "from random import choice"),
    (impure_core, "mesh/core/schedule.py", "import random"),
    (impure_core, "mesh/core/schedule.py", "from mesh.wire import decode"),
    (private_names_in_programs, "nodes/cli.py", "from mesh.client import ask"),
    (private_names_in_programs, "nodes/cli.py", "import mesh.client"),
    (unsafe_calls, "mesh/wire.py", "import pickle"),
    (unsafe_calls, "mesh/training.py", "import torch\ntorch.load('x')"),
    (unsafe_calls, "mesh/launch.py", "subprocess.run('ls', shell=True)"),
    (unsafe_calls, "mesh/control.py", "eval('1')"),
    (swallowed_exceptions, "mesh/links.py", "try:\n    pass\nexcept:\n    pass"),
    (
        swallowed_exceptions,
        "mesh/links.py",
        "try:\n    pass\nexcept (OSError, Exception):\n    pass",
    ),
    (swallowed_exceptions, "mesh/links.py", "try:\n    pass\nexcept BaseException:\n    pass"),
    (mutable_module_state, "mesh/links.py", "seen: set[str] = set()"),
    (mutable_module_state, "mesh/links.py", "queue = collections.deque()"),
    (work_at_import, "mesh/links.py", "for _ in range(3):\n    pass"),
]

# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("rule", TREE_RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_a_rule_of_its_tree(rule):
    broken = []
    for path in SOURCES:
        name = path.relative_to(REPOSITORY).as_posix()
        broken += rule(name, ast.parse(path.read_text()))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_a_rule_of_its_text(rule):
    broken = []
    for path in SOURCES:
        broken += rule(path.relative_to(REPOSITORY).as_posix(), path.read_text())
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "name", "bad"),
    [(rule, *bad) for rule, bad in TREE_RULES.items()] + MORE_BAD_FILES,
    ids=lambda value: getattr(value, "__name__", None) or "",
)
def test_a_bad_file_is_seen_by_its_rule(rule, name, bad):
    assert len(rule(name, ast.parse(bad))) == 1


@pytest.mark.parametrize(("rule", "bad"), TEXT_RULES.items(), ids=lambda v: "")
def test_a_bad_text_is_seen_by_its_rule(rule, bad):
    assert len(rule(*bad)) == 1


def test_every_entry_of_the_tables_names_a_file_that_exists():
    named = [*FLOORS, *(home for homes in HOMES.values() for home in homes), *DYNAMIC_GETATTR]
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_public_name_is_defined_where_the_table_says():
    assert sorted(mesh._HOMES) == mesh.__all__
    for name, home in mesh._HOMES.items():
        tree = ast.parse((REPOSITORY / "mesh" / f"{home}.py").read_text())
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{home}.{name}"


# ------------------------------------------------------------------------- what an import brings in

HEAVY = {"torch", "trio", "numpy", "rich", "cryptography", "msgpack", "zeroconf"}
SLOW_TO_ASK = {"asyncio", "dataclasses", "inspect"}
"""5 to 12 ms each, of 100 that `mesh status` may take."""


def loaded_by(code, *arguments, **environment):
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json, sys; {}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    output = subprocess.run(
        [sys.executable, "-c", report.format(code), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        **environment,
    ).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_importing_mesh_loads_neither_torch_nor_trio_nor_numpy():
    loaded = loaded_by("import mesh")
    assert "mesh" in loaded
    assert not loaded & HEAVY


def test_asking_a_node_that_is_not_there_loads_no_heavy_library():
    host = Host()
    try:
        completed = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "nodes.cli", "status", "--state", host.root],
            cwd=REPOSITORY,
            env=host.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        host.close()
    assert completed.returncode == 3
    lines = [line for line in completed.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"mesh", "argparse"} <= loaded
    assert not loaded & (HEAVY | SLOW_TO_ASK)


def test_the_node_process_loads_no_torch_and_numpy_only_for_a_run():
    loaded = loaded_by("import mesh.__main__")
    assert "trio" in loaded
    assert not loaded & {"torch", "numpy", "prometheus_client"}
    assert "numpy" in loaded_by("import mesh.codec; mesh.codec.np.float32")
