"""ASE's files and databases: frames as ASE reads them, rows as JSON and numbers, and what is refused."""

import json
import sqlite3
import struct
import zlib
from pathlib import Path

import ase
import ase.db
import ase.io
import lmdb
import numpy as np
import pytest
from format_files import (
    AMMONIA,
    WATER,
    assert_same,
    make_graph,
    read_all,
    read_first,
    to_atoms,
    write_ase_db,
    write_aselmdb,
    write_extxyz,
    write_traj,
)

from data_tools.formats import Units, ase_files, aselmdb, extxyz, open_layout
from so3krates_dist.errors import DataError

# -------------------------------------------------------------------------------------------------------------- extxyz


def test_each_frame_is_read_as_ase_reads_it(tmp_path: Path, rng) -> None:
    frames = []
    for number in range(9):
        atoms = ase.Atoms("OHH" if number % 2 else "He", rng.normal(size=(3 if number % 2 else 1, 3)))
        if number % 3 == 0:
            atoms.cell, atoms.pbc = rng.normal(size=(3, 3)), [True, number % 2 == 0, True]
            atoms.info["REF_stress"] = rng.normal(size=9)
        atoms.info |= {"REF_energy": float(rng.normal()), "note": "energy=3 F=7", "charge": number % 2}
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    read = ase.io.read(tmp_path / "a.xyz", ":")
    with open_layout(tmp_path / "a.xyz") as file:
        assert file.keys["energy"] == "REF_energy", "what stands in a text is no key"
        graphs = list(read_all(file, 2).values())
    for graph, atoms in zip(graphs, read, strict=True):
        np.testing.assert_array_equal(graph.positions, atoms.positions)
        np.testing.assert_array_equal(graph.forces, atoms.arrays["REF_forces"])
        assert (graph.energy, graph.total_charge) == (atoms.info["REF_energy"], atoms.info["charge"])
        assert (graph.cell is None) == (not atoms.pbc.any())
        if graph.cell is not None:
            np.testing.assert_array_equal(graph.cell, atoms.cell[:])
            np.testing.assert_array_equal(graph.pbc, atoms.pbc)
            np.testing.assert_array_equal(graph.stress.ravel(), atoms.info["REF_stress"].ravel())


SIMPLE, CELL = "Properties=species:S:1:pos:R:3:forces:R:3", 'Lattice="4 0.5 0 0 5 0 0 0 6"'


