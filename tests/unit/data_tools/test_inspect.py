"""Inspecting: the report names what the manifest holds, and the picture is a picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tools import inspect, quarantine
from data_tools.dataset import write_dataset
from so3krates_dist.errors import DataError


def write(folder: Path, graphs, **others) -> Path:
    options = {"name": "toy", "level_of_theory": "springs", "licence": "MIT", "seed": 0, "split": "14,3,3"} | others
    write_dataset(folder, graphs, provenance={"tool": "test", "dropped": {"water: SCF": 2}}, **options)
    return folder


def test_the_report_names_all_there_is(tmp_path: Path, make_water, run_tool, capsys) -> None:
    folder = write(tmp_path / "set", make_water(20), isolated_atom_energies={1: -13.6})
    assert run_tool(inspect, folder) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "toy: springs, licence MIT, fingerprint ",
        "labels: energy, forces; made by test",
        "train 14 1 14 0.0",
        "group conformers water 20",
        "H 28 -",
        "-13.6000",
        "atoms per conformer: 3 to 3, mean 3.0",
        "mean neighbours: 2.0 at 4.0 Å, 2.0 at 5.0 Å, 2.0 at 6.0 Å; charges: 0 e: 14",
        "dropped: 2 for water: SCF",
    ):
        assert part in text, part


def test_sets_without_forces_or_energies_are_reported(tmp_path: Path, make_water, run_tool, capsys) -> None:
    no_forces = [dataclasses.replace(g, forces=None) for g in make_water(20)]
    no_energy = [dataclasses.replace(g, energy=None) for g in make_water(20)]
    for name, graphs in (("a", no_forces), ("b", no_energy)):
        folder = write(tmp_path / name, graphs)
        assert run_tool(inspect, folder, "--picture", tmp_path / f"{name}.png") == 0
    text = capsys.readouterr().out
    assert text.count("forces: RMS") == 1
    assert text.count("energies less baselines") == 1


def test_the_picture_is_a_png(tmp_path: Path, make_water, run_tool, capsys) -> None:
    graphs = make_water(20)
    for graph in graphs[:10]:
        graph.cell, graph.pbc = 5 * np.eye(3), np.ones(3, bool)
    for graph in graphs[10:]:
        graph.cell, graph.pbc = np.zeros((3, 3)), np.zeros(3, bool)
    folder = write(tmp_path / "set", graphs)
    assert run_tool(inspect, folder, "--picture", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: " in capsys.readouterr().out


def test_reports_of_all_or_of_some_conformers_are_written(tmp_path: Path, make_water, run_tool, capsys) -> None:
    folder = write(tmp_path / "set", make_water(60), split="40,10,10")
    assert run_tool(inspect, folder, "--report", tmp_path / "a.html", "--max-conformers", 10) == 0
    assert run_tool(inspect, folder, "--report", tmp_path / "b.html", "--max-conformers", 10, "--all") == 0
    out = capsys.readouterr().out
    assert f"report of 9 of 60 conformers: {tmp_path / 'a.html'}" in out
    assert f"report of 60 of 60 conformers: {tmp_path / 'b.html'}" in out
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"--max-conformers must be at least 1; got 0\. Give one like 20000"):
        run_tool(inspect, folder, "--max-conformers", 0)
    with pytest.raises(DataError, match=r"--report must end in .html or .png; got 'a.txt'"):
        run_tool(inspect, folder, "--report", "a.txt")


def test_labels_that_some_lack_quarantine_and_many_groups_are_told(
    tmp_path: Path, make_water, run_tool, capsys
) -> None:
    graphs = [dataclasses.replace(g, group=f"g{i:02d}") for i, g in enumerate(make_water(60))]
    graphs[0].dipole = np.zeros(3)
    folder = write(tmp_path / "set", graphs, split="40,10,10")
    bad = quarantine.BadStructure(source="a.xyz", record=7, reason="force too large", rule="have less", got="9")
    quarantine.write_quarantine(folder / quarantine.QUARANTINE_NAME, [bad, bad])
    assert run_tool(inspect, folder) == 0
    out = capsys.readouterr().out
    assert "labels: energy, forces, dipole (1 of 60); made by test" in out
    assert f"in quarantine: 2 (2 for force too large), see {folder / quarantine.QUARANTINE_NAME}" in out
    assert "  and 20 more groups" in out
    assert "g39" in out
    assert "g40" not in out


def test_bad_folders_and_pictures_are_refused(tmp_path: Path, make_water, run_tool) -> None:
    with pytest.raises(DataError, match=r"must hold a manifest.json; got no such file"):
        run_tool(inspect, tmp_path)
    folder = write(tmp_path / "set", make_water(20))
    with pytest.raises(
        DataError, match=r"nowhere/a.png must be writable; got No such file or directory. Choose another"
    ):
        run_tool(inspect, folder, "--picture", tmp_path / "nowhere" / "a.png")
    (folder / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000.tar must be there, the manifest lists it; got no such file"):
        run_tool(inspect, folder)
