"""Errors of a model on labelled conformers: overall, per group and per element; exact over any number of processes.

Sums of errors (error_sums.py) are added up and reduced; weights in the loss play no part here. A structure that cannot be
computed stops the evaluation on all processes alike.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from so3krates_dist import __version__
from so3krates_dist.config import DataSection, RunConfig, read_config
from so3krates_dist.data.mixture import Mixture, open_folder
from so3krates_dist.data.shards import SPLITS, check_dataset
from so3krates_dist.data.stream import iter_batches
from so3krates_dist.distributed import Rank, choose_device, reduce_sum
from so3krates_dist.errors import CheckpointError, DataError, So3kratesError
from so3krates_dist.files import write_text
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, FloatArray, GraphBatch
from so3krates_dist.metrics import METRICS_NAME, print_table, read_metrics
from so3krates_dist.model.potential import Potential, check_elements
from so3krates_dist.model.registry import load_model, read_model_config
from so3krates_dist.train import pictures
from so3krates_dist.train.checkpoint import CONFIG_NAME
from so3krates_dist.train.error_sums import Accumulator, Errors, Evaluation, Samples, build_evaluation
from so3krates_dist.train.inputs import check_structures
from so3krates_dist.train.planning import read_record

MAX_TABLE_ROWS: Final = 30
EVALUATION_BATCH_SIZE: Final = 32


def evaluate(
    potential: Potential,
    batches: Iterable[GraphBatch],
    *,
    device: torch.device | str,
    groups: Sequence[str] = (),
    compute_stress: bool = False,
    keep_samples: bool = False,
) -> Evaluation:
    """Compare predictions with labels.

    All processes call this together, each with its own batches; all get the same result.

    Args:
        potential: The model; it is left in the mode it was in.
        batches: With labels, on the CPU.
        device: Where the model is.
        groups: Names of the groups to tell apart, the same on all processes; others are summed under `OTHER`.
        compute_stress: Compare stress too; all structures must be periodic.
        keep_samples: Keep every prediction of this process.

    Raises:
        DataError: A structure cannot be computed; raised on all processes, in its own words on the one that met it.
    """
    device = torch.device(device)
    sums = Accumulator(groups, device)
    kept: list[dict[str, FloatArray]] | None = [] if keep_samples else None
    failure: So3kratesError | None = None
    was_training = potential.training
    potential.eval()
    try:
        for batch, results in _predict(potential, batches, device, compute_stress):
            sums.add(batch, results)
            if kept is not None:
                kept.append(_keep(batch, results))
    except So3kratesError as error:  # told to all processes below: one that left alone would keep the others waiting
        failure = error
    finally:
        potential.train(was_training)
    group_sums, element_sums = _reduce(sums, failure, device)
    samples = None if kept is None else _join_samples(kept)
    return build_evaluation(sums.names, group_sums, element_sums, samples)


def _predict(
    potential: Potential, batches: Iterable[GraphBatch], device: torch.device, compute_stress: bool
) -> Iterator[tuple[GraphBatch, dict[str, torch.Tensor]]]:
    # Geometry is never coarser than float32, whatever the weights are stored in.
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in potential.parameters()) else torch.float32
    for batch in batches:
        _check_batch(batch, potential)
        on_device = batch.to(device, dtype)
        yield on_device, potential(on_device, compute_stress=compute_stress and batch.cell is not None)


def _check_batch(batch: GraphBatch, potential: Potential) -> None:
    """Raise where the model means nothing for a structure, naming the group of the first one."""
    if batch.pbc is not None and batch.cell is not None:
        for number, (pbc, cell) in enumerate(zip(batch.pbc.numpy(), batch.cell.numpy(), strict=True)):
            potential.check_box(pbc, cell, _name(batch, number))
    strangers = ~torch.isin(batch.atomic_numbers, torch.tensor(potential.elements))
    if strangers.any():
        where = _name(batch, int(batch.graph_index[strangers.nonzero()[0]]))
        check_elements(batch.atomic_numbers.tolist(), potential.elements, where)
    electrons = zip(batch.total_charge.tolist(), batch.num_unpaired_electrons.tolist(), strict=True)
    for number, (charge, unpaired) in enumerate(electrons):
        potential.check_electrons([charge], unpaired != 0, _name(batch, number))


def _name(batch: GraphBatch, number: int) -> str:
    return (batch.group[number] if batch.group else "") or "structure"


def _reduce(sums: Accumulator, failure: So3kratesError | None, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Add up over processes, in one collective that carries failures too."""
    flat = torch.cat([sums.groups.flatten(), sums.elements.flatten()]).tolist()
    failed, *flat = reduce_sum([float(failure is not None), *flat], device)
    if failure is not None:
        raise failure
    if failed:
        raise DataError("data", "be computable on all processes", "an error on another process", "See its message")
    size = sums.groups.numel()
    return np.reshape(flat[:size], tuple(sums.groups.shape)), np.reshape(flat[size:], (-1, 3))


