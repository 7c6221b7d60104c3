"""What `train.checkpoint_attention` saves: peak memory of a process that takes training steps, with and without it.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py DATA_FOLDER [section.key=value ...]

Fresh processes in turn; the base is the process with model and batch before the first step. Results: memory.md.
"""

import resource
import subprocess
import sys
from pathlib import Path


def measure(folder: Path, recompute: bool, settings: list[str]) -> None:
    """Print the largest resident memory in MiB before and after three steps."""
    import torch

    from so3krates_dist.config import load_config
    from so3krates_dist.data.mixture import Mixture
    from so3krates_dist.data.stream import TrainingStream
    from so3krates_dist.model.potential import ModelStatistics
    from so3krates_dist.model.registry import build_model
    from so3krates_dist.train.planning import build_schedule

    torch.set_num_threads(1)
    config = load_config([f"data.folder={folder}", "data.batch_size=160", *settings])
    mixture = Mixture.open(config.data, config.model)
    schedule, _ = build_schedule(config, mixture, None, 0)
    batch = TrainingStream(schedule, config, rank=0, world_size=1)[0].batches[0]
    potential = build_model(config.model, ModelStatistics.from_manifest(mixture.statistics, config.model)).train()
    potential.network.checkpoint_attention = recompute  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert batch.forces is not None
    for _ in range(3):
        (potential(batch)["forces"] - batch.forces).square().mean().backward()
        potential.zero_grad()
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(folder: Path, settings: list[str]) -> None:
    """Print three pairs."""
    for _ in range(3):
        for recompute in (False, True):
            command = [sys.executable, __file__, str(folder), "--child", str(int(recompute)), *settings]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            before, peak = map(float, answer)
            label = "recomputed" if recompute else "kept"
            print(f"{label}: base {before:.0f} MiB, peak {peak:.0f}, above the base {peak - before:.0f}")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] == "--child":
        measure(Path(sys.argv[1]), sys.argv[3] == "1", sys.argv[4:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
