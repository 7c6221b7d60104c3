"""A trained model as an ASE calculator: energies, forces and stress for molecules, surfaces and crystals.

Refuses what the model cannot mean anything for: elements it was not trained on, unpaired electrons where it saw none in training,
periodic structures where it does not see the cell, positions that are not finite, periodic directions without a lattice vector.
What the model ignores of a structure is said once. Nothing is reused between calls but the model; the neighbour list is made
anew each time (it is a small part of a step, and a stale one is wrong without a sign).
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import Graph, collate, compute_formula
from so3krates_dist.model.potential import CHARGED_CRYSTALS, Potential
from so3krates_dist.model.registry import change_model, load_model

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}
FURTHER_OUTPUTS: Final = {"dipole": "dipole", "charges": "partial_charges", "hirshfeld_ratios": "hirshfeld_ratios"}
"""Outputs of a model by the names that ASE has for them, and one that it has none for"""
MIN_VOLUME: Final = 1e-3
"""Å³; a cell of less is flat"""


class So3kratesCalculator(Calculator):  # type: ignore[misc] # ASE has no complete type information
    """ASE calculator of a trained model.

    Properties: `energy` and `free_energy` (eV, the same number), `forces` (eV/Å), and `stress` (eV/Å³, six components in
    ASE's order xx yy zz yz xz xy) for structures that are periodic in at least one direction and have three cell vectors. Where
    the model has them, `dipole` (e Å, the sum of charge times position; it depends on the origin of the coordinates where the
    total charge is not zero, and on the choice of images where the structure is periodic), `charges` (e, of each atom) and
    `hirshfeld_ratios` (of each atom, its volume over that of the free atom).

    The charge is `atoms.info["charge"]` (e, default 0). `atoms.info["spin"]` is the multiplicity, 2S + 1, or the number of
    unpaired electrons: the parity of the number of electrons tells which (a singlet is 1 or 0, a doublet 2 or 1). Without it
    a structure has no unpaired electron, or one where the number of electrons is odd. A model that could see unpaired electrons
    but has seen none in training (SO3LR as published) takes none for such a structure, says so once, and refuses structures
    that state some. Initial charges and magnetic moments are ignored.

    Vibrations of symmetric molecules with `model.name=so3krates` mean nothing: its forces jump at symmetric geometries.

    Args:
        model: Run folder, a folder with `model.safetensors`, or a model (it is copied, the caller's stays as it is).
        device: Where to compute, e.g. `cpu` or `cuda`.
        dtype: `float32` (fast) or `float64` (smoother energies: for vibrations, long trajectories, tight relaxations).
        long_range_cutoff: Å, where electrostatics and dispersion end; None or 0: they do not end, for molecules only. Without it
            the model's own. Only for models that have such terms.

    Raises:
        ConfigError: There is no such device, `dtype` is neither of the two, or the model has no long-range cutoff or does not
            allow this one.
        CheckpointError: The folder holds no model.
    """

    implemented_properties: tuple[str, ...] = ("energy", "free_energy", "forces", "stress")

    def __init__(
        self,
        model: Potential | Path | str,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        long_range_cutoff: float | Literal["of the model"] | None = "of the model",
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError("dtype", f"be one of {', '.join(DTYPES)}", dtype, "Take float32, or float64 to be exact")
        self._device, self._dtype = _read_device(device), DTYPES[dtype]
        changes = {} if long_range_cutoff == "of the model" else {"long_range_cutoff": _read_cutoff(long_range_cutoff)}
        if isinstance(model, str | Path):
            self.potential = load_model(model, device=self._device, dtype=self._dtype, changes=changes)
        else:
            self.potential = change_model(model, changes, device=self._device, dtype=self._dtype)
        further = tuple(name for name, output in FURTHER_OUTPUTS.items() if output in self.potential.outputs)
        self.implemented_properties = (*type(self).implemented_properties, *further)
        self._electrons: tuple[float, float, bool] | None = None
        self._said: set[str] = set()

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """Return what has changed since the last call, to the last bit; charge and spin count, which ASE does not look at."""
        if self.atoms is None or self._electrons is None:
            return list(all_changes)
        names = ("positions", "numbers", "cell", "pbc")
        changes = [n for n in names if not np.array_equal(getattr(self.atoms, n), getattr(atoms, n))]
        return changes if (*read_electrons(atoms), _states_spin(atoms)) == self._electrons else [*changes, "info"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute energy and forces, and stress where it is asked for.

        Args:
            atoms: Structure; None: the one of the last call.
            properties: Names from `implemented_properties`.
            system_changes: Not used; everything is computed anew.

        Raises:
            DataError: The model cannot be used for this structure.
            PropertyNotImplementedError: Stress of a structure without periodic directions or without a volume.
        """
        super().calculate(atoms, properties or ["energy"], system_changes)
        with_stress = "stress" in (properties or ())
        if with_stress and not (self.atoms.pbc.any() and self.atoms.cell.rank == 3):
            raise PropertyNotImplementedError("stress needs a periodic structure with three cell vectors")
        self._electrons = (*read_electrons(self.atoms), _states_spin(self.atoms))
        graph = self._check(make_graph(self.atoms))
        batch = collate([build_neighbors(graph, *self.potential.cutoffs)], self._dtype).to(self._device)
        output = self.potential(batch, compute_stress=with_stress)
        energy = float(output["energy"])
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": output["forces"].double().cpu().numpy(),
        }
        for name, key in FURTHER_OUTPUTS.items():
            if key in output:
                self.results[name] = output[key].double().cpu().numpy()
        if "dipole" in self.results:  # about the origin of the given coordinates, not of the moved ones
            moved = graph.total_charge * self.atoms.positions.mean(0)
            self.results["dipole"] = self.results["dipole"][0] + moved
        if with_stress:
            self.results["stress"] = full_3x3_to_voigt_6_stress(output["stress"][0].double().cpu().numpy())

    def _check(self, graph: Graph) -> Graph:
        """Return the structure as the model takes it.

        Raises:
            DataError: The model means nothing for it.
        """
        graph, line = suppose_closed_shell(graph, self.atoms, self.potential)
        self._say_once(line)
        self.potential.check_structure(graph)
        present = [n for n in ("total_charge", "num_unpaired_electrons") if getattr(graph, n)]
        if graph.is_periodic and graph.total_charge:
            present.append(CHARGED_CRYSTALS)
        for line in self.potential.describe_limits(present):
            self._say_once(line)
        return graph

    def _say_once(self, text: str) -> None:
        if text and text not in self._said:
            self._said.add(text)
            warnings.warn_explicit(text, UserWarning, "so3krates_dist", 0)  # one line, without one of the source


def suppose_closed_shell(graph: Graph, atoms: Atoms, potential: Potential) -> tuple[Graph, str]:
    """Take no unpaired electron where one is only supposed and the model has seen none.

    Args:
        graph: The structure with the unpaired electrons that `read_electrons` found.
        atoms: The structure with what it states.
        potential: The model.

    Returns:
        The structure as the model takes it, and a line that says so, empty where nothing was changed.
    """
    sees, statistics = potential.as_network.sees, potential.statistics
    is_untrained = "num_unpaired_electrons" in sees and not statistics.has_unpaired_electrons
    if not (graph.num_unpaired_electrons and is_untrained) or _states_spin(atoms):
        return graph, ""
    line = (
        f"{graph.group} has an odd number of electrons and states no spin; this model, which saw no unpaired electrons in"
        " training, takes none"
    )
    return dataclasses.replace(graph, num_unpaired_electrons=0.0), line


def _read_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError("device", "be one that torch knows", repr(device), "Take cpu or cuda") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError("device", "be there", f"{found}, one of {torch.cuda.device_count()} GPUs", "Take cpu")
    return found


def _states_spin(atoms: Atoms) -> bool:
    return atoms.info.get("spin") is not None


def _read_cutoff(value: float | str | None) -> float:
    """Return Å, 0 for none."""
    try:
        return 0.0 if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "long_range_cutoff", "be a number in Å, or None for no end", repr(value), "Leave it out for the model's own"
        ) from error


