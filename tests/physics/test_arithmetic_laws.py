"""Laws of arithmetic: precision, modes and memory-saving options change rounding at most, and only as much as they say."""

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from structures import (
    OPTIONS,
    PERIODIC,
    SO3KRATES,
    check_deviations,
    compare,
    compute,
    make_batch,
    make_crystal,
    make_ion,
    make_molecule,
    make_potential,
    measure,
)

from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.train.two_pass import TwoPass

options = pytest.mark.parametrize("options", OPTIONS)


def make_graphs(options: str) -> list[Graph]:
    """Return what the model is fit for: a molecule, an ion, a symmetric molecule and a crystal."""
    # Norms of what vanishes by symmetry have no derivative; precision decides there what is zero.
    symmetric = make_molecule("CO2", 1 if options in SO3KRATES else None)
    return [make_molecule(), make_ion(-1.0), *([make_crystal()] if options in PERIODIC else []), symmetric]


def compute_relative_rmse(values: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    values, expected = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.square(values - expected).sum() / np.square(expected).sum()))


def compute_gradients(potential: Potential, graphs: list[Graph]) -> dict[str, np.ndarray]:
    """Return gradients of a loss of all outputs by every weight."""
    dtype = next(potential.parameters()).dtype
    outputs = potential.train()(make_batch(graphs, potential.cutoffs, dtype))
    loss = sum(values.square().sum() for values in outputs.values())
    names, weights = zip(*potential.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights)
    potential.eval()
    return {name: gradient.numpy() for name, gradient in zip(names, gradients, strict=True)}


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays.values()])


@options
def test_float32_is_close_to_float64(options: str) -> None:
    single = make_potential(options, torch.float32)
    double, graphs = copy.deepcopy(single).double(), make_graphs(options)
    outputs, expected = (compute(p, *graphs) for p in (single, double))
    assert outputs["energy"].dtype == np.float64
    assert outputs["forces"].dtype == np.float32
    deviations = compare(outputs, expected)
    gradients, exact = (flatten(compute_gradients(p, graphs)) for p in (single, double))
    deviations["weight gradients"] = compute_relative_rmse(gradients, exact)
    # In float32 So3krates takes SPHC shorter than 2e-5 for zero, and a jump of a force is what a norm has at zero.
    check_deviations(deviations, 3e-4 if options in SO3KRATES else 1e-5)


