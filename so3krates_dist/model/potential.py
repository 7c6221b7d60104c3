"""From per-atom energies to what a force field gives: total energy, conservative forces, stress.

Energies depend on positions and cell through the pair vectors alone, so one derivative by these vectors gives both:
forces are its sums over the pairs of each atom, and stress is its outer product with the vectors (the virial), both exact.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER, GraphBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """What a model takes over from the data it is trained on."""

    elements: tuple[int, ...]
    """atomic numbers in the data"""
    energy_baselines: Mapping[int, float]
    """eV, energy that is subtracted for each atom of an element"""
    energy_scale: float
    """eV, the force RMS times 1 Å (without forces the spread of energies per atom); the network's output is in this unit"""
    mean_neighbors: float
    """mean number of neighbours within the cutoff"""

    @classmethod
    def from_manifest(cls, statistics: Mapping[str, Any], cutoff: float) -> "ModelStatistics":
        """Take what is needed from a data set's manifest.

        Args:
            statistics: `Manifest.statistics`; keys are documented in data/statistics.py.
            cutoff: Å, of the model.

        Raises:
            ConfigError: The cutoff lies outside the distances up to which neighbours were counted.
        """
        counts = sorted((float(k), float(v)) for k, v in statistics["mean_neighbors"].items())
        if not counts[0][0] <= cutoff <= counts[-1][0]:
            rule = f"be from {counts[0][0]:g} to {counts[-1][0]:g} Å, where the data's neighbours are counted"
            raise ConfigError("model.cutoff", rule, cutoff, "Change the value")
        neighbors = float(np.interp(cutoff, [c for c, _ in counts], [n for _, n in counts]))
        # Data without forces have no force RMS; their energies per atom vary on a similar scale.
        scale = statistics["force_rms"] or statistics["energy_residual_std_per_atom"] or 1.0
        return cls(
            elements=tuple(statistics["elements"]),
            energy_baselines={int(z): float(e) for z, e in statistics["energy_baselines"].items()},
            energy_scale=float(scale),
            mean_neighbors=max(neighbors, 1.0),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = dataclasses.asdict(self)
        plain["elements"] = list(self.elements)
        plain["energy_baselines"] = {str(z): e for z, e in self.energy_baselines.items()}
        return plain

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelStatistics":
        """Rebuild from `to_json`.

        Raises:
            ValueError: A value is missing, unknown, of the wrong kind or out of range; the message names it.
        """
        if not isinstance(content, Mapping) or set(content) != set(_READERS):
            raise ValueError(f"statistics has {list(content)}, not {list(_READERS)}")
        values = {}
        for name, read in _READERS.items():
            try:
                values[name] = read(content[name])
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"statistics.{name} is {content[name]!r}") from error
        return cls(**values)


def _read_atomic_number(value: Any) -> int:
    if not 1 <= int(value) <= MAX_ATOMIC_NUMBER:
        raise ValueError(f"{value} is no atomic number")
    return int(value)


def _read_number(value: Any, above: float = -math.inf) -> float:
    if not above < float(value) < math.inf:
        raise ValueError(f"{value} is out of range")
    return float(value)


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "elements": lambda value: tuple(_read_atomic_number(z) for z in value),
    "energy_baselines": lambda value: {_read_atomic_number(z): _read_number(e) for z, e in value.items()},
    "energy_scale": lambda value: _read_number(value, 0),
    "mean_neighbors": lambda value: _read_number(value, 0),
}
"""How each field of `ModelStatistics` is read from a file that may be damaged."""


def check_elements(atomic_numbers: Iterable[int], elements: Iterable[int], where: str) -> None:
    """Raise `DataError` where a structure has an element that the model was not trained on.

    Args:
        atomic_numbers: Of the structure or the data set.
        elements: Of the model.
        where: File or molecule, for the message.
    """
    known = sorted(set(elements))
    unknown = sorted({int(z) for z in atomic_numbers} - set(known))
    if unknown:
        symbols = ", ".join(ELEMENT_SYMBOLS[z] for z in unknown)
        rule = f"have only elements the model was trained on ({', '.join(ELEMENT_SYMBOLS[z] for z in known)})"
        raise DataError(where, rule, symbols, "Take another model, or train one on data with these elements")


