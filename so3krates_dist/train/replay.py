"""`so3krates replay RUN STEP`: computes a stored step again, and says what was wrong with it.

The step is repeated as it was, batch by batch, in float32 and in float64 (and in bf16-mixed where the run was trained so), in one
process and without DeepSpeed. Then each conformer is computed by itself: its share of the loss, its errors, and what of it
is not finite. The findings go to the terminal and, all of them, to `replay.json` beside the step.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from so3krates_dist import __version__
from so3krates_dist.config import RunConfig, TrainSection, read_config
from so3krates_dist.distributed import Rank, choose_device
from so3krates_dist.errors import CheckpointError
from so3krates_dist.files import write_text
from so3krates_dist.graph import GraphBatch, compute_formula
from so3krates_dist.metrics import print_table
from so3krates_dist.model.potential import Potential, check_elements, compute_vectors
from so3krates_dist.model.registry import build_model
from so3krates_dist.train.guard import Verdict
from so3krates_dist.train.losses import LABELS, compute_loss
from so3krates_dist.train.stored_step import (
    FIELDS,
    WEIGHTS_NAME,
    StepFacts,
    StoredStep,
    read_step,
    to_plain_numbers,
)

RESULT_NAME: Final = "replay.json"
FORMAT: Final = 1
"""Version of `replay.json`"""

_MAX_ROWS: Final = 20
_STRUCTURE: Final = ("positions", "cell", "pair_shifts", "total_charge", "num_unpaired_electrons", "loss_weight")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """A loss and its gradient."""

    loss: float
    gradient_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether both are."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConformerFindings:
    """What one conformer does by itself."""

    number: int
    """through all processes and passes of the step, from 0"""
    rank: int
    passed: int
    """number of the pass"""
    group: str
    formula: str
    num_atoms: int
    closest: float
    """Å, shortest distance of two atoms that are neighbours; infinity where none are"""
    faults: tuple[str, ...]
    """parts of the structure, and trained labels, that are not finite"""
    not_finite: Mapping[str, tuple[str, ...]]
    """by arithmetic, outputs of the model that are not finite"""
    shares: Mapping[str, Computed]
    """by arithmetic, its share of the loss and the gradient of that"""
    force_error: float
    """eV/Å, largest error of a force component in float64; nan without labels"""
    energy_error: float
    """eV/atom, likewise"""

    @property
    def name(self) -> str:
        """For the user."""
        text = f"{self.group or self.formula}"
        return f"conformer {self.number} ({''.join(c if c.isprintable() else '?' for c in text)})"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """All that was found about a step."""

    facts: StepFacts
    results: Mapping[str, Computed]
    """by arithmetic, of the whole step"""
    spoiled_weights: tuple[str, ...]
    """weights that are not finite"""
    conformers: tuple[ConformerFindings, ...]


# ---------------------------------------------------------------------------------------------------------------- computing


def replay_step(stored: StoredStep, config: RunConfig, device: torch.device) -> Replay:
    """Compute a stored step again.

    Args:
        stored: The step.
        config: Of its run.
        device: Where to compute.

    Raises:
        CheckpointError: The weights do not fit the model of the configuration.
        DataError: There are elements that the model was not built for.
    """
    facts = stored.facts
    own = [facts.precision] if facts.precision == "bf16-mixed" else []
    arithmetics = ["float32", "float64", *own]
    potentials = {name: _build(stored, config, name, device) for name in arithmetics}
    section = config.train
    results = {
        name: compute_step([b for batches in stored.batches for b in batches], potential, section, facts)
        for name, potential in potentials.items()
    }
    places = (
        (rank, number, batch) for rank, batches in enumerate(stored.batches) for number, batch in enumerate(batches)
    )
    conformers: list[ConformerFindings] = []
    for rank, number, batch in places:
        for single in iter_conformers(batch):
            place = {"number": len(conformers), "rank": rank, "passed": number}
            conformers.append(_examine(single, place, potentials, section, facts))
    spoiled = tuple(name for name, weight in stored.weights.items() if not weight.isfinite().all())
    return Replay(facts=facts, results=results, spoiled_weights=spoiled, conformers=tuple(conformers))


def _build(stored: StoredStep, config: RunConfig, arithmetic: str, device: torch.device) -> Potential:
    """Return the model with the stored weights, in training mode."""
    statistics = stored.facts.statistics
    for batch in (b for batches in stored.batches for b in batches):
        check_elements(set(batch.atomic_numbers.tolist()), statistics.elements, str(stored.path))
    potential = build_model(config.model, statistics)
    weights = dict(potential.named_parameters())
    for name in weights.keys() | stored.weights.keys():
        shapes = [tuple(w[name].shape) if name in w else "none" for w in (weights, stored.weights)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                str(stored.path / WEIGHTS_NAME), f"hold the weights of the run's model, `{name}` as {shapes[0]}", shapes[1],
                "Put back the config.yaml that the run was started with",
            )  # fmt: skip
    potential.load_state_dict(stored.weights, strict=False)  # all that is missing is no weight
    potential = potential.to(device, torch.float64 if arithmetic == "float64" else torch.float32).train()
    potential.set_precision(arithmetic)
    return potential


def compute_step(
    batches: Sequence[GraphBatch], potential: Potential, section: TrainSection, facts: StepFacts
) -> Computed:
    """Return the loss of a step and the norm of its gradient; batches of all processes are passes of this one.

    Args:
        batches: Of the step.
        potential: In training mode; its gradients are reset.
        section: Of the configuration.
        facts: Counts and weights of labels.
    """
    losses = [_compute_pass(batch, potential, section, facts)[0] for batch in batches]
    return _take_gradient(potential, sum(losses))


def _compute_pass(
    batch: GraphBatch, potential: Potential, section: TrainSection, facts: StepFacts
) -> tuple[float, dict[str, torch.Tensor], GraphBatch]:
    """Add the gradient of a pass; return its share of the loss, the outputs, and the batch as it was given to the model."""
    weight = next(potential.parameters())
    moved = batch.to(weight.device, weight.dtype)
    outputs: dict[str, torch.Tensor] = potential(moved, compute_stress=section.trains("stress"))
    counts = [facts.counts.get(label, 0.0) for label in LABELS]
    weights = {label: facts.loss_weights.get(label, 0.0) for label in LABELS}
    loss, _ = compute_loss(outputs, moved, counts, section, weights, facts.statistics.energy_scale)
    torch.autograd.backward(loss)
    return float(loss.detach()), {name: values.detach() for name, values in outputs.items()}, moved


def _take_gradient(potential: Potential, loss: float) -> Computed:
    """Return a loss with the norm of its gradient, which is forgotten."""
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    potential.zero_grad()
    return Computed(loss=loss, gradient_norm=norm)


def iter_conformers(batch: GraphBatch) -> Iterator[GraphBatch]:
    """Yield each structure of a batch as a batch of its own."""
    first_atom = 0
    for number, count in enumerate(batch.num_atoms.tolist()):
        places = {
            "num_atoms": torch.tensor([number]),
            "atomic_numbers": torch.arange(first_atom, first_atom + count),
            "pair_first": torch.nonzero(batch.graph_index[batch.pair_first] == number).flatten(),
        }
        fields = {name: getattr(batch, name) for name in FIELDS}
        taken = {n: v[places[FIELDS[n].unit]] for n, v in fields.items() if v is not None}
        if batch.pbc is not None and not bool(batch.pbc[number].any()):
            taken |= dict.fromkeys(("cell", "pbc", "pair_shifts"))  # as in a batch of molecules alone
        for name, offset in (("pair_first", first_atom), ("pair_second", first_atom), ("graph_index", number)):
            taken[name] = taken[name] - offset
        num_short = int((places["pair_first"] < batch.num_short_pairs).sum())
        yield dataclasses.replace(batch, **taken, num_short_pairs=num_short, group=(batch.group[number],))
        first_atom += count


def _examine(
    conformer: GraphBatch,
    place: Mapping[str, int],
    potentials: Mapping[str, Potential],
    section: TrainSection,
    facts: StepFacts,
) -> ConformerFindings:
    """Compute a conformer by itself."""
    labels = [name for name in LABELS if section.trains(name)]
    fields = {name: getattr(conformer, name) for name in (*_STRUCTURE, *labels)}
    # A label that is nan is one that is missing.
    finite = {n: (~v.isinf() if n in labels else v.isfinite()) for n, v in fields.items() if v is not None}
    distances = compute_vectors(conformer).double().norm(dim=1)
    errors: dict[str, float] = {}
    not_finite, shares = {}, {}
    for name, potential in potentials.items():
        loss, outputs, moved = _compute_pass(conformer, potential, section, facts)
        shares[name] = _take_gradient(potential, loss)
        relevant = [k for k in outputs if k in (*labels, "energy", "forces")]
        not_finite[name] = tuple(k for k in relevant if not outputs[k].isfinite().all())
        if name == "float64":
            errors = {label: _find_error(outputs, moved, label) for label in ("forces", "energy")}
    numbers = conformer.atomic_numbers.numpy()
    return ConformerFindings(
        **place,
        group=conformer.group[0],
        formula=compute_formula(numbers),
        num_atoms=len(numbers),
        closest=float(distances.min()) if len(distances) else math.inf,
        faults=tuple(name for name, is_finite in finite.items() if not is_finite.all()),
        not_finite=not_finite,
        shares=shares,
        force_error=errors["forces"],
        energy_error=errors["energy"] / len(numbers),
    )


def _find_error(outputs: Mapping[str, torch.Tensor], conformer: GraphBatch, label: str) -> float:
    """Return the largest error of a label's numbers; nan where there are none."""
    labels: torch.Tensor | None = getattr(conformer, label)
    if labels is None:
        return math.nan
    return max((outputs[label] - labels).abs()[~labels.isnan()].tolist(), default=math.nan)


