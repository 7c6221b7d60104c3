"""npz and GEMS: units, padding, mapped arrays, and what is refused."""

import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
from format_files import (
    assert_same,
    read_all,
    read_first,
    write_extxyz,
    write_gems,
    write_npz,
    write_rmd17,
    write_sgdml,
)

from data_tools.formats import Units, npz, open_layout
from so3krates_dist.errors import DataError

# ----------------------------------------------------------------------------------------------------------------- npz


def test_what_an_npz_says_of_its_units(tmp_path: Path, rng) -> None:
    write_sgdml(tmp_path / "a.npz", rng)
    with open_layout(tmp_path / "a.npz") as file:
        assert file.units == Units("kcal/mol", "Angstrom", "kcal/mol/Angstrom", "the file's e_unit and r_unit")
        assert file.level_of_theory == "PBE0"
        assert file.notes == ()
    write_npz(tmp_path / "b.npz", rng, e_unit=np.array("furlong"), r_unit=np.array("Ang"))
    with open_layout(tmp_path / "b.npz") as file:
        assert file.units is None
        assert file.notes == ("b.npz has units of an unknown name: e_unit 'furlong', r_unit 'Ang'",)
    write_npz(tmp_path / "c.npz", rng, e_unit=np.array(["eV"], object), r_unit=np.array("Ang"))
    with open_layout(tmp_path / "c.npz") as file:
        assert (file.units, len(read_all(file))) == (None, 7), "what is pickled is not looked at"
    write_rmd17(tmp_path / "d.npz", rng)
    with open_layout(tmp_path / "d.npz") as file:
        assert file.units == Units("kcal/mol", "Angstrom", "kcal/mol/Angstrom", "rMD17's documentation")
        assert (file.level_of_theory, file.licence) == ("PBE/def2-SVP", None)


def test_large_compressed_arrays_are_noted_or_refused(tmp_path: Path, rng, monkeypatch) -> None:
    write_rmd17(tmp_path / "a.npz", rng)
    monkeypatch.setattr(npz, "_WORTH_A_NOTE", 100)
    with open_layout(tmp_path / "a.npz") as file:
        assert file.notes == ("a.npz is compressed: each process holds 0.0 GiB of it (np.savez avoids that)",)
    monkeypatch.setattr(npz, "_MAX_UNPACKED", 200)
    message = r"a.npz must unpack to at most 0 GiB; got 0 GiB of compressed arrays. Save it uncompressed with np.savez"
    with pytest.raises(DataError, match=message):
        open_layout(tmp_path / "a.npz")


def test_fortran_order_and_single_rows(tmp_path: Path, rng) -> None:
    expected = write_npz(tmp_path / "a.npz", rng)
    with np.load(tmp_path / "a.npz") as archive:
        arrays = {k: np.asfortranarray(v) for k, v in archive.items()}
    np.savez(tmp_path / "b.npz", **arrays, Q=np.array(1.0), group=np.array(list("abcdefg")))
    with open_layout(tmp_path / "b.npz") as file:
        found = list(read_all(file, 3).values())
    for graph, (_, other), group in zip(found, expected, "abcdefg", strict=True):
        other.total_charge, other.group = 1.0, group
        assert_same(graph, other)


def test_padded_structures_of_an_npz_are_named_by_their_own_formula(tmp_path: Path) -> None:
    arrays = {"z": np.array([[8, 1, 1], [8, 1, 0]]), "R": np.zeros((2, 3, 3)), "F": np.ones((2, 3, 3))}
    np.savez(tmp_path / "a.npz", **arrays, partial_charges=np.ones((2, 3, 1)))
    with open_layout(tmp_path / "a.npz") as file:
        first, second = read_all(file).values()
    assert (first.group, second.group) == ("H2O", "HO")
    assert first.partial_charges.shape == (3,)
    assert second.forces.shape == (2, 3)


def test_a_flipped_bit_in_an_npz_is_found_before_anything_is_mapped(tmp_path: Path, rng) -> None:
    write_npz(tmp_path / "a.npz", rng)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        offset = archive.getinfo("R.npy").header_offset + 300
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[offset] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError, match=r"a.npz must be a readable npz archive; got Bad CRC-32 for file 'R.npy'"):
        open_layout(tmp_path / "a.npz")


def test_an_array_shorter_than_its_shape_is_refused(tmp_path: Path, rng) -> None:
    write_npz(tmp_path / "a.npz", rng)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["F.npy"] = members["F.npy"][:-8]
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(
        DataError, match=r"b.npz must be .*; got F.npy has 328 bytes where its shape \(7, 4, 3\) needs 336"
    ):
        open_layout(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"c.npz must be a readable npz archive; got File is not a zip file"):
        open_layout(tmp_path / "c.npz")


