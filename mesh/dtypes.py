"""What the numbers of a flat buffer are: the types of tensors in a schema.

Flat buffers are float32; a type says what a training's tensor has. In the place of a BatchNorm layer's
running_var lies the second moment s = var + mean^2, which averages plainly (batchnorm.py), and its type
says so: whoever takes weights out of a buffer without the model has to know. A pulled model's trip: schema
and numbers as they came -> as_in_state_dict() -> the same, as the training's state dict has them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from mesh.arrays import Floats, np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN: Final = ("float16", "bfloat16", "float32", "float64")
MOMENT: Final = " moment"
DTYPES: Final = (*PLAIN, *(name + MOMENT for name in PLAIN))

MEAN, VARIANCE = "running_mean", "running_var"
"""The names that torch gives both buffers of a layer, behind the layer's own."""

TINY: Final = 1e-10
"""No variance is written below this: far under the 1e-5 that BatchNorm adds before it divides."""

RESOLUTION: Final = 2.0**-22
"""Of s: in float32 a difference of less cannot be told from rounding, so no variance is below it."""

Schema = list[tuple[str, tuple[int, ...], str]]
"""name, shape and dtype of each tensor, in the order of the numbers"""


def variance_of(mean: Floats, s: Floats) -> "NDArray[np.float64]":
    """The variances that second moments `s` stand for, float64, of their shape."""
    exact = s.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of one batch that overflowed, which is the training's own
        variance = exact - np.square(mean, dtype=np.float64)
    return np.maximum(variance, np.maximum(exact * RESOLUTION, TINY))


def as_in_state_dict(schema: Iterable[Sequence[Any]], values: Floats) -> Schema:
    """The schema without moments; in `values` (entries,) variances take their places.

    A moment whose mean is not there, or of another shape, stays what it is.
    """
    plain: Schema = [(name, tuple(shape), dtype) for name, shape, dtype in schema]
    places, start = {}, 0
    for name, shape, _ in plain:
        places[name] = slice(start, start := start + math.prod(shape))
    shapes = {name: shape for name, shape, _ in plain}
    for name, shape, dtype in plain:
        mean = name.removesuffix(VARIANCE) + MEAN
        if dtype.endswith(MOMENT) and shapes.get(mean) == shape:
            values[places[name]] = variance_of(values[places[mean]], values[places[name]])
    return [(name, shape, dtype.removesuffix(MOMENT)) for name, shape, dtype in plain]
