"""Files that are complete under their name or not there at all, whatever happens while they are written."""

import contextlib
import hashlib
import os
from pathlib import Path

from so3krates_dist.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Write a text file: under a temporary name beside it, synced, then renamed; on a full disk nothing is left."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", opener=_open_no_link) as file:
            file.write(text)
        put_in_place(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _open_no_link(path: str, flags: int) -> int:
    """Open a file to be written, but not through a link that somebody has left in its place."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def put_in_place(temporary: Path, final: Path) -> None:
    """Sync a file that was written under a temporary name, and give it its own, readable like any other file.

    Libraries that make temporary files of their own (safetensors) let nobody else read them.
    """
    sync_file(temporary)
    temporary.chmod(0o666 & ~_read_mask())
    temporary.replace(final)


def _read_mask() -> int:
    """Return which rights new files do not have."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)  # elsewhere there is no other way to ask; for a moment, files of other threads have all rights
    os.umask(mask)
    return mask


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it; refuse before anything is computed for it.

    Raises:
        DataError: It is a file, lies below one, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        got = "" if os.access(folder, os.W_OK | os.X_OK) else "one that is read-only"
    except OSError as error:
        got = "a file" if folder.is_file() else str(error.strerror)
    if got:
        raise DataError(str(folder), "be a folder that can be written to", got, "Give another one with --out")


def sync_file(path: Path) -> None:
    """Have a file on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
