"""The run folder and its checkpoints: nothing that was written is ever lost, nothing half-written is ever read.

A checkpoint is a folder `checkpoints/step_XXXXXXXX` of safetensors files and a `manifest.json` with the sha256 of each. How it is
written is in `saving.py`. Each file holds whole tensors, so a checkpoint does not depend on the ZeRO stage, and can be read by any
number of processes; there is no pickle. In format 1 there was one file, written by rank 0.

Reading takes the newest checkpoint whose files are what the manifest says, and says so where that is not the newest of all.
Rank 0 decides and tells the others. A folder of checkpoints may have been altered: only regular files of the names that this
package gives are opened, whatever the manifest says, and nothing in them is ever executed.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import SafetensorError, safe_open

from so3krates_dist.config import RunConfig, dump_config, read_config, to_plain
from so3krates_dist.distributed import read_job
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.files import hash_file, write_text

FORMAT: Final = 2
"""Version of checkpoints; a reader knows all lower ones and refuses a higher one"""

HASHING_THREADS: Final = 4
"""Files that are verified at the same time"""

CONFIG_NAME: Final = "config.yaml"
IDENTITY_NAME: Final = "run.json"
OWNER_NAME: Final = ".lock-owner.json"
_OWNER_SECONDS: Final = 0.5
_ANOTHER_FOLDER: Final = "Set run.folder to another folder, or start with the settings of the run that is there"
_SHOWN: Final = 5
PLAN_NAME: Final = "plan.json"
RATES_NAME: Final = "lr_find"
"""Folder that a test of learning rates leaves, maybe before there is a run"""
MANIFEST_NAME: Final = "manifest.json"
PREFIX: Final = "step_"
_NAME: Final = re.compile(PREFIX + "[0-9]{8,18}")
_MAX_MANIFEST_BYTES: Final = 2**26

MAY_CHANGE: Final = frozenset(
    {
        "run.name", "run.folder", "run.threads", "data.num_workers", "data.verify", "data.max_validation", "data.max_atoms",
        "data.max_pairs", "data.find_limits", "data.oversized", "data.on_damage", "data.max_skipped", "data.rebase", "data.cache",
        "data.cache_gb", "data.connect_timeout", "data.stall_timeout", "data.retries",
        "train.micro_batches", "train.zero_stage", "train.offload_optimizer", "train.activation_checkpointing", "train.device",
        "train.precision", "train.proof", "train.self_check", "train.log_every", "train.validate_every", "train.save_every",
        "train.async_save", "train.stop_at", "train.keep_checkpoints", "train.max_skipped_steps", "train.spike_factor",
        "train.spike_window", "train.max_rollbacks", "train.keep_skipped",
        "metrics.wandb", "metrics.project",
    }
)  # fmt: skip
"""Keys that a resumed run may set otherwise: they do not change what is learned (to rounding)"""

IN_PLAN: Final = frozenset(
    {
        "data.folder", "data.folders", "data.weights", "data.loss_weights", "data.temperature", "data.batch_size", "data.lanes",
        "data.window_blocks", "data.shuffle_shards", "data.cost_per_atom", "data.cost_per_pair", "data.fit_cost",
    }
)  # fmt: skip
"""Keys that are compared through the plan that they make (train/planning.py), and may change with `data.rebase=true`"""


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
        self.changes: tuple[str, ...] = ()
        """lines about what the run has computed with so far and does otherwise from here on; `check` finds them"""

    def check(self, data_fingerprint: str = "") -> None:
        """Check that the folder is new, or belongs to this very run; read only, so any process may.

        Args:
            data_fingerprint: Of the data; empty: not compared. Where the folder has a plan, that is what is compared.

        Raises:
            CheckpointError: It holds something else, or a run on other data.
            ConfigError: It holds a run with other settings; all that differ are named.
        """
        if self.path.exists() and not self.path.is_dir():
            raise self._refuse("be a folder", "a file")
        if not self.path.exists() or all(
            p.name.startswith(".") or p.name in (CONFIG_NAME, RATES_NAME) for p in self.path.iterdir()
        ):
            return
        identity = self.path / IDENTITY_NAME
        if not identity.is_file():
            raise self._refuse("be empty or hold a run", "other files")
        try:
            before = read_config(self.path / CONFIG_NAME)
            fingerprint = json.loads(identity.read_text(encoding="utf-8"))["data_fingerprint"]
        except ConfigError as error:  # of a newer version, or altered by hand
            raise self._refuse(
                f"hold a {CONFIG_NAME} that this version reads", f"one that is refused ({error})"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refuse(f"hold a readable {IDENTITY_NAME}", type(error).__name__) from error
        if data_fingerprint not in ("", fingerprint) and not (self.path / PLAN_NAME).is_file():
            raise self._refuse(f"belong to this data set ({data_fingerprint})", f"a run on another one ({fingerprint})")
        precisions = before.train.precision, self._config.train.precision
        if precisions[0] != precisions[1]:
            self.changes = ("note: train.precision was {} so far and is {} from here on".format(*precisions),)
        differences = _compare_configs(before, self._config)
        if differences:
            got = f"another run, in which {_describe(differences)}"
            raise ConfigError(f"run.folder {self.path}", "belong to this run", got, _ANOTHER_FOLDER)

    def _refuse(self, rule: str, got: str) -> CheckpointError:
        return CheckpointError(f"run.folder {self.path}", rule, got, _ANOTHER_FOLDER)

    def acquire(self) -> None:
        """Make the folder where it is new, and hold it until this process ends; rank 0 alone.

        The lock belongs to the process: however that ends, no stale one is left. On a network file system its server keeps it, and
        frees the locks of a machine that has died when it notices. A file beside the lock says who holds it, for the others.

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
                f"run.folder {self.path}", "be used by one run at a time", f"another running process{self._find_owner()}",
                "Wait for it to end, or set run.folder to another folder",
            ) from error  # fmt: skip
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": read_job()}
        try:
            write_text(self.path / OWNER_NAME, json.dumps(owner | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        except OSError as error:
            self.close()
            raise self._refuse("be a folder that can be written to", str(error.strerror)) from error

    def _find_owner(self) -> str:
        """Return who holds the folder; empty where its file does not say."""
        time.sleep(_OWNER_SECONDS)  # it may have got the lock this very moment, and the file be of the one before
        try:
            text = (self.path / OWNER_NAME).read_text(encoding="utf-8")[:1000]
            owner = {key: str(value) for key, value in json.loads(text).items()}
            job = f", SLURM job {owner['job']}" if owner["job"] else ""
            said = f": {owner['pid']} on {owner['host']}{job}, since {owner['since']}"
        except (OSError, ValueError, LookupError, AttributeError):
            return ""
        return said if said.isprintable() else ""

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
            self._lock = None


def find_absolute(location: str) -> str:
    """Return where a data set is from any folder; addresses of servers, and nothing at all, stay what they are."""
    return location if not location or "://" in location else str(Path(location).absolute())


def _compare_configs(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return keys that differ and must not, with their values then and now.

    Keys of which the version did not know that wrote the configuration have their defaults in it.
    """
    old, new = (
        {f"{section}.{key}": v for section, values in to_plain(c).items() for key, v in values.items()}
        for c in (before, now)
    )
    keys = sorted(dict.fromkeys([*old, *new]), key=lambda k: k != "model.name")  # else in their order
    if old["model.name"] != new["model.name"]:  # another model has other keys
        keys = [k for k in keys if k == "model.name" or not k.startswith("model.")]
    compared = [k for k in keys if k not in MAY_CHANGE | IN_PLAN]
    return {k: (old[k], new[k]) for k in compared if old[k] != new[k]}


def _describe(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return all keys that differ in one line, the first ones with their values."""
    keys = list(differences)
    first = [f"{key}={differences[key][0]} (here {differences[key][1]})" for key in keys[:_SHOWN]]
    rest = f"; also {', '.join(keys[_SHOWN:])}" if keys[_SHOWN:] else ""
    return f"{len(keys)} setting{'s differ' if len(keys) > 1 else ' differs'}: {', '.join(first)}{rest}"


# ----------------------------------------------------------------------------------------------------------- checkpoints


def name_checkpoint(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"{PREFIX}{step:08d}"


def name_part(rank: int, world_size: int) -> str:
    """Return the name of the file that a process writes."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def compute_checksum(content: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest's content; no change of a digit in it goes unnoticed."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def encode_numbers(value: Any) -> Any:
    """Return a value with numbers that JSON does not have as `{"float": "inf"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: encode_numbers(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode_numbers(v) for v in value]
    return value


def _decode_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return float(value["float"])
        return {key: _decode_numbers(v) for key, v in value.items()}
    return [_decode_numbers(v) for v in value] if isinstance(value, list) else value


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first; each was complete when it got its name."""
    found = [p for p in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


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
    """Return what is wrong with a checkpoint, or None. Nothing outside of it is opened, whatever its manifest says."""
    if checkpoint.is_symlink():
        return "it is a link"
    try:
        content = _read_manifest(checkpoint)
        if content["checksum"] != compute_checksum(content):
            return f"{MANIFEST_NAME} has been altered"
        file_format, step, files = int(content["format"]), int(content["step"]), dict(content["files"])
        facts = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST_NAME} is missing or damaged ({type(error).__name__})"
    if file_format > FORMAT:
        raise CheckpointError(
            str(checkpoint), f"have format {FORMAT} or lower", file_format, "Install a newer so3krates-dist"
        )
    if name_checkpoint(step) != checkpoint.name:
        return f"{MANIFEST_NAME} is of step {step}"
    expected = ["state.safetensors"] if file_format == 1 else [name_part(r, len(files)) for r in range(len(files))]
    if not files or sorted(files) != expected:
        return f"{MANIFEST_NAME} names other files than a checkpoint has"
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        findings = pool.map(lambda name: _verify_file(checkpoint / name, *facts[name]), expected)
        return next((finding for finding in findings if finding), None) or _verify_tensors(checkpoint, expected)


def _verify_file(path: Path, size: int, sha256: str) -> str | None:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return f"{path.name} is missing or cut short"
    try:
        return None if hash_file(path) == sha256 else f"{path.name} has been altered"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _verify_tensors(checkpoint: Path, names: Sequence[str]) -> str | None:
    try:
        StoredTensors([checkpoint / name for name in names])
    except CheckpointError as error:
        return f"{Path(error.where).name} is {error.got}"
    return None


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises:
        OSError: It is not there.
        ValueError: It is no JSON, no regular file, or too large to be a manifest.
    """
    path = checkpoint / MANIFEST_NAME
    if path.is_symlink() or not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > _MAX_MANIFEST_BYTES:
        raise ValueError(MANIFEST_NAME)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, read from the disk when they are asked for.

    Args:
        paths: safetensors files; how many there are does not matter.

    Raises:
        CheckpointError: A file is no such file, or two of them have a tensor of the same name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    str(path), "be a file of tensors", f"no safetensors file ({type(error).__name__})",
                    "Remove the checkpoint that it belongs to",
                ) from error  # fmt: skip
            twice = self._files.keys() & set(names)
            if twice:
                raise CheckpointError(
                    str(path), "have tensors of its own", f"a second source of `{min(twice)}`",
                    "Remove the checkpoint that it belongs to",
                )  # fmt: skip
            self._files |= dict.fromkeys(names, file)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped."""

    progress: Mapping[str, Any]
    """what `CheckpointWriter.begin` was given; of format 1: step, applied, data_step, best_score, scored_on"""
    tensors: Mapping[str, torch.Tensor]
    """of `Engine.gather_state`, plus `mean.<name>` of the exponential mean"""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.progress["step"])


def load_checkpoint(checkpoint: Path) -> TrainingState:
    """Open a checkpoint that `find_checkpoint` has verified, of any format.

    Raises:
        CheckpointError: This process does not see the same files as rank 0.
    """
    try:
        content = _read_manifest(checkpoint)
        tensors = StoredTensors([checkpoint / name for name in sorted(content["files"])])
        return TrainingState(progress=_read_progress(content), tensors=tensors)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(checkpoint), "be readable for all processes", type(error).__name__,
            "Set run.folder to a file system that all machines of the run share",
        ) from error  # fmt: skip


def _read_progress(content: Mapping[str, Any]) -> dict[str, Any]:
    step = int(content["step"])
    if int(content["format"]) > 1:
        return dict(_decode_numbers(content["progress"])) | {"step": step}
    best = content.get("best_score", content.get("best_forces_mae"))  # its name in the first checkpoints of format 1
    score = math.inf if best is None else float(best)
    return {
        "step": step, "applied": step, "data_step": step, "best_score": score, "scored_on": str(content.get("scored_on", ""))
    }  # fmt: skip
