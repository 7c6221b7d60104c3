"""What memory there is for a process, and what a computation takes of it at its peak.

On GPUs torch keeps count. On CPUs the system does: resident memory, whose largest value Linux lets a process reset.
"""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from so3krates_dist.distributed import Rank
from so3krates_dist.errors import ConfigError

GPU_SHARE: Final = 0.9
"""of a GPU's free memory that is for use; the rest is for what torch cannot make use of between allocations"""
CPU_SHARE: Final = 0.5
"""of a machine's free memory that is for use; the rest is for reading data, for validation, and for other users"""

PROC: Final = Path("/proc")
_RESET_PEAK: Final = "5"
"""What Linux takes for the order to forget the largest resident memory so far (proc(5))"""


def find_available_bytes(device: torch.device, rank: Rank) -> int:
    """Return how many bytes a process can count on beyond what it holds.

    Args:
        device: Of this process.
        rank: This process; those of one machine share its memory.

    Raises:
        ConfigError: The system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    try:
        own, free = _read_bytes("self/status", "VmRSS"), _read_bytes("meminfo", "MemAvailable")
        allowed = find_cgroup_limit((PROC / "self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    except OSError as error:
        raise _refuse(error) from error
    # What other processes of the run hold is taken to be what this one holds.
    free = free if allowed is None else min(free, allowed - own * rank.local_world_size)
    return max(0, int(free / rank.local_world_size * CPU_SHARE))


def find_cgroup_limit(membership: str, root: Path) -> int | None:
    """Return the bytes that a scheduler or container allows a process, by control groups of either version.

    Args:
        membership: Content of /proc/self/cgroup.
        root: Where control groups are mounted.

    Returns:
        The lowest limit from the process's group up to the root; None where there is none.
    """
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            limit = folder / name
            if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
                limits.append(int(text))
            if folder == top:
                break
    # Version 1 says that there is no limit with a number close to the largest there is.
    return min((limit for limit in limits if limit < 2**62), default=None)


def measure_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes a computation takes at its peak, beyond what was there before it.

    Args:
        run: Computation; what it returns is given up.
        device: Where it computes.

    Raises:
        ConfigError: The system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    # Memory that was freed but is kept for the next allocation (distributed.tune_machine) would hide the next peak.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        (PROC / "self/clear_refs").write_text(_RESET_PEAK)
        before = _read_bytes("self/status", "VmRSS")
    except OSError as error:
        raise _refuse(error) from error
    run()
    return max(0, _read_bytes("self/status", "VmHWM") - before)


def _refuse(error: OSError) -> ConfigError:
    rule = "be false where the system does not measure memory"
    return ConfigError("data.find_limits", rule, f"true ({error})", "Set data.max_atoms and data.max_pairs by hand")


def _read_bytes(path: str, name: str) -> int:
    """Return an entry of a table of the kernel that is in kB."""
    entry = re.search(rf"^{name}:\s*(\d+) kB", (PROC / path).read_text(), re.MULTILINE)
    if entry is None:
        raise FileNotFoundError(f"{PROC / path} has no entry {name}")
    return int(entry[1]) * 1024
