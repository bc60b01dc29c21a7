"""The file that a command is to write, looked at before anything is asked or computed for it."""

import os
from pathlib import Path

import mesh


def file(flag: str, given: str) -> Path:
    """The file itself, behind links. Raises UsageError for what cannot be written, and for a device or
    a pipe: a file is put in the place of what is there."""
    path = Path(os.path.realpath(given))
    if given == "-":
        raise mesh.UsageError(f"{flag} -: name a file; ./- is one of that name")
    if Path(given).exists() and not Path(given).is_file():
        raise mesh.UsageError(f"{flag} {given}: is there, and no regular file; name another")
    if not path.parent.is_dir():
        raise mesh.UsageError(f"{flag} {given}: {path.parent} is no directory that is there")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise mesh.UsageError(f"{flag} {given}: nothing can be written in {path.parent}")
    return path


def picture(flag: str, given: str) -> Path:
    """The same of a picture, whose ending says of which kind."""
    path = file(flag, given)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise mesh.UsageError(
            f"{flag} needs matplotlib: pip install 'gossipmesh[plots]'; "
            "without it curves are drawn in the terminal"
        ) from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{ending}" for ending in sorted(known))
        raise mesh.UsageError(f"{flag} {given}: the ending of a picture is one of {endings}")
    return path
