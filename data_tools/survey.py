"""Conformers of a data set with their places, for those who look at data and not at bytes: all of them, or evenly spaced blocks.

Blocks that cannot be read are passed over and named: one damaged block must not hide what is wrong with the others. Memory does not
grow with the number of conformers that are looked at: they are counted in bins whose range a first sample gives.
"""

import dataclasses
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from data_tools import detective, gate
from so3krates_dist.data.index import PAIR_CUTOFFS, Index, count_pairs
from so3krates_dist.data.shards import SPLITS, DataFolder
from so3krates_dist.errors import DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, FloatArray, Graph

NUM_WORST: Final = 10
NEIGHBOR_CUTOFF: Final = 5.0
"""Å, of the neighbours that are counted: one of `PAIR_CUTOFFS`"""
_FIRST: Final = 2000
"""conformers that ranges, the usual energies and the units are told from"""
_BINS: Final = 60
_FEW_BINS: Final = 5
"""where all values are the same, which would be a hardly visible line in many; odd, so that it is in the middle"""
_CUT: Final = PAIR_CUTOFFS.index(NEIGHBOR_CUTOFF)
_COPIED: Final = ("atomic_numbers", "positions", "cell", "pbc", "forces")


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """A conformer and where it is."""

    graph: Graph
    split: str
    block: int
    """number in the data set"""
    index: int
    """number in the block"""


