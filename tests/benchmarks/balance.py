"""How long processes wait for each other because their portions of a step differ in cost: fixed numbers of conformers, or lanes.

    OMP_NUM_THREADS=1 python tests/benchmarks/balance.py [--seed N]

No data, no training: conformers are drawn from two distributions of sizes, and a step takes as long as its heaviest portion. The
idle share is 1 - mean / max of the portions' costs, averaged over steps. Cost: neighbour pairs + 3 per atom. Results: balance.md.
"""

import argparse
import time

import numpy as np

from so3krates_dist.data.permutation import IntArray
from so3krates_dist.data.plan import Plan, PlanSettings

SPICE = (
    # conformations, least atoms, most atoms (README of openmm/spice-dataset, version 2.0)
    (33_850, 26, 60), (1_300, 79, 96), (345_676, 2, 34), (18_700, 3, 22), (1_398_566, 3, 50), (13_934, 63, 110),
    (194_174, 24, 72), (1_426, 2, 2), (1_000, 90, 90),
)  # fmt: skip
NEIGHBORS = ((2, 5, 15, 25, 45, 90), (1, 4, 10.5, 15, 20, 27))
"""atoms, and neighbours within 5 Å of an atom, of drug-like molecules; in between by interpolation"""
BLOCK, BLOCKS_PER_LANE, PER_STEP = 128, 8, 16


def draw_atoms(kind: str, count: int, rng: np.random.Generator) -> IntArray:
    """Draw numbers of atoms: SPICE's subsets, each triangular over its range; or lognormal up to 350 atoms, like OMol25."""
    if kind == "OMol-like":
        return np.clip(np.rint(rng.lognormal(np.log(45), 0.62, count)), 2, 350).astype(np.int64)
    sizes, low, high = (np.array(column, float) for column in zip(*SPICE, strict=True))
    subset = rng.choice(len(SPICE), count, p=sizes / sizes.sum())
    drawn = low[subset] + (high - low)[subset] * rng.triangular(0, 0.6, 1, count)
    return np.maximum(np.rint(drawn).astype(np.int64), 2)


class Drawn:
    """A data set of which only the sizes exist."""

    name = fingerprint = "drawn"

    def __init__(self, kind: str, num_blocks: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.block_sizes = np.full(num_blocks, BLOCK)
        self.block_shards = np.arange(num_blocks) // 256
        self.atoms = draw_atoms(kind, num_blocks * BLOCK, rng)
        neighbors = np.interp(self.atoms, *NEIGHBORS) * (1 + 0.08 * rng.standard_normal(len(self.atoms)))
        self.pairs = np.rint(self.atoms * np.clip(neighbors, 0, self.atoms - 1) / 2).astype(np.int64)

    def sizes(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Return atoms and pairs of all conformers of some blocks."""
        rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        return self.atoms[rows], self.pairs[rows]

    def costs(self) -> IntArray:
        """Return (num_conformers,) costs."""
        return self.pairs + 3 * self.atoms


def measure_idle(loads: IntArray) -> float:
    """Return the share of the time that processes wait; loads are (processes, steps)."""
    return float(np.mean(1 - loads.mean(axis=0) / loads.max(axis=0)))


def measure_fixed(source: Drawn, ranks: int, per_rank: int) -> float:
    """Return the idle share where each process takes so many conformers as they come."""
    costs = source.costs()
    steps = len(costs) // (ranks * per_rank)
    return measure_idle(costs[: steps * ranks * per_rank].reshape(steps, ranks, per_rank).sum(axis=2).T)


def measure_atoms_budget(source: Drawn, ranks: int) -> float:
    """Return the idle share where each process fills up to a number of atoms, of some sixteen conformers."""
    ends = np.cumsum(source.atoms)
    batch = ends // int(PER_STEP * source.atoms.mean())
    loads = np.bincount(batch, weights=source.costs())[:-1]
    steps = len(loads) // ranks
    return measure_idle(loads[: steps * ranks].reshape(steps, ranks).T)


def measure_lanes(source: Drawn, ranks: int, seed: int) -> tuple[float, float]:
    """Return the idle share of the plan's lanes, one for each process, and seconds to plan a window."""
    settings = PlanSettings(
        weights=(1.0,), seed=seed, lanes=ranks, window_blocks=BLOCKS_PER_LANE * ranks, batch_size=PER_STEP * ranks
    )
    plan = Plan([source], settings)
    start = time.perf_counter()
    loads = [plan.window(number).loads() for number in range(2)]
    seconds = (time.perf_counter() - start) / 2
    return measure_idle(np.concatenate(loads, axis=1)), seconds


def main() -> None:
    """Print a table for both distributions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    for kind in ("SPICE-like", "OMol-like"):
        for ranks in (8, 64, 512):
            source = Drawn(kind, 2 * BLOCKS_PER_LANE * ranks, seed)
            fixed = ", ".join(f"{100 * measure_fixed(source, ranks, n):.1f}" for n in (4, 16, 64))
            lanes, seconds = measure_lanes(source, ranks, seed)
            print(
                f"{kind}, {ranks} processes: idle {fixed} % at 4, 16, 64 conformers each;"
                f" {100 * measure_atoms_budget(source, ranks):.1f} % with an atoms budget; {100 * lanes:.2f} % in lanes"
                f" (a window of {BLOCKS_PER_LANE * BLOCK * ranks:,} conformers planned in {1000 * seconds:.0f} ms)"
            )


if __name__ == "__main__":
    main()
