"""Validating: whole sets pass, every kind of damage is named with shard, block and number."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_tools import dataset, validate
from data_tools.dataset import write_dataset
from data_tools.validate import Report
from so3krates_dist.data import shards
from so3krates_dist.data.shards import SPLITS, build_manifest, dump_manifest, load_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph


@pytest.fixture
def folder(tmp_path: Path, make_water) -> Path:
    options = {"name": "toy", "level_of_theory": "springs", "licence": "MIT", "provenance": {}, "seed": 3}
    write_dataset(tmp_path / "set", make_water(60), split="40,10,10", **options)
    return tmp_path / "set"


def write_unchecked(folder: Path, by_split: dict[str, list[Graph]], **changes) -> Path:
    """Write a data set without the checks of `write_dataset`, as a faulty tool would."""
    folder.mkdir()
    entries = []
    for split, graphs in by_split.items():
        entries += shards.write_shards(folder, split, graphs, block_size=4, blocks_per_shard=8)
    every = [g for graphs in by_split.values() for g in graphs]
    groups = {name: sum(g.group == name for g in every) for name in {g.group for g in every}}
    manifest = build_manifest(
        name="faulty", level_of_theory="none", licence="MIT", groups=groups, labels=("energy", "forces"), provenance={},
        splits={"num_conformers": {s: len(g) for s, g in by_split.items()}},
        statistics={"elements": [1, 8], "energy_baselines": {"1": -693.0, "8": -692.0}}, shards=entries,
    )  # fmt: skip
    (folder / "manifest.json").write_text(dump_manifest(dataclasses.replace(manifest, **changes)), encoding="utf-8")
    return folder


def find(report: Report, text: str) -> list[str]:
    return [line for line in report.errors if text in line]


def test_a_whole_set_is_valid(folder: Path, run_tool, capsys) -> None:
    report = validate.validate(folder)
    assert (report.errors, report.warnings) == ([], [])
    assert report.num_conformers == 60
    assert run_tool(validate, folder) == 0
    assert "is valid: 60 conformers in" in capsys.readouterr().out


def test_a_flipped_bit_is_found_in_hash_and_block_and_the_exit_code_tells(folder: Path, run_tool, capsys) -> None:
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 4
    path.write_bytes(content)
    report = validate.validate(folder)
    assert find(report, "train-000000.tar must have")
    assert find(report, "train-000000.tar:train-000000-000000 must have the CRC")
    assert run_tool(validate, folder) == 87
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: ")
    assert "is not valid" in lines[-1]


def test_a_truncated_shard_is_found(folder: Path) -> None:
    path = folder / "test-000000.tar"
    path.write_bytes(path.read_bytes()[:1100])
    report = validate.validate(folder)
    assert find(report, "test-000000.tar must have")
    assert find(report, "test-000000.tar must be readable by webdataset") or find(report, "blocks of the manifest")
    assert find(report, "test-000000.tar:test-000000-000009 must have")


def test_a_missing_shard_is_found(folder: Path) -> None:
    (folder / "validation-000000.tar").unlink()
    report = validate.validate(folder)
    assert find(report, "validation-000000.tar must be there, the manifest lists it; got no such file")
    assert find(report, "must count the conformers of each split, {'train': 40, 'test': 10}")


def test_no_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a manifest.json; got no such file"):
        validate.validate(tmp_path)


def edit_manifest(folder: Path, edit) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["groups"].update(water=59), "must count the conformers of each group; got {'water': 59}"),
        (lambda m: m["splits"]["num_conformers"].update(test=9), "must count the conformers of each split"),
        (lambda m: m["statistics"].update(elements=[1]), "must list the training elements, [1, 8]; got [1]"),
        (lambda m: m["splits"].update(seed=4), "be in the split of its hash"),
        (lambda m: m["splits"].pop("seed"), "must give the seed of the split; got None"),
        (lambda m: m["splits"].update(upper_bounds={}), "must give the hash that ends each split; got {}"),
        (lambda m: m["shards"][0]["blocks"]["num_conformers"].__setitem__(0, 99), "must hold 99 conformers"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(folder: Path, edit, message: str) -> None:
    edit_manifest(folder, edit)
    report = validate.validate(folder)
    assert find(report, message), report.errors


def test_keys_of_the_tar_that_the_manifest_does_not_list_are_found(folder: Path) -> None:
    edit_manifest(folder, lambda m: [column.pop() for column in m["shards"][0]["blocks"].values()])
    assert find(
        validate.validate(folder), "train-000000.tar must hold the 13 blocks of the manifest; got 14 or other ones"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": np.nan}, "must have finite energy; got nan or infinity"),
        ({"forces": np.full((3, 3), np.nan)}, "must have finite forces"),
        ({"positions": np.full((3, 3), np.nan)}, "must have finite positions"),
        ({"total_charge": np.nan}, "must have finite total_charge"),
        ({"positions": np.zeros((3, 3))}, "must have its atoms at least 0.3 Å apart; got 0.000 Å"),
        ({"total_charge": 1.0}, "must have as many paired electrons as come in pairs; got 9 electrons"),
    ],
)
def test_faulty_conformers_are_named_by_shard_block_and_number(
    tmp_path: Path, make_water, change, message: str
) -> None:
    graphs = make_water(10)
    graphs[6] = dataclasses.replace(graphs[6], **change)
    report = validate.validate(write_unchecked(tmp_path / "set", {"train": graphs}))
    assert find(report, message), report.errors
    assert report.errors[0].startswith("train-000000.tar:train-000000-000001:2 water (H2O) must")


def test_large_forces_outliers_units_and_new_elements_are_warnings(
    tmp_path: Path, make_water, run_tool, capsys
) -> None:
    train, test = make_water(60), make_water(5, seed=1)
    for graph in train:
        graph.forces = -graph.forces
    test[0].energy += 100.0
    test[1].forces[0, 0] = 60.0
    test[2].atomic_numbers = np.array([16, 1, 1])
    folder = write_unchecked(tmp_path / "set", {"train": train, "test": test})
    report = validate.validate(folder)
    assert report.errors == []
    text = "\n".join(report.warnings)
    assert "the manifest does not say how the split was made" in text
    assert "test-000000.tar:test-000000-000000:0 water (H2O) has an energy 33.3 eV/atom off the baselines" in text
    assert "test-000000.tar:test-000000-000000:1 water (H2O) has a force of 60" in text
    assert "the test split has elements that the training split lacks: S" in text
    assert "the data set has energies that fall where the forces say they rise" in text
    assert run_tool(validate, folder, "--max-force", "1e-6") == 0
    assert "warning: and " in capsys.readouterr().out


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_limits_that_are_none_are_refused(folder: Path, run_tool, value: str) -> None:
    with pytest.raises(DataError, match="--max-force must be a positive, finite number of eV/Å; got"):
        run_tool(validate, folder, f"--max-force={value}")


def test_sets_without_energies_are_valid(tmp_path: Path, make_water) -> None:
    graphs = make_water(20)
    for graph in graphs:
        graph.energy = None
    assert validate.validate(write_unchecked(tmp_path / "set", {"train": graphs})).errors == []


def test_every_split_is_checked(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert {s.split for s in manifest.shards} == set(SPLITS)
    assert sum(1 for s in SPLITS for _ in dataset.iter_graphs(folder, manifest, s)) == 60
