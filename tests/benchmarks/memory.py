"""What `train.activation_checkpointing` saves: memory and time of a training pass in each mode, for several depths and sizes.

    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/memory.py [--device cuda] [--model NAME]

A pass is forward, loss of energies and forces, backward; float32, initial weights, default sizes of the models. Each line is a
fresh process. Results: memory.md.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

import ase.build
import torch
from live_bytes import LiveBytes
from structures import STATISTICS, from_atoms, make_batch, make_molecule

from so3krates_dist.config import MODEL_SECTIONS
from so3krates_dist.distributed import tune_machine
from so3krates_dist.graph import Graph
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.memory import measure_peak
from so3krates_dist.train.two_pass import TwoPass

MODES: Final = ("none", "blocks", "low_memory")
SYSTEMS: Final[dict[str, Callable[[], list[Graph]]]] = {
    "40 ethanol": lambda: [make_molecule("CH3CH2OH", seed) for seed in range(40)],
    "160 ethanol": lambda: [make_molecule("CH3CH2OH", seed) for seed in range(160)],
    "rock salt, 216 atoms": lambda: [from_atoms(ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True) * (3, 3, 3))],
}
CASES: Final = [
    *(("euclidean_transformer", layers, "160 ethanol") for layers in (2, 4, 8)),
    *((model, 3, "40 ethanol") for model in ("euclidean_transformer", "so3krates", "so3lr", "geomatt")),
    ("so3lr", 3, "rock salt, 216 atoms"),
]
REPEATS: Final = 3


def measure(name: str, num_layers: int, system: str, mode: str, device: torch.device) -> str:
    """Return atoms, pairs, MB of tensors at the peak, MB of the process (of the GPU) at the peak, and seconds per pass."""
    tune_machine(1, device)
    torch.manual_seed(0)
    section = dataclasses.replace(MODEL_SECTIONS[name](), num_layers=num_layers)
    potential = build_model(section, STATISTICS).to(device).train()
    potential.as_network.checkpointing = mode  # type: ignore[assignment]
    batch = make_batch(SYSTEMS[system](), potential.cutoffs, torch.float32).to(device)
    passes = TwoPass(potential)

    def run() -> None:
        outputs = passes.forward(potential, batch, False)
        loss = outputs["forces"].square().mean() + outputs["energy"].float().square().mean()
        passes.finish(potential, loss).backward()  # type: ignore[no-untyped-call] # torch's
        potential.zero_grad()

    run()
    peak = measure_peak(run, device)
    seconds = []
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(REPEATS):
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - start)
    with LiveBytes() as live:
        run()
    return (
        f"{len(batch.atomic_numbers)} {len(batch.pair_first)} {live.peak / 1e6:.4g} {peak / 1e6:.4g} {min(seconds):.3g}"
    )


def main(device: str, only: str) -> None:
    """Print a table, of one model only or of all of them."""
    print("| model | layers | structures | atoms, pairs | mode | MB of tensors | MB of the process | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for model, layers, system in CASES:
        if only not in ("", model):
            continue
        plain: list[float] = []
        for mode in MODES:
            if mode == "low_memory" and MODEL_SECTIONS[model]().low_memory_obstacle:
                continue
            case = [model, str(layers), system, mode]
            command = [sys.executable, __file__, "--device", device, "--case", *case]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            values = [float(value) for value in answer[2:]]
            plain = plain or values
            cells = [f"{v:.3g} ({v / p:.2f})" for v, p in zip(values, plain, strict=True)]
            print(
                f"| {model} | {layers} | {system} | {', '.join(answer[:2])} | {mode} | {' | '.join(cells)} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="")
    parser.add_argument("--case", nargs=4, help="one line; used by the benchmark itself")
    arguments = parser.parse_args()
    if arguments.case is None:
        main(arguments.device, arguments.model)
    else:
        model, layers, system, mode = arguments.case
        print(measure(model, int(layers), system, mode, torch.device(arguments.device)))
