"""Writing checkpoints: every process a part, all of them one commit; training goes on meanwhile.

A save begins at the same step on all processes. Each copies the tensors that it owns and writes them with a thread of its own;
these threads touch files only, all communication stays in the main thread. With the sum that a step makes anyway, the processes
find out that all parts are there. Then rank 0, and nobody else, makes a checkpoint of them: it looks whether each part has the
size that its writer reported, writes the manifest with the hashes that the writers computed, syncs, renames the folder, and
removes older ones. Killed at any point, a run has the checkpoint before or the new one. What fails on one process fails on all.

Reading is in `checkpoint.py`.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig, dump_config
from so3krates_dist.distributed import Rank, broadcast_text
from so3krates_dist.errors import CheckpointError, So3kratesError
from so3krates_dist.files import hash_file, put_in_place, sync_folder, write_text
from so3krates_dist.train.checkpoint import (
    FORMAT,
    MANIFEST_NAME,
    PREFIX,
    compute_checksum,
    encode_numbers,
    list_checkpoints,
    name_checkpoint,
    name_part,
)

VISIBLE_SECONDS: Final = 30.0
"""So long may a file that another machine has written stay unseen: network file systems remember for a while what was not there"""

_OTHER_ERROR: Final = -1
"""In the place of an errno, for what has none"""


def collect_facts(config: RunConfig, rank: Rank) -> dict[str, Any]:
    """Return what a manifest says of its run: processes, ZeRO stage, versions, and the whole configuration.

    Args:
        config: Of the run.
        rank: This process.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "safetensors")}
    return {
        "world_size": rank.world_size,
        "zero_stage": config.train.zero_stage,
        "versions": {"so3krates_dist": __version__, **versions, "python": platform.python_version()},
        "config": dump_config(config),
    }


def _find_code(error: OSError | SafetensorError) -> int:
    """Return the errno of a failure; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno or _OTHER_ERROR
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else _OTHER_ERROR


class _Part:
    """The file of this process, written by a thread.

    Args:
        path: Of the file.
        tensors: To write; they belong to this object.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._path, self._tensors = path, tensors
        self._size, self._digest, self._error = 0, bytes(32), 0
        self.seconds = 0.0
        # No daemon: safetensors is compiled code, in which the end of the interpreter aborts the process with a code of its own.
        self._thread = threading.Thread(target=self._write, name=path.name)

    def write(self, *, asynchronous: bool) -> None:
        """Write now, or begin to."""
        self._thread.start()
        if not asynchronous:
            self._thread.join()

    def _write(self) -> None:
        start = time.perf_counter()
        try:
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            save_file(self._tensors, temporary)
            put_in_place(temporary, self._path)
            self._size, self._digest = self._path.stat().st_size, bytes.fromhex(hash_file(self._path))
        except (OSError, SafetensorError) as error:
            self._error = _find_code(error)
        except BaseException:  # whatever it is, the other processes must hear of it
            self._error = _OTHER_ERROR
            raise
        finally:
            self._tensors.clear()
            self.seconds = time.perf_counter() - start

    def wait(self) -> None:
        """Wait until it is written or has failed."""
        self._thread.join()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return self.is_done and self._error != 0

    def report(self) -> list[int]:
        """Return errno (0: none), size and sha256 as six integers."""
        return [self._error, self._size, *struct.unpack(">4q", self._digest)]


@dataclasses.dataclass(kw_only=True)
class _Save:
    """A save that has begun and is not committed."""

    step: int
    final: Path
    temporary: Path
    progress: Any
    part: _Part
    export: Callable[[], None] | None
    stall: float = 0.0
    was_asked: bool = False
    """whether `flags` has told of it: sums from before say nothing about this save"""


