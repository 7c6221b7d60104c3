"""What goes wrong for users: one line that says what and what to do, the right exit code, before any process waits for another.

Errors before the start are provoked in a process that has been told it is the first of two, with no second one: were it to
start the process group, it would wait ten minutes. A rank that fails later takes the others down.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interruptions import (
    flip_byte,
    train_on_a_full_disk,
    train_on_damaged_shard,
    train_on_data_of_rank,
    train_with_signal,
    train_without_a_run_folder,
    train_without_room_for_the_plan,
)
from training_setup import (
    find_differences,
    find_free_port,
    make_dataset,
    make_settings,
    read_state,
    run_processes,
    started,
    train,
)

from so3krates_dist.errors import EXIT_CONFIG, EXIT_DATA, EXIT_DONE, EXIT_FAILURE
from so3krates_dist.train.checkpoint import find_checkpoint

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("failures") / "data", num_train=24)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of three steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = run_processes(run.parent / "log", 1, train, make_settings(dataset, run, "train.stop_at=3"))
    assert outcome.codes == (EXIT_DONE,), str(outcome)
    return run


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


# name, what is done to copies of data set and run (returns further settings), exit code, what the line says
Case = tuple[str, Callable[[Path, Path], list[str]], int, str]


def _damage_manifest(data: Path, _: Path) -> list[str]:
    content = json.loads((data / "manifest.json").read_text())
    content["schema"] = 99
    (data / "manifest.json").write_text(json.dumps(content))
    return []


def _drop_label(data: Path, _: Path) -> list[str]:
    content = json.loads((data / "manifest.json").read_text())
    content["labels"] = ["energy"]
    (data / "manifest.json").write_text(json.dumps(content))
    return []


def _truncate(data: Path, _: Path) -> list[str]:
    os.truncate(data / "train-000001.tar", 1000)
    return []


def _take_other_data(data: Path, _: Path) -> list[str]:
    return [f"data.folder={make_dataset(data.with_name('other'), num_train=24, first_seed=500)}"]


def _name_both(data: Path, other: Path) -> list[str]:
    return ["data.folder=", f"data.folders=[{data},{other}]"]


def _add_data(data: Path, _: Path) -> list[str]:
    other = make_dataset(data.with_name("other"), num_train=24, first_seed=500)
    return [*_alter(other, name="more"), *_name_both(data, other)]


def _alter(folder: Path, **changes: object) -> list[str]:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    return []


def _add_other_level(data: Path, _: Path) -> list[str]:
    other = make_dataset(data.with_name("other"), num_train=24, first_seed=500)
    statistics = json.loads((other / "manifest.json").read_text())["statistics"]
    none = statistics | {"energy_baselines": {"10": 0.0, "18": 0.0}}
    return [*_alter(other, name="more", level_of_theory="DFT", statistics=none), *_name_both(data, other)]


def _add_other_units(data: Path, _: Path) -> list[str]:
    other = make_dataset(data.with_name("other"), num_train=24, first_seed=500)
    return [*_alter(other, units={"energy": "Hartree", "length": "Angstrom"}), *_name_both(data, other)]


def _write_foreign_file(_: Path, run: Path) -> list[str]:
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    return []


def _make_file(_: Path, run: Path) -> list[str]:
    shutil.rmtree(run)
    run.write_text("a file")
    return []


CASES: list[Case] = [
    ("no data folder", lambda d, r: ["data.folder="], EXIT_CONFIG, r"data\.folder must name a data set; got nothing\."),
    ("wrong data folder", lambda d, r: [f"data.folder={r}"], EXIT_DATA, r"run must hold a manifest\.json; got no such file\."),
    ("missing shard", lambda d, r: [(d / "train-000001.tar").unlink() or "run.name=x"], EXIT_DATA,
     r"train-000001\.tar must be there, the manifest lists it; got no such file\."),
    ("truncated shard", _truncate, EXIT_DATA, r"train-000001\.tar must have \d+ bytes; got 1000 bytes\."),
    ("altered shard", lambda d, r: [flip_byte(d / "train-000001.tar", 3000) or "run.name=x"], EXIT_DATA,
     r"train-000001\.tar must have the sha256 \w+\.\.\.; got \w+\.\.\.\. Copy the file again"),
    ("schema from the future", _damage_manifest, EXIT_DATA, r"must have schema \d or lower; got 99\. Install a newer"),
    ("no such labels", lambda d, r: ["train.stress_weight=1.0", f"run.folder={r}-new"], EXIT_CONFIG,
     r"train\.stress_weight must be 0 without stress labels; got a data set with energy, forces only\."),
    ("no forces", _drop_label, EXIT_CONFIG, r"train\.forces_weight must be 0 without forces labels"),
    ("lanes and processes", lambda d, r: ["data.lanes=3"], EXIT_CONFIG,
     r"data\.lanes must be a multiple of the number of processes \(2\); got 3\. Start 1, 3 processes, or set data\.lanes=4"),
    ("micro-batches and processes", lambda d, r: ["train.micro_batches=4"], EXIT_CONFIG,
     r"train\.micro_batches must divide data\.lanes / processes \(2\); got 4"),
    ("a run on other data", _take_other_data, EXIT_CONFIG,
     r"must go on with the plan it has begun with, where the fingerprint of each data set is \['\w+'\]; got \['\w+'\]\."),
    ("more data", _add_data, EXIT_CONFIG,
     r"where data\.folders is \['small'\]; got \['small', 'more'\]\. Set it back, or set data\.rebase=true to change it from"),
    ("another batch size", lambda d, r: ["data.batch_size=8"], EXIT_CONFIG, r"where data\.batch_size is 6; got 8\. Set it back"),
    ("other lanes", lambda d, r: ["data.lanes=8"], EXIT_CONFIG, r"where data\.lanes is 4; got 8\. Set it back, or set"),
    ("other costs", lambda d, r: ["data.cost_per_pair=2"], EXIT_CONFIG, r"where data\.cost_per_pair is 1\.0; got 2\.0\."),
    ("costs to be measured", lambda d, r: ["data.fit_cost=true"], EXIT_CONFIG, r"where data\.fit_cost is False; got True\."),
    ("an earlier version's order", lambda d, r: [(r / "plan.json").unlink() or "run.name=x"], EXIT_FAILURE,
     r"must hold a plan\.json, which says .* step_00000003 were made of; got none: its order of the data was that of"),
    ("a damaged plan", lambda d, r: [(r / "plan.json").write_text("{}") and "run.name=x"], EXIT_FAILURE,
     r"plan\.json must be a plan; got a damaged one \(KeyError: 'format'\)\. Restore the file, or start anew"),
    ("a plan from the future", lambda d, r: [(r / "plan.json").write_text('{"format": 9}') and "run.name=x"], EXIT_FAILURE,
     r"plan\.json must have format 1 or lower; got 9\. Install a newer"),
    ("a large structure", lambda d, r: ["data.max_atoms=8"], EXIT_DATA,
     r"train-000000\.tar:train-000000-\d+:\d+ must have at most 8 atoms \(data\.max_atoms\); got Ar\d?Ne\d?, 9 atoms and about"),
    ("another level of theory", _add_other_level, EXIT_DATA,
     r"other must have energy baselines to be trained on together with .*data \(Morse\); got none at another level .* \(DFT\)\."),
    ("other units", _add_other_units, EXIT_DATA,
     r"other must have the units of .*data \(energy in eV\); got energy in Hartree\. Convert one of them again"),
    ("weights that do not add up", lambda d, r: [*_name_both(d, d.with_name("other")), "data.weights=[0.5,0.6]"], EXIT_CONFIG,
     r"data\.weights must add up to 1; got \[0\.5, 0\.6\], in sum 1\.1\. Divide each by 1\.1\."),
    ("a negative weight", lambda d, r: [*_name_both(d, d.with_name("other")), "data.weights=[1.5,-0.5]"], EXIT_CONFIG,
     r"data\.weights must be finite numbers, none below zero; got \[1\.5, -0\.5\]\. Change the value\."),
    ("the same data twice", lambda d, r: [*_name_both(d, copy(d, d.with_name("copy")))], EXIT_DATA,
     r"copy must be another data set than .*data; got the same data \(fingerprint \w+\)\."),
    ("another learning rate", lambda d, r: ["train.learning_rate=1e-4"], EXIT_CONFIG,
     r"must belong to this run; got another run, in which 1 setting differs: train\.learning_rate=0\.002 \(here 0\.0001\)\."),
    ("another model", lambda d, r: ["model.degrees=[1,2,3,4]"], EXIT_CONFIG,
     r"belong to this run; got another run, in which 1 setting differs: model\.degrees=\[1, 2\] \(here \[1, 2, 3, 4\]\)\."),
    ("another seed", lambda d, r: ["run.seed=5"], EXIT_CONFIG,
     r"got another run, in which 1 setting differs: run\.seed=0 \(here 5\)\."),
    ("a folder of other things", _write_foreign_file, EXIT_FAILURE, r"must be empty or hold a run; got other files\."),
    ("a file for a folder", _make_file, EXIT_FAILURE, r"run\.folder .*must be a folder; got a file\."),
    ("a lost identity", lambda d, r: [(r / "run.json").write_text("[]") and "run.name=x"], EXIT_FAILURE,
     r"must hold a readable run\.json; got TypeError\."),
    ("no configuration", lambda d, r: [(r / "config.yaml").unlink() or "run.name=x"], EXIT_FAILURE,
     r"must hold a config\.yaml that this version reads; got one that is refused \(.* be a readable YAML file; got No such file"),
    ("an unknown setting", lambda d, r: ["train.lr=1e-3"], EXIT_CONFIG, r"Did you mean `train\.learning_rate`\?"),
]  # fmt: skip


@pytest.mark.parametrize(("prepare", "code", "line"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_one_line_before_any_process_waits(
    dataset: Path, trained: Path, tmp_path: Path, prepare: Callable[[Path, Path], list[str]], code: int, line: str
) -> None:
    data, run = copy(dataset, tmp_path / "data"), copy(trained, tmp_path / "run")
    more = prepare(data, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.name.startswith(".lock")}
    outcome = run_processes(tmp_path / "log", 2, train, make_settings(data, run, *more), ranks=[0])
    assert outcome.codes == (code,), str(outcome)
    (said,) = outcome.outputs
    assert said.startswith("so3krates: ")
    assert said.count("\n") == 1, said
    assert re.search(line, said), said
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.name.startswith(".lock")} == before


def test_a_run_folder_in_use_is_refused(dataset: Path, tmp_path: Path) -> None:
    settings = make_settings(dataset, tmp_path / "run")
    with started(tmp_path / "first", 1, train_with_signal, settings, 5, 0, signal.SIGSTOP) as (first,):
        while not (tmp_path / "run" / "run.json").is_file():
            assert first.is_alive()
            time.sleep(0.01)
        start = time.monotonic()
        outcome = run_processes(tmp_path / "second", 2, train, settings)
    assert outcome.codes == (EXIT_FAILURE, EXIT_DATA), str(outcome)
    assert time.monotonic() - start < 60, "the other process was told at once"
    assert "so3krates: another process must be able to start as well; got an error." in outcome.outputs[1]
    assert re.fullmatch(
        r"so3krates: run\.folder .*run must be used by one run at a time; got another running process: \d+ on \S+, since [-\d: ]+\."
        r" Wait for .*\n",
        outcome.outputs[0],
    )


class TestTheStartOfSeveralProcesses:
    """What one of them alone finds out after they have met ends all of them; none waits for ever."""

    def test_other_data_on_another_machine(self, dataset: Path, tmp_path: Path) -> None:
        """They would do different numbers of passes."""
        other = make_dataset(tmp_path / "other", num_train=51)
        outcome = run_processes(
            tmp_path / "log", 2, train_on_data_of_rank, make_settings("", tmp_path / "run"), dataset, other
        )
        assert outcome.codes == (EXIT_DATA, EXIT_DATA), str(outcome)
        place = r"step 0 of plan 0: \w{16}, limits 0 and 0"
        rule = rf"process 1 must go through the data as process 0 does \({place}\); got {place}\. Give all machines the same"
        assert re.search(rf"(?m)^so3krates: {rule} data sets, command line and version", outcome.outputs[1]), str(
            outcome
        )
        line = (
            "so3krates: another process must be able to start as well; got an error. Its own message says what to do.\n"
        )
        assert outcome.outputs[0].endswith(line), str(outcome)
        assert not (tmp_path / "run" / "plan.json").exists()

    def test_no_room_for_the_plan(self, dataset: Path, tmp_path: Path) -> None:
        settings = make_settings(dataset, tmp_path / "run")
        outcome = run_processes(tmp_path / "log", 2, train_without_room_for_the_plan, settings)
        assert outcome.codes == (EXIT_FAILURE, EXIT_DATA), str(outcome)
        rule = r"plan\.json must find room on a disk that can be written to; got \[Errno 28\] No space left on device.*\. Free"
        assert re.search(rf"(?m)^so3krates: .*{rule}", outcome.outputs[0]), str(outcome)
        assert "so3krates: another process must be able to start as well" in outcome.outputs[1]
        assert run_processes(tmp_path / "log", 2, train, [*settings, "train.stop_at=2"]).codes == (EXIT_DONE,) * 2

    def test_no_room_for_the_configuration(self, dataset: Path, tmp_path: Path) -> None:
        """The lock finds room, what comes next does not."""
        settings = make_settings(dataset, tmp_path / "run")
        outcome = run_processes(tmp_path / "log", 2, train_on_a_full_disk, settings, -1, 300)
        assert outcome.codes == (EXIT_FAILURE, EXIT_DATA), str(outcome)
        assert (
            "run must find room on a disk that can be written to; got [Errno 27] File too large" in outcome.outputs[0]
        )
        assert "so3krates: another process must be able to start as well" in outcome.outputs[1]

    @pytest.mark.parametrize("gone", [False, True], ids=["full", "gone"])
    def test_no_room_for_the_best_model(self, dataset: Path, tmp_path: Path, gone: bool) -> None:
        """It is written between two checkpoints, by one process; all say why they end."""
        run = tmp_path / "run"
        settings = make_settings(dataset, run, "train.validate_every=4", f"train.save_every={100 if gone else 2}")
        function, arguments = (train_without_a_run_folder, ()) if gone else (train_on_a_full_disk, (4000,))
        outcome = run_processes(tmp_path / "log", 2, function, settings, 3, *arguments)
        assert outcome.codes == (EXIT_FAILURE, EXIT_FAILURE), str(outcome)
        for said in outcome.outputs:
            assert re.search(r"(?m)^so3krates: .*must find room on a disk .*(File too large|No such file)", said), said
            assert "Traceback" not in said
        assert run.exists() != gone, "what has vanished must not come back half empty"
        if not gone:
            assert find_checkpoint(run / "checkpoints")[0] == run / "checkpoints" / "step_00000002"


class TestCheckpoints:
    def test_a_damaged_one_is_said_and_passed_over(self, dataset: Path, trained: Path, tmp_path: Path) -> None:
        run = copy(trained, tmp_path / "run")
        settings = make_settings(dataset, run, "train.stop_at=5")
        assert run_processes(tmp_path / "log", 1, train, settings).codes == (EXIT_DONE,)
        expected = read_state(run, 5)
        flip_byte(run / "checkpoints" / "step_00000005" / "state-00000-of-00001.safetensors", 5000)
        outcome = run_processes(tmp_path / "log", 1, train, settings)
        assert outcome.codes == (EXIT_DONE,), str(outcome)
        assert (
            "step_00000005: state-00000-of-00001.safetensors has been altered; taking an older checkpoint"
            in outcome.outputs[0]
        )
        assert "Resumed at step 3 of 40" in outcome.outputs[0]
        assert find_differences(read_state(run, 5), expected) == {}

    def test_none_that_is_whole_is_an_error(self, dataset: Path, trained: Path, tmp_path: Path) -> None:
        run = copy(trained, tmp_path / "run")
        flip_byte(run / "checkpoints" / "step_00000003" / "state-00000-of-00001.safetensors", 5000)
        before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
        outcome = run_processes(tmp_path / "log", 1, train, make_settings(dataset, run))
        assert outcome.codes == (EXIT_FAILURE,), str(outcome)
        assert "must hold a checkpoint that is whole; got" in outcome.outputs[0]
        assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before

    def test_one_from_the_future_is_an_error(self, dataset: Path, trained: Path, tmp_path: Path) -> None:
        from so3krates_dist.train.checkpoint import FORMAT, compute_checksum

        run = copy(trained, tmp_path / "run")
        path = run / "checkpoints" / "step_00000003" / "manifest.json"
        content = json.loads(path.read_text()) | {"format": 99}
        path.write_text(json.dumps(content | {"checksum": compute_checksum(content)}))
        outcome = run_processes(tmp_path / "log", 1, train, make_settings(dataset, run))
        assert outcome.codes == (EXIT_FAILURE,), str(outcome)
        line = f"step_00000003 must have format {FORMAT} or lower; got 99. Install a newer so3krates-dist."
        assert line in outcome.outputs[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_damaged_during_the_run(dataset: Path, tmp_path: Path, num_workers: int) -> None:
    """The rank that meets it says so in one line, with or without worker processes, and the other one ends with it."""
    data, run = copy(dataset, tmp_path / "data"), tmp_path / "run"
    # Epochs of 24 steps: the second one is not prepared yet when the damage is done.
    settings = make_settings(data, run, "train.save_every=2", f"data.num_workers={num_workers}", "data.batch_size=1")
    outcome = run_processes(tmp_path / "log", 2, train_on_damaged_shard, settings, 3, 1)
    assert outcome.codes == (EXIT_DATA, EXIT_DATA), str(outcome)
    own = r"so3krates: .*train-00000\d\.tar:train-\S+ must have the CRC \w+; got \w+\. Copy the file again[^\n]*"
    other = r"so3krates: data of another process must be readable; got an error\. Its own message says what to do\."
    said = [re.findall(rf"^(?:{own}|{other})$", text, re.MULTILINE) for text in outcome.outputs]
    assert [len(lines) for lines in said] == [1, 1], str(outcome)
    assert any(re.fullmatch(own, lines[0]) for lines in said), str(outcome)
    assert not any("Traceback" in text for text in outcome.outputs), str(outcome)
    found, complaints = find_checkpoint(run / "checkpoints")
    assert found is not None
    assert complaints == []


# ----------------------------------------------------------------------------------------------- the deepspeed launcher


def launch(script: Path, arguments: list[str], log: Path, num_processes: int = 2) -> tuple[int, str, float]:
    """Start a script as a user does, through the `deepspeed` command; what is left of it at the end is killed.

    Returns:
        The exit code, what was said, and the seconds from the first error line to the exit (0 without one).
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])}
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(num_processes), "--master_port",
        str(find_free_port()), str(script), *arguments,
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
        limit, failed = time.monotonic() + 240, 0.0
        try:
            while (code := process.poll()) is None:
                assert time.monotonic() < limit, log.read_text(errors="replace")
                if not failed and re.search(r"^so3krates: ", log.read_text(errors="replace"), re.MULTILINE):
                    failed = time.monotonic()
                time.sleep(0.1)
            seconds = time.monotonic() - failed if failed else 0.0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # a group of its own: the launcher and its ranks
                process.wait()
    return code, log.read_text(errors="replace"), seconds


