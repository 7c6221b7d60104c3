"""Plain lines where the output is no terminal, rich where it is one."""

import sys

from data_tools.console import Progress, print_table, say


def test_plain_tables_are_aligned(capsys) -> None:
    print_table("things", ["name", "count"], [("a", 1), ("longer", 20)])
    assert capsys.readouterr().out == "things\n  name    count\n  a           1\n  longer     20\n"


def test_plain_progress_prints_every_tenth(capsys) -> None:
    with Progress("done", 40) as progress:
        for _ in range(40):
            progress.advance(1)
    assert capsys.readouterr().out.splitlines() == [f"done: {n} of 40" for n in range(4, 41, 4)]


def test_a_terminal_gets_rich_tables_and_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("things", ["name", "count"], [("a", 1)])
    with Progress("done", 2) as progress:
        progress.advance(2)
    say("end")
    text = capsys.readouterr().out
    assert "things" in text
    assert "┃" in text or "│" in text
    assert text.endswith("end\n")
