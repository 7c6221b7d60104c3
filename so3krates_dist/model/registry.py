"""From a configuration to a model, and from a model to files and back.

A stored model is a folder with `model.safetensors` (weights; no pickle) and `config.json` (format, model section, statistics,
provenance). Refuses formats newer than it understands and weights that do not fit the configuration.
"""

import dataclasses
import json
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

FORMAT: Final = 1
"""Version of stored models; a reader refuses a higher one."""

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"

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
        changes: Options of the model's section that are set otherwise, e.g. `long_range_cutoff`; none that its weights depend on.

    Raises:
        ConfigError: The model has no such option, or the value is not allowed.
        CheckpointError: The files are missing, damaged, newer than this package, or do not fit each other.
    """
    folder = Path(path)
    section, statistics, _ = read_model_config(folder)
    section = _change(
        section, {"precision": "float32"} if hasattr(section, "precision") else {}
    )  # bf16 is no smooth energy
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
    """Return a copy of a model with some options set otherwise, none that its weights depend on.

    Args:
        potential: From `build_model` or `load_model`; it is left as it is.
        changes: Options of its section.
        device: Of the copy.
        dtype: Of the copy.

    Raises:
        ConfigError: The model has no such option, or the value is not allowed.
    """
    if potential.section is None:
        option = next(iter(changes))
        raise ConfigError(f"model.{option}", "be an option of the model", "one without configuration", "Leave it out")
    with torch.random.fork_rng(devices=()):
        changed = build_model(_change(potential.section, changes), potential.statistics)
    changed = changed.to(device=device, dtype=dtype)  # from new tables: those of a float32 model are rounded
    changed.load_state_dict(potential.state_dict())
    return changed.train(potential.training)


def _change(section: ModelSection, changes: Mapping[str, Any]) -> ModelSection:
    names = {field.name for field in dataclasses.fields(section)}
    for name in changes:
        if name not in names:
            raise ConfigError(
                f"model.{name}", f"be an option of model.name={section.name}", "no such option", "Leave it out"
            )
    return dataclasses.replace(section, **changes)
