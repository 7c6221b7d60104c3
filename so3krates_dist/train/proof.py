"""What the arithmetic of a run costs: forces against float64 on a few conformers that stay the same, net force, rotations.

float64 shows what the weights mean; the difference to what training computes with them is its rounding. The conformers are chosen
once in a run, without asking the other processes; the figures are computed by one process alone.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch

from so3krates_dist.config import TrainSection
from so3krates_dist.data.mixture import Mixture, Source
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import matmul_precision
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import Potential
from so3krates_dist.model.registry import change_model

MAX_CONFORMERS: Final = 4
MAX_ATOMS: Final = 200
"""in all of the fixed conformers, unless the smallest one alone has more"""
_LOOKED_AT: Final = 64
"""conformers of each data set among which the fixed ones are chosen: they are in its first block or blocks"""
_AXIS_ANGLE: Final = (0.9, -1.3, 0.7)
"""of the rotation that forces must follow, as an axis times an angle in radians; no symmetry of any structure"""


def choose_fixed_graphs(mixture: Mixture, cutoffs: tuple[float, float]) -> list[Graph]:
    """Choose a few conformers that stay the same for the whole run: of the validation split, where there is none of training.

    Of each kind (data set, periodic or not, charge, unpaired electrons, group) one is taken before another one of the same kind.
    The result is the same on all processes, and involves none of the others.

    Args:
        mixture: Data sets of the run.
        cutoffs: Å, the model's cutoff and reach.

    Returns:
        One to `MAX_CONFORMERS` conformers with their pairs, of `MAX_ATOMS` atoms together or a single one.

    Raises:
        DataError: None of the first conformers can be read.
    """
    split = "validation" if mixture.num_conformers("validation") else "train"
    failures: list[DataError] = []
    found = [list(_look(source, split, failures)) for source in mixture.active]
    kinds: dict[tuple[object, ...], list[Graph]] = {}
    for number, graphs in enumerate(found):
        for graph in graphs:
            kind = (number, graph.is_periodic, graph.total_charge, graph.num_unpaired_electrons, graph.group)
            kinds.setdefault(kind, []).append(graph)
    # The first of each kind, then the second of each, and so on.
    in_turn = [g for row in itertools.zip_longest(*kinds.values()) for g in row if g is not None]
    if not in_turn:
        raise failures[0]
    chosen: list[Graph] = []
    for graph in in_turn:
        if len(chosen) < MAX_CONFORMERS and sum(g.num_atoms for g in chosen) + graph.num_atoms <= MAX_ATOMS:
            chosen.append(graph)
    return [build_neighbors(g, *cutoffs) for g in chosen or [min(in_turn, key=lambda g: g.num_atoms)]]


def _look(source: Source, split: str, failures: list[DataError]) -> Iterator[Graph]:
    """Yield the first conformers of a data set, up to the first block that is damaged: training decides what to do about it."""
    try:
        yield from itertools.islice(source.iter_graphs(split), _LOOKED_AT)
    except DataError as error:
        failures.append(error)


def prove(
    potential: Potential, graphs: Sequence[Graph], section: TrainSection, device: torch.device | str
) -> dict[str, float]:
    """Compare forces and energies as training computes them with those of the same weights in float64.

    The model is copied; it, its hooks and the random numbers are left as they are. Involves none of the other processes.

    Args:
        potential: The model, with whole weights.
        graphs: Conformers with their pairs, from `choose_fixed_graphs`.
        section: Says with what arithmetic is trained.
        device: Where to compute.

    Returns:
        As `compare`.
    """
    device = torch.device(device)
    dtype = torch.float64 if section.precision == "float64" else torch.float32
    exact = change_model(potential, {}, device=device, dtype=torch.float64)
    # In training mode derivatives are differentiable, so torch puts them together from more operations, each with its rounding.
    model = change_model(potential, {}, device=device, dtype=dtype).requires_grad_(True).train()
    model.set_precision(section.precision)
    with matmul_precision(section.precision, device):
        return compare(model, exact, graphs, device)


def compare(
    model: Potential, exact: Potential, graphs: Sequence[Graph], device: torch.device | str
) -> dict[str, float]:
    """Compare two models of the same weights, which are both on a device.

    Args:
        model: In any arithmetic and mode.
        exact: In float64, in evaluation mode.
        graphs: Conformers with their pairs.
        device: Of both.

    Returns:
        `proof_forces_error` eV/Å, root of the mean squared error of components; `proof_forces_relative`, that over the root of the
        mean squared force; `proof_energy_error` eV/atom, likewise; `proof_net_force` eV/Å, the largest component of the sum of a
        structure's forces; `proof_rotation_error` eV/Å, the largest deviation of forces after a rotation from the rotated ones.
    """
    batch, dtype = collate(graphs, torch.float64), next(model.parameters()).dtype
    rotation = torch.linalg.matrix_exp(_build_generator())
    outputs, rotated = (_predict(model, b.to(device, dtype)) for b in (batch, _rotate(batch, rotation)))
    reference = _predict(exact, batch.to(device))
    forces, expected = outputs["forces"], reference["forces"]
    energies = (outputs["energy"] - reference["energy"]) / batch.num_atoms
    net_forces = forces.new_zeros(batch.num_graphs, 3).index_add(0, batch.graph_index, forces)
    error, size = _compute_rms(forces - expected), _compute_rms(expected)
    return {
        "proof_forces_error": error,
        "proof_forces_relative": error / size if size else error,
        "proof_energy_error": _compute_rms(energies),
        "proof_net_force": float(net_forces.abs().max()),
        "proof_rotation_error": float((rotated["forces"] - forces @ rotation.T).abs().max()),
    }


def describe_proof(figures: Mapping[str, float]) -> str:
    """Return a line for the log about what `prove` found."""
    return (
        f"Precision: forces are {1000 * figures['proof_forces_error']:.2g} meV/Å off float64 (RMS;"
        f" {figures['proof_forces_relative']:.1e} of their size), energies {1000 * figures['proof_energy_error']:.2g} meV/atom;"
        f" largest net force {1000 * figures['proof_net_force']:.2g} meV/Å, largest change of forces with a rotation"
        f" {1000 * figures['proof_rotation_error']:.2g} meV/Å"
    )


def _predict(model: Potential, batch: GraphBatch) -> dict[str, torch.Tensor]:
    """Return the outputs in float64 on the CPU."""
    return {name: values.detach().double().cpu() for name, values in model(batch).items()}


def _build_generator() -> torch.Tensor:
    """Return the antisymmetric (3, 3) matrix whose exponential is the rotation."""
    x, y, z = _AXIS_ANGLE
    return torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)


def _rotate(batch: GraphBatch, rotation: torch.Tensor) -> GraphBatch:
    """Return structures turned with their cells; which atoms are neighbours stays the same."""
    cell = None if batch.cell is None else batch.cell @ rotation.T
    return dataclasses.replace(batch, positions=batch.positions @ rotation.T, cell=cell)


def _compute_rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