class Potential(nn.Module):
    """A potential energy surface: batch in, energy, forces and stress out.

    This is the module that the training engine wraps: forces are taken inside `forward`, because differentiating the
    output of a wrapped module is wrong under ZeRO, at stage 1 without any error.

    Args:
        network: Module with `forward(batch, vectors) -> (num_atoms,)` and `cutoff`.
        statistics: Of the training data.
    """

    energy_baselines: torch.Tensor

    def __init__(self, network: nn.Module, statistics: ModelStatistics) -> None:
        super().__init__()
        self.network = network
        self.statistics = statistics
        baselines = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
        for atomic_number, energy in statistics.energy_baselines.items():
            baselines[atomic_number] = energy
        self.register_buffer("energy_baselines", baselines, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Potential":
        """Keep the baselines in float64 whatever the rest is converted to; they move between devices like the rest."""
        baselines = self.energy_baselines
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.energy_baselines = baselines.to(self.energy_baselines.device)
        return self

    @property
    def cutoff(self) -> float:
        """Distance in Å within which atoms are neighbours."""
        return float(self.network.cutoff)  # type: ignore[arg-type]

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model was trained on."""
        return self.statistics.elements

    def forward(self, batch: GraphBatch, compute_stress: bool = False) -> dict[str, torch.Tensor]:
        """Compute energies and their derivatives.

        Args:
            batch: Structures with neighbour pairs within at least the cutoff.
            compute_stress: Return stress too; nan for structures without a cell.

        Returns:
            `energy` (num_graphs,) eV in float64; `forces` (num_atoms, 3) eV/Å; on request `stress` (num_graphs, 3, 3)
            eV/Å³. In training mode they can be differentiated by the weights, in evaluation mode they are detached.
        """
        with torch.enable_grad():
            vectors = compute_vectors(batch).detach().requires_grad_(True)
            atom_energies = self.network(batch, vectors) * self.statistics.energy_scale
            (gradient,) = torch.autograd.grad(atom_energies.sum(), vectors, create_graph=self.training)
        results = {
            "energy": self._sum_energies(batch, atom_energies),
            "forces": _sum_forces(batch, gradient),
        }
        if compute_stress:
            results["stress"] = _compute_stress(batch, vectors.detach(), gradient)
        return results if self.training else {k: v.detach() for k, v in results.items()}

    def _sum_energies(self, batch: GraphBatch, atom_energies: torch.Tensor) -> torch.Tensor:
        """Sum in float64: total energies are large, their differences are what matters."""
        with_baselines = atom_energies.double() + self.energy_baselines[batch.atomic_numbers]
        return with_baselines.new_zeros(batch.num_graphs).index_add(0, batch.graph_index, with_baselines)


def compute_vectors(batch: GraphBatch) -> torch.Tensor:
    """Return (num_pairs, 3) Å, from the first to the second atom of each pair through the cell's boundaries."""
    vectors = batch.positions[batch.pair_second] - batch.positions[batch.pair_first]
    if batch.pair_shifts is None or batch.cell is None:
        return vectors
    cells = batch.cell[batch.graph_index[batch.pair_first]]
    return vectors + torch.einsum("pi,pij->pj", batch.pair_shifts, cells)


def _sum_forces(batch: GraphBatch, gradient: torch.Tensor) -> torch.Tensor:
    """Each pair pushes its two atoms with opposite forces, so the net force of a structure is zero."""
    forces = torch.zeros_like(batch.positions).index_add(0, batch.pair_first, gradient)
    return forces.index_add(0, batch.pair_second, gradient, alpha=-1)


def _compute_stress(batch: GraphBatch, vectors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return (1/V) dE/dstrain for symmetric strain: half of r g^T + g r^T, summed over pairs."""
    if batch.cell is None:
        return gradient.new_full((batch.num_graphs, 3, 3), math.nan)
    outer = vectors[:, :, None] * gradient[:, None, :]
    virials = outer.new_zeros(batch.num_graphs, 3, 3).index_add(0, batch.graph_index[batch.pair_first], outer)
    volumes = torch.linalg.det(batch.cell).abs()[:, None, None]
    has_cell = volumes > 0
    stress = (virials + virials.transpose(1, 2)) / torch.where(has_cell, 2 * volumes, 1.0)
    return torch.where(has_cell, stress, math.nan)
