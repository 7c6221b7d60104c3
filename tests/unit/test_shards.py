"""Shards: what goes in comes out, a plain WebDataset reads them, and manifests that are not right are refused."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from analytic import assert_same_graph, label, make_random_graph, write_graphs
from training_setup import make_settings, run_processes, train

from so3krates_dist.data import shards
from so3krates_dist.data.shards import (
    Manifest,
    ShardWriter,
    check_dataset,
    choose_block_size,
    decode_sample,
    encode_block,
    iter_graphs,
    iter_shard,
    load_manifest,
    open_dataset,
)
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

FIXTURE = Path(__file__).parent.parent / "data" / "shards_schema_1"
FIXTURE_2 = FIXTURE.with_name("shards_schema_2")
FIXTURE_3 = FIXTURE.with_name("shards_schema_3")
WEIGHTS = {"train": (0.5, 2.0, 1.0, 1.0, 0.0, 1.25), "validation": (1.0, 3.0), "test": (1.0, 1.0)}
"""of the conformers of schema 3 in the loss"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Marks of verified files go to a folder of the test."""
    monkeypatch.setenv("SO3KRATES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_set(
    folder: Path, num: int = 10, block_size: int = 3, blocks_per_shard: int = 2
) -> tuple[Manifest, list[Graph]]:
    graphs = [make_random_graph(i) for i in range(num)]
    return write_graphs(folder, {"train": graphs}, block_size=block_size, blocks_per_shard=blocks_per_shard), graphs


def test_same_conformers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_set(tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_a_plain_webdataset_reads_every_shard(tmp_path: Path) -> None:
    manifest, graphs = write_set(tmp_path / "set")
    assert len(manifest.shards) == 2
    urls = [str(tmp_path / "set" / s.file) for s in manifest.shards]
    found = [g for s in webdataset.WebDataset(urls, shardshuffle=False).map(decode_sample) for g in s["block"]]
    assert len(found) == len(graphs)
    for before, after in zip(graphs, found, strict=True):
        assert_same_graph(before, after)


def test_shards_are_written_block_by_block(tmp_path: Path) -> None:
    """The same bytes as at once; what is being written is not kept."""
    _, graphs = write_set(tmp_path / "set")
    (tmp_path / "other").mkdir()
    with ShardWriter(tmp_path / "other", "train", blocks_per_shard=2) as writer:
        for first in range(0, 10, 3):
            writer.write_block(graphs[first : first + 3])
    entries = writer.close()
    assert [(e.num_blocks, e.num_conformers) for e in entries] == [(2, 6), (2, 4)]
    assert tuple(entries) == load_manifest(tmp_path / "set").shards
    writer = ShardWriter(tmp_path / "other", "test", blocks_per_shard=2)
    writer.write_block(graphs[:3])
    writer.__exit__(KeyError, KeyError("stop"), None)
    with pytest.raises(ValueError, match="closed file"):
        writer._file.write(b"more")


def test_keys_hold_no_dot_that_would_merge_samples(tmp_path: Path) -> None:
    """`C2H6.O_1` and `C2H6.O_2` become one sample of WebDataset; our keys never have a dot, groups may."""
    manifest, graphs = write_set(tmp_path / "set")
    assert any("." in g.group for g in graphs)
    for shard in manifest.shards:
        keys = [key for key, _ in iter_shard(tmp_path / "set" / shard.file)]
        assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for key in keys)
    with (tmp_path / "dotted.tar").open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number in (1, 2):
            writer.write({"__key__": f"C2H6.O_{number}", "safetensors": encode_block(graphs)})
    with pytest.raises(
        DataError, match=r"dotted.tar at byte 0 member 'C2H6.O_1.safetensors' must be called by letters"
    ):
        list(iter_shard(tmp_path / "dotted.tar"))
    urls = [str(tmp_path / "dotted.tar")]
    with pytest.raises(DataError, match=r"dotted.tar:C2H6 must hold one `.safetensors` member; got o_1.safetensors"):
        list(webdataset.WebDataset(urls, shardshuffle=False).map(decode_sample))


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    payload = pickle.dumps(Evil())
    for suffix in ("pyd", "safetensors"):
        path = tmp_path / f"{suffix}.tar"
        with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            writer.write({"__key__": "train-0", suffix: payload})
        with pytest.raises(DataError, match=rf"{suffix}.tar( at byte 0 member 'train-0.pyd')?(:train-0)? must be"):
            list(iter_shard(path))
    assert not (tmp_path / "ran").exists()


def test_manifest_survives_text(tmp_path: Path) -> None:
    manifest, _ = write_set(tmp_path / "set")
    loaded = load_manifest(tmp_path / "set")
    assert loaded == manifest
    assert loaded.num_conformers("train") == 10
    assert loaded.num_conformers("test") == 0
    assert len(loaded.fingerprint) == 16
    assert check_dataset(tmp_path / "set", hashes=True) == manifest


