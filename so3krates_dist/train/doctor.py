"""What `so3krates doctor` checks: whether this machine can train, and which command starts a run on it.

Each check is a function that returns findings; none of them changes anything but for the file that measures the writing speed,
which is removed. Vendors are imported in a process of their own: a broken installation shall be a finding, not a crash.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from so3krates_dist.errors import EXIT_DONE, EXIT_FAILURE
from so3krates_dist.metrics import is_logged_in

MIN_FREE_GIGABYTES = 2.0
MIN_WRITE_MEGABYTES_PER_SECOND = 50.0
WRITE_TEST_MEGABYTES = 64
EXTRAS = {
    "tblite": ("generate", "`so3krates generate` uses it"),
    "rdkit": ("generate", "`so3krates generate` uses it"),
    "torch-pme": ("longrange", "Ewald and PME electrostatics use it"),
    "s3fs": ("s3", "data sets in S3-compatible stores are read with it"),
    "h5py": ("formats", "`so3krates convert` reads HDF5 files with it"),
    "lmdb": ("formats", "`so3krates convert` reads .aselmdb files with it"),
}
"""Optional packages: the extra that installs them, and what for"""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    state: Literal["ok", "warn", "fail", "note"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.name:<14}  {self.text}{'. ' + self.remedy if self.remedy else ''}"


def check_python() -> Iterator[Finding]:
    """Check the version of Python."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    remedy = "" if fits else "Install Python 3.11 or 3.12"
    yield Finding("ok" if fits else "fail", "python", f"{platform.python_version()} at {sys.executable}", remedy)


def check_requirements(
    requirements: Iterable[str] | None = None, find_version: Callable[[str], str] = importlib.metadata.version
) -> Iterator[Finding]:
    """Compare every package that ours needs with what is installed.

    Args:
        requirements: As pip writes them; None takes those of the installed so3krates-dist.
        find_version: Returns a distribution's version.
    """
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires("so3krates-dist") or []
        except importlib.metadata.PackageNotFoundError:
            remedy = "Install it with `pip install .` in the clone"
            yield Finding("fail", "so3krates-dist", "runs from a folder that pip does not know", remedy)
            return
    for requirement in map(Requirement, requirements):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed or requirement.name in EXTRAS:
            yield _check_version(requirement.name, str(requirement.specifier), needed, find_version)


def _check_version(name: str, specifier: str, needed: bool, find_version: Callable[[str], str]) -> Finding:
    from packaging.specifiers import SpecifierSet

    try:
        version = find_version(name)
    except importlib.metadata.PackageNotFoundError:
        if not needed:
            extra, purpose = EXTRAS[name]
            state: Literal["warn", "note"] = "warn" if extra == "generate" else "note"
            return Finding(state, name, "not installed", f"{purpose}: pip install 'so3krates-dist[{extra}]'")
        return Finding("fail", name, "not installed", f"pip install '{name}{specifier}'")
    if SpecifierSet(specifier).contains(version.partition("+")[0], prereleases=True):
        return Finding("ok", name, version)
    return Finding("fail", name, f"{version}, but {specifier} is needed", f"pip install '{name}{specifier}'")


