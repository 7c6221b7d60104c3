"""Where a data set lies while it is made: hidden folders beside the wanted one, each for one process at a time.

A data set appears under its name only when all of it is written. Locks end with their process, so that what a killed one left can
be told from what another one writes. Nothing that these tools did not put there is ever removed or overwritten.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from so3krates_dist import files
from so3krates_dist.errors import DataError

LOCK_NAME: Final = "so3krates.lock"
_CONTENT: Final = "content"
_RUNS: Final = "runs"


def check_output_folder(folder: Path) -> None:
    """Raise `DataError` where the output folder is there already; nothing is ever overwritten."""
    if folder.exists() or folder.is_symlink():
        raise DataError(str(folder), "not exist yet", "a folder", "Choose another --out, or remove it first")
    if not folder.parent.is_dir():
        raise DataError(str(folder.parent), "be a folder", "nothing there", "Make it first, or choose another --out")
    _check_workplace(_find_workplace(folder))


def _find_workplace(folder: Path) -> Path:
    """Return the hidden folder that a data set is written in before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def _check_workplace(path: Path) -> None:
    """Raise `DataError` where something is in the place of the hidden folder that this tool did not put there."""
    if not path.exists() and not path.is_symlink():
        return
    names = {p.name for p in path.iterdir()} if path.is_dir() and not path.is_symlink() else {"no folder"}
    if names and (LOCK_NAME not in names or names - {LOCK_NAME, _CONTENT, _RUNS}):
        rule = "be free for a data set while it is written"
        raise DataError(str(path), rule, ", ".join(sorted(names)[:3]), "Remove it, or choose another --out")


@contextlib.contextmanager
def make_workplace(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Make a hidden folder beside the wanted one; its content goes away again unless it is renamed.

    What a killed process left there is cleared.

    Args:
        folder: Of the data set; must not exist.

    Yields:
        An empty folder for the data set, and one for what is needed on the way.

    Raises:
        DataError: Another process is at it, or the place is taken.
    """
    path = _find_workplace(folder)
    _check_workplace(path)
    with hold(path, folder):
        places = (path / _CONTENT, path / _RUNS)
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        try:
            yield places
        finally:
            shutil.rmtree(path, ignore_errors=True)


def rename_into_place(temporary: Path, folder: Path) -> None:
    """Give a data set that is complete its name."""
    files.sync_folder(temporary)
    check_output_folder(folder)
    temporary.rename(folder)
    files.sync_folder(folder.parent)


@contextlib.contextmanager
def hold(place: Path, folder: Path, *, name: str = LOCK_NAME, shared: bool = False) -> Iterator[None]:
    """Make a folder if it is not there, and hold a lock in it.

    Args:
        place: Folder for the lock.
        folder: What is made, for messages.
        name: Of the lock.
        shared: Others may hold it too, if they share it.

    Raises:
        DataError: Another process holds it.
    """
    while True:
        place.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError), (place / name).open("a") as lock:  # removed by the one who had it
            _lock(lock.fileno(), folder, shared=shared)
            if _is_at(lock.fileno(), place / name):
                yield
                return


def _lock(descriptor: int, folder: Path, *, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        remedy = "Wait for it, or choose another --out"
        raise DataError(str(folder), "be written by one process at a time", "another one", remedy) from None
    except OSError:
        pass  # a file system without locks


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one under a name."""
    return path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino
