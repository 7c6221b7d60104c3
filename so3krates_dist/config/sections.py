"""The sections that all models share, and the whole: every setting with its unit, its default and its check."""

import dataclasses
import math
from pathlib import Path
from typing import Final, Literal

from so3krates_dist.config.checks import check, check_numbers
from so3krates_dist.config.models import EuclideanTransformerSection, ModelSection
from so3krates_dist.config.training import LOSS_WEIGHTS, TrainSection

WEIGHTS_TOLERANCE: Final = 1e-6
"""How far the sum of `data.weights` may be from one: thirds are written with seven digits"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSection:
    """Which run this is and where it lives."""

    name: str = "run"
    """name in tables and in W&B"""
    folder: str = ""
    """run folder; empty: runs/<name>"""
    seed: int = 0
    """seed of the initial weights and of the order of the data"""
    threads: int = 0
    """CPU threads per process; 0: the cores of this machine divided by its processes"""

    def __post_init__(self) -> None:
        """Check the values."""
        check(bool(self.name.strip()), "run.name", "not be empty", repr(self.name))
        check(self.seed >= 0, "run.seed", "be zero or greater", self.seed)
        check(self.threads >= 0, "run.threads", "be zero or greater", self.threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which conformers to train on, and in what portions."""

    folder: str = ""
    """data set made by `so3krates generate` or `convert`: a folder, http(s)://... or s3://...; it or data.folders is required"""
    folders: tuple[str, ...] = ()
    """several data sets to train on together, in place of data.folder"""
    weights: tuple[float, ...] = ()
    """share of each of data.folders in the conformers of every step; they add up to 1; empty: shares by data.temperature"""
    loss_weights: tuple[float, ...] = ()
    """factor of the errors of each of data.folders in the loss, beside each conformer's own `loss_weight`; empty: 1 for each;
    may change with data.rebase"""
    temperature: float = 1.0
    """without data.weights: shares go as (number of conformers)^(1 / temperature); 1: as they are, higher: more alike"""
    batch_size: int = 16
    """conformers per optimizer step over all processes together, on average: steps are filled to equal cost"""
    lanes: int = 8
    """streams that the order of the data is made of; the number of processes must divide it, and never changes the order"""
    window_blocks: int = 512
    """blocks that are shuffled together; an epoch of fewer blocks is shuffled as a whole"""
    shuffle_shards: int = 0
    """shards that are open to a window at a time, which matters for remote data; 0: blocks are taken from all shards"""
    cost_per_atom: float = 3.0
    """cost of an atom by which steps are filled, in the same (any) unit as data.cost_per_pair; two decimals count"""
    cost_per_pair: float = 1.0
    """cost of a pair of neighbours"""
    fit_cost: bool = False
    """measure both costs on this machine when the run starts for the first time; plan.json keeps what was found"""
    max_atoms: int = 0
    """atoms that a process computes at a time, at most; more are done one portion after another; 0: no limit"""
    max_pairs: int = 0
    """estimated pairs of atoms that a process computes at a time, at most; 0: no limit"""
    find_limits: bool = False
    """find both limits by the memory of this machine when the run starts for the first time; plan.json keeps what was found"""
    oversized: Literal["refuse", "alone"] = "refuse"
    """a structure beyond the limits is refused before the first step, or computed alone"""
    max_validation: int = 0
    """conformers of the validation split that are used while training, of all data sets together; 0: all"""
    num_workers: int = 0
    """processes that prepare batches ahead of training, per training process; 0: prepared in the training process"""
    on_damage: Literal["stop", "skip"] = "stop"
    """a damaged block ends the run, or is left out and counted, up to data.max_skipped: then only blocks are checked, not hashes"""
    max_skipped: int = 0
    """conformers that a run may leave out, counted from its last start, before it stops"""
    rebase: bool = False
    """let a run go on with other data sets, weights, lanes or the like, from its next window on; plan.json records it"""
    verify: Literal["size", "sha256"] = "sha256"
    """check of every shard before its first use; each block's checksum is compared at every reading in any case"""
    cache: str = ""
    """folder for shards of remote data sets; empty: $SO3KRATES_CACHE_DIR, or in the cache folder of the user"""
    cache_gb: float = 50.0
    """GB that the cache may hold; the shards that were not used for longest go first"""
    connect_timeout: float = 10.0
    """seconds to wait for a remote server's first answer"""
    stall_timeout: float = 60.0
    """seconds without a byte after which a download counts as failed"""
    retries: int = 5
    """further attempts at a download that failed, each after a longer pause"""

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(
            self,
            "data",
            positive=(
                "temperature", "batch_size", "lanes", "window_blocks", "cache_gb", "connect_timeout", "stall_timeout",
            ),
            at_least_zero=(
                "shuffle_shards", "cost_per_pair", "max_atoms", "max_pairs", "max_validation", "num_workers", "max_skipped",
                "retries",
            ),
        )  # fmt: skip
        least, cost = 0.01, self.cost_per_atom
        check(cost >= least, "data.cost_per_atom", f"be at least {least}: costs count in hundredths", cost)
        self._check_sources()
        self._check_weights()
        self._check_loss_weights()
        for name in ("max_atoms", "max_pairs") if self.find_limits else ():
            limit = getattr(self, name)
            check(limit == 0, f"data.{name}", "be 0 with data.find_limits", limit, "Leave out one of them")
        skips, most = self.on_damage == "skip", self.max_skipped
        check(
            most > 0 or not skips, "data.max_skipped", "be greater than zero with data.on_damage=skip", most,
            "Set it to what the run may lose",
        )  # fmt: skip
        check(
            most == 0 or skips, "data.max_skipped", "be 0 without data.on_damage=skip", most, "Set data.on_damage=skip"
        )

    def _check_sources(self) -> None:
        folders, remedy = list(self.folders), "Name each data set once, in data.folder or in data.folders"
        check(not (self.folder and folders), "data.folders", "be empty where data.folder is set", folders, remedy)
        # omegaconf lets a list within a list through
        named = all(isinstance(f, str) and f.strip() for f in folders)
        check(named, "data.folders", "be a list of names, none empty", folders, remedy)
        check(len(set(folders)) == len(folders), "data.folders", "name each data set once", folders, remedy)

    def _check_weights(self) -> None:
        weights, count = list(self.weights), len(self.sources)
        if not weights:
            return
        check(
            len(weights) == count, "data.weights", f"be one share for each of data.folders ({count})", len(weights),
            "Write them in the order of data.folders",
        )  # fmt: skip
        valid = all(isinstance(w, float) and 0 <= w < math.inf for w in weights)
        check(valid, "data.weights", "be finite numbers, none below zero", weights)
        total = math.fsum(weights)
        remedy = f"Divide each by {total:g}" if total else "Change the values"
        check(
            abs(total - 1) <= WEIGHTS_TOLERANCE, "data.weights", "add up to 1", f"{weights}, in sum {total:g}", remedy
        )
        check(
            self.temperature == 1, "data.temperature", "be left at 1 with data.weights", self.temperature,
            "Leave out one of them",
        )  # fmt: skip

    def _check_loss_weights(self) -> None:
        weights, count = list(self.loss_weights), len(self.sources)
        check(
            len(weights) in (0, count), "data.loss_weights", f"be one factor for each of data.folders ({count})",
            len(weights), "Write them in the order of data.folders",
        )  # fmt: skip
        valid = all(isinstance(w, float) and 0 <= w < math.inf for w in weights)
        check(valid, "data.loss_weights", "be finite numbers, none below zero", weights)
        check(not weights or any(weights), "data.loss_weights", "not all be zero", weights)

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets, however they are named; none where none is."""
        return tuple(self.folders) or ((self.folder,) if self.folder else ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsSection:
    """Where figures go besides metrics.jsonl in the run folder."""

    wandb: Literal["off", "auto", "offline", "online"] = "auto"
    """mirror to Weights & Biases; auto: online when the user is logged in, else offline"""
    project: str = "so3krates_dist"
    """W&B project"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run depends on."""

    run: RunSection = dataclasses.field(default_factory=RunSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    model: ModelSection = dataclasses.field(default_factory=EuclideanTransformerSection)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    metrics: MetricsSection = dataclasses.field(default_factory=MetricsSection)

    def __post_init__(self) -> None:
        """Check what depends on several sections."""
        train, lanes = self.train, self.data.lanes
        check(
            lanes % train.micro_batches == 0, "train.micro_batches", f"divide data.lanes ({lanes})", train.micro_batches
        )
        for output in ("dipole", "partial_charges", "hirshfeld_ratios"):
            check(
                not train.trains(output) or output in self.model.outputs, f"train.{LOSS_WEIGHTS[output]}",
                f"be 0 where model.name={self.model.name} has no output `{output}`", getattr(train, LOSS_WEIGHTS[output]),
                "Set it to 0",
            )  # fmt: skip
        check(
            train.activation_checkpointing != "low_memory" or not self.model.low_memory_obstacle,
            "train.activation_checkpointing", f"be none or blocks where {self.model.low_memory_obstacle}", "low_memory",
        )  # fmt: skip

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder) if self.run.folder else Path("runs") / self.run.name

    def check_world_size(self, world_size: int) -> None:
        """Raise `ConfigError` where so many processes cannot do what is asked for.

        That is where the lanes cannot be dealt evenly to them, or where float64 is asked of several.
        """
        check(
            world_size == 1 or self.train.precision != "float64", "train.precision",
            f"be float32, tf32 or bf16-mixed with several processes ({world_size})", "float64", "Start a single process",
        )  # fmt: skip
        lanes, micro = self.data.lanes, self.train.micro_batches
        divisors = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        check(
            lanes % world_size == 0, "data.lanes", f"be a multiple of the number of processes ({world_size})", lanes,
            f"Start {divisors} processes, or set data.lanes={-(-lanes // world_size) * world_size}"
            " (in a run that has begun: with data.rebase=true)",
        )  # fmt: skip
        check(
            lanes // world_size % micro == 0, "train.micro_batches",
            f"divide data.lanes / processes ({lanes // world_size})", micro,
        )  # fmt: skip
