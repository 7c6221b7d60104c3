"""A run that gets a fault every few seconds, for minutes: does it end with the weights of a run that nothing happened to?

    OMP_NUM_THREADS=1 python tests/benchmarks/soak.py [SECONDS] [SEED]

Two processes train, save at every fifth step, and skip a step in a hundred, in which one of them computes nan. Two to ten seconds
after the first new checkpoint comes a fault, chosen at random: SIGKILL to one process or both, SIGTERM, the stop file, a full disk
(the largest size of a file becomes 8 kB), a process that stands still for two seconds, SIGKILL and then a flipped byte in the
newest checkpoint. The same command goes on. At the end all tensors of the last checkpoint (weights, moments, mean) are compared
with those of a run without faults.

Counted as silent failures: exit codes of 0 or 85 where another one is due, a process that has not ended a minute after a fault, a
checkpoint that was announced and is not there, damage that is not told, and any bit that differs. Results: soak.md.
"""

import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)]

from interruptions import flip_byte, train_on_faults  # noqa: E402
from training_setup import (  # noqa: E402
    Outcome,
    find_differences,
    make_dataset,
    make_settings,
    read_state,
    run_processes,
    started,
    wait,
)  # fmt: skip

from so3krates_dist.errors import EXIT_DONE, EXIT_FAILURE, EXIT_REQUEUE  # noqa: E402
from so3krates_dist.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint  # noqa: E402

FAULTS = (
    "kill rank 0", "kill rank 1", "kill both", "SIGTERM to rank 0", "SIGTERM to rank 1", "stop file", "full disk on rank 0",
    "full disk on rank 1", "stand still", "kill both and flip a byte",
)  # fmt: skip
SPOILED = range(40, 10**6, 100)
"""Positions in the data at which a process computes nan"""
MORE = (
    "train.num_steps=100000", "train.save_every=5", "train.validate_every=50", "train.log_every=50", "train.self_check=false",
    "train.proof=false", "train.max_skipped_steps=3", "train.keep_checkpoints=3",
)  # fmt: skip
LIMIT_SECONDS = 60.0


class Soak:
    """A run, what happens to it, and what it should not have done.

    Args:
        root: Where everything is.
        seed: Of the faults.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.run, self.log, self.chance = root, root / "run", root / "log", random.Random(seed)
        self.dataset = make_dataset(root / "data")
        self.faults, self.silent = Counter[str](), list[str]()
        self.announced = 0

    def start(self, fault: str, delay: float) -> bool:
        """Start the run, let a fault happen some seconds after its first new checkpoint, and wait for the end; False: too late."""
        before = self.find_newest()
        with started(
            self.log, 2, train_on_faults, make_settings(self.dataset, self.run, *MORE), "gradient", SPOILED, 1
        ) as ps:
            begin = time.monotonic()
            while self.find_newest() <= before:
                time.sleep(0.01)
                if time.monotonic() > begin + LIMIT_SECONDS or not all(p.is_alive() for p in ps):
                    self.silent.append(f"no new checkpoint after the start: {wait(self.log, ps, 1)}")
                    return False
            time.sleep(delay)
            victims = self.strike(fault, ps)
            outcome = wait(self.log, ps, LIMIT_SECONDS)
        self.faults[fault] += 1
        self.judge(fault, victims, outcome)
        return True

    def find_newest(self) -> int:
        return max((int(p.name[5:]) for p in list_checkpoints(self.run / "checkpoints")), default=0)

    def strike(self, fault: str, processes: Sequence[BaseProcess]) -> Sequence[int]:
        """Do something to the processes; return those that were killed."""
        ids = [p.pid for p in processes if p.pid is not None]
        if fault.startswith("kill"):
            victims = [0, 1] if "both" in fault else [int(fault[-1])]
            for victim in victims:
                os.kill(ids[victim], signal.SIGKILL)
            return victims
        if fault.startswith("SIGTERM"):
            os.kill(ids[int(fault[-1])], signal.SIGTERM)
        elif fault.startswith("full"):
            resource.prlimit(ids[int(fault[-1])], resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        elif fault == "stand still":
            os.kill(ids[1], signal.SIGSTOP)
            time.sleep(2)
            os.kill(ids[1], signal.SIGCONT)
            time.sleep(1)
        if fault in ("stop file", "stand still"):
            (self.run / "STOP").touch()
        return []

    def judge(self, fault: str, victims: Sequence[int], outcome: Outcome) -> None:
        """Note what ended otherwise than it should, and what is not there though it was announced."""
        due = EXIT_FAILURE if fault.startswith(("kill", "full")) else EXIT_REQUEUE
        wanted = tuple(-signal.SIGKILL if r in victims else due for r in range(2))
        if outcome.codes != wanted:
            self.silent.append(f"{fault}: exit codes {outcome.codes}, not {wanted}\n{outcome}")
        said = [int(n) for n in re.findall(r"Checkpoint of step (\d+)", outcome.outputs[0])]
        self.announced = max([self.announced, *said])
        checkpoints = self.run / "checkpoints"
        if fault.endswith("flip a byte"):
            part = self.chance.choice(sorted(list_checkpoints(checkpoints)[0].glob("state*")))
            flip_byte(part, self.chance.randrange(part.stat().st_size))
            self.announced = 0  # the run goes back behind it
        found, complaints = find_checkpoint(checkpoints)
        assert found is not None
        if bool(complaints) != fault.endswith("flip a byte") or load_checkpoint(found).step < self.announced:
            self.silent.append(f"{fault}: found {found}, {complaints}; announced {self.announced}")
        print(
            f"{sum(self.faults.values()):3} {fault:<26} exit codes {outcome.codes}, next from {found.name}", flush=True
        )


def run_soak(root: Path, seconds: float, seed: int) -> int:
    """Let faults happen for a time, and compare; return 0 where nothing was silent."""
    soak = Soak(root, seed)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds and soak.start(soak.chance.choice(FAULTS), soak.chance.uniform(2, 10)):
        pass
    soak.start("stop file", 0.0)
    taken = time.monotonic() - begin
    step = soak.find_newest()
    whole = root / "whole"
    settings = make_settings(soak.dataset, whole, *MORE, f"train.stop_at={step}")
    begin = time.monotonic()
    outcome = run_processes(soak.log, 2, train_on_faults, settings, "gradient", SPOILED, 1)
    needed = time.monotonic() - begin
    assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
    differences = find_differences(read_state(soak.run, step), read_state(whole, step))
    if differences:
        soak.silent.append(f"{len(differences)} tensors differ, by up to {max(differences.values())}")
    for line in soak.silent:
        print("not as it should be:", line)
    print(
        f"seed {seed}: {sum(soak.faults.values())} faults in {taken:.0f} s, {step} steps; without faults {needed:.0f} s, so goodput"
        f" {100 * needed / taken:.0f} %; {len(soak.silent)} silent failures; all {len(read_state(whole, step))} tensors"
        f" {'differ' if differences else 'equal bit for bit'}"
    )
    print(", ".join(f"{fault}: {count}" for fault, count in sorted(soak.faults.items())))
    return 1 if soak.silent else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [int(a) for a in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as name:
        sys.exit(run_soak(Path(name), *(given + [600, 1][len(given) :])))
