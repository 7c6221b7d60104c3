"""What the tests of the data tools share: a verb run as the console command runs it, and small labelled structures."""

import argparse
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from so3krates_dist.graph import Graph

WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]])


@pytest.fixture
def run_tool() -> Callable[..., int]:
    """Run a module of data_tools with command line words; returns the exit code."""

    def run(module: ModuleType, *words: object) -> int:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args([str(w) for w in words]))
        return code

    return run


@pytest.fixture
def make_water() -> Callable[..., list[Graph]]:
    """Make water molecules with springs between their atoms: energies and forces belong together exactly."""

    def make(num: int, seed: int = 0, group: str = "water") -> list[Graph]:
        generator = np.random.default_rng(seed)
        first, second = np.array([0, 0, 1]), np.array([1, 2, 2])
        rest = np.linalg.norm(WATER[first] - WATER[second], axis=1)
        graphs = []
        for _ in range(num):
            positions = WATER + 0.05 * generator.standard_normal((3, 3))
            vectors = positions[second] - positions[first]
            lengths = np.linalg.norm(vectors, axis=1)
            pull = 30 * ((lengths - rest) / lengths)[:, None] * vectors
            forces = np.zeros((3, 3))
            np.add.at(forces, first, pull)
            np.add.at(forces, second, -pull)
            energy = -2078.0 + 0.5 * 30 * float(np.sum((lengths - rest) ** 2))
            numbers = np.array([8, 1, 1])
            graphs.append(Graph(atomic_numbers=numbers, positions=positions, energy=energy, forces=forces, group=group))
        return graphs

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    """Return what random files are made with."""
    return np.random.default_rng(11)
