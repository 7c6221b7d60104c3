"""The index: pair counts against the neighbour lists, columns against the blocks, and little memory whatever the number of rows."""

import gc
import json
import math
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from so3krates_dist.data import index as index_module
from so3krates_dist.data import layout, shards
from so3krates_dist.data.index import (
    FLAGS,
    PAIR_CUTOFFS,
    PERIODIC,
    Index,
    IndexBuilder,
    count_pairs,
    estimate_pairs,
    find_flags,
    find_splits,
    map_index,
)
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

COLUMNS = (
    "block_shard", "block_offset", "block_size", "block_crc32", "block_first", "block_atoms", "block_pairs", "block_max_atoms",
    "block_max_pairs", "sample_atoms", "sample_pairs", "sample_flags",
)  # fmt: skip


def make_structure(num_atoms: int, seed: int = 0, *, periodic: bool = False, density: float = 0.1) -> Graph:
    """Return atoms at random places, `density` of them in an Å³."""
    rng = np.random.default_rng(seed)
    side = (num_atoms / density) ** (1 / 3)
    graph = Graph(
        atomic_numbers=rng.integers(1, 10, num_atoms), positions=rng.uniform(0, side, (num_atoms, 3)), energy=0.0
    )
    if periodic:
        graph.cell, graph.pbc = side * np.eye(3), np.ones(3, bool)
    return graph


def count_with_neighbors(graph: Graph, cutoff: float) -> int:
    stored = Graph(
        **{n: getattr(graph, n) for n in ("atomic_numbers", "cell", "pbc")}, positions=np.float32(graph.positions)
    )
    pairs = build_neighbors(stored, cutoff).pair_first
    assert pairs is not None
    return len(pairs)


# ----------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("num_atoms", [1, 2, 9, 60, 150])
def test_pairs_of_small_molecules_are_counted_exactly(num_atoms: int) -> None:
    graph = make_structure(num_atoms)
    assert count_pairs(graph).tolist() == [count_with_neighbors(graph, cutoff) for cutoff in PAIR_CUTOFFS]


