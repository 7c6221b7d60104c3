"""Validating: whole sets pass, every kind of damage is named with shard, block and number."""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data_tools import examine, survey, validate
from data_tools.dataset import write_dataset
from data_tools.repeats import GeometryHashes
from data_tools.validate import Report
from so3krates_dist.data import shards
from so3krates_dist.data.shards import build_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.files import hash_file
from so3krates_dist.graph import Graph


@pytest.fixture
def folder(tmp_path: Path, make_water) -> Path:
    options = {"name": "toy", "level_of_theory": "springs", "licence": "MIT", "provenance": {}, "seed": 3}
    write_dataset(tmp_path / "set", make_water(60), split="40,10,10", **options)
    return tmp_path / "set"


def write_unchecked(folder: Path, by_split: dict[str, list[Graph]], block_size: int = 4, **changes) -> Path:
    """Write a data set without the checks of `write_dataset`, as a faulty tool would."""
    folder.mkdir()
    entries = []
    for split, graphs in by_split.items():
        entries += shards.write_shards(folder, split, graphs, block_size=block_size, blocks_per_shard=8)
    every = [g for graphs in by_split.values() for g in graphs]
    groups = {name: sum(g.group == name for g in every) for name in {g.group for g in every}}
    manifest = build_manifest(
        name="faulty", level_of_theory="none", licence="MIT", groups=groups, provenance={},
        splits={"num_conformers": {s: len(g) for s, g in by_split.items()}},
        statistics={"elements": [1, 8], "energy_baselines": {"1": -693.0, "8": -692.0}}, shards=entries,
    )  # fmt: skip
    shards.write_index_and_manifest(folder, dataclasses.replace(manifest, **changes))
    return folder


def find(report: Report, text: str) -> list[str]:
    return [line for line in report.errors if text in line]


def test_a_whole_set_is_valid_however_many_processes_read_it(folder: Path, run_tool, capsys) -> None:
    report = validate.validate(folder)
    assert (report.errors, report.warnings) == ([], [])
    assert (report.num_conformers, report.num_blocks) == (60, 34)
    assert report.units is not None
    assert report.units.kind == "agrees"
    assert run_tool(validate, folder, "--workers", 2) == 0
    out = capsys.readouterr().out
    assert "is valid: 60 conformers in 34 blocks, 0 errors, 0 warnings" in out
    assert "units check: agrees: energies follow forces with slope 1.0" in out
    with pytest.raises(DataError, match=r"--workers must be at least 1; got 0\. Give one per core"):
        validate.validate(folder, workers=0)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_process_that_dies_is_an_error(folder: Path) -> None:
    settings = examine.Settings(Deadly(), shards.load_manifest(folder), True, 50.0, 0, None, None)
    with pytest.raises(DataError, match=r"worker process must live until its work is done; got .*lack of memory"):
        list(validate.examine_all(settings, 2))


def test_sets_of_the_first_schema_are_valid(clone: Path) -> None:
    report = validate.validate(clone / "tests" / "data" / "shards_schema_1")
    assert report.errors == []
    assert report.num_conformers > 0


def test_a_flipped_bit_is_found_in_hash_and_block_and_the_exit_code_tells(folder: Path, run_tool, capsys) -> None:
    path = folder / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 4
    path.write_bytes(content)
    report = validate.validate(folder)
    assert find(report, "train-000000.tar must have")
    assert find(report, "train-000000.tar:train-000000-000000 must have the CRC")
    assert report.num_conformers == 60 - 3, "the other blocks are read"
    assert run_tool(validate, folder) == 87
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error: ")
    assert "is not valid" in lines[-1]


def test_a_missing_shard_is_found(folder: Path) -> None:
    (folder / "validation-000000.tar").unlink()
    report = validate.validate(folder)
    assert find(report, "validation-000000.tar must be there, the manifest lists it; got no such file")
    assert find(report, "must count the conformers of each split, {'train': 40, 'test': 10}")


def test_no_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a manifest.json; got no such file"):
        validate.validate(tmp_path)


# ---------------------------------------------------------------------------------------------------- damage to bytes


