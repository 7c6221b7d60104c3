"""Tiny files in the layouts of published sets, written as their documentation says, with the structures that are in them."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import ase
import ase.db
import ase.io
import h5py
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from data_tools.formats import OpenFile, open_layout
from so3krates_dist.graph import Graph

Expected = list[tuple[str, Graph]]
WATER, AMMONIA = np.array([8, 1, 1]), np.array([7, 1, 1, 1])


def make_graph(rng: np.random.Generator, numbers: np.ndarray, **others: object) -> Graph:
    """Return a structure with all labels that are numbers of float32, so that no layout rounds them."""
    size = len(numbers)
    number = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(np.float64)  # noqa: E731
    fields = {
        "energy": float(number()),
        "forces": number(size, 3),
        "dipole": number(3),
        "group": "",
    } | others
    return Graph(atomic_numbers=numbers.astype(np.int64), positions=number(size, 3), **fields)


def to_atoms(graph: Graph) -> ase.Atoms:
    atoms = ase.Atoms(graph.atomic_numbers, graph.positions, cell=graph.cell, pbc=graph.pbc)
    atoms.calc = SinglePointCalculator(atoms, energy=graph.energy, forces=graph.forces, dipole=graph.dipole)
    return atoms


def write_extxyz(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, numbers, group=name) for numbers, name in [(WATER, "w"), (AMMONIA, "a")] * 3]
    frames = [to_atoms(graph) for graph in graphs]
    for frame, graph in zip(frames, graphs, strict=True):
        frame.info |= {"config_type": graph.group, "charge": 0, "spin": 1}
    ase.io.write(path, frames, format="extxyz")
    for frame, graph in zip(ase.io.read(path, ":", format="extxyz"), graphs, strict=True):
        graph.positions, graph.forces = frame.positions, frame.get_forces()  # written with eight digits
    return [(f"{path.name}:{i}", graph) for i, graph in enumerate(graphs)]


def write_traj(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, WATER, group="H2O") for _ in range(5)]
    ase.io.write(path, [to_atoms(graph) for graph in graphs], format="traj")
    return [(f"{path.name}:{i}", graph) for i, graph in enumerate(graphs)]


def write_ase_db(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, n, num_unpaired_electrons=1.0, total_charge=1.0) for n in [WATER, AMMONIA] * 3]
    with ase.db.connect(path, type="db", append=False) as database:
        for graph in graphs:
            graph.group = "train"
            database.write(to_atoms(graph), charge_of_set=1, data={"charge": 1, "uhf": 1, "subset": "train"})
        database.write(to_atoms(graphs[0]), data={"charge": 1, "uhf": 1, "subset": "train"})
        database.delete([3])
    names = [f"{path.name}:{number}" for number in (1, 2, 4, 5, 6, 7)]
    return list(zip(names, [*graphs[:2], *graphs[3:], graphs[0]], strict=True))


def write_aselmdb(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, n, num_unpaired_electrons=2.0, total_charge=-2.0) for n in [WATER, AMMONIA] * 3]
    with ase.db.connect(path, type="aselmdb") as database:
        for graph in graphs:
            graph.group = "elytes"
            database.write(to_atoms(graph), data={"charge": -2, "spin": 3, "subset": "elytes"})
        database.delete([2, 6])
    numbers = (1, 3, 4, 5)
    Path(f"{path}-lock").unlink(missing_ok=True)
    return [(f"{path.name}:{number}", graphs[number - 1]) for number in numbers]


def write_npz(path: Path, rng: np.random.Generator, **others: object) -> Expected:
    graphs = [make_graph(rng, AMMONIA, group="H3N") for _ in range(7)]
    arrays = {
        "z": AMMONIA.astype(np.uint8),
        "R": np.stack([g.positions for g in graphs]),
        "E": np.array([[g.energy] for g in graphs]),
        "F": np.stack([g.forces for g in graphs]).astype(np.float32),
        "dipole_vec": np.stack([g.dipole for g in graphs]),
    }
    with path.open("wb") as file:
        np.savez(file, **arrays, **others)
    return [(f"{path.name}:{i}", graph) for i, graph in enumerate(graphs)]


def write_sgdml(path: Path, rng: np.random.Generator) -> Expected:
    words = {
        "e_unit": np.array("kcal/mol"),
        "r_unit": np.array("Ang"),
        "theory": np.array(b"PBE0"),
        "type": np.array("d"),
    }
    return write_npz(path, rng, **words)


def write_rmd17(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, AMMONIA, group="H3N", dipole=None) for _ in range(7)]
    energies = np.array([g.energy for g in graphs])
    arrays = {
        "nuclear_charges": AMMONIA,
        "coords": np.stack([g.positions for g in graphs]),
        "energies": energies,
        "forces": np.stack([g.forces for g in graphs]),
        "old_indices": np.arange(7),
        "old_energies": energies + 1,
    }
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return [(f"{path.name}:{i}", graph) for i, graph in enumerate(graphs)]


def write_qm7x(path: Path, rng: np.random.Generator) -> Expected:
    expected = []
    with h5py.File(path, "w") as file:
        for molecule, numbers in (("20", WATER), ("3", AMMONIA)):
            for conformer in ("i1-c1-d1", "i1-c1-opt", "i1-c2-d1", "i1-c2-d2", "i1-c2-opt"):
                name = f"Geom-m{molecule}-{conformer}"
                ratios = rng.uniform(0.5, 1, len(numbers)).astype(np.float32).astype(np.float64)
                group = "H2O" if molecule == "20" else "H3N"
                graph = make_graph(rng, numbers, hirshfeld_ratios=ratios, partial_charges=ratios - 1, group=group)
                expected.append((f"{path.name}:{molecule}/{name}", graph))
                member = file.create_group(f"{molecule}/{name}")
                member["atNUM"], member["atXYZ"] = numbers.astype(np.uint8), graph.positions
                member["ePBE0+MBD"], member["totFOR"] = [graph.energy], graph.forces
                member["ePBE0"], member["pbe0FOR"] = [graph.energy + 1], graph.forces + 1
                member["vDIP"], member["hRAT"], member["hCHG"] = graph.dipole, ratios[:, None], ratios - 1
    return expected


def write_ani1x(path: Path, rng: np.random.Generator) -> Expected:
    expected = []
    with h5py.File(path, "w") as file:
        for name, numbers in (("H2O1", WATER), ("H3N1", AMMONIA)):
            graphs = [make_graph(rng, numbers, group="H2O" if name == "H2O1" else "H3N") for _ in range(4)]
            graphs[1].dipole = graphs[2].forces = graphs[2].energy = None
            graphs[3].energy = None
            missing = np.full((len(numbers), 3), np.nan)
            member = file.create_group(name)
            member["atomic_numbers"] = numbers.astype(np.uint8)
            member["coordinates"] = np.stack([g.positions for g in graphs]).astype(np.float32)
            member["wb97x_dz.energy"] = np.array([np.nan if g.energy is None else g.energy for g in graphs])
            member["wb97x_dz.forces"] = np.stack([missing if g.forces is None else g.forces for g in graphs])
            member["wb97x_dz.dipole"] = np.stack([np.full(3, np.nan) if g.dipole is None else g.dipole for g in graphs])
            member["wb97x_tz.forces"] = np.stack([missing] * 4)
            member["ccsd(t)_cbs.energy"] = np.array([-1.0, np.nan, -3.0, np.nan])
            expected += [(f"{path.name}:{name}/{i}", graph) for i, graph in enumerate(graphs)]
    return expected


def write_spice(path: Path, rng: np.random.Generator) -> Expected:
    expected = []
    molecules = {
        "[h2o]": ("[H:2][O:1][H:3]", WATER, 0, "SPICE Dipeptides"),
        "ammonium fragment": ("[H][N+:1]([H])[H]", AMMONIA, 1, "SPICE Ion Pairs"),
    }
    with h5py.File(path, "w") as file:
        for name, (smiles, numbers, charge, subset) in molecules.items():
            graphs = [make_graph(rng, numbers, total_charge=charge, group=subset) for _ in range(4)]
            member = file.create_group(name)
            member["atomic_numbers"] = numbers.astype(np.int16)
            member.create_dataset("smiles", data=[smiles], dtype=h5py.string_dtype())
            member.create_dataset("subset", data=[subset], dtype=h5py.string_dtype())
            member["conformations"] = np.stack([g.positions for g in graphs]).astype(np.float32)
            member["conformations"].attrs["units"] = "bohr"
            member["dft_total_energy"] = np.array([g.energy for g in graphs])
            member["formation_energy"] = np.array([g.energy + 1 for g in graphs])
            member["dft_total_gradient"] = -np.stack([g.forces for g in graphs]).astype(np.float32)
            member["scf_dipole"] = np.stack([g.dipole for g in graphs]).astype(np.float32)
            member["mbis_charges"] = np.zeros((4, len(numbers), 1), np.float32)
            expected += [(f"{path.name}:{name}/{i}", graph) for i, graph in enumerate(graphs)]
    return sorted(expected, key=lambda item: item[0].rpartition("/")[0])


def write_transition1x(path: Path, rng: np.random.Generator) -> Expected:
    expected = []
    with h5py.File(path, "w") as file:
        for formula, rxn, numbers in (("H2O", "rxn1", WATER), ("H2O", "rxn0", WATER), ("H3N", "rxn7", AMMONIA)):
            for part, count in (("/reactant", 1), ("/product", 1), ("", 3), ("/transition_state", 1)):
                graphs = [make_graph(rng, numbers, group=formula, dipole=None) for _ in range(count)]
                member = file.require_group(f"data/{formula}/{rxn}{part}")
                member["atomic_numbers"] = numbers
                member["positions"] = np.stack([g.positions for g in graphs])
                member["wB97x_6-31G(d).energy"] = np.array([g.energy for g in graphs])
                member["wB97x_6-31G(d).forces"] = np.stack([g.forces for g in graphs])
                if part != "/transition_state":
                    names = [f"{path.name}:data/{formula}/{rxn}{part}/{i}" for i in range(count)]
                    expected += zip(names, graphs, strict=True)
            file[f"{'val' if rxn == 'rxn7' else 'train'}/{formula}/{rxn}"] = h5py.SoftLink(f"/data/{formula}/{rxn}")
    blocks = [expected[i : i + 5] for i in (0, 5, 10)]
    return blocks[1] + blocks[0] + blocks[2]


def write_gems(path: Path, rng: np.random.Generator) -> Expected:
    graphs = [make_graph(rng, n, total_charge=1.0, num_unpaired_electrons=1.0, group=g) for n, g in GEMS_MOLECULES]
    graphs[2].energy = None
    with sqlite3.connect(path) as database:
        database.execute(
            "CREATE TABLE data (id INTEGER NOT NULL PRIMARY KEY, q FLOAT, s FLOAT, z BLOB, r BLOB, e FLOAT, f BLOB, d BLOB)"
        )
        database.execute("CREATE TABLE metadata (id INTEGER PRIMARY KEY, N INTEGER)")
        database.execute("INSERT INTO metadata VALUES (1, ?)", (len(graphs),))
        for number, graph in enumerate(graphs):
            arrays = [graph.atomic_numbers.astype("<i4").tobytes(), graph.positions.astype("<f4").tobytes()]
            labels = [graph.energy, graph.forces.astype("<f4").tobytes(), graph.dipole.astype("<f4").tobytes()]
            database.execute("INSERT INTO data VALUES (?, 1, 1, ?, ?, ?, ?, ?)", (number, *arrays, *labels))
    database.close()
    return [(f"{path.name}:{i}", graph) for i, graph in enumerate(graphs)]


GEMS_MOLECULES = [(WATER, "H2O"), (AMMONIA, "H3N")] * 3

WRITERS: dict[str, Callable[[Path, np.random.Generator], Expected]] = {
    "extxyz": write_extxyz,
    "ase": write_traj,
    "ase-db": write_ase_db,
    "aselmdb": write_aselmdb,
    "npz": write_npz,
    "sgdml": write_sgdml,
    "rmd17": write_rmd17,
    "qm7x": write_qm7x,
    "ani1x": write_ani1x,
    "spice": write_spice,
    "transition1x": write_transition1x,
    "gems": write_gems,
}


def assert_same(found: Graph, expected: Graph, where: str = "") -> None:
    for name in ("total_charge", "num_unpaired_electrons", "energy", "group"):
        assert getattr(found, name) == getattr(expected, name), f"{where} {name}"
    for name in (
        "atomic_numbers",
        "positions",
        "forces",
        "dipole",
        "hirshfeld_ratios",
        "partial_charges",
        "cell",
        "stress",
    ):
        first, second = getattr(found, name), getattr(expected, name)
        assert (first is None) == (second is None), f"{where} {name}"
        if first is not None:
            np.testing.assert_array_equal(first, second, err_msg=f"{where} {name}")


def read_all(file: OpenFile, size: int = 1000) -> dict:
    return {name: item for chunk in file.chunks(size) for name, item in file.read_records(chunk)}


def read_first(path: Path, **keys: str) -> object:
    with open_layout(path, keys) as file:
        return next(iter(file.read(file.chunks(1)[0])))
