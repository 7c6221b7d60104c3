"""Shards: what goes in comes out, a plain WebDataset reads them, and what is damaged is refused with its place."""

import dataclasses
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import webdataset

from so3krates_dist.data import shards
from so3krates_dist.data.shards import (
    Block,
    BlockReader,
    Manifest,
    build_manifest,
    check_dataset,
    check_schema,
    choose_block_size,
    decode_block,
    decode_sample,
    dump_manifest,
    encode_block,
    iter_shard,
    load_manifest,
    write_shards,
)
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

FIXTURE = Path(__file__).parent.parent / "data" / "shards_schema_1"


def make_graph(seed: int, *, num_atoms: int | None = None, everything: bool = False) -> Graph:
    generator = np.random.default_rng(seed)
    size = num_atoms or int(generator.integers(1, 9))
    graph = Graph(
        atomic_numbers=generator.integers(1, 118, size),
        positions=generator.normal(size=(size, 3)).astype(np.float32),
        energy=float(generator.normal() - 1e6),
        forces=generator.normal(size=(size, 3)).astype(np.float32),
        total_charge=float(generator.integers(-2, 3)),
        group=f"molecule.{seed % 3}",
    )
    if everything:
        graph.cell, graph.pbc = generator.normal(size=(3, 3)), np.array([True, True, False])
        graph.stress = generator.normal(size=(3, 3)).astype(np.float32)
        graph.dipole = generator.normal(size=3).astype(np.float32)
        graph.partial_charges = generator.normal(size=size).astype(np.float32)
        graph.hirshfeld_ratios = generator.uniform(0.5, 1.2, size).astype(np.float32)
    return graph


def assert_equal(first: Graph, second: Graph) -> None:
    for field in dataclasses.fields(Graph):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


def write_dataset(
    folder: Path, num: int = 10, block_size: int = 3, blocks_per_shard: int = 2
) -> tuple[Manifest, list[Graph]]:
    folder.mkdir()
    graphs = [make_graph(i) for i in range(num)]
    entries = write_shards(folder, "train", graphs, block_size=block_size, blocks_per_shard=blocks_per_shard)
    manifest = build_manifest(
        name="toy", level_of_theory="none", licence="MIT", splits={}, groups={}, labels=("energy", "forces"), statistics={},
        provenance={}, shards=entries,
    )  # fmt: skip
    (folder / "manifest.json").write_text(dump_manifest(manifest), encoding="utf-8")
    return manifest, graphs


@pytest.mark.parametrize("everything", [False, True])
def test_conformers_survive_a_block_bit_for_bit(everything: bool) -> None:
    graphs = [make_graph(i, everything=everything) for i in range(7)]
    block = decode_block(encode_block(graphs))
    assert len(block) == 7
    for before, after in zip(graphs, block, strict=True):
        assert_equal(before, after)


def test_arrays_that_do_not_lie_in_c_order_are_stored_right() -> None:
    """safetensors stores memory as it lies, and numpy keeps the columns' order through concatenate (ASE's forces)."""
    graphs = [make_graph(i, num_atoms=5) for i in range(3)]
    for graph in graphs:
        graph.forces, graph.positions = np.asfortranarray(graph.forces), np.asfortranarray(graph.positions)
    for before, after in zip(graphs, decode_block(encode_block(graphs)), strict=True):
        assert_equal(before, after)


