"""From named values of a record to a structure: which key is which label, shapes, what `spin` means.

Refuses to guess: where two keys could be the same label, the user has to name one.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np

from data_tools.formats.base import Request
from so3krates_dist.errors import DataError
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, Graph, IntArray, compute_formula

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
    "loss_weight": ("loss_weight",),
}
"""Names that labels go by, ours first; a weight in the loss that goes by another name has to be named: it must surprise nobody"""

NOT_LABELS: Final = ("group", "total_charge", "num_unpaired_electrons")
"""These have a value where a structure says nothing"""

ARRAY_ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "atomic_numbers": ("atomic_numbers", "z", "nuclear_charges", "numbers"),
    "positions": ("positions", "R", "coords", "coordinates"),
    "cell": ("cell", "unit_cell"),
    "pbc": ("pbc",),
}
"""Names of what makes a structure in files that are nothing but named arrays"""

_SHAPES: Final[dict[str, tuple[int | str, ...]]] = {
    "energy": (),
    "forces": ("atoms", 3),
    "dipole": (3,),
    "partial_charges": ("atoms",),
    "hirshfeld_ratios": ("atoms",),
    "total_charge": (),
    "loss_weight": (),
}


def parse_keys(pairs: Sequence[str]) -> dict[str, str]:
    """Read `energy=REF_energy` pairs.

    Raises:
        DataError: A pair has no equals sign or its left side is no label.
    """
    keys = {}
    for pair in pairs:
        label, _, key = pair.partition("=")
        if label not in ALIASES | ARRAY_ALIASES or not key:
            remedy = f"Write LABEL=KEY where LABEL is one of {', '.join(ALIASES | ARRAY_ALIASES)}"
            raise DataError(f"--keys {pair}", "map a label to a key of the file", repr(pair), remedy)
        keys[label] = key
    return keys


def get_aliases(request: Request) -> dict[str, tuple[str, ...]]:
    """Return the names of the labels that were asked for."""
    return ALIASES if request.labels else {name: ALIASES[name] for name in NOT_LABELS}


def find_keys(
    available: Collection[str], keys: Mapping[str, str], aliases: Mapping[str, Sequence[str]], where: str
) -> dict[str, str]:
    """Return the file's key of each label that it has.

    Args:
        available: Names that the file has.
        keys: The user's choice.
        aliases: Names that each label may go by.
        where: The file, for messages.

    Raises:
        DataError: A key that was asked for is not there, or two could be the same label.
    """
    found = {}
    for label, names in aliases.items():
        if label in keys:
            if keys[label] not in available:
                got = ", ".join(sorted(available)) or "no keys"
                raise DataError(where, f"have the key `{keys[label]}` for {label}", got, "Correct --keys")
            found[label] = keys[label]
            continue
        present = [name for name in names if name in available]
        if len(present) > 1:
            remedy = f"Choose with --keys {label}=KEY"
            raise DataError(where, f"have one key for {label}", " and ".join(present), remedy)
        if present:
            found[label] = present[0]
    return found


def choose_fixed_keys(
    available: Collection[str], request: Request, defaults: Mapping[str, str], where: str
) -> dict[str, str]:
    """Return the keys of a layout that documents them: its own ones where the file has them, unless the user names others.

    An array of `loss_weight` is taken too, which whoever prepared the file has added.

    Raises:
        DataError: A key that was asked for is not there.
    """
    usual: dict[str, tuple[str, ...]] = {
        label: (key,)
        for label, key in ({"loss_weight": ALIASES["loss_weight"][0]} | dict(defaults)).items()
        if request.labels or label in NOT_LABELS
    }
    named: dict[str, tuple[str, ...]] = {
        label: () for label in request.keys if label not in usual and (request.labels or label in NOT_LABELS)
    }
    return find_keys(available, request.keys, usual | named, where)


def shape_array(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Return a float64 array of the shape that belongs to the caller, or raise.

    Args:
        value: What the file has; one number for a shape of none, and columns of one number where a row is wanted, are taken too.
        shape: Of the result.
        where: Record and label, for messages.
    """
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError):
        raise DataError(where, "be numbers", repr(value)[:40], "Correct the file or --keys") from None
    if (array.size == 1 and shape == ()) or array.shape == (*shape, 1):
        array = array.reshape(shape)
    if array.shape != shape:
        raise DataError(where, f"have shape {shape}", array.shape, "Correct the file or --keys")
    return array


