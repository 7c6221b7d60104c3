"""Every layout: recognised by content, read by chunk in any order and any process, with documented units; and what is refused."""

import gzip
import lzma
import pickle
import shutil
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
from format_files import WATER, WRITERS, assert_same, write_extxyz, write_npz, write_spice, write_traj

from data_tools.formats import LAYOUTS, Chunk, OpenFile, find_files, open_layout, recognise
from data_tools.readers import read_structures
from so3krates_dist.errors import DataError
from so3krates_dist.units import ENERGY_UNITS, LENGTH_UNITS

NAMES = sorted(WRITERS)
OTHER_SUFFIX = {"extxyz": ".dat", "npz": ".bin"}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def read_all(file: OpenFile, size: int = 1000) -> list:
    return [record for chunk in file.chunks(size) for record in file.read_records(chunk)]


def read_names(file: OpenFile, chunk: Chunk) -> list[str]:
    return [name for name, _ in file.read_records(chunk)]


def test_every_layout_has_a_writer_here() -> None:
    assert set(WRITERS) == set(LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_is_recognised_whatever_the_file_is_called_and_read_as_written(tmp_path: Path, rng, name: str) -> None:
    path = tmp_path / f"renamed{OTHER_SUFFIX.get(name, '.h5')}"
    expected = WRITERS[name](path, rng)
    with open_layout(path) as file:
        assert file.layout.name == name
        assert file.num_records == len(expected)
        found = read_all(file)
        assert [n for n, _ in found] == [n for n, _ in expected]
        for (where, graph), (_, other) in zip(found, expected, strict=True):
            assert_same(graph, other, where)
            assert all(a is None or a.flags.writeable for a in (graph.positions, graph.forces, graph.cell)), where
        assert [g.energy for c in file.chunks(2) for g in file.read(c)] == [g.energy for _, g in expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name], "reading leaves nothing behind"


@pytest.mark.parametrize("name", NAMES)
def test_chunks_are_the_same_ones_for_everybody_and_can_be_read_in_any_order(tmp_path: Path, rng, name: str) -> None:
    WRITERS[name](tmp_path / "a", rng)
    with open_layout(tmp_path / "a") as file:
        whole = [n for n, _ in read_all(file)]
        for size in (1, 2, 3, 100):
            chunks = file.chunks(size)
            assert chunks == file.chunks(size)
            assert [c.number for c in chunks] == list(range(len(chunks)))
            assert [c.num_records for c in chunks[:-1]] == [size] * (len(chunks) - 1)
            assert [(c.start, c.stop) for c in chunks] == [
                (s, min(s + size, len(whole))) for s in range(0, len(whole), size)
            ]
            backwards = [read_names(file, chunk) for chunk in reversed(chunks)]
            assert [n for names in reversed(backwards) for n in names] == whole
        copy = pickle.loads(pickle.dumps(file))
        assert read_names(copy, file.chunks(2)[1]) == whole[2:4], "while the first one is still open"
        copy.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 says so of every process with threads
def test_other_processes_read_chunks_of_a_file_that_was_opened_before(tmp_path: Path, rng) -> None:
    files = [tmp_path / name for name in NAMES]
    for name, path in zip(NAMES, files, strict=True):
        WRITERS[name](path, rng)
    opened = [open_layout(path) for path in files]
    here = [read_names(file, file.chunks(2)[1]) for file in opened]
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        there = list(pool.map(read_names, opened, [file.chunks(2)[1] for file in opened]))
    assert there == here
    assert [read_names(file, file.chunks(2)[1]) for file in opened] == here, "the parent's files are still usable"
    for file in opened:
        file.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_what_a_layout_documents_is_complete(layout) -> None:
    assert layout.description
    assert pickle.loads(pickle.dumps(layout)) == layout
    if layout.units is not None:
        energy, _, length = layout.units.force.rpartition("/")
        assert {layout.units.energy, energy} <= set(ENERGY_UNITS)
        assert {layout.units.length, length} <= set(LENGTH_UNITS)
        assert layout.units.reason
    if layout.level_of_theory or layout.licence:
        assert "10." in layout.source, "a paper or data to look it up"


def test_documented_units(tmp_path: Path) -> None:
    units = {name: layout.units and (layout.units.energy, layout.units.force) for name, layout in LAYOUTS.items()}
    assert units["qm7x"] == units["gems"] == units["transition1x"] == ("eV", "eV/Angstrom")
    assert units["ani1x"] == ("Hartree", "Hartree/Angstrom")
    assert units["spice"] == ("Hartree", "Hartree/Bohr")
    assert units["rmd17"] == ("kcal/mol", "kcal/mol/Angstrom")
    assert units["npz"] is None
    assert LAYOUTS["spice"].units.length == "Bohr"
    assert [n for n, layout in LAYOUTS.items() if layout.units and layout.units.is_convention] == [
        "extxyz",
        "ase",
        "ase-db",
        "aselmdb",
    ]


def test_only_a_chunk_is_read(tmp_path: Path, rng) -> None:
    for name in ("extxyz", "npz", "gems", "ase-db"):
        path = tmp_path / name
        expected = WRITERS[name](path, rng)
        file = open_layout(path)
        chunk = file.chunks(1)[0]
        size = path.stat().st_size
        if name in ("extxyz", "npz"):  # what lies behind the chunk may be anything
            with path.open("r+b") as raw:
                raw.seek(size - size // 4)
                raw.write(b"?" * (size // 4))
        assert read_names(file, chunk) == [expected[0][0]]
        file.close()


# ------------------------------------------------------------------------------------------------------------ many files


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, rng) -> None:
    (tmp_path / "set" / "deep").mkdir(parents=True)
    expected = write_npz(tmp_path / "set" / "b.npz", rng)
    more = write_npz(tmp_path / "set" / "deep" / "a.npz", rng)
    np.savez(tmp_path / "set" / "metadata.npz", natoms=np.arange(3))
    (tmp_path / "set" / "README.md").write_text("about")
    (tmp_path / "set" / ".hidden.npz").write_bytes((tmp_path / "set" / "b.npz").read_bytes())
    with open_layout(tmp_path / "set") as file:
        assert [p.name for p in file.paths] == ["b.npz", "a.npz"]
        assert file.num_records == 14
        chunks = file.chunks(5)
        assert [(c.number, c.file, c.start, c.stop) for c in chunks] == [
            (0, 0, 0, 5),
            (1, 0, 5, 7),
            (2, 1, 0, 5),
            (3, 1, 5, 7),
        ]
        found = read_all(file, 5)
        assert [n for n, _ in found] == [f"b.npz:{i}" for i in range(7)] + [f"deep/a.npz:{i}" for i in range(7)]
        for (_, graph), (_, other) in zip(found, expected + more, strict=True):
            assert_same(graph, other)
        assert (file.keys["energy"], file.layout.name, file.units) == ("E", "npz", None)
        assert [n for n, _ in read_all(pickle.loads(pickle.dumps(file)), 5)] == [n for n, _ in found]


def test_files_are_read_in_the_order_given(tmp_path: Path, rng) -> None:
    for name in ("b.xyz", "a.xyz"):
        write_extxyz(tmp_path / name, rng)
    with open_layout([tmp_path / "b.xyz", tmp_path / "a.xyz"], group="mine") as file:
        found = read_all(file)
    assert [n for n, _ in found[5:7]] == ["b.xyz:5", "a.xyz:0"]
    assert {g.group for _, g in found} == {"mine"}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ase"])
def test_of_many_files_one_is_open(tmp_path: Path, rng, name: str) -> None:
    (tmp_path / "set").mkdir()
    for number in range(12):
        WRITERS[name](tmp_path / "set" / f"{number:02d}", rng)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open_layout(tmp_path / "set") as file:
        found = read_all(file, 3)
        assert len(found) == file.num_records
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 6, "npz maps each of its arrays"
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_folders_of_several_layouts_need_a_choice(tmp_path: Path, rng) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_npz(folder / "a.npz", rng)
    write_extxyz(folder / "b.xyz", rng)
    with pytest.raises(
        DataError, match=r"set must have files of one layout; got 1 extxyz, 1 npz. Choose with --layout NAME"
    ):
        open_layout(folder)
    with open_layout(folder, layout="extxyz") as file:
        assert [p.name for p in file.paths] == ["b.xyz"]
    with pytest.raises(DataError, match=r"set must have files of a known layout; got 2 others. Check the path"):
        open_layout(folder, layout="gems")
    write_traj(folder / "c.traj", rng)
    with open_layout(folder, layout="ase") as file:
        assert [p.name for p in file.paths] == ["c.traj"], "what ASE may read is taken only when it is asked for"
    paths = [folder / "a.npz", folder / "b.xyz"]
    with pytest.raises(
        DataError, match=r"b.xyz must have the layout of a.npz \(npz\); got extxyz. Convert the files one by one"
    ):
        open_layout(paths)


def test_files_that_do_not_agree_are_refused(tmp_path: Path, rng) -> None:
    write_npz(tmp_path / "a.npz", rng)
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "b.npz", **{"energy" if k == "E" else k: v for k, v in arrays.items()})
    message = (
        r"b.npz must have the key `E` for energy like the files before it; got `energy`. Choose with --keys energy=KEY"
    )
    with pytest.raises(DataError, match=message):
        open_layout([tmp_path / "a.npz", tmp_path / "b.npz"])
    for name, unit in (("c", "eV"), ("d", "kcal/mol")):
        np.savez(tmp_path / f"{name}.npz", **arrays, e_unit=np.array(unit), r_unit=np.array("Ang"))
    with pytest.raises(
        DataError, match=r"d.npz must have the same units as c.npz \(eV, Angstrom, eV/Angstrom by the .*; got kcal/mol"
    ):
        open_layout([tmp_path / "c.npz", tmp_path / "d.npz"])


# --------------------------------------------------------------------------------------------------------- what is refused


def test_two_layouts_in_one_file_need_a_choice(tmp_path: Path, rng) -> None:
    expected = write_spice(tmp_path / "a.h5", rng)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for group in file.values():
            group["coordinates"] = group["conformations"][()]
    with pytest.raises(
        DataError, match=r"a.h5 must have one layout; got the marks of ani1x and spice. Choose with --layout NAME"
    ):
        recognise(tmp_path / "a.h5")
    with open_layout(tmp_path / "a.h5", layout="spice") as file:
        assert_same(read_all(file)[0][1], expected[0][1])
    with sqlite3.connect(tmp_path / "b.db") as database:
        for table in ("data", "metadata", "systems", "information"):
            database.execute(f"CREATE TABLE {table} (id INTEGER)")
    database.close()
    with pytest.raises(DataError, match=r"b.db must have one layout; got the marks of ase-db and gems"):
        recognise(tmp_path / "b.db")


def test_an_unknown_layout_is_refused_by_its_container(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(
        DataError, match=r"a.h5 must have a layout that is known; got an HDF5 file of unknown content. Choose"
    ):
        open_layout(tmp_path / "a.h5")
    with sqlite3.connect(tmp_path / "b.db") as database:
        database.execute("CREATE TABLE x (id INTEGER)")
    database.close()
    with pytest.raises(
        DataError, match=r"b.db must have a layout that is known; got an SQLite file of unknown content"
    ):
        open_layout(tmp_path / "b.db")
    with pytest.raises(
        DataError, match=r"--layout nonsense must be one of extxyz, ase, .*; got 'nonsense'. Correct it"
    ):
        open_layout(tmp_path / "a.h5", layout="nonsense")
    with pytest.raises(DataError, match=r"nothing must be a file; got nothing there"):
        find_files(tmp_path / "nothing")


@pytest.mark.parametrize(("opener", "word"), [(lzma.open, "xz"), (gzip.open, "gzip")])
def test_compressed_containers_have_to_be_unpacked(tmp_path: Path, rng, opener, word: str) -> None:
    write_spice(tmp_path / "a", rng)
    with opener(tmp_path / "1000.packed", "wb") as packed:
        packed.write((tmp_path / "a").read_bytes())
    with pytest.raises(
        DataError, match=rf"1000.packed must be unpacked; got a HDF5 file compressed with {word}. Unpack it"
    ):
        open_layout(tmp_path / "1000.packed")


def test_compressed_text_is_read_by_ase(tmp_path: Path, rng) -> None:
    expected = write_extxyz(tmp_path / "a.xyz", rng)
    with gzip.open(tmp_path / "b.xyz.gz", "wb") as packed:
        packed.write((tmp_path / "a.xyz").read_bytes())
    with open_layout(tmp_path / "b.xyz.gz") as file:
        assert file.layout.name == "ase"
        assert_same(read_all(file)[-1][1], expected[-1][1])
    with gzip.open(tmp_path / "c.xyz.gz", "wb") as packed:
        packed.write(b"1")
    (tmp_path / "c.xyz.gz").write_bytes((tmp_path / "c.xyz.gz").read_bytes()[:-4])
    with pytest.raises(DataError, match=r"c.xyz.gz must be readable by ASE"):
        open_layout(tmp_path / "c.xyz.gz")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(
        DataError, match=r"loop must be a readable file; got Too many levels of symbolic links. Check its perm"
    ):
        recognise(path)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("extxyz", "ase")])
def test_cut_files_give_one_line(tmp_path: Path, rng, name: str) -> None:
    WRITERS[name](tmp_path / "a", rng)
    data = (tmp_path / "a").read_bytes()
    for share in (0.05, 0.3, 0.6, 0.9):
        (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
        with (
            pytest.raises(DataError, match=r"\bcut\b.* must .*; got .*\.$") as raised,
            open_layout(tmp_path / "cut") as file,
        ):
            [next(iter(file.read(chunk))) for chunk in file.chunks(1)]
        assert "\n" not in str(raised.value)


def test_values_that_fit_no_structure_name_file_and_record(tmp_path: Path, rng) -> None:
    arrays = {"z": WATER, "R": np.zeros((2, 3, 3)), "E": np.zeros(2), "Q": np.array([0.0, 1.0])}
    np.savez(tmp_path / "a.npz", **arrays, F=np.zeros((2, 4, 3)))
    with open_layout(tmp_path / "a.npz") as file:
        records = read_all(file)
        assert [str(error) for _, error in records] == [
            f"a.npz:{i} forces must have shape (3, 3); got (4, 3). Correct the file or --keys." for i in range(2)
        ]
        with pytest.raises(DataError, match=r"a.npz:0 forces must have shape"):
            next(file.read(file.chunks(10)[0]))
    with pytest.raises(DataError, match=r"a.npz:0 forces must have shape"):
        read_structures(tmp_path / "a.npz", {})


# ---------------------------------------------------------------------------------------------- whole files at once: readers


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read_by_any_layout(tmp_path: Path, rng, name: str) -> None:
    expected = WRITERS[name](tmp_path / "a", rng)
    if name in ("ani1x", "gems"):
        with pytest.raises(
            DataError, match=r"a:.* must have `.*` like the others; got none. Remove the frame, or complete it"
        ):
            read_structures(tmp_path / "a", {})
        return
    structures = read_structures(tmp_path / "a", {})
    assert structures.is_npz == (name in ("npz", "sgdml", "rmd17"))
    for graph, (where, other) in zip(structures.graphs, expected, strict=True):
        assert_same(graph, other, where)


@pytest.mark.parametrize("name", NAMES)
def test_labels_may_stay_out(tmp_path: Path, rng, name: str) -> None:
    expected = WRITERS[name](tmp_path / "a", rng)
    structures = read_structures(tmp_path / "a", {}, labels=False)
    assert not {"energy", "forces", "dipole", "hirshfeld_ratios"} & set(structures.keys)
    for graph, (where, other) in zip(structures.graphs, expected, strict=True):
        assert graph.energy is graph.forces is graph.dipole is graph.hirshfeld_ratios is None
        assert (graph.total_charge, graph.group) == (other.total_charge, other.group), where


def test_molecules_among_crystals_get_a_cell_that_does_not_repeat(tmp_path: Path) -> None:
    lattice = 'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3'
    (tmp_path / "a.xyz").write_text(f"1\n{lattice} energy=-1\nHe 0 0 0\n1\nenergy=-2\nHe 0 0 0\n")
    first, second = read_structures(tmp_path / "a.xyz", {}).graphs
    assert first.is_periodic
    assert second.cell.tolist() == np.zeros((3, 3)).tolist()
    assert not second.is_periodic
    with open_layout(tmp_path / "a.xyz") as file:
        assert [g.pbc is None for _, g in read_all(file)] == [False, True]


def test_a_copy_of_a_copy_still_reads(tmp_path: Path, rng) -> None:
    write_extxyz(tmp_path / "a.xyz", rng)
    shutil.copy(tmp_path / "a.xyz", tmp_path / "b.xyz")
    file = open_layout([tmp_path / "a.xyz", tmp_path / "b.xyz"])
    chunks = file.chunks(4)
    copy = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(file))))
    assert [n for c in chunks for n in read_names(copy, c)] == [n for c in chunks for n in read_names(file, c)]