def test_same_conformers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_dataset(tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_a_plain_webdataset_reads_every_shard(tmp_path: Path) -> None:
    manifest, graphs = write_dataset(tmp_path / "set")
    assert len(manifest.shards) == 2
    urls = [str(tmp_path / "set" / s.file) for s in manifest.shards]
    found = [g for s in webdataset.WebDataset(urls, shardshuffle=False).map(decode_sample) for g in s["block"]]
    assert len(found) == len(graphs)
    for before, after in zip(graphs, found, strict=True):
        assert_equal(before, after)


def test_single_blocks_are_read_by_their_place_in_the_tar(tmp_path: Path) -> None:
    manifest, graphs = write_dataset(tmp_path / "set")
    reader = pickle.loads(pickle.dumps(BlockReader(tmp_path / "set")))  # workers of a loader get a copy
    last = manifest.shards[-1].blocks[-1]
    for _ in range(2):
        block = reader.read(manifest.shards[-1], last)
        assert_equal(graphs[-1], block.graph(len(block) - 1))
        reader.close()
    by_key = dict(iter_shard(tmp_path / "set" / manifest.shards[-1].file))
    assert list(by_key) == [b.key for b in manifest.shards[-1].blocks]


def test_keys_hold_no_dot_that_would_merge_samples(tmp_path: Path) -> None:
    """`C2H6.O_1` and `C2H6.O_2` become one sample of WebDataset; our keys never have a dot, groups may."""
    manifest, graphs = write_dataset(tmp_path / "set")
    assert any("." in g.group for g in graphs)
    for shard in manifest.shards:
        assert all(set(b.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for b in shard.blocks)
    with (tmp_path / "dotted.tar").open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number in (1, 2):
            writer.write({"__key__": f"C2H6.O_{number}", "safetensors": encode_block(graphs)})
    with pytest.raises(DataError, match=r"dotted.tar:C2H6 must hold one `.safetensors` member; got"):
        list(iter_shard(tmp_path / "dotted.tar"))


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    payload = pickle.dumps(Evil())
    for suffix in ("pyd", "safetensors"):
        path = tmp_path / f"{suffix}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            writer.write({"__key__": "train-0", suffix: payload})
        with pytest.raises(DataError, match=rf"{suffix}.tar:train-0 must"):
            list(iter_shard(path))
    assert not (tmp_path / "ran").exists()


def test_manifest_survives_text(tmp_path: Path) -> None:
    manifest, _ = write_dataset(tmp_path / "set")
    loaded = load_manifest(tmp_path / "set")
    assert loaded == manifest
    assert loaded.num_conformers("train") == 10
    assert loaded.num_conformers("test") == 0
    assert len(loaded.fingerprint) == 16
    assert check_dataset(tmp_path / "set", hashes=True) == manifest


def test_conformers_with_uneven_labels_are_refused() -> None:
    graphs = [make_graph(1), make_graph(2)]
    graphs[1].forces = None
    with pytest.raises(
        DataError, match="label `forces` must be there for all conformers of a block or for none; got 1 of 2"
    ):
        encode_block(graphs)


def rewrite_block(payload: bytes, *, header: object = None, **columns: np.ndarray | None) -> bytes:
    """Return a block with another header, or with columns replaced (None takes one out)."""
    size = int.from_bytes(payload[:8], "little")
    text = header if header is not None else json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["so3krates"])
    table = {k: v for k, v in (safetensors.numpy.load(payload) | columns).items() if v is not None}
    return safetensors.numpy.save(table, metadata={"so3krates": json.dumps(text)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p[:-5], r"here must be a block of conformers; got"),
        (lambda p: b"", r"here must be a block of conformers; got"),
        (lambda p: b"<html>not found</html>", r"here must be a block of conformers; got"),
        (lambda p: struct.pack("<Q", 2**60) + p[8:], r"here must be a block of conformers; got"),
        (lambda p: rewrite_block(p, positions=None), r"here must have the column `positions`; got atomic_numbers, energy"),
        (lambda p: rewrite_block(p, energy=np.zeros(9)), r"here column `energy` must be float64 \(2,\); got float64 \(9,\)"),
        (lambda p: rewrite_block(p, header={"schema": 2, "groups": []}), r"here must have schema 1 or lower; got 2. Install"),
        (lambda p: rewrite_block(p, header={"groups": []}), r"here must name its schema, an integer from 1; got None"),
    ],
)  # fmt: skip
def test_damaged_blocks_are_refused(damage, message: str) -> None:
    payload = encode_block([make_graph(0, num_atoms=3), make_graph(1, num_atoms=2)])
    assert isinstance(decode_block(payload), Block)
    with pytest.raises(DataError, match=message):
        decode_block(damage(payload), "here")


@pytest.mark.parametrize("schema", [None, 0, "1", 1.0])
def test_a_schema_is_a_positive_integer(schema: object) -> None:
    with pytest.raises(DataError, match=f"file must name its schema, an integer from 1; got {schema!r}"):
        check_schema(schema, "file")


