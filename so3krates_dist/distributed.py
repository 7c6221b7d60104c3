"""Processes: who am I, seeds, small reductions; the only reader of RANK, WORLD_SIZE and SLURM_*.

Understands the environments of the `deepspeed` launcher, torchrun and srun (with MASTER_ADDR and MASTER_PORT exported before),
and a single process with none of them.
"""

import contextlib
import ctypes
import dataclasses
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from so3krates_dist.errors import ConfigError

COLLECTIVE_TIMEOUT_SECONDS = 600
"""A process that waits longer than this for the others gives up with an error"""


_LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs have units for products in TF32 and bfloat16"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h"""
_KEEP_BYTES, _MAX_MMAP_THRESHOLD = 2**30, 2**25


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """Which process of the run this is."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def read_rank(environment: Mapping[str, str] = os.environ) -> Rank:
    """Read which process this is from the launcher's environment.

    Raises:
        ConfigError: The launcher's variables contradict each other.
    """
    if "RANK" in environment:  # deepspeed, torchrun
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        local_size = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or "1"
    elif environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:  # srun
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
        per_node = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "1")
        local_size = re.split(r"[(,]", per_node)[0]  # like 8(x4),2
    else:
        return Rank()
    try:
        rank, local_rank, world_size = (int(environment[n]) for n in names)
        result = Rank(rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=int(local_size))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "launcher environment", f"set {', '.join(names)} to integers", str(error), "Start through one launcher"
        ) from error
    if not 0 <= rank < world_size:
        raise ConfigError("RANK", f"be less than WORLD_SIZE ({world_size})", rank, "Start through one launcher")
    if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        remedy = 'Under srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        raise ConfigError("MASTER_ADDR, MASTER_PORT", "be set for several processes", "not set", remedy)
    return result


def read_job(environment: Mapping[str, str] = os.environ) -> str:
    """Return the number of the SLURM job that this process belongs to; empty without one."""
    return environment.get("SLURM_JOB_ID", "")


def choose_device(choice: str, rank: Rank) -> torch.device:
    """Return the device of this process.

    Args:
        choice: `auto`, `cpu` or `cuda`.
        rank: This process.

    Raises:
        ConfigError: `cuda` was asked for and there is none, or there are fewer GPUs than processes.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigError("train.device", "be auto or cpu on this machine", "cuda", "No GPU was found here")
    if choice == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and rank.local_rank >= count:
        raise ConfigError(
            "processes per machine", f"be at most its GPUs ({count})", rank.local_world_size, "Start fewer processes"
        )
    # A launcher may show each process one GPU only; then its index is 0 whatever the local rank.
    return torch.device("cuda", rank.local_rank if count > 1 else 0)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `ConfigError` where a device does not have the arithmetic that is asked for.

    Args:
        precision: `train.precision`.
        device: Of this process.
    """
    if device.type != "cuda":
        possible = precision != "tf32"
        rule = "be float32, bf16-mixed or float64 on a CPU"
    else:
        possible = (
            precision not in ("tf32", "bf16-mixed") or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        )
        rule = f"be float32 or float64 on {torch.cuda.get_device_name(device)}"
    if not possible:
        remedy = "TF32 and bfloat16 come with GPUs of compute capability 8.0 (A100, RTX 30) and later"
        raise ConfigError("train.precision", rule, precision, remedy)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Set how matrix products of float32 are done in this process: rounded to TF32 where that is asked for, else in full.

    What an earlier call has set does not count. Products of geometry are exact all the same (model/exact.py).

    Args:
        precision: `train.precision`.
        device: Of this process.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" and device.type == "cuda" else "highest")


@contextlib.contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Do matrix products of float32 as `set_matmul_precision` says for a while, and then as before.

    Derivatives that are taken after it are not done so.
    """
    before = torch.get_float32_matmul_precision()
    set_matmul_precision(precision, device)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def count_threads(asked: int, local_world_size: int, cores: int | None = None) -> int:
    """Return the CPU threads that one process shall use.

    Args:
        asked: `run.threads`; 0: the cores that this process may run on, divided by the processes of the machine.
        local_world_size: Processes of this run on this machine.
        cores: Number of these cores; None looks it up.
    """
    if asked:
        return asked
    return max(1, (cores or len(os.sched_getaffinity(0))) // local_world_size)


def tune_machine(threads: int, device: torch.device) -> None:
    """Set the CPU threads of this process, and keep glibc from giving memory back after every operation.

    Tensors of some 100 kB would otherwise be mapped and unmapped each time, at the price of page faults: a training step on
    CPU takes a quarter longer (tests/benchmarks/allocator.md).

    Args:
        threads: CPU threads of this process.
        device: Of this process.
    """
    torch.set_num_threads(threads)
    if device.type == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


def start_processes(rank: Rank, device: torch.device, seconds: int = COLLECTIVE_TIMEOUT_SECONDS) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs; a single process needs no port.

    Args:
        rank: This process.
        device: Of this process.
        seconds: To wait for the others, now and later.
    """
    timeout = timedelta(seconds=seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed looks these up itself; srun and a single process have not set them. It takes LOCAL_RANK as the GPU's index.
    local = device.index if device.type == "cuda" else rank.local_rank
    os.environ |= {"RANK": str(rank.rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(rank.world_size)}
    if rank.world_size == 1:
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(backend, rank=rank.rank, world_size=rank.world_size, timeout=timeout)


def stop_processes() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch alike on all processes: initial weights must agree."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - vendors may draw from numpy's global generator
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, rank: Rank) -> None:
    """Seed torch for one step of one process.

    Random numbers are then a function of the step, like the data: a resumed run draws the same ones, with no state to keep.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank.rank) % 2**63)


def reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all processes, in float64; the result is the same on all of them.

    Any nan makes the sum nan everywhere, so all processes take the same decision about it.
    """
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def broadcast_text(text: str, device: torch.device) -> str:
    """Return rank 0's text on all processes, so that all act on one finding."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(content)], device=device)
    dist.broadcast(size, 0)
    if dist.get_rank() != 0:
        content = torch.zeros(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode()


def wait_for_all() -> None:
    """Wait until all processes have come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
