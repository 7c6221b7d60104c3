"""What `so3krates info` shows: the installation, all settings with their meaning, the state of a run folder, or a model."""

import argparse
import ast
import dataclasses
import importlib.metadata
import inspect
import json
import platform
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import so3krates_dist
from so3krates_dist import config as schema
from so3krates_dist.errors import CheckpointError
from so3krates_dist.graph import ELEMENT_SYMBOLS

VENDORS = (
    "torch", "deepspeed", "e3nn", "webdataset", "omegaconf", "wandb", "safetensors", "numpy", "vesin", "ase", "tblite",
    "rdkit", "torch-pme", "s3fs", "h5py", "lmdb",
)  # fmt: skip

_PROOF: typing.Final = {
    "proof_forces_error": ("forces off float64", 1e3, " meV/Å"),
    "proof_forces_relative": ("of their size", 1.0, ""),
    "proof_energy_error": ("energies off float64", 1e3, " meV/atom"),
    "proof_net_force": ("largest net force", 1e3, " meV/Å"),
    "proof_rotation_error": ("largest change of forces with a rotation", 1e3, " meV/Å"),
}
"""What the figures of train.proof are called here, with factor and unit"""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One key of the configuration."""

    key: str
    type: str
    default: str
    text: str
    """the text under the field in the package config"""
    model: str = ""
    """`model.name` of the model whose option it is; empty: there always"""


def _attribute_texts(section: type) -> dict[str, str]:
    """Return the text under each field of a dataclass and of those it inherits from; Python keeps it in the source only."""
    texts: dict[str, str] = {}
    for owner in reversed([c for c in section.__mro__ if dataclasses.is_dataclass(c)]):
        source = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(source, ast.ClassDef)
        for field, after in zip(source.body, source.body[1:], strict=False):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def _name_type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return f"[{typing.get_args(hint)[0].__name__}, ...]" if typing.get_origin(hint) is tuple else str(hint.__name__)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value) or '""'


def list_settings() -> list[Setting]:
    """Return every key of the configuration with its type, default and meaning, in the order of the schema.

    Options of the section `model` are there for each model that has them, after `model.name`.
    """
    settings: list[Setting] = []
    for name, section in typing.get_type_hints(schema.RunConfig).items():
        if name != "model":
            settings += _list_section(name, section)
            continue
        text = _attribute_texts(schema.ModelSection)["name"]
        settings.append(Setting("model.name", " | ".join(schema.MODEL_SECTIONS), schema.DEFAULT_MODEL, text))
        for model, options in schema.MODEL_SECTIONS.items():
            settings += [s for s in _list_section(name, options, model) if s.key != "model.name"]
    return settings


def _list_section(name: str, section: type, model: str = "") -> list[Setting]:
    texts, hints = _attribute_texts(section), typing.get_type_hints(section)
    return [
        Setting(
            key=f"{name}.{field.name}",
            type=_name_type(hints[field.name]),
            default=_format_value(field.default),
            text=texts.get(field.name, ""),
            model=model,
        )
        for field in dataclasses.fields(section)
    ]


def _print_settings() -> None:
    model = ""
    for setting in list_settings():
        if setting.model not in ("", model):
            title = inspect.getdoc(schema.MODEL_SECTIONS[setting.model]) or ""
            print(f"options of model.name={setting.model}: {title.splitlines()[0]}")
        model = setting.model
        print(f"{setting.key} = {setting.default}    ({setting.type})")
        print(f"    {setting.text}")
    print("overlays, each a file of configs/ or the path of a yaml file:")
    for group in schema.GROUPS:
        names = sorted(p.stem for p in (schema.find_configs() / group).glob("*.yaml"))
        print(f"    {group}={'|'.join(names)}")


def _find_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_rows(rows: Sequence[tuple[str, object]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _print_installation() -> None:
    rows: list[tuple[str, object]] = [
        ("so3krates-dist", so3krates_dist.__version__),
        ("package", Path(so3krates_dist.__file__).parent),
        ("configs", schema.find_configs()),
        ("python", platform.python_version()),
    ]
    _print_rows(rows + [(name, _find_version(name)) for name in VENDORS])


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), "be readable JSON", type(error).__name__, "Restore the file") from error
    return content if isinstance(content, dict) else {}


def _format_figures(values: Mapping[str, Any]) -> str:
    return ", ".join(
        _format_figure(name, value)
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    )


def _format_figure(name: str, value: float) -> str:
    """Return a figure of the record in the unit that people are shown it in."""
    from so3krates_dist.metrics import UNITS

    label, factor, unit = _PROOF.get(name) or (name, *UNITS.get(name.replace("_rmse", "_mae"), (1.0, "")))
    return f"{label} {value * factor:.4g}{unit}"


def _describe_model(section: schema.ModelSection) -> str:
    """Return the model's name and the options that are not its defaults."""
    fields = [f for f in dataclasses.fields(section) if getattr(section, f.name) != f.default]
    return ", ".join([section.name, *(f"{f.name}={_format_value(getattr(section, f.name))}" for f in fields)])


