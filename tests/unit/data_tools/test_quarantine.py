"""The quarantine file: one line for each bad structure, the same bytes for the same findings, parts that add up."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools import gate, quarantine
from data_tools.quarantine import BadStructure
from so3krates_dist.errors import DataError


def make_bad(record: int, reason: str = "atoms too close", **others) -> BadStructure:
    options = {"source": "a.xyz", "rule": "have its atoms apart", "got": "0.2 Å", "formula": "H2O"} | others
    return BadStructure(record=record, reason=reason, **options)


def test_a_bad_structure_is_described_with_its_reason_and_labels(make_water) -> None:
    graph = make_water(1)[0]
    graph.energy, graph.forces = -2076.5, np.array([[3.0, 4.0, 0.0], [0, 0, 0], [0, 0, 0]])
    problem = gate.find_problem(graph, 1.0)
    assert problem is not None
    entry = BadStructure.describe(graph, problem, "water.xyz", 7)
    assert json.loads(entry.to_json()) == {
        "source": "water.xyz", "record": 7, "reason": "force too large", "rule": "have forces of at most 1 eV/Å",
        "got": "5 eV/Å", "formula": "H2O", "group": "water", "num_atoms": 3, "total_charge": 0.0,
        "num_unpaired_electrons": 0.0, "energy": -2076.5, "max_force": 5.0,
    }  # fmt: skip
    assert list(json.loads(entry.to_json())) == sorted(json.loads(entry.to_json()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"energy": np.nan}, {"energy": None, "formula": "H2O"}),
        ({"energy": "low"}, {"energy": None}),
        ({"energy": None, "forces": None}, {"energy": None, "max_force": None}),
        ({"forces": np.full((3, 3), np.inf)}, {"max_force": None}),
        ({"forces": np.zeros(4)}, {"max_force": None}),
        ({"forces": np.zeros((0, 3))}, {"max_force": None}),
        ({"atomic_numbers": np.array([8, 1, 200])}, {"formula": "", "num_atoms": 3}),
        ({"atomic_numbers": np.array([8.0, 1.0, 1.0])}, {"formula": "", "num_atoms": 3}),
        ({"atomic_numbers": np.array([[8, 1, 1]])}, {"formula": "", "num_atoms": 3}),
        ({"atomic_numbers": np.zeros(0, int)}, {"formula": "", "num_atoms": 0}),
        ({"total_charge": np.nan, "num_unpaired_electrons": np.inf}, {"total_charge": None}),
    ],
)
def test_whatever_is_wrong_can_be_described_and_read_again(make_water, tmp_path: Path, change, expected) -> None:
    graph = dataclasses.replace(make_water(1)[0], **change)
    entry = BadStructure.describe(graph, gate.Problem("r", "rule", "got"), "a", 0)
    assert expected.items() <= dataclasses.asdict(entry).items()
    assert "NaN" not in entry.to_json()
    assert "Infinity" not in entry.to_json()
    quarantine.write_quarantine(tmp_path / "q", [entry])
    assert list(quarantine.iter_quarantine(tmp_path / "q")) == [entry]


def test_files_are_written_appended_to_and_read(tmp_path: Path) -> None:
    path = tmp_path / quarantine.QUARANTINE_NAME
    first = [make_bad(0), make_bad(3, "force too large", energy=-1.5, source="ä\nb.xyz")]
    assert quarantine.write_quarantine(path, iter(first)) == Counter({"atoms too close": 1, "force too large": 1})
    assert list(quarantine.iter_quarantine(path)) == first
    assert quarantine.append_quarantine(path, [make_bad(5)]) == Counter({"atoms too close": 1})
    assert [e.record for e in quarantine.iter_quarantine(path)] == [0, 3, 5]
    assert len(path.read_text().splitlines()) == 3
    assert quarantine.write_quarantine(path, []) == Counter()
    assert path.read_bytes() == b""
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_parts_are_put_together_in_order_whether_they_are_there_or_not(tmp_path: Path) -> None:
    entries = [make_bad(i, "atoms too close" if i % 3 else "force too large") for i in range(9)]
    quarantine.write_quarantine(tmp_path / "a", entries[:4])
    quarantine.write_quarantine(tmp_path / "c", entries[4:])
    counts = quarantine.concatenate_quarantines([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "all")
    assert counts == Counter({"atoms too close": 6, "force too large": 3}) == quarantine.count_reasons(entries)
    quarantine.write_quarantine(tmp_path / "whole", entries)
    assert (tmp_path / "all").read_bytes() == (tmp_path / "whole").read_bytes()


def test_names_that_are_no_unicode_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.xyz")
    quarantine.write_quarantine(tmp_path / "q", [make_bad(0, source=name)])
    assert [e.source for e in quarantine.iter_quarantine(tmp_path / "q")] == [name]


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"record": 0}', "missing"),
        (make_bad(0).to_json().replace("record", "number"), "unexpected keyword argument"),
        (make_bad(0).to_json().replace('"record": 0', '"record": true'), "record is True"),
        (make_bad(0).to_json().replace('"record": 0', '"record": null'), "record is None"),
        (make_bad(0).to_json().replace('"H2O"', "5"), "formula is 5"),
        ("\xff", "JSONDecodeError"),
    ],
)
def test_lines_that_are_none_are_refused(tmp_path: Path, line: str, got: str) -> None:
    (tmp_path / "q").write_text(f"{make_bad(0).to_json()}\n{line}\n", encoding="latin-1")
    with pytest.raises(
        DataError, match=rf"q:2 must be the record of a bad structure; got .*{got}.*Copy the file again"
    ):
        list(quarantine.iter_quarantine(tmp_path / "q"))
    with pytest.raises(DataError, match="q:2 must be the record"):
        quarantine.concatenate_quarantines([tmp_path / "q"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_shares_are_told_and_limited() -> None:
    counts = {"force too large": 2, "atoms too close": 2, "electron parity": 5}
    text = "9 of 400 (2.25%): 5 for electron parity, 2 for atoms too close, 2 for force too large"
    assert quarantine.describe_counts(counts, 400) == text
    assert quarantine.describe_counts({}, 400) == "none of 400"
    assert quarantine.find_bad_share({}, 0) == 0.0
    quarantine.check_bad_share(counts, 400, 0.0225, "a.xyz")
    with pytest.raises(DataError) as error:
        quarantine.check_bad_share(counts, 400, 0.0224, "a.xyz")
    assert str(error.value).startswith(
        f"a.xyz must have at most 2.24% bad structures; got {text}. Look at the quarantine"
    )


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan, np.inf])
def test_shares_that_are_none_are_refused(value: float) -> None:
    quarantine.check_max_bad_share(0.0)
    quarantine.check_max_bad_share(1.0)
    with pytest.raises(DataError, match=r"--max-bad-share must be a share from 0 to 1; got .*Give one like 0.01"):
        quarantine.check_max_bad_share(value)