def _keep(batch: GraphBatch, results: Mapping[str, torch.Tensor]) -> dict[str, FloatArray]:
    def to_numpy(tensor: torch.Tensor | None, like: torch.Tensor) -> FloatArray:
        return np.asarray((torch.full(like.shape, math.nan) if tensor is None else tensor).double().cpu().numpy())

    per_atom = results["forces"][:, 0]
    return {
        "num_atoms": to_numpy(batch.num_atoms, batch.num_atoms),
        "atomic_numbers": to_numpy(batch.atomic_numbers, batch.atomic_numbers),
        "energy": to_numpy(batch.energy, results["energy"]),
        "energy_predicted": to_numpy(results["energy"], results["energy"]),
        "forces": to_numpy(batch.forces, results["forces"]),
        "forces_predicted": to_numpy(results["forces"], results["forces"]),
        "charges": to_numpy(batch.partial_charges, per_atom),
        "charges_predicted": to_numpy(results.get("partial_charges"), per_atom),
    }


def _join_samples(kept: Sequence[Mapping[str, FloatArray]]) -> Samples:
    tails = {"forces": (3,), "forces_predicted": (3,)}

    def join(name: str) -> FloatArray:
        return np.concatenate([np.zeros((0, *tails.get(name, ()))), *(k[name] for k in kept)])

    return Samples(
        num_atoms=join("num_atoms"),
        atomic_numbers=join("atomic_numbers"),
        energy=(join("energy"), join("energy_predicted")),
        forces=(join("forces"), join("forces_predicted")),
        partial_charges=(join("charges"), join("charges_predicted")),
    )


# -------------------------------------------------------------------------------------------------------- a run's evaluation


def evaluate_run(
    folder: Path, *, split: str = "test", dataset: Path | str | None = None, device: torch.device | str = "cpu"
) -> Evaluation:
    """Evaluate a run's model and write the results into the run folder.

    Writes `evaluation/<split>.json`, `parity_energy.png`, `parity_forces.png`, `parity_partial_charges.png` (as far as
    there are labels) and `learning_curve.png`; for other data than the run's own into `evaluation/<name of the data folder>/`.

    Args:
        folder: Run folder, or with a data set any folder with a model.
        split: `train`, `validation` or `test`.
        dataset: Data set, a folder or an address; None: those that the run was trained on.
        device: Where to compute.

    Raises:
        CheckpointError: The folder is no run, or holds no model yet.
        DataError: The data are damaged, hold nothing to evaluate or elements that the model does not know.
    """
    data = _open_data(folder, dataset)
    _check_split(data, split)
    potential = load_model(folder, device=device)
    for note in potential.describe_limits(check_structures(data, split, potential)):
        print(f"note: {note}")
    if "energy" in data.labels and not any(potential.statistics.energy_baselines.values()):
        print("note: the model has no energy baselines: its energies are relative to no reference")
    batches = iter_batches(data, split, batch_size=EVALUATION_BATCH_SIZE, cutoffs=potential.cutoffs)
    evaluation = evaluate(
        potential,
        batches,
        device=device,
        groups=data.groups,
        compute_stress="stress" in data.labels,
        keep_samples=True,
    )
    _write_results(folder, find_target(folder, dataset), evaluation, data, split)
    return evaluation


def _open_data(folder: Path, dataset: Path | str | None) -> Mixture:
    """Open a data set as it is, or all those of a run with energies on the scale of its model."""
    record = read_record(folder)
    reference = record.reference if record else None
    if dataset is None:
        config = _read_run_config(folder)
        section, model = config.data, config.model
    else:
        section, model = DataSection(folder=str(dataset)), read_model_config(folder)[0]
    for location in section.sources:
        if "://" not in location:
            check_dataset(Path(location))
        if dataset and reference and not reference.knows(open_folder(location, section).manifest):
            reference = None  # energies of another level of theory are compared as they are
    return Mixture.open(section, model, reference)


def find_target(folder: Path, dataset: Path | str | None) -> Path:
    """Return where the results on a data set go; None: the one that the run was trained on."""
    own = _read_run_config(folder).data.sources if (folder / CONFIG_NAME).is_file() else ()
    if dataset is None or (len(own) == 1 and Path(own[0]).resolve() == Path(dataset).resolve()):
        return folder / "evaluation"
    return folder / "evaluation" / Path(dataset).resolve().name


def _read_run_config(folder: Path) -> RunConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        remedy = "Give a folder that `so3krates train` made, or data with --data"
        raise CheckpointError(str(folder), f"be a run folder with {CONFIG_NAME}", "none", remedy)
    return read_config(path)


def _check_split(data: Mixture, split: str) -> None:
    if not data.num_conformers(split):
        counts = ", ".join(f"{s}: {data.num_conformers(s)}" for s in SPLITS)
        where = " + ".join(s.location for s in data.active)
        raise DataError(f"{where} split `{split}`", "hold conformers", counts, "Choose another split with --split")


