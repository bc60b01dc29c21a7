"""The lab as a fixture: it is gone after each test, however the test ends."""

from collections.abc import Iterator

import pytest

from tests.lan.lab import Lab, NoLab

MACHINES = 3


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three machines on one LAN, nothing running. Their logs are printed if the test fails."""
    lab = Lab(tmp_path_factory.mktemp("lan"), MACHINES)
    try:
        lab.__enter__()
    except NoLab as error:
        pytest.skip(str(error))
    try:
        yield lab
    finally:
        try:
            print(lab.logs())  # pytest shows what was printed by tests that fail only
        finally:
            lab.close()
