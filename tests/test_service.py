"""`mesh service`: what is written means `mesh up` with the same flags, twice as well as once."""

import json
import os
import plistlib
import shlex
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest

import mesh
from nodes import grammar, service
from nodes.cli import _parser, main
from tests.helpers import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "docs" / "schemas" / "mesh.service.1.json").read_text())
NASTY = 'a "b" $HOME ${HOME} %h %% \\x41 ;'
"""A directory's name with everything that systemd would put something in for."""

SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$2" in
  is-active) echo active ;;
  is-enabled) echo disabled ;;
esac
"""


@pytest.fixture
def where(tmp_path, monkeypatch):
    """A machine that systemd runs, as far as gossipmesh can tell; its calls are written down."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "systemctl").write_text(SYSTEMCTL)
    (tools / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = service.manager()
    assert found.path == tmp_path / "config/systemd/user/gossipmesh.service"
    return replace(found, present=True, linger=tmp_path / "linger")


def settings(tmp_path, **more):
    return mesh.NodeSettings(state=tmp_path / "state", **more)


ALL = {
    "name": "kitchen pi",
    "port": 7711,
    "interfaces": ("eth0", "wlan0"),
    "mdns": False,
    "peers": (mesh.parse_address("192.168.1.20:7710"), mesh.parse_address("[fe80::1]:7710")),
    "allow_control": True,
    "metrics": 9100,
}
"""Another value than the default for each; the test below fails for a setting that is missing."""


@pytest.mark.parametrize("more", [{}, ALL], ids=["no flag", "all flags"])
def test_the_flags_that_are_written_make_the_same_settings_again(tmp_path, monkeypatch, more):
    assert {"state", *ALL} == {field.name for field in fields(mesh.NodeSettings)}
    ran = []
    monkeypatch.setattr(mesh, "run_node", lambda given: ran.append(given) or 0)
    words = service.command(settings(tmp_path, **more))
    assert words[1:4] == ["-P", "-m", "nodes.cli"]
    assert main(words[4:]) == 0
    assert ran == [settings(tmp_path, **more)]


def test_every_flag_of_mesh_up_is_written(tmp_path):
    flags = grammar.read(_parser()).commands["up"].flags
    words = service.command(settings(tmp_path, **ALL))
    assert {flag.spellings[-1] for flag in flags} - {"--help"} == {
        word for word in words if word.startswith("--")
    }


def test_it_is_written_once_and_a_change_says_what_to_do(tmp_path, where, capsys):
    given = settings(tmp_path)
    assert service.install(given, where, only_print=True) == 0
    shown = capsys.readouterr().out
    assert not where.path.exists(), "--print writes nothing"

    assert service.install(given, where, only_print=False) == 0
    first = capsys.readouterr()
    assert where.path.read_text() == shown
    assert f"{where.path}: written" in first.out
    assert "systemctl --user enable --now gossipmesh" in first.out
    assert "loginctl enable-linger" in first.out
    assert "in no mesh yet" in first.err

    before = where.path.stat()
    assert service.install(given, where, only_print=False) == 0
    assert "there already" in capsys.readouterr().out
    assert where.path.stat().st_ino == before.st_ino
    assert service.install(settings(tmp_path, port=9), where, only_print=False) == 0
    assert "restart gossipmesh" in capsys.readouterr().out
    assert '"--port" "9"' in where.path.read_text()
    assert list(where.path.parent.iterdir()) == [where.path]
    assert not (tmp_path / "calls").exists(), "nothing is started unasked"


def test_its_state_is_told_and_removing_it_stops_it_first(tmp_path, where, capsys):
    service.install(settings(tmp_path), where, only_print=False)
    capsys.readouterr()
    assert service.show(where, as_json=True) == 0
    about = json.loads(capsys.readouterr().out)
    jsonschema.validate(about, SCHEMA)
    assert (about["installed"], about["active"], about["enabled"]) == (True, "active", "disabled")
    assert about["lingers"] is False
    (tmp_path / "calls").unlink()

    assert service.uninstall(where) == 0
    assert not where.path.exists()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--user disable --now gossipmesh", "--user daemon-reload"]
    assert service.uninstall(where) == 0
    assert "not there" in capsys.readouterr().out
    assert service.show(where, as_json=False) == 4
    assert "mesh service install" in capsys.readouterr().out


def test_a_service_that_does_not_run_or_cannot_be_asked_is_no_healthy_one(
    tmp_path, where, capsys, monkeypatch
):
    service.install(settings(tmp_path), where, only_print=False)
    failing = "#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2\nexit 1\n"
    (tmp_path / "tools" / "systemctl").write_text(failing)
    capsys.readouterr()
    assert service.show(where, as_json=True) == 4
    about = json.loads(capsys.readouterr().out)
    assert (about["active"], about["enabled"]) == ("unknown", "unknown")
    assert service.uninstall(where) == 0
    assert "Failed to connect to bus" in capsys.readouterr().err
    assert not where.path.exists()


def test_where_no_systemd_runs_it_says_what_to_do_instead(tmp_path, where, capsys):
    given = settings(tmp_path / "100 % sure", name="a$b 'c'")
    with pytest.raises(mesh.MeshError, match="@reboot") as caught:
        service.install(given, replace(where, present=False), only_print=False)
    line = str(caught.value).partition("@reboot ")[2]
    assert line.count("%") == line.count("\\%") == 1, "a bare one is a newline to cron"
    assert shlex.split(line.replace("\\%", "%")) == service.command(given)
    assert not where.path.exists()


def test_what_no_service_can_be_told_is_refused(tmp_path, where):
    with pytest.raises(mesh.UsageError, match="character"):
        service.install(mesh.NodeSettings(state=Path("/a\nb")), where, only_print=True)


def test_launchd_gets_a_list_of_properties(tmp_path, capsys):
    mac = service.Manager(kind="launchd", path=tmp_path / "org.gossipmesh.node.plist", present=True)
    given = settings(tmp_path, **ALL)
    assert service.install(given, mac, only_print=False) == 0
    assert f"launchctl bootstrap gui/{os.getuid()}" in capsys.readouterr().out
    about = plistlib.loads(mac.path.read_bytes())
    assert about["ProgramArguments"] == service.command(given)
    assert about["RunAtLoad"] is True


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit_whatever_a_directory_is_called(tmp_path):
    state = tmp_path / NASTY
    words = service.command(mesh.NodeSettings(state=state, **ALL))
    path = tmp_path / "gossipmesh.service"
    path.write_text(service.unit(words))
    command = ["systemd-analyze", "--user", "--man=no", "verify", str(path)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    checked = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=20.0
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    line = next(one for one in path.read_text().splitlines() if one.startswith("ExecStart="))
    read = shlex.split(line.removeprefix("ExecStart="))
    assert [word.replace("%%", "%").replace("$$", "$") for word in read] == words

    path.write_text(service.unit(words).replace("Restart=on-failure", "Restart=sometimes"))
    broken = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=20.0
    )
    assert "restart specifier" in broken.stderr, "it would have said so"
