"""The layout of a safetensors file: a table of columns in JSON, then their bytes one after another; no pickle, no copies.

Written and read here with numpy alone, so that blocks decode into views and large columns can be streamed and memory-mapped. Any
safetensors library reads the same files. Refuses tables that do not fit the bytes exactly, and dtypes that no column of ours has.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

MAX_HEADER_BYTES: Final = 16 * 2**20
"""Longest table that is parsed; names of 65,536 groups fit"""

MAX_DIMENSIONS: Final = 3
"""Columns of ours have at most these"""

MAX_NAME: Final = 64
"""Characters of the name of a column"""

_ALIGNMENT: Final = 8
_NAMES: Final = {
    "bool": "BOOL", "uint8": "U8", "int32": "I32", "uint32": "U32", "int64": "I64", "float32": "F32", "float64": "F64",
}  # fmt: skip
_DTYPES: Final = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _NAMES.items()}


class Span(NamedTuple):
    """Where one column lies."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    """bytes from the end of the header"""
    size: int
    """bytes"""


def sort_columns(columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> list[str]:
    """Return the names in the order of their bytes: wide types first, so that every column is aligned."""
    return sorted(columns, key=lambda name: (-columns[name][0].itemsize, name))


def build_header(
    columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, bytes]:
    """Return the first bytes of a file, which the columns follow in the order of `sort_columns`.

    Args:
        columns: dtype and shape of each column.
        metadata: Texts to store beside them.

    Returns:
        The bytes with the metadata, and the table alone in a canonical form for check sums.
    """
    table: dict[str, Any] = {}
    start = 0
    for name in sort_columns(columns):
        dtype, shape = columns[name]
        end = start + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = _to_json({"__metadata__": dict(metadata), **table})
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, _to_json(table)


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_header(head: bytes, total: int) -> tuple[dict[str, Span], dict[str, str], int]:
    """Parse the first bytes of a file.

    Args:
        head: The file, or at least its header.
        total: Bytes of the whole file.

    Returns:
        The columns, the metadata, and where the first column starts.

    Raises:
        ValueError: The bytes are no such header, or do not fit the length of the file.
    """
    size = int.from_bytes(head[:8], "little")
    if len(head) < 8 or size > min(MAX_HEADER_BYTES, total - 8):
        raise ValueError(f"a header of {size} bytes in {total} bytes")
    content = json.loads(head[8 : 8 + size])
    metadata = content.pop("__metadata__")
    if any(type(text) is not str for text in metadata.values()) or not _to_json(metadata):
        raise ValueError("metadata that are no texts")
    columns = {name: _read_span(name, entry, total) for name, entry in content.items()}
    end = 0
    for span in sorted(columns.values(), key=lambda s: (s.start, s.size)):
        if span.start != end:
            raise ValueError(f"columns with a gap or an overlap at byte {end}")
        end += span.size
    if end != total - 8 - size:
        raise ValueError(f"columns of {end} bytes where {total - 8 - size} bytes follow the header")
    return columns, metadata, 8 + size


def _read_span(name: str, entry: Mapping[str, Any], total: int) -> Span:
    """Parse the entry of a column; nothing is computed with numbers before their types and sizes are known."""
    if not (name.isascii() and name.isidentifier() and len(name) <= MAX_NAME):
        raise ValueError("a column whose name is no word")
    dtype, shape, offsets = _DTYPES[entry["dtype"]], tuple(entry["shape"]), tuple(entry["data_offsets"])
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"a column of {len(shape)} dimensions with {len(offsets)} offsets")
    if any(type(n) is not int or not 0 <= n <= total for n in (*shape, *offsets)):
        raise ValueError(f"column {name} of another shape or place than within {total} bytes")
    start, end = offsets
    size = dtype.itemsize * math.prod(shape)
    if end - start != size:
        raise ValueError(f"column {name} of shape {shape} from byte {start} to {end}")
    return Span(dtype, shape, start, size)


def view_columns(
    buffer: Any, columns: Mapping[str, Span], first: int
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]:
    """Return the columns as arrays that share the memory of a buffer (read-only where it is).

    Args:
        buffer: bytes or a memory map, the whole file.
        columns: From `read_header`.
        first: Where the first column starts, from `read_header`.
    """
    return {
        name: np.frombuffer(buffer, span.dtype, span.size // span.dtype.itemsize, first + span.start).reshape(
            span.shape
        )
        for name, span in columns.items()
    }


def hash_table(columns: Mapping[str, Span]) -> bytes:
    """Return the table of a file in the canonical form that `build_header` gave when it was written."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return _to_json(
        {
            n: {"dtype": names[s.dtype], "shape": list(s.shape), "data_offsets": [s.start, s.start + s.size]}
            for n, s in columns.items()
        }
    )
