"""Files that are complete under their name or not there at all, whatever happens while they are written."""

import hashlib
import os
from pathlib import Path

from so3krates_dist.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Write a text file: under a temporary name beside it, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    put_in_place(temporary, path)


def put_in_place(temporary: Path, final: Path) -> None:
    """Sync a file that was written under a temporary name, and give it its own, readable like any other file.

    Libraries that make temporary files of their own (safetensors) let nobody else read them.
    """
    sync_file(temporary)
    mask = os.umask(0)  # there is no other way to ask for it
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(final)


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
