"""Steps that were skipped, as they lie in the run folder: their form, and a reader that trusts none of it.

`skipped/step_XXXXXXXX/` holds what each process computed on (`batches-XXXXX.safetensors`, one per rank), the weights as they were
(`weights.safetensors`), and `facts.json`: what was found, what is needed to compute it again, and size and sha256 of each file.
There is no pickle in it. Other versions, damaged files and such as this package never wrote are refused in one line.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from so3krates_dist.config import LOSS_WEIGHTS
from so3krates_dist.errors import CheckpointError
from so3krates_dist.files import hash_file
from so3krates_dist.graph import MAX_ATOMIC_NUMBER, GraphBatch
from so3krates_dist.model.potential import ModelStatistics
from so3krates_dist.train.guard import Verdict

FORMAT: Final = 1
"""Version of stored steps; a reader refuses a higher one"""

FOLDER_NAME: Final = "skipped"
FACTS_NAME: Final = "facts.json"
WEIGHTS_NAME: Final = "weights.safetensors"
PREFIX: Final = "step_"
_MAX_FACTS_BYTES: Final = 2**26
_MAX_PROCESSES: Final = 99_999
"""As many as file names have digits for"""
_OF_DAMAGE: Final = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
)
"""What reading a damaged file raises somewhere; a recursion error, of JSON that is nested too deeply, is a runtime error"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """What is known about a step, and what its loss depends on besides batches and weights."""

    step: int
    """steps done before it"""
    data_step: int
    """its position in the data"""
    loss: float
    """of the global batch"""
    gradient_norm: float
    """before clipping; nan where the step was skipped before it was known"""
    verdict: Verdict
    usual_loss: float
    """median of the steps before; nan: not known"""
    counts: Mapping[str, float]
    """by label, how many numbers of this kind the global batch has"""
    loss_weights: Mapping[str, float]
    """by label, weight of its errors at this step"""
    statistics: ModelStatistics
    """that the model was built with"""
    precision: str
    """`train.precision`"""
    device: str
    """kind of device that it was computed on"""


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A step that was read back."""

    path: Path
    facts: StepFacts
    package_version: str
    """that stored it"""
    batches: list[list[GraphBatch]]
    """of each rank, one for each pass, on the CPU"""
    weights: dict[str, torch.Tensor]
    """by the name of the model's parameter"""


def name_batches(rank: int) -> str:
    """Return the name of the file that a process writes."""
    return f"batches-{rank:05d}.safetensors"


def list_names(world_size: int) -> list[str]:
    """Return the names of all files but the facts."""
    return [*(name_batches(r) for r in range(world_size)), WEIGHTS_NAME]


def to_plain_numbers(value: Any) -> Any:
    """Return a value for JSON, which has no nan and no infinity."""
    match value:
        case Verdict():
            return value.value
        case ModelStatistics():
            return value.to_json()
        case Mapping():
            return {str(k): to_plain_numbers(v) for k, v in value.items()}
        case float() if not math.isfinite(value):
            return str(value)
    return value


