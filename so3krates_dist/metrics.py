"""Figures of a run: metrics.jsonl is the record, Weights & Biases its mirror, the console a view; the only importer of wandb.

The record is one JSON object per line, appended and flushed at once, so that a crash costs half a line at most. Nothing that
happens to the mirror (no login, no server, no disk) stops or delays a run for longer than `INIT_TIMEOUT_SECONDS` and
`FINISH_TIMEOUT_SECONDS`; it is said once and the run goes on. Command lines, environments and keys are never passed on.
"""

import contextlib
import errno
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal, Self

from so3krates_dist.config import LOSS_WEIGHTS, RunConfig, to_plain
from so3krates_dist.errors import DataError

Kind = Literal["train", "validation", "test", "proof", "event"]
Value = float | int | str | None

METRICS_NAME: Final = "metrics.jsonl"
INIT_TIMEOUT_SECONDS: Final = 10.0
"""Longest wait for the W&B server at the start; WANDB_INIT_TIMEOUT overrides it"""
FINISH_TIMEOUT_SECONDS: Final = 30.0
"""Longest wait for uploads at the end; what is left can be sent with `wandb sync`"""

# Human units: (key, label, factor, format, unit)
_COLUMNS: Final = (
    ("loss", "loss", 1.0, ".4g", ""),
    ("energy_mae_per_atom", "E", 1e3, ".2f", " meV/atom"),
    ("forces_mae", "F", 1e3, ".1f", " meV/Å"),
    ("stress_mae", "stress", 1e3, ".2f", " meV/Å³"),
    ("dipole_mae", "dipole", 1e3, ".2f", " me Å"),
    ("partial_charges_mae", "charges", 1e3, ".2f", " me"),
    ("hirshfeld_ratios_mae", "Hirshfeld", 1e3, ".2f", "e-3"),
    ("proof_forces_error", "F off float64", 1e3, ".1g", " meV/Å"),
    ("learning_rate", "lr", 1.0, ".1e", ""),
    ("gradient_norm", "|g|", 1.0, ".2g", ""),
    ("conformers_per_second", "", 1.0, ".0f", " conformers/s"),
    ("data_wait_share", "data wait", 100.0, ".1f", " %"),
    ("skipped_steps", "skipped steps", 1.0, ".0f", ""),  # where there are any
)

UNITS: Final = {name: (factor, unit) for name, _, factor, _, unit in _COLUMNS if factor != 1 and unit.startswith(" ")}
"""Factor and unit, after a space, in which people are shown a figure of the record"""

_ERRORS: Final = {label: "energy_mae_per_atom" if label == "energy" else f"{label}_mae" for label in LOSS_WEIGHTS}
"""Figure of each label; the console shows those of labels that are trained"""


# ------------------------------------------------------------------------------------------------------------- the record


def _to_json_value(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line end: the half of a record that a crash left."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        position, tail = content_end, b""
        while position and b"\n" not in tail:
            size = min(4096, position)
            position = file.seek(position - size)
            tail = file.read(size) + tail
        keep = position + tail.rfind(b"\n") + 1
        if keep != content_end:
            file.truncate(keep)


class Record:
    """Appends records to metrics.jsonl; each is on its way to the disk when `append` returns.

    Args:
        path: The file; it is made, or continued where it exists.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        _cut_torn_line(path)
        before = read_metrics(path) if path.is_file() else []
        self._seconds_before = max((float(r.get("seconds", 0.0)) for r in before), default=0.0)
        self._start = time.monotonic()
        self._torn = False

    @property
    def seconds(self) -> float:
        """Time that the run has taken, over all its starts."""
        return self._seconds_before + time.monotonic() - self._start

    def append(self, kind: Kind, step: int, values: Mapping[str, Value]) -> None:
        """Write one line.

        Raises:
            OSError: The disk is full or gone; the next call tries again.
        """
        content: dict[str, Value] = {"kind": kind, "step": step, "seconds": round(self.seconds, 3)}
        content |= {name: _to_json_value(value) for name, value in values.items()}
        line = (json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n").encode()
        if self._torn:
            _cut_torn_line(self._path)
        self._torn = True
        with self._path.open("ab", buffering=0) as file:
            written = file.write(line)  # one call: a line is there as a whole, or torn at the end
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl.

    A run that is resumed from an earlier step writes some steps again: a record at step s takes the place of all earlier
    records of its kind at s and beyond. Events are all kept. null is read as nan.

    Args:
        path: The file; a half-written last line is passed over.

    Returns:
        Records in the order of writing, each with `kind`, `step`, `seconds` and its values.

    Raises:
        DataError: A line before the last is no record.
    """
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            kind, step = str(record["kind"]), int(record["step"])
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}", "be a JSON record with kind and step", repr(line[:40]), "Delete this line"
            ) from error
        if kind != "event":
            while records and (stale := _find_stale(records, kind, step)) is not None:
                del records[stale]
        records.append(record)
    return records


