"""The whole configuration: its schema, its checks, and how it is put together; the only importer of omegaconf.

Order of merging: schema defaults < `configs/base.yaml` < overlays (`run=quickstart` is `configs/run/quickstart.yaml`) < command
line (`train.num_steps=100`). The result is frozen; nothing changes it afterwards. Unknown keys are refused with the nearest
known one, and so are nan, wrong signs and choices that do not go together.
"""

import dataclasses
import difflib
import itertools
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import omegaconf
import yaml
from omegaconf import OmegaConf

from so3krates_dist.errors import ConfigError

GROUPS = ("run", "model", "data", "cluster")
"""Folders of `configs/` of overlays in the order in which they are merged: a run is a whole, the others are parts of one."""


def _check(condition: bool, key: str, rule: str, got: object, remedy: str = "Change the value") -> None:
    if not condition:
        raise ConfigError(key, rule, got, remedy)


def _check_numbers(
    section: Any, prefix: str, *, positive: Sequence[str] = (), at_least_zero: Sequence[str] = ()
) -> None:
    """Check that all floats are finite and the named numbers are in range."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, float):
            _check(math.isfinite(value), f"{prefix}.{field.name}", "be a finite number", value)
    for name in positive:
        value = getattr(section, name)
        _check(value > 0, f"{prefix}.{name}", "be greater than zero", value)
    for name in at_least_zero:
        value = getattr(section, name)
        _check(value >= 0, f"{prefix}.{name}", "be zero or greater", value)


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
        _check(bool(self.name.strip()), "run.name", "not be empty", repr(self.name))
        _check(self.seed >= 0, "run.seed", "be zero or greater", self.seed)
        _check(self.threads >= 0, "run.threads", "be zero or greater", self.threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which conformers to train on, and in what portions."""

    folder: str = ""
    """data set made by `so3krates generate` or `convert`; required for training"""
    batch_size: int = 16
    """conformers per optimizer step over all processes together, at most: an epoch is divided into equal steps, to within one"""
    lanes: int = 8
    """streams that the order of the data is made of; the number of processes must divide it, and never changes the order"""
    window_blocks: int = 512
    """blocks that are shuffled together; an epoch of fewer blocks is shuffled as a whole"""
    max_validation: int = 0
    """conformers of the validation split that are used while training; 0: all"""
    num_workers: int = 0
    """processes that prepare batches ahead of training, per training process; 0: prepared in the training process"""
    verify: Literal["size", "sha256"] = "sha256"
    """check of every shard before training starts"""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_numbers(
            self,
            "data",
            positive=("batch_size", "lanes", "window_blocks"),
            at_least_zero=("max_validation", "num_workers"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The Euclidean transformer (arXiv 2309.15126) with the options of SO3LR's backbone (10.1021/jacs.5c09558)."""

    name: Literal["euclidean_transformer"] = "euclidean_transformer"
    """which model of the family"""
    num_features: int = 128
    """width of the invariant features; divisible by num_heads and by the number of degrees"""
    num_layers: int = 3
    """attention layers"""
    num_heads: int = 4
    """heads of the feature attention"""
    degrees: tuple[int, ...] = (1, 2, 3, 4)
    """degrees l of the Euclidean variables, ascending, each at least 1"""
    cutoff: float = 5.0
    """Å; atoms at this distance or beyond are no neighbours"""
    cutoff_function: Literal["cosine", "polynomial"] = "polynomial"
    """envelope: cosine (Euclidean transformer) or the C2-smooth 1 - 10u^3 + 15u^4 - 6u^5 (SO3LR)"""
    radial_basis: Literal["physnet", "bernstein"] = "bernstein"
    """expansion of distances"""
    num_radial_basis: int = 32
    """functions in the radial basis"""
    radial_filter_width: int = 0
    """hidden width of the networks that filter by distance; 0: num_features"""
    spherical_filter_width: int = 0
    """hidden width of the networks that filter by differences of Euclidean variables; 0: num_features / 4"""
    normalization: Literal["none", "pre", "post"] = "post"
    """LayerNorm: none, before each block (Euclidean transformer) or after each block (SO3LR)"""
    residual_mlp: Literal["none", "gated", "preactivation"] = "preactivation"
    """per-atom network after attention: none, the Euclidean transformer's (bias-free, twice a layer) or SO3LR's (once)"""
    message_scale: Literal["sqrt_features", "mean_neighbors"] = "mean_neighbors"
    """attention coefficients are divided by sqrt(features per head), or by the data's mean number of neighbours"""
    precision: Literal["float32", "bf16"] = "float32"
    """arithmetic of the attention blocks' matrices; radial networks, geometry, sums and readout are float32 always"""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_numbers(
            self,
            "model",
            positive=("num_features", "num_layers", "num_heads", "cutoff", "num_radial_basis"),
            at_least_zero=("radial_filter_width", "spherical_filter_width"),
        )
        degrees = tuple(self.degrees)
        ascending = bool(degrees) and all(a < b for a, b in itertools.pairwise(degrees)) and degrees[0] >= 1
        _check(ascending and degrees[-1] <= 8, "model.degrees", "be ascending integers from 1 to 8", list(degrees))
        both = math.lcm(self.num_heads, len(degrees))
        for name, divisor in (("num_heads", self.num_heads), ("number of degrees", len(degrees))):
            _check(
                self.num_features % divisor == 0,
                "model.num_features",
                f"be divisible by the {name} ({divisor})",
                self.num_features,
                f"Take {self.num_features // both * both or both}",
            )
        _check(self.num_radial_basis >= 2, "model.num_radial_basis", "be at least 2", self.num_radial_basis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How the weights are learned."""

    num_steps: int = 10_000
    """optimizer steps of the whole run; the learning rate ends its decay here"""
    learning_rate: float = 2e-3
    """largest learning rate, reached after the warm-up"""
    final_learning_rate: float = 1e-6
    """learning rate at the end of the cosine decay"""
    warmup_steps: int = 200
    """steps in which the learning rate rises linearly from zero"""
    weight_decay: float = 0.0
    """decoupled weight decay (AdamW) of weight matrices; biases, norms and embeddings have none"""
    adam_beta1: float = 0.9
    """decay of AdamW's mean of gradients"""
    adam_beta2: float = 0.99
    """decay of AdamW's mean of squared gradients"""
    gradient_clipping: float = 0.5
    """largest norm of the gradient of all weights; 0: not clipped"""
    ema_decay: float = 0.999
    """decay of the exponential mean of the weights, which is what is evaluated and exported; 0: the weights themselves"""
    energy_weight: float = 1.0
    """weight of the squared error of the energy per atom, in units of the force RMS times 1 Å"""
    forces_weight: float = 1.0
    """weight of the mean squared force error, in units of the force RMS"""
    stress_weight: float = 0.0
    """weight of the mean squared stress error, in (eV/Å³)^-2; 0: stress is not trained"""
    zero_stage: int = 1
    """DeepSpeed's ZeRO stage: 0, 1 or 2"""
    micro_batches: int = 1
    """portions that a process does one after another per step, to save memory; divides data.lanes / processes"""
    checkpoint_attention: bool = False
    """compute the attention blocks again in the backward pass; exact; saves 3 % of memory on CPU (tests/benchmarks/memory.md)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: a GPU where there is one"""
    log_every: int = 50
    """steps between lines of the log"""
    validate_every: int = 500
    """steps between evaluations on the validation split"""
    save_every: int = 500
    """steps between checkpoints"""
    stop_at: int = 0
    """save and stop after this many steps, with exit code 0; the same command without it goes on; 0: run to the end"""
    keep_checkpoints: int = 2
    """checkpoints kept, at least 2: the newest may be damaged"""
    max_skipped_steps: int = 10
    """steps in a row whose loss or gradient may be not finite (they are skipped) before the run stops"""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_numbers(
            self,
            "train",
            positive=("num_steps", "learning_rate", "micro_batches", "log_every", "validate_every", "save_every"),
            at_least_zero=(
                "final_learning_rate", "warmup_steps", "weight_decay", "gradient_clipping", "energy_weight",
                "forces_weight", "stress_weight", "max_skipped_steps", "stop_at",
            ),
        )  # fmt: skip
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            _check(0 <= getattr(self, name) < 1, f"train.{name}", "be at least 0 and less than 1", getattr(self, name))
        _check(self.zero_stage in (0, 1, 2), "train.zero_stage", "be 0, 1 or 2", self.zero_stage)
        _check(self.keep_checkpoints >= 2, "train.keep_checkpoints", "be at least 2", self.keep_checkpoints)


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
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    metrics: MetricsSection = dataclasses.field(default_factory=MetricsSection)

    def __post_init__(self) -> None:
        """Check what depends on several sections."""
        train, lanes = self.train, self.data.lanes
        _check(
            lanes % train.micro_batches == 0, "train.micro_batches", f"divide data.lanes ({lanes})", train.micro_batches
        )
        _check(
            train.warmup_steps < train.num_steps, "train.warmup_steps", f"be less than train.num_steps ({train.num_steps})",
            train.warmup_steps,
        )  # fmt: skip
        _check(
            train.final_learning_rate <= train.learning_rate, "train.final_learning_rate",
            f"be at most train.learning_rate ({train.learning_rate})", train.final_learning_rate,
        )  # fmt: skip
        weights = (train.energy_weight, train.forces_weight, train.stress_weight)
        _check(any(weights), "train.forces_weight", "be greater than zero where the other weights are zero", 0.0)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder) if self.run.folder else Path("runs") / self.run.name

    def check_world_size(self, world_size: int) -> None:
        """Raise `ConfigError` where the lanes cannot be dealt evenly to that many processes."""
        lanes, micro = self.data.lanes, self.train.micro_batches
        _check(
            lanes % world_size == 0, "data.lanes", f"be a multiple of the number of processes ({world_size})", lanes,
            f"Set data.lanes={-(-lanes // world_size) * world_size} (for a new run), or start another number of processes",
        )  # fmt: skip
        _check(
            lanes // world_size % micro == 0, "train.micro_batches",
            f"divide data.lanes / processes ({lanes // world_size})", micro,
        )  # fmt: skip


def find_configs() -> Path:
    """Return the folder of the yaml files: inside an installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")


def _known_keys(schema: Any = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return all dotted keys with their types."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        keys[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            keys |= _known_keys(hint, f"{prefix}{name}.")
    return keys


def _find_nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that was probably meant: same initials (`lr`), or similar letters."""
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    initials = [k for k in siblings if "".join(word[0] for word in k.rpartition(".")[2].split("_")) == leaf]
    return next(iter(initials or difflib.get_close_matches(key, siblings or known, n=1, cutoff=0.5)), None)


def _check_keys(content: Any, source: str, prefix: str = "") -> None:
    """Refuse keys that are not in the schema, with the nearest one that is."""
    known = _known_keys()
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            near = _find_nearest(dotted, list(known))
            remedy = f"Did you mean `{near}`?" if near else "`so3krates info --config` lists all keys"
            raise ConfigError(f"{dotted} ({source})", "be a known key", "an unknown one", remedy)
        if isinstance(value, dict):
            _check_keys(value, source, f"{dotted}.")
        elif "${" in str(value):
            raise ConfigError(dotted, "be a plain value", value, "Interpolation is not allowed; write the value itself")


class _YamlLoader(yaml.SafeLoader):  # type: ignore[misc] # no type information
    """YAML 1.2's scalars: `off` and `no` are words, `1e-3` is a number (PyYAML follows YAML 1.1)."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF")
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.inf|\.nan|nan|(?:\.\d+|\d+\.\d*)(?:e[-+]?\d+)?|\d+e[-+]?\d+)$", re.IGNORECASE),
    list("-+.0123456789nN"),
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _load_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(str(path), "be a readable YAML file", error.strerror, "Give the path of one") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "be a readable YAML file", "no UTF-8 text", "Repair the file") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), "be a readable YAML file", type(error).__name__, "Repair the file") from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), "hold a mapping of sections", type(content).__name__, "Repair the file")
    _check_keys(content, path.name)
    return content


def _read_overlay(group: str, name: str) -> dict[str, Any]:
    """Read `configs/<group>/<name>.yaml`, or any yaml file given by its path."""
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    folder = find_configs() / group
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{group}={near[0]}`?" if near else "Take one of these, or the path of a yaml file"
        raise ConfigError(group, f"be one of {', '.join(known) or '(none)'}", name, hint)
    return _read_yaml(folder / f"{name}.yaml")


def _split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Separate overlays (`run=quickstart`) from dotted overrides (`train.num_steps=10`)."""
    overlays: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(argument, "have the form key=value", "no `=`", "Write for example train.num_steps=100")
        if key in GROUPS:
            overlays[key] = value
        else:
            overrides.append((key, value))
    return overlays, overrides


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, dot, tail = key.partition(".")
    return {head: _nest(tail, value) if dot else value}


def _merge(base: Any, content: dict[str, Any], source: str) -> Any:
    """Merge one layer into a structured config; omegaconf checks the types."""
    try:
        return OmegaConf.merge(base, OmegaConf.create(content))
    except omegaconf.errors.OmegaConfBaseException as error:
        flat = _flatten(content)
        key = getattr(error, "full_key", None) or next(iter(flat), source)
        key = key if key in _known_keys() else key.partition("[")[0]
        got = repr(flat[key]) if key in flat else str(error).splitlines()[0]
        raise ConfigError(
            f"{key} ({source})", f"be {_describe(_known_keys().get(key))}", got, "Change the value"
        ) from error


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of integers, e.g. [1,2,3]"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "a section with keys of its own")


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Put the configuration together and check it.

    Args:
        arguments: Overlays `group=name` and overrides `section.key=value`, as on the command line.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range, or values are at odds.
    """
    overlays, overrides = _split_arguments(arguments)
    merged = OmegaConf.structured(RunConfig)
    base = find_configs() / "base.yaml"
    layers = [(_read_yaml(base), base.name)] if base.is_file() else []
    layers += [(_read_overlay(g, overlays[g]), f"{g}={overlays[g]}") for g in GROUPS if g in overlays]
    for key, text in overrides:
        content = _nest(key, _parse_value(key, text))
        _check_keys(content, "command line")
        layers.append((content, "command line"))
    for content, source in layers:
        merged = _merge(merged, content, source)
    return _to_config(merged)


def _parse_value(key: str, text: str) -> Any:
    if "${" in text:
        raise ConfigError(key, "be a plain value", text, "Interpolation is not allowed; write the value itself")
    if _known_keys().get(key) is str:
        return text
    try:
        return _load_yaml(text)
    except yaml.YAMLError:
        return text


def _to_config(merged: Any) -> RunConfig:
    try:
        config = OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(
            getattr(error, "full_key", None) or "configuration", "fit the schema", str(error).splitlines()[0],
            "Change the value",
        ) from error  # fmt: skip
    assert isinstance(config, RunConfig)
    return config


def parse_config(content: dict[str, Any], source: str) -> RunConfig:
    """Rebuild a configuration from `dump_config`'s plain dictionaries, checked like any other.

    Args:
        content: Sections with their values.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: As in `load_config`.
    """
    _check_keys(content, source)
    return _to_config(_merge(OmegaConf.structured(RunConfig), content, source))


def to_plain(section: Any) -> dict[str, Any]:
    """Return a section (or the whole configuration) as dictionaries, lists and numbers."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_plain(value)
        else:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def dump_config(config: RunConfig) -> str:
    """Return the configuration as YAML, all keys with their values."""
    return str(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def read_config(path: Path) -> RunConfig:
    """Read a configuration that `dump_config` wrote."""
    return parse_config(_read_yaml(path), str(path))
