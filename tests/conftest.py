"""Options of the whole test suite, where the data is that it does not carry, and one command run in it."""

import os
from pathlib import Path

import pytest

from nodes.cli import main


def pytest_addoption(parser):
    parser.addoption(
        "--names-data",
        metavar="DIR",
        default=os.environ.get("GOSSIPMESH_NAMES"),
        help="folder with one Language.txt each, for examples/names_rnn.py ($GOSSIPMESH_NAMES)",
    )


@pytest.fixture(scope="session")
def names_data(pytestconfig):
    """The folder of surnames that --names-data gives; tests that need it are skipped without."""
    given = pytestconfig.getoption("--names-data")
    if not given:
        pytest.skip(
            "no names: give --names-data DIR or $GOSSIPMESH_NAMES, a folder such as data/names of "
            "https://github.com/spro/practical-pytorch"
        )
    folder = Path(given).absolute()
    if len(list(folder.glob("*.txt"))) < 2:
        pytest.fail(f"--names-data {folder} holds no files of names, one a language")
    return folder


@pytest.fixture
def command(capsys):
    """Runs one command in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        code = main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return run
