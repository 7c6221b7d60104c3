"""The loss: an exact mean over all labels of the global batch, however they are divided; missing labels count nothing.

Its kinds and its laws with real models are in test_loss_kinds.py.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import make_morse, write_dataset
from ase.data import atomic_masses
from training_setup import make_config, make_graphs

from so3krates_dist.config import TrainSection
from so3krates_dist.data.index import FLAGS
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.passes import Limits
from so3krates_dist.data.stream import TrainingStream
from so3krates_dist.graph import ATOMIC_MASSES, Graph, GraphBatch, collate
from so3krates_dist.train.losses import compute_loss, compute_weights, count_labels, shift_dipoles
from so3krates_dist.train.planning import build_schedule

SECTION = TrainSection(energy_weight=0.7, forces_weight=1.3)
WEIGHTS = compute_weights(0, SECTION)
SCALE = 1.7
NONE = [0.0] * 4
"""Labels of the kinds that these conformers have not"""


def make_batch(graphs: list[Graph]) -> GraphBatch:
    return collate([build_neighbors(g, 4.0) for g in graphs], torch.float64)


def predict(batch: GraphBatch) -> dict[str, torch.Tensor]:
    """Return outputs that can be differentiated: labels with errors that depend on the place."""
    assert batch.energy is not None
    assert batch.forces is not None
    energy, forces = (torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (batch.energy, batch.forces))
    return {
        "energy": (energy + 0.1 * batch.num_atoms).requires_grad_(True),
        "forces": (forces + 0.2 * batch.positions).requires_grad_(True),
    }


def compute(graphs: list[Graph], counts: list[float] | None = None) -> tuple[float, list[float]]:
    batch = make_batch(graphs)
    loss, sums = compute_loss(predict(batch), batch, counts or count_labels(batch), SECTION, WEIGHTS, SCALE)
    return float(loss.detach()), sums.tolist()


class TestGlobalMean:
    def test_its_formula(self) -> None:
        graphs = make_graphs(4)
        batch = make_batch(graphs)
        outputs = predict(batch)
        energy_errors = torch.full((4,), 0.1)
        force_errors = 0.2 * batch.positions
        expected = 0.7 * (energy_errors / SCALE).square().mean() + 1.3 * (force_errors / SCALE).square().mean()
        loss, sums = compute_loss(outputs, batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-7)
        assert sums.tolist() == pytest.approx([0.4, float(force_errors.abs().sum())])

    @pytest.mark.parametrize("cut", [0, 1, 3, 7, 10])
    def test_shares_of_unequal_processes_add_up_to_it(self, cut: int) -> None:
        graphs = sorted(make_graphs(10), key=lambda g: g.num_atoms)
        whole, sums = compute(graphs)
        counts = count_labels(make_batch(graphs))
        parts = [compute(part, counts) for part in (graphs[:cut], graphs[cut:])]
        assert sum(p[0] for p in parts) == pytest.approx(whole, rel=1e-12)
        assert [sum(p[1][i] for p in parts) for i in range(2)] == pytest.approx(sums, rel=1e-12)

    def test_means_of_processes_would_be_another_number(self) -> None:
        """What DistributedDataParallel does: the reason for all this."""
        graphs = sorted(make_graphs(10), key=lambda g: g.num_atoms)
        naive = (compute(graphs[:3])[0] + compute(graphs[3:])[0]) / 2
        assert naive != pytest.approx(compute(graphs)[0], rel=1e-2)

    def test_counts(self) -> None:
        graphs = make_graphs(4)
        assert count_labels(make_batch(graphs)) == [4.0, 3.0 * sum(g.num_atoms for g in graphs), *NONE]


class TestMissingLabels:
    def test_they_count_nothing_and_pull_nowhere(self) -> None:
        graphs = make_graphs(4)
        graphs[1].energy = None
        graphs[2].forces = None
        batch = make_batch(graphs)
        assert count_labels(batch) == [3.0, 3.0 * sum(g.num_atoms for i, g in enumerate(graphs) if i != 2), *NONE]
        outputs = predict(batch)
        loss, sums = compute_loss(outputs, batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        assert torch.isfinite(sums).all()
        energy_gradient, force_gradient = outputs["energy"].grad, outputs["forces"].grad
        assert energy_gradient is not None
        assert force_gradient is not None
        assert (energy_gradient == 0).tolist() == [False, True, False, False]
        assert torch.equal((force_gradient == 0).all(1), batch.graph_index == 2)

    def test_a_batch_wholly_without_one_kind(self) -> None:
        graphs = make_graphs(3)
        for graph in graphs:
            graph.energy = None
        batch = make_batch(graphs)
        assert count_labels(batch)[0] == 0.0
        outputs = {"energy": torch.zeros(3).double(), "forces": torch.zeros_like(batch.positions, requires_grad=True)}
        loss, sums = compute_loss(outputs, batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
        assert math.isfinite(float(loss.detach()))
        assert sums[0] == 0

    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_an_infinite_label_is_no_missing_label(self, value: float) -> None:
        """It must not vanish silently: the loss is not finite, and the guard skips the step."""
        graphs = make_graphs(2)
        assert graphs[0].forces is not None
        graphs[0].forces[0, 0] = value
        batch = make_batch(graphs)
        assert count_labels(batch)[1] == 3.0 * len(batch.atomic_numbers)
        loss, _ = compute_loss(predict(batch), batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
        assert not math.isfinite(float(loss.detach()))

    def test_a_prediction_that_is_nan_shows(self) -> None:
        batch = make_batch(make_graphs(2))
        outputs = predict(batch)
        outputs["forces"] = outputs["forces"] * math.nan
        loss, _ = compute_loss(outputs, batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
        assert math.isnan(float(loss.detach()))


class TestNothing:
    def test_an_empty_batch_takes_part_with_nothing(self) -> None:
        potential = make_morse().train().requires_grad_(True)
        batch = collate([], torch.float32)
        loss, sums = compute_loss(potential(batch), batch, [4.0, 60.0, *NONE], SECTION, WEIGHTS, SCALE)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert sums.tolist() == [0.0, 0.0]
        assert all(p.grad is not None and float(p.grad) == 0.0 for p in potential.parameters())

    def test_weights_of_zero_switch_terms_off(self) -> None:
        graphs = make_graphs(2)
        batch = make_batch(graphs)
        for energy, forces in ((0.0, 1.0), (1.0, 0.0)):
            section = TrainSection(energy_weight=energy, forces_weight=forces)
            outputs = predict(batch)
            loss, _ = compute_loss(outputs, batch, count_labels(batch), section, compute_weights(0, section), SCALE)
            loss.backward()
            assert (outputs["energy"].grad is None) == (energy == 0.0)
            assert (outputs["forces"].grad is None) == (forces == 0.0)


@pytest.mark.parametrize("limits", [Limits(), Limits(max_atoms=10)], ids=["one pass", "many passes"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_of_a_step_are_those_that_were_planned(tmp_path: Path, world_size: int, limits: Limits) -> None:
    """What divides the sums is known from the plan and the index before anything is read: labels of the whole global batch."""
    graphs = make_graphs(30)
    graphs[4:9] = [dataclasses.replace(g, forces=None) for g in graphs[4:9]]
    graphs[7:20] = [dataclasses.replace(g, energy=None) for g in graphs[7:20]]
    data = write_dataset(tmp_path / "data", {"train": graphs})
    config = make_config(data, "run", "data.batch_size=8")
    mixture = Mixture.open(config.data, config.model)
    schedule, _ = build_schedule(config, mixture, None, 0)
    streams = [TrainingStream(schedule, config, rank, world_size, limits) for rank in range(world_size)]
    plan, index = schedule.segments[0][1], mixture.sources[0].data.index
    for step in range(plan.steps_per_window):
        window = plan.window(0)
        rows = window.rows_of_lanes(range(window.num_lanes), step)
        samples = index.block_first[window.block[rows]] + window.index[rows]
        flags, atoms = index.sample_flags[samples], index.sample_atoms[samples].astype(int)
        planned = [
            float(((flags & FLAGS["energy"]) > 0).sum()),
            3.0 * float(atoms[(flags & FLAGS["forces"]) > 0].sum()),
        ]
        batches = [batch for stream in streams for batch in stream[step].batches]
        counts = np.sum([count_labels(batch) for batch in batches], axis=0)
        assert counts[:2].tolist() == planned
        assert sum(batch.num_graphs for batch in batches) == len(rows)


def test_stress_is_compared_in_its_own_unit() -> None:
    graphs = make_graphs(2)
    for k, graph in enumerate(graphs):
        graph.cell, graph.pbc = 12.0 * torch.eye(3).numpy(), torch.ones(3).bool().numpy()
        graph.stress = k * torch.eye(3).double().numpy()
    batch = make_batch(graphs)
    section = TrainSection(energy_weight=0.0, forces_weight=0.0, stress_weight=0.5)
    outputs = predict(batch) | {"stress": torch.zeros(2, 3, 3, dtype=torch.float64)}
    assert count_labels(batch)[2] == 18.0
    loss, _ = compute_loss(outputs, batch, count_labels(batch), section, compute_weights(0, section), SCALE)
    assert float(loss.detach()) == pytest.approx(0.5 * 3 / 18)


def test_energies_of_large_systems_are_compared_in_float64() -> None:
    """An error of 1 meV in 1e6 eV would be lost in float32, where neighbouring numbers are 0.06 eV apart."""
    batch = make_batch(make_graphs(1))
    batch.energy = torch.tensor([-1e6], dtype=torch.float64)
    outputs = {
        "energy": torch.tensor([-1e6 + 1e-3], dtype=torch.float64, requires_grad=True),
        "forces": torch.zeros(4, 3, requires_grad=True),
    }
    _, sums = compute_loss(outputs, batch, count_labels(batch), SECTION, WEIGHTS, SCALE)
    assert float(sums[0]) == pytest.approx(1e-3 / 4, rel=1e-6)


class TestDipolesAndHirshfeldRatios:
    SECTION = TrainSection(energy_weight=0.0, forces_weight=0.0, dipole_weight=0.5, hirshfeld_weight=2.0)
    WEIGHTS = compute_weights(0, SECTION)

    def make(self, charges: tuple[float, ...] = (0.0, 1.0, -2.0)) -> list[Graph]:
        rng = np.random.default_rng(5)
        return [
            dataclasses.replace(
                graph, total_charge=charge, dipole=rng.normal(size=3), hirshfeld_ratios=rng.uniform(0.5, 1.0, graph.num_atoms)
            )
            for graph, charge in zip(make_graphs(len(charges)), charges, strict=True)
        ]  # fmt: skip

    def predict(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Charges that add up as they must, and a ratio for each atom."""
        raw = torch.sin(batch.positions.sum(1))
        surplus = raw.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, raw) - batch.total_charge
        charges = (raw - (surplus / batch.num_atoms)[batch.graph_index]).requires_grad_(True)
        dipole = (
            torch.zeros(batch.num_graphs, 3)
            .double()
            .index_add(0, batch.graph_index, charges[:, None] * batch.positions)
        )
        ratios = (0.8 + 0.1 * torch.cos(batch.positions.prod(1))).requires_grad_(True)
        zeros = torch.zeros_like(batch.positions, requires_grad=True)
        energy = zeros.sum() + torch.zeros(batch.num_graphs).double()
        return {"energy": energy, "forces": zeros, "dipole": dipole, "hirshfeld_ratios": ratios, "charges": charges}

    def test_the_formula(self) -> None:
        graphs = self.make()
        batch = make_batch(graphs)
        outputs = self.predict(batch)
        atoms = iter(outputs["charges"].detach().numpy())
        squares = []
        for graph in graphs:
            masses = atomic_masses[graph.atomic_numbers]
            centre = masses @ graph.positions / masses.sum()
            charges = np.array([next(atoms) for _ in range(graph.num_atoms)])
            squares.append((charges @ (graph.positions - centre) - graph.dipole) ** 2)
        ratios = np.concatenate([g.hirshfeld_ratios for g in graphs])
        expected = 0.5 * np.mean(squares) + 2.0 * np.mean((outputs["hirshfeld_ratios"].detach().numpy() - ratios) ** 2)
        assert count_labels(batch)[3:] == [9.0, 0.0, float(len(ratios))]
        loss, _ = compute_loss(outputs, batch, count_labels(batch), self.SECTION, self.WEIGHTS, SCALE)
        assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-10)

    def test_where_the_coordinates_begin_does_not_matter(self) -> None:
        losses = []
        for shift in (0.0, 50.0):
            batch = make_batch(self.make())
            outputs = self.predict(batch)
            moved = dataclasses.replace(batch, positions=batch.positions + shift)
            moment = outputs["charges"][:, None] * moved.positions
            outputs["dipole"] = torch.zeros(3, 3).double().index_add(0, batch.graph_index, moment)
            losses.append(
                float(compute_loss(outputs, moved, count_labels(batch), self.SECTION, self.WEIGHTS, SCALE)[0].detach())
            )
        assert losses[1] == pytest.approx(losses[0], rel=1e-10)

    def test_dipoles_of_molecules_stay_as_they_are(self) -> None:
        batch = make_batch(self.make((0.0, 0.0)))
        dipoles = self.predict(batch)["dipole"]
        assert torch.equal(shift_dipoles(dipoles, batch), dipoles)

    @pytest.mark.parametrize("cut", [0, 1, 3])
    def test_shares_of_processes_add_up(self, cut: int) -> None:
        graphs = self.make()
        graphs[0].dipole, graphs[1].hirshfeld_ratios = None, None

        def compute(part: list[Graph], counts: list[float]) -> float:
            batch = make_batch(part)
            return float(
                compute_loss(self.predict(batch), batch, counts, self.SECTION, self.WEIGHTS, SCALE)[0].detach()
            )

        counts = count_labels(make_batch(graphs))
        assert counts[3] == 6.0
        parts = compute(graphs[:cut], counts) + compute(graphs[cut:], counts)
        assert parts == pytest.approx(compute(graphs, counts), rel=1e-12)

    def test_missing_labels_pull_nowhere_but_take_part(self) -> None:
        """Other processes have a gradient for these weights; this one must have one too."""
        graphs = make_graphs(2)
        batch = make_batch(graphs)
        outputs = self.predict(batch)
        compute_loss(outputs, batch, [0.0, 0.0, 0.0, 3.0, 0.0, 9.0], self.SECTION, self.WEIGHTS, SCALE)[0].backward()
        for name in ("charges", "hirshfeld_ratios"):
            gradient = outputs[name].grad
            assert gradient is not None
            assert not gradient.any()

    def test_masses_are_those_that_labels_are_made_with(self) -> None:
        np.testing.assert_allclose(ATOMIC_MASSES[1:], atomic_masses[1:], rtol=1e-9)
