"""Structures and minibatches: the name, shape, dtype and unit of every field, and the way from many structures to one batch.

`Graph` is one structure in numpy (what the data pipeline handles), `GraphBatch` is a minibatch in torch (what models see).
Units are eV, Å and e. The data pipeline and the models know each other only through this file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]

MAX_ATOMIC_NUMBER = 118

ELEMENT_SYMBOLS: tuple[str, ...] = tuple(
    (
        "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y "
        "Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re "
        "Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg "
        "Cn Nh Fl Mc Lv Ts Og"
    ).split()
)
"""Symbol of each element, indexed by its atomic number; index 0 stands for no element."""


def compute_formula(atomic_numbers: IntArray) -> str:
    """Return the chemical formula in Hill order, e.g. `C2H6O`.

    Args:
        atomic_numbers: (num_atoms,) atomic numbers.
    """
    counts = {ELEMENT_SYMBOLS[z]: int(n) for z, n in enumerate(np.bincount(atomic_numbers)) if n}
    first = ["C", "H"] if "C" in counts else []
    order = [s for s in first if s in counts] + sorted(s for s in counts if s not in first)
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)


@dataclasses.dataclass(kw_only=True, slots=True)
class Graph:
    """One structure with its labels; the pairs are there once neighbours have been built.

    A label that the data set does not have is `None`. Arrays are never shared with a caller that writes to them.
    """

    atomic_numbers: IntArray
    """(num_atoms,) integers from 1 to 118"""
    positions: FloatArray
    """(num_atoms, 3) Å"""
    cell: FloatArray | None = None
    """(3, 3) Å, rows are the lattice vectors; None for a molecule"""
    pbc: npt.NDArray[np.bool_] | None = None
    """(3,) whether the structure repeats along each lattice vector; None for a molecule"""
    total_charge: float = 0.0
    """e"""
    num_unpaired_electrons: float = 0.0
    """count (multiplicity minus one)"""
    energy: float | None = None
    """eV"""
    forces: FloatArray | None = None
    """(num_atoms, 3) eV/Å, minus the derivative of `energy` by `positions`"""
    stress: FloatArray | None = None
    """(3, 3) eV/Å³, the derivative of `energy` by strain over the volume (ASE's sign)"""
    dipole: FloatArray | None = None
    """(3,) e Å; origin at the centre of mass where `total_charge` is not zero"""
    partial_charges: FloatArray | None = None
    """(num_atoms,) e"""
    group: str = ""
    """Name that results are grouped by: the molecule, or the subset of a larger collection"""
    pair_first: IntArray | None = None
    """(num_pairs,) index of the first atom of each undirected pair"""
    pair_second: IntArray | None = None
    """(num_pairs,) index of the second atom"""
    pair_shifts: IntArray | None = None
    """(num_pairs, 3) lattice translations: r = positions[second] + shift @ cell - positions[first]"""

    @property
    def num_atoms(self) -> int:
        """Number of atoms."""
        return len(self.atomic_numbers)

    @property
    def is_periodic(self) -> bool:
        """Whether the structure repeats along any lattice vector."""
        return self.pbc is not None and bool(np.any(self.pbc))


@dataclasses.dataclass(kw_only=True, slots=True)
class GraphBatch:
    """A minibatch of structures: atoms of all of them one after another, indices counted over the whole batch."""

    atomic_numbers: torch.Tensor
    """(num_atoms,) int64"""
    positions: torch.Tensor
    """(num_atoms, 3) Å"""
    graph_index: torch.Tensor
    """(num_atoms,) int64, the structure that each atom belongs to; ascending"""
    num_atoms: torch.Tensor
    """(num_graphs,) int64, atoms in each structure"""
    cell: torch.Tensor | None
    """(num_graphs, 3, 3) Å, rows are lattice vectors; None where no structure of the batch is periodic"""
    pbc: torch.Tensor | None
    """(num_graphs, 3) bool; None where no structure of the batch is periodic"""
    pair_first: torch.Tensor
    """(num_pairs,) int64; undirected pairs, each once"""
    pair_second: torch.Tensor
    """(num_pairs,) int64"""
    pair_shifts: torch.Tensor | None
    """(num_pairs, 3) lattice translations in the dtype of `positions`; None where no structure is periodic"""
    total_charge: torch.Tensor
    """(num_graphs,) e"""
    num_unpaired_electrons: torch.Tensor
    """(num_graphs,) count"""
    energy: torch.Tensor | None = None
    """(num_graphs,) eV, always float64: total energies are large and their differences small"""
    forces: torch.Tensor | None = None
    """(num_atoms, 3) eV/Å"""
    stress: torch.Tensor | None = None
    """(num_graphs, 3, 3) eV/Å³; nan for structures without a stress label"""
    group: tuple[str, ...] = ()
    """(num_graphs,) names that results are grouped by"""

    @property
    def num_graphs(self) -> int:
        """Number of structures."""
        return len(self.num_atoms)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "GraphBatch":
        """Return the batch on a device, its floating-point fields but `energy` in `dtype` (None keeps them)."""
        changes: dict[str, Any] = {}
        # Copies to a GPU may overlap with computing; copies from one would be read before they have arrived.
        overlap = torch.device(device).type == "cuda"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                convert = dtype is not None and value.is_floating_point() and field.name != "energy"
                changes[field.name] = value.to(device, dtype if convert else None, non_blocking=overlap)
        return dataclasses.replace(self, **changes)

    def pin_memory(self) -> "GraphBatch":
        """Return the batch in page-locked memory, from where copies to a GPU overlap with computing."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in fields.items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, **pinned)


def _stack_labels(graphs: Sequence[Graph], name: str, tail: tuple[int, ...]) -> FloatArray | None:
    """Stack a per-structure label; structures without it get nan, and a batch wholly without it gets None."""
    if all(getattr(g, name) is None for g in graphs):
        return None
    missing = np.full(tail, np.nan)
    return np.stack([missing if (v := getattr(g, name)) is None else np.asarray(v, np.float64) for g in graphs])


def _concatenate_forces(graphs: Sequence[Graph]) -> FloatArray | None:
    if all(g.forces is None for g in graphs):
        return None
    return np.concatenate([np.full((g.num_atoms, 3), np.nan) if g.forces is None else g.forces for g in graphs])


def collate(graphs: Sequence[Graph], dtype: torch.dtype = torch.float32) -> GraphBatch:
    """Join structures with neighbour pairs into one batch.

    Args:
        graphs: Structures; each has its `pair_*` fields. None at all gives an empty batch.
        dtype: Floating-point type of the batch (energies are float64 always).

    Returns:
        The batch on the CPU.
    """
    if not graphs:
        return _build_empty_batch(dtype)
    counts = np.array([g.num_atoms for g in graphs], np.int64)
    offsets = np.cumsum(counts) - counts

    def concatenate_pairs(name: str) -> torch.Tensor:
        return torch.from_numpy(
            np.concatenate([getattr(g, name) + offset for g, offset in zip(graphs, offsets, strict=True)])
        ).long()

    def to_float(array: FloatArray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    periodic = any(g.is_periodic for g in graphs)
    energy = _stack_labels(graphs, "energy", ())
    cells = np.stack([np.zeros((3, 3)) if g.cell is None else g.cell for g in graphs]) if periodic else None
    pbc = np.stack([np.zeros(3, bool) if g.pbc is None else g.pbc for g in graphs]) if periodic else None
    shifts = np.concatenate([_pair_shifts(g) for g in graphs]) if periodic else None
    return GraphBatch(
        atomic_numbers=torch.from_numpy(np.concatenate([g.atomic_numbers for g in graphs])).long(),
        positions=torch.from_numpy(np.concatenate([g.positions for g in graphs])).to(dtype),
        graph_index=torch.from_numpy(np.repeat(np.arange(len(graphs)), counts)),
        num_atoms=torch.from_numpy(counts),
        cell=to_float(cells),
        pbc=None if pbc is None else torch.from_numpy(pbc),
        pair_first=concatenate_pairs("pair_first"),
        pair_second=concatenate_pairs("pair_second"),
        pair_shifts=to_float(shifts),
        total_charge=torch.tensor([g.total_charge for g in graphs], dtype=dtype),
        num_unpaired_electrons=torch.tensor([g.num_unpaired_electrons for g in graphs], dtype=dtype),
        energy=None if energy is None else torch.from_numpy(energy.astype(np.float64)),
        forces=to_float(_concatenate_forces(graphs)),
        stress=to_float(_stack_labels(graphs, "stress", (3, 3))),
        group=tuple(g.group for g in graphs),
    )


def _build_empty_batch(dtype: torch.dtype) -> GraphBatch:
    """Return a batch of nothing: what a process gets where a step has fewer conformers than processes."""
    integers, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype)
    return GraphBatch(
        atomic_numbers=integers, positions=floats.view(0, 3), graph_index=integers, num_atoms=integers, cell=None,
        pbc=None, pair_first=integers, pair_second=integers, pair_shifts=None, total_charge=floats,
        num_unpaired_electrons=floats, energy=floats.double(), forces=floats.view(0, 3),
    )  # fmt: skip


def _pair_shifts(graph: Graph) -> FloatArray:
    assert graph.pair_first is not None, "collate() needs structures with neighbour pairs"
    if graph.pair_shifts is None:
        return np.zeros((len(graph.pair_first), 3))
    return graph.pair_shifts.astype(np.float64)
