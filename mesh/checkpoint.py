"""A training's checkpoint: model, optimizer, and how far it came, in files that cannot run code.

A save's trip: state_dict() of model and optimizer -> snapshot(): tensors as safetensors bytes, all
else as JSON -> generations.py, two files that never disagree. A load's: both files, checked -> names,
shapes and types compared with the model's and the optimizer's -> only then is either changed.

Rules: 1. Never pickle. 2. A file that is damaged, hostile or another model's is a UsageError that says
what to do, and changes nothing. 3. Every entry of the state dict is saved, integers too; a tensor that
has two names, once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from mesh.arrays import Floats
from mesh.core.strategies import KEPT_VECTORS
from mesh.disk import REAL_DISK, Disk
from mesh.errors import UsageError
from mesh.generations import generation_path, read_generation
from mesh.named_tensors import load_named, named, storage_key
from mesh.plain_values import decode, encode
from mesh.rehearsal import rehearse

FORMAT: Final = "mesh.checkpoint/1"
MODEL: Final = "model."
EXTRA: Final = "extra."
OPTIMIZER: Final = "optimizer."
STRATEGY: Final = "strategy."
"""What names of tensors begin with, by whose they are."""

DTYPES: Final = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""Types that every version of safetensors holds, and its names for them."""

NUMBER_LIMIT: Final = 2**63
"""Steps and samples fit into 64 bits, here as on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """How far a training had come when its checkpoint was written."""

    run: str
    step: int
    """steps of this training"""
    mesh_step: int
    """the mesh's clock"""
    samples: int
    strategy: str
    """how the run averaged"""
    exchanged: bool
    """other replicas had met this one: what it held was the mesh's"""
    optimizer: str | None
    """its class; None: saved without one"""
    strategy_state: Mapping[str, torch.Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )
    """what the strategy keeps beside the weights, by name"""


Snapshot = tuple[dict[str, Any], bytearray]
"""What goes into the JSON, and the tensors as safetensors."""


# -------------------------------------------------------------------------------------------- save


def snapshot(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    run: str,
    step: int,
    mesh_step: int,
    samples: int,
    strategy: str,
    exchanged: bool,
    strategy_state: Floats | None = None,
) -> Snapshot:
    """A copy of everything as it is now. Raises UsageError for what cannot be saved."""
    tensors, tied, others = _entries(model)
    held: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "step": step,
        "mesh_step": mesh_step,
        "samples": samples,
        "strategy": {"name": strategy, "state": _kept_tensors(strategy, strategy_state, held)},
        "exchanged": exchanged,
        "model": {"tied": tied, "others": encode(others, EXTRA.rstrip("."), held)},
        "optimizer": None,
    }
    if optimizer is not None:
        state = encode(optimizer.state_dict(), OPTIMIZER.rstrip("."), held)
        about["optimizer"] = {"class": type(optimizer).__name__, "state": state}
    held |= {MODEL + name: tensor for name, tensor in tensors.items()}
    return about, _serialized(held)


def _kept_tensors(
    strategy: str, state: Floats | None, held: dict[str, torch.Tensor]
) -> dict[str, str] | None:
    """The names of the state's tensors, which go into `held`."""
    if state is None:
        return None
    names = {name: STRATEGY + name for name in KEPT_VECTORS[strategy]}
    held |= dict(zip(names.values(), map(torch.from_numpy, state), strict=True))
    return names


def kept_of(info: CheckpointInfo, strategy: str, entries: int) -> Floats | None:
    """What `strategy` kept, (vectors, entries); None where the checkpoint holds nothing of it.

    Raises UsageError if that is of another model.
    """
    if info.strategy != strategy or not info.strategy_state:
        return None
    for name, tensor in info.strategy_state.items():
        if tensor.shape != (entries,):
            raise UsageError(
                f"the checkpoint's {name} of strategy {strategy!r} has the shape "
                f"{list(tensor.shape)}, the model {entries} numbers: move it away"
            )
    return np.stack([info.strategy_state[name].numpy() for name in KEPT_VECTORS[strategy]])


