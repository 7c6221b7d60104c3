"""The fixed conformers of a run; what the proof says of its arithmetic: nothing in float64, rounding in float32, more in bf16."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import label, make_cluster, make_morse, write_dataset
from structures import OPTIONS, PERIODIC, make_batch, make_crystal, make_ion, make_molecule, make_potential

from so3krates_dist.config import DataSection, EuclideanTransformerSection, TrainSection
from so3krates_dist.data.mixture import Mixture
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.model.potential import Potential
from so3krates_dist.train.proof import choose_fixed_graphs, describe_proof, prove

CUTOFFS = (4.0, 6.0)
FIGURES = [
    "proof_energy_error",
    "proof_forces_error",
    "proof_forces_relative",
    "proof_net_force",
    "proof_rotation_error",
]

options = pytest.mark.parametrize("options", OPTIONS)


def cluster(seed: int, num_atoms: int = 5, group: str = "cluster", charge: float = 0.0) -> Graph:
    return dataclasses.replace(label(make_cluster(seed, num_atoms, group), make_morse()), total_charge=charge)


def crystal(seed: int) -> Graph:
    graph = make_cluster(seed, 4, "crystal")
    periodic = dataclasses.replace(graph, cell=np.diag([6.0, 6.5, 7.0]), pbc=np.ones(3, bool))
    return label(periodic, make_morse())


def open_mixture(folder: Path, *splits: tuple[Sequence[Graph], Sequence[Graph]], verify: str = "sha256") -> Mixture:
    """Write a data set of each pair of training and validation split, and open them together."""
    folders = [
        str(write_dataset(folder / f"set{i}", {"train": train, "validation": validation}, name=f"set{i}"))
        for i, (train, validation) in enumerate(splits)
    ]
    section = DataSection(folders=tuple(folders), verify=verify)  # type: ignore[arg-type]
    return Mixture.open(section, EuclideanTransformerSection(cutoff=4.0))


def describe(graphs: Sequence[Graph]) -> list[tuple[str, int, float]]:
    return [(g.group, g.num_atoms, g.total_charge) for g in graphs]


class TestChoice:
    def test_one_of_each_kind_comes_before_another_one_of_the_same(self, tmp_path: Path) -> None:
        held_out = [
            cluster(0, 5, "a"), cluster(1, 6, "a"), cluster(2, 7, "a"), cluster(3, 5, "b"), cluster(4, 8, "b", 1.0), crystal(5)
        ]  # fmt: skip
        mixture = open_mixture(tmp_path, ([cluster(9, 4, "c")], held_out))
        chosen = choose_fixed_graphs(mixture, CUTOFFS)
        assert describe(chosen) == [("a", 5, 0.0), ("b", 5, 0.0), ("b", 8, 1.0), ("crystal", 4, 0.0)]
        np.testing.assert_allclose(chosen[0].positions, held_out[0].positions, atol=1e-6)
        for graph in chosen:
            expected = build_neighbors(dataclasses.replace(graph, pair_first=None), *CUTOFFS)
            assert graph.num_short_pairs == expected.num_short_pairs
            np.testing.assert_array_equal(graph.pair_first, expected.pair_first)

    def test_energies_are_those_that_are_trained_on(self, tmp_path: Path) -> None:
        graphs = [cluster(s) for s in range(6)]
        moved = [dataclasses.replace(g, energy=g.energy + 100.0 * g.num_atoms) for g in graphs]  # type: ignore[operator]
        mixture = open_mixture(tmp_path, (graphs[2:], graphs[:2]))
        plain = choose_fixed_graphs(mixture, CUTOFFS)
        assert [g.energy for g in plain] == [g.energy for g in mixture.iter_graphs("validation")]
        mixture.active[0].__dict__["shift"] = {10: 100.0, 18: 100.0}
        shifted = choose_fixed_graphs(mixture, CUTOFFS)
        assert [g.energy for g in shifted] == pytest.approx([g.energy for g in moved[:2]])

    def test_all_data_sets_are_among_them(self, tmp_path: Path) -> None:
        sets = [([cluster(10 * i + 5)], [cluster(10 * i + j, 4 + i) for j in range(4)]) for i in range(2)]
        assert [g.num_atoms for g in choose_fixed_graphs(open_mixture(tmp_path, *sets), CUTOFFS)] == [4, 5, 4, 5]

    def test_without_held_out_ones_they_are_trained_on(self, tmp_path: Path) -> None:
        mixture = open_mixture(tmp_path, ([cluster(s, 4 + s) for s in range(3)], []))
        assert [g.num_atoms for g in choose_fixed_graphs(mixture, CUTOFFS)] == [4, 5, 6]

    @pytest.mark.parametrize(
        ("sizes", "expected"), [((150, 120, 30, 21, 20), [150, 30, 20]), ((230, 210, 220), [210]), ((200, 1), [200])]
    )
    def test_there_are_not_too_many_atoms(self, sizes: tuple[int, ...], expected: list[int], tmp_path: Path) -> None:
        mixture = open_mixture(tmp_path, ([cluster(0)], [make_cluster(s, n) for s, n in enumerate(sizes)]))
        assert [g.num_atoms for g in choose_fixed_graphs(mixture, CUTOFFS)] == expected

    def test_everyone_chooses_the_same(self, tmp_path: Path) -> None:
        mixture = open_mixture(tmp_path, ([cluster(0)], [cluster(s, 4 + s % 5, f"group{s % 7}") for s in range(30)]))
        torch.manual_seed(1)
        first, second = (choose_fixed_graphs(mixture, CUTOFFS) for _ in range(2))
        assert len(first) == 4
        assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first, second, strict=True))

    def test_damaged_blocks_are_passed_over_where_there_are_others(self, tmp_path: Path) -> None:
        good, bad = [cluster(s, 5) for s in range(3)], [cluster(s, 6) for s in range(7, 10)]
        mixture = open_mixture(tmp_path, (good, good[:1]), (bad, bad[:1]), verify="size")
        shard = next((tmp_path / "set1").glob("validation*.tar"))
        content = bytearray(shard.read_bytes())
        content[600] ^= 0xFF
        shard.write_bytes(bytes(content))
        assert [g.num_atoms for g in choose_fixed_graphs(mixture, CUTOFFS)] == [5]
        only = dataclasses.replace(mixture, sources=mixture.sources[1:])
        with pytest.raises(DataError, match=r"set1.*must have the CRC"):
            choose_fixed_graphs(only, CUTOFFS)


def make_fixed(options: str) -> list[Graph]:
    """Return a molecule, an ion and, where the model is fit for them, crystals."""
    crystals = [make_crystal(), make_crystal("self_images")] if options in PERIODIC else []
    cutoffs = make_potential(options).cutoffs
    return [build_neighbors(g, *cutoffs) for g in (make_molecule(), make_ion(-1.0), *crystals)]


def section(precision: str) -> TrainSection:
    return TrainSection(precision=precision, zero_stage=0)  # type: ignore[arg-type]


def compute_figures(options: str, precision: str) -> dict[str, float]:
    """Return the figures of a model near its initial weights; forces are of the size of 1 eV/Å."""
    potential = make_potential(options, torch.float32, noise=0.05)
    return prove(potential, make_fixed(options), section(precision), "cpu")


class TestFigures:
    @options
    def test_in_float64_there_is_nothing_to_tell(self, options: str) -> None:
        figures = compute_figures(options, "float64")
        assert sorted(figures) == FIGURES
        assert figures["proof_forces_relative"] < (1e-9 if options == "so3krates_scalars" else 1e-13)
        assert figures["proof_energy_error"] < 1e-13
        assert figures["proof_net_force"] < 1e-12
        assert figures["proof_rotation_error"] < 1e-10

    @options
    def test_in_float32_it_is_rounding(self, options: str) -> None:
        figures = compute_figures(options, "float32")
        # SPHC of degree 0 start almost equal, and what counts as zero depends on the dtype.
        assert 0 < figures["proof_forces_relative"] < (1e-3 if options == "so3krates_scalars" else 5e-6)
        assert figures["proof_energy_error"] < 1e-6
        assert figures["proof_net_force"] < 2e-6
        assert figures["proof_rotation_error"] < 2e-5

    @options
    def test_in_bf16_it_is_more_and_the_net_force_is_not(self, options: str) -> None:
        """Rotations are not worse either: what is rounded are invariants, which are the same to seven digits before."""
        figures = compute_figures(options, "bf16-mixed")
        assert 1e-4 < figures["proof_forces_relative"] < 0.03
        assert 1e-7 < figures["proof_energy_error"] < 0.03
        assert figures["proof_net_force"] < 2e-6
        assert figures["proof_rotation_error"] < 1e-4

    def test_they_are_what_they_say(self) -> None:
        potential, graphs = make_potential("so3lr", torch.float32), make_fixed("so3lr")
        figures = prove(potential, graphs, section("float32"), "cpu")
        exact, batch = make_potential("so3lr", torch.float64), make_batch(graphs)
        exact.load_state_dict(potential.state_dict())
        expected = exact(batch)
        found = {n: v.detach() for n, v in potential.train()(batch.to("cpu", torch.float32)).items()}
        forces = (found["forces"].double() - expected["forces"]).numpy()
        assert figures["proof_forces_error"] == pytest.approx(np.sqrt(np.mean(forces**2)), rel=1e-12)
        size = np.sqrt(np.mean(expected["forces"].numpy() ** 2))
        assert figures["proof_forces_relative"] == pytest.approx(figures["proof_forces_error"] / size, rel=1e-12)
        energies = ((found["energy"] - expected["energy"]) / batch.num_atoms).numpy()
        assert figures["proof_energy_error"] == pytest.approx(np.sqrt(np.mean(energies**2)), rel=1e-12)
        parts = np.split(found["forces"].double().numpy(), np.cumsum(batch.num_atoms.numpy())[:-1])
        assert figures["proof_net_force"] == pytest.approx(max(np.abs(p.sum(0)).max() for p in parts), rel=1e-12)

    def test_a_rotation_shows_a_model_that_does_not_follow_it(self) -> None:
        """Its harmonics see one direction more than others."""
        potential = make_potential("backbone", torch.float32)
        unnamed = Potential(potential.network, potential.statistics)
        assert prove(unnamed, make_fixed("backbone"), section("float32"), "cpu")["proof_rotation_error"] < 1e-5
        coupling = potential.network.harmonics.coupling_2.clone()  # type: ignore[union-attr,operator]
        coupling[0] *= 1.1
        potential.network.harmonics.coupling_2 = coupling  # type: ignore[union-attr]
        assert prove(unnamed, make_fixed("backbone"), section("float32"), "cpu")["proof_rotation_error"] > 1e-4

    def test_a_model_without_configuration_is_proved_too(self) -> None:
        graphs = [build_neighbors(make_cluster(s), 6.0, 6.0) for s in range(2)]
        figures = prove(make_morse(), graphs, section("float32"), "cpu")
        assert 0 < figures["proof_forces_relative"] < 1e-5

    def test_an_atom_alone_has_no_force_and_no_error(self) -> None:
        graph = build_neighbors(make_molecule("H", None), 4.0, 4.0)
        figures = prove(make_potential(dtype=torch.float32), [graph], section("bf16-mixed"), "cpu")
        assert figures["proof_forces_relative"] == figures["proof_forces_error"] == figures["proof_net_force"] == 0.0

    def test_weights_that_are_not_finite_are_said_and_no_error(self) -> None:
        potential = make_potential(dtype=torch.float32)
        with torch.no_grad():
            next(potential.parameters()).fill_(float("nan"))
        figures = prove(potential, make_fixed("backbone"), section("float32"), "cpu")
        assert np.isnan(figures["proof_forces_error"])
        assert "nan" in describe_proof(figures)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bf16-mixed"])
def test_the_model_is_left_as_it_was(is_training: bool, precision: str) -> None:
    potential = make_potential(dtype=torch.float32).train(is_training)
    potential.set_precision(precision)
    parameters = list(potential.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    potential.network.checkpointing = "low_memory"  # type: ignore[assignment]
    calls: list[object] = []
    potential.register_forward_pre_hook(lambda *_: calls.append(None))
    graphs = make_fixed("backbone")
    weights = {name: w.clone() for name, w in potential.state_dict().items()}
    random = torch.get_rng_state()
    for other in ("float32", "bf16-mixed", "float64"):
        prove(potential, graphs, section(other), "cpu")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not calls, "hooks of an engine may be collective"
    assert all(a is b for a, b in zip(potential.parameters(), parameters, strict=True))
    assert all(torch.equal(w, weights[name]) and w.dtype == torch.float32 for name, w in potential.state_dict().items())
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert [p.grad is None for p in parameters] == [True, False] + [True] * (len(parameters) - 2)
    assert potential.training == is_training
    assert potential.as_network.checkpointing == "low_memory"
    expected = torch.bfloat16 if precision == "bf16-mixed" else None
    assert {m.compute_dtype for m in potential.modules() if hasattr(m, "compute_dtype")} == {expected}


def test_the_line_of_the_log() -> None:
    figures = dict(zip(sorted(FIGURES), (2e-7, 2.5e-6, 1.5e-6, 9e-7, 1.2e-5), strict=True))
    assert describe_proof(figures) == (
        "Precision: forces are 0.0025 meV/Å off float64 (RMS; 1.5e-06 of their size), energies 0.0002 meV/atom;"
        " largest net force 0.0009 meV/Å, largest change of forces with a rotation 0.012 meV/Å"
    )
