"""A conversion in the making: a hidden folder with one run for each chunk of the input, and the settings that they were made with.

Any number of processes on any number of machines may fill it, now or later; a chunk is there as a whole or not at all. When all of
them are there, they become the data set. Refuses chunks that were made with other settings or by another version.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from data_tools.console import say
from data_tools.dataset import Description
from data_tools.runs import FORMAT, Run
from data_tools.workplace import LOCK_NAME, hold
from so3krates_dist import __version__, files
from so3krates_dist.errors import DataError

SETTINGS_NAME: Final = "settings.json"
_MAX_NAMED: Final = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A share of the chunks: every `total`-th, from `number` - 1 on."""

    number: int
    """from 1"""
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `K/N`.

        Raises:
            DataError: It is none.
        """
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
            raise DataError("--part", "be K/N with K from 1 to N", repr(text), "Give one like 3/8")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that decides what the data set will be."""

    conversion: Mapping[str, Any]
    """what decides what a chunk becomes: sources, layout, keys, units, limits, seed; plain values"""
    description: Description
    """what is said of the data set when the chunks are put together"""
    num_chunks: int
    by_parts: bool
    """whether processes of their own made some of it, which nobody may throw away unasked"""

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that every chunk is marked with."""
        content = {"conversion": self.conversion, "chunks": self.num_chunks, "version": __version__, "format": FORMAT}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def dump(self) -> str:
        """Return the text of the settings file."""
        return json.dumps({"version": __version__} | dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a settings file.

        Raises:
            DataError: It is missing, damaged, or from another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("version")
            description = dict(content.pop("description"))
            isolated = description["isolated_atom_energies"]
            description["isolated_atom_energies"] = isolated and {int(z): e for z, e in isolated.items()}
            description["sources"] = tuple(description["sources"])
            settings = cls(description=Description(**description), **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise DataError(
                str(path), "be the settings of a conversion", got, "Convert first, with --part K/N"
            ) from error
        if version != __version__:
            remedy = "Install that version, or remove the folder and convert anew"
            raise DataError(str(path), f"be made by so3krates-dist {__version__}", version, remedy)
        return settings


def find_parts(out: Path) -> Path:
    """Return the hidden folder for the chunks of a data set that is not there yet."""
    return out.with_name(f".{out.name}.parts")


def check_no_leftovers(out: Path) -> None:
    """Raise `DataError` where a data set is there, and what it was made of too: a process was killed while it cleared that away."""
    if out.exists() and (parts := find_parts(out)).exists():
        remedy = "If the data set is complete (`so3krates validate`), remove the chunks; else choose another --out"
        raise DataError(str(out), "not exist yet", f"a folder, and chunks in {parts}", remedy)


def find_chunk(parts: Path, number: int) -> Path:
    """Return the file for one chunk."""
    return parts / f"chunk-{number:06d}.run"


@contextlib.contextmanager
def open_parts(out: Path, part: Part | None) -> Iterator[Path]:
    """Make the folder for chunks, or take the one that is there, and hold it; it goes away when it is not needed any more.

    Args:
        out: Data set to make.
        part: Several processes may work at the same time, each at its own part; None: one alone.

    Raises:
        DataError: Another process is at it, or something else is in its place.
    """
    parts = find_parts(out)
    _check_place(parts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(parts, out, shared=part is not None))
        if part is not None:
            stack.enter_context(hold(parts, out, name=f"part-{part.number}-of-{part.total}.lock"))
        try:
            yield parts
        finally:  # while the lock is held: later, another process may have begun
            if part is None and (out.exists() or not any(parts.glob("chunk-*.run"))):
                shutil.rmtree(parts, ignore_errors=True)


def _check_place(parts: Path) -> None:
    if not parts.exists() and not parts.is_symlink():
        return
    names = {p.name for p in parts.iterdir()} if parts.is_dir() and not parts.is_symlink() else {"no folder"}
    if names and LOCK_NAME not in names:
        rule = "be free for the parts of a data set"
        raise DataError(str(parts), rule, ", ".join(sorted(names)[:3]), "Remove it, or choose another --out")


def agree_on_settings(parts: Path, settings: Settings) -> Settings:
    """Write the settings beside the chunks, or compare them with those that are there.

    Chunks of another conversion are thrown away if one process alone made them and one process alone is asking.

    Returns:
        The settings to go on with.

    Raises:
        DataError: Parts were made with other settings.
    """
    path = parts / SETTINGS_NAME
    old = _load_old(path, settings)
    if old is not None and (difference := _find_difference(old, settings)):
        if settings.by_parts or (old.by_parts and old.fingerprint != settings.fingerprint):
            rule = "be made with the same settings by all parts"
            raise DataError(str(parts), rule, difference, "Give the same options, or remove it and start anew")
        if old.fingerprint != settings.fingerprint:
            say(f"starting anew, the chunks in {parts} were made with other settings: {difference}")
            for chunk in parts.glob("chunk-*.run"):
                chunk.unlink()
    if old is not None:
        settings = dataclasses.replace(settings, by_parts=settings.by_parts or old.by_parts)
    if old != settings:
        _write_once(path, settings.dump())
    return settings


def _load_old(path: Path, settings: Settings) -> Settings | None:
    """Return the settings that are there; unreadable ones count as none where one process alone is at it."""
    if not path.exists():
        return None
    try:
        return Settings.load(path)
    except DataError:
        if settings.by_parts:
            raise
        for chunk in path.parent.glob("chunk-*.run"):
            chunk.unlink()
        return None


def _find_difference(old: Settings, new: Settings) -> str:
    """Return the first setting that differs, as text; empty where none does."""
    for before, after in (
        (old.conversion, new.conversion),
        (dataclasses.asdict(old.description), dataclasses.asdict(new.description)),
        ({"num_chunks": old.num_chunks}, {"num_chunks": new.num_chunks}),
    ):
        for name in sorted(before.keys() | after.keys()):
            if (was := before.get(name)) != (now := after.get(name)):
                return f"{name} {_shorten(now)} where it was {_shorten(was)}"
    return ""


def _shorten(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_once(path: Path, text: str) -> None:
    """Write a file as a whole; parts may do it at the same time, with the same text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{hashlib.sha256(os.urandom(16)).hexdigest()[:8]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    files.put_in_place(temporary, path)


# ---------------------------------------------------------------------------------------------------------------- chunks


def open_chunk(parts: Path, number: int, fingerprint: str) -> Run | None:
    """Return a chunk that is whole and was made with the settings, None where there is none.

    Args:
        parts: Folder of the chunks.
        number: Of the chunk.
        fingerprint: Of the settings.
    """
    path = find_chunk(parts, number)
    if not path.exists():
        return None
    try:
        run = Run.open(path)
        run.verify()
    except DataError:  # it is made anew
        return None
    return run if (run.facts.fingerprint, run.facts.number) == (fingerprint, number) else None


def open_all(parts: Path, settings: Settings, *, verify: bool) -> list[Run]:
    """Return the runs of all chunks in their order.

    Args:
        parts: Folder of the chunks.
        settings: That they must have been made with.
        verify: Read all bytes and compare them with what was written.

    Raises:
        DataError: Some are missing, damaged, or made with other settings.
    """
    missing = [n for n in range(settings.num_chunks) if not find_chunk(parts, n).exists()]
    if missing:
        got = f"{settings.num_chunks - len(missing)} of them, without {_list(missing)}"
        remedy = f"Convert what is missing: {_name_parts(parts, missing)}"
        raise DataError(str(parts), f"hold all {settings.num_chunks} chunks", got, remedy)
    runs = [Run.open(find_chunk(parts, number)) for number in range(settings.num_chunks)]
    others = [n for n, r in enumerate(runs) if (r.facts.fingerprint, r.facts.number) != (settings.fingerprint, n)]
    if others:
        rule = f"hold chunks that were made with the settings in {SETTINGS_NAME}"
        remedy = f"Remove these files and convert their parts again: {_name_parts(parts, others)}"
        raise DataError(str(parts), rule, f"others: {_list(others)}", remedy)
    for run in runs if verify else ():
        run.verify()
    return runs


def _name_parts(parts: Path, chunks: Sequence[int]) -> str:
    """Return the options for the parts that some chunks belong to, if all parts that were begun are of one division."""
    totals = {int(path.stem.rpartition("-")[2]) for path in parts.glob("part-*-of-*.lock")}
    if len(totals) != 1:
        return "chunk C belongs to part C % N + 1 of N"
    total = totals.pop()
    named = sorted({number % total + 1 for number in chunks})
    return f"--part K/{total} with K = {_list(named)}"


def _list(numbers: Sequence[int]) -> str:
    named = ", ".join(str(n) for n in numbers[:_MAX_NAMED])
    return named if len(numbers) <= _MAX_NAMED else f"{named} and {len(numbers) - _MAX_NAMED} more"
