"""Who am I, in the environment of every launcher; small reductions, with one process and with two."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from so3krates_dist import distributed
from so3krates_dist.distributed import Rank, choose_device, count_threads, read_job, read_rank
from so3krates_dist.errors import ConfigError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
DEEPSPEED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"} | MASTER
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"} | MASTER
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"} | MASTER
SRUN = SLURM | {"SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        (DEEPSPEED, Rank(rank=1, local_rank=1, world_size=4, local_world_size=2)),
        (TORCHRUN, Rank(rank=3, local_rank=1, world_size=4, local_world_size=2)),
        (SRUN, Rank(rank=5, local_rank=1, world_size=8, local_world_size=4)),
        (SLURM | {"SLURM_TASKS_PER_NODE": "8(x4),2"}, Rank(rank=5, local_rank=1, world_size=8, local_world_size=8)),
        (SLURM, Rank(rank=5, local_rank=1, world_size=8)),
        (SRUN | DEEPSPEED, Rank(rank=1, local_rank=1, world_size=4, local_world_size=2)),  # a launcher inside a job
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Rank()),  # a job of one task needs no launcher
        ({"SLURM_NTASKS": "8"}, Rank()),  # the batch script itself
    ],
    ids=["none", "deepspeed", "torchrun", "srun", "srun-by-node", "srun-unknown", "both", "one-task", "batch-script"],
)
def test_every_launcher_is_understood(environment, expected):
    assert read_rank(environment) == expected


def test_rank_zero_writes():
    assert Rank().is_main
    assert not read_rank(DEEPSPEED).is_main


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": "x"}, r"launcher environment must set RANK, LOCAL_RANK, WORLD_SIZE to integers; got .*'x'"),
        ({"WORLD_SIZE": ""}, r"launcher environment must set RANK, LOCAL_RANK, WORLD_SIZE to integers"),
        ({"RANK": "4"}, r"RANK must be less than WORLD_SIZE \(4\); got 4. Start through one launcher."),
        ({"RANK": "-1"}, r"RANK must be less than WORLD_SIZE \(4\); got -1"),
    ],
)
def test_contradictions_of_a_launcher_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read_rank(DEEPSPEED | change)


def test_a_number_of_tasks_that_is_no_integer_is_refused():
    message = r"launcher environment must set SLURM_PROCID, SLURM_LOCALID, SLURM_NTASKS to integers; got .*'many'"
    with pytest.raises(ConfigError, match=message):
        read_rank(SRUN | {"SLURM_NTASKS": "many"})


@pytest.mark.parametrize("environment", [SRUN, DEEPSPEED], ids=["srun", "deepspeed"])
@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_several_processes_must_know_where_to_meet(environment, missing):
    message = (
        "MASTER_ADDR, MASTER_PORT must be set for several processes; got not set. Under srun: export "
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500.'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        read_rank({name: value for name, value in environment.items() if name not in missing})


def test_a_variable_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="got 'LOCAL_RANK'"):
        read_rank({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("choice", "gpus", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"), ("cpu", 0, 1, "cpu"), ("cpu", 2, 1, "cpu"), ("auto", 2, 1, "cuda:1"), ("cuda", 4, 3, "cuda:3"),
        ("auto", 1, 3, "cuda:0"),
    ],
)  # fmt: skip
def test_devices(monkeypatch, choice, gpus, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(choose_device(choice, Rank(local_rank=local_rank, world_size=4))) == expected


@pytest.mark.parametrize(
    ("precision", "device", "capability", "message"),
    [
        (
            "tf32",
            "cpu",
            None,
            r"^train\.precision must be float32, bf16-mixed or float64 on a CPU; got tf32\. TF32 and bfloat16",
        ),
        (
            "tf32",
            "cuda",
            (7, 0),
            r"^train\.precision must be float32 or float64 on Tesla; got tf32\. .* capability 8\.0",
        ),
        ("bf16-mixed", "cuda", (7, 5), r"^train\.precision must be float32 or float64 on Tesla; got bf16-mixed\. "),
    ],
)
def test_arithmetic_that_a_device_does_not_have_is_refused(monkeypatch, precision, device, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla")
    with pytest.raises(ConfigError, match=message):
        distributed.check_precision(precision, torch.device(device))


def test_arithmetic_that_a_device_has(monkeypatch):
    for precision in ("float32", "bf16-mixed", "float64"):
        distributed.check_precision(precision, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability, precisions in (
        ((8, 0), ("float32", "tf32", "bf16-mixed", "float64")),
        ((7, 0), ("float32", "float64")),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, value=capability: value)
        for precision in precisions:
            distributed.check_precision(precision, torch.device("cuda", 0))


def test_products_are_rounded_only_where_that_is_asked_for():
    """Whatever was set before, and for as long as it is asked for."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    try:
        for precision, device, expected in (
            ("tf32", gpu, "high"),
            ("tf32", cpu, "highest"),
            ("bf16-mixed", gpu, "highest"),
        ):
            torch.set_float32_matmul_precision("medium")
            with distributed.matmul_precision(precision, device):
                assert torch.get_float32_matmul_precision() == expected
            assert torch.get_float32_matmul_precision() == "medium"
            distributed.set_matmul_precision(precision, device)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"train.device must be auto or cpu on this machine; got cuda. No GPU was found here."
    ):
        choose_device("cuda", Rank())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=r"processes per machine must be at most its GPUs \(2\); got 4\. Start fewer processes\."
    ):
        choose_device("auto", Rank(rank=2, local_rank=2, world_size=4, local_world_size=4))


