"""Memory that two processes of one machine share: the two hand-over buffers of a run.

The node makes it, the training maps it through a descriptor that crosses the local socket. On Linux
it is a sealed memfd: neither side can shrink it under the other's feet (a bus error would kill both).
Elsewhere it is an unlinked file. multiprocessing.shared_memory is not used: in Python 3.11 its
resource tracker removes segments that other processes still use.
"""

import mmap
import os
import sys
import tempfile

from mesh.arrays import Floats, np
from mesh.errors import UsageError

if sys.platform == "linux":
    import fcntl


class HandOverMemory:
    """Two float32 buffers of (entries,): `posted` and `offered`, one mapping, one descriptor.

    Where a strategy keeps vectors of its own for checkpoints, these are `kept`, (vectors, entries).
    """

    def __init__(self, descriptor: int, entries: int, vectors: int = 0) -> None:
        """Maps memory that `create` made here or in the node process; takes over the descriptor.

        Raises UsageError if the descriptor is smaller than these buffers.
        """
        self.descriptor = descriptor
        size = 4 * entries * (2 + vectors)
        if os.fstat(descriptor).st_size < size:
            os.close(descriptor)
            raise UsageError("the shared memory is smaller than the model")
        self._map = mmap.mmap(descriptor, size)
        flat: Floats = np.frombuffer(self._map, dtype=np.float32)
        self.posted: Floats = flat[:entries]
        self.offered: Floats = flat[entries : 2 * entries]
        self.kept: Floats = flat[2 * entries : (2 + vectors) * entries].reshape(vectors, entries)

    @classmethod
    def create(cls, entries: int, vectors: int = 0) -> "HandOverMemory":
        """Fresh zeros for all buffers; those that nobody writes to cost nothing."""
        size = 4 * entries * (2 + vectors)
        if sys.platform == "linux":
            descriptor = os.memfd_create("mesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        else:
            descriptor, path = tempfile.mkstemp(prefix="mesh-")
            os.unlink(path)
            os.ftruncate(descriptor, size)
        return cls(descriptor, entries, vectors)

    def close(self) -> None:
        """Gives the descriptor back; the mapping goes with the last array that views it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
