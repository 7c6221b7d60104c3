"""The attention block against a loop over directed edges, head by head."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from so3krates_dist.model.attention import EuclideanAttention, HeadProjections, PairGeometry, PairNetwork, compute_in
from so3krates_dist.model.record import AttentionRecord
from so3krates_dist.model.spherical import DegreeMaps

NUM_ATOMS, NUM_FEATURES, NUM_HEADS, DEGREES, NUM_BASIS = 5, 12, 4, (1, 2), 6


def make_pairs(num_pairs: int = 7, seed: int = 0) -> PairGeometry:
    rng = torch.Generator().manual_seed(seed)
    maps = DegreeMaps(DEGREES)
    first = torch.randint(0, NUM_ATOMS, (num_pairs,), generator=rng)
    second = (first + torch.randint(1, NUM_ATOMS, (num_pairs,), generator=rng)) % NUM_ATOMS

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    harmonics = draw(num_pairs, 8)
    return PairGeometry(
        first=first, second=second, receivers=torch.cat([first, second]), senders=torch.cat([second, first]),
        distances=draw(num_pairs).exp(), envelope=draw(num_pairs, 1).sigmoid(), radial=draw(num_pairs, NUM_BASIS),
        harmonics=torch.cat([harmonics, maps.invert(harmonics)]),
    )  # fmt: skip


def make_attention(message_scale: float | None = None) -> EuclideanAttention:
    torch.manual_seed(1)
    attention = EuclideanAttention(
        NUM_FEATURES, NUM_HEADS, DegreeMaps(DEGREES), num_radial_basis=NUM_BASIS, filter_widths=(9, 5),
        message_scale=message_scale,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return attention.double()


def make_features(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((NUM_ATOMS, NUM_FEATURES), (NUM_ATOMS, 8))
    features, variables = (torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)
    return features, variables


def apply_network(network: PairNetwork, number: int, inputs: torch.Tensor) -> torch.Tensor:
    """Do one of the stacked networks alone: linear, silu, linear."""
    rows = slice(number * network.num_hidden, (number + 1) * network.num_hidden)
    hidden = silu(inputs @ network.hidden.weight[rows].T + network.hidden.bias[rows])
    return hidden @ network.weight[number] + network.bias[number, 0]


def attend_by_loop(
    attention: EuclideanAttention,
    features: torch.Tensor,
    variables: torch.Tensor,
    pairs: PairGeometry,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv 2309.15126: every directed edge, every head, by itself."""
    feature_messages, ev_messages = torch.zeros_like(features), torch.zeros_like(variables)
    degree_of = attention.maps.degree_of
    for edge, (i, j) in enumerate(zip(pairs.receivers.tolist(), pairs.senders.tolist(), strict=True)):
        pair = edge % len(pairs.first)
        invariants = attention.maps.compute_invariants(variables[j] - variables[i])
        for which, projections in enumerate((attention.feature_projections, attention.geometric_projections)):
            filters = apply_network(attention.radial_filter, which, pairs.radial[pair])
            filters = filters + apply_network(attention.spherical_filter, which, invariants)
            heads = projections.num_heads
            width = NUM_FEATURES // heads
            for head in range(heads):
                chunk = slice(head * width, (head + 1) * width)
                query_i, key_j, value_j = (
                    v[chunk] @ projections.weight[head, :, k * width : (k + 1) * width]
                    if k < projections.count
                    else None
                    for k, v in enumerate((features[i], features[j], features[j]))
                )
                weight = (
                    (query_i * filters[chunk] * key_j).sum() * pairs.envelope[pair, 0] / (scale or math.sqrt(width))
                )
                if which == 0:
                    feature_messages[i, chunk] += weight * value_j
                else:
                    of_degree = degree_of == head
                    ev_messages[i, of_degree] += weight * pairs.harmonics[edge, of_degree]
    return feature_messages, ev_messages


