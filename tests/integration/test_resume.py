"""The promise: an interrupted run and one that was never interrupted end with the same bits, however it was interrupted.

Compared are weights, moments, the optimizer's count, the mean of the weights, the figures of all 40 steps, and the exported models.
"""

import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from interruptions import train_and_die, train_with_signal, train_with_stop_file
from training_setup import find_differences, make_dataset, make_settings, read_state, run_processes, train

from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE
from so3krates_dist.metrics import read_metrics

NUM_STEPS = 40
FIGURES = ("loss", "energy_mae_per_atom", "forces_mae", "forces_rmse", "learning_rate", "gradient_norm", "epoch")


class Lab:
    """Runs of one number of processes, each compared with the one that was never interrupted."""

    def __init__(self, root: Path, dataset: Path, world_size: int) -> None:
        self.root, self.dataset, self.world_size = root, dataset, world_size
        self.whole = root / "whole"
        self.run(self.whole, codes={EXIT_DONE})

    def settings(self, run: Path, *more: str) -> list[str]:
        return make_settings(self.dataset, run, *more)

    def run(
        self,
        run: Path,
        *more: str,
        function: Callable[..., int] = train,
        arguments: Sequence[object] = (),
        codes: set[int],
    ) -> str:
        """Start the run, or go on with it; return what rank 0 said."""
        log = run.with_name(f"{run.name}-log")
        shutil.rmtree(log, ignore_errors=True)
        outcome = run_processes(log, self.world_size, function, self.settings(run, *more), *arguments)
        assert set(outcome.codes) == codes, str(outcome)
        return outcome.outputs[0]

    def compare(self, run: Path) -> None:
        """Assert that a run ended as the uninterrupted one did."""
        assert find_differences(read_state(self.whole, NUM_STEPS), read_state(run, NUM_STEPS)) == {}
        expected, found = (read_figures(r) for r in (self.whole, run))
        assert found.keys() == expected.keys()
        assert {k: (v, found[k]) for k, v in expected.items() if found[k] != v} == {}
        for name in ("model.safetensors", "last/model.safetensors"):
            assert (run / name).read_bytes() == (self.whole / name).read_bytes(), name


def read_figures(run: Path) -> dict[tuple[str, int, str], float]:
    records = read_metrics(run / "metrics.jsonl")
    return {(r["kind"], r["step"], k): r[k] for r in records for k in FIGURES if k in r}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp(f"resume{request.param}")
    return Lab(root, make_dataset(root / "data"), request.param)


def test_the_record_is_whole(lab: Lab) -> None:
    figures = read_figures(lab.whole)
    assert [step for kind, step, name in figures if (kind, name) == ("train", "loss")] == list(range(1, NUM_STEPS + 1))
    assert [step for kind, step, name in figures if (kind, name) == ("validation", "forces_mae")] == [20, 40]
    losses = [v for (kind, _, name), v in figures.items() if (kind, name) == ("train", "loss")]
    assert len(set(losses)) == NUM_STEPS


def test_stopped_as_planned(lab: Lab) -> None:
    run = lab.root / "planned"
    lab.run(run, "train.stop_at=17", codes={EXIT_DONE})
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_00000010", "step_00000017"]
    assert "Resumed at step 17 of 40" in lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


@pytest.mark.parametrize("step", [0, 19, 23])
def test_stopped_by_a_signal_to_one_process(lab: Lab, step: int) -> None:
    """The signal comes while a step is being done; the processes agree in the next one."""
    run = lab.root / f"signal{step}"
    arguments = (step, lab.world_size - 1, signal.SIGTERM)
    said = lab.run(run, function=train_with_signal, arguments=arguments, codes={EXIT_REQUEUE})
    assert f"Stopped after {step + 2} steps" in said
    lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


def test_stopped_by_the_stop_file(lab: Lab) -> None:
    run = lab.root / "file"
    said = lab.run(run, function=train_with_stop_file, arguments=(4, 0), codes={EXIT_REQUEUE})
    assert re.search("Stopped after [56] steps", said), "the other process may see the file in the same step"
    assert not (run / "STOP").exists(), "it has been obeyed"
    lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


@pytest.mark.parametrize("step", [11, 36])
def test_killed(lab: Lab, step: int) -> None:
    """The last process is killed; the others end by themselves. The run goes on from the last checkpoint."""
    run = lab.root / f"killed{step}"
    codes = {-signal.SIGKILL} if lab.world_size == 1 else {-signal.SIGKILL, 1}
    lab.run(run, function=train_and_die, arguments=(step, lab.world_size - 1), codes=codes)
    assert f"Resumed at step {step // 10 * 10} of 40" in lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


def test_killed_before_the_first_checkpoint(lab: Lab) -> None:
    """With worker processes, which outlive their training process by some seconds, and must not outlive the others."""
    run = lab.root / "killed-early"
    codes = {-signal.SIGKILL} if lab.world_size == 1 else {-signal.SIGKILL, 1}
    arguments = (3, lab.world_size - 1)
    lab.run(run, "data.num_workers=1", function=train_and_die, arguments=arguments, codes=codes)
    lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


def test_worker_processes_change_nothing(lab: Lab) -> None:
    """Workers that prepare batches, and an interruption that makes them start in the midst of an epoch."""
    run = lab.root / "workers"
    lab.run(run, "data.num_workers=2", "train.stop_at=13", codes={EXIT_DONE})
    lab.run(run, "data.num_workers=1", codes={EXIT_DONE})
    lab.compare(run)


def test_a_finished_run_is_left_as_it_is(lab: Lab) -> None:
    def read_all() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in lab.whole.rglob("*") if p.is_file() and p.name != ".lock"}

    before = read_all()
    assert "Done after 40 steps" in lab.run(lab.whole, codes={EXIT_DONE})
    assert read_all() == before


def test_another_number_of_processes_goes_on_with_the_same_batches(lab: Lab) -> None:
    """Sums over processes round differently, so equality is to rounding; ZeRO stage and worker processes may change too."""
    run = lab.root / "other"
    lab.run(run, "train.stop_at=17", codes={EXIT_DONE})
    other = Lab.__new__(Lab)
    other.root, other.dataset, other.world_size, other.whole = lab.root, lab.dataset, 3 - lab.world_size, lab.whole
    assert "Resumed at step 17" in other.run(run, "train.zero_stage=2", "data.num_workers=1", codes={EXIT_DONE})
    expected, found = (read_figures(r) for r in (lab.whole, run))
    assert found.keys() == expected.keys()
    deviations = {k: abs(found[k] / v - 1) for k, v in expected.items()}
    assert max(deviations.values()) < 1e-3, sorted(deviations.items(), key=lambda item: -item[1])[:5]
