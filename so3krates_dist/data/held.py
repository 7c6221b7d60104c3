"""Blocks of several data sets in memory: read once, in the order in which they are stored, whoever asks for which conformer.

What lies between the plan, which names conformers by source, block and place in the block, and the columns from which batches are
made. Gives conformers their names in messages, and keeps a record of blocks that were left out since they are damaged.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from so3krates_dist.data.batching import Table
from so3krates_dist.data.mixture import Source
from so3krates_dist.data.neighbors import NeighborPairs
from so3krates_dist.errors import DataError
from so3krates_dist.graph import IntArray


class HeldBlocks:
    """Some blocks of several sources in memory, and the neighbour pairs of their conformers as far as they are kept.

    Args:
        sources: Data sets.
        blocks: (num_blocks, 2) source and block, ascending, each once.
        max_kept_pairs: Pairs that are kept once they have been found.
        for_training: Whether the weights of sources in the loss are multiplied in.
    """

    def __init__(
        self, sources: Sequence[Source], blocks: IntArray, max_kept_pairs: int = 0, *, for_training: bool = False
    ) -> None:
        self._sources, self._blocks, self._keys = sources, blocks, _to_keys(blocks[:, 0], blocks[:, 1])
        self._loss_weights = [s.loss_weight if for_training else 1.0 for s in sources]
        self._num_kept_pairs, self._max_kept_pairs = 0, max_kept_pairs
        self._kept_pairs: dict[int, NeighborPairs] = {}
        self._complaints: dict[int, str] = {}
        self.table = Table(*count_sizes(sources, blocks))

    def load(self, blocks: IntArray, *, skip_damaged: bool = False) -> None:
        """Read those of some blocks that have not been read yet, in the order in which they are stored.

        Args:
            blocks: (num_blocks, 2) source and block.
            skip_damaged: Leave out blocks that are damaged, instead of raising.

        Raises:
            DataError: A block is damaged.
        """
        places = np.sort(np.searchsorted(self._keys, _to_keys(blocks[:, 0], blocks[:, 1])))
        lost: dict[tuple[int, int], str] = {}
        for place in places[~self.table.is_there[self.table.first_row[places]]].tolist():
            source, block = self._blocks[place].tolist()
            table = self._sources[source].data.table
            shard = source, int(table.block_shard[block + _get_start(self._sources[source])])
            if shard in lost:  # a file that is not there would be fetched again for every block
                self._complaints[place] = lost[shard]
                continue
            try:
                self.table.put(place, self._sources[source].read_block(block), self._loss_weights[source])
                self._complaints.pop(place, None)
            except DataError as error:
                if not skip_damaged:
                    raise
                self._complaints[place] = str(error)
                if not error.where.startswith(self._sources[source].where(block)):
                    lost[shard] = str(error)

    def find_rows(self, sources: npt.NDArray[Any], blocks: npt.NDArray[Any], indices: npt.NDArray[Any]) -> IntArray:
        """Return the rows of the table in which conformers are; each array is (num_conformers,)."""
        rows: IntArray = self.table.first_row[np.searchsorted(self._keys, _to_keys(sources, blocks))] + indices
        return rows

    def list_complaints(self, rows: IntArray) -> tuple[str, ...]:
        """Return what is wrong with the blocks of conformers that are not there, one line for each block."""
        places = sorted(set(self._find_places(rows).tolist())) if len(rows) else ()
        return tuple(self._complaints[place] for place in places)

    def name_row(self, row: int) -> str:
        """Return the name of a conformer in messages, `<shard>:<block>:<index>` and its group."""
        place = int(self._find_places(np.array(row)))
        source, block = self._blocks[place].tolist()
        group = self.table.get_group(row)
        index = row - int(self.table.first_row[place])
        return f"{self._sources[source].where(block)}:{index}{group and f' ({group})'}"

    def _find_places(self, rows: IntArray) -> IntArray:
        return np.searchsorted(self.table.first_row, rows, side="right") - 1

    def assemble(self, rows: IntArray, cutoffs: tuple[float, float]) -> torch.Tensor:
        """Return the bytes of a batch with its neighbour pairs, see `Table.assemble`.

        Args:
            rows: (num_graphs,) rows of the table.
            cutoffs: Å, of the short pairs and of all pairs.

        Raises:
            DataError: Two atoms coincide, or the like.
        """
        kept = self._kept_pairs
        return self.table.assemble(rows, [kept.get(row) or self._find_pairs(row, cutoffs) for row in rows.tolist()])

    def _find_pairs(self, row: int, cutoffs: tuple[float, float]) -> NeighborPairs:
        try:
            pairs = self.table.find_pairs(row, *cutoffs)
        except DataError as error:
            raise DataError(self.name_row(row), error.rule, error.got, error.remedy) from error
        if self._num_kept_pairs + len(pairs.first) <= self._max_kept_pairs:
            self._num_kept_pairs += len(pairs.first)
            self._kept_pairs[row] = pairs
        return pairs


def _to_keys(sources: npt.NDArray[Any], blocks: npt.NDArray[Any]) -> IntArray:
    keys: IntArray = (sources.astype(np.int64) << 40) + blocks
    return keys


def count_sizes(sources: Sequence[Source], blocks: IntArray) -> tuple[IntArray, IntArray]:
    """Return (num_blocks,) conformers and atoms of some blocks."""
    conformers, atoms = np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.int64)
    for number, source in enumerate(sources):
        own, table = blocks[:, 0] == number, source.data.table
        places = blocks[own, 1] + _get_start(source)
        conformers[own] = table.block_first[places + 1] - table.block_first[places]
        atoms[own] = table.block_atoms[places]
    return conformers, atoms


def _get_start(source: Source) -> int:
    """Return the number of the first training block, from which sources count their blocks."""
    return source.data.table.blocks_of_split("train").start


def _get_shard(source: Source, block: int) -> int:
    return int(source.data.table.block_shard[_get_start(source) + block])


def list_blocks(sources: Sequence[Source], split: str) -> IntArray:
    """Return (num_blocks, 2) source and block of all blocks of a split."""
    parts = [np.zeros((0, 2), np.int64)]
    for number, source in enumerate(sources):
        blocks = np.array(source.data.table.blocks_of_split(split), np.int64) - _get_start(source)
        parts.append(np.stack([np.full(len(blocks), number), blocks], axis=1))
    return np.concatenate(parts)
