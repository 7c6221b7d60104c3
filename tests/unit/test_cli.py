"""The command line: verbs, exit codes, one line for every mistake, and nothing heavy before it is needed."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from test_config import ALL_WRONG

from so3krates_dist import __version__, cli
from so3krates_dist.errors import EXIT_CONFIG, EXIT_DATA, CheckpointError, DataError


def run_command(*words: str, cwd=None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "so3krates_dist.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=60)


def run_main(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(words)
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_verb(capsys):
    code, out, err = run_main(capsys, "--help")
    assert code == 0
    assert err == ""
    for verb, (_, text) in cli.VERBS.items():
        assert verb in out
        assert text.split(":")[0].split()[0] in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys, verb):
    code, out, _ = run_main(capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: so3krates {verb}")


def test_train_help_shows_examples(capsys):
    _, out, _ = run_main(capsys, "train", "--help")
    assert "so3krates train run=quickstart" in out
    assert "deepspeed --num_accelerators 2 launch/train.py run=quickstart" in out
    assert "The same command resumes" in out
    assert "so3krates train --dry-run --world-size 8 run=quickstart" in out


def test_a_reader_that_has_enough():
    """As in `so3krates doctor | head`: neither a traceback nor a failure."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "so3krates_dist.cli", "info", "--config"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writing)
    assert (result.returncode, result.stderr) == (0, "")


