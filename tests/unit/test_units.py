"""Conversion factors against values derived another way, or printed in the sources."""

import math

import pytest

from so3krates_dist import units


def test_hartree_and_bohr_follow_from_the_fine_structure_constant():
    # CODATA 2022: E_h = alpha^2 m_e c^2 and a_0 = hbar / (alpha m_e c), https://physics.nist.gov/cuu/Constants/
    alpha, electron_rest_energy = 7.2973525643e-3, 510998.95069
    hbar_c = 1973.269804  # eV Å
    assert alpha**2 * electron_rest_energy == pytest.approx(units.HARTREE_EV, rel=2e-9)
    assert hbar_c / (alpha * electron_rest_energy) == pytest.approx(units.BOHR_ANGSTROM, rel=2e-9)


def test_coulomb_constant_is_hartree_times_bohr():
    assert pytest.approx(14.3996454, abs=1e-6) == units.HARTREE_EV * units.BOHR_ANGSTROM  # e^2 / (4 pi eps_0), eV Å


def test_molar_units():
    assert pytest.approx(0.0433641042, abs=1e-10) == units.KCAL_PER_MOL_EV
    assert pytest.approx(4.184, rel=1e-15) == units.KCAL_PER_MOL_EV / units.KJ_PER_MOL_EV
    assert pytest.approx(627.5094740, abs=1e-6) == units.HARTREE_EV / units.KCAL_PER_MOL_EV
    assert pytest.approx(2625.4996395, abs=1e-6) == units.HARTREE_EV / units.KJ_PER_MOL_EV


def test_temperature():
    gas_constant = units.BOLTZMANN_EV_PER_K * units.ELEMENTARY_CHARGE_COULOMB * units.AVOGADRO_PER_MOL
    assert gas_constant == pytest.approx(8.31446261815324, rel=1e-12)  # J/(mol K), exact in the SI


def test_agrees_with_ase_to_its_older_codata_values():
    ase_units = pytest.importorskip("ase.units")
    assert pytest.approx(ase_units.Hartree, rel=1e-7) == units.HARTREE_EV
    assert pytest.approx(ase_units.Bohr, rel=1e-7) == units.BOHR_ANGSTROM
    assert pytest.approx(ase_units.kcal / ase_units.mol, rel=1e-7) == units.KCAL_PER_MOL_EV
    assert pytest.approx(ase_units.kB, rel=1e-6) == units.BOLTZMANN_EV_PER_K


def test_tables_hold_our_own_units_with_factor_one():
    assert units.ENERGY_UNITS["eV"] == units.LENGTH_UNITS["Angstrom"] == 1.0
    assert math.isclose(units.ENERGY_UNITS["Rydberg"] * 2, units.ENERGY_UNITS["Hartree"])
    assert all(factor > 0 for table in (units.ENERGY_UNITS, units.LENGTH_UNITS) for factor in table.values())
