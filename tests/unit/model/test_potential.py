"""What a potential takes from its data, its refusals, its outputs; the laws of energies and forces are in tests/physics."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from structures import STATISTICS, check_deviations, make_batch, make_crystal, make_molecule, make_potential, measure

from so3krates_dist.config import EuclideanTransformerSection, GeomAttEnvelopeSection, GeomAttSection, So3lrSection
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.model.potential import ModelStatistics, Potential, check_charges, check_elements, compute_vectors

MANIFEST = {
    "elements": [1, 6],
    "energy_baselines": {"1": -13.6, "6": -1027.5},
    "force_rms": 1.7,
    "energy_residual_std_per_atom": 0.2,
    "mean_neighbors": {"3.0": 4.0, "10.0": 60.0, "4.0": 10.0},
    "num_unpaired_electrons": {"0": 5},
    "total_charges": {"0": 5},
}


def take(cutoff: float, **changes: object) -> ModelStatistics:
    return ModelStatistics.from_manifest({**MANIFEST, **changes}, EuclideanTransformerSection(cutoff=cutoff))


def test_statistics_from_a_manifest() -> None:
    statistics = take(3.5)
    assert statistics == ModelStatistics(
        elements=(1, 6), energy_baselines={1: -13.6, 6: -1027.5}, energy_scale=1.7, mean_neighbors=7.0, charge_signs=()
    )


@pytest.mark.parametrize(("cutoff", "expected"), [(3.0, 4.0), (4.0, 10.0), (7.0, 35.0)])
def test_mean_neighbors_are_interpolated_in_the_order_of_numbers(cutoff: float, expected: float) -> None:
    """ "10.0" comes before "3.0" as text."""
    assert take(cutoff).mean_neighbors == pytest.approx(expected)


@pytest.mark.parametrize("cutoff", [2.0, 12.0])
def test_a_cutoff_for_which_neighbours_were_not_counted_is_refused(cutoff: float) -> None:
    message = rf"model\.cutoff must be from 3 to 10 Å, where the data's neighbours are counted; got {cutoff}\."
    with pytest.raises(ConfigError, match=message):
        take(cutoff)


def test_models_without_a_mean_number_of_neighbours_may_have_any_cutoff() -> None:
    """Beyond the counted distances the last count is taken over; nothing reads it."""
    for section in (GeomAttSection(grid_end=20.0), GeomAttEnvelopeSection(cutoff=1.5)):
        assert ModelStatistics.from_manifest(MANIFEST, section).energy_scale == 1.7
    sqrt_features = EuclideanTransformerSection(cutoff=12.0, message_scale="sqrt_features")
    assert ModelStatistics.from_manifest(MANIFEST, sqrt_features).mean_neighbors == 60.0


@pytest.mark.parametrize(
    ("counts", "expected"), [({}, False), ({"0": 7}, False), ({"0": 7, "2": 1}, True), ({"1": 3}, True)]
)
def test_unpaired_electrons_in_the_data_are_remembered(counts: dict[str, int], expected: bool) -> None:
    assert take(3.5, num_unpaired_electrons=counts).has_unpaired_electrons is expected


@pytest.mark.parametrize(
    ("counts", "expected"), [({"0": 7}, ()), ({"0": 7, "2": 1}, (1,)), ({"-1": 3}, (-1,)), ({"1": 1, "-2": 1}, (-1, 1))]
)
def test_signs_of_charges_in_the_data_are_remembered(counts: dict[str, int], expected: tuple[int, ...]) -> None:
    assert take(3.5, total_charges=counts).charge_signs == expected


def test_data_that_do_not_count_electrons() -> None:
    manifest = {k: v for k, v in MANIFEST.items() if k not in ("num_unpaired_electrons", "total_charges")}
    assert ModelStatistics.from_manifest(manifest, EuclideanTransformerSection()).charge_signs is None
    with pytest.raises(DataError, match=r"must count unpaired electrons.*Convert the data again\.$"):
        ModelStatistics.from_manifest(manifest, So3lrSection())


@pytest.mark.parametrize(("signs", "allowed"), [(None, (-1, 0, 1)), ((), (0,)), ((1,), (0, 1)), ((-1, 1), (-1, 0, 1))])
def test_charges_of_a_sign_that_was_never_trained_are_refused(
    signs: tuple[int, ...] | None, allowed: tuple[int, ...]
) -> None:
    statistics = dataclasses.replace(take(3.5), charge_signs=signs)
    for charge in (-1, 0, 1):
        check_charges(frozenset({"cell"}), statistics, [charge], "where")
        if charge in allowed:
            check_charges(frozenset({"total_charge"}), statistics, [charge], "where")
        else:
            word = "negative" if charge < 0 else "positive"
            with pytest.raises(DataError, match=f"where must have no {word} charge: the model saw no structure"):
                check_charges(frozenset({"total_charge"}), statistics, [charge], "where")


def test_data_without_forces_or_neighbours_give_usable_numbers() -> None:
    statistics = take(4.0, force_rms=None, mean_neighbors={"4.0": 0.0})
    assert (statistics.energy_scale, statistics.mean_neighbors) == (0.2, 1.0)


def test_statistics_survive_json() -> None:
    for counts in ({}, {"0": 1, "1": 2}):
        statistics = take(3.3, num_unpaired_electrons=counts)
        assert ModelStatistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics


def test_statistics_of_older_models_say_nothing_of_unpaired_electrons() -> None:
    content = take(3.3).to_json()
    del content["has_unpaired_electrons"], content["charge_signs"]
    assert ModelStatistics.from_json(content) == dataclasses.replace(take(3.3), charge_signs=None)
    with pytest.raises(ValueError, match=r"statistics\.charge_signs is \[2\]"):
        ModelStatistics.from_json({**content, "charge_signs": [2]})
    with pytest.raises(ValueError, match=r"statistics\.has_unpaired_electrons is 'no'"):
        ModelStatistics.from_json({**content, "has_unpaired_electrons": "no"})


def test_elements_of_a_potential_and_its_cutoff() -> None:
    potential = make_potential()
    assert potential.elements == (1, 6, 7, 8)
    assert potential.cutoffs == (4.0, 4.0)


def test_known_elements_pass() -> None:
    check_elements([1, 1, 8], (8, 1), "water")
    check_elements(np.array([6]), (1, 6), "carbon")
    check_elements([], (1,), "nothing")


def test_unknown_elements_are_named() -> None:
    text = (
        r"^iodine\.xyz must have only elements the model was trained on \(H, C, O\); got F, I\. "
        r"Take another model, or train one on data with these elements\.$"
    )
    with pytest.raises(DataError, match=text):
        check_elements(np.array([53, 6, 9, 53]), (8, 1, 6), "iodine.xyz")


def test_stress_of_structures_without_a_cell_is_nan() -> None:
    potential = make_potential()
    stress = potential(make_batch([make_molecule(), make_crystal()]), compute_stress=True)["stress"]
    assert torch.isnan(stress[0]).all()
    alone = potential(make_batch([make_crystal()]), compute_stress=True)["stress"]
    check_deviations({"stress": measure(stress[1:].numpy(), alone.numpy())}, 1e-12)
    assert torch.isnan(potential(make_batch([make_molecule()]), compute_stress=True)["stress"]).all()


def test_an_empty_batch_has_no_stress() -> None:
    """A process without conformers takes part in a step that learns stress."""
    for mode in (True, False):
        assert make_potential().train(mode)(make_batch([]), compute_stress=True)["stress"].shape == (0, 3, 3)


def test_a_molecule_among_crystals_does_not_spoil_the_gradient() -> None:
    """Its stress has no label; a division by its volume of zero would turn the others' gradients into nan."""
    gradients = []
    for graphs in ([make_crystal()], [make_crystal(), make_molecule()]):
        potential = make_potential().train()
        potential(make_batch(graphs), compute_stress=True)["stress"][:1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in potential.parameters() if p.grad is not None]))
    check_deviations({"weight gradients": measure(gradients[1].numpy(), gradients[0].numpy())}, 1e-12)