def choose_blocks(dataset: DataFolder, limit: int | None, splits: Iterable[str] = SPLITS) -> list[int]:
    """Return the numbers of evenly spaced blocks that hold about as many conformers as asked for, one block at least.

    Args:
        dataset: Where the blocks are.
        limit: Conformers; None: all blocks.
        splits: Those to choose from.
    """
    table = dataset.table
    numbers = np.concatenate([np.asarray(table.blocks_of_split(split), np.int64) for split in splits])
    total = int(np.sum(table.block_first[numbers + 1] - table.block_first[numbers]))
    if limit is None or total <= limit:
        return [int(n) for n in numbers]
    count = max(1, len(numbers) * limit // total)
    return [int(n) for n in numbers[(2 * np.arange(count) + 1) * len(numbers) // (2 * count)]]


def iter_placed(dataset: DataFolder, blocks: Iterable[int], damaged: list[str] | None = None) -> Iterator[Placed]:
    """Yield the conformers of some blocks in order.

    Args:
        dataset: Where they are.
        blocks: Numbers of the blocks.
        damaged: Learns what is wrong with blocks that cannot be read; None: nobody asks.
    """
    for number in blocks:
        try:
            block = dataset.read_block(number)
        except DataError as error:
            if damaged is not None and str(error) not in damaged[-1:]:
                damaged.append(str(error))
            continue
        split = find_split_of_block(dataset, number)
        for index, graph in enumerate(block):
            yield Placed(graph, split, number, index)


def name_place(dataset: DataFolder, block: int, index: int) -> str:
    """Return the name of a conformer in messages, `<shard>:<block>:<number>`."""
    entry = dataset.block_entry(block)
    return f"{entry.file}:{entry.key}:{index}"


def find_split_of_block(dataset: DataFolder, block: int) -> str:
    """Return the split that a block belongs to."""
    return next(split for split in SPLITS if block in dataset.table.blocks_of_split(split))


# ------------------------------------------------------------------------------------------------------ what is gathered


@dataclasses.dataclass(slots=True)
class Histogram:
    """Counts in bins of equal width, and how many values lie beyond them."""

    edges: FloatArray
    counts: FloatArray
    num_below: int = 0
    num_above: int = 0

    @classmethod
    def fit(cls, sample: FloatArray, *, least: float, low: float | None = None, whole: bool = False) -> "Histogram":
        """Choose bins that hold nearly all values like those of a sample.

        Args:
            sample: Values; none at all is fine.
            least: Width of all bins together, at least.
            low: Where the first bin starts; None: where the values do.
            whole: Values are whole numbers from one on, and bins are centred on such.
        """
        start, end = np.quantile(sample, [0.002, 0.998]) if len(sample) else (0.5 * least, 0.5 * least)
        bins = _BINS if end > start else _FEW_BINS
        if low is None:
            margin = max(0.05 * (end - start), 0.5 * (least - (end - start)))
            start, end = start - margin, end + margin
        else:
            start, end = low, max(low + 1.1 * (end - low), low + least)
        if whole:
            step = max(1, int(np.ceil((end - start) / bins)))
            start = max(np.floor(start), 1) - 0.5
            edges = start + step * np.arange(int(np.ceil((np.floor(end) + 0.5 - start) / step)) + 1)
        else:
            edges = np.linspace(start, end, bins + 1)
        return cls(edges, np.zeros(len(edges) - 1))

    def add(self, values: FloatArray) -> None:
        """Count some more values; what is not finite is passed over."""
        places = (values[np.isfinite(values)] - self.edges[0]) / (self.edges[1] - self.edges[0])
        inside = places[(places >= 0) & (places < len(self.counts))]
        np.add.at(self.counts, inside.astype(np.int64), 1)  # five times as fast as np.histogram for a few values
        self.num_below += int(np.count_nonzero(places < 0))
        self.num_above += int(np.count_nonzero(places >= len(self.counts)))

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum()) + self.num_below + self.num_above


@dataclasses.dataclass(frozen=True, slots=True)
class Outlier:
    """A conformer that a person should look at."""

    place: str
    """`<shard>:<block>:<number>`"""
    split: str
    graph: Graph
    reason: str


@dataclasses.dataclass(slots=True)
class Survey:
    """What was seen in a data set."""

    num_conformers: int
    """of the data set"""
    num_read: int = 0
    num_blocks: int = 0
    num_blocks_read: int = 0
    units: detective.UnitsVerdict | None = None
    band: gate.EnergyBand | None = None
    energies: Histogram | None = None
    """energies less baselines, meV/atom; None without any"""
    forces: Histogram | None = None
    """norms of the forces on single atoms, eV/Å; None without any"""
    sizes: Histogram | None = None
    """atoms"""
    neighbors: Histogram | None = None
    """per atom, mean over a conformer, within `NEIGHBOR_CUTOFF`"""
    atoms: Counter[int] = dataclasses.field(default_factory=Counter)
    """atoms of each element"""
    with_element: Counter[int] = dataclasses.field(default_factory=Counter)
    """conformers that have an element"""
    total_charges: Counter[str] = dataclasses.field(default_factory=Counter)
    unpaired_electrons: Counter[str] = dataclasses.field(default_factory=Counter)
    num_periodic: int = 0
    problems: Counter[str] = dataclasses.field(default_factory=Counter)
    """faulty conformers, which `so3krates validate` names all, for each reason"""
    doubts: Counter[str] = dataclasses.field(default_factory=Counter)
    num_off: int = 0
    """energies that are off the baselines"""
    damaged: list[str] = dataclasses.field(default_factory=list)
    worst: list[Outlier] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _Ranking:
    """The conformers with the largest values of something."""

    name: str
    heap: list[tuple[float, int, Placed, str]] = dataclasses.field(default_factory=list)

    def offer(self, score: float, order: int, placed: Placed, reason: str) -> None:
        """Keep a conformer if it is among the worst; of equal ones the first."""
        if len(self.heap) < NUM_WORST or (score, -order) > self.heap[0][:2]:
            copies: dict[str, Any] = {
                name: np.array(v) for name in _COPIED if (v := getattr(placed.graph, name)) is not None
            }
            kept = dataclasses.replace(placed, graph=dataclasses.replace(placed.graph, **copies))
            push = heapq.heappush if len(self.heap) < NUM_WORST else heapq.heappushpop
            push(self.heap, (score, -order, kept, reason))

    def sorted(self) -> list[tuple[Placed, str]]:
        """Return conformers and reasons, the worst first."""
        return [(placed, reason) for _, _, placed, reason in sorted(self.heap, key=lambda e: (-e[0], -e[1]))]


def survey_dataset(dataset: DataFolder, limit: int | None) -> Survey:
    """Look at a data set.

    Args:
        dataset: Where it is.
        limit: Read about so many conformers, in evenly spaced blocks; None: all.
    """
    survey = Survey(dataset.table.num_conformers, num_blocks=dataset.num_blocks)
    baselines = dataset.manifest.statistics.get("energy_baselines", {})
    _fit_ranges(dataset, survey, baselines)
    blocks = choose_blocks(dataset, limit)
    survey.num_blocks_read = len(blocks)
    rankings = (_Ranking("faulty"), _Ranking("energy"), _Ranking("force"))
    for order, placed in enumerate(iter_placed(dataset, blocks, survey.damaged)):
        _count(dataset, placed, survey)
        problem = gate.find_problem(placed.graph, np.inf)
        if problem is not None:
            survey.problems[problem.reason] += 1
            rankings[0].offer(0.0, order, placed, f"must {problem.rule}; got {problem.got}")
            continue
        survey.doubts.update(doubt.reason for doubt in gate.find_doubts(placed.graph))
        _count_neighbors(dataset, placed, survey)
        _look_at_energy(placed, order, baselines, survey, rankings[1])
        _look_at_forces(placed, order, survey, rankings[2])
    survey.worst = _choose_worst(dataset, rankings)
    return survey


def _fit_ranges(dataset: DataFolder, survey: Survey, baselines: Mapping[str, Any]) -> None:
    """Read a first sample: what is usual decides the bins, and what is unusual."""
    graphs = [p.graph for p in iter_placed(dataset, choose_blocks(dataset, _FIRST))]
    graphs = [g for g in graphs if gate.find_problem(g, np.inf) is None]
    if not graphs:
        return
    survey.units = detective.judge_units(graphs)
    residuals = np.array([r for g in graphs if (r := gate.compute_residual(g, baselines)) is not None])
    survey.band = gate.measure_energy_band(residuals)
    if len(residuals):
        survey.energies = Histogram.fit(1e3 * residuals, least=2.0)
    forces = [np.linalg.norm(g.forces, axis=1) for g in graphs if g.forces is not None]
    if forces:
        survey.forces = Histogram.fit(np.concatenate(forces), least=0.1, low=0.0)
    survey.sizes = Histogram.fit(np.array([g.num_atoms for g in graphs], np.float64), least=4.0, whole=True)
    neighbors = np.array([2 * count_pairs(g)[_CUT] / g.num_atoms for g in graphs[:200]])
    survey.neighbors = Histogram.fit(neighbors, least=4.0)


def _count(dataset: DataFolder, placed: Placed, survey: Survey) -> None:
    """Count what a conformer is, whether its labels can be believed or not."""
    graph = placed.graph
    survey.num_read += 1
    elements, counts = np.unique(graph.atomic_numbers, return_counts=True)
    survey.atoms.update(dict(zip(elements.tolist(), counts.tolist(), strict=True)))
    survey.with_element.update(elements.tolist())
    survey.total_charges[f"{graph.total_charge:g}"] += 1
    survey.unpaired_electrons[f"{graph.num_unpaired_electrons:g}"] += 1
    survey.num_periodic += graph.is_periodic
    if survey.sizes is not None:
        survey.sizes.add(np.array([graph.num_atoms], np.float64))


def _count_neighbors(dataset: DataFolder, placed: Placed, survey: Survey) -> None:
    """Count the neighbours of a sound conformer; the index knows them but in data sets of schema 1."""
    table, graph = dataset.table, placed.graph
    if survey.neighbors is None:
        return
    if isinstance(table, Index):
        pairs = int(table.sample_pairs[int(table.block_first[placed.block]) + placed.index][_CUT])
    else:
        pairs = int(count_pairs(graph)[_CUT])
    survey.neighbors.add(np.array([2 * pairs / graph.num_atoms]))


def _look_at_energy(
    placed: Placed, order: int, baselines: Mapping[str, Any], survey: Survey, ranking: _Ranking
) -> None:
    graph = placed.graph
    residual = gate.compute_residual(graph, baselines)
    if residual is None or survey.energies is None:
        return
    survey.energies.add(np.array([1e3 * residual]))
    if survey.band is not None:
        off, mads = residual - survey.band.median, survey.band.count_mads(residual)
        survey.num_off += survey.band.find_problem(residual, graph.num_atoms, graph.total_charge) is not None
        score = abs(off) / survey.band.find_limit(graph.num_atoms, graph.total_charge)
        ranking.offer(score, order, placed, f"energy {1e3 * off:+.0f} meV/atom off ({mads:.1f} median deviations)")


def _look_at_forces(placed: Placed, order: int, survey: Survey, ranking: _Ranking) -> None:
    graph = placed.graph
    if graph.forces is None or survey.forces is None:
        return
    norms = np.linalg.norm(graph.forces, axis=1)
    survey.forces.add(norms)
    atom = int(norms.argmax())
    name = f"{ELEMENT_SYMBOLS[graph.atomic_numbers[atom]]}{atom}"
    ranking.offer(float(norms[atom]), order, placed, f"force of {norms[atom]:.1f} eV/Å on {name}")


def _choose_worst(dataset: DataFolder, rankings: Sequence[_Ranking]) -> list[Outlier]:
    """Return the worst of each kind in turn, each conformer once with all its reasons."""
    reasons: dict[tuple[int, int], list[str]] = {}
    found: dict[tuple[int, int], Placed] = {}
    for entries in itertools.zip_longest(*(ranking.sorted() for ranking in rankings)):
        for placed, reason in filter(None, entries):
            key = (placed.block, placed.index)
            found.setdefault(key, placed)
            reasons.setdefault(key, []).append(reason)
    return [
        Outlier(name_place(dataset, *key), placed.split, placed.graph, "; ".join(reasons[key]))
        for key, placed in list(found.items())[:NUM_WORST]
    ]
