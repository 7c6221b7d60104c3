"""Structures and labels out of other people's files: anything ASE reads, and npz archives in the manner of MD17.

Values stay in the file's units here; `convert.py` turns them into ours. Refuses to guess: where two keys could be the same label,
the user has to name one.
"""

import dataclasses
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.console import say
from so3krates_dist.errors import DataError
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, Graph, compute_formula

ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "energy": ("energy", "energies", "E", "REF_energy", "ref_energy", "DFT_energy", "dft_energy", "total_energy"),
    "forces": ("forces", "F", "force", "REF_forces", "ref_forces", "DFT_forces", "dft_forces"),
    "stress": ("stress", "REF_stress", "ref_stress", "DFT_stress", "dft_stress"),
    "dipole": ("dipole", "REF_dipole", "dipole_vec"),
    "partial_charges": ("partial_charges", "charges", "REF_charges"),
    "hirshfeld_ratios": ("hirshfeld_ratios", "REF_hirshfeld_ratios"),
    "total_charge": ("total_charge", "charge", "Q"),
    "num_unpaired_electrons": ("num_unpaired_electrons", "multiplicity", "spin_multiplicity", "spin", "uhf"),
    "group": ("group", "config_type", "subset"),
}
"""Names that labels go by, ours first"""

_NOT_LABELS: Final = ("group", "total_charge", "num_unpaired_electrons")
"""These have a value where a structure says nothing"""

_OPTIONAL: Final = ("stress", "dipole", "partial_charges", "hirshfeld_ratios")
"""Labels that are left out as a whole where only some frames have them"""

_NPZ_ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "atomic_numbers": ("atomic_numbers", "z", "nuclear_charges", "numbers"),
    "positions": ("positions", "R", "coords", "coordinates"),
    "cell": ("cell", "unit_cell"),
    "pbc": ("pbc",),
}


@dataclasses.dataclass(slots=True)
class Structures:
    """What was read from one file, in the file's units."""

    graphs: list[Graph]
    keys: dict[str, str]
    """the file's key for each label that was found"""
    is_npz: bool


def parse_keys(pairs: Sequence[str]) -> dict[str, str]:
    """Read `energy=REF_energy` pairs.

    Raises:
        DataError: A pair has no equals sign or its left side is no label.
    """
    keys = {}
    for pair in pairs:
        label, _, key = pair.partition("=")
        if label not in ALIASES | _NPZ_ALIASES or not key:
            remedy = f"Write LABEL=KEY where LABEL is one of {', '.join(ALIASES | _NPZ_ALIASES)}"
            raise DataError(f"--keys {pair}", "map a label to a key of the file", repr(pair), remedy)
        keys[label] = key
    return keys


def read_structures(
    path: Path, keys: Mapping[str, str], group: str | None = None, *, labels: bool = True
) -> Structures:
    """Read all structures of a file.

    Args:
        path: `.npz`, or a file that ASE reads.
        keys: The file's key for labels that go by another name than `ALIASES` has.
        group: Name that results of all structures are grouped by; None takes the file's, or the formula.
        labels: Read energies and the like; else only what names a structure, its charge and its spin.

    Raises:
        DataError: The file is missing or unreadable, a key is missing or ambiguous, or arrays have shapes that do not fit.
    """
    if not path.is_file():
        raise DataError(str(path), "be a file", "nothing there", "Check the path")
    read = _read_npz if path.suffix == ".npz" else _read_ase
    structures = read(path, keys, ALIASES if labels else {name: ALIASES[name] for name in _NOT_LABELS})
    for graph in structures.graphs:
        graph.group = group or graph.group or compute_formula(graph.atomic_numbers)
    return structures


def _find_keys(
    available: set[str], keys: Mapping[str, str], aliases: Mapping[str, Sequence[str]], path: Path
) -> dict[str, str]:
    """Return the file's key of each label that it has."""
    found = {}
    for label, names in aliases.items():
        if label in keys:
            if keys[label] not in available:
                got = ", ".join(sorted(available)) or "no keys"
                raise DataError(str(path), f"have the key `{keys[label]}` for {label}", got, "Correct --keys")
            found[label] = keys[label]
            continue
        present = [name for name in names if name in available]
        if len(present) > 1:
            remedy = f"Choose with --keys {label}=KEY"
            raise DataError(str(path), f"have one key for {label}", " and ".join(present), remedy)
        if present:
            found[label] = present[0]
    return found


