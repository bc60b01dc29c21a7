"""Values of an optimizer as JSON and tensors, and back exactly; nothing in them can run.

A value's trip: optimizer.state_dict() -> encode() -> JSON, and each tensor under a name of its own ->
decode() -> equal in every bit and every type. An object of the JSON has one key, which says what it
stands for:

    {"tensor": name}  {"tuple": [...]}  {"dict": {...}}  {"pairs": [[key, value], ...]}  {"float": "nan"}
    {"dtype": "bfloat16"}

A number of numpy's becomes one of Python's.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mesh.errors import UsageError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def encode(value: object, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors`, under names that begin with `name`.

    Raises UsageError for what is neither a plain value nor a tensor.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case np.generic():
            return encode(value.item(), name, tensors)
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case torch.Tensor():
            while name in tensors:
                name += "_"  # keys hold dots too: two paths may read the same
            tensors[name] = value
            return {"tensor": name}
        case tuple():
            return {"tuple": [encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
        case list():
            return [encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        case Mapping():
            pairs = [[key, encode(v, f"{name}.{key}", tensors)] for key, v in value.items()]
            if all(isinstance(key, str) for key, _ in pairs):
                return {"dict": dict(pairs)}
            if all(type(key) is int for key, _ in pairs):
                return {"pairs": pairs}
    raise UsageError(f"{name} is {type(value).__name__}: only numbers, texts and tensors are saved")


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What encode() made this of. Raises ValueError for anything else."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [decode(v, tensors) for v in value]
        case {"tensor": str(name)} if len(value) == 1 and name in tensors:
            return tensors[name]
        case {"tuple": list(entries)} if len(value) == 1:
            return tuple(decode(v, tensors) for v in entries)
        case {"dict": dict(entries)} if len(value) == 1:
            return {key: decode(v, tensors) for key, v in entries.items()}
        case {"pairs": list(entries)} if len(value) == 1:
            return dict(_pair(entry, tensors) for entry in entries)
        case {"dtype": str(name)} if len(value) == 1 and name in DTYPES:
            return DTYPES[name]
        case {"float": "nan" | "inf" | "-inf" as text} if len(value) == 1:
            return float(text)
    raise ValueError(f"{str(value)[:80]} is no value of a checkpoint")


def _pair(entry: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[int, Any]:
    match entry:
        case [int(key), value]:
            return key, decode(value, tensors)
    raise ValueError(f"{str(entry)[:80]} is no pair of a key and a value")