def test_under_the_launcher_a_run_goes_on_bit_for_bit(dataset: Path, tmp_path: Path, clone: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("train.num_steps=20", "train.zero_stage=2")
    outcome = run_processes(tmp_path / "log1", 2, train, make_settings(dataset, whole, *more))
    assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
    outcome = run_processes(tmp_path / "log2", 2, train, make_settings(dataset, run, *more, "train.stop_at=7"))
    assert outcome.codes == (EXIT_DONE, EXIT_DONE), str(outcome)
    code, said, _ = launch(clone / "launch" / "train.py", make_settings(dataset, run, *more), tmp_path / "launcher.txt")
    assert code == EXIT_DONE, said
    assert "Resumed at step 7 of 20" in said
    assert find_differences(read_state(whole, 20), read_state(run, 20)) == {}


def test_under_the_launcher_a_rank_that_fails_takes_the_others_down(dataset: Path, tmp_path: Path) -> None:
    data, run = copy(dataset, tmp_path / "data"), tmp_path / "run"
    script = tmp_path / "damaging_train.py"
    script.write_text(
        "import sys\nfrom interruptions import train_on_damaged_shard\n"
        "sys.exit(train_on_damaged_shard([w for w in sys.argv[1:] if not w.startswith('--local_rank')], 3, 1))\n"
    )
    settings = make_settings(data, run, "train.save_every=2", "data.batch_size=1", "train.num_steps=1000000")
    code, said, seconds = launch(script, settings, tmp_path / "launcher.txt")
    assert code != EXIT_DONE, said
    assert re.search(r"(?m)^so3krates: .*train-00000\d\.tar:train-\S+ must have the CRC", said), said
    assert seconds < 60, said
    found, complaints = find_checkpoint(run / "checkpoints")
    assert found is not None
    assert complaints == []
