"""Units of files: given, documented, recognised, or refused."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conversion_files import assert_same_structures, load_all, write_npz, write_xyz

from data_tools import convert
from so3krates_dist.data.shards import load_manifest
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph
from so3krates_dist.units import ENERGY_UNITS, KCAL_PER_MOL_EV, LENGTH_UNITS


@pytest.mark.parametrize("energy", ["eV", "kcal/mol", "kJ/mol", "Hartree"])
@pytest.mark.parametrize("length", ["Angstrom", "Bohr", "nm"])
def test_units_of_an_npz_are_recognised(tmp_path: Path, make_water, run_tool, capsys, energy: str, length: str) -> None:
    graphs = make_water(40)
    path = write_npz(tmp_path / "water.npz", graphs, units=(energy, length))
    assert run_tool(convert, path, "--out", tmp_path / "set") == 0
    text = capsys.readouterr().out
    assert f"energy unit: {energy} (recognised: 1.0" in text
    assert f"length unit: {length} (" in text
    assert f"force unit: {energy}/{length}" in text
    assert_same_structures(load_all(tmp_path / "set"), graphs)
    provenance = load_manifest(tmp_path / "set").provenance
    assert provenance["unit_factors"]["energy"] == ENERGY_UNITS[energy]
    assert provenance["sources"][0]["file"] == "water.npz"


def test_units_that_are_given_are_taken(tmp_path: Path, make_water, run_tool, capsys) -> None:
    graphs = make_water(30)
    for graph in graphs:
        graph.energy /= ENERGY_UNITS["Hartree"]
    path = write_xyz(tmp_path / "water.xyz", graphs)
    units = ["--energy-unit", "Hartree", "--length-unit", "Angstrom", "--force-unit", "eV/Angstrom"]
    assert run_tool(convert, path, "--out", tmp_path / "set", *units) == 0
    assert "energy unit: Hartree (given)" in capsys.readouterr().out
    for graph in graphs:
        graph.energy *= ENERGY_UNITS["Hartree"]
    assert_same_structures(load_all(tmp_path / "set"), graphs)


def test_units_that_are_given_but_do_not_fit_are_warned_about(tmp_path: Path, make_water, run_tool, capsys) -> None:
    path = write_xyz(tmp_path / "water.xyz", make_water(30))
    units = ["--energy-unit", "kcal/mol", "--length-unit", "Angstrom", "--force-unit", "eV/Angstrom"]
    assert run_tool(convert, path, "--out", tmp_path / "set", *units) == 0
    assert (
        "warning: water.xyz has energies that change 0.043 times as much as the forces say" in capsys.readouterr().out
    )


def test_energies_alone_in_the_wrong_unit_are_refused(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(40)
    for graph in graphs:
        graph.energy = (graph.energy + 2078.0) / KCAL_PER_MOL_EV
    path = write_xyz(tmp_path / "water.xyz", graphs)
    with pytest.raises(
        DataError,
        match=r"units that agree; got energies that change 23 times as much as the forces say: probably .*kcal/mol. "
        r"If that is so, give --energy-unit kcal/mol",
    ):
        run_tool(convert, path, "--out", tmp_path / "set")


@pytest.mark.parametrize("unit", ["kcal/mol", "kJ/mol", "Hartree"])
def test_total_energies_in_another_unit_in_an_xyz_are_refused(tmp_path: Path, make_water, run_tool, unit: str) -> None:
    """Hartree and Hartree/Bohr change together almost as eV and eV/Å do, so that the detective lets them pass."""
    graphs = make_water(40)
    for graph in graphs:
        graph.energy /= ENERGY_UNITS[unit]
        graph.forces = graph.forces / (ENERGY_UNITS[unit] / LENGTH_UNITS["Bohr"])
    path = write_xyz(tmp_path / "water.xyz", graphs)
    message = f"must have energies in eV .*; got total energies that look like {unit} .1.0.* Give --energy-unit"
    with pytest.raises(DataError, match=message):
        run_tool(convert, path, "--out", tmp_path / "set")
    words = ["--energy-unit", unit, "--force-unit", f"{unit}/Bohr"]
    assert run_tool(convert, path, "--out", tmp_path / "set", *words) == 0


def test_energies_of_valence_electrons_in_an_xyz_are_in_ev(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(40)
    for graph in graphs:
        graph.energy += 2078.0 - 138.0  # what GFN2-xTB says of water
    path = write_xyz(tmp_path / "water.xyz", graphs)
    assert run_tool(convert, path, "--out", tmp_path / "set") == 0


def test_help_says_what_unit_dipoles_are_in(capsys) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    convert.add_arguments(parser)
    assert "Dipoles are taken as e times the length unit" in parser.format_help()


def test_lengths_in_bohr_in_an_xyz_are_refused(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(5)
    for graph in graphs:
        graph.positions = graph.positions / LENGTH_UNITS["Bohr"]
    path = write_xyz(tmp_path / "water.xyz", graphs)
    with pytest.raises(
        DataError, match=r"must have bond lengths in Å; got 1.[89]\d times the usual ones, like Bohr. Give --length"
    ):
        run_tool(convert, path, "--out", tmp_path / "set")


def test_single_atoms_do_not_tell_a_length_unit(tmp_path: Path, run_tool) -> None:
    np.savez(tmp_path / "he.npz", z=np.array([2]), R=np.arange(9.0).reshape(3, 1, 3), E=np.full(3, -79.0))
    with pytest.raises(DataError, match=r"he.npz must have bonds that tell the length unit; got single atoms"):
        run_tool(convert, tmp_path / "he.npz", "--out", tmp_path / "set")


def test_single_atoms_in_an_xyz_are_in_angstrom_by_convention(tmp_path: Path, run_tool, capsys) -> None:
    (tmp_path / "he.xyz").write_text("".join(f"1\nenergy={-79 - i}\nHe 0 0 {i}\n" for i in range(3)))
    assert run_tool(convert, tmp_path / "he.xyz", "--out", tmp_path / "set", "--split", "3,0,0") == 0
    assert "length unit: Angstrom (ASE's convention)" in capsys.readouterr().out


def write_rmd17(path: Path, graphs: list[Graph], unit: float) -> Path:
    arrays = {"nuclear_charges": graphs[0].atomic_numbers, "coords": [g.positions for g in graphs]}
    arrays |= {"energies": [g.energy / unit for g in graphs], "forces": [g.forces / unit for g in graphs]}
    np.savez(path, old_energies=arrays["energies"], **arrays)
    return path


def test_what_a_layout_documents_is_taken(tmp_path: Path, make_water, run_tool, capsys) -> None:
    graphs = make_water(40)
    for graph in graphs:
        graph.energy += 2078.0  # of no use to recognise a unit by
    path = write_rmd17(tmp_path / "rmd17_water.npz", graphs, KCAL_PER_MOL_EV)
    assert run_tool(convert, path, "--out", tmp_path / "set") == 0
    text = capsys.readouterr().out
    assert "layout: rmd17 - npz of rMD17" in text
    assert "energy unit: kcal/mol (rMD17's documentation)" in text
    assert "force unit: kcal/mol/Angstrom (rMD17's documentation)" in text
    assert "level of theory by this layout's documentation: PBE/def2-SVP" in text
    assert "licence by" not in text, "that of the data is not known by the file's layout"
    assert_same_structures(load_all(tmp_path / "set"), graphs)
    manifest = load_manifest(tmp_path / "set")
    assert (manifest.level_of_theory, manifest.licence) == ("PBE/def2-SVP", "unknown")
    assert manifest.provenance["layout"] == "rmd17"
    words = ["--level-of-theory", "PBE", "--licence", "MIT", "--energy-unit", "kcal/mol"]
    assert run_tool(convert, path, "--out", tmp_path / "given", *words) == 0
    assert "force unit: kcal/mol/Angstrom (energy unit over length unit)" in capsys.readouterr().out
    given = load_manifest(tmp_path / "given")
    assert (given.level_of_theory, given.licence) == ("PBE", "MIT")
    assert given.fingerprint == manifest.fingerprint


def test_numbers_that_contradict_the_documentation_are_refused(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(40)
    for graph in graphs:
        graph.forces = graph.forces * KCAL_PER_MOL_EV
    path = write_rmd17(tmp_path / "rmd17_water.npz", graphs, 1.0)
    with pytest.raises(
        DataError, match=r"units that agree; got energies that change 23 times as much as the forces say"
    ):
        run_tool(convert, path, "--out", tmp_path / "set")


def turn(graphs: list[Graph]) -> list[Graph]:
    return [dataclasses.replace(graph, forces=-graph.forces) for graph in graphs]


def test_gradients_are_refused_until_they_are_called_so(tmp_path: Path, make_water, run_tool, capsys) -> None:
    path, out = write_npz(tmp_path / "water.npz", turn(make_water(40))), tmp_path / "set"
    message = (
        "water.npz must have .* units that agree; got energies that fall .*: probably gradients .* give --gradients"
    )
    given = ["--energy-unit", "kcal/mol", "--force-unit", "kcal/mol/Angstrom"]
    for words in ([], given):  # units that are given say nothing about the sign
        with pytest.raises(DataError, match=message):
            run_tool(convert, path, "--out", out, *words)
    assert capsys.readouterr().out.count("probably") == 0, "said once, by the error"
    assert run_tool(convert, path, "--out", out, "--gradients") == 0
    assert (
        "force unit: kcal/mol/Angstrom (energy unit over length unit), gradients with their" in capsys.readouterr().out
    )
    assert_same_structures(load_all(out), make_water(40))
    with pytest.raises(DataError, match=r"got energies that fall .*\. Leave --gradients out"):
        run_tool(convert, write_npz(tmp_path / "a.npz", make_water(40)), "--out", tmp_path / "a", "--gradients")


def test_the_option_that_is_named_puts_it_right(tmp_path: Path, make_water, run_tool) -> None:
    graphs = [dataclasses.replace(g, forces=-g.forces / KCAL_PER_MOL_EV) for g in make_water(40)]
    path, out = write_xyz(tmp_path / "water.xyz", graphs), tmp_path / "set"
    with pytest.raises(DataError, match=r"If that is so, give (.*)\.$") as caught:
        run_tool(convert, path, "--out", out)
    options = str(caught.value).rpartition("give ")[2].removesuffix(".").split()
    assert options == ["--gradients", "--force-unit", "kcal/mol/Angstrom"]
    assert run_tool(convert, path, "--out", out, *options) == 0
    assert_same_structures(load_all(out), make_water(40))


def test_where_no_unit_explains_it_no_option_is_named(tmp_path: Path, make_water, run_tool) -> None:
    graphs = [dataclasses.replace(g, positions=3 * g.positions) for g in make_water(40)]
    path = write_xyz(tmp_path / "water.xyz", graphs)
    with pytest.raises(
        DataError, match=r"got bonds of 2\.9\d times their usual lengths.*\. Look up what the file has, and"
    ):
        run_tool(convert, path, "--out", tmp_path / "set", "--length-unit", "Angstrom")


def test_the_energy_unit_is_told_where_every_second_energy_is_missing(tmp_path: Path, make_water, run_tool) -> None:
    graphs = make_water(400)
    for graph in graphs[::2]:
        graph.energy = np.nan
    path, out = write_npz(tmp_path / "water.npz", graphs), tmp_path / "set"
    assert run_tool(convert, path, "--out", out, "--drop-faulty") == 0
    assert load_manifest(out).provenance["units"]["energy"] == "kcal/mol"
