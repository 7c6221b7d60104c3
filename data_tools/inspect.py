"""`so3krates inspect`: what is in a data set, as text and, on request, as a picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools import gate
from data_tools.console import print_table, say
from data_tools.validate import compute_residual
from so3krates_dist.data import shards
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.shards import iter_graphs
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, FloatArray, Graph

_MAX_PICTURE_CONFORMERS: Final = 2000
_PICTURE_CUTOFF: Final = 6.0
"""Å, of the distances in the picture"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates inspect`."""
    parser.add_argument("folder", type=Path, help="data set")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="PNG with histograms of energies, forces, distances"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a data set; returns the exit code."""
    manifest = shards.check_dataset(arguments.folder)
    print_report(manifest)
    if arguments.picture is not None:
        draw_picture(arguments.folder, manifest, arguments.picture)
        say(f"picture: {arguments.picture}")
    return 0


def print_report(manifest: shards.Manifest) -> None:
    """Print what the manifest says."""
    say(f"{manifest.name}: {manifest.level_of_theory}, licence {manifest.licence}, fingerprint {manifest.fingerprint}")
    say(f"labels: {', '.join(manifest.labels)}; made by {manifest.provenance.get('tool', 'unknown')}")
    rows = [
        (split, manifest.num_conformers(split), len(files), sum(len(f.blocks) for f in files), _megabytes(files))
        for split in shards.SPLITS
        if (files := manifest.of_split(split))
    ]
    print_table("splits", ["split", "conformers", "shards", "blocks", "MB"], rows)
    print_table("groups", ["group", "conformers"], list(manifest.groups.items()))
    _print_statistics(manifest.statistics)
    for reason, count in manifest.provenance.get("dropped", {}).items():
        say(f"dropped: {count} for {reason}")


def _megabytes(files: Sequence[shards.ShardEntry]) -> str:
    return f"{sum(f.size for f in files) / 1e6:.2f}"


def _print_statistics(statistics: Any) -> None:
    isolated = statistics["isolated_atom_energies"] or {}
    force_rms = statistics["force_rms_per_element"] or {}
    rows = [
        (
            ELEMENT_SYMBOLS[z],
            statistics["element_counts"][str(z)],
            f"{statistics['energy_baselines'][str(z)]:.4f}",
            f"{isolated[str(z)]:.4f}" if str(z) in isolated else "-",
            f"{force_rms[str(z)]:.3f}" if str(z) in force_rms else "-",
        )
        for z in statistics["elements"]
    ]
    print_table("training split", ["element", "atoms", "baseline eV", "isolated atom eV", "force RMS eV/Å"], rows)
    atoms = statistics["num_atoms"]
    say(f"atoms per conformer: {atoms['min']} to {atoms['max']}, mean {atoms['mean']:.1f}")
    if statistics["energy_residual_std_per_atom"] is not None:
        say(f"energies less baselines: standard deviation {statistics['energy_residual_std_per_atom']:.4f} eV/atom")
    if statistics["force_rms"] is not None:
        say(f"forces: RMS {statistics['force_rms']:.3f}, largest {statistics['max_force']:.3f} eV/Å")
    neighbors = ", ".join(f"{statistics['mean_neighbors'][r]:.1f} at {r} Å" for r in ("4.0", "5.0", "6.0"))
    charges = ", ".join(f"{q} e: {n}" for q, n in statistics["total_charges"].items())
    say(f"mean neighbours: {neighbors}; charges: {charges}")


def draw_picture(folder: Path, manifest: shards.Manifest, path: Path) -> None:
    """Draw histograms of the training split: energies less baselines, force norms, pair distances.

    Args:
        folder: Data set.
        manifest: Of that data set.
        path: PNG to write.

    Raises:
        DataError: The picture cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = zip(range(_MAX_PICTURE_CONFORMERS), iter_graphs(folder, manifest, "train"), strict=False)
    graphs = [g for _, g in first if gate.find_problem(g, np.inf) is None]  # `validate` names the others
    residuals = np.array([r for g in graphs if (r := compute_residual(g, manifest)) is not None])
    forces = [np.linalg.norm(g.forces, axis=1) for g in graphs if g.forces is not None]
    panels = [
        ("energy less baselines (meV/atom)", 1000 * residuals),
        ("force on an atom (eV/Å)", np.concatenate(forces) if forces else np.zeros(0)),
        ("distance of two atoms (Å)", np.concatenate([np.zeros(0), *map(_compute_distances, graphs)])),
    ]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.hist(values, bins=80, color="tab:blue")
        axes.set_xlabel(label)
        axes.set_yticks([])
    figure.suptitle(f"{manifest.name}: {len(graphs)} training conformers, {manifest.level_of_theory}")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DataError(str(path), "be writable", error.strerror, "Choose another --picture") from error


def _compute_distances(graph: Graph) -> FloatArray:
    graph = build_neighbors(graph, _PICTURE_CUTOFF)
    vectors = graph.positions[graph.pair_second].astype(np.float64) - graph.positions[graph.pair_first]
    if graph.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + graph.pair_shifts @ graph.cell
    return np.asarray(np.linalg.norm(vectors, axis=1))
