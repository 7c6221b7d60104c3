"""`so3krates inspect`: what is in a data set, as text and, on request, as a picture or a report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools import drawing, gate, quarantine, report, survey
from data_tools.console import print_table, say
from so3krates_dist.data import loss_weights, shards
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, FloatArray, Graph

_MAX_PICTURE_CONFORMERS: Final = 2000
_MAX_GROUPS: Final = 40
_PICTURE_CUTOFF: Final = 6.0
"""Å, of the distances in the picture"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `so3krates inspect`."""
    parser.add_argument("folder", type=Path, help="data set")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="PNG with histograms of energies, forces, distances"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help=".html (one file with pictures inside) or .png: all there is to see"
    )
    parser.add_argument(
        "--max-conformers", type=int, default=report.DEFAULT_LIMIT, metavar="N",
        help="read about so many for the report, in evenly spaced blocks (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="read all conformers for the report")


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a data set; returns the exit code."""
    if arguments.max_conformers < 1:
        raise DataError("--max-conformers", "be at least 1", arguments.max_conformers, "Give one like 20000")
    if arguments.report is not None:
        report.check_target(arguments.report)
    manifest = shards.check_dataset(arguments.folder)
    print_report(manifest)
    say_quarantine(arguments.folder)
    if arguments.picture is not None:
        draw_picture(arguments.folder, manifest, arguments.picture)
        say(f"picture: {arguments.picture}")
    if arguments.report is not None:
        limit = None if arguments.all else arguments.max_conformers
        seen = report.write_report(arguments.folder, arguments.report, limit=limit)
        say(f"report of {seen.num_read} of {seen.num_conformers} conformers: {arguments.report}")
    return 0


def say_quarantine(folder: Path) -> None:
    """Print how many structures were left out when the data set was made, and why."""
    path = folder / quarantine.QUARANTINE_NAME
    if path.is_file() and (counts := quarantine.count_reasons(quarantine.iter_quarantine(path))):
        reasons = ", ".join(f"{number} for {reason}" for reason, number in counts.most_common())
        say(f"in quarantine: {sum(counts.values())} ({reasons}), see {path}")


def print_report(manifest: shards.Manifest) -> None:
    """Print what the manifest says."""
    say(f"{manifest.name}: {manifest.level_of_theory}, licence {manifest.licence}, fingerprint {manifest.fingerprint}")
    total = sum(s.num_conformers for s in manifest.shards)
    counts = {label: sum(part.get(label, 0) for part in manifest.label_counts.values()) for label in manifest.labels}
    labels = [label if counts[label] in (0, total) else f"{label} ({counts[label]} of {total})" for label in counts]
    say(f"labels: {', '.join(labels)}; made by {manifest.provenance.get('tool', 'unknown')}")
    rows = [
        (split, manifest.num_conformers(split), len(files), sum(f.num_blocks for f in files), _megabytes(files))
        for split in shards.SPLITS
        if (files := manifest.of_split(split))
    ]
    print_table("splits", ["split", "conformers", "shards", "blocks", "MB"], rows)
    ranked = sorted(manifest.groups.items(), key=lambda item: (-item[1], item[0]))
    print_table("groups", ["group", "conformers"], ranked[:_MAX_GROUPS])
    if len(ranked) > _MAX_GROUPS:
        say(f"  and {len(ranked) - _MAX_GROUPS} more groups")
    _print_statistics(manifest.statistics)
    counts = {split: manifest.num_conformers(split) for split in shards.SPLITS}
    if weights := loss_weights.describe(manifest.loss_weights, counts):
        say(weights)
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
    with shards.open_dataset(folder, manifest=manifest) as dataset:
        blocks = survey.choose_blocks(dataset, _MAX_PICTURE_CONFORMERS, ["train"])
        placed = list(survey.iter_placed(dataset, blocks))
    graphs = [p.graph for p in placed if gate.find_problem(p.graph, np.inf) is None]  # `validate` names the others
    baselines = manifest.statistics.get("energy_baselines", {})
    residuals = np.array([r for g in graphs if (r := gate.compute_residual(g, baselines)) is not None])
    forces = [np.linalg.norm(g.forces, axis=1) for g in graphs if g.forces is not None]
    panels = [
        ("energy less baselines (meV/atom)", 1000 * residuals),
        ("force on an atom (eV/Å)", np.concatenate(forces) if forces else np.zeros(0)),
        ("distance of two atoms (Å)", np.concatenate([np.zeros(0), *map(_compute_distances, graphs)])),
    ]
    figure = drawing.make_figure(12, 3.5)
    for axes, (label, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.hist(values, bins=80, color="tab:blue")
        axes.set_xlabel(label)
        axes.set_yticks([])
    title = drawing.make_plain(
        f"{manifest.name}: {len(graphs)} training conformers, level of theory {manifest.level_of_theory}"
    )
    figure.suptitle(title, parse_math=False)
    drawing.save_figure(figure, path, "Choose another --picture")


def _compute_distances(graph: Graph) -> FloatArray:
    graph = build_neighbors(graph, _PICTURE_CUTOFF)
    vectors = graph.positions[graph.pair_second].astype(np.float64) - graph.positions[graph.pair_first]
    if graph.pair_shifts is not None and graph.cell is not None:
        vectors = vectors + graph.pair_shifts @ graph.cell
    return np.asarray(np.linalg.norm(vectors, axis=1))