# ---------------------------------------------------------------------------------------------------------------- diagnosis


def diagnose(replay: Replay) -> str:
    """Return one sentence about what is wrong with a step."""
    if replay.spoiled_weights:
        names, count = ", ".join(f"`{name}`" for name in replay.spoiled_weights[:3]), len(replay.spoiled_weights)
        return f"The weights are not finite themselves ({count} tensors: {names}): a step before this one spoiled them"
    for conformer in replay.conformers:
        if conformer.faults:
            return _describe_faults(conformer)
    finite = {name: result.is_finite for name, result in replay.results.items()}
    if not finite["float64"]:
        return _find_origin(replay, "float64")
    for name, is_finite in finite.items():
        if not is_finite:
            better = "float32" if name == "bf16-mixed" and finite["float32"] else "float64"
            return f"{_find_origin(replay, name)}, while {better} is finite: an overflow of {name}"
    if replay.facts.verdict is Verdict.NON_FINITE:
        facts = replay.facts
        return (
            f"Loss and gradient are finite in {' and '.join(finite)} with the same data and weights:"
            f" the fault was that of the device ({facts.device}) or of the arithmetic ({facts.precision}) of the training"
        )
    return _describe_spike(replay)


def _describe_faults(conformer: ConformerFindings) -> str:
    names = " and ".join(f"`{name}`" for name in conformer.faults)
    if conformer.faults[0] in _STRUCTURE:
        return f"{names} of {conformer.name} {'are' if len(conformer.faults) > 1 else 'is'} not finite"
    return f"Label {names} of {conformer.name} is infinite"