def _entries(
    model: torch.nn.Module,
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]:
    """The state dict as (tensors, further names of tied ones -> their first name, all else)."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    others: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in named(model).items():
        if not isinstance(value, torch.Tensor):
            others[name] = value
        elif (name_before := first.setdefault(storage_key(value), name)) != name:
            tied[name] = name_before
        else:
            tensors[name] = value
    return tensors, tied, others


def _serialized(tensors: dict[str, torch.Tensor]) -> bytearray:
    """The tensors as safetensors bytes: length of the header, header, numbers.

    Written here because training waits for it: each number is copied once, straight from where it is
    (another device, another order in memory), in half the time of the library's own save().
    """
    header: dict[str, Any] = {}
    end = 0
    widest_first = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in widest_first:  # so every number lies at a multiple of its own size
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise UsageError(f"{name} is {tensor.layout}, {tensor.dtype}: it cannot be saved")
        start, end = end, end + tensor.numel() * tensor.element_size()
        where = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": DTYPES[tensor.dtype], **where}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    data = bytearray(begin + end)
    data[:begin] = len(text).to_bytes(8, "little") + text
    for name, tensor in widest_first:
        if tensor.numel():
            offset = begin + header[name]["data_offsets"][0]
            part = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            part.view(tensor.shape).copy_(tensor.detach())
    return data


# -------------------------------------------------------------------------------------------- load


def load(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> CheckpointInfo:
    """Brings a model, and an optimizer, to where node.save(path) or join(checkpoint=) saw them.

    Tensors are filled in place. Without `optimizer`, that of the checkpoint is left unread.
    Raises UsageError, with both as they were, for files that are not whole or fit neither.
    """
    return load_generation(generation_path(path), model, optimizer)


def load_generation(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    disk: Disk = REAL_DISK,
) -> CheckpointInfo:
    """As load(), from the JSON at `path`."""
    about, data = read_generation(path, disk)
    try:
        info = _info(about)
        tensors = safetensors.torch.load(data)
        names = about["strategy"].get("state")
        info = replace(info, strategy_state=_strategy_state(info.strategy, names, tensors))
        entries = _fitting_entries(about["model"], tensors, model)
        state = None if optimizer is None else _fitting_state(about, tensors, optimizer)
        if optimizer is not None and state is not None:
            _fill_optimizer(optimizer, state)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no checkpoint that can be read: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is no checkpoint: it is nested without end") from None
    load_named(model, entries)
    return info


def _info(about: dict[str, Any]) -> CheckpointInfo:
    if about.get("format") != FORMAT:
        raise UsageError(
            f"its format is {str(about.get('format'))[:40]!r}, this version reads {FORMAT!r}: "
            "load it with the version of gossipmesh that saved it"
        )
    match about:
        case {
            "run": str(run),
            "exchanged": bool(exchanged),
            "strategy": {"name": str(strategy)},
            "optimizer": None | {"class": str()} as optimizer,
        }:
            step, mesh_step, samples = (_whole(about, k) for k in ("step", "mesh_step", "samples"))
            return CheckpointInfo(
                run=run,
                step=step,
                mesh_step=mesh_step,
                samples=samples,
                strategy=strategy,
                exchanged=exchanged,
                optimizer=None if optimizer is None else optimizer["class"],
            )
    raise ValueError("run, strategy or optimizer is missing")


def _strategy_state(
    strategy: str, names: object, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if names is None:
        return {}
    wanted = KEPT_VECTORS.get(strategy, ())
    if names != {name: STRATEGY + name for name in wanted}:
        raise ValueError(f"{str(names)[:80]} is no state of strategy {strategy!r}")
    state = {name: tensors[STRATEGY + name] for name in wanted}
    if any(tensor.dtype != torch.float32 or tensor.dim() != 1 for tensor in state.values()):
        raise ValueError(f"the state of strategy {strategy!r} is no float32 vectors")
    return state


def _whole(about: dict[str, Any], key: str) -> int:
    value = about.get(key)
    if type(value) is not int or not 0 <= value < NUMBER_LIMIT:
        raise ValueError(f"{key} is {str(value)[:40]}, no whole number from 0")
    return value


def _fitting_entries(
    about: dict[str, Any], tensors: dict[str, torch.Tensor], model: torch.nn.Module
) -> dict[str, Any]:
    """The model's new state dict. Raises UsageError if it is another model's."""
    own, own_tied, own_others = _entries(model)
    saved = {k.removeprefix(MODEL): t for k, t in tensors.items() if k.startswith(MODEL)}
    others = decode(about["others"], _named(EXTRA, tensors))
    for name in [*own, *own_others]:
        if name not in (saved if name in own else others):
            raise UsageError(f"layer {name} is only in this model: make the model as it was saved")
    for name in [*saved, *others]:
        if name not in own and name not in own_others:
            raise UsageError(f"layer {name} is only in the file: make the model as it was saved")
    for name, tensor in own.items():
        here, there = _kind(tensor), _kind(saved[name])
        if here != there:
            raise UsageError(
                f"layer {name} is {here} here, {there} there: make the model as it was saved"
            )
    if about["tied"] != own_tied:
        raise UsageError("other layers are tied here than there: make the model as it was saved")
    return {**saved, **{name: saved[first] for name, first in own_tied.items()}, **others}


def _named(begin: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(begin)}


def _kind(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _fitting_state(
    about: dict[str, Any], tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The optimizer's new state dict. Raises UsageError if it is another optimizer's."""
    saved, kind = about["optimizer"], type(optimizer).__name__
    if saved is None:
        raise UsageError("it was saved without an optimizer: load it without one")
    if saved["class"] != kind:
        raise UsageError(f"its optimizer is {saved['class']}, this one is {kind}: make it as saved")
    state = decode(saved["state"], _named(OPTIMIZER, tensors))
    own = optimizer.state_dict()
    groups, own_groups = state["param_groups"], own["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in own_groups]:
        raise UsageError(
            "the optimizer's parameters are grouped otherwise: make it as it was saved"
        )
    numbers = {number for group in own_groups for number in group["params"]}
    if not set(state["state"]) <= numbers:
        raise ValueError("the optimizer's state is of parameters that are not there")
    if not all(isinstance(entry, Mapping) for entry in state["state"].values()):
        raise ValueError("the optimizer's state of a parameter is no table")
    for group, own_group in zip(groups, own_groups, strict=True):
        for key, value in own_group.items():
            if key not in group and key != "lr":
                group[key] = value  # of a schedule that was not there then, or of a newer torch
            elif not _alike(value, group.get(key)):
                raise ValueError(f"the optimizer's {key} is {str(group.get(key))[:40]}")
    rehearse(optimizer, state)
    return dict(state)


def _alike(own: Any, saved: Any) -> bool:
    """Whether a setting can take the place of another: numbers of numbers, texts of texts."""
    numbers = (bool, int, float, torch.Tensor)
    match own:
        case str() | Mapping():
            return isinstance(saved, type(own))
        case list() | tuple():
            same = isinstance(saved, list | tuple) and len(saved) == len(own)
            return same and all(_alike(a, b) for a, b in zip(own, saved, strict=True))
        case torch.dtype():
            return isinstance(saved, torch.dtype)
        case None:
            return saved is None or isinstance(saved, numbers)
        case _:
            return isinstance(saved, numbers) or (saved is None and isinstance(own, bool))


def _fill_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """load_state_dict() gives state its parameter's type; here it keeps the one that it was saved in,
    and its parameter's order in memory."""
    optimizer.load_state_dict(state)
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            for key, value in state["state"].get(number, {}).items():
                if not isinstance(value, torch.Tensor) or key == "step":
                    continue
                now = optimizer.state[parameter].get(key)
                if not isinstance(now, torch.Tensor) or now.shape != parameter.shape:
                    continue
                if now.dtype != value.dtype or now.stride() != parameter.stride():
                    kept = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                    optimizer.state[parameter][key] = kept.copy_(value)
