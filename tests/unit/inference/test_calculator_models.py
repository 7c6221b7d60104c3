"""The ASE calculator with models of all kinds: their options and outputs, what they refuse and ignore, SO3LR as published."""

import contextlib
import dataclasses
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from analytic import make_cluster, make_morse
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from scipy.spatial.transform import Rotation

from so3krates_dist.config import MODEL_SECTIONS, GeomAttSection, ModelSection, So3kratesSection, So3lrSection
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import collate
from so3krates_dist.inference.calculator import So3kratesCalculator, make_graph
from so3krates_dist.inference.dynamics import run_nve
from so3krates_dist.inference.interop import import_so3lr
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, load_model, save_model

SO3LR = So3lrSection(num_features=16, num_layers=1, num_heads=2, degrees=(1, 2), num_radial_basis=4)
STATISTICS = ModelStatistics(elements=(1, 6, 8), energy_baselines={}, energy_scale=1.0, mean_neighbors=6.0)


def make_model(section: ModelSection, **statistics: object) -> Potential:
    torch.manual_seed(3)
    return build_model(section, dataclasses.replace(STATISTICS, **statistics)).eval()  # type: ignore[arg-type]


def make_methanol(**info: object) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.03, seed=2)
    atoms.info.update(info)
    return atoms


def test_long_range_cutoff_of_a_model_and_of_its_folder(tmp_path: Path) -> None:
    """Two pieces 13 Å apart feel each other without a cutoff, hardly with one of 20 Å, and not with the model's own 12 Å."""
    potential = make_model(SO3LR)
    save_model(tmp_path, SO3LR, STATISTICS, potential.state_dict(), {})
    atoms = make_methanol() + Atoms("CO", positions=[[13.5, 0, 0], [14.6, 0, 0]])
    energies = {}
    for name, options in {
        "own": {},
        "12": {"long_range_cutoff": 12.0},
        "20": {"long_range_cutoff": 20},
        "none": {"long_range_cutoff": None},
        "0": {"long_range_cutoff": 0},
    }.items():
        from_model, from_folder = (
            So3kratesCalculator(m, dtype="float64", **options).get_potential_energy(atoms)
            for m in (potential, tmp_path)
        )
        assert from_model == pytest.approx(from_folder, abs=1e-12)
        energies[name] = from_model
    assert energies["own"] == energies["12"]
    assert energies["none"] == energies["0"]
    assert len({round(e, 9) for e in energies.values()}) == 3
    assert potential.section == SO3LR, "the caller's model stays as it is"


@pytest.mark.parametrize("seed", range(3))
def test_a_loaded_model_gives_what_its_folder_gives(seed: int, tmp_path: Path) -> None:
    """In float64 from a model in float32, on rotated methane: with rounded Wigner symbols SPHC that vanish by symmetry do not."""
    section = So3kratesSection(num_features=24, num_layers=2, num_radial_basis=8)
    save_model(tmp_path, section, STATISTICS, make_model(section).state_dict(), {})
    atoms = molecule("CH4")
    atoms.positions = atoms.positions @ Rotation.random(random_state=seed).as_matrix().T
    results = []
    for model in (tmp_path, load_model(tmp_path), load_model(tmp_path).double()):
        atoms.calc = So3kratesCalculator(model, dtype="float64")
        results.append((atoms.get_potential_energy(), atoms.get_forces()))
    for energy, forces in results[1:]:
        assert energy == results[0][0]
        np.testing.assert_array_equal(forces, results[0][1])


