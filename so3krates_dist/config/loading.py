"""How the configuration is put together; the only importer of omegaconf.

Order of merging: schema defaults < `configs/base.yaml` < overlays (`run=quickstart` is `configs/run/quickstart.yaml`) < command
line (`train.num_steps=100`). The result is frozen; nothing changes it afterwards. Unknown keys are refused with the nearest
known one, and so are nan, wrong signs and choices that do not go together. A layer that names another model starts the section
`model` anew: what earlier layers said there was said of another model.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import omegaconf
import yaml
from omegaconf import OmegaConf

from so3krates_dist.config.models import DEFAULT_MODEL, MODEL_SECTIONS
from so3krates_dist.config.sections import RunConfig
from so3krates_dist.errors import ConfigError

GROUPS = ("run", "model", "data", "cluster")
"""Folders of `configs/` of overlays in the order in which they are merged: a run is a whole, the others are parts of one."""


REPLACED = {
    "model.precision": "train.precision=bf16-mixed for bf16",
    "train.checkpoint_attention": "train.activation_checkpointing=blocks for true",
}
"""Keys of earlier versions, and what says the same now; `_upgrade` does it for files that this package wrote"""


def find_configs() -> Path:
    """Return the folder of the yaml files: inside an installed package, or beside it in a clone."""
    package = Path(__file__).parent.parent
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")


def list_keys(model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """Return all dotted keys with their types.

    Args:
        model: Name of the model whose options are those of the section `model`.
    """
    keys: dict[str, Any] = {}
    for section, schema in (typing.get_type_hints(RunConfig) | {"model": MODEL_SECTIONS[model]}).items():
        keys[section] = schema
        hints = typing.get_type_hints(schema)
        keys |= {f"{section}.{field.name}": hints[field.name] for field in dataclasses.fields(schema)}
    return keys


def _find_nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that was probably meant: same initials (`lr`), or similar letters."""
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    initials = [k for k in siblings if "".join(word[0] for word in k.rpartition(".")[2].split("_")) == leaf]
    return next(iter(initials or difflib.get_close_matches(key, siblings or known, n=1, cutoff=0.5)), None)


def _check_keys(content: Any, source: str, model: str, prefix: str = "") -> None:
    """Refuse keys that are not in the schema, with the nearest one that is."""
    known = list_keys(model)
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            _refuse_key(dotted, source, model, list(known))
        if isinstance(value, dict):
            _check_keys(value, source, model, f"{dotted}.")
        elif "${" in str(value):
            raise ConfigError(dotted, "be a plain value", value, "Interpolation is not allowed; write the value itself")


def _refuse_key(key: str, source: str, model: str, known: Sequence[str]) -> NoReturn:
    if key in REPLACED:
        raise ConfigError(f"{key} ({source})", "be a known key", "one of earlier versions", f"Write {REPLACED[key]}")
    others = [name for name in MODEL_SECTIONS if key in list_keys(name)]
    if others:
        got = f"an option of {', '.join(others)}"
        raise ConfigError(f"{key} ({source})", f"be an option of model.name={model}", got, "Leave it out")
    near = _find_nearest(key, known)
    remedy = f"Did you mean `{near}`?" if near else "`so3krates info --config` lists all keys"
    raise ConfigError(f"{key} ({source})", "be a known key", "an unknown one", remedy)


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


def _name_overlay(group: str, name: str) -> str:
    return Path(name).name if name.endswith((".yaml", ".yml")) else f"{group}={name}"


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


Layer = tuple[dict[str, Any], str]
"""Content of a layer of the configuration, and where it comes from"""


