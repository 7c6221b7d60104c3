"""The Euclidean transformer equals the authors' code: energies and forces of seeded random weights, float64.

Numbers: environment variable SO3KRATES_REFERENCE_DIR, folder euclidean_transformer (thorben-frank/mlff, main, 02107c2).
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from so3krates_dist.config import EuclideanTransformerSection
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.euclidean_transformer import EuclideanTransformer
from so3krates_dist.model.potential import ModelStatistics, Potential

REFERENCE = os.environ.get("SO3KRATES_REFERENCE_DIR")
STATISTICS = ModelStatistics(elements=(1, 6, 7, 8), energy_baselines={}, energy_scale=1.0, mean_neighbors=1.0)

# The fixture's sizes.
SECTIONS = {
    "base": EuclideanTransformerSection(
        num_features=24, num_layers=2, num_heads=4, degrees=(1, 2, 3), num_radial_basis=16, cutoff=3.5,
        radial_filter_width=20, spherical_filter_width=6, cutoff_function="cosine", radial_basis="physnet",
        normalization="none", residual_mlp="none", message_scale="sqrt_features",
    ),
    "ln_res": EuclideanTransformerSection(
        num_features=24, num_layers=2, num_heads=4, degrees=(1, 2, 3), num_radial_basis=16, cutoff=3.5,
        radial_filter_width=20, spherical_filter_width=6, cutoff_function="cosine", radial_basis="physnet",
        normalization="pre", residual_mlp="gated", message_scale="sqrt_features",
    ),
}  # fmt: skip
SECTIONS |= {f"{tag}_zbl": dataclasses.replace(section, zbl=True) for tag, section in SECTIONS.items()}


def _import_weights(tag: str, arrays: dict[str, np.ndarray], num_layers: int) -> dict[str, torch.Tensor]:
    """Map the authors' flax names (kernels are (in, out)) to ours."""

    def get(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[f"{tag}/p/{name}"])

    weights = {"embedding.weight": get("feature_embeddings_0/Embed_0/embedding")}
    for i in range(num_layers):
        layer, ours = f"layers_{i}", f"layers.{i}"
        for filter_name, number in (("radial_filter", 0), ("spherical_filter", 1)):
            hidden = [f"{layer}/{block}/filter_fn/VmapMLP_{number}" for block in ("FeatureBlock_0", "GeometricBlock_0")]
            target = f"{ours}.attention.{filter_name}"
            weights[f"{target}.hidden.weight"] = torch.cat([get(f"{h}/layers_0/kernel")[0].T for h in hidden])
            weights[f"{target}.hidden.bias"] = torch.cat([get(f"{h}/layers_0/bias")[0] for h in hidden])
            weights[f"{target}.weight"] = torch.cat([get(f"{h}/layers_1/kernel") for h in hidden])
            weights[f"{target}.bias"] = torch.stack([get(f"{h}/layers_1/bias") for h in hidden])
        feature, geometric = f"{layer}/FeatureBlock_0/attention_fn", f"{layer}/GeometricBlock_0/attention_fn"
        coefficients = "VmapConvAttentionCoefficients_0"
        weights[f"{ours}.attention.feature_projections.weight"] = torch.cat(
            [
                get(f"{feature}/{coefficients}/Dense_0/kernel"),
                get(f"{feature}/{coefficients}/Dense_1/kernel"),
                get(f"{feature}/VmapAttentionAggregation_0/Dense_0/kernel"),
            ],
            dim=-1,
        )
        weights[f"{ours}.attention.geometric_projections.weight"] = torch.cat(
            [get(f"{geometric}/{coefficients}/Dense_{k}/kernel") for k in (0, 1)], dim=-1
        )
        exchange = f"{layer}/InteractionBlock_0/MLP_0/layers_0"
        weights[f"{ours}.exchange.linear.weight"] = get(f"{exchange}/kernel").T
        weights[f"{ours}.exchange.linear.bias"] = get(f"{exchange}/bias")
        if tag.startswith("ln_res"):
            for norm, name in ((0, "pre_attention_norm"), (1, "pre_exchange_norm")):
                weights[f"{ours}.{name}.weight"] = get(f"{layer}/LayerNorm_{norm}/scale")
                weights[f"{ours}.{name}.bias"] = get(f"{layer}/LayerNorm_{norm}/bias")
            for number, name in ((0, "inner_mlp"), (1, "outer_mlp")):
                block = f"{layer}/ResidualMLP_{number}"
                weights[f"{ours}.{name}.inner_first.weight"] = get(f"{block}/Residual_0/layers_0/kernel").T
                weights[f"{ours}.{name}.inner_second.weight"] = get(f"{block}/Residual_0/layers_1/kernel").T
                weights[f"{ours}.{name}.outer.weight"] = get(f"{block}/Dense_0/kernel").T
    for number, name in ((0, "readout_hidden"), (1, "readout")):
        weights[f"{name}.weight"] = get(f"observables_0/MLP_0/layers_{number}/kernel").T
        weights[f"{name}.bias"] = get(f"observables_0/MLP_0/layers_{number}/bias")
    if tag.endswith("_zbl"):
        parts = {
            "exponents": ("a1", "a2", "a3", "a4"),
            "weights": ("c1", "c2", "c3", "c4"),
            "power": "p",
            "inverse_length": "d",
        }
        for name, published in parts.items():
            values = [get(f"observables_0/ZBLRepulsion_0/{part}") for part in published]
            weights[f"repulsion.{name}"] = torch.cat(values)
    return weights


