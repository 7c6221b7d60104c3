"""Structures and minibatches: the name, shape, dtype and unit of every field, and the way from many structures to one batch.

`Graph` is one structure in numpy (what the data pipeline handles), `GraphBatch` is a minibatch in torch (what models see).
Units are eV, Å and e. The data pipeline and the models know each other only through this file.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from so3krates_dist.errors import DataError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

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

ATOMIC_MASSES: tuple[float, ...] = tuple(
    map(
        float,
        (
            "1 1.008 4.002602 6.94 9.0121831 10.81 12.011 14.007 15.999 18.99840316 20.1797 22.98976928 24.305 "
            "26.9815385 28.085 30.973762 32.06 35.45 39.948 39.0983 40.078 44.955908 47.867 50.9415 51.9961 "
            "54.938044 55.845 58.933194 58.6934 63.546 65.38 69.723 72.63 74.921595 78.971 79.904 83.798 85.4678 "
            "87.62 88.90584 91.224 92.90637 95.95 97.90721 101.07 102.9055 106.42 107.8682 112.414 114.818 118.71 "
            "121.76 127.6 126.90447 131.293 132.905452 137.327 138.90547 140.116 140.90766 144.242 144.91276 "
            "150.36 151.964 157.25 158.92535 162.5 164.93033 167.259 168.93422 173.054 174.9668 178.49 180.94788 "
            "183.84 186.207 190.23 192.217 195.084 196.966569 200.592 204.38 207.2 208.9804 208.98243 209.98715 "
            "222.01758 223.01974 226.02541 227.02775 232.0377 231.03588 238.02891 237.04817 244.06421 243.06138 "
            "247.07035 247.07031 251.07959 252.083 257.09511 258.09843 259.101 262.11 267.122 268.126 271.134 "
            "270.133 269.1338 278.156 281.165 281.166 285.177 286.182 289.19 289.194 293.204 293.208 294.214 "
        ).split(),
    )
)
"""u, standard atomic weights (J. Meija et al., Pure Appl. Chem. 88, 265 (2016), 10.1515/pac-2015-0305) or, without one, the mass of
a long-lived isotope; index 0 has no meaning. They place the origin of dipoles."""


def compute_formula(atomic_numbers: IntArray) -> str:
    """Return the chemical formula in Hill order, e.g. `C2H6O`.

    Args:
        atomic_numbers: (num_atoms,) atomic numbers.
    """
    counts = {ELEMENT_SYMBOLS[z]: int(n) for z, n in enumerate(np.bincount(atomic_numbers)) if n}
    first = ["C", "H"] if "C" in counts else []
    order = [s for s in first if s in counts] + sorted(s for s in counts if s not in first)
    return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)


MAX_IMAGE_POINTS = 50_000_000
"""Of a sum over all periodic images; so many take up to 5 GB in single precision (of vectors: with a dozen atoms)"""


def check_images(pbc: BoolArray | None, cell: FloatArray | None, density: float, where: str) -> None:
    """Raise `DataError` where all periodic images of a structure cannot be summed: it is no crystal, or too large.

    Args:
        pbc: (3,) whether the structure repeats along each lattice vector; None for a molecule.
        cell: (3, 3) Å; None where it is not known.
        density: 1/Å; points of the sum along each lattice vector.
        where: File or structure, for the message.
    """
    if pbc is None or not np.any(pbc):
        return
    remedy = "Take model.electrostatics=cutoff, or a cell with a vacuum in it that is periodic in all directions"
    if not np.all(pbc):
        rule = "be periodic along all three lattice vectors or none for Ewald or PME"
        raise DataError(where, rule, f"pbc {' '.join('FT'[int(p)] for p in pbc)}", remedy)
    lengths = [] if cell is None else np.linalg.norm(cell, axis=1).tolist()
    if lengths and math.prod(density * length for length in lengths) > MAX_IMAGE_POINTS:
        rule = f"have lattice vectors of at most {MAX_IMAGE_POINTS ** (1 / 3) / density:.0f} Å on average for this sum of images"
        got = f"{' x '.join(f'{length:.1f}' for length in lengths)} Å"
        raise DataError(where, rule, got, "Take a smaller cell, or a molecule without cell")


def check_box(
    pbc: BoolArray | None,
    cell: FloatArray | None,
    where: str,
    *,
    sees: frozenset[str],
    reach: float,
    image_density: float = 0.0,
) -> None:
    """Raise `DataError` where a model cannot be used for a structure because of its periodic directions or its cell.

    Args:
        pbc: (3,) whether the structure repeats along each lattice vector; None for a molecule.
        cell: (3, 3) Å; None where it is not known.
        where: File, split or structure, for the message.
        sees: What the model uses of a structure.
        reach: Å; how far its pairs go; infinite: all pairs of a molecule.
        image_density: 1/Å; points along a lattice vector of the model's sum over all periodic images, 0 where it has none.
    """
    if pbc is not None and np.any(pbc) and not ("cell" in sees and math.isfinite(reach)):
        remedy = "Set a long-range cutoff" if "cell" in sees else "Take a model that sees the cell"
        raise DataError(where, "be a molecule for this model", "a periodic structure", remedy)
    if image_density:
        check_images(pbc, cell, image_density, where)


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
    hirshfeld_ratios: FloatArray | None = None
    """(num_atoms,) volume of each atom in the structure over that of the free atom (Hirshfeld partitioning)"""
    loss_weight: float = 1.0
    """Factor of this structure's errors in the training loss, zero or greater"""
    group: str = ""
    """Name that results are grouped by: the molecule, or the subset of a larger collection"""
    pair_first: IntArray | None = None
    """(num_pairs,) index of the first atom of each undirected pair; pairs within the model's cutoff come first"""
    pair_second: IntArray | None = None
    """(num_pairs,) index of the second atom"""
    pair_shifts: IntArray | None = None
    """(num_pairs, 3) lattice translations: r = positions[second] + shift @ cell - positions[first]"""
    num_short_pairs: int | None = None
    """pairs within the model's cutoff; the others are there for long-range terms. None: all"""

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
    """(num_pairs,) int64; undirected pairs, each once; those within the model's cutoff come first"""
    pair_second: torch.Tensor
    """(num_pairs,) int64"""
    pair_shifts: torch.Tensor | None
    """(num_pairs, 3) lattice translations in the dtype of `positions`; None where no structure is periodic"""
    total_charge: torch.Tensor
    """(num_graphs,) e"""
    num_unpaired_electrons: torch.Tensor
    """(num_graphs,) count"""
    num_short_pairs: int
    """pairs within the model's cutoff; the others are there for long-range terms"""
    energy: torch.Tensor | None = None
    """(num_graphs,) eV, always float64: total energies are large and their differences small"""
    forces: torch.Tensor | None = None
    """(num_atoms, 3) eV/Å"""
    stress: torch.Tensor | None = None
    """(num_graphs, 3, 3) eV/Å³; nan for structures without a stress label"""
    dipole: torch.Tensor | None = None
    """(num_graphs, 3) e Å; nan for structures without a dipole label"""
    partial_charges: torch.Tensor | None = None
    """(num_atoms,) e; nan for structures without this label"""
    hirshfeld_ratios: torch.Tensor | None = None
    """(num_atoms,); nan for structures without this label"""
    loss_weight: torch.Tensor | None = None
    """(num_graphs,) factor of each structure's errors in the training loss; None where all are 1"""
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


