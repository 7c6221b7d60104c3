"""SO3LR's parts: what each option adds, embeddings of charge and spin, heads, initial values, what is refused."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from structures import STATISTICS, compute, make_batch, make_crystal, make_ion, make_molecule, make_potential
from torch.nn.functional import silu

from so3krates_dist.config import So3lrSection
from so3krates_dist.errors import ConfigError
from so3krates_dist.graph import collate
from so3krates_dist.model.potential import compute_vectors
from so3krates_dist.model.registry import build_model
from so3krates_dist.model.so3lr import ElectronEmbedding, HirshfeldHead, So3lr

SMALL = So3lrSection(num_features=24, num_layers=1, num_heads=4, degrees=(1, 2, 3), num_radial_basis=8, cutoff=4.0)


def test_outputs() -> None:
    potential = make_potential("so3lr")
    batch = make_batch([make_ion(1.0), make_crystal()], potential.cutoffs)
    outputs = potential.network(batch, compute_vectors(batch))
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    atoms = len(batch.atomic_numbers)
    per_atom = ("atom_energies", "physical_energies", "partial_charges", "hirshfeld_ratios")
    assert shapes == dict.fromkeys(per_atom, (atoms,)) | {"dipole": (2, 3)}
    assert bool((outputs["hirshfeld_ratios"] > 0).all())
    assert set(compute(potential, make_molecule())) == {
        "energy",
        "forces",
        "partial_charges",
        "dipole",
        "hirshfeld_ratios",
    }


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({}, 12.0), ({"long_range_cutoff": 0.0}, math.inf), ({"electrostatics": "none"}, 12.0), ({"dispersion": False}, 12.0),
        ({"electrostatics": "none", "dispersion": False}, 4.0),
    ],
)  # fmt: skip
def test_reach(changes: dict[str, object], reach: float) -> None:
    network = So3lr(dataclasses.replace(SMALL, **changes), 10.0)  # type: ignore[arg-type]
    assert (network.cutoff, network.reach, network.uses_positions) == (4.0, reach, False)


def test_physical_energies_are_the_sum_of_their_terms() -> None:
    """Each option alone, with the same weights; the learned part knows of none of them."""
    potential = make_potential("so3lr", long_range_cutoff=12.0)
    batch, energies, learned = make_batch([make_ion(-1.0)], potential.cutoffs), {}, {}
    none: dict[str, object] = {"zbl": False, "electrostatics": "none", "dispersion": False}
    cases = {"none": none, "all": {}, "zbl": {**none, "zbl": True}, "dispersion": {**none, "dispersion": True}}
    for name, changes in {**cases, "electrostatics": {**none, "electrostatics": "cutoff"}}.items():
        other = make_potential("so3lr", long_range_cutoff=12.0, **changes)
        other.load_state_dict(potential.state_dict(), strict=False)
        outputs = other.network(batch, compute_vectors(batch))
        energies[name], learned[name] = outputs["physical_energies"].detach(), outputs["atom_energies"].detach()
    parts = [energies[name] for name in ("zbl", "dispersion", "electrostatics")]
    assert all(float(part.abs().max()) > 1e-4 for part in parts)
    assert not bool(energies["none"].any())
    torch.testing.assert_close(sum(parts), energies["all"], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, learned["all"]) for value in learned.values())


def test_energy_scale_is_for_the_learned_part_alone() -> None:
    potential = make_potential("so3lr")
    batch = make_batch([make_molecule()], potential.cutoffs)
    outputs = potential.network(batch, compute_vectors(batch))
    baselines = sum(STATISTICS.energy_baselines[int(z)] for z in batch.atomic_numbers)
    expected = STATISTICS.energy_scale * outputs["atom_energies"].sum() + outputs["physical_energies"].sum() + baselines
    assert float(potential(batch)["energy"]) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_electron_embedding() -> None:
    """Against the formula, written out for each structure; zero for zero."""
    torch.manual_seed(0)
    embedding = ElectronEmbedding(10, 8).double()
    graphs = [make_molecule("H2O"), make_molecule("CO2"), make_molecule("CH4")]
    batch, amounts = make_batch(graphs), torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    result = embedding(batch, amounts).detach()
    start = 0
    for graph, amount in zip(graphs, amounts.tolist(), strict=True):
        sign = int(amount < 0)
        elements = embedding.elements.weight[torch.from_numpy(graph.atomic_numbers)]
        weights = torch.log(1 + torch.exp(elements @ embedding.keys.weight[sign] / math.sqrt(8)))
        hidden = amount * (weights / weights.sum())[:, None] * embedding.values.weight[sign]
        expected = hidden + silu(silu(hidden) @ embedding.first.weight.T) @ embedding.second.weight.T
        torch.testing.assert_close(result[start : start + graph.num_atoms], expected.detach(), rtol=1e-12, atol=1e-14)
        start += graph.num_atoms
    assert not bool(result[-5:].any())


@pytest.mark.parametrize("name", ["charge_embedding", "spin_embedding"])
def test_charge_and_spin_count_where_they_are_embedded(name: str) -> None:
    field = "total_charge" if name == "charge_embedding" else "num_unpaired_electrons"
    graph = make_molecule()
    other = dataclasses.replace(graph, **{field: 2.0})
    for enabled in (True, False):
        potential = make_potential("so3lr", **{name: enabled, "electrostatics": "none"})
        energies = compute(potential, graph, other)["energy"]
        assert (abs(energies[1] - energies[0]) > 1e-3) == enabled


@pytest.mark.parametrize(
    ("number", "changes"),
    [(3, {}), (2, {"spin_embedding": False}), (1, {"charge_embedding": False, "spin_embedding": False})],
)
def test_embeddings_are_summed_over_the_root_of_their_number(number: int, changes: dict[str, object]) -> None:
    network = So3lr(dataclasses.replace(SMALL, **changes), 10.0)  # type: ignore[arg-type]
    batch = make_batch([make_molecule()], dtype=torch.float32)
    expected = network.embedding(batch.atomic_numbers) / math.sqrt(number)
    torch.testing.assert_close(network.embed(batch), expected)


def test_charges_without_a_branch_leave_no_weight_without_gradient() -> None:
    """A neutral batch too, on whatever rank, gives every weight of the embeddings a gradient, though it is zero."""
    network = So3lr(SMALL, 10.0)
    batch = make_batch([make_molecule()], (4.0, 12.0), torch.float32)
    outputs = network(batch, compute_vectors(batch))
    sum(value.sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert without == []
    gradient = network.charge_embedding.elements.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert not bool(gradient.any())


def test_a_batch_of_nothing() -> None:
    network = So3lr(SMALL, 10.0)
    batch = collate([], torch.float32)
    outputs = network(batch, compute_vectors(batch))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "atom_energies": (0,), "physical_energies": (0,), "partial_charges": (0,), "dipole": (0, 3), "hirshfeld_ratios": (0,),
    }  # fmt: skip
    sum(value.sum() for value in outputs.values()).backward()  # type: ignore[union-attr]


def test_hirshfeld_ratios_are_positive() -> None:
    torch.manual_seed(0)
    head = HirshfeldHead(16)
    numbers = torch.arange(1, 60)
    assert bool((head(torch.randn(59, 16), numbers) > 0).all())


def test_initial_values() -> None:
    """Factors one, offsets zero; tables of one column have variance one, others one over their width."""
    torch.manual_seed(0)
    network = So3lr(So3lrSection(), 13.0)
    assert bool((network.energy_factors == 1).all())
    assert not bool(network.energy_offsets.any())
    assert not bool(network.charge_head.hidden.bias.any())
    assert network.charge_embedding is not None
    tables = {
        network.charge_embedding.elements: 128**-0.5, network.charge_head.offsets: 1.0,
        network.hirshfeld_head.offsets: 1.0, network.hirshfeld_head.queries: 64**-0.5,
    }  # fmt: skip
    for table, deviation in tables.items():
        assert float(table.weight.detach().std()) == pytest.approx(deviation, rel=0.25)


def test_elements_beyond_the_tables_are_refused() -> None:
    statistics = dataclasses.replace(STATISTICS, elements=(1, 86))
    build_model(SMALL, statistics)
    with pytest.raises(
        ConfigError,
        match=r"model.name must be one with tables for all elements of the data; so3lr ends at Rn; got Fr, U\.",
    ):
        build_model(SMALL, dataclasses.replace(STATISTICS, elements=(1, 87, 92)))


def test_a_charge_does_not_move_the_embedding_of_another_structure() -> None:
    potential = make_potential("so3lr")
    alone = compute(potential, make_molecule())
    both = compute(potential, make_molecule(), make_ion(1.0))
    np.testing.assert_allclose(both["energy"][:1], alone["energy"], rtol=1e-13)