@pytest.mark.parametrize(
    ("header", "row", "is_simple"),
    [
        (SIMPLE + " energy=-1.5 note='a b' REF_dipole=\"1 2 3\" flag", "he 0 0 1 1 2 3e-1", True),
        (f"{SIMPLE} {CELL} energy=-1.5", "He 0 0 1 1 2 3", True),
        (f'{SIMPLE} {CELL} pbc="T F T"', "He 0 0 1 1 2 3", True),
        (f'{SIMPLE} {CELL} pbc="F F F" virial="1 2 3 4 5 6 7 8 9"', "He 0 0 1 1 2 3", True),
        ("some comment", "He 0 0 1", True),
        ("", "He 0 0 1", True),
        ("Properties=species:S:1:pos:R:3:q:R:1:REF_forces:R:3", "He 0 0 1 0.5 1 2 3", True),
        (f'{SIMPLE} {CELL} stress="1 2 3 2 5 6 3 6 9"', "He 0 0 1 1 2 3", False),
        ("Properties=species:S:1:pos:R:3:charge:R:1", "He 0 0 1 0.5", False),
        ("Properties=species:S:1:pos:R:3:tags:I:1", "He 0 0 1 5", False),
        ("Properties=pos:R:3:species:S:1", "0 0 1 He", False),
        ("Properties=Z:I:1:pos:R:3", "2 0 0 1", False),
        (SIMPLE + ' forces="1 2 3"', "He 0 0 1 1 2 3", False),
        (SIMPLE, "He 0 0 1 1 2 3 superfluous", False),
        (f'{SIMPLE} pbc="T T F"', "He 0 0 1 1 2 3", False),
    ],
)
def test_the_short_cut_reads_what_ase_reads(monkeypatch, header: str, row: str, is_simple: bool) -> None:
    frame = f"2\n{header}\n{row}\n{row}\n"
    assert (extxyz._parse_simple(frame) is not None) == is_simple
    short = extxyz.parse_frame(frame.encode())
    monkeypatch.setattr(extxyz, "_parse_simple", lambda text: None)
    for found, expected in zip(short, extxyz.parse_frame(frame.encode()), strict=True):
        assert sorted(found) == sorted(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("rows", [["He 0 0 1 1 2", "He 0 0 1 1 2 3 4"], ["Xx 0 0 1 1 2 3"] * 2, ["He 0 0 x 1 2 3"] * 2])
def test_the_short_cut_leaves_odd_rows_to_ase(rows: list[str]) -> None:
    assert extxyz._parse_simple("\n".join(["2", SIMPLE, *rows])) is None


def test_frames_in_blocks_of_any_size(tmp_path: Path, rng, monkeypatch) -> None:
    write_extxyz(tmp_path / "a.xyz", rng)
    with open_layout(tmp_path / "a.xyz") as file:
        chunks = file.chunks(1)
    text = (tmp_path / "a.xyz").read_bytes()
    (tmp_path / "b.xyz").write_bytes(text.rstrip(b"\n"))
    (tmp_path / "c.xyz").write_bytes(text + b"\n  \n")
    for block in (7, 64, 1000):
        monkeypatch.setattr(extxyz, "_BLOCK", block)
        with open_layout(tmp_path / "a.xyz") as file:
            assert file.chunks(1) == chunks
        with open_layout(tmp_path / "b.xyz") as file:
            assert [c.marks[0] for c in file.chunks(1)] == [c.marks[0] for c in chunks]
            assert len(read_all(file)) == len(chunks)
        with open_layout(tmp_path / "c.xyz") as file:
            assert file.chunks(1) == chunks


def test_cell_vectors_behind_the_atoms(tmp_path: Path) -> None:
    text = "1\nhelium\nHe 0 0 0\nVEC1 4 0 0\nVEC2 0 5 0\nVEC3 0 0 6\n"
    (tmp_path / "a.xyz").write_text(text * 2)
    with open_layout(tmp_path / "a.xyz") as file:
        first, second = read_all(file, 1).values()
    assert first.cell.tolist() == second.cell.tolist() == np.diag([4.0, 5, 6]).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n\nHe 0 0 0\n\n1\n\nHe 0 0 0\n", "readable by ASE; got an empty line before record 1. Give a file that"),
        ("1\n\nHe 0 0 0\nx\n", r"readable by ASE; got b'x' where record 1 has its number of atoms"),
        ("1\n\nHe 0 0 0\n3\n\nHe 0 0 0\n", r"readable by ASE; got record 1 of 3 atoms cut short"),
        ("1\n", r"readable by ASE; got record 0 of 1 atoms cut short"),
    ],
)
def test_files_whose_frames_cannot_be_told_apart(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(DataError, match=f"a.xyz must be {message}"):
        open_layout(tmp_path / "a.xyz")


def test_a_bad_frame_is_one_bad_record(tmp_path: Path) -> None:
    good = "1\nenergy=-1.0\nHe 0 0 0\n"
    bad = "1\nenergy=-1.0\nHe 0 zero 0\n"
    other = "1\nREF_energy=-1.0\nHe 0 0 0\n"
    (tmp_path / "a.xyz").write_text(good + bad + good)
    with open_layout(tmp_path / "a.xyz") as file:
        found = list(read_all(file).values())
        assert [isinstance(item, DataError) for item in found] == [False, True, False]
        assert str(found[1]).startswith("a.xyz:1 must be readable by ASE; got ValueError: could not convert string")
    (tmp_path / "b.xyz").write_text(good + other)
    with pytest.raises(DataError, match=r"b.xyz must have one key for energy; got energy and REF_energy"):
        open_layout(tmp_path / "b.xyz")
    with open_layout(tmp_path / "b.xyz", {"energy": "energy"}) as file:
        assert [g.energy for g in read_all(file).values()] == [-1.0, None]


def test_a_record_that_differs_from_those_looked_at_before(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(extxyz, "_MAX_HEADERS", 1)
    good, other = "1\nenergy=-1.0\nHe 0 0 0\n", "1\nREF_energy=-1.0\nHe 0 0 0\n"
    both = "1\nenergy=-1.0 E=-1.0\nHe 0 0 0\n"
    (tmp_path / "a.xyz").write_text(good + other + both + good)
    with open_layout(tmp_path / "a.xyz") as file:
        found = [str(item) for item in read_all(file).values()]
    assert found[1] == "a.xyz:1 must have `energy` like the others; got `REF_energy`. Choose with --keys energy=KEY."
    assert found[2] == "a.xyz:2 must have one key for energy; got energy and E. Choose with --keys energy=KEY."


def test_real_extxyz(data_dir: Path) -> None:
    path = data_dir / "3bpa" / "train_300K.xyz"
    frames = ase.io.read(path, ":")
    with open_layout(path) as file:
        assert (file.num_records, file.layout.name) == (500, "extxyz")
        graphs = list(read_all(file, 64).values())
    for graph, atoms in zip(graphs, frames, strict=True):
        np.testing.assert_array_equal(graph.positions, atoms.positions)
        np.testing.assert_array_equal(graph.forces, atoms.get_forces())
        assert graph.energy == atoms.get_potential_energy()
        assert graph.pbc is None


def test_real_npz(data_dir: Path) -> None:
    path = data_dir / "md17" / "ethanol.npz"
    with open_layout(path) as file, np.load(path) as archive:
        assert (file.num_records, file.layout.name, file.units) == (2000, "npz", None)
        graphs = list(read_all(file, 300).values())
        np.testing.assert_array_equal([g.energy for g in graphs], archive["E"].ravel())
        np.testing.assert_array_equal(np.stack([g.forces for g in graphs]), archive["F"])
        assert all(member.offset is not None for member in file._members.values()), "mapped, not loaded"


# ------------------------------------------------------------------------------------------------------ other files of ASE


def test_other_formats_are_read_on_or_again(tmp_path: Path, rng) -> None:
    write_traj(tmp_path / "a.traj", rng)
    with open_layout(tmp_path / "a.traj") as file:
        chunks = file.chunks(2)
        again = [name for chunk in (chunks[1], chunks[2], chunks[0], chunks[2]) for name, _ in file.read_records(chunk)]
    assert again == [f"a.traj:{i}" for i in (2, 3, 4, 0, 1, 4)]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, rng) -> None:
    write_traj(tmp_path / "a.traj", rng)
    file = open_layout(tmp_path / "a.traj")
    ase.io.write(tmp_path / "a.traj", [ase.Atoms("He")], format="traj")
    with pytest.raises(DataError, match=r"a.traj must be readable by ASE; got only 1 of 5 records"):
        read_all(file)


# ----------------------------------------------------------------------------------------------------------- databases


def test_a_periodic_database_with_stress(tmp_path: Path, rng) -> None:
    graph = make_graph(rng, WATER, cell=np.diag([4.0, 5, 6]), pbc=np.array([True, False, True]), dipole=None)
    for type_, name in (("db", "a.db"), ("aselmdb", "a.aselmdb")):
        atoms = to_atoms(graph)
        atoms.calc.results["stress"] = np.arange(6.0)
        with ase.db.connect(tmp_path / name, type=type_) as database:
            database.write(atoms)
        found = read_first(tmp_path / name)
        np.testing.assert_array_equal(found.cell, graph.cell)
        assert found.pbc.tolist() == [True, False, True]
        assert found.stress.tolist() == [[0, 5, 4], [5, 1, 3], [4, 3, 2]]


@pytest.mark.parametrize(("type_", "name"), [("db", "a.db"), ("aselmdb", "a.aselmdb")])
def test_units_in_the_metadata_of_schnetpack(tmp_path: Path, rng, type_: str, name: str) -> None:
    energies = np.array([-1.5])
    with ase.db.connect(tmp_path / name, type=type_) as database:
        database.metadata = {
            "_property_unit_dict": {"energy_U0": "Hartree", "forces": "Hartree/Ang", "gap": "furlong"},
            "_distance_unit": "Ang",
        }
        data = {"energy_U0": energies, "forces": np.zeros((3, 3)), "gap": energies}
        database.write(ase.Atoms(WATER, make_graph(rng, WATER).positions), data=data)
    with open_layout(tmp_path / name, {"energy": "energy_U0"}) as file:
        reason = "the file's _property_unit_dict"
        assert file.units == Units("Hartree", "Angstrom", "Hartree/Angstrom", reason)
        assert next(iter(read_all(file).values())).energy == -1.5
    with open_layout(tmp_path / name, {"energy": "gap"}) as file:
        assert file.units is None
        assert file.notes == (
            f"{name} has units of an unknown name: energy 'furlong', length 'Ang', force 'Hartree/Ang'",
        )
    with open_layout(tmp_path / name) as file:
        assert file.units.is_convention


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE information SET value = '3' WHERE name = 'version'", "a.db must be of version 5 or newer; got 3. Run"),
        ("UPDATE systems SET numbers = x'00'", "a.db:1 numbers must be a blob of numbers; got buffer size must be"),
        (
            "UPDATE systems SET key_value_pairs = '{'",
            "a.db:1 key_value_pairs must be a JSON object; got Expecting property",
        ),
        ("UPDATE systems SET key_value_pairs = '[]'", "a.db:1 key_value_pairs must be a JSON object; got a list"),
        ("UPDATE systems SET data = x'00'", "a.db:1 data must be data as ASE writes them; got unpack_from requires"),
        ("DELETE FROM systems", "a.db must hold structures; got none in its table `systems`"),
    ],
)
def test_damaged_databases(tmp_path: Path, rng, statement: str, message: str) -> None:
    write_ase_db(tmp_path / "a.db", rng)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute(statement)
    database.close()
    with pytest.raises(DataError, match=message):
        read_first(tmp_path / "a.db")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([[3], "object", 8], "got an array of object"),
        ([[9999999], "float64", 8], "got an array that reaches out of its bytes"),
        ([[-1, 3], "float64", 8], "got an array that reaches out of its bytes"),
        ([[1], "float64", -8], "got an array that reaches out of its bytes"),
    ],
)
def test_data_of_a_database_stay_in_their_bytes(tmp_path: Path, rng, entry: list, message: str) -> None:
    write_ase_db(tmp_path / "a.db", rng)
    blob = struct.pack("<q", 16) + bytes(8) + json.dumps({"forces": {"__ndarray__": entry}}).encode()
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("UPDATE systems SET data = ?", (blob,))
    database.close()
    with pytest.raises(DataError, match=rf"a.db:1 data must be data as ASE writes them; {message}"):
        read_first(tmp_path / "a.db")


