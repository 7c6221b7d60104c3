"""The dry run: everything is checked as in training, one step is real, figures are right, and nothing is left behind."""

import contextlib
import math
import re
from pathlib import Path

import pytest
import torch
from training_setup import make_dataset, make_settings, run_processes, train

from so3krates_dist import cli
from so3krates_dist.config import load_config
from so3krates_dist.data.passes import Limits
from so3krates_dist.errors import EXIT_CONFIG, EXIT_DATA, EXIT_FAILURE, EXIT_NON_FINITE, ConfigError
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.model.registry import build_model
from so3krates_dist.train import dry_run, memory
from so3krates_dist.train.forecast import find_heaviest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dry") / "set", 90)


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def dry(dataset, tmp_path, capsys, monkeypatch):
    """Runs the command in an empty folder; returns the exit code, the output, and the error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, world_size: int | None = None) -> tuple[int, str, str]:
        size = () if world_size is None else ("--world-size", str(world_size))
        capsys.readouterr()
        before = list_files(tmp_path)
        code = cli.main(["train", "--dry-run", *size, *make_settings(dataset, tmp_path / "run", *words)])
        assert list_files(tmp_path) == before, "a dry run leaves everything as it was"
        return code, *capsys.readouterr()

    return run


def get(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in\n{text}"
    return found[1]


# ------------------------------------------------------------------------------------------------------------ what it says


def test_one_process(dry, dataset, tmp_path):
    code, out, err = dry()
    assert (code, err) == (0, "")
    assert "1 process(es) on cpu" in out
    assert "conformers 90 train / 4 validation / 4 test" in out
    assert get(r"Steps: (\S+) conformers", out) == "6"
    assert get(r"in (1 pass) on each of 1 process", out)
    assert get(r"Epochs: \w+ (\S+) in 40 steps, 15 steps each", out) == "2.667"
    assert math.isfinite(float(get(r"plain torch: loss (\S+), gradient norm", out)))
    assert float(get(r"gradient norm (\S+)", out)) > 0
    assert re.search(r"Activations of the largest pass: \S+ [kM]B \(measured\)", out)
    assert re.search(r"Time on this machine \(cpu, 1 threads\): \S+ s for its step, \d+:\d\d for 40 steps\n", out)
    rows = [line for line in out.splitlines() if re.match(r"  [0-3](,|  )", line)]
    assert len(rows) == 7
    assert [line.split()[0] for line in rows if "<- this run" in line] == ["1"]
    assert "note: on CPUs a process keeps memory that it has freed" in out
    assert f"Nothing was written to {tmp_path / 'run'}." in out
    assert f"Next: `so3krates train {' '.join(make_settings(dataset, tmp_path / 'run'))[:40]}" in out
    assert out.endswith("begins a new run of 40 steps there.\n")


def test_several_processes_for_a_machine_with_gpus(dry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("train.device=cuda", "train.precision=tf32", "train.zero_stage=3", "train.offload_optimizer=true")
    code, out, err = dry(*words, "train.micro_batches=1", world_size=4)
    assert (code, err) == (0, "")
    assert out.startswith(
        "note: train.device=cuda: there is no GPU here, so neither its memory nor whether it can do train.precision"
    )
    assert "4 process(es) on cuda" in out
    assert "Memory of each of 4 process(es):\n" in out
    assert "\nexchange: buffers in which processes add up gradients and put weights together, when activations" in out
    assert "which wait for each other" in out
    assert "on CPUs a process keeps memory" not in out
    assert "s for the share of one process" in out
    assert "; 4 processes were not measured" in out
    assert re.search(r"\n  3, optimizer on the CPU  <- this run .* [kM]B\n", out)
    assert "Next: `deepspeed --num_accelerators 4 launch/train.py model.num_features=8" in out


@pytest.mark.parametrize("world_size", [8, 16])
def test_more_processes_than_one_machine_has_are_started_on_several(dry, world_size):
    _, out, _ = dry("data.lanes=16", "data.batch_size=16", world_size=world_size)
    note = (
        "note: 16 processes are more than most machines have GPUs (8), so the command below is for a Slurm job of as many tasks,"
        " with MASTER_ADDR and MASTER_PORT exported; without Slurm put `deepspeed --hostfile FILE` in place of `srun python`,"
        " FILE with a line `MACHINE slots=8` for each machine\nNext: `srun python launch/train.py model."
    )
    assert (note in out) == (world_size == 16)
    assert ("Next: `deepspeed --num_accelerators 8 launch/train.py model." in out) == (world_size == 8)
    assert ("steps: 1 conformer, " in out) == (world_size == 16)


def test_stages_that_the_settings_do_not_allow_are_left_out_of_the_table(dry):
    _, out, _ = dry("train.activation_checkpointing=low_memory")
    assert len(re.findall(r"\n  [0-3](?:,|  )", out)) == 5
    assert "\n  3" not in out
    _, out, _ = dry("train.precision=float64", "train.zero_stage=0")
    assert re.search(r"\n  none  <- this run +\S+ [kM]B", out)
    assert len(re.findall(r"\n  (?:none|\d)", out)) == 1


def test_measurements_of_the_real_run_are_said_to_be_missing(dry):
    _, out, _ = dry("data.fit_cost=true", "data.find_limits=true")
    assert "note: data.fit_cost: costs are measured when the run starts; here those of the configuration count" in out
    assert "note: data.find_limits: limits are measured when the run starts; here passes have none" in out


def test_passes_follow_the_limits(dry):
    _, out, _ = dry("data.max_atoms=12", "data.batch_size=24", world_size=2)
    atoms = int(get(r"Largest pass of the first \d+ steps: \d+ conformers, (\d+) atoms", out))
    assert 9 <= atoms <= 12
    assert int(get(r"in up to (\d+) passes on each", out)) > 1


def test_a_run_that_has_begun_and_one_that_is_done(dry, dataset, tmp_path):
    settings = make_settings(dataset, tmp_path / "run", "train.num_steps=4", "train.warmup_steps=1")
    outcome = run_processes(tmp_path / "log", 1, train, [*settings, "train.stop_at=2"])
    assert outcome.codes == (0,), outcome
    _, out, _ = dry("train.num_steps=4", "train.warmup_steps=1")
    assert out.endswith("goes on there from step 2 to 4.\n")
    assert " for 2 steps" in out
    assert run_processes(tmp_path / "log", 1, train, settings).codes == (0,)
    _, out, _ = dry("train.num_steps=4", "train.warmup_steps=1")
    assert out.endswith("finds that the run there is done after 4 steps.\n")


def test_a_run_that_is_running_is_not_disturbed(dry, dataset, tmp_path):
    """The folder is locked by its owner; the dry run neither waits nor takes it."""
    from so3krates_dist.train.checkpoint import RunFolder

    folder = RunFolder(load_config(make_settings(dataset, tmp_path / "run")))
    folder.acquire()
    with contextlib.closing(folder):
        assert dry()[0] == 0


def test_only_one_process_of_a_launcher_does_it(dry, monkeypatch):
    for name, value in {
        "RANK": 1,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert dry() == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, out, _ = dry()
    assert code == 0
    assert "2 process(es) on cpu" in out
    assert not torch.distributed.is_initialized()


def test_a_disk_that_is_too_small_is_said(dry, monkeypatch, tmp_path):
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    _, out, _ = dry()
    assert re.search(rf"note: free \S+ kB on the disk of {tmp_path / 'run'}, or set run.folder to another one", out)


# ------------------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("words", "world_size", "code", "message"),
    [
        ((), 3, EXIT_CONFIG, "data.lanes must be a multiple of the number of processes (3); got 4. Start 1, 2, 4 processes"),
        ((), 0, EXIT_CONFIG, "--world-size must be at least 1; got 0. Give the number of processes of the run."),
        ((), -2, EXIT_CONFIG, "--world-size must be at least 1; got -2."),
        (("train.micro_batches=2",), 4, EXIT_CONFIG, "train.micro_batches must divide data.lanes / processes (1); got 2."),
        (
            ("train.precision=float64", "train.zero_stage=0"), 2, EXIT_CONFIG,
            "train.precision must be float32, tf32 or bf16-mixed with several processes (2); got float64.",
        ),
        (("train.stress_weight=1",), 1, EXIT_CONFIG, "train.stress_weight must be 0 without stress labels; got a data set with"),
        (("data.max_atoms=5",), 1, EXIT_DATA, "must have at most 5 atoms (data.max_atoms); got"),
        (("data.folder=/nowhere",), 1, EXIT_DATA, "/nowhere must hold a manifest.json; got no such file."),
    ],
)  # fmt: skip
def test_what_training_refuses_is_refused(dry, words, world_size, code, message):
    found, out, err = dry(*words, world_size=world_size)
    assert (found, out) == (code, "")
    assert err.startswith("so3krates: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_precision_that_this_device_cannot_do_is_refused(dry, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = dry("train.precision=tf32")
    assert code == EXIT_CONFIG
    assert err.startswith("so3krates: train.precision must be ")


def test_zero_3_with_another_deepspeed_is_refused(dry, monkeypatch):
    def refuse() -> None:
        raise ConfigError("train.zero_stage", "be 0, 1 or 2 with another DeepSpeed than that", "3", "Set it to 2")

    monkeypatch.setattr(dry_run, "check_zero3", refuse)
    assert dry("train.zero_stage=2")[0] == 0
    assert dry("train.zero_stage=3")[0] == EXIT_CONFIG


def test_the_folder_of_another_run_is_refused(dry, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/own.txt").write_text("mine")
    code, _, err = dry()
    assert code == EXIT_FAILURE
    assert "must be empty or hold a run; got other files." in err


def test_a_run_with_other_settings_is_refused_with_what_differs(dry, dataset, tmp_path):
    settings = make_settings(dataset, tmp_path / "run", "train.num_steps=5", "train.stop_at=1")
    outcome = run_processes(tmp_path / "log", 1, train, settings)
    assert outcome.codes == (0,), outcome
    code, _, err = dry("train.num_steps=5", "train.learning_rate=0.5")
    assert code == EXIT_CONFIG
    assert "train.learning_rate" in err
    assert "0.002" in err


def test_a_folder_that_could_not_be_made_is_refused(dry, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = dry(f"run.folder={tmp_path / 'file/run'}")
    assert code == EXIT_FAILURE
    assert (
        f"run.folder {tmp_path / 'file/run'} must be a folder that can be written to; got {tmp_path / 'file'}, which cannot."
        in err
    )


def test_a_loss_that_is_not_finite_is_refused(dry, monkeypatch):
    monkeypatch.setattr(dry_run, "compute_weights", lambda *_: {"energy": math.inf, "forces": 1.0})
    code, _, err = dry()
    assert code == EXIT_NON_FINITE
    assert "step 0 must have a finite loss and gradient; got loss inf" in err


# ------------------------------------------------------------------------------------------------------- what it measures with


@pytest.fixture
def bench(dataset, tmp_path):
    config = load_config(make_settings(dataset, tmp_path / "run", "data.batch_size=48"))
    prepared = dry_run.prepare(config, 2)
    statistics = ModelStatistics.from_manifest(prepared.mixture.statistics, config.model)
    return prepared, dry_run.Bench(prepared, build_model(config.model, statistics))


def test_passes_grow_up_to_the_heaviest(bench):
    prepared, tried = bench
    heaviest = find_heaviest(prepared.schedule, 0, 2, 1, Limits())
    sizes = [len(batch.atomic_numbers) for batch, _ in tried._grow(heaviest)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= 9
    assert sizes[-1] == heaviest.atoms > 100
    assert len(sizes) >= 3
    trial = tried.try_heaviest(heaviest)
    assert trial.is_whole
    assert trial.limits == Limits()
    assert all(w.grad is None for w in tried.engine.potential.parameters()), "measuring leaves no gradient"


def test_what_would_not_fit_this_machine_is_worked_out_from_smaller_passes(bench, monkeypatch):
    prepared, tried = bench
    heaviest = find_heaviest(prepared.schedule, 0, 2, 1, Limits())
    monkeypatch.setattr(dry_run, "measure_peak", lambda run, _: (run(), 1000)[1])
    monkeypatch.setattr(dry_run, "find_available_bytes", lambda *_: 900)
    trial = tried.try_heaviest(heaviest)
    assert not trial.is_whole
    assert trial.limits == Limits(1, 1)
    assert trial.activations > 10 * 1000
    step = tried.do_step(trial)
    assert step.is_whole, "the step is done in passes that this machine can do"
    real = tried._do_passes(tried._read(0, 0, Limits()))
    assert math.isfinite(real)
    assert "more than this machine should do" in "".join(dry_run._describe_trial(trial, step, prepared))


def test_the_first_step_is_that_of_the_first_process(bench):
    """Cut into other passes, it has the same loss."""
    _, tried = bench
    loss = tried._do_passes(tried._read(0, 0, Limits()))
    tried.engine.discard()
    step = tried.do_step(dry_run.Trial(None, 0.1, False, Limits(1, 1)))
    assert step.loss == pytest.approx(loss, rel=1e-5)


def test_passes_that_take_too_long_are_not_done(bench, monkeypatch):
    prepared, tried = bench
    monkeypatch.setattr(dry_run, "MAX_SECONDS", 0.0)
    trial = tried.try_heaviest(find_heaviest(prepared.schedule, 0, 2, 1, Limits()))
    assert not trial.is_whole
    step = tried.do_step(trial)
    assert not step.is_whole
    assert " (from a part of it)" in "".join(dry_run._describe_trial(trial, step, prepared))


def test_a_system_that_does_not_measure_memory(dry, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path / "nothing")
    code, out, _ = dry()
    assert code == 0
    assert "Activations of the largest pass: not measured, since this system does not tell" in out
    assert re.search(r"<- this run .* \? ", out)


@pytest.mark.parametrize(("number", "text"), [(12, "0.012 kB"), (3_210_000, "3.21 MB"), (4.2e10, "42 GB")])
def test_bytes(number, text):
    assert dry_run._format_bytes(number) == text
