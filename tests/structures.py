"""Small structures, small models with random weights, and the report of deviations: what the tests of physics start from."""

import dataclasses
from collections.abc import Mapping, Sequence

import ase
import ase.build
import numpy as np
import torch

from so3krates_dist.config import ModelSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model

CUTOFF = 4.0

STATISTICS = ModelStatistics(
    elements=(1, 6, 7, 8),
    energy_baselines={1: -0.5, 6: -1.25, 7: -0.75, 8: -2.0},  # small, so that relative limits stay sharp
    energy_scale=1.3,
    mean_neighbors=6.5,
)

OPTIONS: dict[str, ModelSection] = {
    name: ModelSection(num_features=24, num_layers=2, num_heads=4, num_radial_basis=12, cutoff=CUTOFF, **overrides)
    for name, overrides in {
        "transformer": {
            "normalization": "none", "residual_mlp": "none", "radial_basis": "physnet", "cutoff_function": "cosine",
            "message_scale": "sqrt_features", "degrees": (1, 2, 3),
        },
        "pre_gated": {
            "normalization": "pre", "residual_mlp": "gated", "radial_basis": "physnet", "cutoff_function": "polynomial",
            "message_scale": "mean_neighbors", "degrees": (1, 2, 3),
        },
        "so3lr": {
            "normalization": "post", "residual_mlp": "preactivation", "radial_basis": "bernstein",
            "cutoff_function": "polynomial", "message_scale": "mean_neighbors", "degrees": (1, 2, 3, 4),
        },
        "one_degree": {
            "normalization": "post", "residual_mlp": "gated", "radial_basis": "bernstein", "cutoff_function": "cosine",
            "message_scale": "sqrt_features", "degrees": (2,),
        },
    }.items()
}  # fmt: skip
"""Model sections that together have every option, each small enough for finite differences"""


def make_potential(
    options: str = "so3lr", dtype: torch.dtype = torch.float64, seed: int = 0, noise: float = 0.2, **changes: object
) -> Potential:
    """Return a potential in evaluation mode; noise on top makes all weights random, those that start as zero or one too."""
    torch.manual_seed(seed)
    section = dataclasses.replace(OPTIONS[options], **changes)  # type: ignore[arg-type]
    potential = build_model(section, STATISTICS)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return potential.to(dtype=dtype).eval()


def from_atoms(atoms: ase.Atoms, group: str = "") -> Graph:
    """Return ASE's structure as a graph without pairs."""
    periodic = bool(atoms.pbc.any())
    return Graph(
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=atoms.positions.copy(),
        cell=atoms.cell.array.copy() if periodic else None,
        pbc=atoms.pbc.copy() if periodic else None,
        group=group,
    )


def make_molecule(name: str = "CH3CH2OH", seed: int | None = 0) -> Graph:
    """Return a molecule of ASE's g2 set, its atoms moved by 0.1 Å at random (no seed: exactly symmetric)."""
    graph = from_atoms(ase.build.molecule(name), name)
    if seed is not None:
        graph.positions += np.random.default_rng(seed).normal(scale=0.1, size=graph.positions.shape)
    return graph


def make_crystal(name: str = "triclinic") -> Graph:
    """Return a triclinic cell: of four atoms, or of two in a cell so small that atoms are neighbours of their own images."""
    fractions = np.array([[0.02, 0.01, 0.03], [0.31, 0.22, 0.41], [0.61, 0.72, 0.23], [0.22, 0.65, 0.75]])
    if name == "triclinic":
        cell = np.array([[5.1, 0.0, 0.0], [0.8, 4.7, 0.0], [-0.6, 1.1, 4.3]])
        numbers = np.array([6, 8, 1, 7])
    else:
        cell = np.array([[2.6, 0.2, 0.0], [0.4, 2.8, -0.1], [-0.3, 0.5, 3.0]])
        numbers = np.array([6, 8])
    positions = fractions[: len(numbers)] @ cell
    return Graph(
        atomic_numbers=numbers, positions=positions, cell=cell, pbc=np.ones(3, bool), group=name,
    )  # fmt: skip


def move(graph: Graph, positions: np.ndarray, cell: np.ndarray | None = None) -> Graph:
    """Return the structure with other positions and, where given, another cell; without pairs."""
    cell = graph.cell if cell is None else cell
    return dataclasses.replace(
        graph, positions=positions, cell=cell, pair_first=None, pair_second=None, pair_shifts=None
    )


def join(*graphs: Graph) -> Graph:
    """Return several molecules as one structure."""
    return Graph(
        atomic_numbers=np.concatenate([g.atomic_numbers for g in graphs]),
        positions=np.concatenate([g.positions for g in graphs]),
    )


def make_batch(graphs: Sequence[Graph], cutoff: float = CUTOFF, dtype: torch.dtype = torch.float64) -> GraphBatch:
    """Return structures as one batch; pairs are built where they are missing."""
    return collate([g if g.pair_first is not None else build_neighbors(g, cutoff) for g in graphs], dtype)


def compute(potential: Potential, *graphs: Graph, stress: bool = False) -> dict[str, np.ndarray]:
    """Return energy, forces and on request stress of structures, computed as one batch in the potential's dtype."""
    dtype = next(potential.parameters()).dtype
    outputs = potential(make_batch(graphs, potential.cutoff, dtype), compute_stress=stress)
    return {name: tensor.detach().numpy() for name, tensor in outputs.items()}


def measure(values: np.ndarray | float, expected: np.ndarray | float) -> float:
    """Return the largest deviation, relative to the largest expected value where that is above one."""
    values, expected = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    assert values.shape == expected.shape, f"shapes {values.shape} and {expected.shape}"
    if not values.size:
        return 0.0
    return float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max()))


def compare(values: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the deviation of every field."""
    assert values.keys() == expected.keys()
    return {name: measure(values[name], expected[name]) for name in expected}


def check_deviations(deviations: Mapping[str, float], limit: float | Mapping[str, float]) -> None:
    """Fail where a deviation is above its limit or is not a number, and then name all of them, the worst first."""
    assert deviations, "nothing was compared"
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(deviations, limit)
    shares = {name: value / limits[name] if np.isfinite(value) else np.inf for name, value in deviations.items()}
    ranked = sorted(shares, key=lambda name: -shares[name])
    lines = [f"{name}: {deviations[name]:.3g} (limit {limits[name]:.0e})" for name in ranked]
    assert shares[ranked[0]] <= 1, "\n".join(["deviations, the worst first:", *lines])
