"""Laws of motion that a conservative force field and the integrator together must keep (potential with a formula, float64)."""

import numpy as np
import pytest
from analytic import make_cluster, make_morse
from ase import Atoms, units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

from so3krates_dist.inference.calculator import So3kratesCalculator
from so3krates_dist.inference.dynamics import NveResult, draw_momenta, make_atoms, run_nve


def make_crystal() -> Atoms:
    return bulk("Ar", "fcc", a=4.0, cubic=True) * (2, 1, 1)


def run(timestep: float = 1.0, picoseconds: float = 1.0) -> NveResult:
    return run_nve(
        make_morse(), make_atoms(make_cluster(2)), temperature=150.0, timestep=timestep, picoseconds=picoseconds
    )


def test_energy_is_conserved() -> None:
    result = run()
    assert np.std(result.kinetic_energies) > 0.01  # energy does flow
    assert abs(result.drift) < 0.02
    assert result.fluctuation < 0.05


def test_energy_is_conserved_in_a_crystal() -> None:
    result = run_nve(make_morse(), make_crystal(), temperature=100.0, timestep=2.0, picoseconds=0.5)
    assert np.std(result.kinetic_energies) > 0.01
    assert abs(result.drift) < 0.05


def test_energy_error_falls_with_the_square_of_the_time_step() -> None:
    """Velocity Verlet: Hairer, Lubich and Wanner, Acta Numerica 12, 399 (2003), section 4."""
    coarse, fine = run(4.0, 0.4), run(2.0, 0.4)
    assert coarse.fluctuation / fine.fluctuation == pytest.approx(4.0, rel=0.15)


def test_mean_temperature_is_the_one_asked_for() -> None:
    """Equipartition: half of the kinetic energy at the minimum flows into potential energy."""
    atoms = Atoms("ArNeArNe", positions=1.0 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))
    result = run_nve(make_morse(), atoms, temperature=50.0, timestep=2.0, picoseconds=3.0)
    assert result.temperatures.mean() == pytest.approx(50.0, rel=0.1)


def test_momentum_and_angular_momentum_are_conserved() -> None:
    last = run(2.0, 0.5).frames[-1]
    assert np.linalg.norm(last.get_momenta()) > 1.0
    np.testing.assert_allclose(last.get_momenta().sum(0), 0, atol=1e-9)
    np.testing.assert_allclose(last.get_angular_momentum(), 0, atol=1e-8)


def test_motion_can_be_reversed() -> None:
    atoms = make_atoms(make_cluster(2))
    start = atoms.positions.copy()
    atoms.calc = So3kratesCalculator(make_morse(), dtype="float64")
    draw_momenta(atoms, 150.0, seed=0)
    VelocityVerlet(atoms, timestep=2 * units.fs).run(100)
    assert np.abs(atoms.positions - start).max() > 0.1
    atoms.set_momenta(-atoms.get_momenta())
    VelocityVerlet(atoms, timestep=2 * units.fs).run(100)
    np.testing.assert_allclose(atoms.positions, start, atol=1e-8)
