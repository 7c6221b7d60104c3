"""Errors are exact, over groups, elements, missing labels and processes; the run's files are written."""

import argparse
import dataclasses
import json
import math
import multiprocessing
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from analytic import label, make_cluster, make_morse, make_run, write_dataset
from ase.data import atomic_masses
from PIL import Image

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
from so3krates_dist.errors import CheckpointError, DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, Graph, GraphBatch, collate
from so3krates_dist.metrics import METRICS_NAME, Record
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.registry import build_model, save_model
from so3krates_dist.train import evaluate as module
from so3krates_dist.train.error_sums import OTHER, ErrorSums, Evaluation
from so3krates_dist.train.evaluate import evaluate, evaluate_run, print_evaluation

GROUPS = ("large", "small")


def make_graphs(count: int = 9) -> list[Graph]:
    """Return structures whose labels differ from the Morse potential's by known random numbers."""
    graphs = []
    for seed in range(count):
        size, group = ((7, "large"), (3, "small"), (5, "third"))[seed % 3]
        graph = label(make_cluster(seed, size, group))
        rng = np.random.default_rng(100 + seed)
        assert graph.energy is not None
        assert graph.forces is not None
        energy, forces = graph.energy + rng.normal(scale=0.2), graph.forces + rng.normal(scale=0.1, size=(size, 3))
        graphs.append(dataclasses.replace(graph, energy=energy, forces=forces))
    return graphs


def make_batches(graphs: Sequence[Graph], size: int = 2) -> list[GraphBatch]:
    parts = [graphs[i : i + size] for i in range(0, len(graphs), size)]
    return [collate([build_neighbors(g, 6.0) for g in part], torch.float64) for part in parts]


def compute_expected(graphs: Sequence[Graph]) -> dict[str, float]:
    """The definition, in numpy."""
    energy, forces = [], []
    for graph in graphs:
        exact = label(graph)
        energy.append((exact.energy - graph.energy) / graph.num_atoms)
        forces.append((exact.forces - graph.forces).ravel())
    e, f = np.array(energy), np.concatenate(forces)
    return {
        "energy_mae_per_atom": np.abs(e).mean(),
        "energy_rmse_per_atom": np.sqrt((e**2).mean()),
        "forces_mae": np.abs(f).mean(),
        "forces_rmse": np.sqrt((f**2).mean()),
    }


@pytest.fixture(scope="module")
def graphs() -> list[Graph]:
    return make_graphs()


def run_evaluation(graphs: Sequence[Graph], **options: object) -> Evaluation:
    options = {"device": "cpu", "groups": GROUPS, **options}
    return evaluate(make_morse().double(), make_batches(graphs), **options)  # type: ignore[arg-type]


def test_summary_is_the_definition(graphs: list[Graph]) -> None:
    evaluation = run_evaluation(graphs)
    assert evaluation.summary() == pytest.approx(compute_expected(graphs), rel=1e-6)
    assert evaluation.overall.num_conformers == 9


def test_groups_are_told_apart(graphs: list[Graph]) -> None:
    evaluation = run_evaluation(graphs)
    assert list(evaluation.per_group) == ["large", "small", OTHER]
    for row, name in (("large", "large"), ("small", "small"), (OTHER, "third")):
        expected = compute_expected([g for g in graphs if g.group == name])
        errors = evaluation.per_group[row]
        assert errors.num_conformers == 3
        assert errors.energy.mae == pytest.approx(expected["energy_mae_per_atom"], rel=1e-6)
        assert errors.energy.rmse == pytest.approx(expected["energy_rmse_per_atom"], rel=1e-6)
        assert errors.forces.mae == pytest.approx(expected["forces_mae"], rel=1e-6)
        assert errors.forces.rmse == pytest.approx(expected["forces_rmse"], rel=1e-6)