def compute_checksum(content: Mapping[str, Any]) -> str:
    """Return the sha256 of the facts' content, by which the smallest change of it is found."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def list_steps(folder: Path) -> list[int]:
    """Return the steps that are stored in a run folder, ascending."""
    names = [p.parent.name for p in (folder / FOLDER_NAME).glob(f"{PREFIX}*/{FACTS_NAME}")]
    return sorted(int(name[len(PREFIX) :]) for name in names if re.fullmatch(rf"{PREFIX}[0-9]{{8,18}}", name))


def read_step(folder: Path, step: int) -> StoredStep:
    """Read a stored step, and check that it is one.

    Args:
        folder: Run folder.
        step: Steps done before it.

    Raises:
        CheckpointError: There is none, it comes from a newer version, or something about it is not as this package writes it.
    """
    path = folder / FOLDER_NAME / f"{PREFIX}{step:08d}"
    if not (path / FACTS_NAME).is_file():
        if not folder.is_dir():
            raise CheckpointError(
                str(folder), "be a run folder", "no such folder", "Name the one that training printed"
            )
        kept = ", ".join(map(str, list_steps(folder))) or "none"
        raise CheckpointError(
            f"step {step} of {folder}", "be one of the stored steps", f"one that is not; stored: {kept}",
            "Take one of them; train.keep_skipped says how many are kept",
        )  # fmt: skip
    try:
        content = _read_facts(path / FACTS_NAME)
        facts, world_size = _parse_facts(content), _take_int(content, "world_size", 1, _MAX_PROCESSES)
        _check(facts.step == step, f"{FACTS_NAME} is of step {facts.step}")
        for name in list_names(world_size):
            _check_file(path / name, content["files"][name])
        batches = [_read_batches(path / name_batches(rank)) for rank in range(world_size)]
        _check(len({len(b) for b in batches}) == 1, "processes have different numbers of passes")
        return StoredStep(path, facts, str(content["package_version"]), batches, _read_weights(path / WEIGHTS_NAME))
    except _OF_DAMAGE as error:
        words = str(error) if isinstance(error, _MisfitError) else f"{type(error).__name__}: {error}"
        found = " ".join(words.split())[:300].rstrip(".")
        raise CheckpointError(
            str(path), "hold a step as it was stored", found, "Copy it again, or take another step"
        ) from error


class _MisfitError(ValueError):
    """Something is not as this package writes it; the message is for the user."""


def _check(holds: bool, finding: str) -> None:
    if not holds:
        raise _MisfitError(finding)


def _read_facts(path: Path) -> dict[str, Any]:
    _check(path.stat().st_size <= _MAX_FACTS_BYTES, f"{FACTS_NAME} has {path.stat().st_size} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    _check(isinstance(content, dict), f"{FACTS_NAME} is a {type(content).__name__}")
    _check_format(content["format"], path)
    _check(content["checksum"] == compute_checksum(content), f"{FACTS_NAME} has been altered")
    return dict(content)


def _check_format(value: Any, path: Path) -> None:
    number = int(value)
    if number > FORMAT:
        raise CheckpointError(str(path), f"have format {FORMAT} or lower", number, "Install a newer so3krates-dist")
    _check(number >= 1, f"{path.name} has format {number}")


def _parse_facts(content: Mapping[str, Any]) -> StepFacts:
    return StepFacts(
        step=_take_int(content, "step", 0),
        data_step=_take_int(content, "data_step", 0),
        loss=float(content["loss"]),
        gradient_norm=float(content["gradient_norm"]),
        verdict=Verdict(content["verdict"]),
        usual_loss=float(content["usual_loss"]),
        counts=_take_numbers(content, "counts"),
        loss_weights=_take_numbers(content, "loss_weights"),
        statistics=ModelStatistics.from_json(content["statistics"]),
        precision=str(content["precision"]),
        device=str(content["device"]),
    )


def _take_int(content: Mapping[str, Any], name: str, least: int, most: int = 10**18) -> int:
    value = content[name]
    _check(type(value) is int and least <= value <= most, f"{name} is {value!r}")
    return int(value)


def _take_numbers(content: Mapping[str, Any], name: str) -> dict[str, float]:
    values = {str(label): float(value) for label, value in content[name].items()}
    unknown = values.keys() - LOSS_WEIGHTS.keys()
    _check(not unknown, f"{name} has the label {', '.join(sorted(unknown))}")
    _check(all(0 <= value < math.inf for value in values.values()), f"{name} is {values}")
    return values


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    _check(path.is_file() and path.stat().st_size == facts["size"], f"{path.name} is missing or cut short")
    _check(hash_file(path) == facts["sha256"], f"{path.name} has been altered")


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in file.keys()}, texts  # noqa: SIM118 - it is no dictionary


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    tensors, texts = _read_tensors(path)
    _check_format(texts["format"], path)
    return tensors


def read_passes(path: Path) -> list[dict[str, Any]]:
    """Return what a process's file says of each pass besides tensors: names of the conformers and number of short pairs."""
    with safe_open(path, "pt") as file:
        texts = dict(file.metadata() or {})
    _check_format(texts["format"], path)
    passes = json.loads(texts["passes"])
    if not isinstance(passes, list) or not all(isinstance(p, dict) for p in passes):
        raise _MisfitError(f"{path.name} lists no passes")
    return passes


def _read_batches(path: Path) -> list[GraphBatch]:
    passes = read_passes(path)
    tensors, _ = _read_tensors(path)
    names = {f"{number}.{field}" for number in range(len(passes)) for field in FIELDS}
    unknown = sorted(tensors.keys() - names)
    _check(not unknown, f"{path.name} has the field {', '.join(unknown[:3])}")
    batches = []
    for number, texts in enumerate(passes):
        fields = {name: tensors.get(f"{number}.{name}") for name in FIELDS}
        try:
            batches.append(_build_batch(fields, texts))
        except _MisfitError as error:
            raise _MisfitError(f"{path.name}, pass {number}: {error}") from None
    return batches


