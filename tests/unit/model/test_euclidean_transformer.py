"""The network as a whole: where its options put which module, shapes, and the element table."""

import dataclasses
import typing

import numpy as np
import pytest
import torch
from structures import OPTIONS, TRANSFORMERS, make_batch, make_crystal, make_molecule
from torch import nn

from so3krates_dist.config import EuclideanTransformerSection, ModelSection
from so3krates_dist.model.euclidean_transformer import EuclideanLayer, EuclideanTransformer
from so3krates_dist.model.potential import compute_vectors

NORMS = ("pre_attention_norm", "post_attention_norm", "pre_exchange_norm", "post_exchange_norm")


def get_layer(section: ModelSection) -> EuclideanLayer:
    layer = EuclideanTransformer(section, 5.0).layers[0]
    assert isinstance(layer, EuclideanLayer)
    return layer


@pytest.mark.parametrize(("normalization", "expected"), [("none", ()), ("pre", NORMS[::2]), ("post", NORMS[1::2])])
def test_where_the_norms_are(normalization: typing.Any, expected: tuple[str, ...]) -> None:
    layer = get_layer(dataclasses.replace(OPTIONS["backbone"], normalization=normalization))
    assert tuple(name for name in NORMS if isinstance(getattr(layer, name), nn.LayerNorm)) == expected


def test_message_scales() -> None:
    section = OPTIONS["backbone"]  # 24 features, 4 heads, 4 degrees
    assert get_layer(section).attention.scales == (5.0, 5.0)
    section = dataclasses.replace(section, message_scale="sqrt_features", degrees=(1, 2, 3))
    assert get_layer(section).attention.scales == (6**0.5, 8**0.5)


def test_filter_widths() -> None:
    default = get_layer(OPTIONS["backbone"]).attention
    assert (default.radial_filter.num_hidden, default.spherical_filter.num_hidden) == (24, 6)
    section = dataclasses.replace(OPTIONS["backbone"], radial_filter_width=10, spherical_filter_width=3)
    given = get_layer(section).attention
    assert (given.radial_filter.num_hidden, given.spherical_filter.num_hidden) == (10, 3)


def test_parameter_count_of_so3lrs_backbone() -> None:
    """SO3LR's sizes (10.1021/jacs.5c09558): 3 layers of 121,812, element table 15,232, energy readout 16,512 + 129."""
    section = EuclideanTransformerSection(cutoff=4.5, spherical_filter_width=32)
    network = EuclideanTransformer(section, 13.17)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in network.layers]
    assert layers == [121_812] * 3
    assert network.embedding.weight.numel() == 15_232
    assert sum(p.numel() for p in network.parameters()) == 3 * 121_812 + 15_232 + 16_512 + 129


def test_element_table() -> None:
    torch.manual_seed(0)
    table = EuclideanTransformer(EuclideanTransformerSection(num_features=64), 5.0).embedding.weight
    assert table.shape == (119, 64)
    assert table.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert table.detach().abs().max() > 3 / 8  # not truncated


@pytest.mark.parametrize("options", TRANSFORMERS)
def test_one_number_per_atom(options: str) -> None:
    network = EuclideanTransformer(OPTIONS[options], 5.0)
    batch = make_batch([make_molecule(), make_crystal("self_images")], dtype=torch.float32)
    outputs = network(batch, compute_vectors(batch))
    assert list(outputs) == (["atom_energies", "physical_energies"] if TRANSFORMERS[options].zbl else ["atom_energies"])
    for energies in outputs.values():
        assert energies.shape == (11,)
        assert energies.dtype == torch.float32


def test_edges_go_both_ways_along_every_pair() -> None:
    network = EuclideanTransformer(OPTIONS["backbone"], 5.0)
    batch = make_batch([make_molecule(), make_crystal("self_images")])
    vectors = compute_vectors(batch)
    pairs = network._build_pairs(batch, vectors)
    assert torch.equal(pairs.receivers, torch.cat([batch.pair_first, batch.pair_second]))
    assert torch.equal(pairs.senders, torch.cat([batch.pair_second, batch.pair_first]))
    to_senders = torch.nn.functional.normalize(torch.cat([vectors, -vectors]), dim=-1)
    torch.testing.assert_close(pairs.harmonics, network.harmonics(to_senders), rtol=0, atol=1e-14)
    distances = vectors.norm(dim=1)
    torch.testing.assert_close(pairs.radial, network.radial_basis(distances), rtol=1e-12, atol=0)
    torch.testing.assert_close(pairs.envelope[:, 0], network.compute_envelope(distances, 4.0), rtol=0, atol=1e-14)


def test_an_atom_sees_the_elements_of_its_neighbours() -> None:
    """In one layer already: messages come from the neighbours' features, not from its own."""
    torch.manual_seed(0)
    network = EuclideanTransformer(dataclasses.replace(OPTIONS["backbone"], num_layers=1), 5.0).double()
    batch = make_batch([make_molecule("CO2")])
    before = network(batch, compute_vectors(batch))["atom_energies"]
    batch.atomic_numbers[2] = 7
    after = network(batch, compute_vectors(batch))["atom_energies"]
    assert (before - after).detach().abs().min() > 1e-5


def test_layers_have_weights_of_their_own() -> None:
    network = EuclideanTransformer(OPTIONS["backbone"], 5.0)
    first, second = (layer.attention.feature_projections.weight for layer in network.layers)
    assert not torch.equal(first, second)


def test_state_holds_weights_only() -> None:
    network = EuclideanTransformer(OPTIONS["backbone"], 5.0)
    assert sorted(network.state_dict()) == sorted(name for name, _ in network.named_parameters())


def test_first_euclidean_variables_are_sums_of_harmonics() -> None:
    """Equation 11 of arXiv 2309.15126, written out for each atom; they reach the features, unlike zeros."""
    section = dataclasses.replace(TRANSFORMERS["transformer"], sphc_normalization=7.0)
    network = EuclideanTransformer(section, 5.0).double()
    graph, batch = make_molecule(), make_batch([make_molecule()])
    _, pairs = network.compute_features(batch, compute_vectors(batch), None)
    start = network._start_ev_features(network.embed(batch), pairs)
    assert start is not None
    for atom in range(graph.num_atoms):
        vectors = torch.from_numpy(np.delete(graph.positions, atom, axis=0) - graph.positions[atom])
        distances = torch.linalg.vector_norm(vectors, dim=-1)
        weights = torch.where(distances < 4, (1 + torch.cos(torch.pi * distances / 4)) / 2, 0.0)
        expected = weights @ network.harmonics(vectors / distances[:, None]) / 7
        torch.testing.assert_close(start[atom], expected, rtol=1e-12, atol=1e-14)
    zero = EuclideanTransformer(dataclasses.replace(section, sphc_normalization=0.0), 5.0).double()
    zero.load_state_dict(network.state_dict())
    energies = [n(batch, compute_vectors(batch))["atom_energies"] for n in (network, zero)]
    assert not torch.allclose(*energies, atol=1e-3)


def test_final_norm_is_the_last_thing_before_the_readout() -> None:
    section = dataclasses.replace(TRANSFORMERS["pre_gated"], final_norm=True)
    network, batch = EuclideanTransformer(section, 5.0).double(), make_batch([make_molecule()])
    features, _ = network.compute_features(batch, compute_vectors(batch), None)
    torch.testing.assert_close(features.mean(-1), torch.zeros_like(features[:, 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones_like(features[:, 0]), rtol=1e-3, atol=0)