@pytest.fixture(scope="module")
def corruption(clone: Path) -> ModuleType:
    """The table of ways to damage a shard that the tests of shards have."""
    spec = importlib.util.spec_from_file_location("corruption", clone / "tests" / "unit" / "test_corruption.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_damage_to_a_shard_is_named(tmp_path: Path, make_water, corruption, capsys) -> None:
    folder = write_unchecked(tmp_path / "set", {"train": make_water(50)}, block_size=10)
    assert validate.validate(folder).errors == []
    path = folder / "train-000000.tar"
    content, places = path.read_bytes(), corruption.find_places(path)
    unnamed = []
    for name, damage in corruption.DAMAGES.items():
        path.write_bytes(damage(content, *places))
        assert path.read_bytes() != content, name
        named = find(validate.validate(folder), str(path))
        unnamed += [] if all("\n" not in line and " must " in line for line in named) and named else [name]
    with capsys.disabled():
        print(f" validate names {len(corruption.DAMAGES) - len(unnamed)}/{len(corruption.DAMAGES)} damages", end="")
    assert len(corruption.DAMAGES) >= 11
    assert not unnamed


def test_another_shard_with_its_own_hash_in_the_manifest_is_found_by_its_content(tmp_path: Path, make_water) -> None:
    """What hashes cannot tell: a manifest and shards that do not belong together."""
    folder = write_unchecked(tmp_path / "set", {"train": make_water(20)})
    other = write_unchecked(tmp_path / "other", {"train": make_water(20, seed=1)})
    path = folder / "train-000000.tar"
    (other / path.name).replace(path)
    edit_manifest(folder, lambda m: m["shards"][0].update(sha256=hash_file(path)))
    report = validate.validate(folder)
    assert find(report, "train-000000.tar:train-000000-000000 must have the CRC")


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
        (
            lambda m: m["label_counts"]["test"].update(energy=9),
            "must count the labels of the test split, {'energy': 10,",
        ),
        (
            lambda m: m["label_counts"]["test"].update(dipole=1),
            "must count the labels of the test split, {'energy': 10,",
        ),
        (lambda m: m["shards"][0].update(num_conformers=41), "train-000000.tar must hold 14 blocks, 41 conformers"),
        (lambda m: m["index"].update(sha256="0" * 64), "index.safetensors must have"),
    ],
)
def test_a_manifest_that_does_not_fit_is_found(folder: Path, edit, message: str) -> None:
    edit_manifest(folder, edit)
    report = validate.validate(folder)
    assert find(report, message), report.errors


@pytest.mark.parametrize("change", [lambda c: c[:1000], lambda c: b"<html>" + c[6:], lambda c: b""])
def test_shards_are_read_from_front_to_back_where_the_index_is_damaged(folder: Path, change) -> None:
    path = folder / "index.safetensors"
    path.write_bytes(change(path.read_bytes()))
    report = validate.validate(folder)
    assert find(report, "index.safetensors must have")
    assert all("index.safetensors" in line for line in report.errors), report.errors
    assert report.num_conformers == 60


def test_no_index_is_found(folder: Path) -> None:
    (folder / "index.safetensors").unlink()
    report = validate.validate(folder)
    assert find(report, "index.safetensors must be there, the manifest lists it; got no such file")
    assert report.num_conformers == 60


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        ("sample_atoms", 5, "index.safetensors for train-000000.tar:train-000000-000001:1 must count its atoms, 3; got 4"),
        ("sample_flags", 5, "train-000000-000001:1 must count its labels, 3; got 4"),
        ("sample_pairs", 5, "train-000000-000001:1 must count its pairs, [3, 3, 3, 3, 3]; got [4, 3, 3, 3, 3]"),
        ("block_pairs", 1, "column block_pairs for train-000000.tar:train-000000-000001 must be [12, 12, 12, 12, 12]; got [13,"),
        ("block_max_atoms", 1, "column block_max_atoms for train-000000.tar:train-000000-000001 must be 3; got 4"),
        ("block_max_pairs", 1, "must be [3, 3, 3, 3, 3]; got [4, 3"),
    ],
)  # fmt: skip
def test_an_index_of_other_conformers_is_found(tmp_path: Path, make_water, column: str, row: int, message: str) -> None:
    """An index with a right hash and wrong rows, as a faulty writer makes it."""
    folder = write_unchecked(tmp_path / "set", {"train": make_water(20)})
    path = folder / "index.safetensors"
    with shards.open_dataset(folder) as dataset:
        values = getattr(dataset.index, column)
        before = values.tobytes()
        changed = values.copy()
        changed.reshape(len(changed), -1)[row, 0] = 4 if column != "block_pairs" else 13
    content = path.read_bytes()
    start = find_column(content, column)
    assert content[start : start + len(before)] == before
    path.write_bytes(content[:start] + changed.tobytes() + content[start + len(before) :])
    edit_manifest(folder, lambda m: m["index"].update(sha256=hash_file(path)))
    report = validate.validate(folder)
    assert find(report, message), report.errors


