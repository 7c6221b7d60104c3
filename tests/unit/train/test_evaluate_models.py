"""Evaluation of models with outputs of their own, of structures that a model does not see, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import make_morse, write_dataset
from ase.data import atomic_masses
from PIL import Image
from test_evaluate import make_graphs, parse

from so3krates_dist.config import (
    DataSection,
    GeomAttSection,
    ModelSection,
    RunConfig,
    RunSection,
    So3lrSection,
    dump_config,
)
from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph, collate
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train import evaluate as module
from so3krates_dist.train.evaluate import evaluate, evaluate_run

SO3LR = So3lrSection(num_features=16, num_layers=1, num_heads=2, degrees=(1, 2), num_radial_basis=4)
STATISTICS = ModelStatistics(elements=(10, 18), energy_baselines={}, energy_scale=1.0, mean_neighbors=6.0)


def make_so3lr() -> Potential:
    torch.manual_seed(0)
    return build_model(SO3LR, STATISTICS).double().eval()


def make_ions() -> list[Graph]:
    """Return structures with dipoles about their centres of mass and Hirshfeld ratios."""
    rng = np.random.default_rng(1)
    return [
        dataclasses.replace(
            graph,
            total_charge=float(number % 2),
            dipole=rng.normal(size=3),
            hirshfeld_ratios=rng.uniform(0.6, 1.0, graph.num_atoms),
        )
        for number, graph in enumerate(make_graphs(4))
    ]


def test_partial_charges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compared atom by atom where there are labels; in the file, the table and a picture."""
    ions, rng = make_ions(), np.random.default_rng(5)
    for ion in ions[:3]:
        ion.partial_charges = rng.normal(size=ion.num_atoms).astype(np.float32)
    potential = make_so3lr()
    errors = []
    for ion in ions[:3]:
        outputs = potential(collate([build_neighbors(ion, *potential.cutoffs)], torch.float64))
        errors.append(outputs["partial_charges"].detach().numpy() - ion.partial_charges)
    expected = np.concatenate(errors)
    batches = [collate([build_neighbors(g, *potential.cutoffs) for g in ions], torch.float64)]
    evaluation = evaluate(potential, batches, device="cpu", keep_samples=True)
    assert evaluation.overall.partial_charges.count == len(expected)
    assert evaluation.summary()["partial_charges_mae"] == pytest.approx(np.abs(expected).mean(), rel=1e-9)
    assert evaluation.summary()["partial_charges_rmse"] == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-9)
    assert evaluation.samples is not None
    labels, predicted = evaluation.samples.partial_charges
    np.testing.assert_allclose((predicted - labels)[: len(expected)], expected, rtol=1e-9)
    assert np.isnan(labels[len(expected) :]).all()
    without = evaluate(make_morse().double(), batches, device="cpu", keep_samples=True)
    assert "partial_charges_mae" not in without.summary(), "it has no such output"
    assert without.samples is not None
    assert np.isnan(without.samples.partial_charges[1]).all()

    data = write_dataset(tmp_path / "data", {"train": ions, "test": ions})
    run = save_run(tmp_path / "run", data, SO3LR, STATISTICS)
    assert module.run(parse(run, "--device", "cpu")) == 0
    assert "partial charge (me)" in capsys.readouterr().out
    content = json.loads((run / "evaluation/test.json").read_text())
    assert content["units"]["partial_charges"] == "e"
    assert content["summary"]["partial_charges_mae"] > 0
    with Image.open(run / "evaluation/parity_partial_charges.png") as picture:
        assert picture.size[0] > 100
    other = save_run(tmp_path / "other", data, GeomAttSection(num_layers=1, num_features=8, inner_width=8), STATISTICS)
    assert module.run(parse(other, "--device", "cpu")) == 0
    assert not (other / "evaluation/parity_partial_charges.png").exists()