def read_numbers(value: Any, size: int, where: str) -> IntArray:
    """Return (size,) int64 atomic numbers, zero for padding, or raise."""
    numbers = shape_array(value, (size,), f"{where} atomic_numbers")
    with np.errstate(invalid="ignore"):
        sound = (numbers >= 0) & (numbers <= MAX_ATOMIC_NUMBER) & (numbers == np.round(numbers))
    if not sound.all():
        rule = f"have whole atomic numbers from 1 to {MAX_ATOMIC_NUMBER} (0 is padding)"
        raise DataError(where, rule, f"{numbers[~sound][0]:g}", "Correct the file or --keys")
    return numbers.astype(np.int64)


def shape_labels(values: Mapping[str, Any], num_atoms: int, where: str) -> dict[str, Any]:
    """Return the labels as fields of `Graph`; what is None stays out."""
    fields: dict[str, Any] = {}
    for label, dimensions in _SHAPES.items():
        if values.get(label) is not None:
            shape = tuple(num_atoms if size == "atoms" else int(size) for size in dimensions)
            array = shape_array(values[label], shape, f"{where} {label}")
            fields[label] = array if shape else float(array)
    if values.get("stress") is not None:
        fields["stress"] = unfold_stress(values["stress"], f"{where} stress")
    return fields


def unfold_stress(value: Any, where: str) -> np.ndarray:
    """Return (3, 3) from ASE's six Voigt components xx yy zz yz xz xy, nine numbers or a matrix."""
    if np.size(value) == 6:
        xx, yy, zz, yz, xz, xy = shape_array(np.ravel(value), (6,), where)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return shape_array(np.ravel(value), (9,), where).reshape(3, 3)


def count_unpaired(numbers: IntArray, total_charge: float, key: str, value: Any, where: str) -> float:
    """Return the number of unpaired electrons. What `spin` means differs between sets, the electrons' parity tells.

    A multiplicity (OMol25 calls it `spin`) is odd where the number of electrons is even, a number of unpaired electrons is even.
    """
    number = float(shape_array(value, (), f"{where} {key}"))
    means_multiplicity = key in ("multiplicity", "spin_multiplicity")
    if key == "spin":
        electrons = int(numbers.sum()) - total_charge
        means_multiplicity = (number - electrons) % 2 == 1
    return number - 1 if means_multiplicity else number


def build_graph(values: Mapping[str, Any], keys: Mapping[str, str], request: Request, where: str) -> Graph:
    """Build one structure.

    Args:
        values: By label, in the file's units; `atomic_numbers` (num_atoms,) and `positions` (num_atoms, 3) are there, others may
            be missing or None; a `cell` without `pbc` is periodic.
        keys: The file's key of each label.
        request: What the user asked for.
        where: "file:record", for messages.

    Raises:
        DataError: A value has another shape, or is no number.
    """
    size = len(np.atleast_1d(values["atomic_numbers"]))
    numbers = read_numbers(values["atomic_numbers"], size, where)
    fields = shape_labels(values, size, where)
    cell, pbc = read_cell(values.get("cell"), values.get("pbc"), where)
    if (spin := values.get("num_unpaired_electrons")) is not None:
        key = keys["num_unpaired_electrons"]
        charge = fields.get("total_charge", 0.0)
        fields["num_unpaired_electrons"] = count_unpaired(numbers, charge, key, spin, where)
    positions = shape_array(values["positions"], (size, 3), f"{where} positions")
    group = values.get("group")
    graph = Graph(
        atomic_numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc,
        group=name_group(request, "" if group is None else str(group), numbers),
        **fields,
    )
    return graph


def read_cell(cell: Any, pbc: Any, where: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the cell and the periodic directions; both None for a molecule. A cell without `pbc` repeats in all directions."""
    if cell is None:
        return None, None
    repeats = np.ones(3, bool) if pbc is None else np.broadcast_to(np.asarray(pbc, bool), 3).copy()
    return shape_array(cell, (3, 3), f"{where} cell"), repeats


def name_group(request: Request, group: str, numbers: IntArray) -> str:
    """Return the name that results of a structure are grouped by: the user's, the file's, or the formula."""
    return request.group or group or _compute_formula(numbers.astype(np.int64).tobytes())


@functools.lru_cache(maxsize=4096)
def _compute_formula(numbers: bytes) -> str:
    return compute_formula(np.frombuffer(numbers, np.int64))


def attempt(build: Callable[[], Graph]) -> Graph | DataError:
    """Return the structure, or the error that says what is wrong with the record."""
    try:
        return build()
    except DataError as error:
        return error
