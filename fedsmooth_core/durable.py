"""Files that are whole or not there, whatever kills the process or the machine."""

import fcntl
import os
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, data: bytes) -> None:
    """Let ``path`` hold ``data``, whole and on the disk, or stay as it was.

    Its folder must exist. One writer a path: the temporary file beside it has one fixed name, so that
    what a killed process leaves is overwritten, not collected.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def append_durably(path: Path, line: str) -> None:
    """Append one line and its end, on the disk when this returns.

    What a crash left of a line before it stays a line of its own.
    """
    is_new = not path.exists()
    with path.open("ab+") as file:
        torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def try_lock(file: IO[Any]) -> bool:
    """Hold a file for this process alone until it is closed; False if another process holds it.

    The system lets go of it when the process ends, however it ends.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk: a new or renamed file is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