@pytest.mark.parametrize(("num_atoms", "periodic"), [(1, True), (40, True), (400, True), (400, False)])
def test_pairs_of_crystals_and_large_molecules_are_exact_up_to_six_angstrom(num_atoms: int, periodic: bool) -> None:
    """Beyond, the bulk of a crystal has them in proportion to the volume; a single atom meets its images too."""
    graph = make_structure(num_atoms, periodic=periodic)
    counts = count_pairs(graph)
    assert counts[:3].tolist() == [count_with_neighbors(graph, cutoff) for cutoff in (4.0, 5.0, 6.0)]
    assert counts[3] == round(counts[2] * (8 / 6) ** 3)
    assert counts[4] == min(round(counts[2] * 2**3), num_atoms * (num_atoms - 1) // 2 if not periodic else 2**40)
    if num_atoms == 400 and periodic:
        assert counts[4] == pytest.approx(count_with_neighbors(graph, 12.0), rel=0.05)


def test_large_molecules_have_no_more_pairs_than_there_are() -> None:
    graph = make_structure(200, density=3.0)
    counts = count_pairs(graph)
    assert counts[2] * 8 > 200 * 199 // 2 == counts[4]


def test_what_is_no_structure_is_counted_without_complaint() -> None:
    """Judging structures is for the gate and for training; a faulty one is indexed like any other."""
    graph = make_structure(3)
    graph.positions[1] = graph.positions[0]
    assert count_pairs(graph)[0] == 3
    graph = make_structure(8, periodic=True)
    graph.positions[1] = graph.positions[0]
    assert count_pairs(graph)[0] > 0
    for cell in (None, np.zeros((3, 3)), np.full((3, 3), np.nan), np.diag([5.0, 5.0, 0.0])):
        graph.cell = cell
        assert count_pairs(graph).tolist() == [0] * 5, "the cell list would end the process"
    graph.pbc = np.array([True, True, False])
    assert count_pairs(graph)[0] > 0, "of a slab without a third vector"
    graph.positions[1, 2] = np.inf
    assert count_pairs(graph).tolist() == [0] * 5


def test_estimates_are_exact_where_pairs_were_counted() -> None:
    graphs = [make_structure(n, n) for n in (1, 7, 60)]
    atoms, pairs = [g.num_atoms for g in graphs], np.stack([count_pairs(g) for g in graphs])
    for column, cutoff in enumerate(PAIR_CUTOFFS):
        found = estimate_pairs(atoms, pairs, 0, cutoff)
        assert found.dtype == np.int64
        assert found.tolist() == pairs[:, column].tolist()
    assert estimate_pairs(atoms, pairs, 0, math.inf).tolist() == [0, 21, 1770]


@pytest.mark.parametrize(
    ("cutoff", "expected"),
    [
        (2.0, 100 / 8),
        (3.0, 100 * 27 / 64),
        (4.5, 100 + 100 * (4.5**3 - 64) / (125 - 64)),
        (10.0, 800 + 1600 * (1000 - 512) / (1728 - 512)),
        (24.0, 2400 * 8),
    ],
)
def test_estimates_follow_the_volume_between_and_beyond_the_counted_cutoffs(cutoff: float, expected: float) -> None:
    row = [[100, 200, 350, 800, 2400]]
    assert estimate_pairs([1000], row, PERIODIC, cutoff).tolist() == [round(expected)]
    assert estimate_pairs([20], row, 0, cutoff).tolist() == [min(190, round(expected))], "of a molecule with 190 pairs"


@pytest.mark.parametrize("periodic", [False, True])
def test_estimates_come_close_to_what_is_counted(periodic: bool) -> None:
    graphs = [make_structure(60, seed, periodic=periodic) for seed in range(20)]
    pairs = np.stack([count_pairs(g) for g in graphs])
    flags = np.array([find_flags(g) for g in graphs])
    for cutoff in (4.5, 5.5, 7.0):
        truth = [count_with_neighbors(g, cutoff) for g in graphs]
        estimate = estimate_pairs([60] * 20, pairs, flags, cutoff)
        np.testing.assert_allclose(estimate, truth, rtol=0.15)
        assert estimate.sum() == pytest.approx(sum(truth), rel=0.05 if periodic else 0.07), "clusters thin out"
        sums = estimate_pairs([60 * 20], [pairs.sum(0)], PERIODIC, cutoff)
        assert sums.tolist() == pytest.approx([estimate.sum()], abs=10), "sums of conformers give the sum"


def test_estimates_rise_with_the_cutoff() -> None:
    pairs = count_pairs(make_structure(100))
    cutoffs = np.linspace(1, 15, 60)
    found = [int(estimate_pairs([100], [pairs], 0, float(r))[0]) for r in cutoffs]
    assert found == sorted(found)
    assert found[-1] <= 4950


# --------------------------------------------------------------------------------------------------------------- columns


def make_graphs(num: int, seed: int = 0) -> list[Graph]:
    """Return conformers with different labels, every fifth a crystal."""
    graphs = []
    for number in range(num):
        graph = make_structure(3 + (number + seed) % 5, number + seed, periodic=number % 5 == 0)
        rng = np.random.default_rng(number)
        graph.energy = None if number % 4 == 3 else float(rng.normal())
        graph.forces = None if number % 3 == 2 else rng.normal(size=(graph.num_atoms, 3)).astype(np.float32)
        graph.dipole = rng.normal(size=3).astype(np.float32) if number % 2 else None
        graphs.append(graph)
    return graphs


def write_set(folder: Path, sizes: Sequence[int] = (23, 0, 7), *, at_once: bool = True) -> dict[str, list[Graph]]:
    """Write a data set with blocks of 3, 2 in a shard; `at_once`: the index is made while shards are written."""
    folder.mkdir()
    splits = {s: make_graphs(n, 100 * k) for k, (s, n) in enumerate(zip(shards.SPLITS, sizes, strict=True))}
    index = IndexBuilder(folder) if at_once else None
    entries = [
        e
        for s, graphs in splits.items()
        for e in shards.write_shards(folder, s, graphs, block_size=3, blocks_per_shard=2, index=index)
    ]
    manifest = shards.build_manifest(
        name="toy",
        level_of_theory="none",
        licence="MIT",
        splits={},
        groups={},
        statistics={},
        provenance={},
        shards=entries,
    )
    shards.write_index_and_manifest(folder, manifest, index)
    return splits


def test_the_index_says_what_is_in_the_blocks(tmp_path: Path) -> None:
    splits = write_set(tmp_path / "set")
    with shards.open_dataset(tmp_path / "set") as dataset:
        index = dataset.index
        assert (index.num_blocks, index.num_conformers) == (8 + 3, 30)
        assert [index.blocks_of_split(s) for s in shards.SPLITS] == [range(8), range(8, 8), range(8, 11)]
        assert index.block_shard.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        graphs = [g for split in splits.values() for g in split]
        assert index.sample_atoms.tolist() == [g.num_atoms for g in graphs]
        np.testing.assert_array_equal(index.sample_pairs, np.stack([count_pairs(g) for g in graphs]))
        for label, flag in FLAGS.items():
            present = [getattr(g, label) is not None for g in graphs]
            assert ((index.sample_flags & flag) != 0).tolist() == present, label
        assert ((index.sample_flags & PERIODIC) != 0).tolist() == [g.is_periodic for g in graphs]
        for number in range(index.num_blocks):
            block, rows, entry = dataset.read_block(number), index.rows(number), dataset.block_entry(number)
            assert np.diff(block.offsets).tolist() == index.sample_atoms[rows].tolist()
            assert entry.num_atoms == index.block_atoms[number] == index.sample_atoms[rows].sum()
            assert index.block_pairs[number].tolist() == index.sample_pairs[rows].sum(0).tolist()
            assert index.block_max_atoms[number] == index.sample_atoms[rows].max()
            assert index.block_max_pairs[number].tolist() == index.sample_pairs[rows].max(0).tolist()
        chosen = [9, 0, 7]
        expected = [row for b in chosen for row in range(30)[index.rows(b)]]
        assert index.rows_of_blocks(chosen).tolist() == expected
        assert index.rows_of_blocks([]).tolist() == []
    counts = dataset.manifest.label_counts
    assert counts["train"] == {"energy": 18, "forces": 16, "dipole": 11}
    assert counts["test"] == {"energy": 6, "forces": 5, "dipole": 3}
    assert dataset.manifest.labels == ("energy", "forces", "dipole")


@pytest.mark.parametrize("chosen", [[9, 0, 7], [], [3], range(11), [4, 5, 6, 2, 3, 10]])
def test_rows_of_any_blocks_are_read_in_their_order(tmp_path: Path, chosen: Sequence[int]) -> None:
    write_set(tmp_path / "set")
    with shards.open_dataset(tmp_path / "set") as dataset:
        index = dataset.index
        in_memory = index_module.compute_index(dataset.table, (dataset.read_block(k) for k in range(11)))
        rows = index.rows_of_blocks(chosen)
        for samples in (index.read_samples(chosen), in_memory.read_samples(chosen)):
            assert samples.atoms.tolist() == index.sample_atoms[rows].tolist()
            assert samples.pairs.tolist() == index.sample_pairs[rows].tolist()
            assert samples.flags.tolist() == index.sample_flags[rows].tolist()


def test_an_index_that_is_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with shards.open_dataset(tmp_path / "set") as dataset:
        index = dataset.index
        os.truncate(tmp_path / "set" / shards.INDEX_NAME, 2000)
        with pytest.raises(
            DataError, match=r"index.safetensors must have rows \d+ to \d+ of `sample_\w+`; got the end of the"
        ):
            index.read_samples([9, 10])


def test_files_are_closed_with_the_index(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / shards.INDEX_NAME
    index = map_index(path, {})
    assert count_open(path) > 0
    del index
    gc.collect()
    assert count_open(path) == 0
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError):
        map_index(path, {})
    assert count_open(path) == 0


def count_open(path: Path) -> int:
    return sum(link.readlink() == path for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_an_index_made_of_the_shards_is_the_same(tmp_path: Path) -> None:
    write_set(tmp_path / "first")
    write_set(tmp_path / "second", at_once=False)
    names = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "second").iterdir()), "no part file is left"
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_an_index_in_memory_is_the_same(tmp_path: Path) -> None:
    """What folders of schema 1 get."""
    write_set(tmp_path / "set")
    with shards.open_dataset(tmp_path / "set") as dataset:
        blocks = (dataset.read_block(k) for k in range(dataset.num_blocks))
        computed = index_module.compute_index(dataset.table, blocks)
        for name in COLUMNS:
            first, second = getattr(dataset.index, name), getattr(computed, name)
            np.testing.assert_array_equal(first, second, err_msg=name)
            assert first.dtype == second.dtype, name
    again = pickle.loads(pickle.dumps(computed))
    np.testing.assert_array_equal(again.sample_pairs, computed.sample_pairs)
    computed.release()  # nothing is mapped


