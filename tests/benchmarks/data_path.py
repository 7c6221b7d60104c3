"""The way of conformers from disk to minibatches: shards here, WebDataset's own loader, and LMDB, on the same conformers.

    OMP_NUM_THREADS=1 python tests/benchmarks/data_path.py [--conformers N] [--plan-conformers N] [--folder FOLDER]

Conformers are random molecules of 40 to 80 atoms with about 23 neighbours an atom within 5 Å, with energies and forces. Each
store is read in random order (WebDataset's tars from front to back, which is all they can); batches of 256 are `GraphBatch` in
every case. Costs are CPU time of this process, best of three rounds, page cache warm; with worker processes, time on the clock.
The plan is that of an index of 100 million conformers, in a process of its own. Needs `lmdb` and `msgpack` besides the package.
Results: data_path.md.
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import torch
import webdataset

from so3krates_dist.config import RunConfig, load_config
from so3krates_dist.data import shards
from so3krates_dist.data import stream as stream_module
from so3krates_dist.data.batching import unpack
from so3krates_dist.data.folder import open_dataset
from so3krates_dist.data.held import HeldBlocks
from so3krates_dist.data.index import FLAGS, PAIR_CUTOFFS, map_index
from so3krates_dist.data.layout import build_header, sort_columns
from so3krates_dist.data.mixture import Mixture, Source
from so3krates_dist.data.neighbors import NeighborPairs, build_neighbors
from so3krates_dist.data.plan import Plan, PlanSettings
from so3krates_dist.data.statistics import compute_statistics
from so3krates_dist.data.stream import TrainingStream, build_loader
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.train.planning import build_schedule

BATCH, BLOCK, CUTOFF, ROUNDS = 256, 128, 5.0, 3
CPU = torch.device("cpu")
NOTHING = np.zeros(0, np.int64)


# ------------------------------------------------------------------------------------------------------------- conformers


def make_graphs(count: int) -> list[Graph]:
    """Return random molecules at 0.094 atoms/Å³."""
    rng = np.random.default_rng(0)
    graphs = []
    for number in range(count):
        num_atoms = int(rng.integers(40, 81))
        size = (num_atoms / 0.094) ** (1 / 3)
        graphs.append(
            Graph(
                atomic_numbers=rng.choice([1, 6, 7, 8], num_atoms).astype(np.uint8),
                positions=rng.uniform(0, size, (num_atoms, 3)).astype(np.float32),
                energy=float(rng.normal(-1e4, 1)),
                forces=rng.normal(size=(num_atoms, 3)).astype(np.float32),
                group=f"molecule{number % 50}",
            )
        )
    return graphs


def write_blocks(folder: Path, graphs: list[Graph]) -> int:
    """Write a data set of this package; returns its bytes."""
    folder.mkdir()
    index = shards.IndexBuilder(folder)
    entries = shards.write_shards(folder, "train", graphs, block_size=BLOCK, blocks_per_shard=64, index=index)
    manifest = shards.build_manifest(
        name="random", level_of_theory="none", licence="unknown", splits={}, groups={},
        statistics=compute_statistics(graphs[:500], None), provenance={}, shards=entries,
    )  # fmt: skip
    shards.write_index_and_manifest(folder, manifest, index)
    return count_bytes(folder)


def to_fields(graph: Graph) -> dict[str, Any]:
    """Return what the other stores keep of a conformer."""
    return {
        "numbers": graph.atomic_numbers, "positions": graph.positions, "forces": graph.forces,
        "scalars": np.array([graph.energy, graph.total_charge, graph.num_unpaired_electrons]), "group": graph.group,
    }  # fmt: skip


def from_fields(fields: dict[str, Any]) -> Graph:
    """Return the conformer again."""
    energy, charge, spin = fields["scalars"].tolist()
    return Graph(
        atomic_numbers=fields["numbers"], positions=fields["positions"], forces=fields["forces"], energy=energy,
        total_charge=charge, num_unpaired_electrons=spin, group=str(fields["group"]),
    )  # fmt: skip


def write_npz(folder: Path, graphs: list[Graph]) -> int:
    """Write WebDataset tars with one .npz per conformer; returns their bytes."""
    folder.mkdir()
    for first in range(0, len(graphs), BATCH):
        path = folder / f"{first:08d}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for number, graph in enumerate(graphs[first : first + BATCH], first):
                buffer = io.BytesIO()
                np.savez(buffer, **to_fields(graph))
                writer.write({"__key__": f"{number:08d}", "npz": buffer.getvalue()})
    return count_bytes(folder)


def write_lmdb(folder: Path, graphs: list[Graph]) -> int:
    """Write an LMDB of msgpack maps of raw bytes; returns its bytes."""
    with lmdb.open(str(folder), map_size=2**34) as store, store.begin(write=True) as transaction:
        for number, graph in enumerate(graphs):
            fields = {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in to_fields(graph).items()}
            transaction.put(f"{number:08d}".encode(), msgpack.packb(fields))
    return count_bytes(folder)


def count_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes up on disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


# --------------------------------------------------------------------------------------------------------------- reading


def read_npz(folder: Path) -> Iterator[Graph]:
    """Read the tars with WebDataset's own loader and decoder."""
    names = sorted(str(f) for f in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(names, shardshuffle=False).decode():
        yield from_fields(sample["npz"])


def read_lmdb(folder: Path, order: Iterable[int]) -> Iterator[Graph]:
    """Read conformers from LMDB by their number."""
    dtypes = {"numbers": np.uint8, "positions": np.float32, "forces": np.float32, "scalars": np.float64}
    with lmdb.open(str(folder), readonly=True, lock=False) as store, store.begin(buffers=True) as transaction:
        for number in order:
            fields = msgpack.unpackb(transaction.get(f"{number:08d}".encode()))
            arrays: dict[str, Any] = {name: np.frombuffer(fields[name], dtype) for name, dtype in dtypes.items()}
            arrays["positions"], arrays["forces"] = arrays["positions"].reshape(-1, 3), arrays["forces"].reshape(-1, 3)
            yield from_fields(arrays | {"group": fields["group"]})


def to_batches(graphs: Iterator[Graph], *, with_pairs: bool) -> Iterator[GraphBatch]:
    """Make batches as this package did before it had `Table`."""

    def prepare(graph: Graph) -> Graph:
        if with_pairs:
            return build_neighbors(graph, CUTOFF)
        graph.pair_first = graph.pair_second = NOTHING
        return graph

    waiting: list[Graph] = []
    for graph in graphs:
        waiting.append(prepare(graph))
        if len(waiting) == BATCH:
            yield collate(waiting)
            waiting = []
    if waiting:
        yield collate(waiting)


def read_columns(folder: Path) -> Iterator[int]:
    """Decode all blocks."""
    with open_dataset(folder) as data:
        for block in data.iter_blocks("train"):
            yield len(block)


def read_planned(stream: TrainingStream, steps: range) -> Iterator[GraphBatch]:
    """Make batches without pairs, as a `TrainingStream` makes them with pairs."""
    plan, number = stream._schedule.locate(0)[0], -1
    for step in steps:
        at, slot = plan.locate(step)
        if at != number:
            window, number = plan.window(at), at
            blocks = HeldBlocks(plan.sources, needed := window.blocks_of_lanes(range(window.num_lanes)))
            blocks.load(needed)
        members = window.rows_of_lanes(range(window.num_lanes), slot)
        rows = blocks.find_rows(window.source[members], window.block[members], window.index[members])
        none = NeighborPairs(NOTHING, NOTHING, None, 0)
        yield unpack(blocks.table.assemble(rows, [none] * len(rows)))


# -------------------------------------------------------------------------------------------------------------- measuring


def measure(count: int, run: Callable[[], Iterable[Any]], *, clock: Callable[[], float] = time.process_time) -> float:
    """Return the microseconds per conformer of the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = clock()
        for _item in run():
            pass
        best = min(best, clock() - start)
    return best / count * 1e6


def show(name: str, microseconds: float, note: str = "") -> None:
    """Print a line of the table."""
    print(f"| {name} | {microseconds:.1f} | {1e6 / microseconds:,.0f} | {note} |", flush=True)


def make_config(folder: Path, count: int) -> RunConfig:
    """Return a configuration with batches of 256, windows of the whole set, and 8 lanes."""
    settings = ("data.verify=size", f"data.window_blocks={count // BLOCK}", f"data.batch_size={BATCH}", "data.lanes=8")
    return load_config([f"data.folder={folder}", f"model.cutoff={CUTOFF}", *settings])


def compare_stores(folder: Path, count: int) -> None:
    """Print what each store costs from disk to batch."""
    stream_module.MAX_KEPT_ATOMS = 0  # a data set too large to keep
    graphs = make_graphs(count)
    few = max(BATCH, count // 4)  # of the slow one
    blocks, npz, store = folder / "blocks", folder / "npz", folder / "lmdb"
    sizes = write_blocks(blocks, graphs) / count, write_npz(npz, graphs[:few]) / few, write_lmdb(store, graphs) / count
    order = np.random.default_rng(1).permutation(count).tolist()
    print("\n| store, and how far | µs per conformer | conformers/s/core | |\n|---|---|---|---|")
    show("WebDataset, one .npz each: decoded", measure(few, lambda: read_npz(npz)), f"{sizes[1]:,.0f} bytes each")
    for pairs in (False, True):
        name = f"- batches {'with' if pairs else 'without'} pairs"
        show(name, measure(few, lambda pairs=pairs: to_batches(read_npz(npz), with_pairs=pairs)))
    show("LMDB of msgpack: decoded", measure(count, lambda: read_lmdb(store, order)), f"{sizes[2]:,.0f} bytes each")
    for pairs in (False, True):
        name = f"- batches {'with' if pairs else 'without'} pairs"
        show(name, measure(count, lambda pairs=pairs: to_batches(read_lmdb(store, order), with_pairs=pairs)))
    show("blocks here: decoded", measure(count, lambda: read_columns(blocks)), f"{sizes[0]:,.0f} bytes each")
    config = make_config(blocks, count)
    schedule, _ = build_schedule(config, Mixture.open(config.data, config.model), None, 0)
    plan = schedule.locate(0)[0]
    steps = range(plan.steps_per_window * plan.windows_per_epoch)
    stream = TrainingStream(schedule, config, 0, 1)
    show("- batches without pairs", measure(count, lambda: read_planned(stream, steps)), "with the plan")
    show("- batches with pairs", measure(count, lambda: (stream[s] for s in steps)), "with the plan")
    sums = np.zeros(3, np.int64)
    for step in steps[:8]:
        for batch in stream[step].batches:
            sums += batch.num_graphs, len(batch.atomic_numbers), len(batch.pair_first)
    print(f"\n{sums[1] / sums[0]:.1f} atoms and {sums[2] / sums[0]:.0f} pairs per conformer")
    use_workers(stream, steps, count, npz, few)


def use_workers(stream: TrainingStream, steps: range, count: int, npz: Path, few: int) -> None:
    """Print the rates on the clock through worker processes, and the CPU time of all processes together."""
    print("\n| workers | µs on the clock | conformers/s | CPU time: training process, all |\n|---|---|---|---|")

    def load(num_workers: int) -> Iterator[Any]:
        with contextlib.closing(build_loader(stream, steps, num_workers=num_workers, device=CPU)) as loader:
            yield from loader

    names = sorted(map(str, npz.glob("*.tar")))
    dataset = webdataset.WebDataset(names, shardshuffle=False).decode().map(prepare_npz)
    batched = dataset.batched(BATCH, collation_fn=collate)
    for num_workers in (1, 2):
        show_workers(f"{num_workers}, blocks here, batches with pairs", count, lambda n=num_workers: load(n))
    for num_workers in (1, 2):
        loader = webdataset.WebLoader(batched, batch_size=None, num_workers=num_workers)
        show_workers(f"{num_workers}, WebDataset's loader, the same", few, lambda loader=loader: loader)


def show_workers(name: str, count: int, run: Callable[[], Iterable[Any]]) -> None:
    """Print a line of the table; CPU times are those of the last round."""
    best, own, everything = float("inf"), 0.0, 0.0
    for _ in range(ROUNDS):
        start, before = time.perf_counter(), os.times()
        for _item in run():
            pass
        gc.collect()  # ends worker processes, whose time counts from then on
        after = os.times()
        best = min(best, time.perf_counter() - start)
        own = after.user + after.system - before.user - before.system
        everything = own + after.children_user + after.children_system - before.children_user - before.children_system
    show(name, best / count * 1e6, f"{own / count * 1e6:.1f} µs, {everything / count * 1e6:.1f} µs")


def prepare_npz(sample: dict[str, Any]) -> Graph:
    """Return the structure of a WebDataset sample with its pairs."""
    return build_neighbors(from_fields(sample["npz"]), CUTOFF)


# -------------------------------------------------------------------------------------------------------------- the plan


def write_index(path: Path, num_conformers: int) -> None:
    """Write an index of so many conformers in blocks of 128, a million of them again and again."""
    rng = np.random.default_rng(0)
    num_blocks, unit = num_conformers // BLOCK, 8192 * BLOCK
    atoms = np.clip(np.rint(rng.lognormal(np.log(45), 0.62, unit)), 2, 350).astype(np.uint32)
    shares = np.minimum(np.array(PAIR_CUTOFFS) ** 3 / CUTOFF**3 * 11, (atoms[:, None] - 1) / 2)
    per_sample = {
        "sample_atoms": atoms, "sample_pairs": np.rint(atoms[:, None] * shares).astype(np.uint32),
        "sample_flags": np.full(unit, FLAGS["energy"] | FLAGS["forces"], np.uint8),
    }  # fmt: skip
    sums = {
        n: np.resize(v.reshape(8192, BLOCK, -1).sum(1, np.int64), (num_blocks, v.size // unit))
        for n, v in per_sample.items()
    }
    number = np.arange(num_blocks)
    per_block = {
        "block_shard": (number // 256).astype(np.int32), "block_offset": number % 256 * 200_000 + 512,
        "block_size": np.full(num_blocks, 190_000), "block_crc32": number.astype(np.uint32),
        "block_first": np.arange(num_blocks + 1) * BLOCK, "block_atoms": sums["sample_atoms"][:, 0],
        "block_pairs": sums["sample_pairs"], "block_max_atoms": np.full(num_blocks, 350, np.uint32),
        "block_max_pairs": np.full((num_blocks, len(PAIR_CUTOFFS)), 60_000, np.uint32),
    }  # fmt: skip
    shapes = {n: (v.dtype, v.shape) for n, v in per_block.items()}
    shapes |= {n: (v.dtype, (num_blocks * BLOCK, *v.shape[1:])) for n, v in per_sample.items()}
    header, _ = build_header(shapes, {"so3krates_index": "2"})
    with path.open("wb") as file:
        file.write(header)
        for name in sort_columns(shapes):
            if name in per_block:
                file.write(np.ascontiguousarray(per_block[name]).data)
                continue
            for first in range(0, num_blocks * BLOCK, unit):
                file.write(per_sample[name][: num_blocks * BLOCK - first].data)


class OnlyIndex:
    """A data set of which only the index exists."""

    def __init__(self, path: Path, num_blocks: int) -> None:
        self.index = self.table = map_index(path, {"train": range(num_blocks)})


class OnlySizes(Source):
    """A source that can be planned with but not read."""

    fingerprint = "none"


def read_memory() -> tuple[float, float]:
    """Return MB of this process's own memory, and of files that it has mapped, which processes of a node share."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, shared = (float(fields[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return own, shared


def plan_for(path: Path, num_conformers: int, lanes: int) -> None:
    """Print what a plan costs: called in a process of its own."""
    before, start = read_memory(), time.perf_counter()
    data: Any = OnlyIndex(path, num_conformers // BLOCK)
    source = OnlySizes(name="large", location="", data=data, share=1.0, pair_cutoff=CUTOFF)
    settings = PlanSettings(
        weights=(1.0,), seed=0, lanes=lanes, window_blocks=max(512, 8 * lanes), batch_size=16 * lanes
    )
    plan = Plan([source], settings)
    opened = time.perf_counter() - start
    windows = plan.windows_per_epoch
    times = []
    for number in (0, 1, windows - 1, windows, windows + 1, 5 * windows, 5 * windows + 1, 777):
        start = time.perf_counter()
        size = len(plan.window(number).block)
        times.append(time.perf_counter() - start)
    again, new = (float(np.mean([times[i] for i in at])) for at in ((1, 2, 4, 6, 7), (0, 3, 5)))
    after = read_memory()
    print(
        f"| {lanes} | {opened * 1e3:.0f} | {size:,} | {again * 1e3:.0f} | {again / size * 1e6:.2f} |"
        f" {max(new - again, 0) * 1e3:.0f} | {after[0] - before[0]:.0f} | {after[1] - before[1]:.0f} |",
        flush=True,
    )


def show_plan(folder: Path, num_conformers: int) -> None:
    """Print what the plan of a large data set costs in time and memory."""
    path = folder / "index.safetensors"
    write_index(path, num_conformers)
    print(f"\nPlan of {num_conformers:,} conformers, index of {path.stat().st_size / 1e9:.2f} GB:\n")
    print(
        "| lanes | ms to open | conformers in a window | ms per window | µs per conformer | ms more in a new epoch |",
        end="",
    )
    print(" own MB | shared MB |\n|---|---|---|---|---|---|---|---|", flush=True)
    for lanes in (8, 64, 512):
        process = multiprocessing.get_context("spawn").Process(target=plan_for, args=(path, num_conformers, lanes))
        process.start()
        process.join()
        assert process.exitcode == 0


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conformers", type=int, default=32_768)
    parser.add_argument("--plan-conformers", type=int, default=100_000_000)
    parser.add_argument("--folder", help="for temporary files, some 4 GB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (np, torch, webdataset, lmdb))
    print(f"Python {sys.version.split()[0]}, {versions}, {arguments.conformers:,} conformers")
    try:
        compare_stores(folder, arguments.conformers)
        show_plan(folder, arguments.plan_conformers)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
