"""The loop in one process: what a run leaves behind, what it checks first, and runs of unusual data."""

import dataclasses
import json
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import label, make_cluster, make_morse, write_dataset
from training_setup import make_config, make_dataset, make_graphs, make_settings, run_processes, train

from so3krates_dist.data.stream import StepData, iter_batches
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import EXIT_DONE, DataError
from so3krates_dist.graph import Graph, collate
from so3krates_dist.metrics import read_metrics
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model, load_model
from so3krates_dist.train import loop, run_state
from so3krates_dist.train.checkpoint import TrainingState
from so3krates_dist.train.context import RunContext
from so3krates_dist.train.evaluate import evaluate
from so3krates_dist.train.guard import StepGuard
from so3krates_dist.train.inputs import open_data
from so3krates_dist.train.loop import Training
from so3krates_dist.train.optim import Plateau
from so3krates_dist.train.progress import Progress
from so3krates_dist.train.run_state import RunState


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
            f"checkpoints/step_{s:08d}/{n}"
            for s in (10, 12)
            for n in ("manifest.json", "state-00000-of-00001.safetensors")
        }
        models = {f"{folder}{n}" for folder in ("", "last/", "last_raw/") for n in ("model.safetensors", "config.json")}
        assert (
            names
            == {
                ".lock",
                ".lock-owner.json",
                "config.yaml",
                "run.json",
                "plan.json",
                "metrics.jsonl",
                "checkpoints/latest",
            }
            | checkpoints
            | models
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
        assert not any(name.startswith("weight/") for name in train), "they do not change"

    def test_the_exported_model_is_the_best_one(self, run: Path, dataset: Path) -> None:
        """Loaded anew, it has the validation error that the record says is the smallest."""
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "validation"]
        best = min(records, key=lambda r: r["forces_mae"])
        batches = iter_batches(dataset, "validation", batch_size=32, cutoffs=(4.0, 4.0))
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


