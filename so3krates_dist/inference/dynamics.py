"""Molecular dynamics at constant energy (NVE): how well a model conserves energy, and the verb `so3krates md`.

Energy conservation is the test that a force field's forces are the derivative of its energy, along real motion. The drift is the
slope of a straight line through the total energy per atom, times 1 ps; its sign is kept.
"""

import argparse
import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Final

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from so3krates_dist import __version__
from so3krates_dist.config import read_config
from so3krates_dist.data.shards import SPLITS, iter_graphs, load_manifest
from so3krates_dist.distributed import Rank, choose_device, tune_machine
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.files import make_folder
from so3krates_dist.graph import FloatArray, Graph
from so3krates_dist.inference.calculator import DTYPES, So3kratesCalculator
from so3krates_dist.metrics import print_table
from so3krates_dist.model.potential import Potential
from so3krates_dist.units import BOLTZMANN_EV_PER_K

DEFAULT_MOLECULE: Final = "ethanol"
DEFAULTS: Final = {"temperature": 300.0, "timestep": 0.5, "picoseconds": 1.0, "seed": 0, "dtype": "float64"}
"""what `so3krates md` does unless it is told otherwise; results of other settings go to folders of their own"""
FRAME_INTERVAL_FS: Final = 5.0
RELAXED_FORCE: Final = 0.05
"""eV/Å; a relaxation ends below this"""