def put(path: Path, **entries: bytes) -> None:
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=2**20) as environment,
        environment.begin(write=True) as t,
    ):
        for key, value in entries.items():
            t.put(key.strip("_").encode(), value)


def pack(value: object) -> bytes:
    return zlib.compress(json.dumps(value).encode())


def test_rows_as_lists_like_older_versions_write_them(tmp_path: Path, rng) -> None:
    graph = make_graph(rng, AMMONIA, dipole=None, group="H3N")
    row = {"numbers": AMMONIA.tolist(), "positions": graph.positions.tolist(), "cell": np.zeros((3, 3)).tolist()}
    row |= {"pbc": [False] * 3, "energy": graph.energy, "forces": graph.forces.tolist(), "data": {"charge": 0}}
    put(tmp_path / "a.aselmdb", nextid=pack(2), _1=pack(row))
    assert_same(read_first(tmp_path / "a.aselmdb"), graph)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"nextid": pack("two")}, r"a.lmdb must say how many records it has; got nextid 'two'"),
        (
            {"nextid": pack(10**15)},
            r"a.lmdb must say how many records it has; got nextid 1000000000000000. Copy it again",
        ),
        ({"nextid": pack(2), "deleted_ids": pack(["a"])}, r"a.lmdb must say how many records it has; got nextid 2"),
        ({"nextid": pack(1)}, r"a.lmdb must hold structures; got none"),
        ({"nextid": pack(2)}, r"a.lmdb:1 must be in the file; got nothing under this number"),
        ({"nextid": pack(2), "_1": pack({"numbers": [1]})}, r"a.lmdb:1 must have positions; got numbers"),
        ({"nextid": pack(2), "_1": pack([1])}, r"a.lmdb:1 must be a JSON object; got a list"),
        (
            {"nextid": pack(2), "_1": b"\x80\x04N."},
            r"a.lmdb:1 must be zlib-compressed JSON; got Error -3.*nothing is unpickled",
        ),
        (
            {"nextid": pack(2), "_1": pack({})[:-1]},
            r"a.lmdb:1 must be zlib-compressed JSON; got more than .* or a part of it",
        ),
        (
            {"length": pack(2), "_1": pack({})},
            r"a.lmdb must have a layout that is known; got an LMDB file of unknown content",
        ),
    ],
)
def test_damaged_lmdb(tmp_path: Path, entries: dict, message: str) -> None:
    put(tmp_path / "a.lmdb", **entries)
    with pytest.raises(DataError, match=message):
        read_first(tmp_path / "a.lmdb")


