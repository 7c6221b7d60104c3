"""Every way to start: launch/train.py under each launcher, the shell scripts with an environment that is ready, the quickstart's
stages with small commands in their place."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from analytic import label, make_cluster, write_dataset
from training_setup import find_free_port

from so3krates_dist.errors import EXIT_CONFIG, EXIT_REQUEUE, ConfigError
from so3krates_dist.metrics import read_metrics

SMOKE = [
    "run=smoke", "train.num_steps=6", "train.warmup_steps=2", "train.log_every=1", "train.save_every=3", "train.validate_every=3",
]  # fmt: skip


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_script(clone) -> Path:
    return clone / "launch/train.py"


@pytest.fixture(scope="module")
def quickstart(clone) -> ModuleType:
    return load_script(clone / "launch/quickstart.py")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    graphs = [label(make_cluster(seed)) for seed in range(32)]
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": graphs[:24], "validation": graphs[24:]})


def run_process(command, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | changes
    return subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def launch(launcher: str, script: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    port = str(find_free_port())
    prefix = {
        "python": [],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    return run_process([sys.executable, *prefix, script, *words], **changes)


# ----------------------------------------------------------------------------------------------------------- launch/train.py


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--local_rank=1", "run=quickstart"], ["run=quickstart"]),
        (["--local_rank", "1", "run=quickstart"], ["run=quickstart"]),
        (["--local-rank=0", "a=b"], ["a=b"]),
        (["a=b", "--local-rank", "3", "c=d"], ["a=b", "c=d"]),
        (["a=b", "c=d", "--local_rank=12"], ["a=b", "c=d"]),
        (["--local_rank", "run=quickstart"], ["run=quickstart"]),
        (["--local_rank_of=1", "1", "run.name=--local_rank=1"], ["--local_rank_of=1", "1", "run.name=--local_rank=1"]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_local_rank_is_ignored_wherever_it_stands(train_script, words, kept):
    assert load_script(train_script).drop_local_rank(words) == kept


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"], []])
def test_a_config_error_is_one_line_and_its_exit_code(train_script, words):
    result = run_process([sys.executable, train_script, *words, "train.lr=1"])
    assert result.returncode == EXIT_CONFIG
    assert result.stderr == (
        "so3krates: train.lr (command line) must be a known key; got an unknown one. Did you mean `train.learning_rate`?\n"
    )
    assert result.stdout == ""


def test_a_config_error_ends_the_launcher_with_its_exit_code(train_script):
    result = launch("deepspeed", train_script, "train.zero_stage=7")
    assert result.returncode == EXIT_CONFIG
    assert "so3krates: train.zero_stage must be 0, 1, 2 or 3; got 7." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_goes_on_under_another_launcher(train_script, dataset, tmp_path):
    """Three steps under `deepspeed`, the rest under torchrun: the same command, the same run."""
    settings = [*SMOKE, f"data.folder={dataset}", f"run.folder={tmp_path / 'run'}"]
    first = launch("deepspeed", train_script, *settings, "train.stop_at=3")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 process(es) on cpu" in first.stdout
    second = launch("torchrun", train_script, *settings)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Resumed at step 3 of 6" in second.stdout
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run/model.safetensors").is_file()
    third = launch("python", train_script, *settings)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "6 steps" in third.stdout


# -------------------------------------------------------------------------------------------------------------- the scripts

FAKE_PYTHON = """\
#!/usr/bin/env bash
# Stands for an interpreter: makes environments of itself, notes what pip is asked for, does all else for real.
case "$*" in
  "-m venv "*)
    echo "venv $3" >>"{log}"
    mkdir -p "$3/bin" && {{ [[ "$0" -ef "$3/bin/python" ]] || cp "$0" "$3/bin/python"; }}
    [[ -z "${{NO_ENSUREPIP:-}}" ]] && touch "$3/pip" ;;
  "-m pip --version") [[ -e "$(dirname "$0")/../pip" ]] ;;
  "-m pip "*) echo "pip ${{*:3}}" >>"{log}"; [[ "$*" != *"${{REFUSED:-nothing refused}}"* ]] ;;
  *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def fake_clone(clone, tmp_path):
    """A copy of what the scripts need of a clone, in a folder with a space, and an interpreter that only pretends."""
    root = tmp_path / "my clone"
    shutil.copytree(clone / "launch", root / "launch")
    for name in ("pyproject.toml", "launch/constraints.txt"):
        shutil.copy(clone / name, root / name)
    (root / "tests").mkdir()
    (root / "tests/test_one.py").write_text("def test_one():\n    pass\n")
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.format(log=tmp_path / "log", python=sys.executable))
    python.chmod(0o755)
    return root