def find_column(content: bytes, name: str) -> int:
    """Return where a column of a safetensors file starts."""
    size = int.from_bytes(content[:8], "little")
    return 8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]


# ----------------------------------------------------------------------------------------------------- faulty conformers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": np.nan}, "must have finite energy; got nan or infinity"),
        ({"forces": np.full((3, 3), np.nan)}, "must have finite forces"),
        ({"positions": np.full((3, 3), np.nan)}, "must have finite positions"),
        ({"total_charge": np.nan}, "must have finite total_charge"),
        ({"positions": np.zeros((3, 3))}, "must have its atoms at least 0.3 Å apart; got 0.000 Å"),
        ({"positions": np.array([[0, 0, 0], [0, 0, 0.35], [0, 2, 0]])}, "must have no atoms closer than 0.4 of the sum"),
        ({"total_charge": 1.0}, "must have as many paired electrons as come in pairs; got 9 electrons"),
        ({"stress": np.eye(3)}, "must have a periodic cell with a volume where it has a stress; got no cell"),
        ({"atomic_numbers": np.array([8, 1, 200])}, "must have atomic numbers from 1 to 118; got 1 to 200"),
    ],
)  # fmt: skip
def test_faulty_conformers_are_named_by_shard_block_and_number(
    tmp_path: Path, make_water, change, message: str
) -> None:
    graphs = make_water(10)
    graphs[6] = dataclasses.replace(graphs[6], **change)
    folder = write_unchecked(tmp_path / "set", {"train": graphs})
    report = validate.validate(folder)
    assert find(report, message), report.errors
    name = "water" if "atomic_numbers" in change else "water (H2O)"
    assert report.errors[0].startswith(f"train-000000.tar:train-000000-000001:2 {name} must")


def test_a_thousand_faulty_conformers_are_counted_and_not_all_kept(
    tmp_path: Path, make_water, run_tool, capsys
) -> None:
    graphs = [dataclasses.replace(g, total_charge=1.0) for g in make_water(1200)]
    folder = write_unchecked(tmp_path / "set", {"train": graphs}, block_size=200)
    report = validate.validate(folder)
    assert (len(report.errors), report.count("errors")) == (1000, 1200)
    assert run_tool(validate, folder) == 87
    out = capsys.readouterr().out
    assert "error: and 1180 more" in out
    assert "1200 errors, 1 warnings" in out


def test_large_forces_outliers_units_and_new_elements_are_warnings(
    tmp_path: Path, make_water, run_tool, capsys
) -> None:
    train, test = make_water(60), make_water(5, seed=1)
    for graph in train:
        graph.forces = -graph.forces
    test[0].energy += 100.0
    test[1].forces[0, 0] = 60.0
    test[2].atomic_numbers = np.array([16, 1, 1])
    test[3].partial_charges = np.array([-0.8, 0.4, 0.3])
    folder = write_unchecked(tmp_path / "set", {"train": train, "test": test})
    report = validate.validate(folder)
    assert report.errors == []
    text, place = "\n".join(report.warnings), "test-000000.tar:test-000000-000000"
    assert "the manifest does not say how the split was made" in text
    assert f"{place}:0 water (H2O) should have an energy within 0." in text
    assert " eV/atom of the usual; got 33.3 eV/atom off" in text
    assert f"{place}:1 water (H2O) has a force of 60" in text
    charges = "should have partial charges that add up to its total charge, 0 e; got -0.100 e"
    assert f"{place}:3 water (H2O) {charges}" in text
    assert "the test split has elements that the training split lacks: S" in text
    assert "the data set has energies that fall where the forces say they rise" in text
    assert "probably gradients in place of forces; are its units right?" in text
    assert run_tool(validate, folder, "--max-force", "1e-6") == 0
    assert "warning: and " in capsys.readouterr().out


def test_labels_that_some_conformers_lack_are_counted(tmp_path: Path, make_water) -> None:
    graphs = make_water(60)
    for index, graph in enumerate(graphs):
        graph.energy = graph.energy if index % 2 else None
        graph.dipole = np.zeros(3) if index % 3 else None
        graph.forces = graph.forces if index % 5 else None
    options = {"name": "toy", "level_of_theory": "springs", "licence": "MIT", "provenance": {}, "seed": 3}
    write_dataset(tmp_path / "set", graphs, split="40,10,10", **options)
    report = validate.validate(tmp_path / "set")
    assert (report.errors, report.warnings) == ([], [])


