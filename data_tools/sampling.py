"""Geometries to label: short Langevin dynamics on MMFF94 from a fresh ETKDG conformer, or small random displacements.

Runs in worker processes and imports no torch. Every trajectory has its own random stream, keyed by seed, molecule, temperature and
its number, so that what is sampled does not depend on which process does it.
"""

import dataclasses
import hashlib
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from data_tools.xtb import Float64Array, Labeller, Labels, XtbError
from so3krates_dist.units import BOLTZMANN_EV_PER_K, KCAL_PER_MOL_EV

TIMESTEP_FS: Final = 0.5
FRICTION_PER_FS: Final = 0.01
STEPS_PER_SAMPLE: Final = 100
EQUILIBRATION_STEPS: Final = 1000
TRAJECTORY_SAMPLES: Final = 50
"""Samples of one trajectory: each starts from its own conformer"""
DIVERGED: Final = "dynamics diverged"
"""Reason of samples that are left of a trajectory once it has blown up"""
_MAX_EXTENT: Final = 1e3
"""Å from the centre; no molecule is that large"""


@dataclasses.dataclass(frozen=True, slots=True)
class Molecule:
    """What shall be sampled."""

    name: str
    atomic_numbers: npt.NDArray[np.int64]
    """(num_atoms,), in RDKit's order where there is a SMILES"""
    total_charge: float = 0.0
    num_unpaired_electrons: float = 0.0
    smiles: str | None = None
    positions: Float64Array | None = None
    """(num_atoms, 3) Å; None where the SMILES gives the geometry"""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One piece of work for a process: sample and label."""

    molecule: Molecule
    kind: Literal["langevin", "rattle", "given"]
    level: float
    """K for Langevin dynamics, Å for displacements, unused for given geometries"""
    number: int
    """of the trajectory among those of the same molecule and level"""
    count: int
    """samples wanted"""
    seed: int


@dataclasses.dataclass(slots=True)
class Sample:
    """One geometry with its labels, or with the reason why it has none."""

    positions: Float64Array
    labels: Labels | None
    failure: str = ""


class SamplingError(Exception):
    """A molecule cannot be embedded or has no MMFF94 parameters; the message says which of both."""


def run_task(task: Task) -> list[Sample]:
    """Sample geometries and label them; what fails is a sample without labels, so that other molecules go on."""
    molecule = task.molecule
    labeller = Labeller(molecule.atomic_numbers, molecule.total_charge, molecule.num_unpaired_electrons)
    samples = []
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of dynamics that blow up
            geometries = _sample(task)
    except SamplingError as error:
        nowhere = np.zeros((len(molecule.atomic_numbers), 3))
        return [Sample(nowhere, None, str(error)) for _ in range(task.count)]
    for positions in geometries:
        if not np.all(np.isfinite(positions)):
            samples.append(Sample(positions, None, DIVERGED))
            continue
        stored = positions.astype(np.float32).astype(np.float64)  # labels belong to the positions that are written
        try:
            samples.append(Sample(stored, labeller.label(stored)))
        except XtbError as error:
            samples.append(Sample(stored, None, str(error)))
    return samples


def _sample(task: Task) -> Float64Array:
    """Return (count, num_atoms, 3) Å."""
    if task.kind == "langevin":
        return _run_langevin(task)
    assert task.molecule.positions is not None, "only Langevin dynamics starts from a SMILES"
    if task.kind == "given":
        return task.molecule.positions[None]
    generator = np.random.Generator(np.random.Philox(key=_make_key(task)))
    noise = generator.standard_normal((task.count, *task.molecule.positions.shape))
    return np.asarray(task.molecule.positions + task.level * noise)


def _make_key(task: Task) -> int:
    words = (task.seed, task.molecule.name, task.molecule.smiles, task.kind, task.level, task.number)
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=16).digest(), "big")


# --------------------------------------------------------------------------------------------------------------- MMFF94


def parse_smiles(smiles: str) -> Any:
    """Return RDKit's molecule with hydrogens, or None where the text is no SMILES."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():  # its complaints go to stderr; ours name the line of the file
        molecule = Chem.MolFromSmiles(smiles)
    return None if molecule is None else Chem.AddHs(molecule)


def has_force_field(molecule: Any) -> bool:
    """Return whether MMFF94 has parameters for an RDKit molecule."""
    from rdkit.Chem import rdForceFieldHelpers

    return bool(rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule))


class _ForceField:
    """MMFF94 energies and gradients of one embedded and optimised conformer."""

    def __init__(self, smiles: str, embedding_seed: int) -> None:
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

        molecule = parse_smiles(smiles)
        parameters: Any = rdDistGeom.ETKDGv3()
        parameters.randomSeed = embedding_seed
        if rdDistGeom.EmbedMolecule(molecule, parameters) != 0:
            raise SamplingError(f"ETKDG found no conformer of {smiles}")
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
        if properties is None:
            raise SamplingError(f"MMFF94 has no parameters for {smiles}")
        self._molecule = molecule  # the field points into its conformer and does not keep it alive
        self._field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties)
        self._field.Minimize(maxIts=1000)
        self.positions: Float64Array = np.array(molecule.GetConformer().GetPositions())

    def compute_forces(self, positions: Float64Array) -> Float64Array:
        """Return (num_atoms, 3) eV/Å.

        RDKit 2026.9.1 gives the gradient of earlier positions unless the energy of these was computed just before.
        """
        flat = positions.ravel().tolist()
        self._field.CalcEnergy(flat)
        gradient = np.array(self._field.CalcGrad(flat)).reshape(-1, 3)
        return np.asarray(-KCAL_PER_MOL_EV * gradient)


def _run_langevin(task: Task) -> Float64Array:
    """Run Langevin dynamics with the BAOAB splitting (Leimkuhler and Matthews, J. Chem. Phys. 138, 174102 (2013)).

    Samples after the trajectory has blown up are nan.
    """
    import ase.units
    from ase.data import atomic_masses

    assert task.molecule.smiles is not None, "Langevin dynamics needs a SMILES"
    generator = np.random.Generator(np.random.Philox(key=_make_key(task)))
    field = _ForceField(task.molecule.smiles, int(generator.integers(1, 2**31 - 1)))
    masses = atomic_masses[task.molecule.atomic_numbers][:, None]
    half = 0.5 * TIMESTEP_FS * ase.units.fs
    thermal = np.sqrt(BOLTZMANN_EV_PER_K * task.level / masses)
    keep = np.exp(-FRICTION_PER_FS * TIMESTEP_FS)
    kick = np.sqrt(1 - keep**2) * thermal
    positions = field.positions
    velocities = thermal * generator.standard_normal(positions.shape)
    forces = field.compute_forces(positions)
    samples: list[Float64Array] = []
    for step in range(1, EQUILIBRATION_STEPS + task.count * STEPS_PER_SAMPLE + 1):
        velocities = velocities + half * forces / masses
        positions = positions + half * velocities
        velocities = keep * velocities + kick * generator.standard_normal(positions.shape)
        positions = positions + half * velocities
        if not np.all(np.abs(positions - positions.mean(0)) < _MAX_EXTENT):  # nan is not below it either
            samples += (task.count - len(samples)) * [np.full_like(positions, np.nan)]
            break
        forces = field.compute_forces(positions)
        velocities = velocities + half * forces / masses
        if step > EQUILIBRATION_STEPS and step % STEPS_PER_SAMPLE == 0:
            samples.append(positions - positions.mean(0))
    return np.stack(samples)