class Field(NamedTuple):
    """What a field of a batch has to be."""

    unit: str
    """field whose length it has"""
    dtypes: tuple[torch.dtype, ...]
    row: tuple[int, ...] = ()
    required: bool = False


_INTEGER, _FLOAT = (torch.int64,), (torch.float32, torch.float64)
FIELDS: Final = {
    "num_atoms": Field("num_atoms", _INTEGER, required=True),
    "atomic_numbers": Field("atomic_numbers", _INTEGER, required=True),
    "pair_first": Field("pair_first", _INTEGER, required=True),
    "pair_second": Field("pair_first", _INTEGER, required=True),
    "positions": Field("atomic_numbers", _FLOAT, (3,), required=True),
    "graph_index": Field("atomic_numbers", _INTEGER, required=True),
    "total_charge": Field("num_atoms", _FLOAT, required=True),
    "num_unpaired_electrons": Field("num_atoms", _FLOAT, required=True),
    "cell": Field("num_atoms", _FLOAT, (3, 3)),
    "pbc": Field("num_atoms", (torch.bool,), (3,)),
    "pair_shifts": Field("pair_first", _FLOAT, (3,)),
    "energy": Field("num_atoms", (torch.float64,)),
    "forces": Field("atomic_numbers", _FLOAT, (3,)),
    "stress": Field("num_atoms", _FLOAT, (3, 3)),
    "dipole": Field("num_atoms", _FLOAT, (3,)),
    "partial_charges": Field("atomic_numbers", _FLOAT),
    "hirshfeld_ratios": Field("atomic_numbers", _FLOAT),
    "loss_weight": Field("num_atoms", _FLOAT),
}
"""Tensors of a `GraphBatch` in format 1. A further field there, which may be missing here, needs another format; a test says so."""


def _build_batch(fields: Mapping[str, torch.Tensor | None], texts: Mapping[str, Any]) -> GraphBatch:
    """Return the batch of a pass, of which nothing but the values of floating-point numbers is taken on trust."""
    present = {name: tensor for name, tensor in fields.items() if tensor is not None}
    _check_shapes(present)
    _check_indices(present)
    num_boxes = sum(name in present for name in ("cell", "pbc", "pair_shifts"))
    _check(num_boxes in (0, 3), "`cell`, `pbc` and `pair_shifts` are not there together")
    groups, num_graphs = texts["group"], len(present["num_atoms"])
    fits = isinstance(groups, list) and len(groups) == num_graphs and all(isinstance(g, str) for g in groups)
    _check(fits, "`group` does not name each structure")
    num_short = _take_int(texts, "num_short_pairs", 0, len(present["pair_first"]))
    values: dict[str, Any] = dict(fields)
    return GraphBatch(**values, num_short_pairs=num_short, group=tuple(groups))


def _check_shapes(present: Mapping[str, torch.Tensor]) -> None:
    for name, (_, dtypes, row, required) in FIELDS.items():
        tensor = present.get(name)
        _check(tensor is not None or not required, f"`{name}` is missing")
        if tensor is not None:
            fits = tensor.dtype in dtypes and tensor.dim() == 1 + len(row) and tensor.shape[1:] == row
            _check(fits, f"`{name}` is {tensor.dtype} {tuple(tensor.shape)}")
    for name, tensor in present.items():
        unit = FIELDS[name].unit
        _check(len(tensor) == len(present[unit]), f"`{name}` is of another length than `{unit}`")


def _check_indices(present: Mapping[str, torch.Tensor]) -> None:
    counts, numbers = present["num_atoms"], present["atomic_numbers"]
    _check(bool(((counts >= 1) & (counts <= len(numbers))).all()), "`num_atoms` is out of range")
    _check(int(counts.sum()) == len(numbers), "`num_atoms` does not add up to the atoms")
    owners = torch.repeat_interleave(torch.arange(len(counts)), counts)
    _check(torch.equal(owners, present["graph_index"]), "`graph_index` is not in the order of the structures")
    _check(bool(((numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER)).all()), "`atomic_numbers` is out of range")
    ends = [present["pair_first"], present["pair_second"]]
    for name, end in zip(("pair_first", "pair_second"), ends, strict=True):
        _check(bool(((end >= 0) & (end < len(numbers))).all()), f"`{name}` is out of range")
    _check(torch.equal(*(owners[end] for end in ends)), "pairs join different structures")
