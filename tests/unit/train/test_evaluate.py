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
from PIL import Image

from so3krates_dist.data.neighbors import build_neighbors
from so3krates_dist.errors import CheckpointError, DataError
from so3krates_dist.graph import ELEMENT_SYMBOLS, Graph, GraphBatch, collate
from so3krates_dist.metrics import METRICS_NAME, Record
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


def test_weights_in_the_loss_play_no_part(graphs: list[Graph]) -> None:
    weighted = [dataclasses.replace(g, loss_weight=0.5 * i) for i, g in enumerate(graphs)]
    assert make_batches(weighted)[1].loss_weight is not None
    assert run_evaluation(weighted) == run_evaluation(graphs)
