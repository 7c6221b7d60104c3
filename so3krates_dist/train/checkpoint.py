"""The run folder and its checkpoints: nothing that was written is ever lost, nothing half-written is ever read.

A checkpoint is a folder `checkpoints/step_XXXXXXXX` of safetensors files and a `manifest.json` with the sha256 of each. It is
written under a temporary name, synced, and renamed when complete; older ones go only after that. All of it is written by
rank 0 from whole tensors, so a checkpoint does not depend on ZeRO stage or number of processes, and there is no pickle.

Reading takes the newest checkpoint whose files are what the manifest says, and says so where that is not the newest of all.
Rank 0 decides and tells the others.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from so3krates_dist.config import RunConfig, dump_config, read_config, to_plain
from so3krates_dist.errors import CheckpointError
from so3krates_dist.files import hash_file, sync_file, sync_folder, write_text

FORMAT: Final = 1
"""Version of checkpoints; a reader refuses a higher one."""

CONFIG_NAME: Final = "config.yaml"
IDENTITY_NAME: Final = "run.json"
PLAN_NAME: Final = "plan.json"
MANIFEST_NAME: Final = "manifest.json"
_PREFIX: Final = "step_"

MAY_CHANGE: Final = frozenset(
    {
        "run.name", "run.folder", "run.threads", "data.num_workers", "data.verify", "data.max_validation", "data.max_atoms",
        "data.max_pairs", "data.find_limits", "data.oversized", "data.on_damage", "data.max_skipped", "data.rebase", "data.cache",
        "data.cache_gb", "data.connect_timeout", "data.stall_timeout", "data.retries",
        "train.micro_batches", "train.zero_stage", "train.checkpoint_attention", "train.device", "train.log_every",
        "train.validate_every", "train.save_every", "train.stop_at", "train.keep_checkpoints", "train.max_skipped_steps",
        "metrics.wandb", "metrics.project",
    }
)  # fmt: skip
"""Keys that a resumed run may set otherwise: they do not change what is learned (to rounding)"""

IN_PLAN: Final = frozenset(
    {
        "data.folder", "data.folders", "data.weights", "data.temperature", "data.batch_size", "data.lanes", "data.window_blocks",
        "data.shuffle_shards", "data.cost_per_atom", "data.cost_per_pair", "data.fit_cost",
    }
)  # fmt: skip
"""Keys that are compared through the plan that they make (train/planning.py), and may change with `data.rebase=true`"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    """optimizer steps done; also the position in the data"""
    best_score: float
    """of the best evaluation so far, lower is better: see `train.loop.compute_score`; infinity before the first"""
    scored_on: str = ""
    """fingerprints of the data sets whose held-out conformers were evaluated; empty: not known"""
    tensors: dict[str, torch.Tensor]
    """of `TrainingEngine.gather_state`, plus `mean.<name>` of the exponential mean"""


# ------------------------------------------------------------------------------------------------------------ run folder


class RunFolder:
    """A folder that belongs to one run, and to one set of processes at a time.

    Args:
        config: Of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = config.folder
        self._config = config
        self._lock: IO[str] | None = None

    def check(self, data_fingerprint: str = "") -> None:
        """Check that the folder is new, or belongs to this very run; read only, so any process may.

        Args:
            data_fingerprint: Of the data; empty: not compared. Where the folder has a plan, that is what is compared.

        Raises:
            CheckpointError: It holds something else, or a run with another configuration or other data.
        """
        if self.path.exists() and not self.path.is_dir():
            raise self._refuse("be a folder", "a file")
        if not self.path.exists() or all(p.name.startswith(".") or p.name == CONFIG_NAME for p in self.path.iterdir()):
            return
        identity = self.path / IDENTITY_NAME
        if not identity.is_file():
            raise self._refuse("be empty or hold a run", "other files")
        try:
            before = read_config(self.path / CONFIG_NAME)
            fingerprint = json.loads(identity.read_text(encoding="utf-8"))["data_fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refuse(f"hold a readable {IDENTITY_NAME}", type(error).__name__) from error
        if data_fingerprint not in ("", fingerprint) and not (self.path / PLAN_NAME).is_file():
            raise self._refuse(f"belong to this data set ({data_fingerprint})", f"a run on another one ({fingerprint})")
        for key, (old, new) in _compare_configs(before, self._config).items():
            raise self._refuse(f"belong to this run, where {key} is {new}", f"another run, with {old}")

    def _refuse(self, rule: str, got: str) -> CheckpointError:
        remedy = "Set run.folder to another folder, or start with the settings of the run that is there"
        return CheckpointError(f"run.folder {self.path}", rule, got, remedy)

    def acquire(self) -> None:
        """Make the folder where it is new, and hold it until this process ends; rank 0 alone.

        Raises:
            CheckpointError: Another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise self._refuse("be a folder that can be written to", str(error.strerror)) from error
        try:
            # Not flock: worker processes would inherit it, and outlive a killed run by seconds.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise self._refuse("be on a file system with locks", str(error.strerror)) from error
            raise CheckpointError(
                f"run.folder {self.path}", "be used by one run at a time", "another running process",
                "Wait for it to end, or set run.folder to another folder",
            ) from error  # fmt: skip

    def sign(self, data_fingerprint: str, package_version: str) -> None:
        """Write down whose folder this is, and the configuration as it is now; rank 0 alone, after `check`."""
        section = self._config.data
        folder, folders = find_absolute(section.folder), tuple(map(find_absolute, section.folders))
        data = dataclasses.replace(section, folder=folder, folders=folders)
        write_text(self.path / CONFIG_NAME, dump_config(dataclasses.replace(self._config, data=data)))
        if not (self.path / IDENTITY_NAME).is_file():
            identity = {"data_fingerprint": data_fingerprint, "package_version": package_version}
            write_text(self.path / IDENTITY_NAME, json.dumps(identity, indent=1) + "\n")

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.close()


def find_absolute(location: str) -> str:
    """Return where a data set is from any folder; addresses of servers, and nothing at all, stay what they are."""
    return location if not location or "://" in location else str(Path(location).absolute())


def _compare_configs(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return keys that differ and must not, the name of the model first: another model has other keys."""
    old, new = (
        {f"{section}.{key}": v for section, values in to_plain(c).items() for key, v in values.items()}
        for c in (before, now)
    )
    keys = sorted(dict.fromkeys([*old, *new]), key=lambda k: k != "model.name")  # else in their order
    compared = [k for k in keys if k not in MAY_CHANGE | IN_PLAN]
    return {k: (old.get(k), new.get(k)) for k in compared if old.get(k) != new.get(k)}


# ----------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, state: TrainingState, *, keep: int) -> Path:
    """Commit a checkpoint, then remove old ones.

    Args:
        folder: `checkpoints` of the run folder.
        state: What to store.
        keep: Checkpoints that stay, the new one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk is full or the folder is gone; older checkpoints are untouched.
    """
    final = folder / f"{_PREFIX}{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    for left_by_a_crash in folder.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(state.tensors, temporary / "state.safetensors")
        files = {p.name: {"size": p.stat().st_size, "sha256": hash_file(p)} for p in sorted(temporary.iterdir())}
        for name in files:
            sync_file(temporary / name)
        best = state.best_score if state.best_score < float("inf") else None
        content: dict[str, Any] = {"format": FORMAT, "step": state.step, "best_score": best, "files": files}
        content["scored_on"] = state.scored_on
        content["checksum"] = _compute_checksum(content)
        write_text(temporary / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
        sync_folder(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            str(final), "find room on a disk that can be written to", error,
            "Free some space and start the same command again; the older checkpoints are intact",
        ) from error  # fmt: skip
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # left by a run that was resumed from an earlier step: the same step, computed anew
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(folder)
    write_text(folder / "latest", final.name + "\n")
    # Later steps are damaged: the run has come back to an earlier one. They must not count among those that are kept.
    later = [p for p in list_checkpoints(folder) if p.name > final.name]
    for old in later + list_checkpoints(folder)[len(later) + keep :]:
        shutil.rmtree(old)
    return final


def _compute_checksum(content: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's content; no change of a digit in it goes unnoticed."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first; each was complete when it got its name."""
    return sorted((p for p in folder.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint whose files are what its manifest says.

    Args:
        folder: `checkpoints` of the run folder.

    Returns:
        The checkpoint, or None where there is none at all; and a line about each newer one that is damaged.

    Raises:
        CheckpointError: There are checkpoints, but none is whole, or one comes from a newer version.
    """
    complaints: list[str] = []
    for checkpoint in list_checkpoints(folder):
        finding = _verify(checkpoint)
        if finding is None:
            return checkpoint, complaints
        complaints.append(f"{checkpoint}: {finding}; taking an older checkpoint")
    if complaints:
        raise CheckpointError(
            str(folder), "hold a checkpoint that is whole", "; ".join(complaints), "Start anew in another run.folder"
        )
    return None, complaints


def _verify(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        content = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        if content["checksum"] != _compute_checksum(content):
            return f"{MANIFEST_NAME} has been altered"
        file_format, files = int(content["format"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_NAME} is missing or damaged ({type(error).__name__})"
    if file_format > FORMAT:
        raise CheckpointError(
            str(checkpoint), f"have format {FORMAT} or lower", file_format, "Install a newer so3krates-dist"
        )
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return f"{name} is missing or cut short"
        if hash_file(path) != facts["sha256"]:
            return f"{name} has been altered"
    return None


def load_checkpoint(checkpoint: Path) -> TrainingState:
    """Read a checkpoint that `find_checkpoint` has verified."""
    content = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
    best = content.get("best_score", content.get("best_forces_mae"))  # its name in the first checkpoints of format 1
    return TrainingState(
        step=int(content["step"]),
        best_score=float("inf") if best is None else float(best),
        scored_on=str(content.get("scored_on", "")),
        tensors=load_file(checkpoint / "state.safetensors"),
    )