def check_import(module: str) -> Iterator[Finding]:
    """Import a package in a process of its own."""
    command = [sys.executable, "-c", f"import {module}"]
    environment = {**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode == 0:
        yield Finding("ok", f"import {module}", "works")
    else:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        yield Finding("fail", f"import {module}", last, "Install it again")


def check_devices() -> Iterator[Finding]:
    """Look for GPUs and for the libraries that processes talk through."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for index, gpu in enumerate(gpus):
        yield Finding("ok", f"gpu {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus:
        yield Finding("note", "gpu", "none found; training runs on the CPU")
    for name, there, needed in (
        ("gloo", torch.distributed.is_gloo_available(), not gpus),
        ("nccl", torch.distributed.is_nccl_available(), bool(gpus)),
    ):
        remedy = "Several processes need it here: install a torch that has it" if needed and not there else ""
        state: Literal["ok", "note", "fail"] = "ok" if there else "fail" if needed else "note"
        yield Finding(state, name, "available" if there else "not available", remedy)


def count_cores() -> int:
    """Return the cores that this process may use, which on a shared machine are fewer than there are."""
    return len(os.sched_getaffinity(0))


def check_machine() -> Iterator[Finding]:
    """Count cores and memory."""
    yield Finding("ok", "cores", f"{count_cores()} usable of {os.cpu_count()}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    enough = total >= 3
    remedy = "" if enough else "Two processes on CPU need about 3 GiB"
    yield Finding("ok" if enough else "warn", "memory", f"{total:.1f} GiB", remedy)


def check_wandb() -> Iterator[Finding]:
    """Tell where W&B's figures would go; neither login nor network is needed."""
    logged_in = is_logged_in(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    text = "logged in: metrics.wandb=auto is online" if logged_in else "no login: metrics.wandb=auto stays off-line"
    yield Finding("note", "W&B", text)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Measure free space and writing speed where runs shall be written."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), Path("/"))
    free = shutil.disk_usage(existing).free / 1e9
    enough = free >= MIN_FREE_GIGABYTES
    remedy = "" if enough else f"Free some: at least {MIN_FREE_GIGABYTES:g} GB"
    yield Finding("ok" if enough else "fail", "disk", f"{free:.1f} GB free in {existing}", remedy)
    if not enough:
        return
    try:
        speed = _measure_write_speed(existing)
    except OSError as error:
        yield Finding(
            "fail", "writing", f"{existing}: {error.strerror}", "Choose a folder you may write to: --folder DIR"
        )
        return
    fast = speed >= MIN_WRITE_MEGABYTES_PER_SECOND
    remedy = "" if fast else "Checkpoints will take long: choose a faster disk for run.folder"
    yield Finding("ok" if fast else "warn", "writing", f"{speed:.0f} MB/s with fsync", remedy)


def _measure_write_speed(folder: Path) -> float:
    """Return MB/s of one file written and flushed to the disk."""
    payload = os.urandom(1_000_000)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".so3krates-doctor-") as file:
        start = time.perf_counter()
        for _ in range(WRITE_TEST_MEGABYTES):
            file.write(payload)
        file.flush()
        os.fsync(file.fileno())
        return WRITE_TEST_MEGABYTES / (time.perf_counter() - start)


def advise_launch(num_gpus: int, cores: int, *, has_srun: bool) -> list[str]:
    """Return the lines that say how to start a run on such a machine."""
    ranks = num_gpus or min(2, cores)
    where = f"{num_gpus} GPU(s)" if num_gpus else f"{cores} core(s), no GPU"
    command = "so3krates train run=quickstart data.folder=DIR"
    if ranks > 1:
        command = f"deepspeed --num_accelerators {ranks} launch/train.py run=quickstart data.folder=DIR"
        if not num_gpus:
            command = f"DS_ACCELERATOR=cpu {command} run.threads={max(1, cores // ranks)}"
    lines = [f"{where}: {command}"]
    if has_srun:
        address = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        lines.append(
            f"on a Slurm cluster, in a job: export {address}; srun python launch/train.py run=quickstart data.folder=DIR"
        )
    return lines


def _count_gpus() -> int:
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def examine(folder: Path) -> Iterator[Finding]:
    """Run all checks, one finding after another.

    Args:
        folder: Where runs shall be written; need not exist.
    """
    yield from check_python()
    yield from check_requirements()
    for module in ("torch", "deepspeed"):
        yield from check_import(module)
    yield from check_devices()
    yield from check_machine()
    yield from check_disk(folder)
    yield from check_wandb()
    for line in advise_launch(_count_gpus(), count_cores(), has_srun=shutil.which("srun") is not None):
        yield Finding("note", "LAUNCH", line)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `so3krates doctor` takes."""
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs shall be written (default: runs)")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings.

    Returns:
        The exit code: a failure where something that training needs is missing.
    """
    failures = []
    for finding in examine(arguments.folder):
        print(finding, flush=True)
        if finding.state == "fail":
            failures.append(finding.name)
    print(f"Missing or broken: {', '.join(failures)}." if failures else "This machine can train.")
    return EXIT_FAILURE if failures else EXIT_DONE