@pytest.mark.parametrize("scale", [None, 3.7])
def test_attention_against_a_loop(scale: float | None) -> None:
    attention, pairs = make_attention(scale), make_pairs()
    features, variables = make_features()
    with torch.no_grad():
        messages = attention(features, variables, pairs)
        expected = attend_by_loop(attention, features, variables, pairs, scale)
    for ours, theirs in zip(messages, expected, strict=True):
        assert theirs.abs().max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_record_holds_the_coefficients_and_changes_nothing() -> None:
    """Messages rebuilt from the recorded coefficients are those that the block returns."""
    attention, pairs, record = make_attention(), make_pairs(), AttentionRecord()
    features, variables = make_features()
    record.layer = 3
    with torch.no_grad():
        plain, recorded = attention(features, variables, pairs), attention(features, variables, pairs, record)
        (*_, values) = attention.feature_projections(features, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    feature, geometric = record.maps
    assert [(m.layer, m.kind) for m in record.maps] == [(3, "feature"), (3, "geometric")]
    assert feature.heads == ("head 0", "head 1", "head 2", "head 3")
    assert geometric.heads == ("l = 1", "l = 2")
    inv_messages, ev_messages = torch.zeros_like(features), torch.zeros_like(variables)
    for edge, (i, j) in enumerate(zip(feature.receivers.tolist(), feature.senders.tolist(), strict=True)):
        inv_messages[i] += feature.values[edge].repeat_interleave(NUM_FEATURES // NUM_HEADS) * values[j]
    for edge, i in enumerate(geometric.receivers.tolist()):
        ev_messages[i] += attention.maps.repeat(geometric.values[edge : edge + 1])[0] * pairs.harmonics[edge]
    np.testing.assert_allclose(inv_messages, plain[0], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(ev_messages, plain[1], rtol=1e-11, atol=1e-13)


def test_no_euclidean_variables_are_zero_ones() -> None:
    attention, pairs = make_attention(), make_pairs()
    features, variables = make_features()
    short, long = attention(features, None, pairs), attention(features, torch.zeros_like(variables), pairs)
    for ours, theirs in zip(short, long, strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_variables", [False, True])
def test_no_pairs_give_no_messages(with_variables: bool) -> None:
    attention = make_attention()
    features, variables = make_features()
    inv_messages, ev_messages = attention(features, variables if with_variables else None, make_pairs(0))
    assert inv_messages.shape == (NUM_ATOMS, NUM_FEATURES)
    assert ev_messages.shape == (NUM_ATOMS, 8)
    assert torch.count_nonzero(inv_messages) == torch.count_nonzero(ev_messages) == 0


def test_a_closed_envelope_silences_a_pair() -> None:
    attention, pairs = make_attention(), make_pairs(1)
    pairs.envelope.zero_()
    assert all(torch.count_nonzero(m) == 0 for m in attention(*make_features(), pairs))


def test_stacked_networks_are_networks() -> None:
    torch.manual_seed(0)
    network = PairNetwork(4, 7, 5, 3).double()
    torch.nn.init.normal_(network.bias)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    outputs = network(inputs)
    assert outputs.shape == (3, 6, 5)
    for number in range(3):
        expected = apply_network(network, number, inputs)
        np.testing.assert_allclose(outputs[number].detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def test_head_projections_see_their_own_features_only() -> None:
    projections = HeadProjections(12, 3, 2).double()
    features = torch.randn(5, 12, dtype=torch.float64)
    changed = features.clone()
    changed[:, 4:8] += 1.0
    for before, after in zip(projections(features, torch.float64), projections(changed, torch.float64), strict=True):
        same = (before == after).all(0)
        assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4
        assert before.shape == (5, 12)


def test_low_precision_is_in_the_products_and_not_in_the_results() -> None:
    exact, rounded = make_attention().float(), make_attention().float()
    rounded.compute_dtype = torch.bfloat16
    pairs64 = make_pairs()
    pairs = PairGeometry(**{
        name: v.float() if (v := getattr(pairs64, name)).is_floating_point() else v for name in PairGeometry.__slots__
    })  # fmt: skip
    features, variables = (v.float() for v in make_features())
    for ours, theirs in zip(rounded(features, variables, pairs), exact(features, variables, pairs), strict=True):
        assert ours.dtype == torch.float32
        deviation = float(((ours - theirs).norm() / theirs.norm()).detach())
        assert 1e-4 < deviation < 3e-2


def test_a_function_is_computed_in_the_dtype_that_is_asked_for() -> None:
    network, inputs = PairNetwork(4, 7, 5, 3), torch.randn(6, 4)
    expected = network(inputs)
    assert torch.equal(compute_in(None, network, inputs), expected)
    rounded = compute_in(torch.bfloat16, network, inputs)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, network.bfloat16()(inputs.bfloat16()))
    assert not torch.is_autocast_enabled("cpu")


def test_changed_weights_are_used_wherever_it_is_called() -> None:
    """Inside of another autocast torch would keep converted weights until that one ends."""
    network, inputs = PairNetwork(4, 7, 5, 3), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = compute_in(torch.bfloat16, network, inputs)
        with torch.no_grad():
            network.weight.mul_(2.0)
        after = compute_in(torch.bfloat16, network, inputs)
    assert not torch.equal(before, after)
