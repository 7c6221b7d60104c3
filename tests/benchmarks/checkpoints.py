"""What checkpoints cost, and whether a run survives being killed.

    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoints.py stall [MEGABYTES ...]
    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoints.py kills [NUMBER] [SEED]
    OMP_NUM_THREADS=1 python tests/benchmarks/checkpoints.py races [NUMBER]

stall: two processes save states of some sizes, at once and asynchronously, and take steps of 5 ms meanwhile; how long does training
stand still for a save? kills: `so3krates train` on two processes, with a checkpoint every second step, is killed with SIGKILL at
random times, one process or both; the same command goes on. races: four processes want one run folder at the same moment.
Results: checkpoints.md.
"""

import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "integration")]

from crash_checks import race_for_folder  # noqa: E402
from training_setup import make_dataset, make_settings, read_own_rank, run_processes, started, train, wait  # noqa: E402

from so3krates_dist.distributed import reduce_sum, start_processes, stop_processes  # noqa: E402
from so3krates_dist.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint  # noqa: E402
from so3krates_dist.train.saving import CheckpointWriter  # noqa: E402

CPU = torch.device("cpu")
VICTIMS = ((0,), (1,), (0, 1))
NUM_SAVES = 9


# ------------------------------------------------------------------------------------------------------------------- stall


def measure_stall(folder: Path, megabytes: int) -> int:
    """Print how long training stands still for a save."""
    rank = read_own_rank()
    start_processes(rank, CPU)
    tensors = {f"t{i}": torch.randn(megabytes * 2**20 // 4 // 40) for i in range(40)}
    for asynchronous in (False, True):
        writer = CheckpointWriter(folder, rank, CPU, keep=2, asynchronous=asynchronous, facts={})
        own = writer.owns({name: t.nbytes for name, t in tensors.items()})
        begins, ends, written = [], [], []
        for step in range(1, NUM_SAVES + 1):
            begins.append(writer.begin(step, {"step": step}, {n: tensors[n] for n in own}, None))
            start = time.perf_counter()
            while True:
                flags = reduce_sum(writer.flags(), CPU)
                before = time.perf_counter()
                if writer.settle(*flags):
                    break
                time.sleep(0.005)
            ends.append(time.perf_counter() - before)
            written.append(time.perf_counter() - start + begins[-1])
        stall = statistics.median(b + e for b, e in zip(begins, ends, strict=True))
        if rank.is_main:
            print(
                f"{megabytes} MB, {'asynchronous' if asynchronous else 'blocking'}: training stands still for {1e3 * stall:.1f} ms"
                f" ({1e3 * statistics.median(begins):.1f} at its beginning, {1e3 * statistics.median(ends):.1f} for the commit),"
                f" committed after {1e3 * statistics.median(written):.0f} ms; medians of {NUM_SAVES}",
                flush=True,
            )
    stop_processes()
    return 0


def run_stall(root: Path, sizes: list[int]) -> None:
    """Measure some sizes."""
    for size in sizes or [1, 30, 300]:
        print(run_processes(root / "log", 2, measure_stall, root / "checkpoints", size).outputs[0].strip())
        shutil.rmtree(root / "checkpoints")


# ------------------------------------------------------------------------------------------------------------------- kills


def run_kills(root: Path, number: int, seed: int) -> None:
    """Kill a run again and again, at random times after its first steps; each start goes on from the last one."""
    chance, run, log = random.Random(seed), root / "run", root / "log"
    settings = make_settings(
        make_dataset(root / "data"), run, "train.num_steps=100000", "train.save_every=2", "train.validate_every=100000",
        "train.self_check=false", "train.proof=false",
    )  # fmt: skip
    resumable, behind, detected, resumed, torn = 0, list[int](), list[float](), list[float](), 0
    for round_ in range(number):
        victims = VICTIMS[round_ % len(VICTIMS)]
        newest_before = newest_step(run)
        begin = time.perf_counter()
        with started(log, 2, train, settings) as processes:
            while newest_step(run) <= newest_before:
                time.sleep(0.002)
                assert time.perf_counter() - begin < 120, (log / "rank0.txt").read_text()
            if round_:
                resumed.append(time.perf_counter() - begin)
            time.sleep(chance.uniform(0, 1))
            for victim in victims:
                processes[victim].kill()
            killed = time.perf_counter()
            outcome = wait(log, processes)
            if len(victims) == 1:
                detected.append(time.perf_counter() - killed)
        assert [outcome.codes[v] for v in victims] == [-signal.SIGKILL] * len(victims), str(outcome)
        announced = re.findall(r"Checkpoint of step (\d+)", outcome.outputs[0])
        said = max((int(n) for n in announced), default=newest_before)
        torn += len(list((run / "checkpoints").glob(".step_*.tmp")))
        found, complaints = find_checkpoint(run / "checkpoints")
        assert not complaints, complaints
        assert found is not None
        step = load_checkpoint(found).step
        resumable += step >= said
        behind.append(said - step)
        print(f"round {round_}: killed {victims}, last said to be saved {said}, found {step}", flush=True)
    print(
        f"seed {seed}: {resumable} of {number} resumable with the last checkpoint that was announced or a newer one, {torn} of"
        f" them with a save torn apart, {sum(b > 0 for b in behind)} behind; a process that is left ends"
        f" {statistics.median(detected):.1f} s (median; most {max(detected):.1f}) after the other's death; from the command to the"
        f" first new checkpoint {statistics.median(resumed):.1f} s (most {max(resumed):.1f})"
    )


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, whole or not; 0 before the first."""
    return max((int(p.name[5:]) for p in list_checkpoints(run / "checkpoints")), default=0)


# ------------------------------------------------------------------------------------------------------------------- races


def run_races(root: Path, number: int) -> None:
    """Let four processes want one folder again and again."""
    dataset = make_dataset(root / "data", num_train=4)
    outcome = run_processes(root / "log", 4, race_for_folder, dataset, root / "run", time.time() + 3, number)
    said = "".join(outcome.outputs)
    print(
        f"{number} races of four processes: held by two at the same time {outcome.codes.count(3)} times, got"
        f" {said.count('got it')} times, refused {said.count('refused')} times, of these with the owner's name"
        f" {said.count('running process:')}; exit codes {outcome.codes}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, numbers = sys.argv[1], [int(a) for a in sys.argv[2:]]
    with tempfile.TemporaryDirectory() as name:
        if what == "stall":
            run_stall(Path(name), numbers)
        elif what == "kills":
            run_kills(Path(name), *(numbers + [21, 1][len(numbers) :]))
        else:
            run_races(Path(name), *(numbers or [50]))