def test_the_manifest_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    for name, num in (("few", 4), ("many", 400)):
        write_set(tmp_path / name, num, 1, 1000)
    sizes = [(tmp_path / name / "manifest.json").stat().st_size for name in ("few", "many")]
    assert sizes[1] < sizes[0] + 20


def test_manifests_that_are_missing_damaged_or_from_the_future_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a manifest.json; got no such file. Make a data set with"):
        load_manifest(tmp_path)
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    for broken in (text[:200], "[]", text.replace('"licence"', '"license"'), text.replace('"num_blocks"', '"blocks"')):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=r"manifest.json must be a manifest; got \w+Error"):
            load_manifest(tmp_path / "set")
    path.write_text(text.replace('"schema": 2', '"schema": 7'), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"manifest.json must have schema 3 or lower; got 7. Install a newer so3krates-dist"
    ):
        load_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, r"train-000000.tar has \(0, 6, \d+\) blocks, conformers and atoms"),
        ({"num_conformers": 1}, r"train-000000.tar has \(2, 1, \d+\) blocks"),
        ({"num_atoms": 6.5}, r"train-000000.tar has \(2, 6, 6.5\) blocks"),
        ({"size": -1}, r"train-000000.tar has -1 bytes with the sha256"),
        ({"sha256": "../"}, r"train-000000.tar has \d+ bytes with the sha256 '../'"),
        ({"split": "training"}, r"a shard is of none of the splits train, validation, test"),
        ({"split": "test"}, r"shards are not in the order train, validation, test"),
    ],
)
def test_manifests_with_impossible_entries_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"manifest.json must be a manifest; got ValueError: {message}"):
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
    with open_dataset(FIXTURE, verify="sha256") as dataset:
        assert dataset.index.block_atoms.tolist() == dataset.index.sample_atoms.tolist() == [6] * 6
        assert dataset.index.blocks_of_split("test") == range(5, 6)
        assert (dataset.index.sample_pairs == 15).all()
        np.testing.assert_array_equal(dataset.read_block(0).graph(0).positions, first.positions)
    assert manifest.label_counts["validation"] == dict.fromkeys(manifest.labels, 1)
    shutil.copytree(FIXTURE, tmp_path / "copy")
    assert load_manifest(tmp_path / "copy").fingerprint == manifest.fingerprint
    content = json.loads((FIXTURE / "manifest.json").read_text())
    for change in ({"key": ["a", "b", "c", "d"]}, {"offset": [512]}):
        changed = [content["shards"][0] | {"blocks": content["shards"][0]["blocks"] | change}, *content["shards"][1:]]
        (tmp_path / "copy" / "manifest.json").write_text(json.dumps(content | {"shards": changed}))
        with pytest.raises(
            DataError, match=r"ValueError: train-000000.tar has (blocks of other names|columns of different)"
        ):
            load_manifest(tmp_path / "copy")


def test_the_stored_data_set_of_schema_2_keeps_loading() -> None:
    """Methanol of schema 1, and argon crystals with energies, forces and stresses of Morse pairs, mixed in blocks of two."""
    manifest = check_dataset(FIXTURE_2, hashes=True)
    assert manifest.schema == shards.UNWEIGHTED_SCHEMA == 2 <= shards.SCHEMA
    assert manifest.fingerprint == "a627dabe592c68f0"
    assert manifest.labels == ("energy", "forces", "stress", "dipole", "partial_charges")
    assert manifest.label_counts["train"] == {"energy": 5, "forces": 5, "stress": 2, "dipole": 4, "partial_charges": 4}
    with open_dataset(FIXTURE_2, verify="sha256") as dataset:
        graphs = list(dataset.iter_graphs("train"))
        assert dataset.index.sample_flags.tolist() == [27, 71, 27, 71, 25, 26, 71, 27, 27, 71]
    assert [g.group for g in graphs] == ["methanol", "argon", "methanol", "argon", "methanol", "methanol"]
    old = list(iter_graphs(FIXTURE, load_manifest(FIXTURE), "train"))
    assert_same_graph(graphs[0], old[0])
    assert_same_graph(graphs[2], old[1])
    assert graphs[4].forces is None
    assert graphs[4].energy == old[2].energy
    assert graphs[5].energy is None
    argon = graphs[1]
    assert argon.is_periodic
    assert argon.dipole is None
    np.testing.assert_allclose(argon.cell, 5.3 * np.eye(3))
    np.testing.assert_allclose(argon.forces, label(argon).forces, atol=1e-5)
    np.testing.assert_allclose(argon.stress, label(argon).stress, atol=1e-7)
    for entry in manifest.shards:
        assert sum(len(block) for _, block in iter_shard(FIXTURE_2 / entry.file, entry)) == entry.num_conformers


def copy_stored(folder: Path, target: Path, weights: Mapping[str, Sequence[float]] | None = None) -> Manifest:
    """Write the conformers of a stored data set again, with other weights in the loss."""
    with open_dataset(folder) as dataset:
        splits = {split: list(dataset.iter_graphs(split)) for split in shards.SPLITS}
    for split, values in (weights or {}).items():
        splits[split] = [dataclasses.replace(g, loss_weight=w) for g, w in zip(splits[split], values, strict=True)]
    names = ("name", "level_of_theory", "licence", "splits", "groups", "statistics", "provenance")
    content = json.loads((folder / "manifest.json").read_text())
    return write_graphs(target, splits, block_size=2, blocks_per_shard=2, **{name: content[name] for name in names})