def read_electrons(atoms: Atoms) -> tuple[float, float]:
    """Return total charge (e) and number of unpaired electrons, from `info["charge"]` and `info["spin"]`.

    Raises:
        DataError: One of them is no whole number, the spin is negative, or another name of them says something else.
    """
    charge, spin = atoms.info.get("charge"), atoms.info.get("spin")
    charge = 0 if charge is None else charge
    for name, value, least in (("charge", charge, -np.inf), ("spin", spin, 0)):
        try:
            whole = value is None or (float(value).is_integer() and float(value) >= least)
        except (TypeError, ValueError):
            whole = False
        if not whole:
            rule = "be a whole number" + (", zero or greater" if name == "spin" else "")
            raise DataError(f'atoms.info["{name}"]', rule, repr(value), "Correct it, or leave it out")
    is_odd = bool((int(atoms.numbers.sum()) - int(charge)) % 2)
    unpaired = int(is_odd)
    if spin is not None:
        is_multiplicity = int(spin) > 0 and bool(int(spin) % 2) != is_odd  # no multiplicity is zero
        unpaired = int(spin) - is_multiplicity
    _check_other_names(atoms, {"charge": int(charge), "spin": unpaired})
    return float(charge), float(unpaired)


OTHER_NAMES: Final = {
    "total_charge": ("charge", 0), "Q": ("charge", 0), "multiplicity": ("spin", -1), "spin_multiplicity": ("spin", -1),
    "uhf": ("spin", 0),
}  # fmt: skip
"""What other programs call charge and spin: our name of it, and what to add for the charge or the number of unpaired electrons"""


