"""Files that somebody has made in order to do harm: one line in the end, whatever they hold, without taking the memory."""

import json
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic import make_random_graph, write_graphs

from so3krates_dist.data import archive, codec, layout, manifest
from so3krates_dist.data.codec import decode_block, encode_block
from so3krates_dist.data.folder import open_dataset
from so3krates_dist.data.index import map_index
from so3krates_dist.data.manifest import load_manifest, parse_manifest
from so3krates_dist.errors import DataError

SCHEMA_1 = Path(__file__).parent.parent / "data" / "shards_schema_1"


def accepts(read: Callable[[], object]) -> bool:
    """Return whether something was accepted; what is refused must be refused in one line that can be written to a log."""
    try:
        read()
    except DataError as error:
        text = str(error)
        assert text.isprintable(), text
        assert len(text) < 1500, text
        text.encode()
        return False
    return True


# ------------------------------------------------------------------------------------------------------- blocks made by hand


def seal_block(columns: dict[str, np.ndarray], description: str) -> bytes:
    """Return a block with a check sum that is right, as somebody who knows the format would."""
    return codec._to_bytes(columns, description)


def make_table(table: object, metadata: object = None) -> bytes:
    """Return a file with such a table and nothing else."""
    told = {"so3krates": '{"schema":2,"groups":["a"]}', "crc32": "0"} if metadata is None else metadata
    text = json.dumps({"__metadata__": told, **table} if isinstance(table, dict) else table).encode()
    return len(text).to_bytes(8, "little") + text


def entry(shape: object, offsets: object = (0, 0), dtype: str = "U8") -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