def test_elements_are_told_apart(graphs: list[Graph]) -> None:
    evaluation = run_evaluation(graphs)
    assert list(evaluation.per_element) == ["Ne", "Ar"]
    for symbol, sums in evaluation.per_element.items():
        z = ELEMENT_SYMBOLS.index(symbol)
        errors = np.concatenate([(label(g).forces - g.forces)[g.atomic_numbers == z].ravel() for g in graphs])
        assert sums.count == len(errors)
        assert sums.mae == pytest.approx(np.abs(errors).mean(), rel=1e-6)


def test_batches_change_nothing(graphs: list[Graph]) -> None:
    singles = evaluate(make_morse().double(), make_batches(graphs, 1), device="cpu", groups=GROUPS)
    together = evaluate(make_morse().double(), make_batches(graphs, 9), device="cpu", groups=GROUPS)
    assert singles.summary() == pytest.approx(together.summary(), rel=1e-12)


def test_missing_labels_are_left_out_and_counted(graphs: list[Graph]) -> None:
    without = [
        dataclasses.replace(g, energy=None if i == 0 else g.energy, forces=None if i == 1 else g.forces)
        for i, g in enumerate(graphs)
    ]
    evaluation = run_evaluation(without)
    assert evaluation.overall.num_conformers == 9
    assert evaluation.overall.energy.count == 8
    assert evaluation.overall.energy.mae == pytest.approx(compute_expected(graphs[1:])["energy_mae_per_atom"], rel=1e-6)
    kept = [g for i, g in enumerate(graphs) if i != 1]
    assert evaluation.overall.forces.mae == pytest.approx(compute_expected(kept)["forces_mae"], rel=1e-6)


def test_no_labels_at_all_give_nan_and_null(graphs: list[Graph]) -> None:
    evaluation = run_evaluation([dataclasses.replace(g, energy=None, forces=None) for g in graphs])
    assert all(math.isnan(v) for v in evaluation.summary().values())
    content = json.dumps(evaluation.to_json(), allow_nan=False)
    assert json.loads(content)["summary"]["forces_mae"] is None


def test_prediction_of_nan_shows(graphs: list[Graph]) -> None:
    potential = make_morse()
    torch.nn.init.constant_(potential.network.depth, math.nan)
    evaluation = evaluate(potential, make_batches(graphs), device="cpu")
    assert math.isnan(evaluation.summary()["forces_mae"])


def test_stress_of_periodic_structures() -> None:
    rng = np.random.default_rng(0)
    graphs, errors = [], []
    for seed in range(4):
        graph = dataclasses.replace(make_cluster(seed), cell=8.0 * np.eye(3), pbc=np.ones(3, bool))
        exact = label(graph)
        errors.append(rng.normal(scale=0.01, size=(3, 3)))
        graphs.append(dataclasses.replace(exact, stress=None if seed == 3 else exact.stress + errors[-1]))
    assert "stress_mae" not in run_evaluation(graphs).summary()
    evaluation = run_evaluation(graphs, compute_stress=True)
    assert evaluation.overall.stress.count == 27
    assert evaluation.summary()["stress_mae"] == pytest.approx(np.abs(errors[:3]).mean(), rel=1e-5)
    assert evaluation.summary()["stress_rmse"] == pytest.approx(np.sqrt(np.square(errors[:3]).mean()), rel=1e-5)


def test_samples_are_kept_in_order(graphs: list[Graph]) -> None:
    samples = run_evaluation(graphs, keep_samples=True).samples
    assert samples is not None
    np.testing.assert_array_equal(samples.num_atoms, [g.num_atoms for g in graphs])
    np.testing.assert_array_equal(samples.energy[0], [g.energy for g in graphs])
    np.testing.assert_allclose(samples.energy[1], [label(g).energy for g in graphs], rtol=1e-12)
    np.testing.assert_array_equal(samples.forces[0], np.concatenate([g.forces for g in graphs]))
    np.testing.assert_allclose(samples.forces[1], np.concatenate([label(g).forces for g in graphs]), atol=1e-6)
    assert run_evaluation(graphs).samples is None
    empty = evaluate(make_morse(), [], device="cpu", keep_samples=True)
    assert empty.samples is not None
    assert empty.samples.forces[0].shape == (0, 3)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_left(graphs: list[Graph], training: bool) -> None:
    potential = make_morse().train(training)
    evaluate(potential, make_batches(graphs[:1]), device="cpu")
    assert potential.training == training


