"""Which conformers stand for all of them where the memory and the time of passes are measured (budget.py).

They are chosen by the sizes in the index, and only they are read.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import numpy as np

from so3krates_dist.data.codec import Block
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph, IntArray

MAX_SAMPLED: Final = 100_000
"""conformers among which probes are chosen, besides the heaviest of all"""
QUANTILES: Final = (0.05, 0.5, 0.95)
"""of pairs per atom: conformers that are measured besides the heaviest"""


class Source(Protocol):
    """What is asked of a data set; one of a `Mixture` is a source."""

    @property
    def block_sizes(self) -> IntArray:
        """(num_blocks,) conformers of each training block."""

    def read_block(self, block: int) -> Block:
        """Return a training block."""

    def sizes(self, blocks: IntArray) -> tuple[IntArray, IntArray]:
        """Return atoms and estimated pairs of all conformers of some blocks, one block after another."""


@dataclasses.dataclass(frozen=True)
class Probes:
    """Conformers of the training split that stand for all of them where passes are measured."""

    graphs: tuple[Graph, ...]
    """with their pairs; the heaviest, and typical ones of few and many pairs per atom"""
    atoms: tuple[int, ...]
    """of each"""
    pairs: tuple[int, ...]
    """of each, as the plan estimates them"""
    most_atoms: int
    """of one conformer of the training split"""
    most_pairs: int
    """of one conformer of the training split"""
    pairs_per_atom: float
    """in the whole training split"""

    def add_up(self, chosen: Sequence[int]) -> tuple[int, int]:
        """Return the atoms and the pairs of a batch of probes, which may be in it several times."""
        return sum(self.atoms[i] for i in chosen), sum(self.pairs[i] for i in chosen)


def collect_probes(sources: Sequence[Source], cutoffs: tuple[float, float]) -> Probes:
    """Choose and read conformers to measure with: the heaviest, and others with typical numbers of pairs per atom.

    The result is the same on all processes, and involves none of the others.

    Args:
        sources: Data sets of the run.
        cutoffs: Å, the model's cutoff and reach.

    Raises:
        DataError: A block is damaged.
    """
    all_sizes = [np.asarray(source.block_sizes, np.int64) for source in sources]
    survey = _Survey(sum(int(counts.sum()) for counts in all_sizes))
    for number, (source, counts) in enumerate(zip(sources, all_sizes, strict=True)):
        for first, last in _cut_blocks(counts):
            survey.look(number, np.arange(first, last), counts[first:last], *source.sizes(np.arange(first, last)))
    places = survey.choose()
    graphs = [build_neighbors(sources[n].read_block(block).graph(index), *cutoffs) for n, block, index in places]
    atoms, pairs = zip(*(survey.sizes[place] for place in places), strict=True)
    return Probes(
        graphs=tuple(graphs), atoms=atoms, pairs=pairs, most_atoms=survey.most_atoms, most_pairs=survey.most_pairs,
        pairs_per_atom=survey.sum_pairs / survey.sum_atoms,
    )  # fmt: skip


def _cut_blocks(block_sizes: IntArray) -> Iterator[tuple[int, int]]:
    """Yield ranges of blocks of at most `MAX_SAMPLED` conformers (or of one block), so that an index of any size can be read."""
    ends = np.cumsum(block_sizes, dtype=np.int64)
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + MAX_SAMPLED, "right")))
        yield first, last
        first = last


Place = tuple[int, int, int]
"""of a conformer: source, block, number in the block"""


class _Survey:
    """Goes through the sizes of all conformers, and keeps what is needed to choose from them.

    Args:
        num_conformers: Of all sources together.
    """

    def __init__(self, num_conformers: int) -> None:
        self._stride = -(-num_conformers // MAX_SAMPLED)
        self._kept: list[Place] = []
        self._heaviest: Place | None = None
        self._largest = -1
        self.sizes: dict[Place, tuple[int, int]] = {}
        self.most_atoms = self.most_pairs = self.sum_atoms = self.sum_pairs = 0

    def look(self, number: int, blocks: IntArray, counts: IntArray, atoms: IntArray, pairs: IntArray) -> None:
        """Take note of the conformers of some blocks.

        Args:
            number: Of the source.
            blocks: (num_blocks,) numbers of its training blocks.
            counts: (num_blocks,) conformers of each.
            atoms: (num_conformers,) of all of them, one block after another.
            pairs: (num_conformers,)
        """
        block = np.repeat(blocks, counts)
        index = np.arange(len(atoms)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.sum_atoms += int(atoms.sum())
        self.sum_pairs += int(pairs.sum())
        self.most_atoms = max(self.most_atoms, int(atoms.max()))
        self.most_pairs = max(self.most_pairs, int(pairs.max()))

        def keep(row: int) -> Place:
            place = (number, int(block[row]), int(index[row]))
            self.sizes[place] = int(atoms[row]), int(pairs[row])
            return place

        sizes = atoms + pairs
        heaviest = int(sizes.argmax())
        if sizes[heaviest] > self._largest:
            self._largest, self._heaviest = int(sizes[heaviest]), keep(heaviest)
        self._kept += [keep(row) for row in range(0, len(atoms), self._stride)]

    def choose(self) -> list[Place]:
        """Return the places of the probes, each once, the heaviest first."""
        assert self._heaviest is not None, "a training split is never empty"
        atoms, pairs = np.array([self.sizes[place] for place in self._kept], np.float64).T
        order = np.argsort(pairs / atoms, kind="stable")
        shares = np.cumsum(atoms[order]) / atoms.sum()
        rows = order[np.searchsorted(shares, QUANTILES)]
        return list(dict.fromkeys([self._heaviest, *(self._kept[int(row)] for row in rows)]))
