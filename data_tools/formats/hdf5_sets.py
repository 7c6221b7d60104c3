"""HDF5 files of published sets: QM7-X, ANI-1x, SPICE 2 and Transition1x, with what their documentation says of them."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from data_tools.formats.base import Layout, Request, Units
from data_tools.formats.hdf5 import GroupedFile, count_rows, read_array, read_word
from data_tools.formats.labels import attempt
from data_tools.formats.probe import Probe
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

# --------------------------------------------------------------------------------------------------------------- QM7-X


class Qm7xFile(GroupedFile):
    """Groups /molecule/conformer, each conformer with arrays of its own."""

    numbers_key, positions_key = "atNUM", "atXYZ"
    levels: ClassVar = {
        "ePBE0+MBD": ("totFOR", "PBE0+MBD"),
        "ePBE0": ("pbe0FOR", "PBE0"),
        "eMBD": ("vdwFOR", "MBD@PBE0"),
    }
    others: ClassVar = {"dipole": "vDIP", "hirshfeld_ratios": "hRAT", "partial_charges": "hCHG"}

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        self._duplicates = _read_duplicates(path)
        super().__init__(path, name, layout, request)
        if self._duplicates is None:
            self.notes = ("no DupMols.dat beside the files: duplicates of QM7-X are not filtered",)
        else:
            self.notes = (
                f"molecules named in DupMols.dat ({len(self._duplicates)}) are left out, as the set's authors do",
            )

    def _count_records(self, file: Any) -> tuple[list[str], list[int]]:
        groups = sorted(file)
        return groups, [len(self._list_conformers(file[name])) for name in groups]

    def _list_conformers(self, molecule: Any) -> list[str]:
        """Return the conformers by name without duplicates: an equilibrium structure that is one takes its displaced ones along."""
        names = sorted(molecule)
        if not self._duplicates:
            return names
        stems = {name.removesuffix("opt") for name in names if name in self._duplicates}
        return [name for name in names if name[: name.rindex("-") + 1] not in stems]

    def _list_names(self, group: Any) -> Sequence[str]:
        return [name for conformer in self._list_conformers(group)[:1] for name in group[conformer]]

    def read_group(self, group: Any, name: str, rows: range) -> Iterator[tuple[str, Graph | DataError]]:
        """Read some conformers of a molecule; records are called "molecule/conformer"."""
        for conformer in self._list_conformers(group)[rows.start : rows.stop]:
            where = f"{self.name}:{name}/{conformer}"
            yield where, attempt(functools.partial(self._build_conformer, group[conformer], where))

    def _build_conformer(self, group: Any, where: str) -> Graph:
        labels = {label: read_array(group, key, where) for label, key in self.keys.items() if key in group}
        positions = read_array(group, self.positions_key, where)
        numbers = read_array(group, self.numbers_key, where)
        return self._build(labels | {"atomic_numbers": numbers, "positions": positions}, where)


def _read_duplicates(path: Path) -> frozenset[str] | None:
    """Return the names in DupMols.dat beside the file; None where there is no such list."""
    listed = path.parent / "DupMols.dat"
    if not listed.is_file():
        return None
    return frozenset(line.strip() for line in listed.read_text(errors="replace").splitlines() if line.strip())


# -------------------------------------------------------------------------------------------------------------- ANI-1x

_ANI_LEVELS: Final = {
    "wb97x_dz": "wB97x/6-31G(d)",
    "wb97x_tz": "wB97x/def2-TZVPP",
    "ccsd(t)_cbs": "CCSD(T)*/CBS",
    "hf_dz": "HF/cc-pVDZ",
    "hf_tz": "HF/cc-pVTZ",
    "hf_qz": "HF/cc-pVQZ",
}


class AniFile(GroupedFile):
    """A group per formula; a label that a conformer lacks is nan in all its numbers."""

    numbers_key, positions_key = "atomic_numbers", "coordinates"
    levels: ClassVar = {f"{key}.energy": (f"{key}.forces", level) for key, level in _ANI_LEVELS.items()}

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        self.notes = ("nan is a missing label of ANI-1x; --keys energy=... selects another level than wb97x_dz",)

    def _choose_defaults(self) -> Mapping[str, str]:
        level = self._find_energy().rpartition(".")[0]
        return {**super()._choose_defaults(), "dipole": f"{level}.dipole"}

    def _count_records(self, file: Any) -> tuple[list[str], list[int]]:
        return count_rows(file, self.positions_key)

    def _build(self, values: dict[str, Any], where: str) -> Graph:
        present = {
            k: v
            for k, v in values.items()
            if k in ("atomic_numbers", "positions", "loss_weight") or not np.isnan(np.asarray(v, np.float64)).all()
        }
        return super()._build(present, where)


# -------------------------------------------------------------------------------------------------------------- SPICE 2

_SPICE_LEVEL: Final = "wB97M-D3(BJ)/def2-TZVPPD"
_SMILES_ATOM: Final = re.compile(r"\[([^\]]*)\]")
_SMILES_CHARGE: Final = re.compile(r"(\+{1,8}|-{1,8}|[+-]\d{1,2})$")


def read_formal_charge(smiles: str) -> int:
    """Return the sum of the formal charges of a SMILES: they stand in brackets only, behind the hydrogens, as + ++ +2 or -.

    Raises:
        ValueError: It has brackets that do not close.
    """
    rest = _SMILES_ATOM.sub("", smiles)
    if "[" in rest or "]" in rest or not smiles.strip():
        raise ValueError(smiles)
    total = 0
    for atom in _SMILES_ATOM.findall(smiles):
        found = _SMILES_CHARGE.search(atom.partition(":")[0])
        if found is not None:
            sign, size = found[1][0] + "1", found[1][1:]
            total += int(sign) * (int(size) if size.isdigit() else len(found[1]))
    return total


class SpiceFile(GroupedFile):
    """A group per molecule; gradients instead of forces, charges by the SMILES."""

    numbers_key, positions_key = "atomic_numbers", "conformations"
    levels: ClassVar = {
        "dft_total_energy": ("dft_total_gradient", _SPICE_LEVEL),
        "formation_energy": ("dft_total_gradient", _SPICE_LEVEL),
    }
    others: ClassVar = {"dipole": "scf_dipole"}

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        self.notes = ("charges are the formal ones of each molecule's SMILES; groups are SPICE's subsets",)

    def _count_records(self, file: Any) -> tuple[list[str], list[int]]:
        return count_rows(file, self.positions_key)

    def _read_columns(self, group: Any, rows: range, where: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        shared, columns = super()._read_columns(group, rows, where)
        if "forces" in columns and self.keys["forces"].endswith("gradient"):
            columns["forces"] = -columns["forces"].astype(np.float64)
        if "total_charge" not in self.keys:
            shared["total_charge"] = _read_charge(group, where)
        if "group" not in self.keys:
            shared["group"] = read_word(group, "subset")
        return shared, columns


def _read_charge(group: Any, where: str) -> int:
    smiles = read_word(group, "smiles")
    remedy = "Name an array of charges with --keys total_charge=KEY"
    if smiles is None:
        raise DataError(where, "have a SMILES that tells the charge", "none", remedy)
    try:
        return read_formal_charge(smiles)
    except ValueError:
        raise DataError(where, "have a SMILES that tells the charge", repr(smiles)[:80], remedy) from None


# --------------------------------------------------------------------------------------------------------- Transition1x

_SPLITS: Final = ("train", "val", "test")


class Transition1xFile(GroupedFile):
    """Groups /data/formula/reaction with structures along the way; reactant and product have groups of their own inside."""

    numbers_key, positions_key = "atomic_numbers", "positions"
    levels: ClassVar = {"wB97x_6-31G(d).energy": ("wB97x_6-31G(d).forces", "wB97x/6-31G(d)")}

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        self.notes = (
            "Transition1x's own division into train, val and test is not kept; reactants and products come first",
        )

    def _count_records(self, file: Any) -> tuple[list[str], list[int]]:
        import h5py

        roots = ["data"] if "data" in file else [name for name in _SPLITS if name in file]
        reactions = [
            f"{r}/{formula}/{rxn}" for r in roots for formula in sorted(file[r]) for rxn in sorted(file[r][formula])
        ]
        groups = [group for rxn in reactions for group in (f"{rxn}/reactant", f"{rxn}/product", rxn)]
        found = [file.get(f"{group}/{self.positions_key}") for group in groups]
        return groups, [int(f.shape[0]) if isinstance(f, h5py.Dataset) and f.shape else 0 for f in found]


def _has(probe: Probe, level: int, *names: str) -> bool:
    levels = probe.first_groups
    return len(levels) > level and set(names) <= levels[level]


def _is_qm7x(probe: Probe) -> bool:
    return _has(probe, 2, "atNUM", "atXYZ")


def _is_ani1x(probe: Probe) -> bool:
    has_labels = len(probe.first_groups) > 1 and any(name.endswith("energy") for name in probe.first_groups[1])
    return has_labels and _has(probe, 1, "atomic_numbers", "coordinates")


def _is_spice(probe: Probe) -> bool:
    return _has(probe, 1, "atomic_numbers", "conformations")


def _is_transition1x(probe: Probe) -> bool:
    return _has(probe, 3, "atomic_numbers", "positions", "wB97x_6-31G(d).energy")


QM7X: Final = Layout(
    name="qm7x",
    description="HDF5 of QM7-X: /molecule/conformer/{atNUM, atXYZ, ePBE0+MBD, totFOR, ...} in eV and Å",
    recognise=_is_qm7x,
    open=Qm7xFile,
    units=Units("eV", "Angstrom", "eV/Angstrom", "QM7-X's documentation"),
    level_of_theory="PBE0+MBD",
    source="J. Hoja et al., Sci. Data 8, 43 (2021), 10.1038/s41597-021-00812-2; data 10.5281/zenodo.4288677",
)
ANI1X: Final = Layout(
    name="ani1x",
    description="HDF5 of ANI-1x: /formula/{atomic_numbers, coordinates, wb97x_dz.energy, ...} in Hartree and Å",
    recognise=_is_ani1x,
    open=AniFile,
    units=Units("Hartree", "Angstrom", "Hartree/Angstrom", "ANI-1x's documentation"),
    level_of_theory="wB97x/6-31G(d)",
    source="J. S. Smith et al., Sci. Data 7, 134 (2020), 10.1038/s41597-020-0473-z; data 10.6084/m9.figshare.c.4712477.v1",
)
SPICE: Final = Layout(
    name="spice",
    description="HDF5 of SPICE: /molecule/{atomic_numbers, conformations, dft_total_energy, dft_total_gradient, smiles, subset} "
    "in Hartree and Bohr",
    recognise=_is_spice,
    open=SpiceFile,
    units=Units("Hartree", "Bohr", "Hartree/Bohr", "SPICE's documentation"),
    level_of_theory=_SPICE_LEVEL,
    licence="CC0-1.0",
    source="P. Eastman et al., Sci. Data 10, 11 (2023), 10.1038/s41597-022-01882-6; data 10.5281/zenodo.10975225",
)
TRANSITION1X: Final = Layout(
    name="transition1x",
    description="HDF5 of Transition1x: /data/formula/reaction/{atomic_numbers, positions, wB97x_6-31G(d).energy, ...} in eV, Å",
    recognise=_is_transition1x,
    open=Transition1xFile,
    units=Units("eV", "Angstrom", "eV/Angstrom", "Transition1x's documentation"),
    level_of_theory="wB97x/6-31G(d)",
    source="M. Schreiner et al., Sci. Data 9, 779 (2022), 10.1038/s41597-022-01870-w; data 10.6084/m9.figshare.19614657",
)
