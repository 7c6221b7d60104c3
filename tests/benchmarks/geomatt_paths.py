"""From which size on is GeomAtt faster along a list of pairs than in matrices of all pairs?

A step of training (forces, gradients of all weights by them) or of dynamics (forces) with the default model, for one compact
molecule-like cloud and for a chain. Both ways use the same pairs and are timed in turn; who comes first alternates.

    OMP_NUM_THREADS=1 python tests/benchmarks/geomatt_paths.py
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from structures import STATISTICS

from so3krates_dist.config import GeomAttSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import build_model

WAYS = ("dense", "neighbor_list")


def make_structure(shape: str, num_atoms: int) -> Graph:
    """Return carbon at the density of organic matter (0.1 atoms per Å³): a ball, or a rod of 12 Å² cross-section."""
    rng = np.random.default_rng(num_atoms)
    spacing = 0.1 ** (-1 / 3)
    side = round(num_atoms ** (1 / 3) + 0.5) + 1
    extents = (side, side, side) if shape == "ball" else (2, 2, num_atoms // 4 + 1)
    grid = spacing * np.stack(np.meshgrid(*map(np.arange, extents)), -1).reshape(-1, 3)
    center = grid.mean(0) if shape == "ball" else np.zeros(3)
    nearest = np.argsort(np.linalg.norm(grid - center, axis=1), kind="stable")[:num_atoms]
    positions = grid[nearest] + rng.normal(scale=0.1, size=(num_atoms, 3))
    return Graph(atomic_numbers=np.full(num_atoms, 6), positions=positions)


def make_step(algorithm: str, batch: GraphBatch, *, train: bool) -> Callable[[], None]:
    """Return a step of the default model with the pairs of the neighbour list, whatever the way."""
    torch.manual_seed(0)
    potential: Potential = build_model(GeomAttSection(algorithm="neighbor_list"), STATISTICS).train(train)
    potential.network.algorithm = algorithm  # type: ignore[assignment]
    weights = list(potential.parameters())

    def step() -> None:
        forces = potential(batch)["forces"]
        if train:
            torch.autograd.grad(forces.square().sum(), weights, allow_unused=True)

    return step


def time_in_turn(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Return milliseconds per step, one number per run and way; who comes first alternates."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs):
        for name in list(steps)[:: 1 if run % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each measurement")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 50, 100, 200], help="atoms")
    parser.add_argument("--shapes", nargs="+", default=["ball", "rod"], choices=("ball", "rod"))
    parser.add_argument("--dynamics", action="store_true", help="forces alone, without gradients of the weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {arguments.runs} paired runs\n")
    print(
        "| shape | atoms | entries per edge | matrices, ms | list, ms | list / matrices: median (lowest to highest) |"
    )
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        for num_atoms in arguments.sizes:
            section = GeomAttSection()
            graph = build_neighbors(make_structure(shape, num_atoms), section.cutoff, section.reach)
            batch = collate([graph])
            steps = {way: make_step(way, batch, train=not arguments.dynamics) for way in WAYS}
            times = time_in_turn(steps, arguments.runs)
            ratios = sorted(b / a for a, b in zip(times["dense"], times["neighbor_list"], strict=True))
            dense, listed = (statistics.median(times[way]) for way in WAYS)
            share = num_atoms**2 / (2 * len(batch.pair_first) + num_atoms)
            print(
                f"| {shape} | {num_atoms} | {share:.1f} | {dense:.1f} | {listed:.1f} "
                f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