def _concatenate_labels(graphs: Sequence[Graph], name: str, tail: tuple[int, ...]) -> FloatArray | None:
    """Join a per-atom label, as `_stack_labels` does."""
    labels = [getattr(g, name) for g in graphs]
    if all(label is None for label in labels):
        return None
    filled = [
        np.full((g.num_atoms, *tail), np.nan) if label is None else label
        for g, label in zip(graphs, labels, strict=True)
    ]
    return np.concatenate(filled)


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

    num_short = [len(_get_pairs(g)) if g.num_short_pairs is None else g.num_short_pairs for g in graphs]

    def concatenate_pairs(arrays: Sequence[IntArray | FloatArray]) -> torch.Tensor:
        short = [array[:count] for array, count in zip(arrays, num_short, strict=True)]
        rest = [array[count:] for array, count in zip(arrays, num_short, strict=True) if count < len(array)]
        return torch.from_numpy(np.concatenate([*short, *rest]))

    def concatenate_indices(name: str) -> torch.Tensor:
        return concatenate_pairs([getattr(g, name) + o for g, o in zip(graphs, offsets, strict=True)]).long()

    def to_float(array: FloatArray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    periodic = any(g.is_periodic for g in graphs)
    energy = _stack_labels(graphs, "energy", ())
    cells = np.stack([np.zeros((3, 3)) if g.cell is None else g.cell for g in graphs]) if periodic else None
    pbc = np.stack([np.zeros(3, bool) if g.pbc is None else g.pbc for g in graphs]) if periodic else None
    weighted = any(g.loss_weight != 1 for g in graphs)
    return GraphBatch(
        atomic_numbers=torch.from_numpy(np.concatenate([g.atomic_numbers for g in graphs])).long(),
        positions=torch.from_numpy(np.concatenate([g.positions for g in graphs])).to(dtype),
        graph_index=torch.from_numpy(np.repeat(np.arange(len(graphs)), counts)),
        num_atoms=torch.from_numpy(counts),
        cell=to_float(cells),
        pbc=None if pbc is None else torch.from_numpy(pbc),
        pair_first=concatenate_indices("pair_first"),
        pair_second=concatenate_indices("pair_second"),
        pair_shifts=concatenate_pairs([_pair_shifts(g) for g in graphs]).to(dtype) if periodic else None,
        num_short_pairs=sum(num_short),
        total_charge=torch.tensor([g.total_charge for g in graphs], dtype=dtype),
        num_unpaired_electrons=torch.tensor([g.num_unpaired_electrons for g in graphs], dtype=dtype),
        energy=None if energy is None else torch.from_numpy(energy.astype(np.float64)),
        forces=to_float(_concatenate_labels(graphs, "forces", (3,))),
        stress=to_float(_stack_labels(graphs, "stress", (3, 3))),
        dipole=to_float(_stack_labels(graphs, "dipole", (3,))),
        partial_charges=to_float(_concatenate_labels(graphs, "partial_charges", ())),
        hirshfeld_ratios=to_float(_concatenate_labels(graphs, "hirshfeld_ratios", ())),
        loss_weight=torch.tensor([g.loss_weight for g in graphs], dtype=dtype) if weighted else None,
        group=tuple(g.group for g in graphs),
    )


def _build_empty_batch(dtype: torch.dtype) -> GraphBatch:
    """Return a batch of nothing: what a process gets where a step has fewer conformers than processes."""
    integers, floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype)
    return GraphBatch(
        atomic_numbers=integers, positions=floats.view(0, 3), graph_index=integers, num_atoms=integers, cell=None,
        pbc=None, pair_first=integers, pair_second=integers, pair_shifts=None, total_charge=floats,
        num_unpaired_electrons=floats, num_short_pairs=0, energy=floats.double(), forces=floats.view(0, 3),
    )  # fmt: skip


def _get_pairs(graph: Graph) -> IntArray:
    assert graph.pair_first is not None, "collate() needs structures with neighbour pairs"
    return graph.pair_first


def _pair_shifts(graph: Graph) -> FloatArray:
    if graph.pair_shifts is None:
        return np.zeros((len(_get_pairs(graph)), 3))
    return graph.pair_shifts.astype(np.float64)
