"""How much faster are products of spherical harmonics than e3nn's generated polynomials, where forces are learned?

A step is what training does to the harmonics: forward, first derivative with a graph, backward of a loss of that derivative.
Both ways are timed in turn (pairs of runs, the order alternates), alone and inside a step of the whole default model.

    OMP_NUM_THREADS=1 python tests/benchmarks/spherical_harmonics.py
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import e3nn
import torch
from e3nn import o3
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from structures import STATISTICS, make_batch, make_molecule

from so3krates_dist.config import EuclideanTransformerSection
from so3krates_dist.graph import GraphBatch
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.model.spherical import SphericalHarmonics

DEGREES = (1, 2, 3, 4)


class GeneratedHarmonics(nn.Module):
    """What the products replaced."""

    def forward(self, directions: torch.Tensor) -> torch.Tensor:
        return o3.spherical_harmonics(list(DEGREES), directions[:, [1, 2, 0]], False, "integral")


def make_step(harmonics: nn.Module, num_pairs: int) -> Callable[[], None]:
    """Return a step of the harmonics alone, with 24 weights so that there is something to learn."""
    torch.manual_seed(0)
    vectors, weights = torch.randn(num_pairs, 3, requires_grad=True), torch.randn(24, requires_grad=True)

    def step() -> None:
        directions = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        energy = torch.tanh(harmonics(directions) @ weights).sum()
        (gradient,) = torch.autograd.grad(energy, vectors, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), weights)

    return step


def make_model_step(harmonics: nn.Module, batch: GraphBatch) -> Callable[[], None]:
    """Return a step of the default model: forces, loss of forces, gradients of all weights."""
    torch.manual_seed(0)
    potential: Potential = build_model(EuclideanTransformerSection(degrees=DEGREES), STATISTICS).train()
    potential.network.harmonics = harmonics
    weights = list(potential.parameters())

    def step() -> None:
        torch.autograd.grad(potential(batch)["forces"].square().sum(), weights, allow_unused=True)

    return step


def time_in_turn(steps: dict[str, Callable[[], None]], runs: int, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds per step, one number per run and way; who comes first alternates."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs):
        for name in list(steps)[:: 1 if run % 2 else -1]:
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            times[name].append((time.perf_counter() - start) / repeats * 1e3)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Print medians and the median of the ratios of paired runs, with their quartiles."""
    ratios = [g / p for g, p in zip(times["generated"], times["products"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"| {title} | {medians['generated']:.2f} | {medians['products']:.2f} | {middle:.2f} ({low:.2f} to {high:.2f}) |",
        flush=True,
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=31, help="paired runs of each measurement")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, e3nn {e3nn.__version__}, {runs} paired runs\n"
    )
    print("| step | generated, ms | products, ms | ratio of paired runs: median (quartiles) |\n|---|---|---|---|")
    ways = {"generated": GeneratedHarmonics(), "products": SphericalHarmonics(DEGREES)}
    for num_pairs in (360, 5000):
        repeats = max(1, 10_000 // num_pairs)
        steps = {name: make_step(harmonics, num_pairs) for name, harmonics in ways.items()}
        report(f"harmonics alone, {num_pairs} pairs", time_in_turn(steps, runs, repeats))
    for num_molecules in (10, 139):  # of ethanol, 36 pairs each
        batch = make_batch([make_molecule(seed=s) for s in range(num_molecules)], (5.0,), torch.float32)
        steps = {name: make_model_step(harmonics, batch) for name, harmonics in ways.items()}
        title = f"whole model (128 features, 3 layers), {len(batch.pair_first)} pairs"
        report(title, time_in_turn(steps, runs if num_molecules < 50 else max(3, runs // 3), 1))


if __name__ == "__main__":
    main()
