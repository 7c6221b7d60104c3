"""Labels from GFN2-xTB through tblite: energy, forces, dipole, Mulliken charges; the only importer of tblite.

Imports no torch, so that a worker process starts fast. The caller checks the electrons' parity: tblite accepts an odd number of
electrons without an unpaired one and gives an energy for it.
"""

import dataclasses
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from so3krates_dist.units import BOHR_ANGSTROM, BOLTZMANN_EV_PER_K, HARTREE_EV

METHOD: Final = "GFN2-xTB"
ACCURACY: Final = 0.1
"""Of the SCF; 1.0 leaves 2e-4 eV/Å of noise in the forces, 0.1 less than 5e-5"""
MAX_ITERATIONS: Final = 250
ELECTRONIC_TEMPERATURE: Final = 300.0
"""K, tblite's own default"""
MAX_ELEMENT: Final = 86
LANTHANIDES: Final = range(58, 72)
"""Ce to Lu have three valence electrons each in GFN2, so that the parity of all electrons tells nothing"""
_GROUND_STATE_UNPAIRED: Final = (
    "10" "10123210" "10123210" "101236543210123210" "101256543010123210" "10" + 15 * "1" + "234543210123210"
)  # fmt: skip
"""Unpaired electrons of the atoms H to Rn (NIST, Ground levels of neutral atoms); 4f shells are in GFN2's core: one d electron"""

Float64Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class Labels:
    """What GFN2-xTB says about one geometry."""

    energy: float
    """eV"""
    forces: Float64Array
    """(num_atoms, 3) eV/Å"""
    dipole: Float64Array
    """(3,) e Å from the centre of mass"""
    partial_charges: Float64Array
    """(num_atoms,) e, Mulliken"""


class XtbError(Exception):
    """The calculation of one geometry failed; the message says why."""


class Labeller:
    """Labels geometries of one molecule, each from a fresh guess: a label does not depend on the one before.

    Args:
        atomic_numbers: (num_atoms,).
        total_charge: e.
        num_unpaired: Unpaired electrons.
        electronic_temperature: K, of the Fermi smearing; forces are those of the free energy, which is what `energy` is. Higher
            than usual it keeps energies smooth where frontier orbitals cross (twisted double bonds).
    """

    def __init__(
        self,
        atomic_numbers: npt.NDArray[Any],
        total_charge: float,
        num_unpaired: float,
        electronic_temperature: float = ELECTRONIC_TEMPERATURE,
    ) -> None:
        self._numbers = np.asarray(atomic_numbers, np.int64)
        self._charge, self._unpaired = float(total_charge), int(num_unpaired)
        self._temperature = float(electronic_temperature)

    def label(self, positions: Float64Array) -> Labels:
        """Return the labels of one geometry.

        Args:
            positions: (num_atoms, 3) Å.

        Raises:
            XtbError: The SCF did not converge, or tblite refuses the geometry.
        """
        from ase.data import atomic_masses
        from tblite.exceptions import TBLiteRuntimeError

        try:
            result = self._build(positions).singlepoint()
        except TBLiteRuntimeError as error:
            raise XtbError(str(error).strip()) from error
        masses = atomic_masses[self._numbers]
        center = masses @ positions / masses.sum()
        return Labels(
            energy=float(result["energy"]) * HARTREE_EV,
            forces=-np.asarray(result["gradient"]) * (HARTREE_EV / BOHR_ANGSTROM),
            dipole=np.asarray(result["dipole"]) * BOHR_ANGSTROM - self._charge * center,
            partial_charges=np.asarray(result["charges"]),
        )

    def _build(self, positions: Float64Array) -> Any:
        from tblite.interface import Calculator

        calculator = Calculator(METHOD, self._numbers, positions / BOHR_ANGSTROM, self._charge, self._unpaired)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", ACCURACY)
        calculator.set("max-iter", MAX_ITERATIONS)
        if self._temperature != ELECTRONIC_TEMPERATURE:
            calculator.set("temperature", self._temperature * BOLTZMANN_EV_PER_K / HARTREE_EV)
        if self._unpaired:
            calculator.add("spin-polarization", 1.0)  # without it the multiplicity changes only occupations
        return calculator


def compute_isolated_atoms(elements: tuple[int, ...]) -> dict[int, float]:
    """Return the energies (eV) of neutral atoms in their ground states, without those that do not converge."""
    energies = {}
    for number in elements:
        labeller = Labeller(np.array([number]), 0.0, int(_GROUND_STATE_UNPAIRED[number - 1]))
        try:
            energies[number] = labeller.label(np.zeros((1, 3))).energy
        except XtbError:
            continue
    return energies