@options
def test_training_mode_and_evaluation_mode_agree(options: str) -> None:
    potential, periodic = make_potential(options), options in PERIODIC
    graphs = [make_crystal(), make_crystal("self_images")] if periodic else make_graphs(options)
    evaluated = compute(potential, *graphs, stress=periodic)
    trained = compute(potential.train(), *graphs, stress=periodic)
    check_deviations(compare(trained, evaluated), 1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_works_without_gradients_and_leaves_none(frozen: bool) -> None:
    potential, batch = make_potential().requires_grad_(not frozen), make_batch([make_crystal()])
    expected = potential(batch, compute_stress=True)
    with torch.no_grad():
        outputs = potential(batch, compute_stress=True)
        assert not torch.is_grad_enabled()
    assert sorted(outputs) == ["energy", "forces", "stress"]
    for name, tensor in outputs.items():
        assert torch.equal(tensor, expected[name])
        assert not tensor.requires_grad
        assert not expected[name].requires_grad
    assert all(p.grad is None for p in potential.parameters())
    assert not batch.positions.requires_grad


@options
def test_training_outputs_have_a_graph(options: str) -> None:
    potential = make_potential(options).train()
    graphs = [make_crystal()] if options in PERIODIC else make_graphs(options)
    outputs = potential(make_batch(graphs, potential.cutoffs), compute_stress=options in PERIODIC)
    assert all(tensor.requires_grad for tensor in outputs.values())


def make_bf16_potential(options: str = "backbone", seed: int = 0, noise: float = 0.2) -> Potential:
    potential = make_potential(options, torch.float32, seed, noise)
    potential.set_precision("bf16-mixed")
    return potential


@options
def test_bf16_moves_forces_a_little_and_does_move_them(options: str) -> None:
    """Means over four models near their initial weights; single models of the pre-normalised kind reach 3 % in forces."""
    found: dict[str, list[float]] = {"forces": [], "weight gradients": []}
    graphs = make_graphs(options)
    for seed in range(4):
        exact, rounded = make_potential(options, torch.float32, seed, 0.05), make_bf16_potential(options, seed, 0.05)
        outputs, expected = (compute(p, *graphs)["forces"] for p in (rounded, exact))
        gradients, exact_gradients = (flatten(compute_gradients(p, graphs)) for p in (rounded, exact))
        assert {outputs.dtype, *(p.dtype for p in rounded.parameters())} == {np.dtype(np.float32), torch.float32}
        found["forces"].append(compute_relative_rmse(outputs, expected))
        found["weight gradients"].append(compute_relative_rmse(gradients, exact_gradients))
    deviations = {name: float(np.mean(values)) for name, values in found.items()}
    check_deviations(deviations, {"forces": 0.02, "weight gradients": 0.05})
    assert min(found["forces"]) > 1e-4, "bf16 is not in use"


@pytest.mark.parametrize("checkpointing", ["blocks", "low_memory"])
@options
def test_bf16_is_the_same_where_layers_are_computed_again(options: str, checkpointing: str) -> None:
    """Rounding has jumps, so what is rounded must come out alike, which is so for blocks.

    In the first of two passes derivatives need not be differentiable, and torch rounds them less often: the difference is as
    large as what bf16 does.
    """
    obstacle = OPTIONS[options].low_memory_obstacle
    if checkpointing == "low_memory" and obstacle:
        pytest.skip(f"low_memory cannot work where {obstacle}")
    potential, gradients, outputs = make_bf16_potential(options, noise=0.05).train(), [], []
    batch = make_batch(make_graphs(options), potential.cutoffs, torch.float32)
    for mode in ("none", checkpointing):
        potential.network.checkpointing = mode  # type: ignore[assignment]
        passes = TwoPass(potential)
        found = passes.forward(potential, batch, compute_stress=False)
        loss = torch.stack([values.square().sum().double() for values in found.values()]).sum()
        passes.finish(potential, loss).backward()
        gradients.append(
            torch.cat([torch.zeros(0) if p.grad is None else p.grad.flatten() for p in potential.parameters()])
        )
        potential.zero_grad()
        outputs.append(found["forces"].detach())
    deviations = {
        "forces": compute_relative_rmse(outputs[1], outputs[0]),
        "weight gradients": compute_relative_rmse(gradients[1], gradients[0]),
    }
    within_bf16 = {"forces": 0.02, "weight gradients": 0.05}
    check_deviations(deviations, 1e-4 if checkpointing == "blocks" else within_bf16)


def test_bf16_works_frozen_and_without_gradients() -> None:
    """As in evaluation and in dynamics; autocast keeps converted weights between calls, which must not go stale."""
    potential = make_bf16_potential().requires_grad_(False)
    with torch.no_grad():
        first, second = (compute(potential, *make_graphs("backbone")) for _ in range(2))
        for parameter in potential.parameters():
            parameter.mul_(1.1)
        third = compute(potential, *make_graphs("backbone"))
    check_deviations(compare(second, first), 1e-6)
    assert measure(third["energy"], first["energy"]) > 1e-3


@options
def test_bf16_keeps_the_laws_that_need_no_precision(options: str) -> None:
    """No net force, and a symmetric stress: both follow from the pairs, whatever the arithmetic. Charges add up."""
    crystals = [make_crystal(), make_crystal("self_images")] if options in PERIODIC else []
    outputs = compute(make_bf16_potential(options), *crystals, make_molecule(), make_ion(-1.0), stress=bool(crystals))
    net = outputs["forces"].astype(np.float64).sum(0)
    check_deviations({"net force": float(np.abs(net).max() / np.abs(outputs["forces"]).max())}, 1e-5)
    if crystals:
        np.testing.assert_array_equal(outputs["stress"][:2], outputs["stress"][:2].transpose(0, 2, 1))
    if "partial_charges" in outputs:
        assert float(outputs["partial_charges"].astype(np.float64).sum()) == pytest.approx(-1.0, abs=1e-5)


@pytest.mark.parametrize(
    "convert",
    [
        lambda p: p.float(), lambda p: p.double(), lambda p: p.to("cpu", torch.float32), lambda p: p.double().float(),
        copy.deepcopy, lambda p: p.float().double(),
    ],
    ids=["float", "double", "to", "there_and_back", "copy", "back_and_there"],
)  # fmt: skip
def test_large_baselines_survive_conversions(convert) -> None:  # type: ignore[no-untyped-def]
    """An iodine atom has about -8000 eV here; float32 would lose 0.5 meV of it."""
    energy = -8123.456789012345
    statistics = ModelStatistics(elements=(6, 53), energy_baselines={53: energy}, energy_scale=1.0, mean_neighbors=1.0)
    potential = convert(Potential(make_potential().network, statistics).eval())
    assert potential.energy_baselines.dtype == torch.float64
    assert float(potential.energy_baselines[53]) == energy
    batch = make_batch([make_molecule("CO2", None)], dtype=next(potential.parameters()).dtype)
    assert potential(batch)["energy"].dtype == torch.float64


def test_energies_add_baselines_and_scaled_outputs() -> None:
    potential, graph = make_potential(), make_molecule()
    batch = make_batch([graph])
    plain = Potential(
        potential.network, ModelStatistics(elements=(1,), energy_baselines={}, energy_scale=1.0, mean_neighbors=1.0)
    ).eval()
    outputs, unscaled = potential(batch), plain(batch)
    scale = potential.statistics.energy_scale
    offset = sum(potential.statistics.energy_baselines[int(z)] for z in graph.atomic_numbers)
    check_deviations(
        {
            "energy": measure(outputs["energy"].numpy(), unscaled["energy"].numpy() * scale + offset),
            "forces": measure(outputs["forces"].numpy(), unscaled["forces"].numpy() * scale),
        },
        1e-13,
    )


@options
def test_conversion_to_float32_and_back_rounds_weights_only(options: str) -> None:
    """Constants stay exact: rounded Wigner symbols would give symmetric molecules directions."""
    straight, detour = make_potential(options), make_potential(options).float().double()
    assert {b.dtype for b in detour.float().buffers() if b.is_floating_point()} == {torch.float64}
    straight.load_state_dict(detour.state_dict())
    graphs = make_graphs(options)
    check_deviations(compare(compute(detour.double(), *graphs), compute(straight, *graphs)), 1e-15)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = (make_potential(seed=3) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(make_potential(seed=4).parameters()), next(first.parameters()))
