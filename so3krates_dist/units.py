"""Units inside the program are eV, Å, e and multiples of them; the only conversion factors are here.

Values are CODATA 2022 (https://physics.nist.gov/cuu/Constants/); the calorie is the thermochemical one (4.184 J, exact).
Conversion happens once, where data enter (`data_tools`).
"""

from typing import Final

ELEMENTARY_CHARGE_COULOMB: Final = 1.602176634e-19  # exact (SI)
AVOGADRO_PER_MOL: Final = 6.02214076e23  # exact (SI)

HARTREE_EV: Final = 27.211386245981
BOHR_ANGSTROM: Final = 0.529177210544
KCAL_PER_MOL_EV: Final = 4184.0 / (AVOGADRO_PER_MOL * ELEMENTARY_CHARGE_COULOMB)
KJ_PER_MOL_EV: Final = 1000.0 / (AVOGADRO_PER_MOL * ELEMENTARY_CHARGE_COULOMB)
RYDBERG_EV: Final = HARTREE_EV / 2
BOLTZMANN_EV_PER_K: Final = 1.380649e-23 / ELEMENTARY_CHARGE_COULOMB

# Physical terms of published models are tied to the constants that their weights were trained with: CODATA 2014, as ASE has them.
CODATA_2014_HARTREE_EV: Final = 27.211386024367243
CODATA_2014_BOHR_ANGSTROM: Final = 0.5291772105638411
CODATA_2014_FINE_STRUCTURE: Final = 0.007297352566206496
CODATA_2014_COULOMB_EV_ANGSTROM: Final = CODATA_2014_HARTREE_EV * CODATA_2014_BOHR_ANGSTROM
"""e^2 / (4 pi epsilon_0)"""

ENERGY_UNITS: Final[dict[str, float]] = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": KCAL_PER_MOL_EV,
    "kJ/mol": KJ_PER_MOL_EV,
    "Hartree": HARTREE_EV,
    "Rydberg": RYDBERG_EV,
}
"""Factor that turns an energy in the named unit into eV."""

LENGTH_UNITS: Final[dict[str, float]] = {"Angstrom": 1.0, "Bohr": BOHR_ANGSTROM, "nm": 10.0}
"""Factor that turns a length in the named unit into Å."""
