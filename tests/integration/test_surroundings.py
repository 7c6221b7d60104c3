"""What is around a run may fail: W&B without a login or a server, or killed; locks that a killed build has left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from analytic import label, make_cluster, write_dataset
from test_launchers import SMOKE, launch, run_process
from training_setup import find_free_port

from so3krates_dist.metrics import read_metrics


@pytest.fixture(scope="module")
def train_script(clone) -> Path:
    return clone / "launch/train.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    graphs = [label(make_cluster(seed)) for seed in range(32)]
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": graphs[:24], "validation": graphs[24:]})


def test_a_lock_that_a_killed_build_has_left_does_not_stop_a_start(train_script, dataset, tmp_path):
    """DeepSpeed compiles operators at their first use; where that was killed, torch would wait for its lock for ever."""
    locks = [tmp_path / "extensions" / name / "lock" for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    settings = [
        *SMOKE,
        f"data.folder={dataset}",
        f"run.folder={tmp_path / 'run'}",
        "train.stop_at=1",
        "train.zero_stage=2",
    ]
    start = time.monotonic()
    result = launch(
        "deepspeed",
        train_script,
        *settings,
        "train.offload_optimizer=true",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - start < 120
    assert [len(list(lock.parent.iterdir())) for lock in locks] == [1, 1, 1], (
        "nothing is built, and no lock is taken away"
    )


# ------------------------------------------------------------------------------------------------------------------- W&B


def count_logged(run: Path) -> list[int]:
    return [int(r["step"]) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]


def wandb_environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment without a login, in which W&B may go online."""
    names = {
        "HOME": folder,
        "NETRC": folder / "none",
        "WANDB_CONFIG_DIR": folder / "config",
        "WANDB_CACHE_DIR": folder / "cache",
    }
    return {name: str(path) for name, path in names.items()} | {"WANDB_MODE": "online"} | more


@pytest.mark.parametrize("reachable", [True, False], ids=["no login", "no server"])
def test_a_run_does_without_wandb(train_script, dataset, tmp_path, reachable):
    """Neither a missing login nor a server that does not answer stops a run; each is said once, and no figure is lost."""
    more = {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": f"http://127.0.0.1:{find_free_port()}",
        "WANDB_INIT_TIMEOUT": "2",
    }
    environment = wandb_environment(tmp_path, **({} if reachable else more))
    settings = [*SMOKE, f"data.folder={dataset}", f"run.folder={tmp_path / 'run'}", "metrics.wandb=online"]
    result = run_process([sys.executable, train_script, *settings], **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = "W&B: not logged in (`wandb login`), so offline" if reachable else "W&B server not reached"
    assert result.stdout.count(expected) == 1, result.stdout
    assert result.stdout.count("W&B") == 1, result.stdout
    assert "wandb sync" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert count_logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1


def find_service(parent: int) -> list[int]:
    """Return the processes of W&B's service below a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            own = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if own == parent and b"wandb" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_a_run_outlives_wandb(train_script, dataset, tmp_path):
    """Its service is killed in the middle of a run."""
    run, last = tmp_path / "run", 60
    settings = [
        *SMOKE,
        f"data.folder={dataset}",
        f"run.folder={run}",
        "metrics.wandb=offline",
        f"train.num_steps={last}",
    ]
    settings += ["train.validate_every=1000", "train.save_every=1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | wandb_environment(tmp_path)
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        command = [sys.executable, str(train_script), *settings]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while not (run / "metrics.jsonl").is_file() or len(count_logged(run)) < 3:
                assert process.poll() is None, output.read_text()
                time.sleep(0.02)
            service = find_service(process.pid)
            assert service
            for number in service:
                os.kill(number, signal.SIGKILL)
            seen = len(count_logged(run))
            assert process.wait(200) == 0, output.read_text()
        finally:
            process.kill()
            process.wait()
    said = output.read_text()
    assert seen < last, "the service has to die before the end"
    assert said.count("W&B is off from here on") == 1, said
    assert "Traceback" not in said
    assert count_logged(run) == list(range(1, last + 1))
