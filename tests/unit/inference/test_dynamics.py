"""The drift is what it says, the start is what it says, and the verb writes what it says."""

import argparse
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from analytic import label, make_cluster, make_morse, make_run, write_dataset
from ase import Atoms
from ase.calculators.lj import LennardJones
from matplotlib.image import imread

from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.graph import Graph
from so3krates_dist.inference import dynamics
from so3krates_dist.inference.calculator import read_electrons
from so3krates_dist.inference.dynamics import (
    compute_drift,
    count_degrees_of_freedom,
    draw_momenta,
    find_conformer,
    make_atoms,
    run_nve,
    write_nve,
)
from so3krates_dist.units import BOLTZMANN_EV_PER_K


def make_start(seed: int = 0, num_atoms: int = 6) -> Atoms:
    return make_atoms(make_cluster(seed, num_atoms))


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    dynamics.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


@pytest.mark.parametrize("slope", [2.0, -0.25, 0.0])
def test_drift_is_the_slope_times_a_picosecond(slope: float) -> None:
    times = np.arange(0.0, 500.5, 0.5)
    period = 25.0  # a whole number of them: an oscillation has no drift
    energies = 7.0 + slope * times / 1000 + 0.1 * np.sin(2 * np.pi * (times - times.mean()) / period) ** 2
    assert compute_drift(times, energies) == pytest.approx(slope, abs=1e-12)


def test_result_is_in_millielectronvolts_per_atom() -> None:
    times = np.arange(0.0, 1001.0)
    result = dynamics.NveResult(
        times=times, potential_energies=-5.0 + 1e-6 * times, kinetic_energies=2.0 + 1e-6 * times, temperatures=times,
        num_atoms=4, timestep=1.0, milliseconds_per_step=1.0, frames=(),
    )  # fmt: skip
    assert result.drift == pytest.approx(2e-6 * 1000 * 1000 / 4)
    assert result.fluctuation == pytest.approx(0.0, abs=1e-9)
    assert result.total_energies[0] == 0.0


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        (Atoms("Ar"), 0),
        (Atoms("Ar2", positions=[[0, 0, 0], [1, 2, 3]]), 1),
        (Atoms("Ar3", positions=[[0, 0, 0], [1, 2, 3], [2, 4, 6]]), 4),
        (Atoms("Ar3", positions=[[0, 0, 0], [0, 3, 0], [3, 0, 0]]), 3),
        (make_start(), 12),
        (Atoms("Ar2", positions=[[0, 0, 0], [1, 2, 3]], cell=[4, 4, 4], pbc=True), 3),
    ],
)
def test_momenta_have_the_temperature_and_move_nothing_else(atoms: Atoms, expected: int) -> None:
    draw_momenta(atoms, 300.0, seed=1)
    assert count_degrees_of_freedom(atoms) == expected
    assert atoms.get_kinetic_energy() == pytest.approx(expected * 300.0 * BOLTZMANN_EV_PER_K / 2)
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-10)
    if not atoms.pbc.any():
        np.testing.assert_allclose(atoms.get_angular_momentum(), 0, atol=1e-10)


