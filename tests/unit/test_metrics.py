"""The record survives what can happen to it, and nothing that happens to W&B stops a run."""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from so3krates_dist import metrics
from so3krates_dist.config import MetricsSection, RunConfig, RunSection, So3lrSection, TrainSection
from so3krates_dist.errors import DataError
from so3krates_dist.metrics import METRICS_NAME, MetricsLogger, Record, format_record, print_table, read_metrics

KEY = "0123456789abcdef" * 2 + "deadbeef"
TRAIN = {"loss": 0.25, "forces_mae": 0.0253, "energy_mae_per_atom": 0.0007}


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def make_config(wandb: Literal["off", "auto", "offline", "online"] = "off") -> RunConfig:
    return RunConfig(
        run=RunSection(name="tested"), train=TrainSection(num_steps=1000), metrics=MetricsSection(wandb=wandb)
    )


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --------------------------------------------------------------------------------------------------------------- the record


def test_record_is_read_back(tmp_path: Path) -> None:
    record = Record(tmp_path / METRICS_NAME)
    record.append("train", 50, {"loss": 0.5, "gradient_norm": math.inf, "epoch": 3})
    record.append("validation", 50, {"forces_mae": math.nan})
    record.append("event", 60, {"event": "resumed"})
    first, second, third = read_metrics(tmp_path / METRICS_NAME)
    assert (first["kind"], first["step"], first["loss"], first["epoch"]) == ("train", 50, 0.5, 3)
    assert math.isnan(first["gradient_norm"])
    assert math.isnan(second["forces_mae"])
    assert third["event"] == "resumed"
    assert 0 <= first["seconds"] <= second["seconds"]


def test_not_finite_numbers_are_null(tmp_path: Path) -> None:
    Record(tmp_path / METRICS_NAME).append("train", 1, {"loss": math.nan, "gradient_norm": -math.inf})
    content = json.loads((tmp_path / METRICS_NAME).read_text(), parse_constant=pytest.fail)
    assert content["loss"] is None
    assert content["gradient_norm"] is None


@pytest.mark.parametrize("lost", [1, 2, 20, 60])
def test_torn_last_line_costs_one_record(tmp_path: Path, lost: int) -> None:
    path = tmp_path / METRICS_NAME
    record = Record(path)
    for step in (1, 2, 3):
        record.append("train", step, TRAIN)
    path.write_bytes(path.read_bytes()[:-lost])
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    Record(path).append("train", 3, TRAIN)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    Record(path).append("train", 1, TRAIN)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 10_000)
    Record(path)
    assert path.read_bytes() == whole
    path.write_bytes(b"x" * 10_000)
    Record(path)
    assert path.read_bytes() == b""


def test_repeated_steps_replace_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    record = Record(path)
    for step in (10, 20, 30, 40):
        record.append("train", step, {"loss": 1.0})
    record.append("validation", 40, {"forces_mae": 1.0})
    record.append("event", 20, {"event": "stopped"})
    record.append("event", 20, {"event": "resumed"})
    record.append("train", 25, {"loss": 2.0})
    records = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in records if r["kind"] == "train"] == [(10, 1.0), (20, 1.0), (25, 2.0)]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [40]
    assert [r["event"] for r in records if r["kind"] == "event"] == ["stopped", "resumed"]


def test_seconds_go_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    path.write_text('{"kind": "train", "step": 1, "seconds": 100.0, "loss": 1.0}\n')
    Record(path).append("train", 2, {"loss": 0.5})
    assert read_metrics(path)[1]["seconds"] >= 100.0


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 1}', '{"kind": "train", "step": "x"}', "\0\0"])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS_NAME
    path.write_text(f'{{"kind": "train", "step": 1}}\n{line}\n{{"kind": "train", "step": 2}}\n')
    with pytest.raises(
        DataError, match=r"metrics\.jsonl:2 must be a JSON record with kind and step; got .* Delete this line"
    ):
        read_metrics(path)