@pytest.mark.parametrize("name", ["energy", "forces", "dipole", "cell", "pbc"])
def test_values_where_a_mask_says_there_is_no_label_are_found(make_water, name: str) -> None:
    graphs = make_water(3)
    for index, graph in enumerate(graphs):
        graph.dipole, graph.cell, graph.pbc = np.ones(3), 9 * np.eye(3), np.ones(3, bool)
        if index == 1:
            setattr(graph, name, None)
    block = shards.decode_block(shards.encode_block(graphs))
    findings = examine.Findings()
    examine.check_masks(block, "shard:block", findings)
    assert findings.errors == []
    column = np.array(block.columns[name])
    column[4 if name == "forces" else 1] = 1
    filled = dataclasses.replace(block, columns={**block.columns, name: column})
    examine.check_masks(filled, "shard:block", findings)
    expected = (
        f"shard:block column `{name}` must be empty where `has_{name}` says so; got values. Make the data set anew."
    )
    assert findings.errors == [expected]


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_limits_that_are_none_are_refused(folder: Path, run_tool, value: str) -> None:
    with pytest.raises(DataError, match="--max-force must be a positive, finite number of eV/Å; got"):
        run_tool(validate, folder, f"--max-force={value}")


def test_sets_without_energies_are_valid(tmp_path: Path, make_water) -> None:
    graphs = make_water(20)
    for graph in graphs:
        graph.energy = None
    report = validate.validate(write_unchecked(tmp_path / "set", {"train": graphs}))
    assert report.errors == []
    assert report.units is not None
    assert report.units.kind == "undecided"


# ---------------------------------------------------------------------------------------------------------- duplicates


def test_a_geometry_in_two_splits_is_an_error_and_twice_in_one_a_warning(tmp_path: Path, make_water) -> None:
    train, test = make_water(20), make_water(5, seed=1)
    test[3] = dataclasses.replace(train[17], energy=0.0)
    train[2], train[9] = dataclasses.replace(train[0], energy=-2070.0), dataclasses.replace(train[0], energy=-2071.0)
    report = validate.validate(write_unchecked(tmp_path / "set", {"train": train, "test": test}))
    place, other = "test-000000.tar:test-000000-000000:3", "train-000000.tar:train-000000-000004:1"
    rule = "must have a geometry that the train split does not have"
    assert report.errors == [f"{place} of the test split {rule}; got that of {other}. Split by geometry anew."]
    first = "train-000000.tar:train-000000-000000"
    text = f"2 conformers have the geometry of another one of their split, e.g. {first}:2 that of {first}:0"
    assert text in report.warnings


@pytest.mark.parametrize("bucket_rows", [10_000, 100, 1])
def test_repeats_are_found_in_as_little_memory_as_one_likes(bucket_rows: int) -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 1000, np.uint64).tolist()
    hashes[0], hashes[1], hashes[2] = 0, 2**64 - 1, 2**64 - 1
    expected = {(1, 2)}
    for number in range(500, 540):
        hashes[number] = hashes[number - 100]
        expected.add((number - 100, number))
    with GeometryHashes(1000, bucket_rows) as table:
        for start in range(0, 1000, 64):
            table.add(hashes[start : start + 64], range(start, min(start + 64, 1000)))
        table.add([], [])
        assert set(table.iter_repeats()) == expected


def test_nothing_repeats_in_nothing() -> None:
    with GeometryHashes(0) as table:
        assert list(table.iter_repeats()) == []


# ------------------------------------------------------------------------------------------------- what is looked at


def test_blocks_are_chosen_evenly(tmp_path: Path, make_water) -> None:
    folder = write_unchecked(tmp_path / "set", {"train": make_water(80), "test": make_water(20, seed=1)}, block_size=5)
    with shards.open_dataset(folder) as dataset:
        assert survey.choose_blocks(dataset, None) == list(range(20))
        assert survey.choose_blocks(dataset, 100) == list(range(20))
        assert survey.choose_blocks(dataset, 25) == [2, 6, 10, 14, 18]
        assert survey.choose_blocks(dataset, 1) == [10]
        assert survey.choose_blocks(dataset, 5, ["test"]) == [18]
        assert survey.choose_blocks(dataset, 5, ["validation"]) == []
        placed = list(survey.iter_placed(dataset, [1, 16]))
        assert [(p.split, p.block, p.index) for p in placed[::5]] == [("train", 1, 0), ("test", 16, 0)]
        assert survey.name_place(dataset, 16, 3) == "test-000000.tar:test-000000-000000:3"