def test_momenta_depend_on_the_seed_alone() -> None:
    starts = [make_start() for _ in range(3)]
    for atoms, seed in zip(starts, (1, 1, 2), strict=True):
        draw_momenta(atoms, 300.0, seed)
    first, again, other = (a.get_momenta() for a in starts)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_same_seed_gives_the_same_trajectory_and_leaves_the_atoms_alone() -> None:
    atoms = make_start()
    before = atoms.copy()
    first, again = (run_nve(make_morse(), atoms, picoseconds=0.02, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.potential_energies, again.potential_energies)
    np.testing.assert_array_equal(atoms.positions, before.positions)
    assert atoms.calc is None
    assert not atoms.get_momenta().any()


def test_lengths_agree() -> None:
    result = run_nve(make_morse(), make_start(), timestep=0.5, picoseconds=0.05)
    assert len(result.times) == len(result.potential_energies) == len(result.temperatures) == 101
    assert result.times[-1] == 50.0
    assert len(result.frames) == 11
    assert result.frames[3].get_potential_energy() == result.potential_energies[30]
    assert result.frames[3].get_forces().shape == (6, 3)


def test_relaxed_start_has_twice_the_temperature_and_unrelaxed_one_has_it() -> None:
    for steps, expected in ((100, 600.0), (0, 300.0)):
        result = run_nve(make_morse(), make_start(), temperature=300.0, picoseconds=0.01, relax_steps=steps)
        assert result.temperatures[0] == pytest.approx(expected)


def test_any_ase_calculator_will_do() -> None:
    start = Atoms("Ar2", positions=[[0, 0, 0], [0, 0, 1.2]])
    result = run_nve(LennardJones(epsilon=0.5), start, picoseconds=0.05, temperature=100.0)
    assert abs(result.drift) < 1.0


@pytest.mark.parametrize("name", ["temperature", "timestep", "picoseconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_bad_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a positive number; got"):
        run_nve(make_morse(), make_start(), **{name: value})


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"picoseconds must be at least two time steps; got 0\.0005"):
        run_nve(make_morse(), make_start(), picoseconds=0.0005)


def test_files(tmp_path: Path) -> None:
    result = run_nve(make_morse(), make_start(), picoseconds=0.05)
    write_nve(result, tmp_path / "dynamics", "a title", {"structure": "cluster"})
    content = json.loads((tmp_path / "dynamics/nve.json").read_text())
    assert content["structure"] == "cluster"
    assert content["drift_mev_per_atom_per_ps"] == result.drift
    frames = ase.io.read(tmp_path / "dynamics/trajectory.xyz", ":")
    assert len(frames) == len(result.frames)
    np.testing.assert_allclose(frames[-1].positions, result.frames[-1].positions, atol=1e-7)
    np.testing.assert_allclose(frames[-1].get_forces(), result.frames[-1].get_forces(), atol=1e-7)
    np.testing.assert_allclose(frames[-1].get_momenta(), result.frames[-1].get_momenta(), atol=1e-6)
    assert imread(tmp_path / "dynamics/nve.png").shape[:2] == (750, 1050)
    names = ["nve.json", "nve.png", "trajectory.xyz"]
    assert sorted(p.name for p in (tmp_path / "dynamics").iterdir()) == names, "no temporary file is left"


def test_a_failure_while_writing_leaves_the_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_nve(make_morse(), make_start(), picoseconds=0.01)
    write_nve(result, tmp_path, "first", {"structure": "first"})
    before = {name: (tmp_path / name).read_bytes() for name in ("nve.json", "nve.png", "trajectory.xyz")}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(dynamics, "_plot_nve", fail)
    with pytest.raises(OSError, match="disk full"):
        write_nve(result, tmp_path, "second", {"structure": "second"})
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def make_splits() -> dict[str, list[Graph]]:
    return {
        "train": [label(make_cluster(s, group="large")) for s in range(6)],
        "test": [label(make_cluster(s, 3, "small")) for s in range(6, 8)],
    }


def test_conformer_of_a_molecule_is_found(tmp_path: Path) -> None:
    splits = make_splits()
    splits["test"].append(label(make_cluster(9, group="large")))
    data = write_dataset(tmp_path / "data", splits)
    np.testing.assert_allclose(find_conformer(data, "large").positions, splits["test"][2].positions, atol=1e-6)
    assert find_conformer(data, "small").num_atoms == 3
    assert find_conformer(data, None).group == "large"
    with pytest.raises(DataError, match=r"must have conformers of `water`; got large, small\. Name one of these"):
        find_conformer(data, "water")


def test_ethanol_is_the_default(tmp_path: Path) -> None:
    graphs = [label(make_cluster(s, group=g)) for s, g in enumerate(("benzene", "ethanol", "water"))]
    assert find_conformer(write_dataset(tmp_path / "data", {"train": graphs}), None).group == "ethanol"


def test_manifest_that_lists_what_is_not_there(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": make_splits()["train"]})
    manifest = data / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"large": 6', '"large": 6, "lost": 1'))
    with pytest.raises(DataError, match="must hold the conformers of `lost` that its manifest lists; got none"):
        find_conformer(data, "lost")


def test_charge_and_unpaired_electrons_go_along() -> None:
    graph = make_cluster(0)
    graph.total_charge, graph.num_unpaired_electrons = 1.0, 1.0
    assert make_atoms(graph).info == {"charge": 1, "spin": 1}
    assert read_electrons(make_atoms(graph)) == (1.0, 1.0 if (graph.atomic_numbers.sum() - 1) % 2 else 0.0)
    graph.num_unpaired_electrons = 2.0  # also where the parity does not fit
    assert read_electrons(make_atoms(graph))[1] == (1.0 if (graph.atomic_numbers.sum() - 1) % 2 else 2.0)
    assert not make_atoms(graph).pbc.any()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", write_dataset(tmp_path / "data", make_splits()))


def test_verb_starts_from_a_molecule(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = dynamics.run(parse(run_folder, "--molecule", "small", "--picoseconds", 0.01, "--temperature", 50))
    output = capsys.readouterr().out
    assert code == 0
    assert "energy drift (meV/atom per ps)" in output
    assert str(run_folder / "dynamics") in output
    content = json.loads((run_folder / "dynamics/small-50K-0.01ps/nve.json").read_text())
    assert content["structure"] == "small"
    assert content["num_atoms"] == 3
    assert content["dtype"] == "float64"


def test_verb_starts_from_a_file(run_folder: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "start.xyz", make_start(num_atoms=4))
    words = (run_folder, "--structure", tmp_path / "start.xyz", "--picoseconds", 0.01, "--dtype", "float32")
    assert dynamics.run(parse(*words)) == 0
    content = json.loads((run_folder / "dynamics/start-0.01ps-float32/nve.json").read_text())
    assert (content["structure"], content["num_atoms"], content["dtype"]) == ("start", 4, "float32")


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ([], "ethanol", "run/dynamics"),
        ([], "large", "run/dynamics"),
        (["--molecule", "ethanol", "--device", "auto"], "ethanol", "run/dynamics"),
        (["--molecule", "water"], "water", "run/dynamics/water"),
        (["--structure", "ethanol.xyz"], "ethanol", "run/dynamics/ethanol"),
        (["--temperature", 500], "ethanol", "run/dynamics/ethanol-500K"),
        (["--timestep", 0.25, "--seed", 3], "large", "run/dynamics/large-0.25fs-seed3"),
        (["--molecule", "a/../b c"], "a/../b c", "run/dynamics/a_.._b_c"),
        (["--molecule", "water", "--out", "there", "--seed", 1], "water", "there"),
    ],
)
def test_results_of_other_molecules_and_settings_have_folders_of_their_own(
    words: list[object], name: str, expected: str
) -> None:
    assert dynamics.choose_folder(parse("run", *words), name) == Path(expected)


def test_verb_writes_where_it_is_told(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dynamics.run(parse(run_folder, "--picoseconds", 0.01, "--out", tmp_path / "there/it/is")) == 0
    assert (tmp_path / "there/it/is/nve.json").is_file()
    assert f"written to {tmp_path / 'there/it/is'}\n" in capsys.readouterr().out
    assert not (run_folder / "dynamics").exists()


def test_verb_refuses_a_file_before_it_computes(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(dynamics, "run_nve", lambda *_, **__: pytest.fail("it was computed"))
    for out in ("file", "file/below"):
        with pytest.raises(DataError, match=f"{out} must be a folder that can be written to; got .*--out"):
            dynamics.run(parse(run_folder, "--picoseconds", 0.01, "--out", tmp_path / out))


def test_verb_refuses_what_is_no_structure(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "start.xyz").write_text("nonsense")
    for path in (tmp_path / "start.xyz", tmp_path / "missing.xyz"):
        with pytest.raises(
            DataError, match=r"\.xyz must be a structure file that ASE reads; got \w+: .* Give an \.xyz file"
        ):
            dynamics.run(parse(run_folder, "--structure", path))


def test_verb_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be a run folder with config\.yaml; got none"):
        dynamics.run(parse(tmp_path))