def describe_model(folder: Path) -> list[tuple[str, object]]:
    """Return what a folder with a model and no run holds, as rows of name and finding.

    Args:
        folder: With `config.json` and `model.safetensors`.

    Raises:
        CheckpointError: The model's description is damaged or from a newer version.
    """
    from so3krates_dist.model.registry import WEIGHTS_NAME, read_model_config

    section, statistics, provenance = read_model_config(folder)
    return [
        ("folder", folder.resolve()),
        ("model", _describe_model(section)),
        ("elements", " ".join(ELEMENT_SYMBOLS[z] for z in statistics.elements)),
        ("mean neighbors", f"{statistics.mean_neighbors:g}"),
        ("weights", WEIGHTS_NAME if (folder / WEIGHTS_NAME).is_file() else "missing"),
        *provenance.items(),
    ]


def describe_run(folder: Path) -> list[tuple[str, object]]:
    """Return what a run folder, or one with a model only, holds, as rows of name and finding.

    Args:
        folder: Run folder.

    Raises:
        CheckpointError: It is no run folder, and holds no model.
        ConfigError: Its config.yaml was altered.
    """
    from so3krates_dist.metrics import read_metrics
    from so3krates_dist.train.stored_step import list_steps

    if not (folder / "config.yaml").is_file():
        if (folder / "config.json").is_file():
            return describe_model(folder)
        raise CheckpointError(
            str(folder), "be a run folder or hold a model", "neither config.yaml nor config.json in it",
            "Name the folder that training or import printed",
        )  # fmt: skip
    config = schema.read_config(folder / "config.yaml")
    checkpoints = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    rows: list[tuple[str, object]] = [
        ("run", config.run.name),
        ("folder", folder.resolve()),
        ("data", ", ".join(config.data.sources)),
        ("steps asked for", config.train.num_steps),
        ("checkpoints", ", ".join(checkpoints) or "none"),
        ("model", _describe_model(config.model)),
        ("weights", "model.safetensors" if (folder / "model.safetensors").is_file() else "none yet"),
    ]
    rows += [(f"run.json: {key}", value) for key, value in _read_json(folder / "run.json").items()]
    if skipped := list_steps(folder):
        rows.append(("skipped steps", f"{', '.join(map(str, skipped))}; `so3krates replay RUN STEP` repeats one"))
    rows += _describe_plan(_read_json(folder / "plan.json"))
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    last = {str(record["kind"]): record for record in records}
    rows += [(f"{kind} at step {r['step']}", _format_figures(r)) for kind, r in last.items() if kind != "event"]
    pictures = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    return [*rows, ("pictures", ", ".join(pictures) or "none")]


def _describe_plan(content: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return which data sets a run has had in what shares from which step on, and what was measured for it."""
    rows: list[tuple[str, object]] = []
    try:
        for segment in content.get("segments", ()):
            fields = segment["fields"]
            shares = zip(fields["sources"], fields["weights"], strict=True)
            text = ", ".join(f"{100 * weight:.3g} % {name}" for name, weight in shares)
            if segment.get("loss_weights"):
                text += f"; loss weights {', '.join(f'{float(w):g}' for w in segment['loss_weights'])}"
            rows.append((f"plan from step {segment['first_step']}", f"{text}; {fields['lanes']} lanes"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "plan.json", "be a plan", f"{type(error).__name__}: {error}", "Restore the file"
        ) from error
    for name in ("cost", "limits"):
        if content.get(name):
            rows.append((f"measured {name}", _format_figures(content[name])))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `so3krates info` takes."""
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="folder of a run or of a model")
    parser.add_argument("--config", action="store_true", help="list every setting with its type, default and meaning")


def run(arguments: argparse.Namespace) -> int:
    """Show what was asked for.

    Returns:
        The exit code.
    """
    if arguments.config:
        _print_settings()
    elif arguments.run_folder is not None:
        _print_rows(describe_run(arguments.run_folder))
    else:
        _print_installation()
    return 0
