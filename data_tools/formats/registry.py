"""All layouts, and which of them a file has: told by its content, never guessed where two are possible."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from data_tools.formats.ase_db import ASE_DB
from data_tools.formats.ase_files import ASE
from data_tools.formats.aselmdb import ASELMDB
from data_tools.formats.base import Layout, ManyFiles, OpenFile, Request
from data_tools.formats.extxyz import EXTXYZ
from data_tools.formats.gems import GEMS
from data_tools.formats.hdf5_sets import ANI1X, QM7X, SPICE, TRANSITION1X
from data_tools.formats.npz import NPZ, RMD17, SGDML, has_structures
from data_tools.formats.probe import Container, Probe, npz_error, refuse_no_data
from so3krates_dist.errors import DataError

LAYOUTS: Final[dict[str, Layout]] = {
    layout.name: layout
    for layout in (EXTXYZ, ASE, ASE_DB, ASELMDB, NPZ, SGDML, RMD17, QM7X, ANI1X, SPICE, TRANSITION1X, GEMS)
}
"""By the name for `--layout`"""

_UNPACKERS: Final[dict[Container, Callable[[Path], Any]]] = {"xz": lzma.open, "gzip": gzip.open, "bzip2": bz2.open}
_CONTAINERS: Final[dict[Container, str]] = {"hdf5": "HDF5", "sqlite": "SQLite", "lmdb": "LMDB", "zip": "zip"}


def get_layout(name: str) -> Layout:
    """Return the layout of a name.

    Raises:
        DataError: There is none.
    """
    if name not in LAYOUTS:
        raise DataError(f"--layout {name}", f"be one of {', '.join(LAYOUTS)}", repr(name), "Correct it")
    return LAYOUTS[name]


def recognise(path: Path, name: str | None = None) -> Layout:
    """Return the layout that the content of a file has.

    Args:
        path: A file.
        name: How messages call it.

    Raises:
        DataError: It has none that is known, or more than one.
    """
    probe = Probe(path, name or path.name)
    matches = _find_matches(probe)
    if len(matches) > 1:
        names = " and ".join(layout.name for layout in matches)
        raise DataError(str(path), "have one layout", f"the marks of {names}", "Choose with --layout NAME")
    if matches:
        return matches[0]
    _refuse_packed(probe)
    if path.suffix == ".npz" and probe.container != "zip":
        raise npz_error(path, ValueError("it does not begin like one"))
    fallbacks = [layout for layout in LAYOUTS.values() if layout.is_fallback and layout.recognise(probe)]
    if not fallbacks:
        got = f"an {_CONTAINERS[probe.container]} file of unknown content"
        remedy = f"Choose with --layout NAME ({', '.join(LAYOUTS)}), or convert it to extxyz or npz"
        raise DataError(str(path), "have a layout that is known", got, remedy)
    return fallbacks[0]


def _find_matches(probe: Probe) -> list[Layout]:
    return [layout for layout in LAYOUTS.values() if not layout.is_fallback and layout.recognise(probe)]


def _refuse_packed(probe: Probe) -> None:
    """Raise where a compressed file hides a container that has to be unpacked; ASE reads compressed text itself."""
    unpacker = _UNPACKERS.get(probe.container)
    if unpacker is None:
        return
    try:
        with unpacker(probe.path) as file:
            probe.head = file.read(len(probe.head))
    except (OSError, EOFError, lzma.LZMAError):
        return
    packed = probe.container
    del probe.container
    if probe.container in _CONTAINERS:
        got = f"a {_CONTAINERS[probe.container]} file compressed with {packed}"
        raise DataError(
            str(probe.path), "be unpacked", got, "Unpack it first, for example with `xz -dk` or `gunzip -k`"
        )


def find_files(paths: Path | Sequence[Path], layout: str | None = None) -> list[tuple[Path, str]]:
    """Return the files to read, with the names that messages use: as they are given, folders by the names in them.

    Args:
        paths: Files and folders; a folder stands for all files in it that have a layout beyond "ASE may read it".
        layout: Only files of this layout are taken from folders.

    Raises:
        DataError: A path is missing, or a folder has no such files or files of several layouts.
    """
    found: list[tuple[Path, str]] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir():
            found += _list_folder(path, layout)
        elif path.is_file():
            found.append((path, path.name))
        else:
            raise DataError(str(path), "be a file", "nothing there", "Check the path")
    return found


def _list_folder(folder: Path, layout: str | None) -> list[tuple[Path, str]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    by_layout: dict[str, list[tuple[Path, str]]] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        probe = Probe(path, name)
        for match in _find_matches(probe) or _find_fallback(probe, layout):
            by_layout.setdefault(match.name, []).append((path, name))
    if layout is not None:
        by_layout = {layout: by_layout.get(layout, [])}
    if len(by_layout) > 1:
        counts = ", ".join(f"{len(found)} {name}" for name, found in sorted(by_layout.items()))
        raise DataError(str(folder), "have files of one layout", counts, "Choose with --layout NAME")
    chosen = next(iter(by_layout.values()), [])
    if not chosen:
        raise DataError(
            str(folder), "have files of a known layout", f"{len(files)} others", "Check the path, or name files"
        )
    return chosen


def _find_fallback(probe: Probe, layout: str | None) -> list[Layout]:
    """Return what takes a file of a folder that no layout recognises: npz with structures; what ASE may read only if asked for."""
    if layout == ASE.name and ASE.recognise(probe):
        return [ASE]
    return [NPZ] if has_structures(probe) else []


def open_layout(
    paths: Path | Sequence[Path],
    keys: Mapping[str, str] | None = None,
    group: str | None = None,
    *,
    layout: str | None = None,
    labels: bool = True,
) -> OpenFile:
    """Open one or several files of one layout.

    Args:
        paths: Files and folders; their records follow each other in this order, those of a folder in the order of the names.
        keys: The file's key for labels that go by another name.
        group: Name that results of all structures are grouped by; None takes the file's, or the formula.
        layout: Name in `LAYOUTS`; None recognises it.
        labels: Read energies and the like; else only what names a structure, its charge and its spin.

    Raises:
        DataError: A file is missing or damaged, has no layout that is known, or several; a key is missing or ambiguous.
    """
    chosen = None if layout is None else get_layout(layout)
    request = Request(dict(keys or {}), group, labels)
    opened: list[OpenFile] = []
    for path, name in find_files(paths, layout):
        refuse_no_data(Probe(path, name))
        found = chosen or recognise(path, name)
        if opened and found is not opened[0].layout:
            rule = f"have the layout of {opened[0].name} ({opened[0].layout.name})"
            raise DataError(name, rule, found.name, "Convert the files one by one, or choose with --layout NAME")
        opened.append(found.open(path, name, found, request))
        opened[-1].close()  # reading opens it again; a folder may have more files than a process may open
    return opened[0] if len(opened) == 1 else ManyFiles(opened)
