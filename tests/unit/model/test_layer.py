"""Initial values, linear maps, normalisation, per-atom networks and the exchange block."""

import math
import typing

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import silu

from so3krates_dist.config import EuclideanTransformerSection
from so3krates_dist.model.attention import HeadProjections, PairNetwork
from so3krates_dist.model.layer import (
    RESIDUAL_MLPS,
    Exchange,
    GatedResidual,
    Linear,
    PreactivationResidual,
    build_layer_norm,
    initialize_lecun,
)
from so3krates_dist.model.spherical import DegreeMaps


def check_lecun(weight: torch.Tensor, fan_in: int) -> None:
    """A normal distribution cut at two standard deviations and widened back to variance 1 / fan_in."""
    values = weight.detach().flatten() * math.sqrt(fan_in)
    largest = 2 / 0.87962566103423978
    assert values.std().item() == pytest.approx(1.0, abs=0.02)
    assert abs(values.mean().item()) < 0.02
    assert values.abs().max() <= largest + 1e-5
    assert values.abs().max() > 0.98 * largest
    # Share within one standard deviation: erf(0.8796 / sqrt 2) / erf(2 / sqrt 2); a uniform distribution has 0.58.
    share = math.erf(0.87962566103423978 / math.sqrt(2)) / math.erf(math.sqrt(2))
    assert (values.abs() < 1).float().mean().item() == pytest.approx(share, abs=0.01)


def test_initial_values_of_every_kind_of_weight() -> None:
    torch.manual_seed(0)
    plain = torch.empty(300, 200)
    initialize_lecun(plain, 50)
    check_lecun(plain, 50)
    linear = Linear(200, 300)
    check_lecun(linear.weight, 200)
    assert torch.count_nonzero(linear.bias) == 0
    network = PairNetwork(100, 80, 200, 2)
    check_lecun(network.hidden.weight, 100)
    check_lecun(network.weight, 80)
    assert torch.count_nonzero(network.bias) == 0
    check_lecun(HeadProjections(256, 4, 3).weight, 64)  # per head: 64 inputs each


def test_initial_values_come_from_torchs_seed() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(Linear(5, 3).weight)
    assert torch.equal(*weights)


def test_layer_norm() -> None:
    """Biased variance and the papers' epsilon, which matters where the features are small."""
    norm = build_layer_norm(6, True)
    assert isinstance(norm, nn.LayerNorm)
    assert norm.eps == 1e-6
    values = 1e-3 * torch.arange(12.0, dtype=torch.float64).view(2, 6).square()
    centred = values - values.mean(1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)
    np.testing.assert_allclose(norm.double()(values).detach(), expected, rtol=1e-12)
    assert isinstance(build_layer_norm(6, False), nn.Identity)


def test_the_derivative_of_the_norms_forward_derivative() -> None:
    """The same by input, weight and bias as that of the product with the gradient; of torch's own operation it is not."""
    torch.manual_seed(1)
    norm = build_layer_norm(6, True).double()
    assert isinstance(norm, nn.LayerNorm)
    nn.init.normal_(norm.weight)
    values, direction, factors = (torch.randn(5, 6, dtype=torch.float64) for _ in range(3))
    gradients = {}
    for name, function in {"own": norm, "torch's": lambda x: nn.LayerNorm.forward(norm, x)}.items():
        inputs = values.clone().requires_grad_()
        with forward_ad.dual_level():
            results = forward_ad.unpack_dual(function(forward_ad.make_dual(inputs, direction)))
        torch.testing.assert_close(results.primal, nn.LayerNorm.forward(norm, values), rtol=1e-13, atol=1e-13)
        gradients[name] = torch.autograd.grad((factors * results.tangent).sum(), [inputs, norm.weight])
    inputs = values.clone().requires_grad_()
    (slopes,) = torch.autograd.grad((factors * norm(inputs)).sum(), inputs, create_graph=True)
    expected = torch.autograd.grad((slopes * direction).sum(), [inputs, norm.weight])
    for found, right in zip(gradients["own"], expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    # Where torch has put that right, this class has become superfluous.
    assert not torch.allclose(gradients["torch's"][0], expected[0], rtol=1e-3)


def test_the_schema_offers_what_there_is() -> None:
    assert typing.get_args(typing.get_type_hints(EuclideanTransformerSection)["residual_mlp"]) == tuple(RESIDUAL_MLPS)


@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [
        ("none", nn.Identity, nn.Identity),
        ("gated", GatedResidual, GatedResidual),
        ("preactivation", PreactivationResidual, nn.Identity),
    ],
)
def test_residual_networks_by_name(name: str, inner: type, outer: type) -> None:
    built = [build(8) for build in RESIDUAL_MLPS[name]]
    assert [type(b) for b in built] == [inner, outer]


def test_gated_residual_against_its_formula() -> None:
    network, values = GatedResidual(6).double(), torch.randn(4, 6, dtype=torch.float64)
    first, second, outer = (m.weight for m in (network.inner_first, network.inner_second, network.outer))
    expected = silu(values + silu(silu(values) @ first.T) @ second.T) @ outer.T
    np.testing.assert_allclose(network(values).detach(), expected.detach(), rtol=1e-12)
    assert len(list(network.parameters())) == 3  # no biases


def test_preactivation_residual_against_its_formula() -> None:
    network, values = PreactivationResidual(6).double(), torch.randn(4, 6, dtype=torch.float64)
    hidden = silu(silu(values) @ network.first.weight.T + network.first.bias)
    expected = values + hidden @ network.second.weight.T + network.second.bias
    np.testing.assert_allclose(network(values).detach(), expected.detach(), rtol=1e-12)
    assert len(list(network.parameters())) == 4


def test_exchange_against_its_formula() -> None:
    maps = DegreeMaps((1, 2))
    exchange = Exchange(6, maps).double()
    torch.manual_seed(0)
    nn.init.normal_(exchange.linear.bias)
    features, variables = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    change, ev_change = exchange(features, variables)
    invariants = torch.stack(
        [variables[:, :3].square().sum(1) / math.sqrt(3), variables[:, 3:].square().sum(1) / math.sqrt(5)], 1
    )
    mixed = torch.cat([features, invariants], 1) @ exchange.linear.weight.T + exchange.linear.bias
    np.testing.assert_allclose(change.detach(), mixed[:, :6].detach(), rtol=1e-12)
    factors = torch.cat([mixed[:, 6:7].expand(-1, 3), mixed[:, 7:].expand(-1, 5)], 1)
    np.testing.assert_allclose(ev_change.detach(), (factors * variables).detach(), rtol=1e-12)
