"""From shards to minibatches: reads the blocks that the plan asks for and builds graphs with neighbour pairs.

A training batch is a pure function of the step, so worker processes, resuming and the number of processes change nothing
about it. Evaluation reads a split from front to back.
"""

import functools
import signal
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from so3krates_dist.config import ModelSection, RunConfig
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.data.plan import Place, Plan
from so3krates_dist.data.shards import Block, BlockEntry, BlockReader, Manifest, ShardEntry, iter_graphs, load_manifest
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import DataError, So3kratesError
from so3krates_dist.graph import BoolArray, FloatArray, Graph, GraphBatch, check_box, collate


def _list_blocks(manifest: Manifest, split: str) -> list[tuple[ShardEntry, BlockEntry]]:
    blocks = [(shard, block) for shard in manifest.of_split(split) for block in shard.blocks]
    if not blocks:
        raise DataError(
            f"split `{split}` of {manifest.name}",
            "have conformers",
            "none",
            "Make the data set with a larger share for it",
        )
    return blocks


MAX_KEPT_ATOMS: Final = 200_000
"""A training split of at most so many atoms stays in memory"""

MAX_KEPT_PAIRS: Final = 5_000_000
"""So many neighbour pairs of these atoms stay in memory (16 bytes each, 40 in periodic structures); the others are found anew.
There are some 13 an atom within 5 Å, but hundreds within a long-range cutoff, and half as many as atoms where all pairs count"""


def check_allows_box(section: ModelSection, pbc: BoolArray | None, cell: FloatArray | None, where: str) -> None:
    """Raise `DataError` where a model cannot be used for a structure because of its periodic directions or its cell.

    Args:
        section: The model.
        pbc: (3,) whether the structure repeats along each lattice vector; None for a molecule.
        cell: (3, 3) Å; None where it is not known.
        where: File, split or structure, for the message.
    """
    check_box(pbc, cell, where, sees=section.sees, reach=section.reach, image_density=section.image_density)


class TrainingStream(Dataset[list[GraphBatch]]):
    """The batches of one process: item k is its micro-batches of step k.

    Args:
        folder: Data set.
        manifest: Of the data set.
        config: Batch size, lanes, window, seed, micro-batches, and the model's cutoff.
        rank: This process.
        world_size: Processes; divides the lanes.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: RunConfig, rank: int, world_size: int) -> None:
        self._blocks = _list_blocks(manifest, "train")
        self._reader = BlockReader(folder)
        self._cutoffs = config.model.cutoff, config.model.reach
        section, micro_batches = config.data, config.train.micro_batches
        self.plan = Plan(
            [b.num_conformers for _, b in self._blocks],
            batch_size=section.batch_size, lanes=section.lanes, window_blocks=section.window_blocks, seed=config.run.seed,
        )  # fmt: skip
        per_rank = section.lanes // world_size
        own = range(rank * per_rank, (rank + 1) * per_rank)
        per_micro = per_rank // micro_batches
        self._lanes = [own[i : i + per_micro] for i in range(0, per_rank, per_micro)]
        self._window: tuple[int, int] | None = None
        self._keeps = sum(b.num_atoms for _, b in self._blocks) <= MAX_KEPT_ATOMS
        self._kept: dict[tuple[int, int], Graph] = {}
        self._num_kept_pairs = 0
        self._model = config.model
        self._lane_graphs: dict[int, list[list[Graph]]] = {}

    def __getitem__(self, step: int) -> list[GraphBatch]:
        """Return the micro-batches of this process at a step; one may be empty where a batch has few conformers."""
        place = self.plan.locate(step)
        if self._window != (place.epoch, place.window):
            self._lane_graphs = self._load_window(place)
            self._window = (place.epoch, place.window)
        batches = []
        for lanes in self._lanes:
            graphs = [g for lane in lanes for g in self._lane_graphs[lane][place.slot]]
            batches.append(collate([self._add_pairs(g) for g in graphs]))
        return batches

    def _add_pairs(self, graph: Graph) -> Graph:
        """Return a conformer with its pairs, found the first time it is used where conformers are kept."""
        if graph.pair_first is not None:
            return graph
        check_allows_box(self._model, graph.pbc, graph.cell, graph.group or "structure")
        complete = build_neighbors(graph, *self._cutoffs)
        assert complete.pair_first is not None
        if self._keeps and self._num_kept_pairs + len(complete.pair_first) <= MAX_KEPT_PAIRS:
            self._num_kept_pairs += len(complete.pair_first)
            graph.pair_first, graph.pair_second = complete.pair_first, complete.pair_second
            graph.pair_shifts, graph.num_short_pairs = complete.pair_shifts, complete.num_short_pairs
        return complete

    def _load_window(self, place: Place) -> dict[int, list[list[Graph]]]:
        """Read the blocks of this process's lanes; return for each lane the conformers of each slot."""

        @functools.cache
        def read(block: int) -> Block:
            return self._reader.read(*self._blocks[block])

        def get(block: int, index: int) -> Graph:
            graph = self._kept.get((block, index)) or read(block).graph(index)
            if self._keeps:
                self._kept[block, index] = graph
            return graph

        lanes: dict[int, list[list[Graph]]] = {}
        for lane in (lane for group in self._lanes for lane in group):
            rows = self.plan.rows_of_lane(place, lane)
            graphs = [get(int(block), int(index)) for block, index in rows]
            costs = np.array([estimate_cost(g.num_atoms) for g in graphs])
            slots = self.plan.slots_of_lane(place, lane, costs)
            dealt: list[list[Graph]] = [[] for _ in range(self.plan.num_slots(place))]
            for graph, slot in zip(graphs, slots, strict=True):
                dealt[slot].append(graph)
            lanes[lane] = dealt
        return lanes


