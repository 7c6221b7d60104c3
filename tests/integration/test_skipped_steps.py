"""What happens in the midst of a run and must not spoil it: losses that are not finite, spikes, and worker processes that die."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import train_on_faults, train_on_nan, train_with_dead_worker
from training_setup import find_differences, make_dataset, make_settings, read_state, run_processes, train

from so3krates_dist.errors import EXIT_DATA, EXIT_DONE, EXIT_NON_FINITE
from so3krates_dist.train import replay
from so3krates_dist.train.checkpoint import find_checkpoint, load_checkpoint
from so3krates_dist.train.guard import Verdict
from so3krates_dist.train.stored_step import read_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("skipped") / "data", num_train=24)


def read_progress(run: Path, step: int) -> tuple[int, int, int]:
    """Return the steps done, those that were applied, and the position in the data, as a checkpoint says."""
    progress = load_checkpoint(run / "checkpoints" / f"step_{step:08d}").progress
    return progress["step"], progress["applied"], progress["data_step"]


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the record that are about training."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == "train"]


REPLAYED = {
    "positions": r"`positions` of conformer \d \(size\d\) is not finite",
    "label": r"Label `forces` of conformer \d \(size\d\) is infinite",
    "gradient": r"Loss and gradient are finite in float32 and float64 with the same data and weights",
}
NOT_FINITE = [("positions", 0), ("label", 1), ("gradient", 0), ("gradient", 1), ("gradient", 2), ("gradient", 3)]


class TestSkippedSteps:
    """What one of two processes cannot use is used by none; what was skipped can be computed again."""

    @pytest.mark.parametrize(("kind", "stage"), NOT_FINITE, ids=[f"{k}-{s}" for k, s in NOT_FINITE])
    def test_what_is_not_finite_on_one_process(
        self, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, stage: int
    ) -> None:
        run = tmp_path / "run"
        more = (f"train.zero_stage={stage}", "train.stop_at=7", "train.save_every=1", "train.keep_checkpoints=4")
        outcome = run_processes(tmp_path / "log", 2, train_on_faults, make_settings(dataset, run, *more), kind, [5], 1)
        assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
        assert find_differences(read_state(run, 5), read_state(run, 6)) == {}, "weights, moments and their count, mean"
        assert find_differences(read_state(run, 6), read_state(run, 7)) != {}
        assert [read_progress(run, step) for step in (5, 6, 7)] == [(5, 5, 5), (6, 5, 6), (7, 6, 7)]
        records = read_records(run)
        assert [r["step"] for r in records] == list(range(1, 8))
        assert [r["skipped_steps"] for r in records] == [0.0] * 5 + [1.0, 0.0]
        rates = [r["learning_rate"] for r in records]
        assert rates[5] == rates[6] != rates[4], "the schedule stands still"

        stored = read_step(run, 5)
        assert (stored.facts.verdict, stored.facts.data_step) == (Verdict.NON_FINITE, 5)
        assert [sum(b.num_graphs for b in batches) for batches in stored.batches] == [3, 3]
        weights = read_state(run, 5)
        assert all(torch.equal(weight, weights[f"weight.{name}"]) for name, weight in stored.weights.items())
        assert re.search(
            r"Step 5 was skipped, (its loss|the norm of its gradient) is (nan|inf); `so3krates", outcome.outputs[0]
        )
        assert f"`so3krates replay {run} 5` repeats it" in outcome.outputs[0]
        assert replay.run(argparse.Namespace(run_folder=run, step=5, device="cpu")) == EXIT_DONE
        said = capsys.readouterr().out
        assert re.search(REPLAYED[kind], said), said
        content = json.loads((stored.path / "replay.json").read_text())
        loss, repeated = content["recorded"]["loss"], content["repeated"]["float32"]["loss"]
        assert loss == repeated if isinstance(loss, str) else repeated == pytest.approx(loss, rel=1e-5)

    def test_a_spike_on_one_process(self, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run, other = tmp_path / "run", tmp_path / "other"
        more = ("train.stop_at=26", "train.save_every=1", "train.validate_every=1000")
        settings = make_settings(dataset, run, *more, "train.spike_factor=8")
        outcome = run_processes(tmp_path / "log", 2, train_on_faults, settings, "spike", [24], 1)
        assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
        assert read_progress(run, 26) == (26, 25, 26)
        stored = read_step(run, 24)
        assert stored.facts.verdict is Verdict.SPIKE
        assert stored.facts.loss > 1000 * stored.facts.usual_loss
        assert replay.run(argparse.Namespace(run_folder=run, step=24, device="cpu")) == EXIT_DONE
        said = capsys.readouterr().out
        assert re.search(
            r"The loss is finite and \S+ times the usual one: a spike; conformer \d \(size\d\) makes up 100 %", said
        )
        content = json.loads((stored.path / "replay.json").read_text())
        assert content["repeated"]["float32"]["loss"] == pytest.approx(stored.facts.loss, rel=1e-5)

        settings = make_settings(dataset, other, *more)
        assert (
            run_processes(tmp_path / "log2", 2, train_on_faults, settings, "spike", [24], 1).codes == (EXIT_DONE,) * 2
        )
        assert read_progress(other, 26) == (26, 26, 26), "not looked for by default"

    def test_back_to_a_checkpoint_and_past_the_spoiled_data(self, dataset: Path, tmp_path: Path) -> None:
        """Weights are those of a run that skips these steps and never goes back, after as many steps that count."""
        back, on = tmp_path / "back", tmp_path / "on"
        more = ("train.save_every=5", "train.zero_stage=1")
        settings = make_settings(dataset, back, *more, "train.max_skipped_steps=2", "train.stop_at=10")
        outcome = run_processes(tmp_path / "log", 2, train_on_faults, settings, "gradient", range(5, 9), 0)
        assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
        assert "Went back 3 steps to the checkpoint of step 5" in outcome.outputs[0]
        assert read_progress(back, 10) == (10, 9, 13)
        settings = make_settings(dataset, on, *more, "train.stop_at=13")
        outcome = run_processes(tmp_path / "log2", 2, train_on_faults, settings, "gradient", range(5, 9), 0)
        assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
        assert read_progress(on, 13) == (13, 9, 13)
        assert find_differences(read_state(back, 10), read_state(on, 13)) == {}
        assert [p.name for p in sorted((on / "skipped").iterdir())] == [f"step_{s:08d}" for s in (6, 7, 8)]

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_nan_in_every_step_ends_the_run(self, dataset: Path, tmp_path: Path, world_size: int) -> None:
        """On one process alone; all go back and end alike, and the last checkpoint is what it was before the trouble."""
        run = tmp_path / "run"
        more = ("train.max_skipped_steps=2", "train.save_every=5", "train.max_rollbacks=2")
        outcome = run_processes(
            tmp_path / "log", world_size, train_on_nan, make_settings(dataset, run, *more), 5, world_size - 1
        )
        assert outcome.codes == (EXIT_NON_FINITE,) * world_size, str(outcome)
        assert outcome.outputs[0].count("Went back 3 steps to the checkpoint of step 5") == 2, str(outcome)
        line = "step 7 must have a finite loss and gradient in one of 3 steps; got none after going back to a checkpoint 2 times"
        assert all(line in said for said in outcome.outputs)
        assert not any("Traceback" in said for said in outcome.outputs), str(outcome)
        (tmp_path / "whole").mkdir()
        settings = make_settings(dataset, tmp_path / "whole" / "run", "train.stop_at=5", "train.save_every=1")
        assert run_processes(tmp_path / "log2", world_size, train, settings).codes == (EXIT_DONE,) * world_size
        found, _ = find_checkpoint(run / "checkpoints")
        assert found is not None
        assert found.name == "step_00000005"
        assert find_differences(read_state(run, 5), read_state(tmp_path / "whole" / "run", 5)) == {}

    def test_nothing_is_stored_where_nothing_is_to_be_kept(self, dataset: Path, tmp_path: Path) -> None:
        settings = make_settings(dataset, tmp_path / "run", "train.stop_at=4", "train.keep_skipped=0")
        outcome = run_processes(tmp_path / "log", 1, train_on_faults, settings, "positions", [2], 0)
        assert outcome.codes == (EXIT_DONE,), str(outcome)
        assert not (tmp_path / "run" / "skipped").exists()
        assert re.search(r"(?m)^Step 2 was skipped, .* is (nan|inf)$", outcome.outputs[0])


def test_a_worker_process_that_is_killed(dataset: Path, tmp_path: Path) -> None:
    """The process that lost it says so, the other one ends with it, and the same command goes on as if nothing had happened."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    more = ("data.num_workers=1", "train.save_every=2", "train.stop_at=12")
    settings = make_settings(dataset, run, *more)
    outcome = run_processes(tmp_path / "log", 2, train_with_dead_worker, settings, 5, 1)
    assert outcome.codes == (EXIT_DATA, EXIT_DATA), str(outcome)
    rule = r"worker processes that prepare step 6 must stay alive; got DataLoader worker \(pid \d+\) is killed by signal: Killed\."
    remedy = r"Start the same command again; where memory was short, lower data\.num_workers\."
    assert re.search(rf"(?m)^so3krates: {rule} {remedy}$", outcome.outputs[1]), str(outcome)
    assert "so3krates: data of another process must be readable; got an error." in outcome.outputs[0]
    assert not any("Traceback" in said for said in outcome.outputs), str(outcome)
    outcome = run_processes(tmp_path / "log2", 2, train, settings)
    assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
    assert "Resumed at step 6" in outcome.outputs[0], "the save that had begun was finished"
    assert run_processes(tmp_path / "log3", 2, train, make_settings(dataset, whole, *more)).codes == (EXIT_DONE,) * 2
    assert find_differences(read_state(run, 12), read_state(whole, 12)) == {}