def test_records_of_an_lmdb_are_bounded(tmp_path: Path, monkeypatch) -> None:
    row = {"numbers": [2], "positions": [[0, 0, 0]], "energy": 1.0}
    put(tmp_path / "a.lmdb", nextid=pack(3), _1=pack(row), _2=pack(row | {"data": {"x": "0" * 10_000}}))
    monkeypatch.setattr(aselmdb, "SAMPLE", 1)
    with open_layout(tmp_path / "a.lmdb") as file:
        monkeypatch.setattr(aselmdb, "_MAX_RECORD", 1000)
        first, second = read_all(file).values()
    assert first.energy == 1.0
    assert "a.lmdb:2 must be zlib-compressed JSON; got more than 1000 bytes" in str(second)


def test_a_missing_lmdb_package_and_a_broken_head_are_named(tmp_path: Path, rng, monkeypatch) -> None:
    write_aselmdb(tmp_path / "a.aselmdb", rng)
    data = (tmp_path / "a.aselmdb").read_bytes()
    (tmp_path / "b.lmdb").write_bytes(data[:30])
    with pytest.raises(
        DataError, match=r"b.lmdb must be a readable LMDB file; got no description of its pages. Copy it"
    ):
        open_layout(tmp_path / "b.lmdb")
    (tmp_path / "c.lmdb").write_bytes(data[:-4096])
    with pytest.raises(
        DataError, match=rf"c.lmdb must have {len(data)} bytes; got {len(data) - 4096}. Copy it again: it is cut"
    ):
        open_layout(tmp_path / "c.lmdb")
    (tmp_path / "d.lmdb").write_bytes(data[:20] + b"\7" + data[21:])
    with pytest.raises(DataError, match=r"d.lmdb must be a readable LMDB file; got .*MDB_VERSION_MISMATCH"):
        open_layout(tmp_path / "d.lmdb")
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    message = (
        r"a.aselmdb must be read with lmdb; got no lmdb here. Install it with `pip install 'so3krates-dist\[formats\]'`"
    )
    with pytest.raises(DataError, match=message):
        open_layout(tmp_path / "a.aselmdb")


