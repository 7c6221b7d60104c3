"""What `distributed.tune_machine` gains on a CPU: the training step with glibc's allocator as it is, and told to keep memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/allocator.py DATA_FOLDER [section.key=value ...]

Alternates fresh processes (the setting cannot be taken back), so that load on the machine hits both alike. Results: allocator.md.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = 60


def measure(folder: Path, tuned: bool, settings: list[str]) -> None:
    """Print CPU milliseconds and page faults per training step of a plain torch loop."""
    import torch

    from so3krates_dist.config import load_config
    from so3krates_dist.data.mixture import Mixture
    from so3krates_dist.data.stream import TrainingStream
    from so3krates_dist.distributed import tune_machine
    from so3krates_dist.model.potential import ModelStatistics
    from so3krates_dist.model.registry import build_model
    from so3krates_dist.train.optim import build_optimizer
    from so3krates_dist.train.planning import build_schedule

    if tuned:
        tune_machine(1, torch.device("cpu"))
    torch.set_num_threads(1)
    config = load_config([f"data.folder={folder}", *settings])
    mixture = Mixture.open(config.data, config.model)
    schedule, _ = build_schedule(config, mixture, None, 0)
    stream = TrainingStream(schedule, config, rank=0, world_size=1)
    batches = [stream[step].batches[0] for step in range(STEPS)]
    potential = build_model(config.model, ModelStatistics.from_manifest(mixture.statistics, config.model)).train()
    optimizer = build_optimizer(potential, config.train)
    cpu: list[float] = []
    for batch in batches:
        start, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert batch.forces is not None
        (potential(batch)["forces"] - batch.forces).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cpu.append(time.process_time() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(statistics.median(cpu[10:]) * 1e3, faults)


def main(folder: Path, settings: list[str]) -> None:
    """Print the medians of five pairs of processes, and the ratio of each pair."""
    ratios = []
    for _ in range(5):
        pair = []
        for tuned in (False, True):
            command = [sys.executable, __file__, str(folder), "--child", str(int(tuned)), *settings]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            pair.append([float(x) for x in answer.split()])
        ratios.append(pair[1][0] / pair[0][0])
        print(
            f"as it is {pair[0][0]:.1f} ms CPU and {pair[0][1]:.0f} page faults a step;"
            f" tuned {pair[1][0]:.1f} ms and {pair[1][1]:.0f}; ratio {ratios[-1]:.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] == "--child":
        measure(Path(sys.argv[1]), sys.argv[3] == "1", sys.argv[4:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
