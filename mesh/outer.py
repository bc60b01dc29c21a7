"""`outer`: the momentum of NoLoCo's outer steps, beside a replica.

Source: Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models"
(2025), with gamma = alpha as in its released code, where only theta travels:

    m = BETA m + ALPHA ((theta_i + theta_j) / 2 - phi_i);  phi += m;  theta = phi

w is theta; an exchange has brought it to the mean of the pair when step() is called. The rounds that
pull replicas together contract by sqrt(BETA) at best: that is why BETA is not the 0.9 of DiLoCo.
"""

import math
from typing import Final

from mesh.arrays import Floats, np
from mesh.errors import NotFinite
from mesh.replica import Replica, square_norm

ALPHA: Final = 0.7
BETA: Final = 0.5


class OuterMomentum:
    """phi and m of one replica: two more models of memory. All calls are about one fragment."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.anchor: Floats = np.zeros_like(replica.weights)
        self.momentum: Floats = np.zeros_like(replica.weights)

    def begin(self, index: int) -> None:
        """phi = w, m = 0: at first, and where there was nobody to average with."""
        where = self._replica.slice_of(index)
        np.copyto(self.anchor[where], self._replica.weights[where])
        self.momentum[where] = 0

    def keep(self, index: int, kept: Floats) -> None:
        """kept (2, entries) = (phi, m): for the training's checkpoint."""
        where = self._replica.slice_of(index)
        np.copyto(kept[0, where], self.anchor[where])
        np.copyto(kept[1, where], self.momentum[where])

    def resume(self, index: int, kept: Floats) -> None:
        """(phi, m) = kept, from a checkpoint. Raises NotFinite."""
        where = self._replica.slice_of(index)
        if not math.isfinite(square_norm(kept[0, where]) + square_norm(kept[1, where])):
            raise NotFinite("the checkpoint's momentum of `outer` is not finite")
        np.copyto(self.anchor[where], kept[0, where])
        np.copyto(self.momentum[where], kept[1, where])

    def step(self, index: int) -> None:
        """One outer step."""
        where = self._replica.slice_of(index)
        w, phi, m = self._replica.weights[where], self.anchor[where], self.momentum[where]
        np.subtract(w, phi, out=w)
        np.multiply(w, ALPHA, out=w)
        np.multiply(m, BETA, out=m)
        np.add(m, w, out=m)
        np.add(phi, m, out=phi)
        np.copyto(w, phi)