class TestBestModel:
    def make(self, monkeypatch: pytest.MonkeyPatch, summaries: list[dict[str, float]], saved: list[int]) -> Training:
        """Return a training whose evaluations give these figures."""
        figures = iter(summaries)
        evaluation = types.SimpleNamespace(summary=lambda: next(figures))
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: evaluation)
        monkeypatch.setattr(loop, "iter_batches", lambda *_, **__: ())
        monkeypatch.setattr(RunState, "export_best", lambda state: saved.append(state.progress.step))
        config = make_config("data", "run", "train.proof=false")
        mixture: Any = types.SimpleNamespace(num_conformers=lambda _: 4, held_out="a")
        metrics: Any = types.SimpleNamespace(log=lambda *_: None, message=lambda _: None)
        folder: Any = types.SimpleNamespace(path=Path("run"))
        training = object.__new__(Training)
        training.config, training.section, training.rank = config, config.train, Rank()
        training.device, training.mixture, training.metrics = torch.device("cpu"), mixture, metrics
        state = object.__new__(RunState)
        state._context = RunContext(config, Rank(), training.device, mixture, folder, metrics)
        potential: Any = types.SimpleNamespace(cutoffs=(4.0, 4.0))
        state.mean = types.SimpleNamespace(potential=potential, load_state=lambda _: None)  # type: ignore[assignment]
        state.engine = types.SimpleNamespace(load_state=lambda _: None)  # type: ignore[assignment]
        state.guard, state.plateau, state.progress = StepGuard(config.train), Plateau(config.train), Progress()
        training.state = state
        writer: Any = types.SimpleNamespace(write_now=lambda write: write())
        state.writer = writer
        return training

    def validate(self, training: Training, step: int) -> None:
        training.state.progress.step = step
        training.validate()

    def resume(self, monkeypatch: pytest.MonkeyPatch, training: Training, progress: Progress) -> None:
        stored = TrainingState(progress=progress.to_json(), tensors={})
        monkeypatch.setattr(run_state, "load_checkpoint", lambda _: stored)
        training.state.resume(Path("checkpoint"))

    @pytest.mark.parametrize("forces", [True, False])
    def test_it_is_the_one_of_least_error_not_the_latest(self, monkeypatch: pytest.MonkeyPatch, forces: bool) -> None:
        errors = [0.5, 0.3, 0.4, 0.2, 0.9]
        other = float("nan") if not forces else 1.0
        summaries = [
            {"forces_mae": e if forces else other, "energy_mae_per_atom": other if forces else e} for e in errors
        ]
        saved: list[int] = []
        training = self.make(monkeypatch, summaries, saved)
        for step in range(1, 6):
            self.validate(training, step)
        assert saved == [1, 2, 4]
        assert training.state.progress.best_score == 0.2

    def test_a_run_of_an_earlier_version_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They stored minus the step in place of the error: the next evaluation counts as the best."""
        saved: list[int] = []
        training = self.make(monkeypatch, [{"forces_mae": 0.4}, {"forces_mae": 0.6}], saved)
        self.resume(monkeypatch, training, Progress(step=7, applied=7, data_step=7, best_score=-7.0))
        assert training.state.progress.step == 7
        self.validate(training, 8)
        self.validate(training, 9)
        assert saved == [8]

    @pytest.mark.parametrize(("scored_on", "best"), [("a", []), ("", []), ("b", [8]), ("a b", [8])])
    def test_errors_of_other_conformers_are_not_compared(
        self, monkeypatch: pytest.MonkeyPatch, scored_on: str, best: list[int]
    ) -> None:
        """Data sets that are harder to learn came in with a rebase: no later model would ever be the best."""
        saved: list[int] = []
        training = self.make(monkeypatch, [{"forces_mae": 0.4}, {"forces_mae": 0.6}], saved)
        progress = Progress(step=7, applied=7, data_step=7, best_score=0.3, scored_on=scored_on)
        self.resume(monkeypatch, training, progress)
        self.validate(training, 8)
        self.validate(training, 9)
        assert saved == best


def train_and_tell(settings: Sequence[str]) -> int:
    """Train, each process with a line on its standard error for what it makes of each evaluation."""
    follow = Training.follow_plateau

    def follow_and_tell(training: Training, score: float) -> None:
        follow(training, score)
        print(f"score {score!r} factor {training.state.plateau.factor}", file=sys.stderr, flush=True)

    Training.follow_plateau = follow_and_tell  # type: ignore[assignment, method-assign]  # in a process of its own
    return train(settings)


def test_what_changes_in_the_course_of_a_run_is_said_and_recorded(dataset: Path, tmp_path: Path) -> None:
    """A plateau, since the weights stay the same to the last bit, and weights of the loss that move."""
    run = tmp_path / "run"
    more = (
        "train.num_steps=8", "train.validate_every=2", "train.schedule=plateau", "train.plateau_patience=1",
        "train.learning_rate=1e-30", "train.final_learning_rate=4e-31", "train.warmup_steps=1", "train.weights_until=4",
        "train.energy_weight=0.1", "train.final_energy_weight=0.5",
    )  # fmt: skip
    outcome = run_processes(tmp_path / "log", 2, train_and_tell, make_settings(dataset, run, *more))
    assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
    said = re.findall(r"learning rate times .*\S", outcome.outputs[0])
    rest = "from here on: no better held-out error in 1 evaluation"
    assert said == [f"learning rate times {ratio} {rest}" for ratio in ("0.5", "0.8")], "down to the final rate"
    told = [re.findall(r"score .*", output) for output in outcome.outputs]
    assert told[0] == told[1], "all processes decide alike"
    assert [line.split()[-1] for line in told[0]] == ["1.0", "0.5", "0.4", "0.4"]
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["learning_rate"] for r in records[2:]] == pytest.approx([1e-30] * 2 + [5e-31] * 2 + [4e-31] * 2, rel=1e-6)
    energy = [r["weight/energy"] for r in records]
    assert energy == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5], rel=1e-9)
    assert {r["weight/forces"] for r in records} == {records[0]["weight/forces"]}


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

    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
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

    @pytest.mark.parametrize("precision", ["bf16-mixed", "float64"])
    def test_another_precision(self, dataset: Path, tmp_path: Path, precision: str) -> None:
        run = tmp_path / "run"
        run_to_the_end(dataset, run, "train.num_steps=8", f"train.precision={precision}", "train.zero_stage=0")
        records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
        assert all(np.isfinite(r["loss"]) and r["skipped_steps"] == 0 for r in records)


@pytest.mark.parametrize("is_seen", [True, False])
def test_charges_that_the_model_does_not_see_are_said_once(tmp_path: Path, is_seen: bool) -> None:
    graphs = [dataclasses.replace(g, total_charge=1.0, num_unpaired_electrons=1.0) for g in make_graphs(6)]
    data, model = (
        write_dataset(tmp_path / "data", {"train": graphs}),
        ("model.name=so3lr", "model.num_features=8", "model.num_heads=2"),
    )
    more = model if is_seen else ()
    outcome = run_processes(
        tmp_path / "log", 1, train, make_settings(data, tmp_path / "run", "train.num_steps=6", *more)
    )
    assert outcome.codes == (EXIT_DONE,), str(outcome)
    note = "note: there are total charges and unpaired electrons, which this model does not see"
    assert outcome.outputs[0].count(note) == (0 if is_seen else 1)


ION = dataclasses.replace(make_periodic(2), total_charge=1.0)
MOLECULE = np.zeros(3, bool)


@pytest.mark.parametrize(
    ("graphs", "count"),
    [
        ([make_periodic(1), ION], 1),
        ([make_periodic(1), make_periodic(2)], 0),
        ([make_periodic(1), dataclasses.replace(ION, pbc=MOLECULE)], 0),
    ],
    ids=["charged crystal", "neutral", "charged molecule"],
)
def test_charged_crystals_are_noted_where_the_data_must_have_some(
    tmp_path: Path, graphs: list[Graph], count: int
) -> None:
    """The manifest counts charged and periodic structures: of two, if both are crystals, a charged one is one of them."""
    data = write_dataset(tmp_path / "data", {"train": graphs})
    config = make_config(data, tmp_path, "model.name=so3lr", "model.num_features=8", "model.num_heads=2")
    mixture = open_data(config)
    potential = build_model(config.model, ModelStatistics.from_manifest(mixture.statistics, config.model))
    folder: Any = types.SimpleNamespace(path=tmp_path)
    metrics: Any = types.SimpleNamespace(message=print)
    context = RunContext(config, Rank(), torch.device("cpu"), mixture, folder, metrics)
    found = [
        line for line in context.describe(potential) if line.startswith("note: there are charged periodic structures")
    ]
    assert len(found) == count


class TestDamage:
    """Conformers that are left out are counted over all processes, and the budget ends all of them."""

    def make(self, most: int) -> Training:
        training = object.__new__(Training)
        training.config = make_config("data", "run", "data.on_damage=skip", f"data.max_skipped={most}")
        training.device, training.rank = torch.device("cpu"), Rank()
        training.num_left_out, training.complaints = 0, set()
        writer = types.SimpleNamespace(flags=lambda: (0.0, 0.0), settle=lambda *_: None)
        training.state = types.SimpleNamespace(writer=writer)  # type: ignore[assignment]
        self.said: list[str] = []
        training.metrics = types.SimpleNamespace(message=self.said.append)  # type: ignore[assignment]
        return training

    def test_each_block_is_named_once(self) -> None:
        training = self.make(10)
        for skipped in (2, 3):
            data = StepData([collate([])], skipped, ("a.tar:a-000000 must have the CRC 1; got 2.",))
            agreed = training.agree(data, None, stop_pending=False)
            assert (agreed.conformers, agreed.stopping) == (0.0, False)
        assert training.num_left_out == 5
        assert self.said == ["left out: a.tar:a-000000 must have the CRC 1; got 2."]

    def test_over_the_budget(self) -> None:
        training = self.make(4)
        training.agree(StepData([collate([])], 4), None, stop_pending=False)
        training.agree(StepData([collate([])], 0), None, stop_pending=False)
        with pytest.raises(
            DataError, match=r"conformers left out must be at most data\.max_skipped \(4\); got 5\. Repair the data"
        ):
            training.agree(StepData([collate([])], 1), None, stop_pending=False)

    def test_other_processes_say_it_for_themselves(self, capsys: pytest.CaptureFixture[str]) -> None:
        training = self.make(4)
        training.rank = Rank(rank=1, local_rank=1, world_size=2, local_world_size=2)
        training.complain(("a.tar is damaged",) * 2)
        assert capsys.readouterr().err == "rank 1: left out: a.tar is damaged\n"
        assert self.said == []
