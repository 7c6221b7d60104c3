"""GeomAtt equals the authors' code: energies, forces and attention of seeded random weights, float64.

Numbers: environment variable SO3KRATES_REFERENCE_DIR, folder geomatt (thorben-frank/geomatt, a10656e).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from structures import check_deviations

from so3krates_dist.config import GeomAttSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.geomatt import GeomAtt
from so3krates_dist.model.potential import ModelStatistics, Potential

ELEMENT_ROWS = {1: "H", 3: "Li", 6: "C", 8: "O"}
READOUT = {"readout_hidden": "Q", "readout": "R"}
STATISTICS = ModelStatistics(elements=tuple(ELEMENT_ROWS), energy_baselines={}, energy_scale=1.0, mean_neighbors=1.0)

SHAPES = {"k234": (2, 3, 4), "k2": (2,), "k3": (3,), "k5": (5,)}
VARIANTS = {"": {}, "_nobias": {"bias": False}, "_shared": {"shared_factors": True}}
VARIANTS["_shared_nobias"] = VARIANTS["_nobias"] | VARIANTS["_shared"]
TAGS: dict[str, GeomAttSection] = {
    orders + variant: GeomAttSection(
        orders=SHAPES[orders], num_layers=2, num_features=12, inner_width=16, grid_spacing=0.1, **changes
    )
    for orders in SHAPES
    for variant, changes in VARIANTS.items()
} | {
    "k234_linear": GeomAttSection(num_layers=2, num_features=12, inner_width=16, grid_spacing=0.1, linear_readout=True)
}  # fmt: skip
"""The fixture's sizes; not every combination is in the fixture"""


def import_weights(network: GeomAtt, arrays: Mapping[str, np.ndarray], tag: str) -> dict[str, torch.Tensor]:
    """Map the authors' names to ours: factors Q, R, S, T of a walk are stacked, and so are layers."""

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[f"{tag}/p/{name}"])

    weights = dict(network.state_dict())
    table = torch.zeros_like(weights["embedding.weight"])
    for atomic_number, symbol in ELEMENT_ROWS.items():
        table[atomic_number] = get(f"{symbol}_embeddings").flatten()
    weights["embedding.weight"] = table
    for name, own in list(weights.items()):
        module, field = name.rsplit(".", 1)
        if module in READOUT:
            weights[name] = get(f"energy_extractor.{READOUT[module]}.{field}")
        elif ".values." in name:
            _, stream, _, layer = module.split(".")
            weights[name] = get(f"geom_att.streams.{stream}.interactions.{layer}.W.{field}")
        elif module.startswith("streams."):
            kind, field = field.split("_")
            layers = [f"geom_att.{module}.interactions.{n}.correlator" for n in range(len(own))]
            factors = [letter + {"self": "_0", "pair": ""}[kind] for letter in "QRST"[: own.shape[1]]]
            stacked = [get(f"{layer}.{factor}.{field}") for layer in layers for factor in factors]
            weights[name] = torch.stack(stacked).view_as(own)
    return weights


def compare_attention(potential: Potential, batch: GraphBatch, arrays: Mapping[str, np.ndarray], key: str) -> float:
    """Return the largest deviation of attention of any order and layer, relative to the largest coefficient."""
    section_orders = [stream.order for stream in potential.network.streams]  # type: ignore[union-attr]
    maps, num_atoms = potential.record_attention(batch), len(batch.atomic_numbers)
    num_layers = len(maps) // len(section_orders)
    found = [(m.layer, m.kind, m.heads) for m in maps]
    assert found == [(n, f"order {k}", ("attention",)) for n in range(num_layers) for k in section_orders]
    worst = 0.0
    for kept in maps:
        expected = arrays[f"{key}/attention/{section_orders.index(int(kept.kind.split()[1]))}/{kept.layer}"]
        values = np.full((num_atoms, num_atoms), np.nan)
        values[kept.receivers.numpy(), kept.senders.numpy()] = kept.values[:, 0].numpy()
        worst = max(worst, float(np.abs(values - expected).max() / max(1.0, np.abs(expected).max())))
    return worst


Algorithm = Literal["dense", "neighbor_list", "auto"]


def compute_deviations(algorithm: Algorithm, reference_dir: Path) -> dict[str, float]:
    """Return the deviations of all tags and molecules, relative to the largest value (at least 1, but for forces)."""
    arrays = dict(np.load(reference_dir / "geomatt" / "outputs.npz"))
    tags, deviations = [str(tag) for tag in arrays["tags"]], {}
    assert len(tags) == 14
    for tag in tags:
        section = dataclasses.replace(TAGS[tag], algorithm=algorithm)
        network = GeomAtt(section, 1.0).double()
        network.load_state_dict(import_weights(network, arrays, tag))
        potential = Potential(network, STATISTICS).eval()
        for molecule in ("ethanol", "c2h2"):
            key = f"{tag}/{molecule}"
            graph = Graph(atomic_numbers=arrays[f"{key}/atomic_numbers"], positions=arrays[f"{key}/positions"])
            batch = collate([build_neighbors(graph, *potential.cutoffs)], torch.float64)
            outputs = potential(batch)
            energy, forces = float(arrays[f"{key}/E"]), arrays[f"{key}/F"]
            deviations[f"{key} energy"] = abs(float(outputs["energy"]) - energy) / max(1.0, abs(energy))
            difference = np.abs(outputs["forces"].numpy() - forces).max()
            deviations[f"{key} forces"] = float(difference / np.abs(forces).max())
            deviations[f"{key} attention"] = compare_attention(potential, batch, arrays, key)
    return deviations


@pytest.mark.parametrize("algorithm", ["dense", "neighbor_list", "auto"])
def test_equals_the_authors_code(algorithm: Algorithm, reference_dir: Path) -> None:
    check_deviations(compute_deviations(algorithm, reference_dir), 1e-12)


def test_parameter_counts_equal_the_authors() -> None:
    """Counts of the authors' code at its default sizes, with its vectors for H, Li, C and O."""
    counts = {rows: sum(p.numel() for p in GeomAtt(GeomAttSection(), 1.0, rows).parameters()) for rows in (4, 119)}
    assert counts == {4: 436_545, 119: 436_545 + 115 * 128}


def test_initial_attention_has_the_authors_size() -> None:
    """Mean |alpha| of new weights: 1.8e-3, 1.6e-4 and 6e-6 for orders 2, 3 and 4 (ethanol, the authors' code)."""
    torch.manual_seed(0)
    positions = np.random.default_rng(0).normal(scale=1.3, size=(9, 3))
    graph = Graph(atomic_numbers=np.array([6, 6, 8, 1, 1, 1, 1, 1, 1]), positions=positions)
    potential = Potential(GeomAtt(GeomAttSection(), 1.0).double(), STATISTICS)
    maps = potential.record_attention(collate([build_neighbors(graph, *potential.cutoffs)], torch.float64))
    for order, expected in {2: 1.8e-3, 3: 1.6e-4, 4: 6e-6}.items():
        sizes = [float(m.values.abs().mean()) for m in maps if m.kind == f"order {order}"]
        assert expected / 3 < np.mean(sizes) < expected * 3