def _find_stale(records: Sequence[Mapping[str, Any]], kind: str, step: int) -> int | None:
    """Return the index of the newest record of a kind where it is at `step` or beyond."""
    newest = next((i for i in range(len(records) - 1, -1, -1) if records[i]["kind"] == kind), None)
    return newest if newest is not None and records[newest]["step"] >= step else None


# ------------------------------------------------------------------------------------------------------------- the mirror


def is_logged_in(base_url: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether there are W&B credentials: in the environment, or for this very server in a netrc file.

    Args:
        base_url: Of the W&B server.
        environment: Variables; keys are looked for, never read out or stored.
    """
    import netrc
    from urllib.parse import urlsplit

    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    for path in (environment.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            known = netrc.netrc(Path(path).expanduser()).hosts if path else {}
        except (OSError, netrc.NetrcParseError):
            continue
        if host in known:
            return True
    return False


class WandbMirror:
    """Copies records to Weights & Biases for as long as that works, and says once when it does not.

    Args:
        folder: Run folder; W&B's files go to its `wandb/`.
        config: Of the run.
        say: Takes one line for the user.
    """

    def __init__(self, folder: Path, config: RunConfig, say: Callable[[str], None]) -> None:
        self._folder, self._config, self._say = folder, config, say
        self._run: Any = None
        if config.metrics.wandb != "off":
            self._guard("start", self._start)

    def _guard(self, what: str, action: Callable[[], None]) -> bool:
        """Do something with W&B; where it fails, go on without W&B."""
        try:
            action()
        except Exception as error:  # wandb raises its own errors, OSError, asyncio's: none may stop a run
            self._run = None
            _abandon_service()
            self._say(f"W&B is off from here on: {what} failed ({_first_line(error)}). {METRICS_NAME} is complete")
            return False
        return True

    def _start(self) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "").lower() == "disabled" or "WANDB_DISABLED" in os.environ:
            return
        wandb.setup(settings=_make_settings(wandb, online=False))  # silences the log-in line that init() would print
        mode = self._choose_mode(str(wandb.Settings().base_url))
        try:
            self._init(wandb, mode)
        except Exception as error:  # wandb raises many kinds when a server or a login is missing
            if mode == "offline":
                raise
            self._say(f"W&B server not reached ({_first_line(error)}): offline from here on; {self._sync_hint()}")
            wandb.teardown()  # its service still holds the run's id
            wandb.setup(settings=_make_settings(wandb, online=False))
            self._init(wandb, "offline")

    def _choose_mode(self, base_url: str) -> Literal["online", "offline"]:
        """Return the mode; without a login `online` would ask for a key and wait for ever."""
        wanted = self._config.metrics.wandb
        if wanted == "offline" or os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun"):
            return "offline"
        if is_logged_in(base_url):
            return "online"
        if wanted == "online":
            self._say(f"W&B: not logged in (`wandb login`), so offline; {self._sync_hint()}")
        return "offline"

    def _sync_hint(self) -> str:
        return f"send it later with `wandb sync {self._folder / 'wandb'}/offline-run-*`"

    def _init(self, wandb: Any, mode: Literal["online", "offline"]) -> None:
        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=mode,
            dir=str(self._folder),
            project=self._config.metrics.project,
            name=self._config.run.name,
            id=self._find_id(),
            resume="allow",
            config=to_plain(self._config),
            settings=_make_settings(wandb, online=mode == "online"),
        )
        # Not W&B's own step: it refuses steps that a resumed run does again.
        self._run.define_metric("*", step_metric="step")

    def _find_id(self) -> str:
        """Return the id that continues this run in W&B; made at the first start."""
        path = self._folder / "wandb" / "run_id.txt"
        if path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        new = secrets.token_hex(4)
        path.write_text(new + "\n", encoding="utf-8")
        return new

    def log(self, kind: Kind, step: int, values: Mapping[str, Value]) -> None:
        """Copy one record."""
        if self._run is None:
            return
        content: dict[str, Value] = {f"{kind}/{name}": value for name, value in values.items()}
        self._guard("log", lambda: self._run.log({"step": step, **content}))

    def close(self, exit_code: int = 0) -> None:
        """Hand over what is left, within `FINISH_TIMEOUT_SECONDS`."""
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish(exit_code=exit_code))
            self._run = None


def _abandon_service() -> None:
    """Stop W&B's helper process; left to the interpreter's exit it would complain there with a traceback."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _make_settings(wandb: Any, *, online: bool) -> Any:
    """Return W&B settings that record figures and configuration, and neither command line, code, git nor console."""
    newer = {"finish_timeout": FINISH_TIMEOUT_SECONDS, "x_disable_machine_info": True}
    return wandb.Settings(
        console="off",
        silent=True,
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_SECONDS)),
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=not online,
        **{name: value for name, value in newer.items() if name in wandb.Settings.model_fields},
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ the console


