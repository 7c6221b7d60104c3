"""Hashes that are compared once per machine and file, not by every process that opens it.

A file that had its hash leaves a mark in the user's cache folder, under a name made of its path, length, time of change and hash;
processes that open it at the same time wait for the first one. Where there is no such folder, every process hashes for itself.
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from so3krates_dist.data.cache import find_cache_folder
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.files import hash_file

MAX_SHOWN: Final = 400
"""Characters of what was found that a message shows"""
_MARK: Final = b"verified\n"
MAX_MARKS: Final = 20_000
"""Marks that are kept; when there are more the older half goes"""


def refuse_damaged(where: str, rule: str, got: object) -> DataError:
    """Return the error for bytes that are not those that were written; what they hold is shown in part, on one line."""
    text = str(got)
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return DataError(where, rule, line, "Copy the file again, or make the data set anew")


def find_marks() -> Path | None:
    """Return the folder for marks; None where the user has no place for what can be made again."""
    try:
        return find_cache_folder() / "verified"
    except ConfigError:
        return None


def verify_once(path: Path, sha256: str, where: str) -> None:
    """Compare the sha256 of a file with what it must be, unless that was done on this machine since the file has changed.

    Args:
        path: File.
        sha256: Hexadecimal digits.
        where: Name of the file for messages.

    Raises:
        DataError: The file has other bytes.
    """
    with _hold_mark(path, sha256) as mark:
        if mark is not None and mark.read() == _MARK:
            return
        check_hash(path, sha256, where)
        if mark is not None:
            with contextlib.suppress(OSError):  # a full disk: the next process hashes again
                mark.write(_MARK)
                mark.flush()
                _clear_old_marks(Path(mark.name).parent)


def check_hash(path: Path, sha256: str, where: str) -> None:
    """Raise `DataError` where a file has not the sha256 that it must have."""
    if (found := hash_file(path)) != sha256:
        raise refuse_damaged(where, f"have the sha256 {sha256[:12]}...", f"{found[:12]}...")


@contextlib.contextmanager
def _hold_mark(path: Path, sha256: str) -> Iterator[IO[bytes] | None]:
    """Open the mark of a file and hold its lock; None where no mark can be kept."""
    status, folder = path.stat(), find_marks()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0{sha256}"
    with contextlib.ExitStack() as stack:
        mark: IO[bytes] | None = None
        if folder is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be written to, or a file system without locks
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / hashlib.sha256(identity.encode()).hexdigest()).open("a+b"))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                mark = file
        yield mark


def _clear_old_marks(folder: Path) -> None:
    """Keep the number of marks within bounds; whose mark goes is hashed again."""
    marks = list(folder.iterdir())
    if len(marks) > MAX_MARKS:
        for path in sorted(marks, key=lambda p: p.stat().st_mtime_ns)[: len(marks) // 2]:
            path.unlink(missing_ok=True)
