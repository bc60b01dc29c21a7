"""The bare node process: `python -m mesh SETTINGS`, started by launch.py; people use `mesh up`."""

import os
import sys

# Fragments are 1 MiB: a second BLAS thread would only take a core from the training.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from mesh.errors import MeshError
from mesh.process import run_node
from mesh.settings import NodeSettings


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        said = (
            "error: this starts a node for another program; people type `mesh up`, or `mesh --help`"
        )
        print(said, file=sys.stderr)
        return 2
    try:
        return run_node(NodeSettings.from_json(sys.argv[1]), lifeline=True)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