class _Export:
    """What rank 0 does after a commit, while training goes on.

    Args:
        save: That was committed.
    """

    def __init__(self, save: _Save) -> None:
        self._save = save
        self._error: So3kratesError | None = None
        self._thread = threading.Thread(target=self._run, name=f"export after {save.final.name}")
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._save.export is not None:
                self._save.export()
        except So3kratesError as error:
            self._error = error
        except (OSError, SafetensorError) as error:
            place = self._save.final.parent.parent
            self._error = _say(place, f"{error} after {self._save.final.name} was committed")

    def finish(self) -> So3kratesError | None:
        """Wait until it is done; return what went wrong."""
        self._thread.join()
        return self._error


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Write something below a folder that is there.

    Raises:
        CheckpointError: The disk is full or read-only, or the folder has gone; it must not come back half empty.
    """
    try:
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    except (OSError, SafetensorError) as error:
        raise _say(folder, str(error)) from error


class CheckpointWriter:
    """Saves the state of a run. All processes make one and call it at the same steps.

    Args:
        folder: `checkpoints` of the run folder, which exists.
        rank: This process.
        device: Of this process.
        keep: Checkpoints that stay, the newest included.
        asynchronous: Go on while files are written; False: `begin` returns when the checkpoint is committed.
        facts: What else the manifest shall say (`collect_facts`), for people and later versions.
    """

    def __init__(
        self, folder: Path, rank: Rank, device: torch.device, *, keep: int, asynchronous: bool, facts: Mapping[str, Any]
    ) -> None:
        self._folder, self._rank, self._device = folder, rank, device
        self._keep, self._asynchronous, self._facts = keep, asynchronous, json.loads(json.dumps(facts))
        self._pending: _Save | None = None
        self._exporting: _Export | None = None
        self._is_exporting = False
        """on any process: rank 0 may still have to tell of its export"""
        self._lines: list[str] = []

    def owns(self, sizes: Mapping[str, int]) -> frozenset[str]:
        """Return the tensors that this process writes: each belongs to one process, and all have about as many bytes.

        Args:
            sizes: Bytes of all tensors by name, the same on all processes.
        """
        loads = [0] * self._rank.world_size
        owners: dict[str, int] = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += sizes[name]
        return frozenset(name for name, owner in owners.items() if owner == self._rank.rank)

    def begin(
        self,
        step: int,
        progress: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        export: Callable[[], None] | None,
    ) -> float:
        """Save; all processes call it at the same step. An earlier save that is still being written is waited for.

        Args:
            step: Optimizer steps done.
            progress: All that a run needs besides tensors to go on: numbers, texts, lists, mappings. Rank 0's is stored.
            tensors: Those that this process owns (`owns`). They are copied, and may change when this returns.
            export: What rank 0 does after the commit, in a thread of its own: with data that no longer change, since training goes
                on.

        Returns:
            Seconds that training stood still for.

        Raises:
            CheckpointError: This or the earlier save could not be written, on any process; older checkpoints are untouched.
        """
        start = time.perf_counter()
        content = json.loads(json.dumps(encode_numbers(progress), allow_nan=False))
        if self._pending is not None:
            before = self._pending.step
            self._commit(self._pending)
            waited = time.perf_counter() - start
            self._lines.append(f"training waited {waited:.2f} s for the checkpoint of step {before}")
        self._finish_export()
        final = self._folder / name_checkpoint(step)
        temporary = self._folder / f".{final.name}.tmp"
        self._agree(self._prepare(final, temporary) if self._rank.is_main else None)
        own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
        part = _Part(temporary / name_part(self._rank.rank, self._rank.world_size), own)
        save = _Save(step=step, final=final, temporary=temporary, progress=content, part=part, export=export)
        self._pending = save
        part.write(asynchronous=self._asynchronous)
        save.stall = time.perf_counter() - start
        if not self._asynchronous:
            self._commit(save)
        return time.perf_counter() - start

    def flags(self) -> tuple[float, float]:
        """Return whether this process's part is written or has failed, and whether it has failed; zeros where nothing was begun."""
        if self._pending is None:
            return 0.0, 0.0
        self._pending.was_asked = True
        part = self._pending.part
        return float(part.is_done), float(part.has_failed)

    def settle(self, written: float, failed: float) -> str | None:
        """Commit when all parts are there; all processes call it in each step, with the sums of `flags` over all of them.

        Returns:
            A line for the log, or None.

        Raises:
            CheckpointError: A part could not be written, or rank 0 could not commit; the same on all processes.
        """
        save = self._pending
        if save is not None and save.was_asked and (written >= self._rank.world_size or failed):
            self._commit(save)
        return self._take_lines()

    def write_now(self, write: Callable[[], None]) -> None:
        """Have rank 0 write something in the run folder, while the others wait; all processes call it.

        Raises:
            CheckpointError: It could not; the same on all processes.
        """
        error: So3kratesError | None = None
        if self._rank.is_main:
            try:
                with writing_in(self._folder.parent):
                    write()
            except CheckpointError as caught:
                error = caught
        self._agree(error)

    def finish(self) -> str | None:
        """Wait until the save is committed that has begun, if there is one; all processes call it.

        Returns:
            A line for the log, or None.

        Raises:
            CheckpointError: As in `settle`.
        """
        if self._pending is not None:
            self._commit(self._pending)
        self._finish_export()
        return self._take_lines()

    def _finish_export(self) -> None:
        """Wait for what follows a commit, if there was one; all processes come here."""
        if self._is_exporting:
            self._is_exporting = False
            self._agree(self._exporting.finish() if self._exporting else None)

    def _take_lines(self) -> str | None:
        lines, self._lines = self._lines, []
        return "; ".join(lines) or None

    def _agree(self, error: So3kratesError | None) -> None:
        """Raise rank 0's error on all processes; until it has spoken they wait."""
        own = json.dumps([error.where, error.rule, str(error.got), error.remedy]) if error else ""
        said = broadcast_text(own, self._device)
        if said:
            raise CheckpointError(*json.loads(said)) from error

    def _prepare(self, final: Path, temporary: Path) -> So3kratesError | None:
        """Make the folder of the parts, and clear away what a crash has left; rank 0 alone."""
        try:
            # Not those above it: a run folder that has vanished must not come back half empty.
            self._folder.mkdir(exist_ok=True)
            for left in self._folder.glob(f".{PREFIX}*.tmp"):
                _remove(left)
            temporary.mkdir()
        except OSError as error:
            return _say(final, str(error))
        return None

    def _commit(self, save: _Save) -> None:
        """Make a checkpoint of the parts when all of them are written; all processes come here."""
        start = time.perf_counter()
        save.part.wait()
        reports = self._gather(save.part.report())  # nobody writes any more when this returns
        self._pending = None
        error: So3kratesError | None = None
        if self._rank.is_main:
            try:
                _check_reports(save, reports)
                self._put_in_place(save, reports)
            except CheckpointError as caught:
                error = caught
                with contextlib.suppress(OSError):  # what is left goes with the next save
                    _remove(save.temporary)
            else:
                self._exporting = _Export(save)
        self._agree(error)
        self._is_exporting = True
        if not self._asynchronous:
            self._finish_export()
        stall = save.stall + time.perf_counter() - start
        megabytes = sum(size for _, size, *_ in reports) / 1e6
        self._lines.append(
            f"Checkpoint of step {save.step}: {megabytes:.1f} MB written in {save.part.seconds:.2f} s, training stood still for"
            f" {stall:.3f} s"
        )

    def _gather(self, own: list[int]) -> list[list[int]]:
        """Return the integers of all processes, by rank, on all of them."""
        table = torch.zeros(self._rank.world_size, len(own), dtype=torch.int64, device=self._device)
        table[self._rank.rank] = torch.tensor(own)
        if self._rank.world_size > 1:
            dist.all_reduce(table)
        return table.tolist()

    def _put_in_place(self, save: _Save, reports: list[list[int]]) -> None:
        """Make a checkpoint of the parts, and remove old ones; rank 0 alone.

        Raises:
            CheckpointError: A part is not what its writer said, or the disk is full or gone.
        """
        final, files = save.final, {}
        for rank, (_, size, *digest) in enumerate(reports):
            name = name_part(rank, len(reports))
            _wait_for_file(save.temporary / name, size, rank)
            files[name] = {"size": size, "sha256": struct.pack(">4q", *digest).hex()}
        content = {
            "format": FORMAT, "step": save.step, "progress": save.progress, "facts": self._facts, "files": files
        }  # fmt: skip
        content["checksum"] = compute_checksum(content)
        try:
            write_text(save.temporary / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
            sync_folder(save.temporary)
            if final.exists():  # left by a run that has come back to an earlier step: the same step, computed anew
                _remove(final)
            save.temporary.rename(final)
            sync_folder(self._folder)
            write_text(self._folder / "latest", final.name + "\n")
            # Later steps are damaged or given up: the run has come back to an earlier one. They must not count among those kept.
            later = [p for p in list_checkpoints(self._folder) if int(p.name.removeprefix(PREFIX)) > save.step]
            old = later + list_checkpoints(self._folder)[len(later) + self._keep :]
        except OSError as error:
            raise _say(final, str(error)) from error
        for path in old:
            try:
                _remove(path)
            except OSError as error:  # somebody protects it, or copies it: the new one is whole nevertheless
                self._lines.append(f"{path} cannot be removed ({error.strerror or error})")


def _check_reports(save: _Save, reports: list[list[int]]) -> None:
    """Refuse to make a checkpoint where a part is missing.

    Raises:
        CheckpointError: Names the first process that could not write its part.
    """
    for rank, (code, *_) in enumerate(reports):
        if code:
            reason = os.strerror(code) if code > 0 else "an error; its own output says more"
            raise _say(save.final, f"in the part of rank {rank}: {reason}")


def _wait_for_file(path: Path, size: int, rank: int) -> None:
    """Wait until a file is visible here as its writer left it.

    Raises:
        CheckpointError: It is not.
    """
    end = time.monotonic() + VISIBLE_SECONDS
    found = "no such file"
    while True:
        try:
            with path.open("rb") as file:  # which asks the server; a look at the folder may tell what was there before
                seen = os.fstat(file.fileno()).st_size
            if seen == size:
                return
            found = f"{seen} bytes"
        except OSError as error:
            found = str(error.strerror)
        if time.monotonic() > end:
            raise CheckpointError(
                str(path), f"have the {size} bytes that rank {rank} wrote", f"{found} after {VISIBLE_SECONDS:.0f} s",
                "Set run.folder to a file system that all machines of the run share",
            )  # fmt: skip
        time.sleep(0.05)


def _say(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        str(path), "find room on a disk that can be written to", reason,
        "Free some space and start the same command again; the older checkpoints are intact",
    )  # fmt: skip


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a link without what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
