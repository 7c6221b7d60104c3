"""Laws of arithmetic: precision, modes and memory-saving options change rounding at most, and only as much as they say."""

import copy

import numpy as np
import pytest
import torch
from structures import (
    OPTIONS,
    check_deviations,
    compare,
    compute,
    make_batch,
    make_crystal,
    make_molecule,
    make_potential,
    measure,
)

from so3krates_dist.model.potential import ModelStatistics, Potential

options = pytest.mark.parametrize("options", OPTIONS)
GRAPHS = [make_molecule(), make_crystal(), make_molecule("CO2", None)]


def compute_relative_rmse(values: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    values, expected = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.square(values - expected).sum() / np.square(expected).sum()))


def compute_gradients(potential: Potential) -> dict[str, torch.Tensor]:
    """Return gradients of a loss of energies and forces by every weight."""
    dtype = next(potential.parameters()).dtype
    outputs = potential.train()(make_batch(GRAPHS, dtype=dtype))
    loss = outputs["energy"].square().sum() + outputs["forces"].square().sum()
    names, weights = zip(*potential.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights)
    potential.eval()
    return dict(zip(names, gradients, strict=True))


@options
def test_float32_is_close_to_float64(options: str) -> None:
    single = make_potential(options, torch.float32)
    double = copy.deepcopy(single).double()
    outputs, expected = (compute(p, *GRAPHS) for p in (single, double))
    assert outputs["energy"].dtype == np.float64
    assert outputs["forces"].dtype == np.float32
    deviations = compare(outputs, expected)
    gradients, exact = (
        torch.cat([g.flatten() for g in compute_gradients(p).values()]).numpy() for p in (single, double)
    )
    deviations["weight gradients"] = compute_relative_rmse(gradients, exact)
    check_deviations(deviations, 1e-5)


@options
def test_training_mode_and_evaluation_mode_agree(options: str) -> None:
    potential, graphs = make_potential(options), [make_crystal(), make_crystal("self_images")]
    evaluated = compute(potential, *graphs, stress=True)
    trained = compute(potential.train(), *graphs, stress=True)
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


def test_training_outputs_have_a_graph() -> None:
    outputs = make_potential().train()(make_batch([make_crystal()]), compute_stress=True)
    assert all(tensor.requires_grad for tensor in outputs.values())


@options
def test_recomputing_the_attention_changes_nothing(options: str) -> None:
    """Activation checkpointing, with the second backward pass that force losses need."""
    potential = make_potential(options)
    kept = {**compute(potential.train(), *GRAPHS), **{k: v.numpy() for k, v in compute_gradients(potential).items()}}
    potential.network.checkpoint_attention = True
    calls = []
    attention = potential.network.layers[1].attention  # type: ignore[index,union-attr]
    attention.register_forward_pre_hook(lambda *_: calls.append(None))  # type: ignore[union-attr]
    again = {**compute(potential.train(), *GRAPHS), **{k: v.numpy() for k, v in compute_gradients(potential).items()}}
    assert len(calls) > 2  # else nothing was recomputed
    check_deviations(compare(again, kept), 1e-12)
    potential.eval()
    check_deviations(compare(compute(potential, *GRAPHS), {k: kept[k] for k in ("energy", "forces")}), 1e-12)


@options
def test_bf16_moves_forces_a_little_and_does_move_them(options: str) -> None:
    """Means over four models near their initial weights; single models of the pre-normalised kind reach 3 % in forces."""
    found: dict[str, list[float]] = {"forces": [], "weight gradients": []}
    for seed in range(4):
        exact, rounded = (make_potential(options, torch.float32, seed, 0.05, precision=p) for p in ("float32", "bf16"))
        outputs, expected = (compute(p, *GRAPHS)["forces"] for p in (rounded, exact))
        gradients, exact_gradients = (
            torch.cat([g.flatten() for g in compute_gradients(p).values()]) for p in (rounded, exact)
        )
        assert {outputs.dtype, *(p.dtype for p in rounded.parameters())} == {np.dtype(np.float32), torch.float32}
        found["forces"].append(compute_relative_rmse(outputs, expected))
        found["weight gradients"].append(compute_relative_rmse(gradients, exact_gradients))
    deviations = {name: float(np.mean(values)) for name, values in found.items()}
    check_deviations(deviations, {"forces": 0.02, "weight gradients": 0.05})
    assert min(found["forces"]) > 1e-4, "bf16 is not in use"


def test_bf16_works_frozen_and_without_gradients() -> None:
    """As in evaluation and in dynamics; autocast keeps converted weights between calls, which must not go stale."""
    potential = make_potential(dtype=torch.float32, precision="bf16").requires_grad_(False)
    with torch.no_grad():
        first, second = (compute(potential, *GRAPHS) for _ in range(2))
        for parameter in potential.parameters():
            parameter.mul_(1.1)
        third = compute(potential, *GRAPHS)
    check_deviations(compare(second, first), 1e-6)
    assert measure(third["energy"], first["energy"]) > 1e-3


def test_bf16_keeps_the_laws_that_need_no_precision() -> None:
    """No net force, and a symmetric stress: both follow from the pairs, whatever the arithmetic."""
    outputs = compute(
        make_potential(dtype=torch.float32, precision="bf16"), make_crystal(), make_crystal("self_images"), stress=True
    )
    net = outputs["forces"].astype(np.float64).sum(0)
    check_deviations({"net force": float(np.abs(net).max() / np.abs(outputs["forces"]).max())}, 1e-5)
    np.testing.assert_array_equal(outputs["stress"], outputs["stress"].transpose(0, 2, 1))


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


def test_conversion_to_float32_and_back_rounds_constants_like_weights() -> None:
    """`.float().double()` costs digits; going to float64 at once, as `load_model` does, costs none (test_registry)."""
    straight, detour = make_potential(), make_potential().float().double()
    with torch.no_grad():
        for ours, theirs in zip(straight.parameters(), detour.parameters(), strict=True):
            ours.copy_(theirs)
    check_deviations(compare(compute(detour, *GRAPHS), compute(straight, *GRAPHS)), 1e-6)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = (make_potential(seed=3) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(make_potential(seed=4).parameters()), next(first.parameters()))