@pytest.mark.parametrize(
    ("asked", "processes", "cores", "expected"), [(3, 2, 8, 3), (0, 2, 8, 4), (0, 3, 8, 2), (0, 8, 2, 1)]
)
def test_threads_share_the_cores(asked, processes, cores, expected):
    assert count_threads(asked, processes, cores) == expected


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7, 8})
    assert count_threads(0, 2) == 2


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002 - the global one is meant


def test_seeding_reaches_all_generators():
    distributed.seed_everything(7)
    first = _draw()
    distributed.seed_everything(8)
    other = _draw()
    distributed.seed_everything(7)
    assert _draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))
    distributed.seed_everything(2**40)  # numpy takes 32 bits only


def test_random_numbers_of_a_step_depend_on_step_rank_and_seed_only():
    def draw(seed: int, step: int, rank: int) -> float:
        distributed.seed_step(seed, step, Rank(rank=rank, world_size=8))
        return float(torch.rand((), dtype=torch.float64))

    cells = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 10**7) for rank in (0, 7)]
    values = {cell: draw(*cell) for cell in cells}
    assert len(set(values.values())) == len(cells)
    assert {cell: draw(*cell) for cell in reversed(cells)} == values


def test_without_a_process_group_everything_is_local():
    cpu = torch.device("cpu")
    assert distributed.reduce_sum([1.0, 0.1], cpu) == [1.0, 0.1]
    assert distributed.broadcast_text("Å", cpu) == "Å"
    distributed.wait_for_all()
    distributed.stop_processes()


def _join_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cpu = torch.device("cpu")
    distributed.start_processes(Rank(rank=rank, local_rank=rank, world_size=2, local_world_size=2), cpu)
    found = {
        "sum": distributed.reduce_sum([1.0 + rank, 2.0**-60, 1e15], cpu),
        "nan": distributed.reduce_sum([float("nan") if rank == 1 else 1.0], cpu),
        "text": distributed.broadcast_text("step_7 Å" if rank == 0 else "", cpu),
        "empty": distributed.broadcast_text("" if rank == 0 else "something", cpu),
    }
    distributed.wait_for_all()
    distributed.stop_processes()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_agree(tmp_path, free_port):
    multiprocessing.spawn(_join_two, args=(free_port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["sum"] == second["sum"] == [3.0, 2.0**-59, 2e15]
    assert all(np.isnan(found["nan"][0]) for found in (first, second))
    assert first["text"] == second["text"] == "step_7 Å"
    assert first["empty"] == second["empty"] == ""


def _join_alone(_rank: int) -> None:
    distributed.start_processes(Rank(), torch.device("cpu"))
    assert distributed.reduce_sum([2.5], torch.device("cpu")) == [2.5]
    distributed.stop_processes()
    assert not torch.distributed.is_initialized()


def test_one_process_needs_no_port(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    multiprocessing.spawn(_join_alone, nprocs=1)


def test_threads_are_set(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    distributed.tune_machine(3, torch.device("cpu"))
    assert set_to == [3]


def test_the_job_of_a_scheduler() -> None:
    assert read_job({}) == ""
    assert read_job({"SLURM_JOB_ID": "4711"}) == "4711"