def run_script(
    root: Path, name: str, *words: str, **changes: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    log = root.parent / "log"
    log.write_text("")
    path = f"{root.parent}:{os.environ['PATH']}"
    shutil.copy(root.parent / "python", root.parent / "python3")
    result = run_process(["bash", root / "launch" / name, *words], PATH=path, SO3KRATES_VENV="", **changes)
    return result, log.read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour"], "quickstart.sh: --colour is no option. --help shows the options."),
        (["here"], "quickstart.sh: here is no option."),
        (["--ranks"], "quickstart.sh: --ranks must be followed by a value."),
        (["--out="], "quickstart.sh: --out must be followed by a value."),
        (["--ranks", "0"], "quickstart.sh: --ranks must be an integer from 1; got 0."),
        (["--ranks=two"], "quickstart.sh: --ranks must be an integer from 1; got two."),
        (
            ["--python", "/no/python"],
            "quickstart.sh: --python must name an interpreter; got /no/python. Give its path.",
        ),
        (["--python", "true"], "quickstart.sh: --python must be Python 3.11 or 3.12; got true. Name another one."),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_made(fake_clone, words, message):
    if words == ["--python", "true"]:
        (fake_clone.parent / "true").write_text("#!/bin/sh\nexit 1\n")
        (fake_clone.parent / "true").chmod(0o755)
    result, log = run_script(fake_clone, "quickstart.sh", *words)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert log == []
    assert not (fake_clone / ".venv").exists()


def test_help_makes_nothing(fake_clone):
    result, log = run_script(fake_clone, "quickstart.sh", "--help")
    assert result.returncode == 0
    for option in ("--ranks", "--out", "--python", "--torch-index", "SO3KRATES_VENV"):
        assert option in result.stdout
    assert log == []


def test_the_environment_is_made_once_and_made_anew_when_the_dependencies_change(fake_clone):
    result, log = run_script(fake_clone, "test.sh", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout.splitlines()[-1]
    assert log[0] == f"venv {fake_clone}/.venv"
    assert [line.rsplit("constraints.txt ", 1)[1] for line in log[1:]] == [
        "torch",
        f"--editable {fake_clone}[generate,longrange,s3,formats,dev]",
    ]
    _, log = run_script(fake_clone, "test.sh", "-q")
    assert log == []
    _, log = run_script(fake_clone, "quickstart.sh", "--ranks", "3", "--python", "python3")
    assert log == [], "the Python that it was made with is no reason to install again"
    (fake_clone / "launch" / "constraints.txt").write_text("torch==2.13.0\n")
    _, log = run_script(fake_clone, "test.sh", "-q")
    assert [line.split()[0] for line in log] == ["pip", "pip"]


def test_all_takes_the_slow_tests_too(fake_clone):
    (fake_clone / "tests/test_one.py").write_text("import pytest\n\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n")
    result, _ = run_script(fake_clone, "test.sh", "-q")
    assert "1 deselected" in result.stdout
    result, _ = run_script(fake_clone, "test.sh", "--all", "-q")
    assert "1 passed" in result.stdout.splitlines()[-1]


def test_failing_tests_fail_the_script(fake_clone):
    (fake_clone / "tests/test_one.py").write_text("def test_one():\n    assert False\n")
    result, _ = run_script(fake_clone, "test.sh", "-q")
    assert result.returncode == 1
    assert "1 failed" in result.stdout.splitlines()[-1]


def test_without_rdkit_the_rest_is_installed(fake_clone):
    result, log = run_script(fake_clone, "quickstart.sh", "--ranks", "3", REFUSED="[generate]")
    assert "trying without RDKit" in result.stdout
    assert log[-1].endswith(f"--editable {fake_clone} tblite")
    assert result.returncode == EXIT_CONFIG
    assert "quickstart: --ranks must divide data.lanes (8); got 3. Give another number." in result.stderr


def test_a_failed_installation_is_said_and_tried_again(fake_clone):
    result, _ = run_script(fake_clone, "quickstart.sh", REFUSED="torch")
    assert result.returncode == 1
    assert "quickstart.sh: PyTorch could not be installed; see pip's message above." in result.stderr
    result, log = run_script(fake_clone, "quickstart.sh", "--ranks", "3", "--torch-index", "https://example.org/cpu")
    assert result.returncode == EXIT_CONFIG
    assert log[0].endswith("constraints.txt --no-deps --index-url https://example.org/cpu torch")
    assert [line.rsplit("constraints.txt ", 1)[1] for line in log[1:]] == [
        "torch",
        f"--editable {fake_clone}[generate]",
    ], "its dependencies come from the usual index"


def test_an_environment_without_pip_is_repaired(fake_clone):
    """What `python -m venv` leaves behind on Debian without python3-venv."""
    result, log = run_script(fake_clone, "quickstart.sh", NO_ENSUREPIP="1")
    assert result.returncode == 1
    message = "quickstart.sh: no virtual environment could be made. On Debian: apt-get install python3-venv.\n"
    assert result.stderr == message
    assert log == [f"venv {fake_clone}/.venv"]
    result, log = run_script(fake_clone, "quickstart.sh", "--ranks", "3")
    assert result.returncode == EXIT_CONFIG, result.stderr
    assert [line.split()[0] for line in log] == ["venv", "pip", "pip"]


def test_an_index_without_pytorch_is_said(fake_clone):
    words = ("--torch-index", "https://example.org/none")
    result, log = run_script(fake_clone, "quickstart.sh", *words, REFUSED="--index-url")
    assert result.returncode == 1
    message = "quickstart.sh: PyTorch could not be installed from https://example.org/none; see pip's message above.\n"
    assert result.stderr == message
    assert [line.split()[0] for line in log] == ["venv", "pip"]


# ------------------------------------------------------------------------------------------------------ the quickstart's stages


@pytest.mark.parametrize(
    ("asked", "gpus", "cores", "expected"),
    [
        (None, 0, 1, 1),
        (None, 0, 2, 2),
        (None, 0, 64, 2),
        (None, 1, 64, 1),
        (None, 8, 64, 8),
        (None, 6, 64, 4),
        (4, 0, 1, 4),
        (2, 8, 1, 2),
    ],
)
def test_ranks(quickstart, asked, gpus, cores, expected):
    assert quickstart.choose_ranks(asked, gpus, cores, lanes=8) == expected


@pytest.mark.parametrize(
    ("asked", "gpus", "message"),
    [
        (3, 0, r"--ranks must divide data.lanes \(8\); got 3. Give another number."),
        (4, 2, r"--ranks must be at most the number of GPUs \(2\); got 4. Give a smaller number."),
    ],
)
def test_ranks_that_do_not_fit(quickstart, asked, gpus, message):
    with pytest.raises(ConfigError, match=message):
        quickstart.choose_ranks(asked, gpus, 8, lanes=8)


def test_only_visible_gpus_are_used(quickstart):
    assert quickstart.name_accelerators(2, 0, "") == ["--num_accelerators", "2"]
    assert quickstart.name_accelerators(2, 4, "") == ["--num_accelerators", "2"]
    assert quickstart.name_accelerators(2, 3, "5, 6,7") == ["--include", "localhost:5,6"]
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES must be numbers like 0,1; got GPU-8a"):
        quickstart.name_accelerators(1, 1, "GPU-8a")


def test_threads_share_the_cores_and_one_molecule_has_one(quickstart):
    assert quickstart.choose_threads("train", 2, 8) == 4
    assert quickstart.choose_threads("train", 8, 2) == 1
    assert quickstart.choose_threads("evaluate", 2, 8) == 8
    assert quickstart.choose_threads("md", 1, 8) == 1


def test_stages_are_commands_that_a_user_could_type(quickstart, tmp_path):
    commands = quickstart.build_commands(tmp_path / "data", tmp_path / "run", ["--num_accelerators", "2"], 3)
    assert tuple(commands) == quickstart.STAGES
    assert commands["md"][-2:] == ["--molecule", "ethanol"]
    train = commands["train"]
    assert train[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert train[-4:] == [
        "run=quickstart", f"data.folder={tmp_path / 'data'}", f"run.folder={tmp_path / 'run'}", "run.threads=3",
    ]  # fmt: skip


STAGE_SCRIPTS = {
    "generate": "import pathlib; d = pathlib.Path('data'); d.mkdir(); (d / 'manifest.json').write_text('{}')",
    "validate": "",
    "train": "import os, pathlib; pathlib.Path('run').mkdir(exist_ok=True); print('threads', os.environ['OMP_NUM_THREADS'])",
    "evaluate": "import pathlib; p = pathlib.Path('run/evaluation'); p.mkdir(exist_ok=True);"
    '(p / \'test.json\').write_text(\'{"summary": {"forces_mae": 0.05, "energy_mae_per_atom": 0.002}}\')',
    "md": "import pathlib; p = pathlib.Path('run/dynamics'); p.mkdir(exist_ok=True);"
    "(p / 'nve.json').write_text('{\"drift_mev_per_atom_per_ps\": 0.125}')",
}


@pytest.fixture
def small_stages(quickstart, tmp_path, monkeypatch):
    """The quickstart with stages that take no time; returns the table of their scripts, which may be changed."""
    scripts = dict(STAGE_SCRIPTS)
    monkeypatch.setattr(
        quickstart, "build_commands", lambda *_: {n: [sys.executable, "-c", code] for n, code in scripts.items()}
    )
    monkeypatch.setattr(quickstart, "count_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return scripts


def test_a_quickstart_ends_with_its_figures(quickstart, small_stages, tmp_path, capfd):
    assert small_stages
    assert quickstart.main(["--out", str(tmp_path), "--ranks", "2"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for text in ("force MAE (test split)", "50.0 meV/Å", "2.00 meV/atom", "0.125 meV/atom per ps", "all stages"):
        assert text in out
    assert out.endswith(f"run folder: {tmp_path / 'run'}\n")
    assert f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}\n" in out
    results = json.loads((tmp_path / "run/quickstart.json").read_text())
    assert results["forces_mae"] == 0.05
    assert results["ranks"] == 2
    assert list(results["seconds"]) == list(quickstart.STAGES)


def test_a_quickstart_that_is_done_says_so_and_does_nothing(quickstart, small_stages, tmp_path, capfd):
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    small_stages |= dict.fromkeys(small_stages, "raise SystemExit('must not run')")
    capfd.readouterr()
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "This quickstart is done" in out
    assert "50.0 meV/Å" in out


def test_a_quickstart_that_failed_goes_on_with_what_is_there(quickstart, small_stages, tmp_path, capfd):
    whole = small_stages["train"]
    small_stages["train"] = "raise SystemExit(7)"
    assert quickstart.main(["--out", str(tmp_path)]) == 1
    assert "quickstart: train failed with exit code 7; its message is above\n" in capfd.readouterr().err
    small_stages["train"] = whole
    small_stages["generate"] = "raise SystemExit('the data set must be kept')"
    assert quickstart.main(["--out", str(tmp_path)]) == 0
    assert "is there already" in capfd.readouterr().out


def test_the_port_is_looked_for_right_before_the_training(quickstart, small_stages, tmp_path, monkeypatch):
    seen = []
    scripts = quickstart.build_commands

    def build_commands(*arguments):
        seen.append((arguments[-1], (tmp_path / "data/manifest.json").is_file()))
        return scripts()

    assert small_stages
    monkeypatch.setattr(quickstart, "build_commands", build_commands)
    assert quickstart.main(["--out", str(tmp_path), "--ranks", "1"]) == 0
    threads = len(os.sched_getaffinity(0))
    assert seen == [(threads, False)] + 4 * [(threads, True)]


def test_a_stop_file_stops_and_is_no_failure(quickstart, small_stages, tmp_path, capfd):
    whole = small_stages["train"]
    small_stages["train"] = f"raise SystemExit({EXIT_REQUEUE})"
    assert quickstart.main(["--out", str(tmp_path)]) == EXIT_REQUEUE
    assert capfd.readouterr().err == "quickstart: stopped. The same command goes on from here.\n"
    small_stages["train"] = whole
    assert quickstart.main(["--out", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_as_a_whole(clone, tmp_path):
    """The real script and stages, in an environment that stands for this one and that nothing is installed into."""
    venv, source = tmp_path / "venv", f"source '{clone}/launch/environment.sh' && hash_of_installation"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (venv / "bin/python").chmod(0o755)
    stamp = subprocess.run(["bash", "-c", source], capture_output=True, text=True, check=True).stdout
    (venv / ".so3krates-generate").write_text(stamp)
    out = tmp_path / "quickstart"
    environment = os.environ | {"SO3KRATES_VENV": str(venv), "WANDB_MODE": "offline"}
    environment = {k: v for k, v in environment.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = ["bash", str(clone / "launch/quickstart.sh"), "--out", str(out)]
    with (tmp_path / "output.txt").open("w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode
    said = (tmp_path / "output.txt").read_text()
    assert code == 0, said
    assert "installing" not in said
    assert said.endswith(f"run folder: {out / 'run'}\n")
    results = json.loads((out / "run/quickstart.json").read_text())
    assert list(results["seconds"]) == ["generate", "validate", "train", "evaluate", "md"]
    assert 0 < results["forces_mae"] < 0.1
    assert 0 < results["energy_mae_per_atom"] < 0.01
    assert abs(results["drift_mev_per_atom_per_ps"]) < 5


GRANDCHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path('pids').write_text(f'{child.pid}')
time.sleep(600)
"""

STOPPABLE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("quickstart", sys.argv[1])
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)
quickstart.build_commands = lambda *_: {"generate": [sys.executable, "-c", sys.argv[2]]}
quickstart.count_gpus = lambda: 0
sys.exit(quickstart.main(["--out", "."]))
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything_that_was_started(clone, tmp_path, number):
    command = [sys.executable, "-c", STOPPABLE, str(clone / "launch/quickstart.py"), GRANDCHILD]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    pids = tmp_path / "pids"
    while not (pids.is_file() and pids.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    grandchild = int(pids.read_text())
    assert _is_running(grandchild)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == "quickstart: stopped. The same command goes on from here.\n"
    assert not _is_running(grandchild)


def test_what_does_not_end_by_itself_is_killed(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "STOP_SECONDS", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        quickstart.stop_group(process)
        assert process.wait() == -signal.SIGKILL