def compute_deviations(tag: str) -> dict[str, float]:
    """Return the deviations of energy and forces, relative to the energy (at least 1) and to the largest force."""
    assert REFERENCE is not None
    arrays = dict(np.load(Path(REFERENCE) / "euclidean_transformer" / "outputs.npz"))
    section = SECTIONS[tag]
    network = EuclideanTransformer(section, 1.0, num_embeddings=100).double()
    network.load_state_dict(_import_weights(tag, arrays, section.num_layers))
    once = arrays["idx_i"] < arrays["idx_j"]  # the fixture lists both directions
    graph = Graph(
        atomic_numbers=arrays["z"], positions=arrays["R"],
        pair_first=arrays["idx_i"][once], pair_second=arrays["idx_j"][once],
    )  # fmt: skip
    outputs = Potential(network, STATISTICS).eval()(collate([graph], torch.float64))
    energy, forces = float(arrays[f"{tag}/E"]), arrays[f"{tag}/F"]
    return {
        "energy": abs(float(outputs["energy"]) - energy) / max(1.0, abs(energy)),
        "forces": float(np.abs(outputs["forces"].numpy() - forces).max() / np.abs(forces).max()),
    }


@pytest.mark.skipif(REFERENCE is None, reason="SO3KRATES_REFERENCE_DIR is not set: reference numbers are not here")
@pytest.mark.parametrize("tag", sorted(SECTIONS))
def test_equals_the_authors_code(tag: str) -> None:
    deviations = compute_deviations(tag)
    assert max(deviations.values()) <= 1e-8, deviations


@pytest.mark.parametrize(
    ("changes", "num_parameters"),
    [
        ({"num_layers": 2}, 223_105),
        ({}, 319_213),
        ({"num_layers": 6}, 607_537),
        ({"normalization": "pre"}, 320_797),
        ({"normalization": "pre", "residual_mlp": "gated"}, 634_429),
        ({"num_features": 128, "degrees": (1, 2, 3, 4)}, 294_269),
    ],
)
def test_parameter_counts_equal_the_authors(changes: dict[str, Any], num_parameters: int) -> None:
    """Counts of the authors' code at its default sizes."""
    sizes = {
        "num_features": 132, "num_layers": 3, "num_heads": 4, "degrees": (1, 2, 3), "num_radial_basis": 32,
        "normalization": "none", "residual_mlp": "none", "message_scale": "sqrt_features",
    }  # fmt: skip
    network = EuclideanTransformer(EuclideanTransformerSection(**{**sizes, **changes}), 1.0, num_embeddings=100)
    assert sum(p.numel() for p in network.parameters()) == num_parameters
