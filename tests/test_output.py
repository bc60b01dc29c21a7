"""What a command is told to write, checked before it asks or computes anything."""

import os
import sys

import pytest

from mesh.errors import UsageError
from nodes import output
from nodes.cli import main

COMMANDS = {
    "pull": ("pull", "--run", "digits", "-o"),
    "top": ("top", "--svg"),
    "plot": ("plot", "-o"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", ["-", "/dev/null", "device", "pipe", "folder", "nowhere/a.svg"])
def test_a_file_that_would_be_no_file_or_take_the_place_of_none_is_refused(
    folder, capsys, command, given
):
    """With no node running: the mistake is said first."""
    if command == "plot":
        pytest.importorskip("matplotlib")
    before = sorted(os.listdir(folder))
    assert main([*COMMANDS[command], given, "--state", str(folder / "state")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"mesh: {COMMANDS[command][-1]} {given}: ")
    assert sorted(os.listdir(folder)) == before
    assert main([*COMMANDS[command], "curves.svg", "--state", str(folder / "state")]) == 3


def test_a_link_to_a_file_or_to_one_that_is_not_there_yet_is_followed(folder):
    (folder / "real").write_text("")
    (folder / "link").symlink_to("folder/../real")
    (folder / "new").symlink_to("folder/made.svg")
    assert output.file("-o", "link") == folder / "real"
    assert output.file("-o", "new") == folder / "folder" / "made.svg"
    assert output.file("-o", "./-") == folder / "-"


def test_a_directory_that_cannot_be_written_is_named(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "folder")
    with pytest.raises(UsageError, match=r"nothing can be written in .*folder"):
        output.file("-o", "folder/a")


def test_a_picture_has_an_ending_that_says_of_which_kind(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    assert output.picture("-o", "curves.PNG") == folder / "curves.PNG"
    for given in ("curves", "curves.docx"):
        with pytest.raises(UsageError, match=r"\.pdf, .*\.png, "):
            output.picture("-o", given)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install 'gossipmesh\\[plots\\]'"):
        output.picture("-o", "curves.png")
