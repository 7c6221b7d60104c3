"""SQLite files of GEMS (crambin, protein fragments): arrays as little-endian blobs in the table `data`.

Columns id, q, s, z (int32), r, e, f, d (float32), in e, unpaired electrons, eV, Å, eV/Å and e Å; the table `metadata` has the
number of records. Energies that were cut to float32 at the source are off by up to some 0.03 eV, which a note says.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.formats.base import Layout, Request, Units
from data_tools.formats.labels import NOT_LABELS, build_graph, choose_fixed_keys
from data_tools.formats.probe import Probe
from data_tools.formats.sqlite import SqliteFile
from so3krates_dist.errors import DataError
from so3krates_dist.graph import Graph

_DEFAULTS: Final = {
    "energy": "e",
    "forces": "f",
    "dipole": "d",
    "total_charge": "q",
    "num_unpaired_electrons": "s",
}
_COLUMNS: Final = ("q", "s", "z", "r", "e", "f", "d")


class GemsFile(SqliteFile):
    """Rows of blobs."""

    table = "data"
    columns = _COLUMNS

    def __init__(self, path: Path, name: str, layout: Layout, request: Request) -> None:
        super().__init__(path, name, layout, request)
        promised = [row[-1] for row in self.query("SELECT * FROM metadata WHERE id = 1")]
        if promised != [self.num_records]:
            got = f"{self.num_records} in `data`, {promised[0] if promised else 'no number'} in `metadata`"
            raise DataError(str(path), "hold as many records as it says", got, "Copy it again")
        present = {column for column in _COLUMNS if self._has(column)}
        self.keys = choose_fixed_keys(present, request, _DEFAULTS, str(path))
        self.notes = ("GEMS has energies in single precision: large structures are off by up to 0.03 eV",)

    def _has(self, column: str) -> bool:
        return any(True for _ in self.query(f"SELECT 1 FROM data WHERE {column} IS NOT NULL LIMIT 1"))

    def build_row(self, row: list[Any], where: str) -> Graph:
        """Unpack the blobs of one structure."""
        values = dict(zip(_COLUMNS, row, strict=True))
        numbers = _unpack(values["z"], "<i4", f"{where} z")
        fields = {label: values[key] for label, key in self.keys.items()}
        for label, shape in (("forces", (len(numbers), 3)), ("dipole", (3,))):
            if isinstance(blob := fields.get(label), bytes):
                fields[label] = _unpack(blob, "<f4", f"{where} {label}", shape)
        fields["atomic_numbers"] = numbers
        fields["positions"] = _unpack(values["r"], "<f4", f"{where} positions", (len(numbers), 3))
        keys = {label: key for label, key in self.keys.items() if label in NOT_LABELS}
        return build_graph(fields, keys, self.request, where)


def _unpack(blob: Any, dtype: str, where: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    item = np.dtype(dtype).itemsize
    if not isinstance(blob, bytes) or len(blob) % item:
        got = f"{len(blob)} bytes" if isinstance(blob, bytes) else type(blob).__name__
        raise DataError(where, f"be a blob of {item}-byte numbers", got, "Check the file")
    array = np.frombuffer(blob, dtype)
    if shape is not None and array.size != int(np.prod(shape)):
        raise DataError(where, f"have shape {shape}", f"{array.size} numbers", "Check the file")
    return array if shape is None else array.reshape(shape)


def _is_gems(probe: Probe) -> bool:
    return probe.container == "sqlite" and {"data", "metadata"} <= probe.names


GEMS: Final = Layout(
    name="gems",
    description="SQLite of GEMS: blobs in the table `data`, in eV and Å",
    recognise=_is_gems,
    open=GemsFile,
    units=Units("eV", "Angstrom", "eV/Angstrom", "GEMS's documentation"),
    level_of_theory="PBE0+MBD",
    source="O. T. Unke et al., Sci. Adv. 10, eadn4397 (2024), 10.1126/sciadv.adn4397; data 10.5281/zenodo.10720941",
)
