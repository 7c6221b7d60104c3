"""Several data sets in one run: on one energy scale, changed in mid-run, with labels or blocks that are missing."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from analytic import write_dataset
from interruptions import flip_byte
from loopback import serve
from training_setup import find_differences, make_config, make_graphs, make_settings, read_state, run_processes, train

from so3krates_dist.data.folder import open_dataset
from so3krates_dist.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_FAILURE
from so3krates_dist.graph import Graph
from so3krates_dist.metrics import read_metrics
from so3krates_dist.train.evaluate import evaluate_run
from so3krates_dist.train.inputs import open_data

OFFSETS = {10: 1000.0, 18: -250.0}
"""eV by element: another level of theory, whose bonds are as strong"""


def make_other_level(folder: Path, graphs: list[Graph]) -> Path:
    """Write a data set at another level of theory."""
    moved = [
        dataclasses.replace(g, energy=(g.energy or 0.0) + sum(OFFSETS[z] for z in g.atomic_numbers.tolist()))
        for g in graphs
    ]
    write_dataset(folder, {"train": moved[6:], "validation": moved[:6]}, name="dft")
    content = json.loads((folder / "manifest.json").read_text()) | {"level_of_theory": "DFT"}
    (folder / "manifest.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixing")
    graphs = make_graphs(54)
    write_dataset(folder / "morse", {"train": graphs[6:], "validation": graphs[:6]}, name="morse")
    make_other_level(folder / "dft", make_graphs(38, 500))
    return folder


def name(*folders: Path | str) -> tuple[str, str]:
    return "data.folder=", f"data.folders=[{','.join(map(str, folders))}]"


def run(target: Path, *settings: str, world_size: int = 1, code: int = EXIT_DONE) -> str:
    log = target.with_name(f"{target.name}-log")
    outcome = run_processes(log, world_size, train, make_settings("", target, "data.window_blocks=4", *settings))
    assert set(outcome.codes) == {code}, str(outcome)
    return "".join(outcome.outputs)


def read(target: Path, kind: str) -> list[dict[str, float]]:
    return [r for r in read_metrics(target / "metrics.jsonl") if r["kind"] == kind]


def test_two_levels_of_theory_are_learned_on_one_scale(root: Path, tmp_path: Path) -> None:
    """Without the shift their energies would be hundreds of eV apart, and no model could follow."""
    target = tmp_path / "run"
    learning = (
        "train.num_steps=90",
        "train.learning_rate=1e-2",
        "train.log_every=10",
        "train.validate_every=30",
        "data.batch_size=8",
    )
    said = run(target, *name(root / "morse", root / "dft"), *learning)
    assert "morse: 60 % of each step, 48 conformers, Morse\n" in said
    assert "dft: 40 % of each step, 32 conformers, DFT, energies shifted to the model's baselines\n" in said
    losses = [r["loss"] for r in read(target, "train")]
    assert losses[-1] < 0.5 * losses[0], losses
    assert all(r["energy_mae_per_atom"] < 0.2 for r in read(target, "validation"))
    provenance = json.loads((target / "config.json").read_text())["provenance"]
    assert provenance["data"] == "morse + dft"
    assert provenance["level_of_theory"] == "Morse (energies of DFT shifted to it)"
    epochs = read(target, "train")[-1]
    assert epochs["epoch"] == min(epochs["epoch/morse"], epochs["epoch/dft"])
    assert epochs["epoch/morse"] == pytest.approx(90 * 8 * 0.6 / 48, rel=0.1)
    evaluation = evaluate_run(target, split="validation")
    assert evaluation.overall.num_conformers == 12
    assert evaluation.overall.energy.mae < 0.2
    alone = evaluate_run(target, split="validation", dataset=root / "dft")
    assert alone.overall.num_conformers == 6
    assert alone.overall.energy.mae < 0.2, "it is shifted as it was in training"


def test_resumed_in_the_middle_it_ends_with_the_same_bits(root: Path, tmp_path: Path) -> None:
    both = name(root / "morse", root / "dft")
    run(tmp_path / "whole", *both, world_size=2)
    run(tmp_path / "run", *both, "train.stop_at=17", world_size=2)
    run(tmp_path / "run", *both, "data.num_workers=1", world_size=2)
    assert find_differences(read_state(tmp_path / "whole", 40), read_state(tmp_path / "run", 40)) == {}


def test_a_change_in_mid_run_is_recorded_and_can_be_resumed(root: Path, tmp_path: Path) -> None:
    """A second data set, weights in the loss and other lanes, on other processes; killed and started again, nothing changes."""
    whole, target = tmp_path / "whole", tmp_path / "run"
    one, both = (f"data.folder={root / 'morse'}",), (*name(root / "morse", root / "dft"), "data.lanes=6")
    both += ("data.loss_weights=[2,0.5]",)
    for folder in (whole, target):
        run(folder, *one, "train.stop_at=5")
    first = read_state(whole, 5)
    refused = run(target, *both, world_size=2, code=EXIT_CONFIG)
    assert "where data.folders is ['morse']; got ['morse', 'dft']. Set it back, or set data.rebase=true" in refused
    changed = (*both, "data.rebase=true")
    said = run(whole, *changed, world_size=2)
    assert find_differences(first, read_state(target, 5)) == {}
    boundary = int(re.findall(r"New plan from step (\d+) on: data\.folders \['morse'\] -> \['morse', 'dft'\]", said)[0])
    plan = json.loads((whole / "plan.json").read_text())
    assert [s["first_step"] for s in plan["segments"]] == [0, boundary]
    assert [s.get("loss_weights") for s in plan["segments"]] == [None, [2.0, 0.5]]
    assert "data.loss_weights [1.0] -> [2.0, 0.5]" in said
    assert 5 < boundary < 40
    for stop in (boundary - 1, boundary + 3, 0):
        run(target, *changed, f"train.stop_at={stop}", world_size=2)
    assert find_differences(read_state(whole, 40), read_state(target, 40)) == {}
    assert json.loads((target / "plan.json").read_text()) == plan
    assert "New plan" not in run(target, *both, world_size=2), "it has been asked for, and is the run's plan now"
    refused = run(target, *both[:-1], world_size=2, code=EXIT_CONFIG)
    assert "where data.loss_weights is [2.0, 0.5]; got [1.0, 1.0]. Set it back, or set data.rebase=true" in refused


def test_labels_that_are_missing_count_for_nothing(tmp_path: Path) -> None:
    """Energies from one data set, forces from another, neither from some; figures are over what is there."""
    graphs = [dataclasses.replace(g, forces=None) for g in make_graphs(20)]
    more = [dataclasses.replace(g, energy=None) for g in make_graphs(20, 500)]
    more[3] = dataclasses.replace(more[3], forces=None)
    write_dataset(tmp_path / "energies", {"train": graphs[4:], "validation": graphs[:4]}, name="energies")
    write_dataset(tmp_path / "forces", {"train": more[:16], "validation": more[16:]}, name="forces")
    for world_size in (1, 2):
        target = tmp_path / f"run{world_size}"
        folders = name(tmp_path / "energies", tmp_path / "forces")
        run(
            target, *folders, "train.num_steps=12", "data.batch_size=2", "train.validate_every=6", world_size=world_size
        )
        records = read(target, "train")
        assert all(np.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in records)
        assert all(
            np.isfinite(r["forces_mae"]) and np.isfinite(r["energy_mae_per_atom"]) for r in read(target, "validation")
        )
    one, two = (
        [{k: r[k] for k in ("loss", "energy_mae_per_atom", "forces_mae")} for r in read(tmp_path / f"run{n}", "train")]
        for n in (1, 2)
    )
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-4, nan_ok=True)


class TestDamagedBlocks:
    """A block whose bytes have changed after the data set was made."""

    def damage(self, root: Path, target: Path) -> tuple[Path, int]:
        """Return a copy of a data set with a damaged block, and how many conformers that has."""
        graphs = make_graphs(40, 900)
        folder = write_dataset(target, {"train": graphs[4:], "validation": graphs[:4]}, name="damaged")
        entry = open_dataset(folder).block_entry(4)
        flip_byte(folder / entry.file, entry.offset + entry.size // 2)
        return folder, entry.num_conformers

    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (2, 0)])
    def test_left_out_within_a_budget(self, root: Path, tmp_path: Path, world_size: int, num_workers: int) -> None:
        data, lost = self.damage(root, tmp_path / "data")
        settings = (
            f"data.folder={data}",
            "data.on_damage=skip",
            "train.num_steps=18",
            "data.batch_size=4",
        )
        settings = (*settings, f"data.num_workers={num_workers}")  # two epochs of nine steps
        said = run(tmp_path / "run", *settings, f"data.max_skipped={2 * lost}", world_size=world_size)
        assert re.search(
            r"left out: .*data/train-000001\.tar:train-000001-000001 must have the CRC \w+; got \w+\. Copy", said
        )
        assert said.count("left out: ") <= world_size, "said once by each process that meets it"
        assert read(tmp_path / "run", "train")[-1]["skipped_conformers"] == 2 * lost
        said = run(
            tmp_path / "stop", *settings, f"data.max_skipped={2 * lost - 1}", world_size=world_size, code=EXIT_DATA
        )
        rule = rf"so3krates: conformers left out must be at most data\.max_skipped \({2 * lost - 1}\); got {2 * lost}\. Repair"
        assert len(re.findall(rule, said)) == world_size

    def test_a_shard_that_is_cut_short_is_lost_as_a_whole(self, root: Path, tmp_path: Path) -> None:
        """Whatever data.verify says; one that is gone for good is looked for once in a window, not once for each block."""
        folder = write_dataset(tmp_path / "data", {"train": make_graphs(30)}, name="cut")
        shard = open_dataset(folder).manifest.shards[1]
        with (folder / shard.file).open("r+b") as file:
            file.truncate(shard.size // 2)
        settings = (f"data.folder={folder}", "data.on_damage=skip", "train.num_steps=5", "train.forces_weight=0")
        said = run(tmp_path / "run", *settings, f"data.max_skipped={shard.num_conformers}", world_size=2)
        line = rf"left out: .*{shard.file} must have {shard.size} bytes; got {shard.size // 2} bytes"
        assert 1 <= len(re.findall(line, said)) <= 2, said
        assert read(tmp_path / "run", "train")[-1]["skipped_conformers"] == shard.num_conformers

    def test_by_default_it_ends_the_run(self, root: Path, tmp_path: Path) -> None:
        data, _ = self.damage(root, tmp_path / "data")
        said = run(tmp_path / "run", f"data.folder={data}", "data.verify=size", code=EXIT_DATA)
        assert re.search(r"^so3krates: .*train-000001-000001 must have the CRC", said, re.MULTILINE)

    def test_a_hash_finds_it_before_the_first_step(self, root: Path, tmp_path: Path) -> None:
        data, _ = self.damage(root, tmp_path / "data")
        said = run(tmp_path / "run", f"data.folder={data}", code=EXIT_DATA)
        assert re.match(r"so3krates: .*train-000001\.tar must have the sha256", said.splitlines()[-1])
        assert not (tmp_path / "run").exists()


def test_limits_change_nothing_but_the_portions(root: Path, tmp_path: Path) -> None:
    """Passes of as few as one conformer, measured limits, one process or two: the same figures, to rounding."""
    both = (*name(root / "morse", root / "dft"), "train.num_steps=10")
    run(tmp_path / "run", *both)
    expected = [r["loss"] for r in read(tmp_path / "run", "train")]
    one, alone, found = ("data.max_atoms=9",), ("data.max_pairs=1", "data.oversized=alone"), ("data.find_limits=true",)
    for number, (more, world_size) in enumerate(((one, 1), (one, 2), (alone, 2), (found, 2))):
        target = tmp_path / f"run{number}"
        run(target, *both, *more, world_size=world_size)
        assert [r["loss"] for r in read(target, "train")] == pytest.approx(expected, rel=1e-4)
    limits = json.loads((target / "plan.json").read_text())["limits"]
    assert limits["max_atoms"] > 0


def test_an_old_run_goes_on_with_a_new_order(root: Path, tmp_path: Path) -> None:
    """Its folder has no plan; the steps it has done count as epochs."""
    target, data = tmp_path / "run", f"data.folder={root / 'morse'}"
    run(target, data, "train.stop_at=11")
    (target / "plan.json").unlink()
    said = run(target, data, code=EXIT_FAILURE)
    assert "must hold a plan.json, which says what its steps until step_00000011 were made of; got none" in said
    run(target, data, "data.rebase=true")
    segments = json.loads((target / "plan.json").read_text())["segments"]
    assert [s["first_step"] for s in segments] == [0, 11]
    epoch = {r["step"]: r["epoch"] for r in read(target, "train")}
    assert epoch[12] == pytest.approx(2 + 6 / 48, rel=0.2)


def test_data_on_a_server_are_trained_on_like_those_on_disk(root: Path, tmp_path: Path) -> None:
    """With another one on disk, interrupted; every shard is fetched once for two processes with workers and both runs."""
    few = ("train.num_steps=12", f"data.cache={tmp_path / 'cache'}")
    with serve() as server:
        address = server.add_folder(root / "dft")
        both = (*name(root / "morse", address), *few)
        run(tmp_path / "run", *both, "train.stop_at=5", "data.num_workers=1", world_size=2)
        run(tmp_path / "run", *both, world_size=2)
        fetched = [path for path, _ in server.requests if path.endswith(".tar")]
        assert sorted(fetched) == sorted({f"/set/{p.name}" for p in (root / "dft").glob("*.tar")})
        assert evaluate_run(tmp_path / "run", split="validation").overall.num_conformers == 12
    run(tmp_path / "disk", *name(root / "morse", root / "dft"), *few, world_size=2)
    assert find_differences(read_state(tmp_path / "disk", 12), read_state(tmp_path / "run", 12)) == {}


def test_mixtures_open_alike_everywhere(root: Path) -> None:
    """What processes compare is the same on all of them: nothing depends on a folder's name or on time."""
    config = make_config("''", "run", f"data.folders=[{root / 'morse'},{root / 'dft'}]")
    first, second = open_data(config), open_data(config)
    assert first.reference == second.reference
    assert first.fingerprint == second.fingerprint