def test_unknown_element_is_refused(graphs: list[Graph]) -> None:
    stranger = dataclasses.replace(graphs[0], atomic_numbers=np.full(7, 36), group="krypton")
    with pytest.raises(DataError, match=r"krypton must have only elements the model was trained on \(Ne, Ar\); got Kr"):
        evaluate(make_morse(), make_batches([*graphs, stranger]), device="cpu")


def test_sums_of_nothing_are_nan() -> None:
    assert math.isnan(ErrorSums().mae)
    assert math.isnan(ErrorSums().rmse)


# ------------------------------------------------------------------------------------------------------------- two processes


PARTS = (((0, 3, 4, 5, 6, 7, 8), (1, 2)), ((0, 1, 2), (3, -1)))  # -1: a structure with an unknown element


def _evaluate_parts(rank: int, store: str, answers) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        graphs = make_graphs()
        graphs.append(dataclasses.replace(graphs[0], atomic_numbers=np.full(7, 36), group="krypton"))
        results: list[object] = []
        for part in PARTS:
            batches = make_batches([graphs[i] for i in part[rank]])
            try:
                results.append(evaluate(make_morse().double(), batches, device="cpu", groups=GROUPS).to_json())
            except DataError as error:
                results.append(str(error))
        answers.put((rank, results))
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, (traceback.format_exc(), None)))
        raise


def test_two_processes_give_what_one_gives_and_fail_together(tmp_path: Path, graphs: list[Graph]) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=_evaluate_parts, args=(r, str(tmp_path / "store"), answers)) for r in range(2)]
    for process in processes:
        process.start()
    got = dict(answers.get(timeout=120) for _ in range(2))
    for process in processes:
        process.join(60)
    (first, first_failure), (second, second_failure) = got[0], got[1]
    assert first == second
    expected = run_evaluation(graphs).to_json()
    assert first["summary"] == pytest.approx(expected["summary"], rel=1e-12)
    assert first["groups"].keys() == expected["groups"].keys()
    for symbol, sums in expected["elements"].items():
        assert first["elements"][symbol] == pytest.approx(sums, rel=1e-12)
    assert (
        first_failure == "data must be computable on all processes; got an error on another process. See its message."
    )
    assert second_failure.startswith("krypton must have only elements the model was trained on (Ne, Ar); got Kr.")


# -------------------------------------------------------------------------------------------------------------- a run's files


def make_dataset(folder: Path, graphs: Sequence[Graph]) -> Path:
    return write_dataset(folder, {"train": graphs[:5], "test": graphs[5:]})


@pytest.fixture
def run_folder(tmp_path: Path, graphs: list[Graph]) -> Path:
    folder = make_run(tmp_path / "run", make_dataset(tmp_path / "data", graphs))
    record = Record(folder / METRICS_NAME)
    for step in (10, 20):
        record.append("train", step, {"forces_mae": 1 / step, "energy_mae_per_atom": 0.1 / step})
    return folder


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def test_run_is_evaluated_and_written(run_folder: Path, graphs: list[Graph]) -> None:
    evaluation = evaluate_run(run_folder)
    assert evaluation.overall.num_conformers == 4
    content = json.loads((run_folder / "evaluation/test.json").read_text())
    assert content["summary"]["forces_mae"] == evaluation.summary()["forces_mae"]
    assert content["data"]["split"] == "test"
    assert len(content["data"]["fingerprint"]) == 16
    names = sorted(p.name for p in (run_folder / "evaluation").iterdir())
    assert names == ["learning_curve.png", "parity_energy.png", "parity_forces.png", "test.json"]
    for name in names[:3]:
        with Image.open(run_folder / "evaluation" / name) as picture:
            assert picture.size[0] >= 700
    assert evaluate_run(run_folder, split="train").overall.num_conformers == 5


