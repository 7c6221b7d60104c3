"""Files with labels for the tests of conversions, and what became of them."""

from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from so3krates_dist.data.shards import SPLITS, iter_graphs, load_manifest
from so3krates_dist.graph import Graph
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS


def write_npz(path: Path, graphs: list[Graph], *, units: tuple[str, str] = ("kcal/mol", "Angstrom"), **others) -> Path:
    e, x = ENERGY_UNITS[units[0]], LENGTH_UNITS[units[1]]
    arrays = {
        "z": graphs[0].atomic_numbers.astype(np.uint8),
        "R": np.stack([g.positions for g in graphs]) / x,
        "E": np.array([[g.energy] for g in graphs]) / e,
        "F": np.stack([g.forces for g in graphs]) / (e / x),
    } | others
    arrays = {k: v for k, v in arrays.items() if v is not None}
    np.savez(path, **arrays)
    return path


def write_xyz(path: Path, graphs: list[Graph], *, prefix: str | None = None, info: dict | None = None) -> Path:
    frames = []
    for graph in graphs:
        atoms = ase.Atoms(graph.atomic_numbers, graph.positions)
        atoms.info |= info or {}
        if prefix is None:
            atoms.calc = SinglePointCalculator(atoms, energy=graph.energy, forces=graph.forces)
        else:
            atoms.info[f"{prefix}energy"], atoms.arrays[f"{prefix}forces"] = graph.energy, graph.forces
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")
    return path


def load_all(folder: Path) -> list[Graph]:
    manifest = load_manifest(folder)
    return [g for s in SPLITS for g in iter_graphs(folder, manifest, s)]


def assert_same_structures(found: list[Graph], expected: list[Graph]) -> None:
    by_energy = {round(g.energy, 6): g for g in found}
    assert len(by_energy) == len(expected)
    for graph in expected:
        other = by_energy[round(graph.energy, 6)]
        np.testing.assert_allclose(other.positions, graph.positions, atol=1e-6)
        np.testing.assert_allclose(other.forces, graph.forces, atol=1e-5)