def _check_other_names(atoms: Atoms, taken: dict[str, int]) -> None:
    """Raise where a structure says under another name than ours that it has another charge or spin than is taken."""
    for name, (ours, shift) in OTHER_NAMES.items():
        value = atoms.info.get(name)
        if not isinstance(value, int | float | np.integer | np.floating) or value + shift == taken[ours]:
            continue
        rule = f'agree with the {ours} that is taken: only info["charge"] and info["spin"] are read'
        raise DataError(f'atoms.info["{name}"]', rule, value, f'State it as "{ours}", or remove it')


def make_graph(atoms: Atoms) -> Graph:
    """Return the structure as the model's input, moved to the origin: float32 is finest there.

    Raises:
        DataError: There are no atoms, a position is not finite, or a periodic direction has no lattice vector.
    """
    positions = atoms.positions
    if not len(positions):
        raise DataError("atoms", "hold at least one atom", 0, "Give a structure")
    if not np.isfinite(positions).all():
        got = f"{int((~np.isfinite(positions)).any(1).sum())} atoms at nan or infinity"
        raise DataError("atoms.positions", "be finite", got, "Correct them; in dynamics take a shorter time step")
    charge, unpaired = read_electrons(atoms)
    fields: dict[str, Any] = {}
    if atoms.pbc.any():
        # Directions that are not periodic may lack a vector; any that spans space will do, nothing repeats along it.
        cell = np.asarray(atoms.cell.complete())
        if (atoms.pbc & ~atoms.cell.mask()).any() or abs(np.linalg.det(cell)) < MIN_VOLUME:
            got, remedy = f"pbc {atoms.pbc.tolist()}", "Set the cell, or pbc=False for a molecule"
            raise DataError("atoms.cell", "have independent vectors along its periodic directions", got, remedy)
        fields = {"cell": cell, "pbc": atoms.pbc.copy()}
    return Graph(
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=positions - positions.mean(0),
        total_charge=charge,
        num_unpaired_electrons=unpaired,
        group=compute_formula(atoms.numbers),
        **fields,
    )
