"""Do non-local effects get through? Energy against the dihedral of cumulenes H2C(=C)nCH2 that are longer than a local model sees.

    OMP_NUM_THREADS=1 python tests/benchmarks/cumulene.py OUT [--jobs 2] [section.key=value ...]

Makes GFN2-xTB data of several lengths (OUT/data), trains So3krates with local and with non-local attention at otherwise equal
settings (OUT/runs, `so3krates train run=cumulene`, one thread each), turns one end of the undistorted chains and writes curves,
errors and what the ends know of each other before training (OUT/cumulene.json) and a picture (OUT/cumulene.png). What is there
already is not made again, and an interrupted training goes on. Results: cumulene.md.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.optimize import BFGS

from data_tools.dataset import describe_versions, write_dataset
from data_tools.xtb import METHOD, Labeller, compute_isolated_atoms
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import FloatArray, Graph, collate
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import load_model
from so3krates_dist.model.spherical import SphericalHarmonics
from so3krates_dist.train.evaluate import evaluate_run

DATASETS: Final[dict[str, tuple[int, ...]]] = {"even": (6, 8, 10), "odd": (7, 9, 11), "mixed": (8, 9, 10, 11)}
"""Carbon atoms of the chains that are trained on: even chains are planar at rest, odd ones twisted by 90 degrees"""
HELD_OUT: Final[dict[str, tuple[int, ...]]] = {"even": (12,), "odd": (13,), "mixed": ()}
"""Carbon atoms of chains that are only looked at"""
VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "local": ("model.non_local=false",),
    "non_local": ("model.non_local=true",),
    "fixed_cutoff": ("model.non_local=true", "model.sphc_cutoff=0.2"),
}
RUNS: Final = (
    "even/local", "odd/local", "even/non_local", "odd/non_local", "even/fixed_cutoff", "odd/fixed_cutoff",
    "mixed/non_local", "mixed/fixed_cutoff",
)  # fmt: skip
"""Data set and variant of each training"""
PICTURED: Final = (("even", 10), ("odd", 11), ("even", 12))
SAMPLES_PER_LENGTH: Final = 300
SPLIT: Final = "0.8,0.1,0.1"
NOISE: Final = 0.02
"""Å, standard deviation of every coordinate"""
ELECTRONIC_TEMPERATURE: Final = 2000.0
"""K; at 300 K the closed shell has a cusp where twisting makes the frontier orbitals cross"""
ANGLES: Final = np.linspace(0.0, 180.0, 37)
"""Degrees between the planes of the two CH2"""
SEED: Final = 0


# ------------------------------------------------------------------------------------------------------------- molecules


def build_chain(num_carbons: int) -> Graph:
    """Return an idealised chain along z with its ends in one plane: carbons first, then two hydrogens of each end."""
    z = 1.28 * np.arange(num_carbons)
    hydrogens = [[x, 0.0, at] for at in (z[0] - 0.55, z[-1] + 0.55) for x in (0.93, -0.93)]
    carbons = np.stack([0 * z, 0 * z, z], 1)
    numbers = np.array([6] * num_carbons + [1] * 4, np.int64)
    return Graph(
        atomic_numbers=numbers, positions=np.concatenate([carbons, hydrogens]), group=f"C{num_carbons}H4"
    )  # fmt: skip


def turn(chain: Graph, degrees: float, *, first: bool = False) -> Graph:
    """Return the chain with the hydrogens of its last (or first) CH2 turned about z."""
    angle = np.radians(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    positions = chain.positions.copy()
    moved = slice(-4, -2) if first else slice(-2, None)
    positions[moved] = positions[moved] @ rotation.T
    return dataclasses.replace(chain, positions=positions)


class _Xtb(Calculator):  # type: ignore[misc] # ASE has no complete type information
    """Labels as ASE's optimiser wants them."""

    implemented_properties: Final = ["energy", "forces"]

    def calculate(
        self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:  # fmt: skip
        super().calculate(atoms, properties, system_changes)
        labels = build_labeller(self.atoms.numbers).label(np.asarray(self.atoms.positions, np.float64))
        self.results = {"energy": labels.energy, "forces": labels.forces}


def build_labeller(atomic_numbers: np.ndarray) -> Labeller:
    """Return GFN2-xTB, closed shell, with the benchmark's electronic temperature."""
    return Labeller(atomic_numbers, 0.0, 0.0, ELECTRONIC_TEMPERATURE)


def relax_chain(num_carbons: int) -> Graph:
    """Return the relaxed chain, turned so that its ends lie in one plane: planar is the minimum of even chains only."""
    least = 0.0 if num_carbons % 2 == 0 else 90.0
    chain = turn(build_chain(num_carbons), least)
    atoms = ase.Atoms(chain.atomic_numbers, chain.positions, calculator=_Xtb())
    assert BFGS(atoms, logfile=None).run(fmax=0.005, steps=200), f"{chain.group} did not relax"
    positions = atoms.positions - atoms.positions[0]
    positions[:num_carbons, :2] = 0.0  # on the axis, as symmetry has it
    chain = dataclasses.replace(chain, positions=positions)
    return turn(chain, -least)


def make_data(folder: Path, lengths: Sequence[int]) -> None:
    """Write one data set: rigid rotation of one end to evenly spread angles, and noise on all coordinates."""
    graphs = []
    for num_carbons in lengths:
        generator = np.random.default_rng((SEED, num_carbons))
        chain = relax_chain(num_carbons)
        labeller = build_labeller(chain.atomic_numbers)
        for angle in 180.0 * (np.arange(SAMPLES_PER_LENGTH) + 0.5) / SAMPLES_PER_LENGTH:
            moved = turn(chain, angle).positions + NOISE * generator.standard_normal(chain.positions.shape)
            stored = moved.astype(np.float32).astype(np.float64)  # labels belong to the positions that are written
            labels = labeller.label(stored)
            graphs.append(
                Graph(
                    atomic_numbers=chain.atomic_numbers, positions=stored, group=chain.group,
                    energy=labels.energy, forces=labels.forces,
                )
            )  # fmt: skip
    write_dataset(
        folder, graphs, name=f"cumulenes-{folder.name}", level_of_theory=f"{METHOD}, electrons at {ELECTRONIC_TEMPERATURE:g} K",
        licence="unknown", split=SPLIT, seed=SEED, isolated_atom_energies=compute_isolated_atoms((1, 6)),
        provenance={
            "tool": "tests/benchmarks/cumulene.py", "noise_angstrom": NOISE, "versions": describe_versions("tblite"),
        },
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- training


def train(out: Path, run: str, settings: Sequence[str]) -> float:
    """Train one model with the project's own command, one thread; returns the seconds it took."""
    dataset, variant = run.split("/")
    folder = out / "runs" / run
    words = [f"data.folder={out / 'data' / dataset}", f"run.folder={folder}", *VARIANTS[variant], *settings]
    program = Path(sys.executable).parent / "so3krates"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with folder.with_suffix(".txt").open("a") as log:
        command = [str(program), "train", "run=cumulene", "run.threads=1", *words]
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------- curves


def compute_all(potential: Potential, chains: Sequence[Graph]) -> FloatArray:
    """Return the model's energies (eV) in float64."""
    batch = collate([build_neighbors(chain, *potential.cutoffs) for chain in chains], torch.float64)
    return np.asarray(potential(batch)["energy"])


def label_all(chains: Sequence[Graph]) -> FloatArray:
    """Return GFN2-xTB's energies (eV)."""
    labeller = build_labeller(chains[0].atomic_numbers)
    return np.array([labeller.label(np.asarray(chain.positions, np.float64)).energy for chain in chains])


def compare_curves(curve: FloatArray, labels: FloatArray) -> dict[str, float]:
    """Return how a curve follows the labels, each taken from its mean."""
    off, wanted = curve - curve.mean(), labels - labels.mean()
    return {
        "range": float(np.ptp(curve)),
        "rmse": float(np.sqrt(np.mean((off - wanted) ** 2))),
        "slope": float(off @ wanted / (wanted @ wanted)),
    }


def couple_ends(compute: Callable[[Sequence[Graph]], FloatArray], chain: Graph) -> float:
    """Return |E(a, b) - E(a, 0) - E(0, b) + E(0, 0)| in eV for turns a and b of the two ends of a distorted chain.

    Zero where no term of the energy depends on both ends, whatever the distortion does to each.
    """
    noise = 0.05 * np.random.default_rng(SEED).standard_normal(chain.positions.shape)
    chain = dataclasses.replace(chain, positions=chain.positions + noise)
    energies = compute([turn(turn(chain, b), a, first=True) for a in (0.0, 40.0) for b in (0.0, 70.0)])
    return abs(float(energies[0] - energies[1] - energies[2] + energies[3]))


def evaluate(out: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the errors of all runs on their test splits, and the curves of all chains, in eV."""
    numbers = sorted({n for name in DATASETS for n in (*DATASETS[name], *HELD_OUT[name])})
    chains = {n: relax_chain(n) for n in numbers}
    labels = {n: label_all([turn(chain, angle) for angle in ANGLES]) for n, chain in chains.items()}
    result: dict[str, Any] = {
        "angles": ANGLES.tolist(),
        "labels": {n: (e - e.mean()).tolist() for n, e in labels.items()},
        "span": {n: span_ends(chain) for n, chain in chains.items()},
        "coupling": {n: couple_ends(label_all, chain) for n, chain in chains.items()},
        "first_layer": {n: analyse(chains[n], (1, 2, 3), 2.2) for n in (10, 11)},
        "runs": {},
    }
    for run in RUNS:
        dataset = run.split("/")[0]
        own = (*DATASETS[dataset], *HELD_OUT[dataset])
        potential = load_model(out / "runs" / run, dtype=torch.float64)
        compute = functools.partial(compute_all, potential)
        curves = {n: compute([turn(chains[n], angle) for angle in ANGLES]) for n in own}
        result["runs"][run] = {
            "num_weights": sum(p.numel() for p in potential.parameters()),
            "seconds": seconds[run],
            "test": evaluate_run(out / "runs" / run).to_json(),
            "curves": {n: (e - e.mean()).tolist() for n, e in curves.items()},
            "follows": {n: compare_curves(e, labels[n]) for n, e in curves.items()},
            "coupling": {n: couple_ends(compute, chains[n]) for n in own},
        }
    return result


def span_ends(chain: Graph) -> float:
    """Return the shortest distance (Å) between hydrogens of the two ends, over all angles."""
    ends = [turn(chain, angle).positions[-4:] for angle in ANGLES]
    return float(min(np.linalg.norm(e[:2, None] - e[None, 2:], axis=-1).min() for e in ends))


# -------------------------------------------------------------------------------------- what the ends know of each other


def analyse(chain: Graph, degrees: Sequence[int], cutoff: float) -> list[dict[str, Any]]:
    """Return for some angles how the first layer's spherical neighbourhood sees the two ends (arXiv 2205.14276, section 3).

    Args:
        chain: With its ends in one plane.
        degrees: Of the SPHC.
        cutoff: Å, cosine.

    Returns:
        For each angle and kind of pair of atoms of both ends the SPHC distance of each degree, the whole one, and the softmax
        times the number of atoms, which is below one for pairs inside.
    """
    rows = []
    last = chain.num_atoms
    first_carbon, last_carbon = 0, last - 5
    pairs = {
        "C C": (first_carbon, last_carbon), "C H": (first_carbon, last - 2), "H C": (last - 2, first_carbon),
        "H H": (last - 4, last - 2), "H H'": (last - 4, last - 1), "C2 C2": (1, last - 6),
    }  # fmt: skip
    for angle in (0.0, 30.0, 45.0, 60.0, 90.0):
        sphc, degree_of = _compute_initial_sphc(turn(chain, angle), degrees, cutoff)
        squares = (sphc[:, None] - sphc[None]).square()
        distances = squares.sum(-1).sqrt()
        softmax = torch.softmax(distances.masked_fill(torch.eye(last, dtype=torch.bool), -torch.inf), 1)
        for name, (i, j) in pairs.items():
            by_degree = [float(squares[i, j][degree_of == d].sum().sqrt()) for d in degrees]
            rows.append(
                {
                    "angle": angle, "pair": name, "by_degree": by_degree, "distance": float(distances[i, j]),
                    "softmax_times_atoms": float(softmax[i, j] * last),
                }
            )  # fmt: skip
    return rows


def _compute_initial_sphc(graph: Graph, degrees: Sequence[int], cutoff: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean harmonics of each atom's neighbours (equation 7), and the degree of each component."""
    positions = torch.tensor(graph.positions)
    vectors = positions[:, None] - positions[None]
    lengths = vectors.norm(dim=-1)
    inside = (lengths > 0) & (lengths < cutoff)
    envelope = torch.where(inside, 0.5 * (1 + torch.cos(torch.pi * lengths / cutoff)), 0.0)
    units = vectors / torch.where(lengths > 0, lengths, 1.0)[..., None]
    harmonics = SphericalHarmonics(degrees).double()(units.flatten(0, 1)).unflatten(0, lengths.shape)
    sphc = (envelope[..., None] * harmonics).sum(1) / envelope.sum(1, keepdim=True)
    return sphc, torch.repeat_interleave(torch.tensor(degrees), torch.tensor([2 * d + 1 for d in degrees]))


# --------------------------------------------------------------------------------------------------------------- picture


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the curves of three chains."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {
        "local": ("#D55E00", "-", "So3krates, local"),
        "non_local": ("#56B4E9", "-", "non-local, cutoff 1/n"),
        "fixed_cutoff": ("#0072B2", "--", "non-local, cutoff 0.2"),
    }
    figure = Figure(figsize=(9.6, 3.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, (dataset, number) in zip(figure.subplots(1, len(PICTURED)), PICTURED, strict=True):
        n = str(number)
        axes.plot(result["angles"], result["labels"][n], "o", color="#7F7F7F", markersize=4, label="GFN2-xTB")
        for name, (color, style, text) in styles.items():
            curve = result["runs"][f"{dataset}/{name}"]["curves"][n]
            axes.plot(result["angles"], curve, style, color=color, linewidth=1.8, label=text)
        unseen = ", not trained on" if number in HELD_OUT[dataset] else ""
        axes.set_title(f"{number} carbons, {result['span'][n]:.1f} Å{unseen}", fontsize=10)
        axes.set(xlabel="dihedral of the ends (degrees)", xticks=(0, 45, 90, 135, 180))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    figure.axes[0].set_ylabel("energy less its mean (eV)")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------------------------ main


def report(result: Mapping[str, Any]) -> None:
    """Print the figures of all runs as tables."""
    print("| run | seconds | test: force MAE, meV/Å | energy MAE, meV/atom |\n|---|---|---|---|")
    for name, run in result["runs"].items():
        errors = run["test"]["summary"]
        forces, energy = 1e3 * errors["forces_mae"], 1e3 * errors["energy_mae_per_atom"]
        print(f"| {name} | {run['seconds']:.0f} | {forces:.1f} | {energy:.2f} |")
    print("\n| run | chain | range, eV (GFN2) | RMSE, meV | slope | coupling, eV (GFN2) |\n|---|---|---|---|---|---|")
    for name, run in result["runs"].items():
        for n, follows in run["follows"].items():
            unseen = " (not trained on)" if int(n) in HELD_OUT[name.split("/")[0]] else ""
            spans = f"{follows['range']:.2g} ({float(np.ptp(result['labels'][n])):.3f})"
            coupling = f"{run['coupling'][n]:.1g} ({result['coupling'][n]:.2f})"
            figures = f"{1e3 * follows['rmse']:.1f} | {follows['slope']:.3f}"
            print(f"| {name} | C{n}{unseen} | {spans} | {figures} | {coupling} |")


def main() -> None:
    """Make data, train, evaluate, draw; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (%(default)s)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    out, start = arguments.out, time.perf_counter()
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, lengths in DATASETS.items():
        if not (out / "data" / name).exists():
            make_data(out / "data" / name, lengths)
    print(f"data: {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seconds = dict(zip(RUNS, pool.map(lambda run: train(out, run, arguments.settings), RUNS), strict=True))
    print(f"training: {time.perf_counter() - start:.0f} s", flush=True)
    result = json.loads(json.dumps(evaluate(out, seconds)))  # numbers as keys become text
    (out / "cumulene.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, out / "cumulene.png")
    report(result)


if __name__ == "__main__":
    main()
