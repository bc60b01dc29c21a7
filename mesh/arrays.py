"""numpy, which a node loads with its first run; until then its memory is 12 MB smaller.

Rules: 1. What a node imports when it starts takes `np` from here and touches it in functions only.
2. Loading takes a tenth of a second, ten times that on a small machine: control.py does it in a thread
before a run begins, so that the node's loop goes on.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Floats", "is_loaded", "load", "np"]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
else:

    class _Numpy:
        """Becomes what is asked of it, name by name."""

        def __getattr__(self, name: str) -> Any:
            vars(self)[name] = value = getattr(importlib.import_module("numpy"), name)
            return value

    np = _Numpy()
    Floats = Any


def is_loaded() -> bool:
    return "numpy" in sys.modules


def load() -> None:
    """Before the first array of a node's life, in a thread."""
    importlib.import_module("numpy")
