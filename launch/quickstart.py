"""The stages of quickstart.sh, once its environment exists: generate, validate, train, evaluate, md, and a table of results.

Every stage is a command that a user could type, run in a process group of its own: a signal to this process ends the whole
group, since the `deepspeed` command would leave its ranks alive. Nothing is ever deleted.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from so3krates_dist.config import load_config
from so3krates_dist.errors import EXIT_REQUEUE, ConfigError, So3kratesError
from so3krates_dist.metrics import print_table

OVERLAY = "run=quickstart"
MOLECULE = "ethanol"
STAGES = ("generate", "validate", "train", "evaluate", "md")
STOP_SECONDS = 20.0
"""Time that a stage has to end by itself when it is told to; then it is killed"""


class StoppedError(Exception):
    """A signal asked this process to end, or a stage stopped when it was asked to; its argument is the exit code."""


class StageError(Exception):
    """A stage ended with an exit code that is not zero."""


def _raise_stopped(number: int, _frame: FrameType | None) -> NoReturn:
    raise StoppedError(128 + number)


def _group_is_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # an ended leader that nobody waited for would count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it has started: SIGTERM, and SIGKILL after a while or on a second signal."""
    try:
        if _group_is_alive(process):
            os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _group_is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.1)
    except StoppedError:
        pass
    finally:
        if _group_is_alive(process):
            os.killpg(process.pid, signal.SIGKILL)


