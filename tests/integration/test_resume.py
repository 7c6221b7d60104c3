"""The promise: an interrupted run and one that was never interrupted end with the same bits, however it was interrupted.

Compared are weights, moments, the optimizer's count, the mean of the weights, the figures of all 40 steps, and the exported models.
"""

import itertools
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from interruptions import train_and_die, train_with_signal, train_with_stop_file
from resume_checks import train_each
from training_setup import (
    find_differences,
    make_dataset,
    make_settings,
    read_state,
    run_processes,
    train,
)

from so3krates_dist.config import read_config, to_plain
from so3krates_dist.errors import EXIT_DONE, EXIT_REQUEUE
from so3krates_dist.metrics import read_metrics
from so3krates_dist.train.checkpoint import FORMAT

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
    arguments = (step, lab.world_size - 1)
    lab.run(run, "train.async_save=false", function=train_and_die, arguments=arguments, codes=codes)
    assert f"Resumed at step {step // 10 * 10} of 40" in lab.run(run, codes={EXIT_DONE})
    lab.compare(run)


def test_killed_while_a_checkpoint_is_written(lab: Lab) -> None:
    """One step after a save has begun: it is committed or it is not, and the run ends with the same bits."""
    for rank in range(lab.world_size):
        run = lab.root / f"killed-saving{rank}"
        codes = {-signal.SIGKILL} if lab.world_size == 1 else {-signal.SIGKILL, 1}
        lab.run(run, function=train_and_die, arguments=(20, rank), codes=codes)
        assert re.search("Resumed at step [12]0 of 40", lab.run(run, codes={EXIT_DONE}))
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
        return {p: p.read_bytes() for p in lab.whole.rglob("*") if p.is_file() and not p.name.startswith(".lock")}

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


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_checkpoint_of_each_format_goes_on(tmp_path: Path, number: int) -> None:
    """Those that are kept in tests/data, of which the first two are a run's of this model."""
    stored = Path(__file__).parents[1] / "data" / f"checkpoint_format_{number}"
    run, dataset = tmp_path / "run", make_dataset(tmp_path / "data", num_train=12)
    model = to_plain(read_config(stored / "config.yaml").model)
    settings = [
        *make_settings(dataset, run, "data.batch_size=2"),
        *(f"model.{key}={value}" for key, value in model.items()),
    ]
    assert run_processes(tmp_path / "log", 1, train, [*settings, "train.stop_at=3"]).codes == (EXIT_DONE,)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(stored / "checkpoints", run / "checkpoints")
    outcome = run_processes(tmp_path / "log", 1, train, [*settings, "train.stop_at=5"])
    assert outcome.codes == (EXIT_DONE,), str(outcome)
    assert "Resumed at step 3 of 40" in outcome.outputs[0]
    before, after = (read_state(run, step) for step in (3, 5))
    assert before.keys() == after.keys()
    assert after["optimizer_steps"].tolist() == [5]
    assert not torch.equal(before["mean.network.readout.weight"], after["mean.network.readout.weight"])


STAGES = (0, 1, 2, 3)
"""of ZeRO"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each stage and number of processes, which have a checkpoint before their last three steps."""
    root = tmp_path_factory.mktemp("stages")
    make_dataset(root / "data")
    for world_size in (1, 2):
        train_stages(root, world_size, {f"{stage}-of-{world_size}": stage for stage in STAGES})
    return root


def train_stages(root: Path, world_size: int, runs: Mapping[str, int]) -> None:
    """Do some runs with their stages."""
    common = ("train.self_check=false", "train.proof=false", "train.save_every=17", "train.stop_at=20")
    settings = [
        make_settings(root / "data", root / name, *common, f"train.zero_stage={stage}") for name, stage in runs.items()
    ]
    outcome = run_processes(root / f"log-{world_size}", world_size, train_each, settings)
    assert set(outcome.codes) == {EXIT_DONE}, str(outcome)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_of_any_stage_goes_on_at_any_stage(sources: Path, before: int, after: int) -> None:
    """On another number of processes at that; that states survive on the same number bit for bit is in tests/distributed.

    Compared with what the run would have done: losses of the next steps, which tell that weights, moments, schedule and the order
    of the conformers are the same. Sums over processes round differently; equality is to that.
    """
    runs: dict[str, int] = {}
    source_of: dict[str, Path] = {}
    for first, second in itertools.product(STAGES, STAGES):
        name, source = f"{first}-of-{before}-to-{second}-of-{after}", sources / f"{first}-of-{before}"
        shutil.copytree(source, sources / name, ignore=shutil.ignore_patterns("metrics.jsonl", "step_00000020"))
        runs[name], source_of[name] = second, source
    train_stages(sources, after, runs)
    deviations = {}
    for name, source in source_of.items():
        expected, found = read_figures(source), read_figures(sources / name)
        assert [step for kind, step, key in found if (kind, key) == ("train", "loss")] == [18, 19, 20]
        deviations[name] = max(abs(v / expected[k] - 1) for k, v in found.items() if k[::2] == ("train", "loss"))
    assert max(deviations.values()) < 1e-6, deviations