@pytest.mark.parametrize("value", ["far", [12.0], "of the Model"])
def test_a_long_range_cutoff_that_is_no_number(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^long_range_cutoff must be a number in Å, or None for no end; got "):
        So3kratesCalculator(make_model(SO3LR), long_range_cutoff=value)  # type: ignore[arg-type]


def test_a_long_range_cutoff_that_has_no_effect() -> None:
    model = make_model(dataclasses.replace(SO3LR, electrostatics="none", dispersion=False))
    with pytest.raises(ConfigError, match=r"model\.long_range_cutoff must be left (out|at 12) "):
        So3kratesCalculator(model, long_range_cutoff=20.0)


@pytest.mark.parametrize(("value", "got"), [(5.0, "5"), (float("nan"), "nan"), (-1.0, "-1")])
def test_a_long_range_cutoff_that_the_model_does_not_allow(value: float, got: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.long_range_cutoff must .*; got {got}"):
        So3kratesCalculator(make_model(SO3LR), long_range_cutoff=value)


def test_a_long_range_cutoff_for_a_model_without_one(tmp_path: Path) -> None:
    section = GeomAttSection(num_layers=1, num_features=8, inner_width=8)
    save_model(tmp_path, section, STATISTICS, make_model(section).state_dict(), {})
    for model in (make_model(section), tmp_path):
        with pytest.raises(ConfigError, match=r"model\.long_range_cutoff must be an option of model\.name=geomatt"):
            So3kratesCalculator(model, long_range_cutoff=12.0)
    with pytest.raises(ConfigError, match=r"model\.long_range_cutoff must be an option of the model"):
        So3kratesCalculator(make_morse(), long_range_cutoff=None)


def test_no_long_range_cutoff_is_for_molecules() -> None:
    atoms = make_methanol()
    atoms.set_cell(15 * np.eye(3))
    atoms.pbc = True
    calculator = So3kratesCalculator(make_model(SO3LR), long_range_cutoff=None)
    with pytest.raises(DataError, match=r"CH4O must be a molecule for this model; .* Set a long-range cutoff"):
        calculator.get_potential_energy(atoms)


class TestOutputs:
    def test_charges_dipole_and_ratios(self) -> None:
        calculator = So3kratesCalculator(make_model(SO3LR), dtype="float64")
        atoms = make_methanol()
        atoms.calc = calculator
        charges, dipole = atoms.get_charges(), atoms.get_dipole_moment()
        assert charges.shape == (6,)
        assert abs(charges.sum()) < 1e-12
        np.testing.assert_allclose(dipole, charges @ atoms.positions, atol=1e-12)
        assert np.linalg.norm(dipole) > 1e-3
        assert calculator.results["hirshfeld_ratios"].shape == (6,)
        assert {"dipole", "charges", "hirshfeld_ratios"} <= set(calculator.implemented_properties)

    @pytest.mark.parametrize("charge", [1, -2])
    def test_the_dipole_of_an_ion_is_about_the_origin_of_its_coordinates(self, charge: int) -> None:
        atoms = make_methanol(charge=charge, spin=0)
        atoms.calc = So3kratesCalculator(make_model(SO3LR), dtype="float64")
        dipole = atoms.get_dipole_moment()
        np.testing.assert_allclose(dipole, atoms.get_charges() @ atoms.positions, atol=1e-12)
        atoms.positions += [1.0, -2.0, 3.0]
        np.testing.assert_allclose(atoms.get_dipole_moment() - dipole, charge * np.array([1.0, -2.0, 3.0]), atol=1e-11)

    @pytest.mark.parametrize("name", MODEL_SECTIONS)
    def test_every_model_gives_what_its_section_says(self, name: str) -> None:
        options = {"num_features": 12} if "geomatt" not in name else {"num_features": 8, "inner_width": 8}
        potential = make_model(MODEL_SECTIONS[name](num_layers=1, **options))  # type: ignore[call-arg]
        graph = build_neighbors(make_graph(make_methanol()), *potential.cutoffs)
        assert set(potential(collate([graph]))) == {"energy", "forces"} | MODEL_SECTIONS[name].outputs

    def test_other_models_have_none(self) -> None:
        graph = make_cluster(0)
        atoms = Atoms(graph.atomic_numbers, graph.positions)
        atoms.calc = So3kratesCalculator(make_morse())
        for get in (atoms.get_charges, atoms.get_dipole_moment):
            with pytest.raises(PropertyNotImplementedError):
                get()
        assert set(atoms.calc.implemented_properties) == {"energy", "free_energy", "forces", "stress"}


class TestUnpairedElectrons:
    def test_those_that_are_stated_are_refused_where_none_were_in_training(self) -> None:
        calculator = So3kratesCalculator(make_model(SO3LR))
        for info in ({"spin": 3}, {"charge": 1, "spin": 2}):
            with pytest.raises(
                DataError, match=r"CH4O must have no unpaired electrons: .* was never trained; got some"
            ):
                calculator.get_potential_energy(make_methanol(**info))
        for info in ({"spin": 1}, {"spin": 0}, {"charge": 1, "spin": 0}):
            assert np.isfinite(calculator.get_potential_energy(make_methanol(**info)))

    def test_an_odd_number_of_electrons_without_a_spin_is_taken_as_a_closed_shell_and_said_once(self) -> None:
        calculator = So3kratesCalculator(make_model(SO3LR), dtype="float64")
        with pytest.warns(
            UserWarning, match=r"^CH4O has an odd number of electrons and states no spin; .* takes none$"
        ):
            found = calculator.get_potential_energy(make_methanol(charge=1))
        moved = make_methanol(charge=1)
        moved.positions[0] += 0.01
        calculator.get_potential_energy(moved)  # a second warning would be an error here
        assert found == calculator.get_potential_energy(make_methanol(charge=1, spin=0))

    def test_a_spin_that_is_stated_afterwards_counts(self) -> None:
        atoms = make_methanol(charge=1)
        atoms.calc = So3kratesCalculator(make_model(SO3LR))
        with pytest.warns(UserWarning, match="takes none"):
            atoms.get_potential_energy()
        atoms.info["spin"] = 2
        with pytest.raises(DataError, match="was never trained"):
            atoms.get_potential_energy()

    def test_a_model_that_was_trained_with_them_takes_them(self) -> None:
        calculator = So3kratesCalculator(make_model(SO3LR, has_unpaired_electrons=True), dtype="float64")
        energies = [
            calculator.get_potential_energy(make_methanol(charge=1, **i)) for i in ({"spin": 0}, {}, {"spin": 2})
        ]
        assert energies[1] == energies[2] != energies[0]


def test_charges_of_a_sign_that_was_never_trained_are_refused() -> None:
    calculator = So3kratesCalculator(make_model(SO3LR, charge_signs=(1,)))
    assert np.isfinite(calculator.get_potential_energy(make_methanol(charge=1, spin=0)))
    with pytest.raises(DataError, match=r"^CH4O must have no negative charge: the model saw no structure with one"):
        calculator.get_potential_energy(make_methanol(charge=-1, spin=0))


class TestWhatAModelIgnores:
    def test_it_is_said_once(self) -> None:
        calculator = So3kratesCalculator(make_model(So3kratesSection(num_features=12, num_layers=1)))
        with pytest.warns(
            UserWarning, match="total charges and unpaired electrons, which this model does not see"
        ) as found:
            calculator.get_potential_energy(make_methanol(charge=1))
        assert len(found) == 1
        calculator.get_potential_energy(make_methanol(charge=-1))  # a second warning would be an error here
        calculator.get_potential_energy(make_methanol())

    @pytest.mark.parametrize(
        "section",
        [
            GeomAttSection(num_layers=1, num_features=8, inner_width=8),
            GeomAttSection(num_layers=1, num_features=8, inner_width=8, algorithm="dense"),
            So3kratesSection(num_features=12, num_layers=1, non_local=True),
        ],
    )
    def test_a_box_is_refused(self, section: ModelSection) -> None:
        atoms = make_methanol()
        atoms.set_cell(15 * np.eye(3))
        atoms.pbc = [True, False, False]
        with pytest.raises(
            DataError, match=r"CH4O must be a molecule for this model; got a periodic structure\. Take a"
        ):
            So3kratesCalculator(make_model(section)).get_potential_energy(atoms)

    def test_charged_crystals_are_noted_where_electrostatics_is_cut_off(self) -> None:
        calculator = So3kratesCalculator(make_model(SO3LR))
        atoms = make_methanol(charge=1)
        atoms.info["spin"] = 0
        calculator.get_potential_energy(atoms)  # a molecule: a warning would be an error here
        atoms.set_cell(15 * np.eye(3))
        atoms.pbc = True
        with pytest.warns(
            UserWarning, match=r"charged periodic structures.*cut off; model\.electrostatics=ewald"
        ) as found:
            calculator.get_potential_energy(atoms)
        assert len(found) == 1
        atoms.rattle(0.01)
        calculator.get_potential_energy(atoms)
        none = So3kratesCalculator(make_model(dataclasses.replace(SO3LR, electrostatics="none")))
        none.get_potential_energy(atoms)
        pytest.importorskip("torchpme")
        So3kratesCalculator(make_model(dataclasses.replace(SO3LR, electrostatics="ewald"))).get_potential_energy(atoms)

    def test_large_boxes_are_refused_for_sums_over_all_images(self) -> None:
        pytest.importorskip("torchpme")
        atoms = make_methanol()
        atoms.set_cell(999.9 * np.eye(3))
        atoms.pbc = True
        calculator = So3kratesCalculator(make_model(dataclasses.replace(SO3LR, electrostatics="ewald")))
        with pytest.raises(DataError, match="CH4O must have lattice vectors of at most 468 Å on average"):
            calculator.get_potential_energy(atoms)

    def test_slabs_are_refused_for_sums_over_all_images(self) -> None:
        pytest.importorskip("torchpme")
        atoms = make_methanol()
        atoms.set_cell(15 * np.eye(3))
        atoms.pbc = [True, True, False]
        calculator = So3kratesCalculator(make_model(dataclasses.replace(SO3LR, electrostatics="ewald")))
        with pytest.raises(DataError, match="CH4O must be periodic along all three lattice vectors or none"):
            calculator.get_potential_energy(atoms)


# -------------------------------------------------------------------------------------------------- SO3LR as published


@pytest.fixture(scope="module")
def published(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of the published weights after import, and that of the reference outputs."""
    reference = reference_dir / "so3lr"
    return import_so3lr(reference / "params.pkl", tmp_path_factory.mktemp("published") / "so3lr"), reference


def make_published(published: tuple[Path, Path], cutoff: float | None = 12.0) -> So3kratesCalculator:
    return So3kratesCalculator(published[0], dtype="float64", long_range_cutoff=cutoff)


class TestPublishedSo3lr:
    @pytest.mark.parametrize(
        ("tag", "info", "cutoff"),
        [
            ("atat", {}, 12.0),
            ("dha", {}, 12.0),
            ("dha_q1", {"charge": 1}, 12.0),
            ("dha_qm1", {"charge": -1}, 12.0),
            ("dha_nolr", {}, None),
        ],
    )
    def test_it_gives_the_published_numbers(
        self, published: tuple[Path, Path], tag: str, info: dict[str, int], cutoff: float | None
    ) -> None:
        expected = np.load(published[1] / "extra_outputs.npz")
        stored = ase.io.read(published[1] / f"{tag.partition('_')[0]}.xyz")
        atoms = Atoms(stored.numbers, stored.positions, info=info)
        atoms.calc = make_published(published, cutoff)
        with pytest.warns(UserWarning, match="takes none") if info else contextlib.nullcontext():
            energy = atoms.get_potential_energy()
        assert energy == pytest.approx(float(expected[f"{tag}_E"]), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), expected[f"{tag}_F"], atol=1e-6)
        np.testing.assert_allclose(atoms.get_dipole_moment(), expected[f"{tag}_dip"][0], atol=1e-6)
        np.testing.assert_allclose(atoms.calc.results["hirshfeld_ratios"], expected[f"{tag}_hr"], atol=1e-6)
        assert atoms.get_charges().sum() == pytest.approx(info.get("charge", 0), abs=1e-10)

    def test_a_box_of_water(self, published: tuple[Path, Path]) -> None:
        """Forces and stress are derivatives of the energy, where pairs go through several images of a small box."""
        water = molecule("H2O")
        atoms = Atoms(cell=6.3 * np.eye(3) + 0.4 * np.eye(3, k=1), pbc=True)
        for number, place in enumerate(np.ndindex(2, 2, 2)):
            one = water.copy()
            one.rotate(77.0 * number, (1.0, number, 2.0))
            one.translate(np.array(place) * 3.1)
            atoms += one
        atoms.calc = make_published(published)
        forces = atoms.get_forces()
        assert np.abs(forces).max() > 0.5
        np.testing.assert_allclose(calculate_numerical_forces(atoms, eps=1e-4, iatoms=[4]), forces[[4]], atol=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-7)

    def test_dynamics(self, published: tuple[Path, Path]) -> None:
        """Energy is conserved; the bonds' repulsion and all long-range terms take part."""
        result = run_nve(published[0], make_methanol(charge=1, spin=0), picoseconds=0.02, timestep=0.25, relax_steps=10)
        assert np.ptp(1e3 * result.kinetic_energies / result.num_atoms) > 5.0
        assert np.abs(result.total_energies).max() < 0.2, "meV/atom"

    def test_refusals(self, published: tuple[Path, Path]) -> None:
        calculator = make_published(published)
        with pytest.raises(DataError, match=r"CH4O must have no unpaired electrons: .* was never trained"):
            calculator.get_potential_energy(make_methanol(spin=2))
        with pytest.raises(DataError, match=r"H4Si must have only elements the model was trained on \(.*\); got Si"):
            calculator.get_potential_energy(molecule("SiH4"))
