"""The loop in one process: what a run leaves behind, what it checks first, and runs of unusual data."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import label, make_cluster, make_morse, write_dataset
from training_setup import make_config, make_dataset, make_graphs, make_settings, run_processes, train

from so3krates_dist.data.stream import iter_batches
from so3krates_dist.errors import EXIT_DONE, ConfigError, DataError
from so3krates_dist.graph import Graph
from so3krates_dist.metrics import read_metrics
from so3krates_dist.model.registry import load_model
from so3krates_dist.train.evaluate import evaluate
from so3krates_dist.train.loop import _check_data


def run_to_the_end(dataset: Path, run: Path, *settings: str) -> Path:
    """Train in a process of its own: DeepSpeed knows one process group in a process's life."""
    outcome = run_processes(run.with_name("log"), 1, train, make_settings(dataset, run, *settings))
    assert outcome.codes == (EXIT_DONE,), str(outcome)
    return run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("loop") / "data", num_train=24)


def make_periodic(seed: int) -> Graph:
    cluster = make_cluster(seed, num_atoms=4)
    cell = np.diag([9.0, 10.0, 11.0])
    return label(dataclasses.replace(cluster, cell=cell, pbc=np.ones(3, bool)))


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of twelve steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    return run_to_the_end(dataset, folder, "train.num_steps=12", "train.validate_every=4")


class TestWhatARunLeaves:
    def test_its_folder(self, run: Path) -> None:
        names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
        checkpoints = {
            f"checkpoints/step_{s:08d}/{n}" for s in (10, 12) for n in ("manifest.json", "state.safetensors")
        }
        models = {f"{folder}{n}" for folder in ("", "last/") for n in ("model.safetensors", "config.json")}
        assert (
            names == {".lock", "config.yaml", "run.json", "metrics.jsonl", "checkpoints/latest"} | checkpoints | models
        )

    def test_its_figures(self, run: Path) -> None:
        records = read_metrics(run / "metrics.jsonl")
        steps = [r["step"] for r in records if r["kind"] == "train"]
        assert steps == list(range(1, 13))
        assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 8, 12]
        train = next(r for r in records if r["kind"] == "train")
        for name in ("loss", "energy_mae_per_atom", "forces_mae", "learning_rate", "gradient_norm", "conformers_per_second",
                     "data_wait_share", "epoch", "skipped_steps"):  # fmt: skip
            assert np.isfinite(train[name]), name
        assert train["epoch"] == pytest.approx(6 / 24)

    def test_the_exported_model_is_the_best_one(self, run: Path, dataset: Path) -> None:
        """Loaded anew, it has the validation error that the record says is the smallest."""
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "validation"]
        best = min(records, key=lambda r: r["forces_mae"])
        batches = iter_batches(dataset, "validation", batch_size=32, cutoff=4.0)
        found = evaluate(load_model(run), batches, device=torch.device("cpu")).summary()
        assert found["forces_mae"] == pytest.approx(best["forces_mae"], rel=1e-6)
        provenance = json.loads((run / "config.json").read_text())["provenance"]
        assert provenance["step"] == best["step"]
        assert provenance["data"] == "small"
        assert provenance["level_of_theory"] == "Morse"

    def test_the_last_model_is_the_last_mean(self, run: Path) -> None:
        from training_setup import read_state

        state = read_state(run, 12)
        for name, weight in load_model(run / "last").named_parameters():
            assert torch.equal(weight, state[f"mean.{name}"]), name


def test_training_learns(dataset: Path, tmp_path: Path) -> None:
    """From the force RMS to well below it: signs, units and the optimizer work together."""
    run = tmp_path / "run"
    more = (
        "train.num_steps=150",
        "train.learning_rate=1e-2",
        "train.log_every=10",
        "train.validate_every=150",
        "data.batch_size=8",
    )
    run_to_the_end(dataset, run, *more)
    losses = [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0], losses