def run_stage(name: str, command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run one stage to its end.

    Returns:
        Seconds it took.

    Raises:
        StageError: It failed.
        StoppedError: A signal came, and the stage has been stopped; or it found a file STOP in the run folder.
    """
    print(f"== {name} ==\n$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
    try:
        code = process.wait()
    finally:
        stop_group(process)
    if code == EXIT_REQUEUE:
        raise StoppedError(EXIT_REQUEUE)
    if code:
        raise StageError(f"{name} failed with exit code {code}; its message is above")
    return time.monotonic() - start


def count_gpus() -> int:
    """Return how many GPUs may be used."""
    import torch

    return torch.cuda.device_count()


def choose_ranks(asked: int | None, num_gpus: int, cores: int, lanes: int) -> int:
    """Return the number of training processes.

    Args:
        asked: What `--ranks` says.
        num_gpus: GPUs that may be used.
        cores: CPU cores that may be used.
        lanes: `data.lanes`, which the number must divide.

    Raises:
        ConfigError: More processes than GPUs, or a number that does not divide the lanes.
    """
    if asked is None:
        limit = num_gpus or min(2, cores)
        return max(n for n in range(1, limit + 1) if lanes % n == 0)
    if num_gpus and asked > num_gpus:
        raise ConfigError("--ranks", f"be at most the number of GPUs ({num_gpus})", asked, "Give a smaller number")
    if lanes % asked:
        raise ConfigError("--ranks", f"divide data.lanes ({lanes})", asked, "Give another number")
    return asked


def name_accelerators(ranks: int, num_gpus: int, visible: str) -> list[str]:
    """Return the options that tell `deepspeed` which GPUs to use; with a mere number it takes the first ones of the machine.

    Args:
        ranks: Training processes.
        num_gpus: GPUs that may be used.
        visible: `CUDA_VISIBLE_DEVICES`.

    Raises:
        ConfigError: The GPUs are named in a way that `deepspeed` does not understand.
    """
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not num_gpus or not names:
        return ["--num_accelerators", str(ranks)]
    if not all(name.isdecimal() for name in names):
        raise ConfigError(
            "CUDA_VISIBLE_DEVICES", "be numbers like 0,1", visible, "DeepSpeed understands no other names"
        )
    return ["--include", f"localhost:{','.join(names[:ranks])}"]


def choose_threads(stage: str, ranks: int, cores: int) -> int:
    """Return the CPU threads of each process of a stage; a single small molecule has no work for more than one."""
    return {"train": max(1, cores // ranks), "md": 1}.get(stage, cores)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_commands(data: Path, run: Path, accelerators: Sequence[str], threads: int) -> dict[str, list[str]]:
    """Return the command of each stage.

    Args:
        data: Data set folder.
        run: Run folder.
        accelerators: Options of `deepspeed` that name the GPUs or count the processes.
        threads: CPU threads of each training process.
    """
    so3krates = [sys.executable, "-m", "so3krates_dist.cli"]
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", *accelerators]
    script = str(Path(__file__).with_name("train.py"))
    return {
        "generate": [*so3krates, "generate", "--out", str(data)],
        "validate": [*so3krates, "validate", str(data)],
        "train": [
            *deepspeed, "--master_port", str(_find_free_port()), script, OVERLAY, f"data.folder={data}", f"run.folder={run}",
            f"run.threads={threads}",
        ],
        "evaluate": [*so3krates, "evaluate", str(run)],
        "md": [*so3krates, "md", str(run), "--molecule", MOLECULE],
    }  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def collect_results(run: Path, seconds: Mapping[str, float], ranks: int) -> dict[str, Any]:
    """Return what the stages found, in eV and Å, with the seconds they took."""
    summary = _read_json(run / "evaluation" / "test.json").get("summary", {})
    return {
        "forces_mae": summary.get("forces_mae"),
        "energy_mae_per_atom": summary.get("energy_mae_per_atom"),
        "drift_mev_per_atom_per_ps": _read_json(run / "dynamics" / "nve.json").get("drift_mev_per_atom_per_ps"),
        "ranks": ranks,
        "seconds": {name: round(seconds[name], 1) for name in STAGES if name in seconds},
    }


def _format(value: object, factor: float, digits: int, unit: str) -> str:
    return f"{factor * value:.{digits}f} {unit}" if isinstance(value, int | float) else "-"


def print_results(results: Mapping[str, Any], run: Path) -> None:
    """Print the closing table and where everything is."""
    seconds = results["seconds"]
    rows = [
        ("force MAE (test split)", _format(results["forces_mae"], 1e3, 1, "meV/Å")),
        ("energy MAE (test split)", _format(results["energy_mae_per_atom"], 1e3, 2, "meV/atom")),
        (f"NVE drift ({MOLECULE}, 300 K)", _format(results["drift_mev_per_atom_per_ps"], 1.0, 3, "meV/atom per ps")),
        *((f"{name}", _format(value, 1.0, 0, "s")) for name, value in seconds.items()),
        ("all stages", _format(sum(seconds.values()), 1.0, 0, "s")),
    ]
    print_table("quickstart", ("", "result"), rows)
    print(f"run folder: {run}")


def run_stages(out: Path, asked_ranks: int | None) -> None:
    """Run what is still to be done of the quickstart.

    Args:
        out: Folder of everything; `data` and `run` are made in it.
        asked_ranks: Training processes, or None for what fits this machine.

    Raises:
        StageError: A stage failed.
        StoppedError: A signal or a file STOP in the run folder came.
        ConfigError: The processes do not fit this machine.
    """
    data, run, progress = out / "data", out / "run", out / "quickstart.json"
    if results := _read_json(run / progress.name):
        print("This quickstart is done; what follows is its result. `--out DIR` starts another one.")
        print_results(results, run)
        return
    cores, gpus = len(os.sched_getaffinity(0)), count_gpus()
    ranks = choose_ranks(asked_ranks, gpus, cores, load_config([OVERLAY]).data.lanes)
    out.mkdir(parents=True, exist_ok=True)
    accelerators = name_accelerators(ranks, gpus, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    seconds: dict[str, float] = _read_json(progress).get("seconds", {})
    for name in STAGES:
        if name == "generate" and (data / "manifest.json").is_file():
            print(f"== {name} ==\n{data} is there already", flush=True)
            continue
        threads = str(choose_threads(name, ranks, cores))
        settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        settings |= {} if gpus else {"DS_ACCELERATOR": "cpu"}
        # Built for each stage anew: a port that was free before `generate` may be taken minutes later.
        command = build_commands(data, run, accelerators, choose_threads("train", ranks, cores))[name]
        taken = run_stage(name, command, os.environ | settings)
        seconds[name] = taken + (seconds.get(name, 0.0) if name == "train" else 0.0)  # a resumed run took both times
        _write_json(progress, {"seconds": seconds})
    results = collect_results(run, seconds, ranks)
    _write_json(run / progress.name, results)
    print_results(results, run)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what went wrong into a line and an exit code."""
    parser = argparse.ArgumentParser(prog="quickstart")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int)
    arguments = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _raise_stopped)
    try:
        run_stages(arguments.out.absolute(), arguments.ranks)
    except StoppedError as stopped:
        print("quickstart: stopped. The same command goes on from here.", file=sys.stderr)
        return int(stopped.args[0])
    except StageError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except So3kratesError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
