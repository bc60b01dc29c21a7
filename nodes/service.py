"""`mesh service`: a node that starts with the machine, under systemd (Linux) or launchd (macOS).

Rules: 1. Only this user's own files are written: no root, no daemon of ours. 2. What is written is
`mesh up` with the flags that were given and absolute paths, so it means the same from anywhere. 3.
install says what starts the node and starts nothing; uninstall stops what it removes.
A unit's trip: NodeSettings -> command() -> unit() or plist() -> written, or printed.
"""

import contextlib
import getpass
import json
import os
import plistlib
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mesh

NAME: Final = "gossipmesh"
LABEL: Final = "org.gossipmesh.node"
COMMAND_S: Final = 20.0
"""`systemctl disable --now` waits until the node has left, which takes at most 4 s."""

RESTART_S: Final = 5
UNHEALTHY: Final = 4
"""Exit code where the service does not run."""

USAGE: Final = 2
"""Exit code of a mistake (a port that is taken, a copied identity): starting again mends none."""

UNIT: Final = """\
# Written by `mesh service install`; change the flags there and run it again.
[Unit]
Description=gossipmesh node
Documentation=https://github.com/gossipmesh/gossipmesh/tree/main/docs

[Service]
ExecStart={command}
Restart=on-failure
RestartSec={restart_s}
RestartPreventExitStatus={usage}
TimeoutStopSec=10
LimitNOFILE=4096

[Install]
WantedBy=default.target
"""
"""The user's own systemd has no network to wait for: a node waits for its addresses itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manager:
    """What starts programs on this machine."""

    kind: str
    """systemd or launchd"""
    path: Path
    """where it looks for the description of our service"""
    present: bool
    linger: Path = Path("/var/lib/systemd/linger")
    """names the users whose services run while they are not logged in"""


def manager() -> Manager:
    """This machine's."""
    if sys.platform == "darwin":
        folder = _home() / "Library" / "LaunchAgents"
        return Manager(kind="launchd", path=folder / f"{LABEL}.plist", present=True)
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config")
    return Manager(
        kind="systemd",
        path=folder / "systemd" / "user" / f"{NAME}.service",
        present=Path("/run/systemd/system").is_dir(),  # as sd_booted(3)
    )


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise mesh.UsageError("no home directory is known: set $HOME") from None


# ---------------------------------------------------------------------------------- the command


def command(settings: mesh.NodeSettings) -> list[str]:
    """`mesh up` with these settings, for a program that knows no PATH and no directory of ours."""
    # -P: what lies in the directory that it is started from is not imported.
    words = [sys.executable, "-P", "-m", "nodes.cli", "up", "--state", str(settings.state)]
    if settings.name is not None:
        words += ["--name", settings.name]
    if settings.port is not None:
        words += ["--port", str(settings.port)]
    for peer in settings.peers:
        words += ["--peer", str(peer)]
    for interface in settings.interfaces:
        words += ["--interface", interface]
    if not settings.mdns:
        words.append("--no-mdns")
    if settings.allow_control:
        words.append("--allow-control")
    if settings.metrics is not None:
        words += ["--metrics", str(settings.metrics)]
    return words


def text(settings: mesh.NodeSettings, kind: str) -> str:
    """The description of our service. Raises UsageError for what cannot be written there."""
    words = command(settings)
    bad = [word for word in words if not word.isprintable()]
    if bad:
        raise mesh.UsageError(f"{bad[0]!r} holds a character that no service can be told")
    return unit(words) if kind == "systemd" else plist(words, settings.state)


def unit(words: list[str]) -> str:
    """For systemd."""
    return UNIT.format(command=" ".join(map(_quoted, words)), restart_s=RESTART_S, usage=USAGE)