class TestUnusualData:
    def test_without_validation_conformers_the_latest_is_the_best(self, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "data", {"train": make_graphs(10)})
        run = tmp_path / "run"
        run_to_the_end(data, run, "train.num_steps=8", "train.validate_every=3", "data.batch_size=2")
        assert json.loads((run / "config.json").read_text())["provenance"]["step"] == 8

    def test_single_atoms_have_no_neighbours(self, tmp_path: Path) -> None:
        potential = make_morse()
        graphs = [label(make_cluster(s, num_atoms=1), potential) for s in range(6)] + make_graphs(6)
        data = write_dataset(tmp_path / "data", {"train": graphs, "validation": graphs[:2]})
        run = tmp_path / "run"
        run_to_the_end(data, run, "train.num_steps=12", "data.batch_size=1")
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert all(r["skipped_steps"] == 0 for r in records)

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_stress_with_portions_that_are_empty(self, tmp_path: Path, stage: int) -> None:
        graphs = [make_periodic(s) for s in range(8)]
        data = write_dataset(tmp_path / "data", {"train": graphs, "validation": graphs[:2]})
        more = ("train.stress_weight=1.0", "data.batch_size=1", "train.micro_batches=2", f"train.zero_stage={stage}")
        run = tmp_path / "run"
        run_to_the_end(data, run, "train.num_steps=8", *more)
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert all(np.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in records)

    def test_energies_without_forces(self, tmp_path: Path) -> None:
        graphs = [dataclasses.replace(g, forces=None) for g in make_graphs(10)]
        data = write_dataset(tmp_path / "data", {"train": graphs, "validation": graphs[:2]})
        run = tmp_path / "run"
        run_to_the_end(data, run, "train.num_steps=8", "train.validate_every=4", "train.forces_weight=0.0")
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert all(np.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in records)
        assert (run / "model.safetensors").is_file()

    def test_bf16(self, dataset: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run_to_the_end(dataset, run, "train.num_steps=8", "model.precision=bf16")
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert all(np.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in records)


class TestFirstChecks:
    def test_no_data_set_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"data\.folder must name a data set; got nothing\. Set data\.folder=FOLDER"
        ):
            _check_data(make_config("''", tmp_path), hashes=True)

    def test_a_weight_without_labels(self, dataset: Path, tmp_path: Path) -> None:
        config = make_config(dataset, tmp_path, "train.stress_weight=1.0")
        with pytest.raises(
            ConfigError, match=r"train\.stress_weight must be 0 without stress labels; got a data set with energy"
        ):
            _check_data(config, hashes=True)

    def test_labels_that_are_not_asked_for_need_not_be_there(self, tmp_path: Path) -> None:
        graphs = make_graphs(4)
        for graph in graphs:
            graph.forces = None
        data = write_dataset(tmp_path / "data", {"train": graphs})
        assert _check_data(make_config(data, tmp_path, "train.forces_weight=0.0"), hashes=True).labels == ("energy",)

    def test_an_element_that_only_the_validation_split_has(self, tmp_path: Path) -> None:
        graphs = make_graphs(4)
        strange = dataclasses.replace(graphs[0], atomic_numbers=np.full(graphs[0].num_atoms, 79))
        data = write_dataset(tmp_path / "data", {"train": graphs, "validation": [strange]})
        with pytest.raises(
            DataError, match=r"validation split must have only elements the model was trained on .*; got Au\."
        ):
            _check_data(make_config(data, tmp_path), hashes=False)

    def test_hashes_are_compared_where_that_is_asked_for(self, tmp_path: Path) -> None:
        from interruptions import flip_byte

        data = make_dataset(tmp_path / "data", num_train=4)
        flip_byte(data / "train-000000.tar", 3000)
        _check_data(make_config(data, tmp_path), hashes=False)
        with pytest.raises(DataError, match=r"train-000000\.tar must have the sha256"):
            _check_data(make_config(data, tmp_path), hashes=True)