def _find_origin(replay: Replay, arithmetic: str) -> str:
    """Return the beginning of a sentence about what is not finite in an arithmetic."""
    for conformer in replay.conformers:
        outputs, share = conformer.not_finite[arithmetic], conformer.shares[arithmetic]
        if outputs:
            what = " and ".join(f"`{name}`" for name in outputs)
        elif not share.is_finite:
            what = "the gradient" if math.isfinite(share.loss) else "the share of the loss"
        else:
            continue
        closest = f", whose closest atoms are {conformer.closest:.3g} Å apart," if conformer.closest < 1 else ""
        return f"In {arithmetic} {what} of {conformer.name}{closest} {'are' if len(outputs) > 1 else 'is'} not finite"
    what = "gradient" if math.isfinite(replay.results[arithmetic].loss) else "loss"
    return f"In {arithmetic} the {what} of the whole step is not finite, though that of each conformer by itself is"


def _describe_spike(replay: Replay) -> str:
    facts, result = replay.facts, replay.results["float64"]
    text = f"The loss is finite and {facts.loss / facts.usual_loss:.3g} times the usual one: a spike"
    if abs(result.loss - facts.loss) > 0.01 * abs(facts.loss):
        return f"{text}, which is not repeated: it is {result.loss:.4g} now, so something else than data and weights made it"
    top = max(replay.conformers, key=lambda c: c.shares["float64"].loss, default=None)
    if top is None or not result.loss:
        return text
    return f"{text}; {top.name} makes up {100 * top.shares['float64'].loss / result.loss:.0f} % of it"


# ------------------------------------------------------------------------------------------------------------------- output