def test_options_of_the_model_that_do_not_count_are_said_before_training(capsys, monkeypatch):
    from so3krates_dist.train import loop

    monkeypatch.setattr(loop, "run_training", lambda _: 0)
    code, _, err = run_main(capsys, "train", "run=md17", "model.name=geomatt")
    assert code == 0
    assert (
        err == "note: model options of run=md17 are those of euclidean_transformer, not of geomatt, and were left out\n"
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert run_main(capsys, "train", "run=md17", "model.name=geomatt")[2] == "", "one process says it"


def test_version(capsys):
    assert run_main(capsys, "--version")[:2] == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "the following arguments are required: verb. `so3krates --help` shows what it takes."),
        (("trian",), "argument verb: invalid choice: 'trian'"),
        (("--colour", "train"), "unrecognized arguments: --colour"),
        (("evaluate",), "so3krates evaluate: the following arguments are required: RUN. `so3krates evaluate --help`"),
        (("doctor", "--folder"), "so3krates doctor: argument --folder: expected one argument"),
        (
            ("train", "--dry-run", "--world-size", "two"),
            "so3krates train: argument --world-size: invalid int value: 'two'.",
        ),
        (("replay", "run"), "so3krates replay: the following arguments are required: STEP."),
    ],
)
def test_a_malformed_command_line_is_one_line(capsys, words, expected):
    code, out, err = run_main(capsys, *words)
    assert code == cli.EXIT_USAGE
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (("train", "train.lr=1"), EXIT_CONFIG, "Did you mean `train.learning_rate`?"),
        (("train", "train.learning_rate=nan"), EXIT_CONFIG, "train.learning_rate must be a finite number; got nan."),
        (("train", "model.cutoff=-1"), EXIT_CONFIG, "model.cutoff must be greater than zero; got -1.0."),
        (("train", "quickstart"), EXIT_CONFIG, "quickstart must have the form key=value"),
        (("train",), EXIT_CONFIG, "data.folder must name a data set; got nothing."),
        (("train", "data.folder=/nowhere"), EXIT_DATA, "/nowhere must hold a manifest.json; got no such file."),
        (("train", "--dry-run"), EXIT_CONFIG, "data.folder must name a data set; got nothing."),
        (("train", "--dry-run", "train.lr=1"), EXIT_CONFIG, "Did you mean `train.learning_rate`?"),
        (
            ("train", "--world-size", "4", "run=quickstart"), EXIT_CONFIG,
            "--world-size must be left out without --dry-run; got 4. Add --dry-run; real processes are started by a launcher.",
        ),
        (("lr-find", "train.lr=1"), EXIT_CONFIG, "Did you mean `train.learning_rate`?"),
        (("replay", "/nowhere", "3"), CheckpointError.exit_code, "/nowhere"),
        (("validate", "/nowhere"), EXIT_DATA, "/nowhere must hold a manifest.json"),
        (("info", "/nowhere"), CheckpointError.exit_code, "/nowhere must be a run folder or hold a model; got neither"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_an_exit_code(capsys, words, code, expected):
    found, _, err = run_main(capsys, *words)
    assert found == code
    assert err.startswith("so3krates: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.tar:b", "have 3 bytes", "2 bytes", "Copy it"), EXIT_DATA, "so3krates: a.tar:b must have 3 bytes; got 2"),
        (KeyboardInterrupt(), cli.EXIT_INTERRUPTED, "so3krates: interrupted"),
    ],
)  # fmt: skip
def test_errors_from_within_a_verb_become_exit_codes(monkeypatch, capsys, error, code, line):
    def add_arguments(_parser: argparse.ArgumentParser):
        def run(_arguments: argparse.Namespace) -> int:
            raise error

        return run

    monkeypatch.setitem(cli.VERBS, "doctor", (add_arguments, "check"))
    found, _, err = run_main(capsys, "doctor")
    assert found == code
    assert err.startswith(line)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def add_arguments(_parser: argparse.ArgumentParser):
        def run(_arguments: argparse.Namespace) -> int:
            raise ZeroDivisionError

        return run

    monkeypatch.setitem(cli.VERBS, "doctor", (add_arguments, "check"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_exit_codes_reach_the_shell():
    result = run_command("train", "train.zero_stage=7")
    assert result.returncode == EXIT_CONFIG
    assert result.stderr == "so3krates: train.zero_stage must be 0, 1, 2 or 3; got 7. Change the value.\n"
    assert result.stdout == ""


def test_a_config_error_comes_before_anything_heavy_is_imported():
    code = (
        "import sys; from so3krates_dist import cli; code = cli.main(['train', 'train.zero_stage=7']);"
        "print(code, sorted({'torch', 'deepspeed', 'numpy', 'ase', 'wandb'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == f"{EXIT_CONFIG} []\n"


REPORT = """
import io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from so3krates_dist import cli
findings = []
for words in json.load(sys.stdin):
    out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["train", *words])
    findings.append([code, out.getvalue(), err.getvalue(), time.perf_counter() - start])
print(json.dumps([findings, sorted({"torch", "deepspeed", "numpy", "ase", "wandb"} & set(sys.modules))]))
"""


def test_bad_settings_are_one_line_before_anything_heavy_is_imported():
    """Every third mistake of the table, as it comes from a command line; none needs more than a moment."""
    table = ALL_WRONG[::3]
    assert len(table) > 60
    words = json.dumps([arguments.split(" ") for arguments, _ in table])
    result = subprocess.run([sys.executable, "-c", REPORT], input=words, capture_output=True, text=True, check=True)
    findings, imported = json.loads(result.stdout)
    assert imported == []
    for (arguments, expected), (code, out, err, seconds) in zip(table, findings, strict=True):
        assert (code, out) == (EXIT_CONFIG, ""), arguments
        assert err.startswith("so3krates: "), arguments
        assert expected in err
        assert err.count("\n") == 1, arguments
        assert seconds < 10, arguments


@pytest.mark.parametrize("verb", ["generate", "convert"])
def test_making_data_needs_no_deepspeed(verb):
    code = (
        f"import sys; from so3krates_dist import cli\ntry: cli.main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'deepspeed', 'wandb', 'e3nn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m so3krates_dist.cli info --config | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("run.name = run")


def test_settings_may_stand_among_options() -> None:
    before = cli._put_settings_first(["train", "a.b=1", "--dry-run", "--world-size", "4", "run=md17", "--x=2"])
    assert before == ["train", "a.b=1", "run=md17", "--dry-run", "--world-size", "4", "--x=2"]
    others = ["convert", "x.xyz", "--keys", "loss_weight=w"]
    assert cli._put_settings_first(others) == others
