"""Where molecules come from: the built-in ten, a file of SMILES, ASE's g2 and s22 sets, or a file of geometries.

Refuses what cannot be labelled before anything is computed: charge and spin that do not fit the number of electrons, elements
without GFN2 parameters or with electrons that GFN2 does not count (Ce to Lu), molecules without MMFF94 parameters.
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from data_tools import gate
from data_tools.readers import read_structures
from data_tools.sampling import Molecule, has_force_field, parse_smiles
from data_tools.xtb import LANTHANIDES, MAX_ELEMENT
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, compute_formula

BUILTIN: Final[Mapping[str, tuple[str, str]]] = {
    "ethanol": ("CCO", "CH3CH2OH"),
    "methanol": ("CO", "CH3OH"),
    "dimethyl_ether": ("COC", "CH3OCH3"),
    "acetaldehyde": ("CC=O", "CH3CHO"),
    "acetone": ("CC(C)=O", "CH3COCH3"),
    "acetic_acid": ("CC(O)=O", "CH3COOH"),
    "methylamine": ("CN", "H3CNH2"),
    "acetamide": ("CC(N)=O", "CH3CONH2"),
    "acetonitrile": ("CC#N", "CH3CN"),
    "propane": ("CCC", "C3H8"),
}
"""Name: SMILES, and the name of the same molecule in ASE's g2 set for machines without RDKit"""

_INSTALL: Final = "Install it with `pip install 'so3krates-dist[generate]'`"


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def check_installed(package: str) -> None:
    """Raise `DataError` where a package that is needed cannot be imported."""
    if not is_installed(package):
        raise DataError(package, "be installed", "no such package", _INSTALL)


def load_builtin() -> list[Molecule]:
    """Return the built-in molecules, from SMILES where RDKit is there and from ASE's g2 set where it is not."""
    if is_installed("rdkit"):
        return [_from_smiles(smiles, name, name) for name, (smiles, _) in BUILTIN.items()]
    return [_from_ase(g2_name, name) for name, (_, g2_name) in BUILTIN.items()]


def load_smiles(path: Path) -> list[Molecule]:
    """Read a file with one `SMILES [name]` per line; `#` starts a comment line.

    Raises:
        DataError: RDKit or the file is missing, a line is no molecule that can be sampled, or a name is there twice.
    """
    check_installed("rdkit")
    if not path.is_file():
        raise DataError(str(path), "be a file of SMILES", "nothing there", "Check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), "be text in UTF-8", error, "Save it as UTF-8") from error
    molecules = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split(maxsplit=1)
        if words and not line.startswith("#"):
            molecules.append(_from_smiles(words[0], words[-1].strip(), f"{path.name}:{number}"))
    return _check_names(molecules, path)


def _check_names(molecules: list[Molecule], path: Path) -> list[Molecule]:
    if not molecules:
        raise DataError(str(path), "hold molecules", "none", "Write one SMILES per line")
    names = [m.name for m in molecules]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(str(path), "name each molecule once", ", ".join(twice), "Give them different names")
    return molecules


def _from_smiles(smiles: str, name: str, where: str) -> Molecule:
    from rdkit import Chem

    molecule = parse_smiles(smiles)
    if molecule is None:
        raise DataError(where, "be a SMILES that RDKit reads", repr(smiles), "Correct the line")
    if len(Chem.GetMolFrags(molecule)) != 1:
        raise DataError(where, "be one molecule", f"{smiles} with a dot", "Give complexes as --geometries")
    unpaired = float(sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()))
    result = Molecule(
        name=name,
        atomic_numbers=np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()]),
        total_charge=float(Chem.GetFormalCharge(molecule)),
        num_unpaired_electrons=unpaired,
        smiles=smiles,
    )
    _check_molecule(result, where)
    if not has_force_field(molecule):
        raise DataError(f"{where} {smiles}", "have MMFF94 parameters", "an atom without", "Give it as --geometries")
    return result


def _from_ase(g2_name: str, name: str) -> Molecule:
    """Return a molecule of ASE's g2 set; the magnetic moments there are its unpaired electrons."""
    from ase.build import molecule

    atoms = molecule(g2_name)
    unpaired = float(round(abs(atoms.get_initial_magnetic_moments().sum())))
    return Molecule(name, np.asarray(atoms.numbers), 0.0, unpaired, None, np.asarray(atoms.positions))


def load_g2() -> list[Molecule]:
    """Return the molecules of ASE's g2 set (Curtiss et al., J. Chem. Phys. 106, 1063 (1997)), without single atoms."""
    from ase.collections import g2

    molecules = [_from_ase(name, name) for name in g2.names]
    return [m for m in molecules if len(m.atomic_numbers) > 1]


def load_s22() -> list[Molecule]:
    """Return the dimers of the s22 set (Jurecka et al., Phys. Chem. Chem. Phys. 8, 1985 (2006))."""
    from ase.collections import s22

    frames = [(name, s22[name]) for name in s22.names]
    return [Molecule(n, np.asarray(a.numbers), positions=np.asarray(a.positions)) for n, a in frames]


def load_geometries(path: Path) -> list[Molecule]:
    """Read structures that shall be labelled as they are; `charge` and `spin` in their info are honoured.

    Raises:
        DataError: The file cannot be read, or holds a structure that cannot be labelled.
    """
    molecules = []
    for index, graph in enumerate(read_structures(path, {}, labels=False).graphs):
        where = f"{path.name}:{index} {gate.describe(graph)}"
        if graph.is_periodic:
            raise DataError(where, "be a molecule", "a periodic structure", "Remove its cell")
        molecule = Molecule(
            name=graph.group,
            atomic_numbers=np.asarray(graph.atomic_numbers, np.int64),
            total_charge=graph.total_charge,
            num_unpaired_electrons=graph.num_unpaired_electrons,
            positions=np.asarray(graph.positions, np.float64),
        )
        _check_molecule(molecule, where)
        if (problem := gate.find_problem(graph, np.inf)) is not None:
            raise DataError(where, problem.rule, problem.got, "Correct or remove it")
        molecules.append(molecule)
    return molecules


def _check_molecule(molecule: Molecule, where: str) -> None:
    elements = find_elements([molecule])
    if elements and elements[-1] > MAX_ELEMENT:
        raise DataError(
            where, "have elements that GFN2-xTB knows (H to Rn)", gate.name_elements(elements[-1:]), "Remove it"
        )
    if lanthanides := [z for z in elements if z in LANTHANIDES]:
        remedy = "Remove it: GFN2-xTB has 4f electrons in the core, so charge and spin cannot be checked"
        raise DataError(where, "have no lanthanide from Ce to Lu", gate.name_elements(lanthanides), remedy)
    graph = Graph(
        atomic_numbers=molecule.atomic_numbers,
        positions=np.zeros((len(molecule.atomic_numbers), 3)),
        total_charge=molecule.total_charge,
        num_unpaired_electrons=molecule.num_unpaired_electrons,
    )
    if (problem := gate.find_parity_problem(graph)) is not None:
        where = f"{where} {compute_formula(molecule.atomic_numbers)}"
        raise DataError(where, problem.rule, problem.got, "Correct its charge or its unpaired electrons")


def find_elements(molecules: Iterable[Molecule]) -> tuple[int, ...]:
    """Return the atomic numbers that occur, ascending."""
    return tuple(sorted({int(z) for m in molecules for z in m.atomic_numbers}))
