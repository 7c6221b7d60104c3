"""Which conformers are measured with: found by their sizes alone, and only they are read."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from analytic import label, make_cluster, make_morse

from so3krates_dist.data.codec import Block, decode_block, encode_block
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.graph import Graph
from so3krates_dist.train import probes
from so3krates_dist.train.probes import collect_probes

CUTOFFS = (4.0, 4.0)


class Blocks:
    """Blocks of real conformers, and a record of what was asked for."""

    def __init__(self, *blocks: Sequence[Graph]) -> None:
        self._blocks = [encode_block(block) for block in blocks]
        self._graphs = [[build_neighbors(g, *CUTOFFS) for g in block] for block in blocks]
        self.block_sizes = np.array([len(block) for block in blocks], np.int32)
        self.read: list[int] = []
        self.asked: list[int] = []

    def sizes(self, blocks: Any) -> tuple[Any, Any]:
        self.asked.append(int(self.block_sizes[blocks].sum()))
        graphs = [g for block in blocks for g in self._graphs[block]]
        return np.array([g.num_atoms for g in graphs]), np.array([g.num_short_pairs for g in graphs])

    def read_block(self, block: int) -> Block:
        self.read.append(block)
        return decode_block(self._blocks[block])


def make_source(*sizes: Sequence[int], first_seed: int = 0) -> Blocks:
    """Return blocks of labelled clusters of so many atoms."""
    seeds, potential = itertools.count(first_seed), make_morse()
    return Blocks(*[[label(make_cluster(next(seeds), num_atoms=n), potential) for n in block] for block in sizes])


def count(graph: Graph) -> int:
    assert graph.pair_first is not None
    return len(graph.pair_first)


class TestChoice:
    def test_the_heaviest_of_all_sources_comes_first(self) -> None:
        sources = [make_source([4, 5, 6], [7, 4]), make_source([5, 8], [6, 20, 5], [4, 4], first_seed=50)]
        found = collect_probes(sources, CUTOFFS)
        assert found.graphs[0].num_atoms == found.atoms[0] == found.most_atoms == 20
        assert found.pairs[0] == found.most_pairs == max(found.pairs)

    def test_sizes_are_those_of_the_conformers_that_were_read(self) -> None:
        found = collect_probes([make_source([4, 15, 6], [7, 4], [9])], CUTOFFS)
        assert found.atoms == tuple(g.num_atoms for g in found.graphs)
        assert found.pairs == tuple(count(g) for g in found.graphs)
        assert all(g.forces is not None for g in found.graphs), "with labels, or the pass would not be a real one"

    def test_the_ratio_is_that_of_the_whole_split(self) -> None:
        sources = [make_source([4, 5, 6], [7, 14]), make_source([5, 8], first_seed=9)]
        sizes = [source.sizes(np.arange(len(source.block_sizes))) for source in sources]
        atoms, pairs = (np.concatenate(parts) for parts in zip(*sizes, strict=True))
        assert collect_probes(sources, CUTOFFS).pairs_per_atom == pytest.approx(pairs.sum() / atoms.sum())

    def test_few_and_many_pairs_per_atom_are_among_them(self) -> None:
        source = make_source([3] * 30, [40] * 2, [12] * 10)
        found = collect_probes([source], CUTOFFS)
        ratios = [pairs / atoms for pairs, atoms in zip(found.pairs, found.atoms, strict=True)]
        assert min(found.atoms) == 3
        assert max(ratios) > 2 * min(ratios)
        assert 1 < len(found.graphs) <= 4

    def test_a_single_conformer_is_enough(self) -> None:
        found = collect_probes([make_source([6])], CUTOFFS)
        assert found.atoms == (6,)
        assert found.most_pairs == found.pairs[0]

    def test_every_process_chooses_the_same(self) -> None:
        first, second = (collect_probes([make_source([4, 15, 6], [7, 4], [9])], CUTOFFS) for _ in range(2))
        assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first.graphs, second.graphs, strict=True))


class TestLargeDataSets:
    def test_only_chosen_blocks_are_read(self) -> None:
        source = make_source(*[[5, 6]] * 20)
        found = collect_probes([source], CUTOFFS)
        assert len(source.read) == len(found.graphs)

    def test_sizes_are_looked_at_in_portions_and_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The heaviest is found all the same, and everything adds up."""
        monkeypatch.setattr(probes, "MAX_SAMPLED", 8)
        blocks = [[4, 5, 4], [6], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [4, 7], [4, 30, 4], [5, 5]]
        source = make_source(*blocks)
        found = collect_probes([source], CUTOFFS)
        assert source.asked == [4, 10, 7], "portions of eight conformers, or of one block"
        assert sum(source.asked) == sum(map(len, blocks))
        assert found.atoms[0] == 30
        atoms, pairs = source.sizes(np.arange(len(blocks)))
        assert found.pairs_per_atom == pytest.approx(pairs.sum() / atoms.sum())