def test_a_file_that_only_goes_by_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("{404}")
    with pytest.raises(DataError, match=r"a.npz must be a readable npz archive; got it does not begin like one"):
        open_layout(tmp_path / "a.npz")


# ---------------------------------------------------------------------------------------------------------------- GEMS


def test_gems_says_what_it_is(tmp_path: Path, rng) -> None:
    write_gems(tmp_path / "a.db", rng)
    with open_layout(tmp_path / "a.db") as file:
        assert file.level_of_theory == "PBE0+MBD"
        assert file.keys == {
            "energy": "e",
            "forces": "f",
            "dipole": "d",
            "total_charge": "q",
            "num_unpaired_electrons": "s",
        }
        assert "single precision" in file.notes[0]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE data SET f = x'0000' WHERE id = 0", r"a.db:0 forces must be a blob of 4-byte numbers; got 2 bytes"),
        ("UPDATE data SET z = 3 WHERE id = 0", r"a.db:0 z must be a blob of 4-byte numbers; got int"),
        ("UPDATE data SET r = x'00000000' WHERE id = 0", r"a.db:0 positions must have shape \(3, 3\); got 1 numbers"),
        ("UPDATE data SET e = 'low' WHERE id = 0", r"a.db:0 energy must be numbers; got 'low'"),
        ("UPDATE metadata SET N = 9", r"a.db must hold as many records as it says; got 6 in `data`, 9 in `metadata`"),
        ("DELETE FROM metadata", r"a.db must hold as many .*; got 6 in `data`, no number in `metadata`. Copy it again"),
        ("DELETE FROM data", r"a.db must hold structures; got none in its table `data`"),
        ("ALTER TABLE data RENAME COLUMN z TO y", r"a.db must be a readable SQLite file; got no such column: z"),
    ],
)
def test_damaged_gems(tmp_path: Path, rng, statement: str, message: str) -> None:
    write_gems(tmp_path / "a.db", rng)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute(statement)
    database.close()
    with pytest.raises(DataError, match=message):
        read_first(tmp_path / "a.db")


def test_a_cut_sqlite_file_is_refused_before_it_is_read(tmp_path: Path, rng) -> None:
    write_gems(tmp_path / "a.db", rng)
    data = (tmp_path / "a.db").read_bytes()
    (tmp_path / "a.db").write_bytes(data[:-1])
    with pytest.raises(
        DataError, match=rf"a.db must have {len(data)} bytes; got {len(data) - 1}. Copy it again: it is cut"
    ):
        open_layout(tmp_path / "a.db")
    (tmp_path / "a.db").write_bytes(data[:16] + b"\xff" * 200 + data[216:])
    with pytest.raises(DataError, match=r"a.db must be a readable SQLite file; got file is not a database"):
        open_layout(tmp_path / "a.db")


# --------------------------------------------------------------------------------------------- what happens after opening


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_extxyz, r"a must be readable by ASE; got FileNotFoundError"),
        (write_npz, r"a must be a readable npz archive; got .*No such file"),
        (write_gems, r"a must be a readable SQLite file; got unable to open database file"),
    ],
)
def test_a_file_that_vanishes_after_it_was_opened(tmp_path: Path, rng, write, message: str) -> None:
    write(tmp_path / "a", rng)
    file = open_layout(tmp_path / "a")
    chunks = file.chunks(2)
    file.close()
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match=message):
        next(file.read(chunks[0]))


def test_groups_of_an_npz_row_by_row(tmp_path: Path, rng) -> None:
    write_npz(tmp_path / "a.npz", rng, group=np.array(list("abcdefg")))
    with open_layout(tmp_path / "a.npz") as file:
        assert [g.group for g in read_all(file, 3).values()] == list("abcdefg")


def test_headers_of_numpy_that_need_more_than_64_kilobytes(tmp_path: Path, rng) -> None:
    write_npz(tmp_path / "a.npz", rng)
    with np.load(tmp_path / "a.npz") as archive, zipfile.ZipFile(tmp_path / "b.npz", "w") as other:
        for name in archive.files:
            with other.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, archive[name], version=(2, 0), allow_pickle=False)
    with open_layout(tmp_path / "a.npz") as first, open_layout(tmp_path / "b.npz") as second:
        for graph, other_graph in zip(read_all(first).values(), read_all(second).values(), strict=True):
            assert_same(graph, other_graph)
