"""Small structures, small models with random weights, and the report of deviations: what the tests of physics start from."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ase
import ase.build
import numpy as np
import pytest
import torch

from so3krates_dist.config import (
    EuclideanTransformerSection,
    GeomAttEnvelopeSection,
    GeomAttSection,
    ModelSection,
    So3kratesSection,
    So3lrSection,
)
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

TRANSFORMERS: dict[str, EuclideanTransformerSection] = {
    name: EuclideanTransformerSection(num_features=24, num_layers=2, num_heads=4, num_radial_basis=12, cutoff=CUTOFF, **overrides)
    for name, overrides in {
        "transformer": {
            "normalization": "none", "residual_mlp": "none", "radial_basis": "physnet", "cutoff_function": "cosine",
            "message_scale": "sqrt_features", "degrees": (1, 2, 3),
        },
        "pre_gated": {
            "normalization": "pre", "residual_mlp": "gated", "radial_basis": "physnet", "cutoff_function": "polynomial",
            "message_scale": "mean_neighbors", "degrees": (1, 2, 3),
        },
        "backbone": {
            "normalization": "post", "residual_mlp": "preactivation", "radial_basis": "bernstein",
            "cutoff_function": "polynomial", "message_scale": "mean_neighbors", "degrees": (1, 2, 3, 4),
        },
        "one_degree": {
            "normalization": "post", "residual_mlp": "gated", "radial_basis": "bernstein", "cutoff_function": "cosine",
            "message_scale": "sqrt_features", "degrees": (2,),
        },
        "repulsive": {
            "normalization": "pre", "residual_mlp": "none", "radial_basis": "physnet", "cutoff_function": "polynomial",
            "message_scale": "sqrt_features", "degrees": (1, 2), "zbl": True, "final_norm": True,
            "sphc_normalization": 5.0,
        },
    }.items()
}  # fmt: skip
"""Options of the Euclidean transformer, each small enough for finite differences"""

SO3KRATES: dict[str, So3kratesSection] = {
    name: So3kratesSection(
        num_features=24, num_heads=4, num_radial_basis=12, cutoff=CUTOFF, radial_filter_width=16, spherical_filter_width=8,
        **{"num_layers": 2, "degrees": (1, 2, 3), **overrides},
    )
    for name, overrides in {
        "so3krates": {},
        "so3krates_scalars": {"degrees": (0, 1, 2), "initial_sphc": "zero", "cutoff_function": "polynomial"},
        "so3krates_non_local": {"non_local": True},
        "so3krates_smooth": {
            "non_local": True, "layer_norm": True, "sphc_norm": True, "initial_sphc": "smooth", "radial_basis": "bernstein",
            "cutoff_function": "polynomial", "sphc_cutoff": 0.3, "degrees": (1, 2),
        },
    }.items()
}  # fmt: skip
"""Options of So3krates"""

SO3LR: dict[str, So3lrSection] = {
    name: So3lrSection(
        num_features=24, num_layers=2, num_heads=4, num_radial_basis=12, cutoff=CUTOFF, degrees=(1, 2, 3), **overrides
    )
    for name, overrides in {
        "so3lr": {"long_range_cutoff": 10.0},
        "so3lr_endless": {"long_range_cutoff": 0.0},
        "so3lr_ewald": {"electrostatics": "ewald", "long_range_cutoff": 10.0},
        "so3lr_semi_local": {
            "zbl": False, "electrostatics": "none", "dispersion": False, "charge_embedding": False, "spin_embedding": False,
        },
    }.items()
}  # fmt: skip
"""Options of SO3LR"""

# With this precision pairs are listed up to exactly 1 Å beyond the grid, where the Gaussians have vanished (5e-17).
_GEOMATT_SIZES: dict[str, Any] = {
    "num_layers": 2, "num_features": 16, "inner_width": 32, "grid_end": 3.0, "grid_spacing": 0.25,
    "gaussian_precision": 24.0, "order_gains": (1.0, 1.0, 1.0),
}  # fmt: skip
GEOMATT: dict[str, ModelSection] = {
    "geomatt": GeomAttSection(algorithm="dense", **_GEOMATT_SIZES),
    "geomatt_list": GeomAttSection(algorithm="neighbor_list", **_GEOMATT_SIZES),
    "geomatt_shared": GeomAttSection(
        **{**_GEOMATT_SIZES, "orders": (3, 5), "order_gains": (), "num_layers": 1}, shared_factors=True, bias=False
    ),
    "geomatt_envelope": GeomAttEnvelopeSection(cutoff=CUTOFF, **_GEOMATT_SIZES),
}
"""Options of GeomAtt"""

OPTIONS: dict[str, ModelSection] = {**TRANSFORMERS, **SO3KRATES, **SO3LR, **GEOMATT}
"""Sections of all models that together have every option that changes a formula"""

PERIODIC = [name for name, section in OPTIONS.items() if "cell" in section.sees and math.isfinite(section.reach)]
"""Options that are fit for crystals"""


def make_potential(
    options: str | ModelSection = "backbone",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    noise: float = 0.2,
    **changes: object,
) -> Potential:
    """Return a potential in evaluation mode; noise on top makes all weights random, those that start as zero or one too.

    Options are a name from `OPTIONS` or a section. Skips the test where the model takes an extra that is not installed.
    """
    torch.manual_seed(seed)
    section = OPTIONS[options] if isinstance(options, str) else options
    section = dataclasses.replace(section, **changes)  # type: ignore[arg-type]
    if section.image_density:
        pytest.importorskip("torchpme", reason="torch-pme (the extra longrange) is not installed")
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


def make_ion(total_charge: float) -> Graph:
    """Return a distorted methanol with a charge, and with an unpaired electron where that makes it odd."""
    return dataclasses.replace(
        make_molecule("CH3OH", 3), total_charge=total_charge, num_unpaired_electrons=total_charge % 2, group="ion"
    )


def make_structures(options: str) -> dict[str, Graph]:
    """Return what a law is tried on: a molecule, ions and, where the model is fit for them, crystals."""
    structures = {"ethanol": make_molecule(), "cation": make_ion(1.0), "anion": make_ion(-1.0)}
    if options in PERIODIC:
        structures |= {"triclinic": make_crystal(), "self_images": make_crystal("self_images")}
    return structures


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
        graph, positions=positions, cell=cell, pair_first=None, pair_second=None, pair_shifts=None,
        num_short_pairs=None,
    )  # fmt: skip


def join(*graphs: Graph) -> Graph:
    """Return several molecules as one structure; charges add up."""
    return Graph(
        atomic_numbers=np.concatenate([g.atomic_numbers for g in graphs]),
        positions=np.concatenate([g.positions for g in graphs]),
        total_charge=sum(g.total_charge for g in graphs),
        num_unpaired_electrons=sum(g.num_unpaired_electrons for g in graphs),
    )


def make_batch(
    graphs: Sequence[Graph], cutoffs: Sequence[float] = (CUTOFF,), dtype: torch.dtype = torch.float64
) -> GraphBatch:
    """Return structures as one batch; pairs are built where they are missing."""
    return collate([g if g.pair_first is not None else build_neighbors(g, *cutoffs) for g in graphs], dtype)


def compute(potential: Potential, *graphs: Graph, stress: bool = False) -> dict[str, np.ndarray]:
    """Return all outputs, on request stress too, of structures computed as one batch in the potential's dtype."""
    dtype = next(potential.parameters()).dtype
    outputs = potential(make_batch(graphs, potential.cutoffs, dtype), compute_stress=stress)
    return {name: tensor.detach().numpy() for name, tensor in outputs.items()}


PER_ATOM = ("forces", "partial_charges", "hirshfeld_ratios")
"""Outputs with one row per atom; the others have one per structure"""


def pick(outputs: Mapping[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    """Return some of the outputs; by default those that no choice of origin or image changes."""
    chosen = names or ("energy", "stress", *PER_ATOM)
    return {name: values for name, values in outputs.items() if name in chosen}


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
