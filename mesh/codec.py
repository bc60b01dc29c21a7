"""How numbers travel. A codec turns float32 into bytes and back; both ends of an exchange apply what
they decode from the very bytes that travelled, so rounding never changes the sum of all replicas.

Rules: 1. The initiator's codec is the exchange's. 2. Long vectors are coded piece by piece, each by
itself, so that all passes but the first run in a core's own cache. 3. Whatever bytes come, decode()
returns numbers; those of bytes that no encode() writes may be NaN, and callers refuse them as such.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

from mesh.arrays import Floats, np
from mesh.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXACT: Final = "f32"
"""The codec that rounds nothing: the default, and what a newcomer's first weights travel in."""

NAMES: Final = (EXACT, "bf16", "int8")

PIECE: Final = 32_768
"""Entries that are coded together: 128 KiB of float32, so that they and one scratch vector fit into a
second-level cache; shorter ones cost more in calls."""

BLOCK: Final = 256
"""Entries of int8 that share a scale. A scale costs 4 bytes: 1.6 % of the block."""

FEW: Final = 8
"""Blocks up to which tensors are coded together with their neighbours."""

STEPS: Final = 126.99
"""Steps of int8 from 0 to the largest entry of a block. Below 127, so that no rounding of the division
reaches 128, which would come out as -128."""

SMALLEST: Final = 2.0**-100
"""What a block's largest entry counts as at least: one over its scale must be a float32 as well."""

HALF_BFLOAT16: Final = 0x7FFF
"""Just under half of bfloat16's last place, in float32's bits; the last bit kept makes ties even."""

NAN_BFLOAT16: Final = 0x7FC0


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries that int8 codes together, and the scales of their blocks."""

    where: slice
    scales: slice
    starts: "NDArray[np.intp]"
    """of each block"""
    lengths: "NDArray[np.intp] | None" = None
    """of each block, where they are not all of BLOCK entries but for the last"""


Cut = tuple[Piece, ...]
"""How int8 divides one vector: cut_at()."""


class Codec(Protocol):
    """One way of writing float32 entries. All buffers belong to the caller.

    `cut` is how the vector is divided, for who cares: both ends make the same of the model's schema.
    """

    name: str

    def encoded_bytes(self, entries: int, cut: Cut | None = None) -> int:
        """Bytes that `entries` numbers take."""

    def room(self, out: memoryview, spare: Floats) -> Floats:
        """Where to put numbers that will be encoded into `out`: `out` itself where they travel as
        they are, else `spare`."""

    def as_it_lies(self, values: Floats) -> memoryview | None:
        """The bytes of `values` (n,) where they travel just so, else None."""

    def encode(self, values: Floats, out: memoryview, cut: Cut | None = None) -> None:
        """Writes `values` (n,) into `out`, exactly encoded_bytes(n, cut) long."""

    def decode(self, body: memoryview, out: Floats, cut: Cut | None = None) -> Floats:
        """The numbers in `body`: a view of it where that costs nothing, else `out` (n,), filled."""


class Float32:
    """The numbers as they are, little-endian."""

    name = EXACT

    def encoded_bytes(self, entries: int, cut: Cut | None = None) -> int:
        return 4 * entries

    def room(self, out: memoryview, spare: Floats) -> Floats:
        return np.frombuffer(out, dtype="<f4")

    def as_it_lies(self, values: Floats) -> memoryview | None:
        return values.data.cast("B") if sys.byteorder == "little" else None

    def encode(self, values: Floats, out: memoryview, cut: Cut | None = None) -> None:
        target = np.frombuffer(out, dtype="<f4")
        if not np.may_share_memory(values, target):  # else they are in their room() already
            np.copyto(target, values)

    def decode(self, body: memoryview, out: Floats, cut: Cut | None = None) -> Floats:
        return np.frombuffer(body, dtype="<f4")


class BFloat16:
    """The upper half of float32, little-endian, rounded to nearest, ties to even."""

    name = "bf16"

    @functools.cached_property
    def _bits(self) -> "NDArray[np.uint32]":
        return np.empty(PIECE, dtype=np.uint32)

    def encoded_bytes(self, entries: int, cut: Cut | None = None) -> int:
        return 2 * entries

    def room(self, out: memoryview, spare: Floats) -> Floats:
        return spare

    def as_it_lies(self, values: Floats) -> memoryview | None:
        return None

    def encode(self, values: Floats, out: memoryview, cut: Cut | None = None) -> None:
        target: NDArray[np.uint16] = np.frombuffer(out, dtype="<u2")
        for where in _pieces(len(values)):
            bits = values[where].view(np.uint32)
            rounded = np.right_shift(bits, 16, out=self._bits[: len(bits)])
            rounded &= 1
            rounded += HALF_BFLOAT16
            rounded += bits
            rounded >>= 16
            np.copyto(target[where], rounded, casting="unsafe")
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(np.dot(values, values))
        if not finite:  # some NaN are so large that adding to them made a number
            target[np.isnan(values)] = NAN_BFLOAT16

    def decode(self, body: memoryview, out: Floats, cut: Cut | None = None) -> Floats:
        source = np.frombuffer(body, dtype="<u2")
        for where in _pieces(len(out)):
            bits = out[where].view(np.uint32)
            np.copyto(bits, source[where])
            bits <<= 16
        return out


class Int8:
    """Whole steps of -127..127 times a scale for each block, the largest entry of which is the most.

    What lies between two steps goes to one of them by chance, so that the mean over many exchanges is
    right. A body is the scales of all blocks (float32, little-endian), then one byte for each entry.
    """

    name = "int8"

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    @functools.cached_property
    def _scratch(self) -> Floats:
        return np.empty(PIECE, dtype=np.float32)

    def encoded_bytes(self, entries: int, cut: Cut | None = None) -> int:
        return entries + 4 * _blocks(_cut_of(entries, cut))

    def room(self, out: memoryview, spare: Floats) -> Floats:
        return spare

    def as_it_lies(self, values: Floats) -> memoryview | None:
        return None

    def encode(self, values: Floats, out: memoryview, cut: Cut | None = None) -> None:
        cut = _cut_of(len(values), cut)
        scales, steps = _parts(out, cut)
        with np.errstate(over="ignore", invalid="ignore"):
            for piece in cut:
                given, its_scales = values[piece.where], scales[piece.scales]
                scaled = np.abs(given, out=self._scratch[: len(given)])
                peaks = np.maximum.reduceat(scaled, piece.starts)
                np.divide(np.maximum(peaks, SMALLEST), STEPS, out=its_scales)
                _scale_blocks(given, np.reciprocal(its_scales), piece, out=scaled)
                begin = self._rng.randrange(PIECE)
                scaled += _noise()[begin : begin + len(given)]
                np.floor(scaled, out=scaled)
                np.copyto(steps[piece.where], scaled, casting="unsafe")

    def decode(self, body: memoryview, out: Floats, cut: Cut | None = None) -> Floats:
        cut = _cut_of(len(out), cut)
        scales, steps = _parts(body, cut)
        # A scale below zero would turn the weights round and look well.
        scales = scales.copy()
        scales[~(scales >= 0)] = np.nan
        with np.errstate(over="ignore", invalid="ignore"):
            for piece in cut:
                numbers = out[piece.where]
                np.copyto(numbers, steps[piece.where])
                _scale_blocks(numbers, scales[piece.scales], piece, out=numbers)
        return out


def cut_at(lengths: Iterable[int]) -> Cut:
    """How a vector is divided that holds tensors, or parts of them, of these `lengths`, one after the other.

    No block holds numbers of two tensors: a variance of thousands would leave nothing of the weights beside
    it. Where that took more room than float32, of thousands of tensors of one entry, borders do not count.
    """
    lengths = [length for length in lengths if length]
    entries = sum(lengths)
    if 4 * sum(-(-length // BLOCK) for length in lengths) > 3 * entries:
        lengths = [entries]
    pieces: list[Piece] = []
    at = scale = held = 0
    short: list[int] = []

    def flush() -> None:
        """Tensors of a few blocks each are coded together: calls for each would take longer."""
        nonlocal at, scale, held
        if short:
            counts = np.array(short)
            where, scales = slice(at, at + held), slice(scale, scale + len(short))
            pieces.append(Piece(where, scales, np.cumsum(counts) - counts, counts))
            at, scale, held = where.stop, scales.stop, 0
            short.clear()

    for length in lengths:
        if length <= FEW * BLOCK:
            if held + length > PIECE:
                flush()
            whole, rest = divmod(length, BLOCK)
            short += [BLOCK] * whole + [rest] * (rest > 0)
            held += length
            continue
        flush()
        for part in _pieces(length):
            where = slice(at, at + part.stop - part.start)
            scales = slice(scale, scale - (part.start - part.stop) // BLOCK)
            pieces.append(Piece(where, scales, _starts()[: scales.stop - scale]))
            at, scale = where.stop, scales.stop
    flush()
    return tuple(pieces)


def check_codec(name: object) -> str:
    """A codec's name as a user gives it. Raises UsageError."""
    if name not in NAMES:
        raise UsageError(f"codec={name!r}: one of {', '.join(NAMES)}")
    return str(name)


