"""Whole files of structures at once, for tools that take small ones: what `data_tools.formats` reads, as one list.

Values stay in the file's units here; `convert.py` turns them into ours. A label is there for all structures of the list or for
none: energies and forces have to be complete, other labels are left out where only some structures have them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.console import say
from data_tools.formats import OpenFile, open_layout
from data_tools.formats.labels import ALIASES, parse_keys
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

__all__ = ["ALIASES", "Structures", "parse_keys", "read_structures"]

_CHUNK = 16_384
_REQUIRED = ("energy", "forces")
_OPTIONAL = ("stress", "dipole", "partial_charges", "hirshfeld_ratios")


@dataclasses.dataclass(slots=True)
class Structures:
    """What was read from one file, in the file's units."""

    graphs: list[Graph]
    keys: dict[str, str]
    """the file's key for each label that was found"""
    is_npz: bool


def read_structures(
    path: Path, keys: Mapping[str, str], group: str | None = None, *, labels: bool = True
) -> Structures:
    """Read all structures of a file.

    Args:
        path: Any file that `data_tools.formats` recognises.
        keys: The file's key for labels that go by another name than `ALIASES` has.
        group: Name that results of all structures are grouped by; None takes the file's, or the formula.
        labels: Read energies and the like; else only what names a structure, its charge and its spin.

    Raises:
        DataError: The file is missing or unreadable, a key is missing or ambiguous, arrays have shapes that do not fit, or some
            structures lack energies or forces that others have.
    """
    with open_layout(path, keys, group, labels=labels) as file:
        records = [(name, item) for chunk in file.chunks(_CHUNK) for name, item in file.read_records(chunk)]
        graphs = [_take(item) for _, item in records]
        _check_complete(file, graphs, [name for name, _ in records])
        found = _leave_out_uneven(file, graphs)
        _fill_cells(graphs)
        return Structures(graphs, found, is_npz=file.layout.name in ("npz", "sgdml", "rmd17"))


def _take(item: Graph | DataError) -> Graph:
    if isinstance(item, DataError):
        raise item
    return item


def _check_complete(file: OpenFile, graphs: Sequence[Graph], names: Sequence[str]) -> None:
    for label in _REQUIRED:
        if label in file.keys:
            for name, graph in zip(names, graphs, strict=True):
                if getattr(graph, label) is None:
                    rule = f"have `{file.keys[label]}` like the others"
                    raise DataError(name, rule, "none", "Remove the frame, or complete it")


def _leave_out_uneven(file: OpenFile, graphs: Sequence[Graph]) -> dict[str, str]:
    """Return the keys without those of labels that only some structures have, and take these labels away."""
    even = dict(file.keys)
    for label in _OPTIONAL:
        having = sum(getattr(graph, label) is not None for graph in graphs)
        if label in even and having < len(graphs):
            key = even.pop(label)
            say(f"{file.name}: {label} is left out, only {having} of {len(graphs)} structures have `{key}`")
            for graph in graphs:
                setattr(graph, label, None)
    return even


def _fill_cells(graphs: Sequence[Graph]) -> None:
    """Give molecules among crystals a cell of zeros that does not repeat."""
    if any(graph.pbc is not None for graph in graphs):
        for graph in graphs:
            if graph.pbc is None:
                graph.pbc, graph.cell = np.zeros(3, bool), np.zeros((3, 3))
