"""Databases of ASE in SQLite: structures, results, key-value pairs and data of each row, read as JSON and numbers only.

Where the metadata name units, as SchNetPack's do (`_property_unit_dict`, `_distance_unit`), these are taken.
"""

import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.formats.ase_files import ASE_UNITS, NamedValues
from data_tools.formats.base import Layout, OpenFile, Request, Units
from data_tools.formats.labels import find_keys, get_aliases
from data_tools.formats.probe import Probe
from data_tools.formats.sqlite import SqliteFile
from data_tools.formats.unit_names import find_units
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

RESULTS: Final = ("energy", "forces", "stress", "dipole", "charges")
"""Results of calculators that can be labels"""
SAMPLE: Final = 1000
"""Records whose names are looked at before reading"""
_COLUMNS: Final = ("numbers", "positions", "cell", "pbc", *RESULTS, "key_value_pairs", "data")
_OLDEST: Final = 5
_MAX_NESTING: Final = 8


class AseDbFile(SqliteFile):
    """Rows of the table `systems`."""

    table = "systems"
    columns = _COLUMNS

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        information = dict(self.query("SELECT name, value FROM information"))
        version = str(information.get("version", "none"))
        if not version.isdigit() or int(version) < _OLDEST:
            raise DataError(str(path), f"be of version {_OLDEST} or newer", version, "Run `python -m ase.db.convert`")
        metadata = parse_json(information.get("metadata") or "{}", f"{path} metadata")
        step = max(1, self.num_records // SAMPLE)
        statement = f"SELECT id, {', '.join(_COLUMNS)} FROM systems WHERE id % ? = 0 OR id <= ? ORDER BY id"
        available: set[str] = set()
        for number, *row in self.query(statement, step, SAMPLE):
            available.update(self._collect(row, f"{name}:{number}"))
        self.keys = find_keys(available, request.keys, get_aliases(request), str(path))
        self._names = NamedValues(self.keys, request)
        self.units, self.notes = find_metadata_units(metadata, self.keys, self)

    def build_row(self, row: list[Any], where: str) -> Graph:
        """Build the structure of a row."""
        values = dict(zip(_COLUMNS, row, strict=True))
        numbers = _unpack(values["numbers"], "<i4", f"{where} numbers")
        structure = {"atomic_numbers": numbers, "positions": _unpack(values["positions"], "<f8", where, (-1, 3))}
        if values["pbc"]:
            structure["pbc"] = np.array([values["pbc"] & bit for bit in (1, 2, 4)], bool)
            structure["cell"] = _unpack(values["cell"], "<f8", f"{where} cell", (3, 3))
        return self._names.build(self._collect(row, where), structure, where)

    def _collect(self, row: list[Any], where: str) -> dict[str, Any]:
        """Return all that a row carries by name; results hide pairs and data of the same name."""
        values = dict(zip(_COLUMNS, row, strict=True))
        pairs = parse_json(values["key_value_pairs"] or "{}", f"{where} key_value_pairs")
        found = collect_data(values["data"], f"{where} data") | pairs
        if values["energy"] is not None:
            found["energy"] = values["energy"]
        for name, shape in (("forces", (-1, 3)), ("stress", (-1,)), ("dipole", (-1,)), ("charges", (-1,))):
            if values[name] is not None:
                found[name] = _unpack(values[name], "<f8", f"{where} {name}", shape)
        return found


def _unpack(blob: Any, dtype: str, where: str, shape: tuple[int, ...] = (-1,)) -> np.ndarray:
    try:
        return np.frombuffer(blob, dtype).reshape(shape)
    except (TypeError, ValueError) as error:
        raise DataError(where, "be a blob of numbers", error, "Check the file") from error


def parse_json(text: Any, where: str) -> dict[str, Any]:
    """Return the object of a JSON text, arrays in ASE's encoding as numpy arrays.

    Raises:
        DataError: It is no JSON, or no object.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return {key: decode(value, None) for key, value in found.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(where, "be a JSON object", str(error)[:80], "Check the file") from error


def collect_data(data: Any, where: str) -> dict[str, Any]:
    """Return the entries of a row's data, JSON text or ASE's bytes (numbers, then JSON that says where they lie).

    Raises:
        DataError: It is neither.
    """
    if data is None or isinstance(data, str):
        return parse_json(data, where) if data and data != "null" else {}
    try:
        (offset,) = struct.unpack_from("<q", data)
        found = json.loads(data[offset:].decode())
        return {key: decode(value, data) for key, value in found.items()} if isinstance(found, dict) else {}
    except (TypeError, ValueError, RecursionError, struct.error) as error:
        raise DataError(where, "be data as ASE writes them", str(error)[:80], "Check the file") from error


def decode(value: Any, data: bytes | None, depth: int = 0) -> Any:
    """Return a JSON value with its arrays. Objects of ASE are left as they are: no label is one.

    Args:
        value: Out of JSON.
        data: Bytes that arrays lie in; None: their numbers stand in the JSON itself.
        depth: Of nesting so far.
    """
    if not isinstance(value, dict) or depth > _MAX_NESTING:
        return value
    if "__ndarray__" not in value:
        return {key: decode(item, data, depth + 1) for key, item in value.items()}
    shape, name, content = value["__ndarray__"]
    dtype = np.dtype(name)
    if dtype.kind not in "biufcSU":
        raise ValueError(f"an array of {name}")
    if data is None:
        return np.asarray(content, dtype).reshape(shape)
    count = functools.reduce(lambda product, size: product * int(size), shape, 1)
    if count < 0 or content < 0 or content + count * dtype.itemsize > len(data):
        raise ValueError("an array that reaches out of its bytes")
    return np.frombuffer(data, dtype, count, content).reshape(shape)


def find_metadata_units(
    metadata: Mapping[str, Any], keys: Mapping[str, str], file: OpenFile
) -> tuple[Units | None, tuple[str, ...]]:
    """Return the units that SchNetPack writes into the metadata of a database, else those of the layout, and notes.

    Args:
        metadata: Of the database.
        keys: Its key of each label.
        file: The database.
    """
    units = metadata.get("_property_unit_dict")
    if not isinstance(units, dict) or (energy := units.get(keys.get("energy", ""))) is None:
        return file.layout.units, ()
    length, force = metadata.get("_distance_unit", "Ang"), units.get(keys.get("forces", ""))
    found = find_units(energy, length, "the file's _property_unit_dict", force)
    words = f"energy {energy!r}, length {length!r}, force {force!r}"
    return found, () if found else (f"{file.name} has units of an unknown name: {words}",)


def _is_ase_db(probe: Probe) -> bool:
    return probe.container == "sqlite" and {"systems", "information"} <= probe.names


ASE_DB: Final = Layout(
    name="ase-db",
    description="database of ASE (SQLite): eV and Å by ASE's convention, or units that its metadata name",
    recognise=_is_ase_db,
    open=AseDbFile,
    units=ASE_UNITS,
)