def test_other_data_go_to_a_folder_of_their_own(run_folder: Path, tmp_path: Path, graphs: list[Graph]) -> None:
    other = make_dataset(tmp_path / "other", graphs[:8])
    assert evaluate_run(run_folder, dataset=other).overall.num_conformers == 3
    assert (run_folder / "evaluation/other/test.json").is_file()
    assert (run_folder / "evaluation/other/parity_forces.png").is_file()
    assert not (run_folder / "evaluation/test.json").exists()


def test_a_model_without_a_run_needs_data(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "config.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"must be a run folder with config\.yaml; got none\. .* or data with --data"
    ):
        evaluate_run(run_folder)
    assert evaluate_run(run_folder, dataset=tmp_path / "data").overall.num_conformers == 4
    assert (run_folder / "evaluation/data/test.json").is_file()


def test_data_without_energies_have_no_energy_picture(run_folder: Path, tmp_path: Path, graphs: list[Graph]) -> None:
    other = make_dataset(tmp_path / "other", [dataclasses.replace(g, energy=None) for g in graphs])
    evaluate_run(run_folder, dataset=other)
    assert not (run_folder / "evaluation/other/parity_energy.png").exists()
    assert (run_folder / "evaluation/other/parity_forces.png").is_file()


def test_bad_requests_are_refused(run_folder: Path, tmp_path: Path, graphs: list[Graph]) -> None:
    with pytest.raises(
        DataError, match="split `validation` must hold conformers; got train: 5, validation: 0, test: 4"
    ):
        evaluate_run(run_folder, split="validation")
    with pytest.raises(CheckpointError, match=r"must be a run folder with config\.yaml; got none"):
        evaluate_run(tmp_path / "data")
    with pytest.raises(DataError, match=r"must hold a manifest\.json"):
        evaluate_run(run_folder, dataset=tmp_path / "nowhere")
    stranger = dataclasses.replace(graphs[0], atomic_numbers=np.full(7, 36), group="krypton")
    other = write_dataset(tmp_path / "other", {"train": graphs, "test": [*graphs, stranger]})
    with pytest.raises(DataError, match=r"test-000000\.tar:test-000000-000002 must have only elements .*; got Kr"):
        evaluate_run(run_folder, dataset=other)
    assert not (run_folder / "evaluation").exists()


def test_verb_prints_the_tables(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.run(parse(run_folder, "--device", "cpu")) == 0
    output = capsys.readouterr().out
    for text in ("large", "small", "third", "all", "Forces by element", "Ar", "meV/Å", str(run_folder / "evaluation")):
        assert text in output


def test_many_groups_show_the_worst(graphs: list[Graph], capsys: pytest.CaptureFixture[str]) -> None:
    named = [dataclasses.replace(graphs[i % 9], group=f"molecule{i:02d}") for i in range(40)]
    worst = dataclasses.replace(named[7], forces=100 + np.asarray(named[7].forces))
    evaluation = run_evaluation([*named[:7], worst, *named[8:]], groups=[g.group for g in named])
    print_evaluation(evaluation, "Errors")
    lines = capsys.readouterr().out.splitlines()
    assert "the 30 groups of 40 with the largest force error" in lines[0]
    assert lines[2].split()[0] == "molecule07"
    assert lines[32].split()[0] == "all"


def test_missing_energies_are_told(graphs: list[Graph], capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(run_evaluation([dataclasses.replace(g, energy=None) for g in graphs]), "Errors")
    output = capsys.readouterr().out
    assert "9 of 9 conformers have no energy label" in output
    assert "nan" not in output


# --------------------------------------------------------------------------------------------------- models of other kinds

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


def test_weights_in_the_loss_play_no_part(graphs: list[Graph]) -> None:
    weighted = [dataclasses.replace(g, loss_weight=0.5 * i) for i, g in enumerate(graphs)]
    assert make_batches(weighted)[1].loss_weight is not None
    assert run_evaluation(weighted) == run_evaluation(graphs)


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