def format_duration(seconds: float) -> str:
    """Return a time as `M:SS` or `H:MM:SS`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_record(kind: str, step: int, values: Mapping[str, Value], num_steps: int, eta: float | None = None) -> str:
    """Return the console line of one record, in human units.

    Args:
        kind: `train`, `validation`, `test`, `proof` or `event`.
        step: Optimizer steps done.
        values: Figures in eV and Å.
        num_steps: Steps of the whole run.
        eta: Seconds that are left, where known.
    """
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", f"{kind:<10}"]
    for name, label, factor, spec, unit in _COLUMNS:
        value = values.get(name)
        if isinstance(value, int | float) and (value or name != "skipped_steps"):
            parts.append(f"{label} {value * factor:{spec}}{unit}".strip())
    if kind == "event":
        parts += [f"{name} {value}" for name, value in values.items()]
    if eta is not None:
        parts.append(f"ETA {format_duration(eta)}")
    return "  ".join(parts)


class _ConsoleView:
    """Prints lines; on a terminal with colours and a progress bar below them. A full disk under them stops no run."""

    _STYLES: Final = {"validation": "bold green", "test": "bold green", "event": "yellow"}

    def __init__(self, num_steps: int, stream: IO[str] | None = None, hidden: frozenset[str] = frozenset()) -> None:
        self._num_steps, self._hidden = num_steps, hidden
        self._stream = stream or sys.stdout
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        self._warned = False

    def show(self, kind: Kind, step: int, values: Mapping[str, Value]) -> None:
        """Print one record, but for proofs of precision, of which there is a sentence."""
        if kind == "proof":
            return
        eta = self._estimate_rest(step) if kind == "train" else None
        shown = {name: value for name, value in values.items() if name not in self._hidden}
        self.say(format_record(kind, step, shown, self._num_steps, eta), self._STYLES.get(kind, ""))
        if kind == "train" and self._stream.isatty():
            self._advance(step)

    def say(self, text: str, style: str = "") -> None:
        """Print one line."""
        try:
            if self._stream.isatty():
                console = self._bar.console if self._bar else _make_console(self._stream)
                console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)
        except BrokenPipeError:  # nobody reads any more: as with other commands, that is the end
            raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                with contextlib.suppress(OSError):  # it may be the same file
                    print(f"lines are lost: standard output: {error.strerror}", file=sys.stderr, flush=True)

    def _estimate_rest(self, step: int) -> float | None:
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            return None
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * max(self._num_steps - step, 0)

    def _advance(self, step: int) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=_make_console(self._stream), transient=True)
            self._bar.add_task("", total=self._num_steps, completed=step)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=step)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _make_console(stream: IO[str]) -> Any:
    from rich.console import Console

    return Console(file=stream)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str] | None = None
) -> None:
    """Print a table: with lines and colours on a terminal, as aligned columns elsewhere.

    Args:
        title: Above the table.
        columns: Headings; the first column is text, the others are numbers.
        rows: As many cells as there are columns.
        stream: Where to; None: standard output.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
        print(title, file=stream)
        for row in (columns, *rows):
            cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            print("  " + "  ".join(cells).rstrip(), file=stream)
        stream.flush()
        return
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    _make_console(stream).print(table)


# ------------------------------------------------------------------------------------------------------------- all of them


class MetricsLogger:
    """Where a run's figures go; on other processes than rank 0 it does nothing.

    Args:
        folder: Run folder.
        config: Of the run.
        is_main: Whether this is rank 0.
        console: Whether to print lines.
    """

    def __init__(self, folder: Path, config: RunConfig, *, is_main: bool, console: bool = True) -> None:
        hidden = frozenset(name for label, name in _ERRORS.items() if not config.train.trains(label))
        self._view = _ConsoleView(config.train.num_steps, hidden=hidden) if is_main and console else None
        self._record = Record(folder / METRICS_NAME) if is_main else None
        self._mirror = WandbMirror(folder, config, self.message) if is_main else None
        self._disk_warned = False

    def log(self, kind: Kind, step: int, values: Mapping[str, Value]) -> None:
        """Record figures, in eV and Å.

        Args:
            kind: What they are about.
            step: Optimizer steps done.
            values: nan and infinity are recorded as null; texts are for events.
        """
        if self._record is None or self._mirror is None:
            return
        try:
            self._record.append(kind, step, values)
        except OSError as error:
            if not self._disk_warned:
                self._disk_warned = True
                self.message(f"{METRICS_NAME} cannot be written ({error.strerror}); figures may be missing from it")
        self._mirror.log(kind, step, values)
        if self._view is not None:
            self._view.show(kind, step, values)

    def message(self, text: str) -> None:
        """Tell the user something, on rank 0's console and nowhere else."""
        if self._view is not None:
            self._view.say(text)

    def close(self, exit_code: int = 0) -> None:
        """Finish; may be called again."""
        if self._view is not None:
            self._view.close()
        if self._mirror is not None:
            self._mirror.close(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)