def describe(replay: Replay) -> dict[str, Any]:
    """Return all findings for `replay.json`: numbers that are not finite as text."""
    facts = replay.facts
    recorded = {"loss": facts.loss, "gradient_norm": facts.gradient_norm, "usual_loss": facts.usual_loss}
    plain = {
        "format": FORMAT,
        "package_version": __version__,
        "step": facts.step,
        "data_step": facts.data_step,
        "verdict": facts.verdict,
        "diagnosis": diagnose(replay),
        "recorded": recorded,
        "repeated": {name: dataclasses.asdict(result) for name, result in replay.results.items()},
        "spoiled_weights": list(replay.spoiled_weights),
    }
    content: dict[str, Any] = to_plain_numbers(plain)
    return content | {"conformers": [_describe_conformer(c) for c in replay.conformers]}


def _describe_conformer(conformer: ConformerFindings) -> dict[str, Any]:
    plain = {f.name: getattr(conformer, f.name) for f in dataclasses.fields(conformer)}
    plain["pass"] = plain.pop("passed")
    plain["faults"] = list(conformer.faults)
    plain["not_finite"] = {name: list(outputs) for name, outputs in conformer.not_finite.items()}
    plain["shares"] = {name: dataclasses.asdict(share) for name, share in conformer.shares.items()}
    result: dict[str, Any] = to_plain_numbers(plain)
    return result


def print_replay(replay: Replay, title: str) -> None:
    """Print what was recorded and repeated, the conformers that matter most, and the diagnosis."""
    facts, names = replay.facts, list(replay.results)
    rows = [
        (text, f"{getattr(facts, key):.6g}", *(f"{getattr(replay.results[n], key):.6g}" for n in names))
        for key, text in (("loss", "loss"), ("gradient_norm", "gradient norm"))
    ]
    print_table(title, ("", "recorded", *names), rows)
    conformers = sorted(replay.conformers, key=_rank_conformer)
    shown = [_format_row(conformer) for conformer in conformers[:_MAX_ROWS]]
    count = f"{len(shown)} of {len(conformers)}" if len(shown) < len(conformers) else f"{len(shown)}"
    errors = ("max F error eV/Å", "E error meV/atom")
    columns = ("conformer", "atoms", "share of loss", *errors, "closest Å", "gradient norm", "not finite")
    print_table(f"Conformers ({count}), each by itself in float64", columns, shown)
    print(diagnose(replay) + ".")


def _rank_conformer(conformer: ConformerFindings) -> tuple[bool, float]:
    """Sort what is not finite first, then by the share of the loss."""
    sound = not conformer.faults and all(share.is_finite for share in conformer.shares.values())
    loss = conformer.shares["float64"].loss
    return sound, -loss if math.isfinite(loss) else -math.inf


def _format_row(conformer: ConformerFindings) -> tuple[str, ...]:
    share = conformer.shares["float64"]
    parts = list(conformer.faults)
    for name, result in conformer.shares.items():
        outputs = conformer.not_finite[name]
        found = [*outputs] or (["loss"] if not math.isfinite(result.loss) else [])
        parts += [f"{what} in {name}" for what in found or (["gradient"] if not result.is_finite else [])]
    cells = (share.loss, conformer.force_error, 1e3 * conformer.energy_error, conformer.closest, share.gradient_norm)
    text = ", ".join(parts) or "-"
    return (conformer.name.removeprefix("conformer "), str(conformer.num_atoms), *(f"{c:.4g}" for c in cells), text)


# ------------------------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `so3krates replay`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("step", metavar="STEP", type=int, help="a skipped step that is stored in it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")


def run(arguments: argparse.Namespace) -> int:
    """Repeat a step, print what was found, and write it down.

    Returns:
        The exit code.

    Raises:
        CheckpointError: The step is not stored, damaged, or the findings cannot be written.
    """
    folder: Path = arguments.run_folder
    stored = read_step(folder, arguments.step)
    config = read_config(folder / "config.yaml")
    replay = replay_step(stored, config, choose_device(arguments.device, Rank()))
    facts = stored.facts
    ranks = len(stored.batches)
    title = f"Step {facts.step} of {folder}: {facts.verdict.value}, {ranks} process(es), {facts.precision} on {facts.device}"
    print_replay(replay, "".join(c if c.isprintable() else "?" for c in title))
    target = stored.path / RESULT_NAME
    try:
        write_text(target, json.dumps(describe(replay), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(
            str(target),
            "find room on a disk that can be written to",
            error,
            "The findings above are complete without it",
        ) from error
    print(f"written to {target}")
    return 0
