"""A model of the mesh on this machine: asked of the node, written as a safetensors file.

A trip: pull_model() -> the node tells the schema and shares its memory -> progress -> "pulled" ->
PulledModel.save(): a temporary file, synced -> renamed. Rules: 1. Nothing has the file's name before
it is whole. 2. It is written tensor by tensor, in pieces: no second copy of the model is made, which
is why the format is written here and not by its library (header, then raw numbers; the tests read it
with the library). 3. bfloat16 and float16 are rounded to nearest, as the training would.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.arrays import Floats
from mesh.client import LocalSocket, RunningNode
from mesh.codec import BFloat16
from mesh.disk import written_whole
from mesh.dtypes import Schema, as_in_state_dict
from mesh.errors import MeshError
from mesh.shared import HandOverMemory

FIRST_ANSWER_S: Final = 120.0
"""Peers on a slow line tell the layers of a large model, and some of them may be gone."""

NEWS_S: Final = 20.0
"""The node says five times a second how far it is."""

PIECE_ENTRIES: Final = 1 << 18
NAMES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
WIDTHS: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """How far a pull is."""

    source: str
    """name of the node that is giving"""
    averaged: int
    """replicas that came in full"""
    wanted: int
    received_bytes: int
    expected_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledModel:
    """The mean of some replicas of a run, as it was a moment ago."""

    run: str
    schema: Schema
    """name, shape, dtype of each tensor, in the order of `values`"""
    values: Floats
    """all tensors' numbers, one after the other, in float32"""
    mesh_step: int
    averaged: int
    sources: list[str]
    """names of the nodes that gave"""
    lost: list[str]
    """those that did not, each with the reason"""
    left_out: list[str]
    """nodes of this run whose layers are others than most nodes'"""

    def save(self, path: Path) -> int:
        """Writes a safetensors file, in each tensor's own dtype; returns its length in bytes.

        Replaces a file of that name, or leaves it as it was. Raises MeshError.
        """
        header, parts = self._layout()
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for start, entries, dtype in parts:
                for begin in range(start, start + entries, PIECE_ENTRIES):
                    end = min(begin + PIECE_ENTRIES, start + entries)
                    file.write(_bytes_of(self.values[begin:end], dtype))
            return file.tell()

    def _layout(self) -> tuple[bytes, list[tuple[int, int, str]]]:
        """(the file's header, (start, entries, dtype) of each tensor as it follows there)."""
        starts, start = {}, 0
        for name, shape, _ in self.schema:
            starts[name] = start
            start += math.prod(shape)
        head: dict[str, Any] = {
            "__metadata__": {
                "run": self.run,
                "mesh_step": str(self.mesh_step),
                "averaged": str(self.averaged),
                "format": "pt",
            }
        }
        parts, offset = [], 0
        # The widest first: each tensor then begins at a multiple of its width.
        for name, shape, dtype in sorted(self.schema, key=lambda entry: -WIDTHS[entry[2]]):
            entries = math.prod(shape)
            end = offset + entries * WIDTHS[dtype]
            head[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
            parts.append((starts[name], entries, dtype))
            offset = end
        header = json.dumps(head, separators=(",", ":")).encode()
        return header + b" " * (-len(header) % 8), parts


def pull_model(
    node: RunningNode,
    run: str,
    peers: int = 3,
    progress: Callable[[PullProgress], None] | None = None,
) -> PulledModel:
    """The current model of a run, through this machine's node: the mean of up to `peers` replicas.

    The node need not train it. Changes nothing in the mesh. Raises UsageError, MeshError.
    """
    link = LocalSocket(node.control)
    try:
        answer = link.request(FIRST_ANSWER_S, op="pull", run=run, peers=peers)
        memory = HandOverMemory(link.descriptors.pop(), int(answer["entries"]))
        memory.close()  # the mapping stays
        while True:
            event = link.receive(NEWS_S)
            match (event or {}).get("event"):
                case "progress" if event and progress is not None:
                    progress(
                        PullProgress(
                            source=event["source"],
                            averaged=event["averaged"],
                            wanted=event["wanted"],
                            received_bytes=event["bytes"],
                            expected_bytes=event["of"],
                        )
                    )
                case "progress":
                    pass
                case "pulled" if event:
                    return PulledModel(
                        run=run,
                        schema=as_in_state_dict(answer["schema"], memory.posted),
                        values=memory.posted,
                        mesh_step=event["mesh_step"],
                        averaged=event["averaged"],
                        sources=event["sources"],
                        lost=event["lost"],
                        left_out=answer["left_out"],
                    )
                case _:
                    said = (event or {}).get("error", {}).get("message")
                    raise MeshError(said or f"the node says nothing for {NEWS_S:g} s")
    finally:
        link.close()


def _bytes_of(values: Floats, dtype: str) -> bytes | memoryview:
    """Numbers as the file holds them, little-endian."""
    match dtype:
        case "bfloat16":
            out = memoryview(bytearray(2 * len(values)))
            BFloat16().encode(values, out)
            return out
        case "float16":
            with np.errstate(over="ignore"):
                return values.astype("<f2").tobytes()
        case "float64":
            return values.astype("<f8").tobytes()
        case _:
            return values.astype("<f4", copy=False).tobytes()