def test_dipoles_and_hirshfeld_ratios() -> None:
    ions = make_ions()
    ions[3].hirshfeld_ratios = None
    potential = make_so3lr()
    dipole_errors, ratio_errors = [], []
    for ion in ions:
        output = {
            k: v.numpy()
            for k, v in potential(collate([build_neighbors(ion, *potential.cutoffs)], torch.float64)).items()
        }
        masses = atomic_masses[ion.atomic_numbers]
        centre = masses @ ion.positions / masses.sum()
        dipole_errors.append(output["partial_charges"] @ (ion.positions - centre) - ion.dipole)
        if ion.hirshfeld_ratios is not None:
            ratio_errors.append(output["hirshfeld_ratios"] - ion.hirshfeld_ratios)
    batches = [
        collate([build_neighbors(g, *potential.cutoffs) for g in part], torch.float64) for part in (ions[:1], ions[1:])
    ]
    evaluation = evaluate(potential, batches, device="cpu")
    errors, ratios = np.concatenate(dipole_errors), np.concatenate(ratio_errors)
    assert evaluation.overall.dipole.count == 12
    assert evaluation.overall.hirshfeld_ratios.count == len(ratios)
    summary = evaluation.summary()
    assert summary["dipole_mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-9)
    assert summary["dipole_rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-9)
    assert summary["hirshfeld_ratios_mae"] == pytest.approx(np.abs(ratios).mean(), rel=1e-9)
    assert "dipole_mae" not in evaluate(make_morse().double(), batches, device="cpu").summary(), "it has no such output"


def save_run(folder: Path, dataset: Path, section: ModelSection, statistics: ModelStatistics) -> Path:
    config = RunConfig(run=RunSection(folder=str(folder)), data=DataSection(folder=str(dataset)), model=section)
    torch.manual_seed(0)
    save_model(folder, section, statistics, build_model(section, statistics).state_dict(), {"step": 0})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


def test_verb_shows_further_labels_and_what_the_model_ignores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", {"train": make_ions(), "test": make_ions()})
    run = save_run(tmp_path / "run", data, SO3LR, STATISTICS)
    assert module.run(parse(run, "--device", "cpu")) == 0
    output = capsys.readouterr().out
    assert "dipole (me Å)" in output
    assert "Hirshfeld ratio" in output
    assert "does not see" not in output
    content = json.loads((run / "evaluation/test.json").read_text())
    assert content["overall"]["dipole"]["count"] == 12
    assert content["units"]["dipole"] == "e Angstrom"
    other = save_run(tmp_path / "other", data, GeomAttSection(num_layers=1, num_features=8, inner_width=8), STATISTICS)
    assert module.run(parse(other, "--device", "cpu")) == 0
    output = capsys.readouterr().out
    assert output.count("note: there are total charges, which this model does not see") == 1
    assert "dipole" not in output


def test_verb_notes_charged_crystals_where_electrostatics_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "note: there are charged periodic structures, whose energies depend on where"
    boxed = [dataclasses.replace(g, cell=20 * np.eye(3), pbc=np.ones(3, bool)) for g in make_ions()]
    neutral = [dataclasses.replace(g, total_charge=0.0) for g in boxed]
    for name, graphs, count in (("ions", make_ions(), 0), ("boxed", boxed, 1), ("mixed", [*make_ions(), *neutral], 0)):
        data = write_dataset(tmp_path / name, {"train": graphs, "test": graphs})
        run = save_run(tmp_path / f"run-{name}", data, SO3LR, STATISTICS)
        assert module.run(parse(run, "--device", "cpu")) == 0
        assert capsys.readouterr().out.count(note) == count, name


def test_what_a_model_means_nothing_for_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "evaluate", None)
    radicals = [dataclasses.replace(g, num_unpaired_electrons=float(n == 3)) for n, g in enumerate(make_ions())]
    data = write_dataset(tmp_path / "radicals", {"train": radicals[:3], "test": radicals})
    run = save_run(tmp_path / "run", data, SO3LR, STATISTICS)
    with pytest.raises(
        DataError, match=r"test-000000\.tar:test-000000-000000 must have no unpaired electrons: .* never trained"
    ):
        evaluate_run(run)
    boxes = [dataclasses.replace(g, cell=20 * np.eye(3), pbc=np.ones(3, bool)) for g in make_ions()]
    data = write_dataset(tmp_path / "boxes", {"train": boxes, "test": boxes})
    section = GeomAttSection(num_layers=1, num_features=8, inner_width=8)
    run = save_run(tmp_path / "geomatt", data, section, STATISTICS)
    with pytest.raises(
        DataError, match=r"test-000000-000000 must be a molecule for this model; got a periodic structure"
    ):
        evaluate_run(run)


def test_ions_are_refused_where_the_model_saw_none(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "ions", {"train": make_ions(), "test": make_ions()})
    run = save_run(tmp_path / "run", dataset, SO3LR, dataclasses.replace(STATISTICS, charge_signs=(-1,)))
    with pytest.raises(DataError, match="have no positive charge: the model saw no structure with one"):
        evaluate_run(run)
    potential = build_model(SO3LR, dataclasses.replace(STATISTICS, charge_signs=(-1,))).eval()
    batch = collate([build_neighbors(g, *potential.cutoffs) for g in make_ions()])
    with pytest.raises(DataError, match="no positive charge"):
        evaluate(potential, [batch], device="cpu")


def test_verb_says_where_results_are_and_that_energies_have_no_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        write_dataset(tmp_path / name, {"train": make_ions(), "test": make_ions()}) for name in ("ions", "other")
    ]
    run = save_run(tmp_path / "run", folders[0], SO3LR, STATISTICS)
    module.run(parse(run, "--device", "cpu", "--data", folders[1]))
    assert f"written to {run / 'evaluation' / 'other'}\n" in (printed := capsys.readouterr().out)
    assert "note: the model has no energy baselines" in printed
    save_run(run, folders[0], SO3LR, dataclasses.replace(STATISTICS, energy_baselines={18: 1.0}))
    module.run(parse(run, "--device", "cpu"))
    printed = capsys.readouterr().out
    assert (printed.endswith(f"\nwritten to {run / 'evaluation'}\n"), "baselines" in printed) == (True, False)


def test_batches_that_a_model_means_nothing_for() -> None:
    potential = make_so3lr()
    radical = dataclasses.replace(make_ions()[0], num_unpaired_electrons=2.0, group="radical")
    batch = collate([build_neighbors(g, *potential.cutoffs) for g in (make_ions()[1], radical)], torch.float64)
    with pytest.raises(DataError, match="radical must have no unpaired electrons"):
        evaluate(potential, [batch], device="cpu")
    box = dataclasses.replace(make_graphs(1)[0], cell=20 * np.eye(3), pbc=np.ones(3, bool), group="box")
    geomatt = build_model(GeomAttSection(num_layers=1, num_features=8, inner_width=8), STATISTICS)
    batch = collate([build_neighbors(g, 6.0) for g in (make_graphs(1)[0], box)])
    with pytest.raises(DataError, match="box must be a molecule for this model"):
        evaluate(geomatt, [batch], device="cpu")