# --------------------------------------------------------------------------------------------- what happens after opening


def test_damaged_pages_of_an_lmdb_are_one_line(tmp_path: Path, rng) -> None:
    write_aselmdb(tmp_path / "a", rng)
    data = bytearray((tmp_path / "a").read_bytes())
    file = open_layout(tmp_path / "a")
    chunk = file.chunks(9)[0]
    for page in range(2 * 4096, len(data), 4096):
        data[page + 10 : page + 12] = b"\0\0"  # what kind of page it is
    (tmp_path / "b").write_bytes(data)
    with pytest.raises(DataError, match=r"b must be a readable LMDB file; got .*MDB_CORRUPTED.*Copy it again"):
        open_layout(tmp_path / "b")
    file.path = tmp_path / "b"
    with pytest.raises(DataError, match=r"b must be a readable LMDB file; got .*MDB_CORRUPTED.*Copy it again"):
        next(file.read(chunk))


def test_an_empty_file_has_no_structures(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("\n")
    with pytest.raises(DataError, match=r"a.xyz must hold structures; got none. Check the file"):
        open_layout(tmp_path / "a.xyz", layout="extxyz")


def test_data_of_old_databases_are_text(tmp_path: Path, rng) -> None:
    write_ase_db(tmp_path / "a.db", rng)
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute(
            "UPDATE systems SET data = ?", ('{"charge": -3, "x": {"__ndarray__": [[2], "int64", [1, 2]]}}',)
        )
        database.execute("UPDATE systems SET data = 'null' WHERE id = 1")
    database.close()
    with open_layout(tmp_path / "a.db") as file:
        assert [g.total_charge for g in read_all(file).values()] == [0.0] + [-3.0] * 5


def test_names_that_differ_from_row_to_row_are_forgotten_in_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ase_files, "_MAX_SIGNATURES", 2)
    (tmp_path / "a.xyz").write_text("".join(f"1\nx{i}=1 energy=-{i}\nHe 0 0 0\n" for i in range(9)))
    with open_layout(tmp_path / "a.xyz") as file:
        assert [g.energy for g in read_all(file).values()] == [-float(i) for i in range(9)]
