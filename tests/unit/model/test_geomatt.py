"""GeomAtt's parts: envelope, grid, initial values, products along the list, choice of the path, what the backward pass needs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from structures import STATISTICS, compute, make_batch, make_molecule

from so3krates_dist.config import GeomAttEnvelopeSection, GeomAttSection, ModelSection
from so3krates_dist.graph import Graph
from so3krates_dist.model import geomatt_paths
from so3krates_dist.model.geomatt import (
    GaussianGrid,
    GeomAtt,
    GeomAttEnvelope,
    Stream,
    compute_shifted_softplus,
    compute_smooth_envelope,
)
from so3krates_dist.model.geomatt_paths import (
    ListPath,
    MatrixPath,
    PairRows,
    choose_path,
    multiply_pairs,
    multiply_symmetric,
)
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.registry import build_model

SMALL = GeomAttSection(num_layers=2, num_features=8, inner_width=16, grid_spacing=0.2)


def test_the_envelope_is_one_at_zero_and_flat_at_the_cutoff() -> None:
    u = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.2], dtype=torch.float64)
    expected = [1.0, math.exp(-0.09 / 0.91), math.exp(-0.49 / 0.51), 0.0, 0.0]
    np.testing.assert_allclose(compute_smooth_envelope(4.0 * u, 4.0).numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_the_envelope_are_finite_and_vanish_at_the_cutoff(dtype: torch.dtype) -> None:
    distances = torch.cat([torch.linspace(0, 4.2, 2000), torch.tensor([4.0, np.nextafter(np.float32(4.0), 0)])])
    distances = distances.to(dtype).requires_grad_(True)
    values = compute_smooth_envelope(distances, 4.0)
    for _ in range(4):
        (values,) = torch.autograd.grad(values.sum(), distances, create_graph=True)
        assert torch.isfinite(values).all()
        assert float(values[distances > 3.99].detach().abs().max()) <= 1e-30
        assert float(values.detach().abs().max()) > 0.1


def test_the_shifted_softplus_has_no_step() -> None:
    x = torch.tensor([-800.0, -3.0, 0.0, 5.0, 19.999999, 20.000001, 39.0, 41.0, 800.0], dtype=torch.float64)
    expected = [np.logaddexp(0, v) - math.log(2) for v in x.tolist()]
    np.testing.assert_allclose(compute_shifted_softplus(x).numpy(), expected, rtol=1e-15, atol=1e-16)


def test_the_grid_leaves_out_its_end() -> None:
    grid = GaussianGrid(0.0, 5.0, 0.05, 20.0)
    assert (len(grid.centers), float(grid.centers[-1])) == (100, pytest.approx(4.95))
    distances = torch.tensor([0.3, 2.0], dtype=torch.float64)
    expected = np.exp(-20 * (distances.numpy()[:, None] - 0.05 * np.arange(100)) ** 2)
    np.testing.assert_allclose(grid(distances).numpy(), expected, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(grid.expand_zero().numpy(), grid(torch.zeros(1, dtype=torch.float64))[0].numpy())


def test_pairs_go_to_where_the_gaussians_have_vanished() -> None:
    assert GeomAttSection().cutoff == GeomAttSection().reach == pytest.approx(5 + math.sqrt(1.2))
    assert GeomAttSection(gaussian_precision=4.0).cutoff == pytest.approx(5 + math.sqrt(6))
    assert math.isinf(GeomAttSection(algorithm="dense").reach)
    assert GeomAttEnvelopeSection(cutoff=4.5).reach == 4.5
    assert not GeomAttSection().sees
    assert "cell" in GeomAttEnvelopeSection().sees


def test_initial_values_fill_their_ranges() -> None:
    torch.manual_seed(0)
    network = GeomAtt(GeomAttSection(order_gains=(1.0, 2.0, 8.0)), 1.0)
    bound = 1.414 * math.sqrt(3 / 128)
    ranges = {"embedding.weight": bound, "readout_hidden.weight": 384**-0.5, "readout_hidden.bias": 384**-0.5}
    for number, gain in enumerate((1.0, 2.0, 8.0)):
        for name in ("self_weight", "self_bias", "pair_weight", "pair_bias"):
            ranges[f"streams.{number}.{name}"] = 0.1 * (gain if "pair" in name else 1)
        ranges[f"streams.{number}.values.0.weight"] = ranges[f"streams.{number}.values.0.bias"] = 128**-0.5
    parameters = dict(network.named_parameters())
    for name, limit in ranges.items():
        largest = float(parameters[name].detach().abs().max())
        assert 0.9 * limit < largest <= limit * (1 + 1e-6), name


def test_gains_scale_attention_by_the_steps_of_a_walk() -> None:
    batch, sizes = make_batch([make_molecule()], (6.0,)), []
    for gain in (1.0, 3.0):
        torch.manual_seed(0)
        section = dataclasses.replace(SMALL, order_gains=(gain,) * 3)
        maps = Potential(GeomAtt(section, 1.0).double(), STATISTICS).record_attention(batch)
        sizes.append([float(m.values[5]) for m in maps])
    ratios = np.divide(sizes[1], sizes[0]).reshape(2, 3)
    np.testing.assert_allclose(ratios, np.tile([3.0, 9.0, 27.0], (2, 1)), rtol=1e-5)  # weights were drawn in float32


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_products_along_the_list_and_their_derivatives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against matrices; a pair of an atom with itself (its image) counts in both directions."""
    monkeypatch.setattr(geomatt_paths, "MAX_BLOCK", {"cpu": block})
    torch.manual_seed(0)
    first, second = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 3, 2, 2, 3])
    factor = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    features = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    matrices = torch.zeros(4, 4, 2, dtype=torch.float64)
    for pair, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        matrices[i, j] += factor.detach()[pair]
        matrices[j, i] += factor.detach()[pair]
    expected = torch.einsum("ijf,jfv->ifv", matrices, features)
    torch.testing.assert_close(multiply_symmetric(factor, features, first, second), expected)
    for product, inputs in ((multiply_symmetric, (factor, features)), (multiply_pairs, (features, features * 2 + 1))):
        arguments = tuple(x.detach().requires_grad_(True) for x in inputs)
        assert torch.autograd.gradcheck(lambda a, b, p=product: p(a, b, first, second), arguments)
        assert torch.autograd.gradgradcheck(lambda a, b, p=product: p(a, b, first, second), arguments)


