"""The fault table on real nodes, each fault in its short form; `make faults` runs the long ones.

A test fails with every promise that was not kept, and shows all that was measured (`pytest -rP`).
"""

from pathlib import Path

import pytest

from tests.lan.faults import FAULTS, Fault
from tests.lan.findings import Size
from tests.lan.lab import NoLab


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_real_nodes_keep_what_the_fault_table_promises(
    fault: Fault, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory: Path = tmp_path_factory.mktemp("lan")
    try:
        findings, said = fault.run(directory, Size.SHORT)
    except NoLab as error:
        pytest.skip(str(error))
    print(said)
    for finding in findings.all:
        print(f"measured: {finding}")
    assert findings.all, "a fault that shows nothing"
    assert findings.failed == []
