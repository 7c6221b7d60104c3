"""Inspecting: the report names what the manifest holds, and the picture is a picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tools import inspect
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
