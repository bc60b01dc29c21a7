"""Two files that never disagree: a JSON that names a file of tensors by what is in it.

A save's trip: the tensors under a name of their own (NAME-<hash>.safetensors), synced -> NAME.json,
which says that name and the whole hash, renamed into place -> the tensors of the generation before are
removed. Until the rename the old JSON and its tensors stand, from then on the new ones: a kill, a full
disk or a power cut at any point leaves one whole generation.

Rules: 1. Each file is written whole (disk.py). 2. Tensors are removed only when a JSON that names
others is safe on the disk. 3. One process at a time saves into a directory, where its file system has
locks. 4. What is read is checked against the hash before anybody looks into it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mesh.disk import REAL_DISK, Disk, write_whole
from mesh.errors import MeshError, UsageError

HASH_CHARACTERS: Final = 16
"""Of a SHA-256, in the name of a file; the JSON holds all 64."""

JSON_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""An optimizer of 65,536 tensors needs about 20 MB."""


def generation_path(path: str | os.PathLike[str]) -> Path:
    """The JSON that a person means by `path`: with or without its suffix. Raises UsageError."""
    given = Path(path)
    if not given.name or given.is_dir():
        raise UsageError(f"{path} is a directory: name a checkpoint in it, {given / 'NAME'}")
    stem = given.name.removesuffix(".json").removesuffix(".safetensors")
    if not stem:
        raise UsageError(f"{path} has no name before its suffix")
    return given.with_name(f"{stem}.json")


def write_generation(
    path: Path, about: dict[str, Any], tensors: bytes | bytearray, disk: Disk = REAL_DISK
) -> None:
    """Replaces what `path` (NAME.json) holds, or leaves it as it was. Raises MeshError."""
    whole_hash = hashlib.sha256(tensors).hexdigest()
    file = path.with_name(f"{path.stem}-{whole_hash[:HASH_CHARACTERS]}.safetensors")
    named = {"file": file.name, "sha256": whole_hash, "bytes": len(tensors)}
    text = json.dumps({**about, "tensors": named}, indent=1, allow_nan=False)
    with _alone(path.parent, fcntl.LOCK_EX):
        write_whole(file, tensors, disk)
        write_whole(path, text.encode(), disk)
        _remove_others(path, file, disk)


def read_generation(path: Path, disk: Disk = REAL_DISK) -> tuple[dict[str, Any], bytes]:
    """What write_generation() was given last. Raises UsageError for files that are not whole."""
    with _alone(path.parent, fcntl.LOCK_SH):
        about = _parsed(path, _read(path, disk))
        named = about.pop("tensors", None)
        match named:
            case {"file": str(file), "sha256": str(whole_hash)} if Path(
                file
            ).name == file and _tensors_of(path).fullmatch(file):
                tensors = _read(path.with_name(file), disk)
            case _:
                raise UsageError(f"{path} names no tensors of its own: {_ADVICE}")
    if hashlib.sha256(tensors).hexdigest() != whole_hash:
        raise UsageError(f"{path.with_name(file)} is not what {path} was saved with: {_ADVICE}")
    return about, tensors


_ADVICE: Final = "it is damaged or was changed; move it away, or take a copy of it that is whole"


def _read(path: Path, disk: Disk) -> bytes:
    try:
        return disk.read(path)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise MeshError(f"cannot read {path}: {error.strerror}") from None


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    try:
        about = json.loads(data) if len(data) <= JSON_LIMIT_BYTES else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UsageError(f"{path} is no checkpoint: {_ADVICE}")
    return about


def _tensors_of(path: Path) -> re.Pattern[str]:
    """Names of the tensors of any generation of `path`."""
    return re.compile(rf"{re.escape(path.stem)}-[0-9a-f]{{{HASH_CHARACTERS}}}\.safetensors")


def _remove_others(path: Path, current: Path, disk: Disk) -> None:
    """Older generations, and what a kill left half-written. What cannot be removed now can be later."""
    own = _tensors_of(path).pattern
    half_written = re.compile(rf"\.({own}|{re.escape(path.name)})\.\d+")
    with contextlib.suppress(OSError):
        for file in disk.names(path.parent):
            old = file.name != current.name and re.fullmatch(own, file.name)
            if old or half_written.fullmatch(file.name):
                disk.remove(file)


@contextlib.contextmanager
def _alone(directory: Path, kind: int) -> Iterator[None]:
    """Waits for whoever saves into this directory; goes on without where it cannot be locked."""
    descriptor = -1
    try:
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(descriptor, kind)
        yield
    finally:
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked data loader holds a copy of it
            os.close(descriptor)
