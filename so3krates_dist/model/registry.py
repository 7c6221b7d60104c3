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
from so3krates_dist.model.euclidean_transformer import EuclideanTransformer
from so3krates_dist.model.potential import ModelStatistics, Potential

FORMAT: Final = 1
"""Version of stored models; a reader refuses a higher one."""

WEIGHTS_NAME: Final = "model.safetensors"
CONFIG_NAME: Final = "config.json"

NETWORKS: Final[dict[str, Callable[[ModelSection, float], nn.Module]]] = {
    "euclidean_transformer": EuclideanTransformer,
}
"""Class behind each `model.name` of the schema; a test keeps the two equal."""


def build_model(section: ModelSection, statistics: ModelStatistics) -> Potential:
    """Return a model with new weights drawn from torch's global generator."""
    return Potential(NETWORKS[section.name](section, statistics.mean_neighbors), statistics)


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
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Potential:
    """Load a trained model for use: evaluation mode, weights frozen.

    Args:
        path: A run folder, or any folder that `save_model` wrote.
        device: Where to compute.
        dtype: Floating-point type to compute in.

    Raises:
        CheckpointError: The files are missing, damaged, newer than this package, or do not fit each other.
    """
    folder = Path(path)
    section, statistics, _ = read_model_config(folder)
    section = dataclasses.replace(
        section, precision="float32"
    )  # bf16 is for training; its rounding is no smooth energy
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
