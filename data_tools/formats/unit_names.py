"""What files call their units, and our names for them."""

from typing import Any, Final

from data_tools.formats.base import Units

_ENERGIES: Final = {
    "ev": "eV",
    "mev": "meV",
    "kcal/mol": "kcal/mol",
    "kj/mol": "kJ/mol",
    "hartree": "Hartree",
    "ha": "Hartree",
    "eh": "Hartree",
    "rydberg": "Rydberg",
    "ry": "Rydberg",
}
_LENGTHS: Final = {
    "ang": "Angstrom",
    "angstrom": "Angstrom",
    "a": "Angstrom",
    "å": "Angstrom",
    "bohr": "Bohr",
    "nm": "nm",
}


def find_units(energy: Any, length: Any, reason: str, force: Any = None) -> Units | None:
    """Return the units that a file names, or None where one of them is unknown.

    Args:
        energy: The file's word for its energy unit.
        length: That for its length unit.
        reason: Where the words stand.
        force: That for its force unit, an energy unit over a length unit; None: energy over length.
    """
    energy_unit, length_unit = _ENERGIES.get(str(energy).lower()), _LENGTHS.get(str(length).lower())
    force_energy, _, force_length = (
        f"{energy}/{length}".rpartition("/") if force is None else str(force).rpartition("/")
    )
    force_units = _ENERGIES.get(force_energy.lower()), _LENGTHS.get(force_length.lower())
    if energy_unit is None or length_unit is None or None in force_units:
        return None
    return Units(energy_unit, length_unit, f"{force_units[0]}/{force_units[1]}", reason)
