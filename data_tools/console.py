"""What the data tools print: rich tables and a progress bar on a terminal, plain lines anywhere else."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any


def say(text: str = "") -> None:
    """Print one line now, so that it keeps its place among the lines of other processes."""
    print(text, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, the first column aligned left and the others right.

    Args:
        title: Line above the table.
        header: Names of the columns.
        rows: Cells, turned to text with `str`.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        import rich
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in cells:
            table.add_row(*row)
        rich.print(table)
        return
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    say(title)
    for row in [list(header), *cells]:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        say("  " + "  ".join(padded).rstrip())


class Progress:
    """Counts work done: a bar on a terminal, a line for every tenth part elsewhere.

    Use it as a context manager and call `advance`.
    """

    def __init__(self, text: str, total: int) -> None:
        self._text, self._total, self._done, self._printed = text, total, 0, 0
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import Progress as Bar

            self._bar = Bar(transient=True)
            self._bar.start()
            self._bar.add_task(self._text, total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Count `amount` more units of work as done."""
        self._done += amount
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)
        elif (tenth := 10 * self._done // max(self._total, 1)) > self._printed:
            self._printed = tenth
            say(f"{self._text}: {self._done} of {self._total}")
