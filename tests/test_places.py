"""Where a user's files lie, and which directories are believed."""

import json
import os
from pathlib import Path

import pytest

from mesh.client import running_nodes
from mesh.places import host_directory, is_ours, state_directory

needs_linux = pytest.mark.skipif(
    os.uname().sysname != "Linux", reason="the XDG variables are Linux's"
)


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime directory as a login makes it; no variable of whoever runs the tests."""
    for variable in ("MESH_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return directory


def test_what_is_given_comes_before_the_variable_and_that_before_the_default(tmp_path, monkeypatch):
    assert state_directory().is_relative_to(tmp_path)
    monkeypatch.setenv("MESH_STATE", "~/mine")
    assert state_directory() == tmp_path / "mine"
    assert state_directory("/elsewhere") == Path("/elsewhere")


@needs_linux
def test_a_relative_path_in_a_variable_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    assert state_directory() == tmp_path / ".local/state/gossipmesh/node"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "there"))
    assert state_directory() == tmp_path / "there/gossipmesh/node"


@needs_linux
@pytest.mark.parametrize("spoil", ["open", "link"])
def test_a_runtime_directory_that_others_can_change_is_not_used(runtime, tmp_path, spoil):
    assert host_directory() == runtime / "gossipmesh"
    if spoil == "open":
        runtime.chmod(0o777)
    else:
        runtime.rename(tmp_path / "moved")
        runtime.symlink_to(tmp_path / "moved")
    assert not host_directory().is_relative_to(runtime)


@needs_linux
def test_a_runtime_directory_that_is_not_there_yet_is_used(runtime):
    runtime.rmdir()
    assert host_directory() == runtime / "gossipmesh"


@needs_linux
def test_a_list_of_nodes_that_others_can_write_to_is_not_read(runtime, tmp_path, monkeypatch):
    listed = host_directory()
    listed.mkdir(mode=0o700)
    (listed / "a.json").write_text(json.dumps({"state": str(tmp_path)}))
    monkeypatch.setattr("mesh.client.node_of_state", lambda state: _Node(str(state), "a"))
    assert len(running_nodes()) == 1
    listed.chmod(0o777)
    assert not is_ours(listed)
    assert running_nodes() == []


class _Node:
    def __init__(self, name, node):
        self.name, self.node = name, node