def _write_results(folder: Path, target: Path, evaluation: Evaluation, data: Mixture, split: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    content = {
        "version": __version__,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "split": split},
        "level_of_theory": data.level_of_theory,
        "units": {
            "energy": "eV/atom", "forces": "eV/Angstrom", "stress": "eV/Angstrom^3", "dipole": "e Angstrom",
            "partial_charges": "e", "hirshfeld_ratios": "1",
        },
        **evaluation.to_json(),
    }  # fmt: skip
    write_text(target / f"{split}.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    assert evaluation.samples is not None
    _draw_parities(evaluation.samples, data, target, f"{data.name}, {split} split")
    metrics = folder / METRICS_NAME
    if metrics.is_file():
        pictures.plot_learning_curve(
            read_metrics(metrics), folder / "evaluation" / "learning_curve.png", folder.resolve().name
        )


def _draw_parities(samples: Samples, data: Mixture, target: Path, subtitle: str) -> None:
    """Draw the parities of the labels that there are."""
    baselines = np.zeros(MAX_ATOMIC_NUMBER + 1)
    for atomic_number, energy in data.statistics["energy_baselines"].items():
        baselines[int(atomic_number)] = energy
    first_atoms = np.concatenate([[0], np.cumsum(samples.num_atoms)[:-1]]).astype(np.int64)
    offsets = np.add.reduceat(baselines[samples.atomic_numbers.astype(np.int64)], first_atoms)
    label, predicted = ((e - offsets) / samples.num_atoms for e in samples.energy)
    labelled = np.flatnonzero(np.isfinite(label))
    if labelled.size:
        pictures.plot_parity_energy(label[labelled], predicted[labelled], target / "parity_energy.png", subtitle)
    labelled = np.flatnonzero(np.isfinite(samples.forces[0]).all(1))
    if labelled.size:
        forces, forces_predicted = (f[labelled] for f in samples.forces)
        pictures.plot_parity_forces(forces, forces_predicted, target / "parity_forces.png", subtitle)
    labelled = np.flatnonzero(np.isfinite(samples.partial_charges[0]))
    charges, charges_predicted = (q[labelled] for q in samples.partial_charges)
    if not np.isnan(charges_predicted).all():  # of no atom at all is what a model without charges gives
        pictures.plot_parity_charges(charges, charges_predicted, target / "parity_partial_charges.png", subtitle)


# ------------------------------------------------------------------------------------------------------------------ the verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `so3krates evaluate`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which conformers (default: test)")
    parser.add_argument("--data", metavar="FOLDER", help="another data set than the run's own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the tables, return the exit code."""
    folder: Path = arguments.run_folder
    device = choose_device(arguments.device, Rank())
    evaluation = evaluate_run(folder, split=arguments.split, dataset=arguments.data, device=device)
    print_evaluation(evaluation, f"{folder}, {arguments.split} split")
    print(f"written to {find_target(folder, arguments.data)}")
    return 0


def print_evaluation(evaluation: Evaluation, title: str) -> None:
    """Print errors per group and per element, the largest first where there are many groups."""
    columns = ("group", "conformers", "E MAE meV/atom", "E RMSE", "F MAE meV/Å", "F RMSE")
    groups = sorted(evaluation.per_group.items())
    if len(groups) > MAX_TABLE_ROWS:
        groups = sorted(groups, key=lambda item: -np.nan_to_num(item[1].forces.mae))[:MAX_TABLE_ROWS]
        title += f" (the {MAX_TABLE_ROWS} groups of {len(evaluation.per_group)} with the largest force error)"
    rows = [(name or "(no name)", errors) for name, errors in groups if len(evaluation.per_group) > 1]
    print_table(title, columns, [_format_row(name, errors) for name, errors in [*rows, ("all", evaluation.overall)]])
    elements = [
        (symbol, f"{sums.count / 3:.0f}", f"{1e3 * sums.mae:.1f}", f"{1e3 * sums.rmse:.1f}")
        for symbol, sums in evaluation.per_element.items()
    ]
    if elements:
        print_table("Forces by element", ("element", "atoms", "F MAE meV/Å", "F RMSE"), elements)
    overall = evaluation.overall
    labels = {
        "dipole (me Å)": overall.dipole, "partial charge (me)": overall.partial_charges,
        "Hirshfeld ratio (1e-3)": overall.hirshfeld_ratios,
    }  # fmt: skip
    further = [(n, f"{s.count:.0f}", f"{1e3 * s.mae:.2f}", f"{1e3 * s.rmse:.2f}") for n, s in labels.items() if s.count]
    if further:
        print_table("Further labels", ("label", "numbers", "MAE", "RMSE"), further)
    missing = evaluation.overall.num_conformers - round(evaluation.overall.energy.count)
    if missing:
        print(f"{missing} of {evaluation.overall.num_conformers} conformers have no energy label")


def _format_row(name: str, errors: Errors) -> tuple[str, ...]:
    energy, forces = errors.energy, errors.forces
    figures = [f"{1e3 * v:.2f}" for v in (energy.mae, energy.rmse)] + [
        f"{1e3 * v:.1f}" for v in (forces.mae, forces.rmse)
    ]
    return (name, str(errors.num_conformers), *("-" if f == "nan" else f for f in figures))