def make_codecs(rng: Random) -> dict[str, Codec]:
    """All codecs, by name. `rng` decides how int8 rounds."""
    codecs: tuple[Codec, ...] = (Float32(), BFloat16(), Int8(rng))
    return {codec.name: codec for codec in codecs}


def _pieces(entries: int) -> Iterator[slice]:
    for start in range(0, entries, PIECE):
        yield slice(start, min(start + PIECE, entries))


def _cut_of(entries: int, cut: Cut | None) -> Cut:
    """As given, or that of one tensor."""
    return cut_at([entries]) if cut is None else cut


def _blocks(cut: Cut) -> int:
    return cut[-1].scales.stop if cut else 0


def _parts(body: memoryview, cut: Cut) -> "tuple[Floats, NDArray[np.int8]]":
    """(scales, steps) of an int8 body: views."""
    end = 4 * _blocks(cut)
    return np.frombuffer(body[:end], dtype="<f4"), np.frombuffer(body[end:], dtype=np.int8)


def _scale_blocks(values: Floats, scales: Floats, piece: Piece, *, out: Floats) -> None:
    """out = values (n,) times the scale of each one's block; the last block may be short."""
    if piece.lengths is not None:
        np.multiply(values, np.repeat(scales, piece.lengths), out=out)
        return
    whole = len(values) - len(values) % BLOCK
    blocks = values[:whole].reshape(-1, BLOCK)
    np.multiply(blocks, scales[: len(blocks), None], out=out[:whole].reshape(-1, BLOCK))
    np.multiply(values[whole:], scales[-1], out=out[whole:])


@functools.cache
def _starts() -> "NDArray[np.intp]":
    """Where the blocks of a piece begin."""
    return np.arange(0, PIECE, BLOCK)


@functools.cache
def _noise() -> Floats:
    """Numbers of 0..1 in random order, twice: read anywhere, a piece's worth holds each of them once,
    and read at a random place, each entry gets each of them equally often."""
    levels = (np.random.default_rng(0).permutation(PIECE) + 0.5) / PIECE
    return np.tile(levels.astype(np.float32), 2)
