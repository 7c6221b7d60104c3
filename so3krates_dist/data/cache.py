"""Copies of remote files on a disk of this machine: bounded in bytes, made once for all processes, never seen half written.

A copy lies in a folder that is named by the sha256 of its content, so a changed file is another copy and equal files of two data
sets share one. It is written under a temporary name by the process that holds the file's lock, synced and renamed. Copies that
were not used for longest go first; whoever has one open keeps reading it. Nothing is deleted but what this file has written.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.files import sync_folder

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PART: Final = ".part"
_WAIT_FOR_ROOM_S: Final = 0.05


def find_cache_folder() -> Path:
    """Return the folder for copies and marks where none is named: $SO3KRATES_CACHE_DIR, or below $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ConfigError: The user has no home.
    """
    if named := os.environ.get("SO3KRATES_CACHE_DIR"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "so3krates-dist"
    except RuntimeError as error:
        raise ConfigError("data.cache", "name a folder", "none, and no home folder", "Set data.cache") from error


class Cache:
    """Copies of remote files.

    Args:
        folder: Where to keep them, in a folder `shards` of its own.
        max_bytes: What all copies together may hold.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder / "shards"
        self.max_bytes = max_bytes

    def fetch(self, name: str, size: int, sha256: str, receive: Callable[[BinaryIO], None]) -> Path:
        """Return the copy of a file, which is made first where it is not there yet.

        Args:
            name: Name of the file, without folders.
            size: Its length in bytes.
            sha256: Hexadecimal digits of its content, which also say whether it is there.
            receive: Writes exactly that content, or raises.

        Raises:
            ConfigError: The file is larger than the cache.
            DataError: The folder cannot be used.
        """
        if not _SHA256.fullmatch(sha256):
            raise DataError(name, "have a sha256 of 64 hexadecimal digits", repr(sha256), "Make the data set anew")
        path = self.folder / sha256 / name
        try:
            self._check_folder()
            if not _use(path, size):
                self._check(name, size)
                with self._lock(sha256[:2]):  # whoever waited for it finds the copy there
                    if not _use(path, size):
                        self._add(path, size, receive)
        except OSError as error:
            remedy = "Set data.cache to a folder on a disk of this machine that has room"
            raise DataError(
                str(self.folder), "take copies of remote shards", error.strerror or error, remedy
            ) from error
        return path

    def _check(self, name: str, size: int) -> None:
        if size > self.max_bytes:
            rule = f"hold the largest file of the data set ({name}, {size / 1e9:.3g} GB)"
            raise ConfigError("data.cache_gb", rule, f"{self.max_bytes / 1e9:.3g}", "Raise it")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "locks").mkdir(exist_ok=True)

    def _check_folder(self) -> None:
        """Refuse a folder that anybody may have put files into: lengths are all that is compared of copies that are there."""
        with contextlib.suppress(FileNotFoundError):
            if not self.folder.stat().st_mode & 0o002:
                return
            raise DataError(
                str(self.folder), "be a folder that not everyone can write to", "one that everyone can",
                "Set data.cache to another one",
            )  # fmt: skip

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold a lock among all processes and threads of the machine; the system releases those of dead processes.

        Locks of files have the first two digits of the hash as their name: 256 of them, which are never deleted.
        """
        with (self.folder / "locks" / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _add(self, path: Path, size: int, receive: Callable[[BinaryIO], None]) -> None:
        part = path.with_name(path.name + _PART)
        try:
            with self._reserve(part, size) as file:
                receive(file)
                file.flush()
                os.fsync(file.fileno())
            with self._lock("room"):  # nobody counts while it changes its name
                part.replace(path)
            sync_folder(path.parent)
            _use(path, size)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> BinaryIO:
        """Open a temporary file of the full length, which counts as used from now on, once there is room for it."""
        while True:
            with self._lock("room"):
                if self._make_room(size, part.parent.name[:2]):
                    part.parent.mkdir(exist_ok=True)
                    file = part.open("w+b")
                    file.truncate(size)
                    return file
            time.sleep(_WAIT_FOR_ROOM_S)  # all that could go is being written by others, and can go when it is there

    def _make_room(self, size: int, own_lock: str) -> bool:
        """Delete leavings of dead processes, then what was not used for longest; return whether there is room."""
        copies: list[tuple[int, int, Path]] = []
        excess = size - self.max_bytes
        for path in self._list():
            if path.suffix == _PART and self._remove_dead(path, own_lock):
                continue
            with contextlib.suppress(FileNotFoundError):  # whoever wrote it has given up
                status = path.stat()
                excess += status.st_size
                copies += [(status.st_atime_ns, status.st_size, path)] if path.suffix != _PART else []
        for _, bytes_freed, path in sorted(copies):
            if excess <= 0:
                break
            _remove(path)
            excess -= bytes_freed
        return excess <= 0

    def _list(self) -> list[Path]:
        return [p for f in self.folder.iterdir() if _SHA256.fullmatch(f.name) for p in f.iterdir()]

    def _remove_dead(self, part: Path, own_lock: str) -> bool:
        """Delete a temporary file that nobody writes any more: whoever writes one holds its lock."""
        name = part.parent.name[:2]
        with (self.folder / "locks" / name).open("ab") as file:
            if name != own_lock:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            _remove(part)
        return True


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another file of the same content has another name
        path.parent.rmdir()


def _use(path: Path, size: int) -> bool:
    """Note that a copy is used now; return whether it is there with its full length."""
    try:
        status = path.stat()
        if status.st_size == size:
            with contextlib.suppress(PermissionError):  # a cache that somebody else has filled
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
            return True
    except FileNotFoundError:
        pass
    return False