def damage_shard(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        content = content[:1000]
    if kind == "flipped":
        content[700] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "on_check", "on_read"),
    [
        ("missing", "train-000000.tar must be there, the manifest lists it; got", "must be readable; got No such file"),
        ("truncated", r"train-000000.tar must have \d+ bytes; got 1000 bytes", r"tar:train-000000-000000 must have \d+ bytes"),
        ("flipped", r"train-000000.tar must have the sha256 .*; got", r"tar:train-000000-000000 must have the CRC"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused_with_their_place(tmp_path: Path, kind: str, on_check: str, on_read: str) -> None:
    manifest, _ = write_dataset(tmp_path / "set")
    damage_shard(tmp_path / "set" / "train-000000.tar", kind)
    with pytest.raises(DataError, match=on_check):
        check_dataset(tmp_path / "set", hashes=True)
    reader = BlockReader(tmp_path / "set")
    with pytest.raises(DataError, match=on_read):
        reader.read(manifest.shards[0], manifest.shards[0].blocks[0])
    reader.close()


def test_manifests_that_are_missing_damaged_or_from_the_future_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a manifest.json; got no such file. Make a data set with"):
        load_manifest(tmp_path)
    write_dataset(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    for broken in (text[:200], "[]", text.replace('"licence"', '"license"'), text.replace('"crc32"', '"crc"')):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=r"manifest.json must be a manifest; got \w+Error"):
            load_manifest(tmp_path / "set")
    path.write_text(text.replace('"schema": 1', '"schema": 7'), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"manifest.json must have schema 1 or lower; got 7. Install a newer so3krates-dist"
    ):
        load_manifest(tmp_path / "set")


def test_block_sizes_leave_at_least_sixteen_blocks() -> None:
    assert [choose_block_size(n) for n in (0, 1, 16, 17, 50, 2000, 10**6)] == [1, 1, 1, 2, 4, 125, 128]


def test_the_stored_data_set_of_schema_1_keeps_loading(tmp_path: Path) -> None:
    """Made with `so3krates generate --smiles FILE --num-conformers 6 --split 4,1,1` from methanol, in the first version."""
    manifest = check_dataset(FIXTURE, hashes=True)
    assert manifest.schema == 1 <= shards.SCHEMA
    graphs = {
        s: [g for e in manifest.of_split(s) for _, b in iter_shard(FIXTURE / e.file) for g in b] for s in shards.SPLITS
    }
    assert {s: len(g) for s, g in graphs.items()} == {"train": 4, "validation": 1, "test": 1}
    first = graphs["train"][0]
    assert first.group == "methanol"
    assert first.atomic_numbers.tolist() == [6, 8, 1, 1, 1, 1]
    assert first.energy == pytest.approx(-223.5, abs=1.0)
    assert np.abs(np.asarray(first.forces).sum(0)).max() < 1e-3
    assert float(np.asarray(first.partial_charges).sum()) == pytest.approx(0.0, abs=1e-5)
    assert np.linalg.norm(first.dipole) == pytest.approx(0.4, abs=0.2)
    assert first.hirshfeld_ratios is None
    for entry in manifest.shards:  # columns that came later change no byte of a block without them
        for block, (_, conformers) in zip(entry.blocks, iter_shard(FIXTURE / entry.file), strict=True):
            assert zlib.crc32(encode_block(list(conformers))) == block.crc32
    shutil.copytree(FIXTURE, tmp_path / "copy")
    assert load_manifest(tmp_path / "copy").fingerprint == manifest.fingerprint


def test_the_name_of_a_file_is_never_a_command(tmp_path, monkeypatch):
    """WebDataset runs what follows `pipe:` in a shell; a manifest from elsewhere must not be able to say so."""
    monkeypatch.chdir(tmp_path)
    evil = Path("pipe:touch HACKED")
    with pytest.raises(FileNotFoundError):
        list(iter_shard(evil))
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch HACKED", "../train-000000.tar", "/train.tar", "train.tar.gz", "a{b,c}.tar"]
)
def test_a_manifest_names_plain_tar_files_only(tmp_path, name):
    folder = tmp_path / "set"
    shutil.copytree(FIXTURE, folder)
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0]["file"] = name
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json must be a manifest; got ValueError: a shard is called"):
        load_manifest(folder)


def test_braces_in_a_folders_name_mean_nothing(tmp_path):
    folder = tmp_path / "a{b,c} d"
    shutil.copytree(FIXTURE, folder)
    shard = load_manifest(folder).shards[0]
    assert sum(len(block) for _, block in iter_shard(folder / shard.file)) == sum(
        b.num_conformers for b in shard.blocks
    )
