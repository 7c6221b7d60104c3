"""From per-atom energies to what a force field gives: total energy, conservative forces, stress.

Energies depend on positions and cell through the pair vectors alone (but for Ewald sums), so one derivative by these vectors gives
both: forces are its sums over the pairs of each atom, and stress is its outer product with the vectors (the virial), both exact.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol, cast

import numpy as np
import torch
from torch import nn

from so3krates_dist.config import ModelSection
from so3krates_dist.errors import ConfigError, DataError
from so3krates_dist.graph import (
    ELEMENT_SYMBOLS,
    MAX_ATOMIC_NUMBER,
    BoolArray,
    FloatArray,
    Graph,
    GraphBatch,
    check_box,
)
from so3krates_dist.model.constants import ConstantsModule
from so3krates_dist.model.exact import multiply_exactly
from so3krates_dist.model.recompute import Checkpointing, Dual, carry
from so3krates_dist.model.record import AttentionMap, AttentionRecord

DERIVATIVE_BY: Final = "derivative_by_"
"""How outputs begin that only the first of two passes has (train/two_pass.py): derivatives of the energies by what is varied"""


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

    has_unpaired_electrons: bool = False
    """whether structures with unpaired electrons are among the data; where not, what a model makes of them is random"""
    charge_signs: tuple[int, ...] | None = None
    """signs, -1 and 1, of the charged structures among the data, as for unpaired electrons; None: not known"""

    @classmethod
    def from_manifest(cls, statistics: Mapping[str, Any], section: ModelSection) -> "ModelStatistics":
        """Take what is needed from a data set's manifest.

        Args:
            statistics: `Manifest.statistics`; keys are documented in data/statistics.py.
            section: The model.

        Raises:
            ConfigError: The model's cutoff lies outside the distances up to which neighbours were counted.
            DataError: The model sees unpaired electrons, and the manifest does not say whether there are some.
        """
        if "num_unpaired_electrons" in section.sees and "num_unpaired_electrons" not in statistics:
            raise DataError(
                "statistics of the data set", "count unpaired electrons for a model that sees them", "no count",
                "Convert the data again",
            )  # fmt: skip
        counts = sorted((float(k), float(v)) for k, v in statistics["mean_neighbors"].items())
        if section.uses_mean_neighbors and not counts[0][0] <= section.cutoff <= counts[-1][0]:
            rule = f"be from {counts[0][0]:g} to {counts[-1][0]:g} Å, where the data's neighbours are counted"
            raise ConfigError("model.cutoff", rule, section.cutoff, "Change the value")
        neighbors = float(np.interp(section.cutoff, [c for c, _ in counts], [n for _, n in counts]))
        # Data without forces have no force RMS; their energies per atom vary on a similar scale.
        scale = statistics["force_rms"] or statistics["energy_residual_std_per_atom"] or 1.0
        return cls(
            elements=tuple(statistics["elements"]),
            energy_baselines={int(z): float(e) for z, e in statistics["energy_baselines"].items()},
            energy_scale=float(scale),
            mean_neighbors=max(neighbors, 1.0),
            has_unpaired_electrons=any(float(n) for n in statistics.get("num_unpaired_electrons", {})),
            charge_signs=find_signs(map(float, statistics["total_charges"])) if "total_charges" in statistics else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = dataclasses.asdict(self)
        plain["elements"] = list(self.elements)
        plain["charge_signs"] = None if self.charge_signs is None else list(self.charge_signs)
        plain["energy_baselines"] = {str(z): e for z, e in self.energy_baselines.items()}
        return plain

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ModelStatistics":
        """Rebuild from `to_json`.

        Raises:
            ValueError: A value is missing, unknown, of the wrong kind or out of range; the message names it.
        """
        if isinstance(content, Mapping):
            content = {"has_unpaired_electrons": False, "charge_signs": None, **content}  # older models do not say
        if not isinstance(content, Mapping) or set(content) != set(_READERS):
            raise ValueError(f"statistics has {list(content)}, not {list(_READERS)}")
        values = {}
        for name, read in _READERS.items():
            try:
                values[name] = read(content[name])
            except (TypeError, ValueError, AttributeError, KeyError) as error:
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
    "has_unpaired_electrons": lambda value: {True: True, False: False}[value],
    "charge_signs": lambda value: None if value is None else tuple({-1: -1, 1: 1}[sign] for sign in value),
}
"""How each field of `ModelStatistics` is read from a file that may be damaged."""


def find_signs(charges: Iterable[float]) -> tuple[int, ...]:
    """Return which of -1 and 1 are signs of charges; zeros have none."""
    return tuple(sorted({-1 if charge < 0 else 1 for charge in charges if charge}))


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


def check_unpaired_electrons(sees: frozenset[str], statistics: ModelStatistics, where: str) -> None:
    """Raise `DataError` for a structure with unpaired electrons where what the model makes of them was never trained.

    Args:
        sees: Of the model.
        statistics: Of the model.
        where: File or molecule, for the message.
    """
    if "num_unpaired_electrons" in sees and not statistics.has_unpaired_electrons:
        rule = "have no unpaired electrons: the model's embedding of their number was never trained"
        raise DataError(where, rule, "some", "Take another model, or state a spin of 0 to treat it as a closed shell")


def check_charges(sees: frozenset[str], statistics: ModelStatistics, charges: Iterable[float], where: str) -> None:
    """Raise `DataError` for charges of a sign that the model's data had none of: what it makes of them was never trained.

    Args:
        sees: Of the model.
        statistics: Of the model.
        charges: e, of structures.
        where: File or molecule, for the message.
    """
    if "total_charge" not in sees or statistics.charge_signs is None:
        return
    unseen = set(find_signs(charges)) - set(statistics.charge_signs)
    if unseen:
        word = "negative" if -1 in unseen else "positive"
        rule = f"have no {word} charge: the model saw no structure with one in training"
        raise DataError(where, rule, "some", "Take another model, or train one on data with such ions")


def describe_ignored(sees: frozenset[str], present: Iterable[str]) -> str:
    """Return a line about what structures have and the model ignores; empty where it ignores nothing.

    Args:
        sees: Of the model.
        present: Which of `total_charge` and `num_unpaired_electrons` are not zero somewhere.
    """
    words = {"total_charge": "total charges", "num_unpaired_electrons": "unpaired electrons"}
    ignored = [text for name, text in words.items() if name in present and name not in sees]
    return f"there are {' and '.join(ignored)}, which this model does not see" if ignored else ""


CHARGED_CRYSTALS: Final = "charged_crystals"
"""What `Potential.describe_limits` is told of structures that are periodic and have a charge"""


class Network(Protocol):
    """What a model of the family is to the potential around it."""

    cutoff: float
    """Å; pairs within it are the batch's short pairs"""
    reach: float
    """Å; how far the batch's pairs go; infinite: all pairs of a molecule"""
    sees: frozenset[str]
    """what is used of a structure besides elements and positions"""
    uses_positions: bool
    """whether energies depend on positions and cell other than through the pair vectors"""
    checkpointing: Checkpointing
    """what is computed again in the backward pass instead of being kept, as `train.activation_checkpointing`"""

    def __call__(
        self, batch: GraphBatch, vectors: torch.Tensor, record: AttentionRecord | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute what the model knows of each atom.

        Args:
            batch: Structures; their positions are read only where `uses_positions` says so, or for outputs other than energies.
            vectors: (num_pairs, 3) Å from the first to the second atom of each pair; with `low_memory` it may be a `Dual`, and
                so may be cell and positions of the batch: parts that see them are called by `carry` or `run_again`.
            record: Keeps the attention coefficients.

        Returns:
            `atom_energies` (num_atoms,) the learned part in units of the energy scale; where the model has such terms
            `physical_energies` (num_atoms,) eV; and outputs of other names, e.g. `dipole` (num_graphs, 3) e Å.
        """
        ...


class Potential(ConstantsModule):
    """A potential energy surface: batch in, energy, forces, stress and the network's other outputs out.

    This is the module that the training engine wraps: forces are taken inside `forward`, because differentiating the
    output of a wrapped module is wrong under ZeRO, at stage 1 without any error.

    Args:
        network: A module that is a `Network`.
        statistics: Of the training data.
        section: What the network was made of; None for one that has no configuration.
    """

    energy_baselines: torch.Tensor

    def __init__(self, network: nn.Module, statistics: ModelStatistics, section: ModelSection | None = None) -> None:
        super().__init__()
        self.network = network
        self.statistics = statistics
        self.section = section
        baselines = torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
        for atomic_number, energy in statistics.energy_baselines.items():
            baselines[atomic_number] = energy
        self.register_buffer("energy_baselines", baselines, persistent=False)

    @property
    def cutoffs(self) -> tuple[float, float]:
        """Distances in Å within which atoms are neighbours, and up to which pairs go."""
        network = self.as_network
        return network.cutoff, network.reach

    @property
    def as_network(self) -> Network:
        """The network, with the type that it has."""
        return cast(Network, self.network)

    def set_precision(self, name: str) -> None:
        """Set the arithmetic of the parts that may be done coarsely; weights, geometry, sums and outputs stay as they are.

        Args:
            name: As `train.precision`. bf16-mixed: what has a `compute_dtype` is done in bfloat16; with any other, all is done in
                the dtype of the weights.
        """
        compute_dtype = torch.bfloat16 if name == "bf16-mixed" else None
        for module in self.modules():
            if hasattr(type(module), "compute_dtype"):
                module.compute_dtype = compute_dtype  # type: ignore[assignment] # it has one, as asked above

    def check_structure(self, graph: Graph) -> None:
        """Raise `DataError` where the model means nothing for a structure: elements, periodic directions, electrons."""
        where = graph.group or "structure"
        check_elements(graph.atomic_numbers.tolist(), self.elements, where)
        self.check_box(graph.pbc, graph.cell, where)
        self.check_electrons([graph.total_charge], bool(graph.num_unpaired_electrons), where)

    def check_box(self, pbc: BoolArray | None, cell: FloatArray | None, where: str) -> None:
        """Raise `DataError` where the model cannot be used for a structure because of its periodic directions or its cell.

        Args:
            pbc: (3,) whether the structure repeats along each lattice vector; None for a molecule.
            cell: (3, 3) Å; None where it is not known.
            where: File or structure, for the message.
        """
        density = 0.0 if self.section is None else self.section.image_density
        check_box(pbc, cell, where, sees=self.as_network.sees, reach=self.cutoffs[1], image_density=density)

    def check_electrons(self, charges: Iterable[float], has_unpaired: bool, where: str) -> None:
        """Raise `DataError` for charges and unpaired electrons of a kind that the model was never trained on.

        Args:
            charges: e, of structures.
            has_unpaired: Whether one of them has unpaired electrons.
            where: File or structure, for the message.
        """
        check_charges(self.as_network.sees, self.statistics, charges, where)
        if has_unpaired:
            check_unpaired_electrons(self.as_network.sees, self.statistics, where)

    def describe_limits(self, present: Iterable[str]) -> list[str]:
        """Return lines about what structures have and the model ignores, or depends on in a way that has no meaning.

        Args:
            present: Which of `total_charge` and `num_unpaired_electrons` are not zero somewhere, and `CHARGED_CRYSTALS` where there
                are some.
        """
        present = set(present)
        lines = [describe_ignored(self.as_network.sees, present)]
        if CHARGED_CRYSTALS in present and self.section is not None and self.section.cuts_electrostatics:
            lines.append(
                "there are charged periodic structures, whose energies depend on where this model's electrostatics is cut off;"
                " model.electrostatics=ewald has no cutoff"
            )
        return [line for line in lines if line]

    @property
    def outputs(self) -> frozenset[str]:
        """What it gives besides energy, forces and stress."""
        return frozenset() if self.section is None else self.section.outputs

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the model was trained on."""
        return self.statistics.elements

    def forward(
        self, batch: GraphBatch, compute_stress: bool = False, cotangents: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Compute energies and their derivatives.

        Args:
            batch: Structures with their pairs up to at least `cutoffs`.
            compute_stress: Return stress too; nan for structures without a cell.
            cotangents: Derivatives of a loss by outputs of the first of two passes; asks for the second (train/two_pass.py).

        Returns:
            `energy` (num_graphs,) eV in float64; `forces` (num_atoms, 3) eV/Å; on request `stress` (num_graphs, 3, 3)
            eV/Å³; and the network's other outputs under their names. In training mode they can be differentiated by the
            weights, in evaluation mode they are detached.

            In training mode with `low_memory` they can not: they are leaves, or made of derivatives of the energies, which are
            leaves too and come with them. With cotangents `surrogate` is returned, whose gradient by the weights is the loss's.
        """
        with torch.enable_grad():
            if cotangents is not None:
                return {"surrogate": self._compute_surrogate(batch, cotangents)}
            results = self._differentiate(batch, compute_stress)
        return results if self.training else {k: v.detach() for k, v in results.items()}

    def record_attention(self, batch: GraphBatch) -> list[AttentionMap]:
        """Return the attention coefficients of every block, in the order of the layers; see `AttentionMap`."""
        record = AttentionRecord()
        with torch.no_grad():
            self.as_network(batch, compute_vectors(batch), record)
        return record.maps

    def _differentiate(self, batch: GraphBatch, compute_stress: bool) -> dict[str, torch.Tensor]:
        is_first_of_two = self.training and self.as_network.checkpointing == "low_memory"
        variables = {name: values.requires_grad_() for name, values in self._list_variables(batch).items()}
        atom_energies, results = self._evaluate(*self._place(batch, variables))
        gradients = torch.autograd.grad(
            atom_energies.sum(), list(variables.values()), create_graph=self.training and not is_first_of_two
        )
        if is_first_of_two:
            results = {name: values.detach().requires_grad_() for name, values in results.items()}
            results |= {DERIVATIVE_BY + name: g.requires_grad_() for name, g in zip(variables, gradients, strict=True)}
        if not self.network.uses_positions:
            results["forces"] = _sum_forces(batch, gradients[0])
            if compute_stress:
                results["stress"] = _compute_stress(batch, variables["vectors"].detach(), gradients[0])
        else:
            results["forces"] = -gradients[0]
            if compute_stress:
                results["stress"] = _divide_by_volume(batch, gradients[1])
        return results

    def _list_variables(self, batch: GraphBatch) -> dict[str, torch.Tensor]:
        """Return by what energies are differentiated.

        The pair vectors: one derivative gives forces and stress, where energies depend on nothing else. With a reciprocal part
        positions and strain.
        """
        if not self.network.uses_positions:
            return {"vectors": compute_vectors(batch).detach()}
        return {"positions": batch.positions.detach(), "strain": batch.positions.new_zeros(batch.num_graphs, 3, 3)}

    def _place(self, batch: GraphBatch, variables: Mapping[str, torch.Tensor]) -> tuple[GraphBatch, torch.Tensor]:
        """Return what the network takes, as a function of `_list_variables`."""
        if "vectors" in variables:
            return batch, variables["vectors"]
        strain = variables["strain"]
        deformation = torch.eye(3, dtype=strain.dtype, device=strain.device) + (strain + strain.transpose(1, 2)) / 2
        moved = dataclasses.replace(
            batch,
            positions=multiply_exactly(variables["positions"], deformation[batch.graph_index], "ni,nij->nj"),
            cell=None if batch.cell is None else multiply_exactly(batch.cell, deformation),
        )
        return moved, compute_vectors(moved)

    def _compute_surrogate(self, batch: GraphBatch, cotangents: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a number with the gradient by the weights of the loss whose derivatives by outputs are given."""
        variables: dict[str, Any] = dict(self._list_variables(batch))
        for name, values in variables.items():
            if DERIVATIVE_BY + name in cotangents:
                variables[name] = Dual(values, cotangents[DERIVATIVE_BY + name])
        moved, vectors = carry(self._place, batch, variables)
        atom_energies, results = carry(self._add_up, moved, self.as_network(moved, vectors))
        parts = [atom_energies.tangent.sum()] if isinstance(atom_energies, Dual) else []
        for name, values in results.items():
            if name in cotangents:
                parts.append((cotangents[name] * (values.primal if isinstance(values, Dual) else values)).sum())
        return torch.stack([part.to(batch.positions.dtype) for part in parts]).sum()

    def _evaluate(self, batch: GraphBatch, vectors: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return each atom's energy without its baseline (eV), and the results that need no derivative."""
        return self._add_up(batch, self.as_network(batch, vectors))

    def _add_up(
        self, batch: GraphBatch, outputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the same from the network's outputs."""
        outputs = dict(outputs)
        atom_energies = outputs.pop("atom_energies") * self.statistics.energy_scale
        physical = outputs.pop("physical_energies", None)
        if physical is not None:
            atom_energies = atom_energies + physical
        return atom_energies, {"energy": self._sum_energies(batch, atom_energies), **outputs}

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
    return vectors + multiply_exactly(batch.pair_shifts, cells, "pi,pij->pj")


def _sum_forces(batch: GraphBatch, gradient: torch.Tensor) -> torch.Tensor:
    """Each pair pushes its two atoms with opposite forces, so the net force of a structure is zero."""
    forces = torch.zeros_like(batch.positions).index_add(0, batch.pair_first, gradient)
    return forces.index_add(0, batch.pair_second, gradient, alpha=-1)


def _compute_stress(batch: GraphBatch, vectors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return (1/V) dE/dstrain for symmetric strain: half of r g^T + g r^T, summed over pairs."""
    outer = vectors[:, :, None] * gradient[:, None, :]
    virials = outer.new_zeros(batch.num_graphs, 3, 3).index_add(0, batch.graph_index[batch.pair_first], outer)
    return _divide_by_volume(batch, (virials + virials.transpose(1, 2)) / 2)


def _divide_by_volume(batch: GraphBatch, virials: torch.Tensor) -> torch.Tensor:
    """Return dE/dstrain over the volume, nan for structures without a cell."""
    if batch.cell is None:
        return torch.full_like(virials, math.nan)
    volumes = torch.linalg.det(batch.cell).abs()[:, None, None]
    has_cell = volumes > 0
    return torch.where(has_cell, virials / torch.where(has_cell, volumes, 1.0), math.nan)
