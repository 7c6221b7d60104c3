"""How many conformers per second and core come out of the loader alone, from shards to batches with neighbour pairs.

    OMP_NUM_THREADS=1 python tests/benchmarks/loader.py DATA_FOLDER [--read-anew] [section.key=value ...]

`--read-anew` reads and pairs every conformer in every epoch, as a data set too large to keep is. Runs two epochs (at least 200
steps) in one process without workers; the first epoch is not counted. Results: loader.md.
"""

import sys
import time

from so3krates_dist.config import load_config
from so3krates_dist.data import stream as stream_module
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.train.planning import build_schedule


def main(folder: str, settings: list[str]) -> None:
    """Print the rate of the loader and what it was measured on."""
    if "--read-anew" in settings:
        settings.remove("--read-anew")
        stream_module.MAX_KEPT_ATOMS = 0
    config = load_config([f"data.folder={folder}", *settings])
    mixture = Mixture.open(config.data, config.model)
    schedule, _ = build_schedule(config, mixture, None, 0)
    stream = TrainingStream(schedule, config, rank=0, world_size=1)
    plan, _ = schedule.locate(0)
    epoch = max(plan.windows_per_epoch * plan.steps_per_window, 100)
    for step in range(epoch):
        stream[step]
    num_conformers = num_atoms = num_pairs = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(epoch, 2 * epoch):
        for batch in stream[step].batches:
            num_conformers += batch.num_graphs
            num_atoms += len(batch.atomic_numbers)
            num_pairs += len(batch.pair_first)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{mixture.name}: {num_conformers / cpu:,.0f} conformers per second and core"
        f" ({num_conformers / wall:,.0f} on the clock), batch {config.data.batch_size}, cutoff {config.model.cutoff} Å,"
        f" {num_atoms / num_conformers:.1f} atoms and {num_pairs / num_conformers:.0f} pairs per conformer"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
