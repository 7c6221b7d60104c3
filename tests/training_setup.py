"""A small data set, a small configuration, and real processes to train in: what the tests of training start from.

Processes come from a fork server that has imported torch and deepspeed already, so each starts in a fraction of a second; they
are processes of their own all the same, which can be killed.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from analytic import label, make_cluster, make_morse, write_dataset
from safetensors.torch import load_file

from so3krates_dist.config import RunConfig, parse_config
from so3krates_dist.distributed import Rank
from so3krates_dist.graph import Graph
from so3krates_dist.train.checkpoint import name_checkpoint
from so3krates_dist.train.saving import CheckpointWriter

TINY = (
    "model.num_features=8", "model.num_layers=2", "model.num_heads=2", "model.degrees=[1,2]", "model.cutoff=4.0",
    "model.num_radial_basis=4", "data.batch_size=6", "data.lanes=4", "train.num_steps=40", "train.warmup_steps=4",
    "train.learning_rate=2e-3", "train.ema_decay=0.9", "train.device=cpu", "train.log_every=1", "train.validate_every=20",
    "train.save_every=10", "run.threads=1", "metrics.wandb='off'",
)  # fmt: skip
"""Settings of the tests; later ones win"""

_METHOD = multiprocessing.get_context("forkserver")
_METHOD.set_forkserver_preload(
    [
        "so3krates_dist.cli", "so3krates_dist.train.loop", "so3krates_dist.model.spherical", "deepspeed",
        "torch._inductor.compile_fx", "e3nn.o3",  # DeepSpeed and e3nn import it on their first use, for five seconds
        "deepspeed.runtime.zero.muon.original_muon", "training_setup",
    ]
)  # fmt: skip


def make_graphs(count: int, first_seed: int = 0) -> list[Graph]:
    """Return labelled clusters of four to nine atoms."""
    potential = make_morse()
    seeds = range(first_seed, first_seed + count)
    return [label(make_cluster(s, num_atoms=4 + s % 6, group=f"size{4 + s % 6}"), potential) for s in seeds]


def make_dataset(folder: Path, num_train: int = 50, first_seed: int = 0) -> Path:
    """Write a data set of labelled clusters: training, and four conformers each for validation and test."""
    graphs = make_graphs(num_train + 8, first_seed)
    splits = {"train": graphs[8:], "validation": graphs[:4], "test": graphs[4:8]}
    return write_dataset(folder, splits)


def make_settings(dataset: Path | str, run: Path | str, *more: str) -> list[str]:
    """Return the words of a command line; a model that is named brings its own options."""
    is_named = any(s.startswith("model.name=") for s in more)
    tiny = [s for s in TINY if not (is_named and s.startswith("model."))]
    return [*tiny, f"data.folder={dataset}", f"run.folder={run}", *more]


def make_config(dataset: Path | str, run: Path | str, *more: str) -> RunConfig:
    """Return the configuration of such a command line; all settings in one layer, which is a good deal faster."""
    content: dict[str, dict[str, Any]] = {}
    for setting in make_settings(dataset, run, *more):
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = yaml.safe_load(value)
    return parse_config(content, "tests")


def find_free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --------------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How processes ended."""

    codes: tuple[int | None, ...]
    """exit codes, one for each rank; negative for a signal, None for a process that had to be killed after the limit"""
    outputs: tuple[str, ...]
    """standard output and error of each"""

    def __str__(self) -> str:
        parts = (
            f"--- rank {i}, exit code {c}\n{o}" for i, (c, o) in enumerate(zip(self.codes, self.outputs, strict=True))
        )
        return "\n".join(parts)


@contextlib.contextmanager
def started(
    log: Path, world_size: int, function: Callable[..., Any], *arguments: Any, ranks: Sequence[int] | None = None
) -> Iterator[list[BaseProcess]]:
    """Start processes with a launcher's environment; those that are left at the end are killed.

    Args:
        log: Folder for their output.
        world_size: What they are told.
        function: Of a module that can be imported; what it returns is the exit code.
        arguments: Of the function.
        ranks: Those that are really started; all by default.
    """
    log.mkdir(parents=True, exist_ok=True)
    port = find_free_port()
    processes: list[BaseProcess] = [
        _METHOD.Process(target=_enter, args=(log, rank, world_size, port, function, arguments))
        for rank in (range(world_size) if ranks is None else ranks)
    ]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                process.kill()
            process.join()


def wait(log: Path, processes: Sequence[BaseProcess], limit: float = 120.0) -> Outcome:
    """Wait for processes to end by themselves."""
    for process in processes:
        process.join(limit)
    outputs = tuple(p.read_text(encoding="utf-8", errors="replace") for p in sorted(log.glob("rank*.txt")))
    return Outcome(tuple(p.exitcode for p in processes), outputs)


def run_processes(
    log: Path, world_size: int, function: Callable[..., Any], *arguments: Any, ranks: Sequence[int] | None = None
) -> Outcome:
    """Start processes and wait for them; arguments as in `started`."""
    with started(log, world_size, function, *arguments, ranks=ranks) as processes:
        return wait(log, processes)


def _enter(
    log: Path, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    descriptor = os.open(log / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a process of its own; the fork server hands down its own method
    code = function(*arguments)
    sys.stdout.flush()
    sys.exit(code)


def train(settings: Sequence[str]) -> int:
    """Do what `so3krates train` does."""
    from so3krates_dist.cli import main

    return main(["train", *settings])


def read_own_rank() -> Rank:
    """Return which process this is, inside one that `started` started."""
    from so3krates_dist.distributed import read_rank

    return read_rank()


# ----------------------------------------------------------------------------------------------------------------- results


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], *, keep: int = 2, **progress: Any
) -> Path:
    """Write a checkpoint as a run of one process does; return its folder."""
    writer = CheckpointWriter(folder, Rank(), torch.device("cpu"), keep=keep, asynchronous=False, facts={})
    writer.begin(step, {"step": step, **progress}, tensors, None)
    return folder / name_checkpoint(step)


def read_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    parts = sorted((run / "checkpoints" / f"step_{step:08d}").glob("state*.safetensors"))
    return {name: tensor for part in parts for name, tensor in load_file(part).items()}


def find_differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return by name the largest difference of tensors that are not equal bit for bit (nan where one is missing)."""
    differences = {name: float("nan") for name in first.keys() ^ second.keys()}
    for name in first.keys() & second.keys():
        one, two = first[name], second[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            differences[name] = float("nan")
        elif not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            differences[name] = float((one.double() - two.double()).abs().max())
    return differences