TABLES = {
    "a shape that multiplies a text": make_table(entry([10**10, "a"])),
    "a shape that multiplies a list": make_table(entry([10**10, [1]])),
    "a shape of thousands of long numbers": make_table(entry([int("9" * 4000)] * 1500)),
    "a shape of a number too long to be read": make_table(entry([0])).replace(b"[0]", b"[" + b"9" * 5000 + b"]", 1),
    "a shape of zero and more": make_table(entry([0, 2**62])),
    "offsets that are one": make_table(entry([0], [0])),
    "half of a character as a name": make_table({"\ud800": entry([0])["x"]}),
    "a name of a million characters": make_table({"x" * 1_000_000: entry([0])["x"]}),
    "a name with a line break": make_table({"a\nb": entry([0])["x"]}),
    "half of a character as a group": make_table({}, {"so3krates": '{"schema":2,"groups":["\\ud800"]}', "crc32": "0"}),
    "half of a character beside it": make_table({}, {"so3krates": '{"schema":2,"groups":["a"]}', "crc32": "\ud800"}),
    "groups that are a text": make_table({}, {"so3krates": '{"schema":2,"groups":"abc"}', "crc32": "0"}),
    "groups that are tables": make_table({}, {"so3krates": '{"schema":2,"groups":[{}]}', "crc32": "0"}),
    "metadata that are a list": make_table({}, ["so3krates"]),
    "metadata of another type": make_table({}, {"so3krates": 5}),
    "columns that are numbers": make_table({"x": 5}),
    "a list": make_table([]),
    "nothing but brackets": (8_000_000).to_bytes(8, "little") + b"[" * 8_000_000,
    "a header longer than the file": (2**63).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_blocks(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not accepts(lambda: decode_block(TABLES[name], "here"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def test_columns_of_blocks_with_a_check_sum_that_is_right() -> None:
    columns = dict(decode_block(encode_block([make_random_graph(i, everything=True) for i in range(4)])).columns)
    description = '{"schema":2,"groups":["a","b","c","d"]}'
    assert accepts(lambda: decode_block(seal_block(columns, description)))
    pbc = columns["pbc"].view(np.uint8) * 0 + 2
    changes: list[dict[str, np.ndarray]] = [
        {"num_atoms": np.full(4, 2**31 - 1, np.int32)},
        {"num_atoms": np.full(4, 2**62, np.int64)},
        {"num_atoms": np.full(4, np.nan)},
        {"group": np.full(4, 2**31 - 1, np.int32)},
        {"pbc": pbc.view(bool)},
        {"has_pbc": np.ones(3, np.uint8)},
        {"has_energy": np.full(4, 255, np.uint8)},
        {"has_positions": np.ones(4, np.uint8)},
    ]
    for change in changes:
        payload = seal_block(columns | change, description)
        assert not accepts(lambda p=payload: decode_block(p)), change


# --------------------------------------------------------------------------------------------------------- manifests by hand


def write_set(folder: Path) -> None:
    write_graphs(folder, {"train": [make_random_graph(i) for i in range(9)]}, block_size=3, blocks_per_shard=2)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "blocks that fill the memory": lambda m: m["shards"][0].update(num_blocks=10**9, num_conformers=10**9, num_atoms=10**9),
    "blocks for which there is room": lambda m: m["shards"][0].update(
        num_blocks=10**12, num_conformers=10**12, num_atoms=10**12, size=10**15
    ),
    "a length of a hundred digits": lambda m: m["shards"][0].update(size=10**100, num_atoms=10**100),
    "a shard twice": lambda m: m["shards"].append(m["shards"][-1]),
    "a shard in another folder": lambda m: m["shards"][0].update(file="../train-000000.tar"),
    "a shard elsewhere": lambda m: m["shards"][0].update(file="/etc/passwd"),
    "a shard with a zero byte": lambda m: m["shards"][0].update(file="a\0.tar"),
    "a shard that is a command": lambda m: m["shards"][0].update(file="pipe:id;.tar"),
    "an index elsewhere": lambda m: m["index"].update(file="../index.safetensors"),
    "a shard that is a number": lambda m: m["shards"].__setitem__(0, 5),
    "shards that are a table": lambda m: m.update(shards={"a": 1}),
    "a name that is a table": lambda m: m.update(name={}),
    "units of another type": lambda m: m.update(units={"energy": 1}),
    "labels of another name": lambda m: m.update(labels=["__class__"]),
    "statistics that are a list": lambda m: m.update(statistics=[]),
    "counts that are texts": lambda m: m.update(label_counts={"train": {"energy": "many"}}),
    "groups that are counted wrongly": lambda m: m.update(groups={"a": -1}),
    "a field too many": lambda m: m.update(__class__="x"),
    "a field with a line break": lambda m: m.update({"a\nb": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_manifests(tmp_path: Path, name: str) -> None:
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    content = json.loads(path.read_text())
    CHANGES[name](content)
    path.write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not accepts(lambda: open_dataset(tmp_path / "set").table)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kB"


@pytest.mark.parametrize("value", ["x", -1, 2**80, None, [1], 1.5, True])
@pytest.mark.parametrize("column", ["offset", "size", "crc32", "num_conformers"])
def test_places_of_schema_1(tmp_path: Path, column: str, value: object) -> None:
    for file in SCHEMA_1.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0]["blocks"][column][0] = value
    path.write_text(json.dumps(content))
    assert not accepts(lambda: open_dataset(tmp_path).table)


@pytest.mark.parametrize("text", [b"[" * 10**6, b"\xff", b"", b"5", b'{"schema":' + b"9" * 5000 + b"}", b"{}", b'"a"'])
def test_texts_that_are_no_manifest(text: bytes) -> None:
    assert not accepts(lambda: parse_manifest(text, "here"))


def test_a_manifest_is_not_read_beyond_a_limit(tmp_path: Path) -> None:
    """A hole in a file is as long as it likes and takes no room on the disk."""
    write_set(tmp_path / "set")
    with (tmp_path / "set" / "manifest.json").open("r+b") as file:
        file.truncate(2**42)
    with pytest.raises(DataError, match=r"manifest\.json must have at most 268435456 bytes; got more"):
        load_manifest(tmp_path / "set")


# ------------------------------------------------------------------------------------------------------------- tars by hand


def test_a_tar_that_is_a_hole_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.truncate(2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(archive.iter_members(tmp_path / "a.tar")) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kB"


def test_a_tar_has_a_limited_number_of_members(tmp_path: Path, monkeypatch) -> None:
    write_set(tmp_path / "set")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 1)
    with pytest.raises(DataError, match=r"train-000000\.tar must have at most 1 members; got more"):
        list(archive.iter_members(tmp_path / "set" / "train-000000.tar"))


# ------------------------------------------------------------------------------------------------------------------- chance


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite something; half of the time near the beginning, where the tables are."""
    damaged = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5))):
        near = generator.random() < 0.5
        place = generator.randrange(max(1, min(len(damaged), 1500 if near else len(damaged))))
        kind = generator.randrange(6)
        if kind <= 1 and damaged:
            damaged[place] ^= 1 << generator.randrange(8)
        elif kind == 2:
            del damaged[place : place + generator.randrange(1, 64)]
        elif kind == 3:
            damaged[place:place] = damaged[place : place + generator.randrange(1, 64)]
        elif kind == 4:
            damaged[place : place + 8] = generator.choice(
                (b"\xff" * 8, bytes(8), b"99999999", b"[[[[[[[[", b'"\\ud800"')
            )
        else:
            damaged = damaged[: place + generator.randrange(64)]
    return bytes(damaged)


def seal_again(payload: bytes) -> bytes:
    """Return a damaged block with a check sum that is right again, so that what is behind it is reached."""
    try:
        spans, metadata, first = layout.read_header(payload, len(payload))
        found = codec._compute_checksum(payload[first:], metadata["so3krates"], layout.hash_table(spans))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return payload
    return payload.replace(metadata.get("crc32", "-").encode(), f"{found:08x}".encode(), 1)


def test_damage_by_chance(tmp_path: Path) -> None:
    """Nothing but `DataError` comes out of any reader, and what was sealed by a check sum is never accepted in another form."""
    write_set(tmp_path / "set")
    folder, generator = tmp_path / "set", random.Random(4)
    block = encode_block([make_random_graph(i, everything=i % 2 > 0) for i in range(4)])
    for _ in range(2000):
        changed = damage(block, generator)
        assert changed == block or not accepts(lambda p=changed: decode_block(p, "here"))
        sealed = seal_again(changed)
        accepts(lambda p=sealed: list(decode_block(p, "here")))
    readers: dict[str, Callable[[Path], object]] = {
        "train-000000.tar": lambda path: list(archive.iter_members(path)),
        "index.safetensors": lambda path: map_index(path, {}).num_conformers,
        "manifest.json": lambda path: manifest.load_manifest(path.parent).fingerprint,
    }
    for name, read in readers.items():
        content, path = (folder / name).read_bytes(), folder / name
        for _ in range(600):
            path.write_bytes(damage(content, generator))
            accepts(lambda r=read, p=path: r(p))
        path.write_bytes(content)


def test_an_index_that_was_damaged_by_chance_leads_nowhere_else(tmp_path: Path) -> None:
    """With lengths that are right, the columns are judged against the manifest, and each block against the index."""
    write_set(tmp_path / "set")
    path, generator = tmp_path / "set" / "index.safetensors", random.Random(5)
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    for _ in range(500):
        damaged = bytearray(content)
        place = generator.randrange(first, len(content))
        damaged[place : place + 8] = generator.choice(
            (b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f", generator.randbytes(8))
        )
        path.write_bytes(damaged[: len(content)])
        with open_dataset(tmp_path / "set") as dataset:
            accepts(lambda d=dataset: [d.read_block(number) for number in range(d.num_blocks)])


# ------------------------------------------------------------------------------------------------------------------ imports


def test_optional_packages_are_imported_where_they_are_used_only() -> None:
    code = (
        "import importlib, pkgutil, sys, so3krates_dist as s;"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(s.__path__, s.__name__ + '.')];"
        "print([m for m in ('h5py', 'lmdb', 's3fs', 'fsspec', 'aiohttp', 'botocore', 'boto3') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