def _shape(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return a float64 array of the shape, or raise."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise DataError(where, "be numbers", repr(value)[:40], "Correct the file or --keys") from None
    if array.size == 1 and shape == ():
        array = array.reshape(())
    if array.shape != shape:
        raise DataError(where, f"have shape {shape}", array.shape, "Correct the file or --keys")
    return array


def _read_numbers(value: Any, size: int, where: str) -> np.ndarray:
    """Return (size,) int64 atomic numbers, zero for padding, or raise."""
    numbers = _shape(value, (size,), f"{where} atomic_numbers")
    sound = (numbers >= 0) & (numbers <= MAX_ATOMIC_NUMBER) & (numbers == np.round(numbers))
    if not sound.all():
        rule = f"have whole atomic numbers from 1 to {MAX_ATOMIC_NUMBER} (0 is padding)"
        raise DataError(where, rule, f"{numbers[~sound][0]:g}", "Correct the file or --keys")
    return numbers.astype(np.int64)


# ---------------------------------------------------------------------------------------------------- files that ASE reads


def _read_ase(path: Path, keys: Mapping[str, str], aliases: Mapping[str, Sequence[str]]) -> Structures:
    import ase.io

    try:
        frames = ase.io.read(path, index=":")
    except Exception as error:  # every format of ASE fails in its own way
        remedy = "Give a file that `ase.io.read` understands (extxyz is safest), or an .npz"
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(str(path), "be readable by ASE", got, remedy) from error
    if not frames:
        raise DataError(str(path), "hold structures", "none", "Check the file")
    tables = [_collect(atoms) for atoms in frames]
    found = _leave_out_uneven(_find_keys(set().union(*tables), keys, aliases, path), tables, path)
    any_periodic = any(atoms.pbc.any() for atoms in frames)
    graphs = [
        _graph_from_ase(atoms, table, found, any_periodic, f"{path.name}:{number}")
        for number, (atoms, table) in enumerate(zip(frames, tables, strict=True))
    ]
    return Structures(graphs, found, is_npz=False)


def _collect(atoms: Any) -> dict[str, Any]:
    """Return all that a frame carries by name; a calculator's result hides an entry of the same name."""
    results = {} if atoms.calc is None else {k: v for k, v in atoms.calc.results.items() if v is not None}
    own = {"numbers", "positions"}
    return {k: v for k, v in (atoms.info | atoms.arrays | results).items() if k not in own}


def _leave_out_uneven(found: dict[str, str], tables: Sequence[Mapping[str, Any]], path: Path) -> dict[str, str]:
    """Return the keys without those of optional labels that only some frames have."""
    even = dict(found)
    for label in _OPTIONAL:
        having = sum(found.get(label) in table for table in tables)
        if label in found and having < len(tables):
            del even[label]
            say(f"{path.name}: {label} is left out, only {having} of {len(tables)} structures have `{found[label]}`")
    return even


def _graph_from_ase(
    atoms: Any, table: Mapping[str, Any], found: Mapping[str, str], periodic: bool, where: str
) -> Graph:
    values = {}
    for label, key in found.items():
        if key not in table:
            if label in _NOT_LABELS:
                continue
            raise DataError(where, f"have `{key}` like the others", "none", "Remove the frame, or complete it")
        values[label] = table[key]
    fields = _shape_labels(values, len(atoms), where)
    graph = Graph(
        atomic_numbers=_read_numbers(atoms.numbers, len(atoms), where),
        positions=np.asarray(atoms.positions),
        cell=np.asarray(atoms.cell[:]) if periodic else None,
        pbc=np.asarray(atoms.pbc) if periodic else None,
        group=str(values.get("group", "")),
        **fields,
    )
    return _with_spin(graph, found.get("num_unpaired_electrons"), values.get("num_unpaired_electrons"), where)


def _shape_labels(values: Mapping[str, Any], num_atoms: int, where: str) -> dict[str, Any]:
    shapes = {
        "energy": (),
        "forces": (num_atoms, 3),
        "dipole": (3,),
        "partial_charges": (num_atoms,),
        "hirshfeld_ratios": (num_atoms,),
        "total_charge": (),
    }
    fields: dict[str, Any] = {}
    for label, shape in shapes.items():
        if label in values:
            array = _shape(values[label], shape, f"{where} {label}")
            fields[label] = array if shape else float(array)
    if "stress" in values:
        fields["stress"] = _unfold_stress(values["stress"], f"{where} stress")
    return fields


def _unfold_stress(value: Any, where: str) -> np.ndarray:
    """Return (3, 3) from ASE's six Voigt components xx yy zz yz xz xy, nine numbers or a matrix."""
    if np.size(value) == 6:
        xx, yy, zz, yz, xz, xy = _shape(np.ravel(value), (6,), where)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return _shape(np.ravel(value), (9,), where).reshape(3, 3)


def _with_spin(graph: Graph, key: str | None, value: Any, where: str) -> Graph:
    """Set the unpaired electrons. What `spin` means differs between sets, the electrons' parity tells.

    A multiplicity (OMol25 calls it `spin`) is odd where the number of electrons is even, a number of unpaired electrons is even.
    """
    if value is None or key is None:
        return graph
    number = float(_shape(value, (), f"{where} {key}"))
    means_multiplicity = key in ("multiplicity", "spin_multiplicity")
    if key == "spin":
        electrons = int(graph.atomic_numbers.sum()) - graph.total_charge
        means_multiplicity = (number - electrons) % 2 == 1
    graph.num_unpaired_electrons = number - 1 if means_multiplicity else number
    return graph


# --------------------------------------------------------------------------------------------------------------- npz


def _read_npz(path: Path, keys: Mapping[str, str], aliases: Mapping[str, Sequence[str]]) -> Structures:
    try:
        with np.load(path, allow_pickle=False) as archive:
            available = set(archive.files)
            found = _find_keys(available, keys, {**aliases, **_NPZ_ALIASES}, path)
            arrays = {label: archive[key] for label, key in found.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        remedy = "Copy it again, or save it without Python objects"
        raise DataError(str(path), "be a readable npz archive", str(error).splitlines()[0], remedy) from error
    for label in ("atomic_numbers", "positions"):
        if label not in arrays:
            remedy = f"Name its key with --keys {label}=KEY"
            raise DataError(str(path), f"have {label}", ", ".join(sorted(available)) or "nothing", remedy)
    spin_key = found.get("num_unpaired_electrons")
    return Structures(list(_iter_npz(arrays, spin_key, path)), found, is_npz=True)


def _iter_npz(arrays: Mapping[str, np.ndarray], spin_key: str | None, path: Path) -> Iterator[Graph]:
    positions = arrays["positions"]
    if positions.ndim != 3 or positions.shape[2] != 3 or not len(positions):
        raise DataError(f"{path} positions", "have shape (conformers, atoms, 3)", positions.shape, "Correct --keys")
    count, size = positions.shape[:2]
    numbers = arrays["atomic_numbers"]
    shared = {"atomic_numbers"} if numbers.shape == (size,) else set()
    shared |= {n for n in ("cell", "pbc") if n in arrays and arrays[n].shape in ((3, 3), (3,))}
    for label, array in arrays.items():
        if label not in shared and (array.ndim == 0 or len(array) != count):
            raise DataError(f"{path} {label}", f"have {count} rows like positions", array.shape, "Correct the file")
    for index in range(count):
        row = {label: array if label in shared else array[index] for label, array in arrays.items()}
        yield _graph_from_row(row, size, spin_key, f"{path.name}:{index}")


def _graph_from_row(row: Mapping[str, Any], size: int, spin_key: str | None, where: str) -> Graph:
    """Build one structure of an npz; atoms with the number zero are padding."""
    numbers = _read_numbers(row["atomic_numbers"], size, where)
    real = numbers > 0
    labels = {k: v for k, v in row.items() if k in ALIASES}
    fields = _shape_labels(labels, size, where)
    for name in ("forces", "partial_charges", "hirshfeld_ratios"):
        if name in fields:
            fields[name] = fields[name][real]
    cell = _shape(row["cell"], (3, 3), f"{where} cell") if "cell" in row else None
    pbc = np.broadcast_to(np.asarray(row["pbc"], bool), 3).copy() if "pbc" in row else np.ones(3, bool)
    graph = Graph(
        atomic_numbers=numbers[real],
        positions=np.asarray(row["positions"], np.float64)[real],
        cell=cell,
        pbc=None if cell is None else pbc,
        group=str(row["group"]) if "group" in row else "",
        **fields,
    )
    return _with_spin(graph, spin_key, row.get("num_unpaired_electrons"), where)
