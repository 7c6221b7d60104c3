"""What is rounded and what is not: the parts that `set_precision` reaches, and products of geometry under TF32.

There is no TF32 on a CPU; it is emulated (tests/rounding.py).
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rounding import RoundedProducts
from structures import (
    OPTIONS,
    PERIODIC,
    SO3KRATES,
    SO3LR,
    TRANSFORMERS,
    compute,
    make_batch,
    make_crystal,
    make_molecule,
    make_potential,
    measure,
)
from torch.utils._python_dispatch import TorchDispatchMode

from so3krates_dist.model.exact import compute_exactly, multiply_exactly
from so3krates_dist.model.potential import Potential, compute_vectors
from so3krates_dist.model.spherical import DegreeMaps, SphericalHarmonics

options = pytest.mark.parametrize("options", OPTIONS)


def find_dtypes(potential: Potential) -> set[torch.dtype | None]:
    return {module.compute_dtype for module in potential.modules() if hasattr(module, "compute_dtype")}


@pytest.fixture
def tf32() -> Iterator[RoundedProducts]:
    """What is computed while this is used is done as on a GPU with `train.precision=tf32`."""
    torch.set_float32_matmul_precision("high")
    mode = RoundedProducts()
    try:
        with mode:
            yield mode
    finally:
        torch.set_float32_matmul_precision("highest")


@options
def test_a_precision_is_set_and_taken_back(options: str) -> None:
    potential, graph = make_potential(options, torch.float32), make_molecule()
    names, expected = list(potential.state_dict()), compute(potential, graph)
    assert find_dtypes(potential) == {None}
    potential.set_precision("bf16-mixed")
    assert find_dtypes(potential) == find_dtypes(copy.deepcopy(potential)) == {torch.bfloat16}
    assert list(potential.state_dict()) == names
    rounded = compute(potential, graph)
    assert {name: v.dtype for name, v in rounded.items()} == {name: v.dtype for name, v in expected.items()}
    if options != "geomatt_list":
        assert measure(rounded["forces"], expected["forces"]) > 1e-5
    for precision in ("float32", "tf32", "float64"):
        potential.set_precision("bf16-mixed")
        potential.set_precision(precision)
        assert find_dtypes(potential) == {None}
        for name, values in compute(potential, graph).items():
            assert values.tobytes() == expected[name].tobytes(), name


def test_a_model_is_set_by_itself() -> None:
    one, other = make_potential(), make_potential()
    one.set_precision("bf16-mixed")
    assert find_dtypes(other) == {None}


class Bf16Use(TorchDispatchMode):
    """Keeps which tensors are rounded to bfloat16, and to which dtype sums of bfloat16 go."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[int] = set()
        """where their memory begins"""
        self.sums: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_to_copy" and result.dtype == torch.bfloat16:
            self.rounded.add(args[0].untyped_storage().data_ptr())
        if name == "sum" and args[0].dtype == torch.bfloat16:
            self.sums.append(result.dtype)
        return result


@pytest.mark.parametrize("options", [*TRANSFORMERS, *SO3KRATES, *SO3LR])
def test_radial_filters_and_sums_over_heads_are_not_rounded(options: str) -> None:
    """Rounding these filters too adds a third to two thirds to the error of forces (tests/benchmarks/precision.md)."""
    potential = make_potential(options, torch.float32)
    potential.set_precision("bf16-mixed")
    batch = make_batch([make_molecule()], potential.cutoffs, torch.float32)
    with torch.no_grad(), Bf16Use() as use:
        potential.network(batch, compute_vectors(batch))
    is_rounded = {n: p.untyped_storage().data_ptr() in use.rounded for n, p in potential.named_parameters()}
    assert not any(rounded for name, rounded in is_rounded.items() if ".radial_filter." in name)
    kinds = (".spherical_filter.weight", ".feature_projections.weight", ".geometric_projections.weight")
    assert all(rounded for name, rounded in is_rounded.items() if name.endswith(kinds))
    assert use.sums == [torch.float32] * 2 * len(potential.network.layers), "of both kinds of attention, in each layer"


def test_exact_products_are_plain_ones_where_nothing_is_rounded() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(7, 5), torch.randn(5, 3)
    assert torch.equal(multiply_exactly(left, right), left @ right)
    assert torch.equal(multiply_exactly(left, right, "ij,jk->ki"), (left @ right).T)


def test_exact_products_and_their_derivatives_know_no_tf32(tf32: RoundedProducts) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    product = multiply_exactly(left, right)
    assert product.dtype == torch.float32
    (gradient,) = torch.autograd.grad(product.square().sum(), left, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), right)
    assert tf32.count == 0
    one, two = left.double(), right.double()
    assert measure(product.detach().numpy(), (one @ two).detach().numpy()) < 1e-7
    expected = 2 * one @ two @ two.T
    assert measure(gradient.detach().numpy(), expected.detach().numpy()) < 2e-7
    assert second.dtype == torch.float32
    left @ right
    assert tf32.count == 1, "the emulation is at work"


def test_other_dtypes_stay_what_they_are(tf32: RoundedProducts) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        seen: list[torch.dtype] = []

        def look(tensor: torch.Tensor, seen: list[torch.dtype] = seen) -> torch.Tensor:
            seen.append(tensor.dtype)
            return tensor

        assert compute_exactly(look, torch.ones(2, dtype=dtype)).dtype == dtype
        assert seen == [dtype]


def test_geometry_knows_no_tf32(tf32: RoundedProducts) -> None:
    """Pair vectors through the boundaries of a cell, harmonics and invariants: equal to those in full to the last digits."""
    batch = make_batch([make_crystal(), make_crystal("self_images")], dtype=torch.float32)
    vectors = compute_vectors(batch)
    directions = vectors / vectors.norm(dim=1, keepdim=True)
    harmonics = SphericalHarmonics((1, 2, 3, 4))(directions)
    maps = DegreeMaps((1, 2, 3, 4))
    found = (vectors, harmonics, maps.compute_invariants(harmonics), maps.sum_squares(harmonics))
    assert tf32.count == 0
    exact = make_batch([make_crystal(), make_crystal("self_images")])
    expected = compute_vectors(exact)
    assert float((vectors.double() - expected).abs().max()) < 1e-6
    expected_harmonics = SphericalHarmonics((1, 2, 3, 4))(expected / expected.norm(dim=1, keepdim=True))
    for values, target in zip(
        found[1:],
        (expected_harmonics, maps.compute_invariants(expected_harmonics), maps.sum_squares(expected_harmonics)),
        strict=True,
    ):
        assert measure(values.numpy(), target.numpy()) < 1e-6


@pytest.mark.parametrize("options", [n for n in PERIODIC if n.startswith("so3lr")] + ["backbone", "so3krates"])
def test_tf32_moves_forces_of_crystals_a_little(options: str, tf32: RoundedProducts) -> None:
    """Were cells, phases of Ewald sums or harmonics rounded, the net force or the forces would say so."""
    potential, graphs = (
        make_potential(options, torch.float32, noise=0.05),
        [make_crystal(), make_crystal("self_images")],
    )
    outputs = compute(potential, *graphs, stress=True)
    assert tf32.count > 0
    expected = compute(copy.deepcopy(potential).double(), *graphs, stress=True)
    for name in ("forces", "stress"):
        size = np.sqrt(np.square(expected[name]).mean())
        assert np.sqrt(np.square(outputs[name] - expected[name]).mean()) < 0.01 * size, name
    largest = np.abs(expected["forces"]).max()
    assert np.abs(outputs["forces"][:4].astype(np.float64).sum(0)).max() < 1e-5 * largest