def make_rod(num_atoms: int) -> Graph:
    positions = np.zeros((num_atoms, 3))
    positions[:, 0] = 1.5 * np.arange(num_atoms)
    return Graph(atomic_numbers=np.full(num_atoms, 6), positions=positions)


@pytest.mark.parametrize(
    ("algorithm", "num_atoms", "expected"),
    [("auto", 9, MatrixPath), ("auto", 400, ListPath), ("dense", 400, MatrixPath), ("neighbor_list", 9, ListPath)],
)
def test_large_molecules_take_the_list(algorithm: str, num_atoms: int, expected: type) -> None:
    batch = make_batch([make_rod(num_atoms)], (6.0,))
    rows = torch.zeros(len(batch.pair_first), 3, dtype=torch.float64)
    pairs = PairRows(batch.pair_first, batch.pair_second, rows, torch.zeros(3, dtype=torch.float64), has_tail=True)
    assert isinstance(choose_path(batch, pairs, algorithm), expected)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_matrices_applied_one_after_the_other_give_what_their_product_gives(order: int) -> None:
    """The former where atoms are more than features; both ways with the same matrices."""
    torch.manual_seed(0)
    batch = make_batch([make_molecule(), make_molecule("CO2")], (6.0,))
    stream = Stream(dataclasses.replace(SMALL, num_layers=1), order, 3.0, 25).double()
    rows, own = torch.randn(len(batch.pair_first), 26).double(), torch.randn(26).double()
    path = MatrixPath(batch, PairRows(batch.pair_first, batch.pair_second, rows, own, has_tail=True))
    weights = stream.fold(own[:-1])
    (factors,) = path.expand([weights])
    values = path.spread(torch.randn(12, 8).double())
    narrow, wide = (path.build_operators(weights, factors, order - 1, width)[0](values) for width in (1, 10**6))
    torch.testing.assert_close(narrow, wide, rtol=1e-10, atol=1e-10 * float(wide.detach().abs().max()))
    assert torch.count_nonzero(narrow[1, 3:]) == 0  # rows of padding


def count_kept(potential: Potential, graph: Graph) -> list[int]:
    """Return the sizes of all tensors that are kept for the backward pass."""
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    batch = make_batch([graph], potential.cutoffs, torch.float32)
    vectors = compute_vectors(batch).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        potential.network(batch, vectors)
    return sizes


def test_the_list_keeps_nothing_for_each_pair_and_feature() -> None:
    """The largest tensor that is kept grows with the atoms, not with their square."""
    section = dataclasses.replace(SMALL, num_features=64, algorithm="neighbor_list")
    potential = build_model(section, STATISTICS)
    largest = [max(count_kept(potential, make_rod(n))) for n in (60, 120)]
    num_pairs = len(make_batch([make_rod(120)], potential.cutoffs).pair_first)
    assert largest[1] < 2.1 * largest[0]
    assert largest[1] < num_pairs * 8 * 64 / 3  # pairs times channels of order 3 times features


def test_recomputed_attention_keeps_no_matrices() -> None:
    potential = build_model(dataclasses.replace(SMALL, algorithm="dense", inner_width=64), STATISTICS)
    kept = []
    for mode in ("none", "blocks"):
        potential.network.checkpointing = mode  # type: ignore[assignment]
        kept.append(sum(count_kept(potential, make_molecule("C6H6"))))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("section", [SMALL, GeomAttEnvelopeSection(num_features=8, inner_width=16, num_layers=1)])
def test_recording_does_not_change_the_energy(section: ModelSection) -> None:
    torch.manual_seed(0)
    potential = build_model(section, STATISTICS).double().eval()
    assert isinstance(potential.network, GeomAtt | GeomAttEnvelope)
    graph = make_molecule()
    before = compute(potential, graph)
    batch = make_batch([graph, make_molecule("CO2")], potential.cutoffs)
    maps = potential.record_attention(batch)
    assert [m.layer for m in maps] == sorted(m.layer for m in maps)
    for kept in maps:
        assert kept.values.shape == (9 * 9 + 3 * 3, 1)
        assert not kept.values.requires_grad
        assert torch.equal(batch.graph_index[kept.receivers], batch.graph_index[kept.senders])
    np.testing.assert_array_equal(compute(potential, graph)["forces"], before["forces"])


def test_a_single_feature_has_a_readout() -> None:
    network = GeomAtt(dataclasses.replace(SMALL, num_features=1, orders=(2,)), 1.0)
    assert network.readout_hidden.weight.shape == (1, 1)