def _quoted(word: str) -> str:
    """systemd.service(5): C-style quotes; % and $ are doubled, or it would put something in."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def plist(words: list[str], state: Path) -> str:
    """For launchd."""
    about = {
        "Label": LABEL,
        "ProgramArguments": words,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": RESTART_S,
        "StandardErrorPath": str(state / "node.log"),
        "SoftResourceLimits": {"NumberOfFiles": 4096},
    }
    return plistlib.dumps(about, sort_keys=False).decode()


# ------------------------------------------------------------------------------------- actions


def install(settings: mesh.NodeSettings, where: Manager, *, only_print: bool) -> int:
    """Writes the service, or shows it; says what starts it."""
    written = text(settings, where.kind)
    if only_print:
        print(written, end="")
        return 0
    if not where.present:
        line = shlex.join(command(settings)).replace("%", r"\%")  # cron ends a line at a bare one
        raise mesh.MeshError(
            f"no systemd runs this machine: let its own init start the node, or `crontab -e` with "
            f"the line\n  @reboot {line}"
        )
    before = None
    with contextlib.suppress(OSError):
        before = where.path.read_text()
    if before != written:
        _write(where.path, written)
    done = "there already" if before == written else "written" if before is None else "changed"
    print(f"{where.path}: {done}")
    print("start the node, now and from now on:")
    for line in _starts(where, again=before not in (None, written)):
        print(f"  {line}")
    if not mesh.is_member(settings.state):
        print(
            f"{settings.state} is in no mesh yet: before that, `mesh init` or `mesh join TOKEN`",
            file=sys.stderr,
        )
    return 0


def _write(path: Path, written: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(written)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise mesh.MeshError(f"cannot write {path}: {error.strerror}") from None


def _starts(where: Manager, *, again: bool) -> list[str]:
    if where.kind == "launchd":
        out = [f"launchctl bootout gui/{os.getuid()}/{LABEL}"] if again else []
        return [*out, f"launchctl bootstrap gui/{os.getuid()} '{where.path}'"]
    start = f"systemctl --user enable --now {NAME}"
    lines = ["systemctl --user daemon-reload", start]
    if again:
        lines.append(f"systemctl --user restart {NAME}")
    return [*lines, "loginctl enable-linger   # so that it runs while nobody is logged in"]


def uninstall(where: Manager) -> int:
    """Stops the service and removes it; harmless where there is none."""
    if not where.path.exists():
        print(f"{where.path}: not there")
        return 0
    if where.kind == "launchd":
        stops = ["launchctl", "bootout", f"gui/{os.getuid()}/{LABEL}"]
    else:
        stops = ["systemctl", "--user", "disable", "--now", NAME]
    code, said = _call(stops)
    try:
        where.path.unlink()
    except OSError as error:
        raise mesh.MeshError(f"cannot remove {where.path}: {error.strerror}") from None
    if where.kind == "systemd":
        _call(["systemctl", "--user", "daemon-reload"])
    print(f"{where.path}: removed")
    if code:
        print(
            f"mesh: `{' '.join(stops)}` failed ({said}): if a node still runs, end it with "
            f"`mesh leave` or a signal",
            file=sys.stderr,
        )
    return 0


def show(where: Manager, *, as_json: bool) -> int:
    """Whether the service is there and runs; the exit code says the latter."""
    about = look(where)
    print(json.dumps(about) if as_json else status(about))
    return 0 if about["active"] == "active" else UNHEALTHY


def look(where: Manager) -> dict[str, Any]:
    """`mesh.service/1`."""
    active, enabled = "unknown", "unknown"
    if where.path.exists() and where.kind == "systemd" and where.present:
        active, enabled = _asked("is-active"), _asked("is-enabled")
    elif where.path.exists() and where.kind == "launchd":
        code, _ = _call(["launchctl", "print", f"gui/{os.getuid()}/{LABEL}"])
        active = enabled = "inactive" if code else "active"
    return {
        "schema": "mesh.service/1",
        "manager": where.kind,
        "manager_present": where.present,
        "path": str(where.path),
        "installed": where.path.exists(),
        "active": active,
        "enabled": enabled,
        "lingers": _lingers(where) if where.kind == "systemd" else None,
    }


def _lingers(where: Manager) -> bool:
    try:
        return (where.linger / getpass.getuser()).exists()
    except (KeyError, OSError):  # a container's user may have no name
        return False


def _asked(question: str) -> str:
    """systemd's answer, one word; anything longer is why it gives none (no bus, no session)."""
    _, said = _call(["systemctl", "--user", question, NAME])
    return said if said.isalpha() else "unknown"


def status(about: dict[str, Any]) -> str:
    """`mesh service status`, for people."""
    if not about["installed"]:
        return f"{about['path']}: not there: `mesh service install` writes it"
    lines = [f"{about['path']}: {about['active']}, {about['enabled']}"]
    if about["manager"] == "systemd" and not about["manager_present"]:
        lines.append("no systemd runs this machine, so nothing starts it")
    elif about["active"] != "active":
        logs = f"; `journalctl --user -u {NAME}` shows what it said"
        lines.append(f"start it with `systemctl --user enable --now {NAME}`{logs}")
    if about["lingers"] is False:
        lines.append("it ends when you log out: `loginctl enable-linger`")
    return "\n".join(lines)


def _call(words: list[str]) -> tuple[int, str]:
    """(exit code, the first line it said) of a command; 127 where it does not exist."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_S, check=False, stdin=None
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    said = (done.stdout + done.stderr).strip()
    return done.returncode, said.partition("\n")[0]
