"""A potential with a formula, and small data sets and run folders made with it: what several tests start from."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from so3krates_dist.config import DataSection, EuclideanTransformerSection, RunConfig, RunSection, dump_config
from so3krates_dist.data import shards
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.statistics import compute_statistics
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, save_model


class MorseNetwork(nn.Module):
    """Morse pairs, D ((1 - exp(-a (r - r0)))^2 - 1), brought to zero at the cutoff by 1 - 10u^3 + 15u^4 - 6u^5.

    P. M. Morse, Phys. Rev. 34, 57 (1929). Depth in eV, lengths in Å; half of each pair's energy belongs to either atom.
    """

    def __init__(self, cutoff: float = 6.0) -> None:
        super().__init__()
        self.cutoff = self.reach = cutoff
        self.sees, self.uses_positions, self.checkpointing = frozenset({"cell"}), False, "none"
        self.depth, self.width, self.distance = (nn.Parameter(torch.tensor(v)) for v in (0.35, 1.4, 2.6))

    def forward(self, batch: GraphBatch, vectors: torch.Tensor, record: object = None) -> dict[str, torch.Tensor]:
        distances = vectors.norm(dim=1)
        u = distances / self.cutoff
        envelope = torch.where(u < 1, 1 - 10 * u**3 + 15 * u**4 - 6 * u**5, 0.0)
        wells = (1 - torch.exp(-self.width * (distances - self.distance))) ** 2 - 1
        halves = self.depth * wells * envelope / 2
        energies = vectors.new_zeros(len(batch.atomic_numbers))
        energies = energies.index_add(0, batch.pair_first, halves).index_add(0, batch.pair_second, halves)
        return {"atom_energies": energies}


def make_morse() -> Potential:
    """Return neon and argon bound by Morse pairs, with per-element energies as large as real ones."""
    statistics = ModelStatistics(
        elements=(10, 18), energy_baselines={10: -3507.25, 18: -14354.5}, energy_scale=1.0, mean_neighbors=1.0
    )
    return Potential(MorseNetwork(), statistics).eval().requires_grad_(False)


def make_cluster(seed: int, num_atoms: int = 6, group: str = "cluster") -> Graph:
    """Return a distorted cluster of neon and argon atoms, neighbours about 2.6 Å apart."""
    rng = np.random.default_rng(seed)
    side = math.ceil(num_atoms ** (1 / 3))
    grid = 2.6 * np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:num_atoms]
    positions = grid + rng.normal(scale=0.15, size=(num_atoms, 3))
    numbers = rng.choice([10, 18], num_atoms)
    return Graph(atomic_numbers=numbers.astype(np.int64), positions=positions, group=group)


def label(graph: Graph, potential: Potential | None = None) -> Graph:
    """Return the structure with its energy and forces, and its stress where it is periodic."""
    potential = potential or make_morse()
    batch = collate([build_neighbors(graph, *potential.cutoffs)], torch.float64)
    output = {k: v.numpy() for k, v in potential(batch, compute_stress=graph.is_periodic).items()}
    stress = output["stress"][0] if graph.is_periodic else None
    return dataclasses.replace(graph, energy=float(output["energy"][0]), forces=output["forces"], stress=stress)


def make_random_graph(seed: int, *, num_atoms: int | None = None, everything: bool = False) -> Graph:
    """Return a structure with random labels that obey no physics, with all that a structure may have on request."""
    generator = np.random.default_rng(seed)
    size = num_atoms or int(generator.integers(1, 9))
    graph = Graph(
        atomic_numbers=generator.integers(1, 118, size),
        positions=generator.normal(size=(size, 3)).astype(np.float32),
        energy=float(generator.normal() - 1e6),
        forces=generator.normal(size=(size, 3)).astype(np.float32),
        total_charge=float(generator.integers(-2, 3)),
        group=f"molecule.{seed % 3}",
    )
    if everything:
        graph.cell, graph.pbc = generator.normal(size=(3, 3)), np.array([True, True, False])
        graph.stress = generator.normal(size=(3, 3)).astype(np.float32)
        graph.dipole = generator.normal(size=3).astype(np.float32)
        graph.partial_charges = generator.normal(size=size).astype(np.float32)
        graph.hirshfeld_ratios = generator.uniform(0.5, 1.2, size).astype(np.float32)
    return graph


def assert_same_graph(first: Graph, second: Graph) -> None:
    """Compare all fields of two structures bit for bit."""
    for field in dataclasses.fields(Graph):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


def write_graphs(
    folder: Path,
    by_split: Mapping[str, Sequence[Graph]],
    *,
    block_size: int = 4,
    blocks_per_shard: int = 3,
    **fields: Any,
) -> shards.Manifest:
    """Write structures as shards, index and manifest; `fields` are those of the manifest that matter."""
    folder.mkdir(parents=True)
    index = shards.IndexBuilder(folder)
    sizes: Any = {"block_size": block_size, "blocks_per_shard": blocks_per_shard}
    entries = [
        entry
        for split in shards.SPLITS
        for entry in shards.write_shards(folder, split, by_split.get(split, ()), index=index, **sizes)
    ]
    known: Any = {"name": "small", "level_of_theory": "none", "licence": "MIT", "splits": {}, "groups": {}}
    known |= {"statistics": {}, "provenance": {}, "shards": entries} | fields
    return shards.write_index_and_manifest(folder, shards.build_manifest(**known), index)


def write_dataset(folder: Path, splits: Mapping[str, Sequence[Graph]], name: str = "small") -> Path:
    """Write labelled structures as a data set with its manifest."""
    graphs = [g for split in splits.values() for g in split]
    write_graphs(
        folder,
        splits,
        name=name,
        level_of_theory="Morse",
        licence="unknown",
        splits={s: len(g) for s, g in splits.items()},
        groups={n: sum(g.group == n for g in graphs) for n in sorted({g.group for g in graphs})},
        statistics=compute_statistics(splits["train"], None),
    )
    return folder


def make_run(folder: Path, dataset: Path) -> Path:
    """Make a run folder with a small untrained So3krates model for a data set."""
    section = EuclideanTransformerSection(
        num_features=16, num_layers=1, num_heads=2, degrees=(1, 2), num_radial_basis=8, cutoff=4.0
    )
    config = RunConfig(run=RunSection(folder=str(folder)), data=DataSection(folder=str(dataset)), model=section)
    statistics = ModelStatistics.from_manifest(shards.load_manifest(dataset).statistics, section)
    torch.manual_seed(0)
    save_model(folder, section, statistics, build_model(section, statistics).state_dict(), {"step": 0})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder
