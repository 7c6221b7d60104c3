"""Stored steps computed again: the same numbers as in training, and the right culprit."""

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import label, make_cluster, make_morse
from training_setup import make_config, make_graphs

from so3krates_dist.config import RunConfig, dump_config, read_config
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.distributed import Rank
from so3krates_dist.errors import CheckpointError, ConfigError, DataError
from so3krates_dist.graph import Graph, GraphBatch, collate
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import replay as replay_module
from so3krates_dist.train.guard import Verdict
from so3krates_dist.train.losses import LABELS, compute_loss, compute_weights, count_labels
from so3krates_dist.train.plain_engine import PlainEngine
from so3krates_dist.train.replay import Replay, diagnose, iter_conformers, replay_step, run
from so3krates_dist.train.skipped import write_step
from so3krates_dist.train.stored_step import StepFacts, StoredStep, read_step

STORED = Path(__file__).parents[2] / "data" / "skipped_format_1"
CPU = torch.device("cpu")
STATISTICS = ModelStatistics(
    elements=(10, 18), energy_baselines={10: -1.0, 18: -2.0}, energy_scale=0.5, mean_neighbors=4.0
)
NAN = math.nan


def collate_graphs(graphs: Sequence[Graph]) -> GraphBatch:
    return collate([build_neighbors(graph, 4.0, 4.0) for graph in graphs])


def make_model(config: RunConfig) -> Potential:
    torch.manual_seed(5)
    return build_model(config.model, STATISTICS)


def make_stored(
    tmp_path: Path, *settings: str, edit: Callable[[list[GraphBatch]], None] | None = None, **changes: Any
) -> StoredStep:
    """Store a step of three passes, the last one empty, with the loss that training would have found."""
    config = make_config("data", tmp_path, *settings)
    batches = [collate_graphs(make_graphs(4)), collate_graphs(make_graphs(3, 20)), collate([])]
    if edit is not None:
        edit(batches)
    section, model = config.train, make_model(config)
    counts = [sum(kinds) for kinds in zip(*map(count_labels, batches), strict=True)]
    weights = compute_weights(0, section)
    engine = PlainEngine(model, section, CPU)
    loss = 0.0
    for batch in batches:
        share, _ = compute_loss(
            engine.forward(batch.to(CPU, engine.dtype)), batch, counts, section, weights, STATISTICS.energy_scale
        )
        engine.backward(share, is_last=False)
        loss += float(share.detach())
    norm = engine.compute_gradient_norm()
    facts = StepFacts(
        step=7, data_step=9, loss=loss, gradient_norm=norm,
        verdict=Verdict.SPIKE if math.isfinite(loss) and math.isfinite(norm) else Verdict.NON_FINITE, usual_loss=loss / 8,
        counts=dict(zip(LABELS, counts, strict=True)), loss_weights=weights, statistics=STATISTICS,
        precision=section.precision, device="cpu",
    )  # fmt: skip
    tmp_path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    named = {name: weight.detach() for name, weight in make_model(config).named_parameters()}
    write_step(tmp_path, dataclasses.replace(facts, **changes), batches, named, Rank(), CPU, 3)
    return read_step(tmp_path, 7)


def repeat(tmp_path: Path, stored: StoredStep) -> Replay:
    return replay_step(stored, read_config(tmp_path / "config.yaml"), CPU)


LOSSES = [
    (), ("train.forces_loss=l2", "train.energy_loss=huber"), ("train.forces_loss=huber", "train.energy_loss=mae"),
    ("model.name=euclidean_transformer",), ("train.precision=float64", "train.zero_stage=0"),
    ("train.activation_checkpointing=blocks",),
]  # fmt: skip


class TestTheSameNumbers:
    @pytest.mark.parametrize("settings", LOSSES, ids=[" ".join(s) or "as it is" for s in LOSSES])
    def test_as_in_training(self, tmp_path: Path, settings: tuple[str, ...]) -> None:
        stored = make_stored(tmp_path, *settings)
        results = repeat(tmp_path, stored).results
        arithmetic = "float64" if "train.precision=float64" in settings else "float32"
        for name, tolerance in ((arithmetic, 1e-6), ("float64", 1e-4)):
            assert results[name].loss == pytest.approx(stored.facts.loss, rel=tolerance)
            assert results[name].gradient_norm == pytest.approx(stored.facts.gradient_norm, rel=10 * tolerance)

    def test_in_bf16_too_where_the_run_was_trained_so(self, tmp_path: Path) -> None:
        stored = make_stored(tmp_path, "train.precision=bf16-mixed")
        results = repeat(tmp_path, stored).results
        assert list(results) == ["float32", "float64", "bf16-mixed"]
        assert results["bf16-mixed"].loss != results["float32"].loss
        assert results["bf16-mixed"].loss == pytest.approx(results["float32"].loss, rel=0.05)

    def test_conformers_add_up_to_the_step(self, tmp_path: Path) -> None:
        def weigh(batches: list[GraphBatch]) -> None:
            batches[0].loss_weight = torch.tensor([1.0, 0.0, 2.5, 1.0])
            batches[1].forces[:5] = NAN  # type: ignore[index]

        stored = make_stored(tmp_path, edit=weigh)
        replay = repeat(tmp_path, stored)
        assert len(replay.conformers) == 7
        for name in ("float32", "float64"):
            total = sum(conformer.shares[name].loss for conformer in replay.conformers)
            assert total == pytest.approx(replay.results[name].loss, rel=1e-5 if name == "float32" else 1e-12)
        assert replay.conformers[1].shares["float64"].loss == 0
        assert [(c.number, c.rank, c.passed, c.group, c.num_atoms) for c in replay.conformers[3:5]] == [
            (3, 0, 0, "size7", 7), (4, 0, 1, "size6", 6),
        ]  # fmt: skip

    def test_conformers_are_those_that_were_joined(self) -> None:
        crystal = make_cluster(5, num_atoms=4, group="crystal")
        crystal.cell, crystal.pbc = 9.0 * torch.eye(3).numpy(), torch.tensor([True] * 3).numpy()
        graphs = [build_neighbors(g, 3.0, 4.0) for g in (*make_graphs(2), label(crystal, make_morse()))]
        for found, graph in zip(iter_conformers(collate(graphs)), graphs, strict=True):
            expected = collate([graph])
            for field in dataclasses.fields(GraphBatch):
                one, two = getattr(found, field.name), getattr(expected, field.name)
                if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
                    assert torch.equal(one, two), field.name
                elif isinstance(one, torch.Tensor):
                    assert two is None, field.name
                    assert one.isnan().all(), "a label that others of the batch have"
                else:
                    assert one == two, field.name
        assert list(iter_conformers(collate([]))) == []


def spoil_label(batches: list[GraphBatch]) -> None:
    batches[1].forces[7, 1] = math.inf  # type: ignore[index]


def spoil_positions(batches: list[GraphBatch]) -> None:
    batches[0].positions[6] = NAN


def spoil_charge(batches: list[GraphBatch]) -> None:
    batches[0].total_charge[2], batches[0].positions[11] = math.inf, NAN


def enlarge(batches: list[GraphBatch]) -> None:
    batches[1].forces[8] *= 1e7  # type: ignore[index]


def overflow(batches: list[GraphBatch]) -> None:
    batches[1].forces[8, 0] = 1e25  # type: ignore[index]


def put_together(batches: list[GraphBatch]) -> None:
    batches[0].positions[1] = batches[0].positions[0]


CULPRITS: list[tuple[Callable[[list[GraphBatch]], None], str]] = [
    (spoil_label, r"Label `forces` of conformer 5 \(size7\) is infinite"),
    (spoil_positions, r"`positions` of conformer 1 \(size5\) is not finite"),
    (spoil_charge, r"`positions` and `total_charge` of conformer 2 \(size6\) are not finite"),
    (overflow, r"In float32 the share of the loss of conformer 5 \(size7\) is not finite, while float64 is finite: an .*"),
    (enlarge, r"The loss is finite and 8 times the usual one: a spike; conformer 5 \(size7\) makes up 100 % of it"),
]  # fmt: skip


class TestDiagnosis:
    @pytest.mark.parametrize(("edit", "sentence"), CULPRITS, ids=[c[0].__name__ for c in CULPRITS])
    def test_data(self, tmp_path: Path, edit: Callable[[list[GraphBatch]], None], sentence: str) -> None:
        import re

        assert re.fullmatch(sentence, diagnose(repeat(tmp_path, make_stored(tmp_path, edit=edit))))

    def test_atoms_in_one_place(self, tmp_path: Path) -> None:
        """Whatever the model makes of it, the distance is told."""
        replay = repeat(tmp_path, make_stored(tmp_path, edit=put_together))
        assert replay.conformers[0].closest == 0
        if not replay.results["float64"].is_finite:
            assert "of conformer 0 (size4), whose closest atoms are 0 Å apart, " in diagnose(replay)

    def test_spoiled_weights(self, tmp_path: Path) -> None:
        stored = make_stored(tmp_path)
        name = next(iter(stored.weights))
        stored.weights[name].flatten()[0] = NAN
        expected = f"The weights are not finite themselves (1 tensors: `{name}`): a step before this one spoiled them"
        assert diagnose(repeat(tmp_path, stored)) == expected

    def test_large_weights(self, tmp_path: Path) -> None:
        """An overflow in all conformers: the first is named."""
        stored = make_stored(tmp_path)
        stored.weights["network.readout.weight"] *= 1e25
        found = diagnose(repeat(tmp_path, stored))
        assert found == (
            "In float32 the share of the loss of conformer 0 (size4) is not finite, while float64 is finite: an overflow of float32"
        )

    def test_a_fault_that_is_not_repeated(self, tmp_path: Path) -> None:
        stored = make_stored(tmp_path, loss=NAN, verdict=Verdict.NON_FINITE, device="cuda")
        expected = (
            "Loss and gradient are finite in float32 and float64 with the same data and weights:"
            " the fault was that of the device (cuda) or of the arithmetic (float32) of the training"
        )
        assert diagnose(repeat(tmp_path, stored)) == expected

    def test_a_spike_that_is_not_repeated(self, tmp_path: Path) -> None:
        stored = make_stored(tmp_path, loss=1e4, usual_loss=10.0)
        assert diagnose(repeat(tmp_path, stored)).startswith(
            "The loss is finite and 1e+03 times the usual one: a spike, which is not repeated: it is "
        )

    def test_only_together(self, tmp_path: Path) -> None:
        replay = repeat(tmp_path, make_stored(tmp_path))
        spoiled = dataclasses.replace(replay.results["float64"], loss=NAN)
        together = dataclasses.replace(replay, results={**replay.results, "float64": spoiled})
        expected = "In float64 the loss of the whole step is not finite, though that of each conformer by itself is"
        assert diagnose(together) == expected