MAX_ATOMS_ONE_THREAD: Final = 100
"""a smaller molecule has no work for a second CPU thread, and waits for it"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NveResult:
    """A trajectory at constant energy; `(num_steps + 1,)` values, the first one is the start."""

    times: FloatArray
    """fs"""
    potential_energies: FloatArray
    """eV"""
    kinetic_energies: FloatArray
    """eV"""
    temperatures: FloatArray
    """K, from the degrees of freedom that move: 3N less translations and, for molecules, rotations"""
    num_atoms: int
    timestep: float
    """fs"""
    milliseconds_per_step: float
    """wall time"""
    frames: tuple[Atoms, ...]
    """structures with momenta, energies and forces, every `FRAME_INTERVAL_FS`"""

    @property
    def total_energies(self) -> FloatArray:
        """Total energy in meV/atom, less that at the start."""
        total = self.potential_energies + self.kinetic_energies
        return np.asarray(1e3 * (total - total[0]) / self.num_atoms)

    @property
    def drift(self) -> float:
        """Slope of a linear fit of the total energy times 1 ps, meV/atom."""
        return compute_drift(self.times, self.total_energies)

    @property
    def fluctuation(self) -> float:
        """Standard deviation of the total energy about that line, meV/atom."""
        line = np.polynomial.Polynomial.fit(self.times, self.total_energies, 1)
        return float(np.std(self.total_energies - line(self.times)))

    def to_json(self) -> dict[str, Any]:
        """Return the figures that describe the trajectory."""
        return {
            "drift_mev_per_atom_per_ps": self.drift,
            "fluctuation_mev_per_atom": self.fluctuation,
            "mean_temperature_kelvin": float(self.temperatures.mean()),
            "picoseconds": float(self.times[-1]) / 1e3,
            "timestep_fs": self.timestep,
            "num_atoms": self.num_atoms,
            "milliseconds_per_step": self.milliseconds_per_step,
        }


def compute_drift(times: FloatArray, energies: FloatArray) -> float:
    """Return the slope of a linear fit times 1 ps.

    Args:
        times: (n,) fs, at least two different ones.
        energies: (n,) in any unit, which is that of the result.
    """
    centred = times - times.mean()
    return float(1e3 * (centred @ energies) / (centred @ centred))


def run_nve(
    model: Potential | Path | str | Calculator,
    atoms: Atoms,
    *,
    temperature: float = 300.0,
    timestep: float = 0.5,
    picoseconds: float = 1.0,
    seed: int = 0,
    relax_steps: int = 100,
) -> NveResult:
    """Run dynamics at constant energy with velocity Verlet.

    Starts from a short relaxation, with momenta drawn from the Maxwell-Boltzmann distribution, without translation and (for
    molecules) rotation, scaled to the exact kinetic energy. Half of the kinetic energy at a minimum flows into potential
    energy, so a relaxed start gets twice the temperature, and `temperature` is what the trajectory then has on average.

    Args:
        model: What `So3kratesCalculator` takes (computed in float64 on the CPU then), or any ASE calculator.
        atoms: Structure; it is copied.
        temperature: K.
        timestep: fs.
        picoseconds: Length of the trajectory.
        seed: Of the momenta.
        relax_steps: At most so many steps of relaxation; 0: start as it is, with momenta at `temperature`.

    Raises:
        ConfigError: Temperature, time step or length is not a positive number, or the length is less than two steps.
        DataError: The model cannot be used for this structure, or the dynamics exploded.
    """
    for name, value in (("temperature", temperature), ("timestep", timestep), ("picoseconds", picoseconds)):
        if not (np.isfinite(value) and value > 0):
            raise ConfigError(name, "be a positive number", value, "Change the value")
    num_steps = round(1e3 * picoseconds / timestep)
    if num_steps < 2:
        raise ConfigError("picoseconds", "be at least two time steps", picoseconds, "Run longer")
    atoms = atoms.copy()
    atoms.calc = model if isinstance(model, Calculator) else So3kratesCalculator(model, dtype="float64")
    if relax_steps:
        BFGS(atoms, logfile=None).run(fmax=RELAXED_FORCE, steps=relax_steps)
    draw_momenta(atoms, 2 * temperature if relax_steps else temperature, seed)
    return _integrate(atoms, timestep, num_steps)


def _integrate(atoms: Atoms, timestep: float, num_steps: int) -> NveResult:
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs)
    energies: list[tuple[float, float]] = []
    frames: list[Atoms] = []
    interval = max(1, round(FRAME_INTERVAL_FS / timestep))

    def record() -> None:
        if len(energies) % interval == 0:
            frames.append(_copy_frame(atoms))
        energies.append((atoms.get_potential_energy(), atoms.get_kinetic_energy()))

    dynamics.attach(record, interval=1)
    start = time.perf_counter()
    dynamics.run(num_steps)
    seconds = time.perf_counter() - start
    potential, kinetic = np.array(energies).T
    degrees = max(count_degrees_of_freedom(atoms), 1)
    return NveResult(
        times=timestep * np.arange(num_steps + 1.0),
        potential_energies=potential,
        kinetic_energies=kinetic,
        temperatures=2 * kinetic / (degrees * BOLTZMANN_EV_PER_K),
        num_atoms=len(atoms),
        timestep=timestep,
        milliseconds_per_step=1e3 * seconds / num_steps,
        frames=tuple(frames),
    )


def _copy_frame(atoms: Atoms) -> Atoms:
    frame = atoms.copy()
    frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    return frame


def count_degrees_of_freedom(atoms: Atoms) -> int:
    """Return 3N less three translations, and less the rotations of what is not periodic (three, two if linear, none of an atom)."""
    rotations = 0
    if not atoms.pbc.any():
        centred = atoms.positions - atoms.positions.mean(0)
        rotations = (0, 2, 3, 3)[np.linalg.matrix_rank(centred, tol=1e-3)]
    return 3 * len(atoms) - 3 - rotations


def draw_momenta(atoms: Atoms, temperature: float, seed: int) -> None:
    """Give the atoms momenta from the Maxwell-Boltzmann distribution, with exactly the kinetic energy of the temperature.

    Args:
        atoms: Structure; its momenta are replaced.
        temperature: K, of the degrees of freedom that `count_degrees_of_freedom` counts.
        seed: Of the random numbers.
    """
    normal = np.random.default_rng(seed).standard_normal((len(atoms), 3))
    thermal_energy = temperature * BOLTZMANN_EV_PER_K
    masses = atoms.get_masses()[:, None]
    momenta = normal * np.sqrt(masses * thermal_energy)
    atoms.set_momenta(momenta - masses * momenta.sum(0) / masses.sum())
    if not atoms.pbc.any():
        _stop_rotation(atoms)
    kinetic = atoms.get_kinetic_energy()
    wanted = count_degrees_of_freedom(atoms) * thermal_energy / 2
    atoms.set_momenta(atoms.get_momenta() * (np.sqrt(wanted / kinetic) if kinetic > 0 else 0.0))


def _stop_rotation(atoms: Atoms) -> None:
    """Take away the rigid rotation; the pseudo-inverse leaves out the axis of what is linear (ASE divides by zero there)."""
    masses = atoms.get_masses()[:, None]
    arms = atoms.positions - atoms.get_center_of_mass()
    inertia = np.sum(masses * arms**2) * np.eye(3) - arms.T @ (masses * arms)
    angular_velocity = np.linalg.pinv(inertia, rcond=1e-8, hermitian=True) @ atoms.get_angular_momentum()
    atoms.set_momenta(atoms.get_momenta() - masses * np.cross(angular_velocity, arms))


# ----------------------------------------------------------------------------------------------------------------- the files


def write_nve(result: NveResult, folder: Path, title: str, facts: dict[str, Any] | None = None) -> None:
    """Write `nve.json`, `nve.png` and `trajectory.xyz` (extended XYZ, readable by ASE and OVITO).

    Args:
        result: The trajectory.
        folder: Made where it does not exist; older files of these names are replaced once all new ones are whole.
        title: Above the picture.
        facts: More entries for `nve.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"version": __version__, **(facts or {}), **result.to_json()}
    names = ("trajectory.xyz", "nve.png", "nve.json")
    new = {name: folder / f".{name}.tmp" for name in names}
    new["nve.json"].write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ase.io.write(new["trajectory.xyz"], list(result.frames), format="extxyz")
    _plot_nve(result, new["nve.png"], title)
    for name in names:
        new[name].replace(folder / name)


def _plot_nve(result: NveResult, path: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blue, vermillion, grey = "#0072B2", "#D55E00", "#7F7F7F"  # Okabe and Ito: told apart with any colour vision
    figure = Figure(figsize=(7.0, 5.0), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    times = result.times / 1e3
    line = result.total_energies.mean() + result.drift * (times - times.mean())
    upper.plot(times, result.total_energies, color=blue, linewidth=0.7, label="total energy")
    upper.plot(times, line, color=vermillion, label=f"drift {result.drift:+.2g} meV/atom per ps")
    upper.set_ylabel("total energy (meV/atom)")
    upper.set_title(title, fontsize=10, loc="left")
    upper.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8)  # hides no curve
    lower.plot(times, result.temperatures, color=grey, linewidth=0.7)
    mean = float(result.temperatures.mean())
    lower.axhline(mean, color=vermillion, linewidth=1.0, label=f"mean {mean:.0f} K")
    lower.set(xlabel="time (ps)", ylabel="temperature (K)", xlim=(0, times[-1]))
    lower.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    figure.savefig(path, format="png")


# ------------------------------------------------------------------------------------------------------------------ the verb


def find_conformer(dataset: Path, molecule: str | None) -> Graph:
    """Return the first conformer of a molecule in a data set: of its test split where it has one there.

    Args:
        dataset: Data set folder.
        molecule: Name of the group; None: ethanol where there is some, else the first group.

    Raises:
        DataError: The data set has no such group.
    """
    manifest = load_manifest(dataset)
    known = sorted(manifest.groups)
    if molecule is None:
        molecule = DEFAULT_MOLECULE if DEFAULT_MOLECULE in known else known[0]
    if molecule not in known:
        listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise DataError(str(dataset), f"have conformers of `{molecule}`", listed, "Name one of these with --molecule")
    graphs = (g for split in reversed(SPLITS) for g in iter_graphs(dataset, manifest, split))
    found = next((g for g in graphs if g.group == molecule), None)
    if found is None:
        remedy = "Make the data set again"
        raise DataError(str(dataset), f"hold the conformers of `{molecule}` that its manifest lists", "none", remedy)
    return found


def make_atoms(graph: Graph) -> Atoms:
    """Return a conformer as ASE atoms, its charge and number of unpaired electrons in `info`."""
    return Atoms(
        numbers=graph.atomic_numbers,
        positions=np.asarray(graph.positions, np.float64),
        cell=graph.cell,
        pbc=graph.pbc,
        info={"charge": int(graph.total_charge), "spin": int(graph.num_unpaired_electrons)},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `so3krates md`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--molecule", metavar="NAME", help="start from a conformer of this group of the run's data")
    start.add_argument("--structure", metavar="FILE", type=Path, help="start from a file that ASE reads")
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="where the results go (default: RUN/dynamics; for another molecule or other settings a folder in it)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, help="K (default: %(default)s)")
    parser.add_argument("--timestep", type=float, help="fs (default: %(default)s)")
    parser.add_argument("--picoseconds", type=float, help="length (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the momenta (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where to compute (default: cpu)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="precision (default: %(default)s)")
    parser.set_defaults(**DEFAULTS)


def choose_folder(arguments: argparse.Namespace, name: str) -> Path:
    """Return where results go: nothing that another molecule or other settings gave is replaced.

    Args:
        arguments: Of the verb.
        name: Of the structure.
    """
    if arguments.out is not None:
        return Path(arguments.out)
    texts = {"temperature": "{:g}K", "timestep": "{:g}fs", "picoseconds": "{:g}ps", "seed": "seed{}", "dtype": "{}"}
    given = vars(arguments)
    parts = [text.format(given[key]) for key, text in texts.items() if given[key] != DEFAULTS[key]]
    is_default = arguments.structure is None and (arguments.molecule is None or name == DEFAULT_MOLECULE)
    folder = Path(arguments.run_folder) / "dynamics"
    return folder if is_default and not parts else folder / re.sub(r"[^\w+.-]", "_", "-".join([name, *parts]))


def run(arguments: argparse.Namespace) -> int:
    """Run the dynamics, print a table, return the exit code."""
    folder: Path = arguments.run_folder
    atoms, name = _read_start(folder, arguments)
    device = choose_device(arguments.device, Rank())
    tune_machine(1 if len(atoms) <= MAX_ATOMS_ONE_THREAD else len(os.sched_getaffinity(0)), device)
    calculator = So3kratesCalculator(folder, device=device, dtype=arguments.dtype)
    out = choose_folder(arguments, name)
    make_folder(out)
    result = run_nve(
        calculator,
        atoms,
        temperature=arguments.temperature,
        timestep=arguments.timestep,
        picoseconds=arguments.picoseconds,
        seed=arguments.seed,
    )
    facts = {"structure": name, "temperature_kelvin": arguments.temperature, "seed": arguments.seed}
    title = f"{name}: NVE, {arguments.temperature:g} K, {arguments.timestep:g} fs"
    write_nve(result, out, title, facts | {"dtype": arguments.dtype, "device": str(device)})
    rows = (
        ("energy drift (meV/atom per ps)", f"{result.drift:+.4f}"),
        ("energy fluctuation (meV/atom)", f"{result.fluctuation:.4f}"),
        ("mean temperature (K)", f"{result.temperatures.mean():.0f}"),
        ("length (ps)", f"{result.times[-1] / 1e3:g}"),
        ("time per step (ms)", f"{result.milliseconds_per_step:.2f}"),
    )
    print_table(title, ("", "value"), rows)
    print(f"written to {out}")
    return 0


def _read_start(folder: Path, arguments: argparse.Namespace) -> tuple[Atoms, str]:
    if arguments.structure is not None:
        path: Path = arguments.structure
        try:
            atoms = ase.io.read(path)
        except Exception as error:  # ASE's readers raise what their parsers happen to raise
            got = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise DataError(str(path), "be a structure file that ASE reads", got, "Give an .xyz file") from error
        assert isinstance(atoms, Atoms)
        return atoms, path.stem
    config = folder / "config.yaml"
    if not config.is_file():
        raise CheckpointError(
            str(folder), "be a run folder with config.yaml", "none", "Give a run folder, or a start with --structure"
        )
    graph = find_conformer(Path(read_config(config).data.folder), arguments.molecule)
    return make_atoms(graph), graph.group or "structure"