def _build_config(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers, each over those before it, check the result and freeze it."""
    model, layers = _choose_model(layers)
    merged = OmegaConf.structured(RunConfig(model=MODEL_SECTIONS[model]()))
    for content, source in layers:
        merged = _merge(merged, content, source, model)
    return _to_config(merged)


def _choose_model(layers: Sequence[Layer]) -> tuple[str, list[Layer]]:
    """Return the model that the layers name, and the layers without what they say of other models; checks all keys."""
    model, kept = DEFAULT_MODEL, list[Layer]()
    for content, source in layers:
        options = content.get("model")
        named = options.get("name", model) if isinstance(options, dict) else model
        if not isinstance(named, str) or named not in MODEL_SECTIONS:
            rule = f"be one of {', '.join(MODEL_SECTIONS)}"
            raise ConfigError(f"model.name ({source})", rule, repr(named), "Change the value")
        if named != model:
            kept = [({k: v for k, v in earlier.items() if k != "model"}, where) for earlier, where in kept]
        model = named
        _check_keys(content, source, model)
        kept.append((content, source))
    return model, kept


def _merge(base: Any, content: dict[str, Any], source: str, model: str) -> Any:
    """Merge one layer into a structured config; omegaconf checks the types."""
    try:
        return OmegaConf.merge(base, OmegaConf.create(content))
    except omegaconf.errors.OmegaConfBaseException as error:
        flat, known = _flatten(content), list_keys(model)
        key = next((k for k, v in flat.items() if not _fits(base, _nest(k, v))), next(iter(flat), source))
        got = repr(flat[key]) if key in flat else str(error).splitlines()[0]
        raise ConfigError(f"{key} ({source})", f"be {_describe(known.get(key))}", got, "Change the value") from error


def _fits(base: Any, content: dict[str, Any]) -> bool:
    """Return whether a single value is of its key's type; errors in an element of a list do not say where they are."""
    try:
        OmegaConf.merge(base, OmegaConf.create(content))
    except omegaconf.errors.OmegaConfBaseException:
        return False
    return True


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        kinds = {int: "integers, e.g. [1,2,3]", float: "numbers, e.g. [1,2,3]", str: "texts, e.g. [a,b]"}
        return f"a list of {kinds[typing.get_args(hint)[0]]}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    return names.get(hint, "a section with keys of its own")


def load_config(arguments: Sequence[str]) -> RunConfig:
    """Put the configuration together and check it.

    Args:
        arguments: Overlays `group=name` and overrides `section.key=value`, as on the command line.

    Raises:
        ConfigError: A key is unknown, a value has the wrong type or is out of range, or values are at odds.
    """
    return _build_config(_read_layers(arguments))


def _read_layers(arguments: Sequence[str]) -> list[Layer]:
    """Return the base, the overlays and the command line."""
    overlays, overrides = _split_arguments(arguments)
    base = find_configs() / "base.yaml"
    layers = [(_read_yaml(base), base.name)] if base.is_file() else []
    layers += [(_read_overlay(g, overlays[g]), _name_overlay(g, overlays[g])) for g in GROUPS if g in overlays]
    command_line: dict[str, Any] = {}
    for key, text in overrides:
        _update(command_line, _nest(key, _parse_value(key, text)))
    return [*layers, (command_line, "command line")]


def describe_left_out(arguments: Sequence[str]) -> list[str]:
    """Return a line about each layer whose options of the model do not count, because a later one names another model.

    Args:
        arguments: As for `load_config`, which has accepted them.
    """
    model, options, lines = DEFAULT_MODEL, dict[str, str](), list[str]()
    for content, source in _read_layers(arguments):
        own = content.get("model") or {}
        named = own.get("name", model)
        if named != model:
            text = "model options of {} are those of {}, not of {}, and were left out"
            lines += [text.format(where, before, named) for where, before in options.items()]
            model, options = named, {}
        if own.keys() - {"name"}:
            options[source] = model
    return lines


def _update(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put changes into nested dictionaries."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _update(content[key], value)
        else:
            content[key] = value


def _parse_value(key: str, text: str) -> Any:
    if "${" in text:
        raise ConfigError(key, "be a plain value", text, "Interpolation is not allowed; write the value itself")
    if list_keys().get(key) is str:
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


def _upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier version wrote with the keys of this one."""
    sections = {name: dict(values) if isinstance(values, dict) else values for name, values in content.items()}
    model, train = sections.get("model"), sections.get("train")
    low_precision = isinstance(model, dict) and model.pop("precision", "float32") == "bf16"
    if isinstance(train, dict):
        if low_precision:
            train.setdefault("precision", "bf16-mixed")
        if train.pop("checkpoint_attention", False):
            train.setdefault("activation_checkpointing", "blocks")
    return sections


def parse_config(content: dict[str, Any], source: str) -> RunConfig:
    """Rebuild a configuration from `dump_config`'s plain dictionaries, of this version or an earlier one; checked like any other.

    Args:
        content: Sections with their values.
        source: Where it comes from, for messages.

    Raises:
        ConfigError: As in `load_config`.
    """
    return _build_config([(_upgrade(content), source)])


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