class TestErrors:
    """Of each conformer, against its labels, in float64."""

    def test_largest_force_error_and_energy_error_per_atom(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored = make_stored(tmp_path)
        replay = repeat(tmp_path, stored)
        model = make_model(read_config(tmp_path / "config.yaml")).double().eval()
        batch = stored.batches[0][0]
        outputs = model(batch.to(CPU, torch.float64))
        assert batch.energy is not None
        assert batch.forces is not None
        energy = ((outputs["energy"] - batch.energy).abs() / batch.num_atoms).tolist()
        errors = (outputs["forces"] - batch.forces).abs().amax(dim=1)
        forces = [float(errors[batch.graph_index == i].max()) for i in range(batch.num_graphs)]
        found = replay.conformers[: batch.num_graphs]
        assert [c.energy_error for c in found] == pytest.approx(energy, rel=1e-9)
        assert [c.force_error for c in found] == pytest.approx(forces, rel=1e-9)
        replay_module.print_replay(replay, "")
        lines = capsys.readouterr().out.splitlines()
        assert "E error meV/atom" in lines[5]
        row = next(line for line in lines if line.strip().startswith("0 ("))
        assert f"  {1e3 * energy[0]:.4g}  " in row

    def test_without_labels_there_are_none(self, tmp_path: Path) -> None:
        def remove(batches: list[GraphBatch]) -> None:
            batches[0] = dataclasses.replace(batches[0], forces=None)
            assert batches[1].energy is not None
            batches[1].energy[0] = NAN

        found = repeat(tmp_path, make_stored(tmp_path, edit=remove)).conformers
        assert [math.isnan(c.force_error) for c in found] == [True] * 4 + [False] * 3
        assert [math.isnan(c.energy_error) for c in found] == [False] * 4 + [True] + [False] * 2


def call(folder: Path, step: int = 7) -> int:
    return run(argparse.Namespace(run_folder=folder, step=step, device="cpu"))


class TestCommand:
    def test_what_is_printed_and_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        stored = make_stored(tmp_path, edit=spoil_label)
        assert call(tmp_path) == 0
        said = capsys.readouterr().out
        lines = said.splitlines()
        assert lines[0] == f"Step 7 of {tmp_path}: non-finite, 1 process(es), float32 on cpu"
        assert lines[1].split() == ["recorded", "float32", "float64"]
        assert lines[2].split() == ["loss", "inf", "inf", "inf"]
        assert lines[4] == "Conformers (7), each by itself in float64"
        assert lines[6].split()[:2] == ["5", "(size7)"], "the culprit comes first"
        assert lines[6].endswith("forces, loss in float32, loss in float64")
        assert lines[-2] == "Label `forces` of conformer 5 (size7) is infinite."
        assert lines[-1] == f"written to {stored.path / 'replay.json'}"

        content = json.loads((stored.path / "replay.json").read_text(), parse_constant=lambda _: pytest.fail("no JSON"))
        assert content["format"] == 1
        assert content["diagnosis"] == lines[-2].rstrip(".")
        assert content["recorded"]["loss"] == content["repeated"]["float64"]["loss"] == "inf"
        culprit = content["conformers"][5]
        assert culprit["faults"] == ["forces"]
        assert (culprit["pass"], culprit["rank"], culprit["formula"], culprit["force_error"]) == (
            1,
            0,
            culprit["formula"],
            "inf",
        )
        assert math.isfinite(content["conformers"][0]["shares"]["float32"]["gradient_norm"])
        assert math.isfinite(content["conformers"][0]["energy_error"])
        assert read_step(tmp_path, 7).facts.step == 7, "what was written beside it does not spoil it"

    def test_twenty_conformers_are_shown(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def add(batches: list[GraphBatch]) -> None:
            batches[2] = collate_graphs(make_graphs(16, 40))

        make_stored(tmp_path, edit=add)
        call(tmp_path)
        assert "Conformers (20 of 23), each by itself" in capsys.readouterr().out

    def test_names_cannot_drive_the_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def rename(batches: list[GraphBatch]) -> None:
            batches[1].group = ("\x1b[2J\nx", "b", "c")

        make_stored(tmp_path, edit=rename)
        call(tmp_path)
        said = capsys.readouterr().out
        assert "(?[2J?x)" in said
        assert "\x1b" not in said

    def test_another_model(self, tmp_path: Path) -> None:
        make_stored(tmp_path)
        (tmp_path / "config.yaml").write_text(dump_config(make_config("data", tmp_path, "model.num_layers=1")))
        rule = r"weights\.safetensors must hold the weights of the run's model, `network\..*` as none; got \(.*\)\. Put back the"
        with pytest.raises(CheckpointError, match=rule):
            call(tmp_path)

    def test_other_elements(self, tmp_path: Path) -> None:
        def change(batches: list[GraphBatch]) -> None:
            batches[0].atomic_numbers[0] = 10

        stored = make_stored(tmp_path, edit=change)
        stored.batches[0][0].atomic_numbers[0] = 92
        with pytest.raises(DataError, match=r"must have only elements the model was trained on \(Ne, Ar\); got U"):
            repeat(tmp_path, stored)

    def test_no_configuration(self, tmp_path: Path) -> None:
        make_stored(tmp_path)
        (tmp_path / "config.yaml").unlink()
        with pytest.raises(ConfigError, match=r"config\.yaml must be a readable YAML file"):
            call(tmp_path)

    def test_findings_that_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored = make_stored(tmp_path)
        (stored.path / ".replay.json.tmp").mkdir()
        rule = r"replay\.json must find room on a disk that can be written to; got .*The findings above are complete without it"
        with pytest.raises(CheckpointError, match=rule):
            call(tmp_path)
        assert "a spike" in capsys.readouterr().out

    def test_format_1_is_repeated_for_ever(self, tmp_path: Path) -> None:
        """A step of two processes with an infinite label, stored by the first version that stored any."""
        folder = tmp_path / "run"
        shutil.copytree(STORED, folder)
        stored = read_step(folder, 8)
        replay = repeat(folder, stored)
        assert not math.isfinite(stored.facts.loss)
        assert diagnose(replay) == "Label `forces` of conformer 3 (size6) is infinite"
        finite = [c for c in replay.conformers if not c.faults]
        assert sum(c.shares["float64"].loss for c in finite) == pytest.approx(1.3036437510502938, rel=1e-6)


def test_the_arguments() -> None:
    parser = argparse.ArgumentParser()
    replay_module.add_arguments(parser)
    arguments = parser.parse_args(["runs/a", "12"])
    assert (arguments.run_folder, arguments.step, arguments.device) == (Path("runs/a"), 12, "auto")
