"""HDF5 of published sets: levels of theory, duplicates, missing labels, charges by SMILES; and damaged groups."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from format_files import (
    AMMONIA,
    WATER,
    assert_same,
    write_ani1x,
    write_qm7x,
    write_spice,
    write_transition1x,
)

import data_tools.formats.hdf5 as hdf5_module
from data_tools.formats import OpenFile, open_layout
from data_tools.formats.hdf5_sets import read_formal_charge
from so3krates_dist.errors import DataError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def read_all(file: OpenFile) -> dict:
    return {name: item for chunk in file.chunks(3) for name, item in file.read_records(chunk)}


def refuse_first(file: OpenFile, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(file.read(file.chunks(100)[0]))


# --------------------------------------------------------------------------------------------------------------- QM7-X


def test_duplicates_of_qm7x_go_with_all_that_was_made_of_them(tmp_path: Path, rng) -> None:
    expected = dict(write_qm7x(tmp_path / "a.hdf5", rng))
    with open_layout(tmp_path / "a.hdf5") as file:
        assert file.notes == ("no DupMols.dat beside the files: duplicates of QM7-X are not filtered",)
        assert len(read_all(file)) == 10
    (tmp_path / "DupMols.dat").write_text("Geom-m20-i1-c2-opt\n\nGeom-m7-i1-c1-opt\n")
    with open_layout(tmp_path) as file:
        assert file.notes == ("molecules named in DupMols.dat (2) are left out, as the set's authors do",)
        found = read_all(file)
    assert list(found) == [name for name in expected if "m20-i1-c2" not in name]
    for name, graph in found.items():
        assert_same(graph, expected[name], name)


def test_labels_of_qm7x_are_of_one_level(tmp_path: Path, rng) -> None:
    write_qm7x(tmp_path / "a.hdf5", rng)
    with open_layout(tmp_path / "a.hdf5") as file:
        assert (file.level_of_theory, file.licence) == ("PBE0+MBD", None)
        assert (file.keys["energy"], file.keys["forces"]) == ("ePBE0+MBD", "totFOR")
    for keys in ({"energy": "ePBE0"}, {"forces": "pbe0FOR"}):
        with open_layout(tmp_path / "a.hdf5", keys) as file:
            assert file.level_of_theory == "PBE0"
            assert (file.keys["energy"], file.keys["forces"]) == ("ePBE0", "pbe0FOR")
    with open_layout(tmp_path / "a.hdf5", {"energy": "ePBE0", "forces": "totFOR"}) as file:
        assert file.level_of_theory is None
    with open_layout(tmp_path / "a.hdf5", {"energy": "hRAT"}) as file:
        assert file.level_of_theory is None
        assert "forces" not in file.keys


# -------------------------------------------------------------------------------------------------------------- ANI-1x


def test_other_levels_of_ani1x(tmp_path: Path, rng) -> None:
    write_ani1x(tmp_path / "a.h5", rng)
    with open_layout(tmp_path / "a.h5") as file:
        assert file.level_of_theory == "wB97x/6-31G(d)"
        assert file.notes[0].startswith("nan is a missing label")
    with open_layout(tmp_path / "a.h5", {"energy": "ccsd(t)_cbs.energy"}) as file:
        assert file.level_of_theory == "CCSD(T)*/CBS"
        assert file.keys == {"energy": "ccsd(t)_cbs.energy"}, "no forces or dipoles of another level"
        assert [g.energy for g in read_all(file).values()] == [-1.0, None, -3.0, None] * 2
    with open_layout(tmp_path / "a.h5", {"forces": "wb97x_tz.forces"}) as file:
        assert file.level_of_theory == "wB97x/def2-TZVPP"
        assert file.keys == {"forces": "wb97x_tz.forces"}
        assert all(g.forces is None for g in read_all(file).values())
    message = r"a.h5 must have the key `pbe.energy` for energy; got atomic_numbers, .*wb97x_tz.forces. Correct --keys"
    with pytest.raises(DataError, match=message):
        open_layout(tmp_path / "a.h5", {"energy": "pbe.energy"})


def test_a_nan_among_numbers_is_no_missing_label(tmp_path: Path, rng) -> None:
    write_ani1x(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["H2O1/wb97x_dz.forces"][0, 1, 2] = np.nan
    with open_layout(tmp_path / "a.h5") as file:
        forces = read_all(file)["a.h5:H2O1/0"].forces
    assert np.isnan(forces).sum() == 1


# -------------------------------------------------------------------------------------------------------------- SPICE


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        ("CCO", 0),
        ("[H:2][O:1][H:3]", 0),
        ("[NH4+]", 1),
        ("[Na+].[Cl-]", 0),
        ("[Ca+2:1]", 2),
        ("[Ca++]", 2),
        ("[O-:3][P:2](=[O:4])([O-:5])[O-:6]", -3),
        ("[O-2:1]", -2),
        ("[13CH3:7][C@@H:2]([NH3+:1])[C:3](=[O:4])[O-:5]", 0),
        ("C/C=C\\[N+](C)(C)C", 1),
        ("[Fe+3].[S-]C1-CC-1", 2),
    ],
)
def test_charge_of_a_smiles(smiles: str, charge: int) -> None:
    assert read_formal_charge(smiles) == charge


@pytest.mark.parametrize("smiles", ["[Na+", "Na+]", "", " "])
def test_a_broken_smiles_tells_no_charge(tmp_path: Path, rng, smiles: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(smiles)}$"):
        read_formal_charge(smiles)
    write_spice(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["[h2o]/smiles"][0] = smiles
    with open_layout(tmp_path / "a.h5") as file:
        found = read_all(file)
        assert [isinstance(item, DataError) for item in found.values()] == [True] * 4 + [False] * 4
        refuse_first(file, r"a.h5:\[h2o\]/0 must have a SMILES that tells the charge; got .*. Name an array of charges")


def test_charges_of_spice_may_be_named(tmp_path: Path, rng) -> None:
    write_spice(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for group in file.values():
            del group["smiles"]
            group["total"] = np.full(4, -1.0)
    with open_layout(tmp_path / "a.h5") as file:
        refuse_first(file, r"a.h5:\[h2o\]/0 must have a SMILES that tells the charge; got none. Name an array")
    with open_layout(tmp_path / "a.h5", {"total_charge": "total", "energy": "formation_energy"}) as file:
        assert {g.total_charge for g in read_all(file).values()} == {-1.0}
        assert file.level_of_theory == "wB97M-D3(BJ)/def2-TZVPPD"
        assert file.keys["forces"] == "dft_total_gradient"


# --------------------------------------------------------------------------------------------------------- Transition1x


def test_transition1x_without_its_common_folder(tmp_path: Path, rng) -> None:
    write_transition1x(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file, h5py.File(tmp_path / "b.h5", "w") as other:
        file.copy("data", other, name="train")
    with open_layout(tmp_path / "a.h5") as file, open_layout(tmp_path / "b.h5") as other:
        assert other.layout is file.layout
        assert other.num_records == file.num_records == 15
        assert "own division into train, val and test is not kept" in file.notes[0]


# ------------------------------------------------------------------------------------------------------- damaged files


def test_a_group_without_its_arrays_is_one_error_per_record(tmp_path: Path, rng) -> None:
    write_spice(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["[h2o]/atomic_numbers"]
        del file["ammonium fragment/dft_total_gradient"]
        file["ammonium fragment/dft_total_gradient"] = np.zeros((2, 4, 3))
    with open_layout(tmp_path / "a.h5") as file:
        found = {name: str(item) for name, item in read_all(file).items()}
    rule = "must have the array `atomic_numbers`; got conformations, dft_total_energy"
    assert found["a.h5:[h2o]/3"].startswith(f"a.h5:[h2o]/3 {rule}")
    message = "dft_total_gradient must have 4 rows like positions; got (2, 4, 3)"
    assert all(message in found[f"a.h5:ammonium fragment/{i}"] for i in range(4)), "whatever the chunk is"


def test_rows_of_another_shape_and_texts_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["H2O/atomic_numbers"], file["H2O/coordinates"] = WATER, np.zeros((2, 4, 3))
        file["H2O/wb97x_dz.energy"] = np.zeros(2)
        file["H3N/atomic_numbers"], file["H3N/coordinates"] = AMMONIA, np.zeros((1, 4, 3))
        file["H3N/wb97x_dz.energy"] = np.array([b"low"])
    with open_layout(tmp_path / "a.h5") as file:
        refuse_first(file, r"a.h5:H2O/0 positions must have shape \(3, 3\); got \(4, 3\)")
        message = str(read_all(file)["a.h5:H3N/0"])
    assert message == "a.h5:H3N/0 must have the array `wb97x_dz.energy`; got Dataset. Check the file, or --layout."


def test_empty_sets_and_missing_packages_are_named(tmp_path: Path, rng, monkeypatch) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["H2O/atomic_numbers"], file["H2O/coordinates"] = WATER, np.zeros((0, 3, 3))
        file["H2O/wb97x_dz.energy"] = np.zeros(0)
    with pytest.raises(DataError, match=r"a.h5 must hold structures; got none"):
        open_layout(tmp_path / "a.h5")
    write_spice(tmp_path / "b.h5", rng)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    message = (
        r"b.h5 must be read with h5py; got no h5py here. Install it with `pip install 'so3krates-dist\[formats\]'`"
    )
    with pytest.raises(DataError, match=message):
        open_layout(tmp_path / "b.h5")


def test_damage_in_the_middle_is_one_line(tmp_path: Path, rng) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("A", "B"):
            file[f"{name}/atomic_numbers"] = WATER
            file.create_dataset(
                f"{name}/coordinates", data=rng.normal(size=(50, 3, 3)), compression="gzip", chunks=True
            )
            file[f"{name}/wb97x_dz.energy"] = np.zeros(50)
        where = file["A/coordinates"].id.get_chunk_info(0).byte_offset
    with (tmp_path / "a.h5").open("r+b") as raw:
        raw.seek(where)
        raw.write(b"\xff" * 200)
    with open_layout(tmp_path / "a.h5") as file:
        refuse_first(file, r"a.h5 must be a readable HDF5 file; got .*\. Copy it again")
    assert hdf5_module.hdf5_error(Path("x"), "a\nb").got == "a"


def test_a_broken_link_is_one_line(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["A"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DataError, match=r"a.h5 must be a readable HDF5 file; got 'Unable to .*'\. Copy it again"):
        open_layout(tmp_path / "a.h5")