def test_any_safetensors_library_reads_the_index(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    columns = safetensors.numpy.load_file(tmp_path / "set" / shards.INDEX_NAME)
    with shards.open_dataset(tmp_path / "set") as dataset:
        assert set(columns) == set(COLUMNS)
        for name in COLUMNS:
            np.testing.assert_array_equal(columns[name], getattr(dataset.index, name), err_msg=name)


def test_the_index_is_mapped_and_travels_as_a_name(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    with shards.open_dataset(tmp_path / "set") as dataset:
        index = dataset.index
        text = pickle.dumps(index)
        again = pickle.loads(text)
        assert len(text) < 1000
        assert again.path == index.path == tmp_path / "set" / shards.INDEX_NAME
        np.testing.assert_array_equal(again.sample_pairs, index.sample_pairs)
        assert again.blocks_of_split("train") == range(8)
        with pytest.raises(ValueError, match="read-only"):
            index.sample_atoms[0] = 1


def test_pairs_may_be_counted_beforehand(tmp_path: Path) -> None:
    """Processes that convert count them, the one that writes need not."""
    graphs, table = make_graphs(4), np.arange(20, dtype=np.uint32).reshape(4, 5)
    builder = IndexBuilder(tmp_path)
    with shards.ShardWriter(tmp_path, "train", blocks_per_shard=9, index=builder) as writer:
        writer.write_block(graphs, table)
    entry = builder.finish()
    assert entry.size == (tmp_path / entry.file).stat().st_size
    index = map_index(tmp_path / entry.file, {})
    np.testing.assert_array_equal(index.sample_pairs, table)
    assert index.block_max_pairs.tolist() == [table[-1].tolist()]


# ---------------------------------------------------------------------------------------------------------------- memory


def write_large_index(path: Path, num_conformers: int, block_size: int = 128) -> None:
    """Write an index of zeros, which takes no room on the disk."""
    num_blocks = num_conformers // block_size
    shapes = {}
    for name, (dtype, row) in index_module._COLUMNS.items():
        length = num_conformers if name.startswith("sample_") else num_blocks + (name == "block_first")
        shapes[name] = (np.dtype(dtype), (length, *row))
    header, _ = layout.build_header(shapes, {"so3krates_index": "2"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(d.itemsize * math.prod(shape) for d, shape in shapes.values()))


def read_resident_memory() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_hundred_million_conformers_take_no_memory_to_open(tmp_path: Path) -> None:
    write_large_index(tmp_path / "index.safetensors", 100_000_000)
    before = read_resident_memory()
    index = map_index(tmp_path / "index.safetensors", {"train": range(781_250)})
    assert (index.num_blocks, len(index.sample_pairs)) == (781_250, 100_000_000)
    assert read_resident_memory() - before < 20e6


def test_pages_that_were_looked_at_are_given_back(tmp_path: Path) -> None:
    write_large_index(tmp_path / "index.safetensors", 4_000_000)
    index = map_index(tmp_path / "index.safetensors", {})
    before = read_resident_memory()
    assert index.sample_pairs.sum() + index.sample_atoms.sum() == 0
    assert index.block_offset.sum() == 0
    looked_at = read_resident_memory() - before
    assert looked_at > 60e6
    index.release()
    assert read_resident_memory() - before < 0.1 * looked_at
    assert index.sample_pairs[-1].tolist() == [0] * 5, "they are read again when they are needed"


def test_blocks_at_random_places_take_no_more_memory_than_their_rows(tmp_path: Path) -> None:
    """Reading them through the map would take megabytes for every block."""
    write_large_index(tmp_path / "index.safetensors", 12_800_000)
    index = map_index(tmp_path / "index.safetensors", {})
    blocks = np.random.default_rng(0).permutation(100_000)[:1000]
    np.asarray(index.block_first[blocks]).sum()
    before = read_resident_memory()
    index._read_rows("sample_pairs", [(int(b) * 128, int(b) * 128 + 128) for b in blocks])
    assert read_resident_memory() - before < 20e6


# ----------------------------------------------------------------------------------------------------------- what is bad


def rewrite(path: Path, metadata: dict[str, str] | None = None, **changes: np.ndarray | None) -> None:
    columns = {k: v for k, v in (safetensors.numpy.load_file(path) | changes).items() if v is not None}
    path.write_bytes(safetensors.numpy.save(columns, metadata=metadata or {"so3krates_index": "2"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"must be an index; got ValueError: columns of \d+ bytes where \d+"),
        (lambda p: p.write_bytes(b""), r"must be an index; got ValueError: a header of 0 bytes in 0 bytes"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), r"must be an index; got ValueError: a header of \d+ bytes in 22"),
        (lambda p: p.unlink(), r"must be readable; got No such file or directory"),
        (lambda p: rewrite(p, sample_atoms=None), r"must be an index; got KeyError: 'sample_atoms'"),
        (lambda p: rewrite(p, sample_atoms=np.zeros(30)), r"must be an index; got ValueError: column sample_atoms is float64"),
        (lambda p: rewrite(p, sample_flags=np.zeros(29, np.uint8)), r"must be an index; got ValueError: column sample_flags is"),
        (lambda p: rewrite(p, {"so3krates_index": "3"}), r"must be an index; got ValueError: an index of schema 3"),
        (lambda p: rewrite(p, {"other": "file"}), r"must be an index; got ValueError: an index of schema None"),
    ],
)  # fmt: skip
def test_damaged_index_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / shards.INDEX_NAME
    damage(path)
    with pytest.raises(DataError, match=rf"index\.safetensors {message}"):
        map_index(path, {})


def read_columns(path: Path) -> dict[str, np.ndarray]:
    return dict(safetensors.numpy.load_file(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"block_shard": c["block_shard"][::-1].copy()}, "must list the 11 blocks of the manifest; got 11 blocks, or in"),
        (lambda c: {"block_first": c["block_first"] + 1}, "must list the 11 blocks of the manifest"),
        (lambda c: {"block_atoms": c["block_atoms"] + 1}, r"must count 28 atoms in train-000000\.tar; got 30"),
        (
            lambda c: {"block_first": np.concatenate([[0, 4], c["block_first"][2:]])},
            None,  # the first shard still has its six conformers: the block itself will tell
        ),
        (
            lambda c: {"block_first": np.concatenate([[0, 3, 7], c["block_first"][3:]])},
            r"must count 6 conformers in train-000000\.tar; got 7",
        ),
        (
            lambda c: {"block_first": np.concatenate([[0, 6, 6], c["block_first"][3:]])},
            "must list blocks of 1 to 65536 conformers, with atoms; got an empty block",
        ),
        (lambda c: {"block_offset": c["block_offset"] + 10**6}, "must give places within the shards; got a block beyond"),
        (lambda c: {"block_offset": c["block_offset"] - 10**6}, "must give places within the shards"),
        (lambda c: {"block_size": c["block_size"] * 2**22}, "must list blocks of 1 to 1073741824 bytes; got 3"),
        (lambda c: {"block_size": -c["block_size"]}, "must list blocks of 1 to 1073741824 bytes; got -"),
        (lambda c: {"block_offset": c["block_offset"] * 0 + (2**63 - 1)}, "must give places within the shards"),
        (lambda c: {"block_atoms": c["block_atoms"] * np.array([0, *[1] * 10])}, "must list blocks of 1 to 65536 conformers, with"),
        (lambda c: {n: v[:3] for n, v in c.items() if n.startswith("block_")} | {"block_first": c["block_first"][:4]},
         "must list the 11 blocks of the manifest; got 3 blocks"),
    ],
)  # fmt: skip
def test_an_index_of_another_data_set_is_refused(tmp_path: Path, change, message: str | None) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / shards.INDEX_NAME
    rewrite(path, **change(read_columns(path)))
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["index"]["size"] = path.stat().st_size
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with shards.open_dataset(tmp_path / "set") as dataset:
        if message is None:
            rule = r"train-000000-000000 must hold 4 conformers with \d+ atoms as the index says; got 3 with"
            with pytest.raises(DataError, match=rule):
                dataset.read_block(0)
        else:
            with pytest.raises(DataError, match=message):
                _ = dataset.table


def test_a_data_set_without_its_index_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "set" / shards.INDEX_NAME).unlink()
    with pytest.raises(DataError, match=r"index\.safetensors must be there, the manifest lists it; got no such file"):
        _ = shards.open_dataset(tmp_path / "set").index
    with pytest.raises(DataError, match=r"index\.safetensors must be there"):
        shards.check_dataset(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    write_set(tmp_path / "set")
    path = tmp_path / "set" / shards.INDEX_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.safetensors must have the sha256 \w{12}\.\.\.; got"):
        shards.check_dataset(tmp_path / "set", hashes=True)


def test_splits_are_ranges_of_blocks_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    write_set(tmp_path / "set", (4, 4, 4))
    manifest = shards.load_manifest(tmp_path / "set")
    assert find_splits(manifest) == {"train": range(2), "validation": range(2, 4), "test": range(4, 6)}
    assert isinstance(shards.open_dataset(tmp_path / "set").table, Index)