def test_shapes_and_dtypes() -> None:
    potential = make_potential(dtype=torch.float32)
    batch = make_batch([make_crystal(), make_crystal("self_images")], dtype=torch.float32)
    outputs = potential(batch, compute_stress=True)
    assert {k: (tuple(v.shape), v.dtype) for k, v in outputs.items()} == {
        "energy": ((2,), torch.float64), "forces": ((6, 3), torch.float32), "stress": ((2, 3, 3), torch.float32),
    }  # fmt: skip


def test_baselines_are_no_weights_and_follow_the_statistics() -> None:
    potential = make_potential()
    assert "energy_baselines" not in potential.state_dict()
    expected = torch.zeros(119, dtype=torch.float64)
    for atomic_number, energy in STATISTICS.energy_baselines.items():
        expected[atomic_number] = energy
    assert torch.equal(potential.energy_baselines, expected)


def test_vectors_go_through_the_boundaries() -> None:
    batch = make_batch([make_molecule("CO2"), make_crystal("self_images")])
    assert batch.cell is not None
    assert batch.pair_shifts is not None
    for pair, vector in enumerate(compute_vectors(batch)):
        first, second = int(batch.pair_first[pair]), int(batch.pair_second[pair])
        cell = batch.cell[int(batch.graph_index[first])]
        expected = batch.positions[second] + batch.pair_shifts[pair] @ cell - batch.positions[first]
        check_deviations({"vector": measure(vector.numpy(), expected.numpy())}, 1e-14)


def test_large_energies_keep_their_small_differences() -> None:
    """Sums are in float64 though the network computes in float32."""
    heavy = dataclasses.replace(STATISTICS, energy_baselines=dict.fromkeys((1, 6, 7, 8), -123456.789))
    network = make_potential(dtype=torch.float32).network
    batch = make_batch([make_molecule(), make_molecule(seed=1)], dtype=torch.float32)
    energies = Potential(network, heavy).eval()(batch)["energy"]
    plain = Potential(network, dataclasses.replace(STATISTICS, energy_baselines={})).eval()(batch)["energy"]
    check_deviations({"difference": abs(float((energies - plain).diff()))}, 1e-8)