def test_the_stored_data_set_of_schema_3_keeps_loading(tmp_path: Path) -> None:
    """That of schema 2 with weights in the loss; its block of two ones is one of schema 2."""
    manifest = check_dataset(FIXTURE_3, hashes=True)
    assert manifest.schema == shards.SCHEMA == 3
    assert manifest.fingerprint == "81edff5b1dca0748"
    assert manifest.loss_weights["train"] == {"num_other": 4, "min": 0.0, "mean": 0.958333333333, "max": 2.0}
    with open_dataset(FIXTURE_3, verify="sha256") as dataset, open_dataset(FIXTURE_2) as older:
        for split, weights in WEIGHTS.items():
            graphs = list(dataset.iter_graphs(split))
            assert tuple(g.loss_weight for g in graphs) == weights
            for one, other in zip(graphs, older.iter_graphs(split), strict=True):
                assert_same_graph(dataclasses.replace(one, loss_weight=1.0), other)
        assert ["loss_weight" in dataset.read_block(n).columns for n in range(5)] == [True, False, True, True, False]
        assert older.manifest.loss_weights == {}
    copy_stored(FIXTURE_2, tmp_path / "copy", WEIGHTS)
    for path in FIXTURE_3.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes(), path.name


def test_without_weights_every_byte_is_that_of_schema_2(tmp_path: Path) -> None:
    """So that the order of running runs stays what it is, and earlier programs read what this one writes."""
    copy_stored(FIXTURE_3, tmp_path / "copy", {split: [1.0] * len(w) for split, w in WEIGHTS.items()})
    for path in FIXTURE_2.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes(), path.name


def test_weights_are_told_from_shards_alone(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE_3, tmp_path / "copy")
    (tmp_path / "copy" / "index.safetensors").unlink()
    manifest = shards.write_index_and_manifest(tmp_path / "copy", load_manifest(FIXTURE_3))
    assert manifest == load_manifest(FIXTURE_3)


def test_training_conformers_of_no_weight_at_all_are_refused(tmp_path: Path) -> None:
    message = (
        r"methanol and argon must have a loss_weight above zero in its training split; got zero for all\. Correct the"
    )
    with pytest.raises(DataError, match=message):
        copy_stored(FIXTURE_2, tmp_path / "set", {"train": [0.0] * 6})
    assert not (tmp_path / "set" / "manifest.json").exists()
    copy_stored(FIXTURE_2, tmp_path / "other", {"validation": [0.0] * 2, "test": [0.0] * 2})


@pytest.mark.parametrize(
    "weights",
    [
        [], "train", {"all": {}}, {"train": 1.0}, {"train": {"min": 0.0}},
        {"train": {"num_other": 1, "min": 0.0, "mean": 1.0, "max": True}},
        {"train": {"num_other": 1, "min": -1.0, "mean": 1.0, "max": 2.0}},
        {"train": {"num_other": 1, "min": 0.0, "mean": float("nan"), "max": 2.0}},
    ],
)  # fmt: skip
def test_a_manifest_says_of_weights_what_is_known_of_them(tmp_path: Path, weights: object) -> None:
    shutil.copytree(FIXTURE_3, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss_weights": weights}))
    with pytest.raises(DataError, match=r"manifest\.json must be a manifest; got ValueError: loss_weights that are no"):
        load_manifest(tmp_path / "copy")


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_the_stored_data_sets_can_be_trained_on(tmp_path: Path, schema: int) -> None:
    """As they are; from schema 2 on some conformers have no energy, some no forces, and molecules and crystals share blocks."""
    folder = FIXTURE.with_name(f"shards_schema_{schema}")
    steps = ("data.batch_size=2", "data.lanes=2", "data.verify=size", "train.num_steps=2", "train.warmup_steps=1")
    settings = make_settings(folder, tmp_path / "run", *steps, "train.validate_every=2", "train.save_every=2")
    outcome = run_processes(tmp_path / "log", 1, train, settings)
    assert outcome.codes == (0,), outcome
    assert "step 2/2  validation" in outcome.outputs[0], outcome


def test_the_name_of_a_file_is_never_a_command(tmp_path, monkeypatch):
    """WebDataset runs what follows `pipe:` in a shell; a manifest from elsewhere must not be able to say so."""
    monkeypatch.chdir(tmp_path)
    evil = Path("pipe:touch HACKED")
    with pytest.raises(DataError, match="pipe:touch HACKED must be readable; got No such file or directory"):
        list(iter_shard(evil))
    with pytest.raises(ValueError, match="pipe"):
        list(webdataset.WebDataset([str(evil)], shardshuffle=False))
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
    assert sum(len(block) for _, block in iter_shard(folder / shard.file)) == shard.num_conformers