def estimate_cost(num_atoms: int) -> float:
    """Return the cost of a conformer in neighbour pairs before they are known: half of at most 27 neighbours an atom.

    Neighbours within 5 Å in SPICE's geometries grow from 4.5 at 5 atoms to 27 at 90; an atom costs about 6 edges.
    """
    neighbors = min(num_atoms - 1, 27)
    return num_atoms * (neighbors + 6) / 2


def build_loader(
    stream: TrainingStream, steps: Sequence[int], *, num_workers: int, device: torch.device
) -> Generator[list[GraphBatch], None, None]:
    """Yield the steps' micro-batches, prepared ahead where there are worker processes; close it to end them.

    Raises:
        DataError: A block is damaged; the same error, whichever process found it.
    """
    # Forking a process that has started CUDA is not safe; a fork server has not.
    context = "forkserver" if device.type == "cuda" else None
    options: dict[str, Any] = {
        "multiprocessing_context": context,
        "worker_init_fn": _start_worker,
        "prefetch_factor": 2,
    }
    loader = DataLoader(
        _Carrier(stream),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        **(options if num_workers else {}),
    )
    for item in loader:
        if isinstance(item, So3kratesError):
            raise item
        yield item


class _Carrier(Dataset[list[GraphBatch] | So3kratesError]):
    """Hands errors over as items: torch would turn those of a worker process into a RuntimeError with a traceback."""

    def __init__(self, stream: TrainingStream) -> None:
        self._stream = stream

    def __getitem__(self, step: int) -> list[GraphBatch] | So3kratesError:
        try:
            return self._stream[step]
        except So3kratesError as error:
            return error


def _start_worker(_number: int) -> None:
    """Ignore the signals that ask a run to stop: the training process decides, and needs its workers until then."""
    torch.set_num_threads(1)
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


def iter_batches(
    folder: Path,
    split: str,
    *,
    batch_size: int,
    cutoffs: tuple[float, float],
    rank: Rank | None = None,
    limit: int = 0,
) -> Iterator[GraphBatch]:
    """Yield batches of a split for evaluation: every conformer once, batches dealt to the processes in turn.

    Args:
        folder: Data set.
        split: `train`, `validation` or `test`.
        batch_size: Conformers per batch.
        cutoffs: Å, the model's cutoff and reach.
        rank: This process, and how many there are; None: the only one.
        limit: Stop after that many conformers; 0: all.

    Raises:
        DataError: The split is empty, or a shard is damaged.
    """
    rank = rank or Rank()
    manifest = load_manifest(folder)
    _list_blocks(manifest, split)  # refuses an empty split
    waiting: list[Graph] = []
    number = 0
    for count, graph in enumerate(iter_graphs(folder, manifest, split)):
        if limit and count == limit:
            break
        waiting.append(graph)
        if len(waiting) == batch_size:
            if number % rank.world_size == rank.rank:
                yield collate([build_neighbors(g, *cutoffs) for g in waiting])
            waiting, number = [], number + 1
    if waiting and number % rank.world_size == rank.rank:
        yield collate([build_neighbors(g, *cutoffs) for g in waiting])
