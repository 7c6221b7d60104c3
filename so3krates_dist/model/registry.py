"""From a configuration to a model, and from a model to files and back.

A stored model is a folder with `model.safetensors` (weights; no pickle) and `config.json` (format, model section, statistics,
provenance). Refuses formats newer than it understands and weights that do not fit the configuration.
"""

import copy
import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from so3krates_dist.config import ModelSection, parse_config, to_plain
from so3krates_dist.errors import CheckpointError, ConfigError
from so3krates_dist.files import put_in_place, write_text
from so3krates_dist.graph import ELEMENT_SYMBOLS, MAX_ATOMIC_NUMBER
from so3krates_dist.model.euclidean_transformer import EuclideanTransformer
from so3krates_dist.model.geomatt import GeomAtt, GeomAttEnvelope
from so3krates_dist.model.potential import ModelStatistics, Potential
from so3krates_dist.model.so3krates import So3krates
from so3krates_dist.model.so3lr import So3lr

FORMAT: Final = 2
"""Version of stored models; a reader refuses a higher one. 2: more models than one, and `statistics.has_unpaired_electrons`."""

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"

CHANGEABLE: Final = ("long_range_cutoff", "electrostatics", "algorithm")
"""Options that may be set otherwise in a trained model: its weights mean the same with them"""

NETWORKS: Final[dict[str, Callable[[Any, float], nn.Module]]] = {
    "so3krates": So3krates,
    "euclidean_transformer": EuclideanTransformer,
    "so3lr": So3lr,
    "geomatt": GeomAtt,
    "geomatt_envelope": GeomAttEnvelope,
}
"""Class behind each `model.name`, made of its section and the mean number of neighbours; a test holds it against the schema."""


def build_model(section: ModelSection, statistics: ModelStatistics) -> Potential:
    """Return a model with new weights drawn from torch's global generator.

    Raises:
        ConfigError: The model has no tables for an element of the data.
    """
    network = NETWORKS[section.name](section, statistics.mean_neighbors)
    highest = int(getattr(network, "max_element", MAX_ATOMIC_NUMBER))
    beyond = [ELEMENT_SYMBOLS[z] for z in statistics.elements if z > highest]
    if beyond:
        rule = f"be one with tables for all elements of the data; {section.name} ends at {ELEMENT_SYMBOLS[highest]}"
        raise ConfigError("model.name", rule, ", ".join(beyond), "Take another model, or leave these structures out")
    return Potential(network, statistics, section)


def save_model(
    folder: Path,
    section: ModelSection,
    statistics: ModelStatistics,
    weights: Mapping[str, torch.Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Write a model folder; each file is complete under its name or not there at all.

    Args:
        folder: Made where it does not exist.
        section: The model's configuration.
        statistics: What it took from its data.
        weights: Its `state_dict()`.
        provenance: JSON-able facts: step, data set, level of theory, package version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "model": to_plain(section),
        "statistics": statistics.to_json(),
        "provenance": dict(provenance),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    temporary = folder / f".{WEIGHTS_NAME}.tmp"
    save_file(tensors, temporary)
    put_in_place(temporary, folder / WEIGHTS_NAME)
    write_text(folder / CONFIG_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_model_config(path: Path) -> tuple[ModelSection, ModelStatistics, dict[str, Any]]:
    """Read `config.json` of a model folder.

    Raises:
        CheckpointError: It is missing, damaged or from a newer version.
    """
    file = path / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(
            str(path), f"hold {CONFIG_NAME} and {WEIGHTS_NAME}", "no such file", "Give a run folder that was trained"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if int(content["format"]) > FORMAT:
            raise CheckpointError(
                str(file), f"have format {FORMAT} or lower", content["format"], "Install a newer so3krates-dist"
            )
        section = parse_config({"model": content["model"]}, str(file)).model
        return section, ModelStatistics.from_json(content["statistics"]), dict(content["provenance"])
    except (ValueError, KeyError, TypeError, OverflowError, ConfigError) as error:
        finding = str(error).rstrip(".") if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(str(file), "describe a model", finding, "Export the model again") from error


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> Potential:
    """Load a trained model for use: evaluation mode, weights frozen.

    Args:
        path: A run folder, or any folder that `save_model` wrote.
        device: Where to compute.
        dtype: Floating-point type to compute in.
        changes: Those of `CHANGEABLE` among the model's options that are set otherwise.

    Raises:
        ConfigError: The model has no such option, it may not change, or the value is not allowed or has no effect.
        CheckpointError: The files are missing, damaged, newer than this package, or do not fit each other.
    """
    folder = Path(path)
    section, statistics, _ = read_model_config(folder)
    section = _change(section, changes or {})
    with torch.random.fork_rng(devices=()):  # initial weights, overwritten below, must not move the caller's seed
        potential = build_model(section, statistics)
    try:
        potential.load_state_dict(load_file(folder / WEIGHTS_NAME))
    except (OSError, SafetensorError, RuntimeError) as error:
        lines = str(error).splitlines()  # of load_state_dict: a heading, then a line for each kind of misfit
        finding = textwrap.shorten(lines[1] if lines[1:] else lines[0], 200, placeholder=" ...").rstrip(".")
        raise CheckpointError(
            str(folder / WEIGHTS_NAME), f"hold the weights of {CONFIG_NAME}", finding, "Export the model again"
        ) from error
    return potential.to(device=device, dtype=dtype).eval().requires_grad_(False)


def change_model(
    potential: Potential, changes: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype
) -> Potential:
    """Return a copy of a model for use, as `load_model` would: evaluation mode, weights frozen, nothing rounded, options changed.

    Args:
        potential: It is left as it is.
        changes: As for `load_model`.
        device: Of the copy.
        dtype: Of the copy.

    Raises:
        ConfigError: The model has no such option, it may not change, or the value is not allowed or has no effect.
    """
    if potential.section is not None:
        with torch.random.fork_rng(devices=()):
            changed = build_model(_change(potential.section, changes), potential.statistics).to(dtype=dtype)
        changed.load_state_dict(potential.state_dict())
    elif changes:
        option = next(iter(changes))
        raise ConfigError(f"model.{option}", "be an option of the model", "one without configuration", "Leave it out")
    else:
        changed = copy.deepcopy(potential)
        changed.set_precision("float32")
    return changed.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _change(section: ModelSection, changes: Mapping[str, Any]) -> ModelSection:
    """Return the section of a model with other options, those of `CHANGEABLE` that it has."""
    names = {field.name for field in dataclasses.fields(section)}
    for name, value in changes.items():
        if name not in names:
            raise ConfigError(
                f"model.{name}", f"be an option of model.name={section.name}", "no such option", "Leave it out"
            )
        if name not in CHANGEABLE:
            others = ", ".join(n for n in CHANGEABLE if n in names)
            rule = "stay as it was in training" + (f"; only {others} may change" if others else "")
            raise ConfigError(f"model.{name}", rule, value, "Leave it out, or train another model")
    changed = dataclasses.replace(section, **changes)
    cutoff = changes.get("long_range_cutoff")
    if cutoff is not None and changed.reach != (cutoff or math.inf):
        rule = "be left out where the model has no energy that ends there"
        raise ConfigError("model.long_range_cutoff", rule, cutoff, "Leave it out")
    return changed