def test_full_disk_is_said_once_and_survived(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from so3krates_dist.config import MetricsSection, RunConfig
from so3krates_dist.metrics import MetricsLogger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logger = MetricsLogger(Path({str(tmp_path)!r}), RunConfig(metrics=MetricsSection(wandb="off")), is_main=True)
logger.log("train", 1, {{"loss": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for step in (2, 3, 4):
    logger.log("train", step, {{"loss": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
logger.log("train", 5, {{"loss": 1.0}})
logger.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count("cannot be written") == 1
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 5]


def test_vanished_folder_is_said_once_and_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with MetricsLogger(folder, make_config(), is_main=True) as logger:
        logger.log("train", 1, TRAIN)
        shutil.rmtree(folder)
        logger.log("train", 2, TRAIN)
        logger.log("train", 3, TRAIN)
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (No such file or directory)") == 1


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path / "run", make_config("offline"), is_main=False) as logger:
        logger.log("train", 1, TRAIN)
        logger.message("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------------------- the mirror


def read_all(folder: Path) -> bytes:
    return b"\n".join(p.name.encode() + b"\n" + p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_wandb_is_not_imported_when_off(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from so3krates_dist.config import MetricsSection, RunConfig
from so3krates_dist.metrics import MetricsLogger
with MetricsLogger(Path({str(tmp_path)!r}), RunConfig(metrics=MetricsSection(wandb="off")), is_main=True) as logger:
    logger.log("train", 1, {{"loss": 1.0}})
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_DISABLED"])
def test_wandb_own_switch_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "disabled")
    with MetricsLogger(tmp_path, make_config("auto"), is_main=True) as logger:
        logger.log("train", 1, TRAIN)
    assert not (tmp_path / "wandb").exists()


def test_auto_without_login_is_offline_and_resumes_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--secret-of-the-command-line"])
    for step in (1, 2):
        with MetricsLogger(tmp_path / "run", make_config("auto"), is_main=True) as logger:
            logger.log("train", step, {**TRAIN, "gradient_norm": math.nan})
    names = sorted(p.name for p in (tmp_path / "run/wandb").glob("offline-run-*"))
    run_id = (tmp_path / "run/wandb/run_id.txt").read_text().strip()
    assert len(names) == 2
    assert all(run_id in n for n in names)
    content = read_all(tmp_path / "run/wandb")
    assert b"train/forces_mae" in content
    assert b"tested" in content
    assert b"secret-of-the-command-line" not in content
    lines = "".join(capfd.readouterr()).splitlines()
    assert len(lines) == 2, lines
    assert all("F 25.3 meV/Å" in line for line in lines)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / METRICS_NAME)] == [1, 2]


def test_unreachable_server_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    with MetricsLogger(tmp_path / "run", make_config("online"), is_main=True) as logger:
        logger.log("train", 1, TRAIN)
    output = "".join(capfd.readouterr())
    assert output.count("W&B server not reached") == 1
    assert "wandb sync" in output
    assert len(output.splitlines()) == 2, output
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    assert KEY.encode() not in read_all(tmp_path)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / METRICS_NAME)] == [1]


def test_online_without_login_is_offline_and_asks_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    MetricsLogger(tmp_path, make_config("online"), is_main=True).close()
    output = "".join(capfd.readouterr())
    assert output.count("W&B: not logged in") == 1
    assert len(output.splitlines()) == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_unwritable_wandb_folder_is_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").write_text("in the way")
    with MetricsLogger(tmp_path, make_config("offline"), is_main=True) as logger:
        logger.log("train", 1, TRAIN)
    assert capsys.readouterr().out.count("W&B is off from here on: start failed") == 1
    assert len(read_metrics(tmp_path / METRICS_NAME)) == 1


def find_wandb_children() -> list[int]:
    """Return the children of this process that run W&B's service (a dead one has no command line)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and b"wandb" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_death_of_the_wandb_service_is_survived(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, make_config("offline"), is_main=True) as logger:
        logger.log("train", 1, TRAIN)
        children = find_wandb_children()
        assert children
        for child in children:
            os.kill(child, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while find_wandb_children():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for step in (2, 3):
            logger.log("train", step, TRAIN)
    assert "".join(capfd.readouterr()).count("W&B is off from here on") == 1
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2, 3]


def test_login_is_found(tmp_path: Path) -> None:
    url = "https://wandb.example.org"
    home = {"NETRC": str(tmp_path / "netrc")}
    assert metrics.is_logged_in(url, {"WANDB_API_KEY": KEY})
    assert not metrics.is_logged_in(url, home)
    (tmp_path / "netrc").write_text("damaged {")
    assert not metrics.is_logged_in(url, home)
    (tmp_path / "netrc").write_text(f"machine elsewhere.org login user password {KEY}\n")
    assert not metrics.is_logged_in(url, home)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert not metrics.is_logged_in(url, home), "the key of another server"
    assert metrics.is_logged_in("https://api.wandb.ai", home)
    (tmp_path / "netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    assert metrics.is_logged_in(url, home)


# -------------------------------------------------------------------------------------------------------------- the console


def test_line_has_human_units() -> None:
    values = {
        **TRAIN,
        "learning_rate": 1e-3,
        "conformers_per_second": 240.4,
        "data_wait_share": 0.0031,
        "gradient_norm": 2.0,
    }
    assert format_record("train", 50, values, 10_000, 3725.0) == (
        "step    50/10000  train       loss 0.25  E 0.70 meV/atom  F 25.3 meV/Å  lr 1.0e-03  |g| 2  240 conformers/s"
        "  data wait 0.3 %  ETA 1:02:05"
    )
    assert "skipped" not in format_record("train", 50, {**TRAIN, "skipped_steps": 0.0}, 100)
    assert format_record("train", 50, {**TRAIN, "skipped_steps": 2.0}, 100).endswith("F 25.3 meV/Å  skipped steps 2")
    assert format_record("event", 7, {"event": "resumed"}, 10) == "step  7/10  event       event resumed"
    assert metrics.format_duration(59.6) == "1:00"


def test_lines_have_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = TrainSection(
        energy_weight=0.0, forces_weight=0.0, dipole_weight=1.0, hirshfeld_weight=1.0, charges_weight=1.0,
        final_forces_weight=0.0, weights_until=10,
    )  # fmt: skip
    config = RunConfig(model=So3lrSection(), train=train, metrics=MetricsSection(wandb="off"))
    values = {"energy_mae_per_atom": 0.5, "forces_mae": 0.5, "dipole_mae": 0.25, "hirshfeld_ratios_mae": 0.001}
    values["partial_charges_mae"] = 0.0105
    with MetricsLogger(tmp_path, config, is_main=True) as logger:
        logger.log("validation", 3, values)
    assert capsys.readouterr().out.split("validation")[1].strip() == (
        "dipole 250.00 me Å  charges 10.50 me  Hirshfeld 1.00e-3"
    )
    assert read_metrics(tmp_path / "metrics.jsonl")[0].items() >= values.items(), "the record has all"


def test_lines_have_what_is_trained_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = TrainSection(energy_weight=0.0, final_energy_weight=1.0, weights_until=10)
    config = RunConfig(train=train, metrics=MetricsSection(wandb="off"))
    with MetricsLogger(tmp_path, config, is_main=True) as logger:
        logger.log("validation", 3, {"energy_mae_per_atom": 0.5, "forces_mae": 0.5})
    assert "E 500.00 meV/atom" in capsys.readouterr().out


def test_lines_have_eta_from_the_second_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, make_config(), is_main=True) as logger:
        for step in (100, 200):
            logger.log("train", step, TRAIN)
        logger.log("validation", 200, {"forces_mae": 0.1})
        logger.message("a message")
    lines = capsys.readouterr().out.splitlines()
    assert ["ETA" in line for line in lines] == [False, True, False, False]
    assert lines[3] == "a message"


class FailingStream(io.StringIO):
    """A file whose disk is full, or a pipe that nobody reads, for some of the writes."""

    def __init__(self, error: int, failing: range) -> None:
        super().__init__()
        self.error, self.failing, self.count = error, failing, 0

    def write(self, text: str) -> int:
        self.count += 1
        if self.count in self.failing:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


def test_full_disk_under_the_console_is_said_once_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = FailingStream(errno.ENOSPC, range(1, 4))
    monkeypatch.setattr(sys, "stdout", stream)
    with MetricsLogger(tmp_path, make_config(), is_main=True) as logger:
        for step in (1, 2, 3, 4):
            logger.log("train", step, TRAIN)
        logger.message("a message")
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2, 3, 4], "the record is complete"
    assert stream.getvalue().endswith("a message\n"), "what comes when there is room again is there"
    assert capsys.readouterr().err == "lines are lost: standard output: No space left on device\n"


def test_full_disk_under_all_output_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = FailingStream(errno.ENOSPC, range(1, 1000))
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with MetricsLogger(tmp_path, make_config(), is_main=True) as logger:
        for step in (1, 2):
            logger.log("train", step, TRAIN)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME)] == [1, 2]


def test_a_pipe_that_nobody_reads_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", FailingStream(errno.EPIPE, range(1, 1000)))
    with MetricsLogger(tmp_path, make_config(), is_main=True) as logger, pytest.raises(BrokenPipeError):
        logger.log("train", 1, TRAIN)


def test_console_can_be_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(tmp_path, make_config(), is_main=True, console=False) as logger:
        logger.log("train", 1, TRAIN)
        logger.message("a message")
    assert capsys.readouterr().out == ""


def test_terminal_gets_colours_and_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    with MetricsLogger(tmp_path, make_config(), is_main=True) as logger:
        for step in (100, 200):
            logger.log("train", step, TRAIN)
        logger.log("validation", 200, {"forces_mae": 0.1})
        logger.message("[not markup]")
    shown = terminal.getvalue()
    assert "step  200/1000  validation  F 100.0 meV/Å" in shown
    assert "[not markup]" in shown
    assert "200/1000" in shown
    assert "\x1b[" in shown


def test_table_is_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Errors", ("group", "MAE"), [("ethanol", "1.0"), ("water", "12.0")])
    assert capsys.readouterr().out == "Errors\n  group     MAE\n  ethanol   1.0\n  water    12.0\n"


def test_table_on_a_terminal() -> None:
    terminal = Terminal()
    print_table("Errors", ("group", "MAE"), [("ethanol", "1.0")], terminal)
    assert "ethanol" in terminal.getvalue()
    assert "│" in terminal.getvalue()
